"""Folding an adapter into ONNX: merged weights, a branch in the graph, or an adapter file.

    merged   W' = W + dW in the stored weights; the graph is the base's
    branch   y = W x + B (A x) with A and B constant in the graph: exact around any quantised base,
             and no caller can switch it off
    adapter  the same graph, but A and B are inputs with empty defaults (rank 0: the plain base),
             and an .onnx_adapter file holds their values; the caller decides whether to load it

The base is an ONNX folder, or a Hugging Face folder that the onnxruntime-genai builder exports. All
scaling is in B. Packed projections (q, k and v in one weight) get one pair of factors, A stacked and
B block-diagonal, so that they cost two small products and not six.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from safegene_converter import formula, names, onnx_weights
from safegene_converter.adapter import Adapter, Module, check_base_fits, read_adapter
from safegene_converter.base import Base, open_base
from safegene_converter.hashing import digesting
from safegene_converter.onnx_build import build_onnx, check_build_options
from safegene_converter.onnx_graph import (
    Linear,
    Place,
    find_linears,
    module_shapes,
    place_modules,
)
from safegene_converter.onnx_selfcheck import check_onnx
from safegene_converter.onnx_weights import Encoded, Kind
from safegene_converter.onnx_writer import Change, load_proto, write_onnx
from safegene_converter.progress import Progress
from safegene_converter.survival import Bounds, Meter, Mode, Survival, passes
from safegene_runtime import __version__, strictjson
from safegene_runtime.errors import (
    BaseModelError,
    OutputError,
    Problem,
    Problems,
    SurvivalError,
    UnsupportedError,
)
from safegene_runtime.files import (
    MANIFEST_NAME,
    check_output_free,
    publish_folder,
    sha256_file,
    sha256_of,
)
from safegene_runtime.manifest import FileEntry, Manifest, ModuleEntry
from safegene_runtime.onnx_checks import precision_class
from safegene_runtime.onnx_file import DataType, OnnxFile, read_onnx
from safegene_runtime.ort_engine import read_text_files

__all__ = ["FORMS", "OnnxBase", "convert_onnx", "open_onnx_base"]

Form = Literal["merged", "branch", "adapter"]
FORMS: tuple[Form, ...] = ("merged", "branch", "adapter")
ADAPTER_FILE = "adapter.onnx_adapter"
ADAPTER_VERSION = 1
COMPANIONS = (".json", ".jinja", ".model", ".txt")
"""Suffixes of the small files beside a model that runtimes read: configuration, tokenizer, template."""
WEIGHT_ERROR_MAX = 0.5
"""The right weight leaves the rounding of its type (0.1 for 4 bits), a wrong one about 1.4."""
METADATA_PREFIX = "safegene."

Rows = npt.NDArray[np.float32]


@dataclass(frozen=True)
class OnnxBase:
    """An ONNX decoder whose projections were found.

    Attributes:
        folder: where it is.
        model: its graph.
        architecture: GGUF's name for it, one of `names.ARCHITECTURES`.
        n_layers: number of blocks.
        name: what it is called.
        shapes: (out, in) of every linear module of its blocks.
        places: where each of them lies.
        companions: configuration, tokenizer and template files, in name order.
    """

    folder: Path
    model: OnnxFile
    architecture: str
    n_layers: int
    name: str
    shapes: Mapping[str, tuple[int, int]] = field(repr=False)
    places: Mapping[str, Sequence[Place]] = field(repr=False)
    companions: tuple[Path, ...] = ()

    def digests(self, progress: Any = None) -> dict[str, str]:
        """SHA-256 of every file it consists of, by name."""
        files = sorted({*self.model.files, *self.companions})
        return {file.name: sha256_file(file.resolve(), progress) for file in files}


@dataclass(frozen=True)
class _Touched:
    """One weight that is to change, and the modules inside it, top to bottom."""

    linear: Linear
    parts: tuple[tuple[Module, Place], ...]

    def delta(self) -> Rows:
        """DW of the whole weight, (out, in) float32; zero in rows of other modules."""
        delta = np.zeros(self.linear.shape, np.float32)
        for module, place in self.parts:
            start, stop = place.rows
            delta[start:stop] = formula.scaled_b(module) @ module.a
        return delta

    def factors(self) -> tuple[Rows, Rows]:
        """(A stacked (R, in), scaled B block-diagonal (out, R)), R the sum of the ranks."""
        a = np.concatenate([module.a for module, _ in self.parts])
        b = np.zeros((self.linear.shape[0], len(a)), np.float32)
        column = 0
        for module, place in self.parts:
            b[slice(*place.rows), column : column + module.rank] = formula.scaled_b(module)
            column += module.rank
        return a, b

    @property
    def rows(self) -> list[tuple[int, int]]:
        """The rows that change."""
        return [place.rows for _, place in self.parts]


def open_onnx_base(folder: Path) -> OnnxBase:
    """Reads the graph of an ONNX folder and finds its projections.

    Raises:
        BaseModelError: no decoder, several, or one whose projections cannot be told apart.
        UnsupportedError: an architecture we know by name and refuse.
        FormatError: bytes that break ONNX or JSON.
    """
    path = _model_file(folder)
    config = _json(folder / "config.json")
    genai = _json(folder / "genai_config.json").get("model", {})
    genai = genai if isinstance(genai, dict) else {}
    decoder = genai.get("decoder", {})
    decoder = decoder if isinstance(decoder, dict) else {}
    model = read_onnx(path)
    # the builder calls the architecture by its model type, as config.json does
    kind = genai.get("type") or config.get("model_type")
    architecture = names.check_architecture(
        {"mistral": "llama", "smollm": "llama"}.get(str(kind), kind), str(folder)
    )
    sizes = _part_sizes(decoder, config)
    linears = find_linears(model, _node_metadata(model))
    if not linears:
        raise BaseModelError(
            Problem(
                str(path),
                "projections",
                "nodes named layers.N and q_proj, k_proj, ...",
                "none",
                "is this a decoder? encoders and fused exports are not supported",
            )
        )
    shapes, places = module_shapes(linears, sizes, str(path))
    stated = decoder.get("num_hidden_layers") or config.get("num_hidden_layers")
    n_layers = 1 + max(linear.layer for linear in linears)
    if stated is not None and stated != n_layers:
        raise BaseModelError(
            Problem(str(path), "layers", f"{stated}, as the configuration says", str(n_layers))
        )
    given = config.get("_name_or_path")
    return OnnxBase(
        folder=folder,
        model=model,
        architecture=architecture,
        n_layers=n_layers,
        name=given if isinstance(given, str) and given else folder.resolve().name,
        shapes=shapes,
        places=places,
        companions=tuple(
            sorted(
                file
                for file in folder.iterdir()
                if file.suffix in COMPANIONS and file.is_file() and file.name != MANIFEST_NAME
            )
        ),
    )


def convert_onnx(
    adapter_path: Path,
    base_path: Path,
    out: Path,
    *,
    form: Form | None = None,
    precision: str | None = None,
    block_size: int | None = None,
    accuracy_level: int | None = None,
    builder_options: Sequence[str] = (),
    expression: str | None = None,
    bounds: Bounds | None = None,
    promote: bool = True,
    force: bool = False,
    check: bool = True,
    progress: Progress | None = None,
) -> Manifest:
    """Converts an adapter to an ONNX artifact.

    Args:
        adapter_path: the adapter folder.
        base_path: an ONNX folder, or a Hugging Face folder to export first.
        out: the folder to create.
        form: `merged`, `branch` or `adapter`; None: `branch` beside int4 and int8 weights, else
            `merged`.
        precision: what to export a Hugging Face folder as; fp32 when None.
        block_size: of int4 and int8 weights, for the export.
        accuracy_level: of int4 and int8 activations, for the export.
        builder_options: KEY=VALUE options for the export.
        expression: which set of layer coefficients; the adapter's default when None.
        bounds: what counts as surviving a merge.
        promote: give weights out of bounds a wider type instead of refusing.
        force: replace an existing `out`.
        check: re-open the result in a child process and compare it with what was meant.
        progress: told what is being done.

    Raises:
        SafeGeneError: one of its kinds; nothing is left under the name `out`.
    """
    tell: Progress = progress or (lambda stage, done, total: None)
    check_output_free(out, force)
    adapter = read_adapter(adapter_path, expression)
    hf = None
    if (base_path / "config.json").is_file() and any(base_path.glob("*.safetensors")):
        check_build_options(precision or "fp32", block_size, accuracy_level, builder_options)
        hf = open_base(base_path)
        check_base_fits(adapter, hf.module_shapes(), hf.architecture, hf.n_layers)
    elif not base_path.is_dir():
        raise BaseModelError(
            Problem(
                str(base_path),
                "base",
                "an ONNX folder or a Hugging Face folder",
                "a file" if base_path.exists() else "nothing there",
                "a GGUF cannot become ONNX: pass the model it was made from",
            )
        )
    elif precision or block_size or accuracy_level or builder_options:
        raise UnsupportedError(
            Problem(
                "--precision",
                "base",
                "a Hugging Face folder to export",
                "an ONNX folder, which has its precision",
                "leave --precision, --block-size, --accuracy-level and --builder-option out",
            )
        )
    if hf is None:
        opened = open_onnx_base(base_path)
        check_base_fits(adapter, opened.shapes, opened.architecture, opened.n_layers)
    with publish_folder(out, force) as folder, digesting(hf or opened) as digests:
        work = folder / ".work"
        work.mkdir()
        settings: dict[str, Any] = {"form": form or "auto"}
        if hf is not None:
            opened = _export(
                hf, work / "base", precision or "fp32", block_size, accuracy_level,
                builder_options, tell,
            )  # fmt: skip
            check_base_fits(adapter, opened.shapes, opened.architecture, opened.n_layers)
            settings["export"] = {
                "precision": precision or "fp32",
                "block_size": block_size,
                "accuracy_level": accuracy_level,
                "options": list(builder_options),
            }
        touched = _touched(adapter, opened)
        if hf is not None:
            settings["weight_error"] = _prove_weights(touched, opened, hf)
        chosen = form or _default_form(opened, touched)
        job = _Job(adapter, opened, hf, chosen, touched, bounds or Bounds(), promote)
        if chosen == "merged":
            settings["bounds"], settings["promote"] = vars(job.bounds), promote
        files, modules, precision_class = _write(job, folder, tell)
        if check:
            tell("checking what was written", 0, 1)
            settings["self_check"] = _check(job, folder, work)
            tell("checking what was written", 1, 1)
        text = read_text_files(opened.folder)
        manifest = Manifest(
            tool={"name": "safegene", "version": __version__},
            artifact={
                "target": "onnx",
                "form": chosen,
                "architecture": opened.architecture,
                "name": hf.name if hf else opened.name,
                "precision": precision_class,
            },
            base={
                "kind": "hf" if hf else "onnx",
                "name": base_path.resolve().name,
                "files": digests.result(),
            },
            adapter={
                "name": adapter_path.resolve().name,
                "files": dict(adapter.digests),
                "expression": adapter.expression,
                "n_parameters": adapter.n_parameters,
            },
            tokenizer={
                "chat_template_sha256": sha256_of(text.template.encode("utf-8"))
                if text.template is not None
                else None
            },
            settings=settings,
            files=tuple(files),
            modules=tuple(modules),
        )
        shutil.rmtree(work)
        (folder / MANIFEST_NAME).write_bytes(manifest.to_json())
    return manifest


@dataclass(frozen=True)
class _Job:
    """A checked request."""

    adapter: Adapter
    base: OnnxBase
    hf: Base | None
    form: Form
    touched: tuple[_Touched, ...]
    bounds: Bounds
    promote: bool


# --- the base --------------------------------------------------------------------------------------


def _model_file(folder: Path) -> Path:
    """The decoder's graph: what genai_config.json names, or the only .onnx there is."""
    if not folder.is_dir():
        raise BaseModelError(
            Problem(str(folder), "base", "an ONNX folder", "nothing there", "check --base")
        )
    model = _json(folder / "genai_config.json").get("model", {})
    decoder = model.get("decoder", {}) if isinstance(model, dict) else {}
    named = decoder.get("filename") if isinstance(decoder, dict) else None
    found = sorted(folder.glob("*.onnx"))
    if isinstance(named, str):
        if Path(named).name != named or not (folder / named).is_file():
            raise BaseModelError(
                Problem(
                    str(folder / "genai_config.json"),
                    "filename",
                    "a file of this folder",
                    repr(named),
                    "pass the folder as the builder left it",
                )
            )
        return folder / named
    if len(found) == 1:
        return found[0]
    got = ", ".join(file.name for file in found) or "none"
    fix = "pass a folder with one decoder"
    if not found and (folder / "onnx").is_dir():
        fix = f"pass --base {folder / 'onnx'}, with the tokenizer files beside the model"
    raise BaseModelError(Problem(str(folder), "base", "one .onnx file", got, fix))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value = strictjson.load(path.resolve())
    return value if isinstance(value, dict) else {}


