"""An engine in a process of its own: the same numbers, and no death or hang of native code is ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import verdicts

from safegene import convert
from safegene_converter.cli.main import main
from safegene_runtime.child import python_environment
from safegene_runtime.engines import apart, registry
from safegene_runtime.engines.engine import Engine
from safegene_runtime.engines.registry import EngineKind, open_engine, register
from safegene_runtime.errors import EngineError, FormatError

ROWS = [[5, 77, 104, 9], [5, 77, 8], [5, 77, 104, 9, 30, 2, 11]]
KEEP = [2, 1, 7]
REPRO = tiny.REPOSITORY / ".." / "shared" / "repro" / "base_negative_rms_eps_SIGABRT.gguf"

TROUBLE = '''
import ctypes, os, signal, time
import numpy as np
from safegene_runtime.engines import llama_model
from safegene_runtime.engines.pulse import pulse
from safegene_runtime.formats.gguf.model import open_model


class Trouble:
    """An engine that does what its `how` says, when it is asked for logits."""

    name, version, n_vocab, add_bos, bos_id, eos_id = "trouble", "1", 16, False, None, None
    eog_ids = frozenset()

    def __init__(self, model, adapter=None, *, how, threads=None):
        self.how, self.settings = how, {"how": how}
        if how == "hang at load":
            time.sleep(1000)

    def logits(self, sequences, keep, on_progress=None):
        if self.how == "abort":
            os.write(2, b"GGML_ASSERT(false) failed\\n")
            os.abort()
        if self.how == "segfault":
            ctypes.string_at(0)
        if self.how == "exit":
            os._exit(7)
        if self.how == "hang":
            time.sleep(1000)
        if self.how == "fault":
            raise ZeroDivisionError("ours")
        if self.how == "slow":
            for _ in range(8):
                time.sleep(0.25)
                pulse()
        return ((i, np.full((count, 16), i, np.float32)) for i, count in enumerate(keep))

    def generate(self, prompts, max_tokens, stop_ids, on_progress=None):
        for _ in prompts:
            on_progress(1)
        return [[1] for _ in prompts]

    def stream(self, prompt, max_tokens, stop_ids):
        for token in range(max_tokens):
            time.sleep(0.2)
            yield token

    def tokenize(self, text, *, add_special, parse_special=True):
        return list(text.encode())

    def detokenize(self, ids, *, special=True):
        return bytes(ids).decode()

    def chat_template(self):
        return None

    def close(self):
        pass


def unchecked(model, adapter=None, **settings):
    """llama.cpp, without the checks that come before it."""
    llama_model.check_model_header = open_model
    from safegene_runtime.engines.llama import LlamaEngine

    return LlamaEngine(model, adapter, **settings)
'''


@pytest.fixture
def trouble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Engine]:
    """Opens an engine of ours that misbehaves, in a child."""
    (tmp_path / "trouble_engine.py").write_text(TROUBLE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "_KINDS", dict(registry._KINDS))
    register(EngineKind("trouble", "trouble", (".trouble",), "trouble_engine:Trouble"))
    register(EngineKind("unchecked", "llama.cpp", (".gguf",), "trouble_engine:unchecked"))
    (tmp_path / "model.trouble").touch()
    return lambda how: open_engine(tmp_path / "model.trouble", apart=True, how=how)


@pytest.mark.parametrize("kind", ["gguf", "onnx"])
def test_a_child_gives_the_numbers_that_the_engine_gives_here(kind: str) -> None:
    model = tiny.gguf_model("llama") if kind == "gguf" else tiny.onnx_model("llama") / "model.onnx"
    with open_engine(model, threads=1) as here, open_engine(model, threads=1, apart=True) as there:
        assert isinstance(there, Engine)
        for name in (
            "name", "version", "n_vocab", "settings", "bos_id", "eos_id", "add_bos", "eog_ids",
        ):  # fmt: skip
            assert getattr(there, name) == getattr(here, name), name
        assert there.chat_template() == here.chat_template()
        expected = {i: rows.copy() for i, rows in here.logits(ROWS, KEEP)}
        told: list[int] = []
        found = {i: rows.copy() for i, rows in there.logits(ROWS, KEEP, told.append)}
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[i], expected[i]) for i in found)
        assert sum(told) == len(ROWS)
        assert there.generate(ROWS, [3, 0, 5], [], told.append) == here.generate(
            ROWS, [3, 0, 5], []
        )
        assert list(there.stream(ROWS[0], 4, [])) == list(here.stream(ROWS[0], 4, []))
        text = "Größe <|im_end|> 日本語"
        for special in (False, True):
            ids = here.tokenize(text, add_special=special, parse_special=special)
            assert there.tokenize(text, add_special=special, parse_special=special) == ids
            assert there.detokenize(ids, special=special) == here.detokenize(ids, special=special)


def test_mistakes_are_the_same_errors_as_here(tmp_path: Path) -> None:
    with open_engine(tiny.gguf_model("llama"), threads=1, apart=True) as engine:
        with pytest.raises(EngineError, match="keep"):
            engine.logits(ROWS, [1])
        with pytest.raises(EngineError, match="ids"):
            engine.generate([[10**6]], 1, [])
        begun = engine.logits(ROWS, KEEP)
        next(begun)
        assert engine.generate([[5]], 1, [])
        with pytest.raises(EngineError, match="another call"):
            next(begun)
        _, rows = next(iter(engine.logits(ROWS, KEEP)))
        with pytest.raises(ValueError, match="read-only"):
            rows[0] = 0
    with pytest.raises(EngineError, match="closed"):
        engine.tokenize("a", add_special=False)
    with pytest.raises(TypeError, match="no_such"):
        open_engine(tiny.gguf_model("llama"), apart=True, no_such=1)
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(FormatError, match=r"model\.gguf"):
        open_engine(tmp_path / "model.gguf", apart=True)


ENDS = {
    "abort": r"SIGABRT.*GGML_ASSERT\(false\) failed",
    "segfault": "SIGSEGV",
    "exit": "exit code 7",
    "fault": "ZeroDivisionError: ours",
}


@pytest.mark.parametrize("how", ENDS)
def test_a_child_that_ends_is_an_error(how: str, trouble: Callable[[str], Engine]) -> None:
    with trouble(how) as engine:
        with pytest.raises(EngineError, match=ENDS[how]):
            engine.logits(ROWS, KEEP)
        if how != "fault":
            with pytest.raises(EngineError, match="closed"):
                engine.logits(ROWS, KEEP)


def test_a_child_that_is_killed_is_an_error(trouble: Callable[[str], Engine]) -> None:
    with trouble("nothing") as engine:
        begun = engine.logits(ROWS, KEEP)
        next(begun)
        os.kill(engine._child.pid, signal.SIGKILL)  # type: ignore[attr-defined]
        with pytest.raises(EngineError, match="SIGKILL"):
            next(begun)


def test_a_child_that_hangs_is_ended(
    trouble: Callable[[str], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "STEP_SECONDS", 0.6)
    with trouble("hang") as engine:
        child = engine._child  # type: ignore[attr-defined]
        with pytest.raises(EngineError, match="it hangs, and was ended"):
            engine.logits(ROWS, KEEP)
        assert child.returncode == -signal.SIGKILL
    monkeypatch.setattr(apart, "deadline_for", lambda *paths: 1.5)
    with pytest.raises(EngineError, match="it hangs, and was ended"):
        trouble("hang at load")


def test_signs_of_life_keep_a_slow_child_alive(
    trouble: Callable[[str], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apart, "STEP_SECONDS", 0.9)
    with trouble("slow") as engine:
        found = dict(engine.logits(ROWS, KEEP))
    assert [len(found[i]) for i in range(3)] == KEEP


def test_after_an_interrupt_the_engine_answers_the_next_question(
    trouble: Callable[[str], Engine],
) -> None:
    with trouble("nothing") as engine:
        begun = engine.stream([1], 50, [])
        next(begun)
        timer = threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            for _ in begun:
                pass
        assert engine.tokenize("ab", add_special=False) == [97, 98]
        assert list(engine.stream([1], 2, [])) == [0, 1]


@pytest.mark.parametrize("thread", [False, True])
def test_a_child_does_not_outlive_its_parent(thread: bool) -> None:
    code = """
