"""`safegene inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import safegene
from safegene_converter.cli.options import add_command, add_json, add_verbose, console, put_json

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "inspect",
        _run,
        "show what is in an adapter or an artifact",
        "safegene inspect examples/smollm2-135m-safegene",
    )
    parser.add_argument("path", type=Path, metavar="ADAPTER|ARTIFACT")
    parser.add_argument("--expression", help="the set of layer coefficients to show")
    parser.add_argument("--base", type=Path, help="a base, to show the share of its parameters")
    add_verbose(parser)
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    from safegene_converter.cli.tables import show

    found = safegene.inspect(arguments.path, expression=arguments.expression, base=arguments.base)
    if not put_json(arguments.json, found):
        show(found, console(), arguments.verbose)
    return 0
