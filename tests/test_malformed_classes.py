"""Malformed files by class: those of llama.cpp's own tests, and LoRA adapters for libllama."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import test_gguf_hostile
import test_onnx_file
from test_gguf_hostile import (
    DATA,
    I32,
    INFOS,
    KVS,
    U32,
    _alignment,
    _file,
    _info,
    _kv,
    _one,
    _text,
    _u32,
    _with,
    refusal,
)

from safegene_converter.bases.hf_to_gguf import find_llama_cpp
from safegene_converter.gguf.writer import OutTensor, write_gguf
from safegene_runtime.engines.llama_checks import check_adapter_header
from safegene_runtime.errors import EngineError
from safegene_runtime.formats.gguf.header import read_gguf
from safegene_runtime.formats.gguf.model import GGUFModel
from safegene_runtime.formats.gguf.types import GGMLType, Value, ValueType, nbytes, type_traits

TIGHT = [_info("a", (9,), 0, 0), _info("b", (9,), 0, 36)]  # as if nothing were padded

# name in llama.cpp's tests/test-gguf.cpp -> (what the message names, the bytes)
UPSTREAM: dict[str, tuple[str, bytes]] = {
    "HEADER_BAD_MAGIC": ("magic", b"FUGG" + _file()[4:]),
    "HEADER_BAD_VERSION_0": ("version", _file(head=b"GGUF" + _u32(0))),
    "HEADER_BAD_VERSION_1": ("version", _file(head=b"GGUF" + _u32(1))),
    "HEADER_BAD_VERSION_FUTURE": ("version", _file(head=b"GGUF" + _u32(4))),
    "HEADER_BAD_N_TENSORS": ("n_tensors", _file([], [], b"", n_tensors=2**64 - 1)),
    "HEADER_BAD_N_KV": ("n_kv", _file([], [], b"", n_kv=2**64 - 1)),
    "KV_BAD_KEY_SIZE": ("key", _with(_text("my_key_0", 2**64 - 1) + _u32(U32) + _u32(1))),
    "KV_EMPTY_KEY": ("key", _with(_kv("", U32, _u32(1)))),
    "KV_BAD_TYPE": ("type of 'my_key_0'", _with(_kv("my_key_0", 13, b"\0"))),
    "KV_DUPLICATE_KEY": ("key 'k'.*twice", _file([*KVS, *[_kv("k", U32, _u32(1))] * 2])),
    "KV_BAD_ALIGN": ("general.alignment", _alignment(U32, _u32(13), 13)),
    "KV_WRONG_TYPE_ALIGN": ("general.alignment.*INT32", _alignment(I32, _u32(13), 13)),
    "TENSORS_BAD_NAME_SIZE": (
        "tensor name",
        _one(_info("my_tensor_0_with_a_very_long_name_which_is_longer_than_what_is_allowed")),
    ),
    "TENSORS_BAD_N_DIMS": ("dimensions of 'a'", _one(_info(n_dims=5))),
    "TENSORS_BAD_SHAPE": ("file size", _one(_info(extents=(2**64 - 1,)))),
    "TENSORS_NE_TOO_BIG": ("file size", _one(_info(extents=(4 * (2**31 - 1),) * 2))),
    "TENSORS_NBYTES_TOO_BIG": ("file size", _one(_info(extents=(1534000000,) * 2, type=27))),
    "TENSORS_NBYTES_PAD_WRAP": ("file size", _one(_info(extents=(4, 2**30 - 1, 2**30 + 1)))),
    "TENSORS_BAD_TYPE": ("type of 'a'", _one(_info(type=43))),
    "TENSORS_BAD_OFFSET": ("offset of 'a'", _one(_info(offset=2**64 - 1))),
    "TENSORS_DUPLICATE_NAME": ("tensor 'a'.*twice", _file(infos=[INFOS[0]] * 2)),
    "TENSORS_BAD_ALIGN": ("general.alignment", _alignment(U32, _u32(13), 13)),
    "TENSORS_INCONSISTENT_ALIGN": ("offset of 'b'", _file(infos=TIGHT, data=DATA)),
    "DATA_NOT_ENOUGH_DATA": ("file size", _file(data=DATA[:111])),
    "DATA_BAD_ALIGN": ("general.alignment", _alignment(U32, _u32(13), 13)),
    "DATA_INCONSISTENT_ALIGN": ("offset of 'b'", _file(infos=TIGHT, data=bytes(72))),
    "DATA_MEM_SIZE_OVERFLOW": (
        "offset of 'b'|file size",
        _file(infos=[_info("a", (2**63 - 64,), 24, 0), _info("b", (2**63 - 64,), 24, 2**63 - 64)],
              data=bytes(32)),
    ),
}  # fmt: skip
LOADS_THERE = {"TENSORS_ZERO_DIM", "KV_SUCCESS", "HEADER_EMPTY"}


@pytest.mark.parametrize("name", UPSTREAM)
def test_what_llama_cpp_must_refuse_is_refused_here(name: str, tmp_path: Path) -> None:
    field, data = UPSTREAM[name]
    path = tmp_path / "x.gguf"
    path.write_bytes(data)
    assert re.search(field, refusal(path))


def test_the_table_has_every_case_that_llama_cpp_must_refuse() -> None:
    source = (find_llama_cpp() / "tests" / "test-gguf.cpp").read_text()
    cases = set(re.findall(r"^ {4}HANDCRAFTED_(\w+) +=", source, re.M)) - LOADS_THERE
    assert {name for name in cases if not name.endswith(("_SUCCESS", "_CUSTOM_ALIGN"))} == (
        UPSTREAM.keys()
    )


# --- LoRA adapters ----------------------------------------------------------------------------------

Tensors = dict[str, tuple[tuple[int, ...], GGMLType]]
MODEL: Tensors = {
    "token_embd.weight": ((32, 8), GGMLType.F32),
    "blk.0.attn_q.weight": ((8, 8), GGMLType.F32),
    "blk.0.attn_norm.weight": ((8,), GGMLType.F32),
}
A, B = "blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"
PAIR: Tensors = {A: ((4, 8), GGMLType.F32), B: ((8, 4), GGMLType.F32)}
LORA = {
    key: Value(ValueType.STRING, text)
    for key, text in (
        ("general.architecture", "llama"), ("general.type", "adapter"), ("adapter.type", "lora"),
    )
}  # fmt: skip
ALPHA = "adapter.lora.alpha"


def write(path: Path, metadata: dict[str, Value], tensors: Tensors) -> Path:
    out = [
        OutTensor(n, shape, kind, bytes(nbytes(shape, kind)))
        for n, (shape, kind) in tensors.items()
    ]
    write_gguf(path, metadata, out)
    return path


def words(key: str, text: str | None) -> dict[str, Value]:
    if text is None:
        return {name: value for name, value in LORA.items() if name != key}
    return {**LORA, key: Value(ValueType.STRING, text)}


def number(kind: ValueType, value: float) -> dict[str, Value]:
    return {**LORA, ALPHA: Value(kind, value)}


F = GGMLType.F32
BAD_LORA: dict[str, tuple[str, dict[str, Value], Tensors]] = {
    "no tensors": ("tensors", LORA, {}),
    "only A": (A, LORA, {A: PAIR[A]}),
    "only B": (B, LORA, {B: PAIR[B]}),
    "a norm beside": ("blk.0.attn_norm", LORA, {**PAIR, "blk.0.attn_norm.weight": ((8,), F)}),
    "a norm with factors": (
        "blk.0.attn_norm", LORA,
        {"blk.0.attn_norm.weight.lora_a": ((4, 8), F), "blk.0.attn_norm.weight.lora_b": ((8, 4), F)},
    ),
    "the embedding": (
        "token_embd", LORA,
        {"token_embd.weight.lora_a": ((4, 8), F), "token_embd.weight.lora_b": ((32, 4), F)},
    ),
    "a layer that there is not": (
        "blk.7", LORA, {name.replace("blk.0", "blk.7"): value for name, value in PAIR.items()},
    ),
    "a module by its Hugging Face name": (
        "q_proj", LORA, {"q_proj.lora_a": PAIR[A], "q_proj.lora_b": PAIR[B]},
    ),
    "factors with capitals": ("lora_A", LORA, {"blk.0.attn_q.weight.lora_A": PAIR[A], B: PAIR[B]}),
    "another width": ("attn_q", LORA, {**PAIR, A: ((4, 16), F)}),
    "another height": ("attn_q", LORA, {**PAIR, B: ((16, 4), F)}),
    "ranks that differ": ("attn_q", LORA, {**PAIR, A: ((5, 8), F)}),
    "factors transposed": ("attn_q", LORA, {A: ((8, 4), F), B: ((4, 8), F)}),
    "factors swapped": ("attn_q", LORA, {A: PAIR[B], B: PAIR[A]}),
    "A with three dimensions": ("attn_q", LORA, {**PAIR, A: ((2, 4, 8), F)}),
    "B with one dimension": ("attn_q", LORA, {**PAIR, B: ((32,), F)}),
    **{
        f"A of {kind.name}": (f"type of {A}", LORA, {**PAIR, A: ((4, 8), kind)})
        for kind in GGMLType
        if type_traits(kind)[0] == 1 and kind.name not in ("F32", "F16", "BF16")
    },
    "B of I32": (f"type of {B}", LORA, {**PAIR, B: ((8, 4), GGMLType.I32)}),
    "an alpha of twice the rank": (ALPHA, number(ValueType.FLOAT32, 8.0), PAIR),
    "an alpha of 0": (ALPHA, number(ValueType.FLOAT32, 0.0), PAIR),
    "a negative alpha": (ALPHA, number(ValueType.FLOAT32, -4.0), PAIR),
    "an alpha that is no number": (ALPHA, number(ValueType.FLOAT32, float("nan")), PAIR),
    "an integer alpha": (ALPHA, number(ValueType.UINT32, 4), PAIR),
    "an alpha in words": (ALPHA, words(ALPHA, "4"), PAIR),
    "an activated LoRA": (
        "adapter.alora", {**LORA, "adapter.alora.invocation_tokens": Value(ValueType.UINT32, 1)}, PAIR,
    ),
    "another architecture": ("general.architecture", words("general.architecture", "qwen2"), PAIR),
    "no architecture": ("general.architecture", words("general.architecture", None), PAIR),
    "a model": ("general.type", words("general.type", "model"), PAIR),
    "no type": ("general.type", words("general.type", None), PAIR),
    "a control vector": ("adapter.type", words("adapter.type", "control_vector"), PAIR),
    "no type of adapter": ("adapter.type", words("adapter.type", None), PAIR),
}  # fmt: skip


def model(folder: Path) -> GGUFModel:
    found = read_gguf(
        write(folder / "base.gguf", {"general.architecture": LORA["general.architecture"]}, MODEL)
    )
    return GGUFModel((found,), found.metadata, found.tensors)


def test_a_good_adapter_is_accepted(tmp_path: Path) -> None:
    good = write(tmp_path / "a.gguf", number(ValueType.FLOAT32, 4.0), PAIR)
    assert check_adapter_header(good, model(tmp_path)).tensors.keys() == PAIR.keys()


@pytest.mark.parametrize("case", BAD_LORA)
def test_a_malformed_lora_is_one_typed_error(case: str, tmp_path: Path) -> None:
    field, metadata, tensors = BAD_LORA[case]
    path = write(tmp_path / "a.gguf", metadata, tensors)
    with pytest.raises(EngineError) as caught:
        check_adapter_header(path, model(tmp_path))
    assert str(path) in str(caught.value)
    assert any(field in problem.field for problem in caught.value.problems)


def test_there_are_enough_classes() -> None:
    assert len({data for _, data in test_gguf_hostile.HOSTILE.values()}) >= 60
    assert len(test_onnx_file.BAD) >= 45
    assert len(BAD_LORA) >= 25
