"""Artifacts made wrong on purpose, one mistake each: the self-test of the ladder.

Every mutant is a folder whose manifest agrees with every byte in it, and is otherwise the genuine
artifact's: only the content can tell. Where a mistake is in the adapter, the artifact is what the
converter makes of an adapter with that mistake; where it is in the running program, the engine that
the ladder opens is replaced.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tiny
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file
from stale_cache import LlamaEngineWithStaleCache, OrtEngineWithStaleCache
from workshop import Forged, Workshop, unmutated

from safegene_converter.encoding import ggml_quantizer
from safegene_converter.gguf.writer import OutTensor, write_gguf
from safegene_runtime.architecture.table import TABLE
from safegene_runtime.artifact.manifest import FileEntry, Manifest, read_manifest
from safegene_runtime.engines.engine import Engine
from safegene_runtime.engines.registry import open_engine
from safegene_runtime.formats import ggml
from safegene_runtime.formats.files import sha256_file, sha256_of
from safegene_runtime.formats.gguf.model import GGUFModel, open_model
from safegene_runtime.formats.gguf.tensors import read_tensor_bytes
from safegene_runtime.formats.gguf.types import GGMLType, Value, ValueType, nbytes
from safegene_runtime.gating.bounds import class_of

Factors = dict[str, tuple[np.ndarray, np.ndarray]]
"""(A (r, in), B (out, r)) by module."""
Edit = Callable[[Factors], Factors]


def needs_wide_rows(mutant: str, target: str) -> bool:
    """Whether rows of 256 are needed: where a file is to hold a K-quant."""
    return mutant == "rounded to Q2_K" and target.startswith("gguf")


# --- mistakes in what is folded --------------------------------------------------------------------


NOTHING = 1e-12
"""What the converter's reader, which refuses a delta of zeros, takes for a delta."""


def scaled(strength: float) -> Edit:
    """alpha or rank misread."""
    return lambda all: {m: (a, b * np.float32(strength)) for m, (a, b) in all.items()}


def layers_dropped(*layers: int) -> Edit:
    """Some layers have no delta."""
    words = [f".layers.{layer}." for layer in layers]
    return lambda all: {
        m: (a, NOTHING * b if any(word in m for word in words) else b) for m, (a, b) in all.items()
    }


def a_and_b_swapped(all: Factors) -> Factors:
    """Transposed where shapes allow; elsewhere the components of A and B are paired wrongly."""
    return {
        m: (b.T, a.T) if a.shape[1] == b.shape[0] else (a, np.roll(b, 1, axis=1))
        for m, (a, b) in all.items()
    }


def edit_coefficients(adapter: Path, edit: Callable[[list[float]], list[float]]) -> None:
    """Gives the layers of the default expression, in order, other coefficients."""
    path = adapter / "safegene.json"
    about = json.loads(path.read_text())
    chosen = about["expressions"][about["default_expression"]]
    layers = sorted(chosen["coefficients"], key=int)
    values = edit([chosen["coefficients"][layer] for layer in layers])
    chosen["coefficients"] = dict(zip(layers, values, strict=True))
    path.write_text(json.dumps(about))


def all_ones(coefficients: list[float]) -> list[float]:
    """Every layer at 1."""
    return [1.0] * len(coefficients)


def coefficients_ignored(adapter: Path) -> None:
    """Every layer at 1."""
    edit_coefficients(adapter, all_ones)


def other_rows(heads: int, heads_kv: int, inverse: bool) -> Edit:
    """q and k with their rows in the order of llama.cpp, or its inverse."""

    def mix(all: Factors) -> Factors:
        found = dict(all)
        for module, (a, b) in all.items():
            name = module.removeprefix("base_model.model.")
            order = TABLE["llama"].transform(name, heads, heads_kv)
            found[module] = a, (order.invert_rows if inverse else order.apply_rows)(b)
        return found

    return mix


