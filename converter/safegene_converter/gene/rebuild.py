"""One artifact for any layer coefficients: what is the same for all of them is done once.

    GGUF   sidecar, merged     `convert` for each trial; a sidecar is a small file
    ONNX   branch, merged      the base is exported and proved once; each trial writes the graph anew

Trials are not self-checked. They lie beside the gene, are replaced by the next one, and leave
nothing behind.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from safegene_converter.bases.onnx_source import Export, check_source_fits, export_base, open_source
from safegene_converter.fold.survival import Bounds
from safegene_converter.gene.folder import copy_with
from safegene_converter.gguf.convert import convert
from safegene_converter.inputs.adapter import read_adapter
from safegene_converter.onnx.convert import default_form, write_fold
from safegene_converter.onnx.fold import OnnxFold, prove_weights, touched_weights
from safegene_converter.requests import ConvertRequest
from safegene_runtime.artifact.forms import GGUF, ONNX, form_named, forms_of
from safegene_runtime.engines.engine import Engine
from safegene_runtime.engines.registry import open_engine
from safegene_runtime.errors import Problem, UnsupportedError
from safegene_runtime.progress import Progress, silent

__all__ = ["Rebuild", "gguf_rebuild", "onnx_rebuild"]

Rebuild = Callable[[dict[int, float]], Engine]
"""Layer coefficients -> an engine on the artifact that has them."""


@contextlib.contextmanager
def gguf_rebuild(
    gene: Path,
    base: Path,
    form: str,
    type_name: str = "auto",
    threads: int | None = None,
) -> Iterator[Rebuild]:
    """A GGUF artifact for any coefficients, inside a `with`.

    Args:
        gene: the adapter folder.
        base: the GGUF base; for `merged` also a Hugging Face folder.
        form: `sidecar` or `merged`.
        type_name: as in `convert`.
        threads: of the engine.
    """
    made = form_named(GGUF, form)
    with _beside(gene) as work:

        def rebuild(coefficients: dict[int, float]) -> Engine:
            trial, out = _trial(gene, work, coefficients)
            convert(ConvertRequest(trial, base, out, form=form, type=type_name, check=False))
            if made.carries_base:
                return open_engine(out / str(GGUF.model_file), threads=threads)
            return open_engine(base, out / GGUF.adapter_file, threads=threads)

        yield rebuild


@contextlib.contextmanager
def onnx_rebuild(
    gene: Path,
    base: Path,
    form: str | None = None,
    precision: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> Iterator[Rebuild]:
    """An ONNX artifact for any coefficients, inside a `with`.

    What is run for coefficients is what `convert` writes for them. The branch and the adapter
    file compute the same, so `branch` stands for `--as adapter`, too.

    Args:
        gene: the adapter folder.
        base: an ONNX folder, or a Hugging Face folder or float GGUF, which is exported once.
        form: `branch` or `merged`; None: `branch` beside int4 and int8 weights, else `merged`.
        precision: what to export as; fp32 when None.
        threads: of the engine.
        progress: told about the export.

    Raises:
        SafeGeneError: the base cannot be used or does not fit the gene.
    """
    tell: Progress = progress or silent
    known = sorted(one.name for one in forms_of(ONNX) if not one.has_slots)
    if form is not None and form not in known:
        raise UnsupportedError(
            Problem("onnx_rebuild", "form", " or ".join(known), form, "choose one of these")
        )
    wanted = None if form is None else form_named(ONNX, form)
    adapter = read_adapter(gene)
    export = Export(precision)
    source = open_source(base, export)
    check_source_fits(adapter, source)
    with _beside(gene) as work:
        hf, opened, _ = export_base(source, work / "export", export, tell)
        check_source_fits(adapter, opened)
        touched = touched_weights(adapter, opened)
        if hf is not None:
            prove_weights(touched, opened, hf)
        chosen = wanted or default_form(opened, touched)

        def rebuild(coefficients: dict[int, float]) -> Engine:
            trial, out = _trial(gene, work, coefficients)
            wanted = read_adapter(trial)
            fold = OnnxFold(
                wanted, opened, hf, chosen, touched_weights(wanted, opened), Bounds(), True
            )
            out.mkdir()
            write_fold(fold, out, silent)
            return open_engine(out / opened.model.path.name, threads=threads)

        yield rebuild


@contextlib.contextmanager
def _beside(gene: Path) -> Iterator[Path]:
    """A folder on the gene's own file system: its vectors are hard-linked into every trial."""
    with tempfile.TemporaryDirectory(prefix=f".{gene.name}.", dir=gene.absolute().parent) as name:
        yield Path(name)


def _trial(gene: Path, work: Path, coefficients: dict[int, float]) -> tuple[Path, Path]:
    """A copy of the gene with these coefficients, and where its artifact goes; the last are gone."""
    place = work / "trial"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    return copy_with(gene, place / "gene", coefficients), place / "artifact"
