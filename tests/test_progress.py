"""One way to tell how far a long function is."""

from __future__ import annotations

from safegene_runtime.progress import counted


def test_steps_are_added_up_and_never_pass_the_total() -> None:
    told: list[tuple[str, int, int]] = []
    step = counted(lambda *what: told.append(what), "writing", 10)
    for count in (4, 5, 6):
        step(count)
    assert told == [("writing", 4, 10), ("writing", 9, 10), ("writing", 10, 10)]