def rows_of_the_other_runtime(shop: Workshop, target: str, out: Path) -> Forged:
    """q and k: in GGUF as Hugging Face has their rows, in ONNX as llama.cpp has them."""
    mix = other_rows(tiny.N_HEAD, tiny.N_HEAD_KV, target.startswith("gguf"))
    return _converted(mix)(shop, target, out)


# --- mistakes in what lies around it ---------------------------------------------------------------

OTHER_TEMPLATE = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>' + '\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}"
    "{% endif %}"
)
"""ChatML, as the genuine one, without its default system prompt."""
EXCHANGED = ("\u0120a", "\u0120the")
"""Two tokens, as byte-level BPE spells " a" and " the"; the first prompt has one of them."""


def wrong_template(shop: Workshop, target: str, out: Path) -> Forged:
    """The template of a related model."""
    tokenizer = {"chat_template_sha256": sha256_of(OTHER_TEMPLATE.encode())}
    if target.startswith("gguf"):
        value = Value(ValueType.STRING, OTHER_TEMPLATE, None)
        forged = _with_metadata(shop, target, out, {"tokenizer.chat_template": value})
    else:
        forged = unmutated(shop, target, out)
        path = out / "chat_template.jinja"
        if path.exists():
            path.write_text(OTHER_TEMPLATE)
        else:
            _edit_json(out / "tokenizer_config.json", {"chat_template": OTHER_TEMPLATE})
    return _agree(forged, tokenizer=tokenizer)


def wrong_tokenizer(shop: Workshop, target: str, out: Path) -> Forged:
    """A vocabulary that numbers two words the other way round."""
    if target.startswith("gguf"):
        key = "tokenizer.ggml.tokens"
        stored = open_model(shop.base(target)).metadata[key]
        tokens = list(stored.value)
        one, other = (tokens.index(word) for word in EXCHANGED)
        tokens[one], tokens[other] = tokens[other], tokens[one]
        value = dataclasses.replace(stored, value=tuple(tokens))
        return _agree(_with_metadata(shop, target, out, {key: value}))
    forged = unmutated(shop, target, out)
    model = json.loads((out / "tokenizer.json").read_text())["model"]
    one, other = EXCHANGED
    vocabulary = model["vocab"]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    _edit_json(out / "tokenizer.json", {"model": model})
    return _agree(forged)


def rounded_to_q2_k(shop: Workshop, target: str, out: Path) -> Forged:
    """Every weight of the blocks in Q2_K; in ONNX, which has no such type, rounded to it in F32."""
    forged = unmutated(shop, target, out)
    if target.startswith("onnx"):
        model = onnx.load(out / "model.onnx")
        linears = {one.input[1] for one in model.graph.node if one.op_type == "MatMul"}
        for one in model.graph.initializer:
            if one.name in linears and "layers" in one.name and "safegene" not in one.name:
                # Q2_K is made of blocks of 256: here of several rows of (out, in)
                rows = np.ascontiguousarray(numpy_helper.to_array(one).T)
                again = _q2_k(rows.reshape(-1, 256)).reshape(rows.shape).T
                one.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(again), one.name))
        _save(model, out)
        return _agree(forged)
    path = out / "model.gguf" if forged.base is None else out.with_suffix(".base.gguf")
    model_file = open_model(shop.base(target) if forged.base else path)
    tensors = []
    for name, info in model_file.tensors.items():
        if not name.startswith("blk.") or len(info.shape) != 2:
            tensors.append(OutTensor(name, info.shape, info.type, read_tensor_bytes(info)))
            continue
        rows = np.frombuffer(read_tensor_bytes(info), np.float32).reshape(info.shape)
        encoded = ggml_quantizer.quantize(rows, GGMLType.Q2_K, threads=1)
        tensors.append(OutTensor(name, info.shape, GGMLType.Q2_K, encoded))
    _rewrite(path, dict(model_file.metadata), tensors)
    return _agree(
        forged if forged.base is None else dataclasses.replace(forged, base=path), weights="Q2_K"
    )


