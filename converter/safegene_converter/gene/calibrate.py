"""Recalibration: one coefficient per layer for a target, from a few shots; the vectors stay."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_converter.gene.checkpoint import Checkpoint, identity
from safegene_converter.gene.folder import Expression, add_expression, check_name_free
from safegene_converter.gene.model import load_gene
from safegene_converter.gene.objective import REFUSALS, Losses, Objective, common_factor
from safegene_converter.gene.optimise import Settings, minimise
from safegene_converter.gene.shots import shots_of
from safegene_converter.progress import Progress
from safegene_runtime.files import sha256_file
from safegene_runtime.prompts import Prompt, builtin_suite

__all__ = ["Calibrated", "calibrate"]


@dataclass(frozen=True)
class Calibrated:
    """A new expression and what it was worth on its shots.

    Attributes:
        coefficients: by layer.
        before: losses of the un-adapted target (its KL is 0).
        at_one: losses with every coefficient 1.
        after: losses with the coefficients found.
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

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        found = asdict(self)
        found["coefficients"] = {str(layer): value for layer, value in self.coefficients.items()}
        return found


def calibrate(
    gene: Path,
    model: Path,
    shots: Sequence[Prompt],
    name: str,
    *,
    weight: float = 1.0,
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
        weight: of the KL to the un-adapted target against the safety loss.
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
    tell: Progress = progress or (lambda stage, done, total: None)
    started = time.monotonic()
    settings = settings or Settings()
    check_name_free(gene, name, force)
    chosen = shots_of(shots, "calibrate", builtin_suite() if evaluation is None else evaluation)
    loaded = load_gene(gene, model)
    objective = Objective(loaded, chosen, weight=weight, refusals=refusals, progress=tell)
    request = {
        "vectors": sha256_file((gene / "adapter_model.safetensors").resolve()),
        "model": identity(model),
        "shots": [list(chosen.harmful), list(chosen.benign)],
        "weight": weight,
        "refusals": list(refusals),
        "settings": asdict(settings),
    }
    checkpoint = Checkpoint(gene.absolute().with_name(f".{gene.name}.calibrate-{name}"), request)

    def gradient(point: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        losses, safety, kl = objective.gradient(point)
        return losses.total, safety + weight * kl

    count = len(loaded.layers)
    found = minimise(
        gradient,
        np.full(count, common_factor(objective, count, settings.bounds)),
        settings,
        checkpoint,
        lambda step: tell("calibrating", step, settings.max_steps),
    )
    tell("calibrating", settings.max_steps, settings.max_steps)
    coefficients = dict(zip(loaded.layers, found.coefficients.tolist(), strict=True))
    target = model.resolve().name
    adapter = add_expression(
        gene, name, Expression(coefficients, target, chosen.count), force=force, default=default
    )
    stored = {module.layer: module.coefficient for module in adapter.modules}
    checkpoint.clear()
    with loaded.without_gene():
        before = objective.value(np.ones(count))
    return Calibrated(
        name=name,
        target=target,
        coefficients=dict(sorted(stored.items())),
        before=before,
        at_one=objective.value(np.ones(count)),
        after=objective.value([stored[layer] for layer in loaded.layers]),
        steps=len(found.history),
        converged=found.converged,
        seconds=time.monotonic() - started,
    )
