"""What every policy can have around its own step: a window for small requests, a periodic reset, robust statistics.

The server calls :func:`init` and :func:`step` here; with none of these settings they are the policy's own.

*Window.* A policy that normalises by the batch needs one; a client that sends an image at a time has none. With a
window of ``W`` rows, a request is answered by moving statistics: every batch norm keeps an average over the stream's
rows, each new one weighing ``1 / W`` (``Norm.per_row``), which starts at the source. The rows are kept, and each time
``W`` new ones have come the policy takes its own step on these, normalised by their own batch statistics. Models
without batch norm answer by the policy's weights as they stand.

*Reset.* After ``reset_after`` rows everything a stream has learned is dropped and it starts from the source again
(RDumb, Press et al., NeurIPS 2023, arXiv 2306.05401; theirs is 1,000 batches of 64). It is looked at before a request,
so that a request is answered whole by one state.

*Robust statistics.* A policy that normalises by the batch can do so about the median, or with the source's statistics
as so many rows more (``Norm.median``, ``Norm.prior``): :func:`norm_of` says how its batch norms then normalise. A norm
that the policy itself names in ``Batch.forward`` stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Generator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from adapters.base import BATCH_NORM, Batch, Norm, Output, Policy, Segments, Source, State, Step, Tensors
from adapters.images import ImageStore

log = logging.getLogger(__name__)

_WINDOW, _SEEN = "window.", "reset.rows"
_ROWS, _COUNT = f"{_WINDOW}x", f"{_WINDOW}rows"


def init(policy: Policy, source: Source) -> State:
    """The state of one new stream. Raises ``ValueError`` where the policy cannot run on this source."""
    _check_statistics(policy, source)
    state = policy.init(source)
    memory = dict(state.memory)
    if policy.window:
        if policy.norm != BATCH_NORM:
            raise ValueError(
                f"{policy.name} takes no window: it does not normalise by the batch, so small requests do it no harm"
            )
        for network in range(policy.networks):
            memory |= {_statistic(network, key): value for key, value in source.stacked(source.statistics).items()}
        if policy.window_images != "none" and (state.weights or state.memory):
            memory[_ROWS] = _images(policy, source).empty(policy.window)
            memory[_COUNT] = torch.zeros(1, dtype=torch.int64, device=source.device)
    if policy.reset_after:
        memory[_SEEN] = torch.zeros(1, dtype=torch.int64, device=source.device)
    return State(state.weights, memory)


def step(policy: Policy, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
    """The policy's step, as :meth:`Policy.step`, with what surrounds it."""
    batch = replace(batch, norm=norm_of(policy))
    seen = state.memory.get(_SEEN)
    if seen is None:
        return (yield from _windowed(policy, source, state, batch))
    due = seen >= policy.reset_after
    if due.any():
        state = _where(due, init(policy, source), state)
    memory = {key: value for key, value in state.memory.items() if key != _SEEN}
    done = yield from _windowed(policy, source, State(state.weights, memory), batch)
    seen = state.memory[_SEEN] + batch.segments.counts
    return Step(State(done.state.weights, done.state.memory | {_SEEN: seen}), done.signals | {"reset": due.double()})


def norm_of(policy: Policy) -> Norm:
    """How batch norms normalise under a policy as it is set."""
    norm = policy.norm
    if policy.statistics == "median":
        norm = replace(norm, median=True)
    if policy.source_rows:
        norm = replace(norm, prior=policy.source_rows)
    return norm


def _check_statistics(policy: Policy, source: Source) -> None:
    """Raises ``ValueError`` where the settings of :func:`norm_of` would do nothing, or not what they say."""
    median = policy.statistics == "median"
    if not median and not policy.source_rows:
        return
    setting = "median statistics" if median else "source_rows"
    if policy.window:
        raise ValueError(
            f"{policy.name} takes no {setting} with a window, whose requests are answered by moving averages: these "
            "are means, and start at the source anyway"
        )
    if median and not policy.norm.weight:
        raise ValueError(f"{policy.name} takes no median statistics: it does not normalise by the batch")
    if policy.source_rows and policy.norm != BATCH_NORM:
        raise ValueError(f"{policy.name} takes no source_rows: it does not normalise by the batch alone")
    if policy.source_rows and not source.statistics:
        raise ValueError(
            f"{policy.name} takes no source_rows here: this model has no batch-norm statistics of the source to count"
        )


