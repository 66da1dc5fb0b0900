"""`safegene extract`."""

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
        "extract",
        _run,
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


def _run(arguments: argparse.Namespace) -> int:
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
        for module in found.modules:
            table.add_row(
                module.name, str(module.rank), f"{module.energy:.1%}", f"{module.norm:.4g}"
            )
        table.add_section()
        table.add_row("all", "", f"{found.energy:.1%}", "")
        console().print(table)
    return 0
