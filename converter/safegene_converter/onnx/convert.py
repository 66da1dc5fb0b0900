"""Folding an adapter into ONNX: merged weights, a branch in the graph, or an adapter file.

    merged   W' = W + dW in the stored weights; the graph is the base's
    branch   y = W x + B (A x) with A and B constant in the graph: exact around any quantised base,
             and no caller can switch it off
    adapter  the same graph, but A and B are inputs with empty defaults (rank 0: the plain base),
             and an .onnx_adapter file holds their values; the caller decides whether to load it

The base is an ONNX folder, or a Hugging Face folder or float GGUF that the onnxruntime-genai builder
exports. All scaling is in B. Packed projections (q, k and v in one weight) get one pair of factors,
A stacked and B block-diagonal, so that they cost two small products and not six.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safegene_converter.bases.onnx_proof import prove_export
from safegene_converter.bases.onnx_source import (
    Export,
    check_source_fits,
    export_base,
    open_source,
)
from safegene_converter.fold.hashing import digesting
from safegene_converter.inputs.adapter import read_adapter
from safegene_converter.inputs.base import Base
from safegene_converter.inputs.consumed import check_proved
from safegene_converter.inputs.onnx_base import OnnxBase, open_onnx_base
from safegene_converter.inputs.onnx_proto import load_proto
from safegene_converter.onnx.branch import branch, slot_entries, slot_names, write_adapter
from safegene_converter.onnx.fold import (
    OnnxFold,
    Touched,
    prove_weights,
    touched_weights,
)
from safegene_converter.onnx.merge import merge
from safegene_converter.onnx.selfcheck import check_onnx
from safegene_converter.onnx.unchanged import METADATA_PREFIX
from safegene_converter.onnx.writer import Change, write_onnx
from safegene_converter.requests import ConvertRequest
from safegene_runtime import __version__
from safegene_runtime.artifact.base_proof import UNCHANGED
from safegene_runtime.artifact.forms import ONNX, ONNX_BRANCH, ONNX_MERGED, Form, form_named
from safegene_runtime.artifact.manifest import FileEntry, Manifest, ModuleEntry
from safegene_runtime.artifact.onnx_checks import precision_class
from safegene_runtime.artifact.provenance import ADAPTER_KEY, adapter_digest
from safegene_runtime.engines.ort_text import read_text_files
from safegene_runtime.errors import Problem, UnsupportedError
from safegene_runtime.formats.files import MANIFEST_NAME, sha256_file, sha256_of
from safegene_runtime.formats.onnx.file import read_onnx
from safegene_runtime.formats.onnx.tensor import DataType
from safegene_runtime.formats.publish import check_output_free, publish_folder
from safegene_runtime.gating.bounds import precision_of
from safegene_runtime.progress import Progress, counted, silent

__all__ = ["OnnxBase", "convert", "default_form", "open_onnx_base", "write_fold"]

CAUTION = (
    f"any caller can leave {ONNX.adapter_file} out, and is served the base; ONNX Runtime itself ignores an "
    "active adapter under I/O binding and in async runs"
)
"""What the manifest says of the adapter form; measured in tests/test_onnx_adapter_runs.py."""
NO_GENAI = "the base has no genai_config.json: ONNX Runtime GenAI cannot load this folder"


def convert(request: ConvertRequest, progress: Progress | None = None) -> Manifest:
    """Converts an adapter to an ONNX artifact.

    Args:
        request: what is wanted, with `to` "onnx".
        progress: told what is being done.

    Raises:
        SafeGeneError: one of its kinds; nothing is left under the name `out`.
    """
    tell = progress or silent
    base_path = request.base
    wanted = None if request.form is None else form_named(ONNX, request.form)
    promote = request.promote is not False and request.type != "keep"
    check_output_free(request.out, request.force, [request.adapter, base_path])
    adapter = read_adapter(request.adapter, request.expression)
    export = Export(
        request.precision,
        request.block_size,
        request.accuracy_level,
        tuple(request.builder_options),
    )
    source = open_source(base_path, export)
    check_source_fits(adapter, source)
    if isinstance(source, Base) and source.config is not None:
        check_proved(source.config, request.check)
    if request.check:
        _check_runnable(source, export)
    kept = source.model.files if isinstance(source, OnnxBase) else ()  # an export's size is unknown
    needs = sum(path.stat().st_size for path in kept)
    with publish_folder(request.out, request.force, needs) as folder, digesting(source) as digests:
        work = folder / ".work"
        work.mkdir()
        hf, opened, about = export_base(source, work, export, tell)
        settings: dict[str, Any] = {"form": request.form or "auto", **about}
        check_source_fits(adapter, opened)
        proof: dict[str, Any] | None = UNCHANGED if isinstance(source, OnnxBase) else None
        if request.check and isinstance(source, Base) and hf is not None:
            proof = prove_export(source, hf, opened, work, tell, export.options).to_dict()
        precision_class(opened.model)  # one that is not known is refused before the work
        text = read_text_files(opened.folder)
        touched = touched_weights(adapter, opened)
        if hf is not None:
            settings["weight_error"] = prove_weights(touched, opened, hf)
        chosen = wanted or default_form(opened, touched)
        fold = OnnxFold(adapter, opened, hf, chosen, touched, request.survival, promote)
        if chosen.merges:
            settings["bounds"], settings["promote"] = vars(fold.bounds), promote
        if cautions := [*adapter.cautions, *_cautions(chosen, opened)]:
            settings["caution"] = "; ".join(cautions)
        files, modules, served_class = write_fold(fold, folder, tell)
        if request.check:
            tell("checking what was written", 0, 1)
            settings["self_check"] = _check(fold, folder, work)
            tell("checking what was written", 1, 1)
        manifest = Manifest(
            tool={"name": "safegene", "version": __version__},
            artifact={
                "target": chosen.target.name,
                "form": chosen.name,
                "architecture": opened.architecture,
                "name": source.name,
                "precision": served_class,
            },
            base={
                "kind": ONNX.name if isinstance(source, OnnxBase) else source.kind,
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
                "chat_template_sha256": sha256_of(text.template.encode("utf-8"))
                if text.template is not None
                else None
            },
            settings=settings,
            files=tuple(files),
            modules=tuple(modules),
            slots=slot_entries(fold) if chosen.has_slots else (),
        )
        shutil.rmtree(work)
        (folder / MANIFEST_NAME).write_bytes(manifest.to_json())
    return manifest


def _cautions(form: Form, base: OnnxBase) -> list[str]:
    """What whoever ships the artifact has to know."""
    cautions = [CAUTION] if form.has_slots else []
    if not (base.folder / "genai_config.json").is_file():
        cautions.append(NO_GENAI)
    return cautions


def _check_runnable(source: Base | OnnxBase, export: Export) -> None:
    """Refuses a self-check that could only fail, before any work.

    Raises:
        UnsupportedError: a bfloat16 graph, for which ONNX Runtime has no kernels on the CPU.
    """
    kinds = (
        {value.elem_type for value in source.model.inputs}
        if isinstance(source, OnnxBase)
        else {DataType.BFLOAT16 if export.effective_precision == "bf16" else DataType.FLOAT}
    )
    if DataType.BFLOAT16 in kinds:
        raise UnsupportedError(
            Problem(
                "self-check",
                "precision",
                "a graph that ONNX Runtime runs on the CPU: fp32, fp16, int8, int4",
                "bf16",
                "pass --no-self-check, and check the result on the device it is meant for",
            )
        )


def default_form(base: OnnxBase, touched: Sequence[Touched]) -> Form:
    """`branch` where a weight that changes is stored in 8 or 4 bits, else `merged`."""
    packed = any(one.linear.layout == "nbits" for one in touched)
    return ONNX_BRANCH if packed else ONNX_MERGED


def write_fold(
    fold: OnnxFold, folder: Path, tell: Progress
) -> tuple[list[FileEntry], list[ModuleEntry], str]:
    """Writes the files of an artifact, but for its manifest, into an empty folder.

    Args:
        fold: what is folded into what.
        folder: where to.
        tell: told how far it is.

    Returns:
        the manifest's lines about files and modules, and the bounds class of the weights.

    Raises:
        SafeGeneError: one of its kinds.
    """
    model = fold.base.model
    proto = load_proto(model)
    change = Change()
    files: list[FileEntry] = []
    write = merge if fold.form.merges else branch
    modules = write(fold, proto, change, tell)
    _provenance(fold, proto)
    total = sum(path.stat().st_size for path in model.files)
    step = counted(tell, "writing the model", total)
    digests = write_onnx(model, proto, change, folder, step)
    for name, digest in sorted(digests.items()):
        role = "model" if name == model.path.name else "data"
        files.append(FileEntry(name, role, (folder / name).stat().st_size, digest))
    if fold.form.has_adapter:
        path = folder / ONNX.adapter_file
        write_adapter(fold, path)
        files.append(FileEntry(path.name, "adapter", path.stat().st_size, sha256_file(path)))
    for source in fold.base.companions:
        shutil.copyfile(source, folder / source.name)
        data = (folder / source.name).read_bytes()
        files.append(FileEntry(source.name, "config", len(data), sha256_of(data)))
    return files, modules, precision_class(read_onnx(folder / model.path.name))


def _provenance(fold: OnnxFold, proto: Any) -> None:
    """`safegene.*` metadata_props: what a reader of the single file can learn."""
    kept = [prop for prop in proto.metadata_props if not prop.key.startswith(METADATA_PREFIX)]
    copies = [(prop.key, prop.value) for prop in kept]
    del proto.metadata_props[:]
    for key, value in (
        *copies,
        ("safegene.version", __version__),
        ("safegene.form", fold.form.name),
        ("safegene.expression", fold.adapter.expression),
        (ADAPTER_KEY, adapter_digest(fold.adapter.digests)),
        ("safegene.modules", str(len(fold.adapter.modules))),
    ):
        proto.metadata_props.add(key=key, value=value)


def _rounding(fold: OnnxFold) -> str:
    """The class of what a merge rounds; what else is written computes as the branch does."""
    packed = [one.linear for one in fold.touched if one.linear.layout == "nbits"]
    if not fold.form.merges or not packed:
        return "f16"
    return precision_of({linear.type: math.prod(linear.shape) for linear in packed})


def _check(fold: OnnxFold, folder: Path, work: Path) -> dict[str, Any]:
    """Re-opens the artifact in a child process, beside a branch made for the check."""
    oracle = folder
    if fold.form is not ONNX_BRANCH:
        oracle = work / "oracle"
        oracle.mkdir()
        branch = dataclasses.replace(fold, form=ONNX_BRANCH)
        write_fold(branch, oracle, silent)
    slots = {
        one.linear.weight.name: {
            "names": list(slot_names(one.linear)),
            "modules": [[module.name, *place.rows] for module, place in one.parts],
        }
        for one in fold.touched
    }
    name = fold.base.model.path.name
    return check_onnx(
        base=fold.base.model.path,
        artifact=folder / name,
        adapter_file=folder / ONNX.adapter_file if fold.form.has_adapter else None,
        oracle=oracle / name,
        adapter=fold.adapter,
        form=fold.form.name,
        slots=slots,
        survived=(fold.bounds.gain_min, fold.bounds.gain_max),
        precision=_rounding(fold),
    )
