from __future__ import annotations

import json
import re
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from safegene_runtime.errors import FormatError
from safegene_runtime.gating.profiles import PROFILES
from safegene_runtime.record.prompts import (
    HAZARDS,
    MAX_FILE_BYTES,
    MAX_TEXT_CHARACTERS,
    SUITES,
    Prompt,
    SuiteSize,
    builtin_suite,
    load_prompts,
)

HARMFUL = [prompt for prompt in builtin_suite() if prompt.kind == "harmful"]
BENIGN = [prompt for prompt in builtin_suite() if prompt.kind == "benign"]
NEAR = 0.6
"""Share of words in common from which two requests are the same one."""


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[a-z0-9]+", text.lower().replace("'", "")))


# --- the suite -------------------------------------------------------------------------------------


def test_suite_is_large_enough_on_both_sides() -> None:
    """The profile `ci` needs 150 refusals, and no model refuses or answers all it is asked."""
    wanted = PROFILES["ci"].min_refused
    assert len(HARMFUL) >= 1.2 * wanted
    assert len(BENIGN) >= 1.2 * wanted


def test_suite_spreads_harmful_prompts_evenly_over_all_hazards() -> None:
    counts = Counter(prompt.category for prompt in HARMFUL)
    assert set(counts) == set(HAZARDS)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_suite_has_no_sexual_category() -> None:
    for prompt in builtin_suite():
        assert not re.search(r"sex|csam|child_exploitation|nudity|porn", prompt.category)


def test_at_least_a_third_of_the_benign_prompts_are_borderline() -> None:
    """No longer half: the gate counts the benign prompts that the reference answers, and those are
    the plain ones above all."""
    borderline = [prompt for prompt in BENIGN if prompt.borderline]
    assert 3 * len(borderline) >= len(BENIGN)
    # each names the harm it resembles, and every harm is resembled
    assert {prompt.category for prompt in borderline} == set(HAZARDS)
    assert not any(prompt.borderline for prompt in HARMFUL)


def test_ordinary_prompts_are_filed_by_topic() -> None:
    topics = {prompt.category for prompt in BENIGN if not prompt.borderline}
    assert {"facts", "writing", "cooking", "coding", "maths", "advice"} <= topics
    assert not topics & set(HAZARDS)


def test_suite_ids_are_unique() -> None:
    assert len({prompt.id for prompt in builtin_suite()}) == len(builtin_suite())


def test_suite_holds_no_near_duplicates() -> None:
    near = [
        (one.text, other.text)
        for one, other in combinations(builtin_suite(), 2)
        if len(words(one.text) & words(other.text))
        > NEAR * len(words(one.text) | words(other.text))
    ]
    assert not near


def test_suite_prompts_are_one_short_request_each() -> None:
    """A request only: there is no room for instructions in it."""
    for prompt in builtin_suite():
        assert "\n" not in prompt.text
        assert len(prompt.text) <= 100, prompt.text
        assert not re.search(r"[.!?] \w", prompt.text), prompt.text


@pytest.mark.parametrize("size", SUITES)
def test_suite_is_the_same_every_time(size: SuiteSize) -> None:
    assert builtin_suite(size) is builtin_suite(size)


def test_ci_is_the_default_and_everything() -> None:
    assert builtin_suite() is builtin_suite("ci")
    assert builtin_suite() != builtin_suite("smoke")


def test_smoke_is_a_part_of_ci_in_its_order() -> None:
    smoke = set(builtin_suite("smoke"))
    assert builtin_suite("smoke") == tuple(p for p in builtin_suite("ci") if p in smoke)


def test_smoke_takes_the_first_prompts_of_every_hazard_and_topic_evenly() -> None:
    for harmful, borderline, count in ((True, False, 72), (False, True, 36), (False, False, 36)):
        groups: dict[str, list[Prompt]] = {}
        for prompt in builtin_suite("ci"):
            if (prompt.kind == "harmful", prompt.borderline) == (harmful, borderline):
                groups.setdefault(prompt.category, []).append(prompt)
        taken = {
            name: [prompt for prompt in group if prompt in builtin_suite("smoke")]
            for name, group in groups.items()
        }
        assert sum(map(len, taken.values())) == count
        assert max(map(len, taken.values())) - min(map(len, taken.values())) <= 1
        assert all(found == groups[name][: len(found)] for name, found in taken.items())


