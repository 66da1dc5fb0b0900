"""The strict GGUF reader against gguf-py: files, what the writer wrote, shards, data."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_gguf_hostile import DATA, TINY

from safegene_converter.bases.hf_to_gguf import find_llama_cpp
from safegene_converter.gguf.writer import OutTensor, write_gguf
from safegene_runtime.errors import FormatError
from safegene_runtime.formats.gguf.header import GGUFFile, TensorInfo, read_gguf
from safegene_runtime.formats.gguf.model import open_model
from safegene_runtime.formats.gguf.tensors import map_tensor, read_tensor_bytes
from safegene_runtime.formats.gguf.types import (
    GGMLType,
    Texts,
    Value,
    ValueType,
    nbytes,
    type_traits,
)

# --- good files ------------------------------------------------------------------------------------


def _assert_same_as_gguf_py(path: Path) -> GGUFFile:
    """Metadata, shapes, types, offsets and bytes, all of them, in the same order."""
    mine, theirs = read_gguf(path), gguf.GGUFReader(path)
    fields = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert list(mine.metadata) == list(fields)
    assert mine.alignment == theirs.alignment
    assert mine.data_offset == theirs.data_offset
    for key, field in fields.items():
        value = mine.metadata[key]
        contents = field.contents()
        assert int(value.type) == int(field.types[0]), key
        if value.type is ValueType.ARRAY:
            assert value.element_type is not None
            assert int(value.element_type) == int(field.parts[3][0]), key
            assert value.value == tuple(contents), key
            assert not contents or type(value.value[0]) is type(contents[0]), key
        else:
            assert value.value == contents, key
            assert type(value.value) is type(contents), key
    assert list(mine.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        info = mine.tensors[tensor.name]
        assert info.shape == tuple(reversed(tensor.shape.tolist()))
        assert int(info.type) == int(tensor.tensor_type)
        assert (info.offset, info.nbytes) == (tensor.data_offset, tensor.n_bytes)
        assert read_tensor_bytes(info) == tensor.data.tobytes()
        assert map_tensor(info).tobytes() == tensor.data.tobytes()
    return mine


def _finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _blocks(type: gguf.GGMLQuantizationType, rows: int, seed: int) -> np.ndarray:
    """Random bytes as rows of one block each; the reader does not look inside."""
    size = gguf.GGML_QUANT_SIZES[type][1]
    return np.random.default_rng(seed).integers(0, 256, (rows, size), np.uint8)


def test_every_value_type_is_read_as_gguf_py_wrote_it(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    extremes = {
        "uint8": 255, "int8": -128, "uint16": 65535, "int16": -32768, "uint32": 2**32 - 1,
        "int32": -(2**31), "uint64": 2**64 - 1, "int64": -(2**63), "float32": 0.1,
        "float64": 0.1, "bool": True, "string": "héllo 世界 \U0001f600\n\t",
    }  # fmt: skip
    for name, value in extremes.items():
        getattr(writer, f"add_{name}")(f"test.{name}", value)
    for type in gguf.GGUFValueType:
        if type.name not in ("ARRAY", "STRING"):
            value = extremes[type.name.lower()]
            writer.add_key_value(f"array.{type.name}", [value, 0], gguf.GGUFValueType.ARRAY, type)
    writer.add_bool("test.false", False)
    writer.add_array("array.strings", ["", "a", "世界", "x" * 70_000])
    writer.add_key_value("empty.string", "", gguf.GGUFValueType.STRING)
    _finish(writer)
    found = _assert_same_as_gguf_py(tmp_path / "x.gguf")
    assert {value.type for value in found.metadata.values()} == set(ValueType)
    elements = {value.element_type for value in found.metadata.values()} - {None}
    assert elements == set(ValueType) - {ValueType.ARRAY}
    assert found.get("test.uint64") == 2**64 - 1
    assert found.get("test.missing", "default") == "default"


@pytest.mark.parametrize("alignment", [None, 32, 64, 256, 4096, 65536])
def test_every_tensor_type_is_read_as_gguf_py_wrote_it(
    tmp_path: Path, alignment: int | None
) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    types = set(gguf.GGMLQuantizationType) - {gguf.GGMLQuantizationType.Q8_1}
    for index, type in enumerate(sorted(types)):
        writer.add_tensor(f"t.{type.name}", _blocks(type, 1 + index % 3, index), raw_dtype=type)
    writer.add_tensor("one", np.ones(7, np.float32))
    writer.add_tensor("four", np.arange(2 * 3 * 4 * 5, dtype=np.float16).reshape(2, 3, 4, 5))
    _finish(writer)
    found = _assert_same_as_gguf_py(tmp_path / "x.gguf")
    assert found.alignment == (alignment or 32)
    assert {int(info.type) for info in found.tensors.values()} == types


def test_the_sizes_of_blocks_are_gguf_pys() -> None:
    theirs = {int(type): sizes for type, sizes in gguf.GGML_QUANT_SIZES.items()}
    mine = {int(type): type_traits(type) for type in GGMLType}
    theirs[int(GGMLType.Q2_0)] = (64, 18)  # newer than gguf-py 0.19
    theirs[int(GGMLType.Q8_1)] = (32, 36)  # gguf-py has the block of 2023; no file holds this type
    assert mine == theirs


def test_a_real_model_is_read_as_gguf_py_reads_it() -> None:
    found = _assert_same_as_gguf_py(tiny.smollm2_gguf())
    assert len(found.tensors) == 272
    assert len(found.get("tokenizer.ggml.tokens")) == 49152


def test_strings_of_an_array_are_a_tuple_that_is_decoded_late() -> None:
    raw, meant = (b"a", b"", "世".encode(), b"\xff"), ("a", "", "世", "\udcff")
    stored = b"".join(struct.pack("<Q", len(text)) + text for text in raw)
    texts = Texts(stored, 4)
    assert texts == meant == texts == Texts(stored, 4)
    assert hash(texts) == hash(meant)
    assert (len(texts), texts[2:], list(texts)) == (4, meant[2:], [*meant])
    for other in (meant[:3], Texts(stored[:-9], 3), [*meant]):
        assert texts != other


@pytest.mark.parametrize("name", ["bert-bge", "deepseek-coder"])
def test_vocabularies_of_llama_cpp_are_read_as_gguf_py_reads_them(name: str) -> None:
    """Without tensors, without padding at the end, and with tokens that are not ASCII."""
    found = _assert_same_as_gguf_py(find_llama_cpp() / "models" / f"ggml-vocab-{name}.gguf")
    assert not found.tensors


def test_version_2_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(TINY.replace(b"GGUF\3", b"GGUF\2", 1))
    assert _assert_same_as_gguf_py(path).version == 2


def test_a_last_tensor_without_its_padding_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(TINY[:-16])
    assert list(_assert_same_as_gguf_py(path).tensors) == ["a", "b", "c"]


def test_the_file_that_the_hostile_ones_vary_is_good(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(TINY)
    found = _assert_same_as_gguf_py(path)
    assert found.get("tokens") == ("one", "", "three")
    assert found.get("ids") == (-1, 2)
    assert read_tensor_bytes(found.tensors["c"]) == DATA[96:112]


# --- what is written is what is read ---------------------------------------------------------------

_INTEGERS = {
    ValueType.UINT8: (0, 2**8 - 1), ValueType.INT8: (-(2**7), 2**7 - 1),
    ValueType.UINT16: (0, 2**16 - 1), ValueType.INT16: (-(2**15), 2**15 - 1),
    ValueType.UINT32: (0, 2**32 - 1), ValueType.INT32: (-(2**31), 2**31 - 1),
    ValueType.UINT64: (0, 2**64 - 1), ValueType.INT64: (-(2**63), 2**63 - 1),
}  # fmt: skip
_TEXTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
_SCALARS: dict[ValueType, st.SearchStrategy[Any]] = {
    **{type: st.integers(low, high) for type, (low, high) in _INTEGERS.items()},
    ValueType.FLOAT32: st.floats(width=32, allow_nan=False),
    ValueType.FLOAT64: st.floats(allow_nan=False),
    ValueType.BOOL: st.booleans(),
    ValueType.STRING: _TEXTS,
}
_NAMES = _TEXTS.filter(lambda name: 0 < len(name.encode()) <= 63)
_KEYS = _NAMES.filter(lambda key: key not in ("general.alignment", "general.architecture"))


@st.composite
def _values(draw: st.DrawFn) -> Value:
    type = draw(st.sampled_from(list(_SCALARS)))
    if draw(st.booleans()):
        return Value(type, draw(_SCALARS[type]))
    return Value(ValueType.ARRAY, tuple(draw(st.lists(_SCALARS[type], max_size=5))), type)


@st.composite
def _tensors(draw: st.DrawFn, name: str) -> OutTensor:
    type = draw(st.sampled_from(list(GGMLType)))
    outer = draw(st.lists(st.integers(1, 3), max_size=3))
    shape = (*outer, draw(st.integers(1, 3)) * type_traits(type)[0])
    size = nbytes(shape, type)
    return OutTensor(name, shape, type, draw(st.binary(min_size=1, max_size=1)) * size)


@st.composite
def _models(draw: st.DrawFn) -> tuple[dict[str, Value], list[OutTensor]]:
    metadata = draw(st.dictionaries(_KEYS, _values(), max_size=6))
    if draw(st.booleans()):
        metadata["general.alignment"] = Value(
            ValueType.UINT32, draw(st.sampled_from([32, 64, 128]))
        )
    names = draw(st.lists(_NAMES, max_size=4, unique=True))
    return metadata, [draw(_tensors(name)) for name in names]


@settings(
    max_examples=80,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(model=_models())
def test_what_is_written_is_what_is_read(
    tmp_path: Path, model: tuple[dict[str, Value], list[OutTensor]]
) -> None:
    metadata, tensors = model
    path = tmp_path / "x.gguf"
    path.unlink(missing_ok=True)
    write_gguf(path, metadata, tensors)
    found = read_gguf(path)
    assert list(found.metadata.items()) == list(metadata.items())
    assert [(i.name, i.shape, i.type) for i in found.tensors.values()] == [
        (tensor.name, tensor.shape, tensor.type) for tensor in tensors
    ]
    for tensor in tensors:
        assert read_tensor_bytes(found.tensors[tensor.name]) == tensor.source


# --- shards ----------------------------------------------------------------------------------------


def _shards(folder: Path, n_tensors: int = 5, **options: Any) -> list[Path]:
    options = {"split_max_tensors": 2, **options}
    writer = gguf.GGUFWriter(folder / "x.gguf", "llama", **options)
    writer.add_string("general.name", "shards")
    for index in range(n_tensors):
        writer.add_tensor(f"t{index}", np.full((2, 8), index, np.float32))
    _finish(writer)
    return sorted(folder.glob("x-*.gguf"))


@pytest.mark.parametrize("small_first_shard", [False, True])
def test_shards_are_read_as_one_model(tmp_path: Path, small_first_shard: bool) -> None:
    paths = _shards(tmp_path, small_first_shard=small_first_shard)
    model = open_model(paths[0])
    assert [shard.path for shard in model.shards] == paths
    assert len(paths) == 3 + small_first_shard
    assert model.get("general.name") == "shards"
    assert list(model.tensors) == [f"t{index}" for index in range(5)]
    for path in paths:
        _assert_same_as_gguf_py(path)
    for index, info in enumerate(model.tensors.values()):
        assert read_tensor_bytes(info) == np.full((2, 8), index, np.float32).tobytes()


def test_a_file_without_split_keys_is_a_model_of_one_shard(tmp_path: Path) -> None:
    path = tmp_path / "x-00002-of-00007.gguf"  # the name alone says nothing
    path.write_bytes(TINY)
    assert len(open_model(path).shards) == 1


def _rewrite(
    path: Path,
    change: Callable[[dict[str, Value]], object] = lambda metadata: None,
    rename: Callable[[str], str] = lambda name: name,
) -> None:
    """Writes a shard again with other metadata or tensor names."""
    found = read_gguf(path)
    metadata = dict(found.metadata)
    change(metadata)
    tensors = [
        OutTensor(rename(i.name), i.shape, i.type, read_tensor_bytes(i))
        for i in found.tensors.values()
    ]
    path.unlink()
    write_gguf(path, metadata, tensors)


def _set(key: str, value: Any, type: ValueType = ValueType.UINT16) -> Callable[[Path], None]:
    return lambda path: _rewrite(path, lambda metadata: metadata.update({key: Value(type, value)}))


def _drop(key: str) -> Callable[[Path], None]:
    return lambda path: _rewrite(path, lambda metadata: metadata.pop(key))


# name -> (what the message must name, which shard, what is done to it)
BAD_SHARDS: dict[str, tuple[str, int, Callable[[Path], object]]] = {
    "second shard missing": ("00002-of-00003.gguf: shard", 1, Path.unlink),
    "last shard missing": ("00003-of-00003.gguf: shard", 2, Path.unlink),
    "second shard dangling": (
        "00002-of-00003.gguf: shard",
        1,
        lambda path: (path.unlink(), path.symlink_to("nowhere")),
    ),
    "second shard a directory": (
        "regular file",
        1,
        lambda path: (path.unlink(), path.mkdir()),
    ),
    "second shard cut": ("00002-of.*file size", 1, lambda path: os.truncate(path, 200)),
    "split.count too large": ("split.count", 0, _set("split.count", 4)),
    "split.count too small": ("split.count", 0, _set("split.count", 2)),
    "split.count 65535": ("split.count", 0, _set("split.count", 65535)),
    "split.count negative": ("split.count", 0, _set("split.count", -3, ValueType.INT32)),
    "split.count 3.0": ("split.count", 0, _set("split.count", 3.0, ValueType.FLOAT32)),
    "split.count as text": ("split.count", 0, _set("split.count", "3", ValueType.STRING)),
    "split.count wrong in the second": ("00002.*split.count", 1, _set("split.count", 4)),
    "split.count missing in the second": ("00002.*split.count", 1, _drop("split.count")),
    "split.no wrong in the first": ("split.no", 0, _set("split.no", 1)),
    "split.no missing in the first": ("split.no", 0, _drop("split.no")),
    "split.no wrong in the second": ("00002.*split.no", 1, _set("split.no", 2)),
    "split.no missing in the second": ("00002.*split.no", 1, _drop("split.no")),
    "split.tensors.count too large": (
        "split.tensors.count.*got 6",
        0,
        _set("split.tensors.count", 6, ValueType.INT32),
    ),
    "split.tensors.count missing": ("split.tensors.count", 0, _drop("split.tensors.count")),
    "a tensor in two shards": (
        "tensor 't0'",
        2,
        lambda path: _rewrite(path, rename=lambda name: "t0"),
    ),
}


@pytest.mark.parametrize("name", BAD_SHARDS)
def test_shards_that_contradict_each_other_are_refused(tmp_path: Path, name: str) -> None:
    field, index, damage = BAD_SHARDS[name]
    paths = _shards(tmp_path)
    damage(paths[index])
    with pytest.raises(FormatError) as caught:
        open_model(paths[0])
    assert re.search(field, str(caught.value)), caught.value
    assert all(problem.fix for problem in caught.value.problems)


def test_shards_that_changed_places_are_refused(tmp_path: Path) -> None:
    paths = _shards(tmp_path, 6)
    os.rename(paths[1], tmp_path / "held")
    os.rename(paths[2], paths[1])
    os.rename(tmp_path / "held", paths[2])
    with pytest.raises(FormatError) as caught:
        open_model(paths[0])
    assert [problem.field for problem in caught.value.problems] == ["split.no"] * 2


def test_a_model_is_opened_by_its_first_shard_only(tmp_path: Path) -> None:
    paths = _shards(tmp_path)
    with pytest.raises(FormatError, match=r"(?s)split\.no.*pass x-00001-of-00003\.gguf"):
        open_model(paths[1])
    paths[0].rename(tmp_path / "model.gguf")
    with pytest.raises(FormatError, match="restore the name"):
        open_model(tmp_path / "model.gguf")


# --- data ------------------------------------------------------------------------------------------


def _shortened(tmp_path: Path) -> TensorInfo:
    path = tmp_path / "x.gguf"
    path.write_bytes(TINY)
    info = read_gguf(path).tensors["c"]
    os.truncate(path, info.offset + info.nbytes - 1)
    return info


@pytest.mark.parametrize("read", [read_tensor_bytes, map_tensor])
def test_a_file_that_became_shorter_is_noticed(
    tmp_path: Path, read: Callable[[TensorInfo], Any]
) -> None:
    with pytest.raises(FormatError, match="c: expected 16 bytes, got 15 bytes"):
        read(_shortened(tmp_path))


def test_a_mapped_tensor_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(TINY)
    mapped = map_tensor(read_gguf(tmp_path / "x.gguf").tensors["a"])
    with pytest.raises(ValueError, match="read-only"):
        mapped[0] = 1
