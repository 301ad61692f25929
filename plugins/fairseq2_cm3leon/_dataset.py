"""The blocks that a run trains on as a dataset of fairseq2: the batches of our own trainer, on any
number of ranks."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fairseq2.datasets import DataReader
from fairseq2.device import SupportsDeviceTransfer
from fairseq2.gang import Gangs, all_sum
from fairseq2.nn import BatchLayout

from cm3leon.objectives.block_stream import BlockStream
from cm3leon.types import Batch, UserError

if TYPE_CHECKING:
    from cm3leon.stages.run_folder import RunFolder


@dataclass(kw_only=True)
class BlocksConfig:
    """The run whose blocks are read."""

    run: Path | None = None
    """Run folder whose corpus is ready for training, with its tokens and neighbours."""


def open_blocks(config: BlocksConfig) -> Blocks:
    """Open the training data of a run.

    Raises:
        UserError: if no run is named, or its data are not ready.
    """
    if config.run is None:
        raise UserError("dataset: run is missing; set dataset.config_overrides.run to a run folder")
    from cm3leon.records import MARKER
    from cm3leon.stages.opening import open_run
    from cm3leon.stages.table import stages_of

    # Training needs what our own pretraining of the run needs.
    run = open_run(config.run.expanduser())
    (needed,) = (
        stage.needs or () for stage in stages_of(run.experiment) if stage.name == "pretraining"
    )
    for name in needed:
        if not (run.folder / name / MARKER).is_file():
            raise UserError(
                f"stage {name} of {run.folder} is not finished; run it with until={needed[-1]}"
            )
    return Blocks(run)


class Blocks:
    """The endless stream of a run's training samples, corrupted by its objective and packed into
    blocks.

    The objective, vocabulary, packing, retrieved documents, mixture and seed are the run's.
    """

    def __init__(self, run: RunFolder) -> None:
        from cm3leon.stages.training_data import training_samples

        self.run = run
        self.samples = training_samples(run)

    @property
    def seq_len(self) -> int:
        """Number of positions in a block."""
        return self.run.seq_len

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return self.run.vocab.size

    def create_reader(
        self, gangs: Gangs, *, batch_size: int | None = None, num_accumulate: int = 1
    ) -> BlockReader:
        """Read this rank's part of each batch.

        Args:
            batch_size: blocks of an optimizer step on all ranks together; None = the run's.
            num_accumulate: number of parts in which a rank computes its share.

        Raises:
            UserError: for a batch that cannot be divided evenly.
        """
        experiment = self.run.experiment
        batch_size = batch_size or experiment.training.blocks(self.seq_len)
        if batch_size % (gangs.dp.size * num_accumulate):
            raise UserError(
                f"a batch has {batch_size} blocks; {gangs.dp.size} ranks with "
                f"trainer.grad_accumulation.num_batches={num_accumulate} cannot share them evenly"
            )

        # The stream stays on the CPU: fairseq2's trainer moves each batch to its device.
        stream = BlockStream(
            self.samples,
            self.run.objective,
            experiment.packing,
            seq_len=self.seq_len,
            batch_size=batch_size,
            seed=experiment.seed,
            device=torch.device("cpu"),
            rank=gangs.dp.rank,
            ranks=gangs.dp.size,
        )
        return BlockReader(stream, gangs, num_accumulate)


class PackedBlocks(SupportsDeviceTransfer):
    """Blocks in the form of fairseq2's models: sample after sample in one row, without padding.

    Args:
        batch: blocks (B, T).
        share: weight of these blocks' mean loss in the mean over ranks and parts that fairseq2's
            trainer takes.
    """

    def __init__(self, batch: Batch, share: float) -> None:
        kept_BT = batch.sample_BT >= 0

        # The number of each token's sample, different in every block; padding is dropped.
        B, T = kept_BT.shape
        samples_N = (batch.sample_BT + T * torch.arange(B)[:, None])[kept_BT]
        self.batch = Batch(*(getattr(batch, field.name)[kept_BT][None] for field in fields(batch)))
        """The same as one block (1, N)."""
        self.seq_lens: list[int] = samples_N.unique_consecutive(return_counts=True)[1].tolist()
        """Tokens of each sample."""
        self.num_examples = len(self.seq_lens)
        self.num_elements = len(samples_N)
        self.num_target_elements = int((batch.weight_BT > 0).sum())
        self.padding = B * T - len(samples_N)
        self.weight = float(batch.weight_BT.sum())
        """Sum of the weights of all targets in the loss."""
        self.share = share

    def to(self, device: torch.device, *, non_blocking: bool = False) -> None:
        self.batch = self.batch.to(device)

    def as_input(self) -> tuple[torch.Tensor, BatchLayout]:
        """The ids (N,) and their layout."""
        ids_N, position_N = self.batch.ids_BT[0], self.batch.position_BT[0]
        layout = BatchLayout.of(ids_N, self.seq_lens, packed=True)
        # fairseq2 counts from 0 in each sample, but the pieces of a sample run on through a block.
        layout._position_indices = position_N
        return ids_N, layout


class BlockReader(DataReader[PackedBlocks]):
    """Hands the parts of each batch to fairseq2's trainer; resumes exactly from its state, on the
    same number of ranks."""

    def __init__(self, stream: BlockStream, gangs: Gangs, num_accumulate: int) -> None:
        self._stream = stream
        self._gangs = gangs
        self._num_accumulate = num_accumulate
        self._start = stream.state_dict()

    def __iter__(self) -> BlockReader:
        return self

    def __next__(self) -> list[PackedBlocks]:
        batch = self._stream.next()
        parts = batch.split(len(batch.ids_BT) // self._num_accumulate)
        weights = [float(part.weight_BT.sum()) for part in parts]
        whole = float(all_sum(self._gangs.dp, sum(weights)))

        # The trainer averages over ranks and parts; parts with more targets weigh more.
        count = len(parts) * self._gangs.dp.size
        packed = []
        for part, weight in zip(parts, weights, strict=True):
            packed.append(PackedBlocks(part, weight * count / whole))
        return packed

    def reset(self) -> None:
        self._stream.load_state_dict(self._start)

    def state_dict(self) -> dict[str, Any]:
        return self._stream.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._stream.load_state_dict(state_dict)

    @property
    def num_accumulate(self) -> int:
        return self._num_accumulate
