"""The options of `safegene verify` that name reports, and where those go."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from safegene_converter.command_line import add_json

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
        OutputError: one file for several artifacts, two reports in one file, or a place where none
            can be written.
    """
    from safegene_runtime.errors import OutputError, Problems
    from safegene_runtime.files import check_writable
    from safegene_runtime.reporting import FORMATS

    problems = Problems()
    files: dict[str, Path] = {
        name: path for name in REPORTS if (path := getattr(arguments, name)) is not None
    }
    if files and len(labels) > 1:
        problems.add(
            f"--{next(iter(files))}", "artifacts", "one, for a report in one file", len(labels),
            "use --report DIR, which makes a folder for each",
        )  # fmt: skip
    found: dict[str, list[Path | Mapping[str, Path]]] = {label: [] for label in labels}
    written = {f"--{name}": path for name, path in files.items()}
    if arguments.json not in (None, "-"):
        written["--json"] = Path(arguments.json)
    for label in labels:
        if (folder := arguments.report) is not None:
            if len(labels) > 1:
                folder = folder / label.replace("/", "-").strip("-.")
            found[label].append(folder)
            written |= {f"--report: {file}": folder / file for file, _ in FORMATS.values()}
        if files:
            found[label].append(files)
    by_place: dict[Path, str] = {}
    for option, path in written.items():
        first = by_place.setdefault(path.resolve(), option)
        if first != option:
            problems.add(option, "output", "a file of its own", f"that of {first}", "name another")
        if problem := check_writable(path):
            problems.extend([problem])
        for folder in (*arguments.artifact, arguments.reference):
            if path.resolve().is_relative_to(folder.resolve()):
                problems.add(
                    option, "output", "a place of its own", f"one inside {folder}",
                    "a file that its manifest does not list would break it: choose another",
                )  # fmt: skip
    problems.raise_if_any(OutputError)
    return found
