"""The order in which prompts are asked: ids and a recorded seed fix it, nobody chooses it."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable
from typing import Protocol, TypeVar

__all__ = ["Ordered", "clusters_in_order", "order"]

_Member = TypeVar("_Member", bound="Ordered")


def order(ids: Iterable[str], seed: str) -> tuple[str, ...]:
    """The ids in the order of SHA-256(id, 0x00, seed): fixed by content, like a shuffle.

    Raises:
        ValueError: two ids are the same.
    """
    ids = list(ids)
    if len(set(ids)) != len(ids):
        raise ValueError("two prompts with one id have no order")
    return tuple(sorted(ids, key=lambda one: (_digest(one, seed), one)))


class Ordered(Protocol):
    """What has a place in the order: a prompt or a pair."""

    @property
    def id(self) -> str:
        """What it is called."""
        ...

    @property
    def cluster(self) -> str:
        """Which near-duplicates it belongs to."""
        ...


def clusters_in_order(members: Iterable[_Member], seed: str) -> list[list[_Member]]:
    """The clusters, in the order of their names; within one, in the order of the ids.

    This is the recorded order, for whoever asks prompts.

    Raises:
        ValueError: two ids of a cluster are the same.
    """
    clusters: dict[str, list[_Member]] = defaultdict(list)
    for one in members:
        clusters[one.cluster].append(one)
    found = []
    for name in order(clusters, seed):
        by_id = {one.id: one for one in clusters[name]}
        found.append([by_id[one] for one in order((m.id for m in clusters[name]), seed)])
    return found


def _digest(name: str, seed: str) -> bytes:
    return hashlib.sha256(f"{name}\0{seed}".encode("utf-8", "surrogatepass")).digest()
