import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

import swaplora_server
from swaplora_server.banner import Progress, human_bytes, show_banner
from swaplora_server.cli import app, spread_values
from swaplora_server.config import Settings

CARD = {
    "name": "sql",
    "version": 2,
    "state": "resident",
    "rank": 8,
    "bytes": 1536,
    "in_flight": 3,
    "digest": "sha256:" + "ab" * 32,
}
MODELS = {"data": [{"id": "base", "parent": None}, {"id": "sql", "parent": "base"}]}
RUN = "from swaplora_server.cli import main; main()"
SLOW = ("torch", "transformers", "fastapi", "numpy", "swaplora_adapters", "httpx", "pydantic_settings")


@dataclass
class Call:
    """A request as the stand-in server got it."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


@dataclass
class StandIn:
    """Answers every request from a table of (method, path) and remembers what was asked."""

    url: str = ""
    answers: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)

    def answer(self, method: str, path: str, content: object, status: int = 200) -> None:
        self.answers[method, path] = status, content if isinstance(content, str) else json.dumps(content)

    def refuse(self, method: str, path: str, status: int, message: str, code: str) -> None:
        self.answer(method, path, {"error": {"message": message, "code": code}}, status)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    stand_in = StandIn()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            stand_in.calls.append(Call(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, body))
            status, content = stand_in.answers.get((self.command, self.path), (404, "no such page"))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content.encode())

        do_GET = do_PUT = do_POST = do_DELETE = answer

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on stderr, which belongs to the command under test."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        stand_in.url = f"http://127.0.0.1:{http.server_port}"
        monkeypatch.setenv("SWAPLORA_URL", stand_in.url)
        thread = Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield stand_in
        http.shutdown()
        thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "adapter_config.json").write_text('{"r": 8}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights" * 50_000)
    return tmp_path


class StartError(RuntimeError):
    """What the stand-in for the server raises."""


def replace_server(monkeypatch: pytest.MonkeyPatch, run: Callable[[Settings], None]) -> None:
    """Put `run` in the place of the real server, which imports torch."""
    module = ModuleType("swaplora_server.serve")
    monkeypatch.setattr(module, "run", run, raising=False)
    monkeypatch.setattr(module, "StartError", StartError, raising=False)
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """What `serve` started a server with."""
    settings: list[Settings] = []
    replace_server(monkeypatch, settings.append)
    return settings


def swaplora(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(app, spread_values(args), input=stdin)


def stream(*texts: str, end: str = "data: [DONE]\n\n") -> str:
    chunks = [{"choices": [{"delta": {"role": "assistant", "content": ""}}]}]
    chunks += [{"choices": [{"delta": {"content": text}}]} for text in texts]
    chunks += [{"choices": []}]
    return ": ping\n\n" + "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + end


def asked(server: StandIn) -> list[list[dict[str, str]]]:
    """The conversation in each chat request."""
    return [json.loads(call.body)["messages"] for call in server.calls if call.method == "POST"]


@pytest.mark.parametrize(
    "command",
    ["", "serve", "chat", "adapters", "adapters list", "adapters get", "adapters put", "adapters delete"],
)
def test_help_imports_nothing_slow(command: str) -> None:
    report = f"print(*({set(SLOW)} & sys.modules.keys()), file=sys.stderr)"
    code = f"import atexit, sys; atexit.register(lambda: {report}); {RUN}"
    done = subprocess.run(
        [sys.executable, "-c", code, *command.split(), "--help"],
        cwd=Path(swaplora_server.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Usage:" in done.stdout
    assert done.stderr == "\n"


def test_serve_hands_its_flags_to_the_server(started: list[Settings], tmp_path: Path) -> None:
    done = swaplora(
        *("serve", "org/model", "--port", "0", "--device", "cpu", "--kv-cache-bytes", "2GiB", "--log-json"),
        *("--adapter", f"a={tmp_path}", "--adapter", f"b={tmp_path}", "--data-dir", str(tmp_path)),
    )
    assert done.exit_code == 0, done.output
    (settings,) = started
    assert settings.model_dump(exclude_defaults=True, exclude={"data_dir", "cache_dir"}) == {
        "base": "org/model",
        "port": 0,
        "device": "cpu",
        "kv_cache_bytes": 2**31,
        "log_json": True,
        "adapter": (f"a={tmp_path}", f"b={tmp_path}"),
    }
    assert settings.data_dir == tmp_path


def test_a_flag_that_is_not_given_leaves_the_environment_in_force(
    started: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SWAPLORA_INSECURE_NO_AUTH", "1")
    assert swaplora("serve", "--host", "0.0.0.0").exit_code == 0
    assert started[0].insecure_no_auth


def test_every_setting_has_a_flag() -> None:
    text = swaplora("serve", "--help").output
    flags = {"--" + name.replace("_", "-") for name in Settings.model_fields} - {"--base"}
    assert [flag for flag in sorted(flags) if flag not in text] == []


def test_other_servers_flags_are_understood(started: list[Settings], tmp_path: Path) -> None:
    module = json.dumps({"name": "b", "path": str(tmp_path), "base_model_name": "org/model"})
    done = swaplora(
        *("serve", "--model", "org/model", "--enable-lora", "--max-num-batched-tokens", "99", "--max-lora-rank", "64"),
        *("--lora-modules", f"a={tmp_path}", module, f"c={tmp_path}"),
    )
    assert done.exit_code == 0, done.output
    assert done.stderr == "swaplora: --max-lora-rank is ignored: only --adapter-memory-bytes limits adapters\n"
    (settings,) = started
    assert (settings.base, settings.max_batch_tokens) == ("org/model", 99)
    assert list(settings.adapter_folders) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--host", "0.0.0.0"], "swaplora: host: other machines can reach 0.0.0.0"),
        (["--port", "70000"], "swaplora: port: Input should be less than or equal to 65535 (--port, SWAPLORA_PORT"),
        (["--config", "/nowhere.yaml"], "swaplora: config: cannot read /nowhere.yaml: No such file or directory"),
        (["one", "--model", "two"], "swaplora: BASE and --model name different models"),
        (["--lora-modules", '{"name": "a"}'], 'swaplora: --lora-modules: {"name": "a"} is neither NAME=PATH'),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_2(started: list[Settings], args: list[str], complaint: str) -> None:
    done = swaplora("serve", *args)
    assert done.exit_code == 2
    assert done.stderr.startswith(complaint)
    assert done.stderr.count("\n") == 1
    assert started == []


def test_a_server_that_cannot_start_is_one_line_and_exit_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: Settings) -> None:
        raise StartError("cannot listen on 127.0.0.1:8000")

    replace_server(monkeypatch, run)
    done = swaplora("serve")
    assert (done.exit_code, done.stderr) == (1, "swaplora: cannot listen on 127.0.0.1:8000\n")


def test_list_shows_every_page(server: StandIn) -> None:
    other = CARD | {"name": "poet", "bytes": 3 * 2**20}
    server.answer("GET", "/v1/adapters", {"data": [CARD], "has_more": True})
    server.answer("GET", "/v1/adapters?after=sql", {"data": [other], "has_more": False})
    lines = swaplora("adapters", "list").output.splitlines()
    assert lines[0].split() == ["name", "version", "state", "rank", "size", "running", "digest"]
    assert lines[1].split() == ["sql", "2", "resident", "8", "1.5", "KiB", "3", "abababababab"]
    assert lines[2].split()[:1] == ["poet"]
    assert json.loads(swaplora("adapters", "list", "--json").output) == [CARD, other]


def test_get_shows_the_card(server: StandIn) -> None:
    server.answer("GET", "/v1/adapters/sql", CARD)
    shown = dict(line.split(maxsplit=1) for line in swaplora("adapters", "get", "sql").output.splitlines())
    assert shown["version"].strip() == "2"
    assert shown["bytes"].strip() == "1.5 KiB"
    assert json.loads(swaplora("adapters", "get", "sql", "--json").output) == CARD


def test_put_sends_both_files_and_says_what_was_stored(server: StandIn, folder: Path) -> None:
    server.answer("PUT", "/v1/adapters/sql", CARD, 201)
    done = swaplora("adapters", "put", "sql", str(folder), "--if-match", "sha256:00", "--api-key", "secret")
    assert (done.exit_code, done.stdout) == (0, "sql@2 is stored (abababababab)\n")
    (call,) = server.calls
    assert call.headers["authorization"] == "Bearer secret"
    assert call.headers["if-match"] == '"sha256:00"'
    assert "if-none-match" not in call.headers
    config, weights = call.body.split(b"\r\n--")[:2]
    assert b'name="config"' in config
    assert config.endswith(b'{"r": 8}')
    assert b'name="weights"' in weights
    assert weights.endswith(b"\r\n\r\n" + b"weights" * 50_000)


def test_put_can_refuse_to_replace(server: StandIn, folder: Path) -> None:
    server.refuse("PUT", "/v1/adapters/sql", 412, "sql exists", "precondition_failed")
    done = swaplora("adapters", "put", "sql", str(folder), "--create-only")
    assert (done.exit_code, done.stderr) == (1, "swaplora: sql exists (precondition_failed)\n")
    assert server.calls[0].headers["if-none-match"] == "*"


def test_put_of_a_folder_that_is_no_adapter_says_what_is_missing(server: StandIn, folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()
    done = swaplora("adapters", "put", "sql", str(folder))
    assert done.exit_code == 1
    assert "has no adapter_model.safetensors: give the folder that PEFT's save_pretrained wrote" in done.stderr
    assert server.calls == []


def test_delete_of_a_version(server: StandIn) -> None:
    server.answer("DELETE", "/v1/adapters/sql?version=2&timeout=5.0", "", 204)
    done = swaplora("adapters", "delete", "sql", "--version", "2", "--timeout", "5")
    assert (done.exit_code, done.output) == (0, "sql@2 is deleted\n")


def test_delete_says_when_requests_still_run(server: StandIn) -> None:
    server.answer("DELETE", "/v1/adapters/sql", "", 202)
    done = swaplora("adapters", "delete", "sql")
    assert (done.exit_code, done.output) == (0, "sql is deleted; requests that began before still run on it\n")


def test_a_name_cannot_leave_its_place_in_the_path(server: StandIn) -> None:
    swaplora("adapters", "get", "../models?x#y")
    assert server.calls[0].path == "/v1/adapters/..%2Fmodels%3Fx%23y"


@pytest.mark.parametrize(
    ("status", "content", "complaint"),
    [
        (
            404,
            {"error": {"message": "no adapter sql", "code": "adapter_not_found"}},
            "no adapter sql (adapter_not_found)",
        ),
        (422, {"error": {"message": "a\n\x1b[2Jb", "code": "invalid_adapter"}}, "a [2Jb (invalid_adapter)"),
        (
            401,
            {"error": {"message": "no key", "code": "invalid_api_key"}},
            "no key (invalid_api_key): give --api-key or set SWAPLORA_API_KEY",
        ),
        (404, {"error": "what?"}, "URL/v1/adapters/sql answered 404 Not Found"),
        (502, "<html>", "URL/v1/adapters/sql answered 502 Bad Gateway"),
        (200, "<html>", "what answers at URL is not swaplora: check --url"),
    ],
)
def test_a_refusal_is_one_line_and_exit_1(server: StandIn, status: int, content: object, complaint: str) -> None:
    server.answer("GET", "/v1/adapters/sql", content, status)
    done = swaplora("adapters", "get", "sql")
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr == f"swaplora: {complaint.replace('URL', server.url)}\n"


def test_no_server_says_how_to_start_one() -> None:
    done = swaplora("adapters", "list", "--url", "http://127.0.0.1:1")
    assert done.exit_code == 1
    assert done.stderr == (
        "swaplora: no server answers at http://127.0.0.1:1: start one with `swaplora serve`, or give its --url\n"
    )


def test_an_address_needs_its_scheme() -> None:
    assert "must begin with http://" in swaplora("adapters", "list", "--url", "127.0.0.1:8000").stderr


def test_chat_says_one_message_to_the_base(server: StandIn) -> None:
    server.answer("GET", "/v1/models", MODELS)
    server.answer("POST", "/v1/chat/completions", stream("Par", "is."))
    done = swaplora("chat", "--message", "Capital of France?")
    assert (done.exit_code, done.output) == (0, "Paris.\n")
    assert json.loads(server.calls[-1].body) == {
        "model": "base",
        "messages": [{"role": "user", "content": "Capital of France?"}],
        "stream": True,
    }


def test_chat_takes_piped_text_as_one_message(server: StandIn) -> None:
    server.answer("POST", "/v1/chat/completions", stream("ok"))
    assert swaplora("chat", "sql@2", stdin="two\nlines\n").output == "ok\n"
    assert json.loads(server.calls[0].body)["model"] == "sql@2"
    assert asked(server) == [[{"role": "user", "content": "two\nlines\n"}]]


@pytest.mark.parametrize(
    ("end", "complaint"),
    [
        (
            'data: {"error": {"message": "bad row", "code": "engine_failed"}}\n\ndata: [DONE]\n\n',
            "bad row (engine_failed)",
        ),
        ("", "the answer broke off: the server ended the stream early"),
    ],
)
def test_an_answer_that_fails_midway_is_not_taken_for_whole(server: StandIn, end: str, complaint: str) -> None:
    server.answer("POST", "/v1/chat/completions", stream("Par", end=end))
    done = swaplora("chat", "sql", "-m", "hi")
    assert (done.exit_code, done.stdout, done.stderr) == (1, "Par", f"swaplora: {complaint}\n")


def test_chat_refused_before_the_stream(server: StandIn) -> None:
    server.refuse("POST", "/v1/chat/completions", 404, "no model x", "model_not_found")
    assert swaplora("chat", "x", "-m", "hi").stderr == "swaplora: no model x (model_not_found)\n"


def converse(typed: str) -> str:
    """What a person at a terminal sees who starts `swaplora chat` and types this."""
    ours, theirs = pty.openpty()
    os.write(ours, typed.encode())
    with subprocess.Popen(
        [sys.executable, "-c", RUN, "chat"],
        cwd=Path(swaplora_server.__file__).parents[1],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as chat:
        shown, _ = chat.communicate(timeout=20)
    os.close(theirs)
    os.close(ours)
    return shown


def test_a_conversation_remembers_until_it_is_reset(server: StandIn) -> None:
    server.answer("GET", "/v1/models", MODELS)
    server.answer("POST", "/v1/chat/completions", stream("yes"))
    shown = converse("one\n/model sql\n\ntwo\n/reset\nthree\n/models\n/what\n/quit\n")
    one, two, three = ({"role": "user", "content": text} for text in ("one", "two", "three"))
    yes = {"role": "assistant", "content": "yes"}
    assert asked(server) == [[one], [one, yes, two], [three]]
    assert [json.loads(call.body)["model"] for call in server.calls if call.method == "POST"] == ["base", "sql", "sql"]
    assert "base\nsql\n" in shown
    assert "The commands are /model NAME" in shown


def test_a_refused_turn_leaves_the_conversation_as_it_was(server: StandIn) -> None:
    server.answer("GET", "/v1/models", MODELS)
    server.refuse("POST", "/v1/chat/completions", 429, "try later", "overloaded")
    shown = converse("one\ntwo\n\x04")
    assert shown.count("swaplora: try later (overloaded)") == 2
    assert asked(server) == [[{"role": "user", "content": "one"}], [{"role": "user", "content": "two"}]]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (4 * 2**30, "4 GiB"), (2**50, "1024 TiB")],
)
def test_bytes_are_shown_for_people(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_the_banner_says_where_and_what() -> None:
    shown = io.StringIO()
    show_banner(
        Console(file=shown, width=100),
        url="http://127.0.0.1:8000",
        base="smol",
        device="cpu",
        dtype="bf16",
        memory=[("base", 2**28), ("KV cache", 2**30)],
        adapters=["[sql]", *map(str, range(20))],
        seconds=2.34,
    )
    text = shown.getvalue()
    assert "http://127.0.0.1:8000" in text
    assert "smol (cpu, bf16)" in text
    assert "base 256 MiB · KV cache 1 GiB" in text
    assert "[sql], 0, 1, 2" in text
    assert "and 9 more" in text
    assert "ready in 2.3 s" in text


def test_progress_is_a_line_a_step_when_nobody_watches() -> None:
    shown = io.StringIO()
    with Progress(Console(file=shown)) as progress:
        progress.step("loading [weights]")
        progress.step("compiling")
    assert shown.getvalue() == "loading [weights]\ncompiling\n"


def test_progress_on_a_terminal_ends_each_step_with_its_outcome() -> None:
    shown = io.StringIO()
    console = Console(file=shown, force_terminal=True, color_system=None)

    def start() -> None:
        with Progress(console) as progress:
            progress.step("loading")
            progress.step("compiling")
            raise KeyError

    with pytest.raises(KeyError):
        start()
    assert "✓ loading (0.0 s)" in shown.getvalue()
    assert "✗ compiling (0.0 s)" in shown.getvalue()


def test_json_cards_survive_unknown_fields(server: StandIn) -> None:
    card: dict[str, Any] = {"name": "sql", "new": {"deep": [1, None]}}
    server.answer("GET", "/v1/adapters/sql", card)
    assert '{"deep": [1, null]}' in swaplora("adapters", "get", "sql").output
    server.answer("GET", "/v1/adapters", {"data": [card]})
    assert swaplora("adapters", "list").output.splitlines()[1].split() == ["sql", "-", "-", "-", "0", "B", "-", "-"]
