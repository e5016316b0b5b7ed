"""The augmentations: equal to a slow version of their definition, section 1.6 of the algorithm notes, and drawn so."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.augment import COLUMNS, PLAIN, SOFT, STRONG, Recipe, augment, check
from adapters.base import Segments, Source
from adapters.rng import Random, stream_key
from tests.adapters.slow_augment import COLOURS, colour, slow_augment

RECIPES = {"strong": STRONG, "soft": SOFT, "plain": PLAIN}
STILL = Recipe(
    brightness=(1, 1),
    contrast=(1, 1),
    saturation=(1, 1),
    hue=(0, 0),
    gamma=(1, 1),
    rotation=(0, 0),
    translation=0,
    scale=(1, 1),
    blur=None,
    noise=0,
    flip=0,
)
"""Leaves an image as it is."""
BLUR_NOTHING = (1e-9, 1e-9)
every_recipe = pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)


def source_of(shape: Sequence[int] = (3, 16, 16), bounds: tuple[float, float] | None = (0.0, 1.0)) -> Source:
    return Source(
        weights={},
        parameters=(),
        affine=(),
        statistics=(),
        num_classes=2,
        feature_dim=1,
        head="head",
        input_shape=tuple(shape),
        input_range=bounds,
    )


UNIT = source_of()


def images(rows: int, shape: Sequence[int] = (3, 16, 16), seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Smooth enough to be like images, and with black, white and grey in them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(rows, *shape, generator=generator, dtype=torch.float64) * 1.4 - 0.2
    x[:, :, : shape[1] // 4, : shape[2] // 4] = 0
    x[:, :, : shape[1] // 4, -shape[2] // 4 :] = 1
    x[:, :, -shape[1] // 4 :, : shape[2] // 4] = 0.3
    return x.clamp(0, 1).to(dtype)


def draws_of(names: Sequence[str], dtype: torch.dtype = torch.float64, step: int = 0) -> Random:
    keys = torch.tensor([stream_key(name) for name in names])
    return Random(keys, torch.full_like(keys, step), dtype)


def numbered(streams: int, dtype: torch.dtype = torch.float64) -> Random:
    return draws_of([f"stream {index}" for index in range(streams)], dtype)


class Chosen(Random):
    """Numbers of our own choice in place of drawn ones."""

    def __init__(self, numbers: Tensor) -> None:
        super().__init__(torch.zeros(len(numbers), dtype=torch.int64), torch.zeros(len(numbers), dtype=torch.int64))
        self.numbers = numbers

    def uniform(self, shape: tuple[int, ...]) -> Tensor:
        assert shape == (COLUMNS,)
        return self.numbers

    def normal_rows(self, segments: Segments, shape: tuple[int, ...]) -> Tensor:
        return torch.zeros(segments.rows, *shape, dtype=self.numbers.dtype)


def changed(recipe: Recipe, strengths: dict[str, Any]) -> Recipe:
    return dataclasses.replace(recipe, **strengths)


def slowly(x: Tensor, segments: Segments, random: Random, recipe: Recipe, endless: bool = False) -> Tensor:
    """The slow version of each row, with the numbers that ``random`` gives in the documented layout."""
    drawn = random.uniform((COLUMNS,)).tolist()
    noise = random.normal_rows(segments, tuple(x.shape[1:])) if recipe.noise else None
    views = []
    for row, stream in enumerate(segments.of_row.tolist()):
        own = None if noise is None else noise[row].permute(1, 2, 0).numpy()
        view = slow_augment(x[row].permute(1, 2, 0).numpy(), drawn[stream], own, recipe, endless)
        views.append(torch.from_numpy(view.copy()).permute(2, 0, 1))
    return torch.stack(views)


def assert_near(left: Tensor, right: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(left, right, rtol=0, atol=tolerance)


# --- against the slow version --------------------------------------------------------------------------------------


@every_recipe
@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 17, 17), (1, 18, 18), (3, 22, 17)], ids=str)
def test_equals_the_slow_version(shape: tuple[int, ...], recipe: Recipe) -> None:
    """Steps 1 to 9, for several streams at once, one without rows; inputs outside of [0, 1] are clipped."""
    segments = Segments([2, 0, 1, 3, 1, 1, 1, 1])
    x = images(segments.rows, shape) * 1.2 - 0.1
    view = augment(x, segments, UNIT, numbered(8), recipe)
    assert view.shape == x.shape
    assert_near(view, slowly(x, segments, numbered(8), recipe))


@every_recipe
def test_equals_the_slow_version_at_the_size_of_cifar(recipe: Recipe) -> None:
    segments = Segments([1, 2, 1])
    x = images(4, (3, 32, 32))
    assert_near(augment(x, segments, UNIT, numbered(3), recipe), slowly(x, segments, numbered(3), recipe))


@every_recipe
@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 5, 5), (3, 8, 8), (1, 9, 9), (3, 8, 24), (3, 24, 6)], ids=str)
def test_small_and_long_images_have_padding_without_end(shape: tuple[int, ...], recipe: Recipe) -> None:
    """Where the published padding would end in black, ours goes on."""
    segments = Segments([1] * 8)
    x = images(8, shape)
    view = augment(x, segments, UNIT, numbered(8), recipe)
    assert_near(view, slowly(x, segments, numbered(8), recipe, endless=True))


def corners() -> Tensor:
    """The extremes of rotation, translations, scale, blur and flip, with colours left alone: ``[64, COLUMNS]``."""
    most = 1 - 2.0**-53
    numbers = torch.full((64, COLUMNS), 0.5, dtype=torch.float64)
    numbers[:, 10:] = torch.tensor(list(itertools.product((0.0, most), repeat=6)), dtype=torch.float64)
    return numbers


@pytest.mark.parametrize(
    ("side", "greatest"), [(6, 0.04), (8, 4e-3), (16, 4e-6), (17, 4e-6), (18, 1e-12), (21, 4e-6), (22, 1e-12)]
)
def test_how_much_black_the_published_padding_lets_in(side: int, greatest: float) -> None:
    """The claim of the module: with an all-white image and the worst numbers that can be drawn, what differs from the
    published finite padding is no more than documented, without blur nothing from a side of 6 on."""
    numbers = corners()
    numbers = numbers[(numbers[:, 13] == 0) & (numbers[:, 15] == 0) & ((numbers[:, 14] > 0) | (side == 6))]
    x, segments = torch.ones(len(numbers), 1, side, side, dtype=torch.float64), Segments([1] * len(numbers))
    for recipe, bound in ((STRONG, greatest), (PLAIN, 1e-12)):
        slow = slowly(x, segments, Chosen(numbers), recipe)
        assert_near(augment(x, segments, UNIT, Chosen(numbers), recipe), slow, bound)
        if recipe is STRONG and side < 18:
            assert float((1 - slow).max()) > bound / 1e3, "the bound is not far off"


@every_recipe
def test_equals_the_slow_version_at_the_extremes(recipe: Recipe) -> None:
    """The greatest rotation, translation and scale, either way, and both ends of the blur."""
    numbers = corners()[::5]
    x, segments = images(len(numbers), (1, 12, 12)), Segments([1] * len(numbers))
    view = augment(x, segments, UNIT, Chosen(numbers), recipe)
    assert_near(view, slowly(x, segments, Chosen(numbers), recipe, endless=True))


# --- what each recipe is -------------------------------------------------------------------------------------------


def test_the_published_strengths() -> None:
    """The numbers of section 1.6."""
    strong = {
        "brightness": (0.6, 1.4),
        "contrast": (0.7, 1.3),
        "saturation": (0.5, 1.5),
        "hue": (-0.06, 0.06),
        "gamma": (0.7, 1.3),
        "rotation": (-15, 15),
        "translation": 1 / 16,
        "scale": (0.9, 1.1),
        "blur": (0.001, 0.5),
        "noise": 0.005,
        "padding": "edge",
        "flip": 0.5,
    }
    soft = {
        "brightness": (0.8, 1.2),
        "contrast": (0.85, 1.15),
        "saturation": (0.75, 1.25),
        "hue": (-0.03, 0.03),
        "gamma": (0.85, 1.15),
        "rotation": (-8, 8),
        "scale": (0.95, 1.05),
        "blur": (0.001, 0.25),
    }
    assert dataclasses.asdict(STRONG) == strong
    assert dataclasses.asdict(SOFT) == strong | soft
    assert dataclasses.asdict(PLAIN) == strong | {"blur": None, "noise": 0, "padding": "reflect"}


@pytest.mark.parametrize("padding", ["edge", "reflect"])
@pytest.mark.parametrize("blur", [None, BLUR_NOTHING], ids=["no_blur", "blur"])
@pytest.mark.parametrize("shape", [(3, 16, 16), (1, 5, 8), (3, 1, 1), (3, 2, 1), (3, 33, 3)], ids=str)
def test_no_strength_gives_back_the_image(shape: tuple[int, ...], padding: Any, blur: Any) -> None:
    """Whatever is drawn, in whatever order."""
    recipe = dataclasses.replace(STILL, padding=padding, blur=blur)
    x, segments = images(30, shape), Segments([1] * 30)
    assert_near(augment(x, segments, UNIT, numbered(30), recipe), x, 2e-8)  # gamma's floor is 1e-8


@every_recipe
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.0, 255.0), (-1.0, 1.0), (-1.8, 2.1)], ids=str)
def test_views_keep_the_range(recipe: Recipe, bounds: tuple[float, float]) -> None:
    """In the range of the inputs, whatever comes in, in single precision too."""
    low, high = bounds
    for dtype in (torch.float32, torch.float64):
        x = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype) * 3 * (high - low)
        view = augment(x, Segments([1] * 40), source_of(bounds=bounds), numbered(40, dtype), recipe)
        assert view.dtype == dtype
        assert view.isfinite().all()
        assert view.min() >= torch.tensor(low, dtype=dtype)
        assert view.max() <= torch.tensor(high, dtype=dtype)


@every_recipe
@pytest.mark.parametrize("bounds", [(0.0, 255.0), (-1.0, 1.0)], ids=str)
def test_the_range_of_the_inputs_makes_no_difference(recipe: Recipe, bounds: tuple[float, float]) -> None:
    """Images in [0, 255] get the views of images in [0, 1], times 255."""
    low, high = bounds
    x, segments = images(6), Segments([2, 3, 1])
    view = augment(low + (high - low) * x, segments, source_of(bounds=bounds), numbered(3), recipe)
    assert_near((view - low) / (high - low), augment(x, segments, UNIT, numbered(3), recipe), 1e-10)


def test_one_channel_has_no_saturation_and_no_hue() -> None:
    """They do nothing: views are as with these at rest, and as those of a grey image of three channels."""
    x, segments = images(20, (1, 8, 8)), Segments([1] * 20)
    recipe = dataclasses.replace(STRONG, noise=0)
    view = augment(x, segments, UNIT, numbered(20), recipe)
    still = dataclasses.replace(recipe, saturation=(1, 1), hue=(0, 0))
    assert torch.equal(view, augment(x, segments, UNIT, numbered(20), still))
    three = augment(x.expand(-1, 3, -1, -1), segments, UNIT, numbered(20), still)
    assert_near(three, view.expand_as(three), 1e-3)  # the weights of grey add up to 0.9999


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    """The same numbers drawn: within the rounding of input and output of what single precision gives."""
    x = images(12, dtype=dtype)
    view = augment(x, Segments([1] * 12), UNIT, numbered(12, torch.float32))
    assert view.dtype == dtype
    exact = augment(x.float(), Segments([1] * 12), UNIT, numbered(12, torch.float32))
    assert torch.equal(view, exact.to(dtype))
    drawn_in_half = augment(x, Segments([1] * 12), UNIT, numbered(12, dtype))
    assert drawn_in_half.dtype == dtype
    assert drawn_in_half.isfinite().all()


# --- how it is drawn -----------------------------------------------------------------------------------------------


@every_recipe
def test_rows_of_a_stream_share_their_numbers(recipe: Recipe) -> None:
    """Equal rows get equal views but for the noise; another stream with the same row gets another view."""
    x = images(1).expand(6, -1, -1, -1)
    view = augment(x, Segments([4, 2]), UNIT, numbered(2), dataclasses.replace(recipe, noise=0))
    assert torch.equal(view[:4], view[:1].expand(4, -1, -1, -1))
    assert torch.equal(view[4], view[5])
    assert float((view[0] - view[4]).abs().mean()) > 0.01
    noisy = augment(x, Segments([4, 2]), UNIT, numbered(2), dataclasses.replace(recipe, noise=0.005))
    assert not torch.equal(noisy[0], noisy[1])
    assert_near(noisy, view, 0.03)


def test_views_differ_by_stream_step_and_name() -> None:
    """And by call; the same stream, step and name give the same view."""
    x, one = images(1), Segments([1])
    again = draws_of(["a"])
    views = [
        augment(x, one, UNIT, random)
        for random in (
            draws_of(["a"]),
            draws_of(["b"]),
            draws_of(["a"], step=1),
            draws_of(["a"]).named("augment 0"),
            draws_of(["a"]).named("augment 1"),
            again,
            again,
        )
    ]
    assert torch.equal(views[0], views[5])
    different = [view for index, view in enumerate(views) if index != 5]
    for left, right in itertools.combinations(different, 2):
        assert float((left - right).abs().mean()) > 0.01


@every_recipe
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 9, 7), (1, 5, 5), (3, 128, 96)], ids=str)
def test_a_stream_gets_the_same_view_in_any_company(shape: tuple[int, ...], dtype: torch.dtype, recipe: Recipe) -> None:
    """Bit for bit: alone, beside streams of other sizes and without rows, and in another order."""
    sizes = [2, 0, 5, 1, 17 if shape[1] < 100 else 3, 1, 1]
    names = [f"stream {index}" for index in range(len(sizes))]
    x = images(sum(sizes), shape, dtype=dtype)
    together = augment(x, Segments(sizes), UNIT, draws_of(names, dtype), recipe).split(sizes)
    parts = x.split(sizes)
    for name, size, part, view in zip(names, sizes, parts, together, strict=True):
        assert torch.equal(augment(part, Segments([size]), UNIT, draws_of([name], dtype), recipe), view)
    order = [3, 6, 0, 2, 5, 1, 4]
    shuffled = augment(
        torch.cat([parts[i] for i in order]),
        Segments([sizes[i] for i in order]),
        UNIT,
        draws_of([names[i] for i in order], dtype),
        recipe,
    ).split([sizes[i] for i in order])
    for place, index in enumerate(order):
        assert torch.equal(shuffled[place], together[index])


def test_a_large_image_alone_gets_the_same_view() -> None:
    """Bit for bit, where a single row is large enough for torch to spread a sum over it across threads."""
    x, names = images(8, (3, 200, 210), dtype=torch.float32), "abcdefgh"
    together = augment(x, Segments([1] * 8), UNIT, draws_of(names, torch.float32), PLAIN)
    for index, name in enumerate(names):
        alone = augment(x[index, None], Segments([1]), UNIT, draws_of([name], torch.float32), PLAIN)
        assert torch.equal(alone[0], together[index])


def test_broken_rows_disturb_no_one() -> None:
    """NaN and infinity in one stream leave the others' views as they are, bit for bit."""
    x, segments = images(9), Segments([3, 2, 4])
    sound = augment(x, segments, UNIT, numbered(3))
    for bad in (torch.nan, torch.inf, -torch.inf):
        broken = x.clone()
        broken[3:5] = bad
        view = augment(broken, segments, UNIT, numbered(3))
        assert torch.equal(view[:3], sound[:3])
        assert torch.equal(view[5:], sound[5:])


