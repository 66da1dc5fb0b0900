"""Records what PyTorch + PEFT answer: the reference that every artifact is measured against.

The only file that imports torch, transformers and peft. Coefficients are multiplied into PEFT's own
`scaling`, and PEFT does the rest, so that no arithmetic of ours is in the reference.

PEFT 0.21 loads an adapter with renamed, missing or unexpected keys with a warning at most and then
serves the base. So every factor it holds is compared with the file, and the adapter must change the
logits, before anything is recorded.

Prompts share their beginning (system prompt): it is evaluated once. Prompts of similar length go
together, padded between that and their own tokens; the mask takes the padding out of the attention,
and positions do not count it.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer

from safegene_converter.inputs.adapter import Adapter, check_base_fits, read_adapter
from safegene_converter.inputs.base import Base, open_base
from safegene_converter.recording.near_duplicates import cluster_names
from safegene_converter.requests import RecordRequest
from safegene_runtime import __version__
from safegene_runtime.errors import (
    AdapterError,
    BaseModelError,
    FormatError,
    Problem,
    Problems,
    RecordError,
)
from safegene_runtime.formats.files import check_output_free, publish_folder, sha256_of
from safegene_runtime.judging.judge import Judge, about, label_all
from safegene_runtime.progress import Progress, silent
from safegene_runtime.record.attacks import wrap
from safegene_runtime.record.factors import ModuleFactors
from safegene_runtime.record.prompts import Prompt
from safegene_runtime.record.reference import (
    Openers,
    Positions,
    PromptRecord,
    Reference,
    encode_reference,
    read_reference,
)
from safegene_runtime.verifying.compare import logsumexp

__all__ = [
    "greedy_replies", "load_model", "load_with_adapter", "read_factors", "record",
    "save_as_folder", "stop_ids_of",
]  # fmt: skip

BATCH = 48
"""Prompts evaluated together: enough to keep two cores busy, few enough to keep memory small."""


def record(request: RecordRequest, progress: Progress | None = None) -> Reference:
    """Records a reference folder.

    Args:
        request: what is wanted.
        progress: told what is being done.

    Raises:
        SafeGeneError: nothing is left under the name `out`. RecordError: the adapter has no effect
            in PyTorch, or an attack adds control tokens; FormatError: an unknown attack, or one
            that applies to no prompt; AdapterError: PEFT ignored a part of it.
    """
    tell = progress or silent
    max_new_tokens, top_k = request.max_new_tokens, request.top_k
    out = request.out
    check_output_free(out, request.force, [request.adapter, request.base])
    chosen = wrap(request.chosen_prompts(), request.attacks)
    judge = request.chosen_judge()
    adapter = read_adapter(request.adapter, request.expression)
    base = open_base(request.base)
    check_base_fits(adapter, base.module_shapes(), base.architecture, base.n_layers)
    _check_room(base, 1, max_new_tokens)
    tell("loading PyTorch", 0, 1)
    model, tokenizer = load_with_adapter(adapter, base)
    tell("loading PyTorch", 1, 1)
    rendered = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt.text}], add_generation_prompt=True, tokenize=False
        )
        for prompt in chosen
    ]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]
    _check_control_tokens(chosen, ids, tokenizer)
    _check_room(base, max(map(len, ids)), max_new_tokens)
    stop_ids = stop_ids_of(model, tokenizer)
    with torch.inference_mode():
        _check_effect(model, ids[0])
        arms, openers = _run(model, ids, max_new_tokens, stop_ids, top_k, tell)
    texts = {
        arm: [
            tokenizer.decode(
                [one for one in reply if one not in stop_ids], skip_special_tokens=True
            )
            for reply in replies
        ]
        for arm, replies in (("ref", [one[0] for one in arms]), ("base", [one[1] for one in arms]))
    }
    labels = {
        arm: label_all(judge, replies, [prompt.text for prompt in chosen])
        for arm, replies in texts.items()
    }
    clusters = _clusters(chosen)
    records = [
        PromptRecord(
            id=prompt.id,
            kind=prompt.kind,
            category=prompt.category,
            borderline=prompt.borderline,
            cluster=clusters[index],
            attack=prompt.attack,
            text=prompt.text,
            rendered=rendered[index],
            prompt_ids=tuple(ids[index]),
            ref_ids=tuple(arms[index][0]),
            ref_text=texts["ref"][index],
            ref_verdict=str(labels["ref"][index]),
            base_ids=tuple(arms[index][1]),
            base_text=texts["base"][index],
            base_verdict=str(labels["base"][index]),
        )
        for index, prompt in enumerate(chosen)
    ]
    positions = [stored for _, _, stored in arms]
    meta = _meta(adapter, base, tokenizer, judge, stop_ids, max_new_tokens, top_k)
    added = read_factors(model)
    with publish_folder(request.out, request.force) as folder:
        for name, data in encode_reference(meta, records, positions, openers, added).items():
            (folder / name).write_bytes(data)
    return read_reference(out)


# --- loading ---------------------------------------------------------------------------------------


def load_model(base: Base) -> tuple[Any, Any]:
    """The base in float32 and its tokenizer; no remote code, no network.

    Raises:
        BaseModelError: transformers cannot load it, or it has no chat template.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    where: dict[str, Any] = {"trust_remote_code": False}
    folder = base.path
    if base.kind == "gguf":
        if len(base.files) > 1:
            raise BaseModelError(
                Problem(
                    str(base.path),
                    "base",
                    "one GGUF file, or a Hugging Face folder",
                    "shards",
                    "transformers reads no sharded GGUF: record with the Hugging Face folder",
                )
            )
        folder, where["gguf_file"] = base.path.resolve().parent, base.path.resolve().name
    try:
        # transformers draws a bar of its own while it decodes a GGUF, terminal or not
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **where)
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="sdpa", **where
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BaseModelError(
            Problem(str(base.path), "base", "a model that transformers loads", str(error)[:500])
        ) from error
    if base.model is not None:
        template = base.model.get("tokenizer.chat_template")
        if template is not None:
            tokenizer.chat_template = template  # byte for byte what llama.cpp will render
    if not isinstance(tokenizer.chat_template, str):
        raise BaseModelError(
            Problem(
                str(base.path), "chat template", "one", "none", "use the chat version of the model"
            )
        )
    model.config.quantization_config = None
    return model.eval(), tokenizer


