"""Reports for machines and pull requests: schema-valid, complete, and quiet about texts."""

from __future__ import annotations

import argparse
import copy
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import report_fixture
from lxml import etree
from report_fixture import HOSTILE, VARIANTS, make_report
from rich.console import Console
from scipy import stats

from safegene_converter.cli.report_options import report_targets
from safegene_converter.cli.tables import show_report
from safegene_runtime import reporting
from safegene_runtime.errors import OutputError
from safegene_runtime.gating.gate import PROFILES, Pair, decide_by_attack
from safegene_runtime.gating.statistics import clopper_pearson_lower, clopper_pearson_upper
from safegene_runtime.gating.verdict import Verdict
from safegene_runtime.reporting import markdown, view
from safegene_runtime.reporting.junit import outcome
from safegene_runtime.verifying.report import Report

SCHEMAS = Path(__file__).parent / "data" / "schemas"
XSD = etree.XMLSchema(etree.parse(SCHEMAS / "junit-xunit2.xsd"))
SARIF = json.loads((SCHEMAS / "sarif-2.1.0-subset.json").read_text(encoding="utf-8"))
REPORTS = {name: make() for name, make in VARIANTS.items()}
every_report = pytest.mark.parametrize("report", REPORTS.values(), ids=REPORTS)
CHECK = jsonschema.Draft202012Validator(reporting.report_schema())


def _cases(report: dict[str, Any]) -> dict[str, etree._Element]:
    root = etree.fromstring(reporting.render_junit(report).encode())
    return {
        f"{case.getparent().get('name')}.{case.get('name')}": case for case in root.iter("testcase")
    }


def _state(case: etree._Element) -> str:
    found = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
    return found[0] if found else "passed"


# --- report.json -----------------------------------------------------------------------------------


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(reporting.report_schema())


@every_report
def test_a_report_is_valid_and_survives_json(report: dict[str, Any]) -> None:
    written = reporting.render_json(report).encode("utf-8", "backslashreplace")
    assert json.loads(written) == report
    CHECK.validate(report)


def _break(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(report: dict[str, Any]) -> None:
        place: Any = report
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for parent in parents:
            place = place[parent]
        place[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("verdict", "parity"), ("exit_code", 0), ("exit_code", 2), ("format_version", 2), ("surprise", 1),
        ("gate.loss.upper", 1.5), ("gate.loss.events_worst", -1), ("prompts.0.reference", "maybe"),
        ("prompts.0.text", "a prompt"), ("rungs.0.status", "skipped"), ("reference.sha256", "abc"),
        ("gate.contrast", None), ("bounds.top1", 98.4), ("kl_by_position.0", "small"),
    ],
)  # fmt: skip
def test_the_schema_refuses(path: str, value: Any) -> None:
    report = copy.deepcopy(REPORTS["fail"])
    _break(path, value)(report)
    assert not CHECK.is_valid(report)


def test_the_schema_wants_every_part() -> None:
    for key in REPORTS["pass"]:
        assert not CHECK.is_valid({k: v for k, v in REPORTS["pass"].items() if k != key}), key


@pytest.mark.parametrize(
    ("path", "value"),
    [("broken_at", "logits"), ("gate", None), ("exit_code", 1), ("rungs.5.status", "undecided")],
)
def test_a_pass_has_nothing_broken(path: str, value: Any) -> None:
    report = copy.deepcopy(REPORTS["pass"])
    _break(path, value)(report)
    assert not CHECK.is_valid(report)


@every_report
def test_every_bound_can_be_recomputed_from_the_counts(report: dict[str, Any]) -> None:
    gates = [attack["gate"] for attack in report["attacks"]]
    for gate in [*gates, *([report["gate"]] if report["gate"] else [])]:
        for key in view.RATES:
            rate = gate[key]
            sure = rate["confidence"]
            upper = clopper_pearson_upper(rate["events_worst"], rate["trials_worst"], sure)
            lower = clopper_pearson_lower(rate["events_best"], rate["trials_best"], sure)
            assert rate["upper"] == pytest.approx(upper)
            assert rate["lower"] == pytest.approx(lower)


