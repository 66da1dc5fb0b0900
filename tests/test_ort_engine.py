"""ONNX Runtime as an engine: batches, quiet logs, verified bytes, and nothing imported but its own."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tiny
from onnx_tools import edited, feeds, quick, session

from safegene_runtime.artifact.manifest import check_files, read_manifest
from safegene_runtime.child import python_environment
from safegene_runtime.engines.ort import MIN_SHARED, OrtEngine
from safegene_runtime.engines.registry import open_engine
from safegene_runtime.errors import EngineError, ManifestError, SafeGeneError
from safegene_runtime.formats.sealed import SealedFiles

SEQUENCES = [
    [5, 77, 1042, 9, 300],
    [11],
    [8, 8, 411, 23, 7, 99, 12, 650, 2, 17, 31],
    [301, 4],
    [77] * 8,
    [640, 641, 642],
]
LAYOUTS = ["builder", "torchscript", "dynamo"]


def folder(layout: str) -> Path:
    return tiny.onnx_model("llama") if layout == "builder" else tiny.exported_model("llama", layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_with_padding_is_what_each_sequence_gives_alone(layout: str) -> None:
    path = folder(layout) / "model.onnx"
    keep = [len(ids) for ids in SEQUENCES]
    with OrtEngine(path, threads=1) as many, OrtEngine(path, threads=1, n_seq_max=1) as single:
        batched = dict(many.logits(SEQUENCES, keep))
        alone = dict(single.logits(SEQUENCES, keep))
        assert batched.keys() == alone.keys() == set(range(len(SEQUENCES)))
        for i in batched:
            assert batched[i].shape == (keep[i], many.n_vocab)
            assert np.abs(batched[i] - alone[i]).max() <= 1e-4
        limits = [3, 7, 0, 5, 1, 6]
        together = many.generate(SEQUENCES, limits, [])
        assert together == single.generate(SEQUENCES, limits, [])
        assert [len(reply) for reply in together] == limits
        stop = together[1][2]
        stopped = many.generate(SEQUENCES, limits, [stop])
        for reply, whole in zip(stopped, together, strict=True):
            end = whole.index(stop) + 1 if stop in whole else len(whole)
            assert reply == whole[:end]


@pytest.mark.parametrize("length", [3, 40])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_shared_beginning_is_evaluated_once_and_changes_nothing(layout: str, length: int) -> None:
    rows = [[*range(100, 100 + length), *ids] for ids in SEQUENCES]
    keep, limits = [1, 1, 4, 2, 3, 1], [3, 7, 0, 5, 1, 6]
    with OrtEngine(folder(layout) / "model.onnx", threads=1) as engine:
        fed: list[int] = []
        run = engine._decoder.run

        def counting(ids: np.ndarray, *rest: Any) -> list[np.ndarray]:
            fed.append(ids.size)
            return run(ids, *rest)

        engine._decoder.run = counting  # type: ignore[method-assign]
        together = dict(engine.logits(rows, keep))
        if length > MIN_SHARED:
            assert sum(fed) <= length + len(rows) * max(map(len, SEQUENCES))
        replies = engine.generate(rows, limits, [])
        for i, ids in enumerate(rows):
            ((_, alone),) = engine.logits([ids], [keep[i]])
            assert np.abs(together[i] - alone).max() <= 1e-4
            assert replies[i] == engine.generate([ids], limits[i], [])[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decoding_with_a_cache_is_what_whole_sequences_give(layout: str) -> None:
    """Greedy, from the cache, beside argmax over the whole sequence again and again."""
    with OrtEngine(folder(layout) / "model.onnx", threads=1) as engine:
        replies = engine.generate(SEQUENCES, 5, [])
        for ids, reply in zip(SEQUENCES, replies, strict=True):
            whole = [*ids, *reply]
            (_, logits), *_ = engine.logits([whole], [len(whole)])
            best = logits.argmax(axis=1)
            assert best[len(ids) - 1 : -1].tolist() == reply


def test_logits_are_those_of_a_plain_session() -> None:
    path = folder("builder") / "model.onnx"
    plain = session(path)
    (expected,) = plain.run(["logits"], feeds(plain, [SEQUENCES[0]]))
    with OrtEngine(path, threads=1) as engine:
        _, found = next(iter(engine.logits([SEQUENCES[0]], [5])))
        assert np.array_equal(found, expected[0])


def test_the_log_is_quiet(tmp_path: Path) -> None:
    """A graph with an unused constant makes ONNX Runtime warn; standard error stays empty."""

    def unused(model: onnx.ModelProto) -> None:
        model.graph.initializer.append(
            onnx.numpy_helper.from_array(np.ones(3, np.float32), "unused")
        )

    path = edited(folder("builder"), tmp_path / "base", unused) / "model.onnx"
    code = (
        "import sys; from pathlib import Path; from safegene_runtime.engines.ort import OrtEngine\n"
        "e = OrtEngine(Path(sys.argv[1]), threads=1); print(e.generate([[5, 6]], 2, []))"
    )
    done = subprocess.run([sys.executable, "-c", code, path], env=python_environment(),
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stderr == ""
    assert done.stdout.startswith("[[")


def test_a_refusal_is_an_exception_with_its_reason_and_no_line_of_the_runtimes_own(
    tmp_path: Path,
) -> None:
    def narrow(model: onnx.ModelProto) -> None:
        one = next(n for n in model.graph.node if n.op_type == "GroupQueryAttention")
        next(a for a in one.attribute if a.name == "num_heads").i = 3

    path = edited(folder("builder"), tmp_path / "base", narrow) / "model.onnx"
    code = (
        "import sys; from pathlib import Path; from safegene_runtime.engines.ort import OrtEngine\n"
        "from safegene_runtime.errors import EngineError\n"
        "try: OrtEngine(Path(sys.argv[1]), threads=1).generate([[5, 6]], 2, [])\n"
        "except EngineError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, path], env=python_environment(),
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stderr == ""
    assert "GroupQueryAttention" in done.stdout


def test_it_imports_what_it_says_and_no_more() -> None:
    code = """
