"""An adapter folder is one consistent thing, or it is refused, with everything that is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from safegene_converter.inputs.adapter import check_base_fits, read_adapter
from safegene_converter.inputs.base import open_base
from safegene_runtime.errors import AdapterError, SafeGeneError, UnsupportedError

EXAMPLE = tiny.REPOSITORY / "examples" / "smollm2-135m-safegene"
PREFIX = "base_model.model."
Q0 = "model.layers.0.self_attn.q_proj"
Q1 = "model.layers.1.self_attn.q_proj"


class Folder:
    """An adapter folder in pieces: change one, save it, read it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        random = np.random.default_rng(0)
        self.config: dict[str, Any] = {
            "peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "k_proj"],
            "bias": "none", "task_type": "CAUSAL_LM",
        }  # fmt: skip
        self.tensors: dict[str, np.ndarray] = {}
        for layer in (0, 1):
            for name in ("q_proj", "k_proj"):
                key = f"{PREFIX}model.layers.{layer}.self_attn.{name}"
                self.tensors[f"{key}.lora_A.weight"] = random.standard_normal((2, 8), np.float32)
                b = random.standard_normal((6, 2), np.float32)
                self.tensors[f"{key}.lora_B.weight"] = b * np.float32(0.01)
        self.safegene: dict[str, Any] = {
            "format_version": 1,
            "base_model": {"name": "tiny", "architecture": "llama", "n_layers": 2},
            "selected_layers": [0, 1],
            "default_expression": "default",
            "expressions": {
                "default": {"coefficients": {"0": 0.5, "1": 1.5}, "target": "t", "n_shots": 3},
                "other": {"coefficients": {"0": 1, "1": -2.0}},
            },
        }

    def key(self, module: str, factor: str) -> str:
        return f"{PREFIX}{module}.lora_{factor}.weight"

    def rename(self, old: str, new: str) -> None:
        self.tensors[new] = self.tensors.pop(old)

    def save(self) -> Path:
        self.path.mkdir(exist_ok=True)
        (self.path / "adapter_config.json").write_text(json.dumps(self.config))
        (self.path / "safegene.json").write_text(json.dumps(self.safegene))
        save_file(self.tensors, self.path / "adapter_model.safetensors")
        return self.path


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "adapter")


def test_the_example_is_what_its_files_say() -> None:
    adapter = read_adapter(EXAMPLE)
    tensors = load_file(EXAMPLE / "adapter_model.safetensors")
    notes = json.loads((EXAMPLE / "safegene.json").read_text())
    assert adapter.n_parameters == sum(tensor.size for tensor in tensors.values())
    assert 2 * len(adapter.modules) == len(tensors)
    for module in adapter.modules:
        assert np.array_equal(module.a, tensors[f"{PREFIX}{module.name}.lora_A.weight"])
        assert np.array_equal(module.b, tensors[f"{PREFIX}{module.name}.lora_B.weight"])
        expected = notes["expressions"]["base"]["coefficients"][str(module.layer)]
        assert module.coefficient == expected
    assert adapter.expressions == ("default", "base")


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_what_peft_saves_is_a_plain_lora(architecture: str, tmp_path: Path) -> None:
    path = tiny.peft_adapter(architecture, tmp_path / "adapter", use_rslora=True)
    adapter = read_adapter(path)
    assert adapter.expressions == ("default",)
    assert adapter.base_model is None
    assert {module.coefficient for module in adapter.modules} == {1.0}
    assert {module.scaling for module in adapter.modules} == {4.0}
    assert len(adapter.modules) == 3 * tiny.n_layers(architecture)
    base = open_base(tiny.gguf_model(architecture))
    check_base_fits(adapter, base.module_shapes(), base.architecture, base.n_layers)


def test_the_default_expression_is_taken_and_others_by_name(folder: Folder) -> None:
    path = folder.save()
    assert [m.coefficient for m in read_adapter(path).modules] == [0.5, 0.5, 1.5, 1.5]
    assert [m.coefficient for m in read_adapter(path, "other").modules] == [1, 1, -2, -2]
    assert read_adapter(path).target == "t"
    with pytest.raises(AdapterError, match="one of default, other"):
        read_adapter(path, "oter")


