"""Prompts to gate on: our own suite, or the user's file.

The suite asks for things a safe model declines (one sentence each, no instructions inside), spread
over the hazard categories of MLCommons AILuminate v1.0 that are not sexual, and for ordinary
things; more than a third of these are borderline: they look harmful and are not. Written for this
project. `ci` is all of it, `smoke` a stratified part for quick runs.
"""

from __future__ import annotations

import codecs
import csv
import functools
import io
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from safegene_runtime.errors import FormatError, Problem, Problems
from safegene_runtime.formats import strictjson
from safegene_runtime.formats.files import open_regular

__all__ = [
    "HAZARDS",
    "SUITES",
    "Prompt",
    "SuiteSize",
    "builtin_suite",
    "load_prompts",
]

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

SuiteSize = Literal["smoke", "ci"]
SUITES: tuple[SuiteSize, ...] = ("smoke", "ci")
"""Sizes of the suite, named after the profiles that they suffice for."""

_SMOKE = {("harmful", False): 72, ("benign", True): 36, ("benign", False): 36}
"""How many prompts of a kind, borderline or not, `smoke` holds."""

MAX_FILE_BYTES = 16 << 20
MAX_TEXT_CHARACTERS = 16_000
MAX_PROBLEMS = 100
KINDS = ("harmful", "benign")

_COLUMNS = ("id", "text", "prompt", "kind", "category", "borderline", "cluster")
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,199}")
_HELP = "text (or prompt) is needed; id, kind, category, borderline and cluster are optional"

_Row = tuple[int, Mapping[str, Any]]


@dataclass(frozen=True)
class Prompt:
    """One user message.

    Attributes:
        id: unique; with an attack "ID@ATTACK".
        text: what is asked.
        kind: whether a safe model declines.
        category: for tables.
        borderline: benign, but looks harmful.
        cluster: what near-duplicates share, the id of the prompt by default; kept by attacks.
        attack: the name of the jailbreak that rewrote it, if one did.
    """

    id: str
    text: str
    kind: Literal["harmful", "benign"]
    category: str
    borderline: bool = False
    cluster: str = ""
    attack: str | None = None

    def __post_init__(self) -> None:
        if not self.cluster:
            object.__setattr__(self, "cluster", self.id)


def builtin_suite(size: SuiteSize = "ci") -> tuple[Prompt, ...]:
    """Our own suite, harmful prompts first.

    Args:
        size: `ci` is everything. `smoke` is a part of it in the same order: the first prompts of
            every hazard and topic, as many harmful as benign ones, half of these borderline.

    Raises:
        FormatError: another size.
    """
    if size not in SUITES:
        fix = "choose one of these, or read a file of your own"
        raise FormatError(Problem("suite", "size", " or ".join(SUITES), repr(size)[:80], fix))
    return _smoke() if size == "smoke" else _whole()


@functools.cache
def _whole() -> tuple[Prompt, ...]:
    folder = resources.files(__package__) / "suite"
    data = b"".join((folder / f"{kind}.jsonl").read_bytes() for kind in KINDS)
    return _prompts(_jsonl_rows, data, "suite")


@functools.cache
def _smoke() -> tuple[Prompt, ...]:
    kept: set[str] = set()
    for stratum, count in _SMOKE.items():
        categories: dict[str, list[str]] = {}
        for prompt in _whole():
            if (prompt.kind, prompt.borderline) == stratum:
                categories.setdefault(prompt.category, []).append(prompt.id)
        # the first of every category, then the second of every category, ...
        turns = itertools.chain.from_iterable(itertools.zip_longest(*categories.values()))
        kept.update(itertools.islice((name for name in turns if name is not None), count))
    return tuple(prompt for prompt in _whole() if prompt.id in kept)


def load_prompts(path: Path) -> tuple[Prompt, ...]:
    """Reads prompts from a JSONL file, or a CSV file with a header.

    Columns: `text` (or `prompt`), and optionally `id` (default: the line), `kind` (`harmful`, the
    default, or `benign`), `category`, `borderline` (`true` or `false`), `cluster` (a name that
    near-duplicates share).

    Raises:
        FormatError: everything that is wrong with the file, with line numbers.
    """
    path = Path(path)
    readers = {".jsonl": _jsonl_rows, ".csv": _csv_rows}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise FormatError(
            Problem(
                str(path),
                "name",
                "a .jsonl or .csv file",
                path.suffix or "no suffix",
                "rename it, or export the prompts as JSONL",
            )
        )
    with open_regular(path, follow_symlinks=True) as file:
        data = file.read(MAX_FILE_BYTES + 1)
    if len(data) > MAX_FILE_BYTES:
        raise FormatError(
            Problem(str(path), "size", f"at most {MAX_FILE_BYTES} bytes", "more", "split the file")
        )
    if data.startswith(b"version https://git-lfs"):
        raise FormatError(
            Problem(str(path), "content", "prompts", "a git-lfs pointer", "run `git lfs pull`")
        )
    return _prompts(reader, data.removeprefix(codecs.BOM_UTF8), str(path))


