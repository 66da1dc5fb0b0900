"""Base + task LoRA + gene: one adapter that computes what PEFT computes with both active."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import peft
import pytest
import tiny
import torch
from test_exactness import PROMPTS, with_coefficients
from transformers import AutoModelForCausalLM

from safegene import convert, record
from safegene_converter import formula
from safegene_converter.cli import main
from safegene_converter.importing.stack import stack_adapters, weighted
from safegene_converter.inputs.adapter import read_adapter
from safegene_runtime.artifact.integrity import check_integrity
from safegene_runtime.artifact.manifest import read_manifest
from safegene_runtime.engines.engine import Engine
from safegene_runtime.engines.llama import LlamaEngine
from safegene_runtime.engines.ort import OrtEngine
from safegene_runtime.errors import AdapterError, RecordError, SafeGeneError
from safegene_runtime.formats.gguf.header import read_gguf
from safegene_runtime.formats.gguf.tensors import read_tensor_bytes
from safegene_runtime.formats.sealed import SealedFiles
from safegene_runtime.progress import silent

WEIGHT = 0.7
IDS = [5, 99, 1200, 40, 7, 300]


def trained_task(out: Path) -> Path:
    """A LoRA that a few steps of training made, under rsLoRA, on modules that are partly the gene's."""
    torch.manual_seed(3)
    config = peft.LoraConfig(
        r=3, lora_alpha=9, use_rslora=True, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )  # fmt: skip
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny.hf_model("llama")), config
    )
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    batch = torch.tensor([IDS])
    for _ in range(8):
        model(input_ids=batch, labels=batch).loss.backward()
        optimiser.step()
        optimiser.zero_grad()
    model.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """(gene, task adapter, both as one)."""
    work = tmp_path_factory.mktemp("stack")
    gene = with_coefficients(tiny.peft_adapter("llama", work / "gene", scale=0.1), "llama")
    task = trained_task(work / "task")
    done = main.main(["import", str(gene), "--with", f"{task}={WEIGHT}", "-o", str(work / "both")])
    assert done == 0
    return gene, task, work / "both"


