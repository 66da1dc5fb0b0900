"""A manifest says everything about its folder, or it is refused."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safegene_runtime.artifact.manifest import (
    FileEntry,
    Manifest,
    ModuleEntry,
    read_manifest,
)
from safegene_runtime.errors import ManifestError

SHA = hashlib.sha256(b"something").hexdigest()
CONTENT = {"model.gguf": b"GGUF" + bytes(100), "notes.txt": b""}


def _module(name: str = "q_proj", tensor: str = "blk.0.attn_q.weight") -> ModuleEntry:
    return ModuleEntry(
        name,
        tensor,
        (576, 192),
        8,
        2.0,
        1.0,
        2.0,
        "Q4_1",
        "Q8_0",
        100,
        200,
        SHA,
        {"gain": 0.99, "relative_error": 0.1, "base_error_ratio": None, "mode": "grid"},
    )


def _manifest() -> Manifest:
    entries = (
        FileEntry(name, "model" if name.endswith("gguf") else "data", len(data), _sha(data))
        for name, data in CONTENT.items()
    )
    return Manifest(
        tool={"name": "safegene", "version": "0.1.0"},
        artifact={
            "target": "gguf",
            "form": "merged",
            "architecture": "llama",
            "name": "tiny 世界",
            "precision": "8-bit",
        },
        base={"kind": "gguf", "name": "base.gguf", "files": {"base.gguf": SHA}},
        adapter={
            "name": "adapter",
            "files": {"adapter_model.safetensors": SHA},
            "expression": "1.0",
            "n_parameters": 2 * 8 * (576 + 192),
        },
        tokenizer={"chat_template_sha256": None},
        settings={"type": "q8_0", "nested": {"list": [1, 2.5, None]}},
        files=tuple(entries),
        modules=(_module(), _module("k_proj", "blk.0.attn_k.weight")),
    )


SLOT = {"name": "a", "shape": [64, 4], "type": "F32"}
ONNX = {"target": "onnx", "architecture": "llama", "name": "x", "precision": "f32"}
VERIFICATION = {
    "verdict": "PASS",
    "reference_sha256": SHA,
    "engine": {"name": "llama.cpp", "version": "1"},
    "report": {"broken_at": None},
}


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in CONTENT.items():
        (tmp_path / name).write_bytes(data)
    _manifest().write(tmp_path)
    return tmp_path


# --- the manifest ----------------------------------------------------------------------------------


def test_what_is_written_is_what_is_read(folder: Path) -> None:
    assert read_manifest(folder) == _manifest()
    verified = _manifest().with_verification(VERIFICATION)
    verified.write(folder)
    assert read_manifest(folder) == verified != _manifest()
    assert verified.with_verification(None) == _manifest()


def test_equal_manifests_are_equal_bytes(folder: Path) -> None:
    again = Manifest.from_json(_manifest().to_json(), "x")
    assert again.to_json() == _manifest().to_json() == (folder / "manifest.json").read_bytes()


def test_a_file_is_found_by_its_role() -> None:
    found = _manifest().file("model")
    assert found is not None
    assert found.path == "model.gguf"
    assert _manifest().file("adapter") is None


@given(
    name=st.text(st.characters(exclude_categories=["Cs"])),
    scale=st.floats(allow_nan=False, allow_infinity=False),
    settings=st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])), st.none() | st.integers() | st.booleans()
    ),
)
def test_every_manifest_survives_the_round_trip(
    name: str, scale: float, settings: dict[str, Any]
) -> None:
    raw = json.loads(_manifest().to_json())
    raw["artifact"]["name"], raw["settings"] = name, settings
    raw["modules"][0] |= {"scaling": scale, "effective_scale": scale}
    found = Manifest.from_json(json.dumps(raw).encode(), "x")
    assert Manifest.from_json(found.to_json(), "x") == found
    assert found.modules[0].effective_scale == scale


Change = Callable[[dict[str, Any]], object]


def _set(path: str, value: Any) -> Change:
    """Sets a value, addressed as in a.0.b."""

    def change(raw: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        place: Any = raw
        for part in parents:
            place = place[int(part) if isinstance(place, list) else part]
        place[int(last) if isinstance(place, list) else last] = value

    return change


def _delete(path: str) -> Change:
    def change(raw: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        place: Any = raw
        for part in parents:
            place = place[int(part) if isinstance(place, list) else part]
        del place[last]

    return change


def _again(section: str, **changes: Any) -> Change:
    """Repeats the first entry of a list, changed."""
    return lambda raw: raw[section].append({**copy.deepcopy(raw[section][0]), **changes})


_NAMES = {
    "parent": "../model.gguf",
    "parent alone": "..",
    "this folder": ".",
    "inside": "sub/model.gguf",
    "absolute": "/etc/passwd",
    "Windows": "..\\model.gguf",
    "drive": "C:model.gguf",
    "hidden": ".model.gguf",
    "empty": "",
    "NUL": "model\0.gguf",
    "newline": "model.gguf\n",
    "escape": "\x1b[2J",
    "right to left": "model\u202effug.gguf",
    "lookalike": "m\u043edel.gguf",
    "long": "n" * 201,
    "the manifest": "manifest.json",
    "the manifest in capitals": "Manifest.JSON",
}

# name -> (what the message must say, the change)
HOSTILE: dict[str, tuple[str, Change]] = {
    "version 2": ("format_version: expected 1, got 2", _set("format_version", 2)),
    "version 0": ("format_version: expected 1", _set("format_version", 0)),
    "version true": ("format_version: expected 1, got True", _set("format_version", True)),
    "version as text": ("format_version", _set("format_version", "1")),
    "version missing": ("format_version: expected to be present", _delete("format_version")),
    "unknown key": ("extra: expected one of the known keys", _set("extra", 1)),
    "unknown key in a file": ("files.0.: url: expected one of", _set("files.0.url", "http://x")),
    "unknown key in a module": ("modules.0.: alpha", _set("modules.0.alpha", 1)),
    "unknown key in the verification": (
        "verification: waived: expected one of",
        _set("verification", {**VERIFICATION, "waived": True}),
    ),
    **{
        f"{name} missing": (f"{name}: expected to be present, got nothing", _delete(name))
        for name in ("tool", "artifact", "base", "adapter", "tokenizer", "settings", "files")
    },
    "modules missing": ("modules: expected to be present", _delete("modules")),
    "verification missing": ("verification: expected to be present", _delete("verification")),
    "sha256 of a file missing": ("files.0.: sha256: expected to be", _delete("files.0.sha256")),
    "scale of a module missing": ("modules.0.: effective_scale", _delete("modules.0.effective_scale")),
    "tool a list": ("tool: expected an object, got a list", _set("tool", [])),
    "tool null": ("tool: expected an object, got null", _set("tool", None)),
    "settings a list": ("settings: expected an object, got a list", _set("settings", [1])),
    "files an object": ("files: expected a list that is not empty, got an obj", _set("files", {"a": 1})),
    "no files": ("files: expected a list that is not empty, got a list that is empty", _set("files", [])),
    "no modules": ("modules: expected a list that is not empty", _set("modules", [])),
    "a file that is text": ("files.0.: value: expected a JSON object", _set("files.0", "model.gguf")),
    "a size as text": ("size_bytes: expected an integer, got text", _set("files.0.size_bytes", "104")),
    "a size as a float": ("expected an integer, got a number", _set("files.0.size_bytes", 104.0)),
    "a size that is true": ("expected an integer, got true", _set("files.0.size_bytes", True)),
    "a negative size": ("size_bytes: expected a size in bytes, got -1", _set("files.0.size_bytes", -1)),
    "a size of 2^64": ("size_bytes: expected an integer of 64 bits", _set("files.0.size_bytes", 2**64)),
    "a scale of 10^400": ("scaling: expected an integer of 64 bits", _set("modules.0.scaling", 10**400)),
    "a scale as text": ("scaling: expected a number, got text", _set("modules.0.scaling", "2")),
    "survival as text": ("survival: expected an object or null", _set("modules.0.survival", "yes")),
    "survival of nothing": ("survival: gain: expected to be present", _set("modules.0.survival", {})),
    "survival as words": ("survival: gain: expected a number", _set("modules.0.survival.gain", "all")),
    "survival of a list": ("mode: expected text, got a list", _set("modules.0.survival.mode", [1])),
    "survival beyond sums": ("gain: expected at most 1e", _set("modules.0.survival.gain", 1e308)),
    "an unknown survival": ("survival: more: expected one", _set("modules.0.survival.more", 1)),
    "a short digest": ("sha256: expected 64 hex", _set("files.0.sha256", SHA[:63])),
    "a long digest": ("sha256: expected 64 hex", _set("files.0.sha256", SHA + "0")),
    "a digest in capitals": ("sha256: expected 64 hex", _set("files.0.sha256", SHA.upper())),
    "a digest of a million digits": ("sha256: expected 64 hex", _set("files.0.sha256", "a" * 10**6)),
    "a key of a million letters": ("files.0.: kkkk", _set("files.0." + "k" * 10**6, 1)),
    "a digest with a newline": ("sha256: expected 64 hex", _set("files.0.sha256", SHA + "\n")),
    "a digest that is empty": ("sha256: expected 64 hex", _set("modules.0.sha256", "")),
    "a digest in other digits": ("sha256: expected 64 hex", _set("modules.0.sha256", "\u0661" * 64)),
    "a digest of the base": (r"base.files.base.gguf: expected 64", _set("base.files", {"base.gguf": 1})),
    "a digest of the template": (
        "chat_template_sha256: expected 64",
        _set("tokenizer.chat_template_sha256", "none"),
    ),
    "another role": ("role: expected model, adapter, data or config", _set("files.0.role", "x")),
    "no digest of the base": ("base.files: expected at least one", _set("base.files", {})),
    "no digest of the adapter": ("adapter.files: expected at least", _set("adapter.files", {})),
    "another kind of base": ("base.kind: expected gguf, hf or onnx, got pt", _set("base.kind", "pt")),
    "another target": ("artifact.form", _set("artifact.target", "pickle")),
    "another form": ("artifact.form: expected .*, got gguf branch", _set("artifact.form", "branch")),
    "slots without the adapter form": ("slots: expected slots in the adapter", _set("slots", [SLOT])),
    "the adapter form without slots": (
        "slots: expected slots.*got 0", _set("artifact", {**ONNX, "form": "adapter"}),
    ),
    "slots that are no list": ("slots: expected a list", _set("slots", {})),
    "an empty list of slots": ("slots: expected a list", _set("slots", [])),
    "a slot without a type": ("type: expected to be present", _set("slots", [{"name": "a"}])),
    "a slot of another type": ("slots.a.type: expected F32", _set("slots", [{**SLOT, "type": "Q8"}])),
    "a slot of one dimension": (
        "slots.a.shape: expected .rows", _set("slots", [{**SLOT, "shape": [4]}]),
    ),
    "a slot twice": ("slots.name: expected each slot once", _set("slots", [SLOT, SLOT])),
    "a slot with more": ("slots.0..*unknown key", _set("slots", [{**SLOT, "more": 1}])),
    "a shape of one": ("shape: expected .out, in., got .5.", _set("modules.0.shape", [5])),
    "a shape of three": ("shape: expected", _set("modules.0.shape", [1, 2, 3])),
    "a shape with 0": ("shape: expected", _set("modules.0.shape", [0, 192])),
    "a shape with true": ("shape: expected", _set("modules.0.shape", [True, 192])),
    "a shape of floats": ("shape: expected", _set("modules.0.shape", [576.0, 192.0])),
    "a file twice": ("files.path: expected each file once", _again("files")),
    "a file twice, in capitals": ("expected each file once", _again("files", path="MODEL.gguf")),
    "a tensor twice": ("modules.tensor: expected each tensor once", _again("modules", module="v")),
    "another verdict": (
        "verdict: expected PASS, FAIL, INCONCLUSIVE, VACUOUS, got fine",
        _set("verification", {**VERIFICATION, "verdict": "fine"}),
    ),
    "a verdict that is a list": (
        "verdict: expected text, got a list",
        _set("verification", {**VERIFICATION, "verdict": ["PASS"]}),
    ),
    "a verdict without its reference": (
        "reference_sha256: expected 64",
        _set("verification", {**VERIFICATION, "reference_sha256": ""}),
    ),
    "a verdict without more": ("report: expected to be", _set("verification", {"verdict": "PASS"})),
    "a verification that is true": ("verification: expected an object or null", _set("verification", True)),
    "a verification that is empty": ("verdict: expected to be present", _set("verification", {})),
    **{
        f"a file name: {name}": ("files.path: expected a plain file name", _set("files.0.path", path))
        for name, path in _NAMES.items()
    },
}  # fmt: skip


def _assert_helpful(error: ManifestError) -> None:
    assert error.problems
    for problem in error.problems:
        assert all((problem.where, problem.field, problem.expected, problem.got, problem.fix))
        assert "<class" not in str(problem)
        assert str(problem).replace("\n    -> ", "").isprintable()
        assert len(str(problem)) < 12_000


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_manifest_is_refused_by_field(folder: Path, name: str) -> None:
    expected, change = HOSTILE[name]
    raw = json.loads(_manifest().to_json())
    change(raw)
    (folder / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(ManifestError) as caught:
        read_manifest(folder)
    _assert_helpful(caught.value)
    assert caught.value.problems[0].where.startswith(str(folder / "manifest.json"))
    assert re.search(expected, str(caught.value)), caught.value


@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[]", b"{", b'{"a": 1, "a": 2}', b'{"a": NaN}', b"\xff", b"[" * 100_000],
    ids=repr,
)
def test_a_manifest_that_is_not_json_is_a_manifest_error(folder: Path, data: bytes) -> None:
    (folder / "manifest.json").write_bytes(data)
    with pytest.raises(ManifestError) as caught:
        read_manifest(folder)
    _assert_helpful(caught.value)


def test_a_key_twice_is_refused_wherever_it_is(folder: Path) -> None:
    text = _manifest().to_json().decode()
    for line in re.findall(r'^ +"\w+": [^\[{\n]*?(?=,?$)', text, re.MULTILINE):
        twice = text.replace(line, f"{line},\n{line}", 1)
        assert twice != text
        with pytest.raises(ManifestError, match="each key once"):
            Manifest.from_json(twice.encode(), "x")


def test_everything_wrong_is_told_at_once(folder: Path) -> None:
    raw = json.loads(_manifest().to_json())
    raw["files"][0]["path"], raw["files"][1]["path"] = "/a", "../b"
    raw["base"]["kind"], raw["artifact"]["form"] = "x", "y"
    with pytest.raises(ManifestError) as caught:
        Manifest.from_json(json.dumps(raw).encode(), "x")
    assert len(caught.value.problems) == 4


def test_every_section_and_field_is_required() -> None:
    raw = json.loads(_manifest().to_json())
    sections = [
        ("", raw),
        *((f"{name}.", raw[name]) for name in ("tool", "artifact", "base", "adapter", "tokenizer")),
        ("files.0.", raw["files"][0]),
        ("modules.0.", raw["modules"][0]),
    ]
    for prefix, section in sections:
        for key in list(section):
            damaged = copy.deepcopy(raw)
            _delete(prefix + key)(damaged)
            with pytest.raises(ManifestError, match=f"{key}: expected to be present"):
                Manifest.from_json(json.dumps(damaged).encode(), "x")


def _no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def _linked(folder: Path) -> None:
    (folder / "manifest.json").rename(folder / "real.json")
    (folder / "manifest.json").symlink_to("real.json")


def _fifo(folder: Path) -> None:
    _no_manifest(folder)
    os.mkfifo(folder / "manifest.json")


def _directory(folder: Path) -> None:
    _no_manifest(folder)
    (folder / "manifest.json").mkdir()


def _huge(folder: Path) -> None:
    os.truncate(folder / "manifest.json", 1 << 36)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (_no_manifest, "expected a manifest, got nothing"),
        (_linked, "got a symbolic link"),
        (_fifo, "expected a regular file"),
        (_directory, "expected a regular file"),
        (_huge, "size: expected at most"),
    ],
)
def test_a_manifest_is_a_small_regular_file(
    folder: Path, change: Callable[[Path], None], expected: str
) -> None:
    change(folder)
    with pytest.raises(ManifestError, match=expected) as caught:
        read_manifest(folder)
    _assert_helpful(caught.value)


def test_an_artifact_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for name in ("missing", "file"):
        with pytest.raises(ManifestError, match="expected a folder made by") as caught:
            read_manifest(tmp_path / name)
        _assert_helpful(caught.value)


# --- the folder ------------------------------------------------------------------------------------
