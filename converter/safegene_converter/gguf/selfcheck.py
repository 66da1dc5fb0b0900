"""The postcondition of a conversion: what was written is opened again, by other people's readers.

Runs as a child process (`python -m safegene_converter.gguf.selfcheck`, one JSON job on stdin), because
libllama aborts the whole process on some bad files.

1. gguf-py, an independent reader, must find the tensors that were meant. The sidecar (the artifact
   itself, or the F32 one made for this check) must hold, per module, factors whose product is the
   delta of the adapter folder, read and scaled again.
2. In a merged artifact, rows that gguf-py decodes must differ from the base's by the delta of the
   adapter folder: gain = <W - W_base, dW> / <dW, dW> near 1, over all modules together.
3. llama.cpp must load the artifact, and on a fixed probe its logits must have moved away from the
   base's by what the delta is expected to move them: beta = <z - z_base, z_exp - z_base> /
   ||z_exp - z_base||^2 near 1, where z_exp comes from the base with an F32 sidecar. For a merged
   artifact that is another code path of llama.cpp than the one under test.

Rounding moves logits, too, and where it moves them further than the delta does, beta says little: its
band grows with what was moved besides, and the gain of the weights, which rounding hardly touches,
says whether it is the delta.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_converter.fold.effect import PROBE, Gain, compared_rows, effect, scaled_b
from safegene_converter.inputs.adapter import Adapter, read_adapter
from safegene_converter.inputs.base import open_base
from safegene_runtime.child import answer_job, deadline_for, run_job
from safegene_runtime.engines.registry import open_engine
from safegene_runtime.errors import PostconditionError, Problems
from safegene_runtime.formats.gguf.tensors import map_tensor
from safegene_runtime.gating.bounds import beta_band

__all__ = ["check_artifact"]

PROBE_BATCH = 64
FACTOR_ERROR_MAX = {"F32": 1e-5, "F16": 1e-2, "BF16": 1e-2, "Q8_0": 5e-2}
"""Relative error of (B A) x per type of the factors: what its rounding explains, with room."""


def check_artifact(
    base: Path, model: Path | None, sidecar: Path, adapter: Adapter, expected: dict[str, Any]
) -> dict[str, Any]:
    """Checks a finished artifact in a child process.

    Args:
        base: the GGUF that the delta was added to (quantised, if the artifact is).
        model: the merged model; None when the artifact is the sidecar.
        sidecar: the artifact, or an F32 sidecar made for this check.
        adapter: what went in.
        expected: {"tensors": {name: [type, [out, in]]}, "precision": class of its weights, "gain":
            [least, most] that counted as surviving}.

    Returns:
        {"beta": ..., "shift": root mean square of the expected change of the logits}.

    Raises:
        PostconditionError: it is not what was meant, or llama.cpp died on it.
    """
    job = {
        "base": str(base),
        "model": str(model) if model else None,
        "sidecar": str(sidecar),
        "adapter": str(adapter.path),
        "expression": adapter.expression,
        "expected": expected,
    }
    what = f"self-check of {model or sidecar}"
    return run_job(
        "safegene_converter.gguf.selfcheck",
        job,
        what=what,
        error=PostconditionError,
        deadline_s=deadline_for(base, model, sidecar, adapter.path),
    )


def _run(job: dict[str, Any]) -> dict[str, Any]:
    artifact = Path(job["model"] or job["sidecar"])
    expected = job["expected"]
    problems = Problems()
    _compare_tensors(artifact, expected["tensors"], problems)
    base = Path(job["base"])
    adapter = read_adapter(Path(job["adapter"]), job["expression"])
    _compare_factors(Path(job["sidecar"]), base, adapter, problems)
    if job["model"]:
        _compare_weights(Path(job["model"]), base, adapter, expected["gain"], problems)
    problems.raise_if_any(PostconditionError)
    room = open_base(base).context_length  # a sliding window may have made it short
    z_base = _probe(base, None, room)
    z_expected = _probe(base, Path(job["sidecar"]), room)
    z_artifact = _probe(Path(job["model"]), None, room) if job["model"] else z_expected
    band = beta_band(expected["precision"])
    found = effect(band, z_base, z_expected, z_artifact, str(artifact), problems)
    problems.raise_if_any(PostconditionError)
    return found


@functools.cache
def _tensors(path: Path) -> dict[str, Any]:
    """What gguf-py finds in a file, by name."""
    import gguf

    return {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}


def _compare_tensors(path: Path, expected: dict[str, Any], problems: Problems) -> None:
    """What gguf-py finds in the file against what was meant."""
    found = _tensors(path)
    for name, (kind, shape) in expected.items():
        tensor = found.get(name)
        got = (
            None
            if tensor is None
            else [tensor.tensor_type.name, [int(n) for n in reversed(tensor.shape)]]
        )
        if got != [kind, list(shape)]:
            problems.add(str(path), name, f"{kind} {list(shape)} for gguf-py", str(got))


def _compare_weights(
    model: Path, base_path: Path, adapter: Adapter, survived: list[float], problems: Problems
) -> None:
    """What gguf-py decodes from the artifact and from its base, against the adapter folder's delta."""
    import gguf

    stored, base = _tensors(model), open_base(base_path)
    assert base.model is not None  # it is the GGUF that the delta was added to
    total = Gain()
    for module in adapter.modules:
        name = base.tensor_name(module.name)
        scaled = base.transform(module.name).apply_rows(scaled_b(module))
        rows = compared_rows(module.shape[0])
        # the base's header through our reader: gguf-py's takes seconds for a real vocabulary
        info, tensor = base.model.tensors[name], stored[name]
        old = np.asarray(map_tensor(info)).reshape(info.shape[0], -1)[rows]
        kind = gguf.GGMLQuantizationType(int(info.type))
        change = gguf.dequantize(tensor.data[rows], tensor.tensor_type).astype(np.float64)
        change -= gguf.dequantize(old, kind)
        total += Gain.of(change, scaled[rows] @ module.a.astype(np.float64))
    total.check(str(model), "delta in the weights", survived, problems)


