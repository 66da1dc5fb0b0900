"""Laws of a conversion: what is touched, what is not, what is refused, what survives."""

from __future__ import annotations

import filecmp
import functools
import hashlib
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from safegene import convert
from safegene_converter.fold.survival import Bounds
from safegene_converter.gguf.presets import quantize_gguf
from safegene_converter.gguf.writer import OutTensor, write_gguf
from safegene_runtime.artifact.manifest import Manifest, check_files, read_manifest
from safegene_runtime.errors import (
    SurvivalError,
)
from safegene_runtime.formats.gguf.header import read_gguf
from safegene_runtime.formats.gguf.model import open_model
from safegene_runtime.formats.gguf.tensors import read_tensor_bytes
from safegene_runtime.formats.gguf.types import GGMLType, Value, ValueType

quick = functools.partial(convert, check=False)
"""Without the self-check, which costs seconds, where a test is about something else."""

TARGETS = {one: 3 * tiny.n_layers(one) for one in tiny.ARCHITECTURES}
"""Modules of the tiny adapters: q, k and up in each layer."""


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.peft_adapter("llama", tmp_path_factory.mktemp("plain") / "adapter", scale=0.05)


@pytest.fixture(scope="module")
def wide_adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the model whose rows every type can encode."""
    return tiny.peft_adapter(
        "llama", tmp_path_factory.mktemp("wide") / "adapter", hidden=256, scale=0.03
    )


@pytest.fixture(scope="module")
def q4_1_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("q4_1") / "base.gguf"
    quantize_gguf(tiny.gguf_model("llama", 256), out, "q4_1")
    return out


def decoded(path: Path) -> dict[str, np.ndarray]:
    """Every tensor as gguf-py decodes it, (out, in) float32.

    Headers through our reader, which `test_gguf` compares with gguf-py's: that one takes seconds for
    a real vocabulary.
    """
    found = {}
    for name, info in open_model(path).tensors.items():
        raw = np.frombuffer(bytes(read_tensor_bytes(info)), np.uint8)
        rows = raw.reshape(info.shape[0], -1) if len(info.shape) > 1 else raw
        kind = gguf.GGMLQuantizationType(int(info.type))
        found[name] = gguf.quants.dequantize(rows.view(np.float32) if kind == 0 else rows, kind)
    return found


def peft_delta(adapter: Path, architecture: str, hidden: int = 64) -> dict[str, np.ndarray]:
    """Merged minus base weights of every module PEFT changes, by PEFT's own merge."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.hf_model(architecture, hidden))
    before = {name: value.detach().clone() for name, value in model.state_dict().items()}
    merged = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    return {
        name.removesuffix(".weight"): (merged[name] - before[name]).numpy()
        for name in before
        if not bool((merged[name] == before[name]).all())
    }


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_merged_weights_are_pefts_merged_weights(architecture: str, tmp_path: Path) -> None:
    source = tiny.peft_adapter(architecture, tmp_path / "adapter", scale=0.05, use_rslora=True)
    base = tiny.gguf_model(architecture)
    manifest = convert(source, base, tmp_path / "out", form="merged")
    before, after = decoded(base), decoded(tmp_path / "out" / "model.gguf")
    expected = peft_delta(source, architecture)
    weights = load_file(tiny.hf_model(architecture) / "model.safetensors")
    assert {entry.module for entry in manifest.modules} == expected.keys()
    for entry in manifest.modules:
        got = after[entry.tensor] - before[entry.tensor]
        wanted = expected[entry.module]
        # upstream's own order, from the converter that made the base
        place = {row.tobytes(): at for at, row in enumerate(weights[f"{entry.module}.weight"])}
        order = [place[row.tobytes()] for row in before[entry.tensor]]
        assert np.abs(got - wanted[order]).max() <= 1e-6
    assert len(manifest.modules) == TARGETS[architecture]


def test_untouched_tensors_keep_every_byte(
    wide_adapter: Path, q4_1_base: Path, tmp_path: Path
) -> None:
    manifest = quick(wide_adapter, q4_1_base, tmp_path / "out", form="merged")
    before, after = open_model(q4_1_base), open_model(tmp_path / "out" / "model.gguf")
    touched = {entry.tensor for entry in manifest.modules}
    assert list(before.tensors) == list(after.tensors)
    for name in before.tensors:
        same = bytes(read_tensor_bytes(before.tensors[name])) == bytes(
            read_tensor_bytes(after.tensors[name])
        )
        assert same == (name not in touched), name


