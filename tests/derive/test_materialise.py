"""An adapter merged into weights of its own answers as it does unmerged, beside both the base and itself."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny
from mixed_batch import CACHE, SHAPE, embedding_adapter, random_adapter, replacing_adapter, scaled_adapter
from serving import BASE, Running, serving, settings
from swaplora_adapters.files.naming import WEIGHTS_FILE
from swaplora_adapters.fit.base import EmbeddingShape, LayerShapes, LinearShape, Rebuild
from swaplora_adapters.weights.materialise import materialise
from swaplora_adapters.weights.served import AdapterWeights, EmbeddingWeights, ModuleWeights
from swaplora_server.base.base_model import BaseModel, load_base
from swaplora_server.engine.kv_cache import BlockPool
from swaplora_server.engine.request import AdapterUse, Request, SamplingParams, Sequence
from swaplora_server.engine.scheduling.batch import Batch, rows_of
from swaplora_server.kernels.pick import pick_backend, torch_backend

CPU = torch.device("cpu")
PROMPT = list(range(40, 80))
BASES = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True, **SHAPE},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": False, **SHAPE},
    "gpt2": {"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 512},
}
KINDS = {
    "lora": lambda base: random_adapter(base, 5, 1),
    "scaled": lambda base: scaled_adapter(base, 5, 2),
    "replacing": lambda base: replacing_adapter(base, 3),
    "embedding": lambda base: embedding_adapter(base, 4),
}


@pytest.fixture(scope="module", params=[(name, is_cpu) for name in BASES for is_cpu in (True, False)])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    name, is_cpu = request.param
    folder = tiny.save_tiny_base(tmp_path_factory.mktemp("base"), BASES[name])
    backend = pick_backend(CPU, torch.float32, CACHE, lambda _message: None) if is_cpu else torch_backend(CPU)
    return load_base(folder, device=CPU, dtype=torch.float32, backend=backend)


def answers(base: BaseModel, adapters: list[AdapterWeights | None]) -> list[Tensor]:
    """The last logits of one prompt, for each of `adapters`, all in one step."""
    pool, rows = BlockPool(64, 16), []
    for weights in adapters:
        uses = () if weights is None else (AdapterUse(base.prepared(weights), 1.0, weights.digest),)
        request = Request("r", tuple(range(3, 40)), SamplingParams(max_tokens=1), lambda _event: None, adapters=uses)
        sequence = Sequence(request, 0)
        pool.grow(sequence.block_table, sequence.num_tokens)
        rows.append(rows_of(sequence, 0, sequence.num_tokens))
    return list(base.runner(64, 16).logits(Batch(tuple(rows))))


@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_adapter_answers_as_it_does_unmerged(base: BaseModel, kind: str) -> None:
    adapter = KINDS[kind](base)
    own_weights = replace(materialise(adapter, base.layers), digest="sha256:merged")
    alone, unmerged, own, after = answers(base, [None, adapter, own_weights, None])
    assert (unmerged - alone).abs().max() > 0.5, "the adapter moves the output"
    assert (own - unmerged).abs().max() <= 1e-4 * unmerged.abs().max()
    for later in (after, answers(base, [None])[0]):
        torch.testing.assert_close(later, alone, atol=1e-5, rtol=1e-5)  # the resident base was not written


def test_a_merged_weight_is_rounded_only_where_the_base_is(base: BaseModel) -> None:
    path = next(iter(base.layers.linears))
    own = materialise(random_adapter(base, 5, 1), base.layers)
    exact = base.layers.read(f"{path}.weight")
    assert not torch.equal(exact.bfloat16().float(), exact)
    module = own.replaced[path]
    x = torch.randn(1, 3, base.layers.linears[path].in_features)
    factors = random_adapter(base, 5, 1).modules[path]
    bias = module.bias if isinstance(module.bias, Tensor) else 0
    expected = x @ (exact + factors.lora_B.float() @ factors.lora_A.float()).t() + bias
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("http")
    base = tiny.save_tiny_base(folder / "base")
    with serving(settings(base, folder / "data", prefix_cache=True)) as running:
        half = tiny.save_adapter(folder / "half", base, seed=3, rank=4, alpha=8)
        tensors = load_file(half / WEIGHTS_FILE)
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, half / WEIGHTS_FILE)
        assert running.put("half", half).status_code == 201
        for seed, name in enumerate(("a", "b"), start=1):
            put = running.put(name, tiny.save_adapter(folder / name, base, seed=seed, use_dora=name == "b"))
            assert put.status_code == 201
        yield running


def merge(running: Running, name: str, **scales: float) -> dict[str, Any]:
    listed = [{"name": other, "scale": scale} for other, scale in scales.items()]
    answer = running.client.post("/v1/merged", json={"name": name, "from": listed, "materialise": True}, timeout=60)
    assert answer.status_code in (200, 201), answer.text
    card: dict[str, Any] = answer.json()
    return card


@pytest.mark.parametrize(("kind", "scales"), [("lora", {"a": 1.0}), ("dora", {"b": 1.0}), ("scaled", {"a": -0.5})])
def test_a_merged_model_over_http_answers_as_its_adapters_do(
    running: Running, kind: str, scales: dict[str, float]
) -> None:
    card = merge(running, f"own-{kind}", **scales)
    assert "merged" in card["kind"]
    assert card["provenance"]["materialise"] is True
    terms = [{"name": name, "scale": scale} for name, scale in scales.items()]
    wanted: dict[str, Any] = (
        {"model": next(iter(scales))} if list(scales.values()) == [1.0] else {"model": BASE, "adapters": terms}
    )
    expected = running.token_ids(wanted.pop("model"), PROMPT, 24, **wanted)
    assert running.token_ids(f"own-{kind}", PROMPT, 24) == expected != running.token_ids(BASE, PROMPT, 24)
    assert merge(running, f"own-{kind}", **scales)["version"] == 1, "the same again is the same version"


def test_merged_models_share_a_batch_with_everyone(running: Running) -> None:
    merge(running, "own", a=1.0)
    names = [BASE, "own", "a", "b", "own", BASE]
    alone = [running.token_ids(name, PROMPT, 32) for name in names]
    with ThreadPoolExecutor(len(names)) as pool:
        together = list(pool.map(lambda name: running.token_ids(name, PROMPT, 32), names))
    assert together == alone


def test_a_merged_model_is_counted_in_memory_and_freed_when_it_is_deleted(running: Running) -> None:
    merge(running, "counted", a=0.25)
    before = running.service.registry.resident_bytes
    running.token_ids("counted", PROMPT)
    linears = running.service.base.layers.linears
    weights = sum(in_ * out for path, (in_, out) in linears.items() if path != "lm_head")
    grown = running.service.registry.resident_bytes - before
    assert 4 * weights <= grown <= 4.5 * weights
    assert running.client.delete("/v1/adapters/counted?timeout=30").status_code == 200
    assert running.service.registry.resident_bytes == before


def test_a_merged_model_has_no_place_in_a_sum(running: Running) -> None:
    merge(running, "own", a=1.0)
    answer = running.generate(BASE, PROMPT, adapters=[{"name": "own", "scale": 0.5}])
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "adapters[0].name")


def test_an_adapter_is_counted_in_memory_by_what_its_bfloat16_file_holds(running: Running) -> None:
    before = running.service.registry.resident_bytes
    running.token_ids("half", PROMPT)
    parameters = running.client.get("/v1/adapters/half").json()["parameters"]
    assert running.service.registry.resident_bytes - before == 2 * parameters


@pytest.mark.parametrize("with_vectors", [True, False])
def test_what_lies_on_another_device_than_the_bases_weights_are_read_to_is_merged_there(with_vectors: bool) -> None:
    """torch's meta device stands for a GPU: no operation takes tensors of it and of the CPU."""
    elsewhere = torch.device("meta")

    def there(*shape: int) -> Tensor:
        return torch.empty(shape, device=elsewhere)

    vectors = (there(4), there(4)) if with_vectors else ()
    tokens = torch.empty(2, dtype=torch.int64, device=elsewhere)

    class Base(LayerShapes):
        def read(self, name: str) -> Tensor:
            return {"linear.weight": torch.ones(4, 6), "linear.bias": torch.ones(4)}.get(name, torch.ones(9, 6))

        def rebuilder(self) -> Rebuild:
            return lambda _path, parameters: nn.ParameterList(parameters.values())

    base = Base({"linear": LinearShape(6, 4)}, {"table": EmbeddingShape(9, 6)})
    linear = ModuleWeights(there(2, 6), there(4, 2), *vectors)
    embedding = EmbeddingWeights(there(9, 2), there(6, 2), tokens, there(2, 6))
    whole = materialise(AdapterWeights("sha256:0", {"linear": linear}, {"table": embedding}), base)
    kept = [parameter for module in whole.replaced.values() for parameter in module.parameters()]
    assert [parameter.device for parameter in kept] == 3 * [elsewhere]
