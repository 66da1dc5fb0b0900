"""What the survival bounds are worth: gain and error of the delta against refusals, on the real model.

Merges the example adapter into the Q4_1 base, all touched tensors in one type, and into the same weights
in float, quantised once with a preset; bounds switched off, nothing promoted; and verifies each against one
PyTorch reference. Prints both tables of docs/survival.md.

    python benchmarks/bounds.py [--suite smoke | --reference DIR] [--types q4_1 ...] [--presets q4_k_m ...]

With --relative instead the KL of sidecars, ONNX adapters and merged GGUFs, genuine and wrong, beside that
of their bases: the tables of docs/ladder.md.

    python benchmarks/bounds.py --relative [--suite smoke | --reference DIR] [--bases q4_k_m ...]
        [--onnx int4 ...] [--merged q4_k_m ...] [--threads 2]
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path
from statistics import fmean

from relative import MERGED, ONNX, relative
from relative import TYPES as BASES

from safegene import convert, record
from safegene_converter.cli.smollm2 import find_adapter, find_smollm2, write_float_base
from safegene_converter.fold.survival import Bounds
from safegene_runtime.errors import SurvivalError
from safegene_runtime.record.prompts import SUITES, builtin_suite
from safegene_runtime.record.reference import Reference, read_reference
from safegene_runtime.verifying.ladder import verify

TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "auto")
PRESETS = ("q8_0", "q5_k_m", "q4_k_m", "q4_0", "q3_k_m", "q2_k")
NO_BOUNDS = Bounds(0.0, 1e6, 1e6, 1e6)


def main() -> None:
    """Prints one row per type, and one per preset."""
    parser = argparse.ArgumentParser(description=__doc__)
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--suite", choices=SUITES, default="ci", help="what to ask (default: ci)")
    asked.add_argument("--reference", type=Path, help="made by `safegene record` or the demo")
    parser.add_argument("--types", nargs="*", default=TYPES, help="on the grid of the Q4_1 base")
    parser.add_argument("--presets", nargs="*", default=PRESETS, help="from float, quantised once")
    parser.add_argument("--relative", action="store_true", help="against the bases' own KL instead")
    parser.add_argument("--bases", nargs="*", default=BASES, help="of --relative, in GGUF")
    parser.add_argument("--onnx", nargs="*", default=ONNX, help="of --relative, in ONNX")
    parser.add_argument("--merged", nargs="*", default=MERGED, help="of --relative, merged in GGUF")
    parser.add_argument("--threads", type=int, help="of --relative (default: all)")
    arguments = parser.parse_args()
    base, adapter = find_smollm2(), find_adapter()
    print(
        f"{platform.machine()}, {platform.system()}; {base.name} ({base.stat().st_size / 1e6:.1f} MB)"
    )
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        reference = (
            read_reference(arguments.reference)
            if arguments.reference
            else record(adapter, base, root / "reference", prompts=builtin_suite(arguments.suite))
        )
        write_float_base(base, root / "float.gguf")
        if arguments.relative:
            relative(reference, base, root / "float.gguf", arguments.bases, arguments.onnx,
                     arguments.merged, root, arguments.threads)  # fmt: skip
            return
        rates: dict[str, float] = {}
        for names, source, error in (
            (arguments.types, base, "relative_error"),
            (arguments.presets, root / "float.gguf", "base_error_ratio"),
        ):
            what = "relative error" if source == base else "error / the base's own"
            print(f"| touched tensors | gain, mean [min, max] | {what} | default bounds | MB "
                  "| harmful refused | refusals lost | benign newly refused | mean KL |")  # fmt: skip
            print("|---|---|---|---|---|---|---|---|---|")
            for name in names:
                rates = row(name, adapter, source, error, reference, root)
        if rates:
            print(f"| *PyTorch + adapter* | 1 | 0 | | | {rates['reference']:.1%} | | | |")
            print(f"| *base without adapter* | 0 | 1 | | | {rates['base']:.1%} | | | |")


def row(
    name: str, adapter: Path, base: Path, error: str, reference: Reference, root: Path
) -> dict[str, float]:
    """Prints what one type gives; returns the shares of harmful prompts refused."""
    promote = name == "auto"
    manifest = convert(
        adapter, base, root / "out", form="merged", type=name, promote=promote, check=False,
        bounds=None if promote else NO_BOUNDS, force=True,
    )  # fmt: skip
    try:
        convert(adapter, base, root / "gate", form="merged", type=name, promote=promote,
                check=False, force=True)  # fmt: skip
        gate = "pass"
    except SurvivalError as refused:
        gate = f"refused, {len(refused.problems)} of {len(manifest.modules)} tensors"
    survived = [module.survival for module in manifest.modules if module.survival]
    gains = [one["gain"] for one in survived]
    figures = verify(root / "out", reference).figures
    size = sum(file.size_bytes for file in manifest.files) / 1e6
    print(
        f"| {name} | {fmean(gains):.3f} [{min(gains):.2f}, {max(gains):.2f}] | "
        f"{fmean(one[error] for one in survived):.2f} | {gate} | {size:.1f} | "
        f"{figures['harmful_refused']['artifact']:.1%} | "
        f"{figures['losses']} of {figures['reference_refused']} | "
        f"{figures['over_refusals']} of {figures['reference_answered_benign']} | "
        f"{figures['mean_kl']:.1e} |",
        flush=True,
    )
    rates: dict[str, float] = figures["harmful_refused"]
    return rates


if __name__ == "__main__":
    main()