def _compare_factors(sidecar: Path, base_path: Path, adapter: Adapter, problems: Problems) -> None:
    """The factors that gguf-py finds, applied to a random vector, against the adapter folder's."""
    import gguf

    found = dict(_tensors(sidecar))
    base = open_base(base_path)
    random = np.random.default_rng(0)
    for module in adapter.modules:
        name = base.tensor_name(module.name)
        try:
            tensors = [found.pop(f"{name}.{suffix}") for suffix in ("lora_a", "lora_b")]
        except KeyError as missing:
            problems.add(str(sidecar), name, "both factors", f"no {missing}")
            continue
        a, b = (
            gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
            for tensor in tensors
        )
        x = random.standard_normal(module.shape[1])
        meant = base.transform(module.name).apply_rows(scaled_b(module) @ (module.a @ x))
        error = float(np.linalg.norm(b @ (a @ x) - meant) / np.linalg.norm(meant))
        limit = max(FACTOR_ERROR_MAX[tensor.tensor_type.name] for tensor in tensors)
        if not error <= limit:
            problems.add(
                str(sidecar), name, f"the adapter's delta within {limit:g}", f"{error:.3g}"
            )
    if found:
        problems.add(str(sidecar), "tensors", "one pair for each module", ", ".join(sorted(found)))


def _probe(model: Path, adapter: Path | None, room: int | None) -> npt.NDArray[np.float64]:
    """Logits (positions, vocabulary) of the fixed probe, or of its first `room` tokens.

    Mapped, and one short batch: models larger than memory are converted, too.
    """
    with open_engine(model, adapter, mmap=True, n_seq_max=1, n_batch=PROBE_BATCH) as engine:
        ids = engine.tokenize(PROBE, add_special=True)[:room]
        _, logits = next(iter(engine.logits([ids], [len(ids)])))
        return logits.astype(np.float64)


if __name__ == "__main__":
    sys.exit(answer_job(_run))
