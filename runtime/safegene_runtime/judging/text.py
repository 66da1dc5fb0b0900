"""The text of a reply in one spelling, its words and its head."""

from __future__ import annotations

import functools
import re
import unicodedata

__all__ = ["HEAD_CHARACTERS", "head", "normal", "sentences", "text_content", "words"]

HEAD_CHARACTERS = 220
MAX_SENTENCES = 3
MAX_CHARACTERS = 16_384
"""Of a reply, after its reasoning: what lies beyond is not read."""

_SPELLINGS = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛ʼ＇", "'"),
        **dict.fromkeys("“”„‟«»「」『』", '"'),
        **dict.fromkeys("‐‑", "-"),
    }
)
# drawn as nothing: format characters, variation selectors, joiners, fillers
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u0600-\u0605\u061c\u06dd\u070f\u0890\u0891\u08e2\u115f\u1160\u17b4\u17b5"
    "\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0"
    "\ufff9-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# NFKC sorts a run of marks in quadratic time
_LONG_RUN = re.compile(r"([^\w\s!-~]{32})[^\w\s!-~]+")
# marks that no letter has taken up, such as strokes through every letter
_LOOSE_MARKS = re.compile("[\u0300-\u036f\u0483-\u0489\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff]+")
_APOSTROPHE = re.compile(r"(?<=\w)[`´](?=\w)")
_PARAGRAPHS = re.compile(r"\n\s*\n")
# Python counts the vowel signs of Indic scripts as no letters
_WORD = re.compile(
    r"(?:[^\W\d_]|[\u064b-\u065f\u0900-\u0963\u0970-\u0e7f\u1000-\u109f\u1780-\u17d3])+"
    r"(?:'[^\W\d_]+)*"
)
_BOLD = re.compile(r"[*_]{2,}|[*#>]")
_CODE = re.compile(r"```\w")
_ROLE = re.compile(
    r"^(?:assistant|ai|bot|answer|response|reply|output|message|content|text|final answer|"
    r"antwort|réponse|respuesta|risposta|resposta|antwoord|回答|答|答案|回复|답변|ответ|الجواب|उत्तर|a)\s*:"
)
_DRESSING = " \t\n*_#>\"'`-–—:([{|~¡¿"
# what somebody says within a reply is not what the reply says
_QUOTED = re.compile(r'(?<=\s)"[^"]*(?:"|$)')
_SENTENCE_END = re.compile(
    r"(?<=[.!?])\"?\s+|(?<=[。।؟])\"?\s*|(?<=[!?])(?=[\u3040-\u9fff\uac00-\ud7af])|\n"
)


def text_content() -> list[object]:
    """Everything above that a label depends on, JSON-ready."""
    patterns = (_INVISIBLE, _LONG_RUN, _LOOSE_MARKS, _APOSTROPHE, _PARAGRAPHS, _WORD, _BOLD, _CODE,
                _ROLE, _QUOTED, _SENTENCE_END)  # fmt: skip
    return [
        [HEAD_CHARACTERS, MAX_SENTENCES, MAX_CHARACTERS, _DRESSING],
        sorted(_SPELLINGS.items()),
        [one.pattern for one in patterns],
    ]


@functools.lru_cache(16)
def normal(text: str) -> str:
    """One spelling for quotes, case and width; paragraphs stay apart, other white space does not."""
    text = text[:MAX_CHARACTERS]
    if not text.isascii():
        text = _LONG_RUN.sub(r"\1", text.translate(_SPELLINGS))
        text = unicodedata.normalize("NFKC", text).translate(_SPELLINGS)
        text = _LOOSE_MARKS.sub("", _INVISIBLE.sub("", text))
    text = _APOSTROPHE.sub("'", text.casefold())
    paragraphs = (" ".join(part.split()) for part in _PARAGRAPHS.split(text))
    return "\n".join(part for part in paragraphs if part)


def words(text: str) -> list[str]:
    """The words of a normalised text; numbers and punctuation are overlooked."""
    return _WORD.findall(text)


def head(text: str) -> list[str]:
    """The first sentences of a normalised text, undressed of markdown and quotation marks."""
    if _CODE.match(text):
        return []  # code: what it prints is not what the reply says
    text = _ROLE.sub("", _BOLD.sub("", text[: 8 * HEAD_CHARACTERS]).lstrip(_DRESSING))
    text = text.lstrip(_DRESSING)[:HEAD_CHARACTERS]
    return sentences(_QUOTED.sub(" ", text))[:MAX_SENTENCES]


def sentences(text: str) -> list[str]:
    """The sentences of a normalised text."""
    return [one for one in _SENTENCE_END.split(text) if one]
