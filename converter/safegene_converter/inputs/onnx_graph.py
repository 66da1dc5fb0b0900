"""The linear modules of an ONNX decoder, found by name and proved on the weights.

Three exporters name things in three ways, and all of them keep the module's path somewhere:

    onnxruntime-genai builder   node  /model/layers.0/attn/qkv_proj/MatMul
    Optimum (torch.onnx)        node  /model/layers.0/self_attn/q_proj/MatMul
    torch.onnx, dynamo          node metadata  pkg.torch.onnx.name_scopes, or the weight's name

So every name a node has is asked for `layers.N` and a projection, and they must agree. A module that
is found twice, or not at all, is an error: a delta on the wrong weight is worse than none. Packed
projections (`qkv_proj`, `gate_up_proj`) hold their parts one below the other, in that order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from safegene_runtime.architecture.table import Architecture, kind_of, parse_paths
from safegene_runtime.errors import BaseModelError, Problems
from safegene_runtime.formats.onnx.file import Graph, Node, OnnxFile
from safegene_runtime.formats.onnx.linear import PASS_ON, StoredLinear, UnreadLinear, linears

__all__ = [
    "Linear",
    "Place",
    "find_linears",
    "module_shapes",
    "place_modules",
    "users_of",
]

_SCOPE_KEYS = ("pkg.torch.onnx.name_scopes", "namespace")


@dataclass(frozen=True)
class Linear(StoredLinear):
    """A linear node of a block.

    Attributes:
        layer: its block.
        projection: `qkv_proj`, `down_proj`, ...
        parts: the linear modules of the block that it holds, top to bottom.
    """

    layer: int
    projection: str
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Place:
    """Where one module of the base lies: `rows` (start, stop) of a linear's (out, in) weight."""

    module: str
    linear: Linear
    rows: tuple[int, int]

    @property
    def tensor(self) -> str:
        """The weight's name, with the rows where it holds more than this module."""
        start, stop = self.rows
        name = self.linear.weight.name
        return name if (start, stop) == (0, self.linear.shape[0]) else f"{name}[{start}:{stop}]"


def find_linears(
    model: OnnxFile, metadata: Mapping[int, Mapping[str, str]], architecture: Architecture
) -> list[Linear]:
    """Every linear projection of a block.

    Args:
        model: the graph.
        metadata: metadata_props of nodes, by index, where they have any.
        architecture: what the projections of a block are.

    Raises:
        BaseModelError: names that contradict each other, or a weight laid out in a way we do not
            know (for example quantised with DequantizeLinear).
    """
    problems = Problems()
    parts = architecture.projections()
    found: list[Linear] = []
    products = linears(model)
    both: list[StoredLinear | UnreadLinear] = [*products.stored, *products.unread]
    for each in both:
        constant = each.weight.name if isinstance(each, StoredLinear) else each.constant
        texts = [model.nodes[each.node].name, constant, *_scopes(metadata.get(each.node, {}))]
        paths = _paths(architecture, texts)
        if len(paths) > 1:
            problems.add(
                str(model.path),
                each.name,
                "names of one module",
                f"{sorted(paths)}",
                "export again",
            )
        elif paths and isinstance(each, StoredLinear):
            layer, projection = paths.pop()
            found.append(
                Linear(**vars(each), layer=layer, projection=projection, parts=parts[projection])
            )
        elif paths and isinstance(each, UnreadLinear):
            problems.add(
                str(model.path), each.name,
                "a weight that is an initializer, or packed for MatMulNBits", each.why,
                "export without QDQ nodes, for example with the onnxruntime-genai builder",
            )  # fmt: skip
    problems.raise_if_any(BaseModelError)
    return found


