"""Tiny networks with a fixed seed, in float64, served by the real engine classes: what the policy tests run on.

A :class:`Subject` holds a network twice: ``plain``, untouched, for oracles and for comparison, and ``model``, the same
weights loaded by ``load_model`` the way the server does it, whose norm layers work per stream.
"""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import adapters
from adapters import rmt, serving
from adapters.base import Batch, Norm, Output, Policy, Segments, Source, State, Step, Tensors
from adapters.rng import Random, stream_key
from tests.adapters.oracles import VARIANTS
from tta_server.drift.monitor import Monitor
from tta_server.engine.engine import Engine, initial_state
from tta_server.engine.norm import Pass
from tta_server.engine.source import SourceModel, load_model
from tta_server.errors import TtaError
from tta_server.policies import make_policy
from tta_server.settings import Settings
from tta_server.state.memory import Budget
from tta_server.state.store import StateStore
from tta_server.types import Answer, Job, JobStats, Lane, Plan, Stream

CLASSES = 5
CPU = torch.device("cpu")

SHAPES: dict[str, tuple[int, ...]] = {"conv-bn": (3, 6, 6), "conv-gn": (3, 6, 6), "mlp-bn": (7,)}
"""The networks by name, with the shape of one input row; inputs have no range."""
IMAGES: dict[str, tuple[int, ...]] = {"image-bn": (3, 8, 8), "image-gn": (3, 8, 8)}
"""The same as ``conv-bn`` and ``conv-gn``, for images in [0, 1]: what policies that augment or store images run on."""
ADAPTABLE_VALUES = {"conv-bn": 2 * (4 + 6), "conv-gn": 2 * (4 + 6 + 6), "mlp-bn": 2 * (8 + 6)}
"""Scales and shifts in each network's norm layers: 2 x the sum of their channels."""


