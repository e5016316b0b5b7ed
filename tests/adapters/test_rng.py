"""The random numbers of streams: the published generator, and draws that belong to one stream alone."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from adapters.base import SOURCE_NORM, Batch, Norm, Policy, Scope, Source, State, Step
from adapters.rng import Random, philox, stream_key
from tests.adapters.networks import Server, assert_same, subject
from tta_server.errors import StepFailed

KNOWN_ANSWERS = {
    "zeros": ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
}
"""Philox4x32-10 in Random123's ``kat_vectors``: counter, key, answer."""


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def draws_of(names: list[str], steps: list[int] | None = None, dtype: torch.dtype = torch.float64) -> Random:
    keys = torch.tensor([stream_key(name) for name in names])
    return Random(keys, torch.tensor(steps or [0] * len(names)), dtype)


@pytest.mark.parametrize("name", KNOWN_ANSWERS)
def test_philox_gives_the_published_answers(name: str) -> None:
    """Known-answer vectors of Random123 (Salmon et al., SC 2011)."""
    counter, key, answer = (words(text) for text in KNOWN_ANSWERS[name])
    c0, c1, c2, c3 = (torch.tensor([word]) for word in counter)
    k0, k1 = (torch.tensor([word]) for word in key)
    assert [int(word) for word in philox((c0, c1, c2, c3), (k0, k1))] == answer


