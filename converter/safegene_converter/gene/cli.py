"""`safegene extract`, `select`, `calibrate` and `evaluate`: parse, call the library, print.

torch is imported when one of them runs, not when the command line is built.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from safegene_converter.command_line import Bars, add_command, add_json, console, put_json

__all__ = ["add_commands"]

OK = 0


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
    from safegene_runtime.prompts import load_prompts

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
        "safegene calibrate GENE --model TUNED --shots shots.jsonl --name my-finetune",
    )
    parser.add_argument("gene", type=Path, metavar="GENE")
    parser.add_argument("--model", type=Path, required=True, help="the target fine-tune")
    parser.add_argument(
        "--shots", type=Path, required=True, help="JSONL or CSV: harmful and benign prompts"
    )
    parser.add_argument("--name", required=True, help="of the new expression")
    parser.add_argument("--max-steps", type=int, help="gradients at most (default: 40)")
    parser.add_argument(
        "--bounds",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        default=(0.05, 4.0),
        help="of every coefficient (default: 0.05 4)",
    )
    parser.add_argument("--default", action="store_true", help="make it the default expression")
    parser.add_argument("--force", action="store_true", help="replace an expression of this name")
    _add_objective(parser)
    deployed = parser.add_argument_group(
        "after quantisation: fit to the artifact itself, without gradients (--model is its base)"
    )
    deployed.add_argument(
        "--reference", type=Path, help="made by `safegene record` with --prompts SHOTS"
    )
    deployed.add_argument("--as", dest="form", choices=["sidecar", "merged"])
    deployed.add_argument("--type", metavar="TYPE", help="as in convert (default: auto)")
    deployed.add_argument("--expression", help="where to start (default: the default one)")
    deployed.add_argument("--evaluations", type=int, help="rebuilds at most (default: 60)")
    add_json(parser)


def _calibrate(arguments: argparse.Namespace) -> int:
    from safegene_converter.gene.optimise import Settings
    from safegene_runtime.prompts import load_prompts

    low, high = arguments.bounds
    steps = Settings.max_steps if arguments.max_steps is None else arguments.max_steps
    settings = Settings(bounds=(low, high), max_steps=steps)
    _refuse_half_requests(arguments)
    shots = load_prompts(arguments.shots)
    found: Any
    if arguments.form:
        found = _calibrate_deployed(arguments, settings, shots)
    else:
        from safegene_converter.gene.calibrate import calibrate

        with Bars() as bars:
            found = calibrate(
                arguments.gene,
                arguments.model,
                shots,
                arguments.name,
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
            screen.print(
                f"mean KL(PyTorch || artifact) on the shots: {found.before:.4g} before, "
                f"{found.after:.4g} after {found.evaluations} rebuilds"
            )
        else:
            for label in ("before", "at_one", "after"):
                one = getattr(found, label)
                screen.print(f"{label:<7} safety {one.safety:.3f}, KL {one.kl:.3f} nats per reply")
    return OK


def _calibrate_deployed(arguments: argparse.Namespace, settings: Any, shots: Any) -> Any:
    from safegene_converter.gene.deployed import gguf_rebuild, recalibrate_deployed
    from safegene_converter.gene.shots import check_same_prompts, shots_of
    from safegene_runtime.reference import read_reference

    shots_of(shots, str(arguments.shots), _evaluation(arguments))
    reference = read_reference(arguments.reference)
    check_same_prompts(reference, shots, str(arguments.reference))
    kind = arguments.type or "auto"
    with Bars() as bars, gguf_rebuild(arguments.gene, arguments.model, arguments.form, kind) as new:
        return recalibrate_deployed(
            arguments.gene,
            reference,
            new,
            arguments.name,
            expression=arguments.expression,
            settings=settings,
            max_evaluations=60 if arguments.evaluations is None else arguments.evaluations,
            default=arguments.default,
            force=arguments.force,
            progress=bars,
        )


def _refuse_half_requests(arguments: argparse.Namespace) -> None:
    """An option that would be ignored is a mistake."""
    from safegene_runtime.errors import Problems, UnsupportedError

    problems = Problems()
    if arguments.form and not arguments.reference:
        problems.add("--as", "reference", "--reference beside it", "none", "record one first")
    if arguments.form:
        for name in ("weight", "refusal", "max_steps"):
            if getattr(arguments, name) is not None:
                flag = "--" + name.replace("_", "-")
                problems.add(flag, "form", "a calibration in PyTorch", f"--as {arguments.form}",
                             f"leave {flag} out: an artifact is fitted to its reference")  # fmt: skip
    else:
        for name in ("reference", "type", "expression", "evaluations"):
            if getattr(arguments, name) is not None:
                problems.add(f"--{name}", "form", "--as sidecar or merged beside it", "none",
                             f"add --as, or leave --{name} out")  # fmt: skip
    problems.raise_if_any(UnsupportedError)


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
    from safegene_runtime.prompts import SUITES, builtin_suite, load_prompts

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
    from safegene_runtime.prompts import builtin_suite, load_prompts

    return load_prompts(arguments.evaluation) if arguments.evaluation else builtin_suite()
