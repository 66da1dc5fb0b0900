"""The architectures: one row of data each, and everything that is read off a row.

A row says which models it is of, what the linear modules of its blocks are called, which GGUF tensor
holds each of them, and which of those hold their rows in another order. Names of modules and tensors
are taken apart and put together here and nowhere else. Tests compare every row with gguf-py's names and
with what llama.cpp's own converter writes, so importing gguf-py, which costs as much as reading a
model's header, is not needed.

A row is only right where the GGUF tensor is the Hugging Face weight, its rows reordered at most. Rows
whose hyperparameters are listed stand here. The others are in surveyed.json: `tools/survey.py` reads them
off what llama.cpp's converter makes of tiny models, and their bases are proved by running them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from safegene_runtime.architecture.row_order import OrderKind, Transform
from safegene_runtime.errors import Problem, UnsupportedError

__all__ = [
    "PACKED",
    "SWIGLU_BLOCK",
    "TABLE",
    "Architecture",
    "BlockModule",
    "ModelClass",
    "architecture_named",
    "architecture_of_config",
    "architecture_of_type",
    "arithmetic_of",
    "kind_of",
    "layer_of",
    "linear_modules",
    "model_class_of_config",
    "module_kinds",
    "modules_of",
    "parse_module",
    "parse_paths",
]

Heads = Literal["n_head", "n_head_kv"]

SWIGLU_BLOCK: Mapping[str, str] = {
    "self_attn.q_proj": "attn_q.weight",
    "self_attn.k_proj": "attn_k.weight",
    "self_attn.v_proj": "attn_v.weight",
    "self_attn.o_proj": "attn_output.weight",
    "mlp.gate_proj": "ffn_gate.weight",
    "mlp.up_proj": "ffn_up.weight",
    "mlp.down_proj": "ffn_down.weight",
}
"""Linear module of a block -> its tensor: attention in four parts, and a gated feed-forward network."""

GROUPED_HEADS: Mapping[str, Heads] = {
    "self_attn.q_proj": "n_head",
    "self_attn.k_proj": "n_head_kv",
    "self_attn.v_proj": "n_head_kv",
}
"""Linear module of a block -> the heads that its rows are made of: grouped-query attention."""

LLAMA_ORDERS: Mapping[str, OrderKind] = {
    "self_attn.q_proj": "permute",
    "self_attn.k_proj": "permute",
}
"""What `LlamaModel.permute` of llama.cpp's conversion/llama.py reorders, head by head."""

