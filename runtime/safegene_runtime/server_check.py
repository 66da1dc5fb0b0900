"""A server that runs is held against a reference: is what it serves what was recorded?

    text      it is asked the same: chat template, token ids, or at least their number
    repeat    it answers the same when asked again: greedy, and nothing is left of other prompts
    active    log-probabilities moved from the base's to the reference's (beta = 1), where offered
    switch    no client can have the replies of the base
    refusals  replies to the plain prompts, judged, paired with the reference's, and gated

A server shows replies, not weights, so this says less than `ladder.verify` does of an artifact: it
says what clients get. A check that breaks is FAIL; else the gate decides.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from safegene_runtime.climb import BETA_BAND_COARSE
from safegene_runtime.errors import Problem, RecordError
from safegene_runtime.gate import GateResult, Pair, decide
from safegene_runtime.judge import Judge, RulesAndNgram, label_all
from safegene_runtime.labels import check_labels
from safegene_runtime.profiles import PROFILES, Profile
from safegene_runtime.reference import PromptRecord, Reference
from safegene_runtime.server_engine import TIMEOUT_S, Server, ServerRefusalError, ServerReply
from safegene_runtime.verdict import Verdict

__all__ = ["ServerCheck", "ServerReport", "check_server"]

AGAIN = 3
"""Prompts asked a second time, and prompts that try to switch the adapter off."""

SAMPLE = 8
"""Prompts with log-probabilities, where they are dear: llama_cpp.server sorts the vocabulary in Python."""


@dataclass(frozen=True)
class ServerCheck:
    """One check: `ok`, `broken`, `not offered` by the server, or `allowed` by the user."""

    name: str
    status: str
    detail: str


@dataclass(frozen=True)
class ServerReport:
    """What a server was found to be; nothing but PASS is green.

    Attributes:
        verdict: FAIL where a check is broken, else the gate's.
        outcomes: for each prompt its id, kind, labels, and whether the reply was the reference's.
    """

    verdict: Verdict
    url: str
    kind: str
    model: str
    reference_sha256: str
    checks: tuple[ServerCheck, ...]
    gate: GateResult
    outcomes: tuple[dict[str, Any], ...]
    seconds: float

    @property
    def sentence(self) -> str:
        """The broken checks, or what the gate says."""
        broken = [f"{one.name}: {one.detail}" for one in self.checks if one.status == "broken"]
        return "; ".join(broken) or self.gate.sentence

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; without replies."""
        return {
            "verdict": str(self.verdict),
            "sentence": self.sentence,
            "server": {"url": self.url, "kind": self.kind, "model": self.model},
            "reference_sha256": self.reference_sha256,
            "checks": [asdict(one) for one in self.checks],
            "gate": self.gate.to_dict(),
            "outcomes": list(self.outcomes),
            "seconds": self.seconds,
        }


