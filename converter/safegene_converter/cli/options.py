"""What every command of `safegene` shares: parser, progress bars, console, JSON output."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from rich.console import Console

from safegene_converter.cli.failing import DEBUG
from safegene_runtime.gating.verdict import EXIT_USAGE
from safegene_runtime.record.attacks import attack_list

if TYPE_CHECKING:  # what is imported when there is a terminal
    from rich.progress import Progress as RichProgress

    from safegene_runtime.progress import Progress

__all__ = [
    "PIPE_COLUMNS", "Bars", "Parser", "add_attacks", "add_command", "add_engine", "add_json", "add_objective",
    "add_stack", "add_verbose", "check_json", "console", "put_json",
]  # fmt: skip

PIPE_COLUMNS = 120


class Parser(argparse.ArgumentParser):
    """argparse with an example under every --help and a hint under every mistake."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Says what is wrong and where help is."""
        self.exit(EXIT_USAGE, f"{self.prog}: {message}\n    -> see `{self.prog} --help`\n")


class Bars:
    """Progress bars on standard error; none where it is not a terminal."""

    def __init__(self, quiet: bool = False) -> None:
        self._console = Console(stderr=True)
        self._progress: RichProgress | None = None
        self._tasks: dict[str, Any] = {}
        self._quiet = quiet or not self._console.is_terminal

    def __enter__(self) -> Self:
        if not self._quiet:
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._progress = Progress(
                TextColumn("{task.description:<32}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f} %"),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress:
            self._progress.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        """What every long function of the library is given as its progress."""
        if self._progress is None:
            return
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=total)
        self._progress.update(self._tasks[stage], completed=done, total=total)

    def named(self, prefix: str) -> Progress:
        """The same bars with a prefix, for several long jobs in a row."""
        return lambda stage, done, total: self(f"{prefix}: {stage}", done, total)


def console() -> Console:
    """Standard output; in a pipe there is no width to fit, so tables are not squeezed."""
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_COLUMNS)


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], int], help: str, example: str
) -> argparse.ArgumentParser:
    """Adds a command with an example under its help."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help, description=help, epilog=f"example:\n  {example}"
    )
    parser.set_defaults(run=run)
    parser.add_argument(DEBUG, action="store_true", help="show the traceback of an error")
    return parser


def add_engine(parser: argparse.ArgumentParser) -> None:
    """Adds `--engine NAME`."""
    parser.add_argument(
        "--engine",
        metavar="NAME",
        help="what runs the artifact, by name (default: its suffix decides)",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Adds `--json [FILE]`."""
    parser.add_argument(
        "--json",
        metavar="FILE",
        nargs="?",
        const="-",
        help="write the result as JSON to FILE, or to standard output without FILE",
    )


def add_verbose(parser: argparse.ArgumentParser) -> None:
    """Adds `--verbose`."""
    parser.add_argument(
        "--verbose", action="store_true", help="show what survived in every touched tensor"
    )


def add_attacks(parser: Any, what: str) -> None:
    """Adds `--attacks NAMES`."""
    parser.add_argument(
        "--attacks",
        metavar="NAMES",
        type=attack_list,
        default=[],
        help=f"{what}: all, or names with commas between them (docs/attacks.md)",
    )


def add_stack(parser: argparse.ArgumentParser, adapter: str) -> None:
    """Adds `--with ADAPTER[=WEIGHT]`, kept as `stack`."""
    parser.add_argument(
        "--with",
        dest="stack",
        action="append",
        default=[],
        type=_weighted,
        metavar="ADAPTER[=WEIGHT]",
        help=f"a task adapter beside it: base + task + {adapter}; may be given again (docs/adapters.md)",
    )


def _weighted(text: str) -> tuple[Path, float]:
    from safegene_converter.importing.stack import weighted

    return weighted(text)


def add_objective(parser: argparse.ArgumentParser) -> None:
    """Adds what `select` and `calibrate` in PyTorch share."""
    parser.add_argument("--weight", type=float, help="of the KL against safety (default: 1)")
    parser.add_argument(
        "--refusal",
        action="append",
        metavar="TEXT",
        help="how a refusal begins; may be given again (default: I'm sorry, but I can't)",
    )
    parser.add_argument(
        "--evaluation",
        type=Path,
        metavar="FILE",
        help="prompts that will be tested on, so that none is used here (default: the suite)",
    )


_APART = (
    "output", "artifact", "adapter", "gene", "path", "base", "reference", "prompts",
    "imatrix", "model", "shots", "harmful", "benign", "aligned", "degraded", "evaluation", "task",
    "check",
)  # fmt: skip
"""Arguments that name files or folders, in any command."""


def check_json(arguments: argparse.Namespace) -> None:
    """Asks whether `--json FILE` can be written, before the work whose result goes there.

    Raises:
        OutputError: it cannot, or it would be in the place of what the command reads, or inside that
            or the output: a file that a manifest does not list.
    """
    from safegene_runtime.reporting.places import check_places

    where = getattr(arguments, "json", None)
    if where in (None, "-"):
        return
    apart: list[Path] = []
    for name in _APART:
        found = getattr(arguments, name, None) or []
        apart += map(Path, found if isinstance(found, list) else [found])
    check_places({"--json": Path(where)}, apart)


def put_json(where: str | None, value: Any) -> bool:
    """Writes JSON where it was asked for; False when nothing is to be left unprinted."""
    from safegene_runtime.formats import strictjson
    from safegene_runtime.formats.publish import publish_file

    if where is None:
        return False
    if where == "-":
        sys.stdout.write(strictjson.dumps(value).decode())
        return True
    publish_file(Path(where), strictjson.dumps(value))
    return False
