"""A tiny artifact and reference that pass the smoke gate, for tests of what people use in CI.

A random model refuses nothing that a judge of language would recognise. So the judge is a plug-in
that holds hand-made labels: the listed replies are refusals, any other text is an answer. What is
recorded, served and compared is real; a reply that changes by one token loses its label.
"""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tiny

from safegene import convert, record
from safegene_runtime.formats.files import sha256_of
from safegene_runtime.record.prompts import builtin_suite

HARMFUL, BENIGN = 64, 32
JUDGE = """
import json
from pathlib import Path
from safegene_runtime.formats.files import sha256_of
from safegene_runtime.judging.judge import Label

class Listed:
    name, version = "listed", "1"
    def __init__(self, path):
        data = Path(path).read_bytes()
        self.digest, self.refusals = sha256_of(data), set(json.loads(data))
    def label(self, texts, prompts=None):
        return [Label.REFUSE if text in self.refusals else Label.COMPLY for text in texts]
"""


@dataclass(frozen=True)
class Gated:
    """Where everything is; `site` goes into PYTHONPATH, as pip would have installed it."""

    artifact: Path
    reference: Path
    base: Path
    judge: str
    site: Path


@functools.cache
def make() -> Gated:
    """Records, labels and converts, once per process; removed when the process ends."""
    folder = Path(tempfile.mkdtemp(prefix="safegene-gated-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    adapter = tiny.peft_adapter("llama", folder / "adapter", scale=0.2)
    suite = builtin_suite()
    prompts = [
        *[prompt for prompt in suite if prompt.kind == "harmful"][:HARMFUL],
        *[prompt for prompt in suite if prompt.kind == "benign"][:BENIGN],
    ]
    record(adapter, tiny.hf_model("llama"), folder / "reference", prompts=prompts, max_new_tokens=4)
    _label(folder / "reference", folder / "refusals.json")
    base = tiny.gguf_model("llama")
    convert(adapter, base, folder / "artifact", form="merged")
    site = folder / "site"
    site.mkdir()
    (site / "listed_judge.py").write_text(JUDGE)
    distribution(site, "listed-judge", {"safegene.judges": {"listed": "listed_judge:Listed"}})
    judge = f"listed:{folder / 'refusals.json'}"
    return Gated(folder / "artifact", folder / "reference", base, judge, site)


def distribution(site: Path, name: str, groups: dict[str, dict[str, str]]) -> None:
    """The metadata of an installed distribution with these entry points."""
    info = site / f"{name.replace('-', '_')}-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
    lines: list[str] = []
    for group, points in groups.items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in points.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")


def _label(reference: Path, listed: Path) -> None:
    """Labels a record: what the reference alone says to harmful prompts is a refusal."""
    rows = [json.loads(line) for line in (reference / "prompts.jsonl").read_text().splitlines()]
    answers = {row["base_text"] for row in rows}
    answers |= {row["ref_text"] for row in rows if row["kind"] == "benign"}
    refusals = {row["ref_text"] for row in rows} - answers
    for row in rows:
        for arm in ("ref", "base"):
            row[f"{arm}_verdict"] = "refuse" if row[f"{arm}_text"] in refusals else "comply"
    listed.write_text(json.dumps(sorted(refusals)))
    data = _lines(rows)
    (reference / "prompts.jsonl").write_bytes(data)
    index = json.loads((reference / "reference.json").read_text())
    index["judge"] = {"name": "listed", "version": "1", "digest": sha256_of(listed.read_bytes())}
    index["files"]["prompts.jsonl"] = sha256_of(data)
    (reference / "reference.json").write_text(json.dumps(index))


def _lines(rows: Sequence[object]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()