def _windowed(policy: Policy, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
    if not policy.window:
        return (yield from policy.step(source, state, batch))
    inner = State(state.weights, {key: v for key, v in state.memory.items() if not key.startswith(_WINDOW)})
    kept = {key: value for key, value in state.memory.items() if key.startswith(_WINDOW)}
    logits, statistics = _answer(policy, source, inner, kept, batch)
    yield logits
    kept |= statistics
    signals: Tensors = {}
    if _ROWS in kept:
        inner, kept[_ROWS], kept[_COUNT] = _fill(policy, source, inner, kept, batch, signals)
    elif inner.weights or inner.memory:
        large = [one for one, size in enumerate(batch.segments.sizes) if size >= policy.window]
        parts = batch.x.split(batch.segments.sizes)
        inner = _adapt(policy, source, inner, batch, {one: parts[one] for one in large}, "window 0", signals)
    return Step(State(inner.weights, inner.memory | kept), signals)


def _answer(policy: Policy, source: Source, inner: State, kept: Tensors, batch: Batch) -> tuple[Tensor, Tensors]:
    """The logits by moving statistics, and these statistics, moved on."""
    norm = Norm(1 / policy.window, running=True, per_row=True)
    moved: Tensors = {}
    networks = iter(range(policy.networks))

    def network(weights: Mapping[str, Tensor], x: Tensor, segments: Segments, _: Norm) -> Output:
        index = next(networks)
        own = {key: kept[_statistic(index, key)] for key in source.statistics}
        output = batch.network({**weights, **own}, x, segments, norm)
        moved.update({_statistic(index, key): value for key, value in output.statistics.items()})
        return output

    with torch.no_grad():
        return policy.answer(inner, replace(batch, network=network)), moved


def _fill(
    policy: Policy, source: Source, inner: State, kept: Tensors, batch: Batch, signals: Tensors
) -> tuple[State, Tensor, Tensor]:
    """Puts the request's rows into the windows; a stream whose window is full takes a step on it and empties it."""
    images, rows = _images(policy, source), kept[_ROWS].clone()
    left = list(images.pack(batch.x).split(batch.segments.sizes))
    counts: list[int] = kept[_COUNT].tolist()
    # The k-th time a window fills is the k-th round in any company, so its draws are the same.
    turn = 0
    while any(len(one) for one in left):
        full = {}
        for stream, waiting in enumerate(left):
            taken = waiting[: policy.window - counts[stream]]
            rows[stream, counts[stream] : counts[stream] + len(taken)] = taken
            left[stream] = waiting[len(taken) :]
            counts[stream] += len(taken)
            if counts[stream] == policy.window:
                full[stream] = images.unpack(rows[stream])
                counts[stream] = 0
        inner = _adapt(policy, source, inner, batch, full, f"window {turn}", signals)
        turn += 1
    return inner, rows, torch.tensor(counts, device=rows.device)


def _adapt(
    policy: Policy, source: Source, state: State, batch: Batch, rows: dict[int, Tensor], name: str, signals: Tensors
) -> State:
    """The state after a step of the streams that ``rows`` has rows of. Their signals go to ``signals``; a stream that
    took no step has NaN there.

    A stream whose step is not finite, or fails where it is alone, keeps the weights it had: what else the request
    brought along is sound, and rows that cannot be learned from must not stay in the window for ever.
    """
    if not rows:
        return state
    streams = list(rows)
    index = torch.tensor(streams, device=batch.x.device)
    segments = Segments([len(one) for one in rows.values()], batch.x.device)
    part = State(
        {key: value.index_select(0, index) for key, value in state.weights.items()},
        {key: value.index_select(0, index) for key, value in state.memory.items()},
    )
    try:
        done = run(policy, source, part, batch.among(streams, torch.cat(list(rows.values())), segments, name))
    except Exception:  # of several streams, the server tries each again by itself
        if batch.segments.streams > 1:
            raise
        log.exception("the step of a window failed; the stream goes on without it")
        done = Step(part)
        is_sound = torch.zeros(1, dtype=torch.bool, device=index.device)
    else:
        is_sound = _is_finite(done.state, len(streams), index.device)
        done = Step(_where(is_sound, done.state, part), done.signals)
    for key, value in {**done.signals, "window_rejected": (~is_sound).double()}.items():
        before = signals.get(key, torch.full((batch.segments.streams,), torch.nan, dtype=torch.float64))
        signals[key] = before.to(value.device).index_copy(0, index, value.double())
    return State(
        {key: state.weights[key].index_copy(0, index, value) for key, value in done.state.weights.items()},
        {key: state.memory[key].index_copy(0, index, value) for key, value in done.state.memory.items()},
    )


def run(policy: Policy, source: Source, state: State, batch: Batch) -> Step:
    """A whole step of the policy itself; what it answers is not wanted."""
    running = policy.step(source, state, batch)
    next(running)
    try:
        next(running)
    except StopIteration as end:
        done: Step = end.value
        return done
    running.close()
    raise RuntimeError("the policy yielded a second time; a step yields its logits once")


def _is_finite(state: State, streams: int, device: torch.device) -> Tensor:
    """Whether all of a stream's state is finite, ``[S]``."""
    sound = torch.ones(streams, dtype=torch.bool, device=device)
    for value in (*state.weights.values(), *state.memory.values()):
        if value.is_floating_point():
            sound &= value.isfinite().flatten(1).all(1)
    return sound


def _images(policy: Policy, source: Source) -> ImageStore:
    return ImageStore(source, exact=policy.window_images == "exact")


def _statistic(network: int, key: str) -> str:
    return f"{_WINDOW}{network}.{key}"


def _where(mask: Tensor, fresh: State, old: State) -> State:
    """``fresh`` (of ``S`` streams or one) for the streams of ``mask [S]``, ``old`` for the others."""

    def choose(new: Tensors, before: Tensors) -> Tensors:
        return {
            key: torch.where(mask.view(-1, *[1] * (value.dim() - 1)), new[key], value) for key, value in before.items()
        }

    return State(choose(fresh.weights, old.weights), choose(fresh.memory, old.memory))
