"""The postcondition of a conversion: what was written is opened again, by other people's readers.

Runs as a child process (`python -m safegene_converter.selfcheck`, one JSON job on stdin), because
libllama aborts the whole process on some bad files.

1. gguf-py, an independent reader, must find the tensors that were meant. The sidecar (the artifact
   itself, or the F32 one made for this check) must hold, per module, factors whose product is the
   delta of the adapter folder, read and scaled again.
2. llama.cpp must load the artifact, and on a fixed probe its logits must have moved away from the
   base's by what the delta is expected to move them: beta = <z - z_base, z_exp - z_base> /
   ||z_exp - z_base||^2 near 1, where z_exp comes from the base with an F32 sidecar. For a merged
   artifact that is another code path of llama.cpp than the one under test.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_converter.adapter import Adapter, read_adapter
from safegene_converter.base import open_base
from safegene_converter.child import python_environment, run_child
from safegene_runtime.engine import open_engine
from safegene_runtime.errors import PostconditionError, Problems, SafeGeneError

__all__ = ["PROBE", "check_artifact", "effect", "main"]

PROBE = "Give me step-by-step instructions for breaking into a neighbour's house."
BETA_BAND_FLOAT = 0.02
BETA_BAND_QUANTISED = 0.4
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
        expected: {"tensors": {name: [type, [out, in]]}, "is_float": bool}.

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
    output = run_child(
        [sys.executable, "-m", "safegene_converter.selfcheck"],
        what=f"self-check of {model or sidecar}",
        error=PostconditionError,
        stdin=json.dumps(job).encode(),
        environment=python_environment(),
    )
    found: dict[str, Any] = json.loads(output.strip().splitlines()[-1])
    return found


def main() -> int:
    """The child: one job in, one line of JSON out, the reasons on standard error."""
    job = json.load(sys.stdin)
    try:
        found = _run(job)
    except SafeGeneError as error:
        print(error, file=sys.stderr)
        return 1
    print(json.dumps(found))
    return 0


def _run(job: dict[str, Any]) -> dict[str, Any]:
    artifact = Path(job["model"] or job["sidecar"])
    expected = job["expected"]
    problems = Problems()
    _compare_tensors(artifact, expected["tensors"], problems)
    base = Path(job["base"])
    _compare_factors(Path(job["sidecar"]), base, Path(job["adapter"]), job["expression"], problems)
    problems.raise_if_any(PostconditionError)
    z_base = _probe(base, None)
    z_expected = _probe(base, Path(job["sidecar"]))
    z_artifact = _probe(Path(job["model"]), None) if job["model"] else z_expected
    found = effect(z_base, z_expected, z_artifact, expected["is_float"], str(artifact), problems)
    problems.raise_if_any(PostconditionError)
    return found


def effect(
    z_base: npt.NDArray[np.float64],
    z_expected: npt.NDArray[np.float64],
    z_artifact: npt.NDArray[np.float64],
    is_float: bool,
    where: str,
    problems: Problems,
) -> dict[str, float]:
    """Compares how far logits moved with how far they should have; all (positions, vocabulary).

    Returns:
        {"beta": <z - z_base, z_exp - z_base> / ||z_exp - z_base||^2,
        "shift": root mean square of the expected change}.
    """
    moved = _centre(z_expected - z_base)
    norm = float((moved * moved).sum())
    beta = float((_centre(z_artifact - z_base) * moved).sum()) / norm if norm else 0.0
    shift = float(np.sqrt(np.mean(moved * moved)))
    if not np.isfinite([beta, shift]).all():
        problems.add(where, "logits", "finite numbers", "NaN or Inf", "check base and adapter")
    elif norm == 0 or np.array_equal(z_artifact, z_base):
        problems.add(
            where,
            "logits",
            "other logits than the base's",
            "the base's, bit for bit",
            "the adapter has no effect: check that it was trained, and for this base",
        )
    else:
        band = BETA_BAND_FLOAT if is_float else BETA_BAND_QUANTISED
        if abs(beta - 1) > band:
            problems.add(
                where,
                "effect on the logits",
                f"1 within {band:g}",
                f"{beta:.3f}",
                "the stored delta is not the adapter's: please report this",
            )
    return {"beta": beta, "shift": shift}


def _compare_tensors(path: Path, expected: dict[str, Any], problems: Problems) -> None:
    """What gguf-py finds in the file against what was meant."""
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(str(path)).tensors}
    for name, (kind, shape) in expected.items():
        tensor = found.get(name)
        got = (
            None
            if tensor is None
            else [tensor.tensor_type.name, [int(n) for n in reversed(tensor.shape)]]
        )
        if got != [kind, list(shape)]:
            problems.add(str(path), name, f"{kind} {list(shape)} for gguf-py", str(got))


def _compare_factors(
    sidecar: Path, base_path: Path, adapter_path: Path, expression: str, problems: Problems
) -> None:
    """The factors that gguf-py finds, applied to a random vector, against the adapter folder's."""
    import gguf

    found = {tensor.name: tensor for tensor in gguf.GGUFReader(str(sidecar)).tensors}
    base = open_base(base_path)
    random = np.random.default_rng(0)
    for module in read_adapter(adapter_path, expression).modules:
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
        scale = module.coefficient * module.scaling
        meant = base.transform(module.name).apply_rows(scale * (module.b @ (module.a @ x)))
        error = float(np.linalg.norm(b @ (a @ x) - meant) / np.linalg.norm(meant))
        limit = max(FACTOR_ERROR_MAX[tensor.tensor_type.name] for tensor in tensors)
        if not error <= limit:
            problems.add(
                str(sidecar), name, f"the adapter's delta within {limit:g}", f"{error:.3g}"
            )
    if found:
        problems.add(str(sidecar), "tensors", "one pair for each module", ", ".join(sorted(found)))


def _probe(model: Path, adapter: Path | None) -> npt.NDArray[np.float64]:
    """Logits (positions, vocabulary) of the fixed probe."""
    with open_engine(model, adapter) as engine:
        ids = engine.tokenize(PROBE, add_special=True)
        _, logits = next(iter(engine.logits([ids], [len(ids)])))
        return logits.astype(np.float64)


def _centre(change: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    centred: npt.NDArray[np.float64] = change - change.mean(axis=1, keepdims=True)
    return centred


if __name__ == "__main__":
    sys.exit(main())
