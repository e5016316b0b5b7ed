"""What RMT's paper promises, checked without reference code. Numbers in brackets are sections of the project's
algorithm notes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adapters import contrast, rmt
from adapters.base import BATCH_NORM, Norm, Output, Scope, Segments, State, Tensors
from tests.adapters.networks import (
    CLASSES,
    SHAPES,
    Case,
    Server,
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
    with_weights,
)
from tta_server.errors import BadInput
from tta_server.policies import make_policy

every_net = pytest.mark.parametrize("kind", ["image-bn", "image-gn"])
COLD = {"warm_up": False}
SGD = COLD | {"optimiser": "sgd", "momentum": 0.0}
REPLAY = 6
"""Source images in the artefacts."""


def policy_of(**settings: Any) -> rmt.Rmt:
    policy = make_policy("rmt", {"projection": 7} | settings)
    assert isinstance(policy, rmt.Rmt)
    return policy


def one(policy: rmt.Rmt, network: Subject, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    outcome = run(policy, network, [state or network.init(policy)], [x])
    return outcome.logits[0], outcome.states[0]


def passes(policy: rmt.Rmt, network: Subject, sizes: list[int], seed: int = 0) -> list[Tensor]:
    """What goes through the networks in one step, in order."""
    seen: list[Tensor] = []

    def watched(weights: Mapping[str, Tensor], x: Tensor, segments: Segments, norm: Norm) -> Output:
        assert segments.sizes == sizes
        assert norm == BATCH_NORM
        seen.append(x)
        return network.network(weights, x, segments, norm)

    xs = [network.rows(seed + index, size) for index, size in enumerate(sizes)]
    batch = make_batch(policy, network, xs, steps=[seed] * len(sizes))
    state = join([network.init(policy)] * len(sizes))
    drive(policy, network, state, dataclasses.replace(batch, network=watched))
    return seen


def by_the_batch(network: Subject, weights: Mapping[str, Tensor]) -> nn.Module:
    """The plain network with some weights put in, normalising by the batch."""
    changed = with_weights(network.plain, weights)
    for module in changed.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    return changed


def teacher_of(state: State) -> Tensors:
    return {key[8:]: value for key, value in state.memory.items() if key.startswith("teacher.")}


# --- the parts ---------------------------------------------------------------------------------------------------


def identity(features: int) -> Tensors:
    """A projector that leaves vectors without negative elements as they are."""
    eye, zero = torch.eye(features, dtype=torch.float64)[None], torch.zeros(1, features, dtype=torch.float64)
    named = {"0.weight": eye, "0.bias": zero, "2.weight": eye, "2.bias": zero}
    return {f"contrast.projector.{key}": value for key, value in named.items()}


def positive(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_contrast_is_at_least_ln_2(rows: int, temperature: float) -> None:
    """[6.6] Both positives of a vector are in its denominator."""
    for seed in range(5):
        projector = contrast.new_projector(subject("image-bn").source, 8)
        views = positive(3, rows, 6, seed=seed) - 0.5
        assert float(contrast.loss(views, projector, Segments([rows]), temperature)) >= math.log(2)


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_contrast_of_one_vector_is_the_logarithm_of_the_others(rows: int) -> None:
    """[6.6] ``ln(3B - 1)`` when all projected vectors coincide, at any temperature."""
    views = positive(6).expand(3, rows, 6)
    for temperature in (0.1, 2.0):
        found = contrast.loss(views, identity(6), Segments([rows]), temperature)
        assert float(found) == pytest.approx(math.log(3 * rows - 1), rel=1e-12)


def test_contrast_tells_rows_apart() -> None:
    """[2.6.4] Rows at right angles whose views agree: all but ``ln 2`` at a low temperature, by hand at a high one;
    views that agree with another row's instead cost more."""
    views = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    assert float(contrast.loss(views, identity(4), Segments([4]), 0.05)) == pytest.approx(math.log(2), abs=1e-6)
    by_hand = -math.log(math.e / (2 * math.e + 9))
    assert float(contrast.loss(views, identity(4), Segments([4]), 1.0)) == pytest.approx(by_hand, rel=1e-12)
    crossed = torch.stack([views[0], views[1], views[2].roll(1, 0)])
    assert float(contrast.loss(crossed, identity(4), Segments([4]), 1.0)) > by_hand + 0.1


