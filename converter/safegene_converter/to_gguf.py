"""Folding an adapter into GGUF: a sidecar beside the base, or merged into the weights.

    adapter + base -> Job (checked, nothing written yet)
      sidecar: factors with every scale baked into B          -> adapter.gguf
      merged:  each touched tensor: decode, add dW, encode, measure, promote if need be
               untouched tensors: copied in the kernel        -> model.gguf
    -> self-check in a child process -> manifest.json -> one rename

Memory: a few touched tensors at a time are handled a few rows at a time, and their encoded bytes go
to spool files, so the peak does not depend on the size of the model.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from safegene_converter import formula, ggml
from safegene_converter.adapter import Adapter, Module, check_base_fits, read_adapter
from safegene_converter.base import FLOAT_TYPES, Base, open_base
from safegene_converter.gguf_writer import OutTensor, Written, write_gguf
from safegene_converter.hashing import digesting
from safegene_converter.hf_to_gguf import convert_hf
from safegene_converter.imatrix import read_imatrix
from safegene_converter.manifest_lines import module_entry
from safegene_converter.names import prove_transform
from safegene_converter.presets import Preset, preset, quantize_gguf
from safegene_converter.progress import Progress
from safegene_converter.selfcheck import check_artifact
from safegene_converter.survival import Bounds, Meter, Mode, Survival, candidates, passes
from safegene_runtime import __version__
from safegene_runtime.bounds import precision_of
from safegene_runtime.errors import (
    BaseModelError,
    Problem,
    Problems,
    SurvivalError,
    UnsupportedError,
)
from safegene_runtime.files import (
    MANIFEST_NAME,
    check_output_free,
    publish_folder,
    sha256_file,
    sha256_of,
)
from safegene_runtime.gguf import (
    GGMLType,
    GGUFModel,
    TensorInfo,
    Value,
    ValueType,
    map_tensor,
    nbytes,
    open_model,
    read_gguf,
    type_traits,
)
from safegene_runtime.manifest import FileEntry, Manifest, ModuleEntry
from safegene_runtime.provenance import ADAPTER_KEY, adapter_digest

__all__ = ["ADAPTER_FILE", "MODEL_FILE", "SIDECAR_TYPES", "convert"]

MODEL_FILE = "model.gguf"
ADAPTER_FILE = "adapter.gguf"
QUANTISED_FILE = "quantised.gguf"
SIDECAR_TYPES = ("f32", "f16", "bf16", "q8_0")
BLOCK_ELEMENTS = 2 << 20
"""Elements of a touched tensor in memory at a time: 8 MiB per float32 operand."""
ENCODERS = 4
"""Tensors encoded at a time: each holds some ten operands."""
TRANSFORM_ERROR_MAX = 0.5
"""A right row order leaves the rounding of the type (0.1 for 4 bits), a wrong one about 1.4."""

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Stored:
    """One touched tensor, encoded: where its bytes are and what they are worth."""

    info: TensorInfo
    sha256: str
    survival: Survival
    type_before: GGMLType
    bytes_before: int


@dataclass
class Job:
    """A checked request; everything that can be refused without reading weights was."""

    adapter: Adapter
    base: Base
    form: Literal["merged", "sidecar"]
    type_name: str
    bounds: Bounds
    promote: bool
    imatrix_path: Path | None
    imatrix: Mapping[str, Rows] = field(default_factory=dict)

    def tensor(self, module: Module) -> str:
        """The GGUF tensor of a module."""
        return self.base.tensor_name(module.name)

    def factors(self, module: Module) -> tuple[Rows, Rows]:
        """(A (r, in), scaled B (out, r) in the row order of the GGUF)."""
        return module.a, self.base.transform(module.name).apply_rows(formula.scaled_b(module))


def convert(
    adapter_path: Path,
    base_path: Path,
    out: Path,
    *,
    form: Literal["merged", "sidecar"],
    type_name: str = "auto",
    expression: str | None = None,
    bounds: Bounds | None = None,
    promote: bool | None = None,
    imatrix: Path | None = None,
    llama_cpp: Path | None = None,
    force: bool = False,
    check: bool = True,
    progress: Progress | None = None,
) -> Manifest:
    """Converts an adapter to a GGUF artifact.

    Args:
        adapter_path: the adapter folder.
        base_path: a GGUF file (or its first shard), or a Hugging Face folder.
        out: the folder to create.
        form: `merged` or `sidecar`.
        type_name: `auto` (keep types, promote what would lose the delta), `keep` (refuse instead),
            or a type or preset of llama.cpp.
        expression: which set of layer coefficients; the adapter's default when None.
        bounds: what counts as surviving.
        promote: promote tensors out of bounds instead of refusing; None: for `auto` and presets
            that mix types.
        imatrix: an importance matrix for the types that want one.
        llama_cpp: a llama.cpp source tree, for a Hugging Face base.
        force: replace an existing `out`.
        check: re-open the result in a child process and compare it with what was meant.
        progress: told what is being done.

    Raises:
        SafeGeneError: one of its kinds; nothing is left under the name `out`.
    """
    tell: Progress = progress or (lambda stage, done, total: None)
    check_output_free(out, force)
    adapter = read_adapter(adapter_path, expression)
    base = given = open_base(base_path)
    check_base_fits(adapter, base.module_shapes(), base.architecture, base.n_layers)
    type_name = type_name.lower()
    _check_request(form, type_name, base)
    with publish_folder(out, force) as folder, digesting(base) as digests:
        work = folder / ".work"
        work.mkdir()
        settings: dict[str, Any] = {"type": type_name}
        if base.kind == "hf":
            hf_base = base
            base = _from_hugging_face(base, work, llama_cpp, tell)
            settings["transform_error"] = _prove_transforms(adapter, hf_base, base)
        mixes = type_name not in ("keep", "auto") and _starts_from_float(base, type_name)
        job = Job(
            adapter=adapter,
            base=base,
            form=form,
            type_name=type_name,
            bounds=bounds or Bounds(),
            promote=(type_name == "auto" or mixes) if promote is None else promote,
            imatrix_path=imatrix,
            imatrix=read_imatrix(imatrix) if imatrix else {},
        )
        if imatrix:
            settings["imatrix_sha256"] = sha256_file(imatrix.resolve())
        write = _write_sidecar if form == "sidecar" else _write_merged
        files, modules, precision = write(job, folder, work, tell)
        if form == "merged":
            settings["promote"] = job.promote
        settings["bounds"] = vars(job.bounds) if form == "merged" else None
        if check:
            tell("checking what was written", 0, 1)
            settings["self_check"] = _check(job, folder, work, files[0])
            tell("checking what was written", 1, 1)
        template = base.model.metadata.get("tokenizer.chat_template") if base.model else None
        manifest = Manifest(
            tool={"name": "safegene", "version": __version__},
            artifact={
                "target": "gguf",
                "form": form,
                "architecture": base.architecture,
                "name": base.name,
                "precision": precision,
            },
            base={
                "kind": given.kind,
                "name": Path(base_path).resolve().name,
                "files": digests.result(),
            },
            adapter={
                "name": Path(adapter_path).resolve().name,
                "files": dict(adapter.digests),
                "expression": adapter.expression,
                "n_parameters": adapter.n_parameters,
            },
            tokenizer={
                "chat_template_sha256": sha256_of(
                    str(template.value).encode("utf-8", "surrogateescape")
                )
                if template
                else None
            },
            settings=settings,
            files=tuple(files),
            modules=tuple(modules),
        )
        shutil.rmtree(work)
        (folder / MANIFEST_NAME).write_bytes(manifest.to_json())
    return manifest


def _check_request(form: str, type_name: str, base: Base) -> None:
    """Refuses combinations that mean nothing, before any work."""
    problems = Problems()
    if form == "sidecar":
        if base.kind != "gguf":
            problems.add(
                str(base.path),
                "--base",
                "the GGUF that the sidecar is loaded beside",
                "a Hugging Face folder",
                "convert the base to GGUF first, or use --as merged",
            )
        if type_name not in ("auto", *SIDECAR_TYPES):
            problems.add(
                "--type",
                "type of a sidecar",
                f"auto or one of {', '.join(SIDECAR_TYPES)}",
                type_name,
                "leave --type out: f32 is the default",
            )
    elif form == "merged":
        if type_name not in ("auto", "keep"):
            wanted = preset(type_name)
            if not base.is_float and not _is_pure(wanted):
                problems.add(
                    "--type",
                    "type",
                    "auto, keep or a plain type such as q8_0",
                    f"the preset {type_name} on a base that is quantised already",
                    "presets quantise a whole float model: pass a Hugging Face folder or an "
                    "F32/F16/BF16 GGUF as --base",
                )
    else:
        problems.add("--as", "form", "merged or sidecar", form, "choose one")
    problems.raise_if_any(UnsupportedError)


def _is_pure(wanted: Preset) -> bool:
    return wanted.name == wanted.type.name.lower()


def _starts_from_float(base: Base, type_name: str) -> bool:
    return base.is_float and type_name not in ("auto", "keep")


def _from_hugging_face(base: Base, work: Path, llama_cpp: Path | None, tell: Progress) -> Base:
    """The same model as a GGUF in its own float type, by llama.cpp's converter."""
    kinds = {info.dtype for file in base.weights for info in file.tensors.values()}
    outtype = {frozenset({"F16"}): "f16", frozenset({"BF16"}): "bf16"}.get(frozenset(kinds), "f32")
    target = work / "base.gguf"
    size, total, done = {"f32": 4}.get(outtype, 2), 0, 0
    total = base.n_parameters * size

    def step(count: int) -> None:
        nonlocal done
        done += count
        tell("converting the base to GGUF", min(done, total), total)

    convert_hf(base.path, target, outtype, llama_cpp, progress=step)
    return open_base(target)