def test_a_number_that_json_has_not_is_refused() -> None:
    report = make_report(attacks=False, static=False)
    report["seconds"]["total"] = float("nan")
    with pytest.raises(ValueError, match="not JSON compliant"):
        reporting.render_json(report)


# --- how numbers look ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "up", "text"),
    [
        (0.0, False, "0"), (1.0, False, "100"), (0.0073, False, "0.73"), (0.05, False, "5"),
        (0.00729, True, "0.73"), (0.00731, True, "0.74"), (0.00731, False, "0.73"),
        (0.99999, False, "99.99"), (1e-9, False, "0.01"), (0.5, True, "50"), (0.02, True, "2"),
    ],
)  # fmt: skip
def test_a_bound_is_rounded_so_that_it_still_holds(rate: float, up: bool, text: str) -> None:
    assert view.percent(rate, up=up) == f"{text}\u00a0%"


def test_a_change_is_named_by_kind_and_direction() -> None:
    def name(kind: str, before: str, after: str) -> str:
        return view.change({"kind": kind, "reference": before, "artifact": after})

    assert name("harmful", "refuse", "comply") == "lost"
    assert name("harmful", "refuse", "uncertain") == "lost"
    assert name("harmful", "refuse", "degenerate") == "lost"
    assert name("harmful", "comply", "refuse") == "gained"
    assert name("benign", "comply", "refuse") == "over-refused"
    assert name("benign", "refuse", "comply") == "released"
    assert name("benign", "comply", "uncertain") == "other"
    assert name("harmful", "refuse", "refuse") == "same"
    assert name("harmful", "refuse", "not run") == "not run"


def test_flips_are_counted_as_the_gate_counts_them() -> None:
    for name in ("fail", "pass", "vacuous"):
        report = REPORTS[name]
        plain = {"prompts": [one for one in report["prompts"] if one["attack"] is None]}
        found = [view.change(one) for one in view.flips(plain)]
        assert found.count("lost") == report["gate"]["flips"]["losses"]
        assert found.count("over-refused") == report["gate"]["flips"]["over_refusals"]
        matrix = view.matrix(report["prompts"], "harmful")
        assert matrix["refuse", "comply"] == report["gate"]["flips"]["losses"]


# --- JUnit -----------------------------------------------------------------------------------------


@every_report
def test_junit_obeys_its_schema_and_adds_up(report: dict[str, Any]) -> None:
    root = etree.fromstring(reporting.render_junit(report).encode())
    XSD.assertValid(root)
    totals = dict.fromkeys(("tests", "failures", "errors"), 0)
    for suite in root:
        states = [_state(case) for case in suite.iter("testcase")]
        assert int(suite.get("tests")) == len(states)
        assert int(suite.get("failures")) == states.count("failure")
        assert int(suite.get("errors")) == states.count("error")
        assert int(suite.get("skipped")) == states.count("skipped")
        for key in totals:
            totals[key] += int(suite.get(key))
    assert totals == {key: int(root.get(key)) for key in totals}


@every_report
def test_junit_is_green_only_on_pass(report: dict[str, Any]) -> None:
    cases = _cases(report)
    want = {"PASS": "passed", "FAIL": "failure"}.get(report["verdict"], "error")
    assert _state(cases["verdict.verdict"]) == want
    red = [name for name, case in cases.items() if _state(case) in ("failure", "error")]
    assert bool(red) == (report["verdict"] != "PASS"), red


def test_junit_skips_what_was_not_reached() -> None:
    cases = _cases(REPORTS["fail-logits"])
    assert {name: _state(case) for name, case in cases.items()} == {
        "integrity.integrity": "passed", "text.text": "passed", "static.static": "passed",
        "active.active": "passed", "logits.logits": "failure", "refusals.refusals": "skipped",
        "verdict.verdict": "failure",
    }  # fmt: skip


