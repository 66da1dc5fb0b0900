"""Divergences of greedy replies, on logits made for the purpose."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import records

from safegene_runtime.record.reference import Reference
from safegene_runtime.verifying.divergence import GAP_NOISE, first_divergence

GAP = 0.25
REPLY = (4, 5, 0)


@pytest.fixture
def record(tmp_path: Path) -> Reference:
    one = records.prompt("a", REPLY, [9, 0])
    ref, base = records.logits_for(one, 30, 1)
    ref[:, 10:] = -20  # not stored: neither arm finds them likely
    base[:, 10:] = -20
    ref[1, :] = np.where(np.arange(30) < 10, -8.0, -20)
    ref[1, 5], ref[1, 6], ref[1, 7] = 2.0, 2.0 - GAP, -4.0
    base[1, 5:8] = 3.0  # stored
    return records.write(tmp_path / "r", [one], [(ref, base)])


def test_equal_replies_do_not_diverge(record: Reference) -> None:
    assert first_divergence(record, 0, REPLY, "f32") is None


@pytest.mark.parametrize("precision", [*GAP_NOISE, "who knows"])
def test_the_runner_up_is_a_tie_where_the_gap_is_below_the_noise(
    record: Reference, precision: str
) -> None:
    found = first_divergence(record, 0, (4, 6, 1), precision)
    assert found is not None
    assert (found.position, found.reference, found.artifact) == (1, 5, 6)
    assert found.gap == pytest.approx(GAP)
    tie = precision in ("8-bit", "6-bit", "5-bit", "4-bit", "low-bit")
    assert found.kind == ("tie" if tie else "unexplained")


def test_a_third_token_far_below_is_no_tie(record: Reference) -> None:
    found = first_divergence(record, 0, (4, 7, 0), "4-bit")
    assert found is not None
    assert found.gap == pytest.approx(6.0)
    assert found.kind == "unexplained"


def test_a_token_that_is_not_stored_is_unexplained(record: Reference) -> None:
    found = first_divergence(record, 0, (4, 25, 0), "4-bit", noise=1e9)
    assert found is not None
    assert found.kind == "unexplained"
    assert found.gap is not None
    assert 0 <= found.gap <= 22


@pytest.mark.parametrize("reply", [(4, 5), (4,), (), (*REPLY, 3)])
def test_a_reply_that_ends_elsewhere_is_unexplained(
    record: Reference, reply: tuple[int, ...]
) -> None:
    found = first_divergence(record, 0, reply, "4-bit")
    assert found is not None
    assert found.position == min(len(reply), len(REPLY))
    assert (found.kind, found.gap) == ("unexplained", None)


def test_a_measured_noise_replaces_the_table(record: Reference) -> None:
    kinds = [first_divergence(record, 0, (4, 6), "f32", noise) for noise in (0.2, 0.3)]
    assert [one and one.kind for one in kinds] == ["unexplained", "tie"]
