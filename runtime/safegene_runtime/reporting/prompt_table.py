"""The table of all prompts, with the controls that filter, search and sort it.

The controls are hidden in the file and shown by the script: without it they could do nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safegene_runtime.reporting.markup import Markup, el
from safegene_runtime.reporting.tables import change_badge, replies, table
from safegene_runtime.reporting.view import CHANGES, change, compact

__all__ = ["prompts_panel"]

SHOWN = ("Prompt", "Category", "Attack", "Reference", "Artifact", "Base", "Change", "Mean KL", "Margin shift",
         "Reply")  # fmt: skip


def prompts_panel(report: Mapping[str, Any]) -> Markup | None:
    """Every prompt, as recorded; None when the check ended before the prompts."""
    prompts = report["prompts"]
    if not prompts:
        return None
    used = {change(prompt) for prompt in prompts}
    options = [("all", "every outcome"), ("changed", "any change")]
    options += [(key, words) for key, words in CHANGES.items() if key in used]
    attacks = sorted({prompt["attack"] for prompt in prompts if prompt["attack"]})
    heads = [head for head in SHOWN if attacks or head != "Attack"]
    return el(
        "div",
        el(
            "form",
            el(
                "div",
                el("label", "Search", for_="search"),
                el("input", id="search", type="search", autocomplete="off", spellcheck="false",
                   placeholder="id, category or label"),
            ),
            _select("outcome", "Outcome", options),
            _select("kind", "Kind", [("all", "both kinds"), ("harmful", "harmful"), ("benign", "benign")]),
            _select("attack", "Attack", [("all", "with and without"), ("", "without"),
                                         *((f"={name}", name) for name in attacks)]) if attacks else None,
            id="controls",
            hidden=True,
            role="search",
            aria_label="Filter the prompts",
        ),
        el("p", f"{len(prompts)} of {len(prompts)} prompts", id="shown", class_="note", role="status"),
        table("All prompts", heads, [_row(prompt, bool(attacks)) for prompt in prompts],
              id="prompt-table", tall=True),
    )  # fmt: skip


def _select(name: str, label: str, options: list[tuple[str, str]]) -> Markup:
    return el(
        "div",
        el("label", label, for_=name),
        el("select", [el("option", words, value=value) for value, words in options], id=name),
    )


def _row(prompt: Mapping[str, Any], attacks: bool) -> Markup:
    margin = prompt["margin"]
    shift = None if margin is None else margin["artifact"] - margin["reference"]
    kl = prompt["mean_kl"]
    same = (
        "proved identical"
        if prompt["proved"]
        else "identical"
        if prompt["identical"]
        else "differs"
    )
    return el(
        "tr",
        el("th", el("code", prompt["id"]), el("small", prompt["kind"]),
           el("small", "borderline") if prompt["borderline"] else None, scope="row"),
        el("td", prompt["category"], dir="auto"),
        el("td", prompt["attack"] or "–", dir="auto") if attacks else None,
        [el("td", el("span", prompt[arm], class_=f"label {prompt[arm]}"))
         for arm in ("reference", "artifact", "base")],
        el("td", change_badge(prompt)),
        el("td", compact(kl), class_="number", data_value=kl),
        el("td", "–" if shift is None else f"{shift:+.2f}", class_="number", data_value=shift),
        el("td", same, replies(prompt)),
        data_kind=prompt["kind"],
        data_change=change(prompt),
        data_attack="" if prompt["attack"] is None else f"={prompt['attack']}",
    )  # fmt: skip
