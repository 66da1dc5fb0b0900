"""Refusal parity as a fixture of pytest (entry point group `pytest11`).

    pytest --safegene-artifact OUT --safegene-reference REFERENCE

    def test_the_shipped_file_still_refuses(refusal_gate):
        assert refusal_gate.passed

    @pytest.mark.refusal_parity(profile="release")   # enough by itself: the test fails without a PASS
    def test_release():
        pass

Nothing but PASS passes. A test that needs the gate is never skipped: without the options pytest ends
with a usage error. The artifact is verified once per profile and run; under pytest-xdist one worker
does it while the others wait for a file lock, then read its report. Files under test stay as they are.

pytest loads this module in every run of an environment that has safegene: the rest is imported when
a test asks for it. Nothing else in the runtime imports pytest.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

__all__ = ["RefusalGate"]

FIXTURE, MARKER = "refusal_gate", "refusal_parity"
MAX_FLIPS = 20
PROPERTY = "safegene_"
_KEY = pytest.StashKey[dict[str, "RefusalGate | str"]]()


@dataclass(frozen=True, repr=False)
class RefusalGate:
    """What `safegene verify` found, for assertions.

    Attributes:
        report: `report.json` as a dict, without replies.
    """

    report: Mapping[str, Any]

    @property
    def passed(self) -> bool:
        """Whether the verdict is PASS; INCONCLUSIVE and VACUOUS are not."""
        return self.verdict == "PASS"

    @property
    def verdict(self) -> str:
        """PASS, FAIL, INCONCLUSIVE or VACUOUS."""
        return str(self.report["verdict"])

    @property
    def sentence(self) -> str:
        """The one sentence to quote."""
        return str(self.report["sentence"])

    @property
    def broken_at(self) -> str | None:
        """The first rung that broke."""
        found: str | None = self.report["broken_at"]
        return found

    @property
    def flips(self) -> tuple[str, ...]:
        """Ids of the prompts whose label changed, the worst first."""
        from safegene_runtime.reporting.view import flips

        return tuple(prompt["id"] for prompt in flips(self.report))

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return f"<{self.report['profile']['name']} gate: {self.verdict}>"

    def describe(self) -> str:
        """Verdict, sentence, the first rung that broke, and the flips: what a failing test shows."""
        from safegene_runtime.reporting.view import CHANGES, change, flips, standing

        lines = [f"{self.verdict} (profile {self.report['profile']['name']}): {self.sentence}"]
        if self.broken_at is not None:
            detail = next(r["detail"] for r in self.report["rungs"] if r["name"] == self.broken_at)
            lines.append(f"first broken rung: {self.broken_at}: {detail}")
        for attack in self.report["attacks"]:
            gate = attack["gate"]
            if gate["verdict"] != "PASS":
                lines.append(f"under {attack['name']}: {standing(gate)}: {gate['sentence']}")
        changed = flips(self.report)
        lines += [
            f"  {one['id']}: {one['reference']} -> {one['artifact']} ({CHANGES[change(one)]})"
            for one in changed[:MAX_FLIPS]
        ]
        if len(changed) > MAX_FLIPS:
            lines.append(f"  and {len(changed) - MAX_FLIPS} more")
        return "\n".join(lines)

    def properties(self) -> Iterator[tuple[str, object]]:
        """(name, value) for `record_property`: what a CI server plots over time."""
        yield "verdict", self.verdict
        yield "profile", self.report["profile"]["name"]
        yield "sentence", self.sentence
        gate = self.report["gate"]
        for name in ("loss", "over_refusal") if gate else ():
            rate = gate[name]
            yield f"{name}_events", rate["events_worst"]
            yield f"{name}_trials", rate["trials_worst"]
            yield f"{name}_upper", rate["upper"]
            yield f"{name}_margin", rate["margin"]
        for attack in self.report["attacks"]:
            yield f"verdict_under_{attack['name']}", attack["gate"]["verdict"]
        logits = next(rung for rung in self.report["rungs"] if rung["name"] == "logits")
        if "mean_kl" in logits["figures"]:
            yield "mean_kl", logits["figures"]["mean_kl"]


# --- options ---------------------------------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds the options `--safegene-...`."""
    group = parser.getgroup("safegene", "refusal parity (safegene)")
    add = group.addoption
    add("--safegene-artifact", metavar="OUT", help="a folder made by `safegene convert`")
    add("--safegene-reference", metavar="REF", help="a folder made by `safegene record`")
    add("--safegene-base", metavar="GGUF", help="for a sidecar: the GGUF it belongs to")
    add("--safegene-control", metavar="GGUF",
        help="for a merged GGUF: its plain base, quantised the same way, to hold its KL against")  # fmt: skip
    add("--safegene-profile", default="ci", metavar="NAME",
        help="smoke, ci (default) or release; a marker refusal_parity(profile=...) goes first")  # fmt: skip
    add("--safegene-sequential", action="store_true", help="stop as soon as the verdict is certain")
    add("--safegene-attacks", default=[], metavar="NAMES", type=_names,
        help="gate under these recorded jailbreaks, too: all, or names with commas between them")  # fmt: skip
    add("--safegene-mode", default="strict", choices=["strict", "as-shipped"],
        help="strict compares arithmetic; as-shipped runs llama.cpp with its F16 KV cache")  # fmt: skip
    add("--safegene-judge", metavar="JUDGE",
        help="rules+ngram (default), gguf:PATH, onnx:PATH, or the name of a plug-in")  # fmt: skip
    add("--safegene-engine", metavar="NAME",
        help="what runs it, by name; by default the artifact's suffix decides")  # fmt: skip
    add("--safegene-threads", type=int, metavar="N", help="CPU threads of the engine")
    add("--safegene-report", metavar="DIR",
        help="write all reports of a profile into the folder DIR/PROFILE")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    """Registers the marker, and refuses half of the options.

    Raises:
        UsageError: an artifact without a reference, the reverse, an unknown profile or attack.
    """
    config.addinivalue_line(
        "markers",
        f"{MARKER}(profile=None): fails unless the artifact keeps the reference's refusals, as the "
        "profile (smoke, ci, release) asks",
    )
    config.stash[_KEY] = {}
    missing = _missing(config)
    if len(missing) == 1:
        raise pytest.UsageError(f"safegene: {missing[0]} is needed, too")
    _checked_profile(config.getoption("safegene_profile"), "--safegene-profile")
    _check_attacks(config.getoption("safegene_attacks"))


