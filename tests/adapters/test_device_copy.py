"""An adapter that is copied to a device is the same there, tensor by tensor, in one allocation."""

from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from swaplora_adapters.errors import MemoryFullError
from swaplora_adapters.registry.residency.host_tier import HostTier
from swaplora_adapters.weights.device_copy import DeviceCopier, Layout, _Piece
from swaplora_adapters.weights.memory import Arena, aligned, pinned
from swaplora_adapters.weights.served import AdapterWeights, EmbeddingWeights, ModuleWeights

# the same memory by another name, so that what is copied "to" it is copied, and can be read
DEVICE = torch.device("cpu", 0)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def own_module() -> nn.Module:
    """With a buffer, and with others inside it, as a router or a scaled embedding has them."""
    module = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5))
    module.register_buffer("scale", random(1))
    return module


def adapter() -> AdapterWeights:
    half = torch.bfloat16
    return AdapterWeights(
        "sha256:0",
        {
            "first": ModuleWeights(random(3, 50), random(3, 70).t(), random(70), None),
            "second": ModuleWeights(random(16, 33, dtype=half), random(41, 16, dtype=half), None, random(41)),
            "biases alone": ModuleWeights(random(0, 33), random(41, 0), None, random(41)),
            "rank 1": ModuleWeights(random(1, 9), random(1, 8).t()),
        },
        {
            "plain": EmbeddingWeights(random(20, 2), random(6, 2)),
            "with tokens": EmbeddingWeights(random(20, 0), random(6, 0), torch.tensor([3, 9]), random(2, 6)),
        },
        {"own": own_module()},
        invocation=(7,),
    )


def named(weights: AdapterWeights) -> dict[str, Any]:
    parts: dict[str, Any] = {**weights.modules, **weights.embeddings}
    return {f"{path} {each.name}": getattr(part, each.name) for path, part in parts.items() for each in fields(part)}


@pytest.mark.parametrize("piece_bytes", [1 << 20, 64, 100])
def test_every_tensor_is_the_same_and_lies_the_same_way(piece_bytes: int) -> None:
    weights = adapter()
    copied = DeviceCopier(DEVICE, piece_bytes).copy(weights)
    before, after = named(weights), named(copied)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        if tensor is None:
            assert after[name] is None
        else:
            assert torch.equal(after[name], tensor), name
            assert (after[name].dtype, after[name].shape) == (tensor.dtype, tensor.shape)
            assert tensor.numel() <= 1 or after[name].stride() == tensor.stride() or 1 in tensor.shape
    assert (copied.digest, copied.invocation, copied.nbytes) == (weights.digest, (7,), weights.nbytes)
    own, of_host = (each.replaced["own"].state_dict() for each in (copied, weights))
    assert own.keys() == of_host.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in of_host.items())


def test_the_adapter_that_is_copied_stays_where_it_was() -> None:
    """Its modules too, and their tensors: else the host's tier would hold what lies on the device."""
    weights = adapter()
    own = weights.replaced["own"]
    before = {**dict(own.named_buffers()), **dict(own.named_parameters())}
    copied = DeviceCopier(DEVICE, 128).copy(weights)
    after = {**dict(own.named_buffers()), **dict(own.named_parameters())}
    assert before.keys() == after.keys()
    assert all(after[name] is tensor for name, tensor in before.items())
    places = [{tensor.data_ptr() for tensor in each.all_tensors if tensor.numel()} for each in (weights, copied)]
    assert not places[0] & places[1]


