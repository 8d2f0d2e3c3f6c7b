"""Keys: what a file of them may hold, who is found by one, and what the commands do to it."""

import json
import stat
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fake_server import swaplora
from serving import serving, settings
from swaplora_server.access.caller import ANYBODY, KeyScope
from swaplora_server.access.key_file import KeyFile, KeyFileError, create_key, digest_of, read_keys, revoke_key
from swaplora_server.access.key_ring import KeyRing
from swaplora_server.config import Settings
from swaplora_server.serve import StartError, run

GENERATE, READ, WRITE, _, ADMIN = KeyScope
HASH = "ab" * 32


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.yaml"


def test_without_keys_everybody_may_everything() -> None:
    ring = KeyRing([])
    assert ring.is_open
    assert ring.find(None) is ring.find("anything") is ANYBODY
    assert ANYBODY.may([WRITE])


def test_a_setting_is_an_administrators_of_the_default_tenant() -> None:
    ring = KeyRing(["one", "two"])
    found = ring.find("two")
    assert found is not None
    assert (found.key_id, found.tenant, found.scopes) == ("setting-2", "default", frozenset({ADMIN}))
    assert [ring.find(key) for key in (None, "", "three", "one ", "One")] == [None] * 5


def test_an_empty_file_lets_nobody_in(file: Path) -> None:
    file.write_text("")
    assert not KeyRing([], file).is_open
    assert KeyRing([], file).find(None) is None


def test_a_key_of_a_file_is_found_by_nothing_but_itself(file: Path) -> None:
    key, stored = create_key(file, "acme", (GENERATE, WRITE))
    ring = KeyRing(["own"], file)
    found = ring.find(key)
    assert found is not None
    assert (found.key_id, found.tenant, found.scopes) == (stored.id, "acme", frozenset({GENERATE, WRITE}))
    assert [found.may([scope]) for scope in KeyScope] == [True, False, True, False, False]
    assert found.may([READ, WRITE])
    assert [ring.find(wrong) for wrong in (stored.sha256, stored.id, key[:-1], key + "=", "\udc80")] == [None] * 5


def test_neither_a_file_nor_what_is_told_of_it_has_the_key(file: Path) -> None:
    key, stored = create_key(file, "acme", (GENERATE,))
    assert key.removeprefix("sk-") not in file.read_text()
    assert stored.sha256 == digest_of(key)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_a_key_expires(file: Path) -> None:
    now = datetime.now(UTC)
    late, _ = create_key(file, "acme", (GENERATE,), now - timedelta(seconds=1))
    early, _ = create_key(file, "acme", (GENERATE,), now + timedelta(days=1))
    ring = KeyRing([], file)
    assert ring.find(late) is None
    assert ring.find(early) is not None


def test_a_file_that_changes_is_read_again_and_a_bad_one_changes_nothing(file: Path) -> None:
    key, _ = create_key(file, "acme", (GENERATE,))
    complaints: list[str] = []
    ring = KeyRing([], file, complaints.append)
    another, _ = create_key(file, "acme", (GENERATE,))
    assert ring.find(another) is None
    ring.refresh()
    assert ring.find(another) is not None
    for bad in ("keys: [", "keys: 7", json.dumps({"keys": [{"id": "x", "sha256": HASH}]})):
        file.write_text(bad)
        ring.refresh()
        ring.refresh()
        assert ring.find(key) is not None
    file.unlink()
    ring.refresh()
    assert ring.find(key) is not None
    assert len(complaints) == 4  # once each
    assert all(str(file) in complaint and HASH not in complaint for complaint in complaints)
    create_key(file, "acme", (GENERATE,))
    ring.refresh()
    assert ring.find(key) is None


