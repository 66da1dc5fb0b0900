"""Servers for tests: a record of a tiny model, real servers on free ports, and a scripted one."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import records
import tiny

from safegene_runtime.engines.chat import render_all
from safegene_runtime.engines.engine import Engine
from safegene_runtime.engines.registry import open_engine
from safegene_runtime.formats.files import sha256_of
from safegene_runtime.gating.profiles import Profile
from safegene_runtime.judging.judge import Label, about
from safegene_runtime.record.prompts import builtin_suite
from safegene_runtime.record.reference import PromptRecord, Reference

PROFILE = Profile("tiny", 0.95, 0.3, 0.4, 10)
HARMFUL, BENIGN = 20, 8
TOKENS = 4
CLEAR = 0.2  # nats between the two best tokens
READY_S = 60
LLAMA_SERVER = tiny.REPOSITORY / ".cache" / "bench" / "bin" / "llama-server"


class Listed:
    """A judge to whom a refusal is what it was shown: random models say nothing else of meaning."""

    name, version = "listed", "1"

    def __init__(self, refusals: Sequence[str]) -> None:
        self._refusals = frozenset(refusals)
        self.digest = sha256_of("\0".join(sorted(refusals)).encode())

    def label(self, texts: Sequence[str], prompts: Sequence[str] | None = None) -> list[Label]:
        return [Label.REFUSE if one in self._refusals else Label.COMPLY for one in texts]


def record_of(folder: Path, base: Path, tuned: Path) -> tuple[Reference, Listed]:
    """What two GGUF files answer, as `safegene record` would write it, and a judge for it."""
    texts = [one.text for one in builtin_suite()[: 6 * (HARMFUL + BENIGN)]]
    chats = [[{"role": "user", "content": text}] for text in texts]
    with open_engine(tuned, threads=1) as ref_engine, open_engine(base, threads=1) as base_engine:
        template = ref_engine.chat_template() or ""
        rendered = render_all(template, chats)
        prompts = [ref_engine.tokenize(text, add_special=False) for text in rendered]
        stops = sorted(ref_engine.eog_ids)
        arms = [engine.generate(prompts, TOKENS, stops) for engine in (ref_engine, base_engine)]
        spelt = [[_spell(ref_engine, ids, stops) for ids in arm] for arm in arms]
        # servers have an F16 KV cache: ask what it can't decide differently
        top = [np.sort(one, axis=1)[:, -2:] for one in _forced(ref_engine, prompts, arms[0])]
        good = [
            n for n in range(len(texts))
            if "\ufffd" not in spelt[0][n] + spelt[1][n] and spelt[0].index(spelt[0][n]) == n
            and spelt[0][n] not in spelt[1] and np.diff(top[n], axis=1).min() > CLEAR
        ][: HARMFUL + BENIGN]  # fmt: skip
        assert len(good) == HARMFUL + BENIGN
        judge = Listed([spelt[0][n] for n in good[:HARMFUL]])
        rows = []
        for place, n in enumerate(good):
            harmful = place < HARMFUL
            rows.append(PromptRecord(
                id=f"p{n}", kind="harmful" if harmful else "benign", category="c", borderline=False,
                cluster=f"p{n}", attack=None, text=texts[n], rendered=rendered[n],
                prompt_ids=tuple(prompts[n]), ref_ids=tuple(arms[0][n]), ref_text=spelt[0][n],
                ref_label="refuse" if harmful else "comply", base_ids=tuple(arms[1][n]),
                base_text=spelt[1][n], base_label="comply",
            ))  # fmt: skip
        logits = [
            _forced(engine, [one.prompt_ids for one in rows], [one.ref_ids for one in rows])
            for engine in (ref_engine, base_engine)
        ]
    meta = {
        **records.META,
        "decoding": {"max_new_tokens": TOKENS, "stop_ids": stops},
        "tokenizer": {
            **records.META["tokenizer"], "chat_template": template,
            "chat_template_sha256": sha256_of(template.encode()),
        },
        "judge": about(judge),
    }  # fmt: skip
    return records.write(folder, rows, list(zip(*logits, strict=True)), meta), judge


def _spell(engine: Engine, ids: Sequence[int], stops: Sequence[int]) -> str:
    return engine.detokenize([one for one in ids if one not in stops], special=False)


def _forced(
    engine: Engine, prompts: Sequence[Sequence[int]], replies: Sequence[Sequence[int]]
) -> list[Any]:
    """The logits along each reply, (T, vocabulary)."""
    sequences = [[*one, *ids[:-1]] for one, ids in zip(prompts, replies, strict=True)]
    found = {i: a.copy() for i, a in engine.logits(sequences, [len(ids) for ids in replies])}
    return [found[i] for i in range(len(replies))]


# --- real servers ----------------------------------------------------------------------------------


def llama_server() -> Path:
    """The real llama-server; built when it is not there yet, which takes minutes."""
    if not LLAMA_SERVER.exists():
        subprocess.run([tiny.REPOSITORY / "tools" / "build_server.sh"], check=True)
    return LLAMA_SERVER


@contextlib.contextmanager
def llama_cpp_python(model: Path, *options: str) -> Iterator[str]:
    """`python -m llama_cpp.server`; its address."""
    port = _free_port()
    command = [
        sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--host", "127.0.0.1",
        "--port", str(port), "--n_ctx", "512", "--n_threads", "1", *options,
    ]  # fmt: skip
    with _running(command, port):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def llama_cpp(model: Path, *options: str) -> Iterator[str]:
    """`llama-server`; its address."""
    port = _free_port()
    command = [
        str(llama_server()), "-m", str(model), "--host", "127.0.0.1", "--port", str(port),
        "-c", "512", "-np", "1", "-t", "1", "--no-warmup", *options,
    ]  # fmt: skip
    with _running(command, port):
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def _running(command: list[str], port: int) -> Iterator[None]:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + READY_S
        while True:
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            assert time.monotonic() < deadline, f"{command[0]} was not ready in {READY_S} s"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2):
                    break
            except OSError:
                time.sleep(0.05)
        yield
    finally:
        process.kill()
        process.wait()


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


# --- a scripted server -----------------------------------------------------------------------------

Answer = Callable[[BaseHTTPRequestHandler, Any], Any]
"""Given the request and its JSON; gives (status, JSON), or None when it wrote the answer itself."""


@contextlib.contextmanager
def scripted(answer: Answer) -> Iterator[str]:
    """A server that answers as `answer` says; its address."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            pass

        def _serve(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size)) if size else None
            found = answer(self, body)
            if found is not None:
                status, value = found
                data = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with contextlib.suppress(OSError):
                    self.wfile.write(data)

        do_GET = do_POST = _serve  # noqa: N815  # http.server's names

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.block_on_close = False
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
