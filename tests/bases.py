"""Tiny bases with what a change of format may lose: biases, scaled rope, windows, other heads.

As in `tiny`, but every token is kept, which llama.cpp's converter needs, and weights of biases are large
enough to matter.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import tiny

from safegene_converter.bases.hf_to_gguf import convert_hf
from safegene_converter.bases.onnx_build import build_onnx

CLASSES = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3"}


def _key(kind: str, config: dict[str, Any]) -> str:
    told = json.dumps(config, sort_keys=True).encode() + Path(__file__).read_bytes()
    return f"base-{kind}-{hashlib.sha256(told).hexdigest()[:12]}"


def folder(kind: str = "llama", **config: Any) -> Path:
    """A Hugging Face folder of a random model; `config` are further arguments of its configuration."""
    return tiny._cached(_key(kind, config), lambda out: _make(kind, config, out))


def gguf(kind: str = "llama", **config: Any) -> Path:
    """The same as an F32 GGUF, by llama.cpp's converter."""
    source = folder(kind, **config)

    def make(out: Path) -> None:
        out.mkdir()
        convert_hf(source, out / "model.gguf")

    return tiny._cached(_key(kind, config) + "-gguf", make) / "model.gguf"


def onnx(kind: str = "llama", **config: Any) -> Path:
    """The same as an fp32 ONNX folder, by the onnxruntime-genai builder."""
    source = folder(kind, **config)
    return tiny._cached(_key(kind, config) + "-onnx", lambda out: build_onnx(source, out, "fp32"))


def adapter(out: Path, base: Path, seed: int = 1) -> Path:
    """A random adapter on all seven modules of a base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, target_modules="all-linear")
    wrapped = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
    wrapped.save_pretrained(out)
    return out


def _make(kind: str, changes: dict[str, Any], out: Path) -> None:
    import torch
    import transformers

    tokenizer = tiny._tokenizer("qwen2" if kind == "qwen2" else "smollm2")
    vocabulary = json.loads((tokenizer / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in vocabulary["added_tokens"]}
    config = getattr(transformers, f"{CLASSES[kind]}Config")(
        **{
            "vocab_size": max(*vocabulary["model"]["vocab"].values(), *ids.values()) + 1,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": tiny.N_LAYERS,
            "num_attention_heads": tiny.N_HEAD,
            "num_key_value_heads": tiny.N_HEAD_KV,
            "max_position_embeddings": 1024,
            "tie_word_embeddings": True,
            "bos_token_id": ids["<|im_start|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|im_end|>"],
            **({"head_dim": 16} if kind == "qwen3" else {}),
            **({"sliding_window": None} if kind == "mistral" else {}),
            **changes,
        }
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{CLASSES[kind]}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif name.endswith(".bias"):
                parameter.normal_(std=0.5)
            elif "layers" in name:
                parameter.normal_(std=1.5 / 8)
            else:
                parameter.normal_(std=1.0)
    model.save_pretrained(out)
    for file in tokenizer.iterdir():
        shutil.copy(file, out)
