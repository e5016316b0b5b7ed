"""Who gets in: tokens and rights on every route there is, tenants that cannot see one another, and their quotas."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml

from tests.http.conftest import (
    INFER,
    PREDICT,
    Loaded,
    Server,
    error_of,
    infer_body,
    retry_after,
    routes_of,
    running,
    untouched,
)
from tests.http.following import begun
from tests.serving import MODEL, rows, varied
from tta_server import access
from tta_server.app import check_exposure
from tta_server.errors import ConfigError
from tta_server.settings import Right, Settings

pytestmark = pytest.mark.anyio

PUBLIC = "public"
ANY = "any token"
PREDICTS, STREAMS, ADMIN, METRICS = Right.PREDICT, Right.STREAMS, Right.ADMIN, Right.METRICS

ROUTES: dict[tuple[str, str], str] = {
    ("GET", "/openapi.json"): PUBLIC,
    ("HEAD", "/openapi.json"): PUBLIC,
    ("GET", "/docs"): PUBLIC,
    ("HEAD", "/docs"): PUBLIC,
    ("GET", "/docs/oauth2-redirect"): PUBLIC,
    ("HEAD", "/docs/oauth2-redirect"): PUBLIC,
    ("GET", "/"): PUBLIC,
    ("GET", "/metrics"): METRICS,
    ("GET", "/metrics/streams"): METRICS,
    ("GET", "/v1/policies"): ANY,
    ("GET", "/v1/policies/{name}"): ANY,
    ("GET", "/v1/models"): ANY,
    ("GET", "/v1/models/{name}"): ANY,
    ("GET", "/v1/streams"): STREAMS,
    ("PUT", "/v1/streams/{id}"): STREAMS,
    ("GET", "/v1/streams/{id}"): STREAMS,
    ("PATCH", "/v1/streams/{id}"): STREAMS,
    ("POST", "/v1/streams/{id}/reset"): STREAMS,
    ("POST", "/v1/streams/{id}/predict"): PREDICTS,
    ("POST", "/v1/streams/{id}/labels"): PREDICTS,
    ("GET", "/v1/streams/{id}/labels"): STREAMS,
    ("POST", "/v1/streams/{id}/guard"): STREAMS,
    ("GET", "/v1/streams/{id}/snapshots"): STREAMS,
    ("POST", "/v1/streams/{id}/snapshots"): STREAMS,
    ("POST", "/v1/streams/{id}/rollback"): STREAMS,
    ("POST", "/v1/streams/{id}/fork"): STREAMS,
    ("GET", "/v1/streams/{id}/state"): STREAMS,
    ("PUT", "/v1/streams/{id}/state"): STREAMS,
    ("DELETE", "/v1/streams/{id}/snapshots/{name}"): STREAMS,
    ("DELETE", "/v1/streams/{id}"): STREAMS,
    ("GET", "/v1/state"): METRICS,
    ("GET", "/v1/live"): STREAMS,
    ("GET", "/v1/events"): STREAMS,
    ("GET", "/v2"): ANY,
    ("GET", "/v2/"): ANY,
    ("GET", "/v2/health/live"): PUBLIC,
    ("GET", "/v2/health/ready"): PUBLIC,
    ("GET", "/v2/models/stats"): METRICS,
    ("POST", "/v2/repository/index"): ANY,
    ("POST", "/v2/repository/models/{name}/load"): ADMIN,
    ("POST", "/v2/repository/models/{name}/unload"): ADMIN,
    ("GET", "/v2/models/{name}"): ANY,
    ("GET", "/v2/models/{name}/versions/{version}"): ANY,
    ("GET", "/v2/models/{name}/ready"): PUBLIC,
    ("GET", "/v2/models/{name}/versions/{version}/ready"): PUBLIC,
    ("GET", "/v2/models/{name}/config"): ANY,
    ("GET", "/v2/models/{name}/versions/{version}/config"): ANY,
    ("GET", "/v2/models/{name}/stats"): METRICS,
    ("GET", "/v2/models/{name}/versions/{version}/stats"): METRICS,
    ("POST", "/v2/models/{name}/infer"): PREDICTS,
    ("POST", "/v2/models/{name}/versions/{version}/infer"): PREDICTS,
    **{
        (method, path): ANY
        for method in ("GET", "POST")
        for path in (
            "/v2/systemsharedmemory/{rest:path}", "/v2/cudasharedmemory/{rest:path}", "/v2/trace/setting",
            "/v2/models/{name}/trace/setting", "/v2/logging",
        )
    },
}  # fmt: skip
"""What every method of every route asks for."""

FOLLOWED = ("/v1/live", "/v1/events")
"""Answers without an end."""

BODIES: dict[tuple[str, str], Any] = {
    ("PUT", "/v1/streams/{id}"): {"adapt": False},
    ("PATCH", "/v1/streams/{id}"): {"adapt": False},
    ("POST", "/v1/streams/{id}/predict"): {"inputs": rows(1).tolist()},
    ("POST", "/v1/streams/{id}/labels"): {"request": MODEL, "labels": [0]},
    ("POST", "/v1/streams/{id}/guard"): {"state": "auto"},
    ("POST", "/v1/streams/{id}/snapshots"): {"name": "another"},
    ("POST", "/v1/streams/{id}/rollback"): {"snapshot": MODEL},
    ("POST", "/v1/streams/{id}/fork"): {"id": "copy"},
}
"""Sound bodies of the routes that name a stream in their path."""
REQUEST = {"x-request-id": MODEL}
"""Of a request that can be labelled."""
UPLOAD = ("PUT", "/v1/streams/{id}/state")
"""Takes a file, which only the server can make."""


def token(name: str) -> str:
    """A token that is easy to search for."""
    return f"secret-token-of-{name}"


TOKENS = [
    *({"token": token(right), "tenant": "a", "rights": [right]} for right in Right),
    *({"token": token(f"all-but-{right}"), "tenant": "a", "rights": sorted({*Right} - {right})} for right in Right),
    {"token": token("a"), "tenant": "a", "rights": list(Right)},
    {"sha256": hashlib.sha256(token("b").encode()).hexdigest(), "tenant": "b"},
]


def target(path: str, id: str = "s") -> str:
    """A path with its names filled in."""
    return path.replace("{rest:path}", "status").format(
        id=id, name="tent" if "policies" in path else MODEL, version="1"
    )


def body_of(method: str, path: str) -> Any:
    return infer_body(rows(1)) if path.endswith("/infer") else BODIES.get((method, path))


async def call(server: Server, method: str, path: str, id: str = "s", **arguments: Any) -> httpx.Response:
    if path in FOLLOWED:
        return await begun(server, path, **arguments)
    if (method, path) == UPLOAD:
        file = (await server.client.get(target(path, id))).content
        return await server.client.put(target(path, id), content=file, **arguments)
    return await server.client.request(method, target(path, id), json=body_of(method, path), **arguments)


async def restored(server: Server) -> None:
    """There is a guarded stream, a request of it, its snapshot, and the model is loaded, whatever happened before."""
    if MODEL not in server.service.models.loaded():
        await server.client.post(f"/v2/repository/models/{MODEL}/load")
    await server.client.put("/v1/streams/s", json={"guard": {"enabled": True}})
    await server.client.post(PREDICT, json=BODIES["POST", PREDICT.replace("/s/", "/{id}/")], headers=REQUEST)
    await server.client.post("/v1/streams/s/snapshots", json={"name": MODEL})


@pytest.fixture
async def server(loaded: Loaded) -> AsyncIterator[Server]:
    async with running(loaded, auth={"tokens": TOKENS}) as made:
        yield made


# Tokens and rights on every route


async def test_every_route_is_in_the_table(server: Server) -> None:
    assert set(routes_of(server.app)) == ROUTES.keys()


@pytest.mark.parametrize(
    "header",
    [None, "", "Bearer", "Bearer ", f"Bearer {token('nobody')}", "Basic YTpi", token("a"), "Bearer ÿ"],
)
async def test_nobody_gets_in_without_a_token(server: Server, header: str | None) -> None:
    headers = {} if header is None else {"authorization": header.encode("latin-1")}
    for (method, path), needed in ROUTES.items():
        response = await call(server, method, path, headers=headers)
        if needed == PUBLIC:
            assert response.status_code == 200, (method, path)
        else:
            assert error_of(response, 401), (method, path)
            assert response.headers["www-authenticate"] == "Bearer"


async def test_a_token_opens_what_it_has_the_right_to(server: Server) -> None:
    everything = server.known_by(token("a"))
    for (method, path), needed in ROUTES.items():
        if needed == PUBLIC:
            continue
        await restored(everything)
        sufficient = list(Right) if needed == ANY else [Right(needed)]
        for right in sufficient:
            response = await call(server.known_by(token(right)), method, path)
            assert response.status_code not in (401, 403, 404, 405), (method, path, right)


async def test_a_token_without_the_right_is_refused(server: Server) -> None:
    await server.known_by(token("a")).open("s")
    for (method, path), needed in ROUTES.items():
        if needed in (PUBLIC, ANY):
            continue
        response = await call(server.known_by(token(f"all-but-{needed}")), method, path)
        rest = ", ".join(sorted({*Right} - {needed}))
        assert error_of(response, 403) == f"this token does not have the right {needed}, only {rest}", (method, path)
    assert (await server.known_by(token("a")).json("GET", "/v1/streams/s"))["adapt"] is True, "nothing was changed"
    assert MODEL in server.service.models.loaded()


async def test_who_is_refused_is_not_listened_to(server: Server) -> None:
    async def unread() -> AsyncIterator[bytes]:
        raise AssertionError("the body was read")
        yield b""

    for (method, path), needed in ROUTES.items():
        if method == "POST" and needed not in (PUBLIC, ANY):
            for client, status in ((server, 401), (server.known_by(token(f"all-but-{needed}")), 403)):
                error_of(await client.client.request(method, target(path), content=unread()), status)


async def test_the_scheme_is_not_case_sensitive(server: Server) -> None:
    for scheme in ("bearer", "BEARER"):
        await server.json("GET", "/v1/models", headers={"authorization": f"{scheme}   {token('a')}"})


@pytest.mark.parametrize("header", ["Bearer whatever-it-is", "Basic YTpi", "nonsense"])
async def test_a_server_without_tokens_asks_for_none(loaded: Loaded, header: str) -> None:
    async with running(loaded) as server:
        for method, path in ROUTES:
            await restored(server)
            response = await call(server, method, path, headers={"authorization": header})
            assert response.status_code in (200, 201, 204, 501), (method, path)


# Tenants


async def test_another_tenants_stream_is_as_one_that_never_was(server: Server) -> None:
    """Every route that names a stream in its path; what is answered tells nothing of the other tenant's."""
    a, b = server.known_by(token("a")), server.known_by(token("b"))
    await a.adapt("theirs")
    with_ids = [(method, path) for method, path in ROUTES if "{id}" in path and method != "PUT"]
    assert len(with_ids) == 14
    for method, path in with_ids:
        async with untouched(a, "theirs", tenant="a"):
            real = await call(b, method, path, id="theirs")
            never = await call(b, method, path, id="nothing")
        assert "theirs" in error_of(real, 404), (method, path)
        assert real.text.replace("theirs", "nothing") == never.text
    assert await b.listed() == []
    assert await b.json("GET", "/v1/streams", params={"model": MODEL, "limit": 1}) == {"streams": [], "next": None}


