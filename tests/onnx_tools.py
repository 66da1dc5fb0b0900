"""ONNX folders as the `onnx` package and ONNX Runtime see them, and bases changed by hand."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import tiny
from onnx import numpy_helper

import safegene
from safegene_runtime.artifact.forms import ONNX, forms_of
from safegene_runtime.artifact.manifest import FileEntry, read_manifest
from safegene_runtime.formats.files import sha256_file

FORMS = tuple(form.name for form in forms_of(ONNX))
HEAD_SIZE = 16
"""Of the tiny llama and qwen2: 64 columns, four heads."""

convert_onnx = functools.partial(safegene.convert, to="onnx")
quick = functools.partial(convert_onnx, check=False)
"""Without the self-check, which costs seconds, where a test is about something else."""


def load(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "model.onnx")


def arrays(folder: Path) -> dict[str, np.ndarray]:
    """Every initializer as `onnx` reads it."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in load(folder).graph.initializer}


def digests(folder: Path) -> dict[str, str]:
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def edited(base: Path, out: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    """A copy of an ONNX folder whose graph was changed by hand; weights in one data file."""
    shutil.copytree(base, out, ignore=shutil.ignore_patterns("*.onnx*"))
    model = load(base)
    change(model)
    onnx.save(
        model, out / "model.onnx", save_as_external_data=True, location="model.onnx.data",
        size_threshold=1024,
    )  # fmt: skip
    return out


def session(model: onnx.ModelProto | Path) -> onnxruntime.InferenceSession:
    given = str(model) if isinstance(model, Path) else model.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])


def feeds(
    running: onnxruntime.InferenceSession, ids: list[list[int]], head_size: int = HEAD_SIZE
) -> dict[str, np.ndarray]:
    """Ids with no past, for any decoder with a KV cache."""
    tokens = np.array(ids, np.int64)
    given: dict[str, Any] = {
        "input_ids": tokens,
        "attention_mask": np.ones_like(tokens),
        "position_ids": np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape),
    }
    found = {}
    for value in running.get_inputs():
        if value.name in given:
            found[value.name] = given[value.name]
        elif ".safegene." not in value.name:
            dtype = np.float16 if "16" in value.type else np.float32
            size = value.shape[3] if isinstance(value.shape[3], int) else head_size
            found[value.name] = np.zeros((len(ids), value.shape[1], 0, size), dtype)
    return found


def with_outputs(model: onnx.ModelProto, *names: str) -> onnx.ModelProto:
    """The model with further values among its outputs."""
    for name in names:
        model.graph.output.add(name=name)
    return model


def node(model: onnx.ModelProto, *words: str) -> onnx.NodeProto:
    """The one node whose name has all words; one of the branch only if they say `safegene`."""
    (found,) = [
        one
        for one in model.graph.node
        if all(word in one.name for word in words)
        and ("/safegene/" in one.name) == any("safegene" in word for word in words)
    ]
    return found


def every_module(out: Path, **config: Any) -> Path:
    """A tiny adapter that touches all seven projections."""
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return tiny.peft_adapter("llama", out, target_modules=targets, **{"scale": 0.05, **config})


def agree(folder: Path) -> Path:
    """Makes the manifest list what is there now: only meaning can tell."""
    manifest = read_manifest(folder)
    files = tuple(
        FileEntry(e.path, e.role, (folder / e.path).stat().st_size, sha256_file(folder / e.path))
        for e in manifest.files
    )
    dataclasses.replace(manifest, files=files).write(folder)
    return folder
