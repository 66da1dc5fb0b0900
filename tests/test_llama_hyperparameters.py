"""What no real model has is refused before libllama sees it; what real models have is not."""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any

import pytest
import tiny

from safegene_converter.bases.hf_to_gguf import find_llama_cpp
from safegene_converter.inputs.base import open_base
from safegene_runtime.engines.llama_checks import check_model_header
from safegene_runtime.engines.llama_hyperparameters import check_hyperparameters
from safegene_runtime.errors import BaseModelError, EngineError, Problems
from safegene_runtime.formats.gguf.header import read_gguf
from safegene_runtime.formats.gguf.model import GGUFModel

BIG = 2**32 - 1
WRONG: dict[str, tuple[Any, ...]] = {
    "attention.layer_norm_rms_epsilon": (-1e-6, 0.0, 1.0, math.nan, math.inf),
    "rope.freq_base": (0.0, -1.0, math.nan, math.inf),
    "block_count": (0, 1, 3, 2**31, BIG),
    "context_length": (0, 2**31, BIG),
    "embedding_length": (0, 63, 128, BIG),
    "feed_forward_length": (2**31, BIG),
    "attention.head_count": (3, 5, BIG),
    "attention.head_count_kv": (3, 8, BIG),
    "attention.key_length": (0, BIG),
    "attention.value_length": (0, BIG),
    "rope.dimension_count": (15, 18, BIG),
    "vocab_size": (0, BIG),
}


def patched(path: Path, key: str, value: Any) -> Path:
    """The tiny llama with one hyperparameter changed in its header."""
    data = bytearray(tiny.gguf_model("llama").read_bytes())
    name = f"llama.{key}".encode()
    at = data.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4
    data[at : at + 4] = struct.pack("<f" if isinstance(value, float) else "<I", value)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("key", "value"), [(k, v) for k, values in WRONG.items() for v in values])
def test_an_implausible_hyperparameter_is_refused_by_name(
    key: str, value: Any, tmp_path: Path
) -> None:
    path = patched(tmp_path / "model.gguf", key, value)
    with pytest.raises(EngineError, match=r"llama\.|token_embd") as caught:
        check_model_header(path)
    named = {problem.field.removeprefix("llama.") for problem in caught.value.problems}
    # a width or a number of heads is wrong beside others, which may be the ones that are named
    assert key in named or named & {"attention.head_count", "attention.head_count_kv",
                                    "token_embd.weight", "rope.dimension_count"}  # fmt: skip


def test_the_converter_refuses_it_too(tmp_path: Path) -> None:
    path = patched(tmp_path / "model.gguf", "attention.layer_norm_rms_epsilon", -1e-6)
    with pytest.raises(BaseModelError, match="layer_norm_rms_epsilon: expected more than 0"):
        open_base(path)


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_what_llama_cpp_converts_is_plausible(architecture: str) -> None:
    check_model_header(tiny.gguf_model(architecture))
    check_model_header(tiny.smollm2_gguf())


def test_hyperparameters_of_other_architectures_are_plausible() -> None:
    """Of the vocabularies that come with llama.cpp: headers of real models, without their tensors."""
    checked = 0
    for path in sorted((find_llama_cpp() / "models").glob("ggml-vocab-*.gguf")):
        try:
            header = read_gguf(path)
        except Exception:  # a file of another age; the reader has its own tests
            continue
        problems = Problems()
        check_hyperparameters(GGUFModel((header,), header.metadata, {}), path.name, problems)
        fields = [one.field for one in problems if not one.field.endswith("block_count")]
        assert fields == [], path.name  # there are no blocks to count
        checked += 1
    assert checked > 10


def test_key_and_value_heads_without_query_heads_are_refused(tmp_path: Path) -> None:
    data = tiny.gguf_model("llama").read_bytes()
    path = tmp_path / "model.gguf"
    path.write_bytes(data.replace(b"llama.attention.head_count\4", b"llama.attention.head_cOunt\4"))
    with pytest.raises(EngineError, match=r"head_count: expected query heads beside head_count_kv"):
        check_model_header(path)