def _names(text: str) -> list[str]:
    from safegene_runtime.record.attacks import attack_list

    return attack_list(text)


def _check_attacks(names: list[str]) -> None:
    from safegene_runtime.errors import SafeGeneError
    from safegene_runtime.record.attacks import attack_names

    try:
        attack_names(names)
    except SafeGeneError as error:
        raise pytest.UsageError(f"--safegene-attacks: {error}") from error


def _missing(config: pytest.Config) -> list[str]:
    names = ("artifact", "reference")
    return [f"--safegene-{name}" for name in names if not config.getoption(f"safegene_{name}")]


def _checked_profile(name: object, where: str) -> str:
    from safegene_runtime.gating.profiles import PROFILES

    if not isinstance(name, str) or name not in PROFILES:
        raise pytest.UsageError(f"{where}: expected {', '.join(PROFILES)}, got {name!r}")
    return name


def _profile(item: pytest.Item) -> str:
    """What the nearest marker says, else the option."""
    marker = item.get_closest_marker(MARKER)
    if marker is None or not (marker.args or marker.kwargs):
        return str(item.config.getoption("safegene_profile"))
    if marker.args or set(marker.kwargs) != {"profile"}:
        raise pytest.UsageError(f"{item.nodeid}: expected {MARKER}(profile=NAME)")
    return _checked_profile(marker.kwargs["profile"], item.nodeid)


