"""The files of an adapter folder.

    adapter_config.json         as PEFT writes it
    adapter_model.safetensors   or its shards, with adapter_model.safetensors.index.json
    safegene.json               optional: selected layers, and named expressions

Each is read once, so that what is digested is what is used.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_converter.inputs.safegene_json import SAFEGENE_NAME
from safegene_converter.inputs.safetensors_reader import (
    SafetensorsFile,
    SafetensorsTensor,
    read_safetensors,
)
from safegene_runtime.errors import AdapterError, FormatError, Problem, Problems
from safegene_runtime.formats import strictjson
from safegene_runtime.formats.files import MANIFEST_NAME, read_small_file, sha256_of

__all__ = [
    "CONFIG_NAME", "INDEX_NAME", "MAX_CONFIG_BYTES", "MAX_WEIGHTS_BYTES", "WEIGHTS_NAME", "AdapterFiles",
    "Weights", "check_is_adapter", "pickles_in", "read_adapter_files", "would_do",
]  # fmt: skip

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"
MAX_CONFIG_BYTES = 16 << 20
MAX_WEIGHTS_BYTES = 8 << 30
MAX_SHARDS = 1000

_PICKLES = ("adapter_model*.bin", "pytorch_model*.bin", "*.pt", "*.pth")
_NO_ADAPTERS = (
    (MANIFEST_NAME, "an artifact", "pass the adapter that it was made from"),
    ("reference.json", "a reference", "pass the adapter that it was recorded with"),
    ("config.json", "a whole model", "this is a --base: pass the adapter that PEFT saved"),
)
"""What else may be passed by mistake: a file that tells, what it is, what to do."""

_SCANNED = 1000
"""Entries of a folder that are looked at to find an adapter to name."""


@dataclass(frozen=True)
class Weights:
    """The tensors of an adapter, from one file or from shards.

    Attributes:
        path: the file, or the index of the shards.
        files: every file with tensors.
        tensors: the headers of all of them by name.
    """

    path: Path
    files: tuple[SafetensorsFile, ...]
    tensors: Mapping[str, SafetensorsTensor]

    def read_float32(self, name: str) -> npt.NDArray[np.float32]:
        """Reads one tensor as float32.

        Raises:
            FormatError: it is not a float tensor.
        """
        return next(file for file in self.files if name in file.tensors).read_float32(name)


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter folder holds, parsed as far as its formats go.

    Attributes:
        config: the JSON of adapter_config.json.
        weights: the tensors.
        safegene: the JSON of safegene.json, or None without one.
        digests: SHA-256 by name, of adapter_config.json and of every file of the weights.
    """

    config: Any
    weights: Weights
    safegene: Any | None
    digests: Mapping[str, str]


def read_adapter_files(path: Path) -> AdapterFiles:
    """Reads the files of an adapter folder.

    Raises:
        AdapterError: no folder, missing files, or shards that are not those of the index.
        FormatError: bytes that are not JSON or safetensors, or mean two things.
    """
    check_is_adapter(path)
    _check_weights(path)
    config = _read(path / CONFIG_NAME, MAX_CONFIG_BYTES)
    digests = {CONFIG_NAME: sha256_of(config)}
    safegene = None
    if os.path.lexists(path / SAFEGENE_NAME):
        where = str(path / SAFEGENE_NAME)
        safegene = strictjson.loads(_read(path / SAFEGENE_NAME, MAX_CONFIG_BYTES), where)
    parsed = strictjson.loads(config, str(path / CONFIG_NAME))
    if (path / WEIGHTS_NAME).exists():
        weights = _read_weights(path / WEIGHTS_NAME, {WEIGHTS_NAME: None}, digests)
    else:
        weights = _read_shards(path / INDEX_NAME, digests)
        if safegene is not None:
            raise AdapterError(
                Problem(str(path), SAFEGENE_NAME, f"beside one {WEIGHTS_NAME}", "shards",
                        "save the gene in one file")
            )  # fmt: skip
    return AdapterFiles(parsed, weights, safegene, digests)


def would_do(path: Path) -> str | None:
    """Which folder to pass instead of one that is no adapter: below it, or the one it lies in."""
    if path.is_file():
        path = path.parent
        return f"pass its folder: {path}" if (path / CONFIG_NAME).is_file() else None
    found = [
        folder
        for folder in [*_folders(path), *itertools.chain(*map(_folders, _folders(path)))]
        if (folder / CONFIG_NAME).is_file()
    ]
    if found:
        best = max(found, key=_step)
        others = len(found) - 1
        more = f", or one of {others} others in it" if others else ""
        return f"pass the adapter in it: {best}{more}"
    if path.is_dir() and (path.absolute().parent / CONFIG_NAME).is_file():
        return f"pass the folder that it lies in: {path.absolute().parent}"
    return None


def _folders(path: Path) -> list[Path]:
    try:
        with os.scandir(path) as entries:
            scanned = itertools.islice(entries, _SCANNED)
            return sorted(Path(entry) for entry in scanned if entry.is_dir())
    except OSError:
        return []


