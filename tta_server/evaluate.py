"""``tta-server evaluate``: how well policies do on a folder of labelled images, run by the server's own engine.

Each policy has one stream, which adapts continually over all domains without a reset; a batch is one request. All
policies get the same batches in the same order, in turn, so that what else the machine does falls on all of them alike.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

from adapters import Policy, rng
from tta_server.data import Domain, Labels, Rows, arrange, check_fit, gather, load_domains, to_inputs
from tta_server.drift.monitor import Monitor
from tta_server.engine.engine import Engine, initial_state
from tta_server.engine.source import SourceModel, choose_device, load_model
from tta_server.errors import ConfigError, StepFailed, TtaError
from tta_server.policies import load_plugins, make_policy, settings_of, starting_settings
from tta_server.settings import InputSettings, choose_model, load_settings, parse_value
from tta_server.state.memory import Budget
from tta_server.state.store import StateStore
from tta_server.types import Answer, Job, Lane, Plan, Stream

BASELINE = "source"
"""The policy whose time the others are compared with."""
MARKERS = "os^DvP*X<>"
"""Of the policies in the plot, in turn."""


@dataclass(frozen=True)
class EvaluateOptions:
    """What to evaluate. Paths are used as given; ``order`` is described at ``tta_server.data.arrange``."""

    config: Path
    data: Path
    policies: tuple[str, ...]
    batch_size: int
    order: str
    out: Path
    """A folder, made when missing; what an earlier run left there is overwritten."""
    limit: int | None = None
    """Rows used of each domain, the first ones of its file; ``None``: all."""
    domains: tuple[str, ...] = ()
    """In the order they are to be served in; none: the folder's default."""
    seed: int = 0
    """Of the order and of the streams' random keys. All policies get the same."""
    severity: int = 5
    model: str | None = None
    """May be left out for a config of one model."""
    passes: int = 1
    """How often the streams go through all domains, without a reset in between."""
    overrides: tuple[str, ...] = ()
    """Settings over those of the config: ``policy.setting=value``, or ``setting=value`` for all policies evaluated."""
    save_logits: bool = False
    """Writes ``logits_<policy>.npz``: by domain, the served scores ``[rows, classes]`` float32, in the row order of the
    domain's file (its first ``limit`` rows), whatever the order they were served in; those of the last pass."""


@dataclass(frozen=True)
class PolicyResult:
    """How one policy did. Errors in percent of rows; their mean is over domains."""

    mean_error: float
    per_domain: dict[str, float]
    per_pass: list[float]
    """Mean over domains, pass by pass."""
    seconds: float
    """In the engine: moving the input to the device, forward pass, adaptation and commit."""
    settings: dict[str, Any]


@dataclass(frozen=True)
class Results:
    """The content of ``results.json``."""

    policies: dict[str, PolicyResult]
    config: dict[str, Any]


def evaluate(options: EvaluateOptions, console: Console) -> Results:
    """Runs the policies, prints the table, and writes ``results.json``, ``errors.png`` and the scores if wanted.

    Raises a ``TtaError`` saying what does not fit, wherever possible before the run; ``StepFailed`` where a policy
    could not answer, with nothing written.
    """
    _check_plain(options)
    settings = load_settings(options.config)
    name = choose_model(settings, options.model)
    load_plugins()
    changes = {one: _overrides(one, options) for one in options.policies}
    policies = {one: make_policy(one, starting_settings(one, settings.models[name]) | changes[one]) for one in changes}
    domains = load_domains(options.data, options.domains, options.severity, options.limit)
    batches = arrange([domain.labels for domain in domains], options.order, options.batch_size, options.seed)
    device = choose_device(settings.server.device)
    model = load_model(name, settings, device)
    check_fit(domains, model.settings.input, model.source.num_classes)
    _make_folder(options.out)

    # Nothing is measured beside the answers: the source model's own pass would be counted as the policies' time.
    engine = Engine(
        {name: model}, StateStore(Budget(), device), Monitor(settings.monitor.half_life), 0.0, monitored=False
    )
    runs = [_Run(model, one, policy, options, domains) for one, policy in policies.items()]
    x = to_inputs(gather(domains, batches[0])[0], model.settings.input)
    for run in runs:
        run.warm_up(engine, x)
    _serve(runs, engine, domains, batches, options.passes, model.settings.input, console)

    config = {
        "config": str(options.config),
        "data": str(options.data),
        "order": options.order,
        "batch_size": options.batch_size,
        "seed": options.seed,
        "domains": [domain.name for domain in domains],
        "limit": options.limit,
        "passes": options.passes,
        "severity": options.severity,
        "model": name,
        "digest": model.digest,
        "torch": torch.__version__,
    }
    results = Results({run.name: run.result() for run in runs}, config)
    console.print(results_table(results, images=options.passes * sum(len(domain.labels) for domain in domains)))
    for run in runs:
        if run.unkept:
            steps = options.passes * len(batches)
            console.print(Text(f"{run.name}: {run.unkept} of {steps} steps could not be kept", "yellow"))
    (options.out / "results.json").write_text(json.dumps(asdict(results), indent=2) + "\n", encoding="utf-8")
    save_plot(results, options.out / "errors.png")
    if options.passes > 1:
        save_passes(results, options.out / "passes.png")
    for run in runs:
        if run.logits:
            np.savez_compressed(options.out / f"logits_{run.name}.npz", **run.logits)  # type: ignore[arg-type]  # numpy types the keywords as flags
    console.print(Text(f"written to {options.out}"))
    return results


