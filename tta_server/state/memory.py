"""How much memory stream states may take: what the config says, or a part of what is free."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from tta_server.settings import LimitSettings

DEVICE_SHARE = 0.5
"""Of the free memory of an accelerator; the rest is for activations."""
HOST_SHARE = 0.25
"""Of the free memory of the host. Where that is the device, each of the two tiers gets so much."""


@dataclass(frozen=True)
class Budget:
    """Bounds of what is kept where, of all models and policies together."""

    slots: int = 2**20
    """Most states on the device."""
    device_bytes: int = 2**62
    host_bytes: int = 2**62

    def fit(self, state_bytes: int) -> int:
        """How many states of this size there is room for on the device."""
        return min(self.slots, self.device_bytes // max(1, state_bytes))


def measure(limits: LimitSettings, device: torch.device) -> Budget:
    """The budget by the settings and, where they leave it open, by the memory that is free now."""
    free = free_bytes()
    room = int(HOST_SHARE * free)
    if device.type == "cuda":
        room = int(DEVICE_SHARE * torch.cuda.mem_get_info(device)[0])
    return Budget(
        limits.slots or Budget.slots,
        limits.device_bytes or room,
        limits.host_bytes or int(HOST_SHARE * free),
    )


def free_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Host memory that this process may still take: what the system has, or what its container leaves."""
    free = []
    with suppress(OSError, StopIteration):
        lines = (proc / "meminfo").read_text().splitlines()
        free.append(1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]))
    with suppress(OSError, ValueError):  # "max" is no number
        free.append(int((cgroup / "memory.max").read_text()) - int((cgroup / "memory.current").read_text()))
    return max(0, min(free, default=2**32))
