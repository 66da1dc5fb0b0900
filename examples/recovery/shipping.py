"""What is shipped of a run: the gene for the demo, artifacts, and a fit to what is deployed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from methods import (
    ARTIFACTS,
    BASE_NAME,
    BUDGET,
    RANK,
    REFUSALS,
    SHIP_LEAST,
    SHIP_WEIGHT,
    Lab,
    realign,
)

from safegene import convert, record
from safegene_converter.bases.hf_to_gguf import convert_hf
from safegene_converter.gene.calibrate import calibrate
from safegene_converter.gene.deployed import recalibrate_deployed
from safegene_converter.gene.evaluate import evaluate
from safegene_converter.gene.extract import extract
from safegene_converter.gene.folder import keep_layers
from safegene_converter.gene.optimise import Settings
from safegene_converter.gene.rebuild import gguf_rebuild
from safegene_converter.gene.select import select
from safegene_converter.inputs.base import open_base
from safegene_runtime.errors import RecordError
from safegene_runtime.formats import strictjson
from safegene_runtime.formats.publish import publish_folder
from safegene_runtime.record.prompts import Prompt
from safegene_runtime.record.reference import read_reference
from safegene_runtime.verifying.ladder import verify


def ship(lab: Lab, out: Path) -> None:
    """A gene for the base itself, which was never aligned: what (aligned − base) shares with the pairs.

    Its default expression is the calibrated one; layers that it needs next to nothing of are left out.
    """
    whole, gene, base = lab.work / "ship-all", lab.work / "ship", lab.work / "base"
    kept = lab.work / "ship-kept"
    if not whole.exists():
        sources = lab.plan.sources
        extract(
            [lab.work / "aligned", *(realign(lab, name) for name in sources)],
            [base, *(lab.work / name for name in sources)],
            whole, rank=RANK, progress=lab.tell,
        )  # fmt: skip
    if not gene.exists():
        select(
            whole, base, lab.splits.select, budget=BUDGET, refusals=REFUSALS,
            evaluation=lab.splits.test, out=gene, progress=lab.tell,
        )  # fmt: skip
    fitted = calibrate(
        gene, base, lab.splits.shots, "base", default=True, force=True, refusals=REFUSALS, weight=SHIP_WEIGHT,
        settings=Settings(rate=0.25, max_steps=lab.plan.calibration_steps),
        evaluation=lab.splits.test, progress=lab.tell,
    )  # fmt: skip
    layers = [layer for layer, one in fitted.coefficients.items() if one >= SHIP_LEAST]
    keep_layers(gene, open_base(base), layers, kept, True)
    for expression in ("default", "base"):
        measured = evaluate(
            base, gene=kept, expression=expression, prompts=lab.splits.test,
            max_new_tokens=lab.plan.reply_tokens, progress=lab.tell,
        ).to_dict()  # fmt: skip
        lab.note(f"shipped {expression}", measured)
        print(f"shipped, expression {expression}: {measured}", flush=True)
    with publish_folder(out) as folder:
        shutil.copytree(kept, folder, dirs_exist_ok=True)
        _name_base(folder, BASE_NAME if lab.base is None else lab.base.resolve().name)


def _name_base(gene: Path, name: str) -> None:
    """Says whose gene it is, in place of `base`, which the experiment's folder is called."""
    config, about = gene / "adapter_config.json", gene / "safegene.json"
    found = json.loads(config.read_text())
    config.write_bytes(strictjson.dumps({**found, "base_model_name_or_path": name}))
    found = json.loads(about.read_text())
    found["base_model"]["name"] = found["expressions"]["base"]["target"] = name
    about.write_bytes(strictjson.dumps(found))


def _expression(lab: Lab, target: str) -> str:
    """What artifacts are made of: the coefficients that went on to the aligned model's level, if any."""
    return f"{target}-as-aligned" if f"{target} gene as aligned" in lab.results() else target


def artifacts(lab: Lab) -> None:
    """Converts every calibrated gene, and verifies it against PyTorch."""
    for target in lab.plan.targets:
        for kind in ARTIFACTS:
            lab.once(
                f"{target} artifact {kind}",
                lambda target=target, kind=kind: _verified(lab, target, kind),
            )


def _verified(lab: Lab, target: str, kind: str) -> dict[str, Any]:
    """What one artifact refuses, and the gate's verdict on it."""
    out, gene, model = lab.work / f"{target}-{kind}", lab.work / "gene", lab.work / target
    reference = _reference(lab, target, "test", lab.splits.test)
    shutil.rmtree(out, ignore_errors=True)
    form, type_name = ARTIFACTS[kind]
    expression = _expression(lab, target)
    base = _float_gguf(lab, target) if form == "sidecar" else model
    if kind.startswith("onnx"):
        convert(gene, model, out, to="onnx", form=form, precision=type_name, expression=expression,
                     progress=lab.tell)  # fmt: skip
    else:
        convert(gene, base, out, form=form, type=type_name, expression=expression,
                progress=lab.tell)  # fmt: skip
    try:
        checked = verify(
            out, reference, base=base if form == "sidecar" else None, progress=lab.tell
        )
    except RecordError as error:
        return {"verdict": f"could not be checked ({error.problems[0].got})"}
    figures = checked.figures  # of a rung that was not reached there are none
    known = {name: figures[name] for name in ("losses", "gains", "mean_kl") if name in figures}
    if "harmful_refused" in figures:
        known["harmful_refused"] = figures["harmful_refused"]["artifact"]
    broken = f" at {checked.broken_at}" if checked.broken_at else ""
    return {"verdict": f"{checked.verdict}{broken}", **known}


def deployed(lab: Lab) -> None:
    """Fits the first target's coefficients to its Q4_K_M file, and measures that elsewhere."""
    target = lab.plan.targets[0]

    def run() -> dict[str, Any]:
        gene, model = lab.work / "gene", lab.work / target
        shots = _reference(lab, target, "shots", lab.few("shots", target))
        held_out = _reference(lab, target, "test", lab.splits.test)
        with gguf_rebuild(gene, model, "merged", "q4_k_m") as rebuild:
            return recalibrate_deployed(
                gene, read_reference(shots), rebuild, f"{target}-q4", expression=_expression(lab, target),
                max_evaluations=lab.plan.rebuilds, held_out=read_reference(held_out), force=True,
                progress=lab.tell,
            ).to_dict()  # fmt: skip

    lab.once(f"{target} deployed", run)


def _reference(lab: Lab, target: str, name: str, prompts: Sequence[Prompt]) -> Path:
    expression = _expression(lab, target)
    out = lab.work / f"{expression}-reference-{name}"
    if not out.exists():
        record(
            lab.work / "gene", lab.work / target, out, prompts=prompts,
            expression=expression, max_new_tokens=lab.plan.reply_tokens, progress=lab.tell,
        )  # fmt: skip
    return out


def _float_gguf(lab: Lab, target: str) -> Path:
    out = lab.work / f"{target}-gguf"
    if not out.exists():
        with publish_folder(out) as folder:
            convert_hf(lab.work / target, folder / "model.gguf", "f32")
    return out / "model.gguf"