def test_one_more_expression_leaves_the_others_digests_as_they_are(folder: Folder) -> None:
    before = {name: read_adapter(folder.save(), name).digests for name in ("default", "other")}
    folder.safegene["expressions"]["third"] = {"coefficients": {"0": 3, "1": 4}}
    folder.safegene["default_expression"] = "third"
    path = folder.save()
    assert {name: read_adapter(path, name).digests for name in before} == before
    assert read_adapter(path).digests not in before.values()


@pytest.mark.parametrize("what", ["coefficient", "base"])
def test_what_an_expression_does_is_in_its_digest(what: str, folder: Folder) -> None:
    before = read_adapter(folder.save()).digests
    if what == "coefficient":
        folder.safegene["expressions"]["default"]["coefficients"]["1"] = 1.5 + 2**-52
    else:
        folder.safegene["base_model"]["n_layers"] = 3
    after = read_adapter(folder.save()).digests
    changed = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys()
    assert changed == {"safegene.json#default"}


def test_modules_are_in_the_order_of_layers(folder: Folder) -> None:
    names = [module.name for module in read_adapter(folder.save()).modules]
    assert names == sorted(names, key=lambda name: (int(name.split(".")[2]), name))


Change = Callable[[Folder], None]


def config(**values: Any) -> Change:
    return lambda folder: folder.config.update(values)


def notes(*path: str, value: Any) -> Change:
    def change(folder: Folder) -> None:
        place = folder.safegene
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = value

    return change


def without(*path: str) -> Change:
    def change(folder: Folder) -> None:
        place = folder.safegene
        for name in path[:-1]:
            place = place[name]
        del place[path[-1]]

    return change


def tensor(module: str, factor: str, value: Any) -> Change:
    def change(folder: Folder) -> None:
        folder.tensors[folder.key(module, factor)] = np.asarray(value, np.float32)

    return change


def extra(key: str) -> Change:
    return lambda folder: folder.tensors.update({key: np.ones((2, 2), np.float32)})


def drop(module: str, *factors: str) -> Change:
    return lambda folder: [folder.tensors.pop(folder.key(module, f)) for f in factors] and None


def renamed(change: Callable[[str], str]) -> Change:
    def apply(folder: Folder) -> None:
        for key in list(folder.tensors):
            folder.rename(key, change(key))

    return apply