PACKED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Projections that exporters pack into one, and their parts, top to bottom."""

ATTENTION = tuple(part for part in SWIGLU_BLOCK if part.startswith("self_attn."))
LLAMA_BIASES: Mapping[str, tuple[str, ...]] = {
    "attention_bias": ATTENTION,
    "mlp_bias": tuple(part for part in SWIGLU_BLOCK if part.startswith("mlp.")),
}
"""Key of a config.json -> modules that it gives a bias."""

_NOT_LINEAR = "embeddings, lm_head, norms and experts are not supported yet"
_LAYER = re.compile(r"0|[1-9][0-9]{0,5}")


@dataclass(frozen=True)
class BlockModule:
    """A linear module of a block, its name taken apart.

    Attributes:
        layer: the block's number, from 0.
        part: its name within the block: `self_attn.q_proj`.
    """

    layer: int
    part: str

    @property
    def kind(self) -> str:
        """What it is in its block: `q_proj`."""
        return kind_of(self.part)


@dataclass(frozen=True)
class ModelClass:
    """What a model class of transformers makes of its configuration, as in configuration_*.py of 5.23.

    Attributes:
        name: as `architectures` of a config.json has it.
        model_type: by which transformers finds it.
        biased: modules that have a bias whatever the configuration says.
        switches: configuration key -> modules that it gives a bias.
        qk_norm: whether q and k are normalised.
        head_dim: of a configuration that does not say; None for hidden / heads.
        n_head_kv: likewise; None for as many as query heads.
        window: key that switches the sliding window on; "" if it is on, None if there is none.
        keys: hyperparameters that it alone reads.
        activations: of its feed-forward network, those that llama.cpp computes.
        rope: target -> kinds of rotary embedding that the converter to it carries over: llama.cpp's
            `conversion`, and the builders of onnxruntime-genai 0.18, where `LlamaModel.make_rope_init`
            leaves out what it does not name, and whose yarn is off.
        listed: whether the fields above say all that bears on the result. Where they do not, nothing but a
            proof shows that a base survives a change of its format.
    """

    name: str
    model_type: str
    biased: tuple[str, ...] = ()
    switches: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    qk_norm: bool = False
    head_dim: int | None = None
    n_head_kv: int | None = None
    window: str | None = None
    keys: tuple[str, ...] = ()
    activations: tuple[str, ...] = ("silu", "swish")
    rope: Mapping[str, tuple[str, ...]] = field(
        default_factory=lambda: {"gguf": ("default",), "onnx": ("default",)}
    )
    listed: bool = True


@dataclass(frozen=True)
class Architecture:
    """One row of the table.

    Attributes:
        name: GGUF's name for it, `general.architecture`.
        classes: the Hugging Face model classes that llama.cpp converts to it, the usual one first.
        model_types: what `model_type` of a config.json, and `type` of a genai_config.json, may say.
        tensors: linear module of a block -> its tensor in `blk.N.`.
        heads: modules whose rows are made of heads, and of which.
        orders: those whose rows are reordered, and how.
        blocks: the Hugging Face module that holds the blocks.
        transposed: whether Hugging Face stores weights as (in, out): Conv1D.
        arithmetic: the class of precision (`gating.bounds`) in which llama.cpp computes it, measured: `f16`
            where its GELU is a table of half-precision numbers.
        partial: whether some layers lack some modules, as in hybrids and mixtures of experts.
    """

    name: str
    classes: tuple[ModelClass, ...]
    model_types: tuple[str, ...]
    tensors: Mapping[str, str] = field(default_factory=lambda: SWIGLU_BLOCK)
    heads: Mapping[str, Heads] = field(default_factory=lambda: GROUPED_HEADS)
    orders: Mapping[str, OrderKind] = field(default_factory=dict)
    blocks: str = "model.layers"
    transposed: bool = False
    partial: bool = False
    arithmetic: str = "f32"

    def parse(self, module: str) -> BlockModule | None:
        """A module's name taken apart: None for any that is no linear module of a block."""
        prefix, _, rest = module.partition(f"{self.blocks}.")
        layer, _, part = rest.partition(".")
        if prefix or not _LAYER.fullmatch(layer) or part not in self.tensors:
            return None
        return BlockModule(int(layer), part)

    def module_name(self, layer: int, part: str) -> str:
        """The inverse of `parse`: 2, `mlp.up_proj` -> `model.layers.2.mlp.up_proj`."""
        return f"{self.blocks}.{layer}.{part}"

    def modules(self, n_layers: int) -> Iterator[str]:
        """Every linear module of a model of this depth."""
        for layer in range(n_layers):
            for part in self.tensors:
                yield self.module_name(layer, part)

    def tensor_of(self, module: str) -> str:
        """The GGUF tensor of a module: `model.layers.2.mlp.up_proj` -> `blk.2.ffn_up.weight`.

        Raises:
            UnsupportedError: not a linear module of a block.
        """
        found = self.parse(module)
        if found is None:
            expected = f"{self.blocks}.N. and one of {', '.join(self.tensors)}"
            raise UnsupportedError(Problem(module, "module", expected, module, _NOT_LINEAR))
        return f"blk.{found.layer}.{self.tensors[found.part]}"

    def module_of(self, tensor: str) -> str | None:
        """The inverse of `tensor_of`; None for a tensor that is no linear weight of a block."""
        prefix, _, rest = tensor.partition("blk.")
        layer, _, name = rest.partition(".")
        part = {tensor: part for part, tensor in self.tensors.items()}.get(name)
        if prefix or not _LAYER.fullmatch(layer) or part is None:
            return None
        return self.module_name(int(layer), part)

    def transform(self, module: str, n_head: int, n_head_kv: int) -> Transform:
        """The row order of a module's tensor in a model of `n_head` query and `n_head_kv` kv heads.

        Raises:
            UnsupportedError: not a linear module of a block.
        """
        self.tensor_of(module)
        found = self.parse(module)
        kind = self.orders.get(found.part, "identity") if found else "identity"
        if found is None or kind == "identity":
            return Transform()
        if kind == "regroup":
            return Transform(kind, n_head, n_head_kv)
        return Transform(kind, {"n_head": n_head, "n_head_kv": n_head_kv}[self.heads[found.part]])

    def head_rows(self, n_head: int, n_head_kv: int, head_size: int) -> dict[str, int]:
        """How many rows the modules have that are made of heads."""
        counts = {"n_head": n_head, "n_head_kv": n_head_kv}
        return {
            p: counts[heads] * head_size for p, heads in self.heads.items() if p in self.tensors
        }

    def linear_shapes(self, hidden: int, inner: int, q: int, kv: int) -> dict[str, tuple[int, int]]:
        """(out, in) of the linear modules of a block.

        Args:
            hidden: width of the model.
            inner: width of the feed-forward network.
            q: rows of all query heads together.
            kv: rows of all key heads together, and of all value heads.
        """
        shapes = {
            "self_attn.q_proj": (q, hidden),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.v_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, q),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }
        return {part: shapes[part] for part in self.tensors}

    def projections(self) -> dict[str, tuple[str, ...]]:
        """What a projection of an exported graph holds, top to bottom: `qkv_proj` -> q, k, v.

        The parts are those of `tensors`: a packed projection has several, a plain one itself.
        """
        parts = {kind_of(part): part for part in self.tensors}
        packed = {
            name: tuple(parts[kind] for kind in held)
            for name, held in PACKED.items()
            if parts.keys() >= set(held)
        }
        return packed | {kind: (part,) for kind, part in parts.items()}


