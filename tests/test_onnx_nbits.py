"""Merging into packed and half-wide weights: what survives, what is promoted, what is refused.

ONNX Runtime is the oracle: a linear is cut out of the graph and multiplied with unit vectors, so its
weight is what ONNX Runtime computes with, whatever we believe is stored. Bases are quantised by ONNX
Runtime's own tool, and by the onnxruntime-genai builder.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from onnx import helper, numpy_helper
from onnx_tools import arrays, convert_onnx, edited, every_module, feeds, load, node, quick, session
from test_to_gguf import peft_delta
from test_to_onnx import expected_delta

from safegene_converter.bases import onnx_build
from safegene_converter.fold.survival import Bounds
from safegene_runtime.artifact.onnx_checks import precision_class
from safegene_runtime.errors import (
    BaseModelError,
    PostconditionError,
    SurvivalError,
    UnsupportedError,
)
from safegene_runtime.formats.onnx.file import read_onnx

ANYTHING = Bounds(0.0, 10.0, 1e6, 1e6)
LINEARS = ("qkv_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
KINDS = list(itertools.product((4, 8), (True, False), (16, 32, 128)))


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta well below half a step of 4 bits."""
    return every_module(tmp_path_factory.mktemp("nbits") / "adapter", scale=0.03)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A delta of about a step: some of it survives in any kind."""
    return every_module(tmp_path_factory.mktemp("larger") / "adapter", scale=0.08)


@pytest.fixture(scope="module")
def delta(adapter: Path) -> dict[str, np.ndarray]:
    return peft_delta(adapter, "llama")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, bool, int], Path]:
    """The tiny model quantised by ONNX Runtime's own tool, once per kind."""
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        MatMulNBitsQuantizer,
    )

    folder, made = tmp_path_factory.mktemp("packed"), {}

    def make(bits: int, symmetric: bool, block: int) -> Path:
        def change(model: onnx.ModelProto) -> None:
            config = DefaultWeightOnlyQuantConfig(
                block_size=block, is_symmetric=symmetric, accuracy_level=1, bits=bits
            )
            tool = MatMulNBitsQuantizer(model, algo_config=config)
            tool.process()
            model.CopyFrom(tool.model.model)

        key = (bits, symmetric, block)
        if key not in made:
            name = "-".join(map(str, key))
            made[key] = edited(tiny.onnx_model("llama"), folder / name, change)
        return made[key]

    return make


def served(folder: Path, layer: int, projection: str) -> np.ndarray:
    """(out, in): what ONNX Runtime computes with at this linear, biases left out."""
    model = load(folder)
    one = node(model, f"layers.{layer}/", f"{projection}/MatMul")
    kept = {name: None for name in one.input[1:5] if name}
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in kept]
    shape = next(tensor.dims for tensor in tensors if tensor.name == one.input[1])
    cols = next((a.i for a in one.attribute if a.name == "K"), shape[0])
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["m", cols])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["m", "n"])
    cut = helper.make_node(
        one.op_type, ["x", *one.input[1:5]], ["y"], domain=one.domain,
        **{a.name: helper.get_attribute_value(a) for a in one.attribute},
    )  # fmt: skip
    graph = helper.make_graph([cut], "cut", [x], [y], tensors)
    whole = helper.make_model(graph, opset_imports=model.opset_import, ir_version=10)
    (found,) = session(whole).run(None, {"x": np.eye(cols, dtype=np.float32)})
    return found.T


def survival(change: np.ndarray, delta: np.ndarray) -> tuple[float, float]:
    """(gain, relative error), straight from their definition."""
    change, delta = change.astype(np.float64), delta.astype(np.float64)
    gain = float((change * delta).sum() / (delta * delta).sum())
    return gain, float(np.linalg.norm(change - delta) / np.linalg.norm(delta))


