"""A server that runs is held against a reference: is what it serves what was recorded?

    text      it is asked the same: chat template, token ids, or at least their number
    repeat    it answers the same when asked again: greedy, and nothing is left of other prompts
    active    log-probabilities moved from the base's to the reference's (beta = 1), where offered
    switch    no client can have the replies of the base
    refusals  replies, judged, paired with the reference's, and gated: plain, and under attacks

A server shows replies, not weights, so this says less than `ladder.verify` does of an artifact: it
says what clients get. A check that breaks is FAIL; else the gate decides. The report has the shape of
an artifact's, with these rungs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from safegene_runtime.errors import Problem, RecordError
from safegene_runtime.gating.bounds import BETA_BAND_COARSE
from safegene_runtime.gating.gate import NOT_RUN, Pair, combine, decide_by_attack
from safegene_runtime.gating.profiles import PROFILES, Profile
from safegene_runtime.gating.sequential import run_in_order
from safegene_runtime.gating.verdict import Verdict
from safegene_runtime.judging.judge import Judge, RulesAndNgram, label_all
from safegene_runtime.judging.labels import check_labels
from safegene_runtime.progress import Progress
from safegene_runtime.record.attacks import attack_names
from safegene_runtime.record.reference import PromptRecord, Reference
from safegene_runtime.serving.server import TIMEOUT_S, Server, ServerRefusalError, ServerReply
from safegene_runtime.verifying.climb import refusals_rung
from safegene_runtime.verifying.report import PromptOutcome, Report, Rung

__all__ = ["check_server"]

AGAIN = 3
"""Prompts asked a second time, and prompts that try to switch the adapter off."""

SAMPLE = 8
"""Prompts with log-probabilities, where they are dear: llama_cpp.server sorts the vocabulary in Python."""


@dataclass
class _Asking:
    """What a server was asked, and what it replied, by the prompts' place in the record.

    Attributes:
        chosen: the prompts that count.
        replies: in the order they were asked.
    """

    server: Server
    record: Reference
    judge: Judge
    chosen: Sequence[int]
    tell: Progress | None
    replies: dict[int, ServerReply] = field(default_factory=dict)
    labels: dict[int, str] = field(default_factory=dict)
    seconds: float = 0.0

    def ask(self, indices: Sequence[int]) -> None:
        """Asks and labels those of the prompts that were not asked before."""
        limit = self.record.meta["decoding"]["max_new_tokens"]
        new = [index for index in indices if index not in self.replies]
        if not new:
            return
        for index in new:
            if self.tell:
                self.tell("asking the server", len(self.replies), len(self.chosen))
            wanted = self.server.kind == "llama-server" or len(self.replies) < SAMPLE
            began = time.monotonic()
            self.replies[index] = self.server.ask(
                self.record.prompts[index].text, limit, logprobs=wanted
            )
            self.seconds += time.monotonic() - began
        prompts = [self.record.prompts[index] for index in new]
        texts = [self.replies[index].text for index in new]
        said = label_all(self.judge, texts, [one.text for one in prompts])
        for index, prompt, label in zip(new, prompts, said, strict=True):
            self.labels[index] = prompt.ref_label if self.same(index) else str(label)

    def same(self, index: int) -> bool:
        """Whether a reply is the reference's."""
        stops = frozenset(self.record.meta["decoding"]["stop_ids"])
        return _same(self.replies[index], self.record.prompts[index], stops)

    def pair(self, index: int) -> Pair:
        """One prompt as the gate sees it."""
        asked = index in self.replies
        return Pair.of(
            self.record.prompts[index],
            self.labels.get(index, NOT_RUN),
            identical=asked and self.same(index),
        )

    def pairs(self) -> list[Pair]:
        """All prompts that count; those that were not asked say so."""
        return [self.pair(index) for index in self.chosen]

    def in_order(self, profile: Profile, seed: str) -> None:
        """Asks in the recorded order until it is decided; some at least, for the other checks."""
        by_id = {self.record.prompts[index].id: index for index in self.chosen}
        plain = set(self.record.under([]))
        self.ask([index for index in self.record.order() if index in plain][:SAMPLE])

        def run(pairs: Sequence[Pair]) -> list[Pair]:
            indices = [by_id[pair.id] for pair in pairs]
            self.ask(indices)
            return [self.pair(index) for index in indices]

        run_in_order(self.pairs(), profile, seed, run)

    def outcome(self, index: int) -> PromptOutcome:
        """One prompt that was asked, as reports show it."""
        return PromptOutcome.of(
            self.record.prompts[index],
            self.labels[index],
            self.replies[index].text,
            identical=self.same(index),
        )


