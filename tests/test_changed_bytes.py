"""A file whose bytes were changed is refused, and the message says where the change is."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
from test_provenance import written_adapter

from safegene import convert
from safegene_runtime.artifact.integrity import check_integrity
from safegene_runtime.artifact.manifest import Manifest
from safegene_runtime.errors import ManifestError
from safegene_runtime.formats.gguf.header import read_gguf
from safegene_runtime.formats.sealed import SealedFiles
from safegene_runtime.progress import silent


@pytest.fixture(params=["merged", "sidecar"])
def artifact(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Manifest, Path, Path]:
    """A manifest, its folder and its file."""
    base = tiny.gguf_model("llama")
    out = tmp_path / "out"
    manifest = convert(
        written_adapter(tmp_path / "adapter"), base, out, form=request.param, check=False
    )
    return manifest, out, out / manifest.files[0].path


def refused(manifest: Manifest, folder: Path) -> str:
    base = None if manifest.form.carries_base else tiny.gguf_model("llama")
    with SealedFiles() as files, pytest.raises(ManifestError) as caught:
        check_integrity(manifest, folder, None, base, silent, files)
    return str(caught.value)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_a_changed_tensor_is_named_and_no_other(artifact: tuple[Manifest, Path, Path]) -> None:
    manifest, folder, path = artifact
    first, *others = manifest.modules
    name = first.tensor if manifest.form.merges else f"{first.tensor}.lora_b"
    flip(path, read_gguf(path).tensors[name].offset + 5)
    said = refused(manifest, folder)
    assert f"{path}: sha256: expected" in said
    assert f"{first.tensor}: expected bytes with SHA-256 {first.sha256}" in said
    assert not [module for module in others if module.tensor in said]


def test_a_change_elsewhere_is_said_to_be_elsewhere(
    artifact: tuple[Manifest, Path, Path],
) -> None:
    manifest, folder, path = artifact
    data = path.read_bytes()
    path.write_bytes(data.replace(b"safegene.version", b"safegene.Version"))
    assert "a change outside of the" in refused(manifest, folder)


def test_a_file_that_is_no_gguf_any_more_is_refused_all_the_same(
    artifact: tuple[Manifest, Path, Path],
) -> None:
    manifest, folder, path = artifact
    flip(path, 0)
    said = refused(manifest, folder)
    assert "sha256: expected" in said
    assert "a GGUF that can be looked into" in said
