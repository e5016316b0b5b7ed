"""Folders of labelled test images, and the orders in which a stream of requests is made of them.

A folder holds one file per *domain*, in either layout or both:

``<domain>.npz``
    ``images`` uint8 ``[N, height, width, channels]`` and, where they are not those of ``clean.npz``, ``labels [N]``.
``<domain>.npy`` and ``labels.npy``
    Official CIFAR-10-C and its kin: uint8 ``[5 n, height, width, channels]``, the same ``n`` images at severities 1 to
    5 one after the other, so that severity ``s`` is rows ``(s - 1) n`` to ``s n``; ``n`` is 10,000 there.
"""

from __future__ import annotations

import hashlib
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from tta_server.errors import ConfigError
from tta_server.settings import InputSettings

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]
Rows = NDArray[np.int64]
"""Which rows, in the order they are served. ``[N]`` within one domain; ``[N, 2]``: index of the domain, row in it."""

STANDARD_ORDER = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur", "snow",
    "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
"""The 15 corruptions of Hendrycks and Dietterich 2019, in the order in which adaptation papers run them."""
CLEAN, SOURCE_TRAIN, LABELS = "clean", "source_train", "labels"
SEVERITIES = 5
IMAGE_FILES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True, eq=False)
class Domain:
    """``images [N, height, width, channels]`` and ``labels [N]`` in the order of the file, at least one row."""

    name: str
    images: Images
    labels: Labels


def load_domains(folder: Path, names: Sequence[str] = (), severity: int = 5, limit: int | None = None) -> list[Domain]:
    """The named domains of a folder in the order given; of none named, all but ``clean`` and ``source_train``.

    Those come in ``STANDARD_ORDER``, others after them by name. ``severity`` chooses from ``.npy`` files only;
    ``limit`` keeps the first so many rows of each domain. Raises ``ConfigError`` saying what does not fit.
    """
    if not 1 <= severity <= SEVERITIES:
        raise ConfigError(f"the severity must be 1 to {SEVERITIES}, got {severity}")
    if limit is not None and limit < 1:
        raise ConfigError(f"the limit of rows per domain must be at least 1, got {limit}")
    files = _find(folder)
    if unknown := [name for name in names if name not in files]:
        raise ConfigError(f"no domain {unknown[0]!r} in {folder}; there are: {', '.join(files) or 'none'}")
    if repeated := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"the domain {repeated[0]!r} is named twice")
    chosen = names or [name for name in files if name not in (CLEAN, SOURCE_TRAIN)]
    if not chosen:
        only = f"; name what it has to use it: {', '.join(files)}" if files else ""
        raise ConfigError(
            f"no domains in {folder}: it needs files <domain>.npz with 'images' and 'labels', "
            f"or <domain>.npy beside a labels.npy{only}"
        )
    return [_load(files[name], severity, limit) for name in chosen]


def check_fit(domains: Sequence[Domain], spec: InputSettings, classes: int) -> None:
    """Raises ``ConfigError`` unless all images have the model's input shape and all labels lie in ``[0, classes)``."""
    for domain in domains:
        height, width, channels = domain.images.shape[1:]
        if (channels, height, width) != spec.shape:
            raise ConfigError(
                f"the images of domain {domain.name!r} are {[height, width, channels]} (height, width, channels); the "
                f"model's input shape {list(spec.shape)} needs [channels, height, width] = {[channels, height, width]}"
            )
        low, high = domain.labels.min(), domain.labels.max()
        if low < 0 or high >= classes:
            raise ConfigError(
                f"the labels of domain {domain.name!r} run from {low} to {high}; "
                f"the model has the {classes} classes 0 to {classes - 1}"
            )


def arrange(labels: Sequence[Labels], order: str, batch_size: int, seed: int) -> list[Rows]:
    """The batches ``[B, 2]`` (domain, row) in which a stream gets every row of every domain once.

    ``labels [N]`` of each domain. Orders, the first two and the last without a batch that crosses domains:

    ``domains``
        Domain after domain, rows as in the file.
    ``sorted``
        Domain after domain, rows by label; rows of one label as in the file.
    ``shuffled``
        All rows of all domains in one random order.
    ``dirichlet:X``
        Domain after domain, labels correlated in time as in NOTE (Gong et al. 2022, arXiv 2208.05117, whose ``delta``
        is ``X``; 0.1 there). Time has as many slots as the domain has classes. The rows of each class are shuffled and
        dealt out to the slots in shares drawn from a symmetric Dirichlet distribution of concentration ``X``, a draw
        per class and domain; within a slot the classes follow one another in random order. So small ``X`` puts a class
        mostly into one slot, and a large one makes all slots alike. Slots differ in size and are no batches: the
        sequence is cut into batches afterwards. NOTE also redraws until no slot is small, and closes full ones; that
        is left out.

    ``seed`` fixes all randomness. Raises ``ConfigError`` for an unknown order, or ``X`` not above 0.
    """
    kind, _, parameter = order.partition(":")
    generator = np.random.default_rng(seed)
    sequences: list[Rows]
    if order in ("domains", "shuffled"):
        sequences = [np.arange(len(own)) for own in labels]
    elif order == "sorted":
        sequences = [np.argsort(own, kind="stable") for own in labels]
    elif kind == "dirichlet":
        concentration = _concentration(parameter)
        sequences = [_correlated(own, concentration, generator) for own in labels]
    else:
        raise ConfigError(f"no order {order!r}; there are: domains, shuffled, sorted, dirichlet:X")
    sequences = [np.stack([np.full_like(rows, index), rows], axis=1) for index, rows in enumerate(sequences)]
    if order == "shuffled":
        sequences = [generator.permutation(np.concatenate(sequences))]
    return [rows[start : start + batch_size] for rows in sequences for start in range(0, len(rows), batch_size)]


