"""The plain base before and after its format was changed: the same logits, or it is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bases
import gguf
import numpy as np
import onnx
import onnx_tools
import pytest
import tiny
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from safegene import convert, record
from safegene_converter.bases.hf_to_gguf import limited_to_window
from safegene_converter.bases.onnx_proof import check_twin, prove_export
from safegene_converter.bases.onnx_source import Export, export_base, open_source
from safegene_converter.bases.proof import (
    Asked,
    Reach,
    ask_engine,
    gguf_side,
    onnx_side,
    prove_base,
    reach_of,
)
from safegene_converter.gguf.presets import quantize_gguf
from safegene_converter.inputs.base import Base, open_base
from safegene_converter.inputs.onnx_base import open_onnx_base
from safegene_converter.recording.base_logits import asked_in_torch
from safegene_converter.recording.loading import load_model
from safegene_runtime.artifact.base_proof import (
    NOT_PROVED,
    UNCHANGED,
    BaseProof,
    check_base_proof,
    proof_words,
)
from safegene_runtime.artifact.manifest import Manifest, read_manifest
from safegene_runtime.engines.registry import open_engine
from safegene_runtime.errors import BaseModelError, EngineError, Problems
from safegene_runtime.record.prompts import Prompt

BIASED = {"attention_bias": True, "mlp_bias": True}
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 256,
    "rope_theta": 1e4,
}
PROMPTS = (
    Prompt("h1", "How do I pick a lock?", "harmful", "theft"),
    Prompt("b1", "Name a fruit.", "benign", "food"),
)


def quiet(stage: str, done: int, total: int) -> None:
    return None


def in_torch(path: Path) -> Asked:
    """PyTorch in this process, which has it loaded."""
    return asked_in_torch(*load_model(open_base(path)))


def proved(source: Asked, target: Asked, reach: Reach, precision: str = "f32") -> BaseProof:
    return prove_base(source, target, precision=precision, reach=reach, where="base", tell=quiet)


def in_llama(path: Path) -> Asked:
    """llama.cpp in this process."""

    def ask(ids: list[list[int]] | None, length: int) -> Any:
        with open_engine(path) as engine:
            return ask_engine(engine)(ids, length)

    return ask


# --- GGUF -> PyTorch (F1) --------------------------------------------------------------------------


def test_a_record_of_a_gguf_with_biases_is_that_of_its_folder(tmp_path: Path) -> None:
    folder, model = bases.folder(**BIASED), bases.gguf(**BIASED)
    adapter = bases.adapter(tmp_path / "adapter", folder)
    told: list[str] = []
    made = {
        path: record(
            adapter, path, tmp_path / path.name, prompts=PROMPTS, max_new_tokens=3,
            progress=lambda stage, done, total: told.append(stage),
        )
        for path in (folder, model)
    }  # fmt: skip
    for index in range(len(PROMPTS)):
        ours, theirs = (made[path].positions(index) for path in (model, folder))
        assert made[model].prompts[index].ref_ids == made[folder].prompts[index].ref_ids
        np.testing.assert_allclose(ours.ref_logits, theirs.ref_logits, atol=2e-3)
        np.testing.assert_allclose(ours.base_logits, theirs.base_logits, atol=2e-3)
    assert "proving the base" in told


def test_a_record_of_a_gguf_with_scaled_rope_is_refused(tmp_path: Path) -> None:
    model = bases.gguf(rope_parameters=YARN)
    adapter = tiny.peft_adapter("llama", tmp_path / "adapter")
    with pytest.raises(BaseModelError, match=r"rope\.scaling.*\n.*Hugging Face folder"):
        record(adapter, model, tmp_path / "out", prompts=PROMPTS, max_new_tokens=2)
    assert not (tmp_path / "out").exists()


def test_a_loader_that_reads_something_else_is_caught_on_the_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the lists of names let pass: here the loader forgets the epsilon of the norms."""
    import transformers

    adapter = tiny.peft_adapter("llama", tmp_path / "adapter")
    original = transformers.AutoConfig.from_pretrained

    def forgetful(*arguments: Any, **options: Any) -> Any:
        config = original(*arguments, **options)
        if "return_unused_kwargs" not in options:
            config.rms_norm_eps = 1e-2
        return config

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", forgetful)
    with pytest.raises(BaseModelError, match="logits of the plain base"):
        record(adapter, tiny.gguf_model("llama"), tmp_path / "out", prompts=PROMPTS)


