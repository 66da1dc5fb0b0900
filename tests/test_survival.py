"""The laws of survival: what is kept counts as kept, what is lost as lost."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from safegene_converter.encoding import ggml_quantizer
from safegene_converter.fold import survival
from safegene_converter.fold.survival import Bounds, Meter, Mode, Survival, passes
from safegene_runtime.errors import SurvivalError
from safegene_runtime.formats import ggml
from safegene_runtime.formats.gguf.types import GGMLType

SHAPE = (96, 512)
BASE = tiny.real_weights(SHAPE)
_RANDOM = np.random.default_rng(3)
DELTA = (_RANDOM.standard_normal((SHAPE[0], 8)) @ _RANDOM.standard_normal((8, SHAPE[1]))).astype(
    np.float32
)


def _delta(share: float) -> np.ndarray:
    """A low-rank delta whose norm is `share` of the base's."""
    scale = share * np.linalg.norm(BASE) / np.linalg.norm(DELTA)
    return (DELTA * scale).astype(np.float32)


def _stored(rows: np.ndarray, type: GGMLType) -> np.ndarray:
    return ggml.dequantize(ggml_quantizer.quantize(rows, type), type, rows.shape)


def measure(
    base: np.ndarray, delta: np.ndarray, stored: np.ndarray, base_stored: np.ndarray | None = None
) -> Survival:
    """The survival of a whole tensor, (out, in); `Mode.ONCE` if `base_stored` is given."""
    meter = Meter(Mode.GRID if base_stored is None else Mode.ONCE)
    meter.add(base, delta, stored, base_stored)
    return meter.result()


def test_everything_kept_is_gain_one_and_error_zero() -> None:
    delta = _delta(0.01).astype(np.float64)
    found = measure(BASE, delta, BASE + delta)  # in float64, so that nothing is rounded
    assert found.gain == pytest.approx(1, abs=1e-12)
    assert found.relative_error == pytest.approx(0, abs=1e-12)
    assert passes(found, Bounds())


def test_nothing_kept_is_gain_zero_and_error_one() -> None:
    found = measure(BASE, _delta(0.01), BASE)
    assert (found.gain, found.relative_error) == (0, 1)
    assert not passes(found, Bounds())


def test_a_doubled_delta_is_gain_two() -> None:
    delta = _delta(0.01).astype(np.float64)
    found = measure(BASE, delta, BASE + 2 * delta)
    assert found.gain == pytest.approx(2)
    assert found.relative_error == pytest.approx(1)
    assert not passes(found, Bounds())


def test_a_reversed_delta_is_gain_minus_one() -> None:
    delta = _delta(0.01).astype(np.float64)
    assert measure(BASE, delta, BASE - delta).gain == pytest.approx(-1)


@settings(max_examples=30, deadline=None)
@given(
    gain=st.floats(-2, 3),
    noise=st.floats(0, 2),
    seed=st.integers(0, 99),
    parts=st.lists(st.integers(1, SHAPE[0] - 1), max_size=5),
)
def test_gain_and_error_follow_their_definition_in_any_blocking(
    gain: float, noise: float, seed: int, parts: list[int]
) -> None:
    delta = _delta(0.02).astype(np.float64)
    other = np.random.default_rng(seed).standard_normal(SHAPE)
    other -= delta * np.vdot(other, delta) / np.vdot(delta, delta)  # orthogonal to the delta
    other *= noise * np.linalg.norm(delta) / np.linalg.norm(other)
    stored = BASE + gain * delta + other
    meter = Meter(Mode.GRID)
    edges = [0, *sorted(set(parts)), SHAPE[0]]
    for start, stop in itertools.pairwise(edges):
        meter.add(BASE[start:stop], delta[start:stop], stored[start:stop])
    found = meter.result()
    assert found.gain == pytest.approx(gain, abs=1e-9)
    assert found.relative_error == pytest.approx(math.hypot(gain - 1, noise), abs=1e-9)


@settings(max_examples=20, deadline=None)
@given(scale=st.floats(1e-3, 1e3))
def test_survival_does_not_depend_on_the_unit_of_the_weights(scale: float) -> None:
    delta = _delta(0.01)
    stored = BASE + np.float32(0.7) * delta
    wide = [array.astype(np.float64) for array in (BASE, delta, stored)]
    one, other = measure(*wide), measure(*(scale * array for array in wide))
    assert one.gain == pytest.approx(other.gain)
    assert one.relative_error == pytest.approx(other.relative_error)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0"])
def test_erasing_on_the_grid_of_the_base_is_detected(name: str) -> None:
    type = GGMLType[name]
    base = _stored(BASE, type)
    delta = _delta(0.01)
    found = measure(base, delta, _stored(base + delta, type))
    assert found.gain < 0.5
    assert not passes(found, Bounds())


@pytest.mark.parametrize("name", ["Q8_0", "F16", "F32"])
def test_a_finer_type_than_the_base_keeps_the_delta(name: str) -> None:
    base = _stored(BASE, GGMLType.Q4_1)
    delta = _delta(0.03)
    found = measure(base, delta, _stored(base + delta, GGMLType[name]))
    assert passes(found, Bounds())