@every_recipe
@pytest.mark.parametrize("sizes", [[0], [0, 0], [0, 2], [1, 0]], ids=str)
def test_streams_without_rows_draw_as_others_do(sizes: list[int], recipe: Recipe) -> None:
    """What comes after it from the same object does not depend on who had rows."""
    x, random, other = images(sum(sizes)), numbered(len(sizes)), numbered(len(sizes))
    view = augment(x, Segments(sizes), UNIT, random, recipe)
    assert view.shape == x.shape
    augment(images(len(sizes)), Segments([1] * len(sizes)), UNIT, other, recipe)
    assert torch.equal(random.uniform((3,)), other.uniform((3,)))


def test_the_order_of_colours_is_uniform() -> None:
    """All 120 orders, equally often: each stream's view of a small image is that of one of them. Chi-square within five
    standard deviations."""
    streams, strengths = 12_000, {"brightness": 1.4, "contrast": 1.3, "saturation": 1.5, "hue": 0.06, "gamma": 1.3}
    recipe = changed(STILL, {name: (value, value) for name, value in strengths.items()})
    picture = images(1, (3, 3, 5), seed=3)
    views = augment(picture.expand(streams, -1, -1, -1), Segments([1] * streams), UNIT, numbered(streams), recipe)
    possible = []
    for order in itertools.permutations(COLOURS):
        x = picture[0].permute(1, 2, 0).numpy()
        for name in order:
            x = colour(name, x, strengths[name])
        possible.append(torch.from_numpy(x.copy()).permute(2, 0, 1).flatten())
    known = torch.stack(possible)
    apart = torch.cdist(known, known) + torch.eye(120)
    assert float(apart.min()) > 1e-6, "this picture does not tell the orders apart"
    distance, nearest = torch.cdist(views.flatten(1), known, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert float(distance.max()) < 1e-9
    counts = torch.bincount(nearest, minlength=120).double()
    expected = streams / 120
    assert float(((counts - expected).square() / expected).sum()) < 119 + 5 * (2 * 119) ** 0.5
    first = torch.tensor([COLOURS.index(order[0]) for order in itertools.permutations(COLOURS)])
    share = torch.zeros(5, dtype=torch.float64).index_add_(0, first, counts) / streams
    assert float((share - 0.2).abs().max()) < 5 * (0.16 / streams) ** 0.5


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_flips(probability: float) -> None:
    """A mirrored image so often, within five standard deviations, and nothing between."""
    streams = 4000
    picture = images(1, (1, 2, 6), seed=1)
    recipe = dataclasses.replace(STILL, flip=probability)
    views = augment(picture.expand(streams, -1, -1, -1), Segments([1] * streams), UNIT, numbered(streams), recipe)
    flipped = (views - picture.flip(-1)).abs().flatten(1).max(1).values < 1e-7
    assert ((views - picture).abs().flatten(1).max(1).values[~flipped] < 1e-7).all()
    share = float(flipped.double().mean())
    assert abs(share - probability) <= 5 * (probability * (1 - probability) / streams) ** 0.5


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.0, 255.0)], ids=str)
def test_noise(bounds: tuple[float, float]) -> None:
    """Normal with a standard deviation of 0.005 of the range, fresh for every pixel, channel, row and stream."""
    size = bounds[1] - bounds[0]
    x = torch.full((60, 3, 16, 16), 0.5 * size, dtype=torch.float64)
    recipe = dataclasses.replace(STILL, noise=STRONG.noise)
    noise = (augment(x, Segments([20, 40]), source_of(bounds=bounds), numbered(2), recipe) - x) / size
    n = noise.numel()
    assert noise.unique().numel() == n
    assert abs(float(noise.mean())) < 5 * 0.005 / n**0.5
    assert float(noise.std()) == pytest.approx(0.005, rel=5 / (2 * n) ** 0.5)
    assert float((noise.abs() > 0.005).double().mean()) == pytest.approx(0.3173, abs=5 * (0.22 / n) ** 0.5)


