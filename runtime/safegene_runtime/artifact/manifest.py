"""`manifest.json`: what an artifact is, so that it can be refused when it is something else.

An artifact is a folder. Its manifest lists every file with size and SHA-256, every touched tensor
with the digest of its stored bytes, what went in (base and adapter digests, expression, effective
scale of each module), what survived, and, once verified, the verdict. A file in the folder that the
manifest does not list is refused as well: something a loader might pick up.

    format_version   1
    tool             {"name", "version"}
    artifact         {"target": "gguf", "form": "merged" | "sidecar", or "target": "onnx",
                      "form": "merged" | "branch" | "adapter", "architecture", "name",
                      "precision": bounds class, see `bounds.py`}
    base             {"kind": "gguf" | "hf" | "onnx", "name", "files": {file name: sha256},
                      "proof": how the plain base was proved, see `base_proof.py`; null or absent says
                      that it was not}
    adapter          {"name", "files": {file name, or "safegene.json#<expression>": sha256},
                      "expression", "n_parameters"}
    tokenizer        {"chat_template_sha256": sha256 or null}
    settings         how it was made: requested type, gate bounds, imatrix digest, what was promoted,
                     and of a GGUF the llama-cpp-python whose llama.cpp encoded it
    files            [{"path", "role": "model" | "adapter" | "data" | "config", "size_bytes", "sha256"}]
    modules          [{"module", "tensor", "shape": [out, in], "rank", "scaling", "coefficient",
                       "effective_scale", "type_before", "type_after", "bytes_before",
                       "bytes_after", "sha256", "survival": {...} or null}]
    slots            only of form "adapter": [{"name", "shape": [rows, columns], "type": "F32" | "F16" |
                      "BF16"}], what the graph leaves open and the adapter file fills
    verification     null, or {"verdict", "reference_sha256", "engine": {...}, "report": {...}}

Law: `Manifest.from_json(m.to_json()) == m`.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safegene_runtime.artifact.base_proof import check_base_proof
from safegene_runtime.artifact.forms import FORMS, GGUF, ONNX, Form, find_form
from safegene_runtime.artifact.recomputed import check_modules
from safegene_runtime.errors import FormatError, ManifestError, Problem, Problems
from safegene_runtime.formats import strictjson
from safegene_runtime.formats.fields import (
    INTEGER,
    NUMBER,
    OBJECT,
    SHA256,
    SIZE,
    TEXT,
    Kind,
    check_fields,
    check_version,
    integer,
    list_of,
    one_of,
    or_null,
)  # fmt: skip
from safegene_runtime.formats.files import MANIFEST_NAME, read_small_file, sha256_file
from safegene_runtime.formats.publish import publish_file
from safegene_runtime.formats.sealed import SealedFiles
from safegene_runtime.gating.verdict import Verdict
from safegene_runtime.progress import Step

__all__ = [
    "FileEntry", "Manifest", "ModuleEntry", "SlotEntry", "check_files", "is_file_name",
    "read_manifest",
]  # fmt: skip

FORMAT_VERSION = 1
BASE_KINDS = (GGUF.name, "hf", ONNX.name)
MAX_MANIFEST_BYTES = 32 << 20
MAX_MARKS = 200_000  # commas and colons: ten times what a model of a thousand modules needs
RESTORE = "the manifest was edited or damaged: restore it, or convert again"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")


@dataclass(frozen=True)
class FileEntry:
    """One file of the artifact; `path` is a plain name inside the folder."""

    path: str
    role: str
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class ModuleEntry:
    """One module of the adapter, and the tensor that now carries it."""

    module: str
    tensor: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    coefficient: float
    effective_scale: float
    type_before: str | None
    type_after: str
    bytes_before: int
    bytes_after: int
    sha256: str
    survival: dict[str, Any] | None


@dataclass(frozen=True)
class SlotEntry:
    """One input of a graph that an adapter file fills: (in, rank) or (rank, out)."""

    name: str
    shape: tuple[int, int]
    type: str


@dataclass(frozen=True)
class Manifest:
    """A whole manifest; see the module's description for the fields."""

    tool: dict[str, Any]
    artifact: dict[str, Any]
    base: dict[str, Any]
    adapter: dict[str, Any]
    tokenizer: dict[str, Any]
    settings: dict[str, Any]
    files: tuple[FileEntry, ...]
    modules: tuple[ModuleEntry, ...]
    slots: tuple[SlotEntry, ...] = ()
    verification: dict[str, Any] | None = field(default=None)

    @property
    def form(self) -> Form:
        """What the artifact is, and what follows from it."""
        found = find_form(self.artifact["target"], self.artifact["form"])
        if found is None:
            raise ManifestError(Problem("artifact", "form", "a form we know", str(self.artifact)))
        return found

    def to_json(self) -> bytes:
        """The bytes of manifest.json; equal manifests give equal bytes."""
        content = dataclasses.asdict(self)
        if not self.slots:
            del content["slots"]
        return strictjson.dumps({"format_version": FORMAT_VERSION, **content})

    @staticmethod
    def from_json(data: bytes, where: str) -> Manifest:
        """Parses strictly.

        Raises:
            ManifestError: everything that is wrong with it.
        """
        try:
            return _parse(strictjson.loads(data, where, MAX_MARKS), where)
        except FormatError as error:
            raise ManifestError(
                problem if problem.fix else dataclasses.replace(problem, fix=RESTORE)
                for problem in error.problems
            ) from error

    def with_verification(self, verification: dict[str, Any] | None) -> Manifest:
        """A copy with another verdict."""
        return dataclasses.replace(self, verification=verification)

    def write(self, folder: Path) -> None:
        """Replaces the manifest of `folder` atomically."""
        publish_file(folder / MANIFEST_NAME, self.to_json())

    def file(self, role: str) -> FileEntry | None:
        """The first file with a role, or None."""
        return next((entry for entry in self.files if entry.role == role), None)


