"""A context of llama.cpp: one KV cache for many sequences, one batch at a time, rows of logits."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from safegene_runtime.engines.llama_model import LlamaModel
from safegene_runtime.engines.llama_native import TokenBatch, engine_error, forget_log, library
from safegene_runtime.engines.pulse import pulse

__all__ = ["CELL_PAD", "KV_TYPES", "SHARED", "LlamaContext"]

# llama.cpp computes attention over the cells in use, rounded up to this many.
CELL_PAD = 256
OUTPUT_SHARE = 8
"""The logits of one call of llama.cpp take at most this part of the model; it holds them twice."""
KV_TYPES = {"f32": 0, "f16": 1}
FLASH_ATTENTION_DISABLED = 0
SHARED = 0
"""The sequence that holds the beginning all others share."""


class LlamaContext:
    """Room for sequences of one model, made anew when a call needs more of it.

    Args:
        model: what was loaded.
        threads: CPU threads.
        kv_type: a key of `KV_TYPES`.
        n_seq_max: sequences beside the shared one.
        n_batch: tokens decoded together.

    Attributes:
        native: libllama's pointer, None until `open`.
        batch: what the next `decode` takes.
        max_outputs: positions of one batch that may output logits.
    """

    def __init__(
        self, model: LlamaModel, threads: int, kv_type: str, n_seq_max: int, n_batch: int
    ) -> None:
        self.native: Any = None
        self.n_batch = n_batch
        self._memory: Any = None
        self._llama = library()
        self._model, self._path = model, model.path
        self._threads, self._kv_type, self._n_seq_max = threads, kv_type, n_seq_max
        self.batch = TokenBatch(self._llama, n_batch)
        # bounded, as vocabularies are large
        outputs = max(model.n_bytes // OUTPUT_SHARE // (4 * model.n_vocab), n_seq_max + 1)
        self.max_outputs = int(min(outputs, max(n_batch, n_seq_max + 1)))

    def open(self, cells: int) -> None:
        """Makes sure that there is an empty context with at least `cells` cells.

        Raises:
            EngineError: llama.cpp could not allocate it, or opened another one than asked for.
        """
        llama = self._llama
        # llama.cpp silently shrinks a batch that is larger than the cache.
        cells = -(-max(cells, self.n_batch) // CELL_PAD) * CELL_PAD
        if self.native is not None and llama.llama_n_ctx(self.native) >= cells:
            llama.llama_memory_clear(self._memory, False)
            return
        self.close()
        params = llama.llama_context_default_params()
        params.n_ctx = cells
        params.n_batch = params.n_ubatch = self.n_batch
        params.n_seq_max = self._n_seq_max + 1
        params.n_outputs_max = params.n_outputs_max_per_seq = self.max_outputs
        params.n_threads = params.n_threads_batch = self._threads
        params.flash_attn_type = FLASH_ATTENTION_DISABLED
        params.type_k = params.type_v = KV_TYPES[self._kv_type]
        params.offload_kqv = params.op_offload = False
        params.kv_unified = True
        forget_log()
        self.native = llama.llama_init_from_model(self._model.native, params)
        if not self.native:
            self.native = None
            raise engine_error(
                self._path,
                "context",
                f"room for {cells} KV cells",
                "a refusal",
                "is there enough memory?",
            )
        self._memory = llama.llama_get_memory(self.native)
        got = (
            llama.llama_n_ctx(self.native),
            llama.llama_n_seq_max(self.native),
            llama.llama_n_batch(self.native),
            llama.llama_n_ubatch(self.native),
        )
        asked = (cells, self._n_seq_max + 1, self.n_batch, self.n_batch)
        if not self._memory or got != asked:
            raise engine_error(self._path, "context", f"cells, sequences, batch {asked}", str(got))
        if self._model.adapter is not None:
            adapters = (llama.llama_adapter_lora_p_ctypes * 1)(self._model.adapter)
            scales = (ctypes.c_float * 1)(1.0)
            code = llama.llama_set_adapters_lora(self.native, adapters, 1, scales)
            if code != 0:
                raise engine_error(self._path, "adapter", "to be applied", f"code {code}")

    def feed_shared(self, ids: np.ndarray) -> None:
        """Evaluates what all sequences begin with, in as many batches as it takes."""
        for start in range(0, len(ids), self.n_batch):
            self.batch.clear()
            self.batch.add(ids[start : start + self.n_batch], start, SHARED, 0)
            self.decode()

    def share(self, sequence: int) -> None:
        """Lets a sequence begin with what was fed to all."""
        self._llama.llama_memory_seq_cp(self._memory, SHARED, sequence, -1, -1)

    def forget(self, sequence: int) -> None:
        """Empties a sequence."""
        self._llama.llama_memory_seq_rm(self._memory, sequence, -1, -1)

    def decode(self) -> None:
        """Evaluates the batch.

        Raises:
            EngineError: llama.cpp failed.
        """
        forget_log()
        code = self._llama.llama_decode(self.native, self.batch.native)
        pulse()
        if code != 0:
            raise engine_error(self._path, "decode", "code 0", f"code {code}")

    def read(self, row: int, count: int) -> np.ndarray:
        """`count` rows of logits as a view of llama.cpp's memory, float32 (count, n_vocab).

        Raises:
            EngineError: no such row, or numbers that are not finite.
        """
        pointer = self._llama.llama_get_logits_ith(self.native, row)
        if not pointer:
            raise engine_error(self._path, "logits", f"a row for token {row} of the batch", "NULL")
        rows = np.ctypeslib.as_array(pointer, shape=(count, self._model.n_vocab))
        if not np.isfinite(rows.sum()):
            raise engine_error(
                self._path,
                "logits",
                "finite numbers",
                "NaN or infinity",
                "the weights or the adapter are damaged",
            )
        return rows

    def close(self) -> None:
        """Frees the cache; `open` makes another."""
        if self.native is not None:
            self._llama.llama_free(self.native)
            self.native = None
