"""GET /ui: the page, whose files lie in `ui/` of this package. They are public, the same for all, and know nothing."""

from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter, Request
from starlette.responses import Response

from swaplora_server.http.auth import public
from swaplora_server.service.errors import RequestError

router = APIRouter()
FOLDER = Path(__file__).parents[2] / "ui"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # kept, and asked for again: an upgraded server has another page
}


class File(NamedTuple):
    """What is answered for one path."""

    body: bytes
    media_type: str
    etag: str


def _files() -> Iterator[tuple[str, File]]:
    """Path below `/ui/` → file."""
    for path in sorted(FOLDER.rglob("*")):
        if path.suffix in _TYPES:
            body = path.read_bytes()
            file = File(body, _TYPES[path.suffix], f'"{sha256(body).hexdigest()[:32]}"')
            yield path.relative_to(FOLDER).as_posix(), file


FILES: Mapping[str, File] = dict(_files())  # all there is: no path of a request reaches the disk


@router.get("/ui", include_in_schema=False)
@public
async def page(request: Request) -> Response:
    """The page; where its files and the API are it finds from its own address, below any `--root-path`."""
    return _answer(request, FILES["index.html"])


@router.get("/ui/{path:path}", include_in_schema=False)
@public
async def page_file(request: Request, path: str) -> Response:
    """What the page is made of; `/ui/` leads to the page."""
    if not path:
        return Response(status_code=307, headers={"Location": "../ui"})
    if path not in FILES:
        raise RequestError("not_found", "the page has no such file")
    return _answer(request, FILES[path])


def _answer(request: Request, file: File) -> Response:
    headers = {**_HEADERS, "ETag": file.etag}
    if request.headers.get("if-none-match") == file.etag:
        return Response(status_code=304, headers=headers)
    return Response(file.body, media_type=file.media_type, headers=headers)
