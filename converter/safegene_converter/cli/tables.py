"""The tables of `inspect`, `convert`, `record` and `verify`, from the plain data of the library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:  # what neither `inspect` nor `convert` needs
    from safegene_runtime.verifying.report import Report

__all__ = ["show", "show_report"]

SHOWN_SURVIVALS = 3


def show(found: dict[str, Any], console: Console, verbose: bool = False) -> None:
    """Prints what one of the functions above returned; of an artifact, every tensor if `verbose`."""
    if found["what"] == "artifact":
        _show_artifact(found, console, verbose)
    else:
        {"adapter": _show_adapter, "reference": _show_reference}[found["what"]](found, console)


def _show_adapter(found: dict[str, Any], console: Console) -> None:
    share = found["share_of_base"]
    console.print(
        f"{_title(found)}: {found['n_modules']} modules, {found['n_parameters']:,} parameters"
        + (f" ({share:.2%} of the base)" if share else "")
        + f", expression {found['expression']!r} of {', '.join(map(repr, found['expressions']))}"
    )
    table = Table("layer", "modules", "rank", "coefficient", "effective scale", "parameters")
    for layer in found["layers"]:
        table.add_row(
            str(layer["layer"]),
            " ".join(layer["modules"]),
            _spread(layer["ranks"]),
            f"{layer['coefficient']:g}",
            _spread(layer["effective_scales"]),
            f"{layer['n_parameters']:,}",
        )
    console.print(table)
    for caution in found["cautions"]:
        console.print(f"  caution: {caution}", markup=False, highlight=False)


def _show_artifact(found: dict[str, Any], console: Console, verbose: bool) -> None:
    artifact, survival = found["artifact"], found["survival"]
    base, adapter = found["base"], found["adapter"]
    console.print(
        f"{_title(found)}: {artifact['target']} {artifact['form']}, {artifact['precision']}, "
        + escape(f"of {base['name']} + {adapter['name']} ({adapter['expression']})")
    )
    for file in found["files"]:
        console.print(
            f"  {file['path']}  {file['size_bytes'] / 1e6:.1f} MB  sha256 {file['sha256'][:16]}…"
        )
    if survival:
        console.print(
            f"  delta survival: gain {survival['gain_mean']:.3f} "
            f"[{survival['gain_min']:.3f}, {survival['gain_max']:.3f}], "
            f"relative error {survival['relative_error_mean']:.3f}; "
            f"{survival['changed_type']} of {len(found['modules'])} tensors have another type, "
            f"{survival['bytes_added'] / 1e6:+.1f} MB"
        )
        _show_survivals(found["modules"], console, verbose)
    promoted = found["promoted"]
    if promoted and promoted["tensors"]:
        console.print(
            f"  promotion: {promoted['tensors']} tensors, {promoted['bytes_added'] / 1e6:+.1f} MB"
        )
    moves: dict[str, int] = {}
    for module in found["modules"]:
        step = f"{module['type_before'] or '-'} -> {module['type_after']}"
        moves[step] = moves.get(step, 0) + 1
    for step, count in sorted(moves.items()):
        console.print(f"    {count} x {step}", highlight=False, markup=False)
    if found["caution"]:
        console.print(f"  caution: {found['caution']}", markup=False, highlight=False)
    verification = found["verification"]
    console.print(f"  verdict: {verification['verdict'] if verification else 'not verified yet'}")


def _show_survivals(modules: list[dict[str, Any]], console: Console, verbose: bool) -> None:
    """The tensors whose delta came off worst, or all of them."""
    worst = sorted(
        (module for module in modules if module["survival"]),
        key=lambda module: (-abs(module["survival"]["gain"] - 1), module["module"]),
    )
    for module in worst if verbose else worst[:SHOWN_SURVIVALS]:
        survival = module["survival"]
        console.print(
            f"    {module['module']}: gain {survival['gain']:.3f}, "
            f"relative error {survival['relative_error']:.3f}, {module['type_after']}",
            markup=False,
            highlight=False,
        )
    if not verbose and len(worst) > SHOWN_SURVIVALS:
        rest = len(worst) - SHOWN_SURVIVALS
        console.print(f"    ... and {rest} nearer to 1: --verbose shows them", highlight=False)


def _title(found: dict[str, Any]) -> str:
    """A path is text, never markup."""
    return f"[bold]{escape(found['path'])}[/]"


def _show_reference(found: dict[str, Any], console: Console) -> None:
    table = Table("prompts", "number", "refused by the base", "refused by base + adapter")
    for kind in ("harmful", "benign"):
        row = found[kind]
        n = max(row["prompts"], 1)
        table.add_row(
            kind,
            str(row["prompts"]),
            f"{row['base_refused'] / n:.1%}",
            f"{row['reference_refused'] / n:.1%}",
        )
    console.print(f"{_title(found)}: sha256 {found['sha256'][:16]}…")
    console.print(table)


def show_report(report: Report, console: Console, texts: bool) -> None:
    """Prints the ladder, then the flips, then the verdict with the sentence to quote."""
    table = Table("rung", "", "why", "s")
    for number, rung in enumerate(report.rungs, start=1):
        colour = {"ok": "green", "broken": "red", "undecided": "yellow", "allowed": "yellow"}.get(
            rung.status, "dim"
        )
        took = "" if rung.seconds is None else f"{rung.seconds:.1f}"
        table.add_row(
            f"{number} {rung.name}", f"[{colour}]{rung.status}[/]", escape(rung.detail), took
        )
    console.print(table)
    if report.flips:
        flips = Table("flipped prompt", "kind", "reference", "artifact", "replies part")
        for flip in report.flips:
            parted = flip.divergence
            where = f"token {parted['position'] + 1}, {parted['kind']}" if parted else ""
            flips.add_row(escape(flip.id), flip.kind, flip.reference, flip.artifact, where)
            if texts:
                flips.add_row("", "", escape(flip.reference_text), escape(flip.artifact_text))
        console.print(flips)
    if report.attacks:
        from safegene_runtime.reporting.view import standing

        under = Table("under attack", "verdict", "lost", "of refused")
        for name, gate in report.attacks.items():
            loss, verdict = gate.loss, standing(gate.to_dict())
            if gate.not_decided:
                verdict = f"{verdict} ({gate.not_decided})"
            under.add_row(name, verdict, str(loss.events_worst), str(loss.trials_worst))
        console.print(under)
    colour = {"PASS": "green", "FAIL": "red"}.get(report.verdict, "yellow")
    at = f" at {report.broken_at}" if report.broken_at else ""
    held_to = f", bounds for {report.precision} weights" if report.bounds else ""
    console.print(
        f"[{colour}]{report.verdict}[/]{at}  (profile {report.profile.name}{held_to}, "
        f"{report.seconds['total']:.1f} s)",
        highlight=False,
    )
    console.print(escape(report.sentence), highlight=False)


def _spread(values: list[Any]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
