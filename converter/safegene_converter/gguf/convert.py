"""Folding an adapter into GGUF: a sidecar beside the base, or merged into the weights.

adapter + base -> GGUFFold (checked, nothing written yet)    fold.py
  sidecar: factors with every scale baked into B             sidecar.py -> adapter.gguf
  merged:  touched tensors encoded and measured, the rest    merge.py   -> model.gguf
           copied in the kernel
-> self-check in a child process -> manifest.json -> one rename
"""

from __future__ import annotations

import dataclasses
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safegene_converter.bases.hf_to_gguf import (
    convert_hf,
    limited_to_window,
    prove_gguf_of_folder,
)
from safegene_converter.encoding.imatrix import read_imatrix
from safegene_converter.fold.hashing import digesting
from safegene_converter.gguf.fold import GGUFFold, Made, starts_from_float
from safegene_converter.gguf.sidecar import SIDECAR_TYPES, write_sidecar
from safegene_converter.inputs.adapter import Adapter, check_base_fits, read_adapter
from safegene_converter.inputs.base import Base, open_base
from safegene_converter.inputs.consumed import check_carried, check_proved, limit_of
from safegene_converter.inputs.row_proof import prove_transform
from safegene_converter.requests import ConvertRequest
from safegene_runtime import __version__
from safegene_runtime.artifact.base_proof import UNCHANGED
from safegene_runtime.artifact.forms import GGUF, GGUF_MERGED, GGUF_SIDECAR, Form, form_named
from safegene_runtime.artifact.manifest import Manifest
from safegene_runtime.errors import BaseModelError, Problems, UnsupportedError
from safegene_runtime.formats.files import MANIFEST_NAME, sha256_file, sha256_of
from safegene_runtime.formats.gguf.header import read_gguf
from safegene_runtime.formats.publish import check_output_free, publish_folder
from safegene_runtime.progress import Progress, counted, silent

__all__ = ["convert"]

TRANSFORM_ERROR_MAX = 0.5
"""A right row order leaves the rounding of the type (0.1 for 4 bits), a wrong one about 1.4."""


