"""Hugging Face folder -> ONNX decoder, by the onnxruntime-genai model builder.

The builder is a script that imports torch and prints a lot, so it runs as a child. It also asks a
hub for a token unless it is told not to, and imports remote code only when asked; we ask for neither.
An option that it does not know it ignores in silence, so the names of options are looked up in it.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from safegene_converter.child import python_environment, run_child
from safegene_runtime.errors import BaseModelError, Problem, Problems, UnsupportedError

__all__ = ["PRECISIONS", "build_onnx", "check_build_options"]

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
BLOCK_SIZES = (16, 32, 64, 128, 256)
ACCURACY_LEVELS = (1, 2, 3, 4)
BUILDER = "onnxruntime_genai.models.builder"

_OURS = ("hf_token", "hf_remote", "adapter_path", "exclude_embeds", "exclude_lm_head")
"""Options that would change what is built in ways the rest of the conversion does not expect."""


def check_build_options(
    precision: str,
    block_size: int | None,
    accuracy_level: int | None,
    options: Sequence[str],
) -> None:
    """Refuses options that the builder would misread, before any work.

    Raises:
        UnsupportedError: all of them.
        BaseModelError: the builder is not installed.
    """
    problems = Problems()
    builder = _find_builder()
    known_options = _known_options(builder) if builder is not None and options else frozenset()
    packed = precision in ("int4", "int8")
    if precision not in PRECISIONS:
        problems.add("--precision", "precision", f"one of {', '.join(PRECISIONS)}", precision)
    for flag, number, known in (
        ("--block-size", block_size, BLOCK_SIZES),
        ("--accuracy-level", accuracy_level, ACCURACY_LEVELS),
    ):
        if number is not None and number not in known:
            problems.add(flag, "value", f"one of {', '.join(map(str, known))}", number)
        if number is not None and not packed:
            problems.add(flag, "precision", "int4 or int8", precision, f"leave {flag} out")
    for option in options:
        key, _, value = option.partition("=")
        if not key or not value:
            problems.add("--builder-option", "option", "KEY=VALUE", option)
        elif key in _OURS:
            problems.add(
                "--builder-option", key, "an option of the builder that is free", option,
                "safegene sets it, or the result would be no decoder",
            )  # fmt: skip
        elif builder is not None and key not in known_options:
            near = difflib.get_close_matches(key, known_options, 1, 0.75)
            problems.add(
                "--builder-option", key, "an option that the builder knows: it ignores others",
                option, f"did you mean {near[0]}?" if near else f"see python -m {BUILDER} --help",
            )  # fmt: skip
    problems.raise_if_any(UnsupportedError)
    if builder is None:
        raise BaseModelError(
            Problem(
                "onnxruntime-genai",
                "package",
                "the model builder",
                "nothing",
                "pip install 'safegene[onnx-build]', or pass an ONNX folder as --base",
            )
        )


def _find_builder() -> Path | None:
    """The folder of the builder's sources, where it is installed."""
    try:
        spec = importlib.util.find_spec("onnxruntime_genai")
    except (ImportError, ValueError):
        return None
    folders = (spec.submodule_search_locations or ()) if spec is not None else ()
    return next((Path(folder) / "models" for folder in folders), None)


def _known_options(builder: Path) -> frozenset[str]:
    """Every name that the builder's sources quote; no other can be an option that has an effect."""
    return frozenset(
        name
        for path in builder.rglob("*.py")
        for name in re.findall(r"""["']([a-z]\w*)["']""", path.read_text(encoding="utf-8"))
    )


def build_onnx(
    hf_dir: Path,
    out: Path,
    precision: str,
    *,
    block_size: int | None = None,
    accuracy_level: int | None = None,
    options: Sequence[str] = (),
    progress: Callable[[int], None] | None = None,
) -> None:
    """Builds `out`/model.onnx, genai_config.json and the tokenizer files.

    Args:
        hf_dir: a Hugging Face folder that `open_base` accepted.
        out: the folder to fill.
        precision: one of `PRECISIONS`.
        block_size: of int4 and int8 weights; the builder's default (32) when None.
        accuracy_level: of int4 and int8 activations; the builder's default when None.
        options: further KEY=VALUE options of the builder.
        progress: told the bytes by which the data file grows.

    Raises:
        BaseModelError: the builder failed; the message ends with what it said.
    """
    extra = ["hf_token=false", *options]
    if block_size is not None:
        extra.append(f"block_size={block_size}")
    if accuracy_level is not None:
        extra.append(f"accuracy_level={accuracy_level}")
    out.mkdir(parents=True, exist_ok=True)
    cache = out.parent / f".{out.name}.cache"
    with _without_nulls(hf_dir.resolve()) as source:
        run_child(
            [
                sys.executable, "-m", BUILDER,
                "-i", source, "-o", out.resolve(), "-p", precision, "-e", "cpu",
                "-c", cache, "--extra_options", *extra,
            ],
            what=f"{BUILDER} {hf_dir}",
            error=BaseModelError,
            fix=f"python -m {BUILDER} --help says what it can do",
            # the builder asks git for the commit of the repository that a .venv lies in, and
            # writes it down as its own: without git it takes that of its package
            environment=python_environment({"TQDM_DISABLE": "1", "GIT_DIR": os.devnull}),
            grows=out / "model.onnx.data",
            progress=progress,
        )  # fmt: skip
    if not (out / "model.onnx").is_file():
        raise BaseModelError(
            Problem(BUILDER, "model.onnx", "a graph", "nothing", "run the builder by hand")
        )


@contextlib.contextmanager
def _without_nulls(folder: Path) -> Iterator[Path]:
    """The folder, or one of links to it whose config.json says nothing about quantisation.

    transformers writes `"quantization_config": null` for a model that it decoded, and the builder
    (onnxruntime-genai 0.18) then asks null for its method.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("quantization_config", ...) is not None:
        yield folder
        return
    del config["quantization_config"]
    with tempfile.TemporaryDirectory(prefix="safegene-") as name:
        for path in folder.iterdir():
            if path.name != "config.json":
                (Path(name) / path.name).symlink_to(path)
        (Path(name) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield Path(name)
