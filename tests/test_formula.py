"""dW = c * s * B A, against PEFT's own arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from safegene_converter import formula
from safegene_converter.inputs.adapter import Module, read_adapter


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


def test_the_two_scalings() -> None:
    assert formula.scaling(16, 8, False) == 0.5
    assert formula.scaling(16, 8, True) == 2.0
