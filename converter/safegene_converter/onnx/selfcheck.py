"""The postcondition of an ONNX conversion: what was written is opened again, by other readers.

Runs as a child process (`python -m safegene_converter.onnx.selfcheck`, one JSON job on stdin): a bad
graph can take the process down.

1. `onnx.checker`, if it accepts the base, and our own byte accounting must accept the artifact. No
   initializer of a merged model or a branch may be an input, which a caller could override.
2. The factors that `onnx` finds in the branch (the artifact itself, or one made for this check), and
   those that ONNX Runtime finds in an .onnx_adapter, must give, per module, the delta of the adapter
   folder, read and scaled again, in the rows meant for it and nowhere else. They must be float,
   whatever the base is quantised to, and those of a branch constants.
3. In a merged model, rows that `onnx` reads, or ONNX Runtime's own MatMulNBits decodes, must differ
   from the base's by the delta of the adapter folder: the gain of `selfcheck` is near 1 in every
   module, and closer over all of them together. Rows of other modules in the same weight must not
   have changed, or, where the weight was promoted, by no more than its rounding.
4. Everything else must be the base's: nodes, every other initializer byte for byte, inputs, metadata
   (`onnx_unchanged`).
5. On a fixed probe ONNX Runtime's logits must have moved away from the base's by what the branch
   moves them, and one more step from the KV cache must run.

All but the last hold one weight, or a block of one, in memory at a time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_converter.fold.effect import PROBE, REPORT, Gain, compared_rows, effect, scaled_b
from safegene_converter.inputs.adapter import Adapter, Module, read_adapter
from safegene_converter.onnx.fold import WEIGHT_ERROR_MAX
from safegene_converter.onnx.reader import OnnxReader, StoredWeight
from safegene_converter.onnx.unchanged import NOTHING_ELSE, compare_unchanged
from safegene_runtime.artifact.forms import ONNX, Form, form_named
from safegene_runtime.child import answer_job, deadline_for, run_job
from safegene_runtime.engines.ort import OrtEngine
from safegene_runtime.errors import PostconditionError, Problems
from safegene_runtime.formats.onnx.file import read_onnx
from safegene_runtime.gating.bounds import beta_band

__all__ = ["check_onnx"]

Slots = Mapping[str, Mapping[str, Any]]
"""{weight: {"names": [A, B], "modules": [[module, first row, end]]}}."""
ReadFactor = Callable[[str], tuple[npt.NDArray[Any], int] | None]
"""A^T (in, R) or B^T (R, out) by its name, with its element type; None if there is none."""

FACTOR_ERROR_MAX = {1: 1e-5, 10: 1e-2, 16: 3e-2}
"""Relative error of (B A) x per element type: what its rounding explains, with room."""


def check_onnx(
    *,
    base: Path,
    artifact: Path,
    adapter_file: Path | None,
    oracle: Path,
    adapter: Adapter,
    form: str,
    slots: dict[str, Any],
    survived: tuple[float, float],
    precision: str,
) -> dict[str, Any]:
    """Checks a finished artifact in a child process.

    Args:
        base: the graph that the delta was added to.
        artifact: the graph that was written.
        adapter_file: its .onnx_adapter, for that form.
        oracle: a graph with a branch: the artifact, or one made for this check.
        adapter: what went in.
        form: of the artifact, by name.
        slots: {weight: {"names": [A, B], "modules": [[module, first row, end]]}}.
        survived: the least and the greatest gain that counted as surviving a merge.
        precision: the class that the rounding of the artifact beside the branch is of.

    Returns:
        {"beta": ..., "shift": root mean square of the expected change of the logits}.

    Raises:
        PostconditionError: it is not what was meant, or ONNX Runtime died on it.
    """
    job = {
        "base": str(base),
        "artifact": str(artifact),
        "adapter_file": str(adapter_file) if adapter_file else None,
        "oracle": str(oracle),
        "adapter": str(adapter.path),
        "expression": adapter.expression,
        "form": form,
        "slots": slots,
        "survived": survived,
        "precision": precision,
    }
    what = f"self-check of {artifact}"
    return run_job(
        "safegene_converter.onnx.selfcheck",
        job,
        what=what,
        error=PostconditionError,
        deadline_s=deadline_for(base.parent, artifact.parent, oracle.parent, adapter.path),
    )


def _run(job: dict[str, Any]) -> dict[str, Any]:
    problems = Problems()
    artifact, oracle = Path(job["artifact"]), Path(job["oracle"])
    _check_graph(artifact, Path(job["base"]), _form(job).has_slots, problems)
    _compare(job, problems)
    problems.raise_if_any(PostconditionError)
    z_base = _probe(Path(job["base"]), None)
    z_expected = _probe(oracle, None)
    adapter_file = Path(job["adapter_file"]) if job["adapter_file"] else None
    z_artifact = z_expected if artifact == oracle else _probe(artifact, adapter_file)
    if adapter_file is not None and not np.array_equal(_probe(artifact, None), z_base):
        problems.add(
            str(artifact), "logits without the adapter", "the base's, bit for bit", "others",
            "rank 0 adds nothing: please report this",
        )  # fmt: skip
    band = beta_band(job["precision"])
    found = effect(band, z_base, z_expected, z_artifact, str(artifact), problems)
    problems.raise_if_any(PostconditionError)
    return found


def _form(job: dict[str, Any]) -> Form:
    return form_named(ONNX, job["form"])


def _check_graph(path: Path, base: Path, has_slots: bool, problems: Problems) -> None:
    model = read_onnx(path)
    if model.overridable and not has_slots:
        problems.add(
            str(path), "inputs", "no initializer that a caller can override",
            ", ".join(model.overridable[:3]), "export the base with keep_initializers_as_inputs off",
        )  # fmt: skip
    complaint = _complaint(path)
    # the onnxruntime-genai builder uses an operator that onnx does not define; then the base is
    # refused just so, and what must not happen is a refusal of our making
    if complaint is not None and complaint != _complaint(base):
        problems.add(str(path), "onnx.checker", "to accept it, as it does the base", complaint)


def _complaint(path: Path) -> str | None:
    """What onnx.checker says of a model, without its path."""
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        return str(error).replace(str(path), "")[:300]
    return None


def _compare(job: dict[str, Any], problems: Problems) -> None:
    """What other readers find in base, oracle and artifact, without running these."""
    adapter = read_adapter(Path(job["adapter"]), job["expression"])
    modules = {module.name: module for module in adapter.modules}
    base, artifact = (OnnxReader(Path(job[name])) for name in ("base", "artifact"))
    oracle = artifact if job["oracle"] == job["artifact"] else OnnxReader(Path(job["oracle"]))
    slots: Slots = job["slots"]
    _compare_factors(str(oracle.path), _constants(oracle), slots, modules, problems)
    if _form(job).has_slots:
        path = Path(job["adapter_file"])
        _compare_factors(
            str(path), _adapter_values(path, slots, problems), slots, modules, problems
        )
    if _form(job).merges:
        _compare_weights(base, artifact, slots, modules, job["survived"], problems)
    compare_unchanged(base, artifact, slots, _form(job), problems)


def _constants(model: OnnxReader) -> ReadFactor:
    """Reads factors that are constants, and multiplied by."""
    inputs = {value.name for value in model.proto.graph.input}

    def read(name: str) -> tuple[npt.NDArray[Any], int] | None:
        users = {getattr(user, "op_type", "output") for user in model.readers.get(name, ())}
        if name not in model.tensors or name in inputs or users != {"MatMul"}:
            return None
        return model.array(name), model.tensors[name].data_type

    return read


def _adapter_values(path: Path, slots: Slots, problems: Problems) -> ReadFactor:
    """Reads factors from an .onnx_adapter, by ONNX Runtime."""
    import onnxruntime

    file = onnxruntime.AdapterFormat.read_adapter(str(path))
    values = file.get_parameters()
    if others := set(values) - {name for slot in slots.values() for name in slot["names"]}:
        problems.add(str(path), "tensors", "those of the slots", ", ".join(sorted(others)))

    def read(name: str) -> tuple[npt.NDArray[Any], int] | None:
        if name not in values:
            return None
        assert file is not None  # the values live as long as it does
        return values[name].numpy(), values[name].element_type()

    return read


def _compare_factors(
    where: str, read: ReadFactor, slots: Slots, modules: Mapping[str, Module], problems: Problems
) -> None:
    """Factors, applied to a random vector, against the adapter folder's."""
    random = np.random.default_rng(0)
    for weight, slot in slots.items():
        pair = [found for name in slot["names"] if (found := read(name)) is not None]
        if len(pair) != 2:
            problems.add(where, weight, "both factors, as constants of MatMul", f"{slot['names']}")
            continue
        kinds = {kind for _, kind in pair}
        if not kinds <= FACTOR_ERROR_MAX.keys():
            problems.add(where, weight, "float factors", f"types {kinds}")
            continue
        a, b = (values.astype(np.float64) for values, _ in pair)
        x = random.standard_normal(a.shape[0])
        meant = np.zeros(b.shape[1])
        for name, start, stop in slot["modules"]:
            meant[start:stop] = scaled_b(modules[name]) @ (modules[name].a @ x)
        error = float(np.linalg.norm((x @ a) @ b - meant) / np.linalg.norm(meant))
        limit = max(FACTOR_ERROR_MAX[kind] for kind in kinds)
        if not error <= limit:
            problems.add(where, weight, f"the adapter's delta within {limit:g}", f"{error:.3g}")


