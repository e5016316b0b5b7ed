"""Report cards: what each policy does to a model's accuracy, on streams made of the user's own clean labelled images.

Eight scenarios, each a stream of its own: the images as they are and damaged (:data:`CORRUPTED`, one after the other),
each in mixed order (:data:`MIXED`), sorted by label, in requests of 1 to 4 rows, and poisoned: with as many rows of an
attacker's in every request as there are others, of uniform noise. Every policy answers each of them twice by the
server's own engine, alone and under the guard, and the source answers the same rows.

A *gain* is the policy's accuracy less the source's on the same rows. Rows of one request are answered by one set of
statistics, so its interval takes requests for independent, not rows. With ``d_r`` more rows right in request ``r`` of
``R``, of ``n_r`` rows, ``N = sum n_r``, and ``g_r`` the gain of the request's part of the stream, of which there are
``P`` (one for each corruption):

    gain = sum d_r / N,    variance = R / (R - P) sum (d_r - g_r n_r)^2 / N^2,

and Student's t of ``R - P`` degrees. A difference is *called* better or worse where the interval at 95 % for all
scenarios together (Bonferroni) leaves out zero; verdicts are made of what is called, and of nothing else.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import NormalDist
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from torch import Tensor

import adapters
from adapters import Policy, rng
from tta_server.damage import CLEAN, Damage
from tta_server.data import SourceImages, to_inputs
from tta_server.drift.benefit import GROUP as BENEFIT
from tta_server.drift.monitor import Monitor
from tta_server.engine.engine import Engine
from tta_server.engine.guarding import make_guard
from tta_server.engine.report import policy_report
from tta_server.engine.source import SourceModel
from tta_server.errors import ConfigError, TtaError, UnknownName
from tta_server.policies import make_policy, policy_digest, settings_of, starting_settings
from tta_server.settings import GuardSettings, MonitorSettings
from tta_server.state.memory import Budget
from tta_server.state.store import StateStore
from tta_server.types import Answer, Job, Lane, Plan, Stream

log = logging.getLogger(__name__)

Rows = NDArray[np.int64]
SOURCE = "source"

CORRUPTED = (Damage("noise", 0.6), Damage("motion", 0.6), Damage("fog", 0.6))
"""Severities between those that the guard's judge learned from (``damage.SEVERITIES``)."""
CONDITIONS = {"clean": (Damage(CLEAN, 0.0),), "corrupted": CORRUPTED}
MIXED = "mixed"
ORDERS = (MIXED, "sorted", "small", "poisoned")
SCENARIOS = tuple(f"{condition} {order}" for order in ORDERS for condition in CONDITIONS)
DRIFTED = f"corrupted {MIXED}"
"""Where adaptation is to help."""
LEAST_IMAGES = 96
REQUEST_ROWS = 32
"""Rows of a request, where there are images for :data:`REQUESTS` of them; but for the small ones."""
REQUESTS = 12
SMALL = 4
"""Most rows of a small request."""
CONFIDENCE = 0.95

Verdict = Literal["helps", "guard-needed", "harms", "unclear"]
"""See :func:`verdict_of`."""
Difference = Literal["better", "worse", "none"]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class Gain(_Entry):
    """A policy against the source on one scenario."""

    accuracy: float
    """Share of the rows answered rightly."""
    gain: float
    """That less the source's."""
    low: float
    """Lower end of the gain's 95 % interval."""
    high: float
    """Upper end."""
    difference: Difference
    """`better` or `worse` than the source, or `none` beyond chance, over all scenarios together."""
    unanswered: int
    """Rows whose request failed; they count as wrong."""


class Scenario(_Entry):
    """One scenario: a stream of requests."""

    rows: int
    requests: int
    source: float
    """Accuracy of the source."""
    alone: Gain
    """The policy without a guard."""
    guarded: Gain
    """The policy under the guard."""
    served: float
    """Under the guard, share of the rows in requests that were answered by the adapted model, wholly or in part."""


