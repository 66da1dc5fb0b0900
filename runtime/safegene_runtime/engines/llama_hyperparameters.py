"""Hyperparameters of a GGUF model that no real model has, and that libllama computes or aborts with.

A rule holds for every key it fits, in every architecture: what is new is checked like what is known.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from safegene_runtime.errors import Problems
from safegene_runtime.formats.gguf.model import GGUFModel
from safegene_runtime.formats.gguf.types import Value, ValueType

__all__ = ["check_hyperparameters"]

MAX_LAYERS = 512
"""LLAMA_MAX_LAYERS (llama-hparams.h)."""
MAX_CONTEXT = 1 << 28
MAX_WIDTH = 1 << 24
MAX_HEADS = 1 << 12
MAX_INTEGER = (1 << 31) - 1

_INTEGERS = {
    ValueType.UINT8, ValueType.INT8, ValueType.UINT16, ValueType.INT16, ValueType.UINT32,
    ValueType.INT32, ValueType.UINT64, ValueType.INT64,
}  # fmt: skip
_FLOATS = {ValueType.FLOAT32, ValueType.FLOAT64}
_BLOCK = re.compile(r"blk\.(\d+)\.")

# keys behind `{architecture}.`: least and greatest
_RANGES: dict[str, tuple[int, int]] = {
    "context_length": (1, MAX_CONTEXT),
    "embedding_length": (1, MAX_WIDTH),
    "feed_forward_length": (0, MAX_WIDTH),
    "attention.head_count": (0, MAX_HEADS),
    "attention.head_count_kv": (0, MAX_HEADS),
    "attention.key_length": (1, MAX_WIDTH),
    "attention.value_length": (1, MAX_WIDTH),
    "rope.dimension_count": (0, MAX_WIDTH),
    "rope.scaling.original_context_length": (1, MAX_CONTEXT),
    "vocab_size": (1, MAX_WIDTH),
}
_MAY_BE_PER_LAYER = {"feed_forward_length", "attention.head_count", "attention.head_count_kv"}


def check_hyperparameters(model: GGUFModel, where: str, problems: Problems) -> None:
    """Notes every hyperparameter that is not plausible, alone or beside the others."""
    architecture = model.get("general.architecture")
    prefix = f"{architecture}."
    layers = model.get(f"{prefix}block_count")
    if type(layers) is not int or not 1 <= layers <= MAX_LAYERS:
        problems.add(where, f"{prefix}block_count", f"1 to {MAX_LAYERS}", repr(layers))
        return
    _check_blocks(model, layers, where, f"{prefix}block_count", problems)
    before = len(problems)
    for key, value in model.metadata.items():
        if key.startswith(prefix):
            _check_value(key, key[len(prefix) :], value, layers, where, problems)
    if len(problems) == before:
        _check_heads(model, prefix, layers, where, problems)


def _check_blocks(model: GGUFModel, layers: int, where: str, key: str, problems: Problems) -> None:
    found = {int(match[1]) for name in model.tensors if (match := _BLOCK.match(name))}
    if found != set(range(layers)):
        problems.add(
            where, key, f"the number of its blocks, {len(found)}", layers,
            "header and tensors do not belong together",
        )  # fmt: skip


def _numbers(value: Value) -> Iterator[tuple[ValueType | None, Any]]:
    """(type, number) for each number of a value."""
    many = value.type is ValueType.ARRAY
    for one in value.value if many else (value.value,):
        yield (value.element_type if many else value.type), one


def _check_value(
    key: str, name: str, value: Value, layers: int, where: str, problems: Problems
) -> None:
    low, high = _RANGES.get(name, (-MAX_INTEGER, MAX_INTEGER))
    if name in _RANGES:
        per_layer = value.type is ValueType.ARRAY
        kind = value.element_type if per_layer else value.type
        good = kind in _INTEGERS and (
            not per_layer or (name in _MAY_BE_PER_LAYER and len(value.value) == layers)
        )
        if not good:
            got = value.type.name if not per_layer else f"an array of {len(value.value)}"
            problems.add(where, key, "a whole number, or one for each layer", got)
            return
    for kind, number in _numbers(value):
        if kind in _INTEGERS and not low <= number <= high:
            problems.add(where, key, f"{low} to {high}", number)
            return
        if kind in _FLOATS and not _plausible(name, number):
            problems.add(where, key, _expected(name), number)
            return


def _plausible(name: str, number: float) -> bool:
    if not math.isfinite(number):
        return False
    if name.endswith(("epsilon", "_eps")):
        return 0 < number < 1
    return number > 0 or not _is_positive(name)


def _is_positive(name: str) -> bool:
    return "rope.freq_base" in name or name in ("rope.scaling.factor", "rope.scaling.attn_factor")


def _expected(name: str) -> str:
    if name.endswith(("epsilon", "_eps")):
        return "more than 0 and less than 1"
    return "a finite number more than 0" if _is_positive(name) else "a finite number"


def _per_layer(model: GGUFModel, key: str, layers: int) -> list[int] | None:
    """A hyperparameter of each layer; None where the model has none."""
    found = model.get(key)
    if found is None:
        return None
    return list(found) if isinstance(found, tuple | list) else [found] * layers


def _check_heads(
    model: GGUFModel, prefix: str, layers: int, where: str, problems: Problems
) -> None:
    """Query heads share key and value heads evenly, and rope turns pairs inside of a head."""
    heads = _per_layer(model, f"{prefix}attention.head_count", layers) or []
    shared = _per_layer(model, f"{prefix}attention.head_count_kv", layers) or heads
    if len(heads) != len(shared):
        problems.add(
            where, f"{prefix}attention.head_count", "query heads beside head_count_kv", "none"
        )
        return
    for one, other in zip(heads, shared, strict=True):
        if one and other and one % other:
            problems.add(
                where, f"{prefix}attention.head_count_kv", f"a divisor of {one} heads", other
            )
            return
    width, most = model.get(f"{prefix}embedding_length"), max(heads, default=0)
    size = model.get(f"{prefix}attention.key_length")
    if size is None and most and width is not None:
        if width % most:
            problems.add(
                where, f"{prefix}attention.head_count", f"a divisor of the width {width}", most
            )
            return
        size = width // most
    turned = model.get(f"{prefix}rope.dimension_count")
    if turned is not None and size is not None and (turned % 2 or turned > size):
        problems.add(
            where, f"{prefix}rope.dimension_count", f"an even number up to {size}, a head", turned
        )
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    embedding = model.tensors.get("token_embd.weight")
    if tokens is None or embedding is None or width is None:
        return
    wanted = (len(tokens.value), width)
    if embedding.shape != wanted:
        problems.add(
            where, "token_embd.weight", f"{wanted}: a row for each token, as wide as the model",
            embedding.shape, "header and tensors do not belong together",
        )  # fmt: skip
