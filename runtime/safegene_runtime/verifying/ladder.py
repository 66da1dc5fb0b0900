"""Refusal parity, as a ladder: each rung is dearer than the one below, and the first to break is named.

    integrity   the folder is what its manifest says; the adapter is the reference's
    static      the recorded delta is in the stored weights, once (beta_W = 1), without inference
    text        chat template byte for byte, token ids id for id, no double BOS
    active      logits moved away from the base, by what the reference moved (beta = 1)
    logits      KL(PyTorch || artifact) and top-1 agreement on the reference's continuations
    refusals    greedy replies, judged, paired with the reference's, and gated

`active` and `logits` share one teacher-forced pass. It also proves most of `refusals` (`replies.py`).
A rung that breaks is FAIL, whatever comes above; else the gate decides, and it is VACUOUS where the
base would pass it too.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safegene_runtime.artifact.base_proof import proof_words
from safegene_runtime.artifact.integrity import check_integrity
from safegene_runtime.artifact.manifest import Manifest, read_manifest
from safegene_runtime.cpus import thread_count
from safegene_runtime.engines.registry import engine_for, open_engine
from safegene_runtime.errors import ManifestError
from safegene_runtime.formats.files import StrPath
from safegene_runtime.formats.gguf.model import open_model
from safegene_runtime.formats.sealed import SealedFiles
from safegene_runtime.gating.gate import Profile
from safegene_runtime.judging.judge import Judge, RulesAndNgram
from safegene_runtime.judging.labels import check_labels
from safegene_runtime.progress import Progress, silent
from safegene_runtime.record.attacks import attack_names
from safegene_runtime.record.reference import Reference, read_reference
from safegene_runtime.verifying.climb import Climb, Mode
from safegene_runtime.verifying.control import check_control, check_takes_control
from safegene_runtime.verifying.report import Report, Rung
from safegene_runtime.verifying.request import VerifyRequest

__all__ = ["Mode", "verify", "verify_each"]


def verify(
    artifact: StrPath,
    reference: StrPath | Reference,
    *,
    base: StrPath | None = None,
    control: StrPath | None = None,
    profile: str | Profile = "smoke",
    sequential: bool = False,
    attacks: Sequence[str] = (),
    mode: Mode = "strict",
    judge: Judge | str | None = None,
    threads: int | None = None,
    engine: str | None = None,
    write: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Climbs the ladder for one artifact.

    Args:
        artifact: a folder made by `safegene convert`.
        reference: a folder made by `safegene record`, or one that was read.
        base: for a sidecar, the GGUF it belongs to; checked against the manifest.
        control: for a merged GGUF, its plain base, quantised the same way: below 8 bits the KL is then
            held against that base's own; shown to be that base, see `control`.
        profile: how much must be shown: `smoke`, `ci`, `release`, or a profile of your own.
        sequential: take the prompts in their recorded order and stop when it is decided.
        attacks: names of attacks to gate under, too, as they were recorded; `all` for all of them.
        mode: `strict` compares arithmetic (F32 KV cache), `as-shipped` runs llama.cpp as people do.
        judge: what labels replies, or its name; the reference's own is needed. The built-in one by default.
        threads: CPU threads of the engine; all by default.
        engine: the name of one; by default the artifact's suffix decides.
        write: put the verdict into the artifact's manifest.
        progress: told (stage, done, total).

    Raises:
        RecordError: a reference that is malformed, edited, of another adapter, expression or judge, or
            holds no attacks.
        BaseModelError: a control that is not the artifact's base without the adapter.
        SafeGeneError: it could not be checked, which is no verdict.
    """
    request = VerifyRequest(
        reference if isinstance(reference, Reference) else Path(reference),
        (Path(artifact),),
        base=None if base is None else Path(base),
        control=None if control is None else Path(control),
        profile=profile,
        sequential=sequential,
        attacks=attacks,
        mode=mode,
        judge=judge,
        threads=threads,
        engine=engine,
        write=write,
    )
    ((_, report),) = verify_each(request, progress)
    return report


