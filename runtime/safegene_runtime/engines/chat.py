"""Chat templates, rendered as transformers renders them, in a process of their own.

A template is a program that came with a model. The sandbox of Jinja2 keeps it away from Python's
insides, but not from `{{ '%1000000000d' | format(1) }}` or two nested loops: those only end with
the process that runs them. So all conversations are rendered by one child, which has little memory
and little CPU time, and whose answer has a maximal size. A clock on the wall only bounds what costs no
CPU time: on a busy machine a good template takes as long as it takes.

The environment is that of transformers' `_compile_jinja_template`, so that a template gives the
same bytes here and there.
"""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, ClassVar

from safegene_runtime.errors import EngineError, Problem
from safegene_runtime.extras import need

__all__ = ["READS_CLOCK", "default_template", "render", "render_all"]

CPU_S = 2
CONVERSATIONS_PER_S = 250
"""Templates of public models take 0.05 to 0.7 ms for one, and 0.1 s to compile."""
WALL_S = 300.0
MAX_BYTES = 64 << 10
MAX_TEMPLATE_BYTES = 128 << 10
"""The longest of public models have 20 KB; compiling takes time, too."""
CHILD_MEMORY_BYTES = 512 << 20
MAX_MESSAGE = 500

# `-I` keeps the environment and the working directory out; the parent's own path is handed over so
# that the child finds the same packages. It is consumed before anything else is imported.
_CHILD = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); "
    "from safegene_runtime.engines.chat import _child; _child()"
)


READS_CLOCK = "strftime_now"
"""What a template calls that prints the time."""


def default_template(value: Any, where: str) -> str | None:
    """The template to chat with, of what a model's configuration holds under `chat_template`.

    Args:
        value: a template; several, as a list of {"name", "template"} or an object by name, of which
            it is the one named `default`; None.
        where: the model, for the message.

    Raises:
        EngineError: several, and none is named `default`.
    """
    if isinstance(value, list):
        entries = [one for one in value if isinstance(one, dict)]
        value = {one.get("name"): one.get("template") for one in entries}
    if isinstance(value, dict):
        names = ", ".join(sorted(map(str, value)))
        value = value.get("default")
        if value is None:
            expected, fix = "one that is named default", "name the one to chat with default"
            raise EngineError(Problem(where, "chat_template", expected, names or "none", fix))
    return value if isinstance(value, str) else None


def render(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    **variables: Any,
) -> str:
    """Renders one conversation; see `render_all`, which costs the same for many."""
    return render_all(
        template,
        [messages],
        add_generation_prompt=add_generation_prompt,
        bos_token=bos_token,
        eos_token=eos_token,
        variables=variables,
    )[0]