def test_contrast_goes_by_angles() -> None:
    """[6.6] With an identical projector the lengths of the vectors do not count; with a real one they do."""
    views, factors = positive(3, 4, 6), 0.1 + 5 * positive(3, 4, 1, seed=1)
    segments = Segments([4])
    torch.testing.assert_close(
        contrast.loss(factors * views, identity(6), segments, 0.1), contrast.loss(views, identity(6), segments, 0.1)
    )
    real = contrast.new_projector(subject("image-bn").source, 8)
    assert not torch.allclose(
        contrast.loss(factors * views, real, segments, 0.1), contrast.loss(views, real, segments, 0.1)
    )


def test_contrast_is_each_stream_s_own() -> None:
    """Rows of other streams are no others to a vector, and each stream has its own projector."""
    views = positive(3, 6, 6)
    two = {key: torch.cat([value, value.flip(1)]) for key, value in identity(6).items()}
    merged = contrast.loss(views, two, Segments([2, 4]), 0.3)
    for stream, part in enumerate((views[:, :2], views[:, 2:])):
        own = {key: value[stream : stream + 1] for key, value in two.items()}
        alone = contrast.loss(part, own, Segments([part.shape[1]]), 0.3)
        assert_same({"loss": merged[stream]}, {"loss": alone[0]})


def test_nearest_of_a_prototype_is_itself() -> None:
    """[6.6] And of any multiple of it, without gradient."""
    source = subject("image-bn").source
    mean = source.artefacts["prototypes/mean"]
    features = (mean[:-1] * torch.tensor([[1.0], [20.0], [1e-3], [3.0]])).requires_grad_()
    found = contrast.nearest_prototypes(source, features)
    assert_same({"nearest": found}, {"nearest": mean[:-1]})
    assert not found.requires_grad


@pytest.mark.parametrize("gap", [None, math.nan, 0.0])
def test_class_without_images_is_never_the_nearest(gap: float | None) -> None:
    """[2.6] Whatever stands where its mean would be: for vectors right at it, for others, for zeros."""
    source = subject("image-bn").source
    mean = source.artefacts["prototypes/mean"].clone()
    at_it = mean[-1:].clone()
    if gap is not None:
        mean[-1] = gap
    source = dataclasses.replace(source, artefacts={**source.artefacts, "prototypes/mean": mean})
    features = torch.cat([at_it, positive(5, 6) - 0.5, torch.zeros(1, 6, dtype=torch.float64)])
    found = contrast.nearest_prototypes(source, features)
    assert found.isfinite().all()
    assert all((row == mean[:-1]).all(1).any() for row in found)
    cosine = torch.cosine_similarity(features[:, None], mean[None, :-1], dim=2)
    assert_same({"nearest": found[:-1]}, {"nearest": mean[cosine.argmax(1)][:-1]})


def test_projector_starts_as_torch_s_linear_layers() -> None:
    """[2.6] Uniform within ``+- 1 / sqrt(inputs)``, and the same for every stream."""
    source = subject("image-bn").source
    drawn = contrast.new_projector(source, 128)
    reference = nn.Sequential(nn.Linear(6, 128), nn.ReLU(), nn.Linear(128, 128))
    named = {f"contrast.projector.{key}": value for key, value in reference.named_parameters()}
    assert drawn.keys() == named.keys()
    for key, value in drawn.items():
        bound = 1 / math.sqrt(6 if ".0." in key else 128)
        assert value.shape[1:] == named[key].shape
        assert value.is_contiguous()
        assert value.abs().max() <= bound
        assert float(value.std()) == pytest.approx(bound / math.sqrt(3), rel=0.15)
        assert value.unique().numel() == value.numel()
    assert_same(contrast.new_projector(source, 128), drawn)


