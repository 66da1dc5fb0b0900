"""A GGUF sidecar: the factors of a LoRA, every scale baked into B, beside an untouched base."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from safegene_converter import formula
from safegene_converter.encoding import ggml_quantizer
from safegene_converter.fold.manifest_lines import module_entry
from safegene_converter.fold.survival import Meter, Mode, Survival, passes
from safegene_converter.gguf.fold import (
    BLOCK_ELEMENTS,
    GGUFFold,
    Made,
    Rows,
    figures,
    string,
    within,
)
from safegene_converter.gguf.writer import OutTensor, write_gguf
from safegene_converter.inputs.adapter import Module
from safegene_runtime.artifact.forms import GGUF
from safegene_runtime.artifact.manifest import FileEntry, ModuleEntry
from safegene_runtime.errors import Problems, SurvivalError
from safegene_runtime.formats import ggml
from safegene_runtime.formats.files import sha256_of
from safegene_runtime.formats.gguf.types import GGMLType
from safegene_runtime.progress import Progress

__all__ = ["SIDECAR_TYPES", "write_sidecar"]

SIDECAR_TYPES = ("f32", "f16", "bf16", "q8_0")


def write_sidecar(fold: GGUFFold, folder: Path, tell: Progress) -> Made:
    """Writes `adapter.gguf` into `folder`.

    Raises:
        SurvivalError: a type too coarse for the factors.
    """
    wanted = GGMLType["F32" if fold.type_name == "auto" else fold.type_name.upper()]
    tensors: list[OutTensor] = []
    modules: list[ModuleEntry] = []
    problems = Problems()
    for index, module in enumerate(fold.adapter.modules):
        name = fold.tensor(module)
        a, b = fold.factors(module)
        stored = []
        for suffix, factor in (("lora_a", a), ("lora_b", b)):
            # a factor whose rows are no multiple of the block stays in F32: it is tiny anyway
            kind = wanted if ggml_quantizer.can_encode(wanted, factor.shape[1]) else GGMLType.F32
            encoded = ggml_quantizer.quantize(factor, kind, threads=1)
            tensors.append(OutTensor(f"{name}.{suffix}", factor.shape, kind, encoded))
            stored.append((encoded, ggml.dequantize(encoded, kind, factor.shape, threads=1)))
        survival = None
        if wanted is not GGMLType.F32:
            (_, a_stored), (_, b_stored) = stored
            survival = _measure_factors(fold, module, a_stored, b_stored)
            if not passes(survival, fold.bounds):
                problems.add(
                    name,
                    "survival",
                    within(fold.bounds),
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
        tell("writing the sidecar", index + 1, len(fold.adapter.modules))
    problems.raise_if_any(SurvivalError)
    metadata = {
        "general.architecture": string(fold.base.architecture),
        "general.type": string("adapter"),
        "general.name": string(fold.adapter.path.resolve().name),
        # no adapter.lora.alpha: llama.cpp then scales by exactly 1, and B carries every scale
        "adapter.type": string("lora"),
        **fold.provenance(),
    }
    path = folder / GGUF.adapter_file
    written = write_gguf(path, metadata, tensors)
    entry = FileEntry(path.name, "adapter", path.stat().st_size, written.sha256)
    return Made(entry, tuple(modules), fold.precision({}), fold.model.shards[0].path)


def _measure_factors(fold: GGUFFold, module: Module, a_stored: Rows, b_stored: Rows) -> Survival:
    meter, order = Meter(Mode.GRID), fold.row_order(module)
    step = max(1, BLOCK_ELEMENTS // module.shape[1])
    for start in range(0, len(order), step):
        rows = slice(start, start + step)
        delta = formula.delta(module, order[rows])
        meter.add(np.zeros_like(delta), delta, formula.product(b_stored[rows], a_stored))
    return meter.result()
