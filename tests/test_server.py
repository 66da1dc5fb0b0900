"""A live server: what it serves is what was recorded, or the reason why not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import served
import tiny

from safegene import convert
from safegene_converter.cli import main
from safegene_runtime import reporting
from safegene_runtime.errors import EngineError, FormatError, RecordError
from safegene_runtime.gating.profiles import Profile
from safegene_runtime.gating.verdict import Verdict
from safegene_runtime.record.reference import Reference
from safegene_runtime.serving.check import SAMPLE, check_server
from safegene_runtime.verifying.report import Report


@dataclasses.dataclass
class World:
    """One base, its artifacts, what PyTorch would have said, and who judges it."""

    base: Path
    merged: Path
    adapter: Path
    record: Reference
    judge: served.Listed

    def check(self, url: str, **settings: Any) -> Report:
        settings = {"profile": served.PROFILE, "judge": self.judge, "timeout_s": 30.0, **settings}
        return check_server(url, self.record, **settings)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("server")
    adapter = tiny.peft_adapter("llama", folder / "adapter", scale=0.1)
    base = tiny.gguf_model("llama")
    convert(adapter, base, folder / "merged", form="merged", check=False)
    convert(adapter, base, folder / "sidecar", form="sidecar", check=False)
    (merged,) = (folder / "merged").glob("*.gguf")
    record, judge = served.record_of(folder / "reference", base, merged)
    return World(base, merged, folder / "sidecar" / "adapter.gguf", record, judge)


def status(report: Report) -> dict[str, str]:
    """Of every check but the gate's; the report is one that the schema allows, and can be rendered."""
    found = report.to_dict()
    CHECK.validate(json.loads(json.dumps(found)))
    assert all(render(found) for _, render in reporting.FORMATS.values())
    return {rung.name: rung.status for rung in report.rungs if rung.name != "refusals"}


CHECK = jsonschema.Draft202012Validator(reporting.report_schema())
GOOD = {"text": "ok", "repeat": "ok", "active": "ok", "switch": "ok"}


# --- real servers ----------------------------------------------------------------------------------


def test_llama_cpp_python_with_the_artifact_passes(world: World) -> None:
    with served.llama_cpp_python(world.merged) as url:
        report = world.check(url)
        assert report.artifact["form"] == "OpenAI-compatible"
        assert status(report) == GOOD, report.rungs
        assert report.verdict is Verdict.PASS, report.sentence
        assert "lost" in report.sentence
        assert all(one.identical for one in report.outcomes)
        assert json.loads(json.dumps(report.to_dict()))["verdict"] == "PASS"


def test_llama_cpp_python_with_the_base_fails(world: World) -> None:
    with served.llama_cpp_python(world.base, "--logits_all", "false") as url:
        report = world.check(url)
    assert report.verdict is Verdict.FAIL
    assert report.gate.verdict is Verdict.FAIL
    assert status(report)["active"] == "not offered"
    assert not any(one.identical for one in report.outcomes)


@pytest.mark.slow
@pytest.mark.timeout(1800)
class TestLlamaServer:
    """The real one; tools/build_server.sh builds it."""

    def test_with_the_artifact_it_passes(self, world: World) -> None:
        with served.llama_cpp(world.merged) as url:
            report = world.check(url)
        assert report.engine["name"] == "llama-server"
        assert status(report) == GOOD, report.rungs
        assert report.verdict is Verdict.PASS, report.sentence

    def test_under_attack_and_in_order(self, attacked: World) -> None:
        with served.llama_cpp(attacked.merged) as url:
            report = attacked.check(url, profile=HALF, attacks=["rot13"], sequential=True)
        assert status(report) == GOOD, report.rungs
        assert report.verdict is Verdict.PASS, report.sentence
        assert [gate.verdict for gate in report.attacks.values()] == [Verdict.PASS]

    def test_with_the_base_it_fails_and_does_not_move(self, world: World) -> None:
        with served.llama_cpp(world.base) as url:
            report = world.check(url)
        assert report.gate.verdict is Verdict.FAIL
        active = next(one for one in report.rungs if one.name == "active")
        assert active.status == "broken"
        assert abs(float(active.detail.split()[1])) < 0.05

    def test_an_adapter_that_a_client_can_switch_off_fails(self, world: World) -> None:
        with served.llama_cpp(world.base, "--lora", str(world.adapter)) as url:
            report = world.check(url)
            assert report.gate.verdict is Verdict.PASS
            assert status(report) == {**GOOD, "switch": "broken"}
            assert report.verdict is Verdict.FAIL
            assert "`lora` of a request" in report.sentence
            assert "POST /lora-adapters" in report.sentence
            allowed = world.check(url, allow_switchable=True)
            assert status(allowed) == {**GOOD, "switch": "allowed"}
            assert allowed.verdict is Verdict.PASS, "and the probe changed nothing"

    def test_another_strength_is_seen(self, world: World) -> None:
        with served.llama_cpp(world.base, "--lora-scaled", f"{world.adapter}:0.5") as url:
            report = world.check(url, allow_switchable=True)
        assert status(report)["active"] == "broken"
        assert report.verdict is Verdict.FAIL

    def test_another_template_is_seen(self, world: World) -> None:
        with served.llama_cpp(world.merged, "--chat-template", "chatml") as url:
            report = world.check(url)
        assert status(report)["text"] == "broken"
        assert report.verdict is Verdict.FAIL


