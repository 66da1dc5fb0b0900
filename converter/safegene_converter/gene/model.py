"""A target model with a gene on it, in PyTorch: one tensor of coefficients, PEFT does the rest.

Coefficients enter through PEFT's own `set_scale`, as a tensor, so that gradients flow into them and
no arithmetic of ours is in the forward pass. Logits are computed on label positions only: the output
layer is a fifth of a small model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from safegene_converter.inputs.adapter import Adapter, check_base_fits, read_adapter
from safegene_converter.inputs.base import Base, open_base
from safegene_converter.recording.chat_text import encode, prompt_ids
from safegene_converter.recording.greedy import greedy_replies
from safegene_converter.recording.loading import load_model, load_with_adapter, stop_ids_of
from safegene_runtime.errors import GeneError, Problem

__all__ = ["Batch", "Example", "GeneModel", "batches_of", "label_logits", "load_gene"]

BATCH = 8
IGNORED = 0


@dataclass(frozen=True)
class Example:
    """A rendered prompt and the reply that is scored, as token ids."""

    prompt: tuple[int, ...]
    reply: tuple[int, ...]


@dataclass(frozen=True)
class Batch:
    """Examples padded on the right, where a causal model does not look.

    Attributes:
        ids: (n, T) token ids.
        mask: (n, T) 1 on real tokens.
        at: (N,) flat positions in (n, T) whose next token is scored.
        labels: (N,) those next tokens.
        owner: (N,) which example each belongs to.
        indices: which examples of the list these are.
    """

    ids: torch.Tensor
    mask: torch.Tensor
    at: torch.Tensor
    labels: torch.Tensor
    owner: torch.Tensor
    indices: tuple[int, ...]


def batches_of(examples: Sequence[Example], size: int = BATCH) -> list[Batch]:
    """Batches of examples of similar length, longest last."""
    order = sorted(
        range(len(examples)),
        key=lambda i: (len(examples[i].prompt) + len(examples[i].reply), i),
    )
    return [_batch(examples, order[start : start + size]) for start in range(0, len(order), size)]


def _batch(examples: Sequence[Example], indices: Sequence[int]) -> Batch:
    rows = [[*examples[i].prompt, *examples[i].reply[:-1]] for i in indices]
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[*row, *[IGNORED] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    at, labels, owner = [], [], []
    for row, index in enumerate(indices):
        first = row * longest + len(examples[index].prompt) - 1
        for offset, label in enumerate(examples[index].reply):
            at.append(first + offset)
            labels.append(label)
            owner.append(row)
    return Batch(
        ids, mask, torch.tensor(at), torch.tensor(labels), torch.tensor(owner), tuple(indices)
    )


def label_logits(model: Any, batch: Batch) -> torch.Tensor:
    """Logits (N, vocab) float32 at the label positions of a causal model, PEFT's or plain.

    The model's own forward makes them, whatever it does before and after its head (soft caps,
    scalings); a hook lets only the label positions through to the head.

    Tokens that all rows begin with, a system prompt for one, go through the model once.

    Raises:
        GeneError: a model that does not call its output layer once.
    """
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    n, length = batch.ids.shape
    shared = _shared_columns(batch) if n > 1 else 0
    begun = None
    if shared:
        first = whole(input_ids=batch.ids[:1, :shared], use_cache=True, logits_to_keep=1)
        begun = first.past_key_values
        begun.batch_repeat_interleave(n)
    rows, columns = batch.at // length, batch.at % length - shared
    calls = 0

    def labels_only(head: Any, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        nonlocal calls
        calls += 1
        return (given[0][rows, columns][None],)

    hook = whole.get_output_embeddings().register_forward_pre_hook(labels_only)
    try:
        logits: torch.Tensor = whole(
            input_ids=batch.ids[:, shared:], attention_mask=batch.mask, past_key_values=begun
        ).logits
    finally:
        hook.remove()
    if calls != 1 or logits.shape[:2] != (1, len(batch.at)):
        raise GeneError(
            Problem(
                type(whole).__name__, "output layer", "called once, on all positions",
                f"{calls} calls, logits of shape {tuple(logits.shape)}",
                "this architecture is not supported yet",
            )
        )  # fmt: skip
    return logits[0].float()


def _shared_columns(batch: Batch) -> int:
    """How many leading tokens are the same in every row; none of them is scored."""
    first = int((batch.at % batch.ids.shape[1]).min())
    same = (batch.ids == batch.ids[:1]).all(dim=0)[:first].tolist()
    return same.index(False) if False in same else first


class GeneModel:
    """A target with a gene on it.

    Attributes:
        layers: the gene's layers, in the order of `coefficients`.
        coefficients: (L,) float32, one per layer; `set` changes it.
        n_parameters: of the target alone.
    """

    def __init__(self, tuned: Any, tokenizer: Any, adapter: Adapter, base: Base) -> None:
        self.tuned, self.tokenizer, self.adapter, self.base = tuned, tokenizer, adapter, base
        self.layers = tuple(sorted({module.layer for module in adapter.modules}))
        self.n_parameters = base.n_parameters
        self.stop_ids = stop_ids_of(tuned, tokenizer)
        of_layer = {module.name: module.layer for module in adapter.modules}
        self._places: list[tuple[LoraLayer, int]] = []
        for name, layer in tuned.named_modules():
            if isinstance(layer, LoraLayer):
                at = of_layer[name.removeprefix("base_model.model.")]
                self._places.append((layer, self.layers.index(at)))
        for parameter in tuned.parameters():
            parameter.requires_grad_(False)
        own = {module.layer: module.coefficient for module in adapter.modules}
        self.set([own[layer] for layer in self.layers])

    def set(self, values: Sequence[float] | torch.Tensor) -> torch.Tensor:
        """Applies coefficients, (L,); a tensor that requires grad gets gradients."""
        self.coefficients = torch.as_tensor(values, dtype=torch.float32)
        for layer, index in self._places:
            layer.set_scale("default", self.coefficients[index])
        return self.coefficients

    @contextlib.contextmanager
    def without_gene(self) -> Iterator[None]:
        """The un-adapted target."""
        with self.tuned.disable_adapter():
            yield

    def prompts(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        """Token ids of user messages in the model's chat template, up to where a reply begins."""
        return prompt_ids(self.tokenizer, texts)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text as it stands, no special tokens added."""
        return encode(self.tokenizer, text)

    def decode(self, ids: Sequence[int]) -> str:
        """A reply's text."""
        kept = [token for token in ids if token not in self.stop_ids]
        return str(self.tokenizer.decode(kept, skip_special_tokens=True))

    def replies(self, texts: Sequence[str], limit: int, tell: Any = None) -> list[list[int]]:
        """Greedy replies to user messages, as token ids, a stop id included."""
        return greedy_replies(self.tuned, self.prompts(texts), limit, self.stop_ids, tell)

    def logits(self, batch: Batch) -> torch.Tensor:
        """Logits (N, vocab) float32 at the label positions."""
        return label_logits(self.tuned, batch)

    def parameters_of(self) -> dict[int, int]:
        """How many numbers the gene holds in each layer."""
        found = dict.fromkeys(self.layers, 0)
        for module in self.adapter.modules:
            found[module.layer] += module.a.size + module.b.size
        return found


def load_gene(gene: Path, model: Path, expression: str | None = None) -> GeneModel:
    """Loads a target with a gene on it, as PEFT runs it.

    Raises:
        SafeGeneError: one of the two cannot be read, they do not fit, or PEFT ignored a part.
    """
    adapter = read_adapter(gene, expression)
    base = open_base(model)
    check_base_fits(adapter, base.module_shapes(), base.architecture, base.n_layers)
    tuned, tokenizer = load_with_adapter(adapter, base)
    return GeneModel(tuned, tokenizer, adapter, base)


def load_plain(model: Path) -> tuple[Any, Any, Base]:
    """A target without a gene: model, tokenizer, base."""
    base = open_base(model)
    return (*load_model(base), base)
