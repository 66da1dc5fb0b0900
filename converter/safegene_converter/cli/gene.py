"""`safegene extract`, `select`, `calibrate` and `evaluate`: parse, call the library, print.

torch is imported when one of them runs, not when the command line is built.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from safegene_converter.cli.deployed import (
    EXAMPLE,
    add_deployed,
    calibrate_deployed,
    refuse_half_requests,
    show_deployed,
)
from safegene_converter.cli.options import Bars, add_command, add_json, console, put_json

__all__ = ["add_commands"]

OK = 0

BLURRED = 0.05
"""A fall of the separation that is said. Of the pairs that `examples/recovery/run.py --pairs` compares, one
lowers it by 0.07 to 0.15 on one fine-tune, and none by more than 0.03 elsewhere."""


def add_commands(commands: Any) -> None:
    """Adds the four commands to the sub-parsers of `safegene`."""
    for add in (_add_extract, _add_select, _add_calibrate, _add_evaluate):
        add(commands)


# --- extract ---------------------------------------------------------------------------------------


def _add_extract(commands: Any) -> None:
    parser = add_command(
        commands,
        "extract",
        _extract,
        "make a gene: what fine-tunes of an aligned model lost",
        "safegene extract --aligned ALIGNED --degraded TUNED --rank 8 -o GENE",
    )
    parser.add_argument(
        "--aligned",
        type=Path,
        action="append",
        required=True,
        help="a Hugging Face folder, a GGUF, or an adapter; one for all, or one per --degraded: that "
        "fine-tune with its safety won back, so that its task cancels",
    )
    parser.add_argument(
        "--degraded",
        type=Path,
        action="append",
        required=True,
        help="a fine-tune of it that lost safety; of several, what they share is kept",
    )
    parser.add_argument("--base", type=Path, help="the model that adapters among them belong to")
    parser.add_argument("--rank", type=int, help="per module (default: 8, without --energy)")
    parser.add_argument("--energy", type=float, help="share of a module's squared norm to keep")
    parser.add_argument(
        "--estimator",
        choices=["mean", "pca", "sign"],
        default="mean",
        help="of what several fine-tunes share (default: mean)",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder to create")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    add_json(parser)


def _extract(arguments: argparse.Namespace) -> int:
    from safegene_converter.gene.extract import extract

    rank = arguments.rank
    if rank is None and arguments.energy is None:
        rank = 8
    with Bars() as bars:
        found = extract(
            arguments.aligned,
            arguments.degraded,
            arguments.output,
            base=arguments.base,
            rank=rank,
            energy=arguments.energy,
            estimator=arguments.estimator,
            force=arguments.force,
            progress=bars,
        )
    if not put_json(arguments.json, found.to_dict()):
        table = Table(title=f"{found.out}: {found.method}, {found.n_parameters:,} parameters")
        for name in ("module", "rank", "energy kept", "norm"):
            table.add_column(name, justify="left" if name == "module" else "right")
        for one in found.modules:
            table.add_row(one.name, str(one.rank), f"{one.energy:.1%}", f"{one.norm:.4g}")
        table.add_section()
        table.add_row("all", "", f"{found.energy:.1%}", "")
        console().print(table)
    return OK


# --- select ----------------------------------------------------------------------------------------


def _add_select(commands: Any) -> None:
    parser = add_command(
        commands,
        "select",
        _select,
        "keep the layers of a gene that bring safety at the least cost",
        "safegene select GENE --model TUNED --harmful harmful.jsonl --benign benign.jsonl",
    )
    parser.add_argument("gene", type=Path, metavar="GENE")
    parser.add_argument("--model", type=Path, required=True, help="a target that lost safety")
    parser.add_argument("--harmful", type=Path, required=True, help="JSONL or CSV of prompts")
    parser.add_argument("--benign", type=Path, required=True, help="JSONL or CSV of prompts")
    parser.add_argument(
        "--budget",
        type=float,
        default=0.01,
        help="share of the model's parameters, or a number above 1 (default: 0.01)",
    )
    parser.add_argument(
        "--exact", action="store_true", help="score by ablation: slower, and compares the scores"
    )
    parser.add_argument(
        "-o", "--output", type=Path, help="the folder to create (default: replace GENE itself)"
    )
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    _add_objective(parser)
    add_json(parser)


def _select(arguments: argparse.Namespace) -> int:
    from dataclasses import replace

    from safegene_converter.gene.select import select
    from safegene_runtime.record.prompts import load_prompts

    prompts = [
        replace(prompt, kind=kind, borderline=prompt.borderline and kind == "benign")
        for kind in ("harmful", "benign")
        for prompt in load_prompts(getattr(arguments, kind))
    ]
    with Bars() as bars:
        found = select(
            arguments.gene,
            arguments.model,
            prompts,
            budget=arguments.budget,
            exact=arguments.exact,
            out=arguments.output,
            force=arguments.force,
            progress=bars,
            **_objective(arguments),
        )
    if not put_json(arguments.json, found.to_dict()):
        title = f"{len(found.layers)} layers, {found.parameters:,} parameters, {found.share:.2%}"
        table = Table(title=title)
        for name in ("layer", "safety", "utility", "score", "by ablation", "kept"):
            table.add_column(name, justify="right")
        for one in found.scores:
            exact = "" if one.exact is None else f"{one.exact:.3g}"
            kept = "yes" if one.layer in found.layers else ""
            numbers = (f"{value:.3g}" for value in (one.safety, one.utility, one.score))
            table.add_row(str(one.layer), *numbers, exact, kept)
        screen = console()
        screen.print(table)
        if found.correlation is not None:
            screen.print(f"rank correlation of both scores: {found.correlation:.2f}")
    return OK


# --- calibrate -------------------------------------------------------------------------------------


def _add_calibrate(commands: Any) -> None:
    parser = add_command(
        commands,
        "calibrate",
        _calibrate,
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
    _add_objective(parser)
    add_deployed(parser)
    add_json(parser)


def _calibrate(arguments: argparse.Namespace) -> int:
    from safegene_converter.gene.optimise import Settings
    from safegene_converter.gene.shots import shots_of
    from safegene_runtime.record.prompts import load_prompts

    low, high = arguments.bounds
    steps = Settings.max_steps if arguments.max_steps is None else arguments.max_steps
    settings = Settings(bounds=(low, high), max_steps=steps)
    refuse_half_requests(arguments)
    shots = load_prompts(arguments.shots)
    found: Any
    if arguments.form:
        shots_of(shots, str(arguments.shots), _evaluation(arguments))
        found = calibrate_deployed(arguments, settings, shots)
    else:
        from safegene_converter.gene.calibrate import calibrate

        with Bars() as bars:
            found = calibrate(
                arguments.gene,
                arguments.model,
                shots,
                arguments.name,
                aligned=arguments.aligned,
                settings=settings,
                default=arguments.default,
                force=arguments.force,
                progress=bars,
                **_objective(arguments),
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
            show_deployed(found, screen)
        else:
            rows = [("before", found.before), ("at_one", found.at_one), ("after", found.after)]
            if found.level is not None:
                rows += [(f"KL x {one.weight:g}", one.losses) for one in found.minima]
            for label, one in rows:
                screen.print(f"{label:<11} safety {one.safety:.3f}, KL {one.kl:.3f} nats per reply, "
                             f"P(refusal) {one.refused:.1%}, refused greedily {one.greedy:.1%}")  # fmt: skip
            _show_separation(found.separation, screen)
            if found.level is not None:
                missed = "" if found.level.reached(found.after) else ": not reached"
                screen.print(f"aligned     P(refusal) {found.level.refused:.1%}, "
                             f"refused greedily {found.level.greedy:.1%}{missed}")  # fmt: skip
    return OK


def _show_separation(separation: tuple[float, float], screen: Any) -> None:
    before, after = separation
    screen.print(f"separation of harmful from benign shots {before:.3f} to {after:.3f}")
    if after < before - BLURRED:
        screen.print("this gene makes benign prompts refused nearly as readily as harmful ones, and no "
                     "coefficient mends that: try one extracted from another pair of models")  # fmt: skip


# --- evaluate --------------------------------------------------------------------------------------


def _add_evaluate(commands: Any) -> None:
    parser = add_command(
        commands,
        "evaluate",
        _evaluate,
        "refusals, change of benign replies and task loss, with or without a gene",
        "safegene evaluate --model TUNED --adapter GENE --expression my-finetune",
    )
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder or a GGUF")
    parser.add_argument("--adapter", type=Path, metavar="GENE", help="a gene on it")
    parser.add_argument("--expression", help="a named set of layer coefficients of the gene")
    parser.add_argument(
        "--suite",
        default="builtin",
        metavar="builtin|smoke|ci|FILE",
        help="prompts to ask: a size of the built-in suite, or your own (default: builtin, that is ci)",
    )
    parser.add_argument("--task", type=Path, help='JSONL of {"prompt": ..., "reply": ...}')
    parser.add_argument(
        "--max-new-tokens", type=int, default=24, help="length of replies (default: 24)"
    )
    add_json(parser)


def _evaluate(arguments: argparse.Namespace) -> int:
    from safegene_converter.gene.evaluate import evaluate
    from safegene_converter.gene.shots import read_task
    from safegene_runtime.record.prompts import SUITES, builtin_suite, load_prompts

    # a file of prompts has a suffix, so these names can mean none
    suite = "ci" if arguments.suite == "builtin" else arguments.suite
    prompts = builtin_suite(suite) if suite in SUITES else load_prompts(Path(suite))
    task = read_task(arguments.task) if arguments.task else ()
    with Bars() as bars:
        found = evaluate(
            arguments.model,
            gene=arguments.adapter,
            expression=arguments.expression,
            prompts=prompts,
            task=task,
            max_new_tokens=arguments.max_new_tokens,
            progress=bars,
        )
    if not put_json(arguments.json, found.to_dict()):
        table = Table(title=f"{found.n_harmful} harmful and {found.n_benign} benign prompts")
        table.add_column("")
        table.add_column("", justify="right")
        for label, value, is_rate in (
            ("harmful refused", found.harmful_refused, True),
            ("benign refused", found.benign_refused, True),
            ("borderline refused", found.borderline_refused, True),
            ("degenerate replies", found.degenerate, True),
            ("benign KL, nats per token", found.benign_kl, False),
            ("task loss, nats per token", found.task_loss, False),
        ):
            if value is not None:
                table.add_row(label, f"{value:.1%}" if is_rate else f"{value:.4g}")
        console().print(table)
    return OK


# --- shared ----------------------------------------------------------------------------------------


def _add_objective(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weight", type=float, help="of the KL against safety (default: 1)")
    parser.add_argument(
        "--refusal",
        action="append",
        metavar="TEXT",
        help="how a refusal begins; may be given again (default: I'm sorry, but I can't)",
    )
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="FILE",
        help="prompts that will be tested on, so that none is used here (default: the suite)",
    )


def _objective(arguments: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = {"evaluation": _evaluation(arguments)}
    if arguments.weight is not None:
        found["weight"] = arguments.weight
    if arguments.refusal:
        found["refusals"] = tuple(arguments.refusal)
    return found


def _evaluation(arguments: argparse.Namespace) -> Any:
    from safegene_runtime.record.prompts import builtin_suite, load_prompts

    return load_prompts(arguments.evaluation) if arguments.evaluation else builtin_suite()
