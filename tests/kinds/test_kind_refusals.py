"""What a kind of adapter cannot do is refused over HTTP by name: sums, scales, a prompt without invocation, misfits."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import peft_kinds
import tiny
from kinds_batch import slug
from kinds_table import INVOCATION
from serving import BASE, Running, serving, settings
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE

# of PEFT's: a base stored with its embeddings, tied heads
pytestmark = pytest.mark.filterwarnings("ignore")
KINDS = ("plain", "dora, head", "saved head", "saved norms", "tokens, tied", "alora", "dora, embedding")
REPLACING = KINDS[1:]
PROMPT = [*range(60, 80), *INVOCATION]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The base, and an adapter of each of `KINDS`."""
    folder = tmp_path_factory.mktemp("refusals")
    base = peft_kinds.save_base("llama", folder / "base")
    made = {kind: peft_kinds.make(kind, base, folder / slug(kind), seed=1) for kind in KINDS}
    tiny.edit_config(made["alora"], alora_invocation_tokens=INVOCATION)
    return {BASE: base, **made}


@pytest.fixture(scope="module")
def server(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(settings(folders[BASE], tmp_path_factory.mktemp("data"))) as running:
        for kind in KINDS:
            assert running.put(slug(kind), folders[kind]).status_code == 201
        yield running


def refusal(server: Running, model: str, prompt: list[int] = PROMPT, **fields: Any) -> dict[str, Any]:
    """The error of a request that is refused, after which nobody is held in memory by it."""
    answer = server.generate(model, prompt, **fields)
    assert answer.status_code == 400, answer.text
    assert [server.client.get(f"/v1/adapters/{slug(kind)}").json()["in_flight"] for kind in KINDS] == [0] * len(KINDS)
    error: dict[str, Any] = answer.json()["error"]
    assert error["code"] == "invalid_request"
    return error


@pytest.mark.parametrize("kind", REPLACING)
def test_a_sum_with_what_does_not_add_is_refused_and_names_it(server: Running, kind: str) -> None:
    error = refusal(server, BASE, adapters=[{"name": "plain", "scale": 0.5}, {"name": slug(kind)}])
    assert repr(slug(kind)) in error["message"]
    assert error["param"] == "adapters[1].name"


@pytest.mark.parametrize("kind", REPLACING)
@pytest.mark.parametrize("scale", [0.5, -1.0])
def test_no_scale_but_one_is_taken_for_what_does_not_add(server: Running, kind: str, scale: float) -> None:
    error = refusal(server, BASE, adapters=[{"name": slug(kind), "scale": scale}])
    assert repr(slug(kind)) in error["message"]
    assert error["param"] == "adapters[0].name"


@pytest.mark.parametrize("kind", REPLACING)
def test_at_scale_one_it_is_the_adapter_itself(server: Running, kind: str) -> None:
    listed = server.token_ids(BASE, PROMPT, 16, adapters=[{"name": slug(kind), "scale": 1.0}], ignore_eos=True)
    assert listed == server.token_ids(slug(kind), PROMPT, 16, ignore_eos=True)


@pytest.mark.parametrize("prompt", [list(range(60, 80)), [*INVOCATION[1:], *INVOCATION[:-1]], INVOCATION[:1]])
def test_a_prompt_without_the_invocation_is_refused(server: Running, prompt: list[int]) -> None:
    error = refusal(server, "alora", prompt)
    assert error["param"] == "prompt"
    assert str(INVOCATION) in error["message"]
    refusal(server, BASE, prompt, adapters=[{"name": "alora"}])


def test_of_several_prompts_each_must_have_the_invocation(server: Running) -> None:
    body = {"model": "alora", "prompt": [PROMPT, list(range(20))], "max_tokens": 2}
    assert server.client.post("/v1/completions", json=body).status_code == 400
    both = {**body, "prompt": [PROMPT, [*INVOCATION, 3, *INVOCATION]]}
    assert server.client.post("/v1/completions", json=both).status_code == 200


def test_a_chat_without_the_invocation_is_refused(server: Running) -> None:
    body = {"model": "alora", "messages": [{"role": "user", "content": "hello"}]}
    error = server.client.post("/v1/chat/completions", json=body).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_request", "messages")


def classifier(tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["modules_to_save"] = ["score"]
    tensors["base_model.model.score.weight"] = torch.randn(3, 32)


def unknown_token(_tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    config["trainable_token_indices"] = [200, 3, tiny.VOCAB_SIZE]


def longer_head(tensors: dict[str, Tensor], _config: dict[str, Any]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.randn(tiny.VOCAB_SIZE + 3, 32)


Change = Callable[[dict[str, Tensor], dict[str, Any]], None]


@pytest.mark.parametrize(
    ("kind", "change", "complaint"),
    [
        ("plain", classifier, "'score', which the base model has not"),
        ("tokens, tied", unknown_token, "trainable_token_indices has 259, but 'model.embed_tokens' of the base"),
        ("saved head", longer_head, "weight of 262 rows, 3 more than the base's 259"),
    ],
)
def test_what_the_base_lacks_is_refused_at_upload(
    server: Running, folders: dict[str, Path], tmp_path: Path, kind: str, change: Change, complaint: str
) -> None:
    config = json.loads((folders[kind] / CONFIG_FILE).read_text())
    tensors = load_file(folders[kind] / WEIGHTS_FILE)
    change(tensors, config)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config))
    save_file(tensors, tmp_path / WEIGHTS_FILE)
    answer = server.put("misfit", tmp_path)
    assert answer.status_code == 422, answer.text
    assert complaint in answer.text
    assert server.client.get("/v1/adapters/misfit").status_code == 404
