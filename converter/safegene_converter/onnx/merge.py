"""W' = W + dW in the stored weights of an ONNX graph; only a promotion changes a node."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_converter.fold.manifest_lines import module_entry
from safegene_converter.fold.survival import Meter, Mode, Survival, passes
from safegene_converter.inputs.onnx_graph import Linear, Place, users_of
from safegene_converter.onnx import weights
from safegene_converter.onnx.fold import OnnxFold, Touched
from safegene_converter.onnx.weights import Encoded
from safegene_converter.onnx.writer import Change, insert_nodes
from safegene_runtime.artifact.manifest import ModuleEntry
from safegene_runtime.errors import Problem, Problems, SurvivalError
from safegene_runtime.formats.files import sha256_of
from safegene_runtime.formats.onnx.file import OnnxFile
from safegene_runtime.formats.onnx.tensor import DataType
from safegene_runtime.progress import Progress

__all__ = ["merge"]

Rows = npt.NDArray[np.float32]
INT_ATTRIBUTE = 2
"""AttributeProto.INT."""


def merge(fold: OnnxFold, proto: Any, change: Change, tell: Progress) -> list[ModuleEntry]:
    """Merges every touched weight, promoted where the gate asks for it.

    Args:
        fold: what is folded into what.
        proto: the graph; the nodes of promoted weights are changed here.
        change: the initializers that come with it.
        tell: told how far it is.

    Raises:
        SurvivalError: every weight whose delta would be lost.
    """
    modules: list[ModuleEntry] = []
    problems = Problems()
    users = users_of(fold.base.model)
    after: dict[int, list[Any]] = {}
    for number, one in enumerate(fold.touched):
        try:
            encoded, survivals = _merge_one(fold, one)
        except SurvivalError as error:
            problems.extend(error.problems)
            continue
        finally:
            tell("merging", number + 1, len(fold.touched))
        before = weights.kind_of(fold.base.model, one.linear)
        index = one.linear.node
        node = proto.graph.node[index]
        if follows := _store(fold.base.model, one.linear, encoded, node, change, users):
            after[index] = [follows]
        for (module, place), survival in zip(one.parts, survivals, strict=True):
            share = module.shape[0] / one.linear.shape[0]
            modules.append(
                module_entry(
                    module, place.tensor, before.name, encoded.kind.name,
                    round(_stored_bytes(fold.base.model, one.linear) * share),
                    round(encoded.nbytes * share),
                    sha256_of(b"".join(_row_bytes(encoded, one.linear, place))),
                    survival,
                )
            )  # fmt: skip
    problems.raise_if_any(SurvivalError)
    insert_nodes(proto.graph, after)
    return sorted(modules, key=lambda entry: entry.tensor)


def _merge_one(fold: OnnxFold, one: Touched) -> tuple[Encoded, list[Survival]]:
    """Tries kinds, cheapest first, until the delta of every module survives."""
    model, linear = fold.base.model, one.linear
    now = weights.kind_of(model, linear)
    stored_base = weights.read_weight(model, linear)
    # with the float weights at hand they are what the delta is added to, and quantised once
    once = fold.hf is not None and now.name != "F32"
    base = _float_weight(fold, one, stored_base) if once else stored_base
    delta = one.delta()
    tried: list[str] = []
    kinds = weights.kinds_to_try(now, linear.shape) if fold.promote else (now,)
    for kind in kinds:
        encoded, decoded = weights.encode(base + delta, kind, linear)
        own = None
        if once:
            own = stored_base if kind == now else weights.encode(base, kind, linear)[1]
        survivals = []
        for _, place in one.parts:
            rows = slice(*place.rows)
            meter = Meter(Mode.ONCE if once else Mode.GRID)
            meter.add(
                np.ascontiguousarray(base[rows]),
                delta[rows],
                np.ascontiguousarray(decoded[rows]),
                np.ascontiguousarray(own[rows]) if own is not None else None,
            )
            survivals.append(meter.result())
        if all(passes(survival, fold.bounds) for survival in survivals):
            if kind == now and now.blocks is not None:
                packed = weights.read_packed(model, linear)
                encoded = weights.keep_rows(encoded, packed, one.rows)
            return encoded, survivals
        worst = min(survivals, key=lambda survival: survival.gain)
        tried.append(
            f"{kind.name}: gain {worst.gain:.3f}, relative error {worst.relative_error:.3f}"
        )
    raise SurvivalError(
        Problem(
            linear.name,
            "survival",
            f"gain in [{fold.bounds.gain_min:g}, {fold.bounds.gain_max:g}] and relative error <= "
            f"{fold.bounds.error_max:g}",
            "; ".join(tried),
            "use --as branch, which keeps the delta in float",
        )
    )


def _float_weight(fold: OnnxFold, one: Touched, stored: Rows) -> Rows:
    """The weight before it was exported, (out, in).

    Rows of other modules as well where they are packed: a promotion rounds all rows anew. In floats
    nothing happens to them, so they stay what the graph has.
    """
    if fold.hf is None:
        return stored
    base = stored.copy()
    touched = {module.name for module, _ in one.parts}
    for module, places in fold.base.places.items():
        if one.linear.layout != "nbits" and module not in touched:
            continue
        for place in places:
            if place.linear.node == one.linear.node:
                base[slice(*place.rows)] = fold.hf.read_weight(module)
    return base


def _store(
    model: OnnxFile,
    linear: Linear,
    encoded: Encoded,
    node: Any,
    change: Change,
    users: Mapping[str, Sequence[str]],
) -> Any:
    """Puts an encoded weight where the node will find it; rewrites the node if its kind changed.

    Returns:
        a node that has to follow, or None.
    """
    data = encoded.parts["weight"]
    blocks = encoded.kind.blocks
    if blocks is None:
        change.replaced[linear.weight.name] = (data, encoded.kind.data_type, tuple(data.shape))
        return _unpack_node(linear, node, change, users) if linear.layout == "nbits" else None
    change.replaced[linear.weight.name] = (data, DataType.UINT8, tuple(data.shape))
    for role, index in (("scales", 2), ("zero_points", 3)):
        if role not in encoded.parts:
            continue
        info = model.initializers[node.input[index]]
        part = encoded.parts[role]
        shape = info.shape if part.size == math.prod(info.shape) else tuple(part.shape)
        if len(users[info.name]) == 1:
            change.replaced[info.name] = (part, info.dtype, shape)
        else:  # exporters may store equal constants once: the others keep theirs
            node.input[index] = f"{linear.weight.name}.safegene.{role}"
            change.added[node.input[index]] = (part, info.dtype, shape)
    kept = [attribute for attribute in node.attribute if attribute.name != "bits"]
    if len(kept) == len(node.attribute):
        node.attribute.add(name="bits", type=INT_ATTRIBUTE, i=blocks.bits)
    for attribute in node.attribute:
        if attribute.name == "bits":
            attribute.i = blocks.bits
    return None


def _unpack_node(
    linear: Linear, node: Any, change: Change, users: Mapping[str, Sequence[str]]
) -> Any:
    """MatMulNBits -> MatMul over a float weight (in, out), and Add where there was a bias."""
    inputs = [*node.input, *[""] * 6]
    change.removed.update(name for name in inputs[2:4] if name and len(users[name]) == 1)
    bias, output = inputs[5], node.output[0]
    node.op_type, node.domain = "MatMul", ""
    del node.attribute[:]
    node.input[:] = [linear.x, linear.weight.name]
    if not bias:
        return None
    node.output[0] = f"{output}/safegene_unbiased"
    return type(node)(
        op_type="Add", name=f"{linear.name}/safegene/bias", input=[node.output[0], bias],
        output=[output],
    )  # fmt: skip


def _stored_bytes(model: OnnxFile, linear: Linear) -> int:
    """Bytes of all initializers of a weight."""
    names_ = model.nodes[linear.node].inputs[1:4] if linear.layout == "nbits" else ()
    found = {linear.weight.name, *(name for name in names_ if name in model.initializers)}
    return sum(model.initializers[name].nbytes for name in found)


def _row_bytes(encoded: Encoded, linear: Linear, place: Place) -> Iterator[bytes]:
    """The stored bytes of one module's rows, part by part, row by row."""
    rows = slice(*place.rows)
    for role in sorted(encoded.parts):
        part = encoded.parts[role]
        if encoded.kind.blocks is None and linear.layout != "out_in":
            yield np.ascontiguousarray(part[:, rows]).tobytes()
        else:
            yield np.ascontiguousarray(part[rows]).tobytes()
