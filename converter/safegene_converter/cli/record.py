"""`safegene record`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import safegene
from safegene_converter.cli.options import (
    Bars,
    add_attacks,
    add_command,
    add_json,
    add_stack,
    console,
    put_json,
)
from safegene_runtime.record.prompts import SUITES

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "record",
        _run,
        "record what PyTorch + PEFT answer, once",
        "safegene record examples/smollm2-135m-safegene --base smollm2.gguf -o REFERENCE",
    )
    parser.add_argument("adapter", type=Path, metavar="ADAPTER")
    parser.add_argument(
        "--base", type=Path, required=True, help="a Hugging Face folder or a GGUF file"
    )
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--suite",
        choices=SUITES,
        help="size of the built-in suite: smoke is a quick part of it, ci all (default: ci)",
    )
    asked.add_argument(
        "--prompts", type=Path, metavar="FILE", help="JSONL or CSV of your own, in its place"
    )
    parser.add_argument("--expression", help="a named set of layer coefficients of the adapter")
    add_stack(parser, "ADAPTER")
    add_attacks(parser, "ask the harmful prompts under these jailbreaks, too")
    parser.add_argument(
        "--judge",
        metavar="JUDGE",
        help="rules+ngram (default), gguf:PATH, onnx:PATH, or the name of a plug-in",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=24, help="length of replies (default: 24)"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder to create")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    from safegene_converter.cli.tables import show
    from safegene_converter.describing import summarise_reference

    with Bars() as bars:
        reference = safegene.record(
            arguments.adapter,
            arguments.base,
            arguments.output,
            suite=arguments.suite,
            prompts=arguments.prompts,
            attacks=arguments.attacks,
            judge=arguments.judge,
            expression=arguments.expression,
            max_new_tokens=arguments.max_new_tokens,
            force=arguments.force,
            stack=arguments.stack,
            progress=bars,
        )
    found = summarise_reference(reference)
    if not put_json(arguments.json, found):
        show(found, console())
    return 0
