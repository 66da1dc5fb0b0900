"""`safegene verify --server URL`: a running server in an artifact's place."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from safegene_converter.command_line import Bars, console, put_json
from safegene_runtime.errors import EngineError, Problems

if TYPE_CHECKING:  # what other commands need not import
    from safegene_runtime.server_check import ServerReport

__all__ = ["add_server_options", "verify_server"]

OTHERS = (
    "artifact",
    "base",
    "threads",
    "show_text",
    "report",
    "html",
    "junit",
    "sarif",
    "markdown",
    "sequential",
    "attacks",
)
"""What `verify` takes for artifacts and a server has no use for."""


def add_server_options(parser: Any) -> None:
    """Adds `--server` and what goes with it to `safegene verify`."""
    group = parser.add_argument_group("a running server, instead of OUT")
    group.add_argument(
        "--server", metavar="URL", help="an OpenAI-compatible server: http://127.0.0.1:PORT"
    )
    group.add_argument("--model", metavar="NAME", help="which of its models")
    group.add_argument(
        "--allow-switchable",
        action="store_true",
        help="do not fail a server whose clients can switch the adapter off",
    )


def verify_server(arguments: argparse.Namespace) -> int:
    """Checks the server, prints what was found, and returns the verdict's exit code.

    Raises:
        EngineError: it was given together with what only an artifact has, or as `check_server`.
        RecordError: as `check_server`.
    """
    from safegene_runtime.judge_plugins import load_judge
    from safegene_runtime.reference import read_reference
    from safegene_runtime.server_check import check_server

    problems = Problems()
    for name in OTHERS:
        value = getattr(arguments, name, None)
        if value is not None and value is not False and value != []:
            option = "OUT" if name == "artifact" else "--" + name.replace("_", "-")
            problems.add("--server", option, "nothing", value, "a server is checked by itself")
    if (mode := getattr(arguments, "mode", "strict")) != "strict":
        fix = "a server runs as it was started: leave --mode out"
        problems.add("--server", "--mode", "nothing", mode, fix)
    problems.raise_if_any(EngineError)
    record = read_reference(arguments.reference)
    judge = load_judge(arguments.judge) if arguments.judge else None
    with Bars() as bars:
        report = check_server(
            arguments.server,
            record,
            profile=arguments.profile,
            judge=judge,
            model=arguments.model,
            allow_switchable=arguments.allow_switchable,
            on_progress=bars,
        )
    if not put_json(arguments.json, report.to_dict()):
        _show(report)
    return report.verdict.exit_code


def _show(report: ServerReport) -> None:
    # what a server says of itself is text, never markup
    table = Table(title=Text(f"{report.url}: {report.kind}"))
    for name in ("check", "status", "detail"):
        table.add_column(name)
    for one in report.checks:
        table.add_row(one.name, one.status, Text(one.detail))
    table.add_row("refusals", str(report.gate.verdict), Text(report.gate.sentence))
    console().print(table)
    console().print(Text(f"{report.verdict}: {report.sentence}"))
