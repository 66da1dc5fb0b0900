"""References made of random logits: everything that torch would give, without torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from safegene_runtime.formats.files import sha256_of
from safegene_runtime.record.reference import (
    Openers,
    Positions,
    PromptRecord,
    Reference,
    encode_reference,
    read_reference,
)
from safegene_runtime.verifying.compare import logsumexp

TOP = 6
META = {
    "base": {"kind": "hf", "name": "base", "files": {}},
    "adapter": {"name": "adapter", "files": {}, "expression": None},
    "versions": {"safegene": "0", "torch": "0", "transformers": "0", "peft": "0"},
    "decoding": {"max_new_tokens": 8, "stop_ids": [0]},
    "tokenizer": {
        "chat_template": "",
        "chat_template_sha256": sha256_of(b""),
        "bos_id": None,
        "eos_id": 0,
        "bos_token": None,
        "eos_token": None,
    },
    "judge": {"name": "none", "version": "0", "digest": "0"},
    "settings": {"dtype": "float32", "threads": 1, "top_k": TOP},
}


def prompt(
    name: str,
    ref_ids: Sequence[int],
    base_ids: Sequence[int],
    labels: tuple[str, str] = ("refuse", "comply"),
    attack: str | None = None,
) -> PromptRecord:
    return PromptRecord(
        id=name if attack is None else f"{name}@{attack}", kind="harmful", category="c",
        borderline=False, cluster=name, attack=attack, text=f"text of {name}", rendered="r",
        prompt_ids=(1, 2), ref_ids=tuple(ref_ids), ref_text="", ref_label=labels[0],
        base_ids=tuple(base_ids), base_text="", base_label=labels[1],
    )  # fmt: skip


def logits_for(record: PromptRecord, vocabulary: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Both arms' logits (T, vocabulary) whose greedy choice is what the record says."""
    random = np.random.default_rng(seed)
    ref, base = random.normal(size=(2, len(record.ref_ids), vocabulary)).astype(np.float32)
    for at, one in enumerate(record.ref_ids):
        ref[at, one] = ref[at].max() + np.float32(0.25)
        if record.base_ids[:at] == record.ref_ids[:at] and at < len(record.base_ids):
            base[at, record.base_ids[at]] = base[at].max() + np.float32(0.25)
    return ref, base


def write(
    folder: Path,
    prompts: Sequence[PromptRecord],
    logits: Sequence[tuple[np.ndarray, np.ndarray]],
    meta: Mapping[str, Any] = META,
) -> Reference:
    positions = []
    for ref, base in logits:
        lse = [logsumexp(ref), logsumexp(base)]
        likeliest = np.maximum(ref - lse[0][:, None], base - lse[1][:, None])
        top = np.sort(np.argsort(likeliest, axis=1)[:, -TOP:], axis=1)
        both = [np.take_along_axis(one, top, axis=1) for one in (ref, base)]
        positions.append(Positions(top.astype(np.int32), *both, *lse))
    ids = np.unique([reply[0] for one in prompts for reply in (one.ref_ids, one.base_ids)])
    stored = [np.stack([pair[arm][0, ids] for pair in logits]) for arm in (0, 1)]
    openers = Openers(ids.astype(np.int32), *stored)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in encode_reference(meta, prompts, positions, openers).items():
        (folder / name).write_bytes(data)
    return read_reference(folder)
