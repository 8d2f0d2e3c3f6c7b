"""What adapters are told of a server's base is what its stock model has, however the server keeps it."""

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import peft_kinds
from kinds_table import CACHE, CPU
from model_layers import layers_of
from peft_kinds import BASES
from swaplora_adapters.fit.base import BaseLayers
from swaplora_server.base.base_model import load_base
from swaplora_server.kernels.backend import Backend
from swaplora_server.kernels.pick import pick_backend, torch_backend

# sees positions, not tokens: a server leaves it out
NOT_SERVED = {"transformer.wpe"}
Both = tuple[BaseLayers, BaseLayers, PreTrainedModel]


def cpu_backend() -> Backend:
    return pick_backend(CPU, torch.float32, CACHE, lambda _message: None)


@pytest.fixture(
    scope="module", params=[(base, form, kept) for base in BASES for form in (True, False) for kept in ("fp32", "bf16")]
)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Both:
    """A server's layers, those of the stock model, and that model; weights in full, and such as bfloat16 holds."""
    base, is_cpu, kept = request.param
    folder = peft_kinds.save_base(base, tmp_path_factory.mktemp("base"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if kept == "bf16":
        model.bfloat16().float().save_pretrained(folder)
    backend = cpu_backend() if is_cpu else torch_backend(CPU)
    return load_base(folder, device=CPU, dtype=torch.float32, backend=backend).layers, layers_of(model), model


def test_the_same_layers_are_known(both: Both) -> None:
    served, whole, _ = both
    assert served.linears == whole.linears
    assert served.embeddings == whole.embeddings
    assert served.tied == whole.tied
    assert served.others == {path: shapes for path, shapes in whole.others.items() if path not in NOT_SERVED}
    assert served.transposed == {path for path in whole.transposed if path not in NOT_SERVED}


def test_every_parameter_reads_the_same_bit_for_bit(both: Both) -> None:
    served, whole, _ = both
    for path in paths(served):
        for name in ("weight", "bias", "gate_up_proj", "down_proj"):
            ours, theirs = read(served, f"{path}.{name}"), read(whole, f"{path}.{name}")
            assert (ours is None) == (theirs is None), f"{path}.{name}"
            if ours is not None and theirs is not None:
                assert ours.dtype == torch.float32
                assert torch.equal(ours, theirs), f"{path}.{name}"


@torch.no_grad()
def test_every_module_rebuilt_computes_as_the_stock_one_with_the_same_parameters(both: Both) -> None:
    served, whole, model = both
    for path in paths(served):
        own = {name: tensor + 0.1 * torch.randn(tensor.shape) for name, tensor in parameters(whole, path).items()}
        inputs = inputs_of(whole, path, model)
        for given in (own, {name: own[name] for name in list(own)[:1]}, {}):
            for rebuild in (served.rebuild, served.rebuilder()):
                ours, theirs = rebuild(path, given)(*inputs), whole.rebuild(path, given)(*inputs)
                torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5, msg=path)


@torch.no_grad()
def test_rebuilding_leaves_the_base_as_it_is(both: Both) -> None:
    served, whole, _ = both
    for path in paths(served):
        module = served.rebuild(path, {name: torch.zeros_like(t) for name, t in parameters(whole, path).items()})
        for parameter in module.parameters():
            parameter.add_(1)
    test_every_parameter_reads_the_same_bit_for_bit(both)


def paths(layers: BaseLayers) -> list[str]:
    return [*layers.linears, *layers.embeddings, *layers.others]


def read(layers: BaseLayers, name: str) -> Tensor | None:
    try:
        return layers.read(name)
    except KeyError:
        return None


def parameters(layers: BaseLayers, path: str) -> dict[str, Tensor]:
    found = {name: read(layers, f"{path}.{name}") for name in ("weight", "bias", "gate_up_proj", "down_proj")}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def inputs_of(layers: BaseLayers, path: str, model: PreTrainedModel) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    module: nn.Module = model.get_submodule(path)
    if isinstance(module, nn.Embedding):
        return (torch.arange(module.num_embeddings).unsqueeze(0),)
    width = layers.linears[path].in_features if path in layers.linears else 32
    x = torch.randn(5, width, generator=generator)
    if path.endswith("experts"):
        return x, torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0], [1, 3]]), torch.rand(5, 2, generator=generator)
    return (x.unsqueeze(0),)
