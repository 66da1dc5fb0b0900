"""Presets such as Q4_K_M: libllama's own mix of types, per tensor.

Which tensor of a preset gets which type depends on its role, its layer, the architecture and the
row length. libllama decides, and does the whole work.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safegene_runtime.child import deadline_for, python_command, python_environment, run_child
from safegene_runtime.cpus import usable_cpus
from safegene_runtime.errors import (
    EngineError,
    PostconditionError,
    Problem,
    Problems,
    UnsupportedError,
)
from safegene_runtime.extras import need
from safegene_runtime.formats.gguf.model import open_model
from safegene_runtime.formats.gguf.types import GGMLType
from safegene_runtime.progress import Step

__all__ = ["PRESETS", "Preset", "preset", "quantize_gguf"]

FLOAT_TYPES = frozenset({"F32", "F16", "BF16"})


@dataclass(frozen=True)
class Preset:
    """A file type of llama.cpp.

    Attributes:
        name: lower-case, as on the command line.
        ftype: `enum llama_ftype`, which is also what `general.file_type` holds.
        type: what most tensors become.
    """

    name: str
    ftype: int
    type: GGMLType

    @property
    def is_float(self) -> bool:
        """Whether it quantises nothing."""
        return self.type.name in FLOAT_TYPES


# QUANT_OPTIONS in tools/quantize/quantize.cpp, enum llama_ftype in llama.h and
# llama_ftype_get_default_type in llama-quant.cpp. Without MXFP4_MOE (experts) and NVFP4 (scales).
_TABLE = (
    ("f32", 0, "F32"), ("f16", 1, "F16"), ("bf16", 32, "BF16"),
    ("q4_0", 2, "Q4_0"), ("q4_1", 3, "Q4_1"), ("q5_0", 8, "Q5_0"), ("q5_1", 9, "Q5_1"),
    ("q8_0", 7, "Q8_0"),
    ("q2_k", 10, "Q2_K"), ("q2_k_s", 21, "Q2_K"),
    ("q3_k_s", 11, "Q3_K"), ("q3_k_m", 12, "Q3_K"), ("q3_k_l", 13, "Q3_K"),
    ("q4_k_s", 14, "Q4_K"), ("q4_k_m", 15, "Q4_K"),
    ("q5_k_s", 16, "Q5_K"), ("q5_k_m", 17, "Q5_K"), ("q6_k", 18, "Q6_K"),
    ("iq1_s", 24, "IQ1_S"), ("iq1_m", 31, "IQ1_M"),
    ("iq2_xxs", 19, "IQ2_XXS"), ("iq2_xs", 20, "IQ2_XS"), ("iq2_s", 28, "IQ2_XS"),
    ("iq2_m", 29, "IQ2_S"),
    ("iq3_xxs", 23, "IQ3_XXS"), ("iq3_xs", 22, "IQ3_S"), ("iq3_s", 26, "IQ3_S"),
    ("iq3_m", 27, "IQ3_S"),
    ("iq4_nl", 25, "IQ4_NL"), ("iq4_xs", 30, "IQ4_XS"),
    ("tq1_0", 36, "TQ1_0"), ("tq2_0", 37, "TQ2_0"),
)  # fmt: skip
_ALIASES = {"q3_k": "q3_k_m", "q4_k": "q4_k_m", "q5_k": "q5_k_m"}

PRESETS: dict[str, Preset] = {
    name: Preset(name, ftype, GGMLType[type]) for name, ftype, type in _TABLE
}
"""Every preset by its name, without aliases."""


def preset(name: str) -> Preset:
    """A preset by name, in any case, aliases included (`q4_k` is `q4_k_m`).

    Raises:
        UnsupportedError: no such preset; the message lists them.
    """
    key = name.lower()
    found = PRESETS.get(_ALIASES.get(key, key))
    if found is None:
        raise UnsupportedError(
            Problem("--type", "type", f"auto, keep, {', '.join(PRESETS)}", name, "choose one")
        )
    return found


def quantize_gguf(
    src: Path,
    dst: Path,
    ftype: str,
    imatrix: Path | None = None,
    overrides: Mapping[str, GGMLType] | None = None,
    *,
    progress: Step | None = None,
) -> dict[str, GGMLType]:
    """Quantises a whole float GGUF with `llama_model_quantize`, in a child process.

    Args:
        src: a GGUF file, or the first of its shards, with F32, F16 or BF16 weights only.
        dst: the file to write; one file, also for a sharded source.
        ftype: the name of a preset.
        imatrix: an importance matrix file, for types that need one.
        overrides: types for single tensors, by exact GGUF name.
        progress: told the bytes by which `dst` grows.

    Returns:
        The type of every tensor in `dst`.

    Raises:
        UnsupportedError: no such preset, a source that is quantised already, or overrides for a
            preset that quantises nothing (libllama ignores them there).
        EngineError: libllama failed or aborted; the message ends with what it said.
        PostconditionError: an override was not honoured.
    """
    wanted = preset(ftype)
    for name, info in open_model(src).tensors.items():
        if info.type.name not in FLOAT_TYPES:
            raise UnsupportedError(
                Problem(
                    str(src),
                    name,
                    "F32, F16 or BF16",
                    info.type.name,
                    "presets start from a float base; or use --type keep or auto",
                )
            )
    if overrides and wanted.is_float:
        raise UnsupportedError(
            Problem("--type", "overrides", "a preset that quantises", wanted.name, "drop one")
        )
    job = {
        "src": str(src.resolve()),
        "dst": str(dst.resolve()),
        "ftype": wanted.ftype,
        "imatrix": str(imatrix.resolve()) if imatrix else None,
        "overrides": {name: int(type) for name, type in (overrides or {}).items()},
        "threads": usable_cpus(),
    }
    need("llama_cpp")
    run_child(
        python_command("-m", "safegene_converter.gguf.quantize_child"),
        what=f"llama_model_quantize {src} as {wanted.name}",
        error=EngineError,
        stdin=json.dumps(job).encode(),
        environment=python_environment(),
        deadline_s=deadline_for(src, imatrix),
        grows=dst,
        progress=progress,
    )
    written = {name: info.type for name, info in open_model(dst).tensors.items()}
    problems = Problems()
    for name, type in (overrides or {}).items():
        if written.get(name) is not type:
            problems.add(str(dst), name, type.name, getattr(written.get(name), "name", "no tensor"))
    problems.raise_if_any(PostconditionError)
    return written
