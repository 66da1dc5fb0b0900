"""Exact paths: PyTorch + PEFT and ONNX Runtime compute the same model, in all three forms.

The reference is PEFT's forward pass, recorded; the base graph is the onnxruntime-genai builder's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from onnx_tools import FORMS, convert_onnx
from test_exactness import PROMPTS, VARIANTS, with_coefficients

from safegene import record
from safegene_runtime.engines.ort import OrtEngine
from safegene_runtime.errors import BaseModelError
from safegene_runtime.record.reference import Reference
from safegene_runtime.verifying.forced import forced_passes

KL_MAX = 1e-6
SAME_LOGITS = 2e-4
"""Forms differ in the order of sums only; logits of these models are around 10."""


def answers(reference: Reference, folder: Path) -> tuple[float, list[list[int]], np.ndarray]:
    """(mean KL, greedy replies, teacher-forced logits of the first prompt)."""
    adapter = folder / "adapter.onnx_adapter"
    with OrtEngine(
        folder / "model.onnx", adapter if adapter.exists() else None, threads=1
    ) as engine:
        passes = forced_passes(engine, reference)
        replies = engine.generate(
            [prompt.prompt_ids for prompt in reference.prompts],
            reference.meta["decoding"]["max_new_tokens"],
            reference.meta["decoding"]["stop_ids"],
        )
        first = reference.prompts[0]
        ids = [*first.prompt_ids, *first.ref_ids]
        _, logits = next(iter(engine.logits([ids], [len(ids)])))
    return float(np.mean(np.concatenate([one.kl for one in passes]))), replies, logits.copy()


def check_exact(
    adapter: Path, architecture: str, folder: Path, base: Path, expression: str | None = None
) -> None:
    reference = record(
        adapter,
        tiny.hf_model(architecture),
        folder / "reference",
        prompts=PROMPTS,
        max_new_tokens=6,
        expression=expression,
    )
    found = {}
    for form in FORMS:
        out = folder / "out" / form
        convert_onnx(adapter, base, out, form=form, expression=expression, check=False)
        kl, replies, found[form] = answers(reference, out)
        assert abs(kl) <= KL_MAX, form
        assert replies == [list(prompt.ref_ids) for prompt in reference.prompts], form
    assert np.abs(found["merged"] - found["branch"]).max() <= SAME_LOGITS
    assert np.abs(found["merged"] - found["adapter"]).max() <= SAME_LOGITS
    without, _, _ = answers(reference, base)
    assert without > 100 * KL_MAX, "the adapter must matter, or nothing was compared"


def test_a_builder_that_is_wrong_about_a_family_is_found_out(tmp_path: Path) -> None:
    """onnxruntime-genai 0.18 builds an OLMo without an error, and computes another model."""
    adapter = tiny.peft_adapter("olmo", tmp_path / "adapter")
    with pytest.raises(BaseModelError, match="logits of the plain base"):
        convert_onnx(adapter, tiny.hf_model("olmo"), tmp_path / "out", form="merged")


@pytest.mark.parametrize("variant", VARIANTS)
def test_onnx_runtime_computes_what_peft_computes(variant: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = VARIANTS[variant]
    adapter = tiny.peft_adapter("llama", tmp_path / "adapter", scale=0.1, **settings)
    check_exact(adapter, "llama", tmp_path, tiny.onnx_model("llama"))


@pytest.mark.parametrize("architecture", [*tiny.OTHERS, "gemma", "granite", "ernie4_5", "hunyuan"])
def test_other_architectures_are_as_exact(architecture: str, tmp_path: Path) -> None:
    adapter = tiny.peft_adapter(
        architecture, tmp_path / "adapter", scale=0.1, **VARIANTS["patterns under rslora"]
    )
    base = tiny.float_onnx_model(architecture)
    if architecture in tiny.ARCHITECTURES:  # safegene.json has llama.cpp's name for it
        with_coefficients(adapter, architecture)
    check_exact(adapter, architecture, tmp_path, base)


def test_coefficients_of_the_chosen_expression_are_applied(tmp_path: Path) -> None:
    adapter = with_coefficients(
        tiny.peft_adapter("llama", tmp_path / "adapter", scale=0.1), "llama"
    )
    check_exact(adapter, "llama", tmp_path, tiny.onnx_model("llama"), "other")


@pytest.mark.parametrize("options", [["fuse_qkv=false"], ["fuse_mlp_gate_up=true"]])
def test_packed_and_separate_projections_are_the_same_model(
    options: list[str], tmp_path: Path
) -> None:
    adapter = tiny.peft_adapter(
        "llama", tmp_path / "adapter", scale=0.1, **VARIANTS["every module"]
    )
    check_exact(adapter, "llama", tmp_path, tiny.onnx_model("llama", "fp32", *options))


@pytest.mark.parametrize("exporter", ["torchscript", "dynamo"])
def test_exports_of_torch_onnx_are_as_exact(exporter: str, tmp_path: Path) -> None:
    adapter = tiny.peft_adapter(
        "llama", tmp_path / "adapter", scale=0.1, **VARIANTS["every module"]
    )
    check_exact(adapter, "llama", tmp_path, tiny.exported_model("llama", exporter))
