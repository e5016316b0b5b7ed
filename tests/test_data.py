"""The data folder: both layouts, the orders, and what each fault of a folder is told as."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tta_server.data import Domain, arrange, check_fit, gather, load_domains, to_inputs
from tta_server.errors import ConfigError
from tta_server.settings import InputSettings

ORDERS = ("domains", "sorted", "shuffled", "dirichlet:0.1", "dirichlet:100")
SPEC = InputSettings(shape=(3, 4, 4))


def pixels(rows: int, value: int = 0) -> np.ndarray[Any, Any]:
    """Images `[rows, 4, 4, 3]` whose first pixel is the row number plus `value`."""
    images = np.zeros((rows, 4, 4, 3), np.uint8)
    images[:, 0, 0, 0] = np.arange(rows) + value
    return images


def domain_of(name: str, labels: list[int]) -> Domain:
    return Domain(name, pixels(len(labels)), np.array(labels))


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    np.savez(tmp_path / "clean.npz", images=pixels(6), labels=np.array([0, 1, 2, 0, 1, 2], np.uint8))
    np.savez(tmp_path / "source_train.npz", images=pixels(3), labels=np.array([2, 1, 0]))
    np.savez(tmp_path / "zebra.npz", images=pixels(4), labels=np.array([3, 3, 2, 2]))
    for value, name in enumerate(("fog", "aardvark", "gaussian_noise"), 10):
        np.savez(tmp_path / f"{name}.npz", images=pixels(6, value))
    return tmp_path


@pytest.fixture
def official(tmp_path: Path) -> Path:
    for value, name in enumerate(("snow", "shot_noise"), 100):
        np.save(tmp_path / f"{name}.npy", pixels(30, value))
    np.save(tmp_path / "labels.npy", np.tile(np.arange(6), 5))
    return tmp_path


def test_default_domains_are_the_standard_ones_in_their_order_then_the_others(npz: Path) -> None:
    domains = load_domains(npz)
    assert [one.name for one in domains] == ["gaussian_noise", "fog", "aardvark", "zebra"]
    assert domains[0].images[:, 0, 0, 0].tolist() == [12, 13, 14, 15, 16, 17]
    assert domains[0].labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert domains[3].labels.tolist() == [3, 3, 2, 2], "its own labels go before those of clean.npz"


def test_named_domains_come_as_named_and_may_be_the_clean_ones(npz: Path) -> None:
    assert [one.name for one in load_domains(npz, ["zebra", "clean", "source_train"])] == [
        "zebra",
        "clean",
        "source_train",
    ]


@pytest.mark.parametrize("severity", [1, 2, 5])
def test_official_layout_takes_the_rows_of_the_severity(official: Path, severity: int) -> None:
    domains = load_domains(official, severity=severity)
    assert [one.name for one in domains] == ["shot_noise", "snow"]
    start = 101 + 6 * (severity - 1)
    assert domains[0].images[:, 0, 0, 0].tolist() == list(range(start, start + 6))
    assert domains[0].labels.tolist() == list(range(6))
    assert isinstance(domains[0].images, np.memmap)


@pytest.mark.parametrize("layout", ["npz", "official"])
def test_limit_keeps_the_first_rows(layout: str, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(layout)
    whole, first = load_domains(folder, severity=3), load_domains(folder, severity=3, limit=2)
    assert all(np.array_equal(few.images, all_.images[:2]) for few, all_ in zip(first, whole, strict=True))
    assert [len(one.labels) for one in load_domains(folder, limit=1000)] == [len(one.labels) for one in whole]


def save_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, pixels(6))


Spoil = Callable[[Path], object]
FAULTS: dict[str, tuple[Spoil, dict[str, Any], str]] = {
    "no such domain": (
        lambda _: None,
        {"names": ["fog", "mist"]},
        "no domain 'mist' in .*; there are: gaussian_noise, fog, aardvark, clean, source_train, zebra",
    ),
    "named twice": (lambda _: None, {"names": ["fog", "fog"]}, "'fog' is named twice"),
    "severity": (lambda _: None, {"severity": 6}, "severity must be 1 to 5, got 6"),
    "limit": (lambda _: None, {"limit": 0}, "limit of rows per domain must be at least 1, got 0"),
    "pickled": (lambda f: np.savez(f / "fog.npz", images=np.array([{}])), {}, "cannot read .*fog.npz: .*allow_pickle"),
    "no zip": (lambda f: (f / "fog.npz").write_bytes(b"PK\x03\x04 nonsense"), {}, "cannot read .*fog.npz: .*zip"),
    "no archive": (lambda f: save_array(f / "fog.npz"), {}, "cannot read .*fog.npz: it holds a single array"),
    "empty file": (lambda f: (f / "fog.npz").write_bytes(b""), {}, "cannot read .*fog.npz: .*"),
    "no images": (lambda f: np.savez(f / "fog.npz", x=pixels(6)), {}, "fog.npz has no array 'images'"),
    "floats": (
        lambda f: np.savez(f / "fog.npz", images=pixels(6) / 255),
        {},
        r"images of .*fog.npz must be uint8 \[rows, height, width, channels\], got float64 \[6, 4, 4, 3\]",
    ),
    "grey": (
        lambda f: np.savez(f / "fog.npz", images=pixels(6)[..., 0]),
        {},
        r"must be uint8 .*, got uint8 \[6, 4, 4\]",
    ),
    "lengths": (
        lambda f: np.savez(f / "fog.npz", images=pixels(5)),
        {},
        "fog.npz has 5 images, but .*clean.npz has 6 labels",
    ),
    "no labels": (lambda f: (f / "clean.npz").unlink(), {}, "no labels for the images of .*: looked .* in .*clean.npz"),
    "odd labels": (
        lambda f: np.savez(f / "fog.npz", images=pixels(6), labels=np.zeros((6, 2))),
        {},
        r"labels of .*fog.npz must be whole numbers \[rows\], got float64 \[6, 2\]",
    ),
    "nothing": (
        lambda f: np.savez(f / "fog.npz", images=pixels(0), labels=np.zeros(0, int)),
        {},
        "fog.npz has no images",
    ),
    "two files": (lambda f: np.save(f / "fog.npy", pixels(6)), {}, "both fog.npy and fog.npz"),
    "npy without labels": (lambda f: np.save(f / "mist.npy", pixels(6)), {}, "no labels for .*mist.npy.*labels.npy"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_folder_is_said(npz: Path, fault: str) -> None:
    spoil, arguments, message = FAULTS[fault]
    spoil(npz)
    with pytest.raises(ConfigError, match=message):
        load_domains(npz, **arguments)


def test_an_npy_file_must_be_one(official: Path) -> None:
    with (official / "snow.npy").open("wb") as file:
        np.savez(file, images=pixels(30))
    with pytest.raises(ConfigError, match=r"cannot read .*snow.npy"):
        load_domains(official, ["snow"])


def test_official_files_must_be_five_severities_long(official: Path) -> None:
    np.save(official / "snow.npy", pixels(29))
    np.save(official / "labels.npy", np.zeros(29, int))
    with pytest.raises(ConfigError, match=r"snow.npy has 29 images, which are not 5 severities of equal length"):
        load_domains(official, ["snow"])


def test_no_folder_and_no_domains(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no data folder /.*missing"):
        load_domains(tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"no domains in .*<domain>.npz with 'images'.*labels.npy$"):
        load_domains(tmp_path)
    with pytest.raises(ConfigError, match=r"no domain 'fog' in .*; there are: none"):
        load_domains(tmp_path, ["fog"])
    np.savez(tmp_path / "clean.npz", images=pixels(1), labels=np.zeros(1, int))
    with pytest.raises(ConfigError, match=r"no domains in .*; name what it has to use it: clean"):
        load_domains(tmp_path)


def test_images_and_labels_must_fit_the_model() -> None:
    domain = domain_of("fog", [0, 1, 2])
    check_fit([domain], SPEC, 3)
    with pytest.raises(ConfigError, match=r"'fog' run from 0 to 2; the model has the 2 classes 0 to 1"):
        check_fit([domain], SPEC, 2)
    with pytest.raises(ConfigError, match=r"'low' run from -1 to 0"):
        check_fit([domain_of("low", [0, -1])], SPEC, 3)
    for shape in ((3, 8, 8), (1, 4, 4), (48,)):
        with pytest.raises(ConfigError, match=r"'fog' are \[4, 4, 3\] \(height, width, channels\); the model's input"):
            check_fit([domain], InputSettings(shape=shape), 3)


LABELS = [np.random.default_rng(seed).integers(5, size=size) for seed, size in enumerate((101, 64, 7))]


@pytest.mark.parametrize("batch_size", [1, 16, 1000])
@pytest.mark.parametrize("order", ORDERS)
def test_every_row_is_served_exactly_once(order: str, batch_size: int) -> None:
    batches = arrange(LABELS, order, batch_size, seed=3)
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    served = [tuple(pair) for batch in batches for pair in batch.tolist()]
    assert sorted(served) == [(index, row) for index, own in enumerate(LABELS) for row in range(len(own))]


@pytest.mark.parametrize("order", ORDERS)
def test_only_shuffled_mixes_domains(order: str) -> None:
    batches = arrange(LABELS, order, 16, seed=0)
    domains = [batch[:, 0].tolist() for batch in batches]
    if order == "shuffled":
        assert any(len(set(one)) > 1 for one in domains)
        assert [len(one) for one in domains] == [16] * 10 + [12]
    else:
        assert all(len(set(one)) == 1 for one in domains)
        assert [len(one) for one in domains] == [16] * 6 + [5] + [16] * 4 + [7]
        assert [one[0] for one in domains] == [0] * 7 + [1] * 4 + [2]


def test_file_order_and_sorted_order() -> None:
    in_file, by_label = (np.concatenate(arrange(LABELS, order, 16, seed=0)) for order in ("domains", "sorted"))
    for index, labels in enumerate(LABELS):
        assert in_file[in_file[:, 0] == index, 1].tolist() == list(range(len(labels)))
        rows = by_label[by_label[:, 0] == index, 1]
        keys = [(int(labels[row]), int(row)) for row in rows]
        assert keys == sorted(keys), "by label, and within a label as in the file"


@pytest.mark.parametrize("order", ["shuffled", "dirichlet:0.5"])
def test_the_seed_fixes_the_order(order: str) -> None:
    first, again, other = (np.concatenate(arrange(LABELS, order, 16, seed)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_dirichlet_correlates_labels_the_more_the_smaller_its_parameter() -> None:
    labels = np.random.default_rng(0).permutation(np.arange(1000) % 10)

    def purity(order: str) -> float:
        """Share of the most frequent label in a batch of 50, averaged over batches and seeds."""
        batches = [batch for seed in range(5) for batch in arrange([labels], order, 50, seed)]
        return float(np.mean([np.bincount(labels[batch[:, 1]]).max() / len(batch) for batch in batches]))

    figures = [purity(order) for order in ("shuffled", "dirichlet:1000", "dirichlet:1", "dirichlet:0.01", "sorted")]
    assert figures == sorted(figures)
    assert figures[0] < 0.25
    assert figures[3] > 0.8
    assert figures[4] == 1.0


@pytest.mark.parametrize("x", ["1e-300", "1e300"])
def test_dirichlet_stands_extreme_parameters(x: str) -> None:
    assert len(np.unique(np.concatenate(arrange([LABELS[0]], f"dirichlet:{x}", 16, 0)), axis=0)) == len(LABELS[0])


@pytest.mark.parametrize("order", ["random", "", "domains:1", "dirichlet"])
def test_unknown_orders(order: str) -> None:
    with pytest.raises(ConfigError, match=r"no order|needs a number X above 0"):
        arrange(LABELS, order, 16, 0)


@pytest.mark.parametrize("x", ["", "0", "-1", "nan", "inf", "much"])
def test_dirichlet_parameter(x: str) -> None:
    with pytest.raises(ConfigError, match=rf"number X above 0, such as dirichlet:0.1, got '{x}'"):
        arrange(LABELS, f"dirichlet:{x}", 16, 0)


def test_gather_keeps_the_order_of_the_batch() -> None:
    domains = [domain_of("fog", [5, 6, 7]), Domain("snow", pixels(3, 100), np.array([1, 2, 3]))]
    images, labels = gather(domains, np.array([[1, 2], [0, 1], [1, 0]]))
    assert images[:, 0, 0, 0].tolist() == [102, 1, 100]
    assert labels.tolist() == [3, 6, 1]


@pytest.mark.parametrize(("spread", "low", "high"), [((0, 1), 0.0, 1.0), ((-2, 2), -2.0, 2.0), (None, 0.0, 1.0)])
def test_inputs_are_channels_first_and_spread_over_the_range(
    spread: tuple[float, float] | None, low: float, high: float
) -> None:
    images = np.zeros((2, 4, 5, 3), np.uint8)
    images[1, 2, 3, 0] = 255
    x = to_inputs(images, InputSettings(shape=(3, 4, 5), range=spread))
    assert x.dtype == torch.float32
    assert x.shape == (2, 3, 4, 5)
    assert x[1, 0, 2, 3] == high
    assert x.sum() == high + (x.numel() - 1) * low