async def test_a_sequence_of_another_tenant_is_as_one_that_never_was(loaded: Loaded) -> None:
    async with running(loaded, auth={"tokens": TOKENS}, streams={"unknown_id": "refuse"}) as server:
        a, b = server.known_by(token("a")), server.known_by(token("b"))
        await a.adapt("theirs")
        async with untouched(a, "theirs", tenant="a"):
            real = await b.infer(rows(1), 404, sequence_id="theirs", sequence_end=True)
            never = await b.infer(rows(1), 404, sequence_id="nothing", sequence_end=True)
        assert real["error"].replace("theirs", "nothing") == never["error"]


async def test_streams_of_one_id_are_two_streams(server: Server) -> None:
    a, b = server.known_by(token("a")), server.known_by(token("b"))
    await a.adapt("s", steps=3)
    async with untouched(a, tenant="a"):
        created = await b.open("s", policy="norm")
        assert (created["policy"], created["version"]) == ("norm", 0)
        started = await b.infer(rows(4, 9), sequence_id="s", sequence_start=True, sequence_end=False)
        assert started["parameters"]["state_version"] == 0
        assert "theirs" not in json.dumps(started)
        for seed in range(2):
            await b.predict("s", rows(4, seed), seq=seed)
        await b.json("PATCH", "/v1/streams/s", json={"policy": "tent", "settings": {"lr": 0.5}})
        await b.json("POST", "/v1/streams/s/reset")
        assert (await b.client.delete("/v1/streams/s")).status_code == 204
    assert await b.listed() == []


