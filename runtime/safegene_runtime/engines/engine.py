"""What every engine promises, token ids in, logits and greedy ids out, and the checks they share."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import numpy as np

from safegene_runtime.errors import EngineError, Problem
from safegene_runtime.progress import Step

__all__ = [
    "Closing", "Engine", "Speaking", "Text", "checked_ids", "checked_keep", "checked_limits",
    "shared_length",
]  # fmt: skip


class Closing:
    """Closed at the end of its `with`."""

    def close(self) -> None:
        """Frees what is held; harmless when called again."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Text(Protocol):
    """The text side of a model: text to ids and back, and the ids that begin and end one."""

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text, if the model has one."""
        ...

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, if the model has one."""
        ...

    @property
    def add_bos(self) -> bool:
        """Whether `tokenize(add_special=True)` begins with `bos_id`."""
        ...

    @property
    def eog_ids(self) -> frozenset[int]:
        """Every id the model's own metadata says ends a generation."""
        ...

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        """Text to ids; `add_special` adds BOS or EOS where the model's metadata says so."""
        ...

    def detokenize(self, ids: Sequence[int], *, special: bool = True) -> str:
        """Ids to text; control tokens are spelt out unless `special` is False."""
        ...

    def chat_template(self) -> str | None:
        """The model's own chat template, if it has one."""
        ...


class Speaking(Closing):
    """Its text side is that of its model."""

    def _text_side(self) -> Text:
        """That of the model, which is open."""
        raise NotImplementedError

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        """Text to ids, by the model's own tokenizer; see `Text.tokenize`."""
        side = self._text_side()
        return side.tokenize(text, add_special=add_special, parse_special=parse_special)

    def detokenize(self, ids: Sequence[int], *, special: bool = True) -> str:
        """Ids to text; see `Text.detokenize`. Bytes that are not UTF-8 become U+FFFD."""
        return self._text_side().detokenize(ids, special=special)

    def chat_template(self) -> str | None:
        """The model's own chat template, if it has one."""
        return self._text_side().chat_template()

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text, if the model has one."""
        return self._text_side().bos_id

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, if the model has one."""
        return self._text_side().eos_id

    @property
    def add_bos(self) -> bool:
        """Whether `tokenize(add_special=True)` begins with `bos_id`."""
        return self._text_side().add_bos

    @property
    def eog_ids(self) -> frozenset[int]:
        """Every id that ends a generation, as the model says."""
        return self._text_side().eog_ids


@runtime_checkable
class Engine(Text, Protocol):
    """A loaded model, with its adapter where there is one."""

    name: str
    version: str
    n_vocab: int
    settings: dict[str, Any]
    """Everything that can move a logit (threads, KV type, batch sizes, ...): goes into reports."""

    def logits(
        self,
        sequences: Sequence[Sequence[int]],
        keep: Sequence[int],
        on_progress: Step | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields `(i, float32 (keep[i], n_vocab))`, once for each sequence, in any order.

        Row `j` comes from position `len(sequences[i]) - keep[i] + j` and predicts the token after
        it. The array is only valid until the next one is asked for: copy what is to be kept.
        """
        ...

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int | Sequence[int],
        stop_ids: Collection[int],
        on_progress: Step | None = None,
    ) -> list[list[int]]:
        """Continues each prompt greedily by at most `max_tokens` ids, a stop id included.

        One number for all prompts, or one for each of them.
        """
        ...

    def stream(
        self, prompt: Sequence[int], max_tokens: int, stop_ids: Collection[int]
    ) -> Iterator[int]:
        """Yields the ids of `generate` one by one, as they come; the engine is busy until it ends."""
        ...

    def close(self) -> None:
        """Frees the model; harmless when called again."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *error: object) -> None: ...


def checked_ids(
    ids: Sequence[int], where: str, n_vocab: int, limit: int | None, extra: int
) -> np.ndarray:
    """Ids as an int64 array (n,).

    Args:
        ids: of a prompt or a text.
        where: which one, for the message.
        n_vocab: of the model.
        limit: positions that the model was made for, or None.
        extra: how many ids are to follow.

    Raises:
        EngineError: none, one that the model does not have, or more than it was made for.
    """
    row = np.asarray(ids, dtype=np.int64)
    if row.ndim != 1 or not len(row):
        raise EngineError(Problem(where, "ids", "at least one id", "none"))
    wrong = row[(row < 0) | (row >= n_vocab)]
    if len(wrong):
        fix = "were they made by this model's tokenizer?"
        raise EngineError(Problem(where, "ids", f"0 to {n_vocab - 1}", str(wrong[0]), fix))
    if limit is not None and len(row) + extra > limit:
        most = f"at most {limit} ids, what the model was made for"
        raise EngineError(Problem(where, "length", most, str(len(row) + extra), "shorten it"))
    return row


def checked_keep(keep: Sequence[int], rows: Sequence[np.ndarray]) -> list[int]:
    """How many rows of logits each sequence asks for.

    Raises:
        EngineError: not one number for each sequence, or one out of range.
    """
    if len(keep) != len(rows):
        raise EngineError(Problem("logits", "keep", f"{len(rows)} numbers", str(len(keep))))
    for i, (ids, count) in enumerate(zip(rows, keep, strict=True)):
        if not 1 <= count <= len(ids):
            raise EngineError(Problem("logits", f"keep[{i}]", f"1 to {len(ids)}", str(count)))
    return list(keep)


def checked_limits(max_tokens: int | Sequence[int], count: int) -> list[int]:
    """How many ids each of `count` prompts may get.

    Raises:
        EngineError: not one number for each prompt, or a negative one.
    """
    limits = [max_tokens] * count if isinstance(max_tokens, int) else list(max_tokens)
    if len(limits) != count or any(limit < 0 for limit in limits):
        raise EngineError(
            Problem("generate", "max_tokens", f"{count} numbers >= 0", str(max_tokens)[:200])
        )
    return limits


def shared_length(rows: Sequence[np.ndarray], keep: Sequence[int]) -> int:
    """How many first tokens all sequences share and none of them needs logits for."""
    if len(rows) < 2:
        return 0
    limit = min(len(ids) - count for ids, count in zip(rows, keep, strict=True))
    for ids in rows[1:]:
        different = np.flatnonzero(ids[:limit] != rows[0][:limit])
        if len(different):
            limit = int(different[0])
    return limit
