"""`swaplora adapters`: what is sent, what is shown, what a refusal looks like."""

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from fake_server import CARD, FakeServer, run_fake_server, swaplora


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    with run_fake_server() as fake:
        monkeypatch.setenv("SWAPLORA_URL", fake.url)
        yield fake


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights" * 50_000)
    return tmp_path


def test_list_shows_every_page(server: FakeServer) -> None:
    other = CARD | {"name": "poet", "bytes": 3 * 2**20, "pinned": True}
    server.answer("GET", "/v1/adapters", {"data": [CARD], "has_more": True})
    server.answer("GET", "/v1/adapters?after=sql", {"data": [other], "has_more": False})
    lines = swaplora("adapters", "list").output.splitlines()
    assert lines[0].split() == ["name", "version", "state", "pinned", "rank", "size", "running", "digest"]
    assert lines[1].split() == ["sql", "2", "resident", "-", "8", "1.5", "KiB", "3", "abababababab"]
    assert lines[2].split()[:4] == ["poet", "2", "resident", "yes"]
    assert len(lines) == 3
    assert json.loads(swaplora("adapters", "list", "--json").output) == [CARD, other]


def test_a_long_name_is_shown_whole_on_one_line(server: FakeServer) -> None:
    server.answer("GET", "/v1/adapters", {"data": [CARD | {"name": "n" * 128}]})
    lines = swaplora("adapters", "list").output.splitlines()
    assert len(lines) == 2
    assert lines[1].split()[0] == "n" * 128


def test_get_shows_the_card(server: FakeServer) -> None:
    server.answer("GET", "/v1/adapters/sql", CARD)
    shown = dict(line.split(maxsplit=1) for line in swaplora("adapters", "get", "sql").output.splitlines())
    assert shown["version"].strip() == "2"
    assert shown["bytes"].strip() == "1.5 KiB"
    assert shown["pinned"].strip() == "false"
    assert shown["last_failure"].strip() == "null"
    assert json.loads(swaplora("adapters", "get", "sql", "--json").output) == CARD


def test_a_failure_is_shown_with_its_time_and_reason(server: FakeServer) -> None:
    at = datetime(2026, 5, 4, 3, 2, 1)
    card = CARD | {"last_failure": {"at": at.timestamp() + 0.25, "reason": "lora_A is missing [x]"}}
    server.answer("GET", "/v1/adapters", {"data": [card]})
    server.answer("GET", "/v1/adapters/sql", card)
    lines = swaplora("adapters", "list").output.splitlines()
    assert lines[2:] == ["sql failed at 2026-05-04 03:02:01: lora_A is missing [x]"]
    assert "2026-05-04 03:02:01: lora_A is missing [x]" in swaplora("adapters", "get", "sql").output


def test_put_sends_both_files_and_says_what_was_stored(server: FakeServer, folder: Path) -> None:
    server.answer("PUT", "/v1/adapters/sql", CARD, 201)
    done = swaplora("adapters", "put", "sql", str(folder), "--if-match", "sha256:00", "--api-key", "secret")
    assert (done.exit_code, done.stdout) == (0, "sql@2 is stored (abababababab)\n")
    (call,) = server.calls
    assert call.headers["authorization"] == "Bearer secret"
    assert call.headers["if-match"] == '"sha256:00"'
    assert "if-none-match" not in call.headers
    config, weights = call.body.split(b"\r\n--")[:2]
    assert b'name="config"' in config
    assert config.endswith(b'{"r": 8}')
    assert b'name="weights"' in weights
    assert weights.endswith(b"\r\n\r\n" + b"weights" * 50_000)


def test_put_can_refuse_to_replace(server: FakeServer, folder: Path) -> None:
    server.refuse("PUT", "/v1/adapters/sql", 412, "sql exists", "precondition_failed")
    done = swaplora("adapters", "put", "sql", str(folder), "--create-only")
    assert (done.exit_code, done.stderr) == (1, "swaplora: sql exists (precondition_failed)\n")
    assert server.calls[0].headers["if-none-match"] == "*"


@pytest.mark.parametrize("source", ["hf://org/repo@main", "s3://bucket/sql", "file:sql"])
def test_put_has_the_server_fetch_a_source(server: FakeServer, source: str) -> None:
    server.answer("PUT", "/v1/adapters/sql", CARD, 201)
    done = swaplora("adapters", "put", "sql", source, "--create-only", "--if-match", "sha256:00")
    assert (done.exit_code, done.stdout) == (0, "sql@2 is stored (abababababab)\n")
    (call,) = server.calls
    assert call.headers["content-type"] == "application/json"
    assert (call.headers["if-none-match"], call.headers["if-match"]) == ("*", '"sha256:00"')
    assert server.bodies == [{"source": source}]


def test_put_of_a_source_of_another_kind_says_which_there_are(server: FakeServer) -> None:
    done = swaplora("adapters", "put", "sql", "gs://bucket/sql")
    assert done.exit_code == 1
    assert done.stderr.endswith("or a source that begins with hf://, s3://, file:\n")
    assert server.calls == []