def verify_each(
    request: VerifyRequest, progress: Progress | None = None
) -> Iterator[tuple[str, Report]]:
    """Climbs the ladder for every artifact of a request, and yields each with its label.

    Raises:
        SafeGeneError: as from `verify`.
    """
    given, tell = request.reference, progress or silent
    record = given if isinstance(given, Reference) else read_reference(given)
    judge = request.judge
    if isinstance(judge, str):
        from safegene_runtime.judging.plugins import load_judge  # most need none

        judge = load_judge(judge)
    # of several, the last must not be the first that turns out to have no manifest
    manifests = [read_manifest(artifact) for artifact in request.artifacts]
    for label, artifact, manifest in zip(request.labels, request.artifacts, manifests, strict=True):
        told = tell if len(manifests) == 1 else _named(tell, label)
        yield label, _verify(request, artifact, manifest, record, judge or RulesAndNgram(), told)


def _named(tell: Progress, label: str) -> Progress:
    return lambda stage, done, total: tell(f"{label}: {stage}", done, total)


def _verify(
    request: VerifyRequest,
    artifact: Path,
    manifest: Manifest,
    record: Reference,
    judge: Judge,
    tell: Progress,
) -> Report:
    began = time.monotonic()
    names = attack_names(request.attacks)
    check_labels(record, judge)
    chosen = record.under(names)
    if request.control is not None:
        check_takes_control(manifest, request.control)
    climb = Climb(
        artifact, manifest, record, judge, request.profile, request.mode, chosen, tell, began
    )
    with SealedFiles() as files:
        report = _climb(climb, request, files)
    if request.write and climb.served is not None:
        found = report.for_manifest(record.meta["decoding"]["stop_ids"])
        manifest.with_verification(found).write(artifact)
    return report


def _climb(climb: Climb, request: VerifyRequest, files: SealedFiles) -> Report:
    """The rungs from integrity to refusals; what is run was kept in `files` when it was checked."""
    manifest, record, control = climb.manifest, climb.record, request.control
    base = request.base_of(manifest.form)
    try:
        climb.served = check_integrity(manifest, climb.artifact, record, base, climb.tell, files)
    except ManifestError as error:
        climb.add(
            Rung(
                "integrity",
                "broken",
                str(error.problems[0]),
                {"problems": [str(problem) for problem in error.problems]},
            )
        )
        return climb.report()
    detail = f"{len(manifest.files)} file(s), every byte as listed"
    proof = manifest.base.get("proof")
    detail += f"; {proof_words(proof)}"
    figures: dict[str, Any] = {"base_proof": proof}
    if control is not None:
        for shard in open_model(control).shards:
            files.add(shard.path, follow_symlinks=True, alone=False)
        figures["control"] = check_control(
            manifest, climb.served.model, control, record, climb.tell
        )
        detail += f"; {control.name} is its base without the adapter"
    climb.add(Rung("integrity", "ok", detail, figures))
    climb.static()
    kind = engine_for(climb.served.model, request.engine)
    settings: dict[str, Any] = {
        "engine": kind.name,
        "apart": True,
        "threads": thread_count(request.threads),
        **kind.modes.get(climb.mode, {}),
    }
    climb.tell("loading the artifact", 0, 1)
    opened = time.monotonic()
    with open_engine(climb.served.model, climb.served.adapter, **settings) as running:
        climb.engine_seconds += time.monotonic() - opened
        climb.tell("loading the artifact", 1, 1)
        climb.about = {
            "name": running.name,
            "version": running.version,
            "settings": dict(running.settings),
        }
        climb.text(running)
        if request.sequential:
            climb.sequentially(running)
        else:
            climb.run(running, climb.chosen)
    plain = control if climb.served.adapter is None else climb.served.model
    if plain is not None and climb.runs:
        opened = time.monotonic()
        with open_engine(plain, None, **settings) as running:
            climb.base(running)
        climb.engine_seconds += time.monotonic() - opened
    climb.compare()
    climb.gate(request.sequential)
    return climb.report()
