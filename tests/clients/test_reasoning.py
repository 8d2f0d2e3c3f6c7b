"""Reasoning, taken apart from the answer, and calls in the forms of other bases: in any pieces, on every route."""

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from serving import BASE, Running, serving, settings
from swaplora_server.base.vocabulary import Vocabulary
from swaplora_server.service.detokenize import Detokenizer, Settled
from swaplora_server.service.tools.call_format import HERMES, LLAMA3_JSON, MISTRAL, MISTRAL_NAMED
from swaplora_server.service.tools.dialect import THINK, Dialect, dialect_of
from swaplora_server.service.tools.parameter_calls import QWEN3_CODER
from swaplora_server.service.tools.reader import Argued, Called, Part, Said, Thought
from swaplora_server.service.tools.readers import NAMES, format_of, reader_of
from swaplora_server.service.tools.reasoning import Marks
from swaplora_server.service.tools.tool import Parameters, Tool
from test_dialogue_tools import CITY, SCHEMAS, assembled, blocks_of, streamed
from test_dialogue_tools import ask as ask_dialogue

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
USER = {"role": "user", "content": "hi"}
TOOLS = [{"type": "function", "function": {"name": n, "parameters": s}} for n, s in SCHEMAS.items()]
THINKING_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.reasoning_content }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% if enable_thinking is defined and not enable_thinking %}"
    "<think></think>{% elif opened %}<think>\n{% endif %}{% endif %}"
)
MARK = "[TOOL_CALLS]"  # a special token of the base below, which text cannot say
THOUGHT = "<think>\nHm, a city?\n</think>\n\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a base that reasons, and whose mark of calls is a token."""
    overrides = {**tiny.LLAMA, "max_position_embeddings": 2048, "vocab_size": tiny.VOCAB_SIZE + 1}
    folder = tiny.save_tiny_base(tmp_path_factory.mktemp("thinks"), overrides)
    tokenizer = tiny.byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [MARK]})
    tokenizer.chat_template = THINKING_TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(settings(base, tmp_path_factory.mktemp("data"), tool_call_format="mistral")) as running:
        yield running


def joined(parts: list[Part]) -> list[Part]:
    """With what goes on as one, and without ids."""
    told: list[Part] = []
    for part in parts:
        match told[-1:], part:
            case [Said(before)], Said(text):
                told[-1] = Said(before + text)
            case [Thought(before)], Thought(text):
                told[-1] = Thought(before + text)
            case [Argued(number, before)], Argued(_, text):
                told[-1] = Argued(number, before + text)
            case _, Called(number, _, name):
                told.append(Called(number, "", name))
            case _:
                told.append(part)
    return told


S_AND_N = {"s": {"type": "string"}, "n": {"type": ["number", "null"]}}
AB = [Tool("a", None, Parameters({"type": "object", "properties": S_AND_N}, "")), Tool("b")]


def read(pieces: list[str], dialect: Dialect, prompt: str = "") -> list[Part]:
    reader = dialect.reader(prompt, reader_of(dialect.calls, AB), may_think=True)
    return joined([part for piece in pieces for part in reader.push(piece)] + reader.flush())


def call(number: int, name: str, arguments: str = "{}") -> list[Part]:
    return [Called(number, "", name), Argued(number, arguments)]


