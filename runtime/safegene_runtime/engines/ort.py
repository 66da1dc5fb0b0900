"""ONNX Runtime as an engine: a decoder with a KV cache, prompts batched with padding on the right.

The session is built from bytes that were hashed on the way in: the graph as bytes, every external
initializer as a buffer. ONNX Runtime itself would map the data file, and follow whoever edits it
afterwards.

What the sequences of a call share, such as a system prompt, is evaluated once. Padding goes to the
right. A causal model does not look there, GroupQueryAttention counts the mask and writes new keys
right behind the valid ones, and a plain attention masks the gap. So one feed serves the layouts of
the onnxruntime-genai builder, of Optimum and of torch.onnx. But GroupQueryAttention takes several
tokens behind a past for one sequence at a time only: there each goes alone behind a long prefix.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from safegene_runtime.cpus import thread_count
from safegene_runtime.engines.engine import checked_ids, shared_length
from safegene_runtime.engines.ort_packages import ort_packages, read_tokenizer
from safegene_runtime.errors import EngineError, FormatError, ManifestError, Problem, Problems
from safegene_runtime.formats import strictjson
from safegene_runtime.formats.files import open_regular, read_small_file, sha256_of
from safegene_runtime.formats.onnx.file import OnnxFile, ValueInfo, read_onnx
from safegene_runtime.progress import Step

__all__ = ["OrtEngine", "read_text_files"]

MAX_OUTPUT_BYTES = 128 << 20
MAX_TEXT_BYTES = 64 << 20
READ_BYTES = 4 << 20
QUIET = 4
"""ONNX Runtime's log level FATAL: what it refuses as an error comes as an exception, too."""
TEMPLATE_NAME = "chat_template.jinja"

ONE_BY_ONE = "GroupQueryAttention"
MIN_SHARED = 16
"""Where sequences then go one by one: a shared prefix that makes up for the smaller products."""

_FLOATS = {1: "float32", 10: "float16"}
_INTEGERS = {6: "int32", 7: "int64"}
_PAST = re.compile(r"past[\w.]*?(\d+)[._](?:self[._])?(?:decoder[._])?(key|value)")
_PRESENT = re.compile(r"present[\w.]*?(\d+)[._](?:self[._])?(?:decoder[._])?(key|value)")


@dataclass(frozen=True)
class _Cache:
    """One input of the KV cache, the output that continues it, and its shape with no past."""

    past: str
    present: str
    n_heads: int
    head_size: int
    dtype: str


@dataclass(frozen=True)
class _Prefix:
    """First tokens of every sequence, evaluated: caches (1, heads, length, size), in their order."""

    length: int
    caches: tuple[np.ndarray, ...]


@dataclass(frozen=True)
class TextFiles:
    """What turns text into ids, read once from the folder of a model.

    Attributes:
        tokenizer: tokenizer.json.
        template: the chat template, or None.
        bos_token: the token that begins a text, or None.
        eos_token: the token that ends one, or None.
        eos_ids: every id that ends a generation, as the configuration says.
        head_size: elements of one attention head, or None where no configuration says it.
        context_length: positions the model was made for, or None.
    """

    tokenizer: str
    template: str | None
    bos_token: str | None
    eos_token: str | None
    eos_ids: tuple[int, ...]
    head_size: int | None
    context_length: int | None


