"""beta_W from the bytes: 1 where the delta is, and the right other number for every mistake.

Dense numpy computations over what gguf-py and onnx read are the other side.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
from onnx import numpy_helper
from onnx_tools import convert_onnx
from safetensors import safe_open
from test_exactness import PROMPTS, with_coefficients

from safegene import convert, record
from safegene_converter.encoding import ggml_quantizer
from safegene_converter.fold.survival import Bounds
from safegene_converter.gguf.writer import OutTensor, write_gguf
from safegene_converter.inputs import onnx_base
from safegene_runtime.architecture.table import TABLE
from safegene_runtime.artifact.manifest import read_manifest
from safegene_runtime.formats.gguf.model import open_model
from safegene_runtime.formats.gguf.types import GGMLType
from safegene_runtime.record.reference import Reference
from safegene_runtime.verifying.static_proof import StaticProof, static_proof

LOOSE = Bounds(0, 99, 99, 99)
SLOW_TYPES = (
    "IQ1_M",
    "IQ1_S",
    "IQ2_S",
    "IQ2_XS",
)  # ggml computes tables for seconds before the first row
Edit = Callable[[str, np.ndarray, np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Made:
    """One adapter, and the reference of it."""

    architecture: str
    hidden: int
    adapter: Path
    record: Reference


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def once(function: Any) -> Any:
    """Made once, whether defaults are spelled out or not."""
    made: dict[Any, Any] = {}
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> Any:
        bound = signature.bind(*arguments)
        bound.apply_defaults()
        key = tuple(bound.arguments.values())
        if key not in made:
            made[key] = function(*arguments)
        return made[key]

    return call


@once
def make(folder: Path, architecture: str, hidden: int = 64) -> Made:
    """Every module touched, ranks and strengths of their own, coefficients by layer."""
    here = folder / f"{architecture}-{hidden}"
    adapter = tiny.peft_adapter(
        architecture, here / "adapter", hidden=hidden, scale=0.1,
        target_modules=tiny.kinds(architecture), rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 32},
    )  # fmt: skip
    with_coefficients(adapter, architecture)
    made = record(
        adapter, tiny.hf_model(architecture, hidden), here / "reference",
        prompts=PROMPTS, max_new_tokens=2,
    )  # fmt: skip
    return Made(architecture, hidden, adapter, made)


@once
def gguf_artifact(folder: Path, architecture: str, form: Any, hidden: int = 64) -> Path:
    made = make(folder, architecture, hidden)
    out = made.adapter.parent / f"gguf-{form}"
    base = tiny.gguf_model(architecture, hidden)
    convert(made.adapter, base, out, form=form, check=False)
    return out


@once
def onnx_artifact(folder: Path, form: Any, precision: str = "fp32", *options: str) -> Path:
    made = make(folder, "llama")
    out = made.adapter.parent / "-".join(["onnx", form, precision, *options])
    base = tiny.onnx_model("llama", precision, *options)
    convert_onnx(made.adapter, base, out, form=form, check=False,
                 bounds=LOOSE if form == "merged" else None)  # fmt: skip
    return out


def prove(made: Made, folder: Path, model: Path | None = None, adapter: Any = "own") -> StaticProof:
    """The proof of an artifact, or of other files in the place of its own."""
    manifest = read_manifest(folder)
    entries = manifest.file("model"), manifest.file("adapter")
    base = tiny.gguf_model(made.architecture, made.hidden)
    own = folder / entries[0].path if entries[0] else base
    beside = folder / entries[1].path if entries[1] else None
    return static_proof(
        manifest, model or own, beside if adapter == "own" else adapter, made.record
    )


def betas(proof: StaticProof) -> dict[str, float]:
    return {one.module: one.beta for one in proof.modules}


def edited(made: Made, folder: Path, edit: Edit, kind: GGMLType = GGMLType.F32) -> Path:
    """The merged F32 model with other touched tensors: edit(module, W_base, ΔW), rows as stored."""
    base = open_model(tiny.gguf_model(made.architecture, made.hidden))
    merged = gguf_artifact(made.adapter.parents[1], made.architecture, "merged", made.hidden)
    tensors = []
    modules = {entry.tensor: entry.module for entry in read_manifest(merged).modules}
    ours, theirs = dense_gguf(merged / "model.gguf"), dense_gguf(base.shards[0].path)
    for name, info in base.tensors.items():
        if name not in modules:
            tensors.append(OutTensor(name, info.shape, info.type, info))
            continue
        rows = edit(modules[name], theirs[name], ours[name] - theirs[name]).astype(np.float32)
        assert rows.shape == info.shape
        imatrix = (
            np.ones(rows.shape[1], np.float32) if ggml_quantizer.requires_imatrix(kind) else None
        )
        encoded = ggml_quantizer.quantize(rows, kind, imatrix, threads=1)
        tensors.append(OutTensor(name, info.shape, kind, encoded))
    path = folder / "edited.gguf"
    write_gguf(path, dict(base.metadata), tensors)
    return path


def dense_gguf(path: Path) -> dict[str, np.ndarray]:
    """Every matrix, float32, as gguf-py reads it."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(str(path)).tensors
        if len(tensor.shape) == 2 and tensor.name.startswith("blk.")
    }


