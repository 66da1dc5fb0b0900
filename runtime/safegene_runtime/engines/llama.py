"""llama.cpp as an engine: many prompts as parallel sequences, their common beginning only once.

Chat prompts begin with the same tokens. Those are evaluated once, in sequence 0, and every other
sequence is told to share their cells of the KV cache (one buffer for all sequences, so sharing
copies nothing). What is left of the prompts is packed, whole sequences at a time, into batches:
attention runs over all cells in use, so a batch that is too large costs more than it saves.

Exactness comes before speed: F32 KV cache, no flash attention, no GPU, and the file is read, not
mapped, so that nobody can change the weights under a model that was verified.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from safegene_runtime.cpus import thread_count
from safegene_runtime.engines.engine import (
    Speaking,
    Text,
    checked_keep,
    checked_limits,
    shared_length,
)
from safegene_runtime.engines.llama_context import CELL_PAD, KV_TYPES, LlamaContext
from safegene_runtime.engines.llama_model import LlamaModel
from safegene_runtime.engines.llama_native import (
    library,
)
from safegene_runtime.errors import EngineError, Problem
from safegene_runtime.progress import Step

__all__ = ["LlamaEngine"]

MIN_GROUP = 128


@dataclass
class _Slot:
    """One sequence that is being generated: what it must still be fed, what came out."""

    index: int
    pending: np.ndarray
    position: int
    output: list[int] = field(default_factory=list)


class LlamaEngine(Speaking):
    """A GGUF model, and the sidecar adapter where there is one, in llama.cpp on the CPU.

    Args:
        model_path: the model, or the first shard of one.
        adapter_path: a LoRA GGUF with all scaling inside its B, applied at scale 1.
        threads: CPU threads; as many as this process may use when None.
        kv_type: element type of the KV cache. `f32` for parity, `f16` is llama.cpp's default.
        n_seq_max: sequences decoded together.
        n_batch: tokens decoded together.
        n_ctx: cells to make room for from the start; None makes room as calls need it.
        mmap: map the file instead of reading it, so that the weights take no memory of their own; for
            files that nobody else can change meanwhile.

    Raises:
        FormatError: a file breaks the GGUF format.
        EngineError: llama.cpp is missing or refused, or the adapter is not one for this model.
    """

    name = "llama.cpp"

    def __init__(
        self,
        model_path: Path,
        adapter_path: Path | None = None,
        *,
        threads: int | None = None,
        kv_type: Literal["f32", "f16"] = "f32",
        n_seq_max: int = 16,
        n_batch: int = 256,
        n_ctx: int | None = None,
        mmap: bool = False,
    ) -> None:
        threads = thread_count(threads)
        _check_settings(kv_type, n_seq_max, n_batch, n_ctx)
        self._call = 0
        self._n_seq_max = n_seq_max
        self._model = LlamaModel(model_path, adapter_path, mmap)
        self.n_vocab, self.version = self._model.n_vocab, self._model.version
        self._context = LlamaContext(self._model, threads, kv_type, n_seq_max, n_batch)
        try:
            if n_ctx is not None:
                self._context.open(n_ctx)
        except BaseException:
            self.close()
            raise
        self.settings: dict[str, Any] = {
            "threads": threads,
            "kv_type": kv_type,
            "flash_attention": False,
            "gpu_layers": 0,
            "mmap": self._model.mmap,
            "n_batch": n_batch,
            "n_seq_max": n_seq_max,
            "adapter_scale": 1.0 if adapter_path is not None else None,
            "system": library().llama_print_system_info().decode().strip(" |"),
        }

    def logits(
        self,
        sequences: Sequence[Sequence[int]],
        keep: Sequence[int],
        on_progress: Step | None = None,
    ) -> Iterator[tuple[int, np.ndarray]]:
        """Yields `(i, float32 (keep[i], n_vocab))` once for each sequence; see `Engine.logits`.

        The array is llama.cpp's own memory. It is valid until the next item is asked for, and the
        iterator ends with an error when another call was made on the engine in between.

        Raises:
            EngineError: an empty sequence, an id outside the vocabulary, a sequence longer than
                the model was trained for, `keep` out of range, or llama.cpp failed.
        """
        rows = [self._model.checked(ids, f"sequence {i}") for i, ids in enumerate(sequences)]
        self._call += 1
        return self._logits(rows, checked_keep(keep, rows), on_progress, self._call)

    def _logits(
        self, rows: list[np.ndarray], keep: list[int], on_progress: Step | None, call: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        if not rows:
            return
        self._check_current(call)
        shared = shared_length(rows, keep)
        groups = self._pack([len(ids) - shared for ids in rows], shared)
        tails = max(sum(len(rows[i]) - shared for i in group) for group in groups)
        self._context.open(shared + tails)
        self._context.feed_shared(rows[0][:shared])
        for group in groups:
            for sequence in range(1, len(group) + 1):
                self._context.share(sequence)
            for part in self._parts(group, keep):
                if len(part) == 1:
                    ((sequence, i),) = part
                    yield i, self._long_logits(rows[i], shared, keep[i], sequence)
                    self._check_current(call)
                    continue
                self._context.batch.clear()
                firsts = [
                    self._context.batch.add(rows[i][shared:], shared, sequence, keep[i])
                    for sequence, i in part
                ]
                self._context.decode()
                for (_, i), first in zip(part, firsts, strict=True):
                    yield i, self._context.read(first, keep[i])
                    self._check_current(call)
            for sequence in range(1, len(group) + 1):
                self._context.forget(sequence)
            if on_progress:
                on_progress(len(group))

    def _pack(self, tails: list[int], shared: int) -> list[list[int]]:
        """Groups sequences so that each group is one batch; what is too long stands alone."""
        groups: list[list[int]] = []
        # Fill the padded cells exactly: one more would make every token pay for CELL_PAD more.
        padded = -(-(shared + MIN_GROUP) // CELL_PAD) * CELL_PAD
        limit = min(self._context.n_batch, padded - shared)
        tokens = 0
        for i in sorted(range(len(tails)), key=lambda i: -tails[i]):
            if not groups or tokens + tails[i] > limit or len(groups[-1]) >= self._n_seq_max:
                groups.append([])
                tokens = 0
            groups[-1].append(i)
            tokens += tails[i]
        return groups

    def _parts(self, group: list[int], keep: list[int]) -> list[list[tuple[int, int]]]:
        """A group as (sequence, index), cut where the logits of one call would be too many."""
        parts: list[list[tuple[int, int]]] = []
        outputs = 0
        for sequence, i in enumerate(group, start=1):
            if not parts or outputs + keep[i] > self._context.max_outputs:
                parts.append([])
                outputs = 0
            parts[-1].append((sequence, i))
            outputs += keep[i]
        return parts

    def _long_logits(self, ids: np.ndarray, shared: int, keep: int, sequence: int) -> np.ndarray:
        """The last `keep` rows of one sequence, in as many batches as it takes."""
        start, first = shared, len(ids) - keep
        found: np.ndarray | None = None
        while start < len(ids):
            end = min(start + self._context.n_batch, len(ids))
            if end > first:
                end = min(end, max(start, first) + self._context.max_outputs)
            count = max(0, end - max(start, first))
            self._context.batch.clear()
            row = self._context.batch.add(ids[start:end], start, sequence, count)
            self._context.decode()
            if count == keep:
                return self._context.read(row, count)
            if count:
                found = np.empty((keep, self.n_vocab), np.float32) if found is None else found
                found[end - count - first : end - first] = self._context.read(row, count)
            start = end
        assert found is not None
        return found

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int | Sequence[int],
        stop_ids: Collection[int],
        on_progress: Step | None = None,
    ) -> list[list[int]]:
        """Continues each prompt greedily (lowest id on ties); see `Engine.generate`.

        Only `stop_ids` stop a sequence: pass `eog_ids` for the model's own opinion. A sequence
        that ends makes room for the next prompt at once.

        Raises:
            EngineError: as `logits`.
        """
        limits = checked_limits(max_tokens, len(prompts))
        rows = [self._model.checked(ids, f"prompt {i}", limits[i]) for i, ids in enumerate(prompts)]
        outputs: list[list[int]] = [[] for _ in rows]
        waiting = [i for i in reversed(range(len(rows))) if limits[i] > 0]
        if not waiting:
            return outputs
        self._call += 1
        shared = shared_length([rows[i] for i in waiting], [1] * len(waiting))
        longest = sorted((len(rows[i]) - shared + limits[i] for i in waiting), reverse=True)
        self._context.open(shared + sum(longest[: self._n_seq_max]))
        self._context.feed_shared(rows[waiting[0]][:shared])
        slots: dict[int, _Slot] = {}
        free = list(range(self._n_seq_max, 0, -1))
        stops = frozenset(stop_ids)
        while waiting or slots:
            while waiting and free:
                i, sequence = waiting.pop(), free.pop()
                self._context.share(sequence)
                slots[sequence] = _Slot(i, rows[i][shared:], shared)
            for sequence, token in self._step(slots):
                slot = slots[sequence]
                slot.output.append(token)
                if token in stops or len(slot.output) >= limits[slot.index]:
                    outputs[slot.index] = slot.output
                    del slots[sequence]
                    self._context.forget(sequence)
                    free.append(sequence)
                    if on_progress:
                        on_progress(1)
                else:
                    slot.pending = np.array([token], np.int32)
        return outputs

    def stream(
        self, prompt: Sequence[int], max_tokens: int, stop_ids: Collection[int]
    ) -> Iterator[int]:
        """Yields the ids of `generate` one by one, as they come; see `Engine.stream`.

        Raises:
            EngineError: as `logits`.
        """
        row = self._model.checked(prompt, "prompt", max_tokens)
        self._call += 1
        return self._stream(row, max_tokens, frozenset(stop_ids), self._call)

    def _stream(
        self, row: np.ndarray, limit: int, stops: frozenset[int], call: int
    ) -> Iterator[int]:
        if limit < 1:
            return
        self._check_current(call)
        self._context.open(len(row) + limit)
        slot = _Slot(0, row, 0)
        while True:
            for _, token in self._step({1: slot}):
                slot.output.append(token)
                slot.pending = np.array([token], np.int32)
                yield token
                if token in stops or len(slot.output) >= limit:
                    return
                self._check_current(call)

    def _step(self, slots: dict[int, _Slot]) -> list[tuple[int, int]]:
        """Feeds every slot what fits in one batch; returns (sequence, next id) where known."""
        self._context.batch.clear()
        ready = []
        # One-token slots first: a prompt may wait for room, a running sequence should not.
        for sequence, slot in sorted(slots.items(), key=lambda item: len(item[1].pending) > 1):
            tokens = slot.pending[: self._context.batch.room]
            if not len(tokens):
                continue
            done = len(tokens) == len(slot.pending)
            row = self._context.batch.add(tokens, slot.position, sequence, int(done))
            slot.position += len(tokens)
            slot.pending = slot.pending[len(tokens) :]
            if done:
                ready.append((sequence, row))
        self._context.decode()
        return [(sequence, int(self._context.read(row, 1)[0].argmax())) for sequence, row in ready]

    def _text_side(self) -> Text:
        return self._model

    def _check_current(self, call: int) -> None:
        self._model.check_open()
        if call != self._call:
            raise EngineError(
                Problem(
                    "logits",
                    "iterator",
                    "the engine to itself until it ends",
                    "another call in between",
                    "finish it first, or open a second engine",
                )
            )

    def close(self) -> None:
        """Frees context, adapter and model, in this order; harmless when called again."""
        self._context.close()
        self._model.close()


def _check_settings(kv_type: str, n_seq_max: int, n_batch: int, n_ctx: int | None) -> None:
    limit = library().llama_max_parallel_sequences() - 1
    for name, good, expected, got in (
        ("kv_type", kv_type in KV_TYPES, "f32 or f16", kv_type),
        ("n_seq_max", 1 <= n_seq_max <= limit, f"1 to {limit}", n_seq_max),
        ("n_batch", n_batch >= n_seq_max, "at least n_seq_max", n_batch),
        ("n_ctx", n_ctx is None or n_ctx >= 1, "at least 1", n_ctx),
    ):
        if not good:
            raise EngineError(Problem("llama.cpp", name, expected, str(got)))