COEFFICIENTS = ("expressions", "default", "coefficients")
HOSTILE: dict[str, tuple[Change, type[SafeGeneError], str]] = {
    "NaN": (tensor(Q0, "A", np.full((2, 8), np.nan)), AdapterError, "NaN or Inf"),
    "Inf": (tensor(Q0, "B", np.full((6, 2), np.inf)), AdapterError, "NaN or Inf"),
    "B never trained": (tensor(Q0, "B", np.zeros((6, 2))), AdapterError, "no effect"),
    "A zero": (tensor(Q0, "A", np.zeros((2, 8))), AdapterError, "no effect"),
    "no tensors": (lambda folder: folder.tensors.clear(), AdapterError, "at least one pair"),
    "B missing": (drop(Q0, "B"), AdapterError, "lora_B"),
    "A missing": (drop(Q0, "A"), AdapterError, "lora_A"),
    "rank other than the config": (config(r=4), AdapterError, "rank 4"),
    "rank_pattern other": (config(rank_pattern={"q_proj": 3}), AdapterError, "rank 3"),
    "ranks of A and B differ": (tensor(Q0, "B", np.ones((6, 3))), AdapterError, "rank 2"),
    "three dimensions": (tensor(Q0, "A", np.ones((1, 2, 8))), AdapterError, "factors"),
    "no columns": (tensor(Q0, "A", np.ones((2, 0))), AdapterError, "factors"),
    "not targeted": (config(target_modules=["k_proj"]), AdapterError, "PEFT would ignore"),
    "excluded": (config(exclude_modules=["q_proj"]), AdapterError, "PEFT would ignore"),
    "layer not to transform": (config(layers_to_transform=[0]), AdapterError, "would ignore"),
    "pattern without tensors": (config(alpha_pattern={"v_proj": 2}), AdapterError, "v_proj"),
    "layer without tensors": (config(layers_to_transform=[0, 1, 7]), AdapterError, "7"),
    "no prefix": (renamed(lambda key: key.removeprefix(PREFIX)), AdapterError, "another name"),
    "adapter name in the key": (
        renamed(lambda key: key.replace(".weight", ".default.weight")), AdapterError, "another"),
    "a path as name": (extra("../../etc/passwd"), AdapterError, "another name"),
    "DoRA": (extra(f"{PREFIX}{Q0}.lora_magnitude_vector"), UnsupportedError, "DoRA"),
    "bias of B": (extra(f"{PREFIX}{Q0}.lora_B.bias"), UnsupportedError, "bias"),
    "trained bias": (extra(f"{PREFIX}{Q0}.bias"), UnsupportedError, "bias"),
    "embedding": (
        extra(f"{PREFIX}model.embed_tokens.lora_embedding_A"), UnsupportedError, "embedding"),
    "output head": (extra(f"{PREFIX}lm_head.lora_A.weight"), UnsupportedError, "lm_head"),
    "norm": (extra(f"{PREFIX}model.layers.0.input_layernorm.lora_A.weight"),
             UnsupportedError, "norm"),
    "experts": (extra(f"{PREFIX}model.layers.0.mlp.experts.0.up_proj.lora_A.weight"),
                UnsupportedError, "experts"),
    "saved module": (
        extra(f"{PREFIX}model.norm.modules_to_save.weight"), UnsupportedError, "norm"),
    "another block": (extra(f"{PREFIX}backbone.blocks.0.attn.wqkv.lora_A.weight"),
                      UnsupportedError, "linear module"),
    "DistributedDataParallel": (
        renamed(lambda key: key.replace(PREFIX, f"{PREFIX}module.")), AdapterError, "`module.`"),
    "DistributedDataParallel outside": (
        renamed(lambda key: f"module.{key}"), AdapterError, "`module.`"),
    "FSDP": (renamed(lambda key: key.replace(".self_attn", "._fsdp_wrapped_module.self_attn")),
             AdapterError, "FSDP"),
    "checkpointing": (
        renamed(lambda key: key.replace(".self_attn", "._checkpoint_wrapped_module.self_attn")),
        AdapterError, "activation checkpointing"),
    "compiled layers": (renamed(lambda key: key.replace(".self_attn", "._orig_mod.self_attn")),
                        AdapterError, "on a part of the model"),
    "compiled twice": (renamed(lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod._orig_mod.")),
                       AdapterError, "`_orig_mod.`"),
    "compiled beside plain": (
        extra(f"{PREFIX}_orig_mod.{Q0}.lora_A.weight"), AdapterError, "one lora_A"),
    "layers of two models": (
        renamed(lambda key: key.replace("model.layers.0", "model.language_model.layers.0")),
        AdapterError, "the layers of one model"),
    "one module of two models": (
        extra(f"{PREFIX}language_model.{Q0}.lora_A.weight"), AdapterError, "one lora_A"),
    "image part": (extra(f"{PREFIX}model.vision_tower.layers.0.self_attn.q_proj.lora_A.weight"),
                   UnsupportedError, "the image part"),
    "a layer with a leading zero": (
        renamed(lambda key: key.replace("layers.0", "layers.00")), UnsupportedError, "layers.00"),
    "a layer below zero": (
        renamed(lambda key: key.replace("layers.0", "layers.-1")), AdapterError, "another name"),
    "a third factor": (extra(f"{PREFIX}{Q0}.lora_C.weight"), AdapterError, "another name"),
    "one dimension": (tensor(Q0, "A", np.ones(8)), AdapterError, "factors"),
    "a number": (tensor(Q0, "B", np.float32(1)), AdapterError, "factors"),
    "A the wrong way round": (tensor(Q0, "A", np.ones((8, 2))), AdapterError, "rank 2"),
    "factors of integers": (
        lambda folder: folder.tensors.update({folder.key(Q0, "A"): np.ones((2, 8), np.int64)}),
        AdapterError, "float type"),
    "-Inf": (tensor(Q0, "A", np.full((2, 8), -np.inf)), AdapterError, "NaN or Inf"),
    "a name of a space": (extra(f"{PREFIX}model.layers.0 .x.lora_A.weight"), AdapterError, "another"),
    "a name of NUL": (extra(f"{PREFIX}{Q0}\0.lora_A.weight"), AdapterError, "another"),
    "empty name": (extra(""), AdapterError, "another name"),
    "default of a list": (notes("default_expression", value=[]), AdapterError, "default_expression"),
    "layers below zero": (notes("base_model", "n_layers", value=-1), AdapterError, "n_layers"),
    "scale too large": (config(lora_alpha=1e42), AdapterError, "float32"),
    "scale too small": (config(lora_alpha=1e-60), AdapterError, "float32"),
    "selected without tensors": (
        notes("selected_layers", value=[0, 1, 5]), AdapterError, "layer 5"),
    "tensors not selected": (notes("selected_layers", value=[0]), AdapterError, "layer 1"),
    "selected twice": (notes("selected_layers", value=[0, 1, 1]), AdapterError, "each once"),
    "selected lists": (notes("selected_layers", value=[[0]]), AdapterError, "selected_layers"),
    "expressions of a list": (notes("expressions", value=["default"]), AdapterError, "expressions"),
    "an expression of a number": (
        notes("expressions", "other", value=3), AdapterError, "expressions.other"),
    "selected nothing": (notes("selected_layers", value=[]), AdapterError, "selected_layers"),
    "coefficient for no layer": (notes(*COEFFICIENTS, "9", value=1.0), AdapterError, "layer 9"),
    "coefficient missing": (without(*COEFFICIENTS, "1"), AdapterError, "coefficient for layer 1"),
    "coefficient zero": (notes(*COEFFICIENTS, "1", value=0), AdapterError, "not 0"),
    "coefficient of 401 digits": (
        notes(*COEFFICIENTS, "1", value=10**400), AdapterError, "finite number"),
    "alpha of 401 digits": (config(lora_alpha=10**400), AdapterError, "lora_alpha"),
    "layer of 5000 digits": (
        extra(f"{PREFIX}model.layers.{'9' * 5000}.self_attn.q_proj.lora_A.weight"),
        UnsupportedError, "linear module"),
    "coefficient text": (notes(*COEFFICIENTS, "1", value="1"), AdapterError, "finite number"),
    "coefficient true": (notes(*COEFFICIENTS, "1", value=True), AdapterError, "finite number"),
    "coefficient of a name": (notes(*COEFFICIENTS, "one", value=1), AdapterError, "layer numbers"),
    "coefficient of 01": (notes(*COEFFICIENTS, "01", value=1), AdapterError, "layer numbers"),
    "other expression incomplete": (
        without("expressions", "other", "coefficients", "1"), AdapterError, "other.coefficients"),
    "no coefficients": (without(*COEFFICIENTS), AdapterError, "coefficients"),
    "unknown default": (notes("default_expression", value="x"), AdapterError, "default, other"),
    "no expressions": (notes("expressions", value={}), AdapterError, "expressions"),
    "format of tomorrow": (notes("format_version", value=2), AdapterError, "format_version"),
    "format true": (notes("format_version", value=True), AdapterError, "format_version"),
    "unknown key": (notes("scale", value=2), AdapterError, "unknown key"),
    "missing key": (without("selected_layers"), AdapterError, "selected_layers"),
    "layers a text": (notes("base_model", "n_layers", value="2"), AdapterError, "n_layers"),
    "negative shots": (notes("expressions", "other", "n_shots", value=-1), AdapterError, "n_shots"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_a_contradiction_is_refused_by_name(case: str, folder: Folder) -> None:
    change, error, words = HOSTILE[case]
    change(folder)
    with pytest.raises(error) as caught:
        read_adapter(folder.save())
    assert words in str(caught.value)
    assert all(problem.where and problem.expected for problem in caught.value.problems)


def test_everything_wrong_is_told_in_one_error(folder: Folder) -> None:
    for name in ("NaN", "B missing", "selected without tensors", "coefficient for no layer"):
        if name == "NaN":
            tensor(Q1, "A", np.full((2, 8), np.nan))(folder)
        else:
            HOSTILE[name][0](folder)
    with pytest.raises(AdapterError) as caught:
        read_adapter(folder.save())
    text = str(caught.value)
    assert all(word in text for word in ("NaN or Inf", "lora_B", "layer 5", "layer 9"))
