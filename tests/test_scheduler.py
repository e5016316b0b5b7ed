"""Who goes next: examples for every rule, and a stateful comparison with a scheduler made of one plain list."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapters import Policy
from tta_server.errors import QueueFull
from tta_server.policies import make_policy
from tta_server.scheduler import Bounds, Scheduler
from tta_server.settings import Consistency
from tta_server.types import Answer, Job, Lane, Plan, Stream, head_start

TENT, SOURCE = make_policy("tent", {}), make_policy("source", {})
LANES = (Lane("digits", TENT), Lane("digits", SOURCE))


def nobody(answer: Answer | None, error: Exception | None) -> None:
    raise AssertionError("the scheduler answers no one")


def nothing() -> None:
    raise AssertionError("the scheduler runs nothing")


def make_stream(name: str, policy: Policy = TENT, stale: int = 0) -> Stream:
    """Answered from states up to ``stale`` steps behind."""
    consistency = Consistency(mode="stale", steps=stale) if stale else Consistency()
    return Stream(name, "digits", policy, random_key=0, created=0.0, consistency=consistency)


def request(
    stream: Stream,
    rows: int = 1,
    lane: Lane = LANES[0],
    deadline: float = float("inf"),
    arrived: float = 0.0,
    priority: int = 0,
) -> Job:
    x, start = torch.empty(rows, 1), head_start(priority)
    return Job(stream, nobody, lane, x, deadline=deadline, arrived=arrived, head_start=start)


def command(stream: Stream, arrived: float = 0.0) -> Job:
    return Job(stream, nobody, command=nothing, arrived=arrived)


def submit(scheduler: Scheduler, *jobs: Job) -> None:
    for job in jobs:
        scheduler.submit(job)


def taken(scheduler: Scheduler, now: float = 0.0) -> Plan:
    """The next plan, which there has to be."""
    plan = scheduler.next_batch(now)
    assert plan is not None
    return plan


def jobs_of(plan: Plan | None) -> list[Job]:
    assert plan is not None
    return plan.jobs


def one_by_one(scheduler: Scheduler, now: float = 0.0) -> list[list[Job]]:
    """The jobs of all plans from now on, each over before the next."""
    ran = []
    while (plan := scheduler.next_batch(now)) is not None:
        ran.append(plan.jobs)
        scheduler.complete(plan)
    return ran


A, B, C, D = (make_stream(name) for name in "abcd")


def test_nothing_to_do() -> None:
    """An empty scheduler has no plan, no expired jobs, and is idle."""
    scheduler = Scheduler(Bounds())
    assert scheduler.next_batch(0.0) is None
    assert scheduler.expired() == []
    assert scheduler.clear() == []
    assert scheduler.idle
    assert len(scheduler) == 0


def test_streams_with_networks_of_their_own_run_one_by_one() -> None:
    """Merging would not save them anything, and hold all their networks in memory at once."""
    lane, scheduler = Lane("digits", make_policy("cotta", {})), Scheduler(Bounds())
    first, second = request(A, lane=lane), request(B, lane=lane)
    submit(scheduler, first, second)
    assert one_by_one(scheduler) == [[first], [second]]
    affine, scheduler = Lane("digits", make_policy("cotta", {"scope": "norm"})), Scheduler(Bounds())
    submit(scheduler, request(A, lane=affine), request(B, lane=affine))
    assert len(jobs_of(scheduler.next_batch(0.0))) == 2


def test_merges_one_job_of_each_ready_stream() -> None:
    """In the order they came; the second job of a stream waits until the first one's plan is complete."""
    scheduler = Scheduler(Bounds())
    first, other, second = request(A), request(B), request(A)
    submit(scheduler, first, other, second)
    assert len(scheduler) == 3
    plan = scheduler.next_batch(0.0)
    assert jobs_of(plan) == [first, other]
    assert plan is not None
    assert plan.lane == LANES[0]
    assert len(scheduler) == 1
    assert scheduler.next_batch(0.0) is None
    assert not scheduler.idle
    scheduler.complete(plan)
    assert jobs_of(scheduler.next_batch(0.0)) == [second]


def test_job_submitted_while_its_stream_is_busy_waits() -> None:
    """A stream is in one running plan at most, whatever lane its next job is for."""
    scheduler = Scheduler(Bounds())
    submit(scheduler, request(A))
    plan = scheduler.next_batch(0.0)
    later = request(A, lane=LANES[1])
    submit(scheduler, later)
    assert scheduler.next_batch(0.0) is None
    assert plan is not None
    scheduler.complete(plan)
    assert jobs_of(scheduler.next_batch(0.0)) == [later]


def test_several_plans_run_at_once() -> None:
    """Of different streams; each completes by itself."""
    scheduler = Scheduler(Bounds())
    submit(scheduler, request(A))
    first = taken(scheduler)
    submit(scheduler, request(B))
    second = taken(scheduler)
    assert [job.stream for plan in (first, second) for job in plan.jobs] == [A, B]
    scheduler.complete(second)
    assert not scheduler.idle
    scheduler.complete(first)
    assert scheduler.idle


def test_max_rows_bounds_a_plan() -> None:
    """Jobs are merged while they fit, in order: no later, smaller one overtakes."""
    scheduler = Scheduler(Bounds(max_rows=8))
    jobs = [request(A, 3), request(B, 6), request(C, 1)]
    submit(scheduler, *jobs)
    assert one_by_one(scheduler) == [jobs[:1], jobs[1:]]


