"""The static proof: the delta is in the artifact's bytes, once, at full strength, where it belongs.

    beta_W = ⟨W_artifact, ΔW⟩ / ‖ΔW‖² − ⟨W_base, ΔW⟩ / ‖ΔW‖²

per touched module, without inference. W_artifact is what is served: the stored weight, decoded, plus
the low-rank product of a sidecar, a branch or an adapter file. ΔW and the second term are recorded
from PyTorch and PEFT (`factors.py`). 1: folded; 0: not, or wrong rows; 2: twice; −1: the sign.

How far from 1 a module may be depends on what it is stored as, and on whether it can be compared
with the base that was recorded, byte for byte; see docs/static-proof.md. Where the base itself was
rounded, the rounding e of a tensor of N elements moves beta by ⟨e, ΔW⟩ / ‖ΔW‖², which for an e that
knows nothing of ΔW has standard deviation ‖e‖ / (√N ‖ΔW‖). Four of these widen the band. A band wider
than one half could not tell folded from not: then the proof is `undecided`, not `ok`.

beta sees what lies along ΔW only. For a low-rank product that is added, the whole difference is known,
and its norm is bounded as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safegene_runtime.architecture.table import module_kinds, parse_module
from safegene_runtime.artifact.forms import ONNX
from safegene_runtime.artifact.manifest import Manifest, ModuleEntry
from safegene_runtime.artifact.served import Found, ServedWeights
from safegene_runtime.artifact.served_gguf import GGUFWeights
from safegene_runtime.errors import Problem, Problems, RecordError
from safegene_runtime.gating.bounds import class_of
from safegene_runtime.progress import Progress
from safegene_runtime.record.added_weights import ModuleFactors, inner
from safegene_runtime.record.reference import Reference

__all__ = ["UNDECIDED", "ModuleProof", "StaticProof", "absence_proof", "static_proof"]

BANDS = {"F32": 0.01, "F16": 0.01, "BF16": 0.05, "Q8_0": 0.05, "INT8": 0.05}
"""|beta − 1| by stored type, of a module and of all together."""
COARSE_SAME_BASE = (0.1, 0.05)
"""Of coarser types: a module, and all together. The converter's gate of survival is 0.05 a module."""
COARSE_OTHER_BASE = (0.5, 0.15)
"""Likewise, where the base beneath was rounded after it was recorded, or before."""
NOISE = {
    "F32": 0.0, "F16": 2e-4, "BF16": 2e-3, "Q8_0": 6e-3, "INT8": 8e-3, "Q6_K": 2e-2,
    "Q5_0": 5e-2, "Q5_1": 5e-2, "Q5_K": 5e-2,
}  # fmt: skip
NOISE_COARSE = 0.12
"""‖e‖ / ‖W‖ of rounding to a type, on weights spread like trained ones."""
NOISE_SIGMAS = 4
LARGE_NOISE, SURVIVAL = 0.1, 0.05
"""Where ‖e‖ is more than a tenth of ‖ΔW‖, rounding may favour the base, whose weights lie on a grid: then a
module's band is no narrower than the converter's gate of survival."""
UNDECIDED = 0.5
FACTOR_ERROR = {"F32": 1e-3, "F16": 1e-2, "BF16": 3e-2}
FACTOR_ERROR_COARSE = 5e-2
"""‖P − ΔW‖ / ‖ΔW‖ of factors, by their type."""
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class ModuleProof:
    """One module.

    Attributes:
        module: its Hugging Face name.
        tensor: where it is stored.
        layer: its block.
        kind: what it is there: `q_proj`, ...
        type: what the weight is stored as.
        beta: how much of ΔW is served; 1 is meant.
        band: how far from 1 it may be.
        weight: its share ‖ΔW‖², which it is pooled with.
        base_shift: the stored weight's part of beta, where factors carry the delta; 0 is meant.
        relative_error: ‖P − ΔW‖ / ‖ΔW‖ of those factors.
    """

    module: str
    tensor: str
    layer: int
    kind: str
    type: str
    beta: float
    band: float
    weight: float
    base_shift: float | None
    relative_error: float | None


