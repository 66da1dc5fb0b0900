"""What `safegene verify` is asked for: checked as a whole, before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from safegene_runtime.artifact.forms import Form
from safegene_runtime.cpus import thread_count
from safegene_runtime.errors import EngineError, Problems
from safegene_runtime.gating.profiles import PROFILES, Profile
from safegene_runtime.judging.judge import Judge
from safegene_runtime.record.reference import Reference
from safegene_runtime.verifying.climb import Mode

__all__ = ["VerifyRequest"]

_NO_SERVER = {
    "base": "a server is checked by itself", "control": "a server is checked by itself",
    "threads": "a server is checked by itself", "engine": "a server has one of its own",
    "mode": "a server runs as it was started",
    "write": "a server has no manifest to write to",
}  # fmt: skip
"""Options that a server has no use for, and why."""


@dataclass(frozen=True)
class VerifyRequest:
    """Artifacts, or a server, that are to be held against a reference.

    Attributes:
        reference: a folder made by `safegene record`, or one that was read.
        artifacts: folders made by `safegene convert`; several are shown side by side.
        server: in their place the URL of one that runs, on loopback.
        base: for a sidecar, the GGUF it belongs to; checked against the manifest.
        control: for one merged GGUF, its plain base, quantised the same way.
        profile: how much must be shown: `smoke`, `ci`, `release`, or a profile of your own.
        sequential: take the prompts in their recorded order and stop when it is decided.
        attacks: names of attacks to gate under, too, as they were recorded; `all` for all of them.
        mode: `strict` compares arithmetic (F32 KV cache), `as-shipped` runs llama.cpp as people do.
        judge: what labels replies, or its name; the reference's own is needed. None: the built-in one.
        threads: CPU threads of the engine; None: all.
        engine: the name of one; None: the artifact's suffix decides.
        write: put the verdict into the artifact's manifest.
        model: which of the server's models.
        allow_switchable: do not fail a server whose clients can switch the adapter off.

    Raises:
        EngineError: options that do not go together, or values that no option has; all of them.
    """

    reference: Path | Reference
    artifacts: Sequence[Path] = ()
    server: str | None = None
    base: Path | None = None
    control: Path | None = None
    profile: str | Profile = "smoke"
    sequential: bool = False
    attacks: Sequence[str] = ()
    mode: Mode = "strict"
    judge: Judge | str | None = None
    threads: int | None = None
    engine: str | None = None
    write: bool = True
    model: str | None = None
    allow_switchable: bool = False

    def __post_init__(self) -> None:
        problems = Problems()
        (self._check_artifacts if self.server is None else self._check_server)(problems)
        if isinstance(self.profile, str) and self.profile not in PROFILES:
            problems.add("--profile", "name", " or ".join(PROFILES), self.profile, "choose one")
        if self.mode not in (modes := get_args(Mode)):
            problems.add("--mode", "name", " or ".join(modes), self.mode, "choose one")
        problems.raise_if_any(EngineError)

    @property
    def labels(self) -> list[str]:
        """What each artifact is called in tables; the whole path where the names are not unique."""
        if self.server is not None:
            return [self.server]
        names = [artifact.resolve().name for artifact in self.artifacts]
        unique = len(set(names)) == len(names)
        return names if unique else [str(artifact) for artifact in self.artifacts]

    def base_of(self, form: Form) -> Path | None:
        """The base of an artifact of this form.

        Of several, only sidecars stand beside a base; of one, the ladder says what is wrong.
        """
        return self.base if len(self.artifacts) == 1 or not form.carries_base else None

    def _check_artifacts(self, problems: Problems) -> None:
        if not self.artifacts:
            fix = "name a folder"
            problems.add("verify", "OUT", "an artifact, or --server URL", "neither", fix)
        places = [artifact.resolve() for artifact in self.artifacts]
        for place in dict.fromkeys(place for place in places if places.count(place) > 1):
            problems.add("verify", str(place), "each artifact once", "it twice", "name it once")
        if self.control is not None and len(places) > 1:
            problems.add(
                "--control", "OUT", "one artifact: a control is the base of that one", len(places),
                "verify each with its own control",
            )  # fmt: skip
        for name in ("model", "allow_switchable"):
            if getattr(self, name):
                flag = "--" + name.replace("_", "-")
                problems.add(flag, "target", "--server URL", "an artifact", f"leave {flag} out")

        try:
            thread_count(self.threads)
        except EngineError as error:
            problems.extend(error.problems)

    def _check_server(self, problems: Problems) -> None:
        for artifact in self.artifacts:
            why = "a server is checked by itself"
            problems.add("--server", "OUT", "nothing", artifact, why)
        for name, why in _NO_SERVER.items():
            if (value := getattr(self, name)) != type(self).__dataclass_fields__[name].default:
                flag = "--no-write" if name == "write" else f"--{name}"
                got = "given" if name == "write" else value
                problems.add("--server", flag, "nothing", got, f"{why}: leave {flag} out")