def test_max_rows_may_be_met_exactly() -> None:
    """Eight rows fit into eight."""
    scheduler = Scheduler(Bounds(max_rows=8))
    jobs = [request(A, 5), request(B, 3)]
    submit(scheduler, *jobs)
    assert jobs_of(scheduler.next_batch(0.0)) == jobs


def test_one_job_may_exceed_max_rows() -> None:
    """It runs, alone."""
    scheduler = Scheduler(Bounds(max_rows=4))
    jobs = [request(A, 9), request(B, 1)]
    submit(scheduler, *jobs)
    assert one_by_one(scheduler) == [jobs[:1], jobs[1:]]


def test_max_streams_bounds_a_plan() -> None:
    """A plan holds no more streams than a lane has slots."""
    scheduler = Scheduler(Bounds(max_streams=2))
    submit(scheduler, *(request(stream) for stream in (A, B, C)))
    assert [len(jobs) for jobs in one_by_one(scheduler)] == [2, 1]


def test_a_plan_is_of_one_lane_and_the_oldest_goes_first() -> None:
    """The lane whose oldest ready job came first is next; jobs of another lane wait for their own plan."""
    scheduler = Scheduler(Bounds())
    jobs = [request(A, lane=LANES[1]), request(B, lane=LANES[0]), request(C, lane=LANES[1])]
    submit(scheduler, *jobs)
    plans = [scheduler.next_batch(0.0), scheduler.next_batch(0.0)]
    assert [jobs_of(plan) for plan in plans] == [[jobs[0], jobs[2]], [jobs[1]]]
    assert [plan and plan.lane for plan in plans] == [LANES[1], LANES[0]]


def test_a_busy_lane_starves_no_other() -> None:
    """New jobs of one lane do not go before an older one of another."""
    scheduler = Scheduler(Bounds(max_streams=1))
    patient = request(C, lane=LANES[1])
    submit(scheduler, request(A), request(B), patient)
    served: list[Job] = []
    for _ in range(3):
        plan = scheduler.next_batch(0.0)
        assert plan is not None
        served += plan.jobs
        scheduler.complete(plan)
        submit(scheduler, *(request(job.stream) for job in plan.jobs))
    assert patient in served


def test_a_command_takes_its_turn_alone() -> None:
    """It runs after the requests before it and before those behind it, and shares no plan."""
    scheduler = Scheduler(Bounds())
    jobs = [request(A), command(A), request(A), command(B)]
    submit(scheduler, *jobs)
    ran: list[Sequence[Job]] = []
    while (plan := scheduler.next_batch(0.0)) is not None:
        assert (plan.lane is None) == (plan.jobs[0].command is not None)
        ran.append(plan.jobs)
        scheduler.complete(plan)
    assert sorted(ran, key=lambda one: one[0].number) == [[job] for job in jobs]
    assert [one[0] for one in ran if one[0].stream is A] == jobs[:3]


def test_late_jobs_expire() -> None:
    """A job whose deadline passed does not run and is handed out once; its stream's next one takes its place."""
    scheduler = Scheduler(Bounds())
    late, on_time, behind = request(A, deadline=5.0), request(B, deadline=6.0), request(A)
    submit(scheduler, late, on_time, behind)
    assert jobs_of(scheduler.next_batch(6.0)) == [on_time, behind]
    assert scheduler.expired() == [late]
    assert scheduler.expired() == []
    assert len(scheduler) == 0


def test_a_deadline_is_the_last_moment_to_start() -> None:
    """At the deadline itself a job still runs."""
    scheduler = Scheduler(Bounds())
    job = request(A, deadline=5.0)
    submit(scheduler, job)
    assert jobs_of(scheduler.next_batch(5.0)) == [job]
    assert scheduler.expired() == []


def test_all_late_leaves_no_plan() -> None:
    """Neither an empty plan nor a busy stream is left by jobs that all expired."""
    scheduler = Scheduler(Bounds())
    jobs = [request(A, deadline=1.0), request(B, deadline=1.0, lane=LANES[1]), request(A, deadline=1.0)]
    submit(scheduler, *jobs)
    assert scheduler.next_batch(2.0) is None
    assert sorted(scheduler.expired(), key=lambda job: job.number) == jobs
    assert scheduler.idle


def test_cancel_takes_a_waiting_job_back() -> None:
    """Once; the stream's others keep their order, also when the cancelled one was first in line."""
    scheduler = Scheduler(Bounds())
    jobs = [request(A), request(A, lane=LANES[1]), request(A)]
    submit(scheduler, *jobs)
    assert scheduler.cancel(jobs[0])
    assert not scheduler.cancel(jobs[0])
    assert scheduler.cancel(jobs[2])
    assert len(scheduler) == 1
    plan = scheduler.next_batch(0.0)
    assert jobs_of(plan) == [jobs[1]]
    assert not scheduler.cancel(jobs[1]), "it runs"
    assert plan is not None
    scheduler.complete(plan)
    assert not scheduler.cancel(jobs[1]), "it is done"
    assert scheduler.idle


