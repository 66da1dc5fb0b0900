"""What the llama.cpp engine refuses, and what it needs."""

# ruff: noqa: F811 - fixtures are imported, and are parameters of the tests, too
from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from test_llama_engine import (  # noqa: F401
    EMBED,
    Weights,
    adapter,
    alone,
    engine,
    model,
    numpy_llama,
    relative,
    sequences,
    weights,
    write_model,
)

from safegene_runtime.engines.engine import Engine
from safegene_runtime.engines.llama import LlamaEngine
from safegene_runtime.engines.registry import open_engine
from safegene_runtime.errors import EngineError, FormatError
from safegene_runtime.formats.gguf.header import read_gguf


@pytest.mark.parametrize("what", ["missing", "garbage", "empty", "adapter", "folder", "cut"])
def test_a_file_that_is_no_model_is_refused(
    what: str, tmp_path: Path, model: Path, adapter: Path
) -> None:
    path = tmp_path / "model.gguf"
    if what == "garbage":
        path.write_bytes(os.urandom(4096))
    elif what == "empty":
        path.touch()
    elif what == "adapter":
        path.write_bytes(adapter.read_bytes())
    elif what == "folder":
        path.mkdir()
    elif what == "cut":
        path.write_bytes(model.read_bytes()[:-4096])
    with pytest.raises((EngineError, FormatError), match=r"model\.gguf"):
        LlamaEngine(path, threads=1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("block_count", 2**31),
        ("block_count", 3),
        ("tokenizer.ggml.bos_token_id", 70000),
        ("tokenizer.ggml.pre", "no-such-pre"),
    ],
)
def test_metadata_that_would_end_the_process_are_an_error(
    key: str, value: object, tmp_path: Path, weights: Weights
) -> None:
    path = write_model(tmp_path / "model.gguf", weights, **{key: value})
    with pytest.raises((EngineError, FormatError), match=r"model\.gguf"):
        LlamaEngine(path, threads=1)


def test_a_refusal_quotes_what_llama_cpp_said(tmp_path: Path, weights: Weights) -> None:
    del (fewer := dict(weights))["blk.1.ffn_up.weight"]
    with pytest.raises(EngineError, match=r"blk\.1\.ffn_up\.weight"):
        LlamaEngine(write_model(tmp_path / "model.gguf", fewer), threads=1)


def test_not_a_number_is_an_error(tmp_path: Path, weights: Weights) -> None:
    broken = weights | {"output_norm.weight": np.full(EMBED, np.nan, np.float32)}
    path = write_model(tmp_path / "model.gguf", broken)
    with pytest.raises(EngineError):  # noqa: SIM117 - at load or at the first logits
        with LlamaEngine(path, threads=1) as nan:
            alone(nan, [5, 6], 1)


def test_arguments_out_of_range_are_errors(engine: LlamaEngine) -> None:
    for rows, keep in (
        ([[]], [1]),
        ([[1, 2]], [0]),
        ([[1, 2]], [3]),
        ([[1, tiny.VOCABULARY]], [1]),
        ([[-1]], [1]),
        ([[1]], []),
        ([[1] * 513], [1]),
    ):
        with pytest.raises(EngineError):
            engine.logits(rows, keep)
    with pytest.raises(EngineError):
        engine.generate([[1] * 510], 3, [])
    with pytest.raises(EngineError):
        engine.generate([[1]], [1, 2], [])


@pytest.mark.parametrize(
    "setting",
    [
        {"kv_type": "q8_0"},
        {"threads": 0},
        {"threads": 513},
        {"n_seq_max": 256},
        {"n_batch": 2},
        {"n_ctx": 0},
    ],
)
def test_settings_out_of_range_are_errors(model: Path, setting: dict[str, Any]) -> None:
    with pytest.raises(EngineError, match=next(iter(setting))):
        LlamaEngine(model, **setting)


def test_a_misspelt_setting_is_a_type_error(model: Path, adapter: Path) -> None:
    with pytest.raises(TypeError):
        open_engine(model, lora_path=adapter)


def test_a_stale_iterator_is_an_error(engine: LlamaEngine) -> None:
    rows = sequences(3, 2)
    stale = iter(engine.logits(rows, [1] * 3))
    next(stale)
    engine.generate(rows, 1, [])
    with pytest.raises(EngineError, match="another call"):
        next(stale)


