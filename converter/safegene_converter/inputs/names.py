"""From a Hugging Face module name to the GGUF tensor that holds its weight, and in which row order.

The names are gguf-py's (a test compares them for every architecture: importing gguf-py costs as much
as reading a model's header); row orders are in `safegene_runtime.architecture.row_order`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_runtime.architecture.row_order import (
    ARCHITECTURES,
    Transform,
    check_architecture,
    transform_for,
)
from safegene_runtime.errors import BaseModelError, Problem, UnsupportedError

__all__ = [
    "ARCHITECTURES",
    "BLOCK_MODULES",
    "Transform",
    "architecture_of_config",
    "check_architecture",
    "gguf_name",
    "module_name",
    "prove_transform",
    "transform_for",
]

_HF_CLASSES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "llama",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}

BLOCK_TENSORS: Mapping[str, str] = {
    "self_attn.q_proj": "attn_q.weight",
    "self_attn.k_proj": "attn_k.weight",
    "self_attn.v_proj": "attn_v.weight",
    "self_attn.o_proj": "attn_output.weight",
    "mlp.gate_proj": "ffn_gate.weight",
    "mlp.up_proj": "ffn_up.weight",
    "mlp.down_proj": "ffn_down.weight",
}
"""Linear module of a block -> its tensor, the same in every architecture of `ARCHITECTURES`."""

BLOCK_MODULES = tuple(BLOCK_TENSORS)

_BLOCK_MODULE_OF = {tensor: module for module, tensor in BLOCK_TENSORS.items()}
_MODULE = re.compile(r"model\.layers\.(0|[1-9][0-9]*)\.(.+)")
_TENSOR = re.compile(r"blk\.(0|[1-9][0-9]*)\.(.+)")


def architecture_of_config(config: Mapping[str, Any], where: str) -> str:
    """The GGUF architecture of a Hugging Face config.json.

    Raises:
        UnsupportedError: a model class we do not know; the message names it.
    """
    classes = config.get("architectures")
    one = classes[0] if isinstance(classes, list) and len(classes) == 1 else None
    if not isinstance(one, str) or one not in _HF_CLASSES:
        raise UnsupportedError(
            Problem(
                where,
                "architectures",
                f"one of {', '.join(_HF_CLASSES)}",
                str(classes),
                "this architecture is not supported yet",
            )
        )
    return _HF_CLASSES[one]


def gguf_name(architecture: str, module: str) -> str:
    """The GGUF tensor of a module's weight: `model.layers.2.mlp.up_proj` -> `blk.2.ffn_up.weight`.

    Raises:
        UnsupportedError: not a linear module of a block, or an architecture we do not know.
    """
    check_architecture(architecture, module)
    match = _MODULE.fullmatch(module)
    if not match or match[2] not in BLOCK_MODULES:
        raise UnsupportedError(
            Problem(
                module,
                "module",
                f"model.layers.N. and one of {', '.join(BLOCK_MODULES)}",
                module,
                "embeddings, lm_head, norms and experts are not supported yet",
            )
        )
    return f"blk.{match[1]}.{BLOCK_TENSORS[match[2]]}"


def module_name(architecture: str, tensor: str) -> str | None:
    """The inverse of `gguf_name`; None for a tensor that is no linear weight of a block."""
    match = _TENSOR.fullmatch(tensor)
    if not match:
        return None
    check_architecture(architecture, tensor)
    module = _BLOCK_MODULE_OF.get(match[2])
    return f"model.layers.{match[1]}.{module}" if module else None


def prove_transform(
    w_hf: npt.NDArray[np.float32], w_gguf: npt.NDArray[np.float32], transform: Transform
) -> float:
    """||T(W_hf) - W_gguf|| / ||W_hf||, both (out, in): small only if the transform is right.

    What remains is the rounding of the GGUF's type: 0 for F32, about 0.1 for 4-bit types; a wrong
    row order gives about 1.4.

    Raises:
        BaseModelError: the shapes differ.
    """
    if w_hf.shape != w_gguf.shape:
        raise BaseModelError(
            Problem("base", "shape", str(w_hf.shape), str(w_gguf.shape), "are both the same model?")
        )
    error = norm = 0.0
    moved = transform.apply_rows(w_hf)
    for start in range(0, len(moved), 256):
        ours = moved[start : start + 256].astype(np.float64).reshape(-1)
        theirs = w_gguf[start : start + 256].astype(np.float64).reshape(-1)
        norm += float(ours @ ours)
        ours -= theirs
        error += float(ours @ ours)
    return float(np.sqrt(error / norm)) if norm else float(error > 0)
