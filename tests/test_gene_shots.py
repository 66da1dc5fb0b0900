"""Shots that calibration and selection refuse, and what evaluation says."""

# ruff: noqa: F811 - fixtures are imported, and are parameters of the tests, too
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from test_gene_fit import SHOTS, TARGET, gene, logits_of, source  # noqa: F401

from safegene_converter.gene import calibrate as calibrating
from safegene_converter.gene.calibrate import calibrate
from safegene_converter.gene.evaluate import evaluate, task_loss
from safegene_converter.gene.folder import Expression, add_expression
from safegene_converter.gene.model import Example, batches_of, load_gene
from safegene_converter.gene.objective import COMMON_FACTORS, Objective
from safegene_converter.gene.optimise import Settings, minimise, search
from safegene_converter.gene.select import select
from safegene_converter.gene.shots import check_disjoint, read_task, shots_of
from safegene_converter.inputs.adapter import read_adapter
from safegene_converter.recording.loading import load_model
from safegene_runtime.errors import AdapterError, FormatError, GeneError, OutputError
from safegene_runtime.record.prompts import Prompt


def test_too_few_shots_are_refused(gene: Path) -> None:
    with pytest.raises(GeneError, match="harmful shots: expected at least 4, got 3"):
        calibrate(gene, TARGET, SHOTS[1:], "mine")
    with pytest.raises(GeneError) as caught:
        select(gene, TARGET, SHOTS[3:5], out=gene.parent / "selected")
    assert len(caught.value.problems) == 2
    assert not (gene.parent / "selected").exists()


@pytest.mark.parametrize("change", [str.upper, lambda text: f"  {text}!"])
def test_shots_that_are_tested_on_are_refused(gene: Path, change: Any) -> None:
    tested = (Prompt("x", change(SHOTS[5].text), "benign", "test"),)
    with pytest.raises(GeneError, match="none that are tested on"):
        calibrate(gene, TARGET, SHOTS, "mine", evaluation=tested)
    with pytest.raises(GeneError, match="none that are tested on"):
        select(gene, TARGET, SHOTS, evaluation=tested, out=gene.parent / "selected")
    check_disjoint({"left": SHOTS, "right": (Prompt("x", "Something else", "benign", "test"),)})


def test_shots_of_the_built_in_suite_are_refused_by_default(gene: Path) -> None:
    from safegene_runtime.record.prompts import builtin_suite

    with pytest.raises(GeneError, match="none that are tested on"):
        calibrate(gene, TARGET, (*SHOTS, builtin_suite()[0]), "mine")


def test_losses_that_are_not_finite_are_an_error(gene: Path) -> None:
    loaded = load_gene(gene, TARGET)
    objective = Objective(loaded, shots_of(SHOTS, "test"))
    for at in ([float("nan"), 1.0], [float("inf"), 1.0]):
        with pytest.raises(GeneError, match="NaN or Inf"):
            objective.value(at)
        with pytest.raises(GeneError, match="NaN or Inf"):
            objective.gradient(at)
    with pytest.raises(GeneError, match="NaN or Inf"):
        minimise(lambda at: (float("nan"), at), np.ones(2), Settings())
    with pytest.raises(GeneError, match="NaN or Inf"):
        search(lambda at: float("nan"), np.ones(2), (0.1, 2.0), 5)


def test_a_gene_for_another_model_is_refused(gene: Path) -> None:
    with pytest.raises(AdapterError, match="a base with qwen2"):
        calibrate(gene, tiny.hf_model("qwen2"), SHOTS, "mine")
    assert read_adapter(gene).expressions == ("default",)


# --- evaluation ------------------------------------------------------------------------------------