def hf_weight(made: Made, module: str) -> np.ndarray:
    folder = tiny.hf_model(made.architecture, made.hidden)
    with safe_open(folder / "model.safetensors", "np") as file:
        found: np.ndarray = file.get_tensor(f"{module}.weight").astype(np.float64)
    return found


def dense_delta(made: Made, module: str) -> np.ndarray:
    """ΔW from the adapter's own file, by the definition."""
    config = json.loads((made.adapter / "adapter_config.json").read_text())
    rank = config["rank_pattern"].get(module.rsplit(".", 1)[-1], config["r"])
    alpha = config["alpha_pattern"].get(module.rsplit(".", 1)[-1], config["lora_alpha"])
    coefficients = json.loads((made.adapter / "safegene.json").read_text())["expressions"]
    scale = alpha / rank * coefficients["default"]["coefficients"][module.split(".")[2]]
    with safe_open(made.adapter / "adapter_model.safetensors", "np") as file:
        a, b = (
            file.get_tensor(f"base_model.model.{module}.lora_{which}.weight").astype(np.float64)
            for which in "AB"
        )
    found: np.ndarray = scale * b @ a
    return found


def dense_beta(made: Made, module: str, weight: np.ndarray) -> float:
    delta = dense_delta(made, module)
    change = weight.astype(np.float64) - hf_weight(made, module)
    return float((change * delta).sum() / (delta * delta).sum())


def in_hf_order(made: Made, module: str, rows: np.ndarray) -> np.ndarray:
    return TABLE[made.architecture].transform(module, tiny.N_HEAD, tiny.N_HEAD_KV).invert_rows(rows)


# --- what is recorded ------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["merged", "branch", "adapter"])
@pytest.mark.parametrize("options", [(), ("fuse_qkv=false",), ("fuse_mlp_gate_up=true",)], ids=str)
def test_beta_is_one_in_onnx(form: str, options: tuple[str, ...], scratch: Path) -> None:
    proof = prove(make(scratch, "llama"), onnx_artifact(scratch, form, "fp32", *options))
    assert proof.status == "ok", proof.problems
    np.testing.assert_allclose(list(betas(proof).values()), 1, atol=1e-5)


@pytest.mark.parametrize("form", ["merged", "branch", "adapter"])
@pytest.mark.parametrize("precision", ["int4", "int8", "fp16", "bf16"])
def test_onnx_of_other_types_agrees_with_dense_numpy(
    precision: str, form: str, scratch: Path
) -> None:
    made = make(scratch, "llama")
    folder = onnx_artifact(scratch, form, precision)
    proof = prove(made, folder)
    assert proof.status == "ok", proof.problems
    served = dense_onnx(folder)
    for one in proof.modules:
        assert one.beta == pytest.approx(dense_beta(made, one.module, served[one.tensor]), abs=2e-5)
    assert proof.pooled == pytest.approx(1, abs=0.15)


