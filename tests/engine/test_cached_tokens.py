"""The prefix cache over HTTP: `cached_tokens` says what was found, and a hit changes nothing else."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from oracle import Oracle
from serving import BASE, Running, serving, settings, stream_chat

TOLERANCE = 1e-4  # of a log-probability, in float32
PROMPT = list(range(40, 90))  # with one token before it three full blocks of 16, and three tokens


def ask(server: Running, model: str, prompt: Any = PROMPT, **fields: Any) -> tuple[list[int], int]:
    """The first choice's tokens, and how many of the prompts' were in the cache."""
    answer = server.generate(model, prompt, ignore_eos=True, **fields)
    assert answer.status_code == 200, answer.text
    body = answer.json()
    return body["choices"][0]["token_ids"], body["usage"]["prompt_tokens_details"]["cached_tokens"]


def fresh(number: int) -> list[int]:
    """A prompt that no other test uses."""
    return [number, *PROMPT]


async def test_a_hit_says_what_was_said_without_it(server: Running) -> None:
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        said = [await stream_chat(client, BASE, "x" * 70, 30, ignore_eos=True) for _ in range(2)]
    assert said[0].token_ids == said[1].token_ids
    assert said[0].logprobs == pytest.approx(said[1].logprobs, abs=TOLERANCE)


def test_a_replaced_name_finds_nothing_of_its_old_version_and_the_old_version_all(
    server: Running, base: Path, adapters: list[Path]
) -> None:
    old, new = adapters[3], adapters[4]
    digest = server.put("replaced", old).json()["digest"]
    oracles = [Oracle(base, old), Oracle(base, new)]
    first, again = ask(server, "replaced", fresh(1)), ask(server, "replaced", fresh(1))
    assert again == (first[0], 48)
    server.put("replaced", new)
    replaced = [ask(server, "replaced", fresh(1)) for _ in range(2)]
    assert [num_cached for _, num_cached in replaced] == [0, 48]
    assert all(oracles[1].is_greedy(fresh(1), ids, tie=2 * TOLERANCE) for ids, _ in replaced)
    assert not oracles[0].is_greedy(fresh(1), replaced[0][0], tie=2 * TOLERANCE)
    assert ask(server, f"replaced@{digest}", fresh(1)) == (first[0], 48)
    assert oracles[0].is_greedy(fresh(1), first[0], tie=2 * TOLERANCE)


def test_a_deleted_name_that_comes_again_with_other_bytes_finds_nothing(server: Running, adapters: list[Path]) -> None:
    server.put("again", adapters[5])
    ask(server, "again", fresh(2))
    server.client.delete("/v1/adapters/again")
    server.put("again", adapters[6])
    assert ask(server, "again", fresh(2))[1] == 0


def test_the_same_bytes_share_whatever_they_are_called(server: Running, adapters: list[Path]) -> None:
    server.put("one", adapters[2])
    server.put("other", adapters[2])
    assert [ask(server, name, fresh(3))[1] for name in ("one", "other", BASE)] == [0, 48, 0]


def test_only_the_same_salt_shares(server: Running) -> None:
    salts: list[dict[str, Any]] = [{}, {"cache_salt": "x"}, {"cache_salt": "y"}, {"cache_salt": None}]
    assert [ask(server, BASE, fresh(4), **salt)[1] for salt in salts] == [0, 0, 0, 48]
    assert ask(server, BASE, fresh(4), cache_salt="x")[1] == 48


@pytest.mark.parametrize("salt", ["", "x" * 1025, 5, ["x"]])
def test_a_salt_that_is_none_is_refused(server: Running, salt: Any) -> None:
    answer = server.generate(BASE, PROMPT, cache_salt=salt)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "cache_salt")


def test_cached_tokens_are_counted_once_a_prompt_and_summed_over_prompts(server: Running) -> None:
    assert ask(server, BASE, fresh(5), n=4)[1] == 0
    assert ask(server, BASE, fresh(5), n=4)[1] == 48
    assert ask(server, BASE, [fresh(5), fresh(6), fresh(5)[:20]], n=2)[1] == 48 + 16


def test_a_stream_counts_cached_tokens_as_the_whole_answer_does(server: Running) -> None:
    ask(server, BASE, fresh(7))
    options = {"include_usage": True, "continuous_usage_stats": True}
    lines = server.generate(BASE, fresh(7), stream=True, stream_options=options).text.split("\n\n")
    usages = [json.loads(line.removeprefix("data: "))["usage"] for line in lines if line and "[DONE]" not in line]
    assert {said["prompt_tokens_details"]["cached_tokens"] for said in usages} == {48}
    assert usages[-1]["prompt_tokens"] == 51


def test_the_next_turn_finds_what_was_generated(server: Running) -> None:
    ids, _ = ask(server, BASE, fresh(8), max_tokens=40)
    assert ask(server, BASE, [*fresh(8), *ids, 1, 2, 3])[1] == (51 + 39) // 16 * 16


def test_without_the_cache_nothing_is_found(base: Path, tmp_path: Path) -> None:
    with serving(settings(base, tmp_path, prefix_cache=False)) as server:
        first = ask(server, BASE)
        assert ask(server, BASE) == first == (first[0], 0)