def test_evaluation_measures_the_gene_against_the_target(gene: Path) -> None:
    task = (("Say one.", "one"), ("Say two.", "two words"))
    add_expression(gene, "weak", Expression({0: 1e-3, 1: 1e-3}))
    plain = evaluate(TARGET, prompts=SHOTS, task=task, max_new_tokens=4)
    strong = evaluate(TARGET, gene=gene, prompts=SHOTS, task=task, max_new_tokens=4)
    weak = evaluate(
        TARGET, gene=gene, expression="weak", prompts=SHOTS, task=task, max_new_tokens=4
    )
    assert plain.benign_kl is None
    assert plain.n_harmful == plain.n_benign == 4
    assert weak.benign_kl is not None
    assert strong.benign_kl is not None
    assert weak.benign_kl < 1e-3 < strong.benign_kl
    assert weak.task_loss == pytest.approx(plain.task_loss, rel=1e-3)
    assert strong.task_loss != pytest.approx(plain.task_loss, rel=1e-3)
    with pytest.raises(GeneError, match="an adapter beside it"):
        evaluate(TARGET, expression="weak", prompts=SHOTS)


def test_the_task_loss_is_the_mean_over_reply_tokens() -> None:
    from safegene_converter.inputs.base import open_base

    model, tokenizer = load_model(open_base(TARGET))
    pairs = [("Say one.", "one"), ("Say a few words, please.", "a few words")]
    total, count = 0.0, 0
    for prompt, reply in pairs:
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, tokenize=False
        )
        ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
        labels = [*tokenizer(reply, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        logits = torch.from_numpy(logits_of(model, [*ids, *labels])).double()
        scored = torch.log_softmax(logits, dim=-1)
        for offset, label in enumerate(labels):
            total -= float(scored[len(ids) - 1 + offset, label])
            count += 1
    assert task_loss(model, tokenizer, pairs) == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("line", ['{"prompt": "a"}', '{"prompt": "a", "reply": ""}', "[]", "{", ""])
def test_a_broken_task_file_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "task.jsonl").write_text(line + "\n")
    with pytest.raises(FormatError):
        read_task(tmp_path / "task.jsonl")


def test_calibration_leaves_no_checkpoint_for_a_new_request(gene: Path) -> None:
    """Steps that were kept for other shots are not used."""
    checkpoint = calibrating.Checkpoint(gene.parent / ".gene.calibrate-mine", {"shots": "others"})
    checkpoint.save("step 1", value=0.0, slope=np.zeros(2))
    found = calibrate(gene, TARGET, SHOTS, "mine", settings=Settings(max_steps=2), refusals=("No",))
    assert found.after.total > 0.1
    assert not (gene.parent / ".gene.calibrate-mine").exists()


def test_tokens_that_all_prompts_share_are_computed_once_and_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import torch

    from safegene_converter.gene import model as modelling
    from safegene_converter.gene.model import label_logits, load_plain

    loaded, _, _ = load_plain(TARGET)
    examples = [Example((5, 6, 7, 8, 9 + i, 3), (4, 5, 6)[: 1 + i % 3]) for i in range(6)]
    batch = batches_of(examples, 6)[0]
    weight = loaded.get_input_embeddings().weight
    found = []
    for shared in (4, 0):
        if shared:
            assert modelling._shared_columns(batch) == shared
        else:
            monkeypatch.setattr(modelling, "_shared_columns", lambda batch: 0)
        logits = label_logits(loaded, batch)
        (slope,) = torch.autograd.grad(logits.logsumexp(1).sum(), weight)
        found.append((logits.detach(), slope))
    for left, right in zip(*found, strict=True):
        assert torch.allclose(left, right, rtol=1e-5, atol=1e-4)
        assert right.abs().max() > 0.1


def test_a_selection_never_replaces_the_model_that_it_was_made_on(
    gene: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    with pytest.raises(OutputError, match="the input"):
        select(gene, model, SHOTS, out=model, force=True)
    assert model.is_dir()


def test_calibration_starts_at_the_best_common_factor_of_a_few(gene: Path) -> None:
    found = calibrate(
        gene, TARGET, SHOTS, "mine", settings=Settings(max_steps=1), refusals=("The",), weight=0.0
    )
    objective = Objective(
        load_gene(gene, TARGET), shots_of(SHOTS, "test", ()), weight=0.0, refusals=("The",)
    )
    best = min(COMMON_FACTORS, key=lambda one: objective.value([one] * 2).total)
    assert best != 1, "a start at 1 would pass, too"
    assert list(found.coefficients.values()) == [best, best]
