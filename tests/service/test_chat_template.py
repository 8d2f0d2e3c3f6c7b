"""What a chat template leaves out of a conversation is an error, and nothing else is; the look costs little."""

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from serving import BASE, Running, serving, settings
from swaplora_server.service.chat_template import ChatTemplate
from swaplora_server.service.errors import RequestError

# as those of well-known models: only some roles; system first or not at all; in the first user's message; upper case
KNOWN_ROLES = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}<{{ m.role }}>{{ m.content | trim }}\n{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SYSTEM_FIRST = (
    "{% if messages[0].role == 'system' %}<sys>{{ messages[0].content }}\n{% endif %}"
    "{% for m in messages %}{% if m.role != 'system' %}<{{ m.role }}>{{ m.content }}\n{% endif %}{% endfor %}"
)
SYSTEM_INSIDE = (
    "{% set ns = namespace(system='') %}{% for m in messages %}"
    "{% if m.role == 'system' %}{% set ns.system = m.content %}"
    "{% else %}[{{ m.role }}]{{ ns.system }}{% set ns.system = '' %}{{ m.content | upper }}\n{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{{ m.content }}{% endfor %}"
)
THINKING = "{% for m in messages %}<{{ m.role }}>{{ m.content.split('</think>')[-1] }}\n{% endfor %}"
SWITCHED = (
    "{% for m in messages %}{% if m.role != 'system' or not plain %}"
    "<{{ m.role }}>{{ m.content }}\n{% endif %}{% endfor %}"
)
NAMES = "{% for m in messages %}<{{ m.name if m.name is defined else m.role }}>{{ m.content }}\n{% endfor %}"


def template(text: str) -> ChatTemplate:
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = text
    return ChatTemplate(tokenizer)


def say(*turns: tuple[str, str], **fields: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content, **fields} for role, content in turns]


def refusal(text: str, messages: list[dict[str, str]], **variables: Any) -> RequestError | None:
    try:
        template(text).render(messages, variables, add_generation_prompt=True, continue_final_message=False)
    except RequestError as error:
        return error
    return None


HELLO = ("user", "hello")
RULES = ("system", "obey")


@pytest.mark.parametrize(
    ("text", "messages", "path"),
    [
        (KNOWN_ROLES, say(RULES, HELLO), "messages[0]"),
        (KNOWN_ROLES, say(HELLO, ("developer", "hello")), "messages[1]"),  # though the text has what it says
        (KNOWN_ROLES, say(HELLO, ("assistant", "hi"), ("Assistant", "hi")), "messages[2]"),
        (SYSTEM_FIRST, say(HELLO, RULES), "messages[1]"),
        (SYSTEM_FIRST, say(RULES, RULES, HELLO), "messages[1]"),
        (SYSTEM_INSIDE, say(RULES, RULES, HELLO), "messages[0]"),
        (SYSTEM_INSIDE, say(HELLO, RULES), "messages[1]"),
    ],
)
def test_what_is_left_out_is_named(text: str, messages: list[dict[str, str]], path: str) -> None:
    error = refusal(text, messages)
    assert error is not None
    assert (error.code, error.param) == ("unsupported_field", path)
    assert error.message.startswith(path)


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (KNOWN_ROLES, say(HELLO, ("assistant", "  "), ("system", " "), ("tool", ""), HELLO)),  # nothing was said there
        (KNOWN_ROLES, say(("user", "  hello  "))),
        (SYSTEM_FIRST, say(RULES, HELLO, ("tool", "42"))),
        (SYSTEM_INSIDE, say(RULES, HELLO, RULES, HELLO)),
        (
            THINKING,
            say(HELLO, ("assistant", "<think>much</think>"), HELLO),
        ),  # what it makes of a text is its own affair
        (NAMES, say(HELLO, name="ann")),
        (KNOWN_ROLES, say(HELLO, name="ann")),  # a label that the template may show or not
        (tiny.CHAT_TEMPLATE, say(RULES, HELLO, ("anybody", "x"))),
    ],
)
def test_what_is_all_there_is_taken(text: str, messages: list[dict[str, str]]) -> None:
    assert refusal(text, messages) is None


def test_a_template_that_refuses_a_role_says_so_in_its_own_words() -> None:
    error = refusal(NO_SYSTEM, say(RULES, HELLO))
    assert error is not None
    assert error.message == "the chat template refuses this: no system"


