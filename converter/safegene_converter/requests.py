"""What a command or a function of `safegene` is asked for: checked as a whole, before any file is read.

An option that would be ignored is a mistake, and so is a form that the target or the base cannot have.
What only the headers of the base can tell (is it quantised already?) is checked where they are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import cast

from safegene_converter.fold.survival import Bounds
from safegene_converter.inputs.onnx_base import is_onnx_folder
from safegene_runtime.artifact.forms import (
    FORMS,
    GGUF,
    GGUF_MERGED,
    ONNX,
    ONNX_ADAPTER,
    TARGETS,
    Form,
    form_named,
    names_of_forms,
    target_named,
)
from safegene_runtime.errors import FormatError, Problems, UnsupportedError
from safegene_runtime.judging.judge import Judge, RulesAndNgram
from safegene_runtime.record.prompts import (
    SUITES,
    Prompt,
    SuiteSize,
    builtin_suite,
    load_prompts,
)

__all__ = ["CalibrateRequest", "ConvertRequest", "RecordRequest", "judge_of", "prompts_of"]


def prompts_of(prompts: Path | Sequence[Prompt]) -> Sequence[Prompt]:
    """Prompts, or those of a file."""
    return load_prompts(prompts) if isinstance(prompts, Path) else prompts


def judge_of(judge: Judge | str | None) -> Judge | None:
    """A judge, or the one of a name."""
    if isinstance(judge, str):
        from safegene_runtime.judging.plugins import load_judge  # most need none

        return load_judge(judge)
    return judge


def _flag(name: str) -> str:
    """What an option is called on the command line."""
    return {"form": "--as", "builder_options": "--builder-option"}.get(
        name, "--" + name.replace("_", "-")
    )


@dataclass(frozen=True)
class ConvertRequest:
    """An artifact that is wanted; the options are those of `safegene convert`.

    Attributes:
        adapter: the adapter folder.
        base: a GGUF file (or its first shard), a Hugging Face folder, or an ONNX folder.
        out: the folder to create.
        to: the target, one of `forms.TARGETS` by name.
        form: one of its forms by name; None: `merged`, but `branch` beside int4 and int8 ONNX weights.
        type: of GGUF: `auto` (keep types, promote what would lose the delta), `keep` (refuse instead),
            or a type or preset of llama.cpp.
        expression: which set of layer coefficients; the adapter's default when None.
        bounds: what counts as surviving; the default ones when None.
        promote: give tensors out of bounds a wider type instead of refusing; None: for `auto`, and for
            presets made from float.
        imatrix: an importance matrix, for the types that want one.
        llama_cpp: a llama.cpp source tree, for a Hugging Face base.
        precision: what a base is exported to ONNX as; fp32 when None.
        block_size: of int4 and int8 weights, for the export.
        accuracy_level: of int4 and int8 activations, for the export.
        builder_options: KEY=VALUE options for the export.
        check: run the result in a child process before it is published.
        force: replace an existing `out`.
        stack: task adapters that are folded with it, and the weight of each (docs/adapters.md).

    Raises:
        UnsupportedError: options that do not go together, all of them.
    """

    adapter: Path
    base: Path
    out: Path
    to: str = GGUF.name
    form: str | None = None
    type: str = "auto"
    expression: str | None = None
    bounds: Bounds | None = None
    promote: bool | None = None
    imatrix: Path | None = None
    llama_cpp: Path | None = None
    precision: str | None = None
    block_size: int | None = None
    accuracy_level: int | None = None
    builder_options: Sequence[str] = ()
    check: bool = True
    force: bool = False
    stack: Sequence[tuple[Path, float]] = ()

    def __post_init__(self) -> None:
        target, form, problems = target_named(self.to), None, Problems()
        try:
            form = None if self.form is None else form_named(target, self.form)
        except UnsupportedError as error:
            problems.extend(error.problems)
        for name in (name for other in TARGETS if other is not target for name in other.options):
            if getattr(self, name):
                flag = _flag(name)
                problems.add(
                    flag, "target", "the other one", f"--to {target.name}", f"leave {flag} out"
                )
        (self._check_onnx if target is ONNX else self._check_gguf)(form, problems)
        problems.raise_if_any(UnsupportedError)

    @property
    def survival(self) -> Bounds:
        """What counts as surviving."""
        return self.bounds or Bounds()

    def _check_gguf(self, form: Form | None, problems: Problems) -> None:
        for name in form.ignores if form is not None else ():
            if getattr(self, name) is not None:
                flag, merged = _flag(name), f"--as {GGUF_MERGED.name}"
                problems.add(flag, "form", merged, f"--as {self.form}", f"leave {flag} out")
        if form is not None and not form.carries_base and self.base.is_dir():
            problems.add(
                str(self.base), "--base", "the GGUF that the sidecar is loaded beside",
                "a folder", "convert the base to GGUF first, or use --as merged",
            )  # fmt: skip
        if self.llama_cpp is not None and self.base.is_file():
            got = "a GGUF, which needs no conversion"
            fix = "leave --llama-cpp out"
            problems.add("--llama-cpp", "base", "a Hugging Face folder", got, fix)

    def _check_onnx(self, form: Form | None, problems: Problems) -> None:
        types = ONNX.types or ()
        if self.type not in types:
            problems.add(
                "--type", "type", f"{' or '.join(types)} for --to {self.to}", self.type,
                "the precision of an export is set with --precision",
            )  # fmt: skip
        if form is not None and not form.merges:
            for flag in self._options_of_a_merge():
                problems.add(
                    flag, "form", "merged: no weight of the base changes in the others", self.form,
                    f"leave {flag} out",
                )  # fmt: skip

    def _options_of_a_merge(self) -> list[str]:
        """Those that were given and that a branch or an adapter file in ONNX would ignore."""
        # a half-wide graph, which an ONNX folder may hold, rounds the factors, and that is gated
        rounds = self.precision in ("fp16", "bf16") or is_onnx_folder(self.base)
        wanted, usual = self.survival, Bounds()
        gain = (wanted.gain_min, wanted.gain_max) != (usual.gain_min, usual.gain_max)
        given = {
            "--type": self.type == "keep",
            "--promote": self.promote is not None,
            "--gain": not rounds and gain,
            "--max-error": not rounds and wanted.error_max != usual.error_max,
            "--max-base-error": wanted.base_error_ratio_max != usual.base_error_ratio_max,
        }
        return [flag for flag, is_given in given.items() if is_given]


@dataclass(frozen=True)
class RecordRequest:
    """A reference that is wanted; the options are those of `safegene record`.

    Attributes:
        adapter: the adapter folder.
        base: a Hugging Face folder, or a GGUF file that transformers decodes to float.
        out: the folder to create.
        suite: a size of the built-in suite; `ci` where there are no prompts either.
        prompts: what to ask in its place: a JSONL or CSV file, or prompts.
        attacks: jailbreaks to ask the harmful prompts under, too; `all` for all of them.
        judge: what labels the replies, or its name; the built-in one when None.
        expression: which set of layer coefficients; the adapter's default when None.
        max_new_tokens: length of replies, in tokens.
        top_k: tokens whose logits are stored per position.
        now: the local time that a chat template may print; the real one when None.
        force: replace an existing `out`.
        stack: task adapters that are active with it, and the weight of each (docs/adapters.md).

    Raises:
        FormatError: all that is wrong.
    """

    adapter: Path
    base: Path
    out: Path
    suite: str | None = None
    prompts: Path | Sequence[Prompt] | None = None
    attacks: Sequence[str] = ()
    judge: Judge | str | None = None
    expression: str | None = None
    max_new_tokens: int = 24
    top_k: int = 64
    now: datetime | None = None
    force: bool = False
    stack: Sequence[tuple[Path, float]] = ()

    def __post_init__(self) -> None:
        problems = Problems()
        if self.suite is not None and self.prompts is not None:
            problems.add(
                "--suite", "prompts", "a suite or prompts", "both", "leave one of them out"
            )
        if self.suite not in (None, *SUITES):
            problems.add("--suite", "size", " or ".join(SUITES), self.suite, "choose one of these")
        if not isinstance(self.prompts, Path) and self.prompts is not None and not self.prompts:
            problems.add("--prompts", "prompts", "at least one", "none")
        for name, least in (("max_new_tokens", 1), ("top_k", 2)):
            if (value := getattr(self, name)) < least:
                problems.add(_flag(name), "number", f"at least {least}", value)
        problems.raise_if_any(FormatError)

    def chosen_prompts(self) -> Sequence[Prompt]:
        """The prompts, read or built in."""
        if self.prompts is None:
            return builtin_suite(cast(SuiteSize, self.suite or "ci"))
        return prompts_of(self.prompts)

    def chosen_judge(self) -> Judge:
        """The judge, loaded or built in."""
        return judge_of(self.judge) or RulesAndNgram()


@dataclass(frozen=True)
class CalibrateRequest:
    """An expression that is wanted; the options are those of `safegene calibrate`.

    Attributes:
        gene: the adapter folder, which gains the expression.
        model: the target fine-tune; with `form` the base of the artifact.
        shots: harmful and benign prompts: a JSONL or CSV file, or prompts.
        name: of the expression.
        bounds: of every coefficient.
        default: make it the default expression.
        force: replace an expression of this name.
        evaluation: prompts that will be tested on, so that none is used here; the suite when None.
        aligned: fit in PyTorch: a model whose refusals are to be reached.
        weight: likewise: of the KL against safety (1 when None).
        refusals: likewise: how a refusal begins.
        max_steps: likewise: gradients at most (40 when None).
        form: fit to the artifact itself: `sidecar`, `branch` or `merged`.
        reference: likewise: recorded with the shots as its prompts.
        type: likewise: of a GGUF (`auto` when None).
        precision: likewise: of an export to ONNX (fp32 when None).
        expression: likewise: where to start; the gene's default when None.
        evaluations: likewise: rebuilds at most (60 when None).
        check: likewise: recorded on other prompts, to see whether it helps there, too.
        judge: likewise: of the replies to `check`, or its name.

    Raises:
        UnsupportedError: options that do not go together, all of them.
    """

    gene: Path
    model: Path
    shots: Path | Sequence[Prompt]
    name: str
    bounds: tuple[float, float] = (0.05, 8.0)
    default: bool = False
    force: bool = False
    evaluation: Path | Sequence[Prompt] | None = None
    aligned: Path | None = None
    weight: float | None = None
    refusals: Sequence[str] = ()
    max_steps: int | None = None
    form: str | None = None
    reference: Path | None = None
    type: str | None = None
    precision: str | None = None
    expression: str | None = None
    evaluations: int | None = None
    check: Path | None = None
    judge: Judge | str | None = None

    def __post_init__(self) -> None:
        problems = Problems()
        (self._check_pytorch if self.form is None else self._check_deployed)(problems)
        problems.raise_if_any(UnsupportedError)

    @property
    def made(self) -> Form:
        """What is made: the name says it, or for `merged` the base, or what it is exported as.

        Raises:
            UnsupportedError: no form has this name.
        """
        found = [form for form in FORMS if form.name == self.form]
        if len(found) == 1:
            return found[0]
        exported = self._is_onnx or self.precision is not None
        return form_named(ONNX if exported else GGUF, str(self.form))

    @property
    def _is_onnx(self) -> bool:
        return is_onnx_folder(self.model) or self.model.suffix.lower() == ".onnx"

    def _check_pytorch(self, problems: Problems) -> None:
        for name in (
            "reference",
            "type",
            "precision",
            "expression",
            "evaluations",
            "check",
            "judge",
        ):
            if getattr(self, name) is not None:
                flag = _flag(name)
                problems.add(flag, "form", "--as sidecar, branch or merged beside it", "none",
                             f"add --as, or leave {flag} out")  # fmt: skip

    def _check_deployed(self, problems: Problems) -> None:
        form, is_onnx = self.form, self._is_onnx
        known = tuple(name for name in names_of_forms() if name != ONNX_ADAPTER.name)
        if form not in known:
            problems.add("--as", "form", " or ".join(known), form, "choose one of these")
            return
        made = self.made
        if self.reference is None:
            problems.add("--as", "reference", "--reference beside it", "none", "record one first")
        for name, flag in (("weight", "--weight"), ("refusals", "--refusal"),
                           ("max_steps", "--max-steps"), ("aligned", "--aligned")):  # fmt: skip
            if getattr(self, name) not in (None, ()):
                problems.add(flag, "form", "a calibration in PyTorch", f"--as {form}",
                             f"leave {flag} out: an artifact is fitted to its reference")  # fmt: skip
        if self.judge is not None and self.check is None:
            problems.add("--judge", "replies", "--check beside it", "none",
                         "add --check, or leave --judge out")  # fmt: skip
        if not made.carries_base and is_onnx:
            problems.add("--as", "form", "branch or merged, for an ONNX folder", form,
                         "choose one of these, or pass a GGUF as --model")  # fmt: skip
        elif not made.carries_base and self.model.is_dir():
            problems.add("--model", "base", "the GGUF that the sidecar belongs to", "a folder",
                         "pass the GGUF, or choose --as branch or merged")  # fmt: skip
        if self.type is not None and made.target is ONNX:
            problems.add("--type", "target", "GGUF", "ONNX",
                         "leave --type out: the precision of an export is set with --precision")  # fmt: skip
        if self.precision is not None and (is_onnx or not made.carries_base):
            problems.add("--precision", "model", "a base to export to ONNX",
                         "an ONNX folder, which has its precision" if is_onnx else "a GGUF and its sidecar",
                         "leave --precision out")  # fmt: skip
