"""Which sources are admitted, how they are written, and adapters out of folders."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapter_files import write_adapter
from swaplora_adapters.errors import (
    AdapterTooLargeError,
    InvalidAdapterError,
    SourceFailedError,
    SourceNotAllowedError,
    SourceNotFoundError,
    StoppingError,
)
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.sources.folder import ReplacedMeanwhileError
from swaplora_adapters.sources.source import Sources
from swaplora_adapters.sources.uri import HubUri, ObjectUri, parse_uri, uri_of
from swaplora_adapters.store.staging import FILE_NAMES, Part, Staging, Writer

BAD_URIS = {
    "no folder": "file:",
    "another scheme": "https://huggingface.co/org/repo",
    "a scheme in capitals": "HF://org/repo",
    "no repository": "hf://org",
    "an empty part": "hf://org//repo",
    "an empty sub-folder": "hf://org/repo/",
    "a parent": "hf://org/repo/../other",
    "a parent as revision": "hf://org/repo@../x",
    "a dot": "s3://bucket/./prefix",
    "no prefix": "s3://bucket",
    "a trailing slash": "s3://bucket/prefix/",
    "a parent of the folder": "file:../secret",
    "a parent of an absolute folder": "file:/a/../b",
    "a host": "file://host/a",
    "a NUL": "file:a\0b",
    "a line break": "hf://org/repo\n",
    "a right-to-left override": "file:a\u202eb",
    "a backslash": "file:..\\secret",
    "a query": "hf://org/repo?token=hunter2",
    "a fragment": "s3://bucket/prefix#x",
    "userinfo": "hf://user:hunter2@org/repo",
    "userinfo in a bucket": "s3://key:hunter2@bucket/prefix",
    "an empty revision": "hf://org/repo@",
    "a long revision": "hf://org/repo@" + "a" * 129,
    "two revisions": "hf://org/repo@a@b",
    "513 characters": "s3://bucket/" + "a" * 501,
}


@pytest.fixture
def staging(tmp_path: Path) -> Iterator[Staging]:
    """What a fetch writes into. Whatever the test did, nothing else lies beside it afterwards."""
    parent = tmp_path / "staging"
    parent.mkdir()
    with Staging(parent) as staging:
        yield staging
        assert {path.name for path in staging.path.iterdir()} <= {CONFIG_FILE, WEIGHTS_FILE}
    assert not list(parent.iterdir())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """An adapter folder with one adapter in it, `team/one`; beside it another, which is none of its business."""
    write_adapter(tmp_path / "outside" / "one")
    write_adapter(tmp_path / "root" / "team" / "one")
    return tmp_path / "root"


def of_folder(root: Path, max_weights_bytes: int = 1 << 20) -> Sources:
    return Sources(allowed=(), folder=root, max_weights_bytes=max_weights_bytes)


@pytest.mark.parametrize("uri", BAD_URIS.values(), ids=BAD_URIS)
def test_a_badly_written_source_is_refused_and_no_password_repeated(uri: str, root: Path, staging: Staging) -> None:
    sources = Sources(allowed=("hf://", "s3://bucket"), folder=root, max_weights_bytes=1 << 20)
    with pytest.raises(SourceNotAllowedError) as refusal:
        sources.fetch(uri, staging)
    assert "hunter2" not in str(refusal.value)


def test_sources_are_read_as_written() -> None:
    assert parse_uri("hf://org/repo") == HubUri("org", "repo", "main", ())
    assert parse_uri("hf://org/repo@v1.2/a/b") == HubUri("org", "repo", "v1.2", ("a", "b"))
    assert parse_uri("s3://bucket/a/b") == ObjectUri("bucket", ("a", "b"))
    for text in ("hf://org/repo@v1.2/a/b", "s3://bucket/a/b", "file:a/b"):
        assert str(parse_uri(text)) == text


def test_what_names_no_scheme_is_a_folder() -> None:
    assert uri_of("team/one") == "file:team/one"
    assert uri_of("/srv/adapters/one/") == "file:/srv/adapters/one"
    for uri in ("hf://org/repo", "s3://bucket/a", "file:a"):
        assert uri_of(uri) == uri


@pytest.mark.parametrize(
    ("allowed", "uri"),
    [
        ("hf://my-org", "hf://my-org-evil/repo"),
        ("hf://my-org", "hf://MY-ORG/repo"),
        ("hf://my-org/repo", "hf://my-org/repo-evil"),
        ("hf://my-org/repo", "hf://my-org/repos@repo"),
        ("hf://", "s3://bucket/prefix"),
        ("s3://bucket", "s3://bucket-evil/prefix"),
        ("s3://bucket/a", "s3://bucket/ab"),
        ("s3://bucket/a/b", "s3://bucket/a"),
        ("s3://bucket/a", "hf://org/repo"),
    ],
)
def test_a_prefix_admits_whole_parts_only(allowed: str, uri: str, staging: Staging) -> None:
    sources = Sources(allowed=(allowed,), folder=None, max_weights_bytes=1)
    with pytest.raises(SourceNotAllowedError, match="--allow-source"):
        sources.fetch(uri, staging)


@pytest.mark.parametrize(
    "prefix", ["", "hf:", "hf://a/b/c", "hf://a//", "hf://a@b", "s3://", "s3://B", "file:a", "https://a", "s3://b/.."]
)
def test_a_badly_written_prefix_is_refused_at_the_start(prefix: str) -> None:
    with pytest.raises(SourceNotAllowedError):
        Sources(allowed=("hf://", prefix), folder=None, max_weights_bytes=1)


def test_folders_are_refused_without_an_adapter_folder(staging: Staging) -> None:
    with pytest.raises(SourceNotAllowedError, match="--adapter-dir"):
        Sources(allowed=("hf://",), folder=None, max_weights_bytes=1).fetch("file:a", staging)


@pytest.mark.parametrize("is_absolute", [False, True])
def test_a_folder_below_the_adapter_folder_is_copied(root: Path, staging: Staging, is_absolute: bool) -> None:
    path = str(root / "team" / "one") if is_absolute else "team/one"
    assert of_folder(root).fetch(uri_of(path), staging) == "file:team/one"
    assert staging.weights_path.read_bytes() == (root / "team" / "one" / WEIGHTS_FILE).read_bytes()
    assert staging.config_path.read_bytes() == (root / "team" / "one" / CONFIG_FILE).read_bytes()


def test_a_link_within_the_adapter_folder_is_followed_and_told(root: Path, staging: Staging) -> None:
    (root / "latest").symlink_to(root / "team" / "one")
    assert of_folder(root).fetch("file:latest", staging) == "file:team/one"


def link_folder(root: Path) -> str:
    (root / "link").symlink_to(root.parent / "outside" / "one")
    return "file:link"


def link_file(root: Path) -> str:
    (root / "team" / "one" / WEIGHTS_FILE).unlink()
    (root / "team" / "one" / WEIGHTS_FILE).symlink_to(root.parent / "outside" / "one" / WEIGHTS_FILE)
    return "file:team/one"


def link_to_nothing(root: Path) -> str:
    (root / "link").symlink_to(root.parent / "nothing")
    return "file:link"


def absolute(root: Path) -> str:
    return f"file:{root.parent}/outside/one"


def absolute_and_absent(root: Path) -> str:
    return f"file:{root.parent}/outside/nothing"


def sibling(root: Path) -> str:
    write_adapter(root.parent / "root-evil")
    return f"file:{root.parent}/root-evil"


def itself(root: Path) -> str:
    return f"file:{root}"


@pytest.mark.parametrize(
    "escape", [link_folder, link_file, link_to_nothing, absolute, absolute_and_absent, sibling, itself]
)
def test_nothing_outside_the_adapter_folder_is_read_or_told(
    root: Path, staging: Staging, escape: Callable[[Path], str]
) -> None:
    with pytest.raises(SourceNotAllowedError, match="--adapter-dir") as refusal:
        of_folder(root).fetch(escape(root), staging)
    assert str(root.parent) not in str(refusal.value)
    assert not staging.weights_path.exists()


def test_a_folder_or_file_that_is_not_there_is_not_found(root: Path, staging: Staging) -> None:
    sources = of_folder(root)
    with pytest.raises(SourceNotFoundError, match="file:team/two: there is no such folder"):
        sources.fetch("file:team/two", staging)
    with pytest.raises(SourceNotFoundError, match=f"file:team: reading {CONFIG_FILE}: there is no such file"):
        sources.fetch("file:team", staging)
    (root / "team" / "one" / WEIGHTS_FILE).rename(root / "team" / "one" / "adapter_model.bin")
    with pytest.raises(SourceNotFoundError, match=f"{WEIGHTS_FILE} only, never from adapter_model.bin"):
        sources.fetch("file:team/one", staging)


def test_a_pipe_is_refused_and_not_waited_for(root: Path, staging: Staging) -> None:
    (root / "team" / "one" / WEIGHTS_FILE).unlink()
    os.mkfifo(root / "team" / "one" / WEIGHTS_FILE)
    with pytest.raises(InvalidAdapterError, match=r"file:team/one: .* not a regular file"):
        of_folder(root).fetch("file:team/one", staging)


@pytest.mark.parametrize("replaced", ["config", "weights"])
def test_a_pair_of_which_one_file_is_replaced_meanwhile_is_not_taken(
    root: Path, tmp_path: Path, replaced: Part
) -> None:
    class Meddling(Staging):
        def writer(self, part: Part, max_bytes: int) -> Writer:
            if part == "weights":
                write_adapter(root / "new", seed=1)
                (root / "new" / FILE_NAMES[replaced]).rename(root / "team" / "one" / FILE_NAMES[replaced])
            return super().writer(part, max_bytes)

    with Meddling(tmp_path) as staging, pytest.raises(ReplacedMeanwhileError, match=r"^file:team/one: its files were"):
        of_folder(root).fetch("file:team/one", staging)


def test_nothing_is_fetched_once_the_server_stops(root: Path, staging: Staging) -> None:
    sources = of_folder(root)
    sources.stop()
    with pytest.raises(StoppingError, match="the server is stopping"):
        sources.fetch("file:team/one", staging)


def test_a_loop_of_links_is_not_found(root: Path, staging: Staging) -> None:
    (root / "loop").symlink_to(root / "loop")
    with pytest.raises(SourceNotFoundError):
        of_folder(root).fetch("file:loop", staging)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_fails_without_its_path(root: Path, staging: Staging) -> None:
    (root / "team" / "one" / CONFIG_FILE).chmod(0)
    with pytest.raises(SourceFailedError, match=f"^file:team/one: reading {CONFIG_FILE}: Permission denied$"):
        of_folder(root).fetch("file:team/one", staging)


def test_files_past_their_limit_are_too_large(root: Path, staging: Staging) -> None:
    size = (root / "team" / "one" / WEIGHTS_FILE).stat().st_size
    of_folder(root, size).fetch("file:team/one", staging)
    with pytest.raises(AdapterTooLargeError, match=r"file:team/one: reading adapter_model\.safetensors"):
        of_folder(root, size - 1).fetch("file:team/one", staging)
    (root / "team" / "one" / CONFIG_FILE).write_bytes(b" " * ((1 << 20) + 1))
    with pytest.raises(AdapterTooLargeError, match=CONFIG_FILE):
        of_folder(root, size).fetch("file:team/one", staging)


def test_no_clients_library_is_imported_before_it_is_needed() -> None:
    modules = "source", "folder", "uri", "resolver", "transfer", "workers"
    imports = ", ".join(f"swaplora_adapters.sources.{module}" for module in modules)
    clients = {"boto3", "botocore", "huggingface_hub", "httpx2", "torch"}
    script = f"import sys, {imports}; print({clients} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()", done.stdout
