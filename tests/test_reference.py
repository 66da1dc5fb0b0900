"""Hostile references: what was edited is named, and is never an exception of another kind."""

from __future__ import annotations

import json
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import records

from safegene_runtime.errors import RecordError
from safegene_runtime.record.reference import read_reference
from safegene_runtime.verifying.forced import reply_logits

VOCABULARY = 32
PROMPTS = [records.prompt("a", [5, 9, 0], [6, 0]), records.prompt("b", [7] * 8, [8] * 8)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    logits = [records.logits_for(one, VOCABULARY, n) for n, one in enumerate(PROMPTS)]
    records.write(tmp_path / "reference", PROMPTS, logits)
    return tmp_path / "reference"


def leaves(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    if not isinstance(value, dict) or not value:
        return [path]
    return [one for key, inner in value.items() for one in leaves(inner, (*path, key))]


def edited(folder: Path, path: tuple[str, ...], value: Any) -> None:
    meta = json.loads((folder / "reference.json").read_text())
    at = meta
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    (folder / "reference.json").write_text(json.dumps(meta))


NULLABLE = {("adapter", "expression"), *(("tokenizer", f"{one}_{two}") for one in ("bos", "eos")
            for two in ("id", "token"))}  # fmt: skip
WRONG = (-1, 10**30, 1.5, True, [None], {"a": None}, None, [], {}, "")


@pytest.mark.parametrize("path", leaves(dict(records.META)), ids=".".join)
def test_every_leaf_of_the_index_is_of_its_type(path: tuple[str, ...], folder: Path) -> None:
    before = (folder / "reference.json").read_bytes()
    allowed: set[str] = {"None"} if path in NULLABLE else set()
    if path[-1] == "files":
        allowed.add("{}")
    if path[-1] in ("bos_token", "eos_token", "expression", "chat_template"):
        allowed.add("''")
    for value in WRONG:
        (folder / "reference.json").write_bytes(before)
        edited(folder, path, value)
        if repr(value) in allowed:
            read_reference(folder)
            continue
        with pytest.raises(RecordError):
            read_reference(folder)


def test_everything_that_is_wrong_is_said_at_once(folder: Path) -> None:
    edited(folder, ("base", "name"), 5)
    edited(folder, ("settings", "threads"), None)
    with pytest.raises(RecordError) as caught:
        read_reference(folder)
    index = folder / "reference.json"
    found = [f"{one.where}: {one.field}" for one in caught.value.problems]
    assert found == [f"{index}: base: name", f"{index}: settings: threads"]
    assert "record it again" in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("decoding", "max_new_tokens"), 7, "b: ref_ids: expected 7 tokens"),
        (("decoding", "max_new_tokens"), 9, "b: ref_ids: expected 9 tokens, or fewer up to"),
        (("decoding", "stop_ids"), [], "a: ref_ids: .*got 3, without one"),
        (("decoding", "stop_ids"), [0, 9], "a: ref_ids: .*got 3, with one"),
        (("decoding", "stop_ids"), [0, 7], "b: ref_ids"),
    ],
)
def test_a_reply_ends_at_its_stop_or_is_as_long_as_it_may_be(
    path: tuple[str, ...], value: Any, says: str, folder: Path
) -> None:
    edited(folder, path, value)
    with pytest.raises(RecordError, match=says):
        read_reference(folder)


@pytest.mark.parametrize("enough", [True, False])
def test_ids_that_the_engine_has_not_are_an_invalid_record(enough: bool, folder: Path) -> None:
    record = read_reference(folder)
    tops = [int(record.positions(n).top_ids.max()) for n in range(2)]
    n_vocab = max(tops) + enough

    def logits(sequences: Any, keep: list[int]) -> Any:
        yield from ((n, np.zeros((count, n_vocab), np.float32)) for n, count in enumerate(keep))

    engine: Any = types.SimpleNamespace(name="fake", n_vocab=n_vocab, logits=logits)
    if enough:
        assert len(list(reply_logits(engine, record, [0, 1]))) == 2
    else:
        with pytest.raises(RecordError, match=f"token ids below {n_vocab}, got {max(tops)}"):
            list(reply_logits(engine, record, [0, 1]))
