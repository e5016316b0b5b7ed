"""What is read at a scrape: how the streams are spread, and which of them have series of their own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from adapters.tent import Tent
from tta_server.drift.monitor import Monitor
from tta_server.drift.reference import TABLED, Reference
from tta_server.drift.signals import SIGNALS, ClassFeatures
from tta_server.engine.guarding import make_guard
from tta_server.feedback import Feedback
from tta_server.metrics.prometheus import PrometheusRecorder
from tta_server.metrics.scrape import MOST_WATCHED, Levels, Watchlist, matcher
from tta_server.settings import GuaranteeSettings, GuardSettings
from tta_server.state.keeper import Keeping, Tally
from tta_server.state.memory import Budget
from tta_server.types import Stream

SIZES = (1, 8, 64)
NORMAL = np.zeros((len(TABLED), len(SIZES)))
REFERENCE = Reference(
    ClassFeatures(np.zeros((4, 2)), np.ones((4, 2))), np.full(4, 0.25), np.array(SIZES), NORMAL, NORMAL + 1
)
"""Under which a signal's z-score is the signal, or a distance's its logarithm."""


class Fleet:
    """Streams with drift scores, and the recorder that shows them."""

    def __init__(self, watched: Sequence[str] = (), worst: int = 3, feedbacks: Sequence[Feedback] = ()) -> None:
        self.monitor, self.streams = Monitor(1.0), list[Stream]()
        self.watchlist = Watchlist(watched, worst)
        keeping = Keeping(False, "", False, 0, 0, Tally(), None, 0)
        levels = Levels(
            0, self.streams, {}, 0, 0, keeping, {"m": "d"}, {"m": True}, Budget(), [one.status for one in feedbacks]
        )
        self.recorder = PrometheusRecorder(lambda: levels, self.monitor, self.watchlist)

    def add(self, *ids: str, tenant: str = "t") -> list[Stream]:
        made = [Stream(id, "m", Tent(), 0, 0.0, tenant=tenant) for id in ids]
        self.streams += made
        return made

    def drift(self, scores: dict[Stream, float]) -> None:
        """Gives streams these drift scores, to within a thousandth."""
        for _ in range(12):
            self.monitor.update(
                list(scores), np.full(len(scores), 8), {"feature_distance": np.exp(list(scores.values()))}, REFERENCE
            )

    def chosen(self) -> list[str]:
        return [stream.id for stream in self.watchlist.choose(self.streams, self.monitor)]

    def close(self, stream: Stream) -> None:
        self.streams.remove(stream)
        self.monitor.forget(stream)

    def scrape(self) -> list[Sample]:
        text = self.recorder.render().decode()
        return [sample for family in text_string_to_metric_families(text) for sample in family.samples]


def test_the_worst_and_the_named_are_watched() -> None:
    fleet = Fleet(watched=("door-*", "gate"), worst=2)
    a, b, c, door, gate, other = fleet.add("a", "b", "c", "door-1", "gate", "gate-2")
    fleet.drift({a: 1.0, b: 5.0, c: 3.0, door: 9.0, other: 0.5})
    assert fleet.chosen() == ["door-1", "b", "gate"], "a stream counts once"
    assert matcher(["door-?"])(door)
    assert not matcher(["door-?"])(gate)
    assert not matcher([])(gate)


def test_a_stream_of_which_nothing_is_known_is_not_among_the_worst() -> None:
    fleet = Fleet(worst=5)
    (a, _) = fleet.add("a", "silent")
    fleet.drift({a: -1.0})
    assert fleet.chosen() == ["a"]


def test_streams_in_the_middle_do_not_come_and_go() -> None:
    """One that was among the worst stays, beside them, until it is beyond twice their number."""
    fleet = Fleet(worst=2)
    a, b, c, d, e = fleet.add(*"abcde")
    fleet.drift({a: 5.0, b: 4.0, c: 3.0, d: 2.0, e: 1.0})
    assert set(fleet.chosen()) == {"a", "b"}
    fleet.drift({c: 4.5, d: 6.0})
    assert set(fleet.chosen()) == {"d", "a", "b"}, "b is fourth of four"
    fleet.drift({e: 5.5})
    assert set(fleet.chosen()) == {"d", "e", "a"}, "b is fifth, c never was in"


@pytest.mark.parametrize(("watched", "worst"), [(("*",), 0), ((), 200), (("s1*",), 200)])
def test_there_is_a_bound(watched: tuple[str, ...], worst: int) -> None:
    fleet = Fleet(watched, worst)
    fleet.drift({stream: float(place) for place, stream in enumerate(fleet.add(*(f"s{one}" for one in range(300))))})
    assert len(fleet.chosen()) == MOST_WATCHED


def test_the_series_of_a_closed_stream_are_gone() -> None:
    fleet = Fleet()
    a, b = fleet.add("a", "b")
    fleet.drift({a: 1.0, b: 5.0})
    fleet.close(b)
    told = [sample for sample in fleet.scrape() if "stream" in sample.labels]
    assert {sample.labels["stream"] for sample in told} == {"a"}
    (again,) = fleet.add("b")
    told = [sample for sample in fleet.scrape() if sample.labels.get("stream") == again.id]
    assert [sample.name for sample in told] == [], "a new stream of that id has not the old one's values"


def test_two_tenants_streams_of_one_id_are_two() -> None:
    fleet = Fleet()
    fleet.drift({stream: 1.0 for tenant in ("x", "y") for stream in fleet.add("a", tenant=tenant)})
    told = [sample for sample in fleet.scrape() if sample.name == "tta_stream_drift_zscore"]
    assert sorted(sample.labels["tenant"] for sample in told) == ["x", "y"]


def test_streams_are_spread_over_the_buckets() -> None:
    """Cumulative, of the streams as they are now; one without a drift score is in none."""
    fleet = Fleet()
    streams = fleet.add(*"abcdef")
    fleet.drift(dict(zip(streams, (-3.0, 0.5, 0.7, 5.0, 60.0), strict=False)))
    samples = [sample for sample in fleet.scrape() if sample.name.startswith("tta_streams_drift_zscore")]
    buckets = {sample.labels["le"]: sample.value for sample in samples if sample.name.endswith("_bucket")}
    assert [buckets[bound] for bound in ("0.0", "1.0", "4.0", "6.0", "50.0", "+Inf")] == [1, 3, 3, 4, 4, 5]
    total = next(sample.value for sample in samples if sample.name.endswith("_sum"))
    assert total == pytest.approx(63.2, abs=0.1)
    fleet.close(streams[4])
    after = [sample for sample in fleet.scrape() if sample.name == "tta_streams_drift_zscore_count"]
    assert [sample.value for sample in after] == [4], "down as well as up"


def test_ten_thousand_streams_have_the_series_of_fifty() -> None:
    fleet, generator = Fleet(worst=20), np.random.default_rng(0)
    counts = []
    for ids in (range(50), range(50, 10_000)):
        streams = fleet.add(*(f"s{one}" for one in ids))
        for stream, kind in zip(streams, itertools.cycle(("none", "budget", "ledger", "audit")), strict=False):
            stream.guard = make_guard(GuardSettings(guarantee=GuaranteeSettings.model_validate({"kind": kind})))
        values = {name: generator.random(len(streams)) for name in SIGNALS if "distance" not in name}
        values |= dict.fromkeys(("feature_distance", "bn_distance_early"), np.exp(generator.normal(size=len(streams))))
        fleet.monitor.update(streams, np.full(len(streams), 8), values, REFERENCE, np.full((len(streams), 4), 0.25))
        counts.append(len(fleet.scrape()))
    assert counts[0] == counts[1]


def test_any_stream_can_be_scraped_by_its_name() -> None:
    fleet = Fleet(worst=0)
    streams = fleet.add("a-1", "a-2", "b-1")
    fleet.drift(dict.fromkeys(streams, 2.0))
    text = fleet.recorder.render_streams(streams[:2]).decode()
    families = list(text_string_to_metric_families(text))
    told = {sample.labels["stream"] for family in families for sample in family.samples if sample.labels}
    assert told == {"a-1", "a-2"}
    assert {family.name for family in families} == {
        "tta_metrics_watched_streams", "tta_stream_version", "tta_stream_drifted", "tta_stream_drift_zscore",
        "tta_stream_confidence_ratio", "tta_stream_entropy_ratio", "tta_stream_agreement_ratio",
        "tta_stream_label_divergence_ratio", "tta_stream_parameter_distance_ratio", "tta_stream_benefit_ratio",
        "tta_stream_serves_adapted",
    }  # fmt: skip


def test_a_drifted_stream_is_told() -> None:
    fleet = Fleet()
    near, far = fleet.add("near", "far")
    for _ in range(4):
        fleet.drift({near: 0.0, far: 6.0})
    told = {sample.labels["stream"]: sample.value for sample in fleet.scrape() if sample.name == "tta_stream_drifted"}
    assert told == {"near": 0.0, "far": 1.0}
    verdicts = {s.labels["verdict"]: s.value for s in fleet.scrape() if s.name == "tta_stream_verdicts"}
    assert verdicts == {"unknown": 0, "near source": 1, "drifted": 1, "changing": 0}
