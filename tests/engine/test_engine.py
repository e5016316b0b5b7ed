"""The engine as the server uses it: isolation in float32, what is measured of which request, what a stream weighs."""

from __future__ import annotations

import importlib.util
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adapters import Policy, policies
from adapters.base import Scope
from adapters.eata import Eata
from adapters.norm import NormPolicy
from adapters.rmt import Rmt
from adapters.sar import Sar
from adapters.source import SourcePolicy
from adapters.tent import Tent
from tests.serving import same_state
from tta_server.drift.monitor import Monitor
from tta_server.drift.signals import AGREEMENT, DISTANCE
from tta_server.engine.engine import Engine, initial_state
from tta_server.engine.source import SourceModel, load_model
from tta_server.engine.stable import stabilise
from tta_server.scheduler import Bounds, Scheduler
from tta_server.settings import Settings, load_settings
from tta_server.state.memory import Budget
from tta_server.state.slots import Layout
from tta_server.state.store import StateStore
from tta_server.types import Answer, Job, Lane, Plan, StepStats, Stream

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="module")
def digits() -> SourceModel:
    """The bundled digits model, float32."""
    return load_model("digits", load_settings(ROOT / "tta_server" / "demo" / "config.yaml"), torch.device("cpu"))


def make_engine(model: SourceModel, shadow_ratio: float = 0.0) -> Engine:
    return Engine(
        {model.name: model}, StateStore(Budget(64), torch.device("cpu")), Monitor(20.0), shadow_ratio, shadow_ratio
    )


def step(
    engine: Engine, lane: Lane, requests: list[tuple[Stream, Tensor]], shed: bool = False
) -> tuple[list[Answer], StepStats]:
    """One engine step over these requests; its answers in their order."""
    answers: dict[Stream, Answer] = {}

    def answer(job: Job, result: Answer | Exception) -> None:
        assert isinstance(result, Answer)
        answers[job.stream] = result

    jobs = [Job(stream, lambda *_: None, lane, x) for stream, x in requests]
    stats = engine.step(Plan(lane, jobs, shed), answer)
    return [answers[stream] for stream, _ in requests], stats


def make_stream(name: str, policy: Policy) -> Stream:
    return Stream(name, "digits", policy, 1, 0.0)


@pytest.fixture(scope="module")
def prepared(prepared_digits: Path) -> SourceModel:
    """The same with its artefacts."""
    return load_model("digits", load_settings(prepared_digits), torch.device("cpu"))


EVERY = {name: kind() for name, kind in policies().items()} | {
    "tent-window": Tent(window=16),
    "eata-window": Eata(window=16, reset_after=100),
    "rmt-norm": Rmt(scope=Scope.NORM),
    "tent-median": Tent(statistics="median"),
    "eata-prior": Eata(source_rows=16),
}


@pytest.mark.parametrize("policy", EVERY.values(), ids=EVERY)
def test_interleaved_streams_are_served_as_if_alone(prepared: SourceModel, policy: Policy) -> None:
    """Law 1 in float32: 8 streams that the scheduler merges as it sees fit against each stream run alone."""
    digits = prepared
    shuffle, lane = random.Random(0), Lane("digits", policy)
    rounds = 12 if lane.merges else 4  # those that do not merge take up to 0.1 s a step
    generator = torch.Generator().manual_seed(0)
    requests = [
        [torch.rand(shuffle.randint(1, 24), 1, 8, 8, generator=generator) * (0.3 + 0.1 * stream) for _ in range(rounds)]
        for stream in range(8)
    ]
    together: dict[str, list[Tensor]] = {str(stream): [] for stream in range(8)}
    engine, streams = make_engine(digits), [make_stream(str(stream), policy) for stream in range(8)]
    if lane.merges:
        scheduler, merged = Scheduler(Bounds(max_rows=64)), 0
        for round in range(rounds):
            for stream in shuffle.sample(streams, 8):
                scheduler.submit(Job(stream, lambda *_: None, lane, requests[int(stream.id)][round]))
        while (plan := scheduler.next_batch(0.0)) is not None:
            merged += len(plan.jobs) > 1
            answers, _ = step(engine, lane, [(job.stream, job.x) for job in plan.jobs if job.x is not None])
            for job, answer in zip(plan.jobs, answers, strict=True):
                together[job.stream.id].append(answer.logits)
            scheduler.complete(plan)
        assert merged > 12
    else:
        # The scheduler would run them one by one; the engine must not depend on that.
        for round in range(rounds):
            order = shuffle.sample(streams, 8)
            for some in (order[:3], order[3:]):
                answers, _ = step(engine, lane, [(stream, requests[int(stream.id)][round]) for stream in some])
                for stream, answer in zip(some, answers, strict=True):
                    together[stream.id].append(answer.logits)
    for name, scores in together.items():
        engine, stream = make_engine(digits), make_stream(name, policy)
        for x, seen in zip(requests[int(name)], scores, strict=True):
            ((answer,), _) = step(engine, lane, [(stream, x)])
            torch.testing.assert_close(seen, answer.logits, atol=1e-4, rtol=0)


