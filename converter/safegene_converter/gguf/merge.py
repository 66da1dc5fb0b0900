"""A merged GGUF: each touched tensor decoded, changed, encoded, measured, and promoted if need be.

Memory: a few touched tensors at a time are handled a few rows at a time, and their encoded bytes go
to spool files, so the peak does not depend on the size of the model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from safegene_converter import formula
from safegene_converter.encoding import ggml_quantizer
from safegene_converter.fold.manifest_lines import module_entry
from safegene_converter.fold.survival import Meter, Mode, Survival, candidates, passes
from safegene_converter.gguf.fold import (
    BLOCK_ELEMENTS,
    GGUFFold,
    Made,
    Rows,
    figures,
    starts_from_float,
    string,
    within,
)
from safegene_converter.gguf.presets import PRESETS, preset, quantize_gguf
from safegene_converter.gguf.writer import OutTensor, write_gguf
from safegene_converter.inputs.adapter import Module
from safegene_runtime.artifact.forms import GGUF
from safegene_runtime.artifact.manifest import FileEntry
from safegene_runtime.cpus import usable_cpus
from safegene_runtime.errors import (
    BaseModelError,
    Problem,
    Problems,
    SurvivalError,
    UnsupportedError,
)
from safegene_runtime.formats import ggml
from safegene_runtime.formats.gguf.header import TensorInfo
from safegene_runtime.formats.gguf.model import GGUFModel, open_model
from safegene_runtime.formats.gguf.tensors import map_tensor
from safegene_runtime.formats.gguf.types import GGMLType, Value, ValueType, nbytes, type_traits
from safegene_runtime.formats.gguf.weights import elements_by_type
from safegene_runtime.progress import Progress, counted

__all__ = ["write_merged"]

QUANTISED_FILE = "quantised.gguf"
ENCODERS = 4
"""Tensors encoded at a time: each holds some ten operands."""


@dataclass(frozen=True)
class Stored:
    """One touched tensor, encoded: where its bytes are and what they are worth."""

    info: TensorInfo
    sha256: str
    survival: Survival
    type_before: GGMLType
    bytes_before: int


def write_merged(fold: GGUFFold, folder: Path, work: Path, tell: Progress) -> Made:
    """Writes `model.gguf` into `folder`; `work` is for what is thrown away afterwards.

    Raises:
        SurvivalError: the deltas that do not survive in a type that may be chosen, all of them.
        UnsupportedError: a type that needs an imatrix which is not there.
    """
    model, file_type = fold.model, None
    if starts_from_float(fold.base, fold.type_name):
        model = _quantise_base(fold, work / QUANTISED_FILE, tell)
        file_type = preset(fold.type_name).ftype
    source = model.tensors
    metadata = {key: value for key, value in model.metadata.items() if not key.startswith("split.")}
    stored = _encode_touched(fold, source, work / "spool", tell)
    tensors = [
        OutTensor(name, info.shape, stored[name].info.type, stored[name].info)
        if name in stored
        else OutTensor(name, info.shape, info.type, info)
        for name, info in source.items()
    ]
    metadata["general.name"] = string(f"{fold.base.name} + SafeGene")
    metadata["general.file_type"] = Value(
        ValueType.UINT32, _file_type(tensors, source, metadata, file_type), None
    )
    if any(type_traits(tensor.type)[0] > 1 for tensor in tensors):
        metadata.setdefault("general.quantization_version", Value(ValueType.UINT32, 2, None))
    metadata.update(fold.provenance())
    path = folder / str(GGUF.model_file)
    total = sum(nbytes(tensor.shape, tensor.type) for tensor in tensors)
    step = counted(tell, "writing the model", total)
    written = write_gguf(path, metadata, tensors, progress=step)
    modules = []
    for module in fold.adapter.modules:
        name = fold.tensor(module)
        one = stored[name]
        modules.append(
            module_entry(
                module,
                name,
                one.type_before.name,
                one.info.type.name,
                one.bytes_before,
                one.info.nbytes,
                one.sha256,
                one.survival,
            )
        )
    entry = FileEntry(path.name, "model", path.stat().st_size, written.sha256)
    types = {tensor.name: tensor.type for tensor in tensors}
    added = [
        one.info.nbytes - nbytes(one.info.shape, wanted)
        for name, one in stored.items()
        if one.info.type is not (wanted := _wanted(fold, source[name]))
    ]
    promoted = {"tensors": len(added), "bytes_added": sum(added)}
    return Made(entry, tuple(modules), fold.precision(types), model.shards[0].path, promoted)


def _quantise_base(fold: GGUFFold, target: Path, tell: Progress) -> GGUFModel:
    """Quantises the base as it is; touched tensors are replaced afterwards, the rest is final.

    Which type a tensor gets does not depend on its values, so the mix is upstream's, and the touched
    tensors give the base's own quantisation error for free.
    """
    first = fold.model.shards[0].path
    total = sum(info.nbytes for info in fold.model.tensors.values())
    step = counted(tell, "quantising", total)
    quantize_gguf(first, target, fold.type_name, fold.imatrix_path, progress=step)
    return open_model(target)


def _encode_touched(
    fold: GGUFFold, source: Mapping[str, TensorInfo], spool: Path, tell: Progress
) -> dict[str, Stored]:
    """Encodes every touched tensor into a file of its own in `spool`, several at a time.

    Tensors out of bounds are promoted or refused.
    """
    stored: dict[str, Stored] = {}
    problems = Problems()
    spool.mkdir()

    def one(index: int) -> Stored:
        module = fold.adapter.modules[index]
        return _encode_one(fold, module, source[fold.tensor(module)], spool / str(index))

    with ThreadPoolExecutor(min(ENCODERS, usable_cpus()), "encode") as pool:
        waiting = [pool.submit(one, index) for index in range(len(fold.adapter.modules))]
        for done, (module, future) in enumerate(zip(fold.adapter.modules, waiting, strict=True)):
            try:
                stored[fold.tensor(module)] = future.result()
            except SurvivalError as error:
                problems.extend(error.problems)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            tell("merging", done + 1, len(waiting))
    problems.raise_if_any(SurvivalError)
    return stored


def _encode_one(fold: GGUFFold, module: Module, now: TensorInfo, target: Path) -> Stored:
    """Tries types, cheapest first, until the delta survives; leaves the bytes in `target`.

    `now` is the tensor as the untouched artifact would have it: in the base, or in the quantised
    base when a float base is quantised once.
    """
    original = fold.model.tensors[now.name]
    once = now.path != original.path
    n_cols = now.shape[1]
    wanted = _wanted(fold, now)
    if not ggml_quantizer.can_encode(wanted, n_cols):
        raise SurvivalError(
            Problem(
                now.name,
                "type",
                f"a type for rows of {n_cols}",
                wanted.name,
                "choose --type auto or q8_0",
            )
        )
    trials = candidates(wanted, n_cols) if fold.promote else (wanted,)
    tried: list[str] = []
    for kind in trials:
        if ggml_quantizer.requires_imatrix(kind) and now.name not in fold.imatrix:
            raise UnsupportedError(
                Problem(
                    now.name, "imatrix", f"weights for {kind.name}", "none", "pass --imatrix FILE"
                )
            )
        digest = hashlib.sha256()
        meter = Meter(Mode.ONCE if once else Mode.GRID)
        size = 0
        try:
            with target.open("wb") as file:
                for base, delta, own in _row_blocks(fold, module, original, kind, once):
                    weights = fold.imatrix.get(now.name)
                    encoded = ggml_quantizer.quantize(base + delta, kind, weights, threads=1)
                    back = ggml.dequantize(encoded, kind, base.shape, threads=1)
                    meter.add(base, delta, back, own)
                    digest.update(encoded)  # type: ignore[arg-type]
                    size += file.write(encoded)  # type: ignore[arg-type]
        except ggml_quantizer.OutOfRangeError:
            tried.append(f"{kind.name}: a number that it cannot represent")
            continue
        survival = meter.result()
        if passes(survival, fold.bounds):
            info = TensorInfo(
                name=now.name, shape=now.shape, type=kind, offset=0, nbytes=size, path=target
            )
            return Stored(info, digest.hexdigest(), survival, original.type, original.nbytes)
        tried.append(f"{kind.name}: {figures(survival)}")
    raise SurvivalError(
        Problem(
            now.name,
            "survival",
            within(fold.bounds),
            "; ".join(tried),
            _what_helps(fold),
        )
    )


def _wanted(fold: GGUFFold, now: TensorInfo) -> GGMLType:
    """The type of a touched tensor before anything is promoted."""
    quantised = starts_from_float(fold.base, fold.type_name)
    return (
        now.type if quantised or fold.type_name in ("keep", "auto") else preset(fold.type_name).type
    )


def _what_helps(fold: GGUFFold) -> str:
    """The next step where a delta does not survive."""
    if fold.promote:
        return "use --as sidecar"
    if fold.type_name == "keep":
        return "use --type auto to promote just the tensors that need it, or --as sidecar"
    return (
        "pass --promote, which gives just these tensors a wider type, choose a wider --type, or use "
        "--as sidecar"
    )


def _row_blocks(
    fold: GGUFFold, module: Module, original: TensorInfo, kind: GGMLType, once: bool
) -> Iterator[tuple[Rows, Rows, Rows | None]]:
    """(W_base, dW, Q(W_base) or None) for a few rows at a time, each (rows, in) float32."""
    order = fold.row_order(module)
    n_rows, n_cols = original.shape
    raw = map_tensor(original)
    row_bytes = original.nbytes // n_rows
    step = max(1, BLOCK_ELEMENTS // n_cols)
    for start in range(0, n_rows, step):
        stop = min(n_rows, start + step)
        part = np.asarray(raw).reshape(-1)[start * row_bytes : stop * row_bytes]
        base = ggml.dequantize(part, original.type, (stop - start, n_cols), threads=1)
        if not np.isfinite(base).all():
            got, fix = "NaN or Inf", "the base is damaged: get it again"
            raise BaseModelError(
                Problem(str(original.path), original.name, "finite numbers", got, fix)
            )
        own = None
        if once:
            encoded = ggml_quantizer.quantize(
                base, kind, fold.imatrix.get(original.name), threads=1
            )
            own = ggml.dequantize(encoded, kind, base.shape, threads=1)
        yield base, formula.delta(module, order[start:stop]), own


_PLAIN_FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q8_0": 7,
    "Q2_K": 21,
    "Q3_K": 11,
    "Q4_K": 14,
    "Q5_K": 16,
    "Q6_K": 18,
}
"""`enum llama_ftype` for a file that mostly holds one type (the `_S` mix for K-quants)."""


def _file_type(
    tensors: Sequence[OutTensor],
    source: Mapping[str, TensorInfo],
    metadata: Mapping[str, Value],
    chosen: int | None,
) -> int:
    """`general.file_type` that is true: of the type which most weights have.

    The base's own value, or the preset's, stays where its main type still is the main type.
    """
    main = _main_type(tensors)
    if chosen is not None and main == _main_type(list(source.values())):
        return chosen
    value = metadata["general.file_type"].value if "general.file_type" in metadata else 0
    before = chosen if chosen is not None else value if isinstance(value, int) else 0
    return before if _main_type_of(before) == main else _PLAIN_FILE_TYPES.get(main, before)


def _main_type(tensors: Sequence[OutTensor | TensorInfo]) -> str:
    """What most weights of the blocks are stored as."""
    elements = elements_by_type(tensors)
    return max(elements, key=lambda name: (elements[name], name)) if elements else "F32"


def _main_type_of(file_type: int) -> str | None:
    return next((one.type.name for one in PRESETS.values() if one.ftype == file_type), None)
