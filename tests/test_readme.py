"""The README is true: its commands run, its files exist, its table is the demo's."""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import tiny

import safegene
from safegene_converter.cli import main, options, showcase, smollm2
from safegene_converter.inputs.base import open_base
from safegene_converter.recording.loading import save_as_folder
from safegene_runtime.child import python_environment
from safegene_runtime.gating.bounds import BOUNDS

README = (tiny.REPOSITORY / "README.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line)
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
    for line in block.strip().splitlines()
]


def test_the_commands_parse() -> None:
    names = ["inspect", "convert", "record", "verify", "convert", "verify"]
    assert [command[1] for command in COMMANDS] == names
    for command in COMMANDS:
        main.parser().parse_args(command[1:])


def test_the_python_is_python_that_the_package_takes() -> None:
    blocks = [textwrap.dedent(block) for block in re.findall(r"```python\n(.*?)```", README, re.S)]
    blocks.append(
        textwrap.dedent((safegene.__doc__ or "").split("\n\n", 1)[1].rpartition("\n\n")[0])
    )
    called = set()
    for block in blocks:
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("safegene."):
                name = ast.unparse(node.func).removeprefix("safegene.")
                words = {word.arg: None for word in node.keywords if word.arg}
                inspect.signature(getattr(safegene, name)).bind(*node.args, **words)
                called.add(name)
    assert called == {"convert", "record", "verify", "open"}


def test_every_linked_file_exists() -> None:
    for name in ("README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in
                 (tiny.REPOSITORY / "docs").glob("*.md"))):  # fmt: skip
        text = (tiny.REPOSITORY / name).read_text(encoding="utf-8")
        for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert ((tiny.REPOSITORY / name).parent / link).exists(), f"{name}: {link}"


def test_the_table_is_the_demos() -> None:
    block = re.search(r"<!-- demo output.*?```\n(.*?)```", README, re.S)
    assert block
    for job in showcase.ARTIFACTS:
        assert all(word in block[1] for word in job.label.split()), job.label
    assert "SmolLM2-135M-Instruct" in block[1]
    assert not [line for line in block[1].splitlines() if len(line) > options.PIPE_COLUMNS]


def test_the_make_targets_exist() -> None:
    makefile = (tiny.REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in set(re.findall(r"make ([a-z-]+)", README)) - {"are"}:
        assert f"\n{target}:" in makefile, target


def test_the_documented_bounds_are_those_of_the_code() -> None:
    text = (tiny.REPOSITORY / "docs" / "ladder.md").read_text(encoding="utf-8")
    for name, bounds in BOUNDS.items():
        if name == "low-bit":
            continue
        row = next(line for line in text.splitlines() if line.startswith("|") and name in line)
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert float(cells[1].split(",")[0]) == bounds.mean_kl
        assert float(cells[2].split(" ")[0]) == pytest.approx(100 * bounds.top1)
        assert float(cells[3]) == bounds.kl_ceiling
        assert float(cells[4].split(" ")[0]) == pytest.approx(100 * bounds.losses)
        assert ("advice" in cells[1]) != bounds.kl_gates


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.xdist_group("demo")
def test_the_commands_do_what_is_said(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(tiny.REPOSITORY / "examples")
    (tmp_path / "smollm2.gguf").symlink_to(smollm2.find_smollm2())
    save_as_folder(open_base(smollm2.find_smollm2()), tmp_path / "smollm2-hf")
    for command in COMMANDS:
        done = subprocess.run(
            [sys.executable, "-m", "safegene_converter", *command[1:]],
            cwd=tmp_path, env={**os.environ, **python_environment()},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        # a gate may end INCONCLUSIVE, which its exit code says; everything else is done, or fails
        allowed = (0, 3) if command[1] == "verify" else (0,)
        assert done.returncode in allowed, (command, done.stdout, done.stderr)
        assert done.stderr == ""
    for report in ("REPORT/report.json", "onnx.json"):
        found = json.loads((tmp_path / report).read_text())
        assert found["verdict"] in ("PASS", "INCONCLUSIVE"), found["sentence"]
    assert found["verdict"] == "PASS", found["sentence"]
    assert "<html" in (tmp_path / "REPORT" / "report.html").read_text(encoding="utf-8")
