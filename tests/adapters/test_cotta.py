"""What the paper promises of ``cotta``, and what its family has in common: section 6.5 of the algorithm notes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import adapters.teacher
from adapters import serving, teacher
from adapters.augment import augment
from adapters.base import BATCH_NORM, Batch, Norm, Output, Scope, Segments, State
from adapters.cotta import Cotta
from tests.adapters.networks import (
    SHAPES,
    Subject,
    assert_close,
    assert_same,
    drive,
    flat,
    join,
    make_batch,
    run,
    subject,
    take,
)
from tta_server.errors import BadInput
from tta_server.policies import make_policy, settings_of

STEADY: dict[str, Any] = {"lr": 0.01, "loss": "symmetric", "threshold": 0.0, "teacher_momentum": 0.6, "restore": 0.0}
"""Large steps, no augmentation, nothing restored."""
every_net = pytest.mark.parametrize("kind", SHAPES)


def cotta(**settings: Any) -> Cotta:
    policy = make_policy("cotta", STEADY | settings)
    assert isinstance(policy, Cotta)
    return policy


def one(policy: Cotta, network: Subject, state: State, seed: int, rows: int = 4) -> tuple[Tensor, State]:
    """One step of a single stream: logits and new state."""
    outcome = run(policy, network, [state], [network.rows(seed, rows)], steps=[seed])
    return outcome.logits[0], outcome.states[0]


def warm(network: Subject, policy: Cotta | None = None) -> State:
    """A stream's state with student, teacher and source all apart."""
    policy = policy or cotta(restore=0.0)
    state = network.init(policy)
    for seed in (90, 91):
        state = one(policy, network, state, seed)[1]
    return state


class Counted:
    """A subject's network that keeps whose rows it was given: one list of sizes per forward pass."""

    def __init__(self, network: Subject) -> None:
        self._network, self.sizes = network, list[list[int]]()

    def __call__(self, weights: Mapping[str, Tensor], x: Tensor, segments: Segments, norm: Norm) -> Output:
        assert norm == BATCH_NORM
        self.sizes.append(segments.sizes)
        return self._network.network(weights, x, segments, norm)


def counted(policy: Cotta, network: Subject, inputs: list[Tensor]) -> tuple[Counted, Batch]:
    counter = Counted(network)
    return counter, dataclasses.replace(make_batch(policy, network, inputs), network=counter)


# --- the teacher ---------------------------------------------------------------------------------------------------


@every_net
def test_teacher_is_the_moving_average_of_stepped_students(kind: str) -> None:
    """[6.5] ``theta' <- m theta' + (1 - m) theta`` in every step, where theta is from before the restoration."""
    network = subject(kind)
    policy, recorder = cotta(restore=0.3), cotta(restore=0.0)
    state = network.init(policy)
    for seed in range(5):
        stepped = one(recorder, network, state, seed)[1].weights
        before, state = teacher.weights(state.memory), one(policy, network, state, seed)[1]
        assert_close(
            teacher.weights(state.memory),
            {key: 0.6 * value + 0.4 * stepped[key] for key, value in before.items()},
            rtol=1e-12,
            atol=1e-14,
        )


@every_net
def test_teacher_without_momentum_is_the_stepped_student(kind: str) -> None:
    """[6.5] ``m = 0``: bit for bit the student from before the restoration."""
    network = subject(kind)
    state = warm(network)
    stepped = one(cotta(restore=0.0), network, state, 3)[1].weights
    after = one(cotta(restore=0.5, teacher_momentum=0.0), network, state, 3)[1]
    assert_same(teacher.weights(after.memory), stepped)
    assert any((after.weights[key] != value).any() for key, value in stepped.items())


@every_net
def test_teacher_of_full_momentum_is_the_source(kind: str) -> None:
    """[6.5] ``m = 1`` and no restoration: the teacher is the source for ever, and so are the answers."""
    network, policy = subject(kind), cotta(teacher_momentum=1.0)
    state = network.init(policy)
    for seed in range(4):
        logits, state = one(policy, network, state, seed)
        assert_same(teacher.weights(state.memory), network.source.spread(network.source.parameters, 1))
        x = network.rows(seed, 4)
        torch.testing.assert_close(logits, make_batch(policy, network, [x]).forward({}, x).logits)
    assert all((value != network.source.weights[key]).any() for key, value in state.weights.items())


