"""`safegene import`: an adapter that is not read directly, written again as a plain PEFT folder.

    pickles (.bin, .pt)        their tensors, read by torch in a child; one file or several
    safetensors, shards        as `inputs` reads them
    MLX-LM                     transposed, with the scale that its configuration gives (mlx.py)
    names                      those of wrappers and of the adapter itself are taken out

Values keep every bit: they are written in float32. What comes out is read back before it is published.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_converter.importing.mlx import ADAPTERS_NAME, is_mlx, plain_from_mlx
from safegene_converter.inputs.adapter import Adapter, read_adapter
from safegene_converter.inputs.adapter_files import (
    CONFIG_NAME,
    INDEX_NAME,
    MAX_CONFIG_BYTES,
    MAX_WEIGHTS_BYTES,
    WEIGHTS_NAME,
    check_is_adapter,
    pickles_in,
    read_adapter_files,
)
from safegene_converter.inputs.adapter_keys import PREFIX, WRAPPERS
from safegene_converter.inputs.safegene_json import SAFEGENE_NAME
from safegene_converter.inputs.safetensors_reader import read_safetensors
from safegene_runtime.child import deadline_for, run_job
from safegene_runtime.errors import AdapterError, FormatError, Problems
from safegene_runtime.formats import strictjson
from safegene_runtime.formats.files import read_small_file
from safegene_runtime.formats.publish import check_output_free, publish_folder

__all__ = ["import_adapter", "save_tensors"]

_NAMED = re.compile(r"(.+\.lora_[AB])\.([A-Za-z0-9_-]+)\.weight")
"""PEFT's own state dict has the adapter's name in it, which `save_pretrained` takes out."""
_ROOTS = ("model.", "language_model.", "transformer.")

Tensors = dict[str, npt.NDArray[np.float32]]


def import_adapter(old: Path, out: Path, force: bool = False) -> Adapter:
    """Writes an adapter again as PEFT writes it today, and reads it back.

    Args:
        old: the adapter's folder.
        out: the folder to create.
        force: replace an existing `out`.

    Raises:
        SafeGeneError: one of its kinds, with all that is wrong; nothing is left under the name `out`.
    """
    check_output_free(out, force, [old])
    check_is_adapter(old)
    config = strictjson.loads(_small(old / CONFIG_NAME), str(old / CONFIG_NAME))
    problems = Problems()
    if is_mlx(config):
        where = old / ADAPTERS_NAME
        config, tensors = plain_from_mlx(config, _safetensors(where), str(old), problems)
    else:
        tensors = _renamed(_read(old), str(old), problems)
    problems.raise_if_any(AdapterError)
    with publish_folder(out, force) as folder:
        save_tensors(tensors, folder / WEIGHTS_NAME)
        (folder / CONFIG_NAME).write_bytes(strictjson.dumps(config))
        if (old / SAFEGENE_NAME).exists():
            (folder / SAFEGENE_NAME).write_bytes(_small(old / SAFEGENE_NAME))
        read_adapter(folder)
    return read_adapter(out)


def _small(path: Path) -> bytes:
    return read_small_file(path, MAX_CONFIG_BYTES, follow_symlinks=True)


def save_tensors(tensors: Tensors, path: Path) -> None:
    """Writes tensors as PEFT writes them."""
    from safetensors.numpy import save_file

    plain = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
    save_file(plain, path, metadata={"format": "pt"})


def _safetensors(path: Path) -> Tensors:
    file = read_safetensors(path, read_small_file(path, MAX_WEIGHTS_BYTES, follow_symlinks=True))
    return {name: file.read_float32(name) for name in file.tensors}


def _read(old: Path) -> Tensors:
    """The tensors, from whichever files there are; PEFT, too, prefers safetensors to a pickle."""
    if any((old / name).exists() for name in (WEIGHTS_NAME, INDEX_NAME)):
        weights = read_adapter_files(old).weights
        return {name: weights.read_float32(name) for name in weights.tensors}
    shards = sorted(old.glob("adapter_model-[0-9]*-of-[0-9]*.safetensors"))
    return _joined(shards) if shards else _pickled(old)


def _joined(shards: Sequence[Path]) -> Tensors:
    """Shards without an index; all that their names count must be there."""
    problems, tensors = Problems(), Tensors()
    count = int(shards[0].stem.rpartition("-")[2])
    wanted = [f"adapter_model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    if (names := [path.name for path in shards]) != wanted:
        problems.add(str(shards[0].parent), "shards", f"{count} of one save", ", ".join(names),
                     "restore the files that were saved together")  # fmt: skip
    for path in shards:
        _add(tensors, _safetensors(path), path, problems)
    problems.raise_if_any(AdapterError)
    return tensors


def _add(tensors: Tensors, more: Tensors, path: Path, problems: Problems) -> None:
    for name in tensors.keys() & more.keys():
        problems.add(str(path), name, "each tensor in one file", "in two",
                     "remove what is left from another save")  # fmt: skip
    tensors.update(more)


def _pickled(old: Path) -> Tensors:
    """The tensors of every pickle, read in a child."""
    pickles, tensors, problems = pickles_in(old), Tensors(), Problems()
    if not pickles:
        problems.add(str(old), "weights", f"{WEIGHTS_NAME}, its shards, a .bin, or {ADAPTERS_NAME}",
                     "none of them", "pass the folder that the trainer saved")  # fmt: skip
    problems.raise_if_any(AdapterError)
    with tempfile.TemporaryDirectory() as work:
        targets = [Path(work) / str(number) for number in range(len(pickles))]
        run_job(
            "safegene_converter.importing.pickle_child",
            {"sources": list(map(str, pickles)), "targets": list(map(str, targets))},
            what=f"reading {', '.join(path.name for path in pickles)}",
            error=FormatError,
            deadline_s=deadline_for(*pickles),
        )
        for path, target in zip(pickles, targets, strict=True):
            _add(tensors, _safetensors(target), path, problems)
    problems.raise_if_any(AdapterError)
    return tensors


def _renamed(tensors: Mapping[str, Any], where: str, problems: Problems) -> Tensors:
    """The tensors under the names that `save_pretrained` gives them."""
    found, adapters = Tensors(), set[str]()
    for key, values in tensors.items():
        name = ".".join(part for part in key.split(".") if part not in WRAPPERS)
        while name.startswith(PREFIX * 2):
            name = name.removeprefix(PREFIX)
        if name.startswith(_ROOTS):
            name = PREFIX + name
        if named := _NAMED.fullmatch(name):
            adapters.add(named[2])
            name = f"{named[1]}.weight"
        if name in found:
            problems.add(where, key, "one tensor of this name", "two", "save one adapter")
        found[name] = values
    if len(adapters) > 1:
        got = ", ".join(sorted(adapters))
        problems.add(where, "tensors", "those of one adapter", got, "save one of them")
    return found
