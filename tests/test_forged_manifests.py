"""A manifest that was edited is not served: what it says twice, or what follows, has to agree."""

from __future__ import annotations

import copy
import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny
import verdicts
from onnx_tools import quick
from test_provenance import base_of, written_adapter

import safegene
from safegene import convert
from safegene_runtime.errors import ManifestError, SafeGeneError

FORMS = ("gguf merged", "gguf sidecar", "onnx adapter")
Edit = Callable[[dict[str, Any]], object]


class Still:
    """An engine that is only opened."""

    eog_ids = frozenset([2])

    def __init__(self, template: str) -> None:
        self._template = template

    def chat_template(self) -> str:
        return self._template

    def close(self) -> None:
        """Nothing to free."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A verified artifact of some forms."""
    folder = tmp_path_factory.mktemp("forged")
    adapter = written_adapter(folder / "adapter")
    for target, form in map(str.split, FORMS):
        out = folder / f"{target} {form}"
        if target == "gguf":
            convert(adapter, tiny.gguf_model("llama"), out, form=form, check=False)
        else:
            quick(adapter, tiny.onnx_model("llama"), out, form=form)
        verdicts.put(out)
    return {form: folder / form for form in FORMS}


@pytest.fixture(autouse=True)
def no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening an artifact checks all of it, and starts nothing."""
    reader = gguf.GGUFReader(tiny.gguf_model("llama"))
    template = str(reader.fields["tokenizer.chat_template"].contents())
    monkeypatch.setattr("safegene_runtime.session.open_engine", lambda *_, **__: Still(template))


def opened(form: str, folder: Path, raw: dict[str, Any]) -> None:
    (folder / "manifest.json").write_text(json.dumps(raw))
    base = base_of(form) if form == "gguf sidecar" else None
    safegene.open(folder, base=base, threads=1).close()


def read(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return found


def leaves(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value that holds no other."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        if isinstance(inner, dict | list) and inner:
            yield from leaves(inner, (*path, key))
        else:
            yield (*path, key)


def at(raw: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        raw = raw[key]
    return raw


def put(raw: Any, dotted: str, value: Any) -> None:
    *parents, last = (int(key) if key.isdigit() else key for key in dotted.split("."))
    at(raw, tuple(parents))[last] = value


def other(value: Any) -> Any:
    """Another value of the same type, as near as makes sense; null becomes text."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    if isinstance(value, float):
        return value * 1.5 or 0.25
    if value is None:
        return "x"
    if re.fullmatch("[0-9a-f]{64}", value):
        return value[::-1] if value != value[::-1] else "1" * 64
    return {"PASS": "FAIL", "ok": "broken", "strict": "as-shipped"}.get(value, f"{value}x")


# --- verdicts that were forged ---------------------------------------------------------------------

REPORT = "verification.report."
GATE = f"{REPORT}gates.0."


def to_pass(raw: dict[str, Any]) -> None:
    raw["verification"]["verdict"] = "PASS"


def gate_to_pass(raw: dict[str, Any]) -> None:
    """The verdict of the gate as well, with nothing that it follows from."""
    to_pass(raw)
    put(raw, f"{GATE}verdict", "PASS")
    put(raw, f"{REPORT}broken_at", None)
    put(raw, f"{REPORT}rungs.refusals", "ok")


def rates_to_pass(raw: dict[str, Any]) -> None:
    gate_to_pass(raw)
    put(raw, f"{GATE}loss.status", "PASS")


def bounds_to_pass(raw: dict[str, Any]) -> None:
    rates_to_pass(raw)
    put(raw, f"{GATE}loss.upper", 0.01)
    put(raw, f"{GATE}loss.lower", 0.0)


def margin_to_pass(raw: dict[str, Any]) -> None:
    rates_to_pass(raw)
    put(raw, f"{GATE}loss.margin", 0.9)


def counts_to_pass(raw: dict[str, Any]) -> None:
    rates_to_pass(raw)
    for name in ("events_best", "events_worst"):
        put(raw, f"{GATE}loss.{name}", 0)


def gates_removed(raw: dict[str, Any]) -> None:
    to_pass(raw)
    put(raw, f"{REPORT}broken_at", None)
    put(raw, f"{REPORT}rungs.refusals", "ok")
    put(raw, f"{REPORT}gates", [])


def report_of_an_older_version(raw: dict[str, Any]) -> None:
    raw["verification"] |= {"verdict": "PASS", "report": {"mode": "strict"}}


