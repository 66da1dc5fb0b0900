"""Opening a base: what it tells, and what it refuses before any work."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny

from safegene_converter.inputs.base import open_base
from safegene_runtime.architecture.table import TABLE
from safegene_runtime.errors import BaseModelError, SafeGeneError, UnsupportedError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a tiny Hugging Face folder that a test may damage."""
    return Path(shutil.copytree(tiny.hf_model("llama"), tmp_path / "model"))


def _edit(path: Path, **changes: Any) -> None:
    content = json.loads(path.read_text())
    content.update(changes)
    path.write_text(json.dumps({key: value for key, value in content.items() if value != "absent"}))


def _tiny_gguf(path: Path, edit: Callable[[dict[str, Any], dict[str, np.ndarray]], None]) -> Path:
    """A minimal llama GGUF of one layer, after `edit` changed its metadata and tensors."""
    metadata: dict[str, Any] = {
        "llama.block_count": 1,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
    }
    shapes = {
        "attn_q": (64, 64),
        "attn_k": (32, 64),
        "attn_v": (32, 64),
        "attn_output": (64, 64),
        "ffn_gate": (128, 64),
        "ffn_up": (128, 64),
        "ffn_down": (64, 128),
    }
    tensors = {f"blk.0.{name}.weight": np.ones(shape, np.float32) for name, shape in shapes.items()}
    tensors["blk.0.attn_norm.weight"] = np.ones(64, np.float32)
    edit(metadata, tensors)
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", "llama"))
    for key, value in metadata.items():
        add = (
            writer.add_string
            if isinstance(value, str)
            else (writer.add_array if isinstance(value, list) else writer.add_uint32)
        )
        add(key, value)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_a_folder_and_its_gguf_tell_the_same(architecture: str) -> None:
    hf, ours = open_base(tiny.hf_model(architecture)), open_base(tiny.gguf_model(architecture))
    assert (hf.kind, ours.kind) == ("hf", "gguf")
    for base in (hf, ours):
        assert base.architecture == architecture
        assert (base.n_layers, base.n_head, base.n_head_kv) == (tiny.n_layers(architecture), 4, 2)
        assert base.is_float
        assert sorted(base.module_shapes()) == sorted(tiny.modules(architecture))
    assert hf.module_shapes() == ours.module_shapes()
    assert hf.n_parameters == ours.n_parameters
    q_rows = 4 * 32 if architecture == "qwen3" else 64
    assert hf.module_shapes()["model.layers.1.self_attn.q_proj"] == (q_rows, 64)
    assert hf.module_shapes()["model.layers.1.mlp.down_proj"] == (64, 128)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_weights_are_read_in_their_own_row_order(architecture: str) -> None:
    hf, ours = open_base(tiny.hf_model(architecture)), open_base(tiny.gguf_model(architecture))
    for part in TABLE[architecture].tensors:
        module = f"model.layers.1.{part}"
        moved = hf.transform(module).apply_rows(hf.read_weight(module))
        np.testing.assert_array_equal(moved, ours.read_weight(module))
    with pytest.raises(BaseModelError, match=r"layers\.9"):
        hf.read_weight("model.layers.9.mlp.up_proj")


