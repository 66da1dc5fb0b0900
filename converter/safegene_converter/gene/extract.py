"""Extraction: V_m = W_aligned,m - W_degraded,m for each linear module, cut to a rank or an energy."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from safegene_converter.gene.checkpoint import Checkpoint, identity
from safegene_converter.gene.consensus import ESTIMATORS, shared, shared_dense
from safegene_converter.gene.folder import base_model_of, write_gene
from safegene_converter.gene.low_rank import (
    Factors,
    Truncated,
    combine,
    svd_of_dense,
    svd_of_factors,
    truncate,
)
from safegene_converter.gene.sources import Source, open_sources
from safegene_runtime.errors import GeneError, Problem, Problems
from safegene_runtime.formats.publish import check_output_free, publish_folder
from safegene_runtime.progress import Progress, silent

__all__ = ["Extracted", "ModuleReport", "discrepancies", "extract"]


@dataclass(frozen=True)
class ModuleReport:
    """What was kept of one module.

    Attributes:
        rank: of the factors; 0: the models agree here, and nothing is stored.
        energy: share of the squared norm that is kept.
        norm: Frobenius norm of the discrepancy, before anything was cut.
    """

    name: str
    rank: int
    energy: float
    norm: float


@dataclass(frozen=True)
class Extracted:
    """The result of an extraction.

    Attributes:
        method: `low-rank` or `dense`.
        energy: share of the squared norm of all modules together that is kept.
    """

    out: Path
    method: str
    estimator: str
    modules: tuple[ModuleReport, ...]
    n_parameters: int
    energy: float

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        found = asdict(self)
        found["out"] = str(self.out)
        return found


def extract(
    aligned: Path | Sequence[Path],
    degraded: Sequence[Path],
    out: Path,
    *,
    base: Path | None = None,
    rank: int | None = 8,
    energy: float | None = None,
    estimator: str = "mean",
    force: bool = False,
    progress: Progress | None = None,
) -> Extracted:
    """Extracts a gene and writes it as an adapter folder, every coefficient 1.

    Args:
        aligned: a Hugging Face folder (or a GGUF), or an adapter folder.
        degraded: fine-tunes of it that lost safety; of several, the shared part is kept.
        out: the folder to create.
        base: what adapters among them belong to.
        rank: the largest rank per module; None with `energy` only.
        energy: stop at this share of a module's squared norm.
        estimator: `mean`, `pca` or `sign`: what counts as shared.
        force: replace an existing `out`.
        progress: told what is being done.

    Raises:
        GeneError: models that do not fit together, or no discrepancy at all; nothing is written.
    """
    tell: Progress = progress or silent
    goods = [Path(aligned)] if isinstance(aligned, str | Path) else [Path(one) for one in aligned]
    bads = [Path(path) for path in degraded]
    inputs = [*goods, *bads, *([base] if base else [])]
    check_output_free(out, force, inputs)
    if estimator not in ESTIMATORS:
        raise GeneError(
            Problem("extract", "estimator", f"one of {', '.join(ESTIMATORS)}", repr(estimator))
        )
    truncate((np.eye(1), np.ones(1), np.eye(1)), rank, energy)  # refuses bad options before work
    pairs, low_rank = open_sources(goods, bads, base)
    request = {
        "inputs": [identity(path) for path in inputs],
        "rank": rank,
        "energy": energy,
        "estimator": estimator,
    }
    checkpoint = Checkpoint(out.absolute().with_name(f".{out.name}.extract"), request)
    names = sorted(pairs[0][0].base.shapes)
    kept: dict[str, Factors] = {}
    reports = []
    differs = np.zeros(len(pairs), dtype=bool)
    for done, name in enumerate(names):
        tell("extracting", done, len(names))
        found = checkpoint.load(name)
        if found is None:
            one, moved = _module(pairs, name, low_rank, estimator, rank, energy)
            found = {
                "b": one.factors.b, "a": one.factors.a, "energy": np.array(one.energy),
                "norm": np.array(one.norm), "moved": moved,
            }  # fmt: skip
            checkpoint.save(name, **found)
        differs |= found["moved"]
        reports.append(
            ModuleReport(name, len(found["a"]), float(found["energy"]), float(found["norm"]))
        )
        if len(found["a"]):
            kept[name] = Factors(found["b"], found["a"])
    tell("extracting", len(names), len(names))
    problems = Problems()
    for (good, bad), moved_at_all in zip(pairs, differs, strict=True):
        if not moved_at_all:
            problems.add(str(bad.path), "weights", f"others than those of {good.path}",
                         "the same in every linear module, so there is no discrepancy",
                         "pass the model that lost its safety")  # fmt: skip
    if not kept and not problems:
        problems.add("extract", "shared part", "a discrepancy that the models share", "none",
                     "pass models that lost safety in a similar way")  # fmt: skip
    problems.raise_if_any(GeneError)
    with publish_folder(out, force) as folder:
        adapter = write_gene(folder, kept, base_model_of(pairs[0][0].base))
    checkpoint.clear()
    total = sum(report.norm**2 for report in reports)
    return Extracted(
        out=out,
        method="low-rank" if low_rank and (len(pairs) == 1 or estimator != "sign") else "dense",
        estimator=estimator,
        modules=tuple(reports),
        n_parameters=adapter.n_parameters,
        energy=sum(report.energy * report.norm**2 for report in reports) / total,
    )


def discrepancies(pairs: Sequence[tuple[Source, Source]], name: str) -> list[Factors]:
    """W_aligned,t - W_degraded,t of one module as factors, where both of a pair are on one base."""
    return [combine([good.factors(name), bad.factors(name)], [1.0, -1.0]) for good, bad in pairs]


def _module(
    pairs: Sequence[tuple[Source, Source]],
    name: str,
    low_rank: bool,
    estimator: str,
    rank: int | None,
    energy: float | None,
) -> tuple[Truncated, np.ndarray]:
    """The truncated shared part of one module, and which pairs differ in it, (T,) bool."""
    if low_rank:
        parts = discrepancies(pairs, name)
        moved = np.array([bool(svd_of_factors(part)[1].any()) for part in parts])
        joint = shared(parts, estimator)
        svd = svd_of_factors(joint) if isinstance(joint, Factors) else svd_of_dense(joint)
    else:
        weight = functools.cache(lambda source: source.weight(name))  # the aligned one of all pairs
        stack = np.stack([weight(good) - weight(bad) for good, bad in pairs])
        moved = np.array([bool(one.any()) for one in stack])
        svd = svd_of_dense(shared_dense(stack, estimator) if len(pairs) > 1 else stack[0])
    return truncate(svd, rank, energy), moved
