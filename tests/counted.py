"""Counts what a training reads from its device, and what it sends to other ranks; for tests."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

READS = (
    "item",
    "tolist",
    "cpu",
    "numpy",
    "nonzero",
    "__float__",
    "__int__",
    "__bool__",
    "__index__",
)


class HostReads(TorchFunctionMode):
    """Counts, by name, the calls that would wait for a device to hand over a value; in this
    thread."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in READS:
            self.counts[func.__name__] += 1
        return func(*args, **(kwargs or {}))


class Collectives(TorchDispatchMode):
    """Counts collectives by name and the bytes that they move, in this thread and its backward
    passes."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.partition("::")[2]
        if func.namespace == "c10d":
            self.counts[name] += 1
            # A scatter is counted by its whole input, as a gather is by its whole output.
            counted = args[1] if "scatter" in name else args[0]
            self.bytes[name] += sum(each.nbytes for each in _tensors(counted))
        elif func.namespace == "_c10d_functional" and name != "wait_tensor":
            self.counts[name] += 1
            self.bytes[name] += sum(each.nbytes for each in _tensors(result))
        return result


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, (list, tuple)):
        return [each for inner in value for each in _tensors(inner)]
    return []


def difference(after: Counter[str], before: Counter[str]) -> dict[str, int]:
    """What was counted in between; names whose count stayed the same are left out."""
    return {name: after[name] - before[name] for name in after if after[name] != before[name]}


def seen(reads: HostReads, collectives: Collectives) -> dict[str, Counter[str]]:
    """All counts so far."""
    return {
        "reads": reads.counts.copy(),
        "collectives": collectives.counts.copy(),
        "bytes": collectives.bytes.copy(),
    }
