"""A reference: what PyTorch + PEFT answered, once, in a form that needs no PyTorch to compare with.

A folder of five files:

    reference.json   format_version, base, adapter, versions, decoding, tokenizer, judge, settings, order,
                     and "files": {name: sha256} of the others; tokenizer.rendered_at is the local time
                     that a template printed which reads the clock, and absent for every other template
    prompts.jsonl    one object per prompt: id, kind, category, borderline, cluster, attack, text,
                     rendered, ref_text, ref_verdict, base_text, base_verdict (a judge's labels)
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
    factors.npz      what PEFT added to each weight: see `added_weights.py`; older references have none

The digest of a reference is the SHA-256 of reference.json, which holds the digests of the rest. Equal
content gives equal bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_runtime.errors import FormatError, Problem, Problems, RecordError
from safegene_runtime.formats import strictjson
from safegene_runtime.formats.files import open_regular, read_small_file, sha256_of
from safegene_runtime.formats.npz import MAX_BYTES, decode_npz, encode_npz
from safegene_runtime.record import added_weights
from safegene_runtime.record.added_weights import ModuleFactors
from safegene_runtime.record.order import clusters_in_order
from safegene_runtime.record.reference_checks import (
    ATTRIBUTES,
    EDITED,
    FACTORS,
    FORMAT_VERSION,
    LOGIT_ARRAYS,
    LOGITS,
    OPENER_ARRAYS,
    PROMPT_FIELDS,
    PROMPTS,
    TOKEN_ARRAYS,
    TOKENS,
    check_arrays,
    check_index,
    check_replies,
    check_rows,
)

__all__ = [
    "Openers",
    "Positions",
    "PromptRecord",
    "Reference",
    "encode_reference",
    "order_seed",
    "read_reference",
]

INDEX = "reference.json"
MAX_JSON_BYTES = 256 << 20


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
    ref_label: str
    base_ids: tuple[int, ...]
    base_text: str
    base_label: str


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
        return Positions(**{name: self.logits[name][rows] for name in LOGIT_ARRAYS})

    def openers(self) -> Openers:
        """The logits of all openers, for all prompts."""
        return Openers(**{name: self.logits[name] for name in OPENER_ARRAYS})

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
        name: np.concatenate([getattr(position, name) for position in positions]).astype(kind)
        for name, kind in LOGIT_ARRAYS.items()
    }
    logits |= {name: getattr(openers, name).astype(kind) for name, kind in OPENER_ARRAYS.items()}
    lines = [
        json.dumps(
            {name: getattr(prompt, ATTRIBUTES.get(name, name)) for name in PROMPT_FIELDS},
            ensure_ascii=False,
        )
        for prompt in prompts
    ]
    files = {
        PROMPTS: ("\n".join(lines) + "\n").encode(),
        TOKENS: encode_npz(tokens),
        LOGITS: encode_npz(logits),
    }
    if added:
        files[FACTORS] = encode_npz(added_weights.encode(added))
    index = {
        "format_version": FORMAT_VERSION,
        **meta,
        "order": {"seed": order_seed(prompts)},
        "files": {name: sha256_of(data) for name, data in files.items()},
    }
    return {**files, INDEX: strictjson.dumps(index)}


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
        meta = strictjson.loads(raw, str(path / INDEX), len(raw))
        check_index(meta, str(path / INDEX), problems)
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
        tokens = decode_npz(data[TOKENS], TOKEN_ARRAYS, str(path / TOKENS), problems)
        arrays = {**LOGIT_ARRAYS, **OPENER_ARRAYS}
        logits = decode_npz(data[LOGITS], arrays, str(path / LOGITS), problems)
        added = None
        if FACTORS in data:
            stored = decode_npz(data[FACTORS], added_weights.ARRAYS, str(path / FACTORS), problems)
            problems.raise_if_any(RecordError)
            added = added_weights.decode(stored, str(path / FACTORS), problems)
    except RecordError:
        raise
    except FormatError as error:
        raise RecordError(error.problems) from error
    check_rows(rows, str(path / PROMPTS), problems)
    problems.raise_if_any(RecordError)
    check_arrays(tokens, logits, len(rows), str(path), problems)
    problems.raise_if_any(RecordError)
    for arm in ("prompt", "ref", "base"):
        parts = np.split(tokens[f"{arm}_ids"], tokens[f"{arm}_offsets"][1:-1])
        for row, part in zip(rows, parts, strict=True):
            row[f"{arm}_ids"] = tuple(part.tolist())
    check_replies(rows, meta["decoding"], str(path / TOKENS), problems)
    prompts = [
        PromptRecord(**{ATTRIBUTES.get(name, name): value for name, value in row.items()})
        for row in rows
    ]
    if meta["order"]["seed"] != order_seed(prompts):
        problems.add(
            str(path / INDEX),
            "order.seed",
            order_seed(prompts),
            meta["order"]["seed"],
            EDITED,
        )
    problems.raise_if_any(RecordError)
    return Reference(
        path, sha256_of(raw), meta, tuple(prompts), logits, tokens["ref_offsets"], added
    )


def _read_checked(path: Path, digest: str, problems: Problems) -> bytes:
    """A file of the reference, if it is the one that reference.json names."""
    if not path.exists():
        problems.add(str(path), "file", "the file", "nothing", "restore it, or record again")
        return b""
    with open_regular(path) as file:
        data = file.read(MAX_BYTES)
    if sha256_of(data) != digest:
        problems.add(
            str(path),
            "sha256",
            digest,
            sha256_of(data),
            EDITED,
        )
    return data