def _part_sizes(decoder: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, int]:
    """Rows of each part of a packed projection, as the configuration has them."""

    def first(*values: Any) -> int:
        return next((value for value in values if type(value) is int and value > 0), 0)

    heads = first(decoder.get("num_attention_heads"), config.get("num_attention_heads"))
    kv = first(decoder.get("num_key_value_heads"), config.get("num_key_value_heads"), heads)
    hidden = first(decoder.get("hidden_size"), config.get("hidden_size"))
    size = first(decoder.get("head_size"), config.get("head_dim"), hidden // heads if heads else 0)
    return {"q_proj": heads * size, "k_proj": kv * size, "v_proj": kv * size}


def _node_metadata(model: OnnxFile) -> dict[int, dict[str, str]]:
    """metadata_props of nodes: where torch.onnx writes the module a node came from."""
    proto = load_proto(model)
    return {
        index: {prop.key: prop.value for prop in node.metadata_props}
        for index, node in enumerate(proto.graph.node)
        if node.metadata_props
    }


def _export(
    hf: Base,
    target: Path,
    precision: str,
    block_size: int | None,
    accuracy_level: int | None,
    options: Sequence[str],
    tell: Progress,
) -> OnnxBase:
    width = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.1, "int4": 0.6}[precision]
    total, done = int(hf.n_parameters * width), 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        tell("exporting the base to ONNX", min(done, total), total)

    tell("exporting the base to ONNX", 0, total)
    build_onnx(
        hf.path,
        target,
        precision,
        block_size=block_size,
        accuracy_level=accuracy_level,
        options=options,
        progress=step,
    )
    tell("exporting the base to ONNX", total, total)
    # the builder leaves these out, and runtimes that are not its own read them
    for name in ("config.json", "generation_config.json"):
        if (hf.path / name).is_file() and not (target / name).exists():
            shutil.copy(hf.path / name, target / name)
    return open_onnx_base(target)