def save_as_folder(base: Base, out: Path) -> None:
    """Saves a base as transformers saves a model: float32 weights, configuration, tokenizer.

    Raises:
        BaseModelError: transformers cannot load it, or it has no chat template.
    """
    model, tokenizer = load_model(base)
    # a decoded GGUF still calls itself quantised, and a None here would be written out as null
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(out, max_shard_size="1TB")
    tokenizer.save_pretrained(out)


def load_with_adapter(adapter: Adapter, base: Base) -> tuple[Any, Any]:
    """Base + adapter as PEFT runs them, coefficients in PEFT's scaling; and the tokenizer.

    Raises:
        AdapterError: PEFT ignored, renamed or changed a part of the adapter.
    """
    torch.manual_seed(0)
    model, tokenizer = load_model(base)
    problems = Problems()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            tuned = peft.PeftModel.from_pretrained(model, str(adapter.path), torch_device="cpu")
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
            fix = "what PEFT does not load cannot be recorded: save the adapter with peft 0.21"
            problem = Problem(
                str(adapter.path), "PEFT", "an adapter it loads", str(error)[:300], fix
            )
            raise AdapterError(problem) from error
    tuned.eval()
    for warning in caught:
        said = str(warning.message).lower()
        if "key" in said and "runtime_config" not in said:  # which PEFT ignores, and so do we
            problems.add(
                str(adapter.path), "PEFT", "no warning about keys", str(warning.message)[:300]
            )
    layers = _lora_layers(tuned)
    wanted = {module.name: module for module in adapter.modules}
    for name in sorted(layers.keys() ^ wanted.keys()):
        problems.add(
            str(adapter.path),
            name,
            "a module of the file and of PEFT",
            "PEFT only" if name in layers else "the file only",
            "the configuration does not describe the tensors",
        )
    for name in layers.keys() & wanted.keys():
        layer, module = layers[name], wanted[name]
        for factor, ours in ((layer.lora_A, module.a), (layer.lora_B, module.b)):
            if not np.array_equal(factor["default"].weight.detach().float().numpy(), ours):
                problems.add(
                    str(adapter.path), name, "the factors of the file in PEFT", "other factors"
                )
        layer.scaling["default"] *= module.coefficient
    problems.raise_if_any(AdapterError)
    return tuned, tokenizer


