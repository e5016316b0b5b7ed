"""The random numbers of streams: the published generator, and draws that belong to one stream alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from adapters.base import SOURCE_NORM, Batch, Norm, Policy, Scope, Segments, Source, State, Step
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
    found = philox(np.array(counter, np.uint64)[:, None], np.array(key, np.uint64)[:, None])
    assert found.flatten().tolist() == answer


def test_philox_broadcasts_keys_against_counters() -> None:
    """All known answers at once, as rows, equal themselves one by one."""
    counters, keys, answers = (
        np.array([words(one[i]) for one in KNOWN_ANSWERS.values()], np.uint64).T for i in range(3)
    )
    grid = philox(counters[:, None, :], keys[:, :, None])
    assert grid.shape == (4, 3, 3)
    assert np.array_equal(grid[:, range(3), range(3)], answers)


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


# --- named draws, draws of some streams ----------------------------------------------------------------------------


def correlation(left: Tensor, right: Tensor) -> float:
    """Of two equally long samples, in standard errors."""
    left, right = left.double() - left.double().mean(), right.double() - right.double().mean()
    return float((left * right).mean().abs() / (left.std() * right.std())) * float(left.numel() ** 0.5)


def test_named_draws_are_independent() -> None:
    """Of one another, of the object they come from, of other steps and streams, and of names on the way: nothing is
    drawn twice, and samples are uncorrelated."""
    names = ["", "a", "b", "ab", "augment 1", "augment 11", "restore", "b/a", "0"]
    samples = []
    for key in ("x", "y"):
        for step in (0, 1):
            random = draws_of([key], [step])
            chosen = [random, *map(random.named, names), *(random.named("a").named(name) for name in names)]
            chosen.append(random.named("b").named("a"))
            samples += [one.uniform((256,))[0] for one in chosen]
    together = torch.stack(samples)
    assert together.unique().numel() == together.numel()
    centred = together - 0.5
    correlations = (centred @ centred.T) * 12 / 256**0.5
    correlations.fill_diagonal_(0)
    assert float(correlations.abs().max()) < 6
    assert float(correlations.square().mean()) == pytest.approx(1, abs=0.2)
    assert float(centred.mean()) == pytest.approx(0, abs=5 / (12 * together.numel()) ** 0.5)


def test_a_name_gives_the_same_draws_at_every_call() -> None:
    """Whatever was drawn before, from the object or under other names, and each time from the start."""
    fresh, used = draws_of(["a", "b"], [3, 4]), draws_of(["a", "b"], [3, 4])
    used.uniform((5,))
    used.named("other").uniform((9,))
    first = used.named("one")
    assert torch.equal(first.uniform((7,)), fresh.named("one").uniform((7,)))
    again = used.named("one")
    assert torch.equal(again.uniform((7,)), fresh.named("one").uniform((7,)))
    assert torch.equal(again.uniform((7,)), first.uniform((7,)))
    plain = draws_of(["a", "b"], [3, 4])
    plain.uniform((5,))
    assert torch.equal(used.uniform((3,)), plain.uniform((3,))), "a name moves nothing on in the object it came from"


def test_several_names_at_once() -> None:
    """For each stream and name what the name alone gives, those of a stream side by side; all kinds of draws."""
    random, segments = draws_of(["a", "b"], [3, 4]), Segments([2, 0, 1, 3, 1, 1])
    names = ["augment 0", "augment 1", "x"]
    together = random.named_each(names)
    alone = [random.named(name) for name in names]
    for _ in range(2):
        uniform = torch.stack([one.uniform((5,)) for one in alone], 1)
        assert torch.equal(together.uniform((5,)), uniform.flatten(0, 1))
        rows = [one.normal_rows(Segments(segments.sizes[k::3]), (7,)) for k, one in enumerate(alone)]
        parts = [part.split(segments.sizes[k::3]) for k, part in enumerate(rows)]
        expected = torch.cat([parts[k][stream] for stream in range(2) for k in range(3)])
        assert torch.equal(together.normal_rows(segments, (7,)), expected)
        coins = torch.stack([one.coins(0.5, (40,)) for one in alone], 1)
        assert torch.equal(together.coins(0.5, (40,)), coins.flatten(0, 1))


@pytest.mark.parametrize(
    ("one", "other", "bits"), [("n117011", "n122556", 0xFFFFFFFF), ("n14620", "n16340", ~0xFFFFFFFF)]
)
def test_every_half_of_a_name_counts(one: str, other: str, bits: int) -> None:
    """Names whose digests agree in one of their two words have draws of their own."""
    assert stream_key(one) & bits == stream_key(other) & bits
    random = draws_of(["a"])
    assert not torch.equal(random.named(one).uniform((4,)), random.named(other).uniform((4,)))


def test_named_draws_keep_type_and_shape() -> None:
    draws = draws_of(["a", "b", "c"], dtype=torch.float32).named("x").uniform((2, 5))
    assert draws.dtype == torch.float32
    assert draws.shape == (3, 2, 5)
    assert draws.unique().numel() == draws.numel()


def test_keys_are_never_negative() -> None:
    """Those of streams and of names: non-negative, and all 63 bits are in use."""
    keys = torch.tensor([stream_key(f"stream {index}") for index in range(500)])
    random = Random(keys, torch.arange(500), torch.float64)
    derived = torch.cat([random.named(f"name {index}")._keys for index in range(10)])
    derived = torch.cat([derived, random.named("a").named("b")._keys])
    for values in (keys, derived):
        assert values.dtype == torch.int64
        assert int(values.min()) >= 0
        assert values.unique().numel() == values.numel()
        share = torch.stack([(values >> bit & 1).double().mean() for bit in range(63)])
        assert float((share - 0.5).abs().max()) < 5 * 0.5 / len(values) ** 0.5


def test_the_extreme_keys_and_steps_can_be_drawn_from() -> None:
    """0 and the greatest of 63 bits, in all ways there are."""
    ends = torch.tensor([0, 2**63 - 1])
    random = Random(ends, ends, torch.float64)
    for draws in (random, random.named("a"), random.among([1, 0])):
        segments = Segments([2, 1])
        drawn = [draws.uniform((4,)).flatten(), draws.uniform_rows(segments, (4,)).flatten()]
        drawn += [draws.normal_rows(segments, (4,)).flatten()]
        together = torch.cat(drawn)
        assert together.isfinite().all()
        assert together.unique().numel() == together.numel()
        assert draws.coins(0.5, (3,)).shape == (2, 3)


def test_among_gives_each_stream_its_own_draws() -> None:
    """Those it would have made in the whole company, from the start, in the order asked for; also of named draws."""
    random = draws_of(["a", "b", "c", "d"], [5, 0, 2**33, 1])
    for draws in (random, random.named("x")):
        few, all_of_them = draws.among([2, 0]), draws.among([0, 1, 2, 3])
        whole = all_of_them.uniform((6,))
        assert torch.equal(few.uniform((6,)), whole[[2, 0]])
        segments, two = Segments([1, 3, 2, 4]), Segments([2, 1])
        rows = all_of_them.normal_rows(segments, (3,)).split(segments.sizes)
        assert torch.equal(few.normal_rows(two, (3,)), torch.cat([rows[2], rows[0]]))
        assert torch.equal(few.coins(0.5, (40,)), all_of_them.coins(0.5, (40,))[[2, 0]])
    assert torch.equal(random.named("x").among([3]).uniform((6,)), random.among([3]).named("x").uniform((6,)))
    assert random.among([1]).uniform((2,)).dtype == torch.float64


# --- many draws: rows and coins ------------------------------------------------------------------------------------

Rows = Callable[[Random, Segments, tuple[int, ...]], Tensor]
every_kind = pytest.mark.parametrize("rows", [Random.uniform_rows, Random.normal_rows], ids=["uniform", "normal"])


@every_kind
@pytest.mark.parametrize("sizes", [[3], [0], [2, 0, 5], [0, 0], [1, 1, 1]], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (2, 3, 4)], ids=str)
def test_shape_of_rows(rows: Rows, sizes: list[int], shape: tuple[int, ...]) -> None:
    """``[N, *shape]``, also with streams that have no rows, and all different."""
    for dtype in (torch.float64, torch.float32):
        drawn = rows(draws_of([str(index) for index in range(len(sizes))], dtype=dtype), Segments(sizes), shape)
        assert drawn.shape == (sum(sizes), *shape)
        assert drawn.dtype == dtype
        assert drawn.unique().numel() == drawn.numel()


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_rows_are_the_same_in_any_company(rows: Rows, dtype: torch.dtype) -> None:
    """Bit for bit, beside streams of any size, none included, at any place; small and large draws."""
    for shape in ((), (3,), (5, 7), (3, 32, 32)):
        alone = rows(draws_of(["b"], [5], dtype), Segments([4]), shape)
        for names, sizes in (("abc", [7, 4, 0]), ("bca", [4, 0, 1]), ("acb", [0, 0, 4]), ("cb", [40, 4])):
            segments = Segments(sizes)
            random = draws_of(list(names), [5 if name == "b" else 1 for name in names], dtype)
            company = rows(random, segments, shape).split(sizes)
            assert torch.equal(company[names.index("b")], alone)


@every_kind
def test_rows_differ_by_stream_step_name_call_and_kind(rows: Rows) -> None:
    """Nothing is drawn twice, whether few or many are asked for."""
    drawn = []
    for name in ("a", "b"):
        for step in (0, 1, 2**32):
            random = draws_of([name], [step])
            for one in (random, random.named("x")):
                segments = Segments([4])
                drawn += [rows(one, segments, (16,)).flatten() for _ in range(3)]
                drawn += [one.uniform((64,)).flatten(), one.uniform_rows(segments, (16,)).flatten()]
    together = torch.stack(drawn)
    assert together.unique().numel() == together.numel()
    for left, right in itertools.pairwise(together):
        assert correlation(left, right) < 5


@every_kind
def test_draws_of_no_rows_count_as_draws(rows: Rows) -> None:
    """What a stream draws next does not depend on whether it had rows before."""
    empty, full = draws_of(["a", "b"]), draws_of(["a", "b"])
    rows(empty, Segments([0, 0]), (3,))
    rows(full, Segments([2, 5]), (3,))
    assert torch.equal(empty.uniform((4,)), full.uniform((4,)))
    assert torch.equal(rows(empty, Segments([1, 2]), (3,)), rows(full, Segments([1, 2]), (3,)))


@every_kind
def test_rows_come_from_no_hidden_generator(rows: Rows) -> None:
    """Torch's global one is neither read nor moved."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = rows(draws_of(["a"]), Segments([3]), (8,))
    coins = draws_of(["a"]).coins(0.3, (8,))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)
    assert torch.equal(rows(draws_of(["a"]), Segments([3]), (8,)), first)
    assert torch.equal(draws_of(["a"]).coins(0.3, (8,)), coins)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_moments_of_rows(dtype: torch.dtype) -> None:
    """Uniform in [0, 1) and standard normal: the first four moments within five standard errors, per stream."""
    n, segments = 40_000, Segments([40, 80])
    uniform = draws_of(["a", "b"], dtype=dtype).uniform_rows(segments, (1000,))
    assert float(uniform.min()) >= 0
    assert float(uniform.max()) < 1
    normal = draws_of(["a", "b"], dtype=dtype).normal_rows(segments, (1000,))
    of_uniform, of_normal = {1: 0.5, 2: 1 / 3, 3: 1 / 4, 4: 1 / 5}, {1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0}
    for drawn, moments in ((uniform, of_uniform), (normal, of_normal)):
        for part in drawn.double().split(segments.sizes):
            for power, expected in moments.items():
                values = part.flatten() ** power
                assert abs(float(values.mean()) - expected) < 5 * float(values.std()) / n**0.5
            flat = part.flatten()
            assert correlation(flat[1:], flat[:-1]) < 5
            assert correlation(part[1], part[0]) < 5