def _touched(adapter: Adapter, base: OnnxBase) -> tuple[_Touched, ...]:
    """The weights that change, in the order of the graph."""
    placed = place_modules([module.name for module in adapter.modules], base.places, base.model)
    by_weight: dict[str, list[tuple[Module, Place]]] = {}
    for module in adapter.modules:
        place = placed[module.name]
        by_weight.setdefault(place.linear.weight.name, []).append((module, place))
    found = [
        _Touched(parts[0][1].linear, tuple(sorted(parts, key=lambda part: part[1].rows)))
        for parts in by_weight.values()
    ]
    return tuple(sorted(found, key=lambda one: one.linear.node))


def _prove_weights(touched: Sequence[_Touched], base: OnnxBase, hf: Base) -> float:
    """Proves on the weights that each place holds its module, rows in our order.

    Returns:
        the largest relative error, 0 when the export is lossless.
    """
    problems, worst = Problems(), 0.0
    for one in touched:
        stored = onnx_weights.read_weight(base.model, one.linear)
        for module, place in one.parts:
            error = names.prove_transform(
                hf.read_weight(module.name), stored[slice(*place.rows)], names.Transform()
            )
            worst = max(worst, error)
            if error > WEIGHT_ERROR_MAX:
                problems.add(
                    one.linear.name,
                    module.name,
                    "the rows of the Hugging Face weight",
                    f"relative error {error:.2f} in {place.tensor}",
                    "this exporter packs projections differently: please report it",
                )
    problems.raise_if_any(BaseModelError)
    return worst


