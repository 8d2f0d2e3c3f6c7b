"""What is built for Ray Serve, and what of it goes with the front; nothing of it is started here."""

import weakref
from collections.abc import AsyncGenerator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, Mock

import pytest
from ray import serve as real_serve
from starlette.types import Message

from serving import settings
from swaplora_server.cluster import build, replica
from swaplora_server.cluster.affinity import RouteKey
from swaplora_server.cluster.exchange import Forwarded
from swaplora_server.cluster.meter import INTERFACE
from swaplora_server.cluster.ray_engines import RayEngines
from swaplora_server.cluster.replica import EngineReplica


@pytest.mark.parametrize(("address", "stays"), [(None, False), ("auto", True)])
def test_what_stands_on_a_cluster_stays(
    address: str | None, stays: bool, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray, serve = Mock(), Mock(wraps=real_serve)
    for name in ("start", "run", "delete", "shutdown"):
        setattr(serve, name, Mock())
    monkeypatch.setattr(build, "ray", ray)
    monkeypatch.setattr(build, "serve", serve)
    given = settings(base, tmp_path, ray=True, ray_address=address, served_model_name="org/one")
    with build.deployed(given):
        pass
    assert serve.run.call_args.kwargs["name"] == "swaplora-org-one"
    assert not serve.delete.called
    assert serve.shutdown.called != stays


def test_replicas_do_not_depend_on_their_front(base: Path, tmp_path: Path) -> None:
    bound = [
        build.engines(settings(base, tmp_path, ray=True, ray_address=address, port=port))
        for address, port in ((None, 1), ("auto", 2))
    ]
    first, second = (each._bound_deployment.init_args for each in bound)  # noqa: SLF001
    assert first == second


def test_replicas_that_would_be_the_same_are_not_begun_anew(base: Path, tmp_path: Path) -> None:
    """Whatever their number, and whichever front starts; Ray Serve takes any two for different that have no version."""

    def version(**fields: Any) -> str:
        given = settings(base, tmp_path, ray=True, **{"shared_store": str(tmp_path), "api_key": ("k",)} | fields)
        return str(build.engines(given)._bound_deployment.version)  # noqa: SLF001

    same = [version(), version(port=1), version(ray_replicas="1-4"), version(ray_address="auto")]
    assert len(set(same)) == 1
    assert len({*same, version(max_num_seqs=3), version(api_key=("other",))}) == 3


def test_the_same_under_load_is_told_again() -> None:
    """A router that has less to do with it than before would else not learn that others have more."""
    service = MagicMock(max_rows=8)
    one: Any = SimpleNamespace(_meter=Mock(), _service=service, _num_told=0)
    told = partial(EngineReplica.record_routing_stats, one)
    service.engine.snapshot.return_value = SimpleNamespace(num_waiting=0, num_running=8)
    assert told() != told()
    service.engine.snapshot.return_value = SimpleNamespace(num_waiting=0, num_running=0)
    assert told() == told()


def test_a_name_for_several_is_in_memory_where_all_of_them_are() -> None:
    """An alias as well as a mixture."""
    service = MagicMock(max_rows=8)
    service.registry.states.return_value = [SimpleNamespace(name=name, tier="device") for name in ("a", "b")]
    members = {"alias": ("a@1",), "mixture": ("a@1", "b@2"), "gone": ("a@1", "c@1")}
    named = {
        name: SimpleNamespace(alias=name, targets=[SimpleNamespace(reference=each) for each in references])
        for name, references in members.items()
    }
    service.registry.names.index.aliases.return_value = [named["alias"]]
    service.registry.names.index.mixtures.return_value = [named["mixture"], named["gone"]]
    service.engine.snapshot.return_value = SimpleNamespace(num_waiting=0, num_running=0)
    one: Any = SimpleNamespace(_meter=Mock(), _service=service, _num_told=0)
    assert EngineReplica.record_routing_stats(one)["resident"] == ["a", "alias", "b", "mixture"]


def test_rays_proxies_want_keys(base: Path, tmp_path: Path) -> None:
    given = settings(base, tmp_path, ray=True).model_dump(exclude_unset=True)
    with pytest.raises(ValueError, match="requests need a key"):
        build.app(given)
    build.app({**given, "insecure_no_auth": True})
    built = build.app({**given, "api_key": "k"})
    assert built._bound_deployment.num_replicas == 2  # noqa: SLF001  # so that one may go


def test_each_application_and_interface_counts_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Mock()
    monkeypatch.setattr(replica, "ray", ray)
    for application in ("swaplora-one", "swaplora-two"):
        replica.common_meter(application)
    monkeypatch.setattr(replica, "INTERFACE", INTERFACE + 1)
    replica.common_meter("swaplora-two")
    names = [call.kwargs["name"] for call in ray.remote.return_value.options.call_args_list]
    assert len(set(names)) == 3


async def test_a_request_that_was_sent_is_kept_nowhere() -> None:
    """Or its body would be as long as its answer."""

    async def answers() -> AsyncGenerator[list[Message]]:
        yield []
        yield [{"type": "http.response.start", "status": 200, "headers": []}]

    def sent_to(_key: RouteKey, _request: Forwarded) -> MagicMock:
        response = MagicMock()
        response.__aiter__.side_effect = answers
        return response

    handle = Mock()
    handle.options.return_value.remote = sent_to
    request = Forwarded({}, b"a body", True, "one")
    sent = weakref.ref(request)
    messages = RayEngines(handle).stream(RouteKey(), request)
    del request
    assert await anext(messages) == []
    assert sent() is None
    await messages.aclose()