def test_put_of_a_folder_that_is_no_adapter_says_what_is_missing(server: FakeServer, folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    done = swaplora("adapters", "put", "sql", str(folder))
    assert done.exit_code == 1
    assert "has no adapter_model.safetensors: give the folder that PEFT's save_pretrained wrote" in done.stderr
    assert server.calls == []


def test_delete_of_a_version(server: FakeServer) -> None:
    server.answer("DELETE", "/v1/adapters/sql?version=2&timeout=5.0", "", 204)
    done = swaplora("adapters", "delete", "sql", "--version", "2", "--timeout", "5")
    assert (done.exit_code, done.output) == (0, "sql@2 is deleted\n")


def test_delete_says_when_requests_still_run(server: FakeServer) -> None:
    server.answer("DELETE", "/v1/adapters/sql", "", 202)
    done = swaplora("adapters", "delete", "sql")
    assert (done.exit_code, done.output) == (0, "sql is deleted; requests that began before still run on it\n")


def test_a_name_cannot_leave_its_place_in_the_path(server: FakeServer) -> None:
    swaplora("adapters", "get", "../models?x#y")
    assert server.calls[0].path == "/v1/adapters/..%2Fmodels%3Fx%23y"


@pytest.mark.parametrize(
    ("status", "content", "complaint"),
    [
        (
            404,
            {"error": {"message": "no adapter sql", "code": "adapter_not_found"}},
            "no adapter sql (adapter_not_found)",
        ),
        (422, {"error": {"message": "a\n\x1b[2Jb", "code": "invalid_adapter"}}, "a [2Jb (invalid_adapter)"),
        (
            401,
            {"error": {"message": "no key", "code": "invalid_api_key"}},
            "no key (invalid_api_key): give --api-key or set SWAPLORA_API_KEY",
        ),
        (404, {"error": "what?"}, "URL/v1/adapters/sql answered 404 Not Found"),
        (502, "<html>", "URL/v1/adapters/sql answered 502 Bad Gateway"),
        (200, "<html>", "what answers at URL is not swaplora: check --url"),
    ],
)
def test_a_refusal_is_one_line_and_exit_1(server: FakeServer, status: int, content: object, complaint: str) -> None:
    server.answer("GET", "/v1/adapters/sql", content, status)
    done = swaplora("adapters", "get", "sql")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == f"swaplora: {complaint.replace('URL', server.url)}\n"


def test_no_server_says_how_to_start_one() -> None:
    done = swaplora("adapters", "list", "--url", "http://127.0.0.1:1")
    assert done.exit_code == 1
    assert done.stderr == (
        "swaplora: no server answers at http://127.0.0.1:1: start one with `swaplora serve`, or give its --url\n"
    )


def test_an_address_needs_its_scheme() -> None:
    assert "must begin with http://" in swaplora("adapters", "list", "--url", "127.0.0.1:8000").stderr


@pytest.mark.parametrize(
    "url",
    ["http://[::1", "http://127.0.0.1:port", "http://a\nb", "http://.x", f"http://{'a' * 64}.com", "http://xn--a"],
)
def test_an_address_that_is_none_is_one_line(url: str) -> None:
    done = swaplora("adapters", "list", "--url", url)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert f"swaplora: {' '.join(url.splitlines())} is not a server's address: " in done.stderr


@pytest.mark.parametrize("key", ["clé", "a\nb", "\udcff"])
def test_a_key_that_no_header_can_carry_is_one_line_that_does_not_show_it(server: FakeServer, key: str) -> None:
    done = swaplora("adapters", "list", "--api-key", key)
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("swaplora: the API key has a character in it")
    assert key not in done.stderr
    assert server.calls == []


def test_a_digest_that_no_header_can_carry_is_one_line(server: FakeServer) -> None:
    done = swaplora("adapters", "put", "sql", "hf://org/repo", "--if-match", "é")
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert done.stderr.startswith("swaplora: the digest to match has a character in it")
    assert server.calls == []


@pytest.mark.parametrize(
    "args", [("adapters", "get", "\udcff"), ("chat", "sql", "-m", "\udcff"), ("aliases", "set", "a", "\udcff")]
)
def test_an_argument_that_is_no_text_is_one_line(server: FakeServer, args: tuple[str, ...]) -> None:
    done = swaplora(*args)
    assert (done.exit_code, server.calls) == (1, [])
    assert done.stderr == "swaplora: a name or a text that was given is not valid UTF-8: type it again\n"


@pytest.mark.parametrize(("keys", "sent"), [("k1", "k1"), ("k1,k2", "k1"), (" k1 , k2", "k1")])
def test_the_first_of_the_keys_that_a_server_has_is_sent(
    server: FakeServer, monkeypatch: pytest.MonkeyPatch, keys: str, sent: str
) -> None:
    server.answer("GET", "/v1/adapters/sql", CARD)
    swaplora("adapters", "get", "sql", "--api-key", keys)
    monkeypatch.setenv("SWAPLORA_API_KEY", keys)
    swaplora("adapters", "get", "sql")
    assert [call.headers["authorization"] for call in server.calls] == [f"Bearer {sent}"] * 2


def test_json_cards_survive_unknown_fields(server: FakeServer) -> None:
    card: dict[str, Any] = {"name": "sql", "new": {"deep": [1, None]}}
    server.answer("GET", "/v1/adapters/sql", card)
    assert '{"deep": [1, null]}' in swaplora("adapters", "get", "sql").output
    server.answer("GET", "/v1/adapters", {"data": [card]})
    assert swaplora("adapters", "list").output.splitlines()[1].split() == ["sql", *"----", "0", "B", *"--"]
