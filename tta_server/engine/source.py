"""Source models: built by their factory, filled from a weights file, checked and digested."""

from __future__ import annotations

import hashlib
import importlib
import pickle
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from adapters.base import Source
from tta_server.drift.benefit import GROUP as BENEFIT
from tta_server.drift.benefit import UNPREPARED, Judge
from tta_server.drift.estimators import GROUP as ESTIMATES
from tta_server.drift.estimators import Estimates, Head
from tta_server.drift.reference import GROUP as MONITORING
from tta_server.drift.reference import Reference
from tta_server.engine.artefacts import load_artefacts
from tta_server.engine.forward import StreamwiseNetwork, probe
from tta_server.engine.norm import REPLACED
from tta_server.errors import ConfigError
from tta_server.settings import InputSettings, ModelSettings, Settings, type_and_line


@dataclass(frozen=True)
class SourceModel:
    """A frozen model, shared by all its streams."""

    name: str
    settings: ModelSettings
    source: Source
    """What policies see of it."""
    network: StreamwiseNetwork
    classes: tuple[str, ...]
    digest: str
    """Hex SHA-256 of weights, architecture and input normalisation: equal digests, equal function."""
    architecture: str
    parameters: int
    norm_layers: dict[str, int]
    """Adaptable norm layers by type."""
    left_alone: tuple[str, ...]
    """Layers named like norm layers but of a type that streams cannot adapt yet; they stay as trained."""
    row_gap: float
    """Largest difference between rows' scores in a batch and alone, as measured here: 0, or rounding."""
    prepared: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By group of its artefacts, how these were made."""
    reference: Reference | None = None
    """What clean data look like to the monitor, if that was prepared."""
    judge: Judge = UNPREPARED
    """Of the benefit of adaptation on it."""
    estimates: Estimates | None = None
    """What label-free accuracy is estimated with, if that was prepared."""
    reports: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """By policy, how it does on this model under its preset, see ``report.py``. Filled in once all is loaded."""

    @cached_property
    def linear_head(self) -> Head | None:
        """The classifier head, where it is linear."""
        weight, bias = (self.source.weights.get(f"{self.source.head}.{kind}") for kind in ("weight", "bias"))
        if weight is None or tuple(weight.shape) != (len(self.classes), self.source.feature_dim):
            return None
        return Head(weight.float().cpu().numpy(), None if bias is None else bias.float().cpu().numpy())

    @property
    def adaptable_values(self) -> int:
        """Scales and shifts of the norm layers."""
        return sum(self.source.weights[key].numel() for key in self.source.affine)


def load_model(name: str, settings: Settings, device: torch.device) -> SourceModel:
    """Builds the model ``name`` of the config. Raises ``ConfigError`` saying what to mend."""
    spec = settings.models[name]
    try:
        network = _build(spec, settings.folder)
        _fill(network, settings.find(spec.weights))
        head = _find_head(network, spec.head)
        kinds = [type(module) for module in network.modules()]
        norm_layers = {kind.__name__: kinds.count(kind) for kind in REPLACED if kind in kinds}
        left_alone = tuple(
            f"{path} ({type(module).__name__})"
            for path, module in network.named_modules()
            if "norm" in type(module).__name__.lower() and type(module) not in REPLACED and not list(module.children())
        )
        digest, architecture = _digest(network, spec.input), type(network).__name__
        streamwise = StreamwiseNetwork(network, spec.input, head, device)
        probed = probe(streamwise, spec.input)
        streamwise.compile_source(spec.input)
        norms = _keys(dict(network.named_parameters()), streamwise.norm_layers, ("weight", "bias"))
        streamwise.try_pauses(spec.input, {key: network.get_parameter(key).unsqueeze(0) for key in norms})
        if spec.classes and len(spec.classes) != probed.classes:
            raise ConfigError(
                f"the config names {len(spec.classes)} classes, but the model has {probed.classes} scores"
            )
        artefacts = load_artefacts(settings.artefacts_path(name), digest, device)
    except ConfigError as error:
        raise ConfigError(f"model {name!r}: {error}") from error
    tensors = dict(network.named_parameters()) | dict(network.named_buffers())
    groups = {
        name: {key: one.cpu().numpy() for key, one in artefacts.group(name).items()}
        for name in (MONITORING, BENEFIT, ESTIMATES)
    }
    return SourceModel(
        name=name,
        settings=spec,
        source=Source(
            weights=tensors,
            parameters=tuple(key for key, value in network.named_parameters() if value.is_floating_point()),
            affine=_keys(tensors, streamwise.norm_layers, ("weight", "bias")),
            statistics=_keys(tensors, streamwise.norm_layers, ("running_mean", "running_var")),
            num_classes=probed.classes,
            feature_dim=probed.features,
            head=head,
            input_shape=spec.input.shape,
            input_range=spec.input.range,
            artefacts=artefacts.tensors,
        ),
        network=streamwise,
        classes=spec.classes or tuple(str(index) for index in range(probed.classes)),
        digest=digest,
        architecture=architecture,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        norm_layers=norm_layers,
        left_alone=left_alone,
        row_gap=probed.row_gap,
        prepared=artefacts.made,
        reference=Reference.of_tensors(groups[MONITORING]) if groups[MONITORING] else None,
        judge=Judge.of_tensors(groups[BENEFIT]),
        estimates=Estimates.of_tensors(groups[ESTIMATES]) if groups[ESTIMATES] else None,
    )


def choose_device(wanted: str) -> torch.device:
    """``auto`` is CUDA where there is any. Raises ``ConfigError`` for a device this machine does not have."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        if device.type in ("cpu", "cuda"):
            torch.empty(1, device=device)
            return device
        reason = "it must be auto, cpu, cuda or cuda:<number>"
    except (RuntimeError, AssertionError) as error:
        reason = type_and_line(error)
    raise ConfigError(f"server.device = {wanted!r} cannot be used here: {reason}")


