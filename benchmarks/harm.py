"""What adaptation costs where it fails, alone and under the guard: error of the answers by scenario and policy.

A ResNet-20 on CIFAR-10-C at severity 5 (``TTA_DATA``, see examples/cifar10c/README.md). The guard has its default
settings and the judge that ``tta-server prepare`` makes of clean training images. The settings were chosen on the
domains with even numbers (gaussian_noise, impulse_noise, ...); ``--half odd`` (the default) reports the others.

    python benchmarks/harm.py --out /tmp/harm            # table, JSON and plot
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from example import EXAMPLE
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from adapters import Policy, rng
from tta_server.data import Domain, arrange, load_domains, to_inputs
from tta_server.drift.monitor import Monitor
from tta_server.engine.engine import Engine
from tta_server.engine.guarding import make_guard
from tta_server.engine.source import SourceModel, load_model
from tta_server.policies import make_policy, starting_settings
from tta_server.prepare import PrepareOptions, prepare
from tta_server.settings import GuardSettings, load_settings
from tta_server.state.memory import Budget
from tta_server.state.store import StateStore
from tta_server.types import Answer, Event, Job, Lane, Plan, Stream

DOMAINS = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
GROUPS = ("fisher", "prototypes", "monitoring", "benefit", "warmup", "replay")
POLICIES: dict[str, dict[str, Any]] = {"tent": {}, "eata": {}, "cotta": {"augmentations": 4}, "rmt": {}, "roid": {}}
SOURCE = "source"
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Request:
    """Inputs ``x [N, ...]`` and ``labels [N]``; -1 where the error does not count."""

    x: Tensor
    labels: Rows
    domain: str


@dataclass
class Scenario:
    """Streams of requests, each stream afresh, and what of the policy's settings is another."""

    streams: list[list[Request]]
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass
class Outcome:
    """Errors in percent, mean over domains."""

    error: float
    per_domain: dict[str, float]
    seconds: float
    served: float
    """Share of the counted rows that were served the adapted answer, at least in part of their request."""
    moves: list[str] = field(default_factory=list)


