"""The names, versions and blobs of a store, in SQLite. Knows no files but its own."""

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from swaplora_adapters.files.disk import StoreError, raising_storage_errors
from swaplora_adapters.store.manifests import Facts, Manifest
from swaplora_adapters.store.records import (
    PUT_BACK,
    Alias,
    Canary,
    Details,
    Mixing,
    Standing,
    Target,
    VersionRecord,
)
from swaplora_adapters.store.schema import MIGRATIONS

# What a description of a name holds: of the name, and of each of its versions.
_OF_NAME = ("current", "last_version", "is_pinned", "origin", "removed", "shared_with", "gate")
_OF_VERSION = (
    *("version", "digest", "kinds", "rank", "targets", "base_model", "num_parameters", "created", "source"),
    *("warnings", "provenance", "standing", "verdict"),
)
_OF_BLOB = ("config_bytes", "weights_bytes", "place")
_UNTOLD_OF_NAME: Facts = {"shared_with": [], "gate": None}  # by descriptions of earlier releases
_UNTOLD_OF_VERSION: Facts = {"standing": None, "verdict": None}
_OF_ALIAS = ("alias", "revision", "targets", "mixing", "canary")
_LISTS = ("kinds", "targets", "warnings", "removed", "shared_with", "mixing", "canary")  # JSON in the tables
# Answers of SQLite that speak of the disk or of other programs. All others mean that the catalogue is damaged.
_NOT_ITS_FAULT = (
    *(sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_IOERR),
    *(sqlite3.SQLITE_FULL, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_NOMEM),
)
_RECORD = ("name", *_OF_VERSION, "nbytes", "failure")
_RECORDS = f"""
    SELECT {", ".join(f"v.{column}" for column in _RECORD[:-2])}, b.config_bytes + b.weights_bytes, b.failure
    FROM versions v JOIN blobs b USING (digest)
"""


class DamagedCatalogueError(StoreError):
    """The file is no catalogue, or not a whole one, or of a newer release: it can be rebuilt from what files say."""