def _default_form(base: OnnxBase, touched: Sequence[_Touched]) -> Form:
    packed = any(one.linear.layout == "nbits" for one in touched)
    return "branch" if packed else "merged"


# --- writing ---------------------------------------------------------------------------------------


def _write(
    job: _Job, folder: Path, tell: Progress
) -> tuple[list[FileEntry], list[ModuleEntry], str]:
    model = job.base.model
    proto = load_proto(model)
    change = Change()
    files: list[FileEntry] = []
    fold = _merge if job.form == "merged" else _branch
    modules = fold(job, proto, change, tell)
    _provenance(job, proto)
    total, done = sum(path.stat().st_size for path in model.files), 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        tell("writing the model", min(done, total), total)

    digests = write_onnx(model, proto, change, folder, step)
    for name, digest in sorted(digests.items()):
        role = "model" if name == model.path.name else "data"
        files.append(FileEntry(name, role, (folder / name).stat().st_size, digest))
    if job.form == "adapter":
        path = folder / ADAPTER_FILE
        _write_adapter(job, path)
        files.append(FileEntry(path.name, "adapter", path.stat().st_size, sha256_file(path)))
    for source in job.base.companions:
        if source.name in {entry.path for entry in files}:
            raise OutputError(
                Problem(source.name, "file", "a name that the model does not use", "both", "rename")
            )
        shutil.copyfile(source, folder / source.name)
        data = (folder / source.name).read_bytes()
        files.append(FileEntry(source.name, "config", len(data), sha256_of(data)))
    return files, modules, precision_class(read_onnx(folder / model.path.name))


