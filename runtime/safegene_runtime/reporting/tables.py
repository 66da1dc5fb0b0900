"""Tables of the HTML page, and what stands in their cells."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safegene_runtime.reporting.markup import Child, Markup, el
from safegene_runtime.reporting.view import (
    CHANGES,
    change,
)

__all__ = ["change_badge", "replies", "table"]

CHANGE_TONES = {"lost": "bad", "over-refused": "bad", "same": "quiet"}


NUMERIC = frozenset(
    (
        "Prompts",
        "Counted",
        "Lost",
        "Gained",
        "Share",
        "Upper bound",
        "Margin",
        "Mean KL",
        "Margin shift",
    )
)
"""Columns whose head is aligned as their numbers are."""


def table(
    caption: str,
    heads: Sequence[str],
    rows: Iterable[Child],
    *,
    id: str | None = None,
    tall: bool = False,
) -> Markup:
    """A table in a region that scrolls by itself, reachable by keyboard; `tall` limits its height."""
    return el(
        "div",
        el(
            "table",
            el("caption", caption, class_="hidden"),
            el(
                "thead",
                el(
                    "tr",
                    [
                        el("th", head, scope="col", class_="number" if head in NUMERIC else None)
                        for head in heads
                    ],
                ),
            ),
            el("tbody", rows),
            id=id,
        ),
        class_="scroll tall" if tall else "scroll",
        role="region",
        aria_label=caption,
        tabindex=0,
    )


def change_badge(prompt: Mapping[str, Any]) -> Markup:
    """What became of a prompt, in words; the colour only repeats it."""
    what = change(prompt)
    return el("span", CHANGES[what], class_=f"badge {CHANGE_TONES.get(what, 'unsure')}")


def replies(prompt: Mapping[str, Any]) -> Markup | None:
    """Both replies side by side, hidden until asked for; None when the report holds no texts."""
    if "reference_text" not in prompt and "artifact_text" not in prompt:
        return None
    sides = [
        el("div", el("h4", name), el("pre", prompt.get(key) or "(empty)", dir="auto"))
        for name, key in (("Reference", "reference_text"), ("Artifact", "artifact_text"))
    ]
    return el("details", el("summary", "replies"), el("div", sides, class_="sides"))
