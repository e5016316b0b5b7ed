"""What the client knows without sending anything: requests, how answers are read, and what is sent again.

**Every call may be sent again, but two.** The server carries out a numbered prediction once and answers repeats from
memory, so a lost answer costs no second adaptation. Predictions without a stream never adapt. Opening, changing,
resetting, rolling back, importing, labelling, guarding or closing a stream twice is the same as once, since its object
sends nothing else in between. The two are a new snapshot and a fork, whose name the first attempt takes. They are sent
again where the server refused them or cannot be reached; where their answer is lost the caller is told.

**A number is for one array only.** A prediction that failed does not give its number back, for the server may have
carried it out all the same; the next one takes the next number, and the gap does no harm.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import index
from typing import Any, Generic, TypedDict, TypeVar
from urllib.parse import quote

import httpx
import numpy as np
import orjson
from numpy.typing import ArrayLike, NDArray

from tta_server import errors

T = TypeVar("T")
Json = dict[str, Any]
Labels = Sequence[int | None] | NDArray[np.integer[Any]]
"""Class numbers, one a row; ``None`` where unknown."""
Outcome = httpx.Response | httpx.RequestError
"""What one attempt ends with."""

ERRORS: dict[int, type[errors.TtaError]] = {
    400: errors.BadInput,
    401: errors.Unauthenticated,
    403: errors.Forbidden,
    404: errors.UnknownName,
    408: errors.TooSlow,
    409: errors.Conflict,
    413: errors.TooLarge,
    415: errors.UnsupportedEncoding,
    429: errors.QueueFull,
    499: errors.Cancelled,
    500: errors.StepFailed,
    503: errors.Unavailable,
    504: errors.DeadlineExceeded,
}
"""What a refusal is raised as, by its status; any other is a plain ``TtaError``."""
DATATYPES = {
    **{"b1": "BOOL", "u1": "UINT8", "u2": "UINT16", "u4": "UINT32", "u8": "UINT64", "f2": "FP16", "f4": "FP32"},
    **{"i1": "INT8", "i2": "INT16", "i4": "INT32", "i8": "INT64", "f8": "FP64"},
}
"""The protocol's names of numpy's kinds and sizes in bytes."""
FILE = "application/octet-stream"
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 30.0
"""Seconds: the most before the second attempt, without a Retry-After, and the most before any."""


UNSENT = httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout
"""After these the server has not seen the request."""
UNFIT = httpx.UnsupportedProtocol, httpx.LocalProtocolError
"""After these it never will."""


class NoAnswer(errors.TtaError):
    """The server cannot be reached, or its answer was lost; then it may have carried out the request."""


class Change(TypedDict, total=False):
    """What can be changed of a stream. What is left out stays as it is."""

    adapt: bool
    policy: str
    settings: Json
    durability: str | Json
    """``none``, ``async`` or ``sync``; or ``{"mode": "async", "steps": 16, "seconds": 5}``."""
    consistency: str | Json
    """``strict`` or ``stale``; or ``{"mode": "stale", "steps": 4}``."""
    guard: Json
    """What differs from the guard's settings as they are: ``{"guarantee": {"kind": "budget"}}``."""


class Wanted(Change, total=False):
    """What a stream is to be. What is left out is the server's choice, or stays as it is."""

    model: str


class Filters(TypedDict, total=False):
    """Which streams to list. What is left out may be anything."""

    model: str
    policy: str
    adapt: bool


