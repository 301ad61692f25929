"""Sums between the GPUs of this machine by NCCL: whether they are right, and how fast.

Each GPU has a process, which runs this file as a module. GPU 0 fills 256 MB with ones, GPU 1 with
twos, and so on; after the sum, each of n GPUs must have 1 + 2 + ... + n everywhere.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time

import torch
import torch.distributed as dist

from cm3leon.doctor.findings import Finding, good, warning, wrong

NUMBERS = 2**26
"""float32 numbers of the sum: 256 MB."""
LIMIT = 120
"""Seconds after which a link counts as hanging."""
SLOW = 50e9
"""Bytes a second and GPU (bus bandwidth); only GPUs without NVLink are below it."""
ADVICE = (
    "run it again with NCCL_DEBUG=INFO and read what it says; try NCCL_P2P_DISABLE=1, and check "
    "`nvidia-smi topo -m`, /dev/shm and the IOMMU"
)


def look_at_nccl(gpus: int) -> Finding:
    """Check a sum over all visible GPUs.

    Bus bandwidth is 2 (n - 1) / n times the bytes over the time, as NVIDIA's nccl-tests count.
    """
    if gpus < 2:
        return good("NCCL", "fewer than two GPUs are visible: nothing to send")

    # The processes meet at a port of this machine that is free now.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(gpus):
        of_rank = {"RANK": str(rank), "WORLD_SIZE": str(gpus), "MASTER_PORT": str(port)}
        environment = {**os.environ, **of_rank, "MASTER_ADDR": "127.0.0.1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", __name__],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )

    # One that hangs keeps all others waiting, so that all share the limit.
    deadline = time.monotonic() + LIMIT
    try:
        printed = [p.communicate(timeout=max(1, deadline - time.monotonic())) for p in processes]
    except subprocess.TimeoutExpired:
        return wrong("NCCL", f"{gpus} GPUs did not finish a sum within {LIMIT} s", ADVICE)
    finally:
        for process in processes:
            process.kill()
            process.wait()

    for process, (_, errors) in zip(processes, printed, strict=True):
        if process.returncode:
            last = (errors.strip().splitlines() or ["no reason was given"])[-1]
            return wrong("NCCL", f"{gpus} GPUs cannot sum: {last}", ADVICE)
    seconds = json.loads(printed[0][0].splitlines()[-1])
    rate = 2 * (gpus - 1) / gpus * 4 * NUMBERS / seconds
    text = f"{gpus} GPUs sum correctly, at {rate / 1e9:,.0f} GB/s (bus bandwidth)"
    if rate < SLOW:
        return warning(
            "NCCL", text, "NVLink is not in use, so sharding will be slow; prefer training.replicas"
        )
    return good("NCCL", text)


def main() -> None:
    """Run as one rank: sum, check the sum, and print its seconds, the median of five."""
    rank, count = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", device_id=torch.device("cuda", rank))

    # Six sums, of which the first opens the connections and is not counted.
    numbers = torch.empty(NUMBERS, device="cuda")
    times = []
    for _ in range(6):
        numbers.fill_(rank + 1)
        torch.cuda.synchronize()
        start = time.perf_counter()
        dist.all_reduce(numbers)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    if not bool((numbers == count * (count + 1) / 2).all()):
        raise SystemExit(f"GPU {rank} has a wrong sum")
    dist.destroy_process_group()
    print(json.dumps(sorted(times[1:])[2]))


if __name__ == "__main__":
    main()