def test_a_thread_looks_after_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swaplora_server.access.key_ring.LOOK_SECONDS", 0.01)
    key, stored = create_key(file, "acme", (GENERATE,))
    ring = KeyRing([], file)
    ring.start()
    try:
        revoke_key(file, stored.id)
        deadline = time.monotonic() + 60
        while ring.find(key) is not None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        ring.stop()


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ({"scopes": ["generate"], "sha256": HASH}, "keys.0.id"),
        ({"id": "a b", "scopes": ["generate"], "sha256": HASH}, "keys.0.id"),
        ({"id": "a", "scopes": [], "sha256": HASH}, "keys.0.scopes"),
        ({"id": "a", "scopes": ["everything"], "sha256": HASH}, "keys.0.scopes"),
        ({"id": "a", "scopes": ["generate"], "sha256": HASH[1:]}, "keys.0.sha256"),
        ({"id": "a", "scopes": ["generate"], "sha256": HASH, "tenant": "A/B"}, "keys.0.tenant"),
        ({"id": "a", "scopes": ["generate"], "sha256": HASH, "tenant": ""}, "keys.0.tenant"),
        ({"id": "a", "scopes": ["generate"], "sha256": HASH, "expires": "2030-01-01T00:00:00"}, "keys.0.expires"),
        ({"id": "a", "scopes": ["generate"], "sha256": HASH, "expire": "2030-01-01T00:00:00Z"}, "keys.0.expire"),
        ({"id": "a", "scopes": ["generate"], "key": "secret"}, "keys.0.sha256"),
    ],
)
def test_a_file_that_says_something_else_is_refused_without_its_values(
    file: Path, key: dict[str, object], told: str
) -> None:
    file.write_text(yaml.safe_dump({"keys": [key]}))
    with pytest.raises(KeyFileError, match=told) as refused:
        KeyRing([], file)
    assert HASH not in str(refused.value)
    assert "secret" not in str(refused.value)


def test_two_keys_of_one_id_or_one_hash_are_refused(file: Path) -> None:
    one = {"id": "a", "scopes": ["generate"], "sha256": HASH}
    for other, told in ((one | {"id": "b"}, "sha256"), (one | {"sha256": HASH[2:] + "00"}, "id")):
        file.write_text(json.dumps({"keys": [one, other]}))
        with pytest.raises(KeyFileError, match=f"the same {told}"):
            read_keys(file)


@hypothesis.settings(max_examples=30)
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_any_bytes_are_a_file_of_keys_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    file = tmp_path_factory.getbasetemp() / "any-keys"
    file.write_bytes(content)
    try:
        assert read_keys(file).keys == ()
    except KeyFileError as error:
        assert len(str(error)) < 1000  # noqa: PT017 - either of the two may happen


def test_a_server_does_not_start_with_a_bad_file(file: Path, tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"cannot read the key file .*No such file"):
        run(Settings(key_file=file, data_dir=tmp_path, host="0.0.0.0", port=0))
    file.write_text("[")
    with pytest.raises(StartError, match="neither JSON nor YAML"):
        run(Settings(key_file=file, data_dir=tmp_path))


def test_an_address_that_others_reach_wants_keys() -> None:
    with pytest.raises(ValidationError, match="--key-file"):
        Settings(host="0.0.0.0")
    with pytest.raises(ValidationError, match="--key-file"):
        Settings(cors_allow_origin=("*",))


def test_the_commands_make_list_and_revoke(file: Path) -> None:
    where = ("--key-file", str(file))
    made = swaplora("keys", "create", *where, "--tenant", "acme", "--scope", "generate", "--days", "3", "--json")
    shown = json.loads(made.stdout)
    key = shown.pop("key")
    assert shown == {"id": shown["id"], "tenant": "acme", "scopes": ["generate"], "expires": shown["expires"]}
    plain = swaplora("keys", "create", *where).stdout.strip()
    ring = KeyRing([], file)
    assert [found and found.tenant for found in map(ring.find, (key, plain))] == ["acme", "default"]
    listed = swaplora("keys", "list", *where).stdout
    assert [line.split()[1:3] for line in listed.splitlines()[1:]] == [["acme", "generate"], ["default", "generate"]]
    assert key not in listed
    assert json.loads(swaplora("keys", "list", *where, "--json").stdout)[0] == shown
    assert swaplora("keys", "revoke", shown["id"], *where).stdout == f"{shown['id']} is revoked\n"
    again = swaplora("keys", "revoke", shown["id"], *where)
    assert (again.exit_code, again.stderr) == (1, f"swaplora: the key file {file} has no key {shown['id']}\n")
    ring.refresh()
    assert [found and found.tenant for found in map(ring.find, (key, plain))] == [None, "default"]


@pytest.mark.parametrize(
    ("arguments", "code"), [(["create", "--tenant", "A"], 2), (["create", "--scope", "all"], 2), (["list"], 1)]
)
def test_a_command_that_cannot_be_says_so_and_changes_nothing(file: Path, arguments: list[str], code: int) -> None:
    assert swaplora("keys", *arguments, "--key-file", str(file)).exit_code == code
    assert not file.exists()