async def test_tenants_that_share_a_step_do_not_meet(server: Server) -> None:
    """Streams of one id and setting, in one batch: each gets what it would get alone."""
    a, b = server.known_by(token("a")), server.known_by(token("b"))
    batches = {"a": rows(4, 1), "b": rows(6, 2)}
    for one in (a, b):
        await one.open("s")
        await one.open("alone")
    for _ in range(3):
        gate = await server.hold()
        together = [asyncio.create_task(one.predict("s", batches[name])) for name, one in (("a", a), ("b", b))]
        await server.waiting(2)
        gate.open()
        for (name, one), task in zip((("a", a), ("b", b)), together, strict=True):
            alone = await one.predict("alone", batches[name])
            assert (await task)["version"] == alone["version"]
            torch.testing.assert_close(
                torch.tensor((await task)["probabilities"]), torch.tensor(alone["probabilities"]), rtol=0, atol=1e-4
            )


async def test_a_default_stream_is_each_tenants_own(loaded: Loaded) -> None:
    async with running(loaded, auth={"tokens": TOKENS}, streams={"default": "shared"}) as server:
        a, b = server.known_by(token("a")), server.known_by(token("b"))
        versions = [(await one.infer(rows(4)))["parameters"]["state_version"] for one in (a, a, b)]
        assert versions == [0, 1, 0]


