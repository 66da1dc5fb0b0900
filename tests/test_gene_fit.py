"""Selection and calibration: PEFT's forward is ours, planted layers and coefficients are found."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from safegene_converter import formula
from safegene_converter.gene.asked import log_probabilities, separation
from safegene_converter.gene.calibrate import calibrate
from safegene_converter.gene.extract import extract
from safegene_converter.gene.folder import Expression, add_expression
from safegene_converter.gene.level import WEIGHTS, Level, Weighed, reach
from safegene_converter.gene.model import Example, GeneModel, batches_of, load_gene
from safegene_converter.gene.objective import Losses, Objective, common_factor
from safegene_converter.gene.optimise import Settings, minimise, search
from safegene_converter.gene.select import ablation, choose, first_order, rank_correlation, select
from safegene_converter.gene.shots import Shots, shots_of
from safegene_converter.inputs.adapter import read_adapter
from safegene_converter.recording.loading import load_model
from safegene_runtime.errors import AdapterError, GeneError
from safegene_runtime.record.prompts import Prompt

TARGET = tiny.hf_model("llama")
TEXTS = ("Name a colour.", "Two words about rain.", "What is six times seven?", "Say a number.")
SHOTS = tuple(
    Prompt(f"{kind}-{i}", f"{text} ({kind})", kind, "test")  # type: ignore[arg-type]
    for kind in ("harmful", "benign")
    for i, text in enumerate(TEXTS)
)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gene")
    adapter = tiny.peft_adapter("llama", folder / "tuned", scale=0.25)
    extract(TARGET, [adapter], folder / "gene", base=TARGET, rank=4)
    return folder / "gene"


@pytest.fixture
def gene(source: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(source, tmp_path / "gene"))


def logits_of(model: Any, ids: list[int]) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(model(torch.tensor([ids])).logits[0])


def merged_by_hand(gene: Path, expression: str) -> Any:
    """The target with every delta of an expression added by our own formula."""
    from safegene_converter.inputs.base import open_base

    model, _ = load_model(open_base(TARGET))
    with torch.no_grad():
        for module in read_adapter(gene, expression).modules:
            model.get_submodule(module.name).weight += torch.from_numpy(formula.delta(module))
    return model


def test_an_expression_is_what_peft_computes(gene: Path) -> None:
    add_expression(gene, "mine", Expression({0: 0.4, 1: 2.5}))
    loaded = load_gene(gene, TARGET, "mine")
    ids = list(loaded.prompts(TEXTS[:1])[0])
    expected = logits_of(merged_by_hand(gene, "mine"), ids)
    assert np.allclose(logits_of(loaded.tuned, ids), expected, rtol=0, atol=5e-3)
    loaded.set([1.0, 1.0])
    other = logits_of(loaded.tuned, ids)
    assert not np.allclose(other, expected, rtol=0, atol=0.05)
    assert np.allclose(other, logits_of(merged_by_hand(gene, "default"), ids), rtol=0, atol=5e-3)
    with loaded.without_gene():
        plain = logits_of(loaded.tuned, ids)
    loaded.set([0.0, 0.0])
    assert np.array_equal(logits_of(loaded.tuned, ids), plain)


def test_label_logits_are_those_of_the_whole_forward_pass(gene: Path) -> None:
    loaded = load_gene(gene, TARGET)
    examples = [
        Example(prompt, (5 + i, 6, 7)[: 1 + i % 3])
        for i, prompt in enumerate(loaded.prompts(TEXTS))
    ]
    for batch in batches_of(examples, size=3):
        with torch.no_grad():
            found = loaded.logits(batch)
        row = 0
        for index in batch.indices:
            example = examples[index]
            whole = logits_of(loaded.tuned, [*example.prompt, *example.reply[:-1]])
            for offset, label in enumerate(example.reply):
                expected = whole[len(example.prompt) - 1 + offset]
                assert np.allclose(found[row].numpy(), expected, rtol=0, atol=5e-3)
                assert int(batch.labels[row]) == label
                row += 1
        assert row == len(found)


def test_gradients_are_slopes(gene: Path) -> None:
    objective = Objective(
        load_gene(gene, TARGET), shots_of(SHOTS, "test"), refusals=("No.", "I won't")
    )
    at, step = np.array([0.7, 1.2]), 1e-3
    losses, safety, kl = objective.gradient(at)
    value = objective.value(at)
    assert value.safety == pytest.approx(losses.safety, rel=1e-5)
    assert value.kl == pytest.approx(losses.kl, rel=1e-4)
    for index in range(2):
        up, down = at.copy(), at.copy()
        up[index] += step
        down[index] -= step
        high, low = objective.value(up), objective.value(down)
        assert (high.safety - low.safety) / (2 * step) == pytest.approx(
            safety[index], rel=0.02, abs=1e-3
        )
        assert (high.kl - low.kl) / (2 * step) == pytest.approx(kl[index], rel=0.02, abs=1e-3)
    nothing = objective.value([0.0, 0.0])
    assert nothing.kl == pytest.approx(0, abs=1e-6)


def test_the_safety_loss_sums_over_openings(gene: Path) -> None:
    loaded = load_gene(gene, TARGET)
    openings = ("No.", "I will not")
    objective = Objective(loaded, shots_of(SHOTS, "test"), refusals=openings)
    found = objective.value([1.0, 1.0]).safety
    expected = []
    for prompt in SHOTS[:4]:
        chances = []
        for opening in openings:
            ids, reply = list(loaded.prompts([prompt.text])[0]), loaded.encode(opening)
            logits = torch.from_numpy(logits_of(loaded.tuned, [*ids, *reply[:-1]])).double()
            scored = torch.log_softmax(logits[len(ids) - 1 :], dim=-1)
            chances.append(float(scored[range(len(reply)), list(reply)].sum()))
        expected.append(-np.logaddexp(*chances))
    assert found == pytest.approx(np.mean(expected), rel=1e-5)


# --- calibration -----------------------------------------------------------------------------------


class Planted(Objective):
    """KL to the same model under planted coefficients: least exactly there, and 0."""

    def __init__(self, model: GeneModel, at: list[float]) -> None:
        super().__init__(model, Shots((), tuple(TEXTS[:2])), reply_tokens=4)
        with torch.no_grad():
            model.set(at)
            self._benign = [
                (batch, log_probabilities(model.logits(batch))) for batch, _ in self._benign
            ]


@pytest.mark.parametrize("planted", [[0.6, 1.7], [1.5, 0.4]])
def test_calibration_finds_planted_coefficients(gene: Path, planted: list[float]) -> None:
    objective = Planted(load_gene(gene, TARGET), planted)

    def gradient(at: np.ndarray) -> tuple[float, np.ndarray]:
        losses, safety, kl = objective.gradient(at)
        return losses.total, safety + kl

    found = minimise(gradient, np.ones(2), Settings(max_steps=60, patience=60))
    assert np.allclose(found.coefficients, planted, atol=0.06)
    assert found.value < 0.02 * found.history[0]


def test_calibration_adds_an_expression_and_lowers_the_loss(gene: Path) -> None:
    before = (gene / "adapter_model.safetensors").read_bytes()
    settings = Settings(max_steps=8)
    found = calibrate(gene, TARGET, SHOTS, "mine", settings=settings, refusals=("No",))
    assert found.after.total < found.at_one.total
    assert found.before.kl == pytest.approx(0, abs=1e-6)
    assert (gene / "adapter_model.safetensors").read_bytes() == before
    entry = json.loads((gene / "safegene.json").read_text())["expressions"]["mine"]
    assert entry["n_shots"] == 8
    assert entry["target"] == TARGET.name
    assert {int(k): v for k, v in entry["coefficients"].items()} == pytest.approx(
        found.coefficients
    )
    again = calibrate(gene, TARGET, SHOTS, "again", settings=settings, refusals=("No",))
    assert again.coefficients == found.coefficients
    assert [path.name for path in gene.parent.iterdir()] == ["gene"]
    with pytest.raises(AdapterError, match="a name that is free"):
        calibrate(gene, TARGET, SHOTS, "mine")


def test_interrupted_calibration_goes_on_and_ends_where_it_would_have(
    gene: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Settings(max_steps=5)
    whole = calibrate(gene, TARGET, SHOTS, "whole", settings=settings, refusals=("No",))
    original, calls = Objective.gradient, [0]

    def stops(self: Objective, at: Any) -> Any:
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return original(self, at)

    monkeypatch.setattr(Objective, "gradient", stops)
    with pytest.raises(KeyboardInterrupt):
        calibrate(gene, TARGET, SHOTS, "cut", settings=settings, refusals=("No",))
    assert "cut" not in read_adapter(gene).expressions
    cut = calibrate(gene, TARGET, SHOTS, "cut", settings=settings, refusals=("No",))
    assert cut.coefficients == whole.coefficients
    assert calls[0] == 6  # three before, the one that was interrupted, and the last two


def test_bounds_hold_and_early_stopping_stops() -> None:
    def slope(at: np.ndarray) -> tuple[float, np.ndarray]:
        return float(-at.sum()), -np.ones_like(at)

    found = minimise(slope, np.ones(3), Settings(bounds=(0.1, 1.5), max_steps=100))
    assert np.array_equal(found.coefficients, [1.5] * 3)
    assert found.converged
    assert len(found.history) < 30
    for bounds in ((0.0, 1.0), (2.0, 1.0), (0.1, float("inf"))):
        with pytest.raises(GeneError, match="bounds"):
            Settings(bounds=bounds)


@pytest.mark.parametrize("planted", [[1.0, 1.0, 1.0], [0.7, 0.6, 0.8], [1.3, 0.6, 2.0]])
def test_the_search_without_gradients_finds_planted_coefficients(planted: list[float]) -> None:
    goal = np.array(planted)
    found = search(lambda at: float(((at - goal) ** 2).sum()), np.ones(3), (0.05, 4.0), 200)
    assert np.allclose(found.coefficients, goal, atol=0.02)
    assert len(found.history) <= 200
    few = search(lambda at: float(((at - goal) ** 2).sum()), np.ones(3), (0.05, 4.0), 5)
    assert len(few.history) == 5
    assert few.value <= few.history[0]
    assert not few.converged


# --- selection -------------------------------------------------------------------------------------


class Quadratic:
    """A planted objective: safety falls by `gain`, KL rises by `cost`, layers interact."""

    def __init__(self, gain: np.ndarray, cost: np.ndarray, coupling: float = 0.0) -> None:
        self.gain, self.cost = gain, cost
        random = np.random.default_rng(0).normal(size=(len(gain), len(gain)))
        self.hessian = coupling * (random + random.T)

    def value(self, at: np.ndarray) -> Losses:
        at = np.asarray(at, dtype=np.float64)
        safety = 10 - self.gain @ at + at @ self.hessian @ at / 2
        # sixteen shots, each with a margin of its own to the edge
        greedy = float((self.gain @ at > np.arange(16) / 16 * self.gain.sum()).mean())
        return Losses(float(safety), float(self.cost @ at**2), 1.0, math.exp(-safety), greedy)

    def gradient(self, at: np.ndarray) -> tuple[Losses, np.ndarray, np.ndarray]:
        return self.value(at), self.hessian @ at - self.gain, 2 * self.cost * at


def test_the_cheap_score_is_the_exact_one_where_the_objective_is_quadratic() -> None:
    random = np.random.default_rng(1)
    objective = Quadratic(random.uniform(0, 1, 8), random.uniform(0, 0.5, 8), coupling=0.05)
    for cheap, exact in zip(first_order(objective, 8), ablation(objective, 8), strict=True):
        assert np.allclose(cheap, exact)


def test_a_gene_too_long_as_extracted_is_scored_where_it_is_of_use() -> None:
    gain, cost = np.asarray([2.0, 1.0, 1.0]), np.asarray([4.0, 8.0, 2.0])
    objective = Quadratic(gain, cost)
    factor = common_factor(objective, 3)
    assert factor < 1

    def total(at: float) -> float:
        safety, kl = first_order(objective, 3, at)
        return float((safety - kl).sum())

    assert total(1.0) < 0 < total(factor)
    for cheap, exact in zip(
        first_order(objective, 3, factor), ablation(objective, 3, factor), strict=True
    ):
        assert np.allclose(cheap, exact)
    alone = np.asarray([factor, 0, 0])
    gained = objective.value(np.zeros(3)).total - objective.value(alone).total
    safety, kl = first_order(objective, 3, factor)
    assert np.isclose((safety - kl)[0], gained)


@pytest.mark.parametrize("asked_for", ["refused", "greedy"])
@pytest.mark.parametrize("weight", [0.6, 0.1])
def test_the_least_change_that_reaches_a_level_is_found(weight: float, asked_for: str) -> None:
    gain, cost = np.asarray([2.0, 1.0, 1.0]), np.asarray([4.0, 8.0, 2.0])
    objective = Quadratic(gain, cost)
    planted = gain / (2 * weight * cost)  # where J with this weight is least
    asked = []

    def minimum(tried: float, last: np.ndarray | None) -> Weighed:
        asked.append(tried)
        least = gain / (2 * tried * cost)
        return Weighed(tried, least, objective.value(least), 0.0)

    level = Level(
        **{"refused": 0.0, "greedy": 0.0, asked_for: getattr(objective.value(planted), asked_for)}
    )
    found = reach(objective, minimum, level)
    assert level.reached(objective.value(found))
    assert not level.reached(objective.value(found * 0.9))
    if asked_for == "refused":
        # greedy refusals come in steps, and `planted` need not be at an edge of one
        assert np.allclose(found, planted, rtol=0.05)
    assert asked == [tried for tried in WEIGHTS if tried * 4 > weight]
    asked.clear()
    assert np.array_equal(reach(objective, minimum, Level(0.0, 0.0)), gain / (2 * cost))
    assert asked == [1.0]  # what weight 1 reaches is not given back


def test_a_level_out_of_reach_ends_where_only_refusals_count() -> None:
    objective = Quadratic(np.ones(2), np.ones(2))

    def minimum(weight: float, last: np.ndarray | None) -> Weighed:
        least = np.full(2, 0.9 - weight / 5)
        return Weighed(weight, least, objective.value(least), 0.0)

    for level in (Level(0.99, 0.0), Level(0.0, 0.99)):
        assert np.array_equal(reach(objective, minimum, level), np.full(2, 0.9))


def test_greedy_refusals_are_those_that_generation_gives(gene: Path) -> None:
    """Openings of several lengths, cut from what the model says to some of the shots."""
    loaded, shots = load_gene(gene, TARGET), shots_of(SHOTS, "test")
    seen = set()
    for at in ([1.0, 1.0], [0.0, 0.0]):
        loaded.set(at)
        replies = loaded.replies(shots.harmful, 4)
        for reply in replies[:2]:
            openings = tuple(loaded.decode(reply[:length]) for length in (1, 3))
            ids = [list(loaded.encode(text)) for text in openings]
            expected = [any(said[: len(one)] == one for one in ids) for said in replies]
            found = Objective(loaded, shots, refusals=openings).value(at).greedy
            assert found == sum(expected) / len(expected)
            seen.add(found)
    assert len(seen) > 1, "a share that never changes shows nothing"


def test_calibrating_to_an_aligned_model_reaches_its_level(tmp_path: Path) -> None:
    """The aligned model is the target with the gene on it, so the level can be reached."""
    gene = tmp_path / "gene"
    tuned = tiny.peft_adapter("llama", tmp_path / "tuned", scale=0.08)
    extract(TARGET, [tuned], gene, base=TARGET, rank=4)
    aligned = Path(shutil.copytree(TARGET, gene.parent / "aligned"))
    merged_by_hand(gene, "default").save_pretrained(aligned)
    loaded, shots = load_gene(gene, TARGET), shots_of(SHOTS, "test")
    # "refusals" are what the aligned model says: so it is surer of them than the target
    said = tuple({loaded.decode(ids) for ids in loaded.replies(shots.harmful, 1)})
    found = calibrate(
        gene, TARGET, SHOTS, "level", aligned=aligned, refusals=said,
        settings=Settings(max_steps=8, rate=0.3),
    )  # fmt: skip
    objective = Objective(loaded, shots, refusals=said)
    stored = objective.value([found.coefficients[layer] for layer in loaded.layers])
    assert found.level is not None
    wanted = objective.value([1.0, 1.0])
    assert found.level.refused == pytest.approx(wanted.refused, rel=1e-3)
    assert found.level.greedy == wanted.greedy
    assert stored.refused == pytest.approx(found.after.refused, rel=1e-5)
    assert found.level.reached(found.after)
    assert not found.level.reached(found.before)
    assert not list(gene.parent.glob(".gene*"))
    tried = tuple(one.weight for one in found.minima)
    assert tried == WEIGHTS[: len(tried)]
    alone = calibrate(
        gene, TARGET, SHOTS, "alone", refusals=said, settings=Settings(max_steps=8, rate=0.3)
    )
    shown = found.to_dict()["minima"][0]
    assert shown["coefficients"] == pytest.approx(alone.to_dict()["coefficients"], abs=1e-6)
    assert shown["losses"]["refused"] == pytest.approx(alone.after.refused, rel=1e-4)
    with pytest.raises(GeneError, match="either a weight or an aligned model"):
        calibrate(gene, TARGET, SHOTS, "both", aligned=aligned, weight=1.0)


def test_separation_is_the_share_of_pairs_in_the_right_order() -> None:
    random = np.random.default_rng(0)
    harmful = np.append(random.normal(1, 1, 12), [0.5, 0.5])
    benign = np.append(random.normal(0, 1, 9), [0.5])
    right = sum(float(h > b) + float(h == b) / 2 for h in harmful for b in benign)
    assert separation(harmful, benign) == pytest.approx(right / (len(harmful) * len(benign)))
    assert separation(np.ones(3), np.zeros(4)) == 1
    assert separation(np.zeros(3), np.ones(4)) == 0
    # a gene that makes every refusal likelier by as much separates nothing
    assert separation(harmful + 3, benign + 3) == separation(harmful, benign)


def test_calibration_tells_how_well_refusals_separate(gene: Path) -> None:
    """Before and after, as each prompt asked by itself has it."""
    found = calibrate(gene, TARGET, SHOTS, "mine", settings=Settings(max_steps=2), refusals=("No",))
    loaded, shots = load_gene(gene, TARGET), shots_of(SHOTS, "test")
    opening = loaded.encode("No")
    for at, told in zip(([0.0] * 2, [*found.coefficients.values()]), found.separation, strict=True):
        loaded.set(at)
        log_p = {}
        for kind, texts in (("harmful", shots.harmful), ("benign", shots.benign)):
            log_p[kind] = np.zeros(len(texts))
            for row, text in enumerate(texts):
                prompt = [*loaded.prompts([text])[0]]
                logits = logits_of(loaded.tuned, [*prompt, *opening])[len(prompt) - 1 : -1]
                scored = log_probabilities(torch.from_numpy(logits)).numpy()
                log_p[kind][row] = scored[range(len(opening)), opening].sum()
        assert told == separation(log_p["harmful"], log_p["benign"])


def test_selection_finds_planted_layers() -> None:
    gain, cost = np.full(10, 0.05), np.full(10, 0.1)
    gain[[2, 5, 7]] = (3.0, 2.0, 1.0)
    cost[7] = 5.0  # brings safety, and ruins everything else
    safety, kl = first_order(Quadratic(gain, cost), 10)
    layers = list(range(10))
    sizes = dict.fromkeys(layers, 100)
    assert choose(layers, (safety - kl).tolist(), sizes, 1000) == (2, 5)
    assert choose(layers, safety.tolist(), sizes, 350) == (2, 5, 7)
    assert choose(layers, safety.tolist(), {**sizes, 2: 1000}, 350)[:2] == (0, 5)


def test_no_layer_worth_its_cost_is_an_error() -> None:
    for scores, budget in (([-1.0, -2.0], 1000.0), ([1.0, 2.0], 50.0)):
        with pytest.raises(GeneError, match="gains more than it costs"):
            choose([0, 1], scores, {0: 100, 1: 100}, budget)


def test_the_cheap_score_ranks_layers_of_a_model_as_ablation_does(tmp_path: Path) -> None:
    """A gene of which one layer moves the model much more than the other, for each layer in turn."""
    adapter = tiny.peft_adapter("llama", tmp_path / "tuned", scale=0.15)
    extract(TARGET, [adapter], tmp_path / "gene", base=TARGET)
    cheap, exact = [], []
    for name, pair in (("a", (1.0, 0.2)), ("b", (0.2, 1.0)), ("c", (0.6, 0.6))):
        add_expression(tmp_path / "gene", name, Expression(dict(enumerate(pair))))
        loaded = load_gene(tmp_path / "gene", TARGET, name)
        inner = Objective(loaded, shots_of(SHOTS, "test"), refusals=("No",))

        class Scaled:
            """The same with each layer's vector as strong as the expression says."""

            def value(self, at: Any, pair: Any = pair, inner: Objective = inner) -> Losses:
                return inner.value(np.asarray(at) * pair)

            def gradient(self, at: Any, pair: Any = pair, inner: Objective = inner) -> Any:
                losses, safety, kl = inner.gradient(np.asarray(at) * pair)
                return losses, safety * pair, kl * pair

        for found, scores in ((cheap, first_order), (exact, ablation)):
            safety, kl = scores(Scaled(), 2)
            found += [*safety, *kl]
    assert rank_correlation(cheap, exact) > 0.8


