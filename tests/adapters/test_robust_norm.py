"""``statistics`` and ``source_rows``: the laws again for policies that normalise by the batch, and what they mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import adapters
from adapters import serving
from adapters.base import BATCH_NORM, SOURCE_NORM, Batch, Norm, Output, Policy, Segments, Source, State, Step
from adapters.tent import Tent
from tests.adapters import test_laws as laws
from tests.adapters.networks import CASES, Case, Subject, assert_same, drive, join, make_batch, run, subject
from tests.adapters.oracles.base import PlainBatchNorm
from tta_server.errors import BadInput
from tta_server.policies import make_policy

SETTINGS: dict[str, dict[str, Any]] = {
    "median": {"statistics": "median"},
    "source_rows": {"source_rows": 3},
    "both": {"statistics": "median", "source_rows": 3},
}


def robust_cases() -> list[Case]:
    """Every policy that normalises by the batch, by one variant on each network with batch norms, under every one of
    the settings; of ``norm`` the mixtures, too, under those that they take.

    Without Adam where there is such a variant: about the median two rows normalise to 0 and a constant, so gradients
    vanish, and Adam would divide rounding errors by rounding errors.
    """
    found: dict[tuple[str, ...], Case] = {}
    for case in sorted(CASES, key=lambda case: getattr(case.policy, "optimiser", "") == "adam"):
        mixes = case.policy.norm != BATCH_NORM
        if not case.policy.norm.weight or case.policy.window or not case.subject.source.statistics:
            continue
        for name, settings in SETTINGS.items():
            if mixes and "source_rows" in settings:
                continue
            policy = dataclasses.replace(case.policy, **settings)
            variant = case.variant if mixes else ""
            key = (case.policy.name, variant, case.subject.kind, name)
            found.setdefault(key, Case(policy, case.subject, f"{case.variant}-{name}"))
    return list(found.values())


ROBUST = robust_cases()
every_case = pytest.mark.parametrize("case", ROBUST, ids=str)


@every_case
def test_laws_of_company(case: Case) -> None:
    """Isolation and permutation: every stream has its own median, and its own number of rows beside the source's."""
    laws.test_isolation(case, 0, (1, 4, 7))
    laws.test_permutation(case, 0, (1, 4, 7))


@every_case
def test_laws_of_state(case: Case) -> None:
    """Purity, shapes, resets and poison."""
    laws.test_purity(case, 0)
    laws.test_shape_stability(case, (5, 1, 1, 3))
    laws.test_reset_makes_a_new_stream(case, 0)
    laws.test_poisoned_stream_harms_itself_only(case, whole=False)
    laws.test_no_leak(case, finish=True)