@pytest.fixture(scope="module")
def both_active(folders: tuple[Path, Path, Path]) -> peft.PeftModel:
    """PEFT with both adapters active, coefficients and weight in its scaling."""
    gene, task, _ = folders
    model = AutoModelForCausalLM.from_pretrained(tiny.hf_model("llama"), dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(model, gene, adapter_name="gene").eval()
    tuned.load_adapter(task, "task")
    tuned.base_model.set_adapter(["gene", "task"])
    coefficients = {module.name: module.coefficient for module in read_adapter(gene).modules}
    for name, layer in tuned.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            if "gene" in layer.scaling:
                layer.scaling["gene"] *= coefficients[name.removeprefix("base_model.model.")]
            if "task" in layer.scaling:
                layer.scaling["task"] *= WEIGHT
    return tuned


def test_the_delta_of_a_stack_is_the_sum_that_peft_adds(
    folders: tuple[Path, Path, Path], both_active: peft.PeftModel
) -> None:
    modules = {module.name: module for module in read_adapter(folders[2]).modules}
    seen = set()
    for name, layer in both_active.named_modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            module = modules[name.removeprefix("base_model.model.")]
            theirs = sum(layer.get_delta_weight(one) for one in layer.lora_A).detach().numpy()
            assert module.rank == sum(map(layer.r.get, layer.lora_A))
            assert np.abs(formula.delta(module) - theirs).max() <= 1e-6 * np.abs(theirs).max()
            seen.add(module.name)
    assert seen == modules.keys()


@pytest.mark.parametrize("form", ["gguf sidecar", "gguf merged", "onnx branch", "onnx merged"])
def test_every_form_computes_what_peft_computes_with_both_active(
    form: str, folders: tuple[Path, Path, Path], both_active: peft.PeftModel, tmp_path: Path
) -> None:
    target, name = form.split()
    base = tiny.gguf_model("llama") if target == "gguf" else tiny.onnx_model("llama")
    convert(folders[2], base, tmp_path / "out", to=target, form=name, check=False)  # type: ignore[arg-type]
    engine: Engine
    if target == "onnx":
        engine = OrtEngine(tmp_path / "out" / "model.onnx", None)
    elif name == "merged":
        engine = LlamaEngine(tmp_path / "out" / "model.gguf", None, threads=1)
    else:
        engine = LlamaEngine(base, tmp_path / "out" / "adapter.gguf", threads=1)
    with engine:
        _, logits = next(iter(engine.logits([IDS], [len(IDS)])))
        ours = torch.log_softmax(torch.from_numpy(np.array(logits, np.float64)), -1)
    with torch.no_grad():
        expected = torch.log_softmax(both_active(torch.tensor([IDS])).logits[0].double(), -1)
        plain = torch.log_softmax(_without(both_active, "task")[0].double(), -1)
    assert float((expected.exp() * (expected - ours)).sum(-1).abs().max()) <= 1e-8
    assert float((expected.exp() * (expected - plain)).sum(-1).max()) > 1e-4, "the task must matter"


def _without(model: peft.PeftModel, adapter: str) -> torch.Tensor:
    """Logits with the others active."""
    model.base_model.set_adapter(["gene"])
    logits = model(torch.tensor([IDS])).logits
    model.base_model.set_adapter(["gene", adapter])
    return logits


def test_convert_and_record_take_a_stack_as_it_is(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """No folder of its own is needed, and what is recorded fits what is folded."""
    gene, task, both = folders
    base, out = tiny.gguf_model("llama"), tmp_path / "out"
    command = ["convert", str(gene), "--base", str(base), "--as", "sidecar", "--no-self-check"]
    assert main.main([*command, "--with", f"{task}={WEIGHT}", "-o", str(out)]) == 0
    manifest = read_manifest(out)
    assert manifest.adapter["files"] == read_adapter(both).digests
    assert manifest.adapter["name"] == "gene+task"
    written = read_gguf(out / "adapter.gguf").tensors
    convert(both, base, tmp_path / "both", form="sidecar", check=False)
    for name, info in read_gguf(tmp_path / "both" / "adapter.gguf").tensors.items():
        assert read_tensor_bytes(written[name]) == read_tensor_bytes(info)
    reference = record(
        gene, tiny.hf_model("llama"), tmp_path / "reference", prompts=PROMPTS, max_new_tokens=2,
        stack=[(task, WEIGHT)],
    )  # fmt: skip
    with SealedFiles() as files:
        check_integrity(manifest, out, reference, base, silent, files)
    alone = record(
        gene, tiny.hf_model("llama"), tmp_path / "alone", prompts=PROMPTS, max_new_tokens=2
    )
    with SealedFiles() as files, pytest.raises(RecordError, match="adapter"):
        check_integrity(manifest, out, alone, base, silent, files)


def test_no_adapter_of_a_stack_is_overwritten_by_what_is_made_of_it(
    folders: tuple[Path, Path, Path],
) -> None:
    gene, task, _ = folders
    before = sorted(path.name for path in task.iterdir())
    with pytest.raises(SafeGeneError):
        convert(
            gene, tiny.gguf_model("llama"), task, form="sidecar", stack=[(task, 1.0)], force=True
        )
    assert sorted(path.name for path in task.iterdir()) == before


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_a_weight_without_a_meaning_is_refused(
    weight: float, folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match="a finite number that is not 0"):
        stack_adapters(folders[0], [(folders[1], weight)], tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_adapters_of_different_bases_are_refused(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    other = tiny.peft_adapter("llama", tmp_path / "other", hidden=256)
    with pytest.raises(AdapterError, match="different bases"):
        stack_adapters(folders[0], [(other, 1.0)], tmp_path / "out")


def test_a_weight_stands_behind_the_last_equals_sign(tmp_path: Path) -> None:
    (tmp_path / "a=2").mkdir()
    assert weighted("x/y=0.5") == (Path("x/y"), 0.5)
    assert weighted("x/y") == (Path("x/y"), 1.0)
    assert weighted(str(tmp_path / "a=2")) == (tmp_path / "a=2", 1.0)
