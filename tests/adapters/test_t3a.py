"""What the paper promises of ``t3a``, checked without reference code.

Numbers in brackets are sections of the project's algorithm notes: [6.10] T3A, [2.12] its definition, [7] choices.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters import losses
from adapters.base import SOURCE_NORM, Batch, Output, Scope, Segments, Source, State
from adapters.rng import Random
from adapters.t3a import EMPTY, ENTROPIES, SUPPORTS
from tests.adapters.networks import (
    CLASSES,
    SHAPES,
    Server,
    Subject,
    assert_close,
    assert_same,
    build,
    drive,
    flat,
    run,
    serve,
    subject,
)
from tests.adapters.oracles.t3a import T3aOracle
from tta_server.errors import BadInput
from tta_server.policies import make_policy
from tta_server.state.slots import Layout

every_net = pytest.mark.parametrize("kind", SHAPES)


def t3a(filter_k: int = 20, **settings: Any) -> Any:
    return make_policy("t3a", {"filter_k": filter_k} | settings)


def head(source: Source) -> tuple[Tensor, Tensor]:
    return source.weights[f"{source.head}.weight"], source.weights[f"{source.head}.bias"]


def one(policy: Any, network: Subject, x: Tensor, state: State | None = None) -> tuple[Tensor, State]:
    outcome = run(policy, network, [state or network.init(policy)], [x])
    return outcome.logits[0], outcome.states[0]


def offer(
    policy: Any, network: Subject, features: Tensor, state: State | None = None, logits: Tensor | None = None
) -> tuple[Tensor, State, float]:
    """One step of one stream on rows with these features, classified by the network's head unless they have logits."""
    if logits is None:
        weight, bias = head(network.source)
        logits = features @ weight.T + bias
    zero = torch.zeros(1, dtype=torch.int64)
    output = Output(logits, features)
    batch = Batch(features, Segments([len(features)]), lambda *_: output, SOURCE_NORM, Random(zero, zero))
    served, step = drive(policy, network, state or network.init(policy), batch)
    return served, step.state, float(step.signals["selected"])


def entropies(state: State) -> Tensor:
    return state.memory[ENTROPIES][0]


def with_head(kind: str, weight: Tensor | None = None, bias: Tensor | None = None) -> Subject:
    """The network with another classifier."""
    network = build(kind)
    assert isinstance(network, nn.Sequential)
    last = network[-1]
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        for parameter, value in ((last.weight, weight), (last.bias, bias)):
            if value is not None:
                parameter.copy_(value)
    return serve(kind, network)


def lopsided(kind: str = "mlp-bn") -> Subject:
    """A network whose head gives every row of its own weights to class 1: the other classes start without support."""
    return with_head(kind, bias=torch.tensor([0.0, 100.0, 0.0, 0.0, 0.0]))


@every_net
def test_starts_as_the_heads_directions(kind: str) -> None:
    """[6.10] Before any data the class is that of the head with rows at unit length and no bias, and a score is that
    times the rows' mean length, where every row of the head is classified as its own class: with ``b_c = -|w_c|^2 / 2``
    the score of ``w_c`` is greatest there."""
    weight, _ = head(subject(kind).source)
    network, policy = with_head(kind, bias=-weight.square().sum(1) / 2), t3a()
    weight, bias = head(network.source)
    assert (weight @ weight.T + bias).argmax(1).tolist() == list(range(CLASSES))
    state = network.init(policy)
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Rows so uncertain that none is kept: the answer is that of the initial state.
    served, after, selected = offer(
        t3a(1), network, features, network.init(t3a(1)), torch.zeros(50, CLASSES, dtype=torch.float64)
    )
    assert selected == 0
    assert_same(flat(after), flat(network.init(t3a(1))))
    linear = features @ F.normalize(weight, dim=1).T
    torch.testing.assert_close(served, weight.norm(dim=1).mean() * linear, rtol=0, atol=2e-2)  # float16 supports
    sure = linear.topk(2).values.diff(dim=1).abs().squeeze(1) > 1e-2
    assert sure.sum() > 40
    assert (served.argmax(1) == linear.argmax(1))[sure].all()
    assert (entropies(state) < EMPTY).sum(1).tolist() == [1] * CLASSES