@pytest.mark.parametrize(("bits", "symmetric", "block"), KINDS)
def test_recorded_survival_is_what_onnx_runtime_computes(
    bits: int,
    symmetric: bool,
    block: int,
    packed: Callable[[int, bool, int], Path],
    larger: Path,
    tmp_path: Path,
) -> None:
    delta = peft_delta(larger, "llama")
    source = packed(bits, symmetric, block)
    stored = {one.op_type for one in load(source).graph.node if "_proj/MatMul" in one.name}
    assert stored == {"MatMulNBits"}
    manifest = quick(
        larger, source, tmp_path / "out", form="merged", promote=False, bounds=ANYTHING
    )
    assert {entry.type_after for entry in manifest.modules} == {f"INT{bits}"}
    change = served(tmp_path / "out", 1, "up_proj") - served(source, 1, "up_proj")
    gain, error = survival(change, expected_delta(delta, 1, "up_proj"))
    (entry,) = [one for one in manifest.modules if one.module == "model.layers.1.mlp.up_proj"]
    assert entry.survival is not None
    assert entry.survival["gain"] == pytest.approx(gain, abs=2e-3)
    assert entry.survival["relative_error"] == pytest.approx(error, rel=5e-3)
    change = served(tmp_path / "out", 0, "qkv_proj") - served(source, 0, "qkv_proj")
    gain, _ = survival(change[64:96], expected_delta(delta, 0, "k_proj"))
    (entry,) = [one for one in manifest.modules if one.module == "model.layers.0.self_attn.k_proj"]
    assert entry.survival is not None
    assert entry.survival["gain"] == pytest.approx(gain, abs=2e-3)


