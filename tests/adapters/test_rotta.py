"""What RoTTA's paper promises, checked without reference code. Numbers in brackets are sections of the project's
algorithm notes."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters.base import Policy, State
from adapters.cstu import Memory
from tests.adapters.networks import (
    CLASSES,
    SHAPES,
    Case,
    Server,
    Subject,
    assert_same,
    flat,
    run,
    subject,
    with_weights,
)
from tta_server.errors import BadInput
from tta_server.policies import make_policy

every_net = pytest.mark.parametrize("kind", ["image-bn", "image-gn"])
QUICK = {"capacity": 6, "update_every": 5, "nu": 0.3, "alpha": 0.3, "lr": 0.05}


def rotta(**settings: Any) -> Policy:
    return make_policy("rotta", QUICK | settings)


def stream(policy: Policy, network: Subject, x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, State, float]:
    """One stream's rows ``x``, sent as requests of these sizes: all logits, the last state, the number of updates.

    Every request draws as the first one, so that draws do not go by how rows are cut into requests.
    """
    state, logits, updates = network.init(policy), [], 0.0
    assert sum(sizes) == len(x)
    for part in x.split(list(sizes)):
        outcome = run(policy, network, [state], [part])
        state = outcome.states[0]
        logits.append(outcome.logits[0])
        updates += outcome.signals[0]["updates"]
    return torch.cat(logits), state, updates


def rows(network: Subject, count: int, seed: int = 0) -> Tensor:
    """Rows of many classes that come as 8-bit images do."""
    x = torch.cat([network.rows(100 * seed + one, 1) for one in range(count)])
    return (255 * x).round() / 255


def plain(network: Subject, x: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(network.plain(x))


# --- the memory --------------------------------------------------------------------------------------------------


def memory(capacity: int, classes: int, lambda_t: float = 1.0, lambda_u: float = 1.0) -> Memory:
    return Memory(capacity, classes, lambda_t, lambda_u, [-1] * capacity, [0.0] * capacity, [0] * capacity)


def score(held: Memory, age: int, uncertainty: float) -> float:
    return held.lambda_t / (1 + math.exp(-age / held.capacity)) + held.lambda_u * uncertainty / math.log(held.classes)


@pytest.mark.parametrize(("capacity", "classes"), [(64, 10), (6, 5), (5, 5), (3, 5), (1, 2), (8, 2)])
@pytest.mark.parametrize("seed", range(3))
def test_memory_keeps_its_bounds(capacity: int, classes: int, seed: int) -> None:
    """[6.9] At most N items and ceil(N / C) of a class; ages grow by one per offer; a place changes hands only for a
    strictly lower score."""
    draw, held, replaced = random.Random(seed), memory(capacity, classes), 0
    for _ in range(400):
        # Now and then a run of one class, as in a correlated stream.
        label = draw.randrange(classes) if draw.random() < 0.5 else 0
        uncertainty = draw.random() * math.log(classes)
        before = copy.deepcopy(held)
        place = held.offer(label, uncertainty)
        assert len(held.places()) <= capacity
        assert max(Counter(held.labels[one] for one in held.places()).values()) <= math.ceil(capacity / classes)
        for one in held.places():
            assert held.age[one] == (1 if one == place else before.age[one] + 1)
            if one != place:
                assert (held.labels[one], held.uncertainty[one]) == (before.labels[one], before.uncertainty[one])
        if place is not None and before.labels[place] >= 0:
            replaced += 1
            assert score(held, before.age[place], before.uncertainty[place]) > score(held, 0, uncertainty)
        assert all(0 < weight <= 0.5 for weight in held.weights())
    assert replaced > 20


def test_memory_fills_while_there_is_room() -> None:
    """[2.9] Classes below their quota, which is a real number: 6 places of 5 classes take two of a class (1 < 1.2)."""
    held = memory(6, 5)
    assert [held.offer(label, 0.1) for label in (0, 0, 1, 1, 2)] == [0, 1, 2, 3, 4]
    assert held.offer(0, 1.6) is None  # at its quota, and too uncertain for its own class
    assert held.offer(3, 1.6) == 5  # the last place
    assert held.labels == [0, 0, 1, 1, 2, 3]


def test_memory_at_the_quota_replaces_within_the_class() -> None:
    """[2.9] The highest score of its own class gives way, though another class has a higher one."""
    held = memory(6, 5)
    held.offer(0, 0.3)
    held.offer(0, 0.9)
    held.offer(1, 1.6)
    assert held.offer(0, 0.2) == 1
    assert held.labels == [0, 0, 1, -1, -1, -1]
    assert held.uncertainty[:3] == [0.3, 0.2, 1.6]
    assert held.age[:3] == [4, 1, 2]


def test_full_memory_replaces_in_the_largest_classes() -> None:
    """[2.9] Below its quota, with no room: the highest score among all classes with the largest population."""
    held = memory(6, 5)
    for label, uncertainty in ((0, 0.4), (0, 0.1), (1, 0.9), (1, 0.1), (2, 1.6), (3, 1.5)):
        assert held.offer(label, uncertainty) is not None
    assert held.offer(4, 0.1) == 2  # the most uncertain of classes 0 and 1, not that of 2 or 3
    assert held.labels == [0, 0, 4, 1, 2, 3]
    assert held.offer(1, 0.1) == 0  # now of class 0 alone: 1 is below its quota
    assert held.labels == [1, 0, 4, 1, 2, 3]


def test_memory_replaces_only_for_a_strictly_lower_score() -> None:
    """[6.9] Without the age term an equal uncertainty is no reason, and a lower one is."""
    held = memory(1, 2, lambda_t=0.0)
    assert held.offer(0, 0.4) == 0
    assert held.offer(0, 0.4) is None
    assert held.offer(1, 0.5) is None
    assert held.age == [3]
    assert held.offer(0, 0.3999) == 0
    assert held.age == [1]


def test_memory_of_equal_items_gives_the_later_up() -> None:
    """[2.9] Ties between equal maxima take the later item, wherever it lies."""
    held = memory(4, 2, lambda_t=0.0)
    for uncertainty in (0.5, 0.5):
        held.offer(0, uncertainty)
    assert held.offer(0, 0.3) == 1
    held = memory(4, 2, lambda_t=0.0)
    held.offer(0, 0.6)
    held.offer(0, 0.4)
    held.offer(0, 0.4)  # in the first place, but later than the second
    assert held.age[:2] == [1, 2]
    assert held.offer(0, 0.3) == 0


def test_old_items_give_way_to_fresh_ones() -> None:
    """[2.9] At equal uncertainty age decides: the oldest goes."""
    held = memory(2, 2)
    for label in (0, 1, 0, 1, 0):
        assert held.offer(label, 0.3) == label
    assert held.age == [1, 2]


def test_memory_of_many_classes_holds_one_of_each() -> None:
    """[2.9] With C >= N the quota is at most 1 and a full memory is searched whole."""
    held = memory(3, 5)
    for label, uncertainty in ((0, 0.2), (1, 0.9), (2, 0.3)):
        held.offer(label, uncertainty)
    assert held.offer(0, 0.9) is None
    assert held.offer(3, 0.1) == 1
    assert held.labels == [0, 3, 2]


def test_weights_are_half_when_fresh() -> None:
    """[2.9] 0.5 for an item of no age, 0.27 at age N, and nothing worse than 0 for one of any age."""
    held = Memory(4, 2, 1.0, 1.0, [0, 1, -1, 0], [0.0] * 4, [0, 4, 9, 10**9])
    assert held.weights() == [0.5, pytest.approx(0.2689, abs=1e-4), 0.0]
    assert held.offer(0, 0.1) == 3


# --- the policy --------------------------------------------------------------------------------------------------


@every_net
def test_answers_are_the_source_s_until_the_first_update(kind: str) -> None:
    """[6.9] The first rows are answered as by the source, whatever their number in a request; the next are not."""
    network, policy = subject(kind), rotta(update_every=12)
    x = rows(network, 20)
    logits, _, _ = stream(policy, network, x, (5, 1, 6, 8))
    torch.testing.assert_close(logits[:12], plain(network, x[:12]), rtol=1e-10, atol=1e-11)
    assert (logits[12:] - plain(network, x[12:])).abs().max() > 0.01


@every_net
def test_requests_may_be_cut_anywhere_between_updates(kind: str) -> None:
    """[6.9] The same rows in the same order, cut at every update and anywhere else: the same answers and state."""
    network, policy = subject(kind), rotta()
    x = rows(network, 20)
    whole = stream(policy, network, x, (5, 5, 5, 5))
    assert (whole[0] - plain(network, x)).abs().max() > 0.01
    for sizes in ([1] * 20, [2, 3, 1, 1, 3, 4, 1, 5], [3, 2] * 4):
        parts = stream(policy, network, x, sizes)
        assert_same({"logits": parts[0]} | flat(parts[1]), {"logits": whole[0]} | flat(whole[1]))


@every_net
@pytest.mark.parametrize("update_every", [1, 3, 5, 30])
def test_updates_are_counted_in_rows(kind: str, update_every: int) -> None:
    """[6.9] As many updates as the rows divide into, however they come, also several in one request."""
    network, policy = subject(kind), rotta(update_every=update_every)
    x = rows(network, 23)
    for sizes in ([23], [1] * 23, [7, 2, 11, 3]):
        _, state, updates = stream(policy, network, x, sizes)
        assert updates == 23 // update_every
        assert int(state.memory["adam.step"]) == 23 // update_every
        assert int(state.memory["rotta.seen"]) == 23


@every_net
def test_a_request_is_answered_by_what_it_finds(kind: str) -> None:
    """[1.2] The teacher from before the request answers all of it, in evaluation mode, though updates fall into it."""
    network, policy = subject(kind), rotta()
    _, state, _ = stream(policy, network, rows(network, 13), (13,))
    x = rows(network, 12, seed=1)
    outcome = run(policy, network, [state], [x])
    assert outcome.signals[0]["updates"] == 3
    with torch.no_grad():
        expected = with_weights(network.plain, state.weights)(x)
    torch.testing.assert_close(outcome.logits[0], expected, rtol=1e-9, atol=1e-10)


@every_net
def test_without_alpha_and_nu_the_source_serves(kind: str) -> None:
    """[6.9] alpha = 0 freezes both networks' statistics, nu = 0 the teacher's scales and shifts; the student learns."""
    network, policy = subject(kind), rotta(alpha=0.0, nu=0.0)
    x = rows(network, 20)
    logits, state, _ = stream(policy, network, x, (7, 7, 6))
    fresh = network.init(policy)
    assert_same(state.weights, fresh.weights)
    torch.testing.assert_close(logits, plain(network, x), rtol=1e-10, atol=1e-11)
    for key in network.source.statistics:
        assert torch.equal(state.memory[f"student.{key}"], fresh.memory[f"student.{key}"]), key
    for key in network.source.affine:
        assert not torch.equal(state.memory[f"student.{key}"], fresh.memory[f"student.{key}"]), key


@every_net
@pytest.mark.parametrize("nu", [0.0, 0.25, 1.0])
def test_teacher_follows_the_student(kind: str, nu: float) -> None:
    """[6.9] ``teacher <- (1 - nu) teacher + nu student`` after each update: the source for 0, the student for 1. The
    running statistics are each network's own."""
    network, policy = subject(kind), rotta(nu=nu)
    state = network.init(policy)
    for step in range(4):
        before = state
        state = run(policy, network, [state], [rows(network, 5, seed=step)]).states[0]
        for key in network.source.affine:
            student, old = state.memory[f"student.{key}"], before.weights[key]
            torch.testing.assert_close(state.weights[key], (1 - nu) * old + nu * student, rtol=1e-12, atol=1e-14)
            if nu in (0, 1):
                assert torch.equal(state.weights[key], student if nu else old)
        for key in network.source.statistics:
            assert not torch.equal(state.weights[key], before.weights[key])
            assert not torch.allclose(state.weights[key], state.memory[f"student.{key}"], rtol=1e-4), key


