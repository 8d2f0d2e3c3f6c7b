"""Who asks as one did who was refused is refused likewise, without the app, and only while that is still so."""

import asyncio
import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from raw_http import connected, read_answer, read_to_end, request
from serving import BASE, Running, serving, settings
from swaplora_adapters.files.naming import DEFAULT_TENANT
from swaplora_server.access.caller import ANYBODY
from swaplora_server.http.overload import asking_again, kept_refusals, refusal_log
from swaplora_server.http.overload.asking_again import AskingAgain
from swaplora_server.http.overload.kept_refusals import KeptRefusals
from swaplora_server.http.overload.refusal_log import RefusalLog
from swaplora_server.http.transport import protocol
from swaplora_server.http.transport.body import SMALL_BYTES
from swaplora_server.http.transport.protocol import BoundedHttpProtocol
from swaplora_server.service.adapter_mix import wanted_by
from swaplora_server.service.errors import RefusedBy, RequestError
from swaplora_server.service.tenant import TenantService

MAX_WAITING = 3
ALL = 1 + MAX_WAITING  # places
ASK = "/v1/completions"
WANTED: dict[str, Any] = {"model": BASE, "prompt": [5, 6, 7], "max_tokens": 1}
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
ROUTES: dict[str, dict[str, Any]] = {
    ASK: WANTED,
    "/v1/chat/completions": {"model": BASE} | CHAT,
    "/v1/responses": {"model": BASE, "input": "hi", "max_output_tokens": 1},
    "/v1/messages": {"model": BASE} | CHAT,
    "/v1/embeddings": {"model": BASE, "input": [5, 6, 7]},
    "/invocations": WANTED,
}
KEYS = ("acme", "beta", "slow")
NAMING = "X-Amzn-SageMaker-Adapter-Identifier"


class Clock:
    """A clock that a test moves."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


def write_keys(file: Path, *keys: str, **limits: int) -> None:
    """A file with these keys, each of a tenant of its own; `limits` are those of the key `slow`."""
    scopes = ["generate", "adapters:read", "adapters:write"]
    stored = [
        {"id": key, "tenant": key, "scopes": scopes, "sha256": hashlib.sha256(f"sk-{key}".encode()).hexdigest()}
        | ({"limits": limits} if key == "slow" else {})
        for key in keys
    ]
    file.write_text(json.dumps({"keys": stored}))
    file.chmod(0o600)


@pytest.fixture(scope="module")
def key_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def keyed(
    base: Path, adapters: list[Path], key_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Running]:
    """A server that runs one at a time and lets three wait, for three tenants, of whom acme has an adapter."""
    write_keys(key_file, *KEYS, requests_per_minute=1)
    config = settings(base, tmp_path_factory.mktemp("data"), max_num_seqs=1, max_waiting=MAX_WAITING, key_file=key_file)
    with serving(config) as running:
        running.service.meter.counts._clock = Clock()  # noqa: SLF001
        running.put("sql", adapters[0], Authorization="Bearer sk-acme").raise_for_status()
        yield running


@pytest.fixture(scope="module")
def open_to_all(base: Path, adapters: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One without keys, and with two adapters."""
    with serving(settings(base, tmp_path_factory.mktemp("data"), max_num_seqs=1, max_waiting=MAX_WAITING)) as running:
        for name, adapter in zip(("sql", "json"), adapters, strict=False):
            running.put(name, adapter).raise_for_status()
        yield running


@pytest.fixture(autouse=True)
def _all_keys(keyed: Running, key_file: Path) -> Iterator[None]:
    yield
    write_keys(key_file, *KEYS, requests_per_minute=1)
    keyed.service.keys.refresh()
    clock: Any = keyed.service.meter.counts._clock  # noqa: SLF001
    clock.now += 3600


