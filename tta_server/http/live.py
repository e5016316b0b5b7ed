"""The live page at ``/`` and what feeds it: ``/v1/live`` and ``/v1/events``, server-sent events without an end."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Header, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, ConfigDict, Field

from tta_server.drift.monitor import Monitor, Verdict
from tta_server.drift.signals import AGREEMENT, DISTANCE, DRIFT, Floats
from tta_server.errors import QueueFull, TtaError
from tta_server.events import EventLog
from tta_server.http.guard import guarded, needs, public, tenant_of
from tta_server.http.schemas import Name, Problem
from tta_server.http.wire import PROBLEMS, to_json
from tta_server.service import Service
from tta_server.settings import Right
from tta_server.types import Event, Stream

POLL = 0.25
"""Seconds between two looks at what is new, and at whether to end."""
LARGEST_PAGE = 100
"""Streams in an event of ``/v1/live``."""
POLLS = 4
"""Looks for one event of ``/v1/live``."""
FRESH = 0.5
"""Seconds for which a table of all streams is shared by its tenant's followers."""
RETRY = 2000
"""Milliseconds after which a client whose connection broke should come back."""
PAGE = Path(__file__).with_name("page.html")
_PROBLEM = {"schema": {"$ref": f"#/components/schemas/{Problem.__name__}"}}
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    status: {"content": {"application/json": _PROBLEM}} for status in PROBLEMS
}
"""Here the framework would take errors to be events."""


class Wanted(BaseModel):
    """The query of ``/v1/live``: which streams, and in which order."""

    model_config = ConfigDict(extra="forbid")

    search: str = Field("", max_length=128, description="Part of the id; upper and lower case are the same.")
    model: Name | None = Field(None, description="Only streams of this model.")
    verdict: Verdict | None = Field(None, description="Only streams with this verdict.")
    adapt: bool | None = Field(None, description="Only streams with adaptation on, or off.")
    sort: Literal["drift", "id", "confidence", "agreement", "version", "requests", "failures", "last_seen"] = "drift"
    order: Literal["desc", "asc"] = "desc"
    offset: int = Field(0, ge=0, le=1_000_000, description="Streams to leave out before the first.")
    limit: int = Field(50, ge=1, le=LARGEST_PAGE, description="Most streams in an event.")
    stream: Name | None = Field(None, description="One to tell of by itself, wherever it is.")


