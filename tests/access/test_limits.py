"""Limits: no minute has more than a key or a tenant may have, however many ask at once; what is full says so."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import httpx
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from serving import BASE, Running, serving, settings
from swaplora_server.access.caller import KeyScope
from swaplora_server.access.key_file import KeyFileError, create_key, read_keys, revoke_key
from swaplora_server.access.limits import LimitReachedError, Limits, Meter, TenantLimits
from swaplora_server.engine.request import Request, TokenEvent

PROMPT = [5, 6, 7, 8, 9]


class Clock:
    """A clock that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@given(
    limit=st.integers(0, 20),
    steps=st.lists(
        st.tuples(st.integers(0, 160).map(lambda quarters: quarters / 4), st.integers(0, 12), st.integers(0, 12)),
        max_size=40,
    ),
)
def test_no_minute_has_more_than_the_limit(limit: int, steps: list[tuple[float, int, int]]) -> None:
    """Whatever is asked for when, and whatever part of it is given back at once."""
    clock = Clock()
    meter, taken = Meter(clock), []
    limited = {"key": Limits(tokens_per_minute=limit)}
    for seconds, amount, used in steps:
        clock.now += seconds
        refused = None
        try:
            meter.reserve(limited, amount).settle(used)
            taken.append((clock.now, min(amount, used)))
        except LimitReachedError as error:
            refused = error
        if refused is not None:
            assert (refused.retry_seconds is None) == (amount > limit)
        if refused is not None and refused.retry_seconds is not None:  # it is let in then, and not a second before
            soon, early = (clock.now + refused.retry_seconds - early for early in (0, 1))
            assert sum(n for at, n in taken if at + 60 > soon) + amount <= limit
            assert sum(n for at, n in taken if at + 60 > early) + amount > limit
        assert sum(n for at, n in taken if at > clock.now - 60) <= limit


def test_what_is_given_back_can_be_taken_and_once_only() -> None:
    clock = Clock()
    meter, limited = Meter(clock), {"key": Limits(tokens_per_minute=10)}
    first = meter.reserve(limited, 8)
    with pytest.raises(LimitReachedError):
        meter.reserve(limited, 3)
    first.settle(2)
    first.settle(0)
    meter.reserve(limited, 8)
    with pytest.raises(LimitReachedError) as refused:
        meter.reserve(limited, 1)
    assert refused.value.retry_seconds == 60
    clock.now += 60
    meter.reserve(limited, 10)


def test_a_late_return_makes_no_room_that_is_not_there() -> None:
    clock = Clock()
    meter, limited = Meter(clock), {"key": Limits(tokens_per_minute=10)}
    late = meter.reserve(limited, 10)
    clock.now += 61
    meter.reserve(limited, 10)
    late.settle(0)
    with pytest.raises(LimitReachedError):
        meter.reserve(limited, 1)


def test_what_one_limit_refuses_is_taken_from_none() -> None:
    meter = Meter(Clock())
    limited = {"key": Limits(requests_per_minute=5), "tenant": Limits(requests_per_minute=2)}
    for _ in range(2):
        meter.begin(limited, is_change=False)
    for _ in range(9):
        with pytest.raises(LimitReachedError, match="tenant has 2 requests a minute"):
            meter.begin(limited, is_change=False)
    alone = {"key": limited["key"]}
    for _ in range(3):
        meter.begin(alone, is_change=False)
    with pytest.raises(LimitReachedError, match="key has 5 requests a minute"):
        meter.begin(alone, is_change=False)


def test_threads_at_once_get_as_much_as_there_is_and_no_more() -> None:
    meter = Meter(Clock())
    limited = {"key": Limits(requests_per_minute=60, concurrent_requests=7, changes_per_minute=50)}
    running, most = [], []
    begun = threading.Barrier(8)

    def ask(_number: int) -> int:
        begun.wait(60)
        taken = 0
        for _ in range(40):
            try:
                end = meter.begin(limited, is_change=True)
            except LimitReachedError:
                continue
            running.append(1)
            most.append(len(running))
            running.pop()
            end()
            taken += 1
        return taken

    with ThreadPoolExecutor(8) as threads:
        assert sum(threads.map(ask, range(8))) == 50
    assert max(most) <= 7


