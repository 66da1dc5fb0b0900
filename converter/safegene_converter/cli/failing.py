"""What ends a command: one message on standard error, and an exit code that is never 1, which means FAIL."""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Sequence

from safegene_converter.cli.stopping import Stopped
from safegene_runtime.errors import Problem, RecordError, SafeGeneError
from safegene_runtime.extras import missing_package
from safegene_runtime.gating.verdict import EXIT_INVALID_RECORD, EXIT_USAGE

__all__ = ["DEBUG", "explain"]

DEBUG = "--debug"
MAX_PROBLEMS = 12


def explain(error: BaseException, debug: bool) -> int:
    """Says what ended a command, after its traceback where that is asked for.

    Returns:
        the exit code: 5 for an invalid record, 128 + n for signal n, else 2.
    """
    if debug:
        traceback.print_exception(error)
    if isinstance(error, Stopped):
        with contextlib.suppress(OSError):  # a hangup may have taken the terminal
            print(f"safegene: {error}; nothing was left behind", file=sys.stderr)
        return 128 + error.number
    if isinstance(error, KeyboardInterrupt):
        print("safegene: interrupted; nothing was left behind", file=sys.stderr)
    elif not isinstance(error, BrokenPipeError):
        _print_problems(_problems_of(error))
    return EXIT_INVALID_RECORD if isinstance(error, RecordError) else EXIT_USAGE


def _problems_of(error: BaseException) -> Sequence[Problem]:
    if isinstance(error, SafeGeneError):
        return error.problems
    if (missing := missing_package(error)) is not None:
        return [missing]
    if isinstance(error, OSError | UnicodeError):
        return [_of_the_system(error)]
    got = f"{type(error).__name__}: {error}".removesuffix(": ")
    fix = f"this is a mistake of safegene: run the command again with {DEBUG} and report the traceback"
    return [Problem("safegene", "program", "an error that is foreseen, or none", got, fix)]


def _print_problems(problems: Sequence[Problem]) -> None:
    count = len(problems)
    print(f"safegene: {'error' if count == 1 else f'{count} problems'}", file=sys.stderr)
    for problem in problems[:MAX_PROBLEMS]:
        print(f"  {problem}", file=sys.stderr)
    if count > MAX_PROBLEMS:
        print(f"  ... and {count - MAX_PROBLEMS} more", file=sys.stderr)


def _of_the_system(error: OSError | UnicodeError) -> Problem:
    """What the operating system, or the encoding of a name, would not do."""
    if isinstance(error, UnicodeError):
        fix = "give files and folders names of UTF-8: manifests and reports hold them"
        return Problem("safegene", "text", "UTF-8", str(error), fix)
    names = (error.filename, error.filename2)
    place = next((name for name in names if name is not None), "safegene")
    where = os.fsdecode(place) if isinstance(place, str | bytes | os.PathLike) else str(place)
    got = error.strerror or str(error) or type(error).__name__
    return Problem(where, "file", "to be read or written", got, "check the path, rights and space")
