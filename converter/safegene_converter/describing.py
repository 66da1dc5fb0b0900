"""What is in an adapter, an artifact or a reference, as plain data in JSON's types."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safegene_converter import formula
from safegene_converter.inputs.adapter import Adapter, read_adapter
from safegene_converter.inputs.adapter_files import CONFIG_NAME, would_do
from safegene_converter.inputs.base import open_base
from safegene_runtime.artifact.manifest import Manifest, check_files, read_manifest
from safegene_runtime.artifact.recomputed import check_verification
from safegene_runtime.errors import AdapterError, Problem, Problems
from safegene_runtime.formats.files import MANIFEST_NAME

if TYPE_CHECKING:  # what neither `inspect` nor `convert` needs
    from safegene_runtime.record.reference import Reference

__all__ = [
    "describe_manifest",
    "inspect",
    "inspect_artifact",
    "summarise_reference",
    "survival_summary",
]


def inspect(path: Path, expression: str | None = None, base: Path | None = None) -> dict[str, Any]:
    """Describes an adapter folder or an artifact folder, whichever `path` is.

    Raises:
        SafeGeneError: it is neither, or it is broken.
    """
    if (path / MANIFEST_NAME).exists():
        problems = Problems()
        for option, value in (("--expression", expression), ("--base", base)):
            if value is not None:
                fix = f"an artifact has one expression and one base: leave {option} out"
                problems.add(str(path), option, "an adapter", "an artifact", fix)
        problems.raise_if_any(AdapterError)
        return inspect_artifact(path)
    if not (path / CONFIG_NAME).exists():
        raise AdapterError(
            Problem(
                str(path),
                "path",
                f"an adapter folder (adapter_config.json) or an artifact ({MANIFEST_NAME})",
                "neither" if path.exists() else "nothing there",
                would_do(path) or "check the path",
            )
        )
    return _describe_adapter(read_adapter(path, expression), base)


def _describe_adapter(adapter: Adapter, base: Path | None) -> dict[str, Any]:
    layers: dict[Any, dict[str, Any]] = {}
    for module in adapter.modules:
        layer = layers.setdefault(
            module.layer,
            {
                "layer": module.layer,
                "coefficient": module.coefficient,
                "modules": [],
                "ranks": [],
                "effective_scales": [],
                "n_parameters": 0,
            },
        )
        layer["modules"].append(module.name.rsplit(".", 1)[-1])
        layer["ranks"].append(module.rank)
        layer["effective_scales"].append(formula.effective_scale(module))
        layer["n_parameters"] += module.a.size + module.b.size
    n_base = open_base(base).n_parameters if base else None
    return {
        "what": "adapter",
        "path": str(adapter.path),
        "expression": adapter.expression,
        "expressions": list(adapter.expressions),
        "n_modules": len(adapter.modules),
        "n_parameters": adapter.n_parameters,
        "share_of_base": adapter.n_parameters / n_base if n_base else None,
        "layers": list(layers.values()),
        "files": dict(adapter.digests),
        "cautions": list(adapter.cautions),
    }


def inspect_artifact(path: Path) -> dict[str, Any]:
    """Describes an artifact, after checking its files and its verdict against its manifest."""
    manifest = read_manifest(path)
    where = f"{path / MANIFEST_NAME}: verification"
    check_verification(manifest.verification, manifest.artifact["precision"], where)
    check_files(manifest, path)
    return describe_manifest(manifest, path)


def describe_manifest(manifest: Manifest, path: Path) -> dict[str, Any]:
    """Describes the artifact at `path` from its manifest alone, for one that was just made."""
    return {
        "what": "artifact",
        "path": str(path),
        "artifact": manifest.artifact,
        "base": manifest.base,
        "adapter": manifest.adapter,
        "files": [
            {"path": f.path, "size_bytes": f.size_bytes, "sha256": f.sha256} for f in manifest.files
        ],
        "promoted": manifest.settings.get("promoted"),
        "caution": manifest.settings.get("caution"),
        "survival": survival_summary(manifest),
        "modules": [
            {
                "module": m.module,
                "type_before": m.type_before,
                "type_after": m.type_after,
                "effective_scale": m.effective_scale,
                "survival": m.survival,
            }
            for m in manifest.modules
        ],
        "verification": manifest.verification,
    }


def survival_summary(manifest: Manifest) -> dict[str, Any] | None:
    """Gain over all touched tensors, what was promoted, and what that cost in bytes."""
    gains = [module.survival["gain"] for module in manifest.modules if module.survival]
    if not gains:
        return None
    promoted = [
        module for module in manifest.modules if module.type_before not in (None, module.type_after)
    ]
    return {
        "gain_mean": statistics.fmean(gains),
        "gain_min": min(gains),
        "gain_max": max(gains),
        "relative_error_mean": statistics.fmean(
            module.survival["relative_error"] for module in manifest.modules if module.survival
        ),
        "changed_type": len(promoted),
        "bytes_added": sum(module.bytes_after - module.bytes_before for module in promoted),
    }


def summarise_reference(reference: Reference) -> dict[str, Any]:
    """Refusal rates of both arms of a reference."""
    rates: dict[str, Any] = {}
    for kind in ("harmful", "benign"):
        prompts = [prompt for prompt in reference.prompts if prompt.kind == kind]
        rates[kind] = {
            "prompts": len(prompts),
            "base_refused": sum(prompt.base_label == "refuse" for prompt in prompts),
            "reference_refused": sum(prompt.ref_label == "refuse" for prompt in prompts),
        }
    return {"what": "reference", "path": str(reference.path), "sha256": reference.digest, **rates}
