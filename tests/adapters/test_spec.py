"""The config is PEFT's: its rules for targets, ranks and scalings, every field either honoured or refused by name."""

import dataclasses
import json
import math
import re
from typing import Any

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from adapter_files import CONFIG, SHAPES, config_bytes
from swaplora_adapters.config.matching import Matcher, check_pattern
from swaplora_adapters.config.parse import ADALORA_IGNORED_FIELDS, IGNORED_FIELDS, INERT_FIELDS, parse_spec
from swaplora_adapters.config.patterns import MAX_WORK
from swaplora_adapters.config.spec import AdapterSpec
from swaplora_adapters.errors import InvalidAdapterError, UnsupportedAdapterError

HONOURED = {field.name for field in dataclasses.fields(AdapterSpec)} - {"inert"} | {"init_lora_weights"}
PEFT_FIELDS = {field.name for field in dataclasses.fields(peft.LoraConfig)}
ADALORA_FIELDS = {field.name for field in dataclasses.fields(peft.AdaLoraConfig)}
# What changes the meaning: a value, and what else must be given for it to say something.
MEANING: dict[str, dict[str, Any]] = {
    "r": {"r": 5},
    "target_modules": {"target_modules": ["k_proj"]},
    "exclude_modules": {"exclude_modules": ["k_proj"]},
    "lora_alpha": {"lora_alpha": 3},
    "bias": {"bias": "all"},
    "use_rslora": {"use_rslora": True},
    "modules_to_save": {"modules_to_save": ["norm"]},
    "layers_to_transform": {"layers_to_transform": [1]},
    "layers_pattern": {"layers_pattern": "h", "layers_to_transform": [1]},
    "rank_pattern": {"rank_pattern": {"q_proj": 2}},
    "alpha_pattern": {"alpha_pattern": {"q_proj": 2}},
    "trainable_token_indices": {"trainable_token_indices": [1]},
    "use_dora": {"use_dora": True},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1]},
    "use_qalora": {"use_qalora": True},
    "qalora_group_size": {"use_qalora": True, "qalora_group_size": 4},
    "lora_bias": {"lora_bias": True},
    "target_parameters": {"target_parameters": ["experts.w"]},
    "ensure_weight_tying": {"ensure_weight_tying": True},
    "peft_type": {"peft_type": "ADALORA"},
    "materialise": {"materialise": True},
    "id2label": {"task_type": "SEQ_CLS", "id2label": {"0": "a", "1": "b"}},
}
# Read, without a meaning of their own: how the base stores weights, what a warning compares, what is only checked.
CHECKED = {"fan_in_fan_out", "base_model_name_or_path", "task_type", "init_lora_weights"}
MODULES = [
    *SHAPES,
    "q_proj",
    "xq_proj",
    "model.layers.10.self_attn.q_proj",
    "model.layers.1.experts.0.up_proj",
    "transformer.h.1.attn.c_attn",
    "layers.1.q_proj",
    "model.layersX1.q_proj",
]


def parse(**fields: Any) -> AdapterSpec:
    return parse_spec(config_bytes(**fields))


def reasons(raw: bytes, error: type[InvalidAdapterError] = InvalidAdapterError) -> str:
    with pytest.raises(InvalidAdapterError) as caught:
        parse_spec(raw)
    assert caught.type is error
    return "\n".join(caught.value.reasons)


def peft_config(**fields: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{name: value for name, value in {**CONFIG, **fields}.items() if name != "peft_type"})


def test_what_peft_writes_by_default_is_read() -> None:
    raw = peft_config(task_type="CAUSAL_LM").to_dict() | {"target_modules": ["q_proj"]}
    assert raw.keys() | {"runtime_config"} == PEFT_FIELDS
    spec = parse_spec(json.dumps(raw).encode())
    assert (spec.r, spec.lora_alpha, spec.target_modules) == (4, 9.0, frozenset({"q_proj"}))