L, M = "parameters", "arguments"
X = "<tool_call>\n"
ROME = "<function=a>\n<parameter=s>\nRome\n</parameter>\n"
NUMBER = "<parameter=n>\n3\n</parameter>\n"
NAMED = call(0, "a") + call(1, "b")
B_AND_A = call(0, "b") + call(1, "a", '{"s":"Rome"}')
OF_FORMS: list[tuple[str, str, list[Part]]] = [
    ("llama3_json", f'{{"name": "a", "{L}": {{"k": "}}"}}}}', call(0, "a", '{"k": "}"}')),
    ("llama3_json", f' {{"name": "a", "{L}": {{}}}}; {{"name": "b", "{L}": {{}}}}', call(0, "a") + call(1, "b")),
    ("llama3_json", f'<|python_tag|>{{"name": "b", "{L}": {{}}}}', call(0, "b")),
    ("llama3_json", f'I look. <|python_tag|>{{"name": "b", "{L}": {{}}}}', [Said("I look. "), *call(0, "b")]),
    ("llama3_json", f'{{"type": "function", "name": "b", "{L}": {{}}}}', call(0, "b")),
    ("llama3_json", '{"city": "Rome"}', [Said('{"city": "Rome"}')]),
    ("llama3_json", f'{{"name": "gone", "{L}": {{}}}} ok', [Said(f'{{"name": "gone", "{L}": {{}}}} ok')]),
    ("llama3_json", f'text {{"name": "a", "{L}": {{}}}}', [Said(f'text {{"name": "a", "{L}": {{}}}}')]),
    ("llama3_json", f'{{"name": "a", "{L}": {{}}}}; then', [*call(0, "a"), Said("; then")]),
    ("llama3_json", '  {"name": "a"', [Said('  {"name": "a"')]),
    ("mistral", f'{MARK}[{{"name": "a", "{M}": {{}}}}, {{"name": "b", "{M}": {{}}}}]', call(0, "a") + call(1, "b")),
    ("mistral", f'ok{MARK} [ {{"name": "a", "{M}": {{}}, "id": "x}}"}}]\n', [Said("ok"), *call(0, "a")]),
    ("mistral", f'{MARK}[{{"{M}": {{}}, "name": "a"}}] and', [*call(0, "a"), Said(" and")]),
    ("mistral", f"{MARK}nothing", [Said(f"{MARK}nothing")]),
    ("mistral", f"{MARK}[]", [Said(f"{MARK}[]")]),
    ("mistral", f'{MARK}[{{"name": "a", "{M}": {{"k": 1', call(0, "a", '{"k": 1')),
    ("mistral", f'{MARK}a[ARGS]{{"k": "}}"}}', call(0, "a", '{"k": "}"}')),
    ("mistral", f"ok{MARK}a[ARGS]{{}}\n{MARK}b[CALL_ID]x1[ARGS] {{}}, so", [Said("ok"), *NAMED, Said(", so")]),
    ("mistral", f"{MARK}gone[ARGS]{{}}", [Said(f"{MARK}gone[ARGS]{{}}")]),
    ("mistral", f"{MARK}a[ARG", [Said(f"{MARK}a[ARG")]),
    ("mistral", f"{MARK}ab[ARGS]{{}}", [Said(f"{MARK}ab[ARGS]{{}}")]),
    ("qwen3_coder", f"{X}<function=a>\n</function>\n</tool_call>", call(0, "a")),
    ("qwen3_coder", f"{X}{ROME}</function>\n</tool_call>", call(0, "a", '{"s":"Rome"}')),
    ("qwen3_coder", f"{X}{ROME}{NUMBER}</function></tool_call> so", [*call(0, "a", '{"s":"Rome","n":3}'), Said(" so")]),
    ("qwen3_coder", f"I look.{X}{ROME}</function>", [Said("I look."), *call(0, "a", '{"s":"Rome"}')]),
    ("qwen3_coder", f"{X}<function=b></function></tool_call>\n{X}{ROME}</function>", B_AND_A),
    ("qwen3_coder", f"{X}<function=a><parameter=s>\n a<b\n\n</parameter></function>", call(0, "a", '{"s":" a<b\\n"}')),
    ("qwen3_coder", f"{X}<function=a><parameter=n>None</parameter></function>", call(0, "a", '{"n":null}')),
    ("qwen3_coder", f"{X}<function=a><parameter=n>many</parameter></function>", call(0, "a", '{"n":"many"}')),
    ("qwen3_coder", f"{X}<function=b><parameter=o>3</parameter></function>", call(0, "b", '{"o":"3"}')),
    ("qwen3_coder", f"{X}<function=a><parameter=s>\nRo", call(0, "a", '{"s":"Ro')),
    ("qwen3_coder", f"{X}<function=gone></function>", [Said(f"{X}<function=gone></function>")]),
    ("qwen3_coder", f"{X}<func", [Said(f"{X}<func")]),
    ("qwen3_coder", f'{X}{{"name": "a"}}', [Said(f'{X}{{"name": "a"}}')]),
    ("hermes", f'<tool_call>{{"name": "a", "{M}": {{}}}}</tool_call>\nend\n', [*call(0, "a"), Said("\nend\n")]),
    ("hermes", f'<tool_call>{{"name": "a", "{M}": {{}}}}end', [*call(0, "a"), Said("end")]),
]


