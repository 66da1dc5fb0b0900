"""Which extra of `pip install "safegene[...]"` brings a package, and the line that installs it."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence

from safegene_runtime.errors import MissingPackageError, Problem

__all__ = ["EXTRAS", "install", "missing_package", "need"]

_REFERENCE = {
    "torch": "torch", "transformers": "transformers", "peft": "peft", "safetensors": "safetensors",
}  # fmt: skip
_ONNX = {
    "jinja2": "jinja2", "onnx": "onnx", "onnxruntime": "onnxruntime", "tokenizers": "tokenizers",
}  # fmt: skip
EXTRAS = {
    "": {"numpy": "numpy", "rich": "rich", "scipy": "scipy"},
    "gguf": {
        "gguf": "gguf", "jinja2": "jinja2", "llama_cpp": "llama-cpp-python",
        "google.protobuf": "protobuf", "sentencepiece": "sentencepiece",
    },
    "onnx": _ONNX,
    "reference": _REFERENCE,
    "onnx-build": _ONNX
    | _REFERENCE
    | {"onnx_ir": "onnx-ir", "onnxruntime_genai": "onnxruntime-genai"},
}  # fmt: skip
"""Per extra of pyproject.toml the module that is imported, and the distribution it comes in.

The extra without a name stands for the packages that are always installed.
"""


def install(extra: str) -> str:
    """The line that installs an extra."""
    return f'pip install "safegene[{extra}]"' if extra else "pip install safegene"


def need(*modules: str) -> None:
    """Asks for packages that one extra brings, before any work is done.

    Raises:
        MissingPackageError: some are not installed; names all of them.
    """
    absent = [module for module in modules if not _is_there(module)]
    if absent:
        raise MissingPackageError(_absent(absent))


def missing_package(error: BaseException) -> Problem | None:
    """What an import that failed lacks, or one that caused the error; None if it is no package of ours.

    transformers raises such errors again without the name of the module, so the message counts, too.
    """
    if isinstance(error, ImportError):
        said = {error.name} if error.name else set(re.findall(r"[\w.-]+\w", str(error)))
        for module, distribution in (pair for held in EXTRAS.values() for pair in held.items()):
            if any(
                word in (module, distribution) or word.startswith(f"{module}.") for word in said
            ):
                return _absent([module], str(error))
    cause = error.__cause__ or error.__context__
    return missing_package(cause) if cause is not None else None


def _absent(modules: Sequence[str], got: str = "nothing") -> Problem:
    """Of several extras with these packages the one of which least is missing, then the smaller one."""
    holders = [extra for extra, held in EXTRAS.items() if held.keys() >= set(modules)]
    extra = min(holders, key=lambda extra: (_count_missing(extra), len(EXTRAS[extra])))
    names = " and ".join(EXTRAS[extra][module] for module in modules)
    return Problem("safegene", "package", names, got, install(extra))


def _count_missing(extra: str) -> int:
    return sum(not _is_there(module) for module in EXTRAS[extra])


def _is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False
