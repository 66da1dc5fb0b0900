"""What a conversion to GGUF refuses, and what it leaves behind."""

# ruff: noqa: F811 - fixtures are imported, and are parameters of the tests, too
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from test_to_gguf import TARGETS, adapter, q4_1_base, quick, wide_adapter  # noqa: F401

from safegene import convert
from safegene_converter.encoding import ggml_quantizer
from safegene_converter.fold.survival import Bounds
from safegene_converter.gguf import convert as to_gguf
from safegene_converter.gguf.writer import OutTensor, write_gguf
from safegene_runtime.artifact.manifest import check_files, read_manifest
from safegene_runtime.child import python_environment
from safegene_runtime.errors import (
    AdapterError,
    BaseModelError,
    FormatError,
    OutputError,
    PostconditionError,
    SafeGeneError,
    SurvivalError,
    UnsupportedError,
)
from safegene_runtime.formats.gguf.header import read_gguf
from safegene_runtime.formats.gguf.model import open_model
from safegene_runtime.formats.gguf.tensors import read_tensor_bytes
from safegene_runtime.formats.gguf.types import GGMLType


def test_an_existing_output_is_refused_before_any_work(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep me")
    with pytest.raises(OutputError):
        quick(adapter, tmp_path / "no-such-base.gguf", tmp_path / "out", form="merged")
    assert (tmp_path / "out" / "mine").read_text() == "keep me"


def test_force_replaces_an_existing_output(adapter: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    quick(adapter, tiny.gguf_model("llama"), tmp_path / "out", form="sidecar", force=True)
    assert not (tmp_path / "out" / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_adapter_for_another_model_is_refused_with_all_its_modules(
    adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError) as caught:
        quick(adapter, tiny.gguf_model("llama", 256), tmp_path / "out", form="merged")
    assert len(caught.value.problems) == TARGETS["llama"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("form", "type_name", "base", "error"),
    [
        ("sidecar", "q4_k_m", "gguf", UnsupportedError),
        ("sidecar", "auto", "hf", UnsupportedError),
        ("merged", "q99", "gguf", SafeGeneError),
        ("something", "auto", "gguf", UnsupportedError),
    ],
)
def test_requests_that_mean_nothing_are_refused_before_any_work(
    form: str, type_name: str, base: str, error: type[Exception], adapter: Path, tmp_path: Path
) -> None:
    path = tiny.gguf_model("llama") if base == "gguf" else tiny.hf_model("llama")
    with pytest.raises(error):
        quick(adapter, path, tmp_path / "out", form=form, type=type_name)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("base", "options", "flag"),
    [
        ("gguf", {"form": "sidecar", "promote": True}, "--promote"),
        ("gguf", {"form": "sidecar", "promote": False}, "--promote"),
        ("gguf", {"form": "sidecar", "imatrix": Path("x")}, "--imatrix"),
        ("gguf", {"form": "merged", "llama_cpp": Path("x")}, "--llama-cpp"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(
    base: str, options: dict[str, Any], flag: str, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=f"leave {flag} out"):
        quick(adapter, tiny.gguf_model("llama"), tmp_path / "out", **options)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_imatrix_is_found_before_the_base_is_converted(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(to_gguf, "_from_hugging_face", pytest.fail)
    with pytest.raises(FormatError, match="nothing"):
        quick(
            adapter, tiny.hf_model("llama"), tmp_path / "out", form="merged", type="q8_0",
            imatrix=tmp_path / "nothing",
        )  # fmt: skip


def changed_base(out: Path, kind: GGMLType, value: float) -> Path:
    """The tiny llama as `kind`, with one number of a touched tensor set."""
    model = open_model(tiny.gguf_model("llama"))
    tensors = []
    for name, info in model.tensors.items():
        rows = np.frombuffer(bytes(read_tensor_bytes(info)), np.float32).reshape(info.shape).copy()
        if len(info.shape) < 2:
            tensors.append(OutTensor(name, info.shape, info.type, info))
            continue
        if name == "blk.0.attn_q.weight":
            rows[0, 0] = value
        stored = rows.astype(np.float32)
        if kind is GGMLType.BF16:  # cut, which keeps NaN
            stored = (rows.view(np.uint32) >> 16).astype(np.uint16)
        tensors.append(OutTensor(name, info.shape, kind, stored.view(np.uint8)))
    write_gguf(out, dict(model.metadata), tensors)
    return out


def test_a_type_that_cannot_hold_a_weight_is_passed_over(tmp_path: Path) -> None:
    """A small delta beside 1e5: BF16 erases it, F16 overflows, F32 is what is left."""
    source = tiny.peft_adapter("llama", tmp_path / "adapter", scale=0.05)
    base = changed_base(tmp_path / "base.gguf", GGMLType.BF16, 1e5)
    strict = Bounds(error_max=0.02)
    manifest = quick(source, base, tmp_path / "out", form="merged", bounds=strict)
    types = {entry.tensor: entry.type_after for entry in manifest.modules}
    assert types.pop("blk.0.attn_q.weight") == "F32"
    assert "F32" not in types.values()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_number_that_is_none_is_named_with_its_tensor(
    value: float, adapter: Path, tmp_path: Path
) -> None:
    base = changed_base(tmp_path / "base.gguf", GGMLType.F32, value)
    with pytest.raises(
        BaseModelError, match=r"base\.gguf: blk\.0\.attn_q\.weight: expected finite"
    ):
        quick(adapter, base, tmp_path / "out", form="merged")


def test_the_file_type_is_that_of_most_weights_also_after_promotion(tmp_path: Path) -> None:
    """All but all of the weights are touched, and a tiny delta promotes them."""
    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    source = tiny.peft_adapter(
        "llama", tmp_path / "adapter", hidden=256, scale=0.03, target_modules=everything
    )
    base, out = tiny.gguf_model("llama", 256), tmp_path / "out"
    strict = Bounds(error_max=0.02, base_error_ratio_max=0.0)
    manifest = quick(source, base, out, form="merged", type="q4_k_m", bounds=strict)
    kinds = [info.type.name for name, info in read_gguf(out / "model.gguf").tensors.items()
             if name.startswith("blk.") and len(info.shape) == 2]  # fmt: skip
    assert set(kinds) == {"F16"}
    assert read_gguf(out / "model.gguf").get("general.file_type") == 1
    promoted = manifest.settings["promoted"]
    assert promoted["tensors"] == len(kinds)
    quick(source, base, tmp_path / "as-is", form="merged", type="q4_k_m", promote=False,
          bounds=Bounds(0, 99, 99, 99))  # fmt: skip
    sizes = [
        sum(info.nbytes for info in read_gguf(folder / "model.gguf").tensors.values())
        for folder in (out, tmp_path / "as-is")
    ]
    assert promoted["bytes_added"] == sizes[0] - sizes[1]


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"type": "keep"}, "--type auto"),
        ({"type": "q4_0", "promote": False}, "--promote"),
    ],
)
def test_what_is_said_to_help_is_what_helps(
    options: dict[str, Any], hint: str, wide_adapter: Path, q4_1_base: Path, tmp_path: Path
) -> None:
    base = q4_1_base if options["type"] == "keep" else tiny.gguf_model("llama", 256)
    with pytest.raises(SurvivalError, match=hint):
        quick(
            wide_adapter, base, tmp_path / "out", form="merged", **options,
            bounds=Bounds(error_max=0.02, base_error_ratio_max=0.0),
        )  # fmt: skip


def test_a_preset_on_a_quantised_base_is_refused(
    wide_adapter: Path, q4_1_base: Path, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match="quantised already"):
        quick(wide_adapter, q4_1_base, tmp_path / "out", form="merged", type="q4_k_m")


def test_an_adapter_whose_delta_llama_cpp_cannot_see_is_an_error(tmp_path: Path) -> None:
    """Too small for float32 logits: the file is right, and of no effect."""
    source = tiny.peft_adapter("llama", tmp_path / "adapter", scale=1e-15)
    with pytest.raises(PostconditionError):
        convert(source, tiny.gguf_model("llama"), tmp_path / "out", form="sidecar")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("delay", [0.3, 1.0, 1.6, 2.2])
def test_killed_at_any_moment_nothing_partial_has_the_final_name(
    delay: float, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable, "-m", "safegene_converter", "convert", str(adapter), "--base",
        str(tiny.gguf_model("llama")), "--as", "merged", "-o", str(out),
    ]  # fmt: skip
    child = subprocess.Popen(
        command, env=python_environment(), stdout=subprocess.DEVNULL, start_new_session=True
    )
    time.sleep(delay)
    os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    if out.exists():
        check_files(read_manifest(out), out)


def test_every_type_ggml_can_encode_is_offered_or_refused_by_name(
    wide_adapter: Path, tmp_path: Path
) -> None:
    for kind in (GGMLType.IQ4_NL, GGMLType.IQ4_XS, GGMLType.Q3_K):
        assert ggml_quantizer.can_encode(kind, 256)
        manifest = convert(
            wide_adapter, tiny.gguf_model("llama", 256), tmp_path / kind.name, form="merged",
            type="q3_k_m" if kind is GGMLType.Q3_K else kind.name.lower(), promote=False,
            bounds=Bounds(0, 10, 100, 100), check=False,
        )  # fmt: skip
        assert manifest.modules


def test_a_type_that_needs_an_imatrix_says_so(wide_adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(SafeGeneError, match="imatrix"):
        quick(
            wide_adapter, tiny.gguf_model("llama", 256), tmp_path / "out", form="merged",
            type="iq2_xxs",
        )  # fmt: skip


def test_manifest_json_has_no_paths_of_this_machine(adapter: Path, tmp_path: Path) -> None:
    convert(adapter, tiny.gguf_model("llama"), tmp_path / "out", form="merged")
    text = (tmp_path / "out" / "manifest.json").read_text()
    assert str(tmp_path) not in text
    assert str(tiny.REPOSITORY) not in text
    assert json.loads(text)["settings"]["self_check"]["beta"] == pytest.approx(1.0, abs=0.02)