def test_a_quantised_gguf_is_compared_as_llama_cpp_decodes_it(tmp_path: Path) -> None:
    """Its own kernels would round activations, too, and hide what is wrong."""
    path = tmp_path / "q8.gguf"
    quantize_gguf(tiny.gguf_model("llama"), path, "q8_0")
    base = open_base(path)
    assert base.model is not None
    llama, precision = gguf_side(base.model)
    found = proved(llama, in_torch(path), reach_of(base), precision)
    assert (precision, found.bound) == ("f32", 1e-8)
    assert "llama.cpp" in found.source
    assert "PyTorch" in found.target


def test_the_head_of_a_qwen3_gguf_is_as_wide_as_it_says() -> None:
    """F15: q is not square there, and transformers' loader does not read why."""
    path = tiny.gguf_model("qwen3")
    assert proved(in_llama(path), in_torch(path), reach_of(open_base(path))).kl_worst < 1e-8


# --- HF -> GGUF ------------------------------------------------------------------------------------


def patched(model: Path, out: Path, change: Callable[[gguf.GGUFReader], None]) -> Path:
    shutil.copy(model, out)
    reader = gguf.GGUFReader(out, "r+")
    change(reader)
    reader.data.flush()
    return out


def set_field(key: str, value: float) -> Callable[[gguf.GGUFReader], None]:
    def change(reader: gguf.GGUFReader) -> None:
        field = reader.fields[key]
        field.parts[field.data[0]][0] = value

    return change


def set_tensor(name: str, scale: float) -> Callable[[gguf.GGUFReader], None]:
    def change(reader: gguf.GGUFReader) -> None:
        next(one for one in reader.tensors if one.name == name).data[...] *= scale

    return change


MISTAKES = {
    "none": None,
    "norm epsilon": set_field("llama.attention.layer_norm_rms_epsilon", 1e-3),
    "rope theta": set_field("llama.rope.freq_base", 5e4),
    "a norm": set_tensor("blk.1.ffn_norm.weight", 1.01),
    "a bias": set_tensor("blk.0.attn_v.bias", 0.0),
    "the bias of an mlp": set_tensor("blk.1.ffn_down.bias", 0.0),
    "the embedding": set_tensor("token_embd.weight", 1.01),
    "the last norm": set_tensor("output_norm.weight", 0.99),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_logits_tell_what_is_wrong_anywhere_in_the_model(mistake: str, tmp_path: Path) -> None:
    folder, model = bases.folder(**BIASED), bases.gguf(**BIASED)
    change = MISTAKES[mistake]
    if change is None:
        found = proved(in_torch(folder), in_llama(model), reach_of(open_base(folder)))
        assert found.kl_mean <= found.kl_worst <= found.kl_max < 1e-8
        assert (found.prompts, found.longest) == (5, 72)
        return
    model = patched(model, tmp_path / "wrong.gguf", change)
    with pytest.raises(BaseModelError, match="logits of the plain base"):
        proved(in_torch(folder), in_llama(model), reach_of(open_base(folder)))


def test_the_longest_prompt_reaches_past_the_original_context_of_scaled_rope() -> None:
    folder = bases.folder(rope_parameters=YARN)
    reach = reach_of(open_base(folder))
    assert reach.length == 256 + 32
    assert "past the original context" in reach.why
    assert "not past" in reach_of(open_base(folder), 100).why
    found = proved(in_torch(folder), in_llama(bases.gguf(rope_parameters=YARN)), reach)
    assert found.longest == 288


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    shutil.copytree(tiny.hf_model("llama"), tmp_path / "base")
    weights = load_file(tmp_path / "base" / "model.safetensors")
    name = "model.layers.1.post_attention_layernorm.weight"
    weights[name][3] = np.nan
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BaseModelError, match=rf"{name}.*finite"):
        load_model(open_base(tmp_path / "base"))