def test_a_file_says_limits_and_commands_keep_them(tmp_path: Path) -> None:
    file = tmp_path / "keys.yaml"
    create_key(file, "acme", (KeyScope.GENERATE,))
    content = yaml.safe_load(file.read_text())
    content["keys"][0]["limits"] = {"requests_per_minute": 5}
    content["tenants"] = {"acme": {"adapters": 2}}
    file.write_text(yaml.safe_dump(content))
    _, other = create_key(file, "zeta", (KeyScope.GENERATE,))
    found = read_keys(file)
    callers = [found.caller(key) for key in found.keys]
    assert [caller.limits for caller in callers] == [Limits(requests_per_minute=5), Limits()]
    assert [caller.tenant_limits for caller in callers] == [TenantLimits(adapters=2), TenantLimits()]
    revoke_key(file, other.id)
    assert yaml.safe_load(file.read_text()) == content
    for wrong in ({"requests_per_minute": -1}, {"requests_per_minute": "5"}, {"adapters": 5}, {"requests": 5}):
        file.write_text(yaml.safe_dump({"keys": [content["keys"][0] | {"limits": wrong}]}))
        with pytest.raises(KeyFileError, match=r"keys\.0\.limits"):
            read_keys(file)


@pytest.fixture
def limited(base: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Running]:
    """A server with one key, of a tenant with limits of `request.param`."""
    file = tmp_path / "keys.yaml"
    key, _ = create_key(file, "acme", tuple(KeyScope))
    content = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump(content | {"tenants": {"acme": request.param}}))
    with serving(settings(base, tmp_path / "data", key_file=file)) as server:
        server.client.headers["authorization"] = f"Bearer {key}"
        yield server


def refusal(answer: httpx.Response) -> tuple[int, str]:
    assert 0 < int(answer.headers["retry-after"]) <= 60
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.parametrize(
    "limited", [{"concurrent_requests": 1, "tokens_per_minute": 100, "changes_per_minute": 0}], indirect=True
)
def test_requests_are_counted_until_their_answer_has_been_sent(
    limited: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, go_on, tell = limited.client, threading.Event(), Request.tell

    def held(self: Request, event: TokenEvent) -> None:
        tell(self, event)
        go_on.wait(60)

    body = {"model": BASE, "prompt": PROMPT, "max_tokens": 20, "ignore_eos": True, "stream": True}
    monkeypatch.setattr(Request, "tell", held)
    with client.stream("POST", "/v1/completions", json=body) as stream:
        pieces = stream.iter_lines()
        next(pieces)
        assert refusal(client.get("/v1/models")) == (429, "rate_limited")
        go_on.set()
        list(pieces)
    ended = limited.generate(BASE, PROMPT, 60, allowed_token_ids=[9], stop_token_ids=[9])
    assert ended.json()["usage"]["total_tokens"] == 6
    too_much = limited.generate(BASE, PROMPT, 96)
    assert (too_much.status_code, too_much.json()["error"]["param"]) == (400, "max_tokens")
    assert refusal(limited.generate(BASE, PROMPT, 70)) == (429, "rate_limited")  # 31 are gone, not the 26 + 75
    assert limited.generate(BASE, PROMPT, 64, ignore_eos=True).status_code == 200
    assert refusal(limited.generate(BASE, PROMPT, 1)) == (429, "rate_limited")
    assert refusal(client.delete("/v1/adapters/x")) == (429, "rate_limited")
    assert client.get("/health").status_code == 200
    assert client.get("/v1/models").status_code == 200


@pytest.mark.parametrize("limited", [{"adapters": 2}], indirect=True)
def test_uploads_at_once_make_no_adapter_too_many(limited: Running, adapters: list[Path]) -> None:
    with ThreadPoolExecutor(6) as threads:
        answers = list(threads.map(lambda n: limited.put(f"a{n}", adapters[n]), range(6)))
    assert sorted(answer.status_code for answer in answers) == [201] * 2 + [429] * 4
    assert {refusal(answer) for answer in answers if answer.status_code == 429} == {(429, "quota_exceeded")}
    names = [card["name"] for card in limited.client.get("/v1/adapters").json()["data"]]
    assert len(names) == 2
    assert limited.put(names[0], adapters[7]).status_code == 200  # a version more is no adapter more
    assert limited.client.delete(f"/v1/adapters/{names[0]}").status_code == 200
    assert limited.put("another", adapters[7]).status_code == 201


@pytest.mark.parametrize("limited", [{"adapter_bytes": 60_000}], indirect=True)
def test_all_versions_of_all_adapters_have_no_more_bytes_than_may_be(limited: Running, adapters: list[Path]) -> None:
    sizes = [sum(file.stat().st_size for file in folder.glob("adapter_*")) for folder in adapters]
    assert all(one < other for one, other in pairwise(sizes))
    has, last = 0, 0
    for number in (0, 1, 2, 2, 3, 4, 5):
        answer = limited.put("sql", adapters[number])
        adds = sizes[number] if number != last or not has else 0
        if has + adds <= 60_000:
            assert answer.status_code in (200, 201)
            has, last = has + adds, number
        else:
            assert refusal(answer) == (429, "quota_exceeded")
    assert has > 0
    assert sum(version["bytes"] for version in limited.client.get("/v1/adapters/sql").json()["versions"]) == has
