"""One policy step over the rows of some jobs: up to the scores, and on to the new state."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from adapters import rng, serving
from adapters.base import SOURCE_NORM, Batch, Norm, Output, Segments, State, Step
from tta_server.engine.norm import Pass
from tta_server.engine.source import SourceModel
from tta_server.types import Job, Lane


class PolicyRun:
    """A policy's step, in its two halves. Mutates nothing outside.

    ``segments`` and ``x [N, ...]`` are the jobs' rows on the device.
    """

    def __init__(self, model: SourceModel, lane: Lane, jobs: list[Job], state: State) -> None:
        device, dtype = model.network.device, model.network.dtype
        self.segments = Segments([job.rows for job in jobs], device)
        self.source: Output | None = None
        """What the plain source says of all rows, where the policy asked it."""
        self.policy = lane.policy
        self.head: Mapping[str, Tensor] = {}
        """Of that network, what is the streams' own: ``weight`` and ``bias`` of the classifier head, ``[S, ...]``."""
        self._scored = False
        self.own: Output | None = None
        """What the policy's own network says of all rows before anything is made of it: its last pass before the
        scores."""
        self.x = _together([job.x for job in jobs if job.x is not None], device).to(dtype)

        def network(weights: Mapping[str, Tensor], x: Tensor, segments: Segments, norm: Norm) -> Output:
            output = model.network.run(Pass(segments, weights, norm), x)
            if x is self.x and not weights and norm == SOURCE_NORM:
                self.source = output
            if x is self.x and not self._scored:
                self.own = Output(output.logits.detach(), output.features.detach())
                head = model.source.head
                self.head = {
                    kind: weights[f"{head}.{kind}"].detach()
                    for kind in ("weight", "bias")
                    if f"{head}.{kind}" in weights
                }
            return output

        keys = torch.tensor([job.stream.random_key for job in jobs])
        versions = torch.tensor([job.stream.version for job in jobs])
        batch = Batch(self.x, self.segments, network, lane.policy.norm, rng.Random(keys, versions, dtype, device))
        self._step = serving.step(lane.policy, model.source, state, batch)

    def scores(self) -> Tensor:
        """Runs to the ``yield``: the logits to serve, ``[N, C]`` on the CPU, at least float32."""
        logits = next(self._step).detach()
        self._scored = True
        return logits.to("cpu", torch.promote_types(logits.dtype, torch.float32))

    def stop(self) -> None:
        """Ends the step after its scores."""
        self._step.close()

    def finish(self) -> Step:
        """Runs the rest, the scores too where nobody asked for them yet. Raises what the policy raises, and
        ``RuntimeError`` for a second ``yield``."""
        if not self._scored:
            self.scores()
        try:
            next(self._step)
        except StopIteration as end:
            step: Step = end.value
            return step
        self._step.close()
        raise RuntimeError("the policy yielded a second time; a step yields its logits once")


def _together(parts: list[Tensor], device: torch.device) -> Tensor:
    """The rows of all parts on the device. To a GPU by way of pinned memory, which nothing waits for."""
    if device.type != "cuda":
        return torch.cat(parts).to(device)
    rows = torch.empty(sum(map(len, parts)), *parts[0].shape[1:], dtype=parts[0].dtype, pin_memory=True)
    return torch.cat(parts, out=rows).to(device, non_blocking=True)