def _prove_transforms(adapter: Adapter, hf_base: Base, base: Base) -> float:
    """Proves on the weights that each touched tensor is the module's, rows in the order we assume.

    Returns:
        the largest relative error, 0 when the converted base is lossless.
    """
    problems = Problems()
    worst = 0.0
    for module in adapter.modules:
        error = prove_transform(
            hf_base.read_weight(module.name),
            base.read_weight(module.name),
            base.transform(module.name),
        )
        worst = max(worst, error)
        if error > TRANSFORM_ERROR_MAX:
            problems.add(
                str(base.path),
                base.tensor_name(module.name),
                "the rows of the Hugging Face weight in the order we assume",
                f"relative error {error:.2f}",
                "this llama.cpp orders rows differently: please report it",
            )
    problems.raise_if_any(BaseModelError)
    return worst


# --- sidecar ---------------------------------------------------------------------------------------


def _write_sidecar(
    job: Job, folder: Path, work: Path, tell: Progress
) -> tuple[list[FileEntry], list[ModuleEntry], str]:
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
                    _within(job.bounds),
                    _figures(survival),
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
        "general.architecture": _string(job.base.architecture),
        "general.type": _string("adapter"),
        "general.name": _string(job.adapter.path.resolve().name),
        # no adapter.lora.alpha: llama.cpp then scales by exactly 1, and B carries every scale
        "adapter.type": _string("lora"),
        **_provenance(job),
    }
    path = folder / ADAPTER_FILE
    written = write_gguf(path, metadata, tensors)
    return (
        [_file_entry(path, "adapter", written)],
        modules,
        precision_of(_block_types(job.base, {})),
    )