# --- the policy --------------------------------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("settings", [COLD, {}, {"scope": "norm"}], ids=["cold", "warm", "norm"])
def test_without_losses_nothing_changes(kind: str, settings: dict[str, Any]) -> None:
    """[6.6] All weights 0: every bit of the state stays, and only what answers is computed."""
    policy = policy_of(lambda_target=0, lambda_contrast=0, lambda_source=0, **settings)
    network = subject(kind)
    fresh = state = network.init(policy)
    for step in range(2):
        _, state = one(policy, network, network.rows(step, 4), state)
        assert_same(flat(state), flat(fresh))
    assert len(passes(policy, network, [4])) == 2


@every_net
@pytest.mark.parametrize(
    ("off", "count", "groups"),
    [
        ((), 4, {"prototypes", "replay"}),
        (("target",), 4, {"prototypes", "replay"}),
        (("contrast",), 4, {"replay"}),
        (("source",), 3, {"prototypes"}),
        (("target", "contrast"), 3, {"replay"}),
        (("target", "source"), 3, {"prototypes"}),
    ],
)
def test_needs_and_computes_what_its_losses_take(kind: str, off: tuple[str, ...], count: int, groups: set[str]) -> None:
    """[2.6, 6.6] Without replay no source row goes through the network nor is there to be, and so on; the rest works
    with nothing but what ``needs`` says."""
    settings = {f"lambda_{name}": 0.0 for name in off}
    for more, warmed in ((COLD, set[str]()), ({}, {"warmup"}), ({"scope": "norm"}, {"warmup_norm"})):
        policy, network = policy_of(**settings, **more), subject(kind)
        assert policy.needs == groups | warmed
        artefacts = {
            key: value for key, value in network.source.artefacts.items() if key.partition("/")[0] in policy.needs
        }
        model = dataclasses.replace(network.model, source=dataclasses.replace(network.source, artefacts=artefacts))
        network = dataclasses.replace(network, model=model)
        seen = passes(policy, network, [3, 1])
        assert len(seen) == count
        assert torch.equal(seen[0], seen[1])
        images = network.source.artefacts.get("replay/images", torch.zeros(1, *network.shape)).double() / 255
        of_source = [all(_among(row, images) for row in rows) for rows in seen]
        assert of_source == [False] * (count - ("source" not in off)) + [True] * ("source" not in off)


def _among(row: Tensor, images: Tensor) -> bool:
    """To float32, as stored images are read back."""
    return bool(((row - images).abs().flatten(1).amax(1) < 1e-6).any())


@every_net
def test_replay_draws_as_many_as_came(kind: str) -> None:
    """[2.6.5] Without repeats as long as there are enough, each stream and each step its own; then over again."""
    network = subject(kind)
    orders = []
    for seed in range(4):
        drawn = passes(policy_of(lambda_contrast=0, lambda_target=0), network, [4, REPLAY, REPLAY + 2], seed)[2]
        images = network.source.artefacts["replay/images"].double() / 255
        order = [int((row - images).abs().flatten(1).amax(1).argmin()) for row in drawn]
        few, all_of_them, more = order[:4], order[4:-8], order[-8:]
        assert len({*few}) == 4
        assert sorted(all_of_them) == list(range(REPLAY))
        assert sorted(more[:REPLAY]) == list(range(REPLAY))
        assert more[REPLAY:] == more[:2]
        orders += [tuple(all_of_them), tuple(more[:REPLAY])]
    assert len({*orders}) > 4


