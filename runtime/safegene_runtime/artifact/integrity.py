"""The rung `integrity`: the folder is what its manifest says, and belongs to this reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safegene_runtime.architecture.table import arithmetic_of
from safegene_runtime.artifact.changed import with_tensors
from safegene_runtime.artifact.forms import ONNX
from safegene_runtime.artifact.manifest import Manifest, ModuleEntry, check_files
from safegene_runtime.artifact.provenance import check_provenance
from safegene_runtime.errors import EngineError, ManifestError, Problem, Problems, RecordError
from safegene_runtime.formats.gguf.header import GGUFFile, read_gguf
from safegene_runtime.formats.gguf.model import GGUFModel, open_model
from safegene_runtime.formats.gguf.types import GGMLType, nbytes, type_traits
from safegene_runtime.formats.gguf.weights import elements_by_type
from safegene_runtime.formats.sealed import SealedFiles
from safegene_runtime.gating.bounds import precision_of
from safegene_runtime.progress import Progress, counted
from safegene_runtime.record.reference import Reference

__all__ = ["ServedModel", "check_integrity", "model_precision"]

APART = "manifest and model do not belong together: restore the manifest, or convert again"


@dataclass(frozen=True)
class ServedModel:
    """What an artifact makes an engine run, and the bounds class of its weights."""

    model: Path
    adapter: Path | None
    precision: str


def check_integrity(
    manifest: Manifest,
    folder: Path,
    record: Reference | None,
    base: Path | None,
    tell: Progress,
    files: SealedFiles,
) -> ServedModel:
    """Holds the files against the manifest, and the manifest against the reference, if there is one.

    What is read is kept in `files`, which is entered: nothing of it is read from the disk again.

    Raises:
        ManifestError: the folder is not what its manifest says.
        RecordError: the reference was recorded with another adapter or expression.
        EngineError: a sidecar without its base, or a base where none is needed.
        FormatError: a model file that breaks its format.
        UnsupportedError: weights whose precision is not known.
    """
    total = sum(entry.size_bytes for entry in manifest.files)
    step = counted(tell, "hashing the artifact", total)
    try:
        check_files(manifest, folder, step, files)
    except ManifestError as error:
        raise with_tensors(error, manifest, folder) from error
    # without one it serves, and does not verify: what it was verified against is in the manifest
    if record is not None:
        _check_same_adapter(manifest, folder, record)
    problems = Problems()
    entries = {role: manifest.file(role) for role in manifest.form.roles}
    for role, entry in entries.items():
        if entry is None:
            problems.add(str(folder), "files", f"a file of role {role}", "none", "convert again")
    problems.raise_if_any(ManifestError)
    paths = {role: folder / entry.path for role, entry in entries.items() if entry is not None}
    if base is not None and manifest.form.carries_base:
        raise EngineError(
            Problem(
                "--base",
                "base",
                "none: this artifact holds its base",
                str(base),
                "leave --base out",
            )
        )
    if manifest.form.target is ONNX:
        from safegene_runtime.artifact.onnx_checks import check_onnx_artifact

        precision = check_onnx_artifact(manifest, paths["model"])
        _check_precision(manifest, precision, str(paths["model"]), problems)
        return ServedModel(paths["model"], paths.get("adapter"), precision)
    if manifest.form.carries_base:
        header = open_model(paths["model"])
        check_provenance(manifest, header.get, str(paths["model"]), problems)
        _check_touched(manifest, header, str(paths["model"]), problems)
        problems.raise_if_any(ManifestError)
        precision = model_precision(header)
        _check_precision(manifest, precision, str(paths["model"]), problems)
        return ServedModel(paths["model"], None, precision)
    if base is None or not base.is_file():
        got = "nothing" if base is None else f"{base}: {'a folder' if base.is_dir() else 'no file'}"
        raise EngineError(
            Problem(
                "--base",
                "base",
                f"the GGUF {manifest.base['name']!r} that this sidecar belongs to",
                got,
                "pass --base FILE.gguf",
            )
        )
    sidecar = read_gguf(paths["adapter"])
    check_provenance(manifest, sidecar.get, str(paths["adapter"]), problems)
    _check_touched(manifest, sidecar, str(paths["adapter"]), problems)
    found = {}
    shards = open_model(base).shards
    step = counted(tell, "hashing the base", sum(shard.path.stat().st_size for shard in shards))
    for shard in shards:
        found[shard.path.name] = files.add(shard.path, step, follow_symlinks=True, alone=False)
    header = open_model(base)  # again, of what was kept
    if sorted(found.values()) != sorted(manifest.base["files"].values()):
        problems.add(
            str(base),
            "sha256",
            ", ".join(sorted(manifest.base["files"].values())),
            ", ".join(sorted(found.values())),
            "this is not the base that the sidecar was made for",
        )
    problems.raise_if_any(ManifestError)
    precision = model_precision(header)
    _check_precision(manifest, precision, str(base), problems)
    return ServedModel(base, paths["adapter"], precision)


def _check_same_adapter(manifest: Manifest, folder: Path, record: Reference) -> None:
    """Artifact and reference are of the same vectors in the same expression.

    If not, neither is broken, and nothing can be gated: that is no FAIL of the artifact.
    """
    problems = Problems()
    recorded, made = record.meta["adapter"], manifest.adapter
    files, expression = recorded["files"], recorded["expression"]
    differing = {name for name in files.keys() | made["files"].keys()
                 if files.get(name) != made["files"].get(name)}  # fmt: skip
    if any("#" not in name for name in differing):
        problems.add(
            str(folder),
            "adapter",
            f"{recorded['name']!r}, the adapter that the reference was recorded with",
            f"another adapter, named {made['name']!r}",
            "record a reference with this adapter: safegene record",
        )
    elif expression != made["expression"]:
        problems.add(
            str(folder),
            "expression",
            expression,
            made["expression"],
            "record a reference with this expression",
        )
    elif differing:
        problems.add(
            str(folder),
            "expression",
            f"{expression!r} with the coefficients that the reference was recorded with",
            "other coefficients under the same name",
            "convert and record with the same safegene.json",
        )
    problems.raise_if_any(RecordError)


def _check_touched(
    manifest: Manifest, header: GGUFModel | GGUFFile, where: str, problems: Problems
) -> None:
    """Tensors of the model, or factors of the sidecar: shapes, types and bytes are the manifest's."""
    for module in manifest.modules:
        (out, columns), rank = module.shape, module.rank
        meant = {module.tensor: module.shape}
        if not manifest.form.merges:
            meant = {f"{module.tensor}.lora_a": (rank, columns),
                     f"{module.tensor}.lora_b": (out, rank)}  # fmt: skip
        size = 0
        for name, shape in meant.items():
            info = header.tensors.get(name)
            got = "nothing" if info is None else f"{info.type.name} {info.shape}"
            size += 0 if info is None else info.nbytes
            expected = f"{_stored_type(manifest, module, shape)} {shape}"
            if got != expected:
                problems.add(where, name, expected, got, APART)
        kind = GGMLType.__members__.get(module.type_before or "")
        before = 0 if kind is None else nbytes(module.shape, kind)
        if (module.type_before is not None) is not manifest.form.merges or (
            before != module.bytes_before
        ):
            problems.add(
                where, f"{module.tensor}: bytes_before", f"{before} bytes of {module.type_before}",
                f"{module.bytes_before} in the manifest", APART,
            )  # fmt: skip
        if size != module.bytes_after:
            problems.add(
                where, f"{module.tensor}: bytes_after", f"{size}",
                f"{module.bytes_after} in the manifest", APART,
            )  # fmt: skip
    found = header.get("general.architecture")
    if found != manifest.artifact["architecture"]:
        problems.add(where, "general.architecture", manifest.artifact["architecture"], found, APART)


def _stored_type(manifest: Manifest, module: ModuleEntry, shape: tuple[int, int]) -> str:
    """The type of a touched tensor; a factor whose rows are no multiple of the block stays in F32."""
    kind = GGMLType.__members__.get(module.type_after)
    whole = kind is None or shape[1] % type_traits(kind)[0] == 0
    return module.type_after if manifest.form.merges or whole else "F32"


def _check_precision(manifest: Manifest, served: str, where: str, problems: Problems) -> None:
    """The manifest says the class that the weights have."""
    stated = manifest.artifact["precision"]
    if stated != served:
        problems.add(where, "artifact.precision", served, f"{stated} in the manifest", APART)
    problems.raise_if_any(ManifestError)


def model_precision(header: GGUFModel) -> str:
    """The class of the weights that are served, from their own header, not from the manifest.

    Raises:
        UnsupportedError: weights of a type that has no class, or none at all.
    """
    return precision_of(
        elements_by_type(header.tensors.values()),
        str(header.shards[0].path),
        arithmetic_of(header.get("general.architecture")),
    )
