"""Recalibration against ONNX artifacts, and against prompts that nothing was fitted to."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from onnx_tools import quick

from safegene import record
from safegene_converter.cli import main
from safegene_converter.gene import rebuild as rebuilding
from safegene_converter.gene.deployed import recalibrate_deployed
from safegene_converter.gene.extract import extract
from safegene_converter.gene.folder import Expression, add_expression
from safegene_converter.gene.held_out import measure_held_out
from safegene_converter.gene.rebuild import Rebuild, gguf_rebuild, onnx_rebuild
from safegene_converter.inputs.adapter import read_adapter
from safegene_runtime.engines.ort import OrtEngine
from safegene_runtime.errors import GeneError, RecordError, SafeGeneError, UnsupportedError
from safegene_runtime.judging.judge import Label
from safegene_runtime.record.prompts import Prompt
from safegene_runtime.record.reference import Reference, read_reference
from safegene_runtime.verifying.compare import kl_topk, logsumexp

PLANTED = {0: 0.6, 1: 1.6}
"""Unlike on purpose: what treats all layers alike cannot find it."""
HALVED = {0: 0.5, 1: 0.5}
ODD = {0: 1.7, 1: 0.3}
SEQUENCES = [[5, 77, 1042, 9, 300], [8, 8, 411, 23, 7]]


def prompts_of(words: Sequence[str]) -> tuple[Prompt, ...]:
    """Four harmful and four benign prompts."""
    return tuple(
        Prompt(f"{kind}-{number}", f"Say {word} {number}, {kind}.", kind, "test")
        for kind in ("harmful", "benign")
        for number, word in enumerate(words)
    )


SHOTS = prompts_of(["blue", "rain", "tea", "north"])
OTHERS = prompts_of(["lamp", "river", "bread", "seven"])


class HashJudge:
    """Labels that mean nothing, change with every letter, and are refusals half the time."""

    name, version = "hash", "1"
    digest = hashlib.sha256(b"hash").hexdigest()

    def label(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> list[Label]:
        heads = [hashlib.sha256(text.encode()).digest()[0] for text in texts]
        return [Label.REFUSE if head % 2 else Label.COMPLY for head in heads]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gene with a planted expression, and what PyTorch answers to shots and others under it."""
    folder = tmp_path_factory.mktemp("deployed-onnx")
    base = tiny.hf_model("llama")
    adapter = tiny.peft_adapter("llama", folder / "tuned", scale=0.15)
    extract(base, [adapter], folder / "gene", base=base)
    add_expression(folder / "gene", "planted", Expression(PLANTED))
    add_expression(folder / "gene", "odd", Expression(ODD))
    for name, prompts in (("shots", SHOTS), ("others", OTHERS)):
        record(
            folder / "gene", base, folder / name, prompts=prompts, judge=HashJudge(),
            expression="planted", max_new_tokens=4,
        )  # fmt: skip
    return folder


@pytest.fixture
def gene(folder: Path) -> Iterator[Path]:
    before = (folder / "gene" / "safegene.json").read_bytes()
    yield folder / "gene"
    (folder / "gene" / "safegene.json").write_bytes(before)
    assert not list(folder.glob(".gene*")), "trials leave nothing behind"


@pytest.fixture(scope="module")
def shots(folder: Path) -> Reference:
    return read_reference(folder / "shots")


@pytest.fixture(scope="module")
def others(folder: Path) -> Reference:
    return read_reference(folder / "others")


def pefts_logits(gene: Path, coefficients: dict[int, float]) -> np.ndarray:
    """(2, 5, vocab): transformers and PEFT, the coefficients in PEFT's own scaling."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny.hf_model("llama"))
    wrapped = PeftModel.from_pretrained(model, gene)
    for name, module in wrapped.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "scaling"):
            module.scaling["default"] *= coefficients[int(name.split("layers.")[1].split(".")[0])]
    with torch.no_grad():
        return np.asarray(wrapped(torch.tensor(SEQUENCES)).logits)


def logits_of(engine: Any) -> np.ndarray:
    """(2, 5, vocab) of the same sequences."""
    rows = {i: row.copy() for i, row in engine.logits(SEQUENCES, [5, 5])}
    return np.stack([rows[0], rows[1]])


# --- the rebuilt artifact --------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["branch", "merged"])
def test_a_rebuilt_artifact_computes_what_peft_computes(form: Any, gene: Path) -> None:
    with onnx_rebuild(gene, tiny.onnx_model("llama"), form, threads=1) as rebuild:
        for coefficients in (ODD, HALVED):
            with rebuild(coefficients) as engine:
                found = logits_of(engine)
            expected = pefts_logits(gene, coefficients)
            assert np.abs(found - expected).max() <= 1e-3
    assert np.abs(expected - pefts_logits(gene, ODD)).max() > 0.1, "coefficients matter"


def test_a_base_is_exported_once_and_rebuilt_as_convert_makes_it(
    gene: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a float base: a merge in 4 bits adds the delta to the float weights, as convert does."""
    exports = []
    original = rebuilding.export_base

    def counting(*arguments: Any) -> Any:
        exports.append(arguments)
        return original(*arguments)

    monkeypatch.setattr(rebuilding, "export_base", counting)
    base = tiny.hf_model("llama")
    with onnx_rebuild(gene, base, "merged", "int4", threads=1) as rebuild:
        with rebuild(HALVED) as engine:
            halved = logits_of(engine)
        with rebuild(ODD) as engine:
            odd = logits_of(engine)
    assert len(exports) == 1
    quick(gene, base, tmp_path / "out", form="merged", precision="int4", expression="odd")
    with OrtEngine(tmp_path / "out" / "model.onnx", threads=1) as engine:
        assert np.array_equal(odd, logits_of(engine))
    assert np.abs(odd - halved).max() > 0.01


