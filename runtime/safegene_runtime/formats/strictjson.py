"""JSON that means one thing only.

Python's parser keeps the last of two equal keys, accepts NaN, turns 1e999 into infinity and halves of
surrogate pairs into strings that no file can hold; other readers do otherwise. A manifest that two
readers understand differently proves nothing, so all of that is refused here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NoReturn

from safegene_runtime.errors import FormatError, Problem, Problems
from safegene_runtime.formats.files import read_small_file

__all__ = ["check_keys", "dumps", "load", "loads"]

MAX_JSON_BYTES = 64 << 20
MAX_MARKS = 1 << 19
"""Commas and colons, unless the caller knows better: each stands for a value, which costs memory."""
_HALF_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


def loads(data: bytes, where: str, max_marks: int = MAX_MARKS) -> Any:
    """Parses UTF-8 JSON strictly.

    Raises:
        FormatError: not UTF-8, not JSON, a duplicate key, a number that is not finite, half a
            surrogate pair, or more commas and colons than `max_marks`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: dict[str, Any] = {}
        for key, value in pairs:
            if key in seen:
                raise FormatError(
                    Problem(where, key, "each key once", "the key twice", "remove one of the two")
                )
            seen[key] = value
        return seen

    def no_constant(literal: str) -> NoReturn:
        raise FormatError(Problem(where, "number", "a finite number", literal, "write a number"))

    def finite(literal: str) -> float:
        value = float(literal)
        return value if math.isfinite(value) else no_constant(literal)

    if data.startswith(b"version https://git-lfs"):
        raise FormatError(
            Problem(where, "content", "JSON", "a git-lfs pointer", "run `git lfs pull`")
        )
    marks = data.count(b",") + data.count(b":")
    if marks > max_marks:
        raise FormatError(
            Problem(where, "content", f"at most {max_marks} commas and colons", str(marks),
                    "restore the file")
        )  # fmt: skip
    try:
        value = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=unique,
            parse_constant=no_constant,
            parse_float=finite,
        )
        if _HALF_PAIR.search(data):  # it may still be half of a whole pair
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except FormatError:
        raise
    except MemoryError:
        raise FormatError(
            Problem(where, "content", "JSON that fits into memory", "more", "free some memory")
        ) from None
    except (ValueError, RecursionError) as error:
        raise FormatError(
            Problem(where, "content", "valid UTF-8 JSON", str(error), "restore the file")
        ) from error


def load(path: Path, max_bytes: int = MAX_JSON_BYTES) -> Any:
    """Reads and parses a JSON file; see `loads`."""
    return loads(read_small_file(path, max_bytes), str(path))


def dumps(value: Any) -> bytes:
    """Renders JSON as we write it: stable key order is the caller's, two spaces, final newline."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def check_keys(
    found: object,
    where: str,
    problems: Problems,
    *,
    required: Collection[str],
    optional: Collection[str] = (),
) -> bool:
    """Notes unknown and missing keys of a JSON object; returns whether it is a usable object."""
    if not isinstance(found, dict):
        problems.add(where, "value", "a JSON object", type(found).__name__)
        return False
    known = ", ".join(sorted([*required, *optional]))
    for key in sorted(found.keys() - set(required) - set(optional)):
        problems.add(where, key, f"one of the known keys ({known})", "an unknown key", "remove it")
    missing = set(required) - found.keys()
    for key in sorted(missing):
        problems.add(where, key, "to be present", "nothing", "add it")
    return not missing
