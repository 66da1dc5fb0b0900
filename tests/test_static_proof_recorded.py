"""The static proof: what is recorded of an adapter."""

# ruff: noqa: F811 - fixtures are imported, and are parameters of the tests, too
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from test_static_proof import betas, dense_delta, gguf_artifact, hf_weight, make, prove, scratch  # noqa: F401  # noqa: F401

from safegene_runtime.errors import (
    Problems,
)
from safegene_runtime.record import added_weights


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_factors_are_what_the_adapter_file_says(architecture: str, scratch: Path) -> None:
    made = make(scratch, architecture)
    assert made.record.factors is not None
    assert len(made.record.factors) == len(tiny.modules(architecture))
    for one in made.record.factors:
        delta = dense_delta(made, one.module)
        product = one.b.astype(np.float64) @ one.a.astype(np.float64)
        np.testing.assert_allclose(product, delta, rtol=1e-5, atol=1e-6 * np.abs(delta).max())
        norm = float((delta * delta).sum())
        assert one.norm == pytest.approx(norm, rel=1e-6)
        s0 = float((hf_weight(made, one.module) * delta).sum()) / norm
        assert one.s0 == pytest.approx(s0, rel=1e-5, abs=1e-6)


def test_factors_survive_being_written_and_read(scratch: Path) -> None:
    made = make(scratch, "llama").record.factors or ()
    problems = Problems()
    again = added_weights.decode(added_weights.encode(made), "here", problems)
    assert not len(problems)
    for one, other in zip(made, again, strict=True):
        assert (one.module, one.norm, one.s0) == (other.module, other.norm, other.s0)
        assert np.array_equal(one.a, other.a)
        assert np.array_equal(one.b, other.b)


def first_line_twice(names: np.ndarray) -> np.ndarray:
    lines = names.tobytes().split(b"\n")
    return np.frombuffer(b"\n".join([lines[0], *lines[:-1]]), np.uint8)


@pytest.mark.parametrize(
    ("name", "change", "field"),
    [
        ("shapes", lambda x: x[:-1], "shapes"),
        ("shapes", lambda x: -x, "shapes"),
        ("shapes", lambda x: x + 1, "a"),
        ("shapes", lambda x: x * 0 + (1 << 31), "a"),
        ("names", lambda x: np.full_like(x, 255), "names"),
        ("names", lambda x: first_line_twice(x), "names"),
        ("norm", lambda x: x * 1.01, "norm of"),
        ("norm", lambda x: -x, "norm"),
        ("s0", lambda x: x[1:], "s0"),
        ("b", lambda x: x * 2, "norm of"),
        ("a", lambda x: x[:-1], "a"),
    ],
)
def test_factors_that_contradict_themselves_are_refused(
    name: str, change: Any, field: str, scratch: Path
) -> None:
    arrays = added_weights.encode(make(scratch, "llama").record.factors or ())
    problems = Problems()
    added_weights.decode({**arrays, name: change(arrays[name])}, "here", problems)
    found = [problem.field for problem in problems]
    assert any(one.startswith(field) for one in found)


# --- one, where it is ------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
@pytest.mark.parametrize("form", ["merged", "sidecar"])
def test_beta_is_one_in_f32(architecture: str, form: str, scratch: Path) -> None:
    made = make(scratch, architecture)
    proof = prove(made, gguf_artifact(scratch, architecture, form))
    assert proof.status == "ok"
    assert not proof.inert
    np.testing.assert_allclose(list(betas(proof).values()), 1, atol=1e-5)
    assert proof.pooled == pytest.approx(1, abs=1e-6)
    for one in proof.modules:
        if form == "sidecar":
            assert one.base_shift == pytest.approx(0, abs=1e-5)
            assert one.relative_error == pytest.approx(0, abs=1e-4)