def render_all(
    template: str,
    conversations: Sequence[Sequence[Mapping[str, Any]]],
    *,
    add_generation_prompt: bool = True,
    bos_token: str = "",
    eos_token: str = "",
    variables: Mapping[str, Any] | None = None,
    now: datetime | None = None,
    cpu_s: int | None = None,
    max_bytes: int = MAX_BYTES,
) -> list[str]:
    """Renders conversations with a chat template that is not trusted.

    Args:
        template: Jinja2 source, as in `tokenizer.chat_template`.
        conversations: for each one its messages, JSON objects with `role` and `content`.
        add_generation_prompt: whether to end with the header of the assistant's turn.
        bos_token: what the template may print as `bos_token`.
        eos_token: likewise.
        variables: further JSON values the template may read.
        now: what `strftime_now` takes for the current time; the real one when None.
        cpu_s: whole seconds of CPU time that all of them may take together; `CPU_S` and one more for
            every `CONVERSATIONS_PER_S` when None.
        max_bytes: UTF-8 bytes one rendered conversation may have.

    Raises:
        MissingPackageError: Jinja2 is not installed.
        EngineError: the template is wrong, raised an exception, left the
            sandbox, took too long, or grew too large.
    """
    if not conversations:
        return []
    need("jinja2")
    if cpu_s is None:
        cpu_s = CPU_S + len(conversations) // CONVERSATIONS_PER_S
    if len(template) > MAX_TEMPLATE_BYTES:
        raise _error(f"at most {MAX_TEMPLATE_BYTES} characters", str(len(template)))
    request = {
        "template": template,
        "conversations": [[dict(message) for message in chat] for chat in conversations],
        "variables": {
            **(variables or {}),
            "add_generation_prompt": add_generation_prompt,
            "bos_token": bos_token,
            "eos_token": eos_token,
        },
        "now": None if now is None else now.isoformat(),
        "cpu_s": cpu_s,
        "max_bytes": max_bytes,
    }
    try:
        data = json.dumps(request).encode()
    except (TypeError, ValueError) as error:
        raise _error("messages and variables that are JSON", str(error)) from error
    package = str(Path(__file__).resolve().parents[2])
    path = json.dumps([*(entry for entry in sys.path if entry), package])
    try:
        child = subprocess.run(
            [sys.executable, "-I", "-c", _CHILD, path],
            input=data,
            capture_output=True,
            timeout=WALL_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise _error(f"to be rendered within {WALL_S:g} s", "a template that ran on") from error
    if -child.returncode == getattr(signal, "SIGXCPU", None):
        raise _error(f"to be rendered within {cpu_s} s of CPU time", "a template that ran on")
    return _answer(child.returncode, child.stdout, child.stderr, len(conversations))


def _answer(code: int, stdout: bytes, stderr: bytes, count: int) -> list[str]:
    """The child's answer, once it is clear that it is one."""
    try:
        reply = json.loads(stdout) if code == 0 else {}
    except ValueError:
        reply = {}
    if "error" in reply:
        raise _error("to render", str(reply["error"]))
    rendered = reply.get("rendered")
    if not isinstance(rendered, list) or len(rendered) != count:
        lines = stderr.decode("utf-8", "replace").strip().splitlines()
        got = f"its process ended with code {code}"
        raise _error("to render", f"{got}: {lines[-1][:MAX_MESSAGE]}" if lines else got)
    return rendered


def _error(expected: str, got: str) -> EngineError:
    return EngineError(
        Problem(
            "chat template",
            "template",
            expected,
            got,
            "the template comes with the model: use another copy of it, or report it there",
        )
    )


def _child() -> None:
    """Answers the request on stdin with JSON on stdout; runs in the child only."""
    request = json.load(sys.stdin)
    import jinja2

    _limit_resources(request["cpu_s"])
    try:
        template = _compile(request["template"], request["now"])
        reply: dict[str, Any] = {
            "rendered": [
                _render_one(template, chat, request["variables"], request["max_bytes"])
                for chat in request["conversations"]
            ]
        }
    except MemoryError:
        reply = {"error": "it needs too much memory"}
    except jinja2.TemplateError as error:
        reply = {"error": f"{type(error).__name__}: {error}"[:MAX_MESSAGE]}
    except Exception as error:  # whatever a template can make Python raise
        reply = {"error": f"{type(error).__name__}: {error}"[:MAX_MESSAGE]}
    print(json.dumps(reply))


def _limit_resources(cpu_s: int) -> None:
    """Little memory and CPU time; where the system has no such limits the parent's clock rules."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            used = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + CHILD_MEMORY_BYTES,) * 2)
        # beyond what the imports took; past the soft limit comes SIGXCPU, past the hard one SIGKILL
        soft = math.ceil(time.process_time()) + cpu_s
        resource.setrlimit(resource.RLIMIT_CPU, (soft, soft + 1))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        return


def _render_one(template: Any, chat: list[Any], variables: dict[str, Any], max_bytes: int) -> str:
    """Renders piece by piece, so that an endless output ends at the limit."""
    # transformers always defines these two: templates may ask whether they are defined.
    known = {"tools": None, "documents": None, **variables, "messages": chat}
    pieces, size = [], 0
    for piece in template.generate(**known):
        size += len(piece.encode("utf-8", "surrogatepass"))
        if size > max_bytes:
            raise ValueError(f"the output is larger than {max_bytes} bytes")
        pieces.append(piece)
    return "".join(pieces)


def _compile(source: str, now: str | None) -> Any:
    """Compiles a template in the environment that transformers gives it."""
    import jinja2
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """`{% generation %}` marks the assistant's words for training; here it only renders."""

        tags: ClassVar[set[str]] = {"generation"}  # type: ignore[misc]  # as jinja2 documents it

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            call = self.call_method("_body")
            return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

        def _body(self, caller: Any) -> Any:
            return caller()

    class Namespace(jinja2.utils.Namespace):
        """Without names that begin with an underscore, as in transformers."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, *rest = args
            attributes = dict(*rest, **kwargs)
            for name in attributes:
                Namespace._check(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            Namespace._check(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

        @staticmethod
        def _check(name: Any) -> None:
            if isinstance(name, str) and name.startswith("_"):
                raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r}")

    class Dict:
        """`dict(...)`, without the attributes of the type."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def raise_exception(message: str) -> None:
        raise jinja2.exceptions.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    def strftime_now(pattern: str) -> str:
        return (datetime.now() if now is None else datetime.fromisoformat(now)).strftime(pattern)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(
        raise_exception=raise_exception, strftime_now=strftime_now, dict=Dict(), namespace=Namespace
    )
    return environment.from_string(source)
