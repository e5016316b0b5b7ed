"""The demo's images: scikit-learn's handwritten digits, split once and for all into training, validation and held out.

The 1,797 images come with scikit-learn, so nothing is downloaded. Who wrote which is not known: both parts
surely share writers, so accuracy on the held-out digits says nothing about new writers.
"""

from __future__ import annotations

from importlib import import_module
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Digits: TypeAlias = tuple[NDArray[np.uint8], NDArray[np.int64]]

MEAN = 0.3049
"""Mean of all training pixels, black being 0 and white 1."""

STD = 0.3754
"""Standard deviation of all training pixels, black being 0 and white 1."""

TRAINING_SIZE = 1000
VALIDATION_SIZE = 300
SPLIT_SEED = 0


def training() -> Digits:
    """Return the 1,000 digits to train on, in the form of `held_out`."""
    return _split()[0]


def validation() -> Digits:
    """Return 300 digits that training never sees, from which the monitor knows clean digits; in the same form."""
    images, labels = _split()[1]
    return images[:VALIDATION_SIZE], labels[:VALIDATION_SIZE]


def held_out() -> Digits:
    """Return the 497 digits that neither sees: images `[N, 1, 8, 8]`, 0 to 255, and labels `[N]`.

    Raises `ImportError` where scikit-learn is not installed.
    """
    images, labels = _split()[1]
    return images[VALIDATION_SIZE:], labels[VALIDATION_SIZE:]


def _split() -> tuple[Digits, Digits]:
    """Return the training digits and all others; every class has its share of both parts."""
    try:
        load_digits = import_module("sklearn.datasets").load_digits
        train_test_split = import_module("sklearn.model_selection").train_test_split
    except ImportError as error:
        raise ImportError(
            "the demo's digits come with scikit-learn, which is not installed: "
            "install the extra `demo` (pip install 'tta-server[demo]')"
        ) from error
    levels, labels = load_digits(return_X_y=True)  # levels: [1797, 64], 0 to 16
    images = np.rint(levels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    first_images, second_images, first_labels, second_labels = train_test_split(
        images, labels.astype(np.int64), train_size=TRAINING_SIZE, stratify=labels, random_state=SPLIT_SEED
    )
    return (first_images, first_labels), (second_images, second_labels)
