"""Servers that are broken or hostile."""

# ruff: noqa: F811 - fixtures are imported, and are parameters of the tests, too
from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
import served
from test_server import World, faithful, world  # noqa: F401

from safegene_runtime.errors import EngineError
from safegene_runtime.serving.server import MAX_BODY_BYTES, Server


@pytest.mark.parametrize(
    "url",
    ["http://192.0.2.1:80", "http://example.com", "https://127.0.0.1", "http://0.0.0.0:80",
     "http://127.0.0.1.example.com", "http://u:p@127.0.0.1", "http://127.0.0.1:x", "file:///etc",
     "127.0.0.1:80", "", "http://[::1", "http://localhost.example", "http://127.0.0.1:80?x=1"],
)  # fmt: skip
def test_only_loopback_is_spoken_to(url: str) -> None:
    with pytest.raises(EngineError, match=r"127\.0\.0\.1:PORT"):
        Server(url)


def test_nothing_that_listens_is_one_message() -> None:
    with pytest.raises(EngineError, match="does it run"):
        Server(f"http://localhost:{served._free_port()}")


def silence(handler: BaseHTTPRequestHandler, body: Any) -> Any:
    time.sleep(3)


def drip(handler: BaseHTTPRequestHandler, body: Any) -> Any:
    """One byte at a time, each before any socket's time-out, without end."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(b" ")
            time.sleep(0.1)


def elsewhere(handler: BaseHTTPRequestHandler, body: Any) -> Any:
    handler.send_response(302)
    handler.send_header("Location", "http://192.0.2.1/v1/models")
    handler.send_header("Content-Length", "0")
    handler.end_headers()


def no_http(handler: BaseHTTPRequestHandler, body: Any) -> Any:
    handler.wfile.write(b"\x00\xff" * 50 + b"\n")
    handler.close_connection = True


HOSTILE: dict[str, tuple[Callable[..., Any], str]] = {
    "never answers": (silence, "within 0.5 s"),
    "answers byte by byte": (drip, "within 0.5 s"),
    "leads elsewhere": (elsewhere, "redirect"),
    "speaks no HTTP": (no_http, "an answer"),
    "garbage": (lambda h, b: (200, b"<html>"), "JSON"),
    "endless": (lambda h, b: (200, b"[" + b" " * MAX_BODY_BYTES + b"]"), "at most"),
    "no list": (lambda h, b: (200, {"data": 1}), "list of models"),
    "no models": (lambda h, b: (200, {"data": []}), "list of models"),
    "one key twice": (lambda h, b: (200, b'{"data": [], "data": []}'), "JSON"),
    "an error": (lambda h, b: (500, {"error": "x"}), "status 500"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_server_is_one_message(kind: str) -> None:
    answer, hint = HOSTILE[kind]
    with served.scripted(answer) as url, pytest.raises(EngineError, match=hint) as caught:
        Server(url, timeout_s=0.5)
    assert len(caught.value.problems) == 1


REPLIES: dict[str, Any] = {
    "no choices": {"choices": []}, "a list": [], "no content": {"choices": [{"message": {}}]},
    "null": {"choices": [{"message": {"content": None}}]},
    "a list as a log-probability": {
        "choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"logprob": [1]}]}}]
    },
    "numbers as words": {
        "choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"logprob": "nan"}]}}]
    },
    "a log-probability of 10^400": {
        "choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"logprob": 10**400}]}}]
    },
    "a log-probability of -1e308": {
        "choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"logprob": -1e308}]}}]
    },
    "words as log-probabilities": {
        "choices": [{"message": {"content": "x"}, "logprobs": {"content": [{"logprob": "y"}]}}]
    },
}  # fmt: skip


def test_a_scale_beyond_numbers_is_one_message() -> None:
    def answer(handler: Any, body: Any) -> Any:
        if handler.path.endswith("/lora-adapters"):
            return 200, [{"id": 0, "scale": 10**400}]
        return 200, {"data": [{"id": "m"}]}

    with served.scripted(answer) as url, pytest.raises(EngineError, match="scales"):
        Server(url, timeout_s=5)


def test_a_probability_of_zero_is_no_log_probability_to_compare() -> None:
    """As llama-server writes it: the lowest float."""
    lowest = -3.4028234663852886e38
    row = {
        "id": 1,
        "logprob": -0.5,
        "top_logprobs": [{"id": 1, "logprob": -0.5}, {"id": 2, "logprob": lowest}],
    }

    def answer(handler: Any, body: Any) -> Any:
        if handler.path.endswith("/models"):
            return 200, {"data": [{"id": "m"}]}
        if handler.command == "GET":
            return 404, {}
        return 200, {"choices": [{"message": {"content": "x"}, "logprobs": {"content": [row]}}]}

    with served.scripted(answer) as url:
        assert Server(url, timeout_s=5).ask("hi", 1, logprobs=True).top == ({1: -0.5},)


@pytest.mark.parametrize("kind", REPLIES)
def test_a_reply_that_is_none_is_no_verdict(kind: str, world: World) -> None:
    answer = faithful(world, ask=lambda row, body: (200, REPLIES[kind]))
    with served.scripted(answer) as url, pytest.raises(EngineError, match="a reply"):
        world.check(url)
