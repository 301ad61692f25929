"""First weights of a shard are those of the whole model, bit for bit.

For this a random stream is moved ahead without drawing the numbers in between.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from cm3leon.models.base import Model
from cm3leon.models.initial import Beginning, draw, skip
from cm3leon.models.llama import Llama
from cm3leon.models.transformer import Transformer

pytestmark = pytest.mark.stack

TINY: dict[str, Any] = {"layers": 2, "width": 24, "head_size": 8, "seq_len": 13, "init_std": 0.05}


def generator(seed: int, drawn: int = 0) -> torch.Generator:
    """A generator of which some numbers were drawn."""
    made = torch.Generator().manual_seed(seed)
    torch.empty(drawn).uniform_(generator=made)
    return made


def following(made: torch.Generator) -> Tensor:
    """The next numbers of a generator, more than two blocks of its 624 words."""
    return torch.empty(1300).uniform_(generator=made)


@pytest.mark.parametrize("drawn", [0, 5, 623, 624, 1000])
@pytest.mark.parametrize("count", [0, 1, 619, 624, 625, 100_003])
def test_numbers_skipped_are_numbers_drawn(drawn: int, count: int) -> None:
    skipped = generator(7, drawn)
    skip(skipped, count)
    assert torch.equal(following(skipped), following(generator(7, drawn + count)))


def test_far_jumps_add_up() -> None:
    """Two jumps lead as far as one, over more numbers than can be drawn here."""
    at_once, in_two = generator(2**63 + 5), generator(2**63 + 5)
    skip(at_once, 10**13 + 12_345)
    skip(in_two, 9 * 10**12)
    skip(in_two, 10**12 + 12_345)
    found = following(at_once)
    assert torch.equal(found, following(in_two))
    assert not torch.equal(found, following(generator(2**63 + 5)))


@pytest.mark.parametrize(
    ("kind", "fields"),
    [(Transformer, {}), (Transformer, {"zero_residual": True}), (Llama, {"mlp_width": 40})],
)
@pytest.mark.parametrize("shares", [1, 3])
def test_shares_are_those_of_the_whole_bit_for_bit(
    kind: Any, fields: dict[str, Any], shares: int
) -> None:
    """The vocabulary is odd, so that neither rows nor torch's blocks of numbers come out even."""
    torch.manual_seed(11)
    torch.rand(100)  # something else was drawn before
    state = torch.get_rng_state()
    whole: Model = kind(kind.Config(**TINY, **fields), vocab_size=37)

    # Each share is a model without memory of its own, whose rows alone are drawn.
    drawn = []
    for share in range(shares):
        with torch.device("meta"):
            model: Model = kind(kind.Config(**TINY, **fields), vocab_size=37)
        model.to_empty(device="cpu")
        parts: list[Tensor] = []

        def rows(weight: Tensor, share: int = share, parts: list[Tensor] = parts) -> Any:
            chunks = weight.detach().tensor_split(shares)
            parts.append(chunks[share])
            return chunks[share], sum(map(len, chunks[:share]))

        draw(model, Beginning(model, model.firsts()), state, rows)
        drawn.append(model)

    # The rows of all shares, in order, are the weights of the whole.
    for name, expected in whole.state_dict().items():
        chunks = [
            model.state_dict()[name].tensor_split(shares)[share]
            for share, model in enumerate(drawn)
        ]
        assert torch.equal(torch.cat(chunks), expected), name
