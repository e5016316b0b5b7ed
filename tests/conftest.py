"""What all tests share."""

from __future__ import annotations

import gc
import io
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from rich.console import Console

from tta_server.demo.data import training
from tta_server.demo.run import CONFIG
from tta_server.prepare import GROUPS, PrepareOptions, prepare

# The tensors here are tiny: more threads only get in one another's way.
torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def little_to_look_through() -> None:
    """What is there before a module's tests stays: no collection of garbage looks at it again. By the end of the suite
    that would take more than a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def prepared_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config file of the demo's digits model with all artefacts, made by ``tta-server prepare``; beside it
    ``source_train.npz``, the training digits."""
    folder = tmp_path_factory.mktemp("digits")
    config = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))
    config["models"]["digits"] |= {
        "weights": str(CONFIG.with_name("digits.safetensors")),
        "artefacts": "made.safetensors",
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    images, labels = training()
    np.savez(folder / "source_train.npz", images=images.transpose(0, 2, 3, 1), labels=labels)
    options = PrepareOptions(path, folder, only=tuple(GROUPS), warm_up_images=1000, replay_images=200)
    prepare(options, Console(file=io.StringIO()))
    return path
