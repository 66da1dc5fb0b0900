"""What an ONNX artifact must be before ONNX Runtime may see it, and which bounds it is held to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from safegene_runtime.artifact.manifest import Manifest
from safegene_runtime.artifact.provenance import FACTOR_MARK, check_provenance
from safegene_runtime.artifact.served_onnx import adapter_slots
from safegene_runtime.errors import ManifestError, Problems
from safegene_runtime.formats.onnx.file import OnnxFile, read_onnx
from safegene_runtime.formats.onnx.linear import FLOAT_DATA, elements_by_type, linears
from safegene_runtime.gating.bounds import precision_of

__all__ = ["check_onnx_artifact", "precision_class"]

_ROWS = re.compile(r"(?P<name>.+)\[[0-9]+:[0-9]+\]")


def check_onnx_artifact(manifest: Manifest, path: Path) -> str:
    """Reads the graph of an artifact and holds it against the manifest.

    Returns:
        the bounds class of the weights that are served, from the graph itself.

    Raises:
        FormatError: a graph or a data file that breaks its format.
        UnsupportedError: weights whose precision is not known.
        ManifestError: files, touched weights, inputs or an adapter that are not what the manifest
            says.
    """
    model = read_onnx(path)
    problems = Problems()
    check_provenance(manifest, model.metadata.get, str(path), problems)
    listed = {entry.path for entry in manifest.files}
    for file in model.files:
        if file.name not in listed:
            problems.add(
                str(path), file.name, "a file that the manifest lists", "none", "convert again"
            )
    may_have_slots = manifest.form.has_slots
    slots = [name for name in model.overridable if FACTOR_MARK in name]
    for name in model.overridable:
        if not (may_have_slots and name in slots):
            problems.add(
                str(path), name, "a constant", "an initializer that any caller can override",
                "convert again",
            )  # fmt: skip
    for name in slots if may_have_slots else ():
        if model.initializers[name].nbytes:
            problems.add(
                str(path), name, "an empty default: the plain base",
                f"values of shape {model.initializers[name].shape}", "convert again",
            )  # fmt: skip
    if may_have_slots:
        _compare_slots(manifest, model, slots, problems)
    types = {linear.weight.name: linear.type for linear in linears(model).stored}
    for module in manifest.modules:
        match = _ROWS.fullmatch(module.tensor)
        name = match["name"] if match else module.tensor
        if types.get(name) != module.type_after:
            problems.add(
                str(path), module.tensor, module.type_after, types.get(name) or "nothing",
                "manifest and model do not belong together",
            )  # fmt: skip
    problems.raise_if_any(ManifestError)
    return precision_class(model)


def _compare_slots(
    manifest: Manifest, model: OnnxFile, slots: Sequence[str], problems: Problems
) -> None:
    """Slots of graph, adapter file and manifest are the same, by name, shape and type."""
    entry = manifest.file("adapter")
    file = model.path.parent / (entry.path if entry else "adapter")
    filled = adapter_slots(file)
    listed = {slot.name: slot for slot in manifest.slots}
    for name in sorted({*listed, *slots, *filled}):
        slot = listed.get(name)
        empty = full = "nothing"
        if name in slots:
            info = model.initializers[name]
            # the rank is 0 in the graph, and whatever the adapter brings
            known = slot.shape if slot and len(info.shape) == 2 else info.shape
            shape = tuple(dim or own for dim, own in zip(info.shape, known, strict=True))
            empty = f"{FLOAT_DATA.get(info.dtype)} {shape}"
        if name in filled:
            full = f"{filled[name][1]} {filled[name][0]}"
        wanted = f"{slot.type} {slot.shape}" if slot else "nothing"
        for where, got in ((model.path, empty), (file, full)):
            if got != wanted:
                problems.add(
                    str(where), name, f"the slot of the manifest: {wanted}", got,
                    "graph, adapter and manifest do not belong together: convert again",
                )  # fmt: skip


def precision_class(model: OnnxFile) -> str:
    """The bounds class of the linear weights of the blocks, as they are stored.

    Raises:
        UnsupportedError: weights of a type that has no class, or none at all.
    """
    factors = [name for name in model.initializers if FACTOR_MARK in name]
    return precision_of(elements_by_type(model, factors), str(model.path))