def dense_onnx(folder: Path) -> dict[str, np.ndarray]:
    """What is served for each module of the manifest, (out, in), by onnx and plain numpy."""
    proto = onnx.load(str(folder / "model.onnx"))
    values = {one.name: numpy_helper.to_array(one) for one in proto.graph.initializer}
    if (folder / "adapter.onnx_adapter").exists():
        file = onnxruntime.AdapterFormat.read_adapter(str(folder / "adapter.onnx_adapter"))
        for name, value in file.get_parameters().items():
            if value.data_type() == "tensor(bfloat16)":
                # onnxruntime has no numpy type for it: what the branch form has, onnx can read
                branch = onnx.load(str(folder.parent / "onnx-branch-bf16" / "model.onnx"))
                named = {one.name: one for one in branch.graph.initializer}
                values[name] = numpy_helper.to_array(named[name])
            else:
                values[name] = np.array(value.numpy())
    users = {node.input[1]: node for node in proto.graph.node if len(node.input) > 1}
    found = {}
    for entry in read_manifest(folder).modules:
        name, _, rows = entry.tensor.partition("[")
        node = users[name]
        if node.op_type == "MatMulNBits":
            weight = dense_nbits(node, values)
        else:
            weight = values[name].astype(np.float64).T
        stem = name.removesuffix(".weight").removesuffix("_Q4").removesuffix("_Q8")
        slots = [f"{stem}.safegene.lora_{which}" for which in "AB"]
        if slots[0] in values:
            a, b = (values[slot].astype(np.float64) for slot in slots)
            weight = weight + (a @ b).T
        if rows:
            start, stop = map(int, rows.rstrip("]").split(":"))
            weight = weight[start:stop]
        found[entry.tensor] = weight
    return found


def dense_nbits(node: Any, values: dict[str, np.ndarray]) -> np.ndarray:
    """MatMulNBits by its documentation, element by element of a block."""
    about = {one.name: one.i for one in node.attribute}
    bits, size = about["bits"], about["block_size"]
    packed, scales = values[node.input[1]], values[node.input[2]].astype(np.float64)
    out = packed.shape[0]
    scales = scales.reshape(out, -1)
    per_byte = 8 // bits
    zeros = np.full(scales.shape, 2 ** (bits - 1))
    if len(node.input) > 3 and node.input[3]:
        stored = values[node.input[3]].reshape(out, -1)
        for block in range(scales.shape[1]):
            byte = stored[:, block // per_byte]
            zeros[:, block] = (byte >> (bits * (block % per_byte))) & (2**bits - 1)
    weight = np.zeros((out, scales.shape[1] * size))
    for column in range(weight.shape[1]):
        block, at = divmod(column, size)
        byte = packed[:, block, at // per_byte]
        code = (byte >> (bits * (at % per_byte))) & (2**bits - 1)
        weight[:, column] = (code.astype(int) - zeros[:, block]) * scales[:, block]
    return weight[:, : about["K"]]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW_TYPES else ())
        for name in sorted(
            ggml_quantizer.ENCODABLE - {"Q1_0", "Q2_0"}
        )  # these gguf-py does not know
    ],
)
def test_every_type_agrees_with_dense_numpy(name: str, scratch: Path, tmp_path: Path) -> None:
    made = make(scratch, "llama", 256)
    merged = gguf_artifact(scratch, "llama", "merged", 256)
    model = edited(made, tmp_path, lambda module, base, delta: base + delta, GGMLType[name])
    proof = prove(made, merged, model)
    served = dense_gguf(model)
    for one in proof.modules:
        assert one.type == name
        weight = in_hf_order(made, one.module, served[one.tensor])
        assert one.beta == pytest.approx(dense_beta(made, one.module, weight), abs=1e-5)
    if name.startswith(("F", "BF", "Q8", "Q6", "Q5", "Q4", "IQ4")):
        assert proof.pooled == pytest.approx(1, abs=0.1)
        assert proof.status == "ok", proof.problems


# --- another number, for every mistake -------------------------------------------------------------

STRENGTHS = {"base served": 0.0, "half": 0.5, "doubled": 2.0, "negated": -1.0, "rounded": 0.98}


