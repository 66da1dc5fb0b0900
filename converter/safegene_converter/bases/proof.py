"""The plain base, before and after its format was changed: the same logits, or it is refused.

Two conversions that are wrong alike agree with each other. So the whole model runs in the engine of its
source (PyTorch for a Hugging Face folder, llama.cpp for a GGUF) and in that of its target, along the same
tokens, and the KL is held to the bound of the target's type. Where a GGUF is half-wide or quantised,
llama.cpp rounds activations too, so a copy of it in F32 runs instead, as long as that is small.

The longest prompt reaches past the sliding window and the original context of scaled rotary embeddings, as
far as the model can go and the cost allows. Every engine runs in a child process; with
`python -m safegene_converter.bases.proof` as the one of llama.cpp and ONNX Runtime.
"""

from __future__ import annotations

import ctypes
import math
import os
import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from safegene_converter.inputs.base import Base
from safegene_converter.inputs.consumed import rope_of, window_of
from safegene_runtime.architecture.table import arithmetic_of
from safegene_runtime.artifact.base_proof import BaseProof
from safegene_runtime.artifact.integrity import model_precision
from safegene_runtime.child import answer_job, deadline_for, run_job
from safegene_runtime.engines.engine import Engine
from safegene_runtime.engines.llama_native import library
from safegene_runtime.engines.registry import open_engine
from safegene_runtime.errors import BaseModelError, EngineError, Problem
from safegene_runtime.formats.gguf.model import GGUFModel
from safegene_runtime.formats.gguf.types import GGMLType
from safegene_runtime.gating.bounds import bounds_for
from safegene_runtime.progress import Progress
from safegene_runtime.verifying.compare import logsumexp

__all__ = [
    "F32_BYTES", "Answer", "Asked", "Reach", "answer_proof", "ask_engine", "gguf_side", "kept", "onnx_side",
    "prove_base", "reach_of", "torch_side",
]  # fmt: skip

STAGE = "proving the base"
TEXTS = (
    "The capital of Norway is Oslo, and in winter the harbour seldom freezes.",
    "def area(width: float, height: float) -> float:\n    return width * height  # 3 * 4 = 12\n",
    "Wie spät ist es? Um 17:45 Uhr fährt der letzte Bus; danach geht man zu Fuß.",
    "Take two eggs, 100 g of sugar and a little salt. Beat them until the mixture is pale.",
)
SHORT = 40
"""Tokens of a short prompt, at most."""
TAIL = 32
"""Tokens past what the longest prompt is to reach; its last ones are compared."""
LONGEST = 16384
FEW = 512
COST = 2e13
"""Floating-point operations that the longest prompt may cost: some minutes on two cores."""
F32_BYTES = 8 << 30
"""Largest F32 copy of a GGUF that is made for a proof."""

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Answer:
    """What one engine says.

    Attributes:
        engine: its name, with version.
        ids: the prompts.
        logits: for each the last ones, float32 (kept, vocabulary), see `kept`.
    """

    engine: str
    ids: list[list[int]]
    logits: list[F32]

    @staticmethod
    def of(
        engine: str,
        tokenize: Callable[[str], list[int]],
        logits: Callable[[Sequence[int], int], F32],
        ids: list[list[int]] | None,
        length: int,
    ) -> Answer:
        """Asks an engine, prompt by prompt; it tokenises them where `ids` is None."""
        if ids is None:
            ids = _prompts(tokenize, length)
        return Answer(engine, ids, [logits(row, kept(row)) for row in ids])


Asked = Callable[[list[list[int]] | None, int], Answer]
"""One side of a proof: (prompts or None, tokens of the longest prompt) -> what it says."""


def kept(ids: Sequence[int]) -> int:
    """Of how many last tokens of a prompt the logits are compared."""
    return min(len(ids), SHORT + TAIL)


def _prompts(tokenize: Callable[[str], list[int]], length: int) -> list[list[int]]:
    """Four short prompts, and one of `length` tokens where that is longer."""
    short = [tokenize(text)[: min(SHORT, length)] for text in TEXTS]
    if length <= max(map(len, short)):
        return short
    shuffled = random.Random(0)
    long: list[int] = []
    while len(long) < length:
        # words in ever new order, so that no token is the obvious one
        words = " ".join(TEXTS).split(" ")
        shuffled.shuffle(words)
        long += tokenize(" ".join(words))
    return [*short, long[:length]]


