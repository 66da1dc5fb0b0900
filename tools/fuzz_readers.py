"""What `tools/fuzz.py` feeds: our readers of files from outside, and independent readers beside them.

What ours accepts must be what the other one reads: the same tensors, of the same shape, type and bytes.
The other one runs in a process of its own, under a deadline: gguf-py 0.19 can hang, libllama can abort.

    python tools/fuzz_readers.py READER FOLDER     answers "compare" and "native", a line each
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safegene_converter.inputs.peft_config import parse_config
from safegene_converter.inputs.safetensors_reader import read_safetensors
from safegene_runtime.artifact.manifest import Manifest
from safegene_runtime.engines.llama_checks import check_adapter_header, check_model_header
from safegene_runtime.errors import FormatError, SafeGeneError
from safegene_runtime.formats import strictjson
from safegene_runtime.formats.gguf.header import GGUFFile, read_gguf
from safegene_runtime.formats.gguf.tensors import read_tensor_bytes
from safegene_runtime.formats.onnx.file import Graph, OnnxFile, read_onnx
from safegene_runtime.formats.onnx.tensor import Initializer, read_initializer

INPUT, BASE, DATA = "input", "base.gguf", "data.bin"
"""In the folder of a run: the input, the base of LoRA adapters, the external data of ONNX models."""
DATA_BYTES = 64
MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1, 11)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj")
]
NATIVE_SECONDS = 10

Summary = dict[str, Any]
"""What is compared: by name, a list of JSON values."""


@dataclass(frozen=True)
class Reader:
    """One of our readers, and those that it is held against.

    Attributes:
        read: of the input at a path; raises a SafeGeneError, or returns what `summary` understands.
        summary: what is compared of it; None where there is nobody to compare with.
        other: the package that `compare` needs, None without.
        compare: the same by the independent reader.
        loadable: whether libllama may see what was read.
        native: libllama on the input, in a process that may die.
        words: of the format, for the fuzzer to put together.
    """

    read: Callable[[Path, bytes], Any]
    summary: Callable[[Any], Summary] | None = None
    other: str | None = None
    compare: Callable[[Path], Summary] | None = None
    loadable: Callable[[Path], bool] | None = None
    native: Callable[[Path], None] | None = None
    words: tuple[str, ...] = ()


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


# --- GGUF -------------------------------------------------------------------------------------------


def _gguf(path: Path, data: bytes) -> GGUFFile:
    path.write_bytes(data)
    return _decoded(read_gguf(path))


def _decoded(found: GGUFFile) -> GGUFFile:
    for value in found.metadata.values():
        repr(value.value)  # strings are decoded when they are first asked for
    return found


def _gguf_summary(found: GGUFFile) -> Summary:
    return {
        name: [list(info.shape), int(info.type), _digest(read_tensor_bytes(info))]
        for name, info in found.tensors.items()
    }


def _gguf_by_gguf_py(path: Path) -> Summary:
    import gguf

    return {
        tensor.name: [
            [int(size) for size in reversed(tensor.shape)],
            int(tensor.tensor_type),
            _digest(tensor.data.tobytes()),
        ]
        for tensor in gguf.GGUFReader(path).tensors
    }


def _is_model(path: Path) -> bool:
    try:
        check_model_header(path)
    except SafeGeneError:
        return False
    return True


def _load_model(path: Path) -> Any:
    from safegene_runtime.engines.llama_native import library

    llama = library()
    parameters = llama.llama_model_default_params()
    parameters.use_mmap = False
    parameters.n_gpu_layers = 0
    return llama, llama.llama_model_load_from_file(os.fsencode(path), parameters)


def _llama(path: Path) -> None:
    """Loads the model and computes one token."""
    llama, model = _load_model(path)
    if model:
        _decode(llama, model, None)


def _decode(llama: Any, model: Any, adapter: Any) -> None:
    parameters = llama.llama_context_default_params()
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = 32
    parameters.n_threads = parameters.n_threads_batch = 1
    context = llama.llama_init_from_model(model, parameters)
    if context:
        if adapter:
            adapters = (llama.llama_adapter_lora_p_ctypes * 1)(adapter)
            llama.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0))
        tokens = (llama.llama_token * 1)(1)
        llama.llama_decode(context, llama.llama_batch_get_one(tokens, 1))


def _lora(path: Path, data: bytes) -> GGUFFile:
    path.write_bytes(data)
    return _decoded(check_adapter_header(path, _base(path)))


def _base(path: Path, _known: dict[Path, Any] = {}) -> Any:  # noqa: B006
    base = path.with_name(BASE)
    if base not in _known:
        _known[base] = check_model_header(base)
    return _known[base]


def _llama_lora(path: Path) -> None:
    llama, model = _load_model(path.with_name(BASE))
    if not model:
        raise RuntimeError("libllama does not load the base")
    adapter = llama.llama_adapter_lora_init(model, os.fsencode(path))
    if adapter:
        _decode(llama, model, adapter)


# --- safetensors ------------------------------------------------------------------------------------


def _safetensors(path: Path, data: bytes) -> Any:
    return read_safetensors(path, data)


def _safetensors_summary(found: Any) -> Summary:
    return {
        name: [list(info.shape), info.dtype, _digest(found.data[info.begin : info.end])]
        for name, info in found.tensors.items()
    }


def _safetensors_by_the_library(path: Path) -> Summary:
    import safetensors

    return {
        name: [list(tensor["shape"]), tensor["dtype"], _digest(bytes(tensor["data"]))]
        for name, tensor in safetensors.deserialize(path.read_bytes())
    }


# --- ONNX -------------------------------------------------------------------------------------------


def _onnx(path: Path, data: bytes) -> OnnxFile:
    found = read_onnx(path, data)
    for tensor in found.initializers.values():
        if tensor.path != path:  # else its bytes are where `data` is
            read_initializer(tensor)
    return found


def _onnx_summary(found: OnnxFile) -> Summary:
    data = found.path.read_bytes()

    def tensor(one: Initializer) -> list[Any]:
        if one.data is not None:
            raw = one.data
        elif one.path == found.path:
            raw = data[one.offset : one.offset + one.nbytes]
        else:
            raw = read_initializer(one).tobytes()
        return [list(one.shape), int(one.dtype), _digest(raw)]

    def nodes(graph: Graph) -> list[Any]:
        return [
            [node.name, node.op_type, node.domain, list(node.inputs), list(node.outputs),
             sorted(node.attributes),
             [nodes(one) for _, one in sorted(node.attributes.items()) if isinstance(one, Graph)]]
            for node in graph.nodes
        ]  # fmt: skip

    return {
        "nodes": nodes(found.graph),
        "ports": [[v.name for v in found.inputs], [v.name for v in found.outputs]],
        "opsets": sorted(map(list, found.opsets.items())),
        **{f"tensor {name}": tensor(one) for name, one in found.initializers.items()},
    }


def _onnx_by_onnx(path: Path) -> Summary:
    import onnx
    from onnx import numpy_helper

    model = onnx.load_model(path, load_external_data=False)

    def raw(one: onnx.TensorProto) -> bytes:
        if one.HasField("raw_data"):
            return bytes(one.raw_data)
        array = numpy_helper.to_array(one, str(path.parent))
        if one.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):
            flat = [int(value) & 15 for value in array.reshape(-1)] + [0]
            pairs = zip(flat[::2], flat[1::2], strict=False)
            return bytes(low | high << 4 for low, high in pairs)
        return bytes(array.tobytes())

    def domain(name: str) -> str:
        return "" if name == "ai.onnx" else name

    def nodes(graph: onnx.GraphProto) -> list[Any]:
        return [
            [node.name, node.op_type, domain(node.domain), list(node.input), list(node.output),
             sorted(one.name for one in node.attribute),
             [nodes(one.g) for one in sorted(node.attribute, key=lambda one: one.name)
              if one.type == onnx.AttributeProto.GRAPH]]
            for node in graph.node
        ]  # fmt: skip

    return {
        "nodes": nodes(model.graph),
        "ports": [[v.name for v in model.graph.input], [v.name for v in model.graph.output]],
        "opsets": sorted([domain(one.domain), one.version] for one in model.opset_import),
        **{
            f"tensor {one.name}": [list(one.dims), one.data_type, _digest(raw(one))]
            for one in model.graph.initializer
        },
    }


# --- JSON -------------------------------------------------------------------------------------------


def _json(path: Path, data: bytes) -> None:
    """A manifest; what is JSON at all must survive being written and read again."""
    value = strictjson.loads(data, str(path))
    if strictjson.loads(strictjson.dumps(value), str(path)) != value:
        raise AssertionError("what was written is not what is read")
    found = Manifest.from_json(data, str(path))
    if Manifest.from_json(found.to_json(), str(path)) != found:
        raise AssertionError("the manifest that was written is not the one that is read")


def _peft(path: Path, data: bytes) -> Summary:
    settings = parse_config(strictjson.loads(data, str(path)), str(path))
    return {module: [settings.is_target(module), settings.scaling_of(module)] for module in MODULES}


def _peft_by_peft(path: Path) -> Summary:
    import peft
    from peft.tuners.tuners_utils import check_target_module_exists
    from peft.utils.other import get_pattern_key

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = peft.LoraConfig.from_peft_type(**json.loads(path.read_bytes()))
    if isinstance(found.target_modules, str) and found.target_modules.lower() == "all-linear":
        found.target_modules = set(MODULES)  # PEFT puts the names of the linear modules there

    def scaling(module: str) -> float:
        ranks, alphas = found.rank_pattern or {}, found.alpha_pattern or {}
        rank = ranks.get(get_pattern_key(ranks.keys(), module), found.r)
        alpha = alphas.get(get_pattern_key(alphas.keys(), module), found.lora_alpha)
        return float(alpha / (rank**0.5 if found.use_rslora else rank))

    return {
        module: [bool(check_target_module_exists(found, module)), scaling(module)]
        for module in MODULES
    }


READERS: dict[str, Reader] = {
    "gguf": Reader(
        _gguf, _gguf_summary, "gguf", _gguf_by_gguf_py, _is_model, _llama,
        ("GGUF", "general.alignment", "general.architecture", "tokenizer.ggml.tokens", "llama.",
         "blk.0.attn_q.weight", "token_embd.weight"),
    ),
    "lora": Reader(
        _lora, _gguf_summary, "gguf", _gguf_by_gguf_py, lambda path: True, _llama_lora,
        ("GGUF", "general.type", "adapter", "adapter.type", "lora", "adapter.lora.alpha", ".lora_a",
         ".lora_b", "blk.0.attn_q.weight"),
    ),
    "safetensors": Reader(
        _safetensors, _safetensors_summary, "safetensors", _safetensors_by_the_library,
        words=('"dtype":', '"shape":', '"data_offsets":', '"__metadata__":', "F32", "BF16", "F4",
               "[0,8]", "[]", "{}", "null", "1e999", "\\ud800"),
    ),
    "onnx": Reader(
        _onnx, _onnx_summary, "onnx", _onnx_by_onnx,
        words=("location", "offset", "length", "checksum", "data.bin", "ai.onnx", "MatMul", "16"),
    ),
    "json": Reader(
        _json,
        words=('"format_version":', '"files":', '"modules":', '"sha256":', '"verification":',
               '"slots":', "null", "true", "NaN", "1e999", "-0", "\\ud800", "[]", "{}"),
    ),
    "peft": Reader(
        _peft, dict, "peft", _peft_by_peft,
        words=('"r":', '"lora_alpha":', '"target_modules":', '"rank_pattern":', '"alpha_pattern":',
               '"exclude_modules":', '"layers_to_transform":', '"layers_pattern":',
               '"use_rslora":', '"all-linear"', "null", "true", "false", ".*", "(", ")*", "|"),
    ),
}  # fmt: skip


# --- the process that may hang or die ---------------------------------------------------------------


def answer(reader: Reader, command: str, path: Path) -> Any:
    """What the independent side says of the input at a path, as JSON."""
    if command == "compare" and reader.compare is not None:
        try:
            return {"read": reader.compare(path)}
        except Exception as error:  # whatever it is: the other reader refuses
            return {"refused": f"{type(error).__name__}: {error}"[:300]}
    if command == "native" and reader.native is not None:
        return {"died": _forked(reader.native, path)}
    return {"error": f"nothing to do for {command!r}"}


def _forked(run: Callable[[Path], None], path: Path) -> str | None:
    """Runs it in a fork; how that died, or None."""
    child = os.fork()
    if child == 0:
        code = 3
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os.environ["GGML_NO_BACKTRACE"] = "1"
            run(path)
            code = 0
        finally:
            os._exit(code)
    end = time.monotonic() + NATIVE_SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            return None if code == 0 else f"exit code {code}"
        time.sleep(0.002)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return f"no end within {NATIVE_SECONDS} s"


def main() -> None:
    """Answers commands until there are no more."""
    reader, path = READERS[sys.argv[1]], Path(sys.argv[2]) / INPUT
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    try:
        if reader.other:
            __import__(reader.other)
        if reader.native:
            from safegene_runtime.engines.llama_native import library

            library()
        print(json.dumps({"ready": True}), file=replies, flush=True)
    except (ImportError, FormatError, SafeGeneError) as error:
        print(json.dumps({"error": str(error)[:300]}), file=replies, flush=True)
        return
    for line in sys.stdin:
        print(json.dumps(answer(reader, line.strip(), path)), file=replies, flush=True)


if __name__ == "__main__":
    main()
