"""The laws of docs/architecture.md, for every registered policy: what the server relies on, whatever the algorithm.

A new policy is run with its defaults at once; give it an entry in ``VARIANTS`` (``networks.py``) for its other settings
and an oracle in ``oracles.py``, without which law 8 fails.
"""

from __future__ import annotations

import dataclasses
import gc
import random
import weakref
from collections.abc import Callable, Mapping

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import adapters
from adapters import serving
from adapters.base import Batch, Norm, Output, Scope, Segments, State, Step, Tensors
from adapters.rng import Random, stream_key
from tests.adapters.networks import (
    CASES,
    CLASSES,
    IMAGES,
    SHAPES,
    Case,
    Server,
    assert_close,
    assert_same,
    drive,
    flat,
    join,
    make_batch,
    run,
    run_raw,
    variants_of,
)
from tests.adapters.oracles import ORACLES, VARIANTS, make_oracle
from tta_server.engine.norm import Pass
from tta_server.errors import StepFailed
from tta_server.types import Answer

SEEDS = (0, 1)
SIZES = ((1, 4, 7), (5, 1, 1, 3), (2, 6))
"""Rows per stream of one merged batch."""


every_case = pytest.mark.parametrize("case", CASES, ids=str)
every_seed = pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"seed{seed}")
every_size = pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: "rows" + "_".join(map(str, sizes)))


@pytest.mark.parametrize("name", adapters.policies())
def test_every_policy_is_covered(name: str) -> None:
    """No registered policy and none of its variants escapes the laws by running on no network of ours."""
    for variant in variants_of(name):
        assert any(case.policy.name == name and case.variant == variant for case in CASES), (
            f"policy {name!r} ({variant}) runs on none of {', '.join(SHAPES | IMAGES)}: add a network to "
            "networks.py that has what it needs"
        )


def test_variants_name_registered_policies() -> None:
    """A policy that was renamed or dropped leaves no entry behind that silently tests nothing."""
    assert VARIANTS.keys() <= adapters.policies().keys()
    assert ORACLES.keys() <= adapters.policies().keys()
    assert variants_of("a policy of tomorrow") == {"defaults": {}}


@every_case
@every_seed
@every_size
def test_isolation(case: Case, seed: int, sizes: tuple[int, ...]) -> None:
    """Law 1: a batch of S streams equals S batches of one, in answers, states and signals, over several steps."""
    merged, alone = case.init(len(sizes)), case.init(len(sizes))
    for step in range(3):
        inputs = case.inputs(seed, step, sizes)
        together = run(case.policy, case.subject, merged, inputs, steps=[step] * len(sizes))
        for index, x in enumerate(inputs):
            own = run(case.policy, case.subject, [alone[index]], [x], _keys(index), [step])
            torch.testing.assert_close(together.logits[index], own.logits[0], rtol=1e-9, atol=1e-10)
            assert_close(flat(together.states[index]), flat(own.states[0]))
            assert together.signals[index] == pytest.approx(own.signals[0], rel=1e-9, abs=1e-10)
            alone[index] = own.states[0]
        merged = together.states


@every_case
@every_seed
@every_size
def test_permutation(case: Case, seed: int, sizes: tuple[int, ...]) -> None:
    """Law 2: the order of the streams in a batch changes nothing for any of them."""
    states, inputs = case.warm(seed, sizes), case.inputs(seed, 2, sizes)
    order = random.Random(seed).sample(range(len(sizes)), len(sizes))
    order = order if order != sorted(order) else order[::-1]
    straight = run(case.policy, case.subject, states, inputs, _keys(*range(len(sizes))))
    shuffled = run(case.policy, case.subject, [states[i] for i in order], [inputs[i] for i in order], _keys(*order))
    for place, index in enumerate(order):
        torch.testing.assert_close(shuffled.logits[place], straight.logits[index], rtol=1e-9, atol=1e-10)
        assert_close(flat(shuffled.states[place]), flat(straight.states[index]))
        assert shuffled.signals[place] == pytest.approx(straight.signals[index], rel=1e-9, abs=1e-10)


