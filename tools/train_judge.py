"""Trains, tunes and measures the judge. Deterministic; needs numpy only, and seconds.

    python tools/train_judge.py --write     train; weights and their digest into the package
    python tools/train_judge.py --tune      the tune split, cross-validated, by confidence
    python tools/train_judge.py --measure   the table of docs/judge.md: data that nothing was tuned on
    python tools/train_judge.py --measure --judge gguf:PATH        the same for another judge

Training data: the `tune` half of tests/data/labelled_replies.jsonl, and openings put together from
tools/judge_openers.json. Their topics are requests of our own suite that fall into the tune half;
each occurs in refusals and in answers alike, so that its words tell nothing. PyRIT's replies,
labelled by people, are only measured on: pass their folder with --pyrit.
"""

from __future__ import annotations

import argparse
import csv
import functools
import hashlib
import io
import json
import random
import re
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "runtime"))

from safegene_runtime.judging import ngram  # noqa: E402
from safegene_runtime.judging.judge import CONFIDENCE, Label, RulesAndNgram, decided, label_all  # noqa: E402
from safegene_runtime.judging.ngram import N_FEATURES, features, ngram_probability  # noqa: E402
from safegene_runtime.judging.plugins import load_judge  # noqa: E402
from safegene_runtime.judging.rules import rules_label  # noqa: E402

OPENERS = ROOT / "tools" / "judge_openers.json"
LABELLED = ROOT / "tests" / "data" / "labelled_replies.jsonl"
BY_LANGUAGE = LABELLED.with_name("replies_by_language.jsonl")
PYRIT = ROOT.parent / "shared" / "prompts" / "pyrit"
SEED = 20
COUNT = 3000  # made-up examples of either kind
REAL_WEIGHT = 16.0  # of one labelled reply, in made-up ones
L2 = 0.02
STEPS = 400
RATE = 8.0
FOLDS = 5
STEP = 1 / 8  # weights are multiples of it
MAX_UNCERTAIN = 0.03

Example = tuple[str, bool, float]

# --- made-up openings ------------------------------------------------------------------------------


def made_up(seed: int = SEED, count: int = COUNT) -> list[Example]:
    """`count` refusals and `count` answers, cut off at a word here and there, as replies are."""
    pick = random.Random(seed)
    parts = json.loads(OPENERS.read_text(encoding="utf-8"))
    topics = parts["topic"]
    examples: list[Example] = []
    for _ in range(count):
        start, core = pick.choice(parts["apology"]), pick.choice(parts["decline"])
        core = core.replace("{help}", pick.choice(parts["help"])).replace(
            "{help2}", pick.choice(parts["help2"])
        )
        core = (start + core).replace("{topic}", pick.choice(topics))
        text = cut(pick, core + pick.choice(parts["after_refusal"]), least=len(core.split()))
        examples.append((text[0].upper() + text[1:], True, 1.0))
        subject = pick.choice(["", "", "{}: ", '"{}" is a good question. ', "You asked: {} "])
        text = (
            pick.choice(parts["answer"])
            + subject.format(pick.choice(topics))
            + pick.choice(parts["text"])
        )
        examples.append((cut(pick, text[0].upper() + text[1:], least=3), False, 1.0))
    return examples


def cut(pick: random.Random, text: str, least: int) -> str:
    """The text, or its first words: at least `least`."""
    ends = [found.end() for found in re.finditer(r"\S+", text)]
    return (
        text[: pick.choice(ends[least - 1 :])]
        if len(ends) > least and pick.random() < 0.4
        else text
    )


# --- data ------------------------------------------------------------------------------------------


def labelled(split: str) -> list[dict[str, str]]:
    """One half of the replies labelled by hand."""
    with LABELLED.open(encoding="utf-8") as file:
        return [row for row in map(json.loads, file) if row["split"] == split]


def real(rows: Sequence[dict[str, str]]) -> list[Example]:
    """Labelled replies as examples; what is degenerate teaches nothing about refusals."""
    return [
        (row["reply"], row["label"] == "refuse", REAL_WEIGHT)
        for row in rows
        if row["label"] != "degenerate"
    ]


def by_language(split: str, *languages: str) -> list[dict[str, str]]:
    """One half of the replies that we wrote, in these languages; in all where none is named."""
    with BY_LANGUAGE.open(encoding="utf-8") as file:
        rows = [row for row in map(json.loads, file) if row["split"] == split]
    return [row for row in rows if not languages or row["language"] in languages]


def teaching(rows: Sequence[dict[str, str]]) -> list[Example]:
    """What the model learns from: made-up openings, labelled replies, our English ones to tune on."""
    return made_up() + real([*rows, *by_language("tune", "en")])


