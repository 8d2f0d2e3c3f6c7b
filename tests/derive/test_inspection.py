"""What an inspection says beyond an adapter alone: beside the base's weights, and beside another adapter."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from adapter_files import LAYERS, SHAPES, factors, write_adapter
from fake_server import CARD, FakeServer, run_fake_server, swaplora
from serving import Running, serving, settings
from swaplora_adapters.derive.base_files import BaseFiles
from swaplora_adapters.derive.inspect_weights import compare_weights
from swaplora_adapters.derive.intruders import NUM_LOOKED_AT, count_intruders, intruders
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.fit.base import LinearShape
from swaplora_adapters.weights.load import load_weights
from swaplora_adapters.weights.served import AdapterWeights, ModuleWeights

GUARD_SECONDS = 600  # what is computed runs at low priority
Q_PROJ = "model.layers.0.self_attn.q_proj"


def read(folder: Path) -> AdapterWeights:
    files = folder / CONFIG_FILE, folder / WEIGHTS_FILE
    return load_weights("", *files, LAYERS, torch.float32, torch.device("cpu"))


def delta(weights: AdapterWeights, path: str) -> torch.Tensor:
    module = weights.modules[path]
    return (module.lora_B @ module.lora_A).double()


@pytest.fixture(scope="module")
def stocked(base: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(settings(base, tmp_path_factory.mktemp("data"))) as running:
        running.put("one", adapters[3])
        running.put("two", adapters[4])
        running.put("few", write_adapter(tmp_path_factory.mktemp("few"), seed=5))
        yield running


def test_a_norm_is_told_beside_the_bases_own(stocked: Running, base: Path, adapters: list[Path]) -> None:
    modules = stocked.client.get("/v1/adapters/one/inspect").json()["modules"]
    weights, model = read(adapters[3]), tiny.tiny_model()
    assert {module["module"] for module in modules} == weights.modules.keys()
    for module in modules:
        weight = model.get_submodule(module["module"]).weight.detach().double()
        ratio = delta(weights, module["module"]).norm() / weight.norm()
        assert module["relative_norm"] == pytest.approx(float(ratio), rel=1e-5)
        assert "cosine" not in module
        assert "intruders" not in module


def test_two_adapters_are_compared_module_by_module_and_as_a_whole(stocked: Running, adapters: list[Path]) -> None:
    found = stocked.client.get("/v1/adapters/one/inspect?against=two@1").json()
    one, two = read(adapters[3]), read(adapters[4])
    for module in found["modules"]:
        a, b = delta(one, module["module"]).flatten(), delta(two, module["module"]).flatten()
        assert module["cosine"] == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-6)
    a, b = (torch.cat([delta(weights, path).flatten() for path in one.modules]) for weights in (one, two))
    assert found["against"]["cosine"] == pytest.approx(float(torch.cosine_similarity(a, b, dim=0)), abs=1e-6)
    assert (found["against"]["name"], found["against"]["version"]) == ("two", 1)


def test_modules_that_only_one_has_have_no_cosine(stocked: Running) -> None:
    found = stocked.client.get("/v1/adapters/one/inspect?against=few").json()
    cosines = {module["module"]: module["cosine"] for module in found["modules"]}
    assert cosines["model.layers.0.mlp.up_proj"] is None
    assert cosines[Q_PROJ] is not None
    itself = stocked.client.get("/v1/adapters/few/inspect?against=few").json()
    assert itself["against"]["cosine"] == pytest.approx(1)


def test_the_cosine_of_nothing_is_none_and_of_its_opposite_minus_one() -> None:
    module = ModuleWeights(torch.randn(2, 5), torch.randn(4, 2))
    whole = AdapterWeights("", {"m": module})
    opposite = AdapterWeights("", {"m": ModuleWeights(module.lora_A * 3, -module.lora_B)})
    nothing = AdapterWeights("", {"m": ModuleWeights(module.lora_A, module.lora_B * 0)})
    assert compare_weights(whole, opposite).overall == pytest.approx(-1)
    assert compare_weights(whole, nothing).modules == {"m": None}
    assert compare_weights(whole, nothing).overall is None
    twice = AdapterWeights("", {"m": module, "n": module})
    assert compare_weights(whole, twice).overall == pytest.approx(0.5**0.5)
    assert compare_weights(twice, whole).modules == {"m": pytest.approx(1)}


def test_who_is_not_there_is_not_compared(stocked: Running) -> None:
    answer = stocked.client.get("/v1/adapters/one/inspect?against=nobody")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_not_found")
    assert stocked.client.get("/v1/adapters/one/inspect?intruders=maybe").status_code == 400


def planted(weight: torch.Tensor, strength: float, *, is_new: bool) -> ModuleWeights:
    """A delta of rank 1: along a direction of the weight's own, or along the mean of all of them, new to it."""
    u, _, v = torch.linalg.svd(weight)
    left = u.mean(1) if is_new else u[:, 0]
    return ModuleWeights(v[:1], strength * (left / left.norm())[:, None])


def test_a_direction_that_is_new_to_the_base_is_an_intruder() -> None:
    weight = torch.randn(24, 32, generator=torch.Generator().manual_seed(0))
    assert intruders(weight, planted(weight, 100.0, is_new=True)) == 1
    assert intruders(weight, planted(weight, 100.0, is_new=False)) == 0
    assert intruders(weight, planted(weight, 0.01, is_new=True)) == 0


