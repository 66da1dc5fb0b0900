"""What turns text into ids for an ONNX model: tokenizer, template and configuration beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safegene_runtime.engines.chat import default_template
from safegene_runtime.engines.ort_packages import read_tokenizer
from safegene_runtime.errors import FormatError, Problem
from safegene_runtime.formats import strictjson
from safegene_runtime.formats.files import is_there, read_small_file
from safegene_runtime.formats.onnx.config import head_size

__all__ = ["OrtText", "TextFiles", "read_text_files"]

MAX_TEXT_BYTES = 64 << 20
TEMPLATE_NAME = "chat_template.jinja"


@dataclass(frozen=True)
class TextFiles:
    """What turns text into ids, read once from the folder of a model.

    Attributes:
        tokenizer: tokenizer.json.
        template: the chat template, or None.
        bos_token: the token that begins a text, or None.
        eos_token: the token that ends one, or None.
        eos_ids: every id that ends a generation, as the configuration says.
        head_size: elements of one attention head, or None where no configuration says it.
        context_length: positions the model was made for, or None.
    """

    tokenizer: str
    template: str | None
    bos_token: str | None
    eos_token: str | None
    eos_ids: tuple[int, ...]
    head_size: int | None
    context_length: int | None


class OrtText:
    """Text to ids and back, by the files in a model's folder.

    Attributes:
        files: what was read there.

    Raises:
        EngineError: tokenizers is not installed.
        FormatError: tokenizer.json is missing, or a file breaks its format.
    """

    def __init__(self, folder: Path) -> None:
        self.files = read_text_files(folder)
        self._tokenizer = read_tokenizer(self.files.tokenizer, str(folder))
        self._tokenizer.no_truncation()

    def tokenize(self, text: str, *, add_special: bool, parse_special: bool = True) -> list[int]:
        """Text to ids, by the model's own tokenizer.json."""
        self._tokenizer.encode_special_tokens = not parse_special
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special).ids
        return ids

    def detokenize(self, ids: Sequence[int], *, special: bool = True) -> str:
        """Ids to text; control tokens are spelt out unless `special` is False."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=not special)
        return text

    def chat_template(self) -> str | None:
        """The template beside the model, if there is one."""
        return self.files.template

    @property
    def bos_id(self) -> int | None:
        """The id that begins a text, if the model has one."""
        return self._id_of(self.files.bos_token)

    @property
    def eos_id(self) -> int | None:
        """The id that ends a text, if the model has one."""
        return self._id_of(self.files.eos_token)

    @property
    def add_bos(self) -> bool:
        """Whether `tokenize(add_special=True)` begins with `bos_id`."""
        first = self.tokenize("x", add_special=True)[:1]
        return self.bos_id is not None and first == [self.bos_id]

    @property
    def eog_ids(self) -> frozenset[int]:
        """Every id that the model's configuration says ends a generation."""
        known = set(self.files.eos_ids)
        if self.eos_id is not None:
            known.add(self.eos_id)
        return frozenset(known)

    def _id_of(self, token: str | None) -> int | None:
        found: int | None = self._tokenizer.token_to_id(token) if token is not None else None
        return found


def read_text_files(folder: Path) -> TextFiles:
    """Reads tokenizer, template and configuration beside a model.

    Raises:
        FormatError: tokenizer.json is missing, or a file breaks its format.
    """

    def read(name: str) -> bytes | None:
        path = folder / name
        return read_small_file(path, MAX_TEXT_BYTES) if is_there(path) else None

    def parsed(name: str) -> dict[str, Any]:
        data = read(name)
        value = strictjson.loads(data, str(folder / name)) if data is not None else {}
        return value if isinstance(value, dict) else {}

    tokenizer = read("tokenizer.json")
    if tokenizer is None:
        raise FormatError(
            Problem(
                str(folder),
                "tokenizer.json",
                "the tokenizer beside the model",
                "nothing",
                "copy it from the model that was exported",
            )
        )
    settings, genai = parsed("tokenizer_config.json"), parsed("genai_config.json")
    config, generation = parsed("config.json"), parsed("generation_config.json")
    template = read(TEMPLATE_NAME)
    text = default_template(
        settings.get("chat_template") if template is None else template.decode("utf-8"), str(folder)
    )
    model = genai.get("model", {}) if isinstance(genai.get("model"), dict) else {}
    decoder = model.get("decoder", {}) if isinstance(model.get("decoder"), dict) else {}
    ends: list[int] = []
    for source in (model, generation, config):
        value = source.get("eos_token_id")
        ends += [one for one in (value if isinstance(value, list) else [value]) if type(one) is int]
    length = model.get("context_length") or config.get("max_position_embeddings")
    return TextFiles(
        tokenizer=tokenizer.decode("utf-8"),
        template=text,
        bos_token=_token(settings.get("bos_token")),
        eos_token=_token(settings.get("eos_token")),
        eos_ids=tuple(dict.fromkeys(ends)),
        head_size=head_size(decoder, config),
        context_length=length if type(length) is int and length > 0 else None,
    )


def _token(value: Any) -> str | None:
    """A special token, plain or as transformers' AddedToken."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None
