"""llama.cpp's converter and quantiser as child processes."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny

from safegene_converter.bases.hf_to_gguf import convert_hf, find_llama_cpp
from safegene_converter.encoding import ggml_quantizer
from safegene_converter.gguf import presets
from safegene_runtime.child import run_child
from safegene_runtime.errors import (
    BaseModelError,
    EngineError,
    PostconditionError,
    UnsupportedError,
)
from safegene_runtime.formats import ggml
from safegene_runtime.formats.gguf.model import open_model
from safegene_runtime.formats.gguf.tensors import read_tensor_bytes
from safegene_runtime.formats.gguf.types import GGMLType


def _imatrix(path: Path, model: Path) -> Path:
    """An imatrix for every linear of a model, as llama-imatrix writes it."""
    writer = gguf.GGUFWriter(path, "")
    writer.add_string("general.type", "imatrix")
    writer.add_array("imatrix.datasets", ["random"])
    writer.add_uint32("imatrix.chunk_count", 2)
    writer.add_uint32("imatrix.chunk_size", 512)
    random = np.random.default_rng(0)
    for name, info in open_model(model).tensors.items():
        if name.startswith("blk.") and len(info.shape) == 2:
            sums = random.uniform(1, 100, (1, info.shape[1])).astype(np.float32)
            writer.add_tensor(f"{name}.in_sum2", sums)
            writer.add_tensor(f"{name}.counts", np.array([[50.0]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_tokenizer_survives_the_way_through_a_folder() -> None:
    """GGUF -> Hugging Face -> GGUF: the fixture's tokenizer is SmolLM2's, to the last merge."""
    before = open_model(tiny.smollm2_gguf()).metadata
    after = open_model(tiny.whole_gguf_model("llama")).metadata
    keys = [key for key in before if key.startswith("tokenizer.")]
    differing = [key for key in keys if key not in after or before[key].value != after[key].value]
    # written only where a tokenizer_config.json has it, and ignored for byte-level tokenizers
    assert set(differing) <= {"tokenizer.ggml.add_space_prefix"}
    assert len(keys) > 8


def test_converting_tells_how_the_file_grows_and_repeats_its_bytes(tmp_path: Path) -> None:
    seen: list[int] = []
    out = tmp_path / "model.gguf"
    convert_hf(tiny.whole_hf_model("llama"), out, progress=seen.append)
    assert sum(seen) == out.stat().st_size
    assert out.read_bytes() == tiny.whole_gguf_model("llama").read_bytes()


def test_a_folder_that_cannot_be_converted_says_why(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny.whole_hf_model("llama"), tmp_path / "model"))
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(BaseModelError, match="exit code 1"):
        convert_hf(folder, tmp_path / "out.gguf")


def test_only_types_of_the_converter_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(BaseModelError, match="outtype"):
        convert_hf(tiny.hf_model("llama"), tmp_path / "out.gguf", "q4_k")


def test_a_missing_llama_cpp_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = find_llama_cpp()
    with pytest.raises(BaseModelError, match="pip download"):
        find_llama_cpp(tmp_path)
    monkeypatch.setenv("SAFEGENE_LLAMA_CPP", str(tmp_path))
    with pytest.raises(BaseModelError, match="--llama-cpp"):
        find_llama_cpp()
    assert find_llama_cpp(real) == real
    monkeypatch.delenv("SAFEGENE_LLAMA_CPP")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "llama.cpp").symlink_to(real)
    monkeypatch.chdir(tmp_path)
    assert find_llama_cpp() == real


def test_a_killed_child_is_an_error_and_not_our_death() -> None:
    code = "import os, sys; print('last words', file=sys.stderr, flush=True); os.abort()"
    with pytest.raises(EngineError, match=r"signal 6 \(SIGABRT\) \| last words"):
        run_child([sys.executable, "-c", code], what="child", error=EngineError)


def test_a_child_that_cannot_start_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="to start"):
        run_child([tmp_path / "missing"], what="child", error=EngineError)


def test_presets_are_llama_cpps() -> None:
    """Numbers and main types against gguf-py's enum, names as llama-quantize spells them."""
    assert len({preset.ftype for preset in presets.PRESETS.values()}) == len(presets.PRESETS)
    for name, preset in presets.PRESETS.items():
        theirs = gguf.LlamaFileType(preset.ftype).name
        assert theirs.removeprefix("ALL_").removeprefix("MOSTLY_").lower() == name
        assert GGMLType[preset.type.name] is preset.type
    assert presets.preset("Q4_K") is presets.PRESETS["q4_k_m"]
    with pytest.raises(UnsupportedError, match="q4_k_m"):
        presets.preset("q4_k_xxl")


