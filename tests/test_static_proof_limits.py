"""The static proof: what cannot be checked is never called proved."""

# ruff: noqa: F811 - fixtures are imported, and are parameters of the tests, too
from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_static_proof import edited, gguf_artifact, make, onnx_artifact, prove, scratch  # noqa: F401

from safegene_runtime.artifact.manifest import Manifest, read_manifest
from safegene_runtime.artifact.served import Carried, Found
from safegene_runtime.errors import (
    FormatError,
    ManifestError,
    RecordError,
    UnsupportedError,
)
from safegene_runtime.formats.gguf.model import open_model
from safegene_runtime.formats.gguf.types import GGMLType
from safegene_runtime.record.reference import read_reference
from safegene_runtime.verifying.static_proof import _module, static_proof


def test_modules_with_a_zero_delta_are_listed_and_not_counted(scratch: Path) -> None:
    made = make(scratch, "llama")
    zeroed = tuple(
        dataclasses.replace(one, b=0 * one.b, norm=0.0, s0=0.0)
        if one.module.startswith("model.layers.0.")
        else one
        for one in made.record.factors or ()
    )
    silent = dataclasses.replace(made, record=dataclasses.replace(made.record, factors=zeroed))
    proof = prove(silent, gguf_artifact(scratch, "llama", "merged"))
    assert proof.status == "ok"
    assert len(proof.inert) == len(proof.modules) == 7
    assert proof.to_dict()["inert"] == list(proof.inert)
    carried = prove(silent, gguf_artifact(scratch, "llama", "sidecar"))
    assert carried.status == "broken", "factors for a module whose delta is zero"
    nothing = tuple(dataclasses.replace(one, norm=0.0) for one in zeroed)
    with pytest.raises(RecordError, match="only zeros"):
        prove(
            dataclasses.replace(made, record=dataclasses.replace(made.record, factors=nothing)),
            gguf_artifact(scratch, "llama", "merged"),
        )


def test_noise_that_could_hide_the_delta_is_undecided(scratch: Path, tmp_path: Path) -> None:
    """The same artifact, for a delta so small that rounding to 4 bits drowns it."""
    made = make(scratch, "llama")
    tiny_factors = tuple(
        dataclasses.replace(one, b=one.b / 1000, norm=one.norm / 1e6, s0=one.s0 * 1000)
        for one in made.record.factors or ()
    )
    small = dataclasses.replace(made, record=dataclasses.replace(made.record, factors=tiny_factors))
    model = edited(
        made, tmp_path, lambda module, base, delta: base + delta / 1000, GGMLType["Q4_0"]
    )
    proof = prove(small, gguf_artifact(scratch, "llama", "merged"), model)
    assert proof.status == "undecided"
    assert proof.band > 0.5


@pytest.mark.parametrize(("strength", "status"), [(1.0, "ok"), (0.9, "broken")])
def test_a_delta_as_small_as_the_steps_of_f16_is_held_to_the_gate_of_survival(
    strength: float, status: str, scratch: Path, tmp_path: Path
) -> None:
    """Rounding may favour a base on a grid; the converter lets 0.95 pass, so 0.99 is not asked for here."""
    made = make(scratch, "llama")
    weak = 1 / 512
    weakened = tuple(
        dataclasses.replace(one, b=one.b * weak, norm=one.norm * weak**2, s0=one.s0 / weak)
        for one in made.record.factors or ()
    )
    small = dataclasses.replace(made, record=dataclasses.replace(made.record, factors=weakened))
    folder = gguf_artifact(scratch, "llama", "merged")

    def edit(module: str, base: np.ndarray, delta: np.ndarray) -> np.ndarray:
        return base + strength * weak * delta

    proof = prove(small, folder, edited(made, tmp_path, edit, GGMLType.F16))
    bands = [one.band for one in proof.modules]  # strengths differ
    assert 0.05 in bands
    assert max(bands) < 0.5
    assert proof.status == status, proof.problems
    (tmp_path / "plain").mkdir()
    plain = edited(made, tmp_path / "plain", lambda module, base, delta: base + delta, GGMLType.F16)
    assert {one.band for one in prove(made, folder, plain).modules} == {0.01}