@dataclass(frozen=True, eq=False)
class Answer:
    """What a prediction for ``N`` rows and ``C`` classes was answered. ``None``: not measured yet."""

    logits: NDArray[np.float32]
    """``[N, C]``, the scores as served."""
    version: int
    """Number of the stream's adaptation steps that these scores were computed with."""
    adapted: bool
    """Whether the stream's policy ran, not the plain source model alone. Who was served is in ``served``."""
    policy: str
    """What answered."""
    shed: bool
    """Whether the stream learns nothing from these images, since the server is under pressure."""
    replayed: bool
    """Whether the server had carried out this request before, and that answer was lost."""
    confidence: float | None
    """Mean over the rows of the largest probability."""
    drift: float | None
    """The stream's drift score before this request."""
    verdict: str | None
    """The stream in words before this request: ``near source``, ``drifted``, ``changing``, ``unknown``."""
    agreement: float | None
    """Share of sampled rows so far with the source model's class."""
    unsaved_steps: int | None = None
    """How many of the stream's changes up to this version a crash of the server would have cost when the answer left;
    ``None`` where the stream is not stored."""
    lost_steps: int = 0
    """Steps that a crash of the server cost the stream, told once, in the first answer after it."""
    served: str | None = None
    """Whose scores these are: ``adapted``, ``source``, or ``mixed`` where the guard let some rows through only."""
    guard: str | None = None
    """State of the stream's guard: ``shadow``, ``canary``, ``active``, ... ``None`` without one."""
    evidence: str | None = None
    """What the guard knows of the adapted model: ``unknown``, ``helps``, ``unclear`` or ``harms``."""
    benefit: float | None = None
    """Accuracy that the adapted model is estimated to have over the source's."""
    request: str | None = None
    """The request's id, for labels; ``None`` without a stream."""
    behind: int = 0
    """Adaptation steps on earlier requests that this version does not have yet."""

    @property
    def classes(self) -> NDArray[np.intp]:
        """``[N]``, the class with the largest score."""
        return np.asarray(self.logits.argmax(1))

    @cached_property
    def probabilities(self) -> NDArray[np.float32]:
        """``[N, C]``, ``exp(logits) / sum(exp(logits))`` of each row."""
        powers = np.exp(self.logits - self.logits.max(1, keepdims=True))
        return np.asarray(powers / powers.sum(1, keepdims=True))


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request, and how to read the response to its attempt of a certain number, counted from 0."""

    method: str
    path: str
    read: Callable[[httpx.Response, int], T]
    content: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    repeats: bool = True
    """Whether carrying it out twice is the same as once."""


def ask(method: str, path: str, body: Change | Json | None = None, repeats: bool = True) -> Call[Json]:
    """A call with JSON, or nothing, in both directions."""
    content = b"" if body is None else orjson.dumps(body)
    return Call(
        method, path, lambda response, _: dict(orjson.loads(response.content or b"{}")), content, repeats=repeats
    )


def everything(what: str, path: str = "/v1") -> Call[list[Json]]:
    """A call for all ``models``, ``policies`` or, of the stream at ``path``, ``snapshots``."""
    return Call("GET", f"{path}/{what}", lambda response, _: list(orjson.loads(response.content)[what]))


def export(path: str) -> Call[bytes]:
    """A call for the file of a stream's state."""

    def read(response: httpx.Response, attempt: int) -> bytes:
        if response.headers["Content-Type"] != FILE:
            raise ValueError(f"it is {response.headers['Content-Type']}")
        return response.content

    return Call("GET", f"{path}/state", read)


def put(path: str, file: bytes) -> Call[Json]:
    """A call that gives a stream the state of a file."""
    return replace(ask("PUT", f"{path}/state"), content=file, headers={"Content-Type": FILE})


def label(path: str, request: Answer | str, labels: Labels) -> Call[Json]:
    """A call that tells what a request's rows were. Raises ``BadInput`` for an answer that was no stream's, and for
    labels that are no whole numbers."""
    id = request.request if isinstance(request, Answer) else request
    if id is None:
        raise errors.BadInput("only answers of a stream can be labelled")
    try:
        known = [None if one is None else index(one) for one in labels]
    except TypeError as error:
        raise errors.BadInput(f"labels must be class numbers or None: {error}") from error
    return ask("POST", f"{path}/labels", {"request": id, "labels": known})


def snapshot_path(path: str, name: str) -> str:
    """Where a stream's snapshot is."""
    return f"{path}/snapshots/{quote(name, safe='')}"


def target(snapshot: str | None, version: int | None) -> Json:
    """Where to roll back to."""
    return {key: value for key, value in (("snapshot", snapshot), ("version", version)) if value is not None}


def page(only: Filters, cursor: str | None) -> Call[tuple[list[Json], str | None]]:
    """A call for some streams, and the cursor of those that follow, if any."""

    def read(response: httpx.Response, attempt: int) -> tuple[list[Json], str | None]:
        found = orjson.loads(response.content)
        return found["streams"], found["next"]

    query: Json = {**only, **({} if cursor is None else {"cursor": cursor})}
    return Call("GET", f"/v1/streams?{httpx.QueryParams(query)}", read)


def stream_path(id: str) -> str:
    """Where a stream is."""
    return f"/v1/streams/{quote(id, safe='')}"