@dataclass(frozen=True)
class StaticProof:
    """What the bytes say.

    Attributes:
        status: `ok`, `broken`, or `undecided` where rounding noise could hide the delta.
        pooled: beta of all modules together, weighted with ‖ΔW‖².
        band: how far from 1 it may be.
        modules: in the order of layers.
        inert: modules whose ΔW is zero (a coefficient of 0), which have no beta.
        problems: what is wrong, module by module; empty if ok.
    """

    status: str
    pooled: float
    band: float
    modules: tuple[ModuleProof, ...]
    inert: tuple[str, ...]
    problems: tuple[Problem, ...]

    @property
    def detail(self) -> str:
        """One line for people."""
        if self.problems:
            return str(self.problems[0])
        return (
            f"beta {self.pooled:.4f} over {len(self.modules)} modules, "
            f"{min(one.beta for one in self.modules):.3f} to "
            f"{max(one.beta for one in self.modules):.3f}"
        )

    def heat_map(self) -> dict[str, Any]:
        """Beta by layer and kind: {"layers", "kinds", "beta": rows by layer, null where untouched}."""
        layers = sorted({module.layer for module in self.modules})
        kinds = list(dict.fromkeys(kind for kind in module_kinds() if kind in self._kinds()))
        kinds += sorted(self._kinds() - set(kinds))
        by_place = {(module.layer, module.kind): module.beta for module in self.modules}
        rows = [[by_place.get((layer, kind)) for kind in kinds] for layer in layers]
        return {"layers": layers, "kinds": kinds, "beta": rows}

    def _kinds(self) -> set[str]:
        return {module.kind for module in self.modules}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "status": self.status,
            "pooled": self.pooled,
            "band": self.band,
            "modules": [asdict(module) for module in self.modules],
            "inert": list(self.inert),
            "problems": [str(problem) for problem in self.problems],
            "heat_map": self.heat_map(),
        }


def static_proof(
    manifest: Manifest,
    model: Path,
    adapter: Path | None,
    record: Reference,
    tell: Progress | None = None,
) -> StaticProof:
    """Looks for the recorded delta in what an artifact serves.

    Args:
        manifest: of the artifact; its files have been checked.
        model: the model that is served; of a sidecar, the base beside it.
        adapter: the sidecar or the .onnx_adapter, for those forms.
        record: the reference.
        tell: told (stage, done, total).

    Raises:
        RecordError: a reference without factors, or of other modules than the artifact's.
        ManifestError: a module whose tensor is not in the model.
        UnsupportedError: a type of weights or factors that is not known.
        SafeGeneError: files that cannot be read.
    """
    pairs = _pair(manifest, record)
    served: ServedWeights
    if manifest.form.target is ONNX:
        from safegene_runtime.artifact.served_onnx import OnnxWeights

        served = OnnxWeights(model, adapter)
    else:
        served = GGUFWeights(model, adapter)
    same_files = sorted(manifest.base["files"].values()) == sorted(
        record.meta["base"]["files"].values()
    )
    problems = Problems()
    judged: list[_Judged] = []
    inert: list[str] = []
    for entry, added, found in _measured(served, pairs, tell, "looking for the delta"):
        if added.norm == 0:
            inert.append(added.module)
            if found.carried is not None and found.carried.norm > 0:
                problems.add(entry.tensor, added.module, "no delta", "one", "convert again")
        else:
            # a branch stands beside a base that may have been rounded since it was recorded
            same = same_files and (found.carried is None or not manifest.form.carries_base)
            judged.append(_module(entry.tensor, added, found, same))
    for name in served.unexpected():
        problems.add(
            str(adapter or model), name, "a delta of a recorded module", "another one",
            "convert again",
        )  # fmt: skip
    return _judge(judged, inert, problems)


