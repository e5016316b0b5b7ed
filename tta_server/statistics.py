"""Running totals per model since the start, as the Open Inference Protocol's statistics extension reports them."""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from tta_server.types import Call, Event, StepStats


@dataclass
class _Total:
    count: int = 0
    ns: int = 0

    def add(self, seconds: float, count: int = 1) -> None:
        self.count += count
        self.ns += round(seconds * 1e9)

    def told(self) -> dict[str, int]:
        return {"count": self.count, "ns": self.ns}


@dataclass
class _Model:
    last_ms: int = 0
    rows: int = 0
    steps: int = 0
    success: _Total = field(default_factory=_Total)
    fail: _Total = field(default_factory=_Total)
    queue: _Total = field(default_factory=_Total)
    decode: _Total = field(default_factory=_Total)
    infer: _Total = field(default_factory=_Total)
    encode: _Total = field(default_factory=_Total)
    batches: dict[int, _Total] = field(default_factory=lambda: defaultdict(_Total))
    """Forward passes by the rows in a step."""


class Statistics:
    """A recorder. Written by the event loop and the device thread, each its own numbers."""

    def __init__(self) -> None:
        self._models: dict[str, _Model] = defaultdict(_Model)

    def step(self, stats: StepStats) -> None:
        """Counts rows, steps, time in the queue and in the forward pass."""
        model, rows = self._models[stats.lane.model], sum(job.rows for job in stats.jobs)
        if not stats.jobs:
            return
        model.rows += rows
        model.steps += 1
        model.last_ms = round(time.time() * 1e3)
        model.queue.add(sum(job.queue_seconds for job in stats.jobs), len(stats.jobs))
        model.infer.add(stats.forward_seconds * len(stats.jobs), len(stats.jobs))
        model.batches[rows].add(stats.forward_seconds)

    def event(self, event: Event) -> None:
        """See :class:`tta_server.metrics.Recorder`."""

    def request(self, call: Call) -> None:
        """Counts prediction requests, and the time they took in all and to decode and encode."""
        if call.predicts and call.model:
            model = self._models[call.model]
            (model.success if call.code == 200 else model.fail).add(call.seconds)
            if call.code == 200:
                model.decode.add(call.decode_seconds)
                model.encode.add(call.encode_seconds)

    def of(self, name: str, version: str) -> dict[str, Any]:
        """One entry of ``model_stats``: rows as ``inference_count``, engine steps as ``execution_count``.

        ``compute_infer`` counts a step's forward pass once for each of its requests, as each of them waited for it;
        ``batch_stats`` counts it once, by the step's rows.
        """
        model, nothing = self._models[name], _Total().told()
        return {
            "name": name,
            "version": version,
            "last_inference": model.last_ms,
            "inference_count": model.rows,
            "execution_count": model.steps,
            "inference_stats": {
                "success": model.success.told(),
                "fail": model.fail.told(),
                "queue": model.queue.told(),
                "compute_input": model.decode.told(),
                "compute_infer": model.infer.told(),
                "compute_output": model.encode.told(),
                "cache_hit": nothing,
                "cache_miss": nothing,
            },
            "batch_stats": [
                {
                    "batch_size": rows,
                    "compute_input": nothing,
                    "compute_infer": total.told(),
                    "compute_output": nothing,
                }
                for rows, total in sorted(model.batches.copy().items())
            ],
        }
