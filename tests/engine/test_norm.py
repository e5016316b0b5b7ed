"""The stream-wise norm layers against plain formulas, one stream at a time, with autograd for the gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.base import BATCH_NORM, SOURCE_NORM, Norm, Segments, Tensors
from tta_server.engine.forward import StreamwiseNetwork
from tta_server.engine.norm import (
    Conduit,
    Pass,
    StreamBatchNorm,
    StreamGroupNorm,
    StreamLayerNorm,
    StreamNorm,
    replace_norms,
)
from tta_server.engine.segment_norm import _lower_median
from tta_server.settings import InputSettings

CHANNELS = 4
SIZES = ([3, 1, 5], [2, 2], [6])
"""Rows by stream."""
POSITIONS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "1d": (nn.BatchNorm1d, ()),
    "1d-sequence": (nn.BatchNorm1d, (3,)),
    "2d": (nn.BatchNorm2d, (3, 2)),
    "3d": (nn.BatchNorm3d, (2, 1, 3)),
}
"""Layer type and what follows the channel dimension of its input."""
NORMS = {
    "source": SOURCE_NORM,
    "batch": BATCH_NORM,
    "blend": Norm(0.3),
    "blend-nearly-all": Norm(0.999),
    "running": Norm(0.2, running=True),
    "running-all": Norm(1.0, running=True),
    "running-none": Norm(0.0, running=True),
    "prior": Norm(1.0, prior=3),
    "median": Norm(1.0, median=True),
    "median-prior": Norm(1.0, median=True, prior=3),
    "median-blend": Norm(0.3, median=True),
    "median-running": Norm(0.2, running=True, median=True),
}
OWN = {
    "shared": (),
    "affine": ("weight", "bias"),
    "statistics": ("running_mean", "running_var"),
    "all": ("weight", "bias", "running_mean", "running_var"),
}
"""Which of the layer's tensors each stream has of its own."""


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_norm(kind: type[nn.Module] = nn.BatchNorm2d, channels: int = CHANNELS, **settings: Any) -> Any:
    """A trained-looking layer: statistics and affine parameters far from 0 and 1."""
    layer = kind(channels, **settings).double().eval()
    with torch.no_grad():
        for index, (name, value) in enumerate((*layer.named_parameters(), *layer.named_buffers())):
            if value.dim():
                value.copy_(
                    0.5 + uniform(channels, seed=index)
                    if "var" in name or "w" in name
                    else normal(channels, seed=index)
                )
    return layer.requires_grad_(False)


def own_tensors(names: tuple[str, ...], streams: int) -> Tensors:
    """Tensors ``[S, channels]`` that differ from stream to stream, by the layer's name ``bn``."""
    made = {}
    for index, name in enumerate(names):
        positive = name in ("weight", "running_var")
        shape = (streams, CHANNELS)
        made[f"bn.{name}"] = 0.5 + uniform(*shape, seed=90 + index) if positive else normal(*shape, seed=90 + index)
    return made


def streamwise(layer: nn.Module, now: Pass, name: str = "bn", kind: type[StreamNorm] = StreamBatchNorm) -> nn.Module:
    """The engine's layer in place of ``layer``, with its current pass set."""
    conduit = Conduit()
    conduit.current = now
    return kind(layer, name, conduit)


