"""The child process of `presets`: one call of `llama_model_quantize`, as told by JSON on stdin.

Prints libllama's log to standard output. libllama aborts on some inputs; that is why this is a
program and not a function.
"""

from __future__ import annotations

import ctypes
import json
import re
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    """Quantises one file."""
    import llama_cpp  # starts the llama.cpp backend, in this process only

    job: dict[str, Any] = json.load(sys.stdin)

    def write(level: int, text: bytes, user_data: object) -> None:
        sys.stdout.write(text.decode("utf-8", "replace"))

    log = llama_cpp.llama_log_callback(write)  # a name keeps it alive
    llama_cpp.llama_log_set(log, ctypes.c_void_p(0))
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = job["ftype"]
    params.nthread = job["threads"]
    alive: list[Any] = []  # what params points to must outlive the call
    if job["overrides"]:
        params.tt_overrides = _overrides(llama_cpp, job["overrides"], alive)
    if job["imatrix"]:
        params.imatrix = _imatrix(llama_cpp, Path(job["imatrix"]), alive)
    failed: int = llama_cpp.llama_model_quantize(
        job["src"].encode(), job["dst"].encode(), ctypes.byref(params)
    )
    sys.stdout.flush()
    return 1 if failed else 0


def _overrides(llama_cpp: Any, types: dict[str, int], alive: list[Any]) -> Any:
    """Exact names as the regular expressions libllama wants; ends with a null pattern."""
    array = (llama_cpp.llama_model_tensor_override * (len(types) + 1))()
    for entry, (name, type) in zip(array, types.items(), strict=False):
        entry.pattern, entry.type = f"^{re.escape(name)}$".encode(), type
    alive.append(array)
    return array


def _imatrix(llama_cpp: Any, path: Path, alive: list[Any]) -> Any:
    """An imatrix file as libllama wants it; ends with a null name."""
    from safegene_converter.encoding.imatrix import read_imatrix

    weights = read_imatrix(path)
    array = (llama_cpp.llama_model_imatrix_data * (len(weights) + 1))()
    for entry, (name, values) in zip(array, weights.items(), strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    alive.extend([array, weights])
    return array


if __name__ == "__main__":
    sys.exit(main())
