"""The plain base in PyTorch: what the model says along given tokens, for `bases.proof`.

python -m safegene_converter.recording.base_logits      one JSON job on stdin, as `proof` asks
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
import transformers

from safegene_converter.bases.proof import (
    Answer,
    Asked,
    gguf_side,
    prove_base,
    reach_of,
)
from safegene_converter.inputs.base import Base
from safegene_converter.inputs.consumed_gguf import check_gguf_for_torch, gguf_config
from safegene_runtime.artifact.base_proof import BaseProof
from safegene_runtime.errors import BaseModelError, Problems
from safegene_runtime.progress import Progress

__all__ = ["asked_in_torch", "check_loaded", "config_of_gguf", "prove_gguf"]


def asked_in_torch(model: Any, tokenizer: Any) -> Asked:
    """A model that is loaded already, as one side of a proof."""
    name = f"PyTorch {version('torch')} (transformers {version('transformers')}), float32"

    def tokenize(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def logits(ids: Sequence[int], keep: int) -> Any:
        with torch.inference_mode():
            return model(torch.tensor([list(ids)]), logits_to_keep=keep).logits[0].float().numpy()

    return lambda given, length: Answer.of(name, tokenize, logits, given, length)


def config_of_gguf(base: Base) -> Any:
    """The configuration that transformers' loader makes of a GGUF, with what it leaves out added.

    Raises:
        BaseModelError: the GGUF has tensors or keys that the loader does not read.
    """
    model = base.model
    assert model is not None
    check_gguf_for_torch(base.architecture, model, base.n_layers, base.n_head, str(base.path))
    path = base.path.resolve()
    with contextlib.redirect_stderr(io.StringIO()):
        config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    for key, value in gguf_config(base.architecture, model).items():
        setattr(config, key, value)
    return config


def prove_gguf(base: Base, model: Any, tokenizer: Any, tell: Progress) -> BaseProof:
    """Proves that the plain base, decoded by transformers, answers as the GGUF does in llama.cpp.

    Raises:
        BaseModelError: it does not.
    """
    assert base.model is not None
    llama, precision = gguf_side(base.model)
    return prove_base(
        llama, asked_in_torch(model, tokenizer), precision=precision, reach=reach_of(base),
        where=f"{base.path}: transformers' loader", tell=tell,
    )  # fmt: skip


def check_loaded(model: Any, told: Mapping[str, Any], where: str) -> None:
    """Refuses a model of which transformers left out weights, made some up, or read NaN.

    Args:
        model: what it loaded.
        told: its `output_loading_info`.
        where: the base, for the message.

    Raises:
        BaseModelError: all of it.
    """
    problems = Problems()
    for key, got, fix in (
        ("missing_keys", "none: it starts as noise", "the base lacks weights: download it again"),
        ("unexpected_keys", "one that transformers leaves out", "the base is more than its class"),
        ("mismatched_keys", "another shape", "config.json and weights are of different models"),
    ):
        for name in sorted(map(str, told.get(key, ()))):
            if not name.endswith("rotary_emb.inv_freq"):  # checked against the configuration
                problems.add(where, name, "a weight that transformers reads", got, fix)
    for name, weight in model.named_parameters():
        if not torch.isfinite(weight).all():
            problems.add(where, name, "finite numbers", "NaN or Inf", "download the model again")
    problems.raise_if_any(BaseModelError)
