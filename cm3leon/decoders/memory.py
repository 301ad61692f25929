"""Free memory of a device."""

from __future__ import annotations

from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: on a GPU, including what torch holds but does not use."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("/proc/meminfo has no line MemAvailable")
