"""After quantisation: coefficients fitted to the file that ships, without gradients.

A quantised base, or a delta merged into one, answers a little differently from the float model the
coefficients were fitted on. Here the artifact itself is rebuilt with trial coefficients, run by its
own engine, and compared with the recorded PyTorch reference along the reference's replies:

    D(c) = mean over prompts of the mean KL(PyTorch || artifact(c)) per position, nats

which is what the ladder's fourth rung measures. No torch, and nothing but the engine protocol is
asked of the engine. `search` starts at the float coefficients, so the result is never worse on the
shots; whether it helps elsewhere is to be measured on other prompts.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from safegene_converter.adapter import read_adapter
from safegene_converter.gene.folder import Expression, add_expression, check_name_free, copy_with
from safegene_converter.gene.optimise import Settings, search
from safegene_converter.progress import Progress
from safegene_converter.to_gguf import ADAPTER_FILE, MODEL_FILE, convert
from safegene_runtime.engine import Engine, open_engine
from safegene_runtime.errors import GeneError, Problem
from safegene_runtime.forced import forced_passes
from safegene_runtime.reference import Reference

__all__ = ["Rebuild", "Recalibrated", "gguf_rebuild", "recalibrate_deployed"]

Rebuild = Callable[[dict[int, float]], Engine]
"""Layer coefficients -> an engine on the artifact that has them."""


@dataclass(frozen=True)
class Recalibrated:
    """What fitting to the artifact was worth on its shots; `before` and `after` are D, in nats."""

    name: str
    coefficients: dict[int, float]
    before: float
    after: float
    evaluations: int
    converged: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        found = asdict(self)
        found["coefficients"] = {str(layer): value for layer, value in self.coefficients.items()}
        return found


def recalibrate_deployed(
    gene: Path,
    reference: Reference,
    rebuild: Rebuild,
    name: str,
    *,
    expression: str | None = None,
    settings: Settings | None = None,
    max_evaluations: int = 60,
    default: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Recalibrated:
    """Fits coefficients to a deployed artifact and stores them as an expression of the gene.

    Args:
        gene: the adapter folder.
        reference: what PyTorch answers to the shots, with the gene as it was calibrated there.
        rebuild: makes the artifact for given coefficients, see `gguf_rebuild`.
        name: of the new expression.
        expression: the one to start from; the default when None.
        settings: its bounds are used.
        max_evaluations: how often the artifact may be rebuilt.
        default: make the new expression the default.
        force: replace an expression of this name.
        progress: told what is being done.

    Raises:
        GeneError: no evaluation is allowed, or logits are not finite.
        SafeGeneError: the artifact cannot be built or run; the gene is as it was.
    """
    tell: Progress = progress or (lambda stage, done, total: None)
    started = time.monotonic()
    if max_evaluations < 1:
        raise GeneError(Problem("calibrate", "evaluations", "at least 1", str(max_evaluations)))
    check_name_free(gene, name, force)
    adapter = read_adapter(gene, expression)
    start = {module.layer: module.coefficient for module in adapter.modules}
    layers = sorted(start)

    def distance(point: npt.NDArray[np.float64]) -> float:
        with rebuild(dict(zip(layers, point.tolist(), strict=True))) as engine:
            passes = forced_passes(engine, reference)
        return float(np.mean([one.kl.mean() for one in passes]))

    found = search(
        distance,
        np.array([start[layer] for layer in layers]),
        (settings or Settings()).bounds,
        max_evaluations,
        lambda done: tell("rebuilding the artifact", done, max_evaluations),
    )
    coefficients = dict(zip(layers, found.coefficients.tolist(), strict=True))
    shots = len(reference.prompts)
    add_expression(
        gene, name, Expression(coefficients, f"{adapter.target or 'the target'}, as deployed", shots),
        force=force, default=default,
    )  # fmt: skip
    return Recalibrated(
        name=name,
        coefficients=coefficients,
        before=found.history[0],
        after=found.value,
        evaluations=len(found.history),
        converged=found.converged,
        seconds=time.monotonic() - started,
    )


@contextlib.contextmanager
def gguf_rebuild(
    gene: Path,
    base: Path,
    form: Literal["sidecar", "merged"],
    type_name: str = "auto",
    threads: int | None = None,
) -> Iterator[Rebuild]:
    """A GGUF artifact for any coefficients, inside a `with`.

    Args:
        gene: the adapter folder.
        base: the GGUF base; for `merged` also a Hugging Face folder.
        form: `sidecar` or `merged`.
        type_name: as in `convert`.
        threads: of the engine.
    """
    # beside the gene: its vectors are hard-linked into every trial
    with tempfile.TemporaryDirectory(prefix=f".{gene.name}.", dir=gene.absolute().parent) as name:
        work = Path(name)

        def rebuild(coefficients: dict[int, float]) -> Engine:
            for old in work.iterdir():
                shutil.rmtree(old)
            trial = copy_with(gene, work / "gene", coefficients)
            out = work / "artifact"
            convert(trial, base, out, form=form, type_name=type_name, check=False)
            if form == "sidecar":
                return open_engine(base, out / ADAPTER_FILE, threads=threads)
            return open_engine(out / MODEL_FILE, threads=threads)

        yield rebuild