def _provenance(job: _Job, proto: Any) -> None:
    """`safegene.*` metadata_props: what a reader of the single file can learn."""
    digest = sha256_of(
        "".join(
            f"{name} {digest}\n" for name, digest in sorted(job.adapter.digests.items())
        ).encode()
    )
    kept = [prop for prop in proto.metadata_props if not prop.key.startswith(METADATA_PREFIX)]
    copies = [(prop.key, prop.value) for prop in kept]
    del proto.metadata_props[:]
    for key, value in (
        *copies,
        ("safegene.version", __version__),
        ("safegene.form", job.form),
        ("safegene.expression", job.adapter.expression),
        ("safegene.adapter.sha256", digest),
        ("safegene.modules", str(len(job.adapter.modules))),
    ):
        proto.metadata_props.add(key=key, value=value)


# --- merged ----------------------------------------------------------------------------------------


def _merge(job: _Job, proto: Any, change: Change, tell: Progress) -> list[ModuleEntry]:
    modules: list[ModuleEntry] = []
    problems = Problems()
    for number, one in enumerate(job.touched):
        try:
            encoded, survivals = _merge_one(job, one)
        except SurvivalError as error:
            problems.extend(error.problems)
            continue
        finally:
            tell("merging", number + 1, len(job.touched))
        before = onnx_weights.kind_of(job.base.model, one.linear)
        _store(job.base.model, one.linear, before, encoded, proto, change)
        for (module, place), survival in zip(one.parts, survivals, strict=True):
            share = module.shape[0] / one.linear.shape[0]
            modules.append(
                _entry(
                    module, place.tensor, before.name, encoded.kind.name,
                    round(_stored_bytes(job.base.model, one.linear) * share),
                    round(encoded.nbytes * share),
                    sha256_of(b"".join(_row_bytes(encoded, one.linear, place))),
                    survival,
                )
            )  # fmt: skip
    problems.raise_if_any(SurvivalError)
    return sorted(modules, key=lambda entry: entry.tensor)


