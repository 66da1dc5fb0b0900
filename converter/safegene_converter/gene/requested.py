"""A `CalibrateRequest` carried out: in PyTorch, or on the artifact that ships."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from safegene_converter.gene.deployed import Recalibrated, recalibrate_deployed
from safegene_converter.gene.optimise import Settings
from safegene_converter.gene.rebuild import Rebuild, gguf_rebuild, onnx_rebuild
from safegene_converter.gene.shots import check_same_prompts, shots_of
from safegene_converter.requests import CalibrateRequest, judge_of, prompts_of
from safegene_runtime.artifact.forms import ONNX
from safegene_runtime.progress import Progress
from safegene_runtime.record.prompts import Prompt, builtin_suite
from safegene_runtime.record.reference import read_reference

if TYPE_CHECKING:
    from safegene_converter.gene.calibrate import Calibrated

__all__ = ["carry_out"]

MAX_EVALUATIONS = 60


def carry_out(
    request: CalibrateRequest, progress: Progress | None = None
) -> Calibrated | Recalibrated:
    """Fits the coefficients, and stores them as an expression of the gene.

    Raises:
        SafeGeneError: one of its kinds; the gene is as it was.
    """
    steps = Settings.max_steps if request.max_steps is None else request.max_steps
    settings = Settings(bounds=request.bounds, max_steps=steps)
    shots = prompts_of(request.shots)
    tested = builtin_suite() if request.evaluation is None else prompts_of(request.evaluation)
    if request.form is not None:
        return _deployed(request, settings, shots, tested, progress)
    from safegene_converter.gene.asked import REFUSALS  # these two import torch
    from safegene_converter.gene.calibrate import calibrate

    return calibrate(
        request.gene,
        request.model,
        shots,
        request.name,
        weight=request.weight,
        aligned=request.aligned,
        settings=settings,
        refusals=tuple(request.refusals) or REFUSALS,
        evaluation=tested,
        default=request.default,
        force=request.force,
        progress=progress,
    )


def _deployed(
    request: CalibrateRequest,
    settings: Settings,
    shots: Sequence[Prompt],
    tested: Sequence[Prompt],
    progress: Progress | None,
) -> Recalibrated:
    where = str(request.shots) if not isinstance(request.shots, Sequence) else "calibrate"
    shots_of(shots, where, tested)
    reference = read_reference(cast(Path, request.reference))  # the request has seen to it
    check_same_prompts(reference, shots, str(request.reference))
    with _rebuild(request, progress) as rebuild:
        return recalibrate_deployed(
            request.gene,
            reference,
            rebuild,
            request.name,
            expression=request.expression,
            settings=settings,
            max_evaluations=MAX_EVALUATIONS if request.evaluations is None else request.evaluations,
            default=request.default,
            force=request.force,
            held_out=read_reference(request.check) if request.check else None,
            judge=judge_of(request.judge),
            progress=progress,
        )


def _rebuild(
    request: CalibrateRequest, progress: Progress | None
) -> AbstractContextManager[Rebuild]:
    gene, base = request.gene, request.model
    if request.made.target is ONNX:
        exported = cast(Literal["branch", "merged"], request.form)
        return onnx_rebuild(gene, base, exported, request.precision, progress=progress)
    form = cast(Literal["sidecar", "merged"], request.form)
    return gguf_rebuild(gene, base, form, request.type or "auto")