def _build(spec: ModelSettings, folder: Path) -> nn.Module:
    module_name, _, attribute = spec.factory.partition(":")
    sys.path.insert(0, str(folder.absolute()))
    try:
        factory: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            factory = getattr(factory, part)
        network = cast("Callable[..., object]", factory)(**spec.arguments)
    except Exception as error:  # whatever a user's own factory raises is a fault of the config
        raise ConfigError(
            f"the factory {spec.factory!r} failed: {type_and_line(error)} "
            f"(modules are looked for in the installed packages and in {folder.absolute()})"
        ) from error
    finally:
        sys.path.remove(str(folder.absolute()))
    if not isinstance(network, nn.Module):
        raise ConfigError(f"the factory {spec.factory!r} must return a torch.nn.Module, got {type(network).__name__}")
    return network


def _fill(network: nn.Module, path: Path) -> None:
    loaded = _read_weights(path)
    wanted = network.state_dict()
    missing = [key for key in wanted if key not in loaded and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in loaded if key not in wanted]
    if missing or unexpected:
        hint = ""
        if unexpected and all(key.startswith("module.") for key in unexpected):
            hint = "; the keys carry the 'module.' prefix of DataParallel: save model.module.state_dict() instead"
        raise ConfigError(
            f"{path} does not hold this network's weights: "
            f"{_some(missing)} missing, {_some(unexpected)} not known{hint}"
        )
    for key, value in loaded.items():
        if value.shape != wanted[key].shape:
            raise ConfigError(f"{path}: {key} is {list(value.shape)}, the network wants {list(wanted[key].shape)}")
    network.load_state_dict(loaded, strict=False)


def _read_weights(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            raise ConfigError(f"{path} is not a readable safetensors file: {error}") from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Not in torch's words: they advise to switch this very protection off.
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise ConfigError(
            f"{path} is not a plain state dict{f', it holds {found[1]}' if found else ''}. Anything else that "
            "torch.save writes may run code when loaded, so it is refused; save model.state_dict(), best as safetensors"
        ) from error
    except Exception as error:  # on a file of another kind, torch's reader raises whatever it stumbles over
        raise ConfigError(
            f"{path} cannot be read as a state dict saved by torch.save ({type_and_line(error)}); "
            "save model.state_dict(), best as safetensors"
        ) from error
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"{path} must hold a state dict, names to tensors; got {type(loaded).__name__}; save model.state_dict()"
        )
    for key, value in loaded.items():
        if not _is_state_dict({key: value}):
            inner = next((name for name, one in loaded.items() if _is_state_dict(one)), None)
            raise ConfigError(
                f"{path} must hold a state dict, names to tensors, but its entry {key!r} is of type "
                f"{type(value).__name__}; save {'model.state_dict()' if inner is None else f'checkpoint[{inner!r}]'}"
            )
    return loaded


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())


def _find_head(network: nn.Module, named: str | None) -> str:
    modules: dict[str, nn.Module] = dict(network.named_modules())
    if named is not None:
        if not named or named not in modules:
            raise ConfigError(
                f"head = {named!r} is no layer of the model; it has {_some([one for one in modules if one])}"
            )
        return named
    linear = [path for path, module in modules.items() if isinstance(module, nn.Linear)]
    if not linear:
        raise ConfigError("no Linear layer found to take as the classifier; name the layer as 'head'")
    return linear[-1]


def _digest(network: nn.Module, spec: InputSettings) -> str:
    digest = hashlib.sha256(f"{network!r}\n{spec.shape} {spec.mean} {spec.std}\n".encode())
    for key, value in sorted(network.state_dict().items()):
        if not key.endswith("num_batches_tracked"):
            digest.update(f"{key} {value.dtype} {list(value.shape)}\n".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return str(digest.hexdigest())


def _keys(tensors: dict[str, Tensor], layers: list[str], kinds: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{layer}.{kind}" for layer in layers for kind in kinds if f"{layer}.{kind}" in tensors)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") if names else "nothing"