@pytest.fixture
def app(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the requests that the app was asked to answer."""
    paths: list[str] = []
    have_answered = BoundedHttpProtocol._have_answered  # noqa: SLF001

    def noted(protocol: Any, cycle: Any, app: Any) -> None:
        paths.append(cycle.scope["path"])
        have_answered(protocol, cycle, app)

    monkeypatch.setattr(BoundedHttpProtocol, "_have_answered", noted)
    return paths


def full(server: Running, tenant: str = "acme", wanted: str = BASE, peer: str = "") -> ExitStack:
    """All places held: the tenant's, and those of the part that is for others."""
    held = ExitStack()
    for one, most in ((tenant, ALL), ("x", 1)):
        held.callback(server.service.admissions.admit(most, one, wanted, peer).release)
    return held


def one_line_full(server: Running, wanted: str, tenant: str = "acme", peer: str = "") -> ExitStack:
    """All places held by one adapter of a tenant, which has room for others."""
    held = ExitStack()
    held.callback(server.service.admissions.admit(ALL, tenant, wanted, peer).release)
    return held


def as_key(key: str, path: str = ASK, body: Any = None, **options: str) -> bytes:
    content = ROUTES.get(path) if body is None else body
    return request(path, content, **({"Authorization": f"Bearer sk-{key}"} | options))


def answer(server: Running, sent: bytes) -> tuple[list[bytes], bytes]:
    """Status line and headers, without what is of this one answer, and the body; on a connection of its own."""
    with connected(server.url) as connection:
        connection.sendall(sent.replace(b"\r\n", b"\r\nConnection: close\r\n", 1))
        head, _, body = read_to_end(connection).partition(b"\r\n\r\n")
    own = (b"x-request-id:", b"date:")
    assert sum(line.startswith(own[0]) for line in head.split(b"\r\n")) == 1
    return [line for line in head.split(b"\r\n") if not line.startswith(own)], body


def status(server: Running, sent: bytes) -> int:
    head, _ = answer(server, sent)
    return int(head[0].split()[1])


@pytest.mark.parametrize("origin", [{}, {"Origin": "http://localhost:3000"}])
@pytest.mark.parametrize("path", ROUTES)
def test_it_is_refused_as_the_app_does(keyed: Running, app: list[str], path: str, origin: dict[str, str]) -> None:
    sent = as_key("acme", path, **origin)
    with full(keyed):
        by_app = answer(keyed, sent)
        assert app == [path]
        again = answer(keyed, sent)
    assert app == [path]
    assert by_app == again
    assert by_app[0][0].split()[1] == b"429"
    assert any(line.startswith(b"retry-after: ") for line in again[0])


@pytest.mark.parametrize("path", ROUTES)
def test_so_is_what_the_body_decides(keyed: Running, app: list[str], path: str) -> None:
    sent = as_key("acme", path)
    with one_line_full(keyed, BASE):
        by_app = answer(keyed, sent)
        again = answer(keyed, sent)
        assert app == [path]
        assert by_app == again
        assert by_app[0][0].split()[1] == b"429"
        assert status(keyed, as_key("acme", path, ROUTES[path] | {"model": "sql"})) == 200
    assert status(keyed, sent) == 200


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/models", b""),
        ("POST", ASK, None),
        ("POST", "/v1/messages", None),
        ("POST", "/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "y"}),
    ],
)
def test_so_is_whose_limit_is_reached(keyed: Running, app: list[str], method: str, path: str, body: Any) -> None:
    assert status(keyed, as_key("slow", "/v1/models", b"", method="GET")) == 200
    sent = as_key("slow", path, body, method=method)
    by_app = answer(keyed, sent)
    again = answer(keyed, sent)
    assert app == ["/v1/models", path]
    assert by_app == again
    assert by_app[0][0].split()[1] == b"429"


def test_a_place_that_gets_free_is_given(keyed: Running) -> None:
    for _ in range(3):
        with full(keyed):
            assert [status(keyed, as_key("acme")) for _ in range(3)] == [429] * 3
        assert status(keyed, as_key("acme")) == 200


def test_others_and_other_routes_are_the_app_s(keyed: Running, app: list[str]) -> None:
    with one_line_full(keyed, "sql"):
        refused = as_key("acme", body=WANTED | {"model": "sql"})
        assert [status(keyed, refused), status(keyed, refused)] == [429, 429]
        del app[:]
        assert status(keyed, as_key("beta")) == 200
        assert status(keyed, as_key("nobody")) == 401
        assert status(keyed, request(ASK, WANTED)) == 401
        assert status(keyed, as_key("acme", "/v1/models", b"", method="GET")) == 200
        assert status(keyed, request("/health", method="GET")) == 200
        assert status(keyed, as_key("acme", "/tokenize", {"prompt": "x"})) == 200
        assert app == [ASK, ASK, ASK, "/v1/models", "/health", "/tokenize"]
        assert status(keyed, refused) == 429


