"""Adapters of MLX-LM: `adapters.safetensors`, and an adapter_config.json with `lora_parameters`.

    y = W x + scale · (x A) B,  A (in, r), B (r, out)       mlx_lm/tuner/lora.py

so PEFT's factors are the transposes, and its alpha is scale · r.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_runtime.errors import Problems

__all__ = ["ADAPTERS_NAME", "is_mlx", "plain_from_mlx"]

ADAPTERS_NAME = "adapters.safetensors"
_KEY = re.compile(r"(.+)\.lora_([ab])")

Tensors = dict[str, npt.NDArray[np.float32]]


def is_mlx(config: Any) -> bool:
    """Whether a configuration is MLX-LM's."""
    return isinstance(config, dict) and "lora_parameters" in config and "peft_type" not in config


def plain_from_mlx(
    config: Mapping[str, Any], tensors: Mapping[str, Any], where: str, problems: Problems
) -> tuple[dict[str, Any], Tensors]:
    """The configuration and the tensors as PEFT has them; what cannot be carried goes to `problems`."""
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        problems.add(where, "fine_tune_type", "lora", repr(kind)[:100],
                     "fuse it with mlx_lm.fuse, and use the result as the base")  # fmt: skip
    given = config["lora_parameters"]
    given = given if isinstance(given, dict) else {}
    rank, scale = given.get("rank", 0), given.get("scale", 0)
    for name, value in (("rank", rank), ("scale", scale)):
        if type(value) not in (int, float) or not value > 0:
            problems.add(where, f"lora_parameters.{name}", "a number above 0", repr(value)[:100],
                         "restore the file that was saved with these weights")  # fmt: skip
    if "alpha" in given:
        problems.add(
            where, "lora_parameters.alpha", "none", repr(given["alpha"])[:100],
            "versions before mid-2024 multiplied scale by alpha / rank, later ones ignore it: write the "
            "product that was trained with into scale, and remove alpha",
        )  # fmt: skip
    found, modules = Tensors(), dict[str, None]()
    for key, values in tensors.items():
        named = _KEY.fullmatch(key)
        if named is None or values.ndim != 2:
            problems.add(where, key, "lora_a (in, r) and lora_b (r, out) of linear modules",
                         f"another tensor, of shape {values.shape}",
                         "fuse it with mlx_lm.fuse, and use the result as the base")  # fmt: skip
            continue
        modules[named[1]] = None
        found[f"base_model.model.{named[1]}.lora_{named[2].upper()}.weight"] = values.T
    if problems:
        return {}, {}
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True,
        "base_model_name_or_path": config.get("model"), "target_modules": list(modules), "r": rank,
        "lora_alpha": scale * rank, "lora_dropout": 0.0, "bias": "none",
    }, found  # fmt: skip