def test_rank_correlation_is_spearmans() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 20, 30, 45]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    # scipy.stats.spearmanr([1, 2, 2, 3], [1, 3, 2, 4]).statistic
    assert rank_correlation([1, 2, 2, 3], [1, 3, 2, 4]) == pytest.approx(0.9486832980505138)


def test_selection_writes_a_gene_within_its_budget(gene: Path, tmp_path: Path) -> None:
    whole = read_adapter(gene)
    one_layer = sum(m.a.size + m.b.size for m in whole.modules if m.layer == 0)
    # the tiny target knows nothing: whichever opening it likes serves as its refusal
    for opening in ("No", "I", "The", "A"):
        try:
            found = select(
                gene, TARGET, SHOTS, budget=one_layer, weight=0.0, exact=True, refusals=(opening,),
                out=tmp_path / "selected",
            )  # fmt: skip
            break
        except GeneError:
            continue
    assert len(found.layers) == 1
    assert found.parameters == one_layer
    assert {m.layer for m in read_adapter(tmp_path / "selected").modules} == set(found.layers)
    best = max(found.scores, key=lambda score: score.exact or 0.0)
    assert found.layers == (best.layer,)
    assert found.share == pytest.approx(one_layer / load_gene(gene, TARGET).n_parameters)
    assert len(read_adapter(gene).modules) == len(whole.modules)


# --- shots and errors ------------------------------------------------------------------------------