def _merge_one(job: _Job, one: _Touched) -> tuple[Encoded, list[Survival]]:
    """Tries kinds, cheapest first, until the delta of every module survives."""
    model, linear = job.base.model, one.linear
    now = onnx_weights.kind_of(model, linear)
    stored_base = onnx_weights.read_weight(model, linear)
    # with the float weights at hand they are what the delta is added to, and quantised once
    once = job.hf is not None and now.name != "F32"
    base = _float_weight(job, one, stored_base) if once else stored_base
    delta = one.delta()
    tried: list[str] = []
    kinds = onnx_weights.kinds_to_try(now, linear.shape) if job.promote else (now,)
    for kind in kinds:
        encoded, decoded = onnx_weights.encode(base + delta, kind, linear)
        own = None
        if once:
            own = stored_base if kind == now else onnx_weights.encode(base, kind, linear)[1]
        survivals = []
        for _, place in one.parts:
            rows = slice(*place.rows)
            meter = Meter(Mode.ONCE if once else Mode.GRID)
            meter.add(
                np.ascontiguousarray(base[rows]),
                delta[rows],
                np.ascontiguousarray(decoded[rows]),
                np.ascontiguousarray(own[rows]) if own is not None else None,
            )
            survivals.append(meter.result())
        if all(passes(survival, job.bounds) for survival in survivals):
            if kind == now and now.blocks is not None:
                packed = onnx_weights.read_packed(model, linear)
                encoded = onnx_weights.keep_rows(encoded, packed, one.rows)
            return encoded, survivals
        worst = min(survivals, key=lambda survival: survival.gain)
        tried.append(
            f"{kind.name}: gain {worst.gain:.3f}, relative error {worst.relative_error:.3f}"
        )
    raise SurvivalError(
        Problem(
            linear.name,
            "survival",
            f"gain in [{job.bounds.gain_min:g}, {job.bounds.gain_max:g}] and relative error <= "
            f"{job.bounds.error_max:g}",
            "; ".join(tried),
            "use --as branch, which keeps the delta in float",
        )
    )


def _float_weight(job: _Job, one: _Touched, stored: Rows) -> Rows:
    """The weight before it was exported, (out, in); rows of other modules as well."""
    if job.hf is None:
        return stored
    base = stored.copy()
    for module, places in job.base.places.items():
        for place in places:
            if place.linear.node == one.linear.node:
                base[slice(*place.rows)] = job.hf.read_weight(module)
    return base


def _store(
    model: OnnxFile, linear: Linear, before: Kind, encoded: Encoded, proto: Any, change: Change
) -> None:
    """Puts an encoded weight where the node will find it; rewrites the node if its kind changed."""
    node = proto.graph.node[linear.node]
    weight = linear.weight.name
    data = encoded.parts["weight"]
    if encoded.kind.blocks is None:
        change.replaced[weight] = (data, encoded.kind.data_type, tuple(data.shape))
        if before.blocks is not None:
            _unpack_node(model, linear, node, change, proto)
        return
    inputs = list(node.input)
    change.replaced[weight] = (data, DataType.UINT8, tuple(data.shape))
    for role, index in (("scales", 2), ("zero_points", 3)):
        if role in encoded.parts:
            info = model.initializers[inputs[index]]
            part = encoded.parts[role]
            shape = info.shape if part.size == np.prod(info.shape) else tuple(part.shape)
            change.replaced[info.name] = (part, info.dtype, shape)
    for attribute in node.attribute:
        if attribute.name == "bits":
            attribute.i = encoded.kind.blocks.bits


def _unpack_node(model: OnnxFile, linear: Linear, node: Any, change: Change, proto: Any) -> None:
    """MatMulNBits -> MatMul over a float weight (in, out), and Add where there was a bias."""
    inputs = [*node.input, *[""] * 6]
    change.removed.update(name for name in inputs[2:4] if name)
    bias = inputs[5]
    output = node.output[0]
    node.op_type, node.domain = "MatMul", ""
    del node.attribute[:]
    node.input[:] = [linear.x, linear.weight.name]
    if bias:
        node.output[0] = f"{output}/safegene_unbiased"
        add = type(node)(
            op_type="Add", name=f"{linear.name}/safegene/bias", input=[node.output[0], bias],
            output=[output],
        )  # fmt: skip
        proto.graph.node.insert(linear.node + 1, add)


