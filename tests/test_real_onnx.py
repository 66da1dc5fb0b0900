"""The real chat model and the trained adapter in ONNX: as exact as the tiny ones, and in GenAI."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx_tools import FORMS, convert_onnx, feeds, session
from test_onnx_genai import N_NEW, genai, without_end

from safegene import record
from safegene_converter.bases.gguf_to_hf import gguf_to_hf
from safegene_converter.bases.onnx_build import build_onnx
from safegene_converter.cli.smollm2 import find_adapter, find_smollm2, write_float_base
from safegene_converter.inputs.base import open_base
from safegene_runtime.artifact.onnx_checks import check_onnx_artifact
from safegene_runtime.engines.ort import OrtEngine
from safegene_runtime.gating.bounds import bounds_for
from safegene_runtime.record.prompts import builtin_suite
from safegene_runtime.record.reference import Reference
from safegene_runtime.verifying.forced import forced_passes

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("onnx"), pytest.mark.timeout(2400)]

N_PROMPTS = 3


@dataclass(frozen=True)
class Real:
    """The float model as a folder, and what PyTorch + PEFT answer."""

    hf: Path
    reference: Reference

    def base(self, precision: str) -> Path:
        """Exported once, when first asked for."""
        out = self.hf.parent / precision
        if not out.exists():
            build_onnx(self.hf, out, precision)
        return out


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Real:
    folder = tmp_path_factory.mktemp("real")
    write_float_base(find_smollm2(), folder / "f32.gguf")
    hf, _ = gguf_to_hf(open_base(folder / "f32.gguf"), folder / "hf", lambda *_: None)
    suite = builtin_suite()
    prompts = [
        prompt
        for kind in ("harmful", "benign")
        for prompt in [one for one in suite if one.kind == kind][:N_PROMPTS]
    ]
    reference = record(find_adapter(), hf.path, folder / "r", prompts=prompts, max_new_tokens=8)
    return Real(hf.path, reference)


@pytest.mark.parametrize(
    ("precision", "form"),
    [*(("fp32", form) for form in FORMS), *((kind, "branch") for kind in ("fp16", "int8", "int4"))],
)
def test_onnx_runtime_and_genai_say_what_pytorch_says(
    precision: str, form: str, real: Real, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    convert_onnx(find_adapter(), real.base(precision), out, form=form, check=False)
    file = out / "adapter.onnx_adapter" if form == "adapter" else None
    prompts = real.reference.prompts
    with OrtEngine(out / "model.onnx", file) as engine:
        found = forced_passes(engine, real.reference)
        kl = float(np.mean(np.concatenate([one.kl for one in found])))
        replies = engine.generate(
            [prompt.prompt_ids for prompt in prompts],
            8,
            real.reference.meta["decoding"]["stop_ids"],
        )
        ids = list(prompts[0].prompt_ids)
        logits, reply = genai(out, file, ids)
        _, ours = next(iter(engine.logits([ids], [1])))
        expected = without_end(engine, ids)
    assert len(reply) == N_NEW
    assert reply == expected
    assert np.abs(logits - ours[0]).max() <= 1e-3
    if precision in ("fp16", "int8"):
        assert kl <= bounds_for({"fp16": "f16", "int8": "8-bit"}[precision]).mean_kl
    if precision == "fp32":
        assert abs(kl) <= 1e-6
        assert replies == [list(prompt.ref_ids) for prompt in prompts]
    print(f"{precision} {form}: mean KL {kl:.3g}")


def test_the_adapter_file_is_the_same_as_passing_its_tensors(real: Real, tmp_path: Path) -> None:
    out = tmp_path / "out"
    convert_onnx(find_adapter(), real.base("fp32"), out, form="adapter", check=False)
    file = out / "adapter.onnx_adapter"
    loaded, options = onnxruntime.LoraAdapter(), onnxruntime.RunOptions()
    loaded.Load(str(file))
    options.add_active_adapter(loaded)
    values = onnxruntime.AdapterFormat.read_adapter(str(file)).get_parameters()
    by_hand = {name: value.numpy() for name, value in values.items()}
    running = session(out / "model.onnx")
    fed = feeds(running, [list(real.reference.prompts[0].prompt_ids)], head_size=64)
    (with_file,) = running.run(["logits"], fed, options)
    (passed,) = running.run(["logits"], fed | by_hand)
    (without,) = running.run(["logits"], fed)
    assert np.array_equal(with_file, passed)
    assert np.abs(with_file - without).max() > 0.1


def test_bfloat16_is_written_with_its_slots(real: Real, tmp_path: Path) -> None:
    """ONNX Runtime has no kernels for it on the CPU, so nothing runs here."""
    manifest = convert_onnx(
        find_adapter(), real.base("bf16"), tmp_path / "out", form="adapter", check=False
    )
    assert check_onnx_artifact(manifest, tmp_path / "out" / "model.onnx") == "bf16"
    assert {slot.type for slot in manifest.slots} == {"BF16"}
