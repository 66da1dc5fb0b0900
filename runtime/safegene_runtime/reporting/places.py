"""Where reports may go: apart from each other, and from everything that the check reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from safegene_runtime.errors import OutputError, Problems
from safegene_runtime.formats.gguf.model import shard_paths
from safegene_runtime.formats.publish import check_writable

__all__ = ["check_places", "read_files"]


def read_files(judge: str | None, *models: Path | None) -> list[Path]:
    """What a check reads beside its folders: models with all their shards, and a judge's files.

    Args:
        judge: as `--judge` names it; the argument of a plug-in may be a path.
        models: as `--base` and `--control` name them.
    """
    found = [path for one in models if one is not None for path in (one, *shard_paths(one))]
    kind, _, argument = (judge or "").partition(":")
    place = Path(argument)
    if argument and place.is_file():
        found.append(place)
    if argument and kind == "onnx":
        found += [place.parent / name for name in ("tokenizer.json", "config.json")]
    return found


def check_places(places: Mapping[str, Path], inputs: Iterable[Path]) -> None:
    """Finds out before a long check whether its reports can be written, and what they would destroy.

    Args:
        places: each file that is to be written, by the option that names it.
        inputs: files and folders that the check reads.

    Raises:
        OutputError: two reports in one file, one in the place of an input or inside one, or a place
            where none can be written: everything that is wrong.
    """
    problems = Problems()
    inputs = list(dict.fromkeys(inputs))
    by_place: dict[Path, str] = {}
    for option, path in places.items():
        first = by_place.setdefault(path.resolve(), option)
        if first != option:
            problems.add(option, "output", "a file of its own", f"that of {first}", "name another")
        if problem := check_writable(path):
            problems.extend([problem])
        for one in inputs:
            if path.resolve() == one.resolve() and not one.is_dir():
                problems.add(
                    option, "output", "a file of its own", f"the input {one}", "name another"
                )
            elif path.resolve().is_relative_to(one.resolve()):
                problems.add(
                    option, "output", "a place of its own", f"one inside {one}",
                    "a file that its manifest does not list would break it: choose another",
                )  # fmt: skip
    problems.raise_if_any(OutputError)