def test_closing_twice_is_fine_and_using_after_is_an_error(model: Path, adapter: Path) -> None:
    closed = LlamaEngine(model, adapter, threads=1)
    stale = iter(closed.logits(sequences(3, 2), [1] * 3))
    next(stale)
    closed.close()
    closed.close()
    for use in (
        lambda: next(stale),
        lambda: closed.logits([[1]], [1]),
        lambda: closed.generate([[1]], 1, []),
        lambda: closed.tokenize("a", add_special=False),
        lambda: closed.detokenize([1]),
        closed.chat_template,
        lambda: closed.eog_ids,
    ):
        with pytest.raises(EngineError, match="closed"):
            use()


@pytest.mark.parametrize("kv_type", ["f32", "f16"])
def test_the_type_of_the_cache_is_the_one_asked_for(
    model: Path, weights: Weights, kv_type: Any
) -> None:
    ids = sequences(1, 20)[0]
    with LlamaEngine(model, threads=1, kv_type=kv_type) as typed:
        assert typed.settings["kv_type"] == kv_type
        error = relative(alone(typed, ids, 1), numpy_llama(weights, ids)[-1:])
    assert (error > 1e-5) == (kv_type == "f16")


def test_the_engine_is_an_engine_and_describes_itself(engine: LlamaEngine) -> None:
    assert isinstance(engine, Engine)
    assert engine.name == "llama.cpp"
    assert metadata.version("llama-cpp-python") in engine.version
    assert engine.settings["threads"] == 1
    assert not engine.settings["mmap"]
    assert (engine.bos_id, engine.eos_id, engine.add_bos) == (1, 2, False)
    assert engine.eog_ids >= {2}
    template = read_gguf(tiny.smollm2_gguf()).get("tokenizer.chat_template")
    assert engine.chat_template() == template


@pytest.mark.parametrize("text", ["", "Hello, world", "  two  spaces\n", "Grüße 🙂 中文", "a\0b"])
def test_tokenizing_goes_back_and_forth(engine: LlamaEngine, text: str) -> None:
    ids = engine.tokenize(text, add_special=False)
    assert engine.detokenize(ids) == text


def test_control_tokens_are_parsed_and_spelt_out_on_demand(engine: LlamaEngine) -> None:
    text = "<|im_start|>user\nhi<|im_end|>"
    ids = engine.tokenize(text, add_special=False)
    assert (ids[0], ids[-1]) == (1, 2)
    assert engine.detokenize(ids) == text
    assert engine.detokenize(ids, special=False) == "user\nhi"
    plain = engine.tokenize(text, add_special=False, parse_special=False)
    assert not {1, 2} & set(plain)
    with pytest.raises(EngineError, match="Unicode"):
        engine.tokenize("\ud800", add_special=False)


def test_a_file_can_be_given_by_descriptor(model: Path, adapter: Path) -> None:
    with model.open("rb") as a, adapter.open("rb") as b:
        paths = [Path(f"/proc/self/fd/{file.fileno()}") for file in (a, b)]
        with LlamaEngine(*paths, threads=1) as opened:
            assert len(opened.generate([[5, 6, 7]], 2, [])[0]) == 2


def test_the_file_may_vanish_once_it_is_loaded(tmp_path: Path, model: Path) -> None:
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model.read_bytes())
    with LlamaEngine(copy, threads=1) as opened:
        before = alone(opened, [5, 6, 7], 1)
        copy.write_bytes(b"")
        assert np.array_equal(alone(opened, [5, 6, 7], 1), before)


def test_other_suffixes_have_no_engine(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"\.gguf"):
        open_engine(tmp_path / "model.bin")


def test_without_llama_cpp_the_message_says_what_to_install(model: Path) -> None:
    code = (
        "import sys; sys.path[:] = eval(sys.argv[2]); sys.modules['llama_cpp'] = None\n"
        "from pathlib import Path\n"
        "from safegene_runtime.engines.registry import open_engine\n"
        "from safegene_runtime.errors import EngineError\n"
        "try: open_engine(Path(sys.argv[1]))\n"
        "except EngineError as error: print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(model), repr(sys.path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 'pip install "safegene[gguf]"' in done.stdout


def test_importing_the_protocol_imports_no_engine() -> None:
    code = (
        "import sys; sys.path[:] = eval(sys.argv[1]); import safegene_runtime.engines.engine\n"
        "sys.exit(any(name in sys.modules for name in ('llama_cpp', 'jinja2', 'torch')))"
    )
    subprocess.run([sys.executable, "-c", code, repr(sys.path)], check=True)
