"""Names and row orders, proved on models that llama.cpp's own converter converted."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import tiny
from safetensors import safe_open

from safegene_converter.inputs import names
from safegene_converter.inputs.names import Transform
from safegene_runtime.errors import BaseModelError, UnsupportedError
from safegene_runtime.formats.gguf.model import open_model
from safegene_runtime.formats.gguf.tensors import read_tensor_bytes


def _hf_weights(architecture: str) -> dict[str, np.ndarray]:
    with safe_open(tiny.hf_model(architecture) / "model.safetensors", "np") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def _gguf_weights(architecture: str) -> dict[str, np.ndarray]:
    tensors = open_model(tiny.gguf_model(architecture)).tensors
    return {
        name: np.frombuffer(read_tensor_bytes(info), "<f4").reshape(info.shape)
        for name, info in tensors.items()
    }


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_module_is_upstreams_tensor_in_upstreams_row_order(architecture: str) -> None:
    theirs, ours = _gguf_weights(architecture), _hf_weights(architecture)
    checked = 0
    for layer in range(tiny.N_LAYERS):
        for part in names.BLOCK_MODULES:
            module = f"model.layers.{layer}.{part}"
            transform = names.transform_for(architecture, module, tiny.N_HEAD, tiny.N_HEAD_KV)
            tensor = names.gguf_name(architecture, module)
            w_hf, w_gguf = ours[f"{module}.weight"], theirs[tensor]
            np.testing.assert_array_equal(transform.apply_rows(w_hf), w_gguf)
            np.testing.assert_array_equal(transform.invert_rows(w_gguf), w_hf)
            assert names.prove_transform(w_hf, w_gguf, transform) == 0
            if not transform.is_identity:
                assert names.prove_transform(w_hf, w_gguf, Transform()) > 1
            assert names.module_name(architecture, tensor) == module
            checked += 1
    assert checked == 7 * tiny.N_LAYERS
    permuted = [
        part
        for part in names.BLOCK_MODULES
        if not names.transform_for(architecture, part, 4, 2).is_identity
    ]
    assert permuted == (["self_attn.q_proj", "self_attn.k_proj"] if architecture == "llama" else [])


@pytest.mark.parametrize("architecture", names.ARCHITECTURES)
def test_tensors_have_the_names_that_gguf_py_gives_them(architecture: str) -> None:
    kind = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    theirs = gguf.get_tensor_name_map(kind, 3)
    for part in names.BLOCK_MODULES:
        module = f"model.layers.2.{part}"
        tensor = theirs.get_name(f"{module}.weight", try_suffixes=(".weight",))
        assert names.gguf_name(architecture, module) == tensor


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_no_other_tensor_is_taken_for_a_module(architecture: str) -> None:
    found = {names.module_name(architecture, name) for name in _gguf_weights(architecture)}
    assert len(found - {None}) == 7 * tiny.N_LAYERS


def test_a_delta_may_be_permuted_through_its_b_factor() -> None:
    random = np.random.default_rng(0)
    a, b = random.standard_normal((3, 10)), random.standard_normal((24, 3))
    transform = Transform(3)
    np.testing.assert_array_equal(transform.apply_rows(b) @ a, transform.apply_rows(b @ a))


@pytest.mark.parametrize("n_heads", [0, 1, 3, 6])
@pytest.mark.parametrize("shape", [(24, 5), (24,), (24, 2, 3)])
def test_a_transform_is_a_permutation_and_has_an_inverse(
    n_heads: int, shape: tuple[int, ...]
) -> None:
    array = np.arange(np.prod(shape)).reshape(shape)
    moved = Transform(n_heads).apply_rows(array)
    assert sorted(moved.reshape(-1)) == sorted(array.reshape(-1))
    np.testing.assert_array_equal(Transform(n_heads).invert_rows(moved), array)


def test_rows_that_are_not_whole_heads_are_refused() -> None:
    with pytest.raises(BaseModelError, match="multiple of 2 x 3"):
        Transform(3).apply_rows(np.zeros((20, 4)))


def test_a_transform_of_another_shape_is_not_proved() -> None:
    with pytest.raises(BaseModelError, match="shape"):
        names.prove_transform(
            np.zeros((4, 4), np.float32), np.zeros((4, 2), np.float32), Transform()
        )


@pytest.mark.parametrize(
    "module",
    [
        "lm_head",
        "model.embed_tokens",
        "model.norm",
        "model.layers.0.input_layernorm",
        "model.layers.01.mlp.up_proj",
        "model.layers.-1.mlp.up_proj",
        "layers.0.mlp.up_proj",
        "model.layers.0.mlp.experts.0.up_proj",
        "model.layers.0.mlp.up_proj.weight",
        "",
    ],
)
def test_modules_that_are_no_linear_of_a_block_are_refused(module: str) -> None:
    with pytest.raises(UnsupportedError, match="not supported yet"):
        names.gguf_name("llama", module)


@pytest.mark.parametrize("architecture", ["gemma2", "phi3", "qwen3moe", None, 7])
def test_other_architectures_are_refused_by_name(architecture: object) -> None:
    with pytest.raises(UnsupportedError, match=str(architecture)):
        names.check_architecture(architecture, "base.gguf")


@pytest.mark.parametrize(
    ("model_class", "expected"),
    [
        ("LlamaForCausalLM", "llama"),
        ("MistralForCausalLM", "llama"),
        ("Qwen2ForCausalLM", "qwen2"),
        ("Qwen3ForCausalLM", "qwen3"),
    ],
)
def test_configs_are_mapped_as_upstream_maps_them(model_class: str, expected: str) -> None:
    assert names.architecture_of_config({"architectures": [model_class]}, "config.json") == expected


@pytest.mark.parametrize(
    "classes",
    [
        ["MixtralForCausalLM"],
        ["GemmaForCausalLM"],
        [],
        None,
        "LlamaForCausalLM",
        ["LlamaForCausalLM", "Other"],
        [["LlamaForCausalLM"]],
    ],
)
def test_other_model_classes_are_refused(classes: object) -> None:
    with pytest.raises(UnsupportedError, match="architectures"):
        names.architecture_of_config({"architectures": classes}, "config.json")
