"""Where the base graph comes from: tied or not, from GGUF, larger than protobuf can hold."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
from onnx import TensorProto, helper
from onnx_tools import arrays, every_module, feeds, quick, session
from safetensors.numpy import load_file, save_file
from test_to_gguf import peft_delta

from safegene_converter.bases.gguf_to_hf import check_decodable, gguf_to_hf
from safegene_converter.bases.onnx_build import build_onnx, check_build_options
from safegene_converter.inputs.base import open_base
from safegene_runtime.child import python_environment
from safegene_runtime.errors import BaseModelError, SafeGeneError, UnsupportedError
from safegene_runtime.formats.gguf.types import Value, ValueType
from safegene_runtime.formats.onnx.file import read_onnx


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return every_module(tmp_path_factory.mktemp("source") / "adapter")


# --- GGUF ------------------------------------------------------------------------------------------


def test_a_float_gguf_gives_what_its_folder_gives(adapter: Path, tmp_path: Path) -> None:
    manifest = quick(adapter, tiny.gguf_model("llama"), tmp_path / "gguf", form="merged")
    assert manifest.base["kind"] == "gguf"
    assert list(manifest.base["files"]) == ["model.gguf"]
    assert manifest.settings["transform_error"] == manifest.settings["weight_error"] == 0.0
    quick(adapter, tiny.onnx_model("llama"), tmp_path / "onnx", form="merged")
    one, two = arrays(tmp_path / "gguf"), arrays(tmp_path / "onnx")
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "gguf" / name).read_bytes() == (tmp_path / "onnx" / name).read_bytes()


def test_a_quantised_gguf_is_refused_by_its_types(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"F32, F16, BF16.*Q4_1.*\n.*float model"):
        quick(adapter, tiny.smollm2_gguf(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_the_gguf_loader_would_drop_is_refused() -> None:
    base = open_base(tiny.gguf_model("llama"))
    assert base.model is not None
    check_decodable(base)
    scaled = {**base.model.metadata,
              "llama.rope.scaling.type": Value(ValueType.STRING, "yarn", None)}  # fmt: skip
    model = dataclasses.replace(base.model, metadata=scaled)
    with pytest.raises(BaseModelError, match="yarn"):
        check_decodable(dataclasses.replace(base, model=model))
    with pytest.raises(UnsupportedError, match="2 shards"):
        check_decodable(dataclasses.replace(base, files=base.files * 2))


def test_a_loader_that_mixes_rows_is_caught_on_the_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loader must undo llama.cpp's order of q and k; here it seems not to have done so."""
    base = dataclasses.replace(open_base(tiny.gguf_model("llama")), n_head=1, n_head_kv=1)
    monkeypatch.setattr(
        "safegene_converter.bases.gguf_to_hf.run_child",
        lambda command, **more: shutil.copytree(tiny.hf_model("llama"), command[-1]),
    )
    with pytest.raises(BaseModelError) as caught:
        gguf_to_hf(base, tmp_path / "out", lambda stage, done, total: None)
    assert len(caught.value.problems) == 4, "q and k of two layers"


# --- tied and untied -------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_untouched_tied_or_not(tied: bool, adapter: Path, tmp_path: Path) -> None:
    """A delta on the blocks must not reach the embeddings, nor the head that may share them."""
    base = tiny.onnx_model("llama")
    if not tied:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(tiny.hf_model("llama"))
        model.config.tie_word_embeddings = False
        model.lm_head.weight = type(model.lm_head.weight)(model.lm_head.weight.detach() * 0.5)
        shutil.copytree(tiny.hf_model("llama"), tmp_path / "hf")
        model.save_pretrained(tmp_path / "hf")
        base = tmp_path / "base"
        build_onnx(tmp_path / "hf", base, "fp32")
        shutil.copy(tmp_path / "hf" / "config.json", base)
    manifest = quick(adapter, base, tmp_path / "out", form="merged")
    before, after = arrays(base), arrays(tmp_path / "out")
    head = [name for name in before if "lm_head" in name or "embed" in name]
    assert len({before[name].tobytes() for name in head}) >= (1 if tied else 2)
    assert all(np.array_equal(before[name], after[name]) for name in head)
    assert len(manifest.modules) == 14
    one, two = session(base / "model.onnx"), session(tmp_path / "out" / "model.onnx")
    logits = [s.run(["logits"], feeds(s, [[5, 77, 1042]]))[0] for s in (one, two)]
    assert np.abs(logits[0] - logits[1]).max() > 0.01


# --- a graph and the weights it was made from ------------------------------------------------------


def with_weights(base: Path, out: Path) -> Path:
    """An ONNX folder in which the weights lie that it was exported from."""
    shutil.copytree(base, out)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny.hf_model("llama") / name, out)
    return out


