"""Train the demo's network: `python -m tta_server.demo.train` rewrites `digits.safetensors` beside this file, and
`digits.artefacts.safetensors`, from which monitor and guard know what clean digits look like, and damaged ones.

About ten seconds on one core. The only augmentation is a shift by up to one pixel; the network never meets
the demo's corruptions. The seed is fixed: the same torch on the same kind of processor gives the same file.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from tta_server.demo.data import MEAN, STD, Digits, held_out, training, validation
from tta_server.demo.network import digits_network
from tta_server.drift.benefit import GROUP as BENEFIT
from tta_server.drift.estimators import GROUP as ESTIMATES
from tta_server.drift.reference import GROUP as MONITORING

WEIGHTS = Path(__file__).with_name("digits.safetensors")
SEED = 0
EPOCHS = 60
BATCH = 50
PEAK_LEARNING_RATE = 1e-2
WEIGHT_DECAY = 1e-2


def normalised(images: NDArray[np.uint8]) -> Tensor:
    """Turn images `[N, 1, 8, 8]`, 0 to 255, into the network's input: normalised by `MEAN` and `STD`."""
    return (torch.from_numpy(images).float() / 255 - MEAN) / STD


def shifted(images: Tensor) -> Tensor:
    """Shift each of the images `[N, 1, H, W]` at random by up to one pixel; edge pixels are repeated."""
    count, _, height, width = images.shape
    padded = functional.pad(images, (1, 1, 1, 1), mode="replicate")
    rows = torch.randint(3, (count, 1, 1)) + torch.arange(height)[:, None]
    columns = torch.randint(3, (count, 1, 1)) + torch.arange(width)
    return padded[torch.arange(count)[:, None, None], 0, rows, columns][:, None]


def train(digits: Digits) -> nn.Module:
    """Train a new network and return it in evaluation mode. Draws from torch's global generator."""
    images, labels = normalised(digits[0]), torch.from_numpy(digits[1])
    network = digits_network()
    batches = len(images) // BATCH
    steps = EPOCHS * batches
    optimiser = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_LEARNING_RATE, total_steps=steps)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images)).chunk(batches):
            logits = network(shifted(images[rows]))
            loss = functional.cross_entropy(logits, labels[rows], label_smoothing=0.05)
            optimiser.zero_grad()
            torch.autograd.backward(loss)
            optimiser.step()
            schedule.step()
    return network.eval()


@torch.no_grad()
def accuracy(network: nn.Module, digits: Digits) -> float:
    """Return the share of images that the network gets right."""
    right = network(normalised(digits[0])).argmax(1) == torch.from_numpy(digits[1])
    return float(right.float().mean())


def main() -> None:
    """Train, say how good the network is on held-out digits, and write its whole state dict."""
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    network = train(training())
    print(f"accuracy on held-out digits: {accuracy(network, held_out()):.2%}")
    WEIGHTS.write_bytes(save(network.state_dict()))
    print(f"wrote {WEIGHTS} ({WEIGHTS.stat().st_size} bytes)")
    with TemporaryDirectory() as folder:
        data = Path(folder) / "validation.npz"
        images, labels = validation()
        np.savez(data, images=images.transpose(0, 2, 3, 1), labels=labels)
        options = ("--data", str(data), "--only", f"{MONITORING},{BENEFIT},{ESTIMATES}", "--force")
        config = str(WEIGHTS.with_name("config.yaml"))
        subprocess.run([sys.executable, "-m", "tta_server", "prepare", config, *options], check=True)


if __name__ == "__main__":
    main()