import sys
allowed = {"numpy", "onnxruntime", "tokenizers", "jinja2", "markupsafe", "safegene_runtime"}
class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "onnx", "scipy", "llama_cpp", "gguf",
                                  "safegene_converter", "safetensors", "rich"):
            raise ImportError(name)
sys.meta_path.insert(0, Wall())
before = {name.split(".")[0] for name in sys.modules}
from pathlib import Path
from safegene_runtime.engines.chat import render
from safegene_runtime.engines.registry import open_engine
with open_engine(Path(sys.argv[1]), None, threads=1) as engine:
    engine.generate([engine.tokenize("hello", add_special=True)], 2, engine.eog_ids)
    print(engine.detokenize([5]) != "", file=sys.stderr)
found = {name.split(".")[0] for name in sys.modules} - before
found = {n for n in found if n not in sys.stdlib_module_names and not n.startswith("_")}
print(*sorted(found - allowed))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, folder("builder") / "model.onnx"],
        env=python_environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # onnxruntime's own: it imports these where they are installed
    assert set(done.stdout.split()) <= {"flatbuffers", "google", "packaging", "coloredlogs"}


@pytest.mark.parametrize("name", ["model.onnx", "model.onnx.data", "tokenizer.json"])
def test_a_file_that_is_not_the_listed_one_is_refused(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    quick(tiny.peft_adapter("llama", tmp_path / "adapter"), folder("builder"), out, form="merged")
    manifest = read_manifest(out)
    with SealedFiles() as files:
        check_files(manifest, out, sealed=files)
        open_engine(out / "model.onnx", threads=1).close()
    path = out / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with SealedFiles() as files, pytest.raises(ManifestError) as caught:
        check_files(manifest, out, sealed=files)
    assert name in str(caught.value)


def test_weights_swapped_after_opening_change_nothing(tmp_path: Path) -> None:
    """The session holds the bytes that were hashed, not a mapping of the file."""
    shutil.copytree(folder("builder"), tmp_path / "copy")
    path = tmp_path / "copy" / "model.onnx"
    with OrtEngine(path, threads=1) as engine:
        before = engine.generate(SEQUENCES, 4, [])
        _, first = next(iter(engine.logits([SEQUENCES[0]], [5])))
        data = tmp_path / "copy" / "model.onnx.data"
        with data.open("r+b") as file:
            file.write(bytes(data.stat().st_size))
        path.write_bytes(b"")
        _, second = next(iter(engine.logits([SEQUENCES[0]], [5])))
        assert np.array_equal(first, second)
        assert before == engine.generate(SEQUENCES, 4, [])


def test_an_adapter_file_is_verified_too(tmp_path: Path) -> None:
    adapter = tiny.peft_adapter("llama", tmp_path / "adapter", scale=0.1)
    out = tmp_path / "out"
    quick(adapter, folder("builder"), out, form="adapter")
    file = out / "adapter.onnx_adapter"
    with (
        OrtEngine(out / "model.onnx", file, threads=1) as tuned,
        OrtEngine(out / "model.onnx", threads=1) as plain,
    ):
        found = [next(iter(e.logits([SEQUENCES[2]], [1])))[1] for e in (tuned, plain)]
        assert np.abs(found[0] - found[1]).max() > 0.01
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with SealedFiles() as files, pytest.raises(ManifestError, match="onnx_adapter"):
        check_files(read_manifest(out), out, sealed=files)
    file.write_bytes(b"no adapter")
    with pytest.raises(EngineError, match="onnx_adapter"):
        OrtEngine(out / "model.onnx", file, threads=1)


def test_what_cannot_be_fed_is_refused_with_a_reason(tmp_path: Path) -> None:
    def no_logits(model: onnx.ModelProto) -> None:
        kept = [value for value in model.graph.output if value.name != "logits"]
        del model.graph.output[:]
        model.graph.output.extend(kept)

    def other_input(model: onnx.ModelProto) -> None:
        model.graph.input.append(
            onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, [1, 3, 8, 8])
        )

    for name, change in (("logits", no_logits), ("pixels", other_input)):
        path = edited(folder("builder"), tmp_path / name, change) / "model.onnx"
        with pytest.raises(EngineError, match=name):
            OrtEngine(path, threads=1)