def test_rows_do_not_depend_on_how_many_there_are() -> None:
    """Linear and convolution layers, forward and backward, for every small number of rows."""
    torch.manual_seed(0)
    layers = torch.nn.ModuleList([torch.nn.Conv2d(16, 32, 3, 2, padding=1), torch.nn.Linear(64, 10)])
    inputs = [torch.randn(32, 16, 32, 32), torch.randn(32, 64)]
    stabilise(layers)
    for layer, full in zip(layers, inputs, strict=True):
        full.requires_grad_()
        every = layer(full)
        upstream = torch.randn_like(every)
        (gradient,) = torch.autograd.grad(every, full, upstream)
        for n in (1, 2, 3, 4, 5, 7, 11, 13):
            part = full[:n].detach().clone().requires_grad_()
            some = layer(part)
            assert some.shape == every[:n].shape
            torch.testing.assert_close(some, every[:n], atol=1e-5, rtol=0)
            torch.testing.assert_close(
                torch.autograd.grad(some, part, upstream[:n])[0], gradient[:n], atol=1e-5, rtol=0
            )


def test_an_even_share_of_adapting_requests_is_compared_with_the_source(digits: SourceModel) -> None:
    """The first of every four, whoever else is in the batch; requests the source answers do not count among them."""
    engine, tent = make_engine(digits, shadow_ratio=0.25), Tent()
    stream, x = make_stream("a", tent), torch.rand(8, 1, 8, 8)
    measured = []
    for _ in range(8):
        _, plain = step(engine, Lane("digits", SourcePolicy()), [(stream, x)])
        assert AGREEMENT not in plain.jobs[0].signals
        _, stats = step(engine, Lane("digits", tent), [(stream, x), (make_stream("b", tent), x)])
        measured.append(AGREEMENT in stats.jobs[0].signals)
        assert measured[-1] == (DISTANCE in stats.jobs[0].signals)
        assert AGREEMENT in stats.jobs[1].signals
    assert measured == [True, False, False, False] * 2


def test_drift_is_measured_while_the_source_answers_and_is_the_same(digits: SourceModel) -> None:
    """An operator who decides whether to switch adaptation on needs it most."""
    x = torch.rand(8, 1, 8, 8)
    drifts = []
    for policy in (SourcePolicy(), Tent()):
        _, stats = step(make_engine(digits, shadow_ratio=1.0), Lane("digits", policy), [(make_stream("a", Tent()), x)])
        drifts.append(stats.jobs[0].signals[DISTANCE])
    assert drifts[0] == pytest.approx(drifts[1], rel=1e-5)
    assert drifts[0] > 0


def test_drift_is_small_on_source_data_and_grows_with_the_shift(digits: SourceModel) -> None:
    """The distance of statistics, by its formula: 0 where the batch has the source's."""
    from tta_server.demo.data import training

    pixels = digits.settings.input.from_pixels(torch.from_numpy(training()[0]))
    engine, lane = make_engine(digits, shadow_ratio=1.0), Lane("digits", Tent())
    drifts = []
    for fade in (0.0, 0.3, 0.6):
        _, stats = step(engine, lane, [(make_stream(str(fade), Tent()), pixels * (1 - fade) + 0.6 * fade)])
        drifts.append(stats.jobs[0].signals[DISTANCE])
    assert drifts[0] < 0.02 < drifts[1] < drifts[2]


