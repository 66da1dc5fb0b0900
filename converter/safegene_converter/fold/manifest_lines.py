"""What a manifest says of one module, whatever it was converted to."""

from __future__ import annotations

from safegene_converter import formula
from safegene_converter.fold.survival import Survival
from safegene_converter.inputs.adapter import Module
from safegene_runtime.artifact.manifest import ModuleEntry

__all__ = ["module_entry"]


def module_entry(
    module: Module,
    tensor: str,
    before: str | None,
    after: str,
    bytes_before: int,
    bytes_after: int,
    sha256: str,
    survival: Survival | None,
) -> ModuleEntry:
    """The manifest's line about one module."""
    return ModuleEntry(
        module=module.name,
        tensor=tensor,
        shape=module.shape,
        rank=module.rank,
        scaling=module.scaling,
        coefficient=module.coefficient,
        effective_scale=formula.effective_scale(module),
        type_before=before,
        type_after=after,
        bytes_before=bytes_before,
        bytes_after=bytes_after,
        sha256=sha256,
        survival=None if survival is None else survival.to_dict(),
    )
