"""JSON that two readers could understand differently is refused."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safegene_runtime.errors import FormatError, Problems
from safegene_runtime.formats import strictjson

AMBIGUOUS: dict[str, tuple[str, bytes]] = {
    "key twice": ("a: expected each key once", b'{"a": 1, "a": 1}'),
    "key twice, inside": ("b: expected each key once", b'{"a": {"b": 1, "c": 2, "b": 3}}'),
    "key twice, in a list": ("b: expected each key once", b'[1, [{"x": [{"b": 1, "b": 1}]}]]'),
    "key twice, spelt differently": ("a: expected each key once", b'{"a": 1, "\\u0061": 2}'),
    "empty key twice": (": expected each key once", b'{"": 1, "": 2}'),
    "NaN": ("finite number, got NaN", b'{"a": NaN}'),
    "Infinity": ("finite number, got Infinity", b"[Infinity]"),
    "-Infinity": ("finite number, got -Infinity", b"-Infinity"),
    "a number that overflows": ("finite number, got 1e999", b'{"a": 1e999}'),
    "a negative one": ("finite number, got -1.5E+400", b"[-1.5E+400]"),
    "half a surrogate pair": ("surrogates not allowed", b'["\\ud83d"]'),
    "the other half": ("surrogates not allowed", b'{"a": "x\\uDE00"}'),
    "halves in the wrong order": ("surrogates not allowed", b'"\\ude00\\ud83d"'),
    "half as a key": ("surrogates not allowed", b'{"\\ud800": 1}'),
}
BROKEN: dict[str, tuple[str, bytes]] = {
    "empty": ("line 1 column 1", b""),
    "blank": ("Expecting value", b" \n"),
    "cut": ("line 1", b'{"a": [1, 2'),
    "two values": ("Extra data", b"{} {}"),
    "trailing comma": ("line 1", b'{"a": 1,}'),
    "comment": ("line 1", b'{"a": 1} // why'),
    "single quotes": ("line 1", b"{'a': 1}"),
    "tab in a string": ("control character", b'"\t"'),
    "NUL": ("line 1", b"\0"),
    "byte order mark": ("BOM", b"\xef\xbb\xbf{}"),
    "UTF-16": ("decode", '{"a": 1}'.encode("utf-16")),
    "not UTF-8": ("decode byte 0xff", b'{"a": "\xff"}'),
    "a surrogate as UTF-8": ("decode", b'"\xed\xa0\x80"'),
    "an overlong slash": ("decode", b'"\xc0\xaf"'),
    "a pickle": ("decode", b"\x80\x04\x95"),
    "deep lists": ("recursion", b"[" * 1_000_000),
    "deep lists, closed": ("recursion", b"[" * 200_000 + b"]" * 200_000),
    "deep objects": ("recursion", b'{"a":' * 500_000),
    "an integer of 5000 digits": ("digits", b"1" * 5000),
    "an integer of a million digits": ("digits", b"[" + b"9" * 1_000_000 + b"]"),
    "git-lfs pointer": (
        "git lfs pull",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    ),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", [*AMBIGUOUS, *BROKEN])
def test_json_that_is_ambiguous_or_broken_is_refused_with_the_name_of_its_file(name: str) -> None:
    reason, data = (AMBIGUOUS | BROKEN)[name]
    start = time.monotonic()
    with pytest.raises(FormatError) as caught:
        strictjson.loads(data, "some/file.json")
    assert time.monotonic() - start < 2
    message = str(caught.value)
    assert message.startswith("some/file.json: ")
    assert reason in message
    assert caught.value.problems[0].fix
    assert len(message) < 1000


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_is_ambiguous_is_what_pythons_parser_would_have_let_through(name: str) -> None:
    json.loads(AMBIGUOUS[name][1])


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"1000000000000000019884624838656", 1000000000000000019884624838656),
        (b"1e308", 1e308),
        (b"1e-999", 0.0),
        (b"-0.0", -0.0),
        (b'"\\ud83d\\ude00"', "\U0001f600"),
        ("\U0001f600".join('""').encode(), "\U0001f600"),
        (b'"\\\\ud83d"', "\\ud83d"),
        (b'"NaN Infinity"', "NaN Infinity"),
        (b'[{"a": 1}, {"a": 1}, {"b": {"a": 1}}]', [{"a": 1}, {"a": 1}, {"b": {"a": 1}}]),
    ],
)
def test_what_only_looks_ambiguous_is_read(data: bytes, value: Any) -> None:
    found = strictjson.loads(data, "x")
    assert found == value
    assert str(found) == str(value)


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
    max_leaves=20,
)


@given(value=_VALUES)
def test_what_is_written_is_what_is_read_by_us_and_by_python(value: Any) -> None:
    data = strictjson.dumps(value)
    assert strictjson.loads(data, "x") == value
    assert strictjson.loads(json.dumps(value).encode(), "x") == value
    assert json.loads(data) == value
    assert data.endswith(b"\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {"a": [float("-inf")]}])
def test_a_number_that_is_not_finite_is_never_written(value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        strictjson.dumps(value)


def test_keys_are_written_in_the_order_given() -> None:
    assert strictjson.dumps({"b": 1, "a": "é"}) == '{\n  "b": 1,\n  "a": "é"\n}\n'.encode()


def test_files_are_read_strictly_and_up_to_a_size(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(b'{"a": 1}')
    assert strictjson.load(path) == {"a": 1}
    assert strictjson.load(path, 8) == {"a": 1}
    with pytest.raises(FormatError, match="at most 7 bytes"):
        strictjson.load(path, 7)
    path.write_bytes(b'{"a": 1, "a": 2}')
    with pytest.raises(FormatError, match=r"x\.json: a: expected each key once"):
        strictjson.load(path)
    with pytest.raises(FormatError, match="No such file"):
        strictjson.load(tmp_path / "missing.json")


# --- check_keys ------------------------------------------------------------------------------------


def _check(found: object) -> tuple[bool, list[tuple[str, str]]]:
    problems = Problems()
    usable = strictjson.check_keys(found, "x", problems, required=["a", "b"], optional=["c"])
    return usable, [(problem.field, problem.got) for problem in problems]


@pytest.mark.parametrize(
    ("found", "usable", "problems"),
    [
        ({"a": 1, "b": 2}, True, []),
        ({"a": None, "b": None, "c": None}, True, []),
        ({"a": 1}, False, [("b", "nothing")]),
        ({}, False, [("a", "nothing"), ("b", "nothing")]),
        ({"a": 1, "b": 2, "A": 3}, True, [("A", "an unknown key")]),
        (
            {"z": 1, "y": 2, "b": 3, "x": 4},
            False,
            [*((key, "an unknown key") for key in "xyz"), ("a", "nothing")],
        ),
        ([], False, [("value", "list")]),
        (None, False, [("value", "NoneType")]),
        ("ab", False, [("value", "str")]),
    ],
)
def test_unknown_and_missing_keys_are_all_named_in_order(
    found: object, usable: bool, problems: list[tuple[str, str]]
) -> None:
    assert _check(found) == (usable, problems)
