"""The guarantees: their inequalities on random streams and under attack, their false alarms by simulation, and the
boundary of the interval against others' code and plain integration."""

from __future__ import annotations

import json
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import integrate

from tta_server.errors import BadInput
from tta_server.trust.guarantees import BETS, Audit, Budget, Guarantee, Ledger, radius

AMOUNTS = st.integers(0, 60).map(lambda tenths: tenths / 10)
SHARES = st.sampled_from([0.0, 0.02, 0.1, 0.25, 0.3, 0.7, 1.0])
FLAGS = st.lists(st.booleans(), min_size=1, max_size=12)
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("rows"), FLAGS, st.booleans() | st.just(True)),
        st.tuples(st.just("label"), st.integers(0), st.sampled_from([-1, -1, 0, 1, 1, None])),
        st.tuples(st.just("restart"), st.none(), st.none()),
    ),
    max_size=60,
)
KINDS: dict[str, Callable[[], Guarantee]] = {
    "budget": lambda: Budget(0.1, 2.0),
    "ledger": lambda: Ledger(0.1, 2.0, 3.0),
    "audit": lambda: Audit(0.5, 0.02, np.random.default_rng(7).random),
}


class Stream:
    """A stream that keeps its own books. Rows that are never labelled turn out to have been the worst they can be."""

    def __init__(self, make: Callable[[], Guarantee]) -> None:
        self._make, self.guarantee = make, make()
        self.served: list[bool] = []
        self.known: dict[int, int] = {}

    def send(self, *differs: bool, serving: bool = True) -> list[int]:
        """Sends rows; which of those that differ were served adapted."""
        flags = np.array(differs)
        adapted = self.guarantee.allow(flags, serving).adapted
        assert adapted[~flags].all()
        assert serving or not adapted[flags].any()
        first = len(self.served)
        self.served += (adapted & flags).tolist()
        assert self.guarantee.rows == len(self.served)
        return [row for row in range(first, len(self.served)) if self.served[row]]

    def label(self, row: int, w: int | None) -> None:
        """Of a row that differed."""
        self.guarantee.settle(row, w)
        if self.served[row] and w is not None:
            self.known.setdefault(row, w)

    def restart(self) -> None:
        """The server starts again."""
        saved = json.loads(json.dumps(self.guarantee.dump()))
        self.guarantee = self._make()
        self.guarantee.restore(saved)
        assert self.guarantee.dump() == saved

    @property
    def outcomes(self) -> list[int]:
        """``W`` of each row, 0 for those not served adapted."""
        return [self.known.get(row, 1) if served else 0 for row, served in enumerate(self.served)]


def worst_windows(outcomes: list[int], eps: float) -> tuple[Fraction, Fraction]:
    """Over all windows, and over those from the start: the most of regret - eps n, exactly."""
    each = Fraction(str(eps))
    total = lowest = best = highest = Fraction(0)
    for outcome in outcomes:
        total += outcome - each
        best, highest = max(best, total - lowest), max(highest, total)
        lowest = min(lowest, total)
    return best, highest


def play(stream: Stream, operations: list[tuple[str, object, object]], check: Callable[[], None]) -> None:
    """Does what hypothesis thought of; labels come for any row that differed, in any order, again and again."""
    differing: list[int] = []
    for kind, what, how in operations:
        if kind == "rows":
            assert isinstance(what, list)
            first = len(stream.served)
            stream.send(*what, serving=bool(how))
            differing += [first + index for index, flag in enumerate(what) if flag]
        elif kind == "restart":
            stream.restart()
        elif differing:
            assert isinstance(what, int)
            assert how is None or isinstance(how, int)
            stream.label(differing[what % len(differing)], how)
        check()


@settings(max_examples=100, deadline=None)
@given(SHARES, AMOUNTS, OPERATIONS)
def test_budget_is_never_exceeded(eps: float, b0: float, operations: list[tuple[str, object, object]]) -> None:
    stream = Stream(lambda: Budget(eps, b0))

    def check() -> None:
        _, highest = worst_windows(stream.outcomes, eps)
        assert highest <= Fraction(str(b0))
        assert sum(stream.outcomes) <= stream.guarantee.worst <= stream.guarantee.bound

    play(stream, operations, check)