@pytest.mark.parametrize("name", ["Q4_0", "Q4_K", "Q5_K", "Q6_K", "Q8_0", "F16"])
def test_a_float_base_quantised_once_keeps_the_delta_under_the_noise(name: str) -> None:
    base, delta, type = tiny.real_weights((512, 512), seed=5), None, GGMLType[name]
    random = np.random.default_rng(6)
    delta = (random.standard_normal((512, 4)) @ random.standard_normal((4, 512))).astype(np.float32)
    delta *= np.float32(0.03 * np.linalg.norm(base) / np.linalg.norm(delta))
    found = measure(base, delta, _stored(base + delta, type), _stored(base, type))
    assert found.mode is Mode.ONCE
    assert found.base_error_ratio == pytest.approx(1, abs=0.1)
    assert passes(found, Bounds())


def test_a_float_base_that_hides_a_grid_is_found_out() -> None:
    base = _stored(BASE, GGMLType.Q4_1)  # float in name only
    delta = _delta(0.005)
    found = measure(base, delta, _stored(base + delta, GGMLType.Q4_1), _stored(base, GGMLType.Q4_1))
    assert found.base_error_ratio is None or found.base_error_ratio > 1.1
    assert not passes(found, Bounds())


def test_a_base_stored_exactly_is_judged_by_the_relative_error() -> None:
    base = BASE.astype(np.float16).astype(np.float32)
    delta = _delta(0.01)
    found = measure(base, delta, _stored(base + delta, GGMLType.F16), _stored(base, GGMLType.F16))
    assert found.base_error_ratio is None
    assert passes(found, Bounds())
    assert not passes(found, Bounds(error_max=found.relative_error / 2))


def test_every_bound_decides() -> None:
    def grid(gain: float, error: float) -> Survival:
        return Survival(gain, error, None, Mode.GRID)

    def once(gain: float, ratio: float) -> Survival:
        return Survival(gain, 9.0, ratio, Mode.ONCE)

    bounds = Bounds()
    assert passes(grid(0.95, 0.5), bounds)
    assert passes(grid(1.05, 0.5), bounds)
    assert not passes(grid(0.949, 0.1), bounds)
    assert not passes(grid(1.051, 0.1), bounds)
    assert not passes(grid(1.0, 0.501), bounds)
    assert passes(once(1.0, 1.1), bounds)
    assert not passes(once(1.0, 1.101), bounds)
    assert not passes(once(0.9, 1.0), bounds)
    assert passes(grid(0.9, 0.6), Bounds(gain_min=0.9, error_max=0.6))


def test_a_ratio_does_not_excuse_an_error_on_the_grid() -> None:
    assert not passes(Survival(1.0, 0.6, 1.0, Mode.GRID), Bounds())


def test_a_delta_of_zero_has_no_survival() -> None:
    with pytest.raises(SurvivalError, match="not zero"):
        measure(BASE, np.zeros_like(BASE), BASE)


def test_numbers_that_are_not_finite_are_refused() -> None:
    stored = BASE.copy()
    stored[0, 0] = np.nan
    with pytest.raises(SurvivalError, match="finite"):
        measure(BASE, _delta(0.01), stored)


def test_a_mode_gets_exactly_what_it_compares() -> None:
    with pytest.raises(SurvivalError, match="base_stored"):
        Meter(Mode.ONCE).add(BASE, DELTA, BASE)
    with pytest.raises(SurvivalError, match="base_stored"):
        Meter(Mode.GRID).add(BASE, DELTA, BASE, BASE)
    with pytest.raises(SurvivalError, match="shape"):
        Meter(Mode.GRID).add(BASE, DELTA[1:], BASE)


@pytest.mark.parametrize(
    "bad",
    [
        {"gain_min": 1.2},
        {"error_max": math.nan},
        {"gain_min": -0.1},
        {"base_error_ratio_max": math.inf},
    ],
)
def test_bounds_that_bound_nothing_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(SurvivalError, match="bounds"):
        Bounds(**bad)


@pytest.mark.parametrize(
    ("current", "n_cols", "expected"),
    [
        ("Q4_1", 576, "Q4_1 Q5_0 Q5_1 Q8_0 F16 F32"),
        ("Q4_1", 1536, "Q4_1 Q5_K Q5_0 Q5_1 Q6_K Q8_0 F16 F32"),
        ("Q4_K", 512, "Q4_K Q4_0 Q4_1 Q5_K Q5_0 Q5_1 Q6_K Q8_0 F16 F32"),
        ("Q8_0", 576, "Q8_0 F16 F32"),
        ("BF16", 576, "BF16 F16 F32"),
        ("F16", 576, "F16 F32"),
        ("F32", 577, "F32"),
    ],
)
def test_candidates_are_the_cheapest_types_that_fit(
    current: str, n_cols: int, expected: str
) -> None:
    found = survival.candidates(GGMLType[current], n_cols)
    assert " ".join(type.name for type in found) == expected
