"""Laws of an ONNX conversion: what is touched, what is not, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import tiny
from onnx_tools import (
    FORMS,
    arrays,
    convert_onnx,
    edited,
    every_module,
    feeds,
    load,
    node,
    quick,
    session,
    with_outputs,
)
from test_to_gguf import peft_delta

from safegene_converter.bases import onnx_source
from safegene_converter.bases.onnx_build import build_onnx
from safegene_runtime.artifact.manifest import Manifest
from safegene_runtime.errors import (
    AdapterError,
    BaseModelError,
    UnsupportedError,
)
from safegene_runtime.formats.onnx.file import read_onnx

IDS = [[5, 77, 1042, 9, 300], [8, 8, 411, 23, 7]]
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
ROWS = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "gate_proj": 128, "up_proj": 128}
PACKINGS = {
    "packed qkv": [],
    "separate": ["fuse_qkv=false"],
    "all packed": ["fuse_mlp_gate_up=true"],
}


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return every_module(tmp_path_factory.mktemp("onnx") / "adapter")


@pytest.fixture(scope="module")
def base() -> Path:
    return tiny.onnx_model("llama")


@pytest.fixture(scope="module", params=FORMS)
def made(
    request: pytest.FixtureRequest, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Manifest]:
    """Each form once, with its self-check."""
    out = tmp_path_factory.mktemp("made") / request.param
    return out, convert_onnx(adapter, tiny.onnx_model("llama"), out, form=request.param)


def expected_delta(delta: dict[str, np.ndarray], layer: int, projection: str) -> np.ndarray:
    """(out, in) of a packed or single projection, from PEFT's own merge."""
    parts = PARTS.get(projection, (projection,))
    return np.concatenate(
        [
            value
            for part in parts
            for name, value in delta.items()
            if f"layers.{layer}." in name and name.endswith(part)
        ]
    )


def weight_of(model: onnx.ModelProto, layer: int, projection: str) -> str:
    return str(node(model, f"layers.{layer}/", f"{projection}/MatMul").input[1])


# --- merged ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"])
def test_a_delta_stays_in_its_rows_of_a_packed_weight(module: str, tmp_path: Path) -> None:
    """Weights differ from slice to slice, so a row too many, or the wrong block, shows."""
    source = tiny.onnx_model("llama", "fp32", "fuse_mlp_gate_up=true")
    only = tiny.peft_adapter("llama", tmp_path / "adapter", scale=0.05, target_modules=[module])
    before, model = arrays(source), load(source)
    projection = next(name for name, parts in PARTS.items() if module in parts)
    start = 0
    for part in PARTS[projection]:
        if part == module:
            break
        start += ROWS[part]
    rows = np.arange(start, start + ROWS[module])
    weight = weight_of(model, 0, projection)
    quick(only, source, tmp_path / "merged", form="merged")
    moved = np.abs(arrays(tmp_path / "merged")[weight] - before[weight]).max(axis=0)
    assert np.array_equal(np.flatnonzero(moved), rows)
    quick(only, source, tmp_path / "branch", form="branch")
    branch = load(tmp_path / "branch")
    b = arrays(tmp_path / "branch")[
        node(branch, "layers.0/", projection, "safegene/lora_B").input[1]
    ]
    assert np.array_equal(np.flatnonzero(np.abs(b).max(axis=0)), rows)


