"""What the tests of the serving half share: a tiny network and its config, a device to run it on, ways to hold it.

Nothing here registers a policy, and nothing waits for time to pass: threads are held and released by events.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import safetensors.torch
import torch
import yaml
from torch import Tensor, nn

from adapters import Policy, rng
from adapters.base import State
from adapters.tent import Tent
from tta_server import app, service
from tta_server.access import Access
from tta_server.drift.monitor import Monitor
from tta_server.engine.engine import Engine
from tta_server.engine.source import SourceModel, load_model
from tta_server.errors import TtaError
from tta_server.repository import Load
from tta_server.runner import Runner
from tta_server.scheduler import Bounds, Scheduler
from tta_server.service import Service
from tta_server.settings import Settings, load_settings
from tta_server.state.keeper import Keeper
from tta_server.state.memory import Budget
from tta_server.state.sqlite import SqliteStore
from tta_server.state.store import StateStore
from tta_server.tenant import Tenant
from tta_server.types import Answer, Call, Event, Job, Lane, StepStats, Stream

Loaded = tuple[Settings, dict[str, SourceModel]]
Reply = tuple[Answer, bool]
"""Of a prediction: the answer, and whether it is a stored one."""
T = TypeVar("T")

CPU = torch.device("cpu")
MODEL = "tiny"
CLASSES = ("ant", "bee", "cat", "dog", "elk")
LR = 0.01
"""The config's preset for TENT: large enough that a few steps of a tiny network show."""
SLOTS = 256
"""On the device, where a test does not say."""
TIMEOUT = 20.0
"""Seconds after which a wait that should end at once counts as stuck."""


class TinyNetwork(nn.Module):
    """Two batch norms, input ``[3, 8, 8]``, 5 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.bn2(self.conv2(x)))
        scores: Tensor = self.head(x.mean((2, 3)))
        return scores


def tiny_network(seed: int = 7) -> nn.Module:
    """The network with fixed weights, none of them trivial; others for another ``seed``."""
    network, generator = TinyNetwork(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in network.state_dict().items():
            if tensor.is_floating_point():
                drawn = torch.rand(tensor.shape, generator=generator)
                positive = "running_var" in name or ("bn" in name and "weight" in name)
                tensor.copy_(0.5 + drawn if positive else (2 * drawn - 1) * (2.0 if "head" in name else 0.5))
    return network.eval()


def rows(count: int, seed: int = 0) -> Tensor:
    """Inputs ``[count, 3, 8, 8]`` in [0, 0.9], of a brightness and contrast that depend on ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    low, high = torch.rand(2, generator=generator).mul(0.45).add(torch.tensor([0.0, 0.45])).tolist()
    x: Tensor = low + (high - low) * torch.rand(count, 3, 8, 8, generator=generator)
    return x


def write_weights(folder: Path, seed: int = 7, model: str = MODEL) -> None:
    """Writes the model's weights file into ``folder``."""
    safetensors.torch.save_file(tiny_network(seed).state_dict(), folder / f"{model}.safetensors")


def write_config(folder: Path, *models: str, **sections: Any) -> Path:
    """Writes the weights and a config file of ``models``, by default :data:`MODEL`, into ``folder``; ``sections``
    replace the config's own."""
    names = models or (MODEL,)
    for name in names:
        write_weights(folder, model=name)
    config: dict[str, Any] = {
        "models": {
            name: {
                "factory": "tests.serving:TinyNetwork",
                "weights": f"{name}.safetensors",
                "input": {"shape": [3, 8, 8]},
                "classes": list(CLASSES),
                "policies": {"tent": {"lr": LR}},
            }
            for name in names
        },
        "server": {"device": "cpu"},
        "monitor": {"shadow_ratio": 0.5},
        "state": {"folder": None},
        "guard": {"enabled": False},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config | sections), encoding="utf-8")
    return path


def load(folder: Path, *models: str) -> Loaded:
    """The tiny model, or several of it, from a config written into ``folder``."""
    settings = load_settings(write_config(folder, *models))
    return settings, app.load_models(settings)


def loader(loaded: Loaded) -> Load:
    """Loads a model again from its files, as the server does, but does not try all policies on it once more."""
    settings, models = loaded
    return lambda name: replace(load_model(name, settings, CPU), reports=models[name].reports)


def varied(settings: Settings, **sections: Mapping[str, Any]) -> Settings:
    """The settings with some of their values replaced, as ``limits={"queue": 2}``."""
    changes = {
        name: Settings.model_fields[name].annotation.model_validate({**getattr(settings, name).model_dump(), **values})  # type: ignore[union-attr]  # a section
        for name, values in sections.items()
    }
    return settings.model_copy(update=changes)


