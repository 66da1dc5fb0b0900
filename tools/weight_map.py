"""Where the linear weights of a Hugging Face model are in its GGUF, read off the weights themselves.

llama.cpp's converter writes a touched weight into some tensor, its rows moved at most. A weight is looked for
in every tensor of its shape, in every order that has a name (`Transform`), number by number; so what is found
is proved by the same act. What fits in two places, because rows or tensors are equal, is no answer.

    >>> read_map({"model.layers.0.mlp.up_proj.weight": read}, {"blk.0.ffn_up.weight": read_too}, 4, 2)
    {'model.layers.0.mlp.up_proj': Placement(tensor='blk.0.ffn_up.weight', order=..., transposed=False)}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from safegene_runtime.architecture.row_order import Transform

__all__ = ["Placement", "Weight", "placements", "read_map"]

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Weight:
    """A stored weight.

    Attributes:
        shape: as it is stored.
        read: its numbers.
    """

    shape: tuple[int, ...]
    read: Callable[[], F32]


@dataclass(frozen=True)
class Placement:
    """Where a module's weight is.

    Attributes:
        tensor: the GGUF tensor.
        order: how its rows were moved.
        transposed: whether Hugging Face stores it as (in, out).
    """

    tensor: str
    order: Transform
    transposed: bool


def read_map(
    weights: Mapping[str, Weight], tensors: Mapping[str, Weight], n_head: int, n_head_kv: int
) -> dict[str, tuple[Placement, ...]]:
    """Every place in which each weight is found: one is an answer, none or several are not.

    Args:
        weights: of the Hugging Face folder, by name of the module.
        tensors: of its GGUF in a float type that holds them without loss.
        n_head: query heads of a layer.
        n_head_kv: key and value heads of a layer.
    """
    found: dict[str, tuple[Placement, ...]] = {}
    for module, weight in weights.items():
        values = weight.read()
        found[module] = tuple(
            place
            for name, tensor in tensors.items()
            if sorted(tensor.shape) == sorted(weight.shape)
            for place in placements(values, name, tensor.read(), n_head, n_head_kv)
        )
    return found


def placements(
    weight: F32, name: str, tensor: F32, n_head: int, n_head_kv: int
) -> tuple[Placement, ...]:
    """The ways in which a tensor is a weight, each with another effect on a delta."""
    orders = [
        Transform(),
        *(Transform("permute", heads) for heads in dict.fromkeys((n_head, n_head_kv))),
        Transform("regroup", n_head, n_head_kv),
    ]
    fitting: dict[tuple[bool, bytes], Placement] = {}
    for transposed in (False, True):
        values = weight.T if transposed else weight
        if values.shape != tensor.shape or not np.array_equal(values[0], tensor[0]):
            continue  # every order leaves the first row where it is
        for order in orders:
            try:
                rows = order.rows(len(values))
            except ValueError:
                continue
            if np.array_equal(values[rows], tensor):
                fitting.setdefault((transposed, rows.tobytes()), Placement(name, order, transposed))
    return tuple(fitting.values())
