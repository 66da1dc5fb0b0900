"""`adapter_config.json` as PEFT 0.21 reads it: every field is honoured, inert, or refused by name.

Each field of `peft.LoraConfig` stands in exactly one of three tables; a test compares them with the
installed PEFT, so that a field of a later version fails the suite instead of being ignored.

Matching follows PEFT to the letter (peft 0.21.2: `tuners_utils.check_target_module_exists`,
`utils.other.get_pattern_key`); the tests run both side by side.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safegene_converter import formula
from safegene_converter.inputs.adapter_keys import STEM
from safegene_converter.inputs.patterns import why_refused
from safegene_runtime.errors import AdapterError, Problems, UnsupportedError

__all__ = [
    "DEAD", "DEFAULTS", "HONOURED", "INERT", "MODULE_PATTERNS", "REFUSED", "LoraSettings", "parse_config",
]  # fmt: skip

HONOURED = frozenset(
    {
        "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern",
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
        "fan_in_fan_out", "init_lora_weights",
    }
)  # fmt: skip
"""Fields that decide which modules are touched, and by how much.

`fan_in_fan_out` is for weights stored (in, out), as GPT-2's Conv1D does; PEFT sets it back to false
on an nn.Linear, and every module of the architectures we accept is one, so neither value transposes.
"""

INERT = frozenset(
    {
        "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
        "inference_mode", "lora_dropout", "megatron_core", "qalora_group_size", "runtime_config",
        # read only by the initialisations named in `_REWRITES_BASE`, which are refused
        "loftq_config", "eva_config", "corda_config", "lora_ga_config", "ensure_weight_tying",
    }
)  # fmt: skip
"""Fields that change nothing about trained weights at inference."""

_TASKS = (
    None, "CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION",
)  # fmt: skip
_INERT_OBJECTS = ("eva_config", "corda_config", "lora_ga_config")
"""Inert, but PEFT refuses another value, so that nothing could be recorded: as the other two below."""

REFUSED: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "bias": (("none",), "trained biases are not part of a low-rank delta: train with bias='none'"),
    "lora_bias": ((False, None), "trained biases are not supported: train with lora_bias=False"),
    "use_dora": ((False, None), "DoRA rescales the whole weight: train a plain LoRA"),
    "modules_to_save": ((None, []), "whole saved modules are not a delta: train without them"),
    "trainable_token_indices": ((None, [], {}), "embedding deltas are not supported yet"),
    "target_parameters": ((None, []), "expert parameters are not supported yet"),
    "layer_replication": ((None, []), "replicated layers change the model itself"),
    "megatron_config": ((None,), "convert the model to plain transformers modules first"),
    "velora_config": ((None,), "only plain LoRA and rsLoRA are supported"),
    "alora_invocation_tokens": (
        (None, []),
        "activated LoRA acts behind an invocation only: no weight can hold that",
    ),
    "use_qalora": ((False, None), "QA-LoRA pools its inputs: train a plain LoRA"),
    "monteclora_config": ((None,), "only plain LoRA and rsLoRA are supported"),
    "use_bdlora": ((None, False), "block-diagonal LoRA is not supported yet"),
    "arrow_config": ((None,), "a router over adapters cannot be folded into weights"),
    "kasa_config": ((None,), "only plain LoRA and rsLoRA are supported"),
}
"""Fields that must hold one of these values; the text says what to do otherwise."""

DEAD: Mapping[str, tuple[tuple[Any, ...], str]] = {
    "enable_lora": ((None, False), "it splits a fused weight: train with peft 0.21"),
    "merge_weights": ((False, None), "save the adapter with its weights apart from the base"),
}
"""Fields of peft 0.1 and 0.2 that later versions ignore, and the values under which both agree."""

DEFAULTS: Mapping[str, Any] = {
    "r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "fan_in_fan_out": False,
    "init_lora_weights": True,
}  # fmt: skip
"""PEFT's own values of what a configuration leaves out. It does not load null in place of a number."""

