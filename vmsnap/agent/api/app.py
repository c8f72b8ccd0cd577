"""The application: routes, how errors are told, the page's files, and the guard in front of all of it."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from vmsnap import __version__
from vmsnap.agent.api import looking, setting, working
from vmsnap.agent.api.access import Door, Guard
from vmsnap.agent.api.context import Context
from vmsnap.agent.api.shapes import Problem
from vmsnap.errors import AlreadyExists, Busy, NotFound, UsageError, VmsnapError

_STATUS = ((NotFound, 404), (AlreadyExists, 409), (Busy, 409), (UsageError, 400))
_KINDS = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "description": text}
    for code, text in (
        (400, "the request is wrong"),
        (401, "no token, or one that is unknown or whose time is over"),
        (403, "the token's role does not allow it, or another site asked"),
        (404, "there is no such thing"),
        (409, "it exists already, or is busy"),
        (413, "the body is too large"),
        (415, "the body is not application/json"),
        (422, "the request does not have the right shape"),
    )
}


def create_app(context: Context, door: Door) -> ASGIApp:
    """The application for one door. No I/O."""
    app = FastAPI(title="vmsnap agent", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.context = context
    for router in (working.router, working.events_router, looking.router, setting.router):
        app.include_router(router, responses=_PROBLEMS)
    app.include_router(looking.metrics_router)
    app.add_exception_handler(VmsnapError, _told)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _misshapen)
    app.add_exception_handler(Exception, _unexpected)
    app.add_api_route("/api/v1/openapi.json", lambda: openapi(app), methods=["GET"], include_in_schema=False)
    for path, name in page_files().items():
        app.add_api_route(path, _serving(name), methods=["GET"], include_in_schema=False)
    return Guard(app, door, lambda text: context.house().tokens.find(text))


def openapi(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document."""
    if app.openapi_schema is None:
        found = get_openapi(title=app.title, version=app.version, description=__doc__, routes=app.routes)
        found["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"token": []}]
        app.openapi_schema = found
    return app.openapi_schema


def page_files() -> dict[str, str]:
    """What is served of the page: paths, and the names of files in the package."""
    names = [each.name for each in _web().iterdir() if each.name.rpartition(".")[2] in _KINDS]
    return {"/": "index.html", **{f"/{name}": name for name in sorted(names)}}


def _web() -> Traversable:
    return files("vmsnap.agent").joinpath("web")


def _serving(name: str) -> Any:
    content = _web().joinpath(name).read_bytes()
    kind = _KINDS[name.rpartition(".")[2]]

    async def serve() -> Response:
        return Response(content, media_type=kind)

    return serve


async def _told(_: Request, error: Exception) -> Response:
    status = next((code for kind, code in _STATUS if isinstance(error, kind)), 503)
    message, cure = (error.message, error.cure) if isinstance(error, VmsnapError) else (str(error), "")
    return JSONResponse({"error": message, "cure": cure}, status)


async def _refused(_: Request, error: Exception) -> Response:
    code = error.status_code if isinstance(error, HTTPException) else 500
    detail, headers = (error.detail, error.headers) if isinstance(error, HTTPException) else ("", None)
    return JSONResponse({"error": detail, "cure": ""}, code, dict(headers or {}))


async def _misshapen(_: Request, error: Exception) -> Response:
    found = error.errors() if isinstance(error, RequestValidationError) else []
    first = found[0] if found else {"loc": (), "msg": ""}
    where = ".".join(str(part) for part in first["loc"])
    return JSONResponse({"error": f"{where}: {first['msg']}", "cure": "see /api/v1/openapi.json"}, 422)


async def _unexpected(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"unexpected {type(error).__name__}", "cure": "see the agent's log"}, 500)