class Table:
    """A tenant's streams at one time, with what choosing and sorting them needs; the rest is read for a page only."""

    def __init__(self, streams: Sequence[Stream], monitor: Monitor, before: Table | None) -> None:
        """``before``: the last one, of which what did not change is taken over."""
        self.time, self.streams, self._monitor = time.time(), streams, monitor
        self._pasts: dict[Stream, tuple[int, dict[str, Any]]] = {} if before is None else before._pasts
        if len(self._pasts) > 2 * len(streams) + LARGEST_PAGE:
            self._pasts = {}
        survey = monitor.survey(streams)
        self._verdicts = survey.verdicts()
        self._drift, self._distance = survey.values(DRIFT, scored=True), survey.values(DISTANCE)
        self._confidence, self._agreement = survey.values("confidence"), survey.values(AGREEMENT)

    def event(self, wanted: Wanted, told: dict[Stream, dict[str, Any]]) -> dict[str, Any]:
        """The data of an event. ``told`` holds what is long and seldom new as it was told before, and then as now."""
        near, counts = self._find(wanted)
        chosen = [
            place
            for place in near
            if wanted.verdict in (None, self._verdicts[place]) and wanted.adapt in (None, self.streams[place].adapt)
        ]
        rows, before = [], dict(told)
        told.clear()
        for place in self._sorted(chosen, wanted)[wanted.offset : wanted.offset + wanted.limit]:
            stream = self.streams[place]
            known = before.get(stream, {})
            more = told[stream] = self._more(stream, known)
            rows.append(self._row(place) if more == known else {**self._row(place), **more})
        return {
            "time": self.time,
            "total": len(self.streams),
            "requests": sum(stream.requests for stream in self.streams),
            "models": sorted({stream.model for stream in self.streams}),
            "matching": len(chosen),
            "offset": wanted.offset,
            "counts": counts,
            "stream": self._single(wanted.stream),
            "streams": rows,
        }

    def _single(self, id: str | None) -> dict[str, Any] | None:
        """The stream with that id in full."""
        for place, stream in enumerate(self.streams):
            if stream.id == id:
                return {**self._row(place), **self._more(stream, {})}
        return None

    def _find(self, wanted: Wanted) -> tuple[list[int], dict[str, int]]:
        """Places of the streams that the search and the model leave, and how many of them are what."""
        part = wanted.search.lower()
        near = [
            place
            for place, stream in enumerate(self.streams)
            if part in stream.id.lower() and wanted.model in (None, stream.model)
        ]
        found = Counter([self._verdicts[place] for place in near])
        adapting = sum(self.streams[place].adapt for place in near)
        return near, {"adapting": adapting, **{verdict.value: found[verdict] for verdict in Verdict}}

    def _sorted(self, places: list[int], wanted: Wanted) -> list[int]:
        """In the order that is wanted; those without a value come last either way."""
        down = wanted.order == "desc"
        if wanted.sort == "id":
            return sorted(places, key=lambda place: self.streams[place].id, reverse=down)
        columns: list[Floats]  # the last counts first
        match wanted.sort:
            case "drift":
                columns = [self._distance, self._drift]
            case "confidence":
                columns = [self._confidence]
            case "agreement":
                columns = [self._agreement]
            case attribute:
                columns = [np.array([getattr(stream, attribute) for stream in self.streams], np.float64)]
        order = np.lexsort([(-column if down else column)[places] for column in columns])
        return [places[index] for index in order.tolist()]

    def _row(self, place: int) -> dict[str, Any]:
        stream = self.streams[place]
        return {
            "id": stream.id,
            "model": stream.model,
            "policy": stream.policy.name,
            "adapt": stream.adapt,
            "verdict": self._verdicts[place],
            "guard": stream.guarded.state if stream.adapt and stream.guarded is not None else None,
            "drift": _short(self._drift[place]),
            "distance": _short(self._distance[place]),
            "confidence": _short(self._confidence[place]),
            "agreement": _short(self._agreement[place]),
            "version": stream.version,
            "requests": stream.requests,
            "failures": stream.failures,
            "last_seen": stream.last_seen or None,
        }

    def _more(self, stream: Stream, known: dict[str, Any]) -> dict[str, Any]:
        """The recent past; and where clean requests' confidence mostly is, which takes long to find out."""
        points = self._monitor.points(stream)
        kept, more = self._pasts.get(stream, (-1, {}))
        if kept == points and (known.get("band") is None or more["band"] is not None):
            return more
        band = known.get("band")
        if band is None and (reading := self._monitor.readings(stream).get("confidence")) is not None:
            band = reading.band
        past = self._monitor.past(stream)
        more = {"past": {"drift": past.pop(DRIFT), **past}, "band": band}
        self._pasts[stream] = points, more
        return more