@pytest.mark.parametrize(("eps", "b0"), [(0.0, 5.0), (0.02, 0.0), (0.1, 2.5), (0.7, 0.9), (1.0, 0.0)])
def test_budget_is_spent_to_the_last_row(eps: float, b0: float) -> None:
    """Were it one error larger, it would be exceeded: all of it can be had, whatever the size of the requests."""
    sizes = np.random.default_rng(0).integers(1, 40, 60)
    stream = Stream(lambda: Budget(eps, b0))
    for size in sizes.tolist():
        stream.send(*[True] * size)
        assert sum(stream.served) == int(Fraction(str(b0)) + Fraction(str(eps)) * len(stream.served))


@settings(max_examples=300, deadline=None)
@given(SHARES, AMOUNTS, AMOUNTS, st.sampled_from([2, 5, 1000]), OPERATIONS)
def test_ledger_holds_in_every_window(
    eps: float, b0: float, c0: float, most: int, operations: list[tuple[str, object, object]]
) -> None:
    stream = Stream(lambda: Ledger(eps, b0, c0 + 1, most))

    def check() -> None:
        best, highest = worst_windows(stream.outcomes, eps)
        assert best <= Fraction(str(b0)) + Fraction(str(c0)) + 1
        assert highest <= Fraction(str(b0))
        assert sum(stream.outcomes) <= stream.guarantee.worst <= stream.guarantee.bound
        remaining = stream.guarantee.remaining
        assert remaining is not None
        assert 0 <= remaining <= 1
        kept = stream.guarantee.dump()["kept"]
        assert len(kept) <= most

    play(stream, operations, check)


def slow_ledger(rows: list[tuple[bool, int | None]], eps: float, b0: float, c0: float) -> Fraction:
    """The level after these rows (served, what is known of ``W``), from the formula."""
    level = Fraction(0)
    floor = -Fraction(str(c0))
    for served, w in rows:
        level = max(floor, level - Fraction(str(eps)))
        level = max(floor, level + ((1 if w is None else w) if served else 0))
    return level


@settings(max_examples=100, deadline=None)
@given(SHARES, AMOUNTS, AMOUNTS, OPERATIONS)
def test_ledger_serves_whenever_its_formula_does(
    eps: float, b0: float, c0: float, operations: list[tuple[str, object, object]]
) -> None:
    """The level is what it would be had every label been there from the first: no late label is wasted."""
    stream = Stream(lambda: Ledger(eps, b0, c0 + 1))

    def check() -> None:
        books = [(served, stream.known.get(row)) for row, served in enumerate(stream.served)]
        level = slow_ledger(books, eps, b0, c0 + 1)
        room = min(Fraction(1), (Fraction(str(b0)) - level) / (Fraction(str(b0)) + Fraction(str(c0)) + 1))
        assert stream.guarantee.remaining == pytest.approx(float(room), abs=1e-12)
        after = max(-Fraction(str(c0)) - 1, level - Fraction(str(eps))) + 1
        trial = Ledger(eps, b0, c0 + 1)
        trial.restore(stream.guarantee.dump())
        assert trial.allow(np.array([True])).adapted[0] == (after <= Fraction(str(b0)))

    # A row of which it was said that no label will come keeps its 1, even if one comes.
    play(stream, [one for one in operations if one[0] != "label" or one[2] is not None], check)


@pytest.mark.parametrize("delay", [0, 7, 200])
@pytest.mark.parametrize("restarts", [False, True])
def test_ledger_stops_a_collapse_after_a_long_good_time(delay: int, restarts: bool) -> None:
    """Right on 5,000 disagreements, then wrong on 5,000; labels come ``delay`` rows late."""
    b0, c0, eps = 10.0, 20.0, 0.01
    stream = Stream(lambda: Ledger(eps, b0, c0))
    for row in range(10_000):
        stream.send(True)
        if row >= delay:
            stream.label(row - delay, -1 if row - delay < 5000 else 1)
        if restarts and row % 500 == 0:
            stream.restart()
    outcomes = stream.outcomes
    assert sum(outcomes[5000:]) <= b0 + c0 + eps * 5000
    # Nothing but the delay keeps it from serving all of the good time.
    if delay == 0:
        assert sum(outcomes[:5000]) == -5000
    assert sum(outcomes[:5000]) <= -5000 * min(1.0, (b0 + c0) / (delay + 1)) * 0.9


