"""One forward pass for many streams: the network as a function of per-stream weights.

Two strategies, and a policy cannot tell which ran:

*segment*, where only tensors of norm layers are the streams' own: all rows go through the shared layers together, and
the norm layers (``norm.py``) apply each stream's weights and statistics to that stream's rows. Any mixture of batch
sizes is one pass.

*loop*, where others are, too: stream by stream, each through its own weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from adapters.base import BATCH_NORM, SOURCE_NORM, Output, Segments, Tensors
from adapters.gradient import leaves
from tta_server.drift.signals import LayerStatistics
from tta_server.engine.norm import KINDS, Conduit, Pass, StreamBatchNorm, replace_norms
from tta_server.engine.stable import stabilise
from tta_server.engine.traced import is_tracing, trace
from tta_server.errors import ConfigError
from tta_server.settings import InputSettings, type_and_line


class StreamwiseNetwork:
    """A frozen network in evaluation mode whose norm layers work per stream. One pass at a time.

    Takes ``network`` over: its norm layers are replaced in place, keeping their parameter names.
    """

    def __init__(self, network: nn.Module, spec: InputSettings, head: str, device: torch.device) -> None:
        self.device = device
        self.dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)
        self._network = network.eval().requires_grad_(False)
        self._conduit = Conduit()
        self.norm_layers = replace_norms(self._network, self._conduit)
        self._of_norms = {f"{layer}.{kind}" for layer in self.norm_layers for kind in KINDS}
        statistics = [one.running_mean for one in self._network.modules() if isinstance(one, StreamBatchNorm)]
        self.keeps_statistics = any(one is not None for one in statistics)
        """Whether there are batch norms with statistics to compare a stream's with."""
        self.mixes_rows = any(one is None for one in statistics)
        """Whether there are some without: then even the source's scores of a row depend on its request."""
        stabilise(self._network)
        self._network.to(device)
        self._channels_last = len(spec.shape) == 3 and self.dtype != torch.float64
        if self._channels_last:  # convolutions are fastest with a pixel's channels side by side
            self._network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in its stub
        # Torch's fused transformer layers read the norm layers' weights past their forward, and so past the streams'.
        torch.backends.mha.set_fastpath_enabled(False)
        self._own: dict[str, Any] = dict(self._network.named_parameters()) | dict(self._network.named_buffers())
        self._places: dict[str, list[tuple[dict[str, Any], str]]] = {key: [] for key in self._own}
        names = {id(value): key for key, value in self._own.items()}
        for module in self._network.modules():
            for held in (module._parameters, module._buffers):
                for name, value in held.items():
                    if value is not None:
                        self._places[names[id(value)]].append((held, name))
        self._features: Tensor | None = None
        self._graph: Callable[[Tensor], Output] | None = None
        self._stored: dict[tuple[str, ...], LayerStatistics] = {}
        self._network.get_submodule(head).register_forward_pre_hook(self._catch_features)
        per_channel = (-1, *[1] * (len(spec.shape) - 1))
        self._mean, self._std = (
            torch.tensor(values, dtype=self.dtype, device=device).view(per_channel) if values else None
            for values in (spec.mean, spec.std)
        )

    def try_pauses(self, spec: InputSettings, affine: Tensors) -> None:
        """Finds out whether passes may be interrupted on the way forward: not where the network keeps values of a pass
        outside of it (a skip connection on ``self``), which another one in its midst would replace. ``affine``: scales
        and shifts of one stream, ``[1, ...]``."""
        rows, segments = plain_rows(self, spec, 6), Segments([3], self.device)

        def run(pause: Callable[[], None] | None) -> list[Tensor]:
            own = leaves(affine)
            with torch.enable_grad(), self.pausing(pause):
                output = self.run(Pass(segments, own, BATCH_NORM), rows[:3])
                score = output.logits.square().sum() + output.features.square().sum()
                slopes = torch.autograd.grad(score, list(own.values()), allow_unused=True, materialize_grads=True)
            return [output.logits.detach(), output.features.detach(), *slopes]

        def others() -> None:
            if not inside:
                inside.append(True)
                self.run(Pass(segments, affine, BATCH_NORM), rows[3:])
                inside.clear()

        inside: list[bool] = []
        if affine:
            try:
                undisturbed = run(None)
                is_same = all(map(torch.equal, run(others), undisturbed))
            except Exception:  # of a network that expects to be left alone
                is_same = False
            self._conduit.only_on_the_way_back = not is_same

    @contextmanager
    def pausing(self, pause: Callable[[], None] | None) -> Iterator[None]:
        """Within this, ``pause`` is called between layers, on the way forward and on the way back; it may run other
        passes of this network. On a CPU; on a GPU the way back belongs to another thread."""
        outer, self._conduit.pause = self._conduit.pause, pause if self.device.type == "cpu" else None
        try:
            yield
        finally:
            self._conduit.pause = outer

    def compile_source(self, spec: InputSettings) -> None:
        """Has passes of the plain source run as one graph from now on, if there is one, see ``traced.py``."""
        any_rows = Segments([1], self.device)

        def run(x: Tensor) -> Output:
            segments = any_rows if is_tracing() else Segments([len(x)], self.device)
            return self._layer_by_layer(Pass(segments), x)

        if self.device.type == "cpu" and self.dtype == torch.float32:
            self._graph = trace(run, plain_rows(self, spec, 64))

    def run(self, now: Pass, x: Tensor) -> Output:
        """Runs ``x [N, ...]``, un-normalised, under the weights, segments and statistics of ``now``."""
        if self._graph is not None and not now.weights and now.norm == SOURCE_NORM and not now.observe:
            return self._graph(x)
        return self._layer_by_layer(now, x)

    def _layer_by_layer(self, now: Pass, x: Tensor) -> Output:
        if self._mean is not None and self._std is not None:
            x = (x - self._mean) / self._std
        if self._channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if now.weights.keys() <= self._of_norms:
            return self._pass(now.by_segment(), x, {})
        return self._loop(now, x)

    def _loop(self, now: Pass, x: Tensor) -> Output:
        """Each stream with rows by itself. Gradients reach the stacked weights through one ``unbind`` each."""
        # Of one stream without unbind, whose way back is a copy.
        weights = {k: v.unbind(0) if len(v) > 1 else (v.squeeze(0),) for k, v in now.weights.items()}
        outputs: list[Output] = []
        statistics: dict[int, Tensors] = {}
        sizes, each = now.segments.sizes, now.each
        segments = [sizes[first : first + each] for first in range(0, len(sizes), each)]
        for stream, rows in enumerate(x.split([sum(own) for own in segments])):
            if not len(rows):
                continue
            own = {key: value[stream] for key, value in weights.items()}
            norms = {key: value.unsqueeze(0) for key, value in own.items() if key in self._of_norms}
            shared = {key: value for key, value in own.items() if key not in self._of_norms}
            alone = Pass(Segments(segments[stream], self.device), norms, now.norm)
            outputs.append(self._pass(alone, rows, shared))
            statistics[stream] = outputs[-1].statistics
        some = next(iter(statistics.values()))
        for stream in range(len(segments)):
            # What a stream without rows had before.
            statistics.setdefault(stream, {key: self._reference(key, now, stream) for key in some})
        return Output(
            torch.cat([one.logits for one in outputs]),
            torch.cat([one.features for one in outputs]),
            {key: torch.cat([statistics[stream][key] for stream in range(len(segments))]) for key in some},
        )

    def _reference(self, key: str, now: Pass, stream: int) -> Tensor:
        """The statistics ``[1, channels]`` under ``key`` that a stream brought along, else the source's."""
        given = now.weights.get(key)
        return self._network.get_buffer(key).unsqueeze(0) if given is None else given[stream : stream + 1]

    def _pass(self, now: Pass, x: Tensor, replaced: Tensors) -> Output:
        """The network on normalised rows, with the tensors ``replaced`` in the place of its own."""
        # What this pass may have come into the midst of, and whether others may come into the midst of it.
        outer, pause, seen = self._conduit.current, self._conduit.pause, self._features
        self._conduit.current = now
        self._conduit.pause = None if replaced else pause
        try:
            with self._holding(replaced):
                logits = self._network(x)
            features = self._features
        finally:
            self._conduit.current, self._conduit.pause, self._features = outer, pause, seen
        if features is None:
            raise ConfigError("the classifier head did not run in the forward pass; name the right layer as 'head'")
        return Output(logits, features, now.statistics)

    @contextmanager
    def _holding(self, replaced: Tensors) -> Iterator[None]:
        """Within this, the network has these tensors in the place of its own: ``torch.func.functional_call`` without
        its search for names, which takes as long as several layers."""
        try:
            for key, value in replaced.items():
                for own, name in self._places[key]:
                    own[name] = value
            yield
        finally:
            for key in replaced:
                for own, name in self._places[key]:
                    own[name] = self._own[key]

    def observed(self, now: Pass) -> tuple[NDArray[Any], NDArray[Any], LayerStatistics] | None:
        """What an observing pass left: mean and variance by stream of all layers side by side, ``[S, channels]``, and
        the source's stored ones; ``None`` for a network without batch norms."""
        if not now.observed:
            return None
        names = tuple(name for name, _, _ in now.observed)
        if names not in self._stored:
            self._stored[names] = self._layer_statistics(names)
        mean = torch.cat([one for _, one, _ in now.observed], 1).float().cpu().numpy()
        var = torch.cat([one for _, _, one in now.observed], 1).float().cpu().numpy()
        return mean, var, self._stored[names]

    def _layer_statistics(self, names: tuple[str, ...]) -> LayerStatistics:
        layers = [one for one in map(self._network.get_submodule, names) if isinstance(one, StreamBatchNorm)]
        sizes = [layer.channels for layer in layers]
        mean, var = (
            np.concatenate([layer.get_buffer(key).float().cpu().numpy() for layer in layers])
            for key in ("running_mean", "running_var")
        )
        return LayerStatistics(
            mean=mean,
            var=var,
            eps=np.repeat([layer.eps for layer in layers], sizes),
            starts=np.cumsum([0, *sizes[:-1]]),
        )

    def _catch_features(self, head: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0]


