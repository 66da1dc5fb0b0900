"""ONNX Runtime as an engine: a decoder with a KV cache, prompts batched with padding on the right.

What the sequences of a call share, such as a system prompt, is evaluated once. Padding goes to the
right. A causal model does not look there, GroupQueryAttention counts the mask and writes new keys
right behind the valid ones, and a plain attention masks the gap. So one feed serves the layouts of
the onnxruntime-genai builder, of Optimum and of torch.onnx. But GroupQueryAttention takes several
tokens behind a past for one sequence at a time only: there each goes alone behind a long prefix.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from safegene_runtime.cpus import thread_count
from safegene_runtime.engines.engine import (
    Speaking,
    Text,
    checked_ids,
    checked_keep,
    checked_limits,
    shared_length,
)
from safegene_runtime.engines.ort_decoder import OrtDecoder
from safegene_runtime.engines.ort_packages import ort_packages
from safegene_runtime.engines.ort_text import OrtText
from safegene_runtime.errors import EngineError, Problem
from safegene_runtime.progress import Step

__all__ = ["OrtEngine"]

MAX_OUTPUT_BYTES = 128 << 20
MIN_SHARED = 16
"""Where sequences then go one by one: a shared prefix that makes up for the smaller products."""


@dataclass(frozen=True)
class _Prefix:
    """First tokens of every sequence, evaluated: caches (1, heads, length, size), in their order."""

    length: int
    caches: tuple[np.ndarray, ...]


class OrtEngine(Speaking):
    """An ONNX decoder, and its `.onnx_adapter` where there is one, in ONNX Runtime on the CPU.

    Args:
        model_path: the `.onnx` file; tokenizer.json and the configuration lie beside it.
        adapter_path: an `.onnx_adapter` for it.
        threads: CPU threads; as many as this process may use when None.
        n_seq_max: sequences decoded together.

    Raises:
        FormatError: a file breaks its format.
        EngineError: ONNX Runtime is missing or refused, or this is no decoder we can feed.
    """

    name = "ONNX Runtime"

    def __init__(
        self,
        model_path: Path,
        adapter_path: Path | None = None,
        *,
        threads: int | None = None,
        n_seq_max: int = 16,
    ) -> None:
        threads = thread_count(threads)
        if n_seq_max < 1:
            raise EngineError(Problem(self.name, "n_seq_max", "at least 1", str(n_seq_max)))
        self._n_seq_max = n_seq_max
        ort, _ = ort_packages("onnxruntime", "tokenizers")
        self.version = str(ort.__version__)
        self._text = OrtText(model_path.parent)
        self._decoder = OrtDecoder(
            model_path,
            adapter_path,
            threads=threads,
            head_size=self._text.files.head_size,
        )
        self._caches, self.n_vocab = self._decoder.caches, self._decoder.n_vocab
        self.settings: dict[str, Any] = {
            "threads": threads,
            "provider": "CPUExecutionProvider",
            "graph_optimization": "all",
            "n_seq_max": n_seq_max,
            "kv_type": self._caches[0].dtype,
            "adapter": adapter_path.name if adapter_path is not None else None,
        }

    def logits(
        self,
        sequences: Sequence[Sequence[int]],
        keep: Sequence[int],
        on_progress: Step | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields `(i, float32 (keep[i], n_vocab))` once for each sequence; see `Engine.logits`.

        Raises:
            EngineError: an empty sequence, an id outside the vocabulary, a sequence longer than
                the model was made for, `keep` out of range, or ONNX Runtime failed.
        """
        rows = [self._checked(ids, f"sequence {i}") for i, ids in enumerate(sequences)]
        return self._logits(rows, checked_keep(keep, rows), on_progress)

    def _logits(
        self, rows: list[np.ndarray], keep: list[int], on_progress: Step | None
    ) -> Iterator[tuple[int, np.ndarray]]:
        if not rows:
            return
        prefix = self._evaluate(rows, keep)
        alone = prefix.length > 0 and self._decoder.one_by_one
        for group in self._groups([len(ids) - prefix.length for ids in rows], alone):
            found = self._prefill([rows[i] for i in group], prefix, ["logits"])[0]
            for row, i in enumerate(group):
                end = len(rows[i]) - prefix.length
                yield i, np.asarray(found[row, end - keep[i] : end], dtype=np.float32)
            if on_progress:
                on_progress(len(group))

    def _evaluate(self, rows: list[np.ndarray], keep: list[int]) -> _Prefix:
        """What all sequences share and none needs logits for, where that saves time."""
        length = shared_length(rows, keep)
        names = [cache.present for cache in self._caches]
        if length == 0 or (self._decoder.one_by_one and length < MIN_SHARED):
            return _Prefix(0, tuple(self._decoder.empty(1).values()))
        found = self._prefill(
            [rows[0][:length]], _Prefix(0, tuple(self._decoder.empty(1).values())), names
        )
        return _Prefix(length, tuple(found))

    def _prefill(
        self, rows: list[np.ndarray], prefix: _Prefix, names: list[str]
    ) -> list[np.ndarray]:
        """One pass over whole sequences, side by side; the mask lets padding be, on the right."""
        tails = _padded([ids[prefix.length :] for ids in rows])
        count, longest = tails.shape
        positions = prefix.length + np.arange(longest, dtype=np.int64)[None]
        return self._decoder.run(
            tails,
            np.ones((count, prefix.length + longest), np.int64),
            np.repeat(positions, count, axis=0),
            {
                cache.past: np.repeat(value, count, axis=0)
                for cache, value in zip(self._caches, prefix.caches, strict=True)
            },
            names,
        )

    def _groups(self, lengths: list[int], alone: bool = False) -> list[list[int]]:
        """Sequences of similar length together, so that little is padding; or each alone."""
        largest = 1 if alone else self._n_seq_max
        budget = max(MAX_OUTPUT_BYTES // (4 * self.n_vocab), 1)
        groups: list[list[int]] = []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            longest = lengths[groups[-1][0]] if groups else 0
            full = groups and (
                len(groups[-1]) >= largest or (len(groups[-1]) + 1) * longest > budget
            )
            if not groups or full:
                groups.append([])
            groups[-1].append(i)
        return groups

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int | Sequence[int],
        stop_ids: Collection[int],
        on_progress: Step | None = None,
    ) -> list[list[int]]:
        """Continues each prompt greedily (lowest id on ties); see `Engine.generate`.

        Raises:
            EngineError: as `logits`, or a negative number of tokens.
        """
        limits = checked_limits(max_tokens, len(prompts))
        rows = [self._checked(ids, f"prompt {i}", limits[i]) for i, ids in enumerate(prompts)]
        outputs: list[list[int]] = [[] for _ in rows]
        stops = frozenset(stop_ids)
        todo = [i for i in range(len(rows)) if limits[i] > 0]
        if todo:
            prefix = self._evaluate([rows[i] for i in todo], [1] * len(todo))
        for group in self._groups([len(rows[i]) for i in todo]):
            self._generate([todo[i] for i in group], rows, prefix, limits, stops, outputs)
            if on_progress:
                on_progress(len(group))
        if on_progress and len(todo) < len(rows):
            on_progress(len(rows) - len(todo))
        return outputs

    def _generate(
        self,
        group: list[int],
        rows: list[np.ndarray],
        prefix: _Prefix,
        limits: list[int],
        stops: frozenset[int],
        outputs: list[list[int]],
    ) -> None:
        """Decodes one batch to its end; rows that are done leave it."""
        lengths = [len(rows[i]) for i in group]
        mask = _mask(lengths, max(lengths))
        logits, caches = self._begin([rows[i] for i in group], prefix)
        names = ["logits", *(cache.present for cache in self._caches)]
        while True:
            best = logits.argmax(axis=1).tolist()
            for i, token in zip(group, best, strict=True):
                outputs[i].append(token)
            stay = [
                row
                for row, i in enumerate(group)
                if best[row] not in stops and len(outputs[i]) < limits[i]
            ]
            if not stay:
                return
            if len(stay) < len(group):
                caches = [value[stay] for value in caches]
            group = [group[row] for row in stay]
            lengths = [lengths[row] + 1 for row in stay]
            mask = np.concatenate([mask[stay], np.ones((len(stay), 1), np.int64)], axis=1)
            found = self._decoder.run(
                np.array([[best[row]] for row in stay], np.int64),
                mask,
                np.array(lengths, np.int64).reshape(-1, 1) - 1,
                {cache.past: value for cache, value in zip(self._caches, caches, strict=True)},
                names,
            )
            logits, caches = found[0][:, 0], found[1:]

    def _begin(
        self, rows: list[np.ndarray], prefix: _Prefix
    ) -> tuple[np.ndarray, list[np.ndarray]]:
        """The logits (batch, vocab) behind each prompt, and the caches, filled on the right."""
        names = ["logits", *(cache.present for cache in self._caches)]
        alone = prefix.length > 0 and self._decoder.one_by_one
        parts = [[ids] for ids in rows] if alone else [rows]
        made = [self._prefill(part, prefix, names) for part in parts]
        last = [
            logits[row, len(ids) - prefix.length - 1]
            for part, (logits, *_) in zip(parts, made, strict=True)
            for row, ids in enumerate(part)
        ]
        longest = max(len(ids) for ids in rows)
        caches = []
        for number in range(1, len(names)):
            pieces = [found[number] for found in made]
            whole = np.zeros(
                (len(rows), pieces[0].shape[1], longest, pieces[0].shape[3]), pieces[0].dtype
            )
            at = 0
            for piece in pieces:
                whole[at : at + len(piece), :, : piece.shape[2]] = piece
                at += len(piece)
            caches.append(whole)
        return np.stack(last), caches

    def stream(
        self, prompt: Sequence[int], max_tokens: int, stop_ids: Collection[int]
    ) -> Iterator[int]:
        """Yields the ids of `generate` one by one, as they come; see `Engine.stream`.

        Raises:
            EngineError: as `generate`.
        """
        row = self._checked(prompt, "prompt", max_tokens)
        return self._stream(row, max_tokens, frozenset(stop_ids))

    def _stream(self, row: np.ndarray, limit: int, stops: frozenset[int]) -> Iterator[int]:
        ids, past = row.reshape(1, -1), self._decoder.empty(1)
        names = ["logits", *(cache.present for cache in self._caches)]
        for length in range(len(row), len(row) + limit):
            positions = np.arange(length - ids.shape[1], length, dtype=np.int64)[None]
            found = self._decoder.run(ids, np.ones((1, length), np.int64), positions, past, names)
            token = int(found[0][0, -1].argmax())
            yield token
            if token in stops:
                return
            ids = np.array([[token]], np.int64)
            past = {cache.past: value for cache, value in zip(self._caches, found[1:], strict=True)}

    def _checked(self, ids: Sequence[int], where: str, extra: int = 0) -> np.ndarray:
        self._decoder.check_open()
        return checked_ids(ids, where, self.n_vocab, self._text.files.context_length, extra)

    def _text_side(self) -> Text:
        self._decoder.check_open()
        return self._text

    def close(self) -> None:
        """Frees the session; harmless when called again."""
        self._decoder.close()


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    longest = max(len(row) for row in rows)
    ids = np.zeros((len(rows), longest), np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    return ids


def _mask(lengths: list[int], longest: int) -> np.ndarray:
    mask: np.ndarray = np.arange(longest)[None, :] < np.array(lengths)[:, None]
    return mask.astype(np.int64)
