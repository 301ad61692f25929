"""Any seed of 64 bits works wherever one is used; small ones give the numbers they always gave."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_decoders import VOCAB, model
from test_engine import built, request
from test_index import HEADER, SMALL_IVF, clustered, write
from test_packing import stream
from test_training import Interrupted, Numbers, Tiny, config, loss

from cm3leon.config import from_mapping
from cm3leon.data.augment import AugmentConfig, varied
from cm3leon.data.mixture import Mixture, sampling_rates
from cm3leon.data.shuffle import shuffled, shuffled_array
from cm3leon.decoders.generate import answers
from cm3leon.experiment import load_experiment
from cm3leon.retrievers import index
from cm3leon.retrievers.lexical import LexicalEncoder
from cm3leon.retrievers.vectors import VectorShards
from cm3leon.seeds import wrapped
from cm3leon.training.trainer import train
from cm3leon.types import UserError

pytestmark = pytest.mark.stack

LARGE = [2**31, 1_764_361_234_567, 2**63 + 5, 2**64 - 1]
"""Seeds of more than 31 bits, a time in milliseconds, one of more than 63 bits, and the largest."""


def test_small_seeds_are_themselves() -> None:
    seeds = (0, 7 * 1_000_003 + 5, 2**64 - 1, 2**64 + 3)
    assert [wrapped(seed) for seed in seeds] == [0, 7_000_026, 2**64 - 1, 3]
    assert [wrapped(seed, bits=31) for seed in (8, 2**31 - 1, 2**31 + 3)] == [8, 2**31 - 1, 3]


@pytest.mark.parametrize("seed", LARGE)
def test_an_experiment_takes_any_seed_of_64_bits(seed: int) -> None:
    assert load_experiment("digits_smoke", [f"seed={seed}"]).seed == seed


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5])
def test_other_seeds_are_refused(seed: Any) -> None:
    with pytest.raises(
        UserError, match=rf"^seed is {seed}; it must be a whole number from 0 to {2**64 - 1}$"
    ):
        load_experiment("digits_smoke", [f"seed={seed}"])


@pytest.mark.parametrize("seed", LARGE)
def test_a_training_takes_any_seed(tmp_path: Path, seed: int) -> None:
    """A run resumed after step 2 draws, at every step, the numbers of the uninterrupted run."""

    def trained(folder: str, fails_at: int | None = None) -> torch.Tensor:
        module = Tiny()
        train(
            module, loss, Numbers(fails_at), config(steps=4, checkpoint_every=2),
            folder=tmp_path / folder, device=torch.device("cpu"), seed=seed, title="tiny",
        )  # fmt: skip
        return module.first.weight

    whole = trained("whole")
    with pytest.raises(Interrupted):
        trained("stopped", fails_at=2)
    assert torch.equal(trained("stopped"), whole)


@pytest.mark.parametrize("seed", LARGE)
def test_data_take_any_seed(seed: int) -> None:
    order = [shuffled(seed, position, 50) for position in range(50)]
    assert sorted(order) == list(range(50))
    assert shuffled_array(seed, np.arange(50), 50).tolist() == order

    Mixture([5, 7], sampling_rates([5, 7], [1.0, 1.0]), seed).at(3)
    images_BHWC = np.random.default_rng(0).integers(0, 256, (2, 16, 16, 3), np.uint8)
    (version,) = varied(images_BHWC, "ab", AugmentConfig(versions=1), seed)
    assert not np.array_equal(version, images_BHWC)

    assert stream(seed=seed).next().ids_BT.shape == stream(seed=0).next().ids_BT.shape


@pytest.mark.parametrize("seed", LARGE)
def test_retrieval_takes_any_seed(tmp_path: Path, seed: int) -> None:
    vectors = VectorShards(write(tmp_path / "vectors", clustered(0, 600)), HEADER)
    settings = from_mapping(index.IndexConfig, SMALL_IVF, "index")
    folder = tmp_path / "index"
    folder.mkdir()

    index.train(vectors, folder, settings, seed)
    for number in range(vectors.count):
        index.add_shard(vectors, number, folder)
    index.merge(vectors, folder, settings, seed)

    LexicalEncoder().encode_images(np.zeros((1, 32, 32, 3), np.uint8), dropout=0.5, seed=seed)


@pytest.mark.parametrize("seed", LARGE)
def test_decoding_takes_any_seed(seed: int) -> None:
    asked = [
        request([VOCAB.eos, 7, 9], built("top_p", cfg=1), samples=3, seed=start)
        for start in (seed, 0)
    ]
    (drawn, others) = answers(model(), asked, vocab=VOCAB)
    assert drawn != others
