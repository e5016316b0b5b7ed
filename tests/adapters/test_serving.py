"""What surrounds a policy's step, beyond what laws and oracles say: windows for small requests, periodic resets."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from adapters import serving
from adapters.base import Batch, Source, State, Step
from adapters.images import ImageStore
from adapters.tent import Tent
from tests.adapters.networks import Server, flat, run, subject
from tta_server.policies import make_policy


def test_an_image_at_a_time_takes_the_step_of_a_batch() -> None:
    """The weights after W single images are those after one request of all W, and not changed before."""
    network = subject("conv-bn")
    x = network.rows(0, 6)
    small, whole = make_policy("tent", {"lr": 0.1, "window": 6}), make_policy("tent", {"lr": 0.1})
    server, other = Server(small, network), Server(whole, network)
    for index in range(5):
        server.logits({"a": x[index : index + 1]})
    start = network.init(whole)
    assert all(torch.equal(server.state("a").weights[key], value) for key, value in start.weights.items())
    server.logits({"a": x[5:]})
    other.logits({"a": x})
    for key, value in other.state("a").weights.items():
        assert torch.equal(server.state("a").weights[key], value)
    assert server.state("a").memory["window.rows"].tolist() == [0]


def test_single_rows_are_answered_by_statistics_over_many() -> None:
    """After many single rows the answers are near those of one large batch; normalised by themselves they are not."""
    network = subject("conv-bn")
    x = network.rows(3, 300)
    server = Server(make_policy("norm", {"window": 64}), network)
    for index in range(299):
        server.logits({"a": x[index : index + 1]})
    served = server.logits({"a": x[299:]})["a"]
    batch = run(make_policy("norm", {}), network, [State({}, {})], [x]).logits[0][299:]
    alone = run(make_policy("norm", {}), network, [State({}, {})], [x[299:]]).logits[0]
    source = run(make_policy("source", {}), network, [State({}, {})], [x[299:]]).logits[0]
    near = float((served - batch).abs().max())
    assert near < 0.35 * float((alone - batch).abs().max())
    assert near < 0.35 * float((source - batch).abs().max())


def test_images_are_kept_as_they_came() -> None:
    """8-bit images come back from a window exactly, bit for bit as the codec makes inputs of pixels."""
    source = subject("image-bn").source
    for low, high in ((0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)):
        ranged = dataclasses.replace(source, input_range=(low, high))
        pixels = torch.arange(256, dtype=torch.uint8).repeat(3)[: 3 * 8 * 8].view(1, 3, 8, 8)
        x = (low + (high - low) * (pixels.float() / 255)).to(source.dtype)
        store = ImageStore(ranged)
        assert store.empty(4).dtype == torch.uint8
        assert torch.equal(store.pack(x), pixels)
        assert torch.equal(store.unpack(store.pack(x)), x)
    odd = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    assert float((ImageStore(source).unpack(ImageStore(source).pack(odd)) - odd).abs().max()) <= 1 / 510 + 1e-6
    assert torch.equal(ImageStore(source, exact=True).pack(odd), odd)


@pytest.mark.parametrize(("images", "kept"), [("auto", torch.uint8), ("exact", torch.float64), ("none", None)])
def test_what_a_window_keeps(images: str, kept: torch.dtype | None) -> None:
    network = subject("image-bn")
    memory = network.init(make_policy("tent", {"window": 5, "window_images": images})).memory
    assert (memory["window.x"].dtype if "window.x" in memory else None) == kept


def test_without_kept_images_only_statistics_adapt_between_batches() -> None:
    network = subject("conv-bn")
    server = Server(make_policy("tent", {"lr": 0.1, "window": 5, "window_images": "none"}), network)
    before = flat(server.state("a"))
    for step in range(8):
        server.logits({"a": network.rows(step, 4)})
    after = flat(server.state("a"))
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved == {key for key in before if "window.0." in key}
    server.logits({"a": network.rows(9, 5)})
    learned = flat(server.state("a"))
    assert any(not torch.equal(learned[key], after[key]) for key in after if key.startswith("weights/"))


@dataclass(frozen=True)
class Delicate(Tent):
    """TENT that cannot stand rows above a value: its step is NaN then, or with ``raises`` fails."""

    name = "delicate"
    raises: bool = False

    def step(self, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
        is_bad = batch.segments.sum((batch.x > 90).flatten(1).any(1).double()) > 0
        done = yield from super().step(source, state, batch)
        if self.raises and is_bad.any():
            raise ZeroDivisionError("too much")
        weights = {
            key: torch.where(is_bad.view(-1, *[1] * (value.dim() - 1)), torch.nan, value)
            for key, value in done.state.weights.items()
        }
        return Step(State(weights, done.state.memory), done.signals)


@pytest.mark.parametrize("raises", [False, True])
def test_a_window_that_cannot_be_learned_from_is_left_behind(raises: bool) -> None:
    """One bad image spoils the step of its window, not those that follow, nor anything of a neighbour."""
    network = subject("conv-bn")
    policy = Delicate(lr=0.05, window=4, raises=raises)
    server, calm = Server(policy, network), Server(policy, network)
    for step in range(12):
        x, y = network.rows(step, 1), network.rows(100 + step, 1)
        server.logits({"bad": torch.full_like(x, 100.0) if step == 2 else x, "good": y})
        calm.logits({"good": y})
        assert server.stats["bad"].result == "applied"
        rejected = server.stats["bad"].signals.get("window_rejected")
        if step % 4 == 3:
            assert rejected == (step == 3)
    assert server.stream("bad").version == server.stream("good").version == 12
    start = network.init(policy)
    assert any(not torch.equal(value, start.weights[key]) for key, value in server.state("bad").weights.items())
    for key, value in flat(calm.state("good")).items():
        assert torch.equal(flat(server.state("good"))[key], value)


@pytest.mark.parametrize(
    ("name", "settings"), [("source", {}), ("lame", {}), ("t3a", {}), ("rotta", {}), ("norm", {"mode": "blend"})]
)
def test_policies_without_batch_statistics_refuse_a_window(name: str, settings: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{name} takes no window: it does not normalise by the batch"):
        serving.init(make_policy(name, {**settings, "window": 8}), subject("image-bn").source)


def test_rdumb_with_a_reset_after_every_request_is_episodic() -> None:
    """[6.4] Answers then do not depend on the history."""
    network = subject("conv-bn")
    server = Server(make_policy("eta", {"lr": 0.1, "entropy_margin": 0.9, "reset_after": 1}), network)
    x = network.rows(0, 5)
    first = server.logits({"a": x})["a"]
    server.logits({"a": network.rows(1, 7)})
    assert torch.equal(server.logits({"a": x})["a"], first)
    assert server.stats["a"].signals["reset"] == 1.0
