"""LoRA training on prompt and reply pairs, small enough for a laptop's CPU.

Logits on label positions only; bf16 autocast where the processor multiplies bf16 natively (elsewhere
it is emulated and slower than float32). A kill loses at most SAVE_EVERY steps.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

from safegene_converter.gene.model import Example, batches_of, label_logits
from safegene_runtime.errors import GeneError, Problem
from safegene_runtime.formats.publish import publish_folder

BATCH = 8
SAVE_EVERY = 10
CHECK_EVERY = 5
WARM_UP = 5
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def has_bf16() -> bool:
    """Whether bf16 products are native here."""
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    return "amx_bf16" in flags or "avx512_bf16" in flags


def train_lora(
    model: Any,
    examples: Sequence[Example],
    out: Path,
    *,
    steps: int,
    seed: int,
    rank: int = 8,
    rate: float = 1e-3,
    batch: int = BATCH,
    warm_up: int = WARM_UP,
    until: Callable[[Any], bool] | None = None,
    check_every: int = CHECK_EVERY,
    tell: Callable[[str, int, int], None],
) -> Any:
    """Trains a LoRA on all linear modules and publishes it as `out`; returns the wrapped model.

    `until` is asked every `check_every` steps whether the model is as wanted already.

    Raises:
        GeneError: the loss became NaN.
    """
    torch.manual_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=MODULES)
    tuned = get_peft_model(model, config)
    parameters = [p for p in tuned.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    order = random.Random(seed)
    batches = [
        batches_of([examples[i] for i in order.sample(range(len(examples)), batch)], batch)[0]
        for _ in range(steps)
    ]
    saved = out.with_name(f".{out.name}.training.pt")
    first = 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        first = state["step"]
        optimiser.load_state_dict(state["optimiser"])
        with torch.no_grad():
            for parameter, value in zip(parameters, state["parameters"], strict=True):
                parameter.copy_(value)
    tuned.train()
    for step in range(first, steps):
        for group in optimiser.param_groups:
            done = step / steps
            group["lr"] = (
                rate * min(1, (step + 1) / warm_up) * (0.1 + 0.9 * math.cos(done * math.pi / 2))
            )
        taken = batches[step]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=has_bf16()):
            logits = label_logits(tuned, taken)
        loss = torch.nn.functional.cross_entropy(logits, taken.labels)
        if not torch.isfinite(loss):
            raise GeneError(Problem(out.name, "loss", "a finite number", str(float(loss))))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        tell(f"training {out.name} (loss {float(loss.detach()):.3f})", step + 1, steps)
        if until is not None and (step + 1) % check_every == 0:
            tuned.eval()
            is_done = until(tuned)
            tuned.train()
            if is_done:
                break
        # behind the question: training that goes on must not skip it
        if (step + 1) % SAVE_EVERY == 0:
            state = {
                "step": step + 1,
                "optimiser": optimiser.state_dict(),
                "parameters": [p.detach().clone() for p in parameters],
            }
            partial = saved.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(saved)
    tuned.eval()
    with publish_folder(out) as folder:
        tuned.save_pretrained(folder)
        (folder / "README.md").unlink(missing_ok=True)
    saved.unlink(missing_ok=True)
    return tuned
