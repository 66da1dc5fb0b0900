"""Loaded is what was checked: files are read once, and nothing that happens to them later matters."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
from onnx_tools import quick
from races import IDS, race

from safegene import convert
from safegene_runtime.artifact.integrity import check_integrity
from safegene_runtime.artifact.manifest import read_manifest
from safegene_runtime.engines.registry import open_engine
from safegene_runtime.errors import FormatError, ManifestError, SafeGeneError
from safegene_runtime.formats import sealed
from safegene_runtime.formats.files import is_there, open_regular, read_small_file, sha256_file
from safegene_runtime.formats.sealed import SealedFiles, native_path, recheck

FORMS = ("gguf merged", "gguf sidecar", "onnx merged", "onnx branch", "onnx adapter")
RACES = 100
"""Of each kind and form; `benchmarks/races.py` runs 1,000. They open in this process: a child takes a
second, and inherits what was sealed here."""

memfd = pytest.mark.skipif(not sealed.has_memfd(), reason="this system has no memory to seal")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Two artifacts of each form, from two adapters."""
    folder = tmp_path_factory.mktemp("sealed")
    found: dict[str, list[Path]] = {}
    for seed in (1, 2):
        adapter = tiny.peft_adapter("llama", folder / f"adapter-{seed}", scale=0.1, seed=seed)
        for form in FORMS:
            kind, name = form.split()
            out = folder / f"{kind}-{name}-{seed}"
            if kind == "gguf":
                convert(adapter, tiny.gguf_model("llama"), out, form=name, check=False)  # type: ignore[arg-type]
            else:
                quick(adapter, tiny.onnx_model("llama"), out, form=name)
            found.setdefault(form, []).append(out)
    return {form: (one, other) for form, (one, other) in found.items()}


def base_of(form: str) -> Path | None:
    return tiny.gguf_model("llama") if form == "gguf sidecar" else None


def logits(
    folder: Path, base: Path | None, between: Callable[[], object], apart: bool
) -> np.ndarray:
    """Of a model that is checked and then loaded; something happens in between, and once more after."""
    with SealedFiles() as files:
        served = check_integrity(read_manifest(folder), folder, None, base, lambda *_: None, files)
        between()
        engine = open_engine(served.model, served.adapter, threads=1, apart=apart)
    with engine:
        between()
        return next(iter(engine.logits([IDS], [2])))[1].copy()


@memfd
@pytest.mark.parametrize("form", FORMS)
def test_what_was_checked_is_loaded_when_the_files_are_gone(
    form: str, made: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """So nothing is read from the folder again: neither by a check nor by native code nor by a child."""
    folder = shutil.copytree(made[form][0], tmp_path / "out")
    base = base_of(form)
    if base is not None:
        base = Path(shutil.copy(base, tmp_path / "base.gguf"))
    expected = logits(folder, base, lambda: None, apart=False)

    def remove() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        (tmp_path / "base.gguf").unlink(missing_ok=True)

    assert np.array_equal(logits(folder, base, remove, apart=True), expected)


@memfd
@pytest.mark.parametrize("form", FORMS)
def test_bytes_that_are_wiped_or_cut_after_the_check_change_nothing(
    form: str, made: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    folder = shutil.copytree(made[form][0], tmp_path / "out")
    expected = logits(folder, base_of(form), lambda: None, apart=False)

    def wipe() -> None:
        for path in folder.iterdir():
            with path.open("r+b") as file:
                file.write(bytes(path.stat().st_size))
                file.truncate(path.stat().st_size // 2)

    assert np.array_equal(logits(folder, base_of(form), wipe, apart=False), expected)


@memfd
@pytest.mark.parametrize("how", ["swap", "edit", "cut"])
@pytest.mark.parametrize("form", FORMS)
def test_a_race_is_never_won(
    form: str, how: str, made: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    times = RACES if how == "swap" else RACES // 5
    counts = race(times, how, *made[form], base_of(form), tmp_path)
    assert counts.wrong == 0
    assert counts.genuine, "all were refused: no race was run"


@pytest.mark.parametrize("change", ["edit", "swap", "none"])
def test_without_sealed_memory_a_change_is_found_after_the_load(
    change: str, made: dict[str, tuple[Path, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sealed, "has_memfd", lambda: False)
    genuine, other = made["onnx adapter"]
    folder = shutil.copytree(genuine, tmp_path / "out")
    path, data = folder / "adapter.onnx_adapter", (other / "adapter.onnx_adapter").read_bytes()

    def act() -> None:
        if change == "edit":
            with path.open("r+b") as file:
                file.write(data)
        elif change == "swap":
            (tmp_path / "new").write_bytes(data)
            os.replace(tmp_path / "new", path)

    if change == "none":
        expected = logits(genuine, None, lambda: None, apart=False)
        assert np.array_equal(logits(folder, None, act, apart=False), expected)
    else:
        with pytest.raises(SafeGeneError, match="it changed while it was being loaded"):
            logits(folder, None, act, apart=False)


def test_readers_get_what_was_read_first(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"first")
    with SealedFiles() as files:
        digest = files.add(path)
        path.write_bytes(b"second, and longer") if sealed.has_memfd() else None
        assert read_small_file(path, 100) == b"first"
        assert sha256_file(path) == digest
        with open_regular(path) as one, open_regular(path) as other:
            assert one.read(2) == b"fi"
            assert other.read() == b"first", "each reader has a place of its own"
        recheck()
        files.release(path)
        with pytest.raises(FormatError, match="one of those that were checked"):
            open_regular(path)
    assert path.read_bytes() == read_small_file(path, 100)


def test_in_a_closed_folder_nothing_appears(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1")
    with SealedFiles() as files:
        files.add(tmp_path / "one")
        files.close_folder(tmp_path)
        (tmp_path / "two").write_bytes(b"2")
        assert is_there(tmp_path / "one")
        assert not is_there(tmp_path / "two")
        assert not is_there(tmp_path / "three")
        with pytest.raises(FormatError, match="one of those that were checked"):
            open_regular(tmp_path / "two")
    assert is_there(tmp_path / "two")


@memfd
def test_the_copy_cannot_be_changed_through_its_own_path(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1234")
    with SealedFiles() as files:
        files.add(tmp_path / "one")
        place = native_path(tmp_path / "one")
        assert place.startswith("/proc/self/fd/")
        with pytest.raises(PermissionError), open(place, "r+b") as file:
            file.write(b"9")
        with pytest.raises(PermissionError):
            os.truncate(place, 0)
    assert stat.S_ISREG((tmp_path / "one").stat().st_mode)


@pytest.mark.parametrize("form", ["gguf merged", "onnx merged"])
def test_an_artifact_with_a_second_name_is_not_opened(
    form: str, made: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    folder = shutil.copytree(made[form][0], tmp_path / "out")
    name = read_manifest(folder).files[0].path
    os.link(folder / name, tmp_path / "elsewhere")
    with pytest.raises(ManifestError, match="a hard link"):
        logits(folder, None, lambda: None, apart=False)
