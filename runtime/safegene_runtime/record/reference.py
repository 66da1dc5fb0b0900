"""A reference: what PyTorch + PEFT answered, once, in a form that needs no PyTorch to compare with.

A folder of five files:

    reference.json   format_version, base, adapter, versions, decoding, tokenizer, judge, settings, order,
                     and "files": {name: sha256} of the others
    prompts.jsonl    one object per prompt: id, kind, category, borderline, cluster, attack, text,
                     rendered, ref_text, ref_verdict, base_text, base_verdict
    tokens.npz       prompt_ids, ref_ids, base_ids: int32, all prompts in a row;
                     prompt_offsets, ref_offsets, base_offsets: int64 (N + 1,)
    logits.npz       for the P positions of all reference replies in a row (prompt i has the rows
                     ref_offsets[i] to ref_offsets[i + 1]; row t predicts ref_ids[t] from the prompt and
                     ref_ids[:t]), with and without the adapter, both on the reference's tokens:
                     top_ids      int32   (P, K)  the K tokens that either arm thinks likeliest
                     ref_logits   float32 (P, K)  of base + adapter, exactly as PyTorch gave them
                     base_logits  float32 (P, K)  of the base alone
                     ref_lse      float64 (P,)    log-sum-exp over the vocabulary
                     base_lse     float64 (P,)
                     and for the E distinct tokens that begin a reply of either arm, at the first
                     position of all N prompts:
                     opener_ids   int32   (E,)    ascending
                     ref_openers  float32 (N, E)  logits of base + adapter
                     base_openers float32 (N, E)  logits of the base alone
    factors.npz      what PEFT added to each weight: see `factors.py`; older references have none

The digest of a reference is the SHA-256 of reference.json, which holds the digests of the rest. Equal
content gives equal bytes.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_runtime.errors import FormatError, Problem, Problems, RecordError
from safegene_runtime.formats import strictjson
from safegene_runtime.formats.files import open_regular, read_small_file, sha256_of
from safegene_runtime.record import factors
from safegene_runtime.record.factors import ModuleFactors
from safegene_runtime.record.order import clusters_in_order

__all__ = [
    "Openers",
    "Positions",
    "PromptRecord",
    "Reference",
    "encode_reference",
    "order_seed",
    "read_reference",
]

FORMAT_VERSION = 1
INDEX = "reference.json"
PROMPTS, TOKENS, LOGITS = "prompts.jsonl", "tokens.npz", "logits.npz"
FACTORS = "factors.npz"
KINDS = ("harmful", "benign")
VERDICTS = ("refuse", "comply", "uncertain", "degenerate")
MAX_FILE_BYTES = 4 << 30
MAX_JSON_BYTES = 256 << 20

_META = {
    "base": ("kind", "name", "files"),
    "adapter": ("name", "files", "expression"),
    "versions": ("safegene", "torch", "transformers", "peft"),
    "decoding": ("max_new_tokens", "stop_ids"),
    "tokenizer": (
        "chat_template",
        "chat_template_sha256",
        "bos_id",
        "eos_id",
        "bos_token",
        "eos_token",
    ),
    "judge": ("name", "version", "digest"),
    "settings": ("dtype", "threads", "top_k"),
    "order": ("seed",),
}
_OLD = "it was made before attacks and clusters were recorded: record it again"
_EDITED = "the reference was edited: record it again"
MAX_REPLY_TOKENS = 1 << 20


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 31


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 < value <= MAX_REPLY_TOKENS


_NAME = ("a name", _is_name)
_ID = ("a token id or null", lambda value: value is None or _is_id(value))
_TOKEN = ("a token or null", lambda value: value is None or isinstance(value, str))
_COUNT = (f"1 to {MAX_REPLY_TOKENS}", _is_count)
_FILES = (
    "digests by file name",
    lambda value: isinstance(value, dict) and all(map(_is_name, value.values())),
)
_TYPES: Mapping[str, Mapping[str, tuple[str, Callable[[Any], bool]]]] = {
    "base": {"kind": _NAME, "name": _NAME, "files": _FILES},
    "adapter": {
        "name": _NAME,
        "files": _FILES,
        "expression": ("a name or null", lambda value: value is None or isinstance(value, str)),
    },
    "versions": dict.fromkeys(_META["versions"], _NAME),
    "decoding": {
        "max_new_tokens": _COUNT,
        "stop_ids": (
            "a list of token ids",
            lambda value: isinstance(value, list) and all(map(_is_id, value)),
        ),
    },
    "tokenizer": {"bos_id": _ID, "eos_id": _ID, "bos_token": _TOKEN, "eos_token": _TOKEN},
    "judge": dict.fromkeys(_META["judge"], _NAME),
    "settings": {"dtype": _NAME, "threads": _COUNT, "top_k": _COUNT},
}
_TOKEN_ARRAYS = {
    "prompt_ids": "int32",
    "ref_ids": "int32",
    "base_ids": "int32",
    "prompt_offsets": "int64",
    "ref_offsets": "int64",
    "base_offsets": "int64",
}
_LOGIT_ARRAYS = {
    "top_ids": "int32",
    "ref_logits": "float32",
    "base_logits": "float32",
    "ref_lse": "float64",
    "base_lse": "float64",
}
_OPENER_ARRAYS = {"opener_ids": "int32", "ref_openers": "float32", "base_openers": "float32"}
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class PromptRecord:
    """One prompt and both replies; `ref` is base + adapter, `base` the base alone."""

    id: str
    kind: str
    category: str
    borderline: bool
    cluster: str
    attack: str | None
    text: str
    rendered: str
    prompt_ids: tuple[int, ...]
    ref_ids: tuple[int, ...]
    ref_text: str
    ref_verdict: str
    base_ids: tuple[int, ...]
    base_text: str
    base_verdict: str


@dataclass(frozen=True)
class Positions:
    """The stored logits along one reference reply of T tokens; see the module's description."""

    top_ids: npt.NDArray[np.int32]
    ref_logits: npt.NDArray[np.float32]
    base_logits: npt.NDArray[np.float32]
    ref_lse: npt.NDArray[np.float64]
    base_lse: npt.NDArray[np.float64]


