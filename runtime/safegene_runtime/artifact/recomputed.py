"""What a manifest says that follows from the rest of it: computed again, and refused where it differs.

Of modules: effective scale = scaling · coefficient, ranks and shapes add up to the adapter's parameters,
slots are factors of modules. Of a verdict: every bound, p-value, status and sentence from the counts and the
profile beside it, by the code of the gate; the rungs from their figures and bounds; the verdict from all.

An edit that keeps all of that consistent is not noticed: a manifest is not signed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from safegene_runtime.errors import ManifestError, Problems
from safegene_runtime.formats.fields import (
    FLAG,
    NUMBER,
    OBJECT,
    TEXT,
    Kind,
    check_fields,
    integer,
    list_of,
    one_of,
    or_null,
)
from safegene_runtime.gating.bounds import BOUNDS, beta_band, beta_holds, bounds_in
from safegene_runtime.gating.gate import (
    Contrast,
    GateResult,
    Profile,
    Rate,
    combine,
    recounted,
)
from safegene_runtime.gating.verdict import Verdict

__all__ = ["RUNGS", "RUNG_FIGURES", "check_modules", "check_verification", "gates_to_dict"]

RUNGS = ("integrity", "static", "text", "active", "logits", "refusals")
RUNG_FIGURES: Mapping[str, Sequence[str]] = {
    "active": ("beta", "noise", "nearer_to_reference"),
    "logits": ("mean_kl", "top1"),
}
"""The figures that are kept of each rung: its bounds are held against them."""
CLOSE = 1e-9
"""Relative: what another build of scipy or of the C library may round otherwise."""
MAX_COUNT = 1 << 30
FIX = "the manifest was edited, or an older version wrote it: run `safegene verify` again"

_STATUS = one_of("ok", "broken", "undecided", "not reached")
_COUNT = integer(0, MAX_COUNT)
_FIGURE = or_null(Kind((int, float), "a number", "a number that is finite", math.isfinite))
_RATES = ("loss", "over_refusal", "degenerate")
_FLIPS = ("losses", "gains", "undecided", "unexplained")
_REPORT: dict[str, Kind] = {
    "mode": one_of("strict", "as-shipped"),
    "precision": TEXT,
    "stop_ids": list_of(integer(0)),
    "sentence": TEXT,
    "broken_at": or_null(TEXT),
    "rungs": OBJECT,
    "figures": OBJECT,
    "profile": or_null(OBJECT),
    "gates": list_of(),
}
_PROFILE: dict[str, Kind] = {
    "name": TEXT,
    "confidence": NUMBER,
    "loss_margin": NUMBER,
    "over_refusal_margin": NUMBER,
    "min_refused": integer(1),
    "budget": or_null(integer(1)),
    "strict": FLAG,
}
_GATE: dict[str, Kind] = {
    "attack": or_null(TEXT),
    "verdict": one_of(*map(str, Verdict)),
    **dict.fromkeys((*_RATES, "contrast", "mcnemar", "flips"), OBJECT),
    "family": integer(1),
    "sentence": TEXT,
    "not_decided": TEXT,
}
_RATE: dict[str, Kind] = {
    **dict.fromkeys(
        ("events_best", "events_worst", "trials_best", "trials_worst", "prompts"), _COUNT
    ),
    "rate": or_null(NUMBER),
    **dict.fromkeys(("upper", "lower", "p_fail", "margin", "confidence"), NUMBER),
    "interval": list_of(NUMBER),
    "status": one_of("PASS", "FAIL", "INCONCLUSIVE", "not measured"),
    "method": one_of("clopper-pearson", "e-process"),
}
_CONTRAST: dict[str, Kind] = {
    "loss": OBJECT,
    **dict.fromkeys(("refused", "min_refused", "losses", "gains"), _COUNT),
    "p_value": NUMBER,
    "ok": FLAG,
    "reason": TEXT,
}
_MCNEMAR: dict[str, Kind] = {"losses": _COUNT, "gains": _COUNT, "p_value": NUMBER}


# --- modules ---------------------------------------------------------------------------------------


def check_modules(raw: Mapping[str, Any], where: str, problems: Problems) -> None:
    """Holds the figures of a manifest's modules against each other; all fields are of their kinds."""
    parameters = 0
    for entry in raw["modules"]:
        name = f"modules.{entry['module']}"
        expected = entry["scaling"] * entry["coefficient"]
        if not _same(expected, entry["effective_scale"]):
            field = f"{name}.effective_scale"
            problems.add(
                where, field, f"{expected!r}: scaling x coefficient", entry["effective_scale"]
            )
        parameters += entry["rank"] * sum(entry["shape"])
    found = raw["adapter"]["n_parameters"]
    if parameters != found:
        expected = f"{parameters}: rank x (out + in), over all modules"
        problems.add(where, "adapter.n_parameters", expected, found)


