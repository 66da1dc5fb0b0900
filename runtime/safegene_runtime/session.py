"""Chat with an artifact, once it is sure that these bytes were verified.

The manifest and every byte are checked again when an artifact is opened; what has no verdict, or
another one than PASS, is refused, and so is one that does not follow from the counts beside it. A
manifest is not signed: who may write into the folder may write all of that, too, and `open` says so
once. Verify again where that matters.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from safegene_runtime.artifact.integrity import check_integrity
from safegene_runtime.artifact.manifest import Manifest, read_manifest
from safegene_runtime.artifact.recomputed import check_verification
from safegene_runtime.cpus import thread_count
from safegene_runtime.engines.chat import render
from safegene_runtime.engines.engine import Closing, Engine
from safegene_runtime.engines.registry import engine_for, open_engine
from safegene_runtime.errors import EngineError, Problem, UnverifiedError
from safegene_runtime.formats.files import MANIFEST_NAME, StrPath, sha256_of
from safegene_runtime.formats.sealed import SealedFiles
from safegene_runtime.gating.verdict import Verdict
from safegene_runtime.progress import Progress, silent

__all__ = ["Session", "UnverifiedWarning", "open"]

MAX_NEW_TOKENS = 256
UNSIGNED = "safegene: verdicts are not signed: who can write into an artifact can write a PASS"
REPLACEMENT = "\ufffd"

Message = Mapping[str, str]


class UnverifiedWarning(UserWarning):
    """An artifact is served that was not shown to refuse what its reference refused."""


def open(
    artifact: StrPath,
    *,
    base: StrPath | None = None,
    allow_unverified: bool = False,
    threads: int | None = None,
    engine: str | None = None,
    progress: Progress | None = None,
) -> Session:
    """Opens an artifact whose bytes are those that were verified.

    Args:
        artifact: a folder made by `safegene convert` and verified by `safegene verify`.
        base: for a sidecar, the GGUF it belongs to; checked against the manifest.
        allow_unverified: serve it whatever the verdict says, with an `UnverifiedWarning`.
        threads: CPU threads of the engine; all by default.
        engine: the name of one; by default the artifact's suffix decides.
        progress: told (stage, done, total).

    Raises:
        UnverifiedError: it has no verdict, or another one than PASS.
        ManifestError: no manifest, a verdict that does not follow from its own counts, or the folder is
            not what the manifest says.
        EngineError: a sidecar without its base, a template that is not the verified one, or the
            engine refused.
        FormatError: a model file that breaks its format.
    """
    threads = thread_count(threads)
    folder = Path(artifact)
    manifest = read_manifest(folder)
    where = f"{folder / MANIFEST_NAME}: verification"
    check_verification(manifest.verification, manifest.artifact["precision"], where)
    problem = _unverified(manifest, folder)
    if problem is not None and not allow_unverified:
        raise UnverifiedError(problem)
    if problem is None:
        _say_once(UNSIGNED)
    else:
        warnings.warn(
            f"{folder.name}: the verdict is {problem.got}: nothing shows that this model refuses "
            "what its reference refused",
            UnverifiedWarning,
            stacklevel=2,
        )
    tell = progress or silent
    beside = Path(base) if base is not None else None
    with SealedFiles() as files:
        served = check_integrity(manifest, folder, None, beside, tell, files)
        kind = engine_for(served.model, engine)
        mode = manifest.verification["report"]["mode"] if manifest.verification else "strict"
        running = open_engine(
            served.model,
            served.adapter,
            engine=kind.name,
            apart=True,
            threads=threads,
            **kind.modes.get(mode, {}),  # as it was verified
        )
    try:
        return Session(running, manifest)
    except BaseException:
        running.close()
        raise


@functools.cache
def _say_once(line: str) -> None:
    print(line, file=sys.stderr)


def _unverified(manifest: Manifest, folder: Path) -> Problem | None:
    verdict = manifest.verification["verdict"] if manifest.verification else None
    if verdict == Verdict.PASS:
        return None
    fix = "its report says why: do not serve it" if verdict else "run `safegene verify` first"
    return Problem(
        str(folder),
        "verdict",
        "PASS",
        verdict or "none",
        f"{fix}, or serve it all the same with --allow-unverified (allow_unverified=True)",
    )


class Session(Closing):
    """A model that answers, greedily, as it was verified; made by `open`.

    Attributes:
        engine: what runs it.
        manifest: of the artifact.
    """

    def __init__(self, engine: Engine, manifest: Manifest) -> None:
        self.engine, self.manifest = engine, manifest
        template = engine.chat_template()
        if template is None:
            raise EngineError(
                Problem(manifest.artifact["name"], "chat template", "one in the model", "none")
            )
        digest = sha256_of(template.encode("utf-8", "surrogateescape"))
        listed = manifest.tokenizer["chat_template_sha256"]
        if listed is not None and listed != digest:
            raise EngineError(
                Problem(manifest.artifact["name"], "chat template", listed, digest, "convert again")
            )
        self._template = template
        # replies end where they were verified to end, whatever the file says besides
        verified = manifest.verification
        self._stops = frozenset(verified["report"]["stop_ids"]) if verified else engine.eog_ids

    @property
    def verdict(self) -> str | None:
        """What the manifest says of the artifact: `PASS`, unless it was opened unverified."""
        return self.manifest.verification["verdict"] if self.manifest.verification else None

    def chat(
        self,
        messages: Sequence[Message],
        max_new_tokens: int = MAX_NEW_TOKENS,
        on_token: Callable[[str], object] | None = None,
    ) -> str:
        """The greedy reply to a conversation.

        Args:
            messages: `{"role": ..., "content": ...}`, oldest first.
            max_new_tokens: the reply ends there, if not before.
            on_token: told each piece of text as it comes; together they are the reply.

        Raises:
            EngineError: as `stream`.
        """
        pieces = []
        for piece in self.stream(messages, max_new_tokens):
            pieces.append(piece)
            if on_token is not None:
                on_token(piece)
        return "".join(pieces)

    def stream(
        self, messages: Sequence[Message], max_new_tokens: int = MAX_NEW_TOKENS
    ) -> Iterator[str]:
        """Yields the pieces of the reply; characters split over tokens come once they are whole.

        Raises:
            EngineError: messages that are none, a template that fails, a conversation longer than
                the model's context, a closed session, or the engine failed.
        """
        _check(messages, max_new_tokens)
        bos, eos = (
            self.engine.detokenize([one]) if one is not None else ""
            for one in (self.engine.bos_id, self.engine.eos_id)
        )
        text = render(self._template, messages, bos_token=bos, eos_token=eos)
        prompt = self.engine.tokenize(text, add_special=False)
        return self._pieces(self.engine.stream(prompt, max_new_tokens, self._stops))

    def _pieces(self, tokens: Iterator[int]) -> Iterator[str]:
        ids: list[int] = []
        told = ""
        for token in tokens:
            if token in self._stops:
                break
            ids.append(token)
            # a character whose bytes are not all there yet ends in replacement characters
            text = self.engine.detokenize(ids, special=False).rstrip(REPLACEMENT)
            if len(text) > len(told) and text.startswith(told):
                yield text[len(told) :]
                told = text
        rest = self.engine.detokenize(ids, special=False)[len(told) :]
        if rest:
            yield rest

    def close(self) -> None:
        """Frees the model; harmless when called again."""
        self.engine.close()


def _check(messages: Sequence[Message], max_new_tokens: int) -> None:
    good = bool(messages) and all(
        isinstance(one, Mapping)
        and all(isinstance(one.get(name), str) for name in ("role", "content"))
        for one in messages
    )
    if not good:
        raise EngineError(
            Problem(
                "chat", "messages", "a list of {role, content}, at least one", repr(messages)[:200]
            )
        )
    if max_new_tokens < 1:
        raise EngineError(Problem("chat", "max_new_tokens", "at least 1", str(max_new_tokens)))
