"""docs/security.md names tests and commands that there are."""

from __future__ import annotations

import re

import tiny

ROOT = tiny.REPOSITORY
PAGE = (ROOT / "docs" / "security.md").read_text()


def test_every_promise_stands_in_the_table_once() -> None:
    promises = re.findall(r"^\| ([RTASP]\d+) \|", PAGE, re.M)
    wanted = [
        *(f"R{n}" for n in range(1, 11)), *(f"T{n}" for n in range(1, 7)),
        *(f"A{n}" for n in range(1, 5)), "S1", "S2", "P1", "P3",
    ]  # fmt: skip
    assert promises == wanted


def test_every_test_that_the_page_names_exists() -> None:
    named = re.findall(r"`(test_\w+\.py)(?:::(test_\w+))?`", PAGE)
    assert len(named) > 30
    for file, test in named:
        source = (ROOT / "tests" / file).read_text()
        assert not test or f"def {test}(" in source, f"{file}::{test}"


def test_every_command_that_the_page_names_exists() -> None:
    for path in re.findall(r"\b((?:tools|benchmarks)/\w+\.py)", PAGE):
        assert (ROOT / path).is_file(), path
    assert re.search(r"^fuzz:", (ROOT / "Makefile").read_text(), re.M)


def test_the_bounds_are_those_of_the_readers() -> None:
    from safegene_converter.inputs import safetensors_reader
    from safegene_runtime.formats.gguf import header
    from safegene_runtime.formats.onnx import file, wire

    for number in (
        header.MAX_KEYS, header.MAX_TENSORS, file.MAX_ITEMS, wire.MAX_FIELDS,
        safetensors_reader.MAX_TENSORS,
    ):  # fmt: skip
        assert f"{number:,}" in PAGE
    assert header.MAX_NUMBERS == wire.MAX_NUMBERS == 1 << 20


def test_the_pages_are_linked() -> None:
    assert "(security.md)" in (ROOT / "docs" / "README.md").read_text()
    assert "(docs/security.md)" in (ROOT / "SECURITY.md").read_text()
