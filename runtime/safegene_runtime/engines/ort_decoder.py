"""A decoder in ONNX Runtime: a graph and its weights as bytes that were read here, and what it is fed.

The session is built from those bytes, and the adapter from a copy of its own: ONNX Runtime itself would
map the files, and follow whoever edits them afterwards.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from safegene_runtime.engines.ort_packages import ort_packages
from safegene_runtime.engines.pulse import pulse
from safegene_runtime.errors import EngineError, FormatError, Problem, Problems
from safegene_runtime.formats.files import open_regular
from safegene_runtime.formats.onnx.file import OnnxFile, ValueInfo, read_onnx
from safegene_runtime.formats.sealed import is_sealed, private_path

__all__ = ["Cache", "OrtDecoder"]

READ_BYTES = 4 << 20
QUIET = 4
"""ONNX Runtime's log level FATAL: what it refuses as an error comes as an exception, too."""

ONE_BY_ONE = "GroupQueryAttention"

_FLOATS = {1: "float32", 10: "float16"}
_INTEGERS = {6: "int32", 7: "int64"}
_PAST = re.compile(r"past[\w.]*?(\d+)[._](?:self[._])?(?:decoder[._])?(key|value)")
_PRESENT = re.compile(r"present[\w.]*?(\d+)[._](?:self[._])?(?:decoder[._])?(key|value)")


@dataclass(frozen=True)
class Cache:
    """One input of the KV cache, the output that continues it, and its shape with no past."""

    past: str
    present: str
    n_heads: int
    head_size: int
    dtype: str


