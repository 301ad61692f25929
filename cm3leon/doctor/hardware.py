"""Time the device itself: matrix products, and bytes read and copied."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator

import torch

from cm3leon.doctor.figures import Figure, attempted
from cm3leon.training.costs import peak_flops

PART = "hardware"


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, including its work on the device."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


def median_seconds(call: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median of several calls, after one that is not counted: it may compile or allocate."""
    call()
    return statistics.median(seconds(call, device) for _ in range(repeats))


def product_rate(device: torch.device, side: int, dtype: torch.dtype) -> float:
    """FLOP/s of a square matrix product."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / median_seconds(lambda: a @ b, device, 10)


def float8_rate(device: torch.device, side: int) -> float:
    """FLOP/s of a square product of two float8 matrices, each with one scale."""
    a, b = (torch.randn(side, side, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)

    def product() -> torch.Tensor:
        return torch._scaled_mm(
            a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
        )

    return 2 * side**3 / median_seconds(product, device, 10)


def read_rate(device: torch.device) -> float:
    """Bytes a second that the sum of a large tensor reads; the best of five."""
    count = 2**30 if device.type == "cuda" else 2**25
    numbers = torch.ones(count, device=device)
    times = [seconds(lambda: numbers.sum().item(), device) for _ in range(6)]
    return numbers.nbytes / min(times[1:])


def copy_rate(source: torch.device, target: torch.device, *, pinned: bool = False) -> float:
    """Bytes a second of a copy of a large tensor, each byte counted once.

    Args:
        pinned: keep the tensor on the CPU in page-locked memory, from which GPUs copy directly.
    """
    device, count = source, 2**25
    if "cuda" in (source.type, target.type):
        count = 2**28
    if target.type == "cuda":
        device = target
    given = torch.ones(count, device=source)
    if pinned:
        given = given.pin_memory()
    taken = torch.empty(count, device=target, pin_memory=pinned and target.type == "cpu")
    return given.nbytes / median_seconds(lambda: taken.copy_(given), device, 5)


def measure(device: torch.device, full: bool) -> Iterator[Figure]:
    """Products in each precision, then bandwidths."""
    side = 8192 if full else 512
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)

        def product(dtype: torch.dtype = dtype) -> tuple[float, str]:
            rate = product_rate(device, side, dtype)
            note = f"{side} x {side}"
            # Datasheets' peaks are those of bf16, which only large products come near.
            peak = peak_flops(device, 1)
            if peak and full and dtype == torch.bfloat16:
                note += f"; {rate / peak:.0%} of the datasheet's peak"
            return rate / 1e12, note

        yield from attempted(PART, f"matrix product, {name}", "TFLOP/s", product)
    if device.type == "cuda":
        yield from attempted(
            PART,
            "matrix product, float8",
            "TFLOP/s",
            lambda: (float8_rate(device, side) / 1e12, f"{side} x {side}, a scale a tensor"),
        )

    yield from attempted(
        PART, "reading memory", "GB/s", lambda: (read_rate(device) / 1e9, "sum of a large tensor")
    )
    yield from attempted(
        PART, "copying memory", "GB/s", lambda: (copy_rate(device, device) / 1e9, "bytes copied")
    )

    # Between CPU and GPU; prefetched batches come from page-locked memory.
    if device.type == "cuda":
        cpu = torch.device("cpu")
        for name, ends in (("to", (cpu, device)), ("from", (device, cpu))):

            def copied(ends: tuple[torch.device, torch.device] = ends) -> tuple[float, str]:
                return copy_rate(*ends, pinned=ends[0] == cpu) / 1e9, "256 M float32 numbers"

            yield from attempted(PART, f"copying {name} the GPU", "GB/s", copied)
