"""Who may be in a mixture, how long prototypes are kept, what a trace puts together, and vectors of inputs."""

import asyncio
import gc
from pathlib import Path
from weakref import ref

import numpy as np
import pytest
import torch

import tiny
from oracle import ArrowOracle
from serving import serving, settings
from swaplora_adapters.store.records import Mixing
from swaplora_adapters.weights.router import Prototypes, Router
from swaplora_adapters.weights.served import AdapterWeights, ModuleWeights
from swaplora_server.service.mixtures import routers as routers_module
from swaplora_server.service.mixtures.routers import MemberError, Routers
from swaplora_server.service.mixtures.traces import PromptTrace
from swaplora_server.service.offload import Offload

CPU = torch.device("cpu")
PATHS = ["here", "there"]
MIXING = Mixing(1, 1.0)


def weights(seed: int, paths: list[str] | None = None, *, shift: bool = False) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    factors = torch.randn(2, 6, generator=generator), torch.randn(5, 2, generator=generator)
    module = ModuleWeights(*factors, shift=torch.ones(5) if shift else None)
    return AdapterWeights(f"sha256:{seed}", dict.fromkeys(PATHS if paths is None else paths, module))


def routers() -> Routers:
    return Routers(PATHS, Offload(1, 4, "test"))


async def test_prototypes_are_made_once_and_go_with_their_weights() -> None:
    makes = routers()
    one, two, three = (weights(seed) for seed in range(3))
    first, second = await makes.router([one, two], MIXING), await makes.router([two, three], MIXING)
    assert first.members[1] is second.members[0]
    kept = [ref(first.members[0]), ref(first.members[1])]
    del first, second, one
    gc.collect()
    assert [prototypes() is None for prototypes in kept] == [True, False]


async def test_who_asks_while_prototypes_are_made_waits_for_these(monkeypatch: pytest.MonkeyPatch) -> None:
    makes, made, one, two = routers(), list[str](), weights(0), weights(1)

    def counted(member: AdapterWeights, paths: list[str]) -> Prototypes:
        made.append(member.digest)
        return Prototypes(member, paths)

    monkeypatch.setattr(routers_module, "Prototypes", counted)
    asked = [asyncio.create_task(makes.router([one, two], MIXING)) for _ in range(3)]
    await asyncio.sleep(0)
    asked[0].cancel()
    _, *found = await asyncio.gather(*asked, return_exceptions=True)
    assert made == [one.digest, two.digest]
    assert [type(each) for each in found] == [Router, Router]


async def test_prototypes_that_could_not_be_made_are_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    makes, one, two = routers(), weights(0), weights(1)
    with monkeypatch.context() as patched:
        patched.setattr(routers_module, "Prototypes", lambda _weights, _paths: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            await makes.router([one, two], MIXING)
    assert len((await makes.router([one, two], MIXING)).members) == 2


@pytest.mark.parametrize(
    ("members", "number", "said"),
    [
        ([weights(0), weights(1, shift=True)], 1, "biases"),
        ([weights(0, ["here"]), weights(1)], 1, "other modules than the first member does, such as there"),
        ([weights(0), weights(1, ["there"])], 1, "such as here"),
    ],
)
async def test_who_cannot_be_a_member_is_named(members: list[AdapterWeights], number: int, said: str) -> None:
    with pytest.raises(MemberError, match=said) as raised:
        await routers().router(members, MIXING)
    assert raised.value.number == number


def test_a_trace_puts_together_what_comes_in_parts_and_twice() -> None:
    whole = np.random.default_rng(0).random((3, 10, 2), np.float32)
    trace = PromptTrace(10)
    tokens, head = whole.copy(), whole.copy()
    tokens[2], head[:2] = np.nan, np.nan  # the last module sees those alone that reach the head
    trace.note(0, tokens[:, :6])
    trace.note(0, head[:, :6])
    trace.note(2, tokens[:, 2:9])  # after a preemption, which scores no token again
    trace.note(6, head[:, 6:9])
    trace.note(9, whole[:, 9:])
    assert trace.shares is not None
    assert np.array_equal(trace.shares, whole)
    assert PromptTrace(10).key != PromptTrace(10).key


def test_vectors_by_a_mixture_are_pefts(base: Path, tmp_path: Path) -> None:
    """Of a decoder; those of an encoder go the same way."""
    folders = [tiny.save_adapter(tmp_path / str(seed), base, seed=seed) for seed in (1, 2)]
    with serving(settings(base, tmp_path / "data")) as server:
        for name, folder in zip("ab", folders, strict=True):
            server.put(name, folder)
        body = {"name": "mix", "members": ["a", "b"], "top_k": 1}
        assert server.client.post("/v1/mixtures", json=body).status_code == 201
        answer = server.client.post("/v1/embeddings", json={"model": "mix", "input": [list(range(40, 60))]})
        found = np.array(answer.json()["data"][0]["embedding"])
    last = ArrowOracle(base, folders, 1).hidden(list(range(40, 60)))[-1]
    assert np.abs(found - last / np.linalg.norm(last)).max() < 1e-4
