"""Writing an ONNX model again: a few initializers change, every other byte is copied in the kernel.

The graph itself is small and goes through the `onnx` package. Tensor data does not: what lies in
data files is copied range by range, what changed is written in its place where it has the old size,
and what is new goes to a data file of its own. Where a data file loses tensors it is written without
them, so that nothing of the old weights is left in the artifact.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_converter.fold.stream import OutputStream
from safegene_converter.inputs.onnx_proto import NEW_DATA
from safegene_runtime.errors import FormatError, OutputError, Problem
from safegene_runtime.formats.onnx.file import OnnxFile
from safegene_runtime.formats.onnx.tensor import DataType, Initializer
from safegene_runtime.progress import Step

__all__ = ["Change", "insert_nodes", "write_onnx"]

ALIGNMENT = 64
INLINE_BYTES = 1024
"""Smaller tensors stay in the graph: a reference to a data file is not shorter."""
MAX_GRAPH_BYTES = (1 << 31) - 1


@dataclass
class Change:
    """What becomes of the initializers of a model.

    Attributes:
        replaced: new content by name: (array, type, shape); the size may differ.
        added: likewise, for new names.
        removed: names that nothing uses any more.
    """

    replaced: dict[str, tuple[npt.NDArray[Any], DataType, tuple[int, ...]]] = field(
        default_factory=dict
    )
    added: dict[str, tuple[npt.NDArray[Any], DataType, tuple[int, ...]]] = field(
        default_factory=dict
    )
    removed: set[str] = field(default_factory=set)


def insert_nodes(graph: Any, after: Mapping[int, Sequence[Any]]) -> None:
    """Puts nodes behind those of a GraphProto whose index is given; the others keep their order."""
    if not after:
        return
    nodes = []
    for index, node in enumerate(graph.node):
        nodes.append(type(node).FromString(node.SerializeToString()))
        nodes.extend(after.get(index, ()))
    del graph.node[:]
    graph.node.extend(nodes)


def write_onnx(
    model: OnnxFile,
    proto: Any,
    change: Change,
    folder: Path,
    progress: Step | None = None,
) -> dict[str, str]:
    """Writes the changed model into `folder` under its own file names.

    Args:
        model: the base, as it was read.
        proto: its graph, with nodes already changed; its initializers are brought up to date here.
        change: what becomes of them.
        folder: where to; the files must not exist.
        progress: told bytes as they are written.

    Returns:
        SHA-256 by file name.

    Raises:
        OutputError: the file system said no, or the graph is too large for one file.
    """
    digests: dict[str, str] = {}
    tensors = {tensor.name: tensor for tensor in proto.graph.initializer}
    outgrown: dict[str, tuple[npt.NDArray[Any], DataType, tuple[int, ...]]] = {}
    for path in model.files:
        if path == model.path:
            continue
        here = sorted(
            (info for info in model.initializers.values() if info.path == path),
            key=lambda info: info.offset,
        )
        moved = _write_data(here, change, folder / path.name, outgrown, progress)
        if moved is None:
            continue
        digests[path.name] = moved.sha256
        for name, offset in moved.offsets.items():
            _point(tensors[name], path.name, offset, model.initializers[name].nbytes)
    for name, (data, kind, shape) in change.replaced.items():
        info = model.initializers[name]
        tensors[name].data_type = int(kind)
        tensors[name].dims[:] = shape
        if info.path is None or info.path == model.path:
            _inline(tensors[name], data)
    for name in change.added:
        tensors[name] = proto.graph.initializer.add(name=name)
    new = {**outgrown, **change.added}
    large = {name: entry for name, entry in new.items() if entry[0].nbytes >= INLINE_BYTES}
    if large:
        place = f"{model.path.name}.{NEW_DATA}"
        with OutputStream(folder / place, progress) as out:
            for name, (data, _, _) in large.items():
                out.pad(ALIGNMENT)
                _point(tensors[name], place, out.position, data.nbytes)
                out.write(data)
        digests[place] = out.sha256
    for name, (data, kind, shape) in new.items():
        tensors[name].data_type = int(kind)
        tensors[name].dims[:] = shape
        if name not in large:
            _inline(tensors[name], data)
    kept = [tensor for tensor in proto.graph.initializer if tensor.name not in change.removed]
    if len(kept) < len(proto.graph.initializer):
        copies = [type(tensor).FromString(tensor.SerializeToString()) for tensor in kept]
        del proto.graph.initializer[:]
        proto.graph.initializer.extend(copies)
    data = proto.SerializeToString(deterministic=True)
    if len(data) > MAX_GRAPH_BYTES:
        raise OutputError(
            Problem(
                model.path.name,
                "graph",
                "at most 2 GiB",
                f"{len(data)} bytes",
                "save the base with external data first",
            )
        )
    with OutputStream(folder / model.path.name, progress) as out:
        out.write(data)
    digests[model.path.name] = out.sha256
    return digests


@dataclass
class _Data:
    sha256: str
    offsets: dict[str, int]


def _write_data(
    here: list[Initializer],
    change: Change,
    target: Path,
    outgrown: dict[str, tuple[npt.NDArray[Any], DataType, tuple[int, ...]]],
    progress: Step | None,
) -> _Data | None:
    """One data file: as it was but for changed tensors, packed anew where some left it, or none."""
    source = here[0].path
    if source is None:
        raise FormatError(Problem(target.name, "data", "a range of a file", "nothing"))
    ranges = Counter((info.offset, info.nbytes) for info in here)
    leaving = {
        info.name
        for info in here
        if info.name in change.removed
        or (
            info.name in change.replaced
            # another size, or bytes that equal tensors share: those keep them
            and (
                change.replaced[info.name][0].nbytes != info.nbytes
                or ranges[info.offset, info.nbytes] > 1
            )
        )
    }
    for name in leaving - change.removed:
        outgrown[name] = change.replaced[name]
    if len(leaving) == len(here):
        return None
    offsets: dict[str, int] = {}
    with OutputStream(target, progress) as out:
        if not leaving:
            at = 0
            for info in here:
                offsets[info.name] = info.offset
                if info.name in change.replaced:
                    out.copy(source, at, info.offset - at, info.name)
                    out.write(change.replaced[info.name][0])
                    at = info.offset + info.nbytes
            out.copy(source, at, source.stat().st_size - at, target.name)
        else:
            moved: dict[tuple[int, int], int] = {}
            for info in here:
                if info.name in leaving:
                    continue
                old = (info.offset, info.nbytes)
                if old not in moved:
                    out.pad(ALIGNMENT)
                    moved[old] = out.position
                    if info.name in change.replaced:
                        out.write(change.replaced[info.name][0])
                    else:
                        out.copy(source, info.offset, info.nbytes, info.name)
                offsets[info.name] = moved[old]
    return _Data(out.sha256, offsets)


def _point(tensor: Any, location: str, offset: int, length: int) -> None:
    """Makes a TensorProto refer to a range of a data file."""
    import onnx

    for name in ("raw_data", "float_data", "int32_data", "int64_data"):
        tensor.ClearField(name)
    del tensor.external_data[:]
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=str(value))


def _inline(tensor: Any, data: npt.NDArray[Any]) -> None:
    for name in ("float_data", "int32_data", "int64_data", "data_location"):
        tensor.ClearField(name)
    del tensor.external_data[:]
    tensor.raw_data = np.ascontiguousarray(data).tobytes()
