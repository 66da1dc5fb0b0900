"""The ratio of an artifact's KL to its base's own, for genuine adapters and for wrong ones.

Part of bounds.py, which says how to run it. Every adapter runs beside every base in the engine of the
ladder, on the prompts that the ladder would take; and merged into it, against the base as its control.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from measuring import ROOT

from safegene import convert
from safegene_converter.bases.gguf_to_hf import gguf_to_hf
from safegene_converter.bases.onnx_build import build_onnx
from safegene_converter.cli.smollm2 import find_adapter
from safegene_converter.fold.survival import Bounds
from safegene_converter.formula import delta
from safegene_converter.gguf.presets import quantize_gguf
from safegene_converter.gguf.writer import OutTensor, write_gguf
from safegene_converter.inputs.adapter import read_adapter
from safegene_converter.inputs.base import open_base
from safegene_runtime.artifact import forms
from safegene_runtime.artifact.integrity import model_precision
from safegene_runtime.engines.registry import open_engine
from safegene_runtime.formats.gguf.model import open_model
from safegene_runtime.gating.bounds import beta_band, bounds_for
from safegene_runtime.record.reference import Reference
from safegene_runtime.verifying.base_noise import PROMPTS, BaseNoise, base_kl
from safegene_runtime.verifying.forced import forced_passes, pooled_beta

sys.path.insert(0, str(ROOT / "tests"))
from mutants import (
    Edit,
    a_and_b_swapped,
    all_ones,
    edit_coefficients,
    edit_factors,
    layers_dropped,
    other_rows,
    scaled,
)

__all__ = ["MERGED", "ONNX", "TYPES", "relative"]

TYPES = ("given", "f16", "q8_0", "q6_k", "q4_k_m", "q2_k")
"""Of the GGUF bases; `given` is the one the reference was recorded with."""
ONNX = ("int8", "int4")
MERGED = ("given", "q6_k", "q4_k_m", "q2_k")
"""Of merged GGUFs, likewise; into `given` with `--type auto`."""
HEADS = (9, 3)
"""Of SmolLM2-135M: query and key-value heads."""


def _exchanged(one: int, other: int) -> Edit:
    there = {f".layers.{one}.": f".layers.{other}.", f".layers.{other}.": f".layers.{one}."}

    def source(name: str) -> str:
        word = next((word for word in there if word in name), None)
        return name if word is None else name.replace(word, there[word])

    return lambda all: {name: all[source(name)] for name in all}


def _layers_by_strength() -> list[int]:
    """The example adapter's layers, those with the least norm of their deltas first."""
    squares: Counter[int] = Counter()
    for module in read_adapter(find_adapter()).modules:
        squares[module.layer] += float(np.sum(delta(module) ** 2))
    return sorted(squares, key=lambda layer: squares[layer])


LAYERS = _layers_by_strength()
MIDDLE = len(LAYERS) // 2
DROPPED = {"a layer dropped": LAYERS[MIDDLE : MIDDLE + 1],
           "a quarter of the layers dropped": LAYERS[2::4]}  # fmt: skip
"""The layers that have no delta, by mistake: of middling strength, and of all strengths."""
MISTAKES: Mapping[str, Edit] = {
    "scale 0.5": scaled(0.5),
    "scale 2": scaled(2),
    "A and B swapped": a_and_b_swapped,
    "q/k rows in the other order": other_rows(*HEADS, inverse=True),
    **{name: layers_dropped(*layers) for name, layers in DROPPED.items()},
    "two layers exchanged": _exchanged(*LAYERS[MIDDLE : MIDDLE + 2]),
}
"""What is done to the factors of the example adapter."""
COEFFICIENTS: Mapping[str, Callable[[list[float]], list[float]]] = {
    "coefficients ignored": all_ones,
    "coefficients one layer off": lambda all: [*all[1:], all[0]],
}
"""What is done to its layers' coefficients, in the order of layers."""
GROUPS = 3
"""Of as many prompts as the ladder takes: how much the genuine ratio depends on them."""
GENUINE, COARSE_FACTORS = "none", "none, factors in Q8_0"
UNPROMOTED = "none, nothing promoted"
NO_BOUNDS = Bounds(0.0, 1e6, 1e6, 1e6)
"""The converter would refuse, or promote, what keeps too little of the delta that it was told to add."""


