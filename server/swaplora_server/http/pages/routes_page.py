"""GET /docs: the OpenAPI document as a page, whole in itself, without scripts."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

from swaplora_server.access.caller import KeyScope
from swaplora_server.http.auth import needs

router = APIRouter()
Schema = Mapping[str, Any]
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "code{font-size:.9em}summary{cursor:pointer;padding:.3rem 0}table{border-collapse:collapse;margin:.5rem 0 1rem}"
    "td,th{text-align:left;vertical-align:top;padding:.15rem 1rem .15rem 0;border-bottom:1px solid #8884}"
)
_BOUNDS = {
    "minimum": "at least",
    "exclusiveMinimum": "more than",
    "maximum": "at most",
    "exclusiveMaximum": "less than",
    "minLength": "characters, at least",
    "maxLength": "characters, at most",
    "minItems": "items, at least",
    "maxItems": "items, at most",
    "default": "else",
}


@router.get("/docs", include_in_schema=False)
@needs(*KeyScope)
async def routes_page(request: Request) -> HTMLResponse:
    """Every route with its parameters and the fields of its body."""
    return HTMLResponse(page_of(request.app.openapi()), headers={"Content-Security-Policy": _POLICY})


def page_of(document: Mapping[str, Any]) -> str:
    """The page of an OpenAPI document."""
    title = escape(f"{document['info']['title']}: routes")
    root = escape("".join(server["url"] for server in document.get("servers", [])))
    told = "".join(
        _operation(method.upper(), root + escape(path), operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta name="viewport" content="width=device-width"><style>{_STYLE}</style></head>'
        f'<body><h1>{title}</h1><p>For programs: <a href="{root}/openapi.json">openapi.json</a></p>{told}</body></html>'
    )


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    """One route, folded."""
    rows = [
        _row(f"{parameter['name']} ({parameter['in']})", parameter["schema"], parameter.get("required", False))
        for parameter in operation.get("parameters", [])
    ]
    bodies = "".join(
        f"<p>Body: <code>{escape(kind)}</code></p>{_body(content.get('schema', {}))}"
        for kind, content in operation.get("requestBody", {}).get("content", {}).items()
    )
    does = escape(operation.get("description") or operation.get("summary") or "")
    return (
        f"<details><summary><code>{method} {path}</code> {does.partition(chr(10))[0]}</summary>"
        f"<p>{does}</p>{_table(rows)}{bodies}</details>"
    )


def _body(schema: Schema) -> str:
    """Its fields; of one that may be of several kinds, those of each."""
    if "oneOf" in schema:
        return "<p>or</p>".join(map(_body, schema["oneOf"]))
    if "properties" not in schema:
        return f"<p>{_type(schema)}</p>"
    required = schema.get("required", ())
    return _table([_row(name, field, name in required) for name, field in schema["properties"].items()])


def _table(rows: list[str]) -> str:
    return f"<table>{''.join(rows)}</table>" if rows else ""


def _row(name: str, schema: Schema, is_required: bool) -> str:
    bounds = [f"{words} {escape(str(schema[key]))}" for key, words in _BOUNDS.items() if schema.get(key) is not None]
    told = ", ".join([_type(schema), *(["required"] if is_required else []), *bounds])
    return f"<tr><td><code>{escape(name)}</code></td><td>{told}</td></tr>"


def _type(schema: Schema) -> str:
    """In a few words: a field's type, and what it holds."""
    kinds = [_type(one) for key in ("anyOf", "oneOf") for one in schema.get(key, ()) if one.get("type") != "null"]
    if kinds:
        return " or ".join(dict.fromkeys(kinds))
    if values := list(_values(schema)):
        return " or ".join(f"<code>{escape(value)}</code>" for value in values)
    if "items" in schema:
        return f"list of {_type(schema['items'])}"
    if "properties" in schema:
        return f"object of {', '.join(f'<code>{escape(name)}</code>' for name in schema['properties'])}"
    return escape(str(schema.get("type", "anything")))


def _values(schema: Schema) -> Iterator[str]:
    yield from map(str, schema.get("enum", ()))
    if "const" in schema:
        yield str(schema["const"])
