"""The control of a merged artifact: its plain base, shown to be that, and what it is good for."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gated
import numpy as np
import pytest
import tiny
from mutants import edit_factors, other_rows, scaled
from workshop import PROMPTS, Workshop

from safegene import convert, record
from safegene_converter.cli import main
from safegene_converter.encoding import ggml_quantizer
from safegene_converter.fold.survival import Bounds
from safegene_converter.gguf.presets import quantize_gguf
from safegene_converter.gguf.writer import OutTensor, write_gguf
from safegene_runtime.artifact.manifest import read_manifest
from safegene_runtime.artifact.provenance import ADAPTER_KEY
from safegene_runtime.engines.engine import Engine
from safegene_runtime.engines.registry import open_engine
from safegene_runtime.errors import BaseModelError, EngineError, FormatError
from safegene_runtime.formats import ggml
from safegene_runtime.formats.gguf.model import open_model
from safegene_runtime.formats.gguf.tensors import read_tensor_bytes
from safegene_runtime.formats.gguf.types import GGMLType, Value, ValueType
from safegene_runtime.gating.bounds import BOUNDS
from safegene_runtime.gating.verdict import Verdict
from safegene_runtime.judging.plugins import load_judge
from safegene_runtime.record.reference import Reference
from safegene_runtime.verifying import base_noise, ladder
from safegene_runtime.verifying.base_noise import RATIO
from safegene_runtime.verifying.control import check_control
from safegene_runtime.verifying.ladder import verify

TOUCHED = ["q_proj", "v_proj", "o_proj"]
"""Not all of a block, so that the class stays that of the base where they are promoted."""
EXACT = Bounds(0.99, 1.01, 0.01, 1.1)
"""Nothing but rounding to a float, so that the artifact has as little of its own as the base."""
TEMPLATE = "tokenizer.chat_template"


@dataclass(frozen=True)
class Merged:
    """A base of 4-bit numbers, in PyTorch too, and an adapter merged into it."""

    adapter: Path
    base: Path
    artifact: Path
    reference: Reference

    @property
    def model(self) -> Path:
        """What is served."""
        return self.artifact / "model.gguf"

    def check(self, control: Path) -> dict[str, str]:
        """`check_control` of this artifact."""
        manifest = read_manifest(self.artifact)
        return check_control(manifest, self.model, control, self.reference, lambda *_: None)

    def refused(self, control: Path) -> list[str]:
        """The problems of a control that is none."""
        with pytest.raises(BaseModelError) as caught:
            self.check(control)
        return [str(problem) for problem in caught.value.problems]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Merged:
    folder = tmp_path_factory.mktemp("control")
    adapter = tiny.peft_adapter("llama", folder / "adapter", scale=0.05, target_modules=TOUCHED)
    base = folder / "base.gguf"
    quantize_gguf(tiny.gguf_model("llama"), base, "q4_1")
    convert(adapter, base, folder / "merged", form="merged", check=False, bounds=EXACT)
    reference = record(adapter, base, folder / "reference", prompts=PROMPTS, max_new_tokens=4)
    return Merged(adapter, base, folder / "merged", reference)


def rewritten(
    source: Path,
    out: Path,
    tensors: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
    types: Mapping[str, GGMLType] | None = None,
    metadata: Mapping[str, Value | None] | None = None,
) -> Path:
    """A GGUF with some tensors and keys changed; None takes a key away."""
    model = open_model(source)
    found = []
    for name, info in model.tensors.items():
        data, kind = read_tensor_bytes(info), (types or {}).get(name, info.type)
        if name in (tensors or {}) or kind is not info.type:
            rows = ggml.dequantize(np.frombuffer(data, np.uint8), info.type, info.shape)
            rows = (tensors or {}).get(name, lambda same: same)(rows)
            data = bytes(ggml_quantizer.quantize(np.ascontiguousarray(rows, np.float32), kind))
        found.append(OutTensor(name, info.shape, kind, data))
    merged = {**model.metadata, **(metadata or {})}
    keys = {key: value for key, value in merged.items() if value is not None}
    write_gguf(out, keys, found)
    return out


def text(value: str) -> Value:
    return Value(ValueType.STRING, value)


def touched(made: Merged) -> list[str]:
    return [module.tensor for module in read_manifest(made.artifact).modules]


# --- what it is good for ---------------------------------------------------------------------------


def test_a_merged_artifact_moves_about_as_much_as_its_control(made: Merged) -> None:
    report = verify(made.artifact, made.reference, control=made.base, threads=1, write=False)
    noise = report.rung("logits").figures["base_noise"]
    assert noise["prompts"] == len(PROMPTS)
    assert noise["artifact_kl"] == pytest.approx(report.rung("logits").figures["mean_kl"])
    assert 0 < noise["ratio"] < RATIO
    assert "times its base's own" in report.rung("logits").detail
    assert report.rung("integrity").figures["control"].keys() == {made.base.name}
    assert f"{made.base.name} is its base without the adapter" in report.rung("integrity").detail
    assert report.broken_at is None
    assert report.precision == "4-bit"


def test_a_merge_into_the_recorded_file_is_rounded_anew_where_its_control_is_not(
    made: Merged, tmp_path: Path
) -> None:
    """The case that docs/ladder.md tells of: 8 bits may cost more than the bound allows, a float does not."""
    ratios = {}
    for kind in ("q8_0", "f16"):
        convert(made.adapter, made.base, tmp_path / kind, form="merged", type=kind, check=False)
        report = verify(tmp_path / kind, made.reference, control=made.base, threads=1, write=False)
        ratios[kind] = report.rung("logits").figures["base_noise"]["ratio"]
    assert ratios["f16"] < RATIO < ratios["q8_0"]


def test_the_control_is_the_base_that_a_sidecar_would_have_run(
    made: Merged, tmp_path: Path
) -> None:
    convert(made.adapter, made.base, tmp_path / "sidecar", form="sidecar", check=False)
    beside = verify(tmp_path / "sidecar", made.reference, base=made.base, threads=1, write=False)
    merged = verify(made.artifact, made.reference, control=made.base, threads=1, write=False)
    below = [one.rung("logits").figures["base_noise"]["base_kl"] for one in (beside, merged)]
    assert below[0] == below[1]


def test_stopping_early_compares_the_prompts_that_ran(monkeypatch: pytest.MonkeyPatch) -> None:
    made = gated.make()
    monkeypatch.syspath_prepend(made.site)
    report = verify(made.artifact, made.reference, control=made.base, judge=load_judge(made.judge),
                    threads=1, write=False, sequential=True)  # fmt: skip
    noise = report.rung("logits").figures["base_noise"]
    assert report.verdict is Verdict.PASS
    assert noise["prompts"] == min(base_noise.PROMPTS, len(report.outcomes))


@pytest.mark.parametrize(
    "mistake",
    [None, scaled(0.5), scaled(1.8), other_rows(tiny.N_HEAD, tiny.N_HEAD_KV, inverse=True)],
    ids=["none", "scale 0.5", "scale 1.8", "q/k rows in the other order"],
)
def test_a_wrong_merge_that_its_class_would_let_pass_breaks_against_its_control(
    mistake: Any, made: Merged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes are the genuine ones: the program that runs them serves others."""
    if mistake is not None:
        adapter = shutil.copytree(made.adapter, tmp_path / "adapter")
        edit_factors(adapter, mistake)
        convert(adapter, made.base, tmp_path / "wrong", form="merged", check=False, bounds=EXACT)

        def other(model: Path, adapter: Path | None, **settings: Any) -> Engine:
            served = tmp_path / "wrong" / "model.gguf" if model == made.model else model
            return open_engine(served, adapter, **settings)

        monkeypatch.setattr(ladder, "open_engine", other)
    monkeypatch.setattr(base_noise, "MIN_PROMPTS", len(PROMPTS))
    with_one = verify(made.artifact, made.reference, control=made.base, threads=1, write=False)
    without = verify(made.artifact, made.reference, threads=1, write=False)
    rung = with_one.rung("logits")
    assert rung.figures["mean_kl"] < BOUNDS["4-bit"].kl_ceiling
    assert without.rung("logits").status == "ok"
    assert rung.status == ("ok" if mistake is None else "broken"), rung.detail


