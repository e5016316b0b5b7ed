"""The one table from errors to status codes, and the one shape an error has on the wire: ``{"error": "text"}``."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import orjson
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match

from tta_server import errors
from tta_server.settings import explain

log = logging.getLogger(__name__)

STATUS: dict[type[errors.TtaError], int] = {
    errors.BadInput: 400,
    errors.Unauthenticated: 401,
    errors.Forbidden: 403,
    errors.UnknownName: 404,
    errors.TooSlow: 408,
    errors.Conflict: 409,
    errors.TooLarge: 413,
    errors.UnsupportedEncoding: 415,
    errors.QueueFull: 429,
    errors.Cancelled: 499,  # nobody is there to read it; the access statistics show it
    errors.StepFailed: 500,
    errors.Unavailable: 503,
    errors.DeadlineExceeded: 504,
}


def problem(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
    """An error response."""
    body = orjson.dumps({"error": text}, option=orjson.OPT_APPEND_NEWLINE)
    return Response(body, status, headers, media_type="application/json")


def install(app: FastAPI, routes: Sequence[BaseRoute]) -> None:
    """Makes every error of ``app``, which has these ``routes``, a ``{"error": ...}``, the framework's own included."""

    async def framework(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 404:
            return problem(404, f"no such path: {request.url.path}")
        if error.status_code == 405:
            # The framework names the methods of one route only, and a path can have several.
            matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
            methods = {method for route in matching for method in getattr(route, "methods", ())}
            allowed = ", ".join(sorted(methods)) or (error.headers or {}).get("Allow", "")
            text = f"{request.method} is not allowed on {request.url.path}, only {allowed}"
            return problem(405, text, {"Allow": allowed})
        return problem(error.status_code, str(error.detail), dict(error.headers or {}))

    app.add_exception_handler(errors.TtaError, _ours)
    app.add_exception_handler(HTTPException, framework)
    app.add_exception_handler(RequestValidationError, _validation)
    app.add_exception_handler(ValidationError, _validation)


async def _ours(request: Request, error: Exception) -> Response:
    retry_after = getattr(error, "retry_after", None)
    headers = None if retry_after is None else {"Retry-After": str(retry_after)}
    if isinstance(error, errors.Unauthenticated):
        headers = {"WWW-Authenticate": "Bearer"}
    status = next((STATUS[kind] for kind in type(error).__mro__ if kind in STATUS), 500)
    return problem(status, str(error), headers)


async def _validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError | ValidationError)
    if isinstance(error, ValidationError):
        return problem(400, f"the request does not fit:\n{explain(error, _pointer)}")
    faults = "; ".join(
        f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}, got {fault['input']!r:.80}" for fault in error.errors()
    )
    return problem(400, f"the request does not fit: {faults}")


def _pointer(place: Sequence[int | str]) -> str:
    """A place in a JSON document as a JSON pointer (RFC 6901); the document itself is ``/``."""
    return "/" + "/".join(str(part).replace("~", "~0").replace("/", "~1") for part in place)


def unexpected(path: str, error: Exception) -> Response:
    """The answer to an error that nobody foresaw, which is logged."""
    log.error("unexpected error on %s", path, exc_info=error)
    return problem(500, f"internal error: {type(error).__name__}")
