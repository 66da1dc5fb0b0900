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
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from safegene_converter.bases.onnx_source import Export, check_source_fits, export_base, open_source
from safegene_converter.fold.hashing import digesting
from safegene_converter.inputs.adapter import read_adapter
from safegene_converter.inputs.base import Base
from safegene_converter.inputs.onnx_base import ADAPTER_FILE, OnnxBase, open_onnx_base
from safegene_converter.inputs.onnx_proto import load_proto
from safegene_converter.onnx.branch import branch, slot_entries, slot_names, write_adapter
from safegene_converter.onnx.job import FORMS, Form, Job, Touched, prove_weights, touched_weights
from safegene_converter.onnx.merge import merge
from safegene_converter.onnx.selfcheck import check_onnx
from safegene_converter.onnx.unchanged import METADATA_PREFIX
from safegene_converter.onnx.writer import Change, write_onnx
from safegene_converter.requests import ConvertRequest
from safegene_runtime import __version__
from safegene_runtime.artifact.manifest import FileEntry, Manifest, ModuleEntry
from safegene_runtime.artifact.onnx_checks import precision_class
from safegene_runtime.artifact.provenance import ADAPTER_KEY, adapter_digest
from safegene_runtime.engines.ort import read_text_files
from safegene_runtime.errors import Problem, UnsupportedError
from safegene_runtime.formats.files import (
    MANIFEST_NAME,
    check_output_free,
    publish_folder,
    sha256_file,
    sha256_of,
)
from safegene_runtime.formats.onnx.file import read_onnx
from safegene_runtime.formats.onnx.tensor import DataType
from safegene_runtime.progress import Progress, counted, silent

__all__ = ["FORMS", "OnnxBase", "convert", "default_form", "open_onnx_base", "write_job"]

CAUTION = (
    f"any caller can leave {ADAPTER_FILE} out, and is served the base; ONNX Runtime itself ignores an "
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
    base_path, form = request.base, cast(Form | None, request.form)
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
    if request.check:
        _check_runnable(source, export)
    with publish_folder(request.out, request.force) as folder, digesting(source) as digests:
        work = folder / ".work"
        work.mkdir()
        hf, opened, about = export_base(source, work, export, tell)
        settings: dict[str, Any] = {"form": form or "auto", **about}
        check_source_fits(adapter, opened)
        text = read_text_files(opened.folder)
        touched = touched_weights(adapter, opened)
        if hf is not None:
            settings["weight_error"] = prove_weights(touched, opened, hf)
        chosen = form or default_form(opened, touched)
        job = Job(adapter, opened, hf, chosen, touched, request.survival, promote)
        if chosen == "merged":
            settings["bounds"], settings["promote"] = vars(job.bounds), promote
        if cautions := _cautions(chosen, opened):
            settings["caution"] = "; ".join(cautions)
        files, modules, precision_class = write_job(job, folder, tell)
        if request.check:
            tell("checking what was written", 0, 1)
            settings["self_check"] = _check(job, folder, work)
            tell("checking what was written", 1, 1)
        manifest = Manifest(
            tool={"name": "safegene", "version": __version__},
            artifact={
                "target": "onnx",
                "form": chosen,
                "architecture": opened.architecture,
                "name": source.name,
                "precision": precision_class,
            },
            base={
                "kind": "onnx" if isinstance(source, OnnxBase) else source.kind,
                "name": base_path.resolve().name,
                "files": digests.result(),
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
            slots=slot_entries(job) if chosen == "adapter" else (),
        )
        shutil.rmtree(work)
        (folder / MANIFEST_NAME).write_bytes(manifest.to_json())
    return manifest


def _cautions(form: Form, base: OnnxBase) -> list[str]:
    """What whoever ships the artifact has to know."""
    cautions = [CAUTION] if form == "adapter" else []
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
    return "branch" if packed else "merged"


def write_job(
    job: Job, folder: Path, tell: Progress
) -> tuple[list[FileEntry], list[ModuleEntry], str]:
    """Writes the files of an artifact, but for its manifest, into an empty folder.

    Args:
        job: the request.
        folder: where to.
        tell: told how far it is.

    Returns:
        the manifest's lines about files and modules, and the bounds class of the weights.

    Raises:
        SafeGeneError: one of its kinds.
    """
    model = job.base.model
    proto = load_proto(model)
    change = Change()
    files: list[FileEntry] = []
    fold = merge if job.form == "merged" else branch
    modules = fold(job, proto, change, tell)
    _provenance(job, proto)
    total = sum(path.stat().st_size for path in model.files)
    step = counted(tell, "writing the model", total)
    digests = write_onnx(model, proto, change, folder, step)
    for name, digest in sorted(digests.items()):
        role = "model" if name == model.path.name else "data"
        files.append(FileEntry(name, role, (folder / name).stat().st_size, digest))
    if job.form == "adapter":
        path = folder / ADAPTER_FILE
        write_adapter(job, path)
        files.append(FileEntry(path.name, "adapter", path.stat().st_size, sha256_file(path)))
    for source in job.base.companions:
        shutil.copyfile(source, folder / source.name)
        data = (folder / source.name).read_bytes()
        files.append(FileEntry(source.name, "config", len(data), sha256_of(data)))
    return files, modules, precision_class(read_onnx(folder / model.path.name))


def _provenance(job: Job, proto: Any) -> None:
    """`safegene.*` metadata_props: what a reader of the single file can learn."""
    kept = [prop for prop in proto.metadata_props if not prop.key.startswith(METADATA_PREFIX)]
    copies = [(prop.key, prop.value) for prop in kept]
    del proto.metadata_props[:]
    for key, value in (
        *copies,
        ("safegene.version", __version__),
        ("safegene.form", job.form),
        ("safegene.expression", job.adapter.expression),
        (ADAPTER_KEY, adapter_digest(job.adapter.digests)),
        ("safegene.modules", str(len(job.adapter.modules))),
    ):
        proto.metadata_props.add(key=key, value=value)


def _check(job: Job, folder: Path, work: Path) -> dict[str, Any]:
    """Re-opens the artifact in a child process, beside a branch made for the check."""
    oracle = folder
    if job.form != "branch":
        oracle = work / "oracle"
        oracle.mkdir()
        branch = dataclasses.replace(job, form="branch")
        write_job(branch, oracle, silent)
    slots = {
        one.linear.weight.name: {
            "names": list(slot_names(one.linear)),
            "modules": [[module.name, *place.rows] for module, place in one.parts],
        }
        for one in job.touched
    }
    name = job.base.model.path.name
    return check_onnx(
        base=job.base.model.path,
        artifact=folder / name,
        adapter_file=folder / ADAPTER_FILE if job.form == "adapter" else None,
        oracle=oracle / name,
        adapter=job.adapter,
        form=job.form,
        slots=slots,
        survived=(job.bounds.gain_min, job.bounds.gain_max),
        is_float=job.form != "merged" or all(one.linear.layout != "nbits" for one in job.touched),
    )
