"""What the JSON files beside an ONNX decoder say of its attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["first_count", "head_size"]


def first_count(key: str, *sources: Mapping[str, Any]) -> int | None:
    """The first positive integer under a key."""
    values = (source.get(key) for source in sources)
    return next((value for value in values if type(value) is int and value > 0), None)


def head_size(decoder: Mapping[str, Any], config: Mapping[str, Any]) -> int | None:
    """Elements of one attention head, or None where nothing says it.

    Args:
        decoder: `model.decoder` of genai_config.json; it comes first, as it describes the graph.
        config: config.json.
    """
    stated = first_count("head_size", decoder) or first_count("head_dim", config)
    hidden = first_count("hidden_size", decoder, config)
    heads = first_count("num_attention_heads", decoder, config)
    return stated or (hidden // heads if hidden and heads else None) or None
