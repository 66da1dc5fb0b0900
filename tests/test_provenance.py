"""A model file names its adapter, and the manifest beside it has to name the same one."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import pytest
import tiny
from onnx_tools import agree, quick
from safetensors.numpy import save_file

from safegene import convert
from safegene_converter.inputs.adapter import read_adapter
from safegene_runtime.artifact.integrity import check_integrity
from safegene_runtime.artifact.manifest import read_manifest
from safegene_runtime.errors import ManifestError, RecordError
from safegene_runtime.formats.sealed import SealedFiles
from safegene_runtime.progress import silent

KEY = "safegene.adapter.sha256"
FORMS = ("gguf merged", "gguf sidecar", "onnx merged", "onnx branch", "onnx adapter")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("provenance")
    adapter = written_adapter(folder / "adapter")
    for target, form in map(str.split, FORMS):
        out = folder / f"{target} {form}"
        if target == "gguf":
            convert(adapter, tiny.gguf_model("llama"), out, form=form, check=False)
        else:
            quick(adapter, tiny.onnx_model("llama"), out, form=form)
    return {form: folder / form for form in FORMS}


def written_adapter(out: Path, seed: int = 0) -> Path:
    """An adapter for the tiny llama, without PEFT: what is asked here is no matter of arithmetic."""
    out.mkdir()
    random = np.random.default_rng(seed)
    name = "base_model.model.model.layers.{}.self_attn.o_proj.lora_{}.weight"
    save_file(
        {
            name.format(layer, part): random.normal(0, 0.1, shape).astype(np.float32)
            for layer in range(tiny.N_LAYERS)
            for part, shape in (("A", (4, 64)), ("B", (64, 4)))
        },
        out / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["o_proj"]}
    (out / "adapter_config.json").write_text(json.dumps(config))
    return out


def base_of(form: str) -> Path:
    return tiny.gguf_model("llama") if form.startswith("gguf") else tiny.onnx_model("llama")


def carrier(folder: Path) -> Path:
    """The one file with the key: the model, or the adapter of a sidecar."""
    (path,) = [*folder.glob("*.gguf"), *folder.glob("model.onnx")]
    return path


def check(form: str, folder: Path) -> None:
    base = base_of(form) if form == "gguf sidecar" else None
    with SealedFiles() as files:
        check_integrity(read_manifest(folder), folder, None, base, silent, files)


def stated(path: Path) -> str:
    """What the file says, by an independent reader."""
    if path.suffix == ".gguf":
        return str(gguf.GGUFReader(path).fields[KEY].contents())
    model = onnx.load(path, load_external_data=False)
    return next(prop.value for prop in model.metadata_props if prop.key == KEY)


def rewrite(folder: Path, old: bytes, new: bytes) -> None:
    assert len(old) == len(new)
    path = carrier(folder)
    data = path.read_bytes()
    assert data.count(old) == 1
    path.write_bytes(data.replace(old, new))


def other_digest(form: str, folder: Path) -> None:
    rewrite(folder, stated(carrier(folder)).encode(), b"0" * 64)


def key_renamed(form: str, folder: Path) -> None:
    rewrite(folder, KEY.encode(), b"safegene.adapter.sha255")


def other_manifest(form: str, folder: Path) -> None:
    manifest = read_manifest(folder)
    files = {**manifest.adapter["files"], "adapter_config.json": "1" * 64}
    dataclasses.replace(manifest, adapter={**manifest.adapter, "files": files}).write(folder)


def renamed_in_the_manifest(form: str, folder: Path) -> None:
    manifest = read_manifest(folder)
    files = {f"{name}.old": digest for name, digest in manifest.adapter["files"].items()}
    dataclasses.replace(manifest, adapter={**manifest.adapter, "files": files}).write(folder)


@pytest.mark.parametrize("form", FORMS)
def test_what_the_converter_wrote_names_the_manifests_adapter(
    form: str, artifacts: dict[str, Path]
) -> None:
    folder = artifacts[form]
    files = read_manifest(folder).adapter["files"]
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name} {files[name]}\n".encode())
    assert stated(carrier(folder)) == digest.hexdigest()
    check(form, folder)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("edit", "got"),
    [(other_digest, "0" * 64), (key_renamed, "nothing"), (other_manifest, None),
     (renamed_in_the_manifest, None)],
)  # fmt: skip
def test_another_adapter_in_header_or_manifest_is_refused_with_both_digests(
    form: str,
    edit: Callable[[str, Path], None],
    got: str | None,
    artifacts: dict[str, Path],
    tmp_path: Path,
) -> None:
    out = tmp_path / "out"
    shutil.copytree(artifacts[form], out)
    genuine = stated(carrier(out))
    edit(form, out)
    agree(out)
    with pytest.raises(ManifestError, match=KEY) as caught:
        check(form, out)
    (problem,) = caught.value.problems
    assert problem.field == KEY
    assert problem.got == (got or genuine)
    assert (problem.expected == genuine) is (got is not None)
    assert problem.fix


@pytest.mark.parametrize("form", ["gguf merged", "onnx merged", "onnx branch"])
def test_the_base_under_the_artifacts_name_says_nothing_and_is_refused(
    form: str, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(artifacts[form], out)
    base = base_of(form)
    for path in [base] if base.is_file() else base.glob("*.onnx*"):
        shutil.copyfile(path, carrier(out) if path.suffix == ".gguf" else out / path.name)
    agree(out)
    with pytest.raises(ManifestError, match=f"{KEY}: expected [0-9a-f]{{64}}, got nothing"):
        check(form, out)


def expressions(adapter: Path, **coefficients: float) -> None:
    """Writes safegene.json with one expression per argument, the same number for each layer."""
    (adapter / "safegene.json").write_text(
        json.dumps(
            {
                "format_version": 1,
                "base_model": {"name": "tiny", "architecture": "llama", "n_layers": tiny.N_LAYERS},
                "selected_layers": list(range(tiny.N_LAYERS)),
                "default_expression": next(iter(coefficients)),
                "expressions": {
                    name: {"coefficients": {str(n): value for n in range(tiny.N_LAYERS)}}
                    for name, value in coefficients.items()
                },
            }
        )
    )


def recorded(path: Path, expression: str | None = None) -> Any:
    """As much of a reference as integrity looks at: which adapter it was recorded with."""
    adapter = read_adapter(path, expression)
    about = {
        "name": path.name, "files": dict(adapter.digests), "expression": adapter.expression,
    }  # fmt: skip
    return types.SimpleNamespace(meta={"adapter": about})


def test_one_gene_many_targets_a_new_expression_leaves_earlier_records_valid(
    tmp_path: Path,
) -> None:
    adapter = written_adapter(tmp_path / "gene")
    expressions(adapter, first=0.5)
    before = recorded(adapter)
    expressions(adapter, first=0.5, second=2.0)
    out = tmp_path / "out"
    base = tiny.gguf_model("llama")
    convert(adapter, base, out, form="merged", expression="first", check=False)
    with SealedFiles() as files:
        check_integrity(read_manifest(out), out, before, None, silent, files)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (lambda gene: expressions(gene, first=0.5, second=2.0), "expression.*expected second"),
        (lambda gene: expressions(gene, first=0.75), "other coefficients under the same name"),
        (lambda gene: (gene / "safegene.json").unlink(), "expression.*expected default"),
        (lambda gene: shutil.rmtree(gene) or written_adapter(gene, seed=1), "another adapter"),
    ],
    ids=["another expression", "recalibrated", "none", "other vectors"],
)
def test_a_reference_of_another_expression_or_other_vectors_is_refused(
    other: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    adapter = written_adapter(tmp_path / "gene")
    expressions(adapter, first=0.5)
    out = tmp_path / "out"
    convert(adapter, tiny.gguf_model("llama"), out, form="merged", check=False)
    other(adapter)
    second = "expected second" in says
    with pytest.raises(RecordError, match=f"(?s){says}"), SealedFiles() as files:
        check_integrity(
            read_manifest(out), out, recorded(adapter, "second" if second else None), None,
            silent, files,
        )  # fmt: skip