def test_a_bad_file_is_not_written_over(file: Path) -> None:
    file.write_text("mine: all mine")
    assert swaplora("keys", "create", "--key-file", str(file)).exit_code == 1
    assert file.read_text() == "mine: all mine"


def test_commands_at_once_lose_no_key(file: Path) -> None:
    threads = [threading.Thread(target=create_key, args=(file, f"t{n}", (GENERATE,))) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(key.tenant for key in read_keys(file).keys) == [f"t{n}" for n in range(8)]
    assert sorted(path.name for path in file.parent.iterdir()) == [".keys.yaml.lock", "keys.yaml"]


def test_an_administrator_makes_and_revokes_keys(
    base: Path, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each holds from its answer on, not from the next look at the file on."""
    monkeypatch.setattr("swaplora_server.access.key_ring.LOOK_SECONDS", 600)
    _, other = create_key(file, "zeta", (GENERATE,))
    noted = tmp_path / "audit"
    config = settings(base, tmp_path / "data", api_key=("own",), key_file=file, audit_log=noted)
    with serving(config) as server:
        client = server.client
        own = {"Authorization": "Bearer own"}
        made = client.post("/v1/keys", json={"tenant": "acme", "scopes": ["adapters:read"], "days": 1}, headers=own)
        assert (made.status_code, made.headers["cache-control"]) == (201, "no-store")
        key, key_id = made.json()["key"], made.json()["id"]
        with_key = {"Authorization": f"Bearer {key}"}
        assert client.get("/v1/adapters", headers=with_key).status_code == 200
        assert client.get("/v1/keys", headers=with_key).json()["error"]["code"] == "insufficient_scope"
        listed = client.get("/v1/keys", headers=own)
        assert [(one["id"], one["tenant"]) for one in listed.json()["data"]] == [(other.id, "zeta"), (key_id, "acme")]
        assert "expires" in listed.json()["data"][1]
        assert key not in listed.text
        assert digest_of(key) not in listed.text
        assert client.delete(f"/v1/keys/{key_id}", headers=own).status_code == 200
        assert client.get("/v1/adapters", headers=with_key).status_code == 401
        assert client.delete(f"/v1/keys/{key_id}", headers=own).json()["error"]["code"] == "not_found"
        refusals: list[dict[str, Any]] = [
            {"tenant": "A b"},
            {"scopes": []},
            {"scopes": ["all"]},
            {"days": 0},
            {"day": 1},
        ]
        for wrong in refusals:
            refused = client.post("/v1/keys", json=wrong, headers=own).json()["error"]
            assert (refused["code"], refused["param"].partition("[")[0]) == ("invalid_request", *wrong)
        file.write_text("keys: 1")
        broken = client.post("/v1/keys", json={}, headers=own)
        assert (broken.status_code, broken.json()["error"]["code"]) == (507, "storage_failed")
        assert str(tmp_path) not in broken.text
        file.unlink()
        away = client.post("/v1/keys", json={}, headers=own)
        assert (away.status_code, away.json()["error"]["code"]) == (507, "storage_failed")
        assert not file.exists()  # or the next look at it would shut out who has another key
    told = [json.loads(line) for line in noted.read_text().splitlines()]
    assert [(line["key"], line["change"], line["name"]) for line in told] == [
        ("setting-1", "key.create", key_id),
        ("setting-1", "key.revoke", key_id),
    ]
    assert key not in noted.read_text()


def test_what_was_read_before_a_revocation_is_not_taken_after_it(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, stored = create_key(file, "acme", (GENERATE,))
    ring = KeyRing([], file)
    create_key(file, "acme", (GENERATE,))
    has_read, goes_on = threading.Event(), threading.Event()

    def slowly(path: Path) -> KeyFile:
        found = read_keys(path)
        if not has_read.is_set():
            has_read.set()
            assert goes_on.wait(60)
        return found

    monkeypatch.setattr("swaplora_server.access.key_ring.read_keys", slowly)
    looking = threading.Thread(target=ring.refresh)
    revoking = threading.Thread(target=ring.revoke, args=(stored.id,))
    looking.start()
    assert has_read.wait(60)
    revoking.start()
    revoking.join(0.1)  # it would be done, were there no order between the two
    goes_on.set()
    for thread in (looking, revoking):
        thread.join(60)
    assert ring.find(key) is None


def test_a_link_is_followed_to_the_file(file: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.yaml"
    link.symlink_to(file)
    create_key(link, "acme", (GENERATE,))
    assert link.is_symlink()
    assert len(read_keys(file).keys) == 1
