"""Which engine runs a file: engines are imported when they are opened, so that asking costs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safegene_runtime.engines.engine import Engine
from safegene_runtime.errors import EngineError, Problem

__all__ = ["open_engine"]


def open_engine(model: Path, adapter: Path | None = None, **settings: Any) -> Engine:
    """Opens the engine that runs `model`.

    Args:
        model: a `.gguf` file (the first shard of a sharded one), or an `.onnx` file with its
            tokenizer beside it.
        adapter: a sidecar adapter for it, applied at scale 1.
        settings: passed on to the engine, which refuses those that it does not know.

    Raises:
        EngineError: no engine for this suffix, the engine is not installed, or it refused.
        FormatError: the file breaks its format.
        TypeError: an unknown setting.
    """
    if model.suffix.lower() == ".gguf":
        from safegene_runtime.engines.llama import LlamaEngine

        return LlamaEngine(model, adapter, **settings)
    if model.suffix.lower() == ".onnx":
        from safegene_runtime.engines.ort import OrtEngine

        return OrtEngine(model, adapter, **settings)
    raise EngineError(
        Problem(
            str(model),
            "model",
            "a file that ends in .gguf or .onnx",
            repr(model.suffix),
            "give the model file itself, not its folder",
        )
    )