def _measure_factors(a: Rows, b: Rows, a_stored: Rows, b_stored: Rows) -> Survival:
    meter = Meter(Mode.GRID)
    step = max(1, BLOCK_ELEMENTS // a.shape[1])
    for start in range(0, len(b), step):
        rows = slice(start, start + step)
        delta, stored = b[rows] @ a, b_stored[rows] @ a_stored
        meter.add(np.zeros_like(delta), delta, stored)
    return meter.result()


# --- merged ----------------------------------------------------------------------------------------


def _write_merged(
    job: Job, folder: Path, work: Path, tell: Progress
) -> tuple[list[FileEntry], list[ModuleEntry], str]:
    model = _headers(job.base)
    source, file_type = model.tensors, None
    metadata = {key: value for key, value in model.metadata.items() if not key.startswith("split.")}
    if _starts_from_float(job.base, job.type_name):
        wanted = preset(job.type_name)
        quantised = _quantise_base(job, work / QUANTISED_FILE, tell)
        source, file_type = quantised.tensors, wanted.ftype
        metadata = {k: v for k, v in quantised.metadata.items() if not k.startswith("split.")}
    stored = _encode_touched(job, source, work / "spool", tell)
    tensors = [
        OutTensor(name, info.shape, stored[name].info.type, stored[name].info)
        if name in stored
        else OutTensor(name, info.shape, info.type, info)
        for name, info in source.items()
    ]
    metadata["general.name"] = _string(f"{job.base.name} + SafeGene")
    metadata["general.file_type"] = Value(
        ValueType.UINT32, _file_type(tensors, metadata, file_type), None
    )
    if any(type_traits(tensor.type)[0] > 1 for tensor in tensors):
        metadata.setdefault("general.quantization_version", Value(ValueType.UINT32, 2, None))
    metadata.update(_provenance(job))
    path = folder / MODEL_FILE
    total, done = sum(nbytes(tensor.shape, tensor.type) for tensor in tensors), 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        tell("writing the model", min(done, total), total)

    written = write_gguf(path, metadata, tensors, progress=step)
    modules = []
    for module in job.adapter.modules:
        name = job.tensor(module)
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
    types = _block_types(job.base, {tensor.name: tensor.type for tensor in tensors})
    return [_file_entry(path, "model", written)], modules, precision_of(types)


def _quantise_base(job: Job, target: Path, tell: Progress) -> Any:
    """Quantises the base as it is; touched tensors are replaced afterwards, the rest is final.

    Which type a tensor gets does not depend on its values, so the mix is upstream's, and the touched
    tensors give the base's own quantisation error for free.
    """
    model = _headers(job.base)
    first = model.shards[0].path
    total, done = sum(info.nbytes for info in model.tensors.values()), 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        tell("quantising", min(done, total), total)

    quantize_gguf(first, target, job.type_name, job.imatrix_path, progress=step)
    return open_model(target)


def _encode_touched(
    job: Job, source: Mapping[str, TensorInfo], spool: Path, tell: Progress
) -> dict[str, Stored]:
    """Encodes every touched tensor into a file of its own in `spool`, several at a time.

    Tensors out of bounds are promoted or refused.
    """
    stored: dict[str, Stored] = {}
    problems = Problems()
    spool.mkdir()

    def one(index: int) -> Stored:
        module = job.adapter.modules[index]
        return _encode_one(job, module, source[job.tensor(module)], spool / str(index))

    with ThreadPoolExecutor(min(ENCODERS, ggml.default_threads()), "encode") as pool:
        waiting = [pool.submit(one, index) for index in range(len(job.adapter.modules))]
        for done, (module, future) in enumerate(zip(job.adapter.modules, waiting, strict=True)):
            try:
                stored[job.tensor(module)] = future.result()
            except SurvivalError as error:
                problems.extend(error.problems)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
            tell("merging", done + 1, len(waiting))
    problems.raise_if_any(SurvivalError)
    return stored


def _encode_one(job: Job, module: Module, now: TensorInfo, target: Path) -> Stored:
    """Tries types, cheapest first, until the delta survives; leaves the bytes in `target`.

    `now` is the tensor as the untouched artifact would have it: in the base, or in the quantised
    base when a float base is quantised once.
    """
    original = _headers(job.base).tensors[now.name]
    once = now.path != original.path
    n_cols = now.shape[1]
    wanted = now.type
    if not once and job.type_name not in ("keep", "auto"):
        wanted = preset(job.type_name).type
    if not ggml.can_encode(wanted, n_cols):
        raise SurvivalError(
            Problem(
                now.name,
                "type",
                f"a type for rows of {n_cols}",
                wanted.name,
                "choose --type auto or q8_0",
            )
        )
    trials = candidates(wanted, n_cols) if job.promote else (wanted,)
    tried: list[str] = []
    for kind in trials:
        if ggml.requires_imatrix(kind) and now.name not in job.imatrix:
            raise UnsupportedError(
                Problem(
                    now.name, "imatrix", f"weights for {kind.name}", "none", "pass --imatrix FILE"
                )
            )
        digest = hashlib.sha256()
        meter = Meter(Mode.ONCE if once else Mode.GRID)
        size = 0
        with target.open("wb") as file:
            for base, delta, own in _row_blocks(job, module, original, kind, once):
                encoded = ggml.quantize(base + delta, kind, _imatrix_for(job, now.name), threads=1)
                back = ggml.dequantize(encoded, kind, base.shape, threads=1)
                meter.add(base, delta, back, own)
                digest.update(encoded)  # type: ignore[arg-type]
                size += file.write(encoded)  # type: ignore[arg-type]
        survival = meter.result()
        if passes(survival, job.bounds):
            info = TensorInfo(
                name=now.name, shape=now.shape, type=kind, offset=0, nbytes=size, path=target
            )
            return Stored(info, digest.hexdigest(), survival, original.type, original.nbytes)
        tried.append(f"{kind.name}: {_figures(survival)}")
    raise SurvivalError(
        Problem(
            now.name,
            "survival",
            _within(job.bounds),
            "; ".join(tried),
            "use --type auto to promote just the tensors that need it, or --as sidecar",
        )
    )


def _row_blocks(
    job: Job, module: Module, original: TensorInfo, kind: GGMLType, once: bool
) -> Iterator[tuple[Rows, Rows, Rows | None]]:
    """(W_base, dW, Q(W_base) or None) for a few rows at a time, each (rows, in) float32."""
    a, b = job.factors(module)
    n_rows, n_cols = original.shape
    raw = map_tensor(original)
    row_bytes = original.nbytes // n_rows
    step = max(1, BLOCK_ELEMENTS // n_cols)
    for start in range(0, n_rows, step):
        stop = min(n_rows, start + step)
        part = np.asarray(raw).reshape(-1)[start * row_bytes : stop * row_bytes]
        base = ggml.dequantize(part, original.type, (stop - start, n_cols), threads=1)
        own = None
        if once:
            encoded = ggml.quantize(base, kind, _imatrix_for(job, original.name), threads=1)
            own = ggml.dequantize(encoded, kind, base.shape, threads=1)
        yield base, b[start:stop] @ a, own


def _imatrix_for(job: Job, name: str) -> Rows | None:
    return job.imatrix.get(name)


def _check(job: Job, folder: Path, work: Path, written: FileEntry) -> dict[str, Any]:
    """The postcondition, in a child process; a merged model is compared with an F32 sidecar."""
    model = _headers(job.base)
    path = folder / written.path
    base, sidecar = model.shards[0].path, path
    if job.form == "merged":
        oracle = work / "oracle"
        oracle.mkdir()
        as_sidecar = dataclasses.replace(job, form="sidecar", type_name="f32")
        _write_sidecar(as_sidecar, oracle, work, lambda stage, done, total: None)
        sidecar = oracle / ADAPTER_FILE
        if (work / QUANTISED_FILE).exists():
            base = work / QUANTISED_FILE
    header = read_gguf(path)
    tensors = {name: [info.type.name, list(info.shape)] for name, info in header.tensors.items()}
    return check_artifact(
        base,
        path if job.form == "merged" else None,
        sidecar,
        job.adapter,
        {
            "tensors": tensors,
            "is_float": job.form == "sidecar"
            or all(info.type.name in FLOAT_TYPES for info in header.tensors.values()),
        },
    )


# --- small pieces ----------------------------------------------------------------------------------


def _headers(base: Base) -> GGUFModel:
    """The GGUF headers of a base; a Hugging Face folder has been converted by now."""
    if base.model is None:
        raise BaseModelError(Problem(str(base.path), "base", "GGUF headers", "none"))
    return base.model


def _file_entry(path: Path, role: str, written: Written) -> FileEntry:
    return FileEntry(path.name, role, path.stat().st_size, written.sha256)


def _string(text: str) -> Value:
    return Value(ValueType.STRING, text, None)


def _provenance(job: Job) -> dict[str, Value]:
    """`safegene.*` keys: what a reader of the single file can learn without the manifest."""
    return {
        "safegene.version": _string(__version__),
        "safegene.form": _string(job.form),
        "safegene.expression": _string(job.adapter.expression),
        ADAPTER_KEY: _string(adapter_digest(job.adapter.digests)),
        "safegene.modules": Value(ValueType.UINT32, len(job.adapter.modules), None),
    }


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
    tensors: Sequence[OutTensor], metadata: Mapping[str, Value], chosen: int | None
) -> int:
    """`general.file_type` that is true: of the type which most weights have.

    The base's own value stays where the base's main type still is the main type.
    """
    if chosen is not None:
        return chosen
    elements: dict[str, int] = {}
    for tensor in tensors:
        if len(tensor.shape) == 2 and tensor.name.startswith("blk."):
            elements[tensor.type.name] = elements.get(tensor.type.name, 0) + math.prod(tensor.shape)
    main = max(elements, key=lambda name: (elements[name], name)) if elements else "F32"
    value = metadata["general.file_type"].value if "general.file_type" in metadata else 0
    before = value if isinstance(value, int) else 0
    return before if _main_type_of(before) == main else _PLAIN_FILE_TYPES.get(main, before)


def _main_type_of(file_type: int) -> str | None:
    from safegene_converter.presets import PRESETS

    return next((one.type.name for one in PRESETS.values() if one.ftype == file_type), None)


def _block_types(base: Base, after: Mapping[str, GGMLType]) -> dict[str, int]:
    """Elements per type over the linear weights of the blocks."""
    counted: dict[str, int] = {}
    for name, info in base.model.tensors.items() if base.model else ():
        if name.startswith("blk.") and len(info.shape) == 2:
            kind = after.get(name, info.type).name
            counted[kind] = counted.get(kind, 0) + math.prod(info.shape)
    return counted


def _within(bounds: Bounds) -> str:
    return (
        f"gain in [{bounds.gain_min:g}, {bounds.gain_max:g}] and relative error <= "
        f"{bounds.error_max:g} (or, from float, error <= {bounds.base_error_ratio_max:g} x the base's)"
    )


def _figures(survival: Survival) -> str:
    text = f"gain {survival.gain:.3f}, relative error {survival.relative_error:.3f}"
    if survival.base_error_ratio is not None:
        text += f", {survival.base_error_ratio:.2f} x the base's error"
    return text
