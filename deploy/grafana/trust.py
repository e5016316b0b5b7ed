"""The rows on trust: what guards do, what labels and estimates say. One for each of the first two dashboards."""

from __future__ import annotations

from panels import BLUE, RED, YELLOW, Panel, graph, number, query
from queries import ADAPTING, EVIDENCE, GUARDS, QUARANTINE, SERVED, SERVER, of, quantile, quantiles, rate, share


def trust() -> list[Panel]:
    """Of one model."""
    estimated = of("tta_streams_estimated_accuracy_ratio_bucket")
    labelled = "tta_labelled_predictions_total"
    right, known = rate(labelled, 'outcome="correct"'), rate(labelled)
    samples = rate("tta_predictions_total")
    return [
        graph(
            "Streams by guard",
            "Open streams by the state of their guard. off: they do not adapt. shadow: they get the source's answers; "
            "canary: adapted ones where the estimate says so; active and frozen: adapted ones; quarantine: the "
            "source's until an operator lets them go; unguarded: adapted ones, whatever comes of it.",
            "short",
            query(f"sum by (state) ({of('tta_guard_streams')})", "{{state}}"),
            stacked=True,
            colors=GUARDS,
        ),
        graph(
            "Whose answers are served",
            "Share of the samples. mixed: of requests some of whose samples got the adapted model's answer and some "
            "the source's.",
            "percentunit",
            query(
                f"sum by (served_by) ({samples}) / ignoring (served_by) group_left () sum({samples})", "{{served_by}}"
            ),
            stacked=True,
            top=1,
            colors=SERVED,
        ),
        graph(
            "Streams by evidence",
            "Guarded streams that adapt, by what their guard knows of the adapted model. On clean data there is "
            "nothing to gain, and unclear is as it should be.",
            "short",
            query(f"sum by (evidence) ({of('tta_guard_evidence_streams')})", "{{evidence}}"),
            stacked=True,
            colors=EVIDENCE,
        ),
        graph(
            "Estimated benefit",
            "Quantiles over streams: accuracy that adaptation is estimated to gain, without labels. Guards serve "
            "adapted answers from guard.least_benefit on.",
            "percentunit",
            *quantiles(of("tta_streams_benefit_ratio_bucket"), 0.1, 0.5, 0.9),
            bottom=None,
            line=0,
        ),
        graph(
            "Estimated accuracy",
            "Medians over streams of two estimates without labels, ATC and PDD, of the adapted model and of the "
            "source. They do not say which of the two is better.",
            "percentunit",
            query(quantile(0.5, estimated, "predictor", "estimator"), "{{predictor}}, {{estimator}}"),
            top=1,
        ),
        graph(
            "Disagreement of the estimates",
            "Quantiles over streams: |ATC - PDD| of the adapted model. At least one of them is off by half of it.",
            "percentunit",
            *quantiles(of("tta_streams_estimator_disagreement_ratio_bucket"), 0.5, 0.9),
            line=0.2,
        ),
        graph(
            "Accuracy by labels",
            "Of the labelled samples: of what was served, and of either model where it ran, which need not be the same "
            "samples. Audits ask for labels where the models differ, where both are wrong more often.",
            "percentunit",
            query(f"sum by (predictor) ({right}) / (sum by (predictor) ({known}) > 0)", "{{predictor}}"),
            top=1,
        ),
        graph(
            "Labels",
            "Labelled samples per minute: all of them, and those where the adapted model and the source ran.",
            "cpm",
            query(f"60 * sum by (predictor) ({known})", "{{predictor}}"),
        ),
        graph(
            "Delay of labels",
            "From an answer to the posting of its labels, as exact as the buckets: 1 s, 10 s, 1 min, 10 min, 1 h, 6 h, "
            "1 d, 7 d.",
            "s",
            *quantiles(rate("tta_label_delay_seconds_bucket"), 0.5, 0.9),
        ),
        graph(
            "Moves of guards",
            "Per minute, by where to and by the rule.",
            "cpm",
            query(f"60 * sum by (to, rule) ({rate('tta_guard_moves_total')})", "{{to}}: {{rule}}"),
            bars=True,
            stacked=True,
        ),
        graph(
            "Rollbacks and quarantines",
            "Per minute. Rollbacks are to the last good state.",
            "cpm",
            query(f"60 * sum({rate('tta_adaptation_rollbacks_total')})", "rollbacks"),
            query(f"60 * sum({rate('tta_quarantines_total')})", "quarantines"),
            bars=True,
            colors={"rollbacks": YELLOW, "quarantines": RED},
        ),
        graph(
            "Evidence of harm",
            "Quantiles over streams under audit: log10 of the statistic that raises the alarm at guarantee.c, 10,000 "
            "unless it is set otherwise.",
            "none",
            *quantiles(of("tta_streams_regret_evidence_log10_bucket"), 0.5, 0.99),
            bottom=None,
            line=4,
        ),
        graph(
            "Budgets",
            "Quantiles over streams with a guarantee of the kind budget or ledger: the share that was left at their "
            "last request. At 0 they get the source's answers wherever the models differ.",
            "percentunit",
            *quantiles(of("tta_streams_budget_remaining_ratio_bucket"), 0.1, 0.5),
            top=1,
        ),
        graph(
            "Audits",
            "Labels per minute that audits asked for, that came, and that cannot come any more; of all models.",
            "cpm",
            query(f"60 * sum by (result) ({rate('tta_audits_total', where=SERVER)})", "{{result}}"),
        ),
        graph(
            "Refused labels",
            "Postings per minute, of all models. unknown: of a request that is not kept; unfit: not what the request "
            "needs; conflict: another label came before.",
            "cpm",
            query(f"60 * sum by (reason) ({rate('tta_labels_rejected_total', where=SERVER)})", "{{reason}}"),
        ),
    ]


def trust_now() -> list[Panel]:
    """Of all models."""
    samples = rate("tta_predictions_total")
    adapted = rate("tta_predictions_total", 'served_by="adapted"')
    labelled = rate("tta_labelled_predictions_total", 'predictor="served"')
    right = rate("tta_labelled_predictions_total", 'predictor="served"', 'outcome="correct"')
    answered, ended = (
        rate("tta_audits_total", chosen, where=SERVER) for chosen in ('result="answered"', 'result=~"answered|expired"')
    )
    return [
        number(
            "Served as adapted",
            "Share of the samples that got the adapted model's answer.",
            "percentunit",
            share(adapted, samples),
            first=BLUE,
            none="idle",
            span=4,
        ),
        number(
            "Streams past the shadow",
            "Share of the guarded streams that adapt whose guard may serve adapted answers: canary, active, frozen.",
            "percentunit",
            share(of("tta_guard_streams", 'state=~"canary|active|frozen"'), of("tta_guard_streams", ADAPTING)),
            first=BLUE,
            none="none",
            span=4,
        ),
        number(
            "Quarantined streams",
            "They get the source's answers until an operator lets them go.",
            "short",
            f"sum({of('tta_guard_streams', QUARANTINE)})",
            (1, RED),
            none="0",
            span=4,
        ),
        number(
            "Estimated benefit",
            "Median over streams: accuracy that adaptation is estimated to gain, without labels.",
            "percentunit",
            quantile(0.5, of("tta_streams_benefit_ratio_bucket")),
            first=BLUE,
            none="unknown",
            span=4,
        ),
        number(
            "Right, by labels",
            "Share of the labelled samples whose served answer was right.",
            "percentunit",
            share(right, labelled),
            first=BLUE,
            none="no labels",
            span=4,
        ),
        number(
            "Audits answered",
            "Share of the labels that audits asked for and that came, of those that came or cannot come any more.",
            "percentunit",
            share(answered, ended),
            first=BLUE,
            none="none",
            span=4,
        ),
    ]
