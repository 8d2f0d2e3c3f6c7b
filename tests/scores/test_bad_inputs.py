"""Whatever is sent to the routes that make numbers of inputs is answered, or refused by the name of what is wrong."""

from collections.abc import Iterator
from typing import Any

import pytest

from serving import BASE, Running, serving, settings
from tiny_heads import save_classifier
from tiny_pairs import DECODER, save_pair_base

INPUTS = ("/v1/embeddings", "/classify", "/v1/classify", "/pooling")
_RERANK = ("/rerank", "/v1/rerank", "/v2/rerank")
PAIRS = {
    "/score": ("text_1", "text_2"),
    "/v1/score": ("queries", "documents"),
    **dict.fromkeys(_RERANK, ("query", "documents")),
}
SOUND = '"a fox"'
LONG = f'"{"x" * 10**6}"'
BAD_TEXTS = {
    "empty": '""',
    "null": "null",
    "a million characters": LONG,
    "a million of several bytes": f'"{"ü" * 10**6}"',
    "a number": "1",
    "NaN": "NaN",
    "infinity": "1e999",
    "true": "true",
    "an object": '{"a": 1}',
    "half a surrogate": '"\\ud800"',
    "no text at all": "[]",
    "an empty one among others": '["a", ""]',
    "null among others": '["a", null]',
    "numbers among texts": '["a", 1]',
    "texts among numbers": '[1, "a"]',
    "lists of lists": '[[["a"]]]',
    "2,049 of them": f"[{','.join([SOUND] * 2049)}]",
}
BAD_FIELDS = {
    "model": ('"nobody"', '""', "null", "1", '"three@9"'),
    "truncate_prompt_tokens": ("-2", "0", "1000000", '"5"', "NaN", "1.5"),
    "truncation_side": ('"middle"', "1"),
    "use_activation": ('"yes"', "2"),
    "normalize": ('"yes"',),
    "encoding_format": ('"bytes"', "1"),
    "dimensions": ("0", "-1", "7", '"all"'),
    "task": ('"plugin"', '"score"', "1"),
    "top_n": ("-1", '"2"', "NaN"),
    "return_documents": ('"no"',),
    "max_tokens_per_doc": ("-1", "100000", "NaN"),
    "max_tokens_per_query": ("-1", "100000"),
    "priority": ('"first"', "1e300"),
    "user": ("1", f'"{"x" * 2000}"'),
    "messages": ('[{"role": "user", "content": "hi"}]',),
    "truncation": ("true",),
    "rank_fields": ('["title"]',),
    "lora_request": ('{"name": "x"}',),
    "adapters": ('[{"name": "three"}]', '[{"name": "nobody"}]', "[1]"),
}


@pytest.fixture(scope="module", params=["bert", DECODER])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """With adapters of one and of three labels."""
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    base = save_pair_base(folder / "base", name)
    kv = {"kv_cache_bytes": 4 << 20 if name == DECODER else None}
    with serving(settings(base, folder / "data", max_batch_tokens=2048, max_num_seqs=128, **kv)) as running:
        for own, number in (("one", 1), ("three", 3)):
            adapter = save_classifier(folder / own, base, name, seed=number, num_labels=number)
            assert running.put(own, adapter).status_code == 201
        yield running


def fields_of(path: str) -> dict[str, str]:
    return dict.fromkeys(PAIRS.get(path, ("input",)), SOUND)


def assert_told(server: Running, path: str, fields: dict[str, str], *params: str) -> None:
    """Refused by the field's name, in the one error body."""
    body = f"{{{', '.join(f'{json_name(name)}: {value}' for name, value in fields.items())}}}"
    answer = server.client.post(path, content=body.encode(), headers={"Content-Type": "application/json"})
    case = (path, body[:100], answer.status_code, answer.text[:300])
    assert 400 <= answer.status_code < 500, case
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}, case
    assert error["message"], case
    if params and error["param"] is not None:  # a number that is none is no JSON, and of no field
        assert error["param"].partition("[")[0].partition(".")[0] in params, case


def json_name(name: str) -> str:
    return f'"{name}"'


@pytest.mark.parametrize("path", [*INPUTS, *PAIRS])
def test_a_bad_text_is_refused_by_its_name(case: Running, path: str) -> None:
    for name in fields_of(path):
        for raw in BAD_TEXTS.values():
            assert_told(case, path, {"model": '"one"', **fields_of(path), name: raw}, *fields_of(path))
        lacking = {"model": '"one"', **fields_of(path)}
        del lacking[name]
        assert_told(case, path, lacking, *fields_of(path))


@pytest.mark.parametrize("path", [*INPUTS, *PAIRS])
def test_a_bad_field_is_refused_by_its_name(case: Running, path: str) -> None:
    document = case.client.get("/openapi.json").json()["paths"][path]["post"]["requestBody"]
    read = document["content"]["application/json"]["schema"]["properties"]
    refused = {"messages": INPUTS, "truncation": PAIRS, "rank_fields": PAIRS, "lora_request": (*INPUTS, *PAIRS)}
    for name, values in BAD_FIELDS.items():
        if name in read or path in refused.get(name, ()):
            for raw in values:
                assert_told(case, path, {"model": '"one"', **fields_of(path), name: raw}, name, "model", "lora_path")


def test_who_cannot_answer_is_named(case: Running) -> None:
    for path in PAIRS:
        assert_told(case, path, {"model": '"three"', **fields_of(path)}, "model")
    for path in ("/classify", "/v1/classify"):
        assert_told(case, path, {"model": f'"{BASE}"', **fields_of(path)}, "model")
    assert_told(case, "/pooling", {"model": f'"{BASE}"', **fields_of("/pooling"), "task": '"classify"'}, "model")
    if case.service.generates:
        assert_told(case, "/pooling", {"model": f'"{BASE}"', **fields_of("/pooling"), "task": '"token_embed"'}, "task")


def test_lists_of_2048_are_answered(case: Running) -> None:
    texts = ["a"] * 2048
    answer = case.client.post("/classify", json={"model": "three", "input": texts})
    assert (answer.status_code, len(answer.json()["data"])) == (200, 2048)
    ranked = case.client.post("/rerank", json={"model": "one", "query": "a", "documents": texts, "top_n": 3})
    assert len(ranked.json()["results"]) == 3
