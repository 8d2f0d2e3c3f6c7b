"""/score, /rerank and /pooling as vLLM, Cohere and Jina shape them, over one encoder."""

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from transformers import AutoTokenizer

from serving import BASE, Running, serving, settings
from swaplora_server.engine.engine import Engine
from swaplora_server.engine.request import Request
from swaplora_server.service.pooling import tokens
from swaplora_server.service.pooling.layout import Filled, Layout
from tiny_encoders import EncoderOracle
from tiny_heads import ClassOracle, save_classifier
from tiny_pairs import PairOracle, save_pair_base

TOLERANCE = 1e-4
QUERY = "what is a fox"
DOCUMENTS = ["a fox", "the dog is lazy", "quick", "a fox", "brown foxes are quick and the dogs are lazy"]


class Case:
    """A server with a cross-encoder, a classifier of three labels, and one of tokens."""

    def __init__(self, running: Running, base: Path, adapters: dict[str, Path]) -> None:
        self.running = running
        self.base = base
        self.adapters = adapters
        self.oracle = PairOracle(base, adapters["cross"])

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.running.client.post(path, json={"model": "cross"} | body)

    def scores(self, **body: Any) -> list[float]:
        answer = self.post("/score", **body)
        assert answer.status_code == 200, answer.text
        assert [one["index"] for one in answer.json()["data"]] == list(range(len(answer.json()["data"])))
        return [one["score"] for one in answer.json()["data"]]

    def refusal(self, path: str, **body: Any) -> tuple[str, str]:
        answer = self.post(path, **body)
        assert answer.status_code == 400, answer.text
        return answer.json()["error"]["param"], answer.json()["error"]["message"]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("rerank")
    base = save_pair_base(folder / "base", "bert")
    kinds = {"cross": (1, "SEQ_CLS"), "three": (3, "SEQ_CLS"), "tokens": (2, "TOKEN_CLS")}
    adapters = {
        name: save_classifier(folder / name, base, "bert", seed=number, num_labels=number, task=task)
        for name, (number, task) in kinds.items()
    }
    with serving(settings(base, folder / "data", max_batch_tokens=256, max_num_seqs=8, kv_cache_bytes=None)) as running:
        for name, own in adapters.items():
            assert running.put(name, own).status_code == 201
        yield Case(running, base, adapters)


def test_an_answer_has_vllms_shape_and_counts_the_tokens_that_were_computed(case: Case) -> None:
    answer = case.post("/v1/score", text_1=QUERY, text_2=DOCUMENTS)
    told = answer.json()
    assert (told["object"], told["model"], told["data"][0]["object"]) == ("list", "cross", "score")
    assert answer.headers["x-swaplora-adapter"] == "cross@1"
    tokenizer = AutoTokenizer.from_pretrained(case.base)
    num_tokens = sum(len(tokenizer(QUERY, document)["input_ids"]) for document in DOCUMENTS)
    assert told["usage"]["prompt_tokens"] == told["usage"]["total_tokens"] == num_tokens
    each_once = sum(len(tokenizer(text)["input_ids"]) for text in (QUERY, *DOCUMENTS))
    assert case.post("/score", model=BASE, text_1=QUERY, text_2=DOCUMENTS).json()["usage"]["total_tokens"] == each_once


def test_all_names_of_the_texts_mean_the_same(case: Case) -> None:
    pairs = (("text_1", "text_2"), ("queries", "documents"), ("queries", "items"), ("data_1", "data_2"))
    found = [case.scores(**{first: QUERY, second: DOCUMENTS}) for first, second in pairs]
    assert found[0] == found[1] == found[2] == found[3]
    each = case.scores(text_1=[QUERY] * 5, text_2=[{"text": document} for document in DOCUMENTS])
    one = [case.scores(text_1={"text": QUERY}, text_2=document)[0] for document in DOCUMENTS]
    assert found[0] == each == one
    assert case.scores(text_1=[QUERY], text_2=DOCUMENTS[0]) == one[:1]


