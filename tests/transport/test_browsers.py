"""What a page in a browser may ask: nothing of a keyless server that is not this machine's own, or was not let in."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raw_http import connected, read_to_end, request
from serving import BASE, Running, serving, settings
from swaplora_server.http.transport.browsers import EXPOSED_HEADERS, is_own_host
from swaplora_server.http.transport.heads import MAX_HEAD_BYTES

EVIL = "https://evil.example"
LISTED = "https://app.example"
FORM_TYPES = [
    "text/plain;charset=UTF-8",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "json",
]
WANTED = {"model": BASE, "prompt": "a", "max_tokens": 1}
PREFLIGHT = {
    "Access-Control-Request-Method": "DELETE",
    "Access-Control-Request-Headers": "authorization,x-stainless-os",
}


@pytest.fixture(scope="module")
def stocked(server: Running, adapters: list[Path]) -> Running:
    """A keyless server on loopback, with an adapter."""
    server.put("sql", adapters[0])
    return server


@pytest.fixture(scope="module")
def locked(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with a key, whose operator lets one origin ask."""
    config = settings(base, tmp_path_factory.mktemp("data"), api_key=("key",), cors_allow_origin=(LISTED,))
    with serving(config) as running:
        yield running


def requests(server: Running) -> Iterator[tuple[str, str]]:
    """Method and path of every operation."""
    paths = server.client.get("/openapi.json").json()["paths"]
    for path, operations in paths.items():
        for method in operations:
            yield method.upper(), path.format(name="sql", model="sql", alias="x", key_id="x", evaluation_id="x")


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


@pytest.mark.parametrize("origin", [EVIL, "null", "http://127.0.0.1.evil.example", "http://localhost.evil.example:80"])
def test_a_page_of_another_site_can_do_nothing(stocked: Running, origin: str) -> None:
    for method, path in requests(stocked):
        answer = stocked.client.request(method, path, json={"lora_name": "sql"}, headers={"Origin": origin})
        assert code(answer) == (403, "origin_not_allowed"), (method, path)
        assert "access-control-allow-origin" not in answer.headers
    assert stocked.client.get("/v1/adapters/sql").json()["version"] == 1


def test_what_a_page_loads_without_an_origin_is_refused_and_a_link_is_followed(stocked: Running) -> None:
    headers = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors", "Sec-Fetch-Dest": "image"}
    assert code(stocked.client.get("/v1/adapters/sql/inspect", headers=headers)) == (403, "origin_not_allowed")
    headers |= {"Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert stocked.client.get("/health", headers=headers).status_code == 200


@pytest.mark.parametrize(
    "origin", ["http://localhost:5173", "http://127.0.0.1:3000", "http://[::1]:8080", "https://localhost", "own"]
)
def test_this_machines_own_pages_may_ask_a_server_on_loopback(stocked: Running, origin: str) -> None:
    headers = {"Origin": stocked.url if origin == "own" else origin}
    answer = stocked.client.post("/v1/completions", json=WANTED, headers=headers)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == headers["Origin"]
    assert answer.headers["access-control-expose-headers"] == ", ".join(EXPOSED_HEADERS)
    missing = stocked.client.get("/v1/adapters/nobody", headers=headers)
    assert missing.headers["access-control-allow-origin"] == headers["Origin"]  # an error can be read, too
    preflight = stocked.client.options("/v1/adapters/sql", headers=headers | PREFLIGHT)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == headers["Origin"]
    assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("Content-Length: 3", 400),
        ("Transfer-Encoding: gzip", 400),
        ("X-Long: " + "a" * MAX_HEAD_BYTES, 431),
    ],
)
@pytest.mark.parametrize("origin", ["http://localhost:5173", EVIL])
def test_a_refusal_that_comes_before_all_routes_can_be_read_by_whom_it_is_for(
    stocked: Running, head: str, status: int, origin: str
) -> None:
    whole = request("/v1/completions", WANTED, Origin=origin)
    with connected(stocked.url) as connection:
        connection.sendall(whole.replace(b"\r\n\r\n", f"\r\n{head}\r\n\r\n".encode(), 1))
        told = read_to_end(connection).partition(b"\r\n\r\n")[0].decode().lower().split("\r\n")
    assert told[0].startswith(f"http/1.1 {status} ")
    shared = [
        f"access-control-allow-origin: {origin}",
        "vary: origin",
        f"access-control-expose-headers: {', '.join(EXPOSED_HEADERS)}",
    ]
    assert [line in told for line in shared] == [origin != EVIL] * 3


def test_a_refused_host_is_told_to_a_page_that_may_ask(stocked: Running) -> None:
    headers = {"Host": "evil.example", "Origin": "http://localhost:5173"}
    answer = stocked.client.get("/health", headers=headers)
    assert code(answer) == (421, "host_not_allowed")
    assert answer.headers["access-control-allow-origin"] == headers["Origin"]