def _q2_k(rows: np.ndarray) -> np.ndarray:
    kind = GGMLType.Q2_K
    encoded = ggml_quantizer.quantize(rows, kind, threads=1)
    return ggml.dequantize(np.frombuffer(encoded, np.uint8), kind, rows.shape, threads=1)


# --- mistakes in what is run -----------------------------------------------------------------------


def base_served(shop: Workshop, target: str, out: Path) -> Forged:
    """The base's tensors under the artifact's header; or a program that does not load the adapter."""
    forged = unmutated(shop, target, out)
    if target in ("gguf sidecar", "onnx adapter"):

        def without(model: Path, adapter: Path | None, **settings: Any) -> Engine:
            return open_engine(model, None, **settings)

        return dataclasses.replace(forged, open_engine=without)
    if target == "gguf merged":
        path = out / "model.gguf"
        _rewrite(path, dict(open_model(path).metadata), _tensors(open_model(shop.base(target))))
    else:
        told = onnx.load(out / "model.onnx", load_external_data=False).metadata_props
        for path in shop.base(target).glob("*.onnx*"):
            shutil.copyfile(path, out / path.name)
        model = onnx.load(out / "model.onnx", load_external_data=False)
        del model.metadata_props[:]
        model.metadata_props.extend(told)
        (out / "model.onnx").write_bytes(model.SerializeToString())
    return _agree(forged)


def stale_cache(shop: Workshop, target: str, out: Path) -> Forged:
    """What all prompts begin with stays in the KV cache from before the adapter was there."""
    base = shop.base(target)
    return cache_filled_by(base if base.is_file() else base / "model.onnx", shop, target, out)


def cache_filled_by(model: Path | None, shop: Workshop, target: str, out: Path) -> Forged:
    """The genuine artifact, with what another model left in the cache; None: what itself leaves."""
    kind = LlamaEngineWithStaleCache if target.startswith("gguf") else OrtEngineWithStaleCache

    def reusing(
        served: Path, beside: Path | None, *, engine: str, apart: bool, **settings: Any
    ) -> Engine:
        before = (served, beside) if model is None else (model, None)
        return kind(before, served, beside, **settings)

    return dataclasses.replace(unmutated(shop, target, out), open_engine=reusing)


# --- forging ---------------------------------------------------------------------------------------

Mutator = Callable[[Workshop, str, Path], Forged]


def edit_factors(adapter: Path, edit: Edit) -> None:
    """Writes other factors of the same names into an adapter folder."""
    path = adapter / "adapter_model.safetensors"
    stored = load_file(path)
    stems = sorted({name.rsplit(".lora_", 1)[0] for name in stored})
    pairs = {
        stem: (stored[f"{stem}.lora_A.weight"], stored[f"{stem}.lora_B.weight"]) for stem in stems
    }
    found = {}
    for stem, (a, b) in edit(pairs).items():
        found[f"{stem}.lora_A.weight"] = np.ascontiguousarray(a)
        found[f"{stem}.lora_B.weight"] = np.ascontiguousarray(b)
    assert found.keys() == stored.keys()
    save_file(found, path, metadata={"format": "pt"})


def _converted(edit: Edit) -> Mutator:
    """What the converter makes of other factors, under the genuine manifest."""
    return _from_adapter(lambda adapter: edit_factors(adapter, edit))


def _from_adapter(edit: Callable[[Path], None]) -> Mutator:
    """What the converter makes of an edited adapter, under the genuine manifest."""

    def forge(shop: Workshop, target: str, out: Path) -> Forged:
        adapter = out.parent / f"{out.name}-of" / shop.adapter.name
        shutil.copytree(shop.adapter, adapter)
        edit(adapter)
        shop.convert(adapter, target, out)
        genuine = shop.genuine(target)
        if target.startswith("gguf"):
            (path,) = out.glob("*.gguf")
            _take_header(genuine / path.name, path, shop.header_bytes(genuine / path.name))
        else:
            model, told = (
                onnx.load(folder / "model.onnx", load_external_data=False)
                for folder in (out, genuine)
            )
            del model.metadata_props[:]
            model.metadata_props.extend(told.metadata_props)
            (out / "model.onnx").write_bytes(model.SerializeToString())
        shutil.copyfile(genuine / "manifest.json", out / "manifest.json")
        return _agree(Forged(out, shop.base_beside(target)))

    return forge


