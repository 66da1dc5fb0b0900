"""`safegene evaluate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.table import Table

from safegene_converter.cli.options import Bars, add_command, add_json, console, put_json

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "evaluate",
        _run,
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


def _run(arguments: argparse.Namespace) -> int:
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
    return 0
