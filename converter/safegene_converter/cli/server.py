"""`safegene verify --server URL`: a running server in an artifact's place."""

from __future__ import annotations

import argparse
from typing import Any

from rich.text import Text

from safegene_converter.cli.options import Bars, console, put_json
from safegene_converter.cli.report_options import report_targets
from safegene_runtime.errors import EngineError, Problems

__all__ = ["add_server_options", "verify_server"]

OTHERS = ("artifact", "base", "control", "threads")
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
        OutputError: a report that cannot be written.
        RecordError: as `check_server`.
    """
    from safegene_converter.cli import inspecting
    from safegene_runtime import reporting
    from safegene_runtime.judging.plugins import load_judge
    from safegene_runtime.record.reference import read_reference
    from safegene_runtime.serving.check import check_server

    problems = Problems()
    for name in OTHERS:
        value = getattr(arguments, name)
        if value is not None and value != []:
            option = "OUT" if name == "artifact" else f"--{name}"
            problems.add("--server", option, "nothing", value, "a server is checked by itself")
    if arguments.mode != "strict":
        fix = "a server runs as it was started: leave --mode out"
        problems.add("--server", "--mode", "nothing", arguments.mode, fix)
    if arguments.no_write:
        fix = "a server has no manifest to write to: leave --no-write out"
        problems.add("--server", "--no-write", "nothing", "given", fix)
    problems.raise_if_any(EngineError)
    (targets,) = report_targets(arguments, [arguments.server]).values()
    record = read_reference(arguments.reference)
    judge = load_judge(arguments.judge) if arguments.judge else None
    with Bars() as bars:
        report = check_server(
            arguments.server,
            record,
            profile=arguments.profile,
            sequential=arguments.sequential,
            attacks=arguments.attacks,
            judge=judge,
            model=arguments.model,
            allow_switchable=arguments.allow_switchable,
            progress=bars,
        )
    data = report.to_dict(texts=arguments.show_text)
    for target in targets:
        reporting.write_reports(data, target)
    if not put_json(arguments.json, data):
        # what a server says of itself is text, never markup
        about = f"{arguments.server}: {report.artifact['form']}, model {report.artifact['name']}"
        console().print(Text(about))
        inspecting.show_report(report, console(), arguments.show_text)
    return report.exit_code