def test_junit_has_a_case_for_each_rate_and_attack() -> None:
    cases = _cases(REPORTS["fail"])
    assert _state(cases["refusals.loss"]) == "failure"
    assert _state(cases["refusals.contrast"]) == "passed"
    assert _state(cases["attacks.prefix-injection"]) == "failure"
    assert _state(cases["attacks.base64"]) == "passed"
    skipped = cases["attacks.translate-de"]
    assert _state(skipped) == "skipped", "a PASS stays green"
    assert skipped.find("skipped").get("message").startswith("not decided (10 refused, 80 needed)")
    properties = {
        one.get("name"): one.get("value") for one in cases["refusals.loss"].iter("property")
    }
    loss = REPORTS["fail"]["gate"]["loss"]
    assert float(properties["upper"]) == loss["upper"]
    assert int(properties["events_worst"]) == loss["events_worst"]
    assert _state(_cases(REPORTS["vacuous"])["refusals.contrast"]) == "error"
    lost = [p["id"] for p in view.flips(REPORTS["fail"]) if view.change(p) == "lost"]
    assert all(name in cases["refusals.loss"].find("failure").get("message") for name in lost)


def test_a_status_that_nobody_knows_is_an_error() -> None:
    assert outcome("fine, thanks") == "error"
    assert [outcome(str(verdict)) for verdict in Verdict] == ["passed", "failure", "error", "error"]


# --- SARIF -----------------------------------------------------------------------------------------


@every_report
def test_sarif_obeys_its_schema(report: dict[str, Any]) -> None:
    log = json.loads(reporting.render_sarif(report))
    jsonschema.Draft202012Validator(SARIF).validate(log)
    (run,) = log["runs"]
    rules = [rule["id"] for rule in run["tool"]["driver"]["rules"]]
    for result in run["results"]:
        assert rules[result["ruleIndex"]] == result["ruleId"]
    prints = [result["partialFingerprints"]["safegene/v1"] for result in run["results"]]
    assert len(set(prints)) == len(prints), "GitHub would merge them"


def test_sarif_names_what_broke_and_every_flip() -> None:
    (run,) = json.loads(reporting.render_sarif(REPORTS["fail"]))["runs"]
    levels = {result["ruleId"]: result["level"] for result in run["results"]}
    assert levels["verdict/FAIL"] == levels["rung/refusals"] == levels["flip/lost"] == "error"
    named = [r["locations"][0]["logicalLocations"][0]["fullyQualifiedName"]
             for r in run["results"] if r["ruleId"].startswith("flip/")]  # fmt: skip
    assert named == [prompt["id"] for prompt in view.flips(REPORTS["fail"])]
    assert run["invocations"][0]["exitCode"] == 1


def test_sarif_is_loud_about_everything_but_pass() -> None:
    for name, report in REPORTS.items():
        (run,) = json.loads(reporting.render_sarif(report))["runs"]
        found = [r["ruleId"] for r in run["results"] if r["ruleId"].startswith("verdict/")]
        assert found == ([] if report["verdict"] == "PASS" else [f"verdict/{report['verdict']}"]), (
            name
        )


# --- Markdown --------------------------------------------------------------------------------------


@every_report
def test_markdown_begins_with_the_verdict_and_quotes_the_sentence(report: dict[str, Any]) -> None:
    lines = reporting.render_markdown(report).splitlines()
    assert re.match(rf"## \S+ {report['verdict']}: ", lines[0])
    assert lines[2].startswith("> **")
    if HOSTILE not in report["sentence"]:
        assert report["sentence"] in lines[2]


def test_markdown_lists_every_flip_up_to_its_limit() -> None:
    report = copy.deepcopy(REPORTS["fail"])
    text = reporting.render_markdown(report)
    changed = view.flips(report)
    assert sum(f"`{prompt['id']}`" in text for prompt in changed) == 50 < len(changed)
    assert f"{len(changed) - 50} more are in the JSON and HTML reports." in text
    assert "Under attack" in text
    assert "Under attack" not in reporting.render_markdown(REPORTS["inconclusive"])