def _take_header(genuine: Path, path: Path, size: int) -> None:
    """What is told about the adapter is told as of the genuine one; tensors lie in the same places."""
    assert path.stat().st_size == genuine.stat().st_size
    with genuine.open("rb") as source, path.open("r+b") as target:
        target.write(source.read(size))


def _agree(
    forged: Forged, *, tokenizer: dict[str, Any] | None = None, weights: str | None = None
) -> Forged:
    """Makes the manifest list what is there now, the base that is passed, and the type of the weights."""
    folder, manifest = forged.folder, read_manifest(forged.folder)
    files = tuple(
        FileEntry(e.path, e.role, (folder / e.path).stat().st_size, sha256_file(folder / e.path))
        for e in manifest.files
    )
    artifact, modules = manifest.artifact, manifest.modules
    if weights is not None:
        artifact = {**artifact, "precision": class_of(weights)}
        if manifest.form.merges:
            modules = tuple(
                dataclasses.replace(
                    one, type_after=weights, bytes_after=nbytes(one.shape, GGMLType[weights])
                )
                for one in modules
            )
    base = manifest.base
    if forged.base is not None:
        base = {**base, "files": {forged.base.name: sha256_file(forged.base)}}
    changed: Manifest = dataclasses.replace(
        manifest, files=files, modules=modules, base=base, artifact=artifact,
        tokenizer=tokenizer or manifest.tokenizer,
    )  # fmt: skip
    changed.write(folder)
    return forged


def _with_metadata(shop: Workshop, target: str, out: Path, metadata: Mapping[str, Value]) -> Forged:
    """Other metadata in the model that is served: of a sidecar, in the base beside it."""
    forged = unmutated(shop, target, out)
    path = out / "model.gguf"
    source = open_model(path if forged.base is None else forged.base)
    if forged.base is not None:
        path = out.with_suffix(".base.gguf")
        forged = dataclasses.replace(forged, base=path)
    _rewrite(path, {**source.metadata, **metadata}, _tensors(source))
    return forged


def _tensors(model: GGUFModel) -> Iterator[OutTensor]:
    for name, info in model.tensors.items():
        yield OutTensor(name, info.shape, info.type, info)


def _rewrite(path: Path, metadata: dict[str, Value], tensors: Any) -> None:
    """Replaces a GGUF, from which the tensors may be read meanwhile."""
    temporary = path.with_suffix(".new")
    write_gguf(temporary, metadata, list(tensors))
    temporary.replace(path)


def _save(model: onnx.ModelProto, folder: Path) -> None:
    """Writes an ONNX model over the one in a folder: its data in the files that were there."""
    kept = sorted(path.name for path in folder.glob("model.onnx?*"))
    for name in kept:
        (folder / name).unlink()
    onnx.save(
        model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data",
        size_threshold=1024,
    )  # fmt: skip
    for name in kept:  # listed in the manifest, and no longer needed
        if not (folder / name).exists():
            (folder / name).write_bytes(b"\0")


def _edit_json(path: Path, changes: Mapping[str, Any]) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


MUTANTS: dict[str, Mutator] = {
    "scale 0": _converted(scaled(NOTHING)),
    "scale 0.5": _converted(scaled(0.5)),
    "scale 2": _converted(scaled(2)),
    "scale -1": _converted(scaled(-1)),
    "one layer dropped": _converted(layers_dropped(1)),
    "A and B swapped": _converted(a_and_b_swapped),
    "q/k rows in the other order": rows_of_the_other_runtime,
    "coefficients ignored": _from_adapter(coefficients_ignored),
    "wrong template": wrong_template,
    "wrong tokenizer": wrong_tokenizer,
    "rounded to Q2_K": rounded_to_q2_k,
    "base served": base_served,
    "stale KV cache": stale_cache,
}