def check_server(
    url: str,
    record: Reference,
    *,
    profile: str | Profile = "smoke",
    judge: Judge | None = None,
    model: str | None = None,
    allow_switchable: bool = False,
    timeout_s: float = TIMEOUT_S,
    api_key: str | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> ServerReport:
    """Asks a server on this machine the reference's plain prompts, and gates its replies.

    Args:
        url: on loopback: `http://127.0.0.1:8080`.
        record: what PyTorch answered.
        profile: how much must be shown; a server's precision is unknown, so no margin is widened.
        judge: what labels replies; the reference's own is needed. The built-in one by default.
        model: which of the server's models; needed where it has several.
        allow_switchable: do not fail a server whose clients can switch the adapter off.
        timeout_s: seconds for one request.
        api_key: sent as a bearer token.
        on_progress: told (stage, done, total).

    Raises:
        RecordError: a reference of another judge, or without plain prompts.
        EngineError: not a loopback address, or the server broke down; that is no verdict.
        ValueError: an unknown profile.
    """
    began = time.monotonic()
    judge = judge if judge is not None else RulesAndNgram()
    check_labels(record, judge)
    if isinstance(profile, str):
        if profile not in PROFILES:
            raise ValueError(f"profile: expected one of {', '.join(PROFILES)}, got {profile!r}")
        profile = PROFILES[profile]
    plain = [index for index, one in enumerate(record.prompts) if one.attack is None]
    if not plain:
        raise RecordError(
            Problem(str(record.path), "prompts", "some without an attack", "none", "record again")
        )
    server = Server(url, model=model, timeout_s=timeout_s, api_key=api_key)
    limit = record.meta["decoding"]["max_new_tokens"]
    prompts = [record.prompts[index] for index in plain]
    replies: list[ServerReply] = []
    for done, prompt in enumerate(prompts):
        if on_progress:
            on_progress("asking the server", done, len(prompts))
        wanted = server.kind == "llama-server" or done < SAMPLE
        replies.append(server.ask(prompt.text, limit, logprobs=wanted))
    if on_progress:
        on_progress("asking the server", len(prompts), len(prompts))
    stops = frozenset(record.meta["decoding"]["stop_ids"])
    same = [_same(reply, one, stops) for reply, one in zip(replies, prompts, strict=True)]
    checks = (
        _text(server, record, prompts, replies),
        _repeat(server, prompts, replies, limit),
        _active(record, plain, replies, same, stops),
        _switch(server, prompts, replies, limit, allow_switchable),
    )
    labels = label_all(judge, [one.text for one in replies], [one.text for one in prompts])
    pairs = [
        Pair.of(prompt, prompt.ref_verdict if equal else str(label), identical=equal)
        for prompt, label, equal in zip(prompts, labels, same, strict=True)
    ]
    gate = decide(pairs, profile)
    broken = any(one.status == "broken" for one in checks)
    return ServerReport(
        verdict=Verdict.FAIL if broken else gate.verdict,
        url=url,
        kind=server.kind,
        model=server.model,
        reference_sha256=record.digest,
        checks=checks,
        gate=gate,
        outcomes=tuple(
            {
                key: getattr(p, key)
                for key in ("id", "kind", "reference", "artifact", "base", "identical")
            }
            for p in pairs
        ),
        seconds=time.monotonic() - began,
    )


def _same(reply: ServerReply, prompt: PromptRecord, stops: frozenset[int]) -> bool:
    """By ids where the server tells them: bytes that are no UTF-8 are spelt in many ways."""
    if reply.ids is not None:
        return _without(reply.ids, stops) == _without(prompt.ref_ids, stops)
    return reply.text == prompt.ref_text


def _without(ids: Sequence[int], stops: frozenset[int]) -> list[int]:
    return [one for one in ids if one not in stops]


def _text(
    server: Server,
    record: Reference,
    prompts: Sequence[PromptRecord],
    replies: Sequence[ServerReply],
) -> ServerCheck:
    if server.template is not None and server.template != record.meta["tokenizer"]["chat_template"]:
        return ServerCheck("text", "broken", "the chat template is not the reference's")
    told = 0
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = server.prompt_ids(prompt.text)
        if ids is not None and ids != tuple(prompt.prompt_ids):
            return ServerCheck("text", "broken", f"prompt {prompt.id} has other token ids")
        count = reply.prompt_tokens
        if count is not None and count != len(prompt.prompt_ids):
            what = f"{count} tokens instead of {len(prompt.prompt_ids)}"
            return ServerCheck("text", "broken", f"prompt {prompt.id} is asked with {what}")
        told += ids is not None or count is not None
    if told < len(prompts):
        return ServerCheck("text", "not offered", f"{told} of {len(prompts)} prompts could be told")
    how = "id for id" if server.kind == "llama-server" else "by the number of tokens"
    return ServerCheck("text", "ok", f"{told} prompts are asked as they were recorded, {how}")


def _repeat(
    server: Server, prompts: Sequence[PromptRecord], replies: Sequence[ServerReply], limit: int
) -> ServerCheck:
    cold = "cold" if server.kind == "llama-server" else "warm: this server cannot be told otherwise"
    for prompt, reply in list(zip(prompts, replies, strict=True))[:AGAIN]:
        if server.ask(prompt.text, limit).text != reply.text:
            detail = f"prompt {prompt.id} got another reply the second time"
            return ServerCheck("repeat", "broken", f"{detail}: not greedy, or not stateless")
    return ServerCheck("repeat", "ok", f"asked again, it answers the same ({cold})")


def _active(
    record: Reference,
    indices: Sequence[int],
    replies: Sequence[ServerReply],
    same: Sequence[bool],
    stops: frozenset[int],
) -> ServerCheck:
    """Beta = <s - b, r - b> / ||r - b||^2 over log-probabilities known of server, base, reference.

    Only positions count whose context was the reference's: up to the first other token.
    """
    dot = norm = 0.0
    count = 0
    for index, reply, equal in zip(indices, replies, same, strict=True):
        ref_ids = record.prompts[index].ref_ids
        if reply.ids is not None and reply.top is not None:
            known, chosen = list(reply.top), reply.ids
        elif equal and reply.chosen and len(reply.chosen) == len(_without(ref_ids, stops)):
            known = [{one: p} for one, p in zip(ref_ids, reply.chosen, strict=False)]
            chosen = tuple(ref_ids[: len(known)])
        else:
            continue
        stored = record.positions(index)
        for at, (served, token) in enumerate(zip(known, chosen, strict=False)):
            if at >= len(ref_ids):
                break
            for column, one in enumerate(stored.top_ids[at]):
                if int(one) in served:
                    base = float(stored.base_logits[at, column] - stored.base_lse[at])
                    moved = float(stored.ref_logits[at, column] - stored.ref_lse[at]) - base
                    dot += (served[int(one)] - base) * moved
                    norm += moved * moved
                    count += 1
            if token != ref_ids[at]:
                break
    if not norm:
        return ServerCheck("active", "not offered", "no log-probabilities to compare")
    beta = dot / norm
    detail = (
        f"beta {beta:.3f} from {count} log-probabilities, expected 1 within {BETA_BAND_COARSE:g}"
    )
    return ServerCheck("active", "ok" if abs(beta - 1) <= BETA_BAND_COARSE else "broken", detail)


def _switch(
    server: Server,
    prompts: Sequence[PromptRecord],
    replies: Sequence[ServerReply],
    limit: int,
    allowed: bool,
) -> ServerCheck:
    """Tries what a client could: an adapter scaled to 0 in a request, or for all, another model."""
    ways = []
    off = [{"id": number, "scale": 0.0} for number, _ in server.adapters or [(0, 1.0)]]
    telling = [
        (one, r) for one, r in zip(prompts, replies, strict=True) if one.ref_ids != one.base_ids
    ]
    for prompt, reply in telling[:AGAIN]:
        try:
            got = server.ask(prompt.text, limit, lora=off).text
        except ServerRefusalError:
            continue  # as it should be
        if got != reply.text:
            ways.append("the field `lora` of a request changes the reply")
            break
    # the scales it has, so that nothing changes
    if server.adapters and server.set_adapters(server.adapters):
        ways.append("POST /lora-adapters sets scales for everybody")
    if server.adapters and not ways:
        ways.append("it holds its adapter apart from the model")
    if len(server.models) > 1:
        ways.append(f"{len(server.models)} models can be asked for")
    if not ways:
        return ServerCheck("switch", "ok", "no way was found to have the base's replies")
    detail = f"a client can switch the adapter off: {'; '.join(ways)}. Serve a merged artifact"
    return ServerCheck("switch", "allowed" if allowed else "broken", detail)