def build(kind: str, seed: int = 0) -> nn.Module:
    """The network ``kind``, in evaluation mode, with running statistics and affine parameters far from 0 and 1.

    ``conv-bn`` has two ``BatchNorm2d``, ``conv-gn`` is its twin with ``GroupNorm`` and ``LayerNorm`` (no row depends on
    another), ``mlp-bn`` has two ``BatchNorm1d``, which see a single value per channel in a batch of one row.
    """
    generator = torch.Generator().manual_seed(seed)
    body: list[nn.Module]
    kind = kind.replace("image", "conv")
    if kind == "mlp-bn":
        body = [nn.Linear(7, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh()]
    else:
        last: list[nn.Module] = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        norms = (
            (nn.BatchNorm2d(4), nn.BatchNorm2d(6)) if kind == "conv-bn" else (nn.GroupNorm(2, 4), nn.GroupNorm(3, 6))
        )
        if kind == "conv-gn":
            last.append(nn.LayerNorm(6))
        first, second = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.Conv2d(4, 6, 3, stride=2, bias=False)
        body = [first, norms[0], nn.ReLU(), second, norms[1], nn.ReLU(), *last]
    network = nn.Sequential(*body, nn.Linear(6, CLASSES)).double().eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                fan_in = module.weight[0].numel()
                module.weight.copy_(_normal(module.weight, generator) * (2 / fan_in) ** 0.5)
                if module.bias is not None:
                    module.bias.copy_(0.2 * _normal(module.bias, generator))
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
                assert module.weight is not None
                assert module.bias is not None
                module.weight.copy_(0.5 + _uniform(module.weight, generator))
                module.bias.copy_(0.3 * _normal(module.bias, generator))
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.copy_(0.4 * _normal(module.running_mean, generator))
                module.running_var.copy_(0.5 + 1.5 * _uniform(module.running_var, generator))
        head = network[-1]
        assert isinstance(head, nn.Linear)
        head.weight.mul_(2.0)  # confident enough that entropies differ from row to row
    return network


@dataclass(frozen=True)
class Subject:
    """A network under test: the original and the served one, with equal weights."""

    kind: str
    plain: nn.Module
    """Read-only: copy before changing anything."""
    model: SourceModel
    shape: tuple[int, ...]

    @property
    def source(self) -> Source:
        return self.model.source

    def forward(self, segments: Segments, norm: Norm) -> Callable[[Mapping[str, Tensor], Tensor], Output]:
        """The served model as a function of per-stream weights, exactly as policies get it."""
        return lambda weights, x: self.network(weights, x, segments, norm)

    def network(self, weights: Mapping[str, Tensor], x: Tensor, segments: Segments, norm: Norm) -> Output:
        """The served model, exactly as the engine hands it to a batch."""
        return self.model.network.run(Pass(segments, weights, norm), x)

    def rows(self, seed: int, count: int) -> Tensor:
        """``count`` input rows ``[count, *shape]``, away from the source's statistics."""
        generator = torch.Generator().manual_seed(seed)
        shift, scale = torch.rand(2, generator=generator, dtype=torch.float64)
        x: Tensor = torch.randn(count, *self.shape, generator=generator, dtype=torch.float64)
        x = x * (0.5 + float(scale)) + 2 * (float(shift) - 0.5)
        return x.sigmoid() if self.kind in IMAGES else x

    def init(self, policy: Policy) -> State:
        """The state of one new stream, through the engine's own checks."""
        return initial_state(policy, self.model)


@lru_cache(maxsize=64)
def subject(kind: str, seed: int = 0) -> Subject:
    """The network ``kind`` served by the real engine. Shared between tests, so nothing may change it."""
    return serve(kind, build(kind, seed), {"kind": kind, "seed": seed})


def serve(kind: str, plain: nn.Module, arguments: Mapping[str, Any] | None = None) -> Subject:
    """Saves ``plain``'s weights and loads them into a network of its kind, as the server does at its start."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        safetensors.torch.save_file(plain.state_dict(), path)
        model = load_model("tiny", _settings(path, kind, dict(arguments or {"kind": kind})), CPU)
    source = dataclasses.replace(model.source, artefacts=_artefacts(model.source))
    return Subject(kind, plain, dataclasses.replace(model, source=source), (SHAPES | IMAGES)[kind])


def _artefacts(source: Source) -> Tensors:
    """Artefacts of plausible sizes for a source: what is tested is what policies make of them.

    Of the prototypes the last class has no image, and where its mean should be a row that would often be the nearest.
    There are 6 replay images. The warm-ups were made by Adam.
    """
    generator = torch.Generator().manual_seed(11)
    made = {f"fisher/{key}": _uniform(source.weights[key], generator) for key in source.affine}
    likeness = torch.empty(CLASSES, source.feature_dim, dtype=source.dtype)
    made["prototypes/mean"] = _normal(likeness, generator)
    made["prototypes/mean"][-1] = 1 + 0.1 * _normal(likeness[-1], generator)
    made["prototypes/counts"] = torch.tensor([3, 1, 7, 2, 0])
    if source.input_range is not None:
        made["replay/images"] = torch.randint(0, 256, (6, *source.input_shape), generator=generator, dtype=torch.uint8)
        made["replay/labels"] = torch.randint(0, CLASSES, (6,), generator=generator)
        for group, scope in (("warmup", "all"), ("warmup_norm", "norm")):
            policy = make_policy("rmt", {"scope": scope})
            assert isinstance(policy, rmt.Rmt)
            made |= {
                f"{group}/{key}": _moved(key, value, generator)
                for key, value in rmt.as_artefact(policy.cold_start(source)).items()
            }
    return made


def _moved(key: str, value: Tensor, generator: torch.Generator) -> Tensor:
    """A tensor of a fresh state as some steps of Adam might have left it."""
    if key == "memory.adam.step":
        return torch.full_like(value, 5)
    if key.startswith("memory.adam.v."):
        return 0.002 * _uniform(value, generator)
    return value + 0.03 * _normal(value, generator)


def _settings(weights: Path, kind: str, arguments: dict[str, Any]) -> Settings:
    return Settings.model_validate(
        {
            "models": {
                "tiny": {
                    "factory": f"{build.__module__}:build",
                    "arguments": arguments,
                    "weights": str(weights),
                    "input": {
                        "shape": list((SHAPES | IMAGES)[kind]),
                        "range": [0, 1] if kind in IMAGES else None,
                    },
                }
            }
        }
    )


@dataclass(frozen=True)
class Outcome:
    """What one merged step gave, split by stream."""

    logits: list[Tensor]
    """``[N_s, C]`` per stream."""
    states: list[State]
    """``S = 1`` each."""
    signals: list[dict[str, float]]
    """Per stream, those that are not NaN, which means not measured."""


def run(
    policy: Policy,
    subject: Subject,
    states: Sequence[State],
    inputs: Sequence[Tensor],
    keys: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
) -> Outcome:
    """One merged step of several streams, without engine or store: stream ``i`` has ``states[i]`` and ``inputs[i]``."""
    logits, step, segments = run_raw(policy, subject, join(states), inputs, keys, steps)
    return Outcome(
        logits=list(logits.split(segments.sizes)),
        states=[take(step.state, index) for index in range(segments.streams)],
        signals=[
            {name: float(value[i]) for name, value in step.signals.items() if not value[i].isnan()}
            for i in range(segments.streams)
        ],
    )


def run_raw(
    policy: Policy,
    subject: Subject,
    state: State,
    inputs: Sequence[Tensor],
    keys: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
) -> tuple[Tensor, Step, Segments]:
    """As :func:`run`, with the stacked state in and what the policy gave out untouched."""
    batch = make_batch(policy, subject, inputs, keys, steps)
    return *drive(policy, subject, state, batch), batch.segments


def drive(policy: Policy, subject: Subject, state: State, batch: Batch) -> tuple[Tensor, Step]:
    """Runs a policy's step on a batch to its end, as the server does: the logits it yielded and what it returned."""
    running = serving.step(policy, subject.source, state, batch)
    logits = next(running)
    try:
        next(running)
    except StopIteration as end:
        step: Step = end.value
        return logits, step
    raise AssertionError(f"policy {policy.name!r} yielded twice")


def make_batch(
    policy: Policy,
    subject: Subject,
    inputs: Sequence[Tensor],
    keys: Sequence[int] | None = None,
    steps: Sequence[int] | None = None,
) -> Batch:
    """The batch a policy sees when the streams send ``inputs``; ``keys`` and ``steps`` drive their random draws."""
    segments = Segments([len(x) for x in inputs])
    keys = keys or [stream_key(f"stream-{index}") for index in range(len(inputs))]
    random = Random(torch.tensor(keys), torch.tensor(steps or [0] * len(inputs)), torch.float64)
    return Batch(torch.cat(list(inputs)), segments, subject.network, policy.norm, random)


def join(states: Sequence[State]) -> State:
    """Stacks the states of single streams."""
    return State(
        {key: torch.cat([one.weights[key] for one in states]) for key in states[0].weights},
        {key: torch.cat([one.memory[key] for one in states]) for key in states[0].memory},
    )


def take(state: State, index: int) -> State:
    """One stream of a stacked state, as ``S = 1``, copied."""
    return State(
        {key: value[index : index + 1].clone() for key, value in state.weights.items()},
        {key: value[index : index + 1].clone() for key, value in state.memory.items()},
    )


def flat(state: State) -> Tensors:
    """All tensors of a state in one dict, for comparison."""
    return {f"weights/{key}": value for key, value in state.weights.items()} | {
        f"memory/{key}": value for key, value in state.memory.items()
    }


def assert_same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> None:
    """Bit for bit: the same keys, shapes, dtypes and values, NaN where the other has NaN."""
    assert left.keys() == right.keys()
    for key, value in left.items():
        assert value.shape == right[key].shape, key
        assert value.dtype == right[key].dtype, key
        same = torch.equal(value.nan_to_num(nan=-1.5), right[key].nan_to_num(nan=-1.5))
        assert same, f"{key} differs by {(value - right[key]).abs().max()}"


def assert_close(
    left: Mapping[str, Tensor], right: Mapping[str, Tensor], rtol: float = 1e-9, atol: float = 1e-10
) -> None:
    """The same keys, shapes and dtypes, and values up to rounding in float64."""
    assert left.keys() == right.keys()
    for key, value in left.items():
        torch.testing.assert_close({key: value}, {key: right[key]}, rtol=rtol, atol=atol)


class Server:
    """The real engine over the real store, for one policy and subject; streams are made on first use."""

    def __init__(self, policy: Policy, subject: Subject, slots: int = 8, shadow_ratio: float = 0.0) -> None:
        self.lane = Lane(subject.model.name, policy)
        self.store = StateStore(Budget(slots), CPU)
        self.engine = Engine({subject.model.name: subject.model}, self.store, Monitor(20.0), shadow_ratio)
        self.policy, self.subject = policy, subject
        self.streams: dict[str, Stream] = {}
        self.stats: dict[str, JobStats] = {}
        """Of the last step, by stream."""

    def stream(self, name: str) -> Stream:
        if name not in self.streams:
            self.streams[name] = Stream(name, self.subject.model.name, self.policy, stream_key(name), created=0.0)
        return self.streams[name]

    def step(self, inputs: Mapping[str, Tensor]) -> dict[str, Answer | TtaError]:
        """One engine step with a request of each stream named in ``inputs``; the answers by stream."""
        jobs = {name: Job(self.stream(name), done=_never, lane=self.lane, x=x) for name, x in inputs.items()}
        names = {job.number: name for name, job in jobs.items()}
        answers: dict[str, Answer | TtaError] = {}

        def answer(job: Job, result: Answer | TtaError) -> None:
            assert names[job.number] not in answers, "a job was answered twice"
            answers[names[job.number]] = result

        stats = self.engine.step(Plan(self.lane, list(jobs.values())), answer)
        self.stats = {job.stream.id: job for job in stats.jobs}
        assert answers.keys() == inputs.keys(), "a job was not answered"
        self.store.check_integrity()
        return answers

    def logits(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As :meth:`step`, for requests that must all be answered with scores."""
        logits: dict[str, Tensor] = {}
        for name, answer in self.step(inputs).items():
            assert isinstance(answer, Answer), f"{name}: {answer}"
            logits[name] = answer.logits
        return logits

    def state(self, name: str) -> State:
        """The stream's committed state; the initial one where it has none yet."""
        if not self.store.has_lane(self.lane):
            self.store.add_lane(self.lane, self.subject.init(self.policy))
        return self.store.export(self.lane, self.stream(name))


@dataclass(frozen=True)
class Case:
    """A policy with settings, on a network it can run on."""

    policy: Policy
    subject: Subject
    variant: str

    def __str__(self) -> str:
        return f"{self.policy.name}-{self.variant}-{self.subject.kind}"

    def init(self, streams: int) -> list[State]:
        return [self.subject.init(self.policy) for _ in range(streams)]

    def inputs(self, seed: int, step: int, sizes: tuple[int, ...]) -> list[Tensor]:
        """The requests of each stream in one step; every stream has data of its own."""
        return [self.subject.rows(1000 * seed + 50 * step + stream, rows) for stream, rows in enumerate(sizes)]

    def warm(self, seed: int, sizes: tuple[int, ...], steps: int = 2) -> list[State]:
        """The states of streams that have taken some steps, so that moments and statistics are far from their start."""
        states = self.init(len(sizes))
        for step in range(steps):
            states = run(self.policy, self.subject, states, self.inputs(seed, step, sizes)).states
        return states


def variants_of(name: str) -> dict[str, dict[str, Any]]:
    """The settings to test a policy with: its entry, or its defaults."""
    return VARIANTS.get(name, {"defaults": {}})


def can_run(policy: Policy, network: Subject) -> bool:
    """Whether the policy accepts this source; what it refuses, it refuses by ``ValueError``."""
    try:
        network.init(policy)
    except ValueError:
        return False
    return True


def with_weights(plain: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a plain network with some of its tensors replaced: ``weights`` of one stream, ``[1, ...]``."""
    network = copy.deepcopy(plain)
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    with torch.no_grad():
        for key, value in weights.items():
            tensors[key].copy_(value[0])
    return network


def _never(answer: Answer | None, error: Exception | None) -> None:
    raise AssertionError("the engine answers through its callback, not through the job")


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=like.dtype)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(like.shape, generator=generator, dtype=like.dtype)


def _networks(policy: Policy) -> list[Subject]:
    """Those it can run on; the image networks only where the others are refused."""
    for kinds in (SHAPES, IMAGES):
        found = [one for one in map(subject, kinds) if can_run(policy, one)]
        if found:
            return found
    return []


CASES = [
    Case(policy, network, variant)
    for name in adapters.policies()
    for variant, settings in variants_of(name).items()
    for policy in [make_policy(name, settings)]
    for network in _networks(policy)
]
"""Every registered policy, every variant, on every network it can run on."""