def test_tensors_that_lie_side_by_side_are_sent_together(monkeypatch: pytest.MonkeyPatch) -> None:
    sends: list[int] = []
    send = _Piece.send

    def noted(piece: _Piece, chunks: Any, to: Tensor) -> None:
        sends.append(sum(len(chunk) for _, chunk in chunks))
        send(piece, chunks, to)

    monkeypatch.setattr(_Piece, "send", noted)
    weights = adapter()
    DeviceCopier(DEVICE, 4096).copy(weights)
    assert sum(sends) == weights.nbytes
    assert len(sends) <= -(-sum(aligned(tensor.nbytes) for tensor in weights.all_tensors) // 4096) + 1


@pytest.mark.parametrize("pinned", [True, False])
def test_what_lies_in_pinned_memory_goes_in_one_copy(pinned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the host's tier has it, whatever lies in the arena before it; other memory goes through the pieces."""
    weights = adapter()
    arena = Arena(torch.full((1 << 16,), 255, dtype=torch.uint8))
    arena.take(100)
    kept = HostTier(1 << 15, arena).keep(weights)
    places = {tensor.untyped_storage().data_ptr() for tensor in kept.all_tensors if tensor.numel()}
    assert places == {arena.memory.data_ptr()}
    sends: list[str] = []
    for name in ("send", "send_pinned"):
        send = getattr(_Piece, name)

        def noted(piece: _Piece, *given: Any, name: str = name, send: Any = send) -> None:
            sends.append(name)
            send(piece, *given)

        monkeypatch.setattr(_Piece, name, noted)
    monkeypatch.setattr(Tensor, "is_pinned", lambda _self: pinned)
    copied = DeviceCopier(DEVICE, 256).copy(kept)
    assert (sends == ["send_pinned"]) == pinned
    before, after = named(weights), named(copied)
    for name, tensor in before.items():
        assert tensor is None if after[name] is None else torch.equal(after[name], tensor), name
    own, of_host = (each.replaced["own"].state_dict() for each in (copied, weights))
    assert all(torch.equal(own[name], tensor) for name, tensor in of_host.items())
    assert not places & {tensor.untyped_storage().data_ptr() for tensor in copied.all_tensors if tensor.numel()}


@pytest.mark.parametrize("code", [0, 2])
def test_memory_is_pinned_where_the_system_gives_some(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[tuple[int, ...]] = []

    def register(*given: int) -> int:
        registered.append(given)
        return code

    def check(failed: int) -> None:
        raise RuntimeError(f"CUDA error {failed}")

    runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=lambda _address: 0)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", check)
    if code:
        with pytest.raises(RuntimeError, match="CUDA error 2"):
            pinned(1000)
    else:
        memory = pinned(1000)
        assert (memory.dtype, memory.shape) == (torch.uint8, (1000,))
        assert registered == [(memory.data_ptr(), 1000, 0)]


def test_tensors_that_only_look_laid_out_are_not_taken_for_it() -> None:
    memory = torch.zeros(512, dtype=torch.uint8)
    first, second = memory[:64].view(torch.float32), memory[64:128].view(torch.float32)
    assert Layout([first, second]).found() is not None
    for tensors in (
        [second, first],
        [first, second.clone()],
        [first, memory[128:192]],
        [first.view(4, 4)[:, :2], second],
    ):
        assert Layout(tensors).found() is None
    assert Layout([]).found() is None


def test_all_of_it_is_one_allocation_that_is_not_the_hosts() -> None:
    weights = adapter()
    copied = DeviceCopier(DEVICE, 128).copy(weights)
    spans = {tensor.untyped_storage().data_ptr() for tensor in copied.all_tensors if tensor.numel()}
    assert len(spans) == 1
    assert not spans & {tensor.untyped_storage().data_ptr() for tensor in weights.all_tensors}
    assert all(tensor.data_ptr() % 64 == 0 for tensor in copied.tensors if tensor.numel())


def test_a_second_copy_leaves_the_first_as_it_is() -> None:
    copier, weights = DeviceCopier(DEVICE, 64), adapter()
    first = copier.copy(weights)
    other = replace(weights, modules={"first": ModuleWeights(random(3, 50) + 1, random(70, 3))})
    copier.copy(other)
    assert torch.equal(first.modules["first"].lora_A, weights.modules["first"].lora_A)


def test_what_lies_on_the_device_already_is_left_there() -> None:
    weights = adapter()
    copied = DeviceCopier(torch.device("cpu")).copy(weights)
    assert copied.modules["first"].lora_A is weights.modules["first"].lora_A


def test_a_device_without_room_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    copier, weights = DeviceCopier(DEVICE), adapter()
    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(MemoryFullError, match=f"{weights.nbytes} bytes: lower --kv-cache-bytes"):
        copier.copy(weights)