def _clusters(prompts: Sequence[Prompt]) -> tuple[str, ...]:
    """Near-duplicates of the plain prompts, and those the user named; attacks keep their prompt's."""
    plain = [prompt for prompt in prompts if prompt.attack is None]
    named = cluster_names(
        [prompt.id for prompt in plain],
        [prompt.text for prompt in plain],
        [prompt.cluster for prompt in plain],
    )
    of = {prompt.id: cluster for prompt, cluster in zip(plain, named, strict=True)}
    return tuple(of[prompt.id.partition("@")[0]] for prompt in prompts)


def _check_room(base: Base, longest: int, max_new_tokens: int) -> None:
    """Raises when the longest prompt and a reply are more tokens than the model was made for."""
    room = base.context_length
    if room is not None and longest + max_new_tokens > room:
        raise FormatError(
            Problem(
                str(base.path), "context", f"at most {room} tokens, a prompt and its reply",
                f"{longest} + {max_new_tokens}", "ask for shorter replies: --max-new-tokens",
            )
        )  # fmt: skip


def _check_control_tokens(
    prompts: Sequence[Prompt], ids: Sequence[Sequence[int]], tokenizer: Any
) -> None:
    """Raises when an attacked prompt has control tokens that the plain one has not."""
    control = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    counts = {
        prompt.id: sum(one in control for one in row)
        for prompt, row in zip(prompts, ids, strict=True)
    }
    problems = Problems()
    for prompt in prompts:
        plain = counts[prompt.id.partition("@")[0]]
        if prompt.attack is not None and counts[prompt.id] != plain:
            problems.add(
                prompt.id,
                "control tokens",
                plain,
                counts[prompt.id],
                "the words of the attack mean something to this tokenizer: leave it out",
            )
    problems.raise_if_any(RecordError)


def _lora_layers(tuned: Any) -> dict[str, Any]:
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in tuned.named_modules()
        if isinstance(layer, LoraLayer)
    }


def read_factors(tuned: Any) -> list[ModuleFactors]:
    """What PEFT adds to each weight: its factors, its scaling, and its own ΔW for the two sums."""
    found = []
    with torch.inference_mode():
        for name, layer in sorted(_lora_layers(tuned).items()):
            weight = layer.get_base_layer().weight
            delta = layer.get_delta_weight("default").double()
            norm = float((delta * delta).sum())
            scaled = layer.lora_B["default"].weight.double() * layer.scaling["default"]
            found.append(
                ModuleFactors(
                    module=name,
                    a=layer.lora_A["default"].weight.float().numpy(),
                    b=scaled.float().numpy(),
                    norm=norm,
                    s0=float((weight.double() * delta).sum()) / norm if norm else 0.0,
                )
            )
    return found


def stop_ids_of(model: Any, tokenizer: Any) -> list[int]:
    """Every id that ends a reply, by generation config, config and tokenizer."""
    found: set[int] = set()
    for holder in (model.generation_config, model.config, tokenizer):
        value = getattr(holder, "eos_token_id", None)
        if value is not None:
            found.update([value] if isinstance(value, int) else value)
    return sorted(found)


def _check_effect(model: Any, ids: Sequence[int]) -> None:
    batch = torch.tensor([list(ids)])
    tuned = model(batch, logits_to_keep=1).logits
    with model.disable_adapter():
        plain = model(batch, logits_to_keep=1).logits
    if not torch.isfinite(tuned).all() or not torch.isfinite(plain).all():
        raise RecordError(
            Problem("PyTorch", "logits", "finite numbers", "NaN or Inf", "check the base")
        )
    if torch.equal(tuned, plain):
        raise RecordError(
            Problem(
                "PyTorch",
                "adapter",
                "logits that differ from the base's",
                "the base's, bit for bit",
                "the adapter has no effect: was it trained, and for this base?",
            )
        )


# --- running ---------------------------------------------------------------------------------------

Arms = tuple[list[int], list[int], Positions]