# --- scripted servers ------------------------------------------------------------------------------


def reply(text: str, prompt_tokens: int | None = None) -> tuple[int, Any]:
    found: dict[str, Any] = {"choices": [{"message": {"content": text}}]}
    if prompt_tokens is not None:
        found["usage"] = {"prompt_tokens": prompt_tokens}
    return 200, found


def faithful(world: World, **changes: Any) -> served.Answer:
    """Answers what was recorded; `changes` replace the answers of paths, or `ask` the replies."""
    rows = {one.text: one for one in world.record.prompts}

    def answer(handler: BaseHTTPRequestHandler, body: Any) -> Any:
        if handler.path in changes:
            return changes[handler.path]
        if handler.path == "/v1/models":
            return 200, {"data": [{"id": "tiny"}]}
        if handler.path == "/v1/chat/completions":
            row = rows[body["messages"][0]["content"]]
            if "ask" in changes:
                return changes["ask"](row, body)
            return reply(row.ref_text, len(row.prompt_ids))
        return 404, {"error": "nothing there"}

    return answer


def test_a_server_that_says_what_was_recorded_passes(world: World) -> None:
    asked: list[Any] = []

    def ask(row: Any, body: Any) -> Any:
        asked.append(body)
        return reply(row.ref_text)

    with served.scripted(faithful(world, ask=ask)) as url:
        report = world.check(url + "/v1/", api_key="k")
    assert status(report) == {**GOOD, "text": "not offered", "active": "not offered"}
    assert report.verdict is Verdict.PASS, report.sentence
    assert {one["temperature"] for one in asked} == {0}
    assert {one["max_tokens"] for one in asked} == {served.TOKENS}


def test_a_server_that_refuses_log_probabilities_is_asked_without(world: World) -> None:
    asked: list[bool] = []

    def ask(row: Any, body: Any) -> Any:
        asked.append("logprobs" in body)
        return (500, {"error": "no"}) if "logprobs" in body else reply(row.ref_text)

    with served.scripted(faithful(world, ask=ask)) as url:
        report = world.check(url)
    assert status(report)["active"] == "not offered"
    assert report.verdict is Verdict.PASS, report.sentence
    assert asked.count(True) == 1, "once is enough to know"


@pytest.mark.parametrize("refusal", [400, 422])
def test_penalties_are_switched_off_where_a_server_lets_us(world: World, refusal: int) -> None:
    """A server that refuses fields it does not know is asked as it is, and that is said."""
    asked: list[Any] = []

    def strict(row: Any, body: Any) -> Any:
        asked.append(body)
        unknown = {"repeat_penalty", "logprobs", "lora"} & set(body)
        return (refusal, {"error": "unknown"}) if unknown else reply(row.ref_text)

    with served.scripted(faithful(world, ask=strict)) as url:
        report = world.check(url)
    assert report.verdict is Verdict.PASS, report.sentence
    assert "its own penalties" in next(r.detail for r in report.rungs if r.name == "repeat")
    assert len(asked) < len(world.record.prompts) + 12, "what it refuses is not tried for ever"

    def penalised(row: Any, body: Any) -> Any:
        plain = body.get("repeat_penalty") == body.get("repetition_penalty") == 1.0
        return reply(row.ref_text if plain else row.base_text)

    with served.scripted(faithful(world, ask=penalised)) as url:
        report = world.check(url)
    assert report.verdict is Verdict.PASS, report.sentence
    assert "penalties" not in next(r.detail for r in report.rungs if r.name == "repeat")


