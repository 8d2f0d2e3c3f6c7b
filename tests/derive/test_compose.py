"""Adapters made of others: numerically what PEFT makes of them where PEFT is right, and published as an upload is."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoModelForCausalLM

import tiny
from adapter_files import LAYERS, SHAPES, write_adapter
from serving import BASE, Running, serving, settings
from swaplora_adapters.config.parse import MAX_RANK
from swaplora_adapters.derive import write
from swaplora_adapters.derive.compose import Ingredient, compose
from swaplora_adapters.derive.lowrank import LowRank
from swaplora_adapters.derive.recipe import Recipe
from swaplora_adapters.derive.write import write_adapter as write_composed
from swaplora_adapters.errors import AdapterTooLargeError, InvalidAdapterError, StorageFailedError
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.weights.load import load_weights
from swaplora_adapters.weights.served import AdapterWeights, LinearWeights, ModuleWeights

PROMPT = [72, 101, 108, 108, 111]
GUARD_SECONDS = 600  # what is computed runs at low priority
FULL = 48  # at least the rank of any delta of the tiny base
TOLERANCE = 2e-6  # of the entries, which are about 0.1
PEFT_NAMES = {"svd": "svd", "ties": "ties_svd", "dare_linear": "dare_linear_svd", "dare_ties": "dare_ties_svd"}


@pytest.fixture(scope="module")
def folders(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three adapters with ranks, targets and scalings that all differ."""
    folder = tmp_path_factory.mktemp("sources")
    return [
        tiny.save_adapter(folder / "a", base, seed=1, rank=4, rank_pattern={"layers.1.self_attn.q_proj": 7}),
        tiny.save_adapter(folder / "b", base, seed=2, rank=3, use_rslora=True, alpha_pattern={"up_proj": 2}),
        tiny.save_adapter(folder / "c", base, seed=3, rank=5, target_modules=("q_proj", "down_proj")),
    ]


@pytest.fixture(scope="module")
def peft_model(base: Path, folders: list[Path]) -> PeftModel:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(folders[0]), adapter_name="a")
    for folder in folders[1:]:
        model.load_adapter(str(folder), adapter_name=folder.name)
    return model


def read(folder: Path) -> AdapterWeights:
    files = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    return load_weights("", *files, LAYERS, torch.float32, torch.device("cpu"))


def peft_delta(model: PeftModel, path: str, name: str) -> Tensor | None:
    """What PEFT adds to a weight for one of its adapters."""
    layer = model.base_model.model.get_submodule(path)
    delta: Tensor | None = layer.get_delta_weight(name).detach() if name in getattr(layer, "lora_A", ()) else None
    return delta


def product(module: LowRank | LinearWeights) -> Tensor:
    return module.lora_B @ module.lora_A


def test_a_sum_is_the_sum_of_the_deltas_on_every_module_that_any_has(
    folders: list[Path], peft_model: PeftModel
) -> None:
    scales = (0.7, -1.3, 2.0)
    made = compose([Ingredient(read(f), s) for f, s in zip(folders, scales, strict=True)], Recipe("sum"), SHAPES)
    assert set(made) == {path for path in SHAPES if path != "lm_head"}
    for path, module in made.items():
        deltas = [(peft_delta(peft_model, path, folder.name), s) for folder, s in zip(folders, scales, strict=True)]
        expected = sum((delta * scale for delta, scale in deltas if delta is not None), torch.zeros(()))
        assert torch.allclose(product(module), expected, atol=TOLERANCE), path
    assert made["model.layers.1.self_attn.q_proj"].rank == 7 + 3 + 5
    assert made["model.layers.0.self_attn.k_proj"].rank == 4 + 3


