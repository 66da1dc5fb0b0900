"""Chat with an artifact: only what was verified, every byte again, and greedy to the letter."""

from __future__ import annotations

import argparse
import io
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import verdicts
from onnx_tools import convert_onnx

import safegene
from safegene import convert
from safegene_converter.cli import run as run_command
from safegene_converter.cli.options import Parser
from safegene_runtime import session
from safegene_runtime.artifact.manifest import read_manifest
from safegene_runtime.engines.chat import render
from safegene_runtime.engines.registry import open_engine
from safegene_runtime.errors import EngineError, ManifestError, UnverifiedError

HELLO = [
    {"role": "user", "content": "Name three colours of the sea, und sag es auf Deutsch: Größe"}
]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.peft_adapter("llama", tmp_path_factory.mktemp("session") / "adapter", scale=0.05)


@pytest.fixture(scope="module")
def made(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("session")
    base = tiny.gguf_model("llama")
    convert(adapter, base, folder / "merged", form="merged", check=False)
    convert(adapter, base, folder / "sidecar", form="sidecar", check=False)
    convert_onnx(adapter, tiny.onnx_model("llama"), folder / "onnx", form="merged", check=False)
    return {name: verdicts.put(folder / name, "PASS") for name in ("merged", "sidecar", "onnx")}


@pytest.fixture
def merged(made: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(made["merged"], tmp_path / "merged")


def base_of(form: str) -> Path | None:
    return tiny.gguf_model("llama") if form == "sidecar" else None


@pytest.mark.parametrize("form", ["merged", "sidecar", "onnx"])
def test_a_session_says_what_the_engine_generates(form: str, made: dict[str, Path]) -> None:
    pieces: list[str] = []
    with safegene.open(made[form], base=base_of(form), threads=1) as session:
        reply = session.chat(HELLO, 24, pieces.append)
        assert session.chat(HELLO, 24) == reply, "nothing is left of the first time"
        assert session.verdict == "PASS"
    folder = made[form]
    model = base_of(form) or folder / read_manifest(folder).file("model").path  # type: ignore[union-attr]
    side = folder / "adapter.gguf" if form == "sidecar" else None
    with open_engine(model, side, threads=1) as engine:
        text = render(engine.chat_template() or "", HELLO)
        prompt = engine.tokenize(text, add_special=False)
        (ids,) = engine.generate([prompt], 24, engine.eog_ids)
        assert list(engine.stream(prompt, 24, engine.eog_ids)) == ids
        assert list(engine.stream(prompt, 24, [ids[3]])) == ids[: ids.index(ids[3]) + 1]
        assert list(engine.stream(prompt, 0, [])) == []
        kept = [one for one in ids if one not in engine.eog_ids]
        assert reply == engine.detokenize(kept, special=False)
    assert "".join(pieces) == reply
    assert len(pieces) > 8


@pytest.mark.parametrize("name", [None, "FAIL", "INCONCLUSIVE", "VACUOUS"])
def test_only_pass_is_served(name: str | None, merged: Path) -> None:
    verdicts.put(merged, name)
    with pytest.raises(UnverifiedError, match=r"allow-unverified") as caught:
        safegene.open(merged)
    assert caught.value.problems[0].got == (name or "none")
    fix = "do not serve it" if name else "run `safegene verify` first"
    assert fix in caught.value.problems[0].fix
    with (
        pytest.warns(safegene.UnverifiedWarning, match=name or "none"),
        safegene.open(merged, allow_unverified=True, threads=1) as session,
    ):
        assert session.chat(HELLO, 2)


def test_what_passed_is_served_without_a_warning(merged: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        safegene.open(merged, threads=1).close()


def test_that_verdicts_are_unsigned_is_said_once(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    session._say_once.cache_clear()
    for _ in range(2):
        safegene.open(merged, threads=1).close()
    said = capsys.readouterr()
    assert said.err.splitlines() == [session.UNSIGNED]
    assert "not signed" in session.UNSIGNED
    assert not said.out


@pytest.mark.parametrize("allow", [False, True])
def test_altered_bytes_are_served_to_nobody(allow: bool, merged: Path) -> None:
    path = merged / read_manifest(merged).files[0].path
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ManifestError, match="sha256"):
        safegene.open(merged, allow_unverified=allow)


def test_a_folder_without_manifest_and_a_sidecar_without_base_are_refused(
    merged: Path, made: dict[str, Path]
) -> None:
    (merged / "manifest.json").unlink()
    with pytest.raises(ManifestError, match="a manifest"):
        safegene.open(merged, allow_unverified=True)
    with pytest.raises(EngineError, match="--base"):
        safegene.open(made["sidecar"])
    with pytest.raises(ManifestError, match="not the base"):
        safegene.open(made["sidecar"], base=tiny.gguf_model("llama", 256))


def test_as_shipped_verdicts_are_served_with_the_cache_they_were_given_for(merged: Path) -> None:
    for mode, cache in (("strict", "f32"), ("as-shipped", "f16")):
        with safegene.open(verdicts.put(merged, "PASS", mode), threads=1) as session:
            assert session.engine.settings["kv_type"] == cache


WRONG_MESSAGES: dict[str, Any] = {
    "none": [], "a string": ["hello"], "no content": [{"role": "user"}],
    "a number": [{"role": "user", "content": 1}],
}  # fmt: skip


def test_wrong_messages_lengths_and_closed_sessions_get_one_message(
    made: dict[str, Path],
) -> None:
    with safegene.open(made["merged"], threads=1) as session:
        for messages in WRONG_MESSAGES.values():
            with pytest.raises(EngineError, match="role, content"):
                session.chat(messages)
        with pytest.raises(EngineError, match="at least 1"):
            session.chat(HELLO, 0)
        with pytest.raises(EngineError, match="length"):
            session.chat(HELLO, 100_000)
        begun = session.stream(HELLO, 8)
        next(begun)
        session.chat(HELLO, 1)
        with pytest.raises(EngineError, match="another call"):
            list(begun)
    with pytest.raises(EngineError, match="closed"):
        session.chat(HELLO)


class _Spelling:
    """An engine whose tokens are single bytes, so that every character is split."""

    def __init__(self, text: str) -> None:
        self._bytes = list(text.encode())

    bos_id = eos_id = None
    eog_ids = frozenset([256])

    def chat_template(self) -> str:
        return "{{ messages[0]['content'] }}"

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        return list(text.encode())

    def detokenize(self, ids: list[int], *, special: bool = True) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def stream(self, prompt: list[int], max_tokens: int, stop_ids: Any) -> Iterator[int]:
        yield from [*self._bytes, 256][:max_tokens]


@pytest.mark.parametrize("text", ["Größe", "日本語 ok", "👩‍🚀!", "plain"])
def test_characters_split_over_tokens_come_whole(text: str, made: dict[str, Path]) -> None:
    manifest = read_manifest(made["merged"]).with_verification(None)
    manifest.tokenizer["chat_template_sha256"] = None
    session = safegene.Session(_Spelling(text), manifest)  # type: ignore[arg-type]
    assert list(session.stream(HELLO, 99)) == list(text)
    cut = session.chat(HELLO, len(text.encode()) - 1)
    assert cut == text.encode()[:-1].decode("utf-8", "replace")


def command(*arguments: object) -> argparse.Namespace:
    parser = Parser()
    run_command.add(parser.add_subparsers())
    return parser.parse_args(["run", *map(str, arguments)])


def run(*arguments: object) -> int:
    found = command(*arguments)
    return int(found.run(found))


def test_the_command_answers_once(
    made: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = (made["merged"], "--prompt", "Hello", "--max-new-tokens", 5, "--threads", 1)
    assert run(*arguments) == 0
    with safegene.open(made["merged"], threads=1) as session:
        reply = session.chat([{"role": "user", "content": "Hello"}], 5)
    captured = capsys.readouterr()
    assert captured.out == run_command._printable(reply) + "\n"
    assert captured.err == ""


def test_the_command_is_loud_about_what_was_not_verified(
    merged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    verdicts.put(merged, None)
    with pytest.raises(UnverifiedError):
        run(merged, "--prompt", "Hello")
    assert run(merged, "--prompt", "Hello", "--max-new-tokens", 2, "--allow-unverified") == 0
    assert "UNVERIFIED" in capsys.readouterr().err


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_it_chats_until_the_end_of_input(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", _Terminal("Hello\n\nAnd then?\n"))
    assert run(made["merged"], "--max-new-tokens", 3, "--threads", 1) == 0
    captured = capsys.readouterr()
    turns = [{"role": "user", "content": "Hello"}]
    with safegene.open(made["merged"], threads=1) as session:
        first = session.chat(turns, 3)
        turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "And then?"}]
        second = session.chat(turns, 3)
    shown = [run_command._printable(one) + "\n" for one in (first, second)]
    assert captured.out == f"> {shown[0]}> > {shown[1]}> \n"


def test_an_empty_prompt_is_a_mistake(
    made: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(EngineError, match="a text"):
        run(made["merged"], "--prompt", " ")
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(EngineError, match="a text"):
        run(made["merged"])


def test_a_reply_cannot_steer_the_terminal() -> None:
    assert run_command._printable("a\x1b[2Jb\nc\td é") == "a\\x1b[2Jb\nc\td é"


def test_importing_safegene_costs_numpy_only() -> None:
    code = (
        "import sys, safegene; "
        "print([n for n in ('torch','llama_cpp','onnxruntime','scipy','rich') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(tiny.REPOSITORY / "runtime"), "PATH": ""},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