@every_net
@pytest.mark.parametrize("scope", ["all", "norm"])
def test_answers_by_both_from_before_the_step(kind: str, scope: str) -> None:
    """[1.2, 6.6] Logits of student + logits of teacher, from the weights that the last request left."""
    network, policy = subject(kind), policy_of(scope=scope, lr=0.02, teacher_momentum=0.8)
    state = network.init(policy)
    for step in range(3):
        x = network.rows(step, 4)
        logits, after = one(policy, network, x, state)
        with torch.no_grad():
            z, t = (by_the_batch(network, one)(x) for one in (state.weights, teacher_of(state)))
            again = by_the_batch(network, after.weights)(x) + by_the_batch(network, teacher_of(after))(x)
        torch.testing.assert_close(logits, z + t, rtol=1e-9, atol=1e-10)
        assert not torch.allclose(z, t, rtol=1e-3)
        assert not torch.allclose(logits, again, rtol=1e-3)
        state = after


@every_net
def test_first_cold_answer_is_twice_the_source_s(kind: str) -> None:
    """[6.6] ``2 z``, with the source normalised by the batch."""
    network, x = subject(kind), subject(kind).rows(0, 4)
    logits, _ = one(policy_of(**COLD), network, x)
    with torch.no_grad():
        torch.testing.assert_close(logits, 2 * by_the_batch(network, {})(x), rtol=1e-10, atol=1e-11)


@every_net
def test_answers_between_windows_by_both(kind: str) -> None:
    """A window's answers are z + t as well: exactly where no layer has statistics of its own."""
    network, policy = subject(kind), policy_of(window=4, lr=0.02, teacher_momentum=0.8)
    state = network.init(policy)
    x = network.rows(0, 4)
    _, state = one(policy, network, x, state)
    x = network.rows(1, 1)
    logits, after = one(policy, network, x, state)
    assert_same(after.weights, state.weights)
    if kind == "image-gn":
        with torch.no_grad():
            z, t = (with_weights(network.plain, weights)(x) for weights in (state.weights, teacher_of(state)))
        torch.testing.assert_close(logits, z + t, rtol=1e-9, atol=1e-10)


@every_net
@pytest.mark.parametrize("keep", [0.0, 0.3, 1.0])
def test_teacher_is_the_moving_average(kind: str, keep: float) -> None:
    """[6.5, 6.6] ``m teacher + (1 - m) student``, with the student as stepped: exactly the one or the other at the
    ends."""
    network, policy = subject(kind), policy_of(lr=0.02, teacher_momentum=keep)
    state = network.init(policy)
    for step in range(3):
        before, (_, state) = state, one(policy, network, network.rows(step, 4), state)
        old, new = teacher_of(before), teacher_of(state)
        assert new.keys() == state.weights.keys() == set(network.source.parameters)
        assert_close(new, {key: keep * old[key] + (1 - keep) * value for key, value in state.weights.items()})
        if keep in (0, 1):
            assert_same(new, old if keep else state.weights)
        assert all((value != before.weights[key]).any() for key, value in state.weights.items())


@every_net
def test_scope_norm_adapts_norm_layers_alone(kind: str) -> None:
    """[6.1.5] Scales and shifts in student, teacher and moments; the projector learns as ever."""
    network, policy = subject(kind), policy_of(scope="norm")
    state = network.init(policy)
    _, after = one(policy, network, network.rows(0, 4), state)
    affine = set(network.source.affine)
    assert state.weights.keys() == teacher_of(state).keys() == affine
    moments = {key[7:] for key in state.memory if key.startswith("adam.m.")}
    assert moments == affine | contrast.projector(state.memory).keys()
    for key, value in (after.weights | contrast.projector(after.memory)).items():
        assert (value != flat(state)[f"{'weights' if key in affine else 'memory'}/{key}"]).any(), key


