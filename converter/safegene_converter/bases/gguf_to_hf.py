"""A float GGUF -> a Hugging Face folder, by transformers' GGUF loader, proved on the weights.

Runs as a child process (`python -m safegene_converter.bases.gguf_to_hf GGUF OUT`): it imports torch, and
holds the whole model in float32. What the loader would silently drop is refused before: shards, and
any scaling of the rotary embedding, which it does not map to a configuration.
"""

from __future__ import annotations

import sys
from pathlib import Path

from safegene_converter.inputs import names
from safegene_converter.inputs.base import Base, open_base
from safegene_runtime.child import python_environment, run_child
from safegene_runtime.errors import BaseModelError, Problems, SafeGeneError, UnsupportedError
from safegene_runtime.progress import Progress, counted

__all__ = ["check_decodable", "gguf_to_hf", "main"]

STAGE = "reading the GGUF"
ERROR_MAX = 1e-6
"""Float types go into float32 without loss; a wrong row order leaves about 1.4."""


def check_decodable(base: Base) -> None:
    """Refuses a GGUF whose weights or configuration would not arrive as they are.

    Raises:
        UnsupportedError: quantised weights, shards, or a scaled rotary embedding.
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
    stated = base.model.metadata.get(f"{base.architecture}.rope.scaling.type")
    scaling = None if stated is None else stated.value
    if "rope_freqs.weight" in base.model.tensors or scaling not in (None, "none"):
        problems.add(
            where, "rotary embedding", "one without scaling", str(scaling or "rope_freqs.weight"),
            "pass the Hugging Face folder: transformers drops the scaling of a GGUF",
        )  # fmt: skip
    problems.raise_if_any(UnsupportedError)


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
        [sys.executable, "-m", "safegene_converter.bases.gguf_to_hf", base.path.resolve(), out],
        what=f"transformers' GGUF loader on {base.path}",
        error=BaseModelError,
        environment=python_environment(),
        grows=out / "model.safetensors",
        progress=step,
    )
    made = open_base(out)
    problems, worst = Problems(), 0.0
    if made.shapes != base.shapes:
        odd = sorted(set(made.shapes.items()) ^ set(base.shapes.items()))
        problems.add(str(base.path), "modules", "those of the GGUF", f"{odd[:3]}")
    for module in () if problems else base.shapes:
        error = names.prove_transform(
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


def main() -> int:
    """The child: loads argv[1], saves argv[2]."""
    from safegene_converter.recording.recorder import save_as_folder

    try:
        save_as_folder(open_base(Path(sys.argv[1])), Path(sys.argv[2]))
    except SafeGeneError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