@pytest.mark.parametrize("probability", [0.0, 0.001, 0.1, 0.5, 0.9, 1.0])
def test_coins_fall_with_their_probability(probability: float) -> None:
    """Within five standard errors, per stream; never at 0 and always at 1."""
    n = 90_000
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        coins = draws_of(["a", "b"], dtype=dtype).coins(probability, (n // 30, 30))
        assert coins.dtype == torch.bool
        assert coins.shape == (2, n // 30, 30)
        share = coins.flatten(1).double().mean(1)
        assert float((share - probability).abs().max()) <= 5 * (probability * (1 - probability) / n) ** 0.5
        if 0 < probability < 1:
            assert not torch.equal(coins[0], coins[1])
            assert correlation(coins[0].flatten(), coins[1].flatten()) < 5


def test_coins_are_the_same_in_any_company() -> None:
    """And differ by stream, step, name and call."""
    alone = draws_of(["b"], [5])
    first, second = alone.coins(0.5, (3, 50)), alone.coins(0.5, (3, 50))
    company = draws_of(["a", "b", "c"], [9, 5, 0])
    assert torch.equal(company.coins(0.5, (3, 50))[1], first[0])
    assert torch.equal(company.coins(0.5, (3, 50))[1], second[0])
    others = [draws_of(["a"], [5]), draws_of(["b"], [6]), draws_of(["b"], [5]).named("x")]
    for drawn in (second, *(other.coins(0.5, (3, 50)) for other in others)):
        assert not torch.equal(drawn, first)


def test_few_coins() -> None:
    """Shapes without any, and of a single number."""
    random = draws_of(["a", "b"])
    assert random.coins(0.5, (0,)).shape == (2, 0)
    assert random.coins(0.5, ()).shape == (2,)
    assert random.coins(0.5, (2, 0, 3)).shape == (2, 2, 0, 3)


# --- through the engine --------------------------------------------------------------------------------------------


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
    server.engine.reset(server.lane, server.lane, server.stream("b"))
    server.step({"b": x})
    assert_same(server.state("b").memory, expected("b", 0))
