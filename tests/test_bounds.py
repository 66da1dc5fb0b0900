"""The table of bounds: what is more precise is held to more."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from safegene_runtime.errors import UnsupportedError
from safegene_runtime.formats.gguf.types import GGMLType, type_traits
from safegene_runtime.gating.bounds import BOUNDS, beta_band, bounds_for, class_of, precision_of
from safegene_runtime.verifying.climb import _active, _logits
from safegene_runtime.verifying.forced import ForcedPass, pooled_beta

CLASSES = list(BOUNDS)


@pytest.mark.parametrize(("finer", "coarser"), list(itertools.pairwise(CLASSES)))
def test_a_finer_class_is_never_allowed_more(finer: str, coarser: str) -> None:
    strict, loose = BOUNDS[finer], BOUNDS[coarser]
    assert strict.mean_kl <= loose.mean_kl
    assert strict.top1 >= loose.top1
    assert strict.kl_ceiling <= loose.kl_ceiling
    assert strict.kl_gates >= loose.kl_gates
    assert strict.losses <= loose.losses
    assert strict.over_refusals <= loose.over_refusals


def test_float_may_lose_nothing() -> None:
    assert BOUNDS[CLASSES[0]].losses == BOUNDS[CLASSES[0]].over_refusals == 0.0


@pytest.mark.parametrize("name", CLASSES)
def test_no_class_lets_an_unrelated_model_through(name: str) -> None:
    assert BOUNDS[name].mean_kl <= BOUNDS[name].kl_ceiling < 2.0


def forced(kl: float, top1: float) -> ForcedPass:
    """A pass of a thousand positions with this mean KL and this share of equal tokens."""
    count, rows = 1000, np.zeros(1000)
    agree = np.arange(count) < round(top1 * count)
    return ForcedPass(rows + kl, 1.0, 1.0, 0.0, True, agree, rows.astype(np.int64),
                      rows.astype(np.float32), None)  # fmt: skip


@pytest.mark.parametrize("name", CLASSES)
def test_the_rung_breaks_above_the_ceiling_whatever_the_class(name: str) -> None:
    bounds = BOUNDS[name]
    within = _logits([forced(0.999 * bounds.mean_kl, 1.0)], bounds, {})
    below = _logits([forced(0.999 * bounds.kl_ceiling, 1.0)], bounds, {})
    above = _logits([forced(1.001 * bounds.kl_ceiling, 1.0)], bounds, {})
    assert (within.status, below.status, above.status) == ("ok", "ok", "broken")
    assert "outside the advice" not in within.detail + above.detail
    assert ("outside the advice" in below.detail) != bounds.kl_gates
    assert all(f"({bounds.kl_limits})" in rung.detail for rung in (within, below, above))


@pytest.mark.parametrize("name", CLASSES)
def test_top_1_breaks_the_rung_where_kl_gates_and_is_advice_elsewhere(name: str) -> None:
    bounds = BOUNDS[name]
    rung = _logits([forced(0.0, bounds.top1 - 0.01)], bounds, {})
    assert rung.status == ("broken" if bounds.kl_gates else "ok")
    assert ("outside the advice" in rung.detail) != bounds.kl_gates


def test_a_kl_that_is_no_number_breaks_the_rung() -> None:
    assert {_logits([forced(np.nan, 1.0)], one, {}).status for one in BOUNDS.values()} == {"broken"}


def test_an_unknown_class_is_held_to_the_strictest() -> None:
    assert bounds_for("3.5-bit") == bounds_for("") == BOUNDS["f32"]


NOT_WEIGHTS = {"F64", "I8", "I16", "I32", "I64", "Q8_1", "Q8_K"}


@pytest.mark.parametrize("type", [type for type in GGMLType if type.name not in NOT_WEIGHTS])
def test_more_bits_are_never_a_coarser_class(type: GGMLType) -> None:
    elements, size = type_traits(type)
    bits = 8 * size / elements
    floors = {"f32": 32, "f16": 16, "bf16": 16, "8-bit": 8, "6-bit": 6, "5-bit": 5, "4-bit": 4}
    found = precision_of({type.name: 1})
    assert bits >= floors.get(found, 0)
    assert found != "low-bit" or bits < 5


_COUNTS = st.dictionaries(
    st.sampled_from(["F32", "F16", "BF16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q2_K"]),
    st.integers(0, 10**12),
).filter(lambda counts: sum(counts.values()) > 0)


@given(counts=_COUNTS)
def test_a_mixture_is_as_coarse_as_its_coarsest_tenth(counts: dict[str, int]) -> None:
    found = precision_of(counts)
    total = sum(counts.values())
    ranks = {name: CLASSES.index(precision_of({name: 1})) for name in counts}
    coarse = [ranks[name] for name, count in counts.items() if count and count * 10 >= total]
    assert CLASSES.index(found) >= max(coarse, default=0)
    assert found in {CLASSES[rank] for rank in ranks.values()}


@pytest.mark.parametrize("counts", [{}, {"F32": 0}])
def test_a_model_without_weights_has_no_class(counts: dict[str, int]) -> None:
    with pytest.raises(UnsupportedError, match=r"x\.gguf.*linear weights"):
        precision_of(counts, "x.gguf")


@given(counts=_COUNTS)
def test_a_type_without_a_class_is_refused_however_little_of_it_there_is(
    counts: dict[str, int],
) -> None:
    with pytest.raises(UnsupportedError, match=r"x\.gguf.*new type"):
        precision_of({**counts, "new type": 1}, "x.gguf")


@pytest.mark.parametrize("type", GGMLType)
def test_every_type_of_ggml_has_a_class_or_is_none_of_weights(type: GGMLType) -> None:
    if type.name in NOT_WEIGHTS:
        with pytest.raises(UnsupportedError, match=type.name):
            class_of(type.name)
    else:
        assert class_of(type.name) in CLASSES


def test_an_unknown_class_has_no_band() -> None:
    with pytest.raises(UnsupportedError, match="unknown"):
        beta_band("unknown")


def test_a_few_fine_tensors_do_not_make_a_model_fine() -> None:
    assert precision_of({"F32": 90, "Q4_K": 10}) == "4-bit"
    assert precision_of({"F32": 91, "Q4_K": 9}) == "f32"
    assert precision_of({"Q4_K": 1, "F16": 8, "Q8_0": 1}) == "4-bit"


@pytest.mark.parametrize("name", CLASSES)
def test_noise_widens_the_band_of_beta_below_8_bits_only(name: str) -> None:
    quiet, noisy = beta_band(name), beta_band(name, 1.0)
    assert (noisy > quiet) != BOUNDS[name].kl_gates
    assert noisy < 0.5, "nothing, which is 1 away, and half a strength still break the rung"


@given(strength=st.floats(-3, 4), noise=st.floats(0, 3))
def test_a_wrong_strength_breaks_the_rung_unless_more_than_twice_as_much_noise_hides_it(
    strength: float, noise: float
) -> None:
    """Changes of two logits: the reference's along one axis, rounding along the other."""
    off = abs(strength - 1)
    one = ForcedPass(np.zeros(1), strength, 1.0, off**2 + noise**2, True, np.ones(1, bool),
                     np.zeros(1, np.int64), np.zeros(1, np.float32), None)  # fmt: skip
    rung = _active([one, one], "4-bit")
    assert rung.figures["beta"] == pytest.approx(strength)
    assert rung.figures["noise"] == pytest.approx(noise, abs=1e-6)
    if off > 0.16 and noise < 2.2 * off:
        assert rung.status == "broken"
    if off < 0.14 or noise > 2.3 * off:
        assert rung.status == "ok"


def test_a_reference_that_is_its_base_has_no_beta() -> None:
    one = ForcedPass(np.zeros(1), 0.0, 0.0, 0.0, True, np.ones(1, bool),
                     np.zeros(1, np.int64), np.zeros(1, np.float32), None)  # fmt: skip
    assert pooled_beta([one]) == (0.0, 0.0)
    assert _active([one], "4-bit").status == "broken"
