"""The pass over next tokens that every step makes: from Python, compiled, or as a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from cm3leon.models.base import Model
from cm3leon.models.cache import KVCache
from cm3leon.types import Execution, UserError

Recorder = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Runs a function whose tensors stay at their addresses,
and returns a function that repeats it without running its Python."""

COLUMNS = {False: 64, True: 256}
"""Columns of the cache are read in multiples of these, without and with graphs.
Each shape costs a recording with graphs, so these are coarser."""


class Steps:
    """The model's hidden states for the window of every row, the last token and its drafts.

    Args:
        window: tokens of a row.
        recorder: replaces the recording of CUDA graphs, for tests.

    Raises:
        UserError: for CUDA graphs on another device.
    """

    def __init__(
        self,
        model: Model,
        cache: KVCache,
        *,
        window: int,
        execution: Execution,
        recorder: Recorder | None = None,
    ) -> None:
        graph = execution.endswith("graph")
        if graph and recorder is None and cache.device.type != "cuda":
            raise UserError(
                f"execution is {execution}, which needs CUDA, not {cache.device.type}; "
                "use execution=eager or execution=compiled"
            )
        self._model, self._cache = model, cache
        self._recorder = (recorder or cuda_graph) if graph else None
        self._compute = self._eager
        if execution.startswith("compiled"):
            self._compute = torch.compile(self._eager)
        self._recorded: dict[tuple[int, int, int], Callable[[], Tensor]] = {}
        # The inputs of a step lie in one buffer, as a graph reads the same addresses each time.
        self.next_RW = torch.zeros(
            cache.groups * cache.width, window, dtype=torch.int64, device=cache.device
        )

    def __call__(self, groups: int, prefix: int, tail: int) -> Tensor:
        """Hidden states (R, W, D) of the rows of the first `groups` groups;
        their keys and values go to the cache.

        Args:
            prefix: the longest prefix to read.
            tail: the longest tail to read, with the window.
        """
        cache, columns = self._cache, COLUMNS[self._recorder is not None]

        # Round shapes up: with graphs each one is recorded, and the groups go by powers of two.
        if self._recorder:
            groups = min(1 << (groups - 1).bit_length(), cache.groups)
        prefix = _rounded(prefix, columns, cache.prefix)
        tail = _rounded(tail, columns, cache.tail)
        shape = (groups, prefix, tail)

        if not self._recorder:
            return self._compute(*shape)
        if shape not in self._recorded:
            self._recorded[shape] = self._recorder(partial(self._compute, *shape))
        return self._recorded[shape]()

    def _eager(self, groups: int, prefix: int, tail: int) -> Tensor:
        next_RW = self.next_RW[: groups * self._cache.width]
        attend = self._cache.step_pass(groups, prefix, tail, next_RW.shape[1])
        # Drafts may stand beyond the model's positions.
        position_RW = attend.positions(next_RW.shape[1]).clamp(max=self._model.seq_len - 1)
        return self._model(next_RW, position_BT=position_RW, attend=attend, readout=_hidden)


def _hidden(hidden_RWD: Tensor, head: nn.Linear) -> Tensor:
    return hidden_RWD


def _rounded(columns: int, multiple: int, limit: int) -> int:
    return min(-(-columns // multiple) * multiple, limit)


def cuda_graph(compute: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record a function whose tensors stay at their addresses as a CUDA graph; see `Recorder`.

    Recording runs the function several times. A step allows it, as it writes the same keys and
    values to the same columns again.
    """
    # Warm-up on a stream of its own, as PyTorch asks for before a capture.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            compute()
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = compute()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
