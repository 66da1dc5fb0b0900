"""The self-check accepts what rounding explains, whatever the type, and no other delta than meant."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import tiny

from safegene import convert
from safegene_converter.fold.effect import effect
from safegene_converter.fold.survival import Bounds
from safegene_converter.gguf import convert as to_gguf
from safegene_converter.gguf.fold import GGUFFold, Made
from safegene_converter.gguf.presets import quantize_gguf
from safegene_converter.inputs.adapter import read_adapter
from safegene_runtime.errors import PostconditionError, Problems

EVERY = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SAID = "delta in the weights|effect on the logits|bit for bit"
CASES = {  # columns, type of the base, --type, scale of the factors
    "f32": (64, "f32", "auto", 0.02),
    "bf16, a small delta": (64, "bf16", "auto", 0.012),
    "q8_0": (256, "f32", "q8_0", 0.02),
    "q4_k_m": (256, "f32", "q4_k_m", 0.02),
    "q2_k": (256, "f32", "q2_k", 0.02),
    "q4_1": (256, "q4_1", "auto", 0.02),
}


def scaled(adapter: Path, out: Path, by: float) -> Path:
    """The same adapter with every coefficient `by`."""
    out.mkdir()
    for file in adapter.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    notes = {
        "format_version": 1,
        "base_model": {"name": "tiny", "architecture": "llama", "n_layers": 2},
        "selected_layers": [0, 1],
        "default_expression": "default",
        "expressions": {"default": {"coefficients": {"0": by, "1": by}}},
    }
    (out / "safegene.json").write_text(json.dumps(notes))
    return out


@pytest.mark.parametrize("case", CASES)
def test_only_the_adapters_own_delta_passes(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Artifacts made from a scaled adapter, checked against the adapter itself."""
    hidden, stored, type_name, scale = CASES[case]
    base = tiny.gguf_model("llama", hidden)
    if stored != "f32":
        quantize_gguf(base, tmp_path / "base.gguf", stored)
        base = tmp_path / "base.gguf"
    meant = tiny.peft_adapter(
        "llama", tmp_path / "meant", hidden=hidden, scale=scale, target_modules=EVERY
    )
    check = to_gguf._check

    def check_as_meant(job: GGUFFold, folder: Path, work: Path, made: Made) -> object:
        as_meant = dataclasses.replace(job, adapter=read_adapter(meant), bounds=Bounds())
        return check(as_meant, folder, work, made)

    monkeypatch.setattr(to_gguf, "_check", check_as_meant)
    anything = Bounds(0, 1e9, 1e9, 1e9)  # 1e-3 is all but nothing, and is to get to the check
    for number, by in enumerate((1.0, 0.5, 2.0, -1.0, 1e-3)):
        with contextlib.nullcontext() if by == 1 else pytest.raises(PostconditionError, match=SAID):
            convert(
                scaled(meant, tmp_path / f"by{number}", by), base, tmp_path / "out", form="merged",
                type=type_name, force=True, bounds=None if by == 1 else anything,
            )  # fmt: skip


def test_what_rounding_adds_widens_the_band_and_nothing_else_does() -> None:
    random = np.random.default_rng(0)
    base = random.standard_normal((20, 500))
    moved = base + 0.1 * random.standard_normal(base.shape)
    noise = 0.3 * random.standard_normal(base.shape)

    def found(artifact: np.ndarray) -> int:
        problems = Problems()
        effect(0.01, base, moved, artifact, "x", problems)
        return len(problems)

    assert found(moved) == found(moved + noise) == 0
    for share in (0.9, 0.5, 2, -1):
        assert found(base + share * (moved - base)) == 1
    assert found(base) == 1
