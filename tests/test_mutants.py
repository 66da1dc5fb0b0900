"""The ladder tests itself: every mistake is caught, at a named rung; docs/self-test.md is its table."""

from __future__ import annotations

from pathlib import Path

import pytest
from mutants import MUTANTS, cache_filled_by, needs_wide_rows
from workshop import TARGETS, Workshop, climb, rungs_that_broke, unmutated

from safegene_runtime.gating.verdict import Verdict

WEIGHTS = ("static", "active", "logits")
RUN = ("active", "logits")
TEXT = ("text",)
CAUGHT: dict[str, tuple[str, ...]] = {
    "scale 0": WEIGHTS,
    "scale 0.5": WEIGHTS,
    "scale 2": WEIGHTS,
    "scale -1": WEIGHTS,
    "one layer dropped": WEIGHTS,
    "A and B swapped": WEIGHTS,
    "q/k rows in the other order": WEIGHTS,
    "coefficients ignored": WEIGHTS,
    "wrong template": TEXT,
    "wrong tokenizer": TEXT,
    "rounded to Q2_K": WEIGHTS,
    "base served": WEIGHTS,
    "stale KV cache": RUN,
}
"""The rungs that break, the first of them first."""
ELSEWHERE = {
    # beta is off by less than so much rounding explains
    ("gguf sidecar", "rounded to Q2_K"): ("logits",),
    # a merge that is rounded keeps its delta in the mean
    ("gguf merged", "rounded to Q2_K"): RUN,
    # the files are right, and the program does not load the adapter
    ("gguf sidecar", "base served"): RUN,
    ("onnx adapter", "base served"): RUN,
}


TELLING = ("scale -1", "one layer dropped", "q/k rows in the other order", "base served",
           "stale KV cache")  # fmt: skip


def quick(mutant: str, target: str) -> bool:
    """What `make test-fast` runs: all for the merged forms, and one of each kind for the others."""
    return target.endswith("merged") or mutant in TELLING


@pytest.fixture(scope="module")
def shops(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Workshop]:
    """By the number of columns; what takes long is made when it is first asked for."""
    folder = tmp_path_factory.mktemp("mutants")
    return {64: Workshop(folder / "64"), 256: Workshop(folder / "256", hidden=256)}


def test_every_mutant_is_expected_somewhere() -> None:
    assert CAUGHT.keys() == MUTANTS.keys()


@pytest.mark.parametrize(
    ("target", "hidden"),
    [
        *((target, 64) for target in TARGETS),
        ("gguf merged", 256),
        pytest.param("gguf sidecar", 256, marks=pytest.mark.slow),
    ],
)
def test_without_a_mistake_every_rung_below_the_refusals_holds(
    target: str, hidden: int, shops: dict[int, Workshop], tmp_path: Path
) -> None:
    shop = shops[hidden]
    report = climb(unmutated(shop, target, tmp_path / "artifact"), shop.reference)
    assert [(rung.name, rung.status) for rung in report.rungs[:-1]] == [
        (name, "ok") for name in ("integrity", "static", "text", "active", "logits")
    ]
    # a random model refuses nothing, and the gate says so
    assert (report.verdict, report.broken_at) == (Verdict.VACUOUS, None)


@pytest.mark.parametrize("target", TARGETS)
def test_a_cache_that_the_artifact_filled_itself_is_not_stale(
    target: str, shops: dict[int, Workshop], tmp_path: Path
) -> None:
    """What is caught is the state of the adapter, not how the cache came to be there."""
    report = climb(
        cache_filled_by(None, shops[64], target, tmp_path / "artifact"), shops[64].reference
    )
    assert rungs_that_broke(report) == ()
    assert abs(report.figures["mean_kl"]) <= 1e-8


@pytest.mark.parametrize(
    ("mutant", "target"),
    [
        pytest.param(mutant, target, marks=() if quick(mutant, target) else pytest.mark.slow)
        for mutant in MUTANTS
        for target in TARGETS
    ],
)
def test_every_mistake_is_caught_at_a_named_rung(
    mutant: str, target: str, shops: dict[int, Workshop], tmp_path: Path
) -> None:
    shop = shops[256 if needs_wide_rows(mutant, target) else 64]
    report = climb(MUTANTS[mutant](shop, target, tmp_path / "artifact"), shop.reference)
    expected = ELSEWHERE.get((target, mutant), CAUGHT[mutant])
    assert report.verdict is Verdict.FAIL
    assert report.broken_at == expected[0]
    assert rungs_that_broke(report) == expected