@every_case
@every_seed
def test_purity(case: Case, seed: int) -> None:
    """Law 3: a step changes none of its inputs nor the source, and the same call gives the same result bit for bit."""
    state, inputs = join(case.warm(seed, (3, 1, 5))), case.inputs(seed, 2, (3, 1, 5))
    batch = make_batch(case.policy, case.subject, inputs)
    watched = {"x": batch.x} | {f"source/{key}": value for key, value in case.subject.source.weights.items()}
    watched |= flat(state)
    before = {key: value.clone() for key, value in watched.items()}
    first_logits, first = drive(case.policy, case.subject, state, batch)
    assert_same(before, watched)
    again_logits, again, _ = run_raw(case.policy, case.subject, state, inputs)
    assert_same({"logits": first_logits}, {"logits": again_logits})
    assert_same(flat(first.state), flat(again.state))
    assert_same(first.signals, again.signals)


@every_case
@every_size
def test_shape_stability(case: Case, sizes: tuple[int, ...]) -> None:
    """Law 4: keys, shapes and dtypes of the state stay what ``init`` made them; logits and signals have their shape."""
    fresh = flat(case.subject.init(case.policy))
    state = join(case.init(len(sizes)))
    for key, value in fresh.items():
        assert len(value) == 1, f"{key}: init gives the state of one stream, [1, ...]"
    for step in range(3):
        logits, result, segments = run_raw(case.policy, case.subject, state, case.inputs(0, step, sizes))
        assert logits.shape == (segments.rows, CLASSES)
        assert logits.dtype == torch.float64
        state = result.state
        assert flat(state).keys() == fresh.keys()
        for key, value in flat(state).items():
            assert value.shape == (len(sizes), *fresh[key].shape[1:]), key
            assert value.dtype == fresh[key].dtype, key
        for name, value in result.signals.items():
            assert value.shape == (len(sizes),), name


@every_case
def test_state_overrides_what_its_scope_says(case: Case) -> None:
    """The weights of a state are weights of the source, and those of norm layers alone where the scope says so."""
    source, state = case.subject.source, case.subject.init(case.policy)
    allowed = {
        Scope.NONE: set[str](),
        Scope.NORM: {*source.affine, *source.statistics},
        Scope.ALL: {*source.weights},
    }[case.policy.scope]
    assert state.weights.keys() <= allowed
    for key, value in state.weights.items():
        assert value.shape[1:] == source.weights[key].shape, key


@every_case
@every_seed
def test_round_trip(case: Case, seed: int) -> None:
    """Law 5: a state that was written out as bytes and restored on another server has the same future, bit for bit."""
    here, there = Server(case.policy, case.subject), Server(case.policy, case.subject, slots=3)
    names, sizes = ("a", "b", "c"), (2, 5, 1)
    for step in range(3):
        here.logits(dict(zip(names, case.inputs(seed, step, sizes), strict=True)))
    for name in names:
        state = here.state(name)
        there.store.add_lane(there.lane, case.subject.init(case.policy))
        there.store.restore(there.lane, there.stream(name), _through_bytes(state), here.stream(name).version)
    for step in range(3, 6):
        inputs = dict(zip(names, case.inputs(seed, step, sizes), strict=True))
        assert_same(here.logits(inputs), there.logits(inputs))
    for name in names:
        assert_same(flat(here.state(name)), flat(there.state(name)))
        assert here.stream(name).version == there.stream(name).version


@every_case
@every_seed
def test_reset_makes_a_new_stream(case: Case, seed: int) -> None:
    """Law 6: after a reset a stream is as new (weights, moments, counters, draws), and no other one notices."""
    used, fresh = Server(case.policy, case.subject), Server(case.policy, case.subject)
    for step in range(3):
        used.logits({"a": case.inputs(seed, step, (4,))[0], "b": case.inputs(seed, step + 10, (2,))[0]})
    bystander = flat(used.state("b"))
    used.engine.reset(used.lane, used.lane, used.stream("a"))
    assert used.stream("a").version == 0
    assert_same(flat(used.state("a")), flat(case.subject.init(case.policy)))
    assert_same(flat(used.state("b")), bystander)
    for step in range(3):
        inputs = {"a": case.inputs(seed, step + 20, (3,))[0]}
        assert_same(used.logits(inputs), fresh.logits(inputs))
    assert_same(flat(used.state("a")), flat(fresh.state("a")))


