"""An exported graph proved against its base; a rounded one by its twin in fp32.

What rounding to half width or to few bits adds to the KL depends on the model, and may be more than a mistake
adds. So of a small base that is exported with less than fp32 the same builder makes the fp32 graph, too. That
one is held to the logits of the base, and the rounded graph to the twin: the same products in the same order,
every weight within its rounding, every other constant (norms, biases, rotary caches) the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from safegene_converter.bases.onnx_build import build_onnx
from safegene_converter.bases.proof import (
    F32_BYTES,
    gguf_side,
    onnx_side,
    prove_base,
    reach_of,
    torch_side,
)
from safegene_converter.inputs.base import Base
from safegene_converter.inputs.onnx_base import OnnxBase
from safegene_runtime.artifact.base_proof import BaseProof
from safegene_runtime.artifact.onnx_checks import precision_class
from safegene_runtime.errors import BaseModelError, Problems
from safegene_runtime.formats.onnx.file import OnnxFile, read_onnx
from safegene_runtime.formats.onnx.linear import linears, read_weight, to_float32
from safegene_runtime.formats.onnx.tensor import DataType, Initializer, read_initializer
from safegene_runtime.progress import Progress

__all__ = ["check_twin", "prove_export"]

STAGE = "exporting the base in fp32, for the proof"
WEIGHT_ERROR_MAX = 0.5
"""The right weight leaves the rounding of its type (0.1 for 4 bits), a wrong one about 1.4."""
CONSTANT_ERROR_MAX = 1e-2
"""Of constants that are stored as floats: bfloat16 rounds by 4e-3."""
_FLOATS = (DataType.FLOAT, DataType.FLOAT16, DataType.BFLOAT16)
_REPORT = "the builder made two graphs of one base: please report this"


def prove_export(
    given: Base,
    hf: Base,
    made: OnnxBase,
    work: Path,
    tell: Progress,
    options: Sequence[str] = (),
) -> BaseProof:
    """Proves that ONNX Runtime answers with an exported graph as the base does in its own engine.

    Args:
        given: the folder or the GGUF; the folder made of a GGUF on the way is no witness.
        hf: the folder that was exported.
        made: the graph.
        work: a folder for the twin.
        tell: told how far it is.
        options: KEY=VALUE options of the builder that the graph was made with.

    Raises:
        BaseModelError: it does not.
    """
    precision, model = precision_class(made.model), made.model
    why = ""
    if precision != "f32" and 4 * given.n_parameters <= F32_BYTES:
        tell(STAGE, 0, 1)
        build_onnx(hf.path, work / "twin", "fp32", options=options)
        model = read_onnx(work / "twin" / made.model.path.name)
        check_twin(model, made.model, hf)
        tell(STAGE, 1, 1)
        why, precision = (
            f"fp32 twin of the {precision} graph, whose constants are its own rounded; ",
            "f32",
        )
    source = torch_side(given.path) if given.model is None else gguf_side(given.model)[0]
    proof = prove_base(
        source, onnx_side(model.path), precision=precision, reach=reach_of(given),
        where=f"{given.path}: the onnxruntime-genai builder", tell=tell, why=why,
    )  # fmt: skip
    shutil.rmtree(work / "twin", ignore_errors=True)
    return proof


def check_twin(twin: OnnxFile, made: OnnxFile, hf: Base) -> None:
    """Holds a rounded graph to its twin in fp32, constant by constant.

    Args:
        twin: the fp32 graph.
        made: the rounded one.
        hf: the folder of both, for constants that only the rounded one has.

    Raises:
        BaseModelError: another constant than rounding explains, all of them.
    """
    problems, where = Problems(), str(made.path)
    ours, theirs = linears(made), linears(twin)
    names = [[(one.name.removesuffix("_Q4").removesuffix("_Q8"), one.shape) for one in found.stored]
             for found in (ours, theirs)]  # fmt: skip
    if names[0] != names[1] or ours.unread or theirs.unread:
        odd = sorted(set(names[0]) ^ set(names[1]))[:3] or [one.name for one in ours.unread][:3]
        problems.add(where, "products", "those of the fp32 graph", f"{odd}", _REPORT)
        problems.raise_if_any(BaseModelError)
    for one, other in zip(ours.stored, theirs.stored, strict=True):
        error = _error(read_weight(made, one), read_weight(twin, other))
        if not error <= WEIGHT_ERROR_MAX:
            problems.add(where, one.name, "the weight of the fp32 graph, rounded",
                         f"relative error {error:.2g}", _REPORT)  # fmt: skip
    weights = {one.weight.name for one in (*ours.stored, *theirs.stored)}
    for name, info in twin.initializers.items():
        if name in weights or info.dtype not in _FLOATS:
            continue
        stored = made.initializers.get(name)
        if stored is None or stored.dtype not in _FLOATS or stored.shape != info.shape:
            got = "none" if stored is None else f"{stored.dtype.name} {stored.shape}"
            problems.add(where, name, f"the constant of the fp32 graph, {info.shape}", got, _REPORT)
        elif not (error := _error(_values(stored), _values(info))) <= CONSTANT_ERROR_MAX:
            problems.add(where, name, "the constant of the fp32 graph", f"relative error {error:.2g}",
                         _REPORT)  # fmt: skip
    for name in sorted((made.initializers.keys() - twin.initializers.keys()) - weights):
        stored = made.initializers[name]
        if stored.dtype in _FLOATS and any(name in file.tensors for file in hf.weights):
            file = next(file for file in hf.weights if name in file.tensors)
            error = _error(_values(stored), file.read_float32(name))
            if not error <= CONSTANT_ERROR_MAX:
                problems.add(where, name, "the weight of the folder", f"relative error {error:.2g}",
                             _REPORT)  # fmt: skip
    problems.raise_if_any(BaseModelError)


def _values(info: Initializer) -> npt.NDArray[np.float32]:
    return to_float32(read_initializer(info), info.dtype)


def _error(ours: npt.NDArray[np.float32], theirs: npt.NDArray[np.float32]) -> float:
    """||ours - theirs|| / ||theirs||, a block of rows at a time; infinite for other shapes."""
    if ours.shape != theirs.shape:
        return float("inf")
    error = norm = 0.0
    step = max(1, (1 << 20) // max(1, ours[:1].size))
    for at in range(0, len(ours), step):
        one = ours[at : at + step].astype(np.float64)
        other = theirs[at : at + step].astype(np.float64)
        error, norm = error + float(((one - other) ** 2).sum()), norm + float((other**2).sum())
    return float(np.sqrt(error / norm)) if norm else float(error > 0)