def plain_batch_norm(x: Tensor, tensors: Tensors, norm: Norm, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """One stream, from the definition: the output, and the mean and variance that normalised it."""
    dims = [0, *range(2, x.dim())]
    n = x.numel() // x.shape[1]
    mean, var = tensors["running_mean"], tensors["running_var"]
    if norm.weight and n > 1:
        weight = len(x) / (norm.prior + len(x)) if norm.prior else norm.weight
        batch_mean = x.mean(dims)
        pure = weight == 1 and not norm.running
        batch_var = x.var(dims, correction=0 if pure else 1)
        if norm.median:
            batch_mean, batch_var = about_median(x)
        mean = (1 - weight) * mean + weight * batch_mean
        var = (1 - weight) * var + weight * batch_var
    shape = (1, -1, *[1] * (x.dim() - 2))
    y = (x - mean.view(shape)) / torch.sqrt(var.view(shape) + eps)
    return y * tensors["weight"].view(shape) + tensors["bias"].view(shape), mean, var


def about_median(x: Tensor) -> tuple[Tensor, Tensor]:
    """By channel the median, of which torch takes the lower one and shares its gradient among ties, and the mean
    squared deviation from it."""
    by_channel = x.transpose(0, 1).flatten(1)
    median = torch.stack([channel.median() for channel in by_channel])
    return median, (by_channel - median.unsqueeze(1)).square().mean(1)


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("mode", NORMS)
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_batch_norm_equals_the_definition(positions: str, mode: str, own: str, sizes: list[int]) -> None:
    """Values, new statistics and gradients (of the input, scales and shifts) in every mode, for ragged streams, where a
    stream with a single value per channel (one row, no positions) keeps the reference."""
    kind, after = POSITIONS[positions]
    layer, norm, segments = batch_norm(kind), NORMS[mode], Segments(sizes)
    weights = own_tensors(OWN[own], len(sizes))
    trained = [value.requires_grad_() for key, value in weights.items() if "running" not in key]
    x = (1.5 * normal(sum(sizes), CHANNELS, *after, seed=7) + 0.3).requires_grad_()
    probe = normal(*x.shape, seed=8)

    now = Pass(segments, weights, norm)
    y = streamwise(layer, now)(x)
    gradients = torch.autograd.grad((y * probe).sum(), [x, *trained])

    parts, means, variances = [], [], []
    for index, rows in enumerate(x.split(sizes)):
        tensors = {name: getattr(layer, name) for name in OWN["all"]}
        tensors |= {key.removeprefix("bn."): value[index] for key, value in weights.items()}
        part, mean, var = plain_batch_norm(rows, tensors, norm, layer.eps)
        parts.append(part)
        means.append(mean.detach())
        variances.append(var.detach())
    expected = torch.cat(parts)
    expected_gradients = torch.autograd.grad((expected * probe).sum(), [x, *trained])

    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    for found, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)
    if norm.running:
        assert now.statistics.keys() == {"bn.running_mean", "bn.running_var"}
        for name, rows in (("mean", means), ("var", variances)):
            value = now.statistics[f"bn.running_{name}"]
            assert not value.requires_grad
            torch.testing.assert_close(value.expand(len(sizes), -1), torch.stack(rows), rtol=1e-12, atol=1e-12)
    else:
        assert not now.statistics