def _surveyed() -> Iterator[Architecture]:
    """The rows of surveyed.json."""
    stored = Path(__file__).with_name("surveyed.json").read_text(encoding="utf-8")
    for name, row in json.loads(stored).items():
        classes = tuple(
            ModelClass(model_class, model_type, listed=False)
            for model_class, model_type in row.pop("classes").items()
        )
        types = tuple(dict.fromkeys(one.model_type for one in classes))
        yield Architecture(name, classes, types, **row)


TABLE: dict[str, Architecture] = {
    row.name: row
    for row in (
        Architecture(
            name="llama",
            classes=(
                ModelClass(
                    "LlamaForCausalLM",
                    "llama",
                    switches=LLAMA_BIASES,
                    rope={
                        "gguf": ("default", "linear", "llama3", "yarn"),
                        "onnx": ("default", "llama3"),
                    },
                ),
                ModelClass(
                    "MistralForCausalLM",
                    "mistral",
                    n_head_kv=8,
                    window="",
                    rope={
                        "gguf": ("default", "linear", "llama3", "yarn"),
                        "onnx": ("default", "linear"),
                    },
                ),
                ModelClass("MixtralForCausalLM", "mixtral", listed=False),
            ),
            model_types=("llama", "mistral", "smollm", "mixtral"),
            orders=LLAMA_ORDERS,
        ),
        Architecture(
            name="qwen2",
            classes=(
                ModelClass(
                    "Qwen2ForCausalLM",
                    "qwen2",
                    biased=ATTENTION[:3],
                    window="use_sliding_window",
                    rope={
                        "gguf": ("default", "linear", "yarn"),
                        "onnx": ("default", "linear"),
                    },
                ),
            ),
            model_types=("qwen2",),
        ),
        Architecture(
            name="qwen3",
            classes=(
                ModelClass(
                    "Qwen3ForCausalLM",
                    "qwen3",
                    switches={"attention_bias": ATTENTION},
                    qk_norm=True,
                    head_dim=128,
                    window="use_sliding_window",
                    rope={
                        "gguf": ("default", "linear", "yarn"),
                        "onnx": ("default", "linear"),
                    },
                ),
            ),
            model_types=("qwen3",),
        ),
        Architecture(
            name="smollm3",
            classes=(
                ModelClass(
                    "SmolLM3ForCausalLM",
                    "smollm3",
                    switches=LLAMA_BIASES,
                    n_head_kv=4,
                    window="use_sliding_window",
                    keys=("no_rope_layers", "no_rope_layer_interval"),
                ),
            ),
            model_types=("smollm3",),
            orders=LLAMA_ORDERS,
        ),
        Architecture(
            name="arcee",
            classes=(
                ModelClass(
                    "ArceeForCausalLM", "arcee", switches=LLAMA_BIASES, activations=("relu2",)
                ),
            ),
            model_types=("arcee",),
            tensors={part: t for part, t in SWIGLU_BLOCK.items() if part != "mlp.gate_proj"},
            orders=LLAMA_ORDERS,
        ),
        *_surveyed(),
    )
}
"""Every architecture there is, by GGUF's name; the tests prove each of them on a tiny model."""


