"""An artifact's greedy replies, generated only where the teacher-forced pass left them open.

Where every argmax is the reference's token, by more than numerical noise, greedy decoding gives the
reference's reply. Where one is not, the reply is known up to there and only the rest is generated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from safegene_runtime.engines.engine import Engine
from safegene_runtime.judging.judge import Judge, label_all
from safegene_runtime.progress import Progress, counted
from safegene_runtime.record.reference import Reference
from safegene_runtime.verifying.forced import ForcedPass

__all__ = ["Labelled", "Reply", "greedy_replies", "label_replies", "tie_logits"]

TIE_LOGITS = {"f32": 1e-3}
TIE_LOGITS_COARSE = 2e-2


@dataclass(frozen=True)
class Reply:
    """One greedy reply, stop id included; `proved` where nothing had to be generated for it."""

    ids: tuple[int, ...]
    proved: bool


@dataclass(frozen=True)
class Labelled:
    """A reply as a judge sees it; `identical` where it is the reference's, token for token."""

    text: str
    label: str
    identical: bool


def tie_logits(precision: str) -> float:
    """A top-2 gap below this may be decided differently by prefill and by decoding one by one."""
    return TIE_LOGITS.get(precision, TIE_LOGITS_COARSE)


def greedy_replies(
    engine: Engine,
    record: Reference,
    indices: Sequence[int],
    passes: Sequence[ForcedPass],
    precision: str,
    tell: Progress,
) -> list[Reply]:
    """The replies to the prompts `indices`, whose teacher-forced `passes` are given in that order."""
    limit = record.meta["decoding"]["max_new_tokens"]
    stops = set(record.meta["decoding"]["stop_ids"])
    tie = tie_logits(precision)
    replies: list[Reply] = []
    todo: list[tuple[int, list[int]]] = []
    for number, (index, one) in enumerate(zip(indices, passes, strict=True)):
        prompt = record.prompts[index]
        doubtful = np.flatnonzero(~one.agree | (one.gap < tie))
        if not len(doubtful):
            replies.append(Reply(tuple(prompt.ref_ids), True))
            continue
        # everything before the first doubtful position is known; that one too, unless it is a tie
        first = int(doubtful[0])
        known = list(prompt.ref_ids[:first])
        if one.gap[first] >= tie:
            known.append(int(one.argmax[first]))
        open_ended = len(known) < limit and not (known and known[-1] in stops)
        replies.append(Reply(tuple(known), not open_ended))
        if open_ended:
            todo.append((number, known))
    if todo:
        prompts = [[*record.prompts[indices[at]].prompt_ids, *known] for at, known in todo]
        step = counted(tell, "generating", len(todo))
        tell("generating", 0, len(todo))
        budgets = [limit - len(known) for _, known in todo]
        made = engine.generate(prompts, budgets, stops, step)
        for (at, known), ids in zip(todo, made, strict=True):
            replies[at] = Reply((*known, *ids), False)
    tell("generating", max(len(todo), 1), max(len(todo), 1))
    return replies


def label_replies(
    engine: Engine,
    record: Reference,
    indices: Sequence[int],
    replies: Sequence[Reply],
    judge: Judge,
) -> list[Labelled]:
    """Text and label of the `replies` to the prompts `indices`.

    A reply that is the reference's has its text and label: there is nothing to judge anew.

    Raises:
        EngineError: the judge gave something else than one label for each reply.
    """
    stops = set(record.meta["decoding"]["stop_ids"])
    found: list[Labelled | None] = [None] * len(replies)
    texts: dict[int, str] = {}
    for number, (index, reply) in enumerate(zip(indices, replies, strict=True)):
        prompt = record.prompts[index]
        if reply.ids == tuple(prompt.ref_ids):
            found[number] = Labelled(prompt.ref_text, prompt.ref_label, True)
        else:
            ids = [token for token in reply.ids if token not in stops]
            texts[number] = engine.detokenize(ids, special=False)
    asked = [record.prompts[indices[number]].text for number in texts]
    labels = label_all(judge, list(texts.values()), asked)
    for (number, text), label in zip(texts.items(), labels, strict=True):
        found[number] = Labelled(text, str(label), False)
    return [one for one in found if one is not None]
