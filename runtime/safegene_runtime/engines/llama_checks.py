"""What a GGUF file must be before libllama may see it.

libllama aborts the whole process on some metadata of a wrong type or an absurd value, loads an
adapter without a single tensor as if nothing were missing, and skips norm tensors silently. The
strict reader has already refused what breaks the format itself.
"""

from __future__ import annotations

from pathlib import Path

from safegene_runtime.engines.llama_hyperparameters import check_hyperparameters
from safegene_runtime.errors import EngineError, Problems
from safegene_runtime.formats.gguf.header import GGUFFile, read_gguf
from safegene_runtime.formats.gguf.model import GGUFModel, open_model
from safegene_runtime.formats.gguf.types import GGMLType, ValueType, type_traits

__all__ = ["check_adapter_header", "check_model_header"]

LORA_A, LORA_B = ".lora_a", ".lora_b"
TOKEN_IDS = ("bos", "eos", "eot", "eom", "unknown", "seperator", "separator", "padding", "mask")
ADAPTER_KEYS = {"general.type": "adapter", "adapter.type": "lora"}
INTEGER_TYPES = (ValueType.INT32, ValueType.UINT32)
FLOATS = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)
"""Beside the quantised types, what libllama multiplies with; of others it dies when it computes."""


def check_model_header(path: Path) -> GGUFModel:
    """Reads the header of a model and refuses what libllama would die of.

    Raises:
        FormatError: not a GGUF file.
        EngineError: not a model, or metadata that contradict themselves.
    """
    model = open_model(path)
    problems = Problems()
    where = str(path)
    kind = model.metadata.get("general.type")
    if kind is not None and kind.value != "model":
        problems.add(
            where,
            "general.type",
            "model",
            repr(kind.value),
            "give the base model here, an adapter as the adapter",
        )
    architecture = model.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        problems.add(where, "general.architecture", "a name", repr(architecture))
    if not model.tensors:
        problems.add(where, "tensors", "at least one", "none", "is it only a vocabulary?")
    else:
        check_hyperparameters(model, where, problems)
    _check_tokenizer(model, where, problems)
    problems.raise_if_any(EngineError)
    return model


def _check_tokenizer(model: GGUFModel, where: str, problems: Problems) -> None:
    tokens = model.metadata.get("tokenizer.ggml.tokens")
    if tokens is None or tokens.element_type != ValueType.STRING:
        problems.add(
            where,
            "tokenizer.ggml.tokens",
            "an array of strings",
            "something else",
            "the model needs its tokenizer inside",
        )
        return
    n_tokens = len(tokens.value)
    for key, types in (("token_type", INTEGER_TYPES), ("scores", (ValueType.FLOAT32,))):
        array = model.metadata.get(f"tokenizer.ggml.{key}")
        if array is None:
            continue
        if array.element_type not in types:
            problems.add(
                where,
                f"tokenizer.ggml.{key}",
                f"an array of {types[0].name}",
                getattr(array.element_type, "name", "no array"),
            )
        elif len(array.value) != n_tokens:
            problems.add(
                where,
                f"tokenizer.ggml.{key}",
                f"{n_tokens} values, one per token",
                len(array.value),
            )
    for name in TOKEN_IDS:
        key = f"tokenizer.ggml.{name}_token_id"
        token = model.get(key)
        if token is not None and (type(token) is not int or not 0 <= token < n_tokens):
            problems.add(where, key, f"0 to {n_tokens - 1}", repr(token))


def check_adapter_header(path: Path, model: GGUFModel) -> GGUFFile:
    """Reads the header of a sidecar and refuses what would be misread, skipped or ignored.

    Raises:
        FormatError: not a GGUF file.
        EngineError: not a LoRA, nothing in it, made for another model, or scaled from outside.
    """
    adapter = read_gguf(path)
    problems = Problems()
    where = str(path)
    expected = ADAPTER_KEYS | {"general.architecture": str(model.get("general.architecture"))}
    for key, text in expected.items():
        if adapter.get(key) != text:
            problems.add(
                where, key, repr(text), repr(adapter.get(key)), "give a LoRA adapter of this model"
            )
    for key in adapter.metadata:
        if key.startswith("adapter.alora."):
            problems.add(where, key, "a plain LoRA", "an activated one", "not supported")
    ranks = _check_pairs(adapter, model, where, problems)
    alpha = adapter.metadata.get("adapter.lora.alpha")
    if alpha is not None and (alpha.type != ValueType.FLOAT32 or {alpha.value} != ranks):
        problems.add(
            where,
            "adapter.lora.alpha",
            "no alpha, or one equal to every rank",
            f"{alpha.value!r} with ranks {sorted(ranks)}",
            "write the scaling into B, so that no reader can get it wrong",
        )
    problems.raise_if_any(EngineError)
    return adapter


def _check_pairs(adapter: GGUFFile, model: GGUFModel, where: str, problems: Problems) -> set[int]:
    """Checks that the tensors are whole (A, B) pairs that fit the model; returns their ranks."""
    ranks = set()
    if not adapter.tensors:
        problems.add(where, "tensors", "at least one pair", "none")
    for name, tensor in adapter.tensors.items():
        if not name.endswith((LORA_A, LORA_B)):
            problems.add(
                where,
                name,
                "a name ending in .lora_a or .lora_b",
                "another tensor",
                "llama.cpp would skip it or refuse the file",
            )
            continue
        if tensor.type not in FLOATS and type_traits(tensor.type)[0] == 1:
            wanted = ", ".join(kind.name for kind in FLOATS)
            problems.add(
                where, f"type of {name}", f"{wanted} or a quantised type", tensor.type.name
            )
            continue
        stem = name[: -len(LORA_A)]
        is_a = name.endswith(LORA_A)
        target = model.tensors.get(stem)
        partner = adapter.tensors.get(stem + (LORA_B if is_a else LORA_A))
        if target is None:
            problems.add(
                where,
                name,
                f"a tensor {stem} in the model",
                "no such tensor",
                "was the adapter made for another model?",
            )
        elif stem == "token_embd.weight":
            problems.add(where, name, "no adapter on embeddings", "one", "not supported")
        elif partner is None:
            problems.add(where, name, "both .lora_a and .lora_b", "one of them")
        elif len(target.shape) != 2 or len(tensor.shape) != 2 or len(partner.shape) != 2:
            problems.add(where, name, "matrices", f"{tensor.shape} on {target.shape}")
        elif is_a:
            ranks.add(tensor.shape[0])
            got = (partner.shape[0], tensor.shape[1])
            if got != target.shape or tensor.shape[0] != partner.shape[1]:
                problems.add(
                    where,
                    stem,
                    f"B·A of shape {target.shape}",
                    f"B {partner.shape} · A {tensor.shape}",
                    "was the adapter made for another model?",
                )
    return ranks