def _compare_weights(
    base: OnnxReader,
    artifact: OnnxReader,
    slots: Slots,
    modules: Mapping[str, Module],
    survived: Sequence[float],
    problems: Problems,
) -> None:
    """Rows of the touched weights, before and after, against the adapter folder's delta."""
    where, total = str(artifact.path), Gain()
    for weight, slot in slots.items():
        try:
            old, new = base.weight(weight), artifact.weight(weight)
        except PostconditionError as error:
            problems.extend(error.problems)
            continue
        shapes = [(len(one.parts[0]), one.columns) for one in (old, new)]
        if shapes[0] != shapes[1]:
            problems.add(where, weight, f"(out, in) {shapes[0]}", f"{shapes[1]}", REPORT)
            continue
        others = np.ones(shapes[0][0], bool)
        for name, start, stop in slot["modules"]:
            module, rows = modules[name], compared_rows(stop - start)
            change = new.rows(start + rows) - old.rows(start + rows)
            gain = Gain.of(change, scaled_b(module)[rows] @ module.a.astype(np.float64))
            # among many modules one that is wrong hardly moves what they have together
            if gain.norm:  # else the delta lies in rows that are not compared
                gain.check(where, f"delta of {name} in the weights", survived, problems)
            total += gain
            others[start:stop] = False
        _compare_others(where, weight, old, new, np.flatnonzero(others), problems)
    total.check(where, "delta in the weights", survived, problems)