def test_metadata_is_the_bases_but_for_what_changed(
    wide_adapter: Path, q4_1_base: Path, tmp_path: Path
) -> None:
    quick(wide_adapter, q4_1_base, tmp_path / "out", form="merged")
    before = read_gguf(q4_1_base).metadata
    after = read_gguf(tmp_path / "out" / "model.gguf").metadata
    changed = {key for key in after.keys() | before.keys() if before.get(key) != after.get(key)}
    allowed = {"general.name", "general.file_type"}
    assert {key for key in changed if not key.startswith("safegene.")} <= allowed
    assert "safegene.version" in changed


def test_equal_inputs_give_equal_bytes(wide_adapter: Path, q4_1_base: Path, tmp_path: Path) -> None:
    for form in ("merged", "sidecar"):
        for name in ("one", "two"):
            quick(wide_adapter, q4_1_base, tmp_path / form / name, form=form)  # type: ignore[arg-type]
        compared = filecmp.dircmp(tmp_path / form / "one", tmp_path / form / "two")
        assert compared.left_list == compared.right_list
        _, mismatch, errors = filecmp.cmpfiles(
            compared.left, compared.right, compared.common, shallow=False
        )
        assert not mismatch
        assert not errors


def test_keep_refuses_what_rounding_would_erase(
    wide_adapter: Path, q4_1_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(SurvivalError) as caught:
        quick(wide_adapter, q4_1_base, tmp_path / "out", form="merged", type="keep")
    assert "Q4_1: gain" in str(caught.value)
    assert len(caught.value.problems) > 1, "all tensors that fail, not the first"
    assert list(tmp_path.iterdir()) == []


def test_keep_accepts_it_when_the_bounds_say_so(
    wide_adapter: Path, q4_1_base: Path, tmp_path: Path
) -> None:
    bounds = Bounds(0.0, 10.0, 100.0, 100.0)
    manifest = quick(
        wide_adapter, q4_1_base, tmp_path / "out", form="merged", type="keep", bounds=bounds
    )
    assert {entry.type_after for entry in manifest.modules} == {"Q4_1"}


def test_auto_promotes_only_what_needs_it_and_stays_in_bounds(
    wide_adapter: Path, q4_1_base: Path, tmp_path: Path
) -> None:
    manifest = quick(wide_adapter, q4_1_base, tmp_path / "out", form="merged")
    bounds = Bounds()
    for entry in manifest.modules:
        assert entry.survival is not None
        assert bounds.gain_min <= entry.survival["gain"] <= bounds.gain_max
        assert entry.survival["relative_error"] <= bounds.error_max
    grown = sum(entry.bytes_after - entry.bytes_before for entry in manifest.modules)
    sizes = [path.stat().st_size for path in (q4_1_base, tmp_path / "out" / "model.gguf")]
    assert grown > 0
    assert abs(sizes[1] - sizes[0] - grown) < 4096, "only headers besides"


def test_recorded_survival_is_that_of_the_written_file(
    wide_adapter: Path, q4_1_base: Path, tmp_path: Path
) -> None:
    manifest = quick(wide_adapter, q4_1_base, tmp_path / "out", form="merged", type="q5_0",
                       bounds=Bounds(0.0, 2.0, 10.0, 10.0), promote=False)  # fmt: skip
    before, after = decoded(q4_1_base), decoded(tmp_path / "out" / "model.gguf")
    deltas = peft_delta(wide_adapter, "llama", 256)
    for entry in manifest.modules:
        if not entry.module.endswith("up_proj"):
            continue  # rows of q and k are in another order
        delta = deltas[entry.module].astype(np.float64)
        change = after[entry.tensor].astype(np.float64) - before[entry.tensor]
        gain = (change * delta).sum() / (delta * delta).sum()
        error = np.linalg.norm(change - delta) / np.linalg.norm(delta)
        assert entry.survival is not None
        assert entry.survival["gain"] == pytest.approx(gain, abs=1e-3)
        assert entry.survival["relative_error"] == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("type_name", ["q4_k_m", "q5_k_m", "q6_k", "q8_0"])
def test_from_float_the_mix_of_types_is_upstreams(
    type_name: str, wide_adapter: Path, tmp_path: Path
) -> None:
    base = tiny.gguf_model("llama", 256)
    manifest = quick(
        wide_adapter, base, tmp_path / "out", form="merged", type=type_name, promote=False,
        bounds=Bounds(0.0, 2.0, 100.0, 100.0),
    )  # fmt: skip
    quantize_gguf(base, tmp_path / "upstream.gguf", type_name)
    ours = read_gguf(tmp_path / "out" / "model.gguf")
    theirs = read_gguf(tmp_path / "upstream.gguf")
    touched = {entry.tensor for entry in manifest.modules}
    for name, info in theirs.tensors.items():
        assert ours.tensors[name].type is info.type
        if name not in touched:
            assert bytes(read_tensor_bytes(ours.tensors[name])) == bytes(read_tensor_bytes(info))
    assert ours.get("general.file_type") == theirs.get("general.file_type")


def test_a_hugging_face_folder_is_converted_by_upstream_and_proved(
    adapter: Path, tmp_path: Path
) -> None:
    from_folder = quick(
        adapter, tiny.whole_hf_model("llama"), tmp_path / "a", form="merged", type="f32"
    )
    quick(adapter, tiny.whole_gguf_model("llama"), tmp_path / "b", form="merged", type="f32")
    one, two = decoded(tmp_path / "a" / "model.gguf"), decoded(tmp_path / "b" / "model.gguf")
    assert one.keys() == two.keys()
    assert all(np.array_equal(one[name], two[name]) for name in one)
    assert from_folder.settings["transform_error"] == 0.0


def test_a_sharded_base_gives_the_same_weights(adapter: Path, tmp_path: Path) -> None:
    whole = tiny.gguf_model("llama")
    model = open_model(whole)
    names = list(model.tensors)
    parts = (names[: len(names) // 2], names[len(names) // 2 :])
    for number, part in enumerate(parts):
        metadata = dict(model.metadata) if number == 0 else {}
        metadata["split.no"] = Value(ValueType.UINT16, number, None)
        metadata["split.count"] = Value(ValueType.UINT16, len(parts), None)
        metadata["split.tensors.count"] = Value(ValueType.INT32, len(names), None)
        path = tmp_path / f"base-{number + 1:05d}-of-{len(parts):05d}.gguf"
        write_gguf(
            path,
            metadata,
            [
                OutTensor(n, model.tensors[n].shape, model.tensors[n].type, model.tensors[n])
                for n in part
            ],
        )
    manifest = quick(adapter, tmp_path / "base-00001-of-00002.gguf", tmp_path / "a", form="merged")
    quick(adapter, whole, tmp_path / "b", form="merged")
    one, two = decoded(tmp_path / "a" / "model.gguf"), decoded(tmp_path / "b" / "model.gguf")
    assert len(manifest.base["files"]) == 2
    assert all(np.array_equal(one[name], two[name]) for name in two)


def test_a_sidecar_leaves_nothing_to_misread(adapter: Path, tmp_path: Path) -> None:
    quick(adapter, tiny.gguf_model("llama"), tmp_path / "out", form="sidecar")
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    assert "adapter.lora.alpha" not in reader.fields
    names = {tensor.name for tensor in reader.tensors}
    assert len(names) == 2 * TARGETS["llama"]
    assert not [name for name in names if "norm" in name]


@pytest.mark.parametrize("form", ["merged", "sidecar"])
def test_stock_llama_cpp_python_loads_it(form: str, adapter: Path, tmp_path: Path) -> None:
    base = tiny.gguf_model("llama")
    convert(adapter, base, tmp_path / "out", form=form)  # type: ignore[arg-type]
    if form == "merged":
        model = llama_cpp.Llama(str(tmp_path / "out" / "model.gguf"), n_ctx=64, verbose=False)
    else:
        sidecar = str(tmp_path / "out" / "adapter.gguf")
        model = llama_cpp.Llama(str(base), lora_path=sidecar, n_ctx=64, verbose=False)
    try:
        assert model.create_completion("Hello", max_tokens=4, temperature=0)["choices"]
    finally:
        model.close()


@pytest.mark.parametrize("type_name", ["f16", "bf16", "q8_0"])
def test_a_smaller_sidecar_says_what_it_lost(type_name: str, adapter: Path, tmp_path: Path) -> None:
    manifest = quick(
        adapter, tiny.gguf_model("llama"), tmp_path / "out", form="sidecar", type=type_name
    )
    assert all(entry.survival is not None for entry in manifest.modules)
    assert all(0 < entry.survival["relative_error"] < 0.05 for entry in manifest.modules)  # type: ignore[index]


def test_the_manifest_is_true(wide_adapter: Path, q4_1_base: Path, tmp_path: Path) -> None:
    made = quick(wide_adapter, q4_1_base, tmp_path / "out", form="merged")
    read = read_manifest(tmp_path / "out")
    assert read == made == Manifest.from_json(made.to_json(), "again")
    check_files(read, tmp_path / "out")
    header = read_gguf(tmp_path / "out" / "model.gguf")
    for entry in read.modules:
        info = header.tensors[entry.tensor]
        assert info.type is GGMLType[entry.type_after]
        assert hashlib.sha256(read_tensor_bytes(info)).hexdigest() == entry.sha256
