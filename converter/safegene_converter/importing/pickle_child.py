"""Reads the tensors of a pickled adapter in a process of its own, and writes them as safetensors.

torch reads with `weights_only=True`: what is no tensor, number or text is refused, and nothing of the file
is called. Should that fail one day, this process still can neither reach the network nor start another.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safegene_runtime.child import answer_job
from safegene_runtime.errors import FormatError, Problem

__all__ = ["forbid_way_out"]

_FORBIDDEN = (
    "socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.system",
    "ctypes.dlopen", "pty.spawn",
)  # fmt: skip
"""Beginnings of Python's audit events."""


def forbid_way_out() -> None:
    """From here on this process reaches no network and starts no other process."""

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_FORBIDDEN):
            raise PermissionError(f"a pickle asked for {event}")

    sys.addaudithook(refuse)


def _run(job: dict[str, Any]) -> dict[str, Any]:
    import torch  # noqa: F401
    from safetensors.torch import save_file  # noqa: F401

    forbid_way_out()
    for source, target in zip(job["sources"], job["targets"], strict=True):
        _rewrite(Path(source), target)
    return {}


def _rewrite(source: Path, target: str) -> None:
    import torch
    from safetensors.torch import save_file

    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle raises anything at all
        raise FormatError(
            Problem(str(source), "pickle", "tensors by name, and nothing else",
                    " ".join(str(error).split())[:300], "only weights are read, and no code is run")
        ) from error  # fmt: skip
    if not isinstance(found, Mapping) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) and value.layout == torch.strided
        for name, value in found.items()
    ):
        raise FormatError(
            Problem(str(source), "pickle", "dense tensors by name", "something else",
                    "pass the folder of the adapter, not a checkpoint of the training")
        )  # fmt: skip
    save_file({name: value.contiguous().clone() for name, value in found.items()}, target)


if __name__ == "__main__":
    sys.exit(answer_job(_run))