class OrtEngine:
    """An ONNX decoder, and its `.onnx_adapter` where there is one, in ONNX Runtime on the CPU.

    Args:
        model_path: the `.onnx` file; tokenizer.json and the configuration lie beside it.
        adapter_path: an `.onnx_adapter` for it.
        threads: CPU threads; as many as this process may use when None.
        digests: SHA-256 by file name; what is read must be that.
        n_seq_max: sequences decoded together.

    Raises:
        FormatError: a file breaks its format.
        ManifestError: a file is not the one whose digest was given.
        EngineError: ONNX Runtime is missing or refused, or this is no decoder we can feed.
    """

    name = "ONNX Runtime"

    def __init__(
        self,
        model_path: Path,
        adapter_path: Path | None = None,
        *,
        threads: int | None = None,
        digests: Mapping[str, str] | None = None,
        n_seq_max: int = 16,
    ) -> None:
        self._session: Any = None
        self._path = model_path
        threads = thread_count(threads)
        if n_seq_max < 1:
            raise EngineError(Problem(self.name, "n_seq_max", "at least 1", str(n_seq_max)))
        self._n_seq_max = n_seq_max
        self._ort, _ = ort_packages("onnxruntime", "tokenizers")
        self.version = str(self._ort.__version__)
        self._text = read_text_files(model_path.parent, digests)
        self._tokenizer = read_tokenizer(self._text.tokenizer, str(model_path.parent))
        self._tokenizer.no_truncation()
        graph = _read_verified(model_path, digests)
        model = read_onnx(model_path, graph.data)
        self._read_interface(model)
        self._keep_alive: list[Any] = []
        self._session = self._open(model, graph, threads, digests)
        self._options = self._ort.RunOptions()
        self._options.log_severity_level = QUIET
        if adapter_path is not None:
            self._activate(adapter_path, digests)
        self.settings: dict[str, Any] = {
            "threads": threads,
            "provider": "CPUExecutionProvider",
            "graph_optimization": "all",
            "n_seq_max": n_seq_max,
            "kv_type": self._caches[0].dtype,
            "adapter": adapter_path.name if adapter_path is not None else None,
        }

    # --- opening -----------------------------------------------------------------------------------

    def _read_interface(self, model: OnnxFile) -> None:
        """Finds out what to feed: ids, mask, positions, cache; anything else is refused."""
        where, problems = str(self._path), Problems()
        outputs = {value.name: value for value in model.outputs}
        presents = {match.groups(): name for name in outputs if (match := _PRESENT.fullmatch(name))}
        caches: list[_Cache] = []
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
            size = shape[3] if isinstance(shape[3], int) else self._text.head_size
            if size is None or value.elem_type not in _FLOATS:
                problems.add(
                    where,
                    value.name,
                    "a cache of float32 or float16 whose head size is known",
                    f"type {value.elem_type}, shape {value.shape}",
                )
                continue
            caches.append(_Cache(value.name, present, shape[1], size, _FLOATS[value.elem_type]))
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
        self._caches = tuple(caches)
        self._one_by_one = any(node.op_type == ONE_BY_ONE for node in model.nodes)
        self._plain = {
            name: _INTEGERS[value.elem_type]  # type: ignore[index]  # checked above
            for name, value in seen.items()
        }
        self.n_vocab = int(vocab)  # type: ignore[arg-type]

    def _open(
        self, model: OnnxFile, graph: np.ndarray, threads: int, digests: Mapping[str, str] | None
    ) -> Any:
        ort = self._ort
        options = ort.SessionOptions()
        options.log_severity_level = QUIET
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        buffers = {
            path: _read_verified(path, digests) for path in model.files if path != model.path
        }
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

    def _activate(self, path: Path, digests: Mapping[str, str] | None) -> None:
        with open_regular(path) as file:
            _check_digest(path, sha256_of(file.read()), digests)
            adapter = self._ort.LoraAdapter()
            here = Path(f"/proc/self/fd/{file.fileno()}")
            try:
                adapter.Load(str(here if here.exists() else path))
            except Exception as error:
                raise EngineError(
                    Problem(str(path), "adapter", "an .onnx_adapter", str(error)[:300])
                ) from error
        self._options.add_active_adapter(adapter)
        self._keep_alive.append(adapter)

    # --- running -----------------------------------------------------------------------------------

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
        if len(keep) != len(rows):
            raise EngineError(Problem("logits", "keep", f"{len(rows)} numbers", str(len(keep))))
        for i, (ids, count) in enumerate(zip(rows, keep, strict=True)):
            if not 1 <= count <= len(ids):
                raise EngineError(Problem("logits", f"keep[{i}]", f"1 to {len(ids)}", str(count)))
        return self._logits(rows, list(keep), on_progress)

    def _logits(
        self, rows: list[np.ndarray], keep: list[int], on_progress: Step | None
    ) -> Iterator[tuple[int, np.ndarray]]:
        if not rows:
            return
        prefix = self._evaluate(rows, keep)
        alone = prefix.length > 0 and self._one_by_one
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
        if length == 0 or (self._one_by_one and length < MIN_SHARED):
            return _Prefix(0, tuple(self._empty(1).values()))
        found = self._prefill([rows[0][:length]], _Prefix(0, tuple(self._empty(1).values())), names)
        return _Prefix(length, tuple(found))

    def _prefill(
        self, rows: list[np.ndarray], prefix: _Prefix, names: list[str]
    ) -> list[np.ndarray]:
        """One pass over whole sequences, side by side; the mask lets padding be, on the right."""
        tails = _padded([ids[prefix.length :] for ids in rows])
        count, longest = tails.shape
        positions = prefix.length + np.arange(longest, dtype=np.int64)[None]
        return self._run(
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
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else list(max_tokens)
        if len(limits) != len(prompts) or any(limit < 0 for limit in limits):
            raise EngineError(
                Problem("generate", "max_tokens", f"{len(prompts)} numbers >= 0", str(max_tokens))
            )
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
            found = self._run(
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
        alone = prefix.length > 0 and self._one_by_one
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
        ids, past = row.reshape(1, -1), self._empty(1)
        names = ["logits", *(cache.present for cache in self._caches)]
        for length in range(len(row), len(row) + limit):
            positions = np.arange(length - ids.shape[1], length, dtype=np.int64)[None]
            found = self._run(ids, np.ones((1, length), np.int64), positions, past, names)
            token = int(found[0][0, -1].argmax())
            yield token
            if token in stops:
                return
            ids = np.array([[token]], np.int64)
            past = {cache.past: value for cache, value in zip(self._caches, found[1:], strict=True)}

    def _run(
        self,
        ids: np.ndarray,
        mask: np.ndarray,
        positions: np.ndarray,
        past: Mapping[str, np.ndarray],
        names: list[str],
    ) -> list[np.ndarray]:
        self._check_open()
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

    def _empty(self, count: int) -> dict[str, np.ndarray]:
        return {
            cache.past: np.zeros((count, cache.n_heads, 0, cache.head_size), cache.dtype)
            for cache in self._caches
        }

    def _checked(self, ids: Sequence[int], where: str, extra: int = 0) -> np.ndarray:
        self._check_open()
        return checked_ids(ids, where, self.n_vocab, self._text.context_length, extra)

    # --- text --------------------------------------------------------------------------------------

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        """Text to ids, by the model's own tokenizer.json."""
        self._check_open()
        self._tokenizer.encode_special_tokens = not parse_special
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special).ids
        return ids

    def detokenize(self, ids: Sequence[int], *, special: bool = True) -> str:
        """Ids to text; control tokens are spelt out unless `special` is False."""
        self._check_open()
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=not special)
        return text

    def chat_template(self) -> str | None:
        """The template beside the model, if there is one."""
        return self._text.template

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text, if the model has one."""
        return self._id_of(self._text.bos_token)

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, if the model has one."""
        return self._id_of(self._text.eos_token)

    @property
    def add_bos(self) -> bool:
        """Whether `tokenize(add_special=True)` begins with `bos_id`."""
        first = self.tokenize("x", add_special=True)[:1]
        return self.bos_id is not None and first == [self.bos_id]

    @property
    def eog_ids(self) -> frozenset[int]:
        """Every id that the model's configuration says ends a generation."""
        known = set(self._text.eos_ids)
        if self.eos_id is not None:
            known.add(self.eos_id)
        return frozenset(known)

    def _id_of(self, token: str | None) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token) if token is not None else None
        return found

    def _check_open(self) -> None:
        if self._session is None:
            raise EngineError(Problem(str(self._path), "engine", "an open engine", "a closed one"))

    def close(self) -> None:
        """Frees the session; harmless when called again."""
        self._session = None
        self._keep_alive = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read_text_files(folder: Path, digests: Mapping[str, str] | None = None) -> TextFiles:
    """Reads tokenizer, template and configuration beside a model.

    Raises:
        FormatError: tokenizer.json is missing, or a file breaks its format.
        ManifestError: a file is not the one whose digest was given.
    """

    def read(name: str) -> bytes | None:
        path = folder / name
        if not path.exists():
            return None
        data = read_small_file(path, MAX_TEXT_BYTES)
        _check_digest(path, sha256_of(data), digests)
        return data

    def parsed(name: str) -> dict[str, Any]:
        data = read(name)
        value = strictjson.loads(data, str(folder / name)) if data is not None else {}
        return value if isinstance(value, dict) else {}

    tokenizer = read("tokenizer.json")
    if tokenizer is None:
        raise FormatError(
            Problem(
                str(folder),
                "tokenizer.json",
                "the tokenizer beside the model",
                "nothing",
                "copy it from the model that was exported",
            )
        )
    settings, genai = parsed("tokenizer_config.json"), parsed("genai_config.json")
    config, generation = parsed("config.json"), parsed("generation_config.json")
    template = read(TEMPLATE_NAME)
    text = template.decode("utf-8") if template is not None else settings.get("chat_template")
    model = genai.get("model", {}) if isinstance(genai.get("model"), dict) else {}
    decoder = model.get("decoder", {}) if isinstance(model.get("decoder"), dict) else {}
    head_size = decoder.get("head_size") or config.get("head_dim")
    hidden, heads = config.get("hidden_size"), config.get("num_attention_heads")
    if not head_size and isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        head_size = hidden // heads
    ends: list[int] = []
    for source in (model, generation, config):
        value = source.get("eos_token_id")
        ends += [one for one in (value if isinstance(value, list) else [value]) if type(one) is int]
    length = model.get("context_length") or config.get("max_position_embeddings")
    return TextFiles(
        tokenizer=tokenizer.decode("utf-8"),
        template=text if isinstance(text, str) else None,
        bos_token=_token(settings.get("bos_token")),
        eos_token=_token(settings.get("eos_token")),
        eos_ids=tuple(dict.fromkeys(ends)),
        head_size=head_size if type(head_size) is int and head_size > 0 else None,
        context_length=length if type(length) is int and length > 0 else None,
    )


