"""y = W x + B (A x) in an ONNX graph: A and B as constants, or as inputs with empty defaults."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from safegene_converter import formula
from safegene_converter.fold.manifest_lines import module_entry
from safegene_converter.fold.survival import Meter, Mode, Survival, passes
from safegene_converter.inputs.adapter import Module
from safegene_converter.inputs.onnx_graph import Linear
from safegene_converter.onnx import weights
from safegene_converter.onnx.fold import OnnxFold, Touched
from safegene_converter.onnx.writer import Change, insert_nodes
from safegene_runtime.artifact.manifest import ModuleEntry, SlotEntry
from safegene_runtime.artifact.provenance import FACTOR_MARK
from safegene_runtime.errors import BaseModelError, Problems, SurvivalError
from safegene_runtime.formats.files import sha256_of
from safegene_runtime.formats.onnx.file import OnnxFile
from safegene_runtime.formats.onnx.linear import FLOAT_DATA
from safegene_runtime.formats.onnx.tensor import DataType
from safegene_runtime.progress import Progress

__all__ = ["branch", "slot_entries", "slot_names", "write_adapter"]

ADAPTER_VERSION = 1


def slot_names(linear: Linear) -> tuple[str, str]:
    """The names of A and B in the graph, and in the `.onnx_adapter`."""
    stem = linear.weight.name.removesuffix(".weight").removesuffix("_Q4").removesuffix("_Q8")
    return f"{stem}{FACTOR_MARK}A", f"{stem}{FACTOR_MARK}B"


def _slot_type(model: OnnxFile, linear: Linear) -> DataType:
    """The float type that flows through a linear."""
    return weights.kind_of(model, linear).data_type


def slots_of(fold: OnnxFold) -> Iterator[tuple[Touched, tuple[str, str], DataType, list[Any]]]:
    """Each touched weight with the names, the type and the values of its factors, as stored.

    A^T (in, R) and B^T (R, out): what MatMul wants on its right.
    """
    for one in fold.touched:
        kind = _slot_type(fold.base.model, one.linear)
        a, b = one.factors()
        values = [
            np.ascontiguousarray(weights.from_float32(np.ascontiguousarray(factor.T), kind))
            for factor in (a, b)
        ]
        yield one, slot_names(one.linear), kind, values


def slot_entries(fold: OnnxFold) -> tuple[SlotEntry, ...]:
    """What the manifest says of the slots, in the order of their names."""
    return tuple(
        sorted(
            (
                SlotEntry(name, (value.shape[0], value.shape[1]), FLOAT_DATA[kind])
                for _, slots, kind, values in slots_of(fold)
                for name, value in zip(slots, values, strict=True)
            ),
            key=lambda entry: entry.name,
        )
    )


def branch(fold: OnnxFold, proto: Any, change: Change, tell: Progress) -> list[ModuleEntry]:
    """Adds the factors behind every touched linear, as constants or, for `adapter`, as slots.

    Args:
        fold: what is folded into what.
        proto: the graph, changed here.
        change: the initializers that come with it.
        tell: told how far it is.

    Raises:
        BaseModelError: a name that the base uses already.
        SurvivalError: factors that do not survive in the float type of the graph.
    """
    graph = proto.graph
    taken = {tensor.name for tensor in graph.initializer}
    after: dict[int, list[Any]] = {}
    modules: list[ModuleEntry] = []
    problems, clashes = Problems(), Problems()
    node_type = type(graph.node[0])
    for number, (one, slots, kind, values) in enumerate(slots_of(fold)):
        linear = one.linear
        for name in slots:
            if name in taken:
                clashes.add(
                    str(fold.base.model.path), name, "a name that is free", "one that is taken",
                    "rename it in the base",
                )  # fmt: skip
            taken.add(name)
        if not fold.form.has_slots:
            for name, value in zip(slots, values, strict=True):
                change.added[name] = (value, kind, tuple(value.shape))
        else:
            _add_inputs(graph, slots, kind, linear.shape, change, values[0].dtype)
        node = graph.node[linear.node]
        output = node.output[0]
        plain = f"{output}/safegene_base"
        node.output[0] = plain
        stem = f"{linear.name}/safegene"
        after[linear.node] = [
            node_type(op_type="MatMul", name=f"{stem}/lora_A", input=[linear.x, slots[0]],
                      output=[f"{stem}/lora_A/output_0"]),
            node_type(op_type="MatMul", name=f"{stem}/lora_B",
                      input=[f"{stem}/lora_A/output_0", slots[1]],
                      output=[f"{stem}/lora_B/output_0"]),
            node_type(op_type="Add", name=f"{stem}/Add", input=[plain, f"{stem}/lora_B/output_0"],
                      output=[output]),
        ]  # fmt: skip
        for module, place in one.parts:
            survival = None
            if kind is not DataType.FLOAT:
                survival = _factor_survival(module, kind)
                if not passes(survival, fold.bounds):
                    problems.add(
                        place.tensor, "survival", "a delta that survives in " + kind.name,
                        f"gain {survival.gain:.3f}, relative error {survival.relative_error:.3f}",
                        "export the base with a wider type",
                    )  # fmt: skip
            modules.append(
                module_entry(
                    module, place.tensor,
                    weights.kind_of(fold.base.model, linear).name,
                    weights.kind_of(fold.base.model, linear).name,
                    0, sum(value.nbytes for value in values) // len(one.parts),
                    sha256_of(b"".join(value.tobytes() for value in values)), survival,
                )
            )  # fmt: skip
        tell("adding branches", number + 1, len(fold.touched))
    clashes.raise_if_any(BaseModelError)
    problems.raise_if_any(SurvivalError)
    insert_nodes(graph, after)
    return sorted(modules, key=lambda entry: entry.tensor)


def _factor_survival(module: Module, kind: DataType) -> Survival:
    """What rounding the factors to the graph's own type leaves of the delta."""
    stored = [
        weights.to_float32(weights.from_float32(np.ascontiguousarray(factor), kind), kind)
        for factor in (formula.scaled_b(module), module.a)
    ]
    meter, delta = Meter(Mode.GRID), formula.delta(module)
    meter.add(np.zeros_like(delta), delta, formula.product(*stored))
    return meter.result()


