"""A conversion takes memory for what it touches, not for the model: self-check included."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny

from safegene_converter.gguf.writer import OutTensor, write_gguf
from safegene_runtime.child import python_environment
from safegene_runtime.formats.gguf.model import open_model
from safegene_runtime.formats.gguf.tensors import read_tensor_bytes
from safegene_runtime.formats.gguf.types import GGMLType

MIB = 1 << 20
ROOM = 512 * MIB
"""What may be taken beside twice the largest touched tensor in F32."""
UNTOUCHED = 700 * MIB
HIDDEN = 64


@pytest.fixture(scope="module")
def large_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny llama with feed-forward layers that hold 700 MiB of zeros."""
    small = open_model(tiny.gguf_model("llama", HIDDEN))
    width = UNTOUCHED // (3 * tiny.N_LAYERS * HIDDEN * 4)
    tensors = []
    for name, info in small.tensors.items():
        shape, data = info.shape, functools.partial(read_tensor_bytes, info)
        if ".ffn_" in name and len(shape) == 2:
            shape = (HIDDEN, width) if "down" in name else (width, HIDDEN)
            data = functools.partial(np.zeros, shape, np.float32)
        tensors.append(OutTensor(name, shape, GGMLType[info.type.name], data))
    length = small.metadata["llama.feed_forward_length"]
    metadata = {
        **small.metadata,
        "llama.feed_forward_length": dataclasses.replace(length, value=width),
    }
    path = tmp_path_factory.mktemp("large") / "base.gguf"
    write_gguf(path, metadata, tensors)
    assert path.stat().st_size > ROOM
    return path


def _anonymous_bytes(pid: int) -> int:
    """Memory of a process, of its own: pages of mapped files belong to the page cache."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def _family(pid: int) -> list[int]:
    """A process and what it started."""
    found = [pid]
    try:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            found += [int(one) for one in task.read_text().split()]
    except OSError:
        pass
    return found


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_the_peak_does_not_depend_on_what_is_not_touched(large_base: Path, tmp_path: Path) -> None:
    adapter = tiny.peft_adapter(
        "llama", tmp_path / "adapter", scale=0.1, target_modules=["q_proj", "o_proj"]
    )
    command = [
        sys.executable, "-m", "safegene_converter", "convert", str(adapter), "--base",
        str(large_base), "-o", str(tmp_path / "out"),
    ]  # fmt: skip
    peaks: dict[int, int] = {}
    with subprocess.Popen(command, env=python_environment()) as running:
        while running.poll() is None:
            for pid in _family(running.pid):
                peaks[pid] = max(peaks.get(pid, 0), _anonymous_bytes(pid))
            time.sleep(0.005)
    assert running.returncode == 0
    assert len(peaks) > 1, "the self-check runs in a process of its own"
    assert max(peaks.values()) < 2 * 4 * HIDDEN**2 + ROOM
