"""The guard of one stream: whether its adapted answers are served, and whether it may learn. A state machine.

::

             adapt on            evidence of shadow_rows          canary_rows without a veto
      OFF ------------> SHADOW ------------------------> CANARY ------------------------> ACTIVE
       ^                ^ ^ ^                             | | ^                              |
       | adapt off      | | |   vetoed for canary_rows    | | |         harmful              |
     (any state)        | | +-----------------------------+ | +------------------------------+
                        | |                                 |
            cool-down   | |  collapse, periodic, rejected,  |   alarm: back to the last good state
            is over     | |  second alarm: back to source   v
               +--------+ +--- RESET <---- (any) ----> ROLLBACK ----> FROZEN ---- cool-down is over ---> CANARY
               |                                            third alarm
               +------------------ (any) ----------------------------------> QUARANTINE ---- operator ---> SHADOW

============  ============================  =====================================================================
state         served                        learns
============  ============================  =====================================================================
off           source                        no
shadow        source                        where the estimate says that adaptation helps
canary        adapted, request by request   the same
              where the estimate says so
active        adapted                       the same; its evidence comes of a share of the rows, after the answer
frozen        adapted                       no
quarantine    source                        no
============  ============================  =====================================================================

The *evidence* is the estimated benefit of :mod:`benefit`, and where labels came, their 95 % interval of it, which
counts for more as soon as 0 is not in it. It is a field of its own beside the state: ``unknown`` before anything was
compared, and never taken for good. Beside it stands the stream's guarantee (:mod:`guarantees`), which may
forbid a row whatever the state. Every automatic move is one toward the source, or back up after fresh evidence and,
where it had to be taken down, a cool-down that doubles from one time to the next. What an operator set stays until the
operator lets go of it. Each move is a :class:`Move`, with its rule, statistic and threshold.

Pure code: rows are its time, but for the budget of updates a minute, whose clock is injected.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, NamedTuple

from tta_server.settings import GuardSettings
from tta_server.trust.guarantees import Audit, Budget, Guarantee, Ledger

LABELS_LAST = 1000
"""Rows that a stream goes by its labels after the newest that was labelled."""
MOST_COOLDOWN = 2**6
"""A cool-down doubles up to so many times its first length."""


class State(StrEnum):
    """What a stream is served, see the module."""

    OFF = "off"
    SHADOW = "shadow"
    CANARY = "canary"
    ACTIVE = "active"
    FROZEN = "frozen"
    QUARANTINE = "quarantine"


class Action(StrEnum):
    """What a move does to the stream's adaptation state."""

    NONE = "none"
    ROLLBACK = "rollback"
    """Back to the last good state; to the source where there is none any more."""
    RESET = "reset"
    """Back to the source."""


class Evidence(StrEnum):
    """What is known of the adapted model, in a word."""

    UNKNOWN = "unknown"
    HELPS = "helps"
    UNCLEAR = "unclear"
    HARMS = "harms"


class Move(NamedTuple):
    """A change of state, and why: ``statistic`` against ``threshold`` under ``rule``; NaN where there is none."""

    before: State
    after: State
    action: Action
    rule: str
    statistic: float = math.nan
    threshold: float = math.nan


class Labels(NamedTuple):
    """What labels say of the benefit: it lies between ``low`` and ``high``, by answers given when the guard had seen so
    many ``resets`` and ``rows``."""

    low: float
    high: float
    resets: int
    rows: int


class Look(NamedTuple):
    """What a request showed: its ``rows``, how many were compared with the source, and of the stream's newest rows the
    estimated ``benefit`` (NaN: unknown) and the ``collapse``: ``ln`` of how many times fewer classes the adapted model
    names than the source."""

    rows: int
    compared: int
    benefit: float = math.nan
    collapse: float = math.nan


@dataclass(frozen=True)
class Step:
    """What became of a request's step."""

    rows: int
    kept: bool
    rejected: bool = False
    """Not kept for what it would have made of the weights: not finite, or outside the trust region."""