@pytest.mark.parametrize(("name", "text", "expected"), OF_FORMS)
def test_calls_are_read_in_each_form(name: str, text: str, expected: list[Part]) -> None:
    dialect = Dialect(format_of("", name), None, frozenset())
    assert read([text], dialect) == expected
    assert read(list(text), dialect) == expected


OF_THOUGHTS: list[tuple[str, str, list[Part]]] = [
    ("", f"{THOUGHT}Rome.", [Thought("Hm, a city?"), Said("Rome.")]),
    ("<think>\n", "Hm.\n</think>\nRome.", [Thought("Hm."), Said("Rome.")]),
    ("", "<think>\n\n</think>\n\nRome.", [Said("Rome.")]),
    ("", "Rome <think>x</think>", [Said("Rome <think>x</think>")]),
    ("", "\n<thin", [Said("\n<thin")]),
    ("", "<think>cut </thi", [Thought("cut </thi")]),
    ("", "<think>cut \n", [Thought("cut")]),
    ("What is <think>?</user>", "A mark.", [Said("A mark.")]),
    ("", "<think>a</think>b</think>", [Thought("a"), Said("b</think>")]),
]


@pytest.mark.parametrize(("prompt", "text", "expected"), OF_THOUGHTS)
def test_reasoning_is_what_stands_between_its_marks_where_a_text_begins(
    prompt: str, text: str, expected: list[Part]
) -> None:
    dialect = Dialect(HERMES, THINK, frozenset())
    assert read([text], dialect, prompt) == expected
    assert read(list(text), dialect, prompt) == expected


PIECES = [*(text for _, text, _ in OF_FORMS), *(text for _, text, _ in OF_THOUGHTS), "\n", " ", MARK, "; ", "<think>"]


@given(st.sampled_from(NAMES), st.lists(st.sampled_from(PIECES), max_size=4), st.booleans(), st.data())
def test_it_matters_nothing_in_which_pieces_a_text_comes(
    name: str, texts: list[str], is_open: bool, data: st.DataObject
) -> None:
    whole, dialect = "".join(texts), Dialect(format_of("", name), THINK, frozenset())
    cuts = sorted({0, len(whole), *data.draw(st.lists(st.integers(0, len(whole)), max_size=8))})
    prompt = THINK.begin if is_open else ""
    assert read([whole[a:b] for a, b in pairwise(cuts)], dialect, prompt) == read([whole], dialect, prompt)


