"""The model that the benchmarks run: the example's ResNet-20 with random weights, as speed and memory do not mind."""

from __future__ import annotations

import sys
from pathlib import Path

import safetensors.torch
import torch
import yaml
from torch import nn

EXAMPLE = Path(__file__).parent.parent / "examples" / "cifar10c"


def network() -> nn.Module:
    """A ResNet-20, the same at every call."""
    sys.path.insert(0, str(EXAMPLE))
    from resnet_cifar import resnet20

    torch.manual_seed(0)
    return resnet20()


def write_config(folder: Path) -> Path:
    """Writes the network's weights and a config for them into ``folder``; returns the config's path."""
    safetensors.torch.save_file(network().state_dict(), folder / "weights.safetensors")
    model = {
        "factory": "resnet_cifar:resnet20",
        "weights": "weights.safetensors",
        "input": {"shape": [3, 32, 32]},
        "policies": {"tent": {"optimiser": "adam", "lr": 1e-3}},
    }
    (folder / "resnet_cifar.py").write_text((EXAMPLE / "resnet_cifar.py").read_text(encoding="utf-8"), encoding="utf-8")
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump({"models": {"resnet20": model}}), encoding="utf-8")
    return config