def test_an_anonymous_request_leaves_nothing(digits: SourceModel) -> None:
    engine = make_engine(digits, shadow_ratio=1.0)
    stream = make_stream("", SourcePolicy())
    _, stats = step(engine, Lane("digits", SourcePolicy()), [(stream, torch.rand(2, 1, 8, 8))])
    assert DISTANCE not in stats.jobs[0].signals
    assert engine.monitor.read(stream) == {}


def test_a_tent_stream_of_resnet20_weighs_three_floats_a_value(tmp_path: Path) -> None:
    """Scale, shift and Adam's two moments of each, and the step counter: within 4 floats a value and 1 KiB."""
    spec = importlib.util.spec_from_file_location("resnet_cifar", ROOT / "examples" / "cifar10c" / "resnet_cifar.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.save(module.resnet20().state_dict(), tmp_path / "weights.pt")
    settings = Settings.model_validate(
        {
            "models": {
                "resnet20": {
                    "factory": "resnet_cifar:resnet20",
                    "weights": str(tmp_path / "weights.pt"),
                    "input": {"shape": [3, 32, 32]},
                }
            },
            "folder": ROOT / "examples" / "cifar10c",
        }
    )
    model = load_model("resnet20", settings, torch.device("cpu"))
    assert (model.parameters, model.adaptable_values) == (269_722, 1_376)
    size = Layout(initial_state(Tent(), model)).bytes
    assert size == 3 * 4 * 1_376 + 8
    assert size <= 4 * 4 * model.adaptable_values + 1024


# Shedding


@pytest.mark.parametrize("policy", [Tent(), Tent(window=4), NormPolicy(mode="running", alpha=0.3)], ids=str)
def test_a_shed_step_answers_the_same_and_leaves_no_trace(digits: SourceModel, policy: Policy) -> None:
    """State, version and window stay, nothing is compared with the source, and the next step is as if it never was."""
    lane, generator = Lane("digits", policy), torch.Generator().manual_seed(0)
    requests = [torch.rand(6, 1, 8, 8, generator=generator) for _ in range(3)]
    scores: list[list[Tensor]] = []
    for shed in (False, True):
        engine, stream = make_engine(digits, shadow_ratio=1.0), make_stream("a", policy)
        step(engine, lane, [(stream, requests[0])])
        before, version = engine.store.export(lane, stream), stream.version
        if shed:
            for _ in range(2):
                (answer,), stats = step(engine, lane, [(stream, requests[1])], shed=True)
                assert (answer.shed, answer.adapted, answer.version) == (True, True, version)
            assert same_state(engine.store.export(lane, stream), before)
            assert stream.version == version
            (job,) = stats.jobs
            assert job.result == "shed"
            assert job.signals.keys() == {"entropy", "confidence", "margin", "diversity"}
            assert stats.shadow_seconds == 0.0
            engine.store.check_integrity()
        scores.append([step(engine, lane, [(stream, x)])[0][0].logits for x in requests[1:]])
    assert all(torch.equal(one, other) for one, other in zip(*scores, strict=True))


def test_there_is_nothing_to_shed_where_nothing_is_learned(digits: SourceModel) -> None:
    """The answers are the usual ones; only the comparison with the source is left out."""
    engine, x = make_engine(digits, shadow_ratio=1.0), torch.rand(8, 1, 8, 8)
    for policy in (SourcePolicy(), NormPolicy()):
        lane, stream = Lane("digits", policy), make_stream(policy.name, policy)
        (answer,), stats = step(engine, lane, [(stream, x)], shed=True)
        assert (answer.shed, stats.jobs[0].result, stats.shadow_seconds) == (False, "none", 0.0)
        assert DISTANCE not in stats.jobs[0].signals
        _, stats = step(engine, lane, [(stream, x)])
        assert DISTANCE in stats.jobs[0].signals


# Moves


def moved(digits: SourceModel, policy: Policy, new: Policy, steps: int = 2) -> tuple[Engine, Stream, bool]:
    """A stream of ``policy`` that took some steps and was then moved to ``new``."""
    engine, stream = make_engine(digits, shadow_ratio=1.0), make_stream("a", policy)
    for seed in range(steps):
        x = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
        step(engine, stream.lane, [(stream, x)])
    old, stream.policy = stream.lane, new
    kept = engine.move(old, stream.lane, stream)
    engine.store.check_integrity()
    assert not engine.store.has_lane(old)
    return engine, stream, kept


@pytest.mark.parametrize(
    ("policy", "new"),
    [(Tent(), Tent(lr=0.1)), (Tent(), Tent(momentum=0.5)), (Tent(window=8), Tent(window=8, lr=0.1))],
    ids=str,
)
def test_a_state_moves_where_kind_and_layout_are_the_same(digits: SourceModel, policy: Policy, new: Policy) -> None:
    engine, stream, kept = moved(digits, policy, new)
    alone, twin = make_engine(digits, shadow_ratio=1.0), make_stream("a", policy)
    for seed in range(2):
        step(alone, twin.lane, [(twin, torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(seed)))])
    assert (kept, stream.version) == (True, 2)
    assert same_state(engine.store.export(stream.lane, stream), alone.store.export(twin.lane, twin))
    assert engine.monitor.read(stream) == alone.monitor.read(twin)


