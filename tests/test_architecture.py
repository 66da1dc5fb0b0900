"""The table of architectures, proved on models that llama.cpp's own converter converted."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny
import tiny_architectures
from safetensors import safe_open
from test_exactness import check_exact

import safegene_converter
import safegene_runtime
from safegene_converter.inputs.base import open_base
from safegene_converter.inputs.row_proof import prove_transform
from safegene_runtime.architecture import table
from safegene_runtime.architecture.row_order import Transform
from safegene_runtime.architecture.table import (
    TABLE,
    architecture_named,
    architecture_of_config,
    architecture_of_type,
    layer_of,
    module_kinds,
    parse_module,
    parse_paths,
)
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
def test_every_architecture_has_a_tiny_model(architecture: str) -> None:
    config = json.loads((tiny.hf_model(architecture) / "config.json").read_text())
    row = TABLE[architecture]
    assert architecture_of_config(config, "config.json") is row
    assert architecture_of_type(config["model_type"], "config.json") is row
    assert architecture_named(architecture, "model.gguf") is row


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_module_is_upstreams_tensor_in_upstreams_row_order(architecture: str) -> None:
    theirs, ours = _gguf_weights(architecture), _hf_weights(architecture)
    row = TABLE[architecture]
    for module in tiny.modules(architecture):
        transform = row.transform(module, tiny.N_HEAD, tiny.N_HEAD_KV)
        tensor = row.tensor_of(module)
        w_hf, w_gguf = ours[f"{module}.weight"], theirs[tensor]
        np.testing.assert_array_equal(transform.apply_rows(w_hf), w_gguf)
        np.testing.assert_array_equal(transform.invert_rows(w_gguf), w_hf)
        assert prove_transform(w_hf, w_gguf, transform) == 0
        assert transform.is_identity == np.array_equal(w_hf, w_gguf)
        if not transform.is_identity:
            assert prove_transform(w_hf, w_gguf, Transform()) > 1
        assert row.module_of(tensor) == module


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_every_linear_weight_of_a_block_is_a_module(architecture: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.hf_model(architecture))
    linears = [name for name, module in model.named_modules() if type(module) is torch.nn.Linear]
    assert sorted(tiny.modules(architecture)) == sorted(set(linears) - {"lm_head"})
    for module in tiny.modules(architecture):
        found = parse_module(module)
        assert found is not None
        assert found == TABLE[architecture].parse(module)
        assert TABLE[architecture].module_name(found.layer, found.part) == module
        assert (layer_of(module), found.kind) == (found.layer, module.rsplit(".", 1)[-1])


def test_llama_has_the_row_orders_of_upstreams_permute() -> None:
    orders = {part: TABLE["llama"].transform(f"model.layers.0.{part}", 4, 2).n_heads
              for part in TABLE["llama"].tensors}  # fmt: skip
    changed = {part: heads for part, heads in orders.items() if heads}
    assert changed == {"self_attn.q_proj": 4, "self_attn.k_proj": 2}


def test_the_kinds_of_modules_have_one_order() -> None:
    assert module_kinds()[:7] == (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    assert len(set(module_kinds())) == len(module_kinds())


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_tensors_have_the_names_that_gguf_py_gives_them(architecture: str) -> None:
    row = TABLE[architecture]
    kind = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    theirs = gguf.get_tensor_name_map(kind, 3)
    for part in row.tensors:
        module = row.module_name(2, part)
        tensor = theirs.get_name(f"{module}.weight", try_suffixes=(".weight",))
        assert row.tensor_of(module) == tensor


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_no_other_tensor_is_taken_for_a_module(architecture: str) -> None:
    found = {TABLE[architecture].module_of(name) for name in _gguf_weights(architecture)}
    assert found - {None} == set(tiny.modules(architecture))


def test_no_name_stands_in_two_rows() -> None:
    for names in (
        [one.name for row in TABLE.values() for one in row.classes],
        [one for row in TABLE.values() for one in row.model_types],
    ):
        assert len(set(names)) == len(names)


def test_only_the_table_knows_an_architecture() -> None:
    """So that a new one is one row: no other module of the packages names one, or its parts."""
    home = Path(table.__file__)
    known = {
        one
        for row in TABLE.values()
        for one in (row.name, *(kind.name for kind in row.classes), *row.model_types)
    }
    known |= {one for row in TABLE.values() for one in (*row.tensors, *row.tensors.values())}
    known |= {*module_kinds(), *table.PACKED}
    known.remove("dense")  # of Phi and Falcon; a word of its own elsewhere
    for package in (safegene_runtime, safegene_converter):
        for path in sorted(Path(package.__file__).parent.rglob("*.py")):
            strings = {
                node.value
                for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
                if isinstance(node, ast.Constant) and isinstance(node.value, str)
            }
            assert path == home or not strings & known, path


def test_contributing_adds_an_architecture_by_a_row_and_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (tiny.REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.split("## A new dense architecture")[1].split("\n## ")[0]
    row_text, model_text = re.findall(r"```python\n(.*?)```", section, re.S)
    row = eval(row_text, vars(table))
    base = tiny.gguf_model(row.name)
    known = TABLE[row.name], tiny_architectures.MODELS[row.name]
    monkeypatch.delitem(TABLE, row.name)
    monkeypatch.delitem(tiny_architectures.MODELS, row.name)
    with pytest.raises(UnsupportedError, match=f"got {row.name}"):
        open_base(base)
    monkeypatch.setitem(TABLE, row.name, row)
    with pytest.raises(LookupError, match=f"{row.name} has no tiny model"):
        tiny.hf_model(row.name)
    (model,) = eval(model_text, vars(tiny_architectures)).items()
    monkeypatch.setitem(tiny_architectures.MODELS, *model)
    assert (row, model[1]) == known
    adapter = tiny.peft_adapter(
        row.name, tmp_path / "adapter", scale=0.1, target_modules=tiny.kinds(row.name)
    )
    check_exact(adapter, row.name, tmp_path, None)


def test_paths_in_a_graph_are_found_however_the_exporter_writes_them() -> None:
    row = TABLE["llama"]
    for text, expected in {
        "/model/layers.0/attn/qkv_proj/MatMul": {(0, "qkv_proj")},
        "/model/layers.12/self_attn/q_proj/MatMul": {(12, "q_proj")},
        "model.layers.1.mlp.down_proj.weight": {(1, "down_proj")},
        "['model', 'model.layers.1.mlp.up_proj']": {(1, "up_proj")},
        "model.layers.3.mlp.gate_up_proj.MatMul.weight_Q4": {(3, "gate_up_proj")},
        "/model/layers.0/attn/qkv_projector/MatMul": set(),
        "/model/players.0/attn/q_proj/MatMul": set(),
        "/lm_head/MatMul": set(),
    }.items():
        assert parse_paths(row, text) == expected, text
    # no gate, so nothing can be packed with it
    assert parse_paths(TABLE["arcee"], "/model/layers.0/mlp/gate_up_proj/MatMul") == set()


def test_a_delta_may_be_permuted_through_its_b_factor() -> None:
    random = np.random.default_rng(0)
    a, b = random.standard_normal((3, 10)), random.standard_normal((24, 3))
    transform = Transform("permute", 3)
    np.testing.assert_array_equal(transform.apply_rows(b) @ a, transform.apply_rows(b @ a))


@pytest.mark.parametrize(
    "order",
    [
        Transform(), *(Transform("permute", heads) for heads in (1, 3, 6)),
        Transform("regroup", 4, 4), Transform("regroup", 4, 2), Transform("regroup", 4, 1),
    ],
)  # fmt: skip
@pytest.mark.parametrize("shape", [(24, 5), (24,), (24, 2, 3)])
def test_a_transform_is_a_permutation_and_has_an_inverse(
    order: Transform, shape: tuple[int, ...]
) -> None:
    array = np.arange(np.prod(shape)).reshape(shape)
    moved = order.apply_rows(array)
    assert sorted(moved.reshape(-1)) == sorted(array.reshape(-1))
    np.testing.assert_array_equal(order.invert_rows(moved), array)


def test_rows_that_are_not_whole_heads_are_refused() -> None:
    with pytest.raises(BaseModelError, match="multiple of 6, of 3 heads"):
        Transform("permute", 3).apply_rows(np.zeros((20, 4)))
    with pytest.raises(BaseModelError, match="multiple of 8, of 4 heads"):
        Transform("regroup", 4, 2).apply_rows(np.zeros((20, 4)))


def test_a_transform_of_another_shape_is_not_proved() -> None:
    with pytest.raises(BaseModelError, match="shape"):
        prove_transform(np.zeros((4, 4), np.float32), np.zeros((4, 2), np.float32), Transform())


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
        TABLE["llama"].tensor_of(module)
    assert parse_module(module) is None
    with pytest.raises(UnsupportedError, match="not supported yet"):
        layer_of(module)


@pytest.mark.parametrize("architecture", ["rwkv7", "mamba", "deepseek2", None, 7])
def test_other_architectures_are_refused_by_name(architecture: object) -> None:
    with pytest.raises(UnsupportedError, match=str(architecture)):
        architecture_named(architecture, "base.gguf")


@pytest.mark.parametrize(
    ("model_class", "expected"),
    [
        ("LlamaForCausalLM", "llama"),
        ("MistralForCausalLM", "llama"),
        ("Qwen2ForCausalLM", "qwen2"),
        ("Qwen3ForCausalLM", "qwen3"),
        ("SmolLM3ForCausalLM", "smollm3"),
        ("ArceeForCausalLM", "arcee"),
    ],
)
def test_configs_are_mapped_as_upstream_maps_them(model_class: str, expected: str) -> None:
    found = architecture_of_config({"architectures": [model_class]}, "config.json")
    assert found.name == expected


@pytest.mark.parametrize(
    "classes",
    [
        ["DeepseekV3ForCausalLM"],
        ["GPTNeoXForCausalLM"],
        [],
        None,
        "LlamaForCausalLM",
        ["LlamaForCausalLM", "Other"],
        [["LlamaForCausalLM"]],
    ],
)
def test_other_model_classes_are_refused(classes: object) -> None:
    with pytest.raises(UnsupportedError, match="architectures"):
        architecture_of_config({"architectures": classes}, "config.json")
