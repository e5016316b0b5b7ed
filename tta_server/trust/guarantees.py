"""How much worse than its source a stream may be served, and what can be said of it afterwards.

Of a row, ``W = 1[source right] - 1[adapted right]``, so -1, 0 or 1; it is 0 where the two agree. A stream's *regret* is
the sum of ``W`` over the rows that were served the adapted answer: errors(served) - errors(source). Each class here is
one stream's guarantee on it, and knows nothing else of the stream.

- ``Budget``: at most ``b0 + eps t`` after ``t`` rows, whatever happens. No labels.
- ``Ledger``: at most ``b0 + c0 + eps n`` in any ``n`` rows on end, whatever happens. Labels of disagreements buy more
  room; they may come late or never.
- ``Audit``: inside an interval, with a probability that only the server's own coins decide. Labels of a share of the
  disagreements.

``b0``, ``c0`` and ``eps`` count to the ninth decimal. ``Budget`` and ``Ledger`` reckon in whole billionths of a row, so
nothing is rounded and the inequalities are exact. The labels are taken to be true. None of this says how good the
source is.

Written and read by one thread at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tta_server.errors import BadInput

Mask = NDArray[np.bool_]
Saved = dict[str, Any]
"""JSON values."""

ONE = 10**9
"""A row, in the units of ``Budget`` and ``Ledger``."""
MOST = 1000
"""Rows whose labels are waited for."""
BETS = (0.05, 0.1, 0.2, 0.4, 0.7, 0.95)
"""Shares of its wealth that an e-process stakes at each audit; it is the mean of so many processes."""
HUGE = 1e100
"""Wealth does not grow beyond this."""
BEST_AT = 10.0
"""The ``V`` at which :func:`radius` is about narrowest. An answer with ``W`` of 1 or -1 adds about 1/4 to it."""


class Decision(NamedTuple):
    """What to do with the rows of a request."""

    adapted: Mask
    """Which may be served the adapted answer: all where the two agree."""
    ask: Mask
    """Whose label would count."""


class Guarantee(Protocol):
    """What the guard asks of a stream's guarantee."""

    rows: int
    """Counted so far, from 0: the number of the next row."""

    def allow(self, differs: Mask, serving: bool = True) -> Decision:
        """Takes the next rows in order and counts them; ``differs``: adapted and source class differ.

        ``serving``: whether the guard wants to serve the adapted answer at all; if not, it is allowed nowhere where it
        differs, and costs nothing. What is allowed counts as served.
        """

    def settle(self, row: int, w: int | None) -> None:
        """A row's ``W`` is known; ``None``: its label will not come. Rows that do not matter, or were settled before,
        change nothing."""

    @property
    def remaining(self) -> float | None:
        """Share of the budget that is left, in [0, 1]; ``None`` where there is none."""

    @property
    def bound(self) -> float:
        """Errors: what the guarantee says of the regret up to now."""

    @property
    def worst(self) -> float:
        """Errors: the most the regret can be by the labels that came; no more than ``bound``."""

    def dump(self) -> Saved:
        """All that is to be kept, in JSON values; the settings are not in it."""

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Goes on where ``dump`` left off, perhaps under other settings: what they promise then holds from here on, and
        ``bound`` is ``worst`` where that is more. Raises ``BadInput`` and changes nothing where that is no such
        state."""


class Budget:
    """G0: a disagreement may be served adapted while ``D + 1 <= b0 + eps t``, ``D`` being how many were, ``t`` the rows
    with this one.

    So ``regret <= D <= b0 + eps t`` for every ``t``, since ``W <= 1``: on any stream, under any attack, without labels.
    The gain is limited as much as the harm. What was not spent is kept, so there is no such promise for a window: a
    long quiet time pays for a long bad one. ``eps = 1`` allows everything.
    """

    def __init__(self, eps: float, b0: float) -> None:
        """``eps``: errors a row; ``b0``: errors. Raises ``ValueError``."""
        self._eps, self._start = _units("eps", eps, most=1.0), _units("b0", b0)
        self.rows = 0
        self._spent = 0

    def allow(self, differs: Mask, serving: bool = True) -> Decision:
        """See :class:`Guarantee`."""
        adapted = ~differs
        for index in np.flatnonzero(differs).tolist() if serving else ():
            if (self._spent + 1) * ONE <= self._limit(self.rows + index + 1):
                adapted[index] = True
                self._spent += 1
        self.rows += len(differs)
        return Decision(adapted, np.zeros_like(differs))

    def settle(self, row: int, w: int | None) -> None:
        """See :class:`Guarantee`. Labels change nothing."""

    @property
    def remaining(self) -> float:
        """See :class:`Guarantee`."""
        limit = self._limit(self.rows)
        return max(0.0, 1 - self._spent * ONE / limit) if limit else 0.0

    @property
    def bound(self) -> float:
        """See :class:`Guarantee`: ``b0 + eps t``."""
        return max(self._limit(self.rows) / ONE, self.worst)

    @property
    def worst(self) -> float:
        """See :class:`Guarantee`: ``D``."""
        return float(self._spent)

    def dump(self) -> Saved:
        """See :class:`Guarantee`."""
        return {"rows": self.rows, "spent": self._spent}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """See :class:`Guarantee`."""
        with _reading("budget"):
            rows = _count(saved["rows"])
            self.rows, self._spent = rows, _count(saved["spent"], rows)

    def _limit(self, rows: int) -> int:
        return self._start + self._eps * rows


class Ledger:
    """G1: a token bucket. Of a disagreement that was served adapted, ``x`` is ``W`` where the label is known, else 1;
    of all other rows it is 0. The level after row ``t`` is

        L_t = max(-c0, max(-c0, L_{t-1} - eps) + x_t),   L_0 = 0,

    and a disagreement may be served adapted while that leaves ``L_t <= b0``. A label replaces the 1 *in its place*: the
    level is what it would be had the label been known when the row was served.

    Then for all ``s < t``

        regret in (s, t] <= b0 + c0 + eps (t - s),   and from the start   regret in (0, t] <= b0 + eps t.

    Proof. Take what is known when row ``t`` is served. Each row has ``x_i <= L_i - L_{i-1} + eps``, as the floor can
    only lift ``L_i``; so the sum of ``x`` over (s, t] is at most ``L_t - L_s + eps (t - s)``. Here ``L_s >= -c0`` by
    the floor, and ``L_0 = 0``. ``L_t <= b0``: this was checked for the last row that was served; rows that are not
    only lower the level, and so do labels, which make an ``x`` smaller and never larger. And ``W_i <= x_i``. No step
    needs labels to come in order, in time, or at all.

    Had the refund gone to the level of today instead, labels of rows before ``s`` would pay for harm after it, and the
    window would have no bound. Without the floor, a long good time would pay for a long collapse.

    To know what a late label changes, rows are kept from the oldest that waits on, ``most`` at most. The oldest is then
    taken as it stands: a label that comes later than so many served disagreements changes nothing.
    """

    def __init__(self, eps: float, b0: float, c0: float, most: int = MOST) -> None:
        """``eps``: errors a row; ``b0``: errors; ``c0``: errors made good that may be held as credit; at least 1 with
        ``b0``, or nothing is ever served. Raises ``ValueError``."""
        self._eps, self._top, self._credit = _units("eps", eps, most=1.0), _units("b0", b0), _units("c0", c0)
        if self._top + self._credit < ONE:
            raise ValueError(f"b0 + c0 must be at least 1, got {b0:g} + {c0:g}")
        self._most = most
        self.rows = 0
        self._regret = 0
        self._base = (0, 0)
        """Level, and the number of rows it is the level after."""
        self._kept: dict[int, int | None] = {}
        """``W`` of disagreements that were served since, in order; ``None`` while it is waited for."""
        self._last: tuple[int, int] | None = (0, 0)
        """Like ``_base``, after the last kept row; ``None``: to be reckoned anew."""

    def allow(self, differs: Mask, serving: bool = True) -> Decision:
        """See :class:`Guarantee`. A label would count for each disagreement that is served."""
        ask = np.zeros_like(differs)
        last = self._reckon()
        for index in np.flatnonzero(differs).tolist() if serving else ():
            row = self.rows + index
            after = self._after(last, row, 1)
            if after[0] <= self._top:
                ask[index], self._kept[row], last = True, None, after
                self._regret += 1
        self._last = last
        self.rows += len(differs)
        self._fold()
        return Decision(~differs | ask, ask)

    def settle(self, row: int, w: int | None) -> None:
        """See :class:`Guarantee`."""
        _check(w)
        if self._kept.get(row, 0) is None:
            self._kept[row] = w = 1 if w is None else w
            self._regret += w - 1
            self._last = None

    @property
    def remaining(self) -> float:
        """See :class:`Guarantee`: of ``b0 + c0``."""
        return min(1.0, max(0.0, (self._top - self._level) / (self._top + self._credit)))

    @property
    def bound(self) -> float:
        """See :class:`Guarantee`: ``b0 + eps t``."""
        return max((self._top + self._eps * self.rows) / ONE, self.worst)

    @property
    def worst(self) -> float:
        """See :class:`Guarantee`: the sum of ``x``."""
        return float(self._regret)

    def dump(self) -> Saved:
        """See :class:`Guarantee`."""
        self._reckon()
        level, after = self._base
        kept = [[row, w] for row, w in self._kept.items()]
        return {"rows": self.rows, "regret": self._regret, "level": level, "after": after, "kept": kept}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """See :class:`Guarantee`."""
        with _reading("ledger"):
            rows = _count(saved["rows"])
            base = max(-self._credit, _whole(saved["level"])), _count(saved["after"], rows)
            regret = _whole(saved["regret"])
            kept = {row: _check(w) for row, w in saved["kept"]}
            _ascending([base[1] - 1, *kept, rows])
        self.rows, self._regret, self._base, self._kept, self._last = rows, regret, base, kept, None

    @property
    def _level(self) -> int:
        last = self._last
        if last is None:  # not kept: this is read from other threads, too
            last = self._base
            for row, w in list(self._kept.items()):
                last = self._after(last, row, 1 if w is None else w)
        level, after = last
        return max(-self._credit, level - self._eps * (self.rows - after))

    def _after(self, before: tuple[int, int], row: int, w: int) -> tuple[int, int]:
        level, after = before
        due = max(-self._credit, level - self._eps * (row + 1 - after))
        return max(-self._credit, due + w * ONE), row + 1

    def _reckon(self) -> tuple[int, int]:
        if self._last is None:
            self._fold()
            last = self._base
            for row, w in self._kept.items():
                last = self._after(last, row, 1 if w is None else w)
            self._last = last
        return self._last

    def _fold(self) -> None:
        """Takes the oldest rows as they stand, down to ``most`` and to the first that waits."""
        while self._kept:
            row, w = next(iter(self._kept.items()))
            if w is None and len(self._kept) <= self._most:
                return
            del self._kept[row]
            self._base = self._after(self._base, row, 1 if w is None else w)


class Audit:
    """G2: asks for the labels of disagreements that the server's own coin chose, each with probability ``q``.

    Three things come of the answers. The first two are about the adapted model as it is, served or not, since the last
    :meth:`restart`; they use answers in the order in which they come.

    (a) ``alarm``: it does harm. A Shiryaev-Roberts e-detector (Shin, Ramdas and Rinaldo 2024),

        M_l <- (M_l + 1)(1 + l x),   x = (W - tau) / (1 + tau),   tau = min(1, eps / d),

    ``d`` being the share of rows that differ, alarms when the mean of ``M_l`` over ``l`` in ``BETS`` reaches ``c``.
    While ``E[W | what was known before the label] <= tau`` at every audit (regret of ``eps`` a row), alarms come every
    ``c`` audits or less often, on average. How soon one comes when it is broken is not promised, but measured.

    (b) ``certified``: it does good. The e-process ``G_l <- G_l (1 - l W)`` has a mean of at least ``1 / alpha`` at some
    time with probability at most ``alpha`` where ``E[W | ...] >= 0`` at every audit (Ville 1939). It says that there
    was a benefit, not that it will last. A bad start is remembered, until :meth:`restart`.

    (c) :meth:`interval`: what the regret of this very stream was. Over the ``n`` disagreements that were served
    adapted, in order, with ``A`` the coin, ``X = (A W + 1) / 2`` has the mean ``(q W + 1) / 2`` and

        sum of W = (2 sum of X - n) / q +- 2 u(V) / q,   V = sum of (X_i - mean of X_1 .. X_{i-1})^2,

    ``u`` being :func:`radius`, a boundary that holds for all ``n`` at once with probability ``1 - level`` (Howard,
    Ramdas, McAuliffe and Sekhon 2021, theorem 4). Only the coin is random in this: the stream may drift, depend on its
    past, and be made by an adversary, who must not foresee the coin. Where ``q = 1`` nothing is, and both ends are the
    regret itself. Disagreements from the first that waits for its label on are counted as -1 and +1. This is for life:
    :meth:`restart` leaves it alone.

    Labels that do not come. (c) stays true: an audit that stays unanswered counts as -1 for the lower and +1 for the
    upper end. (a) and (b) leave it out, and are false where it depends on ``W`` whether or when an answer comes;
    ``wealth_worst`` is the ``wealth`` of (b) had all these been +1. All three are for one stream: among 1,000 streams
    without benefit 10 are certified at ``alpha`` = 0.01, and ``c`` must grow with the number of streams for the same
    number of false alarms.
    """

    def __init__(
        self,
        q: float,
        eps: float,
        coin: Callable[[], float],
        c: float = 1e4,
        alpha: float = 0.01,
        level: float = 0.05,
        most: int = MOST,
    ) -> None:
        """``coin``: a number in [0, 1) at each call, that nobody can foresee; not kept by :meth:`dump`, and it must not
        start over after :meth:`restore`. ``most``: audits that wait for an answer; beyond them, the oldest count as
        unanswered. Raises ``ValueError``."""
        if not 0 < q <= 1:
            raise ValueError(f"q must be in (0, 1], got {q:g}")
        if not (0 <= eps <= 1 and 0 < alpha < 1 and 0 < level < 1 and c > 1):
            raise ValueError("eps must be in [0, 1], alpha and level in (0, 1), c above 1")
        self._q, self._eps, self._coin = q, eps, coin
        self._c, self._alpha, self._tail, self._most = c, alpha, level / 2, most
        self.rows = 0
        self.differed = 0
        """Rows that differed."""
        self.served = 0
        """Of these, how many were served adapted."""
        self.answered = 0
        """Audits."""
        self.unanswered = 0
        """Audits whose answer will not come."""
        self._low, self._high = _Sums(), _Sums()
        self._gap = 0
        """Served disagreements since the last of ``_kept`` that were not asked about."""
        self._kept: dict[int, _Asked] = {}
        """Audits of served rows from the first that waits on, in order."""
        self._aside: dict[int, None] = {}
        """Audits that wait of rows that were served the source's answer, in order."""
        self.restart()

    def restart(self) -> None:
        """Forgets (a) and (b): the adapted model is another one now. Answers to what was asked before are for (c)
        only."""
        self._since, self._differed_before = self.rows, self.differed
        self._harm = [0.0] * len(BETS)
        self._gain = [1.0] * len(BETS)
        self._gain_worst = [1.0] * len(BETS)
        self.alarm = False
        """(a): whether it was raised since the last restart."""
        self.alarmed_at = 0.0
        """The ``evidence`` then."""
        self.certified = False
        """(b): whether it was reached since then."""

    def allow(self, differs: Mask, serving: bool = True) -> Decision:
        """See :class:`Guarantee`. Forbids nothing: to act on ``alarm`` and ``certified`` is for the guard."""
        ask = np.zeros_like(differs)
        different = np.flatnonzero(differs).tolist()
        for index in different:
            ask[index] = asked = self._coin() < self._q
            if not serving:
                if asked:
                    self._aside[self.rows + index] = None
            elif asked:
                self._kept[self.rows + index], self._gap = _Asked(self._gap), 0
            else:
                self._gap += 1
        self.rows += len(differs)
        self.differed += len(different)
        if serving:
            self.served += len(different)
        for waiting in (self._kept, self._aside):
            while len(waiting) > self._most:
                self.settle(next(iter(waiting)), None)
        self._advance()
        return Decision(~differs | serving, ask)

    def give_up(self) -> None:
        """No label will come of what was asked so far."""
        for row in [*(row for row, asked in self._kept.items() if not asked.settled), *self._aside]:
            self.settle(row, None)

    def settle(self, row: int, w: int | None) -> None:
        """See :class:`Guarantee`. Labels that were not asked for change nothing."""
        _check(w)
        asked = self._kept.get(row)
        if row in self._aside:
            del self._aside[row]
        elif asked is not None and not asked.settled:
            asked.settled, asked.w = True, w
            self._advance()
        else:
            return
        if w is None:
            self.unanswered += 1
        else:
            self.answered += 1
        if row >= self._since:
            self._learn(w)

    @property
    def evidence(self) -> float:
        """The mean of ``M`` in (a), which alarms at ``c``."""
        return _mean(self._harm)

    @property
    def wealth(self) -> float:
        """The mean of ``G`` in (b), which certifies at ``1 / alpha``."""
        return _mean(self._gain)

    @property
    def wealth_worst(self) -> float:
        """The same with unanswered audits as +1."""
        return _mean(self._gain_worst)

    def interval(self) -> tuple[float, float]:
        """Of the regret of all rows so far, in errors: (c). Divided by ``served`` it is the regret of a disagreement,
        by ``rows`` that of a row."""
        known = self._high.count
        below = (2 * (self._low.total - self._radius(self._low)) - known) / self._q
        above = (2 * (self._high.total + self._radius(self._high)) - known) / self._q
        waiting = self.served - known
        return max(-known, below) - waiting, min(known, above) + waiting

    @property
    def remaining(self) -> None:
        """See :class:`Guarantee`."""
        return None

    @property
    def bound(self) -> float:
        """See :class:`Guarantee`: the upper end of (c), with probability ``1 - level / 2`` at all times."""
        return self.interval()[1]

    @property
    def worst(self) -> float:
        """See :class:`Guarantee`."""
        return self.bound

    def dump(self) -> Saved:
        """See :class:`Guarantee`."""
        return {
            "q": self._q,
            "rows": self.rows,
            "differed": self.differed,
            "served": self.served,
            "answered": self.answered,
            "unanswered": self.unanswered,
            "since": [self._since, self._differed_before],
            "alarm": self.alarm,
            "alarmed_at": self.alarmed_at,
            "certified": self.certified,
            "harm": [*self._harm],
            "gain": [*self._gain],
            "gain_worst": [*self._gain_worst],
            "low": self._low.dump(),
            "high": self._high.dump(),
            "gap": self._gap,
            "kept": [[row, asked.gap, asked.settled, asked.w] for row, asked in self._kept.items()],
            "aside": [*self._aside],
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """See :class:`Guarantee`. With another ``q`` it is refused, as the interval would be wrong."""
        with _reading("audit"):
            if saved["q"] != self._q:
                raise ValueError(f"it is of q = {saved['q']!r}, not {self._q:g}")
            rows = _count(saved["rows"])
            differed = _count(saved["differed"], rows)
            served = _count(saved["served"], differed)
            answered, unanswered = _count(saved["answered"], differed), _count(saved["unanswered"], differed)
            since, before = saved["since"]
            since, before = _count(since, rows), _count(before, differed)
            alarm, certified = _flag(saved["alarm"]), _flag(saved["certified"])
            alarmed_at = _number(saved["alarmed_at"], HUGE)
            harm, gain, worst = (
                [_number(value, HUGE) for _, value in zip(BETS, saved[key], strict=True)]
                for key in ("harm", "gain", "gain_worst")
            )
            low, high = _Sums.restored(saved["low"], served), _Sums.restored(saved["high"], served)
            gap = _count(saved["gap"], served)
            kept = {
                row: _Asked(_count(before, served), _flag(done), _check(w)) for row, before, done, w in saved["kept"]
            }
            aside = dict.fromkeys(saved["aside"])
            _ascending([-1, *kept, rows])
            _ascending([-1, *aside, rows])
            known = high.count + gap + len(kept) + sum(asked.gap for asked in kept.values())
            if low.count != high.count or known != served:
                raise ValueError("the rows that were served do not add up")
        self.rows, self.differed, self.served = rows, differed, served
        self.answered, self.unanswered = answered, unanswered
        self._since, self._differed_before = since, before
        self.alarm, self.alarmed_at, self.certified = alarm, alarmed_at, certified
        self._harm, self._gain, self._gain_worst = harm, gain, worst
        self._low, self._high, self._gap, self._kept, self._aside = low, high, gap, kept, aside

    def _learn(self, w: int | None) -> None:
        """(a) and (b)."""
        loss = 1 if w is None else w
        self._gain_worst = [
            min(HUGE, gain * (1 - bet * loss)) for bet, gain in zip(BETS, self._gain_worst, strict=True)
        ]
        if w is None:
            return
        differing = max(1, self.differed - self._differed_before)
        tau = min(1.0, self._eps * (self.rows - self._since) / differing)
        x = (w - tau) / (1 + tau)
        self._harm = [min(HUGE, (harm + 1) * (1 + bet * x)) for bet, harm in zip(BETS, self._harm, strict=True)]
        self._gain = [min(HUGE, gain * (1 - bet * w)) for bet, gain in zip(BETS, self._gain, strict=True)]
        if not self.alarm and self.evidence >= self._c:
            self.alarm, self.alarmed_at = True, self.evidence
        self.certified |= self.wealth >= 1 / self._alpha

    def _radius(self, sums: _Sums) -> float:
        return radius(sums.spread, self._tail) if self._q < 1 else 0.0

    def _advance(self) -> None:
        """Takes served disagreements into (c) up to the first that waits."""
        while self._kept:
            row, asked = next(iter(self._kept.items()))
            if not asked.settled:
                return
            del self._kept[row]
            for sums, unknown in ((self._low, -1), (self._high, 1)):
                sums.skip(asked.gap)
                sums.add(((unknown if asked.w is None else asked.w) + 1) / 2)
        for sums in (self._low, self._high):
            sums.skip(self._gap)
        self._gap = 0


def radius(spread: float, alpha: float, best_at: float = BEST_AT) -> float:
    """``u(V)``: how far a sum of numbers in [0, 1] is above that of their conditional means, at most.

    With ``V`` as in :class:`Audit`, the sum is never above ``u(V)``, for all lengths at once, with probability
    ``1 - alpha``; likewise never below ``-u(V)``. It is where

        m(s, V) = integral of exp(l s + (log(1 - l) + l) V) over l in [0, 1), 1 - l ~ Gamma(r, r) cut at 1,

    reaches ``1 / alpha``: the gamma-exponential mixture of Howard, Ramdas, McAuliffe and Sekhon (2021, proposition 9),
    with ``r`` such that it is about narrowest at ``V = best_at``. The integral is a series with positive terms,

        m = S(V + r, s + V + r) / S(r, r),   S(a, x) = sum over k of x^k / (a (a + 1) ... (a + k)).

    ``log m`` is convex and grows with ``s``, so that Newton's steps come down on the solution from above.
    """
    narrow = 2 * math.log(1 / min(2 * alpha, 0.99))
    prior = best_at / (narrow + math.log1p(narrow))
    goal = _log_series(prior, prior)[0] + math.log(1 / alpha)
    found = 0.0
    for number in range(50):
        value, slope = _log_series(spread + prior, found + spread + prior)
        step = (goal - value) / slope
        found += step
        if number and step > -1e-9 * found:
            break
    return found


def _log_series(a: float, x: float) -> tuple[float, float]:
    """``log S(a, x)`` of :func:`radius`, and its derivative by ``x``; ``x >= a``."""
    # The largest term is about number x - a; from there on they fall like exp(-k^2 / 2x).
    power = np.arange(math.ceil(x - a + 10 * math.sqrt(x)) + 40)
    terms = power * math.log(x) - np.cumsum(np.log(a + power))
    largest = float(terms.max())
    shares = np.exp(terms - largest)
    total = float(shares.sum())
    return largest + math.log(total), float((power * shares).sum()) / (x * total)


@dataclass(slots=True)
class _Sums:
    """Of ``X`` in (c)."""

    count: int = 0
    total: float = 0.0
    spread: float = 0.0
    """``V``."""

    def add(self, x: float) -> None:
        """The next one."""
        self.spread += (x - (self.total / self.count if self.count else 0.5)) ** 2
        self.total += x
        self.count += 1

    def skip(self, rows: int) -> None:
        """So many of 1/2."""
        off = self.count / 2 - self.total
        if off and rows:
            # With n rows before it, the distance of 1/2 to their mean is off / n.
            self.spread += off**2 * float(np.sum(np.arange(self.count, self.count + rows, dtype=np.float64) ** -2))
        self.total += rows / 2
        self.count += rows

    def dump(self) -> list[float]:
        """JSON values."""
        return [self.count, self.total, self.spread]

    @classmethod
    def restored(cls, saved: list[float], most: int) -> _Sums:
        """Raises ``ValueError``."""
        count, total, spread = saved
        return cls(_count(count, most), _number(total, most), _number(spread, most))


@dataclass(slots=True)
class _Asked:
    """An audit of a served row."""

    gap: int
    """Served disagreements before it that were not asked about, since the last that was."""
    settled: bool = False
    w: int | None = None
    """``None`` where it waits, or stays unanswered."""


def _units(name: str, value: float, most: float = math.inf) -> int:
    if not (0 <= value <= most and math.isfinite(value)):
        raise ValueError(f"{name} must be a number from 0{f' to {most:g}' if math.isfinite(most) else ''}, got {value}")
    return round(value * ONE)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _check(w: Any) -> int | None:
    if w is not None and (isinstance(w, bool) or w not in (-1, 0, 1)):
        raise ValueError(f"w must be -1, 0, 1 or None, got {w!r}")
    return None if w is None else int(w)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"expected a whole number, got {value!r}")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, got {value!r}")
    return value


def _count(value: Any, most: float = math.inf) -> int:
    return int(_number(_whole(value), most))


def _number(value: Any, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise ValueError(f"expected a number from 0 to {most:g}, got {value!r}")
    return value


def _ascending(rows: list[Any]) -> None:
    if any(_whole(one) >= _whole(other) for one, other in pairwise(rows)):
        raise ValueError("rows out of order")


@contextmanager
def _reading(what: str) -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"this is not a saved {what}: {error!r}") from error
