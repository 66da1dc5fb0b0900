"""The self-check of an ONNX artifact finds what was damaged."""

# ruff: noqa: F811 - fixtures are imported, and are parameters of the tests, too
from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
from onnx import helper, numpy_helper
from onnx_tools import FORMS, arrays, convert_onnx, edited, node
from safetensors.numpy import load_file, save_file
from test_onnx_nbits import KINDS, packed, served  # noqa: F401
from test_onnx_selfcheck import Compare, adapter, compare, stored  # noqa: F401
from test_to_onnx import weight_of

from safegene_converter.fold.survival import Bounds
from safegene_converter.onnx import convert
from safegene_converter.onnx.fold import OnnxFold
from safegene_runtime.errors import PostconditionError
from safegene_runtime.formats.onnx.file import read_onnx


def graph_damage(change: Callable[[onnx.ModelProto], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        model = onnx.load(path, load_external_data=False)
        change(model)
        path.write_bytes(model.SerializeToString())

    return damage


def flipped(pick: Callable[[onnx.ModelProto], str]) -> Callable[[Path], None]:
    """One bit of one tensor, wherever it lies."""

    def damage(path: Path) -> None:
        info = read_onnx(path).initializers[pick(onnx.load(path, load_external_data=False))]
        assert info.path is not None
        with info.path.open("r+b") as file:
            file.seek(info.offset + info.nbytes - 1)
            byte = file.read(1)[0]
            file.seek(info.offset + info.nbytes - 1)
            file.write(bytes([byte ^ 1]))

    return damage


def embedding(model: onnx.ModelProto) -> str:
    """Of the head as well, where they are tied: the largest tensor there is."""
    return max(model.graph.initializer, key=lambda tensor: np.prod(tensor.dims)).name


def attribute(model: onnx.ModelProto) -> None:
    one = next(a for n in model.graph.node for a in n.attribute if a.name == "epsilon")
    one.f *= 1.5


def operator(model: onnx.ModelProto) -> None:
    next(one for one in model.graph.node if one.op_type == "Mul").op_type = "Add"


def wiring(model: onnx.ModelProto) -> None:
    one = next(one for one in model.graph.node if one.op_type == "Mul")
    one.input[0], one.input[1] = one.input[1], one.input[0]


def one_more(model: onnx.ModelProto) -> None:
    model.graph.node.append(helper.make_node("Identity", ["logits"], ["more"], name="more"))


def one_less(model: onnx.ModelProto) -> None:
    del model.graph.node[-1]


def order(model: onnx.ModelProto) -> None:
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))


def constant(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "more"))


def constant_gone(model: onnx.ModelProto) -> None:
    name = embedding(model)
    kept = [one for one in model.graph.initializer if one.name != name]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)


