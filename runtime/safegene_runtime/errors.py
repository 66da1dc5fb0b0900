"""Everything that can go wrong, as one small tree.

    SafeGeneError                what `safegene` prints as a message instead of a traceback
    ├── FormatError              bytes that break a file format (GGUF, safetensors, JSON)
    │   ├── ManifestError        a manifest that is malformed or does not describe its folder
    │   └── RecordError          a reference that is malformed, edited, or unfit to gate on
    ├── AdapterError             an adapter folder that contradicts itself
    ├── UnsupportedError         a feature we know by name and refuse (DoRA, MoE experts, ...)
    ├── BaseModelError           a base that is missing pieces or does not fit the adapter
    ├── GeneError                a gene that cannot be made: no discrepancy, few shots, NaN losses
    ├── SurvivalError            the safety delta would not survive in the stored weights
    ├── OutputError              an output that exists, or cannot be written
    ├── UnverifiedError          an artifact without PASS, where only a verified one may be served
    ├── EngineError              llama.cpp or ONNX Runtime refused, or did something else than asked
    ├── MissingPackageError      a package of an extra is not installed
    └── PostconditionError       what was written is not what was meant

A reader collects every problem of a file in a `Problems` list and raises once: the user fixes all of
them in one go instead of one per run. The first thousand are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

__all__ = [
    "AdapterError",
    "BaseModelError",
    "EngineError",
    "FormatError",
    "GeneError",
    "ManifestError",
    "MissingPackageError",
    "OutputError",
    "PostconditionError",
    "Problem",
    "Problems",
    "RecordError",
    "SafeGeneError",
    "SurvivalError",
    "UnsupportedError",
    "UnverifiedError",
]

MAX_PROBLEMS = 1000  # that are kept of one file: more than anyone reads
MAX_SHOWN = 5000  # characters of a part of a message; a path may have 4096


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: where, which field, what was expected, what came, what to do."""

    where: str
    field: str
    expected: str
    got: str
    fix: str = ""

    def __str__(self) -> str:
        field, expected, got = map(_printable, (self.field, self.expected, self.got))
        line = f"{_printable(self.where)}: {field}: expected {expected}, got {got}"
        return f"{line}\n    -> {_printable(self.fix)}" if self.fix else line


def _printable(text: str) -> str:
    """Escapes what could steer a terminal, and cuts: parts of a message come from hostile files."""
    if len(text) > MAX_SHOWN:
        text = text[: MAX_SHOWN - 3] + "..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class SafeGeneError(Exception):
    """Base of every error this project raises on purpose.

    Attributes:
        problems: what is wrong, in the order it was found; never empty.
    """

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


class FormatError(SafeGeneError, ValueError):
    """Bytes that break a file format."""


class ManifestError(FormatError):
    """A manifest that is malformed, or that does not describe its folder."""


class RecordError(FormatError):
    """A reference that is malformed, edited, or unfit to gate on."""


class AdapterError(SafeGeneError, ValueError):
    """An adapter folder that contradicts itself."""


class UnsupportedError(SafeGeneError, ValueError):
    """A feature we know by name and refuse."""


class BaseModelError(SafeGeneError, ValueError):
    """A base model that is missing pieces or does not fit the adapter."""


class GeneError(SafeGeneError, ValueError):
    """A gene that cannot be made from what was given."""


class SurvivalError(SafeGeneError, ValueError):
    """The safety delta would not survive in the stored weights."""


class OutputError(SafeGeneError, OSError):
    """An output that exists already, or that cannot be written."""


class UnverifiedError(SafeGeneError, RuntimeError):
    """An artifact without the verdict PASS, where only a verified one may be served."""


class EngineError(SafeGeneError, RuntimeError):
    """An engine refused, or did something else than it was asked to."""


class MissingPackageError(SafeGeneError, ImportError):
    """A package that an extra of ours brings is not installed."""


class PostconditionError(SafeGeneError, RuntimeError):
    """What was written is not what was meant."""


class Problems:
    """Collects problems so that they can be raised together, once."""

    def __init__(self) -> None:
        self._found: list[Problem] = []

    def add(self, where: str, field: str, expected: object, got: object, fix: str = "") -> None:
        """Notes one problem; `expected` and `got` are rendered with `str`."""
        if len(self._found) < MAX_PROBLEMS:
            self._found.append(Problem(where, field, str(expected), str(got), fix))

    def extend(self, problems: Iterable[Problem]) -> None:
        """Takes over the problems of an error that was caught."""
        self._found.extend(problems)

    def raise_if_any(self, error: type[SafeGeneError]) -> None:
        """Raises `error` with everything collected; does nothing when there is nothing."""
        if self._found:
            raise error(self._found)

    def __iter__(self) -> Iterator[Problem]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)