@pytest.mark.parametrize("name", STRENGTHS)
@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_beta_is_the_strength(name: str, architecture: str, scratch: Path, tmp_path: Path) -> None:
    made, strength = make(scratch, architecture), STRENGTHS[name]
    model = edited(made, tmp_path, lambda module, base, delta: base + strength * delta)
    proof = prove(made, gguf_artifact(scratch, architecture, "merged"), model)
    np.testing.assert_allclose(list(betas(proof).values()), strength, atol=1e-5)
    assert proof.status == "broken"
    assert len(proof.problems) == len(proof.modules) + 1


def test_unpermuted_q_and_k_are_named(scratch: Path, tmp_path: Path) -> None:
    made = make(scratch, "llama")

    def edit(module: str, base: np.ndarray, delta: np.ndarray) -> np.ndarray:
        return base + in_hf_order(made, module, delta)

    proof = prove(made, gguf_artifact(scratch, "llama", "merged"), edited(made, tmp_path, edit))
    assert proof.status == "broken"
    wrong = {problem.field.rsplit(".", 1)[-1] for problem in proof.problems}
    assert wrong == {"q_proj", "k_proj", "pooled beta"}
    for module, beta in betas(proof).items():
        moved = module.endswith(("q_proj", "k_proj"))
        assert abs(beta) < 0.6 if moved else beta == pytest.approx(1, abs=1e-5)


def test_a_and_b_swapped_are_near_zero(scratch: Path, tmp_path: Path) -> None:
    made = make(scratch, "llama")

    def edit(module: str, base: np.ndarray, delta: np.ndarray) -> np.ndarray:
        return base + (delta.T if delta.shape[0] == delta.shape[1] else delta)

    proof = prove(made, gguf_artifact(scratch, "llama", "merged"), edited(made, tmp_path, edit))
    swapped = [one.beta for one in proof.modules if one.kind in ("q_proj", "o_proj")]
    assert len(swapped) == 2 * tiny.N_LAYERS
    assert np.abs(swapped).max() < 0.2
    assert proof.status == "broken"


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0"])
def test_one_dropped_layer_is_named(kind: str, scratch: Path, tmp_path: Path) -> None:
    made = make(scratch, "llama")

    def edit(module: str, base: np.ndarray, delta: np.ndarray) -> np.ndarray:
        return base if module.startswith("model.layers.1.") else base + delta

    model = edited(made, tmp_path, edit, GGMLType[kind])
    proof = prove(made, gguf_artifact(scratch, "llama", "merged"), model)
    assert proof.status == "broken"
    named = {problem.where for problem in proof.problems}
    dropped = {one.tensor for one in proof.modules if one.layer == 1}
    assert named - {"all modules"} == dropped
    heat = proof.heat_map()
    assert heat["layers"] == [0, 1]
    assert heat["kinds"][:2] == ["q_proj", "k_proj"]
    assert np.abs(np.array(heat["beta"]) - [[1], [0]]).max() < 0.2


def test_coefficients_that_were_ignored_show(scratch: Path, tmp_path: Path) -> None:
    made = make(scratch, "llama")
    ignored = {"0": 1 / 0.37, "1": 1 / 2.9}

    def edit(module: str, base: np.ndarray, delta: np.ndarray) -> np.ndarray:
        return base + ignored[module.split(".")[2]] * delta

    proof = prove(made, gguf_artifact(scratch, "llama", "merged"), edited(made, tmp_path, edit))
    for module, beta in betas(proof).items():
        assert beta == pytest.approx(ignored[module.split(".")[2]], abs=1e-4)


def test_a_sidecar_beside_a_merged_base_is_twice(scratch: Path) -> None:
    made = make(scratch, "llama")
    merged = gguf_artifact(scratch, "llama", "merged") / "model.gguf"
    proof = prove(made, gguf_artifact(scratch, "llama", "sidecar"), merged)
    np.testing.assert_allclose(list(betas(proof).values()), 2, atol=1e-5)
    assert "twice" in proof.detail
    assert all(one.base_shift == pytest.approx(1, abs=1e-5) for one in proof.modules)