def test_running_statistics_are_the_memory_s() -> None:
    """[2.9] The teacher's move by ``alpha`` to the mean and biased variance of the items, which are the rows here."""
    network, policy = subject("image-bn"), rotta(capacity=50, alpha=0.25)
    x = rows(network, 5)
    _, state, _ = stream(policy, network, x, (3, 2))
    assert isinstance(network.plain, nn.Sequential)
    with torch.no_grad():
        by_channel = network.plain[0](x).transpose(0, 1).flatten(1)
    for key, of_items in (
        ("1.running_mean", by_channel.mean(1)),
        ("1.running_var", by_channel.var(1, correction=0)),
    ):
        expected = 0.75 * network.source.weights[key] + 0.25 * of_items
        # To float32: that is how stored images are read back.
        torch.testing.assert_close(state.weights[key][0], expected, rtol=1e-6, atol=1e-7)


@every_net
def test_without_learning_rate_only_statistics_move(kind: str) -> None:
    """[6.1.4] lr = 0: scales and shifts of student and teacher stay the source's."""
    network, policy = subject(kind), rotta(lr=0.0)
    _, state, updates = stream(policy, network, rows(network, 15), (15,))
    fresh = network.init(policy)
    assert updates == 3
    for key in network.source.affine:
        assert torch.equal(state.weights[key], fresh.weights[key]), key
        assert torch.equal(state.memory[f"student.{key}"], fresh.memory[f"student.{key}"]), key


