"""SARIF 2.1.0 (OASIS), for code scanning: the verdict unless PASS, each broken rung, each flip.

A flip is at the artifact's file, with the prompt's id as logical location; no text of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import quote

from safegene_runtime.formats.files import sha256_of
from safegene_runtime.reporting.markup import visible
from safegene_runtime.reporting.view import CHANGES, MEANING, change, flips

__all__ = ["render_sarif"]

SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
FLIP_LEVEL = {
    "lost": "error",
    "over-refused": "warning",
    "gained": "note",
    "released": "note",
    "other": "note",
}


def render_sarif(report: Mapping[str, Any]) -> str:
    """The report as one SARIF log."""
    results = list(_results(report))
    used = {result["ruleId"] for result in results}
    rules = [rule for rule in _rules(report) if rule["id"] in used]
    index = {rule["id"]: number for number, rule in enumerate(rules)}
    for result in results:
        result["ruleIndex"] = index[result["ruleId"]]
    run = {
        "tool": {
            "driver": {
                "name": visible(report["tool"]["name"]),
                "version": visible(report["tool"]["version"]),
                "rules": rules,
            }
        },
        "automationDetails": {"id": visible(f"safegene/{report['artifact']['name']}")},
        "invocations": [{"executionSuccessful": True, "exitCode": report["exit_code"]}],
        "properties": {
            "verdict": report["verdict"],
            "sentence": visible(report["sentence"]),
            "profile": visible(report["profile"]["name"]),
        },
        "results": results,
    }
    log = {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(log, ensure_ascii=False, indent=1) + "\n"


def _rules(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    def rule(name: str, short: str) -> dict[str, Any]:
        return {"id": visible(name), "shortDescription": {"text": visible(short)}}

    for verdict, meaning in MEANING.items():
        yield rule(f"verdict/{verdict}", meaning)
    for rung in report["rungs"]:
        yield rule(f"rung/{rung['name']}", f"The rung {rung['name']} of the ladder must hold.")
    for kind, words in CHANGES.items():
        yield rule(f"flip/{kind}", f"A prompt whose label changed: {words}.")


def _results(report: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if report["verdict"] != "PASS":
        level = "error" if report["verdict"] == "FAIL" else "warning"
        yield _result(report, f"verdict/{report['verdict']}", level, report["sentence"])
    for rung in report["rungs"]:
        if rung["status"] in ("broken", "undecided"):
            level = "error" if rung["status"] == "broken" else "warning"
            message = rung["detail"] or f"{rung['name']} is {rung['status']}"
            yield _result(report, f"rung/{rung['name']}", level, message)
    for prompt in flips(report):
        kind = change(prompt)
        message = (
            f"{prompt['id']}: {CHANGES[kind]}: the reference's reply is {prompt['reference']}, "
            f"the artifact's {prompt['artifact']}"
        )
        yield _result(report, f"flip/{kind}", FLIP_LEVEL[kind], message, prompt["id"])


def _result(
    report: Mapping[str, Any], rule: str, level: str, message: str, prompt: str | None = None
) -> dict[str, Any]:
    name = visible(report["artifact"]["name"])
    file = min(report["artifact"]["files"], default="")
    place: dict[str, Any] = {
        "physicalLocation": {
            "artifactLocation": {"uri": quote(visible(f"{name}/{file}".rstrip("/")))},
            "region": {"startLine": 1},
        }
    }
    if prompt is not None:
        place["logicalLocations"] = [{"fullyQualifiedName": visible(prompt), "kind": "prompt"}]
    identity = "\0".join((visible(rule), name, visible(prompt or "")))
    return {
        "ruleId": visible(rule),
        "level": level,
        "message": {"text": visible(message)},
        "locations": [place],
        "partialFingerprints": {"safegene/v1": sha256_of(identity.encode())},
    }
