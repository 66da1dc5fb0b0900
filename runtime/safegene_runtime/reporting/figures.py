"""Sections of the HTML page on weights, logits and where everything came from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from safegene_runtime.reporting import svg
from safegene_runtime.reporting.markup import Markup, el
from safegene_runtime.reporting.view import (
    compact,
    percent,
)

__all__ = ["measurements_panel", "provenance_panel", "static_panel"]


def measurements_panel(report: Mapping[str, Any]) -> Markup | None:
    """Margins, KL by position, and the evidence of a sequential gate."""
    gate = report["gate"]
    figures = []
    plain = [one for one in report["prompts"] if one["attack"] is None]
    if scatter := svg.margin_scatter(plain):
        legend = (("dot harmful", "artifact, harmful"), ("dot benign", "artifact, benign"),
                  ("dot flip", "label changed"), ("dot base", "base"))  # fmt: skip
        text = "On the diagonal the artifact is as sure of refusing as the reference was."
        figures.append(_figure("First-token refusal margin", scatter, text, legend))
    kl, bounds = report["kl_by_position"], report["bounds"]
    if kl and (curve := svg.kl_curve(kl, bounds["kl_ceiling"])):
        text = (
            "Teacher-forced on the reference’s replies; a refusal is decided in the first tokens."
        )
        figures.append(_figure("KL by position", curve, text))
    sequential = (gate or {}).get("sequential") or {"path": (), "threshold": 0.0}
    evidence = [
        math.exp(min(one["log_e_pass"], 600.0))
        for one in sequential["path"]
        if one["rate"] == "loss" and one["log_e_pass"] is not None
    ]
    if path := svg.evidence_path(evidence, math.exp(sequential["threshold"])):
        text = "Anytime-valid: stopping at the line keeps the error rate, however often one looked."
        figures.append(_figure("Evidence for no loss, prompt by prompt", path, text))
    return el("div", figures, class_="figures") if figures else None


def _figure(title: str, plot: Markup, text: str, legend: Iterable[tuple[str, str]] = ()) -> Markup:
    keys = [
        el(
            "li",
            el("svg", el("circle", cx=6, cy=6, r=5, class_=class_), viewBox="0 0 12 12",
               class_="key", aria_hidden="true"),
            words,
        )
        for class_, words in legend
    ]  # fmt: skip
    return el(
        "figure",
        el("figcaption", el("h3", title), el("p", text, class_="note")),
        el("ul", keys, class_="legend") if keys else None,
        plot,
    )


def static_panel(report: Mapping[str, Any]) -> Markup | None:
    """The heat map of beta by layer and module."""
    static = report["static"]
    if not static or not (plot := svg.beta_heat_map(static["modules"])):
        return None
    legend = [
        el("li", el("svg", el("g", el("rect", width=12, height=12, rx=3), class_=f"cell {name}"),
                    viewBox="0 0 12 12", class_="key", aria_hidden="true"), words)
        for _, name, words in svg.BETA_BINS
    ]  # fmt: skip
    text = (
        f"β compares each tensor of the file with the change that the adapter makes: 1 is all of "
        f"it, 0 none. Pooled over {len(static['modules'])} tensors: {static['pooled']:.4f}."
    )
    return el(
        "div",
        el("p", text, class_="note"),
        el("ul", legend, class_="legend"),
        el("div", plot, class_="scroll heat", role="region", tabindex=0, aria_label="Heat map"),
    )


def provenance_panel(report: Mapping[str, Any]) -> Markup:
    """What was compared with what, by which software: enough to run it again."""
    artifact, reference, engine = report["artifact"], report["reference"], report["engine"]
    profile, bounds = report["profile"], report["bounds"]
    groups: list[tuple[str, list[tuple[str, str]]]] = [
        ("Artifact", [*((key, compact(artifact[key])) for key in
                        ("name", "target", "form", "architecture", "precision", "expression")),
                      *((f"sha256 of {name}", digest) for name, digest in artifact["files"].items())]),
        ("Reference", [("base", reference["base"]), ("adapter", reference["adapter"]),
                       ("expression", compact(reference["expression"])), ("sha256", reference["sha256"]),
                       *reference["versions"].items()]),
        ("Check", [("profile", profile["name"]), ("confidence", percent(profile["confidence"])),
                   ("loss margin", percent(profile["loss_margin"])),
                   ("over-refusal margin", percent(profile["over_refusal_margin"])),
                   ("refusals needed", str(profile["min_refused"])), ("mode", report["mode"]),
                   *(_bounds(report["precision"], bounds) if bounds else ()),
                   ("time", f"{report['seconds']['total']:.1f} s, "
                            f"{report['seconds']['engine']:.1f} s of it the engine")]),
        ("Engine", [("name", "none: the check ended before")] if engine is None else
         [("name", engine["name"]), ("version", engine["version"]),
          *((key, compact(value)) for key, value in engine["settings"].items())]),
    ]  # fmt: skip
    return el(
        "div",
        [
            el(
                "div",
                el("h3", title),
                el("dl", [el("div", el("dt", k), el("dd", v, dir="auto")) for k, v in pairs],
                   class_="pairs"),
            )
            for title, pairs in groups
        ],
        class_="pair",
    )  # fmt: skip


def _bounds(precision: str, bounds: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What logits were held to."""
    advised = [] if bounds["kl_gates"] else [("mean KL advised", compact(bounds["mean_kl"]))]
    return [
        ("bounds of", precision),
        ("mean KL at most", compact(bounds["kl_ceiling"])),
        *advised,
        ("top-1 at least" if bounds["kl_gates"] else "top-1 advised", percent(bounds["top1"])),
    ]