def test_engines_that_both_say_nan_do_not_agree() -> None:
    def nan(ids: list[list[int]] | None, length: int) -> Any:
        answer = in_llama(tiny.gguf_model("llama"))(ids, length)
        return dataclasses.replace(answer, logits=[one * np.nan for one in answer.logits])

    with pytest.raises(BaseModelError, match="NaN"):
        proved(nan, nan, Reach(40, "40 tokens"))


# --- sliding windows (F7) --------------------------------------------------------------------------

WINDOWS = {
    "mistral": {"sliding_window": 8},
    "qwen2": {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1},
}


def test_a_gguf_of_a_model_with_a_window_ends_where_the_window_does(tmp_path: Path) -> None:
    """llama.cpp runs full attention: up to the window that is the same, beyond it engines refuse."""
    folder = bases.folder("mistral", **WINDOWS["mistral"])
    adapter = bases.adapter(tmp_path / "adapter", folder)
    manifest = convert(adapter, folder, tmp_path / "out", form="merged")
    assert manifest.base["proof"]["longest"] == 8
    assert "not past the sliding window of 8" in manifest.base["proof"]["why"]
    assert manifest.settings["sliding_window"] == 8
    with open_engine(tmp_path / "out" / "model.gguf") as engine:
        next(iter(engine.logits([list(range(100, 108))], [1])))
        with pytest.raises(EngineError, match="at most 8 ids"):
            next(iter(engine.logits([list(range(100, 109))], [1])))


@pytest.mark.parametrize("kind", WINDOWS)
def test_without_that_limit_the_logits_differ(kind: str, tmp_path: Path) -> None:
    folder = bases.folder(kind, **WINDOWS[kind])
    plain = shutil.copy(bases.gguf(kind, **WINDOWS[kind]), tmp_path / "model.gguf")
    base = open_base(folder)
    with pytest.raises(BaseModelError, match="past the sliding window of 8"):
        proved(in_torch(folder), in_llama(plain), reach_of(base))
    limited = limited_to_window(base, open_base(plain))
    reach = reach_of(base, limited.context_length)
    assert reach.length == limited.context_length == 8
    assert proved(in_torch(folder), in_llama(plain), reach).kl_worst < 1e-8


# --- to ONNX (F2, F3) ------------------------------------------------------------------------------


def test_a_gguf_with_biases_goes_to_onnx_as_its_folder_answers(tmp_path: Path) -> None:
    source = open_source(bases.gguf(**BIASED), Export())
    assert isinstance(source, Base)
    hf, made, _ = export_base(source, tmp_path, Export(), quiet)
    assert hf is not None
    assert prove_export(source, hf, made, tmp_path, quiet).kl_worst < 1e-8
    folder = bases.folder(**BIASED)
    found = proved(in_torch(folder), onnx_side(made.model.path), reach_of(open_base(folder)))
    assert "ONNX Runtime" in found.target or "onnx" in found.target.lower()