@dataclass(frozen=True)
class Openers:
    """Logits at the first position of N replies, of the E tokens that begin one; see above."""

    opener_ids: npt.NDArray[np.int32]
    ref_openers: npt.NDArray[np.float32]
    base_openers: npt.NDArray[np.float32]


@dataclass(frozen=True)
class Reference:
    """A reference in memory.

    Attributes:
        path: its folder.
        digest: SHA-256 of reference.json.
        meta: reference.json, parsed.
        prompts: in the order they were recorded.
        factors: what PEFT added to each weight; None in a reference that has no factors.npz.
    """

    path: Path
    digest: str
    meta: dict[str, Any]
    prompts: tuple[PromptRecord, ...] = field(repr=False)
    logits: Mapping[str, npt.NDArray[Any]] = field(repr=False)
    ref_offsets: npt.NDArray[np.int64] = field(repr=False)
    factors: tuple[ModuleFactors, ...] | None = field(default=None, repr=False)

    def positions(self, index: int) -> Positions:
        """The stored logits along the reply to prompt `index`."""
        rows = slice(int(self.ref_offsets[index]), int(self.ref_offsets[index + 1]))
        return Positions(**{name: self.logits[name][rows] for name in _LOGIT_ARRAYS})

    def openers(self) -> Openers:
        """The logits of all openers, for all prompts."""
        return Openers(**{name: self.logits[name] for name in _OPENER_ARRAYS})

    def under(self, attacks: Sequence[str]) -> list[int]:
        """Indices of the prompts without an attack, and of those under these.

        Raises:
            RecordError: nothing was recorded under one of them.
        """
        recorded = {prompt.attack for prompt in self.prompts}
        if missing := [name for name in attacks if name not in recorded]:
            raise RecordError(
                Problem(
                    str(self.path),
                    "attacks",
                    f"prompts recorded under {', '.join(missing)}",
                    "none",
                    "record with --attacks, or verify without",
                )
            )
        return [n for n, one in enumerate(self.prompts) if one.attack in (None, *attacks)]

    def order(self) -> tuple[int, ...]:
        """Indices of the prompts in the order of a sequential test, near-duplicates together."""
        places = {prompt.id: number for number, prompt in enumerate(self.prompts)}
        groups = clusters_in_order(self.prompts, self.meta["order"]["seed"])
        return tuple(places[prompt.id] for group in groups for prompt in group)


def order_seed(prompts: Sequence[PromptRecord]) -> str:
    """A seed that follows from ids and texts alone, so that nobody can choose the order."""
    rows = sorted([prompt.id, prompt.text] for prompt in prompts)
    return sha256_of(json.dumps(rows, ensure_ascii=True).encode())


