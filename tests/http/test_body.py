"""Bodies over the wire: how much and how long is read, compression both ways, and what passes as JSON."""

from __future__ import annotations

import asyncio
import gzip
import json
import tracemalloc
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import orjson
import pytest
from fastapi import Request
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tta_server.errors import BadInput, Cancelled, TooLarge, TooSlow, TtaError, UnsupportedEncoding
from tta_server.http.body import COMPRESS_FROM, compress, inflate, parse_json, read_body
from tta_server.settings import LimitSettings

LIMITS = LimitSettings()
fuzz = settings(max_examples=200, deadline=None, derandomize=True, database=None)

# Reading


def request(messages: Iterable[dict[str, Any] | None], **headers: str) -> Request:
    """A request whose body arrives in these messages; ``None``: nothing ever does."""
    waiting = iter(messages)

    async def receive() -> dict[str, Any]:
        message = next(waiting, None)
        await asyncio.sleep(0)
        if message is None:
            await asyncio.Event().wait()
        assert message is not None
        return message

    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "headers": raw}, receive)


def chunks(*bodies: bytes, end: bool = True) -> list[dict[str, Any]]:
    last = len(bodies) - 1
    return [{"type": "http.request", "body": body, "more_body": not end or at < last} for at, body in enumerate(bodies)]


@pytest.mark.anyio
@pytest.mark.parametrize("bodies", [(b"",), (b"whole",), (b"in ", b"", b"some ", b"pieces")], ids=repr)
async def test_a_body_is_its_chunks(bodies: tuple[bytes, ...]) -> None:
    body = await read_body(request(chunks(*bodies)), LIMITS)
    assert type(body) is bytearray
    assert body == b"".join(bodies)


@pytest.mark.anyio
@pytest.mark.parametrize("declared", ["8", "80", "9" * 5000])
async def test_a_body_declared_too_large_is_not_read(declared: str) -> None:
    with pytest.raises(TooLarge, match=r"limits\.body_bytes = 7"):
        await read_body(request([None], content_length=declared), LimitSettings(body_bytes=7))


@pytest.mark.anyio
async def test_a_body_is_read_up_to_the_limit_and_not_on() -> None:
    limits = LimitSettings(body_bytes=7)
    assert await read_body(request(chunks(b"1234", b"567"), content_length="7"), limits) == b"1234567"
    with pytest.raises(TooLarge, match=r"limits\.body_bytes = 7"):
        await read_body(request([*chunks(b"1234", b"5678", end=False), None]), limits)


@pytest.mark.anyio
@pytest.mark.parametrize("declared", ["many", "-1", "", "²"])
async def test_a_length_that_is_no_number_is_left_to_the_server_below(declared: str) -> None:
    assert await read_body(request(chunks(b"x"), content_length=declared), LIMITS) == b"x"


@pytest.mark.anyio
async def test_a_client_that_goes_away() -> None:
    with pytest.raises(Cancelled):
        await read_body(request([*chunks(b"some", end=False), {"type": "http.disconnect"}]), LIMITS)


def trickle() -> Iterable[dict[str, Any]]:
    while True:
        yield {"type": "http.request", "body": b"x", "more_body": True}


@pytest.mark.anyio
@pytest.mark.parametrize(
    "messages", [lambda: [None], lambda: [*chunks(b"some", end=False), None], trickle], ids=["none", "stuck", "trickle"]
)
async def test_a_client_that_is_too_slow(messages: Callable[[], Iterable[dict[str, Any] | None]]) -> None:
    """Each chunk may come quickly: the time is for the whole body."""
    with pytest.raises(TooSlow, match=r"limits\.body_seconds = 0\.01"):
        await read_body(request(messages()), LimitSettings(body_seconds=0.01, body_bytes=2**40))


# Compressed requests


def raw_deflate(data: bytes) -> bytes:
    machine = zlib.compressobj(wbits=-15)
    return machine.compress(data) + machine.flush()


def gzip_members(data: bytes) -> bytes:
    middle = len(data) // 2
    return b"".join(gzip.compress(part) for part in (data[:middle], b"", data[middle:]))


PACK: dict[str, Callable[[bytes], bytes]] = {
    "gzip": gzip.compress,
    "gzip members": gzip_members,
    "deflate": zlib.compress,
    "deflate raw": raw_deflate,
}
packed = pytest.mark.parametrize("how", list(PACK))


def unpack(body: bytes, how: str, **limits: int) -> bytearray:
    return inflate(bytearray(body), how.split()[0], LimitSettings(**limits))


@packed
@settings(fuzz, max_examples=50)
@given(st.binary(max_size=300), st.integers(1, 500))
def test_compressed_bodies_come_back(how: str, data: bytes, times: int) -> None:
    assert unpack(PACK[how](data * times), how) == data * times