MODULE_PATTERNS = ("rank_pattern", "alpha_pattern")
"""PEFT 0.21 loads no null here; other readers do, and there is one thing it can mean."""

_HARMLESS_INITS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
_MAX_RANK = 1 << 20
_KEY_PATTERN = r"(.*\.)?({})$"
_LAYERS_PATTERN = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
_ALL_LINEAR = "all-linear"
_RESTORE = "restore the file that PEFT saved with these weights"


@dataclass(frozen=True)
class LoraSettings:
    """The honoured fields, checked; methods answer for one module as PEFT would.

    Modules are named as in the text model. PEFT matched the names of the model that was trained.

    Attributes:
        targets: names or suffixes of modules, or one regular expression (a str).
        layers_to_transform: None, or the only layers that `targets` applies to.
        stem: where the model that was trained keeps its text layers.
    """

    rank: int
    alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    targets: frozenset[str] | str
    excluded: frozenset[str] | str
    layers_to_transform: frozenset[int] | None
    layers_pattern: tuple[str, ...] = field(default=())
    stem: str = STEM

    def rank_of(self, module: str) -> int:
        """The rank PEFT gives a module: the first matching pattern wins."""
        key = _pattern_key(self.rank_pattern, self._trained(module))
        return self.rank if key is None else self.rank_pattern[key]

    def alpha_of(self, module: str) -> float:
        """The alpha PEFT gives a module: the first matching pattern wins."""
        key = _pattern_key(self.alpha_pattern, self._trained(module))
        return self.alpha if key is None else self.alpha_pattern[key]

    def scaling_of(self, module: str) -> float:
        """PEFT's scaling of a module."""
        return formula.scaling(self.rank_of(module), self.alpha_of(module), self.use_rslora)

    def is_target(self, module: str) -> bool:
        """Whether PEFT would put a LoRA on this linear module."""
        if self.is_excluded(module):
            return False
        module = self._trained(module)
        if isinstance(self.targets, str):
            return self.targets.lower() == _ALL_LINEAR or bool(re.fullmatch(self.targets, module))
        if module in self.targets:
            return True
        if not _names(self.targets, module):
            return False
        return not self.layers_to_transform or self._layer_of(module) in self.layers_to_transform

    def is_excluded(self, module: str) -> bool:
        """Whether PEFT would leave this module alone although it is targeted."""
        module = self._trained(module)
        if isinstance(self.excluded, str):
            return bool(self.excluded and re.fullmatch(self.excluded, module))
        return _names(self.excluded, module)

    def matches(self, module: str, *, target: str = "", pattern: str = "") -> bool:
        """Whether an entry of `targets`, or a key of a pattern, is about this module."""
        module = self._trained(module)
        if pattern:
            return _pattern_key({pattern: None}, module) is not None
        return _names(frozenset({target}), module)

    def _trained(self, module: str) -> str:
        """The name of a module in the model that was trained."""
        return self.stem + module.removeprefix(STEM) if self.stem != STEM else module

    def _layer_of(self, module: str) -> int | None:
        patterns = [_LAYERS_PATTERN.format(pattern) for pattern in self.layers_pattern]
        for pattern in patterns or [r".*?\.[^.]*\.(?P<idx>\d+)\."]:
            if (found := re.match(pattern, module)) and found["idx"]:
                return int(found["idx"])
        return None


def _pattern_key(patterns: Mapping[str, Any], module: str) -> str | None:
    """The first pattern that matches a module, as `peft.utils.other.get_pattern_key`."""
    for pattern in patterns:
        if re.match(_KEY_PATTERN.format(pattern), module):
            return pattern
    return None


