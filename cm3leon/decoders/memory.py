"""What a device has left."""

from __future__ import annotations

from pathlib import Path

import torch


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken: of a GPU, with what torch holds but does not use,
    or of the machine."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
