"""The page that searches, and the page that documents the API; neither loads anything from afar.

Knows nothing of what they ask the service.
"""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, Response
from jinja2 import Environment, StrictUndefined

_SCRIPT_OR_STYLE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)
ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32"><rect width="32" height="32" '
    'rx="8" fill="#2f5d50"/><circle cx="14" cy="14" r="6.5" fill="none" stroke="#fff" '
    'stroke-width="2.6"/><path d="M19 19l6 6" stroke="#fff" stroke-width="2.6" '
    'stroke-linecap="round"/></svg>'
)


def add_pages(app: FastAPI) -> None:
    """Add `/`, `/docs` and the icon."""

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return _html(_read("page.html"))

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return _html(_docs(app))

    @app.get("/favicon.svg", include_in_schema=False)
    async def icon() -> Response:
        return Response(ICON, media_type="image/svg+xml")


def content_policy(html: str) -> str:
    """A Content-Security-Policy under which a page's own scripts and styles run, and no others."""
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, content in _SCRIPT_OR_STYLE.findall(html):
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    return "; ".join(
        [
            "default-src 'none'",
            f"script-src {' '.join(hashes['script']) or chr(39) + 'none' + chr(39)}",
            f"style-src {' '.join(hashes['style'])}",
            "img-src 'self' blob: data:",
            "connect-src 'self'",
            "base-uri 'none'",
            "form-action 'none'",
            "frame-ancestors 'none'",
        ]
    )


def _html(html: str) -> Response:
    headers = {"Content-Security-Policy": content_policy(html), "Cache-Control": "no-cache"}
    return HTMLResponse(html, headers=headers)


@cache
def _read(name: str) -> str:
    return files("jobs.serving").joinpath(name).read_text(encoding="utf-8")


def _docs(app: FastAPI) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    document = app.openapi()
    return environment.from_string(_read("docs.html")).render(
        title=document["info"]["title"],
        version=document["info"]["version"],
        description=document["info"]["description"].replace("`", ""),
        operations=_operations(document),
        schemas={
            name: _fields(schema, document)
            for name, schema in document["components"]["schemas"].items()
        },
    )


def _operations(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            "method": method.upper(),
            "path": path,
            "summary": operation.get("summary", ""),
            "description": operation.get("description", "").replace("`", ""),
            "parameters": [
                {**parameter, "type": _type(parameter["schema"])}
                for parameter in operation.get("parameters", [])
            ],
            "body": _body_name(operation),
            "responses": {
                status: response["description"]
                for status, response in operation["responses"].items()
            },
        }
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]


def _body_name(operation: dict[str, Any]) -> str | None:
    content = operation.get("requestBody", {}).get("content", {})
    return _type(content["application/json"]["schema"]) if content else None


def _fields(schema: dict[str, Any], document: dict[str, Any]) -> list[dict[str, Any]]:
    required = schema.get("required", ())
    return [
        {
            "name": name,
            "type": _type(field),
            "required": name in required,
            "description": field.get("description", "").replace("`", ""),
        }
        for name, field in schema.get("properties", {}).items()
    ]


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rsplit("/", 1)[-1]
    for joined in ("anyOf", "oneOf"):
        if joined in schema:
            return " or ".join(_type(part) for part in schema[joined])
    if "enum" in schema:
        return " | ".join(map(repr, schema["enum"]))
    if "const" in schema:
        return repr(schema["const"])
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    return str(schema.get("type", "any"))
