"""An adapter as PEFT reads it onto a text model, where the folder itself is something else."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.numpy import save_file

from safegene_converter.inputs.adapter import Adapter
from safegene_converter.inputs.adapter_files import CONFIG_NAME, WEIGHTS_NAME

__all__ = ["as_peft_reads"]


@contextlib.contextmanager
def as_peft_reads(adapter: Adapter) -> Iterator[Path]:
    """Yields the adapter's folder; for shards and other models' names, a copy in one file.

    PEFT reads no shards, and misses names of a compiled model, or of one with more parts. The copy
    names each module of the text model, with the rank and alpha that PEFT gave it in training.
    """
    if adapter.is_as_peft_reads:
        yield adapter.path
        return
    tensors, ranks, alphas = dict[str, Any](), dict[str, int](), dict[str, float]()
    for module in adapter.modules:
        tensors[f"base_model.model.{module.name}.lora_A.weight"] = module.a
        tensors[f"base_model.model.{module.name}.lora_B.weight"] = module.b
        ranks[module.name], alphas[module.name] = module.rank, module.alpha
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "target_modules": list(ranks),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "use_rslora": adapter.settings.use_rslora,
        "inference_mode": True,
    }
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / CONFIG_NAME).write_text(json.dumps(config))
        save_file(tensors, Path(folder) / WEIGHTS_NAME, metadata={"format": "pt"})
        yield Path(folder)
