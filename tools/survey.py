"""Reads the rows of surveyed.json off the weights of tiny models that llama.cpp's converter converted.

    python tools/survey.py            # writes runtime/safegene_runtime/architecture/surveyed.json
    python tools/survey.py --check    # exit 1 if it is not what the models say

Tiny models are those of tests/tiny_architectures.py (SURVEYED). Each linear module of a block is looked for
in the GGUF, number by number (weight_map.py); a module that is not one whole tensor,
with its rows moved in a way that has a name, is left out of the row and named on stderr. Then PyTorch and
llama.cpp answer with each plain model: where they are farther apart than float32 explains, the row says how
far.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / part) for part in ("tools", "tests", "converter", "runtime")]

import numpy as np  # noqa: E402
import tiny  # noqa: E402
from safetensors import safe_open  # noqa: E402
from tiny_architectures import SURVEYED  # noqa: E402
from weight_map import Weight, read_map  # noqa: E402

from safegene_runtime.architecture import table  # noqa: E402
from safegene_runtime.formats.gguf.model import open_model  # noqa: E402
from safegene_runtime.formats.gguf.tensors import read_tensor_bytes  # noqa: E402
from safegene_runtime.formats.gguf.weights import head_counts  # noqa: E402
from safegene_runtime.gating.bounds import BOUNDS  # noqa: E402

OUT = ROOT / "runtime" / "safegene_runtime" / "architecture" / "surveyed.json"
LISTED = {row.name for row in table.TABLE.values() if any(kind.listed for kind in row.classes)}
MODULE = re.compile(r"(?P<blocks>.+?)\.(?P<layer>\d+)\.(?P<part>.+)")


def linear_modules(folder: Path) -> list[str]:
    """What PEFT can put a LoRA on in the blocks: names of Linear and Conv1D modules."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    kinds = (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, kinds) and MODULE.fullmatch(name)
    ]


def survey(family: str) -> tuple[str, dict[str, Any], list[str]]:
    """(llama.cpp's name of the architecture, its row, modules that are no whole tensor) of a family."""
    folder = tiny.whole_hf_model(family)
    model = open_model(tiny.whole_gguf_model(family))
    with safe_open(folder / "model.safetensors", "np") as file:
        stored = {
            name: file.get_tensor(f"{name}.weight").astype(np.float32)
            for name in linear_modules(folder)
        }
    weights = {name: Weight(one.shape, lambda one=one: one) for name, one in stored.items()}
    tensors = {
        name: Weight(
            info.shape,
            lambda info=info: np.frombuffer(read_tensor_bytes(info), "<f4").reshape(info.shape),
        )
        for name, info in model.tensors.items()
        if name.startswith("blk.") and len(info.shape) == 2
    }
    n_head, n_head_kv = head_counts(model)
    found = read_map(weights, tensors, n_head, n_head_kv)
    row: dict[str, Any] = {"tensors": {}, "orders": {}}
    layers: dict[str, set[int]] = {}
    left = []
    transposed = set()
    for module, places in found.items():
        match = MODULE.fullmatch(module)
        assert match
        part, layer = match["part"], int(match["layer"])
        row["blocks"] = match["blocks"]
        prefix = f"blk.{layer}."
        if len(places) != 1 or not places[0].tensor.startswith(prefix):
            left.append(module)
            continue
        (place,) = places
        tensor = place.tensor.removeprefix(prefix)
        if row["tensors"].setdefault(part, tensor) != tensor:
            raise SystemExit(f"{family}: {part} is {tensor} and {row['tensors'][part]}")
        layers.setdefault(part, set()).add(layer)
        transposed.add(place.transposed)
        if not place.order.is_identity:
            row["orders"][part] = place.order.kind
            heads = {"n_head": n_head, "n_head_kv": n_head_kv}
            meant = n_head if place.order.kind == "regroup" else heads[table.GROUPED_HEADS[part]]
            assert place.order.n_heads == meant, (family, part, place)
    (row["transposed"],) = transposed
    row["partial"] = len(set(map(frozenset, layers.values()))) > 1
    config = json.loads((folder / "config.json").read_text())
    row["classes"] = {config["architectures"][0]: config["model_type"]}
    return str(model.get("general.architecture")), row, left


def surveyed() -> dict[str, dict[str, Any]]:
    """Every row, by llama.cpp's name of the architecture."""
    rows: dict[str, dict[str, Any]] = {}
    for family in SURVEYED:
        name, row, left = survey(family)
        if left:
            print(f"{family}: no whole tensor is {', '.join(left)}", file=sys.stderr)
        if name in LISTED:
            listed = table.TABLE[name]
            if not (
                row["tensors"].items() <= listed.tensors.items()
                and row["orders"].items() <= listed.orders.items()
                and row["classes"].keys() <= {kind.name for kind in listed.classes}
            ):
                raise SystemExit(f"{family}: the listed row of {name} says something else")
            continue
        known = rows.setdefault(name, row)
        known["classes"] |= row["classes"]
        rest = [{**one, "classes": None, "orders": None} for one in (known, row)]
        if rest[0] != rest[1]:
            raise SystemExit(f"{family}: another row of {name} has other tensors")
        known["orders"] |= row["orders"]
    return {name: _short(row) for name, row in sorted(rows.items())}


def measured(family: str) -> float:
    """Mean KL of llama.cpp to PyTorch on the worst of a few prompts: the plain model, in F32."""
    from safegene_converter.bases.proof import Reach, gguf_side, prove_base, torch_side
    from safegene_runtime.progress import silent

    side, _ = gguf_side(open_model(tiny.gguf_model(family)))
    proof = prove_base(
        torch_side(tiny.hf_model(family)), side, precision="bf16", reach=Reach(40, "40 tokens"),
        where=family, tell=silent,
    )  # fmt: skip
    return proof.kl_worst


def add_arithmetic(rows: dict[str, dict[str, Any]]) -> None:
    """Says of each row how finely llama.cpp computes it: its GELU is a table in half precision."""
    for family in SURVEYED:
        name = str(open_model(tiny.gguf_model(family)).get("general.architecture"))
        kl = measured(family)
        print(f"{family} ({name}): KL {kl:.1e}", file=sys.stderr)
        as_fine = next(kind for kind in BOUNDS if kl <= BOUNDS[kind].kl_ceiling)
        if name not in LISTED and as_fine != "f32":
            rows[name]["arithmetic"] = as_fine


def _short(row: dict[str, Any]) -> dict[str, Any]:
    """Without what a row is by default."""
    order = ("classes", "blocks", "tensors", "orders", "transposed", "partial")
    return {
        key: row[key] for key in order if row[key] and (key, row[key]) != ("blocks", "model.layers")
    }


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    options = parser.parse_args()
    rows = surveyed()
    if not options.check:  # who answers with the models reads it
        OUT.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    add_arithmetic(rows)
    text = json.dumps(rows, indent=1) + "\n"
    if options.check:
        return int(text != OUT.read_text(encoding="utf-8"))
    OUT.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
