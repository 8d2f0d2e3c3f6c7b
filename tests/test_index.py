"""Names: what may stand for what, and that nothing else is ever tried."""

import pytest

from swaplora_adapters.artifact.records import VersionRecord
from swaplora_adapters.errors import AdapterNotFoundError, VersionNotFoundError
from swaplora_adapters.registry.index import Index


def record(version: int, digit: str, name: str = "sql") -> VersionRecord:
    digest = f"sha256:{digit * 64}"
    return VersionRecord(name, version, digest, 8, ("q_proj",), None, 10, 100, 0.0, "upload", (), None)


@pytest.fixture
def index() -> Index:
    made = Index()
    versions = [record(1, "a"), record(3, "b"), record(4, "a")]
    made.put("sql", versions, versions[1])
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


def test_a_removed_name_is_not_found(index: Index) -> None:
    index.remove("sql")
    with pytest.raises(AdapterNotFoundError):
        index.get("sql")
    assert index.all() == []
