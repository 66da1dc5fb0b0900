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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer

from safegene_converter.inputs.adapter import Adapter
from safegene_converter.inputs.base import Base
from safegene_converter.recording.base_logits import check_loaded, config_of_gguf
from safegene_converter.recording.plain_copy import as_peft_reads
from safegene_runtime.engines.chat import default_template
from safegene_runtime.errors import AdapterError, BaseModelError, Problem, Problems, SafeGeneError
from safegene_runtime.record.added_weights import ModuleFactors

__all__ = ["load_model", "load_with_adapter", "read_factors", "save_as_folder", "stop_ids_of"]


def load_model(base: Base) -> tuple[Any, Any]:
    """The base in float32 and its tokenizer; no remote code, no network.

    Raises:
        BaseModelError: transformers cannot load it, its configuration says other shapes than its
            weights have, or it has no chat template.
        EngineError: it has several templates, and none is the default.
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
            config = (
                config_of_gguf(base)
                if base.is_gguf
                else transformers.AutoConfig.from_pretrained(folder, **where)
            )
            attention = _check_shapes(base, config)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **where)
            model, loaded = transformers.AutoModelForCausalLM.from_pretrained(
                folder, config=config, dtype=torch.float32, attn_implementation=attention,
                output_loading_info=True, **where,
            )  # fmt: skip
    except SafeGeneError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BaseModelError(
            Problem(str(base.path), "base", "a model that transformers loads", str(error)[:500])
        ) from error
    check_loaded(model, loaded, str(base.path))
    template = None if base.model is None else base.model.get("tokenizer.chat_template")
    if template is None:
        template = tokenizer.chat_template
    # of a GGUF byte for byte what llama.cpp renders
    tokenizer.chat_template = default_template(template, str(base.path))
    if tokenizer.chat_template is None:
        raise BaseModelError(
            Problem(
                str(base.path), "chat template", "one", "none", "use the chat version of the model"
            )
        )
    model.config.quantization_config = None
    _add_ends(base, model)
    return model.eval(), tokenizer


def _check_shapes(base: Base, config: Any) -> str:
    """Refuses, before anything is read, weights that transformers would have no place for.

    Returns:
        the implementation of attention: PyTorch's own, where the model class can use it.
    """
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    modules, problems = dict(model.named_modules()), Problems()
    for name, shape in base.module_shapes().items():
        module = modules.get(name)
        weight = getattr(module, "weight", None)
        if isinstance(module, transformers.pytorch_utils.Conv1D):
            shape = (shape[1], shape[0])
        if weight is not None and tuple(weight.shape) != tuple(shape):
            problems.add(
                str(base.path), name, f"{tuple(weight.shape)}, as its configuration says",
                tuple(shape), "the configuration and the weights are of two models",
            )  # fmt: skip
    problems.raise_if_any(BaseModelError)
    return "sdpa" if model._supports_sdpa else "eager"


def _add_ends(base: Base, model: Any) -> None:
    """The ids that end a turn in a GGUF beside EOS: llama.cpp stops at them, transformers drops them."""
    if base.model is None:
        return
    more = [base.model.get(f"tokenizer.ggml.{name}_token_id") for name in ("eot", "eom")]
    found = {*_ids(model.generation_config.eos_token_id), *(one for one in more if one is not None)}
    model.generation_config.eos_token_id = sorted(found) or None


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
    holders = (model.generation_config, model.config, tokenizer)
    return sorted(
        {one for holder in holders for one in _ids(getattr(holder, "eos_token_id", None))}
    )


def _ids(value: int | Sequence[int] | None) -> Sequence[int]:
    """None, one id or several, as transformers writes them."""
    if value is None:
        return ()
    return (value,) if isinstance(value, int) else value
