"""`safegene demo`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from safegene_converter.cli.options import Bars, add_command, add_json, console, put_json

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "demo", _run, "the main job on a real model, in one go", "safegene demo"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("demo"),
        help="where artifacts and reference go; replaced (default: demo)",
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        help="an adapter for SmolLM2-135M-Instruct (default: the one in examples/)",
    )
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    from safegene_converter.cli import showcase  # it loads what every command loads

    with Bars() as bars:
        found = showcase.run(arguments.output, arguments.adapter, bars)
    if not put_json(arguments.json, found):
        showcase.show(found, console())
    # a demonstration is done when every verdict is in, whatever it says; `verify` is the gate
    return 0
