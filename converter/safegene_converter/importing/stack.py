"""A gene and task adapters as one plain adapter: base + task LoRA + gene, in every form that holds a LoRA.

    ΔW = Σ k · c · s · B A  =  [k1 c1 s1 B1 | k2 c2 s2 B2 | …] · [A1; A2; …]

with k the weight of each adapter: the ranks add up, and nothing is approximated. Every scale is in B,
rounded once, and alpha is the rank, so that PEFT's own scaling is 1. This is what PEFT computes with
all of them active, and what its `add_weighted_adapter(combination_type="cat")` makes.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from safegene_converter import formula
from safegene_converter.importing.plain import save_tensors
from safegene_converter.inputs.adapter import Adapter, read_adapter
from safegene_converter.inputs.adapter_files import CONFIG_NAME, WEIGHTS_NAME
from safegene_converter.inputs.adapter_keys import PREFIX
from safegene_converter.requests import ConvertRequest, RecordRequest
from safegene_runtime.errors import AdapterError, Problem, Problems
from safegene_runtime.extras import need
from safegene_runtime.formats import strictjson
from safegene_runtime.formats.publish import check_output_free, publish_folder

__all__ = ["stack_adapters", "stacked", "weighted"]

Asked = TypeVar("Asked", ConvertRequest, RecordRequest)


def weighted(text: str) -> tuple[Path, float]:
    """`ADAPTER` or `ADAPTER=WEIGHT`, as the command line has it."""
    path, equals, weight = text.rpartition("=")
    if equals and not Path(text).exists():
        try:
            return Path(path), float(weight)
        except ValueError:
            pass
    return Path(text), 1.0


@contextmanager
def stacked(request: Asked) -> Iterator[Asked]:
    """A request whose adapter is the whole stack, or the request itself where there is none.

    The stack lies in a folder of its own and is gone afterwards; its bytes follow from its parts alone, so
    that a reference and an artifact of the same parts belong together.

    Args:
        request: its `stack` has folders of task adapters, and the weight of each.

    Raises:
        SafeGeneError: as `stack_adapters`; and `out` may be none of the adapters.
    """
    if not request.stack:
        yield request
        return
    need("safetensors")
    paths = [request.adapter, *(path for path, _ in request.stack)]
    check_output_free(request.out, request.force, paths)
    with tempfile.TemporaryDirectory(prefix="safegene-") as folder:
        whole = Path(folder) / "+".join(path.resolve().name for path in paths)[:200]
        stack_adapters(request.adapter, request.stack, whole, expression=request.expression)
        yield replace(request, adapter=whole, expression=None, stack=())


def stack_adapters(
    gene: Path,
    others: Sequence[tuple[Path, float]],
    out: Path,
    *,
    expression: str | None = None,
    force: bool = False,
) -> Adapter:
    """Writes a gene and other adapters as one plain PEFT folder.

    Args:
        gene: its folder; its coefficients go into the factors.
        others: folders of task adapters, and the weight of each.
        out: the folder to create.
        expression: of the gene; its default when None.
        force: replace an existing `out`.

    Raises:
        AdapterError: a weight that is 0 or not finite, or shapes of different bases.
        SafeGeneError: an adapter that cannot be read; nothing is left under the name `out`.
    """
    check_output_free(out, force, [gene, *(path for path, _ in others)])
    problems = Problems()
    for path, weight in others:
        if not math.isfinite(weight) or weight == 0:
            problems.add(str(path), "weight", "a finite number that is not 0", weight,
                         "leave the adapter out, or give it a weight")  # fmt: skip
    problems.raise_if_any(AdapterError)
    parts = [(read_adapter(gene, expression), 1.0)]
    parts += [(read_adapter(path), weight) for path, weight in others]
    factors: dict[str, list[tuple[Any, Any]]] = {}
    for adapter, weight in parts:
        for module in adapter.modules:
            b = module.b.astype(np.float64) * (weight * formula.effective_scale(module))
            held = factors.setdefault(module.name, [])
            if held and (len(held[0][0]), held[0][1].shape[1]) != module.shape:
                expected = (len(held[0][0]), held[0][1].shape[1])
                problems.add(str(adapter.path), module.name, f"{expected}, as in {gene}",
                             module.shape, "these adapters are of different bases")  # fmt: skip
            held.append((b.astype(np.float32), module.a))
    problems.raise_if_any(AdapterError)
    tensors, ranks = {}, {}
    for name, held in factors.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = np.concatenate([a for _, a in held])
        tensors[f"{PREFIX}{name}.lora_B.weight"] = np.concatenate([b for b, _ in held], axis=1)
        ranks[name] = sum(len(a) for _, a in held)
    if not all(np.isfinite(values).all() for values in tensors.values()):
        raise AdapterError(
            Problem(str(out), "factors", "numbers that float32 can hold", "an overflow",
                    "check the weights")
        )  # fmt: skip
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True,
        "target_modules": list(ranks), "r": max(ranks.values()), "lora_alpha": max(ranks.values()),
        "rank_pattern": ranks, "alpha_pattern": ranks, "lora_dropout": 0.0, "bias": "none",
    }  # fmt: skip
    with publish_folder(out, force) as folder:
        save_tensors(tensors, folder / WEIGHTS_NAME)
        (folder / CONFIG_NAME).write_bytes(strictjson.dumps(config))
        read_adapter(folder)
    return read_adapter(out)