def parse_config(config: Any, where: str) -> LoraSettings:
    """Checks every field of an adapter_config.json.

    Raises:
        UnsupportedError: a feature that is refused by name (with everything else that is wrong).
        AdapterError: unknown fields, or values PEFT would not accept either.
    """
    problems, refused = Problems(), Problems()
    if not isinstance(config, dict):
        problems.add(where, "value", "a JSON object", type(config).__name__, _RESTORE)
        problems.raise_if_any(AdapterError)
    known = HONOURED | INERT | REFUSED.keys() | DEAD.keys()
    for name in sorted(config.keys() - known):
        problems.add(where, name, "a field of peft 0.21's LoraConfig", "an unknown field",
                     "remove it if it changes nothing, or save with peft 0.21")  # fmt: skip
    if config.get("peft_type") != "LORA":
        refused.add(where, "peft_type", "LORA", repr(config.get("peft_type")),
                    "only LoRA-shaped adapters can be folded")  # fmt: skip
    for name, (allowed, fix) in (*REFUSED.items(), *DEAD.items()):
        value = config.get(name, allowed[0])
        if not any(value is a or (value == a and type(value) is type(a)) for a in allowed):
            refused.add(where, name, f"{allowed[0]!r}", repr(value)[:100], fix)
    init = config.get("init_lora_weights", DEFAULTS["init_lora_weights"])
    if not any(init is a or (isinstance(a, str) and init == a) for a in _HARMLESS_INITS):
        refused.add(where, "init_lora_weights", "an initialisation that leaves the base alone",
                    repr(init)[:100], "it changed the base weights: convert the adapter to plain "
                    "LoRA (save_pretrained with path_initial_model_for_weight_conversion)")  # fmt: skip
    _check_inert(config, where, problems)
    settings = _parse_honoured(config, where, problems)
    if refused:
        refused.extend(problems)
    refused.raise_if_any(UnsupportedError)
    problems.raise_if_any(AdapterError)
    return settings


def _check_inert(config: Mapping[str, Any], where: str, problems: Problems) -> None:
    """Refuses what changes nothing here, but what PEFT would not load."""
    task = config.get("task_type")
    if task is not None and task not in _TASKS:
        problems.add(
            where, "task_type", "a task of PEFT such as CAUSAL_LM", repr(task)[:100], _RESTORE
        )
    dropout = config.get("lora_dropout", DEFAULTS["lora_dropout"])
    if type(dropout) not in (int, float) or not 0 <= dropout <= 1:
        problems.add(where, "lora_dropout", "a number from 0 to 1", repr(dropout)[:100], _RESTORE)
    for name in _INERT_OBJECTS:
        if not isinstance(config.get(name), dict | None):
            problems.add(where, name, "null or an object", repr(config[name])[:100], _RESTORE)


def _parse_honoured(config: Mapping[str, Any], where: str, problems: Problems) -> LoraSettings:
    rank = config.get("r", DEFAULTS["r"])
    if not _is_rank(rank):
        problems.add(where, "r", "a positive integer", repr(rank)[:100], _RESTORE)
        rank = 1
    alpha = config.get("lora_alpha", DEFAULTS["lora_alpha"])
    if not _is_scale(alpha):
        problems.add(where, "lora_alpha", "a number above 0", repr(alpha)[:100],
                     "the scale would be zero or undefined: llama.cpp reads 0 as 1")  # fmt: skip
        alpha = 1
    for name in ("use_rslora", "fan_in_fan_out"):  # null is false, for PEFT as for us
        if type(config.get(name)) not in (bool, type(None)):
            problems.add(where, name, "true or false", repr(config[name])[:100], _RESTORE)
    ranks = _parse_pattern(config, "rank_pattern", where, problems)
    for key, value in ranks.items():
        if not _is_rank(value):
            got = repr(value)[:100]
            problems.add(where, f"rank_pattern.{key}", "a positive integer", got, _RESTORE)
    alphas = _parse_pattern(config, "alpha_pattern", where, problems)
    for key, value in alphas.items():
        if not _is_scale(value):
            got = repr(value)[:100]
            problems.add(where, f"alpha_pattern.{key}", "a number above 0", got, _RESTORE)
    targets = _parse_modules(config, "target_modules", where, problems)
    if not targets:
        problems.add(where, "target_modules", "the modules the adapter was trained on", "none",
                     "name them")  # fmt: skip
    layers, patterns = _parse_layers(config, where, problems)
    return LoraSettings(
        rank=rank,
        alpha=alpha,
        use_rslora=config.get("use_rslora") is True,
        rank_pattern=ranks,
        alpha_pattern=alphas,
        targets=targets,
        excluded=_parse_modules(config, "exclude_modules", where, problems),
        layers_to_transform=layers,
        layers_pattern=patterns,
    )


