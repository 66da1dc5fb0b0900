"""`safegene calibrate`: in PyTorch, or on the artifact that ships."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

import safegene
from safegene_converter.cli.options import (
    Bars,
    add_command,
    add_json,
    add_objective,
    console,
    put_json,
)
from safegene_runtime.artifact.forms import ONNX_ADAPTER, names_of_forms

if TYPE_CHECKING:
    from safegene_converter.gene.deployed import Recalibrated

__all__ = ["add"]

EXAMPLE = (
    "safegene calibrate GENE --model INT4_ONNX_DIR --shots shots.jsonl --name my-finetune-int4 "
    "--expression my-finetune --as branch --reference REF --check REF_OF_OTHER_PROMPTS"
)

BLURRED = 0.05
"""A fall of the separation that is said. Of the pairs that `examples/recovery/run.py --pairs` compares, one
lowers it by 0.07 to 0.15 on one fine-tune, and none by more than 0.03 elsewhere."""


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "calibrate",
        _run,
        "fit a gene's layer coefficients to a target, from a few shots",
        f"safegene calibrate GENE --model TUNED --shots shots.jsonl --name my-finetune\n  {EXAMPLE}",
    )
    parser.add_argument("gene", type=Path, metavar="GENE")
    parser.add_argument("--model", type=Path, required=True, help="the target fine-tune")
    parser.add_argument(
        "--shots", type=Path, required=True, help="JSONL or CSV: harmful and benign prompts"
    )
    parser.add_argument("--name", required=True, help="of the new expression")
    parser.add_argument(
        "--aligned",
        type=Path,
        metavar="MODEL",
        help="go on with smaller weights until the shots are refused as surely and as often as by this model",
    )
    parser.add_argument("--max-steps", type=int, help="gradients at most (default: 40)")
    parser.add_argument(
        "--bounds",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        default=(0.05, 8.0),
        help="of every coefficient (default: 0.05 8)",
    )
    parser.add_argument("--default", action="store_true", help="make it the default expression")
    parser.add_argument("--force", action="store_true", help="replace an expression of this name")
    add_objective(parser)
    _add_deployed(parser)
    add_json(parser)


def _add_deployed(parser: argparse.ArgumentParser) -> None:
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


def _run(arguments: argparse.Namespace) -> int:
    found: Any
    with Bars() as bars:
        found = safegene.calibrate(
            arguments.gene,
            arguments.model,
            arguments.shots,
            arguments.name,
            bounds=tuple(arguments.bounds),
            default=arguments.default,
            force=arguments.force,
            evaluation=arguments.evaluation,
            aligned=arguments.aligned,
            weight=arguments.weight,
            refusals=tuple(arguments.refusal or ()),
            max_steps=arguments.max_steps,
            form=arguments.form,
            reference=arguments.reference,
            type=arguments.type,
            precision=arguments.precision,
            expression=arguments.expression,
            evaluations=arguments.evaluations,
            check=arguments.check,
            judge=arguments.judge,
            progress=bars,
        )
    if not put_json(arguments.json, found.to_dict()):
        table = Table(title=f"{found.name}: {found.seconds:.0f} s")
        table.add_column("layer", justify="right")
        table.add_column("coefficient", justify="right")
        for layer, value in sorted(found.coefficients.items()):
            table.add_row(str(layer), f"{value:.3f}")
        screen = console()
        screen.print(table)
        if arguments.form:
            _show_deployed(found, screen)
        else:
            rows = [("before", found.before), ("at_one", found.at_one), ("after", found.after)]
            if found.level is not None:
                rows += [(f"KL x {least.weight:g}", least.losses) for least in found.minima]
            for label, losses in rows:
                screen.print(f"{label:<11} safety {losses.safety:.3f}, KL {losses.kl:.3f} nats per reply, "
                             f"P(refusal) {losses.refused:.1%}, "
                             f"refused greedily {losses.greedy:.1%}")  # fmt: skip
            _show_separation(found.separation, screen)
            if found.level is not None:
                missed = "" if found.level.reached(found.after) else ": not reached"
                screen.print(f"aligned     P(refusal) {found.level.refused:.1%}, "
                             f"refused greedily {found.level.greedy:.1%}{missed}")  # fmt: skip
    return 0


def _show_separation(separation: tuple[float, float], screen: Any) -> None:
    before, after = separation
    screen.print(f"separation of harmful from benign shots {before:.3f} to {after:.3f}")
    if after < before - BLURRED:
        screen.print("this gene makes benign prompts refused nearly as readily as harmful ones, and no "
                     "coefficient mends that: try one extracted from another pair of models")  # fmt: skip


def _show_deployed(found: Recalibrated, screen: Console) -> None:
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
