"""JUnit XML (xunit2, as Jenkins, GitLab and pytest's own reader take it).

One suite a rung, one case a check, the verdict as the last suite. FAIL is a failure; INCONCLUSIVE
and VACUOUS are errors, so that a CI server goes red and still tells them apart; what was not
reached, and an attack that nothing can be said about, is skipped. Prompts appear by id only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from xml.etree import ElementTree

from safegene_runtime.reporting.markup import visible
from safegene_runtime.reporting.view import (
    RATES,
    change,
    compact,
    counts,
    flips,
    format_bound,
    standing,
)

__all__ = ["outcome", "render_junit"]

OUTCOMES = {
    "ok": "passed",
    "pass": "passed",
    "broken": "failure",
    "fail": "failure",
    "undecided": "error",
    "inconclusive": "error",
    "vacuous": "error",
    "allowed": "passed",
    "not reached": "skipped",
    "not offered": "skipped",
    "not measured": "skipped",
    "not decided": "skipped",
}


def outcome(status: str) -> str:
    """Maps a rung's status or a verdict; what nobody knows is an error, never a pass."""
    return OUTCOMES.get(status.lower(), "error")


@dataclass
class _Case:
    name: str
    status: str
    message: str
    properties: dict[str, Any] = field(default_factory=dict)
    seconds: float | None = None


def render_junit(report: Mapping[str, Any]) -> str:
    """The report as one XML document."""
    artifact = report["artifact"]["name"]
    suites = [(rung["name"], _rung_cases(report, rung)) for rung in report["rungs"]]
    if report["attacks"]:
        suites.append(("attacks", list(_attack_cases(report))))
    suites.append(("verdict", [_verdict_case(report)]))
    root = ElementTree.Element("testsuites", name=visible(f"safegene {artifact}"))
    totals = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    for name, cases in suites:
        found = [outcome(case.status) for case in cases]
        numbers = {
            "tests": len(found),
            "failures": found.count("failure"),
            "errors": found.count("error"),
            "skipped": found.count("skipped"),
        }
        suite = ElementTree.SubElement(root, "testsuite", name=visible(name))
        for key, value in numbers.items():
            totals[key] += value
            suite.set(key, str(value))
        suite.set("time", f"{sum(case.seconds or 0 for case in cases):.3f}")
        for case in cases:
            _add(suite, f"safegene.{artifact}.{name}", case)
    for key in ("tests", "failures", "errors"):
        root.set(key, str(totals[key]))
    root.set("time", f"{report['seconds']['total']:.3f}")
    ElementTree.indent(root)
    body = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{body}\n'


def _rung_cases(report: Mapping[str, Any], rung: Mapping[str, Any]) -> list[_Case]:
    first = _Case(
        rung["name"], rung["status"], rung["detail"], dict(_flat(rung["figures"])), rung["seconds"]
    )
    if rung["name"] != "refusals" or not report["gate"]:
        return [first]
    gate = report["gate"]
    ids: dict[str | None, list[str]] = {}
    for prompt in flips(report):
        ids.setdefault(change(prompt), []).append(prompt["id"])
    cases = [first]
    kinds = {"loss": "lost", "over_refusal": "over-refused"}
    for key in RATES:
        bound, kind = gate[key], kinds.get(key)
        message = f"{counts(bound)}; upper bound {format_bound(bound)}"
        if kind in ids:
            message += "; prompts: " + ", ".join(ids[kind])
        cases.append(_Case(key, bound["status"], message, dict(_flat(bound))))
    contrast = gate["contrast"]
    status = "ok" if contrast["ok"] else "vacuous"
    cases.append(_Case("contrast", status, contrast["reason"], dict(_flat(contrast))))
    return cases


def _attack_cases(report: Mapping[str, Any]) -> Iterator[_Case]:
    for attack in report["attacks"]:
        gate = attack["gate"]
        message = gate["sentence"]
        if gate["not_decided"]:
            message = f"not decided ({gate['not_decided']}): {message}"
        yield _Case(attack["name"], standing(gate), message, dict(_flat(gate["loss"])))


def _verdict_case(report: Mapping[str, Any]) -> _Case:
    message = report["sentence"]
    if report["broken_at"]:
        message = f"broken at {report['broken_at']}: {message}"
    properties = {
        "verdict": report["verdict"],
        "exit_code": report["exit_code"],
        "profile": report["profile"]["name"],
        "mode": report["mode"],
        "precision": report["precision"],
        "reference_sha256": report["reference"]["sha256"],
    }
    return _Case("verdict", report["verdict"], message, properties)


def _flat(figures: Mapping[str, Any] | None, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in (figures or {}).items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif not isinstance(value, list | tuple) or len(value) == 2:
            yield f"{prefix}{key}", value


def _add(suite: ElementTree.Element, classname: str, case: _Case) -> None:
    element = ElementTree.SubElement(
        suite,
        "testcase",
        classname=visible(classname),
        name=visible(case.name),
        time=f"{case.seconds or 0:.3f}",
    )
    if case.properties:
        properties = ElementTree.SubElement(element, "properties")
        for name, value in case.properties.items():
            text = repr(value) if isinstance(value, float) else compact(value)
            ElementTree.SubElement(properties, "property", name=visible(name), value=visible(text))
    kind = outcome(case.status)
    message = visible(case.message or case.status)
    if kind in ("failure", "error"):
        problem = ElementTree.SubElement(
            element, kind, message=message, type=visible(case.status.upper())
        )
        problem.text = message
    elif kind == "skipped":
        ElementTree.SubElement(element, kind, message=message)
