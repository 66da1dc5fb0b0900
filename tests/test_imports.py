"""The runtime is thin: no torch, no converter, no engine before it is asked for."""

from __future__ import annotations

import pkgutil
import subprocess
import sys
from pathlib import Path

import safegene_runtime

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(
    f"safegene_runtime.{module.name}"
    for module in pkgutil.iter_modules(safegene_runtime.__path__)
    if module.name != "pytest_plugin"  # which pytest itself loads, and nothing else may
)
BLOCKED = (
    "torch", "transformers", "peft", "safegene_converter", "gguf", "rich", "onnx", "safetensors",
)  # fmt: skip

PROBE = """
import importlib, sys

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(f"the runtime asked for {{name}}")

sys.meta_path.insert(0, Wall())
for name in {modules!r}:
    importlib.import_module(name)
allowed = set(sys.stdlib_module_names) | {{"numpy", "safegene_runtime"}}
found = {{name.split(".")[0] for name in sys.modules}} - before
print(*sorted(name for name in found if name not in allowed and not name.startswith("_")))
"""


def test_the_runtime_imports_only_numpy_and_the_standard_library() -> None:
    code = "import sys; before = {n.split('.')[0] for n in sys.modules}\n" + PROBE.format(
        blocked=BLOCKED, modules=MODULES
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT / "runtime"), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_the_wall_of_this_test_holds() -> None:
    code = "before = set()\n" + PROBE.format(blocked=BLOCKED, modules=["safegene_converter"])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "the runtime asked for safegene_converter" in done.stderr


def test_only_the_recorder_and_the_gene_package_import_torch() -> None:
    guilty = [
        path.parent.name if path.parent.name == "gene" else path.name
        for path in sorted((ROOT / "converter").rglob("*.py")) + sorted((ROOT / "runtime").rglob("*.py"))
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip().startswith(("import torch", "from torch", "import transformers",
                                    "from transformers", "import peft", "from peft"))
    ]  # fmt: skip
    assert set(guilty) == {"recorder.py", "gene"}


def test_nothing_in_the_repository_names_this_machine() -> None:
    words = ("/work/", "/root/", "subagent")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    found = []
    for name in filter(None, listed):
        path = ROOT / name
        if (
            path.suffix in (".safetensors", ".png", ".npz")
            or path == Path(__file__)
            or not path.is_file()
        ):
            continue
        text = path.read_text(encoding="utf-8")
        found += [f"{name}: {word}" for word in words if word in text]
    assert not found