def absence_proof(
    manifest: Manifest, plain: Path, record: Reference, tell: Progress | None = None
) -> StaticProof:
    """Looks for the recorded delta where none may be: beta 0 is meant, of every module.

    Arguments and errors are those of `static_proof`; `plain` is a GGUF model of the artifact's tensors.
    """
    pairs = _pair(manifest, record)
    measured = _measured(
        GGUFWeights(plain, None), pairs, tell, "looking for a delta in the control"
    )
    judged = [
        _module(entry.tensor, added, found, same=False)
        for entry, added, found in measured
        if added.norm
    ]
    inert = [added.module for _, added in pairs if not added.norm]
    return _judge(judged, inert, Problems(), meant=0.0)


def _measured(
    served: ServedWeights,
    pairs: Sequence[tuple[ModuleEntry, ModuleFactors]],
    tell: Progress | None,
    stage: str,
) -> Iterator[tuple[ModuleEntry, ModuleFactors, Found]]:
    """What is stored of each module, as it is asked for; `stage` is told once it was dealt with."""
    for number, (entry, added) in enumerate(pairs):
        yield entry, added, served.measure(entry, added)
        if tell is not None:
            tell(stage, number + 1, len(pairs))


def _pair(manifest: Manifest, record: Reference) -> list[tuple[ModuleEntry, ModuleFactors]]:
    """Each module of the manifest with its recorded factors, tensors in order."""
    where = str(record.path)
    if record.factors is None:
        raise RecordError(
            Problem(
                where, "factors.npz", "the factors that PEFT applied",
                "none: a reference of an older version", "record it again: safegene record",
            )
        )  # fmt: skip
    problems = Problems()
    recorded = {factor.module: factor for factor in record.factors}
    listed = {entry.module: entry for entry in manifest.modules}
    if len(listed) != len(manifest.modules):
        problems.add(where, "modules", "each module once in the manifest", "one twice")
    for name in sorted(recorded.keys() ^ listed.keys()):
        problems.add(
            where, name, "a module of the reference and of the artifact",
            "the reference's only" if name in recorded else "the artifact's only",
            "record a reference with this adapter: safegene record",
        )  # fmt: skip
    for name in sorted(recorded.keys() & listed.keys()):
        if recorded[name].shape != tuple(listed[name].shape):
            problems.add(where, name, tuple(listed[name].shape), recorded[name].shape)
        if parse_module(name) is None:
            problems.add(where, name, "a linear module of a block", "another name")
    if not any(factor.norm > 0 for factor in record.factors):
        problems.add(where, "factors", "a delta that is not zero", "only zeros", "record again")
    problems.raise_if_any(RecordError)
    return [
        (entry, recorded[entry.module])
        for entry in sorted(manifest.modules, key=lambda entry: entry.tensor)
    ]


@dataclass(frozen=True)
class _Judged:
    """A module with what its verdict needs: noise, band of the pool, limit of the factors' error."""

    proof: ModuleProof
    noise: float
    pooled_band: float
    error_limit: float


def _module(tensor: str, added: ModuleFactors, found: Found, same: bool) -> _Judged:
    for carrier in (found, found.carried):
        if carrier is not None:
            class_of(carrier.type, tensor)  # a type without a class has no bands either
    shift = found.dot / added.norm - added.s0
    beta, error, error_limit = shift, None, 0.0
    if found.carried is not None:
        part = found.carried.dot / added.norm
        beta += part
        # ‖P − ΔW‖² by its parts; what is left of a difference of equal numbers may be below zero
        own = inner(added.b, added.a, added.b, added.a)  # added.norm is rounded to float32
        error = math.sqrt(max(0.0, found.carried.norm - 2 * found.carried.dot + own) / own)
        error_limit = FACTOR_ERROR.get(found.carried.type, FACTOR_ERROR_COARSE)
    relative = NOISE.get(found.type, NOISE_COARSE)
    share = relative * math.sqrt(found.energy / added.norm)  # ‖e‖ / ‖ΔW‖
    noise = share / math.sqrt(math.prod(added.shape))
    if same and (found.carried is not None or found.type not in FLOATS):
        noise = 0.0  # the base beneath is the recorded one, byte for byte, or was compared with it
    if found.carried is not None and same:
        bands = (max(BANDS["F32"], error_limit),) * 2
    elif found.type in BANDS:
        bands = (BANDS[found.type],) * 2
    else:
        bands = COARSE_SAME_BASE if same else COARSE_OTHER_BASE
    floor = SURVIVAL if found.carried is None and share > LARGE_NOISE else 0.0
    place = parse_module(added.module)
    layer, kind = (place.layer, place.kind) if place else (0, added.module)
    proof = ModuleProof(
        module=added.module,
        tensor=tensor,
        layer=layer,
        kind=kind,
        type=found.type,
        beta=beta,
        band=max(bands[0], floor, NOISE_SIGMAS * noise),
        weight=added.norm,
        base_shift=None if found.carried is None else shift,
        relative_error=error,
    )
    return _Judged(proof, noise, bands[1], error_limit)


