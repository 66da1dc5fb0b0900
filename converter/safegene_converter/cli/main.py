"""The `safegene` command: parses, calls the library, prints. Nothing is decided here.

Exit codes: 0 done, or PASS; 1 FAIL; 2 could not be done or checked (one message says why); 3
INCONCLUSIVE; 4 VACUOUS; 5 an invalid record; 128 + n stopped by signal n. Nothing but 0 is green.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from safegene_converter.cli.failing import DEBUG, explain
from safegene_converter.cli.gene import add_commands as add_gene_commands
from safegene_converter.cli.options import (
    Bars,
    Parser,
    add_command,
    add_json,
    check_json,
    console,
    put_json,
)
from safegene_converter.cli.report_options import add_report_options, report_targets
from safegene_converter.cli.run import add_commands as add_run_commands
from safegene_converter.cli.server import add_server_options, verify_server
from safegene_converter.cli.stopping import Stopped, stoppable
from safegene_runtime import __version__
from safegene_runtime.cpus import spin_briefly
from safegene_runtime.gating.bounds import BOUNDS
from safegene_runtime.gating.profiles import PROFILES
from safegene_runtime.record.attacks import attack_list
from safegene_runtime.record.prompts import SUITES

__all__ = ["main", "parser"]

OK = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code."""
    debug = DEBUG in (sys.argv if argv is None else argv)
    try:
        with stoppable():
            return _run_command(argv)
    except (Exception, KeyboardInterrupt, Stopped) as error:
        return explain(error, debug)


def _run_command(argv: Sequence[str] | None) -> int:
    arguments = parser().parse_args(argv)
    spin_briefly()
    check_json(arguments)
    run: Callable[[argparse.Namespace], int] = arguments.run
    return run(arguments)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    whole = Parser(
        prog="safegene",
        description="Ship a SafeGene safety adapter inside a GGUF or ONNX model, and prove that it still "
        "refuses.",
        epilog="example:\n  safegene demo\n  safegene convert ADAPTER --base model.gguf -o OUT\n"
        "  safegene verify OUT --reference REFERENCE",
    )
    whole.add_argument("--version", action="version", version=f"safegene {__version__}")
    commands = whole.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for add in (
        _add_inspect,
        _add_convert,
        _add_record,
        _add_verify,
        _add_demo,
        add_gene_commands,
        add_run_commands,
    ):
        add(commands)
    return whole


def _add_attacks(parser: Any, what: str) -> None:
    parser.add_argument(
        "--attacks",
        metavar="NAMES",
        type=attack_list,
        default=[],
        help=f"{what}: all, or names with commas between them (docs/attacks.md)",
    )


# --- inspect ---------------------------------------------------------------------------------------


def _add_inspect(commands: Any) -> None:
    parser = add_command(
        commands,
        "inspect",
        _inspect,
        "show what is in an adapter or an artifact",
        "safegene inspect examples/smollm2-135m-safegene",
    )
    parser.add_argument("path", type=Path, metavar="ADAPTER|ARTIFACT")
    parser.add_argument("--expression", help="the set of layer coefficients to show")
    parser.add_argument("--base", type=Path, help="a base, to show the share of its parameters")
    _add_verbose(parser)
    add_json(parser)


def _inspect(arguments: argparse.Namespace) -> int:
    from safegene_converter.cli import inspecting

    found = inspecting.inspect(arguments.path, arguments.expression, arguments.base)
    if not put_json(arguments.json, found):
        inspecting.show(found, console(), arguments.verbose)
    return OK


def _add_verbose(parser: Any) -> None:
    parser.add_argument(
        "--verbose", action="store_true", help="show what survived in every touched tensor"
    )


# --- convert ---------------------------------------------------------------------------------------


