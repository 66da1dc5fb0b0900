"""The base beside its adapter: how much of a KL is the base's own rounding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from mutants import MUTANTS
from workshop import PROMPTS, Workshop

from safegene import convert, record
from safegene_converter.gguf.presets import quantize_gguf
from safegene_runtime.engines.engine import Engine
from safegene_runtime.engines.registry import open_engine
from safegene_runtime.errors import EngineError
from safegene_runtime.gating.bounds import BOUNDS
from safegene_runtime.record.reference import Reference
from safegene_runtime.verifying import base_noise, ladder
from safegene_runtime.verifying.base_noise import (
    FLOOR,
    MIN_PROMPTS,
    NEGLIGIBLE,
    RATIO,
    BaseNoise,
    base_kl,
)
from safegene_runtime.verifying.ladder import verify
from safegene_runtime.verifying.report import Report


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("noise"))


def rounded() -> Path:
    """The tiny base, rounded to 8 bits."""
    return tiny.gguf_model("llama", 64, "q8_0")


def verified(shop: Workshop, target: str, out: Path, base: Path | None = None) -> Report:
    """An artifact on the genuine base, or a sidecar on another one."""
    if base is None:
        folder, base = shop.genuine(target), shop.base_beside(target)
    else:
        folder = out
        convert(shop.adapter, base, out, form="sidecar", check=False)
    return verify(folder, shop.reference, base=base, threads=1, write=False)


def test_a_sidecar_on_a_rounded_base_moves_about_as_much_as_its_base(
    shop: Workshop, tmp_path: Path
) -> None:
    rung = verified(shop, "gguf sidecar", tmp_path / "out", rounded()).rung("logits")
    noise = rung.figures["base_noise"]
    assert noise["prompts"] == len(shop.reference.prompts)
    assert noise["artifact_kl"] == pytest.approx(rung.figures["mean_kl"], rel=1e-9)
    assert noise["ratio"] == pytest.approx(noise["artifact_kl"] / noise["base_kl"], rel=1e-9)
    assert noise["base_kl"] > 1000 * FLOOR
    assert 1 / RATIO < noise["ratio"] < RATIO
    assert f"{noise['ratio']:.2g} times its base's own" in rung.detail
    assert "not what causes it" not in rung.detail


@pytest.mark.parametrize("target", ["gguf sidecar", "onnx adapter"])
def test_a_base_in_f32_has_no_noise_to_compare_with(
    target: str, shop: Workshop, tmp_path: Path
) -> None:
    rung = verified(shop, target, tmp_path / "out").rung("logits")
    noise = rung.figures["base_noise"]
    assert noise["base_kl"] <= FLOOR
    assert noise["ratio"] is None
    assert "its base's own" not in rung.detail


def test_an_artifact_that_cannot_be_parted_from_its_base_has_none(
    shop: Workshop, tmp_path: Path
) -> None:
    rung = verified(shop, "gguf merged", tmp_path / "out").rung("logits")
    assert rung.figures["base_noise"] is None


def test_the_kl_of_the_base_is_that_of_whole_distributions(shop: Workshop) -> None:
    """Our KL puts all but 64 tokens into one bucket: here the reference's bucket and ours, by hand."""
    record = shop.reference
    with open_engine(rounded(), threads=1) as engine:
        found = base_kl(engine, record, range(len(record.prompts)))
        for index, prompt in enumerate(record.prompts):
            ids = [*prompt.prompt_ids, *prompt.ref_ids[:-1]]
            _, logits = next(iter(engine.logits([ids], [len(prompt.ref_ids)])))
            ours = np.exp(logits - logits.max(axis=1, keepdims=True).astype(np.float64))
            ours /= ours.sum(axis=1, keepdims=True)
            at = record.positions(index)
            wanted = []
            for row, tokens in enumerate(at.top_ids):
                p = np.exp(at.base_logits[row].astype(np.float64) - at.base_lse[row])
                q = ours[row, tokens]
                p, q = np.append(p, 1 - p.sum()), np.append(q, 1 - q.sum())
                wanted.append(float((p * np.log(p / q)).sum()))
            assert found[index] == pytest.approx(wanted, rel=1e-4, abs=1e-8)