def results_table(results: Results, images: int) -> Table:
    """Error in percent by domain and policy, their means, and the time for ``images`` served images."""
    table = Table(title="error in percent")
    table.add_column("domain")
    for name in results.policies:
        table.add_column(name, justify="right")
    columns = list(results.policies.values())
    for domain in results.config["domains"]:
        table.add_row(domain, *(f"{one.per_domain[domain]:.2f}" for one in columns))
    table.add_section()
    if results.config["passes"] > 1:
        for index in range(results.config["passes"]):
            table.add_row(f"pass {index + 1}", *(f"{one.per_pass[index]:.2f}" for one in columns))
        table.add_section()
    table.add_row("mean", *(f"{one.mean_error:.2f}" for one in columns), style="bold")
    table.add_row("seconds per 1,000 images", *(f"{1000 * one.seconds / images:.3f}" for one in columns))
    base = results.policies.get(BASELINE)
    ratios = ("-" if base is None else f"{one.seconds / base.seconds:.2f}" for one in columns)
    table.add_row(f"time / {BASELINE}", *ratios)
    return table


def save_plot(results: Results, path: Path) -> None:
    """A picture of the error by domain, one line per policy, with the means in the legend."""
    from matplotlib.figure import Figure

    domains = results.config["domains"]
    figure = Figure(figsize=(max(6.0, 2.5 + 0.55 * len(domains)), 4.8), layout="constrained")
    axes = figure.subplots()
    for index, (name, result) in enumerate(results.policies.items()):
        axes.plot(
            range(len(domains)),
            [result.per_domain[domain] for domain in domains],
            marker=MARKERS[index % len(MARKERS)],
            linewidth=1,
            markersize=6,
            label=f"{name} (mean {result.mean_error:.2f} %)",
        )
    axes.set_xticks(range(len(domains)), domains, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_ylabel("error, percent")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{results.config['model']}, order {results.config['order']}, batch {results.config['batch_size']}")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=150)


def save_passes(results: Results, path: Path) -> None:
    """A picture of the mean error by pass over all domains, one line per policy."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.8), layout="constrained")
    axes = figure.subplots()
    passes = range(1, results.config["passes"] + 1)
    for index, (name, result) in enumerate(results.policies.items()):
        axes.plot(passes, result.per_pass, marker=MARKERS[index % len(MARKERS)], linewidth=1, label=name)
    axes.set_xlabel("pass over all domains, without a reset")
    axes.set_ylabel("mean error, percent")
    axes.set_ylim(bottom=0)
    axes.set_title(f"{results.config['model']}, order {results.config['order']}, batch {results.config['batch_size']}")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=150)


class _Run:
    """One policy's stream and its score so far."""

    def __init__(
        self, model: SourceModel, name: str, policy: Policy, options: EvaluateOptions, domains: list[Domain]
    ) -> None:
        self.name, self._model, self._policy, self._domains = name, model, policy, domains
        self._lane = Lane(model.name, policy)
        self._random_key = rng.stream_key("evaluate", options.seed)
        self._stream = self._new_stream()
        self._seconds = 0.0
        self._wrong: NDArray[np.int64] = np.zeros((options.passes, len(domains)), np.int64)
        self.unkept = 0
        """Steps whose outcome the engine refused: not finite, or failed."""
        self.logits = {
            one.name: np.empty((len(one.labels), model.source.num_classes), np.float32)
            for one in domains
            if options.save_logits
        }
        """By domain, ``[rows, classes]`` in row order of its file; empty unless wanted."""

    def warm_up(self, engine: Engine, x: Tensor) -> None:
        """One step outside the clock, by a stream of its own. Raises ``ConfigError`` where policy and model differ."""
        try:
            initial_state(self._policy, self._model)
        except ValueError as error:
            raise ConfigError(f"policy {self.name!r} cannot run on model {self._model.name!r}: {error}") from error
        stream = self._new_stream()
        self._request(engine, stream, x)
        engine.drop(stream.lane, stream)

    def serve(self, engine: Engine, turn: int, batch: Rows, x: Tensor, labels: Labels) -> None:
        """One request of the pass ``turn``: the rows ``batch [B, 2]`` with inputs ``x [B, ...]`` and ``labels [B]``."""
        started = time.perf_counter()
        answer, kept = self._request(engine, self._stream, x)
        self._seconds += time.perf_counter() - started
        self.unkept += not kept
        logits = answer.logits.numpy()
        missed = logits.argmax(1) != labels
        self._wrong[turn] += np.bincount(batch[missed, 0], minlength=len(self._domains))
        if self.logits:
            for index in np.unique(batch[:, 0]):
                here = batch[:, 0] == index
                self.logits[self._domains[index].name][batch[here, 1]] = logits[here]

    def result(self) -> PolicyResult:
        """The errors over all rows served so far, which should be all rows there are."""
        errors = 100.0 * self._wrong / [len(domain.labels) for domain in self._domains]
        names = (domain.name for domain in self._domains)
        return PolicyResult(
            mean_error=float(errors.mean()),
            per_domain=dict(zip(names, errors.mean(0).tolist(), strict=True)),
            per_pass=errors.mean(1).tolist(),
            seconds=self._seconds,
            settings=settings_of(self._policy),
        )

    def _new_stream(self) -> Stream:
        return Stream(self.name, self._model.name, self._policy, self._random_key, created=time.time())

    def _request(self, engine: Engine, stream: Stream, x: Tensor) -> tuple[Answer, bool]:
        """The answer, and whether all was kept that the step had to keep."""
        answers: list[Answer | TtaError] = []
        job = Job(stream, lambda *_: None, self._lane, x)
        stats = engine.step(Plan(self._lane, [job]), lambda _, answer: answers.append(answer))
        (answer,) = answers
        if isinstance(answer, TtaError):
            raise StepFailed(f"policy {self.name!r} did not answer: {answer}")
        return answer, stats.jobs[0].result in ("applied", "none")


def _serve(
    runs: list[_Run],
    engine: Engine,
    domains: list[Domain],
    batches: list[Rows],
    passes: int,
    spec: InputSettings,
    console: Console,
) -> None:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=passes * len(batches) * len(runs))
        for turn, batch in ((turn, batch) for turn in range(passes) for batch in batches):
            images, labels = gather(domains, batch)
            x = to_inputs(images, spec)
            names = {domains[index].name for index in np.unique(batch[:, 0])}
            where = names.pop() if len(names) == 1 else "mixed"
            for run in runs:
                progress.update(task, description=f"{where}, {run.name}")
                run.serve(engine, turn, batch, x, labels)
                progress.advance(task)


