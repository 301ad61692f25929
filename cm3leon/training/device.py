"""The device to run on, and its precision."""

from __future__ import annotations

import torch

from cm3leon.types import TrainingPrecision, UserError


def best_device() -> torch.device:
    """CUDA if there is a GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_of_worker(number: int) -> torch.device:
    """The device of worker `number`, from 0, of several on this machine: GPUs in turn. It becomes
    this process's current device."""
    device = best_device()
    if device.type == "cuda":
        device = torch.device("cuda", number % torch.cuda.device_count())
        torch.cuda.set_device(device)
    return device


def device_named(name: str | torch.device | None) -> torch.device:
    """The device of this name, as torch writes it: cpu, cuda, cuda:1; None: `best_device`.

    Raises:
        UserError: for a device that torch does not know, or cannot compute on here.
    """
    if name is None:
        return best_device()
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"device is {name}, which cannot be used here: {reason}; use cpu, or cuda with a GPU"
        ) from error
    return device


def seed_devices(seed: int) -> None:
    """Seed the generators of the CPU and of all GPUs.

    `torch.manual_seed` also keeps a traceback for every kind of device that is not in use, which
    takes longer than a small training's step.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def autocast(device: torch.device, precision: TrainingPrecision) -> torch.autocast:
    """A context that computes matrix products in bf16 (weights stay float32), or does nothing for
    float32.

    auto is bf16 if the processor computes in it; elsewhere bf16 is emulated,
    and slower than float32.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=uses_bf16(device, precision))


def uses_bf16(device: torch.device, precision: TrainingPrecision) -> bool:
    """Whether `precision` means bf16 on this device; float8 does outside the layers' products."""
    if precision != "auto":
        return precision in ("bf16", "float8")
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
