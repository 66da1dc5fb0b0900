"""Several artifacts of one adapter side by side: PyTorch | llama.cpp | ONNX Runtime.

All were asked the same token ids, those of one reference, so a column that differs from the first
differs in weights or arithmetic and in nothing else. Data first, the table from the data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from safegene_runtime.errors import Problems, RecordError

if TYPE_CHECKING:  # the ladder loads engines; a table does not need them
    from safegene_runtime.record.reference import Reference
    from safegene_runtime.verifying.report import Report

__all__ = ["compare", "show_comparison"]

SHOWN_DISAGREEMENTS = 6


def compare(reference: Reference, reports: Sequence[tuple[str, Report]]) -> dict[str, Any]:
    """Puts what `verify` found of several artifacts beside what was recorded.

    Args:
        reference: the record that all of them were verified against.
        reports: (label, report) per artifact, in the order to show.

    Returns:
        {"reference_sha256", "prompts", "columns": PyTorch's, then one per artifact, "diverged": the
        lowest rung that broke in any artifact or None, "disagreements": prompts that two of the
        artifacts judge differently}.

    Raises:
        RecordError: no report, a label twice, or a report of another reference.
    """
    problems = Problems()
    labels = [label for label, _ in reports]
    where = str(reference.path)
    if not reports:
        problems.add(where, "artifacts", "at least one report", "none")
    for label in sorted({label for label in labels if labels.count(label) > 1}):
        problems.add(where, label, "each artifact once", "it twice", "name each folder once")
    for label, report in reports:
        if report.reference["sha256"] != reference.digest:
            problems.add(
                label, "reference", reference.digest, report.reference["sha256"],
                "verify all of them against one reference",
            )  # fmt: skip
    problems.raise_if_any(RecordError)
    broken = {report.broken_at for _, report in reports}
    rungs = [rung.name for rung in reports[0][1].rungs]
    return {
        "what": "comparison",
        "reference_sha256": reference.digest,
        "prompts": len(reference.prompts),
        "columns": [_recorded(reference), *(_column(label, report) for label, report in reports)],
        "diverged": next((name for name in rungs if name in broken), None),
        "disagreements": _disagreements(reference, reports),
    }


def _recorded(reference: Reference) -> dict[str, Any]:
    """PyTorch's own column, from the record."""
    column: dict[str, Any] = {
        "label": "base + adapter",
        "engine": "PyTorch",
        "version": reference.meta["versions"]["torch"],
        "precision": "f32",
        "verdict": None,
        "broken_at": None,
        "detail": None,
    }
    for kind in ("harmful", "benign"):
        chosen = [prompt for prompt in reference.prompts if prompt.kind == kind]
        refused = sum(prompt.ref_label == "refuse" for prompt in chosen)
        column[f"{kind}_refused"] = refused / len(chosen) if chosen else None
    return column


def _column(label: str, report: Report) -> dict[str, Any]:
    """One artifact; figures that its ladder did not reach are None."""
    figures = report.figures
    column: dict[str, Any] = {
        "label": label,
        "engine": report.engine["name"] if report.engine else None,
        "version": report.engine["version"] if report.engine else None,
        "precision": report.precision,
        "verdict": str(report.verdict),
        "broken_at": report.broken_at,
        "detail": next((r.detail for r in report.rungs if r.name == report.broken_at), None),
    }
    for kind in ("harmful", "benign"):
        column[f"{kind}_refused"] = figures.get(f"{kind}_refused", {}).get("artifact")
    for name in ("losses", "gains", "over_refusals", "released", "beta", "mean_kl", "top1"):
        column[name] = figures.get(name)
    return column


def _disagreements(
    reference: Reference, reports: Sequence[tuple[str, Report]]
) -> list[dict[str, Any]]:
    """Prompts that two artifacts judge differently, with every artifact's label."""
    # an artifact whose ladder ended before the refusals has no labels to compare
    reached = [(label, report) for label, report in reports if "losses" in report.figures]
    flipped = [{flip.id: flip.artifact for flip in report.flips} for _, report in reached]
    found = []
    for prompt in reference.prompts:
        labels = [flips.get(prompt.id, prompt.ref_label) for flips in flipped]
        if len(set(labels)) > 1:
            found.append(
                {
                    "id": prompt.id,
                    "kind": prompt.kind,
                    "reference": prompt.ref_label,
                    "artifacts": {
                        name: label for (name, _), label in zip(reached, labels, strict=True)
                    },
                }
            )
    return found


def show_comparison(found: dict[str, Any], console: Console) -> None:
    """Prints what `compare` returned, one column per engine and artifact."""
    columns = found["columns"]
    table = Table(
        Column("", no_wrap=True),
        title=f"{found['prompts']} prompts, the same token ids for every engine",
    )
    for column in columns:
        table.add_column(escape(f"{column['engine'] or 'not loaded'}\n{column['label']}"))
    for head, cells in (
        ("weights", [column["precision"] for column in columns]),
        ("harmful refused", [_share(column["harmful_refused"]) for column in columns]),
        ("benign refused", [_share(column["benign_refused"]) for column in columns]),
        ("refusals lost/gained", [_pair(column, "losses", "gains") for column in columns]),
        ("answers lost/gained", [_pair(column, "over_refusals", "released") for column in columns]),
        ("mean KL", [_number(column.get("mean_kl"), ".1e") for column in columns]),
        ("top-1", [_share(column.get("top1"), 2) for column in columns]),
        ("first broken rung", [_rung(column) for column in columns]),
        ("verdict", [column["verdict"] or "" for column in columns]),
    ):
        table.add_row(head, *cells)
    console.print(table)
    differing = found["disagreements"]
    names = ", ".join(prompt["id"] for prompt in differing[:SHOWN_DISAGREEMENTS])
    more = ", ..." if len(differing) > SHOWN_DISAGREEMENTS else ""
    console.print(
        f"verdicts of the artifacts differ among themselves on {len(differing)} prompts"
        + (f": {names}{more}" if differing else ""),
        markup=False,
    )


def _share(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}%}"


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _pair(column: dict[str, Any], one: str, other: str) -> str:
    if column.get(one) is None:
        return ""
    return f"{column[one]}/{column[other]}"


def _rung(column: dict[str, Any]) -> str:
    if column["verdict"] is None:
        return "the reference"
    return "[green]none[/]" if column["broken_at"] is None else f"[red]{column['broken_at']}[/]"