@pytest.mark.parametrize("restarts", [False, True])
def test_old_labels_do_not_pay_for_new_harm(restarts: bool) -> None:
    """The attack on ledgers that refund at the level of today: while it is good, half of the labels are held back. Then
    every row is bad; its label comes at once, and one of the old good ones with each."""
    b0, c0, eps = 5.0, 5.0, 0.0
    stream = Stream(lambda: Ledger(eps, b0, c0))
    held = []
    for row in range(800):
        stream.send(True)
        if stream.served[row] and row % 2:
            stream.label(row, -1)
        elif stream.served[row]:
            held.append(row)
    assert len(held) > 100
    start = len(stream.served)
    for _ in range(2000):
        for row in stream.send(True):
            stream.label(row, 1)
        if held:
            stream.label(held.pop(), -1)
        if restarts:
            stream.restart()
    assert sum(stream.outcomes[start:]) <= b0 + c0
    best, _ = worst_windows(stream.outcomes, eps)
    assert best <= b0 + c0


def test_an_adversary_gets_what_the_ledger_promises_and_no_more() -> None:
    """First it earns all the credit there is, then it spends it: the bound is met, but for the part of a row."""
    b0, c0, eps = 3.0, 4.0, 0.1
    stream = Stream(lambda: Ledger(eps, b0, c0))
    for _ in range(50):
        for row in stream.send(True):
            stream.label(row, -1)
    start = len(stream.served)
    for _ in range(100):
        for row in stream.send(True):
            stream.label(row, 1)
    best, _ = worst_windows(stream.outcomes, eps)
    assert sum(stream.outcomes[start:]) == int(b0 + c0 + eps * 99)
    assert b0 + c0 - 1 < best <= b0 + c0


@pytest.mark.parametrize("kind", KINDS)
def test_requests_may_be_cut_anywhere(kind: str) -> None:
    """Rows by rows or all at once: it is their order that counts. In between, the server starts again."""
    flags = np.random.default_rng(1).random(300) < 0.4
    whole, single = KINDS[kind](), KINDS[kind]()
    at_once = whole.allow(flags)
    served, asked = [], []
    for flag in flags:
        one = single.allow(np.array([flag]))
        served.append(one.adapted[0])
        asked.append(one.ask[0])
        if kind != "audit":  # Its coin would start over.
            saved = json.loads(json.dumps(single.dump()))
            single = KINDS[kind]()
            single.restore(saved)
    np.testing.assert_array_equal(at_once.adapted, served)
    np.testing.assert_array_equal(at_once.ask, asked)
    assert (whole.bound, whole.worst, whole.remaining) == (single.bound, single.worst, single.remaining)


DAMAGES: list[tuple[str, dict[str, object]]] = [
    ("budget", {"spent": 31}),
    ("budget", {"rows": -1}),
    ("budget", {"rows": 30.0}),
    ("ledger", {"kept": [[5, 1], [3, 1]]}),
    ("ledger", {"kept": [[5, 2]]}),
    ("ledger", {"kept": [[30, 1]]}),
    ("ledger", {"after": 31}),
    ("audit", {"q": 0.4}),
    ("audit", {"gap": 1000}),
    ("audit", {"served": 29}),
    ("audit", {"harm": [1.0]}),
    ("audit", {"gain": [float("inf")] * len(BETS)}),
    ("audit", {"low": [1, 0.5, 0.0]}),
    ("audit", {"aside": [3, 3.5]}),
    ("audit", {"since": [31, 0]}),
]


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_states_are_refused(kind: str) -> None:
    guarantee = KINDS[kind]()
    guarantee.allow(np.ones(30, np.bool_))
    guarantee.settle(0, -1)
    before = json.loads(json.dumps(guarantee.dump()))
    changes = [{key: value} for key in before for value in (None, "1", float("nan"))]
    for change in changes + [change for name, change in DAMAGES if name == kind]:
        with pytest.raises(BadInput, match=f"this is not a saved {kind}"):
            guarantee.restore(before | change)
    for key in before:
        with pytest.raises(BadInput, match=f"KeyError.*{key}"):
            guarantee.restore({name: one for name, one in before.items() if name != key})
    assert json.loads(json.dumps(guarantee.dump())) == before


