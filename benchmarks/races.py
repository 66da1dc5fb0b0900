"""Races: an artifact is opened while another process changes its files; it must be refused, or genuine.

    python benchmarks/races.py [--times 1000] [--form "gguf merged"] [--how swap]

Tiny models, in this process, which checks and loads as `safegene.open` does; a child would inherit what was
sealed here. `swap` renames other weights over the path and the genuine ones back, `edit` writes them in
place, `cut` truncates them, too. Exit code 1 where a race was lost.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

from measuring import ROOT

sys.path.insert(0, str(ROOT / "tests"))
import tiny
from races import race

from safegene import convert

FORMS = ("gguf merged", "gguf sidecar", "onnx merged", "onnx branch", "onnx adapter")
WAYS = ("swap", "edit", "cut")


def main() -> int:
    """Prints one row for each form and way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=1000, help="openings for each row")
    parser.add_argument("--form", choices=FORMS, action="append", help="only these")
    parser.add_argument("--how", choices=WAYS, action="append", help="only these")
    arguments = parser.parse_args()
    wrong = 0
    print(f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}")
    print("| form | how | openings | genuine | refused | another model | seconds |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for form in arguments.form or FORMS:
            one, other = (_make(form, seed, root) for seed in (1, 2))
            base = tiny.gguf_model("llama") if form == "gguf sidecar" else None
            for how in arguments.how or WAYS:
                work = root / f"{form}-{how}"
                work.mkdir()
                began = time.monotonic()
                counts = race(arguments.times, how, one, other, base, work)
                wrong += counts.wrong
                print(
                    f"| {form} | {how} | {arguments.times} | {counts.genuine} | {counts.refused} | "
                    f"{counts.wrong} | {time.monotonic() - began:.0f} |",
                    flush=True,
                )
    return 1 if wrong else 0


def _make(form: str, seed: int, root: Path) -> Path:
    """An artifact of a form; the same but for its adapter's numbers for another seed."""
    adapter = root / f"adapter-{seed}"
    if not adapter.exists():
        tiny.peft_adapter("llama", adapter, scale=0.1, seed=seed)
    kind, name = form.split()
    out = root / f"{kind}-{name}-{seed}"
    base = tiny.gguf_model("llama") if kind == "gguf" else tiny.onnx_model("llama")
    convert(adapter, base, out, to=kind, form=name, check=False)  # type: ignore[arg-type]
    return out


if __name__ == "__main__":
    sys.exit(main())