def test_absent_fields_have_pefts_defaults() -> None:
    spec = parse_spec(b'{"peft_type": "LORA", "target_modules": ["q_proj"]}')
    default = peft.LoraConfig()
    assert (spec.r, spec.lora_alpha, spec.use_rslora) == (default.r, default.lora_alpha, default.use_rslora)


@pytest.mark.parametrize("field", sorted(PEFT_FIELDS - HONOURED - IGNORED_FIELDS - INERT_FIELDS))
def test_every_other_field_of_peft_is_refused_by_name(field: str) -> None:
    assert repr(field) in reasons(config_bytes(**{field: {"x": 1}}), UnsupportedAdapterError)


def test_every_field_of_peft_is_honoured_checked_ignored_or_refused() -> None:
    """What is none of the first three is refused, as another test sees; fields that PEFT adds are among those."""
    assert MEANING.keys() | CHECKED == HONOURED
    assert not HONOURED & (IGNORED_FIELDS | INERT_FIELDS)
    assert ADALORA_IGNORED_FIELDS - {"r"} | {"init_r"} == ADALORA_FIELDS - PEFT_FIELDS


@pytest.mark.parametrize("field", MEANING)
def test_every_honoured_field_changes_the_meaning(field: str) -> None:
    spec = parse(**MEANING[field])
    others = {name: value for name, value in MEANING[field].items() if name != field}
    assert spec.canonical != parse(**others).canonical


@pytest.mark.parametrize("field", sorted(ADALORA_IGNORED_FIELDS))
def test_the_schedule_of_adalora_changes_nothing(field: str) -> None:
    assert parse(peft_type="ADALORA", **{field: 3}) == parse(peft_type="ADALORA")
    assert parse(peft_type="ADALORA", init_r=3) != parse(peft_type="ADALORA")