def infer(model: str, images: ArrayLike, timeout: float | None, controls: Json) -> Call[Answer]:
    """A prediction in V2's binary format. Raises ``BadInput`` for what is no array of numbers."""
    array = np.asarray(images)
    datatype = DATATYPES.get(f"{array.dtype.kind}{array.dtype.itemsize}")
    if datatype is None:
        raise errors.BadInput(f"images must be an array of numbers of at most 64 bits, got dtype {array.dtype}")
    rows = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    size = {"binary_data_size": rows.nbytes}
    tensor = {"name": "input", "shape": rows.shape, "datatype": datatype, "parameters": size}
    parameters = {**controls, "binary_data_output": True}
    if timeout is not None:
        parameters["timeout"] = math.ceil(timeout * 1e6) or 1  # 0 would mean none
    # Probabilities follow from the logits, so half of the answer need not be sent.
    asked = {"inputs": [tensor], "outputs": [{"name": "logits"}], "parameters": parameters}
    header = orjson.dumps(asked)

    def read(response: httpx.Response, attempt: int) -> Answer:
        split = int(response.headers["Inference-Header-Content-Length"])
        answer = orjson.loads(response.content[:split])
        report, (output,) = answer["parameters"], answer["outputs"]
        replayed = report.get("replayed", False)
        if replayed and attempt == 0:
            raise errors.Conflict(
                f"request number {controls['tta_seq']} of stream {controls['sequence_id']!r} was used before, so this "
                "answer is not about these images. Only one object may number a stream's requests; here, the next one "
                "takes the next number"
            )
        return Answer(
            logits=np.frombuffer(response.content, "<f4", offset=split).reshape(output["shape"]).astype(np.float32),
            version=report["state_version"],
            adapted=report["adapted"],
            policy=report["policy"],
            shed=report.get("shed", False),
            replayed=replayed,
            confidence=report.get("confidence"),
            drift=report.get("drift"),
            verdict=report.get("verdict"),
            agreement=report.get("agreement"),
            unsaved_steps=report.get("unsaved_steps"),
            lost_steps=report.get("lost_steps", 0),
            served=report.get("served"),
            guard=report.get("guard_state"),
            evidence=report.get("evidence"),
            benefit=report.get("benefit"),
            request=report.get("request_id"),
            behind=report.get("behind", 0),
        )

    kind = {"Content-Type": FILE, "Inference-Header-Content-Length": str(len(header))}
    return Call("POST", f"/v2/models/{quote(model, safe='')}/infer", read, b"".join((header, rows.data)), kind)


class Numbered:
    """A stream's place on the server, and the numbers of its predictions."""

    def __init__(self, info: Json) -> None:
        self.id, self.model = str(info["id"]), str(info["model"])
        self._path = stream_path(self.id)
        # Not from 0: a request of number 0 would begin the stream anew, with defaults, if the server lost it.
        self._next = int(info["last_number"] or 0) + 1

    def _infer(self, images: ArrayLike, adapt: bool | None, timeout: float | None) -> Call[Answer]:
        """A prediction under the next number, to be sent before another one is made."""
        controls = {"sequence_id": self.id, "tta_seq": self._next, **({} if adapt is None else {"tta_adapt": adapt})}
        self._next += 1
        return infer(self.model, images, timeout, controls)


def only_one(models: list[Json]) -> str:
    """The name of a server's only model. Raises ``BadInput``."""
    if len(models) != 1:
        raise errors.BadInput(f"name the model; there are: {', '.join(model['name'] for model in models)}")
    return str(models[0]["name"])


def options(url: str, token: str | None, timeout: float) -> Json:
    """For httpx's clients."""
    headers = {"Accept-Encoding": "identity"}  # scores do not compress
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    return {"base_url": url, "timeout": timeout, "headers": headers}


def retry_after(response: httpx.Response) -> int:
    """Seconds that the server asks to wait; 0 where it does not say so, or gives a date."""
    asked = response.headers.get("Retry-After", "")
    return int(asked) if asked.isdecimal() else 0


def pause(outcome: Outcome, attempt: int, repeats: bool = True) -> float | None:
    """Seconds between ``attempt``, counted from 0, and the next one; ``None``: this outcome is the last.

    Unless the call ``repeats``, so is any after which the server may have carried it out.

    The server's Retry-After, and a random part of a span that doubles, so that clients that were refused together do
    not come back together. ``LONGEST_PAUSE`` bounds each.
    """
    asked = 0
    if isinstance(outcome, httpx.Response):
        if outcome.status_code not in (429, 503):
            return None
        asked = retry_after(outcome)
    elif not isinstance(outcome, httpx.RequestError if repeats else UNSENT) or isinstance(outcome, UNFIT):
        return None
    return min(asked, LONGEST_PAUSE) + random.uniform(0, min(FIRST_PAUSE * 2.0 ** min(attempt, 9), LONGEST_PAUSE))


def result(call: Call[T], outcome: Outcome, attempt: int) -> T:
    """What came of a call, whose last attempt was ``attempt``; or the error that ``Client`` promises."""
    asked = f"{call.method} {call.path} at {outcome.request.url.netloc.decode()}"
    if isinstance(outcome, httpx.RequestError):
        raise NoAnswer(f"{asked} failed {attempt + 1} times: {outcome!r}") from outcome
    if outcome.is_success:
        try:
            return call.read(outcome, attempt)
        except (ValueError, LookupError, TypeError) as error:
            raise errors.TtaError(f"{asked} was answered as no tta-server does, check the URL: {error!r}") from error
    try:
        text = orjson.loads(outcome.content)["error"]
    except (ValueError, LookupError, TypeError):
        text = f"{asked} was answered {outcome.status_code}, not by a tta-server: {outcome.text[:200]!r}"
    refusal = ERRORS.get(outcome.status_code, errors.TtaError)(text)
    refusal.status = outcome.status_code  # type: ignore[attr-defined]  # errors.py knows no HTTP
    if isinstance(refusal, errors.QueueFull | errors.Unavailable):
        refusal.retry_after = retry_after(outcome) or refusal.retry_after
    raise refusal