def test_weights_beside_the_graph_prove_it_and_the_graph_is_the_base(
    adapter: Path, tmp_path: Path
) -> None:
    base = with_weights(tiny.onnx_model("llama"), tmp_path / "base")
    manifest = quick(adapter, base, tmp_path / "out", form="merged")
    assert manifest.base["kind"] == "onnx"
    assert {"model.onnx", "model.onnx.data", "model.safetensors"} <= manifest.base["files"].keys()
    assert "export" not in manifest.settings
    assert manifest.settings["weight_error"] == 0.0
    weights = load_file(base / "model.safetensors")
    name = "model.layers.1.self_attn.k_proj.weight"
    save_file({**weights, name: weights[name][::-1].copy()}, base / "model.safetensors")
    with pytest.raises(BaseModelError, match=r"layers\.1\.self_attn\.k_proj.*relative error"):
        quick(adapter, base, tmp_path / "other")
    with pytest.raises(UnsupportedError, match="a folder without it"):
        quick(adapter, base, tmp_path / "other", precision="int4")


def test_where_the_float_weights_are_at_hand_a_merge_is_quantised_once(
    adapter: Path, tmp_path: Path
) -> None:
    base = with_weights(tiny.onnx_model("llama", "int4"), tmp_path / "base")
    quick(adapter, base, tmp_path / "beside", form="merged")
    quick(adapter, tiny.hf_model("llama"), tmp_path / "hf", form="merged", precision="int4")
    quick(adapter, tiny.onnx_model("llama", "int4"), tmp_path / "alone", form="merged")
    beside, exported, alone = (arrays(tmp_path / name) for name in ("beside", "hf", "alone"))
    assert all(np.array_equal(beside[name], exported[name]) for name in exported)
    assert not all(np.array_equal(alone[name], exported[name]) for name in exported)


# --- more than 2 GB --------------------------------------------------------------------------------

GIB = 1 << 30
PEAK_KIB = """
import json, resource, sys
from pathlib import Path
from onnx_tools import convert_onnx
adapter, base, out = sys.argv[1:]
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert_onnx(Path(adapter), Path(base), Path(out), form="merged", check=False)
print(before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def renamed_data(out: Path, name: str) -> Path:
    """The tiny model with its data in a file of another name."""
    shutil.copytree(tiny.onnx_model("llama"), out)
    (out / "model.onnx.data").rename(out / name)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    (out / "model.onnx").write_bytes(model.SerializeToString())
    return out


def large_base(out: Path, n_files: int, hole: int) -> Path:
    """The tiny model with five holes of so many bytes beside its weights, in one file or in several."""
    renamed_data(out, "weights-0.bin")
    model = onnx.load(out / "model.onnx", load_external_data=False)
    start = -(-os.path.getsize(out / "weights-0.bin") // 4096) * 4096
    for number in range(5):
        name = f"weights-{number % n_files}.bin"
        if not (out / name).exists():
            (out / name).touch()
        offset = start if name == "weights-0.bin" else os.path.getsize(out / name)
        start = start + hole if name == "weights-0.bin" else start
        os.truncate(out / name, offset + hole)
        tensor = model.graph.initializer.add(
            name=f"hole.{number}", data_type=TensorProto.FLOAT, dims=[hole // 4]
        )
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", name), ("offset", offset), ("length", hole)):
            tensor.external_data.add(key=key, value=str(value))
        model.graph.node.append(helper.make_node("Identity", [tensor.name], [f"unused.{number}"]))
    (out / "model.onnx").write_bytes(model.SerializeToString())
    return out


@pytest.mark.parametrize(("n_files", "hole"), [(1, GIB // 2), (3, GIB // 4)])
def test_a_large_base_is_not_loaded(n_files: int, hole: int, adapter: Path, tmp_path: Path) -> None:
    """One file of more than 2 GiB, where 31 bits end; and three, each larger than the limit below."""
    base = large_base(tmp_path / "base", n_files, hole)
    total = sum(file.stat().st_size for file in base.iterdir())
    assert total > 5 * hole
    done = subprocess.run(
        [sys.executable, "-c", PEAK_KIB, adapter, base, tmp_path / "out"],
        env=python_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before, peak = map(int, done.stdout.split())
    assert (peak - before) * 1024 < 300 << 20, "a chunk or two, not the model"
    old, new = read_onnx(base / "model.onnx"), read_onnx(tmp_path / "out" / "model.onnx")
    for number in range(5):
        one, two = old.initializers[f"hole.{number}"], new.initializers[f"hole.{number}"]
        assert (one.offset, one.nbytes) == (two.offset, two.nbytes)
        assert one.path is not None
        assert two.path is not None
        assert one.path.name == two.path.name
    name = next(n.inputs[1] for n in old.nodes if "layers.1/mlp/down_proj/MatMul" in n.name)
    pair = []
    for model in (old, new):
        info = model.initializers[name]
        assert info.path is not None
        raw = np.fromfile(info.path, np.float32, info.nbytes // 4, offset=info.offset)
        pair.append(raw.reshape(info.shape).T)
    delta = peft_delta(adapter, "llama")
    change = pair[1] - pair[0]
    assert np.abs(change - delta["model.layers.1.mlp.down_proj"]).max() <= 1e-6
    shutil.rmtree(tmp_path / "out")
    shutil.rmtree(base)


@pytest.mark.parametrize("form", ["merged", "branch"])
def test_the_self_check_reads_a_tensor_at_a_time_and_not_the_model(
    form: str, tmp_path: Path
) -> None:
    only = tiny.peft_adapter(
        "llama", tmp_path / "adapter", scale=0.05, target_modules=["up_proj"],
        layers_to_transform=[0],
    )  # fmt: skip
    base = large_base(tmp_path / "base", 1, GIB // 8)
    for one in {form, "branch"}:
        quick(only, base, tmp_path / one, form=one)  # type: ignore[arg-type]
    graph = read_onnx(tmp_path / "branch" / "model.onnx")
    names = [name for name in graph.initializers if ".safegene.lora_" in name]
    (weight,) = [node.inputs[1] for node in graph.nodes
                 if node.name.endswith("layers.0/mlp/up_proj/MatMul")]  # fmt: skip
    modules = [["model.layers.0.mlp.up_proj", 0, 128]]
    job: dict[str, Any] = {
        "base": base / "model.onnx", "artifact": tmp_path / form / "model.onnx",
        "oracle": tmp_path / "branch" / "model.onnx", "adapter": only, "expression": "default",
        "form": form, "slots": {weight: {"names": sorted(names), "modules": modules}},
        "survived": (1, 1),
    }  # fmt: skip
    code = """