def pyrit(folder: Path, *names: str) -> list[tuple[str, str, bool]]:
    """(request, reply, whether people say it refuses)."""
    rows = []
    for name in names:
        with (folder / name).open(encoding="utf-8", newline="") as file:
            text = file.read()
        while text.startswith("#"):
            text = text.split("\n", 1)[1]
        for row in csv.DictReader(text.splitlines(keepends=True)):
            refuses = row["human_score"].strip() in ("1", "1.0", "True")
            rows.append((row["objective"], row["assistant_response"], refuses))
    return rows


# --- training --------------------------------------------------------------------------------------


def train(examples: Sequence[Example]) -> tuple[np.ndarray, float]:
    """Logistic regression with L2, by Nesterov's gradient: weights (N_FEATURES,) and bias, rounded.

    Either kind counts the same in all. Sums go through `bincount`, in order, so that a machine with
    another BLAS learns the same.
    """
    rows = [features(text) for text, _, _ in examples]
    column = np.concatenate(rows)
    row = np.repeat(np.arange(len(rows)), [len(one) for one in rows])
    value = np.concatenate([np.full(len(one), len(one) ** -0.5) for one in rows if len(one)])
    truth = np.array([refuses for _, refuses, _ in examples], np.float64)
    weight = np.array([one for _, _, one in examples])
    for kind in (0.0, 1.0):
        weight[truth == kind] /= 2 * weight[truth == kind].sum()
    scale = 1 / STEP
    at = ahead = np.zeros(N_FEATURES + 1)
    for step in range(STEPS):
        score = np.bincount(row, ahead[column] * value, len(rows)) + ahead[-1]
        error = weight * (1 / (1 + np.exp(-score)) - truth)
        slope = np.bincount(column, error[row] * value, N_FEATURES + 1)
        slope[:-1] += L2 / len(rows) * ahead[:-1]
        slope[-1] = error.sum()
        before, at = at, ahead - RATE * slope
        ahead = at + step / (step + 3) * (at - before)
    stored = np.clip(np.rint(at[:-1] * scale), -127, 127) * STEP
    return stored, float(np.rint(at[-1] * scale) * STEP)


def encoded(weights: np.ndarray, bias: float) -> bytes:
    """The file of the package; its bytes depend on nothing but the numbers."""
    arrays = {
        "bias": np.float64(bias),
        "scale": np.float64(STEP),
        "weights": np.rint(weights / STEP).astype(np.int8),
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            one = io.BytesIO()
            np.lib.format.write_array(one, np.asarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), one.getvalue())
    return out.getvalue()


def probability(weights: np.ndarray, bias: float, text: str) -> float:
    """What a model that is not in the package says."""
    found = features(text)
    if not len(found):
        return 0.5
    return float(1 / (1 + np.exp(-bias - weights[found].sum() / len(found) ** 0.5)))


def write() -> None:
    """Trains, and puts weights and digest into the package."""
    data = encoded(*train(teaching(labelled("tune"))))
    folder = Path(ngram.__file__).parent
    (folder / ngram.WEIGHTS).write_bytes(data)
    source = folder / "ngram.py"
    digest = hashlib.sha256(data).hexdigest()
    text = source.read_text(encoding="utf-8")
    text = re.sub(r'(WEIGHTS_SHA256 = ")[0-9a-f]{64}', rf"\g<1>{digest}", text)
    source.write_text(text, encoding="utf-8")
    print(f"{ngram.WEIGHTS}: {len(data)} bytes, {digest}")


# --- tuning and measuring --------------------------------------------------------------------------


def held_out() -> list[tuple[dict[str, str], Callable[[str], float]]]:
    """The tune half, each reply with a model that saw no reply to its prompt."""
    rows = labelled("tune")
    fold = [hashlib.sha256(row["prompt_id"].encode()).digest()[1] % FOLDS for row in rows]
    found: list[tuple[dict[str, str], Callable[[str], float]]] = []
    for number in range(FOLDS):
        kept = [row for row, one in zip(rows, fold, strict=True) if one != number]
        model = train(teaching(kept))
        found += [
            (row, functools.partial(probability, *model))
            for row, one in zip(rows, fold, strict=True)
            if one == number
        ]
    return found


def tune() -> None:
    """Prints what every confidence costs and saves, and which one follows."""
    rows = held_out()
    greedy = [row["source"] in ("base", "adapter") for row, _ in rows]
    print("confidence  errors when certain  uncertain  uncertain, greedy replies")
    best = None
    for confidence in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
        labels = [decided(row["reply"], model, confidence) for row, model in rows]
        unsure = [label is Label.UNCERTAIN for label in labels]
        errors = sum(
            label is not Label.UNCERTAIN and label != row["label"]
            for label, (row, _) in zip(labels, rows, strict=True)
        )
        rare = sum(u for u, g in zip(unsure, greedy, strict=True) if g) / sum(greedy)
        print(
            f"{confidence:10.1f}  {errors:8d} of {len(rows) - sum(unsure):3d}"
            f"     {sum(unsure) / len(rows):8.1%}  {rare:8.1%}"
        )
        if rare <= MAX_UNCERTAIN and (best is None or errors <= best[0]):
            best = (errors, confidence)
    assert best is not None
    rule = f"at most {MAX_UNCERTAIN:.0%} of greedy replies uncertain, fewest errors, most careful"
    print(f"{rule}: {best[1]}")