# Quotas


@pytest.mark.parametrize("path", [PREDICT, INFER])
async def test_calls_at_the_same_time(loaded: Loaded, path: str) -> None:
    auth = {"tokens": TOKENS, "tenants": {"a": {"concurrent": 2}}}
    async with running(loaded, auth=auth) as server:
        a, b = server.known_by(token("a")), server.known_by(token("b"))
        await a.open("s")
        gate = await server.hold()
        under_way = [asyncio.create_task(a.predict("s", rows(1))) for _ in range(2)]
        await server.waiting(2)
        response = await a.client.post(path)
        assert error_of(response, 429) == "2 calls at the same time; the limit is auth.tenants.a.concurrent = 2"
        retry_after(response)
        await b.open("s")
        assert (await a.client.get("/v2/health/ready")).status_code == 200
        gate.open()
        await asyncio.gather(*under_way)
        await a.predict("s", rows(1))


async def test_a_call_that_fails_is_over(loaded: Loaded) -> None:
    """However it ends: were it counted on, the next would be refused."""
    auth = {"tokens": TOKENS, "tenants": {"a": {"concurrent": 1}}}
    async with running(loaded, auth=auth, limits={"body_seconds": 0.01, "queue": 1}) as server:
        a = server.known_by(token("a"))

        async def stuck() -> AsyncIterator[bytes]:
            yield b"{"
            await asyncio.Event().wait()

        await a.open("s")
        for arguments, status in (
            ({"content": b"{"}, 400),
            ({"content": b"{", "headers": {"content-encoding": "br"}}, 415),
            ({"content": stuck()}, 408),
            ({"params": {"seq": -1}}, 400),
            ({"json": infer_body(rows(1))}, 400),
        ):
            error_of(await a.client.post(PREDICT, **arguments), status)
        error_of(await a.client.get("/v1/streams/nobody"), 404)
        error_of(await server.known_by(token("all-but-admin")).client.post(f"/v2/repository/models/{MODEL}/load"), 403)
        await a.predict("s", rows(1))