def _token(value: Any) -> str | None:
    """A special token, plain or as transformers' AddedToken."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_verified(path: Path, digests: Mapping[str, str] | None) -> np.ndarray:
    """A whole file in memory, (size,) uint8, hashed while it is read."""
    with open_regular(path) as file:
        buffer = np.empty(os.fstat(file.fileno()).st_size, np.uint8)
        digest, view, at = hashlib.sha256(), memoryview(buffer), 0  # type: ignore[arg-type]
        while at < len(buffer):
            count = file.readinto(view[at : at + READ_BYTES])  # type: ignore[attr-defined]
            if not count:
                break
            digest.update(view[at : at + count])
            at += count
        if at < len(buffer) or file.read(1):
            raise FormatError(
                Problem(str(path), "size", f"{len(buffer)} bytes", "another", "it changed: retry")
            )
    _check_digest(path, digest.hexdigest(), digests)
    return buffer


def _check_digest(path: Path, found: str, digests: Mapping[str, str] | None) -> None:
    if digests is None:
        return
    expected = digests.get(path.name)
    if expected != found:
        raise ManifestError(
            Problem(
                str(path),
                "sha256",
                expected or "a file that the manifest lists",
                found,
                "the file was changed after it was made: convert again",
            )
        )


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    longest = max(len(row) for row in rows)
    ids = np.zeros((len(rows), longest), np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    return ids


def _mask(lengths: list[int], longest: int) -> np.ndarray:
    mask: np.ndarray = np.arange(longest)[None, :] < np.array(lengths)[:, None]
    return mask.astype(np.int64)