@pytest.mark.parametrize(
    "make",
    [
        lambda: Budget(-0.1, 0),
        lambda: Budget(1.5, 0),
        lambda: Budget(0.1, float("nan")),
        lambda: Ledger(0.1, 0.5, 0.4),
        lambda: Ledger(0.1, 1, float("inf")),
        lambda: Audit(0.0, 0.1, lambda: 0.5),
        lambda: Audit(1.5, 0.1, lambda: 0.5),
        lambda: Audit(0.5, 0.1, lambda: 0.5, alpha=0.0),
        lambda: Audit(0.5, 0.1, lambda: 0.5, level=1.0),
        lambda: Audit(0.5, 0.1, lambda: 0.5, c=1.0),
    ],
)
def test_settings_out_of_range_are_refused(make: Callable[[], Guarantee]) -> None:
    with pytest.raises(ValueError, match="must be"):
        make()


@pytest.mark.parametrize("kind", ["ledger", "audit"])
def test_outcomes_are_minus_one_to_one(kind: str) -> None:
    guarantee = KINDS[kind]()
    guarantee.allow(np.ones(3, np.bool_))
    with pytest.raises(ValueError, match="must be -1, 0, 1 or None"):
        guarantee.settle(0, 2)


# --- G2


def outcomes(mean: float, shape: tuple[int, ...], generator: np.random.Generator) -> NDArray[np.int64]:
    """``W`` of a given mean, 0 in a fifth of the rows."""
    return generator.choice([-1, 0, 1], shape, p=[0.4 - mean / 2, 0.2, 0.4 + mean / 2])


def answers(audit: Audit, ws: NDArray[np.int64], until: Callable[[], bool] = lambda: False) -> int:
    """Sends disagreements with these ``W`` and answers every audit at once; how many, up to where ``until`` holds."""
    one = np.ones(1, np.bool_)
    for row, w in enumerate(ws.tolist()):
        if audit.allow(one).ask[0]:
            audit.settle(row, w)
            if until():
                break
    return audit.answered


def test_evidence_is_that_of_the_formulas() -> None:
    """Of both kinds, against plain loops; among rows that agree, with a restart on the way."""
    generator = np.random.default_rng(8)
    q, eps, c, alpha = 0.6, 0.05, 30.0, 0.1
    audit = Audit(q, eps, generator.random, c=c, alpha=alpha)
    seen = set()
    for start in range(0, 4000, 400):
        audit.restart()
        harm, gain, rows, differed, alarm, certified = [0.0] * len(BETS), [1.0] * len(BETS), 0, 0, False, False
        drift = generator.uniform(-0.6, 0.6)
        for row in range(start, start + 400):
            differs = bool(generator.random() < 0.4)
            asked = audit.allow(np.array([differs])).ask[0]
            rows, differed = rows + 1, differed + differs
            w = int(outcomes(drift, (), generator))
            audit.settle(row, w)
            if asked:
                tau = min(1, eps * rows / differed)
                harm = [(1 + level) * (1 + bet * (w - tau) / (1 + tau)) for bet, level in zip(BETS, harm, strict=True)]
                gain = [level * (1 - bet * w) for bet, level in zip(BETS, gain, strict=True)]
                alarm, certified = alarm or sum(harm) / 6 >= c, certified or sum(gain) / 6 >= 1 / alpha
            assert (audit.evidence, audit.wealth) == pytest.approx((np.mean(harm), np.mean(gain)))
            assert (audit.alarm, audit.certified) == (alarm, certified)
        seen.add((alarm, certified))
    assert len(seen) > 1


def test_harm_alarms_are_as_rare_as_promised() -> None:
    """At the edge of what is tolerated: every row differs, and the mean of ``W`` is ``eps``. The mean number of audits
    to an alarm is at least ``c``; runs are cut at 20 ``c``, which only makes it smaller."""
    generator = np.random.default_rng(0)
    c, eps = 20.0, 0.1
    lengths = []
    for ws in outcomes(eps, (150, 400), generator):
        audit = Audit(1.0, eps, generator.random, c=c)
        lengths.append(answers(audit, ws, lambda audit=audit: audit.alarm))  # type: ignore[misc]
    mean, error = np.mean(lengths), np.std(lengths) / np.sqrt(len(lengths))
    assert mean - 3 * error >= c
    assert np.median(lengths) < 20 * c


