"""The `safegene` command: parses, calls the library, prints. Nothing is decided here.

Exit codes: 0 done, or PASS; 1 FAIL; 2 could not be done or checked (one message says why); 3
INCONCLUSIVE; 4 VACUOUS; 5 an invalid record; 128 + n stopped by signal n. Nothing but 0 is green.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from safegene_converter.cli.failing import DEBUG, explain
from safegene_converter.cli.stopping import Stopped, stoppable

if TYPE_CHECKING:
    from safegene_converter.cli.options import Parser

__all__ = ["main", "parser"]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    debug = DEBUG in (sys.argv if argv is None else argv)
    try:
        with stoppable():
            return _run(argv)
    except (Exception, KeyboardInterrupt, Stopped) as error:
        return explain(error, debug)


def _run(argv: Sequence[str] | None) -> int:
    # imported here, so that an installation that is broken ends like every other error
    from safegene_converter.cli.options import check_json
    from safegene_runtime.cpus import spin_briefly

    arguments = parser().parse_args(argv)
    spin_briefly()
    check_json(arguments)
    code: int = arguments.run(arguments)
    return code


def parser() -> Parser:
    """The whole command line."""
    from safegene_converter.cli import (
        calibrate,
        convert,
        demo,
        evaluate,
        extract,
        import_,
        inspect,
        record,
        run,
        select,
        verify,
    )
    from safegene_converter.cli.options import Parser
    from safegene_runtime import __version__

    whole = Parser(
        prog="safegene",
        description="Ship a SafeGene safety adapter inside a GGUF or ONNX model, and prove that it still "
        "refuses.",
        epilog="example:\n  safegene demo\n  safegene convert ADAPTER --base model.gguf -o OUT\n"
        "  safegene verify OUT --reference REFERENCE",
    )
    whole.add_argument("--version", action="version", version=f"safegene {__version__}")
    commands = whole.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for command in (
        inspect, import_, convert, record, verify, demo, extract, select, calibrate, evaluate, run,
    ):  # fmt: skip
        command.add(commands)
    return whole


if __name__ == "__main__":
    sys.exit(main())