def test_an_attack_that_nothing_can_be_said_about_is_named_in_every_report() -> None:
    report = REPORTS["pass"]
    assert report["not_decided"] == ["translate-de"]
    gate = next(one["gate"] for one in report["attacks"] if one["name"] == "translate-de")
    why = gate["not_decided"]
    assert re.fullmatch(r"\d+ refused, 80 needed", why)
    for name in ("json", "junit", "markdown", "html"):
        made = reporting.FORMATS[name][1](report).replace("\\", "")
        assert "translate-de" in made, name
        assert why in made, name
        assert "not decided" in made or name == "json", name


@every_report
def test_wilsons_and_tangos_intervals_are_shown(report: dict[str, Any]) -> None:
    gate = report["gate"]
    shown = [reporting.FORMATS[name][1](report) for name in ("markdown", "html")]
    for page in shown:
        assert ("(Wilson)" in page) is ("(Tango)" in page) is (gate is not None)
    if gate is None:
        return
    low, high = stats.binomtest(
        gate["loss"]["events_worst"], gate["loss"]["trials_worst"]
    ).proportion_ci(0.95, "wilson")
    text = dict(view.intervals(gate))["Refusals lost (Wilson)"]
    assert text == f"{view.percent(low)} to {view.percent(high, up=True)}"
    assert all(text in page for page in shown)


def test_no_report_takes_the_place_of_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (
        "b-00001-of-00002.gguf",
        "b-00002-of-00002.gguf",
        "judge.onnx",
        "config.json",
        "list.txt",
    )
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / names[0])
    monkeypatch.chdir(tmp_path)
    inputs = [Path("folder")]
    for judge in (f"onnx:{tmp_path / names[2]}", "mine:list.txt"):
        inputs += reporting.read_files(judge, tmp_path / names[0])
    for taken in (*names, "./link", "tokenizer.json", "folder/r.html", "folder/deep/r.html"):
        with pytest.raises(OutputError, match=r"--html: output: expected a .* of its own"):
            reporting.check_places({"--html": Path(taken)}, inputs)
    reporting.check_places({"--html": Path("r.html"), "--junit": Path("b.gguf")}, inputs)
    with pytest.raises(OutputError) as caught:
        reporting.check_places(
            {"--html": Path("x"), "--junit": Path("x"), "--sarif": Path("folder")}, inputs
        )
    assert len(caught.value.problems) == 3
    assert reporting.read_files(None, None) == reporting.read_files("mine:text", None) == []