def is_file_name(name: str) -> bool:
    """Whether a manifest can list a file of this name."""
    return bool(_NAME.fullmatch(name)) and name.casefold() != MANIFEST_NAME


def read_manifest(folder: Path) -> Manifest:
    """Reads the manifest of an artifact folder.

    Raises:
        ManifestError: no manifest, or a malformed one.
    """
    path = folder / MANIFEST_NAME
    problems = Problems()
    if not folder.is_dir():
        problems.add(
            str(folder),
            "artifact",
            "a folder made by `safegene convert`",
            "a file" if folder.exists() else "nothing there",
            "pass the folder" if folder.exists() else "check the path",
        )
    elif not path.exists():
        problems.add(
            str(folder),
            MANIFEST_NAME,
            "a manifest",
            "nothing",
            "only folders made by `safegene convert` can be verified",
        )
    problems.raise_if_any(ManifestError)
    try:
        data = read_small_file(path, MAX_MANIFEST_BYTES)
    except FormatError as error:
        raise ManifestError(error.problems) from error
    return Manifest.from_json(data, str(path))


def check_files(
    manifest: Manifest,
    folder: Path,
    progress: Step | None = None,
    sealed: SealedFiles | None = None,
) -> None:
    """Checks that the folder holds exactly the listed files, with the listed bytes.

    Args:
        manifest: of the folder.
        folder: the artifact.
        progress: told the number of bytes after each chunk.
        sealed: keeps what was read, for whoever reads it next.

    Raises:
        ManifestError: missing, extra, linked, resized or altered files, all of them.
    """
    problems = Problems()
    listed = {entry.path: entry for entry in manifest.files}
    found = {entry.name for entry in os.scandir(folder)} - {MANIFEST_NAME}
    for name in sorted(found - listed.keys()):
        problems.add(
            str(folder),
            name,
            "only files that the manifest lists",
            "an unlisted file",
            "remove it, or convert again",
        )
    for name, entry in listed.items():
        path = folder / name
        if name not in found:
            problems.add(str(folder), name, "the file", "nothing", "restore it, or convert again")
            continue
        try:
            status = path.lstat()
            if status.st_size != entry.size_bytes and not path.is_symlink():
                problems.add(
                    str(path),
                    "size",
                    f"{entry.size_bytes} bytes",
                    f"{status.st_size} bytes",
                    "convert again",
                )
                continue
            digest = (
                sha256_file(path, progress, alone=True)
                if sealed is None
                else sealed.add(path, progress)
            )
        except FormatError as error:
            problems.extend(error.problems)
            continue
        except OSError as error:
            problems.add(str(path), "file", "to be readable", error.strerror, "check the disk")
            continue
        if digest != entry.sha256:
            problems.add(
                str(path),
                "sha256",
                entry.sha256,
                digest,
                "the file was changed after it was made: convert again",
            )
    problems.raise_if_any(ManifestError)
    if sealed is not None:
        sealed.close_folder(folder)


