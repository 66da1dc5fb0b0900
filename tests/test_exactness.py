"""Exact paths: PyTorch + PEFT and llama.cpp compute the same model, whatever shape the adapter has.

The reference is PEFT's forward pass, recorded; nothing of our formula is in it. What is compared is
what stock llama.cpp computes from the files we wrote, in F32 with an F32 KV cache.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from safegene import convert, record
from safegene_runtime.engines.llama import LlamaEngine
from safegene_runtime.record.prompts import Prompt
from safegene_runtime.record.reference import Reference
from safegene_runtime.verifying.forced import forced_passes

PROMPTS = tuple(
    Prompt(f"p{number}", text, "harmful", "test")
    for number, text in enumerate(
        ("Name a colour.", "Write two words about rain.", "What is seven times six?")
    )
)
KL_MAX = 1e-8
REPLY_TOKENS = 6

VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "rank_pattern": {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 8}},
    "alpha_pattern": {"alpha_pattern": {"k_proj": 32, r"layers\.0\.self_attn\.q_proj": 1}},
    "patterns under rslora": {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"up_proj": 3},
    },
    "layer subset": {"layers_to_transform": [1]},
    "every module": {
        "target_modules": [
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        ]
    },
}  # fmt: skip


def with_coefficients(adapter: Path, architecture: str) -> Path:
    """Adds a safegene.json with a coefficient of its own for every layer."""
    layers = range(tiny.n_layers(architecture))
    own = (0.37, 2.9, 1.6, -0.8)
    (adapter / "safegene.json").write_text(
        json.dumps(
            {
                "format_version": 1,
                "base_model": {
                    "name": "tiny",
                    "architecture": architecture,
                    "n_layers": len(layers),
                },
                "selected_layers": list(layers),
                "default_expression": "default",
                "expressions": {
                    "default": {"coefficients": {str(n): own[n] for n in layers}},
                    "other": {"coefficients": {str(n): (-1.0) ** n for n in layers}},
                },
            }
        )
    )
    return adapter


def compared(reference: Reference, model: Path, adapter: Path | None) -> tuple[float, bool]:
    """Mean KL from the reference, and whether every greedy reply is the reference's, id for id."""
    stop_ids = reference.meta["decoding"]["stop_ids"]
    with LlamaEngine(model, adapter, threads=1) as engine:
        passes = forced_passes(engine, reference)
        asked = [prompt.prompt_ids for prompt in reference.prompts]
        replies = engine.generate(asked, REPLY_TOKENS, stop_ids)
    same = [tuple(reply) for reply in replies] == [one.ref_ids for one in reference.prompts]
    return float(np.mean(np.concatenate([one.kl for one in passes]))), same


def check_exact(adapter: Path, architecture: str, folder: Path, expression: str | None) -> None:
    base = tiny.gguf_model(architecture)
    reference = record(
        adapter,
        tiny.hf_model(architecture),
        folder / "reference",
        prompts=PROMPTS,
        max_new_tokens=REPLY_TOKENS,
        expression=expression,
    )
    convert(adapter, base, folder / "sidecar", form="sidecar", expression=expression, check=False)
    convert(adapter, base, folder / "merged", form="merged", expression=expression, check=False)
    sidecar = compared(reference, base, folder / "sidecar" / "adapter.gguf")
    merged = compared(reference, folder / "merged" / "model.gguf", None)
    without, _ = compared(reference, base, None)
    for kl, same_replies in (sidecar, merged):
        assert abs(kl) <= KL_MAX
        assert same_replies
    assert without > 1000 * KL_MAX, "the adapter must matter, or nothing was compared"


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_what_peft_computes(variant: str, tmp_path: Path) -> None:
    adapter = tiny.peft_adapter("llama", tmp_path / "adapter", scale=0.1, **VARIANTS[variant])
    check_exact(adapter, "llama", tmp_path, None)


@pytest.mark.parametrize("architecture", tiny.OTHERS)
def test_other_architectures_are_as_exact(architecture: str, tmp_path: Path) -> None:
    adapter = tiny.peft_adapter(
        architecture, tmp_path / "adapter", scale=0.1, **VARIANTS["patterns under rslora"]
    )
    check_exact(with_coefficients(adapter, architecture), architecture, tmp_path, None)


@pytest.mark.parametrize("expression", [None, "other"])
def test_coefficients_of_the_chosen_expression_are_applied(
    expression: str | None, tmp_path: Path
) -> None:
    adapter = with_coefficients(
        tiny.peft_adapter("llama", tmp_path / "adapter", scale=0.1), "llama"
    )
    check_exact(adapter, "llama", tmp_path, expression)