@every_net
def test_state_is_supports_and_entropies(kind: str) -> None:
    """[7.7] Half-precision supports at unit length, M per class, of constant size; no weights; bytes as documented."""
    network, policy = subject(kind), t3a(7)
    state = network.init(policy)
    assert policy.scope is Scope.NONE
    assert state.weights == {}
    assert state.memory[SUPPORTS].shape == (1, CLASSES, 7, 6)
    assert state.memory[SUPPORTS].dtype == torch.float16
    assert Layout(state).bytes == CLASSES * 7 * (2 * 6 + 8)
    for step in range(4):
        _, state = one(policy, network, network.rows(step, 6), state)
    used = entropies(state) < EMPTY
    lengths = state.memory[SUPPORTS][0].double().norm(dim=2)
    torch.testing.assert_close(lengths[used], torch.ones_like(lengths[used]), rtol=0, atol=2e-3)
    assert (lengths[~used] == 0).all()
    assert used.sum() > CLASSES


@every_net
@pytest.mark.parametrize("filter_k", [1, 3])
def test_keeps_the_surest_ever_offered(kind: str, filter_k: int) -> None:
    """[6.10] At most M a class; their entropies are the M smallest of all offered since the start, in order."""
    network, policy = subject(kind), t3a(filter_k)
    weight, bias = head(network.source)
    offered: list[list[float]] = [[] for _ in range(CLASSES)]

    def note(logits: Tensor) -> None:
        for c, entropy in zip(logits.argmax(1), losses.entropy(logits), strict=True):
            offered[int(c)].append(float(entropy))

    note(weight @ weight.T + bias)
    state = network.init(policy)
    for step in range(8):
        x = network.rows(step, 6)
        with torch.no_grad():
            note(network.plain(x))
        _, state = one(policy, network, x, state)
        for kept, all_of_class in zip(entropies(state).tolist(), offered, strict=True):
            best = sorted(all_of_class)[:filter_k]
            assert kept[: len(best)] == pytest.approx(best, rel=1e-9, abs=1e-12)
            assert all(entropy == EMPTY for entropy in kept[len(best) :])
    assert any(len(one) > filter_k for one in offered)


def test_answer_does_not_depend_on_how_rows_are_split_into_requests() -> None:
    """[6.10] Greedy selection is exact: the supports are the same however the rows came."""
    network, policy, x = subject("conv-bn"), t3a(3), subject("conv-bn").rows(0, 12)
    _, at_once = one(policy, network, x)
    state = network.init(policy)
    for part in x.split([1, 4, 2, 5]):
        _, state = one(policy, network, part, state)
    assert_close(flat(state), flat(at_once))