def test_queries_go_with_the_documents_at_their_places(case: Case) -> None:
    texts = case.scores(text_1=DOCUMENTS, text_2=DOCUMENTS[::-1])
    right = [case.oracle.score(*pair) for pair in zip(DOCUMENTS, DOCUMENTS[::-1], strict=True)]
    assert np.allclose(texts, right, atol=TOLERANCE)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_the_best_document_comes_first_and_of_equal_ones_the_first(case: Case, path: str) -> None:
    for model in ("cross", BASE):
        scores = case.scores(model=model, text_1=QUERY, text_2=DOCUMENTS)
        told = case.post(path, model=model, query=QUERY, documents=DOCUMENTS).json()
        assert scores[0] == scores[3]
        order = sorted(range(5), key=lambda index: (-scores[index], index))
        assert [one["index"] for one in told["results"]] == order
        assert [one["relevance_score"] for one in told["results"]] == [scores[index] for index in order]
        assert [one["document"] for one in told["results"]] == [{"text": DOCUMENTS[index]} for index in order]
        assert told["meta"]["tokens"]["input_tokens"] == told["usage"]["total_tokens"] > 0
    best = case.post(path, query=QUERY, documents=DOCUMENTS, top_n=2, return_documents=False).json()["results"]
    every = case.post(path, query=QUERY, documents=DOCUMENTS, top_n=9).json()["results"]
    assert [len(best), len(every)] == [2, 5]
    assert best == [{"index": one["index"], "relevance_score": one["relevance_score"]} for one in every[:2]]


def test_a_text_may_be_cut_before_it_is_in_a_pair(case: Case) -> None:
    (cut,) = case.scores(text_1=QUERY, text_2="x" * 500, max_tokens_per_doc=7, max_tokens_per_query=4)
    assert cut == case.scores(text_1=QUERY[:4], text_2="x" * 7)[0]
    (cosine,) = case.scores(model=BASE, text_1="x" * 500, text_2="ab", truncate_prompt_tokens=9)
    assert cosine == case.scores(model=BASE, text_1="x" * 7, text_2="ab")[0]
    assert case.refusal("/score", text_1="a", text_2="b", max_tokens_per_doc=129)[0] == "max_tokens_per_doc"
    param, message = case.refusal("/score", text_1="a", text_2="b", truncate_prompt_tokens=4)
    assert (param, "at least 5" in message) == ("truncate_prompt_tokens", True)
    param, message = case.refusal("/score", text_1="x" * 100, text_2=["b", "x" * 100])
    assert (param, "text_2[1] with its query has 203" in message) == ("text_2[1]", True)


def test_a_pair_is_made_when_it_begins_and_none_before_all_are_known_to_fit(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled, submit = Layout.filled, Engine.submit
    made: list[Filled] = []
    made_at_each: list[int] = []

    def counted(layout: Layout, *texts: Sequence[int], has_types: bool = False) -> Filled:
        made.append(filled(layout, *texts, has_types=has_types))
        return made[-1]

    def begun(engine: Engine, request: Request) -> None:
        made_at_each.append(len(made))
        submit(engine, request)

    monkeypatch.setattr(Layout, "filled", counted)
    monkeypatch.setattr(Engine, "submit", begun)
    for model, text in (("cross", "x" * 60), (BASE, "x" * 130)):
        assert case.refusal("/score", model=model, text_1="x" * 70, text_2=[*"ab", text])[0] == "text_2[2]"
    assert not made
    for model, number in (("cross", 45), (BASE, 46)):
        case.scores(model=model, text_1=QUERY, text_2=DOCUMENTS * 9)
        assert made_at_each == list(range(1, number + 1))
        made.clear()
        made_at_each.clear()


def test_more_pairs_than_fit_a_step_are_answered_in_one(case: Case) -> None:
    documents = [f"{number} foxes" for number in range(100)]
    scores = case.scores(text_1=QUERY, text_2=documents)
    assert len(scores) == 100
    for number in (0, 50, 99):
        assert scores[number] == case.scores(text_1=QUERY, text_2=documents[number])[0]


def test_a_head_of_three_labels_scores_nothing_and_one_of_tokens(case: Case) -> None:
    for path, body in (("/score", {"text_1": "a", "text_2": "b"}), ("/rerank", {"query": "a", "documents": ["b"]})):
        param, message = case.refusal(path, model="three", **body)
        assert (param, "3 labels" in message) == ("model", True)
        param, message = case.refusal(path, model="tokens", **body)
        assert (param, "labels tokens" in message) == ("model", True)


@pytest.mark.parametrize(
    ("config", "goes_through"),
    [
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}}, "Identity"),
        ({"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"}, "Identity"),
        ({"sentence_transformers": {"activation_fn": "torch.nn.modules.activation.Tanh"}}, "Tanh"),
    ],
)
def test_scores_go_through_what_the_bases_config_says(
    case: Case, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], goes_through: str
) -> None:
    logits = case.scores(text_1=QUERY, text_2=DOCUMENTS, use_activation=False)
    sigmoid = case.scores(text_1=QUERY, text_2=DOCUMENTS)
    assert np.allclose(sigmoid, 1 / (1 + np.exp(-np.array(logits))), atol=1e-7)
    for name, value in config.items():
        monkeypatch.setattr(case.running.service.base.model.config, name, value, raising=False)
    if goes_through == "Identity":
        assert case.scores(text_1=QUERY, text_2=DOCUMENTS) == logits
    else:
        param, message = case.refusal("/score", text_1=QUERY, text_2=DOCUMENTS)
        assert (param, goes_through in message) == ("use_activation", True)
    assert case.scores(text_1=QUERY, text_2=DOCUMENTS, use_activation=False) == logits