@pytest.mark.parametrize("name", ["q4_k_m", "iq4_xs", "q3_k_l"])
@pytest.mark.parametrize("hidden", [64, 256])
def test_a_preset_is_the_sum_of_its_tensors(tmp_path: Path, name: str, hidden: int) -> None:
    """What libllama writes is, tensor by tensor, what we encode with the types it chose."""
    source, out = tiny.gguf_model("llama", hidden), tmp_path / "out.gguf"
    seen: list[int] = []
    written = presets.quantize_gguf(source, out, name, progress=seen.append)
    assert sum(seen) == out.stat().st_size
    before, after = open_model(source), open_model(out)
    assert after.metadata["general.file_type"].value == presets.preset(name).ftype
    block_types = {written[tensor].name for tensor in written if tensor.startswith("blk.")}
    assert any(type.endswith(("_K", "_XS")) for type in block_types) == (hidden == 256)
    for tensor, info in before.tensors.items():
        if tensor == "token_embd.weight":
            continue  # large, and nothing of ours
        rows = ggml.dequantize(read_tensor_bytes(info), info.type, info.shape)
        ours = ggml_quantizer.quantize(rows.reshape(-1, rows.shape[-1]), written[tensor])
        assert ours.tobytes() == read_tensor_bytes(after.tensors[tensor]), tensor


def test_single_tensors_can_be_promoted(tmp_path: Path) -> None:
    source, out = tiny.gguf_model("llama"), tmp_path / "out.gguf"
    overrides = {
        "blk.0.attn_q.weight": GGMLType.F16,
        "blk.1.ffn_up.weight": GGMLType.Q8_0,
        "blk.1.ffn_down.weight": GGMLType.F32,
    }
    plain = presets.quantize_gguf(source, tmp_path / "plain.gguf", "q4_0")
    written = presets.quantize_gguf(source, out, "q4_0", overrides=overrides)
    assert {name for name in plain if plain[name] is not written[name]} == set(overrides)
    assert {name: written[name] for name in overrides} == overrides


def test_overrides_that_are_not_honoured_are_found_out(tmp_path: Path) -> None:
    source = tiny.gguf_model("llama")
    with pytest.raises(PostconditionError, match="attn_q"):
        presets.quantize_gguf(
            source, tmp_path / "a.gguf", "q4_0", overrides={"blk.0.attn_q.weight": GGMLType.Q6_K}
        )
    with pytest.raises(PostconditionError, match="no tensor"):
        presets.quantize_gguf(
            source, tmp_path / "b.gguf", "q4_0", overrides={"blk.9.attn_q.weight": GGMLType.Q8_0}
        )
    with pytest.raises(UnsupportedError, match="overrides"):
        presets.quantize_gguf(
            source, tmp_path / "c.gguf", "f16", overrides={"blk.0.attn_q.weight": GGMLType.F32}
        )


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_float_presets_change_the_float_type(tmp_path: Path, name: str) -> None:
    source, out = tiny.gguf_model("qwen3"), tmp_path / "out.gguf"
    written = presets.quantize_gguf(source, out, name)
    assert written["blk.0.attn_q.weight"].name == name.upper()


def test_a_preset_that_needs_an_imatrix_takes_it_or_says_so(tmp_path: Path) -> None:
    source, out = tiny.gguf_model("llama", 256), tmp_path / "out.gguf"
    with pytest.raises(EngineError, match="importance matrix"):
        presets.quantize_gguf(source, out, "iq2_xxs")
    imatrix = _imatrix(tmp_path / "imatrix.gguf", source)
    written = presets.quantize_gguf(source, out, "iq2_xxs", imatrix)
    assert written["blk.0.ffn_gate.weight"] is GGMLType.IQ2_XXS


def test_an_imatrix_is_used_as_libllama_uses_it(tmp_path: Path) -> None:
    from safegene_converter.encoding.imatrix import read_imatrix

    source, out = tiny.gguf_model("llama", 256), tmp_path / "out.gguf"
    imatrix = _imatrix(tmp_path / "imatrix.gguf", source)
    written = presets.quantize_gguf(source, out, "q4_k_s", imatrix)
    weights = read_imatrix(imatrix)
    name = "blk.1.ffn_down.weight"
    info = open_model(source).tensors[name]
    rows = ggml.dequantize(read_tensor_bytes(info), info.type, info.shape)
    theirs = read_tensor_bytes(open_model(out).tensors[name])
    assert ggml_quantizer.quantize(rows, written[name], weights[name]).tobytes() == theirs
    assert ggml_quantizer.quantize(rows, written[name]).tobytes() != theirs


def test_a_quantised_source_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="float base"):
        presets.quantize_gguf(tiny.smollm2_gguf(), tmp_path / "out.gguf", "q4_k_m")
    assert not list(tmp_path.iterdir())