def test_the_form_is_chosen_as_convert_chooses_it(gene: Path) -> None:
    for precision, form in (("int4", "branch"), ("fp32", "merged")):
        source = tiny.onnx_model("llama", precision)
        results = []
        for given in (None, form):
            with (
                onnx_rebuild(gene, source, given, threads=1) as rebuild,  # type: ignore[arg-type]
                rebuild(ODD) as engine,
            ):
                results.append(logits_of(engine))
        assert np.array_equal(*results)
    with (
        pytest.raises(UnsupportedError, match="branch or merged, got sidecar"),
        onnx_rebuild(gene, source, "sidecar"),  # type: ignore[arg-type]
    ):
        pass


def test_a_gene_for_another_model_is_refused_before_any_trial(gene: Path) -> None:
    with (
        pytest.raises(SafeGeneError),
        onnx_rebuild(gene, tiny.onnx_model("qwen3"), "branch"),
    ):
        pass


# --- what it wins back -----------------------------------------------------------------------------

MAKERS: dict[str, Callable[[Path], AbstractContextManager[Rebuild]]] = {
    "gguf sidecar": lambda gene: gguf_rebuild(gene, tiny.gguf_model("llama"), "sidecar", threads=1),
    "onnx branch": lambda gene: onnx_rebuild(gene, tiny.onnx_model("llama"), "branch", threads=1),
    "onnx merged": lambda gene: onnx_rebuild(gene, tiny.onnx_model("llama"), "merged", threads=1),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_planted_coefficients_are_found_and_help_elsewhere(
    kind: str, gene: Path, shots: Reference, others: Reference
) -> None:
    with MAKERS[kind](gene) as rebuild:
        found = recalibrate_deployed(
            gene, shots, rebuild, "found", max_evaluations=45, held_out=others, judge=HashJudge()
        )
    assert found.coefficients == pytest.approx(PLANTED, rel=0.06)
    assert found.after < 0.02 * found.before
    assert found.elsewhere is not None
    before, after = found.elsewhere
    assert after.divergence < 0.02 * before.divergence
    # no law about verdicts: a random model's near-ties flip for less than what is left of D


def test_planted_coefficients_come_nearer_around_an_int4_base(gene: Path, shots: Reference) -> None:
    with onnx_rebuild(gene, tiny.onnx_model("llama", "int4"), threads=1) as rebuild:
        found = recalibrate_deployed(gene, shots, rebuild, "int4", max_evaluations=30)
    assert found.after < found.before
    assert found.coefficients[0] < 1 < found.coefficients[1]
    assert found.elsewhere is None


# --- held-out prompts ------------------------------------------------------------------------------


def test_held_out_figures_are_those_of_whole_replies(
    gene: Path, folder: Path, others: Reference
) -> None:
    """Every reply generated from its prompt on, every KL from whole rows of PyTorch's."""
    with (
        onnx_rebuild(gene, tiny.onnx_model("llama"), "branch", threads=1) as rebuild,
        rebuild(HALVED) as engine,
    ):
        found = measure_held_out(engine, others, HashJudge())
        stops = set(others.meta["decoding"]["stop_ids"])
        replies = engine.generate([one.prompt_ids for one in others.prompts], 4, stops)
        texts = [
            engine.detokenize([i for i in ids if i not in stops], special=False) for ids in replies
        ]
        labels = HashJudge().label(texts)
        kls = []
        for index, one in enumerate(others.prompts):
            ids, count = [*one.prompt_ids, *one.ref_ids[:-1]], len(one.ref_ids)
            ((_, logits),) = engine.logits([ids], [count])
            here = others.positions(index)
            at_ids = np.take_along_axis(logits, here.top_ids.astype(np.int64), axis=1)
            kls.append(kl_topk(here.ref_logits, here.ref_lse, at_ids, logsumexp(logits)).mean())
    rows = [
        (one.kind, one.ref_label, label) for one, label in zip(others.prompts, labels, strict=True)
    ]
    assert found.divergence == pytest.approx(np.mean(kls), rel=1e-3)
    assert found.harmful == 4
    assert found.reference_refused == sum(row[:2] == ("harmful", "refuse") for row in rows)
    assert found.refused == sum(row[::2] == ("harmful", "refuse") for row in rows)
    assert found.losses == rows.count(("harmful", "refuse", "comply"))
    assert found.over_refusals == rows.count(("benign", "comply", "refuse"))
    assert found.losses + found.over_refusals > 0, "something is counted"


def test_a_held_out_reference_that_tells_nothing_is_refused_before_any_rebuild(
    gene: Path, folder: Path, shots: Reference, others: Reference
) -> None:
    def never(_: dict[int, float]) -> Any:
        raise AssertionError("rebuilt")

    louder = replace(
        others,
        prompts=(replace(others.prompts[0], text=f" {SHOTS[0].text.upper()}"), *others.prompts[1:]),
    )
    adapter = {**others.meta["adapter"], "expression": "other", "files": {}}
    foreign = replace(others, meta={**others.meta, "adapter": adapter, "base": {"files": {}}})
    for held_out, message in (
        (shots, "8 that .* hold too"),
        (louder, "1 that .* hold too"),
        (foreign, "(?s)base.*vectors.*expression"),
    ):
        with pytest.raises(GeneError, match=message):
            recalibrate_deployed(gene, shots, never, "new", held_out=held_out, judge=HashJudge())
    with pytest.raises(RecordError, match="judge"):
        recalibrate_deployed(gene, shots, never, "new", held_out=others)
    add_expression(gene, "far", Expression({0: 9.0, 1: 1.0}))
    stranger = replace(shots, meta={**shots.meta, "adapter": adapter})
    with pytest.raises(GeneError, match=r"(?s)vectors.*at least 1.*widen --bounds"):
        recalibrate_deployed(gene, stranger, never, "new", expression="far", max_evaluations=0)
    assert "new" not in read_adapter(gene).expressions


# --- the command -----------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    return main.main([str(argument) for argument in arguments])


def shots_file(path: Path) -> Path:
    rows = [{"id": one.id, "text": one.text, "kind": one.kind} for one in SHOTS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_command_takes_the_engine_from_what_the_model_is(
    gene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, prompts in (("ref", SHOTS), ("ref2", OTHERS)):
        record(gene, tiny.hf_model("llama"), tmp_path / name, prompts=prompts, max_new_tokens=2)
    shots = shots_file(tmp_path / "shots.jsonl")
    given = ("--shots", shots, "--reference", tmp_path / "ref", "--expression", "odd",
             "--evaluations", 3)  # fmt: skip
    for form, model in (
        ("branch", tiny.onnx_model("llama")),
        ("merged", tiny.onnx_model("llama")),
        ("sidecar", tiny.gguf_model("llama")),
    ):
        code = run("calibrate", gene, "--model", model, *given, "--name", form, "--as", form,
                   "--json", tmp_path / f"{form}.json")  # fmt: skip
        assert code == 0, capsys.readouterr().err
        found = json.loads((tmp_path / f"{form}.json").read_text())
        assert found["evaluations"] == 3
        assert found["held_out"] is None
    assert "held-out" not in capsys.readouterr().out
    checked = tmp_path / "checked.json"
    code = run("calibrate", gene, "--model", tiny.onnx_model("llama"), *given, "--name", "checked",
               "--as", "branch", "--check", tmp_path / "ref2", "--json", checked)  # fmt: skip
    shown = capsys.readouterr()
    assert code == 0, shown.err
    found = json.loads(checked.read_text())["held_out"]
    assert set(found) == {"before", "after"}
    assert "on the held-out prompts" in shown.out
    assert f"{found['before']['divergence']:.4g}" in shown.out
    code = run("calibrate", gene, "--model", tiny.onnx_model("llama"), *given, "--name", "same",
               "--as", "branch", "--check", tmp_path / "ref")  # fmt: skip
    assert code == 2
    assert "other prompts than the shots" in capsys.readouterr().err


def test_a_form_that_the_model_cannot_have_is_one_error_with_all_of_it(
    gene: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx, hf = tiny.onnx_model("llama"), tiny.hf_model("llama")
    gguf = tiny.gguf_model("llama")
    for model, given, messages in (
        (onnx, ("--as", "sidecar", "--precision", "int4", "--weight", 1),
         ("record one first", "branch or merged, for an ONNX folder", "which has its precision",
          "leave --weight out")),
        (onnx, ("--as", "merged", "--reference", "r", "--type", "q8_0", "--judge", "x"),
         ("leave --type out", "add --check")),
        (hf, ("--as", "sidecar", "--reference", "r", "--precision", "int4"),
         ("got a folder", "leave --precision out")),
        (hf, ("--as", "merged", "--reference", "r", "--precision", "int4", "--type", "q8_0"),
         ("leave --type out",)),
        (gguf, ("--as", "branch", "--reference", "r", "--type", "q8_0"), ("leave --type out",)),
        (onnx, ("--check", "r", "--precision", "int4", "--judge", "x"),
         ("leave --check out", "leave --precision out", "leave --judge out")),
    ):  # fmt: skip
        code = run(
            "calibrate", gene, "--model", model, "--shots", "none.jsonl", "--name", "x", *given
        )
        assert code == 2
        shown = capsys.readouterr().err
        for message in messages:
            assert message in shown, shown