@pytest.mark.parametrize(
    "field", ["alora_invocation_tokens", "alpha_pattern", "lora_bias", "target_parameters", "use_dora", "use_rslora"]
)
def test_what_adalora_does_not_have_is_refused_by_name(field: str) -> None:
    assert field in reasons(config_bytes(**MEANING[field] | MEANING["peft_type"]), UnsupportedAdapterError)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("use_dora", "alora_invocation_tokens"),
        ("use_dora", "lora_bias"),
        ("use_dora", "use_qalora"),
        ("use_qalora", "lora_bias"),
        ("target_parameters", "use_dora"),
        ("target_parameters", "lora_bias"),
        ("alora_invocation_tokens", "modules_to_save"),
        ("alora_invocation_tokens", "bias"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(one: str, other: str) -> None:
    text = reasons(config_bytes(**MEANING[one], **MEANING[other]), UnsupportedAdapterError)
    assert one in text
    assert other in text


@pytest.mark.parametrize("field", sorted(IGNORED_FIELDS))
def test_ignored_fields_are_pefts_and_change_nothing(field: str) -> None:
    assert field in PEFT_FIELDS
    assert parse(**{field: {"x": 1}}) == parse()


@pytest.mark.parametrize("field", sorted(INERT_FIELDS))
def test_fields_that_matter_to_training_alone_change_nothing_and_are_named(field: str) -> None:
    spec = parse(**{field: {"x": 1}})
    assert (spec, spec.canonical, spec.inert) == (parse(), parse().canonical, (field,))
    assert parse(**{field: None}).inert == ()


@pytest.mark.parametrize("field", ["use_qa_lora", "use_merged_linear", "enable_lora", "model_key_mapping"])
def test_ms_swifts_fields_that_change_what_is_computed_are_refused(field: str) -> None:
    assert parse(**{field: False}) == parse(**{field: None}) == parse()
    assert repr(field) in reasons(config_bytes(**{field: True}), UnsupportedAdapterError)


def test_the_group_size_of_qalora_may_be_null_as_it_is_elsewhere() -> None:
    assert parse(qalora_group_size=None) == parse()


@pytest.mark.parametrize("value", [None, False, "", [], {}], ids=repr)
def test_unknown_fields_may_be_inert(value: object) -> None:
    assert parse(auto_map=value, velora_config=value) == parse()


@pytest.mark.parametrize("value", [True, 0, 0.0, 1, "x", [0], {"AutoModel": "evil.Model"}], ids=repr)
def test_unknown_fields_that_say_something_are_refused(value: object) -> None:
    assert "'auto_map'" in reasons(config_bytes(auto_map=value), UnsupportedAdapterError)


MALFORMED = {
    "r zero": ({"r": 0}, "r must be an integer from 1 to 4096"),
    "r huge": ({"r": 4097}, "r must be an integer"),
    "r bool": ({"r": True}, "r must be an integer"),
    "r float": ({"r": 4.0}, "r must be an integer"),
    "r text": ({"r": "4"}, "r must be an integer"),
    "alpha text": ({"lora_alpha": "16"}, "lora_alpha must be a number"),
    "alpha null": ({"lora_alpha": None}, "lora_alpha must be a number"),
    "alpha bool": ({"lora_alpha": True}, "lora_alpha must be a number"),
    "alpha zero": ({"lora_alpha": 0}, "lora_alpha must be a number other than 0"),
    "alpha huge": ({"lora_alpha": 1e7}, "lora_alpha must be a number"),
    "rslora int": ({"use_rslora": 1}, "use_rslora must be true or false"),
    "rank pattern list": ({"rank_pattern": [1]}, "rank_pattern must map"),
    "rank pattern zero": ({"rank_pattern": {"q_proj": 0}}, "rank_pattern['q_proj'] must be an integer"),
    "alpha pattern text": ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern['q_proj'] must be a number"),
    "pattern empty": ({"rank_pattern": {"": 4}}, "the pattern '' must have 1 to 2048 characters"),
    "no targets": ({"target_modules": []}, "target_modules names nothing"),
    "null targets": ({"target_modules": None}, "target_modules names nothing"),
    "targets number": ({"target_modules": 7}, "target_modules must be a list of strings"),
    "target empty": ({"target_modules": ["q_proj", ""]}, "target_modules must be a list of strings"),
    "targets unbalanced": ({"target_modules": "(q_proj"}, "is no regular expression: missing )"),
    "exclude number": ({"exclude_modules": [1]}, "exclude_modules must be a list of strings"),
    "layer negative": ({"layers_to_transform": [-1]}, "layers_to_transform must be layer numbers"),
    "layer 10^9": ({"layers_to_transform": 10**9}, "layers_to_transform must be layer numbers"),
    "layer bool": ({"layers_to_transform": [True]}, "layers_to_transform must be layer numbers"),
    "layers and regex": ({"target_modules": ".*q_proj", "layers_to_transform": [1]}, "to be a list"),
    "layers by alternatives": (
        {"layers_pattern": "h|layers", "layers_to_transform": [1]},
        "h|layers' must have its alternatives in a group",
    ),
    "pattern alone": ({"layers_pattern": "h"}, "layers_pattern needs layers_to_transform"),
    "base is a list": ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path must be null or"),
    "base has a newline": ({"base_model_name_or_path": "a\nb"}, "base_model_name_or_path must be null or"),
    "no kind": ({"peft_type": None}, "peft_type must be a string"),
}


@pytest.mark.parametrize(("fields", "complaint"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed(fields: dict[str, Any], complaint: str) -> None:
    assert complaint in reasons(config_bytes(**fields))


UNSUPPORTED: dict[str, dict[str, Any]] = {
    "LoHa": {"peft_type": "LOHA"},
    "X-LoRA": {"peft_type": "XLORA"},
    "Arrow": {"arrow_config": {"top_k": 3, "router_temperature": 1.0, "use_gks": False}},
    "task": {"task_type": "SEQ_2_SEQ_LM"},
    "layers twice": {"layer_replication": [[0, 1], [0, 1]]},
}


@pytest.mark.parametrize("fields", UNSUPPORTED.values(), ids=UNSUPPORTED.keys())
def test_unsupported_is_named(fields: dict[str, Any]) -> None:
    [field] = fields
    assert field in reasons(config_bytes(**fields), UnsupportedAdapterError)


@pytest.mark.parametrize("raw", [b"[]", b"7", b"null", b"{}", b"not json", b'{"r": 1, "r": 2}', b" " * (2 << 20)])
def test_not_a_config(raw: bytes) -> None:
    reasons(raw)


def test_every_complaint_comes_at_once() -> None:
    text = reasons(config_bytes(r=0, lora_alpha="x", use_dora=1, bias="some", auto_map={"a": "b"}))
    for part in ("r must", "lora_alpha must", "use_dora", "bias", "auto_map"):
        assert part in text


def test_complaints_are_short_and_counted() -> None:
    text = reasons(config_bytes(**{f"field_{i}" + "x" * 500: "y" * 5000 for i in range(70)}), UnsupportedAdapterError)
    assert "... and 20 more" in text
    assert len(text) < 20_000


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal", "mica", "Gaussian"])
def test_inits_that_leave_the_base_alone(init: object) -> None:
    assert parse(init_lora_weights=init) == parse()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "CorDA", "loftq", "lora_ga", "new", 1])
def test_inits_that_change_the_base_are_refused_with_the_remedies_that_there_are(init: object) -> None:
    text = reasons(config_bytes(init_lora_weights=init), UnsupportedAdapterError)
    assert "init_lora_weights" in text
    assert ("path_initial_model_for_weight_conversion" in text) == (init not in ("loftq", "new", 1))
    assert "erve that changed base, saved with it, and set init_lora_weights to true" in text


@pytest.mark.parametrize("pattern", ["rank_pattern", "alpha_pattern"])
def test_a_remedy_that_peft_refuses_is_not_named(pattern: str) -> None:
    config = config_bytes(init_lora_weights="pissa", use_rslora=True, **{pattern: {"q_proj": 4}})
    text = reasons(config, UnsupportedAdapterError)
    assert "path_initial_model_for_weight_conversion" not in text
    assert "Serve that changed base" in text


TARGETS: dict[str, dict[str, Any]] = {
    "names": {"target_modules": ["q_proj", "c_attn"]},
    "full path": {"target_modules": ["model.layers.0.self_attn.q_proj"]},
    "end of a path": {"target_modules": ["self_attn.q_proj"]},
    "regex": {"target_modules": r".*\.(q|v)_proj"},
    "regex as Unsloth writes it": {
        "target_modules": r"(?:.*?(?:language|text).*?(?:self_attn|mlp).*?(?:k_proj|q_proj).*?)"
        r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp|dense)\.(?:(?:k_proj|v_proj|up_proj)))"
    },
    "alternatives": {"target_modules": "lm_head|.*up_proj"},
    "plain string is a whole path": {"target_modules": "q_proj"},
    "excluded names": {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.1.self_attn.q_proj"]},
    "excluded by regex": {"target_modules": ["q_proj"], "exclude_modules": r".*layers\.1\..*"},
    "one layer": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "no layers": {"target_modules": ["q_proj"], "layers_to_transform": []},
    "layers": {"target_modules": ["q_proj", "c_attn"], "layers_to_transform": [0, 10]},
    "layers by pattern": {
        "target_modules": ["q_proj", "c_attn"],
        "layers_to_transform": [1],
        "layers_pattern": ["layers", "h"],
    },
    "layers by regex": {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "lay.rs"},
    "a path named whole is in any layer": {"target_modules": ["lm_head", "q_proj"], "layers_to_transform": [1]},
}