@pytest.mark.parametrize(("bits", "symmetric", "block"), KINDS)
def test_promoted_weights_carry_the_delta_in_onnx_runtime(
    bits: int,
    symmetric: bool,
    block: int,
    packed: Callable[[int, bool, int], Path],
    adapter: Path,
    delta: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    """With bounds that 4 bits cannot keep: what is wider was needed, and carries the delta."""
    bounds = Bounds(0.98, 1.02, 0.2, 1.0)
    source = packed(bits, symmetric, block)
    manifest = quick(adapter, source, tmp_path / "out", form="merged", bounds=bounds)
    kinds = {entry.module: entry.type_after for entry in manifest.modules}
    assert set(kinds.values()) <= {"INT4", "INT8", "F32"}
    assert bits == 8 or "INT4" not in kinds.values()
    for layer, projection in itertools.product(range(2), LINEARS):
        before, after = (served(path, layer, projection) for path in (source, tmp_path / "out"))
        gain, error = survival(after - before, expected_delta(delta, layer, projection))
        assert 0.979 <= gain <= 1.021
        assert error <= 0.21
    (logits,) = (s := session(tmp_path / "out" / "model.onnx")).run(
        ["logits"], feeds(s, [[3, 9, 27]])
    )
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_promotion_climbs_as_far_as_it_must(
    symmetric: bool,
    packed: Callable[[int, bool, int], Path],
    adapter: Path,
    delta: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    source = packed(4, symmetric, 32)
    found = {}
    for name, bounds in {
        "INT4": ANYTHING,
        "INT8": Bounds(0.9, 1.1, 0.5, 1.0),
        "F32": Bounds(0.999, 1.001, 1e-4, 1.0),
    }.items():
        manifest = quick(adapter, source, tmp_path / name, form="merged", bounds=bounds)
        found[name] = {entry.type_after for entry in manifest.modules}
        sizes = [sum(p.stat().st_size for p in path.glob("model.onnx*"))
                 for path in (source, tmp_path / name)]  # fmt: skip
        grown = sum(entry.bytes_after - entry.bytes_before for entry in manifest.modules)
        assert abs(sizes[1] - sizes[0] - grown) < 8192, "only headers and padding besides"
    assert found == {"INT4": {"INT4"}, "INT8": {"INT8"}, "F32": {"F32"}}
    for layer, projection in itertools.product(range(2), LINEARS):
        change = served(tmp_path / "F32", layer, projection) - served(source, layer, projection)
        assert np.abs(change - expected_delta(delta, layer, projection)).max() <= 1e-6
    assert precision_class(read_onnx(tmp_path / "F32" / "model.onnx")) != precision_class(
        read_onnx(source / "model.onnx")
    )


def test_keep_refuses_what_rounding_would_erase(
    packed: Callable[[int, bool, int], Path], adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(SurvivalError) as caught:
        quick(adapter, packed(4, True, 32), tmp_path / "out", form="merged", promote=False)
    assert "INT4: gain" in str(caught.value)
    assert "--as branch" in str(caught.value)
    assert len(caught.value.problems) > 1, "all weights that fail, not the first"
    assert list(tmp_path.iterdir()) == []


def test_rows_of_other_modules_keep_their_bytes(
    packed: Callable[[int, bool, int], Path], tmp_path: Path
) -> None:
    """Of a packed qkv only k is touched: blocks, scales and zero points of q and v stay."""
    only = tiny.peft_adapter("llama", tmp_path / "adapter", scale=0.1, target_modules=["k_proj"])
    source = packed(4, False, 16)
    quick(only, source, tmp_path / "out", form="merged", promote=False, bounds=ANYTHING)
    before, after = arrays(source), arrays(tmp_path / "out")
    one = node(load(source), "layers.0/", "qkv_proj/MatMul")
    changed = 0
    for name in one.input[1:4]:
        old, new = before[name].reshape(128, -1), after[name].reshape(128, -1)
        rows = np.flatnonzero((old != new).any(axis=1))
        assert set(rows) <= set(range(64, 96))
        changed += len(rows)
    assert changed > 32


@pytest.mark.parametrize(("options", "block_size"), [([], None), (["is_symmetric=false"], 16)])
def test_from_float_weights_are_merged_first_and_quantised_once(
    options: list[str],
    block_size: int | None,
    adapter: Path,
    delta: dict[str, np.ndarray],
    tmp_path: Path,
) -> None:
    """The builder's int4: the result is the builder's own rounding of W + dW, not of Q(W) + dW."""
    manifest = quick(
        adapter, tiny.hf_model("llama"), tmp_path / "out", form="merged", precision="int4",
        builder_options=options, block_size=block_size, bounds=Bounds(0.5, 1.5, 0.5, 1.3),
    )  # fmt: skip
    assert {entry.survival["mode"] for entry in manifest.modules} == {"once"}  # type: ignore[index]
    assert {entry.type_before for entry in manifest.modules} == {"INT4"}
    assert manifest.settings["export"]["options"] == options
    assert 0 < manifest.settings["weight_error"] < 0.2
    has_zeros = bool(node(load(tmp_path / "out"), "layers.0/", "o_proj/MatMul").input[3:4])
    assert has_zeros == bool(options)
    blocks = [f"block_size={block_size}"] if block_size else []
    base = tiny.onnx_model("llama", "int4", *options, *blocks)
    weights = arrays(tiny.onnx_model("llama"))
    for layer, projection in ((0, "o_proj"), (1, "gate_proj")):
        name = node(load(tiny.onnx_model("llama")), f"layers.{layer}/", f"{projection}/MatMul")
        meant = weights[name.input[1]].T + expected_delta(delta, layer, projection)
        plain = served(base, layer, projection) - weights[name.input[1]].T
        ours = served(tmp_path / "out", layer, projection) - meant
        assert np.linalg.norm(ours) <= 1.3 * np.linalg.norm(plain)


def test_the_default_beside_packed_weights_is_a_branch(
    packed: Callable[[int, bool, int], Path], adapter: Path, tmp_path: Path
) -> None:
    assert quick(adapter, packed(8, True, 32), tmp_path / "a").artifact["form"] == "branch"
    assert quick(adapter, tiny.onnx_model("llama"), tmp_path / "b").artifact["form"] == "merged"


@pytest.mark.parametrize("form", ["merged", "branch", "adapter"])
def test_the_self_check_passes_around_packed_weights(
    form: str, packed: Callable[[int, bool, int], Path], adapter: Path, tmp_path: Path
) -> None:
    manifest = convert_onnx(adapter, packed(4, False, 32), tmp_path / "out", form=form)  # type: ignore[arg-type]
    assert manifest.settings["self_check"]["beta"] == pytest.approx(1, abs=0.1)


def test_a_promoted_linear_keeps_its_bias(
    packed: Callable[[int, bool, int], Path], adapter: Path, tmp_path: Path
) -> None:
    """MatMulNBits takes a bias, MatMul does not: it becomes an Add, and all later nodes stay."""

    def add_bias(model: onnx.ModelProto) -> None:
        for layer, name in itertools.product(range(2), ("gate_proj", "up_proj")):
            one = node(model, f"layers.{layer}/", f"{name}/MatMul")
            bias = np.linspace(-1, 1, 128, dtype=np.float32)
            model.graph.initializer.append(numpy_helper.from_array(bias, f"bias.{layer}.{name}"))
            one.input.extend([""] * (5 - len(one.input)))
            one.input.append(f"bias.{layer}.{name}")

    source = edited(packed(4, True, 32), tmp_path / "base", add_bias)
    exact = Bounds(0.999, 1.001, 1e-4, 1.0)
    quick(adapter, source, tmp_path / "merged", form="merged", bounds=exact)
    quick(adapter, source, tmp_path / "branch", form="branch")
    found = []
    for path in (source, tmp_path / "merged", tmp_path / "branch"):
        running = session(path / "model.onnx")
        found.append(running.run(["logits"], feeds(running, [[5, 77, 1042]]))[0])
    assert np.abs(found[1] - found[2]).max() <= 2e-4
    assert np.abs(found[0] - found[2]).max() > 0.01


@pytest.mark.parametrize("bounds", [ANYTHING, Bounds(0.999, 1.001, 1e-4, 1.0)])
def test_a_constant_that_two_weights_share_is_left_to_the_other(
    bounds: Bounds, packed: Callable[[int, bool, int], Path], tmp_path: Path
) -> None:
    """Zero points are often equal, and stored once."""

    def share(model: onnx.ModelProto) -> None:
        first, second = (node(model, f"layers.{i}/", "up_proj/MatMul") for i in (0, 1))
        second.input[3] = first.input[3]

    source = edited(packed(4, False, 32), tmp_path / "base", share)
    only = tiny.peft_adapter(
        "llama", tmp_path / "adapter", scale=0.1, target_modules=["up_proj"],
        layers_to_transform=[0],
    )  # fmt: skip
    quick(only, source, tmp_path / "out", form="merged", bounds=bounds)
    untouched = [served(path, 1, "up_proj") for path in (source, tmp_path / "out")]
    assert np.array_equal(*untouched)
    change = served(tmp_path / "out", 0, "up_proj") - served(source, 0, "up_proj")
    gain, _ = survival(change, expected_delta(peft_delta(only, "llama"), 0, "up_proj"))
    assert 0.5 < gain < 1.5


def test_a_group_index_is_refused_by_name(
    packed: Callable[[int, bool, int], Path], adapter: Path, tmp_path: Path
) -> None:
    def add_index(model: onnx.ModelProto) -> None:
        one = node(model, "layers.0/", "up_proj/MatMul")
        index = np.repeat(np.arange(2), 32).astype(np.int32)
        model.graph.initializer.append(numpy_helper.from_array(index, "g_idx"))
        one.input.extend([""] * (4 - len(one.input)))
        one.input.append("g_idx")

    source = edited(packed(4, True, 32), tmp_path / "base", add_index)
    with pytest.raises(BaseModelError, match="g_idx"):
        quick(adapter, source, tmp_path / "out", form="merged")
    assert not (tmp_path / "out").exists()


# --- half-wide graphs ------------------------------------------------------------------------------


def test_a_data_file_that_all_its_tensors_leave_is_not_written(
    adapter: Path, tmp_path: Path
) -> None:
    """One file per tensor, and weights that are promoted: they go to a file of their own."""
    source = tiny.onnx_model("llama", "int4")
    base = tmp_path / "base"
    shutil.copytree(source, base, ignore=shutil.ignore_patterns("*.onnx*"))
    onnx.save(
        onnx.load(source / "model.onnx"), base / "model.onnx", save_as_external_data=True,
        all_tensors_to_one_file=False, size_threshold=64,
    )  # fmt: skip
    manifest = quick(adapter, base, tmp_path / "out", form="merged")
    assert {entry.type_after for entry in manifest.modules} - {"INT4"}
    assert all(file.stat().st_size for file in (tmp_path / "out").iterdir())
    read = {file.name for file in read_onnx(tmp_path / "out" / "model.onnx").files}
    assert read == {entry.path for entry in manifest.files if entry.role in ("model", "data")}


def as_float32(tensor: onnx.TensorProto) -> np.ndarray:
    return numpy_helper.to_array(tensor).astype(np.float32)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_wide_weights_are_the_rounded_sum(
    precision: str, adapter: Path, delta: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """ONNX Runtime has no bfloat16 kernels on the CPU: there `onnx` decodes, and nothing runs."""
    source = tiny.onnx_model("llama", precision)
    manifest = quick(adapter, source, tmp_path / "merged", form="merged")
    quick(adapter, source, tmp_path / "branch", form="branch")
    step = {"fp16": 2.0**-11, "bf16": 2.0**-8}[precision]
    kind = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    assert {entry.type_after for entry in manifest.modules} == {precision.upper().replace("P", "")}
    before, after, branch = (load(path) for path in (source, tmp_path / "merged",
                                                     tmp_path / "branch"))  # fmt: skip
    tensors = [{t.name: t for t in model.graph.initializer} for model in (before, after, branch)]
    for layer, projection in itertools.product(range(2), LINEARS):
        weight = node(before, f"layers.{layer}/", f"{projection}/MatMul").input[1]
        assert tensors[1][weight].data_type == kind
        meant = as_float32(tensors[0][weight]).T + expected_delta(delta, layer, projection)
        got = as_float32(tensors[1][weight]).T
        assert (np.abs(got - meant) <= step * np.abs(meant) + 1e-7).all()
        pair = [
            tensors[2][
                node(branch, f"layers.{layer}/", f"{projection}/MatMul/safegene/{end}").input[1]
            ]
            for end in ("lora_A", "lora_B")
        ]
        assert {tensor.data_type for tensor in pair} == {kind}
        product = (as_float32(pair[0]) @ as_float32(pair[1])).T
        assert np.allclose(product, expected_delta(delta, layer, projection), atol=4 * step * 0.03)


def test_a_half_wide_graph_runs_in_all_forms(adapter: Path, tmp_path: Path) -> None:
    for form in ("merged", "branch", "adapter"):
        manifest = convert_onnx(
            adapter, tiny.onnx_model("llama", "fp16"), tmp_path / form, form=form
        )
        assert manifest.settings["self_check"]["beta"] == pytest.approx(1, abs=0.01)


def test_a_half_wide_graph_that_takes_no_past_is_refused(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the builder makes of fp16 for the CPU: whole sequences run, and no step from the cache."""
    monkeypatch.setattr(onnx_build, "_LAYOUT", {})
    onnx_build.build_onnx(tiny.hf_model("llama"), tmp_path / "base", "fp16")
    with pytest.raises(PostconditionError, match="run: expected logits"):
        convert_onnx(adapter, tmp_path / "base", tmp_path / "out", form="branch")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_run_here_is_not_called_checked(adapter: Path, tmp_path: Path) -> None:
    for source, precision in ((tiny.onnx_model("llama", "bf16"), None),
                              (tiny.hf_model("llama"), "bf16")):  # fmt: skip
        with pytest.raises(UnsupportedError, match="--no-self-check"):
            convert_onnx(adapter, source, tmp_path / "out", precision=precision)
    manifest = quick(adapter, tiny.onnx_model("llama", "bf16"), tmp_path / "out", form="branch")
    assert "self_check" not in manifest.settings