@pytest.mark.parametrize("mode", NORMS)
def test_batch_norm_passes_gradcheck(mode: str) -> None:
    """The written-out backward pass against finite differences, streams of one to three rows, affine shared or own."""
    segments, norm = Segments([2, 1, 3]), NORMS[mode]
    statistics = own_tensors(OWN["statistics"] if norm.running else (), 3)
    layer = batch_norm()

    def of_own(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        now = Pass(segments, statistics | {"bn.weight": gamma, "bn.bias": beta}, norm)
        return torch.as_tensor(streamwise(layer, now)(x))

    def of_shared(x: Tensor) -> Tensor:
        return torch.as_tensor(streamwise(layer, Pass(segments, statistics, norm))(x))

    x = normal(6, CHANNELS, 2, 1, seed=1).requires_grad_()
    gamma, beta = (0.5 + uniform(3, CHANNELS)).requires_grad_(), normal(3, CHANNELS, seed=2).requires_grad_()
    assert torch.autograd.gradcheck(of_own, (x, gamma, beta))
    assert torch.autograd.gradcheck(of_shared, (x,))


@pytest.mark.parametrize("norm", [NORMS["median"], NORMS["median-prior"]], ids=["alone", "prior"])
def test_the_gradient_of_a_median_is_shared_by_its_ties(norm: Norm) -> None:
    """As torch's own over all values has it; so the order of the rows does not matter."""
    layer, sizes = batch_norm(), [4, 5]
    x = (1.5 * normal(9, CHANNELS, 3, 3)).round().requires_grad_()
    probe = normal(*x.shape, seed=1)
    found = torch.autograd.grad((streamwise(layer, Pass(Segments(sizes), {}, norm))(x) * probe).sum(), x)[0]
    tensors = {name: getattr(layer, name) for name in OWN["all"]}
    expected = torch.cat([plain_batch_norm(rows, tensors, norm, layer.eps)[0] for rows in x.split(sizes)])
    assert all((rows[:, 0] == rows[:, 0].median()).sum() > 3 for rows in x.split(sizes))
    torch.testing.assert_close(found, torch.autograd.grad((expected * probe).sum(), x)[0], rtol=1e-9, atol=1e-10)
    turned = x.detach().flip(0).requires_grad_()
    y = streamwise(layer, Pass(Segments(sizes[::-1]), {}, norm))(turned)
    again = torch.autograd.grad((y * probe.flip(0)).sum(), turned)[0]
    torch.testing.assert_close(again.flip(0), found, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_the_median_is_the_value_torch_selects(dtype: torch.dtype, rows: int) -> None:
    """The lower one of an even number; exact in any type and memory format, with ties and signs."""
    for positions in ((1, 1), (3, 2), (8, 8)):
        x = normal(rows, CHANNELS, *positions, seed=rows).to(dtype)
        for one in (x, x.contiguous(memory_format=torch.channels_last), x.round()):
            before = one.clone()
            found = _lower_median(one.flatten(2))
            assert found.dtype == dtype
            assert torch.equal(found, one.transpose(0, 1).flatten(1).median(1).values)
            assert torch.equal(one, before)


@pytest.mark.parametrize("sizes", [[3, 1, 64, 7], [1] * 16, [2, 2, 2], [1, 1, 4, 8, 8, 256]], ids=str)
@pytest.mark.parametrize("channels", [4, 24, 32])
@pytest.mark.parametrize("mode", ["batch", "prior", "median", "median-prior"])
def test_batch_norm_is_the_same_bit_for_bit_in_any_company(mode: str, channels: int, sizes: list[int]) -> None:
    """Values, statistics' weights and gradients of a stream in float32, alone and between others."""
    layer, norm = batch_norm(channels=channels).float(), NORMS[mode]
    x, probe = (normal(sum(sizes), channels, 8, 8, seed=seed).float() for seed in (5, 6))

    def run(x: Tensor, probe: Tensor, sizes: list[int]) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        y = streamwise(layer, Pass(Segments(sizes), {}, norm))(x)
        return y.detach(), torch.autograd.grad((y * probe).sum(), x)[0]

    together = run(x, probe, sizes)
    parts = [run(one, other, [len(one)]) for one, other in zip(x.split(sizes), probe.split(sizes), strict=True)]
    for merged, alone in zip(together, zip(*parts, strict=True), strict=True):
        assert torch.equal(merged, torch.cat(alone))


@pytest.mark.parametrize("norm", [BATCH_NORM, *(NORMS[mode] for mode in ("prior", "median", "median-prior"))], ids=str)
def test_a_stream_without_rows_is_no_trouble(norm: Norm) -> None:
    """As when a policy chose none of its rows: its neighbours get what they get without it, and it gets no gradient."""
    layer, x = batch_norm(), normal(5, CHANNELS, 3, 2)
    weights = own_tensors(OWN["affine"], 3)
    gamma = weights["bn.weight"].requires_grad_()
    y = streamwise(layer, Pass(Segments([3, 0, 2]), weights, norm))(x)
    without = {key: value[[0, 2]] for key, value in weights.items()}
    torch.testing.assert_close(y, streamwise(layer, Pass(Segments([3, 2]), without, norm))(x), rtol=1e-12, atol=1e-12)
    slope = torch.autograd.grad((y * normal(*x.shape, seed=3)).sum(), gamma)[0]
    assert slope.isfinite().all()
    assert slope[1].tolist() == [0.0] * CHANNELS


def test_a_minority_cannot_carry_a_median_away() -> None:
    """Fewer than half of a request's rows, however far off, leave the centre among the others' values."""
    layer = batch_norm(affine=False)
    sound, bad = normal(9, CHANNELS, 3, 3), torch.full((8, CHANNELS, 3, 3), 1e6, dtype=torch.float64)
    for norm, is_robust in ((Norm(0.5, running=True, median=True), True), (Norm(0.5, running=True), False)):
        now = Pass(Segments([17]), {}, norm)
        streamwise(layer, now)(torch.cat([bad, sound]))
        centre = 2 * now.statistics["bn.running_mean"][0] - layer.running_mean
        low, high = sound.amin((0, 2, 3)), sound.amax((0, 2, 3))
        assert bool(((centre >= low) & (centre <= high)).all()) == is_robust


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"weight": 0.5, "per_row": True, "median": True}, "no such average of medians"),
        ({"weight": 0.5, "prior": 4}, "weight must be 1"),
        ({"weight": 1.0, "prior": 4, "running": True}, "no average run"),
        ({"weight": 1.0, "prior": 4, "per_row": True}, "no average run"),
        ({"weight": 1.0, "prior": -1}, "0 or more"),
        ({"weight": 1.0, "prior": float("nan")}, "0 or more"),
        ({"weight": 1.0, "prior": float("inf")}, "0 or more"),
        ({"weight": 1.5}, r"\[0, 1\]"),
    ],
)
def test_norms_that_make_no_sense_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Norm(**settings)


