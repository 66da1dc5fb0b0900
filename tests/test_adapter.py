"""An adapter folder is one consistent thing, or it is refused, with everything that is wrong."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from safegene_converter import formula
from safegene_converter.inputs.adapter import check_base_fits, read_adapter
from safegene_converter.inputs.base import open_base
from safegene_runtime.errors import AdapterError, FormatError, SafeGeneError, UnsupportedError

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
    "another block": (extra(f"{PREFIX}transformer.h.0.attn.c_attn.lora_A.weight"),
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


def test_json_that_means_two_things_is_refused(folder: Folder) -> None:
    path = folder.save()
    for name in ("adapter_config.json", "safegene.json"):
        good = (path / name).read_text()
        for bad in (good[:-1] + ', "r": 1, "r": 2}', "{", "version https://git-lfs.x\n", "[]"):
            (path / name).write_text(bad)
            with pytest.raises(FormatError if bad != "[]" else AdapterError):
                read_adapter(path)
        (path / name).write_text(good)
    read_adapter(path)


class Touch:
    """Unpickling it leaves a mark."""

    def __init__(self, mark: str) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.mark, "w")


def test_a_pickle_is_never_opened(folder: Folder, tmp_path: Path) -> None:
    path = folder.save()
    (path / "adapter_model.safetensors").unlink()
    mark = tmp_path / "mark"
    (path / "adapter_model.bin").write_bytes(pickle.dumps(Touch(str(mark))))
    with pytest.raises(AdapterError, match="never opened"):
        read_adapter(path)
    (path / "adapter_model.bin").rename(path / "adapter_model.safetensors")
    with pytest.raises(FormatError):
        read_adapter(path)
    assert not mark.exists()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(name: str, folder: Folder) -> None:
    path = folder.save()
    (path / name).unlink()
    with pytest.raises(AdapterError, match=name):
        read_adapter(path)


def test_no_folder_is_no_adapter(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "nothing", tmp_path / "file"):
        with pytest.raises(AdapterError, match="a folder"):
            read_adapter(path)


def test_without_notes_it_is_a_plain_lora(folder: Folder) -> None:
    path = folder.save()
    (path / "safegene.json").unlink()
    adapter = read_adapter(path)
    assert {module.coefficient for module in adapter.modules} == {1.0}
    with pytest.raises(AdapterError, match="one of default"):
        read_adapter(path, "other")


@pytest.mark.parametrize("prefix", [f"{PREFIX}_orig_mod.", f"_orig_mod.{PREFIX}"])
def test_names_of_a_compiled_model_are_read_as_peft_strips_them(
    prefix: str, folder: Folder
) -> None:
    plain = read_adapter(folder.save())
    renamed(lambda key: key.replace(PREFIX, prefix))(folder)
    compiled = read_adapter(folder.save())
    same_modules(compiled, plain)
    assert plain.is_as_peft_reads
    assert not compiled.is_as_peft_reads


def same_modules(found: Any, expected: Any) -> None:
    assert len(found.modules) == len(expected.modules) > 0
    for one, other in zip(found.modules, expected.modules, strict=True):
        assert (one.name, one.scaling, one.coefficient) == (
            other.name, other.scaling, other.coefficient,
        )  # fmt: skip
        assert np.array_equal(one.a, other.a)
        assert np.array_equal(one.b, other.b)


@pytest.mark.parametrize("stem", ["model.language_model", "language_model.model"])
@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["visual.q_proj"]},
        {"target_modules": r".*language_model.*\.(q_proj|up_proj)"},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1],
         "layers_pattern": "layers", "exclude_modules": r".*visual.*"},
        {"target_modules": r".*language.*\.(q_proj|up_proj)", "use_rslora": True,
         "rank_pattern": {r".*language_model.*layers.0.*q_proj": 3},
         "alpha_pattern": {"language_model.*up_proj": 5}},
    ],
    ids=["names", "expression", "layers", "patterns"],
)  # fmt: skip
def test_the_text_part_of_a_larger_model_is_read_as_peft_runs_it(
    stem: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    """What PEFT adds to each weight there is what the adapter adds in the text model."""
    import peft
    import torch
    from transformers import AutoModel

    text = AutoModel.from_pretrained(tiny.hf_model("llama"))
    whole = torch.nn.Module()
    outer, inner = stem.split(".")
    whole.add_module(outer, torch.nn.Module())
    whole.get_submodule(outer).add_module(inner, text)
    whole.visual = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)})
    tuned = peft.get_peft_model(whole, peft.LoraConfig(r=4, lora_alpha=8, **settings))
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tuned.save_pretrained(tmp_path)
    adapter = read_adapter(tmp_path)
    theirs = {
        name.removeprefix(f"base_model.model.{stem}."): layer.get_delta_weight("default")
        for name, layer in tuned.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    ours = {module.name.removeprefix("model."): module for module in adapter.modules}
    assert ours.keys() == theirs.keys() != set()
    for name, module in ours.items():
        error = np.abs(formula.delta(module) - theirs[name].detach().numpy()).max()
        assert error <= 1e-6 * np.abs(formula.delta(module)).max()
    assert not adapter.is_as_peft_reads
    assert adapter.cautions == ()
    base = open_base(tiny.gguf_model("llama"))
    check_base_fits(adapter, base.module_shapes(), base.architecture, base.n_layers)


def test_a_target_that_matches_nothing_is_a_caution_as_in_peft(folder: Folder) -> None:
    folder.config["target_modules"] = ["q_proj", "k_proj", "c_attn"]
    adapter = read_adapter(folder.save())
    assert len(adapter.cautions) == 1
    assert "'c_attn'" in adapter.cautions[0]
    check_base_fits(adapter, SHAPES_QK, "llama", 2)
    folder.config["target_modules"] = ["q_proj", "k_proj", "v_proj"]
    adapter = read_adapter(folder.save())
    check_base_fits(adapter, SHAPES_QK, "llama", 2)
    with pytest.raises(AdapterError, match="v_proj"):  # the base has it: tensors are missing
        check_base_fits(adapter, SHAPES, "llama", 2)


@pytest.mark.parametrize("excluded", [["k_proj"], r".*\.k_proj", ["self_attn.k_proj"]])
def test_a_target_that_is_excluded_needs_no_tensors(excluded: Any, folder: Folder) -> None:
    folder.config.update(target_modules=["q_proj", "k_proj"], exclude_modules=excluded)
    for layer in (0, 1):
        drop(f"model.layers.{layer}.self_attn.k_proj", "A", "B")(folder)
    adapter = read_adapter(folder.save())
    assert adapter.cautions == ()
    check_base_fits(adapter, SHAPES_QK, "llama", 2)


def scaled(factor: float) -> Change:
    def change(folder: Folder) -> None:
        for key in folder.tensors:
            if ".lora_B." in key:
                folder.tensors[key] = folder.tensors[key] * np.float32(factor)

    return change


CAUTIONS: dict[str, tuple[Change, str]] = {
    "B times a million": (scaled(1e6), "larger than the weights of any language model"),
    "alpha too large": (config(lora_alpha=1000), "above 100"),
    "alpha too small": (config(lora_alpha=1e-4), "below 0.001"),
    "coefficient below zero": (notes(*COEFFICIENTS, "1", value=-1.0), "negative"),
}


@pytest.mark.parametrize("case", CAUTIONS)
def test_an_implausible_scale_is_read_and_said(case: str, folder: Folder) -> None:
    assert read_adapter(folder.save()).cautions == ()
    change, words = CAUTIONS[case]
    change(folder)
    cautions = read_adapter(folder.save()).cautions
    assert any(words in caution for caution in cautions)
    assert all(f"of {len(folder.tensors) // 2} modules" in caution for caution in cautions)


SHAPES = {
    f"model.layers.{layer}.self_attn.{name}": (6, 8)
    for layer in (0, 1)
    for name in ("q_proj", "k_proj", "v_proj")
}
SHAPES_QK = {name: shape for name, shape in SHAPES.items() if "v_proj" not in name}
FITS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "another architecture": (lambda fit: {**fit, "architecture": "qwen2"}, "architecture"),
    "another depth": (lambda fit: {**fit, "n_layers": 3}, "n_layers"),
    "another width": (
        lambda fit: {**fit, "shapes": dict.fromkeys(fit["shapes"], (6, 9))},
        "(6, 9)",
    ),
    "a module the base lacks": (
        lambda fit: {**fit, "shapes": {k: v for k, v in fit["shapes"].items() if k != Q0}},
        "no such module",
    ),
}


@pytest.mark.parametrize("case", FITS)
def test_another_base_is_refused(case: str, folder: Folder) -> None:
    adapter = read_adapter(folder.save())
    fit: dict[str, Any] = {"shapes": SHAPES, "architecture": "llama", "n_layers": 2}
    check_base_fits(adapter, **fit)
    change, words = FITS[case]
    with pytest.raises(AdapterError) as caught:
        check_base_fits(adapter, **change(copy.deepcopy(fit)))
    assert words in str(caught.value)


def test_a_base_of_another_model_is_one_problem(folder: Folder) -> None:
    """Not one for each of its modules, which would hide it."""
    adapter = read_adapter(folder.save())
    with pytest.raises(AdapterError) as caught:
        check_base_fits(adapter, {}, "llama", 1)
    assert [problem.field for problem in caught.value.problems] == ["n_layers"]
    with pytest.raises(AdapterError, match=f"and {len(adapter.modules) - 1} others") as caught:
        check_base_fits(adapter, {}, "llama", 2)
    assert len(caught.value.problems) == 1


def test_what_is_passed_instead_of_an_adapter_is_named(tmp_path: Path) -> None:
    for name, said in (("config.json", "a whole model"), ("reference.json", "a reference"),
                       ("manifest.json", "an artifact")):  # fmt: skip
        (tmp_path / name).touch()
        with pytest.raises(AdapterError, match=said) as caught:
            read_adapter(tmp_path)
        assert len(caught.value.problems) == 1


def test_a_targeted_module_of_the_base_without_tensors_is_refused(folder: Folder) -> None:
    """PEFT would initialise it at random, or warn at most."""
    for factor in "AB":
        del folder.tensors[folder.key(Q1, factor)]
    adapter = read_adapter(folder.save())
    with pytest.raises(AdapterError) as caught:
        check_base_fits(adapter, SHAPES, "llama", 2)
    assert [problem.field for problem in caught.value.problems] == [Q1]