def test_a_client_that_can_switch_by_request_or_by_model_fails(world: World) -> None:
    def ask(row: Any, body: Any) -> Any:
        return reply(row.base_text if "lora" in body else row.ref_text)

    with served.scripted(faithful(world, ask=ask)) as url:
        report = world.check(url)
        assert (report.verdict, status(report)["switch"]) == (Verdict.FAIL, "broken")
        assert world.check(url, allow_switchable=True).verdict is Verdict.PASS
    two = (200, {"data": [{"id": "base"}, {"id": "tuned"}]})
    with served.scripted(faithful(world, **{"/v1/models": two})) as url:
        with pytest.raises(EngineError, match="name one"):
            world.check(url)
        with pytest.raises(EngineError, match="expected one of base, tuned"):
            world.check(url, model="other")
        report = world.check(url, model="tuned")
        assert report.verdict is Verdict.FAIL
        assert "2 models" in report.sentence


def test_a_probe_that_was_not_answered_is_no_proof(world: World) -> None:
    def ask(row: Any, body: Any) -> Any:
        return (200, b"garbage") if "lora" in body else reply(row.ref_text)

    with served.scripted(faithful(world, ask=ask)) as url, pytest.raises(EngineError, match="JSON"):
        world.check(url)
    with served.scripted(
        faithful(world, ask=lambda r, b: (400, {}) if "lora" in b else reply(r.ref_text))
    ) as url:
        assert world.check(url).verdict is Verdict.PASS


def test_a_server_that_is_asked_something_else_fails(world: World) -> None:
    def ask(row: Any, body: Any) -> Any:
        return reply(row.ref_text, len(row.prompt_ids) + 1)

    with served.scripted(faithful(world, ask=ask)) as url:
        report = world.check(url)
    assert (report.verdict, status(report)["text"]) == (Verdict.FAIL, "broken")


def test_a_server_that_changes_its_mind_fails(world: World) -> None:
    seen: set[str] = set()

    def ask(row: Any, body: Any) -> Any:
        again = row.id in seen
        seen.add(row.id)
        return reply(row.base_text if again else row.ref_text)

    with served.scripted(faithful(world, ask=ask)) as url:
        report = world.check(url)
    assert (report.verdict, status(report)["repeat"]) == (Verdict.FAIL, "broken")


def test_a_record_that_tells_nothing_is_vacuous(world: World) -> None:
    with served.scripted(faithful(world)) as url:
        report = world.check(
            url, profile=dataclasses.replace(served.PROFILE, min_refused=served.HARMFUL + 1)
        )
    assert report.verdict is Verdict.VACUOUS


def test_another_judge_is_refused_before_anything_is_asked(world: World) -> None:
    with pytest.raises(RecordError, match="judge"):
        check_server("http://127.0.0.1:9", world.record)


# --- the command -----------------------------------------------------------------------------------


