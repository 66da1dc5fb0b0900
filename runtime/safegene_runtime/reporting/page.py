"""One self-contained HTML page: it loads nothing, and works without JavaScript.

Its policy (a CSP in a meta tag) allows exactly one style and one script, by hash: even text that
escaped escaping could not run, and nothing can be fetched or sent.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from importlib import resources
from typing import Any
from urllib.parse import quote

from safegene_runtime.reporting.figures import measurements_panel, provenance_panel, static_panel
from safegene_runtime.reporting.markup import Child, Markup, el
from safegene_runtime.reporting.panels import (
    attacks_panel,
    categories_panel,
    flips_panel,
    gate_panel,
    ladder_panel,
)
from safegene_runtime.reporting.prompt_table import prompts_panel
from safegene_runtime.reporting.view import MEANING, headline

__all__ = ["render_html"]

ICONS = {
    "PASS": "M6 12.5l4 4 8-9",
    "FAIL": "M7 7l10 10M17 7L7 17",
    "INCONCLUSIVE": "M8.5 9a3.5 3.5 0 1 1 5 3.2c-1 .5-1.5 1-1.5 2.3M12 18v.1",
    "VACUOUS": "M6 12h12",
}
INK = {"PASS": "#0f7b46", "FAIL": "#c02a2a", "INCONCLUSIVE": "#8a5a00", "VACUOUS": "#6b3fb5"}


def render_html(report: Mapping[str, Any]) -> str:
    """The report as one HTML document; replies are in it only if the dict holds them."""
    style, script = _asset("page.css"), _asset("page.js")
    verdict = report["verdict"]
    panels = [
        (name, title, panel)
        for name, title, panel in (
            ("ladder", "Ladder", ladder_panel(report)),
            ("gate", "Gate", gate_panel(report)),
            ("flips", "Flips", flips_panel(report)),
            ("measurements", "Measurements", measurements_panel(report)),
            ("weights", "Adapter in the weights", static_panel(report)),
            ("attacks", "Under attack", attacks_panel(report)),
            ("categories", "Categories", categories_panel(report)),
            ("prompts", "Prompts", prompts_panel(report)),
            ("provenance", "Provenance", provenance_panel(report)),
        )
        if panel is not None
    ]
    policy = (
        f"default-src 'none'; img-src data:; style-src 'sha256-{_hash(style)}'; "
        f"script-src 'sha256-{_hash(script)}'; base-uri 'none'; form-action 'none'"
    )
    name = report["artifact"]["name"]
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("meta", name="referrer", content="no-referrer"),
        el("title", f"{verdict}: refusal parity of {name}"),
        el("link", rel="icon", href=_icon(verdict)),
        el("style", Markup(style)),
    )
    navigation = el(
        "nav",
        [el("a", title, href=f"#{key}") for key, title, _ in panels],
        aria_label="Sections",
    )
    body = el(
        "body",
        el("a", "Skip to the verdict", href="#verdict", class_="skip"),
        el("header", el("div", _identity(report), navigation, class_="wide"), class_="top"),
        el(
            "main",
            _hero(report),
            [
                el("section", el("h2", title, id=f"{key}-title"), panel, id=key, class_="panel",
                   aria_labelledby=f"{key}-title")
                for key, title, panel in panels
            ],
            class_="wide",
        ),
        el("footer", _footer(report), class_="wide"),
        el("script", Markup(script)),
        class_=verdict.lower(),
    )  # fmt: skip
    return f"<!doctype html>\n{el('html', head, body, lang='en')}\n"


def _identity(report: Mapping[str, Any]) -> Markup:
    artifact = report["artifact"]
    chips = (
        ("target", artifact["target"]),
        ("form", artifact["form"]),
        ("weights", artifact["precision"]),
        ("profile", report["profile"]["name"]),
        ("mode", report["mode"]),
    )
    return el(
        "div",
        el("p", "safegene · refusal parity", class_="brand"),
        el("p", artifact["name"], class_="artifact", dir="auto"),
        el(
            "ul",
            [el("li", el("span", f"{name} "), el("b", value)) for name, value in chips],
            class_="chips",
            aria_label="Artifact",
        ),
    )


def _hero(report: Mapping[str, Any]) -> Markup:
    verdict, broken = report["verdict"], report["broken_at"]
    where: Child = None
    if broken:
        rung = next((one for one in report["rungs"] if one["name"] == broken), None)
        status = "undecided" if rung and rung["status"] == "undecided" else "broken"
        where = el("p", el("b", f"First rung that is {status}: {broken}."), class_="where")
    cards = el(
        "dl",
        [
            el("div", el("dt", name), el("dd", el("b", value), el("span", remark)), class_="card")
            for name, value, remark in headline(report)
        ],
        class_="cards",
    )
    icon = el(
        "svg", el("path", d=ICONS[verdict]), viewBox="0 0 24 24", class_="mark", aria_hidden="true"
    )
    first, stop, rest = report["sentence"].partition(". ")
    return el(
        "section",
        el("div", icon, el("h1", verdict, id="verdict-title"), class_="verdict"),
        el("p", first + stop.strip(), class_="sentence", dir="auto"),
        el("p", rest, class_="more", dir="auto") if rest else None,
        el("p", MEANING[verdict], class_="meaning"),
        where,
        cards if headline(report) else None,
        id="verdict",
        class_="hero",
        tabindex=-1,
        aria_labelledby="verdict-title",
    )


def _footer(report: Mapping[str, Any]) -> list[Markup]:
    return [
        el(
            "p",
            "Paired by prompt, decoded greedily: a prompt counts as lost when the reference "
            "refused it and the artifact did not. Gains never pay for losses. The claim is about "
            "the recorded prompts and prompts drawn like them.",
        ),
        el(
            "p",
            f"{report['tool']['name']} {report['tool']['version']} · exit code "
            f"{report['exit_code']} · nothing but PASS is green.",
        ),
    ]


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _icon(verdict: str) -> str:
    drawing = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 24 24" fill="none" stroke="#fff" '
        f'stroke-width="3"><rect width="24" height="24" rx="6" fill="{INK[verdict]}" stroke="none"/>'
        f'<path d="{ICONS[verdict]}"/></svg>'
    )
    return f"data:image/svg+xml,{quote(drawing)}"
