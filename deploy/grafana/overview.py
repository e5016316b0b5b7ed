"""The first dashboard: all models and servers."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard
from panels import RED, YELLOW, board, graph, now, number, query, rows
from queries import (
    ALERTS,
    ANNOTATIONS,
    KNOWN,
    PREDICTS,
    SERVER,
    VERDICTS,
    of,
    quantile,
    quantiles,
    rate,
    share,
    variables,
    watched,
)
from state import state
from trust import trust_now


def overview() -> Dashboard:
    durations = rate("tta_request_duration_seconds_bucket", PREDICTS)
    requests, failed = rate("tta_requests_total", PREDICTS), rate("tta_requests_total", PREDICTS, 'code=~"5.."')
    drifted = share(of("tta_stream_verdicts", 'verdict="drifted"'), of("tta_stream_verdicts", KNOWN))
    return board(
        "tta-overview",
        "TTA / Overview",
        "Is the server well, and are its streams?",
        variables("tta_model_info", many_models=True),
        ANNOTATIONS,
        {
            "Now": [
                number("Alerts", "Alerts that fire.", "short", f"count({ALERTS}) or vector(0)", (1, RED)),
                number("Prediction requests", "Per second, over all ways to ask.", "reqps", f"sum({requests})"),
                number(
                    "Errors",
                    "Share of the prediction requests answered with a 5xx.",
                    "percentunit",
                    f"(sum({failed}) or vector(0)) / (sum({requests}) > 0)",
                    (0.005, YELLOW),
                    (0.02, RED),
                    none="idle",
                ),
                number(
                    "Latency, p99",
                    "Of prediction requests: from arrival to the answer's last byte.",
                    "s",
                    f"{quantile(0.99, durations)} >= 0",
                    (0.5, YELLOW),
                    (1, RED),
                    none="idle",
                ),
                number(
                    "Waiting", "Requests in the queues.", "short", f"sum({of('tta_requests_waiting', where=SERVER)})"
                ),
                number("Streams", "Open ones.", "short", f"sum({of('tta_streams')})", none="0"),
                number(
                    "Adapting",
                    "Share of the open streams whose adaptation is on.",
                    "percentunit",
                    share(of("tta_streams", 'adapt="true"'), of("tta_streams")),
                    none="none",
                ),
                number(
                    "Drifted",
                    "Share of the measured streams whose verdict is drifted.",
                    "percentunit",
                    drifted,
                    (0.1, YELLOW),
                    (0.25, RED),
                    none="unknown",
                ),
            ],
            "Serving": [
                graph(
                    "Answers by status",
                    "Prediction requests per second by HTTP status. 429: refused; 499: the client went away; "
                    "504: the time was up.",
                    "reqps",
                    query(f"sum by (code) ({requests})", "{{code}}"),
                    stacked=True,
                ),
                graph(
                    "Latency of predictions",
                    "From a request's arrival to its answer's last byte.",
                    "s",
                    *quantiles(durations, 0.5, 0.95, 0.99),
                ),
                graph(
                    "Wait in the queue",
                    "From a prediction request's submission to its engine step. Adaptation is shed when this is long.",
                    "s",
                    *quantiles(rate("tta_queue_duration_seconds_bucket"), 0.5, 0.95, 0.99),
                ),
                graph(
                    "Samples by policy",
                    "Samples answered per second, by the policy that answered. source: the frozen model did.",
                    "cps",
                    query(f"sum by (policy) ({rate('tta_predictions_total')})", "{{policy}}"),
                    stacked=True,
                ),
                graph(
                    "Use of the device thread",
                    "Share of the time spent in each phase of the engine's steps, summed over the servers shown. At "
                    "100 % for each server there is no room for more.",
                    "percentunit",
                    query(f"sum by (phase) ({rate('tta_compute_duration_seconds_sum')})", "{{phase}}"),
                    stacked=True,
                ),
                graph(
                    "Samples per engine step",
                    "How much is computed together: samples of all streams in one step.",
                    "short",
                    *quantiles(rate("tta_batch_samples_bucket"), 0.5, 0.95),
                    query(
                        f"sum({rate('tta_batch_samples_sum')}) / sum({rate('tta_batch_samples_count')})",
                        "mean",
                    ),
                ),
            ],
            "Streams": [
                graph(
                    "Streams by verdict",
                    "What the monitor says of open streams. unknown: too little measured, or nothing to compare with.",
                    "short",
                    query(f"sum by (verdict) ({of('tta_stream_verdicts')})", "{{verdict}}"),
                    stacked=True,
                    colors=VERDICTS,
                ),
                graph(
                    "Streams by policy",
                    "Open streams by policy, and whether their adaptation is on.",
                    "short",
                    query(f"sum by (policy, adapt) ({of('tta_streams')})", "{{policy}}, adapt={{adapt}}"),
                    stacked=True,
                ),
                graph(
                    "What happens to streams",
                    "Events per minute, as in /v1/events.",
                    "cpm",
                    query(f"60 * sum by (kind) ({rate('tta_stream_events_total')})", "{{kind}}"),
                    bars=True,
                    stacked=True,
                ),
                watched(
                    "Watched streams",
                    "Those the config names and those with the highest drift scores. Signals are moving averages; "
                    "a click on a stream shows more.",
                    "no streams were measured",
                    'job!="tta-streams"',
                ),
                rows(
                    "Alerts that fire",
                    "Prometheus' alerts of this server; docs/runbooks.md says what to do.",
                    {
                        "alertname": "Alert",
                        "severity": "Severity",
                        "instance": "Instance",
                        "model_name": "Model",
                        "stream": "Stream",
                    },
                    now(ALERTS, "A"),
                    none="none fires",
                ),
            ],
            "Trust": trust_now(),
            "State": state(),
            "Process": [
                graph(
                    "Memory",
                    "Of the server's process, and of CUDA devices where there are any.",
                    "bytes",
                    query(of("process_resident_memory_bytes", where=SERVER), "{{instance}}"),
                    query(of("tta_device_memory_bytes", where=SERVER), "{{instance}} {{device}} {{kind}}"),
                    span=12,
                ),
                graph(
                    "Processor",
                    "Cores that the server's process keeps busy.",
                    "short",
                    query(rate("process_cpu_seconds_total", where=SERVER), "{{instance}}"),
                    span=12,
                ),
                rows(
                    "What runs",
                    "Models by the digest of their weights, and the versions of server and torch.",
                    {
                        "instance": "Instance",
                        "model_name": "Model",
                        "digest": "Digest",
                        "version": "Server",
                        "torch": "Torch",
                    },
                    now(
                        f"{of('tta_model_info')} * on (job, instance) group_left (version, torch) "
                        f"{of('tta_build_info', where=SERVER)}",
                        "A",
                    ),
                    span=16,
                ),
                graph(
                    "Streams with series of their own",
                    "In /metrics, at most 200 whatever the config says, and in /metrics/streams.",
                    "short",
                    query(of("tta_metrics_watched_streams", where=SERVER), "{{job}} {{instance}}"),
                ),
            ],
        },
    )