async def test_calls_per_second(loaded: Loaded) -> None:
    auth = {"tokens": TOKENS, "tenants": {"a": {"requests_per_second": 0.001}}}
    async with running(loaded, auth=auth) as server:
        a, b = server.known_by(token("a")), server.known_by(token("b"))
        await a.json("GET", "/v1/models")
        response = await a.client.get("/v1/models")
        said = "too many calls; the limit is auth.tenants.a.requests_per_second = 0.001"
        assert error_of(response, 429) == said
        assert 900 < retry_after(response) <= 1000
        assert (await a.client.get("/v2/health/live")).status_code == 200
        for _ in range(3):
            await b.json("GET", "/v1/models")


async def test_streams_of_a_tenant(loaded: Loaded) -> None:
    auth = {"tokens": TOKENS, "tenants": {"a": {"streams": 1}}}
    async with running(loaded, auth=auth) as server:
        a, b = server.known_by(token("a")), server.known_by(token("b"))
        await a.adapt("s")
        async with untouched(a, tenant="a"):
            for response in (
                await a.client.put("/v1/streams/t"),
                await a.client.post(INFER, json=infer_body(rows(1), sequence_id="t")),
            ):
                assert "1 streams are open; the limit is auth.tenants.a.streams = 1" in error_of(response, 429)
                retry_after(response)
        for id in "st":
            await b.open(id)
        await a.client.delete("/v1/streams/s")
        await a.open("t")


async def test_state_bytes_of_a_tenant(loaded: Loaded) -> None:
    """Each stream counts in full from the start; a change that makes its state larger counts, too."""
    auth = {"tokens": TOKENS, "tenants": {"a": {"state_bytes": 700}}}
    async with running(loaded, auth=auth) as server:
        a, b = server.known_by(token("a")), server.known_by(token("b"))
        for id in ("s", "t"):
            await a.open(id)
            await b.open(id)
        async with untouched(a, tenant="a"):
            for method, id, body in (
                ("PUT", "u", {}), ("PATCH", "s", {"settings": {"window": 4}}),
            ):  # fmt: skip
                response = await a.client.request(method, f"/v1/streams/{id}", json=body)
                assert "the limit is auth.tenants.a.state_bytes = 700" in error_of(response, 429)
                retry_after(response)
        await a.json("PATCH", "/v1/streams/s", json={"policy": "source"})
        await a.open("u")
        await b.open("u")


# The file of tokens


