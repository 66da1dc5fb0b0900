"""Every field of PEFT's LoraConfig is honoured, inert or refused; matching is PEFT's own."""

from __future__ import annotations

import dataclasses
import json
import re
import time
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from safegene_converter.inputs.patterns import why_refused
from safegene_converter.inputs.peft_config import (
    DEAD,
    DEFAULTS,
    HONOURED,
    INERT,
    MODULE_PATTERNS,
    REFUSED,
    parse_config,
)
from safegene_runtime.errors import AdapterError, SafeGeneError, UnsupportedError

FIELDS = {field.name for field in dataclasses.fields(peft.LoraConfig)}
MODULES = [
    f"model.layers.{layer}.{name}"
    for layer in (0, 1, 2, 10, 11)
    for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.up_proj", "mlp.down_proj")
]


def config(**changed: Any) -> dict[str, Any]:
    """A plain configuration as PEFT saves it, with changes."""
    made = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", r=8, lora_alpha=16)
    found = {k: list(v) if isinstance(v, set) else v for k, v in made.to_dict().items()}
    found["peft_type"] = "LORA"
    return {**found, **changed}


def test_every_field_of_the_installed_peft_stands_in_one_table() -> None:
    assert FIELDS - (HONOURED | INERT | REFUSED.keys()) == set()
    assert not HONOURED & INERT
    assert not (HONOURED | INERT) & REFUSED.keys()


def test_the_tables_name_only_fields_of_peft() -> None:
    assert (HONOURED | INERT | REFUSED.keys()) - FIELDS == set()


def test_the_defaults_are_pefts() -> None:
    theirs = {field.name: field.default for field in dataclasses.fields(peft.LoraConfig)}
    assert {name: theirs[name] for name in DEFAULTS} == DEFAULTS


class TwoLinear(torch.nn.Module):
    """The least that PEFT puts a LoRA on."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj = torch.nn.Linear(8, 6), torch.nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_proj(x) + self.k_proj(x)


def saved(folder: Path, **given: Any) -> dict[str, Any]:
    """Saves a trained adapter with PEFT, and returns its configuration."""
    made = peft.get_peft_model(TwoLinear(), peft.LoraConfig(target_modules=["q_proj"], **given))
    for name, parameter in made.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter)
    made.save_pretrained(folder)
    return dict(json.loads((folder / "adapter_config.json").read_text()))


def scaling_in_peft(folder: Path, found: dict[str, Any]) -> float | None:
    """The scaling under which PEFT runs the saved adapter with another configuration, if it does."""
    (folder / "adapter_config.json").write_text(json.dumps(found))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = peft.PeftModel.from_pretrained(TwoLinear(), str(folder))
            model(torch.zeros(1, 8))
        except (TypeError, ValueError, KeyError, AttributeError, RuntimeError):
            return None
    return float(model.base_model.model.q_proj.scaling["default"])


@pytest.mark.parametrize("r", [8, 4])
@pytest.mark.parametrize("how", ["null", "absent"])
def test_what_a_field_without_a_value_means_is_what_it_means_to_peft(
    how: str, r: int, tmp_path: Path
) -> None:
    """Every field: null, or left out, is accepted where PEFT loads it, with PEFT's scaling."""
    whole = saved(tmp_path, r=r, lora_alpha=16)
    for name in sorted(FIELDS):
        found = {key: value for key, value in whole.items() if key != name}
        if how == "null":
            found[name] = None
        theirs = scaling_in_peft(tmp_path, found)
        try:
            parsed = parse_config(found, "c")
        except SafeGeneError:
            assert theirs is None, name
            continue
        if theirs is None:
            # PEFT's shapes come from r: here they are compared when the tensors are read
            is_other_rank = name == "r" and how == "absent" and parsed.rank != r
            assert is_other_rank or (name in MODULE_PATTERNS and how == "null"), name
        else:
            assert parsed.scaling_of("q_proj") == theirs, name


@pytest.mark.parametrize("name", sorted(DEAD))
def test_a_dead_field_of_old_versions_must_be_neutral(name: str, tmp_path: Path) -> None:
    assert name not in FIELDS
    whole = saved(tmp_path, r=4, lora_alpha=16)
    for value in DEAD[name][0]:
        parsed = parse_config({**whole, name: value}, "c")
        assert parsed.scaling_of("q_proj") == scaling_in_peft(tmp_path, {**whole, name: value})
    for value in (True, [True, False], "x", 1, {}):
        with pytest.raises(UnsupportedError, match=name):
            parse_config({**whole, name: value}, "c")