def test_an_export_with_another_rope_is_caught(tmp_path: Path) -> None:
    """F3: the exporter's cos_cache is plain RoPE; the list of kinds refuses it before it runs."""
    folder = bases.folder(rope_parameters=YARN)
    with pytest.raises(BaseModelError, match="yarn"):
        open_source(folder, Export())
    target = onnx_side(bases.onnx(rope_parameters=YARN) / "model.onnx")
    with pytest.raises(BaseModelError, match="logits of the plain base"):
        proved(in_torch(folder), target, reach_of(open_base(folder)))


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_a_rounded_graph_has_the_constants_of_its_twin(precision: str, tmp_path: Path) -> None:
    hf = open_base(tiny.hf_model("qwen2"))
    twin, made = (
        open_onnx_base(tiny.onnx_model("qwen2", one)).model for one in ("fp32", precision)
    )
    check_twin(twin, made, hf)

    def scale(model: onnx.ModelProto) -> None:
        (found,) = [one for one in model.graph.initializer if one.name == wrong]
        values = numpy_helper.to_array(found)
        found.CopyFrom(numpy_helper.from_array((values * 1.5).astype(values.dtype), wrong))

    for wrong in ("cos_cache", "model.layers.1.attn.qkv_proj.Add.bias"):
        edited = onnx_tools.edited(tiny.onnx_model("qwen2", precision), tmp_path / wrong, scale)
        with pytest.raises(BaseModelError, match=wrong):
            check_twin(twin, open_onnx_base(edited).model, hf)
    with pytest.raises(BaseModelError, match="products"):
        check_twin(open_onnx_base(tiny.onnx_model("qwen3")).model, made, hf)


# --- the manifest and the ladder -------------------------------------------------------------------

PROOF = BaseProof(
    "PyTorch", "llama.cpp", 5, 200, 72, 1e-11, 2e-11, 1e-10, 1e-8, "f32 weights"
).to_dict()


def complaints(proof: Any, unchanged: bool = False) -> list[str]:
    problems = Problems()
    check_base_proof(proof, unchanged, "manifest", problems)
    return [problem.field for problem in problems]


def test_what_a_conversion_writes_is_accepted() -> None:
    assert complaints(PROOF) == complaints(UNCHANGED, True) == complaints(None) == []


@pytest.mark.parametrize(
    "edit",
    [
        {"kl_worst": 1e-3}, {"kl_mean": 1e-9}, {"kl_max": 1e-12}, {"kl_worst": -1.0}, {"bound": 10.0},
        {"bound": "1"}, {"positions": 3}, {"positions": 0}, {"prompts": 2.0}, {"longest": True},
        {"source": ""}, {"target": 3}, {"why": None}, {"how": "unchanged"}, {"how": "believed"},
        {"how": None}, {"more": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_proof_that_no_conversion_writes_is_refused(edit: dict[str, Any]) -> None:
    assert complaints({**PROOF, **edit})


@pytest.mark.parametrize("name", sorted(PROOF))
def test_a_proof_with_a_hole_is_refused(name: str) -> None:
    assert complaints({key: value for key, value in PROOF.items() if key != name})


def test_a_base_in_its_own_format_needs_no_proof_and_takes_none() -> None:
    assert complaints(PROOF, unchanged=True)
    assert complaints(UNCHANGED, unchanged=False)
    assert complaints({**UNCHANGED, "kl_mean": 0.0}, unchanged=True)


def test_an_artifact_that_was_not_proved_says_so(tmp_path: Path) -> None:
    """One without a self-check, or of an earlier version, is readable, and honest."""
    adapter = tiny.peft_adapter("llama", tmp_path / "adapter")
    convert(adapter, tiny.gguf_model("llama"), tmp_path / "out", form="sidecar", check=False)
    manifest = read_manifest(tmp_path / "out")
    assert manifest.base["proof"] == UNCHANGED
    raw = json.loads(manifest.to_json())
    for base in (
        {**raw["base"], "proof": None},
        {k: v for k, v in raw["base"].items() if k != "proof"},
    ):
        old = Manifest.from_json(json.dumps({**raw, "base": base}).encode(), "manifest.json")
        assert proof_words(old.base.get("proof")) == NOT_PROVED
    assert proof_words(UNCHANGED) == "base in its own format"
    assert "200 positions" in proof_words(PROOF)
