"""Check what a machine has: software, GPUs and their links, kernels, SLURM, cores and memory."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
import shutil
from collections.abc import Iterator

import torch

from cm3leon import __version__
from cm3leon.doctor.findings import Finding, good, warning, wrong
from cm3leon.launch.cluster import ask, partitions
from cm3leon.models.attention import choose
from cm3leon.registry import ATTENTIONS
from cm3leon.retrievers.mips import import_faiss
from cm3leon.training import float8
from cm3leon.training.costs import peak_flops
from cm3leon.training.device import uses_bf16
from cm3leon.types import UserError

OPTIONAL = {
    "torchao": "int8 and fp8 weights, adamw_8bit and float8 training",
    "xformers": "the attention that is preferred on GPUs",
    "open_clip_torch": "CLIP as the retriever's encoder",
}
"""Packages that may be missing, and what needs them."""
OPEN_FILES = 4096
"""How many files a process with many shards has open at a time."""


def look_at_machine(device: torch.device) -> Iterator[Finding]:
    """Every check but those of the file system and NCCL."""
    yield from look_at_software(device)
    yield from look_at_gpus(device)
    yield from look_at_precisions(device)
    yield from look_at_attention(device)
    yield look_at_faiss(device)
    yield look_at_slurm()
    yield from look_at_limits()


# ------------------------------------------------------------------------------ software and GPUs


def look_at_software(device: torch.device) -> Iterator[Finding]:
    """Check versions, and which optional packages are missing."""
    yield good(
        "cm3leon", f"{__version__}, Python {platform.python_version()}, {platform.platform()}"
    )
    cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    yield good("torch", f"{torch.__version__}, {cuda}")

    # xformers is for GPUs only; a CPU does not lack it.
    for package, needed_for in OPTIONAL.items():
        try:
            yield good(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            if package != "xformers" or device.type == "cuda":
                yield warning(
                    package, f"not installed; needed for {needed_for}", f"pip install {package}"
                )


def look_at_gpus(device: torch.device) -> Iterator[Finding]:
    """Check the driver, each GPU, and the links between them."""
    rows = smi("driver_version", "name", "ecc.errors.uncorrected.volatile.total", "power.limit",
               "power.default_limit")  # fmt: skip

    # A driver that lists GPUs which torch cannot use is a broken installation, not a machine
    # without GPUs.
    if device.type != "cuda":
        if rows:
            yield wrong(
                "GPUs",
                f"the driver {rows[0][0]} lists {len(rows)}, but torch {torch.__version__} sees "
                "none",
                "install a torch built for this driver's CUDA (https://pytorch.org), or check "
                "CUDA_VISIBLE_DEVICES",
            )
        else:
            yield warning(
                "GPUs", "none: everything runs on the CPU", "fine for experiment=digits and tests"
            )
        return

    if rows:
        yield good("driver", rows[0][0])
    for number in range(torch.cuda.device_count()):
        yield look_at_gpu(number)

    # What only the driver knows: memory errors, and a power limit below the usual one.
    for number, (_, name, errors, limit, usual) in enumerate(rows):
        if errors.isdigit() and int(errors):
            yield wrong(
                f"GPU {number}",
                f"{name} has {errors} uncorrected memory errors since it was started",
                "take it out of use, and have it reset or replaced",
            )
        if _number(limit) < 0.98 * _number(usual):
            yield warning(
                f"GPU {number}",
                f"its power is limited to {limit} W of {usual} W",
                "figures will be lower; nvidia-smi -pl sets it back",
            )
    yield from look_at_links(torch.cuda.device_count())


def look_at_gpu(number: int) -> Finding:
    """Check one GPU: whether torch has kernels for it, its memory, and whether others use it."""
    of = torch.cuda.get_device_properties(number)
    name = f"GPU {number}"
    text = f"{of.name}, {of.total_memory / 1e9:,.0f} GB, capability {of.major}.{of.minor}"

    # Kernels of sm_90 run on capabilities 9.0 and later ones of 9, not on 8 or 10.
    built = [int(arch[3:].rstrip("af")) for arch in torch.cuda.get_arch_list() if arch[:3] == "sm_"]
    if not any(each // 10 == of.major and each % 10 <= of.minor for each in built):
        return wrong(
            name,
            f"{text}; torch {torch.__version__} has no kernels for it",
            "install a torch built for it (https://pytorch.org)",
        )

    free, total = torch.cuda.mem_get_info(number)
    if free < 0.95 * total:
        return warning(
            name,
            f"{text}; {(total - free) / 1e9:,.1f} GB are in use",
            "see nvidia-smi: another process slows it down and takes its memory",
        )
    if peak_flops(torch.device("cuda", number), 1) is None:
        return warning(
            name,
            f"{text}; its peak FLOP/s are not known",
            "the MFU is left out of logs; add it to GPUS in cm3leon/training/costs.py",
        )
    return good(name, text)


def look_at_links(gpus: int) -> Iterator[Finding]:
    """Check how GPUs are connected, by `nvidia-smi topo -m`.

    There, NV18 stands for 18 NVLinks; PIX, PXB, PHB, NODE and SYS are routes over PCIe.
    """
    if gpus < 2:
        return

    kinds = links(ask("nvidia-smi", "topo", "-m"))
    if not kinds:
        yield warning("links", "nvidia-smi topo -m says nothing", "check it by hand")
    elif all(kind.startswith("NV") for kind in kinds):
        yield good("links", f"every pair of GPUs has NVLink ({', '.join(sorted(set(kinds)))})")
    else:
        yield warning(
            "links",
            f"not every pair of GPUs has NVLink ({', '.join(sorted(set(kinds)))})",
            "sharded weights travel over PCIe: use training.replicas, or fewer GPUs a model",
        )


def links(matrix: str) -> list[str]:
    """The kinds of links between different GPUs in the matrix that nvidia-smi prints.

    For two GPUs and a network card it is

                GPU0    GPU1    NIC0    CPU Affinity
        GPU0     X      NV18    PIX     0-31
        GPU1    NV18     X      SYS     0-31
        NIC0    PIX     SYS      X

    and the result is [NV18, NV18].
    """
    rows = []
    for line in matrix.splitlines():
        cells = re.sub(r"\x1b\[[0-9;]*m", "", line).split()
        if cells and re.fullmatch(r"GPU\d+", cells[0]) and "X" in cells:
            rows.append(cells)

    # The columns of the GPUs come first, before those of network cards and cores.
    kinds = []
    for row in rows:
        kinds += row[1 : 1 + len(rows)]
    return [kind for kind in kinds if kind != "X"]


def smi(*fields: str) -> list[list[str]]:
    """Fields of each GPU by nvidia-smi; empty if it is missing or fails."""
    printed = ask("nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
    rows = []
    for line in printed.splitlines():
        row = [cell.strip() for cell in line.split(",")]
        if len(row) == len(fields):
            rows.append(row)
    return rows


def _number(text: str) -> float:
    """A number as nvidia-smi prints it; 0 for [N/A]."""
    try:
        return float(text)
    except ValueError:
        return 0.0


# ---------------------------------------------------------------------------------- what computes


def look_at_precisions(device: torch.device) -> Iterator[Finding]:
    """Check whether the device computes in bf16 and float8."""
    name = "the CPU" if device.type == "cpu" else "the GPU"
    if uses_bf16(device, "auto"):
        yield good("bf16", f"{name} computes in bf16")
    else:
        yield warning(
            "bf16",
            f"{name} does not compute in bf16",
            "precision=auto takes float32 here",
        )

    lacks = float8.missing(device)
    if not lacks:
        yield good("float8", "training.precision=float8 can be used")
    elif device.type == "cuda":
        yield warning("float8", f"it needs {lacks}", "training.precision=float8 is refused here")
    else:
        yield good("float8", f"not used here; it needs {lacks}")


def look_at_attention(device: torch.device) -> Iterator[Finding]:
    """Check for every backend whether it loads, and computes the same as the formula."""
    chosen = choose("auto", device)
    yield good("attention", f"auto takes {chosen.name}")
    for name in ATTENTIONS.names():
        lacks = ATTENTIONS.get(name).missing(device)
        title = f"attention, {name}"
        if not lacks:
            yield _tried(title, name, device)
        elif device.type == "cuda":
            yield warning(title, f"it needs {lacks}", f"training uses {chosen.name} instead")
        else:
            yield good(title, f"not used here; it needs {lacks}")


def _tried(title: str, name: str, device: torch.device) -> Finding:
    """Try a backend on two samples in a block, forward and backward, and compare with float32."""
    torch.manual_seed(0)
    dtype, bound = torch.float32, 1e-3
    if device.type == "cuda":
        dtype, bound = torch.bfloat16, 0.1
    given = torch.randn(3, 1, 2, 256, 64, device=device)
    sample_1T = (torch.arange(256, device=device) >= 100).long()[None]
    results = []
    try:
        for backend, precision in ((name, dtype), ("naive", torch.float32)):
            attention = choose(backend, device).attention
            q, k, v = (each.to(precision).requires_grad_() for each in given)
            output = attention(q, k, v, attention.plan(sample_1T, device))
            results.append(torch.stack([output, *torch.autograd.grad(output.sum(), (q, k, v))]))
    except Exception as error:  # whatever a kernel raises on a device that it was not made for
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        return wrong(title, f"it does not run ({reason})", "set model.attention to another one")

    # Not a number must be wrong too, so the comparison is this way round.
    apart = (results[0].float() - results[1]).abs().max().item()
    if not apart < bound:
        return wrong(
            title,
            f"its results differ from the formula's by up to {apart:.2g}",
            "set model.attention to another one",
        )
    return good(title, "it runs, and its results agree with the formula")


def look_at_faiss(device: torch.device) -> Finding:
    """Check the library, and whether it can use the GPUs."""
    try:
        faiss = import_faiss()
    except UserError as error:
        return wrong("faiss", str(error), "install one of faiss-cpu and faiss-gpu")
    gpus = faiss.get_num_gpus() if hasattr(faiss, "get_num_gpus") else 0
    if device.type == "cuda" and not gpus:
        return warning(
            "faiss",
            f"{faiss.__version__} is built without GPU support: search and index training run on "
            "the CPU",
            "install faiss-gpu or its cuVS build in place of faiss-cpu",
        )
    where = f"{gpus} GPUs" if gpus else "CPU"
    return good("faiss", f"{faiss.__version__}, {where}")


# ------------------------------------------------------------------------------------ around them


def look_at_slurm() -> Finding:
    """Check whether there is a cluster, and which partitions it has."""
    if shutil.which("sbatch") is None:
        return good("SLURM", "sbatch is not on the PATH: launcher=slurm cannot be used here")
    nodes = partitions()
    if not nodes:
        return warning("SLURM", "sinfo does not answer", "ask whether the controller is up")

    described = []
    for each in nodes:
        star = "*" if each.default else ""
        described.append(f"{each.partition}{star} ({each.count} nodes, {each.gpus} GPUs each)")
    text = ", ".join(described)
    if not any(each.gpus for each in nodes):
        return warning(
            "SLURM",
            f"{text}; no partition names GPUs",
            "launcher.gpus_per_node may be refused",
        )
    return good("SLURM", text)


def look_at_limits() -> Iterator[Finding]:
    """Check cores, memory, and how many files a process may open."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    yield good("cores", f"{cores} of {os.cpu_count()}, {memory / 1e9:,.0f} GB of memory")

    # A user may raise the soft limit up to the hard one; -1 stands for no hard limit.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < OPEN_FILES:
        possible = min(hard, 65_536) if hard > 0 else 65_536
        yield warning(
            "open files",
            f"a process may open {soft}",
            f"ulimit -n {possible}, before a run over many shards",
        )
    else:
        yield good("open files", f"a process may open {soft:,}")
