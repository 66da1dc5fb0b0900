"""Margins: equal to what full logits say, from stored ones and from an engine's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import records
from scipy import special, stats

from safegene_runtime.record.reference import Reference
from safegene_runtime.verifying.forced import forced_passes, kl_by_position
from safegene_runtime.verifying.margins import (
    arm_margins,
    learn_margins,
    margin_of,
    summarise_margins,
)

VOCABULARY = 40
APART = [
    records.prompt("a", [5, 9, 0], [20, 3, 0]),
    records.prompt("b", [6, 9, 0], [21, 3, 0]),
    records.prompt("c", [22, 9, 0], [23, 3, 0], ("comply", "comply")),
    records.prompt("d", [5, 7, 0], [5, 3, 0], ("refuse", "refuse")),
]
ALIKE = [
    records.prompt("a", [5, 9, 0], [5, 3, 0]),
    records.prompt("b", [5, 9, 4, 0], [5, 9, 8, 0]),
    records.prompt("c", [5, 9, 0], [5, 3, 0], ("comply", "comply")),
    records.prompt("d", [5, 9, 1, 1, 1, 2, 0], [5, 9, 1, 1, 1, 3, 0]),
    records.prompt("e", [5, 3, 0], [5, 9, 0], ("comply", "refuse")),
]

Logits = list[tuple[np.ndarray, np.ndarray]]


def made(folder: Path, prompts: Sequence) -> tuple[Reference, Logits]:  # type: ignore[type-arg]
    logits = [records.logits_for(one, VOCABULARY, seed) for seed, one in enumerate(prompts)]
    return records.write(folder, prompts, logits), logits


def test_first_token_margins_are_the_log_odds_of_full_logits(tmp_path: Path) -> None:
    record, logits = made(tmp_path, APART)
    rule = learn_margins(record)
    assert (rule.form, rule.refuse, rule.comply, rule.shared) == (
        "first-token", (5, 6), (20, 21, 22, 23), (),
    )  # fmt: skip
    for arm, name in enumerate(("ref", "base")):
        p = [special.softmax(pair[arm][0].astype(np.float64)) for pair in logits]
        wanted = [np.log(one[[5, 6]].sum()) - np.log(one[[20, 21, 22, 23]].sum()) for one in p]
        assert arm_margins(record, rule, name) == pytest.approx(wanted, abs=1e-9)  # type: ignore[arg-type]
        again = [
            margin_of(rule, *both) for both in zip(APART, [x[arm] for x in logits], strict=True)
        ]
        assert again == pytest.approx(wanted, abs=1e-9)


def test_openers_of_both_kinds_count_for_neither(tmp_path: Path) -> None:
    mixed = [*APART, records.prompt("e", [5, 1, 0], [5, 2, 0])]
    record, _ = made(tmp_path, mixed)
    rule = learn_margins(record)
    assert rule.shared == (5,)
    assert 5 not in {*rule.refuse, *rule.comply}


def test_where_replies_begin_alike_the_branch_is_measured(tmp_path: Path) -> None:
    record, logits = made(tmp_path, ALIKE)
    rule = learn_margins(record)
    assert rule.form == "branch"
    branches = [(1, 9, 3), (2, 4, 8), None, None, (1, 9, 3)]  # d parts too late to tell
    for arm, name in enumerate(("ref", "base")):
        found = arm_margins(record, rule, name)  # type: ignore[arg-type]
        for index, branch in enumerate(branches):
            ours = margin_of(rule, ALIKE[index], logits[index][arm])
            if branch is None:
                assert found[index] is None
                assert ours is None
                continue
            at, refuse, comply = branch
            p = special.log_softmax(logits[index][arm][at].astype(np.float64))
            assert found[index] == pytest.approx(p[refuse] - p[comply], abs=1e-9)
            assert ours == pytest.approx(p[refuse] - p[comply], abs=1e-9)
    assert arm_margins(record, rule, "ref")[0] > 0 > arm_margins(record, rule, "base")[0]  # type: ignore[operator]


class Replay:
    """Answers with given logits."""

    name = "replay"

    def __init__(self, logits: list[np.ndarray]) -> None:
        self.rows = logits
        self.n_vocab = logits[0].shape[1]

    def logits(
        self, sequences: Sequence[Sequence[int]], keep: Sequence[int]
    ) -> Iterator[tuple[int, np.ndarray]]:
        yield from reversed(list(enumerate(self.rows)))


@pytest.mark.parametrize("prompts", [APART, ALIKE], ids=["first-token", "branch"])
def test_the_forced_pass_gives_the_margins_of_its_engine(tmp_path: Path, prompts: Sequence) -> None:  # type: ignore[type-arg]
    record, logits = made(tmp_path, prompts)
    rule = learn_margins(record)
    for arm, name in enumerate(("ref", "base")):
        passes = forced_passes(Replay([pair[arm] for pair in logits]), record)  # type: ignore[arg-type]
        assert [one.margin for one in passes] == arm_margins(record, rule, name)  # type: ignore[arg-type]


def test_kl_by_position_is_the_mean_over_replies_that_are_so_long(tmp_path: Path) -> None:
    record, logits = made(tmp_path, ALIKE)
    passes = forced_passes(Replay([base for _, base in logits]), record)  # type: ignore[arg-type]
    found = kl_by_position(passes)
    assert len(found) == 7
    assert found[1] == pytest.approx(np.mean([one.kl[1] for one in passes]))
    assert found[6] == pytest.approx(passes[3].kl[6])
    assert kl_by_position([]) == []


def test_the_summary_is_a_paired_t_interval() -> None:
    random = np.random.default_rng(3)
    ref, base = random.normal(4, 1, 50), random.normal(-4, 1, 50)
    art = ref + random.normal(0.1, 0.2, 50)
    found = summarise_margins([None, *ref], [1.0, *art], [1.0, *base], "4-bit")
    wanted = stats.ttest_rel(art, ref)
    assert found.count == 50
    assert found.mean_shift == pytest.approx((art - ref).mean())
    assert found.interval == pytest.approx(tuple(wanted.confidence_interval(0.95)))
    assert found.base_shift == pytest.approx((base - ref).mean())


def test_a_sign_flip_counts_only_beyond_noise() -> None:
    found = summarise_margins([5.0, 0.5, -5.0, 5.0], [-1.0, -0.5, 1.0, 4.0], [0.0] * 4, "8-bit")
    assert found.flips == (0, 2)
    assert summarise_margins([0.5], [-0.5], [0.0], "f32").flips == (0,)
    assert summarise_margins([0.5], [-0.5], [0.0], "who knows").flips == (0,)


def test_without_margins_nothing_is_claimed() -> None:
    found = summarise_margins([None], [None], [None], "f32").to_dict()
    assert found["count"] == 0
    assert found["mean_shift"] is None
    assert summarise_margins([1.0], [1.0], [0.0], "f32").interval is None