def test_batch_norm_in_training_is_torchs() -> None:
    """A single stream in batch mode is ``F.batch_norm`` in training, values and gradients."""
    layer = batch_norm()
    x = normal(5, CHANNELS, 3, 3).requires_grad_()
    weight, bias = layer.weight.clone().requires_grad_(), layer.bias.clone().requires_grad_()
    now = Pass(Segments([5]), {"bn.weight": weight.unsqueeze(0), "bn.bias": bias.unsqueeze(0)}, BATCH_NORM)
    found = streamwise(layer, now)(x)
    expected = F.batch_norm(x, None, None, weight, bias, training=True, eps=layer.eps)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    probe = normal(*x.shape, seed=3)
    for one, other in zip(
        torch.autograd.grad((found * probe).sum(), [x, weight, bias]),
        torch.autograd.grad((expected * probe).sum(), [x, weight, bias]),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_batch_norm_of_a_single_value_keeps_the_reference() -> None:
    """One row of a 1d layer: output by the reference statistics, with its plain gradient, and statistics unmoved."""
    layer = batch_norm(nn.BatchNorm1d)
    for norm in (*NORMS.values(), Norm(0.3), Norm(0.3, running=True)):
        x = normal(2, CHANNELS).requires_grad_()
        now = Pass(Segments([1, 1]), {}, norm)
        y = streamwise(layer, now)(x)
        torch.testing.assert_close(y, layer(x), rtol=1e-12, atol=1e-12)
        slope = torch.autograd.grad(y.sum(), x)[0]
        torch.testing.assert_close(slope, (layer.weight / (layer.running_var + layer.eps).sqrt()).expand(2, -1))
        if norm.running:
            for name in ("running_mean", "running_var"):
                assert torch.equal(now.statistics[f"bn.{name}"].expand(2, -1), getattr(layer, name).expand(2, -1))


def test_batch_norm_keeps_images_in_channels_last() -> None:
    """Of any company: the layers that follow choose their kernels by the order in memory."""
    layer = batch_norm().float()
    for sizes in ([4], [1], [1, 1, 1], [1, 1, 1, 4, 8, 2], [200, 200, 1]):
        x = normal(sum(sizes), CHANNELS, 8, 8).float().contiguous(memory_format=torch.channels_last)
        y = streamwise(layer, Pass(Segments(sizes), {}, BATCH_NORM))(x)
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_batch_norm_is_stable_in_float32_far_from_zero() -> None:
    """No difference of large squares: a mean 1000 times the deviation costs few digits of the variance."""
    layer = batch_norm().float()
    x = normal(6, CHANNELS, 4, 4) + 1000
    segments = Segments([4, 2])
    found = streamwise(layer, Pass(segments, {}, BATCH_NORM))(x.float())
    exact = streamwise(batch_norm(), Pass(segments, {}, BATCH_NORM))(x.float().double())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-3)


def test_batch_norm_takes_channels_last() -> None:
    """A memory format is not a value."""
    x = normal(4, CHANNELS, 3, 2)
    now = Pass(Segments([3, 1]), {}, BATCH_NORM)
    layer = streamwise(batch_norm(), now)
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), layer(x))


@pytest.mark.parametrize("positions", POSITIONS)
def test_batch_norm_without_statistics_uses_the_batch(positions: str) -> None:
    """``track_running_stats=False``: the source itself normalises with the batch, so every mode does, per stream."""
    kind, after = POSITIONS[positions]
    layer = batch_norm(kind, track_running_stats=False)
    x = normal(7, CHANNELS, *after).requires_grad_()
    for norm in NORMS.values():
        now = Pass(Segments([3, 4]), {}, norm)
        y = streamwise(layer, now)(x)
        assert not now.statistics
        expected = torch.cat([layer(x[:3]), layer(x[3:])])
        if norm.median:
            tensors = {"running_mean": x.new_zeros(CHANNELS), "running_var": x.new_ones(CHANNELS)}
            tensors |= {"weight": layer.weight, "bias": layer.bias}
            parts = [plain_batch_norm(rows, tensors, NORMS["median"], layer.eps)[0] for rows in x.split([3, 4])]
            expected = torch.cat(parts)
        torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    y = streamwise(layer, Pass(Segments([3, 4]), {}, BATCH_NORM))(x)
    gradient = torch.autograd.grad((y * normal(*x.shape, seed=4)).sum(), x)[0]
    expected = torch.cat([layer(x[:3]), layer(x[3:])])
    wanted = torch.autograd.grad((expected * normal(*x.shape, seed=4)).sum(), x)[0]
    torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mode", NORMS)