def test_a_preflight_of_another_site_is_not_granted(stocked: Running) -> None:
    answer = stocked.client.options("/v1/adapters/sql", headers={"Origin": EVIL} | PREFLIGHT)
    assert answer.status_code == 400
    assert "access-control-allow-origin" not in answer.headers


def test_an_origin_that_is_let_in_may_ask_with_the_key_and_preflights_need_none(locked: Running) -> None:
    headers = {"Origin": LISTED}
    assert locked.client.options("/v1/completions", headers=headers | PREFLIGHT).status_code == 200
    assert code(locked.client.post("/v1/completions", json=WANTED, headers=headers)) == (401, "invalid_api_key")
    keyed = headers | {"Authorization": "Bearer key"}
    answer = locked.client.post("/v1/completions", json=WANTED, headers=keyed)
    assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, LISTED)
    answer = locked.client.post("/v1/completions", json=WANTED, headers=keyed | {"Origin": EVIL})
    assert code(answer) == (403, "origin_not_allowed")


def test_a_form_is_no_json(stocked: Running) -> None:
    """A page may send these types anywhere without asking first."""
    for method, path in requests(stocked):
        if method == "POST" and not path.endswith(("/warm", "/cancel")):
            for content_type in FORM_TYPES:
                headers = {"Content-Type": content_type}
                answer = stocked.client.post(path, content=json.dumps(WANTED), headers=headers)
                assert (answer.status_code, path) == (415, path)
                assert "Content-Type: application/json" in answer.text


@pytest.mark.parametrize("content_type", ["application/json", "application/vnd.api+json; charset=utf-8", None])
def test_json_is_read_and_what_has_no_type_as_well(stocked: Running, content_type: str | None) -> None:
    headers = {} if content_type is None else {"Content-Type": content_type}
    assert stocked.client.post("/v1/completions", content=json.dumps(WANTED), headers=headers).status_code == 200


def test_a_name_that_dns_can_be_made_to_lead_here_is_not_answered(stocked: Running) -> None:
    for method, path in requests(stocked):
        answer = stocked.client.request(method, path, headers={"Host": "evil.example:8000"})
        assert code(answer) == (421, "host_not_allowed"), (method, path)
    page = {"Host": "evil.example:8000", "Origin": "http://evil.example:8000"}
    assert code(stocked.client.get("/v1/models", headers=page)) == (421, "host_not_allowed")


@pytest.mark.parametrize("host", ["localhost:8000", "127.0.0.1", "[::1]:8000", "10.1.2.3:8000", "app.localhost", "x"])
def test_addresses_and_names_of_no_site_are_answered(stocked: Running, host: str) -> None:
    assert stocked.client.get("/health", headers={"Host": host}).status_code == 200


def test_with_a_key_any_host_will_do_unless_hosts_are_listed(locked: Running, base: Path, tmp_path: Path) -> None:
    assert locked.client.get("/health", headers={"Host": "any.example"}).status_code == 200
    config = settings(base, tmp_path, api_key=("key",), allowed_host=("api.example", "*.inside.example"))
    with serving(config) as listed:
        for host, status in [
            ("api.example", 200),
            ("API.example:80", 200),
            ("a.inside.example", 200),
            ("any.example", 421),
        ]:
            assert listed.client.get("/health", headers={"Host": host}).status_code == status


def test_no_answer_leads_to_the_host_that_was_named(locked: Running) -> None:
    for path in ("/health/", "/v1/chat/completions/", "//evil.example/health"):
        answer = locked.client.get(f"{locked.url}{path}", headers={"Host": "evil.example"})
        assert answer.status_code == 404
        assert "location" not in answer.headers


PORTS = st.sampled_from(["", ":80", ":8000"])
LABELS = st.text("abcdefghijklmnopqrstuvwxyz0123456789-", min_size=1, max_size=8)


@given(st.ip_addresses(v=4).map(str) | st.ip_addresses(v=6).map(lambda address: f"[{address}]"), PORTS)
def test_every_address_is_our_own(address: str, port: str) -> None:
    assert is_own_host(address + port, ())


@given(st.lists(LABELS, min_size=1, max_size=3), PORTS)
def test_a_name_below_a_public_domain_is_not(labels: list[str], port: str) -> None:
    name = ".".join([*labels, "example"])
    assert not is_own_host(name + port, ())
    assert not is_own_host(name + "." + port, ("localhost", "127.0.0.1"))
    assert is_own_host(name + port, (name,))


@given(st.text(max_size=12))
def test_no_text_makes_the_check_fail(host: str) -> None:
    is_own_host(host, ("a.example",))
