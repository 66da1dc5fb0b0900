"""A SafeGene adapter folder: read once, checked as a whole, before anything is done with it.

    adapter_config.json         as PEFT writes it
    adapter_model.safetensors   `base_model.model.<module>.lora_{A,B}.weight`
    safegene.json               optional: selected layers, and named expressions

    {"format_version": 1,
     "base_model": {"name": "...", "architecture": "llama", "n_layers": 30},
     "selected_layers": [3, 4, 9],
     "default_expression": "default",
     "expressions": {"default": {"coefficients": {"3": 0.91, "4": 1.2, "9": 0.4},
                                 "target": "which fine-tune", "n_shots": 48}}}

Without safegene.json it is a plain LoRA: one expression, "default", with every coefficient 1.

PEFT itself only warns about keys it does not know and misses, and then runs the base model. Here
tensors and configuration must match one to one, or nothing is read.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_converter import formula
from safegene_converter.inputs.peft_config import LoraSettings, parse_config, pattern_key
from safegene_converter.inputs.safetensors_reader import SafetensorsFile, read_safetensors
from safegene_runtime.architecture.table import layer_of, linear_modules, parse_module
from safegene_runtime.errors import AdapterError, FormatError, Problem, Problems, UnsupportedError
from safegene_runtime.formats import strictjson
from safegene_runtime.formats.files import MANIFEST_NAME, open_regular, sha256_of

__all__ = ["Adapter", "Module", "check_base_fits", "read_adapter"]

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
SAFEGENE_NAME = "safegene.json"
FORMAT_VERSION = 1
PLAIN_EXPRESSION = "default"
RESTORE = "restore the file that was made with this adapter, or correct it"
MAX_CONFIG_BYTES = 16 << 20
MAX_WEIGHTS_BYTES = 8 << 30

_NO_ADAPTERS = (
    (MANIFEST_NAME, "an artifact", "pass the adapter that it was made from"),
    ("reference.json", "a reference", "pass the adapter that it was recorded with"),
    ("config.json", "a whole model", "this is a --base: pass the adapter that PEFT saved"),
)
"""What else may be passed by mistake: a file that tells, what it is, what to do."""

_KEY = re.compile(r"base_model\.model\.(?P<module>[A-Za-z0-9_.]+)\.lora_(?P<factor>[AB])\.weight")
_EXPRESSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_UNSUPPORTED_KEYS = (
    ("lora_magnitude_vector", "DoRA", "train a plain LoRA"),
    ("lora_embedding_", "an embedding delta", "train without embed_tokens"),
    ("embed_tokens", "an embedding delta", "train without embed_tokens"),
    ("lm_head", "an output head", "train without lm_head: it may be tied to the embedding"),
    (".experts.", "a mixture of experts", "MoE experts are not supported yet"),
    ("lora_B.bias", "a trained bias", "train with lora_bias=False"),
    (".bias", "a trained bias", "train with bias='none'"),
    ("norm.", "a norm", "llama.cpp skips norms without a word: train without them"),
)


@dataclass(frozen=True)
class Module:
    """One linear module of the base, and its share of the delta.

    Attributes:
        name: Hugging Face name, for example `model.layers.2.self_attn.q_proj`.
        layer: its block.
        a: (r, in) float32.
        b: (out, r) float32.
        scaling: PEFT's s.
        coefficient: the layer's c in the chosen expression.
    """

    name: str
    layer: int
    a: npt.NDArray[np.float32] = field(repr=False)
    b: npt.NDArray[np.float32] = field(repr=False)
    rank: int
    alpha: float
    scaling: float
    coefficient: float

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight it changes."""
        return self.b.shape[0], self.a.shape[1]


@dataclass(frozen=True)
class Adapter:
    """A whole adapter under one expression.

    Attributes:
        modules: sorted by layer, then name.
        expression: the chosen one; `expressions` are all there are.
        target: which fine-tune the expression was calibrated on, if it says.
        base_model: name, architecture and n_layers of safegene.json, or None.
        digests: what was read, by SHA-256: the two files as PEFT writes them by name, and under
            `safegene.json#<expression>` what the chosen expression says. One more expression in
            safegene.json changes none of them, so that what was recorded with this one still fits.
    """

    path: Path
    settings: LoraSettings
    modules: tuple[Module, ...]
    expression: str
    expressions: tuple[str, ...]
    target: str | None
    base_model: Mapping[str, Any] | None
    digests: Mapping[str, str]

    @property
    def n_parameters(self) -> int:
        """How many numbers its factors hold."""
        return sum(module.a.size + module.b.size for module in self.modules)