# --- what it must be -------------------------------------------------------------------------------


def test_the_base_is_the_control_whatever_was_promoted(made: Merged) -> None:
    assert made.check(made.base).keys() == {made.base.name}
    ours, theirs = open_model(made.model).tensors, open_model(made.base).tensors
    assert any(ours[name].type is not theirs[name].type for name in touched(made))


@pytest.mark.parametrize("preset", ["q4_1", "q5_0"])
def test_a_float_base_quantised_alike_is_the_control(preset: str, tmp_path: Path) -> None:
    shop = Workshop(tmp_path)
    convert(shop.adapter, shop.base("gguf merged"), tmp_path / "out", form="merged", type=preset,
            check=False, promote=False, bounds=Bounds(0, 1e9, 1e9, 1e9))  # fmt: skip
    quantize_gguf(shop.base("gguf merged"), tmp_path / "control.gguf", preset)
    one = Merged(shop.adapter, shop.base("gguf merged"), tmp_path / "out", shop.reference)
    assert one.check(tmp_path / "control.gguf")
    other = "q5_0" if preset == "q4_1" else "q4_1"
    quantize_gguf(shop.base("gguf merged"), tmp_path / "other.gguf", other)
    assert any("types of touched" in problem for problem in one.refused(tmp_path / "other.gguf"))
    assert any("token_embd" in problem for problem in one.refused(shop.base("gguf merged")))


