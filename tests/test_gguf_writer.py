"""The GGUF writer: gguf-py writes the same bytes, and what is copied stays what it was."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
import tiny

from safegene_converter.gguf.writer import OutTensor, encode_header, write_gguf
from safegene_runtime.errors import FormatError, OutputError
from safegene_runtime.formats.gguf.header import GGUFFile, read_gguf
from safegene_runtime.formats.gguf.tensors import read_tensor_bytes
from safegene_runtime.formats.gguf.types import GGMLType, Value, ValueType
from safegene_runtime.formats.publish import publish_folder

METADATA = {
    "general.architecture": Value(ValueType.STRING, "llama"),
    "general.name": Value(ValueType.STRING, "héllo 世界"),
    "test.u8": Value(ValueType.UINT8, 255),
    "test.i64": Value(ValueType.INT64, -(2**63)),
    "test.u64": Value(ValueType.UINT64, 2**64 - 1),
    "test.f32": Value(ValueType.FLOAT32, 0.5),
    "test.f64": Value(ValueType.FLOAT64, 0.1),
    "test.bool": Value(ValueType.BOOL, True),
    "test.strings": Value(ValueType.ARRAY, ("a", "", "世界"), ValueType.STRING),
    "test.ints": Value(ValueType.ARRAY, (-1, 2**31 - 1), ValueType.INT32),
    "test.floats": Value(ValueType.ARRAY, (0.5, -1.0), ValueType.FLOAT32),
    "test.bools": Value(ValueType.ARRAY, (True, False), ValueType.BOOL),
}


def _rows(seed: int, shape: tuple[int, ...] = (3, 32)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _tensors() -> list[OutTensor]:
    """Three types, each with padding after it."""
    q8 = gguf.quants.quantize(_rows(1, (2, 64)), gguf.GGMLQuantizationType.Q8_0)
    return [
        OutTensor("a", (3, 7), GGMLType.F32, _rows(0, (3, 7))),
        OutTensor("b", (2, 64), GGMLType.Q8_0, q8.tobytes()),
        OutTensor("c", (5,), GGMLType.F16, lambda: _rows(2, (5,)).astype(np.float16)),
    ]


def _with_gguf_py(path: Path, alignment: int | None) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in METADATA.items():
        plain = list(value.value) if value.type is ValueType.ARRAY else value.value
        sub = gguf.GGUFValueType(int(value.element_type)) if value.element_type else None
        writer.add_key_value(key, plain, gguf.GGUFValueType(int(value.type)), sub)
    if alignment:
        writer.add_custom_alignment(alignment)
    for tensor in _tensors():
        data = tensor.source() if callable(tensor.source) else tensor.source
        if isinstance(data, bytes):
            data = np.frombuffer(data, np.uint8).reshape(2, -1)
            writer.add_tensor(tensor.name, data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(tensor.name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("alignment", [None, 32, 64, 4096])
def test_the_bytes_are_those_of_gguf_py(tmp_path: Path, alignment: int | None) -> None:
    _with_gguf_py(tmp_path / "theirs.gguf", alignment)
    metadata = dict(METADATA)
    if alignment:
        metadata["general.alignment"] = Value(ValueType.UINT32, alignment)
    write_gguf(tmp_path / "ours.gguf", metadata, _tensors())
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


def _copied(found: GGUFFile, **sources: Any) -> list[OutTensor]:
    return [
        OutTensor(info.name, info.shape, info.type, sources.get(info.name, info))
        for info in found.tensors.values()
    ]


def test_a_real_model_is_copied_byte_by_byte(tmp_path: Path) -> None:
    source = read_gguf(tiny.smollm2_gguf())
    out, seen = tmp_path / "out.gguf", []
    assert write_gguf(out, source.metadata, _copied(source), progress=seen.append).tensors == {}
    with source.path.open("rb") as theirs, out.open("rb") as ours:
        assert hashlib.file_digest(theirs, "sha256").digest() == (
            hashlib.file_digest(ours, "sha256").digest()
        )
    assert sum(seen) == source.size_bytes
    out.unlink()


def _refuse_to_copy(number: int) -> Callable[..., int]:
    def refuse(*_: Any) -> int:
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("failure", [errno.EXDEV, errno.ENOSYS, errno.EPERM, errno.EINVAL, 0])
def test_where_the_kernel_cannot_copy_we_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: int
) -> None:
    """0 stands for kernels that say "0 bytes copied" where they mean "I cannot"."""
    write_gguf(tmp_path / "a.gguf", METADATA, _tensors())
    source = read_gguf(tmp_path / "a.gguf")
    copy = _refuse_to_copy(failure) if failure else lambda *_: 0
    monkeypatch.setattr(os, "copy_file_range", copy)
    write_gguf(
        tmp_path / "b.gguf", METADATA, _copied(source, b=read_tensor_bytes(source.tensors["b"]))
    )
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "a.gguf").read_bytes()


def test_a_copy_that_fails_half_way_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tmp_path / "a.gguf", METADATA, _tensors())
    monkeypatch.setattr(os, "copy_file_range", _refuse_to_copy(errno.EIO))
    with pytest.raises(OutputError, match=r"out\.gguf.*Input/output error"):
        write_gguf(tmp_path / "out.gguf", METADATA, _copied(read_gguf(tmp_path / "a.gguf")))
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_what_is_not_replaced_keeps_its_bytes(tmp_path: Path) -> None:
    source = read_gguf(tiny.gguf_model("llama"))
    name = "blk.1.ffn_up.weight"
    old = np.frombuffer(read_tensor_bytes(source.tensors[name]), np.float32)
    new = (old * 2).reshape(source.tensors[name].shape)
    written = write_gguf(tmp_path / "x.gguf", source.metadata, _copied(source, **{name: new}))
    digests = written.tensors
    assert written.sha256 == hashlib.sha256((tmp_path / "x.gguf").read_bytes()).hexdigest()
    found = read_gguf(tmp_path / "x.gguf")
    assert found.metadata == source.metadata
    assert digests == {name: hashlib.sha256(new.tobytes()).hexdigest()}
    for key, info in found.tensors.items():
        expected = new.tobytes() if key == name else read_tensor_bytes(source.tensors[key])
        assert read_tensor_bytes(info) == expected, key
    assert old.tobytes() != new.tobytes()


def test_a_tensor_may_change_its_type_and_all_others_move(tmp_path: Path) -> None:
    source = read_gguf(tiny.gguf_model("llama"))
    name = "blk.0.attn_q.weight"
    half = np.frombuffer(read_tensor_bytes(source.tensors[name]), "<f4").astype("<f2")
    tensors = [
        OutTensor(name, tensor.shape, GGMLType.F16, half) if tensor.name == name else tensor
        for tensor in _copied(source)
    ]
    write_gguf(tmp_path / "x.gguf", source.metadata, tensors)
    found = read_gguf(tmp_path / "x.gguf")
    assert found.size_bytes == source.size_bytes - half.nbytes
    for key, info in found.tensors.items():
        expected = half.tobytes() if key == name else read_tensor_bytes(source.tensors[key])
        assert read_tensor_bytes(info) == expected, key


def test_tensors_of_several_files_and_alignments_come_together(tmp_path: Path) -> None:
    wide = {**METADATA, "general.alignment": Value(ValueType.UINT32, 256)}
    write_gguf(tmp_path / "wide.gguf", wide, _tensors())
    write_gguf(tmp_path / "narrow.gguf", METADATA, _tensors())
    infos = [
        ("c.w", read_gguf(tmp_path / "wide.gguf").tensors["c"]),
        ("a.w", read_gguf(tmp_path / "wide.gguf").tensors["a"]),
        ("b.w", read_gguf(tmp_path / "wide.gguf").tensors["b"]),
        ("b.n", read_gguf(tmp_path / "narrow.gguf").tensors["b"]),
        ("c.n", read_gguf(tmp_path / "narrow.gguf").tensors["c"]),
    ]
    for name, metadata in (("x", METADATA), ("y", wide)):
        out = tmp_path / f"{name}.gguf"
        write_gguf(out, metadata, [OutTensor(n, i.shape, i.type, i) for n, i in infos])
        for (key, info), found in zip(infos, read_gguf(out).tensors.values(), strict=True):
            assert found.name == key
            assert read_tensor_bytes(found) == read_tensor_bytes(info)


def test_neighbours_by_offset_in_different_files_are_not_neighbours(tmp_path: Path) -> None:
    infos = []
    for number, name in enumerate("xyz"):
        rows = [OutTensor(n, (8,), GGMLType.F32, np.full(8, number, np.float32)) for n in "xyz"]
        write_gguf(tmp_path / name, METADATA, rows)
        infos.append(read_gguf(tmp_path / name).tensors[name])
    assert infos[1].offset == infos[0].offset + infos[0].nbytes
    write_gguf(tmp_path / "out", METADATA, [OutTensor(i.name, i.shape, i.type, i) for i in infos])
    for number, found in enumerate(read_gguf(tmp_path / "out").tensors.values()):
        assert read_tensor_bytes(found) == np.full(8, number, np.float32).tobytes()


def test_equal_inputs_give_equal_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_gguf(tmp_path / name, METADATA, _tensors())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_values_that_are_not_utf8_are_copied_exactly(tmp_path: Path) -> None:
    raw = b"\xff\xfe token \xed\xa0\x80"
    tokens = (raw.decode("utf-8", "surrogateescape"), "ok")
    metadata = {"tokens": Value(ValueType.ARRAY, tokens, ValueType.STRING)}
    write_gguf(tmp_path / "a", metadata, [])
    assert raw in (tmp_path / "a").read_bytes()
    assert read_gguf(tmp_path / "a").metadata == metadata


# --- sources ---------------------------------------------------------------------------------------


def test_a_source_that_is_a_function_is_called_once_and_in_its_turn(tmp_path: Path) -> None:
    calls: list[str] = []
    done: list[int] = []

    def source(name: str) -> Callable[[], np.ndarray]:
        def make() -> np.ndarray:
            assert sum(done[1:]) == 128 * len(calls), (
                "after the header, the one before is already written"
            )
            calls.append(name)
            return np.full((1, 32), len(calls), np.float32)

        return make

    names = ["z", "a", "m"]
    tensors = [OutTensor(name, (1, 32), GGMLType.F32, source(name)) for name in names]
    written = write_gguf(tmp_path / "x.gguf", METADATA, tensors, progress=done.append)
    digests = written.tensors
    assert written.sha256 == hashlib.sha256((tmp_path / "x.gguf").read_bytes()).hexdigest()
    assert calls == names
    assert list(digests) == names
    found = read_gguf(tmp_path / "x.gguf")
    for number, name in enumerate(names, 1):
        data = read_tensor_bytes(found.tensors[name])
        assert data == np.full((1, 32), number, np.float32).tobytes()
        assert digests[name] == hashlib.sha256(data).hexdigest()


def test_an_array_in_another_memory_order_is_written_row_by_row(tmp_path: Path) -> None:
    rows = _rows(0, (6, 4))
    tensors = [
        OutTensor("t", (4, 6), GGMLType.F32, rows.T),
        OutTensor("s", (3, 4), GGMLType.F32, rows[::2]),
    ]
    write_gguf(tmp_path / "x.gguf", METADATA, tensors)
    found = read_gguf(tmp_path / "x.gguf").tensors
    assert read_tensor_bytes(found["t"]) == np.ascontiguousarray(rows.T).tobytes()
    assert read_tensor_bytes(found["s"]) == rows[::2].tobytes()


def _boom() -> bytes:
    raise KeyboardInterrupt


BAD_SOURCES: dict[str, tuple[type[BaseException], Callable[[], Any]]] = {
    "too short": (FormatError, lambda: bytes(127)),
    "too long": (FormatError, lambda: bytes(129)),
    "empty": (FormatError, lambda: b""),
    "another type": (FormatError, lambda: np.zeros((1, 32), np.float64)),
    "interrupted": (KeyboardInterrupt, _boom),
}


@pytest.mark.parametrize("name", BAD_SOURCES)
@pytest.mark.parametrize("position", [0, 1])
def test_a_source_of_the_wrong_size_is_an_error_and_leaves_nothing(
    tmp_path: Path, name: str, position: int
) -> None:
    error, bad = BAD_SOURCES[name]
    tensors = [OutTensor(str(i), (1, 32), GGMLType.F32, lambda: bytes(128)) for i in range(2)]
    tensors[position] = OutTensor("bad", (1, 32), GGMLType.F32, bad)
    with pytest.raises(error, match="bad: source" if error is FormatError else None):
        write_gguf(tmp_path / "x.gguf", METADATA, tensors)
    assert os.listdir(tmp_path) == []
    with pytest.raises(error), publish_folder(tmp_path / "out") as folder:
        write_gguf(folder / "x.gguf", METADATA, tensors)
    assert os.listdir(tmp_path) == []


def test_a_range_of_another_size_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", METADATA, _tensors())
    info = read_gguf(tmp_path / "a.gguf").tensors["a"]
    with pytest.raises(FormatError, match="x: source: expected 128 bytes, got 84 bytes"):
        write_gguf(tmp_path / "x.gguf", METADATA, [OutTensor("x", (1, 32), GGMLType.F32, info)])
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_a_source_file_that_became_shorter_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", METADATA, _tensors())
    source = read_gguf(tmp_path / "a.gguf")
    os.truncate(source.path, source.tensors["c"].offset + 1)
    with pytest.raises(FormatError, match=r"(?s)a\.gguf.*changed while it was read"):
        write_gguf(tmp_path / "x.gguf", METADATA, _copied(source))
    assert os.listdir(tmp_path) == ["a.gguf"]


def test_a_file_is_never_overwritten_not_even_its_own_source(tmp_path: Path) -> None:
    write_gguf(tmp_path / "a.gguf", METADATA, _tensors())
    before = (tmp_path / "a.gguf").read_bytes()
    with pytest.raises(OutputError, match="exists"):
        write_gguf(tmp_path / "a.gguf", METADATA, _copied(read_gguf(tmp_path / "a.gguf")))
    (tmp_path / "link").symlink_to("a.gguf")
    with pytest.raises(OutputError, match="exists"):
        write_gguf(tmp_path / "link", METADATA, [])
    assert (tmp_path / "a.gguf").read_bytes() == before


def test_a_folder_that_is_missing_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No such file"):
        write_gguf(tmp_path / "missing" / "x.gguf", METADATA, [])


# --- what cannot be written ------------------------------------------------------------------------

_ARRAY, _U8, _I32, _F32 = ValueType.ARRAY, ValueType.UINT8, ValueType.INT32, ValueType.FLOAT32

BAD_VALUES: dict[str, Value] = {
    "u8 256": Value(_U8, 256),
    "u8 -1": Value(_U8, -1),
    "u8 of text": Value(_U8, "1"),
    "u8 of a float": Value(_U8, 1.5),
    "f32 that overflows": Value(_F32, 1e300),
    "bool 2": Value(ValueType.BOOL, 2),
    "text of a number": Value(ValueType.STRING, 1),
    "text with NUL": Value(ValueType.STRING, "a\0b"),
    "text with half a surrogate": Value(ValueType.STRING, "\ud800"),
    "array without element type": Value(_ARRAY, (1,)),
    "array of arrays": Value(_ARRAY, ((1,),), _ARRAY),
    "array of u8 256": Value(_ARRAY, (1, 256), _U8),
    "array of i32 2^31": Value(_ARRAY, (2**31,), _I32),
    "array of i32 1.5": Value(_ARRAY, (1.5,), _I32),
    "array of f32 that overflow": Value(_ARRAY, (1e300,), _F32),
    "array of bool 2": Value(_ARRAY, (True, 2), ValueType.BOOL),
    "array of text of a number": Value(_ARRAY, ("a", 1), ValueType.STRING),
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_a_value_that_gguf_cannot_hold_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(FormatError, match="the_key"):
        write_gguf(tmp_path / "x.gguf", {"the_key": BAD_VALUES[name]}, [])
    assert os.listdir(tmp_path) == []


BAD_TENSORS: dict[str, tuple[str, tuple[int, ...], GGMLType]] = {
    "no name": ("", (1, 32), GGMLType.F32),
    "a name of 64 bytes": ("n" * 64, (1, 32), GGMLType.F32),
    "a name of 64 bytes in 32 characters": ("é" * 32, (1, 32), GGMLType.F32),
    "a name with NUL": ("a\0b", (1, 32), GGMLType.F32),
    "a name with half a surrogate": ("\ud800", (1, 32), GGMLType.F32),
    "no dimensions": ("x", (), GGMLType.F32),
    "5 dimensions": ("x", (1, 1, 1, 1, 32), GGMLType.F32),
    "an extent of 0": ("x", (0, 32), GGMLType.F32),
    "rows that are not whole blocks": ("x", (2, 16), GGMLType.Q8_0),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_a_tensor_that_gguf_cannot_hold_is_refused(name: str) -> None:
    with pytest.raises(FormatError):
        encode_header({}, [BAD_TENSORS[name]])


@pytest.mark.parametrize("key", ["", "k" * 65536, "a\0b", "\udcff"])
def test_a_key_that_gguf_cannot_hold_is_refused(key: str) -> None:
    with pytest.raises(FormatError):
        encode_header({key: Value(_U8, 1)}, [])


def test_all_problems_of_a_header_are_told_at_once() -> None:
    tensors = [("x", (1, 32), GGMLType.F32)] * 2 + [("y", (0,), GGMLType.F32)]
    with pytest.raises(FormatError) as caught:
        encode_header({"": Value(_U8, 1)}, tensors, 48)
    assert [problem.field for problem in caught.value.problems] == [
        "alignment",
        "",
        "x",
        "shape of y",
    ]


@pytest.mark.parametrize(
    "stated",
    [
        Value(ValueType.UINT32, 0),
        Value(ValueType.UINT32, 48),
        Value(ValueType.UINT32, 2**17),
        Value(ValueType.STRING, "32"),
    ],
)
def test_an_alignment_that_readers_refuse_is_refused(tmp_path: Path, stated: Value) -> None:
    with pytest.raises(FormatError, match="alignment"):
        write_gguf(tmp_path / "x.gguf", {"general.alignment": stated}, [])


# --- libllama --------------------------------------------------------------------------------------


def _logits(path: Path) -> np.ndarray:
    model = llama_cpp.Llama(
        str(path), n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True, verbose=False
    )
    try:
        tokens = [1, 500, 37, 900, 7]
        model.eval(tokens)
        return np.array(model.scores[: len(tokens)])
    finally:
        model.close()


def test_libllama_computes_the_same_with_a_file_we_wrote(tmp_path: Path) -> None:
    source = read_gguf(tiny.gguf_model("llama"))
    by_hand = [
        OutTensor(i.name, i.shape, i.type, lambda i=i: read_tensor_bytes(i))
        for i in source.tensors.values()
    ]
    write_gguf(tmp_path / "same.gguf", source.metadata, by_hand)
    wide = {**source.metadata, "general.alignment": Value(ValueType.UINT32, 256)}
    write_gguf(tmp_path / "wide.gguf", wide, _copied(source))
    name = "blk.0.ffn_up.weight"
    zeros = np.zeros(source.tensors[name].shape, np.float32)
    write_gguf(tmp_path / "zeros.gguf", source.metadata, _copied(source, **{name: zeros}))
    expected = _logits(source.path)
    assert np.isfinite(expected).all()
    np.testing.assert_array_equal(_logits(tmp_path / "same.gguf"), expected)
    np.testing.assert_array_equal(_logits(tmp_path / "wide.gguf"), expected)
    assert np.abs(_logits(tmp_path / "zeros.gguf") - expected).max() > 1e-3
