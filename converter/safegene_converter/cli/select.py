"""`safegene select`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from safegene_converter.cli.options import (
    Bars,
    add_command,
    add_json,
    add_objective,
    console,
    put_json,
)

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "select",
        _run,
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
    add_objective(parser)
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
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
        for score in found.scores:
            exact = "" if score.exact is None else f"{score.exact:.3g}"
            kept = "yes" if score.layer in found.layers else ""
            numbers = (f"{value:.3g}" for value in (score.safety, score.utility, score.score))
            table.add_row(str(score.layer), *numbers, exact, kept)
        screen = console()
        screen.print(table)
        if found.correlation is not None:
            screen.print(f"rank correlation of both scores: {found.correlation:.2f}")
    return 0


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
