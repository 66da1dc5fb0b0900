"""The control of a merged artifact: its plain base, quantised the same way, without the adapter.

A merged artifact cannot be parted from its base, so nothing says how much of its KL is the base's own
rounding (`base_noise.py`). The control can, if it is that base: then the same engine runs it, and what
holds for a sidecar's base holds for it. Against another file the ratio would say nothing, so it is shown
from the bytes, before anything runs:

    untouched tensors   byte for byte the artifact's: quantising is deterministic
    touched tensors     as near to the artifact's as rounding and a delta are, and without the delta:
                        ⟨W_control, ΔW⟩ / ‖ΔW‖² − ⟨W_base, ΔW⟩ / ‖ΔW‖² = 0, as in the static proof
    metadata            architecture, hyperparameters and tokenizer alike

Touched tensors may have another type than in the artifact where the converter promoted them, which stores
them finer than the base does: the manifest says how many, and by how many bytes. In the very file that
the artifact was made from, which the manifest knows by its digest, they may have any.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from safegene_runtime.artifact.forms import GGUF_MERGED
from safegene_runtime.artifact.manifest import Manifest
from safegene_runtime.artifact.provenance import ADAPTER_KEY
from safegene_runtime.artifact.served_gguf import decoded
from safegene_runtime.engines.llama_checks import check_model_header
from safegene_runtime.errors import BaseModelError, EngineError, Problems
from safegene_runtime.formats.files import sha256_file
from safegene_runtime.formats.gguf.header import TensorInfo
from safegene_runtime.formats.gguf.model import GGUFModel, open_model
from safegene_runtime.formats.gguf.tensors import map_tensor
from safegene_runtime.formats.gguf.types import Value, ValueType
from safegene_runtime.progress import Progress
from safegene_runtime.record.reference import Reference
from safegene_runtime.verifying.static_proof import UNDECIDED, absence_proof

__all__ = ["check_control", "check_takes_control"]

OPTION = "--control"
PLAIN = "give the base that the artifact was made from, quantised as it is, without the adapter"
MAX_ROUNDING, MAX_DELTAS = 0.5, 2.0
"""‖W_artifact − W_control‖ of a touched tensor is at most 0.5 ‖W_control‖ + 2 ‖ΔW‖: what a wrong merge
may have added is no fault of the control. SmolLM2 in Q6_K to Q2_K has up to 0.16 ‖W_control‖, unrelated
weights have 1.4."""
ABOUT_THE_FILE = ("general.", "quantize.", "safegene.", "split.")
"""Metadata of how a file was made and is called; all other keys say what it computes."""
ARCHITECTURE = "general.architecture"
CHUNK_BYTES = 1 << 24
SHOWN_CHARACTERS = 80


def check_takes_control(manifest: Manifest, control: Path) -> None:
    """Refuses a control where the ladder would have no use for it.

    Raises:
        EngineError: the artifact runs beside its own base, or is of ONNX; or the control is no GGUF file.
    """
    form = manifest.form
    leave_out = f"leave {OPTION} out"
    problems = Problems()
    if form.has_adapter:
        got = f"{form.name}: its own base is run anyway"
        problems.add(OPTION, "form", "a merged GGUF", got, leave_out)
    elif form is not GGUF_MERGED:
        got = f"{form}: graphs are not compared with one another"
        problems.add(OPTION, "form", "a merged GGUF", got, leave_out)
    elif not control.is_file() or control.suffix.lower() != ".gguf":
        got = "a folder" if control.is_dir() else "another one" if control.exists() else "no file"
        problems.add(OPTION, str(control), "a file that ends in .gguf", got, PLAIN)
    problems.raise_if_any(EngineError)


def check_control(
    manifest: Manifest, model: Path, control: Path, record: Reference, tell: Progress
) -> dict[str, str]:
    """Shows that a control is the artifact's base without the adapter.

    Args:
        manifest: of a merged GGUF whose files have been checked.
        model: its model.
        control: the GGUF that is said to be its base, or the first of its shards.
        record: the reference.
        tell: told (stage, done, total).

    Returns:
        SHA-256 of the control's files by name.

    Raises:
        BaseModelError: it is not: everything that differs.
        FormatError: a file that breaks its format.
        EngineError: what libllama would not serve as meant.
        RecordError: a reference without factors, or of other modules than the artifact's.
    """
    theirs, ours = check_model_header(control), open_model(model)
    where = str(control)
    problems = Problems()
    if theirs.get(ADAPTER_KEY) is not None:
        problems.add(where, ADAPTER_KEY, "no adapter", "an artifact of safegene convert", PLAIN)
    _compare_metadata(ours, theirs, where, problems)
    _compare_names(ours, theirs, where, problems)
    problems.raise_if_any(BaseModelError)
    proof = absence_proof(manifest, control, record, tell)
    problems.extend(replace(one, where=f"{where}: {one.where}") for one in proof.problems)
    digests = {
        shard.path.name: sha256_file(shard.path, follow_symlinks=True) for shard in theirs.shards
    }
    if sorted(digests.values()) != sorted(manifest.base["files"].values()):
        _compare_types(manifest, ours, theirs, where, problems)
    norms = {factor.module: math.sqrt(factor.norm) for factor in record.factors or ()}
    deltas = {module.tensor: norms[module.module] for module in manifest.modules}
    for number, (name, info) in enumerate(theirs.tensors.items()):
        if name in deltas:
            _compare_touched(ours.tensors[name], info, deltas[name], where, problems)
        else:
            _compare_untouched(ours.tensors[name], info, where, problems)
        tell("comparing the control", number + 1, len(theirs.tensors))
    if proof.status == "undecided":
        problems.add(
            where, "delta", f"none, within {UNDECIDED:g}", f"{proof.pooled:.3f} within {proof.band:.3g}",
            "rounding hides whether the adapter is in there: verify without a control",
        )  # fmt: skip
    problems.raise_if_any(BaseModelError)
    return digests


def _compare_metadata(ours: GGUFModel, theirs: GGUFModel, where: str, problems: Problems) -> None:
    for key in sorted(ours.metadata.keys() | theirs.metadata.keys()):
        if key.startswith(ABOUT_THE_FILE) and key != ARCHITECTURE:
            continue
        one, other = ours.metadata.get(key), theirs.metadata.get(key)
        if one != other:
            problems.add(where, key, _shown(one), _shown(other), PLAIN)


def _shown(value: Value | None) -> str:
    if value is None:
        return "nothing"
    if value.type is ValueType.ARRAY:
        return f"{len(value.value)} values, not all of them the other's"
    return f"{value.type.name} {str(value.value)[:SHOWN_CHARACTERS]!r}"


def _compare_names(ours: GGUFModel, theirs: GGUFModel, where: str, problems: Problems) -> None:
    for name in sorted(ours.tensors.keys() | theirs.tensors.keys()):
        one, other = ours.tensors.get(name), theirs.tensors.get(name)
        if one is None or other is None or one.shape != other.shape:
            wanted, got = (str(info.shape) if info else "no tensor" for info in (one, other))
            problems.add(where, name, wanted, got, PLAIN)


def _compare_untouched(
    ours: TensorInfo, theirs: TensorInfo, where: str, problems: Problems
) -> None:
    """Byte for byte: what no module touches was quantised from the same numbers, in the same way."""
    if ours.type is not theirs.type:
        problems.add(where, ours.name, ours.type.name, theirs.type.name, PLAIN)
        return
    mine, other = map_tensor(ours), map_tensor(theirs)
    for start in range(0, len(mine), CHUNK_BYTES):
        part = slice(start, start + CHUNK_BYTES)
        if not np.array_equal(mine[part], other[part]):
            problems.add(
                where, ours.name, "the artifact's bytes, as no module touches it", "others",
                f"{PLAIN}: with the same llama.cpp, and the same imatrix if there was one",
            )  # fmt: skip
            return


def _compare_types(
    manifest: Manifest, ours: GGUFModel, theirs: GGUFModel, where: str, problems: Problems
) -> None:
    """Touched tensors have the artifact's types, but for as many as were promoted, by as many bytes."""
    pairs = [
        (ours.tensors[module.tensor], theirs.tensors[module.tensor]) for module in manifest.modules
    ]
    others = [(mine, other) for mine, other in pairs if mine.type is not other.type]
    added = sum(mine.nbytes - other.nbytes for mine, other in others)
    told = manifest.settings.get("promoted")
    if told == {"tensors": len(others), "bytes_added": added}:
        return
    mine, other = others[0] if others else pairs[0]
    problems.add(
        where, "types of touched tensors", f"the artifact's, but for what was promoted: {told}",
        f"{len(others)} others, {added} bytes smaller: {mine.name} is {other.type.name} and was "
        f"{mine.type.name}, for one", PLAIN,
    )  # fmt: skip


def _compare_touched(
    ours: TensorInfo, theirs: TensorInfo, delta: float, where: str, problems: Problems
) -> None:
    """The same weights but for rounding and ‖ΔW‖ = `delta`."""
    apart = size = 0.0
    # a block of rows is as many elements in either type
    for (_, mine), (_, other) in zip(decoded(ours), decoded(theirs), strict=True):
        apart += float(np.square(mine - other, dtype=np.float64).sum())
        size += float(np.square(other, dtype=np.float64).sum())
    distance, limit = math.sqrt(apart), MAX_ROUNDING * math.sqrt(size) + MAX_DELTAS * delta
    if not distance <= limit:
        wanted = f"the artifact's weights within {limit:.3g}"
        problems.add(where, ours.name, wanted, f"{distance:.3g} apart", PLAIN)
