"""Each route beside each kind of key: nothing is served to whom it is not for, however its path is written."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import NamedTuple

import pytest
from fastapi import APIRouter
from fastapi.routing import APIRoute

from raw_http import connected, read_answer, request
from serving import Running, serving, settings
from swaplora_server.access.caller import KeyScope
from swaplora_server.access.key_file import create_key, revoke_key
from swaplora_server.cluster.front.tries import ASKING
from swaplora_server.http import evaluations, mixtures, operations, pooling, routes
from swaplora_server.http.auth import check_declared
from swaplora_server.http.foreign import lora_adapters
from swaplora_server.http.pages import routes_page

PUBLIC = {"/health", "/health/ready", "/version", "/ping", "/ui", "/ui/app.js"}
EACH = {scope: frozenset({scope}) for scope in KeyScope}
GENERATE, READ, WRITE, METRICS, ADMIN = KeyScope
ANY = frozenset(KeyScope)
# by the beginning of the path; what changes something needs to write
FOR = {
    "/v1/adapters": {"GET": READ},
    "/v1/aliases": {"GET": READ},
    "/v1/mixtures/{name}/trace": {"POST": GENERATE},
    "/v1/mixtures": {"GET": READ},
    "/v1/merged": {},
    "/v1/load_lora_adapter": {},
    "/v1/unload_lora_adapter": {},
    "/adapters": {},
    "/v1/keys": dict.fromkeys(("GET", "POST", "DELETE"), ADMIN),
    "/metrics": {"GET": METRICS},
}


class Route(NamedTuple):
    method: str
    path: str
    scopes: frozenset[KeyScope]  # one of them is enough

    @property
    def url(self) -> str:
        return self.path.replace(":path", "").format(name="x", model="x", alias="x", key_id="x", evaluation_id="x")


def _scopes(method: str, path: str) -> frozenset[KeyScope]:
    if path in ("/openapi.json", "/docs"):
        return ANY
    if path.startswith("/v1/models") or (method, path) == ("GET", "/lora-adapters"):
        return frozenset({GENERATE, READ})
    found = next((scopes for begin, scopes in FOR.items() if path.startswith(begin)), None)
    return frozenset({GENERATE if found is None else found.get(method, WRITE)})


def _routes() -> Iterator[Route]:
    rooms = (routes, operations, pooling, evaluations, mixtures)
    found = [module for room in rooms for module in iter_modules(room.__path__, f"{room.__name__}.")]
    modules = [import_module(module.name) for module in found]
    routed = [module for module in modules if hasattr(module, "router")]
    for module in (*routed, lora_adapters, routes_page):
        for route in module.router.routes:
            assert isinstance(route, APIRoute)
            yield from (Route(method, route.path, _scopes(method, route.path)) for method in route.methods or ())
    yield Route("GET", "/openapi.json", ANY)


ROUTES = [route for route in _routes() if route.path not in PUBLIC]


class Keys(NamedTuple):
    scoped: dict[frozenset[KeyScope], str]
    expired: str
    revoked: str

    def without(self, scopes: frozenset[KeyScope]) -> str:
        """One that has all scopes but these, and is no administrator's."""
        return self.scoped[ANY - scopes - {ADMIN}]


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Keys]:
    file = tmp_path_factory.mktemp("keys") / "keys.yaml"
    mixes = {*EACH.values(), *(ANY - route.scopes - {ADMIN} for route in ROUTES)} - {frozenset()}
    scoped = {mix: create_key(file, "acme", tuple(mix))[0] for mix in mixes}
    expired, _ = create_key(file, "acme", tuple(ANY), datetime.now(UTC) - timedelta(seconds=1))
    revoked, stored = create_key(file, "acme", tuple(ANY))
    revoke_key(file, stored.id)
    return file, Keys(scoped, expired, revoked)