# --- the verdict -----------------------------------------------------------------------------------


def gates_to_dict(plain: GateResult | None, attacks: Mapping[str, GateResult]) -> dict[str, Any]:
    """What a manifest keeps of the gates: {"profile": {...} or null, "gates": [...]}."""
    gates = [*([] if plain is None else [plain]), *attacks.values()]
    return {
        "profile": dataclasses.asdict(gates[0].profile) if gates else None,
        "gates": [_kept(gate) for gate in gates],
    }


def _kept(gate: GateResult) -> dict[str, Any]:
    found = gate.to_dict()
    kept = {name: found[name] for name in _GATE}
    return {**kept, "flips": {name: found["flips"][name] for name in _FLIPS}}


def check_verification(found: Mapping[str, Any] | None, precision: str, where: str) -> None:
    """Computes a verdict again from the counts beside it, by the code of the gate.

    Args:
        found: the manifest's `verification`; None is not checked, for it claims nothing.
        precision: of the artifact: the bounds that were held are those of this class.
        where: file and place, for the messages.

    Raises:
        ManifestError: a field that is missing, or says something else than the rest: all of them.
    """
    if found is None:
        return
    problems = Problems()
    report = found["report"]
    gates = _read(report, f"{where}.report", problems)
    _refuse(problems)
    try:
        again = recounted(gates)
    except ValueError as error:
        problems.add(where, "report.gates", "counts that prompts can have", str(error))
    _refuse(problems)
    _compare(report["precision"], precision, "report.precision", where, problems)
    for place, (name, gate) in enumerate(again.items()):
        _compare(_kept(gates[name]), _kept(gate), f"report.gates[{place}]", where, problems)
    plain = again.pop(None, None)
    attacks = {str(name): gate for name, gate in again.items()}
    decision = combine(plain, attacks) if plain or attacks else None
    _check_rungs(report, None if decision is None else decision.verdict, where, problems)
    broken = next((name for name in RUNGS if report["rungs"][name] == "broken"), None)
    if broken is None and decision is None:
        problems.add(where, "report.gates", "a gate, where no rung broke", "none")
        _refuse(problems)
    verdict = Verdict.FAIL if broken or decision is None else decision.verdict
    _compare(found["verdict"], str(verdict), "verdict", where, problems)
    _compare(report["broken_at"], broken, "report.broken_at", where, problems)
    if decision is not None and broken in (None, "refusals"):
        _compare(report["sentence"], decision.sentence, "report.sentence", where, problems)
    elif not report["sentence"].startswith(said := f"Parity is broken at {broken}: "):
        problems.add(where, "report.sentence", f"{said}...", report["sentence"])
    _refuse(problems)


def _refuse(problems: Problems) -> None:
    if len(problems):
        raise ManifestError(dataclasses.replace(one, fix=one.fix or FIX) for one in problems)


def _read(report: Any, where: str, problems: Problems) -> dict[str | None, GateResult]:
    """The gates as they are stored, by attack; empty where something is wrong."""
    figures = dict.fromkeys((name for names in RUNG_FIGURES.values() for name in names), _FIGURE)
    if check_fields(report, where, _REPORT, problems):
        rungs = dict.fromkeys(RUNGS, _STATUS)
        check_fields(report["rungs"], f"{where}.rungs", rungs, problems)
        check_fields(report["figures"], f"{where}.figures", figures, problems)
        if report["gates"] and report["profile"] is None:
            problems.add(where, "profile", "the profile of the gates", "null")
        if report["profile"] is not None:
            check_fields(report["profile"], f"{where}.profile", _PROFILE, problems)
        for place, gate in enumerate(report["gates"]):
            _check_gate(gate, f"{where}.gates[{place}]", problems)
    if len(problems):
        return {}
    profile = None
    if report["profile"] is not None:
        try:
            profile = Profile(**report["profile"])
        except ValueError as error:
            problems.add(
                where, "profile", "margins and confidence in their ranges", str(error), FIX
            )
            return {}
    gates = {one["attack"]: _gate(one, profile) for one in report["gates"] if profile}
    if len(gates) != len(report["gates"]):
        problems.add(where, "gates", "one for each attack", "two for one")
    if len({gate.loss.method for gate in gates.values()}) > 1:
        problems.add(where, "gates", "one method for all", "two")
    return gates