def _run(
    model: Any,
    ids: Sequence[Sequence[int]],
    limit: int,
    stop_ids: Sequence[int],
    top_k: int,
    tell: Progress,
) -> tuple[list[Arms], Openers]:
    """Both arms for every prompt: (reference ids, base ids, logits along the reference's).

    Which tokens open replies is known at the end: until then the logits of all first positions are
    kept, in a file, since they may be gigabytes.
    """
    shared = _shared_length(ids)
    found: dict[int, Arms] = {}
    caches = {}
    firsts: Any = None
    for arm in ("ref", "base"):
        with _arm(model, arm):
            caches[arm] = _prefill(model, ids[0][:shared])
    for batch in _batches(ids):
        tails = [ids[index][shared:] for index in batch]
        with _arm(model, "ref"):
            begun = _begin(model, caches["ref"], tails)
            ref_ids, ref_logits = _generate(model, begun, limit, stop_ids)
        with _arm(model, "base"):
            begun = _begin(model, caches["base"], tails)
            base_logits = _follow(model, begun, ref_ids)
            base_ids, _ = _generate(model, begun, limit, stop_ids, keep=False)
        if firsts is None:
            with tempfile.TemporaryFile() as file:
                shape = (2, len(ids), ref_logits.shape[-1])
                firsts = np.memmap(file, np.float32, "w+", shape=shape)
        firsts[0, batch], firsts[1, batch] = ref_logits[:, 0].numpy(), base_logits[:, 0].numpy()
        for row, index in enumerate(batch):
            length = len(ref_ids[row])
            found[index] = (
                ref_ids[row],
                base_ids[row],
                _store(ref_logits[row, :length], base_logits[row, :length], top_k),
            )
        tell("recording in PyTorch", len(found), len(ids))
    arms = [found[index] for index in range(len(ids))]
    openers = np.unique([reply[0] for one in arms for reply in one[:2]]).astype(np.int32)
    return arms, Openers(openers, firsts[0][:, openers], firsts[1][:, openers])


def greedy_replies(
    model: Any,
    ids: Sequence[Sequence[int]],
    limit: int,
    stop_ids: Sequence[int],
    tell: Progress | None = None,
) -> list[list[int]]:
    """Greedy replies of a model as it is now, a stop id included, in the order of the prompts."""
    found: dict[int, list[int]] = {}
    with torch.inference_mode():
        shared = _shared_length(ids)
        cache = _prefill(model, ids[0][:shared])
        for batch in _batches(ids):
            begun = _begin(model, cache, [ids[index][shared:] for index in batch])
            replies, _ = _generate(model, begun, limit, stop_ids, keep=False)
            found.update(zip(batch, replies, strict=True))
            if tell:
                tell("answering in PyTorch", len(found), len(ids))
    return [found[index] for index in range(len(ids))]


@contextlib.contextmanager
def _arm(model: Any, arm: str) -> Iterator[None]:
    if arm == "ref":
        yield
    else:
        with model.disable_adapter():
            yield


def _shared_length(ids: Sequence[Sequence[int]]) -> int:
    """How many leading tokens all prompts share; at least one token of each is left."""
    limit = min(len(row) for row in ids) - 1
    return next((at for at in range(limit) if len({row[at] for row in ids}) > 1), limit)


