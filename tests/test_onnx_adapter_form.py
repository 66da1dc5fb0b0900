"""The branch and the adapter form of an ONNX artifact: the delta beside the weights."""

# ruff: noqa: F811 - fixtures are imported, and are parameters of the tests, too
from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx_tools import (
    arrays,
    feeds,
    load,
    node,
    quick,
    session,
)
from test_to_onnx import IDS, adapter, base  # noqa: F401


def test_empty_slots_are_the_plain_base_bit_for_bit(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    quick(adapter, base, tmp_path / "out", form="adapter")
    plain, slotted = session(base / "model.onnx"), session(tmp_path / "out" / "model.onnx")
    assert len(slotted.get_overridable_initializers()) == 20
    names = [value.name for value in plain.get_outputs()]
    for one, other in zip(
        plain.run(names, feeds(plain, IDS)), slotted.run(names, feeds(slotted, IDS)), strict=True
    ):
        assert np.array_equal(one, other)


def test_the_adapter_file_is_the_same_as_passing_its_tensors(
    adapter: Path, base: Path, tmp_path: Path
) -> None:
    quick(adapter, base, tmp_path / "out", form="adapter")
    quick(adapter, base, tmp_path / "branch", form="branch")
    running = session(tmp_path / "out" / "model.onnx")
    loaded = onnxruntime.LoraAdapter()
    loaded.Load(str(tmp_path / "out" / "adapter.onnx_adapter"))
    options = onnxruntime.RunOptions()
    options.add_active_adapter(loaded)
    (with_file,) = running.run(["logits"], feeds(running, IDS), options)
    values = onnxruntime.AdapterFormat.read_adapter(
        str(tmp_path / "out" / "adapter.onnx_adapter")
    ).get_parameters()
    by_hand = {name: value.numpy() for name, value in values.items()}
    slots = {value.name for value in running.get_overridable_initializers()}
    assert by_hand.keys() == slots
    constants = arrays(tmp_path / "branch")
    assert all(np.array_equal(value, constants[name]) for name, value in by_hand.items())
    (passed,) = running.run(["logits"], feeds(running, IDS) | by_hand)
    assert np.array_equal(with_file, passed)
    (without,) = running.run(["logits"], feeds(running, IDS))
    assert np.abs(with_file - without).max() > 0.01


@pytest.mark.parametrize("form", ["branch", "adapter"])
def test_a_packed_projection_costs_two_small_products(
    form: str, adapter: Path, base: Path, tmp_path: Path
) -> None:
    quick(adapter, base, tmp_path / "out", form=form)  # type: ignore[arg-type]
    before, after = load(base), load(tmp_path / "out")
    added = {one.name: one for one in after.graph.node} | {}
    for one in before.graph.node:
        assert added.pop(one.name).op_type == one.op_type
    kinds = [one.op_type for one in added.values()]
    assert (kinds.count("MatMul"), kinds.count("Add")) == (20, 10), "five linears in two layers"
    assert [v.name for v in before.graph.output] == [v.name for v in after.graph.output]
    if form == "branch":
        a = arrays(tmp_path / "out")[
            node(after, "layers.0/", "qkv_proj", "safegene/lora_A").input[1]
        ]
        assert a.shape == (64, 12), "three ranks of four, side by side"