@dataclass(frozen=True)
class Beside:
    """A base, and how to run an adapter beside it.

    Attributes:
        name: for people.
        precision: its class.
        model: what runs it without an adapter.
        adapters: what runs it with one, by mistake: model, and the adapter beside it if it has one.
    """

    name: str
    precision: str
    model: Path
    adapters: Mapping[str, tuple[Path, Path | None]]


def relative(
    reference: Reference,
    given: Path,
    source: Path,
    types: Sequence[str],
    onnx: Sequence[str],
    merged: Sequence[str],
    root: Path,
    threads: int | None,
) -> None:
    """Prints a row per base and mistake.

    Args:
        reference: what PyTorch answered.
        given: the base that it was recorded with.
        source: the same weights in float.
        types: of GGUF bases, see `TYPES`.
        onnx: precisions of ONNX bases.
        merged: types of merged GGUFs, see `MERGED`.
        root: where to work.
        threads: of the engines; all by default.
    """
    names = (GENUINE, COARSE_FACTORS, UNPROMOTED, *MISTAKES, *COEFFICIENTS)
    adapters = {name: _adapter(name, root / "adapters") for name in names}
    print(f"| base | mistake | KL | times the base's own | groups of {PROMPTS} prompts | beta "
          "| active, logits by class, by base |\n|---|---|---|---|---|---|---|")  # fmt: skip
    bases = chain(
        _ggufs(given, source, types, adapters, root),
        _onnxs(source, onnx, adapters, root),
        _mergeds(given, source, merged, adapters, root),
    )
    for beside in bases:
        _rows(beside, reference, threads)


