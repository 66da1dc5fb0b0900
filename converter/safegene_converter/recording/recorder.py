"""Records what PyTorch + PEFT answer: the reference that every artifact is measured against.

The adapter must change the logits, before anything is recorded: PEFT serves the base where it did not
understand an adapter.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from safegene_converter.inputs.adapter import Adapter, check_base_fits, read_adapter
from safegene_converter.inputs.base import Base, open_base
from safegene_converter.recording.base_logits import prove_gguf
from safegene_converter.recording.chat_text import encode, render
from safegene_converter.recording.greedy import (
    batches,
    begin,
    follow,
    generate,
    prefill,
    shared_length,
)
from safegene_converter.recording.loading import load_with_adapter, read_factors, stop_ids_of
from safegene_converter.recording.near_duplicates import cluster_names
from safegene_converter.requests import RecordRequest
from safegene_runtime import __version__
from safegene_runtime.engines.chat import READS_CLOCK
from safegene_runtime.errors import FormatError, Problem, Problems, RecordError
from safegene_runtime.formats.files import sha256_of
from safegene_runtime.formats.publish import check_output_free, publish_folder
from safegene_runtime.judging.judge import Judge, about, label_all
from safegene_runtime.progress import Progress, silent
from safegene_runtime.record.attacks import wrap
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

__all__ = ["record"]

Arms = tuple[list[int], list[int], Positions]
"""Of one prompt: the reference's reply, the base's, and the logits along the reference's."""


def record(request: RecordRequest, progress: Progress | None = None) -> Reference:
    """Records a reference folder.

    Args:
        request: what is wanted.
        progress: told what is being done.

    Raises:
        SafeGeneError: nothing is left under the name `out`. RecordError: the adapter has no effect
            in PyTorch, or an attack adds control tokens; FormatError: an unknown attack, or one
            that applies to no prompt; AdapterError: PEFT ignored a part of it; EngineError: the chat
            template failed.
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
    if base.model is not None:
        with _arm(model, "base"):
            prove_gguf(base, model, tokenizer, tell)
    now = (request.now or datetime.now()).replace(microsecond=0, tzinfo=None)
    rendered = render(tokenizer, [prompt.text for prompt in chosen], now)
    ids = [encode(tokenizer, text) for text in rendered]
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
            prompt_ids=ids[index],
            ref_ids=tuple(arms[index][0]),
            ref_text=texts["ref"][index],
            ref_label=str(labels["ref"][index]),
            base_ids=tuple(arms[index][1]),
            base_text=texts["base"][index],
            base_label=str(labels["base"][index]),
        )
        for index, prompt in enumerate(chosen)
    ]
    positions = [stored for _, _, stored in arms]
    meta = _meta(adapter, base, tokenizer, judge, stop_ids, max_new_tokens, top_k)
    if READS_CLOCK in tokenizer.chat_template:
        meta["tokenizer"]["rendered_at"] = now.isoformat()
    added = read_factors(model)
    with publish_folder(request.out, request.force) as folder:
        for name, data in encode_reference(meta, records, positions, openers, added).items():
            (folder / name).write_bytes(data)
    return read_reference(out)


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
    shared = shared_length(model, ids, limit)
    found: dict[int, Arms] = {}
    caches = {}
    firsts: Any = None
    for arm in ("ref", "base"):
        with _arm(model, arm):
            caches[arm] = prefill(model, ids[0][:shared])
    for batch in batches(model, ids):
        tails = [ids[index][shared:] for index in batch]
        with _arm(model, "ref"):
            begun = begin(model, caches["ref"], tails)
            ref_ids, ref_logits = generate(model, begun, limit, stop_ids)
        with _arm(model, "base"):
            begun = begin(model, caches["base"], tails)
            base_logits = follow(model, begun, ref_ids)
            base_ids, _ = generate(model, begun, limit, stop_ids, keep=False)
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


@contextlib.contextmanager
def _arm(model: Any, arm: str) -> Iterator[None]:
    if arm == "ref":
        yield
    else:
        with model.disable_adapter():
            yield


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
