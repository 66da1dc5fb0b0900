"""The four commands, through the command line's own parser."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import tiny

from safegene_converter.cli import main
from safegene_converter.gene.extract import extract
from safegene_converter.gene.objective import Objective
from safegene_converter.inputs.adapter import read_adapter
from safegene_runtime.record.prompts import SuiteSize, builtin_suite


def run(*arguments: object) -> int:
    return main.main([str(argument) for argument in arguments])


def prompts_file(path: Path, kind: str, count: int = 4) -> Path:
    lines = [
        json.dumps({"id": f"{kind}-{i}", "text": f"Say {i} ({kind}).", "kind": kind})
        for i in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_a_gene_is_made_calibrated_and_evaluated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, gene = tiny.hf_model("llama"), tmp_path / "gene"
    tuned = tiny.peft_adapter("llama", tmp_path / "tuned", scale=0.2)
    extracted = tmp_path / "extract.json"
    assert run(
        "extract", "--aligned", base, "--degraded", tuned, "--base", base, "--rank", 4, "-o", gene,
        "--json", extracted,
    ) == 0  # fmt: skip
    assert json.loads(extracted.read_text())["method"] == "low-rank"
    assert "energy kept" in capsys.readouterr().out
    shots = tmp_path / "shots.jsonl"
    harmful = prompts_file(tmp_path / "harmful.jsonl", "harmful")
    benign = prompts_file(tmp_path / "benign.jsonl", "benign")
    shots.write_text(harmful.read_text() + benign.read_text())
    assert run(
        "calibrate", gene, "--model", base, "--shots", shots, "--name", "mine", "--max-steps", 2,
        "--refusal", "No", "--json",
    ) == 0  # fmt: skip
    assert json.loads(capsys.readouterr().out)["steps"] == 2
    assert read_adapter(gene, "mine").target == base.name
    assert run(
        "calibrate", gene, "--model", base, "--shots", shots, "--name", "level", "--max-steps", 1,
        "--refusal", "No", "--aligned", base,
    ) == 0  # fmt: skip
    shown = [line.partition(" safety")[0].strip() for line in capsys.readouterr().out.splitlines()]
    assert [one for one in shown if one.startswith("KL x")][:1] == ["KL x 1"]
    assert run(
        "evaluate", "--model", base, "--adapter", gene, "--expression", "mine", "--suite", benign,
        "--max-new-tokens", 2,
    ) == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert "benign refused" in shown
    assert "harmful refused" not in shown  # nothing harmful was asked
    code = run(
        "select", gene, "--model", base, "--harmful", harmful, "--benign", benign, "--budget", 1e9,
        "--weight", 0, "--refusal", "No", "--json",
    )  # fmt: skip
    shown = capsys.readouterr()
    if code == 0:
        assert {m.layer for m in read_adapter(gene).modules} == set(json.loads(shown.out)["layers"])
    else:  # the tiny model may gain nothing: then that is said, and the gene is as it was
        assert "gains more than it costs" in shown.err
        assert {m.layer for m in read_adapter(gene).modules} == {0, 1}


@pytest.mark.parametrize(("after", "warned"), [(0.79, True), (0.9, False), (0.97, False)])
def test_a_gene_that_blurs_harmful_and_benign_prompts_is_said_to(
    after: float,
    warned: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, gene = tiny.hf_model("llama"), tmp_path / "gene"
    tuned = tiny.peft_adapter("llama", tmp_path / "tuned", scale=0.2)
    extract(base, [tuned], gene, base=base, rank=4)
    shots = tmp_path / "shots.jsonl"
    kinds = [prompts_file(tmp_path / kind, kind).read_text() for kind in ("harmful", "benign")]
    shots.write_text("".join(kinds))
    found = iter((0.926, after))
    monkeypatch.setattr(Objective, "separation", lambda *_: next(found))
    assert run(
        "calibrate", gene, "--model", base, "--shots", shots, "--name", "mine", "--max-steps", 1,
        "--refusal", "No",
    ) == 0  # fmt: skip
    shown = capsys.readouterr().out
    assert f"0.926 to {after:.3f}" in shown
    assert ("another pair of models" in " ".join(shown.split())) is warned


@pytest.mark.parametrize(("name", "size"), [("smoke", "smoke"), ("builtin", "ci")])
def test_evaluate_asks_the_suite_of_the_size_named(
    name: str, size: SuiteSize, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny.hf_model("llama")
    assert run(
        "evaluate", "--model", base, "--suite", name, "--max-new-tokens", 1, "--json"
    ) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    counts = Counter(prompt.kind for prompt in builtin_suite(size))
    assert (found["n_harmful"], found["n_benign"]) == (counts["harmful"], counts["benign"])


def test_mistakes_are_messages(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = tiny.hf_model("llama")
    tuned = tiny.peft_adapter("llama", tmp_path / "tuned")
    few = prompts_file(tmp_path / "few.jsonl", "harmful", 2)
    out = tmp_path / "gene"
    for arguments, message in (
        (("extract", "--aligned", base, "--degraded", base, "-o", out), "no discrepancy"),
        (("extract", "--aligned", base, "--degraded", tuned, "-o", out), "--base"),
        (("calibrate", tuned, "--model", base, "--shots", few, "--name", "x"), "plain LoRA"),
        (("calibrate", tuned, "--model", base, "--shots", few, "--name", "x", "--type", "q8_0"),
         "--as sidecar, branch or merged"),
        (("calibrate", tuned, "--model", base, "--shots", few, "--name", "x", "--as", "merged",
          "--weight", "2"), "leave --weight out"),
        (("calibrate", tuned, "--model", base, "--shots", few, "--name", "x", "--bounds", "0", "1"),
         "0 < lower < upper"),
        (("evaluate", "--model", base, "--expression", "x"), "pass --adapter"),
        (("evaluate", "--model", base, "--suite", tmp_path / "none.jsonl"), "none.jsonl"),
    ):  # fmt: skip
        assert run(*arguments) == 2, arguments
        shown = capsys.readouterr()
        assert message in shown.err
        assert "Traceback" not in shown.err
    assert not out.exists()


@pytest.mark.parametrize("command", ["extract", "select", "calibrate", "evaluate"])
def test_every_command_has_help_with_an_example(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        run(command, "--help")
    assert left.value.code == 0
    assert f"example:\n  safegene {command}" in capsys.readouterr().out


def test_building_the_command_line_imports_neither_torch_nor_numpy() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from safegene_converter.cli.main import parser; parser(); "
        "assert not {'torch', 'peft', 'transformers', 'numpy', 'scipy'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    )
