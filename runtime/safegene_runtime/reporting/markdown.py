"""Markdown for a pull request: verdict, the sentence to quote, one table, flips by id.

GitHub's flavour. What comes from files is escaped: it cannot become a link, a mention, HTML or
another table cell.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from safegene_runtime.reporting.markup import visible
from safegene_runtime.reporting.view import (
    CHANGES,
    MEANING,
    change,
    counts,
    flips,
    format_bound,
    headline,
    intervals,
    standing,
)

__all__ = ["render_markdown"]

MARKS = {"PASS": "✅", "FAIL": "❌", "INCONCLUSIVE": "⚠️", "VACUOUS": "⚠️"}
RUNG_MARKS = {"ok": "✅", "broken": "❌", "undecided": "⚠️", "not reached": "–",
               "not offered": "–", "allowed": "⚠️"}  # fmt: skip
MAX_FLIPS = 50


def render_markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown; at most MAX_FLIPS flips, the worst first."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    verdict = report["verdict"]
    yield f"## {MARKS[verdict]} {verdict}: refusal parity of {_code(report['artifact']['name'])}"
    yield ""
    yield f"> **{_text(report['sentence'])}**"
    yield ""
    yield f"{MEANING[verdict]} Profile {_code(report['profile']['name'])}, "
    yield f"precision {_code(report['precision'])}, mode {_code(report['mode'])}, "
    yield f"reference {_code(report['reference']['sha256'][:12])}."
    yield ""
    yield "| Rung | | Finding |"
    yield "|---|---|---|"
    for rung in report["rungs"]:
        finding = _text(rung["detail"]) or rung["status"]
        yield f"| {_text(rung['name'])} | {RUNG_MARKS[rung['status']]} | {finding} |"
    for name, value, remark in headline(report):
        yield f"| **{_text(name)}** | | {_text(value)}; {_text(remark)} |"
    if report["gate"]:
        shown = "; ".join(f"{name} {value}" for name, value in intervals(report["gate"]))
        yield f"| **Two-sided 95 % intervals** | | {_text(shown)} |"
    yield from _flips(report)
    yield from _attacks(report)


def _flips(report: Mapping[str, Any]) -> Iterator[str]:
    changed = flips(report)
    if not changed:
        return
    yield ""
    yield f"<details><summary>{len(changed)} prompts changed their label</summary>"
    yield ""
    yield "| Prompt | Kind | Reference | Artifact | |"
    yield "|---|---|---|---|---|"
    for prompt in changed[:MAX_FLIPS]:
        yield (
            f"| {_code(prompt['id'])} | {prompt['kind']} | {prompt['reference']} "
            f"| {prompt['artifact']} | {CHANGES[change(prompt)]} |"
        )
    if len(changed) > MAX_FLIPS:
        yield ""
        yield f"{len(changed) - MAX_FLIPS} more are in the JSON and HTML reports."
    yield ""
    yield "</details>"


def _attacks(report: Mapping[str, Any]) -> Iterator[str]:
    if not report["attacks"]:
        return
    yield ""
    yield "| Under attack | | Refusals lost | Upper bound |"
    yield "|---|---|---|---|"
    for attack in report["attacks"]:
        gate = attack["gate"]
        why = f" ({_text(gate['not_decided'])})" if gate["not_decided"] else ""
        yield (
            f"| {_text(attack['name'])} | {MARKS[gate['verdict']]} {standing(gate)}{why} "
            f"| {counts(gate['loss'])} | {format_bound(gate['loss'])} |"
        )


def _text(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = re.sub(r"\s*\n\s*", " ", visible(text)).replace("&", "&amp;")
    text = text.replace("<", "&lt;").replace(">", "&gt;").replace("@", "&#64;")
    text = text.replace("://", "&#58;//").replace("www.", "www&#46;")
    # `&#64;` was made above; every other mark is the text's own
    return re.sub(r"([\\`*_{}\[\]|~!]|#(?!\d+;))", r"\\\1", text)


def _code(text: str) -> str:
    """A code span, in which only a run of as many backticks could end it; pipes for a table."""
    text = re.sub(r"\s*[\n\t]\s*", " ", visible(text)).replace("|", "\\|")
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text[:1] == "`" or text[-1:] == "`" else ""
    return f"{fence}{pad}{text}{pad}{fence}"
