"""ResNets for CIFAR (He et al. 2016, section 4.2): three stages of basic blocks, shortcuts without parameters."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut that subsamples and zero-pads channels where the shape changes."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self._stride, self._pad = stride, (width - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self._pad:
            shortcut = F.pad(x[:, :, :: self._stride, :: self._stride], (0, 0, 0, 0, self._pad, self._pad))
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + shortcut)


class CifarResNet(nn.Module):
    """``depth = 6 blocks + 2`` layers for inputs ``[N, 3, 32, 32]``, scores ``[N, classes]``."""

    def __init__(self, blocks: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(blocks, 16, 16, 1)
        self.layer2 = _stage(blocks, 16, 32, 2)
        self.layer3 = _stage(blocks, 32, 64, 2)
        self.linear = nn.Linear(64, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


def _stage(blocks: int, width_in: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(*(BasicBlock(width if i else width_in, width, 1 if i else stride) for i in range(blocks)))


def resnet20(classes: int = 10) -> CifarResNet:
    """ResNet-20, 269,722 parameters with 10 classes."""
    return CifarResNet(3, classes)
