"""The command as a new user meets it: help, JSON, and one clear message for every wrong input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from safegene_converter.cli import main
from safegene_runtime.child import python_environment
from safegene_runtime.gating.profiles import profile_for
from safegene_runtime.record.prompts import SuiteSize, builtin_suite
from safegene_runtime.record.reference import read_reference

EXAMPLE = tiny.REPOSITORY / "examples" / "smollm2-135m-safegene"
COMMANDS = (
    "inspect", "import", "convert", "record", "verify", "demo", "extract", "select", "calibrate", "evaluate",
    "run",
)  # fmt: skip


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.peft_adapter("llama", tmp_path_factory.mktemp("cli") / "adapter", scale=0.05)


@pytest.fixture(scope="module")
def sidecar(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "sidecar"
    arguments = ["convert", adapter, "--base", tiny.gguf_model("llama"), "--as", "sidecar"]
    assert main.main([*map(str, arguments), "-o", str(out)]) == 0
    return out


def run(*arguments: object) -> int:
    """The exit code, whether it was returned or raised by the parser."""
    try:
        return main.main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_has_an_example_that_parses(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command, "--help") == 0
    text = capsys.readouterr().out
    example = text.split("example:\n")[1].strip().splitlines()[0].split()
    assert example[:2] == ["safegene", command]
    main.parser().parse_args(example[1:])


def test_without_a_command_the_commands_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run() == 2
    assert "--help" in capsys.readouterr().err
    assert run("--help") == 0
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)


def test_inspect_prints_json_that_parses(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", EXAMPLE, "--base", tiny.smollm2_gguf(), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["n_parameters"] == 1_139_712
    assert 0.008 < found["share_of_base"] < 0.009
    assert len(found["layers"]) == 14


def test_inspect_shows_every_layer_and_scale(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", EXAMPLE) == 0
    text = capsys.readouterr().out
    assert "1,139,712" in text
    assert "3.69673" in text
    assert "'base' of 'default'" in text


def test_inspect_shows_an_artifact(sidecar: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", sidecar) == 0
    assert "not verified yet" in capsys.readouterr().out


def test_convert_writes_json_to_a_file(adapter: Path, tmp_path: Path) -> None:
    code = run(
        "convert", adapter, "--base", tiny.gguf_model("llama"), "--as", "sidecar",
        "-o", tmp_path / "out", "--json", tmp_path / "out.json",
    )  # fmt: skip
    assert code == 0
    assert json.loads((tmp_path / "out.json").read_text())["artifact"]["form"] == "sidecar"


def test_no_progress_where_there_is_no_terminal(adapter: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "safegene_converter", "convert", str(adapter), "--base",
         str(tiny.gguf_model("llama")), "--as", "sidecar", "-o", str(tmp_path / "out")],
        env=python_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert done.stderr == ""


WRONG = {
    "missing adapter": (["convert", "{t}/nothing", "--base", "{base}"], "adapter_config.json"),
    "missing base": (["convert", "{adapter}", "--base", "{t}/nothing.gguf"], "nothing there"),
    "base is no model": (["convert", "{adapter}", "--base", "{text}"], "check --base"),
    "adapter as base": (["convert", "{adapter}", "--base", "{adapter}"], "not the adapter"),
    "adapter for another model": (["convert", "{example}", "--base", "{base}"], "30"),
    "existing output": (["convert", "{adapter}", "--base", "{base}", "-o", "{full}"], "--force"),
    "output inside the adapter": (
        ["convert", "{mine}", "--base", "{base}", "-o", "{mine}/out"],
        "inside the input",
    ),
    "output over the adapter": (
        ["convert", "{mine}", "--base", "{base}", "-o", "{mine}", "--force"],
        "holds the input",
    ),
    "record over the adapter": (
        ["record", "{mine}", "--base", "{base}", "-o", "{mine}", "--force"],
        "holds the input",
    ),
    "adapter and base exchanged": (["convert", "{hf}", "--base", "{adapter}"], "this is a --base"),
    "attacks without a name": (
        ["record", "{adapter}", "--base", "{base}", "--attacks", ""],
        "names of attacks",
    ),
    "misspelt flag": (["convert", "{adapter}", "--bases", "{base}"], "--help"),
    "misspelt type": (["convert", "{adapter}", "--base", "{base}", "--type", "q4km"], "q4_k_m"),
    "misspelt form": (["convert", "{adapter}", "--base", "{base}", "--as", "merge"], "merged"),
    "unknown expression": (
        ["convert", "{adapter}", "--base", "{base}", "--expression", "x"],
        "default",
    ),
    "bounds the wrong way round": (
        ["convert", "{adapter}", "--base", "{base}", "--gain", "2", "1"],
        "gain_min",
    ),
    "missing prompts": (["record", "{adapter}", "--base", "{base}", "--prompts", "{t}/p"], "p:"),
    "replies of no token": (
        ["record", "{adapter}", "--base", "{base}", "--max-new-tokens", "0"],
        "at least 1, got 0",
    ),
    "a suite of no size": (["record", "{adapter}", "--base", "{base}", "--suite", "x"], "smoke"),
    "a suite and prompts": (
        ["record", "{adapter}", "--base", "{base}", "--suite", "ci", "--prompts", "{text}"],
        "not allowed with",
    ),
    "prompts of no kind": (
        ["record", "{adapter}", "--base", "{base}", "--prompts", "{text}"],
        ".jsonl",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_input_gets_one_message_and_leaves_nothing(
    case: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("not a model")
    shutil.copytree(adapter, tmp_path / "mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    names = {
        "t": tmp_path, "base": tiny.gguf_model("llama"), "adapter": adapter, "example": EXAMPLE,
        "text": tmp_path / "text.txt", "full": tmp_path / "full", "mine": tmp_path / "mine",
        "hf": tiny.hf_model("llama"),
    }  # fmt: skip
    arguments, hint = WRONG[case]
    arguments = [argument.format(**names) for argument in arguments]
    if "-o" not in arguments:
        arguments += ["-o", str(tmp_path / "out")]
    before = sorted(tmp_path.rglob("*"))
    assert run(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert hint in captured.err
    assert "Traceback" not in captured.err
    assert len(captured.err.splitlines()) <= 40
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("option", "size"), [((), "ci"), (("--suite", "smoke"), "smoke")])
def test_record_asks_the_suite_of_the_size_named(
    option: tuple[str, ...], size: SuiteSize, adapter: Path, tmp_path: Path
) -> None:
    base, out = tiny.hf_model("llama"), tmp_path / "reference"
    assert run("record", adapter, "--base", base, *option, "--max-new-tokens", 1, "-o", out) == 0
    recorded = read_reference(out).prompts
    assert [one.text for one in recorded] == [prompt.text for prompt in builtin_suite(size)]


def test_a_sidecar_without_its_base_could_not_be_checked(
    sidecar: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """2, not 1: nothing was found to be broken, and nothing to be in order."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"text": "Name a colour."}\n')
    code = run(
        "record", adapter, "--base", tiny.hf_model("llama"), "--prompts", prompts,
        "--max-new-tokens", 4, "-o", tmp_path / "reference",
    )  # fmt: skip
    assert code == 0
    wrong = {"nothing": (), "a folder": ("--base", tmp_path), "no file": ("--base", tmp_path / "x")}
    for got, option in wrong.items():
        assert run("verify", sidecar, "--reference", tmp_path / "reference", *option) == 2
        shown = capsys.readouterr().err
        assert "that this sidecar belongs to, got " in shown
        assert f"{got}\n    -> pass --base" in shown
    base = tiny.gguf_model("llama")
    report = tmp_path / "report"
    arguments = ("verify", sidecar, "--reference", tmp_path / "reference", "--base", base)
    assert run(*arguments, "--report", report) == 4
    assert "VACUOUS" in capsys.readouterr().out, "a tiny random model refuses nothing"
    names = {"report.json", "report.html", "report.md", "report.sarif", "junit.xml"}
    assert {path.name for path in report.iterdir()} == names
    assert "verdict: VACUOUS" in _inspected(sidecar, capsys)


