"""Logits at label positions are those of the model's own forward, whatever follows its head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from safegene_converter.gene.model import Example, batches_of, label_logits
from safegene_runtime.errors import GeneError

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0,
}  # fmt: skip

HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("Llama", {}),
    "a soft cap": ("Gemma2", {"final_logit_softcapping": 0.5}),
    "divided": ("Granite", {"logits_scaling": 8.0}),
    "multiplied": ("Cohere", {"logit_scale": 0.0625}),
}

EXAMPLES = [
    Example((5, 6, 7), (8, 9)),
    Example((5, 6, 11, 12, 13), (14, 15, 16)),
    Example((5, 6), (20,)),
]


def model_of(kind: str, settings: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, **settings)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("head", HEADS)
def test_label_logits_are_those_of_the_models_own_forward(head: str) -> None:
    model = model_of(*HEADS[head])
    with torch.no_grad():
        for batch in batches_of(EXAMPLES):
            found = label_logits(model, batch)
            whole = model(input_ids=batch.ids, attention_mask=batch.mask).logits
            expected = whole.reshape(-1, whole.shape[-1])[batch.at]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
            assert found.std() > 1e-3
    assert not model.get_output_embeddings()._forward_pre_hooks


def test_a_model_that_does_not_use_its_head_once_is_refused() -> None:
    model = model_of("Llama", {})
    head, unused = model.lm_head, torch.nn.Linear(32, 64)
    model.get_output_embeddings = lambda: unused
    with pytest.raises(GeneError, match="output layer: expected called once"), torch.no_grad():
        label_logits(model, batches_of(EXAMPLES)[0])
    assert model.lm_head is head
