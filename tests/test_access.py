"""Tokens, tenants and rates, with a clock of the test's own; a tokens file that comes, goes and breaks."""

from __future__ import annotations

import hashlib
import logging
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tta_server.access import LOOKS_AGAIN, Access, Grant, Room
from tta_server.errors import ConfigError, Forbidden, QueueFull, Unauthenticated
from tta_server.settings import AuthSettings, Right, TenantSettings

ANN, BOB, EVE = (f"{name}-0123456789abcdef" for name in ("ann", "bob", "eve"))
"""Tokens."""


def digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()


class Clock:
    """Stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """An ``Access`` over a folder with a tokens file."""

    def __init__(self, folder: Path) -> None:
        self.path, self.clock, self._written = folder / "tokens.yaml", Clock(), 0

    def write(self, *tokens: str | dict[str, Any], text: str | None = None, **more: Any) -> None:
        """Writes the file; its time moves on by itself, as the test is faster than the file system's clock."""
        entries = [one if isinstance(one, dict) else {"token": one} for one in tokens]
        self.path.write_text(yaml.safe_dump({"tokens": entries} | more) if text is None else text, encoding="utf-8")
        self._written += 1
        os.utime(self.path, ns=(self._written, self._written))

    def access(self, **settings: Any) -> Access:
        return Access(AuthSettings(**{"file": self.path.name} | settings), self.path.parent, self.clock)

    def later(self, seconds: float = LOOKS_AGAIN) -> None:
        self.clock.now += seconds


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def access_of(clock: Clock | None = None, **settings: Any) -> Access:
    """Without a tokens file."""
    return Access(AuthSettings(**settings), Path("nowhere"), clock or Clock())


def knows(access: Access, token: str) -> bool:
    try:
        access.grant(token)
    except Unauthenticated:
        return False
    return True


# Tokens


def test_without_any_tokens_everybody_may_do_everything() -> None:
    access = access_of()
    assert access.open
    for token in (None, "", ANN):
        grant = access.grant(token)
        assert grant == Grant("default", frozenset(Right))
        for right in Right:
            grant.check(right)


def test_a_token_is_known_by_itself_or_by_its_digest() -> None:
    tokens = [
        {"token": ANN, "tenant": "a", "rights": ["predict"]},
        {"sha256": digest(BOB), "tenant": "b", "rights": ["admin", "metrics"]},
        {"token": EVE},
    ]
    access = access_of(tokens=tokens)
    assert not access.open
    assert access.grant(ANN) == Grant("a", frozenset({Right.PREDICT}))
    assert access.grant(BOB) == Grant("b", frozenset({Right.ADMIN, Right.METRICS}))
    assert access.grant(EVE) == Grant("default", frozenset({Right.PREDICT, Right.STREAMS}))


@pytest.mark.parametrize("token", [None, ""])
def test_a_missing_token_is_asked_for(token: str | None) -> None:
    with pytest.raises(Unauthenticated, match="send the header 'Authorization: Bearer <token>'"):
        access_of(tokens=[{"token": ANN}]).grant(token)


@pytest.mark.parametrize("token", [BOB, ANN[:-1], ANN + "x", ANN.upper(), f" {ANN}", digest(ANN), "ä", "\udcff"])
def test_a_wrong_token_is_refused_and_not_repeated(token: str) -> None:
    with pytest.raises(Unauthenticated) as refused:
        access_of(tokens=[{"token": ANN}]).grant(token)
    assert str(refused.value) == "nobody has this token"


def test_a_right_that_is_missing_is_named() -> None:
    grant = access_of(tokens=[{"token": ANN, "rights": ["streams", "predict"]}]).grant(ANN)
    grant.check(Right.STREAMS)
    with pytest.raises(Forbidden, match=r"does not have the right admin, only predict, streams$"):
        grant.check(Right.ADMIN)


