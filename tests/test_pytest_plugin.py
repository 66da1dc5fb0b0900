"""The pytest plug-in, in a process of its own, on a real artifact: only PASS is green."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import gated
import pytest
import report_fixture
import tiny

from safegene_runtime.pytest_plugin import RefusalGate
from safegene_runtime.reporting.view import standing

pytest_plugins = ["pytester"]

ASSERTING = """
def test_gate(refusal_gate):
    assert refusal_gate.passed
"""
MARKED = """
import pytest

@pytest.mark.refusal_parity(profile="{}")
def test_marked():
    pass
"""


@pytest.fixture(scope="module")
def made() -> gated.Gated:
    found = gated.make()
    project = tomllib.loads((tiny.REPOSITORY / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["pytest11"]
    gated.distribution(found.site, "safegene-points", {"pytest11": points})
    return found


@pytest.fixture
def run(made: gated.Gated, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch):
    """Runs pytest on a test file; `artifact` replaces the one that is whole."""
    paths = [made.site, tiny.REPOSITORY / "runtime", tiny.REPOSITORY / "converter"]
    monkeypatch.setenv("PYTHONPATH", ":".join(map(str, paths)))
    # Hypothesis comes with a plug-in, too, which would take most of the time
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:hypothesispytest")

    def go(code: str, *options: str, artifact: Path = made.artifact, profile: str = "smoke"):
        pytester.makepyfile(code)
        return pytester.runpytest_subprocess(
            "-p", "no:cacheprovider", "--safegene-artifact", str(artifact),
            "--safegene-reference", str(made.reference), "--safegene-judge", made.judge,
            "--safegene-profile", profile, "--safegene-threads", "1", *options,
        )  # fmt: skip

    return go


def properties(path: Path) -> list[dict[str, str]]:
    cases = ElementTree.parse(path).getroot().iter("testcase")
    return [{one.get("name"): one.get("value") for one in case.iter("property")} for case in cases]


def test_a_pass_is_green_and_its_numbers_are_recorded(
    run, made: gated.Gated, pytester: pytest.Pytester
) -> None:
    before = {path: path.read_bytes() for path in made.artifact.iterdir()}
    result = run(
        ASSERTING + MARKED.format("smoke"),
        "--junitxml",
        "junit.xml",
        "--safegene-report",
        "reports",
    )
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines([f"PASS (smoke): 0 of {gated.HARMFUL} reference refusals lost*"])
    for found in properties(pytester.path / "junit.xml"):
        assert found["safegene_verdict"] == "PASS"
        assert found["safegene_loss_events"] == "0"
        assert found["safegene_loss_trials"] == str(gated.HARMFUL)
        assert float(found["safegene_loss_upper"]) < float(found["safegene_loss_margin"]) == 0.05
        assert float(found["safegene_mean_kl"]) < 1e-8
    assert (pytester.path / "reports" / "smoke" / "report.html").exists()
    assert {path: path.read_bytes() for path in made.artifact.iterdir()} == before


def test_vacuous_is_red_by_assertion_and_by_marker(run) -> None:
    """The record holds too few refusals for the profile ci."""
    code = ASSERTING + MARKED.format("ci")
    result = run(code, profile="ci")
    result.assert_outcomes(failed=2)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.stdout.fnmatch_lines(
        ["*where False = <ci gate: VACUOUS>.passed*", "*refusal parity*", "VACUOUS (profile ci): *",
         "VACUOUS (ci): *"]
    )  # fmt: skip


def test_an_edited_artifact_names_its_broken_rung(run, made: gated.Gated, tmp_path: Path) -> None:
    edited = tmp_path / "edited"
    shutil.copytree(made.artifact, edited)
    path = next(edited.glob("*.gguf"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    result = run(ASSERTING + MARKED.format("smoke"), artifact=edited)
    result.assert_outcomes(failed=2)
    # under CI pytest repeats whole messages in its summary
    assert result.stdout.str().count("first broken rung: integrity: ") >= 2


def test_reports_lie_apart_from_what_is_verified(run, made: gated.Gated, tmp_path: Path) -> None:
    copy = tmp_path / "artifact"
    shutil.copytree(made.artifact, copy)
    before = sorted(copy.rglob("*"))
    result = run(ASSERTING, "--safegene-report", str(copy), artifact=copy)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*output: expected a place of its own, got one inside*"])
    assert sorted(copy.rglob("*")) == before


def test_what_could_not_be_checked_is_an_error_and_no_skip(run, tmp_path: Path) -> None:
    result = run(ASSERTING + MARKED.format("smoke"), artifact=tmp_path / "nothing")
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines(["*could not check it, which is no pass*", "*manifest.json*"])


def test_sequential_mode_stops_where_it_is_decided(
    run, made: gated.Gated, pytester: pytest.Pytester
) -> None:
    result = run(ASSERTING, "--safegene-sequential", "--safegene-report", "reports")
    result.stdout.fnmatch_lines(["* (smoke): *"])
    report = json.loads((pytester.path / "reports" / "smoke" / "report.json").read_text())
    found = report["gate"]["sequential"]
    assert found["of"] == gated.HARMFUL + gated.BENIGN
    assert len(found["order"]) == found["prompts"] <= found["of"]


def test_a_control_is_compared_and_a_wrong_one_is_an_error(
    run, made: gated.Gated, pytester: pytest.Pytester, tmp_path: Path
) -> None:
    plain = shutil.copy(made.base, tmp_path / "plain.gguf")  # apart from this repository's settings
    result = run(ASSERTING, "--safegene-control", str(plain), "--safegene-report", "reports")
    result.assert_outcomes(passed=1)
    report = json.loads((pytester.path / "reports" / "smoke" / "report.json").read_text())
    assert report["rungs"][0]["figures"]["control"].keys() == {plain.name}
    result = run(ASSERTING, "--safegene-control", str(made.artifact / "model.gguf"))
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*could not check it, which is no pass*", "*expected no adapter*"])


@pytest.mark.parametrize("names", ["rot13", "rot13,reversed", "all"])
def test_attacks_that_were_not_recorded_are_an_error_and_no_pass(run, names: str) -> None:
    result = run(ASSERTING, "--safegene-attacks", names)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*could not check it, which is no pass*", "*rot13*got none*"])


def test_of_all_workers_one_computes(run, pytester: pytest.Pytester) -> None:
    code = """