def test_logits_of_the_last_token_alone_are_refused(tmp_path: Path) -> None:
    """As the builder's prune_lm_head leaves them: one row, whatever the input's length."""

    def prune(model: onnx.ModelProto) -> None:
        head = next(n for n in model.graph.node if "logits" in n.output)
        at = list(model.graph.node).index(head)
        model.graph.initializer.extend(
            onnx.numpy_helper.from_array(np.array([value], np.int64), f"prune.{name}")
            for name, value in (("start", -1), ("stop", 2**31), ("axis", 1))
        )
        cut = ["prune.start", "prune.stop", "prune.axis"]
        model.graph.node.insert(
            at, onnx.helper.make_node("Slice", [head.input[0], *cut], ["prune.last"])
        )
        model.graph.node[at + 1].input[0] = "prune.last"

    path = edited(folder("builder"), tmp_path / "base", prune) / "model.onnx"
    with OrtEngine(path, threads=1) as engine:
        for call in (
            lambda: list(engine.logits([[5, 6, 7]], [2])),
            lambda: engine.generate([[5, 6, 7]], 2, []),
        ):
            with pytest.raises(EngineError, match="prune_lm_head"):
                call()


def test_mistakes_of_the_caller_are_typed_errors() -> None:
    with OrtEngine(folder("builder") / "model.onnx", threads=1) as engine:
        for call in (
            lambda: list(engine.logits([[]], [1])),
            lambda: list(engine.logits([[5]], [2])),
            lambda: list(engine.logits([[5]], [])),
            lambda: list(engine.logits([[engine.n_vocab]], [1])),
            lambda: list(engine.logits([[-1]], [1])),
            lambda: engine.generate([[5]], -1, []),
        ):
            with pytest.raises(EngineError):
                call()
        for call in (  # ONNX Runtime fails on these by itself, less clearly
            lambda: list(engine.logits([[5] * 1025], [1])),
            lambda: engine.generate([[5] * 1020], 10, []),
        ):
            with pytest.raises(EngineError, match="at most 1024 ids"):
                call()
    with pytest.raises(EngineError, match="closed"):
        list(engine.logits([[5]], [1]))
    for threads in (0, 100_000):
        with pytest.raises(SafeGeneError, match="threads"):
            OrtEngine(folder("builder") / "model.onnx", threads=threads)
