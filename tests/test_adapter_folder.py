"""An adapter's folder: what is not one, or is one of another kind."""

# ruff: noqa: F811 - fixtures are imported, and are parameters of the tests, too
from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
from test_adapter import (  # noqa: F401
    COEFFICIENTS,
    PREFIX,
    Q0,
    Q1,
    Change,
    Folder,
    config,
    drop,
    folder,
    notes,
    renamed,
)

from safegene_converter import formula
from safegene_converter.inputs.adapter import check_base_fits, read_adapter
from safegene_converter.inputs.base import open_base
from safegene_runtime.errors import AdapterError, FormatError


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
