"""The first dashboard's row on states: where they are, what is stored, what a crash would cost."""

from __future__ import annotations

from panels import GREEN, RED, YELLOW, Panel, graph, number, query
from queries import FETCH, SERVER, of, quantile, rate


def state() -> list[Panel]:
    """What is stored of streams, and where their states are."""

    def level(family: str, *more: str) -> str:
        return of(family, *more, where=SERVER)

    def speed(family: str, *more: str) -> str:
        return rate(family, *more, where=SERVER)

    def grown(selected: str) -> str:
        return f"increase({selected}[$__rate_interval])"

    times = speed("tta_state_duration_seconds_bucket")
    return [
        number(
            "Store",
            "Whether what streams learn can be stored, on the worst of the servers shown.",
            "none",
            f"min({level('tta_state_store_up')} - {level('tta_state_store_fenced')})",
            words={"-1": ("taken over", RED), "0": ("failing", RED), "1": ("works", GREEN)},
            none="nothing is stored",
        ),
        number(
            "Recovery point",
            "Most steps that a crash now would cost one stream.",
            "short",
            f"max({level('tta_state_unsaved_steps_max')})",
            none="all",
        ),
        number(
            "Oldest unsaved step",
            "For how long it has waited, at least. A save begins after durability.seconds at the latest.",
            "s",
            f"max({level('tta_state_unsaved_age_seconds')})",
        ),
        number(
            "Late streams",
            "They would lose more by a crash now than their durability allows.",
            "short",
            f"sum({level('tta_state_late_streams')})",
            (1, RED),
        ),
        number(
            "Store size",
            "On the disk.",
            "bytes",
            f"sum({level('tta_state_store_bytes')})",
        ),
        number(
            "Last shutdown",
            "Whether the process before had saved everything, on the worst of the servers shown.",
            "none",
            f"min({level('tta_state_last_shutdown_clean')})",
            words={"0": ("not clean", YELLOW), "1": ("clean", GREEN)},
            none="none",
        ),
        number(
            "Lost before the start",
            "Steps that streams had lost to a crash when the server started, and that no client was told of yet.",
            "short",
            f"sum({level('tta_state_recovery_lost_steps')})",
            (1, YELLOW),
        ),
        number(
            "Damaged at the start",
            "Streams that were damaged in the store when the server started.",
            "short",
            f"sum({level('tta_state_recovery_damaged_streams')})",
            (1, RED),
        ),
        graph(
            "Stream states",
            "Streams with a state of their own, by where it is.",
            "short",
            query(f"sum by (tier) ({level('tta_stream_states')})", "{{tier}}"),
            stacked=True,
        ),
        graph(
            "Bytes of stream states",
            "By where they are; and the bounds of what is in memory.",
            "bytes",
            query(f"sum by (tier) ({level('tta_stream_state_bytes')})", "{{tier}}"),
            query(f"sum by (tier) ({level('tta_stream_state_budget_bytes')})", "{{tier}}, bound"),
            log=True,
            bottom=None,
        ),
        graph(
            "Moves between tiers",
            "States per second: from the device to the host, out of memory, and back from the disk, where a step waited"
            " for it or it was read ahead.",
            "ops",
            query(f"sum({speed('tta_stream_evictions_total')})", "to the host"),
            query(f"sum({speed('tta_stream_page_outs_total')})", "out of memory"),
            query(f"sum by (kind) ({speed('tta_stream_page_ins_total')})", "back, {{kind}}"),
        ),
        graph(
            "Unsaved",
            "Streams that a crash now would cost anything, that wait for the disk, and that would lose more than they "
            "may.",
            "short",
            query(f"sum({level('tta_state_unsaved_streams')})", "unsaved"),
            query(f"sum({level('tta_state_waiting_streams')})", "waiting"),
            query(f"sum({level('tta_state_late_streams')})", "late"),
            colors={"late": RED},
        ),
        graph(
            "Time of the store",
            "write: a commit of many streams; fetch: a state that a step waits for; prefetch: a state read ahead.",
            "s",
            query(quantile(0.5, times, "operation"), "{{operation}}, p50"),
            query(quantile(0.99, times, "operation"), "{{operation}}, p99"),
        ),
        graph(
            "Time of steps spent waiting for the disk",
            "Share of the engine thread's time, by server.",
            "percentunit",
            query(
                f"sum by (instance) ({speed('tta_state_duration_seconds_sum', FETCH)})",
                "{{instance}}",
            ),
        ),
        graph(
            "Saves",
            "Saves of streams per second, and attempts to write that failed.",
            "ops",
            query(f"sum by (result) ({speed('tta_state_saves_total')})", "{{result}}"),
            query(f"sum({speed('tta_state_write_failures_total')})", "attempts failed"),
            colors={"saved": GREEN, "refused": YELLOW, "attempts failed": RED},
        ),
        graph(
            "Bytes written",
            "Of states, per second.",
            "Bps",
            query(speed("tta_state_saved_bytes_total"), "{{instance}}"),
        ),
        graph(
            "Lost and damaged",
            "Steps that streams lost, stored states that were damaged, and streams at the last shutdown.",
            "short",
            query(
                f"sum by (cause) (increase({of('tta_state_lost_steps_total')}[$__rate_interval]))", "steps, {{cause}}"
            ),
            query(f"sum(increase({level('tta_state_damaged_total')}[$__rate_interval]))", "damaged states"),
            query(f"sum by (result) ({level('tta_state_last_shutdown_streams')})", "last shutdown, {{result}}"),
        ),
    ]
