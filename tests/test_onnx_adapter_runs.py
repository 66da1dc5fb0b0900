"""What docs/onnx.md says of the adapter form: which ways to run ONNX Runtime leave the adapter out."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import tiny
from onnx_tools import convert_onnx

HEAD_SIZE = 64 // tiny.N_HEAD
Feed = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Feed]:
    """A session of the adapter form, run options with the adapter active, and a feed."""
    folder = tmp_path_factory.mktemp("runs")
    adapter = tiny.peft_adapter("llama", folder / "adapter", scale=0.1)
    out = folder / "out"
    convert_onnx(adapter, tiny.onnx_model("llama"), out, form="adapter", check=False)
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    made = ort.InferenceSession(str(out / "model.onnx"), settings)
    active = ort.RunOptions()
    active.log_severity_level = 3
    loaded = ort.LoraAdapter()
    loaded.Load(str(Path(out / "adapter.onnx_adapter")))
    active.add_active_adapter(loaded)
    feed: Feed = {"input_ids": np.arange(1, 6)[None], "attention_mask": np.ones((1, 5), np.int64)}
    for value in made.get_inputs():
        if value.name not in feed:
            feed[value.name] = np.zeros((1, tiny.N_HEAD_KV, 0, HEAD_SIZE), np.float32)
    return made, (active, loaded), feed


def plain_run(session: Any, options: Any, feed: Feed) -> np.ndarray:
    found: np.ndarray = session.run(["logits"], feed, options)[0]
    return found


def with_values(session: Any, options: Any, feed: Feed) -> np.ndarray:
    values = {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in feed.items()}
    found: np.ndarray = session.run_with_ort_values(["logits"], values, options)[0].numpy()
    return found


def with_value_vectors(session: Any, options: Any, feed: Feed) -> np.ndarray:
    from onnxruntime.capi.onnxruntime_pybind11_state import OrtDevice, OrtValueVector

    feeds, fetches = OrtValueVector(), OrtValueVector()
    for value in feed.values():
        feeds.push_back(ort.OrtValue.ortvalue_from_numpy(value)._ortvalue)
    device = OrtDevice(OrtDevice.cpu(), OrtDevice.default_memory(), 0)
    session.run_with_ortvaluevector(options, list(feed), feeds, ["logits"], fetches, [device])
    found: np.ndarray = fetches[0].numpy()
    return found


def with_binding(session: Any, options: Any, feed: Feed) -> np.ndarray:
    binding = session.io_binding()
    for name, value in feed.items():
        binding.bind_cpu_input(name, value)
    binding.bind_output("logits")
    session.run_with_iobinding(binding, options)
    found: np.ndarray = binding.copy_outputs_to_cpu()[0]
    return found


def asynchronously(session: Any, options: Any, feed: Feed) -> np.ndarray:
    done, found = threading.Event(), []

    def finished(outputs: Any, user: Any, error: str) -> None:
        found.extend([outputs, error])
        done.set()

    session.run_async(["logits"], feed, finished, None, options)
    assert done.wait(60)
    assert not found[1]
    return np.asarray(found[0][0])


@pytest.mark.parametrize(
    ("run", "is_active"),
    [
        (plain_run, True),
        (with_values, True),
        (with_value_vectors, False),
        (with_binding, False),
        (asynchronously, False),
    ],
)
def test_who_sees_the_adapter(
    run: Callable[[Any, Any, Feed], np.ndarray], is_active: bool, session: tuple[Any, Any, Feed]
) -> None:
    made, (active, _), feed = session
    base, tuned = made.run(["logits"], feed)[0], made.run(["logits"], feed, active)[0]
    assert np.abs(tuned - base).max() > 1
    np.testing.assert_array_equal(run(made, active, feed), tuned if is_active else base)
