"""Recalibration against the file that ships: llama.cpp runs it, and no gradient is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from safegene import record
from safegene_converter.gene.deployed import recalibrate_deployed
from safegene_converter.gene.extract import extract
from safegene_converter.gene.folder import Expression, add_expression
from safegene_converter.gene.rebuild import gguf_rebuild
from safegene_converter.gene.shots import check_same_prompts
from safegene_converter.inputs.adapter import read_adapter
from safegene_runtime.errors import AdapterError, EngineError, GeneError
from safegene_runtime.record.prompts import Prompt
from safegene_runtime.record.reference import Reference

PLANTED = {0: 0.6, 1: 1.6}
PROMPTS = tuple(
    Prompt(f"p{number}", text, "harmful", "test")
    for number, text in enumerate(("Name a colour.", "Two words about rain."))
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    """A gene with a planted expression, and what PyTorch answers under it."""
    folder = tmp_path_factory.mktemp("deployed")
    base = tiny.hf_model("llama")
    adapter = tiny.peft_adapter("llama", folder / "tuned", scale=0.15)
    extract(base, [adapter], folder / "gene", base=base)
    add_expression(folder / "gene", "planted", Expression(PLANTED))
    reference = record(
        folder / "gene", base, folder / "reference", prompts=PROMPTS, expression="planted",
        max_new_tokens=4,
    )  # fmt: skip
    return folder / "gene", reference


@pytest.fixture
def gene(made: tuple[Path, Reference]) -> Iterator[Path]:
    before = (made[0] / "safegene.json").read_bytes()
    yield made[0]
    (made[0] / "safegene.json").write_bytes(before)


def test_a_planted_coefficient_is_recovered_from_a_sidecar(
    gene: Path, made: tuple[Path, Reference]
) -> None:
    with gguf_rebuild(gene, tiny.gguf_model("llama"), "sidecar", threads=1) as rebuild:
        found = recalibrate_deployed(
            gene, made[1], rebuild, "deployed", expression="default", max_evaluations=45
        )
    assert np.allclose([found.coefficients[layer] for layer in (0, 1)], [0.6, 1.6], rtol=0.06)
    assert found.after < 0.02 * found.before
    stored = {module.layer: module.coefficient for module in read_adapter(gene, "deployed").modules}
    assert stored == pytest.approx(found.coefficients, abs=1e-6)
    assert sorted(path.name for path in gene.parent.iterdir()) == ["gene", "reference", "tuned"]


def test_exact_coefficients_stay_where_they_are(gene: Path, made: tuple[Path, Reference]) -> None:
    with gguf_rebuild(gene, tiny.gguf_model("llama"), "merged", threads=1) as rebuild:
        found = recalibrate_deployed(
            gene, made[1], rebuild, "deployed", expression="planted", max_evaluations=8
        )
    assert found.coefficients == pytest.approx(PLANTED)
    assert found.before == found.after < 1e-8


def test_a_reference_of_other_prompts_is_refused(made: tuple[Path, Reference]) -> None:
    check_same_prompts(made[1], PROMPTS, "reference")
    with pytest.raises(GeneError, match="the shots, got others"):
        check_same_prompts(made[1], PROMPTS[:1], "reference")


def test_nothing_is_added_when_the_engine_fails(gene: Path, made: tuple[Path, Reference]) -> None:
    def broken(_: dict[int, float]) -> Any:
        raise EngineError([])

    before = (gene / "safegene.json").read_bytes()
    with pytest.raises(EngineError):
        recalibrate_deployed(gene, made[1], broken, "deployed")
    with pytest.raises(AdapterError, match="a name that is free"):
        recalibrate_deployed(gene, made[1], broken, "planted")
    with pytest.raises(GeneError, match="at least 1"):
        recalibrate_deployed(gene, made[1], broken, "deployed", max_evaluations=0)
    assert (gene / "safegene.json").read_bytes() == before