async def test_the_tokens_file_is_read_again(
    loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(access, "LOOKS_AGAIN", 0.0)
    path = tmp_path / "tokens.yaml"

    def write(*names: str, **more: Any) -> None:
        content = {"tokens": [{"token": token(name), "tenant": name} for name in names], **more}
        path.write_text(yaml.safe_dump(content), encoding="utf-8")

    settings, models = loaded
    write("a", "long-name")
    here = settings.model_copy(update={"folder": tmp_path})
    async with running((here, models), auth={"file": "tokens.yaml", "tokens": TOKENS[:1]}) as server:

        async def status(name: str) -> int:
            return (await server.known_by(token(name)).client.get("/v1/streams")).status_code

        await server.known_by(token("a")).open("s")
        write("b", tenants={"b": {"streams": 1}})
        assert [await status(name) for name in ("a", "long-name", "b")] == [401, 401, 200]
        assert await server.known_by(token("b")).listed() == []
        await server.known_by(token("b")).open("s")
        error_of(await server.known_by(token("b")).client.put("/v1/streams/t"), 429)
        assert (await server.known_by(token("predict")).client.get("/v1/models")).status_code == 200, "the config's own"

        for broken in (f"tokens: [{{token: {token('b')}, rights: []}}]", f"tokens: [{token('b')}", "", "tokens: 5"):
            path.write_text(broken, encoding="utf-8")
            assert [await status(name) for name in ("a", "b")] == [401, 200], "as it was"
            assert "cannot be used; the tokens stay as they were" in caplog.records[-1].getMessage()
            assert caplog.records[-1].levelno == logging.ERROR
        path.unlink()
        assert [await status(name) for name in ("a", "b")] == [401, 200]
        write("a", "b")
        assert [await status(name) for name in ("a", "b")] == [200, 200]
        assert await server.known_by(token("a")).listed() == ["s"], "the tenant's streams were kept"
    assert "secret-token" not in caplog.text


# Secrets


async def test_tokens_are_told_to_nobody(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    seen = []
    for name in ("a", "b", "nobody", "predict"):
        for header in (f"Bearer {token(name)}", f"Basic {token(name)}", token(name)):
            for method, path in ROUTES:
                if "repository/models" not in path:
                    response = await call(server, method, path, headers={"authorization": header})
                    seen.append(response.text + str(response.headers))
    scrape = await server.known_by(token("a")).client.get("/metrics")
    assert "tta_requests_total" in scrape.text
    told = "\n".join([*seen, scrape.text, caplog.text])
    for name in ("a", "b", "nobody", "predict"):
        assert token(name) not in told
        assert hashlib.sha256(token(name).encode()).hexdigest() not in told


async def test_an_internal_error_tells_no_token(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(access.Access, "limits", broken)
    response = await server.known_by(token("a")).client.get("/v1/models")
    assert error_of(response, 500) == "internal error: ZeroDivisionError"
    assert "ZeroDivisionError" in caplog.text
    assert token("a") not in caplog.text + response.text


# Where it listens


@pytest.mark.parametrize(
    ("server", "auth", "reachable"),
    [
        ({}, {}, None),
        ({"host": "127.8.8.8"}, {}, None),
        ({"host": "::1"}, {}, None),
        ({"host": "localhost"}, {}, None),
        ({"host": "0.0.0.0"}, {}, "0.0.0.0"),
        ({"host": "::"}, {}, "::"),
        ({"host": ""}, {}, ""),
        ({"host": "192.168.0.7"}, {}, "192.168.0.7"),
        ({"host": "example.org"}, {}, "example.org"),
        ({"metrics": {"host": "0.0.0.0", "port": 9}}, {}, "0.0.0.0"),
        ({"metrics": {"host": "127.0.0.1", "port": 9}}, {}, None),
        ({"host": "0.0.0.0"}, {"tokens": TOKENS}, None),
        ({"host": "0.0.0.0"}, {"file": "tokens.yaml"}, None),
        ({"host": "0.0.0.0"}, {"tenants": {"a": {}}}, "0.0.0.0"),
    ],
    ids=str,
)
def test_strangers_need_tokens(
    loaded: Loaded, server: dict[str, Any], auth: dict[str, Any], reachable: str | None
) -> None:
    settings: Settings = varied(loaded[0], server=server, auth=auth)
    check_exposure(settings, insecure=True)
    if reachable is None:
        check_exposure(settings, insecure=False)
    else:
        with pytest.raises(ConfigError, match=f"others can reach {reachable}, .*tta-server token.*--insecure"):
            check_exposure(settings, insecure=False)


async def test_metrics_with_an_address_of_their_own(server: Server) -> None:
    """They are there and nowhere else, still for tokens with the right; and nothing else is there."""
    a = server.known_by(token("a"))
    server.app.state.metrics_port = 9100
    apart = "http://test:9100"
    assert (await a.client.get(f"{apart}/metrics")).status_code == 200
    error_of(await server.client.get(f"{apart}/metrics"), 401)
    error_of(await server.known_by(token("all-but-metrics")).client.get(f"{apart}/metrics"), 403)
    assert "no such path on this address: /metrics" in error_of(await a.client.get("/metrics"), 404)
    for method, path in ROUTES:
        if not path.startswith("/metrics") and method != "HEAD":
            response = await a.client.request(method, apart + target(path))
            assert "no such path on this address" in error_of(response, 404), (method, path)
    await a.json("GET", "/v1/models")