MAX_RATIO = 1e100
"""Of the figures of survival: means of them have to be finite, too."""
_RATIO = Kind((int, float), "a number", f"at most {MAX_RATIO:g}", lambda one: abs(one) <= MAX_RATIO)
_LIST = list_of(filled=True)
_SECTIONS: dict[str, dict[str, Kind]] = {
    "tool": {"name": TEXT, "version": TEXT},
    "artifact": dict.fromkeys(("target", "form", "architecture", "name", "precision"), TEXT),
    "base": {"kind": TEXT, "name": TEXT, "files": OBJECT},
    "adapter": {"name": TEXT, "files": OBJECT, "expression": TEXT, "n_parameters": INTEGER},
    "tokenizer": {"chat_template_sha256": or_null(SHA256)},
}
_TOP: dict[str, Kind] = {
    "format_version": INTEGER,
    **dict.fromkeys(_SECTIONS, OBJECT),
    "settings": OBJECT,
    "files": _LIST,
    "modules": _LIST,
    "verification": or_null(OBJECT),
}
_VERIFICATION: dict[str, Kind] = {
    "verdict": TEXT,
    "reference_sha256": SHA256,
    "engine": OBJECT,
    "report": OBJECT,
}
_ROLES = one_of("model", "adapter", "data", "config")
_FILE: dict[str, Kind] = {"path": TEXT, "role": _ROLES, "size_bytes": SIZE, "sha256": SHA256}
_MODULE: dict[str, Kind] = {
    "module": TEXT,
    "tensor": TEXT,
    "shape": list_of(),
    "rank": INTEGER,
    "scaling": NUMBER,
    "coefficient": NUMBER,
    "effective_scale": NUMBER,
    "type_before": or_null(TEXT),
    "type_after": TEXT,
    "bytes_before": SIZE,
    "bytes_after": SIZE,
    "sha256": SHA256,
    "survival": or_null(OBJECT),
}
_SURVIVAL: dict[str, Kind] = {
    "gain": _RATIO,
    "relative_error": _RATIO,
    "base_error_ratio": or_null(_RATIO),
    "mode": TEXT,
}
_SLOT: dict[str, Kind] = {"name": TEXT, "shape": list_of(), "type": TEXT}
_SLOT_TYPES = ("F32", "F16", "BF16")