import json, resource, sys
import onnx, onnx.numpy_helper
from safegene_converter.onnx.selfcheck import _compare
from safegene_runtime.errors import Problems
problems = Problems()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
_compare(json.loads(sys.argv[1]), problems)
print(len(problems), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(job, default=str)],
        env=python_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, grown_kib = map(int, done.stdout.split())
    assert count == 0
    assert grown_kib < 64 << 10, "less than one of the holes"


# --- bad input, as a new user gives it -------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    ["manifest.json", "Manifest.JSON", "adapter.onnx_adapter", "model.onnx.safegene.data", ".work",
     "my weights.bin"],
)  # fmt: skip
def test_a_data_file_that_an_artifact_cannot_hold_is_refused_before_any_work(
    name: str, adapter: Path, tmp_path: Path
) -> None:
    base = renamed_data(tmp_path / "base", name)
    told: list[str] = []
    with pytest.raises(BaseModelError) as caught:
        quick(
            adapter, base, tmp_path / "out", progress=lambda stage, done, total: told.append(stage)
        )
    assert name in str(caught.value)
    assert len(caught.value.problems) == 1
    assert told == []
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_data_file_that_looks_like_a_configuration_is_none(adapter: Path, tmp_path: Path) -> None:
    base = renamed_data(tmp_path / "base", "weights.json")
    manifest = quick(adapter, base, tmp_path / "out", form="merged")
    assert [entry.role for entry in manifest.files if entry.path == "weights.json"] == ["data"]


def test_what_is_missing_beside_the_graph_is_named_before_any_work(
    adapter: Path, tmp_path: Path
) -> None:
    hub = tmp_path / "hub"
    hub.mkdir()
    (hub / "config.json").write_text("{}")
    for name, missing, words in (
        ("text", ["tokenizer.json"], "tokenizer.json"),
        ("bare", ["genai_config.json"], "config.json or genai_config.json"),
        ("hub/onnx", ["genai_config.json"], f"from {hub}"),
    ):
        shutil.copytree(tiny.onnx_model("llama"), tmp_path / name)
        for one in missing:
            (tmp_path / name / one).unlink()
        told: list[str] = []
        with pytest.raises(SafeGeneError) as caught:
            quick(
                adapter, tmp_path / name, tmp_path / "out",
                progress=lambda stage, done, total, told=told: told.append(stage),
            )  # fmt: skip
        assert words in str(caught.value)
        assert told == []
    assert not (tmp_path / "out").exists()


