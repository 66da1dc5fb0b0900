"""A tiny model for every architecture of the table: what transformers is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Tiny:
    """One model.

    Attributes:
        kind: its classes in transformers are `<kind>Config` and `<kind>ForCausalLM`.
        settings: of its configuration, besides the sizes that all of them have.
        tokenizer: `smollm2`, or `qwen2` where transformers insists on Qwen2Tokenizer.
        exporter: who makes the ONNX model: the onnxruntime-genai `builder`, or torch.onnx
            (`dynamo`, `torchscript`) where the builder cannot.
    """

    kind: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = "smollm2"
    exporter: str = "builder"

    def key(self) -> str:
        """For the name of a cached model: what it is made of."""
        return json.dumps(asdict(self), sort_keys=True)


MODELS = {
    "llama": Tiny("Llama"),
    "qwen2": Tiny("Qwen2", tokenizer="qwen2"),
    "qwen3": Tiny("Qwen3", {"head_dim": 32}),  # so that q is not square
    # every fourth layer rotates nothing; builder 0.18 has no position_ids for it
    "smollm3": Tiny("SmolLM3", {"num_hidden_layers": 4}, exporter="torchscript"),
    "arcee": Tiny("Arcee", exporter="torchscript"),
}


def tiny_of(architecture: str) -> Tiny:
    """The tiny model of an architecture."""
    if architecture not in MODELS:
        raise LookupError(f"{architecture} has no tiny model: add one to {__name__}.MODELS")
    return MODELS[architecture]
