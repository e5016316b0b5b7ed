"""What all routes share: answers out, heavy work off the event loop, giving up when the client has."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import orjson
from fastapi import Request, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from tta_server.errors import BadInput, Cancelled, TooLarge
from tta_server.http.body import compress, inflate, parse_json, read_body, room_of
from tta_server.http.schemas import Problem
from tta_server.settings import LimitSettings
from tta_server.types import Call

T = TypeVar("T")

INLINE = 64 * 2**10
"""Work on up to this many bytes is done on the event loop; a thread costs more than it does."""

LARGEST = 2**64 - 1
"""Of the whole numbers that ids and request numbers can be; JSON parsers know no larger ones."""

_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
"""Printable ASCII without spaces."""

BINARY = {"schema": {"type": "string", "format": "binary"}}
"""OpenAPI for bytes."""
PROBLEMS: dict[int | str, dict[str, Any]] = {"4XX": {"model": Problem}, "5XX": {"model": Problem}}
"""How every route documents its errors."""


def to_json(content: Any) -> bytes:
    """``content`` as JSON; numpy arrays become lists, NaN becomes null."""
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)


def json_response(content: Any, status: int = 200) -> Response:
    """``content`` as a JSON answer."""
    return Response(to_json(content), status, media_type="application/json")


def json_body(schema: type[BaseModel], required: bool = True) -> dict[str, Any]:
    """OpenAPI for a route that reads a JSON body by itself; ``schema`` must be one of ``schemas.REQUESTS``."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}}}
    return {"requestBody": {"required": required, "content": content}}


def refuse_unknown(what: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raises ``BadInput`` for a name that is not known, so that a typo does not pass as the default."""
    for name in given:
        if name not in known:
            raise BadInput(f"no {what} {name[:50]!r}; there are: {', '.join(known)}")


def request_id(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The id that the client gave a request in ``X-Request-ID``, or a new one where there is none that will do."""
    for name, value in headers:
        if name == b"x-request-id":
            return value.decode() if _REQUEST_ID.fullmatch(value) else uuid.uuid4().hex
    return uuid.uuid4().hex


def begin_call(request: Request, model: str) -> Call:
    """Says that a request is one for predictions of ``model``; the recorder is told in the end."""
    call: Call = request.scope["call"]
    call.model, call.predicts = model, True
    return call


async def offload(work: Callable[[], T], heavy: bool) -> T:
    """``work()``, in a thread when it is ``heavy``. Raises ``TooLarge`` when memory does not suffice for it."""
    with enough_memory():
        return await run_in_threadpool(work) if heavy else work()


@contextmanager
def enough_memory() -> Iterator[None]:
    """Turns a ``MemoryError`` into ``TooLarge``."""
    try:
        yield
    except MemoryError as error:
        raise TooLarge("there is not enough memory for this request; send fewer rows at a time") from error


async def body_of(
    request: Request, limits: LimitSettings, sent: str = "body_bytes", inflated: str = "inflated_bytes"
) -> bytearray:
    """The request's body, inflated. The settings of these names limit it as it is sent, and as it is then."""
    body = await read_body(request, limits, sent)
    encoding = request.headers.get("content-encoding")
    # A few compressed bytes may be many.
    work = partial(inflate, body, encoding, limits, room_of(request), inflated)
    return await offload(work, encoding not in (None, "identity"))


async def json_of(request: Request, limits: LimitSettings) -> dict[str, Any]:
    """The request's body as a JSON object; without a body an empty one."""
    body = await body_of(request, limits)
    return await offload(lambda: parse_json(body, limits), len(body) > INLINE) if body else {}


async def respond(
    request: Request, call: Call, size: int, encode: Callable[[], tuple[bytes, dict[str, str], str]]
) -> Response:
    """An answer of about ``size`` bytes, compressed if the client takes that.

    ``encode`` gives its body, headers and media type.
    """
    accept = request.headers.get("accept-encoding")

    def work() -> Response:
        started = time.monotonic()
        body, headers, media_type = encode()
        body, encoding = compress(body, accept)
        if encoding is not None:
            headers = {**headers, "Content-Encoding": encoding, "Vary": "Accept-Encoding"}
        response = Response(body, headers=headers, media_type=media_type)
        call.encode_seconds = time.monotonic() - started
        return response

    return await offload(work, size > INLINE)


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled when the client of ``request`` goes away first."""
    task = asyncio.current_task()
    assert task is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        task.cancel()

    watching = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        # Ours, unless somebody else asked for it as well.
        if gone and not task.uncancel():
            raise Cancelled("the client went away") from None
        raise
    finally:
        watching.cancel()
