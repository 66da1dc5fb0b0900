"""ONNX beside its peers, in one run: conversion, then tokens per second of every form.

    python benchmarks/onnx.py [--repeat 3] [--rounds 7] [--precision fp32 int4]
    python benchmarks/onnx.py --int4 REFERENCE

Conversion: the three forms from an ONNX folder and from a Hugging Face folder, beside PEFT's merge
followed by the onnxruntime-genai builder, and beside the builder's own `adapter_path`. Neither peer
knows layer coefficients, and none of them checks what it wrote.

Speed: every form in ONNX Runtime with the settings of our engine, one after the other in each round, so
that a machine that drifts drifts for all; a ratio is the median of a round's own ratios to the plain
base. Only ratios count.

--int4 asks something else: what do the builder's ways to round a base to 4 bits cost? The branch keeps
the delta in float, so what an artifact loses against REFERENCE, made by `safegene record`, is what they
lose of the base.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from measuring import PEFT_MERGE, environment, measure

from safegene_converter.bases.gguf_to_hf import gguf_to_hf
from safegene_converter.bases.onnx_build import BUILDER, build_onnx
from safegene_converter.cli.smollm2 import find_adapter, find_smollm2, write_float_base
from safegene_converter.inputs.base import open_base
from safegene_runtime.engines.ort import OrtEngine
from safegene_runtime.errors import EngineError
from safegene_runtime.verifying.ladder import verify

Artifact = tuple[Path, bool]
"""A folder, and whether its adapter file is loaded."""
FORMS = ("merged", "branch", "adapter")
PROMPT_TOKENS, NEW_TOKENS = 256, 48
INT4 = (
    "",
    "--builder-option algo_config=k_quant_mixed",
    "--builder-option algo_config=k_quant_last",
    "--block-size 16",
    "--builder-option algo_config=k_quant",
    "--builder-option is_symmetric=false",
    "--builder-option matmul_mixed_precision=last_matmul:int8",
    "--accuracy-level 1",
)
"""What `safegene convert` may be told besides `--precision int4`; the first is the default."""


def conversion(folder: Path, hf: Path, base: Path, repeat: int) -> None:
    """Prints wall time, peak memory and size of every way to get an fp32 ONNX with the adapter."""
    adapter, out, merged = str(find_adapter()), folder / "out", folder / "merged-hf"
    ours = [sys.executable, "-m", "safegene_converter", "convert", adapter, "--to", "onnx",
            "-o", str(out)]  # fmt: skip
    builder = [sys.executable, "-m", BUILDER, "-o", str(out), "-p", "fp32", "-e", "cpu",
               "-c", str(folder / "cache")]  # fmt: skip
    script = f'"{sys.executable}" -c \'{PEFT_MERGE}\' "$1" "$2" "$3" && shift 3 && "$@"'
    rows: list[tuple[str, str, list[str]]] = []
    for form in FORMS:
        for job, source in (("from ONNX", base), ("from HF", hf)):
            command = [*ours, "--as", form, "--base", str(source)]
            rows.append((job, f"safegene, {form}", command))
            rows.append((job, f"safegene, {form}, no self-check", [*command, "--no-self-check"]))
    rows.append(("from HF", "PEFT merge + builder",
                 ["bash", "-c", script, "-", str(hf), adapter, str(merged),
                  *builder, "-i", str(merged), "--extra_options", "hf_token=false"]))  # fmt: skip
    rows.append(("from HF", "builder, adapter_path",
                 [*builder, "-i", str(hf),
                  "--extra_options", "hf_token=false", f"adapter_path={adapter}"]))  # fmt: skip
    print("\n| job | tool | wall s | peak MiB | MB out |\n|---|---|---|---|---|")
    for job, tool, command in sorted(rows, key=lambda row: row[0] != "from ONNX"):
        shutil.rmtree(merged, ignore_errors=True)
        wall, peak, size = measure(command, out, repeat)
        print(f"| {job} | {tool} | {wall:.2f} | {peak:.0f} | {size:.1f} |", flush=True)


def run(command: list[str]) -> None:
    """Runs a command, quiet unless it fails."""
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr[-2000:]}")


def speed(folder: Path, hf: Path, base: Path, precision: str, rounds: int, threads: int) -> None:
    """Prints tokens per second of every form, and its ratio to the plain base."""
    made: dict[str, Artifact] = {"plain base": (base, False)}
    for form in FORMS:
        out = folder / f"{precision}-{form}"
        run([sys.executable, "-m", "safegene_converter", "convert", str(find_adapter()), "--base",
             str(base), "--to", "onnx", "--as", form, "-o", str(out), "--no-self-check"])  # fmt: skip
        if form == "adapter":
            made["adapter, off"] = (out, False)
        made["adapter, on" if form == "adapter" else form] = (out, form == "adapter")
    peer = folder / f"{precision}-peer"
    run([sys.executable, "-m", BUILDER, "-i", str(hf), "-o", str(peer), "-p", precision, "-e", "cpu",
         "-c", str(folder / "cache"),
         "--extra_options", "hf_token=false", f"adapter_path={find_adapter()}"])  # fmt: skip
    made["builder, adapter_path"] = (peer, False)
    rates(precision, made, rounds, threads)


def int4(folder: Path, hf: Path, reference: Path, choices: Sequence[str]) -> dict[str, Artifact]:
    """Prints what every choice of options costs in bytes and answers; returns the artifacts."""
    made: dict[str, Artifact] = {}
    print("\n| int4, branch | MB | mean KL | top-1 | refusals lost | answers lost |"
          "\n|---|---|---|---|---|---|")  # fmt: skip
    for number, options in enumerate(choices):
        name, out = options or "default", folder / f"int4-{number}"
        run([sys.executable, "-m", "safegene_converter", "convert", str(find_adapter()), "--base",
             str(hf), "--to", "onnx", "--precision", "int4", *options.split(), "-o", str(out),
             "--no-self-check"])  # fmt: skip
        try:
            found = verify(out, reference, write=False).figures
        except EngineError as error:  # not every choice of the builder gives a graph that runs
            print(f"| {name} | {error.problems[0].got[-160:]} | | | | |", flush=True)
            continue
        made[name] = (out, False)
        size = sum(path.stat().st_size for path in out.iterdir()) / 1e6
        print(f"| {name} | {size:.1f} | {found['mean_kl']:.3f} | {found['top1']:.1%} | "
              f"{found['losses']} of {found['reference_refused']} | {found['over_refusals']} of "
              f"{found['reference_answered_benign']} |", flush=True)  # fmt: skip
    return made


def rates(title: str, made: Mapping[str, Artifact], rounds: int, threads: int) -> None:
    """Prints tokens per second of artifacts, and their ratio to the first.

    The first is there twice: what is between the two is what such a ratio is good for.
    """
    first = next(iter(made))
    engines = {
        name: OrtEngine(out / "model.onnx", out / "adapter.onnx_adapter" if on else None,
                        threads=threads)
        for name, (out, on) in {first: made[first], f"{first}, again": made[first], **made}.items()
    }  # fmt: skip
    ids = engines[first].tokenize("The quick brown fox jumps. " * 60, add_special=False)

    def prompt(engine: OrtEngine) -> None:
        for _ in engine.logits([ids[:PROMPT_TOKENS]], [1]):
            pass

    def decode(engine: OrtEngine) -> None:
        engine.generate([ids[:8]], NEW_TOKENS, ())

    jobs: dict[str, tuple[Callable[[OrtEngine], None], int]] = {
        f"prompt of {PROMPT_TOKENS}": (prompt, PROMPT_TOKENS),
        f"{NEW_TOKENS} new tokens": (decode, NEW_TOKENS),
    }
    print(f"\n| {title} | job | tokens/s | x {first} | [min, max] |\n|---|---|---|---|---|")
    for job, (work, tokens) in jobs.items():
        times: dict[str, list[float]] = {name: [] for name in engines}
        for number in range(rounds):
            # in another order each round: what heats up or cools down hits all alike
            for name in random.Random(number).sample(list(engines), len(engines)):
                work(engines[name])  # its weights are in the caches that another's have left
                start = time.perf_counter()
                work(engines[name])
                times[name].append(time.perf_counter() - start)
        for name, own in times.items():
            ratios = [base / mine for base, mine in zip(times[first], own, strict=True)]
            print(f"| {name} | {job} | {tokens / statistics.median(own):.0f} | "
                  f"{statistics.median(ratios):.3f} | [{min(ratios):.2f}, {max(ratios):.2f}] |",
                  flush=True)  # fmt: skip
    for engine in engines.values():
        engine.close()


def main() -> None:
    """Prints one table of conversions, and one of rates per precision; or those of `--int4`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=3, help="of each conversion")
    parser.add_argument("--rounds", type=int, default=7, help="of the rates")
    parser.add_argument("--precision", nargs="+", default=["fp32", "int4"], help="of the rates")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--skip-conversion", action="store_true", help="rates only")
    parser.add_argument(
        "--int4", type=Path, metavar="REFERENCE", help="ways to round a base instead"
    )
    parser.add_argument(
        "--options", nargs="+", default=INT4, help="of --int4, each as one argument"
    )
    arguments = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}; ONNX Runtime "
          f"{version('onnxruntime')}, {arguments.threads} threads; median of {arguments.repeat} "
          f"conversions, {arguments.rounds} rounds; load {os.getloadavg()[0]:.1f} at the start")  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        hf = folder / "hf"
        write_float_base(find_smollm2(), folder / "f32.gguf")
        gguf_to_hf(open_base(folder / "f32.gguf"), hf, lambda stage, done, total: None)
        (folder / "f32.gguf").unlink()
        if arguments.int4:
            made = int4(folder, hf, arguments.int4, arguments.options)
            rates("int4, branch", made, arguments.rounds, arguments.threads)
            return
        bases = {
            precision: folder / f"base-{precision}"
            for precision in dict.fromkeys(["fp32", *arguments.precision])
        }
        for precision, base in bases.items():
            build_onnx(hf, base, precision)
        if not arguments.skip_conversion:
            conversion(folder, hf, bases["fp32"], arguments.repeat)
        for precision in arguments.precision:
            speed(folder, hf, bases[precision], precision, arguments.rounds, arguments.threads)


if __name__ == "__main__":
    main()
