"""Names of an adapter's tensors: which module of the base each is a factor of.

    base_model.model.<stem>.layers.<N>.<linear module>.lora_{A,B}.weight

PEFT writes the name that the module has in the model it was trained in. In a text model the stem is
`model`; in a model with other parts the text part has a longer one, and its modules are the same.
Inside this package every module is named as in the text model.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from safegene_runtime.architecture.table import linear_modules, parse_module
from safegene_runtime.errors import Problems

__all__ = ["PREFIX", "STEM", "WRAPPERS", "Pairs", "pair_factors"]

STEM = "model"
"""Where a text model keeps its list of layers."""

_TEXT_STEMS = ("model.language_model", "language_model.model", "model.text_model")
"""The same in models of text and images: transformers 5, transformers 4, Idefics3."""

PREFIX = "base_model.model."
_COMPILED = "_orig_mod."
"""torch.compile puts it before all names; PEFT strips it there, and only there."""

_KEY = re.compile(r"(?P<module>[A-Za-z0-9_.]+)\.lora_(?P<factor>[AB])\.weight")
WRAPPERS = {
    "module": "DistributedDataParallel or DeepSpeed",
    "_orig_mod": "torch.compile, on a part of the model",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "_forward_module": "Lightning",
}
"""Parts of a name that come from a wrapper around the model, and whose they are."""

_UNSUPPORTED = (
    ("lora_magnitude_vector", "DoRA", "train a plain LoRA"),
    ("lora_embedding_", "an embedding delta", "train without embed_tokens"),
    ("embed_tokens", "an embedding delta", "train without embed_tokens"),
    ("lm_head", "an output head", "train without lm_head: it may be tied to the embedding"),
    (".experts.", "a mixture of experts", "MoE experts are not supported yet"),
    ("lora_B.bias", "a trained bias", "train with lora_bias=False"),
    (".bias", "a trained bias", "train with bias='none'"),
    ("norm.", "a norm", "llama.cpp skips norms without a word: train without them"),
    ("vision", "a module of the image part", "train on the text part only"),
    ("visual", "a module of the image part", "train on the text part only"),
    ("audio", "a module of the audio part", "train on the text part only"),
    ("multi_modal_projector", "a module of the image part", "train on the text part only"),
)


@dataclass(frozen=True)
class Pairs:
    """The factors of each module.

    Attributes:
        keys: module, as the text model names it -> {"A": name of its tensor, "B": the same}.
        stem: where the model that the adapter was trained in keeps its text layers.
        is_compiled: whether the names were those of a compiled model.
    """

    keys: Mapping[str, Mapping[str, str]]
    stem: str
    is_compiled: bool


def pair_factors(
    tensors: Iterable[str], where: str, problems: Problems, refused: Problems
) -> Pairs:
    """Reads the names of all tensors of an adapter.

    Args:
        tensors: the names.
        where: the file, for messages.
        problems: gets every name that is not half of a pair.
        refused: gets every name of a kind that is known and not supported.
    """
    pairs: dict[str, dict[str, str]] = {}
    stems, compiled = Counter[str](), 0
    for key in tensors:
        name, is_compiled = _without_prefix(key)
        compiled += is_compiled
        found = _KEY.fullmatch(name or "")
        known = [entry for entry in _UNSUPPORTED if entry[0] in f"{found[1] if found else key}."]
        wrapper = next((part for part in (name or key).split(".") if part in WRAPPERS), None)
        if known or "modules_to_save" in key:
            what, fix = known[0][1:] if known else ("a whole saved module", "train without it")
            refused.add(where, key, "factors of linear modules in the blocks", what, fix)
        elif wrapper is not None:
            problems.add(where, repr(key)[:200], "names without those of a wrapper",
                         f"`{wrapper}.`, of {WRAPPERS[wrapper]}",
                         "take it out of the names: safegene import ADAPTER -o NEW"
                         )  # fmt: skip
        elif not found:
            problems.add(where, repr(key)[:200], f"{PREFIX}<module>.lora_A|B.weight",
                         "another name", "save with save_pretrained, or try safegene import")  # fmt: skip
        elif (place := _in_text_model(found["module"])) is None:
            refused.add(where, key, f"a linear module of a block ({', '.join(linear_modules())})",
                        found["module"], "train on these modules only")  # fmt: skip
        else:
            stem, module = place
            stems[stem] += 1
            factors = pairs.setdefault(module, {})
            if other := factors.get(found["factor"]):
                problems.add(where, key, f"one lora_{found['factor']} of {module}", f"{other}, too",
                             "save it again")  # fmt: skip
            factors[found["factor"]] = key
    if len(stems) > 1:
        problems.add(where, "tensors", "the layers of one model", ", ".join(sorted(stems)),
                     "save it again")  # fmt: skip
    for module, factors in sorted(pairs.items()):
        for factor in {"A", "B"} - factors.keys():
            problems.add(where, module, f"lora_{factor}", "only the other factor", "save it again")
    whole = {module: factors for module, factors in pairs.items() if len(factors) == 2}
    return Pairs(whole, next(iter(stems), STEM), compiled > 0)


def _without_prefix(key: str) -> tuple[str | None, bool]:
    """What follows PEFT's prefix, if it is there, and whether the model was compiled."""
    name = key.removeprefix(_COMPILED)
    if not name.startswith(PREFIX):
        return None, False
    module = name.removeprefix(PREFIX).removeprefix(_COMPILED)
    return module, len(module) < len(key) - len(PREFIX)


def _in_text_model(module: str) -> tuple[str, str] | None:
    """(stem, name in the text model) of a linear module of a block; None for any other."""
    if parse_module(module):
        return STEM, module
    for stem in _TEXT_STEMS:
        name = STEM + module.removeprefix(stem) if module.startswith(f"{stem}.layers.") else ""
        if parse_module(name):
            return stem, name
    return None
