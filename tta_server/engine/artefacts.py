"""The artefact file of a model: what was computed once from source data, in one safetensors file.

Tensors are keyed ``<group>/<name>``. The file's metadata holds the digest of the model it belongs to and, for each
group, how it was made.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from adapters.base import Tensors
from tta_server.errors import ConfigError

_FORMAT = "tta-server artefacts, version 1"


@dataclass
class Artefacts:
    """The content of a file. ``made`` says by group how it came about: images, batch size, and so on."""

    digest: str
    tensors: Tensors = field(default_factory=dict)
    made: dict[str, dict[str, Any]] = field(default_factory=dict)

    def put(self, group: str, tensors: Mapping[str, Tensor], how: Mapping[str, Any]) -> None:
        """Adds a group, or replaces it. Tensors are kept contiguous on the CPU."""
        self.drop(group)
        self.tensors |= {f"{group}/{key}": value.detach().cpu().contiguous() for key, value in tensors.items()}
        self.made[group] = dict(how)

    def group(self, group: str) -> Tensors:
        """One group's tensors, by the rest of their keys; empty where there is none."""
        start = f"{group}/"
        return {key.removeprefix(start): value for key, value in self.tensors.items() if key.startswith(start)}

    def drop(self, group: str) -> None:
        """Removes a group, if it is there."""
        self.tensors = {key: value for key, value in self.tensors.items() if not key.startswith(f"{group}/")}
        self.made.pop(group, None)

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all. Raises ``ConfigError`` where it cannot be written."""
        metadata = {"format": _FORMAT, "digest": self.digest, "made": json.dumps(self.made)}
        unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        try:
            safetensors.torch.save_file(self.tensors, unfinished, metadata)
            unfinished.chmod(0o644)  # the server may run as somebody else than who made it
            unfinished.replace(path)
        except BaseException as error:
            unfinished.unlink(missing_ok=True)
            if not isinstance(error, OSError | safetensors.SafetensorError):
                raise
            raise ConfigError(
                f"cannot write the artefacts to {path}: {error}; set models.<name>.artefacts to a path that can be"
            ) from error


def load_artefacts(path: Path, digest: str, device: torch.device) -> Artefacts:
    """The artefacts of the model with this digest; none where there is no file.

    Raises ``ConfigError`` for a file that cannot be read or belongs to another model.
    """
    if not path.is_file():
        return Artefacts(digest)
    try:
        with safetensors.safe_open(path, framework="pt", device=str(device)) as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ConfigError(
                    f"{path} is no artefact file of this version: it says {metadata.get('format')!r}, not {_FORMAT!r}; "
                    "remove it and run tta-server prepare again"
                )
            if metadata["digest"] != digest:
                raise ConfigError(
                    f"the artefacts in {path} belong to another model: they were made for digest "
                    f"{metadata['digest'][:16]}, this model's is {digest[:16]}; remove the file and run "
                    "tta-server prepare again, or set models.<name>.artefacts to the right one"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  it is no dict
    except (OSError, safetensors.SafetensorError) as error:
        raise ConfigError(f"cannot read the artefacts in {path}: {error}") from error
    return Artefacts(digest, tensors, json.loads(metadata["made"]))