def test_the_artifact_is_not_its_own_control(made: Merged) -> None:
    (problem,) = made.refused(made.model)
    assert f"{ADAPTER_KEY}: expected no adapter" in problem
    assert "-> give the base" in problem


@pytest.mark.parametrize("which", ["all of it", "one layer"])
def test_an_adapter_in_the_control_is_found_in_its_bytes(
    which: str, made: Merged, tmp_path: Path
) -> None:
    """Without the keys that would tell."""
    ours, theirs = open_model(made.model), open_model(made.base)
    taken = {
        name: lambda _, name=name: ggml.dequantize(
            np.frombuffer(read_tensor_bytes(ours.tensors[name]), np.uint8),
            ours.tensors[name].type, ours.tensors[name].shape,
        )
        for name in touched(made) if which == "all of it" or name.startswith("blk.1.")
    }  # fmt: skip
    types = {name: ours.tensors[name].type for name in taken}
    control = rewritten(made.base, tmp_path / "c.gguf", taken, types)
    told = [one for one in made.refused(control) if "the delta is in there" in one]
    assert all(any(f": {name}: beta of " in one for one in told) for name in taken)
    assert theirs.metadata.keys() == open_model(control).metadata.keys()


def test_one_byte_of_an_untouched_tensor_is_named(made: Merged, tmp_path: Path) -> None:
    control = Path(shutil.copy(made.base, tmp_path / "c.gguf"))
    info = open_model(control).tensors["blk.0.ffn_up.weight"]
    with control.open("r+b") as file:
        file.seek(info.offset + info.nbytes - 1)
        last = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([last ^ 1]))
    (problem,) = made.refused(control)
    assert "blk.0.ffn_up.weight: expected the artifact's bytes" in problem


@pytest.mark.parametrize("what", ["noise", "zeros"])
def test_touched_tensors_that_are_no_base_at_all_are_refused(
    what: str, made: Merged, tmp_path: Path
) -> None:
    """A ruined base has a large KL of its own, and would explain everything."""
    name = touched(made)[0]
    noise = np.random.default_rng(0)
    edits: dict[str, Callable[[np.ndarray], np.ndarray]] = {
        "noise": lambda w: noise.normal(0, w.std(), w.shape),
        "zeros": np.zeros_like,
    }
    problems = made.refused(rewritten(made.base, tmp_path / "c.gguf", {name: edits[what]}))
    (problem,) = (one for one in problems if "beta" not in one)
    assert f"{name}: expected the artifact's weights within" in problem


def test_touched_tensors_that_are_no_numbers_break_the_format(made: Merged, tmp_path: Path) -> None:
    control = Path(shutil.copy(made.base, tmp_path / "c.gguf"))
    with control.open("r+b") as file:
        file.seek(open_model(control).tensors[touched(made)[0]].offset)
        file.write(np.float16(np.nan).tobytes())
    with pytest.raises(FormatError, match="finite numbers"):
        made.check(control)


def test_a_touched_tensor_in_a_type_that_it_was_not_promoted_from_is_refused(
    made: Merged, tmp_path: Path
) -> None:
    name = touched(made)[0]
    control = rewritten(made.base, tmp_path / "c.gguf", types={name: GGMLType.F32})
    (problem,) = made.refused(control)
    assert "types of touched tensors: expected the artifact's, but for what was promoted" in problem


def test_the_very_base_is_the_control_in_whatever_type_it_was_merged(
    made: Merged, tmp_path: Path
) -> None:
    """`--type q8_0` into 4 bits promotes nothing; a file of the same tensors is not shown to be the base."""
    convert(made.adapter, made.base, tmp_path / "out", form="merged", type="q8_0", promote=False,
            check=False, bounds=Bounds(0, 1e9, 1e9, 1e9))  # fmt: skip
    one = dataclasses.replace(made, artifact=tmp_path / "out")
    assert one.check(Path(shutil.copy(made.base, tmp_path / "renamed.gguf")))
    told = {"general.name": text("another")}
    (problem,) = one.refused(rewritten(made.base, tmp_path / "c.gguf", metadata=told))
    assert "types of touched tensors" in problem