@pytest.mark.parametrize("level", range(10))
@pytest.mark.parametrize("strategy", [zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE, zlib.Z_FIXED])
def test_deflate_with_and_without_its_wrapper_is_told_apart(level: int, strategy: int) -> None:
    data = bytes(range(256)) * 30
    for wbits in (-15, -9, 9, 15):
        machine = zlib.compressobj(level, zlib.DEFLATED, wbits, 8, strategy)
        assert unpack(machine.compress(data) + machine.flush(), "deflate") == data


@pytest.mark.parametrize("encoding", [None, "", "identity", "Identity"])
def test_a_plain_body_is_handed_on(encoding: str | None) -> None:
    body = bytearray(b"plain")
    assert inflate(body, encoding, LIMITS) is body


def test_codings_are_not_case_sensitive() -> None:
    assert inflate(bytearray(gzip.compress(b"data")), " GZip ", LIMITS) == b"data"


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "gzip,identity", "gzip;q=1", "compress", "x" * 9000])
def test_other_codings_are_refused(encoding: str) -> None:
    with pytest.raises(UnsupportedEncoding, match="gzip, deflate") as caught:
        inflate(bytearray(gzip.compress(b"")), encoding, LIMITS)
    assert len(str(caught.value)) < 200


@packed
def test_incomplete_data_are_refused(how: str) -> None:
    data = b"some data, some more data" * 20
    whole = PACK[how](data)
    members = [
        len(gzip.compress(data[: len(data) // 2])),
        len(gzip.compress(data[: len(data) // 2]) + gzip.compress(b"")),
    ]
    for length in range(len(whole)):
        if how == "gzip members" and length in members:
            assert data.startswith(unpack(whole[:length], how))  # ends with a member, which makes it whole
            continue
        with pytest.raises(BadInput, match="end early"):
            unpack(whole[:length], how)


@packed
@pytest.mark.parametrize("garbage", [b"\0", b"\0" * 100, b"garbage", b"\x1f\x8b", b"{}"], ids=repr)
def test_what_follows_the_data_is_refused(how: str, garbage: bytes) -> None:
    with pytest.raises(BadInput, match=r"goes on|end early|is not"):
        unpack(PACK[how](b"data") + garbage, how)


@pytest.mark.parametrize("how", ["deflate", "deflate raw"])
def test_deflate_data_come_once(how: str) -> None:
    with pytest.raises(BadInput, match="goes on after the end of its deflate data"):
        unpack(PACK[how](b"data") * 2, how)


@pytest.mark.parametrize("how", ["gzip", "deflate"])
def test_a_broken_check_sum_is_refused(how: str) -> None:
    broken = bytearray(PACK[how](b"data"))
    broken[-5 if how == "gzip" else -1] ^= 1
    with pytest.raises(BadInput, match="incorrect data check"):
        unpack(bytes(broken), how)


@fuzz
@given(st.binary(max_size=60), st.sampled_from([b"", b"\x1f\x8b\x08\x00", b"\x78\x9c"]), st.sampled_from(list(PACK)))
def test_any_bytes_are_inflated_or_refused(data: bytes, start: bytes, how: str) -> None:
    try:
        unpack(start + data, how, inflated_bytes=1000)
    except (BadInput, TooLarge):
        return


@packed
def test_a_bomb_stops_at_the_limit(how: str) -> None:
    bomb, limit = PACK[how](bytes(64 * 2**20)), 2**20
    assert len(bomb) < 2**17
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge, match=r"limits\.inflated_bytes = 1048576"):
            unpack(bomb, how, inflated_bytes=limit)
        assert tracemalloc.get_traced_memory()[1] < 4 * limit
    finally:
        tracemalloc.stop()


@packed
def test_a_body_inflates_up_to_the_limit(how: str) -> None:
    body = PACK[how](bytes(70_000))
    assert len(unpack(body, how, inflated_bytes=70_000)) == 70_000
    with pytest.raises(TooLarge):
        unpack(body, how, inflated_bytes=69_999)


# Compressed answers

LONG = b"0.125," * COMPRESS_FROM


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        (None, None),
        ("", None),
        ("identity", None),
        ("br", None),
        ("gzip", "gzip"),
        ("GZIP", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate, br", "gzip"),
        ("deflate, gzip", "gzip"),
        ("deflate;q=1.0, gzip;q=0.5", "deflate"),
        ("deflate ; q=0.2 , gzip; Q=0.3", "gzip"),
        ("gzip;q=0", None),
        ("gzip;q=0.000", None),
        ("gzip;q=0, deflate", "deflate"),
        ("*", "gzip"),
        ("*;q=0", None),
        ("*;q=0, deflate;q=0.1", "deflate"),
        ("gzip;q=0, *", "deflate"),
        ("identity, gzip;q=0.5", None),
        ("identity;q=0.5, gzip", "gzip"),
        ("identity, gzip", "gzip"),
        ("identity;q=0, *;q=0.1", "gzip"),
        ("gzip;q=nan", None),
        ("gzip;q=2", None),
        ("gzip;q=", None),
        ("gzip;q=1e5, deflate;q=0.1", "deflate"),
        (",,;;q=1,", None),
    ],
)
def test_the_coding_is_what_the_client_prefers(accept: str | None, chosen: str | None) -> None:
    body, coding = compress(LONG, accept)
    assert coding == chosen
    undo: dict[str | None, Callable[[bytes], bytes]] = {
        None: bytes,
        "gzip": gzip.decompress,
        "deflate": zlib.decompress,
    }
    assert undo[coding](body) == LONG
    assert (len(body) < len(LONG) / 10) is (coding is not None)


def test_small_answers_are_not_compressed() -> None:
    assert compress(LONG[: COMPRESS_FROM - 1], "gzip") == (LONG[: COMPRESS_FROM - 1], None)
    assert compress(LONG[:COMPRESS_FROM], "gzip")[1] == "gzip"


@fuzz
@given(st.text(st.characters(max_codepoint=255)) | st.text("gzipdeflatq*;=,. 01"))
def test_any_accept_encoding_is_read(accept: str) -> None:
    body, coding = compress(LONG, accept)
    assert coding in ("gzip", "deflate", None)
    assert (body == LONG) is (coding is None)


# JSON


def refused(body: bytes, said: str, error: type[TtaError] = BadInput, **limits: int) -> None:
    with pytest.raises(error) as caught:
        parse_json(body, LimitSettings(**limits))
    assert said in str(caught.value)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
def test_an_object_is_read(kind: Callable[[bytes], bytes]) -> None:
    assert parse_json(kind(b' {"a": [1, 2.5, null, "\xc3\xa9"]}\n'), LIMITS) == {"a": [1, 2.5, None, "é"]}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"nonsense",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": "\xff"}',
        b'{"a": "\xed\xa0\x80"}',
        b'{"a": 1} {}',
        b'{"a": 1,}',
        b"{'a': 1}",
        b'\xef\xbb\xbf{"a": 1}',
        b'{"a": 01}',
        b'{"a": "\0"}',
        '{"a": 1}'.encode("utf-16"),
    ],
    ids=repr,
)
def test_what_is_not_json_is_refused(body: bytes) -> None:
    refused(body, "the body is not JSON")


@pytest.mark.parametrize("body", [b"[]", b"5", b'"text"', b"null", b"true"])
def test_what_is_not_an_object_is_refused(body: bytes) -> None:
    refused(body, "must be a JSON object, got ")


def test_json_over_its_limit_is_refused_unread() -> None:
    refused(b"x" * 11, "limits.json_bytes = 10", TooLarge, json_bytes=10)
    assert parse_json(b'{"a": 123}', LimitSettings(json_bytes=10)) == {"a": 123}


@pytest.mark.parametrize(
    ("opening", "closing"),
    [(b"[", b"]"), (b'{"a":', b"}"), (b'[0, {"b": [], "a":', b"}, {}]"), (b'[[], ["x"], ', b", 5]")],
)
@pytest.mark.parametrize("levels", [101, 300, 1024, 10_000, 1_000_000])
def test_nesting_over_the_limit_is_refused(opening: bytes, closing: bytes, levels: int) -> None:
    body = b'{"inputs": ' + opening * levels + b"0" + closing * levels + b"}"
    refused(body, "limits.json_depth = 100")


def depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(depth, inner), default=0)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5) | st.just("[[[{{{"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


@fuzz
@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4), st.integers(1, 5))
@example({"a": []}, 1)
@example({"[[[": "{{{"}, 1)
def test_the_limit_is_on_the_deepest_nesting(value: dict[str, Any], limit: int) -> None:
    body = json.dumps(value).encode()
    if depth(value) > limit:
        refused(body, f"limits.json_depth = {limit}", json_depth=limit)
    else:
        assert parse_json(body, LimitSettings(json_depth=limit)) == value


@fuzz
@given(st.binary(max_size=40) | st.text('{}[]":,0123e-+.aNtrue ', max_size=40).map(str.encode))
def test_any_bytes_are_json_or_refused(body: bytes) -> None:
    try:
        parsed = parse_json(body, LIMITS)
    except BadInput:
        return
    assert parsed == json.loads(body)


def test_a_long_list_is_passed_over() -> None:
    body = orjson.dumps({"inputs": [[[0.5] * 30] * 30] * 30})
    assert len(parse_json(body, LimitSettings(json_depth=4))["inputs"]) == 30
    refused(body, "limits.json_depth = 3", json_depth=3)
