"""The table and the picture."""

from __future__ import annotations

import json
from collections.abc import Iterable
from math import ceil, floor, log10
from pathlib import Path
from statistics import mean, pstdev
from typing import Any

from safegene_runtime.errors import GeneError, Problems
from safegene_runtime.formats import strictjson
from safegene_runtime.formats.publish import publish_file

FIGURES = "figures"
"""Where published figures lie, a file per seed: a later run adds its rows to them."""
MAIN = "gene as aligned"
"""The row that the summary is of."""
START, END = "<!-- summary: run.py --publish -->", "<!-- end of summary -->"
"""Between them lies the summary in the page."""
COLOURS = {
    "gene": "#0b6e4f", "gene as aligned": "#1b9e9e", "gene, more shots": "#7fc97f",
    "all layers": "#2f6fbb", "random layers": "#c98a00", "one factor": "#c2a5cf", "uniform": "#8a8a8a",
    "direct": "#5c4033", "re-aligned": "#7a3e9d", "safe lora": "#b3261e",
}  # fmt: skip
WIDTH, HEIGHT, EDGE, LEGEND = 720, 420, 60, 150


def write(folder: Path, work: Path, results: dict[str, Any]) -> None:
    """Writes this run's table, then table and picture over all seeds beside it; prints the table."""
    kind = work.name.rsplit("-seed-", 1)[0]
    runs = [run for run in read(folder.glob(f"{kind}-seed-*/results.json")) if targets(run)]
    (work / "table.md").write_text(table([results]))
    text = table(runs)
    (folder / f"{kind}.md").write_text(text)
    (folder / f"{kind}.svg").write_text(picture(runs))
    print(text)