@every_net
def test_projector_is_each_stream_s_own(kind: str) -> None:
    """[2.6] It starts as every other, moves with the stream's data, and counts its steps from its own first, while the
    student's moments go on from the warm-up; without contrastive learning there is none."""
    network, policy = subject(kind), policy_of()
    fresh = network.init(policy)
    outcome = run(policy, network, [fresh, fresh], [network.rows(0, 4), network.rows(1, 4)])
    first, second = (contrast.projector(one.memory) for one in outcome.states)
    for key, value in contrast.projector(fresh.memory).items():
        assert not torch.equal(first[key], value)
        assert not torch.equal(first[key], second[key])
    assert int(fresh.memory["adam.step"]) == 5
    assert int(fresh.memory["adam.step.projector"]) == 0
    assert int(outcome.states[0].memory["adam.step"]) == 6
    assert int(outcome.states[0].memory["adam.step.projector"]) == 1
    assert not any("projector" in key for key in network.init(policy_of(lambda_contrast=0)).memory)


@every_net
@pytest.mark.parametrize("scope", ["all", "norm"])
def test_starts_from_the_warm_up(kind: str, scope: str) -> None:
    """[2.6] Weights, teacher and optimiser of the warm-up of its scope; cold, the source and an unused optimiser."""
    network, policy = subject(kind), policy_of(scope=scope)
    group = "warmup" if scope == "all" else "warmup_norm"
    stored = rmt.as_artefact(network.init(policy))
    for key, value in network.source.artefact(group).items():
        assert torch.equal(stored[key], value), key
    cold = network.init(policy_of(scope=scope, **COLD))
    for key in cold.weights:
        assert torch.equal(cold.weights[key][0], network.source.weights[key])
        assert torch.equal(cold.memory[f"teacher.{key}"][0], network.source.weights[key])
        assert not cold.memory[f"adam.m.{key}"].any()
    assert int(cold.memory["adam.step"]) == 0


@every_net
def test_step_goes_down_the_loss(kind: str) -> None:
    """One small step of plain gradient descent: asked again with the same draws and the old teacher, the loss is lower
    by ``lr |gradient|^2``, over student and projector; so the gradient is that of the loss reported."""
    lr = 1e-5
    policy, network = policy_of(lr=lr, teacher_momentum=1.0, temperature=0.5, **SGD), subject(kind)
    state, x = network.init(policy), network.rows(0, 5)
    first = run(policy, network, [state], [x])
    second = run(policy, network, first.states, [x])
    before, after = flat(state), flat(first.states[0])
    squared = sum(float((after[key] - value).square().sum()) for key, value in before.items())
    change = second.signals[0]["loss"] - first.signals[0]["loss"]
    assert change == pytest.approx(-squared / lr, rel=0.02)


