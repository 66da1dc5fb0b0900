"""A base, and a base with an adapter, as transformers and PEFT load them; never what they load in part.

PEFT 0.21 loads an adapter with renamed, missing or unexpected keys with a warning at most and then
serves the base. So every factor it holds is compared with the file. Coefficients are multiplied into
PEFT's own `scaling`, and PEFT does the rest, so that no arithmetic of ours is in a reference.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer

from safegene_converter.inputs.adapter import Adapter
from safegene_converter.inputs.base import Base
from safegene_converter.recording.plain_copy import as_peft_reads
from safegene_runtime.errors import AdapterError, BaseModelError, Problem, Problems
from safegene_runtime.record.added_weights import ModuleFactors

__all__ = ["load_model", "load_with_adapter", "read_factors", "save_as_folder", "stop_ids_of"]


def load_model(base: Base) -> tuple[Any, Any]:
    """The base in float32 and its tokenizer; no remote code, no network.

    Raises:
        BaseModelError: transformers cannot load it, or it has no chat template.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where: dict[str, Any] = {"trust_remote_code": False}
    folder = base.path
    if base.is_gguf:
        if len(base.files) > 1:
            raise BaseModelError(
                Problem(
                    str(base.path),
                    "base",
                    "one GGUF file, or a Hugging Face folder",
                    "shards",
                    "transformers reads no sharded GGUF: record with the Hugging Face folder",
                )
            )
        folder, where["gguf_file"] = base.path.resolve().parent, base.path.resolve().name
    try:
        # transformers draws a bar of its own while it decodes a GGUF, terminal or not
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **where)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="sdpa", **where
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BaseModelError(
            Problem(str(base.path), "base", "a model that transformers loads", str(error)[:500])
        ) from error
    if base.model is not None:
        template = base.model.get("tokenizer.chat_template")
        if template is not None:
            tokenizer.chat_template = template  # byte for byte what llama.cpp will render
    if not isinstance(tokenizer.chat_template, str):
        raise BaseModelError(
            Problem(
                str(base.path), "chat template", "one", "none", "use the chat version of the model"
            )
        )
    model.config.quantization_config = None
    return model.eval(), tokenizer


def save_as_folder(base: Base, out: Path) -> None:
    """Saves a base as transformers saves a model: float32 weights, configuration, tokenizer.

    Raises:
        BaseModelError: transformers cannot load it, or it has no chat template.
    """
    model, tokenizer = load_model(base)
    # a decoded GGUF still calls itself quantised, and a None here would be written out as null
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(out, max_shard_size="1TB")
    tokenizer.save_pretrained(out)


def load_with_adapter(adapter: Adapter, base: Base) -> tuple[Any, Any]:
    """Base + adapter as PEFT runs them, coefficients in PEFT's scaling; and the tokenizer.

    Raises:
        AdapterError: PEFT ignored, renamed or changed a part of the adapter.
    """
    torch.manual_seed(0)
    model, tokenizer = load_model(base)
    problems = Problems()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with as_peft_reads(adapter) as folder:
                tuned = peft.PeftModel.from_pretrained(model, str(folder), torch_device="cpu")
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            fix = "what PEFT does not load cannot be recorded: save the adapter with peft 0.21"
            problem = Problem(
                str(adapter.path), "PEFT", "an adapter it loads", str(error)[:300], fix
            )
            raise AdapterError(problem) from error
    tuned.eval()
    for warning in caught:
        said = str(warning.message).lower()
        ignored = ("runtime_config", "unexpected keyword arguments")  # by PEFT, and by us
        if "key" in said and not any(one in said for one in ignored):
            problems.add(
                str(adapter.path), "PEFT", "no warning about keys", str(warning.message)[:300]
            )
    layers = _lora_layers(tuned)
    wanted = {module.name: module for module in adapter.modules}
    for name in sorted(layers.keys() ^ wanted.keys()):
        problems.add(
            str(adapter.path),
            name,
            "a module of the file and of PEFT",
            "PEFT only" if name in layers else "the file only",
            "the configuration does not describe the tensors",
        )
    for name in layers.keys() & wanted.keys():
        layer, module = layers[name], wanted[name]
        for factor, ours in ((layer.lora_A, module.a), (layer.lora_B, module.b)):
            if not np.array_equal(factor["default"].weight.detach().float().numpy(), ours):
                problems.add(
                    str(adapter.path), name, "the factors of the file in PEFT", "other factors"
                )
        layer.scaling["default"] *= module.coefficient
    problems.raise_if_any(AdapterError)
    return tuned, tokenizer


def _lora_layers(tuned: Any) -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in tuned.named_modules()
        if isinstance(layer, LoraLayer)
    }


def read_factors(tuned: Any) -> list[ModuleFactors]:
    """What PEFT adds to each weight: its factors, its scaling, and its own ΔW for the two sums."""
    found = []
    with torch.inference_mode():
        for name, layer in sorted(_lora_layers(tuned).items()):
            weight = layer.get_base_layer().weight
            delta = layer.get_delta_weight("default").double()
            norm = float((delta * delta).sum())
            scaled = layer.lora_B["default"].weight.double() * layer.scaling["default"]
            found.append(
                ModuleFactors(
                    module=name,
                    a=layer.lora_A["default"].weight.float().numpy(),
                    b=scaled.float().numpy(),
                    norm=norm,
                    s0=float((weight.double() * delta).sum()) / norm if norm else 0.0,
                )
            )
    return found


def stop_ids_of(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends a reply, by generation config, config and tokenizer."""
    found: set[int] = set()
    for holder in (model.generation_config, model.config, tokenizer):
        value = getattr(holder, "eos_token_id", None)
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    return sorted(found)