def test_philox_broadcasts_keys_against_counters() -> None:
    """All known answers at once, as rows, equal themselves one by one."""
    counters = torch.tensor([words(one[0]) for one in KNOWN_ANSWERS.values()]).T[:, None, :]
    keys = torch.tensor([words(one[1]) for one in KNOWN_ANSWERS.values()]).T[:, :, None]
    grid = torch.stack(philox((counters[0], counters[1], counters[2], counters[3]), (keys[0], keys[1])), -1)
    assert grid.shape == (3, 3, 4)
    expected = torch.tensor([words(one[2]) for one in KNOWN_ANSWERS.values()])
    assert torch.equal(grid[torch.arange(3), torch.arange(3)], expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_draws_lie_in_the_unit_interval(dtype: torch.dtype) -> None:
    """In [0, 1): finite, never 1, in the dtype asked for. A network in half precision draws in half precision."""
    draws = draws_of(["a", "b"], dtype=dtype).uniform((20_000,))
    assert draws.dtype == dtype
    assert draws.isfinite().all()
    assert float(draws.min()) >= 0
    assert float(draws.max()) < 1
    assert float(draws.double().mean()) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_draws_are_uniform(dtype: torch.dtype) -> None:
    """Moments, ten equal bins and neighbours, each within five standard errors of what a uniform variable has."""
    n = 40_000
    x = draws_of(["a", "b", "c"], dtype=dtype).uniform((n,)).double()
    for moment in (1, 2, 3, 4):
        error = (1 / (2 * moment + 1) - 1 / (moment + 1) ** 2) ** 0.5 / n**0.5
        assert ((x**moment).mean(1) - 1 / (moment + 1)).abs().max() < 5 * error
    for row in x:
        counts = torch.histc(row, 10, 0, 1)
        assert (counts - n / 10).abs().max() < 5 * (n * 0.09) ** 0.5
    centred = x - 0.5
    assert ((centred[:, 1:] * centred[:, :-1]).mean(1) * 12).abs().max() < 5 / n**0.5
    assert abs(float((centred[0] * centred[1]).mean() * 12)) < 5 / n**0.5


@pytest.mark.parametrize("shape", [(), (1,), (3,), (4,), (5, 2), (2, 3, 4)], ids=str)
def test_shape(shape: tuple[int, ...]) -> None:
    """``uniform(shape) -> [S, *shape]``, whatever is left of the last block of four words."""
    draws = draws_of(["a", "b"]).uniform(shape)
    assert draws.shape == (2, *shape)
    assert draws.unique().numel() == draws.numel()


def test_a_stream_draws_the_same_in_any_company() -> None:
    """Same key, step and draw: same numbers, alone or with others, at any place among them."""
    alone = draws_of(["b"], [5])
    first, second = alone.uniform((3, 7)), alone.uniform((4,))
    company = draws_of(["a", "b", "c"], [9, 5, 0])
    assert torch.equal(company.uniform((3, 7))[1], first[0])
    assert torch.equal(company.uniform((4,))[1], second[0])
    moved = draws_of(["b", "z"], [5, 5])
    assert torch.equal(moved.uniform((3, 7))[0], first[0])


def test_draws_differ_between_streams_steps_and_calls() -> None:
    """Nothing is drawn twice: not by another stream, in another step (also beyond 32 bits), or in the next call."""
    drawn: list[Tensor] = []
    for name in ("a", "b"):
        for step in (0, 1, 2**32, 2**32 + 1):
            draws = draws_of([name], [step])
            drawn += [draws.uniform((64,))[0], draws.uniform((64,))[0]]
    together = torch.cat(drawn)
    assert together.unique().numel() == together.numel()


def test_the_same_call_gives_the_same_numbers() -> None:
    """There is no hidden generator: not torch's global one either."""
    torch.manual_seed(0)
    first = draws_of(["a"], [3]).uniform((16,))
    torch.manual_seed(1)
    assert torch.equal(draws_of(["a"], [3]).uniform((16,)), first)


def test_stream_keys() -> None:
    """A key is a 63-bit number, the same for the same name and seed, another for another; it uses its high bits too."""
    names = [f"stream-{index}" for index in range(1000)]
    keys = {stream_key(name, seed) for name in names for seed in (0, 1)}
    assert len(keys) == 2000
    assert all(0 <= key < 2**63 for key in keys)
    assert sum(key >= 2**62 for key in keys) == pytest.approx(1000, abs=120)
    assert stream_key("stream-1") == stream_key("stream-1", 0) != stream_key("stream-1", 1)


def test_every_bit_of_a_key_counts() -> None:
    """Keys that differ in one bit, low or high, give different draws."""
    keys = [0, *(1 << bit for bit in range(63))]
    draws = Random(torch.tensor(keys), torch.zeros(64, dtype=torch.int64), torch.float64).uniform((2,))
    assert draws.unique().numel() == draws.numel()


@dataclass(frozen=True)
class Dice(Policy):
    """Keeps what it drew, twice per step, and adapts nothing."""

    name = "dice"
    scope = Scope.NORM

    @property
    def norm(self) -> Norm:
        return SOURCE_NORM

    def init(self, source: Source) -> State:
        return State({}, {"drawn": torch.zeros(1, 2, 3, dtype=torch.float64)})

    def step(self, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
        yield batch.forward({}, batch.x).logits
        return Step(State({}, {"drawn": torch.stack([batch.random.uniform((3,)), batch.random.uniform((3,))], 1)}))


def test_the_engine_draws_by_stream_and_version() -> None:
    """Through the engine: draws follow from the stream's key and version alone; a step that was not committed is drawn
    again, and a reset starts the stream's sequence anew."""
    network = subject("mlp-bn")
    x, bad = network.rows(0, 2), torch.full((2, *network.shape), torch.nan, dtype=torch.float64)

    def expected(name: str, version: int) -> dict[str, Tensor]:
        draws = draws_of([name], [version])
        return {"drawn": torch.stack([draws.uniform((3,)), draws.uniform((3,))], 1)}

    server = Server(Dice(), network)
    server.step({"a": x, "b": x})
    server.step({"b": x})
    server.step({"c": x, "b": x, "a": x})
    for name, version in (("a", 1), ("b", 2), ("c", 0)):
        assert_same(server.state(name).memory, expected(name, version))
    assert isinstance(server.step({"a": bad})["a"], StepFailed)
    assert_same(server.state("a").memory, expected("a", 1))
    server.step({"a": x})
    assert_same(server.state("a").memory, expected("a", 2))
    server.engine.reset(server.stream("b"))
    server.step({"b": x})
    assert_same(server.state("b").memory, expected("b", 0))