@every_net
def test_reports_its_losses(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """[2.6] While student and teacher are the same and the view is the image itself, self-training is the mean entropy
    of the answer; replay is the cross entropy of source images; each by its weight, and ``loss`` is the sum."""
    monkeypatch.setattr(rmt, "augment", lambda x, *_: x)
    policy = policy_of(lambda_target=0.5, lambda_contrast=2.0, lambda_source=3.0, **COLD)
    network, x = subject(kind), subject(kind).rows(0, REPLAY)
    outcome = run(policy, network, [network.init(policy)], [x])
    signals, artefacts = outcome.signals[0], network.source.artefacts
    assert signals.keys() == {"loss", "self_training", "contrast", "replay"}
    plain = by_the_batch(network, {})
    with torch.no_grad():
        entropy = float(torch.special.entr(plain(x).softmax(1)).sum(1).mean())
        missed = nn.functional.cross_entropy(
            plain(artefacts["replay/images"].double() / 255), artefacts["replay/labels"]
        )
    assert signals["self_training"] == pytest.approx(0.5 * entropy)
    assert signals["replay"] == pytest.approx(3 * float(missed), rel=1e-5)
    assert signals["contrast"] >= 2 * math.log(2)
    assert signals["loss"] == pytest.approx(sum(value for name, value in signals.items() if name != "loss"))


@every_net
def test_without_learning_rate_answers_as_it_began(kind: str) -> None:
    """[6.1.4] lr = 0: student and teacher for ever the source's, answers those of two sources normalised by the
    batch."""
    network, policy = subject(kind), policy_of(lr=0.0, **COLD)
    state = network.init(policy)
    for step in range(2):
        x = network.rows(step, 4)
        logits, state = one(policy, network, x, state)
        with torch.no_grad():
            torch.testing.assert_close(logits, 2 * by_the_batch(network, {})(x), rtol=1e-9, atol=1e-10)
    assert_same(state.weights, network.init(policy).weights)
    assert_close(teacher_of(state), state.weights)


@every_net
def test_order_of_rows_does_not_count(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """[6.1.8] Without augmentation, rows in another order get the same answers and leave the same state."""
    monkeypatch.setattr(rmt, "augment", lambda x, *_: x)
    network, policy = subject(kind), policy_of(optimiser="sgd", lr=0.05, **COLD)
    x, order = network.rows(0, 5), torch.tensor([3, 0, 4, 2, 1])
    logits, state = one(policy, network, x)
    turned, other = one(policy, network, x[order])
    torch.testing.assert_close(turned, logits[order], rtol=1e-9, atol=1e-10)
    assert_close(flat(other), flat(state))


@every_net
@pytest.mark.parametrize("settings", [{}, {"optimiser": "sgd", "lambda_source": 0.0} | COLD], ids=["adam", "sgd"])
def test_company_changes_no_bit(kind: str, settings: dict[str, Any]) -> None:
    """[6.1.1] Streams with weights of their own get in company what each gets alone, to the last bit."""
    network, policy = subject(kind), policy_of(lr=0.01, **settings)
    case = Case(policy, network, "company")
    sizes = (7, 1, 12, 4)
    merged, alone = case.init(4), case.init(4)
    keys = list(range(50, 54))
    for step in range(3):
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
@pytest.mark.parametrize("rows", ["one", "identical", "black"])
def test_poor_requests_leave_no_nan(kind: str, rows: str) -> None:
    """[6.1.6] One row, identical rows and black images, again and again, at the published settings."""
    network = subject(kind)
    server = Server(make_policy("rmt", {}), network)
    for step in range(5):
        x = network.rows(step, 4)
        x = {"one": x[:1], "identical": x[:1].expand_as(x), "black": torch.zeros_like(x)}[rows]
        assert server.logits({"a": x})["a"].isfinite().all()
        assert server.stats["a"].result == "applied"
    assert all(value.isfinite().all() for value in flat(server.state("a")).values())


def test_shows_itself_at_the_published_settings() -> None:
    """Three default steps move the answers, from the warm-up on."""
    network, policy = subject("image-bn"), make_policy("rmt", {})
    server = Server(policy, network)
    x = network.rows(0, 8)
    first = server.logits({"a": x})["a"]
    for _ in range(3):
        last = server.logits({"a": x})["a"]
    assert first.shape == (8, CLASSES)
    assert (last - first).abs().max() > 1e-3


# --- the warm-up -------------------------------------------------------------------------------------------------


@every_net
@pytest.mark.parametrize("scope", ["all", "norm"])
def test_warm_up_is_plain_torch_with_a_rising_rate(kind: str, scope: str) -> None:
    """[2.6] ``L = mean SCE(student, teacher)``, steps of rates ``lr / n`` to ``lr``, the teacher after each; compared
    with ``torch.optim`` on whole networks."""
    network = subject(kind)
    policy = policy_of(scope=scope, optimiser="sgd", momentum=0.9, nesterov=True, lr=0.3, teacher_momentum=0.6, **COLD)
    student, teacher = by_the_batch(network, {}), by_the_batch(network, {}).requires_grad_(False)
    keys = network.source.parameters if scope == "all" else network.source.affine
    values = [student.get_parameter(key) for key in keys]
    optimiser = torch.optim.SGD(values, lr=0.1, momentum=0.9, nesterov=True)
    state, steps = policy.cold_start(network.source), 3
    for step in range(1, steps + 1):
        x = network.rows(step, 4)
        state = rmt.warm_up(policy, state, make_batch(policy, network, [x]), step / steps)
        optimiser.param_groups[0]["lr"] = 0.3 * step / steps
        z, t = student(x).log_softmax(1), teacher(x).log_softmax(1)
        optimiser.zero_grad()
        (-(t.exp() * z + z.exp() * t).sum(1).mean() / 2).backward()
        optimiser.step()
        with torch.no_grad():
            for key, value in zip(keys, values, strict=True):
                mean = teacher.get_parameter(key)
                mean.copy_(0.6 * mean + 0.4 * value)
    expected = {f"weights/{key}": value.detach()[None] for key, value in zip(keys, values, strict=True)}
    expected |= {f"memory/teacher.{key}": teacher.get_parameter(key)[None] for key in keys}
    expected |= {
        f"memory/sgd.m.{key}": optimiser.state[value]["momentum_buffer"][None]
        for key, value in zip(keys, values, strict=True)
    }
    assert_close(flat(state), expected)
    assert not torch.allclose(state.weights[keys[0]][0], network.source.weights[keys[0]], rtol=1e-3)


def test_warm_up_can_be_taken_up() -> None:
    """What one optimiser's warm-up leaves is what a new stream of the same settings starts from."""
    network, cold = subject("image-bn"), policy_of(optimiser="sgd", lr=0.1, **COLD)
    state = cold.cold_start(network.source)
    for step in range(2):
        state = rmt.warm_up(cold, state, make_batch(cold, network, [network.rows(step, 4)]), (step + 1) / 2)
    made = {f"warmup/{key}": value for key, value in rmt.as_artefact(state).items()}
    others = {key: value for key, value in network.source.artefacts.items() if not key.startswith("warmup/")}
    source = dataclasses.replace(network.source, artefacts=others | made)
    warm = policy_of(optimiser="sgd", lr=0.1)
    started = warm.init(source)
    assert_same(started.weights, state.weights)
    assert_same({key: started.memory[key] for key in state.memory}, state.memory)
    _, after = one(warm, network, network.rows(9, 3), take(started, 0))
    assert not torch.equal(after.weights["0.weight"], state.weights["0.weight"])


# --- what it refuses ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
def test_refuses_inputs_it_cannot_augment(kind: str) -> None:
    """Vectors, and images of no known range."""
    with pytest.raises(ValueError, match="augmentation"):
        policy_of(**COLD).init(subject(kind).source)


@pytest.mark.parametrize(
    "settings", [{"optimiser": "sgd"}, {"optimiser": "sgd", "momentum": 0.0}, {"optimiser": "sgd", "scope": "norm"}]
)
def test_refuses_a_warm_up_of_another_optimiser(settings: dict[str, Any]) -> None:
    """Those of the tests were made by Adam; the message says how to make one."""
    group = "warmup_norm" if "scope" in settings else "warmup"
    with pytest.raises(ValueError, match=rf"another optimiser than sgd.*--only {group} --force"):
        subject("image-bn").init(policy_of(**settings))


def test_refuses_scope_none() -> None:
    """There would be nothing to adapt."""
    with pytest.raises(BadInput, match="scope"):
        policy_of(scope="none")
    assert policy_of(scope="norm").scope is Scope.NORM


@pytest.mark.parametrize(
    ("setting", "value"),
    [("temperature", 0.0), ("projection", 0), ("lambda_source", -1.0), ("lambda_contrast", -0.1), ("lr", -1.0)],
)
def test_refuses_settings_outside_their_range(setting: str, value: float) -> None:
    """By the policy itself, naming the value."""
    with pytest.raises(BadInput, match=setting):
        policy_of(**{setting: value})