def _step(folder: Path) -> tuple[int, int, str]:
    """An adapter beside checkpoints comes first, then the latest checkpoint."""
    found = re.fullmatch(r"(?:checkpoint|epoch|step)[-_](\d{1,12})", folder.name)
    return (0, int(found[1]), "") if found else (1, -len(folder.parts), str(folder))


def pickles_in(path: Path) -> list[Path]:
    """The pickled weights in a folder."""
    return [found for pattern in _PICKLES for found in sorted(path.glob(pattern))]


def check_is_adapter(path: Path) -> None:
    """Refuses what is no adapter folder, naming what it is and what would do.

    Raises:
        AdapterError: no folder, or one without adapter_config.json.
    """
    problems = Problems()
    if not path.is_dir():
        got = "a file" if path.exists() else "nothing there"
        problems.add(str(path), "adapter", f"a folder with {CONFIG_NAME}", got,
                     would_do(path) or "pass the folder that PEFT saved")  # fmt: skip
        problems.raise_if_any(AdapterError)
    if not (path / CONFIG_NAME).exists():
        for name, kind, fix in _NO_ADAPTERS:
            if (path / name).exists():
                problems.add(str(path), "adapter", f"a folder with {CONFIG_NAME}", kind, fix)
                problems.raise_if_any(AdapterError)
        other = would_do(path)
        problems.add(str(path), CONFIG_NAME, "a file", "no such file",
                     other or "pass the folder that PEFT saved")  # fmt: skip
    problems.raise_if_any(AdapterError)


def _check_weights(path: Path) -> None:
    """Refuses a folder whose weights are not there, there twice, or not read directly."""
    problems = Problems()
    one, index = ((path / name).exists() for name in (WEIGHTS_NAME, INDEX_NAME))
    if one and index:
        problems.add(str(path), "weights", f"{WEIGHTS_NAME} or shards", "both",
                     f"PEFT reads {WEIGHTS_NAME}: remove what is left from another save"
                     )  # fmt: skip
    if not one and not index:
        got, fix = "no such file", "pass the folder that PEFT saved"
        if pickles := pickles_in(path):
            got = f"{pickles[0].name} (pickle: it can run code, and is never opened)"
            fix = f"make it plain: safegene import {path} -o NEW"
        elif (path / "adapters.safetensors").exists():
            got = "adapters.safetensors, of MLX-LM"
            fix = f"make it plain: safegene import {path} -o NEW"
        elif shards := sorted(path.glob("adapter_model-*-of-*.safetensors")):
            got = f"{shards[0].name}, a shard, and no {INDEX_NAME}"
            fix = f"restore the index, or make it plain: safegene import {path} -o NEW"
        problems.add(str(path), WEIGHTS_NAME, "a file", got, fix)
    problems.raise_if_any(AdapterError)


def _read(path: Path, max_bytes: int) -> bytes:
    # the hub's cache is made of links; what they lead to is read once and digested
    return read_small_file(path, max_bytes, follow_symlinks=True)


def _read_weights(
    where: Path, shards: Mapping[str, frozenset[str] | None], digests: dict[str, str]
) -> Weights:
    """Reads files beside `where` with the tensors they must have (None: whatever is in them)."""
    files, tensors, left = [], dict[str, SafetensorsTensor](), MAX_WEIGHTS_BYTES
    problems = Problems()
    for name, expected in shards.items():
        path = where.with_name(name)
        data = _read(path, left)
        left -= len(data)
        digests[name] = sha256_of(data)
        file = read_safetensors(path, data)
        for tensor in sorted((expected or file.tensors.keys()) ^ file.tensors.keys()):
            got = "not in it" if tensor not in file.tensors else "a tensor the index has elsewhere"
            problems.add(str(path), tensor, f"the tensors that {INDEX_NAME} says", got,
                         "restore the files that were saved together")  # fmt: skip
        files.append(file)
        tensors.update(file.tensors)
    problems.raise_if_any(AdapterError)
    return Weights(where, tuple(files), tensors)


def _read_shards(index: Path, digests: dict[str, str]) -> Weights:
    data = _read(index, MAX_CONFIG_BYTES)
    digests[INDEX_NAME] = sha256_of(data)
    content = strictjson.loads(data, str(index))
    found = content.get("weight_map") if isinstance(content, dict) else None
    if (
        not isinstance(found, dict)
        or not found
        or not all(isinstance(file, str) and _is_shard(file) for file in found.values())
        or len(set(found.values())) > MAX_SHARDS
    ):
        raise FormatError(
            Problem(str(index), "weight_map", "names of tensors, and of files in this folder",
                    "something else", "restore the index")
        )  # fmt: skip
    shards: dict[str, set[str]] = {}
    for tensor, file in found.items():
        shards.setdefault(file, set()).add(tensor)
    return _read_weights(index, {file: frozenset(shards[file]) for file in sorted(shards)}, digests)


def _is_shard(name: str) -> bool:
    return name.endswith(".safetensors") and name == os.path.basename(name) and "\0" not in name
