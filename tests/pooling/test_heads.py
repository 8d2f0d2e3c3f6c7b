"""What an adapter may bring and change behind the base, as PEFT has it, and what an upload is told of the rest."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from swaplora_adapters.errors import InvalidAdapterError
from swaplora_server.base.task_heads import TaskHead
from swaplora_server.engine.pooling.kinds import Reader
from swaplora_server.engine.request import AdapterUse
from tiny_encoders import save_encoder, save_feature_adapter
from tiny_heads import ClassOracle, save_classifier
from tiny_steps import loaded, read, use_of

IDS = [5, 40, 41, 200, 6]


def reader_of(uses: tuple[AdapterUse, ...]) -> Reader:
    head = uses[0].weights.head
    assert isinstance(head, TaskHead)
    return head


def with_own_head(folder: Path) -> Path:
    """The base of a model that classified before."""
    torch.manual_seed(7)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("modernbert", {"modules_to_save": None}),  # factors for `head.dense`, which is the base's
        ("modernbert", {"modules_to_save": None, "target_modules": ["Wqkv"]}),  # the base's head as it is
        ("bert", {"target_modules": ["query"], "modules_to_save": ["pooler"]}),
        ("deberta-v2", {"modules_to_save": None}),  # factors for `pooler.dense`, which is the base's
        ("deberta-v2", {"target_modules": ["query_proj"], "modules_to_save": ["pooler"]}),
        ("roberta", {"target_modules": ["query", "dense"]}),
        ("distilbert", {"modules_to_save": None, "target_modules": ["q_lin"]}),
        ("bert", {"task": "TOKEN_CLS", "target_modules": ["query", "dense"]}),  # whose model has no pooler
    ],
)
def test_what_is_saved_or_adapted_behind_the_base_is_pefts(
    architecture: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    folder = with_own_head(save_encoder(tmp_path / "base", architecture))
    adapter = save_classifier(tmp_path / "adapter", folder, architecture, seed=1, num_labels=3, **fields)
    base = loaded(folder)
    uses = use_of(base, adapter)
    (logits,) = read(base.input_runner(), [(IDS, uses, reader_of(uses))])
    assert np.abs(logits - ClassOracle(folder, adapter, 3, fields.get("task", "SEQ_CLS")).logits(IDS)).max() <= 1e-4


def refusal(base: Path, adapter: Path, **fields: Any) -> str:
    config = adapter / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    with pytest.raises(InvalidAdapterError) as caught:
        use_of(loaded(base), adapter)
    return str(caught.value)


def test_factors_for_a_head_that_the_base_has_not_are_refused_by_name(tmp_path: Path) -> None:
    base = save_encoder(tmp_path / "base", "modernbert")
    adapter = save_classifier(tmp_path / "adapter", base, "modernbert", seed=1, num_labels=3, modules_to_save=None)
    told = refusal(base, adapter)
    assert "head.dense.lora_A.weight' is a factor in the head of SEQ_CLS: have modules_to_save name the module" in told
    assert "the head of SEQ_CLS has no 'head.norm.weight'" in told


def test_factors_for_a_pooler_that_the_base_has_not_are_refused_by_name(tmp_path: Path) -> None:
    base = save_encoder(tmp_path / "base", "roberta")
    adapter = save_feature_adapter(tmp_path / "adapter", base, 1, exclude_modules=None)
    assert "'roberta.pooler.dense' is no linear layer of the base model, which has no pooler" in refusal(base, adapter)


@pytest.mark.parametrize(
    ("task", "fields", "named"),
    [
        ("SEQ_CLS", {"task_type": "TOKEN_CLS"}, "is of a head of task_type SEQ_CLS, and the config's is TOKEN_CLS"),
        ("TOKEN_CLS", {"task_type": "SEQ_CLS"}, "the head of SEQ_CLS has no 'classifier.out_proj.weight'"),
        ("SEQ_CLS", {"task_type": None}, "is of a head of task_type SEQ_CLS, and the config's is None"),
        ("SEQ_CLS", {"modules_to_save": ["nonsense", "classifier"]}, "modules_to_save names 'nonsense'"),
        ("TOKEN_CLS", {"id2label": {"0": "a"}}, "id2label has 1 names, and the file's head has 3 labels"),
    ],
)
def test_a_head_that_is_not_what_the_config_says_is_refused_by_name(
    task: str, fields: dict[str, Any], named: str, tmp_path: Path
) -> None:
    base = save_encoder(tmp_path / "base", "roberta")
    adapter = save_classifier(tmp_path / "adapter", base, "roberta", seed=1, num_labels=3, task=task)
    assert named in refusal(base, adapter, **fields)
