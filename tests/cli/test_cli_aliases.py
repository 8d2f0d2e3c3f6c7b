"""`swaplora aliases`: what is sent, what is shown."""

import json
from collections.abc import Iterator
from typing import Any

import pytest

from fake_server import FakeServer, run_fake_server, swaplora

PROD = {"object": "alias", "alias": "prod", "targets": [{"target": "sql@2", "weight": 1}]}
SPLIT = {
    "object": "alias",
    "alias": "ab",
    "targets": [{"target": "sql@2", "weight": 90}, {"target": "sql@3", "weight": 10}],
}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    with run_fake_server() as fake:
        monkeypatch.setenv("SWAPLORA_URL", fake.url)
        yield fake


def test_list_shows_targets_as_set_takes_them(server: FakeServer) -> None:
    server.answer("GET", "/v1/aliases", {"object": "list", "data": [PROD, SPLIT]})
    rows = [line.split() for line in swaplora("aliases", "list").output.splitlines()]
    assert rows == [["alias", "targets", "canary"], ["prod", "sql@2", "-"], ["ab", "sql@2=90", "sql@3=10", "-"]]
    assert json.loads(swaplora("aliases", "list", "--json").output) == [PROD, SPLIT]


@pytest.mark.parametrize(
    ("stepped", "shown"),
    [
        ({"stepped_back": None, "reason": None}, "sql@3"),
        ({"stepped_back": 5.0, "reason": "9 of 20"}, "sql@3 stepped back: 9 of 20"),
    ],
)
def test_list_shows_a_canary_and_why_it_stepped_back(server: FakeServer, stepped: dict[str, Any], shown: str) -> None:
    canary = {"target": "sql@3", "max_error_rate": 0.05} | stepped
    server.answer("GET", "/v1/aliases", {"object": "list", "data": [SPLIT | {"canary": canary}]})
    row = swaplora("aliases", "list").output.splitlines()[1]
    assert row.split() == ["ab", "sql@2=90", "sql@3=10", *shown.split()]


@pytest.mark.parametrize(
    ("targets", "body"),
    [
        (["sql@2"], {"target": "sql@2"}),
        (["sql@2=5"], {"targets": [{"target": "sql@2", "weight": 5}]}),
        (
            ["sql@2=90", "sql@sha256:abababababab=10", "poet=0"],
            {
                "targets": [
                    {"target": "sql@2", "weight": 90},
                    {"target": "sql@sha256:abababababab", "weight": 10},
                    {"target": "poet", "weight": 0},
                ]
            },
        ),
    ],
    ids=["one", "one weighted", "three"],
)
def test_set_sends_what_was_asked(server: FakeServer, targets: list[str], body: object) -> None:
    server.answer("PUT", "/v1/aliases/ab", SPLIT)
    done = swaplora("aliases", "set", "ab", *targets)
    assert (done.exit_code, done.stdout) == (0, "ab stands for sql@2=90 sql@3=10\n")
    assert server.bodies == [body]
    assert json.loads(swaplora("aliases", "set", "ab", *targets, "--json").stdout) == SPLIT


@pytest.mark.parametrize(
    ("targets", "wrong"),
    [
        (["sql@2", "sql@3=10"], "sql@2"),
        (["sql@2=90", "sql@3"], "sql@3"),
        (["sql@2=half"], "sql@2=half"),
        (["sql@2=0.5"], "sql@2=0.5"),
        (["sql@2=²"], "sql@2=²"),
        (["sql@2=-1"], "sql@2=-1"),
        (["sql@2=", "sql@3=1"], "sql@2="),
        (["=5"], "=5"),
    ],
)
def test_a_target_without_a_weight_among_several_is_named(server: FakeServer, targets: list[str], wrong: str) -> None:
    done = swaplora("aliases", "set", "ab", *targets)
    assert (done.exit_code, done.stdout, server.calls) == (2, "", [])
    assert done.stderr.startswith(f"swaplora: {wrong} has no weight: give each of several targets a whole number")
    assert done.stderr.count("\n") == 1


def test_delete(server: FakeServer) -> None:
    server.answer("DELETE", "/v1/aliases/..%2Fab", {"object": "alias.deleted", "alias": "../ab"})
    done = swaplora("aliases", "delete", "../ab")
    assert (done.exit_code, done.output) == (0, "../ab is deleted\n")


def test_a_refusal_is_one_line(server: FakeServer) -> None:
    server.refuse("DELETE", "/v1/aliases/ab", 404, "there is no alias ab", "alias_not_found")
    done = swaplora("aliases", "delete", "ab")
    assert (done.exit_code, done.stderr) == (1, "swaplora: there is no alias ab (alias_not_found)\n")