# --- collecting ------------------------------------------------------------------------------------


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Gives marked tests the fixture; never lets one go that could not be checked.

    Raises:
        UsageError: a test needs the gate and there is nothing to verify, or a marker is wrong.
    """
    asking = []
    for item in items:
        names = getattr(item, "fixturenames", [])
        if item.get_closest_marker(MARKER) is not None:
            if FIXTURE not in names:
                names.append(FIXTURE)
            asking.append(item)
        elif FIXTURE in names:
            asking.append(item)
    # a worker of pytest-xdist cannot end the run with a usage error: there the fixture fails
    if asking and not hasattr(config, "workerinput"):
        if missing := _missing(config):
            raise pytest.UsageError(_nothing_to_verify(asking[0], missing))
        for item in asking:
            _profile(item)


def _nothing_to_verify(item: pytest.Item, missing: list[str]) -> str:
    return f"safegene: {item.nodeid} needs {' and '.join(missing)}"


# --- the gate --------------------------------------------------------------------------------------


@pytest.fixture
def refusal_gate(
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
    tmp_path_factory: pytest.TempPathFactory,
) -> RefusalGate:
    """The verdict on `--safegene-artifact`, computed once per profile and run."""
    config, item = request.config, request.node
    if missing := _missing(config):
        raise pytest.UsageError(_nothing_to_verify(item, missing))
    profile = _profile(item)
    found = config.stash[_KEY]
    if profile not in found:
        found[profile] = _shared(config, profile, tmp_path_factory.getbasetemp())
    gate = found[profile]
    if isinstance(gate, str):
        pytest.fail(f"safegene could not check it, which is no pass:\n{gate}", pytrace=False)
    for name, value in gate.properties():
        record_property(PROPERTY + name, value)
    return gate


def _shared(config: pytest.Config, profile: str, temporary: Path) -> RefusalGate | str:
    """The gate, or why there is none; of all workers of a run, one computes it."""
    from safegene_runtime.errors import SafeGeneError
    from safegene_runtime.formats.publish import publish_file

    worker: Mapping[str, Any] = getattr(config, "workerinput", {})
    folder = temporary.parent if worker else temporary  # pytest-xdist: the parent is the run's own
    try:
        name = f"safegene-{_digest(config, profile, worker.get('testrunuid', ''))}"
        with open(folder / f"{name}.lock", "ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the file, and with the process
            path = folder / f"{name}.json"
            if not path.exists():
                publish_file(path, json.dumps(_verify(config, profile)).encode())
            found = json.loads(path.read_bytes())
    except SafeGeneError as error:
        return str(error)
    return found if isinstance(found, str) else RefusalGate(found)


def _digest(config: pytest.Config, profile: str, run: str) -> str:
    """Of what is verified, against what, and how."""
    from safegene_runtime.formats.files import sha256_file

    names = (
        "artifact", "reference", "base", "control", "sequential", "attacks", "mode", "judge", "engine",
        "threads",
    )  # fmt: skip
    options = {name: str(config.getoption(f"safegene_{name}")) for name in names}
    files = [
        sha256_file(Path(options["artifact"]) / "manifest.json"),
        sha256_file(Path(options["reference"]) / "reference.json"),
    ]
    key = json.dumps([run, profile, options, files])
    return hashlib.sha256(key.encode()).hexdigest()[:32]


def _verify(config: pytest.Config, profile: str) -> dict[str, Any] | str:
    """`report.json` without replies, or the message of what could not be checked."""
    from safegene_runtime.errors import SafeGeneError
    from safegene_runtime.judging.plugins import load_judge
    from safegene_runtime.reporting import check_places, read_files, report_files, write_reports
    from safegene_runtime.verifying.ladder import verify

    def option(name: str) -> Any:
        return config.getoption(f"safegene_{name}")

    artifact, reference = Path(option("artifact")), Path(option("reference"))
    base, control = (Path(one) if (one := option(name)) else None for name in ("base", "control"))
    try:
        if option("report"):
            files = report_files(Path(option("report")) / profile).values()
            places = {f"--safegene-report: {one}": one for one in files}
            check_places(places, [artifact, reference, *read_files(option("judge"), base, control)])
        report = verify(
            artifact,
            reference,
            base=base,
            control=control,
            profile=profile,
            sequential=option("sequential"),
            attacks=option("attacks"),
            mode=option("mode"),
            judge=load_judge(option("judge")) if option("judge") else None,
            threads=option("threads"),
            engine=option("engine"),
            write=False,
        ).to_dict(texts=False)
        if option("report"):
            write_reports(report, Path(option("report")) / profile)
    except SafeGeneError as error:
        return str(error)
    return report


# --- what a test shows -----------------------------------------------------------------------------


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """A marked test fails without a PASS, whatever its body asserts."""
    if item.get_closest_marker(MARKER) is not None:
        gate: RefusalGate = item.funcargs[FIXTURE]  # type: ignore[attr-defined]
        if not gate.passed:
            pytest.fail(gate.describe(), pytrace=False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Puts verdict and flips below the traceback of a test that failed on its gate."""
    report = yield
    gate = getattr(item, "funcargs", {}).get(FIXTURE)
    if call.when == "call" and call.excinfo and isinstance(gate, RefusalGate):
        shown = item.get_closest_marker(MARKER) is not None  # by `pytest_runtest_call`
        if not gate.passed and not shown:
            report.sections.append(("refusal parity", gate.describe()))
    return report


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """One line for each profile that was gated; from the tests' properties, as workers have them."""
    found = set()
    for reports in terminalreporter.stats.values():
        for report in reports:
            about = dict(getattr(report, "user_properties", ()))
            if PROPERTY + "verdict" in about:
                found.add(
                    tuple(about[PROPERTY + name] for name in ("profile", "verdict", "sentence"))
                )
    if found:
        terminalreporter.section("refusal parity")
        for profile, verdict, sentence in sorted(found):
            terminalreporter.write_line(f"{verdict} ({profile}): {sentence}")
