"""What adapting costs on an NVIDIA GPU: steps, the Triton norm, copies, and whether streams get the same bits.

    python benchmarks/gpu.py [--only steps norm copies isolation] [--models resnet20 resnet50] [--streams 1 8 64 512]
                             [--rows 1 8 64] [--most-rows 4096] [--batch-rows 512] [--rounds 10] [--out gpu.png]

*steps*: the next request of every stream, of so many images: a plain forward in the engine, a TENT step in it, and the
plain PyTorch TENT loop, a model and an Adam for each stream. The engine merges up to ``--batch-rows`` images. The loop
takes the same time for each stream, so it is measured on at most ``PLAIN`` of them and scaled up. Cases of more than
``--most-rows`` images in all are left out.

*norm*: one batch-norm layer, forward and backward, in the sizes that the two networks have: the eager segment norm, the
Triton kernels, and torch's own over all rows together, which is no segment norm but a mark to go by.

*copies*: images to the device from pageable memory, from pinned memory, and by way of a pinned buffer.

*isolation*: eight TENT streams in company and alone: the largest difference of their scores, over ten requests.

Networks have random weights, images are random, all is float32. Times are those of CUDA events, medians over rounds in
which the variants take turns; ratios are medians of the rounds' ratios. Without CUDA it says so and ends;
``--device cpu`` tries it all the same, with the clock in the place of events.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import example
import resnet50
import safetensors.torch
import torch
import torch.nn.functional as F
import yaml
from plain_tent import PlainTent
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

from adapters import Policy
from adapters.base import BATCH_NORM, Segments
from adapters.source import SourcePolicy
from adapters.tent import Tent
from tta_server.drift.monitor import Monitor
from tta_server.engine import triton_norm
from tta_server.engine.engine import Engine
from tta_server.engine.segment_norm import SegmentBatchNorm
from tta_server.engine.source import SourceModel, load_model
from tta_server.scheduler import Bounds, Scheduler
from tta_server.settings import load_settings
from tta_server.state.memory import Budget
from tta_server.state.store import StateStore
from tta_server.types import Answer, Job, Lane, Stream

PLAIN = 16
"""Most models of the plain loop."""
TENT = Tent(lr=1e-3)
SHAPES = {"resnet20": (3, 32, 32), "resnet50": resnet50.SHAPE}
LAYERS = {"resnet20": ((16, 32), (32, 16), (64, 8)), "resnet50": ((64, 112), (256, 56), (512, 28), (2048, 7))}
"""Channels and side of some of their batch norms."""
COMPANY = ((1, 8), (8, 1), (1, 64), (8, 8), (64, 1))
"""Streams and rows of each for those."""

Run = Callable[[], object]


def network(name: str) -> nn.Module:
    """The same at every call."""
    torch.manual_seed(0)
    return resnet50.resnet50() if name == "resnet50" else example.network()


def load(name: str, device: torch.device) -> SourceModel:
    """The network as the engine loads it."""
    factory = {"resnet50": "resnet50:resnet50", "resnet20": "resnet_cifar:resnet20"}[name]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        safetensors.torch.save_file(network(name).state_dict(), path / "weights.safetensors")
        model = {"factory": factory, "weights": "weights.safetensors", "input": {"shape": list(SHAPES[name])}}
        (path / "config.yaml").write_text(yaml.safe_dump({"models": {name: model}}), encoding="utf-8")
        return load_model(name, load_settings(path / "config.yaml"), device)


class Streams:
    """Streams of one model under one policy, in an engine of their own."""

    def __init__(self, model: SourceModel, policy: Policy, count: int, batch_rows: int) -> None:
        store = StateStore(Budget(), model.network.device)
        self._engine = Engine({model.name: model}, store, Monitor(20.0), 0.0, monitored=False)
        self._lane, self._bounds = Lane(model.name, policy), Bounds(max_rows=batch_rows, max_streams=batch_rows)
        self._clients = [Stream(str(index), model.name, policy, index, 0.0) for index in range(count)]

    def request(self, batches: list[Tensor]) -> list[Tensor]:
        """One request of each, merged; their scores."""
        scheduler, scores = Scheduler(self._bounds), dict[Stream, Tensor]()

        def keep(job: Job, answer: Answer | Exception) -> None:
            if isinstance(answer, Exception):
                raise answer
            scores[job.stream] = answer.logits

        for client, x in zip(self._clients, batches, strict=True):
            scheduler.submit(Job(client, lambda answer, error: None, self._lane, x))
        while (plan := scheduler.next_batch(0.0)) is not None:
            self._engine.step(plan, keep)
            scheduler.complete(plan)
        return [scores[client] for client in self._clients]


def milliseconds(run: Run, device: torch.device) -> float:
    """Of one run on the device, from an idle one to an idle one."""
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - started)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def take_turns(variants: Mapping[str, Run], device: torch.device, rounds: int) -> list[dict[str, float]]:
    """Milliseconds of each, by round; each runs twice before."""
    for run in variants.values():
        run()
        run()
    return [{name: milliseconds(run, device) for name, run in variants.items()} for _ in range(rounds)]


def middle(times: list[dict[str, float]], name: str, below: str = "") -> float:
    """Median of a variant's times, or of their ratios to another one's."""
    return statistics.median(one[name] / (one[below] if below else 1.0) for one in times)


def table(title: str, *columns: str) -> Table:
    """With the first column to the left."""
    made = Table(title=title)
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left")
    return made


def steps(options: argparse.Namespace, device: torch.device) -> None:
    """Forward, TENT step and plain loop."""
    title = f"A request of each stream, {options.batch_rows} images merged at most"
    columns = "streams", "images", "forward ms", "TENT ms", "TENT / forward", "plain loop ms", "plain / TENT"
    shown = table(title, "model", *columns)
    speedups: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for name in options.models:
        model, plain = load(name, device), network(name).to(device)
        cases = [(streams, rows) for rows in options.rows for streams in options.streams]
        for streams, rows in track(cases, name, console=Console(stderr=True)):
            if streams * rows > options.most_rows:
                continue
            batches = [torch.rand(rows, *SHAPES[name], device=device) for _ in range(streams)]
            forward, tent = (Streams(model, one, streams, options.batch_rows) for one in (SourcePolicy(), TENT))
            variants: dict[str, Run] = {
                "forward": partial(forward.request, batches),
                "tent": partial(tent.request, batches),
                "plain": partial(plain_loop, PlainTent(plain), batches[:PLAIN]),
            }
            times = take_turns(variants, device, options.rounds)
            for one in times:
                one["plain"] *= max(1, streams / PLAIN)
            faster = middle(times, "plain", "tent")
            shown.add_row(
                name, str(streams), str(rows), f"{middle(times, 'forward'):.2f}", f"{middle(times, 'tent'):.2f}",
                f"{middle(times, 'tent', 'forward'):.2f}", f"{middle(times, 'plain'):.2f}", f"{faster:.2f}",
            )  # fmt: skip
            speedups.setdefault((name, rows), []).append((streams, faster))
    Console().print(shown)
    if options.out is not None:
        plot(speedups, options.out)


def plain_loop(tent: PlainTent, batches: list[Tensor]) -> None:
    """A request of each stream in the plain loop."""
    for index, x in enumerate(batches):
        tent(str(index), x)


def norm(options: argparse.Namespace, device: torch.device) -> None:
    """The Triton norm against the eager one."""
    has_triton = device.type == "cuda" and triton_norm.available(torch.empty(1, device=device))
    if not has_triton:
        Console().print("The Triton norm does not run here: is triton installed, and a C compiler?")
    columns = "streams", "images", "order", "eager ms", "Triton ms", "eager / Triton", "one batch norm ms"
    shown = table("A batch norm, forward and backward", "layer", *columns)
    layers = [layer for name in options.models for layer in LAYERS[name]]
    company = [(streams, rows) for streams, rows in COMPANY if streams * rows <= options.most_rows]
    cases = [(layer, one, last) for layer in layers for one in company for last in (False, True)]
    for (channels, side), (streams, rows), last in track(cases, "norm", console=Console(stderr=True)):
        order = torch.channels_last if last else torch.contiguous_format
        x, slope = (
            torch.randn(streams * rows, channels, side, side, device=device).to(memory_format=order) for _ in range(2)
        )
        weights = [torch.ones(streams, channels, device=device).requires_grad_(one < 2) for one in range(4)]
        segments = Segments([rows] * streams, device)

        variants: dict[str, Run] = {
            "eager": partial(segment_norm, SegmentBatchNorm, x, slope, weights, segments),
            "one": partial(batch_norm, x, slope, weights),
        }
        if has_triton:
            variants["triton"] = partial(segment_norm, triton_norm.TritonBatchNorm, x, slope, weights, segments)
        times = take_turns(variants, device, options.rounds)
        triton = "-", "-"
        if has_triton:
            triton = f"{middle(times, 'triton'):.3f}", f"{middle(times, 'eager', 'triton'):.2f}"
        shown.add_row(
            f"{channels} x {side} x {side}", str(streams), str(rows), "channels last" if last else "contiguous",
            f"{middle(times, 'eager'):.3f}", *triton, f"{middle(times, 'one'):.3f}",
        )  # fmt: skip
    Console().print(shown)


def segment_norm(
    kind: type[torch.autograd.Function], x: Tensor, slope: Tensor, weights: list[Tensor], segments: Segments
) -> None:
    """Forward and backward."""
    leaf = x.detach().requires_grad_()
    y, _, _ = kind.apply(leaf, *weights, segments, BATCH_NORM, 1e-5)
    torch.autograd.grad(y, [leaf, *weights[:2]], slope.view_as(y))


def batch_norm(x: Tensor, slope: Tensor, weights: list[Tensor]) -> None:
    """Forward and backward of torch's own, all rows one batch."""
    leaf = x.detach().requires_grad_()
    y = F.batch_norm(leaf, None, None, weights[0][0], weights[1][0], True)
    torch.autograd.grad(y, [leaf, *weights[:2]], slope)


