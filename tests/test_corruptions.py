"""Corruptions: of any size, in bounds, of the given randomness only, and worse the more severe they are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tta_server.corruptions import CORRUPTIONS, blur, colour_cast, darkness, dead_pixels, fog, motion, noise, pixelate

NAMES = sorted(CORRUPTIONS)
RANDOM = {"noise", "dead_pixels", "darkness"}


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(count: int = 4, channels: int = 3, height: int = 12, width: int = 16, seed: int = 1) -> Tensor:
    """Smooth images with edges, all of [0, 1] in them."""
    x = torch.rand(count, channels, height, width, generator=random(seed))
    x[:, :, height // 2 :] *= 0.3
    x[:, :, 0, 0], x[:, :, -1, -1] = 0.0, 1.0
    return x


@given(
    st.sampled_from(NAMES), st.floats(0.01, 1.0), st.integers(1, 3), st.integers(1, 4), st.integers(1, 20),
    st.integers(1, 20), st.sampled_from([torch.float32, torch.float64]),
)  # fmt: skip
@settings(max_examples=150, deadline=None)
def test_any_image_stays_one(
    name: str, severity: float, count: int, channels: int, height: int, width: int, dtype: torch.dtype
) -> None:
    """Its shape, type and bounds; and what was given is not changed."""
    x = images(count, channels, height, width).to(dtype)
    before = x.clone()
    damaged = CORRUPTIONS[name](x, severity, random())
    assert torch.equal(x, before)
    assert (damaged.shape, damaged.dtype) == (x.shape, dtype)
    assert float(damaged.min()) >= -1e-6
    assert float(damaged.max()) <= 1 + 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_the_randomness_is_the_generators(name: str) -> None:
    x = images()
    first = CORRUPTIONS[name](x, 0.7, random(3))
    torch.manual_seed(99)
    assert torch.equal(CORRUPTIONS[name](x, 0.7, random(3)), first)
    other = CORRUPTIONS[name](x, 0.7, random(4))
    assert torch.equal(other, first) is (name not in RANDOM)


@pytest.mark.parametrize("name", NAMES)
def test_the_more_severe_the_farther(name: str) -> None:
    x = images(64, height=32, width=32)
    near, far = ((CORRUPTIONS[name](x, severity, random()) - x).square().mean() for severity in (0.3, 1.0))
    assert 0 < float(near) < float(far)


@pytest.mark.parametrize("name", sorted(set(NAMES) - RANDOM))
def test_images_do_not_depend_on_company(name: str) -> None:
    x = images()
    torch.testing.assert_close(
        CORRUPTIONS[name](x, 0.8, random())[1:2], CORRUPTIONS[name](x[1:2], 0.8, random()), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("corrupt", [blur, motion, pixelate], ids=lambda one: str(one.__name__))
def test_filters_leave_even_images_as_they_are(corrupt: object) -> None:
    even = torch.full((2, 3, 9, 13), 0.4)
    torch.testing.assert_close(CORRUPTIONS[corrupt.__name__](even, 1.0, random()), even)  # type: ignore[attr-defined]


def test_noise_has_the_deviation_it_says() -> None:
    x = torch.full((50, 3, 32, 32), 0.5)
    assert float((noise(x, 0.4, random()) - x).std()) == pytest.approx(0.1, rel=0.02)


def test_so_many_pixels_die_and_all_their_channels() -> None:
    x = torch.full((50, 3, 32, 32), 0.5)
    damaged = dead_pixels(x, 1.0, random())
    dead = damaged != x
    assert torch.equal(dead.all(1), dead.any(1))
    assert float(dead.float().mean()) == pytest.approx(0.15, rel=0.05)
    assert float(damaged[dead].mean()) == pytest.approx(0.5, abs=0.05), "black or white, as often"


def test_blur_has_the_deviation_it_says() -> None:
    """A point becomes a bell of that second moment, cut off at three deviations."""
    x = torch.zeros(1, 1, 65, 65, dtype=torch.float64)
    x[..., 32, 32] = 1
    spread = blur(x, 1.0, random())[0, 0]
    places = torch.arange(65) - 32.0
    assert float(spread.sum()) == pytest.approx(1)
    for side in (spread.sum(0), spread.sum(1)):
        assert float((side * places**2).sum()) ** 0.5 == pytest.approx(65 / 16, rel=0.03)


def test_motion_is_sideways() -> None:
    x = torch.zeros(1, 1, 9, 32)
    x[..., 4, 16] = 1
    moved = motion(x, 1.0, random())[0, 0]
    assert torch.equal(moved.nonzero()[:, 0].unique(), torch.tensor([4]))
    assert moved.count_nonzero() == 9, "a quarter of the width, and the pixel itself"
    assert float(moved.max()) == pytest.approx(1 / 9)


def test_fog_and_darkness_leave_the_contrast_they_say() -> None:
    x = images(1, height=64, width=64)
    assert float(fog(x, 1.0, random()).std() / x.std()) == pytest.approx(0.25)
    assert float(darkness(x, 1.0, random()).mean() / x.mean()) == pytest.approx(0.2, rel=0.1)


def test_a_cast_is_of_colours() -> None:
    x = images()
    gains = (colour_cast(x, 1.0, random()) / x).nan_to_num(0).amax((0, 2, 3))
    torch.testing.assert_close(gains, torch.tensor([1.0, 0.65, 0.3]))


def test_pixelate_leaves_fewer_values() -> None:
    damaged = pixelate(images(1, 1, 20, 20), 1.0, random())
    assert damaged.unique().numel() <= 36
