"""A GGUF model: one file, or all the shards that it was split into."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safegene_runtime.errors import FormatError, Problems
from safegene_runtime.formats.gguf.header import GGUFFile, TensorInfo, read_gguf
from safegene_runtime.formats.gguf.types import Value

__all__ = ["GGUFModel", "open_model", "shard_paths"]

_SHARD = re.compile(r"(?P<stem>.+)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.ASCII)
MAX_SHARDS = 10_000


@dataclass(frozen=True)
class GGUFModel:
    """One model: a file, or all its shards; metadata is the first shard's."""

    shards: tuple[GGUFFile, ...]
    metadata: dict[str, Value] = field(repr=False)
    tensors: dict[str, TensorInfo] = field(repr=False)

    def get(self, key: str, default: Any = None) -> Any:
        """The plain value of a metadata key."""
        return self.shards[0].get(key, default)


def shard_paths(path: Path) -> list[Path]:
    """Every file of a model by the name of one of them, in order; nothing is opened."""
    match = _SHARD.fullmatch(path.name)
    if not match or not 1 < int(match["count"]) <= MAX_SHARDS:
        return [path]
    names = f"{match['stem']}-{{:05}}-of-{match['count']}.gguf"
    return [path.with_name(names.format(number + 1)) for number in range(int(match["count"]))]


def open_model(path: Path, *, follow_symlinks: bool = True) -> GGUFModel:
    """Reads a model: one file, or, named by its first shard, all of them.

    Raises:
        FormatError: as `read_gguf`; or shards that are missing, out of order or contradictory.
    """
    path = Path(path)
    first = read_gguf(path, follow_symlinks=follow_symlinks)
    count = first.get("split.count", 0)
    if not count or count == 1:
        return GGUFModel((first,), first.metadata, first.tensors)
    match = _SHARD.fullmatch(path.name)
    problems = Problems()
    if (
        not match
        or type(count) is not int  # 3.0 would equal the number in the name
        or int(match["count"]) != count
        or not 1 < count <= MAX_SHARDS
    ):
        problems.add(
            str(path),
            "split.count",
            "the number in the name, as in x-00001-of-00003.gguf",
            count,
            "restore the name that the shards were made with",
        )
    elif int(match["no"]) != 1 or first.get("split.no") != 0:
        problems.add(
            str(path),
            "split.no",
            "the first shard, 0",
            f"{first.get('split.no')} in a file named {match['no']}",
            f"pass {match['stem']}-00001-of-{match['count']}.gguf",
        )
    problems.raise_if_any(FormatError)
    shards = [first]
    for number, place in enumerate(shard_paths(path)[1:], start=1):
        if not place.exists():
            problems.add(str(place), "shard", "a file", "nothing", "download all shards")
            continue
        shard = read_gguf(place, follow_symlinks=follow_symlinks)
        for key, wanted in (("split.no", number), ("split.count", count)):
            if shard.get(key) != wanted:
                problems.add(
                    str(shard.path), key, wanted, shard.get(key), "download all shards again"
                )
        shards.append(shard)
    problems.raise_if_any(FormatError)
    tensors: dict[str, TensorInfo] = {}
    for shard in shards:
        for name, info in shard.tensors.items():
            if name in tensors:
                problems.add(
                    str(shard.path),
                    f"tensor {name!r}",
                    "in one shard",
                    "in two shards",
                    "download all shards again",
                )
            tensors[name] = info
    stated = first.get("split.tensors.count")
    if stated != len(tensors):
        problems.add(
            str(path), "split.tensors.count", len(tensors), stated, "download all shards again"
        )
    problems.raise_if_any(FormatError)
    return GGUFModel(tuple(shards), first.metadata, tensors)