def rules_only(text: str) -> Label:
    """The rules alone."""
    return rules_label(text)


def ngram_only(text: str) -> Label:
    """The model alone; a hesitation is uncertain."""
    p = ngram_probability(text)
    if abs(2 * p - 1) < CONFIDENCE:
        return Label.UNCERTAIN
    return Label.REFUSE if p > 0.5 else Label.COMPLY


def measure(folder: Path, spec: str | None) -> None:
    """Prints the table of docs/judge.md."""
    judges: dict[str, Callable[[list[str], list[str]], list[Label]]]
    if spec is None:
        judges = {
            "rules": lambda texts, prompts: [rules_only(text) for text in texts],
            "n-gram": lambda texts, prompts: [ngram_only(text) for text in texts],
            "both": RulesAndNgram().label,
        }
    else:
        other = load_judge(spec)
        judges = {spec.split(":")[0]: lambda texts, prompts: label_all(other, texts, prompts)}
    rows = [(row["prompt"], row["reply"], row["label"]) for row in labelled("test")]
    sets = {"labelled replies, test": rows}
    sets["of these, greedy"] = [
        (row["prompt"], row["reply"], row["label"])
        for row in labelled("test")
        if row["source"] in ("base", "adapter")
    ]
    if folder.is_dir():
        for title, names in (
            ("PyRIT refusal + extra", ("refusal.csv", "refusal_extra.csv")),
            ("PyRIT mini", ("mini_refusal.csv",)),
        ):
            sets[title] = [
                (prompt, reply, "refuse" if refuses else "comply")
                for prompt, reply, refuses in pyrit(folder, *names)
            ]
    else:
        print(f"no PyRIT data in {folder}: pass --pyrit FOLDER", file=sys.stderr)
    print("| set | judge | replies | all labels right | certain | accuracy when certain | "
          "sensitivity | specificity |")  # fmt: skip
    print("|---|---|---|---|---|---|---|---|")
    for title, these in sets.items():
        for name, label in judges.items():
            prompts, replies, truths = map(list, zip(*these, strict=True))
            found = list(zip(map(str, label(replies, prompts)), truths, strict=True))
            print(f"| {title} | {name} | {len(found)} | {row_of(found)} |")
    if spec is None:
        print("\n| set | errors of the rules | of these, uncertain | right rules, uncertain |")
        print("|---|---|---|---|")
        for title, these in sets.items():
            print(f"| {title} | {' | '.join(map(str, doubts(these)))} |")


def doubts(rows: Sequence[tuple[str, str, str]]) -> tuple[int, int, int]:
    """What the n-gram half does, as refusal or not: the rules' errors, those caught, and its cost."""
    right = [(rules_label(reply) == "refuse") == (truth == "refuse") for _, reply, truth in rows]
    unsure = [RulesAndNgram().label([reply])[0] is Label.UNCERTAIN for _, reply, _ in rows]
    pairs = list(zip(right, unsure, strict=True))
    return right.count(False), pairs.count((False, True)), pairs.count((True, True))


def row_of(found: Sequence[tuple[str, str]]) -> str:
    """Accuracy, coverage, and, as refusal or not where certain: accuracy, sensitivity, specificity."""
    sure = [
        (label == "refuse", truth == "refuse") for label, truth in found if label != "uncertain"
    ]
    yes = [label for label, truth in sure if truth]
    no = [not label for label, truth in sure if not truth]

    def share(flags: Sequence[bool]) -> str:
        return f"{sum(flags) / len(flags):.3f}" if flags else "none"

    return " | ".join(
        [
            share([label == truth for label, truth in found]),
            share([label != "uncertain" for label, _ in found]),
            share([label == truth for label, truth in sure]),
            share(yes),
            share(no),
        ]
    )


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    for name in ("write", "tune", "measure"):
        what.add_argument(f"--{name}", action="store_true")
    parser.add_argument("--pyrit", type=Path, default=PYRIT, help="folder of PyRIT's CSV files")
    parser.add_argument("--judge", help="measure this judge instead, as load_judge names it")
    given = parser.parse_args()
    if given.write:
        write()
    elif given.tune:
        tune()
    else:
        measure(given.pyrit, given.judge)


if __name__ == "__main__":
    main()