def test_batch_norm_without_affine(mode: str) -> None:
    """``affine=False``: as with scale 1 and shift 0, and there is nothing to adapt."""
    layer, norm = batch_norm(affine=False), NORMS[mode]
    x = normal(6, CHANNELS, 3, 2)
    weights = own_tensors(OWN["statistics"], 2)
    y = streamwise(layer, Pass(Segments([4, 2]), weights, norm))(x)
    ones = {"weight": torch.ones(CHANNELS, dtype=torch.float64), "bias": torch.zeros(CHANNELS, dtype=torch.float64)}
    parts = [
        plain_batch_norm(rows, ones | {key[3:]: value[i] for key, value in weights.items()}, norm, layer.eps)[0]
        for i, rows in enumerate(x.split([4, 2]))
    ]
    torch.testing.assert_close(y, torch.cat(parts), rtol=1e-10, atol=1e-10)


def test_observing_leaves_each_streams_statistics() -> None:
    """Mean and biased variance by channel; the output is what it is unobserved."""
    layer, x = batch_norm(), normal(7, CHANNELS, 3, 2) * 2 + 1
    now = Pass(Segments([4, 3]), {}, SOURCE_NORM, observe=True)
    assert torch.equal(streamwise(layer, now)(x), layer(x))
    ((_, mean, var),) = now.observed
    torch.testing.assert_close(mean, torch.stack([rows.mean((0, 2, 3)) for rows in x.split([4, 3])]))
    torch.testing.assert_close(var, torch.stack([rows.var((0, 2, 3), correction=0) for rows in x.split([4, 3])]))
    unseen = Pass(Segments([4, 3]))
    streamwise(layer, unseen)(x)
    assert unseen.observed == []


