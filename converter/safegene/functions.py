"""The functions of `safegene`: each makes the request of its command, and has it carried out."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from safegene_converter.fold.survival import Bounds
from safegene_converter.importing.stack import stacked
from safegene_converter.inputs.onnx_base import is_onnx_folder
from safegene_converter.requests import (
    CalibrateRequest,
    ConvertRequest,
    RecordRequest,
    judge_of,
)
from safegene_runtime.artifact.forms import ONNX, target_named
from safegene_runtime.artifact.manifest import Manifest
from safegene_runtime.extras import need
from safegene_runtime.formats.files import StrPath
from safegene_runtime.gating.profiles import Profile
from safegene_runtime.judging.judge import Judge
from safegene_runtime.progress import Progress
from safegene_runtime.record.prompts import Prompt
from safegene_runtime.record.reference import Reference, read_reference
from safegene_runtime.verifying.ladder import verify
from safegene_runtime.verifying.report import Report
from safegene_runtime.verifying.request import VerifyRequest

if TYPE_CHECKING:  # they import torch
    from safegene_converter.gene.calibrate import Calibrated
    from safegene_converter.gene.deployed import Recalibrated

__all__ = ["calibrate", "convert", "inspect", "record", "verify", "verify_server"]

T = TypeVar("T")


def _path(given: StrPath | None) -> Path | None:
    return None if given is None else Path(given)


def _path_or(given: StrPath | T) -> Path | T:
    """A path as `Path`; anything else as it is."""
    return Path(given) if isinstance(given, str) or hasattr(given, "__fspath__") else given


def _weighed(stack: Sequence[tuple[StrPath, float]]) -> tuple[tuple[Path, float], ...]:
    return tuple((Path(path), weight) for path, weight in stack)


def inspect(
    path: StrPath, *, expression: str | None = None, base: StrPath | None = None
) -> dict[str, Any]:
    """What is in an adapter or an artifact, in JSON's types; "what" says which of both it is.

    Args:
        path: an adapter folder, or an artifact folder, whose files are held against its manifest.
        expression: of an adapter, the set of layer coefficients to show.
        base: of an adapter, a base to compare the number of parameters with.

    Raises:
        SafeGeneError: it is neither, or it is broken.
    """
    from safegene_converter import describing

    return describing.inspect(Path(path), expression, _path(base))


def convert(
    adapter: StrPath,
    base: StrPath,
    out: StrPath,
    *,
    to: Literal["gguf", "onnx"] = "gguf",
    form: Literal["merged", "sidecar", "branch", "adapter"] | None = None,
    type: str = "auto",
    expression: str | None = None,
    bounds: Bounds | None = None,
    promote: bool | None = None,
    imatrix: StrPath | None = None,
    llama_cpp: StrPath | None = None,
    precision: Literal["fp32", "fp16", "bf16", "int8", "int4"] | None = None,
    block_size: int | None = None,
    accuracy_level: int | None = None,
    builder_options: Sequence[str] = (),
    check: bool = True,
    force: bool = False,
    stack: Sequence[tuple[StrPath, float]] = (),
    progress: Progress | None = None,
) -> Manifest:
    """Folds an adapter into a model file; `ConvertRequest` says what the options mean.

    Returns:
        the manifest that was written beside the model.

    Raises:
        SafeGeneError: one of its kinds; nothing is left under the name `out`.
    """
    request = ConvertRequest(
        Path(adapter),
        Path(base),
        Path(out),
        to=to,
        form=form,
        type=type,
        expression=expression,
        bounds=bounds,
        promote=promote,
        imatrix=_path(imatrix),
        llama_cpp=_path(llama_cpp),
        precision=precision,
        block_size=block_size,
        accuracy_level=accuracy_level,
        builder_options=builder_options,
        check=check,
        force=force,
        stack=_weighed(stack),
    )
    if target_named(to) is ONNX:
        export = ("torch", "transformers", "onnx_ir", "onnxruntime_genai")
        need("onnx", "onnxruntime", *(() if is_onnx_folder(request.base) else export))
        from safegene_converter.onnx.convert import convert as fold
    else:
        need("llama_cpp", *(("gguf",) if check else ()))
        from safegene_converter.gguf.convert import convert as fold
    with stacked(request) as whole:
        return fold(whole, progress)


def record(
    adapter: StrPath,
    base: StrPath,
    out: StrPath,
    *,
    suite: Literal["smoke", "ci"] | None = None,
    prompts: StrPath | Sequence[Prompt] | None = None,
    attacks: Sequence[str] = (),
    judge: Judge | str | None = None,
    expression: str | None = None,
    max_new_tokens: int = 24,
    top_k: int = 64,
    now: datetime | None = None,
    force: bool = False,
    stack: Sequence[tuple[StrPath, float]] = (),
    progress: Progress | None = None,
) -> Reference:
    """Records what PyTorch and PEFT answer, once; `RecordRequest` says what the options mean.

    Raises:
        SafeGeneError: one of its kinds; nothing is left under the name `out`.
    """
    request = RecordRequest(
        Path(adapter),
        Path(base),
        Path(out),
        suite=suite,
        prompts=_path_or(prompts),
        attacks=attacks,
        judge=judge,
        expression=expression,
        max_new_tokens=max_new_tokens,
        top_k=top_k,
        now=now,
        force=force,
        stack=_weighed(stack),
    )
    need("torch", "transformers", "peft", "safetensors")
    from safegene_converter.recording import recorder

    with stacked(request) as whole:
        return recorder.record(whole, progress)


def verify_server(
    url: str,
    reference: StrPath | Reference,
    *,
    profile: str | Profile = "smoke",
    sequential: bool = False,
    attacks: Sequence[str] = (),
    judge: Judge | str | None = None,
    model: str | None = None,
    allow_switchable: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Holds a server that runs on this machine against a reference, by its replies.

    Args:
        url: on loopback: `http://127.0.0.1:8080`.
        reference: a folder made by `record`, or what it returned.
        profile: how much must be shown: `smoke`, `ci`, `release`, or a profile of your own.
        sequential: ask in the recorded order and stop when it is decided.
        attacks: names of attacks to gate under, too, as they were recorded; `all` for all of them.
        judge: what labels replies, or its name; the reference's own is needed.
        model: which of the server's models; needed where it has several.
        allow_switchable: do not fail a server whose clients can switch the adapter off.
        progress: told what is being done.

    Raises:
        SafeGeneError: it could not be checked, which is no verdict.
    """
    from safegene_runtime.serving.check import check_server

    request = VerifyRequest(
        _path_or(reference),
        server=url,
        profile=profile,
        sequential=sequential,
        attacks=attacks,
        judge=judge,
        model=model,
        allow_switchable=allow_switchable,
    )
    given = request.reference
    return check_server(
        url,
        given if isinstance(given, Reference) else read_reference(given),
        profile=request.profile,
        sequential=request.sequential,
        attacks=request.attacks,
        judge=judge_of(request.judge),
        model=request.model,
        allow_switchable=request.allow_switchable,
        progress=progress,
    )


