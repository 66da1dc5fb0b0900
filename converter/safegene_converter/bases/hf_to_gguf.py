"""Hugging Face folder -> GGUF, by llama.cpp's own `convert_hf_to_gguf.py`.

The script belongs to a llama.cpp source tree (it comes with llama-cpp-python's source distribution)
and runs as a child process. It imports tokenizers with `trust_remote_code=True`, so a folder that
names code of its own is refused before the script sees it (`check_folder`).
"""

from __future__ import annotations

import os
from pathlib import Path

from safegene_converter.bases.proof import gguf_side, prove_base, reach_of, torch_side
from safegene_converter.inputs.base import Base, check_folder, open_base
from safegene_converter.inputs.consumed import limit_of
from safegene_runtime.artifact.base_proof import BaseProof
from safegene_runtime.child import deadline_for, python_command, python_environment, run_child
from safegene_runtime.errors import BaseModelError, Problem
from safegene_runtime.extras import need
from safegene_runtime.formats.gguf.header import read_gguf
from safegene_runtime.progress import Progress, Step

__all__ = [
    "OUT_TYPES", "convert_hf", "find_llama_cpp", "limited_to_window", "prove_gguf_of_folder",
]  # fmt: skip

SCRIPT = "convert_hf_to_gguf.py"
OUT_TYPES = ("f32", "f16", "bf16", "q8_0")
ENVIRONMENT_NAME = "SAFEGENE_LLAMA_CPP"
CACHE_FOLDER = Path(".cache") / "llama.cpp"

_HOW_TO_GET = (
    "pass --llama-cpp DIR, a llama.cpp source tree; llama-cpp-python's has one: `pip download "
    "--no-deps --no-binary llama-cpp-python llama-cpp-python==0.3.36`, unpack it, and use its "
    "vendor/llama.cpp"
)


def find_llama_cpp(explicit: Path | None = None) -> Path:
    """The llama.cpp source tree to use.

    Looked for, in this order: `explicit`, the environment variable SAFEGENE_LLAMA_CPP, then
    `.cache/llama.cpp` below the working directory and below the repository this package is run
    from. What the user names must be right; it is not silently replaced by another tree.

    Raises:
        BaseModelError: none; the message says how to get one.
    """
    named = [path for path in (explicit, os.environ.get(ENVIRONMENT_NAME)) if path]
    repository = Path(__file__).resolve().parents[3]
    places = (
        [Path(named[0])]
        if named
        else [folder / CACHE_FOLDER for folder in dict.fromkeys((Path.cwd(), repository))]
    )
    for place in places:
        if (place / SCRIPT).is_file() and (place / "gguf-py").is_dir():
            return place.resolve()
    raise BaseModelError(
        Problem(
            ", ".join(map(str, places)),
            "llama.cpp",
            f"a source tree with {SCRIPT}",
            "none",
            _HOW_TO_GET,
        )
    )


def convert_hf(
    hf_dir: Path,
    out_gguf: Path,
    outtype: str = "f32",
    llama_cpp: Path | None = None,
    *,
    progress: Step | None = None,
) -> None:
    """Converts a Hugging Face folder to one GGUF file.

    Args:
        hf_dir: the folder; one with code of its own is refused.
        out_gguf: the file to write.
        outtype: one of `OUT_TYPES`.
        llama_cpp: a llama.cpp source tree; see `find_llama_cpp`.
        progress: told the bytes by which the output grows.

    Raises:
        BaseModelError: the script failed; the message ends with what it said.
        FormatError: what it wrote is not a GGUF file.
    """
    if outtype not in OUT_TYPES:
        raise BaseModelError(
            Problem(SCRIPT, "outtype", f"one of {', '.join(OUT_TYPES)}", outtype, "choose one")
        )
    need("sentencepiece", "google.protobuf")
    need("torch", "transformers")
    tree = find_llama_cpp(llama_cpp)
    check_folder(hf_dir)
    environment = python_environment()
    environment.pop("NO_LOCAL_GGUF", None)  # the script needs the gguf-py of its own tree
    environment["PYTHONPATH"] = os.pathsep.join([str(tree.resolve()), environment["PYTHONPATH"]])
    run_child(
        [
            *python_command(tree / SCRIPT),
            hf_dir.resolve(),
            "--outfile",
            out_gguf.resolve(),
            "--outtype",
            outtype,
        ],
        what=f"{SCRIPT} {hf_dir}",
        error=BaseModelError,
        environment=environment,
        deadline_s=deadline_for(hf_dir),
        grows=out_gguf,
        progress=progress,
    )
    read_gguf(out_gguf)


def limited_to_window(folder: Base, made: Base) -> Base:
    """Makes the context of a GGUF as long as the sliding window of its folder, if there is one.

    llama.cpp runs full attention for these architectures. Up to the window that is the same, and engines
    refuse what is longer than the context.

    Args:
        folder: the source.
        made: its GGUF; one number is overwritten in its header.

    Raises:
        BaseModelError: the header has no context length to change.
    """
    window = None if folder.config is None else limit_of(folder.config)
    if window is None:
        return made
    import gguf

    key = f"{made.architecture}.context_length"
    field = gguf.GGUFReader(made.path, "r+").fields.get(key)
    if field is not None and field.types == [gguf.GGUFValueType.UINT32]:
        field.parts[field.data[0]][0] = window
    limited = open_base(made.path)
    if limited.context_length != window:
        got = str(limited.context_length)
        raise BaseModelError(Problem(str(made.path), key, f"{window}, the sliding window", got))
    return limited


def prove_gguf_of_folder(folder: Base, made: Base, tell: Progress) -> BaseProof:
    """Proves that llama.cpp answers with a GGUF as PyTorch does with the folder it was made from.

    Raises:
        BaseModelError: it does not.
    """
    if made.model is None:
        raise BaseModelError(Problem(str(made.path), "base", "a GGUF", "another format"))
    llama, precision = gguf_side(made.model)
    return prove_base(
        torch_side(folder.path), llama, precision=precision,
        reach=reach_of(folder, made.context_length), where=f"{folder.path}: {SCRIPT}", tell=tell,
    )  # fmt: skip