@dataclass(frozen=True)
class Reach:
    """How long the longest prompt is, and why.

    Attributes:
        length: in tokens.
        why: what it is to reach, and whether it does.
    """

    length: int
    why: str


def reach_of(base: Base, limit: int | None = None) -> Reach:
    """What of a base shows only in long prompts, and how long a prompt may be.

    Args:
        base: the source.
        limit: tokens that the target takes; the base's own context length when None.
    """
    marks: dict[str, int] = {}
    if base.config is not None:
        kind, rope = rope_of(base.config)
        original = rope.get("original_max_position_embeddings") or base.config.get(
            "original_max_position_embeddings"
        )
        if kind != "default" and type(original) is int:
            marks[f"original context of {kind} rope"] = original
        window = window_of(base.config)
        if window is not None:
            marks["sliding window"] = window
    elif base.model is not None:
        stated = base.model.get(f"{base.architecture}.rope.scaling.original_context_length")
        if type(stated) is int:
            marks["original context of scaled rope"] = stated
    wanted = max([SHORT, *marks.values()]) + TAIL
    room = min(
        LONGEST, max(FEW, int(COST / (2 * max(1, base.n_parameters)))), limit or base.context_length or FEW
    )  # fmt: skip
    length = min(wanted, room)
    told = [
        f"{'past' if length > mark else 'not past'} the {what} of {mark}"
        for what, mark in marks.items()
    ]
    return Reach(length, f"{length} tokens" + "".join(f", {one}" for one in told))


def prove_base(
    source: Asked,
    target: Asked,
    *,
    precision: str,
    reach: Reach,
    where: str,
    tell: Progress,
    why: str = "",
) -> BaseProof:
    """Runs the plain base on both sides and compares.

    Args:
        source: the engine that is right.
        target: the engine that runs what was made of it.
        precision: the class of the target's weights, which says how far rounding may move it.
        reach: of `reach_of`.
        where: the base, for the message.
        tell: told how far it is.
        why: what else is to be known of the target.

    Raises:
        BaseModelError: other logits than rounding explains, NaN, or another vocabulary.
        SafeGeneError: an engine failed.
    """
    tell(STAGE, 0, 2)
    meant = source(None, reach.length)
    tell(STAGE, 1, 2)
    made = target(meant.ids, reach.length)
    tell(STAGE, 2, 2)
    kls = []
    for ours, theirs in zip(meant.logits, made.logits, strict=True):
        if ours.shape != theirs.shape:
            raise BaseModelError(
                Problem(
                    where, "vocabulary", f"{ours.shape[1]} tokens, as in {meant.engine}",
                    f"{theirs.shape[1]} in {made.engine}", "tokenizer and model do not fit",
                )
            )  # fmt: skip
        kls.append(_kl(ours, theirs))
    every = np.concatenate(kls)
    bound = bounds_for(precision).kl_ceiling
    proof = BaseProof(
        source=meant.engine,
        target=made.engine,
        prompts=len(kls),
        positions=len(every),
        longest=max(map(len, meant.ids)),
        kl_mean=float(every.mean()),
        kl_worst=max(float(one.mean()) for one in kls),
        kl_max=float(every.max()),
        bound=bound,
        why=f"{why}{precision} weights; {reach.why}",
    )
    if not proof.kl_worst <= bound:
        got = (
            f"mean KL {proof.kl_worst:.2g} in one of {len(kls)} prompts, {proof.kl_max:.2g} at most"
        )
        if not np.isfinite(every).all():
            got = "NaN or Inf"
        raise BaseModelError(
            Problem(
                where, "logits of the plain base",
                f"those of {meant.engine} in {made.engine}: mean KL at most {bound:g} ({proof.why})",
                got, "the base did not survive the change of format: use another base or target",
            )
        )  # fmt: skip
    return proof


