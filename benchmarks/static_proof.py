"""What the static proof says of one adapter in five artifacts, on the real model.

Nothing is run: the artifacts are converted, and their bytes are asked. Prints the table of
docs/static-proof.md.

    python benchmarks/static_proof.py [--reference DIR]
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safegene import convert, record
from safegene_converter.cli.smollm2 import find_adapter, find_smollm2, write_float_base
from safegene_converter.fold.survival import Bounds
from safegene_runtime.artifact.integrity import check_integrity
from safegene_runtime.artifact.manifest import Manifest
from safegene_runtime.formats.sealed import SealedFiles
from safegene_runtime.record.prompts import builtin_suite
from safegene_runtime.record.reference import Reference, read_reference
from safegene_runtime.verifying.static_proof import StaticProof, static_proof

NO_BOUNDS = Bounds(0.0, 1e6, 1e6, 1e6)


@dataclass(frozen=True)
class Row:
    """One artifact: `float_base` for the decoded base, `gated` for the gate of survival."""

    label: str
    form: Literal["merged", "sidecar"]
    type_name: str
    float_base: bool = False
    gated: bool = True


ROWS = (
    Row("sidecar beside Q4_1", "sidecar", "auto"),
    Row("merged into F32", "merged", "auto", float_base=True),
    Row("merged, then Q4_K_M", "merged", "q4_k_m", float_base=True),
    Row("merged into Q4_1, `--type auto`", "merged", "auto"),
    Row(
        "merged into Q4_1, written back as Q4_1, no gate of survival", "merged", "q4_1", gated=False
    ),
)


def main() -> None:
    """Prints one row per artifact."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", type=Path, help="made by `safegene record` or the demo")
    arguments = parser.parse_args()
    source, adapter = find_smollm2(), find_adapter()
    print(f"{platform.machine()}, {platform.system()}; {source.name}; {adapter.name}")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        # of the reference only the factors are looked at: one prompt is enough
        reference = (
            read_reference(arguments.reference)
            if arguments.reference
            else record(adapter, source, root / "reference", prompts=builtin_suite()[:1])
        )
        write_float_base(source, root / "float.gguf")
        print("| artifact | modules | beta, pooled | least | greatest | problems | the proof is |")
        print("|---|---|---|---|---|---|---|")
        for number, row in enumerate(ROWS):
            base = root / "float.gguf" if row.float_base else source
            out = root / str(number)
            manifest = convert(
                adapter, base, out, form=row.form, type=row.type_name, check=False,
                promote=None if row.gated else False, bounds=None if row.gated else NO_BOUNDS,
            )  # fmt: skip
            proof = proved(manifest, out, reference, base if row.form == "sidecar" else None)
            betas = [one.beta for one in proof.modules]
            print(
                f"| {row.label} | {len(betas)} | {proof.pooled:.3f} | {min(betas):.3f} | "
                f"{max(betas):.3f} | {len(proof.problems)} | {proof.status} |",
                flush=True,
            )


def proved(
    manifest: Manifest, artifact: Path, reference: Reference, base: Path | None
) -> StaticProof:
    """The proof of one artifact, as `safegene verify` takes it."""
    with SealedFiles() as files:
        served = check_integrity(manifest, artifact, reference, base, lambda *_: None, files)
        return static_proof(manifest, served.model, served.adapter, reference)


if __name__ == "__main__":
    main()