def _judge(
    judged: Sequence[_Judged], inert: Sequence[str], problems: Problems, meant: float = 1.0
) -> StaticProof:
    ordered = sorted(
        judged, key=lambda one: (one.proof.layer, _order(one.proof.kind), one.proof.module)
    )
    undecided = False
    noisy_layers = set()
    for each in ordered:
        one = each.proof
        _hold(one.tensor, f"beta of {one.module}", one.beta, one.band, meant, problems, one.type)
        if one.band > UNDECIDED:
            noisy_layers.add(one.layer)
        if one.relative_error is not None and not one.relative_error <= each.error_limit:
            problems.add(
                one.tensor, f"factors of {one.module}",
                f"the recorded delta within {each.error_limit:g}", f"{one.relative_error:.3g}",
                _meaning(one.beta),
            )  # fmt: skip
    for layer in sorted(noisy_layers):  # what no module alone can show, a layer together may
        beta, band = _pool([each for each in ordered if each.proof.layer == layer])
        _hold(f"layer {layer}", "pooled beta", beta, band, meant, problems)
        undecided |= band > UNDECIDED
    pooled, band = _pool(ordered)
    _hold("all modules", "pooled beta", pooled, band, meant, problems)
    undecided |= band > UNDECIDED
    return StaticProof(
        status="broken" if len(problems) else "undecided" if undecided else "ok",
        pooled=pooled,
        band=band,
        modules=tuple(each.proof for each in ordered),
        inert=tuple(inert),
        problems=tuple(problems),
    )


def _pool(members: Sequence[_Judged]) -> tuple[float, float]:
    """(beta, band) of several modules together, weighted with ‖ΔW‖²; their noise is independent."""
    total = sum(each.proof.weight for each in members)
    beta = sum(each.proof.beta * each.proof.weight for each in members) / total
    band = sum(each.pooled_band * each.proof.weight for each in members) / total
    noise = math.sqrt(sum((each.noise * each.proof.weight) ** 2 for each in members)) / total
    return beta, max(band, NOISE_SIGMAS * noise)


def _hold(
    where: str,
    what: str,
    beta: float,
    band: float,
    meant: float,
    problems: Problems,
    kind: str = "",
) -> None:
    if not abs(beta - meant) <= band:
        expected = f"{meant:g} within {band:.3g}" + (f" ({kind})" if kind else "")
        fix = _meaning(beta) if meant else "the delta is in there: this is no plain base"
        problems.add(where, what, expected, f"{beta:.3f}", fix)


def _order(kind: str) -> int:
    known = module_kinds()
    return known.index(kind) if kind in known else len(known)


def _meaning(beta: float) -> str:
    """What a beta that is not 1 usually means."""
    for value, text in (
        (0.0, "the delta is not in there, or in other rows: convert again"),
        (2.0, "the delta is in there twice: was the base merged already?"),
        (-1.0, "the delta has the wrong sign"),
    ):
        if abs(beta - value) < 0.15:
            return text
    return "the delta has another strength: alpha, rank, coefficient, a type too coarse, or another base"
