"""What a model file says of the adapter in it, held against the manifest beside it.

The converter writes `safegene.adapter.sha256` into every GGUF, and into every graph's metadata_props,
with the form, the expression, the number of modules and its own version.
A file that was taken from another artifact, or never converted, is found by it even under a manifest
that lists its bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from safegene_runtime.artifact.manifest import Manifest
from safegene_runtime.errors import Problems
from safegene_runtime.formats.files import sha256_of

__all__ = ["ADAPTER_KEY", "FACTOR_MARK", "adapter_digest", "check_provenance"]

ADAPTER_KEY = "safegene.adapter.sha256"
FACTOR_MARK = ".safegene.lora_"
"""In the names of the factors in an ONNX graph and its adapter file; what follows is A or B."""


def adapter_digest(files: Mapping[str, str]) -> str:
    """SHA-256 of an adapter as a whole: of a line `name digest` for each entry, by name.

    Args:
        files: the manifest's `adapter.files`: SHA-256 of each file, and of the expression.
    """
    return sha256_of(
        "".join(f"{name} {digest}\n" for name, digest in sorted(files.items())).encode()
    )


def check_provenance(
    manifest: Manifest, said: Callable[[str], Any], where: str, problems: Problems
) -> None:
    """Adds a problem unless a file says of itself what the manifest says of it.

    Args:
        manifest: of the artifact.
        said: what the file has at a `safegene.*` key; None for nothing.
        where: the file.
        problems: what was found so far.
    """
    found, expected = said(ADAPTER_KEY), adapter_digest(manifest.adapter["files"])
    if found is None:
        problems.add(
            where, ADAPTER_KEY, expected, "nothing",
            "safegene did not write this file, or not as part of an artifact: convert again",
        )  # fmt: skip
    elif found != expected:
        problems.add(
            where, ADAPTER_KEY, expected, found if isinstance(found, str) else repr(found),
            "the file was made with another adapter than the manifest says: convert again",
        )  # fmt: skip
    else:
        for key, stated in (
            ("version", manifest.tool["version"]),
            ("form", manifest.artifact["form"]),
            ("expression", manifest.adapter["expression"]),
            ("modules", len(manifest.modules)),
        ):
            if str(said(f"safegene.{key}")) != str(stated):
                problems.add(
                    where, f"safegene.{key}", f"{stated}, as the manifest says",
                    said(f"safegene.{key}"), "the manifest was edited: restore it, or convert again",
                )  # fmt: skip