@pytest.mark.parametrize("rank", [FULL, 3])
@pytest.mark.parametrize("method", ["svd", "ties", "dare_linear", "dare_ties"])
def test_the_other_methods_agree_with_peft_on_the_delta(
    folders: list[Path], peft_model: PeftModel, monkeypatch: pytest.MonkeyPatch, method: Any, rank: int
) -> None:
    density, scales, names = 0.6, [0.7, -1.3, 2.0], ["a", "b", "c"]
    told: dict[str, Any] = {} if method == "svd" else {"density": density}
    told |= {"seed": 5} if method.startswith("dare") else {}
    made = compose(
        [Ingredient(read(f), s) for f, s in zip(folders, scales, strict=True)],
        Recipe(method, rank=rank, **told),
        SHAPES,
    )
    bernoulli, generator = torch.bernoulli, torch.Generator().manual_seed(5)
    monkeypatch.setattr(torch, "bernoulli", lambda input: bernoulli(input, generator=generator))  # PEFT takes no seed
    name = f"{method}_{rank}"
    peft_model.add_weighted_adapter(
        names,
        scales,
        name,
        combination_type=PEFT_NAMES[method],
        svd_rank=rank,
        density=density,
        svd_full_matrices=False,  # with them it fails for a rank above the smaller side of a weight
    )
    for path, module in made.items():
        expected = peft_delta(peft_model, path, name)
        assert expected is not None
        assert torch.allclose(product(module), expected, atol=10 * TOLERANCE), path
    assert max(module.rank for module in made.values()) <= rank
    has_error = any(module.error > 0.01 for module in made.values())
    assert has_error == (rank == 3)


def test_the_error_that_is_told_is_the_one_that_is_made(folders: list[Path]) -> None:
    ingredients = [Ingredient(read(folder), 1.0) for folder in folders]
    exact, cut = (compose(ingredients, recipe, SHAPES) for recipe in (Recipe("sum"), Recipe("svd", rank=4)))
    for path, module in cut.items():
        whole = product(exact[path])
        assert float((product(module) - whole).norm() / whole.norm()) == pytest.approx(module.error, rel=1e-3, abs=1e-6)


def test_what_is_written_is_read_by_peft_as_it_was_made(folders: list[Path], base: Path, tmp_path: Path) -> None:
    made = compose([Ingredient(read(folder), 1.0) for folder in folders], Recipe("sum"), SHAPES)
    write_composed(tmp_path, made, base_model=None, fan_in_fan_out=False, max_bytes=1 << 20)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path))
    ours = read(tmp_path)
    for path, module in made.items():
        expected = peft_delta(model, path, "default")
        assert expected is not None
        assert torch.allclose(product(module), expected, atol=TOLERANCE), path
        assert torch.equal(product(ours.modules[path]), product(module))


def test_ranks_that_no_adapter_may_have_are_refused(tmp_path: Path) -> None:
    factors = ModuleWeights(torch.zeros(MAX_RANK, 32), torch.zeros(32, MAX_RANK))
    weights = AdapterWeights("", {"model.layers.0.self_attn.q_proj": factors})
    with pytest.raises(InvalidAdapterError, match=r"add up to 8192, .* use method svd with a rank"):
        compose([Ingredient(weights, 1.0)] * 2, Recipe("sum"), SHAPES)
    made = {"model.layers.0.self_attn.q_proj": LowRank(torch.zeros(1, 32), torch.zeros(32, 1), 0.0, 0.0)}
    with pytest.raises(AdapterTooLargeError, match="is larger than 100 bytes"):
        write_composed(tmp_path, made, base_model=None, fan_in_fan_out=False, max_bytes=100)


def test_a_file_may_be_as_large_as_it_may_be_and_no_byte_larger(tmp_path: Path) -> None:
    made = {"model.layers.0.self_attn.q_proj": LowRank(torch.zeros(1, 32), torch.zeros(32, 1), 0.0, 0.0)}
    folders = [tmp_path / name for name in ("first", "again", "larger")]
    for folder in folders:
        folder.mkdir()
    write = partial(write_composed, modules=made, base_model=None, fan_in_fan_out=False)
    write(folders[0], max_bytes=1 << 20)
    written = (folders[0] / WEIGHTS_FILE).read_bytes()
    write(folders[1], max_bytes=len(written))
    assert (folders[1] / WEIGHTS_FILE).read_bytes() == written
    assert (folders[1] / WEIGHTS_FILE).stat().st_mode & 0o077 == 0
    with pytest.raises(AdapterTooLargeError, match=f"is larger than {len(written) - 1} bytes"):
        write(folders[2], max_bytes=len(written) - 1)


def test_a_file_that_cannot_be_written_though_there_is_room_is_the_disks_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise SafetensorError(f"I/O error at path {tmp_path}")

    monkeypatch.setattr(write, "save_file", fail)
    made = {"model.layers.0.self_attn.q_proj": LowRank(torch.zeros(1, 32), torch.zeros(32, 1), 0.0, 0.0)}
    with pytest.raises(StorageFailedError) as caught:
        write_composed(tmp_path, made, base_model=None, fan_in_fan_out=False, max_bytes=1 << 20)
    assert str(tmp_path) not in str(caught.value)