@pytest.mark.parametrize("other", [{"token": ANN}, {"sha256": digest(ANN)}], ids=["token", "digest"])
def test_one_token_is_not_given_twice(bench: Bench, other: dict[str, Any]) -> None:
    """It would be unclear whose it is; the message does not tell which one it is."""
    for own, file in (([{"token": ANN, "tenant": "a"}, other], []), ([{"token": ANN, "tenant": "a"}], [other])):
        bench.write(*file)
        with pytest.raises(ConfigError, match="have the same token") as refused:
            bench.access(tokens=own)
        assert ANN not in str(refused.value)


# The tokens file


def test_a_file_adds_to_the_config(bench: Bench) -> None:
    bench.write({"token": BOB, "tenant": "b"}, tenants={"b": {"streams": 3}})
    access = bench.access(tokens=[{"token": ANN, "tenant": "a"}], tenants={"a": {"streams": 2}, "b": {"streams": 9}})
    assert [access.grant(token).tenant for token in (ANN, BOB)] == ["a", "b"]
    assert [access.limits(name).streams for name in "abc"] == [2, 3, None], "the file's word is the last"


def test_a_file_without_tokens_lets_nobody_in(bench: Bench) -> None:
    bench.write()
    access = bench.access()
    assert not access.open
    with pytest.raises(Unauthenticated):
        access.grant(None)
    assert not knows(access, ANN)


def test_a_change_of_the_file_is_seen_at_the_next_look(bench: Bench) -> None:
    bench.write(ANN)
    access = bench.access()
    bench.write(ANN, {"token": BOB, "tenant": "b"}, tenants={"b": {"concurrent": 7}})
    bench.later(0.9 * LOOKS_AGAIN)
    assert not knows(access, BOB), "it is not looked at for every request"
    bench.later(0.2 * LOOKS_AGAIN)
    assert access.grant(BOB).tenant == "b"
    assert access.limits("b") == TenantSettings(concurrent=7)
    bench.write(BOB)
    bench.later(0.9 * LOOKS_AGAIN)
    assert knows(access, ANN), "nor after the first look"
    bench.later(0.2 * LOOKS_AGAIN)
    assert not knows(access, ANN), "one that was taken out"
    assert access.grant(BOB).tenant == "default"
    assert access.limits("b") == TenantSettings()


def test_the_tokens_of_the_config_stay_whatever_the_file_says(bench: Bench) -> None:
    bench.write(BOB)
    access = bench.access(tokens=[{"token": ANN}])
    bench.write(EVE)
    bench.later()
    assert [knows(access, token) for token in (ANN, BOB, EVE)] == [True, False, True]


