"""``tta-server prepare``: computes a model's artefacts from clean source data, by the network that serves.

Each group of artefacts is written to the file as soon as it is done, and the long warm-up now and then in between, so a
run that was stopped goes on where it was. What each group is for stands in :data:`GROUPS`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

import adapters
from adapters import rng
from adapters.base import BATCH_NORM, SOURCE_NORM, Batch, Norm, Output, Scope, Segments, State, Tensors
from adapters.eata import squared_gradient
from adapters.images import ImageStore
from adapters.rmt import Rmt, as_artefact, warm_up
from tta_server import damage, report_card
from tta_server.data import SourceImages, load_source_images, to_inputs
from tta_server.drift import estimators
from tta_server.drift.benefit import GROUP as BENEFIT
from tta_server.drift.estimators import GROUP as ESTIMATES
from tta_server.drift.estimators import Estimates, Head, make_estimates
from tta_server.drift.reference import GROUP as MONITORING
from tta_server.drift.reference import LEAST_ROWS, CleanRows, make_reference
from tta_server.drift.signals import LayerStatistics
from tta_server.engine.artefacts import Artefacts, load_artefacts
from tta_server.engine.norm import Pass
from tta_server.engine.source import SourceModel, choose_device, load_model
from tta_server.errors import BadInput, ConfigError
from tta_server.feedback import CALIBRATION
from tta_server.policies import load_plugins, make_policy, starting_settings
from tta_server.settings import choose_model, load_settings

SAVE_SECONDS = 60.0
"""How often an unfinished warm-up is written."""
WARM_UP_SETTINGS = ("optimiser", "lr", "momentum", "nesterov", "teacher_momentum")
"""Of rmt, those that the warm-up depends on."""
COVARIANCE_VALUES = 4_000_000
"""Most values of all classes' feature covariances for them to be stored by class."""


@dataclass(frozen=True)
class PrepareOptions:
    """What to prepare and from what. ``only``: groups; none: all but those made on request."""

    config: Path
    data: Path
    only: tuple[str, ...] = ()
    model: str | None = None
    batch_size: int = 64
    images: int = 5000
    """Most source images used, drawn at random from the data."""
    fisher_images: int = 2000
    calibration_images: int = 2000
    monitoring_images: int = 2000
    benefit_images: int = 2000
    replay_images: int = 2000
    warm_up_images: int = 50_000
    """How many the warm-up goes through in all, over and over."""
    seed: int = 0
    force: bool = False
    """Makes groups anew that the file has already."""
    report: tuple[str, ...] | None = None
    """Makes a report card of these policies, too; of none named: of all that run. ``None``: no card."""
    report_images: int = 384
    """Most images in a scenario of it."""


Work = Iterator[Tensors | None]
"""A group in the making: ``None`` after every batch but the last, then its tensors."""


@dataclass(frozen=True)
class Group:
    """One group of artefacts: how it is made, and in how many batches of how many images."""

    title: str
    make: Callable[[_Source], Work]
    rows: Callable[[PrepareOptions, int], int]
    """How many images it goes through, of the options and the number of source images there are."""
    on_request: bool = False
    needs_labels: bool = False


