"""`safegene import`: what is not read directly becomes a plain folder with the same effect in PEFT."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tiny
import torch
from safetensors.numpy import load_file, save_file
from test_adapter_files import assert_same, plain, shard
from transformers import AutoModelForCausalLM

from safegene_converter.cli import main
from safegene_converter.importing.plain import import_adapter
from safegene_converter.inputs.adapter import read_adapter
from safegene_converter.inputs.adapter_files import CONFIG_NAME, INDEX_NAME, WEIGHTS_NAME
from safegene_runtime.child import python_environment
from safegene_runtime.errors import AdapterError, FormatError, SafeGeneError, UnsupportedError

BIN = "adapter_model.bin"


def pickled(path: Path, change: Callable[[dict[str, Any]], Any] = lambda tensors: tensors) -> Path:
    """The same adapter as a `.bin`."""
    tensors = {name: torch.from_numpy(a) for name, a in load_file(path / WEIGHTS_NAME).items()}
    torch.save(change(tensors), path / BIN)
    (path / WEIGHTS_NAME).unlink()
    return path


def renamed(rename: Callable[[str], str]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        tensors = load_file(path / WEIGHTS_NAME)
        save_file({rename(name): values for name, values in tensors.items()}, path / WEIGHTS_NAME)

    return edit


def halves(path: Path) -> None:
    tensors = load_file(path / WEIGHTS_NAME)
    for part in (0, 1):
        some = {k: torch.from_numpy(tensors[k]) for k in sorted(tensors)[part::2]}
        torch.save(some, path / f"adapter_model-{part}.bin")
    (path / WEIGHTS_NAME).unlink()


WRITTEN: dict[str, Callable[[Path], Any]] = {
    "a pickle": pickled,
    "two pickles": halves,
    "shards": shard,
    "shards without an index": lambda path: (shard(path) / INDEX_NAME).unlink(),
    "the name of the adapter": renamed(lambda name: name.replace(".weight", ".default.weight")),
    "the name of a wrapper": renamed(lambda name: "module." + name.replace("layers", "_orig_mod.layers")),
    "no prefix": renamed(lambda name: name.removeprefix("base_model.model.")),
    "the prefix twice": renamed(lambda name: "base_model.model." + name),
    "a plain adapter": lambda path: None,
}  # fmt: skip


@pytest.mark.parametrize("how", WRITTEN)
def test_what_other_tools_and_times_wrote_becomes_the_plain_adapter(
    how: str, tmp_path: Path
) -> None:
    expected = read_adapter(plain(tmp_path / "plain"))
    WRITTEN[how](plain(tmp_path / "old"))
    found = import_adapter(tmp_path / "old", tmp_path / "new")
    assert_same(found, expected)
    assert found.is_as_peft_reads
    assert sorted(os.listdir(tmp_path / "new")) == [CONFIG_NAME, WEIGHTS_NAME]


def test_half_precision_in_a_pickle_keeps_every_bit(tmp_path: Path) -> None:
    path = pickled(plain(tmp_path / "old"), lambda t: {n: a.bfloat16() for n, a in t.items()})
    want = torch.load(path / BIN, weights_only=True)
    import_adapter(path, tmp_path / "new")
    found = load_file(tmp_path / "new" / WEIGHTS_NAME)
    assert found.keys() == want.keys()
    assert all(np.array_equal(found[name], want[name].float().numpy()) for name in want)


def mlx(path: Path, source: Path, **parameters: Any) -> Path:
    """An adapter as mlx_lm/tuner/trainer.py and utils.py save it."""
    path.mkdir()
    tensors = {}
    for name, values in load_file(source / WEIGHTS_NAME).items():
        module, factor = name.removeprefix("base_model.model.").split(".lora_")
        tensors[f"{module}.lora_{factor[0].lower()}"] = np.ascontiguousarray(values.T)
    save_file(tensors, path / "adapters.safetensors")
    config = {
        "fine_tune_type": "lora", "num_layers": 2, "model": "some/model", "seed": 0,
        "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0, **parameters},
    }  # fmt: skip
    (path / CONFIG_NAME).write_text(json.dumps(config))
    return path


def test_an_adapter_of_mlx_computes_in_peft_what_mlx_computes(tmp_path: Path) -> None:
    source = tiny.peft_adapter("llama", tmp_path / "peft")
    old = mlx(tmp_path / "old", source, scale=3.0)
    import_adapter(old, tmp_path / "new")
    model = AutoModelForCausalLM.from_pretrained(tiny.hf_model("llama"))
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    stored = {n: torch.from_numpy(a) for n, a in load_file(old / "adapters.safetensors").items()}
    expected = {}
    for name in {name.rpartition(".")[0] for name in stored}:
        # the forward of mlx_lm.tuner.lora.LoRALinear
        z = (x @ stored[f"{name}.lora_a"]) @ stored[f"{name}.lora_b"]
        expected[name] = (model.get_submodule(name)(x) + 3.0 * z).detach()
    tuned = peft.PeftModel.from_pretrained(model, tmp_path / "new")
    assert len(expected) == 3 * tiny.N_LAYERS
    for name, y in expected.items():
        ours = tuned.base_model.model.get_submodule(name)(x)
        assert torch.allclose(ours, y, rtol=1e-5, atol=1e-5), name


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (lambda c: c["lora_parameters"].update(alpha=16), "lora_parameters.alpha"),
        (lambda c: c["lora_parameters"].pop("scale"), "lora_parameters.scale"),
        (lambda c: c["lora_parameters"].update(rank=None), "lora_parameters.rank"),
        (lambda c: c.update(fine_tune_type="dora"), "fine_tune_type"),
        (lambda c: c.update(fine_tune_type="full"), "fine_tune_type"),
    ],
)
def test_of_mlx_what_would_change_a_number_is_refused(
    change: Callable[[dict[str, Any]], Any], field: str, tmp_path: Path
) -> None:
    old = mlx(tmp_path / "old", tiny.peft_adapter("llama", tmp_path / "peft"))
    config = json.loads((old / CONFIG_NAME).read_text())
    change(config)
    (old / CONFIG_NAME).write_text(json.dumps(config))
    with pytest.raises(AdapterError) as caught:
        import_adapter(old, tmp_path / "new")
    assert [problem.field for problem in caught.value.problems] == [field]
    assert not (tmp_path / "new").exists()


class Evil:
    """A pickle that makes a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    path = plain(tmp_path / "old")
    (path / WEIGHTS_NAME).unlink()
    for save in (torch.save, lambda value, at: at.write_bytes(pickle.dumps(value))):
        save({"x": Evil(tmp_path / "made")}, path / BIN)
        with pytest.raises(FormatError, match=r"adapter_model\.bin"):
            import_adapter(path, tmp_path / "new")
        assert not (tmp_path / "made").exists()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "value", [{"step": 3}, [torch.ones(2)], {"x": torch.eye(2).to_sparse()}], ids=str
)
def test_a_pickle_of_something_else_is_refused(value: Any, tmp_path: Path) -> None:
    path = pickled(plain(tmp_path / "old"), lambda _: value)
    with pytest.raises(FormatError, match="dense tensors by name"):
        import_adapter(path, tmp_path / "new")


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.socket().connect(('127.0.0.1', 9))",
        "import socket; socket.getaddrinfo('localhost', 9)",
        "import os; os.system('true')",
        "import subprocess; subprocess.run(['true'])",
        "import os; os.fork()",
    ],
)
def test_the_child_that_reads_pickles_has_no_way_out(code: str) -> None:
    first = (
        "from safegene_converter.importing.pickle_child import forbid_way_out; forbid_way_out(); "
    )
    done = subprocess.run(
        [sys.executable, "-c", first + code], env=python_environment(), capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert "PermissionError: a pickle asked for" in done.stderr


REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "two adapters": (
        renamed(lambda name: name.replace(".weight", ".a.weight" if "_A" in name else ".b.weight")),
        "those of one adapter",
    ),
    "two of a name": (
        lambda path: pickled(path, lambda t: t | {f"module.{n}": a for n, a in t.items()}),
        "one tensor of this name",
    ),
    "a tensor in two files": (
        lambda path: (halves(path), shutil.copy(path / "adapter_model-0.bin", path / "adapter_model-2.bin")),
        "each tensor in one file",
    ),
    "a shard is missing": (
        lambda path: ((shard(path) / INDEX_NAME).unlink(), next(path.glob("*-00002-*")).unlink()),
        "2 of one save",
    ),
    "no weights": (lambda path: (path / WEIGHTS_NAME).unlink(), "none of them"),
    "no configuration": (lambda path: (path / CONFIG_NAME).unlink(), "no such file"),
    "names of torchtune": (
        renamed(lambda name: name.split("model.model.")[1].replace("lora_A", "lora_a")), "another name",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", REFUSED)
def test_what_is_not_one_adapter_is_refused_and_leaves_nothing(how: str, tmp_path: Path) -> None:
    path = plain(tmp_path / "old")
    break_it, reason = REFUSED[how]
    break_it(path)
    with pytest.raises(SafeGeneError, match=reason):
        import_adapter(path, tmp_path / "new")
    assert os.listdir(tmp_path) == ["old"]


def test_what_cannot_be_read_is_not_published(tmp_path: Path) -> None:
    path = pickled(plain(tmp_path / "old"))
    config = json.loads((path / CONFIG_NAME).read_text())
    (path / CONFIG_NAME).write_text(json.dumps({**config, "peft_type": "PROMPT_TUNING"}))
    with pytest.raises(UnsupportedError, match="peft_type"):
        import_adapter(path, tmp_path / "new")
    assert os.listdir(tmp_path) == ["old"]


def test_the_refusal_of_a_pickle_names_a_command_that_helps(tmp_path: Path) -> None:
    path = pickled(plain(tmp_path / "old"))
    with pytest.raises(AdapterError) as caught:
        read_adapter(path)
    words = caught.value.problems[0].fix.partition("safegene ")[2].split()
    assert main.main([*words[:-1], str(tmp_path / "new")]) == 0
    assert len(read_adapter(tmp_path / "new").modules) == 2