@every_net
def test_the_memory_holds_the_rows_as_8_bit_images(kind: str) -> None:
    """[7.8] What it keeps of the user: rows that came, in as many places as there are labels, and zeros elsewhere."""
    network, policy = subject(kind), rotta(capacity=50)
    x = rows(network, 9)
    logits, state, _ = stream(policy, network, x, (4, 5))
    images, labels = state.memory["rotta.images"][0], state.memory["rotta.labels"][0]
    assert images.dtype == torch.uint8
    assert torch.equal(images[:9].double() / 255, x)
    assert torch.equal(labels[:4], logits[:4].argmax(1))
    assert not images[9:].any()
    assert (labels[9:] == -1).all()
    assert state.memory["rotta.age"][0, :9].tolist() == list(range(9, 0, -1))


@every_net
def test_one_class_fills_its_quota_only(kind: str) -> None:
    """[2.9] The pitfall: a stream of one class learns from ceil(N / C) images."""
    network, policy = subject(kind), rotta(capacity=11)
    x = rows(network, 1).expand(12, -1, -1, -1)
    outcome = run(policy, network, [network.init(policy)], [x])
    assert outcome.signals[0]["items"] == math.ceil(11 / CLASSES)
    assert outcome.signals[0]["updates"] == 2


@every_net
def test_company_changes_no_bit(kind: str) -> None:
    """[6.1.1] Streams that update together, at different points of their requests and on memories of different sizes,
    get what each gets alone, to the last bit."""
    network, policy = subject(kind), rotta()
    case = Case(policy, network, "company")
    sizes = (7, 1, 12, 4)
    merged, alone = case.init(4), case.init(4)
    keys = list(range(50, 54))
    for step in range(4):
        inputs = case.inputs(3, step, sizes)
        together = run(policy, network, merged, inputs, keys, [step] * 4)
        for index, x in enumerate(inputs):
            own = run(policy, network, [alone[index]], [x], [keys[index]], [step])
            assert_same({"logits": together.logits[index]}, {"logits": own.logits[0]})
            assert_same(flat(together.states[index]), flat(own.states[0]))
            assert together.signals[index] == own.signals[0]
            alone[index] = own.states[0]
        merged = together.states