def test_several_artifacts_are_shown_side_by_side(
    sidecar: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.gguf_model("llama")
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"text": "Name a colour."}\n')
    merged, reference = tmp_path / "merged", tmp_path / "reference"
    assert run("convert", adapter, "--base", base, "--as", "merged", "-o", merged) == 0
    assert run(
        "record", adapter, "--base", tiny.hf_model("llama"), "--prompts", prompts,
        "--max-new-tokens", 4, "-o", reference,
    ) == 0  # fmt: skip
    capsys.readouterr()
    arguments = ("verify", sidecar, merged, "--reference", reference, "--base", base)
    assert run(*arguments, "--report", tmp_path / "reports") == 4
    text = capsys.readouterr().out
    assert "first broken rung" in text
    assert {path.name for path in (tmp_path / "reports").iterdir()} == {"sidecar", "merged"}
    assert run(*arguments, "--html", tmp_path / "one.html") == 2
    assert "--report" in capsys.readouterr().err
    again, manifest = tmp_path / "again", (merged / "manifest.json").read_bytes()
    for wrong, said in ((merged / ".", "each artifact once"), (tmp_path / "no", "nothing there")):
        assert run("verify", merged, wrong, "--reference", reference, "--report", again) == 2
        assert said in capsys.readouterr().err
    assert not again.exists()
    assert (merged / "manifest.json").read_bytes() == manifest
    for command in ("convert", "record"):  # it would be folded in twice
        model = merged / "model.gguf"
        assert run(command, adapter, "--base", model, "-o", again) == 2
        assert "one that holds a SafeGene adapter" in capsys.readouterr().err