def calibrate(
    gene: StrPath,
    model: StrPath,
    shots: StrPath | Sequence[Prompt],
    name: str,
    *,
    bounds: tuple[float, float] = (0.05, 8.0),
    default: bool = False,
    force: bool = False,
    evaluation: StrPath | Sequence[Prompt] | None = None,
    aligned: StrPath | None = None,
    weight: float | None = None,
    refusals: Sequence[str] = (),
    max_steps: int | None = None,
    form: Literal["sidecar", "branch", "merged"] | None = None,
    reference: StrPath | None = None,
    type: str | None = None,
    precision: Literal["fp32", "fp16", "int8", "int4"] | None = None,
    expression: str | None = None,
    evaluations: int | None = None,
    check: StrPath | None = None,
    judge: Judge | str | None = None,
    progress: Progress | None = None,
) -> Calibrated | Recalibrated:
    """Fits a gene's layer coefficients to a target; `CalibrateRequest` says what the options mean.

    Returns:
        a `Recalibrated` where `form` is given: fitted to the artifact itself; else a `Calibrated`.

    Raises:
        SafeGeneError: one of its kinds; the gene is as it was.
    """
    request = CalibrateRequest(
        Path(gene),
        Path(model),
        _path_or(shots),
        name,
        bounds=bounds,
        default=default,
        force=force,
        evaluation=_path_or(evaluation),
        aligned=_path(aligned),
        weight=weight,
        refusals=refusals,
        max_steps=max_steps,
        form=form,
        reference=_path(reference),
        type=type,
        precision=precision,
        expression=expression,
        evaluations=evaluations,
        check=_path(check),
        judge=judge,
    )
    need("safetensors", *(("torch", "transformers", "peft") if form is None else ()))
    from safegene_converter.gene.requested import carry_out

    return carry_out(request, progress)