def gather(domains: Sequence[Domain], batch: Rows) -> tuple[Images, Labels]:
    """The images ``[B, height, width, channels]`` and labels ``[B]`` of a batch ``[B, 2]``, in its order."""
    images = np.empty((len(batch), *domains[0].images.shape[1:]), np.uint8)
    labels = np.empty(len(batch), np.int64)
    for index in np.unique(batch[:, 0]):
        here = batch[:, 0] == index
        images[here] = domains[index].images[batch[here, 1]]
        labels[here] = domains[index].labels[batch[here, 1]]
    return images, labels


def to_inputs(images: Images, spec: InputSettings) -> Tensor:
    """Pixels ``[B, height, width, channels]`` -> inputs ``[B, channels, height, width]`` spread over ``spec.range``."""
    return spec.from_pixels(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous())


class SourceImages:
    """Clean images of the source domain, in memory or as image files, with labels or without. ``name`` says where they
    are from, ``size`` is the model's input shape."""

    def __init__(self, name: str, images: Images | list[Path], labels: Labels | None, size: tuple[int, ...]) -> None:
        self.name, self._images, self._labels, self._size = name, images, labels, size

    def __len__(self) -> int:
        return len(self._images)

    @property
    def has_labels(self) -> bool:
        return self._labels is not None

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the images (of files: their paths and sizes) and labels."""
        digest = hashlib.sha256(b"" if self._labels is None else self._labels.tobytes())
        if isinstance(self._images, list):
            digest.update("\n".join(f"{path} {path.stat().st_size}" for path in self._images).encode())
        else:
            digest.update(self._images.tobytes())
        return digest.hexdigest()

    def take(self, chosen: Rows) -> tuple[Images, Labels]:
        """Images ``[B, height, width, channels]`` and labels ``[B]``, -1 where there are none."""
        labels = np.full(len(chosen), -1, np.int64) if self._labels is None else self._labels[chosen]
        if isinstance(self._images, list):
            return np.stack([self._open(self._images[index]) for index in chosen]), labels
        return self._images[chosen], labels

    def sample(self, limit: int, seed: int) -> SourceImages:
        """At most so many of them, drawn at random."""
        if len(self) <= limit:
            return self
        chosen = np.sort(np.random.default_rng(seed).permutation(len(self))[:limit])
        labels = None if self._labels is None else self._labels[chosen]
        images = self._images
        some = [images[index] for index in chosen] if isinstance(images, list) else images[chosen]
        return SourceImages(self.name, some, labels, self._size)

    def _open(self, path: Path) -> Images:
        """An image file, scaled and cut about its centre to the model's input size."""
        channels, height, width = self._size
        try:
            with Image.open(path) as image:
                fitted = ImageOps.fit(image.convert("RGB" if channels == 3 else "L"), (width, height))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise ConfigError(f"cannot read the image {path}: {error}") from error
        return np.asarray(fitted, np.uint8).reshape(height, width, channels)


def load_source_images(path: Path, spec: InputSettings, classes: Sequence[str], limit: int, seed: int) -> SourceImages:
    """Source images from an ``.npz`` file (``images`` and, where there are any, ``labels``), from a folder that holds
    ``source_train.npz`` or ``clean.npz``, or from a folder of image files, one subfolder per class: named like the
    model's classes, or else in the classes' order by name. Raises ``ConfigError`` saying what does not fit."""
    if path.is_dir():
        for name in (SOURCE_TRAIN, CLEAN):
            if (path / f"{name}.npz").is_file():
                return load_source_images(path / f"{name}.npz", spec, classes, limit, seed)
        return _class_folders(path, spec, classes).sample(limit, seed)
    if not path.is_file():
        raise ConfigError(f"no source data {path.absolute()}: give an .npz file, or a folder")
    if path.suffix != ".npz":
        raise ConfigError(f"source data must be an .npz file or a folder, got {path}")
    images, labels = _read(path, "images"), _read(path, "labels")
    if images is None or images.dtype != np.uint8 or images.ndim != 4 or not len(images):
        raise ConfigError(f"{path} needs an array 'images', uint8 [rows, height, width, channels]")
    if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iu"):
        raise ConfigError(f"the labels of {path} must be whole numbers [rows], got {labels.dtype} {list(labels.shape)}")
    domain = Domain(path.stem, images, np.zeros(len(images), np.int64) if labels is None else labels.astype(np.int64))
    if len(domain.labels) != len(images):
        raise ConfigError(f"{path} has {len(images)} images, but {len(domain.labels)} labels")
    check_fit([domain], spec, len(classes))
    return SourceImages(path.stem, images, None if labels is None else domain.labels, spec.shape).sample(limit, seed)


