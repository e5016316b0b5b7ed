"""The demo's clients: camera streams that drift, each sending batches of held-out digits over HTTP.

Every figure comes from the wire. A batch is sent twice: first to be answered as the stream is served, then with
``?adapt=false``, where the plain source model answers and the stream's state rests. The clients know the labels; the
server is never told one.
"""

from __future__ import annotations

import asyncio
import io
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from tta_server.demo.corruptions import CORRUPTIONS, Images
from tta_server.demo.data import Digits
from tta_server.errors import TtaError

WORST_SEVERITY = 0.8


class DemoFailed(TtaError):
    """The demo's server did not start, did not answer, or answered with an error."""


@dataclass(frozen=True)
class Camera:
    """One client stream: how its images go bad, and when. Times are shares of the run."""

    id: str
    corruption: str | None
    """A key of ``CORRUPTIONS``; none for a camera that stays clean."""
    drifts_for: float = 2 / 3
    """While the severity grows evenly from 0 to ``WORST_SEVERITY``, to stay there."""
    switched_on_at: float | None = None
    """When adaptation is switched on; ``None``: it is on from the start."""
    labelled: bool = False
    """Whether it sends the labels of each batch back, after the answer."""

    def severity(self, batch: int, batches: int) -> float:
        """Of the ``batch``-th of ``batches``, counted from 0."""
        return WORST_SEVERITY * min(1.0, batch / (self.drifts_for * batches)) if self.corruption else 0.0

    def switch(self, batches: int) -> int | None:
        """The batch before which adaptation is switched on."""
        return None if self.switched_on_at is None else int(self.switched_on_at * batches)


LABELLED = ("noise", "rotation")
"""Here adaptation helps, but too little for the guard's estimate to show it: only labels do."""
CAMERAS = (
    *(Camera(f"camera-{name}", name, labelled=name in LABELLED) for name in CORRUPTIONS),
    Camera("camera-clean", None),
    # Drifts quickly, so that its drift is full before adaptation is switched on.
    Camera("camera-switched", "blur", drifts_for=1 / 3, switched_on_at=1 / 2),
)


@dataclass(frozen=True)
class Record:
    """What one batch was answered. Errors are shares of its rows."""

    severity: float
    source_error: float
    served_error: float
    drift: float | None
    verdict: str
    version: int
    adapted: bool
    guard: str
    """State of the stream's guard."""
    sample: Images
    """The batch's first image as it was sent, ``[H, W]``."""


@dataclass
class Run:
    """One camera's way through the demo; ``records`` grows by one per batch."""

    camera: Camera
    batches: int
    records: list[Record] = field(default_factory=list)


class Session:
    """All cameras against one server, at once."""

    def __init__(
        self, url: str, digits: Digits, batches: int, batch_size: int, seed: int, interval: float, token: str = ""
    ) -> None:
        self.runs = [Run(camera, batches) for camera in CAMERAS]
        self.answered = 0
        """Requests so far."""
        self._url, self._digits, self._batch_size, self._interval = url, digits, batch_size, interval
        self._generators = [np.random.default_rng([seed, index]) for index in range(len(self.runs))]
        self._started, self._token = 0.0, token

    @property
    def batches_done(self) -> int:
        """By all cameras."""
        return sum(len(run.records) for run in self.runs)

    @property
    def seconds(self) -> float:
        """Since the first request."""
        return time.monotonic() - self._started if self._started else 0.0

    async def drive(self) -> None:
        """Sends everything. Raises ``DemoFailed`` with the first thing that went wrong."""
        self._started, self.answered = time.monotonic(), 0
        for run in self.runs:
            run.records.clear()
        # trust_env: a proxy set in the environment must not be asked for the loopback address.
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        async with httpx.AsyncClient(base_url=self._url, timeout=60, trust_env=False, headers=headers) as client:
            tasks = [
                asyncio.create_task(self._film(client, run, rng))
                for run, rng in zip(self.runs, self._generators, strict=True)
            ]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()

    async def _film(self, client: httpx.AsyncClient, run: Run, rng: np.random.Generator) -> None:
        camera, switch = run.camera, run.camera.switch(run.batches)
        path = f"/v1/streams/{camera.id}"
        await self._call(client, "PUT", path, json={"adapt": switch is None})
        for index, (images, labels) in enumerate(_draw(self._digits, run.batches, self._batch_size, rng)):
            if index == switch:
                await self._call(client, "PATCH", path, json={"adapt": True})
            await asyncio.sleep(max(0.0, index * self._interval - self.seconds))
            severity = camera.severity(index, run.batches)
            if camera.corruption is not None:
                images = CORRUPTIONS[camera.corruption](images, severity, rng)
            body = npy(images)
            served = await self._call(client, "POST", f"{path}/predict", content=body)
            source = await self._call(client, "POST", f"{path}/predict?adapt=false", content=body)
            if camera.labelled:
                await self._call(
                    client, "POST", f"{path}/labels", json={"request": served["request"], "labels": labels.tolist()}
                )
            run.records.append(
                Record(
                    severity=severity,
                    source_error=_error(source["classes"], labels),
                    served_error=_error(served["classes"], labels),
                    drift=served["drift"],
                    verdict=served["verdict"],
                    version=served["version"],
                    adapted=served["adapted"],
                    guard=served["guard"]["state"] if served["guard"] else "",
                    sample=images[0, 0],
                )
            )

    async def _call(self, client: httpx.AsyncClient, method: str, path: str, **content: Any) -> dict[str, Any]:
        try:
            response = await client.request(method, path, **content)
        except httpx.HTTPError as error:
            raise DemoFailed(f"{method} {path} got no answer: {error!r}") from error
        if not response.is_success:
            text = response.text
            with suppress(ValueError, KeyError, TypeError):
                text = response.json()["error"]
            raise DemoFailed(f"{method} {path} was answered {response.status_code}: {text}")
        self.answered += 1
        answer: dict[str, Any] = response.json()
        return answer


def npy(array: NDArray[Any]) -> bytes:
    """The array as the content of a ``.npy`` file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _draw(digits: Digits, batches: int, size: int, rng: np.random.Generator) -> Iterator[Digits]:
    """Random batches: every digit once, in random order, before any comes again."""
    images, labels = digits
    rounds = -(-batches * size // len(labels))
    order = np.concatenate([rng.permutation(len(labels)) for _ in range(rounds)])
    for rows in order[: batches * size].reshape(batches, size):
        yield images[rows], labels[rows]


def _error(classes: Sequence[int], labels: NDArray[np.int64]) -> float:
    return float(np.mean(np.asarray(classes) != labels))
