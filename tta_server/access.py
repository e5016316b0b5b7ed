"""Who may come in, what they may do, and how much of it: tokens, tenants, their rates. No HTTP in here.

Used on the event loop alone, so a check and what follows from it are one.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tta_server.errors import ConfigError, Forbidden, QueueFull, Unauthenticated
from tta_server.settings import AccessSettings, AuthSettings, Right, TenantSettings, TokenSettings, load_access

log = logging.getLogger(__name__)

DEFAULT_TENANT = "default"
LOOKS_AGAIN = 1.0
"""Seconds between two looks at the tokens file."""


@dataclass(frozen=True)
class Grant:
    """What a token gives."""

    tenant: str
    rights: frozenset[Right]

    def check(self, right: Right) -> None:
        """Raises ``Forbidden`` without the right."""
        if right not in self.rights:
            raise Forbidden(f"this token does not have the right {right}, only {', '.join(sorted(self.rights))}")


_EVERYBODY = Grant(DEFAULT_TENANT, frozenset(Right))


class Access:
    """The tokens of the config and of its tokens file, which is read again when it changes."""

    def __init__(self, settings: AuthSettings, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises ``ConfigError`` for a file that cannot be read or used."""
        self._own, self._clock = settings, clock
        self._file = None if settings.file is None else folder / settings.file
        self._looked, self._seen = clock(), self._stamp()
        self._meters: dict[str, _Meter] = {}
        self._use(AccessSettings() if self._file is None else load_access(self._file))

    @property
    def open(self) -> bool:
        """Whether nobody needs a token: none is set, and no file names any."""
        return self._file is None and not self._own.tokens

    def grant(self, token: str | None) -> Grant:
        """What ``token`` gives. Raises ``Unauthenticated``."""
        self._refresh()
        if self.open:
            return _EVERYBODY
        if not token:
            raise Unauthenticated("a token is needed: send the header 'Authorization: Bearer <token>'")
        presented = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        found = None
        for digest, grant in self._grants:
            # All are compared, and each in constant time: how long it takes tells nothing.
            if hmac.compare_digest(digest, presented):
                found = grant
        if found is None:
            raise Unauthenticated("nobody has this token")
        return found

    def limits(self, tenant: str) -> TenantSettings:
        """What a tenant may use."""
        return self._tenants.get(tenant, TenantSettings())

    @contextmanager
    def call(self, tenant: str) -> Iterator[None]:
        """Counts a call of the tenant's while it lasts. Raises ``QueueFull`` beyond its rate or number at a time."""
        meter = self._meters.setdefault(tenant, _Meter(self._clock()))
        limits, place = self.limits(tenant), f"auth.tenants.{tenant}"
        if limits.concurrent is not None and meter.now >= limits.concurrent:
            raise QueueFull(
                f"{meter.now} calls at the same time; the limit is {place}.concurrent = {limits.concurrent}"
            )
        if limits.requests_per_second is not None:
            wait = meter.take(self._clock(), limits.requests_per_second)
            if wait:
                rate = f"{place}.requests_per_second = {limits.requests_per_second:g}"
                raise QueueFull(f"too many calls; the limit is {rate}", math.ceil(wait))
        meter.now += 1
        try:
            yield
        finally:
            meter.now -= 1

    def _refresh(self) -> None:
        if self._file is None or self._clock() < self._looked + LOOKS_AGAIN:
            return
        self._looked = self._clock()
        stamp = self._stamp()
        if stamp == self._seen:
            return
        self._seen = stamp
        try:
            self._use(load_access(self._file))
            log.info("tokens read again", extra={"file": str(self._file), "tokens": len(self._grants)})
        except ConfigError as error:
            log.error("the tokens file was changed but cannot be used; the tokens stay as they were: %s", error)

    def _stamp(self) -> tuple[int, int, int] | None:
        """Changes when the file does; ``None`` without one."""
        try:
            found = os.stat(self._file) if self._file is not None else None
        except OSError:
            return None
        return None if found is None else (found.st_mtime_ns, found.st_size, found.st_ino)

    def _use(self, file: AccessSettings) -> None:
        tokens = (*self._own.tokens, *file.tokens)
        grants = [(_digest(one), Grant(one.tenant, frozenset(one.rights))) for one in tokens]
        if len({digest for digest, _ in grants}) < len(grants):
            raise ConfigError("two entries of auth.tokens, or of the tokens file, have the same token")
        self._grants, self._tenants = grants, {**self._own.tenants, **file.tenants}


class Room:
    """Memory for request bodies, of all requests together. Used from several threads."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._lock = limit, 0, threading.Lock()

    @contextmanager
    def hold(self) -> Iterator[Callable[[int], None]]:
        """Gives what takes room for so many more bytes, all of it given back in the end.

        That raises ``QueueFull`` where there is not so much.
        """
        held = 0

        def take(count: int) -> None:
            nonlocal held
            with self._lock:
                if self._used + count > self._limit:
                    raise QueueFull(
                        f"the bodies of all requests take {self._used} bytes of memory already; the limit is "
                        f"limits.bodies_bytes = {self._limit}"
                    )
                self._used += count
                held += count

        try:
            yield take
        finally:
            with self._lock:
                self._used -= held


class _Meter:
    """One tenant's calls: how many there are now, and a bucket that fills at the tenant's rate."""

    def __init__(self, now: float) -> None:
        self.now, self._level, self._at = 0, math.inf, now

    def take(self, time: float, rate: float) -> float:
        """Takes a call out of the bucket, which holds one second's worth, at least one; else the seconds to wait."""
        self._level = min(max(rate, 1.0), self._level + (time - self._at) * rate)
        self._at = time
        wait = (1 - self._level) / rate
        if wait > 1e-6:  # less is rounding
            return wait
        self._level -= 1
        return 0.0


def _digest(token: TokenSettings) -> bytes:
    if token.token is not None:
        return hashlib.sha256(token.token.get_secret_value().encode()).digest()
    assert token.sha256 is not None
    return bytes.fromhex(token.sha256)
