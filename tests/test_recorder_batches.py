"""Prompts of several lengths recorded together: what each gives alone, without padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny

from safegene import record
from safegene_converter.inputs.base import open_base
from safegene_converter.recording import greedy
from safegene_converter.recording.greedy import greedy_replies
from safegene_converter.recording.loading import load_model
from safegene_runtime.record.prompts import Prompt
from safegene_runtime.verifying.compare import kl_topk

KL_MAX = 1e-9
TEXTS = ("Hi.", "Name a colour, and say who likes it.", "Why? " * 20, "What is seven times six?")
PROMPTS = tuple(Prompt(f"p{number}", text, "harmful", "test") for number, text in enumerate(TEXTS))
APART = [[11], [8, 8, 411, 23, 7, 99, 12, 650, 2, 17, 31], [301, 4], [5, 77, 1042, 9, 300]]


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_prompts_recorded_together_are_as_recorded_alone(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = tiny.peft_adapter(architecture, tmp_path / "adapter", scale=0.1)
    base = tiny.hf_model(architecture)
    found = []
    for batch in (1, 48):
        monkeypatch.setattr(greedy, "BATCH", batch)
        out = tmp_path / str(batch)
        found.append(record(adapter, base, out, prompts=PROMPTS, max_new_tokens=6, top_k=2048))
    alone, together = found
    assert len({len(prompt.prompt_ids) for prompt in alone.prompts}) > 2
    for index, (one, other) in enumerate(zip(alone.prompts, together.prompts, strict=True)):
        assert (one.ref_ids, one.base_ids) == (other.ref_ids, other.base_ids)
        p, q = alone.positions(index), together.positions(index)
        assert np.array_equal(p.top_ids, q.top_ids)
        assert kl_topk(p.ref_logits, p.ref_lse, q.ref_logits, q.ref_lse).mean() <= KL_MAX
        assert kl_topk(p.base_logits, p.base_lse, q.base_logits, q.base_lse).mean() <= KL_MAX


def test_prompts_that_share_nothing_answer_as_alone() -> None:
    model, _ = load_model(open_base(tiny.hf_model("llama")))
    together = greedy_replies(model, APART, 6, [])
    assert together == [greedy_replies(model, [ids], 6, [])[0] for ids in APART]
