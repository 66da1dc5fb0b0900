"""The postcondition of an ONNX conversion: what was written is opened again, by other readers.

Runs as a child process (`python -m safegene_converter.onnx_selfcheck`, one JSON job on stdin): a bad
graph can take the process down.

1. `onnx.checker`, if it accepts the base, and our own byte accounting must accept the artifact. No
   initializer of a merged model or a branch may be an input, which a caller could override.
2. The factors that `onnx` finds in the branch (the artifact itself, or one made for this check) must
   give, per module, the delta of the adapter folder, read and scaled again, in the rows meant for it
   and nowhere else. They must be float constants, whatever the base is quantised to.
3. On a fixed probe ONNX Runtime's logits must have moved away from the base's by what the branch
   moves them, and one more step from the KV cache must run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_converter.adapter import Adapter, read_adapter
from safegene_converter.child import python_environment, run_child
from safegene_converter.selfcheck import PROBE, effect
from safegene_runtime.bounds import beta_band
from safegene_runtime.errors import PostconditionError, Problems, SafeGeneError
from safegene_runtime.onnx_file import read_onnx
from safegene_runtime.ort_engine import OrtEngine

__all__ = ["check_onnx", "main"]

FACTOR_ERROR_MAX = {1: 1e-5, 10: 1e-2, 16: 3e-2}
"""Relative error of (B A) x per element type: what its rounding explains, with room."""


def check_onnx(
    *,
    base: Path,
    artifact: Path,
    adapter_file: Path | None,
    oracle: Path,
    adapter: Adapter,
    slots: dict[str, Any],
    is_float: bool,
) -> dict[str, Any]:
    """Checks a finished artifact in a child process.

    Args:
        base: the graph that the delta was added to.
        artifact: the graph that was written.
        adapter_file: its .onnx_adapter, for that form.
        oracle: a graph with a branch: the artifact, or one made for this check.
        adapter: what went in.
        slots: {weight: {"names": [A, B], "modules": [[module, first row, end]]}}.
        is_float: whether the artifact's arithmetic is the branch's but for rounding.

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
        "slots": slots,
        "is_float": is_float,
    }
    output = run_child(
        [sys.executable, "-m", "safegene_converter.onnx_selfcheck"],
        what=f"self-check of {artifact}",
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
    problems = Problems()
    artifact, oracle = Path(job["artifact"]), Path(job["oracle"])
    _check_graph(artifact, Path(job["base"]), job["adapter_file"] is not None, problems)
    _compare_factors(oracle, job, problems)
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
    band = beta_band("f16" if job["is_float"] else "unknown")
    found = effect(band, z_base, z_expected, z_artifact, str(artifact), problems)
    problems.raise_if_any(PostconditionError)
    return found


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


def _compare_factors(path: Path, job: dict[str, Any], problems: Problems) -> None:
    """The factors that onnx finds, applied to a random vector, against the adapter folder's."""
    import onnx
    from onnx import external_data_helper, numpy_helper

    # the factors' data alone: the weights beside them may be larger than memory
    proto = onnx.load(str(path), load_external_data=False)
    wanted = {name for slot in job["slots"].values() for name in slot["names"]}
    found = {tensor.name: tensor for tensor in proto.graph.initializer if tensor.name in wanted}
    for tensor in found.values():
        if external_data_helper.uses_external_data(tensor):
            external_data_helper.load_external_data_for_tensor(tensor, str(path.parent))
    inputs = {value.name for value in proto.graph.input}
    users = {name: node.op_type for node in proto.graph.node for name in node.input}
    modules = {m.name: m for m in read_adapter(Path(job["adapter"]), job["expression"]).modules}
    random = np.random.default_rng(0)
    for weight, slot in job["slots"].items():
        pair = [found[name] for name in slot["names"] if name in found]
        if len(pair) != 2 or inputs & set(slot["names"]):
            problems.add(str(path), weight, "both factors, as constants", f"{slot['names']}")
            continue
        kinds = {tensor.data_type for tensor in pair}
        if not kinds <= FACTOR_ERROR_MAX.keys() or {users[name] for name in slot["names"]} != {
            "MatMul"
        }:
            problems.add(str(path), weight, "float factors of MatMul", f"types {kinds}")
            continue
        a, b = (numpy_helper.to_array(tensor).astype(np.float64) for tensor in pair)
        x = random.standard_normal(a.shape[0])
        meant = np.zeros(b.shape[1])
        for name, start, stop in slot["modules"]:
            module = modules[name]
            scale = module.coefficient * module.scaling
            meant[start:stop] = scale * (module.b @ (module.a @ x))
        error = float(np.linalg.norm((x @ a) @ b - meant) / np.linalg.norm(meant))
        limit = max(FACTOR_ERROR_MAX[kind] for kind in kinds)
        if not error <= limit:
            problems.add(str(path), weight, f"the adapter's delta within {limit:g}", f"{error:.3g}")


def _probe(model: Path, adapter: Path | None) -> npt.NDArray[np.float64]:
    """Logits (positions, vocabulary) of the fixed probe; and one step from the cache must run."""
    with OrtEngine(model, adapter) as engine:
        ids = engine.tokenize(PROBE, add_special=True)
        _, logits = next(iter(engine.logits([ids], [len(ids)])))
        # a graph may be sound until it is given a past, and nothing can be decoded without one
        engine.generate([ids], 2, ())
        return logits.astype(np.float64)


if __name__ == "__main__":
    sys.exit(main())