def test_cancel_while_the_stream_is_busy() -> None:
    """The job behind a running one can go, and the stream becomes ready as usual afterwards."""
    scheduler = Scheduler(Bounds())
    running, waiting = request(A), request(A)
    submit(scheduler, running)
    plan = scheduler.next_batch(0.0)
    submit(scheduler, waiting)
    assert scheduler.cancel(waiting)
    assert plan is not None
    scheduler.complete(plan)
    assert scheduler.idle
    submit(scheduler, request(A))
    assert scheduler.next_batch(0.0) is not None


def test_bounds_are_kept_and_named() -> None:
    """``QueueFull`` says how many wait and which setting says so; nothing was queued; commands always fit."""
    scheduler = Scheduler(Bounds(per_stream=2, in_all=3))
    submit(scheduler, request(A), request(A))
    with pytest.raises(QueueFull, match=r"2 requests of stream 'a'.*limits\.queue_per_stream = 2"):
        scheduler.submit(request(A))
    submit(scheduler, request(B))
    with pytest.raises(QueueFull, match=r"3 requests.*limits\.queue = 3"):
        scheduler.submit(request(C))
    assert len(scheduler) == 3
    submit(scheduler, command(A), command(C))
    assert len(scheduler) == 5


def test_a_refused_first_job_leaves_no_trace() -> None:
    """A stream whose only job was refused can be served later."""
    scheduler = Scheduler(Bounds(in_all=1))
    submit(scheduler, request(A))
    refused = request(B)
    with pytest.raises(QueueFull):
        scheduler.submit(refused)
    assert not scheduler.cancel(refused)
    plan = scheduler.next_batch(0.0)
    assert [job.stream for job in jobs_of(plan)] == [A]
    submit(scheduler, request(B))
    assert [job.stream for job in jobs_of(scheduler.next_batch(0.0))] == [B]


def test_clear_hands_out_what_waits() -> None:
    """Running plans still complete; what was cleared does not run."""
    scheduler = Scheduler(Bounds())
    jobs = [request(A), request(A), request(B, lane=LANES[1])]
    submit(scheduler, *jobs)
    plan = scheduler.next_batch(0.0)
    assert scheduler.clear() == jobs[1:]
    assert scheduler.next_batch(0.0) is None
    assert len(scheduler) == 0
    assert plan is not None
    scheduler.complete(plan)
    assert scheduler.idle


def test_models_of_one_name_but_other_weights_do_not_share_a_step() -> None:
    """Their lanes differ by the digest."""
    scheduler = Scheduler(Bounds())
    old, new = (Lane("digits", TENT, digest) for digest in ("old", "new"))
    jobs = [request(A, lane=old), request(B, lane=new), request(C, lane=old)]
    submit(scheduler, *jobs)
    assert [jobs_of(scheduler.next_batch(0.0)) for _ in range(2)] == [[jobs[0], jobs[2]], [jobs[1]]]


# Priority


def test_a_priority_is_worth_a_second_each() -> None:
    """2 is the default, and what 0 stands for; from 10 on it makes no difference."""
    assert [head_start(priority) for priority in range(13)] == [0, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8, -8, -8]


@pytest.mark.parametrize(("arrived", "first"), [(0.9, "urgent"), (1.1, "patient")])
def test_an_urgent_job_goes_before_those_of_the_last_second(arrived: float, first: str) -> None:
    """Within its lane and among lanes."""
    for lane in LANES:
        scheduler = Scheduler(Bounds(max_rows=1))
        patient, urgent = request(A), request(B, lane=lane, arrived=arrived, priority=1)
        submit(scheduler, patient, urgent)
        order = [patient, urgent] if first == "patient" else [urgent, patient]
        assert one_by_one(scheduler, 2.0) == [[one] for one in order]


def test_a_patient_job_is_served_in_the_end() -> None:
    """A busy lane of urgent jobs does not starve one of the lowest priority, which waits 9 s longer at most."""
    scheduler, now = Scheduler(Bounds(max_streams=1)), 0.0
    patient = request(C, priority=10)
    submit(scheduler, patient, request(A, priority=1))
    while now < 8.5:
        plan = scheduler.next_batch(now)
        assert jobs_of(plan) != [patient]
        assert plan is not None
        scheduler.complete(plan)
        now += 0.5
        submit(scheduler, request(A, arrived=now, priority=1))
    submit(scheduler, request(B, arrived=9.5, priority=1))
    assert [jobs[0].stream for jobs in one_by_one(scheduler, 9.5)] == [A, C, B]


def test_an_urgent_job_does_not_overtake_its_own_stream() -> None:
    """The order of a stream's jobs is what its state depends on."""
    scheduler = Scheduler(Bounds())
    jobs = [request(A, priority=10), request(A, priority=1)]
    other = request(B)
    submit(scheduler, *jobs, other)
    assert jobs_of(scheduler.next_batch(0.0)) == [other, jobs[0]]


# Room


def plan_of(count: int) -> Plan:
    return Plan(LANES[0], [request(make_stream(str(number))) for number in range(count)])


def test_the_pace_is_a_moving_average_over_jobs() -> None:
    """``p <- k^n p + (1 - k^n) t / n``, ``k = 0.966``, from the first plan on: after 20 jobs the past weighs half."""
    scheduler = Scheduler(Bounds())
    submit(scheduler, request(A))
    assert scheduler.expected_wait == 0.0
    scheduler.ran(plan_of(2), 10.0)
    assert scheduler.expected_wait == pytest.approx(5.0)
    scheduler.ran(plan_of(20), 40.0)
    pace = 0.966**20 * 5.0 + (1 - 0.966**20) * 2.0
    assert scheduler.expected_wait == pytest.approx(pace)
    assert pytest.approx(0.5, abs=0.01) == 0.966**20
    submit(scheduler, request(A), request(B))
    assert scheduler.expected_wait == pytest.approx(3 * pace)
    plan = scheduler.next_batch(0.0)
    assert plan is not None
    assert scheduler.expected_wait == pytest.approx(3 * pace), "what runs is waited for, too"
    scheduler.complete(plan)
    assert scheduler.expected_wait == pytest.approx(pace)