def _parse(raw: Any, where: str) -> Manifest:
    problems = Problems()
    fix = "use the version of safegene that made this artifact"
    if check_version(raw, where, FORMAT_VERSION, problems, fix):
        check_fields(raw, where, _TOP, problems, optional={"slots": _LIST})
    problems.raise_if_any(ManifestError)
    for name, fields in _SECTIONS.items():
        optional = {"proof": or_null(OBJECT)} if name == "base" else {}
        check_fields(raw[name], f"{where}: {name}", fields, problems, optional=optional)
    if raw["verification"] is not None:
        check_fields(raw["verification"], f"{where}: verification", _VERIFICATION, problems)
    for index, entry in enumerate(raw["files"]):
        check_fields(entry, f"{where}: files[{index}]", _FILE, problems)
    for index, entry in enumerate(raw["modules"]):
        here = f"{where}: modules[{index}]"
        if check_fields(entry, here, _MODULE, problems) and entry["survival"] is not None:
            check_fields(entry["survival"], f"{here}: survival", _SURVIVAL, problems)
    for index, entry in enumerate(raw.get("slots", ())):
        check_fields(entry, f"{where}: slots[{index}]", _SLOT, problems)
    problems.raise_if_any(ManifestError)
    _check_meaning(raw, where, problems)
    problems.raise_if_any(ManifestError)
    check_modules(raw, where, problems)
    problems.raise_if_any(ManifestError)
    return Manifest(
        **{name: raw[name] for name in (*_SECTIONS, "settings", "verification")},
        files=tuple(FileEntry(**entry) for entry in raw["files"]),
        modules=tuple(
            ModuleEntry(**{**entry, "shape": (entry["shape"][0], entry["shape"][1])})
            for entry in raw["modules"]
        ),
        slots=tuple(
            SlotEntry(entry["name"], (entry["shape"][0], entry["shape"][1]), entry["type"])
            for entry in raw.get("slots", ())
        ),
    )


def _check_meaning(raw: dict[str, Any], where: str, problems: Problems) -> None:
    verification = raw["verification"]
    if verification and verification["verdict"] not in tuple(Verdict):
        wanted = ", ".join(Verdict)
        problems.add(where, "verification.verdict", wanted, verification["verdict"])
    if raw["base"]["kind"] not in BASE_KINDS:
        problems.add(where, "base.kind", "{}, {} or {}".format(*BASE_KINDS), raw["base"]["kind"])
    artifact = raw["artifact"]
    if find_form(artifact["target"], artifact["form"]) is None:
        problems.add(
            where,
            "artifact.form",
            ", ".join(map(str, FORMS)),
            f"{artifact['target']} {artifact['form']}",
        )
    unchanged = raw["base"]["kind"] == artifact["target"]
    check_base_proof(raw["base"].get("proof"), unchanged, f"{where}: base.proof", problems)
    for section in ("base", "adapter"):
        for name, digest in raw[section]["files"].items():
            if complaint := SHA256.complaint(digest):
                problems.add(where, f"{section}.files.{name}", *complaint)
        if not raw[section]["files"]:
            problems.add(where, f"{section}.files", "at least one file", "none")
    seen: set[str] = set()
    for entry in raw["files"]:
        if not is_file_name(entry["path"]):
            problems.add(where, "files.path", "a plain file name", repr(entry["path"]))
        if entry["path"].casefold() in seen:
            problems.add(where, "files.path", "each file once", entry["path"])
        seen.add(entry["path"].casefold())
    tensors: set[str] = set()
    for entry in raw["modules"]:
        if not _is_shape(entry["shape"]):
            problems.add(where, f"modules.{entry['module']}.shape", "[out, in]", entry["shape"])
        if entry["tensor"] in tensors:
            problems.add(where, "modules.tensor", "each tensor once", entry["tensor"])
        tensors.add(entry["tensor"])
    _check_slots(raw, where, problems)


def _check_slots(raw: dict[str, Any], where: str, problems: Problems) -> None:
    slots = raw.get("slots", [])
    form = find_form(raw["artifact"]["target"], raw["artifact"]["form"])
    if bool(slots) != (form is not None and form.has_slots):
        got = f"{len(slots)} in an artifact of form {raw['artifact']['form']}"
        problems.add(where, "slots", "slots in the adapter form, and nowhere else", got)
    names: set[str] = set()
    for entry in slots:
        if not _is_shape(entry["shape"]):
            problems.add(where, f"slots.{entry['name']}.shape", "[rows, columns]", entry["shape"])
        if entry["type"] not in _SLOT_TYPES:
            wanted = " or ".join(_SLOT_TYPES)
            problems.add(where, f"slots.{entry['name']}.type", wanted, entry["type"])
        if entry["name"] in names:
            problems.add(where, "slots.name", "each slot once", entry["name"])
        names.add(entry["name"])


def _is_shape(shape: list[Any]) -> bool:
    return len(shape) == 2 and list_of(integer(1)).complaint(shape) is None
