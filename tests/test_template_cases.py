"""Templates and ends of replies as models have them: recorded, verified and served alike."""

from __future__ import annotations

import datetime
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import records
import tiny
from onnx_tools import convert_onnx

import safegene
from safegene import convert, record
from safegene_converter.cli.main import main
from safegene_converter.gguf.writer import OutTensor, write_gguf
from safegene_converter.inputs.base import open_base
from safegene_converter.recording.chat_text import render
from safegene_converter.recording.loading import load_model, save_as_folder, stop_ids_of
from safegene_runtime.engines.registry import open_engine
from safegene_runtime.errors import BaseModelError, EngineError, RecordError, UnsupportedError
from safegene_runtime.formats.files import sha256_of
from safegene_runtime.formats.gguf.model import open_model
from safegene_runtime.formats.gguf.types import Value, ValueType
from safegene_runtime.record.prompts import Prompt
from safegene_runtime.record.reference import Reference
from safegene_runtime.session import UnverifiedWarning
from safegene_runtime.verifying.ladder import verify
from safegene_runtime.verifying.text_parity import compare_text

PROMPTS = [Prompt("a", "Name a colour.", "harmful", "test"), Prompt("b", "Hi.", "benign", "test")]
PLAIN = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DATED = "<|im_start|>system\nToday is {{ strftime_now('%d %b %Y') }}.<|im_end|>\n" + PLAIN
REFUSES = "{{ raise_exception('only two roles, please') }}"
LEAP_DAY = datetime.datetime(2024, 2, 29, 12, 30, 15, 999)
FORMATS = ("gguf", "onnx")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.peft_adapter("llama", tmp_path_factory.mktemp("templates") / "adapter", scale=0.1)


def hf_with(out: Path, template: Any = None, **settings: Any) -> Path:
    """The tiny model with another template, and other settings in tokenizer_config.json."""
    shutil.copytree(tiny.hf_model("llama"), out)
    return folder_with(out, template, **settings)


def folder_with(out: Path, template: Any = None, **settings: Any) -> Path:
    path = out / "tokenizer_config.json"
    known = json.loads(path.read_text())
    if isinstance(template, str):
        (out / "chat_template.jinja").write_text(template)
    elif template is not None:
        (out / "chat_template.jinja").unlink()
        known["chat_template"] = template
    path.write_text(json.dumps({**known, **settings}))
    return out


def gguf_with(out: Path, metadata: Mapping[str, Value], source: Path | None = None) -> Path:
    model = open_model(source or tiny.gguf_model("llama"))
    tensors = [OutTensor(name, one.shape, one.type, one) for name, one in model.tensors.items()]
    write_gguf(out, {**model.metadata, **metadata}, tensors)
    return out


def text_of(value: str) -> Value:
    return Value(ValueType.STRING, value)


def base_with(kind: str, out: Path, template: str) -> Path:
    """What is converted: a GGUF, or an ONNX folder."""
    if kind == "gguf":
        return gguf_with(out.with_suffix(".gguf"), {"tokenizer.chat_template": text_of(template)})
    shutil.copytree(tiny.onnx_model("llama"), out)
    return folder_with(out, template)


def artifact_of(kind: str, adapter: Path, base: Path, out: Path) -> Path:
    made: Any = convert if kind == "gguf" else convert_onnx
    made(adapter, base, out, form="merged", check=False)
    return out


def model_in(folder: Path) -> Path:
    return next(path for path in folder.iterdir() if path.suffix in (".gguf", ".onnx"))


def recorded(adapter: Path, base: Path, out: Path, **options: Any) -> Reference:
    return record(adapter, base, out, prompts=PROMPTS, max_new_tokens=4, **options)


# --- the clock -------------------------------------------------------------------------------------


def test_recorded_on_one_day_and_verified_on_another_is_the_same_text(
    adapter: Path, tmp_path: Path
) -> None:
    reference = recorded(adapter, hf_with(tmp_path / "hf", DATED), tmp_path / "ref", now=LEAP_DAY)
    assert reference.meta["tokenizer"]["rendered_at"] == "2024-02-29T12:30:15"
    assert all("Today is 29 Feb 2024." in one.rendered for one in reference.prompts)
    for kind in FORMATS:
        base = base_with(kind, tmp_path / kind, DATED)
        with open_engine(model_in(base) if kind == "onnx" else base, threads=1) as engine:
            rung = compare_text(engine, reference)
        assert rung.status == "ok", rung