@every_case
@pytest.mark.parametrize("whole", [True, False], ids=["all_nan", "one_nan"])
def test_poisoned_stream_harms_itself_only(case: Case, whole: bool) -> None:
    """Law 7, through engine and store: a stream that sends NaN gets an error and stays at its version, bit for bit; the
    streams in its batch get what they would have got in sound company."""
    sound, poisoned = Server(case.policy, case.subject), Server(case.policy, case.subject)
    sizes = (3, 2, 4)
    for step in range(2):
        inputs = dict(zip("abc", case.inputs(0, step, sizes), strict=True))
        sound.logits(inputs)
        poisoned.logits(inputs)
    before, version = flat(poisoned.state("b")), poisoned.stream("b").version
    inputs = dict(zip("abc", case.inputs(0, 2, sizes), strict=True))
    expected = sound.logits(inputs)
    bad = inputs["b"].clone()
    if whole:
        bad[:] = torch.nan
    else:
        bad[1].view(-1)[0] = torch.nan
    answers = poisoned.step(inputs | {"b": bad})

    assert isinstance(answers["b"], StepFailed)
    assert poisoned.stats["b"].result == "rejected_nonfinite"
    assert poisoned.stream("b").version == version
    assert_same(flat(poisoned.state("b")), before)
    for name in "ac":
        answer = answers[name]
        assert isinstance(answer, Answer)
        assert_same({name: answer.logits}, {name: expected[name]})
        assert_same(flat(poisoned.state(name)), flat(sound.state(name)))
        assert poisoned.stream(name).version == sound.stream(name).version
    again = case.inputs(0, 3, sizes)[1]
    alone = run(case.policy, case.subject, [_unflat(before)], [again], [stream_key("b")], [version])
    torch.testing.assert_close(poisoned.logits({"b": again})["b"], alone.logits[0], rtol=1e-9, atol=1e-10)


@every_case
def test_poisoned_state_harms_itself_only(case: Case) -> None:
    """Law 7, in the policy: a stream whose state is broken leaves its neighbours' answers and states as they are."""
    sizes = (3, 2, 4)
    states, inputs = case.warm(0, sizes), case.inputs(0, 2, sizes)
    broken = State(
        {key: torch.full_like(value, torch.nan) for key, value in states[1].weights.items()},
        {
            key: torch.full_like(value, torch.nan) if value.is_floating_point() else value
            for key, value in states[1].memory.items()
        },
    )
    sound = run(case.policy, case.subject, states, inputs)
    poisoned = run(case.policy, case.subject, [states[0], broken, states[2]], inputs)
    for index in (0, 2):
        assert_same({"logits": poisoned.logits[index]}, {"logits": sound.logits[index]})
        assert_same(flat(poisoned.states[index]), flat(sound.states[index]))
        assert poisoned.signals[index] == sound.signals[index]


@every_case
@every_seed
def test_oracle(case: Case, seed: int) -> None:
    """Law 8: over 20 merged, ragged steps every stream equals its own plain torch model under the same equations.

    Through the real engine and a store with fewer slots than streams, so leases, evictions and shadows are in it too.
    """
    if case.policy.name not in ORACLES:
        pytest.fail(
            f"policy {case.policy.name!r} has no oracle: write a slow, independent, one-model-per-stream version of it "
            "straight from the equations, in a module of tests/adapters/oracles"
        )
    choice = random.Random(seed)
    server = Server(case.policy, case.subject, slots=3, shadow_ratio=0.5)
    names = ("a", "b", "c", "d")
    artefacts = case.subject.source.artefacts
    models = {name: make_oracle(case.policy.name, case.subject.plain, case.policy, artefacts) for name in names}
    moved = 0.0
    for step in range(20):
        present = choice.sample(names, choice.randint(1, 3))
        sizes = tuple(choice.randint(1, 7) for _ in names)
        requests = dict(zip(names, case.inputs(seed, step, sizes), strict=True))
        versions = {name: server.stream(name).version for name in present}
        answers = server.logits({name: requests[name] for name in present})
        for name in present:
            key, version = torch.tensor([stream_key(name)]), torch.tensor([versions[name]])
            expected = models[name].step(requests[name], Random(key, version, torch.float64))
            torch.testing.assert_close(answers[name], expected, rtol=1e-8, atol=1e-8)
            with torch.no_grad():
                moved = max(moved, float((expected - case.subject.plain(requests[name])).abs().max()))
    for name in names:
        assert server.stream(name).requests >= 3, "the streams must have a history to compare"
        state = {key: value[0] for key, value in flat(server.state(name)).items()}
        assert_close(state, models[name].state(), rtol=1e-7, atol=1e-8)
        assert server.stream(name).version == (server.stream(name).requests if state else 0)
    if case.policy.norm.weight:
        assert moved > 0.01, "the policy must have made a difference for this to test anything"