def _stored_bytes(model: OnnxFile, linear: Linear) -> int:
    """Bytes of all initializers of a weight."""
    names_ = model.nodes[linear.node].inputs[1:4] if linear.layout == "nbits" else ()
    found = {linear.weight.name, *(name for name in names_ if name in model.initializers)}
    return sum(model.initializers[name].nbytes for name in found)


def _row_bytes(encoded: Encoded, linear: Linear, place: Place) -> Iterator[bytes]:
    """The stored bytes of one module's rows, part by part, row by row."""
    rows = slice(*place.rows)
    for role in sorted(encoded.parts):
        part = encoded.parts[role]
        if encoded.kind.blocks is None and linear.layout != "out_in":
            yield np.ascontiguousarray(part[:, rows]).tobytes()
        else:
            yield np.ascontiguousarray(part[rows]).tobytes()


# --- branch and adapter ----------------------------------------------------------------------------


def _slot_names(linear: Linear) -> tuple[str, str]:
    stem = linear.weight.name.removesuffix(".weight").removesuffix("_Q4").removesuffix("_Q8")
    return f"{stem}.safegene.lora_A", f"{stem}.safegene.lora_B"


def _slot_type(model: OnnxFile, linear: Linear) -> DataType:
    """The float type that flows through a linear."""
    return onnx_weights.kind_of(model, linear).data_type


def _slots(job: _Job) -> Iterator[tuple[_Touched, tuple[str, str], DataType, list[Any]]]:
    """Each touched weight with the names, the type and the values of its factors, as stored.

    A^T (in, R) and B^T (R, out): what MatMul wants on its right.
    """
    for one in job.touched:
        kind = _slot_type(job.base.model, one.linear)
        a, b = one.factors()
        values = [
            np.ascontiguousarray(onnx_weights.from_float32(np.ascontiguousarray(factor.T), kind))
            for factor in (a, b)
        ]
        yield one, _slot_names(one.linear), kind, values


def _branch(job: _Job, proto: Any, change: Change, tell: Progress) -> list[ModuleEntry]:
    graph = proto.graph
    taken = {tensor.name for tensor in graph.initializer}
    after: dict[int, list[Any]] = {}
    modules: list[ModuleEntry] = []
    problems = Problems()
    node_type = type(graph.node[0])
    for number, (one, slots, kind, values) in enumerate(_slots(job)):
        linear = one.linear
        for name in slots:
            if name in taken:
                problems.add(
                    str(job.base.model.path), name, "a name that is free", "one that is taken",
                    "this base has a SafeGene branch already: start from the plain base",
                )  # fmt: skip
        if job.form == "branch":
            for name, value in zip(slots, values, strict=True):
                change.added[name] = (value, kind, tuple(value.shape))
        else:
            _add_inputs(graph, slots, kind, linear.shape, change, values[0].dtype)
        node = graph.node[linear.node]
        output = node.output[0]
        plain = f"{output}/safegene_base"
        node.output[0] = plain
        stem = f"{linear.name}/safegene"
        after[linear.node] = [
            node_type(op_type="MatMul", name=f"{stem}/lora_A", input=[linear.x, slots[0]],
                      output=[f"{stem}/lora_A/output_0"]),
            node_type(op_type="MatMul", name=f"{stem}/lora_B",
                      input=[f"{stem}/lora_A/output_0", slots[1]],
                      output=[f"{stem}/lora_B/output_0"]),
            node_type(op_type="Add", name=f"{stem}/Add", input=[plain, f"{stem}/lora_B/output_0"],
                      output=[output]),
        ]  # fmt: skip
        for module, place in one.parts:
            survival = None
            if kind is not DataType.FLOAT:
                survival = _factor_survival(module, kind)
                if not passes(survival, job.bounds):
                    problems.add(
                        place.tensor, "survival", "a delta that survives in " + kind.name,
                        f"gain {survival.gain:.3f}, relative error {survival.relative_error:.3f}",
                        "export the base with a wider type",
                    )  # fmt: skip
            modules.append(
                _entry(
                    module, place.tensor,
                    onnx_weights.kind_of(job.base.model, linear).name,
                    onnx_weights.kind_of(job.base.model, linear).name,
                    0, sum(value.nbytes for value in values) // len(one.parts),
                    sha256_of(b"".join(value.tobytes() for value in values)), survival,
                )
            )  # fmt: skip
        tell("adding branches", number + 1, len(job.touched))
    problems.raise_if_any(SurvivalError)
    nodes = []
    for index, node in enumerate(graph.node):
        nodes.append(node_type.FromString(node.SerializeToString()))
        nodes.extend(after.get(index, ()))
    del graph.node[:]
    graph.node.extend(nodes)
    return sorted(modules, key=lambda entry: entry.tensor)


