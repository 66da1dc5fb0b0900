"""What the conversion benchmarks share: how a command is measured, and PEFT's merge as a peer."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# onnx.py lies beside this file: to us and to our children that name must mean the package
sys.path[:] = [path for path in sys.path if Path(path).resolve() != ROOT / "benchmarks"]
PEFT_MERGE = """
import sys, torch
from pathlib import Path
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter, out = map(Path, sys.argv[1:])
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)
AutoTokenizer.from_pretrained(base).save_pretrained(out)
"""


LAUNCHER = """
import json, resource, subprocess, sys, time
start = time.monotonic()
done = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
print(json.dumps([done.returncode, time.monotonic() - start,
                  resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
                  done.stderr.decode("utf-8", "replace")[-2000:]]))
"""
"""Starts a command from a small process: a child's peak is never below its parent's size at fork."""


def measure(command: list[str], output: Path, repeat: int) -> tuple[float, float, float]:
    """Median wall seconds, peak MiB of the largest process, MB written."""
    times, peaks = [], []
    for _ in range(repeat):
        shutil.rmtree(output, ignore_errors=True)
        output.unlink(missing_ok=True)
        os.sync()  # what the one before left for the disk is not this one's to wait for
        launched = subprocess.run(
            [sys.executable, "-S", "-c", LAUNCHER, *command],
            capture_output=True, check=True, env=environment(),
        )  # fmt: skip
        code, seconds, peak, error = json.loads(launched.stdout)
        times.append(seconds)
        peaks.append(peak)
        if code != 0:
            raise SystemExit(f"{' '.join(command)}\n{error}")
    files = [output] if output.is_file() else [p for p in output.rglob("*") if p.is_file()]
    return statistics.median(times), max(peaks), sum(p.stat().st_size for p in files) / 1e6


def environment() -> dict[str, str]:
    """Ours importable, llama.cpp's gguf-py for its scripts, nothing from the network.

    Modules are compiled once, as pip compiles those of an installed package.
    """
    paths = [str(ROOT / "converter"), str(ROOT / "runtime")]
    kept = {name: text for name, text in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return {**kept, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