def _kl(ours: F32, theirs: F32) -> npt.NDArray[np.float64]:
    """KL(ours || theirs) in nats, (T, V) twice -> (T,)."""
    found = np.empty(len(ours))
    lse_ours, lse_theirs = logsumexp(ours), logsumexp(theirs)
    for at in range(len(ours)):
        log_p = ours[at].astype(np.float64) - lse_ours[at]
        log_q = theirs[at].astype(np.float64) - lse_theirs[at]
        p = np.exp(log_p)
        # p log(p/q) - p + q is >= 0 for every token: no cancellation near equality
        found[at] = (p * (log_p - log_q) - p + np.exp(log_q)).sum()
    return np.maximum(found, 0.0)


# --- the sides


def torch_side(folder: Path) -> Asked:
    """A Hugging Face folder in PyTorch, in a child process."""
    return _child("safegene_converter.recording.base_child", folder, "PyTorch")


def onnx_side(model: Path) -> Asked:
    """An ONNX decoder in ONNX Runtime, in a child process."""
    return _child("safegene_converter.bases.proof", model, "ONNX Runtime")


def gguf_side(model: GGUFModel) -> tuple[Asked, str]:
    """A GGUF in llama.cpp, in a child process, and the class of the weights that run.

    A small one that is not in F32 runs as a copy in F32, by llama.cpp's own decoder.
    """
    kinds = {info.type for info in model.tensors.values()}
    elements = sum(math.prod(info.shape) for info in model.tensors.values())
    copied = kinds != {GGMLType.F32} and 4 * elements <= F32_BYTES
    architecture = model.get("general.architecture")
    precision = arithmetic_of(architecture) if copied else model_precision(model)
    side = _child(
        "safegene_converter.bases.proof", model.shards[0].path, "llama.cpp", copied=copied
    )
    return side, precision


def _child(module: str, model: Path, engine: str, *, copied: bool = False) -> Asked:
    def ask(ids: list[list[int]] | None, length: int) -> Answer:
        with tempfile.TemporaryDirectory(prefix="safegene-") as folder:
            job: dict[str, Any] = {
                "model": str(model), "ids": ids, "length": length, "copied": copied,
                "out": str(Path(folder) / "logits.npy"),
            }  # fmt: skip
            told = run_job(
                module, job, what=f"{engine} on {model}", error=BaseModelError,
                deadline_s=deadline_for(model),
            )  # fmt: skip
            rows = np.load(str(job["out"]))
            ends = np.cumsum([kept(row) for row in told["ids"]])[:-1]
            return Answer(told["engine"], told["ids"], np.split(rows, ends))

    return ask


def answer_proof(job: dict[str, Any], asked: Asked) -> dict[str, Any]:
    """The child's side of `torch_side` and its like."""
    answer = asked(job["ids"], job["length"])
    np.save(job["out"], np.concatenate(answer.logits))
    return {"engine": answer.engine, "ids": answer.ids}


def _run(job: dict[str, Any]) -> dict[str, Any]:
    path = Path(job["model"])
    if job["copied"]:
        path = _in_f32(path, Path(job["out"]).with_name("f32.gguf"))
    with open_engine(path) as engine:
        return answer_proof(job, ask_engine(engine))


def ask_engine(engine: Engine) -> Asked:
    """An open engine as one side of a proof."""

    def tokenize(text: str) -> list[int]:
        return engine.tokenize(text, add_special=False)

    def logits(ids: Sequence[int], keep: int) -> F32:
        _, rows = next(iter(engine.logits([ids], [keep])))
        return np.array(rows, np.float32)

    name = f"{engine.name} {engine.version}"
    return lambda ids, length: Answer.of(name, tokenize, logits, ids, length)


def _in_f32(path: Path, out: Path) -> Path:
    """A copy with every tensor decoded by llama.cpp."""
    llama = library()
    params = llama.llama_model_quantize_default_params()
    params.ftype, params.allow_requantize = llama.LLAMA_FTYPE_ALL_F32, True
    names = os.fsencode(path), os.fsencode(out)
    if llama.llama_model_quantize(*names, ctypes.byref(params)) or not out.exists():
        raise EngineError(Problem(str(path), "llama_model_quantize", "a copy in F32", "a refusal"))
    return out


if __name__ == "__main__":
    sys.exit(answer_job(_run))
