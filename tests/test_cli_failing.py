"""What nobody foresaw, and what is not installed: exit 2 and one message that says what to do, never 1."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
from workshop import Workshop

from safegene import record
from safegene_converter.cli import main
from safegene_runtime.child import python_environment
from safegene_runtime.extras import EXTRAS
from safegene_runtime.record.prompts import load_prompts

# Python imports it by itself at the start of every child, and of their children
SITE = """
import importlib.machinery, os
gone = os.environ["GONE"].split()
inner = importlib.machinery.PathFinder.find_spec
def find_spec(name, path=None, target=None):
    if any(name == one or name.startswith(one + ".") for one in gone):
        return None
    return inner(name, path, target)
importlib.machinery.PathFinder.find_spec = find_spec
"""


@dataclass(frozen=True)
class Bench:
    """What every command needs, and an interpreter in which packages can be taken away."""

    shop: Workshop
    site: Path

    def run(self, folder: Path, words: str, gone: str) -> subprocess.CompletedProcess[str]:
        names = {
            "ADAPTER": self.shop.adapter, "GGUF": tiny.gguf_model("llama"), "OUT": folder / "out",
            "HF": tiny.hf_model("llama"), "ONNX": tiny.onnx_model("llama"),
            "REFERENCE": self.shop.folder / "reference", "PROMPTS": self.shop.folder / "prompts.jsonl",
            "MERGED": self.shop.genuine("gguf merged"), "BRANCH": self.shop.genuine("onnx branch"),
        }  # fmt: skip
        environment = {
            **os.environ, **python_environment({"GONE": gone, "PYTHONSAFEPATH": "1"}),
        }  # fmt: skip
        environment["PYTHONPATH"] = os.pathsep.join([str(self.site), environment["PYTHONPATH"]])
        return subprocess.run(
            [sys.executable, "-m", "safegene_converter",
             *(str(names.get(word, word)) for word in words.split())],
            capture_output=True, text=True, check=False, env=environment, cwd=folder,
        )  # fmt: skip


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    shop = Workshop(tmp_path_factory.mktemp("shop"))
    lines = (
        f'{{"id": "{kind}-{number}", "text": "Say {number} ({kind}).", "kind": "{kind}"}}\n'
        for kind in ("harmful", "benign")
        for number in range(4)
    )
    (shop.folder / "prompts.jsonl").write_text("".join(lines))
    record(
        shop.adapter, tiny.hf_model("llama"), shop.folder / "reference",
        prompts=load_prompts(shop.folder / "prompts.jsonl"), max_new_tokens=4,
    )  # fmt: skip
    site = tmp_path_factory.mktemp("site")
    (site / "sitecustomize.py").write_text(SITE)
    return Bench(shop, site)


COMMANDS = {
    "inspect ADAPTER --base GGUF": (),
    "import ADAPTER -o OUT": ("reference",),
    "convert ADAPTER --base GGUF -o OUT": ("gguf",),
    "convert ADAPTER --base GGUF --as merged --type q8_0 -o OUT": ("gguf",),
    "convert ADAPTER --base HF -o OUT": ("gguf", "reference"),
    "convert ADAPTER --base ONNX --to onnx -o OUT": ("onnx",),
    "convert ADAPTER --base HF --to onnx -o OUT": ("onnx", "onnx-build"),
    "record ADAPTER --base GGUF --prompts PROMPTS -o OUT": ("reference",),
    "verify MERGED --reference REFERENCE --no-write": ("gguf",),
    "verify BRANCH --reference REFERENCE --no-write": ("onnx",),
    "run MERGED --allow-unverified --prompt Hello": ("gguf",),
    "run BRANCH --allow-unverified --prompt Hello": ("onnx",),
    "extract --aligned HF --degraded ADAPTER --base HF -o OUT": ("reference",),
    "select ADAPTER --model HF --harmful PROMPTS --benign PROMPTS -o OUT": ("reference",),
    "calibrate ADAPTER --model HF --shots PROMPTS --name new": ("reference",),
    "calibrate ADAPTER --model GGUF --as sidecar --shots PROMPTS --reference REFERENCE --name new": (
        "reference", "gguf",
    ),
    "evaluate --model HF --suite PROMPTS": ("reference",),
}  # fmt: skip
"""Per command the extras without which it cannot end."""


@pytest.mark.parametrize(
    ("command", "extra"), [(words, extra) for words, needs in COMMANDS.items() for extra in needs]
)
def test_a_missing_extra_ends_with_2_and_the_line_that_installs_it(
    command: str, extra: str, bench: Bench, tmp_path: Path
) -> None:
    done = bench.run(tmp_path, command, " ".join(EXTRAS[extra]))
    assert done.returncode == 2, done.stderr
    lines = [name for name in EXTRAS if f'pip install "safegene[{name}]"' in done.stderr]
    assert lines == [extra], done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_no_extra_brings_is_asked_of_no_extra(bench: Bench, tmp_path: Path) -> None:
    for command, needs in COMMANDS.items():
        if not needs:
            everything = {module for extra in filter(None, EXTRAS) for module in EXTRAS[extra]}
            done = bench.run(tmp_path, command, " ".join(everything))
            assert done.returncode == 0, done.stderr


def test_every_command_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.main(["--help"])
    listed = {
        line.split()[0]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("    ") and not line.startswith("     ")
    }
    # the demo is those commands in a row, on a model that is not there either
    assert listed - {"demo"} == {words.split()[0] for words in COMMANDS}


def test_the_extras_are_those_of_pyproject() -> None:
    project = tomllib.loads((tiny.REPOSITORY / "pyproject.toml").read_text())["project"]
    declared = {**project["optional-dependencies"], "": project["dependencies"]}

    def packages(extra: str) -> set[str]:
        found = set()
        for line in declared[extra]:
            if line.startswith("safegene["):
                inner = line.removeprefix("safegene[").rstrip("]").split(",")
                found |= {name for one in inner for name in packages(one)}
            else:
                found.add(line.partition("=")[0].partition(">")[0].partition("[")[0])
        return found

    # dev and fuzz bring what developers run, and no command
    assert set(EXTRAS) == set(declared) - {"dev", "fuzz"}
    for extra, modules in EXTRAS.items():
        assert set(modules.values()) == packages(extra), extra


# --- what nobody foresaw ---------------------------------------------------------------------------


def test_an_error_that_nobody_foresaw_ends_with_2_and_says_how_to_get_the_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("of all things")

    monkeypatch.setattr("safegene_converter.cli.options.check_json", fail)
    for words in COMMANDS:
        arguments = [word if word != "OUT" else str(tmp_path / "out") for word in words.split()]
        assert main.main(arguments) == 2
        said = capsys.readouterr().err
        assert "ZeroDivisionError: of all things" in said
        assert "--debug" in said
        assert "Traceback" not in said
        assert main.main([*arguments, "--debug"]) == 2
        assert "Traceback" in capsys.readouterr().err


def test_a_foreseen_error_has_a_traceback_too_where_it_is_asked_for(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for flags, shown in (([], False), (["--debug"], True)):
        assert main.main(["inspect", str(tmp_path), *flags]) == 2
        assert ("Traceback" in capsys.readouterr().err) == shown


@pytest.mark.parametrize("package", ["numpy", "rich"])
def test_a_broken_installation_ends_with_2(package: str, bench: Bench, tmp_path: Path) -> None:
    done = bench.run(tmp_path, "inspect ADAPTER", package)
    assert done.returncode == 2, done.stderr
    assert package in done.stderr
    assert "Traceback" not in done.stderr
