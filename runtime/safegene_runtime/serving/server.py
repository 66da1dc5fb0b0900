"""An OpenAI-compatible server on this machine, asked carefully: it may be broken, or hostile.

Only loopback addresses are spoken to, redirects are not followed, a whole exchange has one deadline
and an answer has a maximal size. Every way in which a server can misbehave is an `EngineError`.

llama-server offers more than the rest (its template, its tokenizer, its adapters, token ids beside
log-probabilities); what a server does not offer is None here, never a guess.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import json
import socket
import threading
import urllib.parse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from safegene_runtime.errors import EngineError, FormatError, Problem
from safegene_runtime.formats import strictjson

__all__ = ["Server", "ServerRefusalError", "ServerReply"]

TIMEOUT_S = 120.0
MAX_BODY_BYTES = 8 << 20
MAX_SHOWN = 200
TOP_LOGPROBS = 5

MAX_NUMBER = 1e9
"""Of scales and log-probabilities. llama-server writes -3.4e38 for a probability of 0, which is left out."""

NO_PENALTY = {"repeat_penalty": 1.0, "repetition_penalty": 1.0}
"""1 switches off what temperature 0 does not: llama_cpp.server's penalty is 1.1 by default, and
llama-server's and vLLM's is what they were started with. The second name is vLLM's."""

UNKNOWN_FIELD = (400, 422)
"""How servers refuse a field they do not know."""

IS_IT = "is it an OpenAI-compatible server, such as llama-server?"


class ServerRefusalError(EngineError):
    """The server answered, and what it answered was an error status."""


@dataclass(frozen=True)
class ServerReply:
    """What a server answered.

    Attributes:
        text: the reply.
        prompt_tokens: how many tokens the server says it was asked, if it says so.
        chosen: natural-log probabilities of the T tokens of the reply, where offered.
        ids: their ids, where offered.
        top: for each position the log-probabilities of the likeliest ids, where offered.
    """

    text: str
    prompt_tokens: int | None
    chosen: tuple[float, ...] | None
    ids: tuple[int, ...] | None
    top: tuple[Mapping[int, float], ...] | None