def test_teacher_follows_active_streams_alone() -> None:
    """The others keep theirs, bit for bit, even where the student is not a number."""
    old = {"a": torch.randn(3, 2), "b": torch.randn(3, 4, 5)}
    student = {key: value + 1 for key, value in old.items()}
    student["a"][1] = torch.nan
    memory = teacher.start(old) | {"adam.step": torch.zeros(3)}
    active = torch.tensor([True, False, True])
    moved = teacher.follow(memory, student, 0.5, active)
    assert moved.keys() == {"teacher.a", "teacher.b"}
    for key, value in teacher.weights(moved).items():
        assert torch.equal(value[1], old[key][1])
        torch.testing.assert_close(value[0::2], old[key][0::2] + 0.5)


@every_net
def test_answers_are_the_teachers_before_the_step(kind: str) -> None:
    """[6.1.9] A forward pass with the teacher kept after the last request; also between the steps of a window."""
    network, policy = subject(kind), cotta(restore=0.1)
    state = warm(network, policy)
    x = network.rows(5, 4)
    batch = make_batch(policy, network, [x])
    expected = batch.forward(teacher.weights(state.memory), x).logits
    assert not torch.allclose(expected, batch.forward(state.weights, x).logits)
    torch.testing.assert_close(run(policy, network, [state], [x]).logits[0], expected)
    assert torch.equal(policy.answer(state, batch), expected)


# --- restoration ---------------------------------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_full_restoration_keeps_the_source(kind: str, optimiser: str) -> None:
    """[6.5] ``p = 1``: the student is the source after every request, bit for bit; the teacher is not."""
    network, policy = subject(kind), cotta(restore=1.0, optimiser=optimiser)
    state = network.init(policy)
    source = network.source.spread(network.source.parameters, 1)
    for seed in range(3):
        stepped = one(cotta(restore=0.0, optimiser=optimiser), network, state, seed)[1].weights
        before, state = teacher.weights(state.memory), one(policy, network, state, seed)[1]
        assert_same(state.weights, source)
        for key, value in teacher.weights(state.memory).items():
            torch.testing.assert_close(value, 0.6 * before[key] + 0.4 * stepped[key])
    assert any((value != source[key]).any() for key, value in teacher.weights(state.memory).items())


def test_restoration_takes_its_share() -> None:
    """[6.5] Elements are the stepped student's or the source's, a share ``p`` of them, other ones for each stream and
    request; moments and teacher are not touched."""
    network, share = subject("conv-bn"), 0.3
    states, xs = [warm(network)] * 3, [network.rows(7, 4)] * 3
    stepped = run(cotta(restore=0.0), network, states, xs)
    masks = []
    for step in (0, 1):
        restored = run(cotta(restore=share), network, states, xs, steps=[step] * 3)
        for before, after in zip(stepped.states, restored.states, strict=True):
            assert_same(before.memory, after.memory)
            chosen = {key: after.weights[key] != value for key, value in before.weights.items()}
            for key, mask in chosen.items():
                assert torch.equal(after.weights[key][mask][None], network.source.weights[key][mask[0]][None])
            masks.append(torch.cat([mask.flatten() for mask in chosen.values()]))
    count = len(masks[0])
    deviation = (share * (1 - share) / count) ** 0.5
    for mask in masks:
        assert abs(float(mask.double().mean()) - share) < 4 * deviation
    assert len({tuple(mask.tolist()) for mask in masks}) == 6


# --- when augmentations are asked ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "asks", "augmented"),
    [(0.0, False, False), (0.01, True, False), (1.0, True, True), (1.01, False, True)],
)
def test_no_forward_pass_is_for_nothing(threshold: float, asks: bool, augmented: bool) -> None:
    """[6.5] Teacher and student when sure, an anchor only where the threshold needs it, the augmentations, several in a
    pass, only when unsure; and the answer waits for none of the student's."""
    network, policy = subject("image-bn"), cotta(threshold=threshold, augmentations=3)
    counter, batch = counted(policy, network, [network.rows(0, 4), network.rows(1, 2)])
    running = serving.step(policy, network.source, join([network.init(policy)] * 2), batch)
    next(running)
    before = [[4, 2]] * asks + [[4, 4, 4, 2, 2, 2] if augmented else [4, 2]]
    assert counter.sizes == before
    with pytest.raises(StopIteration) as end:
        next(running)
    assert counter.sizes == [*before, [4, 2]]
    assert end.value.value.signals["augmented"].tolist() == [float(augmented)] * 2