@pytest.mark.parametrize(
    ("template", "response_template", "form", "marks"),
    [
        (None, None, HERMES, None),
        ("{{ messages }}", None, HERMES, None),
        ("..<tool_call>..<think>..</think>", None, HERMES, THINK),
        ("..<|python_tag|>..", None, LLAMA3_JSON, None),
        ("..[TOOL_CALLS]..[ARGS]..", None, MISTRAL_NAMED, None),
        ("..<tool_call>..<function=..", None, QWEN3_CODER, None),
        ("..[TOOL_CALLS]..[THINK]..[/THINK]", None, MISTRAL, Marks("[THINK]", "[/THINK]")),
        ("x", {"fields": {"reasoning_content": {"open": "<r>", "close": "</r>"}}}, HERMES, Marks("<r>", "</r>")),
        ("x", {"fields": {"reasoning_content": {"open_pattern": "<r>"}}}, HERMES, None),
    ],
)
def test_a_base_s_templates_say_how_it_writes(
    template: str | None, response_template: dict[str, Any] | None, form: Any, marks: Marks | None
) -> None:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template, tokenizer.response_template = template, response_template
    vocabulary = Vocabulary(tokenizer.backend_tokenizer)
    dialect = dialect_of(tokenizer, vocabulary, "auto", "auto")
    assert (dialect.calls, dialect.thoughts) == (form, marks)
    told = dialect_of(tokenizer, vocabulary, "llama3_json", "none")
    assert (told.calls, told.thoughts) == (LLAMA3_JSON, None)
    assert dialect_of(tokenizer, vocabulary, "auto", "think").thoughts == THINK


TEMPLATES = {"llama3_json": "", "mistral": "[ARGS]", "qwen3_coder": ""}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_calls_are_held_to_in_every_form(
    server: Running, monkeypatch: pytest.MonkeyPatch, name: str, choice: Any
) -> None:
    """Of a model that would say anything."""
    vocabulary = server.service.base.vocabulary
    form = format_of(TEMPLATES[name], name).of_tokens(vocabulary.special)
    marked = frozenset(mark for mark in vocabulary.special.values() if mark in form.marks)
    monkeypatch.setitem(server.service.__dict__, "dialect", Dialect(form, None, marked))
    told = chat(server, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, seed=1)
    assert (told["message"]["content"], told["finish_reason"]) == (
        None,
        "tool_calls" if choice == "required" else "stop",
    )
    [made] = told["message"]["tool_calls"]
    jsonschema.validate(json.loads(made["function"]["arguments"]), SCHEMAS[made["function"]["name"]])
    streamed_deltas = deltas(server, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False, seed=1)
    pieces = [piece["function"] for delta in streamed_deltas for piece in delta.get("tool_calls", ())]
    assert pieces[0] == {"name": made["function"]["name"], "arguments": ""}
    assert "".join(piece["arguments"] for piece in pieces) == made["function"]["arguments"]


def chat(server: Running, **fields: Any) -> dict[str, Any]:
    answer = server.client.post(
        CHAT, json={"model": BASE, "messages": [USER], "max_tokens": 300, "ignore_eos": True} | fields
    )
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()["choices"][0]
    return told


def deltas(server: Running, **fields: Any) -> list[dict[str, Any]]:
    asked = {"model": BASE, "messages": [USER], "max_tokens": 300, "ignore_eos": True, "stream": True} | fields
    lines = server.client.post(CHAT, json=asked).text.splitlines()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
    return [json.loads(event)["choices"][0]["delta"] for event in events]


