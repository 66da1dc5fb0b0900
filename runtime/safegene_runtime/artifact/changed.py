"""Which tensor of a file was changed, for the message that refuses it."""

from __future__ import annotations

from pathlib import Path

from safegene_runtime.artifact.forms import GGUF
from safegene_runtime.artifact.manifest import Manifest
from safegene_runtime.errors import ManifestError, Problems, SafeGeneError
from safegene_runtime.formats.files import sha256_of
from safegene_runtime.formats.gguf.header import read_gguf
from safegene_runtime.formats.gguf.tensors import read_tensor_bytes

__all__ = ["with_tensors"]


def with_tensors(error: ManifestError, manifest: Manifest, folder: Path) -> ManifestError:
    """An error about the bytes of a GGUF, with the tensors that the adapter touched and that differ.

    Nothing is vouched for here: the file is refused already, and may be anything.
    """
    problems = Problems()
    problems.extend(error.problems)
    changed = {problem.where for problem in error.problems if problem.field == "sha256"}
    for entry in manifest.files if manifest.form.target is GGUF else ():
        path = folder / entry.path
        if str(path) in changed and entry.role in manifest.form.roles:
            try:
                _add_tensors(manifest, path, problems)
            except (SafeGeneError, OSError) as unreadable:
                problems.add(
                    str(path), "tensors", "a GGUF that can be looked into", str(unreadable)
                )
    return ManifestError(list(problems))


def _add_tensors(manifest: Manifest, path: Path, problems: Problems) -> None:
    tensors = read_gguf(path).tensors
    suffixes = ("",) if manifest.form.merges else (".lora_a", ".lora_b")
    found = False
    for module in manifest.modules:
        infos = [tensors.get(f"{module.tensor}{suffix}") for suffix in suffixes]
        stored = b"".join(read_tensor_bytes(info) for info in infos if info is not None)
        digest = sha256_of(stored)
        if digest != module.sha256:
            found = True
            problems.add(str(path), module.tensor, f"bytes with SHA-256 {module.sha256}", digest)
    if not found:
        got = f"a change outside of the {len(manifest.modules)} tensors that the adapter touches"
        problems.add(str(path), "tensors", "the bytes that were written", got)