def _parse_pattern(
    config: Mapping[str, Any], name: str, where: str, problems: Problems
) -> dict[str, Any]:
    value = config.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        problems.add(where, name, "an object of module patterns", repr(value)[:100], _RESTORE)
        return {}
    return {
        key: v
        for key, v in value.items()
        if _is_pattern(key, where, name, problems, around=_KEY_PATTERN)
    }


def _parse_modules(
    config: Mapping[str, Any], name: str, where: str, problems: Problems
) -> frozenset[str] | str:
    value = config.get(name)
    if value is None:
        return frozenset()
    if isinstance(value, str):
        return value if _is_pattern(value, where, name, problems) else ""
    if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
        problems.add(where, name, "module names, or one regular expression", repr(value)[:100],
                     _RESTORE)  # fmt: skip
        return frozenset()
    return frozenset(value)


def _parse_layers(
    config: Mapping[str, Any], where: str, problems: Problems
) -> tuple[frozenset[int] | None, tuple[str, ...]]:
    layers, patterns = config.get("layers_to_transform"), config.get("layers_pattern")
    if type(layers) is int:
        layers = [layers]
    if layers is not None and not (
        isinstance(layers, list) and all(type(n) is int and n >= 0 for n in layers)
    ):
        problems.add(where, "layers_to_transform", "layer numbers", repr(layers)[:100], _RESTORE)
        layers = None
    patterns = [patterns] if isinstance(patterns, str) and patterns else patterns or []
    if not isinstance(patterns, list) or not all(isinstance(p, str) for p in patterns):
        problems.add(where, "layers_pattern", "names of the list of layers", repr(patterns)[:100],
                     _RESTORE)  # fmt: skip
        patterns = []
    patterns = [
        pattern
        for pattern in patterns
        if _is_pattern(pattern, where, "layers_pattern", problems, around=_LAYERS_PATTERN)
    ]
    if isinstance(config.get("target_modules"), str) and (layers is not None or patterns):
        problems.add(where, "layers_to_transform", "null beside a regular expression",
                     repr(layers)[:100], "PEFT refuses it too: list the modules")  # fmt: skip
    if patterns and layers is None:
        problems.add(where, "layers_pattern", "layers_to_transform beside it", "null",
                     "PEFT refuses it too: remove it, or add layers_to_transform")  # fmt: skip
    return None if layers is None else frozenset(layers), tuple(patterns)


def _is_pattern(
    pattern: str, where: str, name: str, problems: Problems, around: str = "{}"
) -> bool:
    """Whether a pattern compiles and is quick to match; notes why not.

    Args:
        pattern: what the configuration says.
        where: the file.
        name: the field.
        problems: gets what is wrong.
        around: what PEFT matches, with the pattern in its place.
    """
    if reason := why_refused(pattern, around):
        problems.add(where, name, "a regular expression that is quick to match",
                     f"{pattern[:80]!r} ({reason})",
                     "list the modules, or repeat less within what is repeated")  # fmt: skip
        return False
    return True


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value <= _MAX_RANK


def _is_scale(value: Any) -> bool:
    # compared, not converted: an integer may be larger than any float
    return type(value) in (int, float) and 0 < value <= sys.float_info.max


def _names(names: frozenset[str], module: str) -> bool:
    return module in names or any(module.endswith(f".{name}") for name in names)