def test_what_is_left_out_may_depend_on_a_variable() -> None:
    same = template(SWITCHED)
    for plain, is_refused in ((True, True), (False, False), (True, True)):
        try:
            same.render(say(RULES, HELLO), {"plain": plain}, add_generation_prompt=True)
        except RequestError:
            assert is_refused
        else:
            assert not is_refused


def test_all_that_is_left_out_is_named_at_once_and_of_much_the_first() -> None:
    error = refusal(KNOWN_ROLES, say(RULES, HELLO, ("developer", "x")))
    assert error is not None
    assert [words.split()[0] for words in error.message.split(". ")] == ["messages[0]", "messages[2]"]
    error = refusal(KNOWN_ROLES, say(*[RULES] * 4096))
    assert error is not None
    assert len(error.message) < 2000


@pytest.mark.parametrize("text", [KNOWN_ROLES, SYSTEM_FIRST, SYSTEM_INSIDE])
@given(
    turns=st.lists(
        st.tuples(st.sampled_from(["user", "assistant", "system", "developer"]), st.text("abc ", max_size=4)),
        min_size=1,
        max_size=6,
    )
)
def test_a_conversation_is_refused_where_it_would_be_the_same_without_a_message(
    text: str, turns: list[tuple[str, str]]
) -> None:
    """The same messages, each with a text that no other has, rendered with and without each."""
    looked_at = template(text)
    apart = [(role, f"{number}{content}" if content.strip() else "") for number, (role, content) in enumerate(turns)]

    def rendered(*some: tuple[str, str]) -> str:
        tokenizer = tiny.byte_tokenizer()
        return str(tokenizer.apply_chat_template(say(*some), chat_template=text, tokenize=False)) if some else ""

    whole = rendered(*apart)
    is_lost = any(
        content and len(apart) > 1 and rendered(*apart[:number], *apart[number + 1 :]) == whole
        for number, (_, content) in enumerate(apart)
    ) or (len(apart) == 1 and bool(apart[0][1]) and apart[0][1].strip().upper() not in whole.upper())
    try:
        looked_at.render(say(*turns), {}, add_generation_prompt=False)
    except RequestError:
        assert is_lost
    else:
        assert not is_lost


def test_a_shape_is_looked_at_once_and_a_long_text_is_rendered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    same, sizes = template(tiny.CHAT_TEMPLATE), list[int]()
    render = same._tokenizer.apply_chat_template  # noqa: SLF001

    def counted(messages: list[dict[str, str]], **options: Any) -> Any:
        sizes.append(sum(len(message["content"]) for message in messages))
        return render(messages, **options)

    monkeypatch.setattr(same._tokenizer, "apply_chat_template", counted)  # noqa: SLF001
    for content in ("x" * 100_000, "y" * 100_000, "z"):
        same.render(say(RULES, ("user", content)), {}, add_generation_prompt=True)
    assert [size > 1000 for size in sizes] == [True, False, True, False]
    long = say(*[HELLO] * 100)
    for _ in range(2):
        same.render(long, {}, add_generation_prompt=True)  # too many to be remembered
    assert len(sizes) == 8


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server of a base whose template knows two roles."""
    folder = tiny.save_tiny_base(tmp_path_factory.mktemp("base"))
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = KNOWN_ROLES
    tokenizer.save_pretrained(folder)
    with serving(settings(folder, tmp_path_factory.mktemp("data"))) as running:
        yield running


@pytest.mark.parametrize("is_streaming", [True, False])
def test_a_dropped_role_is_a_400_over_http(strict: Running, is_streaming: bool) -> None:
    def chat(*turns: tuple[str, str]) -> httpx.Response:
        body = {"model": BASE, "messages": say(*turns), "max_tokens": 2, "stream": is_streaming}
        return strict.client.post("/v1/chat/completions", json=body)

    assert chat(HELLO).status_code == 200
    for turns in ((RULES, HELLO), (RULES, ("user", "x" * 10_000))):
        answer = chat(*turns)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "messages[0]")
        assert "'system'" in answer.json()["error"]["message"]
    assert chat(HELLO, ("assistant", "hi"), HELLO).status_code == 200