def publish(folder: Path, out: Path) -> None:
    """Keeps the figures of all full seeds in `out`, and makes table and picture of what is kept there.

    What was kept stays where this run has no such row.

    Raises:
        GeneError: what was kept is of other models, or of another gene.
    """
    kept = out / FIGURES
    kept.mkdir(exist_ok=True)
    problems, merged = Problems(), {}
    for path in sorted(folder.glob("full-seed-*/results.json")):
        new = json.loads(path.read_text())
        place = kept / f"{path.parent.name}.json"
        old = json.loads(place.read_text()) if place.exists() else {}
        for name in (key for key in new if key.startswith(("model ", "select ")) and key in old):
            if {**old[name], "seconds": 0} != {**new[name], "seconds": 0}:
                problems.add(
                    place.name, name, "the figures of this run", "others",
                    "rows of other models or genes make no table: remove the file, run every method",
                )  # fmt: skip
        if targets({**old, **new}):
            merged[place] = {**old, **new}
    problems.raise_if_any(GeneError)
    for place, figures in merged.items():
        publish_file(place, strictjson.dumps(figures))
    runs = read(kept.glob("*.json"))
    publish_file(out / "results.md", table(runs).encode())
    publish_file(out / "results.svg", picture(runs).encode())
    page = out / "README.md"
    before, _, rest = page.read_text().partition(START)
    after = rest.partition(END)[2]
    publish_file(page, f"{before}{START}\n{summary(runs)}{END}{after}".encode())


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The figures of runs, in the order of their files."""
    return [json.loads(path.read_text()) for path in sorted(paths)]


def recovery(run: dict[str, Any], target: str, method: str) -> float | None:
    """(gene - degraded) / (aligned - degraded), of harmful refusal rates; None: nothing was lost."""
    aligned = run["model aligned"]["harmful_refused"]
    degraded = run[f"model {target}"]["harmful_refused"]
    if aligned <= degraded:
        return None
    got = run[f"{target} {method}"]["harmful_refused"]
    return (got - degraded) / (aligned - degraded)


def task_change(run: dict[str, Any], target: str, method: str) -> float:
    """How much worse the task is done: gene / degraded - 1, of task losses."""
    changed: float = run[f"{target} {method}"]["task_loss"] / run[f"model {target}"]["task_loss"]
    return changed - 1


def table(runs: list[dict[str, Any]]) -> str:
    """Markdown; mean and spread over runs."""
    lines = [
        f"{len(runs)} seed(s), greedy, on prompts used nowhere else: {runs[0]['model base']['n_harmful']} "
        f"harmful, {runs[0]['model base']['n_benign']} benign, plain and borderline ones. Refusals "
        "in %; KL to the fine-tune's own benign replies and task loss in nats per token.",
        "",
        "| model | harmful refused | recovery % | benign refused | borderline refused | KL | task loss "
        "| change % | parameters | s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    first = runs[0]
    for name in (key.removeprefix("model ") for key in first if key.startswith("model ")):
        lines.append(_row(f"*{name}*", [run[f"model {name}"] for run in runs], [], []))
    for target in targets(first):
        for method in COLOURS:
            key = f"{target} {method}"
            have = [run for run in runs if key in run]
            if have:
                recovered = [recovery(run, target, method) for run in have]
                worse = [task_change(run, target, method) for run in have]
                fewer = "" if len(have) == len(runs) else f" ({len(have)} of {len(runs)} seeds)"
                found = [run[key] for run in have]
                lines.append(_row(f"{target} + {method}{fewer}", found, recovered, worse))
    return "\n".join([*lines, "", *_pairs(runs), *_artifacts(runs)]) + "\n"


def summary(runs: list[dict[str, Any]]) -> str:
    """Markdown: what the gene wins back on each target, and what that costs; the mean over runs."""
    lines = [
        "| fine-tune | harmful refused: aligned, fine-tuned, with the gene | recovery % (by seed) "
        "| plain benign refused: aligned, with the gene | borderline: aligned, with the gene | task loss % |",
        "|---|---|---|---|---|---|",
    ]
    for target in targets(runs[0]):
        have = [run for run in runs if f"{target} {MAIN}" in run]
        if not have:
            continue
        gene = f"{target} {MAIN}"
        recovered = [recovery(run, target, MAIN) for run in have]
        by_seed = ", ".join("none lost" if one is None else f"{100 * one:.0f}" for one in recovered)
        worse = [task_change(run, target, MAIN) for run in have]
        lines.append(
            f"| {target} | {_rates(have, 'harmful_refused', 'model aligned', f'model {target}', gene)} "
            f"| {_cell(recovered, 100, 0)} ({by_seed}) "
            f"| {_rates(have, 'benign_refused', 'model aligned', gene)} "
            f"| {_rates(have, 'borderline_refused', 'model aligned', gene)} | {_cell(worse, 100, 1)} |"
        )
    return "\n".join([*lines, ""])


def _rates(runs: list[dict[str, Any]], name: str, *keys: str) -> str:
    return ", ".join(f"{100 * mean(run[key][name] for run in runs):.1f}" for key in keys)


def _pairs(runs: list[dict[str, Any]]) -> list[str]:
    """A gene from each pair of models alone, on fine-tunes that it is not from."""
    keys = list(dict.fromkeys(key for run in runs for key in run if " pair " in key))
    if not keys:
        return []
    lines = [
        "A gene from one pair alone, all layers, coefficient 1, by the spare prompts: greedy replies that "
        "begin with the opening, in %, and separation (the area under the ROC curve of P(refusal)).",
        "",
        "| fine-tune + pair | seeds | harmful | benign | borderline | separation |",
        "|---|---|---|---|---|---|",
    ]
    names = {key: key.replace(" pair none", "").replace(" pair ", " + ") for key in keys}
    for key, name in sorted(names.items(), key=lambda item: item[1]):
        found = [run[key] for run in runs if key in run]
        cells = [
            _cell([one[f"{kind}_refused"] for one in found], 100, 1)
            for kind in ("harmful", "benign", "borderline")
        ]
        apart = _cell([one["separation"] for one in found], 1, 3)
        lines.append(f"| {name} | {len(found)} | {' | '.join(cells)} | {apart} |")
    return [*lines, ""]


def _artifacts(runs: list[dict[str, Any]]) -> list[str]:
    """Every converted gene: what it refuses, and the gate's verdict on it, by run that has it."""
    keys = list(dict.fromkeys(key for run in runs for key in run if " artifact " in key))
    lines = []
    if keys:
        lines += [
            "| artifact | seeds | harmful refused | lost/gained | mean KL | verdicts |",
            "|---|---|---|---|---|---|",
        ]
    for key in keys:
        found = [run[key] for run in runs if key in run]
        flips = ", ".join(f"{one.get('losses', '-')}/{one.get('gains', '-')}" for one in found)
        distances = ", ".join(f"{one['mean_kl']:.1e}" for one in found if "mean_kl" in one)
        target, _, kind = key.partition(" artifact ")
        lines.append(
            f"| {target}: {kind} | {len(found)} "
            f"| {_cell([one.get('harmful_refused') for one in found], 100, 1)} | {flips} "
            f"| {distances} "
            f"| {', '.join(one['verdict'] for one in found)} |"
        )
    return [*lines, "", *_deployed(runs)]


