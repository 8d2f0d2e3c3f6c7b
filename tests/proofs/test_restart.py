"""What was acknowledged is there after the process is killed, with the same digest and the same answers."""

import os
import signal
import socket
from pathlib import Path

from server_process import SMALL, forked, refused
from serving import Running

PROMPT = list(range(70, 90))


def test_acknowledged_adapters_survive_kill_nine(base: Path, adapters: list[Path], tmp_path: Path) -> None:
    with forked(base, tmp_path, *SMALL) as (server, client):
        running = Running(str(client.base_url), None, client)  # type: ignore[arg-type]  # another process's
        for name, folder in [("one", adapters[0]), ("two", adapters[1]), ("one", adapters[2])]:
            assert running.put(name, folder).status_code in (200, 201)
        assert client.delete("/v1/adapters/one?version=1").status_code == 200
        cards = [client.get(f"/v1/adapters/{name}").json() for name in ("one", "two")]
        answers = [running.token_ids(name, PROMPT) for name in ("one", "two")]
        os.kill(server.pid, signal.SIGKILL)
        server.wait()
    with forked(base, tmp_path, *SMALL) as (server, client):
        running = Running(str(client.base_url), None, client)  # type: ignore[arg-type]  # another process's
        again = [client.get(f"/v1/adapters/{name}").json() for name in ("one", "two")]
        for before, after in zip(cards, again, strict=True):
            assert {**before, "state": "", "last_used": 0} == {**after, "state": "", "last_used": 0}
        assert [running.token_ids(name, PROMPT) for name in ("one", "two")] == answers
        assert [card["versions"][-1]["version"] for card in again] == [2, 1]


def test_two_servers_on_one_data_folder_is_one_line(base: Path, tmp_path: Path) -> None:
    with forked(base, tmp_path, *SMALL):
        told = refused(base, tmp_path, *SMALL, "--port", "0")
    assert "in use by another process" in told
    assert "Traceback" not in told


def test_a_port_in_use_is_one_line_with_a_remedy(base: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        told = refused(base, tmp_path, "--port", str(taken.getsockname()[1]))
    assert "choose another --port" in told
    assert "Traceback" not in told