BROKEN = {
    "not yaml": f"tokens: [{{token: {EVE}",
    "a list": f"- token: {EVE}",
    "empty": "",
    "unknown key": f"tokens: [{{token: {EVE}, tennant: a}}]",
    "both kinds": f"tokens: [{{token: {EVE}, sha256: {digest(EVE)}}}]",
    "too short": f"tokens: [{{token: {EVE[:15]}}}]",
    "no digest": f"tokens: [{{sha256: {EVE}}}]",
    "unknown right": f"tokens: [{{token: {EVE}, rights: [{EVE}]}}]",
    "no rights": f"tokens: [{{token: {EVE}, rights: []}}]",
    "not a list": f"tokens: {EVE}",
    "twice": f"tokens: [{{token: {EVE}}}, {{token: {EVE}}}]",
    "one of the config's": f"tokens: [{{token: {EVE}}}, {{token: {ANN}}}]",
    "bad limit": f"tokens: [{{token: {EVE}}}]\ntenants: {{a: {{streams: 0}}}}",
    "bad tenant": f"tokens: [{{token: {EVE}, tenant: 'a b'}}]",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_file_is_told_once_and_changes_nothing(
    bench: Bench, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    bench.write({"token": BOB, "tenant": "b"}, tenants={"b": {"streams": 3}})
    access = bench.access(tokens=[{"token": ANN}])
    bench.write(text=BROKEN[what])
    for _ in range(3):
        bench.later()
        assert [knows(access, token) for token in (ANN, BOB, EVE)] == [True, True, False]
    assert (access.grant(BOB).tenant, access.limits("b").streams) == ("b", 3)
    (record,) = caplog.records
    assert record.levelno == logging.ERROR
    assert "the tokens file was changed but cannot be used" in record.getMessage()
    assert EVE[:15] not in caplog.text
    bench.write(EVE)
    bench.later()
    assert [knows(access, token) for token in (ANN, BOB, EVE)] == [True, False, True]


def test_a_file_that_vanished_is_told_and_changes_nothing(bench: Bench, caplog: pytest.LogCaptureFixture) -> None:
    bench.write(BOB)
    access = bench.access()
    aside = bench.path.rename(bench.path.with_name("aside.yaml"))
    for _ in range(2):
        bench.later()
        assert knows(access, BOB)
    (record,) = caplog.records
    assert "cannot be used" in record.getMessage()
    aside.rename(bench.path)
    with caplog.at_level(logging.INFO):
        bench.later()
        assert knows(access, BOB)
    assert caplog.messages[-1] == "tokens read again", "it is back, just as it was"
    bench.path.unlink()
    bench.later()
    bench.write(EVE)
    bench.later()
    assert [knows(access, token) for token in (BOB, EVE)] == [False, True]


def test_a_file_that_was_replaced_as_a_whole_is_seen(bench: Bench) -> None:
    """Of the same size and time: as mounted secrets are, by renaming."""
    bench.write(BOB)
    access = bench.access()
    new = Bench(bench.path.parent)
    new.path = bench.path.with_name("new.yaml")
    new.write(EVE)
    os.replace(new.path, bench.path)
    bench.later()
    assert [knows(access, token) for token in (BOB, EVE)] == [False, True]


@pytest.mark.parametrize("what", [None, *BROKEN])
def test_a_server_does_not_start_with_a_file_it_cannot_use(bench: Bench, what: str | None) -> None:
    if what is not None:
        bench.write(text=BROKEN[what])
    with pytest.raises(ConfigError) as refused:
        bench.access(tokens=[{"token": ANN}])
    assert EVE[:15] not in str(refused.value)
    assert ANN not in str(refused.value)


# Rates


def test_calls_beyond_the_rate_are_told_when_to_come_back() -> None:
    """A bucket of one second's worth, full at the start, that fills at the rate."""
    clock = Clock()
    access = access_of(clock, tenants={"a": {"requests_per_second": 4}})

    def calls(most: int) -> int:
        """How many of so many calls get in, all at the same moment."""
        entered = 0
        for _ in range(most):
            with suppress(QueueFull), access.call("a"):
                entered += 1
        return entered

    assert calls(9) == 4
    clock.now += 0.5
    assert calls(9) == 2
    clock.now += 0.2
    assert calls(9) == 0
    clock.now += 0.05
    assert calls(9) == 1, "refused calls cost nothing"
    clock.now += 3600.0
    assert calls(9) == 4, "what was not used is not saved up"
    said = r"too many calls; the limit is auth\.tenants\.a\.requests_per_second = 4"
    with pytest.raises(QueueFull, match=said) as refused, access.call("a"):
        pass
    assert refused.value.retry_after == 1


def test_slow_rates() -> None:
    clock = Clock()
    access = access_of(clock, tenants={"a": {"requests_per_second": 0.1}})
    with access.call("a"):
        pass
    clock.now += 2.5
    with pytest.raises(QueueFull, match=r"requests_per_second = 0\.1") as refused, access.call("a"):
        pass
    assert refused.value.retry_after == 8
    clock.now += 7.5
    with access.call("a"):
        pass


@example(rate=0.333333, gaps=[0.0, 0.0])
@settings(derandomize=True, deadline=None)
@given(
    rate=st.floats(0.05, 20.0),
    gaps=st.lists(st.floats(0.0, 5.0) | st.sampled_from([0.0, 0.01]), min_size=1, max_size=60),
)
def test_no_stretch_of_time_sees_more_calls_than_its_rate(rate: float, gaps: list[float]) -> None:
    """At most ``rate * seconds`` and one bucket more; and who waits as long as it was told gets in."""
    clock, entered = Clock(), list[float]()
    access = access_of(clock, tenants={"a": {"requests_per_second": rate}})
    for gap in gaps:
        clock.now += gap
        try:
            with access.call("a"):
                entered.append(clock.now)
        except QueueFull as refused:
            clock.now += refused.retry_after
            with access.call("a"):
                entered.append(clock.now)
    for first in range(len(entered)):
        for last in range(first, len(entered)):
            seconds = entered[last] - entered[first]
            assert last - first + 1 <= rate * seconds + max(rate, 1.0) + 1e-6


def test_tenants_have_rates_of_their_own_and_those_without_have_none(bench: Bench) -> None:
    access = access_of(tenants={"a": {"requests_per_second": 1}, "b": {"requests_per_second": 1}})
    for tenant in ("a", "b", "c", "c", "c"):
        with access.call(tenant):
            pass
    for tenant in "ab":
        with pytest.raises(QueueFull, match=f"tenants.{tenant}.requests"), access.call(tenant):
            pass


def test_a_rate_can_change_while_the_server_runs(bench: Bench) -> None:
    bench.write(ANN, tenants={"default": {"requests_per_second": 1}})
    access = bench.access()
    with access.call("default"):
        pass
    bench.write(ANN)
    bench.later()
    access.grant(ANN)
    for _ in range(50):
        with access.call("default"):
            pass
    bench.write(ANN, tenants={"default": {"requests_per_second": 2}})
    bench.later()
    access.grant(ANN)
    for _ in range(2):
        with access.call("default"):
            pass
    with pytest.raises(QueueFull), access.call("default"):
        pass


# Calls at the same time


def test_calls_at_the_same_time_are_bounded() -> None:
    access = access_of(tenants={"a": {"concurrent": 2}})
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(access.call("a"))
        second.enter_context(access.call("a"))
        said = r"2 calls at the same time; the limit is auth\.tenants\.a\.concurrent = 2"
        for _ in range(3):
            with pytest.raises(QueueFull, match=said), access.call("a"):
                pass
        with access.call("b"):
            pass
        first.close()
        with access.call("a"), pytest.raises(QueueFull), access.call("a"):
            pass


def test_a_call_that_fails_ends_like_any_other() -> None:
    access = access_of(tenants={"a": {"concurrent": 1}})
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), access.call("a"):
            raise ZeroDivisionError


def test_what_is_refused_for_one_limit_costs_nothing_of_the_other() -> None:
    clock = Clock()
    access = access_of(clock, tenants={"a": {"concurrent": 1, "requests_per_second": 2}})
    with access.call("a"):
        for _ in range(5):
            with pytest.raises(QueueFull, match="at the same time"), access.call("a"):
                pass
    with access.call("a"):
        pass
    for _ in range(5):
        with pytest.raises(QueueFull, match="too many calls"), access.call("a"):
            pass
    clock.now += 1.0
    with access.call("a"):
        pass


def test_room_is_shared_and_given_back() -> None:
    room = Room(100)
    with room.hold() as one, room.hold() as other:
        one(60)
        other(40)
        with pytest.raises(QueueFull, match=r"take 100 bytes.*limits\.bodies_bytes = 100"):
            other(1)
    with room.hold() as one:
        one(100)
    with suppress(ZeroDivisionError), room.hold() as one:
        one(100)
        raise ZeroDivisionError
    with room.hold() as one:
        one(100)