def _factor_survival(module: Module, kind: DataType) -> Survival:
    """What rounding the factors to the graph's own type leaves of the delta."""
    b, a = formula.scaled_b(module), module.a
    stored = [
        onnx_weights.to_float32(onnx_weights.from_float32(np.ascontiguousarray(factor), kind), kind)
        for factor in (b, a)
    ]
    meter = Meter(Mode.GRID)
    delta = b @ a
    meter.add(np.zeros_like(delta), delta, stored[0] @ stored[1])
    return meter.result()


def _add_inputs(
    graph: Any,
    slots: tuple[str, str],
    kind: DataType,
    shape: tuple[int, int],
    change: Change,
    dtype: np.dtype[Any],
) -> None:
    """Inputs with an empty default: rank 0, which adds nothing."""
    rank = f"{slots[0]}.rank"
    out, cols = shape
    for name, dims in ((slots[0], (cols, rank)), (slots[1], (rank, out))):
        value = graph.input.add(name=name)
        value.type.tensor_type.elem_type = int(kind)
        for dim in dims:
            made = value.type.tensor_type.shape.dim.add()
            if isinstance(dim, str):
                made.dim_param = dim
            else:
                made.dim_value = dim
        empty = tuple(0 if isinstance(dim, str) else dim for dim in dims)
        change.added[name] = (np.zeros(empty, dtype), kind, empty)


def _write_adapter(job: _Job, path: Path) -> None:
    """The values of all slots, in the file format of `onnxruntime.LoraAdapter`."""
    import onnxruntime

    parameters = {}
    for _, slots, kind, values in _slots(job):
        for name, value in zip(slots, values, strict=True):
            if kind is DataType.BFLOAT16:
                made = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(value, int(kind))
            else:
                made = onnxruntime.OrtValue.ortvalue_from_numpy(value)
            parameters[name] = made
    adapter = onnxruntime.AdapterFormat()
    adapter.set_adapter_version(ADAPTER_VERSION)
    adapter.set_model_version(ADAPTER_VERSION)
    adapter.set_parameters(parameters)
    adapter.export_adapter(str(path))


# --- the postcondition -----------------------------------------------------------------------------


def _check(job: _Job, folder: Path, work: Path) -> dict[str, Any]:
    """Re-opens the artifact in a child process, beside a branch made for the check."""
    oracle = folder
    if job.form != "branch":
        oracle = work / "oracle"
        oracle.mkdir()
        branch = dataclasses.replace(job, form="branch")
        _write(branch, oracle, lambda stage, done, total: None)
    slots = {
        one.linear.weight.name: {
            "names": list(_slot_names(one.linear)),
            "modules": [[module.name, *place.rows] for module, place in one.parts],
        }
        for one in job.touched
    }
    name = job.base.model.path.name
    return check_onnx(
        base=job.base.model.path,
        artifact=folder / name,
        adapter_file=folder / ADAPTER_FILE if job.form == "adapter" else None,
        oracle=oracle / name,
        adapter=job.adapter,
        slots=slots,
        is_float=job.form != "merged" or all(one.linear.layout != "nbits" for one in job.touched),
    )


def _entry(
    module: Module,
    tensor: str,
    before: str,
    after: str,
    bytes_before: int,
    bytes_after: int,
    sha256: str,
    survival: Survival | None,
) -> ModuleEntry:
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
