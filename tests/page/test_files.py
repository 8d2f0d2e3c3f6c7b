"""What is answered below /ui, without a browser: the files that there are, to anybody, and nothing else."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving import Running, serving, settings
from swaplora_server.http.pages.ui_page import FILES, FOLDER

POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "connect-src": "'self'",
    "img-src": "'self' data:",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}


@pytest.fixture(scope="module")
def locked(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A server with a key."""
    with serving(settings(base, tmp_path_factory.mktemp("data"), api_key=("key",))) as running:
        yield running


def test_every_file_is_served_to_anybody_under_a_strict_policy(locked: Running) -> None:
    for path in ("/ui", *(f"/ui/{name}" for name in FILES)):
        answer = locked.client.get(path)
        assert answer.status_code == 200, path
        assert dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; ")) == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-type"].split(";")[0] in {
            "text/html",
            "text/css",
            "text/javascript",
            "image/svg+xml",
        }
        assert "set-cookie" not in answer.headers
        again = locked.client.get(path, headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_nothing_else_is_there(locked: Running) -> None:
    for path in ("/ui/app.py", "/ui/../config.py", "/ui/%2e%2e/config.py", "/ui//etc/passwd", "/ui/shared", "/uix"):
        answer = locked.client.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path


def test_a_slash_too_many_leads_to_the_page(locked: Running) -> None:
    answer = locked.client.get("/ui/")
    assert (answer.status_code, answer.headers["location"]) == (307, "../ui")


def test_the_page_names_what_is_there_by_its_own_address_alone() -> None:
    for path in FOLDER.rglob("*"):
        if path.suffix in (".html", ".css", ".js"):
            text = path.read_text()
            assert not re.search(r"https?://(?!www\.w3\.org/)|[\"'(]//", text), path
            assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|style=", text), path
    named = re.findall(r'(?:src|href)="ui/([^"]+)"', FILES["index.html"].body.decode())
    imported = {
        (path.parent / name).resolve().relative_to(FOLDER).as_posix()
        for path in FOLDER.rglob("*.js")
        for name in re.findall(r'from "(\.[^"]+)"', path.read_text())
    }
    assert {*named, *imported, "index.html"} == FILES.keys()


def test_the_page_can_be_left_out(base: Path, tmp_path: Path) -> None:
    with serving(settings(base, tmp_path, ui=False)) as server:
        assert [server.client.get(path).status_code for path in ("/ui", "/ui/", "/ui/app.js", "/docs")] == [
            404,
            404,
            404,
            200,
        ]