def test_who_serves_renders_with_the_real_time(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = artifact_of(
        "gguf", adapter, base_with("gguf", tmp_path / "base", DATED), tmp_path / "made"
    )
    with pytest.warns(UnverifiedWarning):
        session = safegene.open(folder, allow_unverified=True, threads=1)
    seen = []
    with session:
        tokenize = session.engine.tokenize
        monkeypatch.setattr(
            session.engine,
            "tokenize",
            lambda text, **how: seen.append(text) or tokenize(text, **how),
        )
        session.chat([{"role": "user", "content": "Hi."}], 1)
    assert f"{datetime.datetime.now():%Y}" in seen[0]


def test_a_reference_holds_the_time_where_its_template_reads_the_clock_and_only_there(
    adapter: Path, tmp_path: Path
) -> None:
    plain = recorded(adapter, tiny.hf_model("llama"), tmp_path / "plain")
    assert "rendered_at" not in plain.meta["tokenizer"]
    logits = [records.logits_for(records.prompt("a", [5, 0], [6, 0]), 32, 1)]
    for template, time in (("x", "2024-02-29T12:30:15"), (DATED, None), (DATED, "yesterday"),
                           (DATED, "2024-02-29T12:30:15Z"), (DATED, "2024-02-31T12:30:15")):  # fmt: skip
        tokenizer = {
            **records.META["tokenizer"],
            "chat_template": template,
            "chat_template_sha256": sha256_of(template.encode()),
            **({"rendered_at": time} if time else {}),
        }
        meta = {**records.META, "tokenizer": tokenizer}
        with pytest.raises(RecordError, match="rendered_at"):
            records.write(tmp_path / "x", [records.prompt("a", [5, 0], [6, 0])], logits, meta)


# --- templates that fail ---------------------------------------------------------------------------


def test_a_template_that_refuses_is_exit_2_with_its_words(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = hf_with(tmp_path / "hf", REFUSES)
    out = tmp_path / "reference"
    assert main(["record", str(adapter), "--base", str(base), "-o", str(out)]) == 2
    assert "only two roles, please" in capsys.readouterr().err
    assert not out.exists()
    folder = artifact_of(
        "gguf", adapter, base_with("gguf", tmp_path / "base", REFUSES), tmp_path / "made"
    )
    command = ["run", str(folder), "--prompt", "Hi.", "--allow-unverified"]
    assert main(command) == 2
    assert "only two roles, please" in capsys.readouterr().err


def test_a_template_that_fails_at_verify_is_no_verdict(tmp_path: Path) -> None:
    tokenizer = {
        **records.META["tokenizer"],
        "chat_template": REFUSES,
        "chat_template_sha256": sha256_of(REFUSES.encode()),
    }
    prompt = records.prompt("a", [5, 0], [6, 0])
    reference = records.write(
        tmp_path / "ref", [prompt], [records.logits_for(prompt, 32, 1)],
        {**records.META, "tokenizer": tokenizer},
    )  # fmt: skip
    with (
        open_engine(base_with("gguf", tmp_path / "base", REFUSES), threads=1) as engine,
        pytest.raises(EngineError, match="only two roles, please"),
    ):
        compare_text(engine, reference)


def test_special_tokens_that_no_runtime_gives_a_template_are_refused(tmp_path: Path) -> None:
    _, tokenizer = load_model(open_base(tiny.hf_model("llama")))
    assert tokenizer.pad_token
    tokenizer.chat_template = "{{ messages[0].content }}{# no pad_token #}"
    assert render(tokenizer, ["Hi."]) == ["Hi."]
    tokenizer.chat_template = "{{ pad_token }}{{ messages[0].content }}"
    with pytest.raises(UnsupportedError, match="pad_token"):
        render(tokenizer, ["Hi."])


# --- several templates -----------------------------------------------------------------------------

SEVERAL = [{"name": "tool_use", "template": REFUSES}, {"name": "default", "template": PLAIN}]


def several(how: str, folder: Path) -> Path:
    """Two templates, as old and new versions of transformers write them."""
    if how == "list":
        return folder_with(folder, SEVERAL)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text(REFUSES)
    return folder_with(folder, PLAIN)


@pytest.mark.parametrize("how", ["list", "files"])
def test_of_several_templates_the_default_is_used(how: str, adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny.hf_model("llama"), tmp_path / "hf")
    reference = recorded(adapter, several(how, tmp_path / "hf"), tmp_path / "ref")
    assert reference.meta["tokenizer"]["chat_template"] == PLAIN
    shutil.copytree(tiny.onnx_model("llama"), tmp_path / "onnx")
    bases = {
        "onnx": several(how, tmp_path / "onnx"),
        "gguf": gguf_with(
            tmp_path / "base.gguf",
            {
                "tokenizer.chat_template": text_of(PLAIN),
                "tokenizer.chat_template.tool_use": text_of(REFUSES),
            },
        ),
    }
    for kind, base in bases.items():
        folder = artifact_of(kind, adapter, base, tmp_path / f"{kind}-made")
        with open_engine(model_in(folder), threads=1) as engine:
            assert compare_text(engine, reference).status == "ok"
        with pytest.warns(UnverifiedWarning):
            session = safegene.open(folder, allow_unverified=True, threads=1)
        with session:
            assert isinstance(session.chat([{"role": "user", "content": "Hi."}], 2), str)
    again = recorded(adapter, bases["gguf"], tmp_path / "again")
    assert again.meta["tokenizer"]["chat_template"] == PLAIN
    assert [one.prompt_ids for one in again.prompts] == [
        one.prompt_ids for one in reference.prompts
    ]


def test_several_templates_without_a_default_are_named(adapter: Path, tmp_path: Path) -> None:
    base = hf_with(tmp_path / "hf", SEVERAL[:1])
    with pytest.raises(EngineError, match="named default, got tool_use"):
        recorded(adapter, base, tmp_path / "ref")
    assert not (tmp_path / "ref").exists()


# --- ends ------------------------------------------------------------------------------------------


def test_the_ends_are_those_of_configuration_generation_and_tokenizer(tmp_path: Path) -> None:
    base = hf_with(tmp_path / "hf")
    for name, ends in (("config.json", [2, 5]), ("generation_config.json", [7, 9])):
        known = json.loads((base / name).read_text())
        (base / name).write_text(json.dumps({**known, "eos_token_id": ends}))
    model, tokenizer = load_model(open_base(base))
    assert stop_ids_of(model, tokenizer) == [2, 5, 7, 9]
    assert tokenizer.eos_token_id == 2


def test_a_gguf_ends_where_llama_cpp_ends(tmp_path: Path) -> None:
    more = {"tokenizer.ggml.eot_token_id": Value(ValueType.UINT32, 77)}
    base = gguf_with(tmp_path / "base.gguf", more)
    model, tokenizer = load_model(open_base(base))
    with open_engine(base, threads=1) as engine:
        assert {77, engine.eos_id} <= engine.eog_ids
    assert {77, tokenizer.eos_token_id} <= {*stop_ids_of(model, tokenizer)}
    save_as_folder(open_base(base), tmp_path / "hf")
    assert 77 in stop_ids_of(*load_model(open_base(tmp_path / "hf")))


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_ids_end_replies_in_pytorch_when_verified_and_when_served(
    kind: str, adapter: Path, tmp_path: Path
) -> None:
    """The end is a token that the model says anyway, and that only generation_config.json names."""
    free = recorded(adapter, tiny.hf_model("llama"), tmp_path / "free")
    first, end, *_ = free.prompts[0].ref_ids
    assert end != first
    base = hf_with(tmp_path / "hf")
    known = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**known, "eos_token_id": [2, end]}))
    reference = recorded(adapter, base, tmp_path / "ref")
    assert reference.meta["decoding"]["stop_ids"] == sorted({2, end})
    assert reference.prompts[0].ref_ids == (first, end)
    bases = {"gguf": tiny.gguf_model("llama"), "onnx": tiny.onnx_model("llama")}
    folder = artifact_of(kind, adapter, bases[kind], tmp_path / "made")
    report = verify(folder, reference, threads=1)
    text = next(rung for rung in report.rungs if rung.name == "text")
    assert text.status == "ok"
    assert f"[{end}]" in text.detail, "who serves it by other means has to be told"
    assert not any(rung.status == "broken" for rung in report.rungs), report.rungs
    with pytest.warns(UnverifiedWarning):
        session = safegene.open(folder, allow_unverified=True, threads=1)
    with session:
        assert end not in session.engine.eog_ids
        prompt = session.engine.tokenize(reference.prompts[0].rendered, add_special=False)
        (reply,) = session.engine.generate([prompt], 4, reference.meta["decoding"]["stop_ids"])
        assert tuple(reply) == reference.prompts[0].ref_ids
        said = session.chat([{"role": "user", "content": PROMPTS[0].text}], 4)
        assert said == session.engine.detokenize(reply[:-1], special=False)


