"""The names, versions and blobs of a store, in SQLite. Knows no files but its own."""

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from swaplora_adapters.artifact.disk import full_disk_is_told
from swaplora_adapters.artifact.records import Alias, Details, Target, VersionRecord

# Each script brings `user_version` one further. Never change one that was released: append.
MIGRATIONS = (
    """
    CREATE TABLE blobs (
        digest TEXT PRIMARY KEY,
        config_bytes INTEGER NOT NULL,
        weights_bytes INTEGER NOT NULL,
        failure TEXT
    ) STRICT;
    CREATE TABLE names (
        name TEXT PRIMARY KEY,
        current INTEGER,
        last_version INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE versions (
        name TEXT NOT NULL REFERENCES names,
        version INTEGER NOT NULL,
        digest TEXT NOT NULL REFERENCES blobs,
        rank INTEGER NOT NULL,
        targets TEXT NOT NULL,
        base_model TEXT,
        num_parameters INTEGER NOT NULL,
        created REAL NOT NULL,
        source TEXT NOT NULL,
        warnings TEXT NOT NULL,
        PRIMARY KEY (name, version)
    ) STRICT;
    CREATE INDEX versions_by_digest ON versions (digest);
    """,
    """
    ALTER TABLE names ADD COLUMN is_pinned INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE names ADD COLUMN origin TEXT;
    CREATE TABLE aliases (
        alias TEXT PRIMARY KEY,
        targets TEXT NOT NULL
    ) STRICT;
    """,
    "ALTER TABLE versions ADD COLUMN provenance TEXT;",
    """ALTER TABLE versions ADD COLUMN kinds TEXT NOT NULL DEFAULT '["lora"]';""",
)
_RECORDS = """
    SELECT v.name, v.version, v.digest, v.kinds, v.rank, v.targets, v.base_model, v.num_parameters,
           b.config_bytes + b.weights_bytes AS nbytes, v.created, v.source, v.warnings, b.failure, v.provenance
    FROM versions v JOIN blobs b USING (digest)
"""


class StoreError(RuntimeError):
    """The data directory cannot be used as it is. Meant for the operator: the message says what is wrong with it."""


