"""A GGUF sidecar: the factors of a LoRA, every scale baked into B, beside an untouched base."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from safegene_converter.encoding import ggml
from safegene_converter.fold.manifest_lines import module_entry
from safegene_converter.fold.survival import Meter, Mode, Survival, passes
from safegene_converter.gguf.job import BLOCK_ELEMENTS, Job, Made, Rows, figures, string, within
from safegene_converter.gguf.writer import OutTensor, write_gguf
from safegene_runtime.artifact.forms import GGUF
from safegene_runtime.artifact.manifest import FileEntry, ModuleEntry
from safegene_runtime.errors import Problems, SurvivalError
from safegene_runtime.formats.files import sha256_of
from safegene_runtime.formats.gguf import GGMLType
from safegene_runtime.progress import Progress

__all__ = ["SIDECAR_TYPES", "write_sidecar"]

SIDECAR_TYPES = ("f32", "f16", "bf16", "q8_0")


def write_sidecar(job: Job, folder: Path, tell: Progress) -> Made:
    """Writes `adapter.gguf` into `folder`.

    Raises:
        SurvivalError: a type too coarse for the factors.
    """
    wanted = GGMLType["F32" if job.type_name == "auto" else job.type_name.upper()]
    tensors: list[OutTensor] = []
    modules: list[ModuleEntry] = []
    problems = Problems()
    for index, module in enumerate(job.adapter.modules):
        name = job.tensor(module)
        a, b = job.factors(module)
        stored = []
        for suffix, factor in (("lora_a", a), ("lora_b", b)):
            # a factor whose rows are no multiple of the block stays in F32: it is tiny anyway
            kind = wanted if ggml.can_encode(wanted, factor.shape[1]) else GGMLType.F32
            encoded = ggml.quantize(factor, kind, threads=1)
            tensors.append(OutTensor(f"{name}.{suffix}", factor.shape, kind, encoded))
            stored.append((encoded, ggml.dequantize(encoded, kind, factor.shape, threads=1)))
        survival = None
        if wanted is not GGMLType.F32:
            (_, a_stored), (_, b_stored) = stored
            survival = _measure_factors(a, b, a_stored, b_stored)
            if not passes(survival, job.bounds):
                problems.add(
                    name,
                    "survival",
                    within(job.bounds),
                    figures(survival),
                    "use --type f32 for the sidecar",
                )
        modules.append(
            module_entry(
                module,
                name,
                None,
                wanted.name,
                0,
                sum(encoded.nbytes for encoded, _ in stored),
                sha256_of(b"".join(encoded.tobytes() for encoded, _ in stored)),
                survival,
            )
        )
        tell("writing the sidecar", index + 1, len(job.adapter.modules))
    problems.raise_if_any(SurvivalError)
    metadata = {
        "general.architecture": string(job.base.architecture),
        "general.type": string("adapter"),
        "general.name": string(job.adapter.path.resolve().name),
        # no adapter.lora.alpha: llama.cpp then scales by exactly 1, and B carries every scale
        "adapter.type": string("lora"),
        **job.provenance(),
    }
    path = folder / GGUF.adapter_file
    written = write_gguf(path, metadata, tensors)
    entry = FileEntry(path.name, "adapter", path.stat().st_size, written.sha256)
    return Made(entry, tuple(modules), job.precision({}), job.model.shards[0].path)


def _measure_factors(a: Rows, b: Rows, a_stored: Rows, b_stored: Rows) -> Survival:
    meter = Meter(Mode.GRID)
    step = max(1, BLOCK_ELEMENTS // a.shape[1])
    for start in range(0, len(b), step):
        rows = slice(start, start + step)
        delta, stored = b[rows] @ a, b_stored[rows] @ a_stored
        meter.add(np.zeros_like(delta), delta, stored)
    return meter.result()
