"""llama.cpp as an engine: many prompts as parallel sequences, their common beginning only once.

Chat prompts begin with the same tokens. Those are evaluated once, in sequence 0, and every other
sequence is told to share their cells of the KV cache (one buffer for all sequences, so sharing
copies nothing). What is left of the prompts is packed, whole sequences at a time, into batches:
attention runs over all cells in use, so a batch that is too large costs more than it saves.

Exactness comes before speed: F32 KV cache, no flash attention, no GPU, and the file is read, not
mapped, so that nobody can change the weights under a model that was verified.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np

from safegene_runtime.cpus import thread_count
from safegene_runtime.engines.engine import checked_ids, shared_length
from safegene_runtime.engines.llama_checks import check_adapter_header, check_model_header
from safegene_runtime.engines.llama_native import (
    TokenBatch,
    engine_error,
    forget_log,
    library,
    logged,
    read_meta,
)
from safegene_runtime.errors import EngineError, Problem
from safegene_runtime.progress import Step

__all__ = ["LlamaEngine"]

# llama.cpp computes attention over the cells in use, rounded up to this many.
CELL_PAD = 256
MIN_GROUP = 128
OUTPUT_SHARE = 8
"""The logits of one call of llama.cpp take at most this part of the model; it holds them twice."""
KV_TYPES = {"f32": 0, "f16": 1}
LOAD_MODE_NONE, LOAD_MODE_MMAP = 0, 1
FLASH_ATTENTION_DISABLED = 0
VOCAB_TYPE_NONE = 0
SHARED = 0
"""The sequence that holds the beginning all others share."""


@dataclass
class _Slot:
    """One sequence that is being generated: what it must still be fed, what came out."""

    index: int
    pending: np.ndarray
    position: int
    output: list[int] = field(default_factory=list)


class LlamaEngine:
    """A GGUF model, and the sidecar adapter where there is one, in llama.cpp on the CPU.

    Args:
        model_path: the model, or the first shard of one; `/proc/self/fd/N` works.
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
        self._model: Any = None
        self._adapter: Any = None
        self._context: Any = None
        self._memory: Any = None
        self._call = 0
        threads = thread_count(threads)
        self._llama = library()
        self._check_settings(kv_type, n_seq_max, n_batch, n_ctx)
        self._path = model_path
        self._threads, self._kv_type = threads, kv_type
        self._n_seq_max, self._n_batch = n_seq_max, n_batch
        header = check_model_header(model_path)
        self._model_bytes = sum(tensor.nbytes for tensor in header.tensors.values())
        adapter_header = (
            check_adapter_header(adapter_path, header) if adapter_path is not None else None
        )
        try:
            self._load_model(mmap)
            if adapter_path is not None:
                self._load_adapter(adapter_path, adapter_header)
            if n_ctx is not None:
                self._open_context(n_ctx)
        except BaseException:
            self.close()
            raise
        self.settings: dict[str, Any] = {
            "threads": threads,
            "kv_type": kv_type,
            "flash_attention": False,
            "gpu_layers": 0,
            "mmap": mmap,
            "n_batch": n_batch,
            "n_seq_max": n_seq_max,
            "adapter_scale": 1.0 if adapter_path is not None else None,
            "system": self._llama.llama_print_system_info().decode().strip(" |"),
        }

    def _check_settings(
        self, kv_type: str, n_seq_max: int, n_batch: int, n_ctx: int | None
    ) -> None:
        limit = self._llama.llama_max_parallel_sequences() - 1
        for name, good, expected, got in (
            ("kv_type", kv_type in KV_TYPES, "f32 or f16", kv_type),
            ("n_seq_max", 1 <= n_seq_max <= limit, f"1 to {limit}", n_seq_max),
            ("n_batch", n_batch >= n_seq_max, "at least n_seq_max", n_batch),
            ("n_ctx", n_ctx is None or n_ctx >= 1, "at least 1", n_ctx),
        ):
            if not good:
                raise EngineError(Problem("llama.cpp", name, expected, str(got)))

    def _load_model(self, mmap: bool) -> None:
        llama = self._llama
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = LOAD_MODE_MMAP if mmap else LOAD_MODE_NONE
        if mmap:  # else llama.cpp copies what it has faster layouts for
            params.use_extra_bufts = False
        params.check_tensors = True
        forget_log()
        self._model = llama.llama_model_load_from_file(os.fsencode(self._path), params)
        if not self._model:
            raise engine_error(
                self._path,
                "model",
                "a model llama.cpp can load",
                "a refusal",
                "is it a whole model of an architecture this build knows?",
            )
        self._vocab = llama.llama_model_get_vocab(self._model)
        if not self._vocab or llama.llama_vocab_type(self._vocab) == VOCAB_TYPE_NONE:
            raise engine_error(self._path, "tokenizer", "a vocabulary", "none")
        self.n_vocab = int(llama.llama_vocab_n_tokens(self._vocab))
        self.n_ctx_train = int(llama.llama_model_n_ctx_train(self._model))
        binding = importlib.metadata.version("llama-cpp-python")
        self.version = f"{llama.llama_version().decode()} (llama-cpp-python {binding})"

    def _load_adapter(self, path: Path, header: Any) -> None:
        llama = self._llama
        forget_log()
        self._adapter = llama.llama_adapter_lora_init(self._model, os.fsencode(path))
        if not self._adapter:
            self._adapter = None
            raise engine_error(
                path,
                "adapter",
                "an adapter llama.cpp can load",
                "a refusal",
                "is it an adapter for this model?",
            )
        # Success proves little: ask for what was understood, and compare with what the file says.
        count = re.search(r"loaded (\d+) tensors from lora file", logged())
        if count and int(count[1]) != len(header.tensors):
            raise engine_error(path, "adapter", f"{len(header.tensors)} tensors loaded", count[1])
        for key, value in header.metadata.items():
            if not isinstance(value.value, str):
                continue
            got = read_meta(llama.llama_adapter_meta_val_str, self._adapter, key.encode())
            if got != value.value:
                raise engine_error(path, key, repr(value.value), f"{got!r} after loading")

    def _open_context(self, cells: int) -> None:
        """Makes sure that there is an empty context with at least `cells` cells.

        Raises:
            EngineError: llama.cpp could not allocate it, or opened another one than asked for.
        """
        llama = self._llama
        # llama.cpp silently shrinks a batch that is larger than the cache.
        cells = -(-max(cells, self._n_batch) // CELL_PAD) * CELL_PAD
        if self._context is not None and llama.llama_n_ctx(self._context) >= cells:
            llama.llama_memory_clear(self._memory, False)
            return
        self._free_context()
        params = llama.llama_context_default_params()
        params.n_ctx = cells
        params.n_batch = params.n_ubatch = self._n_batch
        params.n_seq_max = self._n_seq_max + 1
        self._max_outputs = self._output_limit()
        params.n_outputs_max = params.n_outputs_max_per_seq = self._max_outputs
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = FLASH_ATTENTION_DISABLED
        params.type_k = params.type_v = KV_TYPES[self._kv_type]
        params.offload_kqv = params.op_offload = False
        params.kv_unified = True
        forget_log()
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            self._context = None
            raise engine_error(
                self._path,
                "context",
                f"room for {cells} KV cells",
                "a refusal",
                "is there enough memory?",
            )
        self._memory = llama.llama_get_memory(self._context)
        got = (
            llama.llama_n_ctx(self._context),
            llama.llama_n_seq_max(self._context),
            llama.llama_n_batch(self._context),
            llama.llama_n_ubatch(self._context),
        )
        asked = (cells, self._n_seq_max + 1, self._n_batch, self._n_batch)
        if not self._memory or got != asked:
            raise engine_error(self._path, "context", f"cells, sequences, batch {asked}", str(got))
        if self._adapter is not None:
            adapters = (llama.llama_adapter_lora_p_ctypes * 1)(self._adapter)
            scales = (ctypes.c_float * 1)(1.0)
            code = llama.llama_set_adapters_lora(self._context, adapters, 1, scales)
            if code != 0:
                raise engine_error(self._path, "adapter", "to be applied", f"code {code}")
        self._batch = TokenBatch(llama, self._n_batch)

    def _output_limit(self) -> int:
        """Positions of one batch that may output logits: bounded, as vocabularies are large."""
        outputs = max(self._model_bytes // OUTPUT_SHARE // (4 * self.n_vocab), self._n_seq_max + 1)
        return int(min(outputs, max(self._n_batch, self._n_seq_max + 1)))

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
        rows = [self._checked(ids, f"sequence {i}") for i, ids in enumerate(sequences)]
        if len(keep) != len(rows):
            raise EngineError(Problem("logits", "keep", f"{len(rows)} numbers", str(len(keep))))
        for i, (ids, count) in enumerate(zip(rows, keep, strict=True)):
            if not 1 <= count <= len(ids):
                raise EngineError(Problem("logits", f"keep[{i}]", f"1 to {len(ids)}", str(count)))
        self._call += 1
        return self._logits(rows, list(keep), on_progress, self._call)

    def _logits(
        self, rows: list[np.ndarray], keep: list[int], on_progress: Step | None, call: int
    ) -> Iterator[tuple[int, np.ndarray]]:
        if not rows:
            return
        self._check_current(call)
        shared = shared_length(rows, keep)
        groups = self._pack([len(ids) - shared for ids in rows], shared)
        tails = max(sum(len(rows[i]) - shared for i in group) for group in groups)
        self._open_context(shared + tails)
        self._feed_shared(rows[0][:shared])
        for group in groups:
            for sequence in range(1, len(group) + 1):
                self._share(sequence)
            for part in self._parts(group, keep):
                if len(part) == 1:
                    ((sequence, i),) = part
                    yield i, self._long_logits(rows[i], shared, keep[i], sequence)
                    self._check_current(call)
                    continue
                self._batch.clear()
                firsts = [
                    self._batch.add(rows[i][shared:], shared, sequence, keep[i])
                    for sequence, i in part
                ]
                self._decode()
                for (_, i), first in zip(part, firsts, strict=True):
                    yield i, self._read(first, keep[i])
                    self._check_current(call)
            for sequence in range(1, len(group) + 1):
                self._forget(sequence)
            if on_progress:
                on_progress(len(group))

    def _pack(self, tails: list[int], shared: int) -> list[list[int]]:
        """Groups sequences so that each group is one batch; what is too long stands alone."""
        groups: list[list[int]] = []
        # Fill the padded cells exactly: one more would make every token pay for CELL_PAD more.
        padded = -(-(shared + MIN_GROUP) // CELL_PAD) * CELL_PAD
        limit = min(self._n_batch, padded - shared)
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
            if not parts or outputs + keep[i] > self._max_outputs:
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
            end = min(start + self._n_batch, len(ids))
            if end > first:
                end = min(end, max(start, first) + self._max_outputs)
            count = max(0, end - max(start, first))
            self._batch.clear()
            row = self._batch.add(ids[start:end], start, sequence, count)
            self._decode()
            if count == keep:
                return self._read(row, count)
            if count:
                found = np.empty((keep, self.n_vocab), np.float32) if found is None else found
                found[end - count - first : end - first] = self._read(row, count)
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
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
        if len(limits) != len(prompts):
            raise EngineError(
                Problem("generate", "max_tokens", f"{len(prompts)} numbers", str(len(limits)))
            )
        rows = [self._checked(ids, f"prompt {i}", limits[i]) for i, ids in enumerate(prompts)]
        outputs: list[list[int]] = [[] for _ in rows]
        waiting = [i for i in reversed(range(len(rows))) if limits[i] > 0]
        if not waiting:
            return outputs
        self._call += 1
        shared = shared_length([rows[i] for i in waiting], [1] * len(waiting))
        longest = sorted((len(rows[i]) - shared + limits[i] for i in waiting), reverse=True)
        self._open_context(shared + sum(longest[: self._n_seq_max]))
        self._feed_shared(rows[waiting[0]][:shared])
        slots: dict[int, _Slot] = {}
        free = list(range(self._n_seq_max, 0, -1))
        stops = frozenset(stop_ids)
        while waiting or slots:
            while waiting and free:
                i, sequence = waiting.pop(), free.pop()
                self._share(sequence)
                slots[sequence] = _Slot(i, rows[i][shared:], shared)
            for sequence, token in self._step(slots):
                slot = slots[sequence]
                slot.output.append(token)
                if token in stops or len(slot.output) >= limits[slot.index]:
                    outputs[slot.index] = slot.output
                    del slots[sequence]
                    self._forget(sequence)
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
        row = self._checked(prompt, "prompt", max_tokens)
        self._call += 1
        return self._stream(row, max_tokens, frozenset(stop_ids), self._call)

    def _stream(
        self, row: np.ndarray, limit: int, stops: frozenset[int], call: int
    ) -> Iterator[int]:
        if limit < 1:
            return
        self._check_current(call)
        self._open_context(len(row) + limit)
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
        self._batch.clear()
        ready = []
        # One-token slots first: a prompt may wait for room, a running sequence should not.
        for sequence, slot in sorted(slots.items(), key=lambda item: len(item[1].pending) > 1):
            tokens = slot.pending[: self._batch.room]
            if not len(tokens):
                continue
            done = len(tokens) == len(slot.pending)
            row = self._batch.add(tokens, slot.position, sequence, int(done))
            slot.position += len(tokens)
            slot.pending = slot.pending[len(tokens) :]
            if done:
                ready.append((sequence, row))
        self._decode()
        return [(sequence, int(self._read(row, 1)[0].argmax())) for sequence, row in ready]

    def _checked(self, ids: Sequence[int], where: str, extra: int = 0) -> np.ndarray:
        self._check_open()
        return checked_ids(ids, where, self.n_vocab, self.n_ctx_train, extra).astype(np.int32)

    def _feed_shared(self, ids: np.ndarray) -> None:
        for start in range(0, len(ids), self._n_batch):
            self._batch.clear()
            self._batch.add(ids[start : start + self._n_batch], start, SHARED, 0)
            self._decode()

    def _share(self, sequence: int) -> None:
        self._llama.llama_memory_seq_cp(self._memory, SHARED, sequence, -1, -1)

    def _forget(self, sequence: int) -> None:
        self._llama.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def _decode(self) -> None:
        forget_log()
        code = self._llama.llama_decode(self._context, self._batch.native)
        if code != 0:
            raise engine_error(self._path, "decode", "code 0", f"code {code}")

    def _read(self, row: int, count: int) -> np.ndarray:
        """`count` rows of logits as a view of llama.cpp's memory, float32 (count, n_vocab)."""
        pointer = self._llama.llama_get_logits_ith(self._context, row)
        if not pointer:
            raise engine_error(self._path, "logits", f"a row for token {row} of the batch", "NULL")
        rows = np.ctypeslib.as_array(pointer, shape=(count, self.n_vocab))
        if not np.isfinite(rows.sum()):
            raise engine_error(
                self._path,
                "logits",
                "finite numbers",
                "NaN or infinity",
                "the weights or the adapter are damaged",
            )
        return rows

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        """Text to ids, by llama.cpp's own tokenizer; see `Engine.tokenize`."""
        self._check_open()
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise EngineError(Problem("tokenize", "text", "valid Unicode", str(error))) from error

        def call(buffer: Any, size: int) -> int:
            return int(
                self._llama.llama_tokenize(
                    self._vocab, data, len(data), buffer, size, add_special, parse_special
                )
            )

        return list(_grow(call, ctypes.c_int32, len(data) + 8))

    def detokenize(self, ids: Sequence[int], *, special: bool = True) -> str:
        """Ids to text; see `Engine.detokenize`. Bytes that are not UTF-8 become U+FFFD."""
        if not len(ids):
            return ""
        row = self._checked(ids, "detokenize")
        tokens = row.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))

        def call(buffer: Any, size: int) -> int:
            return int(
                self._llama.llama_detokenize(
                    self._vocab, tokens, len(row), buffer, size, False, special
                )
            )

        return b"".join(_grow(call, ctypes.c_char, 8 * len(row) + 8)).decode("utf-8", "replace")

    def chat_template(self) -> str | None:
        """The template in `tokenizer.chat_template`, if there is one."""
        self._check_open()
        template = self._llama.llama_model_chat_template(self._model, None)
        return template.decode("utf-8") if template is not None else None

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text, if the model has one."""
        self._check_open()
        return _id_or_none(self._llama.llama_vocab_bos(self._vocab))

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, if the model has one."""
        self._check_open()
        return _id_or_none(self._llama.llama_vocab_eos(self._vocab))

    @property
    def add_bos(self) -> bool:
        """Whether `tokenize(add_special=True)` begins with `bos_id`."""
        self._check_open()
        return bool(self._llama.llama_vocab_get_add_bos(self._vocab))

    @property
    def eog_ids(self) -> frozenset[int]:
        """Every id that llama.cpp takes for the end of a generation."""
        self._check_open()
        is_eog: Callable[[Any, int], bool] = self._llama.llama_vocab_is_eog
        return frozenset(i for i in range(self.n_vocab) if is_eog(self._vocab, i))

    def _check_open(self) -> None:
        if not self._model:
            raise EngineError(Problem(str(self._path), "engine", "an open engine", "a closed one"))

    def _check_current(self, call: int) -> None:
        self._check_open()
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

    def _free_context(self) -> None:
        if self._context is not None:
            self._llama.llama_free(self._context)
            self._context = None

    def close(self) -> None:
        """Frees context, adapter and model, in this order; harmless when called again."""
        self._free_context()
        if self._adapter is not None:
            self._llama.llama_adapter_lora_free(self._adapter)
            self._adapter = None
        if self._model:
            self._llama.llama_model_free(self._model)
        self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _grow(call: Callable[[Any, int], int], element: Any, size: int) -> Any:
    """Calls a function that fills a buffer, again with a larger one if it says so."""
    buffer = (element * size)()
    count = call(buffer, size)
    if count < 0:
        buffer = (element * -count)()
        count = call(buffer, -count)
    if count < 0:
        raise engine_error("llama.cpp", "buffer", f"{-count} elements to be enough", "more asked")
    return buffer[:count] if element is not ctypes.c_char else [buffer.raw[:count]]


def _id_or_none(token: int) -> int | None:
    return int(token) if token >= 0 else None
