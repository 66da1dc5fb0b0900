"""Someone who changes an artifact's files while it is checked and loaded, again and again.

Each race opens the artifact and asks for logits. It was refused, or it is the genuine one to the bit.
"""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from safegene_runtime.artifact.integrity import check_integrity
from safegene_runtime.artifact.manifest import read_manifest
from safegene_runtime.engines.registry import open_engine
from safegene_runtime.errors import SafeGeneError
from safegene_runtime.formats.sealed import SealedFiles

IDS = [5, 77, 104, 9, 30]

# a process of its own, as fast as it can; argv: how, then genuine, other and the path for each file
ATTACKER = """
import os, random, sys, time
how, *paths = sys.argv[1:]
files = [paths[at : at + 3] for at in range(0, len(paths), 3)]
contents = [[open(path, "rb").read() for path in (genuine, other)] for genuine, other, _ in files]
random.seed(1)
turn = 0
while True:
    turn ^= 1
    for (genuine, other, path), both in zip(files, contents):
        if how == "swap":
            # made outside of the folder: a stranger in it would be refused at once
            made = os.path.join(os.path.dirname(os.path.dirname(path)), "new")
            with open(made, "wb") as file:
                file.write(both[turn])
            os.replace(made, path)
        else:
            with open(path, "r+b") as file:
                file.write(both[turn])
                if how == "cut":
                    file.truncate(len(both[turn]) // 2 if turn else len(both[turn]))
    # the genuine bytes stay a little longer: an opening that is refused at once proves nothing
    time.sleep(random.random() * (0.002 if turn else 0.02))
"""


@dataclass(frozen=True)
class Counts:
    """What came of races: how many served the genuine model, were refused, or served another one."""

    genuine: int
    refused: int
    wrong: int


def race(times: int, how: str, folder: Path, other: Path, base: Path | None, work: Path) -> Counts:
    """Opens a copy of `folder` while its files become those of `other` and back.

    Args:
        times: openings.
        how: `swap` (rename over the path), `edit` or `cut` (in place).
        folder: the artifact.
        other: one like it, with other weights.
        base: for a sidecar.
        work: an empty folder.
    """
    target = shutil.copytree(folder, work / "artifact")
    names = [
        one.path
        for one in read_manifest(folder).files
        if (folder / one.path).read_bytes() != (other / one.path).read_bytes()
    ]
    assert names, "there is nothing to race for"
    expected = _logits(target, base)
    counts = {"genuine": 0, "refused": 0, "wrong": 0}
    paths = [str(part / name) for name in names for part in (folder, other, target)]
    with _running([sys.executable, "-c", ATTACKER, how, *paths]):
        for _ in range(times):
            try:
                found = _logits(target, base)
            except SafeGeneError:
                counts["refused"] += 1
            else:
                same = all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))
                counts["genuine" if same else "wrong"] += 1
    return Counts(**counts)


def _logits(folder: Path, base: Path | None) -> list[np.ndarray]:
    """As `safegene.open` opens it, but in this process; twice, as files change afterwards, too."""
    manifest = read_manifest(folder)
    with SealedFiles() as files:
        served = check_integrity(manifest, folder, None, base, lambda *_: None, files)
        engine = open_engine(served.model, served.adapter, threads=1)
    with engine:
        return [next(iter(engine.logits([IDS], [1])))[1].copy() for _ in range(2)]


@contextlib.contextmanager
def _running(command: list[str]) -> Iterator[None]:
    process = subprocess.Popen(command)
    try:
        yield
        assert process.poll() is None, "the attacker gave up"
    finally:
        process.kill()
        process.wait()
