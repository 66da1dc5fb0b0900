"""Targets and forms: one value each, and no other module compares their names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import safegene_converter
import safegene_runtime
from safegene_runtime.artifact import forms
from safegene_runtime.artifact.forms import (
    FORMS,
    GGUF,
    GGUF_SIDECAR,
    ONNX,
    ONNX_ADAPTER,
    TARGETS,
    Form,
    find_form,
    form_named,
    forms_of,
    names_of_forms,
    target_named,
)
from safegene_runtime.errors import UnsupportedError

JUDGES = ("judging", "reporting")
"""Rooms where `gguf:FILE` and `onnx:FILE` are judges, and no targets."""


def compared(path: Path) -> Iterator[str]:
    """Every text that a module holds against something: ==, !=, in, match, or as a key of a table."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        sides: list[ast.expr] = []
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
        elif isinstance(node, ast.MatchValue):
            sides = [node.value]
        for side in sides:
            for one in side.elts if isinstance(side, (ast.Tuple, ast.List, ast.Set)) else [side]:
                if isinstance(one, ast.Constant) and isinstance(one.value, str):
                    yield one.value


def test_no_module_but_one_compares_the_names_of_targets_and_forms() -> None:
    names = {*names_of_forms(), *(target.name for target in TARGETS)}
    found = {}
    for package in (safegene_runtime, safegene_converter):
        root = Path(str(package.__file__)).parent
        for path in sorted(root.rglob("*.py")):
            room = path.relative_to(root).parts[0]
            if path != Path(forms.__file__) and room not in JUDGES:
                found[str(path)] = names & set(compared(path))
    assert len(found) > 100
    assert not any(found.values()), {path: names for path, names in found.items() if names}


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_form_is_found_by_its_names(form: Form) -> None:
    assert form_named(target_named(form.target.name), form.name) is form
    assert find_form(form.target.name, form.name) is form
    assert form in forms_of(form.target)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_what_a_form_implies_agrees(form: Form) -> None:
    assert form.carries_base or form.has_adapter
    assert not form.merges or form.roles == ("model",)
    assert not form.has_slots or (form.carries_base and form.has_adapter)
    # only what changes the weights can be promoted, or weighed by importance
    assert not (form.merges and form.ignores)


def test_what_stands_apart_from_its_base_is_the_sidecar() -> None:
    assert [form for form in FORMS if not form.carries_base] == [GGUF_SIDECAR]
    assert [form for form in FORMS if form.has_slots] == [ONNX_ADAPTER]


@pytest.mark.parametrize(("target", "name"), [(GGUF, "branch"), (ONNX, "sidecar"), (GGUF, "")])
def test_a_form_that_a_target_has_not_is_refused_by_name(target: forms.Target, name: str) -> None:
    assert find_form(target.name, name) is None
    with pytest.raises(UnsupportedError, match=f"form of --to {target.name}: expected merged or"):
        form_named(target, name)


def test_a_target_that_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match="gguf or onnx, got pickle"):
        target_named("pickle")


def test_no_option_of_a_conversion_is_of_two_targets() -> None:
    options = [name for target in TARGETS for name in target.options]
    assert len(set(options)) == len(options)
