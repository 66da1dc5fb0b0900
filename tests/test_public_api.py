"""`import safegene`: what it names, what it costs, what its types say, and that the commands use it."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import tiny

import safegene
from safegene import functions
from safegene_converter.requests import CalibrateRequest, ConvertRequest, RecordRequest
from safegene_runtime import errors
from safegene_runtime.errors import EngineError, FormatError, UnsupportedError
from safegene_runtime.progress import Progress
from safegene_runtime.verifying.request import VerifyRequest

EXAMPLE = tiny.REPOSITORY / "examples" / "smollm2-135m-safegene"
SURFACE = {
    "__version__", "AdapterError", "BaseModelError", "Bounds", "Calibrated", "EngineError",
    "FormatError", "GeneError", "Judge", "Manifest", "ManifestError", "MissingPackageError",
    "OutputError", "PostconditionError", "Problem", "Profile", "Progress", "Prompt", "Recalibrated",
    "RecordError", "Reference", "Report", "SafeGeneError", "Session", "SurvivalError",
    "UnsupportedError", "UnverifiedError", "UnverifiedWarning", "Verdict", "calibrate", "convert",
    "inspect", "open", "record", "verify", "verify_server",
}  # fmt: skip
"""Adding a name is a minor version, taking one away a major one: docs/stability.md."""


def test_the_surface_is_pinned_and_every_name_is_there() -> None:
    assert set(safegene.__all__) == SURFACE
    assert dir(safegene) == sorted(safegene.__all__)
    for name in safegene.__all__:
        assert getattr(safegene, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'plam'"):
        _ = safegene.plam  # type: ignore[attr-defined]


def test_every_error_is_on_the_surface() -> None:
    found = {name for name in errors.__all__ if name.endswith("Error")}
    assert found <= SURFACE


def test_importing_it_costs_nothing_and_a_name_costs_what_it_needs() -> None:
    code = """
