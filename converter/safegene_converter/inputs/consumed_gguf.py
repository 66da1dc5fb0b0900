"""What transformers' loader reads of a GGUF, by name: every tensor and key that bears on the result.

The loader leaves out what it does not know: biases that its default configuration has not, the scaling of
the rotary embedding, the size of a head. What can be told to it is told (`gguf_config`), the rest refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from safegene_runtime.architecture.table import TABLE
from safegene_runtime.errors import BaseModelError, Problems
from safegene_runtime.formats.gguf.model import GGUFModel

__all__ = ["check_gguf_for_torch", "gguf_config"]

_PASS_FOLDER = "pass the Hugging Face folder that it was made from"

_READ = frozenset({
    "context_length", "block_count", "feed_forward_length", "embedding_length", "rope.freq_base",
    "attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon",
    "vocab_size", "rope.dimension_count", "attention.key_length", "attention.value_length",
    "expert_count", "expert_used_count", "attention.causal", "tensor_data_layout",
})  # fmt: skip
"""Keys below `<architecture>.` that transformers reads, or that `gguf_config` hands it, or checked here."""
_WITHOUT_EFFECT: Mapping[str, tuple[Any, ...]] = {
    "rope.scaling.type": ("none",),
    "rope.scaling.factor": (0.0, 1.0),
    "pooling_type": (0,),
}


def _block(architecture: str) -> dict[str, str]:
    """Tensor of a block, without `.weight` -> its module."""
    tensors = TABLE[architecture].tensors
    return {tensor.removesuffix(".weight"): module for module, tensor in tensors.items()}


def _expected(architecture: str, n_layers: int, switched: Mapping[str, bool]) -> set[str]:
    kind, blocks = TABLE[architecture].classes[0], _block(architecture)
    biased = {*kind.biased}
    for key, modules in kind.switches.items():
        biased |= set(modules) if switched[key] else set()
    names = {"token_embd.weight", "output_norm.weight"}
    for layer in range(n_layers):
        at = f"blk.{layer}."
        names |= {f"{at}attn_norm.weight", f"{at}ffn_norm.weight"}
        names |= {f"{at}{one}.weight" for one in blocks}
        names |= {f"{at}{one}.bias" for one, module in blocks.items() if module in biased}
        names |= {f"{at}attn_{one}_norm.weight" for one in "qk"} if kind.qk_norm else set()
    return names


def _switched(architecture: str, model: GGUFModel) -> dict[str, bool]:
    """Which biases the configuration has to ask for: those of which one is there."""
    there = {
        module
        for tensor, module in _block(architecture).items()
        if f"blk.0.{tensor}.bias" in model.tensors
    }
    switches = TABLE[architecture].classes[0].switches
    return {key: not there.isdisjoint(modules) for key, modules in switches.items()}


def gguf_config(architecture: str, model: GGUFModel) -> dict[str, Any]:
    """What the GGUF says and transformers' loader does not take from it, as its configuration has it."""
    head = model.get(f"{architecture}.attention.key_length")
    told: dict[str, Any] = dict(_switched(architecture, model))
    if head is not None:
        told["head_dim"] = head
    # a GGUF named "mistral" would otherwise get the window that the configuration has by default
    return {**told, "sliding_window": None}


def check_gguf_for_torch(
    architecture: str, model: GGUFModel, n_layers: int, n_head: int, where: str
) -> None:
    """Refuses a GGUF of which transformers' loader would leave out something.

    Raises:
        BaseModelError: tensors or keys that are not read, or are missing, all of them.
    """
    problems = Problems()
    if not TABLE[architecture].classes[0].listed:
        problems.add(
            where, "general.architecture", "one of which is listed what transformers' GGUF loader reads",
            architecture, _PASS_FOLDER,
        )  # fmt: skip
        problems.raise_if_any(BaseModelError)
    expected = _expected(architecture, n_layers, _switched(architecture, model))
    optional = {"output.weight"}
    for name in sorted(model.tensors.keys() - expected - optional):
        problems.add(
            where, name, "a tensor that transformers' GGUF loader reads",
            "one that it would leave out", _PASS_FOLDER,
        )  # fmt: skip
    for name in sorted(expected - model.tensors.keys()):
        problems.add(where, name, "a tensor", "none: it would start as noise", _PASS_FOLDER)
    prefix = f"{architecture}."
    for key, value in model.metadata.items():
        short = key.removeprefix(prefix)
        if not key.startswith(prefix) or short in _READ:
            continue
        if value.value not in _WITHOUT_EFFECT.get(short, ()):
            problems.add(
                where,
                key,
                "a key that transformers' GGUF loader reads",
                repr(value.value),
                _PASS_FOLDER,
            )
    _check_values(architecture, model, n_head, where, problems)
    problems.raise_if_any(BaseModelError)


def _check_values(
    architecture: str, model: GGUFModel, n_head: int, where: str, problems: Problems
) -> None:
    def get(key: str) -> Any:
        return model.get(f"{architecture}.{key}")

    width = get("embedding_length")
    head = get("attention.key_length")
    if head is None:
        head = width // n_head if type(width) is int and n_head else None
    for key in ("attention.value_length", "rope.dimension_count"):
        if get(key) not in (None, head):
            problems.add(where, key, f"{head}, the size of a head", repr(get(key)), _PASS_FOLDER)
    if get("attention.causal") is False:
        problems.add(where, "attention.causal", "a causal model", False, "this is no decoder")
    for key in ("attention.layer_norm_rms_epsilon", "context_length", "embedding_length"):
        if type(get(key)) not in (int, float):
            problems.add(where, key, "a number", repr(get(key)), _PASS_FOLDER)
