"""Plots as plain SVG: no library, no style attributes (the page's policy forbids them), no numbers lost.

Colours come from classes, so one plot serves light and dark. Each plot has a title for a screen
reader; the tables of the page hold the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from safegene_runtime.reporting.markup import Child, Markup, el
from safegene_runtime.reporting.view import change, compact

__all__ = [
    "BETA_BINS",
    "bar",
    "beta_bin",
    "beta_heat_map",
    "evidence_path",
    "kl_curve",
    "margin_scatter",
]

WIDTH, HEIGHT = 480, 330
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 14, 46

BETA_BINS = (
    (0.25, "b0", "below 0.25: not there"),
    (0.85, "b1", "0.25 to 0.85"),
    (0.95, "b2", "0.85 to 0.95"),
    (1.05, "b3", "0.95 to 1.05: as it should be"),
    (1.15, "b4", "1.05 to 1.15"),
    (math.inf, "b5", "above 1.15: too strong"),
)
"""(upper end, class, what the legend says) of the heat map's colours."""


class _Axes:
    """Maps data to the plot and draws its frame; a log axis is given logarithms."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]) -> None:
        self.x, self.y = x, y

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point is drawn, clipped to the frame."""
        across = (x - self.x[0]) / (self.x[1] - self.x[0])
        up = (y - self.y[0]) / (self.y[1] - self.y[0])
        across, up = min(max(across, 0.0), 1.0), min(max(up, 0.0), 1.0)
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )

    def line(self, a: tuple[float, float], b: tuple[float, float], class_: str) -> Markup:
        (x1, y1), (x2, y2) = self.at(*a), self.at(*b)
        return el("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)

    def frame(
        self,
        x_ticks: Iterable[tuple[float, str]],
        y_ticks: Iterable[tuple[float, str]],
        x_name: str,
        y_name: str,
    ) -> list[Markup]:
        """Grid lines, tick labels and the names of both axes."""
        parts = []
        for value, label in y_ticks:
            x, y = self.at(self.x[0], value)
            parts.append(self.line((self.x[0], value), (self.x[1], value), "grid"))
            parts.append(el("text", label, x=x - 7, y=y + 4, class_="tick end"))
        for value, label in x_ticks:
            x, y = self.at(value, self.y[0])
            parts.append(self.line((value, self.y[0]), (value, self.y[1]), "grid"))
            parts.append(el("text", label, x=x, y=y + 17, class_="tick mid"))
        middle = (TOP + HEIGHT - BOTTOM) / 2
        parts.append(
            el("text", x_name, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 8, class_="name mid")
        )
        turned = f"rotate(-90 13 {middle})"
        parts.append(el("text", y_name, x=13, y=middle, transform=turned, class_="name mid"))
        return parts


def _plot(title: str, parts: Child, width: int = WIDTH, height: int = HEIGHT) -> Markup:
    return el(
        "svg", el("title", title), parts, viewBox=f"0 0 {width} {height}", role="img", class_="plot"
    )


def _ticks(low: float, high: float, about: int = 5) -> list[tuple[float, str]]:
    """Round numbers within a range (Heckbert, Graphics Gems, 1990: 1, 2 or 5 times ten to n)."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * k for k in (1, 2, 5, 10) if power * k >= rough * 0.999)
    found = []
    value = math.ceil(low / step) * step
    while value <= high + step * 1e-9:
        found.append((value, f"{value:g}" if abs(value) > step * 1e-9 else "0"))
        value += step
    return found


def margin_scatter(prompts: Sequence[Mapping[str, Any]]) -> Markup | None:
    """Refusal margin of the artifact over the reference's, one dot a prompt, its base in grey."""
    chosen = [prompt for prompt in prompts if prompt["margin"] is not None]
    if not chosen:
        return None
    values = [value for one in chosen for value in one["margin"].values()]
    pad = 0.06 * (max(values) - min(values)) or 1.0
    span = (min(values) - pad, max(values) + pad)
    axes = _Axes(span, span)
    ticks = _ticks(*span)
    parts = axes.frame(ticks, ticks, "reference: refusal margin, nats", "margin, nats")
    parts.append(axes.line((span[0], span[0]), (span[1], span[1]), "same"))
    if span[0] < 0 < span[1]:
        parts.append(axes.line((0, span[0]), (0, span[1]), "axis"))
        parts.append(axes.line((span[0], 0), (span[1], 0), "axis"))
    for one in chosen:
        x, y = axes.at(one["margin"]["reference"], one["margin"]["base"])
        parts.append(el("circle", cx=x, cy=y, r=2.4, class_="dot base"))
    # flips last, so that they are on top
    for one in sorted(chosen, key=lambda one: change(one) != "same"):
        what = change(one)
        margin = one["margin"]
        x, y = axes.at(margin["reference"], margin["artifact"])
        tip = (
            f"{one['id']}: reference {margin['reference']:.2f}, artifact {margin['artifact']:.2f}, "
            f"base {margin['base']:.2f}"
        )
        class_ = f"dot {one['kind']}" if what == "same" else "dot flip"
        parts.append(
            el(
                "circle",
                el("title", tip),
                cx=x,
                cy=y,
                r=3 if what == "same" else 4.5,
                class_=class_,
            )
        )
    title = (
        f"Refusal margins of {len(chosen)} prompts, artifact and base over the reference: "
        "on the diagonal the artifact equals the reference"
    )
    return _plot(title, parts)


def kl_curve(values: Sequence[float], limit: float) -> Markup | None:
    """Mean KL by position of the reply on a log scale; `limit` is the bound of the mean, dashed."""
    positive = [value for value in values if value > 0]
    if not positive:
        return None
    floor = min(positive)
    shown = [max(value, floor) for value in values]
    highest = max(*shown, limit)
    low, high = math.floor(math.log10(floor)), math.ceil(math.log10(highest) + 1e-9)
    axes = _Axes((1, max(len(values), 2)), (low, max(high, low + 1)))
    step = max(1, (high - low) // 6)
    y_ticks = [(power, f"1e{power}") for power in range(low, high + 1, step)]
    x_ticks = [(v, t) for v, t in _ticks(1, max(len(values), 2)) if v == int(v)]
    parts = axes.frame(x_ticks, y_ticks, "position in the reply", "mean KL, nats (log)")
    parts.append(axes.line((1, math.log10(limit)), (len(values), math.log10(limit)), "limit"))
    x, y = axes.at(len(values), math.log10(limit))
    parts.append(el("text", f"bound of the mean {limit:g}", x=x, y=y + 15, class_="tick end"))
    parts.append(_polyline(axes, [(i, math.log10(v)) for i, v in enumerate(shown, 1)], "curve"))
    peak = max(range(len(values)), key=values.__getitem__)
    title = (
        f"Mean KL by position of {len(values)}: at most {values[peak]:.2g} at position {peak + 1}"
    )
    return _plot(title, parts)


def evidence_path(path: Sequence[float], threshold: float | None) -> Markup | None:
    """The e-process of a sequential gate over the prompts seen, on a log scale."""
    finite = [value for value in path if 0 < value < math.inf]
    if len(finite) < 2:
        return None
    edges = [*finite, *([threshold] if threshold else []), 1.0]
    low = math.floor(math.log10(min(edges)))
    high = max(math.ceil(math.log10(max(edges)) + 1e-9), low + 1)
    axes = _Axes((1, len(finite)), (low, high))
    step = max(1, (high - low) // 6)
    y_ticks = [(power, f"{10.0**power:g}") for power in range(low, high + 1, step)]
    parts = axes.frame(_ticks(1, len(finite)), y_ticks, "prompts seen", "evidence, e-value (log)")
    if threshold:
        parts.append(
            axes.line((1, math.log10(threshold)), (len(path), math.log10(threshold)), "limit")
        )
        x, y = axes.at(1, math.log10(threshold))
        parts.append(el("text", f"enough at {threshold:g}", x=x + 6, y=y - 6, class_="tick"))
    parts.append(_polyline(axes, [(i, math.log10(v)) for i, v in enumerate(finite, 1)], "curve"))
    return _plot(f"Evidence after each of {len(finite)} prompts, last {finite[-1]:.3g}", parts)


def _polyline(axes: _Axes, points: Iterable[tuple[float, float]], class_: str) -> Markup:
    text = " ".join("{},{}".format(*axes.at(x, y)) for x, y in points)
    return el("polyline", points=text, class_=class_)


def beta_bin(beta: float) -> str:
    """The class of a heat map cell; NaN is in the worst one."""
    return next((name for upper, name, _ in BETA_BINS if beta < upper), BETA_BINS[0][1])


def beta_heat_map(modules: Sequence[Mapping[str, Any]]) -> Markup | None:
    """How much of the adapter is in each tensor: layers across, modules down, expected 1.

    Several tensors of one cell (experts) show the one that is furthest from 1.
    """
    cells: dict[tuple[str, int], Mapping[str, Any]] = {}
    for one in modules:
        place = (one["kind"], -1 if one["layer"] is None else one["layer"])
        known = cells.get(place)
        if known is None or not abs(one["beta"] - 1) <= abs(known["beta"] - 1):
            cells[place] = one
    if not cells:
        return None
    kinds = list(dict.fromkeys(kind for kind, _ in cells))
    layers = sorted({layer for _, layer in cells})
    side, left, top = 34, 104, 26
    parts: list[Markup] = []
    for column, layer in enumerate(layers):
        x = left + column * side + side / 2
        name = "–" if layer < 0 else str(layer)
        parts.append(el("text", name, x=x, y=top - 9, class_="tick mid"))
    for row, kind in enumerate(kinds):
        y = top + row * side
        short = kind if len(kind) <= 14 else kind[:13] + "…"
        parts.append(el("text", short, x=left - 9, y=y + side / 2 + 4, class_="tick end"))
        for column, layer in enumerate(layers):
            if (cell := cells.get((kind, layer))) is None:
                continue
            x, name = left + column * side, beta_bin(cell["beta"])
            tip = f"{cell['module']} ({cell['type']}): beta {cell['beta']:.4f}"
            parts.append(
                el(
                    "g",
                    el("title", tip),
                    el("rect", x=x + 1, y=y + 1, width=side - 2, height=side - 2, rx=4),
                    el(
                        "text",
                        _cell(cell["beta"]),
                        x=x + side / 2,
                        y=y + side / 2 + 4,
                        class_="mid",
                    ),
                    class_=f"cell {name}",
                )
            )
    worst = max(cells.values(), key=lambda one: abs(one["beta"] - 1))
    title = (
        f"Share of the adapter in {len(modules)} tensors by layer and module; "
        f"furthest from 1: {worst['module']} with {compact(worst['beta'])}"
    )
    return _plot(title, parts, left + side * len(layers) + 6, top + side * len(kinds) + 4)


def _cell(beta: float) -> str:
    return f"{beta:.2f}".replace("0.", ".", 1) if 0 <= beta < 0.995 else f"{beta:.2f}"


def bar(
    share: float, class_: str, *, upper: float | None = None, margin: float | None = None
) -> Markup:
    """A horizontal bar for a table cell; shares of the full width, clipped to it.

    `upper` draws a thin line up to a confidence bound, `margin` a tick that it must not reach.
    """

    def at(value: float) -> float:
        return round(100 * min(max(value, 0.0), 1.0), 2)

    parts = [el("rect", x=0, y=2, width=100, height=8, class_="track")]
    if share > 0:
        parts.append(el("rect", x=0, y=2, width=max(at(share), 0.6), height=8, class_=class_))
    if upper is not None:
        parts.append(el("rect", x=0, y=5, width=at(upper), height=2, class_="upper"))
    if margin is not None:
        parts.append(el("rect", x=at(margin) - 0.3, y=0, width=0.6, height=12, class_="margin"))
    return el(
        "svg",
        parts,
        viewBox="0 0 100 12",
        preserveAspectRatio="none",
        class_="bar",
        aria_hidden="true",
    )