@pytest.fixture(scope="module")
def locked(base: Path, keys: tuple[Path, Keys], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    config = settings(base, tmp_path_factory.mktemp("data"), api_key=("own",), key_file=keys[0])
    with serving(config) as running:
        yield running


def _answer(server: Running, route: Route, authorization: str | None, **headers: str) -> tuple[int, str]:
    given = {} if authorization is None else {"Authorization": authorization}
    answer = server.client.request(route.method, route.url, headers=given | headers)
    is_told = answer.headers.get("content-type") == "application/json"
    body = answer.json() if is_told else {}
    error = body.get("error") if isinstance(body, dict) else None
    return answer.status_code, (error.get("code") or error["type"]) if error else ""


def test_the_documents_routes_are_these(locked: Running) -> None:
    document = locked.client.get("/openapi.json", headers={"Authorization": "Bearer own"}).json()
    told = {(method.upper(), path) for path, methods in document["paths"].items() for method in methods}
    here = {(route.method, route.path.replace(":path", "")) for route in ROUTES}
    here -= {("GET", "/openapi.json"), ("GET", "/docs")}
    assert told - {("GET", path) for path in PUBLIC} == here


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
def test_a_route_is_served_to_whom_it_is_for(locked: Running, keys: tuple[Path, Keys], route: Route) -> None:
    known = keys[1]
    strangers = (
        None,
        "Bearer wrong",
        "own",
        "Basic own",
        f"Bearer {known.expired}",
        f"Bearer {known.revoked}",
    )
    for authorization in strangers:
        assert _answer(locked, route, authorization)[0] == 401, authorization
    for mix, key in known.scoped.items():
        status, code = _answer(locked, route, f"Bearer {key}")
        is_for = bool(mix & route.scopes) or ADMIN in mix
        assert (status in (401, 403)) != is_for, (mix, status, code)
    if not ANY - route.scopes - {ADMIN}:
        return
    refused = locked.client.request(
        route.method, route.url, headers={"Authorization": f"Bearer {known.without(route.scopes)}"}
    )
    assert refused.status_code == 403
    assert all(scope in refused.text for scope in route.scopes)
    assert _answer(locked, route, "Bearer own")[0] not in (401, 403)


def test_what_is_public_is_so_with_any_key_and_none(locked: Running) -> None:
    for path in PUBLIC:
        for authorization in (None, "Bearer wrong", "Bearer own"):
            assert _answer(locked, Route("GET", path, ANY), authorization)[0] == 200


TRICKS = (
    "//v1/models",
    "/v1//models",
    "/v1/models/",
    "/V1/Models",
    "/v1/models;/health",
    "/health/../v1/models",
    "/health/%2e%2e/v1/models",
    "/%76%31/models",
    "/v1%2fmodels",
    "/v1/models%00",
    "/v1/models?/health",
    "/v1/models#/health",
    "http://localhost/v1/models",
    "http://localhost/health/../v1/models",
    "http://health/v1/models",
)


def test_no_spelling_of_a_path_and_no_host_opens_a_door(locked: Running) -> None:
    with connected(locked.url) as connection:
        for path in TRICKS:
            for host in ("localhost", "localhost/health", "localhost/health?", "localhost/health#", "health"):
                connection.sendall(request(path, method="GET", Host=host))
                status, body = read_answer(connection)
                assert status in (400, 401, 404, 421), (path, host, status)
                assert b'"data"' not in body


def test_other_methods_are_no_way_in(locked: Running) -> None:
    for route in ROUTES:
        for method in ("HEAD", "OPTIONS", "TRACE", "POST", "PUT"):
            answer = locked.client.request(method, route.url)
            assert answer.status_code in (401, 404, 405), (method, route.path)


def test_a_route_that_does_not_say_whom_it_is_for_is_refused() -> None:
    router = APIRouter()
    router.get("/open")(lambda: None)
    with pytest.raises(RuntimeError, match=r"/open.* does not say whom it is for"):
        check_declared(router.routes)


def test_what_may_be_asked_of_another_replica_again_is_what_keys_to_generate_are_for() -> None:
    """All but what sets scales or begins and ends evaluations, and a trace, for those who look for a fault."""
    for_all = {route.path for route in ROUTES if route.method == "POST" and GENERATE in route.scopes}
    has_effect = {"/lora-adapters", "/v1/evaluations", "/v1/evaluations/{evaluation_id}/cancel"}
    assert for_all - has_effect - {"/v1/mixtures/{name}/trace"} == ASKING