def test_every_key_that_says_what_is_computed_is_compared_and_names_are_not(
    made: Merged, tmp_path: Path
) -> None:
    stored = open_model(made.base).metadata
    tokens = stored["tokenizer.ggml.tokens"]
    changed: dict[str, Value | None] = {
        TEMPLATE: text("another"),
        "tokenizer.ggml.tokens": dataclasses.replace(tokens, value=tuple(tokens.value)[::-1]),
        "llama.rope.freq_base": Value(ValueType.FLOAT32, 5.0),
        "llama.context_length": None,
        "llama.of_our_own": text("x"),
        "general.name": text("whatever"),
        "general.url": text("anywhere"),
        "quantize.imatrix.file": text("some"),
    }
    problems = made.refused(rewritten(made.base, tmp_path / "c.gguf", metadata=changed))
    named = [key for key in changed if any(f": {key}: expected" in one for one in problems)]
    assert named == [key for key in changed if not key.startswith(("general.", "quantize."))]
    assert len(problems) == len(named)
    free = {key: value for key, value in changed.items() if key not in named}
    assert made.check(rewritten(made.base, tmp_path / "d.gguf", metadata=free))


def test_another_model_is_told_by_everything_at_once(made: Merged) -> None:
    problems = made.refused(tiny.gguf_model("qwen3"))
    assert any("general.architecture" in one for one in problems)
    assert any("attn_q_norm" in one for one in problems)
    assert all("\n    -> " in one for one in problems)
    wide = made.refused(tiny.gguf_model("llama", 256))
    assert any("token_embd.weight: expected (" in one for one in wide)


def test_a_truncated_control_is_no_gguf(made: Merged, tmp_path: Path) -> None:
    data = made.base.read_bytes()
    for size in (0, 30, len(data) // 2, len(data) - 64):
        (tmp_path / "c.gguf").write_bytes(data[:size])
        with pytest.raises(FormatError):
            made.check(tmp_path / "c.gguf")


# --- how it is asked for ---------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["gguf sidecar", "onnx adapter", "onnx merged", "onnx branch"])
def test_a_form_that_has_no_use_for_a_control_refuses_it(
    target: str, made: Merged, tmp_path_factory: pytest.TempPathFactory
) -> None:
    shop = Workshop(tmp_path_factory.mktemp("forms"))
    with pytest.raises(EngineError, match=r"expected a merged GGUF, got .*\n.*leave --control out"):
        verify(shop.genuine(target), shop.reference, base=shop.base_beside(target), control=made.base,
               write=False)  # fmt: skip


def test_the_command_takes_a_control_and_says_what_is_wrong_with_it(
    made: Merged, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*more: object) -> tuple[int, str]:
        asked = ("verify", made.artifact, "--reference", made.reference.path, "--no-write", *more)
        code = main.main([str(one) for one in asked])
        found = capsys.readouterr()
        return code, found.out + found.err

    code, shown = run("--control", made.base, "--json")
    assert code == 4, "a random model refuses nothing, and the gate says so"
    logits = next(one for one in json.loads(shown)["rungs"] if one["name"] == "logits")
    assert "times its base's own" in logits["detail"]
    (tmp_path / "half.gguf").write_bytes(made.base.read_bytes()[:5000])
    wrong = {
        tmp_path / "nothing.gguf": "got no file",
        tmp_path: "got a folder",
        made.adapter / "adapter_config.json": "ends in .gguf",
        tmp_path / "half.gguf": "half.gguf",
        made.model: "expected no adapter",
        tiny.gguf_model("qwen2"): "general.architecture",
    }
    for control, said in wrong.items():
        code, shown = run("--control", control)
        assert (code, said in shown) == (2, True), (control, shown)
    again = shutil.copytree(made.artifact, tmp_path / "again")
    asked = (
        "verify",
        made.artifact,
        again,
        "--reference",
        made.reference.path,
        "--control",
        made.base,
    )
    assert main.main([str(one) for one in asked]) == 2
    shown = capsys.readouterr().err
    assert "--control: OUT: expected one artifact" in shown
    before = made.base.read_bytes()
    code, shown = run("--control", made.base, "--html", made.base)
    assert code == 2
    assert "of its own" in shown
    assert made.base.read_bytes() == before