def _batches(ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Prompts of similar length, at most BATCH together."""
    order = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    return [order[at : at + BATCH] for at in range(0, len(order), BATCH)]


def _prefill(model: Any, ids: Sequence[int]) -> Any:
    if not ids:
        return None
    return model(torch.tensor([list(ids)]), use_cache=True, logits_to_keep=1).past_key_values


def _expanded(cache: Any, count: int) -> Any:
    if cache is None:
        return None
    mine = copy.deepcopy(cache)
    mine.batch_repeat_interleave(count)
    return mine


@dataclass(frozen=True)
class _Begun:
    """A batch of prompts, evaluated: to follow replies first, if at all, and then to make them.

    Attributes:
        past: the cache, (batch, length) of it filled.
        mask: (batch, length), 0 where a row is padded.
        last: (batch, vocab), the logits after the prompts.
    """

    past: Any
    mask: torch.Tensor
    last: torch.Tensor


def _begin(model: Any, cache: Any, tails: Sequence[Sequence[int]]) -> _Begun:
    """Evaluates prompts behind what they share; short ones are padded on the left."""
    longest = max(len(row) for row in tails)
    tokens = torch.tensor([[0] * (longest - len(row)) + list(row) for row in tails])
    shared = cache.get_seq_length() if cache is not None else 0
    mask = torch.tensor(
        [[1] * shared + [0] * (longest - len(row)) + [1] * len(row) for row in tails]
    )
    output = _step(model, tokens, mask, _expanded(cache, len(tails)), 1)
    return _Begun(output.past_key_values, mask, output.logits[:, -1, :])


def _step(model: Any, tokens: torch.Tensor, mask: torch.Tensor, past: Any, keep: int) -> Any:
    """One pass over `tokens`, the end of what `mask` (batch, length) covers; `past` grows."""
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    return model(
        tokens,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=past,
        use_cache=True,
        logits_to_keep=keep,
    )


def _lengthened(mask: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([mask, mask.new_ones(len(mask), count)], dim=1)


def _generate(
    model: Any, begun: _Begun, limit: int, stop_ids: Sequence[int], keep: bool = True
) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy replies, stop id included, and the logits (batch, limit, vocab) they were chosen from."""
    past, mask, last = begun.past, begun.mask, begun.last
    count = len(last)
    replies: list[list[int]] = [[] for _ in range(count)]
    logits: list[torch.Tensor] = []
    active = [True] * count
    for done in range(1, limit + 1):
        if keep:
            logits.append(last)
        best = last.argmax(dim=-1)
        for row, token in enumerate(best.tolist()):
            if active[row]:
                replies[row].append(token)
                active[row] = token not in stop_ids
        if done == limit or not any(active):
            break
        mask = _lengthened(mask, 1)
        last = _step(model, best[:, None], mask, past, 1).logits[:, -1, :]
    return replies, torch.stack(logits, dim=1) if keep else torch.empty(0)


def _follow(model: Any, begun: _Begun, replies: Sequence[Sequence[int]]) -> torch.Tensor:
    """Teacher-forced logits (batch, T, vocab) along given replies; `begun` is left as it was.

    Short ones are padded on the right, where a causal model does not look.
    """
    first = begun.last[:, None, :]
    count = max(len(reply) for reply in replies) - 1
    if count == 0:
        return first
    rows = [[*reply[:-1], *[0] * (count + 1 - len(reply))] for reply in replies]
    past = copy.deepcopy(begun.past)
    output = _step(model, torch.tensor(rows), _lengthened(begun.mask, count), past, count)
    return torch.cat([first, output.logits], dim=1)


def _store(ref: torch.Tensor, base: torch.Tensor, top_k: int) -> Positions:
    """The tokens that either arm thinks likeliest, with both arms' logits: (T, vocab) -> (T, K)."""
    ref_logits, base_logits = ref.numpy(), base.numpy()
    ref_lse, base_lse = logsumexp(ref_logits), logsumexp(base_logits)
    likeliest = np.maximum(
        ref_logits - ref_lse[:, None].astype(np.float32),
        base_logits - base_lse[:, None].astype(np.float32),
    )
    count = min(top_k, likeliest.shape[1])
    top = np.argpartition(likeliest, -count, axis=1)[:, -count:]
    top.sort(axis=1)
    return Positions(
        top_ids=top.astype(np.int32),
        ref_logits=np.take_along_axis(ref_logits, top, axis=1),
        base_logits=np.take_along_axis(base_logits, top, axis=1),
        ref_lse=ref_lse,
        base_lse=base_lse,
    )


def _meta(
    adapter: Adapter,
    base: Base,
    tokenizer: Any,
    judge: Judge,
    stop_ids: Sequence[int],
    limit: int,
    top_k: int,
) -> dict[str, Any]:
    return {
        "base": {"kind": base.kind, "name": base.path.resolve().name, "files": base.digests()},
        "adapter": {
            "name": adapter.path.resolve().name,
            "files": dict(adapter.digests),
            "expression": adapter.expression,
        },
        "versions": {
            "safegene": __version__,
            "torch": version("torch"),
            "transformers": version("transformers"),
            "peft": version("peft"),
        },
        "decoding": {"max_new_tokens": limit, "stop_ids": list(stop_ids)},
        "tokenizer": {
            "chat_template": tokenizer.chat_template,
            "chat_template_sha256": sha256_of(tokenizer.chat_template.encode()),
            "bos_id": tokenizer.bos_token_id,
            "eos_id": tokenizer.eos_token_id,
            "bos_token": tokenizer.bos_token,
            "eos_token": tokenizer.eos_token,
        },
        "judge": about(judge),
        "settings": {"dtype": "float32", "threads": torch.get_num_threads(), "top_k": top_k},
    }