def test_twenty_jobs_one_by_one_are_twenty_at_once() -> None:
    """However they were merged, the same jobs in the same time give the same pace."""
    merged, single = Scheduler(Bounds()), Scheduler(Bounds())
    for scheduler in (merged, single):
        scheduler.ran(plan_of(1), 3.0)
        submit(scheduler, request(A))
    merged.ran(plan_of(20), 10.0)
    for _ in range(20):
        single.ran(plan_of(1), 0.5)
    assert merged.expected_wait == pytest.approx(single.expected_wait)


def test_a_job_that_would_wait_in_vain_is_refused() -> None:
    """With what it would take, and when to come back; one that may wait long enough, with room to err, is taken, and
    commands always."""
    scheduler = Scheduler(Bounds())
    scheduler.ran(plan_of(1), 4.0)
    submit(scheduler, request(A, deadline=0.0), request(B), command(B))
    with pytest.raises(
        QueueFull, match=r"3 requests wait and 0 run, which takes about 12\.0 s; this one may wait 7 s"
    ) as refused:
        scheduler.submit(request(C, arrived=50.0, deadline=57.0))
    assert refused.value.retry_after == 7, "4 s a job: by then 5.6 s of them are left, 0.8 of what it may wait"
    scheduler.check_room(15.1)
    with pytest.raises(QueueFull):
        scheduler.check_room(14.9)
    submit(scheduler, command(C), request(C, arrived=50.0, deadline=71.0))


def test_a_full_queue_is_told_with_the_time_until_half_of_it_is_gone() -> None:
    scheduler = Scheduler(Bounds(in_all=2))
    submit(scheduler, request(A), request(B))
    with pytest.raises(QueueFull, match=r"limits\.queue = 2") as refused:
        scheduler.check_room(float("inf"))
    assert refused.value.retry_after == 1, "nothing is known of the pace yet"
    scheduler.ran(plan_of(1), 3.4)
    with pytest.raises(QueueFull) as refused:
        scheduler.submit(request(C))
    assert refused.value.retry_after == 4


def test_an_empty_queue_takes_whoever_comes() -> None:
    """Whatever the pace, and although the time was up on the way here: that is a deadline, not a full queue."""
    scheduler = Scheduler(Bounds())
    scheduler.ran(plan_of(1), 1e6)
    scheduler.check_room(0.0)
    late = request(A, arrived=5.0, deadline=4.9)
    submit(scheduler, late)
    assert scheduler.next_batch(5.0) is None
    assert scheduler.expired() == [late]


@pytest.mark.parametrize(
    ("share", "now", "shed"),
    [(0.5, 14.9, False), (0.5, 15.1, True), (0.1, 3.1, True), (1.0, 30.0, False)],
)
def test_a_plan_is_shed_after_a_share_of_the_time_its_oldest_job_may_wait(share: float, now: float, shed: bool) -> None:
    scheduler = Scheduler(Bounds(shed_share=share))
    submit(scheduler, request(A, deadline=30.0), request(B, arrived=now, deadline=now + 1.0))
    plan = scheduler.next_batch(now)
    assert plan is not None
    assert (len(plan.jobs), plan.shed) == (2, shed)


def test_a_job_in_a_hurry_sheds_nothing_for_others() -> None:
    """Waits of up to half a second are no pressure, whatever a client says it has."""
    scheduler = Scheduler(Bounds())
    submit(scheduler, request(A, deadline=0.6), request(B, deadline=30.0))
    plan = scheduler.next_batch(0.5)
    assert plan is not None
    assert not plan.shed
    scheduler.complete(plan)
    submit(scheduler, request(A, arrived=1.0, deadline=1.6))
    plan = scheduler.next_batch(1.51)
    assert plan is not None
    assert plan.shed
    scheduler.complete(plan)
    submit(scheduler, command(C))
    command_plan = scheduler.next_batch(1e9)
    assert command_plan is not None
    assert (command_plan.lane, command_plan.shed) == (None, False)


# Plans that overtake the end of others


def test_plans_that_run_together_stay_within_max_rows() -> None:
    """What fits beside those that run goes, what does not waits for their end; nothing smaller overtakes it."""
    scheduler = Scheduler(Bounds(max_rows=8))
    submit(scheduler, request(A, 3))
    running = taken(scheduler)
    fits, big, small = request(B, 5), request(C, 4), request(D, 1)
    submit(scheduler, fits)
    beside = taken(scheduler)
    assert beside.jobs == [fits], "eight rows fit into eight"
    submit(scheduler, big, small)
    assert scheduler.next_batch(0.0) is None
    scheduler.complete(running)
    assert scheduler.next_batch(0.0) is None, "5 and 4 are more than 8"
    scheduler.complete(beside)
    assert one_by_one(scheduler) == [[big, small]]