def _class_folders(path: Path, spec: InputSettings, classes: Sequence[str]) -> SourceImages:
    if len(spec.shape) != 3 or spec.shape[0] not in (1, 3):
        raise ConfigError(f"image files need a model of images [1 or 3, height, width], not {list(spec.shape)}")
    folders = {one.name: one for one in sorted(path.iterdir()) if one.is_dir()}
    names = list(classes) if set(folders) == set(classes) else list(folders)
    if len(names) != len(classes):
        raise ConfigError(
            f"{path} has neither {SOURCE_TRAIN}.npz nor {CLEAN}.npz, and {len(folders)} subfolders for the model's "
            f"{len(classes)} classes; it needs one of image files for each class"
        )
    files = [
        (file, label)
        for label, name in enumerate(names)
        for file in sorted(folders[name].rglob("*"))
        if file.suffix.lower() in IMAGE_FILES
    ]
    if not files:
        raise ConfigError(f"the subfolders of {path} hold no image files ({', '.join(IMAGE_FILES)})")
    labels = np.array([label for _, label in files], np.int64)
    return SourceImages(path.name, [file for file, _ in files], labels, spec.shape)


def _find(folder: Path) -> dict[str, Path]:
    """The files of a folder by domain, in default order."""
    if not folder.is_dir():
        raise ConfigError(f"no data folder {folder.absolute()}")
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.np[yz]")):
        if path.stem == LABELS:
            continue
        if path.stem in files:
            raise ConfigError(f"{folder} has both {path.stem}.npy and {path.stem}.npz; remove one of them")
        files[path.stem] = path
    rank = {name: index for index, name in enumerate(STANDARD_ORDER)}
    return {name: files[name] for name in sorted(files, key=lambda name: (rank.get(name, len(rank)), name))}


def _load(path: Path, severity: int, limit: int | None) -> Domain:
    images = _read(path, "images")
    if images is None:
        raise ConfigError(f"{path} has no array 'images'")
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ConfigError(
            f"the images of {path} must be uint8 [rows, height, width, channels], got {images.dtype} "
            f"{list(images.shape)}"
        )
    labels, labels_path = _labels(path)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ConfigError(
            f"the labels of {labels_path} must be whole numbers [rows], got {labels.dtype} {list(labels.shape)}"
        )
    if len(images) != len(labels):
        raise ConfigError(f"{path} has {len(images)} images, but {labels_path} has {len(labels)} labels")
    rows = slice(limit)
    if path.suffix == ".npy":
        each, rest = divmod(len(images), SEVERITIES)
        if rest:
            raise ConfigError(f"{path} has {len(images)} images, which are not {SEVERITIES} severities of equal length")
        start = (severity - 1) * each
        rows = slice(start, start + (each if limit is None else min(limit, each)))
    if not len(labels[rows]):
        raise ConfigError(f"{path} has no images")
    return Domain(path.stem, images[rows], labels[rows].astype(np.int64))


def _labels(path: Path) -> tuple[NDArray[Any], Path]:
    """The labels of a domain's file, and the file they come from."""
    beside = path.with_name(f"{LABELS}.npy" if path.suffix == ".npy" else f"{CLEAN}.npz")
    own = _read(path, "labels") if path.suffix == ".npz" else None
    if own is not None:
        return own, path
    labels = _read(beside, "labels") if beside.is_file() else None
    if labels is None:
        raise ConfigError(f"no labels for the images of {path}: looked for them in {beside}")
    return labels, beside


def _read(path: Path, name: str) -> NDArray[Any] | None:
    """The array ``name`` of an ``.npz``, ``None`` where it has none; the one of an ``.npy``, memory-mapped."""
    try:
        if path.suffix == ".npy":
            return np.lib.format.open_memmap(path, mode="r")
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("it holds a single array without a name; write it with numpy.savez")
            return archive[name] if name in archive.files else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error


def _concentration(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ConfigError(f"the order dirichlet:X needs a number X above 0, such as dirichlet:0.1, got {text!r}")
    return value


def _correlated(labels: Labels, concentration: float, generator: np.random.Generator) -> Rows:
    """Rows ``[N]`` in the order ``dirichlet`` of :func:`arrange`."""
    classes = np.unique(labels)
    slots: list[list[Rows]] = [[] for _ in classes]
    for label in classes:
        rows = generator.permutation(np.flatnonzero(labels == label))
        shares = generator.dirichlet(np.full(len(classes), concentration))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(rows)).astype(np.int64)
        for slot, part in zip(slots, np.split(rows, cuts), strict=True):
            slot.append(part)
    return np.concatenate([slot[index] for slot in slots for index in generator.permutation(len(slot))])
