"""Logging: events on standard error, one line each, with their fields."""

from __future__ import annotations

import logging
import logging.config
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any

import orjson

from tta_server.types import NOWHERE, Call, Event, Origin, StepStats

_streams = logging.getLogger("tta_server.streams")
_requests = logging.getLogger("tta_server.requests")

_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}

_origin: ContextVar[Origin] = ContextVar("origin", default=NOWHERE)

LINES = {
    "opened": (logging.DEBUG, "stream opened"),
    "closed": (logging.DEBUG, "stream closed"),
    "changed": (logging.DEBUG, "stream has other settings"),
    "expired": (logging.INFO, "stream deleted for want of requests"),
    "reset": (logging.DEBUG, "stream reset"),
    "rolled_back": (logging.INFO, "stream rolled back"),
    "marked": (logging.DEBUG, "stream's state has a name"),
    "imported": (logging.DEBUG, "stream has another's state"),
    "evicted": (logging.DEBUG, "idle stream's state left memory for the disk"),
    "lost": (logging.WARNING, "stream lost steps that were not saved when the server crashed"),
    "damaged": (logging.ERROR, "stream's stored state is damaged; an older one is used"),
    "departure": (logging.INFO, "stream departed from clean data"),
    "change": (logging.INFO, "stream changed against its own past"),
    "rejected": (logging.WARNING, "adaptation step rejected: not finite, or outside the trust region"),
    "failed": (logging.WARNING, "adaptation step failed"),
    "guard": (logging.INFO, "stream's guard moved"),
}
"""Level and message by kind of event."""


@contextmanager
def about(origin: Origin) -> Iterator[None]:
    """Lines that are written in here, and in the tasks that are begun in here, tell the request and its trace."""
    token = _origin.set(origin)
    try:
        yield
    finally:
        _origin.reset(token)


def current() -> Origin:
    """The request that is dealt with here."""
    return _origin.get()


class EventLogger:
    """A recorder that writes what happens to streams, and, at the level DEBUG, every request."""

    def step(self, stats: StepStats) -> None:
        """See :class:`tta_server.metrics.Recorder`."""

    def request(self, call: Call) -> None:
        """See :class:`tta_server.metrics.Recorder`."""
        if _requests.isEnabledFor(logging.DEBUG):
            fields = {"route": call.route, "code": call.code, "seconds": call.seconds, "model": call.model}
            _requests.debug("request answered", extra=fields)

    def event(self, event: Event) -> None:
        """See :class:`tta_server.metrics.Recorder`."""
        level, message = LINES[event.kind]
        if _streams.isEnabledFor(level):
            stream = event.stream
            fields = {"event": event.kind, "stream": stream.id, "tenant": stream.tenant, "model": stream.model}
            with about(event.origin if event.origin.request else _origin.get()):
                _streams.log(level, message, extra={**fields, "version": stream.version, **event.fields})


class _TextFormatter(logging.Formatter):
    """The message, then its fields as ``key=value``."""

    def format(self, record: logging.LogRecord) -> str:
        return super().format(record) + "".join(f" {key}={value}" for key, value in _fields(record).items())


class _JsonFormatter(logging.Formatter):
    """One JSON object: time (UTC), level, logger, message, the fields, and the exception with its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        content: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        content = content | _fields(record) | content  # in this order, and none of these is replaced
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        try:
            return _json(content)
        except TypeError:  # text that is not valid Unicode, or numbers beyond 64 bits
            return _json({key: value if isinstance(value, bool) else ascii(value) for key, value in content.items()})


def configure(format: str = "text", level: str = "INFO") -> None:
    """Sets the process' logging up; for the values see :class:`tta_server.settings.LogSettings`."""
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "text": {"()": _TextFormatter, "format": "%(asctime)s %(levelname)s %(name)s: %(message)s"},
                "json": {"()": _JsonFormatter},
            },
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": format}},
            "root": {"level": "INFO" if level == "DEBUG" else level, "handlers": ["stderr"]},
            "loggers": {
                "tta_server": {"level": level},
                # It warns of every malformed form: clients could fill the log.
                "python_multipart": {"level": "ERROR"},
            },
        }
    )
    logging.captureWarnings(True)


def _fields(record: logging.LogRecord) -> dict[str, Any]:
    """What there is to say beside the message: the request it is about, and what was passed as ``extra``."""
    origin = _origin.get()
    fields: dict[str, Any] = {}
    if origin.request:
        fields["request"] = origin.request
    if origin.trace:
        fields["trace_id"] = origin.trace.split("-")[1]
    return fields | {key: value for key, value in vars(record).items() if key not in _STANDARD}


def _json(content: dict[str, Any]) -> str:
    return orjson.dumps(content, default=str, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY).decode()
