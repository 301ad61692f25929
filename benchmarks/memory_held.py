"""The bytes that a process holds, on a GPU or on the CPU. No script."""

from __future__ import annotations

from pathlib import Path

import torch


def held_bytes(device: torch.device) -> int:
    """Bytes that the process holds now: of tensors on a GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    return _from_status("VmRSS")


def peak_bytes(device: torch.device) -> int:
    """The most bytes that the process has held since it began, or since `forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()

    # `getrusage` tells a peak too, but includes that of the parent process.
    return _from_status("VmHWM")


def forget_peak(device: torch.device) -> None:
    """Let the peak start anew at what is held now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def _from_status(name: str) -> int:
    """A size in bytes from Linux's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return 1024 * int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {name}")