@pytest.mark.parametrize("fields", TARGETS.values(), ids=TARGETS.keys())
def test_targets_what_peft_targets(fields: dict[str, Any]) -> None:
    spec, config = parse(**fields), peft_config(**fields)
    expected = [bool(check_target_module_exists(config, module)) for module in MODULES]
    assert [spec.targets(module) for module in MODULES] == expected
    assert any(expected)


def test_all_linear_targets_all_but_what_is_excluded() -> None:
    spec = parse(target_modules="All-Linear", exclude_modules=["q_proj"])
    assert spec.is_all_linear
    assert [module for module in MODULES if not spec.targets(module)] == [
        m for m in MODULES if m.split(".")[-1] == "q_proj"
    ]


PATTERNS = [
    {"q_proj": 2, "v_proj": 3},
    {"proj": 2, "layers.1.self_attn.q_proj": 3, "q_proj": 5},
    {"^model.layers.0.self_attn.q_proj": 2, "self_attn.q_proj$": 3},
    {r"layers\.(0|10)\..*": 2, ".*_proj": 3},
    {"q_proj|up_proj": 2, "layers.1.q_proj": 3},
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=range(len(PATTERNS)))
@pytest.mark.parametrize("use_rslora", [False, True])
def test_rank_alpha_and_scaling_are_pefts(pattern: dict[str, int], use_rslora: bool) -> None:
    alphas = {key: value + 0.5 for key, value in reversed(pattern.items())}
    spec = parse(use_rslora=use_rslora, rank_pattern=pattern, alpha_pattern=alphas)
    for module in MODULES:
        rank = pattern.get(get_pattern_key(pattern, module), 4)
        alpha = alphas.get(get_pattern_key(alphas, module), 9)
        assert (spec.rank_of(module), spec.alpha_of(module)) == (rank, alpha)
        assert spec.scaling_of(module) == alpha / (math.sqrt(rank) if use_rslora else rank)


