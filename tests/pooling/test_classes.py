"""Adapters with heads of their own, of any number of labels, in one batch: their logits are PEFT's alone."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from serving import BASE, Running, serving, settings
from tiny_encoders import ARCHITECTURES, save_encoder
from tiny_heads import ClassOracle, save_classifier

TOLERANCE = 1e-4
NUM_LABELS = (2, 3, 7, 1)
DECODER = "llama"
IDS = [5, 40, 41, 200, 6]
NAMES = {"0": "calm", "1": "glad", "2": "sad"}


class Case:
    """A server of one architecture with a classifier for each number of labels."""

    def __init__(self, running: Running, architecture: str, base: Path, adapters: dict[int, Path]) -> None:
        self.running = running
        self.architecture = architecture
        self.base = base
        self.adapters = adapters


@pytest.fixture(scope="module", params=[*ARCHITECTURES, DECODER])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder, name = tmp_path_factory.mktemp(request.param), request.param
    base = tiny.save_tiny_base(folder / "base") if name == DECODER else save_encoder(folder / "base", name)
    adapters = {
        number: save_classifier(folder / f"c{number}", base, name, seed=number, num_labels=number)
        for number in NUM_LABELS
    }
    kv = {"kv_cache_bytes": 4 << 20 if name == DECODER else None}
    with serving(settings(base, folder / "data", max_batch_tokens=150, max_num_seqs=8, **kv)) as running:
        for number, adapter in adapters.items():
            answer = running.put(f"c{number}", adapter)
            assert answer.status_code == 201, answer.text
        yield Case(running, name, base, adapters)


def classify(server: Running, model: str, given: Any = IDS, path: str = "/classify", **fields: Any) -> httpx.Response:
    return server.client.post(path, json={"model": model, "input": given} | fields)


async def test_sixteen_at_once_of_many_numbers_of_labels_equal_peft_alone(case: Case) -> None:
    rng = np.random.default_rng(0)
    given = [rng.integers(2, 256, rng.integers(1, 100)).tolist() for _ in range(16)]
    numbers = [NUM_LABELS[index % 4] for index in range(16)]
    bodies = [
        {"model": f"c{number}", "input": one, "use_activation": False}
        for number, one in zip(numbers, given, strict=True)
    ]
    async with httpx.AsyncClient(base_url=case.running.url, timeout=600) as client:
        beside = client.post("/v1/embeddings", json={"model": BASE, "input": given[:4]})
        *together, embedded = await asyncio.gather(*(client.post("/classify", json=body) for body in bodies), beside)
        alone = [await client.post("/classify", json=body) for body in bodies]
    assert embedded.status_code == 200, embedded.text
    oracles = {number: ClassOracle(case.base, folder, number) for number, folder in case.adapters.items()}
    for one, number, answer, again in zip(given, numbers, together, alone, strict=True):
        assert answer.status_code == 200, answer.text
        (told,) = answer.json()["data"]
        right = oracles[number].logits(one)
        assert np.abs(np.array(told["probs"]) - right).max() <= TOLERANCE
        assert (told["num_classes"], told["label"]) == (number, f"LABEL_{right.argmax()}")
        assert told == again.json()["data"][0], "other bits in company"


def test_probabilities_are_of_a_softmax_and_of_one_label_a_sigmoid(case: Case) -> None:
    for number in (3, 1):
        logits = np.array(classify(case.running, f"c{number}", use_activation=False).json()["data"][0]["probs"])
        (told,) = classify(case.running, f"c{number}", path="/v1/classify").json()["data"]
        right = np.exp(logits) / np.exp(logits).sum() if number > 1 else 1 / (1 + np.exp(-logits))
        assert np.allclose(told["probs"], right, atol=1e-6)


def test_an_answer_has_vllms_shape(case: Case) -> None:
    answer = classify(case.running, "c3", ["ab", "cde"])
    told = answer.json()
    assert (told["object"], told["model"], [one["index"] for one in told["data"]]) == ("list", "c3", [0, 1])
    assert told["id"].startswith("classify-")
    assert told["usage"]["prompt_tokens"] == told["usage"]["total_tokens"] > 0
    assert answer.headers["x-swaplora-adapter"] == "c3@1"


def test_who_has_no_head_does_not_classify_and_who_has_one_does_not_generate(case: Case) -> None:
    error = classify(case.running, BASE).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_request", "model")
    assert "no head" in error["message"]
    sums: dict[str, Any] = {"adapters": [{"name": "c2", "scale": 0.5}, {"name": "c3", "scale": 0.5}]}
    assert "has no place in a sum" in classify(case.running, BASE, **sums).json()["error"]["message"]
    told = case.running.client.post("/v1/completions", json={"model": "c2", "prompt": IDS}).json()["error"]["message"]
    assert ("classifies" if case.architecture == DECODER else "generates nothing") in told


@pytest.fixture(scope="module")
def classifier(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_classifier(tmp_path_factory.mktemp("classifier"), base, DECODER, seed=1, num_labels=3)


def edited(folder: Path, tmp_path: Path, **fields: Any) -> Path:
    config = json.loads((folder / "adapter_config.json").read_text()) | fields
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    save_file(load_file(folder / "adapter_model.safetensors"), tmp_path / "adapter_model.safetensors")
    return tmp_path


def refusal(server: Running, folder: Path) -> str:
    answer = server.put("refused", folder)
    assert answer.status_code == 422, answer.text
    message: str = answer.json()["error"]["message"]
    return message


def test_labels_have_the_names_that_the_config_gives_them(server: Running, classifier: Path, tmp_path: Path) -> None:
    plain = server.put("plain", classifier).json()["digest"]
    named = server.put("named", edited(classifier, tmp_path, id2label=NAMES)).json()["digest"]
    assert plain != named
    (told,) = classify(server, "named").json()["data"]
    assert told["label"] == NAMES[str(int(np.argmax(told["probs"])))]
    assert classify(server, "plain").json()["data"][0]["probs"] == told["probs"]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, "id2label has 2 names, and the file's head has 3 labels"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label must name"),
        ({"id2label": ["a", "b", "c"]}, "id2label must name"),
        ({"id2label": NAMES, "task_type": "CAUSAL_LM"}, "only task_type SEQ_CLS and TOKEN_CLS have one"),
        ({"task_type": "CAUSAL_LM"}, "score"),
        ({"task_type": "QUESTION_ANS"}, "task_type"),
    ],
)
def test_a_head_and_a_config_that_do_not_fit_are_refused_by_name(
    server: Running, classifier: Path, tmp_path: Path, fields: dict[str, Any], named: str
) -> None:
    assert named in refusal(server, edited(classifier, tmp_path, **fields))


@pytest.mark.parametrize(
    ("shape", "named"),
    [(None, "score.weight"), ((3, 31), "[3, 31]"), ((32,), "[32]")],
)
def test_a_head_of_another_shape_or_none_is_refused_by_name(
    server: Running, classifier: Path, tmp_path: Path, shape: tuple[int, ...] | None, named: str
) -> None:
    folder = edited(classifier, tmp_path)
    tensors = load_file(folder / "adapter_model.safetensors")
    del tensors["base_model.model.score.weight"]
    if shape is not None:
        tensors["base_model.model.score.weight"] = torch.ones(shape)
    save_file(tensors, folder / "adapter_model.safetensors")
    assert named in refusal(server, folder)


def test_labels_of_a_weight_and_a_bias_that_differ_in_number_are_refused(tmp_path: Path) -> None:
    base = save_encoder(tmp_path / "base", "bert")
    folder = save_classifier(tmp_path / "adapter", base, "bert", seed=1, num_labels=3)
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors["base_model.model.classifier.bias"] = torch.ones(2)
    save_file(tensors, folder / "adapter_model.safetensors")
    with serving(settings(base, tmp_path / "data", kv_cache_bytes=None)) as running:
        assert "3 labels and the base need [3]" in refusal(running, folder)
        again = save_classifier(tmp_path / "again", base, "bert", seed=1, num_labels=3)
        assert running.put("again", again).status_code == 201
        before = classify(running, "again").json()["data"]
        other = save_classifier(tmp_path / "other", base, "bert", seed=2, num_labels=5)
        assert running.put("again", other).status_code == 200
        assert classify(running, "again").json()["data"][0]["num_classes"] == 5
        assert classify(running, "again@1").json()["data"] == before
