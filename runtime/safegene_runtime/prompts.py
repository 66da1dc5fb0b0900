"""Prompts to gate on: our own suite, or the user's file.

The suite asks for things a safe model declines (one sentence each, no instructions inside), spread
over the hazard categories of MLCommons AILuminate v1.0 that are not sexual, and for ordinary
things; half of the ordinary ones are borderline: they look harmful and are not. Written for this
project.
"""

from __future__ import annotations

import csv
import functools
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from safegene_runtime import strictjson
from safegene_runtime.errors import FormatError, Problem, Problems
from safegene_runtime.files import read_small_file, sha256_of

__all__ = ["HAZARDS", "Prompt", "builtin_suite", "load_prompts", "suite_digest"]

HAZARDS = (
    "violent_crimes",
    "nonviolent_crimes",
    "indiscriminate_weapons",
    "suicide_self_harm",
    "hate",
    "privacy",
    "defamation",
    "intellectual_property",
    "specialized_advice",
)
"""Hazard categories of the suite (MLCommons AILuminate v1.0, without the sexual ones)."""

MAX_FILE_BYTES = 16 << 20
MAX_TEXT_CHARACTERS = 16_000
KINDS = ("harmful", "benign")

_COLUMNS = ("id", "text", "prompt", "kind", "category", "borderline")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}")
_HELP = 'each row needs "text" (or "prompt"); id, kind, category and borderline are optional'


@dataclass(frozen=True)
class Prompt:
    """One user message; `borderline` is for benign ones that look harmful."""

    id: str
    text: str
    kind: Literal["harmful", "benign"]
    category: str
    borderline: bool = False


@functools.cache
def builtin_suite() -> tuple[Prompt, ...]:
    """Our own suite, harmful prompts first."""
    folder = resources.files("safegene_runtime") / "suite"
    rows = []
    for name in ("harmful.jsonl", "benign.jsonl"):
        rows += list(_jsonl_rows((folder / name).read_bytes(), name, Problems()))
    return _prompts(rows, "suite")


def suite_digest() -> str:
    """SHA-256 over the content of the suite."""
    return sha256_of(strictjson.dumps([asdict(prompt) for prompt in builtin_suite()]))


def load_prompts(path: Path) -> tuple[Prompt, ...]:
    """Reads prompts from a JSONL file, or a CSV file with a header.

    Columns: `text` (or `prompt`), and optionally `id` (default: the line), `kind` (`harmful`, the
    default, or `benign`), `category`, `borderline` (`true` or `false`).

    Raises:
        FormatError: everything that is wrong with the file, with line numbers.
    """
    path = Path(path)
    data = read_small_file(path, MAX_FILE_BYTES)
    if data.startswith(b"version https://git-lfs"):
        raise FormatError(
            Problem(str(path), "content", "prompts", "a git-lfs pointer", "run `git lfs pull`")
        )
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows}
    if path.suffix.lower() not in readers:
        raise FormatError(
            Problem(str(path), "name", "a .jsonl or .csv file", path.suffix or "no suffix",
                    "rename it, or export the prompts as JSONL")
        )  # fmt: skip
    problems = Problems()
    rows = list(readers[path.suffix.lower()](data, str(path), problems))
    problems.raise_if_any(FormatError)
    return _prompts(rows, str(path))


def _jsonl_rows(
    data: bytes, where: str, problems: Problems
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = strictjson.loads(line, f"{where}:{number}")
        except FormatError as error:
            problems.extend(error.problems)
            continue
        if isinstance(row, dict):
            yield number, row
        else:
            problems.add(f"{where}:{number}", "value", "a JSON object", type(row).__name__, _HELP)


def _csv_rows(
    data: bytes, where: str, problems: Problems
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        text = data.decode("utf-8-sig")
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = [name.strip().lower() for name in next(reader, [])]
        if not {"text", "prompt"} & set(header) or len(set(header)) != len(header):
            problems.add(f"{where}:1", "header", "a header row with a column named text or prompt",
                         ", ".join(header)[:100] or "nothing", _HELP)  # fmt: skip
            return
        for cells in reader:
            if not any(cells):
                continue
            if len(cells) != len(header):
                problems.add(f"{where}:{reader.line_num}", "columns", len(header), len(cells),
                             "quote texts that hold commas")  # fmt: skip
                continue
            row = {name: cell for name, cell in zip(header, cells, strict=True) if cell}
            if "borderline" in row:
                spelled = {"true": True, "false": False, "1": True, "0": False}
                row["borderline"] = spelled.get(row["borderline"].lower(), row["borderline"])  # type: ignore[assignment]
            yield reader.line_num, row
    except (UnicodeDecodeError, csv.Error) as error:
        problems.add(where, "content", "CSV in UTF-8", str(error), "export it as UTF-8 CSV")


def _prompts(rows: list[tuple[int, Mapping[str, Any]]], where: str) -> tuple[Prompt, ...]:
    problems = Problems()
    found = []
    for number, row in rows:
        prompt = _prompt(row, f"{where}:{number}", f"line-{number}", problems)
        if prompt is not None:
            found.append(prompt)
    for name in ("id", "text"):
        seen: set[str] = set()
        for prompt in found:
            value = getattr(prompt, name)
            if value in seen:
                problems.add(where, name, f"each {name} once", value[:80], "remove one of the two")
            seen.add(value)
    if not rows:
        problems.add(where, "prompts", "at least one", "none", _HELP)
    problems.raise_if_any(FormatError)
    return tuple(found)


def _prompt(
    row: Mapping[str, Any], where: str, default_id: str, problems: Problems
) -> Prompt | None:
    before = len(problems)
    for key in sorted(row.keys() - set(_COLUMNS)):
        problems.add(where, key, f"one of {', '.join(_COLUMNS)}", "an unknown column", "remove it")
    if "text" in row and "prompt" in row:
        problems.add(where, "prompt", "text or prompt", "both", "remove one of the two")
    text = row.get("text", row.get("prompt"))
    if not isinstance(text, str) or not text.strip():
        problems.add(where, "text", "a request", repr(text)[:80], _HELP)
    elif len(text) > MAX_TEXT_CHARACTERS or _CONTROL.search(text):
        got = f"{len(text)} characters" if not _CONTROL.search(text) else "control characters"
        problems.add(where, "text", f"at most {MAX_TEXT_CHARACTERS} printable characters", got)
    kind = row.get("kind", "harmful")
    if kind not in KINDS:
        problems.add(where, "kind", " or ".join(KINDS), repr(kind)[:80])
    identity = row.get("id", default_id)
    if not isinstance(identity, str) or not _ID.fullmatch(identity):
        problems.add(where, "id", "letters, digits and . _ : / -", repr(identity)[:80])
    category = row.get("category", "uncategorised")
    if not isinstance(category, str) or not category.strip() or _CONTROL.search(category):
        problems.add(where, "category", "a name", repr(category)[:80])
    borderline = row.get("borderline", False)
    if type(borderline) is not bool or (borderline and kind == "harmful"):
        problems.add(where, "borderline", "true or false, true only for benign prompts",
                     repr(borderline)[:80])  # fmt: skip
    if len(problems) > before:
        return None
    return Prompt(identity, text, kind, category, borderline)  # type: ignore[arg-type]
