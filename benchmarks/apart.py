"""What it costs to run the engine in a child: the same calls here and there, taking turns.

    python benchmarks/apart.py [--model MODEL.gguf] [--rounds 5] [--threads N]

Prints the median seconds of each and the median of the rounds' ratios. `open` is a child's start and its
imports; here they are paid once per process. `verify` is what a verification asks for: teacher-forced
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

from safegene_converter.cli.demo import find_smollm2
from safegene_runtime.engines.engine import Engine
from safegene_runtime.engines.registry import open_engine

PROMPTS, SHARED, TAIL, KEEP, REPLY = 16, 24, 40, 16, 16


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
    openings: list[tuple[float, float]] = []
    for _ in range(arguments.rounds):
        pair = []
        for apart in (False, True):
            seconds, engine = opened(apart)
            engine.close()
            pair.append(seconds)
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
        print("| call | here | apart | apart / here |")
        print("|---|---|---|---|")
        _row("open", openings)
        for name, job in jobs.items():
            job(here), job(there)  # warm
            _row(name, [_pair(job, here, there, number) for number in range(arguments.rounds)])


def _pair(
    job: Callable[[Engine], None], here: Engine, there: Engine, number: int
) -> tuple[float, float]:
    """Seconds of both, one right behind the other; who is first alternates."""
    found = {}
    for engine in (here, there) if number % 2 else (there, here):
        began = time.monotonic()
        job(engine)
        found[engine is there] = time.monotonic() - began
    return found[False], found[True]


def _row(name: str, pairs: list[tuple[float, float]]) -> None:
    here, there = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratio = statistics.median(other / one for one, other in pairs)
    print(f"| {name} | {here:.3f} s | {there:.3f} s | {ratio:.3f} |", flush=True)


if __name__ == "__main__":
    main()
