"""What makes a base unfit, check by check; `base` puts them together."""

from __future__ import annotations

import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safegene_converter.inputs.safetensors_reader import SafetensorsFile, read_safetensors
from safegene_runtime.architecture.table import Architecture
from safegene_runtime.errors import (
    BaseModelError,
    Problem,
    Problems,
    SafeGeneError,
    UnsupportedError,
)
from safegene_runtime.formats import strictjson
from safegene_runtime.formats.files import open_regular

__all__ = [
    "check_config_features",
    "check_dense",
    "check_folder_files",
    "check_head",
    "check_layers",
    "check_tokenizer",
    "count",
    "read_weights",
]

MAX_TEXT_BYTES = 256 << 20
_TEXT = (".json", ".jinja", ".model", ".tiktoken", ".txt")
_INDEX_NAME = "model.safetensors.index.json"
_OWN_CODE = "models that run their own code are refused"


def check_config_features(config: Mapping[str, Any], where: str, refused: Problems) -> None:
    """Notes what a config.json asks for and we do not do."""
    if config.get("auto_map"):
        refused.add(
            where,
            "auto_map",
            "a model class of transformers itself",
            "code that comes with the model",
            _OWN_CODE,
        )
    if config.get("quantization_config"):
        refused.add(
            where,
            "quantization_config",
            "float weights",
            "quantised weights",
            "pass the float model, or a GGUF of it",
        )


def check_dense(config: Mapping[str, Any], where: str, refused: Problems) -> None:
    """Notes experts, of which a listed architecture has none."""
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if config.get(key):
            refused.add(where, key, "a dense model", f"{config[key]} experts",
                        "MoE models of this architecture are not supported yet")  # fmt: skip


def check_folder_files(folder: Path) -> None:
    """Refuses a folder with something that never ends: transformers and llama.cpp read what is there.

    Links are followed: a download cache consists of them.

    Raises:
        BaseModelError: a pipe or a device, or text that is larger than any tokenizer's.
    """
    problems = Problems()
    for path in [*folder.iterdir(), *folder.glob("additional_chat_templates/*")]:
        try:
            status = path.stat()
        except OSError:  # a link to nothing: who needs it says so
            continue
        if not (stat.S_ISREG(status.st_mode) or stat.S_ISDIR(status.st_mode)):
            problems.add(
                str(path), "file", "a regular file", "a pipe, a socket or a device", "remove it"
            )
        elif path.suffix in _TEXT and status.st_size > MAX_TEXT_BYTES:
            problems.add(
                str(path), "size", f"at most {MAX_TEXT_BYTES} bytes", f"{status.st_size} bytes",
                "is it the right file?",
            )  # fmt: skip
    problems.raise_if_any(BaseModelError)


def check_tokenizer(path: Path, refused: Problems) -> None:
    """Notes a tokenizer with code of its own: llama.cpp's converter would run it."""
    if path.exists():
        config = strictjson.load(path.resolve())
        if not isinstance(config, dict) or config.get("auto_map"):
            refused.add(
                str(path),
                "auto_map",
                "a tokenizer class of transformers itself",
                "code that comes with the model",
                _OWN_CODE,
            )


def read_weights(folder: Path, problems: Problems) -> tuple[SafetensorsFile, ...]:
    """Reads the headers of a folder's safetensors files; notes what is missing."""
    index = folder / _INDEX_NAME
    weight_map: dict[str, str] | None = None
    if index.exists():
        content = strictjson.load(index.resolve())
        weight_map = content.get("weight_map") if isinstance(content, dict) else None
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) and file == Path(file).name for file in weight_map.values()
        ):
            problems.add(str(index), "weight_map", "tensor names and file names", "something else")
            return ()
        file_names = sorted(set(weight_map.values()))
    else:
        file_names = ["model.safetensors"]
    found = []
    for name in file_names:
        file = folder / name
        if not file.exists():
            pickles = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
            problems.add(
                str(file),
                "weights",
                "a safetensors file",
                f"{pickles[0].name} (pickle, never opened)" if pickles else "nothing",
                "convert or download the weights as safetensors",
            )
            continue
        try:
            check_head(file, b"", "a safetensors file")
            found.append(read_safetensors(file.resolve()))
        except SafeGeneError as error:
            problems.extend(error.problems)
    _check_one_reading(folder, file_names, problems)
    if weight_map is not None and len(found) == len(file_names):
        # by the names in the folder: in a download cache they are links to blobs
        stored = {
            (t, name) for name, file in zip(file_names, found, strict=True) for t in file.tensors
        }
        _check_index(index, set(weight_map.items()), stored, problems)
    return tuple(found)


