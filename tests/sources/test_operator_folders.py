"""Folders of the operator's on servers that share a store: none undoes what another has taken in, or was told."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from adapter_files import write_adapter
from replicas import Disturbed, put, registry, see, unreachable
from swaplora_adapters.registry.registry import Registry
from swaplora_adapters.sources.source import Sources
from swaplora_adapters.sources.watcher import FolderWatcher, put_folder
from swaplora_adapters.store.shared.address import open_objects


class Server:
    """One with a folder of its own, which can begin again, with its data directory or with an empty one."""

    def __init__(self, root: Path, number: int) -> None:
        self._root, self._number = root, number
        self._num_dirs = self._num_fills = 0
        self.folder = root / f"folder{number}"
        self.folder.mkdir()
        self.registry = self._begin()

    def fill(self, files: Path) -> None:
        """As a new image does: with times that none had before."""
        self._num_fills += 1
        shutil.rmtree(self.folder / "sql", ignore_errors=True)
        shutil.copytree(files, self.folder / "sql")
        for path in (self.folder / "sql").iterdir():
            os.utime(path, ns=(2 * self._num_fills + self._number,) * 2)

    def scan(self) -> None:
        see(self.registry)
        self._watcher.scan()

    def end(self) -> None:
        self.registry.close()

    def begin_again(self, *, is_new: bool = False) -> None:
        self.end()
        self._num_dirs += is_new
        self.registry = self._begin()

    def _begin(self) -> Registry:
        sources = Sources(allowed=(), folder=self.folder, max_weights_bytes=1 << 30)
        self.objects = Disturbed(open_objects(str(self._root / "shared")))
        opened = registry(self._root / f"data{self._number}-{self._num_dirs}", self.objects, sources=sources)
        self._watcher = FolderWatcher(opened, self.folder, _fail)
        return opened


def _fail(name: str, error: Exception) -> None:
    raise AssertionError(name) from error


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("files")
    return [write_adapter(folder / f"a{seed}", seed=seed) for seed in range(5)]


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Sequence[Server]]:
    (tmp_path / "shared").mkdir()
    opened = [Server(tmp_path, number) for number in range(2)]
    with ExitStack() as stack:
        for server in opened:
            stack.callback(server.end)
        yield opened


def scan(servers: Sequence[Server]) -> int:
    """Each, some times; how many changes that came to."""
    see(servers[0].registry)
    before = servers[0].registry.revision
    for server in [*servers] * 3:
        server.scan()
    see(servers[0].registry)
    return servers[0].registry.revision - before


def current(server: Server) -> tuple[int, str]:
    see(server.registry)
    record = server.registry.card("sql").record
    return record.version, record.digest


@pytest.mark.parametrize("is_named", [False, True])
def test_the_same_files_with_other_times_are_taken_in_once(
    servers: Sequence[Server], files: list[Path], is_named: bool
) -> None:
    """And undo no upload and no delete, also after a restart."""

    def look() -> int:
        if not is_named:
            return scan(servers)
        see(servers[0].registry)
        before = servers[0].registry.revision
        for server in servers:
            see(server.registry)
            put_folder(server.registry, "sql", server.folder / "sql")
        see(servers[0].registry)
        return servers[0].registry.revision - before

    for server in servers:
        server.fill(files[0])
    assert look() == 1
    put(servers[0].registry, "sql", files[1])
    uploaded = current(servers[1])
    for is_new in (False, True):
        servers[1].begin_again(is_new=is_new)
        assert look() == 0
        assert current(servers[1]) == uploaded
    servers[0].registry.delete("sql")
    servers[0].fill(files[0])  # with other times
    assert look() == 0
    servers[1].begin_again(is_new=True)
    assert look() == 0
    assert "sql" not in servers[1].registry.names.index


def test_in_a_rolling_change_of_the_folder_the_newer_one_stays(servers: Sequence[Server], files: list[Path]) -> None:
    for server in servers:
        server.fill(files[0])
    scan(servers)
    old = current(servers[0])
    servers[1].fill(files[1])
    assert scan(servers) == 1
    new = current(servers[0])
    assert new == (2, current(servers[1])[1]) != old
    servers[0].begin_again(is_new=True)  # yet with the old folder
    assert scan(servers) == 0
    servers[0].fill(files[1])
    put(servers[1].registry, "sql", files[2])
    uploaded = current(servers[0])
    assert scan(servers) == 0
    assert current(servers[0]) == current(servers[1]) == uploaded


def test_a_folder_that_is_as_it_was_before_is_taken_in_again(servers: Sequence[Server], files: list[Path]) -> None:
    """The operator has rolled it back, on one server after the other; or that of one has come late to what is old."""
    for number in (0, 1):
        for server in servers:
            server.fill(files[number])
        scan(servers)
    assert current(servers[0])[0] == 2
    servers[1].fill(files[0])
    servers[1].begin_again()
    assert scan(servers) == 1
    back = current(servers[1])
    assert back[0] == 3
    servers[0].fill(files[0])
    assert scan(servers) == 0
    for number in (3, 4):
        servers[1].fill(files[number])
        servers[1].scan()
    newest = current(servers[1])
    servers[0].fill(files[3])
    assert scan(servers) == 0
    assert current(servers[0]) == newest


@pytest.mark.parametrize("is_made", [False, True])
def test_a_folder_whose_version_came_to_the_store_or_not_undoes_no_upload(
    servers: Sequence[Server], files: list[Path], is_made: bool
) -> None:
    """The store fails as a version of the folder is made, or after it: that it was taken in is of the same change."""
    for server in servers:
        server.fill(files[0])
    scan(servers)
    for server in servers:
        server.fill(files[1])

    def fail(call: str, key: str) -> None:
        if call == "create" and "/log/" in key:
            made.append(key)
            if len(made) > is_made:
                raise unreachable()

    made = list[str]()
    servers[0].objects.before = fail
    if is_made:
        servers[0].scan()  # a second change would fail
    else:
        with pytest.raises(AssertionError):
            servers[0].scan()
        assert scan(servers[1:]) == 1
    servers[0].objects.come_back()
    assert current(servers[1])[0] == 2
    put(servers[1].registry, "sql", files[2])
    uploaded = current(servers[1])
    assert scan(servers) == 0
    assert current(servers[0]) == uploaded


def test_a_folder_that_is_looked_at_while_another_server_takes_it_in_undoes_no_upload(
    servers: Sequence[Server], files: list[Path]
) -> None:
    """After each change of the store's an upload is acknowledged, and the other server looks."""
    for server in servers:
        server.fill(files[0])
    scan(servers)
    for server in servers:
        server.fill(files[1])
    uploaded: list[tuple[int, str]] = []

    def meanwhile(call: str, key: str) -> None:
        if call == "create" and "/log/" in key and not uploaded:
            put(servers[1].registry, "sql", files[2])
            uploaded.append(current(servers[1]))
            servers[1].scan()

    servers[0].objects.after = meanwhile
    servers[0].scan()
    assert scan(servers) == 0
    assert [current(server) for server in servers] == uploaded * 2


def test_only_the_last_of_what_was_taken_in_are_remembered(servers: Sequence[Server], tmp_path: Path) -> None:
    for seed in range(20):
        servers[0].fill(write_adapter(tmp_path / f"b{seed}", seed=seed))
        servers[0].scan()
    noted = (servers[0].registry.names.origin("sql") or "").split()
    assert len(noted) == 16
    assert noted[-1] == current(servers[0])[1]