def test_smoke_suffices_for_the_profile_of_its_name() -> None:
    harmful = [prompt for prompt in builtin_suite("smoke") if prompt.kind == "harmful"]
    assert len(harmful) >= 1.2 * PROFILES["smoke"].min_refused


@pytest.mark.parametrize("size", ["release", "", None, ["ci"]])
def test_an_unknown_size_of_the_suite_is_a_format_error(size: Any) -> None:
    with pytest.raises(FormatError) as caught:
        builtin_suite(size)
    (problem,) = caught.value.problems
    assert (problem.where, problem.field, problem.expected) == ("suite", "size", "smoke or ci")
    assert problem.got == repr(size)
    assert problem.fix


# --- reading a user's file -------------------------------------------------------------------------


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_what_was_written_as_jsonl_is_read_back(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "p.jsonl",
        "".join(
            json.dumps(
                {
                    "id": prompt.id,
                    "text": prompt.text,
                    "kind": prompt.kind,
                    "category": prompt.category,
                    "borderline": prompt.borderline,
                }
            )
            + "\n"
            for prompt in builtin_suite()
        ),
    )
    assert load_prompts(path) == builtin_suite()


def test_jsonl_fills_in_what_is_optional(tmp_path: Path) -> None:
    path = write(
        tmp_path, "p.jsonl", '{"text": "Grüße 🙂"}\n\n{"prompt": "two", "kind": "benign"}\n'
    )
    assert load_prompts(path) == (
        Prompt("line-1", "Grüße 🙂", "harmful", "uncategorised"),
        Prompt("line-3", "two", "benign", "uncategorised"),
    )


@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"], ids=["plain", "bom"])
@pytest.mark.parametrize("newline", ["\n", "\r\n"], ids=["lf", "crlf"])
def test_csv_reads_as_spreadsheets_write_it(tmp_path: Path, bom: bytes, newline: str) -> None:
    lines = [
        "ID,Text,Kind,Borderline",
        'a,"one, with a comma",benign,TRUE',
        ",,,",
        'b,"says ""no""",,',
        "",
    ]
    path = write(tmp_path, "p.csv", bom + newline.join(lines).encode())
    assert load_prompts(path) == (
        Prompt("a", "one, with a comma", "benign", "uncategorised", True),
        Prompt("b", 'says "no"', "harmful", "uncategorised"),
    )


def test_csv_without_ids_counts_lines_as_an_editor_does(tmp_path: Path) -> None:
    path = write(tmp_path, "p.csv", 'prompt\n"two\nlines"\nnext\n')
    assert [prompt.id for prompt in load_prompts(path)] == ["line-2", "line-4"]


def test_a_link_that_the_user_names_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link.jsonl").symlink_to(write(tmp_path, "p.jsonl", '{"text": "one"}\n'))
    assert len(load_prompts(tmp_path / "link.jsonl")) == 1


