"""What the paper promises of ``deyo``, checked without reference code. Numbers in brackets are sections of the
project's algorithm notes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from adapters.base import Norm, Output, Segments, State
from adapters.deyo import Deyo
from adapters.rng import Random
from tests.adapters.networks import (
    Subject,
    assert_close,
    assert_same,
    drive,
    flat,
    join,
    make_batch,
    run,
    subject,
)
from tta_server.policies import make_policy

KINDS = ("conv-bn", "conv-gn")
every_net = pytest.mark.parametrize("kind", KINDS)
# All rows are certain and all are chosen, whatever the destroyed image looks like.
ALL: dict[str, Any] = {"entropy_margin": 1.1, "plpd_threshold": -2.0, "optimiser": "sgd", "lr": 0.1}


def deyo(**settings: Any) -> Deyo:
    policy = make_policy("deyo", ALL | settings)
    assert isinstance(policy, Deyo)
    return policy


def one(policy: Deyo, network: Subject, x: Tensor, state: State | None = None) -> tuple[State, dict[str, float]]:
    outcome = run(policy, network, [state or network.init(policy)], [x])
    return outcome.states[0], outcome.signals[0]


def draws(streams: int, seed: int = 0) -> Random:
    return Random(torch.arange(streams) + seed, torch.zeros(streams, dtype=torch.int64), torch.float64)


def watched(
    policy: Deyo, network: Subject, states: list[State], xs: list[Tensor]
) -> tuple[list[tuple[Tensor, Segments, Output]], State]:
    """A step with what its forward passes got and gave, and the state it left."""
    calls = []

    def spy(weights: Mapping[str, Tensor], x: Tensor, segments: Segments, norm: Norm) -> Output:
        output = network.network(weights, x, segments, norm)
        calls.append((x, segments, output))
        return output

    batch = dataclasses.replace(make_batch(policy, network, xs), network=spy)
    return calls, drive(policy, network, join(states), batch)[1].state


@every_net
def test_without_certain_rows_nothing_happens(kind: str) -> None:
    """[6.8] A margin of 0: neither weights nor moments move, and there is one forward pass."""
    network = subject(kind)
    state, _ = one(deyo(), network, network.rows(0, 4))
    calls, after = watched(deyo(entropy_margin=0.0), network, [state], [network.rows(1, 4)])
    assert len(calls) == 1
    assert_same(flat(after), flat(state))


@every_net
@pytest.mark.parametrize("destroy", ["patch", "pixel", "occlusion"])
def test_rows_that_keep_their_prediction_do_not_count(kind: str, destroy: str) -> None:
    """[6.8] Images that look the same when destroyed (a single block; one colour) have a difference of 0: nothing
    happens with a threshold of 0, and a step is taken below it."""
    network = subject(kind)
    state, _ = one(deyo(), network, network.rows(0, 4))
    x = network.rows(1, 5)
    settings: dict[str, Any] = {"destroy": destroy}
    if destroy == "patch":
        settings["patch_len"] = 1
    else:
        x = x.mean((2, 3), keepdim=True).expand_as(x)
    above, signals = one(deyo(plpd_threshold=1e-9, **settings), network, x, state)
    assert_same(flat(above), flat(state))
    assert signals == {"loss": 0, "selected": 0}
    below, signals = one(deyo(plpd_threshold=-1e-9, **settings), network, x, state)
    assert (below.weights["1.weight"] != state.weights["1.weight"]).all()
    assert signals["selected"] == 1


@every_net
def test_with_all_rows_and_no_weights_it_is_tent(kind: str) -> None:
    """[6.8] ``tau = -2``, weights of 1, no margin: TENT, over several steps with momentum."""
    network, tent = subject(kind), make_policy("tent", {"optimiser": "sgd", "lr": 0.1})
    policy = deyo(weigh_entropy=False, weigh_plpd=False)
    states = [network.init(policy), network.init(tent)]
    for step in range(4):
        x = network.rows(step, 5)
        states = [run(p, network, [state], [x]).states[0] for p, state in zip((policy, tent), states, strict=True)]
        assert_close(flat(states[0]), flat(states[1]))


@every_net
@pytest.mark.parametrize("seed", range(3))
def test_the_difference_lies_between_minus_one_and_one(kind: str, seed: int) -> None:
    """[6.8] No row is above a threshold of 1, and every one above -1 but for one-hot predictions."""
    network, x = subject(kind, seed), subject(kind, seed).rows(seed, 6)
    assert one(deyo(plpd_threshold=1.0), network, x)[1]["selected"] == 0
    assert one(deyo(plpd_threshold=-1.0), network, x)[1]["selected"] == 1


def test_the_second_look_is_at_certain_rows_alone() -> None:
    """[2.14] Destroyed, with their own owners and without a graph; a stream that has none has no part in it."""
    network, policy = subject("conv-bn"), deyo(entropy_margin=0.8)
    xs = [network.rows(0, 6), network.rows(1, 1), network.rows(2, 5)]
    calls, _ = watched(policy, network, [network.init(policy)] * 3, xs)
    (x, segments, first), (destroyed, some, second) = calls
    entropy = torch.special.entr(first.logits.detach().softmax(1)).sum(1)
    certain = entropy < 0.8 * torch.tensor(5.0).log()
    assert 0 < certain.sum() < len(x)
    assert some.sizes == [int(part.sum()) for part in certain.split(segments.sizes)]
    assert len(destroyed) == certain.sum()
    assert second.logits.grad_fn is None
    assert not torch.equal(destroyed, x[certain])


@pytest.mark.parametrize("patch_len", [2, 4])
def test_patches_are_shuffled_whole(patch_len: int) -> None:
    """[6.8] Where no resizing is needed, the blocks of the result are the image's, each in one place; every image has
    an order of its own."""
    segments = Segments([3, 2])
    x = torch.arange(64.0).view(8, 8).repeat(5, 3, 1, 1) + 100 * torch.arange(3.0).view(3, 1, 1)
    after = deyo(patch_len=patch_len).destroyed(x, segments, draws(2))
    side = 8 // patch_len

    def blocks(image: Tensor) -> list[tuple[float, ...]]:
        cut = image.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1)
        return [tuple(block.tolist()) for block in cut]

    for before, image in zip(x, after, strict=True):
        assert sorted(blocks(before)) == sorted(blocks(image))
    if patch_len == 4:  # of 16! orders
        assert len({tuple(blocks(image)) for image in after}) == 5
    again = deyo(patch_len=patch_len).destroyed(x[3:], Segments([2]), draws(1, seed=1))
    assert torch.equal(again, after[3:])  # the second stream's draws are its own


def test_images_that_do_not_divide_are_resized_and_back() -> None:
    """[2.14] Shape and range stay; a single colour stays as it is."""
    x = torch.rand(2, 3, 9, 7, generator=torch.Generator().manual_seed(0))
    after = deyo().destroyed(x, Segments([2]), draws(1))
    assert after.shape == x.shape
    assert x.amin() <= after.amin() <= after.amax() <= x.amax()
    assert not torch.allclose(after, x)
    torch.testing.assert_close(
        deyo().destroyed(torch.full_like(x, 0.3), Segments([2]), draws(1)), torch.full_like(x, 0.3)
    )


def test_pixels_move_alike_in_all_images_of_a_stream() -> None:
    """[2.14] One order of pixels, channels together; another for another stream."""
    x = torch.arange(64.0).view(8, 8).repeat(4, 3, 1, 1)
    after = deyo(destroy="pixel").destroyed(x, Segments([2, 2]), draws(2))
    for image in after:
        assert sorted(image[0].flatten().tolist()) == list(range(64))
        assert torch.equal(image[0], image[1])
    assert torch.equal(after[0], after[1])
    assert torch.equal(after[2], after[3])
    assert not torch.equal(after[0], after[2])


def test_occlusion_paints_the_middle() -> None:
    """[2.14] In each channel's mean, half as high and wide as the image; the rest stays."""
    x = torch.rand(2, 3, 8, 6, generator=torch.Generator().manual_seed(0))
    after = deyo(destroy="occlusion").destroyed(x, Segments([2]), draws(1))
    middle = torch.zeros(8, 6, dtype=torch.bool)
    middle[2:6, 1:4] = True
    assert torch.equal(after[..., ~middle], x[..., ~middle])
    torch.testing.assert_close(after[..., middle], x.mean((2, 3)).unsqueeze(-1).expand(2, 3, 12))


@pytest.mark.parametrize(("kind", "patch_len"), [("mlp-bn", 1), ("conv-bn", 7)])
def test_refuses_what_it_cannot_cut(kind: str, patch_len: int) -> None:
    """[2.14] Inputs that are no images, or images with fewer pixels than blocks."""
    with pytest.raises(ValueError, match="images"):
        deyo(patch_len=patch_len).init(subject(kind).source)