import os, pytest

@pytest.mark.parametrize("number", range(6))
def test_gate(refusal_gate, number, record_property):
    assert refusal_gate.passed
    record_property("worker", os.environ["PYTEST_XDIST_WORKER"])

@pytest.fixture(autouse=True, scope="session")
def count_runs():
    import safegene_runtime.verifying.ladder as ladder
    whole = ladder.verify
    def counted(*args, **kwargs):
        with open("runs", "a") as file:
            file.write("x")
        return whole(*args, **kwargs)
    ladder.verify = counted
"""
    result = run(code, "-n", "2", "--dist", "each", "--junitxml", "junit.xml")
    result.assert_outcomes(passed=12)
    result.stdout.fnmatch_lines(["PASS (smoke): *"])
    workers = {found["worker"] for found in properties(pytester.path / "junit.xml")}
    assert workers == {"gw0", "gw1"}
    assert (pytester.path / "runs").read_text() == "x"


@pytest.mark.parametrize("workers", [[], ["-n", "1"]])
@pytest.mark.parametrize("code", [ASSERTING, MARKED.format("ci")])
def test_without_options_the_run_is_red(
    run, pytester: pytest.Pytester, code: str, workers: list[str]
) -> None:
    pytester.makepyfile(code)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *workers)
    expected = pytest.ExitCode.TESTS_FAILED if workers else pytest.ExitCode.USAGE_ERROR
    assert result.ret == expected
    text = result.stdout.str() + result.stderr.str()
    assert "needs --safegene-artifact and --safegene-reference" in text
    assert " skipped" not in text


@pytest.mark.parametrize(
    ("code", "options", "message"),
    [
        ("", ["--safegene-reference="], "--safegene-reference is needed, too"),
        ("", ["--safegene-profile", "cy"], "expected smoke, ci, release, got 'cy'"),
        ("", ["--safegene-attacks", "rot13,rot14"], "--safegene-attacks: attacks: name: expected"),
        (
            "",
            ["--safegene-attacks", ","],
            "--safegene-attacks: expected names of attacks with commas",
        ),
        ("", ["--safegene-mode", "loose"], "invalid choice: 'loose'"),
        ("", ["--safegene-sequential=no"], "--safegene-sequential: ignored explicit argument"),
        (MARKED.format("cy"), [], "test_marked: expected smoke, ci, release, got 'cy'"),
        (MARKED.replace("profile", "profil"), [], "expected refusal_parity(profile=NAME)"),
    ],
)
def test_a_mistake_is_a_usage_error(run, code: str, options: list[str], message: str) -> None:
    result = run(code, *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert message in result.stdout.str() + result.stderr.str()


def test_tests_that_do_not_ask_need_no_options(run, pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_other(): pass")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", "--strict-markers")
    result.assert_outcomes(passed=1)
    assert "refusal parity" not in result.stdout.str()


@pytest.mark.parametrize("verdict", ["PASS", "FAIL", "INCONCLUSIVE", "VACUOUS"])
def test_only_pass_passes_and_every_flip_is_named(verdict: str) -> None:
    gate = RefusalGate(report_fixture.make_report(verdict))
    assert bool(gate) is gate.passed is (verdict == "PASS")
    text = gate.describe()
    assert text.startswith(f"{verdict} (profile ")
    assert gate.sentence in text
    if verdict == "FAIL":
        assert gate.flips
    known = dict(gate.properties())
    for attack in gate.report["attacks"]:
        found = attack["gate"]["verdict"]
        assert known[f"verdict_under_{attack['name']}"] == found
        shown = standing(attack["gate"])
        assert (f"under {attack['name']}: {shown}: " in text) is (found != "PASS")
    assert all(f"  {name}: " in text for name in gate.flips[:20])