@every_case
def test_yields_once(case: Case) -> None:
    """Law 9: a step yields the logits, then returns its step; whoever stops listening in between breaks nothing."""
    state, batch = join(case.warm(0, (3, 2))), make_batch(case.policy, case.subject, case.inputs(0, 2, (3, 2)))
    running = serving.step(case.policy, case.subject.source, state, batch)
    assert next(running).shape == (5, CLASSES)
    with pytest.raises(StopIteration) as end:
        next(running)
    assert isinstance(end.value.value, Step)

    expected, _, _ = run_raw(case.policy, case.subject, state, case.inputs(0, 2, (3, 2)))
    abandoned = serving.step(case.policy, case.subject.source, state, batch)
    next(abandoned)
    abandoned.close()
    after, _, _ = run_raw(case.policy, case.subject, state, case.inputs(0, 2, (3, 2)))
    assert_same({"logits": expected}, {"logits": after})


@every_case
@pytest.mark.parametrize("finish", [True, False], ids=["finished", "shed"])
def test_no_leak(case: Case, finish: bool) -> None:
    """Law 10: once a step is over, or was given up after its answer, nothing of it lives on but what it returned.

    Watched are every layer's output, every tensor saved for a backward pass and the engine's own ``Pass``.
    """
    state, inputs = join(case.warm(0, (3, 2))), case.inputs(0, 2, (3, 2))
    gc.freeze()  # what is there already need not be looked through again below
    watched: list[Callable[[], object]] = []
    passes: list[Callable[[], object]] = []

    class Saved:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()  # its graph would make a cycle through this object

    def pack(tensor: Tensor) -> Saved:
        saved = Saved(tensor)
        watched.append(weakref.ref(saved))
        return saved

    def seen(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        watched.append(weakref.ref(output))

    def run(weights: Mapping[str, Tensor], x: Tensor, segments: Segments, norm: Norm) -> Output:
        now = Pass(segments, weights, norm)
        passes.append(weakref.ref(now))
        return network.run(now, x)

    network = case.subject.model.network
    hooks = [module.register_forward_hook(seen) for module in network._network.modules()]
    given = make_batch(case.policy, case.subject, inputs)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            batch = dataclasses.replace(given, network=run)
            logits, step = drive(case.policy, case.subject, state, batch) if finish else _give_up(case, state, batch)
    finally:
        for hook in hooks:
            hook.remove()
        gc.collect()
        gc.unfreeze()
    assert watched
    assert passes
    kept = {id(logits)} | {id(value) for value in flat(step.state).values()}
    alive = [one() for one in watched if one() is not None and id(one()) not in kept]
    assert not alive, f"{len(alive)} of {len(watched)} tensors outlive the step"
    assert all(one() is None for one in passes), "the engine's Pass outlives the step"
    returned = {"logits": logits} | flat(step.state) | step.signals
    for key, value in returned.items():
        assert not value.requires_grad, key
        assert value.grad_fn is None, key
    for key, value in case.subject.source.weights.items():
        assert value.grad is None, f"{key}: the source's weights collect no gradients"


def _give_up(case: Case, state: State, batch: Batch) -> tuple[Tensor, Step]:
    """Runs a step to its answer only, as under pressure; the state stays what it was."""
    running = serving.step(case.policy, case.subject.source, state, batch)
    logits = next(running)
    running.close()
    return logits, Step(state)


def _keys(*streams: int) -> list[int]:
    """Random keys by stream, as ``make_batch`` gives them by place."""
    return [stream_key(f"stream-{index}") for index in streams]


def _through_bytes(state: State) -> State:
    """Written out with safetensors and read back."""
    tensors = safetensors.torch.load(safetensors.torch.save({k: v.contiguous() for k, v in flat(state).items()}))
    return _unflat(tensors)


def _unflat(tensors: Tensors) -> State:
    state = State({}, {})
    for key, value in tensors.items():
        kind, _, name = key.partition("/")
        (state.weights if kind == "weights" else state.memory)[name] = value
    return state