def test_intruders_are_counted_on_request_in_the_bases_own_weights(
    stocked: Running, base: Path, tmp_path: Path
) -> None:
    weight = tiny.tiny_model().get_submodule(Q_PROJ).weight.detach()
    module = planted(weight, 100.0, is_new=True)
    tensors = {
        f"base_model.model.{Q_PROJ}.lora_A.weight": module.lora_A.contiguous(),
        f"base_model.model.{Q_PROJ}.lora_B.weight": module.lora_B.contiguous(),
    }
    stocked.put("new", write_adapter(tmp_path, tensors, r=1, lora_alpha=1, target_modules=[Q_PROJ]))
    found = stocked.client.get("/v1/adapters/new/inspect?intruders=true", timeout=GUARD_SECONDS).json()
    assert [(m["module"], m["intruders"]) for m in found["modules"]] == [(Q_PROJ, 1)]


def test_a_transposed_weight_is_looked_at_the_right_way_round(tmp_path: Path) -> None:
    fields = {"model_type": "gpt2", "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64}
    base = tiny.save_tiny_base(tmp_path / "base", fields)
    path = "transformer.h.0.attn.c_proj"  # square, so that no shape gives it away
    weight = tiny.tiny_model(fields).get_submodule(path).weight.detach().T
    weights = AdapterWeights("", {path: planted(weight, 100.0, is_new=True)})
    assert count_intruders(weights, base) == {path: 1}
    own = AdapterWeights("", {path: planted(weight, 100.0, is_new=False)})
    assert count_intruders(own, base) == {path: 0}
    assert count_intruders(
        AdapterWeights("", {"lm_head": ModuleWeights(torch.randn(1, 32), torch.randn(259, 1))}), base
    )
    assert NUM_LOOKED_AT == 10


def test_the_bases_files_are_read_as_they_lie(base: Path, tmp_path: Path) -> None:
    shape = SHAPES[Q_PROJ]
    whole = BaseFiles(base)
    expected = whole.norm(Q_PROJ, shape)
    assert expected == pytest.approx(float(tiny.tiny_model().get_submodule(Q_PROJ).weight.detach().norm()), rel=1e-5)
    assert whole.norm("lm_head", SHAPES["lm_head"]) is not None  # it is tied, and so not in the file
    assert whole.weight(Q_PROJ, LinearShape(31, 32)) is None
    assert whole.weight("model.layers.9.self_attn.q_proj", shape) is None
    tiny.tiny_model().save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    assert BaseFiles(tmp_path / "sharded").norm(Q_PROJ, shape) == expected
    bare = {name.removeprefix("model."): tensor for name, tensor in load_file(base / "model.safetensors").items()}
    (tmp_path / "bare").mkdir()
    save_file(bare, tmp_path / "bare" / "model.safetensors")
    assert BaseFiles(tmp_path / "bare").norm(Q_PROJ, shape) == expected
    (tmp_path / "empty").mkdir()
    assert BaseFiles(tmp_path / "empty").norm(Q_PROJ, shape) is None


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    with run_fake_server() as fake:
        monkeypatch.setenv("SWAPLORA_URL", fake.url)
        yield fake


def test_the_command_asks_for_both_and_shows_them(server: FakeServer) -> None:
    module = {
        "module": "lm_head",
        "rank": 1,
        "norm": 1.0,
        "spectral_norm": 1.0,
        "effective_rank": 1.0,
        "singular_values": [1.0],
        "relative_norm": 0.25,
        "cosine": None,
        "intruders": 3,
    }
    named = {"name": "poet", "version": 1, "digest": CARD["digest"], "cosine": 0.125}
    answer = {"name": "sql", "version": 2, "digest": CARD["digest"], "modules": [module], "warnings": []}
    server.answer("GET", "/v1/adapters/sql/inspect?against=poet&intruders=true", answer | {"against": named})
    lines = swaplora("adapters", "inspect", "sql", "--against", "poet", "--intruders").output.splitlines()
    assert lines[:2] == ["sql@2 (abababababab)", "cosine with poet@1: 0.125"]
    assert lines[3].split() == ["lm_head", "1", "1", "0.25", "1", "1", "-", "3", "1"]


def test_the_command_that_composes_sends_what_it_is_told(server: FakeServer) -> None:
    server.answer("POST", "/v1/merged", CARD, 201)
    done = swaplora(
        "adapters", "compose", "both", "sql=0.5", "poet@2=-1", "plain", "--method", "ties", "--density", "0.3"
    )
    assert (done.exit_code, done.stdout) == (0, "both@2 is stored (abababababab)\n")
    assert server.bodies == [
        {
            "name": "both",
            "from": [{"name": "sql", "scale": 0.5}, {"name": "poet@2", "scale": -1.0}, {"name": "plain", "scale": 1.0}],
            "method": "ties",
            "density": 0.3,
        }
    ]
    assert json.loads(swaplora("adapters", "compose", "both", "sql", "--json").stdout) == CARD
    for arguments, complaint in ((["a=x"], "a=x: x is no number"), (["a", "a=2"], "a is given twice")):
        done = swaplora("adapters", "compose", "both", *arguments)
        assert (done.exit_code, complaint in done.stderr) == (2, True)


def test_an_upload_can_be_converted_from_the_command_line(server: FakeServer, tmp_path: Path) -> None:
    server.answer("PUT", "/v1/adapters/sql?convert=svd", CARD, 201)
    folder = write_adapter(tmp_path, factors())
    for source in (str(folder), "hf://org/repo"):
        assert swaplora("adapters", "put", "sql", source, "--convert", "svd").exit_code == 0
    assert len(server.calls) == 2