@dataclass(frozen=True)
class _Safegene:
    """What safegene.json says, checked by itself."""

    base_model: Mapping[str, Any]
    selected_layers: frozenset[int]
    default_expression: str
    coefficients: Mapping[str, Mapping[int, float]]
    targets: Mapping[str, str | None]


def read_adapter(path: Path, expression: str | None = None) -> Adapter:
    """Reads and checks an adapter folder.

    Args:
        path: the folder.
        expression: one of its expressions; None takes its default.

    Raises:
        FormatError: bytes that are not JSON or safetensors, or mean two things.
        UnsupportedError: DoRA, biases, embeddings, experts, ...; everything else that is wrong too.
        AdapterError: tensors, configuration and safegene.json that contradict each other.
    """
    path = Path(path)
    config_bytes, weights_bytes, safegene_bytes = _read_folder(path)
    settings = parse_config(
        strictjson.loads(config_bytes, str(path / CONFIG_NAME)), str(path / CONFIG_NAME)
    )
    safegene = None
    if safegene_bytes is not None:
        safegene = _parse_safegene(
            strictjson.loads(safegene_bytes, str(path / SAFEGENE_NAME)), str(path / SAFEGENE_NAME)
        )
    weights = read_safetensors(path / WEIGHTS_NAME, weights_bytes)
    problems, refused = Problems(), Problems()
    pairs = _pair_factors(weights, problems, refused)
    if refused:
        refused.extend(problems)
    refused.raise_if_any(UnsupportedError)
    chosen, coefficients = _choose_expression(path, safegene, expression, pairs, problems)
    modules = []
    for name, keys in pairs.items():
        module = _read_module(weights, name, layer_of(name), keys, settings, coefficients, problems)
        if module is not None:
            modules.append(module)
    _check_targets(path, settings, pairs.keys(), problems)
    if safegene is not None:
        _check_layers(str(path / SAFEGENE_NAME), safegene, pairs.keys(), problems)
    problems.raise_if_any(AdapterError)
    digests = {CONFIG_NAME: sha256_of(config_bytes), WEIGHTS_NAME: sha256_of(weights_bytes)}
    if safegene is not None:
        digests[f"{SAFEGENE_NAME}#{chosen}"] = _digest_expression(safegene, chosen)
    return Adapter(
        path=path,
        settings=settings,
        modules=tuple(sorted(modules, key=lambda module: (module.layer, module.name))),
        expression=chosen,
        expressions=tuple(safegene.coefficients) if safegene else (PLAIN_EXPRESSION,),
        target=safegene.targets[chosen] if safegene else None,
        base_model=safegene.base_model if safegene else None,
        digests=digests,
    )


def check_base_fits(
    adapter: Adapter, shapes: Mapping[str, tuple[int, int]], architecture: str, n_layers: int
) -> None:
    """Checks that adapter and base belong together, module by module.

    Args:
        adapter: the adapter.
        shapes: (out, in) of every linear module of the base's blocks.
        architecture: GGUF's name of the base's architecture.
        n_layers: how many blocks the base has.

    Raises:
        AdapterError: another architecture or depth, a module the base lacks or has in another
            shape, or a module of the base that the configuration targets and no tensor covers.
    """
    where = str(adapter.path)
    fix = "is this the base the adapter was trained on?"
    problems = Problems()
    if adapter.base_model is not None:
        for name, got in (("architecture", architecture), ("n_layers", n_layers)):
            if adapter.base_model[name] != got:
                expected = f"{adapter.base_model[name]}, as {SAFEGENE_NAME} says"
                problems.add(where, name, expected, f"a base with {got}", fix)
        problems.raise_if_any(AdapterError)  # that modules differ, too, would only hide it
    missing = [module.name for module in adapter.modules if module.name not in shapes]
    if missing:
        more = f", and {len(missing) - 1} others are missing, too" if len(missing) > 1 else ""
        got = f"no such module in its {n_layers} layers{more}"
        problems.add(where, missing[0], "a module of the base", got, fix)
    for module in adapter.modules:
        if module.name in missing:
            continue
        if shapes[module.name] != module.shape:
            expected = f"(out, in) = {shapes[module.name]}, as in the base"
            problems.add(where, module.name, expected, module.shape, fix)
    if not problems:
        covered = {module.name for module in adapter.modules}
        for name in shapes:
            if name not in covered and _is_expected(adapter, name):
                problems.add(
                    where,
                    name,
                    f"tensors, because {CONFIG_NAME} targets it",
                    "none",
                    "restore the weights, or list only the modules and layers that have them",
                )
    problems.raise_if_any(AdapterError)