def router(service: Service, events: EventLog) -> APIRouter:
    """The routes over ``service`` and its ``events``."""
    routes = APIRouter(tags=["live"], responses=_PROBLEMS, route_class=guarded(service))
    page, headers = _page()
    run = int(time.time())
    """Part of every event's id, so that the numbers of an earlier run are not taken for this one's."""
    followers: Counter[str] = Counter()
    """By tenant."""
    tables: dict[str, Table] = {}
    """The newest by tenant, which all its followers share."""

    async def follower(request: Request) -> AsyncIterator[None]:
        """Counts a follower while it follows. A tenant's may be as many as its calls at a time, which they are not.

        Raises ``QueueFull``.
        """
        tenant = tenant_of(request).name
        limit, most = service.access.limits(tenant).concurrent, service.settings.limits.followers
        if followers.total() >= most:
            raise QueueFull(f"{most} event streams at the same time; the limit is limits.followers = {most}")
        if limit is not None and followers[tenant] >= limit:
            raise QueueFull(
                f"{followers[tenant]} event streams at the same time; the limit is "
                f"auth.tenants.{tenant}.concurrent = {limit}"
            )
        followers[tenant] += 1
        request.scope["call"].endless = True
        try:
            yield
        finally:
            followers[tenant] -= 1
            if not followers[tenant]:
                del followers[tenant]
                tables.pop(tenant, None)

    async def polls(request: Request) -> AsyncIterator[int]:
        """0, 1, 2, ... until the server drains, or the token is taken back."""
        token = request.headers.get("authorization", "").partition(" ")[2].strip()
        tenant, count = tenant_of(request).name, 0
        while not service.draining and _still_good(service, token, tenant):
            yield count
            count += 1
            await asyncio.sleep(POLL)

    def table(request: Request) -> Table:
        tenant = tenant_of(request)
        found = tables.get(tenant.name)
        if found is None or not 0 <= time.time() - found.time < FRESH:
            found = tables[tenant.name] = Table(list(tenant.streams()), service.monitor, found)
        return found

    @routes.get("/", include_in_schema=False)
    @public
    async def live_page() -> Response:
        """The page; what it shows, it asks for with the user's token."""
        return Response(page, headers=headers, media_type="text/html")

    @routes.get("/v1/live", response_class=EventSourceResponse, dependencies=[Depends(follower)])
    @needs(Right.STREAMS)
    async def live(request: Request, wanted: Annotated[Wanted, Query()]) -> AsyncIterator[ServerSentEvent]:
        """The tenant's streams, a page of them, each second: events `streams`.

        `counts` are of all streams that fit `search` and `model`, `matching` of those that fit everything. A stream's
        `past` (its last points, 2 s or more apart) and `band` (where clean requests' confidence mostly is) are left out
        where they are as in the event before. Values not measured are null.
        """
        told: dict[Stream, dict[str, Any]] = {}
        yield ServerSentEvent(retry=RETRY)
        async for count in polls(request):
            if count % POLLS == 0:
                data = to_json(table(request).event(wanted, told))
                yield ServerSentEvent(event="streams", raw_data=data.decode().rstrip())

    @routes.get("/v1/events", response_class=EventSourceResponse, dependencies=[Depends(follower)])
    @needs(Right.STREAMS)
    async def follow(
        request: Request,
        last_event_id: Annotated[
            str | None, Header(max_length=64, description="Go on behind this event. 0: begin with the oldest kept.")
        ] = None,
    ) -> AsyncIterator[ServerSentEvent]:
        """What happens to the tenant's streams from now on.

        `kind` is opened, closed, expired (closed for want of requests), changed, reset, rolled_back, marked, imported
        (also of a fork), evicted (to the disk, for want of requests), lost (changes that a crash cost it), damaged (a
        stored state), departure, change (both: the monitor's alarms), rejected or failed (a step that was not kept).
        The newest `monitor.events` are kept for those who come back.
        """
        tenant = tenant_of(request).name
        begun, _, place = (last_event_id or f"{run}-{events.newest(tenant)}").partition("-")
        last = min(int(place), events.newest(tenant)) if begun == str(run) and place.isdecimal() else 0
        yield ServerSentEvent(retry=RETRY)
        async for _ in polls(request):
            for number, event in events.since(last, tenant):
                last = number
                yield ServerSentEvent(id=f"{run}-{number}", raw_data=to_json(_told(event)).decode().rstrip())

    return routes


def _short(value: float) -> float:
    """In fewer digits; NaN becomes null on the wire."""
    return round(float(value), 4)


def _told(event: Event) -> dict[str, Any]:
    """An event as it is sent."""
    return {
        "time": event.time,
        "kind": event.kind,
        "stream": event.stream.id,
        "model": event.stream.model,
        "request": event.origin.request or None,
        "fields": event.fields,
    }


def _still_good(service: Service, token: str, tenant: str) -> bool:
    """Whether the token of somebody who was let in still gives what it did."""
    try:
        grant = service.access.grant(token or None)
        grant.check(Right.STREAMS)
    except TtaError:
        return False
    return grant.tenant == tenant


def _page() -> tuple[bytes, dict[str, str]]:
    """The page, and headers that let it run its own script and style and talk to its own server, and nothing else."""
    page = PAGE.read_bytes()

    def only(tag: str) -> str:
        parts: list[bytes] = re.findall(rf"<{tag}>(.*?)</{tag}>".encode(), page, re.DOTALL)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(part).digest()).decode()}'" for part in parts)

    policy = (
        f"default-src 'none'; script-src {only('script')}; style-src {only('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    headers = {
        "Content-Security-Policy": policy,
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return page, headers