def module_shapes(
    linears: Sequence[Linear], sizes: Mapping[str, int], architecture: Architecture, where: str
) -> tuple[dict[str, tuple[int, int]], dict[str, list[Place]]]:
    """(out, in) of every linear module, and where it was found.

    Args:
        linears: what `find_linears` found.
        sizes: rows of each part of a packed projection.
        architecture: what the modules of a block are called.
        where: the model, for messages.

    Raises:
        BaseModelError: a packed projection whose rows are not those of its parts.
    """
    problems = Problems()
    shapes: dict[str, tuple[int, int]] = {}
    places: dict[str, list[Place]] = {}
    for linear in linears:
        parts = linear.parts
        rows = [sizes.get(part, 0) for part in parts]
        if len(parts) == 1 or not sizes.keys() & set(parts):
            # gate and up are multiplied with each other, so they are of one size
            rows = [linear.shape[0] // len(parts)] * len(parts)
        if sum(rows) != linear.shape[0] or not all(rows):
            problems.add(
                where,
                linear.name,
                f"{linear.shape[0]} rows from {' + '.join(map(kind_of, parts))}",
                " + ".join(map(str, rows)),
                "genai_config.json or config.json must say heads and head size as exported",
            )
            continue
        start = 0
        for part, count in zip(parts, rows, strict=True):
            module = architecture.module_name(linear.layer, part)
            shapes[module] = (count, linear.shape[1])
            places.setdefault(module, []).append(Place(module, linear, (start, start + count)))
            start += count
    problems.raise_if_any(BaseModelError)
    return shapes, places


def place_modules(
    wanted: Sequence[str],
    places: Mapping[str, Sequence[Place]],
    model: OnnxFile,
    architecture: Architecture,
) -> dict[str, Place]:
    """The one place of each wanted module.

    Raises:
        BaseModelError: a module that is found nowhere, or twice, or whose weight other nodes use.
    """
    problems = Problems()
    users, passing = users_of(model), _passing(model)
    for module in wanted:
        found = places.get(module, ())
        if len(found) != 1:
            at = architecture.parse(module)
            layer, part = (at.layer, at.part) if at else ("N", module)
            looked = [name for name, parts in architecture.projections().items() if part in parts]
            problems.add(
                str(model.path),
                module,
                f"one MatMul, Gemm or MatMulNBits named layers.{layer} and {' or '.join(looked)}",
                ", ".join(place.linear.name for place in found) or "none",
                "is this a decoder with its own names, made from the adapter's base?",
            )
            continue
        weight = found[0].linear.weight.name
        reached = _reached(users, passing, weight)
        if len(reached) != 1:
            problems.add(
                str(model.path),
                weight,
                f"a weight that only {found[0].linear.name} uses",
                ", ".join(reached),
                "a shared weight cannot carry one module's delta",
            )
    problems.raise_if_any(BaseModelError)
    return {module: places[module][0] for module in wanted}


def users_of(model: OnnxFile) -> dict[str, list[str]]:
    """Who reads each value: nodes, those of graphs inside nodes as well, and outputs of a graph."""
    users: dict[str, list[str]] = {}

    def walk(graph: Graph) -> None:
        for node in graph.nodes:
            for name in node.inputs:
                users.setdefault(name, []).append(node.name or node.op_type)
            for value in node.attributes.values():
                if isinstance(value, Graph):
                    walk(value)
        for output in graph.outputs:
            users.setdefault(output.name, []).append(f"output {output.name}")

    walk(model.graph)
    return users


def _passing(model: OnnxFile) -> dict[str, list[Node]]:
    """The nodes that only pass a value on, by that value."""
    passing: dict[str, list[Node]] = {}
    for node in model.nodes:
        if node.op_type in PASS_ON and node.inputs:
            passing.setdefault(node.inputs[0], []).append(node)
    return passing


def _reached(
    users: Mapping[str, Sequence[str]], passing: Mapping[str, Sequence[Node]], weight: str
) -> list[str]:
    """Who uses a weight in the end, behind any Transpose and Identity of it."""
    found: list[str] = []
    names_ = [weight]
    for name in names_:  # which grows
        found += users.get(name, ())
        for node in passing.get(name, ()):
            found.remove(node.name or node.op_type)
            names_ += node.outputs
    return found


def _scopes(metadata: Mapping[str, str]) -> list[str]:
    return [metadata[key] for key in _SCOPE_KEYS if key in metadata]


def _paths(architecture: Architecture, texts: Sequence[str]) -> set[tuple[int, str]]:
    return set().union(*(parse_paths(architecture, text) for text in texts))
