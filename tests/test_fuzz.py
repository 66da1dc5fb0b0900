"""Every reader of files from outside is fuzzed for a moment, and the fuzzer sees what it is to see."""

from __future__ import annotations

import faulthandler
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny

from safegene_runtime.errors import FormatError, Problem

TOOLS = tiny.REPOSITORY / "tools"
FIGURES = re.compile(
    r"(?P<reader>\w+): (?P<executions>\d+) executions in .*; (?P<accepted>\d+) accepted, "
    r"(?P<compared>\d+) of them compared, (?P<loaded>\d+) loaded by libllama; "
    r"0 untyped errors, 0 hangs over 2 s, 0 growths over 64 MiB, 0 disagreements, "
    r"0 deaths of libllama"
)


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any]]:
    """The fuzzer and its readers, as modules."""
    monkeypatch.syspath_prepend(TOOLS)
    yield importlib.import_module("fuzz"), importlib.import_module("fuzz_readers")
    for name in ("fuzz", "fuzz_readers"):
        sys.modules.pop(name)


READERS = ("gguf", "lora", "safetensors", "onnx", "json", "peft")


def fuzzed(reader: str, seconds: int, executions: int) -> dict[str, int]:
    """The figures of a run with the engine that there is; which it was is printed.

    The seed is fixed: CI says whether what was found stays mended, `make fuzz` looks for more.
    """
    done = subprocess.run(
        [sys.executable, TOOLS / "fuzz.py", reader, "--seconds", str(seconds),
         "--executions", str(executions), "--seed", "1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = FIGURES.search(done.stdout)
    assert figures, done.stdout
    assert "edges covered" in done.stdout or "Atheris is not installed" in done.stdout
    return {name: int(figures[name]) for name in ("executions", "accepted", "compared", "loaded")}


@pytest.mark.timeout(120)
@pytest.mark.parametrize("reader", READERS)
def test_nothing_is_found_in_a_moment(reader: str) -> None:
    found = fuzzed(reader, 8, 1000)
    assert found["executions"] > 30
    assert found["accepted"]
    assert found["compared"] or reader == "json"
    assert found["loaded"] or reader not in ("gguf", "lora")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("reader", READERS)
def test_nothing_is_found_in_a_minute(reader: str) -> None:
    assert fuzzed(reader, 60, 20_000)["executions"] > 1000


# --- the fuzzer itself, on readers with one fault each ----------------------------------------------


def typed(path: Path, data: bytes) -> None:
    raise FormatError(Problem("x", "magic", "GGUF", "something else"))


def untyped(path: Path, data: bytes) -> None:
    {}[data]  # type: ignore[index]


def hanging(path: Path, data: bytes) -> None:
    while True:
        pass


def hoarding(path: Path, data: bytes) -> None:
    hoard = bytearray(192 << 20)
    hoard[::4096] = b"x" * len(hoard[::4096])
    raise FormatError(Problem("x", "size", "little", "much"))


@pytest.mark.parametrize(
    ("read", "kind"),
    [(typed, None), (untyped, "untyped error: KeyError"), (hanging, "hang"),
     (hoarding, "memory growth")],
)  # fmt: skip
def test_a_fault_of_a_reader_is_found_and_its_input_kept(
    read: Callable[[Path, bytes], None],
    kind: str | None,
    tools: tuple[Any, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fuzz, readers = tools
    monkeypatch.setattr(fuzz, "HANG_SECONDS", 0.1 if kind == "hang" else 2.0)
    run = fuzz.Run(readers.Reader(read), tmp_path, None)
    run.one(b"first")
    run.one(b"first")
    found = run.figures()["found"]
    if kind is None:
        assert not found
        return
    (key,) = found
    assert key.startswith(kind)
    kept = [path for path in (tmp_path / "findings").iterdir() if path.suffix != ".txt"]
    assert [path.read_bytes() for path in kept] == [b"first"]


class Asked:
    """Another reader, with prepared answers."""

    missing = None

    def __init__(self, **answers: Any) -> None:
        self._answers = answers

    def ask(self, command: str) -> dict[str, Any] | None:
        return self._answers[command]  # type: ignore[no-any-return]


OURS = {"a": [[2], "F32", "ab"]}


@pytest.mark.parametrize(
    ("answers", "kind"),
    [
        ({"compare": {"read": OURS}, "native": {"died": None}}, None),
        ({"compare": {"read": {"a": [[2], "F32", "cd"]}}, "native": {"died": None}}, "disagreement"),
        ({"compare": {"read": {}}, "native": {"died": None}}, "disagreement"),
        ({"compare": {"refused": "x"}, "native": {"died": None}}, "disagreement: refused there"),
        ({"compare": None, "native": {"died": None}}, "disagreement"),
        ({"compare": {"read": OURS}, "native": {"died": "exit code -6"}}, "native death"),
        ({"compare": {"read": OURS}, "native": None}, "native death"),
    ],
)  # fmt: skip
def test_another_reader_that_reads_otherwise_or_dies_is_a_finding(
    answers: dict[str, Any], kind: str | None, tools: tuple[Any, Any], tmp_path: Path
) -> None:
    fuzz, readers = tools
    reader = readers.Reader(
        lambda path, data: OURS, dict, "x", dict, lambda path: True, lambda path: None
    )
    run = fuzz.Run(reader, tmp_path, Asked(**answers))
    run.one(b"")
    assert [key.startswith(kind or "") for key in run.figures()["found"]] == [True] * bool(kind)


def test_a_reader_that_dies_in_native_code_is_told_from_one_that_does_not(
    tools: tuple[Any, Any], tmp_path: Path
) -> None:
    def abort(path: Path) -> None:
        faulthandler.disable()
        os.abort()

    _, readers = tools
    assert readers._forked(lambda path: None, tmp_path) is None
    assert readers._forked(abort, tmp_path) == "exit code -6"


def test_findings_end_with_1_and_without_somebody_to_compare_with_it_is_2(
    tools: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fuzz, _ = tools
    (tmp_path / "seeds").mkdir()
    for found, missing, code in [({}, None, 0), ({"hang: x": 1}, None, 1), ({}, "no gguf", 2)]:
        figures = {
            "seconds": 1, "cpu_seconds": 1, "growth": 0, "counts": {"executions": 5},
            "found": found, "missing": missing,
        }  # fmt: skip

        def run(command: list[str], figures: dict[str, Any] = figures, **_: Any) -> Any:
            (tmp_path / "figures.json").write_text(json.dumps(figures))
            return subprocess.CompletedProcess(command, 0)

        monkeypatch.setattr(fuzz.subprocess, "run", run)
        monkeypatch.setattr(
            sys, "argv", ["fuzz.py", "gguf", "--corpus", str(tmp_path), "--engine", "mutations"]
        )
        assert fuzz.main() == code
        assert "not guided by coverage" in capsys.readouterr().out


def test_make_fuzz_runs_every_reader(tools: tuple[Any, Any]) -> None:
    fuzz, readers = tools
    assert tuple(readers.READERS) == fuzz.NAMES == READERS
    assert f"in {' '.join(READERS)};" in (tiny.REPOSITORY / "Makefile").read_text()
