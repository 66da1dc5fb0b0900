"""A tiny base, an adapter, the record of both, the genuine artifacts, and the whole ladder for them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import tiny

from safegene import convert, record
from safegene_converter.fold.survival import Bounds
from safegene_runtime.engines.chat import render_all
from safegene_runtime.engines.engine import Engine
from safegene_runtime.engines.registry import open_engine
from safegene_runtime.formats.gguf.model import open_model
from safegene_runtime.record.prompts import Prompt
from safegene_runtime.record.reference import Reference
from safegene_runtime.verifying import ladder, text_parity
from safegene_runtime.verifying.report import Report

TARGETS = ("gguf sidecar", "gguf merged", "onnx merged", "onnx branch", "onnx adapter")

PROMPTS = tuple(
    Prompt(f"p{number}", text, "harmful", "test")
    for number, text in enumerate(
        ("Name a colour.", "Write two words about rain.", "What is seven times six?", "Say it.")
    )
)

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COEFFICIENTS = {
    "format_version": 1,
    "base_model": {"name": "tiny", "architecture": "llama", "n_layers": 2},
    "selected_layers": [0, 1],
    "default_expression": "default",
    "expressions": {"default": {"coefficients": {"0": 0.37, "1": 2.9}}},
}


@dataclass(frozen=True)
class Workshop:
    """One adapter on one tiny base, the record of both, and the genuine artifacts.

    `hidden` 256 gives rows that Q2_K can encode, and `scale` is how strong the adapter is.
    """

    folder: Path
    hidden: int = 64
    scale: float = 0.1
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    @property
    def adapter(self) -> Path:
        """Every module touched, and coefficients by layer."""
        if "adapter" not in self._made:
            made = tiny.peft_adapter(
                "llama", self.folder / "adapter", hidden=self.hidden, scale=self.scale,
                target_modules=MODULES,
            )  # fmt: skip
            (made / "safegene.json").write_text(json.dumps(COEFFICIENTS))
            self._made["adapter"] = made
        found: Path = self._made["adapter"]
        return found

    @property
    def reference(self) -> Reference:
        """What PyTorch and PEFT compute."""
        if "reference" not in self._made:
            self._made["reference"] = record(
                self.adapter, tiny.hf_model("llama", self.hidden), self.folder / "reference",
                prompts=PROMPTS, max_new_tokens=4,
            )  # fmt: skip
        found: Reference = self._made["reference"]
        return found

    def base(self, target: str) -> Path:
        """What the artifact of a target was made from: a GGUF, or an ONNX folder."""
        if target.startswith("gguf"):
            return tiny.gguf_model("llama", self.hidden)
        if self.hidden != 64:
            raise ValueError("the tiny ONNX base has 64 columns")
        return tiny.onnx_model("llama")

    def base_beside(self, target: str) -> Path | None:
        """What a sidecar is verified with; None for artifacts that hold their base."""
        return self.base(target) if target == "gguf sidecar" else None

    def genuine(self, target: str) -> Path:
        """The artifact without a mistake."""
        if target not in self._made:
            out = self.folder / target.replace(" ", "-")
            self.convert(self.adapter, target, out)
            self._made[target] = out
        found: Path = self._made[target]
        return found

    def header_bytes(self, path: Path) -> int:
        """Where the tensors of a GGUF begin; read once, as its vocabulary takes long."""
        if path not in self._made:
            tensors = open_model(path).tensors.values()
            self._made[path] = min(info.offset for info in tensors)
        found: int = self._made[path]
        return found

    def convert(self, adapter: Path, target: str, out: Path) -> None:
        """An artifact by the converter, with the gate switched off that would refuse some mutants."""
        kind, form = target.split()
        convert(
            adapter, self.base(target), out, to=kind, form=form, check=False,
            bounds=Bounds(0, 99, 99, 99) if form == "merged" else None,
        )  # fmt: skip


OpenEngine = Callable[..., Engine]


@dataclass(frozen=True)
class Forged:
    """What the ladder is asked about.

    Attributes:
        folder: the artifact.
        base: the GGUF that is passed as a sidecar's base.
        open_engine: what runs it, where that is the mistake.
    """

    folder: Path
    base: Path | None
    open_engine: OpenEngine = open_engine


def climb(forged: Forged, reference: Reference) -> Report:
    """The whole ladder; every rung above integrity is tried even where one below it broke.

    The engine runs in this process: one of its own for each of hundreds of mutants costs minutes.
    """

    def in_process(model: Path, adapter: Path | None, **settings: Any) -> Engine:
        return forged.open_engine(model, adapter, **{**settings, "apart": False})

    with (
        mock.patch.object(ladder, "open_engine", in_process),
        mock.patch.object(text_parity, "render_all", _render_once),
    ):
        return ladder.verify(forged.folder, reference, base=forged.base, threads=1, write=False)


_rendered: dict[str, list[str]] = {}


def _render_once(template: str, *arguments: Any, **options: Any) -> list[str]:
    """The same prompts in the same template are the same text: a process less for each mutant."""
    key = json.dumps([template, arguments, options])
    if key not in _rendered:
        _rendered[key] = render_all(template, *arguments, **options)
    return _rendered[key]


def rungs_that_broke(report: Report) -> tuple[str, ...]:
    """Every rung that caught something, in the order of the ladder."""
    return tuple(rung.name for rung in report.rungs if rung.status == "broken")


def unmutated(shop: Workshop, target: str, out: Path) -> Forged:
    """The genuine artifact."""
    shutil.copytree(shop.genuine(target), out)
    return Forged(out, shop.base_beside(target))
