"""The options of `safegene verify` that name reports, and where those go."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from safegene_converter.cli.options import add_json

__all__ = ["add_report_options", "report_targets"]

REPORTS = {
    "html": "one page for people",
    "junit": "JUnit XML, for CI",
    "sarif": "SARIF, for code scanning",
    "markdown": "a summary for a pull request",
}


def add_report_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--report DIR`, an option for each format, and `--json`."""
    group = parser.add_argument_group("reports")
    group.add_argument("--report", type=Path, metavar="DIR", help="all of them, into a folder")
    for name, what in REPORTS.items():
        group.add_argument(f"--{name}", type=Path, metavar="FILE", help=what)
    add_json(parser)


def report_targets(
    arguments: argparse.Namespace, labels: Sequence[str]
) -> dict[str, list[Path | Mapping[str, Path]]]:
    """Where the reports of each artifact go, by its label; asked before anything takes long.

    Raises:
        OutputError: one file for several artifacts, or as `check_places`.
    """
    from safegene_runtime.errors import OutputError, Problem
    from safegene_runtime.reporting import check_places, read_files, report_files

    files: dict[str, Path] = {
        name: path for name in REPORTS if (path := getattr(arguments, name)) is not None
    }
    if files and len(labels) > 1:
        raise OutputError(
            Problem(
                f"--{next(iter(files))}", "artifacts", "one, for a report in one file", str(len(labels)),
                "use --report DIR, which makes a folder for each",
            )
        )  # fmt: skip
    found: dict[str, list[Path | Mapping[str, Path]]] = {label: [] for label in labels}
    written = {f"--{name}": path for name, path in files.items()}
    if arguments.json not in (None, "-"):
        written["--json"] = Path(arguments.json)
    for label, name in zip(labels, _folder_names(labels), strict=True):
        if (folder := arguments.report) is not None:
            if len(labels) > 1:
                folder = folder / name
            found[label].append(folder)
            written |= {f"--report: {path}": path for path in report_files(folder).values()}
        if files:
            found[label].append(files)
    beside = read_files(arguments.judge, arguments.base, arguments.control)
    check_places(written, [*arguments.artifact, arguments.reference, *beside])
    return found


def _folder_names(labels: Sequence[str]) -> list[str]:
    """A folder for each artifact; `art` and `../art` are two, on any file system."""
    found: list[str] = []
    for label in labels:
        plain = label.replace("/", "-").strip("-.") or "artifact"
        name, number = plain, 1
        while name.casefold() in {taken.casefold() for taken in found}:
            number += 1
            name = f"{plain}-{number}"
        found.append(name)
    return found
