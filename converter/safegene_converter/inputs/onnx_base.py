"""An ONNX decoder as the base of an adapter: its graph, its projections, the files beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safegene_converter.inputs.base import Base, open_base
from safegene_converter.inputs.onnx_graph import Place, find_linears, module_shapes
from safegene_converter.inputs.onnx_proto import NEW_DATA, load_proto
from safegene_runtime.architecture.table import (
    Architecture,
    architecture_named,
    architecture_of_type,
)
from safegene_runtime.artifact.forms import ONNX
from safegene_runtime.artifact.manifest import is_file_name
from safegene_runtime.artifact.provenance import ADAPTER_KEY, FACTOR_MARK
from safegene_runtime.errors import BaseModelError, Problem, Problems
from safegene_runtime.formats import strictjson
from safegene_runtime.formats.files import MANIFEST_NAME, sha256_file
from safegene_runtime.formats.onnx.config import first_count, head_size
from safegene_runtime.formats.onnx.file import OnnxFile, read_onnx

__all__ = ["OnnxBase", "is_onnx_folder", "open_onnx_base"]

COMPANIONS = (".json", ".jinja", ".model", ".txt")
"""Suffixes of the small files beside a model that runtimes read: configuration, tokenizer, template."""


@dataclass(frozen=True)
class OnnxBase:
    """An ONNX decoder whose projections were found.

    Attributes:
        folder: where it is.
        model: its graph.
        architecture: GGUF's name for it, a key of the table of architectures.
        n_layers: number of blocks.
        name: what it is called.
        shapes: (out, in) of every linear module of its blocks.
        places: where each of them lies.
        companions: configuration, tokenizer and template files, in name order.
        weights: the Hugging Face folder that this one is as well, where safetensors lie in it.
    """

    folder: Path
    model: OnnxFile
    architecture: str
    n_layers: int
    name: str
    shapes: Mapping[str, tuple[int, int]] = field(repr=False)
    places: Mapping[str, Sequence[Place]] = field(repr=False)
    companions: tuple[Path, ...] = ()
    weights: Base | None = None

    @property
    def row(self) -> Architecture:
        """What is known of its architecture."""
        return architecture_named(self.architecture, str(self.folder))

    def digests(self, progress: Any = None) -> dict[str, str]:
        """SHA-256 of every file it consists of, by name."""
        beside = self.weights.files if self.weights is not None else ()
        files = sorted({*self.model.files, *self.companions, *beside})
        return {file.name: sha256_file(file.resolve(), progress) for file in files}


def is_onnx_folder(path: Path) -> bool:
    """A graph makes a folder an ONNX one, whatever lies beside it; an onnx/ below does not."""
    if not path.is_dir():
        return False
    if any(path.glob("*.onnx")) or (path / "genai_config.json").exists():
        return True
    return (path / "onnx").is_dir() and not any(
        file.suffix in (".safetensors", ".bin") for file in path.iterdir()
    )


def open_onnx_base(folder: Path) -> OnnxBase:
    """Reads the graph of an ONNX folder and finds its projections.

    Raises:
        BaseModelError: no decoder, several, or one whose projections cannot be told apart.
        UnsupportedError: an architecture we know by name and refuse.
        FormatError: bytes that break ONNX or JSON.
    """
    path = _model_file(folder)
    config = _json(folder / "config.json")
    genai = _json(folder / "genai_config.json").get("model", {})
    genai = genai if isinstance(genai, dict) else {}
    decoder = genai.get("decoder", {})
    decoder = decoder if isinstance(decoder, dict) else {}
    model = read_onnx(path)
    _check_constants(model)
    if not config and not genai:
        raise _no_configuration(folder)
    row = architecture_of_type(genai.get("type") or config.get("model_type"), str(folder))
    sizes = _part_sizes(row, decoder, config)
    linears = find_linears(model, _node_metadata(model), row)
    if not linears:
        raise BaseModelError(
            Problem(
                str(path),
                "projections",
                "nodes named layers.N and q_proj, k_proj, ...",
                "none",
                "is this a decoder? encoders and fused exports are not supported",
            )
        )
    shapes, places = module_shapes(linears, sizes, row, str(path))
    stated = decoder.get("num_hidden_layers") or config.get("num_hidden_layers")
    n_layers = 1 + max(linear.layer for linear in linears)
    if stated is not None and stated != n_layers:
        raise BaseModelError(
            Problem(str(path), "layers", f"{stated}, as the configuration says", str(n_layers))
        )
    companions = tuple(
        sorted(
            file
            for file in folder.iterdir()
            if file.suffix in COMPANIONS and file.is_file() and not file.name.startswith(".")
            and file.name != MANIFEST_NAME and file not in model.files
        )
    )  # fmt: skip
    _check_names(model, companions)
    given = config.get("_name_or_path")
    return OnnxBase(
        folder=folder,
        model=model,
        architecture=row.name,
        n_layers=n_layers,
        name=given if isinstance(given, str) and given else folder.resolve().name,
        shapes=shapes,
        places=places,
        companions=companions,
        weights=open_base(folder) if any(map(Path.exists, _weights_of(folder))) else None,
    )


def _weights_of(folder: Path) -> tuple[Path, Path]:
    """The two names under which transformers saves weights; others are not a model's own."""
    return folder / "model.safetensors", folder / "model.safetensors.index.json"