@pytest.mark.parametrize(
    ("header", "value", "expected"), [("Content-Type", "text/plain", 415), ("Origin", "http://elsewhere.example", 403)]
)
def test_so_are_headers_that_the_app_refuses(
    keyed: Running, app: list[str], header: str, value: str, expected: int
) -> None:
    with full(keyed):
        assert [status(keyed, as_key("acme")) for _ in range(2)] == [429, 429]
        assert status(keyed, as_key("acme", **{header: value})) == expected
    assert app == [ASK, ASK]


def test_a_key_that_is_revoked_is_told_so(keyed: Running, key_file: Path) -> None:
    with full(keyed):
        assert [status(keyed, as_key("acme")) for _ in range(2)] == [429, 429]
        write_keys(key_file, "beta")
        keyed.service.keys.refresh()
        assert status(keyed, as_key("acme")) == 401


def test_what_one_key_has_reached_is_no_other_s(keyed: Running, app: list[str]) -> None:
    statuses = [status(keyed, as_key(key, "/v1/models", b"", method="GET")) for key in ("slow", "slow", "slow")]
    assert statuses == [200, 429, 429]
    assert status(keyed, as_key("acme", "/v1/models", b"", method="GET")) == 200
    assert status(keyed, as_key("nobody", "/v1/models", b"", method="GET")) == 401
    assert len(app) == 4


def test_a_limit_that_is_changed_holds_at_once(keyed: Running, key_file: Path) -> None:
    sent = as_key("slow", "/v1/models", b"", method="GET")
    assert [status(keyed, sent) for _ in range(3)] == [200, 429, 429]
    write_keys(key_file, *KEYS, requests_per_minute=2)
    keyed.service.keys.refresh()
    assert [status(keyed, sent) for _ in range(3)] == [200, 429, 429]
    clock: Any = keyed.service.meter.counts._clock  # noqa: SLF001
    clock.now += 60
    assert status(keyed, sent) == 200


def test_when_to_try_again_is_of_the_moment(keyed: Running) -> None:
    sent = as_key("slow", "/v1/models", b"", method="GET")
    assert status(keyed, sent) == 200
    clock: Any = keyed.service.meter.counts._clock  # noqa: SLF001
    for left in (60, 60, 35, 35, 2, 2):
        clock.now += {35: 25, 2: 33}.get(left, 0) if left != getattr(clock, "left", None) else 0
        clock.left = left
        head, body = answer(keyed, sent)
        assert f"retry-after: {left}".encode() in head
        assert f"try again in {left} s" in body.decode()


def test_what_is_refused_so_counts_against_the_key_s_limits(keyed: Running, key_file: Path) -> None:
    """As it does where the app refuses it."""
    write_keys(key_file, *KEYS, requests_per_minute=4)
    keyed.service.keys.refresh()
    with full(keyed, "slow"):
        codes = [json.loads(answer(keyed, as_key("slow"))[1])["error"]["code"] for _ in range(6)]
    assert codes == ["overloaded"] * 4 + ["rate_limited"] * 2