def encode_reference(
    meta: Mapping[str, Any],
    prompts: Sequence[PromptRecord],
    positions: Sequence[Positions],
    openers: Openers,
    added: Sequence[ModuleFactors] = (),
) -> dict[str, bytes]:
    """The files of a reference, by name.

    Args:
        meta: the sections of reference.json without `format_version`, `order` and `files`.
        prompts: at least one.
        positions: one for each prompt, with as many rows as its `ref_ids`.
        openers: of all first tokens of `ref_ids` and `base_ids`.
        added: what PEFT added to each weight; without it there can be no static proof.
    """
    tokens: dict[str, npt.NDArray[Any]] = {}
    for arm in ("prompt", "ref", "base"):
        rows = [getattr(prompt, f"{arm}_ids") for prompt in prompts]
        tokens[f"{arm}_ids"] = np.asarray([one for row in rows for one in row], dtype=np.int32)
        tokens[f"{arm}_offsets"] = np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(
            np.int64
        )
    logits = {
        name: np.concatenate([getattr(one, name) for one in positions]).astype(kind)
        for name, kind in _LOGIT_ARRAYS.items()
    }
    logits |= {name: getattr(openers, name).astype(kind) for name, kind in _OPENER_ARRAYS.items()}
    lines = [
        json.dumps({name: getattr(prompt, name) for name in _PROMPT_FIELDS}, ensure_ascii=False)
        for prompt in prompts
    ]
    files = {
        PROMPTS: ("\n".join(lines) + "\n").encode(),
        TOKENS: _npz(tokens),
        LOGITS: _npz(logits),
    }
    if added:
        files[FACTORS] = _npz(factors.encode(added))
    index = {
        "format_version": FORMAT_VERSION,
        **meta,
        "order": {"seed": order_seed(prompts)},
        "files": {name: sha256_of(data) for name, data in files.items()},
    }
    return {**files, INDEX: strictjson.dumps(index)}


_PROMPT_FIELDS = (
    "id",
    "kind",
    "category",
    "borderline",
    "cluster",
    "attack",
    "text",
    "rendered",
    "ref_text",
    "ref_verdict",
    "base_text",
    "base_verdict",
)


def read_reference(path: Path) -> Reference:
    """Reads and checks a reference.

    Raises:
        FormatError: no folder at all, which is a wrong path and no record.
        RecordError: missing files, edited files, or contents that contradict each other.
    """
    path = Path(path)
    problems = Problems()
    if not (path / INDEX).exists():
        got = f"a folder without {INDEX}"
        if not path.is_dir():
            got = "a file" if path.exists() else "nothing there"
        fix = "check the path, or record a reference first"
        problems.add(str(path), "reference", "a folder made by `safegene record`", got, fix)
        problems.raise_if_any(RecordError if path.is_dir() else FormatError)
    try:
        raw = read_small_file(path / INDEX, MAX_JSON_BYTES)
        meta = strictjson.loads(raw, str(path / INDEX))
        _check_meta(meta, str(path / INDEX), problems)
        problems.raise_if_any(RecordError)
        data = {
            name: _read_checked(path / name, digest, problems)
            for name, digest in meta["files"].items()
        }
        problems.raise_if_any(RecordError)
        rows = [
            strictjson.loads(line, f"{path / PROMPTS}:{number}")
            for number, line in enumerate(data[PROMPTS].splitlines(), start=1)
        ]
        tokens = _load(data[TOKENS], _TOKEN_ARRAYS, str(path / TOKENS), problems)
        arrays = {**_LOGIT_ARRAYS, **_OPENER_ARRAYS}
        logits = _load(data[LOGITS], arrays, str(path / LOGITS), problems)
        added = None
        if FACTORS in data:
            stored = _load(data[FACTORS], factors.ARRAYS, str(path / FACTORS), problems)
            problems.raise_if_any(RecordError)
            added = factors.decode(stored, str(path / FACTORS), problems)
    except RecordError:
        raise
    except FormatError as error:
        raise RecordError(error.problems) from error
    _check_rows(rows, str(path / PROMPTS), problems)
    problems.raise_if_any(RecordError)
    _check_arrays(tokens, logits, len(rows), path, problems)
    problems.raise_if_any(RecordError)
    prompts = []
    for number, row in enumerate(rows):
        ids: dict[str, Any] = {
            f"{arm}_ids": tuple(
                int(one)
                for one in tokens[f"{arm}_ids"][
                    tokens[f"{arm}_offsets"][number] : tokens[f"{arm}_offsets"][number + 1]
                ]
            )
            for arm in ("prompt", "ref", "base")
        }
        prompts.append(PromptRecord(**row, **ids))
    _check_replies(prompts, meta["decoding"], str(path / TOKENS), problems)
    if meta["order"]["seed"] != order_seed(prompts):
        problems.add(
            str(path / INDEX),
            "order.seed",
            order_seed(prompts),
            meta["order"]["seed"],
            _EDITED,
        )
    problems.raise_if_any(RecordError)
    return Reference(
        path, sha256_of(raw), meta, tuple(prompts), logits, tokens["ref_offsets"], added
    )