@pytest.fixture(scope="module")
def stocked(base: Path, folders: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(settings(base, tmp_path_factory.mktemp("data"))) as running:
        for folder in folders:
            assert running.put(folder.name, folder).status_code == 201
        targets = {"targets": [{"target": "a", "weight": 1}, {"target": "b", "weight": 1}]}
        assert running.client.put("/v1/aliases/split", json=targets).status_code == 200
        yield running


Compose = Callable[..., Any]


@pytest.fixture
def compose_over_http(stocked: Running) -> Compose:
    def send(name: str, scales: dict[str, float], **fields: Any) -> Any:
        listed = [{"name": other, "scale": scale} for other, scale in scales.items()]
        return stocked.client.post("/v1/merged", json={"name": name, "from": listed} | fields, timeout=GUARD_SECONDS)

    return send


def test_an_adapter_alone_is_itself_under_another_name(stocked: Running, compose_over_http: Compose) -> None:
    made = compose_over_http("same", {"a": 1.0})
    assert made.status_code == 201, made.text
    assert made.json()["digest"] == stocked.client.get("/v1/adapters/a").json()["digest"]
    assert stocked.token_ids("same", PROMPT) == stocked.token_ids("a", PROMPT)


def test_a_sum_answers_as_peft_does_and_says_what_it_was_made_of(
    stocked: Running, compose_over_http: Compose, peft_model: PeftModel
) -> None:
    made = compose_over_http("both", {"a": 0.5, "b@1": -0.75})
    assert made.status_code == 201, made.text
    card = made.json()
    digests = {name: stocked.client.get(f"/v1/adapters/{name}").json()["digest"] for name in "ab"}
    assert card["source"] == "composed"
    assert card["provenance"] == {
        "kind": "composed",
        "from": [
            {"name": "a", "version": 1, "digest": digests["a"], "scale": 0.5},
            {"name": "b", "version": 1, "digest": digests["b"], "scale": -0.75},
        ],
        "method": "sum",
        "error": {"overall": 0.0, "max": 0.0, "max_module": "model.layers.0.self_attn.q_proj"},
    }
    peft_model.add_weighted_adapter(
        ["a", "b"], [0.5, -0.75], "both", combination_type="svd", svd_rank=FULL, svd_full_matrices=False
    )
    peft_model.set_adapter("both")
    ids = stocked.token_ids("both", PROMPT, 16)
    with torch.no_grad():
        expected = peft_model(torch.tensor([PROMPT + ids])).logits[0, len(PROMPT) - 1 : -1].log_softmax(-1)
    chosen = expected[torch.arange(len(ids)), torch.tensor(ids)]
    assert bool((expected.max(-1).values - chosen <= 2e-4).all())
    assert ids != stocked.token_ids(BASE, PROMPT, 16)
    again = compose_over_http("both", {"a": 0.5, "b": -0.75})
    assert (again.status_code, again.json()["digest"], again.json()["version"]) == (200, card["digest"], 1)
    assert stocked.client.get("/v1/adapters/a").json()["provenance"] is None


def test_what_dare_drops_is_drawn_by_seed(stocked: Running, compose_over_http: Compose) -> None:
    fields = {"method": "dare_ties", "density": 0.5, "rank": 4}
    digests = [
        compose_over_http("drawn", {"a": 1.0, "c": 1.0}, **fields, seed=seed).json()["digest"] for seed in (1, 1, 2)
    ]
    assert digests[0] == digests[1] != digests[2]
    card = stocked.client.get("/v1/adapters/drawn").json()
    assert (card["version"], card["rank"]) == (2, 4)
    assert {key: card["provenance"][key] for key in (*fields, "seed")} == fields | {"seed": 2}
    assert 0 < card["provenance"]["error"]["overall"] <= card["provenance"]["error"]["max"] < 1


@pytest.mark.parametrize(
    ("fields", "status", "code", "param"),
    [
        ({"from": []}, 400, "invalid_request", "from"),
        ({"from": [{"name": "a"}] * 17}, 400, "invalid_request", "from"),
        ({"from": [{"name": "a"}, {"name": "a@1", "scale": 2.0}]}, 400, "invalid_request", "from"),
        ({"from": [{"name": "a", "scale": 0}]}, 400, "invalid_request", "from[0]"),
        ({"from": [{"name": "a", "scale": 1e400}]}, 400, "invalid_request", "from[0].scale"),
        ({"from": [{"name": "a", "scale": 1e300}]}, 400, "invalid_request", "from[0].scale"),
        ({"from": [{"name": "a", "weight": 1.0}]}, 400, "invalid_request", "from[0].weight"),
        ({"from": [{"name": "nobody"}]}, 404, "adapter_not_found", None),
        ({"from": [{"name": "a@9"}]}, 404, "version_not_found", None),
        ({"from": [{"name": "split"}]}, 404, "adapter_not_found", None),
        ({"from": [{"name": BASE}]}, 404, "adapter_not_found", None),
        ({"name": BASE}, 400, "invalid_adapter_name", None),
        ({"name": "split"}, 400, "invalid_adapter_name", None),
        ({"name": "../x"}, 400, "invalid_adapter_name", None),
        ({"method": "linear"}, 400, "invalid_request", "method"),
        ({"density": 0.5}, 400, "invalid_request", "density"),
        ({"rank": 4}, 400, "invalid_request", "rank"),
        ({"seed": 4}, 400, "invalid_request", "seed"),
        ({"method": "svd"}, 400, "invalid_request", "rank"),
        ({"method": "svd", "rank": 0}, 400, "invalid_request", "rank"),
        ({"method": "svd", "rank": 4097}, 400, "invalid_request", "rank"),
        ({"method": "svd", "rank": 4, "density": 0.5}, 400, "invalid_request", "density"),
        ({"method": "ties"}, 400, "invalid_request", "density"),
        ({"method": "ties", "density": 0.0}, 400, "invalid_request", "density"),
        ({"method": "ties", "density": 1.1}, 400, "invalid_request", "density"),
        ({"method": "ties", "density": 0.5, "seed": 1}, 400, "invalid_request", "seed"),
        ({"method": "dare_linear", "density": 0.5, "seed": -1}, 400, "invalid_request", "seed"),
        ({"materialise": "yes"}, 400, "invalid_request", "materialise"),
        ({"materialize": True}, 400, "invalid_request", "materialize"),
    ],
)
def test_a_request_that_cannot_be_meant_is_refused_by_name(
    stocked: Running, fields: dict[str, Any], status: int, code: str, param: str | None
) -> None:
    body = {"name": "refused", "from": [{"name": "a", "scale": 1.0}, {"name": "b"}]} | fields
    answer = stocked.client.post(
        "/v1/merged",
        content=json.dumps(body).replace("Infinity", "1e400"),
        headers={"Content-Type": "application/json"},
    )
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["param"]) == (code, param)
    assert stocked.client.get("/v1/adapters/refused").status_code == 404


