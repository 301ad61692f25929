"""A backend of torch.compile that counts the graphs and the attentions in them."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

ATTENTION = {
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "cm3leon.packed_attention.default",
    "flex_attention",
}
"""Operators of which each stands for one forward pass of attention."""


class Graphs:
    """A backend of torch.compile that counts the graphs that it is given, and in each the forward
    passes of attention."""

    def __init__(self) -> None:
        self.count: Counter[str] = Counter()
        self.attentions: Counter[str] = Counter()
        self.backend = aot_autograd(
            fw_compiler=partial(self._take, "forward"), bw_compiler=partial(self._take, "backward")
        )

    def _take(self, kind: str, graph: torch.fx.GraphModule, _: Any) -> Any:
        self.count[kind] += 1
        self.attentions[kind] += sum(str(node.target) in ATTENTION for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)
