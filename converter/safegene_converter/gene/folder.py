"""Writing adapter folders: what plain PEFT loads, and safegene.json as `adapter` reads it.

A gene is written with `lora_alpha` = rank, so that PEFT's scaling is 1 and B·A is the vector itself.
Expressions are added without touching the vectors. Everything written is read back by `read_adapter`
before it is published, under its rules.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save

from safegene_converter.gene.low_rank import Factors
from safegene_converter.inputs.adapter import Adapter, read_adapter
from safegene_converter.inputs.adapter_files import CONFIG_NAME, MAX_CONFIG_BYTES, WEIGHTS_NAME
from safegene_converter.inputs.base import Base
from safegene_converter.inputs.safegene_json import (
    FORMAT_VERSION,
    PLAIN_EXPRESSION,
    SAFEGENE_NAME,
)
from safegene_runtime.architecture.table import kind_of, layer_of
from safegene_runtime.errors import AdapterError, GeneError, Problem
from safegene_runtime.formats import strictjson
from safegene_runtime.formats.publish import check_output_free, publish_file, publish_folder

__all__ = [
    "Expression",
    "add_expression",
    "copy_with",
    "expressions_of",
    "keep_layers",
    "write_gene",
]

DIGITS = 6
"""Decimals of a stored coefficient: finer than any calibration."""


@dataclass(frozen=True)
class Expression:
    """Named layer coefficients: how strongly a target expresses the gene."""

    coefficients: Mapping[int, float]
    target: str | None = None
    n_shots: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As safegene.json holds it."""
        found: dict[str, Any] = {
            "coefficients": {
                str(layer): round(float(value), DIGITS)
                for layer, value in sorted(self.coefficients.items())
            }
        }
        if self.target is not None:
            found["target"] = self.target
        if self.n_shots is not None:
            found["n_shots"] = self.n_shots
        return found


def write_gene(
    folder: Path,
    modules: Mapping[str, Factors],
    base_model: Mapping[str, Any],
    expressions: Mapping[str, Mapping[str, Any]] | None = None,
    default: str = PLAIN_EXPRESSION,
) -> Adapter:
    """Writes the three files into an existing folder, and reads them back.

    Args:
        folder: where they go; usually one that is not published yet.
        modules: factors by module name, `b` (out, r) and `a` (r, in), r >= 1.
        base_model: name, architecture and n_layers, as in safegene.json.
        expressions: as in safegene.json; every coefficient 1 when None.
        default: the name of the default expression.

    Raises:
        SafeGeneError: what was given is no valid adapter.
    """
    names = sorted(modules, key=lambda name: (layer_of(name), name))
    layers = sorted({layer_of(name) for name in names})
    tensors = {}
    for name in names:
        tensors[f"base_model.model.{name}.lora_A.weight"] = _float32(modules[name].a)
        tensors[f"base_model.model.{name}.lora_B.weight"] = _float32(modules[name].b)
    # not save_file: its error on a full disk is no OSError
    (folder / WEIGHTS_NAME).write_bytes(save(tensors, metadata={"format": "pt"}))
    config = _config({name: modules[name].a.shape[0] for name in names}, layers, base_model)
    (folder / CONFIG_NAME).write_bytes(strictjson.dumps(config))
    ones = {default: Expression(dict.fromkeys(layers, 1.0)).to_json()}
    safegene = {
        "format_version": FORMAT_VERSION,
        "base_model": {name: base_model[name] for name in ("name", "architecture", "n_layers")},
        "selected_layers": layers,
        "default_expression": default,
        "expressions": ones if expressions is None else dict(expressions),
    }
    (folder / SAFEGENE_NAME).write_bytes(strictjson.dumps(safegene))
    return read_adapter(folder)


def expressions_of(path: Path) -> tuple[dict[str, Any], str]:
    """All expressions of a valid adapter as safegene.json holds them, and the default's name."""
    adapter = read_adapter(path)
    if adapter.base_model is None:
        layers = {module.layer for module in adapter.modules}
        return {
            PLAIN_EXPRESSION: Expression(dict.fromkeys(layers, 1.0)).to_json()
        }, PLAIN_EXPRESSION
    raw = _raw(path)
    return dict(raw["expressions"]), str(raw["default_expression"])


