"""What a gene does to a target: refusals, change of benign replies, loss on an ordinary task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from safegene_converter.gene.asked import log_probabilities
from safegene_converter.gene.model import (
    Batch,
    Example,
    batches_of,
    label_logits,
    load_gene,
    load_plain,
)
from safegene_converter.gene.objective import kl_along
from safegene_converter.recording.chat_text import encode, prompt_ids
from safegene_converter.recording.greedy import greedy_replies
from safegene_converter.recording.loading import stop_ids_of
from safegene_runtime.errors import GeneError, Problem
from safegene_runtime.judging.judge import Label, judge
from safegene_runtime.progress import Progress
from safegene_runtime.record.prompts import Prompt, builtin_suite

__all__ = ["Evaluation", "Scored", "evaluate", "evaluate_model", "own_replies", "task_loss"]

Scored = tuple[Batch, torch.Tensor]
"""A batch of replies, and the log-probabilities (N, vocab) of a model along them."""


@dataclass(frozen=True)
class Evaluation:
    """Rates are shares of the prompts of their kind; None where there are none.

    Attributes:
        harmful_refused: of harmful prompts.
        benign_refused: of ordinary benign prompts.
        borderline_refused: of benign prompts that look harmful.
        degenerate: replies, of any kind, that are no language or stuck.
        benign_kl: mean KL(target || target + gene) per token of the target's own benign replies,
            nats; None without a gene.
        task_loss: mean negative log-likelihood per token, nats; None without a task.
    """

    harmful_refused: float | None
    benign_refused: float | None
    borderline_refused: float | None
    degenerate: float
    benign_kl: float | None
    task_loss: float | None
    n_harmful: int
    n_benign: int

    def to_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def evaluate(
    model: Path,
    *,
    gene: Path | None = None,
    expression: str | None = None,
    prompts: Sequence[Prompt] | None = None,
    task: Sequence[tuple[str, str]] = (),
    max_new_tokens: int = 24,
    own: Sequence[Scored] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Evaluates a target, with or without a gene.

    Args:
        model: the target.
        gene: an adapter folder; None: the target alone.
        expression: which of its expressions.
        prompts: what to ask; the built-in suite by default.
        task: (prompt, reply) pairs of an ordinary task.
        max_new_tokens: length of replies.
        own: what the target alone answers, from `own_replies`, where it is known already.
        progress: told what is being done.

    Raises:
        SafeGeneError: one of them cannot be read, or they do not fit.
    """
    if gene is None:
        if expression is not None:
            raise GeneError(
                Problem("evaluate", "expression", "an adapter beside it", "none", "pass --adapter")
            )
        loaded, tokenizer, _ = load_plain(model)
    else:
        on = load_gene(gene, model, expression)
        loaded, tokenizer = on.tuned, on.tokenizer
    return evaluate_model(
        loaded,
        tokenizer,
        prompts=builtin_suite() if prompts is None else prompts,
        task=task,
        max_new_tokens=max_new_tokens,
        own=own,
        progress=progress,
    )


def evaluate_model(
    model: Any,
    tokenizer: Any,
    *,
    prompts: Sequence[Prompt],
    task: Sequence[tuple[str, str]] = (),
    max_new_tokens: int = 24,
    own: Sequence[Scored] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """The same for a loaded model; its KL is to `own`, or to itself without its adapter."""
    if not prompts or max_new_tokens < 1:
        raise GeneError(Problem("evaluate", "prompts", "at least one", str(len(prompts))))
    stop_ids = stop_ids_of(model, tokenizer)
    ids = prompt_ids(tokenizer, [prompt.text for prompt in prompts])
    replies = greedy_replies(model, ids, max_new_tokens, stop_ids, progress)
    verdicts = [
        judge(tokenizer.decode([i for i in reply if i not in stop_ids], skip_special_tokens=True))
        for reply in replies
    ]

    def refused(kind: str, borderline: bool) -> float | None:
        of_kind = [
            verdict == Label.REFUSE
            for prompt, verdict in zip(prompts, verdicts, strict=True)
            if prompt.kind == kind and prompt.borderline == borderline
        ]
        return sum(of_kind) / len(of_kind) if of_kind else None

    if own is None and hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            own = own_replies(model, tokenizer, prompts, max_new_tokens, progress)
    return Evaluation(
        harmful_refused=refused("harmful", False),
        benign_refused=refused("benign", False),
        borderline_refused=refused("benign", True),
        degenerate=sum(verdict == Label.DEGENERATE for verdict in verdicts) / len(verdicts),
        benign_kl=_kl_along(model, own) if own else None,
        task_loss=task_loss(model, tokenizer, task) if task else None,
        n_harmful=sum(prompt.kind == "harmful" for prompt in prompts),
        n_benign=sum(prompt.kind == "benign" for prompt in prompts),
    )


def task_loss(model: Any, tokenizer: Any, pairs: Sequence[tuple[str, str]]) -> float:
    """Mean negative log-likelihood per token of replies, their end included, in nats.

    Raises:
        GeneError: it is not finite.
    """
    end = int(tokenizer.eos_token_id)
    asked = prompt_ids(tokenizer, [prompt for prompt, _ in pairs])
    examples = [
        Example(ids, (*encode(tokenizer, reply), end))
        for ids, (_, reply) in zip(asked, pairs, strict=True)
    ]
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in batches_of(examples):
            scored = log_probabilities(label_logits(model, batch))
            total -= float(scored.gather(1, batch.labels[:, None]).sum())
            count += len(batch.labels)
    if not torch.isfinite(torch.tensor(total)):
        raise GeneError(Problem("evaluate", "task loss", "a finite number", str(total)))
    return total / count


def own_replies(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    max_new_tokens: int = 24,
    progress: Progress | None = None,
) -> list[Scored]:
    """What a model answers to the benign ones among prompts, and how likely each token is to it."""
    ids = prompt_ids(tokenizer, [prompt.text for prompt in prompts if prompt.kind == "benign"])
    if not ids:
        return []
    stop_ids = stop_ids_of(model, tokenizer)
    replies = greedy_replies(model, ids, max_new_tokens, stop_ids, progress)
    examples = [Example(p, tuple(reply)) for p, reply in zip(ids, replies, strict=True)]
    with torch.no_grad():
        return [
            (batch, log_probabilities(label_logits(model, batch))) for batch in batches_of(examples)
        ]


def _kl_along(model: Any, own: Sequence[Scored]) -> float:
    total, count = 0.0, 0
    with torch.no_grad():
        for batch, reference in own:
            total += float(kl_along(reference, label_logits(model, batch)).sum())
            count += len(batch.labels)
    return total / count