def test_a_plan_beside_others_takes_what_room_they_leave() -> None:
    scheduler = Scheduler(Bounds(max_rows=8))
    submit(scheduler, request(A, 4))
    running = taken(scheduler)
    jobs = [request(B, 3), request(C, 2)]
    submit(scheduler, *jobs)
    beside = taken(scheduler)
    assert beside.jobs == jobs[:1]
    scheduler.complete(running)
    assert jobs_of(scheduler.next_batch(0.0)) == jobs[1:]


def test_beside_a_job_that_exceeds_max_rows_nothing_runs() -> None:
    scheduler = Scheduler(Bounds(max_rows=4))
    submit(scheduler, request(A, 9))
    running = taken(scheduler)
    submit(scheduler, later := request(B, 1))
    assert scheduler.next_batch(0.0) is None
    scheduler.complete(running)
    assert jobs_of(scheduler.next_batch(0.0)) == [later]


def test_a_job_that_exceeds_max_rows_runs_beside_nothing() -> None:
    scheduler = Scheduler(Bounds(max_rows=4))
    submit(scheduler, request(A, 1))
    running = taken(scheduler)
    submit(scheduler, big := request(B, 9))
    assert scheduler.next_batch(0.0) is None
    scheduler.complete(running)
    assert jobs_of(scheduler.next_batch(0.0)) == [big]


def test_plans_that_run_together_stay_within_max_streams() -> None:
    """Each of them pins a slot per stream."""
    scheduler = Scheduler(Bounds(max_streams=3))
    submit(scheduler, request(A), request(B))
    running = taken(scheduler)
    submit(scheduler, request(C), request(D))
    beside = taken(scheduler)
    assert [job.stream for job in beside.jobs] == [C]
    assert scheduler.next_batch(0.0) is None
    scheduler.complete(running)
    assert [job.stream for job in jobs_of(scheduler.next_batch(0.0))] == [D]


def test_a_late_job_makes_no_way_for_those_behind_it() -> None:
    """It would have fitted beside what runs; they do not."""
    scheduler = Scheduler(Bounds(max_rows=8))
    submit(scheduler, request(A, 5))
    running = taken(scheduler)
    late, behind = request(B, 1, deadline=1.0), request(C, 6)
    submit(scheduler, late, behind)
    assert scheduler.next_batch(2.0) is None, "11 rows run together"
    assert scheduler.expired() == [late]
    scheduler.complete(running)
    assert jobs_of(scheduler.next_batch(2.0)) == [behind]


def test_a_late_job_overtakes_nobody_for_those_behind_it() -> None:
    """It came before what waits for the end of a plan; they did not."""
    scheduler = Scheduler(Bounds())
    submit(scheduler, request(A))
    running = taken(scheduler)
    late, held, later = request(B, deadline=3.0), request(A, arrived=1.0), request(C, arrived=2.0)
    submit(scheduler, late, held, later)
    assert scheduler.next_batch(4.0) is None
    assert scheduler.expired() == [late]
    scheduler.complete(running)
    assert jobs_of(scheduler.next_batch(4.0)) == [held, later]


def test_what_waits_for_a_plan_longer_goes_before_what_came_later() -> None:
    """Or steady traffic of others would hold it up forever."""
    scheduler = Scheduler(Bounds())
    submit(scheduler, request(A))
    running = taken(scheduler)
    held, later, earlier = request(A, arrived=1.0), request(B, arrived=2.0), request(C, arrived=0.5)
    submit(scheduler, held, later)
    assert scheduler.next_batch(3.0) is None
    submit(scheduler, earlier)
    beside = taken(scheduler, 3.0)
    assert beside.jobs == [earlier, later], "the first of a plan decides"
    scheduler.complete(running)
    assert jobs_of(scheduler.next_batch(3.0)) == [held]


def test_where_more_wait_for_plans_than_could_go_they_are_waited_for() -> None:
    """Even by those who came before them, or came urgently: else plans of a few jobs would never be merged again."""
    scheduler = Scheduler(Bounds())
    submit(scheduler, request(A), request(B))
    running = taken(scheduler)
    held = [request(A, arrived=1.0), request(B, arrived=1.0)]
    urgent = request(C, arrived=1.0, priority=1)
    submit(scheduler, *held, urgent)
    assert scheduler.next_batch(1.0) is None, "two wait, one could go"
    submit(scheduler, another := request(D, arrived=1.0))
    beside = taken(scheduler, 1.0)
    assert beside.jobs == [urgent, another], "two wait, two could go"
    scheduler.complete(running)
    assert jobs_of(scheduler.next_batch(1.0)) == held


def test_plans_grow_together_again() -> None:
    """32 streams that came one by one, and ask again as soon as they are answered, share plans in the end."""
    scheduler, running, sizes = Scheduler(Bounds(max_rows=64)), deque[Plan](), list[int]()
    for number in range(32):
        submit(scheduler, request(make_stream(str(number)), arrived=float(number)))
        running.append(taken(scheduler))
    submit(scheduler, *(request(plan.jobs[0].stream, arrived=50.0) for plan in running))
    for turn in range(200):
        scheduler.complete(running.popleft())
        while (plan := scheduler.next_batch(100.0)) is not None:
            running.append(plan)
            sizes.append(len(plan.jobs))
            submit(scheduler, *(request(job.stream, arrived=51.0 + turn) for job in plan.jobs))
    assert min(sizes[10:]) >= 8, sizes


# Commands


