"""Logging: events on standard error, one line each, with their fields."""

from __future__ import annotations

import logging
import logging.config

_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message"}


class _Formatter(logging.Formatter):
    """The message, then what was passed as ``extra`` as ``key=value``."""

    def format(self, record: logging.LogRecord) -> str:
        extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        return super().format(record) + "".join(f" {key}={value}" for key, value in extra.items())


def configure(level: str = "INFO") -> None:
    """Sets the process' logging up."""
    logging.config.dictConfig(
        {
            "version": 1,
            "disable_existing_loggers": False,
            "formatters": {
                "line": {"()": _Formatter, "format": "%(asctime)s %(levelname)s %(name)s: %(message)s"},
            },
            "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "line"}},
            "root": {"level": level, "handlers": ["stderr"]},
            # It warns of every malformed form: clients could fill the log.
            "loggers": {"python_multipart": {"level": "ERROR"}},
        }
    )
