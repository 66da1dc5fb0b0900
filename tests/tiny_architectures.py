"""Tiny models: one for every listed row of the table of architectures, one for every surveyed family.

What transformers is asked for; `tiny` makes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Tiny:
    """One model.

    Attributes:
        kind: its classes in transformers are `<kind>Config` and `<kind>ForCausalLM`.
        settings: of its configuration, besides the sizes that all of them have.
        tokenizer: `smollm2`; `qwen2` where transformers insists on Qwen2Tokenizer; `spm`, a SentencePiece
            model made here, where llama.cpp's converter insists on one; `glm`, with GLM's own tokens.
        model: its class, where that is not `<kind>ForCausalLM`.
        exporter: who makes the ONNX model: the onnxruntime-genai `builder`, or torch.onnx
            (`dynamo`, `torchscript`) where the builder cannot.
    """

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = "smollm2"
    exporter: str = "builder"
    model: str = ""

    @property
    def model_class(self) -> str:
        """Its class in transformers."""
        return self.model or f"{self.kind}ForCausalLM"

    def key(self) -> str:
        """For the name of a cached model: what it is made of."""
        return json.dumps(asdict(self), sort_keys=True)


MODELS = {
    "llama": Tiny("Llama"),
    "qwen2": Tiny("Qwen2", tokenizer="qwen2"),
    "qwen3": Tiny("Qwen3", {"head_dim": 32}),  # so that q is not square
    # every fourth layer rotates nothing; builder 0.18 has no position_ids for it
    "smollm3": Tiny("SmolLM3", {"num_hidden_layers": 4}, exporter="torchscript"),
    "arcee": Tiny("Arcee", exporter="torchscript"),
}


_UNTIED = {"tie_word_embeddings": False}
_HEAD = {"head_dim": 16}
_WINDOW = {"sliding_window": 32}
_GPT2_SIZES = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 1024, "n_ctx": 1024}
_GRANITE = {
    "attention_multiplier": 0.25, "residual_multiplier": 0.7, "embedding_multiplier": 2.0,
    "logits_scaling": 2.0,
}  # fmt: skip
_EXPERTS = {**_UNTIED, "num_experts": 4, "num_experts_per_tok": 2}

SURVEYED = {
    "gemma": Tiny("Gemma", _HEAD, "spm"),
    "gemma2": Tiny("Gemma2", {**_HEAD, **_WINDOW, "query_pre_attn_scalar": 16}, "spm"),
    "gemma3": Tiny(
        "Gemma3Text",
        {**_HEAD, **_WINDOW, "query_pre_attn_scalar": 16},
        "spm",
        model="Gemma3ForCausalLM",
    ),
    "phi2": Tiny("Phi", {**_UNTIED, "num_key_value_heads": 4, "intermediate_size": 256}),
    "phi3": Tiny("Phi3", {"sliding_window": None}, "spm"),
    "granite": Tiny("Granite", _GRANITE),
    "olmo": Tiny("Olmo"),
    "olmo2": Tiny("Olmo2", _UNTIED),
    "olmo3": Tiny("Olmo3", {**_WINDOW, **_UNTIED}),
    "stablelm": Tiny("StableLm", _UNTIED),
    "starcoder2": Tiny("Starcoder2", {"sliding_window": None}),
    "cohere": Tiny("Cohere"),
    "cohere2": Tiny("Cohere2", {**_WINDOW, "rotary_pct": 1.0}),
    "exaone4": Tiny("Exaone4", {"sliding_window": None, "layer_types": ["full_attention"] * 2}),
    "seed_oss": Tiny("SeedOss", _HEAD),
    "apertus": Tiny("Apertus", _UNTIED),
    "hunyuan": Tiny("HunYuanDenseV1", _HEAD),
    "ernie4_5": Tiny("Ernie4_5", _HEAD, "spm"),
    "nemotron": Tiny("Nemotron", _UNTIED, "spm"),
    "glm": Tiny("Glm", _HEAD, "glm"),
    "glm4": Tiny("Glm4", _HEAD, "glm"),
    "ministral3": Tiny("Ministral3", _HEAD),
    "gpt2": Tiny("GPT2", _GPT2_SIZES, model="GPT2LMHeadModel"),
    "bloom": Tiny("Bloom", {"n_head": 4, "n_layer": 2}),
    "falcon": Tiny("Falcon", {"multi_query": False, "new_decoder_architecture": False}),
    "falcon2": Tiny("Falcon", {"num_kv_heads": 2, "new_decoder_architecture": True}),
    "lfm2": Tiny("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "olmoe": Tiny("Olmoe", {**_EXPERTS, "num_key_value_heads": 4}),
    "qwen2_moe": Tiny("Qwen2Moe", {**_EXPERTS, "moe_intermediate_size": 64}, "qwen2"),
    "qwen3_moe": Tiny(
        "Qwen3Moe",
        # llama.cpp always normalises them, as every published one does
        {**_EXPERTS, **_HEAD, "moe_intermediate_size": 64, "norm_topk_prob": True},
        "qwen2",
    ),
    "granitemoe": Tiny("GraniteMoe", {**_GRANITE, "num_local_experts": 4}),
    "mixtral": Tiny("Mixtral", {**_UNTIED, **_HEAD, "num_local_experts": 4}),
    "ernie4_5_moe": Tiny(
        "Ernie4_5_Moe",
        {
            **_HEAD,
            "moe_num_experts": 4,
            "moe_k": 2,
            "moe_num_shared_experts": 1,
            "moe_intermediate_size": 64,
        },
        "spm",
    ),
    "gpt_oss": Tiny(
        "GptOss",
        {
            **_UNTIED,
            **_HEAD,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            # of YaRN llama.cpp rounds the range, which GPT-OSS does not
            "rope_parameters": {"rope_type": "default", "rope_theta": 150000.0},
        },
    ),
    "jais2": Tiny("Jais2", _UNTIED),
    "gpt_bigcode": Tiny("GPTBigCode", _GPT2_SIZES),
    "falcon_h1": Tiny(
        "FalconH1",
        {
            **_UNTIED,
            **_HEAD,
            "mamba_d_ssm": 64,
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
        },
    ),
}
"""By the name of the test, of which several may be one architecture of llama.cpp."""


def tiny_of(name: str) -> Tiny:
    """The tiny model of an architecture, or of a surveyed family."""
    found = MODELS.get(name) or SURVEYED.get(name)
    if found is None:
        raise LookupError(f"{name} has no tiny model: add one to {__name__}.MODELS")
    return found