class Catalogue:
    """One connection, used by one thread at a time: the store's lock sees to that.

    A name whose versions are all deleted keeps its row, so that its version numbers never start again.
    """

    def __init__(self, path: Path) -> None:
        """Raises DamagedCatalogueError, and StoreError for what is not the file's fault."""
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._configure()
            self._refuse(self._damaged_pages())  # before anything is changed
            self._migrate()
            self._refuse(self._inconsistencies())
        except sqlite3.Error as error:
            self.close()
            is_damaged = getattr(error, "sqlite_errorcode", 0) & 0xFF not in _NOT_ITS_FAULT
            kind = DamagedCatalogueError if is_damaged else StoreError
            raise kind(f"the catalogue {path.name} cannot be opened: {error}") from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection; every committed change is on disk already."""
        self._connection.close()

    @contextmanager
    def draft(self) -> Iterator[None]:
        """Nothing that the body changes stays."""
        with raising_storage_errors():
            self._connection.execute("BEGIN")
            try:
                yield
            finally:
                if self._connection.in_transaction:  # SQLite has ended it by itself where the disk is full or fails
                    self._connection.execute("ROLLBACK")

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes of the body or none, durable when it ends; StorageFullError if there is no room.

        A commit that ends in StorageFailedError may come to be after all, if the next start finds it written.
        """
        with raising_storage_errors():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def current(self, name: str) -> VersionRecord | None:
        """The version that the name stands for."""
        condition = "JOIN names n ON n.name = v.name AND n.current = v.version WHERE v.name = ?"
        return next(iter(self._records(condition, name)), None)

    def versions(self, name: str) -> list[VersionRecord]:
        """All versions of a name, oldest first."""
        return self._records("WHERE v.name = ? ORDER BY v.version", name)

    def failed(self) -> list[VersionRecord]:
        """Versions whose blob is marked unusable."""
        return self._records("WHERE b.failure IS NOT NULL ORDER BY v.name, v.version")

    def names(self) -> list[str]:
        """Every name that has a version, in order."""
        return [name for (name,) in self._query("SELECT name FROM names WHERE current IS NOT NULL ORDER BY name")]

    def is_pinned(self, name: str) -> bool:
        """Whether the name's current version is to stay in memory."""
        return self._query("SELECT is_pinned FROM names WHERE name = ?", name) == [(1,)]

    def shared_with(self, name: str) -> tuple[str, ...]:
        """The tenants, besides whose it is, that may ask the name."""
        [(tenants,)] = self._query("SELECT shared_with FROM names WHERE name = ?", name)
        return tuple(json.loads(tenants))

    def was_used(self, name: str) -> bool:
        """Whether there is or was a version of this name."""
        return bool(self._query("SELECT 1 FROM names WHERE name = ?", name))

    def origins(self, name: str | None = None) -> dict[str, str | None]:
        """What each name was last taken in from by itself, for all that were ever used, the deleted ones too."""
        return dict(self._query("SELECT name, origin FROM names WHERE ?1 IS NULL OR name = ?1", name))

    def folders(self) -> dict[str, tuple[str, str]]:
        """Name → what its folder here was known by when it was last read, and the digest of what was read."""
        return {name: (origin, digest) for name, origin, digest in self._query("SELECT * FROM folders")}

    def put_folder(self, name: str, origin: str, digest: str) -> None:
        """Note that a name's folder here was read."""
        self._execute("INSERT OR REPLACE INTO folders VALUES (?, ?, ?)", name, origin, digest)

    def removed(self, name: str | None = None) -> list[str]:
        """Digests of versions that the name had, or that any had, whose files may still be there."""
        rows = self._query("SELECT removed FROM names WHERE removed != '[]' AND (?1 IS NULL OR name = ?1)", name)
        return [digest for (digests,) in rows for digest in json.loads(digests)]

    def aliases(self, alias: str | None = None) -> list[Alias]:
        """All, in order of alias, or the one that is called so."""
        condition = "?1 IS NULL OR alias = ?1 ORDER BY alias"
        rows = self._query(f"SELECT alias, targets, mixing, canary FROM aliases WHERE {condition}", alias)
        return [_alias(alias, *map(json.loads, facts)) for alias, *facts in rows]

    def is_referenced(self, digest: str) -> bool:
        """Whether any version has this digest."""
        return bool(self._query("SELECT 1 FROM versions WHERE digest = ? LIMIT 1", digest))

    def failure(self, digest: str) -> str | None:
        """Why the blob is unusable, if it is."""
        return next((failure for (failure,) in self._query("SELECT failure FROM blobs WHERE digest = ?", digest)), None)

    def is_blob(self, digest: str) -> bool:
        """Whether the blob is recorded."""
        return bool(self._query("SELECT 1 FROM blobs WHERE digest = ?", digest))

    def places(self, digest: str | None = None) -> dict[str, str]:
        """Digest → where in the shared store the blob's files lie, for all that do, or for this one if it does."""
        condition = "place IS NOT NULL AND (?1 IS NULL OR digest = ?1)"
        return dict(self._query(f"SELECT digest, place FROM blobs WHERE {condition}", digest))

    def blobs(self) -> list[tuple[str, int, int, str | None]]:
        """Digest, config bytes, weights bytes and failure of every blob."""
        return self._query("SELECT digest, config_bytes, weights_bytes, failure FROM blobs")

    def num_bytes(self, digest: str) -> int:
        """Of a blob's files; 0 for one that is not known."""
        found = self._query("SELECT config_bytes + weights_bytes FROM blobs WHERE digest = ?", digest)
        return sum(each for (each,) in found)

    def position(self) -> tuple[int, str | None] | None:
        """The last change of a shared store up to which all are known, with its id; None if that was never noted."""
        return next(iter(self._query("SELECT revision, change FROM position")), None)

    def set_position(self, revision: int, change: str | None) -> None:
        """Note that all are known up to this one."""
        self._execute("INSERT OR REPLACE INTO position VALUES (0, ?, ?)", revision, change)

    def revisions(self) -> dict[str, int]:
        """Which change of anything the last one of each name was."""
        return dict(self._query("SELECT name, revision FROM names"))

    def alias_revisions(self) -> dict[str, int]:
        """The same of each alias."""
        return dict(self._query("SELECT alias, revision FROM aliases"))

    def manifest_of_name(self, name: str) -> Manifest:
        """All that is kept of a name, but for what was found out about its files."""
        columns = (*_OF_VERSION, *_OF_BLOB)
        joined = f"SELECT {', '.join(columns)} FROM versions JOIN blobs USING (digest) WHERE name = ? ORDER BY version"
        versions = [_unpacked(columns, row) for row in self._query(joined, name)]
        [(revision, *row)] = self._query(f"SELECT revision, {', '.join(_OF_NAME)} FROM names WHERE name = ?", name)
        return Manifest(revision, _unpacked(_OF_NAME, row) | {"versions": versions})

    def manifest_of_alias(self, alias: str) -> Manifest:
        """Where it leads. To releases that know no mixtures one is as if it were deleted, not a split."""
        [(revision, *row)] = self._query("SELECT revision, targets, mixing, canary FROM aliases WHERE alias = ?", alias)
        targets, mixing, canary = map(json.loads, row)
        if mixing is None:
            return Manifest(revision, {"targets": targets} | ({} if canary is None else {"canary": canary}))
        members = [reference for reference, _ in targets]
        return Manifest(revision, {"targets": None, "mixture": {"members": members, "mixing": mixing}})

    def adopt_name(self, name: str, manifest: Manifest, config_bytes: Mapping[str, int]) -> None:
        """Take what a manifest says for what is kept of the name.

        `config_bytes` are, by digest, those of the files here, which count where these are the only ones.
        """
        facts = _UNTOLD_OF_NAME | manifest.facts
        self._execute("DELETE FROM versions WHERE name = ?", name)
        self._insert("names", {"name": name, "revision": manifest.revision, **facts}, ("name", "revision", *_OF_NAME))
        for version in facts["versions"]:
            digest, place = version["digest"], version.get("place")
            if not self.is_blob(digest) or self.places(digest).get(digest) != place:  # sent anew since
                here = config_bytes.get(digest) if place is None else None
                self.put_blob(digest, here or version.get("config_bytes", 0), version["weights_bytes"], place)
            self._insert("versions", {"name": name, **_UNTOLD_OF_VERSION, **version}, ("name", *_OF_VERSION))

    def adopt_alias(self, alias: str, manifest: Manifest) -> None:
        """Take what a manifest says, which may be that the alias is no more."""
        self.remove_alias(alias)
        targets, mixture = manifest.facts["targets"], manifest.facts.get("mixture")
        if mixture is not None:
            targets = [Target(member, 1) for member in mixture["members"]]
        if targets is not None:
            facts = {
                "targets": targets,
                "mixing": mixture and mixture["mixing"],
                "canary": manifest.facts.get("canary"),
            }
            self._insert("aliases", {"alias": alias, "revision": manifest.revision, **facts}, _OF_ALIAS)

    def digests_of(self, names: Iterable[str]) -> set[str]:
        """Of all versions of these names."""
        found = "SELECT digest FROM versions WHERE name IN (SELECT value FROM json_each(?))"
        return {digest for (digest,) in self._query(found, json.dumps([*names]))}

    def forget_unreferenced(self, digests: Iterable[str] | None = None) -> None:
        """Delete the rows of blobs that no version has, all of them or those of these digests."""
        if digests is None:
            self._execute("DELETE FROM blobs WHERE digest NOT IN (SELECT digest FROM versions)")
            return
        self._execute(
            "DELETE FROM blobs WHERE digest IN (SELECT value FROM json_each(?))"
            " AND NOT EXISTS (SELECT 1 FROM versions v WHERE v.digest = blobs.digest)",
            json.dumps([*digests]),
        )

    def put_blob(self, digest: str, config_bytes: int, weights_bytes: int, place: str | None = None) -> None:
        """Record a blob whose files are in place and sound, here or at a `place` in the shared store."""
        self._execute(
            "INSERT INTO blobs (digest, config_bytes, weights_bytes, place) VALUES (?, ?, ?, ?)"
            " ON CONFLICT (digest) DO UPDATE SET config_bytes = excluded.config_bytes,"
            " weights_bytes = excluded.weights_bytes, place = excluded.place, failure = NULL",
            digest,
            config_bytes,
            weights_bytes,
            place,
        )

    def mark_blob(self, digest: str, failure: str | None) -> None:
        """Note why a blob is unusable, or that it is sound again."""
        self._execute("UPDATE blobs SET failure = ? WHERE digest = ?", failure, digest)

    def add_version(self, name: str, details: Details, source: str) -> int:
        """Give the name a new version, and return its number: the current one, or a candidate where there is a gate."""
        [(version, gate)] = self._query(
            "INSERT INTO names (name, current, last_version) VALUES (?, 1, 1) ON CONFLICT (name) DO UPDATE"
            " SET last_version = last_version + 1, current = iif(gate IS NULL, last_version + 1, current)"
            " RETURNING last_version, gate",
            name,
        )
        standing = None if gate is None else Standing.CANDIDATE
        facts = {"name": name, "version": version, "created": time.time(), "source": source, **asdict(details)}
        self._insert("versions", _UNTOLD_OF_VERSION | facts | {"standing": standing}, ("name", *_OF_VERSION))
        return int(version)

    def remove_versions(self, records: Iterable[VersionRecord]) -> None:
        """Delete versions, and a blob's row with its last one.

        A name without its current one moves to its newest, or where there is a gate to the newest that has passed.
        """
        for record in records:
            key = (record.name, record.version)
            self._execute("DELETE FROM versions WHERE name = ? AND version = ?", *key)
            self._execute(
                "DELETE FROM blobs WHERE digest = ? AND NOT EXISTS (SELECT 1 FROM versions v WHERE v.digest = ?)",
                record.digest,
                record.digest,
            )
            self._execute(
                "UPDATE names SET current = (SELECT max(version) FROM versions v WHERE v.name = names.name"
                " AND (gate IS NULL OR standing IS NULL OR standing = 'passed')) WHERE name = ? AND current = ?",
                *key,
            )
            self._execute(
                "UPDATE names SET is_pinned = 0, shared_with = '[]', gate = NULL WHERE name = ? AND current IS NULL",
                record.name,
            )

    def set_current(self, name: str, version: int) -> None:
        """Let the name stand for one of its versions."""
        self._execute("UPDATE names SET current = ? WHERE name = ?", version, name)

    def set_pinned(self, name: str, is_pinned: bool) -> None:
        """Note whether the name's current version is to stay in memory."""
        self._execute("UPDATE names SET is_pinned = ? WHERE name = ?", is_pinned, name)

    def set_shared_with(self, name: str, tenants: Sequence[str]) -> None:
        """Note who, besides whose it is, may ask the name."""
        self._execute("UPDATE names SET shared_with = ? WHERE name = ?", json.dumps(tenants), name)

    def gate(self, name: str) -> str | None:
        """What new versions of the name must show."""
        return next((gate for (gate,) in self._query("SELECT gate FROM names WHERE name = ?", name)), None)

    def set_gate(self, name: str, gate: str | None) -> None:
        """Note what new versions must show; those that another gate has held back are to be judged anew."""
        self._execute("UPDATE names SET gate = ? WHERE name = ?", gate, name)
        if gate is not None:
            self._execute(
                "UPDATE versions SET standing = 'candidate', verdict = NULL WHERE name = ? AND standing = 'failed'"
                " AND version > (SELECT current FROM names n WHERE n.name = versions.name)"
                " AND ifnull(json_extract(verdict, '$.reason'), '') != ?",
                name,
                PUT_BACK,
            )

    def let_pass(self, name: str) -> None:
        """The current version is so without a gate, which counts as passed: forget what an earlier one said of it."""
        self._execute(
            "UPDATE versions SET standing = NULL, verdict = NULL WHERE name = ? AND standing != 'passed'"
            " AND version = (SELECT current FROM names n WHERE n.name = versions.name)",
            name,
        )

    def put_back(self, name: str) -> bool:
        """Have the candidates that are newer than the current version be judged no more; whether there was one."""
        told = {"reason": PUT_BACK, "at": time.time(), "bars": [], "evaluations": []}
        sql = (
            "UPDATE versions SET standing = 'failed', verdict = json_set(?, '$.against', n.current) FROM names n"
            " WHERE versions.name = ? AND n.name = versions.name AND n.gate IS NOT NULL AND standing = 'candidate'"
            " AND version > n.current RETURNING version"
        )
        return bool(self._query(sql, json.dumps(told), name))

    def set_standing(self, name: str, version: int, standing: Standing, verdict: str | None) -> None:
        """Note what has become of a version, and why."""
        sql = "UPDATE versions SET standing = ?, verdict = ? WHERE name = ? AND version = ?"
        self._execute(sql, standing, verdict, name, version)

    def set_origin(self, name: str, origin: str) -> None:
        """Note what the name was taken in from, so that it is not taken in again unchanged."""
        self._execute("UPDATE names SET origin = ? WHERE name = ?", origin, name)

    def set_revision(self, name: str, revision: int, removed: Sequence[str]) -> None:
        """Note which change of anything the name's last one is, and what files it has left behind."""
        self._execute("UPDATE names SET revision = ?, removed = ? WHERE name = ?", revision, json.dumps(removed), name)

    def put_alias(self, alias: Alias, revision: int) -> None:
        """Make an alias, or let it stand for something else."""
        self._insert("aliases", {**asdict(alias), "revision": revision}, _OF_ALIAS)

    def remove_alias(self, alias: str) -> bool:
        """Delete an alias; whether there was one."""
        return bool(self._query("DELETE FROM aliases WHERE alias = ? RETURNING alias", alias))

    def complaints(self) -> list[str]:
        """What is inconsistent: damaged pages, broken references, names whose current version does not exist.

        Raises sqlite3.Error where that cannot even be asked.
        """
        return self._damaged_pages() + self._inconsistencies()

    def _refuse(self, complaints: Sequence[str]) -> None:
        if complaints:
            raise DamagedCatalogueError(f"the catalogue is damaged: {complaints[0]}")

    def _damaged_pages(self) -> list[str]:
        return [str(row[0]) for row in self._connection.execute("PRAGMA integrity_check") if row[0] != "ok"]

    def _inconsistencies(self) -> list[str]:
        execute = self._connection.execute
        found = [f"broken reference in {row[0]}" for row in execute("PRAGMA foreign_key_check")]
        dangling = execute(
            "SELECT name FROM names n WHERE (current IS NOT NULL) !="
            " EXISTS (SELECT 1 FROM versions v WHERE v.name = n.name AND v.version = n.current)"
            " OR (current IS NULL AND EXISTS (SELECT 1 FROM versions v WHERE v.name = n.name))"
        )
        execute(f"SELECT {', '.join(_OF_ALIAS)} FROM aliases LIMIT 1")  # fails if there is no such table
        return found + [f"{name} has no current version" for (name,) in dangling]

    def _records(self, condition: str, *values: Any) -> list[VersionRecord]:
        return [_record(dict(zip(_RECORD, row, strict=True))) for row in self._query(_RECORDS + condition, *values)]

    def _insert(self, table: str, facts: Mapping[str, Any], columns: Sequence[str]) -> None:
        """Put one row, or put it in the place of the one with its key; lists are kept as JSON."""
        values = [json.dumps(facts[column]) if column in _LISTS else facts[column] for column in columns]
        updates = ", ".join(f"{column} = excluded.{column}" for column in columns)
        places = ", ".join("?" for _ in columns)
        key = {"names": "name", "versions": "name, version", "aliases": "alias"}[table]
        self._execute(
            f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places}) ON CONFLICT ({key}) DO UPDATE SET {updates}",
            *values,
        )

    def _execute(self, sql: str, *values: Any) -> None:
        self._connection.execute(sql, values)

    def _query(self, sql: str, *values: Any) -> list[Any]:
        """Every row; StorageFailedError where the disk, or what lies on it, does not read."""
        with raising_storage_errors():
            return self._connection.execute(sql, values).fetchall()

    def _configure(self) -> None:
        """Exclusive locking keeps the WAL's index in memory of our own, where a full disk cannot hurt it.

        A short WAL is soon written over from its start: deletes, however many, need no more room than the reserve has.
        """
        for pragma in (
            "locking_mode = EXCLUSIVE",
            "journal_mode = WAL",
            "synchronous = FULL",
            "foreign_keys = ON",
            "wal_autocheckpoint = 32",
        ):
            self._connection.execute(f"PRAGMA {pragma}").fetchall()

    def _migrate(self) -> None:
        [(found,)] = self._connection.execute("PRAGMA user_version").fetchall()
        if found > len(MIGRATIONS):
            raise DamagedCatalogueError(f"the catalogue was written by a newer release (schema {found})")
        for number, script in enumerate(MIGRATIONS[found:], start=found + 1):
            self._connection.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT;")


def _record(row: dict[str, Any]) -> VersionRecord:
    lists = {name: tuple(json.loads(row[name])) for name in ("kinds", "targets", "warnings")}
    standing = None if row["standing"] is None else Standing(row["standing"])
    return VersionRecord(**row | lists | {"standing": standing})


def _alias(alias: str, targets: list[list[Any]], mixing: list[Any] | None, canary: list[Any] | None) -> Alias:
    return Alias(
        alias,
        tuple(Target(*target) for target in targets),
        None if mixing is None else Mixing(*mixing),
        None if canary is None else Canary(*canary),
    )


def _unpacked(columns: Sequence[str], row: Sequence[Any]) -> Facts:
    facts = dict(zip(columns, row, strict=True))
    return facts | {column: json.loads(facts[column]) for column in _LISTS if column in facts}