@pytest.mark.parametrize(
    ("policy", "new"),
    [
        (Tent(), Tent(optimiser="sgd")),
        (Tent(), Tent(window=8)),
        (Tent(window=8), Tent(window=16)),
        (Tent(), Tent(reset_after=100)),
        (Tent(), NormPolicy()),
        (NormPolicy(mode="running"), Tent()),
        (Tent(), Sar()),
    ],
    ids=str,
)
def test_else_the_stream_is_back_at_the_source(digits: SourceModel, policy: Policy, new: Policy) -> None:
    engine, stream, kept = moved(digits, policy, new)
    assert (kept, stream.version, engine.monitor.read(stream)) == (False, 0, {})
    assert engine.store.tier(stream.lane, stream) == "none"
    x = torch.rand(8, 1, 8, 8)
    (own,), _ = step(engine, stream.lane, [(stream, x)])
    (other,), _ = step(make_engine(digits), stream.lane, [(make_stream("a", new), x)])
    assert own.version == 0
    assert torch.equal(own.logits, other.logits)


@pytest.mark.parametrize("what", ["move", "_put", "add_lane"])
def test_a_move_that_fails_leaves_the_stream_at_the_source(
    digits: SourceModel, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    engine, stream = make_engine(digits), make_stream("a", Tent())
    step(engine, stream.lane, [(stream, torch.rand(8, 1, 8, 8))])
    old, stream.policy = stream.lane, Tent(lr=0.1)

    def broken(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(engine.store, what, broken)
        with pytest.raises(MemoryError):
            engine.move(old, stream.lane, stream)
    assert stream.version == 0
    assert [engine.store.tier(lane, stream) for lane in (old, stream.lane)] == ["none", "none"]
    assert not engine.store.has_lane(old)
    engine.store.check_integrity()
    (answer,), _ = step(engine, stream.lane, [(stream, torch.rand(8, 1, 8, 8))])
    assert answer.version == 0


def test_a_reset_and_a_drop_forget_what_was_measured(digits: SourceModel) -> None:
    engine, streams = make_engine(digits, shadow_ratio=1.0), [make_stream(id, Tent()) for id in "ab"]
    lane = streams[0].lane
    step(engine, lane, [(stream, torch.rand(8, 1, 8, 8)) for stream in streams])
    assert all(engine.monitor.read(stream) for stream in streams)
    engine.reset(lane, lane, streams[0])
    assert (streams[0].version, engine.store.tier(lane, streams[0]), engine.monitor.read(streams[0])) == (0, "none", {})
    engine.drop(lane, streams[1])
    assert (engine.store.has_lane(lane), engine.monitor.read(streams[1])) == (False, {})