class Guard:
    """One stream's guard. Used by one thread at a time; reads from elsewhere see whole values."""

    def __init__(self, settings: GuardSettings, coin: Callable[[], float], clock: Callable[[], float]) -> None:
        """``coin``: see :class:`guarantees.Audit`; ``clock`` in seconds."""
        self.settings, self._coin, self._clock = settings, coin, clock
        self.wanted = settings
        """What they will be, once the device thread has come to it."""
        self.guarantee = _guarantee(settings, coin)
        self.count = object()
        """Another object as soon as the guarantee counts its rows from 0 again."""
        self.state = State.SHADOW
        """While the stream adapts; otherwise it is off, and this is what it comes back to, see :meth:`toggle`."""
        self.pinned = False
        """Whether an operator chose the state, which then stays."""
        self.benefit = math.nan
        """As last estimated."""
        self.labels: Labels | None = None
        """What they said last. Written by the event loop, whole."""
        self.resets = 0
        self.rows = 0
        """Seen, ever."""
        self.since: Move | None = None
        """How it came into this state."""
        self._compared = 0
        self._clean = 0
        self._vetoed = 0
        self._rejected = 0
        self._learned = 0
        self._steps = 0
        self._cooldown = settings.cooldown_rows
        self._wait = 0
        self._alarms = 0
        self._calm = 0
        self._updates: deque[float] = deque()

    @property
    def measured(self) -> tuple[float, float] | None:
        """Where labels say that the benefit lies; they count for more than the estimate, while they are of this model
        and not of too long ago."""
        told = self.labels
        if told is None or told.resets != self.resets or self.rows - told.rows > LABELS_LAST:
            return None
        return told.low, told.high

    # Asked by the engine, request by request

    @property
    def compares(self) -> bool:
        """Whether the source must be asked for all rows of a request before it is answered."""
        return self.state not in (State.ACTIVE, State.FROZEN) or self.guarantee is not None

    @property
    def serves(self) -> bool:
        """Whether a request may be served as adapted, after :meth:`consider`."""
        if self.state is State.CANARY:
            return self.pinned or self._is_good
        return self.state in (State.ACTIVE, State.FROZEN)

    @property
    def learns(self) -> bool:
        """Whether a request's step may be kept."""
        if self.state not in (State.SHADOW, State.CANARY, State.ACTIVE):
            return False
        return (self.pinned or self._is_good) and not self._is_over_rate

    @property
    def evidence(self) -> Evidence:
        """What estimate and labels say."""
        low, high = self.measured or (-1.0, 1.0)
        if low > 0 or high < 0:
            return Evidence.HELPS if low > 0 else Evidence.HARMS
        if math.isnan(self.benefit):
            return Evidence.UNKNOWN
        if self.benefit >= self.settings.least_benefit:
            return Evidence.HELPS
        return Evidence.HARMS if self.benefit < -self.settings.least_benefit else Evidence.UNCLEAR

    def consider(self, look: Look) -> list[Move]:
        """Takes in what a request showed; returns the moves that follow. Where the source was asked before the answer,
        :attr:`serves` and :attr:`learns` are about this very request afterwards."""
        self.rows += look.rows
        self._wait = max(0, self._wait - look.rows)
        self._calm += look.rows
        if self._calm >= self._cooldown:
            self._alarms = 0
        if look.compared:
            self.benefit = look.benefit
        moves: list[Move] = []
        if self.pinned or self.state is State.QUARANTINE:
            return moves
        if isinstance(self.guarantee, Audit) and self.guarantee.alarm:
            moves.append(self._alarm(self.guarantee))
        elif look.compared and look.collapse > self.settings.collapse and self.state is not State.SHADOW:
            moves.append(self._fall(State.SHADOW, "collapse", look.collapse, self.settings.collapse, Action.RESET))
        elif self.settings.reset_rows and self._learned >= self.settings.reset_rows and not self._is_certified:
            reached = float(self._learned)
            moves.append(self._move(State.SHADOW, "periodic", reached, float(self.settings.reset_rows), Action.RESET))
        if self.state is State.FROZEN and not self._wait:
            moves.append(self._move(State.CANARY, "cool-down over"))
        if look.compared and all(move.action is Action.NONE for move in moves):
            self._weigh(look, moves)
        elif self.state is State.ACTIVE and self._is_harmful:
            moves.append(self._fall(State.CANARY, *self._reason))
        return moves

    def _weigh(self, look: Look, moves: list[Move]) -> None:
        good, why = self._is_good, self._reason
        self._compared += look.compared
        self._clean = self._clean + look.rows if good else 0
        self._vetoed = 0 if good else self._vetoed + look.rows
        if self.state is State.ACTIVE and not good:
            moves.append(self._fall(State.CANARY, *why))
        elif self.state is State.CANARY and self._vetoed >= self.settings.canary_rows:
            moves.append(self._fall(State.SHADOW, *why))
        elif self.state is State.SHADOW and good and not self._wait and self._compared >= self.settings.shadow_rows:
            moves.append(self._move(State.CANARY, *why))
        if self.state is State.CANARY and good and self._clean >= self.settings.canary_rows and self._may_go_active:
            moves.append(self._move(State.ACTIVE, *why))
            if self._alarms == 0:
                self._cooldown = self.settings.cooldown_rows

    def took(self, step: Step) -> list[Move]:
        """A request's step is over."""
        if step.kept:
            self._learned += step.rows
            self._steps += 1
            self._rejected = 0
            if self.settings.updates_per_minute is not None:
                self._updates.append(self._clock())
        self._rejected += step.rejected
        most = self.settings.rejected_steps
        if self._rejected >= most and not self.pinned and self.state is not State.QUARANTINE:
            count, self._rejected = float(self._rejected), 0
            return [self._fall(State.SHADOW, "rejected steps", count, float(most), Action.RESET)]
        return []

    def is_good_to_keep(self, steps: int) -> bool:
        """Whether the stream's state is one to come back to when an audit raises the alarm: every so many steps of an
        active stream."""
        if self.state is not State.ACTIVE or not isinstance(self.guarantee, Audit) or self._steps < steps:
            return False
        self._steps = 0
        return True

    def was_reset(self) -> None:
        """The stream's state is another one now, whoever made it so: what was known of the adapted model is of no use,
        and it is not served before something is."""
        self._forget()
        if not self.pinned and self.state in (State.CANARY, State.ACTIVE, State.FROZEN):
            self._move(State.SHADOW, "reset")

    def _forget(self) -> None:
        self.benefit, self.labels = math.nan, None
        self.resets += 1
        self._compared = self._clean = self._vetoed = self._rejected = self._learned = self._steps = 0
        self._updates.clear()
        if isinstance(self.guarantee, Audit):
            self.guarantee.restart()

    # Asked by an operator

    def toggle(self) -> list[Move]:
        """Adaptation, or the guard, was turned on or off: what was known of the stream is old then."""
        self.benefit, self.labels = math.nan, None
        if self.pinned or self.state not in (State.CANARY, State.ACTIVE):
            return []
        return [self._move(State.SHADOW, "toggled")]

    def put(self, state: State) -> list[Move]:
        """An operator's choice: it stays until :meth:`release`."""
        moves = [self._move(state, "operator")] if state is not self.state else []
        self.pinned = True
        return moves

    def release(self) -> list[Move]:
        """The guard decides again, and serves nothing adapted without evidence; out of quarantine by way of the
        shadow."""
        self.pinned, self._alarms, self._wait = False, 0, 0
        self._cooldown = self.settings.cooldown_rows
        if self.state in (State.ACTIVE, State.FROZEN) and not self._is_good:
            return [self._move(State.CANARY, "operator")]
        return [self._move(State.SHADOW, "operator")] if self.state is State.QUARANTINE else []

    def change(self, settings: GuardSettings) -> list[Move]:
        """Other settings from now on. A guarantee of another kind starts afresh."""
        moves = self.toggle() if settings.enabled and not self.settings.enabled else []
        if settings.guarantee != self.settings.guarantee:
            self.guarantee = self._other(settings)
        if settings.cooldown_rows != self.settings.cooldown_rows:
            self._cooldown = settings.cooldown_rows
        self.settings = self.wanted = settings
        return moves

    def _other(self, settings: GuardSettings) -> Guarantee | None:
        """A guarantee by other settings; what was counted and spent goes on where it is of the same kind."""
        made, now, then = _guarantee(settings, self._coin), self.settings.guarantee, settings.guarantee
        if made is None or self.guarantee is None or now.kind != then.kind or (now.kind == "audit" and now.q != then.q):
            self.count = object()
            return made
        made.restore(self.guarantee.dump())
        return made

    # To keep

    def dump(self) -> dict[str, Any]:
        """JSON values. The evidence is not in it: after a start it is unknown."""
        return {
            "state": self.state.value,
            "pinned": self.pinned,
            "rows": self.rows,
            "learned": self._learned,
            "cooldown": self._cooldown,
            "wait": self._wait,
            "alarms": self._alarms,
            "calm": self._calm,
            "guarantee": None if self.guarantee is None else self.guarantee.dump(),
        }

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Goes on where :meth:`dump` left off; one that was served adapted in the shadow, for want of evidence, without
        answers to open audits, as predictions are not kept. Raises ``ValueError``, ``KeyError`` or ``BadInput`` where
        that is no such state."""
        state, guarantee = State(saved["state"]), saved["guarantee"]
        counts = [int(saved[name]) for name in ("rows", "learned", "cooldown", "wait", "alarms", "calm")]
        if self.guarantee is not None and guarantee is not None:
            self.guarantee.restore(guarantee)
        self.pinned = bool(saved["pinned"])
        served = state in (State.CANARY, State.ACTIVE, State.FROZEN) and not self.pinned
        self.state = State.SHADOW if served else state
        if isinstance(self.guarantee, Audit):
            self.guarantee.give_up()
        self.rows, self._learned, self._cooldown, self._wait, self._alarms, self._calm = counts

    # In between

    @property
    def _is_good(self) -> bool:
        low, high = self.measured or (-1.0, 1.0)
        # An estimate that is NaN, for unknown, is none at or above anything.
        return low > 0 or (high >= 0 and self.benefit >= self.settings.least_benefit)

    @property
    def _is_harmful(self) -> bool:
        return self.measured is not None and self.measured[1] < 0

    @property
    def _reason(self) -> tuple[str, float, float]:
        """Rule, statistic and threshold of :attr:`_is_good`."""
        low, high = self.measured or (-1.0, 1.0)
        if low > 0 or high < 0:
            return "labels", low if low > 0 else high, 0.0
        return "benefit", self.benefit, self.settings.least_benefit

    @property
    def _is_certified(self) -> bool:
        return isinstance(self.guarantee, Audit) and self.guarantee.certified

    @property
    def _may_go_active(self) -> bool:
        return not isinstance(self.guarantee, Audit) or self.guarantee.certified

    @property
    def _is_over_rate(self) -> bool:
        most = self.settings.updates_per_minute
        if most is None:
            return False
        now = self._clock()
        while self._updates and self._updates[0] <= now - 60:
            self._updates.popleft()
        return len(self._updates) >= most

    def _alarm(self, audit: Audit) -> Move:
        """Proof of harm: each time within a cool-down weighs more."""
        self._alarms, self._calm = self._alarms + 1, 0
        statistic, threshold = audit.alarmed_at, self.settings.guarantee.c
        audit.restart()
        if self._alarms == 1:
            served = self.state in (State.CANARY, State.ACTIVE, State.FROZEN)
            return self._fall(State.FROZEN if served else State.SHADOW, "audit", statistic, threshold, Action.ROLLBACK)
        if self._alarms == 2:
            return self._fall(State.SHADOW, "audit", statistic, threshold, Action.RESET)
        return self._fall(State.QUARANTINE, "audit", statistic, threshold, Action.RESET)

    def _fall(self, state: State, rule: str, statistic: float, threshold: float, action: Action = Action.NONE) -> Move:
        """A move toward the source; it takes longer each time until it is undone."""
        self._wait = self._cooldown if state in (State.SHADOW, State.FROZEN) else 0
        if self._wait:
            self._cooldown = min(2 * self._cooldown, MOST_COOLDOWN * self.settings.cooldown_rows)
        return self._move(state, rule, statistic, threshold, action)

    def _move(
        self,
        state: State,
        rule: str,
        statistic: float = math.nan,
        threshold: float = math.nan,
        action: Action = Action.NONE,
    ) -> Move:
        self.since = Move(self.state, state, action, rule, statistic, threshold)
        self.state = state
        self._compared = self._clean = self._vetoed = 0
        if action is not Action.NONE:
            self._forget()
        return self.since


def _guarantee(settings: GuardSettings, coin: Callable[[], float]) -> Guarantee | None:
    wanted = settings.guarantee
    if wanted.kind == "budget":
        return Budget(wanted.eps, wanted.b0)
    if wanted.kind == "ledger":
        return Ledger(wanted.eps, wanted.b0, wanted.c0)
    if wanted.kind == "audit":
        return Audit(wanted.q, wanted.eps, coin, wanted.c, wanted.alpha)
    return None