def set_to(**values: Any) -> Edit:
    def edit(raw: dict[str, Any]) -> None:
        for dotted, value in values.items():
            put(raw, dotted.replace("__", "."), value)

    return edit


def modules_too(name: str, factor: float) -> Edit:
    def edit(raw: dict[str, Any]) -> None:
        for module in raw["modules"]:
            module[name] = type(module[name])(module[name] * factor)

    return edit


def smaller_profile(raw: dict[str, Any]) -> None:
    put(raw, f"{REPORT}profile.min_refused", 1)
    put(raw, f"{GATE}contrast.ok", True)
    put(raw, f"{GATE}verdict", "PASS")
    to_pass(raw)


def precisions(raw: dict[str, Any]) -> None:
    put(raw, "artifact.precision", "low-bit")
    put(raw, f"{REPORT}precision", "low-bit")


# what was there -> what is edited, and the field that is named
FORGED: dict[str, tuple[str, Edit, str]] = {
    "FAIL to PASS": ("FAIL", to_pass, "verdict: expected FAIL, got PASS"),
    "INCONCLUSIVE to PASS": ("INCONCLUSIVE", to_pass, "verdict: expected INCONCLUSIVE, got PASS"),
    "VACUOUS to PASS": ("VACUOUS", to_pass, "verdict: expected VACUOUS, got PASS"),
    "the gate's verdict": ("FAIL", gate_to_pass, r"gates\[0\].verdict: expected FAIL, got PASS"),
    "the rate's status": ("FAIL", rates_to_pass, r"loss.status: expected FAIL, got PASS"),
    "the rate's bounds": ("FAIL", bounds_to_pass, r"loss.upper: expected 0.57\d*, got 0.01"),
    "the rate's margin": ("FAIL", margin_to_pass, r"loss.margin: expected 0.05, got 0.9"),
    "the counts alone": ("FAIL", counts_to_pass, r"loss.upper: expected 0.04\d*, got 0.57"),
    "no gate": ("FAIL", gates_removed, "report.gates: expected a gate"),
    "no counts": ("FAIL", report_of_an_older_version, "gates: expected to be present"),
    "a verdict of no form": (
        "FAIL", set_to(verification__verdict="PASS", verification__report__gates=["PASS"]),
        r"gates\[0\].*expected a JSON object",
    ),
    "the rung that broke": (
        "PASS", set_to(verification__report__broken_at="static"), "broken_at: expected None",
    ),
    "a rung that broke": (
        "PASS", set_to(verification__report__rungs__static="broken"), "verdict: expected FAIL",
    ),
    "a rung that was not reached": (
        "PASS", set_to(verification__report__rungs__text="not reached"),
        "rungs.text: expected reached",
    ),
    "beta": ("PASS", set_to(verification__report__figures__beta=0.0), "rungs.active: .*got ok"),
    "KL": ("PASS", set_to(verification__report__figures__mean_kl=9.0), "rungs.logits: .*got ok"),
    "no KL": (
        "PASS", set_to(verification__report__figures__mean_kl=None), "rungs.logits: .*got ok",
    ),
    "the precision": (
        "PASS", set_to(verification__report__precision="low-bit"), "report.precision: expected f32",
    ),
    "the sentence": (
        "PASS", set_to(verification__report__sentence="Nothing was lost."), "report.sentence",
    ),
    "the profile's margin": (
        "FAIL", set_to(verification__verdict="PASS", verification__report__profile__loss_margin=0.99),
        "loss.margin: expected 0.99, got 0.05",
    ),
    "the least that must be refused": ("VACUOUS", smaller_profile, "min_refused: expected 1"),
    "counts that cannot be": (
        "PASS", set_to(verification__report__gates__0__loss__events_best=99),
        "counts that prompts can have",
    ),
    "counts beyond all": (
        "PASS", set_to(verification__report__gates__0__loss__trials_best=1 << 40),
        "trials_best: expected 0 to",
    ),
    "a profile that cannot be": (
        "PASS", set_to(verification__report__profile__confidence=2.0), "profile: expected margins",
    ),
    "tokens that end replies": (
        "PASS", set_to(verification__report__stop_ids="none"), "stop_ids: expected a list",
    ),
    "effective scales": ("PASS", modules_too("effective_scale", 2), "effective_scale: expected 2.0"),
    "scalings": ("PASS", modules_too("scaling", 0.5), "effective_scale: expected 1.0"),
    "coefficients": ("PASS", modules_too("coefficient", -1), "effective_scale: expected -2.0"),
    "ranks": ("PASS", modules_too("rank", 2), "n_parameters: expected 2048"),
    "parameters": ("PASS", set_to(adapter__n_parameters=1), "n_parameters: expected 1024"),
    "bytes": ("PASS", modules_too("bytes_after", 2), "bytes_after: expected"),
    "the precision of the artifact": (
        "PASS", precisions, "artifact.precision: expected f32",
    ),
    "the expression": ("PASS", set_to(adapter__expression="strong"), "safegene.expression"),
    "the version": ("PASS", set_to(tool__version="9"), "safegene.version"),
    "the architecture": ("PASS", set_to(artifact__architecture="qwen2"), "general.architecture"),
}  # fmt: skip


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_manifest_is_refused_by_the_field(
    name: str, made: dict[str, Path], tmp_path: Path
) -> None:
    before, edit, said = FORGED[name]
    folder = shutil.copytree(made["gguf merged"], tmp_path / "out")
    raw = read(verdicts.put(folder, before))
    edit(raw)
    with pytest.raises(ManifestError, match=said) as caught:
        opened("gguf merged", folder, raw)
    assert all(problem.fix for problem in caught.value.problems)


