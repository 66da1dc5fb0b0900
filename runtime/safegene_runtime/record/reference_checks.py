"""What the files of a reference must say, each by itself and against the others; see `reference.py`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_runtime.engines.chat import READS_CLOCK
from safegene_runtime.errors import Problems
from safegene_runtime.formats.fields import (
    FLAG,
    INTEGER,
    NAME,
    OBJECT,
    SHA256,
    TEXT,
    Kind,
    check_fields,
    check_version,
    integer,
    list_of,
    object_of,
    one_of,
    or_null,
)
from safegene_runtime.formats.files import sha256_of

__all__ = [
    "ATTRIBUTES", "EDITED", "FACTORS", "FORMAT_VERSION", "LABELS", "LOGITS", "LOGIT_ARRAYS",
    "OPENER_ARRAYS", "PROMPTS", "PROMPT_FIELDS", "TOKENS", "TOKEN_ARRAYS", "check_arrays",
    "check_index", "check_replies", "check_rows",
]  # fmt: skip

FORMAT_VERSION = 1
PROMPTS, TOKENS, LOGITS = "prompts.jsonl", "tokens.npz", "logits.npz"
FACTORS = "factors.npz"
KINDS = ("harmful", "benign")
LABELS = ("refuse", "comply", "uncertain", "degenerate")
EDITED = "the reference was edited: record it again"
MAX_REPLY_TOKENS = 1 << 20

_OLD = "it was made before attacks and clusters were recorded: record it again"
_TOKEN_ID = integer(0, (1 << 31) - 1)
_COUNT = integer(1, MAX_REPLY_TOKENS)
_LOCAL_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d")


def _is_time(value: str) -> bool:
    if not _LOCAL_TIME.fullmatch(value):
        return False
    try:
        return datetime.fromisoformat(value).tzinfo is None
    except ValueError:
        return False


_TIME = Kind((str,), "text", "a local time, YYYY-MM-DDTHH:MM:SS", _is_time)
_SECTIONS: Mapping[str, Mapping[str, Kind]] = {
    "base": {"kind": NAME, "name": NAME, "files": object_of(NAME)},
    "adapter": {"name": NAME, "files": object_of(NAME), "expression": or_null(TEXT)},
    "versions": dict.fromkeys(("safegene", "torch", "transformers", "peft"), NAME),
    "decoding": {"max_new_tokens": _COUNT, "stop_ids": list_of(_TOKEN_ID)},
    "tokenizer": {
        "chat_template": TEXT,
        "chat_template_sha256": SHA256,
        "bos_id": or_null(_TOKEN_ID),
        "eos_id": or_null(_TOKEN_ID),
        "bos_token": or_null(TEXT),
        "eos_token": or_null(TEXT),
    },
    "judge": dict.fromkeys(("name", "version", "digest"), NAME),
    "settings": {"dtype": NAME, "threads": _COUNT, "top_k": _COUNT},
    "order": {"seed": TEXT},
}
_OPTIONAL: Mapping[str, Mapping[str, Kind]] = {"tokenizer": {"rendered_at": _TIME}}
_FILES = dict.fromkeys((PROMPTS, TOKENS, LOGITS), SHA256)
PROMPT_FIELDS: Mapping[str, Kind] = {
    "id": TEXT,
    "kind": one_of(*KINDS),
    "category": TEXT,
    "borderline": FLAG,
    "cluster": NAME,
    "attack": or_null(NAME),
    "text": TEXT,
    "rendered": TEXT,
    "ref_text": TEXT,
    "ref_verdict": one_of(*LABELS),
    "base_text": TEXT,
    "base_verdict": one_of(*LABELS),
}
ATTRIBUTES = {"ref_verdict": "ref_label", "base_verdict": "base_label"}
"""What the labels are called in memory: the file says verdict for them."""
TOKEN_ARRAYS = {
    "prompt_ids": "int32",
    "ref_ids": "int32",
    "base_ids": "int32",
    "prompt_offsets": "int64",
    "ref_offsets": "int64",
    "base_offsets": "int64",
}
LOGIT_ARRAYS = {
    "top_ids": "int32",
    "ref_logits": "float32",
    "base_logits": "float32",
    "ref_lse": "float64",
    "base_lse": "float64",
}
OPENER_ARRAYS = {"opener_ids": "int32", "ref_openers": "float32", "base_openers": "float32"}


def check_index(meta: Any, where: str, problems: Problems) -> None:
    """What reference.json must hold: every section, every field, and the template of its digest."""
    if isinstance(meta, dict) and "order" not in meta:
        problems.add(where, "order", "the seed of the order of prompts", "nothing", _OLD)
        return
    fix = "use the version of safegene that recorded it"
    sections = dict.fromkeys(_SECTIONS, OBJECT)
    top = {"format_version": INTEGER, **sections, "files": OBJECT}
    if not check_version(meta, where, FORMAT_VERSION, problems, fix) or not check_fields(
        meta, where, top, problems, fix=EDITED
    ):
        return
    for name, fields in _SECTIONS.items():
        more = _OPTIONAL.get(name)
        check_fields(meta[name], f"{where}: {name}", fields, problems, optional=more, fix=EDITED)
    optional = {FACTORS: SHA256}
    check_fields(meta["files"], f"{where}: files", _FILES, problems, optional=optional, fix=EDITED)
    if len(problems):
        return
    tokenizer = meta["tokenizer"]
    if sha256_of(tokenizer["chat_template"].encode()) != tokenizer["chat_template_sha256"]:
        problems.add(where, "tokenizer.chat_template", "the text of its digest", "another text")
    if ("rendered_at" in tokenizer) != (READS_CLOCK in tokenizer["chat_template"]):
        expected = (
            f"the time of the recording where the template calls {READS_CLOCK}, and only there"
        )
        problems.add(
            where, "tokenizer.rendered_at", expected, tokenizer.get("rendered_at", "nothing"),
            "record it again",
        )  # fmt: skip


def check_rows(rows: Sequence[Any], where: str, problems: Problems) -> None:
    """What prompts.jsonl must hold, line by line: ids once, attacks that belong to their ids."""
    if not rows:
        problems.add(where, "prompts", "at least one", "none", "record with prompts")
    if any(isinstance(row, dict) and not {"cluster", "attack"} <= row.keys() for row in rows):
        problems.add(where, "cluster, attack", "in every prompt", "prompts without", _OLD)
        return
    seen: set[str] = set()
    for number, row in enumerate(rows, start=1):
        here = f"{where}:{number}"
        if not check_fields(row, here, PROMPT_FIELDS, problems):
            continue
        name = row["id"].partition("@")[2]
        if (row["attack"] or "") != name:
            problems.add(here, "attack", f"that of the id {row['id']}", row["attack"])
        if row["attack"] is not None and row["kind"] != "harmful":
            problems.add(here, "kind", "harmful: it is under attack", row["kind"])
        if row["id"] in seen:
            problems.add(here, "id", "each id once", row["id"], "record again with other ids")
        seen.add(row["id"])


def check_arrays(
    tokens: Mapping[str, npt.NDArray[Any]],
    logits: Mapping[str, npt.NDArray[Any]],
    count: int,
    where: str,
    problems: Problems,
) -> None:
    """What tokens.npz and logits.npz must hold for `count` prompts: shapes, and that they fit."""
    for arm in ("prompt", "ref", "base"):
        ids, offsets = tokens[f"{arm}_ids"], tokens[f"{arm}_offsets"]
        if ids.ndim != 1 or (ids < 0).any():
            problems.add(f"{where}/{TOKENS}", f"{arm}_ids", "token ids in a row", ids.shape)
        if (
            offsets.shape != (count + 1,)
            or offsets[0] != 0
            or offsets[-1] != len(ids)
            or (np.diff(offsets) < 1).any()
        ):
            problems.add(
                f"{where}/{TOKENS}",
                f"{arm}_offsets",
                f"{count + 1} ascending, 0 to {len(ids)}",
                offsets.shape,
            )
    rows = len(tokens["ref_ids"])
    top = logits["top_ids"].shape
    if len(top) != 2 or top[0] != rows or top[1] < 1:
        problems.add(f"{where}/{LOGITS}", "top_ids", f"({rows}, K)", top)
        return
    if (logits["top_ids"] < 0).any():
        problems.add(f"{where}/{LOGITS}", "top_ids", "token ids", logits["top_ids"].min())
    for name in LOGIT_ARRAYS:
        wanted = (rows,) if name.endswith("lse") else top
        if logits[name].shape != wanted:
            problems.add(f"{where}/{LOGITS}", name, wanted, logits[name].shape)
    if not len(problems):
        _check_openers(tokens, logits, f"{where}/{LOGITS}", problems)


def check_replies(
    rows: Sequence[Mapping[str, Any]], decoding: Mapping[str, Any], where: str, problems: Problems
) -> None:
    """A reply ends at its stop id, or is as long as it may be."""
    limit, stops = decoding["max_new_tokens"], frozenset(decoding["stop_ids"])
    for row in rows:
        for arm in ("ref_ids", "base_ids"):
            ids = row[arm]
            ended = ids[-1] in stops
            if len(ids) > limit or (len(ids) < limit and not ended) or stops & {*ids[:-1]}:
                expected = f"{limit} tokens, or fewer up to the first stop id"
                got = f"{len(ids)}, {'with' if stops & {*ids} else 'without'} one"
                problems.add(where, f"{row['id']}: {arm}", expected, got, EDITED)


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
