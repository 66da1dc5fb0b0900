"""Regular expressions of an adapter's configuration: refused where matching might not end.

Python's matcher tries one way to match after the other, and all of them where none fits, so a short
pattern can take for ever: `(.*)*x`. The rules that keep every pattern quick are plain: what is
repeated has no repeats or choices within, and the ways that are left to match the name of a module
are few. What people and trainers write keeps far within them.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

__all__ = ["why_refused"]

_MAX_PATTERN = 2000
_NAME = 48
"""Characters of a module's name, about: how often something can be repeated within one."""
_MAX_WAYS = 2 * 10**7
"""Four times `.*` is 48**4, counted with room: most of these ways end after a few characters."""
_TOKEN = re.compile(
    r"""(?P<one>\[\^?\]?(?:\\.|[^\]\\])*\]|[.^$])
      | (?P<opened>\((?:\?(?::|=|!|<=|<!|P<\w+>))?)
      | (?P<closed>\))
      | (?P<bar>\|)
      | (?P<repeat>(?:[*+?]|\{\d*,?\d*\})[?+]?)
      | \\(?P<escaped>.)
      | (?P<literal>.)""",
    re.VERBOSE | re.DOTALL,
)


class _Part(NamedTuple):
    """A part of a pattern: ways to match at one place, whether they vary, its text if it is one."""

    ways: int
    varies: bool = False
    text: str | None = None


def why_refused(pattern: str, around: str = "{}") -> str | None:
    """Why a pattern is refused; None for one that is quick to match against any module's name.

    Args:
        pattern: what the configuration says.
        around: what PEFT matches, with the pattern in its place.
    """
    if len(pattern) > _MAX_PATTERN:
        return f"{len(pattern)} characters, more than {_MAX_PATTERN}"
    try:
        re.compile(pattern)
        ways = _read(around.format(pattern)).ways
    except (re.error, RecursionError, OverflowError) as error:
        return str(error)
    return None if ways <= _MAX_WAYS else "too many repeats and choices one after the other"


def _read(pattern: str) -> _Part:
    """The whole of a pattern that compiles.

    Raises:
        re.error: repeats or choices within a repeat, or a construct that nobody needs here.
    """
    groups: list[list[list[_Part]]] = [[[]]]  # those still open, by alternatives
    for token in _TOKEN.finditer(pattern):
        parts = groups[-1][-1]
        match token.lastgroup:
            case "opened":
                if token[0] == "(" and pattern[token.end() :].startswith("?"):
                    raise re.error(f"a construct that is not read: {pattern[token.start() :][:4]}")
                groups.append([[]])
            case "closed":
                group = _choice(groups.pop())
                groups[-1][-1].append(group)
            case "bar":
                groups[-1].append([])
            case "repeat" if parts:
                parts.append(_repeated(parts.pop(), token[0]))
            case "escaped":
                is_class = token["escaped"].isalnum()  # \d, \b, or the text of a group again
                is_again = token["escaped"].isdigit()
                parts.append(_Part(1, is_again, None if is_class else token["escaped"]))
            case "literal":
                parts.append(_Part(1, text=token[0]))
            case _:
                parts.append(_Part(1))
    return _choice(groups[0])


def _repeated(part: _Part, how: str) -> _Part:
    if how.startswith("?"):
        return _Part(part.ways + 1, varies=True)
    if part.varies:
        raise re.error("a repeat of what has repeats or choices within")
    return _Part(_NAME, varies=True)


def _choice(alternatives: list[list[_Part]]) -> _Part:
    wholes = [_sequence(parts) for parts in alternatives]
    if len(wholes) == 1:
        return wholes[0]
    texts = [whole.text for whole in wholes if whole.text is not None]
    if len(texts) < len(wholes):
        return _Part(sum(whole.ways for whole in wholes), varies=True)
    # of literal texts only those match at one place that begin each other: `up`, `up_proj`
    most, begun = 0, list[str]()
    for text in sorted(texts):
        while begun and not text.startswith(begun[-1]):
            begun.pop()
        begun.append(text)
        most = max(most, len(begun))
    return _Part(most, varies=True)


def _sequence(parts: list[_Part]) -> _Part:
    texts = [part.text for part in parts if part.text is not None]
    return _Part(
        math.prod(part.ways for part in parts),
        any(part.varies for part in parts),
        "".join(texts) if len(texts) == len(parts) else None,
    )
