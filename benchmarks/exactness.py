"""What each converter makes of PEFT's scaling: mean KL of llama.cpp to PyTorch, on the real model.

    python benchmarks/exactness.py [--prompts 4]

SmolLM2-135M in F32 with the example adapter's factors, under configurations that scale them differently.
PyTorch + PEFT is the truth; beside it, the sidecar of `safegene convert` and that of llama.cpp's own
`convert_lora_to_gguf.py`, both run by llama-cpp-python's `Llama` with an F32 KV cache, over every position of
the prompts: our own engine refuses a file whose scaling can be misread. Both converters end with exit code 0
on every row.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import torch
from measuring import environment
from safetensors.numpy import load_file, save_file

from safegene import convert
from safegene_converter.bases.hf_to_gguf import find_llama_cpp
from safegene_converter.cli.smollm2 import find_adapter, find_smollm2, write_float_base
from safegene_converter.inputs.adapter import read_adapter
from safegene_converter.inputs.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from safegene_converter.inputs.base import open_base
from safegene_converter.inputs.safegene_json import SAFEGENE_NAME
from safegene_converter.recording.loading import load_with_adapter, save_as_folder
from safegene_runtime.record.prompts import builtin_suite

VARIANTS: dict[str, dict[str, Any]] = {
    "plain LoRA": {},
    "rsLoRA": {"use_rslora": True},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 4, "v_proj": 32}},
    "rank_pattern": {"rank_pattern": {"v_proj": 4}},
    "layer coefficients": {},
}


def main() -> None:
    """Prints one row per variant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=4)
    arguments = parser.parse_args()
    script = find_llama_cpp() / "convert_lora_to_gguf.py"
    print(f"{platform.machine()}, {platform.system()}; {find_smollm2().name} decoded to F32; "
          f"{arguments.prompts} prompts")  # fmt: skip
    print("| configuration | safegene | convert_lora_to_gguf.py |\n|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base, hf = folder / "base.gguf", folder / "hf"
        write_float_base(find_smollm2(), base)
        save_as_folder(open_base(base), hf)
        texts = [prompt.text for prompt in builtin_suite()[: arguments.prompts]]
        for number, (variant, changes) in enumerate(VARIANTS.items()):
            adapter = folder / f"adapter-{number}"
            write_variant(adapter, changes, keep_coefficients=variant == "layer coefficients")
            ids, expected = in_pytorch(adapter, base, texts)
            out = folder / f"ours-{number}"
            convert(adapter, base, out, form="sidecar", check=False)
            theirs = folder / f"theirs-{number}.gguf"
            subprocess.run(
                [sys.executable, str(script), str(adapter), "--base", str(hf), "--outtype", "f32",
                 "--outfile", str(theirs)],
                check=True, capture_output=True, env=environment(),
            )  # fmt: skip
            found = [mean_kl(base, path, ids, expected) for path in (out / "adapter.gguf", theirs)]
            print(f"| {variant} | {found[0]:.1e} | {found[1]:.1e} |", flush=True)


def write_variant(out: Path, changes: dict[str, Any], keep_coefficients: bool) -> None:
    """The example adapter under another configuration; a smaller rank keeps the first rows."""
    source = find_adapter()
    out.mkdir()
    config = {**json.loads((source / CONFIG_NAME).read_text()), **changes}
    (out / CONFIG_NAME).write_text(json.dumps(config))
    tensors = load_file(source / WEIGHTS_NAME)
    for module, rank in changes.get("rank_pattern", {}).items():
        for name in (name for name in tensors if f".{module}." in name):
            kept = tensors[name][:rank] if "lora_A" in name else tensors[name][:, :rank]
            tensors[name] = np.ascontiguousarray(kept)
    save_file(tensors, out / WEIGHTS_NAME)
    if keep_coefficients:
        shutil.copy(source / SAFEGENE_NAME, out)


def in_pytorch(
    adapter: Path, base: Path, texts: Sequence[str]
) -> tuple[list[list[int]], list[np.ndarray]]:
    """Token ids of the prompts, and PEFT's log-probabilities (T, vocab) in float64."""
    tuned, tokenizer = load_with_adapter(read_adapter(adapter), open_base(base))
    ids, found = [], []
    for text in texts:
        message = [{"role": "user", "content": text}]
        rendered = tokenizer.apply_chat_template(
            message, add_generation_prompt=True, tokenize=False
        )
        ids.append(tokenizer(rendered, add_special_tokens=False)["input_ids"])
        with torch.no_grad():
            logits = tuned(torch.tensor([ids[-1]])).logits[0].double()
        found.append(torch.log_softmax(logits, dim=-1).numpy())
    return ids, found


def mean_kl(
    base: Path, adapter: Path, ids: Sequence[Sequence[int]], expected: Sequence[np.ndarray]
) -> float:
    """KL(PyTorch || llama.cpp) in nats, over all positions."""
    total, count = 0.0, 0
    engine = llama_cpp.Llama(
        str(base), lora_path=str(adapter), n_ctx=512, logits_all=True, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    try:
        for one, p in zip(ids, expected, strict=True):
            engine.reset()
            engine.eval(list(one))
            wide = np.asarray(engine.scores[: len(one)], np.float64)
            q = wide - np.logaddexp.reduce(wide, axis=1, keepdims=True)
            # p log(p/q) - p + q has no negative term: no cancellation near equality
            total += float((np.exp(p) * (p - q) - np.exp(p) + np.exp(q)).sum())
            count += len(p)
    finally:
        engine.close()
    return total / count


if __name__ == "__main__":
    main()
