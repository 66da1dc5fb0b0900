"""A float GGUF -> a Hugging Face folder, by transformers' GGUF loader, proved on the weights.

Runs as a child process (`python -m safegene_converter.recording.save_folder GGUF OUT`): it imports torch,
and holds the whole model in float32. What the loader would silently drop is refused before: shards, and
tensors and keys that it does not read.
"""

from __future__ import annotations

from pathlib import Path

from safegene_converter.inputs.base import Base, open_base
from safegene_converter.inputs.consumed_gguf import check_gguf_for_torch
from safegene_converter.inputs.row_proof import prove_transform
from safegene_runtime.child import deadline_for, python_command, python_environment, run_child
from safegene_runtime.errors import BaseModelError, Problems, UnsupportedError
from safegene_runtime.progress import Progress, counted

__all__ = ["check_decodable", "gguf_to_hf"]

STAGE = "reading the GGUF"
ERROR_MAX = 1e-6
"""Float types go into float32 without loss; a wrong row order leaves about 1.4."""


def check_decodable(base: Base) -> None:
    """Refuses a GGUF whose weights or configuration would not arrive as they are.

    Raises:
        UnsupportedError: quantised weights, or shards.
        BaseModelError: a tensor or a key that transformers' loader does not read.
    """
    if base.model is None:
        return
    problems = Problems()
    where = str(base.path)
    if not base.is_float:
        kinds = sorted({info.type.name for info in base.model.tensors.values()} - {"F32"})
        problems.add(
            where, "types", "a float GGUF (F32, F16, BF16) for --to onnx", ", ".join(kinds),
            "pass the float model it was made from; --to gguf takes a quantised base as it is",
        )  # fmt: skip
    if len(base.files) > 1:
        problems.add(
            where, "base", "one GGUF file", f"{len(base.files)} shards",
            "pass the Hugging Face folder: transformers reads no sharded GGUF",
        )  # fmt: skip
    problems.raise_if_any(UnsupportedError)
    check_gguf_for_torch(base.architecture, base.model, base.n_layers, base.n_head, where)


def gguf_to_hf(base: Base, out: Path, tell: Progress) -> tuple[Base, float]:
    """Makes the folder `out` and proves that it holds the weights of the GGUF, row by row.

    Args:
        base: a GGUF that `check_decodable` let pass.
        out: the folder to create.
        tell: told how far it is.

    Returns:
        the folder as a base, and the largest relative error of a weight.

    Raises:
        BaseModelError: transformers failed, or its weights are not those of the GGUF.
    """
    total = 4 * base.n_parameters
    step = counted(tell, STAGE, total)
    tell(STAGE, 0, total)
    run_child(
        python_command("-m", "safegene_converter.recording.save_folder", base.path.resolve(), out),
        what=f"transformers' GGUF loader on {base.path}",
        error=BaseModelError,
        environment=python_environment(),
        deadline_s=deadline_for(base.path),
        grows=out / "model.safetensors",
        progress=step,
    )
    made = open_base(out)
    problems, worst = Problems(), 0.0
    if made.shapes != base.shapes:
        odd = sorted(set(made.shapes.items()) ^ set(base.shapes.items()))
        problems.add(str(base.path), "modules", "those of the GGUF", f"{odd[:3]}")
    for module in () if problems else base.shapes:
        error = prove_transform(
            made.read_weight(module), base.read_weight(module), base.transform(module)
        )
        worst = max(worst, error)
        if not error <= ERROR_MAX:
            problems.add(
                str(base.path), module, "the GGUF's weight", f"relative error {error:.2g}",
                "pass the Hugging Face folder",
            )  # fmt: skip
    problems.raise_if_any(BaseModelError)
    tell(STAGE, total, total)
    return made, worst
