"""Request bodies as they come over the wire, and answers as they leave: bounded reading, compression, JSON."""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import Callable
from typing import Any

import orjson
from fastapi import Request
from starlette.requests import ClientDisconnect

from tta_server.errors import BadInput, Cancelled, TooLarge, TooSlow, UnsupportedEncoding
from tta_server.settings import LimitSettings

COMPRESS_FROM = 1024
"""Answers below so many bytes are not compressed: they travel in one packet either way, and only the work is added."""
_WINDOW = {"gzip": 31, "deflate": 15}
"""The codings taken and given, in order of preference, with zlib's ``wbits`` of each; deflate is zlib-wrapped."""
_RAW_DEFLATE = -15
_PIECE = 16 * 2**10
"""Bytes inflated at a time; what follows one gzip member in a piece is copied for the next member."""
_QUALITY = re.compile(r"[qQ]=(0(?:\.[0-9]{0,3})?|1(?:\.0{0,3})?)")


async def read_body(request: Request, limits: LimitSettings, setting: str = "body_bytes") -> bytearray:
    """The whole body as sent, still compressed where it was.

    Raises ``TooLarge`` as soon as it passes the limit of this ``setting``, before reading on, ``TooSlow`` when it is
    not there after ``limits.body_seconds``, and ``Cancelled`` when the client goes away.
    """
    limit: int = getattr(limits, setting)
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared[:20]) > limit:
        raise TooLarge(f"the body is {declared[:20]} bytes; the limit is limits.{setting} = {limit}")
    take_room = room_of(request)
    body = bytearray()  # numpy's views of it can be written to, so that tensors need no copy
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limit:
                    raise TooLarge(f"the body is over the limit, limits.{setting} = {limit}")
                take_room(len(chunk))
                body += chunk
    except ClientDisconnect as error:
        raise Cancelled("the client went away while sending") from error
    except TimeoutError as error:
        raise TooSlow(
            f"only {len(body)} bytes of the body arrived within limits.body_seconds = {limits.body_seconds:g}; "
            "send it faster, or in smaller requests"
        ) from error
    return body


def room_of(request: Request) -> Callable[[int], None]:
    """What takes room for more bytes of the request's body, see ``access.Room``."""
    take: Callable[[int], None] = request.scope.get("take_room", lambda count: None)
    return take


def inflate(
    body: bytearray,
    encoding: str | None,
    limits: LimitSettings,
    take_room: Callable[[int], None] = lambda count: None,
    setting: str = "inflated_bytes",
) -> bytearray:
    """The body without the compression that its Content-Encoding names: gzip, deflate, or none (identity).

    Deflate is taken with and without its zlib wrapper, gzip also in several members. Raises ``UnsupportedEncoding``,
    ``TooLarge`` as soon as the result passes the limit of this ``setting``, and ``BadInput`` for data that are broken,
    incomplete, or followed by others.
    """
    coding = (encoding or "identity").strip().lower()
    if coding == "identity":
        return body
    if coding not in _WINDOW:
        known = ", ".join(_WINDOW)
        raise UnsupportedEncoding(f"bodies may be compressed by one of {known}; got Content-Encoding: {encoding!r:.60}")
    wbits = _WINDOW[coding] if coding == "gzip" or _is_zlib(body) else _RAW_DEFLATE
    limit: int = getattr(limits, setting)
    view, inflated = memoryview(body), bytearray()
    stream = zlib.decompressobj(wbits)
    try:
        for start in range(0, len(view), _PIECE):
            piece: memoryview | bytes = view[start : start + _PIECE]
            while piece:
                if stream.eof and coding != "gzip":
                    raise BadInput(f"the body goes on after the end of its {coding} data")
                if stream.eof:
                    stream = zlib.decompressobj(wbits)
                more = stream.decompress(piece, limit - len(inflated) + 1)
                take_room(len(more))
                inflated += more
                if len(inflated) > limit:
                    raise TooLarge(f"the body is over limits.{setting} = {limit} when decompressed")
                piece = stream.unused_data  # of the next gzip member
    except zlib.error as error:
        raise BadInput(f"the body is not {coding} data, as its Content-Encoding says: {error}") from error
    if not stream.eof:
        raise BadInput(f"the body's {coding} data end early, after {len(body)} bytes")
    return inflated


def _is_zlib(body: bytearray) -> bool:
    """Whether deflate data have their wrapper (RFC 1950: method 8, and a check sum of the first two bytes).

    Raw deflate would begin so only with a stored block padded by ones, which no encoder writes.
    """
    return len(body) >= 2 and body[0] & 15 == 8 and (body[0] * 256 + body[1]) % 31 == 0


def compress(body: bytes, accept: str | None) -> tuple[bytes, str | None]:
    """An answer's body, compressed as the request's Accept-Encoding wants, and its Content-Encoding, if any.

    The coding with the highest q-value wins, gzip before deflate; identity only where it is named with a higher one.
    """
    if accept is None or len(body) < COMPRESS_FROM:
        return body, None
    weights = _weights(accept)
    quality = {coding: weights.get(coding, weights.get("*", 0.0)) for coding in _WINDOW}
    best = max(quality, key=quality.__getitem__)
    if quality[best] == 0 or quality[best] < weights.get("identity", 0.0):
        return body, None
    return zlib.compress(body, 1, _WINDOW[best]), best


def _weights(accept: str) -> dict[str, float]:
    """The q-values of an Accept-Encoding header; a coding whose q-value is malformed counts as refused."""
    weights = {}
    for entry in accept.split(","):
        coding, semicolon, parameter = (part.strip() for part in entry.partition(";"))
        match = _QUALITY.fullmatch(parameter)
        weights[coding.lower()] = float(match[1]) if match else float(not semicolon)
    return weights


def parse_json(body: bytes | bytearray | memoryview, limits: LimitSettings) -> dict[str, Any]:
    """A JSON object. Raises ``TooLarge`` over ``limits.json_bytes``, ``BadInput`` for what is not JSON (NaN and
    Infinity are not), not an object, or nested deeper than ``limits.json_depth``."""
    if len(body) > limits.json_bytes:
        raise TooLarge(f"the JSON is {len(body)} bytes; the limit is limits.json_bytes = {limits.json_bytes}")
    too_deep = f"the JSON is nested too deep; the limit is limits.json_depth = {limits.json_depth}"
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        # The parser has a limit of its own, above any that can be set.
        raise BadInput(too_deep if "limit" in error.msg else f"the body is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise BadInput(f"the body must be a JSON object, got {type(parsed).__name__}")
    text = bytes(body) if isinstance(body, memoryview) else body
    if text.count(b"[") + text.count(b"{") > limits.json_depth and _deeper_than(limits.json_depth, parsed):
        raise BadInput(too_deep)
    return parsed


def _deeper_than(limit: int, parsed: dict[str, Any]) -> bool:
    containers = frozenset((list, dict))
    level: list[Any] = [parsed]
    for _ in range(limit):
        inner = (one.values() if type(one) is dict else one for one in level)
        # A list of a million numbers is passed over without a look at each in Python.
        nested = [values for values in inner if not containers.isdisjoint(map(type, values))]
        level = [one for values in nested for one in values if type(one) in containers]
    return bool(level)
