"""Small files to begin fuzzing with: python tools/fuzz_seeds.py READER FOLDER.

Good ones are cut out of the tests' tiny models; the bad ones are the tables of malformed files that the
tests refuse. Nothing of it is committed.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "tests"), str(ROOT / "converter"), str(ROOT / "runtime")]

from fuzz_readers import BASE, DATA, DATA_BYTES  # noqa: E402

from safegene_converter.gguf.writer import OutTensor, write_gguf  # noqa: E402
from safegene_runtime.formats.gguf.header import read_gguf  # noqa: E402
from safegene_runtime.formats.gguf.tensors import read_tensor_bytes  # noqa: E402
from safegene_runtime.formats.gguf.types import GGMLType, Value, ValueType  # noqa: E402

MAX_SEED_BYTES = 16384
SMALLER, TOKENS = 8, 32
"""How much smaller the widths of a seed are than the tiny model's, and how many tokens it has."""


def cut_gguf(source: Path, out: Path, types: tuple[GGMLType, ...] = (GGMLType.F32,)) -> None:
    """A model of a few KiB with the metadata of a tiny one; F32 and other types, layer by layer."""
    found = read_gguf(source)
    metadata = {}
    for key, value in found.metadata.items():
        number = value.value
        if key.endswith(("embedding_length", "feed_forward_length", "key_length", "value_length",
                         "rope.dimension_count")):  # fmt: skip
            number //= SMALLER
        elif key.endswith("vocab_size"):
            number = TOKENS
        elif key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
            number = tuple(number[:TOKENS])
        elif key == "tokenizer.ggml.merges":
            number = ()
        elif key == "tokenizer.chat_template":
            number = "{% for m in messages %}{{ m.content }}{% endfor %}"
        metadata[key] = dataclasses.replace(value, value=number)
    tensors = []
    for name, info in found.tensors.items():
        weights = np.frombuffer(read_tensor_bytes(info), np.float32).reshape(info.shape)
        weights = weights[:TOKENS] if name == "token_embd.weight" else weights[::SMALLER]
        if weights.ndim == 2:
            weights = np.ascontiguousarray(weights[:, ::SMALLER])
        kind = types[len(tensors) % len(types)] if weights.ndim == 2 else GGMLType.F32
        data = weights.astype({GGMLType.F16: np.float16}.get(kind, np.float32)).tobytes()
        tensors.append(OutTensor(name, weights.shape, kind, data))
    out.unlink(missing_ok=True)  # of a run that was stopped before its seeds were made
    write_gguf(out, metadata, tensors)


def gguf_seeds(folder: Path) -> Iterator[bytes]:
    """Small models, and every file of the table of hostile ones."""
    import test_gguf_hostile
    import tiny

    for architecture in ("llama", "qwen2"):
        for types in ((GGMLType.F32,), (GGMLType.F32, GGMLType.F16)):
            path = folder.parent / "seed.gguf"
            cut_gguf(tiny.gguf_model(architecture), path, types)
            yield path.read_bytes()
            path.unlink()
    yield test_gguf_hostile.TINY
    yield from (data for _, data in test_gguf_hostile.HOSTILE.values())


def lora_seeds(folder: Path) -> Iterator[bytes]:
    """Adapters of the cut model, whole and wrong in one thing; the model goes beside the inputs."""
    import tiny

    base = folder.parent / BASE
    cut_gguf(tiny.gguf_model("llama"), base)
    shapes = {name: info.shape for name, info in read_gguf(base).tensors.items()}
    text = {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora"}
    good = {key: Value(ValueType.STRING, value) for key, value in text.items()}
    random = np.random.default_rng(0)

    def pair(stem: str, rank: int) -> list[OutTensor]:
        rows, columns = shapes[stem]
        return [
            OutTensor(stem + suffix, shape, GGMLType.F32,
                      random.standard_normal(shape).astype(np.float32).tobytes())
            for suffix, shape in ((".lora_a", (rank, columns)), (".lora_b", (rows, rank)))
        ]  # fmt: skip

    q, up = pair("blk.0.attn_q.weight", 4), pair("blk.1.ffn_up.weight", 4)
    alpha = {"adapter.lora.alpha": Value(ValueType.FLOAT32, 4.0)}
    other = {"adapter.lora.alpha": Value(ValueType.FLOAT32, 8.0)}
    activated = {"adapter.alora.invocation_tokens": Value(ValueType.ARRAY, (1,), ValueType.UINT32)}
    for metadata, tensors in [
        (good, q), (good, q + up), (good | alpha, q), (good | other, q), (good | activated, q),
        (good, q[:1]), (good, []), ({**good, "general.type": good["adapter.type"]}, q),
        (good, pair("token_embd.weight", 2)),
    ]:  # fmt: skip
        path = folder.parent / "seed.gguf"
        write_gguf(path, metadata, tensors)
        yield path.read_bytes()
        path.unlink()


def safetensors_seeds(folder: Path) -> Iterator[bytes]:
    """A good file, and the table of malformed ones."""
    import test_safetensors_reader as cases

    yield cases.GOOD
    yield from cases.HOSTILE.values()


def onnx_seeds(folder: Path) -> Iterator[bytes]:
    """Models with every kind of tensor, and the table of malformed ones; their data lies beside."""
    import test_onnx_file as cases

    (folder.parent / DATA).write_bytes(bytes(range(DATA_BYTES)))
    yield cases.make_model(*cases.GOOD, cases.external()).SerializeToString()
    yield cases.make_model(cases.external()).SerializeToString()
    yield cases.make_model().SerializeToString()
    for tensor in cases.GOOD:
        yield cases.make_model(tensor).SerializeToString()
    for model, _ in cases.BAD.values():
        yield model if isinstance(model, bytes) else model.SerializeToString()


def json_seeds(folder: Path) -> Iterator[bytes]:
    """Manifests, and JSON that means two things."""
    import test_manifest as cases

    made = cases._manifest()
    yield made.to_json()
    yield made.with_verification(cases.VERIFICATION).to_json()
    yield dataclasses.replace(
        made, artifact={**cases.ONNX, "form": "merged", "precision": "f32"}
    ).to_json()
    yield from (
        b"null",
        b"[]",
        b"{}",
        b'{"a": 1, "a": 2}',
        b"[NaN, 1e999]",
        b'"\\ud800"',
        b"[" * 2000,
    )


def peft_seeds(folder: Path) -> Iterator[bytes]:
    """Configurations as PEFT saves them, with the fields that decide what is adapted."""
    import test_peft_config as cases

    for changed in (
        {}, {"use_rslora": True}, {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"up_proj": 2}},
        {"target_modules": "all-linear"}, {"target_modules": r".*layers\.(0|1)\..*(q|v)_proj"},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"}, {"layers_to_transform": 1},
        {"exclude_modules": ["k_proj"]}, {"use_dora": True}, {"lora_alpha": 0}, {"r": -1},
        {"target_modules": "(.*)*x"}, {"rank_pattern": {"^model.*": 2}},
    ):  # fmt: skip
        yield json.dumps(cases.config(**changed)).encode()


def main() -> None:
    """Writes the seeds of one reader."""
    name, folder = sys.argv[1], Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for data in globals()[f"{name}_seeds"](folder):
        if len(data) <= MAX_SEED_BYTES:
            (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
            count += 1
    print(f"{count} seeds of {name} in {folder}")


if __name__ == "__main__":
    main()