def test_no_more_prompts_run_than_are_needed_and_in_the_recorded_order(
    shop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(base_noise, "PROMPTS", 2)
    order = shop.reference.order()
    with open_engine(rounded(), threads=1) as engine:
        assert base_kl(engine, shop.reference, order).keys() == set(order[:2])
        assert base_kl(engine, shop.reference, order[1:]).keys() == set(order[1:3])
        assert base_kl(engine, shop.reference, []) == {}


@pytest.mark.parametrize("what", ["not a number", "nothing", "only one"])
def test_a_base_that_gives_no_logits_is_an_error(what: str, shop: Workshop) -> None:
    class Broken:
        name = "broken"
        n_vocab = 50_000

        def logits(self, sequences: Any, keep: Any) -> Iterator[tuple[int, np.ndarray]]:
            if what == "not a number":
                for number, rows in enumerate(keep):
                    yield number, np.full((rows, 50_000), np.nan, np.float32)
            if what == "only one":
                yield 0, np.zeros((keep[0], 50_000), np.float32)

    broken: Any = Broken()
    with pytest.raises(EngineError, match="logits of the base"):
        base_kl(broken, shop.reference, [0, 1])


@dataclass(frozen=True)
class Coarse:
    """A tiny base whose weights are 4-bit numbers in PyTorch, too, and a sidecar beside it."""

    shop: Workshop
    base: Path
    artifact: Path
    reference: Reference


@pytest.fixture(scope="module")
def coarse(tmp_path_factory: pytest.TempPathFactory) -> Coarse:
    folder = tmp_path_factory.mktemp("coarse")
    shop, base, artifact = Workshop(folder, scale=0.04), folder / "base.gguf", folder / "sidecar"
    quantize_gguf(tiny.gguf_model("llama"), base, "q4_1")
    convert(shop.adapter, base, artifact, form="sidecar", check=False)
    reference = record(
        shop.adapter, base, folder / "of-it", prompts=PROMPTS, max_new_tokens=4
    )  # fmt: skip
    return Coarse(shop, base, artifact, reference)


@pytest.mark.parametrize(
    "mistake", [None, "scale 0.5", "scale 2", "coefficients ignored", "one layer dropped"]
)
def test_a_wrong_adapter_that_its_class_would_let_pass_breaks_against_its_base(
    mistake: str | None, coarse: Coarse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are the genuine ones: the program that runs them applies others."""
    if mistake is not None:
        wrong = MUTANTS[mistake](coarse.shop, "gguf sidecar", tmp_path / "wrong").folder

        def other(model: Path, adapter: Path | None, **settings: Any) -> Engine:
            return open_engine(model, adapter and wrong / adapter.name, **settings)

        monkeypatch.setattr(ladder, "open_engine", other)
    monkeypatch.setattr(base_noise, "MIN_PROMPTS", len(PROMPTS))
    report = verify(coarse.artifact, coarse.reference, base=coarse.base, threads=1, write=False)
    rung = report.rung("logits")
    assert report.precision == "4-bit"
    assert rung.figures["mean_kl"] < BOUNDS["4-bit"].kl_ceiling
    assert rung.status == ("ok" if mistake is None else "broken"), rung.detail
    assert ("of which it may have" in rung.detail) == (mistake is not None)


def test_only_what_is_sure_breaks_and_only_where_the_class_leaves_room() -> None:
    def breaks(base: float, artifact: float, precision: str, prompts: int = MIN_PROMPTS) -> bool:
        arms = ({at: np.full(3, kl) for at in range(prompts)} for kl in (base, artifact))
        return BaseNoise.of(*arms).breaks(BOUNDS[precision])

    base = 2 * NEGLIGIBLE
    for precision, bounds in BOUNDS.items():
        assert breaks(base, 1.01 * RATIO * base, precision) == (not bounds.kl_gates)
        assert not breaks(base, 0.99 * RATIO * base, precision)
    assert not breaks(base, 9 * base, "4-bit", MIN_PROMPTS - 1)
    assert not breaks(NEGLIGIBLE / 9, 0.99 * NEGLIGIBLE, "4-bit")
    assert not breaks(FLOOR / 2, 1.0, "4-bit")


def test_what_the_base_does_not_explain_is_said() -> None:
    def remark(base: float, artifact: float) -> str:
        return BaseNoise.of({3: np.full(4, base)}, {3: np.full(4, artifact), 5: np.zeros(1)}).remark

    assert remark(1e-3, 2e-3) == "; 2 times its base's own 1.00e-03"
    assert remark(1e-3, 2e-2).endswith(", so the base's rounding is not what causes it")
    assert remark(1e-10, 1.0) == ""
