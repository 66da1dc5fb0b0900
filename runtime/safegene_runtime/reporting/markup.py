"""Building HTML and SVG so that text cannot become markup.

`el` escapes every string it is given; only what `el` made itself goes in as it is. There is no way
to forget it: a template with a filter has one.
"""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import TypeAlias

__all__ = ["Child", "Markup", "el", "visible"]

VOID = frozenset({"meta", "link", "br", "input", "col"})
KEPT = frozenset("\n\t\N{NO-BREAK SPACE}")


class Markup(str):
    """Text that is markup already, made by `el` or `raw`."""

    __slots__ = ()


Child: TypeAlias = "str | Markup | Iterable[Child] | None"


def visible(text: str) -> str:
    r"""Shows what could hide or steer: controls, bidi marks, half surrogates become `\u202e`.

    XML 1.0 cannot hold most of them at all, and a reader must see that they are there.
    """
    if text.isprintable():
        return text
    return "".join(
        c if c.isprintable() or c in KEPT else c.encode("unicode_escape").decode("ascii")
        for c in text
    )


def el(tag: str, *children: Child, **attributes: str | int | float | bool | None) -> Markup:
    """One element; `class_` is written as class, `aria_label` as aria-label.

    Attributes that are None or False are left out; True writes the bare name.
    """
    parts = [f"<{tag}"]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        name = key.rstrip("_").replace("_", "-")
        if value is True:
            parts.append(f" {name}")
        else:
            parts.append(f' {name}="{html.escape(visible(str(value)))}"')
    parts.append(">")
    if tag not in VOID:
        _append(parts, children)
        parts.append(f"</{tag}>")
    return Markup("".join(parts))


def _append(parts: list[str], children: Iterable[Child]) -> None:
    for child in children:
        if child is None:
            continue
        if isinstance(child, Markup):
            parts.append(child)
        elif isinstance(child, str):
            parts.append(html.escape(visible(child)))
        else:
            _append(parts, child)
