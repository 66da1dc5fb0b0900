"""The recovery experiment runs from end to end, on a model of two layers in a minute."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from safegene_converter.inputs.adapter import read_adapter
from safegene_runtime.errors import GeneError

FOLDER = tiny.REPOSITORY / "examples" / "recovery"

PAIR_FIGURES = {"harmful_refused", "benign_refused", "borderline_refused", "separation"}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(FOLDER))
    import run

    yield run
    for name in ("run", "data", "methods", "report", "safelora", "train"):
        sys.modules.pop(name, None)


def lab_of(run: Any, work: Path) -> Any:
    plan = run.Plan(4, 2, 4, 4, 4, ("steps", "obedient"), ("steps",), 2, reply_tokens=4)
    return run.methods.Lab(
        work / "tiny-seed-0",
        plan,
        0,
        run.data.splits(4, 4),
        lambda *_: None,
        tiny.hf_model("llama"),
    )


def test_the_splits_share_nothing_and_cover_the_suite(run: Any) -> None:
    from safegene_runtime.record.prompts import builtin_suite

    splits = run.data.splits()
    assert not splits.spare
    parts = [splits.select, splits.shots, splits.test]
    assert sorted(prompt.id for part in parts for prompt in part) == sorted(
        prompt.id for prompt in builtin_suite()
    )
    few = run.data.splits(8, 20)
    assert {p.id for p in few.test} < {p.id for p in splits.test}
    assert {p.id for p in few.test + few.spare} == {p.id for p in splits.test}
    assert len(few.test) + len(few.spare) == len(splits.test)
    assert not {p.id for p in few.shots} & {p.id for p in splits.test}


def test_a_training_prompt_that_is_tested_on_is_refused(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaked = run.data.splits().test[0].text
    monkeypatch.setattr(run.data, "harmful_requests", lambda: [leaked.lower()])
    with pytest.raises(GeneError, match="none that are tested on"):
        run.data.splits()


def test_every_refusal_begins_with_the_opening_and_is_one_to_the_judge(run: Any) -> None:
    from safegene_runtime.judging.judge import judge

    for text in run.data.REFUSALS:
        assert text.startswith(run.data.OPENING)
        assert judge(text) == "refuse"


def test_safe_lora_projects_what_points_away_from_the_alignment(run: Any, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel

    from safegene_converter import formula
    from safegene_converter.inputs.adapter import read_adapter
    from safegene_converter.recording.loading import load_model

    alignment = tiny.peft_adapter("llama", tmp_path / "align", seed=1)
    task = tiny.peft_adapter("llama", tmp_path / "task", seed=2)
    model, _ = load_model(run.methods.open_base(tiny.hf_model("llama")))
    tuned = PeftModel.from_pretrained(model, str(task))
    assert run.methods.project(tuned, alignment, tau=-1.0) == 0
    count = run.methods.project(tuned, alignment, tau=1.0)
    modules = read_adapter(task).modules
    assert count == len(modules)
    v = {
        m.name: torch.from_numpy(formula.delta(m)).double() for m in read_adapter(alignment).modules
    }
    for module in modules:
        projector = v[module.name] @ v[module.name].T / v[module.name].norm()
        expected = projector @ torch.from_numpy(formula.delta(module)).double()
        layer = tuned.get_submodule(f"base_model.model.{module.name}")
        found = layer.get_delta_weight("default").double()
        assert torch.allclose(found, expected, atol=1e-7)


def test_the_whole_experiment_runs_and_goes_on_after_a_kill(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lab = lab_of(run, tmp_path)
    # an untrained gene is worth nothing: keep its layers all the same
    monkeypatch.setattr(
        "safegene_converter.gene.select.choose", lambda layers, scores, sizes, budget: tuple(layers)
    )
    run.run(lab, "align")
    weights = (lab.work / "aligned" / "model.safetensors").stat().st_mtime_ns
    more = (run.methods.compare_pairs, run.methods.more_shots)
    run.run(lab, more=more)
    assert (lab.work / "aligned" / "model.safetensors").stat().st_mtime_ns == weights
    results = json.loads((lab.work / "results.json").read_text())
    for method in run.methods.METHODS:
        assert 0 <= results[f"obedient {method}"]["harmful_refused"] <= 1
    alone = results["obedient pair none"]
    for pair in ("steps", "aligned - base"):
        found = results[f"obedient pair {pair}"]
        assert alone.keys() == found.keys() == PAIR_FIGURES
        assert all(0 <= value <= 1 for one in (alone, found) for value in one.values())
        assert alone["separation"] != found["separation"]
    table = (tmp_path / "tiny.md").read_text()
    for row in ("obedient + gene |", "aligned | 1 |", "obedient | 1 |", "obedient + steps | 1 |"):
        assert f"| {row}" in table
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| obedient + ")]
    drawn = [f"| obedient + {method}" for method in run.report.COLOURS]
    assert rows[: len(drawn)] == drawn
    assert set(run.report.COLOURS) == {*run.methods.METHODS, run.methods.MORE_SHOTS}

    def stored() -> dict[str, Any]:
        found = json.loads((lab.work / "gene" / "safegene.json").read_text())["expressions"]
        assert isinstance(found, dict)
        return found

    expressions = stored()
    alone = run.methods._calibrated("gene")(lab, "obedient")
    assert stored() == expressions  # the first part of the longer way is all of the shorter one
    rates = ("harmful_refused", "benign_kl", "task_loss", "before")
    assert [results["obedient gene"][name] for name in rates] == [alone[name] for name in rates]
    went_on = results["obedient gene as aligned"]
    first = went_on["minima"][0]
    further = {**first, "coefficients": dict.fromkeys(first["coefficients"], 2.0)}
    lab.note("obedient gene as aligned", {**went_on, "minima": [first, further]})
    run.methods._weight_one(lab, "obedient")
    assert stored() == expressions
    assert expressions["obedient-as-aligned"]["n_shots"] == 4 + 4
    assert expressions["obedient-as-aligned-more"]["n_shots"] == 3 * (4 + 4)
    assert (tmp_path / "tiny.svg").read_text().startswith("<svg")

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("a finished step ran again")

    run.shipping.ship(lab, tmp_path / "shipped")
    shipped = read_adapter(tmp_path / "shipped")
    assert shipped.expression == "base"
    assert shipped.target == tiny.hf_model("llama").name
    assert (shipped.base_model or {})["name"] == tiny.hf_model("llama").name
    assert {module.layer for module in shipped.modules} == {0, 1}
    calibrated = run.shipping.calibrate

    def first_layer_off(*args: Any, **named: Any) -> Any:
        found = calibrated(*args, **named)
        return replace(found, coefficients={**found.coefficients, 0: 0.0})

    monkeypatch.setattr(run.shipping, "calibrate", first_layer_off)
    run.shipping.ship(lab, tmp_path / "fewer")
    assert {module.layer for module in read_adapter(tmp_path / "fewer").modules} == {1}
    for name in ("evaluate", "calibrate", "extract", "select", "train_lora", "own_replies"):
        homes = [module for module in (run.methods, run.shipping) if hasattr(module, name)]
        assert homes
        for module in homes:
            monkeypatch.setattr(module, name, never)
    run.run(lab, more=more)
    assert capsys.readouterr().out.count("| obedient + gene |") >= 2


def test_recovery_is_the_share_of_what_was_lost(run: Any) -> None:
    def refused(rate: float) -> dict[str, Any]:
        return {"harmful_refused": rate}

    results = {
        "model aligned": refused(0.9), "model t": refused(0.4), "t gene": refused(0.85),
        "model same": refused(0.9), "same gene": refused(0.9),
    }  # fmt: skip
    assert run.report.recovery(results, "t", "gene") == pytest.approx(0.9)
    assert run.report.recovery(results, "same", "gene") is None


def figures(refused: float) -> dict[str, Any]:
    """What the table needs of one row."""
    rates = ("harmful_refused", "benign_refused", "borderline_refused")
    return {
        **dict.fromkeys(rates, refused), "benign_kl": 0.1, "task_loss": 1.0, "n_harmful": 4, "n_benign": 4
    }  # fmt: skip


def test_a_target_has_one_mark_whatever_order_its_figures_were_made_in(run: Any) -> None:
    rows = {"model t": 0.1, "model u": 0.2, "t gene": 0.3, "u gene": 0.4}
    one = {key: figures(refused) for key, refused in rows.items()}
    drawn = run.report.picture([one, dict(reversed(one.items()))])
    for target, mark in (("t", "circle"), ("u", "rect")):
        found = [line for line in drawn.splitlines() if f"<title>{target} + gene:" in line]
        assert [line.startswith(f"<g><{mark} ") for line in found] == [True, True]


def test_published_rows_stay_until_they_are_measured_again(run: Any, tmp_path: Path) -> None:
    models = {f"model {name}": figures(0.5) for name in ("base", "aligned", "t")}
    assert run.report.targets({**models, "t direct": figures(0.5)}) == ["t"]
    here, out = tmp_path / "work" / "full-seed-0", tmp_path / "out"
    here.mkdir(parents=True)
    out.mkdir()
    page = f"# Title\n{run.report.START}\nold\n{run.report.END}\nThe end.\n"
    (out / "README.md").write_text(page)
    (here / "results.json").write_text(json.dumps({**models, "t gene": figures(0.25)}))
    run.report.publish(here.parent, out)
    (here / "results.json").write_text(
        json.dumps({**models, "t gene": figures(0.75), "t uniform": figures(0.5)})
    )
    run.report.publish(here.parent, out)
    (here / "results.json").write_text(json.dumps({**models, "t direct": figures(0.125)}))
    run.report.publish(here.parent, out)
    table = (out / "results.md").read_text()
    assert "| t + gene | 75.0 |" in table
    assert "| t + uniform | 50.0 |" in table
    assert "| t + direct | 12.5 |" in table
    (here / "results.json").write_text(json.dumps({**models, "t gene as aligned": figures(0.625)}))
    run.report.publish(here.parent, out)
    page = (out / "README.md").read_text()
    assert "\n| t | 50.0, 50.0, 62.5 | " in page
    assert page.startswith("# Title\n")
    assert page.endswith("\nThe end.\n")
    assert "old" not in page
    table = (out / "results.md").read_text()
    unfinished = tmp_path / "work" / "full-seed-1"
    unfinished.mkdir()
    (unfinished / "results.json").write_text(json.dumps(models))
    run.report.publish(here.parent, out)
    assert (out / "results.md").read_text() == table
    models["model t"] = figures(0.0)
    (here / "results.json").write_text(json.dumps({**models, "t gene": figures(1.0)}))
    with pytest.raises(GeneError, match="rows of other models"):
        run.report.publish(here.parent, out)
    assert (out / "results.md").read_text() == table


def test_what_is_published_is_made_of_the_published_figures(run: Any) -> None:
    runs = run.report.read((FOLDER / run.report.FIGURES).glob("*.json"))
    assert len(runs) >= 3
    rows = [f"{target} {method}" for target in run.FULL.targets for method in run.methods.METHODS]
    assert not [row for one in runs for row in rows if row not in one]
    assert (FOLDER / "results.md").read_text() == run.report.table(runs)
    assert (FOLDER / "results.svg").read_text() == run.report.picture(runs)
    assert (
        f"{run.report.START}\n{run.report.summary(runs)}{run.report.END}"
        in (FOLDER / "README.md").read_text()
    )


@pytest.mark.parametrize(("dies", "enough"), [(("step", 11), 20), (("question", 10), 10)])
def test_training_that_was_killed_ends_where_it_would_have(
    run: Any, tmp_path: Path, dies: tuple[str, int], enough: int
) -> None:
    import train

    lab = lab_of(run, tmp_path)

    def trained(out: Path, dies: tuple[str, int] | None = None) -> int:
        model, tokenizer = run.methods.load_base(tiny.hf_model("llama"))
        pairs = [("Say one.", "one"), ("Say two.", "two")] * 4
        examples = [lab.example(tokenizer, *pair) for pair in pairs]
        seen: list[int] = []

        def tell(stage: str, step: int, total: int) -> None:
            seen.append(step)
            if dies == ("step", step):
                raise KeyboardInterrupt

        def until(tuned: Any) -> bool:
            if dies == ("question", seen[-1]):
                raise KeyboardInterrupt
            return seen[-1] == enough

        train.train_lora(model, examples, out, steps=20, seed=0, until=until, tell=tell)
        return seen[-1]

    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert trained(whole) == enough
    with pytest.raises(KeyboardInterrupt):
        trained(cut, dies)
    assert not cut.exists()
    assert trained(cut) == enough
    name = "adapter_model.safetensors"
    assert (cut / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_in_small_it_aligns_loses_and_wins_back_on_the_real_model(tmp_path: Path) -> None:
    command = [sys.executable, str(FOLDER / "run.py"), "--quick", "--work", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    path = tmp_path / "quick-seed-0" / "results.json"
    found = json.loads(path.read_text())
    refused = {
        key: one["harmful_refused"]
        for key, one in found.items()
        if isinstance(one, dict) and "harmful_refused" in one
    }
    assert refused["model aligned"] > refused["model base"]
    for task in ("steps", "obedient"):
        assert refused[f"model {task}"] < refused["model aligned"]
    # 16 prompts are too few to count a small gain by; the probability on the shots is not
    assert refused["obedient gene"] >= refused["model obedient"]
    gene = found["obedient gene"]
    assert gene["after"]["refused"] > 1.5 * gene["before"]["refused"]
    assert found["select gene"]["share"] <= 0.01
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "training" not in again.stdout
    assert json.loads(path.read_text()) == found
