"""The folder of an artifact is what its manifest says."""

# ruff: noqa: F811 - fixtures are imported, and are parameters of the tests, too
from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from test_manifest import CONTENT, _assert_helpful, _sha, folder  # noqa: F401

from safegene_runtime.artifact.manifest import (
    check_files,
    read_manifest,
)
from safegene_runtime.errors import ManifestError


def test_a_folder_as_it_was_made_passes_and_reports_every_byte(folder: Path) -> None:
    seen: list[int] = []
    check_files(read_manifest(folder), folder, seen.append)
    assert sum(seen) == sum(len(data) for data in CONTENT.values())


def test_a_hard_link_is_refused(folder: Path) -> None:
    """Whoever has the other name can change the bytes after they were checked."""
    os.link(folder / "model.gguf", folder.parent / f"{folder.name}.store")
    with pytest.raises(ManifestError, match=r"a hard link: the file has 2 names\n.*put a copy"):
        check_files(read_manifest(folder), folder)


def _replace(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def change(folder: Path) -> None:
        (folder / "model.gguf").unlink()
        make(folder / "model.gguf")

    return change


def _edit(folder: Path) -> None:
    data = bytearray(CONTENT["model.gguf"])
    data[50] ^= 1
    (folder / "model.gguf").write_bytes(data)


def _link_to_itself_elsewhere(folder: Path) -> None:
    """The right bytes, but somewhere else, where they can be changed later."""
    elsewhere = folder.parent / f"{folder.name}.elsewhere"
    (folder / "model.gguf").rename(elsewhere)
    (folder / "model.gguf").symlink_to(elsewhere)


def _swap(folder: Path) -> None:
    (folder / "model.gguf").write_bytes(CONTENT["notes.txt"])
    (folder / "notes.txt").write_bytes(CONTENT["model.gguf"])


DAMAGED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "missing": ("model.gguf: expected the file, got nothing", _replace(lambda path: None)),
    "one bit": (f"sha256: expected {_sha(CONTENT['model.gguf'])}", _edit),
    "one byte more": (
        "size: expected 104 bytes, got 105 bytes",
        lambda folder: (folder / "model.gguf").write_bytes(CONTENT["model.gguf"] + b"\0"),
    ),
    "one byte less": (
        "size: expected 104 bytes, got 103 bytes",
        lambda folder: os.truncate(folder / "model.gguf", 103),
    ),
    "empty": ("got 0 bytes", lambda folder: os.truncate(folder / "model.gguf", 0)),
    "a byte in an empty file": (
        "notes.txt: size: expected 0 bytes, got 1 bytes",
        lambda folder: (folder / "notes.txt").write_bytes(b"x"),
    ),
    "swapped": ("size", _swap),
    "a link to the same bytes": ("a symbolic link", _link_to_itself_elsewhere),
    "a dangling link": ("a symbolic link", _replace(lambda path: path.symlink_to("nowhere"))),
    "a FIFO": ("size|regular file", _replace(os.mkfifo)),
    "a FIFO for an empty file": (
        "notes.txt: file: expected a regular file",
        lambda folder: ((folder / "notes.txt").unlink(), os.mkfifo(folder / "notes.txt")),
    ),
    "a folder": ("size|regular file", _replace(os.mkdir)),
    "an extra file": (
        "tokenizer.json: expected only files that the manifest lists",
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
    ),
    "an extra hidden file": (".hidden: expected only", lambda f: (f / ".hidden").write_text("")),
    "an extra folder": ("sub: expected only", lambda folder: (folder / "sub").mkdir()),
    "an extra link": ("link: expected only", lambda f: (f / "link").symlink_to("model.gguf")),
    "the name in capitals": (
        "MODEL.gguf: expected only",
        lambda folder: (folder / "model.gguf").rename(folder / "MODEL.gguf"),
    ),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", DAMAGED)
def test_a_folder_that_is_not_what_the_manifest_says_is_refused(folder: Path, name: str) -> None:
    expected, damage = DAMAGED[name]
    damage(folder)
    with pytest.raises(ManifestError) as caught:
        check_files(read_manifest(folder), folder)
    _assert_helpful(caught.value)
    assert re.search(expected, str(caught.value)), caught.value
    assert str(folder) in str(caught.value)


def test_all_damage_of_a_folder_is_told_at_once(folder: Path) -> None:
    _edit(folder)
    (folder / "notes.txt").unlink()
    (folder / "extra").write_text("x")
    with pytest.raises(ManifestError) as caught:
        check_files(read_manifest(folder), folder)
    assert [problem.field for problem in caught.value.problems] == ["extra", "sha256", "notes.txt"]


def test_every_single_byte_counts(folder: Path) -> None:
    manifest = read_manifest(folder)
    data = CONTENT["model.gguf"]
    for at in range(len(data)):
        (folder / "model.gguf").write_bytes(data[:at] + bytes([data[at] ^ 0x80]) + data[at + 1 :])
        with pytest.raises(ManifestError, match="sha256"):
            check_files(manifest, folder)
