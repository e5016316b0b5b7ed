"""What a stream of each policy weighs: state bytes for ResNet-50 on ImageNet, 224 x 224, and for ResNet-20 on CIFAR-10.

The networks have random weights; bytes do not depend on them. Settings are those of the preset for that scale, and
small requests' windows are counted apart. Run:  python benchmarks/state_bytes.py
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import adapters
from adapters import serving
from adapters.base import Source
from tta_server.engine.forward import StreamwiseNetwork, probe
from tta_server.policies import make_policy
from tta_server.settings import InputSettings
from tta_server.state.slots import Layout

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "cifar10c"))
from resnet_cifar import resnet20


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, four times as wide at the end, beside a shortcut."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width_in, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width),
        )  # fmt: skip
        self.shortcut: nn.Module = nn.Identity()
        if width_in != 4 * width:
            self.shortcut = nn.Sequential(
                nn.Conv2d(width_in, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def resnet50() -> nn.Module:
    """He et al. 2016, 25,557,032 parameters."""
    blocks: list[nn.Module] = []
    width_in = 64
    for stage, count in enumerate((3, 4, 6, 3)):
        for block in range(count):
            blocks.append(Bottleneck(width_in, 64 * 2**stage, 2 if stage and not block else 1))
            width_in = 4 * 64 * 2**stage
    stem = (nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def source_of(network: nn.Module, side: int) -> Source:
    """What policies see of a network, as the engine makes it."""
    head = [name for name, one in network.named_modules() if isinstance(one, nn.Linear)][-1]
    spec = InputSettings(shape=(3, side, side))
    streamwise = StreamwiseNetwork(network, spec, head, torch.device("cpu"))
    found = probe(streamwise, spec)
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    parameters = [key for key, _ in network.named_parameters()]
    return Source(
        weights=tensors,
        parameters=tuple(parameters),
        affine=tuple(key for key in parameters if key.rpartition(".")[0] in streamwise.norm_layers),
        statistics=tuple(key for key in tensors if key.endswith(("running_mean", "running_var"))),
        num_classes=found.classes,
        feature_dim=found.features,
        head=head,
        input_shape=spec.shape,
        input_range=spec.range,
    )


def main() -> None:
    sources = {"imagenet": source_of(resnet50(), 224), "cifar": source_of(resnet20(), 32)}
    table = Table(
        "policy", "ResNet-50", "with window 64", "ResNet-20", "with window 64", title="state bytes per stream"
    )
    for name, kind in adapters.policies().items():
        cells = []
        for scale, source in sources.items():
            for window in (0, 64):
                # The warm-up only gives the state its values.
                cold = {"warm_up": False} if name == "rmt" else {}
                policy = make_policy(name, {**kind.presets.get(scale, {}), **cold, "window": window})
                try:
                    cells.append(f"{Layout(serving.init(policy, source)).bytes:,}")
                except ValueError:
                    cells.append("-")
        table.add_row(name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