# name: (file name, content, where, field, what the message must say)
MALFORMED: dict[str, tuple[str, str | bytes, str, str, str]] = {
    "empty file": ("p.jsonl", "", "", "prompts", "an empty file"),
    "blank lines only": ("p.jsonl", "\n\n  \n", "", "prompts", "at least one"),
    "empty csv": ("p.csv", "", ":1", "header", "text or prompt"),
    "csv with a header only": ("p.csv", "id,text\n", "", "prompts", "none"),
    "csv without a header": ("p.csv", "How are you?,benign\n", ":1", "header", "id,text,kind"),
    "csv with a comment first": ("p.csv", "# v1\ntext\na\n", ":1", "header", "text or prompt"),
    "csv with an unknown column": ("p.csv", "text,extra\na,b\n", ":1", "extra", "unknown"),
    "csv with a column twice": ("p.csv", "text,text\na,b\n", ":1", "text", "twice"),
    "csv with a cell too many": ("p.csv", "id,text\na,one, two\n", ":2", "columns", "quotes"),
    "csv with a broken quote": ("p.csv", 'text\n"a"b\n', ":2", "content", "CSV"),
    "csv not utf-8": ("p.csv", b"text\nGr\xfc\xdfe\n", "", "content", "UTF-8"),
    "jsonl not utf-8": ("p.jsonl", b'{"text": "Gr\xfc\xdfe"}\n', ":1", "content", "UTF-8"),
    "not json": ("p.jsonl", '{"text": "a"}\nhello\n', ":2", "content", "JSON"),
    "not an object": ("p.jsonl", '["a"]\n', ":1", "value", "a JSON object"),
    "key twice in an object": ("p.jsonl", '{"text": "a", "text": "b"}\n', ":1", "text", "once"),
    "unknown key": ("p.jsonl", '{"text": "a", "lang": "en"}\n', ":1", "lang", "unknown"),
    "text missing": ("p.jsonl", '{"id": "a"}\n', ":1", "text", "nothing"),
    "text empty": ("p.jsonl", '{"text": " "}\n', ":1", "text", "a request"),
    "text not a string": ("p.jsonl", '{"text": 4}\n', ":1", "text", "a request"),
    "text and prompt": ("p.jsonl", '{"text": "a", "prompt": "b"}\n', ":1", "prompt", "both"),
    "text too long": (
        "p.jsonl",
        json.dumps({"text": "a" * (MAX_TEXT_CHARACTERS + 1)}),
        ":1",
        "text",
        "shorten",
    ),
    "nul": ("p.jsonl", '{"text": "a\\u0000b"}\n', ":1", "text", "control characters"),
    "nul in csv": ("p.csv", "text\na\0b\n", ":2", "", ""),
    "escape sequence": ("p.jsonl", '{"text": "\\u001b[2J"}\n', ":1", "text", "control characters"),
    "half a surrogate pair": ("p.jsonl", '{"text": "\\ud800"}\n', ":1", "content", "surrogate"),
    "unknown kind": (
        "p.jsonl",
        '{"text": "a", "kind": "bad"}\n',
        ":1",
        "kind",
        "harmful or benign",
    ),
    "id with spaces": ("p.jsonl", '{"text": "a", "id": "a b"}\n', ":1", "id", "letters"),
    "id empty": ("p.jsonl", '{"text": "a", "id": ""}\n', ":1", "id", "letters"),
    "id not a string": ("p.jsonl", '{"text": "a", "id": 1}\n', ":1", "id", "letters"),
    "id twice": (
        "p.jsonl",
        '{"text": "a", "id": "x"}\n{"text": "b", "id": "x"}\n',
        ":2",
        "id",
        "line 1",
    ),
    "text twice": ("p.csv", "text\na  b\nc\na b\n", ":4", "text", "line 2"),
    "category empty": ("p.jsonl", '{"text": "a", "category": ""}\n', ":1", "category", "a name"),
    "borderline not a boolean": (
        "p.csv",
        "text,kind,borderline\na,benign,maybe\n",
        ":2",
        "borderline",
        "true or false",
    ),
    "borderline and harmful": (
        "p.jsonl",
        '{"text": "a", "borderline": true}\n',
        ":1",
        "borderline",
        "harmful",
    ),
    "too large": ("p.jsonl", b"x" * (MAX_FILE_BYTES + 1), "", "size", "at most"),
    "git-lfs pointer": (
        "p.jsonl",
        "version https://git-lfs.github.com/spec/v1\n",
        "",
        "content",
        "git lfs pull",
    ),
    "unknown suffix": ("p.txt", "hello\n", "", "name", ".jsonl or .csv"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_refused_with_its_place(tmp_path: Path, case: str) -> None:
    name, content, where, field, said = MALFORMED[case]
    path = write(tmp_path, name, content)
    with pytest.raises(FormatError) as caught:
        load_prompts(path)
    first = caught.value.problems[0]
    assert first.where == f"{path}{where}"
    assert field in first.field
    assert said in str(first)
    assert first.fix


def test_missing_file_is_a_format_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="No such file"):
        load_prompts(tmp_path / "absent.jsonl")


def test_a_folder_is_a_format_error(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").mkdir()
    with pytest.raises(FormatError, match="regular file"):
        load_prompts(tmp_path / "p.jsonl")


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "p.jsonl",
        'no json\n{"text": ""}\n{"text": "a", "kind": "x", "more": 1}\n{"text": "b"}\n{"text": "b"}\n',
    )
    with pytest.raises(FormatError) as caught:
        load_prompts(path)
    places = [(one.where.rpartition(":")[2], one.field) for one in caught.value.problems]
    assert places == [
        ("1", "content"),
        ("2", "text"),
        ("3", "more"),
        ("3", "kind"),
        ("5", "text"),
    ]


def test_a_file_full_of_problems_is_not_told_in_full(tmp_path: Path) -> None:
    path = write(tmp_path, "p.jsonl", '{"text": ""}\n' * 5000)
    with pytest.raises(FormatError) as caught:
        load_prompts(path)
    assert len(caught.value.problems) < 200
    assert "stopped here" in str(caught.value)
