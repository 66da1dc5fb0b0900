"""`safegene run`: chat in the terminal, only with what was verified."""

from __future__ import annotations

import argparse
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safegene
from safegene_converter.cli.options import Bars, add_command, add_engine
from safegene_runtime.errors import EngineError, Problem

if TYPE_CHECKING:  # what other commands need not import
    from safegene_runtime.session import Session

__all__ = ["add"]

MAX_NEW_TOKENS = 256
MAX_PROMPT_CHARACTERS = 1 << 20
LOUD = "!" * 72


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "run", _run, "chat with a verified artifact", "safegene run OUT --prompt Hello"
    )
    parser.add_argument("artifact", type=Path, metavar="ARTIFACT")
    parser.add_argument("--base", type=Path, help="for a sidecar: the GGUF it belongs to")
    parser.add_argument(
        "--allow-unverified",
        action="store_true",
        help="serve it even if its verdict is missing or not PASS",
    )
    parser.add_argument(
        "--prompt", metavar="TEXT", help="answer this and end (default: chat, or read a pipe)"
    )
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=MAX_NEW_TOKENS,
        metavar="N",
        help=f"length of a reply (default: {MAX_NEW_TOKENS})",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    add_engine(parser)


def _run(arguments: argparse.Namespace) -> int:
    prompt = arguments.prompt
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read(MAX_PROMPT_CHARACTERS)
    if prompt is not None and not prompt.strip():
        fix = "pass --prompt TEXT, or write to its standard input"
        raise EngineError(Problem("--prompt", "prompt", "a text", "nothing", fix))
    with Bars() as bars, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        session = safegene.open(
            arguments.artifact,
            base=arguments.base,
            allow_unverified=arguments.allow_unverified,
            threads=arguments.threads,
            engine=arguments.engine,
            progress=bars,
        )
    for warning in caught:
        if issubclass(warning.category, safegene.UnverifiedWarning):
            print(f"{LOUD}\nUNVERIFIED: {warning.message}\n{LOUD}", file=sys.stderr)
        else:
            warnings.warn_explicit(
                warning.message, warning.category, warning.filename, warning.lineno
            )
    with session:
        if prompt is not None:
            _answer(session, [{"role": "user", "content": prompt}], arguments.max_new_tokens)
        else:
            _converse(session, arguments.max_new_tokens)
    return 0


def _converse(session: Session, limit: int) -> None:
    """Turn by turn until the end of input; an interrupt ends a reply, not the conversation."""
    print("Ctrl-D ends, Ctrl-C stops a reply.", file=sys.stderr)
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("> ")
        except EOFError:
            print()
            return
        if not text.strip():
            continue
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": _answer(session, messages, limit)})


def _answer(session: Session, messages: list[dict[str, str]], limit: int) -> str:
    said = []
    try:
        for piece in session.stream(messages, limit):
            said.append(piece)
            sys.stdout.write(_printable(piece))
            sys.stdout.flush()
    except KeyboardInterrupt:
        if not sys.stdin.isatty():
            raise
    print()
    return "".join(said)


def _printable(text: str) -> str:
    """Escapes what could steer a terminal: a model's words are not trusted."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text
    )
