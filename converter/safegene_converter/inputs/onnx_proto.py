"""An ONNX graph as the `onnx` package holds it, for whoever writes one."""

from __future__ import annotations

from typing import Any

from safegene_runtime.errors import FormatError, Problem
from safegene_runtime.formats.onnx.file import OnnxFile

__all__ = ["NEW_DATA", "load_proto"]

NEW_DATA = "safegene.data"


def load_proto(model: OnnxFile) -> Any:
    """The graph as a ModelProto, without the tensor data of other files.

    Raises:
        FormatError: the onnx package cannot read what our reader could.
    """
    import onnx

    try:
        return onnx.load(str(model.path), load_external_data=False)
    except Exception as error:  # google.protobuf raises its own
        raise FormatError(
            Problem(str(model.path), "model", "a graph that onnx reads", str(error)[:300])
        ) from error
