"""What is read of a Hugging Face folder, by name: every tensor and hyperparameter that bears on the result.

Readers ignore what they do not know: llama.cpp's converter leaves out the window of a config.json, and
transformers a bias that it does not mention, and a weight that is missing starts as noise. So the names that
are read are listed here, and what stands beside them is refused before anything long runs:

    tensors  those that the model class makes of config.json, no more and no fewer
    rope     the kinds of scaled rotary embedding that a converter carries over
    window   over how many tokens a layer attends, where that is not all of them

That a name is read does not mean that it is read right: `bases.proof` compares logits.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from safegene_converter.inputs.safetensors_reader import SafetensorsFile, SafetensorsTensor
from safegene_runtime.architecture.table import (
    ModelClass,
    architecture_of_config,
    model_class_of_config,
)
from safegene_runtime.artifact.forms import GGUF, ONNX, Target
from safegene_runtime.errors import BaseModelError, Problem, Problems
from safegene_runtime.formats.files import open_regular

__all__ = [
    "check_carried",
    "check_config",
    "check_folder_tensors",
    "check_proved",
    "limit_of",
    "rope_of",
    "window_of",
]  # fmt: skip

_NORMS = ("input_layernorm", "post_attention_layernorm")
_FLOATS = ("F16", "BF16", "F32", "F64")


_WINDOW = 4096
"""Sliding window of a configuration that does not say, where there is one."""

_READ = frozenset({
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size",
    "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
    "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "rope_parameters",
    "rope_scaling", "rope_theta", "original_max_position_embeddings", "layer_types", "is_causal",
    "num_experts", "num_local_experts", "n_routed_experts", "auto_map", "quantization_config",
})  # fmt: skip
_WITHOUT_EFFECT = frozenset({
    "attention_dropout", "attention_probs_dropout_prob", "hidden_dropout", "hidden_dropout_prob",
    "resid_pdrop", "embd_pdrop", "attn_pdrop", "classifier_dropout", "initializer_range",
    "pretraining_tp", "use_cache", "output_attentions", "output_hidden_states", "attn_implementation",
    "chunk_size_feed_forward", "id2label", "label2id", "task_specific_params", "is_encoder_decoder",
    "cross_attention_hidden_size", "add_cross_attention", "tie_encoder_decoder", "max_window_layers",
    "use_mrope", "transformers.js_config",
    "use_flash_attn", "use_flash_attention_2", "rope_interleaved", "tokenizer_class", "unsloth_fixed",
})  # fmt: skip
"""Known, and without effect on the logits of a decoder that is evaluated; some only if they are off."""
_ONLY_OFF = frozenset(
    {"use_mrope", "rope_interleaved", "is_encoder_decoder", "add_cross_attention"}
)
_BEARS = re.compile(
    r"rope|rotary|alibi|scal|multipl|softcap|capping|clip|window|bias|norm|eps|tied|^tie_|head|layer"
    r"|attn|attention|expert|moe|logit|embed|position|factor|residual|activation|causal|sparse|qk_"
    r"|quant|compress|conv|ssm|theta|chunk|hidden|dim$|_size"
)
"""A key we do not know is refused where its name speaks of arithmetic."""

_ROPE_KEYS = frozenset({
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim", "truncate", "short_factor", "long_factor", "partial_rotary_factor",
})  # fmt: skip
_EVERY_ROPE = frozenset({"rope_type", "type", "rope_theta"})
_CARRIED_KEYS = {
    "default": _EVERY_ROPE,
    "linear": _EVERY_ROPE | {"factor"},
    "llama3": _EVERY_ROPE
    | {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": _EVERY_ROPE | {"factor", "original_max_position_embeddings"},
}
_DEFAULTS = {"beta_fast": 32, "beta_slow": 1}
"""What both sides take where nothing is said; llama.cpp takes it whatever is said."""
_COMPARED = 16 << 20
_CONTRADICTION = "config.json contradicts itself"
_ADVICE = "if it does not bear on the result, remove it; else this model is not supported yet"


def check_config(config: Mapping[str, Any], where: str, refused: Problems) -> None:
    """Notes the keys of a config.json that could change the result and that nobody reads.

    Args:
        config: config.json, of a class that we know.
        where: its path, for the message.
        refused: what is wrong is added here.
    """
    kind = _class(config)
    if config.get("model_type") != kind.model_type:
        refused.add(
            where, "model_type", f"{kind.model_type}, as architectures says",
            _short(config.get("model_type")), _CONTRADICTION,
        )  # fmt: skip
    if config.get("is_causal") is False:
        refused.add(where, "is_causal", "a causal model", False, "this is no decoder")
    if not kind.listed:
        return
    switches = {*kind.switches, *kind.keys}
    if kind.window is not None:
        switches |= {"sliding_window", "use_sliding_window"}
    for key, value in config.items():
        if key in _READ or key in switches or key.startswith("_"):
            continue
        off = value in (None, False, 0, "", [], {})
        if off or (key in _WITHOUT_EFFECT and key not in _ONLY_OFF):
            continue
        if isinstance(value, dict) or key in _ONLY_OFF or _BEARS.search(key):
            refused.add(where, key, "a hyperparameter that is read", _short(value), _ADVICE)
    if config.get("hidden_act", kind.activations[0]) not in kind.activations:
        refused.add(where, "hidden_act", kind.activations[0], _short(config["hidden_act"]), _ADVICE)
    if type(config.get("rms_norm_eps")) not in (float, int):
        got = _short(config.get("rms_norm_eps"))
        refused.add(where, "rms_norm_eps", "a number", got, "every reader has a default of its own")
    _check_rope(config, where, refused)
    _check_layer_types(config, kind, where, refused)


def _class(config: Mapping[str, Any]) -> ModelClass:
    return model_class_of_config(config, "config.json")


def _short(value: object) -> str:
    return repr(value)[:80]


def _check_rope(config: Mapping[str, Any], where: str, refused: Problems) -> None:
    given = {key: config.get(key) for key in ("rope_parameters", "rope_scaling")}
    stated = {key: value for key, value in given.items() if value is not None}
    for key, value in stated.items():
        if not isinstance(value, dict):
            refused.add(where, key, "an object", _short(value))
            return
        for name in sorted(value.keys() - _ROPE_KEYS):
            got = _short(value[name])
            refused.add(where, f"{key}.{name}", "a parameter that is read", got, _ADVICE)
        if value.get("partial_rotary_factor", 1.0) not in (None, 1, 1.0):
            refused.add(
                where, f"{key}.partial_rotary_factor", "1: the whole head is rotated",
                _short(value["partial_rotary_factor"]), _ADVICE,
            )  # fmt: skip
        if {"type", "rope_type"} <= value.keys() and value["type"] != value["rope_type"]:
            got = f"{value['type']!r} and {value['rope_type']!r}"
            refused.add(where, f"{key}.rope_type", "one kind", got, _CONTRADICTION)
    if len({str(sorted(_scaling(value).items())) for value in stated.values()}) > 1:
        refused.add(
            where, "rope_scaling", "what rope_parameters says", _short(given["rope_scaling"]),
            "config.json contradicts itself: readers differ in which of the two they take",
        )  # fmt: skip
    thetas = {
        float(value)
        for value in (config.get("rope_theta"), *(one.get("rope_theta") for one in stated.values()))
        if type(value) in (int, float)
    }
    if len(thetas) > 1:
        refused.add(where, "rope_theta", "one", f"{sorted(thetas)}", _CONTRADICTION)


def _scaling(rope: Any) -> dict[str, Any]:
    kept = {key: value for key, value in rope.items() if key not in _EVERY_ROPE}
    return {**kept, "kind": rope.get("rope_type", rope.get("type", "default"))}


def rope_of(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The kind of rotary embedding of a config.json, `default` for a plain one, and its parameters."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    return str(kind), {key: value for key, value in rope.items() if value is not None}


def check_carried(config: Mapping[str, Any], target: Target, where: str) -> None:
    """Refuses what the converter to `target` would not carry over.

    Raises:
        BaseModelError: it names the kind of rotary embedding or its parameter, the bias, or the window.
    """
    if not _class(config).listed:
        return  # the proof tells
    kind, parameters = rope_of(config)
    carried = _class(config).rope[target.name]
    problems = Problems()
    if target is GGUF and config.get("attention_bias") and _class(config).qk_norm:
        problems.add(
            where, "attention_bias", "none: llama.cpp has no biases in this architecture", True,
            "use --to onnx",
        )  # fmt: skip
    if target is ONNX and (window := window_of(config)) is not None:
        problems.add(
            where, "sliding_window", "none: the graph would attend to all tokens, or run in one runtime only",
            window, "use --to gguf, whose context ends where the window does",
        )  # fmt: skip
    if kind not in carried:
        problems.add(
            where, "rope_type", f"one that the converter to {target.name} carries: {', '.join(carried)}",
            kind, "the target would have another rotary embedding; try the other target",
        )  # fmt: skip
    else:
        said = {name for name, value in parameters.items() if _DEFAULTS.get(name) != value}
        for name in sorted(said - _CARRIED_KEYS[kind] - {"partial_rotary_factor"}):
            problems.add(
                where, f"{kind} rope: {name}", f"a parameter that the converter to {target.name} carries",
                _short(parameters[name]), _ADVICE,
            )  # fmt: skip
    problems.raise_if_any(BaseModelError)


def check_proved(config: Mapping[str, Any], check: bool) -> None:
    """Refuses to leave the proof of the base out where nothing else speaks for it.

    Raises:
        BaseModelError: an architecture whose hyperparameters are not listed, and no proof.
    """
    if not check and not _class(config).listed:
        raise BaseModelError(
            Problem(
                "--no-self-check", "proof of the base",
                f"one: what of a config.json bears on a {_class(config).name} is not listed, so only running "
                "the base shows that its new format computes the same", "none", "leave --no-self-check out",
            )
        )  # fmt: skip


def _check_layer_types(
    config: Mapping[str, Any], kind: ModelClass, where: str, refused: Problems
) -> None:
    types = config.get("layer_types")
    if types is None:
        return
    known = {"full_attention"} | ({"sliding_attention"} if kind.window else set())
    if (
        not isinstance(types, list)
        or not set(map(str, types)) <= known
        or len(types) != config.get("num_hidden_layers")
    ):
        refused.add(
            where, "layer_types", f"one of {', '.join(sorted(known))} for each layer",
            _short(types), _ADVICE,
        )  # fmt: skip
    elif "sliding_attention" in types and not config.get(str(kind.window)):
        refused.add(
            where, "layer_types", "no sliding window, as use_sliding_window says", _short(types),
            _CONTRADICTION,
        )  # fmt: skip


def window_of(config: Mapping[str, Any]) -> int | None:
    """How many tokens, itself included, a token sees in the layers that see fewest; None for all."""
    kind = _class(config)
    switch, default = kind.window, _WINDOW if kind.listed else None
    if not kind.listed:  # what it does by default is not known: only what it says
        switch = "use_sliding_window" if "use_sliding_window" in config else ""
    if switch is None or (switch and not config.get(switch)):
        return None
    window = config.get("sliding_window", default)
    if switch and window is not None:
        layers = config["num_hidden_layers"]
        types = config.get("layer_types") or [
            "sliding_attention"
            if layer >= config.get("max_window_layers", 28)
            else "full_attention"
            for layer in range(layers)
        ]
        window = window if "sliding_attention" in types else None
    longest = config.get("max_position_embeddings")
    bites = type(window) is int and (type(longest) is not int or window < longest)
    return window if bites else None


def limit_of(config: Mapping[str, Any]) -> int | None:
    """Where the context has to end because llama.cpp attends to all tokens; None where it does not.

    llama.cpp has windows in architectures that are not listed: there the proof of the base tells.
    """
    return window_of(config) if _class(config).listed else None


def check_folder_tensors(
    config: Mapping[str, Any], weights: Sequence[SafetensorsFile], where: str
) -> None:
    """Holds the tensors of a folder against those that its model class makes of its configuration.

    Raises:
        BaseModelError: missing, unexpected or misshapen tensors, or a contradiction, all of them.
    """
    found = {name: (file, info) for file in weights for name, info in file.tensors.items()}
    if not _class(config).listed:
        return  # transformers tells, when the base is proved, what it would leave out or make up
    expected, problems = _expected(config), Problems()
    tied = bool(config.get("tie_word_embeddings", False))
    for name in sorted(expected.keys() - found.keys()):
        fix = "download the model again"
        if name == "lm_head.weight":
            fix = (
                "config.json says tie_word_embeddings false: is the head tied, or was it left out?"
            )
        elif name.endswith(".bias"):
            fix = "config.json and weights contradict each other: is there a bias, or not?"
        problems.add(where, name, "a tensor, as config.json says", "none", fix)
    for name in sorted(found.keys() - expected.keys()):
        file, info = found[name]
        if name == "lm_head.weight" and tied:
            _check_tied(found, where, problems)
        elif name.endswith("rotary_emb.inv_freq"):
            _check_inv_freq(config, file, name, where, problems)
        else:
            switches = _class(config).switches
            said = [
                key
                for key, modules in switches.items()
                if name.removesuffix(".bias").endswith(modules)
            ]
            fix = (
                f"config.json says {said[0]} false: readers would leave it out" if said else _ADVICE
            )
            got = f"{info.dtype} {info.shape}"
            problems.add(where, name, "no such tensor, as config.json says", got, fix)
    for name in sorted(expected.keys() & found.keys()):
        info = found[name][1]
        if info.shape != expected[name] or info.dtype not in _FLOATS:
            problems.add(
                where, name, f"{expected[name]} of {', '.join(_FLOATS)}",
                f"{info.shape} of {info.dtype}", "config.json and weights are of different models",
            )  # fmt: skip
    problems.raise_if_any(BaseModelError)


def _expected(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Tensor -> shape, as the model class makes them."""
    kind = _class(config)

    def number(key: str, default: Any = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        return value if type(value) is int else 0

    hidden, inner, heads = (
        number("hidden_size"), number("intermediate_size"), number("num_attention_heads"),
    )  # fmt: skip
    head = number("head_dim", kind.head_dim or (hidden // heads if heads else 0))
    default_kv = heads if "num_key_value_heads" in config else kind.n_head_kv or heads
    q, kv = heads * head, number("num_key_value_heads", default_kv) * head
    row = architecture_of_config(config, "config.json")
    linear = row.linear_shapes(hidden, inner, q, kv)
    biased = {*kind.biased}
    for key, modules in kind.switches.items():
        biased |= set(modules) & linear.keys() if config.get(key) else set()
    made: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (number("vocab_size"), hidden), "model.norm.weight": (hidden,),
    }  # fmt: skip
    if not config.get("tie_word_embeddings", False):
        made["lm_head.weight"] = (number("vocab_size"), hidden)
    for layer in range(number("num_hidden_layers")):
        at = f"{row.blocks}.{layer}."
        made |= {f"{at}{norm}.weight": (hidden,) for norm in _NORMS}
        made |= {f"{at}{name}.weight": shape for name, shape in linear.items()}
        made |= {f"{at}{name}.bias": (linear[name][0],) for name in biased}
        if kind.qk_norm:
            made |= {f"{at}self_attn.{one}_norm.weight": (head,) for one in "qk"}
    return made


def _check_tied(found: Mapping[str, Any], where: str, problems: Problems) -> None:
    """A head that is stored although it is tied has to be the embedding."""
    names = ("lm_head.weight", "model.embed_tokens.weight")
    if names[1] in found and not _same_bytes(*(found[name] for name in names)):
        problems.add(
            where, "lm_head.weight", "the embedding: config.json says tie_word_embeddings true",
            "other numbers", "config.json and weights contradict each other: is the head tied?",
        )  # fmt: skip


def _same_bytes(*places: tuple[SafetensorsFile, SafetensorsTensor]) -> bool:
    """Whether two tensors are stored alike, read a few MiB at a time."""
    (one_file, one), (other_file, other) = places
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with open_regular(one_file.path) as first, open_regular(other_file.path) as second:
        first.seek(one.begin)
        second.seek(other.begin)
        left = one.end - one.begin
        while left > 0:
            size = min(left, _COMPARED)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True


def _check_inv_freq(
    config: Mapping[str, Any], file: SafetensorsFile, name: str, where: str, problems: Problems
) -> None:
    """Frequencies that are stored are read by nobody, so they have to be those of the configuration."""
    kind, rope = rope_of(config)
    stored = file.read_float32(name).astype(np.float64).reshape(-1)
    theta = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    meant = theta ** (-np.arange(len(stored)) / max(1, len(stored)))
    if kind != "default" or not np.allclose(stored, meant, rtol=1e-2, atol=0):
        problems.add(
            where, name, f"theta {theta:g}, as config.json says, without scaling",
            "other frequencies", "every engine computes its own: config.json has to say these",
        )  # fmt: skip
