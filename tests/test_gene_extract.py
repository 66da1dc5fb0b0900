"""Extraction from whole models and from adapters, and the folder that comes out."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from safegene_converter import formula
from safegene_converter.gene import extract as extracting
from safegene_converter.gene.extract import extract
from safegene_converter.gene.folder import Expression, add_expression, keep_layers
from safegene_converter.inputs.adapter import read_adapter
from safegene_converter.inputs.base import open_base
from safegene_runtime.errors import AdapterError, GeneError, OutputError

NAMES = tuple(sorted(open_base(tiny.hf_model("llama")).shapes))
COLUMNS = ("self_attn.q_proj", "mlp.down_proj")


def dense_of(folder: Path) -> dict[str, np.ndarray]:
    return {module.name: formula.delta(module) for module in read_adapter(folder).modules}


def changed_model(out: Path, deltas: dict[str, np.ndarray], source: Path | None = None) -> Path:
    """A copy of the tiny model with deltas added to some weights."""
    shutil.copytree(source or tiny.hf_model("llama"), out)
    weights = load_file(out / "model.safetensors")
    for name, delta in deltas.items():
        weights[f"{name}.weight"] = (weights[f"{name}.weight"] + delta).astype(np.float32)
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    return out


def planted(rank: int, seed: int = 0, size: float = 0.1) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = open_base(tiny.hf_model("llama")).shapes
    found = {}
    for name in NAMES:
        if name.endswith(COLUMNS):
            rows, columns = shapes[name]
            left, right = random.normal(size=(rows, rank)), random.normal(size=(rank, columns))
            found[name] = size * (left @ right)
    return found


def test_a_discrepancy_of_rank_r_between_folders_is_recovered(tmp_path: Path) -> None:
    aligned, deltas = tiny.hf_model("llama"), planted(3)
    degraded = changed_model(tmp_path / "degraded", deltas)
    found = extract(aligned, [degraded], tmp_path / "gene", rank=3)
    assert found.method == "dense"
    vectors = dense_of(tmp_path / "gene")
    assert vectors.keys() == deltas.keys()  # and nothing for modules that did not change
    for name, delta in deltas.items():
        assert np.allclose(vectors[name], -delta, rtol=0, atol=1e-6)
    assert found.energy == pytest.approx(1, abs=1e-9)
    assert all(one.energy == pytest.approx(1, abs=1e-9) for one in found.modules)
    whole = extract(aligned, [degraded], tmp_path / "by-energy", rank=None, energy=1 - 1e-9)
    assert {one.rank for one in whole.modules} == {0, 3}


def test_adapters_on_one_base_give_the_dense_result_without_dense_matrices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny.hf_model("llama")
    one = tiny.peft_adapter("llama", tmp_path / "a", seed=1, use_rslora=True)
    two = tiny.peft_adapter(
        "llama", tmp_path / "b", seed=2, r=2, target_modules=["q_proj", "v_proj"]
    )
    folders = [changed_model(tmp_path / f"{p.name}-merged", dense_of(p)) for p in (one, two)]
    dense = extract(folders[0], [folders[1]], tmp_path / "dense", rank=6)

    def never(*_: Any) -> Any:
        raise AssertionError("a dense matrix was made")

    monkeypatch.setattr(extracting, "svd_of_dense", never)
    monkeypatch.setattr("safegene_converter.gene.sources.Source.weight", never)
    monkeypatch.setattr("safegene_converter.gene.low_rank.Factors.dense", never)
    exact = extract(one, [two], tmp_path / "exact", base=base, rank=6)
    assert (exact.method, dense.method) == ("low-rank", "dense")
    left, right = dense_of(tmp_path / "exact"), dense_of(tmp_path / "dense")
    ours, theirs = dense_of(one), dense_of(two)
    assert left.keys() == right.keys() == ours.keys() | theirs.keys()
    for name in left:
        expected = ours.get(name, np.float32(0)) - theirs.get(name, np.float32(0))
        assert np.allclose(left[name], expected, rtol=0, atol=1e-7)
        assert np.allclose(left[name], right[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("estimator", ["mean", "pca", "sign"])
def test_several_degraded_models_keep_what_they_share(tmp_path: Path, estimator: str) -> None:
    aligned, joint = tiny.hf_model("llama"), planted(1, size=0.2)
    models = []
    for seed in range(3):
        own = planted(1, seed + 1, size=0.1)
        both = {name: joint[name] + own[name] for name in joint}
        models.append(changed_model(tmp_path / f"degraded-{seed}", both))
    extract(aligned, models, tmp_path / "gene", rank=1, estimator=estimator)
    for name, vector in dense_of(tmp_path / "gene").items():
        norms = np.linalg.norm(vector) * np.linalg.norm(joint[name])
        assert np.sum(-vector * joint[name]) / norms > 0.93


def test_the_base_itself_may_be_the_aligned_model(tmp_path: Path) -> None:
    base = tiny.hf_model("llama")
    tuned = tiny.peft_adapter("llama", tmp_path / "tuned", r=2)
    found = extract(base, [tuned], tmp_path / "gene", base=base, rank=2)
    assert found.method == "low-rank"
    delta = dense_of(tuned)
    for name, vector in dense_of(tmp_path / "gene").items():
        assert np.allclose(vector, -delta[name], rtol=0, atol=1e-7)


def test_ranks_that_differ_are_written_so_that_peft_scales_by_one(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    wide, narrow = planted(4), planted(2)
    deltas = {name: (wide if ".layers.0." in name else narrow)[name] for name in wide}
    degraded = changed_model(tmp_path / "degraded", deltas)
    extract(tiny.hf_model("llama"), [degraded], tmp_path / "gene", rank=None, energy=1 - 1e-9)
    gene = read_adapter(tmp_path / "gene")
    assert len({module.rank for module in gene.modules}) > 1
    assert {module.scaling for module in gene.modules} == {1.0}
    plain = AutoModelForCausalLM.from_pretrained(tiny.hf_model("llama"))
    tuned = PeftModel.from_pretrained(plain, str(tmp_path / "gene"))
    merged = tuned.merge_and_unload().state_dict()
    before = load_file(tiny.hf_model("llama") / "model.safetensors")
    for name in NAMES:
        moved = merged[f"{name}.weight"].numpy() - before[f"{name}.weight"]
        assert np.allclose(moved, dense_of(tmp_path / "gene").get(name, 0), rtol=0, atol=1e-6)


def test_no_discrepancy_is_an_error(tmp_path: Path) -> None:
    base = tiny.hf_model("llama")
    adapter = tiny.peft_adapter("llama", tmp_path / "a")
    copy = shutil.copytree(base, tmp_path / "copy")
    for aligned, degraded in ((base, [copy]), (adapter, [adapter]), (base, [base, adapter])):
        with pytest.raises(GeneError, match="no discrepancy"):
            extract(aligned, degraded, tmp_path / "gene", base=base)
    assert not (tmp_path / "gene").exists()


def test_models_that_do_not_fit_together_are_all_named(tmp_path: Path) -> None:
    with pytest.raises(GeneError) as caught:
        extract(
            tiny.hf_model("llama"), [tiny.hf_model("qwen2"), tiny.hf_model("llama", 256)],
            tmp_path / "gene",
        )  # fmt: skip
    text = str(caught.value)
    assert "architecture: expected llama, got qwen2" in text
    assert "(out, in) = (64, 64), got (256, 256)" in text
    adapter = tiny.peft_adapter("llama", tmp_path / "a")
    with pytest.raises(GeneError, match="--base"):
        extract(tiny.hf_model("llama"), [adapter], tmp_path / "gene")
    with pytest.raises(GeneError, match="at least one model"):
        extract(tiny.hf_model("llama"), [], tmp_path / "gene")


def test_weights_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    broken = changed_model(tmp_path / "nan", {NAMES[0]: np.full((64, 128), np.nan)})
    with pytest.raises(GeneError, match="NaN or Inf"):
        extract(tiny.hf_model("llama"), [broken], tmp_path / "gene")


def test_interrupted_extraction_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aligned, degraded = tiny.hf_model("llama"), changed_model(tmp_path / "degraded", planted(2))
    whole = tmp_path / "whole"
    extract(aligned, [degraded], whole, rank=2)
    done: list[str] = []
    original = extracting._module

    def counted(*arguments: Any) -> Any:
        done.append(arguments[2])
        if len(done) == 9:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(extracting, "_module", counted)
    with pytest.raises(KeyboardInterrupt):
        extract(aligned, [degraded], tmp_path / "gene", rank=2)
    assert not (tmp_path / "gene").exists()
    extract(aligned, [degraded], tmp_path / "gene", rank=2)
    assert len(done) == len(NAMES) + 1  # only the interrupted one was begun twice
    for name in ("adapter_config.json", "adapter_model.safetensors", "safegene.json"):
        assert (tmp_path / "gene" / name).read_bytes() == (whole / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["degraded", "gene", "whole"]


def test_another_request_does_not_use_old_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    aligned, degraded = tiny.hf_model("llama"), changed_model(tmp_path / "degraded", planted(3))
    original, calls = extracting._module, [0]

    def stops(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == 9:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(extracting, "_module", stops)
    with pytest.raises(KeyboardInterrupt):
        extract(aligned, [degraded], tmp_path / "gene", rank=1)
    found = extract(aligned, [degraded], tmp_path / "gene", rank=3)
    assert {one.rank for one in found.modules} == {0, 3}


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "gene").mkdir()
    with pytest.raises(OutputError):
        extract(tmp_path / "nowhere", [tmp_path / "nowhere"], tmp_path / "gene")


@pytest.mark.parametrize("place", ["aligned", "degraded", "base"])
def test_an_output_never_replaces_what_it_is_made_from(place: str, tmp_path: Path) -> None:
    models = {name: tmp_path / name for name in ("aligned", "degraded", "base")}
    for path in models.values():
        path.mkdir()
    with pytest.raises(OutputError, match="the input"):
        extract(
            models["aligned"], [models["degraded"]], models[place], base=models["base"], force=True
        )
    assert all(path.is_dir() for path in models.values())


# --- expressions and layers ------------------------------------------------------------------------


@pytest.fixture
def gene(tmp_path: Path) -> Path:
    adapter = tiny.peft_adapter("llama", tmp_path / "tuned")
    extract(tiny.hf_model("llama"), [adapter], tmp_path / "gene", base=tiny.hf_model("llama"))
    return tmp_path / "gene"


def test_an_expression_leaves_the_vectors_untouched(gene: Path) -> None:
    before = (gene / "adapter_model.safetensors").read_bytes()
    add_expression(gene, "mine", Expression({0: 0.5, 1: 1.25}, "a target", 32))
    assert (gene / "adapter_model.safetensors").read_bytes() == before
    assert {m.layer: m.coefficient for m in read_adapter(gene, "mine").modules} == {0: 0.5, 1: 1.25}
    assert {m.coefficient for m in read_adapter(gene).modules} == {1.0}
    assert read_adapter(gene, "mine").target == "a target"
    entry = json.loads((gene / "safegene.json").read_text())["expressions"]["mine"]
    assert entry["n_shots"] == 32
    with pytest.raises(AdapterError, match="a name that is free"):
        add_expression(gene, "mine", Expression({0: 1.0, 1: 1.0}))
    add_expression(gene, "mine", Expression({0: 2.0, 1: 2.0}), force=True, default=True)
    assert {m.coefficient for m in read_adapter(gene).modules} == {2.0}


@pytest.mark.parametrize(
    "coefficients",
    [{0: 1.0}, {0: 1.0, 1: 0.0}, {0: 1.0, 1: 1.0, 2: 1.0}, {0: float("inf"), 1: 1.0}],
)
def test_an_invalid_expression_leaves_the_gene_as_it_was(
    gene: Path, coefficients: dict[int, float]
) -> None:
    before = (gene / "safegene.json").read_bytes()
    with pytest.raises((AdapterError, ValueError)):
        add_expression(gene, "bad", Expression(coefficients))
    assert (gene / "safegene.json").read_bytes() == before


def test_a_plain_lora_takes_no_expression(tmp_path: Path) -> None:
    adapter = tiny.peft_adapter("llama", tmp_path / "a")
    with pytest.raises(AdapterError, match="plain LoRA"):
        add_expression(adapter, "mine", Expression({0: 1.0, 1: 1.0}))


def test_kept_layers_keep_their_vectors_and_every_expression(gene: Path, tmp_path: Path) -> None:
    add_expression(gene, "mine", Expression({0: 0.5, 1: 1.25}), default=True)
    keep_layers(gene, open_base(tiny.hf_model("llama")), [1], tmp_path / "kept", False)
    whole = dense_of(gene)
    kept = dense_of(tmp_path / "kept")
    assert kept.keys() == {name for name in whole if ".layers.1." in name}
    for name, vector in kept.items():
        assert np.array_equal(vector, whole[name])
    assert set(read_adapter(tmp_path / "kept").expressions) == {"default", "mine"}
    assert read_adapter(tmp_path / "kept").expression == "mine"
    with pytest.raises(GeneError, match="at least one"):
        keep_layers(gene, open_base(tiny.hf_model("llama")), [7], tmp_path / "none", False)


def test_pairs_cancel_what_both_of_a_pair_learnt(tmp_path: Path) -> None:
    """Two fine-tunes, each with safety won back: only that is left, whatever the tasks were."""
    base, safety = tiny.hf_model("llama"), planted(2, size=0.1)
    good, bad = [], []
    for seed in range(2):
        own = planted(3, seed + 1, size=0.3)
        bad.append(changed_model(tmp_path / f"bad-{seed}", own, base))
        good.append(changed_model(tmp_path / f"good-{seed}", safety, bad[-1]))
    extract(good, bad, tmp_path / "gene", rank=2)
    for name, vector in dense_of(tmp_path / "gene").items():
        assert np.allclose(vector, safety[name], rtol=0, atol=1e-5)


def test_an_aligned_adapter_belongs_to_the_degraded_model_of_its_pair(tmp_path: Path) -> None:
    tasks = [changed_model(tmp_path / f"bad-{seed}", planted(3, seed)) for seed in range(2)]
    won = [tiny.peft_adapter("llama", tmp_path / f"won-{seed}", seed=seed) for seed in range(2)]
    found = extract(won, tasks, tmp_path / "gene", rank=None, energy=1 - 1e-12)
    assert found.method == "low-rank"
    one, two = (dense_of(path) for path in won)
    for name, vector in dense_of(tmp_path / "gene").items():
        assert np.allclose(vector, (one[name] + two[name]) / 2, rtol=0, atol=1e-6)


def test_aligned_models_that_cannot_be_paired_are_refused(tmp_path: Path) -> None:
    base = tiny.hf_model("llama")
    models = [changed_model(tmp_path / f"bad-{seed}", planted(1, seed)) for seed in range(3)]
    with pytest.raises(GeneError, match="one per --degraded"):
        extract([base, base], models, tmp_path / "gene")
    assert not (tmp_path / "gene").exists()


def test_the_aligned_model_of_several_is_read_once_per_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from safegene_converter.gene.sources import Source

    models = [changed_model(tmp_path / f"bad-{seed}", planted(1, seed)) for seed in range(3)]
    read: list[Path] = []
    original = Source.weight

    def weight(self: Source, name: str) -> Any:
        read.append(self.path)
        return original(self, name)

    monkeypatch.setattr(Source, "weight", weight)
    extract(tiny.hf_model("llama"), models, tmp_path / "gene", rank=2)
    assert {path: read.count(path) for path in read} == {
        path: len(NAMES) for path in (tiny.hf_model("llama"), *models)
    }