class OrtDecoder:
    """A session of ONNX Runtime on the CPU, with its `.onnx_adapter` where there is one.

    Args:
        path: the `.onnx` file.
        adapter_path: an `.onnx_adapter` for it.
        threads: CPU threads.
        head_size: elements of an attention head, where the graph does not say it.

    Attributes:
        caches: inputs and outputs of the KV cache.
        n_vocab: columns of the logits.
        one_by_one: several tokens behind a past are taken for one sequence at a time only.

    Raises:
        FormatError: a file breaks its format.
        EngineError: ONNX Runtime refused, or this is no decoder we can feed.
    """

    def __init__(
        self,
        path: Path,
        adapter_path: Path | None,
        *,
        threads: int,
        head_size: int | None,
    ) -> None:
        (self._ort,) = ort_packages("onnxruntime")
        self._path = path
        graph = _read_whole(path)
        model = read_onnx(path, graph.data)
        self._read_interface(model, head_size)
        self._keep_alive: list[Any] = []
        self._session = self._open(model, graph, threads)
        self._options = self._ort.RunOptions()
        self._options.log_severity_level = QUIET
        if adapter_path is not None:
            self._activate(adapter_path)

    def _read_interface(self, model: OnnxFile, head_size: int | None) -> None:
        """Finds out what to feed: ids, mask, positions, cache; anything else is refused."""
        where, problems = str(self._path), Problems()
        outputs = {value.name: value for value in model.outputs}
        presents = {match.groups(): name for name in outputs if (match := _PRESENT.fullmatch(name))}
        caches: list[Cache] = []
        plain = {"input_ids", "attention_mask", "position_ids"}
        seen: dict[str, ValueInfo] = {}
        for value in model.inputs:
            if value.name in model.overridable:
                continue
            if value.name in plain:
                seen[value.name] = value
                if value.elem_type not in _INTEGERS:
                    problems.add(where, value.name, "integers", f"type {value.elem_type}")
                continue
            match = _PAST.fullmatch(value.name)
            present = presents.get(match.groups()) if match else None
            shape = value.shape or ()
            if present is None or len(shape) != 4 or not isinstance(shape[1], int):
                problems.add(
                    where,
                    value.name,
                    "input_ids, attention_mask, position_ids or a past key or value "
                    "(batch, heads, length, size) with its present",
                    f"an input of shape {value.shape}",
                    "export the decoder with a KV cache, as the onnxruntime-genai builder does",
                )
                continue
            size = shape[3] if isinstance(shape[3], int) else head_size
            if size is None or value.elem_type not in _FLOATS:
                problems.add(
                    where,
                    value.name,
                    "a cache of float32 or float16 whose head size is known",
                    f"type {value.elem_type}, shape {value.shape}",
                )
                continue
            caches.append(Cache(value.name, present, shape[1], size, _FLOATS[value.elem_type]))
        for name in ("input_ids", "attention_mask"):
            if name not in seen:
                problems.add(where, name, "an input of the graph", "none")
        if not caches:
            problems.add(where, "past_key_values", "a KV cache", "none")
        logits = outputs.get("logits")
        extents = logits.shape if logits is not None else None
        vocab = extents[-1] if extents else None
        if extents is None or len(extents) != 3 or not isinstance(vocab, int):
            problems.add(where, "logits", "an output (batch, length, vocabulary)", str(extents))
        problems.raise_if_any(EngineError)
        self.caches = tuple(caches)
        self.one_by_one = any(node.op_type == ONE_BY_ONE for node in model.nodes)
        self._plain = {
            name: _INTEGERS[value.elem_type]  # type: ignore[index]  # checked above
            for name, value in seen.items()
        }
        self.n_vocab = int(vocab)  # type: ignore[arg-type]

    def _open(self, model: OnnxFile, graph: np.ndarray, threads: int) -> Any:
        ort = self._ort
        options = ort.SessionOptions()
        options.log_severity_level = QUIET
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        buffers = {path: _read_whole(path) for path in model.files if path != model.path}
        names, values = [], []
        for name, info in model.initializers.items():
            if info.path is None or info.path == model.path:
                continue
            raw = buffers[info.path][info.offset : info.offset + info.nbytes]
            names.append(name)
            values.append(self._value(raw, info.dtype.name, int(info.dtype), info.shape))
        if names:
            options.add_external_initializers(names, values)
            self._keep_alive = [buffers, values]
        try:
            return ort.InferenceSession(
                graph.tobytes(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's exceptions have no common base
            raise EngineError(
                Problem(
                    str(self._path),
                    "model",
                    "a graph that ONNX Runtime runs",
                    str(error)[:400],
                    "is it made for this version of ONNX Runtime?",
                )
            ) from error

    def _value(self, raw: np.ndarray, kind: str, code: int, shape: tuple[int, ...]) -> Any:
        """An OrtValue over verified bytes."""
        made = self._ort.OrtValue
        numpy_name = {"FLOAT": "float32", "DOUBLE": "float64", "BOOL": "bool"}.get(
            kind, kind.lower()
        )
        aligned = np.require(raw, requirements=["ALIGNED"])
        if kind in ("BFLOAT16", "INT4", "UINT4") or kind.startswith("FLOAT8"):
            width = np.dtype(np.uint16 if kind == "BFLOAT16" else np.uint8)
            return made.ortvalue_from_numpy_with_onnx_type(aligned.view(width).reshape(shape), code)
        dtype = np.dtype(numpy_name)
        if aligned.ctypes.data % dtype.alignment:
            aligned = aligned.copy()
        return made.ortvalue_from_numpy(aligned.view(dtype).reshape(shape))

    def _activate(self, path: Path) -> None:
        adapter = self._ort.LoraAdapter()
        with private_path(path) as place:
            try:
                adapter.Load(place)
            except Exception as error:
                raise EngineError(
                    Problem(str(path), "adapter", "an .onnx_adapter", str(error)[:300])
                ) from error
        self._options.add_active_adapter(adapter)
        self._keep_alive.append(adapter)

    def run(
        self,
        ids: np.ndarray,
        mask: np.ndarray,
        positions: np.ndarray,
        past: Mapping[str, np.ndarray],
        names: list[str],
    ) -> list[np.ndarray]:
        """The outputs of these names, for ids (batch, length) behind a past.

        Raises:
            EngineError: a closed session, ONNX Runtime failed, or logits of another shape.
        """
        self.check_open()
        feed: dict[str, np.ndarray] = dict(past)
        for name, value in (
            ("input_ids", ids),
            ("attention_mask", mask),
            ("position_ids", positions),
        ):
            if name in self._plain:
                feed[name] = value.astype(self._plain[name])
        try:
            found: list[np.ndarray] = self._session.run(names, feed, self._options)
        except Exception as error:
            raise EngineError(
                Problem(str(self._path), "run", "logits", str(error)[:400])
            ) from error
        pulse()
        expected = (*ids.shape, self.n_vocab)
        if names[0] == "logits" and found[0].shape != expected:
            raise EngineError(
                Problem(
                    str(self._path),
                    "logits",
                    f"one row per token, {expected}",
                    str(found[0].shape),
                    "export the decoder with all its logits, without prune_lm_head",
                )
            )
        return found

    def empty(self, count: int) -> dict[str, np.ndarray]:
        """The cache of `count` sequences that have no past."""
        return {
            cache.past: np.zeros((count, cache.n_heads, 0, cache.head_size), cache.dtype)
            for cache in self.caches
        }

    def check_open(self) -> None:
        """Refuses to go on with a session that was closed."""
        if self._session is None:
            raise EngineError(Problem(str(self._path), "engine", "an open engine", "a closed one"))

    def close(self) -> None:
        """Frees the session; harmless when called again."""
        self._session = None
        self._keep_alive = []


def _read_whole(path: Path) -> np.ndarray:
    """A file's bytes, (size,) uint8: its sealed copy where there is one, else read into memory."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size and is_sealed(path):
            return np.memmap(file, np.uint8, mode="r", shape=(size,))
        buffer = np.empty(size, np.uint8)
        view, at = memoryview(buffer), 0  # type: ignore[arg-type]
        while at < size and (count := file.readinto(view[at : at + READ_BYTES])):  # type: ignore[attr-defined]
            at += count
        if at < size or file.read(1):
            raise FormatError(
                Problem(str(path), "size", f"{size} bytes", "another", "it changed: retry")
            )
    return buffer