def test_merged_is_the_base_but_for_the_touched_weights(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    manifest = quick(adapter, base, tmp_path / "out", form="merged")
    touched = {entry.tensor.split("[")[0] for entry in manifest.modules}
    old, new = load(base), load(tmp_path / "out")
    extra = {prop.key: prop.value for prop in new.metadata_props}
    assert {key for key in extra if not key.startswith("safegene.")} == {
        prop.key for prop in old.metadata_props
    }
    assert extra["safegene.form"] == "merged"
    assert {"safegene.version", "safegene.expression", "safegene.adapter.sha256"} <= extra.keys()
    for model in (old, new):
        del model.metadata_props[:]
        for tensor in model.graph.initializer:
            if tensor.name in touched:
                tensor.raw_data = b""
    assert old.SerializeToString(deterministic=True) == new.SerializeToString(deterministic=True)


def test_a_data_file_changes_in_the_touched_ranges_only(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    manifest = quick(adapter, base, tmp_path / "out", form="merged")
    touched = {entry.tensor.split("[")[0] for entry in manifest.modules}
    old = np.fromfile(base / "model.onnx.data", np.uint8)
    new = np.fromfile(tmp_path / "out" / "model.onnx.data", np.uint8)
    assert old.size == new.size
    inside = np.zeros(old.size, bool)
    for name in touched:
        info = read_onnx(base / "model.onnx").initializers[name]
        inside[info.offset : info.offset + info.nbytes] = True
    assert np.array_equal(old[~inside], new[~inside])
    assert (old != new).any()


def test_tensors_that_share_bytes_are_not_changed_together(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    """Exporters store equal constants once; both names then point at the same range."""

    def share(model: onnx.ModelProto) -> None:
        first, second = (weight_of(model, layer, "gate_proj") for layer in (0, 1))
        tensors = {tensor.name: tensor for tensor in model.graph.initializer}
        tensors[second].raw_data = tensors[first].raw_data

    source = edited(base, tmp_path / "base", share)
    model = onnx.load(source / "model.onnx", load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    first, second = (weight_of(model, layer, "gate_proj") for layer in (0, 1))
    del tensors[second].external_data[:]
    tensors[second].external_data.extend(tensors[first].external_data)
    (source / "model.onnx").write_bytes(model.SerializeToString())
    only = tiny.peft_adapter(
        "llama", tmp_path / "adapter", scale=0.05, target_modules=["gate_proj"],
        layers_to_transform=[0],
    )  # fmt: skip
    quick(only, source, tmp_path / "out", form="merged")
    before, after = arrays(source), arrays(tmp_path / "out")
    assert np.array_equal(before[first], before[second])
    assert [name for name in before if not np.array_equal(before[name], after[name])] == [first]


# --- branch ----------------------------------------------------------------------------------------


def test_no_caller_can_override_the_branch(adapter: Path, base: Path, tmp_path: Path) -> None:
    quick(adapter, base, tmp_path / "out", form="branch")
    model = load(tmp_path / "out")
    slots = [t.name for t in model.graph.initializer if ".safegene." in t.name]
    assert len(slots) == 20
    assert not {value.name for value in model.graph.input} & set(slots)
    assert read_onnx(tmp_path / "out" / "model.onnx").overridable == ()
    running = session(tmp_path / "out" / "model.onnx")
    assert not running.get_overridable_initializers()
    zero = {slots[0]: np.zeros(arrays(tmp_path / "out")[slots[0]].shape, np.float32)}
    with pytest.raises(Exception, match=r"(?i)invalid|feed"):
        running.run(["logits"], feeds(running, IDS) | zero)


@pytest.mark.parametrize("precision", ["fp32", "int4", "int8"])
def test_the_branch_adds_pefts_delta_to_what_the_base_computes(
    precision: str, adapter: Path, tmp_path: Path
) -> None:
    """Values inside the graph: y of the branch minus y of the base is x dW, whatever W is."""
    source = tiny.onnx_model("llama", precision)
    manifest = quick(adapter, source, tmp_path / "out", form="branch")
    model = load(tmp_path / "out")
    floats = {onnx.TensorProto.FLOAT}
    kinds = {t.data_type for t in model.graph.initializer if ".safegene." in t.name}
    assert kinds == floats, "the factors stay in float around any base"
    packed = [one for one in load(source).graph.node if one.op_type == "MatMulNBits"]
    assert len([one for one in model.graph.node if one.op_type == "MatMulNBits"]) == len(packed)
    assert bool(packed) == (precision != "fp32")
    assert {entry.type_after for entry in manifest.modules} == {
        {"fp32": "F32", "int4": "INT4", "int8": "INT8"}[precision]
    }
    linear = node(model, "layers.0/", "qkv_proj/MatMul")
    add = node(model, "layers.0/", "qkv_proj", "safegene/Add")
    branched = with_outputs(model, linear.input[0], linear.output[0], add.output[0])
    plain = with_outputs(load(source), add.output[0])
    running = session(branched)
    x, y_base, y = running.run(
        [linear.input[0], linear.output[0], add.output[0]], feeds(running, IDS)
    )
    running = session(plain)
    (y_plain,) = running.run([add.output[0]], feeds(running, IDS))
    assert np.array_equal(y_base, y_plain)
    delta = expected_delta(peft_delta(adapter, "llama"), 0, "qkv_proj")
    assert np.abs(y - y_base - x @ delta.T).max() <= 1e-5
    assert np.abs(x @ delta.T).max() > 0.01


# --- adapter ---------------------------------------------------------------------------------------


def as_gemm(model: onnx.ModelProto, transposed: bool, alpha: float) -> None:
    """down_proj of layer 0 as exporters write a linear over rows: Gemm between two Reshapes."""
    one = node(model, "layers.0/", "down_proj/MatMul")
    x, weight, y = one.input[0], one.input[1], one.output[0]
    if transposed:
        tensor = next(t for t in model.graph.initializer if t.name == weight)
        turned = np.ascontiguousarray(onnx.numpy_helper.to_array(tensor).T)
        tensor.CopyFrom(onnx.numpy_helper.from_array(turned, weight))
    for name, values in (("rows", [-1, 128]), ("start", [0]), ("stop", [2]), ("out", [64])):
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(np.array(values, np.int64), f"gemm.{name}")
        )
    make, at = onnx.helper.make_node, list(model.graph.node).index(one)
    nodes = [
        make("Reshape", [x, "gemm.rows"], ["gemm.x"]),
        make("Gemm", ["gemm.x", weight], ["gemm.y"], name=one.name.replace("MatMul", "Gemm"),
             transB=int(transposed), alpha=alpha),
        make("Shape", [x], ["gemm.shape"]),
        make("Slice", ["gemm.shape", "gemm.start", "gemm.stop"], ["gemm.first"]),
        make("Concat", ["gemm.first", "gemm.out"], ["gemm.whole"], axis=0),
        make("Reshape", ["gemm.y", "gemm.whole"], [y]),
    ]  # fmt: skip
    kept = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend([*kept[:at], *nodes, *kept[at + 1 :]])


@pytest.mark.parametrize("transposed", [False, True])
def test_a_gemm_carries_the_delta_as_a_matmul_does(
    transposed: bool, adapter: Path, base: Path, tmp_path: Path
) -> None:
    source = edited(base, tmp_path / "base", lambda model: as_gemm(model, transposed, 1.0))
    assert "Gemm" in {one.op_type for one in load(source).graph.node}
    found = []
    for name, given, form in (
        ("expected", base, "merged"), ("a", source, "merged"), ("b", source, "branch"),
    ):  # fmt: skip
        manifest = quick(adapter, given, tmp_path / name, form=form)  # type: ignore[arg-type]
        assert len(manifest.modules) == 14
        running = session(tmp_path / name / "model.onnx")
        found.append(running.run(["logits"], feeds(running, IDS))[0])
    running = session(source / "model.onnx")
    (plain,) = running.run(["logits"], feeds(running, IDS))
    assert max(np.abs(found[0] - one).max() for one in found[1:]) <= 1e-4
    assert np.abs(found[0] - plain).max() > 0.01


def test_a_gemm_that_scales_is_refused(adapter: Path, base: Path, tmp_path: Path) -> None:
    source = edited(base, tmp_path / "base", lambda model: as_gemm(model, False, 0.5))
    with pytest.raises(BaseModelError, match=r"Gemm.*alpha"):
        quick(adapter, source, tmp_path / "out")


# --- what every form promises ----------------------------------------------------------------------


def renamed(model: onnx.ModelProto) -> None:
    """Layer 1 loses the names of its MLP."""
    for one in model.graph.node:
        for field in (one.input, one.output):
            for number, name in enumerate(field):
                field[number] = name.replace("layers.1/mlp/up_proj", "one/a").replace(
                    "layers.1.mlp.up_proj", "one.a"
                )
        one.name = one.name.replace("layers.1/mlp/up_proj", "one/a")
    for tensor in model.graph.initializer:
        tensor.name = tensor.name.replace("layers.1.mlp.up_proj", "one.a")


def doubled(model: onnx.ModelProto) -> None:
    """A second node that calls itself the same projection."""
    one = node(model, "layers.1/", "up_proj/MatMul")
    weight = next(t for t in model.graph.initializer if t.name == one.input[1])
    copy = model.graph.initializer.add()
    copy.CopyFrom(weight)
    copy.name = f"{weight.name}.copy"
    model.graph.node.add(
        op_type="MatMul", name=f"{one.name}.copy", input=[one.input[0], copy.name],
        output=["nowhere"],
    )  # fmt: skip


def shared(model: onnx.ModelProto) -> None:
    """A weight that another node reads, too."""
    one = node(model, "layers.1/", "up_proj/MatMul")
    model.graph.node.add(op_type="Abs", name="reader", input=[one.input[1]], output=["nowhere"])


def turned(model: onnx.ModelProto) -> onnx.NodeProto:
    """The same, read through a Transpose, as torch.onnx writes a linear."""
    one = node(model, "layers.1/", "up_proj/MatMul")
    weight = next(t for t in model.graph.initializer if t.name == one.input[1])
    rows = np.ascontiguousarray(onnx.numpy_helper.to_array(weight).T)
    weight.CopyFrom(onnx.numpy_helper.from_array(rows, weight.name))
    one.input[1] = "turned"
    at = list(model.graph.node).index(one)
    model.graph.node.insert(
        at, onnx.helper.make_node("Transpose", [weight.name], ["turned"], name="turn", perm=[1, 0])
    )
    return model.graph.node[at + 1]


def shared_turned(model: onnx.ModelProto) -> None:
    """The result of the Transpose has two readers, the weight itself one."""
    turned(model)
    model.graph.node.add(op_type="Abs", name="reader", input=["turned"], output=["nowhere"])


def shared_inside(model: onnx.ModelProto) -> None:
    """A branch of an If reads the weight from outside."""
    one, make = node(model, "layers.1/", "up_proj/MatMul"), onnx.helper
    shape = make.make_tensor_value_info("inner", onnx.TensorProto.FLOAT, [64, 128])
    branches = [
        make.make_graph(
            [make.make_node("Identity", [one.input[1]], ["inner"], name="reader")],
            name,
            [],
            [shape],
        )
        for name in ("then", "else")
    ]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "chosen"))
    model.graph.node.append(
        make.make_node(
            "If", ["chosen"], ["nowhere"], then_branch=branches[0], else_branch=branches[1]
        )
    )


def shared_outside(model: onnx.ModelProto) -> None:
    """The weight is an output of the graph: its reader is the caller."""
    one = node(model, "layers.1/", "up_proj/MatMul")
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(one.input[1], onnx.TensorProto.FLOAT, [64, 128])
    )