def _check_meta(meta: Any, where: str, problems: Problems) -> None:
    if isinstance(meta, dict) and "order" not in meta:
        problems.add(where, "order", "the seed of the order of prompts", "nothing", _OLD)
        return
    if not strictjson.check_keys(
        meta, where, problems, required=("format_version", *_META, "files")
    ):
        return
    if meta["format_version"] != FORMAT_VERSION or isinstance(meta["format_version"], bool):
        problems.add(
            where,
            "format_version",
            FORMAT_VERSION,
            meta["format_version"],
            "use the version of safegene that recorded it",
        )
        return
    for section, keys in _META.items():
        strictjson.check_keys(meta[section], f"{where}: {section}", problems, required=keys)
    files = meta["files"]
    if (
        not isinstance(files, dict)
        or set(files) - {FACTORS} != {PROMPTS, TOKENS, LOGITS}
        or not all(isinstance(one, str) and _SHA256.fullmatch(one) for one in files.values())
    ):
        problems.add(where, "files", f"digests of {PROMPTS}, {TOKENS}, {LOGITS}", files)
    if len(problems):
        return
    for section, fields in _TYPES.items():
        for name, (expected, holds) in fields.items():
            if not holds(meta[section][name]):
                got = repr(meta[section][name])
                problems.add(where, f"{section}.{name}", expected, got, _EDITED)
    tokenizer = meta["tokenizer"]
    template = tokenizer["chat_template"]
    if (
        not isinstance(template, str)
        or sha256_of(template.encode()) != tokenizer["chat_template_sha256"]
    ):
        problems.add(where, "tokenizer.chat_template", "the text of its digest", "another text")


def _read_checked(path: Path, digest: str, problems: Problems) -> bytes:
    """A file of the reference, if it is the one that reference.json names."""
    if not path.exists():
        problems.add(str(path), "file", "the file", "nothing", "restore it, or record again")
        return b""
    with open_regular(path) as file:
        data = file.read(MAX_FILE_BYTES)
    if sha256_of(data) != digest:
        problems.add(
            str(path),
            "sha256",
            digest,
            sha256_of(data),
            _EDITED,
        )
    return data


