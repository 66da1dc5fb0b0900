"""What makes a base unfit, check by check; `base` puts them together."""

from __future__ import annotations

from collections.abc import Mapping
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
    "check_head",
    "check_layers",
    "check_tokenizer",
    "count",
    "read_weights",
]

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
    for key in ("num_experts", "num_local_experts", "n_routed_experts"):
        if config.get(key):
            refused.add(
                where,
                key,
                "a dense model",
                f"{config[key]} experts",
                "MoE models are not supported yet",
            )


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
    return tuple(found)


def check_layers(
    where: str,
    architecture: Architecture,
    n_layers: int,
    shapes: Mapping[str, tuple[int, int]],
    problems: Problems,
    refused: Problems,
) -> None:
    """Checks that every layer has its linear modules, then raises what was collected."""
    refused.raise_if_any(UnsupportedError)
    if not problems:
        expected = set(architecture.modules(n_layers))
        missing, extra = sorted(expected - shapes.keys()), sorted(shapes.keys() - expected)
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