def test_a_path_that_is_no_artifact_or_no_reference_is_a_mistake_and_no_invalid_record(
    sidecar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for name, got in (("file", "a file"), ("nothing", "nothing there")):
        assert run("verify", sidecar, "--reference", tmp_path / name) == 2
        assert f"by `safegene record`, got {got}" in capsys.readouterr().err
        assert run("run", tmp_path / name, "--prompt", "x") == 2
        assert f"by `safegene convert`, got {got}" in capsys.readouterr().err
    assert run("verify", sidecar, "--reference", tmp_path) == 5
    assert "a folder without reference.json" in capsys.readouterr().err


def test_what_an_artifact_has_no_use_for_is_refused(
    sidecar: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", sidecar, "--expression", "x", "--base", tiny.gguf_model("llama")) == 2
    shown = capsys.readouterr().err
    assert "leave --expression out" in shown
    assert "leave --base out" in shown


def _inspected(path: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert run("inspect", path) == 0
    return capsys.readouterr().out


def test_an_edited_record_is_an_invalid_record(
    sidecar: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """5, with the file named; nothing is run."""
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"text": "Name a colour."}\n')
    reference = tmp_path / "reference"
    assert run(
        "record", adapter, "--base", tiny.hf_model("llama"), "--prompts", prompts,
        "--max-new-tokens", 4, "-o", reference,
    ) == 0  # fmt: skip
    capsys.readouterr()
    path = reference / "prompts.jsonl"
    path.write_text(path.read_text().replace("colour", "flavour"))
    base = tiny.gguf_model("llama")
    assert run("verify", sidecar, "--reference", reference, "--base", base) == 5
    assert "prompts.jsonl" in capsys.readouterr().err
    assert run("verify", sidecar, "--reference", reference, "--attacks", "all") == 5


def test_an_edited_artifact_is_broken_at_integrity(
    sidecar: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"text": "Name a colour."}\n')
    assert run(
        "record", adapter, "--base", tiny.hf_model("llama"), "--prompts", prompts,
        "--max-new-tokens", 4, "-o", tmp_path / "reference",
    ) == 0  # fmt: skip
    shutil.copytree(sidecar, tmp_path / "edited")
    path = tmp_path / "edited" / "adapter.gguf"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    manifest = (tmp_path / "edited" / "manifest.json").read_bytes()
    arguments = ("verify", tmp_path / "edited", "--reference", tmp_path / "reference")
    assert run(*arguments, "--base", tiny.gguf_model("llama")) == 1
    assert "integrity" in capsys.readouterr().out
    assert (tmp_path / "edited" / "manifest.json").read_bytes() == manifest
    wrong = tiny.gguf_model("llama", 256)
    shutil.copytree(sidecar, tmp_path / "whole")
    arguments = ("verify", tmp_path / "whole", "--reference", tmp_path / "reference")
    assert run(*arguments, "--base", wrong, "--json", tmp_path / "r.json") == 1
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["broken_at"] == "integrity"
    assert "not the base" in report["rungs"][0]["detail"]


def test_the_help_says_which_margin_a_class_of_weights_is_held_to(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run("verify", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    wide = {name: profile_for("release", name).loss_margin * 100 for name in ("8-bit", "4-bit")}
    assert "1 % (release)" in shown
    assert f"8 bits are allowed {wide['8-bit']:g} % and coarser ones {wide['4-bit']:g} %" in shown
    action = (tiny.REPOSITORY / "action.yml").read_text()
    assert f"release on 4 bits shows {wide['4-bit']:g} %" in action


def test_a_record_of_another_adapter_is_an_invalid_record_and_no_verdict(
    sidecar: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither is broken: the one was not made from what the other was recorded with."""
    other = tiny.peft_adapter("llama", tmp_path / "other", scale=0.1)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"text": "Name a colour."}\n')
    assert run(
        "record", other, "--base", tiny.hf_model("llama"), "--prompts", prompts,
        "--max-new-tokens", 2, "-o", tmp_path / "reference",
    ) == 0  # fmt: skip
    base = tiny.gguf_model("llama")
    before = (sidecar / "manifest.json").read_bytes()
    assert run("verify", sidecar, "--reference", tmp_path / "reference", "--base", base) == 5
    assert "another adapter" in capsys.readouterr().err
    assert (sidecar / "manifest.json").read_bytes() == before