def _load(
    data: bytes, arrays: Mapping[str, str], where: str, problems: Problems
) -> dict[str, npt.NDArray[Any]]:
    """Reads an npz: exactly these arrays, of these types; never a pickle."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = {info.filename for info in archive.infolist()}
            if sum(info.file_size for info in archive.infolist()) > MAX_FILE_BYTES:
                problems.add(
                    where, "size", f"at most {MAX_FILE_BYTES} bytes", "more, once unpacked"
                )
                return {}
        if names != {f"{name}.npy" for name in arrays}:
            problems.add(where, "arrays", ", ".join(sorted(arrays)), ", ".join(sorted(names)))
            return {}
        with np.load(io.BytesIO(data), allow_pickle=False) as archive:
            found = {name: archive[name] for name in arrays}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        problems.add(where, "content", "an npz of plain arrays", str(error), "record again")
        return {}
    for name, kind in arrays.items():
        if found[name].dtype != np.dtype(kind):
            problems.add(where, name, kind, found[name].dtype)
        elif found[name].dtype.kind == "f" and not np.isfinite(found[name]).all():
            problems.add(where, name, "finite numbers", "NaN or Inf")
    return found


def _check_rows(rows: Sequence[Any], where: str, problems: Problems) -> None:
    if not rows:
        problems.add(where, "prompts", "at least one", "none", "record with prompts")
    if any(isinstance(row, dict) and not {"cluster", "attack"} <= row.keys() for row in rows):
        problems.add(where, "cluster, attack", "in every prompt", "prompts without", _OLD)
        return
    seen: set[str] = set()
    for number, row in enumerate(rows, start=1):
        here = f"{where}:{number}"
        if not strictjson.check_keys(row, here, problems, required=_PROMPT_FIELDS):
            continue
        for name in _PROMPT_FIELDS:
            if name == "attack" and row[name] is None:
                continue
            if not isinstance(row[name], bool if name == "borderline" else str):
                problems.add(here, name, "a string", type(row[name]).__name__)
        if row["kind"] not in KINDS:
            problems.add(here, "kind", " or ".join(KINDS), row["kind"])
        for name in ("ref_verdict", "base_verdict"):
            if row[name] not in VERDICTS:
                problems.add(here, name, ", ".join(VERDICTS), row[name])
        name = str(row["id"]).partition("@")[2]
        if (row["attack"] or "") != name or row["attack"] == "":
            problems.add(here, "attack", f"that of the id {row['id']}", row["attack"])
        if row["attack"] is not None and row["kind"] != "harmful":
            problems.add(here, "kind", "harmful: it is under attack", row["kind"])
        if not row["cluster"]:
            problems.add(here, "cluster", "a name", "nothing")
        if str(row["id"]) in seen:
            problems.add(here, "id", "each id once", row["id"], "record again with other ids")
        seen.add(str(row["id"]))


def _check_arrays(
    tokens: Mapping[str, npt.NDArray[Any]],
    logits: Mapping[str, npt.NDArray[Any]],
    count: int,
    path: Path,
    problems: Problems,
) -> None:
    for arm in ("prompt", "ref", "base"):
        ids, offsets = tokens[f"{arm}_ids"], tokens[f"{arm}_offsets"]
        if ids.ndim != 1 or (ids < 0).any():
            problems.add(str(path / TOKENS), f"{arm}_ids", "token ids in a row", ids.shape)
        if (
            offsets.shape != (count + 1,)
            or offsets[0] != 0
            or offsets[-1] != len(ids)
            or (np.diff(offsets) < 1).any()
        ):
            problems.add(
                str(path / TOKENS),
                f"{arm}_offsets",
                f"{count + 1} ascending, 0 to {len(ids)}",
                offsets.shape,
            )
    rows = len(tokens["ref_ids"])
    top = logits["top_ids"].shape
    if len(top) != 2 or top[0] != rows or top[1] < 1:
        problems.add(str(path / LOGITS), "top_ids", f"({rows}, K)", top)
        return
    if (logits["top_ids"] < 0).any():
        problems.add(str(path / LOGITS), "top_ids", "token ids", logits["top_ids"].min())
    for name in _LOGIT_ARRAYS:
        wanted = (rows,) if name.endswith("lse") else top
        if logits[name].shape != wanted:
            problems.add(str(path / LOGITS), name, wanted, logits[name].shape)
    if not len(problems):
        _check_openers(tokens, logits, str(path / LOGITS), problems)


def _check_replies(
    prompts: Sequence[PromptRecord], decoding: Mapping[str, Any], where: str, problems: Problems
) -> None:
    """A reply ends at its stop id, or is as long as it may be."""
    limit, stops = decoding["max_new_tokens"], frozenset(decoding["stop_ids"])
    for prompt in prompts:
        for arm, ids in (("ref_ids", prompt.ref_ids), ("base_ids", prompt.base_ids)):
            ended = ids[-1] in stops
            if len(ids) > limit or (len(ids) < limit and not ended) or stops & {*ids[:-1]}:
                expected = f"{limit} tokens, or fewer up to the first stop id"
                got = f"{len(ids)}, {'with' if stops & {*ids} else 'without'} one"
                problems.add(where, f"{prompt.id}: {arm}", expected, got, _EDITED)


def _check_openers(
    tokens: Mapping[str, npt.NDArray[Any]],
    logits: Mapping[str, npt.NDArray[Any]],
    where: str,
    problems: Problems,
) -> None:
    """Openers are the tokens that begin replies, and stored twice they have one logit."""
    ids = logits["opener_ids"]
    firsts = [tokens[f"{arm}_ids"][tokens[f"{arm}_offsets"][:-1]] for arm in ("ref", "base")]
    wanted = np.unique(np.concatenate(firsts))
    if not np.array_equal(ids, wanted):
        problems.add(where, "opener_ids", "the first tokens of all replies", ids.shape)
        return
    rows = tokens["ref_offsets"][:-1]
    same = logits["top_ids"][rows][:, :, None] == ids  # (N, K, E)
    for arm in ("ref", "base"):
        found = logits[f"{arm}_openers"]
        if found.shape != (len(rows), len(ids)):
            problems.add(where, f"{arm}_openers", (len(rows), len(ids)), found.shape)
            continue
        again = logits[f"{arm}_logits"][rows][:, :, None]
        if (same & (again != found[:, None, :])).any():
            problems.add(
                where, f"{arm}_openers", f"the logits in {arm}_logits", "others", "record again"
            )


def _npz(arrays: Mapping[str, npt.NDArray[Any]]) -> bytes:
    """An npz whose bytes depend on nothing but the arrays."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        for name in sorted(arrays):
            one = io.BytesIO()
            np.lib.format.write_array(one, np.ascontiguousarray(arrays[name]), allow_pickle=False)
            info = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(info, one.getvalue())
    return out.getvalue()
