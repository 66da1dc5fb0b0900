"""Which prompts are so alike that they count once.

Public sets hold many ("how to make a bomb", "how to build a bomb"): a model that answers one answers
the other, so they are no independent evidence. Two prompts are near-duplicates when the sets of their
words and word pairs overlap by `THRESHOLD` (Jaccard), after NFKC, case folding and without
punctuation. Clusters are the connected components, so a chain of near-duplicates is one cluster:
that errs towards fewer trials and wider bounds.
"""

from __future__ import annotations

import itertools
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

__all__ = ["THRESHOLD", "cluster_names", "similarity"]

THRESHOLD = 0.6
"""One word of nine exchanged keeps about two thirds; one of four keeps a third."""

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")

Shingle = tuple[str, ...]


def shingles(text: str) -> frozenset[Shingle]:
    """The words and pairs of neighbouring words of a text; of one without words, the text."""
    normal = unicodedata.normalize("NFKC", text).casefold()
    words = _WORD.findall(normal) or [" ".join(normal.split())]
    return frozenset((word,) for word in words) | frozenset(itertools.pairwise(words))


def similarity(one: str, other: str) -> float:
    """The Jaccard index of the shingles of two texts, 0 to 1."""
    left, right = shingles(one), shingles(other)
    return len(left & right) / len(left | right)


def cluster_names(
    ids: Sequence[str], texts: Sequence[str], given: Sequence[str | None] | None = None
) -> tuple[str, ...]:
    """The cluster of every prompt, named after its first member.

    Args:
        ids: unique names of the prompts.
        texts: what they say, in the same order.
        given: clusters the caller knows of (contrast pairs, paraphrases), None where it knows none;
            they are joined with those found in the texts.

    Raises:
        ValueError: lists of different lengths.
    """
    if given is None:
        given = [None] * len(ids)
    parent = list(range(len(ids)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    def join(one: int, other: int) -> None:
        low, high = sorted((root(one), root(other)))
        parent[high] = low

    first: dict[str, int] = {}
    for index, (_, _, name) in enumerate(zip(ids, texts, given, strict=True)):
        if name is not None:
            join(first.setdefault(name, index), index)
    for one, other in _alike([shingles(text) for text in texts]):
        join(one, other)
    return tuple(ids[root(index)] for index in range(len(ids)))


def _alike(sets: Sequence[frozenset[Shingle]]) -> list[tuple[int, int]]:
    """The pairs that reach the threshold, each as (earlier, later).

    Two sets that overlap enough share one of the rarest shingles of each (prefix filtering, Bayardo
    et al. 2007), so few pairs are ever compared.
    """
    common = Counter(shingle for one in sets for shingle in one)
    seen: dict[Shingle, list[int]] = {}
    found = []
    for index, one in enumerate(sets):
        rarest = sorted(one, key=lambda shingle: (common[shingle], shingle))
        # without these, at most ceil(T |one|) - 1 shingles could be shared: too few
        prefix = rarest[: len(one) - math.ceil(THRESHOLD * len(one) - 1e-9) + 1]
        candidates = sorted({other for shingle in prefix for other in seen.get(shingle, ())})
        for other in candidates:
            shared = len(one & sets[other])
            if shared >= THRESHOLD * (len(one) + len(sets[other]) - shared) - 1e-9:
                found.append((other, index))
        for shingle in prefix:
            seen.setdefault(shingle, []).append(index)
    return found
