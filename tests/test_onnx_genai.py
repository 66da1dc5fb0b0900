"""ONNX Runtime GenAI loads what we write, and says what our engine says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime_genai as og
import pytest
import tiny
from onnx_tools import FORMS, every_module, feeds, quick, session

from safegene_runtime.engines.ort import OrtEngine

PROMPTS = [[5, 77, 1042, 9, 300], [8, 8, 411], [640] * 9]
N_NEW = 8


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return every_module(tmp_path_factory.mktemp("genai") / "adapter", scale=0.1)


def genai(folder: Path, adapter: Path | None, ids: list[int]) -> tuple[np.ndarray, list[int]]:
    """(logits of the last prompt position, greedy reply) by GenAI."""
    model = og.Model(str(folder))
    params = og.GeneratorParams(model)
    params.set_search_options(
        do_sample=False, max_length=len(ids) + N_NEW, min_length=len(ids) + N_NEW
    )
    generator = og.Generator(model, params)
    adapters = None
    if adapter is not None:
        adapters = og.Adapters(model)
        adapters.load(str(adapter), "safety")
        generator.set_active_adapter(adapters, "safety")
    generator.append_tokens(np.array([ids], np.int32))
    logits = np.array(generator.get_logits()).reshape(-1)
    reply = []
    for _ in range(N_NEW):
        generator.generate_next_token()
        reply.append(int(generator.get_next_tokens()[0]))
    return logits, reply


def without_end(engine: OrtEngine, ids: list[int]) -> list[int]:
    """Greedy among the ids that do not end the text: what `min_length` does."""
    reply: list[int] = []
    for _ in range(N_NEW):
        _, logits = next(iter(engine.logits([[*ids, *reply]], [1])))
        row = logits[0].copy()
        row[list(engine.eog_ids)] = -np.inf
        reply.append(int(row.argmax()))
    return reply


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize("form", FORMS)
def test_genai_generates_what_our_engine_generates(
    form: str, precision: str, adapter: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    base = tiny.onnx_model("llama", precision)
    quick(adapter, base, out, form=form)
    file = out / "adapter.onnx_adapter" if form == "adapter" else None
    with OrtEngine(out / "model.onnx", file, threads=1) as engine:
        for ids in PROMPTS:
            logits, reply = genai(out, file, ids)
            _, ours = next(iter(engine.logits([ids], [1])))
            assert np.abs(logits - ours[0]).max() <= 1e-4
            assert reply == without_end(engine, ids)
    plain, _ = genai(base, None, PROMPTS[0])
    tuned, _ = genai(out, file, PROMPTS[0])
    assert np.abs(plain - tuned).max() > 0.01, "the adapter must matter, or nothing was compared"


def test_genai_adapters_are_the_same_as_passing_the_tensors(adapter: Path, tmp_path: Path) -> None:
    import onnxruntime

    out = tmp_path / "out"
    quick(adapter, tiny.onnx_model("llama"), out, form="adapter")
    file = out / "adapter.onnx_adapter"
    values = onnxruntime.AdapterFormat.read_adapter(str(file)).get_parameters()
    by_hand = {name: value.numpy() for name, value in values.items()}
    running = session(out / "model.onnx")
    (expected,) = running.run(["logits"], feeds(running, PROMPTS[:1]) | by_hand)
    logits, _ = genai(out, file, PROMPTS[0])
    assert np.abs(logits - expected[0, -1]).max() <= 1e-5
    off, _ = genai(out, None, PROMPTS[0])
    plain, _ = genai(tiny.onnx_model("llama"), None, PROMPTS[0])
    assert np.array_equal(off, plain), "switched off, it is the plain base"
