"""Names: what may stand for what, and that nothing else is ever tried."""

from collections import Counter

import pytest

from swaplora_adapters.errors import AdapterNotFoundError, AliasNotFoundError, VersionNotFoundError
from swaplora_adapters.registry.index import Index, MayAsk, NamedVersions, choose
from swaplora_adapters.store.records import Alias, Target, VersionRecord


def record(version: int, digit: str, name: str = "sql") -> VersionRecord:
    digest = f"sha256:{digit * 64}"
    return VersionRecord(name, version, digest, 8, ("q_proj",), None, 10, 100, 0.0, "upload", (), None)


@pytest.fixture
def index() -> Index:
    made = Index()
    versions = (record(1, "a"), record(3, "b"), record(4, "a"))
    made.put("sql", NamedVersions(versions[1], versions, is_pinned=False))
    return made


@pytest.mark.parametrize(
    ("reference", "version"),
    [
        ("sql", 3),
        ("base:sql", 3),
        ("sql@1", 1),
        ("sql@sha256:" + "b" * 12, 3),
        ("sql@sha256:" + "b" * 64, 3),
        ("sql@sha256:" + "a" * 20, 4),
        ("base:sql@4", 4),
    ],
)
def test_a_reference_names_one_version(index: Index, reference: str, version: int) -> None:
    assert index.resolve(reference).version == version


@pytest.mark.parametrize("reference", ["sql@2", "sql@5", "sql@999999999", "sql@sha256:" + "c" * 12])
def test_a_version_that_is_not_there_is_not_found(index: Index, reference: str) -> None:
    with pytest.raises(VersionNotFoundError):
        index.resolve(reference)


@pytest.mark.parametrize(
    "reference",
    [
        "",
        "SQL",
        "sq",
        "sqll",
        "sql ",
        " sql",
        "sql@",
        "sql@0",
        "sql@-1",
        "sql@01",
        "sql@x",
        "sql@sha256:bb",
        "sql@1@1",
        "base:",
        "base:base:sql",
        "../sql",
        "sql\n",
        "sql@sha256:" + "B" * 12,
        "sql:1",
        "x" * 5000,
    ],
)
def test_anything_else_is_not_found(index: Index, reference: str) -> None:
    with pytest.raises(AdapterNotFoundError) as caught:
        index.resolve(reference)
    assert len(str(caught.value)) < 250


def test_an_alias_leads_to_a_name_or_a_version(index: Index) -> None:
    index.put_alias(Alias("prod", (Target("sql", 1),)))
    index.put_alias(Alias("old", (Target("sql@1", 1),)))
    assert [index.resolve(name).version for name in ("prod", "base:prod", "old")] == [3, 3, 1]
    for reference in ("prod@1", "prod@sha256:" + "b" * 12, "base:base:prod"):
        with pytest.raises(AdapterNotFoundError):
            index.resolve(reference)
    index.remove_alias("prod")
    with pytest.raises(AdapterNotFoundError):
        index.resolve("prod")
    with pytest.raises(AliasNotFoundError):
        index.alias("prod")


def test_an_alias_that_moves_between_two_looks_is_followed(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = record(1, "c", "gone")
    index.put("gone", NamedVersions(gone, (gone,), is_pinned=False))
    index.put_alias(Alias("prod", (Target("gone", 1),)))
    real = index.resolve_name

    def late(reference: str, may_ask: MayAsk) -> VersionRecord:
        if reference == "gone":
            index.put_alias(Alias("prod", (Target("sql", 1),)))
            index.remove("gone")
        return real(reference, may_ask)

    monkeypatch.setattr(index, "resolve_name", late)
    assert index.resolve("prod").name == "sql"


def test_an_alias_needs_the_last_version_that_it_can_mean(index: Index) -> None:
    index.put_alias(Alias("prod", (Target("sql", 1),)))
    index.put_alias(Alias("split", (Target("sql@1", 1), Target("sql@sha256:" + "a" * 12, 1))))
    assert index.aliases_that_need("sql", {3}) == []
    assert index.aliases_that_need("sql", {4}) == []  # version 1 has the same digest
    assert index.aliases_that_need("sql", {1}) == ["split"]
    assert index.aliases_that_need("sql", {1, 3, 4}) == ["prod", "split"]


def test_a_split_follows_its_weights_and_keeps_each_client_where_it_is() -> None:
    before = Alias("canary", (Target("a", 90), Target("b", 10), Target("off", 0)))
    after = Alias("canary", (Target("a", 80), Target("b", 20), Target("off", 0)))
    clients = [f"client {n}" for n in range(4000)]
    chosen = {client: choose(before, client).reference for client in clients}
    assert chosen == {client: choose(before, client).reference for client in clients}
    assert Counter(chosen.values())["b"] == pytest.approx(400, abs=80)
    moved = [client for client in clients if choose(after, client).reference != chosen[client]]
    assert len(moved) == pytest.approx(400, abs=80)
    assert {chosen[client] for client in moved} == {"a"}
    drawn = Counter(choose(before, None).reference for _ in range(4000))
    assert drawn["b"] == pytest.approx(400, abs=100)
    assert drawn["off"] == 0 == Counter(chosen.values())["off"]


def test_a_removed_name_is_not_found(index: Index) -> None:
    index.remove("sql")
    with pytest.raises(AdapterNotFoundError):
        index.get("sql")
    assert index.all() == []
