"""The third dashboard: single streams."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard
from panels import BLUE, GREY, PURPLE, RED, YELLOW, Query, board, graph, note, number, query, timeline, variable
from queries import ANNOTATIONS, DRIFTED, MODEL, NOTABLE, SERVES, STREAM, of, quantile, variables, watched


def stream() -> Dashboard:
    def signal(name: str) -> str:
        return f"max by (stream, instance) ({of(f'tta_stream_{name}', where=STREAM)})"

    def many(level: float) -> Query:
        found = quantile(level, of("tta_streams_drift_zscore_bucket"))
        return query(found, f"all streams, p{level * 100:.0f}")

    name = "{{stream}}"
    signals = "label_values(tta_stream_version{%s}, %s)"
    return board(
        "tta-stream",
        "TTA / Stream",
        "One stream, or a few beside one another.",
        [
            *variables("tta_stream_version", many_models=False),
            variable("tenant", "Tenant", signals % (MODEL, "tenant"), many=False, everything=None),
            variable(
                "stream",
                "Stream",
                signals % (f'{MODEL},tenant=~"$tenant"', "stream"),
                everything=None,
                description="Streams with series of their own: watched ones, and those of the job tta-streams.",
            ),
        ],
        ANNOTATIONS,
        {
            "Now": [
                number(
                    "Verdict",
                    "Whether the stream has departed from the model's clean data.",
                    "none",
                    signal("drifted"),
                    legend=name,
                    words=DRIFTED,
                    span=4,
                ),
                number(
                    "Drift score",
                    "About 0 on clean data.",
                    "none",
                    signal("drift_zscore"),
                    (NOTABLE, YELLOW),
                    (5, RED),
                    legend=name,
                    span=4,
                ),
                number(
                    "Confidence",
                    "Largest served probability, moving average.",
                    "percentunit",
                    signal("confidence_ratio"),
                    legend=name,
                    first=BLUE,
                    span=4,
                ),
                number(
                    "Agreement",
                    "Share of samples with the source's class, moving average.",
                    "percentunit",
                    signal("agreement_ratio"),
                    legend=name,
                    first=BLUE,
                    span=4,
                ),
                number(
                    "Distance from the source",
                    "Norm of all change of the adapted weights over the norm of the source's.",
                    "none",
                    signal("parameter_distance_ratio"),
                    (0.5, YELLOW),
                    (1, RED),
                    legend=name,
                    span=4,
                ),
                number(
                    "Version",
                    "Adaptation steps since the source.",
                    "none",
                    signal("version"),
                    legend=name,
                    first=BLUE,
                    span=4,
                ),
            ],
            "Signals": [
                timeline(
                    "Drifted", "While the alarm of the departure detector lasts.", signal("drifted"), name, DRIFTED
                ),
                timeline(
                    "Served",
                    "Whether the stream's guard lets adapted answers be served. A canary's may be the source's all the "
                    "same, sample by sample.",
                    signal("serves_adapted"),
                    name,
                    SERVES,
                ),
                graph(
                    "Drift score",
                    "Beside the median and the tenth with the highest scores of all streams of the model. Streams that "
                    "stay above the line come to be called drifted.",
                    "none",
                    query(signal("drift_zscore"), name),
                    many(0.5),
                    many(0.9),
                    bottom=None,
                    line=NOTABLE,
                    colors={"all streams, p50": GREY, "all streams, p90": PURPLE},
                    span=12,
                ),
                graph(
                    "Confidence and entropy",
                    "Moving averages of the largest served probability, and of the entropy over ln(classes).",
                    "percentunit",
                    query(signal("confidence_ratio"), f"{name}, confidence"),
                    query(signal("entropy_ratio"), f"{name}, entropy"),
                    top=1,
                    span=12,
                ),
                graph(
                    "Estimated benefit",
                    "Accuracy that adaptation is estimated to gain, without labels. The guard serves adapted answers "
                    "from guard.least_benefit on.",
                    "percentunit",
                    query(signal("benefit_ratio"), name),
                    bottom=None,
                    line=0,
                ),
                graph(
                    "Agreement with the source",
                    "Share of samples whose served class is the source model's, moving average.",
                    "percentunit",
                    query(signal("agreement_ratio"), name),
                    top=1,
                ),
                graph(
                    "Divergence of the classes",
                    "Jensen-Shannon divergence of the served classes' shares from clean data's.",
                    "none",
                    query(signal("label_divergence_ratio"), name),
                ),
                graph(
                    "Distance from the source",
                    "Norm of all change of the adapted weights over the norm of the source's.",
                    "none",
                    query(signal("parameter_distance_ratio"), name),
                    line=1,
                    span=12,
                ),
                graph(
                    "Version",
                    "Adaptation steps since the source. Flat: it does not adapt; down to 0: it was reset.",
                    "none",
                    query(signal("version"), name),
                    span=12,
                ),
            ],
            "Others": [
                watched("Streams to choose from", "All streams with series of their own, the worst first.", "none"),
                note(
                    "More of a stream",
                    "`GET /v1/streams/{id}` has every signal beside the band that clean data keep to, `GET /v1/events` "
                    "what happened to it. To switch its adaptation off: `PATCH /v1/streams/{id}` with "
                    '`{"adapt": false}`; to start again from the source: `POST /v1/streams/{id}/reset`.\n\n'
                    "A stream that is missing above has no series of its own: name it in the config under "
                    "`monitor.watched`, or have Prometheus read `/metrics/streams?match=...`.",
                ),
            ],
        },
    )
