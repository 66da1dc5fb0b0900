"""Children import nothing from the folder we stand in, and none goes on for ever."""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path

import pytest
import tiny
from onnx_tools import convert_onnx

from safegene import convert, record
from safegene_converter.inputs.base import open_base
from safegene_runtime.child import (
    deadline_for,
    import_path,
    python_command,
    python_environment,
    run_child,
)
from safegene_runtime.engines.registry import open_engine
from safegene_runtime.errors import BaseModelError, EngineError
from safegene_runtime.record.prompts import Prompt

HOSTILE = ("numpy", "gguf", "torch", "onnx", "onnxruntime", "json", "safegene_runtime", "llama_cpp")


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """We stand in a folder with modules that leave a mark."""
    folder = tmp_path / "here"
    folder.mkdir()
    mark = f"open({str(tmp_path / 'mark')!r}, 'a').write(__name__ + '\\n')\n"
    for name in HOSTILE:
        (folder / f"{name}.py").write_text(f"{mark}raise SystemExit('hostile')\n")
    monkeypatch.chdir(folder)
    return tmp_path / "mark"


def test_a_child_does_not_import_from_the_current_folder(
    hostile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if it is on our own path, as with `python -m`."""
    monkeypatch.setattr(sys, "path", ["", os.getcwd(), *sys.path])
    code = "import numpy, safegene_runtime, json; print(json.dumps(numpy.__file__))"
    out = run_child(
        python_command("-c", code), what="a child", error=EngineError,
        environment=python_environment(),
    )  # fmt: skip
    assert "site-packages" in out
    assert not hostile.exists()


def test_our_own_packages_are_found_even_from_their_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.REPOSITORY / "runtime")
    assert str(tiny.REPOSITORY / "runtime") in import_path()


def test_converting_recording_and_serving_run_nothing_of_the_current_folder(
    hostile: Path, tmp_path: Path
) -> None:
    adapter = tiny.peft_adapter("llama", tmp_path / "adapter", scale=0.1)
    base = tiny.gguf_model("llama", 256)
    wide = tiny.peft_adapter("llama", tmp_path / "wide", scale=0.1, hidden=256)
    convert(wide, base, tmp_path / "merged", form="merged", type="q8_0")
    with open_engine(tmp_path / "merged" / "model.gguf", threads=1, apart=True) as engine:
        assert engine.tokenize("a", add_special=False)
    convert_onnx(adapter, tiny.hf_model("llama"), tmp_path / "onnx", form="merged")
    prompts = [Prompt("p", "Hello", "harmful", "test")]
    record(adapter, tiny.gguf_model("llama"), tmp_path / "ref", prompts=prompts, max_new_tokens=2)
    assert not hostile.exists(), hostile.read_text()


def test_a_child_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    began = time.monotonic()
    with pytest.raises(EngineError, match=r"no end within 1 s: it was killed \| so far"):
        run_child(
            python_command("-c", "import time; print('so far', flush=True); time.sleep(100)"),
            what="a child", error=EngineError, deadline_s=0.8,
        )  # fmt: skip
    assert time.monotonic() - began < 20


def test_a_file_that_grows_gives_a_child_more_time(tmp_path: Path) -> None:
    code = (
        "import sys, time\n"
        "with open(sys.argv[1], 'wb') as file:\n"
        "    for _ in range(12): file.write(b'x'); file.flush(); time.sleep(0.2)\n"
        "time.sleep(float(sys.argv[2]))"
    )
    seen: list[int] = []
    grows = tmp_path / "grows"
    run_child(
        python_command("-c", code, grows, "0"), what="a child", error=EngineError, deadline_s=1.5,
        grows=grows, progress=seen.append,
    )  # fmt: skip
    assert sum(seen) == 12
    with pytest.raises(EngineError, match="no end within"):
        run_child(
            python_command("-c", code, grows, "100"), what="a child", error=EngineError,
            deadline_s=1.5, grows=grows,
        )  # fmt: skip


def test_more_bytes_may_take_longer(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 33)
    assert deadline_for(tmp_path / "large") == deadline_for(tmp_path) > deadline_for(None) + 4000


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "chat_template.jinja"])
@pytest.mark.parametrize("kind", ["pipe", "link to a device", "huge"])
def test_a_base_with_a_file_that_never_ends_is_refused(
    name: str, kind: str, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny.hf_model("llama"), tmp_path / "base")
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(1 << 30)
    else:
        path.symlink_to("/dev/zero")
    expected = f"at most {256 << 20} bytes" if kind == "huge" else "a regular file"
    with pytest.raises(BaseModelError, match=expected) as caught:
        open_base(folder)
    assert name in str(caught.value)


def test_links_of_a_download_cache_are_followed(tmp_path: Path) -> None:
    source, folder = tiny.hf_model("llama"), tmp_path / "snapshot"
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).symlink_to(file)
    assert open_base(folder).n_layers == tiny.N_LAYERS