def test_every_wrong_base_is_one_clear_message(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a.onnx", "b.onnx"):
        shutil.copy(tiny.onnx_model("llama") / "model.onnx", tmp_path / "two" / name)
    (tmp_path / "hub" / "onnx").mkdir(parents=True)
    (tmp_path / "hub" / "config.json").write_text("{}")
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "model.onnx").write_bytes(b"no model at all")
    shutil.copytree(tiny.onnx_model("llama"), tmp_path / "lost")
    (tmp_path / "lost" / "model.onnx.data").unlink()
    shutil.copytree(tiny.onnx_model("llama"), tmp_path / "named")
    genai = json.loads((tmp_path / "named" / "genai_config.json").read_text())
    genai["model"]["decoder"]["filename"] = "../other.onnx"
    (tmp_path / "named" / "genai_config.json").write_text(json.dumps(genai))
    given = {p.name for p in tmp_path.iterdir()}
    for base, words in {
        tmp_path / "nowhere": "nothing there",
        tmp_path / "empty": "config.json",
        tmp_path / "two": "a.onnx, b.onnx",
        tmp_path / "hub": "--base",
        tmp_path / "noise": "model.onnx",
        tmp_path / "lost": "model.onnx.data",
        tmp_path / "named": "../other.onnx",
        tiny.onnx_model("llama") / "model.onnx": "folder",
        tiny.onnx_model("llama") / "tokenizer.json": "GGUF",
        adapter: "adapter",
    }.items():
        with pytest.raises(SafeGeneError) as caught:
            quick(adapter, base, tmp_path / "out")
        assert len(caught.value.problems) == 1, base
        assert words in str(caught.value), caught.value
    assert {p.name for p in tmp_path.iterdir()} == given


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"precision": "int3"}, "int4"),
        ({"precision": "int4", "block_size": 48}, "16, 32"),
        ({"block_size": 32}, "int4 or int8"),
        ({"precision": "int4", "accuracy_level": 9}, "1, 2, 3, 4"),
        ({"builder_options": ["fuse_qkv"]}, "KEY=VALUE"),
        ({"builder_options": ["adapter_path=x"]}, "adapter_path"),
        ({"builder_options": ["nonsense=1"]}, "--help"),
        *(
            ({"precision": "int4", "builder_options": [option]}, words)
            for option, words in (
                ("int4_block_size=16", "did you mean --block-size"),
                ("group_size=16", "did you mean --block-size"),
                ("symmetric=false", "did you mean is_symmetric"),
                ("symmetrik=false", "did you mean is_symmetric"),
                ("block_size=16", "use --block-size 16"),
                ("accuracy_level=1", "use --accuracy-level 1"),
            )
        ),
        *(
            ({"builder_options": [option]}, "another decoder, or none")
            for option in (
                "prune_lm_head=true",
                "num_hidden_layers=1",
                "filename=m.onnx",
                "config_only=true",
                "use_qdq=true",
                "kv_cache_quant_scheme=int8_per_tensor",
            )
        ),
    ],
)
def test_options_that_the_builder_would_misread_are_refused(
    options: dict[str, object], words: str, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        quick(adapter, tiny.hf_model("llama"), tmp_path / "out", **options)
    assert words in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_every_option_that_docs_and_tests_name_is_one_the_builder_knows() -> None:
    check_build_options(
        "int4", None, None,
        ["algo_config=k_quant", "is_symmetric=false", "fuse_qkv=false", "fuse_mlp_gate_up=true",
         "matmul_mixed_precision=last_matmul:int8", "nodes_to_exclude=a", "shared_embeddings=true"],
    )  # fmt: skip


def test_what_the_builder_refuses_is_its_last_word(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(BaseModelError) as caught:
        quick(
            adapter, tiny.hf_model("llama"), tmp_path / "out", precision="int4",
            builder_options=["algo_config=none"],
        )  # fmt: skip
    assert "got 'none'" in caught.value.problems[0].got.split(" | ")[-1]
    assert list(tmp_path.iterdir()) == []


def test_an_onnx_base_has_its_precision(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="has its precision"):
        quick(adapter, tiny.onnx_model("llama"), tmp_path / "out", precision="fp16")


def test_the_command_says_it_once_and_leaves_nothing(adapter: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    onnx_base = tiny.onnx_model("llama")
    for arguments, words in (
        (["--base", onnx_base, "--as", "sidecar"], "merged or branch or adapter"),
        (["--base", onnx_base, "--type", "q4_k_m"], "--precision"),
        (["--base", onnx_base, "--imatrix", "x"], "--imatrix"),
        (["--base", onnx_base, "--as", "branch", "--type", "keep"], "leave --type out"),
        (["--base", onnx_base, "--as", "adapter", "--promote"], "leave --promote out"),
        (["--base", tiny.hf_model("llama"), "--as", "branch", "--gain", "0.9", "1.1"], "--gain"),
        (["--base", onnx_base, "--asd", "merged"], "--asd"),
        (["--base", tiny.smollm2_gguf()], "float GGUF"),
        (["--base", tmp_path / "nowhere"], "nothing there"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "safegene_converter", "convert", adapter, "--to", "onnx",
             "-o", out, *map(str, arguments)],
            env=python_environment(), capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert "Traceback" not in done.stderr
        assert not list(tmp_path.iterdir())