def _overrides(policy: str, options: EvaluateOptions) -> dict[str, Any]:
    """The settings that ``options.overrides`` has for a policy. Raises ``ConfigError`` for one that cannot be read."""
    found = {}
    for override in options.overrides:
        place, equals, value = override.partition("=")
        owner, dot, setting = place.rpartition(".")
        if not equals or not setting or (dot and owner not in options.policies):
            raise ConfigError(
                f"a setting is given as policy.setting=value or setting=value, with one of the policies evaluated; "
                f"got {override!r}"
            )
        if not dot or owner == policy:
            found[setting] = parse_value(value)
    return found


def _check_plain(options: EvaluateOptions) -> None:
    """Raises ``ConfigError`` for what needs no file to be seen to be wrong, and for a missing matplotlib."""
    if not options.policies:
        raise ConfigError("name at least one policy to evaluate")
    if repeated := [name for name in options.policies if options.policies.count(name) > 1]:
        raise ConfigError(f"the policy {repeated[0]!r} is named twice")
    if options.batch_size < 1:
        raise ConfigError(f"the batch size must be at least 1, got {options.batch_size}")
    if options.passes < 1:
        raise ConfigError(f"the number of passes must be at least 1, got {options.passes}")
    if options.seed < 0:
        raise ConfigError(f"the seed must not be negative, got {options.seed}")
    try:
        import matplotlib.figure  # noqa: F401  asked for here, before minutes are spent on what it is to draw
    except ImportError as error:
        raise ConfigError("evaluate draws with matplotlib: pip install 'tta-server[plot]'") from error


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot make the output folder {path}: {error}") from error