@pytest.mark.parametrize("name", ["brightness", "gamma"])
def test_strengths_are_drawn_uniformly(name: str) -> None:
    """Of the whole range, and each operation's strength from numbers of its own."""
    streams, bounds = 4000, getattr(STRONG, name)
    x = torch.full((streams, 1, 2, 2), 0.5, dtype=torch.float64)
    recipe = changed(STILL, {name: bounds})
    view = augment(x, Segments([1] * streams), UNIT, numbered(streams), recipe)[:, 0, 0, 0]
    drawn = view / 0.5 if name == "brightness" else view.log() / torch.tensor(0.5).log()
    share = (drawn - bounds[0]) / (bounds[1] - bounds[0])
    counts = torch.histc(share, 10, 0, 1)
    assert float(counts.sum()) == streams
    assert float((counts - streams / 10).abs().max()) < 5 * (streams * 0.09) ** 0.5


def test_translations_are_whole_pixels() -> None:
    """Up to 1/16 of the padded side, 2 pixels of 32, rounded: the outermost ones half as often as the others; the two
    directions independent."""
    streams = 3000
    ramp = torch.linspace(0, 1, 16, dtype=torch.float64)
    across = ramp.expand(16, 16)
    x = torch.stack([across, across.T, torch.zeros(16, 16)]).expand(streams, -1, -1, -1)
    recipe = dataclasses.replace(STILL, translation=1 / 16)
    view = augment(x, Segments([1] * streams), UNIT, numbered(streams), recipe)
    moved = (ramp[8] - view[:, :2, 8, 8]) * 15
    assert_near(moved, moved.round(), 1e-6)
    steps = moved.round().long() + 2
    counts = torch.bincount(steps[:, 0] * 5 + steps[:, 1], minlength=25).view(5, 5) / streams
    share = torch.tensor([1, 2, 2, 2, 1]) / 8
    assert float((counts - share[:, None] * share).abs().max()) < 5 * (1 / 16 / streams) ** 0.5