def _check_one_reading(folder: Path, file_names: Sequence[str], problems: Problems) -> None:
    """Notes files that another reader would take for the weights, or add to them."""
    others = {path.name for path in folder.glob("model*.safetensors")} - set(file_names)
    for name in sorted(others):
        problems.add(
            str(folder), name, f"the weights once, in {_shown(file_names)}", "a file that is not one of them",
            "readers differ in which of them they take: remove the files that do not belong",
        )  # fmt: skip
    if (folder / "adapter_config.json").exists():
        problems.add(
            str(folder), "adapter_config.json", "a base alone", "an adapter in the same folder",
            "transformers would load both: keep them in folders of their own",
        )  # fmt: skip


def _check_index(
    index: Path, listed: set[tuple[str, str]], stored: set[tuple[str, str]], problems: Problems
) -> None:
    """Notes tensors that are not in the file that the index names, and those it leaves out."""
    for name, file in sorted(listed - stored):
        problems.add(str(index), name, f"a tensor of {file}", "none", "download the model again")
    for name, file in sorted(stored - listed):
        problems.add(
            str(index), name, f"an entry for the tensor in {file}", "none",
            "readers differ in whether they read it: download the model again",
        )  # fmt: skip


def _shown(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"the {len(names)} files of {_INDEX_NAME}"


def check_layers(
    where: str,
    architecture: Architecture,
    n_layers: int,
    shapes: Mapping[str, tuple[int, int]],
    partial: bool,
    problems: Problems,
    refused: Problems,
) -> None:
    """Checks that every layer has its linear modules, then raises what was collected.

    `partial`: whether layers may lack some, which then only transformers or llama.cpp can judge.
    """
    refused.raise_if_any(UnsupportedError)
    if not problems:
        expected = set(architecture.modules(n_layers))
        missing, extra = sorted(expected - shapes.keys()), sorted(shapes.keys() - expected)
        if partial and shapes:
            missing = []
        if missing:
            problems.add(
                where,
                "weights",
                f"all {len(expected)} linear modules of {n_layers} layers",
                f"{len(missing)} missing, {missing[0]} for one",
                "download the model again",
            )
        if extra:
            problems.add(
                where,
                "weights",
                f"{n_layers} layers",
                f"a tensor of {extra[0]}",
                "config and weights are of different models",
            )
    problems.raise_if_any(BaseModelError)


def check_head(path: Path, magic: bytes, expected: str) -> None:
    """Refuses a git-lfs pointer, or a file that does not start with `magic`."""
    with open_regular(path.resolve()) as file:
        head = file.read(24)
    if head.startswith(b"version https://git-lfs"):
        raise BaseModelError(
            Problem(str(path), "content", expected, "a git-lfs pointer", "run `git lfs pull`")
        )
    if not head.startswith(magic):
        raise BaseModelError(
            Problem(
                str(path),
                "content",
                expected,
                f"a file that starts with {head[:8]!r}" if head else "an empty file",
                "check --base",
            )
        )


def count(value: Any, where: str, name: str, problems: Problems) -> int:
    """A positive integer, or 0 and a problem."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 20:
        return value
    problems.add(where, name, "a positive integer", value)
    return 0
