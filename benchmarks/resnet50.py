"""ResNet-50 for benchmarks (He et al. 2016, with the stride in the 3x3 convolution, as most weights have it): speed and
memory do not mind that its weights are random."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

SHAPE = (3, 224, 224)
"""Of one input."""


class Bottleneck(nn.Module):
    """Convolutions of 1x1, 3x3 and 1x1 beside a shortcut, which is projected where the shape changes."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = nn.Sequential()
        if stride > 1 or width_in != 4 * width:
            self.downsample.append(nn.Conv2d(width_in, 4 * width, 1, stride, bias=False))
            self.downsample.append(nn.BatchNorm2d(4 * width))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.downsample(x))


class ResNet50(nn.Module):
    """Inputs ``[N, 3, 224, 224]``, scores ``[N, classes]``."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = _stage(3, 64, 64, 1)
        self.layer2 = _stage(4, 256, 128, 2)
        self.layer3 = _stage(6, 512, 256, 2)
        self.layer4 = _stage(3, 1024, 512, 2)
        self.fc = nn.Linear(2048, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, padding=1)
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        scores: Tensor = self.fc(x.mean((2, 3)))
        return scores


def _stage(blocks: int, width_in: int, width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(*(Bottleneck(4 * width if i else width_in, width, 1 if i else stride) for i in range(blocks)))


def resnet50(classes: int = 1000) -> ResNet50:
    """ResNet-50, 25,557,032 parameters with 1,000 classes, 53,120 of them scales and shifts."""
    return ResNet50(classes)
