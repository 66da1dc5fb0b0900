"""dW = c * s * B A, against PEFT's own arithmetic."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import numpy_helper
from onnx_tools import convert_onnx

from safegene import convert
from safegene_converter import formula
from safegene_converter.fold.survival import Bounds
from safegene_converter.inputs.adapter import Module, read_adapter
from safegene_runtime.architecture.table import TABLE


def module(seed: int, coefficient: float = 1.0, scaling: float = 2.0) -> Module:
    random = np.random.default_rng(seed)
    a = random.standard_normal((4, 12)).astype(np.float32)
    b = random.standard_normal((7, 4)).astype(np.float32)
    return Module("model.layers.0.mlp.up_proj", 0, a, b, 4, 8, scaling, coefficient)


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 32}},
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"up_proj": 3}},
        {"target_modules": r".*layers\.1\..*_proj"},
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_delta_is_pefts_delta(
    architecture: str, variant: dict[str, Any], tmp_path: Path
) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    path = tiny.peft_adapter(architecture, tmp_path / "adapter", **variant)
    coefficients = {"0": 0.3, "1": -1.7}
    if "target_modules" in variant:
        del coefficients["0"]
    (path / "safegene.json").write_text(
        json.dumps(
            {
                "format_version": 1,
                "base_model": {"name": "t", "architecture": architecture, "n_layers": 2},
                "selected_layers": [int(layer) for layer in coefficients],
                "default_expression": "x",
                "expressions": {"x": {"coefficients": coefficients}},
            }
        )
    )
    ours = {m.name: m for m in read_adapter(path).modules}
    base = AutoModelForCausalLM.from_pretrained(tiny.hf_model(architecture), dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(base, path)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in tuned.named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }
    assert layers.keys() == ours.keys()
    for name, layer in layers.items():
        layer.scaling["default"] *= coefficients[str(ours[name].layer)]
        wanted = layer.get_delta_weight("default").detach().numpy()
        got = formula.delta(ours[name])
        assert got.shape == wanted.shape == ours[name].shape
        assert np.abs(got - wanted).max() <= 1e-6 * np.abs(wanted).max()
        assert formula.effective_scale(ours[name]) == pytest.approx(layer.scaling["default"])


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100), st.floats(0.01, 100))
def test_every_scale_is_in_b(seed: int, coefficient: float, scaling: float) -> None:
    one = module(seed, coefficient, scaling)
    product = formula.scaled_b(one).astype(np.float64) @ one.a.astype(np.float64)
    assert np.allclose(product, formula.delta(one), rtol=1e-5, atol=1e-6 * np.abs(product).max())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.5, 2.0, -1.0, 4.0]))
def test_the_delta_is_linear_in_the_coefficient(seed: int, factor: float) -> None:
    one, other = module(seed), module(seed, factor)
    assert np.array_equal(formula.delta(one) * np.float32(factor), formula.delta(other))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 6), min_size=1), st.integers(0, 7))
def test_rows_of_the_delta_are_its_rows(seed: int, picked: list[int], start: int) -> None:
    one = module(seed, 0.7)
    whole = formula.delta(one)
    for rows in (np.array(picked), slice(start, start + 3)):
        assert np.array_equal(formula.delta(one, rows), whole[rows])


def rounded_once(one: Module) -> np.ndarray:
    """ΔW in rational numbers, each rounded to the nearest float32."""
    scale = Fraction(formula.effective_scale(one))
    exact = [
        [
            scale
            * sum(Fraction(float(x)) * Fraction(float(y)) for x, y in zip(row, col, strict=True))
            for col in one.a.T
        ]
        for row in one.b
    ]
    return np.array([[np.float32(float(value)) for value in row] for row in exact])


@pytest.mark.parametrize("seed", range(20))
def test_the_delta_is_rounded_once(seed: int) -> None:
    """Products and sums of float32 are off in a third of the elements."""
    one = module(seed, 0.3)
    assert np.array_equal(formula.delta(one), rounded_once(one))
    single = formula.scaled_b(one) @ one.a
    assert (single != rounded_once(one)).mean() > 0.1


FORMS: dict[str, tuple[Callable[..., Any], Callable[[], Path]]] = {
    "gguf": (convert, lambda: tiny.gguf_model("llama")),
    "onnx": (convert_onnx, lambda: tiny.onnx_model("llama")),
}


def served(path: Path) -> dict[str, np.ndarray]:
    """Every matrix that an artifact or a base stores, (out, in), as other readers have it."""
    if path.suffix == ".gguf":
        return {
            tensor.name: np.array(tensor.data)
            for tensor in gguf.GGUFReader(str(path)).tensors
            if len(tensor.shape) == 2
        }
    return {
        tensor.name: numpy_helper.to_array(tensor).T
        for tensor in onnx.load(path).graph.initializer
        if len(tensor.dims) == 2
    }


@pytest.mark.parametrize("target", FORMS)
def test_a_float_merge_adds_this_very_delta(target: str, tmp_path: Path) -> None:
    fold, base = FORMS[target]
    adapter = tiny.peft_adapter("llama", tmp_path / "adapter", scale=0.05)
    manifest = fold(adapter, base(), tmp_path / "out", form="merged", check=False)
    name = "model.gguf" if target == "gguf" else "model.onnx"
    before = served(base() if target == "gguf" else base() / name)
    after = served(tmp_path / "out" / name)
    modules = {one.name: one for one in read_adapter(adapter).modules}
    for entry in manifest.modules:
        weight, rows = entry.tensor, slice(None)
        if found := re.fullmatch(r"(.+)\[(\d+):(\d+)\]", weight):
            weight, rows = found[1], slice(int(found[2]), int(found[3]))
        order: Any = slice(None)
        if target == "gguf":
            heads = {"q_proj": tiny.N_HEAD, "k_proj": tiny.N_HEAD_KV}
            order = (
                TABLE["llama"]
                .transform(entry.module, *heads.values())
                .apply_rows(np.arange(entry.shape[0]))
            )
        delta = formula.delta(modules[entry.module], order)
        assert np.array_equal(after[weight][rows], before[weight][rows] + delta)
    assert len(manifest.modules) == len(modules) == 6


@pytest.mark.parametrize("form", ["sidecar", "branch"])
def test_survival_is_measured_against_this_very_delta(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a delta of twice the strength, half of it is in the factors."""
    adapter = tiny.peft_adapter("llama", tmp_path / "adapter", scale=0.05)
    true = formula.delta
    monkeypatch.setattr(formula, "delta", lambda *given: 2 * true(*given))
    loose = Bounds(0, 9, 9)
    if form == "sidecar":
        base, options = tiny.gguf_model("llama"), {"type": "f16"}
        made = convert(adapter, base, tmp_path / "out", form="sidecar", check=False, bounds=loose,
                       **options)  # type: ignore[arg-type]  # fmt: skip
    else:
        base = tiny.onnx_model("llama", "fp16")
        made = convert_onnx(
            adapter, base, tmp_path / "out", form="branch", check=False, bounds=loose
        )
    gains = [entry.survival["gain"] for entry in made.modules]  # type: ignore[index]
    assert gains == pytest.approx([0.5] * 6, abs=1e-3)


def test_the_two_scalings() -> None:
    assert formula.scaling(16, 8, False) == 0.5
    assert formula.scaling(16, 8, True) == 2.0