def test_harm_is_tolerated_by_the_row() -> None:
    """Where few rows differ, more of these may go wrong: ``tau = eps / d``."""
    generator = np.random.default_rng(0)
    alarms = {}
    for share in (0.1, 1.0):
        found = 0
        for ws in outcomes(0.3, (20, 200), generator):
            audit = Audit(1.0, 0.05, generator.random, c=100.0)
            others = np.zeros(round(1 / share) - 1, np.bool_)
            for w in ws.tolist():
                audit.allow(others)
                row = audit.rows
                audit.allow(np.ones(1, np.bool_))
                audit.settle(row, w)
            found += audit.alarm
        alarms[share] = found
    assert alarms[1.0] == 20
    assert alarms[0.1] <= 1


def test_promotions_without_benefit_are_as_rare_as_promised() -> None:
    generator = np.random.default_rng(0)
    alpha, runs = 0.1, 200
    found = 0
    for ws in outcomes(0.0, (runs, 150), generator):
        audit = Audit(1.0, 0.02, generator.random, alpha=alpha)
        answers(audit, ws, lambda audit=audit: audit.certified)  # type: ignore[misc]
        found += audit.certified
    assert 0 < found / runs <= alpha + 2 * np.sqrt(alpha * (1 - alpha) / runs)


@pytest.mark.parametrize("q", [1.0, 0.3])
@pytest.mark.parametrize(("mean", "least", "most"), [(0.2, 100, 400), (0.4, 30, 80), (0.6, 12, 35)])
def test_harm_and_benefit_are_found(q: float, mean: float, least: int, most: int) -> None:
    """As many audits as in the notes that the design rests on (65 and 30 to an alarm; 218, 50 and 20 to a promotion),
    and no more where the coin is rarer."""
    generator = np.random.default_rng(0)
    found: dict[str, list[int]] = {"promotion": [], "alarm": []}
    for ws in outcomes(mean, (12, int(1000 / q)), generator):
        good, bad = (Audit(q, 0.02, generator.random) for _ in range(2))
        found["promotion"].append(answers(good, -ws, lambda good=good: good.certified))  # type: ignore[misc]
        found["alarm"].append(answers(bad, ws, lambda bad=bad: bad.alarm))  # type: ignore[misc]
    assert least <= np.median(found["promotion"]) <= most
    assert least <= np.median(found["alarm"]) <= 2.5 * most


class Foe:
    """Chooses ``W`` of the next row after it has seen all coins up to now: harm while the estimate is behind the truth,
    to leave the interval. ``ahead``: on which side."""

    def __init__(self, q: float, side: int) -> None:
        self._q, self._side, self._off = q, side, 0.0

    def next(self) -> int:
        """``W``."""
        return self._side if self._off <= 0 else -self._side

    def saw(self, w: int, asked: bool) -> None:
        """How far the sum of ``A W / q`` is off that of ``W``, to the side."""
        self._off += self._side * (w - asked * w / self._q)