def _check_gate(gate: Any, where: str, problems: Problems) -> None:
    if not check_fields(gate, where, _GATE, problems):
        return
    for name in _RATES:
        check_fields(gate[name], f"{where}.{name}", _RATE, problems)
    check_fields(gate["mcnemar"], f"{where}.mcnemar", _MCNEMAR, problems)
    check_fields(gate["flips"], f"{where}.flips", dict.fromkeys(_FLIPS, _COUNT), problems)
    if check_fields(gate["contrast"], f"{where}.contrast", _CONTRAST, problems):
        check_fields(gate["contrast"]["loss"], f"{where}.contrast.loss", _RATE, problems)


def _gate(raw: Mapping[str, Any], profile: Profile) -> GateResult:
    contrast = raw["contrast"]
    return GateResult(
        **{
            **raw,
            **{name: _rate(raw[name]) for name in _RATES},
            "verdict": Verdict(raw["verdict"]),
            "contrast": Contrast(**{**contrast, "loss": _rate(contrast["loss"])}),
        },
        profile=profile,
        net_difference={"interval": ()},
        clusters={"interval": ()},
        sequential=None,
    )


def _rate(raw: Mapping[str, Any]) -> Rate:
    return Rate(**{**raw, "interval": tuple(raw["interval"])})


def _check_rungs(
    report: Mapping[str, Any], decided: Verdict | None, where: str, problems: Problems
) -> None:
    rungs, figures, precision = report["rungs"], report["figures"], report["precision"]
    for rung, names in RUNG_FIGURES.items():
        values = [figures[name] for name in names]
        reached = rungs[rung] != "not reached"
        if values.count(None) != (0 if reached else len(values)):
            expected = "the figures of a rung that was reached, and of no other"
            problems.add(where, f"report.rungs.{rung}", expected, rungs[rung])
        elif reached and precision not in BOUNDS:
            problems.add(where, "report.precision", ", ".join(BOUNDS), precision)
        elif rungs[rung] == "ok" and not _holds(rung, values, precision, report["mode"]):
            problems.add(where, f"report.rungs.{rung}", "broken, by its figures", "ok")
    if rungs["refusals"] != "not reached":
        status = {Verdict.PASS: "ok", Verdict.FAIL: "broken", None: "not reached"}
        expected = status.get(decided, "undecided")
        _compare(rungs["refusals"], expected, "report.rungs.refusals", where, problems)
    for rung in RUNGS if decided is Verdict.PASS else ():
        if rungs[rung] == "not reached":
            problems.add(where, f"report.rungs.{rung}", "reached, before a PASS", rungs[rung])


def _holds(rung: str, values: Sequence[float], precision: str, mode: str) -> bool:
    if rung == "active":
        beta, noise, nearer = values
        return beta_holds(beta, nearer, beta_band(precision, noise))
    mean_kl, top1 = values
    return bounds_in(precision, mode).holds(mean_kl, top1)


def _compare(got: Any, expected: Any, field: str, where: str, problems: Problems) -> None:
    """Adds each leaf that differs, by its path."""
    if isinstance(expected, dict):
        for name, value in expected.items():
            _compare(got[name], value, f"{field}.{name}", where, problems)
    elif not _same(got, expected):
        problems.add(where, field, expected, got)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) or isinstance(other, float):
        numbers = all(type(value) in (int, float) for value in (one, other))
        return numbers and math.isclose(one, other, rel_tol=CLOSE, abs_tol=1e-300)
    return bool(one == other)
