"""A GGUF model, loaded by libllama with its adapter: weights, vocabulary and chat template.

Success proves little: libllama takes an adapter without tensors for an adapter, so what it understood
is asked back and compared with the file.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from safegene_runtime.cpus import available_bytes
from safegene_runtime.engines.engine import checked_ids
from safegene_runtime.engines.llama_checks import check_adapter_header, check_model_header
from safegene_runtime.engines.llama_native import (
    engine_error,
    forget_log,
    library,
    logged,
    read_meta,
)
from safegene_runtime.errors import EngineError, Problem
from safegene_runtime.formats.sealed import is_sealed, native_path

__all__ = ["LlamaModel"]

LOAD_MODE_NONE, LOAD_MODE_MMAP = 0, 1
VOCAB_TYPE_NONE = 0


class LlamaModel:
    """What libllama loaded: the model, the sidecar adapter where there is one, the vocabulary.

    Args:
        path: the model, or the first shard of one.
        adapter_path: a LoRA GGUF with all scaling inside its B.
        mmap: map the file instead of reading it; a sealed copy is mapped, too, where there is no room for
            another one in memory.

    Attributes:
        native: libllama's pointer to the model; None once it is closed.
        adapter: libllama's pointer to the adapter, or None.
        n_bytes: size of the tensors.
        mmap: whether it was mapped.

    Raises:
        FormatError: a file breaks the GGUF format.
        EngineError: llama.cpp refused, or the adapter is not one for this model.
    """

    def __init__(self, path: Path, adapter_path: Path | None, mmap: bool) -> None:
        self.native: Any = None
        self.adapter: Any = None
        self.path = path
        self._llama = library()
        header = check_model_header(path)
        self.n_bytes = sum(tensor.nbytes for tensor in header.tensors.values())
        # a mapped model is as safe and takes no second copy, but none of llama.cpp's faster layouts
        self.mmap = mmap or (is_sealed(path) and available_bytes() < 1.25 * self.n_bytes)
        side = check_adapter_header(adapter_path, header) if adapter_path is not None else None
        try:
            self._load_model([shard.path for shard in header.shards])
            if adapter_path is not None:
                self._load_adapter(adapter_path, side)
        except BaseException:
            self.close()
            raise

    def _load_model(self, shards: Sequence[Path]) -> None:
        llama = self._llama
        params = llama.llama_model_default_params()
        params.n_gpu_layers = 0
        params.load_mode = LOAD_MODE_MMAP if self.mmap else LOAD_MODE_NONE
        if self.mmap:  # else llama.cpp copies what it has faster layouts for
            params.use_extra_bufts = False
        params.check_tensors = True
        forget_log()
        places = [os.fsencode(native_path(shard)) for shard in shards]
        if len(places) == 1:
            self.native = llama.llama_model_load_from_file(places[0], params)
        else:
            array = (ctypes.c_char_p * len(places))(*places)
            self.native = llama.llama_model_load_from_splits(array, len(places), params)
        if not self.native:
            raise engine_error(
                self.path,
                "model",
                "a model llama.cpp can load",
                "a refusal",
                "is it a whole model of an architecture this build knows?",
            )
        self._vocab = llama.llama_model_get_vocab(self.native)
        if not self._vocab or llama.llama_vocab_type(self._vocab) == VOCAB_TYPE_NONE:
            raise engine_error(self.path, "tokenizer", "a vocabulary", "none")
        self.n_vocab = int(llama.llama_vocab_n_tokens(self._vocab))
        self.n_ctx_train = int(llama.llama_model_n_ctx_train(self.native))
        binding = importlib.metadata.version("llama-cpp-python")
        self.version = f"{llama.llama_version().decode()} (llama-cpp-python {binding})"

    def _load_adapter(self, path: Path, header: Any) -> None:
        llama = self._llama
        forget_log()
        self.adapter = llama.llama_adapter_lora_init(self.native, os.fsencode(native_path(path)))
        if not self.adapter:
            self.adapter = None
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
            got = read_meta(llama.llama_adapter_meta_val_str, self.adapter, key.encode())
            if got != value.value:
                raise engine_error(path, key, repr(value.value), f"{got!r} after loading")

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        """Text to ids, by llama.cpp's own tokenizer; see `Engine.tokenize`."""
        self.check_open()
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
        row = self.checked(ids, "detokenize")
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
        self.check_open()
        template = self._llama.llama_model_chat_template(self.native, None)
        return template.decode("utf-8") if template is not None else None

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text, if the model has one."""
        self.check_open()
        return _id_or_none(self._llama.llama_vocab_bos(self._vocab))

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, if the model has one."""
        self.check_open()
        return _id_or_none(self._llama.llama_vocab_eos(self._vocab))

    @property
    def add_bos(self) -> bool:
        """Whether `tokenize(add_special=True)` begins with `bos_id`."""
        self.check_open()
        return bool(self._llama.llama_vocab_get_add_bos(self._vocab))

    @property
    def eog_ids(self) -> frozenset[int]:
        """Every id that llama.cpp takes for the end of a generation."""
        self.check_open()
        is_eog: Callable[[Any, int], bool] = self._llama.llama_vocab_is_eog
        return frozenset(i for i in range(self.n_vocab) if is_eog(self._vocab, i))

    def checked(self, ids: Sequence[int], where: str, extra: int = 0) -> np.ndarray:
        """Ids as int32 (n,); see `checked_ids`."""
        self.check_open()
        return checked_ids(ids, where, self.n_vocab, self.n_ctx_train, extra).astype(np.int32)

    def check_open(self) -> None:
        """Refuses to go on with a model that was closed."""
        if not self.native:
            raise EngineError(Problem(str(self.path), "engine", "an open engine", "a closed one"))

    def close(self) -> None:
        """Frees adapter and model, in this order; harmless when called again."""
        if self.adapter is not None:
            self._llama.llama_adapter_lora_free(self.adapter)
            self.adapter = None
        if self.native:
            self._llama.llama_model_free(self.native)
        self.native = None


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
