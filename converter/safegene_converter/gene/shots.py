"""The few prompts a gene is selected and calibrated with, and the promise that none is tested on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safegene_runtime.errors import FormatError, GeneError, Problem, Problems
from safegene_runtime.formats import strictjson
from safegene_runtime.formats.fields import Kind, check_fields
from safegene_runtime.formats.files import read_small_file
from safegene_runtime.record.prompts import Prompt
from safegene_runtime.record.reference import PromptRecord, Reference

__all__ = ["MIN_SHOTS", "Shots", "check_disjoint", "check_same_prompts", "read_task", "shots_of"]

MIN_SHOTS = 4
"""Of each kind: with fewer, a coefficient per layer is fitted to the wording of one prompt."""

OTHER_PROMPTS = "figures would be worthless: use other prompts, or --evaluation"

MAX_TASK_BYTES = 64 << 20

_WORDS = Kind((str,), "text", "text that is not blank", lambda text: bool(text.strip()))


@dataclass(frozen=True)
class Shots:
    """What is asked of the model while coefficients are scored or fitted."""

    harmful: tuple[str, ...]
    benign: tuple[str, ...]

    @property
    def count(self) -> int:
        """Both kinds together."""
        return len(self.harmful) + len(self.benign)


def shots_of(prompts: Iterable[Prompt], where: str, evaluation: Iterable[Prompt] = ()) -> Shots:
    """Splits prompts by kind and refuses too few of one, or any that `evaluation` asks too.

    Raises:
        GeneError: fewer than MIN_SHOTS of a kind, or an overlap.
    """
    given = tuple(prompts)
    problems = Problems()
    for kind in ("harmful", "benign"):
        count = sum(prompt.kind == kind for prompt in given)
        if count < MIN_SHOTS:
            problems.add(where, f"{kind} shots", f"at least {MIN_SHOTS}", count,
                         f"add prompts with \"kind\": \"{kind}\"")  # fmt: skip
    problems.raise_if_any(GeneError)
    check_disjoint({where: given, "the evaluation prompts": tuple(evaluation)})
    return Shots(
        tuple(prompt.text for prompt in given if prompt.kind == "harmful"),
        tuple(prompt.text for prompt in given if prompt.kind == "benign"),
    )


def check_disjoint(
    sets: Mapping[str, Sequence[Prompt | PromptRecord]], fix: str = OTHER_PROMPTS
) -> None:
    """Refuses sets of prompts that share a text, whatever its case, spacing or final mark.

    Args:
        sets: by name.
        fix: the next step, for the message.

    Raises:
        GeneError: one problem for each pair of sets.
    """
    problems = Problems()
    texts = {name: {_normal(prompt.text): prompt.text for prompt in prompts}
             for name, prompts in sets.items()}  # fmt: skip
    names = list(texts)
    for index, left in enumerate(names):
        for right in names[index + 1 :]:
            common = sorted(texts[left].keys() & texts[right].keys())
            if common:
                got = (
                    f"{len(common)} that {right} hold too, {texts[left][common[0]][:80]!r} for one"
                )
                problems.add(left, "prompts", "none that are tested on", got, fix)
    problems.raise_if_any(GeneError)


def check_same_prompts(reference: Reference, shots: Sequence[Prompt], where: str) -> None:
    """Refuses a reference that was recorded with other prompts than the shots.

    Raises:
        GeneError: it was.
    """
    recorded = {prompt.text for prompt in reference.prompts}
    if recorded != {prompt.text for prompt in shots}:
        raise GeneError(
            Problem(where, "prompts", "the shots", "others",
                    "record again: safegene record GENE --base MODEL --prompts SHOTS")
        )  # fmt: skip


def read_task(path: Path) -> tuple[tuple[str, str], ...]:
    """Reads pairs of an ordinary task: JSONL of {"prompt": ..., "reply": ...}.

    Raises:
        FormatError: everything that is wrong with the file, with line numbers.
    """
    data = read_small_file(Path(path).resolve(), MAX_TASK_BYTES)
    problems = Problems()
    found = []
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row: Any = strictjson.loads(line, where)
        except FormatError as error:
            problems.extend(error.problems)
            continue
        if check_fields(row, where, {"prompt": _WORDS, "reply": _WORDS}, problems):
            found.append((row["prompt"], row["reply"]))
    problems.raise_if_any(FormatError)
    if not found:
        raise FormatError(Problem(str(path), "content", "prompts and replies", "none"))
    return tuple(found)


def _normal(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".?! ")