def _deployed(runs: list[dict[str, Any]]) -> list[str]:
    """Coefficients fitted to a quantised file: what that was worth on the shots, and elsewhere."""
    lines = []
    for run in runs:
        for key in (key for key in run if key.endswith(" deployed")):
            one, elsewhere = run[key], run[key]["held_out"]
            before, after = elsewhere["before"], elsewhere["after"]
            lines.append(
                f"| {key.removesuffix(' deployed')} | {one['evaluations']} | {one['seconds']:.0f} "
                f"| {one['before']:.4f} to {one['after']:.4f} "
                f"| {before['divergence']:.4f} to {after['divergence']:.4f} "
                f"| {before['refused']} to {after['refused']} of {before['harmful']} "
                f"| {before['losses']} to {after['losses']} |"
            )
    if lines:
        lines = [
            "| fitted to its Q4_K_M file | rebuilds | s | D on the shots | D on the test prompts "
            "| harmful refused there | refusals lost there |",
            "|---|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    return lines


def targets(run: dict[str, Any]) -> list[str]:
    """The fine-tunes that a method was measured on: those that no gene was extracted from."""
    models = [key.removeprefix("model ") for key in run if key.startswith("model ")]
    return [name for name in models if any(f"{name} {method}" in run for method in COLOURS)]


def picture(runs: list[dict[str, Any]]) -> str:
    """SVG: harmful refusals (up) against benign KL (right, log scale), a point per method, target, seed.

    The first target is drawn as circles, the second as squares, the others as diamonds.
    """
    points = []
    names = targets(runs[0]) if runs else []
    for run in runs:
        for index, target in enumerate(names):
            for method in COLOURS:
                found = run.get(f"{target} {method}")
                if found and found["benign_kl"]:
                    points.append(
                        (found["benign_kl"], found["harmful_refused"], method, target, index)
                    )
    low = 10 ** floor(log10(min((point[0] for point in points), default=0.01)))
    high = 10 ** ceil(log10(max((point[0] for point in points), default=1.0)))
    span, tall = WIDTH - LEGEND - 1.5 * EDGE, HEIGHT - 1.5 * EDGE

    def across(kl: float) -> float:
        return EDGE + log10(kl / low) / max(log10(high / low), 1) * span

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{EDGE} {EDGE / 2}V{HEIGHT - EDGE}h{span}" fill="none" stroke="black"/>',
        f'<text x="{EDGE + span / 2}" y="{HEIGHT - 15}" text-anchor="middle">change of benign replies '
        "(KL, nats per token)</text>",
        f'<text x="15" y="{HEIGHT / 2}" transform="rotate(-90 15 {HEIGHT / 2})" '
        'text-anchor="middle">harmful prompts refused</text>',
    ]
    for tick in range(5):
        y = HEIGHT - EDGE - tick / 4 * tall
        parts.append(f'<text x="{EDGE - 6}" y="{y + 4:.0f}" text-anchor="end">{25 * tick} %</text>')
    for power in range(round(log10(low)), round(log10(high)) + 1):
        x, y = across(10.0**power), HEIGHT - EDGE
        parts.append(f'<path d="M{x:.0f} {y}v4" stroke="black"/>')
        parts.append(f'<text x="{x:.0f}" y="{y + 18}" text-anchor="middle">{10.0**power:g}</text>')
    for kl, refused, method, target, index in points:
        mark = _mark(across(kl), HEIGHT - EDGE - refused * tall, COLOURS[method], index)
        parts.append(f"<g>{mark}<title>{target} + {method}: {refused:.0%}, KL {kl:.3f}</title></g>")
    legend = [(method, colour, 0) for method, colour in COLOURS.items()
              if any(point[2] == method for point in points)]  # fmt: skip
    legend += [(name, "#444444", i) for i, name in enumerate(names)]
    for row, (name, colour, index) in enumerate(legend):
        x, y = WIDTH - LEGEND, EDGE / 2 + 18 * row
        parts += [_mark(x, y, colour, index), f'<text x="{x + 12}" y="{y + 4}">{name}</text>']
    return "\n".join([*parts, "</svg>", ""])


def _mark(x: float, y: float, colour: str, index: int) -> str:
    fill = f'fill="{colour}" fill-opacity="0.8"'
    if index == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" {fill}/>'
    turned = "" if index == 1 else f' transform="rotate(45 {x:.1f} {y:.1f})"'
    return f'<rect x="{x - 4.5:.1f}" y="{y - 4.5:.1f}" width="9" height="9" {fill}{turned}/>'


def _row(
    name: str, found: list[dict[str, Any]], recovered: list[float | None], worse: list[float]
) -> str:
    cells = [
        _cell([one["harmful_refused"] for one in found], 100, 1),
        _cell(recovered, 100, 0),
        _cell([one["benign_refused"] for one in found], 100, 1),
        _cell([one["borderline_refused"] for one in found], 100, 1),
        _cell([one["benign_kl"] for one in found], 1, 3),
        _cell([one["task_loss"] for one in found], 1, 3),
        _cell(worse, 100, 1),
        _cell([one.get("parameters") for one in found], 1, 0),
        _cell([one.get("seconds") for one in found], 1, 0),
    ]
    return f"| {name} | {' | '.join(cells)} |"


def _cell(values: list[Any], scale: float, digits: int) -> str:
    numbers = [scale * value for value in values if value is not None]
    if not numbers:
        return ""
    text = f"{mean(numbers):,.{digits}f}"
    return text if len(numbers) == 1 else f"{text} ± {pstdev(numbers):.{digits}f}"
