"""Hostile ONNX artifacts: the manifest agrees with every byte, and the graph is not what it says."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import tiny
from onnx import TensorProto, helper, numpy_helper
from onnx_tools import FORMS, agree, every_module, load, node, quick
from test_exactness import PROMPTS

from safegene import record
from safegene_runtime.artifact.manifest import read_manifest
from safegene_runtime.artifact.onnx_checks import check_onnx_artifact
from safegene_runtime.artifact.recomputed import RUNGS, check_verification
from safegene_runtime.errors import FormatError, ManifestError, SafeGeneError, UnsupportedError
from safegene_runtime.verifying import ladder
from safegene_runtime.verifying.report import Report

Edit = Callable[[onnx.ModelProto], object]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return every_module(tmp_path_factory.mktemp("hostile") / "adapter", scale=0.1)


@pytest.fixture(scope="module")
def artifacts(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("artifacts")
    for form in FORMS:
        quick(adapter, tiny.onnx_model("llama"), folder / form, form=form)
    return {form: folder / form for form in FORMS}


def forged(source: Path, out: Path, edit: Edit) -> Path:
    """A copy whose graph is edited, its tensors where they were."""
    shutil.copytree(source, out)
    model = onnx.load(out / "model.onnx", load_external_data=False)
    edit(model)
    (out / "model.onnx").write_bytes(model.SerializeToString())
    return agree(out)


def checked(folder: Path) -> str:
    return check_onnx_artifact(read_manifest(folder), folder / "model.onnx")


def tensor(model: onnx.ModelProto, word: str) -> onnx.TensorProto:
    return next(one for one in model.graph.initializer if word in one.name)


def weight_is_input(model: onnx.ModelProto) -> None:
    one = tensor(model, "o_proj")
    model.graph.input.append(helper.make_tensor_value_info(one.name, one.data_type, one.dims))


def factor_is_input(model: onnx.ModelProto) -> None:
    one = tensor(model, "safegene.lora_B")
    model.graph.input.append(helper.make_tensor_value_info(one.name, one.data_type, one.dims))


def slot_is_filled(model: onnx.ModelProto) -> None:
    """A default that is not empty: the plain base is no longer what a caller gets without it."""
    one = tensor(model, "safegene.lora_A")
    one.CopyFrom(numpy_helper.from_array(np.ones((one.dims[0], 4), np.float32), one.name))


def slots_are_constants(model: onnx.ModelProto) -> None:
    kept = [value for value in model.graph.input if ".safegene." not in value.name]
    del model.graph.input[:]
    model.graph.input.extend(kept)


def name_twice(model: onnx.ModelProto) -> None:
    """ONNX Runtime takes the last one."""
    one = tensor(model, "o_proj")
    zeros = np.zeros(tuple(one.dims), np.float32)
    model.graph.initializer.append(numpy_helper.from_array(zeros, one.name))


def above(model: onnx.ModelProto) -> None:
    place(tensor(model, "o_proj"), "../model.onnx.data")


def unlisted(model: onnx.ModelProto) -> None:
    place(tensor(model, "o_proj"), "other.data")


def place(one: onnx.TensorProto, location: str) -> None:
    for entry in one.external_data:
        if entry.key == "location":
            entry.value = location


def narrower(model: onnx.ModelProto) -> None:
    one = tensor(model, "o_proj")
    half = np.zeros(tuple(one.dims), np.float16)
    one.CopyFrom(numpy_helper.from_array(half, one.name))


def other_name(model: onnx.ModelProto) -> None:
    one = tensor(model, "layers.0.attn.o_proj")
    for user in model.graph.node:
        for number, name in enumerate(user.input):
            user.input[number] = "elsewhere" if name == one.name else name
    one.name = "elsewhere"


def data_in_an_attribute(model: onnx.ModelProto) -> None:
    """Our accounting sees it, a session built from verified bytes would not."""
    value = TensorProto(name="inner", data_type=1, dims=[4], data_location=TensorProto.EXTERNAL)
    value.external_data.add(key="location", value="model.onnx.data")
    value.external_data.add(key="length", value="16")
    model.graph.node.append(helper.make_node("Constant", [], ["inner"], value=value))


CASES: dict[str, tuple[str, Edit, type[SafeGeneError], str]] = {
    "a merged weight that a caller can override": (
        "merged", weight_is_input, ManifestError, "override",
    ),
    "a factor of the branch that a caller can override": (
        "branch", factor_is_input, ManifestError, "override",
    ),
    "a weight beside slots that a caller can override": (
        "adapter", weight_is_input, ManifestError, "override",
    ),
    "a slot whose default is not empty": ("adapter", slot_is_filled, ManifestError, "empty"),
    "slots that no caller can fill": (
        "adapter", slots_are_constants, ManifestError, "slot of the manifest.*got nothing",
    ),
    "two initializers of one name": ("merged", name_twice, FormatError, "each name once"),
    "data above the folder": ("merged", above, FormatError, "own folder"),
    "data in a file that is not listed": ("branch", unlisted, ManifestError, "other.data"),
    "a touched weight of another type": ("merged", narrower, ManifestError, "F32"),
    "a touched weight of another name": ("branch", other_name, ManifestError, "nothing"),
    "external data in an attribute": ("merged", data_in_an_attribute, FormatError, "itself"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_a_graph_that_is_not_what_the_manifest_says_is_refused(
    case: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    form, edit, error, words = CASES[case]
    assert checked(artifacts[form]) == "f32"
    out = tmp_path / "out"
    shutil.copy(artifacts[form] / "model.onnx.data", tmp_path)
    if edit is unlisted:
        (tmp_path / "out").mkdir()
        shutil.copytree(artifacts[form], out, dirs_exist_ok=True)
        shutil.copy(out / "model.onnx.data", tmp_path / "other.data")
        shutil.rmtree(out)
    forged(artifacts[form], out, edit)
    if edit is unlisted:
        shutil.move(tmp_path / "other.data", out)
    with pytest.raises(error, match=words):
        checked(out)


def all_behind(model: onnx.ModelProto, *ops: str) -> None:
    """Every weight of a MatMul is passed on by these nodes first."""
    weights = {one.name for one in model.graph.initializer if len(one.dims) == 2}
    made = []
    for user in model.graph.node:
        if user.op_type == "MatMul" and user.input[1] in weights:
            for number, op in enumerate(ops):
                output = f"{user.input[1]}.{user.name}.{number}"
                made.append(helper.make_node(op, [user.input[1]], [output]))
                user.input[1] = output
    assert made
    for number, one in enumerate(made):
        model.graph.node.insert(number, one)


PASSES_ON = [("Identity",), ("Transpose", "Transpose"), ("Transpose", "Identity", "Transpose")]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ops", PASSES_ON, ids="-".join)
def test_weights_that_are_only_passed_on_are_held_to_their_own_type(
    ops: tuple[str, ...], form: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    out = forged(artifacts[form], tmp_path / "out", lambda model: all_behind(model, *ops))
    assert checked(out) == "f32"


def values_of(folder: Path) -> dict[str, np.ndarray]:
    file = onnxruntime.AdapterFormat.read_adapter(str(folder / "adapter.onnx_adapter"))
    return {name: np.array(value.numpy()) for name, value in file.get_parameters().items()}


def refilled(source: Path, out: Path, values: dict[str, np.ndarray]) -> Path:
    """A copy with an adapter file of other values, and a manifest that agrees with its bytes."""
    shutil.copytree(source, out)
    path = out / "adapter.onnx_adapter"
    made = onnxruntime.AdapterFormat()
    made.set_adapter_version(1)
    made.set_model_version(1)
    made.set_parameters(
        {name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()}
    )
    path.unlink()
    made.export_adapter(str(path))
    return agree(out)


def test_slots_are_listed_by_name_shape_and_type(artifacts: dict[str, Path]) -> None:
    listed = read_manifest(artifacts["adapter"]).slots
    values = values_of(artifacts["adapter"])
    assert [slot.name for slot in listed] == sorted(values)
    assert all(slot.shape == values[slot.name].shape and slot.type == "F32" for slot in listed)
    assert all(not read_manifest(artifacts[form]).slots for form in ("merged", "branch"))


@pytest.mark.parametrize("change", ["missing", "another", "rank", "type"])
def test_an_adapter_file_with_other_slots_than_the_manifest_is_refused(
    change: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    values = values_of(artifacts["adapter"])
    name = sorted(values)[3]
    value = values.pop(name)
    if change == "another":
        values["elsewhere"] = value
    elif change == "rank":
        values[name] = np.ascontiguousarray(
            np.repeat(value, 2, axis=value.shape.index(min(value.shape)))
        )
    elif change == "type":
        values[name] = value.astype(np.float16)
    with pytest.raises(ManifestError, match="slot of the manifest") as caught:
        checked(refilled(artifacts["adapter"], tmp_path / "out", values))
    assert len(caught.value.problems) == (2 if change == "another" else 1)


@pytest.mark.parametrize("link", ["symbolic", "hard"])
def test_a_data_file_that_is_a_link_is_refused(
    link: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(artifacts["merged"], out)
    shutil.move(out / "model.onnx.data", tmp_path / "data")
    if link == "hard":
        os.link(tmp_path / "data", out / "model.onnx.data")
    else:
        (out / "model.onnx.data").symlink_to(tmp_path / "data")
    with pytest.raises(FormatError, match="regular file"):
        checked(out)


# --- through the ladder ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("record") / "reference"
    record(adapter, tiny.hf_model("llama"), out, prompts=PROMPTS, max_new_tokens=6)
    return out


@pytest.fixture
def climb(reference: Path) -> Callable[[Path], Report]:
    """The ladder; a random model refuses nothing, so that its gate is vacuous at best."""
    return lambda artifact: ladder.verify(artifact, reference, threads=1)


@pytest.mark.parametrize("form", FORMS)
def test_what_was_not_touched_climbs_past_the_logits(
    form: str,
    artifacts: dict[str, Path],
    climb: Callable[[Path], Report],
    tmp_path: Path,
) -> None:
    shutil.copytree(artifacts[form], tmp_path / "out")
    report = climb(tmp_path / "out")
    status = {rung.name: rung.status for rung in report.rungs}
    assert [status[name] for name in RUNGS[:-1]] == ["ok"] * 5
    assert report.verdict == "VACUOUS"
    manifest = read_manifest(tmp_path / "out")
    check_verification(manifest.verification, manifest.artifact["precision"], "what was written")
    assert abs(report.figures["mean_kl"]) <= 1e-6
    assert report.flips == ()


@pytest.mark.parametrize("form", FORMS)
def test_one_changed_byte_breaks_integrity(
    form: str,
    artifacts: dict[str, Path],
    climb: Callable[[Path], Report],
    tmp_path: Path,
) -> None:
    shutil.copytree(artifacts[form], tmp_path / "out")
    path = tmp_path / "out" / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)
    assert climb(tmp_path / "out").broken_at == "integrity"


def beside_doubles(model: onnx.ModelProto) -> None:
    """One more product, with a weight of a type that has no bounds."""
    values = np.ones((64, 64))
    model.graph.initializer.append(numpy_helper.from_array(values, "wide"))
    value = node(model, "layers.0/", "o_proj/MatMul").input[0]
    model.graph.node.append(helper.make_node("MatMul", [value, "wide"], ["z"], name="odd"))


@pytest.mark.parametrize("form", FORMS)
def test_an_unknown_precision_is_no_verdict(
    form: str, artifacts: dict[str, Path], climb: Callable[[Path], Report], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=r"odd.*DOUBLE"):
        climb(forged(artifacts[form], tmp_path / "out", beside_doubles))


def cut_off(model: onnx.ModelProto) -> None:
    """The branch is still there, and nothing adds it."""
    for one in model.graph.node:
        if one.name.endswith("/safegene/Add"):
            one.op_type = "Identity"
            del one.input[1:]


def doubled(model: onnx.ModelProto) -> None:
    """The branch is added twice in the first layer."""
    one = node(model, "layers.0/", "qkv_proj", "safegene/Add")
    base, branch = one.input
    model.graph.node.insert(
        list(model.graph.node).index(one),
        helper.make_node("Add", [base, branch], [f"{base}.twice"], name="twice"),
    )
    one.input[0] = f"{base}.twice"


@pytest.mark.parametrize("edit", [cut_off, doubled])
def test_a_branch_that_does_something_else_is_broken_where_it_shows(
    edit: Edit,
    artifacts: dict[str, Path],
    climb: Callable[[Path], Report],
    tmp_path: Path,
) -> None:
    report = climb(forged(artifacts["branch"], tmp_path / "out", edit))
    assert report.verdict == "FAIL"
    assert report.broken_at in ("static", "active", "logits")
    assert edit is not cut_off or report.broken_at in ("static", "active")


def test_an_adapter_file_of_zeros_is_broken_at_static(
    artifacts: dict[str, Path], climb: Callable[[Path], Report], tmp_path: Path
) -> None:
    zeros = {name: value * 0 for name, value in values_of(artifacts["adapter"]).items()}
    out = refilled(artifacts["adapter"], tmp_path / "out", zeros)
    assert len(load(out).graph.input) > 20
    report = climb(out)
    assert report.broken_at == "static"