class Gate:
    """A place where a thread stops until it is let through."""

    def __init__(self) -> None:
        self._entered, self._open = threading.Event(), threading.Event()

    def pass_through(self) -> None:
        """Called by the thread to be held."""
        self._entered.set()
        assert self._open.wait(TIMEOUT), "nobody opened the gate"

    def reached(self) -> None:
        """Returns once a thread is held here."""
        assert self._entered.wait(TIMEOUT), "nobody came to the gate"

    async def reached_soon(self) -> None:
        """The same, without holding the event loop."""
        await asyncio.to_thread(self.reached)

    def open(self) -> None:
        """Lets everybody through, now and later."""
        self._open.set()


def let_pass(runner: Runner, seconds: float) -> None:
    """Puts the runner's clock forward: what waits now has waited for so long."""
    clock = runner._clock
    runner._clock = lambda: clock() + seconds


class Ending:
    """A job's ``done``: keeps what it was called with, and every call."""

    def __init__(self, order: list[Ending] | None = None) -> None:
        self.calls: list[tuple[Answer | None, Exception | None]] = []
        self._over, self._order = threading.Event(), order

    def __call__(self, answer: Answer | None, error: Exception | None) -> None:
        self.calls.append((answer, error))
        if self._order is not None:
            self._order.append(self)
        self._over.set()

    @property
    def over(self) -> bool:
        """Whether it was called."""
        return self._over.is_set()

    def answer(self) -> Answer:
        """The answer, once it is there."""
        answer, error = self._wait()
        assert error is None, error
        assert answer is not None, "a command's end"
        return answer

    def error(self) -> Exception:
        """The error, once it is there."""
        answer, error = self._wait()
        assert answer is None
        assert error is not None
        return error

    def ended(self) -> None:
        """Returns once a command is over."""
        assert self._wait() == (None, None)

    def _wait(self) -> tuple[Answer | None, Exception | None]:
        assert self._over.wait(TIMEOUT), "the job never ended"
        assert len(self.calls) == 1, "done was called more than once"
        return self.calls[0]


class StepList:
    """A recorder that keeps the steps."""

    def __init__(self) -> None:
        self.steps: list[StepStats] = []
        self.events: list[Event] = []

    def step(self, stats: StepStats) -> None:
        self.steps.append(stats)

    def request(self, call: Call) -> None:
        raise AssertionError("nothing here speaks HTTP")

    def event(self, event: Event) -> None:
        self.events.append(event)

    def results(self) -> list[str]:
        """The results of all jobs, in order."""
        return [job.result for stats in self.steps for job in stats.jobs]


@dataclass(frozen=True)
class Device:
    """A real runner with all that is below it, over the tiny model."""

    keeper: Keeper
    store: StateStore
    engine: Engine
    scheduler: Scheduler
    recorder: StepList
    runner: Runner

    def state(self, lane: Lane, stream: Stream) -> State:
        """A copy of a stream's state. For when the runner is idle."""
        return self.store.export(lane, stream)


def make_device(
    settings: Settings, models: Mapping[str, SourceModel], clock: Callable[[], float] = time.monotonic
) -> Device:
    """Wires a runner up as the server does; it is not started."""
    limits, state = settings.limits, settings.state
    slots, recorder = limits.slots or SLOTS, StepList()
    folder = None if state.folder is None else settings.folder / state.folder
    keeper = Keeper(SqliteStore(folder, state.snapshot_steps, state.snapshots))
    budget = Budget(slots, limits.device_bytes or 2**40, limits.host_bytes or 2**40)
    store = StateStore(budget, CPU, keeper, state.idle_seconds, recorder.event)
    engine = Engine(models, store, Monitor(settings.monitor.half_life), settings.monitor.shadow_ratio)
    scheduler = Scheduler(
        Bounds(limits.batch_rows or 64, slots, limits.queue_per_stream, limits.queue, limits.shed_share)
    )
    return Device(keeper, store, engine, scheduler, recorder, Runner(engine, scheduler, recorder, clock))


def stream_of(policy: Policy, id: str = "s") -> Stream:
    """A new stream of the tiny model."""
    return Stream(id, MODEL, policy, rng.stream_key(id), created=0.0)


def hold(runner: Runner) -> Gate:
    """Keeps the runner's thread from running anything until the gate is opened. It is held when this returns."""
    gate = Gate()
    runner.submit(Job(Stream("holder", MODEL, Tent(), 0, 0.0), lambda *_: None, command=gate.pass_through))
    gate.reached()
    return gate


