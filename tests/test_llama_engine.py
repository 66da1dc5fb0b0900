from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny

from safegene_runtime.engines.engine import Engine
from safegene_runtime.engines.llama import LlamaEngine
from safegene_runtime.engines.registry import open_engine
from safegene_runtime.errors import EngineError, FormatError
from safegene_runtime.formats.gguf.header import read_gguf
from safegene_runtime.formats.gguf.model import open_model
from safegene_runtime.formats.gguf.types import ValueType

LAYERS, EMBED, HEADS, KV_HEADS, FEED = 2, 64, 4, 2, 128
HEAD = EMBED // HEADS
RANK = 4
TARGETS = ("blk.0.attn_q.weight", "blk.1.ffn_down.weight", "blk.1.attn_k.weight")

Weights = dict[str, np.ndarray]


def random_weights() -> Weights:
    random = np.random.default_rng(0)

    def matrix(rows: int, columns: int, scale: float = 1.5) -> np.ndarray:
        return (scale * random.standard_normal((rows, columns)) / columns**0.5).astype(np.float32)

    weights = {
        "token_embd.weight": matrix(tiny.VOCABULARY, EMBED, 8.0),
        "output_norm.weight": np.ones(EMBED, np.float32),
    }
    for layer in range(LAYERS):
        name = f"blk.{layer}."
        weights |= {
            name + "attn_norm.weight": np.ones(EMBED, np.float32),
            name + "ffn_norm.weight": np.ones(EMBED, np.float32),
            name + "attn_q.weight": matrix(EMBED, EMBED),
            name + "attn_k.weight": matrix(KV_HEADS * HEAD, EMBED),
            name + "attn_v.weight": matrix(KV_HEADS * HEAD, EMBED),
            name + "attn_output.weight": matrix(EMBED, EMBED),
            name + "ffn_gate.weight": matrix(FEED, EMBED),
            name + "ffn_up.weight": matrix(FEED, EMBED),
            name + "ffn_down.weight": matrix(EMBED, FEED),
        }
    return weights


def write_model(path: Path, weights: Weights, **overrides: Any) -> Path:
    """A llama model with the tiny models' tokenizer; `overrides` replace `llama.block_count` and such."""
    source = read_gguf(tiny.gguf_model("llama")).metadata
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(overrides.get("block_count", LAYERS))
    writer.add_context_length(512)
    writer.add_embedding_length(EMBED)
    writer.add_feed_forward_length(FEED)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HEAD)
    writer.add_vocab_size(weights["token_embd.weight"].shape[0])
    for key, value in source.items():
        if key.startswith("tokenizer.") and key != "tokenizer.ggml.token_type":
            found = list(value.value) if value.type is ValueType.ARRAY else value.value
            kind = gguf.GGUFValueType(value.type)
            writer.add_key_value(key, overrides.get(key, found), kind)
    writer.add_token_types(source["tokenizer.ggml.token_type"].value)
    for name, array in weights.items():
        writer.add_tensor(name, array)
    return finish(writer, path)


def finish(writer: gguf.GGUFWriter, path: Path) -> Path:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_adapter(
    path: Path,
    tensors: Weights,
    architecture: str = "llama",
    alpha: float | None = None,
    kind: str = "adapter",
    adapter_type: str = "lora",
) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(kind)
    writer.add_string("adapter.type", adapter_type)
    if alpha is not None:
        writer.add_float32("adapter.lora.alpha", alpha)
    for name, array in tensors.items():
        writer.add_tensor(name, array)
    return finish(writer, path)


def lora(weights: Weights, scale: float = 0.3) -> Weights:
    random = np.random.default_rng(1)
    tensors = {}
    for name in TARGETS:
        rows, columns = weights[name].shape
        a = random.standard_normal((RANK, columns)) / columns**0.5
        b = scale * random.standard_normal((rows, RANK))
        tensors[f"{name}.lora_a"] = a.astype(np.float32)
        tensors[f"{name}.lora_b"] = b.astype(np.float32)
    return tensors


