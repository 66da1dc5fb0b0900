"""The ONNX self-check accepts what a conversion means to write, and nothing else.

Most laws run its comparison in this process and leave the probe out, which would see some of these
changes as well, and in quantised models few.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
from onnx import numpy_helper
from onnx_tools import FORMS, convert_onnx, edited, every_module, node, quick
from test_onnx_nbits import KINDS, packed, served  # noqa: F401
from test_to_onnx import as_gemm, turned

from safegene_converter.encoding import nbits_quantizer
from safegene_converter.fold.survival import Bounds
from safegene_converter.inputs.adapter import read_adapter
from safegene_converter.onnx import convert, selfcheck
from safegene_converter.onnx.fold import OnnxFold, touched_weights
from safegene_converter.onnx.reader import OnnxReader, StoredWeight
from safegene_runtime.errors import Problems
from safegene_runtime.formats.onnx import nbits

Compare = Callable[..., list[str]]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return every_module(tmp_path_factory.mktemp("selfcheck") / "adapter")


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compare:
    """Converts, and gives what other readers find wrong; nothing is run."""

    def compared(
        adapter: Path,
        base: Path,
        form: str,
        damage: Callable[[Path], object] | None = None,
        meant: Path | None = None,
        **given: Any,
    ) -> list[str]:
        found = Problems()
        check = convert._check

        def as_meant(job: OnnxFold, folder: Path, work: Path) -> dict[str, Any]:
            if meant is not None:
                other = read_adapter(meant)
                touched = touched_weights(other, job.base)
                job = dataclasses.replace(job, adapter=other, touched=touched, bounds=Bounds())
            return check(job, folder, work)

        def compare_only(**job: Any) -> dict[str, Any]:
            if damage is not None:
                damage(job["artifact"])
            found_adapter = job.pop("adapter")
            job |= {"adapter": found_adapter.path, "expression": found_adapter.expression}
            selfcheck._compare(job, found)
            return {}

        with monkeypatch.context() as patch:
            patch.setattr(convert, "_check", as_meant)
            patch.setattr(convert, "check_onnx", compare_only)
            convert_onnx(adapter, base, tmp_path / "out", form=form, force=True, **given)  # type: ignore[arg-type]
        return [str(problem) for problem in found]

    return compared


# --- what is genuine -------------------------------------------------------------------------------


def stored(base: Path, out: Path, **how: Any) -> Path:
    """A copy whose tensors lie elsewhere; without `how`, in no data file at all."""
    model = onnx.load(base / "model.onnx")
    edited(base, out, lambda model: None)
    for file in out.glob("model.onnx*"):
        file.unlink()
    onnx.save(model, out / "model.onnx", **how)
    return out


def sharded(base: Path, out: Path) -> Path:
    """One data file for each tensor."""
    return stored(
        base, out, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=64
    )


def with_bias(model: onnx.ModelProto) -> None:
    """What a promotion has to carry on behind the MatMul."""
    for layer in range(2):
        one = node(model, f"layers.{layer}/", "gate_proj/MatMul")
        bias = np.linspace(-1, 1, 128, dtype=np.float32)
        model.graph.initializer.append(numpy_helper.from_array(bias, f"bias.{layer}"))
        one.input.extend([""] * (5 - len(one.input)))
        one.input.append(f"bias.{layer}")


def sharing(model: onnx.ModelProto) -> None:
    """Equal zero points, stored once."""
    first, second = (node(model, f"layers.{i}/", "up_proj/MatMul") for i in (0, 1))
    second.input[3] = first.input[3]


def built(*options: str) -> Callable[[Path], Path]:
    return lambda out: tiny.onnx_model("llama", *options)


def changed(
    precision: str, change: Callable[[onnx.ModelProto], object], *options: str
) -> Callable[[Path], Path]:
    return lambda out: edited(tiny.onnx_model("llama", precision, *options), out, change)


BASES: dict[str, Callable[[Path], Path]] = {
    "fused qkv, tied": built("fp32"),
    "separate qkv": built("fp32", "fuse_qkv=false"),
    "fused gate and up": built("fp32", "fuse_mlp_gate_up=true"),
    "fp16": built("fp16"),
    "int8": built("int8"),
    "int4": built("int4"),
    "int4 with zero points": built("int4", "is_symmetric=false"),
    "int4 with a bias": changed("int4", with_bias),
    "int4 that share zero points": changed("int4", sharing, "is_symmetric=false"),
    "torchscript": lambda out: tiny.exported_model("llama", "torchscript"),
    "dynamo": lambda out: tiny.exported_model("llama", "dynamo"),
    "behind a Transpose": changed("fp32", turned),
    "Gemm": changed("fp32", lambda model: as_gemm(model, False, 1.0)),
    "Gemm, transposed": changed("fp32", lambda model: as_gemm(model, True, 1.0)),
    "a file for each tensor": lambda out: sharded(tiny.onnx_model("llama"), out),
    "int4, a file for each tensor": lambda out: sharded(tiny.onnx_model("llama", "int4"), out),
    "no data file": lambda out: stored(tiny.onnx_model("llama"), out),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", BASES)
def test_what_was_meant_passes_in_every_form_precision_and_layout(
    base: str, form: str, adapter: Path, compare: Compare, tmp_path: Path
) -> None:
    assert compare(adapter, BASES[base](tmp_path / "base"), form) == []


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("architecture", [one for one in tiny.OTHERS if one in tiny.BUILT])
def test_what_was_meant_passes_in_every_architecture(
    architecture: str, form: str, compare: Compare, tmp_path: Path
) -> None:
    """Biases behind q, k and v, which are nodes of the base; a q that is not square."""
    adapter = tiny.peft_adapter(architecture, tmp_path / "adapter", scale=0.05)
    for precision in ("fp32", "int4"):
        assert compare(adapter, tiny.onnx_model(architecture, precision), form) == []


@pytest.mark.parametrize("base", ["int4", "int4 with zero points", "int4 with a bias"])
@pytest.mark.parametrize(
    ("bounds", "kinds"),
    [(Bounds(0.9, 1.1, 0.5, 1.0), {"INT4", "INT8"}), (Bounds(0.999, 1.001, 1e-4, 1.0), {"F32"})],
)
def test_promoted_weights_pass(
    base: str, bounds: Bounds, kinds: set[str], adapter: Path, compare: Compare, tmp_path: Path
) -> None:
    source = BASES[base](tmp_path / "base")
    assert compare(adapter, source, "merged", bounds=bounds) == []
    manifest = quick(adapter, source, tmp_path / "again", form="merged", bounds=bounds)
    assert {entry.type_after for entry in manifest.modules} <= kinds


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_weights_that_are_quantised_once_pass(
    precision: str, adapter: Path, compare: Compare, tmp_path: Path
) -> None:
    base = tiny.hf_model("llama")
    assert compare(adapter, base, "merged", precision=precision) == []


@pytest.mark.parametrize(("bits", "symmetric", "block"), KINDS)
def test_packed_rows_are_decoded_as_we_decode_them(bits: int, symmetric: bool, block: int) -> None:
    """Columns that fill no whole number of blocks, an odd number of blocks, several pieces."""
    weight = tiny.real_weights((70, 2 * 1024 + 5 * 16 + 3))
    one = nbits_quantizer.quantize(weight, nbits.NBits(bits, block, symmetric))
    parts = [part for part in (one.b, one.scales, one.zero_points) if part is not None]
    stored = StoredWeight(tuple(parts), weight.shape[1], bits)
    rows = np.array([0, 3, 69])
    assert np.array_equal(stored.rows(rows), nbits.dequantize(one)[rows])


@pytest.mark.parametrize("bits", [4, 8])
def test_decoded_rows_are_what_onnx_runtime_multiplies_by(
    bits: int,
    packed: Callable[[int, bool, int], Path],  # noqa: F811
) -> None:
    base = packed(bits, False, 16)
    name = node(onnx.load(base / "model.onnx"), "layers.1/", "down_proj/MatMul").input[1]
    found = OnnxReader(base / "model.onnx").weight(name).rows(np.arange(64))
    assert np.abs(found - served(base, 1, "down_proj")).max() <= 1e-6


# --- what is not -----------------------------------------------------------------------------------