class _Source:
    """A model and its source data, in batches, with all that the groups are made of."""

    def __init__(self, model: SourceModel, data: SourceImages, options: PrepareOptions, unfinished: Path) -> None:
        self.model, self.data, self.options = model, data, options
        self.device, self.data_digest = model.network.device, data.digest
        self._path = unfinished
        self.unfinished = load_artefacts(unfinished, model.digest, self.device)

    def save_unfinished(self, group: str, tensors: Tensors, how: Mapping[str, Any]) -> None:
        """Keeps a group in the making, so that a later run goes on there."""
        self.unfinished.put(group, tensors, {**how, **self.made_from()})
        self.unfinished.save(self._path)

    def drop_unfinished(self, group: str) -> None:
        """Forgets it; without any the file goes."""
        self.unfinished.drop(group)
        if self.unfinished.made:
            self.unfinished.save(self._path)
        else:
            self._path.unlink(missing_ok=True)

    def made_from(self) -> dict[str, Any]:
        """What decides how a group comes out, beside the model: a group in the making goes on only under the same."""
        return {
            "data": self.data.name,
            "data_digest": self.data_digest,
            "batch_size": self.options.batch_size,
            "seed": self.options.seed,
        }

    def network(self, weights: Mapping[str, Tensor], x: Tensor, segments: Segments, norm: Norm) -> Output:
        return self.model.network.run(Pass(segments, weights, norm), x)

    def batches(self, rows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs ``[B, ...]`` and labels ``[B]`` (-1 where there are none) of so many images: all of them in one random
        order, then in another, and so on. A last batch of a single image is left out, as it has no batch statistics."""
        drawn: NDArray[np.int64] = np.zeros(0, np.int64)
        generator = np.random.default_rng(self.options.seed)
        for size in batch_sizes(rows, self.options.batch_size):
            while len(drawn) < size:
                drawn = np.concatenate([drawn, generator.permutation(len(self.data))])
            images, labels = self.data.take(drawn[:size])
            drawn = drawn[size:]
            x = to_inputs(images, self.model.settings.input)
            yield x.to(self.device, self.model.network.dtype), torch.from_numpy(labels).to(self.device)

    def batch(self, x: Tensor) -> Batch:
        zero = torch.zeros(1, dtype=torch.int64, device=self.device)
        random = rng.Random(zero, zero, self.model.network.dtype)
        return Batch(x, Segments([len(x)], self.device), self.network, BATCH_NORM, random)

    def run(self, x: Tensor, norm: Norm) -> Output:
        with torch.no_grad():
            return self.network({}, x, Segments([len(x)], self.device), norm)


def _fisher(source: _Source) -> Work:
    """``<key>``: mean over batches of the squared gradient, see ``adapters.eata.squared_gradient``."""
    total: Tensors = {}
    rows = min(source.options.fisher_images, len(source.data))
    count = 0
    for x, _ in source.batches(rows):
        for key, value in squared_gradient(source.model.source, source.batch(x)).items():
            total[key] = total.get(key, 0) + value.double()
        count += 1
        yield None
    yield {key: (value / count).to(source.model.source.dtype) for key, value in total.items()}


def _prototypes(source: _Source) -> Work:
    """``mean [C, D]``: class means of features normalised by the batch; ``counts [C]``, 0 where a class is missing."""
    sums = _ClassSums(source)
    for x, labels in source.batches(len(source.data)):
        sums.add(source.run(x, BATCH_NORM).features, labels)
        yield None
    yield {"mean": sums.means().to(source.model.source.dtype), "counts": sums.counts}


def _features(source: _Source) -> Work:
    """Of the source model's features: ``mean [D]``, ``covariance [D, D]`` about the class means (tied),
    ``class_mean [C, D]``, ``counts [C]`` and, if not too many values, ``class_covariance [C, D, D]``; all biased."""
    sums, stored = _ClassSums(source), []
    for x, labels in source.batches(len(source.data)):
        features = source.run(x, SOURCE_NORM).features.double()
        sums.add(features, labels)
        stored.append((features, labels))
        yield None
    means, classes, dimension = sums.means(), len(sums.counts), source.model.source.feature_dim
    by_class = classes * dimension**2 <= COVARIANCE_VALUES
    scatter = torch.zeros(classes if by_class else 1, dimension, dimension, dtype=torch.float64, device=source.device)
    for features, labels in stored:
        centred = features - means[labels]
        for place in labels.unique().tolist() if by_class else [0]:
            own = centred[labels == place] if by_class else centred
            scatter[place] += own.T @ own
    made = {
        "mean": sums.total.sum(0) / sums.counts.sum(),
        "class_mean": means,
        "covariance": scatter.sum(0) / sums.counts.sum(),
    }
    if by_class:
        made["class_covariance"] = scatter / sums.counts.clamp_min(1)[:, None, None]
    yield {key: value.to(source.model.source.dtype) for key, value in made.items()} | {"counts": sums.counts}


def _prior(source: _Source) -> Work:
    """``labels [C]``: share of each class in the data; ``predicted [C]``: mean prediction of the source model."""
    total = torch.zeros(source.model.source.num_classes, dtype=torch.float64, device=source.device)
    counts = torch.zeros_like(total)
    for x, labels in source.batches(len(source.data)):
        total += source.run(x, SOURCE_NORM).logits.softmax(1).double().sum(0)
        counts += torch.bincount(labels.clamp_min(0), minlength=len(counts))
        yield None
    made = {"predicted": total / total.sum()}
    if source.data.has_labels:
        made["labels"] = counts / counts.sum()
    yield made


def _calibration(source: _Source) -> Work:
    """``logits [n, C]`` of the source model and ``labels [n]``: what conformal scores and thresholds are taken from."""
    logits, labels = [], []
    for x, own in source.batches(min(source.options.calibration_images, len(source.data))):
        logits.append(source.run(x, SOURCE_NORM).logits)
        labels.append(own)
        yield None
    yield {"logits": torch.cat(logits), "labels": torch.cat(labels)}


def _monitoring(source: _Source) -> Work:
    """What clean data look like to the monitor, see ``tta_server/drift/reference.py``."""
    parts: list[tuple[NDArray[Any], ...]] = []
    layers: LayerStatistics | None = None
    network = source.model.network
    for x, _ in source.batches(min(source.options.monitoring_images, len(source.data))):
        # Every row a stream of its own: then the statistics of its rows are those of one row each.
        watched = Pass(Segments([1] * len(x), source.device), observe=True)
        with torch.no_grad():
            output = network.run(watched, x)
        observed = network.observed(watched)
        empty = np.zeros((len(x), 0), np.float32)
        means, variances, layers = (empty, empty, None) if observed is None else observed
        parts.append((output.logits.float().cpu().numpy(), output.features.float().cpu().numpy(), means, variances))
        yield None
    rows = CleanRows(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    for what, column in (("scores", rows.logits), ("features", rows.features), ("batch-norm inputs", rows.vars)):
        if not np.isfinite(column).all():
            raise ConfigError(f"the model's {what} for some of the clean images are not finite; are these sound?")
    made = make_reference(rows, layers, source.options.seed).tensors()
    yield {name: torch.from_numpy(np.asarray(value)) for name, value in made.items()}


def _estimates(source: _Source) -> Work:
    """What label-free accuracy is estimated with, see ``tta_server/drift/estimators.py``."""
    parts: list[tuple[NDArray[Any], ...]] = []
    for x, own in source.batches(min(source.options.calibration_images, len(source.data))):
        output = source.run(x, SOURCE_NORM)
        parts.append((output.logits.float().cpu().numpy(), output.features.float().cpu().numpy(), own.cpu().numpy()))
        yield None
    logits, features, labels = (np.concatenate(column) for column in zip(*parts, strict=True))
    stored = {
        name: source.model.source.weights.get(f"{source.model.source.head}.{name}") for name in ("weight", "bias")
    }
    parameters = {name: one.detach().float().cpu().numpy() for name, one in stored.items() if one is not None}
    head = Head(**parameters) if "weight" in parameters else None
    try:
        made = make_estimates(logits, features, labels, head, source.options.seed).tensors()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    yield {name: torch.from_numpy(value) for name, value in made.items()}


def _benefit(source: _Source) -> Work:
    """The judge of whether adaptation helps, see ``tta_server/drift/benefit.py``."""
    store, images, labels = ImageStore(source.model.source), [], []
    for x, own in source.batches(min(source.options.benefit_images, len(source.data))):
        images.append(store.pack(x))
        labels.append(own)
    x, known = store.unpack(torch.cat(images)), torch.cat(labels).cpu().numpy()
    for made in damage.judge(source.model, x, known, source.options.seed):
        yield None if made is None else {name: torch.from_numpy(value) for name, value in made.tensors().items()}


def _replay(source: _Source) -> Work:
    """``images [n, ...]`` (8-bit where inputs have a range) and ``labels [n]``."""
    store, images, labels = ImageStore(source.model.source), [], []
    for x, own in source.batches(min(source.options.replay_images, len(source.data))):
        images.append(store.pack(x))
        labels.append(own)
        yield None
    yield {"images": torch.cat(images), "labels": torch.cat(labels)}


def _warm_up(scope: Scope, source: _Source) -> Work:
    """RMT's student, teacher and optimiser after the warm-up, as a state: ``weights.<key>`` and ``memory.<key>``."""
    group = "warmup" if scope is Scope.ALL else "warmup_norm"
    policy = cast("Rmt", make_policy("rmt", starting_settings("rmt", source.model.settings) | {"scope": scope}))
    steps = len(batch_sizes(source.options.warm_up_images, source.options.batch_size))
    state, first = policy.cold_start(source.model.source), 0
    how = {"of": steps, "settings": {key: getattr(policy, key) for key in WARM_UP_SETTINGS}}
    begun = source.unfinished.made.get(group, {})
    if how.items() <= begun.items():
        first = begun["steps"]
        stored = {key.removeprefix(f"{group}/"): v.to(source.device) for key, v in source.unfinished.tensors.items()}
        state = State(
            {key: stored[f"weights.{key}"] for key in state.weights},
            {key: stored[f"memory.{key}"] for key in state.memory},
        )
    saved = time.monotonic()
    for step, (x, _) in enumerate(source.batches(source.options.warm_up_images), 1):
        if step > first:
            state = warm_up(policy, state, source.batch(x), step / steps)
            if time.monotonic() > saved + SAVE_SECONDS:
                source.save_unfinished(group, as_artefact(state), {**how, "steps": step})
                saved = time.monotonic()
        yield None
    yield as_artefact(state)


class _ClassSums:
    """Sums ``[C, D]`` and ``counts [C]`` of features by label."""

    def __init__(self, source: _Source) -> None:
        size = (source.model.source.num_classes, source.model.source.feature_dim)
        self.total = torch.zeros(size, dtype=torch.float64, device=source.device)
        self.counts = torch.zeros(size[0], dtype=torch.int64, device=source.device)

    def add(self, features: Tensor, labels: Tensor) -> None:
        self.total.index_add_(0, labels, features.double())
        self.counts += torch.bincount(labels, minlength=len(self.counts))

    def means(self) -> Tensor:
        """``[C, D]``; zeros for a class without features."""
        return self.total / self.counts.clamp_min(1)[:, None]


GROUPS: dict[str, Group] = {
    "fisher": Group("Fisher information", _fisher, lambda options, rows: min(options.fisher_images, rows)),
    "prototypes": Group("class prototypes", _prototypes, lambda _, rows: rows, needs_labels=True),
    "features": Group("feature mean and covariance", _features, lambda _, rows: rows, needs_labels=True),
    "prior": Group("class prior", _prior, lambda _, rows: rows),
    "calibration": Group(
        "calibration scores",
        _calibration,
        lambda options, rows: min(options.calibration_images, rows),
        needs_labels=True,
    ),
    "estimates": Group(
        "label-free accuracy",
        _estimates,
        lambda options, rows: min(options.calibration_images, rows),
        needs_labels=True,
    ),
    "monitoring": Group(
        "clean signals for the monitor", _monitoring, lambda options, rows: min(options.monitoring_images, rows)
    ),
    "benefit": Group(
        "damaged streams for the guard",
        _benefit,
        lambda options, _: damage.REQUESTS * options.batch_size,
        needs_labels=True,
    ),
    "warmup": Group("warm-up of rmt", partial(_warm_up, Scope.ALL), lambda options, _: options.warm_up_images),
    "warmup_norm": Group(
        "warm-up of rmt, scope norm",
        partial(_warm_up, Scope.NORM),
        lambda options, _: options.warm_up_images,
        on_request=True,
    ),
    "replay": Group(
        "replay images of rmt",
        _replay,
        lambda options, rows: min(options.replay_images, rows),
        on_request=True,
        needs_labels=True,
    ),
}
"""By name, in the order they are made."""


def batch_sizes(rows: int, batch_size: int) -> list[int]:
    """Sizes of the batches that so many rows make; a last one of a single row is left out, unless it is the only."""
    sizes = [min(batch_size, rows - start) for start in range(0, rows, batch_size)]
    return sizes[:-1] if len(sizes) > 1 and sizes[-1] == 1 else sizes


def prepare(options: PrepareOptions, console: Console) -> Artefacts:
    """Makes the groups that are wanted and not there yet, and prints what there is then and what it is good for.

    Raises a ``TtaError`` saying what does not fit, wherever possible before anything is computed.
    """
    settings = load_settings(options.config)
    load_plugins()
    name = choose_model(settings, options.model)
    if unknown := [one for one in options.only if one not in GROUPS]:
        raise BadInput(f"no artefact group {unknown[0]!r}; there are: {', '.join(GROUPS)}")
    model = load_model(name, settings, choose_device(settings.server.device))
    path = settings.artefacts_path(name)
    for policy in adapters.policies():
        make_policy(policy, starting_settings(policy, model.settings))  # a wrong setting is told now, not at the end
    if not os.access(path.parent, os.W_OK):
        raise ConfigError(f"cannot write artefacts to the folder {path.parent}; set models.{name}.artefacts to another")
    data = load_source_images(options.data, model.settings.input, model.classes, options.images, options.seed)
    card = None
    if options.report is not None:
        card = report_card.CardOptions(options.report, options.report_images, options.seed, options.benefit_images)
        report_card.check(card, model, data)
    artefacts = load_artefacts(path, model.digest, torch.device("cpu"))
    source = _Source(model, data, options, path.with_name(f"{path.name}.unfinished"))
    for group in _wanted(options, model, data, artefacts, console):
        tensors = _make(group, source, console)
        how = source.made_from() | {
            "images": min(GROUPS[group].rows(options, len(data)), len(data)),
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        artefacts = load_artefacts(path, model.digest, torch.device("cpu"))  # another run may have added to it
        artefacts.put(group, tensors, how)
        artefacts.save(path)
        source.drop_unfinished(group)
        for remark in _remarks(group, tensors):
            console.print(f"[yellow]{group}: {remark}[/yellow]")
    console.print(_table(artefacts, model))
    console.print(f"{path}: {sum(value.nbytes for value in artefacts.tensors.values()):,} bytes")
    if card is not None:
        whole = load_model(name, settings, choose_device(settings.server.device))  # with what it has now
        report_card.make_card(whole, data, settings.guard, card, report_card.card_path(path), console)
    return artefacts


def _remarks(group: str, tensors: Tensors) -> list[str]:
    """What is to be said of a group that was made."""
    if group != ESTIMATES:
        return []
    return Estimates.of_tensors({key: value.numpy() for key, value in tensors.items()}).remarks


def _why_not(name: str, model: SourceModel, data: SourceImages, options: PrepareOptions) -> str:
    """Why a group cannot be made; empty where it can."""
    rows = GROUPS[name].rows(options, len(data))
    if GROUPS[name].needs_labels and not data.has_labels:
        return f"needs labels, and the images of {data.name} have none"
    if name == MONITORING and len(data) < LEAST_ROWS:
        return f"needs at least {LEAST_ROWS} clean images, and there are {len(data)} in {data.name}"
    if name == ESTIMATES and rows < estimators.LEAST_ROWS:
        return f"needs at least {estimators.LEAST_ROWS} clean images, and is to take {rows} from {data.name}"
    if name == BENEFIT and (reason := damage.why_not(model)):
        return reason
    if name in (MONITORING, ESTIMATES) and model.network.mixes_rows:
        return "needs scores that do not depend on the request, and this model has batch norms without statistics"
    return ""


def _wanted(
    options: PrepareOptions, model: SourceModel, data: SourceImages, artefacts: Artefacts, console: Console
) -> list[str]:
    """The groups to make now, in order. Raises ``ConfigError`` for one that was asked for and cannot be made."""
    wanted = []
    for name, group in GROUPS.items():
        if name not in options.only and (options.only or group.on_request):
            continue
        if reason := _why_not(name, model, data, options):
            if options.only:
                raise ConfigError(f"{name} {reason}")
            console.print(f"[yellow]{name}: left out, as it {reason}[/yellow]")
        elif name in artefacts.made and not options.force:
            console.print(f"{name}: there already (--force makes it anew)")
        else:
            wanted.append(name)
    return wanted


def _make(name: str, source: _Source, console: Console) -> Tensors:
    group = GROUPS[name]
    begun = source.unfinished.made.get(name)
    if begun is not None and (source.options.force or not source.made_from().items() <= begun.items()):
        source.drop_unfinished(name)
    batches = len(batch_sizes(group.rows(source.options, len(source.data)), source.options.batch_size))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        task = progress.add_task(group.title, total=batches)
        for made in group.make(source):
            if made is not None:
                return made
            progress.advance(task)
    raise AssertionError(f"the group {name} ended without its tensors")


USES = {
    MONITORING: "drift score and verdict",
    ESTIMATES: "label-free accuracy",
    BENEFIT: "guards",
    CALIBRATION: "prediction sets",
}
"""By group, what is not a policy and reads it."""


def _table(artefacts: Artefacts, model: SourceModel) -> Table:
    """What there is, and which policies it lets run, under their settings for this model."""
    table = Table("artefacts", "images", "batch", "bytes", "needed by", title=f"artefacts of {model.name}")
    needs = {one: make_policy(one, starting_settings(one, model.settings)).needs for one in adapters.policies()}
    for name, how in artefacts.made.items():
        size = sum(value.nbytes for key, value in artefacts.tensors.items() if key.startswith(f"{name}/"))
        users = ", ".join(policy for policy, wanted in needs.items() if name in wanted)
        users = USES.get(name, users)
        table.add_row(name, str(how["images"]), str(how["batch_size"]), f"{size:,}", users or "-")
    for policy, wanted in needs.items():
        if missing := sorted(wanted - artefacts.made.keys()):
            table.caption = f"{table.caption or ''}{policy} still needs {', '.join(missing)}. "
    return table
