"""ONNX Runtime and tokenizers: imported when needed, with one message where they are missing."""

from __future__ import annotations

import importlib
from typing import Any

from safegene_runtime.errors import EngineError, FormatError, Problem
from safegene_runtime.extras import install

__all__ = ["ort_packages", "read_tokenizer"]


def ort_packages(*names: str) -> list[Any]:
    """The modules of these names.

    Raises:
        EngineError: one is not installed.
    """
    try:
        return [importlib.import_module(name) for name in names]
    except ImportError as error:
        raise EngineError(
            Problem(names[0], "package", " and ".join(names), str(error), install("onnx"))
        ) from error


def read_tokenizer(text: str, where: str) -> Any:
    """A `tokenizers.Tokenizer` that does not pad, from the text of its tokenizer.json.

    Raises:
        EngineError: tokenizers is not installed.
        FormatError: it is no tokenizer.
    """
    (tokenizers,) = ort_packages("tokenizers")
    try:
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise FormatError(
            Problem(where, "tokenizer.json", "a tokenizer", str(error)[:200])
        ) from error
    tokenizer.no_padding()
    return tokenizer
