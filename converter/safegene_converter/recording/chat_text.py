"""User messages as a model is asked them: its own template, its own tokenizer.

A template is a program that came with a model, so it renders where all templates do, in the child of
`engines.chat`, and with the variables that every runtime has.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from safegene_runtime.engines.chat import render_all
from safegene_runtime.errors import Problem, UnsupportedError

__all__ = ["encode", "prompt_ids", "render"]


def render(tokenizer: Any, texts: Sequence[str], now: datetime | None = None) -> list[str]:
    """Each text as the first message of a user, up to where the reply begins.

    Args:
        tokenizer: of the model, its `chat_template` one template.
        texts: what the user says.
        now: the time that a template may print; the real one when None.

    Raises:
        EngineError: the template failed, and its words.
        UnsupportedError: it prints special tokens other than BOS and EOS, which no runtime gives it.
    """
    chats = [[{"role": "user", "content": text}] for text in texts]
    template = tokenizer.chat_template
    tokens = dict(tokenizer.special_tokens_map)
    bos, eos = tokens.pop("bos_token", ""), tokens.pop("eos_token", "")
    rendered = render_all(template, chats, bos_token=bos, eos_token=eos, now=now)
    more = {name: token for name, token in tokens.items() if re.search(rf"\b{name}\b", template)}
    if more and rendered != render_all(
        template, chats, bos_token=bos, eos_token=eos, variables=more, now=now
    ):
        raise UnsupportedError(
            Problem(
                "chat template", "variables", "bos_token and eos_token, as runtimes give it",
                ", ".join(sorted(more)), "write these tokens into the template as text",
            )
        )  # fmt: skip
    return rendered


def encode(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Token ids of a text as it stands, no special tokens added."""
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def prompt_ids(tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of each text in the template; see `render`."""
    return [encode(tokenizer, one) for one in render(tokenizer, texts)]