def mixed(network: Subject) -> tuple[list[Tensor], list[float], float]:
    """Requests of four streams, the source's mean confidence in each, and a threshold between them."""
    xs = [network.rows(seed, rows) for seed, rows in ((0, 3), (1, 5), (2, 1), (3, 4))]
    policy = cotta()
    confidence = [float(make_batch(policy, network, [x]).forward({}, x).logits.softmax(1).amax(1).mean()) for x in xs]
    return xs, confidence, sum(sorted(confidence)[1:3]) / 2


@pytest.mark.parametrize("kind", ["image-bn", "image-gn"])
@pytest.mark.parametrize("scope", ["norm", "all"])
def test_only_unsure_streams_are_augmented(kind: str, scope: str) -> None:
    """[2.5] The mean confidence of a stream's own request decides; the answer of an unsure one is the mean of the
    teacher's logits over its augmentations, of a sure one the teacher's on the request as it is."""
    network = subject(kind)
    xs, confidence, threshold = mixed(network)
    policy = cotta(threshold=threshold, augmentations=3, scope=scope)
    states = [warm(network, cotta(scope=scope))] * 4
    counter, batch = counted(policy, network, xs)
    logits, step = drive(policy, network, join(states), batch)
    unsure = [one < threshold for one in confidence]
    assert step.signals["augmented"].tolist() == [float(one) for one in unsure]
    sizes = batch.segments.sizes
    sure_rows = [0 if one else size for one, size in zip(unsure, sizes, strict=True)]
    unsure_rows = [size if one else 0 for one, size in zip(unsure, sizes, strict=True)]
    assert counter.sizes == [sizes, sure_rows, [size for size in unsure_rows for _ in range(3)], sizes]

    for index, answer in enumerate(logits.split(sizes)):
        x, alone = xs[index], make_batch(policy, network, [xs[index]])
        random = batch.random.among([index])
        weights = teacher.weights(states[index].memory)
        views = [x]
        if unsure[index]:
            views = [augment(x, alone.segments, network.source, random.named(f"augment {k}")) for k in range(3)]
        expected = torch.stack([alone.forward(weights, view).logits for view in views]).mean(0)
        torch.testing.assert_close(answer, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["image-bn", "image-gn"])