@every_net
def test_scaling_features_leaves_the_class(kind: str) -> None:
    """[6.10] Features times ``a > 0``, with the entropies as they were: the same supports, scores times ``a``."""
    network, policy = subject(kind), t3a()
    features = torch.randn(12, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = 3 * torch.randn(12, CLASSES, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    served, state, _ = offer(policy, network, features, logits=logits)
    for factor in (1e-30, 0.5, 1e6, 1e30):  # the last two beyond float16
        scaled, other, _ = offer(policy, network, factor * features, logits=logits)
        assert_same(flat(other), flat(state))
        torch.testing.assert_close(scaled / factor, served, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sure", [True, False])
def test_one_slot_goes_to_the_surer(sure: bool) -> None:
    """[6.10] M = 1: a row replaces the head's own of its class if its entropy is lower, and only then."""
    network, policy = subject("mlp-bn"), t3a(1)
    start = network.init(policy)
    level = 40.0 if sure else 0.1
    features = torch.tensor([[3.0, -1.0, 2.0, 0.5, 0.0, 1.0]], dtype=torch.float64)
    logits = torch.tensor([[0.0, 0.0, level, 0.0, 0.0]], dtype=torch.float64)
    assert (losses.entropy(logits) < entropies(start)[2]).item() == sure
    _, state, selected = offer(policy, network, features, start, logits)
    assert selected == sure
    others = [0, 1, 3, 4]
    assert torch.equal(state.memory[SUPPORTS][0, others], start.memory[SUPPORTS][0, others])
    expected = F.normalize(features[0], dim=0).half() if sure else start.memory[SUPPORTS][0, 2, 0]
    assert torch.equal(state.memory[SUPPORTS][0, 2, 0], expected)


def test_older_supports_win_ties() -> None:
    """Of equal entropies the older stay, and within a request the earlier rows: a fixed, documented order."""
    network, policy = subject("mlp-bn"), t3a(2)
    features = torch.eye(6, dtype=torch.float64)[:4]
    logits = torch.zeros(4, CLASSES, dtype=torch.float64)
    logits[:, 1] = 500.0  # an entropy of exactly 0 for all
    _, state, _ = offer(policy, network, features[:1], logits=logits[:1])
    _, state, selected = offer(policy, network, features[1:], state, logits[1:])
    assert selected == pytest.approx(1 / 3)
    assert torch.equal(state.memory[SUPPORTS][0, 1].double(), features[:2])
    _, again, selected = offer(policy, network, features[2:], state, logits[2:])
    assert selected == 0
    assert_same(flat(again), flat(state))


def test_answers_after_inserting() -> None:
    """[1.2] A request has a say in its own answer: the prototypes are those of the state it leaves behind."""
    network, policy, x = subject("conv-gn"), t3a(4), subject("conv-gn").rows(0, 6)
    weight, _ = head(network.source)
    state = network.init(policy)
    for step in range(3):
        x = network.rows(step, 6)
        served, after = one(policy, network, x, state)
        assert isinstance(network.plain, nn.Sequential)
        with torch.no_grad():
            features = network.plain[:-1](x)
        scores = [
            weight.norm(dim=1).mean() * features @ F.normalize(kept.memory[SUPPORTS][0].double().sum(1), dim=1).T
            for kept in (state, after)
        ]
        torch.testing.assert_close(served, scores[1], rtol=1e-9, atol=1e-10)
        assert not torch.allclose(served, scores[0], rtol=1e-3)
        state = after


@pytest.mark.parametrize("filter_k", [1, 2, 20])
def test_classes_without_supports_keep_their_own_direction(filter_k: int) -> None:
    """[2.12] Rows of the head that it classifies as another class are supports of that one, M at most; their own class
    has none and takes its row's direction, so that it does not win by a score of 0 where all others are negative."""
    network, policy = lopsided(), t3a(filter_k)
    weight, bias = head(network.source)
    state = network.init(policy)
    assert (entropies(state) < EMPTY).sum(1).tolist() == [0, min(filter_k, CLASSES), 0, 0, 0]
    best = losses.entropy(weight @ weight.T + bias).sort().values[:filter_k]
    torch.testing.assert_close(entropies(state)[1, : len(best)], best)
    features = torch.randn(30, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    served, after, _ = offer(policy, network, features, state)
    empty = [0, 2, 3, 4]
    assert (after.memory[SUPPORTS][0, empty] == 0).all()
    own = weight.norm(dim=1).mean() * features @ F.normalize(weight, dim=1).T
    torch.testing.assert_close(served[:, empty], own[:, empty])
    against = -weight.sum(0, keepdim=True)  # scores that are all negative
    served, _, _ = offer(policy, network, against, state)
    assert (served[:, empty] != 0).all()


def test_follows_its_oracle_with_classes_without_supports() -> None:
    """The same against the oracle, over merged steps, as the laws do for ordinary heads."""
    network, policy = lopsided(), t3a(3)
    oracles = [T3aOracle(network.plain, policy, {}) for _ in range(2)]
    states = [network.init(policy)] * 2
    zero = torch.zeros(1, dtype=torch.int64)
    for step in range(6):
        xs = [network.rows(10 * step, 5), network.rows(10 * step + 1, 2)]
        outcome = run(policy, network, states, xs)
        states = outcome.states
        for oracle, x, logits, state in zip(oracles, xs, outcome.logits, states, strict=True):
            torch.testing.assert_close(logits, oracle.step(x, Random(zero, zero)), rtol=1e-8, atol=1e-8)
            assert_close({key: value[0] for key, value in flat(state).items()}, oracle.state())


def test_supports_that_cancel_out_leave_the_rows_direction() -> None:
    """Opposite features under one class sum to nothing: the head's row serves, and no score is NaN."""
    network, policy = subject("mlp-bn"), t3a(2)
    direction = torch.tensor([[1.0, 2.0, 0.0, -1.0, 0.0, 4.0]], dtype=torch.float64)
    features, logits = torch.cat([direction, -direction]), torch.zeros(2, CLASSES, dtype=torch.float64)
    logits[:, 3] = 500.0
    served, _, selected = offer(policy, network, features, logits=logits)
    assert selected == 1
    weight, _ = head(network.source)
    expected = weight.norm(dim=1).mean() * features @ F.normalize(weight[3], dim=0)
    torch.testing.assert_close(served[:, 3], expected)


@pytest.mark.parametrize("value", [0.0, 1e-300, 1e-30, 7e4, 1e30, 1e300])
def test_features_of_any_size_are_kept(value: float) -> None:
    """Zero features have no direction and add nothing, nor do those that no float32 holds; large ones fit, being kept
    at unit length in float16."""
    network, policy = subject("mlp-bn"), t3a(1)
    features, logits = torch.full((1, 6), value, dtype=torch.float64), torch.zeros(1, CLASSES, dtype=torch.float64)
    logits[:, 2] = 500.0
    served, state, _ = offer(policy, network, features, logits=logits)
    expected = 1 / math.sqrt(6) if 1e-150 < value < 1e150 else 0.0
    assert state.memory[SUPPORTS][0, 2, 0].tolist() == pytest.approx([expected] * 6, abs=1e-3)
    assert served.isfinite().all()


def test_scores_are_about_as_large_as_the_sources() -> None:
    """[7.7] The softmax stays as sharp as a head's with rows of that length: twice the head's weights, twice the
    scores. (The published rule gives the same scores to both.)"""
    network = subject("conv-bn")
    weight, bias = head(network.source)
    double = with_head("conv-bn", 2 * weight, 2 * bias)
    features = torch.randn(8, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    logits = torch.randn(8, CLASSES, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    served, _, _ = offer(t3a(), network, features, logits=logits)
    twice, _, _ = offer(t3a(), double, features, logits=logits)
    torch.testing.assert_close(twice, 2 * served)
    ratio = served.std(dim=1).mean() / (features @ weight.T).std(dim=1).mean()
    assert 0.5 < ratio < 2


def test_rows_of_nan_never_become_supports() -> None:
    """Not even where slots are free: NaN sorts behind them. The stream's other rows are kept as usual."""
    network, policy = subject("mlp-bn"), t3a(2)
    features = torch.randn(5, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    logits = 3 * torch.randn(5, CLASSES, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    _, expected, _ = offer(policy, network, features[1:], logits=logits[1:])
    features[0] = logits[0] = torch.nan
    served, state, _ = offer(policy, network, features, logits=logits)
    assert served[0].isnan().all()
    assert_same(flat(state), flat(expected))


def test_streams_in_a_batch_choose_as_if_alone() -> None:
    """Sorting is exact: merged streams choose the supports that each chooses alone, over several steps."""
    network, policy = subject("mlp-bn"), t3a(2)
    states = [network.init(policy)] * 6
    alone = list(states)
    for step in range(4):
        xs = [network.rows(20 * step + stream, 1 + (3 * stream + step) % 7) for stream in range(6)]
        outcome = run(policy, network, states, xs)
        states = outcome.states
        for stream, x in enumerate(xs):
            _, alone[stream] = one(policy, network, x, alone[stream])
            assert_close(flat(states[stream]), flat(alone[stream]))
            assert torch.equal(states[stream].memory[SUPPORTS], alone[stream].memory[SUPPORTS])


def test_reports_the_share_that_was_kept() -> None:
    """The signal ``selected``: all rows while there is room, fewer once each class has its M."""
    network, policy = subject("conv-bn"), t3a(2)
    server = Server(policy, network)
    shares = []
    for step in range(15):
        server.logits({"a": network.rows(step, 6)})
        shares.append(server.stats["a"].signals["selected"])
    assert all(0 <= share <= 1 for share in shares)
    assert shares[0] > 0
    assert sum(shares[-5:]) < sum(shares[:5])
    assert server.stream("a").version == 15


def test_a_head_without_bias_will_do() -> None:
    """Entropies of the head's rows are then those of ``W w_c``."""
    source = subject("mlp-bn").source
    weights = {key: value for key, value in source.weights.items() if key != f"{source.head}.bias"}
    state = t3a(1).init(dataclasses.replace(source, weights=weights))
    weight, _ = head(source)
    best = losses.entropy(weight @ weight.T)
    classes = (weight @ weight.T).argmax(1)
    for c in range(CLASSES):
        mine = best[classes == c]
        assert float(entropies(state)[c, 0]) == pytest.approx(float(mine.min()) if len(mine) else EMPTY)


def test_refuses_a_network_without_a_linear_head() -> None:
    """There are no rows to start from; it says what it looked for."""
    source = subject("mlp-bn").source
    with pytest.raises(ValueError, match=r"needs somewhere\.weight .* there is none"):
        t3a().init(dataclasses.replace(source, head="somewhere"))
    with pytest.raises(ValueError, match=r"\[5, 9\], but it is \[5, 6\]"):
        t3a().init(dataclasses.replace(source, feature_dim=9))


@pytest.mark.parametrize("filter_k", [0, -1])
def test_settings_outside_their_range_are_refused(filter_k: int) -> None:
    """[2.12] -1, "keep all" in the original, has no fixed size (and drops each class's worst there)."""
    with pytest.raises(BadInput, match="filter_k"):
        t3a(filter_k)