def check_server(
    url: str,
    record: Reference,
    *,
    profile: str | Profile = "smoke",
    sequential: bool = False,
    attacks: Sequence[str] = (),
    judge: Judge | None = None,
    model: str | None = None,
    allow_switchable: bool = False,
    timeout_s: float = TIMEOUT_S,
    api_key: str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Asks a server on this machine the reference's prompts, and gates its replies.

    Args:
        url: on loopback: `http://127.0.0.1:8080`.
        record: what PyTorch answered.
        profile: how much must be shown; a server's precision is unknown, so no margin is widened.
        sequential: ask in the recorded order and stop when it is decided.
        attacks: names of attacks to gate under, too, as they were recorded; `all` for all of them.
        judge: what labels replies; the reference's own is needed. The built-in one by default.
        model: which of the server's models; needed where it has several.
        allow_switchable: do not fail a server whose clients can switch the adapter off.
        timeout_s: seconds for one request.
        api_key: sent as a bearer token.
        progress: told (stage, done, total).

    Raises:
        RecordError: a reference of another judge, without plain prompts, or without these attacks.
        FormatError: an attack that nobody knows.
        EngineError: not a loopback address, or the server broke down; that is no verdict.
        ValueError: an unknown profile.
    """
    began = time.monotonic()
    judge = judge if judge is not None else RulesAndNgram()
    names = attack_names(attacks)
    check_labels(record, judge)
    if isinstance(profile, str):
        if profile not in PROFILES:
            raise ValueError(f"profile: expected one of {', '.join(PROFILES)}, got {profile!r}")
        profile = PROFILES[profile]
    chosen = record.under(names)
    if not record.under([]):
        raise RecordError(
            Problem(str(record.path), "prompts", "some without an attack", "none", "record again")
        )
    server = Server(url, model=model, timeout_s=timeout_s, api_key=api_key)
    asking = _Asking(server, record, judge, chosen, progress)
    seed = record.meta["order"]["seed"]
    if sequential:
        asking.in_order(profile, seed)
    else:
        asking.ask(chosen)
    if progress:
        progress("asking the server", len(chosen), len(chosen))
    rungs = _checks(asking, allow_switchable)
    plain, under = decide_by_attack(asking.pairs(), profile, sequential=sequential, seed=seed)
    figures = {"judge": f"{judge.name} {judge.version}", "prompts": len(asking.replies)}
    rungs.append(refusals_rung(plain, under, figures))
    broken = next((rung.name for rung in rungs if rung.status == "broken"), None)
    meta = record.meta
    return Report(
        verdict=Verdict.FAIL if broken else combine(plain, under).verdict,
        broken_at=broken,
        rungs=tuple(rungs),
        outcomes=tuple(asking.outcome(index) for index in sorted(asking.replies)),
        gate=plain,
        attacks=under,
        profile=profile,
        mode="as-shipped",
        precision="unknown",
        bounds=None,
        artifact={
            "name": server.model or url,
            "target": "server",
            "form": server.kind,
            "architecture": "unknown",
            "precision": "unknown",
            "expression": None,
            "files": {},
        },
        reference={
            "sha256": record.digest,
            "base": meta["base"]["name"],
            "adapter": meta["adapter"]["name"],
            "expression": meta["adapter"]["expression"],
            "versions": meta["versions"],
        },
        engine={"name": server.kind, "version": "unknown", "settings": {"url": url}},
        static=None,
        kl_by_position=(),
        seconds={"total": time.monotonic() - began, "engine": asking.seconds},
    )


def _checks(asking: _Asking, allow_switchable: bool) -> list[Rung]:
    """Everything but the refusals, on the prompts that were asked."""
    server, record = asking.server, asking.record
    limit = record.meta["decoding"]["max_new_tokens"]
    indices, replies = list(asking.replies), list(asking.replies.values())
    prompts = [record.prompts[index] for index in indices]
    stops = frozenset(record.meta["decoding"]["stop_ids"])
    return [
        _text(server, record, prompts, replies),
        _repeat(server, prompts, replies, limit),
        _active(record, indices, replies, [asking.same(index) for index in indices], stops),
        _switch(server, prompts, replies, limit, allow_switchable),
    ]


def _same(reply: ServerReply, prompt: PromptRecord, stops: frozenset[int]) -> bool:
    """By ids where the server tells them: bytes that are no UTF-8 are spelt in many ways."""
    if reply.ids is not None:
        return _without(reply.ids, stops) == _without(prompt.ref_ids, stops)
    return reply.text == prompt.ref_text


def _without(ids: Sequence[int], stops: frozenset[int]) -> list[int]:
    return [token for token in ids if token not in stops]


def _text(
    server: Server,
    record: Reference,
    prompts: Sequence[PromptRecord],
    replies: Sequence[ServerReply],
) -> Rung:
    if server.template is not None and server.template != record.meta["tokenizer"]["chat_template"]:
        return Rung("text", "broken", "the chat template is not the reference's")
    told = 0
    for prompt, reply in zip(prompts, replies, strict=True):
        ids = server.prompt_ids(prompt.text)
        if ids is not None and ids != tuple(prompt.prompt_ids):
            detail = f"prompt {prompt.id} has other token ids"
            if "rendered_at" in record.meta["tokenizer"]:
                detail += (
                    "; its template prints the time, and a server prints its own: record again"
                )
            return Rung("text", "broken", detail)
        count = reply.prompt_tokens
        if count is not None and count != len(prompt.prompt_ids):
            what = f"{count} tokens instead of {len(prompt.prompt_ids)}"
            return Rung("text", "broken", f"prompt {prompt.id} is asked with {what}")
        told += ids is not None or count is not None
    if told < len(prompts):
        return Rung("text", "not offered", f"{told} of {len(prompts)} prompts could be told")
    how = "id for id" if server.kind == "llama-server" else "by the number of tokens"
    return Rung("text", "ok", f"{told} prompts are asked as they were recorded, {how}")


def _repeat(
    server: Server, prompts: Sequence[PromptRecord], replies: Sequence[ServerReply], limit: int
) -> Rung:
    cold = "cold" if server.kind == "llama-server" else "warm: this server cannot be told otherwise"
    for prompt, reply in list(zip(prompts, replies, strict=True))[:AGAIN]:
        if server.ask(prompt.text, limit).text != reply.text:
            detail = f"prompt {prompt.id} got another reply the second time"
            return Rung("repeat", "broken", f"{detail}: not greedy, or not stateless")
    own = "" if server.takes_penalties else "; its own penalties on repetition are in force"
    return Rung("repeat", "ok", f"asked again, it answers the same ({cold}{own})")


def _active(
    record: Reference,
    indices: Sequence[int],
    replies: Sequence[ServerReply],
    same: Sequence[bool],
    stops: frozenset[int],
) -> Rung:
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
        return Rung("active", "not offered", "no log-probabilities to compare")
    beta = dot / norm
    detail = (
        f"beta {beta:.3f} from {count} log-probabilities, expected 1 within {BETA_BAND_COARSE:g}"
    )
    figures = {"beta": beta, "band": BETA_BAND_COARSE, "log_probabilities": count}
    status = "ok" if abs(beta - 1) <= BETA_BAND_COARSE else "broken"
    return Rung("active", status, detail, figures)


def _switch(
    server: Server,
    prompts: Sequence[PromptRecord],
    replies: Sequence[ServerReply],
    limit: int,
    allowed: bool,
) -> Rung:
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
        return Rung("switch", "ok", "no way was found to have the base's replies")
    detail = f"a client can switch the adapter off: {'; '.join(ways)}. Serve a merged artifact"
    return Rung("switch", "allowed" if allowed else "broken", detail)
