"""`safegene convert`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import safegene
from safegene_converter.cli.options import (
    Bars,
    add_command,
    add_json,
    add_stack,
    add_verbose,
    console,
    put_json,
)
from safegene_runtime.artifact.forms import GGUF, TARGETS, names_of_forms

__all__ = ["add"]


def add(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands,
        "convert",
        _run,
        "fold an adapter into a model file",
        "safegene convert examples/smollm2-135m-safegene --base smollm2.gguf "
        "--to gguf --as merged -o OUT",
    )
    parser.add_argument("adapter", type=Path, metavar="ADAPTER")
    parser.add_argument(
        "--base",
        type=Path,
        required=True,
        help="a GGUF file (or its first shard), a Hugging Face folder, or an ONNX folder",
    )
    parser.add_argument(
        "--to",
        choices=[target.name for target in TARGETS],
        default=GGUF.name,
        help=f"target format (default: {GGUF.name})",
    )
    parser.add_argument(
        "--as",
        dest="form",
        choices=names_of_forms(),
        help="merged: in the weights; sidecar (gguf): beside the base; branch (onnx): constants in "
        "the graph; adapter (onnx): an .onnx_adapter that the caller may leave out "
        "(default: merged; branch for int4 and int8 onnx)",
    )
    parser.add_argument(
        "--type",
        default="auto",
        metavar="TYPE",
        help="auto (keep types, promote what would lose the delta), keep (refuse "
        "instead), f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, ... (default: auto)",
    )
    parser.add_argument("--expression", help="a named set of layer coefficients of the adapter")
    add_stack(parser, "ADAPTER")
    parser.add_argument("--imatrix", type=Path, help="importance matrix, for types that need one")
    parser.add_argument(
        "--llama-cpp",
        type=Path,
        metavar="DIR",
        help="a llama.cpp source tree, for a Hugging Face base",
    )
    export = parser.add_argument_group("exporting a Hugging Face folder to ONNX")
    export.add_argument(
        "--precision",
        choices=["fp32", "fp16", "bf16", "int8", "int4"],
        help="of the exported weights (default: fp32)",
    )
    export.add_argument("--block-size", type=int, help="of int4 and int8 weights: 16 to 256")
    export.add_argument(
        "--accuracy-level", type=int, help="of int4 and int8 activations: 1 (fp32) to 4 (int8)"
    )
    export.add_argument(
        "--builder-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a further option of the onnxruntime-genai builder; may be given again",
    )
    gate = parser.add_argument_group("what counts as surviving")
    gate.add_argument(
        "--gain",
        type=float,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="share of the delta that is kept (default: 0.95 1.05)",
    )
    gate.add_argument("--max-error", type=float, help="error relative to the delta (default: 0.5)")
    gate.add_argument(
        "--max-base-error",
        type=float,
        help="from float: error relative to the base's own rounding (default: 1.1)",
    )
    parser.add_argument(
        "--no-self-check",
        action="store_true",
        help="do not run the result in a child process before it is published",
    )
    gate.add_argument(
        "--promote",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="give tensors out of bounds a wider type (default: for auto and presets "
        "made from float)",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder to create")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    add_verbose(parser)
    add_json(parser)


def _run(arguments: argparse.Namespace) -> int:
    from safegene_converter.cli.tables import show
    from safegene_converter.describing import describe_manifest

    low, high = arguments.gain or (None, None)
    given = {
        "gain_min": low, "gain_max": high, "error_max": arguments.max_error,
        "base_error_ratio_max": arguments.max_base_error,
    }  # fmt: skip
    bounds = {name: value for name, value in given.items() if value is not None}
    with Bars() as bars:
        manifest = safegene.convert(
            arguments.adapter,
            arguments.base,
            arguments.output,
            to=arguments.to,
            form=arguments.form,
            type=arguments.type,
            expression=arguments.expression,
            bounds=safegene.Bounds(**bounds) if bounds else None,
            promote=arguments.promote,
            imatrix=arguments.imatrix,
            llama_cpp=arguments.llama_cpp,
            precision=arguments.precision,
            block_size=arguments.block_size,
            accuracy_level=arguments.accuracy_level,
            builder_options=arguments.builder_option,
            check=not arguments.no_self_check,
            force=arguments.force,
            stack=arguments.stack,
            progress=bars,
        )
    if not put_json(arguments.json, json.loads(manifest.to_json())):
        show(describe_manifest(manifest, arguments.output), console(), arguments.verbose)
    return 0
