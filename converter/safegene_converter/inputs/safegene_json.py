"""safegene.json: the layers a gene was selected for, and its named expressions.

    {"format_version": 1,
     "base_model": {"name": "...", "architecture": "llama", "n_layers": 30},
     "selected_layers": [3, 4, 9],
     "default_expression": "default",
     "expressions": {"default": {"coefficients": {"3": 0.91, "4": 1.2, "9": 0.4},
                                 "target": "which fine-tune", "n_shots": 48}}}

It is checked by itself first, then against the layers that have tensors.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Set
from dataclasses import dataclass
from typing import Any

from safegene_runtime.errors import AdapterError, Problems
from safegene_runtime.formats.fields import (
    INTEGER,
    NAME,
    OBJECT,
    TEXT,
    check_fields,
    check_version,
    integer,
    list_of,
    object_of,
)
from safegene_runtime.formats.files import sha256_of

__all__ = ["FORMAT_VERSION", "PLAIN_EXPRESSION", "SAFEGENE_NAME", "SafegeneJson", "parse_safegene"]

SAFEGENE_NAME = "safegene.json"
FORMAT_VERSION = 1
PLAIN_EXPRESSION = "default"
"""The one expression of a plain LoRA, under which every coefficient is 1."""

_RESTORE = "restore the file that was made with this adapter, or correct it"
_FIELDS = {
    "format_version": INTEGER,
    "base_model": OBJECT,
    "selected_layers": list_of(integer(0), filled=True, unique=True),
    "default_expression": TEXT,
    "expressions": object_of(filled=True),
}
_BASE = {"name": NAME, "architecture": NAME, "n_layers": integer(1)}
_EXPRESSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


@dataclass(frozen=True)
class SafegeneJson:
    """What safegene.json says, checked by itself."""

    base_model: Mapping[str, Any]
    selected_layers: frozenset[int]
    default_expression: str
    coefficients: Mapping[str, Mapping[int, float]]
    targets: Mapping[str, str | None]

    def digest(self, expression: str) -> str:
        """SHA-256 of what one expression does: its base and its coefficients, as compact JSON."""
        meaning = {
            "base_model": dict(self.base_model),
            "coefficients": {str(n): c for n, c in sorted(self.coefficients[expression].items())},
        }
        return sha256_of(json.dumps(meaning, sort_keys=True, separators=(",", ":")).encode())

    def check_layers(self, where: str, layers: Set[int], problems: Problems) -> None:
        """Notes where selection, coefficients and the layers that have tensors differ."""
        selected = self.selected_layers
        for layer in sorted(selected - layers):
            problems.add(where, "selected_layers", "layers that have tensors", f"layer {layer}",
                         "remove it, or restore the tensors")  # fmt: skip
        for layer in sorted(layers - selected):
            problems.add(where, "selected_layers", f"layer {layer}, which has tensors",
                         "not selected", "select it, or remove its tensors")  # fmt: skip
        n_layers = self.base_model["n_layers"]
        for name, coefficients in self.coefficients.items():
            field_name = f"expressions.{name}.coefficients"
            for layer in sorted(coefficients.keys() - layers):
                problems.add(where, field_name, "layers that have tensors", f"layer {layer}",
                             "remove the coefficient")  # fmt: skip
            for layer in sorted((selected | layers) - coefficients.keys()):
                problems.add(where, field_name, f"a coefficient for layer {layer}", "none",
                             "add it: there is no default")  # fmt: skip
            for layer in sorted(n for n in coefficients if n >= n_layers):
                problems.add(where, field_name, f"layers below {n_layers}", f"layer {layer}",
                             "remove it, or correct n_layers")  # fmt: skip


def parse_safegene(raw: Any, where: str) -> SafegeneJson:
    """Checks what a safegene.json holds.

    Raises:
        AdapterError: unknown or missing keys, or values that mean nothing.
    """
    problems = Problems()
    fix = "use the version of safegene that made this adapter"
    if check_version(raw, where, FORMAT_VERSION, problems, fix):
        check_fields(raw, where, _FIELDS, problems, fix=_RESTORE)
        if isinstance(raw, dict) and isinstance(raw.get("base_model"), dict):
            check_fields(raw["base_model"], f"{where}: base_model", _BASE, problems, fix=_RESTORE)
    problems.raise_if_any(AdapterError)
    expressions, default = raw["expressions"], raw["default_expression"]
    coefficients, targets = {}, {}
    for name, entry in expressions.items():
        if not _EXPRESSION.fullmatch(name):
            problems.add(where, "expressions", "names of letters, digits, . _ -", repr(name)[:100],
                         "rename it")  # fmt: skip
        coefficients[name] = _parse_expression(f"{where}: expressions.{name}", entry, problems)
        targets[name] = entry.get("target") if isinstance(entry, dict) else None
    if default not in expressions:
        known = ", ".join(expressions)
        problems.add(where, "default_expression", f"one of {known}", repr(default)[:100],
                     "name one of them")  # fmt: skip
    problems.raise_if_any(AdapterError)
    layers = frozenset(raw["selected_layers"])
    return SafegeneJson(raw["base_model"], layers, default, coefficients, targets)


def _parse_expression(where: str, entry: Any, problems: Problems) -> dict[int, float]:
    fields, optional = {"coefficients": OBJECT}, {"target": TEXT, "n_shots": integer(0)}
    if not check_fields(entry, where, fields, problems, optional=optional, fix=_RESTORE):
        return {}
    coefficients = {}
    for layer, value in entry["coefficients"].items():
        if not re.fullmatch(r"0|[1-9][0-9]{0,5}", layer):
            problems.add(
                where, "coefficients", "layer numbers as keys", repr(layer)[:100], _RESTORE
            )
        elif type(value) not in (int, float) or not 0 < abs(value) <= sys.float_info.max:
            problems.add(where, f"coefficients.{layer}", "a finite number that is not 0",
                         repr(value)[:100], "to drop a layer, leave it out everywhere")  # fmt: skip
        else:
            coefficients[int(layer)] = float(value)
    return coefficients
