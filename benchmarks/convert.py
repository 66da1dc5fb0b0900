"""Conversion beside its peers, in one run: wall time, peak memory, output size.

    python benchmarks/convert.py [--repeat 3] [--big-gb 2]

Peers: `cp` of the base; llama.cpp's `convert_lora_to_gguf.py` (sidecar) and `llama-export-lora` (merge;
built from the same tree into .cache/bench, minutes, once); PEFT's merge followed by
`convert_hf_to_gguf.py`. The big base is SmolLM2's header with tensors widened by zeros: a synthetic
file whose size, not content, matters. safegene returns when its output is on the disk (fsync), so there
is a `cp` that does, too. Ratios are what counts; absolute times drift with the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from measuring import PEFT_MERGE, ROOT, environment, measure

from safegene_converter.bases.hf_to_gguf import find_llama_cpp
from safegene_converter.cli.smollm2 import find_adapter, find_smollm2, write_float_base
from safegene_converter.gguf.writer import OutTensor, write_gguf
from safegene_runtime.formats.gguf.model import open_model
from safegene_runtime.formats.gguf.types import GGMLType


def export_lora(tree: Path) -> Path | None:
    """Builds llama-export-lora from the tree; None (and why) when that fails."""
    folder = ROOT / ".cache" / "bench"
    binary = folder / "bin" / "llama-export-lora"
    if not binary.exists():
        print("building llama-export-lora (minutes, once) ...", file=sys.stderr)
        configure = ["cmake", "-S", str(tree), "-B", str(folder), "-DLLAMA_CURL=OFF",
                     "-DLLAMA_BUILD_TESTS=OFF", "-DLLAMA_BUILD_APP=OFF", "-DLLAMA_BUILD_EXAMPLES=OFF",
                     "-DLLAMA_OPENSSL=OFF", "-DCMAKE_BUILD_RPATH_USE_ORIGIN=ON",
                     "-DCMAKE_BUILD_TYPE=Release"]  # as tools/build_server.sh: one tree  # fmt: skip
        build = ["cmake", "--build", str(folder), "--target", "llama-export-lora", "-j2"]
        for command in (configure, build):
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                print(f"no llama-export-lora: {done.stderr[-300:]}", file=sys.stderr)
                return None
    return binary


def write_big_base(source: Path, target: Path, gigabytes: float) -> None:
    """`source` with its embedding in F32 grown until the file has the wanted size."""
    model = open_model(source)
    embedding = model.tensors["token_embd.weight"]
    others = sum(t.nbytes for t in model.tensors.values()) - embedding.nbytes
    rows = int((gigabytes * 1e9 - others) / (4 * embedding.shape[1]))
    tensors = [
        OutTensor(
            name, (rows, info.shape[1]) if name == embedding.name else info.shape,
            GGMLType.F32 if name == embedding.name else info.type,
            (lambda: np.zeros((rows, embedding.shape[1]), np.float32))
            if name == embedding.name else info,
        )
        for name, info in model.tensors.items()
    ]  # fmt: skip
    write_gguf(target, dict(model.metadata), tensors)


def write_few_layers(adapter: Path, out: Path, n_layers: int = 2) -> Path:
    """The adapter with the deltas of its first layers only."""
    from safetensors.numpy import load_file, save_file

    safegene = json.loads((adapter / "safegene.json").read_text())
    kept = sorted(safegene["selected_layers"])[:n_layers]
    safegene["selected_layers"] = kept
    for expression in safegene["expressions"].values():
        found = expression["coefficients"]
        expression["coefficients"] = {k: v for k, v in found.items() if int(k) in kept}
    out.mkdir()
    (out / "safegene.json").write_text(json.dumps(safegene))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (out / "adapter_config.json").write_text(json.dumps({**config, "layers_to_transform": kept}))
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file({name: value for name, value in tensors.items()
               if any(f".layers.{layer}." in name for layer in kept)},
              out / "adapter_model.safetensors")  # fmt: skip
    return out


def main() -> None:
    """Prints one table per job."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--big-gb", type=float, default=2.0, help="size of the synthetic base; 0: none"
    )
    parser.add_argument(
        "--skip-export-lora", action="store_true", help="do not build and run llama-export-lora"
    )
    arguments = parser.parse_args()
    tree, adapter, q4_1 = find_llama_cpp(), find_adapter(), find_smollm2()
    python, module = sys.executable, [sys.executable, "-m", "safegene_converter"]
    print(f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}; "
          f"median of {arguments.repeat}")  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        f32, hf, out = folder / "f32.gguf", folder / "hf", folder / "out"
        write_float_base(q4_1, f32)
        subprocess.run(
            [python, "-c", "import sys; from transformers import AutoModelForCausalLM as M, "
             "AutoTokenizer as T; p, n, o = sys.argv[1:]; m = M.from_pretrained(p, gguf_file=n); "
             "m.hf_quantizer = None; del m.config.quantization_config; m.save_pretrained(o); "
             "T.from_pretrained(p, gguf_file=n).save_pretrained(o)",
             str(q4_1.parent), q4_1.name, str(hf)],
            check=True, env=environment(), capture_output=True,
        )  # fmt: skip
        ours = [*module, "convert", str(adapter), "-o", str(out), "--base"]
        export = None if arguments.skip_export_lora else export_lora(tree)
        sidecar = folder / "sidecar"
        subprocess.run([*module, "convert", str(adapter), "--base", str(q4_1), "--as", "sidecar",
                        "-o", str(sidecar)], check=True, env=environment(), capture_output=True)  # fmt: skip
        rows: list[tuple[str, str, list[str]]] = [
            ("sidecar", "safegene", [*ours, str(q4_1), "--as", "sidecar"]),
            ("sidecar", "safegene, no self-check",
             [*ours, str(q4_1), "--as", "sidecar", "--no-self-check"]),
            ("sidecar", "convert_lora_to_gguf.py",
             [python, str(tree / "convert_lora_to_gguf.py"), str(adapter), "--base", str(hf),
              "--outfile", str(out)]),
        ]  # fmt: skip
        bases = {"merge, 98 MB Q4_1": q4_1, "merge, 540 MB F32": f32}
        if arguments.big_gb:
            big = folder / "big.gguf"
            write_big_base(q4_1, big, arguments.big_gb)
            bases[f"merge, {big.stat().st_size / 1e9:.1f} GB synthetic, 2 layers"] = big
        few = write_few_layers(adapter, folder / "few")
        subprocess.run([*module, "convert", str(few), "--base", str(q4_1), "--as", "sidecar",
                        "-o", str(folder / "few-sidecar")],
                       check=True, env=environment(), capture_output=True)  # fmt: skip
        for job, base in bases.items():
            big_job = "synthetic" in job
            ours = [*module, "convert", str(few if big_job else adapter), "-o", str(out), "--base"]
            lora = str(folder / ("few-sidecar" if big_job else "sidecar") / "adapter.gguf")
            rows.append((job, "cp", ["cp", str(base), str(out)]))
            rows.append((job, "cp, on disk when done",
                         ["sh", "-c", 'cp "$1" "$2" && sync "$2"', "-", str(base), str(out)]))  # fmt: skip
            rows.append((job, "cp, then sha256sum of both",
                         ["sh", "-c", 'cp "$1" "$2" && sync "$2" && sha256sum "$1" "$2"', "-",
                          str(base), str(out)]))  # fmt: skip
            if "synthetic" not in job:
                rows.append((job, "safegene", [*ours, str(base), "--as", "merged"]))
            rows.append((job, "safegene, no self-check",
                         [*ours, str(base), "--as", "merged", "--no-self-check"]))  # fmt: skip
            if export:
                rows.append((job, "llama-export-lora",
                             [str(export), "-m", str(base), "--lora", lora, "-o", str(out)]))  # fmt: skip
        merged = folder / "merged-hf"
        script = (
            f'"{python}" -c \'{PEFT_MERGE}\' "$1" "$2" "$3" && "{python}" "$4" "$3" --outfile "$5"'
        )
        rows.append(("merge, 540 MB F32", "PEFT merge + convert_hf_to_gguf.py",
                     ["bash", "-c", script, "-", str(hf), str(adapter), str(merged),
                      str(tree / "convert_hf_to_gguf.py"), str(out)]))  # fmt: skip
        print("| job | tool | wall s | x safegene | peak MiB | MB out |\n|---|---|---|---|---|---|")
        own: dict[str, float] = {}
        for job, tool, command in rows:
            shutil.rmtree(merged, ignore_errors=True)
            wall, peak, size = measure(command, out, arguments.repeat)
            if tool.startswith("safegene"):
                own.setdefault(job, wall)
            ratio = f"{wall / own[job]:.2f}" if job in own else "-"
            print(
                f"| {job} | {tool} | {wall:.2f} | {ratio} | {peak:.0f} | {size:.1f} |", flush=True
            )


if __name__ == "__main__":
    main()
