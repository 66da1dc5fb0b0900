"""What the header of a GGUF model says of its linear weights and heads."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

from safegene_runtime.errors import FormatError, Problems
from safegene_runtime.formats.gguf.model import GGUFModel
from safegene_runtime.formats.gguf.types import GGMLType

__all__ = ["elements_by_type", "head_counts"]

MAX_HEADS = 1 << 20


class Tensor(Protocol):
    """A tensor, read or to be written."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows last."""

    @property
    def type(self) -> GGMLType:
        """What it is stored as."""


def elements_by_type(tensors: Iterable[Tensor]) -> dict[str, int]:
    """Elements of the linear weights of the blocks by stored type: `blk.*` of two extents, or of experts."""
    counted: dict[str, int] = {}
    for tensor in tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            count = math.prod(tensor.shape)
            counted[tensor.type.name] = counted.get(tensor.type.name, 0) + count
    return counted


def head_counts(model: GGUFModel) -> tuple[int, int]:
    """(query heads, key and value heads) of every layer.

    Raises:
        FormatError: a count that is no positive number, or not the same in all layers.
    """
    problems = Problems()
    key = f"{model.get('general.architecture')}.attention.head_count"
    heads = model.get(key)
    found = []
    for name, value in ((key, heads), (f"{key}_kv", model.get(f"{key}_kv", heads))):
        if (
            isinstance(value, tuple) and len(set(value) - {0}) == 1
        ):  # a hybrid's other layers have 0
            value = max(value)
        if type(value) is not int or not 0 < value < MAX_HEADS:
            where = str(model.shards[0].path)
            problems.add(
                where, name, "a positive integer, the same in all layers", str(value)[:100]
            )
        found.append(value)
    problems.raise_if_any(FormatError)
    return found[0], found[1]