def test_everything_that_was_forged_is_told_at_once(made: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(made["gguf merged"], tmp_path / "out")
    raw = read(folder)
    for module in raw["modules"]:
        module["effective_scale"] = 9.0
    raw["adapter"]["n_parameters"] = 1
    with pytest.raises(ManifestError) as caught:
        opened("gguf merged", folder, raw)
    assert len(caught.value.problems) == len(raw["modules"]) + 1


# --- every leaf ------------------------------------------------------------------------------------

LATER = "a fact of its own, in no file of the folder: for a signature"
NAMES = "a name, for people"
SHOWN = "shown, and decides nothing: for a signature"
MEANINGLESS = {
    r"artifact\.name": NAMES,
    r"artifact\.architecture": NAMES + "; of a GGUF it is compared",
    r"tool\.name": NAMES,
    r"base\.(name|kind)": NAMES,
    r"base\.files\..*": LATER + "; a sidecar's base is compared",
    r"adapter\.name": NAMES,
    r"settings\..*": LATER,
    r"modules\.\d+\.module": NAMES + "; `verify` pairs it with the reference's",
    r"modules\.\d+\.(type_before|bytes_before)": LATER,
    r"modules\.\d+\.bytes_after": SHOWN + "; of a GGUF it is compared",
    r"modules\.\d+\.sha256": "the bytes are covered by the file's own digest, which is compared",
    r"modules\.\d+\.survival(\..*)?": LATER,
    r"verification\.reference_sha256": LATER,
    r"verification\.engine\..*": LATER,
    r"verification\.report\.mode": LATER + "; the other mode is as much what was asked for",
    r"verification\.report\.stop_ids\.\d+": LATER,
    r"verification\.report\.figures\..*": SHOWN + ", within the bounds",
    r"verification\.report\.profile\.(name|budget|strict)": SHOWN + " where nothing flipped",
    r"verification\.report\.gates\.0\.degenerate\.prompts": SHOWN,
    r"verification\.report\.gates\.0\.(loss|over_refusal|degenerate)\.trials_best": (
        "of the best case, which can only FAIL, and not without an event"
    ),
    r"verification\.report\.gates\.0\.contrast\.loss\.prompts": SHOWN,
}
"""What may be edited alone, and why nothing is lost by it, or what will cover it."""


def test_any_single_edit_of_a_manifest_is_refused_or_known_to_mean_nothing(
    made: dict[str, Path], tmp_path: Path
) -> None:
    tried, accepted = 0, []
    for form in FORMS:
        folder = shutil.copytree(made[form], tmp_path / form)
        whole = read(folder)
        opened(form, folder, whole)
        for path in leaves(whole):
            tried += 1
            raw = copy.deepcopy(whole)
            at(raw, path[:-1])[path[-1]] = other(at(raw, path))
            try:
                opened(form, folder, raw)
            except SafeGeneError:
                continue
            accepted.append(".".join(map(str, path)))
    used = {one: [rule for rule in MEANINGLESS if re.fullmatch(rule, one)] for one in accepted}
    assert [one for one, rules in used.items() if not rules] == []
    assert MEANINGLESS.keys() - {rule for rules in used.values() for rule in rules} == set()
    assert tried > 500
    assert len(accepted) < tried / 3
