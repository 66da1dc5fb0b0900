"""Engines with one mistake: the prefix of the prompts was computed without the adapter.

What happens where a program keeps a KV cache across a change of the adapter, or loads one that was
saved by the base.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from safegene_runtime.llama_engine import SHARED, LlamaEngine
from safegene_runtime.ort_engine import OrtEngine

Before = tuple[Path, Path | None]
"""The model that filled the cache, and its adapter."""


class LlamaEngineWithStaleCache(LlamaEngine):
    """Takes the shared prefix from the base's cache, by llama.cpp's own saving of sequences."""

    def __init__(self, before: Before, model: Path, adapter: Path | None, **settings: Any) -> None:
        self._base = LlamaEngine(*before, threads=1)
        super().__init__(model, adapter, **settings)

    def _feed_shared(self, ids: np.ndarray) -> None:
        assert len(ids) > 1, "nothing is shared: nothing could be stale"
        llama, other = self._llama, self._base
        other._open_context(len(ids))
        other._feed_shared(ids)
        size = llama.llama_state_seq_get_size(other._context, SHARED)
        buffer = (ctypes.c_uint8 * size)()
        assert llama.llama_state_seq_get_data(other._context, buffer, size, SHARED) == size
        assert llama.llama_state_seq_set_data(self._context, buffer, size, SHARED) == size

    def close(self) -> None:
        self._base.close()
        super().close()


class OrtEngineWithStaleCache(OrtEngine):
    """Feeds what all rows begin with to the base, and the rest to the model, with the base's past."""

    def __init__(self, before: Before, model: Path, adapter: Path | None, **settings: Any) -> None:
        self._base = OrtEngine(*before, threads=1)
        super().__init__(model, adapter, **settings)

    def _run(
        self,
        ids: np.ndarray,
        mask: np.ndarray,
        positions: np.ndarray,
        past: Mapping[str, np.ndarray],
        names: list[str],
    ) -> list[np.ndarray]:
        if next(iter(past.values())).shape[2]:  # decoding goes on
            return super()._run(ids, mask, positions, past, names)
        same = (ids == ids[0]).all(axis=0) & mask.all(axis=0)
        shared = int(np.argmin(same))
        assert shared > 1, "nothing is shared: nothing could be stale"
        presents = [cache.present for cache in self._caches]
        rows = []
        for row, length in enumerate(mask.sum(axis=1)):
            # attention continues a past one sequence at a time, and without padding
            one = slice(row, row + 1)
            start = {name: value[one] for name, value in past.items()}
            stale = self._base._run(
                ids[one, :shared], mask[one, :shared], positions[one, :shared], start, presents
            )
            kept = {cache.past: value for cache, value in zip(self._caches, stale, strict=True)}
            logits, *cached = super()._run(
                ids[one, shared:length],
                mask[one, :length],
                positions[one, shared:length],
                kept,
                names,
            )
            after = ids.shape[1] - length
            # nobody asks for the prefix's own logits, but for their places
            rows.append(
                [
                    np.pad(logits, ((0, 0), (shared, after), (0, 0))),
                    *(np.pad(value, ((0, 0), (0, 0), (0, after), (0, 0))) for value in cached),
                ]
            )
        return [np.concatenate(values) for values in zip(*rows, strict=True)]

    def close(self) -> None:
        self._base.close()
        super().close()