class Catalogue:
    """One connection, used by one thread at a time: the store's lock sees to that.

    A name whose versions are all deleted keeps its row, so that its version numbers never start again.
    """

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._configure()
            self._migrate()
        except sqlite3.DatabaseError as error:
            self.close()
            raise StoreError(f"the catalogue {path.name} cannot be opened: {error}") from error
        except StoreError:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection; every committed change is on disk already."""
        self._connection.close()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All changes of the body or none, durable when it ends; StorageFullError if there is no room.

        A commit that ends in StorageFailedError may come to be after all, if the next start finds it written.
        """
        with full_disk_is_told():
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
        rows = self._connection.execute("SELECT name FROM names WHERE current IS NOT NULL ORDER BY name")
        return [name for (name,) in rows]

    def is_pinned(self, name: str) -> bool:
        """Whether the name's current version is to stay in memory."""
        row = self._connection.execute("SELECT is_pinned FROM names WHERE name = ?", (name,)).fetchone()
        return row is not None and bool(row[0])

    def origins(self) -> dict[str, str | None]:
        """What each name was last taken in from by itself, for all that were ever used, the deleted ones too."""
        return dict(self._connection.execute("SELECT name, origin FROM names"))

    def aliases(self) -> list[Alias]:
        """In order of alias."""
        rows = self._connection.execute("SELECT alias, targets FROM aliases ORDER BY alias")
        return [Alias(alias, tuple(Target(*target) for target in json.loads(targets))) for alias, targets in rows]

    def is_referenced(self, digest: str) -> bool:
        """Whether any version has this digest."""
        return self._connection.execute("SELECT 1 FROM versions WHERE digest = ?", (digest,)).fetchone() is not None

    def failure(self, digest: str) -> str | None:
        """Why the blob is unusable, if it is."""
        row = self._connection.execute("SELECT failure FROM blobs WHERE digest = ?", (digest,)).fetchone()
        return None if row is None else row[0]

    def is_blob(self, digest: str) -> bool:
        """Whether the blob is recorded."""
        return self._connection.execute("SELECT 1 FROM blobs WHERE digest = ?", (digest,)).fetchone() is not None

    def blobs(self) -> list[tuple[str, int, int, str | None]]:
        """Digest, config bytes, weights bytes and failure of every blob."""
        return self._connection.execute("SELECT digest, config_bytes, weights_bytes, failure FROM blobs").fetchall()

    def put_blob(self, digest: str, config_bytes: int, weights_bytes: int) -> None:
        """Record a blob whose files are in place and sound."""
        self._connection.execute(
            "INSERT INTO blobs (digest, config_bytes, weights_bytes) VALUES (?, ?, ?) ON CONFLICT (digest) DO UPDATE"
            " SET config_bytes = excluded.config_bytes, weights_bytes = excluded.weights_bytes, failure = NULL",
            (digest, config_bytes, weights_bytes),
        )

    def mark_blob(self, digest: str, failure: str | None) -> None:
        """Note why a blob is unusable, or that it is sound again."""
        self._connection.execute("UPDATE blobs SET failure = ? WHERE digest = ?", (failure, digest))

    def add_version(self, name: str, details: Details, source: str) -> int:
        """Give the name a new version, make it current, and return its number."""
        [(version,)] = self._connection.execute(
            "INSERT INTO names (name, current, last_version) VALUES (?, 1, 1) ON CONFLICT (name) DO UPDATE"
            " SET last_version = last_version + 1, current = last_version + 1 RETURNING last_version",
            (name,),
        ).fetchall()
        self._connection.execute(
            "INSERT INTO versions (name, version, digest, rank, targets, base_model, num_parameters, created, source,"
            " warnings) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                name,
                version,
                details.digest,
                details.rank,
                json.dumps(details.targets),
                details.base_model,
                details.num_parameters,
                time.time(),
                source,
                json.dumps(details.warnings),
            ),
        )
        if details.kinds != ("lora",):
            kinds = "UPDATE versions SET kinds = ? WHERE name = ? AND version = ?"
            self._connection.execute(kinds, (json.dumps(details.kinds), name, version))
        if details.provenance is not None:
            made = "UPDATE versions SET provenance = ? WHERE name = ? AND version = ?"
            self._connection.execute(made, (details.provenance, name, version))
        return int(version)

    def remove_versions(self, records: Iterable[VersionRecord]) -> None:
        """Delete versions, and a blob's row with its last one; a name without its current one moves to its newest."""
        for record in records:
            key = (record.name, record.version)
            self._connection.execute("DELETE FROM versions WHERE name = ? AND version = ?", key)
            self._connection.execute(
                "DELETE FROM blobs WHERE digest = ? AND NOT EXISTS (SELECT 1 FROM versions v WHERE v.digest = ?)",
                (record.digest, record.digest),
            )
            self._connection.execute(
                "UPDATE names SET current = (SELECT max(version) FROM versions v WHERE v.name = names.name)"
                " WHERE name = ? AND current = ?",
                key,
            )
            self._connection.execute("UPDATE names SET is_pinned = 0 WHERE name = ? AND current IS NULL", key[:1])

    def set_current(self, name: str, version: int) -> None:
        """Let the name stand for one of its versions."""
        self._connection.execute("UPDATE names SET current = ? WHERE name = ?", (version, name))

    def set_pinned(self, name: str, is_pinned: bool) -> None:
        """Note whether the name's current version is to stay in memory."""
        self._connection.execute("UPDATE names SET is_pinned = ? WHERE name = ?", (is_pinned, name))

    def set_origin(self, name: str, origin: str) -> None:
        """Note what the name was taken in from, so that it is not taken in again unchanged."""
        self._connection.execute("UPDATE names SET origin = ? WHERE name = ?", (origin, name))

    def put_alias(self, alias: Alias) -> None:
        """Make an alias, or let it stand for something else."""
        self._connection.execute(
            "INSERT OR REPLACE INTO aliases VALUES (?, ?)", (alias.alias, json.dumps(alias.targets))
        )

    def remove_alias(self, alias: str) -> bool:
        """Delete an alias; whether there was one."""
        return self._connection.execute("DELETE FROM aliases WHERE alias = ?", (alias,)).rowcount > 0

    def complaints(self) -> list[str]:
        """What is inconsistent: damaged pages, broken references, names whose current version does not exist."""
        found = [row[0] for row in self._connection.execute("PRAGMA quick_check") if row[0] != "ok"]
        found += [f"broken reference in {row[0]}" for row in self._connection.execute("PRAGMA foreign_key_check")]
        dangling = self._connection.execute(
            "SELECT name FROM names n WHERE (current IS NOT NULL) !="
            " EXISTS (SELECT 1 FROM versions v WHERE v.name = n.name AND v.version = n.current)"
            " OR (current IS NULL AND EXISTS (SELECT 1 FROM versions v WHERE v.name = n.name))"
        )
        return found + [f"{name} has no current version" for (name,) in dangling]

    def _records(self, condition: str, *values: Any) -> list[VersionRecord]:
        cursor = self._connection.execute(_RECORDS + condition, values)
        columns = [column for column, *_ in cursor.description]
        return [_record(dict(zip(columns, row, strict=True))) for row in cursor]

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
            raise StoreError(f"the catalogue was written by a newer release (schema {found})")
        for number, script in enumerate(MIGRATIONS[found:], start=found + 1):
            self._connection.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT;")


def _record(row: dict[str, Any]) -> VersionRecord:
    lists = {name: tuple(json.loads(row[name])) for name in ("kinds", "targets", "warnings")}
    return VersionRecord(**row | lists)