def test_a_command_waits_until_nothing_runs() -> None:
    """Its stream's own plan, or another's; what came after it waits, too."""
    for other in (A, B):
        scheduler = Scheduler(Bounds())
        submit(scheduler, request(A))
        running = taken(scheduler)
        submit(scheduler, reset := command(other), later := request(C, arrived=1.0))
        assert scheduler.next_batch(1.0) is None
        scheduler.complete(running)
        assert jobs_of(scheduler.next_batch(1.0)) == [reset]
        assert len(scheduler) == 1
        assert later.stream is C


def test_a_step_is_interrupted_by_no_command() -> None:
    """With ``predictions`` there is a plan of what came before it, and it is not lost."""
    scheduler = Scheduler(Bounds())
    reset, earlier = command(B), request(C, arrived=-1.0)
    submit(scheduler, reset)
    assert scheduler.next_batch(0.0, predictions=True) is None
    submit(scheduler, earlier)
    plan = scheduler.next_batch(0.0, predictions=True)
    assert jobs_of(plan) == [earlier]
    assert scheduler.next_batch(0.0, predictions=True) is None
    assert scheduler.next_batch(0.0) is None
    assert plan is not None
    scheduler.complete(plan)
    assert jobs_of(scheduler.next_batch(0.0)) == [reset]


def test_a_command_is_not_put_off_forever() -> None:
    """Two clients, each of whom asks again in the midst of the other's step: the reset of a third stream runs."""
    scheduler, running, now = Scheduler(Bounds()), deque[Plan](), 0.0
    submit(scheduler, request(A))
    running.append(taken(scheduler))
    submit(scheduler, reset := command(C, arrived=0.5))
    for turn in range(50):
        now += 1.0
        submit(scheduler, request((B, A)[turn % 2], arrived=now))
        if (plan := scheduler.next_batch(now, predictions=True)) is not None:
            running.append(plan)
        scheduler.complete(running.popleft())
        while (plan := scheduler.next_batch(now)) is not None and plan.lane is not None:
            running.append(plan)
        if plan is not None:
            assert plan.jobs == [reset]
            return
    raise AssertionError(f"{turn + 1} requests went before the command")


# Answers from behind


def test_a_stale_stream_has_one_step_more_under_way_than_it_may_be_behind() -> None:
    """And a strict one has one."""
    for steps in (0, 1, 3):
        scheduler, stream = Scheduler(Bounds()), make_stream("s", stale=steps)
        jobs = [request(stream, arrived=float(number)) for number in range(steps + 2)]
        submit(scheduler, *jobs)
        plans = [taken(scheduler) for _ in range(steps + 1)]
        assert [plan.jobs for plan in plans] == [[job] for job in jobs[:-1]]
        assert [plan.behind for plan in plans] == [False] + [True] * steps
        assert scheduler.next_batch(0.0) is None
        scheduler.complete(plans[0])
        last = taken(scheduler)
        assert (last.jobs, last.behind) == (jobs[-1:], steps > 0)
        for plan in (*plans[1:], last):
            assert not scheduler.idle
            scheduler.complete(plan)
        assert scheduler.idle


def test_answers_from_behind_share_no_plan_with_others() -> None:
    """Those come from the states that their steps change."""
    scheduler, stale = Scheduler(Bounds()), [make_stream(id, stale=2) for id in "st"]
    first = [request(stream) for stream in stale]
    submit(scheduler, *first)
    assert taken(scheduler).jobs == first
    second, other = [request(stream) for stream in stale], request(A)
    submit(scheduler, second[0], other, second[1])
    plans = [taken(scheduler) for _ in range(2)]
    assert [(plan.jobs, plan.behind) for plan in plans] == [(second, True), ([other], False)]


def test_a_job_whose_streams_steps_end_is_behind_no_more() -> None:
    """It waited for room; by then it is as any other."""
    scheduler, stale = Scheduler(Bounds(max_rows=4)), make_stream("s", stale=2)
    submit(scheduler, request(stale, 4))
    running = taken(scheduler)
    waiting, other = request(stale, 2), request(A, 2)
    submit(scheduler, waiting, other)
    assert scheduler.next_batch(0.0) is None
    scheduler.complete(running)
    plan = taken(scheduler)
    assert (plan.jobs, plan.behind) == ([waiting, other], False)


def test_a_job_stays_behind_while_one_step_of_its_stream_is_left() -> None:
    scheduler, stale = Scheduler(Bounds(max_rows=4)), make_stream("s", stale=2)
    submit(scheduler, request(stale, 2))
    first = taken(scheduler)
    submit(scheduler, request(stale, 1))
    second = taken(scheduler)
    submit(scheduler, third := request(stale, 2))
    assert scheduler.next_batch(0.0) is None, "no room"
    scheduler.complete(second)
    plan = taken(scheduler)
    assert (plan.jobs, plan.behind) == ([third], True)
    scheduler.complete(first)
    scheduler.complete(plan)
    assert scheduler.idle


def test_a_command_of_a_stale_stream_waits_for_all_its_steps() -> None:
    """And the requests behind it wait for the command."""
    scheduler, stale = Scheduler(Bounds()), make_stream("s", stale=4)
    submit(scheduler, request(stale), request(stale))
    plans = [taken(scheduler) for _ in range(2)]
    reset, after = command(stale), request(stale)
    submit(scheduler, reset, after)
    for plan in plans:
        assert scheduler.next_batch(0.0) is None
        scheduler.complete(plan)
    assert one_by_one(scheduler) == [[reset], [after]]