def test_a_sidecar_that_is_not_loaded_is_zero(scratch: Path) -> None:
    proof = prove(make(scratch, "llama"), gguf_artifact(scratch, "llama", "sidecar"), adapter=None)
    assert proof.status == "broken"
    assert proof.pooled == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("form", ["branch", "adapter"])
def test_merged_and_branched_is_twice(
    form: Any, precision: str, scratch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The converter refuses such a base; other tools would not."""
    monkeypatch.setattr(onnx_base, "_check_constants", lambda model: None)
    made = make(scratch, "llama")
    base = tmp_path / "base"
    shutil.copytree(onnx_artifact(scratch, "merged", precision), base)
    (base / "manifest.json").unlink()
    out = tmp_path / "twice"
    convert_onnx(made.adapter, base, out, form=form, check=False,
                 bounds=LOOSE if form == "merged" else None)  # fmt: skip
    proof = prove(made, out)
    assert proof.status == "broken"
    assert proof.pooled == pytest.approx(2, abs=0.1)


def test_slots_without_their_adapter_are_zero(scratch: Path) -> None:
    proof = prove(make(scratch, "llama"), onnx_artifact(scratch, "adapter"), adapter=None)
    assert proof.pooled == pytest.approx(0, abs=1e-5)
    assert proof.status == "broken"


@pytest.mark.parametrize("strength", [0.5, 2, -1])
def test_an_adapter_file_of_another_strength_shows(
    strength: float, scratch: Path, tmp_path: Path
) -> None:
    folder = onnx_artifact(scratch, "adapter")
    path = adapter_file(folder, tmp_path, lambda name, x: strength * x if "lora_B" in name else x)
    proof = prove(make(scratch, "llama"), folder, adapter=path)
    np.testing.assert_allclose(list(betas(proof).values()), strength, atol=1e-5)
    assert proof.status == "broken"


def test_more_than_the_delta_breaks_though_beta_is_one(scratch: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    folder = onnx_artifact(scratch, "adapter", "fp32", "fuse_qkv=false")

    def widen(name: str, x: np.ndarray) -> np.ndarray:
        # one more rank, B of it orthogonal to the others: nothing of it lies along the delta
        if "lora_A" in name:
            return np.concatenate([x, random.standard_normal((len(x), 1))], axis=1)
        row = random.standard_normal(x.shape[1])
        row -= np.linalg.lstsq(x.T, row, rcond=None)[0] @ x
        return np.concatenate([x, row[None]])

    path = adapter_file(folder, tmp_path, widen)
    proof = prove(make(scratch, "llama"), folder, adapter=path)
    np.testing.assert_allclose(list(betas(proof).values()), 1, atol=1e-4)
    assert proof.status == "broken"
    assert all(problem.field.startswith("factors of") for problem in proof.problems)


def test_a_slot_of_no_recorded_module_breaks(scratch: Path, tmp_path: Path) -> None:
    folder = onnx_artifact(scratch, "adapter")
    path = adapter_file(folder, tmp_path, lambda name, x: x, extra="other.safegene.lora_A")
    proof = prove(make(scratch, "llama"), folder, adapter=path)
    assert proof.status == "broken"
    assert "other.safegene.lora_A" in proof.problems[0].field


def adapter_file(folder: Path, out: Path, edit: Any, extra: str = "") -> Path:
    old = onnxruntime.AdapterFormat.read_adapter(str(folder / "adapter.onnx_adapter"))
    values = {
        name: edit(name, np.array(value.numpy())) for name, value in old.get_parameters().items()
    }
    if extra:
        values[extra] = np.ones((2, 2))
    new = onnxruntime.AdapterFormat()
    new.set_adapter_version(1)
    new.set_model_version(1)
    made = (  # OrtValues look into the arrays, which must live until they are written
        {
            name: onnxruntime.OrtValue.ortvalue_from_numpy(
                np.ascontiguousarray(value, dtype=np.float32)
            )
            for name, value in values.items()
        }
    )
    new.set_parameters(made)
    path = out / "edited.onnx_adapter"
    new.export_adapter(str(path))
    return path


# --- what cannot be checked ------------------------------------------------------------------------