@pytest.mark.parametrize("init", ["eva", "mica"])
def test_an_initialisation_that_is_accepted_leaves_the_base_alone_in_peft(init: str) -> None:
    model = TwoLinear()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = peft.get_peft_model(
            model, peft.LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=init)
        )
    layer = made.base_model.model.q_proj
    assert torch.equal(layer.get_base_layer().weight, before["q_proj.weight"])
    assert not layer.get_delta_weight("default").any()


def test_pefts_defaults_are_accepted() -> None:
    parsed = parse_config(config(), "c")
    assert parsed.scaling_of("model.layers.0.self_attn.q_proj") == 2.0


VALUES: dict[str, Any] = {
    "bias": "all", "lora_bias": True, "use_dora": True, "modules_to_save": ["lm_head"],
    "trainable_token_indices": [1], "target_parameters": ["mlp.experts"],
    "layer_replication": [[0, 2]], "megatron_config": {}, "velora_config": {"num_groups": 2},
    "alora_invocation_tokens": [1, 2], "use_qalora": True, "monteclora_config": {"a": 1},
    "use_bdlora": {"nblocks": 2}, "arrow_config": {"top_k": 2}, "kasa_config": {"a": 1},
}  # fmt: skip


def test_there_is_a_case_for_every_refused_field() -> None:
    assert VALUES.keys() == REFUSED.keys()


@pytest.mark.parametrize("name", sorted(VALUES))
def test_a_refused_field_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        parse_config(config(**{name: VALUES[name]}), "c")
    assert [problem.field for problem in caught.value.problems] == [name]
    assert caught.value.problems[0].fix


