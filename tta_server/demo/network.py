"""The demo's network: a small convolutional classifier of 8x8 digits, with batch normalisation to adapt."""

from __future__ import annotations

from collections import OrderedDict

from torch import nn


def digits_network(classes: int = 10) -> nn.Module:
    """Build an untrained network: images `[N, 1, 8, 8]` -> logits `[N, classes]`.

    It expects images already normalised with the mean and standard deviation of `tta_server.demo.data`; no
    normalisation happens inside. The last layer is linear and takes features `[N, 64]`.
    """
    return nn.Sequential(
        OrderedDict(
            block1=_block(1, 16),
            block2=_block(16, 32),
            halve=nn.MaxPool2d(2),
            block3=_block(32, 32),
            block4=_block(32, 64),
            mean=nn.AdaptiveAvgPool2d(1),
            features=nn.Flatten(),
            head=nn.Linear(64, classes),
        )
    )


def _block(inputs: int, outputs: int) -> nn.Module:
    """Convolve 3x3, normalise, rectify: `[N, inputs, H, W]` -> `[N, outputs, H, W]`."""
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            norm=nn.BatchNorm2d(outputs),
            relu=nn.ReLU(),
        )
    )
