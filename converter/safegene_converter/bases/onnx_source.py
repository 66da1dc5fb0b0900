"""What `--base` names for an ONNX conversion, and how it becomes an ONNX folder.

An ONNX folder is taken as it is; Hugging Face weights beside the graph prove the match, and are what a
delta is merged into before it is quantised. A Hugging Face folder is exported by the onnxruntime-genai
builder, a float GGUF is made a Hugging Face folder first. What is already quantised is not exported: it
would be rounded twice, and the artifact would claim a float base that never was.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safegene_converter.bases.gguf_to_hf import check_decodable, gguf_to_hf
from safegene_converter.bases.onnx_build import build_onnx, check_build_options
from safegene_converter.inputs.adapter import Adapter, check_base_fits
from safegene_converter.inputs.base import Base, open_base
from safegene_converter.inputs.consumed import check_carried
from safegene_converter.inputs.onnx_base import OnnxBase, is_onnx_folder, open_onnx_base
from safegene_runtime.artifact.forms import ONNX
from safegene_runtime.errors import BaseModelError, Problem, UnsupportedError
from safegene_runtime.progress import Progress, counted

__all__ = ["Export", "check_source_fits", "export_base", "open_source"]

_WIDTH = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.1, "int4": 0.6}
"""Bytes an exported parameter takes, roughly: for the progress bar."""


@dataclass(frozen=True)
class Export:
    """How a base is exported; None stands for the default, which is fp32 and the builder's own."""

    precision: str | None = None
    block_size: int | None = None
    accuracy_level: int | None = None
    options: tuple[str, ...] = ()

    @property
    def effective_precision(self) -> str:
        """The precision that is built."""
        return self.precision or "fp32"

    def to_dict(self) -> dict[str, Any]:
        """What manifests record."""
        return {
            "precision": self.effective_precision,
            "block_size": self.block_size,
            "accuracy_level": self.accuracy_level,
            "options": list(self.options),
        }


def open_source(path: Path, export: Export) -> Base | OnnxBase:
    """Opens what `--base` names, headers only, and refuses what cannot be used.

    Returns:
        an `OnnxBase`, ready to use, or a `Base` for `export_base`.

    Raises:
        SafeGeneError: one of its kinds.
    """
    if not path.exists():
        raise BaseModelError(
            Problem(
                str(path),
                "base",
                "an ONNX folder, a Hugging Face folder or a float GGUF",
                "nothing there",
                "check --base",
            )
        )
    if path.suffix.lower() == ".onnx" and path.is_file():
        raise BaseModelError(
            Problem(
                str(path),
                "base",
                "the folder of an ONNX model",
                "the .onnx file",
                f"pass --base {path.parent}: configuration and tokenizer lie beside the model",
            )
        )
    if is_onnx_folder(path):
        if export != Export():
            raise UnsupportedError(
                Problem(
                    "--precision",
                    "base",
                    "a base to export",
                    "an ONNX folder, which has its precision",
                    "leave --precision, --block-size, --accuracy-level and --builder-option out; to "
                    "export weights that lie beside the graph, pass a folder without it",
                )
            )
        return open_onnx_base(path)
    base = open_base(path)
    if base.config is not None:
        check_carried(base.config, ONNX, str(base.path))
    else:
        check_decodable(base)
    check_build_options(
        export.effective_precision, export.block_size, export.accuracy_level, export.options
    )
    return base


def check_source_fits(adapter: Adapter, source: Base | OnnxBase) -> None:
    """`check_base_fits`, and likewise for the weights that lie beside a graph.

    Raises:
        AdapterError: adapter and base do not belong together.
    """
    beside = source.weights if isinstance(source, OnnxBase) else None
    for one in (source, beside):
        if one is not None:
            check_base_fits(adapter, one.shapes, one.architecture, one.n_layers)


def export_base(
    base: Base | OnnxBase, work: Path, export: Export, tell: Progress
) -> tuple[Base | None, OnnxBase, dict[str, Any]]:
    """Exports a base to ONNX; an ONNX folder is one already.

    Args:
        base: what `open_source` returned.
        work: a folder for the results, `work`/base and, from a GGUF, `work`/float.
        export: how.
        tell: told how far it is.

    Returns:
        the Hugging Face weights of the graph, where they are at hand, the graph, and what the manifest
        says about the export.
    """
    if isinstance(base, OnnxBase):
        return base.weights, base, {}
    settings: dict[str, Any] = {"export": export.to_dict()}
    if base.is_gguf:
        base, settings["transform_error"] = gguf_to_hf(base, work / "float", tell)
    target = work / "base"
    total = int(base.n_parameters * _WIDTH[export.effective_precision])
    step = counted(tell, "exporting the base to ONNX", total)
    tell("exporting the base to ONNX", 0, total)
    build_onnx(
        base.path,
        target,
        export.effective_precision,
        block_size=export.block_size,
        accuracy_level=export.accuracy_level,
        options=export.options,
        progress=step,
    )
    tell("exporting the base to ONNX", total, total)
    # the builder leaves these out, and runtimes that are not its own read them
    for name in ("config.json", "generation_config.json"):
        if (base.path / name).is_file() and not (target / name).exists():
            shutil.copy(base.path / name, target / name)
    return base, open_onnx_base(target), settings
