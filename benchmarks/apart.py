"""What it costs to run the engine in a child: the same calls here and there, taking turns.

    python benchmarks/apart.py [--model MODEL.gguf] [--rounds 5] [--threads N]

Prints the median seconds of each, and the median of the rounds' ratios: of wall time, and of CPU time of
both processes, which other work on the machine disturbs less. `open` is a child's start and its imports;
here they are paid once per process. `verify` is what a verification asks for: teacher-forced
logits and greedy replies.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from safegene_converter.cli.smollm2 import find_smollm2
from safegene_runtime.engines.engine import Engine
from safegene_runtime.engines.registry import open_engine

Pair = tuple[tuple[float, float], tuple[float, float]]
"""(wall, CPU) seconds here, and apart."""
PROMPTS, SHARED, TAIL, KEEP, REPLY = 8, 24, 40, 16, 12


def main() -> None:
    """Prints one row for each call."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=None, help="default: SmolLM2's Q4_1 file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    path = arguments.model or find_smollm2()
    print(f"{platform.machine()}, {os.cpu_count()} cores; {path.name}, {arguments.rounds} rounds")

    def opened(apart: bool) -> tuple[float, Engine]:
        began = time.monotonic()
        engine = open_engine(path, threads=arguments.threads, apart=apart)
        return time.monotonic() - began, engine

    opened(False)[1].close()  # the imports of this process, and the file in memory
    openings: list[Pair] = []
    for _ in range(arguments.rounds):
        pair = []
        for apart in (False, True):
            seconds, engine = opened(apart)
            engine.close()
            pair.append((seconds, seconds))
        openings.append((pair[0], pair[1]))
    with opened(False)[1] as here, opened(True)[1] as there:
        random = np.random.default_rng(0)
        shared = random.integers(100, here.n_vocab, SHARED).tolist()
        rows = [
            [*shared, *random.integers(100, here.n_vocab, TAIL).tolist()] for _ in range(PROMPTS)
        ]

        def forced(engine: Engine) -> None:
            for _, logits in engine.logits(rows, [KEEP] * len(rows)):
                logits.max()  # whoever asks reads them

        def replies(engine: Engine) -> None:
            engine.generate(rows, REPLY, ())

        def verify(engine: Engine) -> None:
            forced(engine)
            replies(engine)

        def chat(engine: Engine) -> None:
            ids: list[int] = []
            for token in engine.stream(rows[0], REPLY, ()):
                ids.append(token)
                engine.detokenize(ids)

        jobs: dict[str, Callable[[Engine], None]] = {
            f"logits, {PROMPTS} x {KEEP} rows of {here.n_vocab}": forced,
            f"replies, {PROMPTS} x {REPLY}": replies,
            "verify: both": verify,
            f"chat, {REPLY} tokens": chat,
        }
        print("| call | here | apart | wall, apart / here | CPU, apart / here |")
        print("|---|---|---|---|---|")
        _row("open", openings)
        for name, job in jobs.items():
            job(here), job(there)  # warm
            _row(name, [_pair(job, here, there, number) for number in range(arguments.rounds)])


def _pair(job: Callable[[Engine], None], here: Engine, there: Engine, number: int) -> Pair:
    """(wall, CPU) seconds of both, one right behind the other; who is first alternates."""
    found = {}
    for engine in (here, there) if number % 2 else (there, here):
        began, spent = time.monotonic(), _cpu(there)
        job(engine)
        found[engine is there] = (time.monotonic() - began, _cpu(there) - spent)
    return found[False], found[True]


def _cpu(engine: Engine) -> float:
    """CPU seconds of this process and of an engine's child so far (Linux: proc(5), fields 14 and 15)."""
    child = engine._child.pid  # type: ignore[attr-defined]
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return time.process_time() + (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _row(name: str, pairs: list[Pair]) -> None:
    here, there = (
        statistics.median(one[0] for one in column) for column in zip(*pairs, strict=True)
    )
    wall, cpu = (statistics.median(b[kind] / a[kind] for a, b in pairs) for kind in (0, 1))
    print(f"| {name} | {here:.3f} s | {there:.3f} s | {wall:.3f} | {cpu:.3f} |", flush=True)


if __name__ == "__main__":
    main()
