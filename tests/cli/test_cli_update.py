"""`swaplora adapters pin`, `unpin`, `warm`, `share`, `rollback`, `inspect`."""

import json
from collections.abc import Iterator

import pytest

from fake_server import CARD, FakeServer, run_fake_server, swaplora

INSPECTION = {
    "object": "adapter.inspection",
    "name": "sql",
    "version": 2,
    "digest": CARD["digest"],
    "modules": [
        {
            "module": "model.layers.0.self_attn.q_proj",
            "rank": 8,
            "norm": 1.23456,
            "spectral_norm": 0.98765,
            "effective_rank": 2.5,
            "singular_values": [0.98765, 0.5, 0.25, 0.125, 0.01],
        },
        {
            "module": "lm_head",
            "rank": 1,
            "norm": 0.0,
            "spectral_norm": 0.0,
            "effective_rank": 0.0,
            "singular_values": [0.0],
        },
    ],
    "warnings": ["lm_head: B is zero [always]"],
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    with run_fake_server() as fake:
        monkeypatch.setenv("SWAPLORA_URL", fake.url)
        yield fake


def versions(current: int, *others: int) -> dict[str, object]:
    """A card with these versions, of which one is current."""
    return CARD | {"version": current, "versions": [{"version": number} for number in sorted([current, *others])]}


@pytest.mark.parametrize(
    ("command", "pinned", "said"), [("pin", True, "sql is pinned"), ("unpin", False, "sql is no longer pinned")]
)
def test_pin_and_unpin(server: FakeServer, command: str, pinned: bool, said: str) -> None:
    server.answer("PATCH", "/v1/adapters/sql", CARD | {"pinned": pinned})
    done = swaplora("adapters", command, "sql")
    assert (done.exit_code, done.stdout) == (0, f"{said}\n")
    assert server.bodies == [{"pinned": pinned}]
    assert json.loads(swaplora("adapters", command, "sql", "--json").stdout) == CARD | {"pinned": pinned}


@pytest.mark.parametrize(
    ("arguments", "shared_with", "whom"),
    [
        (["zeta", "default"], ["zeta", "default"], "zeta, default"),
        (["--public"], ["*"], "everybody"),
        (["--private"], [], "nobody"),
    ],
)
def test_share(server: FakeServer, arguments: list[str], shared_with: list[str], whom: str) -> None:
    server.answer("PATCH", "/v1/adapters/sql", CARD | {"shared_with": shared_with})
    done = swaplora("adapters", "share", "sql", *arguments)
    assert (done.exit_code, done.stdout) == (0, f"sql is shared with {whom}\n")
    assert server.bodies == [{"shared_with": shared_with}]
    assert json.loads(swaplora("adapters", "share", "sql", *arguments, "--json").stdout)["shared_with"] == shared_with


@pytest.mark.parametrize("arguments", [[], ["zeta", "--public"], ["--public", "--private"], ["zeta", "--private"]])
def test_share_wants_to_know_with_whom(server: FakeServer, arguments: list[str]) -> None:
    done = swaplora("adapters", "share", "sql", *arguments)
    assert (done.exit_code, server.calls) == (2, [])
    assert "--public or --private" in done.stderr


def test_warm_of_a_version(server: FakeServer) -> None:
    server.answer("POST", "/v1/adapters/sql%402/warm", CARD)
    done = swaplora("adapters", "warm", "sql@2")
    assert (done.exit_code, done.stdout) == (0, "sql@2 is in memory\n")
    assert json.loads(swaplora("adapters", "warm", "sql@2", "--json").stdout) == CARD


def test_warm_that_finds_no_room_says_so(server: FakeServer) -> None:
    server.refuse("POST", "/v1/adapters/sql/warm", 507, "every resident adapter is in use", "memory_full")
    done = swaplora("adapters", "warm", "sql")
    assert (done.exit_code, done.stderr) == (1, "swaplora: every resident adapter is in use (memory_full)\n")


@pytest.mark.parametrize(("current", "others", "before"), [(2, [1], 1), (12, [3, 9, 10, 13], 10)])
def test_rollback_goes_to_the_version_before(server: FakeServer, current: int, others: list[int], before: int) -> None:
    server.answer("GET", "/v1/adapters/sql", versions(current, *others))
    server.answer("PATCH", "/v1/adapters/sql", versions(before, current))
    done = swaplora("adapters", "rollback", "sql")
    assert (done.exit_code, done.stdout) == (0, f"sql stands for sql@{before} now (abababababab)\n")
    assert server.bodies == [{"current": before}]


def test_rollback_to_a_version_asks_for_no_other(server: FakeServer) -> None:
    server.answer("PATCH", "/v1/adapters/sql", versions(3, 4))
    done = swaplora("adapters", "rollback", "sql", "--to", "3", "--json")
    assert (done.exit_code, json.loads(done.stdout)) == (0, versions(3, 4))
    assert [(call.method, json.loads(call.body)) for call in server.calls] == [("PATCH", {"current": 3})]


def test_rollback_of_the_first_version_is_one_line(server: FakeServer) -> None:
    server.answer("GET", "/v1/adapters/sql", versions(3, 4))
    done = swaplora("adapters", "rollback", "sql")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("swaplora: sql has no version before 3: choose another with --to")
    assert done.stderr.count("\n") == 1
    assert [call.method for call in server.calls] == ["GET"]


def test_inspect_shows_every_module_and_warning(server: FakeServer) -> None:
    server.answer("GET", "/v1/adapters/sql%402/inspect", INSPECTION)
    lines = swaplora("adapters", "inspect", "sql@2").output.splitlines()
    assert lines[0] == "sql@2 (abababababab)"
    assert lines[-1] == "warning: lm_head: B is zero [always]"
    assert [line.split() for line in lines[2:-1]] == [
        ["model.layers.0.self_attn.q_proj", "8", "1.23", "0.988", "2.5", "0.988", "0.5", "0.25", "0.125", "…"],
        ["lm_head", "1", "0", "0", "0", "0"],
    ]


def test_inspect_gives_scripts_all_of_it(server: FakeServer) -> None:
    server.answer("GET", "/v1/adapters/sql/inspect", INSPECTION)
    assert json.loads(swaplora("adapters", "inspect", "sql", "--json").output) == INSPECTION