def _rows(beside: Beside, reference: Reference, threads: int | None) -> None:
    """The rows of one base: the genuine adapter on several groups of prompts, the others on the first."""
    order = reference.order()
    groups = [order[at : at + PROMPTS] for at in range(0, GROUPS * PROMPTS, PROMPTS)]
    with open_engine(beside.model, threads=threads) as engine:
        plain = [base_kl(engine, reference, group) for group in groups]
    for name, (model, adapter) in beside.adapters.items():
        noises, first = [], []
        with open_engine(model, adapter, threads=threads) as engine:
            for group, base in zip(groups if name == GENUINE else groups[:1], plain, strict=False):
                passes = forced_passes(engine, reference, indices=group)
                kl = {index: one.kl for index, one in zip(group, passes, strict=True)}
                noises.append(BaseNoise.of(base, kl))
                first = first or passes
        ratios = [noise.ratio for noise in noises if noise.ratio is not None]
        beta, noise = pooled_beta(first)
        band = beta_band(beside.precision, noise)
        bounds = bounds_for(beside.precision)
        found = {
            "active": abs(beta - 1) > band,
            "class": noises[0].artifact_kl > bounds.kl_ceiling,
            "base": noises[0].breaks(bounds),
        }
        cells = (
            f"{beside.name}, {noises[0].base_kl:.1e}" if name == GENUINE else "",
            name,
            f"{noises[0].artifact_kl:.1e}",
            f"{ratios[0]:.3g}" if ratios else "",
            f"{min(ratios):.2f} to {max(ratios):.2f}" if len(ratios) > 1 else "",
            f"{beta:.3f} in {band:.2f}",
            ", ".join(word for word, seen in found.items() if seen) or "none",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def _ggufs(
    given: Path, source: Path, types: Sequence[str], adapters: Mapping[str, Path], root: Path
) -> Iterator[Beside]:
    """GGUF bases; a sidecar knows nothing of the type of its base, so each is made once."""
    made = {}
    for name, adapter in adapters.items():
        if name == UNPROMOTED:
            continue
        out = root / f"sidecar-{len(made)}"
        factors = "q8_0" if name == COARSE_FACTORS else "f32"
        convert(adapter, source, out, form="sidecar", type=factors, check=False)
        made[name] = out / forms.GGUF.adapter_file
    for kind in types:
        model = given if kind == "given" else root / "base.gguf"
        if kind != "given":
            quantize_gguf(source, model, kind)
        beside = {name: (model, adapter) for name, adapter in made.items()}
        yield Beside(f"GGUF {kind}", model_precision(open_model(model)), model, beside)


def _onnxs(
    source: Path, precisions: Sequence[str], adapters: Mapping[str, Path], root: Path
) -> Iterator[Beside]:
    """ONNX bases; an adapter beside one has a model of its own, with slots in it."""
    if precisions:
        gguf_to_hf(open_base(source), root / "hf", lambda *_: None)
    for precision in precisions:
        base = root / f"onnx-{precision}"
        build_onnx(root / "hf", base, precision)
        made, kind = {}, ""
        for name in adapters:
            if name in (COARSE_FACTORS, UNPROMOTED):  # an .onnx_adapter is float
                continue
            out = root / f"onnx-{precision}-{len(made)}"
            manifest = convert(adapters[name], base, out, to="onnx", form="adapter", check=False)
            made[name], kind = (
                (out / "model.onnx", out / forms.ONNX.adapter_file),
                manifest.artifact["precision"],
            )
        yield Beside(f"ONNX {precision}", kind, base / "model.onnx", made)


def _mergeds(
    given: Path, source: Path, types: Sequence[str], adapters: Mapping[str, Path], root: Path
) -> Iterator[Beside]:
    """Merged GGUFs beside their controls: the genuine one as it is made by default, all others unpromoted.

    Into the file that was recorded, whose grid would erase them, the others are merged in 8 bits.
    """
    for kind in types:
        base, control = (given, given) if kind == "given" else (source, root / f"{kind}.gguf")
        if kind != "given":
            quantize_gguf(source, control, kind)
        made: dict[str, tuple[Path, Path | None]] = {}
        for name, adapter in adapters.items():
            if name == COARSE_FACTORS:
                continue
            out = root / f"merged-{kind}-{len(made)}"
            made[name] = out / str(forms.GGUF.model_file), None
            if name in DROPPED:  # no merge of nothing: the converter refuses a delta of zeros
                out.mkdir()
                _without(
                    DROPPED[name], made[UNPROMOTED][0], control, out / str(forms.GGUF.model_file)
                )
                continue
            if name == GENUINE:
                asked = {"type": "auto" if kind == "given" else kind}
            else:
                asked = {"type": "q8_0" if kind == "given" else kind, "promote": False,
                         "bounds": NO_BOUNDS}  # fmt: skip
            convert(adapter, base, out, form="merged", check=False, **asked)
        kinds = model_precision(open_model(made[GENUINE][0]))
        yield Beside(f"merged {kind}", kinds, control, made)


def _without(layers: Sequence[int], merged: Path, control: Path, out: Path) -> None:
    """A merged GGUF with the control's tensors in some of its layers."""
    ours, theirs = open_model(merged), open_model(control)
    tensors = []
    for name in ours.tensors:
        dropped = any(name.startswith(f"blk.{layer}.") for layer in layers)
        info = (theirs if dropped else ours).tensors[name]
        tensors.append(OutTensor(name, info.shape, info.type, info))
    write_gguf(out, dict(ours.metadata), tensors)


def _adapter(mistake: str, folder: Path) -> Path:
    """The example adapter with a mistake in it, if that is one."""
    out = folder / mistake.replace("/", " ") / find_adapter().name
    shutil.copytree(find_adapter(), out)
    if mistake in COEFFICIENTS:
        edit_coefficients(out, COEFFICIENTS[mistake])
    if mistake in MISTAKES:
        edit_factors(out, MISTAKES[mistake])
    return out
