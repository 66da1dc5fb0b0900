"""The fields of a JSON object: everything that is wrong is named, and nothing that is right."""

from __future__ import annotations

from typing import Any

import pytest

from safegene_runtime.errors import Problems
from safegene_runtime.formats.fields import (
    FLAG,
    INTEGER,
    NAME,
    NUMBER,
    SHA256,
    SIZE,
    TEXT,
    Kind,
    check_fields,
    check_version,
    integer,
    list_of,
    object_of,
    one_of,
    or_null,
)

DIGEST = "0123456789abcdef" * 4
LAYERS = list_of(integer(0), filled=True, unique=True)

RIGHT: list[tuple[Kind, list[Any]]] = [
    (TEXT, ["", "a"]),
    (NAME, ["a"]),
    (INTEGER, [0, -1, 2**63 - 1]),
    (NUMBER, [0, 0.5, -1e300]),
    (FLAG, [True, False]),
    (SIZE, [0, 1]),
    (SHA256, [DIGEST]),
    (integer(1, 3), [1, 3]),
    (one_of("a", "b"), ["a", "b"]),
    (or_null(NAME), [None, "a"]),
    (LAYERS, [[0], [2, 0]]),
    (list_of(), [[], [1, None]]),
    (object_of(NAME), [{}, {"a": "b"}]),
]
WRONG: list[tuple[Kind, Any, str, str]] = [
    (TEXT, 1, "text", "an integer"),
    (TEXT, None, "text", "null"),
    (NAME, "", "text that is not empty", "text that is empty"),
    (INTEGER, True, "an integer", "true or false"),
    (INTEGER, 1.0, "an integer", "a number"),
    (INTEGER, 2**63, "an integer of 64 bits", "64 bits"),
    (NUMBER, 10**400, "an integer of 64 bits", "1329 bits"),
    (NUMBER, "1", "a number", "text"),
    (FLAG, 1, "true or false", "an integer"),
    (SIZE, -1, "a size in bytes", "-1"),
    (SHA256, DIGEST.upper(), "64 hexadecimal digits", DIGEST.upper()),
    (SHA256, DIGEST + "\n", "64 hexadecimal digits", DIGEST + "\n"),
    (integer(1, 3), 4, "1 to 3", "4"),
    (integer(1), 0, "at least 1", "0"),
    (one_of("a", "b", "c"), "d", "a, b or c", "d"),
    (one_of("a", "b"), ["a"], "a or b", "a list"),
    (or_null(NAME), "", "text that is not empty or null", "text that is empty"),
    (or_null(INTEGER), "", "an integer or null", "text"),
    (LAYERS, [], "a list of at least 0 that is not empty, each once", "a list that is empty"),
    (LAYERS, [1, 1], "a list of at least 0 that is not empty, each once", "[1, 1]"),
    (LAYERS, [1, True], "a list of at least 0 that is not empty, each once", "[1, True]"),
    (object_of(NAME), {"a": 1}, "an object of text that is not empty", "{'a': 1}"),
    (object_of(filled=True), {}, "an object that is not empty", "an object that is empty"),
    (object_of(), [], "an object", "a list that is empty"),
]


@pytest.mark.parametrize(("kind", "values"), RIGHT)
def test_a_value_of_its_kind_is_no_problem(kind: Kind, values: list[Any]) -> None:
    assert [kind.complaint(value) for value in values] == [None] * len(values)


@pytest.mark.parametrize(("kind", "value", "expected", "got"), WRONG)
def test_another_value_is_a_problem_that_says_what_came(
    kind: Kind, value: Any, expected: str, got: str
) -> None:
    assert kind.complaint(value) == (expected, got)


def test_all_that_is_wrong_with_an_object_is_said_at_once() -> None:
    problems = Problems()
    found = {"b": 1, "c": "", "e": 1}
    fields = {"a": TEXT, "b": INTEGER}
    assert not check_fields(found, "x", fields, problems, optional={"c": NAME, "d": TEXT})
    assert [(one.where, one.field) for one in problems] == [("x", "e"), ("x", "a"), ("x", "c")]
    problems = Problems()
    whole = {"a": 1, "b": "", "c": ""}
    assert not check_fields(whole, "x", fields, problems, optional={"c": NAME}, fix="look")
    assert [(one.field, one.fix) for one in problems] == [
        ("a", "look"),
        ("b", "look"),
        ("c", "look"),
    ]
    assert check_fields({"a": "", "b": 1}, "x", fields, Problems(), optional={"c": NAME})
    assert not check_fields([], "x", fields, Problems())


@pytest.mark.parametrize("value", [2, True, "1", None, 1.0])
def test_another_version_is_the_only_problem(value: Any) -> None:
    problems = Problems()
    assert not check_version({"format_version": value, "new": 1}, "x", 1, problems, "update")
    assert [(one.field, one.expected, one.got, one.fix) for one in problems] == [
        ("format_version", "1", repr(value), "update")
    ]
    assert check_version({"format_version": 1}, "x", 1, problems, "")