def test_it_is_counted_and_in_the_log(keyed: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[tuple[object, ...]] = []
    monkeypatch.setattr(RefusalLog, "add", lambda _log, *refused: logged.append(refused))

    def num_counted() -> float:
        labels = {"route": ASK, "status": "4xx"}
        return keyed.service.metrics.registry.get_sample_value("swaplora_requests_total", labels) or 0

    with full(keyed):
        assert status(keyed, as_key("acme")) == 429
        before = num_counted()
        del logged[:]
        assert [status(keyed, as_key("acme")) for _ in range(3)] == [429] * 3
    assert num_counted() == before + 3
    assert logged == [("POST", ASK, keyed.service.keys.find("sk-acme"), "overloaded")] * 3


def test_the_log_has_a_line_a_second_for_each_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(refusal_log, "SECONDS", 0)

    async def refuse() -> None:
        log = RefusalLog()
        for _ in range(2):
            for error in ("overloaded", "overloaded", "rate_limited"):
                log.add("POST", ASK, ANYBODY, error)
            for _ in range(2):
                await asyncio.sleep(0)

    with capture_logs() as lines:
        asyncio.run(refuse())
    assert [(line["event"], line["error"], line["count"], line["tenant"]) for line in lines] == [
        ("requests refused", "overloaded", 2, "default"),
        ("requests refused", "rate_limited", 1, "default"),
    ] * 2


def test_the_client_s_request_id_is_kept(keyed: Running) -> None:
    sent = as_key("acme", X_Request_Id="mine", Connection="close")
    with full(keyed):
        for _ in range(2):
            with connected(keyed.url) as connection:
                connection.sendall(sent)
                assert b"\r\nx-request-id: mine\r\n" in read_to_end(connection)


# What comes over a connection.


@pytest.mark.parametrize("held", [full, one_line_full])
def test_a_connection_goes_on_after_a_whole_request(keyed: Running, app: list[str], held: Any) -> None:
    options = {} if held is full else {"wanted": BASE}
    with connected(keyed.url) as connection:
        with held(keyed, **options):
            for _ in range(5):
                connection.sendall(as_key("acme"))
                assert read_answer(connection)[0] == 429
        connection.sendall(as_key("acme"))
        assert read_answer(connection)[0] == 200
    assert app == [ASK, ASK]


@pytest.mark.parametrize("held", [full, one_line_full])
def test_requests_behind_each_other_are_answered_in_order(keyed: Running, held: Any) -> None:
    health, wrong = request("/health", method="GET"), request("/nothing", method="GET")
    options = {} if held is full else {"wanted": BASE}
    with connected(keyed.url) as connection, held(keyed, **options):
        connection.sendall(as_key("acme"))
        assert read_answer(connection)[0] == 429
        connection.sendall(as_key("acme") + health + as_key("acme") + as_key("acme") + wrong + as_key("acme"))
        assert [read_answer(connection)[0] for _ in range(6)] == [429, 200, 429, 429, 404, 429]


def test_of_a_tenant_without_room_no_more_of_a_body_is_waited_for(keyed: Running, app: list[str]) -> None:
    with full(keyed):
        assert status(keyed, as_key("acme")) == 429
        with connected(keyed.url) as connection:
            sent = as_key("acme", body=b'{"model": "ba')[:-3]
            connection.sendall(sent)
            assert read_answer(connection)[0] == 429
            connection.sendall(b"   ")  # what is left of it, which is no request
            assert read_to_end(connection) == b""
    assert app == [ASK]


def test_a_body_that_decides_is_waited_for(keyed: Running, app: list[str]) -> None:
    refused, other = as_key("acme"), as_key("acme", body=WANTED | {"model": "sql"})
    with one_line_full(keyed, BASE):
        assert status(keyed, refused) == 429
        for sent, expected in ((refused, 429), (other, 200)):
            with connected(keyed.url) as connection:
                for piece in (sent[:-40], sent[-40:-3], sent[-3:]):
                    connection.sendall(piece)
                assert read_answer(connection)[0] == expected
    assert app == [ASK, ASK]


@pytest.mark.parametrize("held", [full, one_line_full])
def test_nobody_is_told_to_go_on_who_asks_first_and_has_no_room(keyed: Running, held: Any) -> None:
    options = {} if held is full else {"wanted": BASE}
    with held(keyed, **options):
        assert status(keyed, as_key("acme")) == 429
        with connected(keyed.url) as connection:
            head, _, body = as_key("acme", Expect="100-continue").partition(b"\r\n\r\n")
            connection.sendall(head + b"\r\n\r\n")
            if held is full:
                told = read_answer(connection)
            else:  # which only its body can say
                assert connection.recv(25, 0x100) == b"HTTP/1.1 100 Continue\r\n\r\n"  # MSG_WAITALL
                connection.sendall(body)
                told = read_answer(connection)
            assert told[0] == 429


@pytest.mark.parametrize("is_full", [True, False])
def test_one_that_asks_first_behind_another_is_told_at_once(keyed: Running, is_full: bool) -> None:
    with full(keyed):
        assert status(keyed, as_key("acme")) == 429
    head, _, _ = as_key("acme", Expect="100-continue").partition(b"\r\n\r\n")
    with full(keyed) if is_full else ExitStack(), connected(keyed.url) as connection:
        connection.sendall(request("/v1/models", method="GET", Authorization="Bearer sk-beta") + head + b"\r\n\r\n")
        assert read_answer(connection)[0] == 200
        told = connection.recv(1 << 16)
    assert told.startswith(b"HTTP/1.1 429" if is_full else b"HTTP/1.1 100")


def test_a_request_whose_header_says_who_answers_is_the_app_s_where_that_decides(
    keyed: Running, app: list[str]
) -> None:
    plain, named = (as_key("acme", "/invocations", **{NAMING: name} if name else {}) for name in ("", "sql"))
    with full(keyed):
        assert [status(keyed, named) for _ in range(2)] == [429, 429]
        assert len(app) == 1
    with one_line_full(keyed, "sql"):
        assert [status(keyed, named) for _ in range(2)] == [429, 429]
        assert len(app) == 3
    with one_line_full(keyed, BASE):
        assert [status(keyed, plain) for _ in range(2)] == [429, 429]
        assert status(keyed, named) == 200


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        (f"{ASK}?x=1", {}),
        ("/v1/%63ompletions", {}),
        (ASK, {"Host": "10.0.0.1:8000"}),
        (ASK, {"Host": "elsewhere.example", "Origin": "http://elsewhere.example"}),
        (ASK, {"Content-Type": "application/vnd.mine+json; x=1"}),
        (ASK, {"Content-Encoding": "identity"}),
        (ASK, {"X-Api-Key": "sk-nobody"}),
        (ASK, {"Cookie": "a=b", "User-Agent": "mine"}),
        (ASK, {"Authorization": "bearer  sk-acme "}),
        (ASK, {"Sec-Fetch-Site": "same-origin"}),
    ],
)
def test_what_makes_no_difference_is_not_looked_at(
    keyed: Running, app: list[str], path: str, headers: dict[str, str]
) -> None:
    origin = {name: "http://acme" for name in headers if name == "Origin"}  # an answer to a page has a header more
    host = {"Host": "acme"} if origin else {}
    with full(keyed):
        by_app = answer(keyed, as_key("acme", **origin, **host))
        num_asked = len(app)
        assert answer(keyed, as_key("acme", path, WANTED, **headers)) == by_app
    assert by_app[0][0].split()[1] == b"429"
    assert len(app) == num_asked