# --- heads -----------------------------------------------------------------------------------------


def test_the_head_size_of_a_gguf_is_honoured(tmp_path: Path) -> None:
    """Qwen3 has heads of another size than hidden / heads, and than transformers' default of 128."""
    adapter = tiny.peft_adapter("qwen3", tmp_path / "adapter", scale=0.1)
    one, other = (
        recorded(adapter, base, tmp_path / base.name)
        for base in (tiny.hf_model("qwen3"), tiny.gguf_model("qwen3"))
    )
    for index in range(len(PROMPTS)):
        assert one.prompts[index].ref_ids == other.prompts[index].ref_ids
        ours, theirs = one.positions(index), other.positions(index)
        assert (ours.ref_logits == theirs.ref_logits).all()
    save_as_folder(open_base(tiny.gguf_model("qwen3")), tmp_path / "hf")  # what ONNX is made from
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["head_dim"] == 32
    assert open_base(tmp_path / "hf").shapes == open_base(tiny.hf_model("qwen3")).shapes


def test_weights_of_another_shape_than_the_configuration_says_are_named_at_once(
    tmp_path: Path,
) -> None:
    shutil.copytree(tiny.hf_model("llama"), tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "head_dim": 24}))
    with pytest.raises(
        BaseModelError, match=r"q_proj.weight: expected .96, 64.*got .64, 64"
    ) as caught:
        load_model(open_base(tmp_path / "hf"))
    assert "report" not in str(caught.value)