def merged(weights: Weights, adapter: Weights) -> Weights:
    changed = {
        name: weights[name] + adapter[f"{name}.lora_b"] @ adapter[f"{name}.lora_a"]
        for name in TARGETS
    }
    return weights | changed


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, weights: Weights) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "model.gguf", weights)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, weights: Weights) -> Path:
    return write_adapter(tmp_path_factory.mktemp("adapter") / "adapter.gguf", lora(weights))


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[LlamaEngine]:
    with LlamaEngine(model, threads=1, n_batch=64, n_seq_max=4) as opened:
        yield opened


def sequences(count: int, shared: int, seed: int = 2) -> list[list[int]]:
    random = np.random.default_rng(seed)
    first = random.integers(20, tiny.VOCABULARY, shared).tolist()
    return [
        first + random.integers(20, tiny.VOCABULARY, int(length)).tolist()
        for length in random.integers(3, 30, count)
    ]


def alone(engine: Engine, ids: list[int], keep: int) -> np.ndarray:
    return next(iter(engine.logits([ids], [keep])))[1].copy()


def together(engine: Engine, rows: list[list[int]], keep: list[int]) -> list[np.ndarray]:
    found = {i: array.copy() for i, array in engine.logits(rows, keep)}
    assert sorted(found) == list(range(len(rows)))
    return [found[i] for i in range(len(rows))]


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("shared", [0, 17, 70])
def test_many_sequences_give_what_each_gives_alone(engine: LlamaEngine, shared: int) -> None:
    rows = sequences(11, shared)
    keep = [1 + i % 3 for i in range(len(rows))]
    for i, array in enumerate(together(engine, rows, keep)):
        assert array.shape == (keep[i], engine.n_vocab)
        assert array.dtype == np.float32
        assert relative(array, alone(engine, rows[i], keep[i])) < 1e-5


def test_the_arithmetic_is_that_of_a_llama(engine: LlamaEngine, weights: Weights) -> None:
    """The differential: a forward pass in float64 numpy."""
    ids = sequences(1, 9)[0]
    assert relative(alone(engine, ids, len(ids)), numpy_llama(weights, ids)) < 1e-5


def test_a_sequence_longer_than_a_batch_is_decoded_in_parts(model: Path) -> None:
    ids = sequences(1, 150)[0]
    with (
        LlamaEngine(model, threads=1, n_batch=32, n_seq_max=2) as small,
        LlamaEngine(model, threads=1, n_batch=256) as large,
    ):
        for keep in (1, 20, len(ids)):
            expected = alone(large, ids, keep)
            assert relative(alone(small, ids, keep), expected) < 1e-5
            mixed = together(small, [ids, ids[:5], ids[:7]], [keep, 2, 1])
            assert relative(mixed[0], expected) < 1e-5