def test_digests_are_of_every_file_that_matters() -> None:
    base = open_base(tiny.hf_model("llama"))
    seen: list[int] = []
    digests = base.digests(seen.append)
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= set(
        digests
    )
    weights = (base.path / "model.safetensors").read_bytes()
    assert digests["model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert sum(seen) == sum(file.stat().st_size for file in base.files)


def test_symbolic_links_of_a_download_cache_are_followed(tmp_path: Path) -> None:
    for file in tiny.hf_model("llama").iterdir():
        (tmp_path / file.name).symlink_to(file)
    base = open_base(tmp_path)
    assert base.digests() == open_base(tiny.hf_model("llama")).digests()


def test_a_sharded_folder_is_one_base(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    split = {
        name: f"model-0000{1 + index % 2}-of-00002.safetensors"
        for index, name in enumerate(sorted(weights))
    }
    for file in set(split.values()):
        save_file({name: weights[name] for name in weights if split[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": split}))
    base, whole = open_base(folder), open_base(tiny.hf_model("llama"))
    assert base.module_shapes() == whole.module_shapes()
    assert base.n_parameters == whole.n_parameters
    module = "model.layers.0.mlp.up_proj"
    np.testing.assert_array_equal(base.read_weight(module), whole.read_weight(module))
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(BaseModelError, match="model-00002-of-00002"):
        open_base(folder)


def test_a_quantised_gguf_is_not_float() -> None:
    base = open_base(tiny.smollm2_gguf())
    assert not base.is_float
    assert (base.architecture, base.n_layers, base.n_head, base.n_head_kv) == ("llama", 30, 9, 3)
    assert base.n_parameters == 134_515_008
    assert base.module_shapes()["model.layers.29.mlp.down_proj"] == (576, 1536)


def test_head_counts_per_layer_may_be_equal(tmp_path: Path) -> None:
    def per_layer(metadata: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        metadata["llama.attention.head_count"] = [4]  # of its one layer

    assert open_base(_tiny_gguf(tmp_path / "a.gguf", per_layer)).n_head == 4


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("architecture", "rwkv7", "rwkv7"),
        ("llama.expert_count", 8, "tensors of experts"),
        ("general.type", "adapter", "general.type"),
        ("safegene.version", "0.1.0", "one that holds a SafeGene adapter"),
        ("llama.block_count", 0, "block_count"),
        ("llama.block_count", 2, "7 missing"),
        ("llama.attention.head_count", "many", "head_count"),
        ("llama.attention.head_count_kv", [2, 1], "head_count_kv"),
    ],
)
def test_gguf_metadata_that_does_not_fit_is_refused(
    tmp_path: Path, key: str, value: Any, message: str
) -> None:
    path = _tiny_gguf(tmp_path / "a.gguf", lambda metadata, tensors: metadata.update({key: value}))
    with pytest.raises((BaseModelError, UnsupportedError), match=message):
        open_base(path)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blk.0.attn_q.scale", (1,), "rescaled"),
        ("blk.0.attn_qkv.weight", (8, 64), "fused"),
        ("blk.1.ffn_up.weight", (128, 64), "layers.1"),
        ("blk.0.ffn_up.weight", (2, 64, 64), "two dim"),
    ],
)
def test_gguf_tensors_that_do_not_fit_are_refused(
    tmp_path: Path, name: str, shape: tuple[int, ...], message: str
) -> None:
    path = _tiny_gguf(
        tmp_path / "a.gguf",
        lambda metadata, tensors: tensors.update({name: np.ones(shape, np.float32)}),
    )
    with pytest.raises((BaseModelError, UnsupportedError), match=message):
        open_base(path)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"architectures": ["T5ForConditionalGeneration"]},
            UnsupportedError,
            "T5ForConditionalGeneration",
        ),
        ({"architectures": "absent"}, UnsupportedError, "architectures"),
        ({"auto_map": {"AutoModel": "x.Y"}}, UnsupportedError, "run their own code"),
        ({"quantization_config": {"quant_method": "gptq"}}, UnsupportedError, "quantised"),
        ({"num_local_experts": 8}, UnsupportedError, "MoE"),
        ({"num_hidden_layers": 3}, BaseModelError, "missing"),
        ({"num_hidden_layers": 1}, BaseModelError, "layers.1"),
        ({"num_hidden_layers": "absent"}, BaseModelError, "num_hidden_layers"),
        ({"num_attention_heads": True}, BaseModelError, "num_attention_heads"),
    ],
)
def test_configs_that_do_not_fit_are_refused(
    folder: Path, changes: dict[str, Any], error: type[SafeGeneError], message: str
) -> None:
    _edit(folder / "config.json", **changes)
    with pytest.raises(error, match=message):
        open_base(folder)


def test_all_refused_features_are_named_at_once(folder: Path) -> None:
    _edit(folder / "config.json", auto_map={"a": "b"}, num_experts=4, architectures=["X"])
    with pytest.raises(UnsupportedError) as caught:
        open_base(folder)
    assert {problem.field for problem in caught.value.problems} == {
        "auto_map",
        "num_experts",
        "architectures",
    }


def test_a_tokenizer_with_code_of_its_own_is_refused(folder: Path) -> None:
    _edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["x.Y", None]})
    with pytest.raises(UnsupportedError, match="tokenizer_config"):
        open_base(folder)


def test_pickled_weights_are_not_opened(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseModelError, match="pickle, never opened"):
        open_base(folder)


def test_a_git_lfs_pointer_is_recognised(folder: Path, tmp_path: Path) -> None:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_bytes(pointer)
    (tmp_path / "a.gguf").write_bytes(pointer)
    for path in (folder, tmp_path / "a.gguf"):
        with pytest.raises(BaseModelError, match="git lfs pull"):
            open_base(path)


def test_an_index_may_not_name_files_elsewhere(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "../x.safetensors"}}'
    )
    with pytest.raises(BaseModelError, match="weight_map"):
        open_base(folder)


def test_what_is_no_base_is_explained(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="nothing there"):
        open_base(tmp_path / "missing")
    with pytest.raises(BaseModelError, match=r"config\.json"):
        open_base(tmp_path)
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(BaseModelError, match="an empty file"):
        open_base(tmp_path / "empty.gguf")
    (tmp_path / "empty.gguf").unlink()
    (tmp_path / "manifest.json").touch()
    with pytest.raises(BaseModelError, match=r"an artifact\n.*the base that this was made"):
        open_base(tmp_path)
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(BaseModelError, match=r"--base .*model\.gguf"):
        open_base(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseModelError, match="not the adapter"):
        open_base(tmp_path)
    (tmp_path / "weights.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    with pytest.raises(BaseModelError, match="starts with"):
        open_base(tmp_path / "weights.safetensors")