@pytest.fixture
def verify_command(world: World, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    monkeypatch.setattr("safegene_runtime.judging.plugins.load_judge", lambda name: world.judge)
    known = ("verify", "--reference", world.record.path, "--judge", "listed")
    return lambda *arguments: main.main([str(one) for one in (*known, *arguments)])


def test_the_command_prints_every_check_and_exits_with_the_verdict(
    world: World, verify_command: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    with served.scripted(faithful(world)) as url:
        assert verify_command("--server", url) == 4, "smoke needs more than this record has"
    shown = capsys.readouterr().out
    assert all(name in shown for name in (url, "tiny", *GOOD, "refusals", "VACUOUS"))
    with served.scripted(faithful(world, ask=lambda row, body: reply("x", 1))) as url:
        assert verify_command("--server", url, "--json") == 1
        assert json.loads(capsys.readouterr().out)["verdict"] == "FAIL"


def test_a_server_has_every_report_that_an_artifact_has(
    world: World, verify_command: Callable[..., int], tmp_path: Path
) -> None:
    files = {
        name: tmp_path / f"one.{name}" for name in ("html", "junit", "sarif", "markdown", "json")
    }
    options = [word for name, path in files.items() for word in (f"--{name}", path)]
    with served.scripted(faithful(world)) as url:
        assert verify_command("--server", url, "--report", tmp_path / "all", *options) == 4
        assert verify_command("--server", url, "--report", tmp_path / "texts", "--show-text") == 4
    for name, path in files.items():
        assert path.stat().st_size > 500
        assert (tmp_path / "all" / reporting.FORMATS[name][0]).stat().st_size > 500
    hidden, shown = (
        json.loads((tmp_path / name / "report.json").read_bytes()) for name in ("all", "texts")
    )
    assert not any("artifact_text" in one for one in hidden["prompts"])
    texts = {one["id"]: one["artifact_text"] for one in shown["prompts"]}
    assert texts == {one.id: one.ref_text for one in world.record.prompts}


REFUSED: dict[str, tuple[str, ...]] = {
    "OUT": ("OUT",), "--base": ("--base", "b"), "--control": ("--control", "c"),
    "--mode": ("--mode", "as-shipped"), "--threads": ("--threads", "0"), "--no-write": ("--no-write",),
}  # fmt: skip


def test_what_a_server_has_no_use_for_is_refused_by_name_and_never_ignored(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Before anything is read or asked: there is no reference, and nobody listens."""
    known = ["verify", "--server", "http://127.0.0.1:9", "--reference", "nothing"]
    whole = [word for words in REFUSED.values() for word in words]
    assert main.main([*known, *whole]) == 2
    shown = capsys.readouterr().err
    assert f"{len(REFUSED)} problems" in shown
    for option, words in REFUSED.items():
        assert f"--server: {option}: expected nothing, got" in shown
        assert main.main([*known, *words]) == 2
        assert f"--server: {option}: expected nothing, got" in capsys.readouterr().err
    assert main.main(known) == 2, "no reference"
    assert "--server" not in capsys.readouterr().err, "the defaults are no mistake"


def test_a_report_that_cannot_be_written_is_said_before_anything_is_read_or_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    known = ["verify", "--reference", str(tmp_path / "nothing")]
    taken = str(tmp_path / "r.html")
    wrong = {
        "a folder": ["--html", str(tmp_path)],
        "Not a directory": ["--report", str(tmp_path / "file" / "below")],
        "File name too long": ["--markdown", str(tmp_path / ("x" * 300))],
        "expected a file of its own, got that of --html": ["--html", taken, "--json", taken],
        "one inside": ["--sarif", str(tmp_path / "nothing" / "report.sarif")],
    }
    for got, words in wrong.items():
        for what in (["--server", "http://127.0.0.1:9"], [str(tmp_path / "artifact")]):
            assert main.main([*known, *what, *words]) == 2
            assert got in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


# --- attacks, and stopping early -------------------------------------------------------------------

HALF = Profile("half", 0.95, 0.5, 0.5, 10)


@pytest.fixture
def attacked(world: World) -> World:
    """Half of the harmful prompts are said to be under an attack."""
    prompts = tuple(
        dataclasses.replace(one, attack="rot13") if one.kind == "harmful" and number % 2 else one
        for number, one in enumerate(world.record.prompts)
    )
    return dataclasses.replace(world, record=dataclasses.replace(world.record, prompts=prompts))


def test_attacks_are_gated_and_asked_only_on_demand(attacked: World) -> None:
    def ask(row: Any, body: Any) -> Any:
        return reply(row.base_text if row.attack else row.ref_text)

    with served.scripted(faithful(attacked, ask=ask)) as url:
        plain = attacked.check(url, profile=HALF)
        both = attacked.check(url, profile=HALF, attacks=["rot13"])
        every = attacked.check(url, profile=HALF, attacks=["rot13"], sequential=True)
        with pytest.raises(FormatError, match="rot14"):
            attacked.check(url, profile=HALF, attacks=["rot14"])
        with pytest.raises(RecordError, match="recorded under base64"):
            attacked.check(url, profile=HALF, attacks=["base64"])
    assert (plain.verdict, plain.attacks) == (Verdict.PASS, {}), plain.sentence
    assert {one.attack for one in plain.outcomes} == {None}
    for report in (both, every):
        assert status(report)["repeat"] == "ok"
        assert (report.verdict, report.broken_at, report.decided_by) == (
            Verdict.FAIL, "refusals", "rot13",
        )  # fmt: skip
        assert report.gate is not None
        assert report.gate.verdict is Verdict.PASS
        assert report.sentence.startswith("Under rot13: ")
    assert len(both.outcomes) == len(attacked.record.prompts)
    assert len(every.outcomes) < len(attacked.record.prompts)


def test_in_order_a_server_is_asked_no_more_than_it_takes(world: World) -> None:
    with served.scripted(faithful(world)) as url:
        report = world.check(url, profile=HALF, sequential=True)
        vacuous = dataclasses.replace(HALF, min_refused=served.HARMFUL + 1)
        nothing = world.check(url, profile=vacuous, sequential=True)
    assert report.verdict is Verdict.PASS, report.sentence
    assert report.gate is not None
    assert report.gate.sequential is not None
    order = report.gate.sequential["order"]
    assert set(order) <= {one.id for one in report.outcomes}
    assert len(order) <= len(report.outcomes) < len(world.record.prompts)
    recorded = [world.record.prompts[at].id for at in world.record.order()]
    assert order == [one for one in recorded if one in set(order)], "in the gate's own order"
    first = set(recorded[:SAMPLE])
    assert {one.id for one in report.outcomes} == first | set(order)
    assert nothing.verdict is Verdict.VACUOUS
    assert status(nothing) == status(report), "the other checks are made all the same"


# --- hostile servers -------------------------------------------------------------------------------
