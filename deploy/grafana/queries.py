"""What the dashboards ask Prometheus, and what they have in common."""

from __future__ import annotations

from panels import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PURPLE,
    RED,
    YELLOW,
    Panel,
    Query,
    Variable,
    annotation,
    now,
    query,
    rows,
    variable,
)

SERVER = 'job=~"$job",instance=~"$instance"'
MODEL = f'{SERVER},model_name=~"$model_name"'
STREAM = f'{MODEL},tenant=~"$tenant",stream=~"$stream"'
PREDICTS = 'route=~".+/(predict|infer)"'
KNOWN = 'verdict!="unknown"'
ADAPTING = 'state!~"off|unguarded"'
QUARANTINE = 'state="quarantine"'
RESET = 'kind="reset"'
TAKEN_BACK = 'rule=~"audit|collapse|rejected steps"'
FETCH = 'operation="fetch"'
ALERTS = f'ALERTS{{{SERVER},alertname=~"Tta.+",alertstate="firing"}}'

VERDICTS = {"near source": GREEN, "changing": YELLOW, "drifted": RED, "unknown": GREY}
RESULTS = {"applied": GREEN, "vetoed": BLUE, "shed": YELLOW, "failed": ORANGE, "rejected_nonfinite": RED}
GUARDS = {
    "off": GREY,
    "shadow": BLUE,
    "canary": YELLOW,
    "active": GREEN,
    "frozen": PURPLE,
    "quarantine": RED,
    "unguarded": ORANGE,
}
EVIDENCE = {"unknown": GREY, "helps": GREEN, "unclear": YELLOW, "harms": RED}
SERVED = {"adapted": GREEN, "mixed": YELLOW, "source": BLUE}
DRIFTED = {"0": ("not drifted", GREEN), "1": ("drifted", RED)}
SERVES = {"0": ("source", BLUE), "1": ("adapted", GREEN)}
TO_STREAM = (
    "/d/tta-stream?var-datasource=${datasource}&var-model_name=${__data.fields.Model}"
    "&var-tenant=${__data.fields.Tenant}&var-stream=${__value.raw}&${__url_time_range}"
)
NOTABLE = 3
"""Drift score above which a stream is not what the model was trained on, see docs/metrics.md."""


def of(family: str, *more: str, where: str = MODEL) -> str:
    """A family's series that the dashboard's variables choose; ``more`` matchers."""
    return f"{family}{{{','.join((where, *more))}}}"


def rate(family: str, *more: str, where: str = MODEL) -> str:
    """Of a counter, per second."""
    return f"rate({of(family, *more, where=where)}[$__rate_interval])"


def quantile(level: float, buckets: str, *by: str) -> str:
    """Of the observations in ``buckets``: a rate for those of late, the series itself where it tells of streams now."""
    return f"histogram_quantile({level}, sum by ({', '.join(('le', *by))}) ({buckets}))"


def quantiles(buckets: str, *levels: float) -> list[Query]:
    """Several, each named ``p`` and percent."""
    return [query(quantile(level, buckets), f"p{level * 100:02.0f}") for level in levels]


def share(part: str, whole: str) -> str:
    """A part of a sum; nothing where the whole is 0."""
    return f"sum({part}) / (sum({whole}) > 0)"


def watched(title: str, description: str, none: str, *more: str) -> Panel:
    """Single streams, the worst first; a click leads to the stream's own dashboard."""

    def column(name: str) -> Query:
        return now(f"max by (model_name, tenant, stream, instance) ({of(f'tta_stream_{name}', *more)})", name)

    signals = {
        "drift_zscore": "Drift score",
        "drifted": "Verdict",
        "confidence_ratio": "Confidence",
        "agreement_ratio": "Agreement",
        "label_divergence_ratio": "Class divergence",
        "parameter_distance_ratio": "Parameter distance",
        "benefit_ratio": "Benefit",
        "serves_adapted": "Served",
        "version": "Version",
    }
    labels = {"stream": "Stream", "tenant": "Tenant", "model_name": "Model", "instance": "Instance"}
    units = dict.fromkeys(("Confidence", "Agreement", "Benefit"), "percentunit")
    return rows(
        title,
        description,
        labels | {f"Value #{name}": text for name, text in signals.items()},
        *(column(name) for name in signals),
        units=units | dict.fromkeys(("Drift score", "Class divergence", "Parameter distance"), "none"),
        words={"Verdict": DRIFTED, "Served": SERVES},
        link=("Stream", TO_STREAM),
        sort="Drift score",
        none=none,
    )


def variables(info: str, many_models: bool) -> list[Variable]:
    """Servers and models, as they are in a family that has all of them."""
    return [
        variable("job", "Job", f"label_values({info}, job)"),
        variable("instance", "Instance", f'label_values({info}{{job=~"$job"}}, instance)'),
        variable(
            "model_name",
            "Model",
            f"label_values({info}{{{SERVER}}}, model_name)",
            many=many_models,
            everything=".*" if many_models else None,  # Requests that concern no model have an empty one.
        ),
    ]


ANNOTATIONS = [
    annotation("Alerts", ALERTS, RED),
    annotation(
        "Resets",
        f"sum by (model_name) ({rate('tta_stream_events_total', RESET)}) > 0",
        BLUE,
    ),
    annotation(
        "Guards",
        f"sum by (model_name, to, rule) ({rate('tta_guard_moves_total', TAKEN_BACK)}) > 0",
        ORANGE,
    ),
]
