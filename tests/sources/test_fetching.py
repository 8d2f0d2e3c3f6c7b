"""Adapters from a hub and an object store, over HTTP: put by name of their source, or by being asked for."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from fake_hub import Answer, FakeHub, run_fake_hub
from serving import Running, serving, settings
from swaplora_adapters.files.naming import CONFIG_FILE, WEIGHTS_FILE
from swaplora_adapters.sources import transfer

PROMPT = list(range(30, 50))
COMMIT, NEXT = "1" * 40, "2" * 40


@pytest.fixture
def hub(adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with org/sql, whose failed requests are tried again at once."""
    monkeypatch.setattr(transfer, "BACKOFF_SECONDS", (0.0, 0.0))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    with run_fake_hub() as started:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", started.url)
        monkeypatch.setenv("HF_ENDPOINT", started.url)
        started.put_repo("org/sql", "main", COMMIT, adapters[1])
        yield started


@pytest.fixture
def fetching(base: Path, hub: FakeHub, tmp_path: Path) -> Iterator[Running]:
    """A server that may fetch from org, and looks for unknown names there."""
    fields = {"allow_source": ("hf://org",), "resolver": "hf://org/{name}"}
    with serving(settings(base, tmp_path / "data", **fields)) as running:
        yield running


def test_a_put_names_a_repository_and_the_card_tells_the_commit(
    fetching: Running, hub: FakeHub, adapters: list[Path]
) -> None:
    answer = fetching.client.put("/v1/adapters/mine", json={"source": "hf://org/sql"})
    assert (answer.status_code, answer.json()["source"]) == (201, f"hf://org/sql@{COMMIT}")
    first = fetching.token_ids("mine", PROMPT)
    hub.put_repo("org/sql", "main", NEXT, adapters[2])
    assert fetching.token_ids("mine", PROMPT) == first  # what was fetched stays what it is
    again = fetching.client.put("/v1/adapters/mine", json={"source": "hf://org/sql"})
    assert (again.json()["version"], again.json()["source"]) == (2, f"hf://org/sql@{NEXT}")
    assert fetching.token_ids("mine", PROMPT) != first == fetching.token_ids("mine@1", PROMPT)


def test_an_unknown_name_is_looked_for_once_however_many_ask(fetching: Running, hub: FakeHub) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: fetching.generate("sql", PROMPT), range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.headers["x-swaplora-adapter"] for answer in answers} == {"sql@1"}
    assert hub.count(WEIGHTS_FILE) == 1
    for _ in range(3):
        assert fetching.generate("nobody", PROMPT).json()["error"]["code"] == "model_not_found"
    assert sum("nobody" in seen.path for seen in hub.seen) == 1


def test_a_deleted_adapter_is_not_looked_for_again(fetching: Running, hub: FakeHub) -> None:
    fetching.token_ids("sql", PROMPT)
    fetching.client.delete("/v1/adapters/sql")
    asked = len(hub.seen)
    assert fetching.generate("sql", PROMPT).status_code == 404
    assert len(hub.seen) == asked


def test_a_hub_that_fails_is_told_with_the_step_and_nobody_else_notices(
    fetching: Running, hub: FakeHub, adapters: list[Path]
) -> None:
    fetching.put("good", adapters[3])
    expected = fetching.token_ids("good", PROMPT)
    hub.put("/api/models/org/sql/revision/main", Answer(503))
    answers = [
        fetching.client.put("/v1/adapters/mine", json={"source": "hf://org/sql"}),
        fetching.generate("sql", PROMPT),
    ]
    for answer in answers:
        assert (answer.status_code, answer.json()["error"]["code"]) == (502, "source_failed")
        assert "resolving the revision" in answer.json()["error"]["message"]
        assert answer.headers["retry-after"]
    assert fetching.client.put("/v1/adapters/mine", json={"source": "hf://other/sql"}).status_code == 400
    assert fetching.token_ids("good", PROMPT) == expected


def test_what_a_hub_sends_is_checked_like_an_upload(fetching: Running, hub: FakeHub) -> None:
    hub.put(f"/org/sql/resolve/{COMMIT}/{CONFIG_FILE}", Answer(body=b'{"peft_type": "LORA", "r": 0}'))
    answer = fetching.client.put("/v1/adapters/mine", json={"source": "hf://org/sql"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (422, "invalid_adapter")
    looked_for = fetching.generate("sql", PROMPT)
    assert (looked_for.status_code, looked_for.json()["error"]["code"]) == (409, "adapter_failed")
    assert not list((fetching.service.settings.data_dir / "staging").iterdir())


def test_a_look_that_ends_after_an_upload_or_a_delete_changes_nothing(
    fetching: Running, hub: FakeHub, adapters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    may_send, was_asked, answer = threading.Event(), threading.Event(), hub.answer

    def late(path: str, headers: Any) -> Answer:
        if path.endswith(WEIGHTS_FILE):
            was_asked.set()
            may_send.wait(30)
        return answer(path, headers)

    monkeypatch.setattr(hub, "answer", late)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(fetching.generate, "sql", PROMPT)
        assert was_asked.wait(30)
        assert fetching.put("sql", adapters[3]).json()["version"] == 1
        fetching.client.delete("/v1/adapters/sql")
        may_send.set()
        assert asking.result().status_code == 404
    assert fetching.client.get("/v1/adapters/sql").status_code == 404


def test_an_object_store_serves_by_name_and_by_being_asked(
    base: Path, adapters: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    store.start()
    host, port = store.get_host_and_port()
    environment = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in (environment | {"AWS_ENDPOINT_URL_S3": f"http://{host}:{port}"}).items():
        monkeypatch.setenv(name, value)
    client = boto3.session.Session().client("s3")
    client.create_bucket(Bucket="models")
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        client.put_object(Bucket="models", Key=f"adapters/sql/{file}", Body=(adapters[2] / file).read_bytes())
    client.close()
    fields = {"allow_source": ("s3://models/adapters",), "resolver": "s3://models/adapters/{name}"}
    try:
        with serving(settings(base, tmp_path / "data", **fields)) as server:
            answer = server.client.put("/v1/adapters/mine", json={"source": "s3://models/adapters/sql"})
            assert answer.status_code == 201, answer.text
            assert answer.json()["source"].startswith("s3://models/adapters/sql (etag")
            assert server.token_ids("sql", PROMPT) == server.token_ids("mine", PROMPT)
            assert server.generate("nobody", PROMPT).status_code == 404
            refused = server.client.put("/v1/adapters/mine", json={"source": "s3://models/other"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "source_not_allowed")
    finally:
        store.stop()
