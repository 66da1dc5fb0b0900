"""What lies in an adapter folder is read once, or the folder that would do is named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from safegene_converter.inputs.adapter import Adapter, read_adapter
from safegene_converter.inputs.adapter_files import (
    CONFIG_NAME,
    INDEX_NAME,
    WEIGHTS_NAME,
    read_adapter_files,
    would_do,
)
from safegene_converter.inputs.base import open_base
from safegene_runtime.errors import AdapterError, FormatError, SafeGeneError
from safegene_runtime.formats.files import sha256_file

Q0, Q1 = (f"base_model.model.model.layers.{n}.self_attn.q_proj" for n in (0, 1))


def plain(path: Path) -> Path:
    """A plain LoRA on two layers."""
    random = np.random.default_rng(0)
    path.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (path / CONFIG_NAME).write_text(json.dumps(config))
    tensors = {}
    for name in (Q0, Q1):
        tensors[f"{name}.lora_A.weight"] = random.standard_normal((2, 8), np.float32)
        tensors[f"{name}.lora_B.weight"] = random.standard_normal((6, 2), np.float32)
    save_file(tensors, path / WEIGHTS_NAME)
    return path


def shard(path: Path) -> Path:
    """Splits the weights of an adapter into two files, A and B of a module apart."""
    tensors = load_file(path / WEIGHTS_NAME)
    (path / WEIGHTS_NAME).unlink()
    of = {name: f"adapter_model-0000{n}-of-00002.safetensors" for name, n in zip(
        sorted(tensors), (i % 2 + 1 for i in range(len(tensors))), strict=True)}  # fmt: skip
    for file in set(of.values()):
        save_file({name: tensors[name] for name in of if of[name] == file}, path / file)
    (path / INDEX_NAME).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": of}))
    return path


def assert_same(found: Adapter, expected: Adapter) -> None:
    assert [m.name for m in found.modules] == [m.name for m in expected.modules] != []
    for one, other in zip(found.modules, expected.modules, strict=True):
        assert one.scaling == other.scaling
        assert np.array_equal(one.a, other.a)
        assert np.array_equal(one.b, other.b)


def test_shards_are_read_as_the_one_file_they_were_split_from(tmp_path: Path) -> None:
    whole = read_adapter(plain(tmp_path / "whole"))
    path = shard(plain(tmp_path / "shards"))
    found = read_adapter(path)
    assert_same(found, whole)
    assert not found.is_as_peft_reads
    read = {CONFIG_NAME, INDEX_NAME, *(file.name for file in path.glob("adapter_model-*"))}
    assert found.digests == {name: sha256_file(path / name) for name in read}


def edit_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = json.loads((path / INDEX_NAME).read_text())
        change(content["weight_map"])
        (path / INDEX_NAME).write_text(json.dumps(content))

    return edit


def written(data: str) -> Callable[[Path], None]:
    return lambda path: (path / INDEX_NAME).write_text(data) and None


FIRST = "adapter_model-00001-of-00002.safetensors"
A0 = f"{Q0}.lora_A.weight"
BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard is missing": (lambda path: (path / FIRST).unlink(), "No such file"),
    "a shard is cut": (lambda path: os.truncate(path / FIRST, 90), "header length"),
    "a shard is a pickle": (lambda path: (path / FIRST).write_bytes(b"\x80\x04\x95"), "size"),
    "a shard is a folder": (
        lambda path: ((path / FIRST).unlink(), (path / FIRST).mkdir()), "a folder"),
    "another file, too": (
        lambda path: save_file({"x": np.ones(1)}, path / WEIGHTS_NAME), "both"),
    "a tensor in no file": (
        edit_index(lambda of: of.update({f"{Q0}.x": FIRST})), "not in it"),
    "a tensor of no index": (edit_index(lambda of: of.pop(A0)), "elsewhere"),
    "a tensor in the wrong file": (
        edit_index(lambda of: of.update({A0: of[f"{Q0}.lora_B.weight"]})), "elsewhere"),
    "up and out": (edit_index(lambda of: of.update({A0: "../x.safetensors"})), "weight_map"),
    "an absolute path": (edit_index(lambda of: of.update({A0: "/x.safetensors"})), "weight_map"),
    "NUL": (edit_index(lambda of: of.update({A0: "x\0.safetensors"})), "weight_map"),
    "a number": (edit_index(lambda of: of.update({A0: 1})), "weight_map"),
    "a pickle by name": (edit_index(lambda of: of.update({A0: "x.bin"})), "weight_map"),
    "no tensors": (edit_index(dict.clear), "weight_map"),
    "no map": (written("{}"), "weight_map"),
    "a list": (written("[]"), "weight_map"),
    "a map of a list": (written('{"weight_map": []}'), "weight_map"),
    "a tensor twice": (written('{"weight_map": {"a": "b", "a": "c"}}'), "each key once"),
    "no JSON": (written("{"), "JSON"),
    "no index": (lambda path: (path / INDEX_NAME).unlink(), "restore the index"),
    "a gene": (lambda path: (path / "safegene.json").write_text("{}"), "one file"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_shards_that_are_not_those_of_the_index_are_one_typed_error(
    case: str, tmp_path: Path
) -> None:
    path = shard(plain(tmp_path / "adapter"))
    change, words = BROKEN[case]
    change(path)
    with pytest.raises((AdapterError, FormatError)) as caught:
        read_adapter(path)
    assert words in str(caught.value)


PLACES: dict[str, tuple[list[str], str, str]] = {
    "the adapter's sub-folder": (["named"], "", "named"),
    "a sub-folder two below": (["a/named"], "", "a/named"),
    "the last checkpoint": (
        ["checkpoint-100", "checkpoint-2000", "checkpoint-900"], "", "checkpoint-2000"),
    "an adapter beside checkpoints": (["checkpoint-100", "final"], "", "final"),
    "a folder inside": (["."], "global_step10", "."),
    "a file inside": (["."], WEIGHTS_NAME, "."),
}  # fmt: skip


@pytest.mark.parametrize("case", PLACES)
def test_the_folder_that_would_do_is_named(case: str, tmp_path: Path) -> None:
    adapters, passed, expected = PLACES[case]
    root = tmp_path / "root"
    for name in adapters:
        plain(root / name)
    (root / "global_step10").mkdir(parents=True, exist_ok=True)
    wrong = root / passed
    with pytest.raises(AdapterError) as caught:
        read_adapter(wrong)
    named = (root / expected).resolve()
    assert len(caught.value.problems) == 1
    fix = caught.value.problems[0].fix
    assert f": {named}" in fix
    assert (f"one of {len(adapters) - 1} others" in fix) == (len(adapters) > 1)
    read_adapter(named)


def test_nothing_is_named_where_nothing_would_do(tmp_path: Path) -> None:
    (tmp_path / "x" / "y").mkdir(parents=True)
    for path in (tmp_path, tmp_path / "x", tmp_path / "nothing"):
        assert would_do(path) is None
        with pytest.raises(AdapterError, match="that PEFT saved"):
            read_adapter(path)


def test_links_of_the_hubs_cache_are_followed(tmp_path: Path) -> None:
    whole = plain(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (tmp_path / "snapshot" / name).symlink_to(whole / name)
    assert_same(read_adapter(tmp_path / "snapshot"), read_adapter(whole))


@pytest.mark.parametrize("sharded", [False, True])
def test_no_more_memory_is_asked_for_than_the_files_have(sharded: bool, tmp_path: Path) -> None:
    """In an address space 64 MiB larger than what the imports take."""
    path = plain(tmp_path / "adapter")
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from safegene_converter.inputs.adapter_files import read_adapter_files\n"
        "pages = int(open('/proc/self/statm').read().split()[0])\n"
        "limit = pages * resource.getpagesize() + (64 << 20)\n"
        "resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "print(len(read_adapter_files(Path(sys.argv[1])).weights.tensors))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(shard(path) if sharded else path)],
        capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr


@pytest.mark.parametrize("how", ["shards", "compiled", "text part", "null", "dead"])
def test_what_convert_reads_in_another_shape_record_reads(how: str, tmp_path: Path) -> None:
    """PEFT holds the same factors and scaling, whatever shape the folder has."""
    from safegene_converter.recording.recorder import load_with_adapter, read_factors

    base = open_base(tiny.hf_model("llama"))
    path = tiny.peft_adapter(
        "llama", tmp_path / "adapter", scale=0.1, rank_pattern={"q_proj": 3},
        alpha_pattern={"layers.1.mlp.up_proj": 5} if how != "null" else {}, use_rslora=True,
    )  # fmt: skip
    before = read_factors(load_with_adapter(read_adapter(path), base)[0])
    config = json.loads((path / CONFIG_NAME).read_text())
    if how == "shards":
        shard(path)
    elif how in ("compiled", "text part"):
        infix = "_orig_mod.model." if how == "compiled" else "model.language_model."
        prefix = "base_model.model."
        save_file(
            {key.replace(f"{prefix}model.", f"{prefix}{infix}"): value
             for key, value in load_file(path / WEIGHTS_NAME).items()},
            path / WEIGHTS_NAME,
        )  # fmt: skip
    elif how == "null":
        config["alpha_pattern"] = None
    else:
        config.update(enable_lora=None, merge_weights=False, fan_in_fan_out=None)
    (path / CONFIG_NAME).write_text(json.dumps(config))
    adapter = read_adapter(path)
    assert adapter.is_as_peft_reads == (how == "dead")
    after = read_factors(load_with_adapter(adapter, base)[0])
    assert len(after) == len(before) > 0
    for one, other in zip(after, before, strict=True):
        for name, value in vars(one).items():
            assert np.array_equal(value, vars(other)[name]), name


def test_every_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = shard(plain(tmp_path / "adapter")), list[str]()
    real = os.open

    def counted(name: Any, *rest: Any, **named: Any) -> int:
        opened.append(Path(name).name)
        return real(name, *rest, **named)

    monkeypatch.setattr(os, "open", counted)
    read_adapter_files(path)
    assert sorted(opened) == sorted(os.listdir(path))


def test_a_pickle_stays_refused_beside_a_configuration(tmp_path: Path) -> None:
    path = plain(tmp_path / "adapter")
    (path / WEIGHTS_NAME).rename(path / "adapter_model.bin")
    with pytest.raises(SafeGeneError, match="never opened"):
        read_adapter(path)