def _compare_others(
    where: str,
    weight: str,
    old: StoredWeight,
    new: StoredWeight,
    rows: npt.NDArray[np.int64],
    problems: Problems,
) -> None:
    """Rows of a touched weight that belong to modules that are not: they stay."""
    if not len(rows):
        return
    if old.kind() == new.kind():
        pairs = zip(old.parts, new.parts, strict=True)
        if not all(np.array_equal(one[rows], other[rows]) for one, other in pairs):
            problems.add(where, f"other rows of {weight}", "the base's", "others", NOTHING_ELSE)
        return
    rows = rows[compared_rows(len(rows))]
    before = old.rows(rows)
    error = float(np.linalg.norm(new.rows(rows) - before) / (np.linalg.norm(before) or 1))
    if not error <= WEIGHT_ERROR_MAX:
        problems.add(
            where, f"other rows of {weight}", f"the base's within {WEIGHT_ERROR_MAX:g}",
            f"{error:.3g}", NOTHING_ELSE,
        )  # fmt: skip


def _probe(model: Path, adapter: Path | None) -> npt.NDArray[np.float64]:
    """Logits (positions, vocabulary) of the fixed probe; and one step from the cache must run."""
    with OrtEngine(model, adapter) as engine:
        ids = engine.tokenize(PROBE, add_special=True)
        _, logits = next(iter(engine.logits([ids], [len(ids)])))
        # a graph may be sound until it is given a past, and nothing can be decoded without one
        engine.generate([ids], 2, ())
        return logits.astype(np.float64)


if __name__ == "__main__":
    sys.exit(answer_job(_run))
