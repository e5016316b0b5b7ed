"""How many small requests to merge into one step, measured on the machine at hand.

Merging spreads what a step costs whatever its size (calls, small kernels, weights read from memory) over more rows. On
a CPU that soon is next to nothing, and tensors that no longer fit into the caches cost more; a GPU is not filled by
less.
"""

from __future__ import annotations

import logging
import time

import torch

from adapters import gradient, losses
from adapters.base import BATCH_NORM, Segments
from tta_server.engine.forward import plain_rows
from tta_server.engine.norm import Pass
from tta_server.engine.source import SourceModel

log = logging.getLogger(__name__)

LEAST_ROWS = 4
MOST_ROWS = {"cpu": 64, "cuda": 512}
LONGEST = 0.25
"""Seconds: a step that takes longer would keep others waiting, however well it merges."""
WORTH = 0.95
"""A row's share of the time has to fall below this much of what it was for fewer rows."""


def best_rows(model: SourceModel) -> int:
    """How many streams' single rows a step merges for the least time a row: of forward and backward pass, each stream
    with scales and shifts of its own. Takes a second or two."""
    device = model.network.device
    best, least, rows = LEAST_ROWS, float("inf"), LEAST_ROWS
    while rows <= MOST_ROWS.get(device.type, 64):
        seconds = _step_seconds(model, rows)
        if seconds > LONGEST and rows > LEAST_ROWS:
            break
        if seconds / rows < WORTH * least:
            best, least = rows, seconds / rows
        rows *= 2
    log.info("requests are merged", extra={"model": model.name, "rows": best, "seconds_per_row": round(least, 6)})
    return best


def _step_seconds(model: SourceModel, rows: int) -> float:
    """The best of a few turns, since whatever else the machine does only ever slows; the first one only warms up."""
    network, source = model.network, model.source
    x = plain_rows(network, model.settings.input, rows)
    weights = {key: value.clone() for key, value in source.spread(source.affine, rows).items()}
    turns = []
    for _ in range(6):
        started = time.perf_counter()
        own = gradient.leaves(weights)
        with torch.set_grad_enabled(bool(own)):
            output = network.run(Pass(Segments([1] * rows, network.device), own, BATCH_NORM), x)
        if own:
            gradient.per_stream(losses.entropy(output.logits), own)
        if network.device.type == "cuda":
            torch.cuda.synchronize()
        turns.append(time.perf_counter() - started)
        if turns[0] > LONGEST:
            break
    return min(turns[1:] or turns)