def architecture_named(name: object, where: str) -> Architecture:
    """The row of a GGUF architecture.

    Raises:
        UnsupportedError: none has this name; the message says it.
    """
    if not isinstance(name, str) or name not in TABLE:
        raise _unknown(where, "architecture", TABLE, name)
    return TABLE[name]


def arithmetic_of(name: object) -> str:
    """The class of precision in which llama.cpp computes a GGUF architecture; `f32` for one without a row."""
    return TABLE[name].arithmetic if isinstance(name, str) and name in TABLE else "f32"


def architecture_of_config(config: Mapping[str, Any], where: str) -> Architecture:
    """The row of a Hugging Face config.json, by its model class.

    Raises:
        UnsupportedError: a model class that no row has; the message names it.
    """
    return _classified(config, where)[0]


def model_class_of_config(config: Mapping[str, Any], where: str) -> ModelClass:
    """What the model class of a Hugging Face config.json makes of it.

    Raises:
        UnsupportedError: a model class that no row has; the message names it.
    """
    return _classified(config, where)[1]


def _classified(config: Mapping[str, Any], where: str) -> tuple[Architecture, ModelClass]:
    known = {one.name: (row, one) for row in TABLE.values() for one in row.classes}
    classes = config.get("architectures")
    name = classes[0] if isinstance(classes, list) and len(classes) == 1 else None
    if not isinstance(name, str) or name not in known:
        raise _unknown(where, "architectures", known, classes)
    return known[name]


def architecture_of_type(model_type: object, where: str) -> Architecture:
    """The row of a model type: the builder calls the architecture by it, as config.json does.

    Raises:
        UnsupportedError: a type that no row has; the message names it.
    """
    rows = {kind: row for row in TABLE.values() for kind in row.model_types}
    for row in TABLE.values():  # the builder shortens the class where it does not know the type
        for kind in row.classes:
            rows.setdefault(kind.name.removesuffix("ForCausalLM").lower(), row)
    if not isinstance(model_type, str) or model_type not in rows:
        raise _unknown(where, "architecture", rows, model_type)
    return rows[model_type]


def parse_module(module: str) -> BlockModule | None:
    """A module's name taken apart by the row that knows it: None where none does."""
    return next((found for row in TABLE.values() if (found := row.parse(module))), None)


def layer_of(module: str) -> int:
    """The number of the block that a linear module is in.

    Raises:
        UnsupportedError: a module that no row knows.
    """
    if found := parse_module(module):
        return found.layer
    expected = f"a linear module of a block ({', '.join(linear_modules())})"
    raise UnsupportedError(Problem(module, "module", expected, "another name", _NOT_LINEAR))


def linear_modules() -> tuple[str, ...]:
    """The linear modules of a block that any row knows, each once, in the order of the rows."""
    return tuple(dict.fromkeys(part for row in TABLE.values() for part in row.tensors))


def modules_of(layer: int) -> tuple[str, ...]:
    """The linear modules of a block under every name that a row has for them."""
    names = (row.module_name(layer, part) for row in TABLE.values() for part in row.tensors)
    return tuple(dict.fromkeys(names))


def module_kinds() -> tuple[str, ...]:
    """The last parts of `linear_modules`: `q_proj`, ..."""
    return tuple(dict.fromkeys(map(kind_of, linear_modules())))


def kind_of(part: str) -> str:
    """The last part of a module's name: `self_attn.q_proj` -> `q_proj`."""
    return part.rsplit(".", 1)[-1]


def parse_paths(architecture: Architecture, text: str) -> set[tuple[int, str]]:
    """(layer, projection) of every module path in a name of an exported graph.

    Exporters write `/model/layers.0/attn/qkv_proj/MatMul`, `model.layers.0.self_attn.q_proj.weight`
    and the like, so what stands between layer and projection is not looked at.
    """
    projections = "|".join(sorted(architecture.projections(), key=len, reverse=True))
    container = re.escape(architecture.blocks.rsplit(".", 1)[-1])
    path = re.compile(
        # the builder says `layers` whatever the model does
        rf"(?:^|\.)(?:layers|{container})\.(\d+)\.(?:\w+\.)*?({projections})(?=[.\s'\"\]_]|$)"
    )
    return {(int(found[1]), found[2]) for found in path.finditer(text.replace("/", "."))}


def _unknown(where: str, what: str, known: Mapping[str, Any], got: object) -> UnsupportedError:
    fix = "this architecture is not supported yet"
    return UnsupportedError(Problem(where, what, f"one of {', '.join(known)}", str(got), fix))
