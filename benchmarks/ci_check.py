"""The whole check of a CI job on a real model: its seconds, the engine's part of them, its memory.

    python benchmarks/ci_check.py [--type q8_0] [--work build/ci-check] [--profile ci] [--repeat 3]

Checked is SmolLM2-135M with the example adapter, merged as --type, against a reference of the whole built-in
suite. Both are made below `--work` when they are missing (about 10 minutes on 2 cores). Then, in a process
of its own as in a CI job,

    safegene verify ARTIFACT --reference REFERENCE --profile ci --no-write --report DIR

The peer is llama.cpp in that same process: the seconds inside its loading, decoding and tokenising, taken
around the engine's calls of it. What is left of the wall time, the start of Python included, is ours.
Memory is the peak that the kernel counted, split by what is resident before and after the model is loaded
(Linux); files that are mapped, which are Python's and the libraries' code, are in it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measuring import LAUNCHER, environment

from safegene_converter.cli.smollm2 import find_adapter, find_smollm2, write_float_base

AIM_SECONDS, AIM_OURS, AIM_MEMORY = 180.0, 0.10, 1.5

INSIDE = """
import json, sys, time
from pathlib import Path
from safegene_converter.cli.main import main
from safegene_runtime.engines.llama import LlamaEngine

spent, resident = {}, []

def note():  # bytes: all, and those of files that are mapped
    rows = dict(line.split(":", 1) for line in open("/proc/self/status"))
    resident.append([int(rows[name].split()[0]) * 1024 for name in ("VmRSS", "RssFile")])

def timed(name):
    inner = getattr(LlamaEngine, name)
    def outer(*args, **kwargs):
        if name == "_load_model":
            note()
        start = time.monotonic()
        try:
            return inner(*args, **kwargs)
        finally:
            spent[name] = spent.get(name, 0.0) + time.monotonic() - start
            if name == "_load_model":
                note()
    setattr(LlamaEngine, name, outer)

for name in ("_load_model", "_open_context", "_decode", "tokenize", "detokenize"):
    timed(name)
code = main(sys.argv[2:])
Path(sys.argv[1]).write_text(json.dumps({"code": code, "spent": spent, "resident": resident}))
"""
"""`safegene` with a clock around the engine's calls of llama.cpp, none of which calls another."""


def main() -> None:
    """Prints the figures beside their aims."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/ci-check"))
    parser.add_argument("--type", default="q8_0", help="of the artifact (default: q8_0)")
    parser.add_argument("--profile", default="ci")
    parser.add_argument("--repeat", type=int, default=3, help="the median is shown (default: 3)")
    arguments = parser.parse_args()
    work: Path = arguments.work
    artifact, reference = prepare(work, arguments.type)
    reports = work / "reports"
    runs = [
        measure(["verify", str(artifact), "--reference", str(reference), "--no-write",
                 "--profile", arguments.profile, "--report", str(reports)], work)
        for _ in range(arguments.repeat)
    ]  # fmt: skip
    report = json.loads((reports / "report.json").read_bytes())
    size = sum(file.stat().st_size for file in artifact.rglob("*") if file.is_file())
    wall, ours, *memory = (
        statistics.median(values)
        for values in zip(
            *((run.seconds, 1 - run.engine / run.seconds, run.peak / size,
               run.before / size, (run.loaded - run.before) / size,
               (run.peak - run.loaded) / size, run.mapped / size) for run in runs),
            strict=True,
        )
    )  # fmt: skip
    peak, python, model, rest, mapped = memory
    harmful = sum(prompt["kind"] == "harmful" for prompt in report["prompts"])
    print(f"{platform.machine()}, {len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, load "
          f"{os.getloadavg()[0]:.1f}; {report['precision']}, {size / 1e6:.0f} MB, {harmful} harmful "
          f"and {len(report['prompts']) - harmful} benign prompts, median of {len(runs)}")  # fmt: skip
    print(f"{report['verdict']}: {report['sentence']}")
    print(f"wall time             {wall:7.1f} s    aim below {AIM_SECONDS:g} s")
    print(f"not the engine        {ours:7.1%}      aim below {AIM_OURS:.0%}")
    print(f"memory / artifact     {peak:7.2f} x    aim below {AIM_MEMORY:g} x")
    print(f"  Python, libraries   {python:7.2f} x    {mapped:.2f} x of it code mapped from files")
    print(f"  the loaded model    {model:7.2f} x    weights and vocabulary, in llama.cpp")
    print(f"  to run it           {rest:7.2f} x    KV cache, logits, buffers")


def prepare(work: Path, type_name: str) -> tuple[Path, Path]:
    """Artifact and reference, made where they are missing; each appears when it is whole."""
    artifact, reference, base = work / type_name, work / "reference", work / "float.gguf"
    work.mkdir(parents=True, exist_ok=True)
    if not reference.exists():
        safegene(
            "record", find_adapter(), "--base", find_smollm2(), "--suite", "ci", "-o", reference
        )
    if not artifact.exists():
        if not base.exists():
            write_float_base(find_smollm2(), base)
        safegene("convert", find_adapter(), "--base", base, "--type", type_name, "-o", artifact)
        base.unlink()
    return artifact, reference


def safegene(*words: Any) -> None:
    """Runs a command that prepares something."""
    command = [sys.executable, "-m", "safegene_converter", *map(str, words)]
    subprocess.run(command, check=True, env=environment())


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        seconds: wall time.
        engine: seconds of it inside llama.cpp.
        peak: resident bytes at most.
        before: resident bytes before the model is loaded.
        mapped: of these, what is mapped from files.
        loaded: resident bytes when it is loaded.
    """

    seconds: float
    engine: float
    peak: float
    before: float
    mapped: float
    loaded: float


def measure(words: list[str], work: Path) -> Run:
    """One run, in a process of its own."""
    found = work / "inside.json"
    found.unlink(missing_ok=True)
    command = [sys.executable, "-c", INSIDE, str(found), *words]
    launched = subprocess.run(
        [sys.executable, "-S", "-c", LAUNCHER, *command],
        capture_output=True, check=True, env=environment(),
    )  # fmt: skip
    code, seconds, peak, error = json.loads(launched.stdout)
    if code != 0 or not found.exists():
        raise SystemExit(error)
    inside = json.loads(found.read_bytes())
    for name, took in inside["spent"].items():
        print(f"  {name.strip('_'):12} {took:6.2f} s", file=sys.stderr)
    (before, mapped), (loaded, _) = inside["resident"]
    return Run(seconds, sum(inside["spent"].values()), peak * 2**20, before, mapped, loaded)


if __name__ == "__main__":
    main()
