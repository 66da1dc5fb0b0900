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
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from safegene_runtime.child import deadline_for, python_command, python_environment, run_child
from safegene_runtime.errors import BaseModelError, Problem, Problems, UnsupportedError
from safegene_runtime.extras import install, need
from safegene_runtime.progress import Step

__all__ = ["PRECISIONS", "build_onnx", "check_build_options"]

PRECISIONS = ("fp32", "fp16", "bf16", "int8", "int4")
BLOCK_SIZES = (16, 32, 64, 128, 256)
ACCURACY_LEVELS = (1, 2, 3, 4)
BUILDER = "onnxruntime_genai.models.builder"

_OURS = (
    "hf_token", "hf_remote", "adapter_path", "filename", "config_only", "num_hidden_layers",
    "exclude_embeds", "exclude_lm_head", "prune_lm_head", "use_paged_attention", "use_qdq",
    "kv_cache_quant_scheme",
)  # fmt: skip
"""Options that would change what is built in ways the rest of the conversion does not expect."""
_FLAGS = {"block_size": "--block-size", "accuracy_level": "--accuracy-level"}
"""Options that have a flag of ours, which checks them: given twice, one of them would be ignored."""
_ELSEWHERE = {"group_size": "block_size", "sym": "is_symmetric"}
"""What other quantisers call them."""
_LAYOUT = {"fp16": "cuda", "bf16": "cuda"}
"""For the CPU the builder lays half-wide attention out so that it takes no past: its own list of
combinations leaves them out. The layout made for CUDA takes one, and ONNX Runtime has the kernels of
fp16 on the CPU, but for `_CUDA_ONLY`."""
_CUDA_ONLY = "fuse_qk_norm_gqa=false"


_EXPLAINED = re.compile(r"^ {16}([a-z]\w*) = ", re.MULTILINE)
_LOOKED_UP = re.compile(
    r"""extra_options(?:\.get\(|\[)\s*["'](\w+)["']|["'](\w+)["'](?: not)? in (?:self\.)?extra_options"""
)


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
        elif key in _FLAGS:
            problems.add(
                "--builder-option", key, "an option that has no flag", option,
                f"use {_FLAGS[key]} {value}",
            )  # fmt: skip
        elif key in _OURS:
            problems.add(
                "--builder-option", key, "an option of the builder that is free", option,
                "safegene sets it, or the result would be another decoder, or none",
            )  # fmt: skip
        elif builder is not None and key not in known_options:
            problems.add(
                "--builder-option", key, "an option that the builder knows: it ignores others",
                option, _suggestion(key, known_options),
            )  # fmt: skip
    problems.raise_if_any(UnsupportedError)
    if builder is None:
        raise BaseModelError(
            Problem(
                "onnxruntime-genai",
                "package",
                "the model builder",
                "nothing",
                f"{install('onnx-build')}, or pass an ONNX folder as --base",
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
    """The keys that the builder's help explains and those that its sources look up."""
    found: set[str] = set()
    for path in builder.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        found.update(name for match in _LOOKED_UP.finditer(text) for name in match.groups() if name)
        if path.name == "builder.py":
            found.update(_EXPLAINED.findall(text.partition('"--extra_options"')[2]))
    return frozenset(name for name in found if not name.startswith("_")) - {"hf_details"}


def _suggestion(key: str, known: frozenset[str]) -> str:
    """What an unknown key was probably meant to be."""
    near = difflib.get_close_matches(_ELSEWHERE.get(key, key), known | _FLAGS.keys(), 1, 0.75)
    if not near:
        return f"see python -m {BUILDER} --help"
    return f"did you mean {_FLAGS.get(near[0], near[0])}?"


def build_onnx(
    hf_dir: Path,
    out: Path,
    precision: str,
    *,
    block_size: int | None = None,
    accuracy_level: int | None = None,
    options: Sequence[str] = (),
    progress: Step | None = None,
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
    need("torch", "transformers", "onnx", "onnxruntime", "onnx_ir")
    half = precision in _LAYOUT
    extra = ["hf_token=false", *([_CUDA_ONLY] if half else []), *options]
    if block_size is not None:
        extra.append(f"block_size={block_size}")
    if accuracy_level is not None:
        extra.append(f"accuracy_level={accuracy_level}")
    out.mkdir(parents=True, exist_ok=True)
    cache = out.parent / f".{out.name}.cache"
    with _without_nulls(hf_dir.resolve()) as source:
        run_child(
            [
                *python_command("-m", BUILDER),
                "-i", source, "-o", out.resolve(), "-p", precision,
                "-e", _LAYOUT.get(precision, "cpu"), "-c", cache, "--extra_options", *extra,
            ],
            what=f"{BUILDER} {hf_dir}",
            error=BaseModelError,
            fix=f"python -m {BUILDER} --help says what it can do",
            # the builder asks git for the commit of the repository that a .venv lies in, and
            # writes it down as its own: without git it takes that of its package
            environment=python_environment({"TQDM_DISABLE": "1", "GIT_DIR": os.devnull}),
            deadline_s=deadline_for(hf_dir),
            grows=out / "model.onnx.data",
            progress=progress,
        )  # fmt: skip
    if not (out / "model.onnx").is_file():
        raise BaseModelError(
            Problem(BUILDER, "model.onnx", "a graph", "nothing", "run the builder by hand")
        )
    if precision == "fp16":
        _run_anywhere(out / "genai_config.json")


def _run_anywhere(path: Path) -> None:
    """Takes the provider out of a genai_config.json, which then means the CPU until a caller adds one."""
    config = json.loads(path.read_text(encoding="utf-8"))
    config["model"]["decoder"]["session_options"]["provider_options"] = []
    path.write_text(json.dumps(config, indent=4), encoding="utf-8")


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