@every_net
def test_streams_without_an_update_learn_nothing(kind: str) -> None:
    """A stream that is not due keeps every weight and moment, while its neighbour updates."""
    network, policy = subject(kind), rotta()
    fresh = network.init(policy)
    outcome = run(policy, network, [fresh, fresh], [rows(network, 4), rows(network, 6)])
    assert [one["updates"] for one in outcome.signals] == [0, 1]
    assert outcome.signals[0]["loss"] == 0 < outcome.signals[1]["loss"]
    idle = outcome.states[0]
    assert_same(idle.weights, fresh.weights)
    for key, value in fresh.memory.items():
        if not key.startswith("rotta."):
            assert torch.equal(idle.memory[key], value), key


@every_net
def test_loss_is_the_weighted_cross_entropy_to_the_teacher(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """[2.9] Without augmentation a student that is still its teacher has a loss of the teacher's entropies, each by the
    weight of its age; no gradient beyond rounding; and with augmentation a greater loss."""
    network, policy = subject(kind), rotta(capacity=50, alpha=0.0)
    x, fresh = rows(network, 5), network.init(policy)
    entropies = torch.special.entr(plain(network, x).softmax(1)).sum(1).tolist()
    least = sum(entropy / (1 + math.exp(age / 50)) / 5 for entropy, age in zip(entropies, range(5, 0, -1), strict=True))
    assert run(policy, network, [fresh], [x]).signals[0]["loss"] > least * 1.001
    monkeypatch.setattr("adapters.rotta.augment", lambda x, *_: x)
    outcome = run(policy, network, [fresh], [x])
    assert outcome.signals[0]["loss"] == pytest.approx(least, rel=1e-6)
    for key in network.source.affine:
        assert outcome.states[0].memory[f"adam.m.{key}"].abs().max() < 1e-12


def test_shows_itself_after_default_updates() -> None:
    """The published settings do something, too: statistics move after 64 rows, sent one by one."""
    network, policy = subject("image-bn"), make_policy("rotta", {})
    server = Server(policy, network)
    x = rows(network, 66)
    for row in x[:64]:
        torch.testing.assert_close(
            server.logits({"a": row[None]})["a"], plain(network, row[None]), rtol=1e-9, atol=1e-9
        )
    assert (server.logits({"a": x[64:]})["a"] - plain(network, x[64:])).abs().max() > 1e-3


@pytest.mark.parametrize("kind", SHAPES)
def test_refuses_inputs_it_cannot_augment(kind: str) -> None:
    """Vectors, and images of no known range."""
    with pytest.raises(ValueError, match="augmentation"):
        make_policy("rotta", {}).init(subject(kind).source)


def test_refuses_a_network_without_norm_layers() -> None:
    """There would be nothing to adapt."""
    without = dataclasses.replace(subject("image-gn").source, affine=(), statistics=())
    with pytest.raises(ValueError, match="norm layers"):
        make_policy("rotta", {}).init(without)


def test_takes_no_window() -> None:
    """[1.3] Requests of one row are sound as they are."""
    with pytest.raises(ValueError, match="no window"):
        subject("image-bn").init(rotta(window=8))


@pytest.mark.parametrize(
    "settings",
    [{"capacity": 0}, {"update_every": 0}, {"lr": -0.1}, {"alpha": 1.5}, {"nu": -0.5}, {"lambda_t": -1.0}],
)
def test_settings_outside_their_range_are_refused(settings: dict[str, float]) -> None:
    """By the policy itself, naming the setting."""
    with pytest.raises(BadInput, match=next(iter(settings))):
        rotta(**settings)


def test_degenerate_rows_leave_no_nan() -> None:
    """[6.1.6] Identical and empty images, with updates among them."""
    network = subject("image-bn")
    for x in (
        torch.zeros(11, 3, 8, 8).double(),
        torch.ones(11, 3, 8, 8).double(),
        rows(network, 1).expand(11, 3, 8, 8),
    ):
        _, state, updates = stream(rotta(), network, x, (6, 5))
        assert updates == 2
        assert all(value.isfinite().all() for value in flat(state).values())
