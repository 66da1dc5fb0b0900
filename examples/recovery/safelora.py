"""Safe LoRA (Hsu et al. 2024, arXiv 2405.16833), from its paper.

The alignment matrix of a module is V = W_aligned - W_unaligned; C = V V^T / ||V||_F is its cheap
projector (equation 3 there). A fine-tune's dW = B A is replaced by C dW where the two point apart:

    cos(dW, C dW) < tau

Here V is the alignment's own LoRA, so C is applied through its factors; B becomes C B, A stays.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from safegene_converter import formula
from safegene_converter.inputs.adapter import read_adapter

TAU = 0.35
"""The threshold of the paper's experiments on Llama-2."""


def project(tuned: Any, alignment: Path, tau: float = TAU) -> int:
    """Projects a PEFT model's LoRA onto the alignment, in place; returns how many modules."""
    modules = {module.name: module for module in read_adapter(alignment).modules}
    projected = 0
    with torch.no_grad():
        for name, layer in tuned.named_modules():
            module = modules.get(name.removeprefix("base_model.model."))
            if module is None or not isinstance(layer, LoraLayer):
                continue
            v = torch.from_numpy(formula.delta(module)).double()
            b = layer.lora_B["default"].weight.double()
            a = layer.lora_A["default"].weight.double()
            moved = v @ (v.T @ b) / v.norm()
            before, after = b @ a, moved @ a
            if (
                torch.nn.functional.cosine_similarity(before.flatten(), after.flatten(), dim=0)
                < tau
            ):
                layer.lora_B["default"].weight.copy_(moved.float())
                projected += 1
    return projected