def affine(layer: nn.Module, streams: int, seed: int = 30) -> Tensors:
    """Own scales and shifts of a layer named ``n``, ``[S, *shape]``; only those that the layer has."""
    return {
        f"n.{name}": normal(streams, *value.shape, seed=seed + index).requires_grad_()
        for index, (name, value) in enumerate(layer.named_parameters())
    }


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], type[StreamNorm]]] = {
    "layer-vector": (lambda: nn.LayerNorm(CHANNELS), (CHANNELS,), StreamLayerNorm),
    "layer-tokens": (lambda: nn.LayerNorm(CHANNELS), (5, CHANNELS), StreamLayerNorm),
    "layer-token-grid": (lambda: nn.LayerNorm(CHANNELS), (2, 3, CHANNELS), StreamLayerNorm),
    "layer-two-dims": (lambda: nn.LayerNorm((3, CHANNELS)), (2, 3, CHANNELS), StreamLayerNorm),
    "layer-no-bias": (lambda: nn.LayerNorm(CHANNELS, bias=False), (5, CHANNELS), StreamLayerNorm),
    "group-image": (lambda: nn.GroupNorm(2, CHANNELS), (CHANNELS, 3, 2), StreamGroupNorm),
    "group-vector": (lambda: nn.GroupNorm(2, CHANNELS), (CHANNELS,), StreamGroupNorm),
    "group-sequence": (lambda: nn.GroupNorm(1, CHANNELS), (CHANNELS, 5), StreamGroupNorm),
}
"""Layer, shape of one input row, and its stand-in."""


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_layer_and_group_norm_equal_torchs_per_stream(name: str, sizes: list[int]) -> None:
    """Values and gradients with every stream's own scale and shift; images, vectors and transformer tokens."""
    make, shape, kind = LAYERS[name]
    layer = make().double().requires_grad_(False)
    weights = affine(layer, len(sizes))
    x = (1.5 * normal(sum(sizes), *shape, seed=5) + 0.7).requires_grad_()
    y = streamwise(layer, Pass(Segments(sizes), weights, BATCH_NORM), "n", kind)(x)
    parts = []
    for index, rows in enumerate(x.split(sizes)):
        own = {key.removeprefix("n."): value[index] for key, value in weights.items()}
        parts.append(torch.func.functional_call(layer, own, (rows,)))
    expected = torch.cat(parts)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)
    probe = normal(*x.shape, seed=6)
    for found, wanted in zip(
        torch.autograd.grad((y * probe).sum(), [x, *weights.values()]),
        torch.autograd.grad((expected * probe).sum(), [x, *weights.values()]),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_and_group_norm_of_the_source_are_torchs(name: str) -> None:
    """Without own weights: the original layer, bit for bit."""
    make, shape, kind = LAYERS[name]
    layer = make().double().requires_grad_(False)
    for index, parameter in enumerate(layer.parameters()):
        parameter.copy_(normal(*parameter.shape, seed=index))
    x = normal(6, *shape)
    assert torch.equal(streamwise(layer, Pass(Segments([4, 2])), "n", kind)(x), layer(x))


@pytest.mark.parametrize("layer", [nn.LayerNorm(CHANNELS, elementwise_affine=False), nn.GroupNorm(2, 4, affine=False)])
def test_layers_without_affine_stay_what_they_are(layer: nn.Module) -> None:
    """There is nothing of a stream's own in them."""
    kind = StreamLayerNorm if isinstance(layer, nn.LayerNorm) else StreamGroupNorm
    x = normal(6, CHANNELS)
    assert torch.equal(streamwise(layer, Pass(Segments([4, 2]), {}, BATCH_NORM), "n", kind)(x), layer(x))


@pytest.mark.parametrize("name", ["bn", "layer", "group"])
@pytest.mark.parametrize("own", ["weight", "bias"])
def test_scale_and_shift_may_be_own_one_by_one(name: str, own: str) -> None:
    """``Forward``'s contract: keys that are missing come from the source, and only those."""
    layer: nn.Module = {
        "bn": nn.BatchNorm1d(CHANNELS),
        "layer": nn.LayerNorm(CHANNELS),
        "group": nn.GroupNorm(2, CHANNELS),
    }[name]
    kind = {"bn": StreamBatchNorm, "layer": StreamLayerNorm, "group": StreamGroupNorm}[name]
    layer = layer.double().eval().requires_grad_(False)
    mine = normal(2, CHANNELS, seed=1).requires_grad_()
    x = normal(5, CHANNELS)
    y = streamwise(layer, Pass(Segments([2, 3]), {f"n.{own}": mine}, SOURCE_NORM), "n", kind)(x)
    parts = [torch.func.functional_call(layer, {own: mine[i]}, (rows,)) for i, rows in enumerate(x.split([2, 3]))]
    torch.testing.assert_close(y, torch.cat(parts), rtol=1e-10, atol=1e-10)
    probe = normal(*x.shape, seed=2)
    found, wanted = (torch.autograd.grad((one * probe).sum(), mine)[0] for one in (y, torch.cat(parts)))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


# --- replacing a model's layers ----------------------------------------------------------------------------------


class MyBatchNorm(nn.BatchNorm2d):
    """Does something of its own in its forward pass."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + 1


def run(network: nn.Module, names: tuple[str, ...], now: Pass, x: Tensor, head: str) -> Tensor:
    """The network served stream-wise; checks which layers were replaced."""
    served = StreamwiseNetwork(copy.deepcopy(network), InputSettings(shape=x.shape[1:]), head, torch.device("cpu"))
    assert tuple(served.norm_layers) == names
    return served.run(now, x).logits


def test_replaces_known_layers_and_keeps_their_names() -> None:
    """All five kinds, at any depth; parameters keep their names and values."""
    network = nn.Sequential(
        nn.Conv2d(3, CHANNELS, 1),
        nn.BatchNorm2d(CHANNELS),
        nn.Sequential(nn.GroupNorm(2, CHANNELS), nn.Sequential(nn.ReLU())),
        nn.Flatten(),
        nn.LayerNorm(CHANNELS * 4),
        nn.BatchNorm1d(CHANNELS * 4),
    )
    before = network.state_dict()
    replaced = replace_norms(network, Conduit())
    assert replaced == ["1", "4", "5", "2.0"] or sorted(replaced) == ["1", "2.0", "4", "5"]
    kinds = {name: type(module) for name, module in network.named_modules() if isinstance(module, StreamNorm)}
    assert kinds == {"1": StreamBatchNorm, "2.0": StreamGroupNorm, "4": StreamLayerNorm, "5": StreamBatchNorm}
    after = network.state_dict()
    assert {key for key in before if "num_batches" not in key} == after.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_leaves_a_subclass_alone() -> None:
    """A subclass may do more than its base, so it runs as trained, in evaluation mode."""
    mine = MyBatchNorm(3).double()
    assert mine.running_mean is not None
    mine.running_mean.copy_(normal(3))
    network = nn.Sequential(mine, nn.BatchNorm2d(3).double(), nn.Flatten(), nn.Linear(12, 2).double()).eval()
    x = normal(4, 3, 2, 2)
    found = run(network, ("1",), Pass(Segments([1, 3]), {}, BATCH_NORM), x, "3")
    middle = mine(x)
    parts = [F.batch_norm(rows, None, None, training=True) for rows in middle.split([1, 3])]
    torch.testing.assert_close(found, network[3](torch.cat(parts).flatten(1)), rtol=1e-9, atol=1e-10)


class Twice(nn.Module):
    """One batch norm at two places, registered in one of three ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        shared = batch_norm(nn.BatchNorm1d)
        self.first = nn.Linear(3, CHANNELS).double()
        self.norm = shared
        self.second = nn.Linear(CHANNELS, CHANNELS).double()
        self.again: nn.Module = {
            "same_name": nn.Identity(),
            "same_parent": shared,
            "two_parents": nn.Sequential(shared),
        }[how]
        self.how = how
        self.head = nn.Linear(CHANNELS, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.norm(self.first(x)).tanh())
        x = self.norm(x) if self.how == "same_name" else self.again(x)
        return torch.as_tensor(self.head(x))


@pytest.mark.parametrize("how", ["same_name", "same_parent", "two_parents"])
def test_a_layer_in_two_places_stays_one_layer(how: str) -> None:
    """Both uses take the stream's own scale and shift and its own statistics."""
    network = Twice(how).eval().requires_grad_(False)
    weights = {
        "norm.weight": (0.5 + uniform(2, CHANNELS)).requires_grad_(),
        "norm.bias": normal(2, CHANNELS, seed=3).requires_grad_(),
    }
    x = normal(7, 3)
    found = run(network, ("norm",), Pass(Segments([4, 3]), weights, BATCH_NORM), x, "head")
    parts = []
    for index, rows in enumerate(x.split([4, 3])):
        own = weights["norm.weight"][index], weights["norm.bias"][index]
        hidden = network.second(F.batch_norm(network.first(rows), None, None, *own, training=True).tanh())
        parts.append(network.head(F.batch_norm(hidden, None, None, *own, training=True)))
    expected = torch.cat(parts)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    probe = normal(*found.shape, seed=4)
    for one, other in zip(
        torch.autograd.grad((found * probe).sum(), list(weights.values())),
        torch.autograd.grad((expected * probe).sum(), list(weights.values())),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("norm_first", [False, True], ids=["post_norm", "pre_norm"])
@pytest.mark.parametrize("grad", [False, True], ids=["inference", "adapting"])
def test_transformer_encoder_uses_the_streams_layer_norms(norm_first: bool, grad: bool) -> None:
    """torch's own encoder layer has a fast path that reads its norms' weights without calling them; a stream's scale
    and shift must arrive all the same."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(
                8, 2, dim_feedforward=8, dropout=0.0, batch_first=True, norm_first=norm_first
            )
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            return torch.as_tensor(self.head(self.layer(x).mean(1)))

    torch.manual_seed(0)
    network = Tokens().double().eval().requires_grad_(False)
    names = ("layer.norm1.weight", "layer.norm1.bias", "layer.norm2.weight", "layer.norm2.bias")
    weights = {name: normal(2, 8, seed=index) for index, name in enumerate(names)}
    x = normal(5, 4, 8)
    with torch.set_grad_enabled(grad):
        own = {key: value.requires_grad_(grad) for key, value in weights.items()}
        found = run(network, ("layer.norm1", "layer.norm2"), Pass(Segments([2, 3]), own, SOURCE_NORM), x, "head")
    parts = [
        torch.func.functional_call(network, {key: value[index] for key, value in weights.items()}, (rows,))
        for index, rows in enumerate(x.split([2, 3]))
    ]
    torch.testing.assert_close(found, torch.cat(parts), rtol=1e-9, atol=1e-10)
    assert found.requires_grad == grad


def test_a_norm_layer_outside_of_a_pass_refuses() -> None:
    """Better an error than another stream's statistics."""
    network = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2))
    served = StreamwiseNetwork(network, InputSettings(shape=(3,)), "1", torch.device("cpu"))
    served.run(Pass(Segments([2])), torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="outside"):
        network(torch.zeros(2, 3))