def test_few_outputs_at_a_time_change_nothing(
    model: Path, engine: LlamaEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = sequences(5, 6)
    keep = [len(ids) for ids in rows]
    expected = together(engine, rows, keep)
    size = sum(tensor.nbytes for tensor in open_model(model).tensors.values())
    monkeypatch.setattr(
        "safegene_runtime.engines.llama_context.OUTPUT_SHARE", size / (7 * 4 * engine.n_vocab)
    )
    with LlamaEngine(model, threads=1, n_batch=64, n_seq_max=4) as narrow:
        for got, want in zip(together(narrow, rows, keep), expected, strict=True):
            assert relative(got, want) < 1e-5


def test_identical_and_nested_sequences_are_fine(engine: LlamaEngine) -> None:
    ids = sequences(1, 10)[0]
    rows = [ids, ids, ids[:4], ids[:1]]
    for got, row in zip(together(engine, rows, [1, 2, 1, 1]), rows, strict=True):
        assert relative(got[-1:], alone(engine, row, 1)) < 1e-5


def test_generation_is_the_argmax_of_logits_step_by_step(engine: LlamaEngine) -> None:
    rows = sequences(7, 12)
    got = engine.generate(rows, 6, [])
    for ids, output in zip(rows, got, strict=True):
        grown = list(ids)
        for token in output:
            assert token == int(alone(engine, grown, 1)[0].argmax())
            grown.append(token)
    assert {len(output) for output in got} == {6}


def test_generation_stops_after_a_stop_id_and_at_each_limit(engine: LlamaEngine) -> None:
    rows = sequences(7, 12)
    free = engine.generate(rows, 6, [])
    stop = free[0][2]
    stopped = engine.generate(rows, 6, [stop])
    for output, whole in zip(stopped, free, strict=True):
        end = whole.index(stop) + 1 if stop in whole else 6
        assert output == whole[:end]
    limits = [0, 1, 2, 3, 4, 5, 6]
    done: list[int] = []
    limited = engine.generate(rows, limits, [], done.append)
    assert limited == [whole[:limit] for whole, limit in zip(free, limits, strict=True)]
    assert sum(done) == 6
    assert engine.generate(rows, 0, []) == [[] for _ in rows]
    assert engine.generate([], 3, []) == []


def test_long_prompts_are_generated_from_in_parts(model: Path, engine: LlamaEngine) -> None:
    rows = [*sequences(3, 100), *sequences(3, 90, seed=5)]
    with LlamaEngine(model, threads=1, n_batch=16, n_seq_max=3) as small:
        assert small.generate(rows, 4, []) == engine.generate(rows, 4, [])


def test_the_lowest_id_wins_a_tie(tmp_path: Path, weights: Weights) -> None:
    flat = weights | {"output_norm.weight": np.zeros(EMBED, np.float32)}
    with LlamaEngine(write_model(tmp_path / "flat.gguf", flat), threads=1) as flat_engine:
        assert flat_engine.generate([[5, 6]], 2, []) == [[0, 0]]


def test_progress_counts_every_sequence_once(engine: LlamaEngine) -> None:
    rows, seen = sequences(9, 3), []
    for _ in engine.logits(rows, [1] * 9, seen.append):
        pass
    assert sum(seen) == 9


def test_an_adapter_does_what_merged_weights_do(
    tmp_path: Path, model: Path, adapter: Path, weights: Weights, engine: LlamaEngine
) -> None:
    rows = sequences(4, 8)
    base = together(engine, rows, [3] * 4)
    merged_path = write_model(tmp_path / "merged.gguf", merged(weights, lora(weights)))
    with (
        LlamaEngine(merged_path, threads=1) as merged_engine,
        open_engine(model, adapter, threads=1) as adapted,
    ):
        assert adapted.settings["adapter_scale"] == 1.0
        expected = together(merged_engine, rows, [3] * 4)
        for got, want, without in zip(
            together(adapted, rows, [3] * 4), expected, base, strict=True
        ):
            assert relative(got, want) < 1e-5
            assert relative(got, without) > 0.01
        assert adapted.generate(rows, 5, []) == merged_engine.generate(rows, 5, [])


def test_an_adapter_survives_a_new_context(model: Path, adapter: Path) -> None:
    ids = sequences(1, 5)[0]
    with LlamaEngine(model, adapter, threads=1, n_batch=16, n_seq_max=2, n_ctx=16) as adapted:
        before = alone(adapted, ids, 1)
        adapted.generate(sequences(2, 300), 2, [])
        assert np.array_equal(alone(adapted, ids, 1), before)


def test_an_alpha_that_changes_nothing_is_accepted(
    tmp_path: Path, model: Path, adapter: Path, weights: Weights
) -> None:
    ids = sequences(1, 5)[0]
    with_alpha = write_adapter(tmp_path / "alpha.gguf", lora(weights), alpha=float(RANK))
    with (
        LlamaEngine(model, adapter, threads=1) as plain,
        LlamaEngine(model, with_alpha, threads=1) as scaled,
    ):
        assert np.array_equal(alone(plain, ids, 1), alone(scaled, ids, 1))


def broken_adapters() -> dict[str, Callable[[Path, Weights], object]]:
    def without(tensors: Weights, name: str) -> Weights:
        return {key: value for key, value in tensors.items() if key != name}

    first = f"{TARGETS[0]}.lora_a"
    return {
        "alpha twice the rank": lambda p, t: write_adapter(p, t, alpha=8.0),
        "alpha zero": lambda p, t: write_adapter(p, t, alpha=0.0),
        "no tensors": lambda p, t: write_adapter(p, {}),
        "only A": lambda p, t: write_adapter(p, without(t, first)),
        "norm": lambda p, t: write_adapter(
            p, t | {"blk.0.attn_norm.weight": np.ones(EMBED, np.float32)}
        ),
        "embedding": lambda p, t: write_adapter(
            p,
            t
            | {
                "token_embd.weight.lora_a": np.ones((RANK, EMBED), np.float32),
                "token_embd.weight.lora_b": np.ones((tiny.VOCABULARY, RANK), np.float32),
            },
        ),
        "other architecture": lambda p, t: write_adapter(p, t, architecture="qwen2"),
        "a model": lambda p, t: write_adapter(p, t, kind="model"),
        "control vector": lambda p, t: write_adapter(p, t, adapter_type="control_vector"),
        "other shape": lambda p, t: write_adapter(p, t | {first: np.ones((RANK, 32), np.float32)}),
        "other rank": lambda p, t: write_adapter(p, t | {first: np.ones((5, EMBED), np.float32)}),
        "three dimensions": lambda p, t: write_adapter(
            p, t | {first: np.ones((1, RANK, EMBED), np.float32)}
        ),
        "no such layer": lambda p, t: write_adapter(
            p, {key.replace("blk.1", "blk.7"): value for key, value in t.items()}
        ),
        "garbage": lambda p, t: p.write_bytes(b"GGUF" + b"\xff" * 200),
        "empty": lambda p, t: p.write_bytes(b""),
        "missing": lambda p, t: None,
        "cut": lambda p, t: p.write_bytes(write_adapter(p, t).read_bytes()[:-500]),
    }


@pytest.mark.parametrize("name", broken_adapters())
def test_an_adapter_that_would_be_misread_is_refused(
    name: str, tmp_path: Path, model: Path, weights: Weights
) -> None:
    path = tmp_path / "adapter.gguf"
    broken_adapters()[name](path, lora(weights))
    with pytest.raises((EngineError, FormatError)) as caught:
        LlamaEngine(model, path, threads=1)
    assert "adapter.gguf" in str(caught.value)


def numpy_llama(weights: Weights, ids: list[int]) -> np.ndarray:
    """Logits (len(ids), vocabulary) of a llama whose q/k rows are interleaved, as GGUF has them."""
    w = {name: array.astype(np.float64) for name, array in weights.items()}
    n = len(ids)

    def norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    angle = np.arange(n)[:, None] / 10000 ** (np.arange(0, HEAD, 2) / HEAD)

    def rotate(x: np.ndarray) -> np.ndarray:  # (n, heads, HEAD)
        even, odd = x[..., ::2], x[..., 1::2]
        cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
        return np.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)

    x = w["token_embd.weight"][ids]
    for layer in range(LAYERS):
        name = f"blk.{layer}."
        y = norm(x, w[name + "attn_norm.weight"])
        q = rotate((y @ w[name + "attn_q.weight"].T).reshape(n, HEADS, HEAD))
        k = rotate((y @ w[name + "attn_k.weight"].T).reshape(n, KV_HEADS, HEAD))
        v = (y @ w[name + "attn_v.weight"].T).reshape(n, KV_HEADS, HEAD)
        k, v = (np.repeat(t, HEADS // KV_HEADS, axis=1) for t in (k, v))
        score = np.einsum("ihd,jhd->hij", q, k) / HEAD**0.5
        score[:, np.triu(np.ones((n, n), bool), 1)] = -np.inf
        p = np.exp(score - score.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        x = x + np.einsum("hij,jhd->ihd", p, v).reshape(n, EMBED) @ w[name + "attn_output.weight"].T
        y = norm(x, w[name + "ffn_norm.weight"])
        gate = y @ w[name + "ffn_gate.weight"].T
        up = y @ w[name + "ffn_up.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[name + "ffn_down.weight"].T
    return norm(x, w["output_norm.weight"]) @ w["token_embd.weight"].T


LOADERS = {
    "llama.cpp": "from safegene_runtime.engines.llama_native import library; library()",
    "PyTorch, by a command": (
        "from safegene_converter.cli.main import main; main(['inspect', 'nothing']); import torch"
    ),
}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libgomp is Linux's")
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "77"}, "77"), ({"OMP_WAIT_POLICY": "passive"}, "0")],
)
def test_idle_threads_sleep_soon_unless_the_user_says_otherwise(
    loader: str, given: dict[str, str], spins: str
) -> None:
    """Asked of libgomp itself, which prints what it goes by."""
    clean = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP", "GOMP"))
    }
    done = subprocess.run(
        [sys.executable, "-c", LOADERS[loader]],
        env={**clean, "OMP_DISPLAY_ENV": "verbose", **given},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr
