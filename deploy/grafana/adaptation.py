"""The second dashboard: one model."""

from __future__ import annotations

from grafana_foundation_sdk.models.dashboard import Dashboard
from panels import GREEN, RED, board, graph, heatmap, number, query
from queries import ANNOTATIONS, KNOWN, NOTABLE, RESULTS, VERDICTS, of, quantile, quantiles, rate, share, variables
from trust import trust


def adaptation() -> Dashboard:
    scores = of("tta_streams_drift_zscore_bucket")
    distances, steps = of("tta_streams_bn_distance_zscore_bucket"), rate("tta_adaptation_steps_total")
    measured = rate("tta_compute_duration_seconds_sum", 'phase=~"source_shadow|monitor"')
    selected = rate("tta_adaptation_samples_total", 'decision="selected"')
    return board(
        "tta-adaptation",
        "TTA / Adaptation and drift",
        "How far are streams from the source's data, and what does adaptation do about it?",
        variables("tta_model_info", many_models=False),
        ANNOTATIONS,
        {
            "Drift": [
                graph(
                    "Drift score over streams",
                    "Quantiles over the streams as they are now, as exact as the buckets beside. The score is about 0 "
                    "on clean data; a stream that stays above the line is not what the model was trained on.",
                    "none",
                    *quantiles(scores, 0.1, 0.5, 0.9, 0.99),
                    bottom=None,
                    line=NOTABLE,
                ),
                heatmap(
                    "Streams by drift score",
                    "How many streams have which score. Two bands: some have drifted and others have not.",
                    f"sum by (le) ({scores})",
                ),
                graph(
                    "Streams off the source",
                    "Share of the measured streams by verdict.",
                    "percentunit",
                    *(
                        query(
                            share(of("tta_stream_verdicts", f'verdict="{one}"'), of("tta_stream_verdicts", KNOWN)), one
                        )
                        for one in ("drifted", "changing")
                    ),
                    top=1,
                    colors=VERDICTS,
                ),
                graph(
                    "Alarms of the detectors",
                    "Per minute. departure: from clean data; change: against the stream's own past.",
                    "cpm",
                    query(
                        f"60 * sum by (signal, kind) ({rate('tta_drift_detections_total')})",
                        "{{kind}}, {{signal}}",
                    ),
                    bars=True,
                    stacked=True,
                ),
                graph(
                    "Batch-norm distance by depth",
                    "Nine of ten streams are below: z-scores of the distance of batch-norm statistics in the early, "
                    "middle and late layers.",
                    "none",
                    query(quantile(0.9, distances, "group"), "{{group}}, p90"),
                    bottom=None,
                ),
                graph(
                    "Batch-norm distance of requests",
                    "Of measured requests, not compared with clean data: small requests have a larger one.",
                    "none",
                    *quantiles(rate("tta_bn_statistics_distance_ratio_bucket"), 0.5, 0.95),
                    log=True,
                    bottom=None,
                ),
            ],
            "Answers": [
                heatmap(
                    "Confidence",
                    "Largest served probability of each sample. Not calibrated; it rises where streams collapse, too.",
                    f"sum by (le) ({rate('tta_prediction_confidence_ratio_bucket')})",
                    "cps",
                ),
                heatmap(
                    "Entropy",
                    "Of each sample's served probabilities, over ln(classes).",
                    f"sum by (le) ({rate('tta_prediction_entropy_ratio_bucket')})",
                    "cps",
                ),
                graph(
                    "Margin",
                    "Largest less second largest served probability of each sample.",
                    "percentunit",
                    *quantiles(rate("tta_prediction_margin_ratio_bucket"), 0.1, 0.5, 0.9),
                    top=1,
                ),
                graph(
                    "Confidence over streams",
                    "Quantiles over the streams' moving averages.",
                    "percentunit",
                    *quantiles(of("tta_streams_confidence_ratio_bucket"), 0.05, 0.5, 0.95),
                    top=1,
                ),
                graph(
                    "Divergence of the classes",
                    "Quantiles over streams: Jensen-Shannon divergence of the served classes' shares from clean "
                    "data's. High where a stream sees few classes, and where it has collapsed to few.",
                    "none",
                    *quantiles(of("tta_streams_label_divergence_ratio_bucket"), 0.5, 0.95),
                ),
                graph(
                    "Diversity over streams",
                    "Quantiles over streams: entropy of a request's mean probabilities over ln(classes). Low for "
                    "requests of one or a few samples, also where all is well.",
                    "percentunit",
                    *quantiles(of("tta_streams_diversity_ratio_bucket"), 0.05, 0.5),
                    top=1,
                ),
            ],
            "Adapted against source": [
                graph(
                    "Agreement of requests",
                    "Share of samples whose served class is the source model's, of measured requests. On clean data it "
                    "is close to 100 %; under drift, only disagreement can be a gain.",
                    "percentunit",
                    query(
                        f"sum({rate('tta_source_agreement_ratio_sum')}) "
                        f"/ sum({rate('tta_source_agreement_ratio_count')})",
                        "mean",
                    ),
                    *quantiles(rate("tta_source_agreement_ratio_bucket"), 0.05),
                    span=12,
                    top=1,
                ),
                graph(
                    "Agreement over streams",
                    "Quantiles over the streams' moving averages. Low together with a high divergence of the classes: "
                    "collapse.",
                    "percentunit",
                    *quantiles(of("tta_streams_agreement_ratio_bucket"), 0.05, 0.5),
                    span=12,
                    top=1,
                    line=0.5,
                ),
            ],
            "Trust": trust(),
            "Adaptation": [
                graph(
                    "Adaptation waits for answers",
                    "From an adapting step's answers to its commit, without its own work: requests of other streams "
                    "went first.",
                    "s",
                    *quantiles(rate("tta_adaptation_deferred_seconds_bucket"), 0.5, 0.99),
                    span=12,
                ),
                graph(
                    "Stale answers",
                    "Share of the samples that were answered while steps on their stream's earlier requests were under "
                    "way. Only streams of consistency stale get such answers.",
                    "percentunit",
                    query(
                        f"sum({rate('tta_stale_predictions_total')}) / sum({rate('tta_predictions_total')})", "stale"
                    ),
                    span=12,
                ),
                graph(
                    "Steps by result",
                    "Adaptation steps per second. shed: left out for lack of time; failed, rejected and vetoed (by the "
                    "stream's guard): not kept.",
                    "ops",
                    query(f"sum by (result) ({steps})", "{{result}}"),
                    stacked=True,
                    colors=RESULTS,
                ),
                graph(
                    "Samples adapted to",
                    "Share of the samples that policies which choose among them have selected.",
                    "percentunit",
                    query(
                        f"sum by (policy) ({selected}) / sum by (policy) ({rate('tta_adaptation_samples_total')})",
                        "{{policy}}",
                    ),
                    top=1,
                ),
                graph(
                    "Size of a step",
                    "Norm of an applied step's change over the norm of the source's weights.",
                    "none",
                    *quantiles(rate("tta_adaptation_update_norm_ratio_bucket"), 0.5, 0.99),
                    log=True,
                    bottom=None,
                ),
                graph(
                    "Distance from the source",
                    "Quantiles over streams: norm of all change of the adapted weights over the norm of the source's. "
                    "It grows while a stream adapts; a reset takes it to 0.",
                    "none",
                    *quantiles(of("tta_streams_parameter_distance_ratio_bucket"), 0.5, 0.95),
                    line=1,
                ),
                graph(
                    "Cost of measuring",
                    "Share of the engine's time spent on the source model beside adapted streams, and on signals.",
                    "percentunit",
                    query(
                        f"sum by (phase) ({measured}) / ignoring (phase) group_left () "
                        f"sum({rate('tta_compute_duration_seconds_sum')})",
                        "{{phase}}",
                    ),
                    stacked=True,
                ),
                graph(
                    "Steps that were not measured",
                    "Per second. The log says why.",
                    "ops",
                    query(f"sum({rate('tta_monitor_errors_total')})", "failed"),
                    span=4,
                ),
                number(
                    "Clean data",
                    "Whether the model has something to compare streams with, made by tta-server prepare.",
                    "none",
                    f"min({of('tta_monitor_reference')})",
                    words={"0": ("missing", RED), "1": ("there", GREEN)},
                    span=4,
                    height=8,
                ),
            ],
        },
    )
