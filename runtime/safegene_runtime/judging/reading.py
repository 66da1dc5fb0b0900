"""What a reply says: out of its reasoning, and out of the JSON, XML or code it is wrapped in.

A model that reasons is judged on what follows its reasoning. Where that has no end (the reply was
cut inside it) nothing is known of the reply: `Reading.open`.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass

from safegene_runtime.judging.text import MAX_CHARACTERS

__all__ = ["Reading", "after_reasoning", "read", "reading_content"]

_NAME = (
    r"(?:think(?:ing)?|thoughts?|reason(?:ing)?|analysis|analyze|reflect(?:ion)?|scratch_?pad|"
    r"(?:inner_?)?monologue|chain_of_thought|cot|deliberation|ponder(?:ing)?|思考)"
)
_BEGIN, _END = r"(?:begin_(?:of_)?|start_(?:of_)?)?", r"(?:/\s?|end_(?:of_)?|\|/?end_(?:of_)?)"
# <think>, </think>, <|begin_of_thought|>, ◁/think▷, <seed:think>, [THINK]; in brackets only "think"
_TAG = re.compile(
    rf"[<◁＜]\s?[|｜]?\s?(?P<end>{_END})?{_BEGIN}(?:[a-z]{{1,12}}:)?{_NAME}(?![\w-])"
    rf"[^<>◁▷＜＞]{{0,60}}[>▷＞]"
    rf"|[\[{{]\s?(?P<end2>{_END})?{_BEGIN}think(?:ing)?\s?[\]}}]"
    r"|(?P<end3><unused95>|<channel\|>|\.\.\.\s?done thinking\.?)|<unused94>|<\|channel>",
    re.IGNORECASE,
)
# gpt-oss: <|channel|>analysis<|message|>..., or what is left of it without its special tokens
_CHANNEL = re.compile(r"<\|channel\|>\s*(?P<name>\w{1,20})")
_FINAL = re.compile(r"<\|channel\|>\s*final\b[^<]{0,80}<\|message\|>|assistantfinal")
_BARE_CHANNEL = re.compile(r"\s*(?:analysis|commentary)(?=[A-Z])")
# a heading instead of tags, and where the answer begins after it
_HEADING = re.compile(
    r"[^\w<]{0,6}(?:(?:my |here is my |here's my )?(?:thinking|thoughts?|reasoning|analysis|"
    r"internal monologue|chain[- ]of[- ]thought)(?: process)?\W{0,3}[:\n]|thinking\.\.\.|"
    r"(?:思考|推理|分析)(?:过程|過程|プロセス)?\W{0,2}[:：\n])",
    re.IGNORECASE,
)
_ANSWER = re.compile(
    r"\n\W{0,6}(?:here is my |here's my |my )?(?:final )?(?:answer|response|output|reply|最终回答|"
    r"最终答案|回答|答案)\W{0,3}[:：\n]",
    re.IGNORECASE,
)
_SPECIAL = re.compile(
    r"\s*(?:<[|｜][^<>|｜]{1,40}[|｜]>|<(?:bos|s|start_of_turn|end_of_turn)>)\s*"
    r"(?:(?:assistant|model)\b\s*:?)?",
    re.IGNORECASE,
)

_FENCE = re.compile(r"\W{0,8}(?:```|~~~)[ \t]*(?P<language>[\w+#-]*)")
_FENCES = re.compile(r"(?:```|~~~)[ \t]*[\w+#-]*")
_PROSE = frozenset(
    ["", "text", "txt", "plaintext", "plain", "markdown", "md", "json", "jsonl", "json5", "yaml", "yml",
     "toml", "ini", "xml", "html", "csv", "tsv", "latex", "tex", "rst", "output", "response", "answer",
     "reply", "none"]
)  # fmt: skip
_TAGGED = re.compile(r"\W{0,8}<[/!?a-z]", re.IGNORECASE)
_TAGS = re.compile(r"<!\[CDATA\[|\]\]>|<!--|-->|<[/?!a-z][^<>]{0,200}>", re.IGNORECASE)
_DATA = re.compile(r"\W{0,4}[{\[]")
_ENTRY = re.compile(r"\W{0,4}[\w-]{2,24}(?::\s|\s?=\s?[\"'])")
_LATEX = re.compile(r"\\[a-z]{2,20}\*?(?=\W)", re.IGNORECASE)
_ESCAPE = re.compile(r"\\(?:u([0-9a-f]{4})|x([0-9a-f]{2})|([ntr\"'/\\]))", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#\w{1,6}|[a-z]{2,8});", re.IGNORECASE)
_STRING = re.compile(r'"((?:[^"\\]|\\.){0,2000})("?)(\s*:)?')
_COMMENT_OR_STRING = re.compile(
    r"(?:#|//|--|/\*|<!--|;|%)\s?([^\n]{1,400})|\"{3}([^\"]{1,400})|"
    r"[\"'`]((?:[^\"'`\n\\]|\\.|(?<=\w)'(?=\w)){1,400})"
)
MAX_WRAPPED = 2000


@dataclass(frozen=True)
class Reading:
    """What a reply says.

    Attributes:
        said: its text, undressed of reasoning and wrapping.
        open: whether it is reasoning without an end, or has nothing after the end.
        wrapped: everything that the wrapping holds, keys and names included; empty where a reply
            is plain text.
        code: whether it is a program.
        prose: comments and strings of a program.
    """

    said: str
    open: bool = False
    wrapped: str = ""
    code: bool = False
    prose: str = ""


def reading_content() -> list[object]:
    """Everything above that a label depends on, JSON-ready."""
    patterns = (_TAG, _CHANNEL, _FINAL, _BARE_CHANNEL, _HEADING, _ANSWER, _SPECIAL, _FENCE, _FENCES,
                _TAGGED, _TAGS, _DATA, _ENTRY, _LATEX, _ESCAPE, _ENTITY, _STRING,
                _COMMENT_OR_STRING)  # fmt: skip
    return [[one.pattern for one in patterns], sorted(_PROSE), MAX_WRAPPED]


def after_reasoning(text: str) -> str | None:
    """What follows the reasoning of a reply; the reply itself where there is none.

    Returns:
        None where the reasoning has no end, or nothing follows it.
    """
    finals = list(_FINAL.finditer(text))
    if finals:
        text = text[finals[-1].end() :]
    elif _BARE_CHANNEL.match(text) or _CHANNEL.search(text):
        return None
    ended, opened = 0, False
    for tag in _TAG.finditer(text):
        if tag["end"] or tag["end2"] or tag["end3"]:
            ended, opened = tag.end(), False
        else:
            opened = True
    if opened:
        return None
    heading = _HEADING.match(text, ended)
    if heading is not None:
        answer = _ANSWER.search(text, heading.end() - 1)
        if answer is None:
            return None
        ended = answer.end()
    elif ended == 0 and not finals:
        return text
    said = text[ended:]
    return said if said.strip() else None


def read(text: str) -> Reading:
    """What a reply says, and in which form."""
    said = after_reasoning(text)
    if said is None:
        return Reading(text, open=True)
    said = said[:MAX_CHARACTERS]
    while special := _SPECIAL.match(said):
        said = said[special.end() :]
    if _ENTITY.search(said):
        said = html.unescape(said)
    fence = _FENCE.match(said)
    if fence and fence["language"].lower() not in _PROSE:
        start = said[:MAX_WRAPPED]
        found = (next(filter(None, one.groups()), "") for one in _COMMENT_OR_STRING.finditer(start))
        return Reading(said, code=True, wrapped=start, prose="\n".join(found))
    start = _FENCES.sub("\n", said) if fence else said
    if _TAGGED.match(start):
        start = _TAGS.sub("\n", start)
    elif _DATA.match(start):
        start = "\n".join(_values(start)) or start
    elif not fence and not _ENTRY.match(said) and not _LATEX.match(said.lstrip(" $")):
        return Reading(said)
    said_within = _LATEX.sub(" ", _ESCAPE.sub(_unescaped, start)).strip()
    return Reading(said_within or said, wrapped=_ESCAPE.sub(_unescaped, said[:MAX_WRAPPED]))


def _values(text: str) -> list[str]:
    """The strings of JSON that may be cut off, without keys."""
    return [one[1] for one in _STRING.finditer(text[: 4 * MAX_WRAPPED]) if not one[3] and one[1]]


def _unescaped(found: re.Match[str]) -> str:
    if code := found[1] or found[2]:
        return chr(int(code, 16))
    return {"n": "\n", "t": " ", "r": "\n"}.get(found[3].lower(), found[3])
