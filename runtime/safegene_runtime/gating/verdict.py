"""The four verdicts of a gate, and what a process exits with.

    0 PASS           parity is shown, within the profile's margins
    1 FAIL           it is shown that the artifact differs by more than they allow
    2                usage or I/O: nothing was gated
    3 INCONCLUSIVE   neither is shown
    4 VACUOUS        the record cannot tell the artifact from its base
    5                the record is malformed, edited, or of another adapter, expression or judge

Nothing but PASS is green.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum

__all__ = ["EXIT_INVALID_RECORD", "EXIT_USAGE", "Verdict", "gravest"]

EXIT_USAGE = 2
EXIT_INVALID_RECORD = 5


class Verdict(StrEnum):
    """What a gate says."""

    PASS = "PASS"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"
    VACUOUS = "VACUOUS"

    @property
    def exit_code(self) -> int:
        """What `safegene verify` exits with."""
        return _EXIT_CODES[self]


_EXIT_CODES = {
    Verdict.PASS: 0,
    Verdict.FAIL: 1,
    Verdict.INCONCLUSIVE: 3,
    Verdict.VACUOUS: 4,
}
_GRAVEST_FIRST = (Verdict.FAIL, Verdict.VACUOUS, Verdict.INCONCLUSIVE, Verdict.PASS)


def gravest(verdicts: Iterable[Verdict]) -> Verdict:
    """One verdict for several gates, all of which must pass; needs no correction of confidence.

    Passing an intersection of gates, each at level alpha, errs at most at level alpha
    (intersection-union test, Berger 1982).

    Raises:
        ValueError: there is none, and nothing checked is not passed.
    """
    found = set(verdicts)
    if not found:
        raise ValueError("no verdict to combine: nothing was gated")
    return next(verdict for verdict in _GRAVEST_FIRST if verdict in found)
