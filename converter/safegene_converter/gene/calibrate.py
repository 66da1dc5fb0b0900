"""Recalibration: one coefficient per layer for a target, from a few shots; the vectors stay."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_converter.gene.asked import REFUSALS
from safegene_converter.gene.checkpoint import Checkpoint, identity
from safegene_converter.gene.folder import Expression, add_expression, check_name_free
from safegene_converter.gene.level import Level, Weighed, level_of, reach
from safegene_converter.gene.model import load_gene
from safegene_converter.gene.objective import Losses, Objective, common_factor
from safegene_converter.gene.optimise import Settings, minimise
from safegene_converter.gene.shots import shots_of
from safegene_runtime.errors import GeneError, Problem
from safegene_runtime.formats.files import sha256_file
from safegene_runtime.progress import Progress, silent
from safegene_runtime.record.prompts import Prompt, builtin_suite

__all__ = ["Calibrated", "calibrate"]


@dataclass(frozen=True)
class Calibrated:
    """A new expression and what it was worth on its shots.

    Attributes:
        coefficients: by layer.
        before: losses of the un-adapted target (its KL is 0).
        at_one: losses with every coefficient 1.
        after: losses with the coefficients found.
        separation: how well refusals tell harmful shots from benign ones, before and after.
        level: how surely and how often the model refuses that this one is to equal, or None.
        minima: where J is least with each weight of the KL that was tried, in that order.
    """

    name: str
    target: str
    coefficients: dict[int, float]
    before: Losses
    at_one: Losses
    after: Losses
    steps: int
    converged: bool
    seconds: float
    separation: tuple[float, float]
    level: Level | None
    minima: tuple[Weighed, ...]

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        found = asdict(self)
        found["coefficients"] = {str(layer): value for layer, value in self.coefficients.items()}
        for one in found["minima"]:
            values = one["coefficients"].tolist()
            one["coefficients"] = dict(zip(found["coefficients"], values, strict=True))
        return found


def calibrate(
    gene: Path,
    model: Path,
    shots: Sequence[Prompt],
    name: str,
    *,
    weight: float | None = None,
    aligned: Path | None = None,
    settings: Settings | None = None,
    refusals: Sequence[str] = REFUSALS,
    evaluation: Sequence[Prompt] | None = None,
    default: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Calibrated:
    """Fits layer coefficients to a target and stores them as an expression of the gene.

    Args:
        gene: the adapter folder; its safegene.json gains the expression, nothing else changes.
        model: the target fine-tune, which stays as it is.
        shots: a few harmful and benign prompts.
        name: of the expression.
        weight: of the KL to the un-adapted target against the safety loss (default: 1).
        aligned: a model whose refusals are to be reached, with smaller weights where 1 does not do.
        settings: bounds and early stopping.
        refusals: openings of a refusal.
        evaluation: prompts that will be tested on (default: the built-in suite): none may be shots.
        default: make the expression the default.
        force: replace an expression of this name.
        progress: told what is being done.

    Raises:
        GeneError: too few shots, shots that are tested on, or losses that are not finite.
        AdapterError: the name is taken. The gene is as it was.
    """
    tell: Progress = progress or silent
    started = time.monotonic()
    settings = settings or Settings()
    check_name_free(gene, name, force)
    if weight is not None and aligned is not None:
        raise GeneError(
            Problem("calibrate", "weight", "either a weight or an aligned model", "both",
                    "leave one out: reaching the model's level sets the weight")
        )  # fmt: skip
    chosen = shots_of(shots, "calibrate", builtin_suite() if evaluation is None else evaluation)
    level = None
    if aligned is not None:
        tell("asking the aligned model", 0, 1)
        level = level_of(gene, aligned, chosen.harmful, tuple(refusals))
        tell("asking the aligned model", 1, 1)
    loaded = load_gene(gene, model)
    fixed = 1.0 if weight is None else weight
    objective = Objective(loaded, chosen, weight=fixed, refusals=refusals, progress=tell)
    request = {
        "vectors": sha256_file((gene / "adapter_model.safetensors").resolve()),
        "model": identity(model),
        "shots": [list(chosen.harmful), list(chosen.benign)],
        "weight": fixed,
        "level": None if level is None else asdict(level),
        "refusals": list(refusals),
        "settings": asdict(settings),
    }
    count = len(loaded.layers)
    minima: list[Weighed] = []
    steps, converged = 0, True
    checkpoint = Checkpoint(gene.absolute().with_name(f".{gene.name}.calibrate-{name}"), request)

    def minimum(kl_weight: float, last: npt.NDArray[np.float64] | None) -> Weighed:
        """Where J with this weight is least, from the best common factor or the last minimum."""
        nonlocal steps, converged
        objective.weight = kl_weight
        start = np.full(count, common_factor(objective, count, settings.bounds))
        if last is not None:
            start = min(start, last, key=lambda at: objective.value(at).total)

        def gradient(point: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
            losses, safety, kl = objective.gradient(point)
            return losses.total, safety + kl_weight * kl

        stage = f"calibrating, KL x {kl_weight:g}"
        found = minimise(
            gradient, start, settings, checkpoint,
            lambda step: tell(stage, step, settings.max_steps), stage=stage,
        )  # fmt: skip
        tell(stage, settings.max_steps, settings.max_steps)
        steps, converged = steps + len(found.history), converged and found.converged
        losses = objective.value(found.coefficients)
        seconds = time.monotonic() - started
        minima.append(Weighed(kl_weight, found.coefficients, losses, seconds))
        return minima[-1]

    best = minimum(fixed, None).coefficients if level is None else reach(objective, minimum, level)
    coefficients = dict(zip(loaded.layers, best.tolist(), strict=True))
    target = model.resolve().name
    adapter = add_expression(
        gene, name, Expression(coefficients, target, chosen.count), force=force, default=default
    )
    stored = {module.layer: module.coefficient for module in adapter.modules}
    checkpoint.clear()
    with loaded.without_gene():
        before = objective.value(np.ones(count))
        apart = objective.separation(np.ones(count))
    final = [stored[layer] for layer in loaded.layers]
    return Calibrated(
        name=name,
        target=target,
        coefficients=dict(sorted(stored.items())),
        before=before,
        at_one=objective.value(np.ones(count)),
        after=objective.value(final),
        steps=steps,
        converged=converged,
        seconds=time.monotonic() - started,
        separation=(apart, objective.separation(final)),
        level=level,
        minima=tuple(minima),
    )
