"""The reports people read, each a pure function of the dict that report.json holds.

    report.json   the source: schema in `report.schema.json`
    junit.xml     for CI servers: one suite a rung, one case a check
    report.sarif  for code scanning: what broke, and every flip
    report.md     for a pull request: the sentence to quote, one table, flips
    report.html   one file for people; no network, works without JavaScript

Only report.json and report.html can hold replies, and only if the dict does.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from safegene_runtime.errors import OutputError, Problem
from safegene_runtime.formats.publish import publish_file
from safegene_runtime.reporting.junit import render_junit
from safegene_runtime.reporting.markdown import render_markdown
from safegene_runtime.reporting.page import render_html
from safegene_runtime.reporting.places import check_places, read_files
from safegene_runtime.reporting.sarif import render_sarif
from safegene_runtime.reporting.schema import report_schema

__all__ = [
    "FORMATS",
    "check_places",
    "read_files",
    "render_html",
    "render_json",
    "render_junit",
    "render_markdown",
    "render_sarif",
    "report_files",
    "report_schema",
    "write_reports",
]


def render_json(report: Mapping[str, Any]) -> str:
    """The report itself as JSON; non-finite numbers are a ValueError, not invalid JSON."""
    return json.dumps(report, ensure_ascii=False, allow_nan=False, indent=1) + "\n"


FORMATS: Mapping[str, tuple[str, Callable[[Mapping[str, Any]], str]]] = MappingProxyType(
    {
        "json": ("report.json", render_json),
        "junit": ("junit.xml", render_junit),
        "sarif": ("report.sarif", render_sarif),
        "markdown": ("report.md", render_markdown),
        "html": ("report.html", render_html),
    }
)
"""Name of a format: (file name in a folder, how it is made)."""


def report_files(folder: Path) -> dict[str, Path]:
    """Every report in a folder, by the name of its format."""
    return {name: folder / file for name, (file, _) in FORMATS.items()}


def write_reports(report: Mapping[str, Any], targets: Path | Mapping[str, Path]) -> dict[str, Path]:
    """Writes reports, each file atomically; all are rendered before the first is written.

    Args:
        report: as `report_schema` describes it.
        targets: a folder for every format, or a path for each format that is wanted.

    Returns:
        The path of each format that was written.

    Raises:
        OutputError: a format nobody knows, or the file system said no.
    """
    if isinstance(targets, Path):
        targets = report_files(targets)
    unknown = sorted(set(targets) - set(FORMATS))
    if unknown:
        raise OutputError(
            Problem("reports", "format", " or ".join(FORMATS), ", ".join(unknown), "choose one")
        )
    # a lone surrogate, which UTF-8 cannot hold, becomes the escape that JSON has for it
    made = {name: FORMATS[name][1](report).encode("utf-8", "backslashreplace") for name in targets}
    for name, data in made.items():
        publish_file(targets[name], data)
    return dict(targets)
