"""Every tensor and hyperparameter of a base that bears on the result is read, or refused by name."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from safegene_converter.inputs.base import open_base
from safegene_converter.inputs.consumed import check_carried, window_of
from safegene_converter.inputs.consumed_gguf import check_gguf_for_torch, gguf_config
from safegene_runtime.artifact.forms import target_named
from safegene_runtime.errors import BaseModelError, SafeGeneError, UnsupportedError
from safegene_runtime.formats.gguf.header import Value, ValueType


def carried(config: dict[str, Any], target: str, where: str) -> None:
    """`check_carried`, of a target by name."""
    check_carried(config, target_named(target), where)


Weights = dict[str, np.ndarray]
ATTENTION = "model.layers.0.self_attn"


@pytest.fixture
def changed(tmp_path: Path) -> Callable[..., Path]:
    """Copies a tiny folder, with another configuration or other weights."""

    def change(
        architecture: str = "llama",
        edit: Callable[[Weights], object] | None = None,
        without: str = "",
        **config: Any,
    ) -> Path:
        out = tmp_path / "base"
        shutil.copytree(tiny.hf_model(architecture), out)
        content = {**json.loads((out / "config.json").read_text()), **config}
        content.pop(without, None)
        (out / "config.json").write_text(json.dumps(content))
        if edit is not None:
            weights = load_file(out / "model.safetensors")
            edit(weights)
            save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
        return out

    return change


def add(name: str, *shape: int) -> Callable[[Weights], object]:
    return lambda weights: weights.update({name: np.ones(shape, np.float32)})


def drop(name: str) -> Callable[[Weights], object]:
    return lambda weights: weights.pop(name)


# --- tensors against the configuration (F4, F5) ----------------------------------------------------


@pytest.mark.parametrize(
    ("architecture", "edit", "config", "named"),
    [
        ("llama", None, {"tie_word_embeddings": False}, "lm_head.weight"),
        ("llama", add("lm_head.weight", 2048, 64), {}, "lm_head.weight"),
        ("llama", add(f"{ATTENTION}.q_proj.bias", 64), {}, "q_proj.bias"),
        ("llama", add("model.layers.1.mlp.up_proj.bias", 128), {}, "up_proj.bias"),
        ("llama", None, {"attention_bias": True}, "o_proj.bias"),
        ("llama", None, {"mlp_bias": True}, "down_proj.bias"),
        ("qwen2", drop(f"{ATTENTION}.k_proj.bias"), {}, "k_proj.bias"),
        ("qwen2", add(f"{ATTENTION}.o_proj.bias", 64), {}, "o_proj.bias"),
        ("qwen3", drop(f"{ATTENTION}.q_norm.weight"), {}, "q_norm.weight"),
        ("llama", add(f"{ATTENTION}.q_norm.weight", 16), {}, "q_norm.weight"),
        ("llama", drop("model.norm.weight"), {}, "model.norm.weight"),
        ("llama", drop("model.layers.1.input_layernorm.weight"), {}, "layers.1.input_layernorm"),
        ("llama", drop("model.embed_tokens.weight"), {}, "embed_tokens"),
        ("llama", add("model.layers.0.mlp.experts.0.w1", 4, 4), {}, "experts.0.w1"),
        ("llama", add(f"{ATTENTION}.q_proj.weight_scale", 1), {}, "weight_scale"),
        ("llama", add("score.weight", 2, 64), {}, "score.weight"),
        ("llama", None, {"vocab_size": 4096}, "embed_tokens"),
        ("llama", None, {"head_dim": 32}, "q_proj"),
        ("llama", None, {"intermediate_size": 256}, "up_proj"),
        ("llama", None, {"num_attention_heads": 8, "head_dim": None}, "k_proj"),
    ],
)  # fmt: skip
def test_weights_that_contradict_the_configuration_are_named(
    changed: Callable[..., Path],
    architecture: str,
    edit: Callable[[Weights], object] | None,
    config: dict[str, Any],
    named: str,
) -> None:
    with pytest.raises(BaseModelError, match=named.replace(".", r"\.")):
        open_base(changed(architecture, edit, **config))


def test_a_tied_head_may_be_stored_when_it_is_the_embedding(changed: Callable[..., Path]) -> None:
    def store(weights: Weights) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].copy()

    assert open_base(changed(edit=store)).n_layers == 2


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_stored_rope_frequencies_have_to_be_those_of_the_configuration(
    changed: Callable[..., Path], theta: float
) -> None:
    """Old checkpoints hold them, and every engine computes its own."""
    stored = (theta ** (-np.arange(0, 16, 2) / 16)).astype(np.float32)
    path = changed(edit=lambda w: w.update({f"{ATTENTION}.rotary_emb.inv_freq": stored}))
    if theta == 10000.0:
        assert open_base(path).n_layers == 2
    else:
        with pytest.raises(BaseModelError, match="inv_freq"):
            open_base(path)


@pytest.mark.parametrize("dtype", [np.int8, np.int32])
def test_weights_of_a_type_that_is_no_float_are_named(
    changed: Callable[..., Path], dtype: Any
) -> None:
    def quantise(weights: Weights) -> None:
        weights["model.norm.weight"] = weights["model.norm.weight"].astype(dtype)

    with pytest.raises(BaseModelError, match=r"model\.norm\.weight.*F16, BF16"):
        open_base(changed(edit=quantise))


# --- hyperparameters -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        {"logit_scale": 0.5}, {"attention_multiplier": 0.1}, {"residual_multiplier": 0.2},
        {"embedding_multiplier": 12.0}, {"final_logit_softcapping": 30.0}, {"clip_qkv": 8.0},
        {"partial_rotary_factor": 0.5}, {"alibi": True}, {"hidden_act": "gelu"}, {"is_causal": False},
        {"sliding_window": 8}, {"layer_types": ["sliding_attention", "full_attention"]},
        {"layer_types": ["full_attention"]}, {"model_type": "qwen2"}, {"rms_norm_eps": None},
        {"text_config": {"hidden_size": 64}}, {"query_pre_attn_scalar": 256}, {"attn_bias": True},
        {"rope_interleaved": True}, {"no_rope_layers": [1, 0]}, {"num_nextn_predict_layers": 1},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        {"rope_scaling": {"type": "linear", "factor": 4.0}}, {"rope_theta": 5e5},
        {"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 4.0}},
    ],
    ids=str,
)  # fmt: skip
def test_a_hyperparameter_that_nobody_reads_or_that_contradicts_is_named(
    changed: Callable[..., Path], config: dict[str, Any]
) -> None:
    """A plain tiny llama says rope_parameters, so a second rope_scaling or theta contradicts it."""
    (key,) = config
    with pytest.raises(UnsupportedError) as caught:
        open_base(changed(**config))
    assert any(problem.field.startswith(key) for problem in caught.value.problems)


@pytest.mark.parametrize(
    "config",
    [
        {"pretraining_tp": 1}, {"unsloth_version": "2026.1"}, {"is_llama_config": True},
        {"logit_scale": None}, {"sliding_window": None}, {"attention_dropout": 0.1},
        {"neftune_noise_alpha": 5}, {"transformers.js_config": {"dtype": "q4"}},
        {"layer_types": ["full_attention", "full_attention"]}, {"_name_or_path": "x"},
    ],
    ids=str,
)  # fmt: skip
def test_a_key_without_effect_is_no_reason_to_refuse(
    changed: Callable[..., Path], config: dict[str, Any]
) -> None:
    assert open_base(changed(**config)).n_layers == 2


LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}


@pytest.mark.parametrize(
    ("name", "rope", "targets"),
    [
        ("Llama", {"rope_type": "default"}, {"gguf", "onnx"}),
        ("Llama", {"type": "linear", "factor": 4.0}, {"gguf"}),
        ("Mistral", {"rope_type": "linear", "factor": 4.0}, {"gguf", "onnx"}),
        ("Llama", LLAMA3, {"gguf", "onnx"}),
        ("Mistral", LLAMA3, {"gguf"}),
        ("Qwen2", LLAMA3, set()),
        ("Llama", YARN, {"gguf"}),
        ("Llama", {**YARN, **BETAS}, {"gguf"}),
        ("Qwen2", YARN, {"gguf"}),
        ("Qwen2", {**YARN, **BETAS}, {"gguf"}),
        ("Qwen3", {**YARN, **BETAS, "mscale": 1.0}, set()),
        ("Llama", {"rope_type": "dynamic", "factor": 4.0}, set()),
        ("Llama", {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}, set()),
        ("Qwen3", {"rope_type": "ntk"}, set()),
        ("Llama", {**YARN, "attention_factor": 1.3}, set()),
        ("Mistral", {**YARN, "beta_fast": 16.0, "beta_slow": 2.0}, set()),
    ],
)
def test_a_scaled_rope_goes_only_where_the_converter_carries_it(
    name: str, rope: dict[str, Any], targets: set[str]
) -> None:
    """F3 and its like: what each converter drops, it drops without a word."""
    config = {
        "architectures": [f"{name}ForCausalLM"], "rope_parameters": rope, "sliding_window": None,
    }  # fmt: skip
    for target in ("gguf", "onnx"):
        if target in targets:
            carried(config, target, "config.json")
        else:
            with pytest.raises(BaseModelError, match="rope"):
                carried(config, target, "config.json")


@pytest.mark.parametrize(
    ("config", "target"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 8}, "onnx"),
        ({"architectures": ["Qwen3ForCausalLM"], "attention_bias": True}, "gguf"),
    ],
)
def test_what_else_a_converter_would_drop_is_named(config: dict[str, Any], target: str) -> None:
    other = {"onnx": "gguf", "gguf": "onnx"}[target]
    carried(config, other, "config.json")
    with pytest.raises(BaseModelError, match=f"--to {other}"):
        carried(config, target, "config.json")


@pytest.mark.parametrize(
    ("name", "config", "window"),
    [
        ("Llama", {}, None),
        ("Mistral", {}, 4096),
        ("Mistral", {"sliding_window": None}, None),
        ("Mistral", {"sliding_window": 8}, 8),
        ("Mistral", {"sliding_window": 8192}, None),
        ("Qwen2", {"sliding_window": 8}, None),
        ("Qwen2", {"sliding_window": 8, "use_sliding_window": True}, None),
        ("Qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}, 8),
        ("Qwen3", {"use_sliding_window": True, "max_window_layers": 0}, 4096),
        (
            "Qwen3",
            {"sliding_window": 8, "use_sliding_window": True,
             "layer_types": ["full_attention", "sliding_attention"]},
            8,
        ),
    ],
)  # fmt: skip
def test_the_window_is_the_one_that_transformers_would_use(
    name: str, config: dict[str, Any], window: int | None
) -> None:
    import transformers

    given = {"num_hidden_layers": 2, "max_position_embeddings": 8192, **config}
    assert window_of({"architectures": [f"{name}ForCausalLM"], **given}) == window
    theirs = getattr(transformers, f"{name}Config")(**given)
    types = getattr(theirs, "layer_types", None) or ["sliding_attention"]
    found = getattr(theirs, "sliding_window", None) if "sliding_attention" in types else None
    assert window == (found if found is not None and found < 8192 else None)


# --- files of a folder (F6) ------------------------------------------------------------------------


def shard(path: Path) -> dict[str, str]:
    """Splits the weights of a folder in two, with an index; the single file stays."""
    weights = load_file(path / "model.safetensors")
    split = {
        name: f"model-0000{1 + index % 2}-of-00002.safetensors"
        for index, name in enumerate(sorted(weights))
    }
    for file in set(split.values()):
        save_file({name: weights[name] for name in weights if split[name] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": split}))
    return split


def test_weights_that_lie_there_twice_are_named(changed: Callable[..., Path]) -> None:
    path = changed()
    shard(path)
    with pytest.raises(BaseModelError, match=r"model\.safetensors: .*the weights once"):
        open_base(path)
    (path / "model.safetensors").rename(path / "model-fp32.safetensors")
    with pytest.raises(BaseModelError, match=r"model-fp32\.safetensors: .*the weights once"):
        open_base(path)
    (path / "model-fp32.safetensors").unlink()
    assert open_base(path).n_layers == 2


def test_shards_without_an_index_beside_a_single_file_are_named(
    changed: Callable[..., Path],
) -> None:
    path = changed()
    shard(path)
    (path / "model.safetensors.index.json").unlink()
    with pytest.raises(BaseModelError, match=r"model-00001-of-00002\.safetensors"):
        open_base(path)


@pytest.mark.parametrize("what", ["left out", "elsewhere", "made up"])
def test_an_index_that_does_not_fit_its_shards_is_named(
    changed: Callable[..., Path], what: str
) -> None:
    path = changed()
    split = shard(path)
    (path / "model.safetensors").unlink()
    name = "model.norm.weight"
    if what == "left out":
        del split[name]
    elif what == "elsewhere":
        split[name] = next(file for file in split.values() if file != split[name])
    else:
        name = "model.layers.0.extra.weight"
        split[name] = next(iter(split.values()))
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": split}))
    with pytest.raises(BaseModelError, match=name.replace(".", r"\.")):
        open_base(path)


def test_an_adapter_in_the_folder_of_its_base_is_named(changed: Callable[..., Path]) -> None:
    """transformers would load it into the base without a word."""
    path = changed()
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseModelError, match=r"adapter_config\.json"):
        open_base(path)


# --- a GGUF for PyTorch (F1, F2) -------------------------------------------------------------------


def check(architecture: str, tensors: dict[str, Any], keys: dict[str, Value]) -> None:
    base = open_base(tiny.gguf_model(architecture))
    assert base.model is not None
    some = next(iter(base.model.tensors.values()))
    kept = {**base.model.tensors, **dict.fromkeys(tensors, some)}
    kept = {name: info for name, info in kept.items() if tensors.get(name, ...) is not None}
    model = dataclasses.replace(base.model, tensors=kept, metadata={**base.model.metadata, **keys})
    model = dataclasses.replace(
        model,
        shards=(dataclasses.replace(model.shards[0], metadata=model.metadata), *model.shards[1:]),
    )
    check_gguf_for_torch(architecture, model, base.n_layers, base.n_head, "model.gguf")


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_what_the_loader_reads_is_what_a_plain_gguf_has(architecture: str) -> None:
    check(architecture, {}, {})


@pytest.mark.parametrize(
    ("architecture", "name", "change"),
    [
        ("llama", "rope_freqs.weight", ...),
        ("qwen3", "blk.1.attn_q.bias", ...),
        ("llama", "blk.0.attn_output.scale", ...),
        ("llama", "blk.1.attn_sinks.weight", ...),
        ("qwen2", "blk.1.attn_output.bias", ...),
        ("qwen2", "blk.1.attn_k.bias", None),
        ("qwen3", "blk.0.attn_q_norm.weight", None),
        ("llama", "output_norm.weight", None),
    ],
)
def test_a_tensor_that_the_loader_would_leave_out_or_make_up_is_named(
    architecture: str, name: str, change: Any
) -> None:
    with pytest.raises(BaseModelError, match=rf"{name}.*\n.*Hugging Face folder"):
        check(architecture, {name: change}, {})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scaling.type", Value(ValueType.STRING, "yarn")),
        ("rope.scaling.factor", Value(ValueType.FLOAT32, 4.0)),
        ("rope.scaling.original_context_length", Value(ValueType.UINT32, 256)),
        ("attention.scale", Value(ValueType.FLOAT32, 0.5)),
        ("logit_scale", Value(ValueType.FLOAT32, 0.5)),
        ("final_logit_softcapping", Value(ValueType.FLOAT32, 30.0)),
        ("attention.sliding_window", Value(ValueType.UINT32, 8)),
        ("attention.value_length", Value(ValueType.UINT32, 8)),
        ("rope.dimension_count", Value(ValueType.UINT32, 8)),
        ("attention.causal", Value(ValueType.BOOL, False)),
    ],
)
def test_a_key_that_the_loader_would_leave_out_is_named(key: str, value: Value) -> None:
    with pytest.raises(BaseModelError, match=key.replace(".", r"\.")):
        check("llama", {}, {f"llama.{key}": value})


def test_the_size_of_a_head_is_handed_to_the_loader() -> None:
    """F15: transformers does not read it for qwen3."""
    model = open_base(tiny.gguf_model("qwen3")).model
    assert model is not None
    assert gguf_config("qwen3", model)["head_dim"] == 32


def test_all_that_is_wrong_is_named_at_once(changed: Callable[..., Path]) -> None:
    with pytest.raises(SafeGeneError) as caught:
        open_base(changed(logit_scale=2.0, hidden_act="gelu", clip_qkv=1.0))
    fields = {problem.field for problem in caught.value.problems}
    assert fields == {"logit_scale", "hidden_act", "clip_qkv"}