def test_what_waits_behind_its_own_stream_can_be_taken_back() -> None:
    """Whether it could go or had to wait, the next one takes its place."""
    scheduler, stale = Scheduler(Bounds(max_rows=2)), make_stream("s", stale=1)
    submit(scheduler, request(stale, 2))
    running = taken(scheduler)
    jobs = [request(stale, 1) for _ in range(3)]
    submit(scheduler, *jobs)
    assert scheduler.cancel(jobs[0])
    assert not scheduler.cancel(jobs[0])
    scheduler.complete(running)
    first = taken(scheduler)
    assert (first.jobs, first.behind) == (jobs[1:2], False)
    second = taken(scheduler)
    assert (second.jobs, second.behind) == (jobs[2:], True)
    submit(scheduler, held := request(stale, 1))
    assert scheduler.cancel(held)
    scheduler.complete(second)
    scheduler.complete(first)
    assert scheduler.idle


def test_late_jobs_expire_behind_their_own_stream() -> None:
    scheduler, stale = Scheduler(Bounds()), make_stream("s", stale=1)
    submit(scheduler, request(stale))
    running = taken(scheduler)
    late, on_time = request(stale, deadline=1.0), request(stale)
    submit(scheduler, late, on_time)
    plan = taken(scheduler, 2.0)
    assert (plan.jobs, plan.behind) == ([on_time], True)
    assert scheduler.expired() == [late]
    scheduler.complete(running)
    scheduler.complete(plan)
    assert scheduler.idle


