"""What each field of a JSON object must be, said as data and checked in one place.

    check_fields(entry, "manifest.json: files[0]", {"path": NAME, "size_bytes": SIZE}, problems)

A value of another type is answered with the type that came, one that breaks a rule with the value.
`true` is no integer, an integer is a number, and integers have 64 bits at most: other readers have no
larger ones.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from safegene_runtime.errors import Problems
from safegene_runtime.formats.strictjson import check_keys

__all__ = [
    "FLAG", "INTEGER", "NAME", "NUMBER", "OBJECT", "SHA256", "SIZE", "TEXT", "Kind", "check_fields",
    "check_version", "integer", "list_of", "object_of", "one_of", "or_null",
]  # fmt: skip

MAX_INTEGER = (1 << 63) - 1
MAX_SHOWN = 100

_SHA256 = re.compile(r"[0-9a-f]{64}")
_TYPES = {
    str: "text", int: "an integer", float: "a number", bool: "true or false",
    list: "a list", dict: "an object", type(None): "null",
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of value.

    Attributes:
        types: the Python types of its values, as `json` makes them.
        expected: the kind in words, for a value of another type.
        rule: what a value of the type must be besides, in words.
        holds: whether it is; never asked of another type.
    """

    types: tuple[type, ...]
    expected: str
    rule: str = ""
    holds: Callable[[Any], bool] = lambda value: True

    def complaint(self, value: Any) -> tuple[str, str] | None:
        """(expected, got) of a value that is not of this kind; None of one that is."""
        if type(value) not in self.types:
            return self.expected, _type_of(value)
        if type(value) is int and not -MAX_INTEGER <= value <= MAX_INTEGER:
            return "an integer of 64 bits", f"{value.bit_length()} bits"
        return None if self.holds(value) else (self.rule, _shown(value))


TEXT = Kind((str,), "text")
NAME = Kind((str,), "text", "text that is not empty", bool)
INTEGER = Kind((int,), "an integer")
NUMBER = Kind((int, float), "a number")
FLAG = Kind((bool,), "true or false")
OBJECT = Kind((dict,), "an object")
SIZE = Kind((int,), "an integer", "a size in bytes", lambda value: value >= 0)
SHA256 = Kind((str,), "64 hexadecimal digits", "64 hexadecimal digits", _SHA256.fullmatch)  # type: ignore[arg-type]


def integer(low: int, high: int = MAX_INTEGER) -> Kind:
    """Integers from `low` to `high`, both included."""
    rule = f"{low} to {high}" if high < MAX_INTEGER else f"at least {low}"
    return Kind((int,), "an integer", rule, lambda value: low <= value <= high)


def one_of(*values: str) -> Kind:
    """One of these words."""
    *most, last = values
    words = f"{', '.join(most)} or {last}" if most else last
    return Kind((str,), words, words, lambda value: value in values)


def or_null(kind: Kind) -> Kind:
    """A kind, or null."""
    return dataclasses.replace(
        kind,
        types=(*kind.types, type(None)),
        expected=f"{kind.expected} or null",
        rule=f"{kind.rule} or null",
        holds=lambda value: value is None or kind.holds(value),
    )


def list_of(kind: Kind | None = None, *, filled: bool = False, unique: bool = False) -> Kind:
    """Lists whose entries are of a kind; not empty where `filled`, each once where `unique` (scalars)."""
    words = "a list" + (f" of {kind.rule or kind.expected}" if kind else "")
    words += " that is not empty" if filled else ""
    rule = words + (", each once" if unique else "")
    return Kind((list,), words, rule, lambda value: _holds_all(kind, value, value, filled, unique))


def object_of(kind: Kind | None = None, *, filled: bool = False) -> Kind:
    """Objects whose values are of a kind, whatever their keys; not empty where `filled`."""
    words = "an object" + (f" of {kind.rule or kind.expected}" if kind else "")
    words += " that is not empty" if filled else ""
    return Kind(
        (dict,), words, words, lambda value: _holds_all(kind, value.values(), value, filled, False)
    )


def check_version(found: object, where: str, version: int, problems: Problems, fix: str) -> bool:
    """Notes a `format_version` that is another; of such an object nothing else should be asked."""
    if not isinstance(found, dict) or "format_version" not in found:
        return True  # `check_fields` says so
    value = found["format_version"]
    if type(value) is int and value == version:
        return True
    problems.add(where, "format_version", version, repr(value)[:MAX_SHOWN], fix)
    return False


def check_fields(
    found: object,
    where: str,
    fields: Mapping[str, Kind],
    problems: Problems,
    *,
    optional: Mapping[str, Kind] | None = None,
    fix: str = "",
) -> bool:
    """Checks a JSON object: its keys, and the kind of every value.

    Args:
        found: what should be the object.
        where: file and place, for the messages.
        fields: the kind of every field it must have.
        problems: takes what is wrong, all of it.
        optional: the kind of every field it may have besides.
        fix: the next step, for a value of another kind.

    Returns:
        whether it is an object with all these fields, all of their kinds.
    """
    before = len(problems)
    optional = optional or {}
    check_keys(found, where, problems, required=fields, optional=optional)
    if isinstance(found, dict):
        for name, kind in {**fields, **optional}.items():
            complaint = kind.complaint(found[name]) if name in found else None
            if complaint is not None:
                problems.add(where, name, *complaint, fix)
    return len(problems) == before


def _holds_all(
    kind: Kind | None, entries: Collection[Any], whole: Any, filled: bool, unique: bool
) -> bool:
    return (
        (bool(whole) or not filled)
        and (kind is None or all(kind.complaint(entry) is None for entry in entries))
        and (not unique or len({*entries}) == len(entries))
    )


def _type_of(value: Any) -> str:
    name = _TYPES[type(value)]
    return f"{name} that is empty" if value in ([], {}) else name


def _shown(value: Any) -> str:
    if value in ("", [], {}):
        return f"{_TYPES[type(value)]} that is empty"
    return (value if isinstance(value, str) else repr(value))[:MAX_SHOWN]