def _add_convert(commands: Any) -> None:
    parser = add_command(
        commands,
        "convert",
        _convert,
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
        "--to", choices=["gguf", "onnx"], default="gguf", help="target format (default: gguf)"
    )
    parser.add_argument(
        "--as",
        dest="form",
        choices=["merged", "sidecar", "branch", "adapter"],
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
    _add_verbose(parser)
    add_json(parser)


def _convert(arguments: argparse.Namespace) -> int:
    from safegene_converter.fold.survival import Bounds

    _refuse_options_of_the_other_target(arguments)
    low, high = arguments.gain or (None, None)
    given = {
        "gain_min": low, "gain_max": high, "error_max": arguments.max_error,
        "base_error_ratio_max": arguments.max_base_error,
    }  # fmt: skip
    bounds = Bounds(**{name: value for name, value in given.items() if value is not None})
    if arguments.to == "onnx":
        from safegene_converter.onnx.convert import convert_onnx

        with Bars() as bars:
            manifest = convert_onnx(
                arguments.adapter,
                arguments.base,
                arguments.output,
                form=arguments.form,
                precision=arguments.precision,
                block_size=arguments.block_size,
                accuracy_level=arguments.accuracy_level,
                builder_options=arguments.builder_option,
                expression=arguments.expression,
                bounds=bounds,
                promote=arguments.promote is not False and arguments.type != "keep",
                check=not arguments.no_self_check,
                force=arguments.force,
                progress=bars,
            )
        return _show_converted(arguments, manifest)
    from safegene_converter.gguf.convert import convert

    with Bars() as bars:
        manifest = convert(
            arguments.adapter,
            arguments.base,
            arguments.output,
            form=arguments.form or "merged",
            type_name=arguments.type,
            expression=arguments.expression,
            bounds=bounds,
            promote=arguments.promote,
            imatrix=arguments.imatrix,
            llama_cpp=arguments.llama_cpp,
            check=not arguments.no_self_check,
            force=arguments.force,
            progress=bars,
        )
    return _show_converted(arguments, manifest)


def _show_converted(arguments: argparse.Namespace, manifest: Any) -> int:
    from safegene_converter.cli import inspecting

    if not put_json(arguments.json, json.loads(manifest.to_json())):
        found = inspecting.describe_manifest(manifest, arguments.output)
        inspecting.show(found, console(), arguments.verbose)
    return OK


def _refuse_options_of_the_other_target(arguments: argparse.Namespace) -> None:
    """An option that would be ignored is a mistake."""
    from safegene_runtime.errors import Problems, UnsupportedError

    problems = Problems()
    to = arguments.to
    forms = {"gguf": ("merged", "sidecar"), "onnx": ("merged", "branch", "adapter")}[to]
    if arguments.form not in (None, *forms):
        problems.add(
            "--as", f"form of --to {to}", " or ".join(forms), arguments.form, "choose one of these"
        )
    others = {
        "gguf": ("precision", "block_size", "accuracy_level", "builder_option"),
        "onnx": ("imatrix", "llama_cpp"),
    }[to]
    for name in others:
        if getattr(arguments, name):
            flag = "--" + name.replace("_", "-")
            problems.add(flag, "target", "the other one", f"--to {to}", f"leave {flag} out")
    if to == "onnx" and arguments.type not in ("auto", "keep"):
        problems.add(
            "--type", "type", "auto or keep for --to onnx", arguments.type,
            "the precision of an export is set with --precision",
        )  # fmt: skip
    if to == "onnx" and arguments.form in ("branch", "adapter"):
        for flag in _options_of_a_merge(arguments):
            problems.add(
                flag, "form", "merged: no weight of the base changes in the others", arguments.form,
                f"leave {flag} out",
            )  # fmt: skip
    problems.raise_if_any(UnsupportedError)


def _options_of_a_merge(arguments: argparse.Namespace) -> list[str]:
    """Those that were given and that a branch or an adapter file in ONNX would ignore."""
    from safegene_converter.bases.onnx_source import is_onnx_folder

    # a half-wide graph, which an ONNX folder may hold, rounds the factors, and that is gated
    rounds = arguments.precision in ("fp16", "bf16") or is_onnx_folder(arguments.base)
    given = {
        "--type": arguments.type == "keep",
        "--promote": arguments.promote is not None,
        "--gain": not rounds and arguments.gain is not None,
        "--max-error": not rounds and arguments.max_error is not None,
        "--max-base-error": arguments.max_base_error is not None,
    }
    return [flag for flag, is_given in given.items() if is_given]


# --- record ----------------------------------------------------------------------------------------


def _add_record(commands: Any) -> None:
    parser = add_command(
        commands,
        "record",
        _record,
        "record what PyTorch + PEFT answer, once",
        "safegene record examples/smollm2-135m-safegene --base smollm2.gguf -o REFERENCE",
    )
    parser.add_argument("adapter", type=Path, metavar="ADAPTER")
    parser.add_argument(
        "--base", type=Path, required=True, help="a Hugging Face folder or a GGUF file"
    )
    asked = parser.add_mutually_exclusive_group()
    asked.add_argument(
        "--suite",
        choices=SUITES,
        help="size of the built-in suite: smoke is a quick part of it, ci all (default: ci)",
    )
    asked.add_argument(
        "--prompts", type=Path, metavar="FILE", help="JSONL or CSV of your own, in its place"
    )
    parser.add_argument("--expression", help="a named set of layer coefficients of the adapter")
    _add_attacks(parser, "ask the harmful prompts under these jailbreaks, too")
    parser.add_argument(
        "--judge",
        metavar="JUDGE",
        help="rules+ngram (default), gguf:PATH, onnx:PATH, or the name of a plug-in",
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=24, help="length of replies (default: 24)"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="the folder to create")
    parser.add_argument("--force", action="store_true", help="replace an existing output")
    add_json(parser)


def _record(arguments: argparse.Namespace) -> int:
    from safegene_converter.cli import inspecting
    from safegene_converter.recording.recorder import record
    from safegene_runtime.judging.plugins import load_judge
    from safegene_runtime.record.prompts import builtin_suite, load_prompts

    prompts = (
        load_prompts(arguments.prompts)
        if arguments.prompts
        else builtin_suite(arguments.suite or "ci")
    )
    with Bars() as bars:
        reference = record(
            arguments.adapter,
            arguments.base,
            arguments.output,
            prompts=prompts,
            expression=arguments.expression,
            max_new_tokens=arguments.max_new_tokens,
            attacks=arguments.attacks,
            judge=load_judge(arguments.judge) if arguments.judge else None,
            force=arguments.force,
            progress=bars,
        )
    found = inspecting.summarise_reference(reference)
    if not put_json(arguments.json, found):
        inspecting.show(found, console())
    return OK


# --- verify ----------------------------------------------------------------------------------------


def _add_verify(commands: Any) -> None:
    parser = add_command(
        commands,
        "verify",
        _verify,
        "prove that an artifact refuses what the reference refused",
        "safegene verify OUT --reference REFERENCE --report REPORT",
    )
    parser.add_argument(
        "artifact", type=Path, metavar="OUT", nargs="*", help="several are shown side by side"
    )
    parser.add_argument("--reference", type=Path, required=True, help="made by `safegene record`")
    parser.add_argument("--base", type=Path, help="for a sidecar: the GGUF it belongs to")
    parser.add_argument(
        "--control",
        type=Path,
        metavar="GGUF",
        help="for a merged GGUF: its plain base, quantised the same way; below 8 bits the KL is then held "
        "against that base's own",
    )
    gate = parser.add_argument_group("the gate")
    gate.add_argument(
        "--profile",
        choices=list(PROFILES),
        default="smoke",
        help="how much must be shown: at 95 %% confidence fewer than "
        + ", ".join(f"{one.loss_margin * 100:g} %% ({name})" for name, one in PROFILES.items())
        + " of refusals lost (default: smoke); weights of 8 bits are allowed "
        f"{BOUNDS['8-bit'].losses * 100:g} %% and coarser ones {BOUNDS['4-bit'].losses * 100:g} %%, where "
        "that is wider",
    )
    gate.add_argument(
        "--sequential", action="store_true", help="stop as soon as the verdict is certain"
    )
    _add_attacks(gate, "gate under these recorded jailbreaks, too")
    gate.add_argument(
        "--mode",
        choices=["strict", "as-shipped"],
        default="strict",
        help="strict compares arithmetic; as-shipped runs llama.cpp with its F16 KV cache",
    )
    gate.add_argument(
        "--judge",
        metavar="JUDGE",
        help="rules+ngram (default), gguf:PATH, onnx:PATH, or the name of a plug-in",
    )
    parser.add_argument("--threads", type=int, help="CPU threads (default: all)")
    parser.add_argument(
        "--show-text", action="store_true", help="put replies into tables and reports"
    )
    parser.add_argument(
        "--no-write",
        action="store_true",
        help="do not put the verdict into the artifact's manifest",
    )
    add_server_options(parser)
    add_report_options(parser)


def _verify(arguments: argparse.Namespace) -> int:
    from safegene_converter.cli import compare_table, inspecting
    from safegene_runtime import reporting
    from safegene_runtime.artifact.manifest import read_manifest
    from safegene_runtime.gating.verdict import gravest
    from safegene_runtime.judging.plugins import load_judge
    from safegene_runtime.record.reference import read_reference
    from safegene_runtime.verifying.ladder import verify

    if arguments.server is not None:
        return verify_server(arguments)
    _check_verify(arguments)
    labels = _labels(arguments.artifact)
    targets = report_targets(arguments, labels)
    record = read_reference(arguments.reference)
    judge = load_judge(arguments.judge) if arguments.judge else None
    found = []
    # of several, only sidecars stand beside a base; of one, the ladder says what is wrong
    forms = [read_manifest(artifact).artifact["form"] for artifact in arguments.artifact]
    with Bars() as bars:
        for label, artifact, form in zip(labels, arguments.artifact, forms, strict=True):
            beside = len(labels) == 1 or form == "sidecar"
            report = verify(
                artifact,
                record,
                base=arguments.base if beside else None,
                control=arguments.control,
                profile=arguments.profile,
                sequential=arguments.sequential,
                attacks=arguments.attacks,
                mode=arguments.mode,
                judge=judge,
                threads=arguments.threads,
                write=not arguments.no_write,
                progress=bars if len(labels) == 1 else bars.named(label),
            )
            found.append((label, report))
    data = [report.to_dict(texts=arguments.show_text) for _, report in found]
    for label, one in zip(labels, data, strict=True):
        for target in targets[label]:
            reporting.write_reports(one, target)
    comparison = compare_table.compare(record, found) if len(found) > 1 else None
    shown = data[0] if comparison is None else {"comparison": comparison, "reports": data}
    if not put_json(arguments.json, shown):
        for label, report in found:
            if comparison is not None:
                console().rule(escape(label))
            inspecting.show_report(report, console(), arguments.show_text)
        if comparison is not None:
            compare_table.show_comparison(comparison, console())
    return gravest(report.verdict for _, report in found).exit_code


def _check_verify(arguments: argparse.Namespace) -> None:
    """There is something to verify, once, and nothing that only a server understands."""
    from safegene_runtime.errors import EngineError, Problems

    problems = Problems()
    if not arguments.artifact:
        problems.add("verify", "OUT", "an artifact, or --server URL", "neither", "name a folder")
    places = [artifact.resolve() for artifact in arguments.artifact]
    for place in dict.fromkeys(one for one in places if places.count(one) > 1):
        problems.add("verify", str(place), "each artifact once", "it twice", "name it once")
    if arguments.control is not None and len(places) > 1:
        problems.add(
            "--control", "OUT", "one artifact: a control is the base of that one", f"{len(places)}",
            "verify each with its own control",
        )  # fmt: skip
    for name in ("model", "allow_switchable"):
        if getattr(arguments, name):
            flag = "--" + name.replace("_", "-")
            problems.add(flag, "target", "--server URL", "an artifact", f"leave {flag} out")
    problems.raise_if_any(EngineError)


def _labels(artifacts: Sequence[Path]) -> list[str]:
    """What each artifact is called in tables; the whole path where the names are not unique."""
    names = [artifact.resolve().name for artifact in artifacts]
    return names if len(set(names)) == len(names) else [str(artifact) for artifact in artifacts]


# --- demo ------------------------------------------------------------------------------------------


def _add_demo(commands: Any) -> None:
    parser = add_command(
        commands, "demo", _demo, "the main job on a real model, in one go", "safegene demo"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("demo"),
        help="where artifacts and reference go; replaced (default: demo)",
    )
    parser.add_argument(
        "--adapter",
        type=Path,
        help="an adapter for SmolLM2-135M-Instruct (default: the one in examples/)",
    )
    add_json(parser)


def _demo(arguments: argparse.Namespace) -> int:
    from safegene_converter.cli import demo

    with Bars() as bars:
        found = demo.run(arguments.output, arguments.adapter, bars)
    if not put_json(arguments.json, found):
        demo.show(found, console())
    # a demonstration is done when every verdict is in, whatever it says; `verify` is the gate
    return OK


if __name__ == "__main__":
    sys.exit(main())
