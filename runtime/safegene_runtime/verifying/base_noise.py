"""How much of an artifact's KL is the rounding of its base.

A sidecar, or an adapter beside an ONNX model, leaves the base as it is: the same engine runs it without
the adapter. Of a merged artifact it runs the control, if there is one (`control.py`). Along the same
replies of the reference, PyTorch's base was recorded as well. So

    base_kl = mean KL(PyTorch base || engine's base)        nats per position

is what the base's own rounding and the engine's arithmetic make of the same positions, and the ratio of
the artifact's KL to it says what the adapter adds: rounding shifts an adapted model by about as much as
its base. Below 8 bits, where the bounds of a class leave room for every base of that class, a ratio above
`RATIO` breaks the rung; docs/ladder.md says what lies on either side of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_runtime.engines.engine import Engine
from safegene_runtime.gating.bounds import BOUNDS, ParityBounds
from safegene_runtime.progress import Progress
from safegene_runtime.record.reference import Reference
from safegene_runtime.verifying import compare
from safegene_runtime.verifying.forced import reply_logits

__all__ = ["RATIO", "BaseNoise", "base_kl"]

PROMPTS = 32
"""As many of the prompts that ran, in the recorded order: a mean needs no more, and a pass costs time."""
FLOOR = 1e-9
"""Nats below which a KL is arithmetic, and no rounding to compare with; `f32` may have 1e-8."""
RATIO = 3.0
"""Times its base's own KL that an artifact may have: twice the largest of a genuine one."""
MIN_PROMPTS = 16
"""The mean of fewer prompts hangs on single ones: then the ratio is told, and breaks nothing."""
NEGLIGIBLE = BOUNDS["bf16"].mean_kl
"""Nats that break nothing, however little the base has: a sidecar's own factors may be rounded."""

KL = npt.NDArray[np.float64]


@dataclass(frozen=True)
class BaseNoise:
    """The artifact beside its own base, on the same positions.

    Attributes:
        prompts: how many were compared.
        base_kl: mean KL(PyTorch base || engine's base), nats per position.
        artifact_kl: mean KL(PyTorch base + adapter || artifact) there.
        ratio: the second over the first; None where the base is not rounded.
    """

    prompts: int
    base_kl: float
    artifact_kl: float
    ratio: float | None

    @classmethod
    def of(cls, base: Mapping[int, KL], artifact: Mapping[int, KL]) -> BaseNoise:
        """Compares the prompts of `base` with the same of `artifact`: (T,) nats by prompt."""
        below = float(np.concatenate(list(base.values())).mean())
        above = float(np.concatenate([artifact[index] for index in base]).mean())
        return cls(len(base), below, above, above / below if below > FLOOR else None)

    @property
    def unexplained(self) -> bool:
        """Whether the artifact has so much more than its base that rounding does not cause it."""
        return self.ratio is not None and self.ratio > RATIO

    def breaks(self, bounds: ParityBounds) -> bool:
        """Whether that is a mistake in a class whose own bounds would let it pass."""
        telling = self.prompts >= MIN_PROMPTS and self.artifact_kl > NEGLIGIBLE
        return self.unexplained and telling and not bounds.kl_gates

    @property
    def remark(self) -> str:
        """For the rung's line; empty where there is nothing to say."""
        if self.ratio is None:
            return ""
        found = f"; {self.ratio:.2g} times its base's own {self.base_kl:.2e}"
        much = ", so the base's rounding is not what causes it" if self.unexplained else ""
        return found + much

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def base_kl(
    engine: Engine,
    record: Reference,
    indices: Sequence[int],
    tell: Progress | None = None,
) -> dict[int, KL]:
    """KL(PyTorch base || engine) along the reference's replies: (T,) nats by prompt.

    Args:
        engine: the base, without the adapter.
        record: the reference.
        indices: which prompts may be taken; at most `PROMPTS` are, in the recorded order.
        tell: told (stage, done, total).

    Raises:
        EngineError: logits that are not finite, or missing for a prompt.
    """
    allowed = set(indices)
    chosen = [index for index in record.order() if index in allowed][:PROMPTS]
    found: dict[int, KL] = {}
    for index, logits in reply_logits(engine, record, chosen, "logits of the base"):
        position = record.positions(index)
        at_ids = np.take_along_axis(logits, position.top_ids.astype(np.int64), axis=1)
        found[index] = compare.kl_topk(
            position.base_logits, position.base_lse, at_ids, compare.logsumexp(logits)
        )
        if tell:
            tell("comparing the base", len(found), len(chosen))
    return found