@every_case
def test_oracle(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 merged, ragged steps equal plain torch models, one a stream, whose batch norms do as the settings say."""
    monkeypatch.setattr(PlainBatchNorm, "forward", plain_forward(case.policy))
    laws.test_oracle(case, 0)


def plain_forward(policy: Policy) -> Callable[[PlainBatchNorm, Tensor], Tensor]:
    """The oracles' batch norm, told again with the median and the source's rows in it; autograd does the rest."""

    def forward(self: PlainBatchNorm, x: Tensor) -> Tensor:
        values = x.transpose(0, 1).flatten(1)
        mean, var = self.own_mean, self.own_var
        if values.shape[1] > 1:
            share = len(x) / (policy.source_rows + len(x)) if policy.source_rows else self.share
            if policy.statistics == "median":
                centre = torch.stack([channel.median() for channel in values])
                spread = (values - centre.unsqueeze(1)).square().mean(1)
            else:
                centre = values.mean(1)
                spread = values.var(1, correction=0 if share == 1 and not self.running else 1)
            mean, var = (1 - share) * mean + share * centre, (1 - share) * var + share * spread
        if self.running:
            self.own_mean, self.own_var = mean, var
        shape = (1, -1, *[1] * (x.dim() - 2))
        normalised = (x - mean.view(shape)) / (var.view(shape) + self.eps).sqrt()
        return normalised * self.weight.view(shape) + self.bias.view(shape)

    return forward


def test_every_policy_that_normalises_by_the_batch_is_here() -> None:
    expected = {name for name, kind in adapters.policies().items() if kind().norm == BATCH_NORM}
    assert {case.policy.name for case in ROBUST} == expected
    assert len(expected) > 8


def norms_of(policy: Policy, network: Subject) -> set[Norm]:
    """The norms that reach the network in a step of two streams."""
    seen = set()

    def spy(weights: Mapping[str, Tensor], x: Tensor, segments: Segments, norm: Norm) -> Output:
        seen.add(norm)
        return network.network(weights, x, segments, norm)

    batch = make_batch(policy, network, [network.rows(0, 4), network.rows(1, 2)])
    drive(policy, network, join([network.init(policy)] * 2), dataclasses.replace(batch, network=spy))
    return seen


@pytest.mark.parametrize("case", CASES, ids=str)
def test_by_default_norms_are_as_ever(case: Case) -> None:
    """The policy's own, and what it or a window names: no median and no prior among them."""
    assert (case.policy.statistics, case.policy.source_rows) == ("mean", 0)
    seen = norms_of(case.policy, case.subject)
    assert not any(norm.median or norm.prior for norm in seen)
    if not case.policy.window:
        assert case.policy.norm in seen


@dataclass(frozen=True)
class Asking(Tent):
    """TENT that asks the source, too, as it was trained."""

    name = "asking"

    def step(self, source: Source, state: State, batch: Batch) -> Generator[Tensor, None, Step]:
        done = yield from super().step(source, state, batch)
        batch.forward({}, batch.x, norm=SOURCE_NORM)
        return done


@pytest.mark.parametrize(
    ("settings", "norm"),
    [
        ("median", Norm(1.0, median=True)),
        ("source_rows", Norm(1.0, prior=3)),
        ("both", Norm(1.0, median=True, prior=3)),
    ],
)
def test_the_settings_replace_the_policys_norm_alone(settings: str, norm: Norm) -> None:
    """A norm that a policy names itself stays what it is."""
    assert norms_of(Tent(**SETTINGS[settings]), subject("conv-bn")) == {norm}
    assert norms_of(Asking(**SETTINGS[settings]), subject("conv-bn")) == {norm, SOURCE_NORM}


def test_a_request_of_n_rows_weighs_n_to_n() -> None:
    """``n / (N + n)``, each stream of a merged batch by its own ``n``."""
    network = subject("conv-bn")
    rows = [network.rows(0, 1), network.rows(1, 4), network.rows(2, 16)]
    found = run(make_policy("norm", {"source_rows": 16}), network, [State({}, {})] * 3, rows).logits
    for x, logits, weight in zip(rows, found, (1 / 17, 4 / 20, 16 / 32), strict=True):
        blend = make_policy("norm", {"mode": "blend", "alpha": weight})
        expected = run(blend, network, [State({}, {})], [x]).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


def test_many_source_rows_are_the_source() -> None:
    network, x = subject("conv-bn"), subject("conv-bn").rows(0, 4)
    source = run(make_policy("source", {}), network, [State({}, {})], [x]).logits[0]
    gaps = []
    for count in (0, 4, 64, 1_000_000):
        logits = run(make_policy("norm", {"source_rows": count}), network, [State({}, {})], [x]).logits[0]
        gaps.append(float((logits - source).abs().max()))
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-4 < 0.1 < gaps[0]


def test_a_few_bad_rows_do_less_harm_about_the_median() -> None:
    """The answers to 24 rows beside 6 that are far off, against those without these, in one request."""
    network = subject("conv-bn")
    sound, bad = network.rows(0, 24), network.rows(1, 6) + 30
    gaps = {}
    for statistics in ("mean", "median"):
        policy = make_policy("norm", {"statistics": statistics, "mode": "running", "alpha": 1.0})
        start = network.init(policy)
        clean = run(policy, network, [start], [sound]).states[0].weights["1.running_mean"]
        mixed = run(policy, network, [start], [torch.cat([sound, bad])]).states[0].weights["1.running_mean"]
        gaps[statistics] = float((mixed - clean).abs().max())
    assert gaps["median"] < 0.2 * gaps["mean"]


@pytest.mark.parametrize("statistics", ["mean", "median"])
def test_a_model_without_batch_norms_is_not_concerned(statistics: str) -> None:
    network, x = subject("conv-gn"), subject("conv-gn").rows(0, 5)
    policy = make_policy("tent", {"statistics": statistics})
    found = run(policy, network, [network.init(policy)], [x])
    plain = run(make_policy("tent", {}), network, [network.init(policy)], [x])
    assert_same({"logits": found.logits[0]}, {"logits": plain.logits[0]})


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        *((name, {"statistics": "median"}, "does not normalise by the batch") for name in ("source", "lame", "rotta")),
        *((name, {"source_rows": 4}, "does not normalise by the batch alone") for name in ("source", "t3a", "rotta")),
        ("norm", {"mode": "blend", "source_rows": 4}, "does not normalise by the batch alone"),
        ("norm", {"mode": "running", "source_rows": 4}, "does not normalise by the batch alone"),
        ("norm", {"mode": "blend", "alpha": 0.0, "statistics": "median"}, "does not normalise by the batch"),
        ("tent", {"window": 8, "statistics": "median"}, "no median statistics with a window"),
        ("cotta", {"window": 8, "source_rows": 4}, "no source_rows with a window"),
    ],
)
def test_what_makes_no_sense_is_refused(name: str, settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=f"{name} takes no .*{reason.removeprefix('no ')}"):
        serving.init(make_policy(name, settings), subject("image-bn").source)


def test_source_rows_need_statistics_of_the_source() -> None:
    for kind in ("conv-gn", "image-gn"):
        with pytest.raises(ValueError, match="no batch-norm statistics of the source"):
            serving.init(make_policy("tent", {"source_rows": 4}), subject(kind).source)


@pytest.mark.parametrize(
    "settings", [{"statistics": "mode"}, {"source_rows": -1}, {"source_rows": 1.5}, {"source_rows": 1_000_001}]
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=next(iter(settings))):
        make_policy("tent", settings)
