"""What is seldom meant is said by every command that reads the adapter, and refused by none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

from safegene_converter.cli.main import main
from safegene_converter.inputs.adapter_files import CONFIG_NAME
from safegene_runtime.artifact.manifest import read_manifest


def adapter(path: Path, **changed: Any) -> Path:
    tiny.peft_adapter("llama", path)
    config = json.loads((path / CONFIG_NAME).read_text())
    (path / CONFIG_NAME).write_text(json.dumps({**config, **changed}))
    return path


@pytest.mark.parametrize("form", ["gguf sidecar", "gguf merged", "onnx merged"])
def test_a_conversion_keeps_the_cautions_in_its_manifest(form: str, tmp_path: Path) -> None:
    target, how = form.split()
    path = adapter(tmp_path / "adapter", lora_alpha=4000)
    base = tiny.gguf_model("llama") if target == "gguf" else tiny.onnx_model("llama")
    arguments = ["convert", path, "--base", base, "--to", target, "--as", how, "--no-self-check"]
    assert main([*map(str, arguments), "-o", str(tmp_path / "out")]) == 0
    caution = read_manifest(tmp_path / "out").settings["caution"]
    assert "the effective scale is above 100" in caution


def test_inspect_shows_the_cautions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    targets = ["q_proj", "k_proj", "up_proj", "c_attn"]
    path = adapter(tmp_path / "adapter", target_modules=targets)
    assert main(["inspect", str(path)]) == 0
    assert "caution: 'c_attn' of target_modules has no tensors" in capsys.readouterr().out
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cautions"] == [
        "'c_attn' of target_modules has no tensors"
    ]


def test_inspect_names_the_folder_that_would_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = adapter(tmp_path / "run" / "checkpoint-7")
    assert main(["inspect", str(tmp_path / "run")]) == 2
    assert str(path) in capsys.readouterr().err.replace("\n", "")
