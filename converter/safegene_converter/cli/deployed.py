"""The half of `safegene calibrate` that fits a gene to an artifact: options, checks, output."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from safegene_converter.cli.options import Bars
from safegene_runtime.artifact.forms import (
    FORMS,
    GGUF,
    ONNX,
    ONNX_ADAPTER,
    Form,
    form_named,
    names_of_forms,
)

if TYPE_CHECKING:
    from safegene_converter.gene.deployed import Recalibrated
    from safegene_converter.gene.optimise import Settings
    from safegene_converter.gene.rebuild import Rebuild
    from safegene_runtime.record.prompts import Prompt

__all__ = ["EXAMPLE", "add_deployed", "calibrate_deployed", "refuse_half_requests", "show_deployed"]

EXAMPLE = (
    "safegene calibrate GENE --model INT4_ONNX_DIR --shots shots.jsonl --name my-finetune-int4 "
    "--expression my-finetune --as branch --reference REF --check REF_OF_OTHER_PROMPTS"
)
ONLY_DEPLOYED = ("reference", "type", "precision", "expression", "evaluations", "check", "judge")
ONLY_PYTORCH = ("weight", "refusal", "max_steps")


def add_deployed(parser: argparse.ArgumentParser) -> None:
    """Adds the options that make `calibrate` fit to an artifact."""
    group = parser.add_argument_group(
        "after quantisation: fit to the artifact itself, without gradients",
        "--model is the artifact's base: a GGUF or an ONNX folder; or a Hugging Face folder, for "
        "merged, and for ONNX, to which it is exported once",
    )
    group.add_argument(
        "--reference", type=Path, help="made by `safegene record` with --prompts SHOTS"
    )
    group.add_argument(
        "--as",
        dest="form",
        choices=[name for name in names_of_forms() if name != ONNX_ADAPTER.name],
        help="sidecar: GGUF; branch: ONNX, and for its adapter file, too; merged: what --model is, "
        "and with --precision ONNX",
    )
    group.add_argument("--type", metavar="TYPE", help="of GGUF, as in convert (default: auto)")
    group.add_argument(
        "--precision",
        choices=["fp32", "fp16", "int8", "int4"],
        help="of the ONNX export of a Hugging Face folder or float GGUF (default: fp32)",
    )
    group.add_argument("--expression", help="where to start (default: the default one)")
    group.add_argument("--evaluations", type=int, help="rebuilds at most (default: 60)")
    group.add_argument(
        "--check",
        type=Path,
        metavar="REFERENCE",
        help="recorded on other prompts: shows whether it helps there, too",
    )
    group.add_argument("--judge", metavar="JUDGE", help="of the replies to --check, as in verify")


def refuse_half_requests(arguments: argparse.Namespace) -> None:
    """An option that would be ignored is a mistake, and so is a form that a base cannot have.

    Raises:
        UnsupportedError: all of them.
    """
    from safegene_runtime.errors import Problems, UnsupportedError

    problems = Problems()
    form = arguments.form
    if form is None:
        for name in ONLY_DEPLOYED:
            if getattr(arguments, name) is not None:
                problems.add(f"--{name}", "form", "--as sidecar, branch or merged beside it", "none",
                             f"add --as, or leave --{name} out")  # fmt: skip
        problems.raise_if_any(UnsupportedError)
        return
    if not arguments.reference:
        problems.add("--as", "reference", "--reference beside it", "none", "record one first")
    for name in ONLY_PYTORCH:
        if getattr(arguments, name) is not None:
            flag = "--" + name.replace("_", "-")
            problems.add(flag, "form", "a calibration in PyTorch", f"--as {form}",
                         f"leave {flag} out: an artifact is fitted to its reference")  # fmt: skip
    if arguments.judge is not None and arguments.check is None:
        problems.add("--judge", "replies", "--check beside it", "none",
                     "add --check, or leave --judge out")  # fmt: skip
    made, is_onnx, is_folder = _form(arguments), _is_onnx(arguments), arguments.model.is_dir()
    if not made.carries_base and is_onnx:
        problems.add("--as", "form", "branch or merged, for an ONNX folder", form,
                     "choose one of these, or pass a GGUF as --model")  # fmt: skip
    elif not made.carries_base and is_folder:
        problems.add("--model", "base", "the GGUF that the sidecar belongs to", "a folder",
                     "pass the GGUF, or choose --as branch or merged")  # fmt: skip
    if arguments.type is not None and made.target is ONNX:
        problems.add("--type", "target", "GGUF", "ONNX",
                     "leave --type out: the precision of an export is set with --precision")  # fmt: skip
    if arguments.precision is not None and (is_onnx or not made.carries_base):
        problems.add("--precision", "model", "a base to export to ONNX",
                     "an ONNX folder, which has its precision" if is_onnx else "a GGUF and its sidecar",
                     "leave --precision out")  # fmt: skip
    problems.raise_if_any(UnsupportedError)


def calibrate_deployed(
    arguments: argparse.Namespace, settings: Settings, shots: Sequence[Prompt]
) -> Recalibrated:
    """Runs the request.

    Raises:
        SafeGeneError: one of its kinds; the gene is as it was.
    """
    from safegene_converter.gene.deployed import recalibrate_deployed
    from safegene_converter.gene.shots import check_same_prompts
    from safegene_runtime.judging.plugins import load_judge
    from safegene_runtime.record.reference import read_reference

    reference = read_reference(arguments.reference)
    check_same_prompts(reference, shots, str(arguments.reference))
    held_out = read_reference(arguments.check) if arguments.check else None
    judge = load_judge(arguments.judge) if arguments.judge else None
    with Bars() as bars, _rebuild(arguments, bars) as rebuild:
        return recalibrate_deployed(
            arguments.gene,
            reference,
            rebuild,
            arguments.name,
            expression=arguments.expression,
            settings=settings,
            max_evaluations=60 if arguments.evaluations is None else arguments.evaluations,
            default=arguments.default,
            force=arguments.force,
            held_out=held_out,
            judge=judge,
            progress=bars,
        )


def show_deployed(found: Recalibrated, screen: Console) -> None:
    """Prints what it was worth, on the shots and, if that was asked, elsewhere."""
    screen.print(
        f"mean KL(PyTorch || artifact) on the shots: {found.before:.4g} before, "
        f"{found.after:.4g} after {found.evaluations} rebuilds"
    )
    if found.elsewhere is None:
        return
    first, second = found.elsewhere
    table = Table(title="on the held-out prompts, to which nothing was fitted")
    for name in ("", "before", "after"):
        table.add_column(name, justify="right" if name else "left")
    table.add_row(
        "mean KL(PyTorch || artifact)", f"{first.divergence:.4g}", f"{second.divergence:.4g}"
    )
    for label, field in (
        (f"of {first.harmful} harmful, refused (PyTorch: {first.reference_refused})", "refused"),
        ("refusals of PyTorch's that are lost", "losses"),
        ("benign that only the artifact refuses", "over_refusals"),
        ("undecided by the judge", "undecided"),
    ):
        table.add_row(label, str(getattr(first, field)), str(getattr(second, field)))
    screen.print(table)


def _rebuild(arguments: argparse.Namespace, bars: Bars) -> AbstractContextManager[Rebuild]:
    from safegene_converter.gene.rebuild import gguf_rebuild, onnx_rebuild

    gene, base, form = arguments.gene, arguments.model, arguments.form
    if _form(arguments).target is ONNX:
        return onnx_rebuild(gene, base, form, arguments.precision, progress=bars)
    return gguf_rebuild(gene, base, form, arguments.type or "auto")


def _is_onnx(arguments: argparse.Namespace) -> bool:
    from safegene_converter.bases.onnx_source import is_onnx_folder

    return is_onnx_folder(arguments.model) or arguments.model.suffix.lower() == ".onnx"


def _form(arguments: argparse.Namespace) -> Form:
    """What is made: the name says it, or for `merged` the base, or what it is exported as."""
    found = [form for form in FORMS if form.name == arguments.form]
    if len(found) == 1:
        return found[0]
    exported = _is_onnx(arguments) or arguments.precision is not None
    return form_named(ONNX if exported else GGUF, arguments.form)