class ListScheduler:
    """The same rules on one list of waiting jobs, searched from the front every time."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self.waiting: list[Job] = []
        self.running: list[Plan] = []
        self.expired: list[Job] = []

    @property
    def busy(self) -> Counter[Stream]:
        """Steps under way."""
        return Counter(job.stream for plan in self.running for job in plan.jobs)

    def first(self) -> list[Job]:
        """The first waiting job of every stream, in the order of their turns."""
        first: dict[Stream, Job] = {}
        for job in self.waiting:
            first.setdefault(job.stream, job)
        return sorted(first.values(), key=turn)

    def may_go(self, job: Job) -> bool:
        """As far as its own stream is concerned."""
        steps = self.busy[job.stream]
        return not steps or (job.lane is not None and steps <= job.stream.consistency.bound)

    def refuses(self, job: Job) -> bool:
        own = sum(one.stream is job.stream for one in self.waiting)
        full = len(self.waiting) >= self.bounds.in_all or own >= self.bounds.per_stream
        return job.command is None and full

    def has_way(self, job: Job) -> bool:
        """Beside all that runs."""
        if not self.running:
            return True
        held = [one for one in self.first() if not self.may_go(one)]
        ready = [one for one in self.first() if self.may_go(one)]
        rows = sum(one.rows for plan in self.running for one in plan.jobs)
        return (
            job.lane is not None
            and len(held) <= len(ready)
            and all(turn(job) < turn(one) for one in held)
            and rows + job.rows <= self.bounds.max_rows
            and len(self.busy) < self.bounds.max_streams
        )

    def choose(self, now: float, predictions: bool) -> Plan | None:
        while ready := [job for job in self.first() if self.may_go(job)]:
            first = ready[0]
            if (first.lane is None and predictions) or not self.has_way(first):
                return None
            kind, jobs = (first.lane, bool(self.busy[first.stream])), list[Job]()
            rows = sum(one.rows for plan in self.running for one in plan.jobs)
            most = 1 if first.lane is None else self.bounds.max_streams - len(self.busy)
            while len(jobs) < most:
                chosen = {job.stream for job in jobs}
                fitting = [job for job in self.first() if self.may_go(job) and job.stream not in chosen]
                fitting = [job for job in fitting if (job.lane, bool(self.busy[job.stream])) == kind]
                if not fitting:
                    break
                job = fitting[0]
                if now <= job.deadline and jobs and rows + job.rows > self.bounds.max_rows:
                    break
                self.waiting.remove(job)
                if now > job.deadline:
                    self.expired.append(job)
                    if not jobs:
                        break
                else:
                    jobs.append(job)
                    rows += job.rows
            if jobs:
                self.running.append(Plan(kind[0], jobs, behind=kind[1]))
                return self.running[-1]
        return None


def turn(job: Job) -> tuple[float, int]:
    return job.arrived - job.head_start, job.number


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of calls: the scheduler does what :class:`ListScheduler` does, and every job ends in one way."""

    @initialize(
        max_rows=st.integers(1, 8),
        max_streams=st.integers(1, 4),
        per_stream=st.integers(1, 4),
        in_all=st.integers(3, 9),
        stale=st.lists(st.sampled_from([0, 0, 1, 2]), min_size=4, max_size=4),
    )
    def start(self, max_rows: int, max_streams: int, per_stream: int, in_all: int, stale: list[int]) -> None:
        bounds = Bounds(max_rows, max_streams, per_stream, in_all)
        self.scheduler, self.model = Scheduler(bounds), ListScheduler(bounds)
        self.streams = [make_stream(name, stale=steps) for name, steps in zip("abcd", stale, strict=True)]
        self.now = 0
        self.jobs: list[Job] = []
        self.running: list[Plan] = []
        self.ends: dict[Job, str] = {}
        self.started: dict[Stream, list[int]] = {stream: [] for stream in self.streams}

    def end(self, job: Job, how: str) -> None:
        assert job not in self.ends, f"a job that was {self.ends[job]} is now {how}"
        self.ends[job] = how

    @rule(
        stream=st.integers(0, 3),
        rows=st.integers(1, 3),
        lane=st.integers(0, 1),
        patience=st.integers(0, 4),
        priority=st.sampled_from([0, 0, 1, 3, 10]),
    )
    def submit_request(self, stream: int, rows: int, lane: int, patience: int, priority: int) -> None:
        deadline = self.now + patience if patience < 4 else float("inf")
        self.submit(request(self.streams[stream], rows, LANES[lane], deadline, self.now, priority))

    @rule(stream=st.integers(0, 3))
    def submit_command(self, stream: int) -> None:
        self.submit(command(self.streams[stream], self.now))

    def submit(self, job: Job) -> None:
        if self.model.refuses(job):
            with pytest.raises(QueueFull):
                self.scheduler.submit(job)
            return
        self.scheduler.submit(job)
        self.model.waiting.append(job)
        self.jobs.append(job)

    @rule(seconds=st.integers(1, 3))
    def wait(self, seconds: int) -> None:
        self.now += seconds

    @rule(predictions=st.booleans())
    def next_batch(self, predictions: bool) -> None:
        before = self.model.busy
        plan, expected = self.scheduler.next_batch(self.now, predictions), self.model.choose(self.now, predictions)
        assert (plan is None) == (expected is None)
        if plan is None or expected is None:
            return
        assert (plan.lane, plan.jobs, plan.behind) == (expected.lane, expected.jobs, expected.behind)
        assert {job.lane for job in plan.jobs} == {plan.lane}
        assert not (predictions and plan.lane is None)
        for job in plan.jobs:
            assert job.deadline >= self.now
            assert plan.behind == (before[job.stream] > 0)
            self.end(job, "run")
            self.started[job.stream].append(job.number)
        assert len({job.stream for job in plan.jobs}) == len(plan.jobs), "a stream is twice in one plan"
        self.running.append(plan)
        if len(self.running) > 1:
            assert plan.lane is not None, "a command runs beside a plan"
            rows = sum(job.rows for one in self.running for job in one.jobs)
            assert rows <= self.scheduler.bounds.max_rows, "more rows run together than a step may have"
        assert len(self.model.busy) <= self.scheduler.bounds.max_streams
        for stream, steps in self.model.busy.items():
            assert steps <= stream.consistency.bound + 1, "answered from further behind than it may be"

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99))
    def complete(self, which: int) -> None:
        index = which % len(self.running)
        self.scheduler.complete(self.running.pop(index))
        del self.model.running[index]

    @precondition(lambda self: self.jobs)
    @rule(which=st.integers(0, 99))
    def cancel(self, which: int) -> None:
        job = self.jobs[which % len(self.jobs)]
        waits = job in self.model.waiting
        assert self.scheduler.cancel(job) == waits
        if waits:
            self.model.waiting.remove(job)
            self.end(job, "cancelled")

    @rule()
    def expired(self) -> None:
        found, self.model.expired = self.model.expired, []
        assert self.scheduler.expired() == found
        assert self.scheduler.expired() == [], "handed out once"
        for job in found:
            assert job.deadline < self.now
            self.end(job, "expired")

    @precondition(lambda self: len(self.model.waiting) > 5)
    @rule()
    def clear(self) -> None:
        left, self.model.waiting = self.model.waiting, []
        cleared = self.scheduler.clear()
        assert sorted(cleared, key=lambda job: job.number) == left
        for job in cleared:
            self.end(job, "cleared")

    @invariant()
    def agrees_with_the_list(self) -> None:
        assert len(self.scheduler) == len(self.model.waiting)
        assert self.scheduler.idle == (not self.model.waiting and not self.model.running)
        for numbers in self.started.values():
            assert numbers == sorted(numbers), "a stream's jobs ran out of order"

    @invariant()
    def holds_every_streams_first_job_in_its_place(self) -> None:
        first = self.model.first()
        held = {job.stream: job for job in first if not self.model.may_go(job)}
        assert self.scheduler._held == held
        ready = {kind: sorted(job.number for _, job in heap) for kind, heap in self.scheduler._ready.items()}
        expected: dict[tuple[Lane | None, bool], list[int]] = {}
        for job in first:
            if job.stream not in held:
                expected.setdefault((job.lane, bool(self.model.busy[job.stream])), []).append(job.number)
        assert ready == {kind: sorted(numbers) for kind, numbers in expected.items()}
        for heap in self.scheduler._ready.values():
            ranks = [rank for rank, _ in heap]
            assert all(ranks[(place - 1) // 2] <= ranks[place] for place in range(1, len(ranks))), "not a heap"

    def teardown(self) -> None:
        """Nothing is forgotten: run to the end, every job has ended in one way."""
        if not hasattr(self, "scheduler"):
            return
        for _ in range(len(self.jobs) + 1):  # each round starts or expires a job, while there are any
            while self.running:
                self.complete(0)
            self.next_batch(predictions=False)
        self.expired()
        assert self.scheduler.idle
        assert self.ends.keys() == set(self.jobs)


SchedulerMachine.TestCase.settings = settings(
    max_examples=300,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
TestSchedulerMachine = SchedulerMachine.TestCase
