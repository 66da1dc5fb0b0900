"""The base model an adapter is folded into: a GGUF file (or its shards), or a Hugging Face folder.

Opening a base reads headers only. Everything that makes it unfit is collected and raised once,
before any work: what it is, which architecture, how many layers and heads, which linear modules of
which shape, and which files it consists of.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from safegene_converter.inputs.base_checks import (
    check_config_features,
    check_dense,
    check_folder_files,
    check_head,
    check_layers,
    check_tokenizer,
    count,
    read_weights,
)
from safegene_converter.inputs.consumed import check_config, check_folder_tensors
from safegene_converter.inputs.safetensors_reader import SafetensorsFile
from safegene_runtime.architecture.row_order import Transform
from safegene_runtime.architecture.table import (
    Architecture,
    architecture_named,
    architecture_of_config,
    model_class_of_config,
)
from safegene_runtime.engines.llama_hyperparameters import check_hyperparameters
from safegene_runtime.errors import BaseModelError, FormatError, Problem, Problems, UnsupportedError
from safegene_runtime.formats import ggml, strictjson
from safegene_runtime.formats.files import MANIFEST_NAME, sha256_file
from safegene_runtime.formats.gguf.model import GGUFModel, open_model
from safegene_runtime.formats.gguf.tensors import read_tensor_bytes
from safegene_runtime.formats.gguf.weights import head_counts
from safegene_runtime.progress import Step

__all__ = ["Base", "check_folder", "open_base"]

FLOAT_TYPES = frozenset({"F32", "F16", "BF16"})

_LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads")
_HEADS_KV = ("num_key_value_heads", "num_kv_heads")
"""Keys of a config.json: transformers takes each of them for the first."""

_EXPECTED = "a GGUF file or a Hugging Face model folder"

_HF_SUFFIXES = (".json", ".jinja", ".model", ".safetensors", ".txt")
"""The files of a Hugging Face folder that decide what the converted model is."""

_MARK = "safegene."
"""How the keys of our own artifacts begin: folding into one again would fold twice."""

_PLAIN = "start from the base that this was made from"

_UNFIT_TENSORS = (".scale", ".input_scale", ".attn_qkv.weight")
"""Tensors whose presence means that `blk.N.attn_q.weight` alone is not the weight of q."""


@dataclass(frozen=True)
class Base:
    """A base model whose headers were read and found fit.

    Attributes:
        kind: `gguf` or `hf`.
        path: what the user named.
        architecture: GGUF's name for it, a key of the table of architectures.
        n_layers: number of blocks.
        n_head: query heads per layer.
        n_head_kv: key/value heads per layer.
        name: what the model calls itself, else the name of its file or folder.
        files: every file it consists of, in name order.
        n_parameters: elements of all its tensors.
        is_float: whether all its weights are F32, F16 or BF16.
        shapes: (out, in) of every linear module of its blocks, by Hugging Face module name.
        model: the GGUF headers, for `gguf`.
        config: the parsed config.json, for `hf`.
        weights: the safetensors headers, for `hf`.
    """

    kind: Literal["gguf", "hf"]
    path: Path
    architecture: str
    n_layers: int
    n_head: int
    n_head_kv: int
    name: str
    files: tuple[Path, ...]
    n_parameters: int
    is_float: bool
    shapes: Mapping[str, tuple[int, int]] = field(repr=False)
    model: GGUFModel | None = field(default=None, repr=False)
    config: Mapping[str, Any] | None = field(default=None, repr=False)
    weights: tuple[SafetensorsFile, ...] = field(default=(), repr=False)

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF; else it is a Hugging Face folder."""
        return self.model is not None

    @property
    def row(self) -> Architecture:
        """What is known of its architecture."""
        return architecture_named(self.architecture, str(self.path))

    def module_shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear module of the blocks, by Hugging Face module name."""
        return dict(self.shapes)

    @property
    def context_length(self) -> int | None:
        """How many tokens a prompt and its reply may have together, where the base says so."""
        if self.model is not None:
            found = self.model.get(f"{self.architecture}.context_length")
        else:
            found = (self.config or {}).get("max_position_embeddings")
        return found if type(found) is int else None

    def tensor_name(self, module: str) -> str:
        """The GGUF tensor of a module's weight."""
        return self.row.tensor_of(module)

    def transform(self, module: str) -> Transform:
        """The row order of a module's GGUF tensor relative to its Hugging Face weight."""
        return self.row.transform(module, self.n_head, self.n_head_kv)

    def digests(self, progress: Step | None = None) -> dict[str, str]:
        """SHA-256 of every file, by file name; `progress` is told bytes as they are read."""
        return {file.name: sha256_file(file.resolve(), progress) for file in self.files}

    def read_weight(self, module: str) -> npt.NDArray[np.float32]:
        """The weight of a module, (out, in) float32, rows in the order of the base's own files.

        Raises:
            BaseModelError: the base has no such module.
        """
        if module not in self.shapes:
            raise BaseModelError(
                Problem(
                    str(self.path),
                    module,
                    "a module of the base",
                    "nothing",
                    "is this the base the adapter was trained on?",
                )
            )
        if self.model is not None:
            info = self.model.tensors[self.tensor_name(module)]
            return ggml.dequantize(read_tensor_bytes(info), info.type, info.shape)
        for file in self.weights:
            if f"{module}.weight" in file.tensors:
                weight = file.read_float32(f"{module}.weight")
                return weight.T if self.row.transposed else weight
        raise BaseModelError(Problem(str(self.path), module, "a weight", "nothing"))


