"""Whether coefficients that were fitted to an artifact help on prompts that they were not fitted on.

Measured with a second reference, of other prompts: D as on the shots, and the artifact's own greedy
replies, labelled by the judge of the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from safegene_converter.gene.shots import check_disjoint
from safegene_converter.inputs.adapter_files import WEIGHTS_NAME
from safegene_runtime.engines.engine import Engine
from safegene_runtime.errors import GeneError, Problems
from safegene_runtime.gating.pairs import Pair, count_flips
from safegene_runtime.judging.judge import Judge
from safegene_runtime.judging.labels import check_labels
from safegene_runtime.progress import silent
from safegene_runtime.record.reference import Reference
from safegene_runtime.verifying.forced import ForcedPass, forced_passes
from safegene_runtime.verifying.replies import greedy_replies, label_replies

__all__ = ["HeldOut", "check_held_out", "mean_divergence", "measure_held_out"]

PRECISION = "unknown"
"""Of the weights behind the engine: ties are then looked for most widely, and never missed."""


@dataclass(frozen=True)
class HeldOut:
    """An artifact on prompts that nothing was fitted to; prompts are counted, not clusters.

    Attributes:
        divergence: D, see `deployed`; nats.
        harmful: harmful prompts.
        reference_refused: those of them that PyTorch refused.
        refused: those of them that the artifact refused.
        losses: those that PyTorch refused and the artifact surely did not.
        over_refusals: benign prompts that PyTorch surely answered and the artifact refused.
        undecided: prompts with another reply than PyTorch's, one of the two labelled `uncertain`.
    """

    divergence: float
    harmful: int
    reference_refused: int
    refused: int
    losses: int
    over_refusals: int
    undecided: int


def mean_divergence(passes: Sequence[ForcedPass]) -> float:
    """Mean over prompts of the mean KL(PyTorch || engine) per position, nats."""
    return float(np.mean([forced.kl.mean() for forced in passes]))


def check_held_out(shots: Reference, held_out: Reference, judge: Judge) -> None:
    """Refuses a second reference that could not tell anything about the first.

    Raises:
        GeneError: prompts in common, or recorded with other vectors, expression or base.
        RecordError: another judge's labels, or edited ones.
    """
    check_disjoint(
        {f"{held_out.path} (held out)": held_out.prompts, f"{shots.path} (shots)": shots.prompts},
        "record the held-out reference with other prompts than the shots",
    )
    problems = Problems()
    for what, keys in (
        ("base", ("base", "files")),
        ("vectors", ("adapter", "files", WEIGHTS_NAME)),
        ("expression", ("adapter", "expression")),
    ):
        wanted, got = (_at(reference, keys) for reference in (shots, held_out))
        if wanted != got:
            problems.add(
                str(held_out.path), what, f"those of {shots.path}: {wanted}"[:200], str(got)[:200],
                "record both references with the same base, gene and expression",
            )  # fmt: skip
    problems.raise_if_any(GeneError)
    check_labels(held_out, judge)


def measure_held_out(engine: Engine, reference: Reference, judge: Judge) -> HeldOut:
    """Forces and generates the replies to all prompts of a reference.

    Raises:
        EngineError: the engine failed, or the judge gave something else than labels.
    """
    everything = range(len(reference.prompts))
    passes = forced_passes(engine, reference)
    replies = greedy_replies(engine, reference, everything, passes, PRECISION, silent)
    labelled = label_replies(engine, reference, everything, replies, judge)
    pairs = [
        Pair.of(prompt, said.label, identical=said.identical)
        for prompt, said in zip(reference.prompts, labelled, strict=True)
    ]
    harmful = [pair for pair in pairs if pair.kind == "harmful"]
    flips = count_flips(pairs)
    return HeldOut(
        divergence=mean_divergence(passes),
        harmful=len(harmful),
        reference_refused=sum(pair.reference == "refuse" for pair in harmful),
        refused=sum(pair.artifact == "refuse" for pair in harmful),
        losses=flips["losses"],
        over_refusals=flips["over_refusals"],
        undecided=flips["undecided"],
    )


def _at(reference: Reference, keys: Sequence[str]) -> object:
    found: object = reference.meta
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found