def test_each_artifact_has_a_report_folder_of_its_own(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    labels = ["art", "../art", "./art", "ART", "..", "a/b", "a-b"]
    arguments = argparse.Namespace(
        report=Path("R"), json=None, artifact=[], reference=Path("ref"), base=None, control=None,
        judge=None,
        html=None, junit=None, sarif=None, markdown=None,
    )  # fmt: skip
    found = [folder for (folder,) in report_targets(arguments, labels).values()]
    assert len({str(folder).casefold() for folder in found}) == len(labels)
    assert all(isinstance(one, Path) and one.parent == Path("R") for one in found)
    assert found[:2] == [Path("R/art"), Path("R/art-2")]


def test_the_terminal_names_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    pairs = [
        Pair(f"h{n}@{attack}", "harmful", "-", f"h{n}", attack, "refuse", "refuse", "comply")
        for attack, count in ((None, 118), ("base64", 118), ("translate-de", 9))
        for n in range(count)
    ]
    pairs += [
        Pair(f"b{n}", "benign", "-", f"b{n}", None, "comply", "comply", "comply") for n in range(72)
    ]
    plain, under = decide_by_attack(pairs, PROFILES["smoke"])
    made = Report(
        verdict=Verdict.PASS, broken_at=None, rungs=(), outcomes=(), gate=plain, attacks=under,
        profile=PROFILES["smoke"], mode="strict", precision="f16", bounds=None, artifact={}, reference={},
        engine=None, static=None, kl_by_position=(), seconds={"total": 1.0, "engine": 1.0},
    )  # fmt: skip
    show_report(made, Console(width=300), texts=False)
    shown = capsys.readouterr().out
    assert "not decided (9 refused, 60 needed)" in shown
    assert "Not decided under translate-de (9 refused, 60 needed)." in shown
    assert made.to_dict()["not_decided"] == ["translate-de"]


def test_markdown_tables_keep_their_columns_whatever_a_file_holds() -> None:
    width = 0
    for line in reporting.render_markdown(REPORTS["hostile"]).splitlines():
        if line.startswith("|---"):
            width = line.count("|")
        elif line.startswith("| ") and width:
            assert len(re.findall(r"(?<!\\)\|", line)) == width, line
        elif not line.startswith("|"):
            width = 0


@pytest.mark.parametrize("mark", list("\\`*_{}[]|~!#"))
def test_no_mark_of_a_text_passes_for_one_of_ours(mark: str) -> None:
    """Neither before digits and a semicolon, as in the entities that escaping writes."""
    if mark != "#":
        assert markdown._text(f"a {mark}1; b") == f"a \\{mark}1; b"
    assert f"\\{mark}x" in markdown._text(f"{mark}x")
    assert "&#64;" in markdown._text("@")


def test_markdown_has_no_markup_of_a_file_outside_code() -> None:
    text = reporting.render_markdown(REPORTS["hostile"])
    bare = re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", text)
    for word in ("<script", "<img", "@you", r"(?<!\\)\](?=\()", "://x"):
        assert not re.search(word, bare), word
    assert "\u202e" not in text
    assert "\x1b" not in text


# --- all of them -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["junit", "sarif", "markdown"])
def test_replies_are_only_in_json_and_html(name: str) -> None:
    report = make_report("FAIL", texts=True, prompts=60)
    for prompt in report["prompts"]:
        prompt["reference_text"] = prompt["artifact_text"] = "a reply nobody should find"
    made = {name: render(report) for name, (_, render) in reporting.FORMATS.items()}
    assert "nobody should find" not in made[name]
    assert "nobody should find" in made["json"]
    assert "nobody should find" in made["html"]


@every_report
def test_a_report_is_a_function_of_its_dict_and_leaves_it_alone(report: dict[str, Any]) -> None:
    before = copy.deepcopy(report)
    for _, render in reporting.FORMATS.values():
        assert render(report) == render(report)
    assert report == before


def test_a_folder_gets_every_format(tmp_path: Path) -> None:
    out = tmp_path / "new" / "reports"
    written = reporting.write_reports(REPORTS["hostile"], out)
    assert sorted(os.listdir(out)) == [
        "junit.xml", "report.html", "report.json", "report.md", "report.sarif",
    ]  # fmt: skip
    assert set(written.values()) == {out / name for name in os.listdir(out)}
    assert json.loads((out / "report.json").read_bytes()) == REPORTS["hostile"]


def test_chosen_formats_go_where_they_were_sent(tmp_path: Path) -> None:
    reporting.write_reports(REPORTS["pass"], {"markdown": tmp_path / "summary.md"})
    assert os.listdir(tmp_path) == ["summary.md"]


def test_a_format_nobody_knows_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"format: expected json or junit .* got pdf"):
        reporting.write_reports(REPORTS["pass"], {"json": tmp_path / "a", "pdf": tmp_path / "b"})
    assert not os.listdir(tmp_path)


def test_a_report_that_cannot_be_rendered_leaves_the_old_ones(tmp_path: Path) -> None:
    reporting.write_reports(REPORTS["pass"], tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    broken = copy.deepcopy(REPORTS["fail"])
    broken["seconds"]["total"] = float("inf")
    with pytest.raises(ValueError, match="not JSON compliant"):
        reporting.write_reports(broken, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_fixture_covers_every_verdict_and_rung() -> None:
    assert {report["verdict"] for report in REPORTS.values()} == set(map(str, Verdict))
    assert all(
        [rung["name"] for rung in report["rungs"]] == list(report_fixture.RUNGS)
        for report in REPORTS.values()
    )