def scenarios(model: SourceModel, domains: Sequence[Domain], size: int, seed: int) -> Iterator[tuple[str, Scenario]]:
    """By name, made one after the other."""
    labels = [domain.labels for domain in domains]
    spec = model.settings.input

    def requests(batches: Sequence[Rows]) -> list[Request]:
        made = []
        for rows in batches:
            images = np.stack([domains[domain].images[row] for domain, row in rows])
            own = np.array([labels[domain][row] for domain, row in rows], np.int64)
            made.append(Request(to_inputs(images, spec), own, domains[rows[0, 0]].name))
        return made

    iid = requests(arrange(labels, "domains", size, seed))
    yield "domains", Scenario([iid])
    yield "label-sorted", Scenario([requests(arrange(labels, "sorted", size, seed))])
    yield "dirichlet 0.1", Scenario([requests(arrange(labels, "dirichlet:0.1", size, seed))])
    few = [own[: max(1, len(own) // 5)] for own in labels]
    yield "one image, no window", Scenario([requests(arrange(few, "domains", 1, seed))])
    yield "learning rate x10", Scenario([iid], {"lr": 10})
    by_class = []
    for one in range(len(model.classes)):
        rows = [np.flatnonzero(own == one) for own in labels]
        pairs = [np.stack([np.full(len(own), domain), own], axis=1) for domain, own in enumerate(rows)]
        by_class.append(requests([own[at : at + size] for own in pairs for at in range(0, len(own), size)]))
    yield "one class only", Scenario(by_class)
    yield "noise images", Scenario([_with_noise(iid, model, seed)])
    yield "half poisoned", Scenario([_poisoned(iid, model)])


def _with_noise(iid: list[Request], model: SourceModel, seed: int) -> list[Request]:
    """Every second request is of noise."""
    generator = torch.Generator().manual_seed(seed)
    low, high = model.settings.input.range or (0.0, 1.0)
    made = []
    for request in iid:
        noise = low + (high - low) * torch.rand(request.x.shape, generator=generator)
        made += [Request(noise, np.full(len(noise), -1), request.domain), request]
    return made


def _poisoned(iid: list[Request], model: SourceModel, steps: int = 5, size: float = 8 / 255) -> list[Request]:
    """As many rows again as there are in each request are an attacker's, who knows the source model: rows of the
    request, changed by projected gradient descent so that the source is sure of one wrong class, the same for all."""
    made = []
    for number, request in enumerate(iid):
        target = torch.full((len(request.x),), number % len(model.classes))
        attack = request.x.clone()
        for _ in range(steps):
            attack = attack.detach().requires_grad_(True)
            loss = torch.nn.functional.cross_entropy(_differentiable(model, attack), target)
            (slope,) = torch.autograd.grad(loss, attack)
            attack = (attack - size / 2 * slope.sign()).detach()
            attack = (request.x + (attack - request.x).clamp(-size, size)).clamp(0, 1)
        mixed = torch.stack([request.x, attack.detach()], dim=1).flatten(0, 1)
        labels = np.stack([request.labels, np.full(len(request.labels), -1)], axis=1).reshape(-1)
        made.append(Request(mixed, labels, request.domain))
    return made


def _differentiable(model: SourceModel, x: Tensor) -> Tensor:
    """The source's scores, with a gradient: layer by layer, as the graph of the plain source has none."""
    from adapters.base import Segments
    from tta_server.engine.norm import Pass

    return model.network.run(Pass(Segments([len(x)]), observe=True), x).logits


def run(model: SourceModel, policy: Policy, scenario: Scenario, guard: GuardSettings | None, seed: int) -> Outcome:
    """Serves the scenario's streams by the server's own engine."""
    engine = Engine(
        {model.name: model}, StateStore(Budget(4), model.network.device), Monitor(20.0), 0.25, monitored=False
    )
    lane = Lane(model.name, policy, model.digest)
    wrong: dict[str, list[NDArray[np.bool_]]] = {}
    served, counted, moves, began = 0, 0, [], time.monotonic()
    for number, requests in enumerate(scenario.streams):
        stream = Stream(f"{number}", model.name, policy, rng.stream_key(f"{number}", seed), 0.0, model.digest)
        stream.guard = None if guard is None else make_guard(guard)
        for request in requests:
            answers: list[Answer] = []

            def take(job: Job, answer: Answer | Exception, answers: list[Answer] = answers) -> None:
                if isinstance(answer, Exception):
                    raise answer
                answers.append(answer)

            stats = engine.step(Plan(lane, [Job(stream, lambda *_: None, lane, request.x)]), take)
            moves += [_told(event) for event in stats.events if event.kind == "guard"]
            counts = request.labels >= 0
            guess = answers[0].logits.numpy().argmax(1)
            wrong.setdefault(request.domain, []).append((guess != request.labels)[counts])
            counted += int(counts.sum())
            served += int(counts.sum()) * (answers[0].served != "source")
    errors = {name: 100 * float(np.concatenate(parts).mean()) for name, parts in wrong.items()}
    return Outcome(
        float(np.mean(list(errors.values()))), errors, time.monotonic() - began, served / max(counted, 1), moves
    )


def _told(event: Event) -> str:
    fields = event.fields
    return f"{fields['from']}>{fields['to']} {fields['rule']} {fields.get('statistic', 0):.3f} {fields['action']}"


def settings_of(name: str, overrides: dict[str, Any], model: SourceModel) -> Policy:
    """The policy with its settings for the model; a learning rate is a multiple of its own."""
    settings = {**starting_settings(name, model.settings), **POLICIES[name]}
    policy = make_policy(name, settings)
    if "lr" in overrides:
        settings |= {"lr": overrides["lr"] * policy.lr}  # type: ignore[attr-defined]  # all of them have one
    return make_policy(name, settings)


def report(results: dict[str, dict[str, Any]], policies: Sequence[str]) -> Table:
    """Source, policy alone, guarded, and the share of the gain that is kept."""
    table = Table(title="Error in percent: alone > guarded (share of the gain that is kept)")
    table.add_column("scenario")
    table.add_column("source", justify="right")
    for name in policies:
        table.add_column(name, justify="right")
    for scenario, found in results.items():
        source = found[SOURCE]["error"]
        cells = []
        for name in policies:
            if name not in found:
                cells.append("")
                continue
            alone, guarded = found[name]["alone"]["error"], found[name]["guarded"]["error"]
            kept = f" ({100 * (source - guarded) / (source - alone):.0f} %)" if source - alone > 1 else ""
            mark = "[red]" if guarded > source + 1 else ""
            cells.append(f"{alone:.1f} > {mark}{guarded:.1f}{'[/red]' if mark else ''}{kept}")
        table.add_row(scenario, f"{source:.1f}", *cells)
    return table


def plot(results: dict[str, dict[str, Any]], policies: Sequence[str], path: Path) -> None:
    """Alone and guarded beside the source, a panel for each policy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(policies), figsize=(3.2 * len(policies), 4.5), sharey=True, squeeze=False)
    names = list(results)
    place = np.arange(len(names))
    for panel, policy in zip(panels[0], policies, strict=True):
        there = [name for name in names if policy in results[name]]
        at = place[[names.index(name) for name in there]]
        for shift, which, colour in ((-0.2, "alone", "tab:red"), (0.2, "guarded", "tab:blue")):
            panel.barh(
                at + shift, [results[name][policy][which]["error"] for name in there], 0.4, color=colour, label=which
            )
        panel.scatter(
            [results[name][SOURCE]["error"] for name in there], at, marker="|", s=300, color="k", label=SOURCE
        )
        panel.set_title(policy)
        panel.set_xlabel("error, %")
    panels[0][0].set_yticks(place, names)
    panels[0][0].invert_yaxis()
    panels[0][-1].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Runs all, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("harm"))
    parser.add_argument("--half", choices=["even", "odd", "all"], default="odd")
    parser.add_argument("--policies", nargs="+", default=list(POLICIES))
    parser.add_argument("--scenarios", nargs="+")
    parser.add_argument("--limit", type=int, default=500, help="images of each domain")
    parser.add_argument("--size", type=int, default=64, help="images in a request")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--artefacts", type=Path, help="made before, so as not to prepare again")
    parser.add_argument("--guard", nargs="*", default=[], help="setting=value, in the place of a default")
    options = parser.parse_args()
    torch.set_num_threads(max(1, (os.cpu_count() or 2) // 2))
    data = Path(os.environ.get("TTA_DATA") or parser.error("set TTA_DATA, see examples/cifar10c/README.md"))
    changed = {name: json.loads(value) for name, _, value in (one.partition("=") for one in options.guard)}
    guard = GuardSettings(**changed)
    console = Console()
    chosen = {"even": DOMAINS[::2], "odd": DOMAINS[1::2], "all": DOMAINS}[options.half]
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for file in ("config.yaml", "resnet_cifar.py"):
            shutil.copy(EXAMPLE / file, folder)
        config = Path(folder) / "config.yaml"
        if options.artefacts:
            shutil.copy(options.artefacts, Path(folder) / "resnet20.artefacts.safetensors")
        prepare(PrepareOptions(config, data / "source_train.npz", only=GROUPS), console)
        model = load_model("resnet20", load_settings(config), torch.device("cpu"))
        domains = load_domains(data, chosen, 5, options.limit)
        clean = load_domains(data, ("clean",), 5, options.limit)
        made = [*scenarios(model, domains, options.size, options.seed)]
        made.append(("clean", next(scenarios(model, clean, options.size, options.seed))[1]))
        made = [one for one in made if not options.scenarios or one[0] in options.scenarios]
        options.out.mkdir(parents=True, exist_ok=True)
        with Progress(console=console) as progress:
            task = progress.add_task("runs", total=len(made) * (1 + 2 * len(options.policies)))
            for name, scenario in made:
                found = results[name] = {}
                found[SOURCE] = vars(run(model, make_policy(SOURCE, {}), scenario, None, options.seed))
                progress.advance(task)
                for policy in options.policies:
                    wanted = settings_of(policy, scenario.overrides, model)
                    found[policy] = {}
                    for which, own in (("alone", None), ("guarded", guard)):
                        progress.update(task, description=f"{name}: {policy}, {which}")
                        found[policy][which] = vars(run(model, wanted, scenario, own, options.seed))
                        progress.advance(task)
                    (options.out / "harm.json").write_text(json.dumps(results, indent=1))
    console.print(report(results, options.policies))
    plot(results, options.policies, options.out / "harm.png")
    console.print(f"{options.out}: harm.json, harm.png")


if __name__ == "__main__":
    main()
