"""What a GGUF header says of its linear weights: counted by gguf-py as well, or refused."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
import pytest
import tiny

from safegene import convert
from safegene_converter.gguf.writer import OutTensor, write_gguf
from safegene_runtime.artifact.integrity import model_precision
from safegene_runtime.errors import FormatError, UnsupportedError
from safegene_runtime.formats.gguf.model import open_model
from safegene_runtime.formats.gguf.types import GGMLType, Value, ValueType, nbytes
from safegene_runtime.formats.gguf.weights import elements_by_type, head_counts

Tensor = tuple[str, tuple[int, ...], str]


def saved(path: Path, tensors: Sequence[Tensor], **metadata: Value) -> Path:
    """A GGUF of zeros."""
    write_gguf(
        path,
        {"general.architecture": Value(ValueType.STRING, "llama"), **metadata},
        [
            OutTensor(
                name, shape, GGMLType[kind], np.zeros(nbytes(shape, GGMLType[kind]), np.uint8)
            )
            for name, shape, kind in tensors
        ],
    )
    return path


Q4: Tensor = ("blk.0.ffn_up.weight", (32, 32), "Q4_0")


@pytest.mark.parametrize("path", [tiny.smollm2_gguf, lambda: tiny.gguf_model("qwen3")])
def test_weights_of_the_blocks_are_counted_as_gguf_py_counts_them(path: object) -> None:
    model = path()  # type: ignore[operator]
    theirs: Counter[str] = Counter()
    for tensor in gguf.GGUFReader(str(model)).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) > 1:
            theirs[tensor.tensor_type.name] += int(tensor.n_elements)
    assert elements_by_type(open_model(model).tensors.values()) == dict(theirs)


@pytest.mark.parametrize(
    "others",
    [
        [("blk.0.attn_norm.weight", (99_999,), "F32")],
        [("token_embd.weight", (9999, 32), "F32")],
        [("output.weight", (9999, 32), "F32")],
    ],
)
def test_neither_norms_nor_embeddings_nor_the_head_are_weights_of_a_block(
    others: list[Tensor], tmp_path: Path
) -> None:
    assert model_precision(open_model(saved(tmp_path / "m.gguf", [Q4, *others]))) == "4-bit"


def test_experts_count(tmp_path: Path) -> None:
    experts: Tensor = ("blk.0.ffn_up_exps.weight", (8, 32, 256), "Q2_K")
    assert model_precision(open_model(saved(tmp_path / "m.gguf", [Q4, experts]))) == "low-bit"


@pytest.mark.parametrize("kind", ["F64", "I8", "I32"])
def test_a_type_that_has_no_bounds_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    path = saved(tmp_path / "m.gguf", [Q4, ("blk.0.ffn_down.weight", (2, 2), kind)])
    with pytest.raises(UnsupportedError, match=rf"m\.gguf: precision.*{kind}"):
        model_precision(open_model(path))


def test_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.gguf", [("enc.blk.0.ffn_up.weight", (32, 32), "F32")])
    with pytest.raises(UnsupportedError, match=r"m\.gguf: precision.*linear weights"):
        model_precision(open_model(path))


def test_nothing_is_folded_into_a_base_of_unknown_precision(tmp_path: Path) -> None:
    adapter = tiny.peft_adapter("llama", tmp_path / "adapter")
    base = open_model(tiny.gguf_model("llama"))
    tensors = [OutTensor(i.name, i.shape, i.type, i) for i in base.tensors.values()]
    odd = OutTensor("blk.0.odd.weight", (2, 2), GGMLType.F64, np.zeros(32, np.uint8))
    write_gguf(tmp_path / "base.gguf", dict(base.metadata), [*tensors, odd])
    for form in ("merged", "sidecar"):
        stages: list[str] = []
        with pytest.raises(UnsupportedError, match="F64"):
            convert(
                adapter, tmp_path / "base.gguf", tmp_path / "out", form=form,  # type: ignore[arg-type]
                progress=lambda stage, done, total: stages.append(stage),  # noqa: B023
            )  # fmt: skip
        assert not {"merging", "writing the sidecar"} & set(stages), "before the work"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("architecture", tiny.ARCHITECTURES)
def test_head_counts_are_those_of_the_model(architecture: str) -> None:
    assert head_counts(open_model(tiny.gguf_model(architecture))) == (tiny.N_HEAD, tiny.N_HEAD_KV)


def number(value: object, kind: ValueType = ValueType.UINT32) -> Value:
    return Value(ValueType.ARRAY, value, kind) if isinstance(value, tuple) else Value(kind, value)


def test_without_a_count_of_its_own_every_query_head_has_a_key(tmp_path: Path) -> None:
    path = saved(tmp_path / "m.gguf", [Q4], **{"llama.attention.head_count": number((4, 4))})
    assert head_counts(open_model(path)) == (4, 4)


def test_head_counts_that_are_none_are_all_named(tmp_path: Path) -> None:
    key = "llama.attention.head_count"
    wrong = {key: number((4, 2)), f"{key}_kv": number(0)}
    with pytest.raises(FormatError) as caught:
        head_counts(open_model(saved(tmp_path / "m.gguf", [Q4], **wrong)))
    assert [problem.field for problem in caught.value.problems] == [key, f"{key}_kv"]
