"""Steps a second of a small transformer by how long waiting threads spin.

    python benchmarks/threads.py

Each setting is measured with one process, and with two at the same time. A thread that spins while
it waits answers sooner, and takes a processor from whoever else could use it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

SECONDS = 4
"""Of each measurement."""
ROUNDS = 4
SETTINGS = {
    "libgomp's own": {},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def train() -> None:
    """Train 4 layers of width 128 on 8 samples of 64 positions, and print the steps a second."""
    import torch
    from torch import nn

    layer = nn.TransformerEncoderLayer(128, 4, 512, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 4)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    x_BTC = torch.randn(8, 64, 128)

    # The clock starts again after two steps, which warm up.
    steps, start = -2, time.perf_counter()
    while time.perf_counter() < start + SECONDS:
        if steps == 0:
            start = time.perf_counter()
        model(x_BTC).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        steps += 1
    print(steps / (time.perf_counter() - start))


def measured(setting: dict[str, str], at_once: int) -> list[float]:
    """Steps a second of each of `at_once` processes that run at the same time."""
    processes = []
    for _ in range(at_once):
        process = subprocess.Popen(
            [sys.executable, __file__, "train"],
            env=os.environ | setting,
            stdout=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
    return [float(process.communicate()[0]) for process in processes]


if __name__ == "__main__":
    if sys.argv[1:] == ["train"]:
        train()
    else:
        for _ in range(ROUNDS):
            for name, setting in SETTINGS.items():
                (alone,) = measured(setting, 1)
                both = ", ".join(f"{each:.1f}" for each in measured(setting, 2))
                print(f"{name:24} alone {alone:5.1f}; two at once {both}", flush=True)