def _no_configuration(folder: Path) -> BaseModelError:
    fix = "copy config.json and the tokenizer files of the exported model beside the graph"
    if (folder.parent / "config.json").is_file():  # as on the hub, where the graph lies in onnx/
        fix = f"copy config.json and the tokenizer files beside the graph, from {folder.parent}"
    return BaseModelError(
        Problem(str(folder), "configuration", "config.json or genai_config.json", "neither", fix)
    )


def _check_names(model: OnnxFile, companions: Sequence[Path]) -> None:
    """Refuses files that the artifact could not hold under their names."""
    problems = Problems()
    reserved = {MANIFEST_NAME, ONNX.adapter_file, f"{model.path.name}.{NEW_DATA}"}
    for file in (*model.files, *companions):
        if file.name.casefold() in {name.casefold() for name in reserved}:
            problems.add(
                str(file), "name", "one that no file of an artifact has", file.name,
                "save the base with another name for its data",
            )  # fmt: skip
        elif not is_file_name(file.name):
            problems.add(
                str(file), "name", "letters, digits, '.', '_' and '-', no '.' or '-' first",
                repr(file.name), "rename it",
            )  # fmt: skip
    problems.raise_if_any(BaseModelError)


def _model_file(folder: Path) -> Path:
    """The decoder's graph: what genai_config.json names, or the only .onnx there is."""
    if not folder.is_dir():
        raise BaseModelError(
            Problem(str(folder), "base", "an ONNX folder", "nothing there", "check --base")
        )
    model = _json(folder / "genai_config.json").get("model", {})
    decoder = model.get("decoder", {}) if isinstance(model, dict) else {}
    named = decoder.get("filename") if isinstance(decoder, dict) else None
    found = sorted(folder.glob("*.onnx"))
    if isinstance(named, str):
        if Path(named).name != named or not (folder / named).is_file():
            raise BaseModelError(
                Problem(
                    str(folder / "genai_config.json"),
                    "filename",
                    "a file of this folder",
                    repr(named),
                    "pass the folder as the builder left it",
                )
            )
        return folder / named
    if len(found) == 1:
        return found[0]
    got = ", ".join(file.name for file in found) or "none"
    fix = "pass a folder with one decoder"
    if not found and (folder / "onnx").is_dir():
        fix = f"pass --base {folder / 'onnx'}, with the tokenizer files beside the model"
    raise BaseModelError(Problem(str(folder), "base", "one .onnx file", got, fix))


def _check_constants(model: OnnxFile) -> None:
    """Refuses a graph whose weights a caller can replace, or that has an adapter already."""
    marks = [name for name in (*model.metadata, *model.initializers)
             if name == ADAPTER_KEY or FACTOR_MARK in name]  # fmt: skip
    if marks:
        raise BaseModelError(
            Problem(
                str(model.path), marks[0], "a plain base", "one that holds a SafeGene adapter",
                "start from the base that this was made from",
            )
        )  # fmt: skip
    if model.overridable:
        count = len(model.overridable)
        raise BaseModelError(
            Problem(
                str(model.path), "inputs", "weights that are constants",
                f"{count} initializers that are inputs, {model.overridable[0]} the first",
                "export with keep_initializers_as_inputs=False: any caller could override them",
            )
        )  # fmt: skip


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = strictjson.load(path.resolve())
    return value if isinstance(value, dict) else {}


def _part_sizes(
    row: Architecture, decoder: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, int]:
    """Rows of each part of a packed projection, as the configuration has them."""
    heads = first_count("num_attention_heads", decoder, config) or 0
    kv = first_count("num_key_value_heads", decoder, config) or heads
    size = head_size(decoder, config) or 0
    return row.head_rows(heads, kv, size)


def _node_metadata(model: OnnxFile) -> dict[int, dict[str, str]]:
    """metadata_props of nodes: where torch.onnx writes the module a node came from."""
    proto = load_proto(model)
    return {
        index: {prop.key: prop.value for prop in node.metadata_props}
        for index, node in enumerate(proto.graph.node)
        if node.metadata_props
    }