BOMBS = {
    "deep repeats": "(?:" * 8 + "(?:a|.)" + "{9}" + "){9}" * 8,
    "deep lazy repeats": "(?:" * 8 + "(?:..|a)" + "{7}?" + "){7}?" * 8 + ".*",
}
NOT_REGULAR = {
    "depth": "(" * 1000 + ")" * 1000,
    "count": "a{99999999999}",
    "recursion": "(?R)",
    "back reference": r"(a+)\1+",
    "condition": r"(a)?(?(1)b|c)",
    "possessive": "a*+a",
    "atomic": "(?>a*)a",
    "property": r"\p{L}+",
    "named as PEFT's": "(?P<idx>a)",
    "flags": "(?i)q_proj",
    "flags of a group": "(?i:q_proj)",
    "lookbehind of no one length": "(?<=a*)b",
    "length": "a" * 5000,
}


@pytest.mark.parametrize("pattern", NOT_REGULAR.values(), ids=NOT_REGULAR.keys())
@pytest.mark.parametrize("field", ["target_modules", "layers_pattern", "rank_pattern"])
def test_what_is_not_regular_is_refused_by_name(field: str, pattern: str) -> None:
    values: dict[str, dict[str, Any]] = {
        "target_modules": {"target_modules": pattern},
        "rank_pattern": {"rank_pattern": {pattern: 4}},
        "layers_pattern": {"layers_pattern": [pattern], "layers_to_transform": [0]},
    }
    assert field in reasons(config_bytes(**values[field]))


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS.keys())
@pytest.mark.parametrize("field", ["target_modules", "rank_pattern", "layers_pattern"])
def test_too_much_work_is_refused_by_name_every_time_and_no_matter_how_long_it_takes(field: str, bomb: str) -> None:
    values: dict[str, dict[str, Any]] = {
        "target_modules": {"target_modules": bomb},
        "rank_pattern": {"rank_pattern": {bomb: 4}},
        "layers_pattern": {"layers_pattern": [bomb], "layers_to_transform": [0]},
    }
    spec, paths = parse(**values[field]), [f"{'a' * 400}.{i}.q_proj" for i in range(5)]
    for _ in range(2):
        matcher = Matcher(paths, max_work=100_000)
        with pytest.raises(InvalidAdapterError, match=f"{field}: its patterns are too much work"):
            [(spec.targets(path, matcher), spec.rank_of(path, matcher)) for path in paths]


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+$",
        r".*.*.*.*.*.*.*a.*\.q_projx?a",
        "(?:" * 8 + "a" + "){9}" * 8,
        "a{4999999}",
        "((a?){99}){99}",
        "(?:" * 30 + "a" + ")*" * 30,
    ],
)
def test_what_backtracks_without_end_costs_little_here(pattern: str) -> None:
    paths = [f"{'a' * 400}!{i}.q_proj" for i in range(200)]
    matcher = Matcher(paths, MAX_WORK)
    assert not any(parse(target_modules=pattern).targets(path, matcher) for path in paths)


