"""Bases that were saved with a head: it answers for the base, and for adapters that bring none."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from serving import BASE, Running, serving, settings
from tiny_encoders import save_feature_adapter
from tiny_heads import save_classifier
from tiny_pairs import PairOracle, save_pair_base, save_whole_classifier

TOLERANCE = 1e-4
QUERY, DOCUMENTS = "what is a fox", ["a fox", "the dog is lazy", "quick"]
IDS = [256, 5, 40, 41, 257]


class Case:
    def __init__(self, running: Running, base: Path, adapter: Path) -> None:
        self.running = running
        self.base = base
        self.adapter = adapter

    def post(self, path: str, **body: Any) -> Any:
        return self.running.client.post(path, json={"model": BASE} | body).json()


@pytest.fixture(scope="module", params=[1, 3])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    folder = tmp_path_factory.mktemp("whole")
    base = save_whole_classifier(folder / "base", request.param)
    if request.param == 1:  # as sentence-transformers 6 writes it; older ones had it in config.json
        activation = {"activation_fn": "torch.nn.modules.linear.Identity"}
        (base / "config_sentence_transformers.json").write_text(json.dumps(activation))
    adapter = save_feature_adapter(folder / "plain", base, seed=4)
    with serving(settings(base, folder / "data", kv_cache_bytes=None)) as running:
        bare = save_pair_base(folder / "bare", "bert")
        own = save_classifier(folder / "own", bare, "bert", seed=2, num_labels=2)
        for name, one in (("plain", adapter), ("own", own)):
            answer = running.put(name, one)
            assert answer.status_code == 201, answer.text
        yield Case(running, base, adapter)


def logits_of(base: Path, adapter: Path | None) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    if adapter is not None:
        model.bert = PeftModel.from_pretrained(model.bert, str(adapter))
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits[0].numpy()


def test_the_bases_head_answers_for_it_and_for_an_adapter_without_one(case: Case) -> None:
    for model, adapter in ((BASE, None), ("plain", case.adapter)):
        (told,) = case.post("/classify", model=model, input=IDS, use_activation=False)["data"]
        right = logits_of(case.base, adapter)
        assert np.abs(np.array(told["probs"]) - right).max() <= TOLERANCE
        assert told["label"] == f"kind {right.argmax()}"
    assert np.abs(logits_of(case.base, None) - logits_of(case.base, case.adapter)).max() > 100 * TOLERANCE
    (told,) = case.post("/classify", model="own", input=IDS)["data"]
    assert (told["num_classes"], told["label"][:6]) == (2, "LABEL_")


def test_a_base_with_a_head_of_one_label_is_a_cross_encoder(case: Case) -> None:
    told = case.post("/score", text_1=QUERY, text_2=DOCUMENTS)
    if len(logits_of(case.base, None)) > 1:
        assert "the head of who answers has 3 labels" in told["error"]["message"]
        return
    oracle = PairOracle(case.base)
    right = [oracle.logit(QUERY, document) for document in DOCUMENTS]
    assert np.abs(np.array([one["score"] for one in told["data"]]) - right).max() <= TOLERANCE