def pooled(case: Case, **body: Any) -> list[Any]:
    answer = case.post("/pooling", **({"input": DOCUMENTS} | body))
    assert answer.status_code == 200, answer.text
    assert answer.json()["id"].startswith("pool-")
    assert {one["object"] for one in answer.json()["data"]} == {"pooling"}
    return [one["data"] for one in answer.json()["data"]]


def test_pooling_makes_what_other_routes_make(case: Case) -> None:
    body = {"model": "three", "input": DOCUMENTS}
    embedded = [one["embedding"] for one in case.post("/v1/embeddings", **body).json()["data"]]
    plain = [one["embedding"] for one in case.post("/v1/embeddings", **body, normalize=False).json()["data"]]
    classes = [one["probs"] for one in case.post("/classify", **body).json()["data"]]
    logits = [one["probs"] for one in case.post("/classify", **body, use_activation=False).json()["data"]]
    assert pooled(case, model="three", task="embed") == embedded
    assert pooled(case, model="three", task="embed", use_activation=False) == plain
    assert pooled(case, model="three", task="classify") == pooled(case, model="three") == classes
    assert pooled(case, model="three", use_activation=False) == logits
    assert pooled(case, model=BASE) == pooled(case, model=BASE, task="embed")
    assert case.refusal("/pooling", model=BASE, input="a", task="classify")[0] == "model"
    assert case.refusal("/pooling", model=BASE, input="a", dimensions=32)[0] == "dimensions"
    assert case.refusal("/pooling", model=BASE, input="a", dimensions=9, task="embed")[0] == "dimensions"


def test_each_token_has_a_vector(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [256, 5, 40, 41, 257]
    states = EncoderOracle(case.base).states(ids)
    (plain,) = pooled(case, model=BASE, input=ids, task="token_embed", use_activation=False)
    assert np.abs(np.array(plain) - states).max() <= TOLERANCE
    (found,) = pooled(case, model=BASE, input=ids, task="token_embed")
    assert np.abs(np.array(found) - states / np.linalg.norm(states, axis=1, keepdims=True)).max() <= TOLERANCE
    (encoded,) = pooled(case, model=BASE, input=ids, task="token_embed", encoding_format="base64")
    assert np.array_equal(np.frombuffer(base64.b64decode(encoded), "<f4"), np.array(found, np.float32).ravel())


@pytest.mark.parametrize(
    ("path", "body", "number"),
    [
        ("/pooling", {"model": BASE, "task": "token_embed", "input": [[2, 3], [4, 5, 6]]}, 5 * 32),
        ("/pooling", {"model": "tokens", "input": [[2, 3], [4, 5, 6]]}, 5 * 2),
        ("/pooling", {"model": "three", "input": [[2, 3], [4, 5, 6]]}, 2 * 3),
        ("/classify", {"model": "three", "input": [[2, 3], [4, 5, 6]]}, 2 * 3),
    ],
)
def test_an_answer_has_so_many_numbers_at_most(
    case: Case, monkeypatch: pytest.MonkeyPatch, path: str, body: dict[str, Any], number: int
) -> None:
    monkeypatch.setattr(tokens, "MAX_NUMBERS", number)
    assert case.post(path, **body).status_code == 200
    monkeypatch.setattr(tokens, "MAX_NUMBERS", number - 1)
    param, message = case.refusal(path, **body)
    assert (param, f"{number - 1} numbers at most, and of these inputs it would have {number}:" in message) == (
        "input",
        True,
    )


def test_each_token_has_labels(case: Case) -> None:
    ids = [256, 5, 40, 41, 257]
    right = ClassOracle(case.base, case.adapters["tokens"], 2, "TOKEN_CLS").logits(ids)
    (logits,) = pooled(case, model="tokens", input=ids, task="token_classify", use_activation=False)
    assert np.abs(np.array(logits) - right).max() <= TOLERANCE
    (scores,) = pooled(case, model="tokens", input=ids)
    powers = np.exp(right)
    assert np.abs(np.array(scores) - powers / powers.sum(1, keepdims=True)).max() <= TOLERANCE
    assert case.refusal("/pooling", model="three", input=ids, task="token_classify")[0] == "model"
    assert case.refusal("/pooling", model="tokens", input=ids, task="classify")[0] == "model"