def test_a_reference_without_factors_is_a_record_error(scratch: Path, tmp_path: Path) -> None:
    made = make(scratch, "llama")
    old = tmp_path / "old"
    shutil.copytree(made.record.path, old)
    (old / "factors.npz").unlink()
    index = json.loads((old / "reference.json").read_text())
    del index["files"]["factors.npz"]
    (old / "reference.json").write_text(json.dumps(index))
    record = read_reference(old)
    assert record.factors is None
    with pytest.raises(RecordError, match="record it again"):
        prove(dataclasses.replace(made, record=record), gguf_artifact(scratch, "llama", "merged"))


def test_edited_factors_are_refused(scratch: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(make(scratch, "llama").record.path, copy)
    data = bytearray((copy / "factors.npz").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "factors.npz").write_bytes(data)
    with pytest.raises(RecordError, match="edited"):
        read_reference(copy)


def test_other_modules_than_the_artifacts_are_a_record_error(scratch: Path) -> None:
    made = make(scratch, "llama")
    added = made.record.factors or ()
    other = dataclasses.replace(added[1], module="model.layers.9.mlp.up_proj")
    changed = dataclasses.replace(made.record, factors=(other, *added[2:]))
    with pytest.raises(RecordError) as caught:
        prove(dataclasses.replace(made, record=changed), gguf_artifact(scratch, "llama", "merged"))
    fields = {problem.field for problem in caught.value.problems}
    assert fields == {added[0].module, added[1].module, other.module}


def with_modules(folder: Path, change: Any) -> Manifest:
    manifest = read_manifest(folder)
    return dataclasses.replace(manifest, modules=tuple(change(e) for e in manifest.modules))


def test_a_tensor_that_is_not_there_is_a_manifest_error(scratch: Path) -> None:
    made = make(scratch, "llama")
    for folder, model in (
        (gguf_artifact(scratch, "llama", "merged"), "model.gguf"),
        (onnx_artifact(scratch, "merged"), "model.onnx"),
    ):
        manifest = with_modules(folder, lambda e: dataclasses.replace(e, tensor=f"no.{e.tensor}"))
        with pytest.raises(ManifestError, match="do not belong together"):
            static_proof(manifest, folder / model, None, made.record)


def test_tensors_that_changed_places_are_found_out(scratch: Path) -> None:
    """Two layers exchanged in the manifest: shapes fit, contents do not."""
    folder = gguf_artifact(scratch, "llama", "merged")
    places = {"blk.0.": "blk.1.", "blk.1.": "blk.0."}
    manifest = with_modules(
        folder, lambda e: dataclasses.replace(e, tensor=places[e.tensor[:6]] + e.tensor[6:])
    )
    proof = static_proof(manifest, folder / "model.gguf", None, make(scratch, "llama").record)
    assert proof.status == "broken"
    assert len(proof.problems) >= len(proof.modules)


def test_weights_that_are_no_numbers_are_a_format_error(scratch: Path, tmp_path: Path) -> None:
    made = make(scratch, "llama")
    model = edited(made, tmp_path, lambda module, base, delta: base + delta)
    info = open_model(model).tensors["blk.0.attn_q.weight"]
    with model.open("r+b") as file:
        file.seek(info.offset)
        file.write(np.float32(np.nan).tobytes())
    with pytest.raises(FormatError, match="finite"):
        prove(made, gguf_artifact(scratch, "llama", "merged"), model)


@pytest.mark.parametrize("where", ["weight", "factors"])
def test_a_type_that_is_not_known_has_no_band(where: str, scratch: Path) -> None:
    """It is refused: the widest band would let anything pass."""
    one = make(scratch, "llama").record.factors[0]  # type: ignore[index]
    for kind in ("F32", "new type"):
        carried = Carried(kind if where == "factors" else "F32", one.norm, one.norm)
        found = Found(kind if where == "weight" else "F32", one.s0 * one.norm, 1.0, carried)
        if kind == "F32":
            assert _module("t", one, found, same=False).proof.beta == pytest.approx(1)
        else:
            with pytest.raises(UnsupportedError, match=r"t: precision.*new type"):
                _module("t", one, found, same=False)


def test_the_report_is_json(scratch: Path) -> None:
    proof = prove(make(scratch, "qwen3"), gguf_artifact(scratch, "qwen3", "merged"))
    found = json.loads(json.dumps(proof.to_dict(), allow_nan=False))
    assert found["heat_map"]["layers"] == [0, 1]
    assert {"module", "layer", "kind", "beta", "type"} <= found["modules"][0].keys()
    assert found["pooled"] == proof.pooled
