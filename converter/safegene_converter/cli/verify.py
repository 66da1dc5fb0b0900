"""`safegene verify`: artifacts, or a running server in their place."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.text import Text

import safegene
from safegene_converter.cli.options import (
    Bars,
    add_attacks,
    add_command,
    add_engine,
    console,
    put_json,
)
from safegene_converter.cli.report_options import add_report_options, report_targets
from safegene_runtime.gating.bounds import BOUNDS
from safegene_runtime.gating.profiles import PROFILES

if TYPE_CHECKING:  # the ladder loads engines
    from safegene_runtime.verifying.request import VerifyRequest

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "verify",
        _run,
        "prove that an artifact refuses what the reference refused",
        "safegene verify OUT --reference REFERENCE --report REPORT",
    )
    parser.add_argument(
        "artifact", type=Path, metavar="OUT", nargs="*", help="several are shown side by side"
    )
    parser.add_argument("--reference", type=Path, required=True, help="made by `safegene record`")
    parser.add_argument("--base", type=Path, help="for a sidecar: the GGUF it belongs to")
    parser.add_argument(
        "--control",
        type=Path,
        metavar="GGUF",
        help="for a merged GGUF: its plain base, quantised the same way; below 8 bits the KL is then held "
        "against that base's own",
    )
    gate = parser.add_argument_group("the gate")
    gate.add_argument(
        "--profile",
        choices=list(PROFILES),
        default="smoke",
        help="how much must be shown: at 95 %% confidence fewer than "
        + ", ".join(
            f"{profile.loss_margin * 100:g} %% ({name})" for name, profile in PROFILES.items()
        )
        + " of refusals lost (default: smoke); weights of 8 bits are allowed "
        f"{BOUNDS['8-bit'].losses * 100:g} %% and coarser ones {BOUNDS['4-bit'].losses * 100:g} %%, where "
        "that is wider",
    )
    gate.add_argument(
        "--sequential", action="store_true", help="stop as soon as the verdict is certain"
    )
    add_attacks(gate, "gate under these recorded jailbreaks, too")
    gate.add_argument(
        "--mode",
        choices=["strict", "as-shipped"],
        default="strict",
        help="strict compares arithmetic; as-shipped runs llama.cpp with its F16 KV cache",
    )
    gate.add_argument(
        "--judge",
        metavar="JUDGE",
        help="rules+ngram (default), gguf:PATH, onnx:PATH, or the name of a plug-in",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    add_engine(parser)
    parser.add_argument(
        "--show-text", action="store_true", help="put replies into tables and reports"
    )
    parser.add_argument(
        "--no-write",
        action="store_true",
        help="do not put the verdict into the artifact's manifest",
    )
    _add_server(parser)
    add_report_options(parser)


def _add_server(parser: Any) -> None:
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


def _run(arguments: argparse.Namespace) -> int:
    from safegene_runtime.verifying.request import VerifyRequest

    request = VerifyRequest(
        arguments.reference,
        arguments.artifact,
        server=arguments.server,
        base=arguments.base,
        control=arguments.control,
        profile=arguments.profile,
        sequential=arguments.sequential,
        attacks=arguments.attacks,
        mode=arguments.mode,
        judge=arguments.judge,
        threads=arguments.threads,
        engine=arguments.engine,
        write=not arguments.no_write,
        model=arguments.model,
        allow_switchable=arguments.allow_switchable,
    )
    targets = report_targets(arguments, request.labels)
    return (_artifacts if request.server is None else _server)(request, arguments, targets)


def _artifacts(request: VerifyRequest, arguments: argparse.Namespace, targets: Any) -> int:
    from safegene_converter.cli import comparison, tables
    from safegene_runtime import reporting
    from safegene_runtime.gating.verdict import gravest
    from safegene_runtime.record.reference import read_reference
    from safegene_runtime.verifying.ladder import verify_each

    record = read_reference(arguments.reference)
    with Bars() as bars:
        found = list(verify_each(replace(request, reference=record), bars))
    data = [report.to_dict(texts=arguments.show_text) for _, report in found]
    for (label, _), written in zip(found, data, strict=True):
        for target in targets[label]:
            reporting.write_reports(written, target)
    compared = None
    if len(found) > 1:
        compared = comparison.compare(record, found)
    shown = data[0] if compared is None else {"comparison": compared, "reports": data}
    if not put_json(arguments.json, shown):
        for label, report in found:
            if compared is not None:
                console().rule(escape(label))
            tables.show_report(report, console(), arguments.show_text)
        if compared is not None:
            comparison.show_comparison(compared, console())
    return gravest(report.verdict for _, report in found).exit_code


def _server(request: VerifyRequest, arguments: argparse.Namespace, targets: Any) -> int:
    from safegene_converter.cli.tables import show_report
    from safegene_runtime import reporting

    with Bars() as bars:
        report = safegene.verify_server(
            arguments.server,
            arguments.reference,
            profile=request.profile,
            sequential=request.sequential,
            attacks=request.attacks,
            judge=request.judge,
            model=request.model,
            allow_switchable=request.allow_switchable,
            progress=bars,
        )
    data = report.to_dict(texts=arguments.show_text)
    for target in targets[arguments.server]:
        reporting.write_reports(data, target)
    if not put_json(arguments.json, data):
        # what a server says of itself is text, never markup
        about = f"{arguments.server}: {report.artifact['form']}, model {report.artifact['name']}"
        console().print(Text(about))
        show_report(report, console(), arguments.show_text)
    return report.exit_code