def add_expression(
    path: Path, name: str, expression: Expression, *, force: bool = False, default: bool = False
) -> Adapter:
    """Adds an expression to a gene's safegene.json; the vectors stay as they are, byte for byte.

    Args:
        path: an adapter folder with safegene.json.
        name: of the new expression.
        expression: a coefficient for each of its layers.
        force: replace an expression of this name.
        default: also make it the default.

    Raises:
        AdapterError: the name is taken, or the result would be no valid adapter; the folder is as
            it was.
    """
    check_name_free(path, name, force)
    raw = _raw(path)
    raw["expressions"][name] = expression.to_json()
    if default:
        raw["default_expression"] = name
    before = (path / SAFEGENE_NAME).read_bytes()
    publish_file(path / SAFEGENE_NAME, strictjson.dumps(raw))
    try:
        return read_adapter(path, name)
    except BaseException:
        publish_file(path / SAFEGENE_NAME, before)
        raise


def check_name_free(path: Path, name: str, force: bool) -> None:
    """Refuses a name that is taken, before any work is done for it.

    Raises:
        AdapterError: it is taken (and not `force`), or the adapter has no safegene.json.
    """
    adapter = read_adapter(path)
    if adapter.base_model is None:
        raise AdapterError(
            Problem(str(path), SAFEGENE_NAME, "a gene", "a plain LoRA without safegene.json",
                    "make it one with `safegene select`")
        )  # fmt: skip
    if name in adapter.expressions and not force:
        raise AdapterError(
            Problem(str(path), "expression", "a name that is free", name,
                    "choose another --name, or pass --force to replace it")
        )  # fmt: skip


def keep_layers(path: Path, base: Base, layers: Iterable[int], out: Path, force: bool) -> Adapter:
    """Writes a copy of an adapter with some of its layers; PEFT's scaling goes into B.

    Raises:
        GeneError: no layer would be left.
        OutputError: `out` exists, and not `force`.
    """
    check_output_free(out, force)
    kept = set(layers)
    adapter = read_adapter(path)
    expressions, default = expressions_of(path)
    modules = {
        module.name: Factors(
            module.b.astype(np.float64) * module.scaling, module.a.astype(np.float64)
        )
        for module in adapter.modules
        if module.layer in kept
    }
    if not modules:
        raise GeneError(
            Problem(str(path), "layers", "at least one that is kept", "none",
                    "raise the budget, or look at the scores")
        )  # fmt: skip
    for entry in expressions.values():
        entry["coefficients"] = {
            layer: value for layer, value in entry["coefficients"].items() if int(layer) in kept
        }
    with publish_folder(out, force) as folder:
        write_gene(folder, modules, base_model_of(base), expressions, default)
    return read_adapter(out)


def copy_with(path: Path, out: Path, coefficients: Mapping[int, float]) -> Path:
    """A throw-away copy of a gene with one expression, hard-linked to the same vectors."""
    out.mkdir()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        os.link((path / name).resolve(), out / name)
    raw = _raw(path)
    raw["default_expression"] = "trial"
    raw["expressions"] = {"trial": Expression(coefficients).to_json()}
    (out / SAFEGENE_NAME).write_bytes(strictjson.dumps(raw))
    return out


def base_model_of(base: Base) -> dict[str, Any]:
    """What safegene.json says about a base."""
    return {"name": base.name, "architecture": base.architecture, "n_layers": base.n_layers}


def _config(
    ranks: Mapping[str, int], layers: list[int], base_model: Mapping[str, Any]
) -> dict[str, Any]:
    """An adapter_config.json under which PEFT targets exactly these modules at scaling 1."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    other = {name: value for name, value in ranks.items() if value != rank}
    suffixes = sorted({kind_of(name) for name in ranks})
    uniform = len(suffixes) * len(layers) == len(ranks)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model["name"],
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
        "target_modules": suffixes if uniform else list(ranks),
        "layers_to_transform": layers if uniform else None,
        "layers_pattern": None,
        "rank_pattern": other,
        "alpha_pattern": other,
    }


def _float32(array: Any) -> Any:
    return np.ascontiguousarray(array, dtype=np.float32)


def _raw(path: Path) -> Any:
    return strictjson.load((path / SAFEGENE_NAME).resolve(), MAX_CONFIG_BYTES)