def _is_expected(adapter: Adapter, module: str) -> bool:
    """Whether a module must have tensors: targeted, and not left out by layer selection."""
    if not adapter.settings.is_target(module):
        return False
    if adapter.base_model is None:
        return True
    return layer_of(module) in {module.layer for module in adapter.modules}


def _read_folder(path: Path) -> tuple[bytes, bytes, bytes | None]:
    """Reads each file once, so that what is digested is what is used."""
    problems = Problems()
    if not path.is_dir():
        got = "a file" if path.exists() else "nothing there"
        problems.add(str(path), "adapter", "a folder with adapter_config.json", got,
                     "pass the folder that PEFT saved")  # fmt: skip
        problems.raise_if_any(AdapterError)
    for name, kind, fix in _NO_ADAPTERS:
        if (path / name).exists() and not (path / CONFIG_NAME).exists():
            problems.add(str(path), "adapter", f"a folder with {CONFIG_NAME}", kind, fix)
            problems.raise_if_any(AdapterError)
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        if not (path / name).exists():
            got, fix = "no such file", "pass the folder that PEFT saved"
            pickles = [*path.glob("adapter_model.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
            if name == WEIGHTS_NAME and pickles:
                got = f"{pickles[0].name} (pickle: it can run code, and is never opened)"
                fix = "save again with safe_serialization=True"
            problems.add(str(path), name, "a file", got, fix)
    problems.raise_if_any(AdapterError)
    config = _read(path / CONFIG_NAME, MAX_CONFIG_BYTES)
    safegene = None
    if os.path.lexists(path / SAFEGENE_NAME):
        safegene = _read(path / SAFEGENE_NAME, MAX_CONFIG_BYTES)
    return config, _read(path / WEIGHTS_NAME, MAX_WEIGHTS_BYTES), safegene


def _read(path: Path, max_bytes: int) -> bytes:
    # the hub's cache is made of links; what they lead to is read once and digested
    with open_regular(path, follow_symlinks=True) as file:
        size = os.fstat(file.fileno()).st_size
        if size > max_bytes:
            raise FormatError(
                Problem(str(path), "size", f"at most {max_bytes} bytes", f"{size} bytes",
                        "is it the right file?")
            )  # fmt: skip
        return file.read(max_bytes)


def _pair_factors(
    weights: SafetensorsFile, problems: Problems, refused: Problems
) -> dict[str, dict[str, str]]:
    """Module name -> {"A": key, "B": key}; notes every tensor that is not half of a pair."""
    where = str(weights.path)
    pairs: dict[str, dict[str, str]] = {}
    if not weights.tensors:
        problems.add(where, "tensors", "at least one pair of factors", "none",
                     "PEFT would run the base model without a word")  # fmt: skip
        problems.raise_if_any(AdapterError)
    for key in weights.tensors:
        found = _KEY.fullmatch(key)
        module = found["module"] if found else key
        known = [entry for entry in _UNSUPPORTED_KEYS if entry[0] in f"{module}."]
        if known or "modules_to_save" in key:
            what, fix = known[0][1:] if known else ("a whole saved module", "train without it")
            refused.add(where, key, "factors of linear modules in the blocks", what, fix)
        elif not found:
            fix = "save with PeftModel.save_pretrained"
            problems.add(where, repr(key)[:200], "base_model.model.<module>.lora_A|B.weight",
                         "another name", fix)  # fmt: skip
        elif not parse_module(module):
            refused.add(where, key, f"a linear module of a block ({', '.join(linear_modules())})",
                        module, "train on these modules only")  # fmt: skip
        else:
            pairs.setdefault(module, {})[found["factor"]] = key
    for module, keys in sorted(pairs.items()):
        for factor in {"A", "B"} - keys.keys():
            problems.add(where, module, f"lora_{factor}", "only the other factor", "save it again")
    return {module: keys for module, keys in pairs.items() if len(keys) == 2}


def _read_module(
    weights: SafetensorsFile,
    name: str,
    layer: int,
    keys: Mapping[str, str],
    settings: LoraSettings,
    coefficients: Mapping[int, float] | None,
    problems: Problems,
) -> Module | None:
    where = str(weights.path)
    found = len(problems)
    shapes = [weights.tensors[keys[factor]].shape for factor in "AB"]
    if any(len(shape) != 2 or 0 in shape for shape in shapes):
        problems.add(where, name, "factors (r, in) and (out, r)", f"{shapes[0]} and {shapes[1]}",
                     "save the adapter again")  # fmt: skip
        return None
    rank = settings.rank_of(name)
    if shapes[0][0] != rank or shapes[1][1] != rank:
        problems.add(where, name, f"rank {rank}, as {CONFIG_NAME} says",
                     f"lora_A {shapes[0]}, lora_B {shapes[1]}",
                     "r and rank_pattern must be those of the training")  # fmt: skip
    factors = []
    for factor in "AB":
        try:
            values = weights.read_float32(keys[factor])
        except FormatError as error:
            problems.extend(error.problems)
            return None
        if not np.isfinite(values).all():
            problems.add(where, keys[factor], "finite numbers", "NaN or Inf", "the training failed")
        elif not values.any():
            problems.add(where, keys[factor], "a delta", "only zeros, so the module has no effect",
                         "train the module, or leave it out")  # fmt: skip
        factors.append(values)
    if not settings.is_target(name):
        problems.add(where, name, f"a module that {CONFIG_NAME} targets", "one that it does not",
                     "PEFT would ignore the tensors: fix target_modules, layers_to_transform"
                     )  # fmt: skip
    coefficient = 1.0 if coefficients is None else coefficients.get(layer, math.nan)
    if len(problems) > found or math.isnan(coefficient):
        return None
    module = Module(
        name=name,
        layer=layer,
        a=factors[0],
        b=factors[1],
        rank=rank,
        alpha=settings.alpha_of(name),
        scaling=settings.scaling_of(name),
        coefficient=coefficient,
    )
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        scaled = formula.scaled_b(module)
    if not np.isfinite(scaled).all() or not scaled.any():
        problems.add(where, name, "a scaled factor that float32 can hold",
                     f"an effective scale of {formula.effective_scale(module):g}",
                     "check lora_alpha and the coefficient")  # fmt: skip
    return module


def _check_targets(path: Path, settings: LoraSettings, modules: Any, problems: Problems) -> None:
    """Everything the configuration names must be met by at least one module with tensors."""
    where = str(path / CONFIG_NAME)

    def check(name: str, key: str, is_met: bool) -> None:
        if not is_met:
            problems.add(where, name, "something the tensors match", repr(key)[:100],
                         "restore the weights, or remove the entry")  # fmt: skip

    if not isinstance(settings.targets, str):
        for target in sorted(settings.targets):
            met = any(module == target or module.endswith(f".{target}") for module in modules)
            check("target_modules", target, met)
    for name, patterns in (
        ("rank_pattern", settings.rank_pattern),
        ("alpha_pattern", settings.alpha_pattern),
    ):
        for key in patterns:
            check(name, key, any(pattern_key({key: None}, module) for module in modules))
    layers = set(map(layer_of, modules))
    for layer in sorted(settings.layers_to_transform or ()):
        check("layers_to_transform", str(layer), layer in layers)


def _choose_expression(
    path: Path,
    safegene: _Safegene | None,
    expression: str | None,
    modules: Any,
    problems: Problems,
) -> tuple[str, Mapping[int, float] | None]:
    """The expression's name and its coefficients by layer (None: all 1)."""
    known = tuple(safegene.coefficients) if safegene else (PLAIN_EXPRESSION,)
    default = safegene.default_expression if safegene else PLAIN_EXPRESSION
    chosen = default if expression is None else expression
    if chosen not in known:
        raise AdapterError(
            Problem(str(path), "expression", f"one of {', '.join(known)}", chosen,
                    "pass one of them, or leave --expression out")
        )  # fmt: skip
    return chosen, safegene.coefficients[chosen] if safegene else None


def _digest_expression(safegene: _Safegene, name: str) -> str:
    """SHA-256 of what one expression does: its base and its coefficients by layer, as compact JSON."""
    meaning = {
        "base_model": dict(safegene.base_model),
        "coefficients": {str(n): c for n, c in sorted(safegene.coefficients[name].items())},
    }
    return sha256_of(json.dumps(meaning, sort_keys=True, separators=(",", ":")).encode())


def _check_layers(where: str, safegene: _Safegene, modules: Any, problems: Problems) -> None:
    """selected_layers, every expression's coefficients and the tensors name the same layers."""
    layers = set(map(layer_of, modules))
    selected = safegene.selected_layers
    for layer in sorted(selected - layers):
        problems.add(where, "selected_layers", "layers that have tensors", f"layer {layer}",
                     "remove it, or restore the tensors")  # fmt: skip
    for layer in sorted(layers - selected):
        problems.add(where, "selected_layers", f"layer {layer}, which has tensors", "not selected",
                     "select it, or remove its tensors")  # fmt: skip
    for name, coefficients in safegene.coefficients.items():
        field_name = f"expressions.{name}.coefficients"
        for layer in sorted(coefficients.keys() - layers):
            problems.add(where, field_name, "layers that have tensors", f"layer {layer}",
                         "remove the coefficient")  # fmt: skip
        for layer in sorted((selected | layers) - coefficients.keys()):
            problems.add(where, field_name, f"a coefficient for layer {layer}", "none",
                         "add it: there is no default")  # fmt: skip
        for layer in sorted(n for n in coefficients if n >= safegene.base_model["n_layers"]):
            problems.add(where, field_name, f"layers below {safegene.base_model['n_layers']}",
                         f"layer {layer}", "remove it, or correct n_layers")  # fmt: skip


def _parse_safegene(raw: Any, where: str) -> _Safegene:
    problems = Problems()
    top = ("format_version", "base_model", "selected_layers", "default_expression", "expressions")
    if not strictjson.check_keys(raw, where, problems, required=top):
        problems.raise_if_any(AdapterError)
    if type(raw["format_version"]) is not int or raw["format_version"] != FORMAT_VERSION:
        problems.add(where, "format_version", FORMAT_VERSION, repr(raw["format_version"]),
                     "use the version of safegene that made this adapter")  # fmt: skip
        problems.raise_if_any(AdapterError)
    base = raw["base_model"]
    fields = ("name", "architecture", "n_layers")
    if strictjson.check_keys(base, f"{where}: base_model", problems, required=fields):
        for name, kind in zip(fields, (str, str, int), strict=True):
            if type(base[name]) is not kind or not base[name]:
                problems.add(where, f"base_model.{name}", kind.__name__, repr(base[name]), RESTORE)
    layers = raw["selected_layers"]
    if (
        not isinstance(layers, list)
        or not layers
        or not all(type(n) is int and n >= 0 for n in layers)
        or len(set(layers)) != len(layers)
    ):
        problems.add(
            where, "selected_layers", "layer numbers, each once", repr(layers)[:100], RESTORE
        )
    expressions = raw["expressions"]
    if not isinstance(expressions, dict) or not expressions:
        problems.add(
            where, "expressions", "at least one expression", repr(expressions)[:100], RESTORE
        )
    problems.raise_if_any(AdapterError)
    coefficients, targets = {}, {}
    for name, entry in expressions.items():
        if not _EXPRESSION.fullmatch(name):
            problems.add(where, "expressions", "names of letters, digits, . _ -", repr(name)[:100],
                         "rename it")  # fmt: skip
        coefficients[name] = _parse_expression(f"{where}: expressions.{name}", entry, problems)
        targets[name] = entry.get("target") if isinstance(entry, dict) else None
    if raw["default_expression"] not in expressions:
        known = ", ".join(expressions)
        got = repr(raw["default_expression"])[:100]
        problems.add(where, "default_expression", f"one of {known}", got, "name one of them")
    problems.raise_if_any(AdapterError)
    return _Safegene(base, frozenset(layers), raw["default_expression"], coefficients, targets)


def _parse_expression(where: str, entry: Any, problems: Problems) -> dict[int, float]:
    optional = ("target", "n_shots")
    if not strictjson.check_keys(
        entry, where, problems, required=("coefficients",), optional=optional
    ):
        return {}
    if not isinstance(entry.get("target", ""), str):
        problems.add(where, "target", "a text", repr(entry["target"])[:100], RESTORE)
    n_shots = entry.get("n_shots", 0)
    if type(n_shots) is not int or n_shots < 0:
        problems.add(where, "n_shots", "how many prompts it was calibrated on", repr(n_shots)[:100],
                     RESTORE)  # fmt: skip
    if not isinstance(entry["coefficients"], dict):
        problems.add(where, "coefficients", "an object", type(entry["coefficients"]).__name__,
                     RESTORE)  # fmt: skip
        return {}
    coefficients = {}
    for layer, value in entry["coefficients"].items():
        if not re.fullmatch(r"0|[1-9][0-9]{0,5}", layer):
            problems.add(where, "coefficients", "layer numbers as keys", repr(layer)[:100], RESTORE)
        elif type(value) not in (int, float) or not 0 < abs(value) <= sys.float_info.max:
            problems.add(where, f"coefficients.{layer}", "a finite number that is not 0",
                         repr(value)[:100], "to drop a layer, leave it out everywhere")  # fmt: skip
        else:
            coefficients[int(layer)] = float(value)
    return coefficients