def _add_inputs(
    graph: Any,
    slots: tuple[str, str],
    kind: DataType,
    shape: tuple[int, int],
    change: Change,
    dtype: np.dtype[Any],
) -> None:
    """Inputs with an empty default: rank 0, which adds nothing."""
    rank = f"{slots[0]}.rank"
    out, cols = shape
    for name, dims in ((slots[0], (cols, rank)), (slots[1], (rank, out))):
        value = graph.input.add(name=name)
        value.type.tensor_type.elem_type = int(kind)
        for dim in dims:
            made = value.type.tensor_type.shape.dim.add()
            if isinstance(dim, str):
                made.dim_param = dim
            else:
                made.dim_value = dim
        empty = tuple(0 if isinstance(dim, str) else dim for dim in dims)
        change.added[name] = (np.zeros(empty, dtype), kind, empty)


def write_adapter(fold: OnnxFold, path: Path) -> None:
    """The values of all slots, in the file format of `onnxruntime.LoraAdapter`."""
    import onnxruntime

    parameters = {}
    for _, slots, kind, values in slots_of(fold):
        for name, value in zip(slots, values, strict=True):
            if kind is DataType.BFLOAT16:
                made = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(value, int(kind))
            else:
                made = onnxruntime.OrtValue.ortvalue_from_numpy(value)
            parameters[name] = made
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(ADAPTER_VERSION)
    adapter.set_model_version(ADAPTER_VERSION)
    adapter.set_parameters(parameters)
    adapter.export_adapter(str(path))