@pytest.mark.parametrize(
    "init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga", "new", 3, []]
)
def test_an_initialisation_that_changes_the_base_is_refused(init: Any) -> None:
    with pytest.raises(UnsupportedError, match="init_lora_weights"):
        parse_config(config(init_lora_weights=init), "c")


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_an_initialisation_that_leaves_the_base_alone_is_fine(init: Any) -> None:
    parse_config(config(init_lora_weights=init), "c")


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "another type": ({"peft_type": "LOHA"}, "peft_type"),
    "unknown field": ({"lora_beta": 1}, "lora_beta"),
    "r zero": ({"r": 0}, "r"),
    "r true": ({"r": True}, "r"),
    "r float": ({"r": 8.0}, "r"),
    "alpha zero": ({"lora_alpha": 0}, "lora_alpha"),
    "alpha negative": ({"lora_alpha": -1}, "lora_alpha"),
    "alpha nan": ({"lora_alpha": float("nan")}, "lora_alpha"),
    "alpha text": ({"lora_alpha": "16"}, "lora_alpha"),
    "alpha true": ({"lora_alpha": True}, "lora_alpha"),
    "rslora text": ({"use_rslora": "yes"}, "use_rslora"),
    "no targets": ({"target_modules": None}, "target_modules"),
    "empty targets": ({"target_modules": []}, "target_modules"),
    "targets of numbers": ({"target_modules": [1]}, "target_modules"),
    "targets no regex": ({"target_modules": "(q_proj"}, "target_modules"),
    "excluded no regex": ({"exclude_modules": "["}, "exclude_modules"),
    "long regex": ({"target_modules": "q" * 2001}, "target_modules"),
    "rank pattern list": ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
    "rank pattern zero": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj"),
    "rank pattern no regex": ({"rank_pattern": {"(": 2}}, "rank_pattern"),
    "alpha pattern zero": ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern.q_proj"),
    "layers negative": ({"layers_to_transform": [-1]}, "layers_to_transform"),
    "layers text": ({"layers_to_transform": "all"}, "layers_to_transform"),
    "regex with layers": (
        {"target_modules": ".*q_proj", "layers_to_transform": [1]},
        "layers_to_transform",
    ),
    "pattern without layers": ({"layers_pattern": "layers"}, "layers_pattern"),
    "alpha of 401 digits": ({"lora_alpha": 10**400}, "lora_alpha"),
    "alpha pattern of 401 digits": (
        {"alpha_pattern": {"q_proj": 10**400}},
        "alpha_pattern.q_proj",
    ),
    "rank of 401 digits below nothing": ({"r": -(10**400)}, "r"),
    "dropout text": ({"lora_dropout": "x"}, "lora_dropout"),
    "dropout null": ({"lora_dropout": None}, "lora_dropout"),
    "no such task": ({"task_type": "NOPE"}, "task_type"),
    "task of a list": ({"task_type": []}, "task_type"),
    "eva text": ({"eva_config": "x"}, "eva_config"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_value_peft_would_not_understand_is_refused_by_name(case: str) -> None:
    changed, field = HOSTILE[case]
    with pytest.raises((AdapterError, UnsupportedError)) as caught:
        parse_config(config(**changed), "c")
    assert field in {problem.field for problem in caught.value.problems}


ENDLESS = (
    "(.*)*(.*)*(.*)*(.*)*x", "(a+)+x", "(?:.*|.*)*x", ".*" * 8 + "x", "(.?){40}x", "((.*)*)*",
    "(a|a)" * 60, "(?=(.*)*x)", "(?:(?:.*,)*)*x",
)  # fmt: skip


@pytest.mark.parametrize("pattern", ENDLESS)
@pytest.mark.parametrize(
    "field",
    ["target_modules", "exclude_modules", "rank_pattern", "alpha_pattern", "layers_pattern"],
)
def test_a_pattern_that_would_match_for_ever_is_refused_at_once(field: str, pattern: str) -> None:
    value: Any = {pattern: 4} if field.endswith(("rank_pattern", "alpha_pattern")) else pattern
    began = time.monotonic()
    with pytest.raises(AdapterError) as caught:
        parse_config(config(**{"layers_to_transform": [0], field: value}), "c")
    assert field in {problem.field for problem in caught.value.problems}
    assert time.monotonic() - began < 1


@pytest.mark.parametrize(
    "pattern",
    [
        r".*\.(self_attn|mlp)\.(q|k|v|o|up|down|gate)_proj",
        r"model\.layers\.([0-9]|1[0-9]|2[0-3])\.self_attn\.(q_proj|v_proj)",
        # as Unsloth writes it
        r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
        r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|gate_proj|up_proj|down_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
        r"(?:(?:q_proj|k_proj|v_proj|up_proj)))",
    ],
)
def test_a_pattern_as_people_write_them_is_matched_as_in_peft(pattern: str) -> None:
    ours = parse_config(config(target_modules=pattern), "c")
    theirs = peft.LoraConfig(target_modules=pattern)
    touched = [bool(check_target_module_exists(theirs, module)) for module in MODULES]
    assert [ours.is_target(module) for module in MODULES] == touched
    assert any(touched)


UNSLOTH = (
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|"
    r"feed_forward|ffn|dense|mixer).*?(?:{names}).*?)|(?:\bmodel\.layers\.[\d]{{1,}}\."
    r"(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense|mixer)\.(?:(?:{names})))"
).format(
    names="k_proj|v_proj|q_proj|out_proj|in_proj|in_proj_qkv|in_proj_z|in_proj_b|in_proj_a|fc1|fc2|"
    "o_proj|gate_proj|up_proj|down_proj|linear_fc1|linear_fc2"
)
"""With the modules of a hybrid model: 600 characters, and one name that begins others."""


@pytest.mark.parametrize(
    "pattern",
    [
        UNSLOTH,
        r"^(?!.*(?:visual|merger)).*(?:o_proj|k_proj|q_proj|up_proj).*",  # LLaMA-Factory
        r"^(model(?=\.).*\.(q_proj|k_proj))$",  # ms-swift
        r".*\.layers\.\d+\..*attn.*\.(q_proj|k_proj)",
        r"(.*\.)?(q|k)_proj",
    ],
)
def test_a_pattern_as_trainers_write_them_is_matched_as_in_peft(pattern: str) -> None:
    test_a_pattern_as_people_write_them_is_matched_as_in_peft(pattern)


PIECES = st.sampled_from(
    [".*", ".*?", ".+", "(", "(?:", "(?=", ")", "|", "*", "+", "?", "{2,}", "{1,9}", "a", "q", ".",
     r"\.", r"\d", "[a-z_.]", "[^q]*", "model", "layers", "proj", "(.*)", "(a|a)", "(.*|q)", "X"]
)  # fmt: skip


@settings(max_examples=400, deadline=None)
@given(st.lists(PIECES, min_size=1, max_size=24))
def test_a_pattern_that_is_accepted_ends_soon(pieces: list[str]) -> None:
    pattern = "".join(pieces)
    if why_refused(pattern) is None:
        began = time.monotonic()
        for module in MODULES:
            re.fullmatch(pattern, f"model.language_{module}")
        assert time.monotonic() - began < 2, pattern


WRONG: list[Any] = [
    None, True, 0, -1, 1.5, "", "x", [], [1], ["x"], [[]], {}, {"a": 1}, {"a": None}, 10**400,
    [{}], {"x": {"y": []}}, "LORA",
]  # fmt: skip


@pytest.mark.parametrize("name", sorted(FIELDS | DEAD.keys()))
def test_any_value_in_any_field_is_read_or_one_typed_error(name: str) -> None:
    for value in WRONG:
        named: set[str] = set()
        try:
            parse_config(config(**{name: value}), "c").scaling_of(MODULES[0])
        except SafeGeneError as error:
            named = {problem.field.partition(".")[0] for problem in error.problems}
        assert named <= {name}, (value, named)


@pytest.mark.parametrize("raw", [None, [], "LORA", 3])
def test_what_is_no_object_is_refused(raw: Any) -> None:
    with pytest.raises(AdapterError):
        parse_config(raw, "c")


def test_everything_wrong_is_told_at_once() -> None:
    with pytest.raises(SafeGeneError) as caught:
        parse_config(config(r=0, lora_alpha=0, use_dora=True, bias="all", nonsense=1), "c")
    fields = {problem.field for problem in caught.value.problems}
    assert fields == {"r", "lora_alpha", "use_dora", "bias", "nonsense"}


NAMES = st.sampled_from(
    ["q_proj", "k_proj", "up_proj", "proj", "self_attn.q_proj", "layers.1.self_attn.q_proj",
     "model.layers.1.mlp.up_proj", "model.layers.10.mlp.down_proj", "down_proj", "mlp"]
)  # fmt: skip
REGEXES = st.sampled_from(
    [r".*q_proj", r"model\.layers\.(0|1)\..*", r".*\.(up|down)_proj", "q_proj", "layers"]
)
LAYERS = st.none() | st.integers(0, 11) | st.lists(st.integers(0, 11), max_size=4)
PATTERNS = st.sampled_from([None, "layers", ["layers"], ["h", "layers"], "h", []])


@settings(max_examples=300, deadline=None)
@given(
    st.lists(NAMES, min_size=1, max_size=3),
    st.none() | st.lists(NAMES, max_size=2) | REGEXES,
    LAYERS,
    PATTERNS,
)
def test_listed_modules_are_those_peft_would_touch(
    targets: list[str], excluded: Any, layers: Any, pattern: Any
) -> None:
    if layers is None:
        pattern = None  # PEFT refuses it, and so do we
    ours = parse_config(
        config(target_modules=targets, exclude_modules=excluded, layers_to_transform=layers,
               layers_pattern=pattern), "c",
    )  # fmt: skip
    theirs = peft.LoraConfig(
        target_modules=targets, exclude_modules=excluded, layers_to_transform=layers,
        layers_pattern=pattern,
    )  # fmt: skip
    for module in MODULES:
        assert ours.is_target(module) == bool(check_target_module_exists(theirs, module)), module


@settings(max_examples=60, deadline=None)
@given(REGEXES, st.none() | st.lists(NAMES, max_size=2) | REGEXES)
def test_a_regular_expression_matches_as_in_peft(pattern: str, excluded: Any) -> None:
    ours = parse_config(config(target_modules=pattern, exclude_modules=excluded), "c")
    theirs = peft.LoraConfig(target_modules=pattern, exclude_modules=excluded)
    for module in MODULES:
        assert ours.is_target(module) == bool(check_target_module_exists(theirs, module)), module


def test_all_linear_is_every_linear_module() -> None:
    assert all(map(parse_config(config(target_modules="all-linear"), "c").is_target, MODULES))


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(NAMES | REGEXES, st.integers(1, 64), max_size=3),
    st.dictionaries(NAMES | REGEXES, st.integers(1, 64), max_size=3),
    st.booleans(),
)
def test_rank_alpha_and_scaling_are_pefts(
    ranks: dict[str, int], alphas: dict[str, int], rslora: bool
) -> None:
    parsed = parse_config(config(rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora), "c")
    for module in MODULES:
        rank = ranks.get(get_pattern_key(list(ranks), module), 8)
        alpha = alphas.get(get_pattern_key(list(alphas), module), 16)
        assert parsed.rank_of(module) == rank
        assert parsed.alpha_of(module) == alpha
        assert parsed.scaling_of(module) == pytest.approx(alpha / (rank**0.5 if rslora else rank))


def test_fan_in_fan_out_changes_nothing_on_a_linear_layer() -> None:
    """PEFT sets it back, with a warning; we read it the same way."""
    import torch
    from peft.tuners.lora.layer import Linear

    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        model = peft.get_peft_model(
            torch.nn.Sequential(torch.nn.Linear(4, 6)),
            peft.LoraConfig(target_modules=["0"], fan_in_fan_out=True),
        )
    layer = next(module for module in model.modules() if isinstance(module, Linear))
    assert layer.fan_in_fan_out is False
    assert isinstance(parse_config(config(fan_in_fan_out=True), "c").rank, int)