def test_a_failed_pass_leaves_nothing_behind() -> None:
    """After an error in the network the next pass starts clean, and none is current."""
    network = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)).double()
    served = StreamwiseNetwork(network, InputSettings(shape=(3,)), "1", torch.device("cpu"))
    with pytest.raises(RuntimeError):
        served.run(Pass(Segments([2]), {"0.weight": torch.ones(2, 99)}), normal(2, 3))
    with pytest.raises(RuntimeError, match="outside"):
        network(normal(2, 3))
    assert served.run(Pass(Segments([2])), normal(2, 3)).features.shape == (2, 3)


def test_inputs_are_normalised_before_the_network() -> None:
    """``(x - mean) / std`` per channel is part of the model; features are what enters the head."""
    network = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Flatten(), nn.Linear(12, 2)).double().eval()
    plain = copy.deepcopy(network)
    spec = InputSettings(shape=(2, 2, 2), mean=(0.5, -1.0), std=(2.0, 0.25))
    output = StreamwiseNetwork(network, spec, "2", torch.device("cpu")).run(Pass(Segments([3])), normal(3, 2, 2, 2))
    mean, std = torch.tensor([0.5, -1.0]).view(2, 1, 1), torch.tensor([2.0, 0.25]).view(2, 1, 1)
    x = (normal(3, 2, 2, 2) - mean) / std
    torch.testing.assert_close(output.logits, plain(x))
    torch.testing.assert_close(output.features, plain[:2](x))


