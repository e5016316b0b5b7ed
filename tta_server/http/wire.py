"""What all routes share: JSON out, heavy decoding off the event loop, giving up when the client has."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Any, TypeVar

import anyio
import orjson
from fastapi import Request, Response
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from tta_server.errors import BadInput, Cancelled, TooLarge
from tta_server.http.schemas import Problem

T = TypeVar("T")

DECODE_INLINE = 64 * 2**10
"""Bodies up to this many bytes are decoded on the event loop; a thread costs more than they do."""

PROBLEMS: dict[int | str, dict[str, Any]] = {"4XX": {"model": Problem}, "5XX": {"model": Problem}}
"""How every route documents its errors."""


def json_response(content: Any, status: int = 200) -> Response:
    """``content`` as JSON; numpy arrays become lists, NaN becomes null."""
    body = orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE)
    return Response(body, status, media_type="application/json")


def json_body(schema: type[BaseModel], required: bool = True) -> dict[str, Any]:
    """OpenAPI for a route that reads a JSON body by itself; ``schema`` must be one of ``schemas.REQUESTS``."""
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema.__name__}"}}}
    return {"requestBody": {"required": required, "content": content}}


def refuse_unknown(what: str, given: Iterable[str], known: Collection[str]) -> None:
    """Raises ``BadInput`` for a name that is not known, so that a typo does not pass as the default."""
    for name in given:
        if name not in known:
            raise BadInput(f"no {what} {name[:50]!r}; there are: {', '.join(known)}")


async def decode(body: bytes, how: Callable[[bytes], T]) -> T:
    """``how(body)``, in a thread when the body is big. Raises ``TooLarge`` when memory does not suffice for it."""
    try:
        return how(body) if len(body) <= DECODE_INLINE else await run_in_threadpool(how, body)
    except MemoryError as error:
        raise TooLarge(f"there is not enough memory to decode the body of {len(body)} bytes") from error


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled when the client of ``request`` goes away first."""

    async def watch(scope: anyio.CancelScope) -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        scope.cancel()

    failure: Exception = Cancelled("the client went away")
    async with anyio.create_task_group() as group:
        group.start_soon(watch, group.cancel_scope)
        try:
            return await work
        except Exception as error:  # raised below, since a task group would wrap it
            failure = error
        finally:
            group.cancel_scope.cancel()
    raise failure
