"""The rooms: no circle between them, no way back, no torch, no engine before it is asked for."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import safegene_converter
import safegene_runtime

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {
    "safegene_runtime": ROOT / "runtime" / "safegene_runtime",
    "safegene_converter": ROOT / "converter" / "safegene_converter",
    "safegene": ROOT / "converter" / "safegene",
}


def modules_of(package: str) -> dict[str, Path]:
    """Every module of a package and of the rooms in it, by its full name."""
    folder = PACKAGES[package]
    found = {}
    for path in sorted(folder.rglob("*.py")):
        name = ".".join(path.relative_to(folder.parent).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


MODULES = {name: path for package in PACKAGES for name, path in modules_of(package).items()}


def imported_by(path: Path) -> set[str]:
    """Our modules that a file imports, inside of functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    found = {name for name in found if name.split(".")[0] in PACKAGES}
    assert found <= MODULES.keys(), f"{path} imports what is not there"
    return found


IMPORTS = {name: imported_by(path) - {name} for name, path in MODULES.items()}


def room_of(module: str) -> str:
    """`safegene_runtime.formats.onnx.wire` -> `safegene_runtime.formats`."""
    return ".".join(module.split(".")[:2])


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
    # pytest itself loads the plug-in, and nothing else may
    modules = [name for name in modules_of("safegene_runtime") if "pytest_plugin" not in name]
    assert len({room_of(name) for name in modules}) > 10, "the rooms are walked, not only the top"
    code = "import sys; before = {n.split('.')[0] for n in sys.modules}\n" + PROBE.format(
        blocked=BLOCKED, modules=modules
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


def test_no_arrow_leads_from_the_runtime_to_the_converter() -> None:
    back = {
        name: sorted(one for one in imports if not one.startswith("safegene_runtime"))
        for name, imports in IMPORTS.items()
        if name.startswith("safegene_runtime")
    }
    assert {name: found for name, found in back.items() if found} == {}


@pytest.mark.parametrize("level", ["modules", "rooms"])
def test_imports_run_in_no_circle(level: str) -> None:
    graph: dict[str, set[str]] = {}
    for name, imports in IMPORTS.items():
        if level == "modules":
            graph[name] = imports
        else:
            room = graph.setdefault(room_of(name), set())
            room |= {room_of(one) for one in imports} - {room_of(name)}
    # raises CycleError, which names the circle
    assert len(tuple(TopologicalSorter(graph).static_order())) == len(graph)


@pytest.mark.parametrize("package", [safegene_runtime, safegene_converter])
def test_the_docstring_of_a_package_is_its_whole_map(package: object) -> None:
    name = package.__name__  # type: ignore[attr-defined]
    folder = PACKAGES[name]
    rooms = {
        path.stem if path.is_file() else path.name
        for path in folder.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").is_file()
    } - {"__init__", "__main__"}
    lines = re.findall(r"^    (\w+)  +\S", package.__doc__ or "", flags=re.MULTILINE)
    assert sorted(lines) == sorted(rooms)


def test_every_room_says_what_it_is() -> None:
    for name, path in MODULES.items():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), name


def test_no_file_has_five_hundred_lines() -> None:
    """One that needs more says why at its head: "long because"."""
    sources = [
        path
        for folder in ("converter", "runtime", "tests", "benchmarks", "examples", "tools")
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]
    assert len(sources) > 300
    long = {
        path.name: count
        for path in sources
        if (count := len((text := path.read_text(encoding="utf-8")).splitlines())) >= 500
        and "long because" not in text[:1000]
    }
    assert not long


def test_only_the_recorder_the_gene_package_and_a_child_for_pickles_import_torch() -> None:
    guilty = [
        room_of(name) if room_of(name) != "safegene_converter.importing" else name
        for name, path in MODULES.items()
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.strip().startswith(("import torch", "from torch", "import transformers",
                                    "from transformers", "import peft", "from peft"))
    ]  # fmt: skip
    # a pickle is read by torch or by nobody, in a process of its own
    assert set(guilty) == {
        "safegene_converter.recording", "safegene_converter.gene",
        "safegene_converter.importing.pickle_child",
    }  # fmt: skip


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