@pytest.fixture
def says(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Have every text be this one, three characters a token, whatever the model chooses."""

    def says(text: str) -> None:
        def push(self: Any, _token_id: int, _logprobs: object = None) -> Settled:
            rest = self.__dict__.setdefault("to_be_said", text)
            self.to_be_said = rest[3:]
            self.is_stopped = not self.to_be_said
            return Settled(rest[:3])

        monkeypatch.setattr(Detokenizer, "push", push)

    return says


def test_a_special_token_marks_calls_that_are_required(server: Running) -> None:
    asked = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": 1}
    choice = chat(server, **asked, return_token_ids=True)
    assert choice["token_ids"][0] == tiny.VOCAB_SIZE
    assert choice["message"]["content"] is None
    [made] = choice["message"]["tool_calls"]
    jsonschema.validate(json.loads(made["function"]["arguments"]), SCHEMAS[made["function"]["name"]])


def test_a_strict_tool_is_held_to_where_the_model_makes_a_call(server: Running) -> None:
    strict = [{"type": "function", "function": {"name": "weather", "parameters": CITY, "strict": True}}]
    choice = chat(server, tools=strict, seed=1, logit_bias={str(tiny.VOCAB_SIZE): 100}, max_tokens=120)
    first, *_ = choice["message"]["tool_calls"]
    jsonschema.validate(json.loads(first["function"]["arguments"]), CITY)


def test_reasoning_that_the_prompt_opens_is_told_apart(server: Running) -> None:
    opened = {"chat_template_kwargs": {"opened": True}, "seed": 1, "max_tokens": 12}
    plain, told = chat(server, **opened), deltas(server, **opened)
    thought = plain["message"]["reasoning_content"]
    assert thought
    assert plain["message"] == {"role": "assistant", "content": "", "reasoning_content": thought, "reasoning": thought}
    assert "".join(delta.get("reasoning_content", "") for delta in told) == thought
    assert chat(server, **opened, include_reasoning=False)["message"] == {"role": "assistant", "content": ""}
    assert all("reasoning" not in delta for delta in deltas(server, **opened, include_reasoning=False))


MADE = f'Let me see.{MARK}[{{"name": "weather", "arguments": {{"city": "Rome"}}}}]'


def test_a_chat_s_reasoning_text_and_calls_are_told_apart(server: Running, says: Callable[[str], None]) -> None:
    says(THOUGHT + MADE)
    message, told = chat(server, tools=TOOLS)["message"], deltas(server, tools=TOOLS)
    assert (message["reasoning_content"], message["content"]) == ("Hm, a city?", "Let me see.")
    [made] = message["tool_calls"]
    assert made["function"] == {"name": "weather", "arguments": '{"city": "Rome"}'}
    assert "".join(delta.get("reasoning") or "" for delta in told) == "Hm, a city?"
    assert "".join(delta.get("content") or "" for delta in told) == "Let me see."
    kinds = [kind for delta in told for kind in ("reasoning", "content", "tool_calls") if delta.get(kind)]
    assert list(dict.fromkeys(kinds)) == ["reasoning", "content", "tool_calls"]


def test_reasoning_is_an_item_of_a_response(server: Running, says: Callable[[str], None]) -> None:
    says(THOUGHT + MADE)
    whole, events = ask_dialogue(server, RESPONSES, ignore_eos=True), streamed(server, RESPONSES, ignore_eos=True)
    reasoning, message, made = whole["output"]
    assert reasoning | {"id": ""} == {
        **{"id": "", "type": "reasoning", "status": "completed", "summary": []},
        "content": [{"type": "reasoning_text", "text": "Hm, a city?"}],
    }
    assert (message["content"][0]["text"], made["name"]) == ("Let me see.", "weather")
    assert 3 <= whole["usage"]["output_tokens_details"]["reasoning_tokens"] < whole["usage"]["output_tokens"] - 10
    assert [text for _, text in assembled(RESPONSES, events)] == ["Hm, a city?", "Let me see.", {"city": "Rome"}]
    names = [name.removeprefix("response.") for name, _ in events]
    assert list(dict.fromkeys(names))[2:8] == [
        *("output_item.added", "content_part.added", "reasoning_text.delta"),
        *("reasoning_text.done", "content_part.done", "output_item.done"),
    ]


def test_thinking_is_a_block_of_a_message_where_it_is_asked_for(server: Running, says: Callable[[str], None]) -> None:
    says(THOUGHT + MADE)
    thinking = {"type": "thinking", "thinking": "Hm, a city?", "signature": ""}
    for asked in ({"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}):
        whole = ask_dialogue(server, MESSAGES, thinking=asked, ignore_eos=True)
        assert whole["content"][0] == thinking
        assert [block["type"] for block in whole["content"]] == ["thinking", "text", "tool_use"]
        events = streamed(server, MESSAGES, thinking=asked, ignore_eos=True)
        pieces = [data["delta"] for name, data in events if name == "content_block_delta"]
        assert "".join(piece.get("thinking", "") for piece in pieces) == "Hm, a city?"
    for fields in ({}, {"thinking": {"type": "disabled"}}):
        assert blocks_of(MESSAGES, ask_dialogue(server, MESSAGES, ignore_eos=True, **fields)) == [
            ("", "Let me see."),
            ("weather", {"city": "Rome"}),
        ]


def test_reasoning_of_before_is_the_template_s_to_tell(server: Running) -> None:
    """A template that tells it has as many tokens more; and the assistant's turn stays one."""

    def counted(route: str, **fields: Any) -> int:
        answer = server.client.post(route, json={"model": BASE} | fields).json()
        return int(answer["input_tokens"] if "input_tokens" in answer else answer["usage"]["prompt_tokens"])

    said = {"role": "assistant", "content": "Rome"}
    chats = [
        counted(CHAT, max_tokens=1, messages=[USER, said | more, USER])
        for more in ({}, {"reasoning_content": "Hm."}, {"reasoning": "Hm."})
    ]
    assert chats == [chats[0], chats[0] + 3, chats[0] + 3]
    blocks = [{"type": "thinking", "thinking": "Hm.", "signature": ""}, {"type": "text", "text": "Rome"}]
    route = "/v1/messages/count_tokens"
    assert counted(route, messages=[USER, {"role": "assistant", "content": blocks}, USER]) == chats[1]
    for own in (
        {"content": [{"type": "reasoning_text", "text": "Hm."}]},
        {"summary": [{"type": "summary_text", "text": "Hm."}]},
    ):
        asked = {"input": [USER, {"type": "reasoning", **own}, said, USER], "max_output_tokens": 1}
        usage = server.client.post(RESPONSES, json={"model": BASE} | asked).json()["usage"]
        assert usage["input_tokens"] == chats[1]


def test_reasoning_can_be_switched_off_where_the_template_knows_how(server: Running) -> None:
    def counted(**fields: Any) -> int:
        answer = server.client.post("/v1/messages/count_tokens", json={"model": BASE, "messages": [USER]} | fields)
        return int(answer.json()["input_tokens"])

    off = counted(thinking={"type": "disabled"})
    assert off == counted() + len("<think></think>") == counted(thinking={"type": "adaptive"}) + len("<think></think>")
    asked = {"model": BASE, "input": "hi", "max_output_tokens": 1, "reasoning": {"effort": "none"}}
    assert server.client.post(RESPONSES, json=asked).json()["usage"]["input_tokens"] == off


@pytest.mark.parametrize(
    ("route", "fields", "named"),
    [
        (RESPONSES, {"input": "hi", "reasoning": {"effort": "high"}}, "reasoning.effort"),
        (RESPONSES, {"input": [{"type": "reasoning", "content": [{"type": "text", "text": "x"}]}]}, "input[0][0].type"),
        (MESSAGES, {"messages": [USER], "max_tokens": 1, "thinking": {"type": "much"}}, "thinking.type"),
        (
            MESSAGES,
            {"messages": [{"role": "user", "content": [{"type": "thinking", "thinking": "x"}]}], "max_tokens": 1},
            "messages[0].content[0].type",
        ),
        (CHAT, {"messages": [USER | {"reasoning_content": 5}]}, "messages[0].reasoning_content"),
        (CHAT, {"messages": [USER], "include_reasoning": "no"}, "include_reasoning"),
    ],
)
def test_reasoning_that_cannot_be_is_refused_by_name(
    server: Running, route: str, fields: dict[str, Any], named: str
) -> None:
    answer = server.client.post(route, json={"model": BASE} | fields)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(named), answer.text


def test_what_is_held_to_a_format_is_the_answer(server: Running) -> None:
    opened = {"chat_template_kwargs": {"opened": True}}
    message = chat(server, **opened, guided_choice=["Rome"])["message"]
    assert message == {"role": "assistant", "content": "Rome"}
