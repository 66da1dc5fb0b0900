"""The self-test of the ladder as a table: which rungs catch which mistake, with their figures.

    python benchmarks/mutants.py [--target "gguf merged"]

The artifacts and the mistakes are those of tests/mutants.py. Exits with 1 if one is not caught.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# onnx.py lies beside this file: that name must mean the package
sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT / "benchmarks"]
sys.path[:0] = [str(ROOT / folder) for folder in ("tests", "converter", "runtime")]

from mutants import MUTANTS, needs_wide_rows  # noqa: E402
from workshop import TARGETS, Workshop, climb, rungs_that_broke, unmutated  # noqa: E402

from safegene_runtime.artifact.recomputed import RUNGS  # noqa: E402
from safegene_runtime.verifying.report import Report  # noqa: E402

HEAD = ("mistake", "target", *RUNGS[:-1], "caught at", "beta_W", "beta_logit", "mean KL")


def main() -> int:
    """Prints the table; 1 if a mistake was not caught, or the genuine artifact was."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", choices=TARGETS, action="append", help="only these")
    targets = parser.parse_args().target or TARGETS
    print(f"{platform.machine()}, {os.cpu_count()} cores\n")
    print(f"| {' | '.join(HEAD)} |")
    print(f"|{'---|' * len(HEAD)}")
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        shops = {hidden: Workshop(Path(folder) / str(hidden), hidden) for hidden in (64, 256)}
        for name, make in {"none": unmutated, **MUTANTS}.items():
            for number, target in enumerate(TARGETS):
                if target not in targets:
                    continue
                shop = shops[256 if needs_wide_rows(name, target) else 64]
                out = Path(folder) / f"{[*MUTANTS, name].index(name)}-{number}"
                report = climb(make(shop, target, out), shop.reference)
                print(_row(name, target, report), flush=True)
                failed += (report.broken_at is None) != (name == "none")
    return int(failed > 0)


def _row(name: str, target: str, report: Report) -> str:
    broke = rungs_that_broke(report)
    marks = ["●" if rung in broke else "–" for rung in RUNGS[:-1]]
    beta_w = report.static["pooled"] if report.static else float("nan")
    figures = f"{beta_w:.3f} | {report.figures['beta']:.3f} | {report.figures['mean_kl']:.1e}"
    return f"| {name} | {target} | {' | '.join(marks)} | {report.broken_at or ''} | {figures} |"


if __name__ == "__main__":
    sys.exit(main())