@pytest.mark.parametrize("scope", ["norm", "all"])
def test_views_at_once_are_views_one_by_one(kind: str, scope: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit the same answers, however many views of a stream there is room for at once."""
    network = subject(kind)
    xs, _, threshold = mixed(network)
    policy = cotta(threshold=threshold, augmentations=5, scope=scope)
    state = join([warm(network, cotta(scope=scope))] * 4)
    answers = []
    for views in (1, 2, 5):
        monkeypatch.setattr(adapters.teacher, "_ROOM", views * 5 * xs[0][0].numel())
        answers.append(drive(policy, network, state, make_batch(policy, network, xs))[0])
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


def test_company_does_not_change_who_is_augmented() -> None:
    """[6.1.10] Sure and unsure streams in one batch get what they get alone, bit for bit."""
    network = subject("image-bn")
    xs, _, threshold = mixed(network)
    policy = cotta(threshold=threshold, augmentations=2, optimiser="sgd", restore=0.1)
    states = [warm(network, policy)] * 4
    together = run(policy, network, states, xs, keys=[1, 2, 3, 4])
    for index, x in enumerate(xs):
        alone = run(policy, network, [states[index]], [x], keys=[index + 1])
        assert_same({"logits": together.logits[index]}, {"logits": alone.logits[0]})
        assert_same(flat(together.states[index]), flat(alone.states[0]))
        assert together.signals[index] == alone.signals[0]


def test_augmentation_that_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """[6.5] One augmentation by the identity is the branch without."""
    network = subject("image-bn")
    monkeypatch.setattr(adapters.teacher, "augment", lambda x, *_: x)
    state, x = warm(network), network.rows(4, 5)
    plain, always = (
        run(cotta(threshold=threshold, augmentations=1), network, [state], [x]) for threshold in (0.0, 2.0)
    )
    assert_same({"logits": plain.logits[0]}, {"logits": always.logits[0]})
    assert_same(flat(plain.states[0]), flat(always.states[0]))


# --- the student -----------------------------------------------------------------------------------------------------


@every_net
def test_first_step_without_augmentation_goes_nowhere(kind: str) -> None:
    """[6.5] While student and teacher are the same, the one-directional loss is flat. (Adam would divide rounding noise
    by its own size.)"""
    network, policy = subject(kind), cotta(optimiser="sgd", lr=1.0, loss="paper")
    start = network.init(policy)
    after = one(policy, network, start, 0)[1]
    assert_close(flat(after), flat(start), rtol=0, atol=1e-13)
    symmetric = one(cotta(optimiser="sgd", lr=1.0), network, start, 0)[1]
    assert any((value - start.weights[key]).abs().max() > 1e-3 for key, value in symmetric.weights.items())


@every_net
@pytest.mark.parametrize("optimiser", ["adam", "sgd"])
def test_without_learning_rate_nothing_is_learned(kind: str, optimiser: str) -> None:
    """[6.1.4] ``lr = 0``: student and teacher stay at the source, restored or not."""
    network, policy = subject(kind), cotta(lr=0.0, optimiser=optimiser, restore=0.5)
    state = network.init(policy)
    for seed in range(3):
        state = one(policy, network, state, seed)[1]
    source = network.source.spread(network.source.parameters, 1)
    assert_same(state.weights, source)
    assert_same(teacher.weights(state.memory), source)


@pytest.mark.parametrize("name", ["cotta", "petal"])
@every_net
def test_scope_says_what_is_adapted(name: str, kind: str) -> None:
    """All floating-point parameters, or the norm layers' scales and shifts; four copies of it with Adam, three with
    momentum."""
    network = subject(kind)
    for scope, keys in (("all", network.source.parameters), ("norm", network.source.affine)):
        for optimiser, copies in (("adam", 4), ("sgd", 3)):
            policy = make_policy(name, STEADY | {"scope": scope, "optimiser": optimiser})
            state = network.init(policy)
            assert policy.scope is Scope(scope)
            assert state.weights.keys() == set(keys)
            size = sum(value.numel() for value in state.weights.values())
            held = {key: value for key, value in flat(state).items() if key != "memory/adam.step"}
            assert sum(value.numel() for value in held.values()) == copies * size
            after = run(policy, network, [state], [network.rows(0, 6)]).states[0]
            # The last ones before a batch norm cancel in it, and have no gradient but rounding.
            assert sum(bool((value != state.weights[key]).any()) for key, value in after.weights.items()) > 3


@pytest.mark.parametrize("name", ["cotta", "petal"])
def test_settings_that_cannot_be(name: str) -> None:
    """Scope none adapts nothing; shares are shares; there is at least one augmentation. All by name."""
    for settings, said in (
        ({"scope": "none"}, "scope must be"),
        ({"scope": "some"}, "scope"),
        ({"restore": 1.5}, "restore"),
        ({"teacher_momentum": -0.1}, "teacher_momentum"),
        ({"augmentations": 0}, "augmentations"),
        ({"window": -1}, "window"),
    ):
        with pytest.raises(BadInput, match=said):
            make_policy(name, settings)
    policy = make_policy(name, {"scope": "norm"})
    assert make_policy(name, settings_of(policy)) == policy


@pytest.mark.parametrize("name", ["cotta", "petal"])
def test_inputs_that_cannot_be_augmented(name: str) -> None:
    """Refused where augmentation can happen, and only there."""
    network = subject("conv-bn")
    with pytest.raises(ValueError, match="range"):
        make_policy(name, {}).init(network.source)
    make_policy(name, {"threshold": 0.0}).init(network.source)
    make_policy(name, {}).init(subject("image-bn").source)


@pytest.mark.parametrize("name", ["cotta", "petal"])
def test_nothing_to_adapt(name: str) -> None:
    """A model without norm layers has nothing in their scope."""
    source = dataclasses.replace(subject("conv-gn").source, affine=())
    with pytest.raises(ValueError, match="nothing to adapt"):
        make_policy(name, {"scope": "norm", "threshold": 0.0}).init(source)


def test_a_window_answers_by_the_teacher() -> None:
    """Between two steps, with moving statistics, from the teacher's weights: the student's have no say."""
    network, policy = subject("image-bn"), cotta(window=8, window_images="exact", restore=0.1)
    state = serving.init(policy, network.source)
    for seed in range(3):
        state = run(policy, network, [state], [network.rows(seed, 8)], steps=[seed]).states[0]
    x = network.rows(9, 2)
    broken = State({key: torch.full_like(value, torch.nan) for key, value in state.weights.items()}, state.memory)
    expected, answered = (run(policy, network, [take(one, 0)], [x]).logits[0] for one in (state, broken))
    assert torch.equal(answered, expected)
    assert not torch.equal(expected, make_batch(policy, network, [x]).forward({}, x).logits)