def test_where_there_are_no_keys_none_is_looked_at(open_to_all: Running, app: list[str]) -> None:
    with full(open_to_all, "", BASE, "127.0.0.1"):
        for key in ("a", "b", "c"):
            assert status(open_to_all, as_key(key)) == 429
    assert app == [ASK]


def test_a_body_is_read_where_it_decides(keyed: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[bytes] = []

    def noted(body: bytes) -> Any:
        read.append(body)
        return json.loads(body)

    with one_line_full(keyed, BASE):
        assert status(keyed, as_key("acme")) == 429
    monkeypatch.setattr(asking_again, "from_json", noted)
    with one_line_full(keyed, BASE):
        assert status(keyed, as_key("acme")) == 429
    assert len(read) == 1
    with full(keyed):
        assert status(keyed, as_key("acme")) == 429
    assert status(keyed, as_key("acme")) == 200
    assert len(read) == 1


def test_fields_that_are_null_name_nobody(keyed: Running, app: list[str]) -> None:
    with one_line_full(keyed, BASE):
        assert status(keyed, as_key("acme")) == 429
        assert status(keyed, as_key("acme", body=WANTED | {"adapters": None, "lora_path": None})) == 429
    assert app == [ASK]


def test_who_a_client_says_he_asks_for_is_believed_neither_here_nor_by_the_app(
    open_to_all: Running, app: list[str]
) -> None:
    proxied = request(ASK, WANTED, X_Forwarded_For="203.0.113.7")
    with one_line_full(open_to_all, BASE, "", "127.0.0.1"):
        assert status(open_to_all, request(ASK, WANTED)) == 429
        assert status(open_to_all, proxied) == 429
        assert status(open_to_all, request("/invocations", WANTED, X_Forwarded_For="203.0.113.7")) == 429
    assert len(app) == 2
    with one_line_full(open_to_all, BASE, "", "203.0.113.7"):
        assert status(open_to_all, proxied) == 200


@pytest.mark.parametrize("is_kept", [True, False])
def test_what_follows_the_answer_is_read_slowly(keyed: Running, monkeypatch: pytest.MonkeyPatch, is_kept: bool) -> None:
    """Here not before an hour has passed."""
    monkeypatch.setattr(protocol, "LEFT_SECONDS", 3600)
    with full(keyed):
        assert status(keyed, as_key("acme")) == 429
        if not is_kept:
            monkeypatch.setattr(KeptRefusals, "find", lambda _kept, _scope: None)
        with connected(keyed.url) as connection:
            connection.sendall(as_key("acme", Content_Length=str(1 << 40)))
            assert read_answer(connection)[0] == 429
            connection.settimeout(1)
            with pytest.raises(TimeoutError):
                connection.sendall(bytes(64 << 20))  # more than systems hold between the two


def test_what_is_kept_shows_no_key(keyed: Running) -> None:
    asking = AskingAgain(keyed.service, ASK, "sk-acme", ANYBODY, False)
    assert "sk-acme" not in repr(asking)


def test_a_client_that_goes_before_it_is_decided_leaves_nothing(keyed: Running) -> None:
    with one_line_full(keyed, BASE):
        assert status(keyed, as_key("acme")) == 429
        for _ in range(3):
            with connected(keyed.url) as connection:
                connection.sendall(as_key("acme")[:-5])
        assert status(keyed, as_key("acme")) == 429


@pytest.mark.parametrize(
    "body",
    [
        WANTED | {"user": "x" * SMALL_BYTES},
        {"prompt": [5, 6, 7]},
        WANTED | {"adapters": [{"name": "sql", "scale": 0.5}]},
        WANTED | {"lora_path": "sql"},
        b"{",
        b"[]",
    ],
)
def test_bodies_that_do_not_say_plainly_who_is_to_answer_are_the_app_s(
    keyed: Running, app: list[str], body: Any
) -> None:
    with one_line_full(keyed, BASE):
        assert status(keyed, as_key("acme")) == 429
        status(keyed, as_key("acme", body=body))
        assert app == [ASK, ASK]


def test_what_is_kept_is_bounded(keyed: Running, app: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_refusals, "MAX_KEPT", 2)

    def num_by_app(*names: str) -> int:
        del app[:]
        for name in names:
            assert status(keyed, as_key("slow", f"/v1/adapters/{name}", b"", method="GET")) == 429
        return len(app)

    assert status(keyed, as_key("slow", "/v1/models", b"", method="GET")) == 200
    assert num_by_app("a", "b", "c", "b", "c", "a") == 4
    assert num_by_app(*["x" * kept_refusals.MAX_KIND_CHARS] * 2) == 2


# That it decides as the app does.

MODELS = (BASE, "sql", "json", "sql@1", "nothing", f"{BASE}:sql", "none of that", "")
PEERS = ("127.0.0.1", "10.0.0.1", "2001:db8::1", "2001:db8::2", "2001:db8:0:1::1", "")


def would_be(service: TenantService, model: str) -> str | None:
    """What the app refuses a request for one sequence with."""
    try:
        service.check_room()
        service.admissions.admit(1, service.tenant, wanted_by(service, model, ()), service.peer).release(has_run=False)
    except RequestError as error:
        return str(error)
    return None


@given(data=st.data())
def test_nobody_is_refused_who_would_be_let_in_and_nobody_let_off(open_to_all: Running, data: st.DataObject) -> None:
    service = open_to_all.service
    asking = AskingAgain(service, ASK, None, ANYBODY, is_change=False)
    assert ANYBODY.tenant == DEFAULT_TENANT
    held: list[Any] = []
    try:
        for _ in range(data.draw(st.integers(1, 12))):
            peer, model = data.draw(st.sampled_from(PEERS)), data.draw(st.sampled_from(MODELS[:-1]))
            whose = TenantService(service, ANYBODY, "", peer)
            ends: bool = data.draw(st.booleans())
            if held and ends:
                held.pop(data.draw(st.integers(0, len(held) - 1))).release()
            else:
                with suppress(RequestError):
                    held.append(service.admissions.admit(1, "", wanted_by(whose, model, ()), peer))
            peer, model = data.draw(st.sampled_from(PEERS)), data.draw(st.sampled_from(MODELS))
            body = json.dumps({"prompt": "x", "model": model}).encode()
            error = asking.error(RefusedBy.NAMED, peer, body)
            whose = TenantService(service, ANYBODY, "", peer)
            if model:
                assert (error and str(error)) == would_be(whose, model)
            if error is not None and error.by is RefusedBy.TENANT:
                assert asking.error(RefusedBy.TENANT, peer, None) is not None
                with pytest.raises(RequestError):
                    whose.check_room()
    finally:
        for admission in held:
            admission.release()
