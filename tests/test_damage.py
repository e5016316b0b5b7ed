"""Streams made of clean images: which classes they hold, what they suffer, and the judge that learns from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.serving import CPU
from tta_server import damage
from tta_server.corruptions import CORRUPTIONS
from tta_server.damage import DAMAGES, MIXTURES, REQUESTS, SIZES, Damage, draw, judge, why_not
from tta_server.demo.data import validation
from tta_server.drift.benefit import FIGURES, Judge
from tta_server.engine.source import SourceModel, load_model
from tta_server.settings import InputSettings, load_settings

DEMO = Path(__file__).parent.parent / "tta_server" / "demo" / "config.yaml"


@pytest.fixture(scope="module")
def digits() -> SourceModel:
    return load_model("digits", load_settings(DEMO), CPU)


@pytest.fixture(scope="module")
def clean() -> tuple[Tensor, np.ndarray]:
    images, labels = validation()
    return torch.from_numpy(images).float() / 255, labels.astype(np.int64)


# Mixtures


@given(
    st.sampled_from(sorted(MIXTURES)), st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 200),
    st.integers(0, 1000),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_a_mixture_holds_what_it_says(mixture: str, labels: list[int], count: int, seed: int) -> None:
    data = np.array(labels)
    rows = draw(mixture, data, count, np.random.default_rng(seed))
    assert rows.shape == (count,)
    assert rows.min() >= 0
    assert rows.max() < len(data)
    most = {"one": 1, "two": 2, "five": 5}.get(mixture, 10)
    assert len(np.unique(data[rows])) <= most
    for label in np.unique(data[rows]):
        own, there = rows[data[rows] == label], int((data == label).sum())
        if mixture != "all" and len(own) <= there:
            assert len(np.unique(own)) == len(own), "none twice while there are enough"
    if mixture == "all" and count <= len(data):
        assert len(np.unique(rows)) == count
    assert np.array_equal(draw(mixture, data, count, np.random.default_rng(seed)), rows)


def test_mixtures_are_drawn_as_often_as_they_say() -> None:
    """All classes as in the data; of five, each alike; of a Dirichlet, few in a request, all in many."""
    labels = np.repeat(np.arange(10), [100, *[50] * 9])
    generator = np.random.default_rng(0)

    def shares(mixture: str) -> np.ndarray:
        drawn = [np.bincount(labels[draw(mixture, labels, 200, generator)], minlength=10) for _ in range(400)]
        return np.array(drawn) / 200

    np.testing.assert_allclose(shares("all").mean(0), [2 / 11, *[1 / 11] * 9], atol=0.01)
    five = shares("five")
    np.testing.assert_allclose(five.mean(0), 0.1, atol=0.03)
    assert (np.count_nonzero(five, 1) == 5).mean() > 0.99
    skewed = shares("dirichlet")
    np.testing.assert_allclose(skewed.mean(0), 0.1, atol=0.04)
    assert skewed.max(1).mean() > 0.5, "one class is most of a request"


# Damages


def test_every_corruption_and_clean_images_are_among_the_damages() -> None:
    assert {one.name for one in DAMAGES} == {*CORRUPTIONS, "clean"}
    assert len(DAMAGES) * sum(MIXTURES.values()) * sum(SIZES.values()) == REQUESTS


@pytest.mark.parametrize("suffered", DAMAGES, ids=lambda one: f"{one.name} {one.severity}")
@pytest.mark.parametrize("range", [(0.0, 1.0), (-1.0, 3.0), (0.0, 255.0), None])
def test_damage_stays_in_the_range_of_the_inputs(suffered: Damage, range: tuple[float, float] | None) -> None:
    spec = InputSettings(shape=(3, 8, 8), range=range)
    low, high = range or (0.0, 1.0)
    unit = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    damaged = suffered.apply(unit * (high - low) + low, spec, torch.Generator().manual_seed(1))
    slack = 1e-5 * (high - low)
    assert float(damaged.min()) >= low - slack
    assert float(damaged.max()) <= high + slack
    again = suffered.apply(unit * (high - low) + low, spec, torch.Generator().manual_seed(1))
    assert torch.equal(damaged, again)
    same = suffered.apply(unit, InputSettings(shape=(3, 8, 8)), torch.Generator().manual_seed(1))
    torch.testing.assert_close((damaged - low) / (high - low), same, rtol=0, atol=1e-4)


# The judge


FEW = [*DAMAGES[:2], Damage("noise", 1.0), Damage("fog", 1.0)]


def made(digits: SourceModel, clean: tuple[Tensor, np.ndarray], during: Callable[[], object] = int) -> list[object]:
    """All that comes of a judge that learns from a few damages only, for speed."""
    turns: list[object] = []
    with patch.object(damage, "DAMAGES", FEW):
        for turn in judge(digits, *clean, seed=0):
            during()
            turns.append(turn)
    return turns


@pytest.fixture(scope="module")
def judged(digits: SourceModel, clean: tuple[Tensor, np.ndarray]) -> list[object]:
    return made(digits, clean)


def test_a_judge_comes_last(judged: list[object]) -> None:
    """After as many turns as are told beforehand."""
    *turns, found = judged
    assert turns == [None] * (REQUESTS * len(FEW) // len(DAMAGES))
    assert isinstance(found, Judge)
    assert found.weights.shape == (len(FIGURES),)
    assert np.isfinite([*found.weights, found.offset, found.spread]).all()


def test_the_same_data_make_the_same_judge(
    digits: SourceModel, clean: tuple[Tensor, np.ndarray], judged: list[object]
) -> None:
    """Whatever else draws random numbers meanwhile."""
    again, before = made(digits, clean, lambda: torch.rand(1))[-1], judged[-1]
    assert isinstance(again, Judge)
    assert isinstance(before, Judge)
    np.testing.assert_allclose(again.weights, before.weights, rtol=1e-9)


def test_its_spread_is_smaller_than_what_benefits_differ_by(judged: list[object]) -> None:
    """What it learned says something of them."""
    found = judged[-1]
    assert isinstance(found, Judge)
    assert 0 < found.spread < 0.2


def test_what_cannot_be_judged_is_told(digits: SourceModel) -> None:
    assert why_not(digits) == ""
    flat = digits.settings.model_copy(
        update={"input": digits.settings.input.model_copy(update={"shape": (64,), "mean": None, "std": None})}
    )
    assert "images" in why_not(replace(digits, settings=flat))