def test_a_pattern_for_every_module_is_within_the_bound() -> None:
    """PEFT's own advice for a key that fits one module alone is ^ and the whole path."""
    paths = [f"model.layers.{layer}.self_attn.{x}_proj" for layer in range(126) for x in "qkvogud"]
    spec = parse(rank_pattern={f"^{path}": 1 + i for i, path in enumerate(paths)}, alpha_pattern={f"{paths[7]}$": 3})
    matcher = Matcher(paths, MAX_WORK // 4)
    assert [spec.rank_of(path, matcher) for path in paths] == list(range(1, 1 + len(paths)))
    assert spec.alpha_of(paths[7], matcher) == 3


def test_the_dot_of_a_plain_pattern_is_any_character() -> None:
    spec = parse(rank_pattern={"self.attn.q_proj": 7, "self_attn.q_proj": 8})
    assert spec.rank_of("model.layers.0.self_attn.q_proj") == 7
    assert spec.rank_of("model.layers.0.self_attn.v_proj") == 4


def test_a_layers_pattern_that_fits_two_numbers_is_refused() -> None:
    spec = parse(target_modules=["q_proj"], layers_pattern=["l.*s"], layers_to_transform=[1])
    assert spec.targets("model.layers.1.q_proj")
    with pytest.raises(InvalidAdapterError, match=r"layers_pattern: the pattern 'l\.\*s' fits several numbers"):
        spec.targets("model.layers.1.experts.2.q_proj")


@pytest.mark.parametrize(
    ("pattern", "matched"),
    [
        (r"(?<=mlp\.)x_proj", []),  # a whole path has nothing before it
        (r".*(?<=mlp\.)x_proj", ["a.mlp.x_proj"]),
        (r".*(?<!mlp\.)x_proj", ["x_proj", "b.attn.x_proj"]),
        (r"(?!b).*x_proj", ["x_proj", "a.mlp.x_proj"]),
        (r".*x_proj(?<=mlp.x_proj)", ["a.mlp.x_proj"]),
    ],
)
def test_what_lies_around_a_match_is_looked_at(pattern: str, matched: list[str]) -> None:
    paths = ["x_proj", "a.mlp.x_proj", "b.attn.x_proj"]
    assert matched == [path for path in paths if re.fullmatch(pattern, path)]
    spec, matcher = parse(target_modules=pattern), Matcher(paths)
    assert [path for path in paths if spec.targets(path, matcher)] == matched


_SYNTAX = (
    r"\d \w \W \s \b \B \. \Z \A (?: (?= (?! (?<= (?<! (?P<n> {2} {1,3} {,2} "
    "*? +? ?? .* [^a] [ab_] [a-b1] (a|b) )* a b ab"
)
PIECES = st.sampled_from([*"ab.|()*+?[]^$1_-{,}", *_SYNTAX.split()])
PATTERN = st.lists(PIECES, min_size=1, max_size=10).map("".join)
PATH = st.text("ab.1_", min_size=1, max_size=10)


@settings(max_examples=500)
@given(pattern=PATTERN, paths=st.lists(PATH, min_size=1, max_size=5))
@pytest.mark.filterwarnings("ignore::FutureWarning")  # re warns of sets that it may read differently one day
def test_an_accepted_pattern_means_what_it_means_to_peft(pattern: str, paths: list[str]) -> None:
    try:
        check_pattern("field", pattern)
    except InvalidAdapterError:
        return
    matcher = Matcher(paths, MAX_WORK)
    config = peft_config(target_modules=pattern)
    for path in paths:
        assert matcher.is_fullmatch("field", pattern, path) == bool(check_target_module_exists(config, path))
        expected = get_pattern_key([pattern], path) == pattern if pattern != path else True
        assert matcher.value_for("field", [(pattern, True)], path, False) == expected


@settings(max_examples=500)
@given(pattern=PATTERN, path=st.lists(st.sampled_from(["a", "b", "ab", "1", "12", "q"]), min_size=2, max_size=7))
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_accepted_layers_pattern_finds_pefts_layer(pattern: str, path: list[str]) -> None:
    module = ".".join([*path, "q"])
    try:
        spec = parse(target_modules=["q"], layers_pattern=[pattern], layers_to_transform=[1, 12])
        targets = spec.targets(module)
    except InvalidAdapterError:
        return
    config = peft_config(target_modules=["q"], layers_pattern=[pattern], layers_to_transform=[1, 12])
    assert targets == bool(check_target_module_exists(config, module))


@given(
    keys=st.lists(st.sampled_from(["a", "b.", ".*b", "^a", "a|b", r"a\.b", "b$", "[ab]", "..", "1"]), unique=True),
    path=PATH,
)
def test_the_first_pattern_that_matches_wins_as_with_peft(keys: list[str], path: str) -> None:
    expected = get_pattern_key(keys, path)
    ranks = [(key, position) for position, key in enumerate(keys)]
    assert Matcher([path]).value_for("field", ranks, path, None) == dict(ranks).get(expected)


SAME = {
    "order of targets": ({"target_modules": ["a", "b"]}, {"target_modules": ["b", "a", "a"]}),
    "number's spelling": ({"lora_alpha": 16}, {"lora_alpha": 16.0}),
    "one layer or a list": (
        {"target_modules": ["a"], "layers_to_transform": 1},
        {"target_modules": ["a"], "layers_to_transform": [1]},
    ),
    "base's name": ({"base_model_name_or_path": "a"}, {"base_model_name_or_path": "b", "task_type": "CAUSAL_LM"}),
    "how it was trained": ({"lora_dropout": 0.1}, {"inference_mode": True, "peft_version": "0.21.0"}),
    "spelled-out defaults": ({}, {"use_rslora": False, "rank_pattern": {}, "exclude_modules": None}),
}
DIFFERENT = {
    "alpha": {"lora_alpha": 10},
    "rank": {"r": 5},
    "rslora": {"use_rslora": True},
    "rank pattern": {"rank_pattern": {"q_proj": 4}},
    "alpha pattern": {"alpha_pattern": {"q_proj": 4}},
    "targets": {"target_modules": ["q_proj"]},
    "excluded": {"exclude_modules": ["v_proj"]},
    "layers": {"layers_to_transform": [1]},
}


@pytest.mark.parametrize(("one", "other"), SAME.values(), ids=SAME.keys())
def test_canonical_is_the_same_for_the_same_meaning(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert parse(**one).canonical == parse(**other).canonical


@pytest.mark.parametrize("fields", DIFFERENT.values(), ids=DIFFERENT.keys())
def test_canonical_differs_where_the_meaning_does(fields: dict[str, Any]) -> None:
    assert parse(**fields).canonical != parse().canonical


def test_canonical_keeps_the_order_of_patterns() -> None:
    one, other = {"q_proj": 1, "proj": 2}, {"proj": 2, "q_proj": 1}
    assert parse(rank_pattern=one).canonical != parse(rank_pattern=other).canonical


def test_canonical_is_settled() -> None:
    assert parse().canonical == (
        b'{"alpha_pattern":[],"exclude_modules":[],"layers_pattern":[],"layers_to_transform":[],"lora_alpha":9.0,'
        b'"peft_type":"LORA","r":4,"rank_pattern":[],"target_modules":["q_proj","v_proj"],"use_rslora":false}'
    )


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(sorted(PEFT_FIELDS | {"auto_map"})), VALUES, max_size=6))
def test_any_values_parse_or_are_refused(fields: dict[str, Any]) -> None:
    try:
        spec = parse(**fields)
    except InvalidAdapterError:
        return
    spec.targets("model.layers.0.self_attn.q_proj")
    assert math.isfinite(spec.scaling_of("model.layers.0.self_attn.q_proj"))