class PolicyCard(_Entry):
    """What is to be said of one policy on one model."""

    verdict: Verdict
    """`helps`, `guard-needed`, `harms`, or `unclear`; the rule is in docs/policies.md."""
    sentence: str
    """Why."""
    made: str
    """When, ISO 8601."""
    settings: dict[str, Any]
    """Of the policy, as tried. A stream with others is not what this is about."""
    digest: str
    """Hex SHA-256 of the policy's name and settings."""
    scenarios: dict[str, Scenario]
    """By name: the images' condition (`clean`, `corrupted`) and how they came (`mixed`, `sorted`, `small`,
    `poisoned`)."""


class Basis(_Entry):
    """What the figures of a card rest on, beside the policies."""

    model: str
    digest: str
    """Of the model."""
    guard: dict[str, Any]
    """The guard's settings."""
    judge: str
    """When the judge of the benefit was made that the guard used; `rule of thumb` where none was."""
    judge_images: int
    """Of the card's images, how many the judge was made from, too."""
    data: str
    data_digest: str
    images: int
    """Held out of what was loaded; each scenario has every one of them once."""
    seed: int
    request_rows: int
    corrupted: list[str]
    poison: Literal["noise"]
    """The attacker's rows: uniform noise."""


class Card(_Entry):
    """The content of the file."""

    format: Literal[1]
    basis: Basis
    policies: dict[str, PolicyCard]

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all. Raises ``ConfigError`` where it cannot be written."""
        _write(path, lambda unfinished: unfinished.write_text(f"{self.model_dump_json(indent=1)}\n", encoding="utf-8"))


@dataclass(frozen=True)
class CardOptions:
    """``policies``: names; none: all that run on the model. ``images``: most that a scenario has."""

    policies: tuple[str, ...] = ()
    images: int = 384
    seed: int = 0
    judge_images: int = 0
    """How many of the loaded images the judge is made from, see ``prepare.PrepareOptions.benefit_images``."""


class Request(NamedTuple):
    """Inputs ``x [N, ...]`` and ``labels [N]``: -1 for an attacker's row, whose answer does not count."""

    x: Tensor
    labels: Rows
    part: int
    """Which of its stream's corruptions it has."""


class Outcome(NamedTuple):
    """Of a stream's requests, each ``[R]``: their part of the stream, rows that count, rows answered rightly; and in
    all: rows served by the adapted model, and rows that got no answer."""

    parts: Rows
    rows: Rows
    right: Rows
    served: int
    unanswered: int


def card_path(artefacts: Path) -> Path:
    """Where the card of a model is, or goes: beside its artefacts file; the plot has the ending ``.png``."""
    return artefacts.with_name(f"{artefacts.name.removesuffix('.safetensors').removesuffix('.artefacts')}.report.json")


