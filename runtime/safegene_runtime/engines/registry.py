"""Which engine runs a file. An engine is a file of its own and an entry here.

Engines are imported when they are opened, so that asking costs nothing.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safegene_runtime.engines.engine import Engine
from safegene_runtime.errors import EngineError, Problem
from safegene_runtime.formats.sealed import recheck

__all__ = ["EngineKind", "engine_for", "engine_names", "open_engine", "register"]


@dataclass(frozen=True)
class EngineKind:
    """An engine that is known by name.

    Attributes:
        name: what `--engine` takes.
        title: what it is called in messages and reports: the `name` of its class.
        suffixes: of the files that it runs, lower case, with the dot.
        factory: `module:callable`; called with model, adapter or None, and settings by keyword.
        modes: the settings by which it is verified, for each mode of `verify`.
    """

    name: str
    title: str
    suffixes: tuple[str, ...]
    factory: str
    modes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def load(self) -> Any:
        """Imports the engine, and returns what opens it."""
        module, _, attribute = self.factory.partition(":")
        return getattr(importlib.import_module(module), attribute)


_KINDS: dict[str, EngineKind] = {}


def register(kind: EngineKind) -> None:
    """Makes an engine known; the first one that is known for a suffix is its default.

    Raises:
        ValueError: the name is taken.
    """
    if kind.name in _KINDS:
        raise ValueError(f"an engine named {kind.name!r} is known already")
    _KINDS[kind.name] = kind


register(
    EngineKind(
        "llama.cpp",
        "llama.cpp",
        (".gguf",),
        "safegene_runtime.engines.llama:LlamaEngine",
        {"strict": {"kv_type": "f32"}, "as-shipped": {"kv_type": "f16"}},
    )
)
register(
    EngineKind("onnxruntime", "ONNX Runtime", (".onnx",), "safegene_runtime.engines.ort:OrtEngine")
)


def engine_names() -> tuple[str, ...]:
    """What `--engine` takes."""
    return tuple(_KINDS)


def engine_for(model: Path, name: str | None = None) -> EngineKind:
    """The engine that runs `model`: the named one, else the default of its suffix.

    Raises:
        EngineError: no engine of this name, or none for this suffix.
    """
    suffix = model.suffix.lower()
    if name is not None and name not in _KINDS:
        known = ", ".join(f"{one.name} ({' '.join(one.suffixes)})" for one in _KINDS.values())
        near = difflib.get_close_matches(name.lower(), _KINDS, n=1, cutoff=0.5)
        fix = f"did you mean {near[0]}?" if near else "leave it out: the file's suffix decides"
        raise EngineError(Problem("engine", "name", f"one of {known}", repr(name), fix))
    for kind in _KINDS.values():
        if suffix in kind.suffixes and name in (None, kind.name):
            return kind
    if name is not None:
        fix = f"{_KINDS[name].title} cannot run it: leave the engine out"
        suffixes = _KINDS[name].suffixes
    else:
        fix = "give the model file itself, not its folder"
        suffixes = tuple(dict.fromkeys(one for kind in _KINDS.values() for one in kind.suffixes))
    raise EngineError(
        Problem(
            str(model), "model", f"a file that ends in {' or '.join(suffixes)}", repr(suffix), fix
        )
    )


def open_engine(
    model: Path,
    adapter: Path | None = None,
    *,
    engine: str | None = None,
    apart: bool = False,
    **settings: Any,
) -> Engine:
    """Opens the engine that runs `model`.

    Args:
        model: the file (the first shard of a sharded GGUF); what the engine needs beside it, such as a
            tokenizer, lies in the same folder.
        adapter: a sidecar adapter for it, applied at scale 1.
        engine: the name of one; by default the suffix decides.
        apart: run it in a child process, so that nothing that its native code does can end this one.
        settings: passed on to the engine, which refuses those that it does not know.

    Raises:
        EngineError: no engine of this name or for this suffix, it is not installed, or it refused; or
            its child ended or hangs.
        FormatError: the file breaks its format.
        TypeError: an unknown setting.
    """
    kind = engine_for(model, engine)
    if apart:
        from safegene_runtime.engines.apart import ChildEngine

        return ChildEngine(dataclasses.asdict(kind), model, adapter, settings)
    opened: Engine = kind.load()(model, adapter, **settings)
    try:
        recheck()
    except BaseException:
        opened.close()
        raise
    return opened