import sys
before = set(sys.modules)
import safegene
found = {name.split(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert found == {"safegene", "safegene_runtime"}, found
safegene.SafeGeneError, safegene.Progress
assert "numpy" not in sys.modules
safegene.inspect, safegene.convert, safegene.record, safegene.calibrate, safegene.verify, safegene.open
heavy = {"torch", "transformers", "peft", "onnx", "onnxruntime", "llama_cpp", "gguf", "rich", "jinja2"}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    )


def test_every_function_has_the_same_progress() -> None:
    for name in ("calibrate", "convert", "open", "record", "verify", "verify_server"):
        function = getattr(safegene, name)
        hint = inspect.signature(function).parameters["progress"]
        assert hint.annotation == "Progress | None", name
        assert hint.default is None
        assert "progress" in (function.__doc__ or "") or name in ("calibrate", "convert", "record")
    assert Progress is safegene.Progress


@pytest.mark.parametrize(
    ("function", "request_type", "renamed"),
    [
        (functions.convert, ConvertRequest, {}),
        (functions.record, RecordRequest, {}),
        (functions.calibrate, CalibrateRequest, {}),
        (functions.verify, VerifyRequest, {"artifact": "artifacts"}),
        (functions.verify_server, VerifyRequest, {"url": "server"}),
    ],
)
def test_a_function_takes_what_its_request_holds_with_the_same_defaults(
    function: object, request_type: type, renamed: dict[str, str]
) -> None:
    fields = request_type.__dataclass_fields__
    known = inspect.signature(function).parameters  # type: ignore[arg-type]
    for name, parameter in known.items():
        if name == "progress":
            continue
        field = fields[renamed.get(name, name)]
        if parameter.default is not inspect.Parameter.empty:
            assert parameter.default == field.default, name
    if request_type is not VerifyRequest:
        assert set(known) - {"progress"} == set(fields)


CONSUMER = """
import os
from pathlib import Path

import safegene


class Named(os.PathLike[str]):
    def __fspath__(self) -> str:
        return "OUT"


def tell(stage: str, done: int, total: int) -> None:
    print(stage, done, total)


def main() -> bool:
    found: dict[str, object] = safegene.inspect("ADAPTER")
    manifest: safegene.Manifest = safegene.convert(
        "ADAPTER", Path("base.gguf"), Named(), to="gguf", form="merged",
        bounds=safegene.Bounds(gain_min=0.9), progress=tell,
    )
    reference: safegene.Reference = safegene.record("ADAPTER", "base.gguf", "REF", suite="smoke")
    report: safegene.Report = safegene.verify(Named(), reference, profile="ci", progress=tell)
    served: safegene.Report = safegene.verify_server("http://127.0.0.1:8080", "REF")
    fitted: safegene.Calibrated | safegene.Recalibrated = safegene.calibrate("G", "M", "shots.jsonl", "mine")
    try:
        with safegene.open(Named(), progress=tell) as session:
            text: str = session.chat([{"role": "user", "content": "Hello"}])
    except safegene.UnverifiedError as error:
        problems: tuple[safegene.Problem, ...] = error.problems
        print(problems, text)
    print(found, manifest, served, fitted)
    return report.verdict is safegene.Verdict.PASS
"""


def test_a_consumer_passes_the_strictest_types_and_a_wrong_one_does_not(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    (tmp_path / "consumer.py").write_text(CONSUMER)
    (tmp_path / "wrong.py").write_text(CONSUMER.replace('form="merged"', 'form="nonsense"'))
    parts = [str(tiny.REPOSITORY / part) for part in ("converter", "runtime")]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--no-error-summary",
         "--config-file", tiny.REPOSITORY / "pyproject.toml", "--cache-dir", tmp_path / "cache",
         "consumer.py", "wrong.py"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
        env={"MYPYPATH": ":".join(parts), "PATH": "", "HOME": str(tmp_path)},
    )  # fmt: skip
    (error,) = done.stdout.splitlines()
    assert error.startswith("wrong.py")
    assert "nonsense" in error


def test_paths_may_be_text_or_paths(tmp_path: Path) -> None:
    found = safegene.inspect(EXAMPLE)
    assert found == safegene.inspect(str(EXAMPLE)) | {"path": found["path"]}
    base = tiny.gguf_model("llama")
    adapter = tiny.peft_adapter("llama", tmp_path / "adapter", scale=0.05)
    out = tmp_path / "out"
    manifest = safegene.convert(str(adapter), str(base), str(out), form="sidecar", check=False)
    assert json.loads((out / "manifest.json").read_bytes()) == json.loads(manifest.to_json())


# --- requests ----------------------------------------------------------------------------------------


A, B, OUT = Path("adapter"), Path("base.gguf"), Path("out")


def test_a_request_names_every_mistake_at_once() -> None:
    with pytest.raises(UnsupportedError) as caught:
        ConvertRequest(
            A, B, OUT, to="onnx", form="branch", type="q8_0", imatrix=A, promote=True, llama_cpp=A
        )  # fmt: skip
    assert [problem.where for problem in caught.value.problems] == [
        "--imatrix", "--llama-cpp", "--type", "--promote",
    ]  # fmt: skip
    with pytest.raises(FormatError) as caught_too:
        RecordRequest(A, B, OUT, suite="huge", prompts=A, max_new_tokens=0, top_k=1)
    assert [problem.where for problem in caught_too.value.problems] == [
        "--suite", "--suite", "--max-new-tokens", "--top-k",
    ]  # fmt: skip
    with pytest.raises(EngineError) as caught_last:
        VerifyRequest(A, (B, B), control=A, model="x", profile="easy", threads=-1)
    assert len(caught_last.value.problems) == 5


@pytest.mark.parametrize("name", ["aligned", "weight", "refusals", "max_steps"])
def test_what_an_artifact_is_not_fitted_by_is_refused(name: str) -> None:
    value = {"aligned": A, "weight": 2.0, "refusals": ("No",), "max_steps": 3}[name]
    with pytest.raises(UnsupportedError, match="an artifact is fitted to its reference"):
        CalibrateRequest(A, B, A, "new", form="merged", reference=A, **{name: value})


@pytest.mark.parametrize("name", ["base", "control", "threads", "mode", "write"])
def test_what_a_server_has_no_use_for_is_refused(name: str) -> None:
    value = {"base": A, "control": A, "threads": 1, "mode": "as-shipped", "write": False}[name]
    with pytest.raises(EngineError, match="expected nothing"):
        VerifyRequest(A, server="http://127.0.0.1:1", **{name: value})


def test_the_modes_of_the_command_line_are_those_of_the_ladder() -> None:
    from safegene_converter.cli.main import parser

    hint = get_type_hints(VerifyRequest)["mode"]
    for mode in get_args(hint):
        parser().parse_args(["verify", "OUT", "--reference", "R", "--mode", mode])