def an_input(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", onnx.TensorProto.FLOAT, [1]))


def opset(model: onnx.ModelProto) -> None:
    model.opset_import[0].version += 1


def metadata(model: onnx.ModelProto) -> None:
    model.metadata_props.add(key="more", value="more")


def output_type(model: onnx.ModelProto) -> None:
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16


def inner_attribute(model: onnx.ModelProto) -> None:
    one = next(one for one in model.graph.node if one.op_type == "GroupQueryAttention")
    next(a for a in one.attribute if a.name == "num_heads").i *= 2


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "a bit of the embedding": (flipped(embedding), "byte for byte"),
    "a bit of a norm": (
        flipped(lambda model: next(t.name for t in model.graph.initializer if "norm" in t.name)),
        "norm",
    ),
    "epsilon": (graph_damage(attribute), "another attribute"),
    "heads": (graph_damage(inner_attribute), "another attribute"),
    "operator": (graph_damage(operator), "another op_type"),
    "wiring": (graph_damage(wiring), "another input"),
    "a node more": (graph_damage(one_more), "node more: expected none"),
    "a node less": (graph_damage(one_less), "got none"),
    "order": (graph_damage(order), "order"),
    "a constant more": (graph_damage(constant), "initializer more: expected none"),
    "a constant less": (graph_damage(constant_gone), "got none"),
    "an input": (graph_damage(an_input), "inputs"),
    "opset": (graph_damage(opset), "opset_import"),
    "metadata": (graph_damage(metadata), "metadata_props"),
    "an output's type": (graph_damage(output_type), "output"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_whatever_else_changes_is_one_problem(
    damage: str, form: str, adapter: Path, compare: Compare
) -> None:
    change, words = DAMAGE[damage]
    (found,) = compare(adapter, tiny.onnx_model("llama"), form, change)
    assert words in found


@pytest.mark.parametrize("form", ["branch", "adapter"])
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_beside_a_branch_the_weights_themselves_are_untouched(
    precision: str, form: str, adapter: Path, compare: Compare
) -> None:
    damage = flipped(lambda model: weight_of(model, 1, "down_proj"))
    (found,) = compare(adapter, tiny.onnx_model("llama", precision), form, damage)
    assert "down_proj" in found
    assert "byte for byte" in found


@pytest.mark.parametrize("form", ["branch", "adapter"])
def test_a_branch_is_wired_to_its_own_linear(form: str, adapter: Path, compare: Compare) -> None:
    def swap(model: onnx.ModelProto) -> None:
        """The products of gate and up, which have one shape and one input."""
        one, two = (node(model, "layers.1/", f"{name}_proj", "safegene/Add")
                    for name in ("gate", "up"))  # fmt: skip
        one.input[1], two.input[1] = two.input[1], one.input[1]

    def other_input(model: onnx.ModelProto) -> None:
        one, two = (node(model, f"layers.{layer}/", "gate_proj", "safegene/lora_A")
                    for layer in (0, 1))  # fmt: skip
        two.input[0] = one.input[0]

    for change, count in ((swap, 2), (other_input, 1)):
        found = compare(adapter, tiny.onnx_model("llama"), form, graph_damage(change))
        assert len([one for one in found if ") B, got others" in one]) == count


def test_a_packed_node_may_change_in_its_bits_and_constants_only(
    adapter: Path, compare: Compare
) -> None:
    def level(model: onnx.ModelProto) -> None:
        one = node(model, "layers.1/", "down_proj/MatMul")
        next(a for a in one.attribute if a.name == "accuracy_level").i = 1

    base = tiny.onnx_model("llama", "int8")
    kept = [one.name for one in node(onnx.load(base / "model.onnx"), "layers.1/", "down_proj/MatMul")
            .attribute]  # fmt: skip
    assert "accuracy_level" in kept
    (found,) = compare(adapter, base, "merged", graph_damage(level))
    assert "another attribute" in found


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_touched_weight_that_is_gone_or_has_another_shape_is_named(
    precision: str, adapter: Path, compare: Compare
) -> None:
    def picked(model: onnx.ModelProto) -> onnx.TensorProto:
        name = weight_of(model, 1, "down_proj")
        return next(one for one in model.graph.initializer if one.name == name)

    def gone(model: onnx.ModelProto) -> None:
        model.graph.initializer.remove(picked(model))

    def shaped(model: onnx.ModelProto) -> None:
        one = picked(model)
        one.dims[0], one.dims[1] = one.dims[1], one.dims[0]
        if precision == "int8":
            said = node(model, "layers.1/", "down_proj/MatMul").attribute
            next(a for a in said if a.name == "block_size").i *= 3

    for change in (gone, shaped):
        found = compare(
            adapter, tiny.onnx_model("llama", precision), "merged", graph_damage(change)
        )
        assert any("down_proj" in one for one in found)


def rows_damage(
    base: Path, projection: str, change: Callable[[np.ndarray], np.ndarray]
) -> Callable[[Path], None]:
    """Puts base + change(delta) where base + delta was; both (in, out), of layer 1."""

    def damage(path: Path) -> None:
        name = weight_of(onnx.load(path, load_external_data=False), 1, projection)
        info = read_onnx(path).initializers[name]
        old, new = arrays(base)[name], arrays(path.parent)[name]
        made = (old + change(new - old)).astype(old.dtype)
        assert info.path is not None
        with info.path.open("r+b") as file:
            file.seek(info.offset)
            file.write(np.ascontiguousarray(made).tobytes())

    return damage


def exchanged(delta: np.ndarray) -> np.ndarray:
    """The first rows of q, and those of k."""
    delta = delta.copy()
    delta[:, :32], delta[:, 64:96] = delta[:, 64:96].copy(), delta[:, :32].copy()
    return delta


@pytest.mark.parametrize(
    ("projection", "change", "modules"),
    [
        ("down_proj", np.negative, ["down_proj"]),
        ("down_proj", lambda delta: 0.5 * delta, ["down_proj"]),
        ("down_proj", np.zeros_like, ["down_proj"]),
        ("qkv_proj", exchanged, ["k_proj", "q_proj"]),
        ("qkv_proj", lambda d: np.concatenate([d[:, :96], 0 * d[:, 96:]], axis=1), ["v_proj"]),
    ],
    ids=["the other sign", "half of it", "missing", "q and k exchanged", "v missing"],
)
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_delta_of_every_module_must_be_in_its_own_rows(
    precision: str,
    projection: str,
    change: Callable[[np.ndarray], np.ndarray],
    modules: list[str],
    adapter: Path,
    compare: Compare,
) -> None:
    base = tiny.onnx_model("llama", precision)
    found = compare(adapter, base, "merged", rows_damage(base, projection, change))
    named = sorted(part for part in ("q_proj", "k_proj", "v_proj", "down_proj")
                   if any(f"model.layers.1.self_attn.{part} " in one
                          or f"model.layers.1.mlp.{part} " in one for one in found))  # fmt: skip
    assert named == modules
    assert all("delta " in one for one in found)


def one_wrong(adapter: Path, out: Path, change: str) -> Path:
    """The adapter with another delta for one small module, k of layer 1."""
    out.mkdir()
    for file in adapter.iterdir():
        (out / file.name).write_bytes(file.read_bytes())
    tensors = load_file(out / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.1.self_attn"
    b = f"{stem}.k_proj.lora_B.weight"
    if change == "exchanged":
        for end in ("lora_A", "lora_B"):
            one, two = f"{stem}.k_proj.{end}.weight", f"{stem}.v_proj.{end}.weight"
            tensors[one], tensors[two] = tensors[two], tensors[one]
    else:
        tensors[b] = tensors[b] * {"sign": -1.0, "half": 0.5, "missing": 0.05}[change]
    save_file({name: np.ascontiguousarray(one) for name, one in tensors.items()},
              out / "adapter_model.safetensors", metadata={"format": "pt"})  # fmt: skip
    return out


@pytest.mark.parametrize("change", ["sign", "half", "missing", "exchanged"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("form", FORMS)
def test_one_wrong_module_among_fourteen_is_seen_in_every_type(
    form: str, precision: str, change: str, adapter: Path, compare: Compare, tmp_path: Path
) -> None:
    wrong = one_wrong(adapter, tmp_path / "wrong", change)
    base = tiny.onnx_model("llama", precision)
    found = compare(wrong, base, form, meant=adapter)
    assert any("k_proj" in one or "qkv_proj" in one for one in found), found
    others = [f"layers.{layer}.mlp" for layer in (0, 1)]
    assert not any(name in one for name, one in itertools.product(others, found))


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_rows_of_other_modules_stay(precision: str, compare: Compare, tmp_path: Path) -> None:
    only = tiny.peft_adapter("llama", tmp_path / "only", scale=0.1, target_modules=["k_proj"])
    base = tiny.onnx_model("llama", precision)
    assert compare(only, base, "merged") == []

    def last_row(path: Path) -> None:
        flipped(lambda model: weight_of(model, 1, "qkv_proj"))(path)

    (found,) = compare(only, base, "merged", last_row)
    assert "other rows of" in found
    assert "qkv_proj" in found


def test_rows_of_other_modules_may_change_by_the_rounding_of_a_promotion(
    compare: Compare, tmp_path: Path
) -> None:
    only = tiny.peft_adapter("llama", tmp_path / "only", scale=0.02, target_modules=["k_proj"])
    base, exact = tiny.onnx_model("llama", "int4"), Bounds(0.999, 1.001, 1e-4, 1.0)
    assert compare(only, base, "merged", bounds=exact) == []

    def turned_round(path: Path) -> None:
        name = weight_of(onnx.load(path, load_external_data=False), 1, "qkv_proj")
        info = read_onnx(path).initializers[name]
        stored = arrays(path.parent)[name].copy()
        assert stored.dtype == np.float32, "promoted"
        stored[:, 96:] *= -1
        assert info.path is not None
        with info.path.open("r+b") as file:
            file.seek(info.offset)
            file.write(stored.tobytes())

    (found,) = compare(only, base, "merged", turned_round, bounds=exact)
    assert "other rows of" in found


def test_float_rows_of_other_modules_are_the_graphs_and_not_those_of_the_weights_beside_it(
    compare: Compare, tmp_path: Path
) -> None:
    """Weights beside a graph prove modules that are touched; others may have been made otherwise."""
    only = tiny.peft_adapter("llama", tmp_path / "only", scale=0.1, target_modules=["k_proj"])

    def shift(model: onnx.ModelProto) -> None:
        name = weight_of(model, 1, "qkv_proj")
        tensor = next(one for one in model.graph.initializer if one.name == name)
        values = numpy_helper.to_array(tensor).copy()
        values[:, 96:] += np.float16(0.25)
        tensor.CopyFrom(numpy_helper.from_array(values, name))

    base = edited(tiny.onnx_model("llama", "fp16"), tmp_path / "base", shift)
    for name in ("config.json", "model.safetensors"):
        (base / name).write_bytes((tiny.hf_model("llama") / name).read_bytes())
    assert compare(only, base, "merged") == []
    name = weight_of(onnx.load(base / "model.onnx"), 1, "qkv_proj")
    before, after = arrays(base)[name], arrays(tmp_path / "out")[name]
    assert np.array_equal(before[:, 96:], after[:, 96:])
    assert not np.array_equal(before[:, 64:96], after[:, 64:96])


# --- the whole check -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "damage", "words"),
    [
        ("merged", flipped(embedding), "byte for byte"),
        ("branch", graph_damage(attribute), "another attribute"),
        ("merged", "half", "delta of model.layers.1.mlp.down_proj in the weights"),
    ],
)
def test_a_conversion_that_wrote_something_else_leaves_nothing(
    form: str,
    damage: Any,
    words: str,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    base, check = tiny.onnx_model("llama"), convert._check
    if damage == "half":
        damage = rows_damage(base, "down_proj", lambda delta: 0.5 * delta)

    def check_damaged(job: OnnxFold, folder: Path, work: Path) -> dict[str, Any]:
        damage(folder / "model.onnx")
        return check(job, folder, work)

    monkeypatch.setattr(convert, "_check", check_damaged)
    with pytest.raises(PostconditionError, match=words):
        convert_onnx(adapter, base, tmp_path / "out", form=form)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
