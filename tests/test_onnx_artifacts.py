"""What every form of an ONNX artifact promises."""

# ruff: noqa: F811 - fixtures are imported, and are parameters of the tests, too
from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
from onnx_tools import (
    FORMS,
    arrays,
    convert_onnx,
    digests,
    load,
    quick,
)
from rich.console import Console
from test_to_gguf import peft_delta
from test_to_onnx import PACKINGS, adapter, base, expected_delta, made  # noqa: F401  # noqa: F401

from safegene_converter.cli.tables import show
from safegene_converter.describing import describe_manifest
from safegene_runtime.artifact.manifest import Manifest, check_files, read_manifest
from safegene_runtime.child import python_environment
from safegene_runtime.errors import (
    AdapterError,
    OutputError,
    PostconditionError,
)


def test_the_manifest_is_true(made: tuple[Path, Manifest]) -> None:
    out, manifest = made
    assert read_manifest(out) == manifest == Manifest.from_json(manifest.to_json(), "again")
    check_files(manifest, out)
    listed = {entry.path for entry in manifest.files} | {"manifest.json"}
    assert set(digests(out)) == listed
    assert {"genai_config.json", "tokenizer.json", "chat_template.jinja"} <= listed
    assert manifest.settings["self_check"]["beta"] == pytest.approx(1, abs=1e-3)
    caution = manifest.settings.get("caution", "")
    is_switchable = manifest.artifact["form"] == "adapter"
    assert [words in caution for words in ("leave", "I/O binding", "async")] == [is_switchable] * 3
    console = Console(record=True, width=400)
    show(describe_manifest(manifest, out), console)
    assert ("I/O binding" in console.export_text()) == is_switchable
    text = (out / "manifest.json").read_text()
    assert str(out.parent) not in text
    assert str(tiny.REPOSITORY) not in text


def test_a_folder_that_genai_cannot_load_says_so(adapter: Path, base: Path, tmp_path: Path) -> None:
    source = tiny.exported_model("llama", "torchscript")
    assert not (source / "genai_config.json").exists()
    for form in ("branch", "adapter"):
        manifest = quick(adapter, source, tmp_path / form, form=form)  # type: ignore[arg-type]
        assert "GenAI cannot load" in manifest.settings["caution"]
        assert ("leave" in manifest.settings["caution"]) == (form == "adapter")
    assert "caution" not in quick(adapter, base, tmp_path / "plain").settings


def test_opset_version_and_nodes_are_the_bases(made: tuple[Path, Manifest], base: Path) -> None:
    old, new = load(base), load(made[0])
    assert old.ir_version == new.ir_version
    assert list(old.opset_import) == list(new.opset_import)
    assert old.producer_name == new.producer_name
    names = [one.name for one in new.graph.node if "/safegene/" not in one.name]
    assert names == [one.name for one in old.graph.node]
    before, after = arrays(base), arrays(made[0])
    if made[1].artifact["form"] != "merged":
        assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("form", FORMS)
def test_equal_inputs_give_equal_bytes(
    form: str, adapter: Path, base: Path, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        quick(adapter, base, tmp_path / name, form=form)  # type: ignore[arg-type]
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_an_existing_output_is_refused_before_any_work(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep me")
    with pytest.raises(OutputError):
        quick(adapter, tmp_path / "no such base", tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "keep me"


def test_force_replaces_an_existing_output(adapter: Path, base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    quick(adapter, base, tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("delay", [0.5, 1.2, 2.0])
def test_killed_at_any_moment_nothing_partial_has_the_final_name(
    delay: float, adapter: Path, base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "safegene_converter", "convert", str(adapter), "--base", str(base),
        "--to", "onnx", "--as", "branch", "-o", str(out),
    ]  # fmt: skip
    child = subprocess.Popen(
        command, env=python_environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    time.sleep(delay)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if out.exists():
        check_files(read_manifest(out), out)


def test_an_adapter_for_another_model_is_refused_with_all_its_modules(
    base: Path, tmp_path: Path
) -> None:
    wide = tiny.peft_adapter("llama", tmp_path / "adapter", hidden=256)
    with pytest.raises(AdapterError) as caught:
        quick(wide, base, tmp_path / "out")
    assert len(caught.value.problems) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_without_effect_is_an_error(base: Path, tmp_path: Path) -> None:
    nothing = tiny.peft_adapter("llama", tmp_path / "adapter", scale=1e-15)
    with pytest.raises(PostconditionError):
        convert_onnx(nothing, base, tmp_path / "out", form="branch")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


# --- finding modules -------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", PACKINGS)
def test_every_slice_gets_pefts_own_delta(packing: str, adapter: Path, tmp_path: Path) -> None:
    source = tiny.onnx_model("llama", "fp32", *PACKINGS[packing])
    quick(adapter, source, tmp_path / "out", form="merged")
    model, delta = load(source), peft_delta(adapter, "llama")
    assert len(delta) == 14
    before, after = arrays(source), arrays(tmp_path / "out")
    touched = {name for name in before if not np.array_equal(before[name], after[name])}
    found = set()
    for layer in range(2):
        for linear in model.graph.node:
            match = re.search(rf"layers\.{layer}/.*?(\w+_proj)/MatMul$", linear.name)
            if linear.op_type != "MatMul" or not match:
                continue
            wanted = expected_delta(delta, layer, match[1])
            got = (after[linear.input[1]] - before[linear.input[1]]).T
            assert np.abs(got - wanted).max() <= 1e-6
            found.add(linear.input[1])
    assert touched == found
    packed = {"packed qkv": 5, "separate": 7, "all packed": 4}[packing]
    assert len(found) == 2 * packed
