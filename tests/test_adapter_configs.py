"""Configurations of real adapters: read as PEFT reads them, or refused with the true reason."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import peft
import pytest
import tiny
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from transformers import AutoModelForCausalLM

from safegene_converter import formula
from safegene_converter.inputs.adapter import check_base_fits, read_adapter
from safegene_converter.inputs.adapter_files import CONFIG_NAME
from safegene_converter.inputs.base import open_base
from safegene_converter.inputs.peft_config import parse_config
from safegene_runtime.architecture.table import linear_modules
from safegene_runtime.errors import UnsupportedError
from safegene_runtime.formats import strictjson

FOLDER = tiny.REPOSITORY.parent / "shared" / "adapter-configs"
PATHS = sorted(FOLDER.glob("*.json"))
REFUSED = {
    "007-llama.json": "peft_type",
    "012-gemma3-vl.json": "use_dora",
    "027-llama.json": "modules_to_save",
    "060-gpt_oss_like.json": "modules_to_save",
}
"""The one field of each configuration that asks for more than a plain LoRA."""

MODULES = [f"model.layers.{layer}.{name}" for layer in (0, 1, 11) for name in linear_modules()]

pytestmark = pytest.mark.skipif(not PATHS, reason=f"no configurations in {FOLDER}")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_real_configuration_is_read_as_peft_reads_it_or_refused_for_what_it_asks(
    path: Path,
) -> None:
    config = strictjson.load(path)
    if path.name in REFUSED:
        with pytest.raises(UnsupportedError) as caught:
            parse_config(config, path.name)
        assert [problem.field for problem in caught.value.problems] == [REFUSED[path.name]]
        return
    ours = parse_config(config, path.name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fields that PEFT has dropped
        theirs = peft.LoraConfig.from_peft_type(**config)
    for module in MODULES:
        assert ours.is_target(module) == bool(check_target_module_exists(theirs, module)), module
        assert ours.scaling_of(module) == pytest.approx(
            theirs.lora_alpha / (theirs.r**0.5 if theirs.use_rslora else theirs.r)
        )
    assert not theirs.rank_pattern
    assert not theirs.alpha_pattern


FITTING = [
    path for path in PATHS if path.stem.partition("-")[2] in ("llama", "mistral", "qwen2", "qwen3")
]
UNFIT = {
    "010-llama.json": "lm_head",
    "080-llama.json": None,  # its targets are in layers that the tiny model lacks
}
"""What else the tensors of these adapters hold."""


@pytest.mark.parametrize("path", FITTING, ids=lambda path: path.stem)
def test_an_adapter_that_peft_makes_with_a_real_configuration_fits_its_base(
    path: Path, tmp_path: Path
) -> None:
    if path.name in REFUSED or UNFIT.get(path.name, "") is None:
        return
    architecture = path.stem.partition("-")[2].replace("mistral", "llama")
    config = strictjson.load(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(tiny.hf_model(architecture))
        tuned = peft.get_peft_model(model, peft.LoraConfig.from_peft_type(**config))
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        tuned.save_pretrained(tmp_path)
    (tmp_path / CONFIG_NAME).write_bytes(path.read_bytes())
    if path.name in UNFIT:
        with pytest.raises(UnsupportedError, match=str(UNFIT[path.name])):
            read_adapter(tmp_path)
        return
    adapter, base = read_adapter(tmp_path), open_base(tiny.gguf_model(architecture))
    check_base_fits(adapter, base.module_shapes(), base.architecture, base.n_layers)
    theirs = {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default")
        for name, layer in tuned.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert {module.name for module in adapter.modules} == theirs.keys()
    for module in adapter.modules:
        ours = formula.delta(module)
        assert abs(ours - theirs[module.name].detach().numpy()).max() <= 1e-6 * abs(ours).max()


def test_the_table_counts_them() -> None:
    done = subprocess.run(
        [sys.executable, tiny.REPOSITORY / "benchmarks" / "configs.py", FOLDER],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = [line for line in done.stdout.splitlines() if ".json" in line]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [p.name for p in PATHS]
    assert {row.split(" | ")[0].removeprefix("| ") for row in rows if "| no |" in row} == {
        *REFUSED
    } & {path.name for path in PATHS}
    assert f"{len(PATHS) - len(REFUSED)} of {len(PATHS)} are read" in done.stdout