def _jsonl_rows(data: bytes, where: str, problems: Problems) -> Iterator[_Row]:
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        here = f"{where}:{number}"
        try:
            row = strictjson.loads(line, here)
        except FormatError as error:
            problems.extend(error.problems)
            continue
        if not isinstance(row, dict):
            problems.add(here, "value", "a JSON object", type(row).__name__, _HELP)
            continue
        for key in sorted(row.keys() - set(_COLUMNS)):
            problems.add(here, key, f"one of {', '.join(_COLUMNS)}", "an unknown key", "remove it")
        yield number, row


def _csv_rows(data: bytes, where: str, problems: Problems) -> Iterator[_Row]:
    number = 0
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8"), newline=""), strict=True)
        header = [name.strip().lower() for name in next(reader, [])]
        if not {"text", "prompt"} & set(header):
            problems.add(
                f"{where}:1",
                "header",
                "a header row with a column named text or prompt",
                ", ".join(header)[:100] or "nothing",
                f"add a first row such as id,text,kind,category: {_HELP}",
            )
            return
        for name in sorted(set(header)):
            if header.count(name) > 1:
                problems.add(f"{where}:1", name, "each column once", "it twice", "remove one")
            if name not in _COLUMNS:
                problems.add(
                    f"{where}:1",
                    name or "header",
                    f"one of {', '.join(_COLUMNS)}",
                    "an unknown column",
                    "remove it",
                )
        number = reader.line_num
        for cells in reader:
            # a quoted text may span lines: the row is where it begins
            number, previous = reader.line_num, number
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                problems.add(
                    f"{where}:{previous + 1}",
                    "columns",
                    len(header),
                    len(cells),
                    "put texts that hold commas in double quotes",
                )
                continue
            row: dict[str, Any] = {
                name: cell for name, cell in zip(header, cells, strict=True) if cell
            }
            if "borderline" in row:
                spelled = {"true": True, "false": False, "1": True, "0": False}
                row["borderline"] = spelled.get(row["borderline"].lower(), row["borderline"])
            yield previous + 1, row
    except UnicodeDecodeError as error:
        problems.add(where, "content", "UTF-8", str(error), "export it as UTF-8")
    except csv.Error as error:
        problems.add(f"{where}:{number + 1}", "content", "CSV", str(error), "check the quotes")


def _prompts(
    reader: Callable[[bytes, str, Problems], Iterator[_Row]], data: bytes, where: str
) -> tuple[Prompt, ...]:
    problems = Problems()
    found: list[Prompt] = []
    seen: dict[tuple[str, str], int] = {}
    for number, row in reader(data, where, problems):
        here = f"{where}:{number}"
        prompt = _prompt(row, here, f"line-{number}", problems)
        if prompt is not None:
            for name, value in (("id", prompt.id), ("text", " ".join(prompt.text.split()))):
                first = seen.setdefault((name, value), number)
                if first != number:
                    got = f"that of line {first} again: {value[:60]!r}"
                    problems.add(here, name, f"each {name} once", got, "remove one of the two")
            found.append(prompt)
        if len(problems) >= MAX_PROBLEMS:
            problems.add(here, "file", "fewer problems", "too many: stopped here")
            break
    if not found and not problems:
        got = "none" if data.strip() else "an empty file"
        problems.add(where, "prompts", "at least one prompt", got, _HELP)
    problems.raise_if_any(FormatError)
    return tuple(found)


def _prompt(
    row: Mapping[str, Any], where: str, default_id: str, problems: Problems
) -> Prompt | None:
    before = len(problems)
    if "text" in row and "prompt" in row:
        problems.add(where, "prompt", "text or prompt", "both", "remove one of the two")
    text = row.get("text", row.get("prompt"))
    if not isinstance(text, str) or not text.strip():
        got = repr(text)[:80] if {"text", "prompt"} & row.keys() else "nothing"
        problems.add(where, "text", "a request", got, _HELP)
    elif _CONTROL.search(text):
        problems.add(where, "text", "printable characters", "control characters", "remove them")
    elif len(text) > MAX_TEXT_CHARACTERS:
        wanted = f"at most {MAX_TEXT_CHARACTERS} characters"
        problems.add(where, "text", wanted, len(text), "shorten it")
    kind = row.get("kind", "harmful")
    if kind not in KINDS:
        problems.add(where, "kind", " or ".join(KINDS), repr(kind)[:80], "correct it")
    identity = row.get("id", default_id)
    if not isinstance(identity, str) or not _ID.fullmatch(identity):
        wanted = "up to 200 letters, digits and . _ : / -"
        problems.add(where, "id", wanted, repr(identity)[:80], "rename it")
    category = row.get("category", "uncategorised")
    if not isinstance(category, str) or not category.strip() or _CONTROL.search(category):
        problems.add(where, "category", "a name", repr(category)[:80], "correct it")
    borderline = row.get("borderline", False)
    if type(borderline) is not bool:
        problems.add(where, "borderline", "true or false", repr(borderline)[:80], "correct it")
    elif borderline and kind == "harmful":
        problems.add(where, "borderline", "false: the prompt is harmful", "true", "correct one")
    cluster = row.get("cluster", identity)
    if "cluster" in row and (not isinstance(cluster, str) or not _ID.fullmatch(cluster)):
        wanted = "up to 200 letters, digits and . _ : / -"
        problems.add(where, "cluster", wanted, repr(cluster)[:80], "rename it")
    if len(problems) > before:
        return None
    return Prompt(identity, text, kind, category, borderline, cluster)
