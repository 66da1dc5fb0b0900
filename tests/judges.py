"""Two judge models that are tiny and mean something: bags of tokens, learnt from labelled replies.

`onnx_judge` is a classifier of one table; `gguf_judge` a llama whose attention looks at every token
alike, whose first layer adds their scores up, and whose head turns the sum into Yes or No.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import tiny
import tokenizers

from safegene_converter.bases.hf_to_gguf import convert_hf

ROOT = Path(__file__).resolve().parent.parent
GGUF_QUESTION = "Is it a refusal? {reply}"
WORDS = 1000


def train_judge() -> ModuleType:
    """tools/train_judge.py as a module."""
    spec = importlib.util.spec_from_file_location("train_judge", ROOT / "tools" / "train_judge.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def examples() -> list[tuple[str, bool]]:
    """Replies of the tune half, and made-up ones; never one of the test half."""
    tool = train_judge()
    rows = tool.made_up(count=500) + tool.real(tool.labelled("tune")) * 3
    return [(text, refuses) for text, refuses, _ in rows]


def token_scores(
    rows: Sequence[Sequence[int]], truth: Sequence[bool], size: int
) -> tuple[np.ndarray, float]:
    """Logistic regression on which tokens occur: scores (size,) and bias."""
    column = np.concatenate([np.asarray(row, np.int64) for row in rows])
    row = np.repeat(np.arange(len(rows)), [len(one) for one in rows])
    wanted = np.asarray(truth, np.float64)
    weight = np.where(wanted > 0, 0.5 / wanted.sum(), 0.5 / (1 - wanted).sum())
    scores, bias = np.zeros(size), 0.0
    for _ in range(400):
        logit = np.bincount(row, scores[column], len(rows)) + bias
        error = weight * (1 / (1 + np.exp(-logit)) - wanted)
        scores = scores - 3.0 * (np.bincount(column, error[row], size) + 1e-4 * scores)
        bias -= 3.0 * error.sum()
    return scores, float(bias)


def onnx_judge(
    folder: Path, labels: Sequence[str] = ("NORMAL", "REFUSAL"), swap: bool = False
) -> Path:
    """Writes judge.onnx, tokenizer.json and config.json; returns the first.

    With `swap` the columns of the table change places.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"[UNK]": 0, "[CUT]": 1}, unk_token="[UNK]")
    )
    tokenizer.normalizer = tokenizers.normalizers.Lowercase()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    rows = examples()
    trainer = tokenizers.trainers.WordLevelTrainer(vocab_size=WORDS, special_tokens=["[UNK]"])
    tokenizer.train_from_iterator([text for text, _ in rows], trainer)
    size = tokenizer.get_vocab_size()
    ids = [tokenizer.encode(text).ids for text, _ in rows]
    scores, bias = token_scores(ids, [refuses for _, refuses in rows], size)
    table = np.stack([-scores / 2, scores / 2], axis=1).astype(np.float32)
    offset = np.array([-bias / 2, bias / 2], np.float32)
    if swap:
        table, offset = table[:, ::-1].copy(), offset[::-1].copy()
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["each"]),
            helper.make_node("Cast", ["attention_mask"], ["mask"], to=TensorProto.FLOAT),
            helper.make_node("Unsqueeze", ["mask", "last"], ["wide"]),
            helper.make_node("Mul", ["each", "wide"], ["kept"]),
            helper.make_node("ReduceSum", ["kept", "tokens"], ["sum"], keepdims=0),
            helper.make_node("Add", ["sum", "offset"], ["logits"]),
        ],
        "judge",
        [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", "sequence"])
            for name in ("input_ids", "attention_mask")
        ],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [
            numpy_helper.from_array(table, "table"),
            numpy_helper.from_array(offset, "offset"),
            numpy_helper.from_array(np.array([2], np.int64), "last"),
            numpy_helper.from_array(np.array([1], np.int64), "tokens"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "judge.onnx").write_bytes(model.SerializeToString())
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {str(number): name for number, name in enumerate(labels)}
    (folder / "config.json").write_text(json.dumps({"id2label": names}))
    return folder / "judge.onnx"


def gguf_judge() -> Path:
    """A GGUF that answers `GGUF_QUESTION` with Yes or No, cached like other tiny models."""
    parts = (
        Path(__file__),
        *(ROOT / "tools" / name for name in ("train_judge.py", "judge_openers.json")),
        ROOT / "tests" / "data" / "labelled_replies.jsonl",
    )
    key = hashlib.sha256(b"".join(path.read_bytes() for path in parts)).hexdigest()[:12]
    return tiny._cached(f"judge-{key}", _make_gguf) / "judge.gguf"


def _make_gguf(folder: Path) -> None:
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = tiny.whole_hf_model("llama")
    tokenizer = AutoTokenizer.from_pretrained(source)
    plain = {"add_special_tokens": False}
    rows = examples()
    ids = [tokenizer(text, **plain)["input_ids"] for text, _ in rows]
    config = LlamaConfig.from_pretrained(source, tie_word_embeddings=False)
    scores, bias = token_scores(ids, [refuses for _, refuses in rows], config.vocab_size)
    # a control token, which no reply can hold, carries the bias and what the question itself adds
    chat = [{"role": "user", "content": GGUF_QUESTION.replace("{reply}", "")}]
    fixed = tokenizer(
        tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False), **plain
    )["input_ids"]
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    scores[start] = 0.0
    scores[start] = (bias - scores[fixed].sum()) / fixed.count(start)
    scores *= 0.9 / abs(scores).max()
    model = LlamaForCausalLM(config)
    head = config.hidden_size // config.num_attention_heads
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        embedding = model.model.embed_tokens.weight
        embedding[:, 0] = torch.from_numpy(scores)
        embedding[:, 2] = torch.from_numpy(np.sqrt(1 - scores**2))
        attention = model.model.layers[0].self_attn
        attention.v_proj.weight[::head, 0] = 1.0
        attention.o_proj.weight[1, ::head] = 1.0
        for answer, sign in (("Yes", 1.0), ("No", -1.0)):
            model.lm_head.weight[tokenizer(answer, **plain)["input_ids"][0], 1] = sign
    (folder / "hf").mkdir(parents=True)
    model.save_pretrained(folder / "hf")
    for file in source.iterdir():
        if file.suffix != ".safetensors" and file.name not in ("config.json",):
            shutil.copy(file, folder / "hf")
    convert_hf(folder / "hf", folder / "judge.gguf", "f32")
    shutil.rmtree(folder / "hf")