class Server:
    """A server that was found to answer.

    Args:
        url: `http://127.0.0.1:8080`, with or without `/v1`.
        model: which of its models to ask; needed where it has several.
        timeout_s: seconds for one whole exchange.
        api_key: sent as a bearer token.

    Attributes:
        models: the ids it lists.
        kind: `llama-server`, or `OpenAI-compatible`.
        template: its chat template, where offered.
        adapters: (id, scale) of the adapters it can switch, where offered; else empty.
        offers_logprobs: whether it gave any; None before it was asked.
        takes_penalties: whether it lets us switch penalties off; None before it was asked.

    Raises:
        EngineError: not a loopback address, no answer, or none of an OpenAI-compatible server.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str | None = None,
        timeout_s: float = TIMEOUT_S,
        api_key: str | None = None,
    ) -> None:
        self.url = url
        self._host, self._port, self._prefix = _loopback(url)
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        status, listed = self.exchange("GET", "/v1/models")
        rows = listed.get("data") if isinstance(listed, dict) else None
        if status != 200 or not isinstance(rows, list) or not all(map(_named, rows)) or not rows:
            raise self._error("/v1/models", "a list of models", _shown(status, listed), IS_IT)
        self.models = tuple(row["id"] for row in rows)
        if model is None and len(self.models) > 1:
            raise self._error("model", "one to ask", ", ".join(self.models), "name one of them")
        if model is not None and model not in self.models:
            raise self._error("model", f"one of {', '.join(self.models)}", model)
        self.model: str = model if model is not None else self.models[0]
        status, props = self.exchange("GET", "/props", may_fail=True)
        known = status == 200 and isinstance(props, dict) and "default_generation_settings" in props
        self.kind = "llama-server" if known else "OpenAI-compatible"
        template = props.get("chat_template") if known else None
        self.template = template if isinstance(template, str) else None
        self.adapters = self._adapters()
        self.offers_logprobs: bool | None = None
        self.takes_penalties: bool | None = None

    def _adapters(self) -> tuple[tuple[int, float], ...]:
        status, found = self.exchange("GET", "/lora-adapters", may_fail=True)
        if status != 200:
            return ()
        rows = found if isinstance(found, list) else [found]
        if not all(isinstance(r, dict) and type(r.get("id")) is int for r in rows):
            raise self._error("/lora-adapters", "a list of adapters", _shown(status, found))
        scales = [row.get("scale") for row in rows]
        if not all(isinstance(scale, int | float) and abs(scale) < MAX_NUMBER for scale in scales):
            raise self._error("/lora-adapters", "scales", _shown(status, found))
        return tuple((row["id"], float(row["scale"])) for row in rows)

    def set_adapters(self, scales: Sequence[tuple[int, float]]) -> bool:
        """Tries to set the scales of its adapters for everybody; whether it let us."""
        rows = [{"id": number, "scale": scale} for number, scale in scales]
        return self.exchange("POST", "/lora-adapters", rows, may_fail=True)[0] == 200

    def prompt_ids(self, text: str) -> tuple[int, ...] | None:
        """The ids that a user's first message becomes, where the server can tell.

        Raises:
            EngineError: it offers to tell, and does not.
        """
        if self.kind != "llama-server":
            return None
        asked = {"messages": [{"role": "user", "content": text}]}
        status, found = self.exchange("POST", "/apply-template", asked)
        prompt = found.get("prompt") if isinstance(found, dict) else None
        if not isinstance(prompt, str):
            raise self._error("/apply-template", "a prompt", _shown(status, found))
        asked_ids = {"content": prompt, "add_special": True, "parse_special": True}
        status, found = self.exchange("POST", "/tokenize", asked_ids)
        ids = found.get("tokens") if isinstance(found, dict) else None
        if not isinstance(ids, list) or not all(type(token) is int for token in ids):
            raise self._error("/tokenize", "token ids", _shown(status, found))
        return tuple(ids)

    def ask(
        self, text: str, max_tokens: int, *, logprobs: bool = False, **extra: Any
    ) -> ServerReply:
        """The greedy reply to one message of a user, cold where the server can be told so.

        Penalties on repetition are switched off, but for a server that refuses these fields, which
        are not OpenAI's.

        Args:
            text: the message.
            max_tokens: of the reply.
            logprobs: ask for log-probabilities, too, where the server offers them.
            extra: further fields of the request.

        Raises:
            ServerRefusalError: it answered with an error status.
            EngineError: it did not answer, or something that is no reply.
        """
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": max_tokens,
            "stream": False,
            **extra,
        }
        if self.kind == "llama-server":
            body["cache_prompt"] = False
        if logprobs and self.offers_logprobs is not False:
            more = {**body, "logprobs": True, "top_logprobs": TOP_LOGPROBS}
            status, found = self._complete(more)
            if self.offers_logprobs is None:
                self.offers_logprobs = status == 200
            if status == 200 or self.offers_logprobs:
                return self._reply(status, found)
        return self._reply(*self._complete(body))

    def _complete(self, body: Mapping[str, Any]) -> tuple[int, Any]:
        """Asks without penalties; as the server is where it refuses that, and nothing else."""
        path = "/v1/chat/completions"
        if self.takes_penalties is not False:
            status, found = self.exchange("POST", path, {**body, **NO_PENALTY}, may_fail=True)
            if self.takes_penalties is None and status == 200:
                self.takes_penalties = True
            if self.takes_penalties or status not in UNKNOWN_FIELD:
                return status, found
        status, found = self.exchange("POST", path, body, may_fail=True)
        if status == 200:
            self.takes_penalties = False
        return status, found

    def _reply(self, status: int, found: Any) -> ServerReply:
        if status != 200:
            where = f"{self.url}/v1/chat/completions"
            raise ServerRefusalError(Problem(where, "status", "200", _shown(status, found)))
        try:
            choice = found["choices"][0]
            text = choice["message"]["content"]
            if not isinstance(text, str):
                raise TypeError
            usage = found.get("usage")
            count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
            count = count if type(count) is int else None
            offered = choice.get("logprobs")
            rows = offered.get("content") if isinstance(offered, dict) else None
            if not rows:
                return ServerReply(text, count, None, None, None)
            chosen = tuple(_number(row["logprob"]) for row in rows)
            if not all(type(row.get("id")) is int for row in rows):
                return ServerReply(text, count, chosen, None, None)
            top = tuple(
                {
                    int(one["id"]): _number(one["logprob"])
                    for one in row["top_logprobs"]
                    if type(one["logprob"]) is not float or one["logprob"] > -MAX_NUMBER
                }
                for row in rows
            )
            return ServerReply(text, count, chosen, tuple(row["id"] for row in rows), top)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, OverflowError):
            got = _shown(status, found)
            raise self._error("/v1/chat/completions", "a reply", got, IS_IT) from None

    def exchange(
        self, method: str, path: str, body: Any = None, *, may_fail: bool = False
    ) -> tuple[int, Any]:
        """One request and its whole answer.

        Args:
            method: GET or POST.
            path: below the server's root.
            body: sent as JSON.
            may_fail: whether an answer that is not 200 may be something else than JSON.

        Returns:
            the status, and the parsed body; None where that is not JSON and may be so.

        Raises:
            EngineError: no connection, no answer in time, too large a one, a redirect, no JSON.
        """
        data = None if body is None else json.dumps(body).encode()
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout_s)
        late = threading.Event()
        sockets: list[socket.socket] = []

        def stop() -> None:
            late.set()
            for one in sockets:
                with contextlib.suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

        # a socket's own time-out begins anew with every byte, and a server may send one at a time
        timer = threading.Timer(self._timeout_s, stop)
        timer.daemon = True
        timer.start()
        try:
            connection.connect()
            sockets.append(connection.sock)  # http.client lets go of it before the body is read
            connection.request(method, self._prefix + path, data, self._headers)
            answer = connection.getresponse()
            status, raw = answer.status, answer.read(MAX_BODY_BYTES + 1)
            target = answer.getheader("Location")
        except (OSError, http.client.HTTPException) as error:
            slow = late.is_set() or isinstance(error, TimeoutError)
            got = f"none within {self._timeout_s:g} s" if slow else f"{error}"[:MAX_SHOWN]
            raise self._error(path, "an answer", got or repr(error), "does it run?") from error
        finally:
            timer.cancel()
            connection.close()
        if late.is_set():
            raise self._error(path, "an answer", f"none within {self._timeout_s:g} s")
        if len(raw) > MAX_BODY_BYTES:
            raise self._error(path, f"at most {MAX_BODY_BYTES} bytes", "more", IS_IT)
        if 300 <= status < 400:
            got = f"a redirect ({status}) to {target}"[:MAX_SHOWN]
            raise self._error(path, "an answer", got, "give the address it leads to")
        try:
            return status, strictjson.loads(raw, self.url + path)
        except FormatError as error:
            if may_fail and status != 200:
                return status, None
            got = f"status {status}: {raw[:MAX_SHOWN].decode('utf-8', 'replace')}"
            raise self._error(path, "JSON", got, IS_IT) from error

    def _error(self, field: str, expected: str, got: str, fix: str = "") -> EngineError:
        return EngineError(Problem(self.url, field, expected, got, fix))


def _loopback(url: str) -> tuple[str, int, str]:
    """Address, port and path of a server on this machine.

    Raises:
        EngineError: no such URL, or another machine's.
    """
    expected = "http://127.0.0.1:PORT, http://[::1]:PORT or http://localhost:PORT"
    problem = Problem("--server", "url", expected, url, "run the check where the server runs")
    try:
        parts = urllib.parse.urlsplit(url)
        host, port = parts.hostname or "", parts.port or 80
    except ValueError as error:
        raise EngineError(problem) from error
    # a name may lead anywhere, tomorrow somewhere else: only this one, and it is not looked up
    host = "127.0.0.1" if host == "localhost" else host
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = False
    extra = parts.username or parts.password or parts.query or parts.fragment
    if parts.scheme != "http" or not local or extra:
        raise EngineError(problem)
    return host, port, parts.path.rstrip("/").removesuffix("/v1")


def _number(value: Any) -> float:
    """A log-probability, of which sums of squares stay finite.

    Raises:
        TypeError, ValueError: it is none.
    """
    if type(value) not in (int, float):
        raise TypeError(value)
    if not abs(value) < MAX_NUMBER:
        raise ValueError(value)
    return float(value)


def _named(row: Any) -> bool:
    return isinstance(row, dict) and isinstance(row.get("id"), str)


def _shown(status: int, value: Any) -> str:
    return f"status {status}: {json.dumps(value, ensure_ascii=False)}"[:MAX_SHOWN]