# --- what it does to its inputs ------------------------------------------------------------------------------------


@every_recipe
def test_inputs_are_left_alone(recipe: Recipe) -> None:
    """Nothing is written into them, also where they are in [0, 1] and need no mapping; no gradient is kept."""
    for bounds in ((0.0, 1.0), (0.0, 255.0)):
        x = (images(5) * bounds[1]).requires_grad_()
        before = x.detach().clone()
        view = augment(x, Segments([2, 3]), source_of(bounds=bounds), numbered(2), recipe)
        assert torch.equal(x, before)
        assert not view.requires_grad
        assert view.data_ptr() != x.data_ptr()
    empty = images(0).requires_grad_()
    assert not augment(empty, Segments([0]), UNIT, numbered(1), recipe).requires_grad


def test_memory_layout_makes_no_difference() -> None:
    """Bit for bit the same from a channels-last batch, a broadcast one and a slice."""
    x, segments = images(4, (3, 33, 40), dtype=torch.float32), Segments([1, 3])

    def view(x: Tensor) -> Tensor:
        return augment(x, segments, UNIT, numbered(2, torch.float32))

    plain = view(x)
    assert torch.equal(view(x.contiguous(memory_format=torch.channels_last)), plain)
    assert torch.equal(view(x.repeat_interleave(2, 0)[::2]), plain)
    same = x[:1].expand(4, -1, -1, -1)
    assert torch.equal(view(same), view(same.clone()))