def _first(config: Mapping[str, Any], names: Sequence[str]) -> Any:
    """The first of several keys that says something."""
    return next((config[name] for name in names if config.get(name) is not None), None)


def open_base(path: Path) -> Base:
    """Reads the headers of a base model.

    Args:
        path: a GGUF file, the first of its shards, or a Hugging Face model folder.

    Raises:
        BaseModelError: missing pieces, or something else than a model.
        UnsupportedError: an architecture or a feature we know by name and refuse.
        FormatError: bytes that break GGUF, safetensors or JSON.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise BaseModelError(Problem(str(path), "base", _EXPECTED, "nothing there", "check --base"))
    check_head(path, b"GGUF", _EXPECTED)
    return _open_gguf(path)


def _open_gguf(path: Path) -> Base:
    model = open_model(path)
    where = str(path)
    metadata = {key: value.value for key, value in model.metadata.items()}
    if (kind := metadata.get("general.type", "model")) != "model":
        raise BaseModelError(
            Problem(where, "general.type", "model", str(kind), "pass the base model itself")
        )
    if mark := next((key for key in metadata if key.startswith(_MARK)), None):
        raise BaseModelError(
            Problem(where, mark, "a plain base", "one that holds a SafeGene adapter", _PLAIN)
        )
    row = architecture_named(metadata.get("general.architecture"), where)
    architecture = row.name
    problems, refused = Problems(), Problems()
    n_layers = count(metadata.get(f"{architecture}.block_count"), where, "block_count", problems)
    n_head = n_head_kv = 0
    try:
        n_head, n_head_kv = head_counts(model)
    except FormatError as error:
        problems.extend(error.problems)
    has_experts = any("_exps." in name for name in model.tensors)
    if metadata.get(f"{architecture}.expert_count", 0) and not has_experts:
        problems.add(where, "expert_count", "tensors of experts", "none",
                     "header and tensors do not belong together")  # fmt: skip
    shapes: dict[str, tuple[int, int]] = {}
    for name, info in model.tensors.items():
        if module := row.module_of(name):
            if len(info.shape) == 2:
                shapes[module] = (info.shape[0], info.shape[1])
            else:
                problems.add(where, name, "two dimensions", info.shape)
        elif name.startswith("blk.") and name.endswith(_UNFIT_TENSORS):
            refused.add(
                where,
                name,
                "plain weights of q, k, v, ...",
                "a fused or rescaled weight",
                "use another GGUF of this model, for example F16 or Q8_0",
            )
    check_layers(where, row, n_layers, shapes, row.partial or has_experts, problems, refused)
    check_hyperparameters(model, where, problems)
    problems.raise_if_any(BaseModelError)
    return Base(
        kind="gguf",
        path=path,
        architecture=architecture,
        n_layers=n_layers,
        n_head=n_head,
        n_head_kv=n_head_kv,
        name=str(metadata.get("general.name") or path.stem),
        files=tuple(sorted(shard.path for shard in model.shards)),
        n_parameters=sum(math.prod(info.shape) for info in model.tensors.values()),
        is_float=all(info.type.name in FLOAT_TYPES for info in model.tensors.values()),
        shapes=shapes,
        model=model,
    )


def check_folder(path: Path) -> None:
    """Refuses a folder that is no Hugging Face model, runs code of its own, or holds what never ends.

    Raises:
        BaseModelError: no model.
        UnsupportedError: code of its own, or quantised weights.
    """
    refused = Problems()
    _read_config(path, refused)
    refused.raise_if_any(UnsupportedError)


def _read_config(path: Path, refused: Problems) -> dict[str, Any]:
    """The config.json of a folder that may be read; notes what is refused."""
    config_path = path / "config.json"
    if not config_path.exists():
        found = sorted(file.name for file in path.glob("*.gguf"))
        got = f"a folder with {found[0]}" if found else "no config.json"
        fix = f"pass --base {path / found[0]}" if found else "check --base"
        if (path / "adapter_config.json").exists():
            got, fix = "a folder with adapter_config.json", "pass the base model, not the adapter"
        elif (path / MANIFEST_NAME).exists():
            got, fix = f"a folder with {MANIFEST_NAME}: an artifact", _PLAIN
        raise BaseModelError(
            Problem(str(path), "base", "a Hugging Face model folder with config.json", got, fix)
        )
    check_folder_files(path)
    config = strictjson.load(config_path.resolve())
    where = str(config_path)
    if not isinstance(config, dict):
        raise BaseModelError(Problem(where, "value", "a JSON object", type(config).__name__))
    check_config_features(config, where, refused)
    check_tokenizer(path / "tokenizer_config.json", refused)
    return config


def _open_folder(path: Path) -> Base:
    problems, refused = Problems(), Problems()
    config, where = _read_config(path, refused), str(path / "config.json")
    row, listed = None, True
    try:
        row = architecture_of_config(config, where)
        listed = model_class_of_config(config, where).listed
        check_config(config, where, refused)
    except UnsupportedError as error:
        refused.extend(error.problems)
    if listed:
        check_dense(config, where, refused)
    refused.raise_if_any(UnsupportedError)
    assert row is not None
    n_layers, n_head = (
        count(_first(config, names), where, names[0], problems) for names in (_LAYERS, _HEADS)
    )
    kv = _first(config, _HEADS_KV)
    n_head_kv = count(n_head if kv is None else kv, where, "num_key_value_heads", problems)
    weights = read_weights(path, problems)
    shapes: dict[str, tuple[int, int]] = {}
    n_parameters = 0
    seen: set[str] = set()
    for file in weights:
        for name, info in file.tensors.items():
            if name in seen:
                problems.add(str(file.path), name, "each tensor once", "the tensor in two files")
            seen.add(name)
            n_parameters += math.prod(info.shape)
            module = name.removesuffix(".weight")
            if module != name and row.parse(module):
                if len(info.shape) == 2:
                    out, into = reversed(info.shape) if row.transposed else info.shape
                    shapes[module] = (out, into)
                else:
                    problems.add(str(file.path), name, "two dimensions", info.shape)
    check_layers(str(path), row, n_layers, shapes, not listed, problems, refused)
    check_folder_tensors(config, weights, str(path))
    given_name = config.get("_name_or_path")
    return Base(
        kind="hf",
        path=path,
        architecture=row.name,
        n_layers=n_layers,
        n_head=n_head,
        n_head_kv=n_head_kv,
        name=given_name if isinstance(given_name, str) and given_name else path.resolve().name,
        files=tuple(
            sorted(
                file for file in path.iterdir() if file.suffix in _HF_SUFFIXES and file.is_file()
            )
        ),
        n_parameters=n_parameters,
        is_float=True,
        shapes=shapes,
        config=config,
        weights=weights,
    )