def copies(options: argparse.Namespace, device: torch.device) -> None:
    """Pageable against pinned memory."""
    if device.type != "cuda":
        Console().print("Copies need a GPU: pinned memory is of no use without one.")
        return
    columns = "images", "MB", "pageable ms", "pinned ms", "through a pinned buffer ms", "pageable / buffer"
    shown = table("Images to the device", "model", *columns)
    for name in options.models:
        for rows in options.rows:
            x = torch.rand(rows, *SHAPES[name])
            pinned, buffer = x.pin_memory(), torch.empty_like(x, pin_memory=True)
            variants: dict[str, Run] = {
                "pageable": partial(x.to, device),
                "pinned": partial(pinned.to, device, non_blocking=True),
                "buffer": partial(through, buffer, x, device),
            }
            times = take_turns(variants, device, options.rounds)
            shown.add_row(
                name, str(rows), f"{1e-6 * x.nbytes:.2f}", *(f"{middle(times, one):.3f}" for one in variants),
                f"{middle(times, 'pageable', 'buffer'):.2f}",
            )  # fmt: skip
    Console().print(shown)


def through(buffer: Tensor, x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device by way of a pinned buffer."""
    return buffer.copy_(x).to(device, non_blocking=True)


def isolation(options: argparse.Namespace, device: torch.device) -> None:
    """Streams in company against streams alone."""
    shown = table("Eight TENT streams, ten requests each", "model", "images", "largest score", "largest difference")
    for name in options.models:
        model = load(name, device)
        for rows in options.rows:
            if 8 * rows > options.most_rows:
                continue
            company, alone = (Streams(model, TENT, 8, most) for most in (8 * rows, 1))
            gap = largest = 0.0
            for _ in range(10):
                batches = [torch.rand(rows, *SHAPES[name], device=device) for _ in range(8)]
                for one, other in zip(company.request(batches), alone.request(batches), strict=True):
                    gap, largest = max(gap, (one - other).abs().max().item()), max(largest, one.abs().max().item())
            shown.add_row(name, str(rows), f"{largest:.1f}", f"{gap:.1e}" if gap else "none, bit for bit")
    Console().print(shown)


def plot(speedups: dict[tuple[str, int], list[tuple[int, float]]], path: Path) -> None:
    """Saves how many times as fast as the plain loop a TENT step is, by streams."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    for (name, rows), points in speedups.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=f"{name}, {rows} image{'s' if rows > 1 else ''}")
    axes.axhline(1, color="grey", linewidth=1)
    axes.set(xscale="log", xlabel="streams", ylabel="times as fast as a plain TENT loop", ylim=(0, None))
    streams = sorted({count for points in speedups.values() for count, _ in points})
    axes.set_xticks(streams, [str(count) for count in streams])
    axes.minorticks_off()
    axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


PARTS = {"steps": steps, "norm": norm, "copies": copies, "isolation": isolation}


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64, 512])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--most-rows", type=int, default=4096)
    parser.add_argument("--batch-rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=None, help="where to save a plot of the steps")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("There is no CUDA device here: nothing to measure. (--device cpu tries the benchmark all the same.)")
        return
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    triton = "none" if find_spec("triton") is None else version("triton")
    Console().print(
        f"{where}; torch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, "
        f"Triton {triton}; TF32 in convolutions: {torch.backends.cudnn.allow_tf32}; {options.rounds} rounds"
    )
    for part in options.only:
        PARTS[part](options, device)


if __name__ == "__main__":
    main()
