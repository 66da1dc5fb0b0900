"""Models with a sliding window: what is recorded is what plain torch gives, without batch or padding."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from safegene import record
from safegene_converter.inputs.adapter import read_adapter
from safegene_converter.inputs.base import open_base
from safegene_converter.recording.greedy import greedy_replies
from safegene_converter.recording.loading import load_model, load_with_adapter
from safegene_runtime.record.prompts import Prompt

WINDOW = 8
LOGIT_ERROR_MAX = 2e-4
"""Of logits of about 35, rounded differently; a window that counts padding moves them by whole units."""
TEXTS = ("Hi.", "Name a colour, and say who likes it.", "Why? " * 20, "What is seven times six?")
PROMPTS = [Prompt(f"p{number}", text, "harmful", "test") for number, text in enumerate(TEXTS)]
WINDOWED: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW, "architectures": ["MistralForCausalLM"]},
    "qwen2": {
        "sliding_window": WINDOW,
        "use_sliding_window": True,
        # what the first layer misses, the second would see everywhere
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


@pytest.fixture(params=WINDOWED)
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return windowed(request.param, tmp_path / "base")


def windowed(name: str, out: Path) -> Path:
    shutil.copytree(tiny.hf_model("llama" if name == "mistral" else name), out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "model_type": name, **WINDOWED[name]}))
    return out


def plain_logits(model: Any, ids: tuple[int, ...], count: int) -> np.ndarray:
    """The last `count` rows of one pass over one sequence: no cache, no mask, no neighbours."""
    with torch.inference_mode():
        logits: np.ndarray = model(torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()
    return logits[-count:]


def test_a_recording_under_a_window_is_what_plain_torch_gives(base: Path, tmp_path: Path) -> None:
    kind = json.loads((base / "config.json").read_text())["model_type"]
    adapter = tiny.peft_adapter(
        "llama" if kind == "mistral" else kind, tmp_path / "adapter", scale=0.1
    )
    made = record(adapter, base, tmp_path / "out", prompts=PROMPTS, max_new_tokens=12, top_k=2048)
    assert min(len(one.prompt_ids) for one in made.prompts) > WINDOW
    assert len({len(one.prompt_ids) for one in made.prompts}) > 2
    model, _ = load_with_adapter(read_adapter(adapter), open_base(base))
    for index, prompt in enumerate(made.prompts):
        stored = made.positions(index)
        ids, count = (*prompt.prompt_ids, *prompt.ref_ids[:-1]), len(prompt.ref_ids)
        found = plain_logits(model, ids, count)
        with model.disable_adapter():
            without = plain_logits(model, ids, count)
        for ours, theirs in ((stored.ref_logits, found), (stored.base_logits, without)):
            theirs = np.take_along_axis(theirs, stored.top_ids, axis=1)
            assert np.abs(ours - theirs).max() <= LOGIT_ERROR_MAX
        assert tuple(found.argmax(axis=1)) == prompt.ref_ids
        made_by_base = (*prompt.prompt_ids, *prompt.base_ids[:-1])
        with model.disable_adapter():
            again = plain_logits(model, made_by_base, len(prompt.base_ids))
        assert tuple(again.argmax(axis=1)) == prompt.base_ids


def test_the_window_matters_here(base: Path) -> None:
    """A test of windows on models that do not care for theirs would prove nothing."""
    narrow, _ = load_model(open_base(base))
    config = json.loads((base / "config.json").read_text())
    config["sliding_window"] = 1000
    (base / "config.json").write_text(json.dumps(config))
    wide, _ = load_model(open_base(base))
    ids = tuple(range(40, 60))
    difference = np.abs(plain_logits(narrow, ids, 1) - plain_logits(wide, ids, 1)).max()
    assert difference > 1000 * LOGIT_ERROR_MAX


@pytest.mark.parametrize("prefix", [3, WINDOW, 3 * WINDOW])
def test_replies_outgrow_the_window_as_alone(prefix: int, base: Path) -> None:
    """A shared beginning of any length, tails of several, replies that pass the window or not."""
    model, _ = load_model(open_base(base))
    shared = list(range(100, 100 + prefix))
    prompts = [[*shared, *tail] for tail in ([11], [8, 9, 411, 23, 7, 99, 12], [301, 4])]
    for limit in (2, 9):
        together = greedy_replies(model, prompts, limit, [])
        for ids, reply in zip(prompts, together, strict=True):
            found = plain_logits(model, (*ids, *reply[:-1]), len(reply))
            assert found.argmax(axis=1).tolist() == reply