import os, signal, sys, threading
from pathlib import Path
from safegene_runtime.engines.registry import open_engine

def work():
    global engine
    engine = open_engine(Path(sys.argv[1]), threads=1, apart=True)
    print(engine._child.pid, flush=True)

if sys.argv[2] == "True":
    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert engine.tokenize("a", add_special=False), "it lives on when the thread that opened it ends"
else:
    work()
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, tiny.gguf_model("llama"), str(thread)],
        env=python_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    pid = int(done.stdout)
    for _ in range(100):
        try:
            os.kill(pid, 0)
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return
        if state == "Z":
            return
        time.sleep(0.05)
    pytest.fail("the child is still there")


@pytest.mark.skipif(not REPRO.is_file(), reason="the file that aborts libllama is not here")
def test_a_file_that_aborts_libllama_is_an_error(trouble: Callable[[str], Engine]) -> None:
    with (
        pytest.raises(EngineError, match=r"SIGABRT.*eps"),
        open_engine(REPRO, engine="unchecked", apart=True, threads=1) as engine,
    ):
        engine.generate([[5, 6]], 2, [])
    with pytest.raises(EngineError, match="layer_norm_rms_epsilon: expected more than 0"):
        open_engine(REPRO, apart=True, threads=1)


def test_the_commands_exit_with_2_when_an_engine_dies(
    trouble: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 1 would mean FAIL, and 134 that we died with it."""
    adapter = tiny.peft_adapter("llama", tmp_path / "adapter", scale=0.05)
    out = tmp_path / "out"
    convert(adapter, tiny.gguf_model("llama"), out, form="merged", check=False)
    verdicts.put(out)
    (tmp_path / "dying_engine.py").write_text("import os\n\ndef dying(*_, **__): os.abort()\n")
    register(EngineKind("dying", "dying", (".gguf",), "dying_engine:dying"))
    assert main(["run", str(out), "--prompt", "Hello", "--engine", "dying"]) == 2
    assert "SIGABRT" in capsys.readouterr().err
    assert main(["run", str(out), "--prompt", "Hello", "--engine", "lama.cpp"]) == 2
    assert "did you mean llama.cpp?" in capsys.readouterr().err