def same_state(one: State, other: State) -> bool:
    """Whether two states are equal bit for bit."""
    pairs = [(one.weights, other.weights), (one.memory, other.memory)]
    return all(
        a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)
        for a, b in pairs
    )


class Impatient(Tenant):
    """Gives up on what hangs, so that the test fails and the next one runs."""

    async def predict(self, *arguments: Any, **named: Any) -> Reply:
        return await soon(super().predict(*arguments, **named))

    async def update(self, *arguments: Any, **named: Any) -> tuple[Stream, bool]:
        return await soon(super().update(*arguments, **named))

    async def reset(self, id: str) -> Stream:
        return await soon(super().reset(id))

    async def close(self, id: str, only: Stream | None = None) -> None:
        await soon(super().close(id, only))


async def soon(work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is not to take long."""
    async with asyncio.timeout(TIMEOUT):
        return await work


def start(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """The work as a task."""
    return asyncio.get_running_loop().create_task(work)


@dataclass(frozen=True)
class Bench:
    """A service over a running device."""

    service: Service
    device: Device

    @property
    def tenant(self) -> Tenant:
        """The one that there is without tokens."""
        return self.service.tenant("default")

    async def settled(self) -> None:
        """Returns when the device has nothing left to do and the loop knows about it."""
        async with asyncio.timeout(TIMEOUT):
            while not self.device.scheduler.idle:
                await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def waiting(self, count: int) -> None:
        """Returns when so many jobs are in the queue, however many turns of the loop that takes."""
        async with asyncio.timeout(TIMEOUT):
            while self.device.runner.waiting != count:
                await asyncio.sleep(0)

    async def hold(self) -> Gate:
        """Keeps the device from running anything until the gate is opened."""
        return await asyncio.to_thread(hold, self.device.runner)

    def state(self, stream: Stream) -> State:
        """A copy of the stream's state. For when the device is idle."""
        return self.device.state(stream.lane, stream)

    def streams(self) -> list[Stream]:
        """The open streams of all tenants."""
        return [stream for tenant in self.service._tenants.values() for stream in tenant.streams()]

    def check_nothing_left(self) -> None:
        """No request, timer, lease, misplaced slot, model's visitor or state of a stream that is gone."""
        assert self.device.scheduler.idle
        assert self.device.runner.waiting == 0
        opened = [one for tenant in self.service._tenants.values() for one in tenant._streams.values()]
        assert [one.flights for one in opened if one.flights] == []
        assert set(self.service.models._busy.values()) <= {0}
        timers = getattr(asyncio.get_running_loop(), "_scheduled")  # noqa: B009 - the loop's own list, not in its types
        assert [timer for timer in timers if not timer.cancelled() and "Dispatcher" in repr(timer)] == []
        self.device.store.check_integrity()
        for lane, states in self.device.store._lanes.items():
            assert not states.leased
            for stream in states.resident.keys() | states.host.keys():
                assert stream in self.streams(), "the state of a stream that is gone"
                assert stream.lane == lane, "a state that its stream does not find"


@asynccontextmanager
async def serving(loaded: Loaded, load: Load | None = None, **sections: Mapping[str, Any]) -> AsyncIterator[Bench]:
    """A running service with some settings replaced; afterwards nothing of it may be left over."""
    settings, models = loaded
    settings = varied(settings, **sections)
    device = make_device(settings, models)
    with patch.object(service, "Tenant", Impatient):
        access = Access(settings.auth, settings.folder)
        bench = Bench(Service(settings, models, device.runner, device.keeper, access, load or loader(loaded)), device)
        bench.service.begin()
        yield bench
    drained = await bench.service.drain()
    assert (drained.given_up, drained.unsaved) == (0, 0)
    await asyncio.sleep(0)  # the thread's last callbacks
    bench.check_nothing_left()
    assert [task for task in asyncio.all_tasks() if "TestRunner" not in repr(task)] == []


async def scores(work: Coroutine[Any, Any, Reply]) -> Tensor:
    """The scores of a prediction."""
    return (await work)[0].logits


def lost_exceptions() -> list[dict[str, Any]]:
    """A list that fills with whatever the event loop complains about."""
    lost: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: lost.append(context))
    return lost


def unexpected(outcomes: list[Any]) -> list[Exception]:
    """Of the outcomes of tasks, the errors that are none of ours."""
    return [one for one in outcomes if isinstance(one, Exception) and not isinstance(one, TtaError)]
