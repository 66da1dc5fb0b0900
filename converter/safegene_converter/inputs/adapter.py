"""A SafeGene adapter folder: read once, checked as a whole, before anything is done with it.

    files, as they come (adapter_files)        -> adapter_config.json, tensors, safegene.json
    names of tensors (adapter_keys)            -> factors of each module
    adapter_config.json (peft_config)          -> rank, alpha and targets, as PEFT reads them
    safegene.json (safegene_json), optional    -> a coefficient for each layer

Without safegene.json it is a plain LoRA: one expression, "default", with every coefficient 1.

PEFT itself only warns about keys it does not know and misses, and then runs the base model. Here
tensors and configuration must match one to one, or nothing is read.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_converter import formula
from safegene_converter.inputs.adapter_files import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    Weights,
    read_adapter_files,
)
from safegene_converter.inputs.adapter_keys import STEM, Pairs, pair_factors
from safegene_converter.inputs.peft_config import MODULE_PATTERNS, LoraSettings, parse_config
from safegene_converter.inputs.safegene_json import (
    PLAIN_EXPRESSION,
    SAFEGENE_NAME,
    SafegeneJson,
    parse_safegene,
)
from safegene_runtime.architecture.table import layer_of, modules_of
from safegene_runtime.errors import AdapterError, FormatError, Problem, Problems, UnsupportedError

__all__ = ["Adapter", "Module", "check_base_fits", "read_adapter"]

PLAUSIBLE_SCALES = (1e-3, 1e2)
"""Where the effective scales of published adapters lie, with room: alpha / r from 0.1 to 64."""
PLAUSIBLE_CHANGE = 1.0
"""Root mean square of an entry of dW; the weights of language models are about 0.02 to 0.1."""


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
        digests: what was read, by SHA-256: the files as PEFT writes them by name, and under
            `safegene.json#<expression>` what the chosen expression says. One more expression in
            safegene.json changes none of them, so that what was recorded with this one still fits.
        is_as_peft_reads: whether PEFT loads the folder onto the text model; not so for shards, null
            in place of an empty pattern, and names of a compiled model, or of one with more parts.
        cautions: what is allowed, and yet seldom meant; a sentence each.
    """

    path: Path
    settings: LoraSettings
    modules: tuple[Module, ...]
    expression: str
    expressions: tuple[str, ...]
    target: str | None
    base_model: Mapping[str, Any] | None
    digests: Mapping[str, str]
    is_as_peft_reads: bool = True
    cautions: tuple[str, ...] = ()

    @property
    def n_parameters(self) -> int:
        """How many numbers its factors hold."""
        return sum(module.a.size + module.b.size for module in self.modules)


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
    files = read_adapter_files(path)
    settings = parse_config(files.config, str(path / CONFIG_NAME))
    safegene = None
    if files.safegene is not None:
        safegene = parse_safegene(files.safegene, str(path / SAFEGENE_NAME))
    weights = files.weights
    problems, refused = Problems(), Problems()
    pairs = _pair_factors(weights, problems, refused)
    settings = dataclasses.replace(settings, stem=pairs.stem)
    chosen, coefficients = _choose_expression(path, safegene, expression)
    modules = []
    for name, keys in pairs.keys.items():
        module = _read_module(weights, name, keys, settings, coefficients, problems)
        if module is not None:
            modules.append(module)
    idle = _check_config(path, settings, pairs.keys, problems)
    if safegene is not None:
        layers = set(map(layer_of, pairs.keys))
        safegene.check_layers(str(path / SAFEGENE_NAME), layers, problems)
    problems.raise_if_any(AdapterError)
    digests = dict(files.digests)
    if safegene is not None:
        digests[f"{SAFEGENE_NAME}#{chosen}"] = safegene.digest(chosen)
    return Adapter(
        path=path,
        settings=settings,
        modules=tuple(sorted(modules, key=lambda module: (module.layer, module.name))),
        expression=chosen,
        expressions=tuple(safegene.coefficients) if safegene else (PLAIN_EXPRESSION,),
        target=safegene.targets[chosen] if safegene else None,
        base_model=safegene.base_model if safegene else None,
        digests=digests,
        is_as_peft_reads=(
            weights.path.name == WEIGHTS_NAME
            and pairs.stem == STEM
            and not pairs.is_compiled
            and None not in (files.config.get(name, {}) for name in MODULE_PATTERNS)
        ),
        cautions=(*idle, *_implausible(modules)),
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


def _pair_factors(weights: Weights, problems: Problems, refused: Problems) -> Pairs:
    where = str(weights.path)
    if not weights.tensors:
        problems.add(where, "tensors", "at least one pair of factors", "none",
                     "PEFT would run the base model without a word")  # fmt: skip
        problems.raise_if_any(AdapterError)
    pairs = pair_factors(weights.tensors, where, problems, refused)
    if refused:
        refused.extend(problems)
    refused.raise_if_any(UnsupportedError)
    return pairs


def _read_module(
    weights: Weights,
    name: str,
    keys: Mapping[str, str],
    settings: LoraSettings,
    coefficients: Mapping[int, float] | None,
    problems: Problems,
) -> Module | None:
    where = str(weights.path)
    found = len(problems)
    layer = layer_of(name)
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


def _check_config(
    path: Path, settings: LoraSettings, modules: Mapping[str, Any], problems: Problems
) -> list[str]:
    """What the configuration names and no tensor meets: problems, or cautions as in PEFT."""
    where = str(path / CONFIG_NAME)
    layers = set(map(layer_of, modules))
    for name, keys in (
        ("rank_pattern", settings.rank_pattern),
        ("alpha_pattern", settings.alpha_pattern),
        ("layers_to_transform", sorted(settings.layers_to_transform or ())),
    ):
        for key in keys:
            if not (
                key in layers
                if isinstance(key, int)
                else any(settings.matches(module, pattern=key) for module in modules)
            ):
                problems.add(where, name, "something the tensors match", repr(str(key))[:100],
                             "restore the weights, or remove the entry")  # fmt: skip
    if isinstance(settings.targets, str):
        return []
    cautions = []
    linear = [module for layer in layers for module in modules_of(layer)]
    for target in sorted(settings.targets):
        if any(settings.matches(module, target=target) for module in modules):
            continue
        meant = [module for module in linear if settings.matches(module, target=target)]
        if not meant or not all(map(settings.is_excluded, meant)):
            cautions.append(f"{target[:100]!r} of target_modules has no tensors")
    return cautions


def _implausible(modules: Sequence[Module]) -> Iterator[str]:
    """Cautions about deltas that are seldom meant; each names how many modules, and the worst."""
    low, high = PLAUSIBLE_SCALES
    scales = {module.name: formula.effective_scale(module) for module in modules}
    changes = {module.name: _change_of(module) for module in modules}
    for found, what in (
        ({name: -s for name, s in scales.items() if s < 0},
         "the effective scale is negative, so that the delta is subtracted"),
        ({name: abs(s) for name, s in scales.items() if abs(s) > high},
         f"the effective scale is above {high:g}"),
        ({name: 1 / abs(s) for name, s in scales.items() if abs(s) < low},
         f"the effective scale is below {low:g}"),
        ({name: c for name, c in changes.items() if c > PLAUSIBLE_CHANGE},
         "the delta is larger than the weights of any language model"),
    ):  # fmt: skip
        if found:
            worst = max(found, key=lambda name: found[name])
            yield (
                f"in {len(found)} of {len(modules)} modules {what}: {worst} has the effective "
                f"scale {scales[worst]:g} and changes weights by about {changes[worst]:.2g}"
            )


def _change_of(module: Module) -> float:
    """Root mean square of an entry of dW, as if the directions of A and B were unrelated."""
    norms = [float(np.linalg.norm(factor.astype(np.float64))) for factor in (module.a, module.b)]
    size = module.rank * module.shape[0] * module.shape[1]
    return abs(formula.effective_scale(module)) * math.prod(norms) / math.sqrt(size)


def _choose_expression(
    path: Path, safegene: SafegeneJson | None, expression: str | None
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