def check(options: CardOptions, model: SourceModel, data: SourceImages) -> None:
    """Raises a ``TtaError`` for a card that cannot be made, as far as can be seen before anything is computed."""
    known = adapters.policies()
    for name in options.policies:
        if name not in known:
            raise UnknownName(f"no policy {name!r}; there are: {', '.join(sorted(known))}")
        if known[name].plain:
            raise ConfigError(f"a report card compares policies with the plain model, and {name!r} is no other")
    if len(model.settings.input.shape) != 3:
        shape = list(model.settings.input.shape)
        raise ConfigError(f"a report card damages images [channels, height, width], and the inputs are {shape}")
    if not data.has_labels:
        raise ConfigError(f"a report card needs labels, and the images of {data.name} have none")
    if min(options.images, len(data) // 2) < LEAST_IMAGES:
        raise ConfigError(
            f"a report card needs at least {2 * LEAST_IMAGES} clean images, half of them for its streams, and there "
            f"are {len(data)} in {data.name}"
        )
    try:
        import matplotlib.figure  # noqa: F401  asked for here, before minutes are spent on what it is to draw
    except ImportError as error:
        raise ConfigError("the report card is drawn with matplotlib: pip install 'tta-server[plot]'") from error


def make_card(
    model: SourceModel, data: SourceImages, guard: GuardSettings, options: CardOptions, path: Path, console: Console
) -> Card:
    """Runs the policies, prints the table and the verdicts, and writes ``path`` and the plot beside it.

    Policies that the file has already, on the same :class:`Basis`, stay in it. Raises ``ConfigError`` for a policy that
    was asked for and cannot run.
    """
    check(options, model, data)
    guard = guard.model_copy(update={"enabled": True})
    policies = _running(options, model, console)
    if not policies:
        raise ConfigError("no policy runs on this model, so there is nothing to report on")
    # The artefacts are made from the first images of this very permutation.
    count = min(options.images, len(data) // 2)
    images, labels = data.take(np.random.default_rng(options.seed).permutation(len(data))[-count:])
    streams = _Streams(model, to_inputs(images, model.settings.input), labels, options.seed)
    basis = Basis(
        model=model.name,
        digest=model.digest,
        guard=guard.model_dump(mode="json"),
        judge=str(model.prepared[BENEFIT]["made"]) if BENEFIT in model.prepared else "rule of thumb",
        judge_images=_seen(model, data, options, count),
        data=data.name,
        data_digest=data.digest,
        images=count,
        seed=options.seed,
        request_rows=streams.size,
        corrupted=[f"{one.name} {one.severity:g}" for one in CORRUPTED],
        poison="noise",
    )
    paces = {name: _pace(model, policy, streams) for name, policy in policies.items()}
    expected = {
        name: streams.seconds(pace, paces[name]) for pace in [_pace(model, _source(), streams)] for name in paces
    }
    slowest = max(expected, key=lambda name: expected[name])
    console.print(
        f"report card: {len(policies)} policies, alone and guarded, {len(SCENARIOS)} scenarios of {count} images; "
        f"expected to take {_duration(sum(expected.values()))} ({slowest}: {_duration(expected[slowest])})"
    )
    if basis.judge_images:
        console.print(
            f"[yellow]the guard's judge was made from {basis.judge_images} of these images, too; with "
            f"{options.judge_images + count} images or more in the data it would not be[/yellow]"
        )
    found = _run_all(model, policies, streams, guard, console)
    made = datetime.now(UTC).isoformat(timespec="seconds")
    cards = {}
    for name, policy in policies.items():
        verdict, sentence = verdict_of(found[name])
        cards[name] = PolicyCard(
            verdict=verdict,
            sentence=sentence,
            made=made,
            settings=settings_of(policy),
            digest=policy_digest(policy),
            scenarios=found[name],
        )
    before = _read(path) if path.is_file() else None
    kept = before.policies if isinstance(before, Card) and before.basis == basis else {}
    card = Card(format=1, basis=basis, policies={**kept, **cards})
    card.save(path)
    plot = path.with_suffix(".png")
    save_plot(card, plot)
    print_card(card, console)
    console.print(f"{path}, {plot.name}", soft_wrap=True, highlight=False)
    return card


def read_card(path: Path, model: SourceModel, guard: GuardSettings) -> dict[str, PolicyCard]:
    """By policy, what the card at ``path`` says, so far as it is about this model, under the settings it starts from.

    Raises nothing: what cannot be read or is about something else is left out, and a log line says so.
    """
    if not path.is_file():
        return {}
    card = _read(path)
    if not isinstance(card, Card):
        reason = card
    elif card.basis.digest != model.digest:
        reason = f"it is of another model, of digest {card.basis.digest[:16]}"
    elif not _same(card.basis.guard, guard):
        reason = "it was made under other settings of the guard"
    else:
        return {name: one for name, one in card.policies.items() if _is_of(one, name, model)}
    log.warning("report card ignored", extra={"model": model.name, "path": str(path), "reason": reason})
    return {}


def verdict_of(scenarios: Mapping[str, Scenario]) -> tuple[Verdict, str]:
    """A word and a sentence, by this rule, the first that holds:

    ``harms``
        under the guard worse than the source in some scenario; or alone worse in some, and under the guard not better
        on corrupted images either.
    ``guard-needed``
        alone worse than the source in some scenario, under the guard in none, and there better on corrupted images.
    ``helps``
        better than the source on corrupted images, and worse in no scenario.
    ``unclear``
        no difference that counts.
    """
    alone, guarded = ({name: getattr(one, way) for name, one in scenarios.items()} for way in ("alone", "guarded"))
    drifted, guarded_drifted = alone[DRIFTED], guarded[DRIFTED]
    if worse := _worse(guarded):
        return "harms", f"Under the guard, too, worse than the source: {worse}."
    worse = _worse(alone)
    if worse and guarded_drifted.difference != "better":
        return "harms", (
            f"Alone worse than the source: {worse}. Under the guard neither that nor better on corrupted images, "
            "beyond chance."
        )
    if worse:
        return "guard-needed", (
            f"Alone worse than the source: {worse}. Under the guard nowhere worse beyond chance, and better on "
            f"corrupted images by {_points(guarded_drifted.gain)} points."
        )
    if "better" in (drifted.difference, guarded_drifted.difference):
        return "helps", (
            f"Better than the source on corrupted images, by {_points(drifted.gain)} points alone and "
            f"{_points(guarded_drifted.gain)} under the guard, and nowhere worse beyond chance."
        )
    return "unclear", f"No difference from the source that {scenarios[DRIFTED].rows} rows a scenario tell from chance."


def compare(policy: Outcome, source: Outcome) -> Gain:
    """Accuracy, and the gain with its interval, see the module."""
    rows, requests = int(policy.rows.sum()), len(policy.rows)
    more = (policy.right - source.right).astype(np.float64)
    gain = float(more.sum() / rows)
    of_part = np.bincount(policy.parts, more) / np.bincount(policy.parts, policy.rows)
    degrees = requests - len(of_part)
    residual = more - of_part[policy.parts] * policy.rows
    deviation = math.sqrt(requests / degrees * float(np.square(residual).sum())) / rows
    shown, called = (
        deviation * student_quantile(1 - (1 - CONFIDENCE) / 2 / among, degrees) for among in (1, len(SCENARIOS))
    )
    difference: Difference = "better" if gain - called > 0 else "worse" if gain + called < 0 else "none"
    return Gain(
        accuracy=float(policy.right.sum() / rows),
        gain=gain,
        low=gain - shown,
        high=gain + shown,
        difference=difference,
        unanswered=policy.unanswered,
    )


def student_quantile(probability: float, degrees: int) -> float:
    """Of Student's t, by its expansion about the normal one (Abramowitz and Stegun 26.7.5): to a thousandth from 9
    degrees on."""
    z, n = NormalDist().inv_cdf(probability), degrees
    terms = (
        z,
        (z**3 + z) / (4 * n),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3),
    )
    return sum(terms)


def print_card(card: Card, console: Console) -> None:
    """Prints the gains as a table, and the verdicts."""
    first = next(iter(card.policies.values()))
    table = Table(
        title="gain over the source in points, alone/guarded",
        caption="* beyond chance, at 95 % for all scenarios of a policy together",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("policy")
    table.add_column("images")
    for order in ORDERS:
        table.add_column(order, justify="right")
    for condition in CONDITIONS:
        accuracies = (f"{100 * first.scenarios[f'{condition} {order}'].source:.1f} %" for order in ORDERS)
        table.add_row(SOURCE if condition == "clean" else "", condition, *accuracies, style="dim")
    for name, one in card.policies.items():
        table.add_section()
        for condition in CONDITIONS:
            cells = []
            for order in ORDERS:
                scenario = one.scenarios[f"{condition} {order}"]
                cells.append(Text.assemble(_cell(scenario.alone), "/", _cell(scenario.guarded)))
            table.add_row(name if condition == "clean" else "", condition, *cells)
    console.print(table)
    for name, one in card.policies.items():
        console.print(Text.assemble((f"{name}: ", "bold"), (one.verdict, _COLOURS[one.verdict]), f". {one.sentence}"))
        gains = [gain for found in one.scenarios.values() for gain in (found.alone, found.guarded)]
        if unanswered := sum(gain.unanswered for gain in gains):
            console.print(Text(f"{name}: {unanswered} rows got no answer, as their requests failed", "yellow"))


def save_plot(card: Card, path: Path) -> None:
    """A picture of the gains with their 95 % intervals, a panel per policy."""
    from matplotlib.figure import Figure

    columns = min(4, len(card.policies))
    lines = math.ceil(len(card.policies) / columns)
    figure = Figure(figsize=(2.6 + 2.8 * columns, 0.8 + 3.1 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    places = np.arange(len(SCENARIOS))
    for panel, (name, one) in zip(panels, card.policies.items(), strict=False):
        for shift, way, colour in ((-0.16, "alone", "tab:red"), (0.16, "guarded", "tab:blue")):
            gains: list[Gain] = [getattr(one.scenarios[scenario], way) for scenario in SCENARIOS]
            middle = np.array([100 * gain.gain for gain in gains])
            reach = np.array([[gain.gain - gain.low, gain.high - gain.gain] for gain in gains]).T
            panel.errorbar(
                middle, places + shift, xerr=100 * reach, fmt="o", markersize=4, color=colour, label=way, capsize=2
            )
        panel.axvline(0, color="k", linewidth=0.8)
        panel.set_title(f"{name}: {one.verdict}", fontsize=10)
        panel.grid(axis="x", alpha=0.3)
    for panel in panels[len(card.policies) :]:
        panel.set_visible(False)
    panels[0].set_yticks(places, SCENARIOS)
    panels[0].invert_yaxis()
    panels[0].legend(fontsize=8)
    figure.supxlabel(f"{card.basis.model}: accuracy less the source's, points", fontsize=10)
    _write(path, lambda unfinished: figure.savefig(unfinished, dpi=150, format="png"))


_COLOURS = {"helps": "green", "guard-needed": "yellow", "harms": "red", "unclear": "dim"}


class _Streams:
    """Makes the requests of the scenarios from the images ``x [N, ...]`` and their ``labels [N]``."""

    def __init__(self, model: SourceModel, x: Tensor, labels: Rows, seed: int) -> None:
        self._model, self._x, self._labels, self._seed = model, x, labels, seed
        self.size = min(REQUEST_ROWS, len(labels) // REQUESTS)

    def requests(self, scenario: str) -> Iterator[Request]:
        """Of the scenario, the same each time."""
        condition, order = scenario.split()
        random = torch.Generator().manual_seed(self._seed)
        sizes = np.random.default_rng(self._seed)
        parts = np.array_split(np.arange(len(self._labels)), len(CONDITIONS[condition]))
        for part, (damage, rows) in enumerate(zip(CONDITIONS[condition], parts, strict=True)):
            if order == "sorted":
                rows = rows[np.argsort(self._labels[rows], kind="stable")]
            start = 0
            while start < len(rows):
                size = int(sizes.integers(1, SMALL + 1)) if order == "small" else self.size
                own = rows[start : start + size]
                x = damage.apply(self._x[own], self._model.settings.input, random)
                made = Request(x, self._labels[own], part)
                yield self._poisoned(made, random) if order == "poisoned" else made
                start += size

    def seconds(self, source: Pace, policy: Pace) -> float:
        """What all scenarios are expected to take with a policy, alone and guarded."""
        total = 0.0
        for scenario in SCENARIOS:
            order = scenario.split()[1]
            rows = len(self._labels) * (2 if order == "poisoned" else 1)
            requests = len(self._labels) * 2 / (1 + SMALL) if order == "small" else len(self._labels) / self.size
            total += 2 * policy.seconds(requests, rows) + source.seconds(requests, rows)
        return total

    def _poisoned(self, request: Request, random: torch.Generator) -> Request:
        """The request's rows, each followed by one of an attacker's: uniform noise over the inputs' range."""
        low, high = self._model.settings.input.range or (0.0, 1.0)
        junk = low + (high - low) * torch.rand(request.x.shape, generator=random)
        labels = np.stack([request.labels, np.full(len(request.labels), -1)], axis=1).reshape(-1)
        return Request(torch.stack([request.x, junk], dim=1).flatten(0, 1), labels, request.part)


class Pace(NamedTuple):
    """Seconds that a policy takes for a request, and for each of its rows."""

    per_request: float
    per_row: float

    def seconds(self, requests: float, rows: float) -> float:
        return requests * self.per_request + rows * self.per_row


def _pace(model: SourceModel, policy: Policy, streams: _Streams) -> Pace:
    """Measured on two requests of one row and two of the usual size, each the second time."""
    first, times = next(streams.requests(DRIFTED)), []
    for rows in (1, streams.size):
        request = Request(first.x[:rows], first.labels[:rows], 0)
        for _ in range(2):
            started = time.perf_counter()
            _run(model, policy, [request], None, 0)
            took = time.perf_counter() - started
        times.append(took)
    per_row = max(0.0, (times[1] - times[0]) / max(1, streams.size - 1))
    return Pace(max(0.0, times[0] - per_row), per_row)


def _run_all(
    model: SourceModel, policies: Mapping[str, Policy], streams: _Streams, guard: GuardSettings, console: Console
) -> dict[str, dict[str, Scenario]]:
    """By policy and scenario. Scenario by scenario, so that one's inputs are in memory at a time."""
    found: dict[str, dict[str, Scenario]] = {name: {} for name in policies}
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task("", total=len(SCENARIOS) * (1 + 2 * len(policies)))
        for scenario in SCENARIOS:
            progress.update(task, description=f"{scenario}: {SOURCE}")
            requests = list(streams.requests(scenario))
            source = _run(model, _source(), requests, None, 0)
            progress.advance(task)
            rows = int(source.rows.sum())
            for name, policy in policies.items():
                ways = []
                for way, own in (("alone", None), ("guarded", guard)):
                    progress.update(task, description=f"{scenario}: {name}, {way}")
                    ways.append(_run(model, policy, requests, own, 0))
                    progress.advance(task)
                alone, guarded = (compare(one, source) for one in ways)
                found[name][scenario] = Scenario(
                    rows=rows,
                    requests=len(requests),
                    source=float(source.right.sum() / rows),
                    alone=alone,
                    guarded=guarded,
                    served=ways[1].served / rows,
                )
    return found


def _run(
    model: SourceModel, policy: Policy, requests: Sequence[Request], guard: GuardSettings | None, seed: int
) -> Outcome:
    """A new stream's requests, one after the other, by the server's own engine."""
    store, settings = StateStore(Budget(4), model.network.device), MonitorSettings()
    engine = Engine({model.name: model}, store, Monitor(settings.half_life), settings.shadow_ratio, monitored=False)
    lane = Lane(model.name, policy, model.digest)
    stream = Stream("card", model.name, policy, rng.stream_key("card", seed), 0.0, model.digest)
    stream.guard = None if guard is None else make_guard(guard)
    counts, right, served, unanswered = [], [], 0, 0
    for request in requests:
        answers: list[Answer | TtaError] = []
        job = Job(stream, lambda *_: None, lane, request.x)
        engine.step(Plan(lane, [job]), lambda _, answer, answers=answers: answers.append(answer))  # type: ignore[misc]  # the default binds it
        (answer,) = answers
        counted = request.labels >= 0
        counts.append(int(counted.sum()))
        if isinstance(answer, TtaError):
            right.append(0)
            unanswered += counts[-1]
        else:
            right.append(int((answer.logits.numpy().argmax(1) == request.labels)[counted].sum()))
            served += counts[-1] * (answer.served != SOURCE)
    parts = np.array([request.part for request in requests])
    return Outcome(parts, np.array(counts), np.array(right), served, unanswered)


def _running(options: CardOptions, model: SourceModel, console: Console) -> dict[str, Policy]:
    """The policies to report on, under the settings they start from on this model."""
    found = {}
    for name in options.policies or [one for one, kind in adapters.policies().items() if not kind.plain]:
        report = policy_report(name, model)
        if report["runs"]:
            found[name] = make_policy(name, starting_settings(name, model.settings))
        elif options.policies:
            raise ConfigError(f"policy {name!r} cannot run on model {model.name!r}: {report['reason']}")
        else:
            console.print(Text(f"{name}: left out, as it cannot run: {report['reason']}", "yellow"))
    return found


def _seen(model: SourceModel, data: SourceImages, options: CardOptions, count: int) -> int:
    """How many of the last ``count`` images the model's judge was made from."""
    how = model.prepared.get(BENEFIT, {})
    if (how.get("data_digest"), how.get("seed")) != (data.digest, options.seed):
        return 0
    return max(0, min(options.judge_images, len(data)) - (len(data) - count))


def _source() -> Policy:
    return make_policy(SOURCE, {})


def _read(path: Path) -> Card | str:
    """The card, or why it cannot be read."""
    try:
        return Card.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        return f"it is no report card of this version: {f'{place}: ' if place else ''}{first['msg']}"
    except OSError as error:
        return f"it cannot be read: {error}"


def _same(made: Mapping[str, Any], guard: GuardSettings) -> bool:
    """Whether a card was made under this guard. A setting that it does not know had its default."""
    try:
        return GuardSettings.model_validate(made) == guard.model_copy(update={"enabled": True})
    except ValidationError:
        return False


def _is_of(card: PolicyCard, name: str, model: SourceModel) -> bool:
    """Whether a policy's card is of the settings it starts from on this model, and whole."""
    try:
        digest = policy_digest(make_policy(name, starting_settings(name, model.settings)))
    except TtaError as error:
        reason = str(error)
    else:
        if digest == card.digest and card.scenarios.keys() == set(SCENARIOS):
            return True
        reason = "it was made under other settings of the policy" if digest != card.digest else "scenarios are missing"
    log.warning("report card of a policy ignored", extra={"model": model.name, "policy": name, "reason": reason})
    return False


def _worse(gains: Mapping[str, Gain]) -> str:
    """The scenarios in which it is worse, the worst first, with by how many points."""
    losses = sorted((one.gain, name) for name, one in gains.items() if one.difference == "worse")
    told = [f"{name} by {_points(-gain)} points" for gain, name in losses[:2]]
    return ", ".join(told) + (f" and {len(losses) - 2} more" if len(losses) > 2 else "")


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def _cell(gain: Gain) -> tuple[str, str]:
    colour = {"better": "green", "worse": "red", "none": ""}[gain.difference]
    return f"{100 * gain.gain:.1f}{'' if gain.difference == 'none' else '*'}", colour


def _duration(seconds: float) -> str:
    return f"about {seconds / 60:.0f} min" if seconds >= 90 else f"about {max(1, round(seconds))} s"


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Has a file written beside its place and moves it there. Raises ``ConfigError``."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        write(unfinished)
        unfinished.chmod(0o644)  # the server may run as somebody else than who made it
        unfinished.replace(path)
    except BaseException as error:
        unfinished.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        raise ConfigError(f"cannot write the report card to {path}: {error}") from error
