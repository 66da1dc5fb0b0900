"""After quantisation: coefficients fitted to the file that ships, without gradients.

A quantised base, or a delta merged into one, answers a little differently from the float model the
coefficients were fitted on. Here the artifact itself is rebuilt with trial coefficients, run by its
own engine, and compared with the recorded PyTorch reference along the reference's replies:

    D(c) = mean over prompts of the mean KL(PyTorch || artifact(c)) per position, nats

which is what the rung `active` measures. No torch, and nothing but the engine protocol is
asked of the engine. `search` starts at the float coefficients, so the result is never worse on the
shots; whether it helps elsewhere is measured on other prompts, with `held_out`.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_converter.gene.folder import Expression, add_expression, check_name_free
from safegene_converter.gene.held_out import (
    HeldOut,
    check_held_out,
    mean_divergence,
    measure_held_out,
)
from safegene_converter.gene.optimise import Settings, search
from safegene_converter.gene.rebuild import Rebuild
from safegene_converter.inputs.adapter import Adapter, read_adapter
from safegene_converter.inputs.adapter_files import WEIGHTS_NAME
from safegene_runtime.errors import GeneError, Problems
from safegene_runtime.judging.judge import Judge, RulesAndNgram
from safegene_runtime.progress import Progress, silent
from safegene_runtime.record.reference import Reference
from safegene_runtime.verifying.forced import forced_passes

__all__ = ["Recalibrated", "recalibrate_deployed"]


@dataclass(frozen=True)
class Recalibrated:
    """What fitting to the artifact was worth.

    Attributes:
        before: D on the shots, nats, with the coefficients it started from.
        after: D on the shots, nats, with the new ones.
        evaluations: how often the artifact was rebuilt for the search.
        converged: whether the search stopped by itself, not by the limit.
        elsewhere: before and after on prompts it was not fitted to; None if that was not asked.
    """

    name: str
    coefficients: dict[int, float]
    before: float
    after: float
    evaluations: int
    converged: bool
    seconds: float
    elsewhere: tuple[HeldOut, HeldOut] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        found = asdict(self)
        both = found.pop("elsewhere")
        found["held_out"] = dict(zip(("before", "after"), both, strict=True)) if both else None
        found["coefficients"] = {str(layer): value for layer, value in self.coefficients.items()}
        return found


def recalibrate_deployed(
    gene: Path,
    reference: Reference,
    rebuild: Rebuild,
    name: str,
    *,
    expression: str | None = None,
    settings: Settings | None = None,
    max_evaluations: int = 60,
    default: bool = False,
    force: bool = False,
    held_out: Reference | None = None,
    judge: Judge | None = None,
    progress: Progress | None = None,
) -> Recalibrated:
    """Fits coefficients to a deployed artifact and stores them as an expression of the gene.

    Args:
        gene: the adapter folder.
        reference: what PyTorch answers to the shots, with the gene as it was calibrated there.
        rebuild: makes the artifact for given coefficients: `gguf_rebuild` or `onnx_rebuild`.
        name: of the new expression.
        expression: the one to start from; the default when None.
        settings: its bounds are used.
        max_evaluations: how often the artifact may be rebuilt.
        default: make the new expression the default.
        force: replace an expression of this name.
        held_out: what PyTorch answers to other prompts; the artifact is held against it before and
            after, and nothing is decided by that.
        judge: of the held-out replies; the built-in one by default.
        progress: told what is being done.

    Raises:
        GeneError: no evaluation is allowed, the expression to start from is out of bounds, the
            reference is another gene's, the held-out prompts are among the shots or recorded
            otherwise, or D is not finite.
        RecordError: the held-out reference has another judge's labels.
        SafeGeneError: the artifact cannot be built or run; the gene is as it was.
    """
    tell: Progress = progress or silent
    started = time.monotonic()
    bounds = (settings or Settings()).bounds
    check_name_free(gene, name, force)
    adapter = read_adapter(gene, expression)
    start = {module.layer: module.coefficient for module in adapter.modules}
    layers = sorted(start)
    _check_request(start, bounds, max_evaluations, adapter, reference)
    labeller = judge or RulesAndNgram()
    if held_out is not None:
        check_held_out(reference, held_out, labeller)

    def distance(point: npt.NDArray[np.float64]) -> float:
        with rebuild(dict(zip(layers, point.tolist(), strict=True))) as engine:
            return mean_divergence(forced_passes(engine, reference))

    def measured(coefficients: dict[int, float], stage: str) -> HeldOut | None:
        if held_out is None:
            return None
        tell(stage, 0, 1)
        with rebuild(coefficients) as engine:
            result = measure_held_out(engine, held_out, labeller)
        tell(stage, 1, 1)
        return result

    first = measured(start, "held-out prompts, before")
    found = search(
        distance,
        np.array([start[layer] for layer in layers]),
        bounds,
        max_evaluations,
        lambda done: tell("rebuilding the artifact", done, max_evaluations),
    )
    coefficients = dict(zip(layers, found.coefficients.tolist(), strict=True))
    second = measured(coefficients, "held-out prompts, after")
    shots = len(reference.prompts)
    add_expression(
        gene, name, Expression(coefficients, f"{adapter.target or 'the target'}, as deployed", shots),
        force=force, default=default,
    )  # fmt: skip
    return Recalibrated(
        name=name,
        coefficients=coefficients,
        before=found.history[0],
        after=found.value,
        evaluations=len(found.history),
        converged=found.converged,
        seconds=time.monotonic() - started,
        elsewhere=None if first is None or second is None else (first, second),
    )


def _check_request(
    start: dict[int, float],
    bounds: tuple[float, float],
    max_evaluations: int,
    adapter: Adapter,
    reference: Reference,
) -> None:
    problems = Problems()
    recorded = reference.meta["adapter"]["files"].get(WEIGHTS_NAME)
    if recorded != adapter.digests[WEIGHTS_NAME]:
        problems.add(
            str(reference.path), "vectors", f"those of the gene: {adapter.digests[WEIGHTS_NAME]}",
            recorded or "none", "record the reference with this gene: safegene record",
        )  # fmt: skip
    if max_evaluations < 1:
        problems.add("calibrate", "evaluations", "at least 1", max_evaluations)
    low, high = bounds
    for layer, value in sorted(start.items()):
        if not low <= value <= high:
            problems.add(
                f"layer {layer}", "coefficient", f"{low:g} to {high:g}, to start from", value,
                "widen --bounds, or start from another --expression",
            )  # fmt: skip
    problems.raise_if_any(GeneError)
