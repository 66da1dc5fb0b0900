"""Families whose rows were surveyed: their map is what the weights say, and what is folded is exact."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tiny
from families import FORMS, every_module, folded
from test_exactness import PROMPTS
from tiny_architectures import SURVEYED

from safegene import convert, record
from safegene_converter.inputs.base import open_base
from safegene_runtime.architecture.row_order import Transform
from safegene_runtime.architecture.table import TABLE, architecture_of_config
from safegene_runtime.errors import BaseModelError
from safegene_runtime.gating.bounds import bounds_for

sys.path.append(str(tiny.REPOSITORY / "tools"))

import survey
from weight_map import placements


@pytest.mark.parametrize("family", SURVEYED)
def test_the_row_of_a_family_is_what_its_weights_say(family: str) -> None:
    name, row, _ = survey.survey(family)
    stored = TABLE[name]
    if name in survey.LISTED:
        assert row["tensors"].items() <= stored.tensors.items()
    for key in () if name in survey.LISTED else ("tensors", "blocks", "transposed", "partial"):
        assert getattr(stored, key) == row[key], key
    assert {part: stored.orders.get(part) for part in row["orders"]} == row["orders"]
    (model_class,) = row["classes"]
    assert architecture_of_config({"architectures": [model_class]}, family) is stored


@pytest.mark.parametrize("family", SURVEYED)
def test_llama_cpp_computes_what_peft_computes_in_every_family(family: str, tmp_path: Path) -> None:
    found = folded(family, tmp_path)
    limit = bounds_for(TABLE[open_base(tiny.gguf_model(family)).architecture].arithmetic).kl_ceiling
    for form in FORMS:
        assert abs(found.kl[form]) <= limit
        assert found.same_replies[form]
    assert found.without > 100 * limit, "the adapter must matter, or nothing was compared"


# --- a family from its Hugging Face folder: whose weights are stored (in, out); with a window; with groups


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "falcon2", "lfm2"])
def test_a_folder_is_converted_proved_and_folded(family: str, tmp_path: Path) -> None:
    base = tiny.whole_hf_model(family)
    targets = every_module(base)
    adapter = tiny.peft_adapter(family, tmp_path / "adapter", scale=0.1, target_modules=targets)
    manifest = convert(adapter, base, tmp_path / "out", type="f32")
    assert manifest.settings["transform_error"] == 0
    proof = manifest.base["proof"]
    assert 0 <= proof["kl_worst"] <= proof["bound"]
    assert manifest.artifact["precision"] == TABLE[open_base(base).architecture].arithmetic
    if family == "gemma3":
        assert "past the sliding window of 32" in proof["why"]


@pytest.mark.parametrize("target", ["gguf", "onnx"])
def test_a_base_that_nothing_speaks_for_is_not_converted_without_its_proof(
    target: Literal["gguf", "onnx"], tmp_path: Path
) -> None:
    adapter = tiny.peft_adapter("granite", tmp_path / "adapter")
    with pytest.raises(BaseModelError, match="only running the base shows"):
        convert(adapter, tiny.whole_hf_model("granite"), tmp_path / "out", to=target, check=False)
    assert not (tmp_path / "out").exists()


def test_a_folder_whose_weights_are_of_another_model_is_refused(tmp_path: Path) -> None:
    """Nothing of an unlisted configuration is read here, so running it has to tell."""
    base = tmp_path / "base"
    adapter = tiny.peft_adapter("granite", tmp_path / "adapter")
    shutil.copytree(tiny.whole_hf_model("granite"), base)
    config = json.loads((base / "config.json").read_text())
    config["embedding_multiplier"], before = 3.0, config["embedding_multiplier"]
    (base / "config.json").write_text(json.dumps(config))
    assert before != 3.0
    convert(
        adapter, base, tmp_path / "as-said"
    )  # both sides read it: another model, and a right one
    del config["rope_parameters"]
    config["rope_scaling"] = {"rope_type": "linear", "factor": 4.0}
    config["partial_rotary_factor"] = 0.5
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(BaseModelError):
        convert(adapter, base, tmp_path / "out")


def test_a_gguf_of_a_family_is_recorded_with_its_folder(tmp_path: Path) -> None:
    """What transformers' loader leaves out of a GGUF is listed for the listed architectures only."""
    adapter = tiny.peft_adapter("gemma3", tmp_path / "adapter")
    with pytest.raises(BaseModelError, match="pass the Hugging Face folder"):
        record(adapter, tiny.gguf_model("gemma3"), tmp_path / "reference", prompts=PROMPTS)


# --- the search itself


def _weight(rows: int = 24, columns: int = 5) -> Any:
    return np.random.default_rng(0).standard_normal((rows, columns)).astype(np.float32)


@pytest.mark.parametrize(
    ("order", "transposed"),
    [
        (Transform(), False), (Transform("permute", 4), False), (Transform("permute", 2), False),
        (Transform("regroup", 4, 2), False), (Transform(), True),
    ],
)  # fmt: skip
def test_a_weight_is_found_in_the_order_it_was_written_in(
    order: Transform, transposed: bool
) -> None:
    weight = _weight()
    stored = weight.T if transposed else weight
    (place,) = placements(stored, "blk.0.x", order.apply_rows(weight), 4, 2)
    assert (place.order, place.transposed, place.tensor) == (order, transposed, "blk.0.x")


def test_equal_rows_leave_two_answers_and_so_none() -> None:
    """A delta has other rows, even where the weight has not."""
    weight = np.repeat(_weight(1), 24, axis=0)
    assert len(placements(weight, "blk.0.x", weight, 4, 2)) > 1


def test_rows_in_an_order_without_a_name_are_not_found() -> None:
    weight = _weight()
    shuffled = weight[[0, *np.random.default_rng(1).permutation(np.arange(1, 24))]]
    assert placements(weight, "blk.0.x", shuffled, 4, 2) == ()
    assert placements(weight, "blk.0.x", weight[:-1], 4, 2) == ()
