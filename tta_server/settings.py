"""The config file: every setting with its default and unit, read from YAML, with ``${VARIABLE}`` filled in."""

from __future__ import annotations

import math
import os
import re
import reprlib
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator, model_validator
from torch import Tensor

from tta_server.errors import ConfigError, UnknownName

NAME = r"[A-Za-z0-9._:-]{1,128}"
"""Pattern of the names that go into URLs: stream ids and models."""

_part = reprlib.Repr()
"""Shows a part of what may be large."""
_part.maxstring = _part.maxother = 80

_SECRET = {"auth", "tokens", "token", "key_password", "endpoint"}
"""Places in a config whose values are in no message."""

_VARIABLE = re.compile(r"\$\{(\w+)\}")

Positive = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(pattern=f"^{NAME}$")]


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


S = TypeVar("S", bound=_Settings)


class InputSettings(_Settings):
    """What one row of a model's input looks like on the wire."""

    shape: tuple[Positive, ...] = Field(min_length=1)
    """Of one row, without the batch dimension: ``[channels, height, width]`` for images."""
    range: tuple[float, float] | None = (0.0, 1.0)
    """Least and greatest value a client may send, before normalisation; ``null`` admits any finite value."""
    mean: tuple[float, ...] = ()
    """Subtracted per channel; normalisation belongs to the model, clients send plain pixels."""
    std: tuple[float, ...] = ()
    """Divided by, per channel."""
    resize: Positive | None = None
    """For encoded images (PNG, JPEG): the shorter side is resized to so many pixels, bilinearly, and the middle of the
    result is cut out; without it, images must have the input's own size."""

    @model_validator(mode="after")
    def _check(self) -> InputSettings:
        if self.resize is not None and (len(self.shape) != 3 or self.resize < max(self.shape[1:])):
            raise ValueError(
                f"resize is for inputs [channels, height, width] and at least as large as both sides of the input; "
                f"got {self.resize} for {list(self.shape)}"
            )
        if len(self.mean) != len(self.std) or (self.mean and len(self.mean) != self.shape[0]):
            raise ValueError(
                f"mean and std need one value for each of {self.shape[0]} channels; "
                f"got {len(self.mean)} and {len(self.std)}"
            )
        if any(value <= 0 for value in self.std):
            raise ValueError(f"every std must be above 0, got {list(self.std)}")
        if self.range is not None and self.range[0] >= self.range[1]:
            raise ValueError(f"range must run from low to high, got {list(self.range)}")
        return self

    def from_pixels(self, pixels: Tensor) -> Tensor:
        """8-bit ``pixels`` of any shape, spread over ``range`` as float32."""
        low, high = self.range or (0.0, 1.0)
        return low + (high - low) * (pixels.float() / 255)


class ModelSettings(_Settings):
    """One source model."""

    factory: str = Field(pattern=r"^[\w.]+:[\w.]+$")
    """``package.module:callable`` that builds the network; importable, or a module beside the config file."""
    arguments: dict[str, Any] = {}
    """Keyword arguments of the factory."""
    weights: str
    """A safetensors file, or a state dict saved by ``torch.save``; looked for beside the config file first."""
    input: InputSettings
    classes: tuple[str, ...] = ()
    """Class names in the order of the scores; empty: the class numbers."""
    head: str | None = None
    """Name of the classifier layer, whose input is the feature; found by itself when it is the last Linear."""
    artefacts: str | None = None
    """The file of what ``tta-server prepare`` computes from source data; a path from the config file's folder. By
    default it is beside the weights, and named after them: ``net.artefacts.safetensors`` for ``net.safetensors``."""
    policy: str = "tent"
    """The policy of streams that ask for none."""
    preset: Literal["cifar", "imagenet"] | None = None
    """Whose published settings all policies start from: those for CIFAR (small images) or for ImageNet. Without one,
    the policies' own defaults, which are CIFAR's."""
    policies: dict[str, dict[str, Any]] = {}
    """Settings by policy that differ for this model, from the policy's own defaults and from the preset."""


