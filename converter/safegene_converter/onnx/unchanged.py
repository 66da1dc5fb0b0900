"""Whatever a conversion to ONNX does not mean to change is the base's: nodes, tensors, and the rest.

What is meant to change is found by what it is connected to, not by its name:

    merged   the touched weights; of packed ones scales, zero points and `bits` as well, or the node is
             a MatMul over floats, with an Add for its bias
    branch   y = W x, which is called otherwise now, + (x A) B: three nodes and two constants
    adapter  likewise, and A and B are inputs, too

Take that away, and every node, every initializer (its bytes, wherever they lie), every input and every
other field must equal the base's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safegene_converter.onnx.reader import OnnxReader, fields_of
from safegene_runtime.artifact.forms import Form
from safegene_runtime.errors import PostconditionError, Problems

__all__ = ["METADATA_PREFIX", "NOTHING_ELSE", "compare_unchanged"]

BLOCK = 1 << 20
"""Bytes that are compared at a time."""
NOTHING_ELSE = "a conversion changes nothing else: please report this"
METADATA_PREFIX = "safegene."
"""Of what a conversion says about itself in metadata_props."""


@dataclass
class _Ours:
    """What a conversion may have done to a graph.

    Attributes:
        nodes: the first outputs of nodes that it added.
        renamed: outputs that are called otherwise, by their new name.
        rewritten: nodes of the base that were rewritten as they may be, by the artifact's output.
        added: its new initializers.
        touched: initializers of the base that may differ, or be gone.
    """

    nodes: set[str] = field(default_factory=set)
    renamed: dict[str, str] = field(default_factory=dict)
    rewritten: dict[str, Any] = field(default_factory=dict)
    added: set[str] = field(default_factory=set)
    touched: set[str] = field(default_factory=set)


def compare_unchanged(
    base: OnnxReader,
    artifact: OnnxReader,
    slots: Mapping[str, Mapping[str, Any]],
    form: Form,
    problems: Problems,
) -> None:
    """Compares everything that is not meant to change; data a block at a time.

    Args:
        base: the graph that the delta was added to.
        artifact: what was written.
        slots: {weight: {"names": [A, B], ...}}, the weights that are touched.
        form: of the artifact.
        problems: where complaints go.
    """
    ours = _Ours()
    for weight, slot in slots.items():
        try:
            linear, _ = base.linear(weight)
            if form.merges:
                _merged(base, artifact, weight, linear, ours)
            else:
                _branch(artifact, linear, slot["names"], ours, problems)
        except PostconditionError as error:
            problems.extend(error.problems)
    _compare_nodes(base, artifact, ours, problems)
    _compare_tensors(base, artifact, ours, problems)
    slot_inputs = ours.added if form.has_slots else set()
    _compare_rest(base, artifact, slot_inputs, problems)


def _merged(base: OnnxReader, artifact: OnnxReader, weight: str, linear: Any, ours: _Ours) -> None:
    """The constants of a weight, and its node where that was packed."""
    ours.touched.add(weight)
    if linear.op_type != "MatMulNBits":
        return
    # scales and zero points that another weight shares are its own as well
    ours.touched |= {name for name in linear.input[2:4] if len(base.readers[name]) == 1}
    node, _ = artifact.linear(weight)
    if node.op_type == "MatMulNBits":
        ours.added |= {name for name in node.input[2:4] if name and name not in base.tensors}
        is_meant = _without_width(node) == _without_width(linear)
    else:
        is_meant = _is_unpacked(artifact, node, linear, weight, ours)
    if is_meant:
        ours.rewritten[node.output[0]] = linear


def _without_width(node: Any) -> bytes:
    """A MatMulNBits without what depends on its bits."""
    one = _copy(node)
    kept = [attribute for attribute in node.attribute if attribute.name != "bits"]
    del one.attribute[:]
    one.attribute.extend(kept)
    for index in range(2, min(4, len(one.input))):
        one.input[index] = ""
    return _bytes(one)


def _is_unpacked(artifact: OnnxReader, node: Any, linear: Any, weight: str, ours: _Ours) -> bool:
    """Whether a node is the MatMul over floats of a MatMulNBits, its bias added behind it."""
    meant = _copy(linear)
    meant.op_type, meant.domain = "MatMul", ""
    del meant.attribute[:]
    meant.input[:] = [linear.input[0], weight]
    y, bias = linear.output[0], [*linear.input, *[""] * 6][5]
    if bias:
        meant.output[0] = node.output[0]
        add = artifact.makers.get(y)
        if not _is(add, "Add", [node.output[0], bias]):
            return False
        ours.nodes.add(y)
        ours.renamed[node.output[0]] = y
    return _bytes(node) == _bytes(meant)


def _branch(
    artifact: OnnxReader, linear: Any, names: list[str], ours: _Ours, problems: Problems
) -> None:
    """The three nodes around a linear: y = plain + (x A) B."""
    x, y = linear.input[0], linear.output[0]
    ours.added.update(names)
    makers: Mapping[str, Any] = artifact.makers
    add = makers.get(y)
    plain, low = add.input if add is not None and len(add.input) == 2 else ("", "")
    last = makers.get(low)
    inner = last.input[0] if last is not None and last.input else ""
    if not (
        _is(add, "Add", [plain, low])
        and _is(last, "MatMul", [inner, names[1]])
        and _is(makers.get(inner), "MatMul", [x, names[0]])
    ):
        problems.add(
            str(artifact.path),
            linear.name or y,
            f"{y} = {linear.op_type} + ({x} A) B",
            "others",
            NOTHING_ELSE,
        )
        return
    ours.nodes |= {y, low, inner}
    ours.renamed[plain] = y


def _is(node: Any, op_type: str, inputs: list[str]) -> bool:
    """Whether a node of ONNX itself is just that."""
    return (
        node is not None
        and (node.op_type, node.domain, list(node.input)) == (op_type, "", inputs)
        and not node.attribute
        and len(node.output) == 1
    )


def _compare_nodes(base: OnnxReader, artifact: OnnxReader, ours: _Ours, problems: Problems) -> None:
    before = {tuple(node.output): node for node in base.proto.graph.node}
    after = {}
    for node in artifact.proto.graph.node:
        if node.output and node.output[0] in ours.nodes:
            continue
        one = _copy(ours.rewritten.get(node.output[0] if node.output else "", node))
        for index, name in enumerate(one.output):
            one.output[index] = ours.renamed.get(name, name)
        after[tuple(one.output)] = one
    _compare_messages(str(artifact.path), "node", before, after, problems)
    if list(before) != list(after) and before.keys() == after.keys():
        problems.add(str(artifact.path), "nodes", "the base's order", "another", NOTHING_ELSE)


def _compare_tensors(
    base: OnnxReader, artifact: OnnxReader, ours: _Ours, problems: Problems
) -> None:
    where = str(artifact.path)
    before = {name: one for name, one in base.tensors.items() if name not in ours.touched}
    after = {
        name: one for name, one in artifact.tensors.items() if name not in ours.touched | ours.added
    }
    _compare_messages(where, "initializer", before, after, problems, but=("external_data",))
    for name in before.keys() & after.keys():
        if not _same_data(base, artifact, name):
            problems.add(
                where, f"initializer {name}", "the base's, byte for byte", "others", NOTHING_ELSE
            )


def _same_data(base: OnnxReader, artifact: OnnxReader, name: str) -> bool:
    """Whether the bytes that a tensor has in other files are equal; it has none there where inline."""
    from onnx import external_data_helper as external

    tensors = base.tensors[name], artifact.tensors[name]
    if not all(map(external.uses_external_data, tensors)):
        return True  # then the messages hold them, and have been compared
    one, other = map(external.ExternalDataInfo, tensors)
    left = other.length
    if left is None or one.length not in (None, left):
        return False
    with (
        (base.path.parent / one.location).open("rb") as old,
        (artifact.path.parent / other.location).open("rb") as new,
    ):
        old.seek(one.offset or 0)
        new.seek(other.offset or 0)
        while left:
            piece = new.read(min(left, BLOCK))
            if not piece or piece != old.read(len(piece)):
                return False
            left -= len(piece)
    return True


def _compare_rest(
    base: OnnxReader, artifact: OnnxReader, slot_inputs: set[str], problems: Problems
) -> None:
    """Inputs, outputs, opsets, functions, metadata and whatever else there is."""
    where = str(artifact.path)
    old, new = base.proto, artifact.proto
    inputs = [
        [_bytes(value) for value in proto.graph.input if value.name not in slot_inputs]
        for proto in (old, new)
    ]
    metadata = [
        {prop.key: prop.value for prop in proto.metadata_props
         if not prop.key.startswith(METADATA_PREFIX)}
        for proto in (old, new)
    ]  # fmt: skip
    for what, (one, other) in (("inputs", inputs), ("metadata_props", metadata)):
        if one != other:
            problems.add(where, what, "the base's", "others", NOTHING_ELSE)
    for pair, but in (
        ((old, new), ("graph", "metadata_props")),
        ((old.graph, new.graph), ("node", "initializer", "input")),
    ):
        fields = [fields_of(message, but) for message in pair]
        for name in _differing(*fields):
            problems.add(where, name, "the base's", "another", NOTHING_ELSE)


def _compare_messages(
    where: str,
    what: str,
    before: Mapping[Any, Any],
    after: Mapping[Any, Any],
    problems: Problems,
    but: tuple[str, ...] = (),
) -> None:
    """Messages of the base and of the artifact by a key: none missing, none new, none different."""
    for key in dict.fromkeys((*before, *after)):
        one, other = before.get(key), after.get(key)
        name = f"{what} {(after if one is None else before)[key].name or key}"
        if one is None or other is None:
            expected, got = ("none", "a new one") if one is None else ("the base's", "none")
            problems.add(where, name, expected, got, NOTHING_ELSE)
        elif differing := _differing(fields_of(one, but), fields_of(other, but)):
            problems.add(where, name, "the base's", f"another {', '.join(differing)}", NOTHING_ELSE)


def _differing(one: Mapping[str, bytes], other: Mapping[str, bytes]) -> list[str]:
    return [name for name in {**one, **other} if one.get(name) != other.get(name)]


def _copy(message: Any) -> Any:
    return type(message).FromString(_bytes(message))


def _bytes(message: Any) -> bytes:
    found: bytes = message.SerializeToString(deterministic=True)
    return found