class Probed(NamedTuple):
    """What a run of the network showed."""

    classes: int
    features: int
    row_gap: float
    """Largest difference between rows' scores in a batch and alone: 0, or rounding."""


def plain_rows(network: StreamwiseNetwork, spec: InputSettings, count: int) -> Tensor:
    """Inputs ``[count, ...]`` to try a network with: within the range, all different, always the same."""
    low, high = spec.range or (-1.0, 1.0)
    size = (count, *spec.shape)
    ramp = torch.linspace(0, 1, math.prod(size), dtype=torch.float64).view(size)
    return (low + (high - low) * (0.5 + 0.5 * torch.sin(1e3 * ramp))).to(network.device, network.dtype)


def probe(network: StreamwiseNetwork, spec: InputSettings) -> Probed:
    """Checks that the network is one we can serve, by running it.

    Three streams of one row each must score alike together and one by one: a layer that mixes rows would let streams
    leak into one another. Raises ``ConfigError``.
    """
    x = plain_rows(network, spec, 3)
    try:
        together = network.run(Pass(Segments([1, 1, 1], network.device)), x)
        alone = [network.run(Pass(Segments([1], network.device)), row.unsqueeze(0)) for row in x]
    except ConfigError:
        raise
    except Exception as error:  # whatever a user's own forward raises is a fault of the config
        raise ConfigError(
            f"the model does not run on inputs of shape {list(spec.shape)}: {type_and_line(error)}"
        ) from error
    if not isinstance(together.logits, Tensor):
        raise ConfigError(
            f"the model returns a {type(together.logits).__name__}; it must return the scores alone, "
            "a tensor [rows, classes]"
        )
    for rows, output in ((3, together), *((1, one) for one in alone)):
        for name, value in (("scores", output.logits), ("input of the head", output.features)):
            if value.dim() != 2 or len(value) != rows:
                raise ConfigError(f"the {name} must be [rows, values], got {list(value.shape)} for {rows} rows")
    if not together.logits.isfinite().all():
        raise ConfigError("the model's scores for plain inputs are not finite; are the weights sound?")
    gap = (together.logits - torch.cat([one.logits for one in alone])).abs().max().item()
    if gap > 1e-3 * max(1.0, together.logits.abs().max().item()):
        raise ConfigError(
            f"rows influence one another in this model (scores differ by {gap:.3g} between a batch and single rows), "
            "so streams cannot share it; does a layer other than the known norm layers use batch statistics?"
        )
    return Probed(together.logits.shape[1], together.features.shape[1], gap)
