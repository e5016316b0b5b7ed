"""Everything that can go wrong on purpose. No HTTP in here: ``http/problems.py`` holds the table to status codes.

::

    TtaError
    ├── ConfigError              the config file, the model it names, or the environment
    ├── BadInput                 the request's tensors or parameters; the message says expected and got
    ├── TooLarge                 a limit on size; the message names the setting
    ├── TooSlow                  a limit on the time a request may take to arrive; likewise
    ├── UnsupportedEncoding      a compressed body
    ├── Unauthenticated          no token, or one nobody has
    ├── Forbidden                a token without the right that the call needs
    ├── UnknownName              no such model, policy or stream
    ├── Conflict                 the request is sound but does not fit what is there
    ├── QueueFull                a bounded queue or quota; try again after ``retry_after`` seconds
    ├── Unavailable              loading, unloaded or draining; likewise
    ├── DeadlineExceeded         waited too long in the queue; never adapted
    ├── Cancelled                the client went away before its turn
    └── StepFailed               the model or the policy failed on this request; its stream is unchanged
"""

from __future__ import annotations


class TtaError(Exception):
    """Base of all errors this project raises on purpose. ``str(error)`` is meant for the user."""


class ConfigError(TtaError):
    """The configuration, or what it points to, cannot be used."""


class BadInput(TtaError):
    """A request that is malformed or does not fit the model."""


class TooLarge(TtaError):
    """A request beyond a size limit."""


class TooSlow(TtaError):
    """A request that did not arrive in time."""


class UnsupportedEncoding(TtaError):
    """A body in an encoding that is not taken."""


class Unauthenticated(TtaError):
    """A request without a token, or with one that nobody has."""


class Forbidden(TtaError):
    """A request whose token does not have the right it needs."""


class UnknownName(TtaError):
    """A model, policy or stream that does not exist here."""


class Conflict(TtaError):
    """A sound request that contradicts what is there, such as a request number out of order."""


class QueueFull(TtaError):
    """A bounded resource is used up for now."""

    def __init__(self, text: str, retry_after: int = 1) -> None:
        """``retry_after``: seconds after which a new attempt is sensible."""
        super().__init__(text)
        self.retry_after = retry_after


class Unavailable(TtaError):
    """The server, or the model, is not taking requests: loading, unloaded, or draining."""

    retry_after = 5
    """Seconds after which a new attempt is sensible."""


class DeadlineExceeded(TtaError):
    """The request's time was up before its turn came. It has not adapted anything."""


class Cancelled(TtaError):
    """Nobody waits for the answer any more."""


class StepFailed(TtaError):
    """The engine could not answer. The stream keeps its previous version."""