def test_a_weight_behind_a_transpose_of_its_own_is_no_shared_one(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    source = edited(base, tmp_path / "base", turned)
    quick(adapter, source, tmp_path / "out", form="merged")
    before, after = arrays(source), arrays(tmp_path / "out")
    (name,) = {one.input[0] for one in load(source).graph.node if one.name == "turn"}
    wanted = expected_delta(peft_delta(adapter, "llama"), 1, "up_proj")
    assert np.abs(after[name] - before[name] - wanted).max() <= 1e-6


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (renamed, ["model.layers.1.mlp.up_proj"]),
        (doubled, ["model.layers.1.mlp.up_proj", "up_proj or", "MatMul.copy"]),
        (shared, ["reader", "only"]),
        (shared_turned, ["reader", "only"]),
        (shared_inside, ["reader, reader", "only"]),
        (shared_outside, ["output ", "only"]),
    ],
)
def test_a_module_found_twice_or_not_at_all_is_one_error(
    change: Callable[[onnx.ModelProto], None],
    words: list[str],
    adapter: Path,
    base: Path,
    tmp_path: Path,
) -> None:
    source = edited(base, tmp_path / "base", change)
    with pytest.raises((AdapterError, BaseModelError)) as caught:
        quick(adapter, source, tmp_path / "out")
    assert len(caught.value.problems) == 1
    assert all(word in str(caught.value) for word in words), caught.value
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(
    ("projection", "first", "second"),
    [("qkv_proj", slice(64, 96), slice(96, 128)), ("gate_up_proj", slice(0, 128), slice(128, 256))],
)
def test_an_export_whose_parts_are_swapped_is_refused_on_the_weights(
    projection: str,
    first: slice,
    second: slice,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Same shapes, right names, k and v (gate and up) the other way round: only weights can tell."""

    def swap(model: onnx.ModelProto) -> None:
        name = weight_of(model, 1, projection)
        tensor = next(t for t in model.graph.initializer if t.name == name)
        weight = onnx.numpy_helper.to_array(tensor).copy()
        weight[:, first], weight[:, second] = weight[:, second].copy(), weight[:, first].copy()
        tensor.raw_data = weight.tobytes()

    packed = tiny.onnx_model("llama", "fp32", "fuse_mlp_gate_up=true")
    monkeypatch.setattr(
        onnx_source, "build_onnx", lambda _, target, *args, **more: edited(packed, target, swap)
    )
    with pytest.raises(BaseModelError) as caught:
        quick(adapter, tiny.hf_model("llama"), tmp_path / "out")
    assert len(caught.value.problems) == 2
    assert "model.layers.1" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_base_that_is_an_artifact_already_is_refused(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    for form in FORMS:
        quick(adapter, base, tmp_path / form, form=form)
        with pytest.raises(BaseModelError, match="plain base"):
            quick(adapter, tmp_path / form, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_a_caller_could_override_are_refused(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    def expose(model: onnx.ModelProto) -> None:
        name = weight_of(model, 0, "up_proj")
        model.graph.input.append(
            onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [64, 128])
        )

    source = edited(base, tmp_path / "base", expose)
    with pytest.raises(BaseModelError, match="override"):
        quick(adapter, source, tmp_path / "out")


def test_a_form_of_another_target_is_refused(adapter: Path, base: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="merged or branch or adapter"):
        quick(adapter, base, tmp_path / "out", form="sidecar")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_an_export_does_not_take_the_commit_of_the_users_repository_for_the_builders(
    base: Path,
) -> None:
    import onnx
    import onnxruntime_genai

    made_by = onnx.load(base / "model.onnx", load_external_data=False).producer_version
    assert made_by.startswith(onnxruntime_genai.__version__)
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        cwd=tiny.REPOSITORY,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert head[:7] not in made_by


def test_a_folder_that_says_null_of_its_quantisation_is_built_as_one_that_says_nothing(
    base: Path, tmp_path: Path
) -> None:
    """As transformers saves what it decoded; the builder alone stumbles over it."""
    said = tmp_path / "said"
    shutil.copytree(tiny.hf_model("llama"), said)
    config = json.loads((said / "config.json").read_text())
    (said / "config.json").write_text(json.dumps({**config, "quantization_config": None}))
    build_onnx(said, tmp_path / "out", "fp32")
    for name in ("model.onnx", "model.onnx.data", "genai_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert json.loads((said / "config.json").read_text())["quantization_config"] is None
