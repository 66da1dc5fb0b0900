"""The rung `text`: the artifact is asked what the reference was asked, id for id."""

from __future__ import annotations

from datetime import datetime

from safegene_runtime.engines.chat import render_all
from safegene_runtime.engines.engine import Engine
from safegene_runtime.formats.files import sha256_of
from safegene_runtime.record.reference import Reference
from safegene_runtime.verifying.report import Rung

__all__ = ["compare_text"]


def compare_text(engine: Engine, record: Reference) -> Rung:
    """Template byte for byte, rendered prompts and token ids one by one, BOS never twice."""
    meta = record.meta["tokenizer"]
    template = engine.chat_template()
    if template is None:
        return Rung("text", "broken", "the artifact has no chat template")
    if template != meta["chat_template"]:
        return Rung(
            "text",
            "broken",
            "the chat template is not the reference's, byte for byte",
            {
                "expected_sha256": meta["chat_template_sha256"],
                "got_sha256": sha256_of(template.encode("utf-8", "surrogateescape")),
            },
        )
    chats = [[{"role": "user", "content": prompt.text}] for prompt in record.prompts]
    bos, eos = meta["bos_token"] or "", meta["eos_token"] or ""
    # a template that prints the date prints that of the recording
    now = datetime.fromisoformat(meta["rendered_at"]) if "rendered_at" in meta else None
    rendered = render_all(template, chats, bos_token=bos, eos_token=eos, now=now)
    for prompt, text in zip(record.prompts, rendered, strict=True):
        if text != prompt.rendered:
            return Rung(
                "text",
                "broken",
                f"prompt {prompt.id} renders differently",
                {"expected": prompt.rendered, "got": text},
            )
        ids = engine.tokenize(text, add_special=False)
        if tuple(ids) != tuple(prompt.prompt_ids):
            return Rung(
                "text",
                "broken",
                f"prompt {prompt.id} has other token ids",
                {"expected": list(prompt.prompt_ids), "got": ids},
            )
        # what llama.cpp's chat programs do: drop the template's BOS where the tokeniser adds one
        served = text.removeprefix(bos) if engine.add_bos and bos else text
        ids = engine.tokenize(served, add_special=True)
        if tuple(ids) != tuple(prompt.prompt_ids):
            twice = len(ids) > 1 and engine.bos_id is not None and ids[:2] == [engine.bos_id] * 2
            return Rung(
                "text",
                "broken",
                f"prompt {prompt.id} is served with other ids" + (": BOS twice" if twice else ""),
                {"expected": list(prompt.prompt_ids), "got": ids},
            )
    detail = f"{len(chats)} prompts rendered and tokenised alike"
    if unknown := sorted(set(record.meta["decoding"]["stop_ids"]) - engine.eog_ids):
        detail += f"; the artifact itself does not say that {unknown} end a reply: tell its server"
    return Rung("text", "ok", detail)
