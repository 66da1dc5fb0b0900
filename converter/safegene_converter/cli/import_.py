"""`safegene import`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from safegene_converter.cli.options import (
    add_command,
    add_json,
    add_stack,
    add_verbose,
    console,
    put_json,
)

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "import",
        _run,
        "make an adapter plain: from .bin, MLX-LM, shards, or under other names",
        "safegene import OLD -o NEW",
    )
    parser.add_argument("adapter", type=Path, metavar="OLD")
    add_stack(parser, "OLD")
    parser.add_argument("--expression", help="with --with: the set of layer coefficients of OLD")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder to create")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    add_verbose(parser)
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    from safegene_converter.cli.tables import show
    from safegene_converter.describing import inspect
    from safegene_converter.importing.plain import import_adapter
    from safegene_converter.importing.stack import stack_adapters
    from safegene_runtime.errors import Problem, UnsupportedError
    from safegene_runtime.extras import need

    need("safetensors")
    if arguments.stack:
        stack_adapters(
            arguments.adapter,
            arguments.stack,
            arguments.output,
            expression=arguments.expression,
            force=arguments.force,
        )
    elif arguments.expression is not None:
        problem = Problem("--expression", "option", "--with beside it", "none", "leave it out")
        raise UnsupportedError(problem)
    else:
        import_adapter(arguments.adapter, arguments.output, arguments.force)
    found = inspect(arguments.output)
    if not put_json(arguments.json, found):
        show(found, console(), arguments.verbose)
    return 0