def convert(request: ConvertRequest, progress: Progress | None = None) -> Manifest:
    """Converts an adapter to a GGUF artifact.

    Args:
        request: what is wanted, with `to` "gguf".
        progress: told what is being done.

    Raises:
        SafeGeneError: one of its kinds; nothing is left under the name `out`.
    """
    tell = progress or silent
    base_path, form = request.base, form_named(GGUF, request.form or GGUF_MERGED.name)
    check_output_free(request.out, request.force, [request.adapter, base_path])
    adapter = read_adapter(request.adapter, request.expression)
    base = given = open_base(base_path)
    check_base_fits(adapter, base.module_shapes(), base.architecture, base.n_layers)
    if base.config is not None:
        check_carried(base.config, GGUF, str(base.path))
        check_proved(base.config, request.check)
    type_name, imatrix = request.type.lower(), request.imatrix
    _check_type(form, type_name, base)
    weights = read_imatrix(imatrix) if imatrix else {}
    proof: dict[str, Any] | None = UNCHANGED if base.is_gguf else None
    needs = _needs(form, type_name, adapter, base)
    with publish_folder(request.out, request.force, needs) as folder, digesting(base) as digests:
        work = folder / ".work"
        work.mkdir()
        settings: dict[str, Any] = {
            "type": type_name,
            "llama_cpp_python": version("llama-cpp-python"),
        }
        if not base.is_gguf:
            hf_base = base
            base = _from_hugging_face(base, work, request.llama_cpp, tell)
            settings["transform_error"] = _prove_transforms(adapter, hf_base, base)
            if hf_base.config is not None and (window := limit_of(hf_base.config)) is not None:
                settings["sliding_window"] = window  # which is where its context ends
            if request.check:
                proof = prove_gguf_of_folder(hf_base, base, tell).to_dict()
        mixes = type_name not in ("keep", "auto") and starts_from_float(base, type_name)
        fold = GGUFFold(
            adapter=adapter,
            base=base,
            form=form,
            type_name=type_name,
            bounds=request.survival,
            promote=(type_name == "auto" or mixes) if request.promote is None else request.promote,
            imatrix_path=imatrix,
            imatrix=weights,
        )
        if imatrix:
            settings["imatrix_sha256"] = sha256_file(imatrix.resolve())
        fold.precision({})  # one that is not known is refused before the work
        made = _write(fold, folder, work, tell)
        if form.merges:
            settings["promote"] = fold.promote
            settings["promoted"] = made.promoted
        settings["bounds"] = vars(fold.bounds) if form.merges else None
        if adapter.cautions:
            settings["caution"] = "; ".join(adapter.cautions)
        if request.check:
            tell("checking what was written", 0, 1)
            settings["self_check"] = _check(fold, folder, work, made)
            tell("checking what was written", 1, 1)
        template = base.model.metadata.get("tokenizer.chat_template") if base.model else None
        manifest = Manifest(
            tool={"name": "safegene", "version": __version__},
            artifact={
                "target": form.target.name,
                "form": form.name,
                "architecture": base.architecture,
                "name": base.name,
                "precision": made.precision,
            },
            base={
                "kind": given.kind,
                "name": base_path.resolve().name,
                "files": digests.result(),
                "proof": proof,
            },
            adapter={
                "name": request.adapter.resolve().name,
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
            files=(made.file,),
            modules=made.modules,
        )
        shutil.rmtree(work)
        (folder / MANIFEST_NAME).write_bytes(manifest.to_json())
    return manifest


def _needs(form: Form, type_name: str, adapter: Adapter, base: Base) -> int:
    """Bytes that will be written at least: a base that keeps its types, else only its factors."""
    if form.merges and base.is_gguf and type_name in ("auto", "keep"):
        return sum(file.stat().st_size for file in base.files)
    return adapter.n_parameters  # no type of a sidecar takes less than a byte each


def _write(fold: GGUFFold, folder: Path, work: Path, tell: Progress) -> Made:
    if not fold.form.merges:
        return write_sidecar(fold, folder, tell)
    from safegene_converter.gguf.merge import (
        write_merged,  # a sidecar is written before it is loaded
    )

    return write_merged(fold, folder, work, tell)


def _check_type(form: Form, type_name: str, base: Base) -> None:
    """Refuses a type that the form does not have, or that the base is too coarse for already."""
    problems = Problems()
    if not form.merges and type_name not in ("auto", *SIDECAR_TYPES):
        problems.add(
            "--type",
            "type of a sidecar",
            f"auto or one of {', '.join(SIDECAR_TYPES)}",
            type_name,
            "leave --type out: f32 is the default",
        )
    elif form.merges and type_name not in ("auto", "keep"):
        from safegene_converter.gguf.presets import preset

        wanted = preset(type_name)
        pure = wanted.name == wanted.type.name.lower()
        if not base.is_float and not pure:
            problems.add(
                "--type",
                "type",
                "auto, keep or a plain type such as q8_0",
                f"the preset {type_name} on a base that is quantised already",
                "presets quantise a whole float model: pass a Hugging Face folder or an "
                "F32/F16/BF16 GGUF as --base",
            )
    problems.raise_if_any(UnsupportedError)


def _from_hugging_face(base: Base, work: Path, llama_cpp: Path | None, tell: Progress) -> Base:
    """The same model as a GGUF in its own float type, by llama.cpp's converter."""
    kinds = {info.dtype for file in base.weights for info in file.tensors.values()}
    outtype = {frozenset({"F16"}): "f16", frozenset({"BF16"}): "bf16"}.get(frozenset(kinds), "f32")
    target = work / "base.gguf"
    total = base.n_parameters * {"f32": 4}.get(outtype, 2)
    step = counted(tell, "converting the base to GGUF", total)
    convert_hf(base.path, target, outtype, llama_cpp, progress=step)
    return limited_to_window(base, open_base(target))


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


def _check(fold: GGUFFold, folder: Path, work: Path, made: Made) -> dict[str, Any]:
    """The postcondition, in a child process; a merged model is compared with an F32 sidecar."""
    from safegene_converter.gguf.selfcheck import check_artifact

    path = sidecar = folder / made.file.path
    if fold.form.merges:
        oracle = work / "oracle"
        oracle.mkdir()
        as_sidecar = dataclasses.replace(fold, form=GGUF_SIDECAR, type_name="f32")
        write_sidecar(as_sidecar, oracle, silent)
        sidecar = oracle / GGUF.adapter_file
    header = read_gguf(path)
    tensors = {name: [info.type.name, list(info.shape)] for name, info in header.tensors.items()}
    return check_artifact(
        made.base,
        path if fold.form.merges else None,
        sidecar,
        fold.adapter,
        {
            "tensors": tensors,
            "precision": made.precision,
            "gain": [fold.bounds.gain_min, fold.bounds.gain_max],
        },
    )