def test_what_a_composition_overflows_is_refused_and_told_on_the_card(
    stocked: Running, compose_over_http: Compose, tmp_path: Path
) -> None:
    tensors = {
        f"base_model.model.{path}.lora_{letter}.weight": torch.full(shape, 1e18 if letter == "A" else 1e36)
        for path, linear in SHAPES.items()
        if path.endswith("q_proj")
        for letter, shape in (("A", (4, linear.in_features)), ("B", (linear.out_features, 4)))
    }
    stocked.put("huge", write_adapter(tmp_path / "huge", tensors, target_modules=["q_proj"]))
    answer = compose_over_http("huge", {"huge": 900.0, "a": 1.0})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_adapter")
    card = stocked.client.get("/v1/adapters/huge").json()
    assert card["version"] == 1
    assert "NaN or infinity" in card["last_failure"]["reason"]


def test_a_composition_outlives_what_it_was_made_of(
    stocked: Running, compose_over_http: Compose, base: Path, tmp_path: Path
) -> None:
    stocked.put("mortal", tiny.save_adapter(tmp_path / "mortal", base, seed=9, rank=2))
    alone = stocked.token_ids("mortal", PROMPT)
    made = compose_over_http("successor", {"mortal": 1.0})
    assert made.status_code == 201
    assert stocked.client.delete("/v1/adapters/mortal").status_code == 200
    assert stocked.token_ids("successor", PROMPT) == alone
    assert made.json()["provenance"]["from"][0]["name"] == "mortal"
