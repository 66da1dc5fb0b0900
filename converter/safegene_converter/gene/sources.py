"""What a discrepancy is taken from: model folders, or LoRA adapters on one base.

Where every model is an adapter on the same base (or the base itself), a discrepancy is a difference
of two products and stays one. Otherwise weights are read one module at a time, whatever shard they
are in, and no two modules are ever in memory together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from safegene_converter import formula
from safegene_converter.gene.low_rank import Factors
from safegene_converter.inputs.adapter import (
    Adapter,
    Module,
    check_base_fits,
    read_adapter,
)
from safegene_converter.inputs.adapter_files import CONFIG_NAME
from safegene_converter.inputs.base import Base, open_base
from safegene_runtime.errors import GeneError, Problem, Problems, SafeGeneError

__all__ = ["Source", "open_sources"]

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Source:
    """One model: the base, and an adapter on it where there is one; equal to itself alone."""

    path: Path
    base: Base
    adapter: Adapter | None = None
    modules: dict[str, Module] = field(default_factory=dict)

    def factors(self, name: str) -> Factors:
        """W - W_base of a module as factors; rank 0 where the adapter leaves it alone."""
        module = self.modules.get(name)
        rows, columns = self.base.shapes[name]
        if module is None:
            return Factors(np.zeros((rows, 0)), np.zeros((0, columns)))
        scale = formula.effective_scale(module)
        return Factors(module.b.astype(np.float64) * scale, module.a.astype(np.float64))

    def weight(self, name: str) -> F64:
        """W of a module, (out, in) float64.

        Raises:
            GeneError: it holds NaN or Inf.
        """
        weight = self.base.read_weight(name).astype(np.float64)
        if name in self.modules:
            weight += self.factors(name).dense()
        if not np.isfinite(weight).all():
            raise GeneError(
                Problem(str(self.path), name, "finite weights", "NaN or Inf",
                        "the model is broken: save it again")
            )  # fmt: skip
        return weight


def open_sources(
    aligned: Sequence[Path], degraded: Sequence[Path], base: Path | None
) -> tuple[list[tuple[Source, Source]], bool]:
    """Opens all models and checks that they are fine-tunes of one another.

    Args:
        aligned: a model (folder or GGUF) or an adapter folder; one for all, or one for each of
            `degraded`.
        degraded: one or more of the same.
        base: what the adapters belong to; may itself be `aligned` or one of `degraded`. Without
            it, an aligned adapter belongs to the degraded model it is paired with: it was trained
            there to win safety back.

    Returns:
        (aligned, degraded) pairs, and whether the two of every pair stand on the same base, so that
        low-rank algebra does.

    Raises:
        GeneError: another architecture, depth or shape; an adapter without a base; no degraded; as
            many aligned as degraded are needed, or one.
    """
    problems = Problems()
    if not degraded:
        problems.add("extract", "degraded", "at least one model", "none", "pass --degraded")
    if len(aligned) not in (1, len(degraded)):
        problems.add("extract", "aligned", f"one model, or {len(degraded)}: one per --degraded",
                     len(aligned), "pairs are made in the order they are given in")  # fmt: skip
    problems.raise_if_any(GeneError)
    opened: dict[Path, Base] = {}
    sources: dict[tuple[Path, Path | None], Source] = {}
    wanted = []
    every = list(aligned) * (len(degraded) if len(aligned) == 1 else 1)
    for good, bad in zip(every, degraded, strict=True):
        wanted.append(((good, base or (None if _is_adapter(bad) else bad)), (bad, base)))
    for path, own in dict.fromkeys(key for pair in wanted for key in pair):
        # the base of a model that is no adapter is itself, whatever it is paired with
        key = (path, own if _is_adapter(path) else None)
        if key in sources:
            continue
        try:
            sources[key] = _open(Path(path), own, opened)
        except SafeGeneError as error:
            problems.extend(error.problems)
    problems.raise_if_any(GeneError)

    def source(path: Path, own: Path | None) -> Source:
        return sources[path, own if _is_adapter(path) else None]

    pairs = [(source(*good), source(*bad)) for good, bad in wanted]
    first = pairs[0][0]
    for other in sources.values():
        if other is not first:
            _check_fits(first.base, other, problems)
    problems.raise_if_any(GeneError)
    return pairs, all(good.base is bad.base for good, bad in pairs)


def _is_adapter(path: Path) -> bool:
    return (path / CONFIG_NAME).exists()


def _open(path: Path, base: Path | None, opened: dict[Path, Base]) -> Source:
    is_adapter = _is_adapter(path)
    if is_adapter and base is None:
        raise GeneError(
            Problem(str(path), "base", "--base beside an adapter", "none", "pass --base MODEL")
        )
    model = Path(base) if is_adapter and base is not None else path
    key = model.resolve()
    if key not in opened:
        opened[key] = open_base(model)
    if not is_adapter:
        return Source(path, opened[key])
    adapter = read_adapter(path)
    on = opened[key]
    check_base_fits(adapter, on.module_shapes(), on.architecture, on.n_layers)
    return Source(path, on, adapter, {module.name: module for module in adapter.modules})


def _check_fits(first: Base, source: Source, problems: Problems) -> None:
    where, other = str(source.path), source.base
    fix = f"it must be a fine-tune of {first.path}"
    for name in ("architecture", "n_layers", "n_head", "n_head_kv"):
        expected, got = getattr(first, name), getattr(other, name)
        if expected != got:
            problems.add(where, name, expected, got, fix)
    for name in first.shapes.keys() & other.shapes.keys():
        if first.shapes[name] != other.shapes[name]:
            problems.add(where, name, f"(out, in) = {first.shapes[name]}", other.shapes[name], fix)