class Durability(_Settings):
    """How much of what a stream learned a crash may cost it."""

    mode: Literal["none", "async", "sync"] = "async"
    """``none``: all of it, the stream is not stored at all; ``async``: the last steps; ``sync``: nothing that an answer
    was computed with: it leaves once the step before it is stored."""
    steps: Positive = 16
    """Of ``async``: an answer leaves once all but the last so many steps before it are stored."""
    seconds: Annotated[float, Field(gt=0, le=3600)] = 5.0
    """Of ``async``: a step is stored after so many seconds, if not for the number of steps."""

    @property
    def bound(self) -> float:
        """Most steps before an answer that may be unsaved when it leaves."""
        return {"none": math.inf, "async": self.steps, "sync": 0}[self.mode]

    @property
    def due(self) -> float:
        """Unsaved steps at which the next save begins: early enough that answers seldom wait."""
        return {"none": math.inf, "async": max(1, self.steps // 2), "sync": 1}[self.mode]


class Consistency(_Settings):
    """Which state a stream is answered from while steps on its earlier requests are under way."""

    mode: Literal["strict", "stale"] = "strict"
    """``strict``: the one after them, so a request waits for the steps before it; ``stale``: the last one committed.
    Either way the steps are the same ones, in the same order: only answers differ, and with them what a guard sees."""
    steps: Annotated[int, Field(ge=1, le=64)] = 4
    """Of ``stale``: most steps that an answer may be behind; with more under way it waits."""

    @property
    def bound(self) -> int:
        """Most steps under way at which a request is answered all the same."""
        return self.steps if self.mode == "stale" else 0


class GuaranteeSettings(_Settings):
    """What a stream is promised of its regret, the errors it is served beyond those of its source model. See
    ``trust/guarantees.py``."""

    kind: Literal["none", "budget", "ledger", "audit"] = "none"
    """``none``: nothing but the guard's estimates; ``budget``: at most ``b0 + eps t`` errors more after ``t`` rows,
    without labels; ``ledger``: at most ``b0 + c0 + eps n`` in any ``n`` rows on end, where labels buy more room;
    ``audit``: alarms and an interval from labels of a share of the disagreements, chosen by the server's coin."""
    eps: float = Field(default=0.02, ge=0, le=1)
    """Errors a row."""
    b0: float = Field(default=50.0, ge=0, le=1e6)
    """Of ``budget`` and ``ledger``: errors."""
    c0: float = Field(default=50.0, ge=0, le=1e6)
    """Of ``ledger``: errors made good that are held as credit."""
    q: float = Field(default=0.1, gt=0, le=1)
    """Of ``audit``: the share of disagreements whose label is asked for."""
    c: float = Field(default=1e4, gt=1, le=1e12)
    """Of ``audit``: an alarm where adaptation does no harm comes every ``c`` audits or less often, on average."""
    alpha: float = Field(default=0.01, gt=0, lt=1)
    """Of ``audit``: the probability that a stream without benefit is ever certified."""

    @model_validator(mode="after")
    def _check(self) -> GuaranteeSettings:
        if self.kind == "ledger" and self.b0 + self.c0 < 1:
            raise ValueError(f"b0 + c0 must be at least 1, got {self.b0:g} + {self.c0:g}")
        return self


class GuardSettings(_Settings):
    """When adapted answers are served and learned from, see ``trust/guard.py``."""

    enabled: bool = True
    """Off: a stream that adapts is served as adapted, whatever comes of it, and all its steps are kept."""
    guarantee: GuaranteeSettings = GuaranteeSettings()
    least_benefit: float = Field(default=0.1, ge=0, le=1)
    """Accuracy that adaptation must be estimated to gain, for a request to be served as adapted and learned from."""
    shadow_rows: Positive = 64
    """Rows compared with the source before the first adapted answer."""
    canary_rows: Positive = 256
    """Rows on end at ``least_benefit`` or above, until only a share of the rows is compared; and so many rows on end
    below it take the stream back to the source's answers."""
    cooldown_rows: Positive = 128
    """Rows that a stream stays with the source's answers once it was taken back to them. Doubles each time."""
    collapse: float = Field(default=1.1, gt=0)
    """A stream is reset when its adapted model names fewer classes than the source by this factor, as a logarithm."""
    rejected_steps: Positive = 8
    """A stream is reset after so many steps on end that were not finite or outside the trust region."""
    most_update: float | None = Field(default=None, gt=0)
    """Trust region: longest step, over the length of the source's weights. ``null``: any."""
    most_distance: float | None = Field(default=None, gt=0)
    """Trust region: farthest from the source's weights, over their length. ``null``: any."""
    outliers: float | None = Field(default=None, gt=1, le=1e6)
    """Rows of a request that are farther from its middle than so many times the median row are answered, but not
    learned from, at the cost of another pass where there are any. ``null``: all are learned from."""
    updates_per_minute: Positive | None = None
    """Most steps that are kept in a minute. ``null``: all."""
    miscoverage: float | None = Field(default=None, gt=0, lt=1)
    """Answers come with prediction sets, made to miss the class of at most this share of rows. ``null``: without."""
    miscoverage_step: float = Field(default=0.01, gt=0, le=1)
    """How far one label moves the level of the sets that come next; see ``trust/conformal.py``."""
    reset_rows: Positive | None = 64_000
    """A stream is reset when it has learned from so many rows since the last time, unless an audit certified that it
    helps. ``null``: never."""


class LabelSettings(_Settings):
    """How long answers are remembered, so that labels can come later."""

    requests: Annotated[int, Field(ge=0)] = 1000
    """Of a stream; 0: none."""
    bytes: Positive = 64 * 2**20
    """Of a tenant."""
    seconds: Seconds = 86_400.0


class LimitSettings(_Settings):
    """Bounds. An error that one of them causes names it as ``limits.<name>``."""

    body_bytes: Positive = 64 * 2**20
    """Largest request body, as sent."""
    inflated_bytes: Positive = 256 * 2**20
    """Largest request body after decompression."""
    bodies_bytes: Positive = 2**30
    """Memory that the bodies of all requests under way may take together, decompressed."""
    json_bytes: Positive = 32 * 2**20
    """Largest JSON document: a whole JSON body, or the header of one with binary tensors. Parsed, it takes several
    times its size in memory."""
    json_depth: Annotated[int, Field(gt=0, le=1000)] = 100
    """Deepest nesting of a JSON document."""
    image_pixels: Positive = 2**25
    """Most pixels of the PNG and JPEG images of a request together, seen from their headers before one is decoded."""
    header_bytes: Positive = 64 * 2**10
    """Largest request line and headers together."""
    header_seconds: Seconds = 10.0
    """Longest time from a request's first byte to the end of its headers, and for what is left of a body that was
    refused before it was all there."""
    body_seconds: Seconds = 60.0
    """Longest time for a request's body to arrive, and for a client to take an answer."""
    idle_seconds: Seconds = 75.0
    """How long a connection may stay open between two requests."""
    connections: Positive = 2000
    """Most open connections; another one is answered 503 and closed."""
    followers: Positive = 100
    """Most clients that follow events or the live page."""
    rows_per_request: Positive = 1024
    """Most samples in one request."""
    batch_rows: Positive | None = None
    """Most samples merged from several streams into one engine step. ``null``: as many as pay, as measured at the
    start."""
    open_rows: Positive | None = None
    """Most samples in steps that have answered and not adapted yet, together with the next one's: each holds its
    activations. ``null``: twice ``batch_rows``, at least 16."""
    queue: Positive = 4096
    """Most requests waiting in all."""
    queue_per_stream: Positive = 64
    """Most requests of one stream waiting."""
    shed_share: float = Field(default=0.5, gt=0, le=1)
    """Where a request had to wait more than this share of the time it may, its step ends with the answer: streams are
    served as adapted so far, and learn nothing. 1: never."""
    queue_seconds: Seconds = 30.0
    """Longest wait before a request is answered 504; a request may shorten it."""
    drain_seconds: Seconds = 10.0
    """Longest wait for queued requests at shutdown."""
    stored_answer_bytes: Positive = 64 * 2**10
    """Largest scores kept per stream to answer a repeated request number; a repeat of a larger answer is refused."""
    streams: Positive = 20_000
    """Most streams open at once."""
    state_bytes: Annotated[int, Field(gt=0, le=950_000_000)] = 950_000_000
    """Largest state of a stream; settings that make a larger one are refused. The store takes no larger ones."""
    batch_streams: Positive = 256
    """Most streams in one engine step."""
    slots: Positive | None = None
    """Most stream states kept on the device, of all models and policies; the rest wait in host memory. ``null``: as
    many as fit into ``device_bytes``."""
    device_bytes: Positive | None = None
    """Device memory for stream states. ``null``: a part of what is free once the models are loaded."""
    host_bytes: Positive | None = None
    """Host memory for stream states that do not fit on the device; the rest are on the disk. ``null``: a part of what
    is free once the models are loaded."""
    marks: Positive = 16
    """Most named snapshots of a stream."""
    import_bytes: Positive = 2**28
    """Largest file of a stream's state that is taken. Reading one takes about four times its size in memory."""


class StreamSettings(_Settings):
    """How requests find their stream."""

    unknown_id: Literal["create", "refuse"] = "create"
    """What a V2 request with a ``sequence_id`` not seen before and without ``sequence_start`` does."""
    default: Name | None = None
    """Id of the stream shared by V2 requests without a ``sequence_id``; without one they get the source model."""
    consistency: Consistency = Consistency()
    """Of streams that do not choose their own."""


class StateSettings(_Settings):
    """How stream states are kept."""

    folder: str | None = "tta-state"
    """Where they are stored: a folder of this server's own, from the config file's. ``null``: nowhere, all streams end
    with the server."""
    durability: Durability = Durability()
    """Of streams that do not choose their own."""
    snapshot_steps: Positive = 100
    """A state becomes an automatic snapshot when the stream has taken so many steps since the last one."""
    snapshots: Annotated[int, Field(ge=0, le=100)] = 3
    """Automatic snapshots kept of each stream, beside the newest state and the one saved before it."""
    idle_seconds: Seconds = 600.0
    """A stream without requests for so long leaves memory for the disk, and comes back with its next request."""
    keep_seconds: Seconds | None = 30 * 86400.0
    """A stream without requests for so long is deleted. ``null``: never."""
    flush_seconds: Seconds = 15.0
    """Longest time for storing what is unsaved at shutdown."""


class MonitorSettings(_Settings):
    """What is measured beside the answers."""

    enabled: bool = True
    """Off: no signals but those that the policies tell, no drift score and no verdict."""
    shadow_ratio: float = Field(default=0.25, ge=0, le=1)
    """Share of an adapting stream's requests that also run through the frozen source model, after the answer left; of
    one with a guard at least 0.05."""
    frozen_ratio: float = Field(default=0.05, ge=0, le=1)
    """Of the requests that the source model answers itself, the share whose batch-norm statistics are measured by one
    more pass. All else is measured of each of them, as it costs no pass."""
    estimate_every: Annotated[int, Field(ge=0)] = 8
    """Accuracy without labels is estimated on every so many-th request of a stream, where the source is asked for, too.
    0: never."""
    half_life: float = Field(default=20.0, gt=0, le=1e6)
    """Of the moving averages per stream, in measured requests."""
    worst: int = Field(default=20, ge=0, le=200)
    """So many streams, those with the highest drift scores, have series of their own in ``/metrics``."""
    watched: tuple[Annotated[str, Field(max_length=256)], ...] = ()
    """Streams that always have: ids, or patterns with ``*`` and ``?``. No more than 200 in all have."""
    events: Positive = 1000
    """Newest events kept of each tenant for ``/v1/events``."""


class Right(StrEnum):
    """What a token may do. Listing policies and models needs any token, asking for health none."""

    PREDICT = "predict"
    """Send prediction requests; over V2 also open and close streams with them."""
    STREAMS = "streams"
    """Create, list, change, reset and delete the tenant's streams."""
    ADMIN = "admin"
    """Load and unload models."""
    METRICS = "metrics"
    """Read the metrics and statistics of all tenants."""


class TokenSettings(_Settings):
    """One bearer token, as itself or as its SHA-256. ``tta-server token`` makes both."""

    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    """Hex digest of the token: for files."""
    token: SecretStr | None = Field(default=None, min_length=16)
    """The token: for ``${VARIABLE}``."""
    tenant: Name = "default"
    """Whose it is. A tenant's streams do not exist for another."""
    rights: tuple[Right, ...] = Field(default=(Right.PREDICT, Right.STREAMS), min_length=1)
    """What it may do: ``predict``, ``streams``, ``admin``, ``metrics``."""

    @model_validator(mode="after")
    def _check(self) -> TokenSettings:
        if (self.sha256 is None) == (self.token is None):
            raise ValueError("give either sha256 or token")
        token = "" if self.token is None else self.token.get_secret_value()
        if not (token.isascii() and token.isprintable()) or " " in token:
            raise ValueError("a token is of printable ASCII characters without spaces")
        return self


class TenantSettings(_Settings):
    """What one tenant may use; ``null``: whatever there is."""

    requests_per_second: float | None = Field(default=None, gt=0)
    """Of all its calls, on average; up to one second's worth may come at once."""
    concurrent: Positive | None = None
    """Most of its calls at the same time."""
    streams: Positive | None = None
    """Most streams it has open."""
    state_bytes: Positive | None = None
    """Most bytes that the states of its open streams may take together, each counted in full from the start."""


class AccessSettings(_Settings):
    """Tokens and tenants. The content of ``auth.file``, too."""

    tokens: tuple[TokenSettings, ...] = ()
    """Who may come in. With none at all everybody may, as the tenant ``default`` and with every right."""
    tenants: dict[Name, TenantSettings] = {}
    """Limits by tenant."""


class AuthSettings(AccessSettings):
    """Who may do what."""

    file: str | None = None
    """A YAML file with more ``tokens`` and ``tenants``, read again when it changes; beside the config file."""


class TlsSettings(_Settings):
    """Certificates, as files beside the config file."""

    certificate: str
    """PEM: the server's certificate, and its chain."""
    key: str
    """PEM: the certificate's private key."""
    key_password: SecretStr | None = None
    """Of the key, if it has one."""
    client_ca: str | None = None
    """PEM: when set, clients must show a certificate signed by one of these."""


class MetricsSettings(_Settings):
    """An address of its own for ``/metrics``, which the main one then does not have."""

    host: str = "127.0.0.1"
    port: int = Field(ge=0, le=65535)


class ServerSettings(_Settings):
    """Where the server listens."""

    host: str = "127.0.0.1"
    """An address that others can reach needs ``auth.tokens``, or ``--insecure``."""
    port: int = Field(default=8000, ge=0, le=65535)
    tls: TlsSettings | None = None
    metrics: MetricsSettings | None = None

    @model_validator(mode="after")
    def _check_ports(self) -> ServerSettings:
        if self.metrics is not None and self.port and self.metrics.port == self.port:
            raise ValueError(f"the metrics need a port of their own, got {self.port} for both")
        return self

    device: str = "auto"
    """``cpu``, ``cuda``, ``cuda:1``, or ``auto``: CUDA where there is any."""
    seed: int = 0
    """Of the streams' random keys."""


class LogSettings(_Settings):
    """What is written to standard error."""

    format: Literal["text", "json"] = "text"
    """``text``: a line for people; ``json``: an object a line."""
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """Least severe level that is written. ``DEBUG``: every request, and streams that open, close and change, too."""


class TraceSettings(_Settings):
    """OpenTelemetry traces, sent by OTLP over HTTP; needs the extra ``otel``.

    What is not here (headers, certificates, time limits) comes from the exporter's own environment variables,
    ``OTEL_EXPORTER_OTLP_HEADERS`` and so on.
    """

    endpoint: str
    """URL that takes the spans, with its path: ``http://<collector>:4318/v1/traces``, usually."""
    service_name: str = "tta-server"
    sample_ratio: float = Field(default=1.0, ge=0, le=1)
    """Share of the requests that are traced. A request that brings a ``traceparent`` is traced if that says so."""

    @field_validator("endpoint")
    @classmethod
    def _check_endpoint(cls, endpoint: str) -> str:
        if not re.fullmatch(r"https?://[^/\s]+/\S+", endpoint):
            raise ValueError("give the whole URL, as http://127.0.0.1:4318/v1/traces")
        return endpoint


class Settings(_Settings):
    """The whole config file."""

    models: dict[Name, ModelSettings] = Field(min_length=1)
    server: ServerSettings = ServerSettings()
    auth: AuthSettings = AuthSettings()
    limits: LimitSettings = LimitSettings()
    streams: StreamSettings = StreamSettings()
    state: StateSettings = StateSettings()
    guard: GuardSettings = GuardSettings()
    labels: LabelSettings = LabelSettings()
    monitor: MonitorSettings = MonitorSettings()
    log: LogSettings = LogSettings()
    traces: TraceSettings | None = None
    folder: Path = Field(default=Path("."), exclude=True)
    """The config file's own folder. Filled in when the file is read."""

    def find(self, path: str) -> Path:
        """The file of a config value: beside the config file first, then from the current directory."""
        candidates = [self.folder / path, Path(path)]
        for candidate in candidates:
            if candidate.is_file():
                return candidate
        raise ConfigError(f"no file {path!r}: looked for " + " and ".join(str(one.absolute()) for one in candidates))

    def artefacts_path(self, model: str) -> Path:
        """Where the artefacts of a model are, or go."""
        spec = self.models[model]
        if spec.artefacts is not None:
            return self.folder / spec.artefacts
        weights = self.find(spec.weights)
        stem = weights.stem if weights.suffix in (".safetensors", ".pt", ".pth", ".bin") else weights.name
        return weights.with_name(f"{stem}.artefacts.safetensors")


class _Loader(yaml.SafeLoader):
    """Reads ``1e-3`` as a number, as YAML 1.2 and JSON do; to PyYAML, which follows 1.1, it is a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def load_settings(path: Path) -> Settings:
    """Reads a config file. Raises ``ConfigError`` with every fault found in it, each with its place in the file."""
    return _read(path, Settings, folder=path.parent)


def load_access(path: Path) -> AccessSettings:
    """Reads a file of tokens and tenants. Raises ``ConfigError`` likewise; tokens are not in it."""
    return _read(path, AccessSettings)


def _read(path: Path, kind: type[S], **more: Any) -> S:
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the config file {path}: {_problem(error)}") from error
    if not isinstance(raw, dict) or raw.keys() & more.keys():
        raise ConfigError(f"the config file {path} must be a mapping with the keys {', '.join(_keys(kind))}")
    try:
        return kind.model_validate({**_substitute(raw, path), **more})
    except RecursionError as error:
        raise ConfigError(f"cannot read the config file {path}: something in it holds itself") from error
    except ValidationError as error:
        told = kind is not AccessSettings
        raise ConfigError(f"the config file {path} does not fit:\n{explain(error, show=told)}") from error


def _problem(error: Exception) -> str:
    """What is wrong, without the line itself: there may be a token in it."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{type(error).__name__} in line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1}"
    return str(error)


def parse_value(text: str) -> Any:
    """A setting's value from a command line, read as in the config file. Raises ``ConfigError``."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"cannot read the value {text!r}: {error}") from error


def choose_model(settings: Settings, wanted: str | None) -> str:
    """The model a command is for: the one named, or the only one. Raises ``ConfigError`` or ``UnknownName``."""
    names = list(settings.models)
    if wanted is None and len(names) > 1:
        raise ConfigError(f"the config has several models, choose one with --model: {', '.join(names)}")
    if wanted is not None and wanted not in names:
        raise UnknownName(f"no model {wanted!r} in the config; there are: {', '.join(names)}")
    return wanted or names[0]


def _dotted(place: Sequence[int | str]) -> str:
    return ".".join(str(part) for part in place) or "(top)"


def explain(error: ValidationError, name: Callable[[Sequence[int | str]], str] = _dotted, show: bool = True) -> str:
    """The faults of a pydantic error as lines of ``place: what was wrong, got value``; ``name`` writes the places.

    Values are left out where a secret may be in them, without ``show`` everywhere.
    """
    lines = []
    for fault in error.errors():
        place = name(fault["loc"])
        told = show and fault["type"] not in ("missing", "extra_forbidden") and _SECRET.isdisjoint(fault["loc"])
        got = f", got {_part.repr(fault['input'])}" if told else ""
        lines.append(f"  {place}: {fault['msg']}{got}")
    return "\n".join(lines)


def type_and_line(error: Exception) -> str:
    """What code that is not ours raised, in one line: the error's type and the first line of its message."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])


def _keys(model: type[BaseModel]) -> list[str]:
    return [name for name, info in model.model_fields.items() if not info.exclude]


def _substitute(value: Any, path: Path) -> Any:
    if isinstance(value, dict):
        return {key: _substitute(one, path) for key, one in value.items()}
    if isinstance(value, list):
        return [_substitute(one, path) for one in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name not in os.environ:
            raise ConfigError(f"{path} uses ${{{name}}}, but the environment variable {name} is not set")
        return os.environ[name]

    return _VARIABLE.sub(fill, value)
