"""Several artifacts beside one record: what is shown, and what may not be compared."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from safegene_converter.cli.comparison import compare, show_comparison
from safegene_runtime.artifact.recomputed import RUNGS
from safegene_runtime.errors import RecordError
from safegene_runtime.gating.bounds import bounds_for
from safegene_runtime.gating.profiles import PROFILES
from safegene_runtime.gating.verdict import Verdict
from safegene_runtime.record.reference import PromptRecord, Reference
from safegene_runtime.verifying.report import PromptOutcome, Report, Rung

VERDICTS = {"h1": "refuse", "h2": "refuse", "h3": "comply", "b1": "comply"}


def reference() -> Reference:
    prompts = tuple(
        PromptRecord(
            id=name, kind="harmful" if name[0] == "h" else "benign", category="none",
            borderline=False, cluster=name, attack=None, text="", rendered="", prompt_ids=(1,),
            ref_ids=(2,), ref_text="",
            ref_label=verdict, base_ids=(3,), base_text="", base_label="comply",
        )
        for name, verdict in VERDICTS.items()
    )  # fmt: skip
    meta = {"versions": {"torch": "2"}}
    return Reference(Path("ref"), "d" * 64, meta, prompts, {}, None)  # type: ignore[arg-type]


FIGURES = {"active": {"beta": 1.0}, "logits": {"mean_kl": 1e-9, "top1": 1.0}}


def outcome(name: str, label: str) -> PromptOutcome:
    return PromptOutcome(
        id=name, kind="harmful" if name[0] == "h" else "benign", category="none", attack=None,
        borderline=False, reference=VERDICTS[name], artifact=label, base="comply", identical=False,
        proved=False, divergence=None, margin=None, mean_kl=0.0, reference_text="",
        artifact_text="",
    )  # fmt: skip


def report(engine: str, changed: dict[str, str], broken_at: str | None = None) -> Report:
    end = RUNGS.index(broken_at) if broken_at else len(RUNGS)
    states = ["ok"] * end + ["broken"] * (broken_at is not None)
    states += ["not reached"] * (len(RUNGS) - len(states))
    loaded = broken_at != "integrity"
    return Report(
        verdict=Verdict.FAIL if broken_at else Verdict.PASS,
        broken_at=broken_at,
        rungs=tuple(
            Rung(name, state, f"why {name}", FIGURES.get(name, {}))
            for name, state in zip(RUNGS, states, strict=True)
        ),
        outcomes=tuple(
            outcome(name, changed.get(name, label)) for name, label in VERDICTS.items() if loaded
        ),
        gate=None,
        attacks={},
        profile=PROFILES["smoke"],
        mode="strict",
        precision="f32",
        bounds=bounds_for("f32"),
        artifact={},
        reference={"sha256": "d" * 64},
        engine={"name": engine, "version": "1", "settings": {}} if loaded else None,
        static=None,
        kl_by_position=(),
        seconds={"total": 0.0, "engine": 0.0},
    )


def test_pytorch_comes_first_then_the_artifacts_as_given() -> None:
    found = compare(
        reference(), [("a", report("llama.cpp", {})), ("b", report("ONNX Runtime", {}))]
    )
    assert [one["engine"] for one in found["columns"]] == ["PyTorch", "llama.cpp", "ONNX Runtime"]
    assert found["columns"][0]["harmful_refused"] == pytest.approx(2 / 3)
    assert found["columns"][0]["benign_refused"] == 0
    assert found["diverged"] is None
    json.dumps(found)


def test_the_lowest_rung_that_broke_anywhere_is_named() -> None:
    reports = [
        ("a", report("llama.cpp", {}, "refusals")),
        ("b", report("ONNX Runtime", {}, "active")),
        ("c", report("ONNX Runtime", {})),
    ]
    found = compare(reference(), reports)
    assert found["diverged"] == "active"
    assert [one["broken_at"] for one in found["columns"]] == [None, "refusals", "active", None]


def test_prompts_that_two_artifacts_judge_differently_are_listed() -> None:
    both = report("llama.cpp", {"h1": "comply"})
    one = report("ONNX Runtime", {"h1": "comply", "h3": "refuse"})
    found = compare(reference(), [("a", both), ("b", one)])
    assert found["disagreements"] == [
        {"id": "h3", "kind": "harmful", "reference": "comply",
         "artifacts": {"a": "comply", "b": "refuse"}}
    ]  # fmt: skip


def test_an_artifact_that_was_not_loaded_has_no_verdicts_to_differ() -> None:
    reports = [
        ("a", report("llama.cpp", {"h1": "comply"})),
        ("b", report("", {}, "integrity")),
    ]
    found = compare(reference(), reports)
    assert found["disagreements"] == []
    assert found["columns"][2]["harmful_refused"] is None
    assert shown(found).count("not loaded") == 1


def shown(found: dict[str, Any]) -> str:
    console = Console(width=120)
    with console.capture() as captured:
        show_comparison(found, console)
    return captured.get()


def test_what_is_printed_names_engines_rungs_and_reasons() -> None:
    reports = [
        ("[a] Q4", report("llama.cpp", {"h1": "comply"}, "refusals")),
        ("b", report("ONNX Runtime", {})),
    ]
    text = shown(compare(reference(), reports))
    for word in ("PyTorch", "llama.cpp", "ONNX Runtime", "the reference", "none", "FAIL", "PASS"):
        assert word in text
    assert text.count("[a] Q4") == 1
    assert "on 1 prompts: h1" in text


def test_what_cannot_be_compared_is_refused_with_every_reason() -> None:
    other = dataclasses.replace(report("llama.cpp", {}), reference={"sha256": "e" * 64})
    with pytest.raises(RecordError) as caught:
        compare(reference(), [("a", report("llama.cpp", {})), ("a", other)])
    assert {problem.field for problem in caught.value.problems} == {"a", "reference"}
    with pytest.raises(RecordError, match="at least one"):
        compare(reference(), [])
