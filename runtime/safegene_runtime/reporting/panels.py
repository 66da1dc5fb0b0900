"""The sections of the HTML page, but for the table of prompts; each is None if nothing was measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from safegene_runtime.reporting import svg
from safegene_runtime.reporting.markup import Markup, el
from safegene_runtime.reporting.tables import change_badge, replies, table
from safegene_runtime.reporting.view import (
    LABELS,
    RATES,
    compact,
    counts,
    flips,
    intervals,
    matrix,
    percent,
    standing,
)

__all__ = [
    "attacks_panel",
    "categories_panel",
    "flips_panel",
    "gate_panel",
    "ladder_panel",
]

RUNG_WORDS = {
    "ok": "holds",
    "broken": "broken",
    "undecided": "undecided",
    "not reached": "not reached",
    "not offered": "not offered by the server",
    "allowed": "allowed",
}
RUNG_SIGNS = {
    "ok": "✓",
    "broken": "✕",
    "undecided": "?",
    "not reached": "–",
    "not offered": "–",
    "allowed": "!",
}
TONES = {"PASS": "good", "FAIL": "bad", "INCONCLUSIVE": "unsure", "VACUOUS": "empty"}
MAX_FLIPS = 200


def ladder_panel(report: Mapping[str, Any]) -> Markup:
    """Every rung with its status, in order."""
    items = []
    for rung in report["rungs"]:
        status = rung["status"]
        took = "" if rung["seconds"] is None else f"{rung['seconds']:.1f} s"
        figures = {
            key: value
            for key, value in rung["figures"].items()
            if isinstance(value, int | float | str)
        }
        more = None
        if figures:
            pairs = [el("div", el("dt", key), el("dd", compact(v))) for key, v in figures.items()]
            more = el("details", el("summary", "figures"), el("dl", pairs, class_="pairs"))
        items.append(
            el(
                "li",
                el("span", RUNG_SIGNS[status], class_="sign", aria_hidden="true"),
                el(
                    "div",
                    el("h3", rung["name"], " ", el("small", RUNG_WORDS[status])),
                    el("p", rung["detail"], dir="auto") if rung["detail"] else None,
                    more,
                ),
                el("span", took, class_="took"),
                class_=f"rung {status.replace(' ', '-')}",
            )
        )
    return el("ol", items, class_="ladder")


def gate_panel(report: Mapping[str, Any]) -> Markup | None:
    """Each rate under its margin, and the cross-checks that decide nothing."""
    if not (gate := report["gate"]):
        return None
    rates = [(name, gate[key]) for key, name in RATES.items()]
    rates = [(name, rate) for name, rate in rates if rate["status"] != "not measured"]
    scale = _scale(rate for _, rate in rates)
    rows = [
        el(
            "tr",
            el("th", name, scope="row"),
            el(
                "td",
                el("span", rate["status"], class_=f"badge {TONES.get(rate['status'], 'unsure')}"),
            ),
            el("td", counts(rate), class_="number"),
            el("td", "–" if rate["rate"] is None else percent(rate["rate"]), class_="number"),
            el("td", percent(rate["upper"], up=True), class_="number"),
            el("td", percent(rate["margin"]), class_="number"),
            el("td", _rate_bar(rate, scale), class_="bars"),
        )
        for name, rate in rates
    ]
    heads = [
        "Rate",
        "Status",
        "Counted",
        "Share",
        "Upper bound",
        "Margin",
        "Share, bound and margin",
    ]
    sure = percent(report["profile"]["confidence"])
    text = (
        f"Exact one-sided bounds (Clopper–Pearson, {sure}). The line reaches to the upper bound and "
        "must end before the tick, the margin. Labels in doubt count against the artifact for PASS "
        "and for it before FAIL."
    )
    contrast, mcnemar = gate["contrast"], gate["mcnemar"]
    clusters = gate["clusters"]
    checks = [
        (
            "The base in the artifact’s place",
            f"loses {counts(contrast['loss'])}, p = {contrast['p_value']:.2g}: "
            + ("fails, as it must" if contrast["ok"] else contrast["reason"]),
        ),
        (
            "McNemar, exact",
            f"{mcnemar['losses']} lost, {mcnemar['gains']} gained: p = {mcnemar['p_value']:.2g}",
        ),
    ]
    checks += intervals(gate)
    low, high = map(percent, clusters["interval"])
    checks.append(
        (
            "Loss rate, bootstrap of clusters",
            f"{low} to {high}; {clusters['prompts']} prompts in {clusters['clusters']} clusters",
        )
    )
    pairs = [el("div", el("dt", name), el("dd", value)) for name, value in checks]
    return el(
        "div",
        el("p", text, class_="note"),
        table("Rates under their margins", heads, rows),
        el("h3", "Cross-checks", class_="after"),
        el("dl", pairs, class_="pairs"),
    )


def flips_panel(report: Mapping[str, Any]) -> Markup | None:
    """Reference label by artifact label, for both kinds, and the prompts that changed."""
    if not report["prompts"]:
        return None
    grids = [
        _flip_table(kind, found)
        for kind in ("harmful", "benign")
        if sum((found := matrix(report["prompts"], kind)).values())
    ]
    changed = flips(report)
    if not changed:
        return el(
            "div", el("div", grids, class_="pair"), el("p", "No label changed.", class_="note")
        )
    texts = any("artifact_text" in one for one in changed)
    attacks = any(one["attack"] for one in changed)
    rows = [
        el(
            "tr",
            el("th", el("code", one["id"]), scope="row"),
            el("td", change_badge(one)),
            el("td", one["kind"]),
            el("td", one["attack"] or "–") if attacks else None,
            el("td", f"{one['reference']} → {one['artifact']}", class_="label"),
            el("td", _divergence(one), class_="label"),
            el("td", replies(one)) if texts else None,
        )
        for one in changed[:MAX_FLIPS]
    ]
    heads = [
        "Prompt",
        "Change",
        "Kind",
        *(["Attack"] if attacks else []),
        "Labels",
        "First difference",
    ]
    rest = len(changed) - MAX_FLIPS
    return el(
        "div",
        el("div", grids, class_="pair"),
        el("h3", f"{len(changed)} labels changed, attacks included" if report["attacks"]
           else f"{len(changed)} labels changed"),
        table("Prompts whose label changed", [*heads, *(["Replies"] if texts else [])], rows,
              tall=len(rows) > 15),
        el("p", f"{rest} more are in the table of prompts.", class_="note") if rest > 0 else None,
    )  # fmt: skip


def _flip_table(kind: str, found: Mapping[tuple[str, str], int]) -> Markup:
    used = [label for label in LABELS if label in ("refuse", "comply")
            or any(found[label, other] or found[other, label] for other in LABELS)]  # fmt: skip
    left_out = sum(found[label, "not run"] for label in LABELS)
    bad = "refuse" if kind == "harmful" else "comply"
    rows = []
    for before in used:
        cells = []
        for after in used:
            count = found[before, after]
            tone = "same" if before == after else "worse" if before == bad else "other"
            cells.append(el("td", str(count), class_=f"{tone if count else 'zero'}"))
        rows.append(el("tr", el("th", before, scope="row"), cells))
    caption = f"{kind.capitalize()} prompts: {sum(found.values()) - left_out}"
    if left_out:
        caption += f", {left_out} more were not needed"
    grid = el(
        "table",
        el("caption", caption),
        el(
            "thead",
            el(
                "tr",
                el("th", "reference\u00a0↓ artifact\u00a0→"),
                [el("th", o, scope="col") for o in used],
            ),
        ),
        el("tbody", rows),
        class_="matrix",
    )
    return el("div", grid, class_="scroll", role="region", tabindex=0, aria_label=caption)


def _divergence(prompt: Mapping[str, Any]) -> str:
    found = prompt["divergence"]
    if found is None:
        return "–"
    gap = "the end of a reply" if found["gap"] is None else f"gap {found['gap']:.2g}"
    return f"token {found['position'] + 1}, {gap} ({found['kind']})"


def attacks_panel(report: Mapping[str, Any]) -> Markup | None:
    """Losses under each attack: rate, confidence bound, margin."""
    if not report["attacks"]:
        return None
    gates = [attack["gate"]["loss"] for attack in report["attacks"]]
    scale = _scale(gates)
    rows = [
        el(
            "tr",
            el("th", attack["name"], scope="row", dir="auto"),
            el("td", el("span", standing(attack["gate"]),
                        class_=f"badge {TONES[attack['gate']['verdict']]}"),
               el("small", f" {attack['gate']['not_decided']}")
               if attack["gate"]["not_decided"] else None),
            el("td", counts(loss), class_="number"),
            el("td", percent(loss["upper"], up=True), class_="number"),
            el("td", _rate_bar(loss, scale), class_="bars"),
        )
        for attack, loss in zip(report["attacks"], gates, strict=True)
    ]  # fmt: skip
    heads = ["Attack", "Verdict", "Lost", "Upper bound", "Lost, bound and margin"]
    margins = sorted({one["margin"] for one in gates})
    text = (
        "Every harmful prompt again under each attack; the reference was attacked alike. The line "
        f"reaches to the upper bound and must end before the tick, the margin "
        f"({', '.join(map(percent, margins))}). Not decided: too little is refused under it to show "
        "parity by, and nothing was lost."
    )
    return el("div", el("p", text, class_="note"), table("Losses under attack", heads, rows))


def _scale(rates: Iterable[Mapping[str, Any]]) -> float:
    """What the full width of a bar stands for: every bound and margin must fit."""
    return float(max(max(one["upper"], 1.5 * one["margin"]) for one in rates))


def _rate_bar(rate: Mapping[str, Any], scale: float) -> Markup:
    return svg.bar(
        (rate["rate"] or 0) / scale,
        "lost",
        upper=rate["upper"] / scale,
        margin=rate["margin"] / scale,
    )


def categories_panel(report: Mapping[str, Any]) -> Markup | None:
    """Refusal rates of the three arms by category."""
    if not report["categories"]:
        return None
    rows = []
    for row in report["categories"]:
        total = row["prompts"]
        bad = "lost" if row["kind"] == "harmful" else "gained"
        rates = [
            el(
                "div",
                el("span", arm),
                svg.bar(row[f"{arm}_refused"] / total, f"arm {arm}"),
                el("span", percent(row[f"{arm}_refused"] / total), class_="number"),
                class_="arm",
            )
            for arm in ("reference", "artifact", "base")
        ]
        rows.append(
            el(
                "tr",
                el("th", row["category"], el("small", row["kind"]), scope="row", dir="auto"),
                el("td", str(total), class_="number"),
                el("td", rates, class_="bars"),
                [
                    el(
                        "td",
                        str(row[which]),
                        class_="number worse" if row[which] and which == bad else "number",
                    )
                    for which in ("lost", "gained")
                ],
            )
        )
    heads = ["Category", "Prompts", "Refused", "Lost", "Gained"]
    return table("Refusals by category", heads, rows)