def test_degenerate_images_stay_finite() -> None:
    """All black, all white, one colour, a single pixel."""
    for shape in ((3, 8, 8), (3, 1, 1), (1, 1, 6)):
        x = torch.zeros(40, *shape)
        x[10:20] = 1
        x[20:30, 0] = 1
        x[30:] = 0.4
        for recipe in RECIPES.values():
            assert augment(x, Segments([1] * 40), UNIT, numbered(40, torch.float32), recipe).isfinite().all()


# --- what it can run on --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 24, 100), (3, 1, 1)], ids=str)
def test_images_are_accepted(shape: tuple[int, ...]) -> None:
    check(source_of(shape))


@pytest.mark.parametrize("shape", [(7,), (2, 8, 8), (4, 8, 8), (32, 32, 3), (8, 8), (3, 4, 8, 8), (3, 0, 8)], ids=str)
def test_other_inputs_are_refused(shape: tuple[int, ...]) -> None:
    """With the shape that was found, and what to do."""
    with pytest.raises(ValueError, match=r"images of shape .* choose a policy that does not augment") as refused:
        check(source_of(shape))
    assert str(list(shape)) in str(refused.value)


def test_images_without_a_range_are_refused() -> None:
    with pytest.raises(ValueError, match=r"range of the inputs.* set input\.range"):
        check(source_of(bounds=None))
