"""A surveyed family, folded: what llama.cpp computes beside what PyTorch and PEFT compute."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import tiny
from test_exactness import PROMPTS, REPLY_TOKENS, compared

from safegene import convert, record
from safegene_converter.inputs.base import open_base

FORMS = ("sidecar", "merged")


@dataclass(frozen=True)
class Folded:
    """What came out.

    Attributes:
        kl: form -> mean KL to PyTorch + PEFT, in nats.
        same_replies: form -> whether greedy replies are the same, id for id.
        without: mean KL of the plain base to PyTorch + PEFT: what the adapter does.
    """

    kl: dict[str, float]
    same_replies: dict[str, bool]
    without: float


def every_module(base: Path) -> str:
    """What target_modules calls all of a base that PEFT takes for a linear module.

    It refuses a Mamba's output, for its kernels, and makes parameters of experts of ERNIE's dense layers.
    """
    opened = open_base(base)
    left = ("mamba.out_proj", "mlp.") if opened.architecture == "ernie4_5-moe" else "mamba.out_proj"
    parts = {place.part for module in opened.shapes if (place := opened.row.parse(module))}
    parts = {part for part in parts if not part.startswith(left)}
    return rf"{re.escape(opened.row.blocks)}\.\d+\.({'|'.join(sorted(parts))})"


def folded(family: str, folder: Path) -> Folded:
    """Folds an adapter on every module, of two ranks, under rsLoRA, in both forms."""
    base, gguf = tiny.hf_model(family), tiny.gguf_model(family)
    adapter = tiny.peft_adapter(
        family, folder / "adapter", scale=0.1, target_modules=every_module(base), use_rslora=True,
        rank_pattern={r".*\.1\..*": 2},
    )  # fmt: skip
    reference = record(
        adapter, base, folder / "reference", prompts=PROMPTS, max_new_tokens=REPLY_TOKENS
    )
    found = {}
    for form in FORMS:
        convert(adapter, gguf, folder / form, form=form, check=False)
        merged = form == "merged"
        model = folder / form / "model.gguf" if merged else gguf
        found[form] = compared(reference, model, None if merged else folder / form / "adapter.gguf")
    without, _ = compared(reference, gguf, None)
    return Folded(
        {form: kl for form, (kl, _) in found.items()},
        {form: same for form, (_, same) in found.items()},
        without,
    )
