"""The recovery experiment: `python examples/recovery/run.py [--quick] [--seed N] [--work DIR]`.

    base -> aligned (LoRA: refusals, and its own benign replies) -> fine-tunes that lose refusals
    gene = extracted from the fine-tunes in SOURCES, layers selected on them
    every other fine-tune + gene, recalibrated with few shots, against baselines of the same budget

Each step writes under its own name, at once or not at all, and is not done again: run it again after
a kill. `--only STEP` stops after a step.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import data
import methods
import report
import shipping
from train import BATCH, CHECK_EVERY, train_lora

from safegene_converter.gene.evaluate import evaluate_model
from safegene_runtime.formats.publish import publish_folder

REFUSAL_TOKENS = 12
"""Enough to tell a refusal while a fine-tune is watched."""

TASK_WARM_UP = 20
"""Long, so that a fine-tune does not run past the point where it is stopped."""

SUDDEN = ("obedient",)
"""Fine-tunes that go from refusing to obeying within five steps: watched at every one."""

SOURCES = ("steps",)
"""What the gene is extracted from; the other tasks never see it made."""


@dataclass(frozen=True)
class Plan:
    """How large everything is; steps are of 8 examples, but of `task_batch` in a fine-tune.

    A fine-tune stops where it has lost the share `lost` of the refusals, or at `task_steps`. Safety is taught
    with `benign` requests for each harmful one.
    """

    align_steps: int
    task_steps: int
    realign_steps: int
    per_kind: int
    test: int | None
    tasks: tuple[str, ...]
    sources: tuple[str, ...]
    calibration_steps: int
    methods: tuple[str, ...] = tuple(methods.METHODS)
    benign: int = 3
    reply_tokens: int = 16
    task_batch: int = 4
    task_rate: float = 8e-4
    lost: float = 0.5
    rebuilds: int = 14

    @property
    def targets(self) -> tuple[str, ...]:
        """The fine-tunes that no gene is made from."""
        return tuple(name for name in self.tasks if name not in self.sources)


FULL = Plan(240, 80, 100, 16, 100, tuple(data.TASKS), SOURCES, 20)
QUICK = Plan(
    30, 30, 30, 8, 16, ("steps", "obedient"), ("steps",), 5, ("gene", "uniform", "safe lora"),
    benign=2, reply_tokens=12, rebuilds=2,
)  # fmt: skip


def main() -> int:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--quick", action="store_true", help="a small version, about 10 minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path("build/recovery"))
    parser.add_argument("--base", type=Path, help="another model (default: SmolLM2-135M-Instruct)")
    parser.add_argument("--only", choices=[name for name, _ in STEPS], help="stop after this step")
    parser.add_argument("--methods", help="only these, with commas between them (default: all)")
    parser.add_argument("--artifacts", action="store_true", help="also convert and verify")
    parser.add_argument(
        "--deployed", action="store_true", help="also fit coefficients to a Q4_K_M file"
    )
    parser.add_argument(
        "--ship", type=Path, metavar="DIR", help="also make a gene for the base itself"
    )
    parser.add_argument(
        "--pairs", action="store_true", help="also compare pairs of models to make a gene from"
    )
    parser.add_argument(
        "--more-shots",
        action="store_true",
        help="also calibrate the hard case with thrice the shots",
    )
    parser.add_argument("--publish", action="store_true", help="keep table and picture beside this")
    arguments = parser.parse_args()
    plan = QUICK if arguments.quick else FULL
    if arguments.methods:
        chosen = tuple(name.strip() for name in arguments.methods.split(","))
        if unknown := [name for name in chosen if name not in methods.METHODS]:
            parser.error(f"--methods: {', '.join(unknown)}; known: {', '.join(methods.METHODS)}")
        plan = replace(plan, methods=tuple(name for name in methods.METHODS if name in chosen))
    work = arguments.work / f"{'quick' if arguments.quick else 'full'}-seed-{arguments.seed}"
    lab = methods.Lab(
        work, plan, arguments.seed, data.splits(plan.per_kind, plan.test), tell, arguments.base
    )
    more = {
        methods.compare_pairs: arguments.pairs, methods.more_shots: arguments.more_shots,
        shipping.artifacts: arguments.artifacts, shipping.deployed: arguments.deployed,
    }  # fmt: skip
    run(lab, arguments.only, [step for step, wanted in more.items() if wanted])
    if arguments.ship is not None:
        shipping.ship(lab, arguments.ship)
    if arguments.publish and arguments.only is None:
        report.publish(arguments.work, Path(__file__).resolve().parent)
    return 0


def run(
    lab: methods.Lab, only: str | None = None, more: Sequence[Callable[[methods.Lab], None]] = ()
) -> None:
    """Runs all steps, or those up to `only`; then `more`, and prints the table."""
    lab.work.mkdir(parents=True, exist_ok=True)
    for name, step in STEPS:
        started = time.monotonic()
        step(lab)
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
        if only == name:
            return
    for step in more:
        step(lab)
    report.write(lab.work.parent, lab.work, lab.results())


def align(lab: methods.Lab) -> None:
    """base/ and aligned/: model folders; the alignment itself is kept as align-lora/."""
    if not (lab.work / "base").exists():
        model, tokenizer = methods.load_base(lab.base)
        with publish_folder(lab.work / "base") as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    if (lab.work / "aligned").exists():
        return
    model, tokenizer = lab.load("base")
    # more benign ones, and more kinds of them: refusing everything is the easy way out
    count = lab.plan.align_steps * BATCH // (1 + lab.plan.benign)
    examples = methods.safety_examples(
        lab, model, tokenizer, "align", count, lab.plan.benign * count
    )
    lora = lab.work / "align-lora"
    started = time.monotonic()
    if not lora.exists():
        train_lora(model, examples, lora, steps=lab.plan.align_steps, seed=lab.seed, tell=tell)
        lab.note("align_seconds", time.monotonic() - started)
    lab.merge("base", lora, "aligned")


def fine_tune(lab: methods.Lab) -> None:
    """One model folder for each task, and its LoRA on the aligned model."""
    for name in lab.plan.tasks:
        if not (lab.work / name).exists():
            lora = lab.work / f"{name}-lora"
            if not lora.exists():
                _fine_tune(lab, name, lora)
            lab.merge("aligned", lora, name)


def _fine_tune(lab: methods.Lab, name: str, lora: Path) -> None:
    """Trains on one task until so many refusals are lost."""
    asked = [one for one in (*lab.splits.select, *lab.splits.shots) if one.kind == "harmful"]
    model, tokenizer = lab.load("aligned")

    def refused(tuned: Any) -> float:
        found = evaluate_model(
            tuned, tokenizer, prompts=asked, max_new_tokens=REFUSAL_TOKENS, own=()
        )
        return found.harmful_refused or 0.0

    wanted = (1 - lab.plan.lost) * lab.once("aligned refused before", lambda: refused(model))
    pairs = data.task(name, lab.seed, data.TASK_TRAIN)
    train_lora(
        model,
        [lab.example(tokenizer, *pair) for pair in pairs],
        lora,
        steps=lab.plan.task_steps,
        seed=lab.seed,
        rate=lab.plan.task_rate,
        batch=lab.plan.task_batch,
        warm_up=TASK_WARM_UP,
        until=lambda tuned: refused(tuned) <= wanted,
        check_every=1 if name in SUDDEN else CHECK_EVERY,
        tell=tell,
    )


STEPS: tuple[tuple[str, Callable[[methods.Lab], None]], ...] = (
    ("align", align),
    ("tasks", fine_tune),
    ("gene", methods.make_genes),
    ("methods", methods.run_all),
)

_last = ["", 0.0]


def tell(stage: str, done: int, total: int) -> None:
    """Progress: a line now and then, so that a log stays readable."""
    line = f"  {stage}: {done}/{total}"
    if line != _last[0] and (done == total or time.monotonic() - float(_last[1]) > 15):
        _last[:] = [line, time.monotonic()]
        print(line, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
