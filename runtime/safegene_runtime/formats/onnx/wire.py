"""The wire format of protocol buffers, in which ONNX models are written, read from untrusted bytes.

https://protobuf.dev/programming-guides/encoding. Every length is checked against the bytes that are
there before anything is done with it. The caller says which fields a message has, and any other is
refused: another reader may know it.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from safegene_runtime.errors import FormatError, Problem

__all__ = ["BYTES", "FIXED32", "FIXED64", "VARINT", "Span", "WireReader", "to_signed", "wrong"]

MAX_FIELDS = 600_000
MAX_NUMBERS = 1 << 20
"""That are not stored as raw data: each costs more than its bytes."""
MAX_NAME = 4096

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5

Span = tuple[int, int]
"""Where a message or a list is: its first byte, and the one behind its last."""


def wrong(path: Path, what: str, expected: str, got: str, fix: str = "") -> FormatError:
    """What a reader of models raises, in one line of name, expected, got and next step."""
    return FormatError(Problem(str(path), what, expected, got, fix or "export the model again"))


class WireReader:
    """Walks the messages of one file; every position is an index into its bytes."""

    def __init__(self, path: Path, view: memoryview) -> None:
        self.path = path
        self.view = view
        self._fields = self._numbers = 0

    def fail(self, what: str, expected: object, got: object, fix: str = "") -> FormatError:
        """The error about this file, for the caller to raise."""
        return wrong(self.path, what, str(expected), str(got)[:200], fix)

    def varint(self, at: int, end: int, what: str) -> tuple[int, int]:
        """(value, next position); at most ten bytes, 64 bits."""
        value = shift = 0
        view = self.view
        while at < end and shift < 70:
            byte = view[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                if value >> 64:
                    break
                return value, at
            shift += 7
        raise self.fail(f"{what} at byte {at}", "a number of at most 64 bits", "more, or its end")

    def fields(
        self, span: Span, what: str, known: Mapping[int, int], repeated: frozenset[int]
    ) -> Iterator[tuple[int, Any]]:
        """(field, value) of one message: an int, or the span of bytes.

        Args:
            span: where the message is.
            what: its name, for messages.
            known: wire type by field number; a packed list may stand for its elements.
            repeated: fields that may come more than once.

        Raises:
            FormatError: a field that is unknown, of another wire type, given twice, or too long.
        """
        at, end = span
        seen: set[int] = set()
        while at < end:
            start = at
            key, at = self.varint(at, end, what)
            number, wire = key >> 3, key & 7
            if number not in known:
                raise self.fail(
                    f"{what} at byte {start}", "fields of onnx.proto", f"field {number}",
                    "is it an ONNX model, of a version that safegene knows?",
                )  # fmt: skip
            if number not in repeated:
                if number in seen:
                    raise self.fail(f"{what} at byte {start}", f"field {number} once", "twice")
                seen.add(number)
            packed = wire == BYTES and number in repeated and known[number] != BYTES
            if wire != known[number] and not packed:
                raise self.fail(
                    f"{what} at byte {start}", f"wire type {known[number]} of field {number}", wire
                )
            if wire == VARINT:
                value, at = self.varint(at, end, what)
                yield number, value
            elif wire == BYTES:
                length, at = self.varint(at, end, what)
                if length > end - at:
                    raise self.fail(
                        f"{what} at byte {start}", f"at most {end - at} bytes", f"{length} bytes"
                    )
                yield number, (at, at + length)
                at += length
            else:
                width = 8 if wire == FIXED64 else 4
                if width > end - at:
                    raise self.fail(f"{what} at byte {start}", f"{width} bytes", f"{end - at} left")
                yield number, (at, at + width)
                at += width
            self._fields += 1
            if self._fields > MAX_FIELDS:
                raise self.fail(what, f"at most {MAX_FIELDS} fields", "more")

    def text(self, span: Span, what: str) -> str:
        """A string field: UTF-8 without NUL."""
        raw = bytes(self.view[span[0] : span[1]])
        try:
            found = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(what, "UTF-8", error.reason) from error
        if "\0" in found:
            raise self.fail(what, "text without NUL", repr(found[:40]))
        return found

    def name(self, span: Span, what: str) -> str:
        """A string field that names something, of bounded length."""
        if span[1] - span[0] > MAX_NAME:
            raise self.fail(what, f"at most {MAX_NAME} bytes", f"{span[1] - span[0]}")
        return self.text(span, what)

    def pair(self, span: Span, what: str) -> tuple[str, str]:
        """(key, value) of a StringStringEntryProto."""
        key = text = ""
        for number, value in self.fields(span, what, {1: BYTES, 2: BYTES}, frozenset()):
            if number == 1:
                key = self.text(value, what)
            else:
                text = self.text(value, what)
        return key, text

    def float32(self, span: Span) -> float:
        """The number in a fixed32 field."""
        value: float = struct.unpack("<f", self.view[span[0] : span[1]])[0]
        return value

    def _count(self, more: int) -> None:
        self._numbers += more
        if self._numbers > MAX_NUMBERS:
            raise self.fail(
                "numbers", f"at most {MAX_NUMBERS} outside of raw data", "more",
                "save the tensors as raw_data",
            )  # fmt: skip

    def floats(self, span: Span) -> list[float]:
        """The numbers of one fixed32 field, or of a packed list of them."""
        if (span[1] - span[0]) % 4:
            raise self.fail("floats", "a multiple of 4 bytes", f"{span[1] - span[0]}")
        self._count((span[1] - span[0]) // 4)
        found: list[float] = np.frombuffer(self.view[span[0] : span[1]], "<f4").tolist()
        return found

    def integers(self, value: int | Span, signed: bool = True) -> list[int]:
        """The numbers of one varint field, or of a packed list of them."""
        if isinstance(value, int):
            self._count(1)
            return [to_signed(value) if signed else value]
        at, end = value
        self._count(int(np.count_nonzero(np.frombuffer(self.view[at:end], np.uint8) < 128)))
        found = []
        while at < end:
            one, at = self.varint(at, end, "numbers")
            found.append(to_signed(one) if signed else one)
        return found


def to_signed(value: int) -> int:
    """A 64-bit number in two's complement, as int32 and int64 fields hold it."""
    return value - (1 << 64) if value >> 63 else value
