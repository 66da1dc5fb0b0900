"""What the survival bounds are worth: gain and error of the delta against refusals, on the real model.

Merges the example adapter into the Q4_1 base, all touched tensors in one type, bounds switched off,
and verifies each against one PyTorch reference. Prints the table of docs/survival.md.

    python benchmarks/bounds.py [--suite smoke | --reference DIR] [--types q4_1 q8_0 ...]
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from pathlib import Path

from safegene_converter.demo import find_adapter, find_smollm2
from safegene_converter.inspecting import survival_summary
from safegene_converter.recorder import record
from safegene_converter.survival import Bounds
from safegene_converter.to_gguf import convert
from safegene_runtime.errors import SurvivalError
from safegene_runtime.ladder import verify
from safegene_runtime.prompts import SUITES, builtin_suite
from safegene_runtime.reference import read_reference

TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "auto")
NO_BOUNDS = Bounds(0.0, 1e6, 1e6, 1e6)


def main() -> None:
    """Prints one row per type."""
    parser = argparse.ArgumentParser(description=__doc__)
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument("--suite", choices=SUITES, default="ci", help="what to ask (default: ci)")
    asked.add_argument("--reference", type=Path, help="made by `safegene record` or the demo")
    parser.add_argument("--types", nargs="+", default=TYPES)
    arguments = parser.parse_args()
    base, adapter = find_smollm2(), find_adapter()
    print(
        f"{platform.machine()}, {platform.system()}; {base.name} ({base.stat().st_size / 1e6:.1f} MB)"
    )
    print("| touched tensors | gain, mean [min, max] | relative error | default bounds | MB "
          "| harmful refused | refusals lost | benign newly refused | mean KL |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        reference = (
            read_reference(arguments.reference)
            if arguments.reference
            else record(adapter, base, root / "reference", prompts=builtin_suite(arguments.suite))
        )
        for name in arguments.types:
            bounds = None if name == "auto" else NO_BOUNDS
            manifest = convert(
                adapter, base, root / name, form="merged", type_name=name, bounds=bounds,
                promote=name == "auto", check=False,
            )  # fmt: skip
            try:
                convert(adapter, base, root / "gate", form="merged", type_name=name,
                        promote=name == "auto", check=False, force=True)  # fmt: skip
                gate = "pass"
            except SurvivalError as error:
                gate = f"refused, {len(error.problems)} of {len(manifest.modules)} tensors"
            found = survival_summary(manifest)
            figures = verify(root / name, reference).figures
            size = sum(file.size_bytes for file in manifest.files) / 1e6
            print(
                f"| {name} | {found['gain_mean']:.3f} [{found['gain_min']:.2f}, "
                f"{found['gain_max']:.2f}] | {found['relative_error_mean']:.2f} | {gate} | {size:.1f} | "
                f"{figures['harmful_refused']['artifact']:.1%} | "
                f"{figures['losses']} of {figures['reference_refused']} | "
                f"{figures['over_refusals']} of {figures['reference_answered_benign']} | "
                f"{figures['mean_kl']:.1e} |",
                flush=True,
            )
        rates = figures["harmful_refused"]
        print(f"| *PyTorch + adapter* | 1 | 0 | | | {rates['reference']:.1%} | | | |")
        print(f"| *base without adapter* | 0 | 1 | | | {rates['base']:.1%} | | | |")


if __name__ == "__main__":
    main()
