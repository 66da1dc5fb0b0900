"""The registry: which engine runs a file, by suffix or by name; and what opening one costs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import verdicts

import safegene
from safegene import convert
from safegene_runtime.child import python_environment
from safegene_runtime.engines import registry
from safegene_runtime.engines.engine import Engine
from safegene_runtime.engines.registry import engine_for, engine_names, open_engine
from safegene_runtime.errors import EngineError

BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def bigrams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model for the engine of CONTRIBUTING.md, which is registered as written there."""
    guide = (tiny.REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    source, entry = BLOCK.findall(guide.split("## A new engine")[1])
    (tmp_path / "bigram.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    exec(compile(entry, "CONTRIBUTING.md", "exec"), {})
    np.save(tmp_path / "model.npy", np.random.default_rng(0).standard_normal((256, 256)))
    return tmp_path / "model.npy"


def test_the_engine_of_the_guide_runs_by_its_suffix_and_by_its_name(bigrams: Path) -> None:
    table = np.load(bigrams).astype(np.float32)
    for name in (None, "bigrams"):
        with open_engine(bigrams, engine=name, threads=1) as engine:
            assert isinstance(engine, Engine)
            ids = engine.tokenize("go", add_special=True)
            ((_, rows),) = engine.logits([ids], [2])
            assert np.array_equal(rows, table[ids])
            (reply,) = engine.generate([ids], 3, [])
            first = int(table[ids[-1]].argmax())
            assert reply[:2] == [first, int(table[first].argmax())]
            with pytest.raises(EngineError, match="keep"):
                engine.logits([ids], [3])
    with pytest.raises(TypeError, match="kv_type"):
        open_engine(bigrams, kv_type="f32")


def test_a_name_is_taken_once(bigrams: Path) -> None:
    with pytest.raises(ValueError, match="known already"):
        registry.register(registry.EngineKind("bigrams", "other", (".x",), "other:Other"))


@pytest.mark.parametrize("name", engine_names())
def test_an_engine_calls_itself_what_the_registry_calls_it(name: str) -> None:
    kind = registry._KINDS[name]
    assert kind.load().name == kind.title


def test_an_unknown_name_lists_the_known_ones_and_the_nearest() -> None:
    with pytest.raises(
        EngineError, match=r"llama\.cpp \(\.gguf\), onnxruntime \(\.onnx\)"
    ) as caught:
        engine_for(Path("model.gguf"), "lama.cp")
    assert caught.value.problems[0].fix == "did you mean llama.cpp?"
    with pytest.raises(EngineError, match="leave it out"):
        engine_for(Path("model.gguf"), "zzz")


def test_a_file_that_the_named_engine_cannot_run_is_refused() -> None:
    assert engine_for(Path("M.GGUF")).name == engine_for(Path("m.gguf"), "llama.cpp").name
    with pytest.raises(EngineError, match=r"ends in \.onnx, got '\.gguf'"):
        engine_for(Path("model.gguf"), "onnxruntime")
    with pytest.raises(EngineError, match=r"ends in \.gguf or \.onnx, got '\.bin'"):
        engine_for(Path("model.bin"))


@pytest.fixture(scope="module")
def passed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with PASS in its manifest."""
    folder = tmp_path_factory.mktemp("engines")
    adapter = tiny.peft_adapter("llama", folder / "adapter", scale=0.05)
    convert(adapter, tiny.gguf_model("llama"), folder / "out", form="merged", check=False)
    return verdicts.put(folder / "out")


def test_a_session_takes_the_engine_by_name(passed: Path) -> None:
    with safegene.open(passed, threads=1, engine="llama.cpp") as session:
        assert session.engine.name == "llama.cpp"
    with pytest.raises(EngineError, match=r"\.onnx"):
        safegene.open(passed, threads=1, engine="onnxruntime")


def test_opening_an_artifact_imports_no_reports_judges_or_servers(passed: Path) -> None:
    code = (
        "import sys, safegene; safegene.open(sys.argv[1], threads=1).close()\n"
        "print(*sorted(n for n in sys.modules if n.startswith('safegene_')), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, passed], env=python_environment(),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    rooms = {name.split(".")[1] for name in done.stdout.split() if "." in name}
    assert "artifact" in rooms, done.stdout
    assert not rooms & {"reporting", "judging", "serving", "verifying", "pytest_plugin"}


def test_verifying_imports_no_reports_plugged_judges_or_servers() -> None:
    code = (
        "import sys, safegene_runtime.verifying.ladder\n"
        "print(*sorted(n for n in sys.modules if n.startswith('safegene_')), sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=python_environment(),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = done.stdout.split()
    assert "safegene_runtime.judging.judge" in found, "the built-in judge is what verify needs"
    late = (
        "safegene_runtime.reporting",
        "safegene_runtime.serving",
        "safegene_runtime.judging.plugins",
    )
    assert not [name for name in found if name.startswith(late)]
