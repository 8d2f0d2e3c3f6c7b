"""Adapters that label tokens, of any number of labels, in one step with others: their logits are PEFT's alone."""

from pathlib import Path

import numpy as np
import pytest

from serving import Running
from swaplora_server.base.task_heads import TaskHead
from swaplora_server.engine.pooling.kinds import LAST_TOKEN
from swaplora_server.service.errors import RequestError
from swaplora_server.service.pooling.classes import activated
from swaplora_server.service.pooling.heads import classifier, token_classifier
from tiny_encoders import ARCHITECTURES, save_encoder
from tiny_heads import ClassOracle, save_classifier
from tiny_steps import Asked, loaded, read, use_of

NUM_LABELS = (2, 3, 7)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sixteen_of_one_step_equal_peft_alone_to_the_same_bits_in_any_company(
    architecture: str, tmp_path: Path
) -> None:
    folder = save_encoder(tmp_path / "base", architecture)
    tasks = {f"{task}-{number}": (task, number) for task in ("TOKEN_CLS", "SEQ_CLS") for number in NUM_LABELS}
    folders = {
        name: save_classifier(tmp_path / name, folder, architecture, seed=number, num_labels=number, task=task)
        for name, (task, number) in tasks.items()
    }
    base = loaded(folder)
    uses = {name: use_of(base, adapter) for name, adapter in folders.items()}
    rng = np.random.default_rng(0)
    given = [rng.integers(2, 256, length).tolist() for length in (1, 100, *rng.integers(1, 40, 14))]
    names = [["", *tasks][number % 7] for number in range(16)]
    asked: list[Asked] = []
    for token_ids, name in zip(given, names, strict=True):
        readers = token_classifier if name.startswith("TOKEN") else classifier
        asked.append((token_ids, uses[name], readers(base, uses[name])) if name else (token_ids, (), LAST_TOKEN))
    runner = base.input_runner()
    together = read(runner, asked)
    oracles = {name: ClassOracle(folder, folders[name], number, task) for name, (task, number) in tasks.items()}
    for number, (name, one) in enumerate(zip(names, given, strict=True)):
        (alone,) = read(runner, asked[number : number + 1])
        assert np.array_equal(together[number], alone), name
        if name:
            right = oracles[name].logits(one)
            assert right.shape == alone.shape == ((len(one), tasks[name][1]) if "TOKEN" in name else right.shape)
            assert np.abs(alone - right).max() <= 1e-4, name


def test_scores_of_each_token_add_up_to_1_and_of_one_label_are_a_probability() -> None:
    scores = activated(np.array([[1000.0, 0, 0], [0, 0, 0]], np.float32))
    assert scores.tolist() == [[1, 0, 0], [pytest.approx(1 / 3)] * 3]
    assert activated(np.zeros((2, 1), np.float32)).tolist() == [[0.5], [0.5]]


def test_who_labels_tokens_does_not_classify_and_the_other_way_round(tmp_path: Path) -> None:
    folder = save_encoder(tmp_path / "base", "bert")
    base = loaded(folder)
    tokens = use_of(base, save_classifier(tmp_path / "t", folder, "bert", seed=1, num_labels=3, task="TOKEN_CLS"))
    whole = use_of(base, save_classifier(tmp_path / "w", folder, "bert", seed=1, num_labels=3))
    assert isinstance(tokens[0].weights.head, TaskHead)
    with pytest.raises(RequestError, match="is TOKEN_CLS, not SEQ_CLS; it labels tokens: ask /pooling"):
        classifier(base, tokens)
    with pytest.raises(RequestError, match="is SEQ_CLS, not TOKEN_CLS; it classifies whole inputs: ask /classify"):
        token_classifier(base, whole)
    with pytest.raises(RequestError, match="no head that labels tokens: name an adapter whose task_type is TOKEN_CLS"):
        token_classifier(base, ())


def test_on_a_decoder_a_head_of_tokens_has_no_place(base: Path, server: Running, tmp_path: Path) -> None:
    folder = save_classifier(tmp_path, base, "llama", seed=1, num_labels=3, task="TOKEN_CLS")
    answer = server.put("tokens", folder)
    assert answer.status_code == 422
    assert (
        "'TOKEN_CLS' needs a head, for which this base has no place: of a base that"
        in answer.json()["error"]["message"]
    )