@pytest.mark.parametrize("q", [0.7, 0.3, 0.1])
@pytest.mark.parametrize("kind", ["steady", "drift", "foe above", "foe below"])
def test_interval_holds_the_regret_at_all_times(q: float, kind: str) -> None:
    """Nothing is random but the coin. All streams of ``steady`` and ``drift`` have the same rows. In ``drift``, answers
    come late and out of order."""
    generator = np.random.default_rng(5)
    runs, rows, level = 60, 400, 0.1
    fixed = outcomes(0.3, (rows,), generator) if kind == "steady" else np.repeat([-1, 1, 0, -1, 1], rows // 5)
    one, missed = np.ones(1, np.bool_), 0
    for _ in range(runs):
        audit = Audit(q, 0.02, generator.random, level=level)
        foe = Foe(q, 1 if kind == "foe above" else -1)
        regret, late, out = 0, [], False
        for row in range(rows):
            w = foe.next() if kind.startswith("foe") else int(fixed[row])
            asked = bool(audit.allow(one).ask[0])
            foe.saw(w, asked)
            regret += w
            if asked:
                late.append((row, w))
            while len(late) > (4 if kind == "drift" else 0):
                audit.settle(*late.pop(int(generator.integers(len(late)))))
            if row % 25 == 24:
                low, high = audit.interval()
                out |= not low <= regret <= high
        missed += out
        for each in late:
            audit.settle(*each)
        low, high = audit.interval()
        assert high - low < {0.7: 250, 0.3: 500, 0.1: 801}[q]
    assert missed / runs <= level + 2 * np.sqrt(level * (1 - level) / runs)


def test_interval_is_reckoned_in_the_order_of_the_rows() -> None:
    """Whatever the order of the answers, once all are there the interval is the same; it is that of a plain loop."""
    generator = np.random.default_rng(2)
    flags, ws = generator.random(400) < 0.7, outcomes(0.2, (400,), generator)
    q = 0.4
    coins = np.random.default_rng(3)
    audit = Audit(q, 0.02, coins.random)
    asked = np.concatenate([audit.allow(part).ask for part in np.split(flags, 20)])
    waiting = np.flatnonzero(asked)
    for row in generator.permutation(waiting).tolist():
        audit.settle(row, int(ws[row]))
    xs = [(asked[row] * ws[row] + 1) / 2 for row in np.flatnonzero(flags)]
    spread, total = 0.0, 0.0
    for count, x in enumerate(xs):
        spread += (x - (total / count if count else 0.5)) ** 2
        total += x
    wide = radius(spread, 0.025)
    expected = [(2 * (total + side * wide) - len(xs)) / q for side in (-1, 1)]
    assert list(audit.interval()) == pytest.approx(expected)
    assert (audit.answered, audit.served, audit.differed) == (len(waiting), flags.sum(), flags.sum())


def test_the_regret_is_known_where_all_are_asked() -> None:
    ws = outcomes(0.1, (100,), np.random.default_rng(0))
    audit = Audit(1.0, 0.02, lambda: 0.999)
    answers(audit, ws)
    assert audit.interval() == (ws.sum(), ws.sum())


def test_what_waits_counts_as_the_worst_that_it_can_be() -> None:
    audit = Audit(0.99, 0.02, lambda: 0.0)
    audit.allow(np.ones(400, np.bool_))
    assert audit.interval() == (-400, 400)
    for row in range(1, 400):
        audit.settle(row, -1)
    # The first still waits, and all the others behind it.
    assert audit.interval() == (-400, 400)
    audit.settle(0, -1)
    low, high = audit.interval()
    assert low == -400
    assert -400 <= high < -300


def test_unanswered_audits_are_on_the_wrong_side_of_both_ends() -> None:
    """And so is what is given up because too many wait."""

    def run(blank: int | None, most: int = 1000) -> Audit:
        audit = Audit(0.8, 0.02, lambda: 0.0, most=most)
        audit.allow(np.ones(200, np.bool_))
        for row in range(200):
            if most == 1000 or row >= 100:
                audit.settle(row, blank if row < 100 else -1)
        return audit

    told, silent, dropped = run(-1), run(None), run(None, most=100)
    assert silent.interval()[0] == pytest.approx(run(-1).interval()[0])
    assert silent.interval()[1] == pytest.approx(run(1).interval()[1])
    assert dropped.interval() == silent.interval()
    assert (silent.answered, silent.unanswered) == (dropped.answered, dropped.unanswered) == (100, 100)
    assert silent.wealth_worst < silent.wealth < told.wealth == told.wealth_worst
    assert silent.certified


def test_restart_forgets_evidence_and_keeps_the_books() -> None:
    audit = Audit(1.0, 0.02, lambda: 0.0, c=100.0)
    audit.allow(np.ones(60, np.bool_))
    for row in range(50):
        audit.settle(row, 1)
    assert audit.alarm
    before = audit.interval()
    audit.restart()
    assert not audit.alarm
    assert (audit.evidence, audit.wealth) == (0, 1)
    assert audit.interval() == before
    for row in range(50, 60):
        audit.settle(row, 1)  # Of the model that was thrown away.
    assert audit.evidence == 0
    assert audit.answered == 60
    assert audit.interval()[0] > before[0]
    audit.allow(np.ones(1, np.bool_))
    audit.settle(60, 1)
    assert audit.evidence > 0


def test_audits_of_rows_that_were_not_served_are_evidence_but_no_regret() -> None:
    audit = Audit(1.0, 0.02, lambda: 0.0)
    decision = audit.allow(np.ones(300, np.bool_), serving=False)
    assert not decision.adapted.any()
    assert decision.ask.all()
    for row in range(300):
        audit.settle(row, -1)
    assert audit.certified
    assert audit.interval() == (0, 0)


def test_answers_count_once_and_only_where_asked() -> None:
    coins = iter([0.9, 0.1, 0.9, 0.1])
    audit = Audit(0.5, 0.02, lambda: next(coins))
    np.testing.assert_array_equal(audit.allow(np.ones(4, np.bool_)).ask, [False, True, False, True])
    for row in (0, 1, 1, 2, 3, 3, 7):
        audit.settle(row, -1)
    assert audit.answered == 2
    assert audit.wealth == pytest.approx(np.mean([(1 + bet) ** 2 for bet in BETS]))


@settings(max_examples=100, deadline=None)
@given(OPERATIONS, st.integers(0, 5))
def test_audit_goes_on_after_a_restart_of_the_server(operations: list[tuple[str, object, object]], seed: int) -> None:
    """With the same coins, two servers of which one is started again and again say the same."""
    coins = [np.random.default_rng(seed) for _ in range(2)]
    straight, broken = (Stream(lambda coin=coin: Audit(0.4, 0.02, coin.random, most=5)) for coin in coins)  # type: ignore[misc]
    play(straight, [one for one in operations if one[0] != "restart"], lambda: None)
    play(broken, operations, broken.restart)
    assert straight.guarantee.dump() == broken.guarantee.dump()
    assert straight.guarantee.bound == broken.guarantee.bound


def test_wealth_stays_a_number() -> None:
    audit = Audit(1.0, 0.0, lambda: 0.0)
    for first in range(0, 12_000, 1000):
        audit.allow(np.ones(1000, np.bool_))
        for row in range(first, first + 1000):
            audit.settle(row, 1 if first < 6000 else -1)
        saved = json.dumps(audit.dump(), allow_nan=False)
    audit.restore(json.loads(saved))


# --- the boundary


@pytest.mark.parametrize("spread", [0.0, 0.3, 10.0, 400.0])
@pytest.mark.parametrize("alpha", [0.2, 0.025, 1e-3])
def test_radius_is_where_the_mixture_reaches_its_level(spread: float, alpha: float) -> None:
    """By plain integration of the mixture over ``l``."""
    narrow = 2 * np.log(1 / (2 * alpha))
    prior = 10.0 / (narrow + np.log1p(narrow))
    found = radius(spread, alpha)

    def weight(bet: float) -> float:
        return float((1 - bet) ** (prior - 1) * np.exp(-prior * (1 - bet)))

    def wealth(bet: float) -> float:
        return float(weight(bet) * np.exp(bet * found + (np.log1p(-bet) + bet) * spread))

    total, _ = integrate.quad(weight, 0, 1, limit=200)
    peak = found / (found + spread)
    value, _ = integrate.quad(wealth, 0, 1, points=[peak], limit=400)
    assert value / total == pytest.approx(1 / alpha, rel=1e-5)


@pytest.mark.parametrize("spread", [0.0, 0.1, 30.0, 1e5])
@pytest.mark.parametrize("alpha", [0.2, 1e-4])
@pytest.mark.parametrize("best_at", [1.0, 200.0])
def test_radius_agrees_with_mapie(spread: float, alpha: float, best_at: float) -> None:
    bounds = pytest.importorskip("mapie.exchangeability_testing.bounds")
    theirs = bounds.GammaExponentialMixtureBound(best_at, 1.0, alpha)(spread, alpha)
    assert radius(spread, alpha, best_at) == pytest.approx(theirs, rel=1e-8)


@pytest.mark.parametrize("q", [0.9, 0.3])
def test_interval_agrees_with_mapie(q: float) -> None:
    bounds = pytest.importorskip("mapie.exchangeability_testing.bounds")
    generator = np.random.default_rng(4)
    ws = outcomes(0.25, (250,), generator)
    audit = Audit(q, 0.02, generator.random, level=0.05)
    xs, ours = [], []
    for row, w in enumerate(ws.tolist()):
        asked = bool(audit.allow(np.ones(1, np.bool_)).ask[0])
        audit.settle(row, w)
        xs.append((asked * w + 1) / 2)
        ours.append(np.array(audit.interval()) / audit.served)
    for index, side in enumerate(("lower", "upper")):
        means = bounds.conjugate_mixture_empirical_bernstein_bound(
            xs, v_opt=10.0, alpha=0.05, bound_side=side, running_intersection=False
        )
        theirs = np.clip((2 * means - 1) / q, -1, 1)
        np.testing.assert_allclose(np.array(ours)[:, index], theirs, atol=1e-9)
