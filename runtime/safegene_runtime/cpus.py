"""What of this machine is ours: CPUs, the threads that run on them and how these wait, memory."""

from __future__ import annotations

import os
import sys

from safegene_runtime.errors import EngineError, Problem

__all__ = ["available_bytes", "spin_briefly", "thread_count", "usable_cpus"]

DEFAULT_THREADS_MAX = 32


THREADS_MAX = 512
"""GGML_MAX_N_THREADS; with more libllama aborts the process."""


THREADS_PER_CPU = 4
"""Waiting threads spin: with far more of them than CPUs the whole machine stands still."""


SPINS = "1000"
"""Microseconds: idle machines hardly notice, and busy ones are spared."""


def usable_cpus() -> int:
    """How many CPUs this process may run on, where the system can tell."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0)) or 1
    return os.cpu_count() or 1


def available_bytes() -> int:
    """Memory that can be taken without swapping, as the system estimates it; much where it does not."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return sys.maxsize


def thread_count(asked: int | None) -> int:
    """How many CPU threads an engine gets: as many as were asked for, else one per usable CPU.

    Raises:
        EngineError: none, or more than this machine can run.
    """
    cpus = usable_cpus()
    default = min(cpus, DEFAULT_THREADS_MAX)
    limit = min(max(cpus * THREADS_PER_CPU, DEFAULT_THREADS_MAX), THREADS_MAX)
    if asked is not None and not 1 <= asked <= limit:
        fix = f"leave it out: then there are {default}, one for each CPU"
        raise EngineError(Problem("engine", "threads", f"1 to {limit}", str(asked), fix))
    return default if asked is None else asked


def spin_briefly() -> None:
    """Lets idle OpenMP threads sleep soon, where the environment says nothing else.

    They spin for milliseconds by default. Where other processes want the CPUs, they so keep a core from the
    very thread that they wait for (docs/speed.md). libgomp asks once, when llama.cpp or PyTorch load it:
    call it before.
    """
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = SPINS