class InPlace(nn.Module):
    """Norm layers followed by changes in place, as torchvision writes its networks."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm1, self.norm2 = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm1(self.conv(x)))
        y = self.norm2(x)
        y += x
        return cast("Tensor", self.head(F.relu_(y).mean((2, 3))))


def test_what_follows_a_norm_layer_may_change_its_output_in_place() -> None:
    """Gradients equal those of a network that does not."""
    torch.manual_seed(0)
    network = InPlace().double()
    conduit, segments, x = Conduit(), Segments([2, 3]), torch.randn(5, 3, 6, 6, dtype=torch.float64)
    plain = copy.deepcopy(network)
    replace_norms(network.eval(), conduit)
    weights = {
        f"norm{layer}.{key}": torch.rand(2, 4, dtype=torch.float64).add_(0.5).requires_grad_()
        for layer in (1, 2)
        for key in ("weight", "bias")
    }
    conduit.current = Pass(segments, weights, BATCH_NORM)
    logits = network(x)
    gradients = torch.autograd.grad(logits.square().sum(), list(weights.values()))

    def alone(one: dict[str, Tensor], x: Tensor) -> Tensor:
        h = plain.conv(x)
        h = F.relu(F.batch_norm(h, None, None, one["norm1.weight"], one["norm1.bias"], True))
        y = F.batch_norm(h, None, None, one["norm2.weight"], one["norm2.bias"], True)
        return cast("Tensor", plain.head(F.relu(y + h).mean((2, 3))))

    parts = [
        alone({key: value[index] for key, value in weights.items()}, part) for index, part in enumerate(x.split([2, 3]))
    ]
    torch.testing.assert_close(logits, torch.cat(parts))
    expected = torch.autograd.grad(torch.cat(parts).square().sum(), list(weights.values()))
    torch.testing.assert_close(gradients, expected)


@pytest.mark.parametrize(
    "layer", [nn.LayerNorm(4), nn.BatchNorm1d(4), nn.GroupNorm(2, 4)], ids=["layer", "batch", "group"]
)
def test_rows_that_are_not_first_are_refused(layer: nn.Module) -> None:
    """Sequence-first and folded inputs: streams cannot be told apart, and must not be mixed up."""
    conduit, network = Conduit(), nn.Sequential(layer)
    replace_norms(network, conduit)
    conduit.current = Pass(Segments([1, 2]))
    with pytest.raises(RuntimeError, match="a batch of 3 rows"):
        network(torch.randn(6, 4))


def test_a_layer_reached_by_two_paths_has_torchs_name() -> None:
    """The one under which its tensors are listed; else nothing of it would be adapted."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            norm = nn.BatchNorm1d(4)
            self.block = nn.Sequential(nn.Linear(4, 4), norm)
            self.norm = norm

    network = Twice()
    assert replace_norms(network, Conduit()) == ["block.1"]
    assert "block.1.weight" in dict(network.named_parameters())


def test_a_running_norm_that_runs_twice_goes_on_from_its_first_time() -> None:
    conduit, layer = Conduit(), nn.BatchNorm1d(3).double()
    network = nn.Sequential(layer)
    expected = copy.deepcopy(layer)
    replace_norms(network, conduit)
    x = torch.randn(6, 3, dtype=torch.float64) + 1
    conduit.current = now = Pass(Segments([6]), norm=Norm(0.1, running=True))
    network(network(x))
    mean, var = expected.running_mean, expected.running_var
    assert mean is not None
    assert var is not None
    for _ in range(2):
        mean, var = 0.9 * mean + 0.1 * x.mean(0), 0.9 * var + 0.1 * x.var(0)
        x = (x - mean) / (var + layer.eps).sqrt()
    torch.testing.assert_close(now.statistics["0.running_mean"][0], mean)
    torch.testing.assert_close(now.statistics["0.running_var"][0], var)
