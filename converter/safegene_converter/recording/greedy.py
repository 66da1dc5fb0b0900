"""Greedy replies in PyTorch, many prompts at once, with the logits each prompt gives alone.

Prompts share their beginning (system prompt): it is evaluated once. Prompts of similar length go
together, padded between that and their own tokens; the mask takes the padding out of the attention,
and positions do not count it. But a sliding window counts it: there, prompts that may outgrow the
window share nothing, so that all padding stands before them and no window has any within. And a layer
with a state, a convolution for one, has no mask: there, nothing is shared, and nothing padded.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "Begun",
    "Tell",
    "batches",
    "begin",
    "follow",
    "generate",
    "greedy_replies",
    "prefill",
    "shared_length",
]

BATCH = 48
"""Prompts evaluated together: enough to keep two cores busy, few enough to keep memory small."""

Tell = Callable[[str, int, int], None]


def greedy_replies(
    model: Any,
    ids: Sequence[Sequence[int]],
    limit: int,
    stop_ids: Sequence[int],
    tell: Tell | None = None,
) -> list[list[int]]:
    """Greedy replies of a model as it is now, a stop id included, in the order of the prompts."""
    found: dict[int, list[int]] = {}
    with torch.inference_mode():
        shared = shared_length(model, ids, limit)
        cache = prefill(model, ids[0][:shared])
        for batch in batches(model, ids):
            begun = begin(model, cache, [ids[index][shared:] for index in batch])
            replies, _ = generate(model, begun, limit, stop_ids, keep=False)
            found.update(zip(batch, replies, strict=True))
            if tell:
                tell("answering in PyTorch", len(found), len(ids))
    return [found[index] for index in range(len(ids))]


def shared_length(model: Any, ids: Sequence[Sequence[int]], limit: int) -> int:
    """How many leading tokens are evaluated once for all prompts; at least one of each is left.

    Args:
        model: what they are for.
        ids: of the prompts.
        limit: tokens of a reply.
    """
    if _has_state(model):
        return 0
    window = getattr(model.config, "sliding_window", None)
    if window is not None and max(map(len, ids)) + limit > window:
        return 0
    most = min(map(len, ids)) - 1
    return next((at for at in range(most) if len({row[at] for row in ids}) > 1), most)


def _has_state(model: Any) -> bool:
    """Whether a layer does something else than attend to tokens."""
    kinds = getattr(model.config, "layer_types", None) or ()
    return any("attention" not in kind or "linear" in kind for kind in kinds)


def batches(model: Any, ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Prompts of similar length, at most BATCH together; of the same length where none may be padded."""
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    groups = [order]
    if _has_state(model):
        groups = [list(same) for _, same in itertools.groupby(order, lambda index: len(ids[index]))]
    return [group[at : at + BATCH] for group in groups for at in range(0, len(group), BATCH)]


def prefill(model: Any, ids: Sequence[int]) -> Any:
    """The cache behind the tokens that all prompts begin with; None where there are none."""
    if not ids:
        return None
    return model(torch.tensor([list(ids)]), use_cache=True, logits_to_keep=1).past_key_values


def _expanded(cache: Any, count: int) -> Any:
    if cache is None:
        return None
    mine = copy.deepcopy(cache)
    mine.batch_repeat_interleave(count)
    return mine


@dataclass(frozen=True)
class Begun:
    """A batch of prompts, evaluated: to follow replies first, if at all, and then to make them.

    Attributes:
        past: the cache, (batch, length) of it filled.
        mask: (batch, length), 0 where a row is padded.
        last: (batch, vocab), the logits after the prompts.
    """

    past: Any
    mask: torch.Tensor
    last: torch.Tensor


def begin(model: Any, cache: Any, tails: Sequence[Sequence[int]]) -> Begun:
    """Evaluates prompts behind what they share; short ones are padded on the left."""
    longest = max(len(row) for row in tails)
    tokens = torch.tensor([[0] * (longest - len(row)) + list(row) for row in tails])
    shared = cache.get_seq_length() if cache is not None else 0
    mask = torch.tensor(
        [[1] * shared + [0] * (longest - len(row)) + [1] * len(row) for row in tails]
    )
    output = step(model, tokens, mask, _expanded(cache, len(tails)), 1)
    return Begun(output.past_key_values, mask, output.logits[:, -1, :])


def step(model: Any, tokens: torch.Tensor, mask: torch.Tensor, past: Any, keep: int) -> Any:
    """One pass over `tokens`, the end of what `mask` (batch, length) covers; `past` grows."""
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    return model(
        tokens,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=past,
        use_cache=True,
        logits_to_keep=keep,
    )


def _lengthened(mask: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), count)], dim=1)


def generate(
    model: Any, begun: Begun, limit: int, stop_ids: Sequence[int], keep: bool = True
) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy replies, stop id included, and the logits (batch, limit, vocab) they were chosen from."""
    past, mask, last = begun.past, begun.mask, begun.last
    count = len(last)
    replies: list[list[int]] = [[] for _ in range(count)]
    logits: list[torch.Tensor] = []
    active = [True] * count
    for done in range(1, limit + 1):
        if keep:
            logits.append(last)
        best = last.argmax(dim=-1)
        for row, token in enumerate(best.tolist()):
            if active[row]:
                replies[row].append(token)
                active[row] = token not in stop_ids
        if done == limit or not any(active):
            break
        mask = _lengthened(mask, 1)
        last = step(model, best[:, None], mask, past, 1).logits[:, -1, :]
    return replies, torch.stack(logits, dim=1) if keep else torch.empty(0)


def follow(model: Any, begun: Begun, replies: Sequence[Sequence[int]]) -> torch.Tensor:
    """Teacher-forced logits (batch, T, vocab) along given replies; `begun` is left as it was.

    Short ones are padded on the right, where a causal model does not look.
    """
    first = begun.last[:, None, :]
    count = max(len(reply) for reply in replies) - 1
    if count == 0:
        return first
    rows = [[*reply[:-1], *[0] * (count + 1 - len(reply))] for reply in replies]
    past = copy.deepcopy(begun.past)
    output = step(model, torch.tensor(rows), _lengthened(begun.mask, count), past, count)
    return torch.cat([first, output.logits], dim=1)
