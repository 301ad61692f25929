"""Training checkpoints: folders `step_00000123`, written whole or not at all, readable on any
number of ranks.

How a checkpoint is committed, here on two ranks. The tensors are copied to memory first, so that
the training goes on while a thread of each rank writes:

    .partial_00000123/         1. each rank writes its shards (torch.distributed.checkpoint)
        __0_0.distcp              of rank 0
        __1_0.distcp              of rank 1
        rank_0.json            2. each rank lists its files with their SHA-256
        rank_1.json
        .metadata              3. the first rank, once all lists are there, writes the state ...
        state.json
        manifest.json          4. ... and last the manifest: the checksums of all files
    step_00000123/             5. the folder is flushed to disk and renamed

A kill before the rename leaves a `.partial_*` folder, which the next start deletes; the rename is
atomic, so a folder with the final name is complete. Old checkpoints are deleted only after it.
"""

from __future__ import annotations

import shutil
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cm3leon.io import read_json, sha256, sync_to_disk, write_json
from cm3leon.permissions import check_folder_readable
from cm3leon.training.average import WeightAverage
from cm3leon.training.distributed import Ranks, is_sharded
from cm3leon.training.index_reader import UNREADABLE, IndexReader
from cm3leon.training.optimizer import prime
from cm3leon.training.steps import MANIFEST, checkpoint_of, checkpoints, numbered, step_of
from cm3leon.types import UserError

# One process without a group is meant, not forgotten; torch says so in a thread of its own.
warnings.filterwarnings(
    "ignore", message=".*assuming the intent is to (save|load) in a single process.*"
)

LAST_WAIT = 30.0
"""Seconds that a failed training gives to the checkpoint being written; longer than it takes to
notice that another rank is lost."""

FORMAT = 1
"""Version of a checkpoint's files. Raise it when an older version of the code could not read them,
or this one could not read an older version's."""
STATE = "state.json"


class Checkpoints:
    """The checkpoints of one training, in one folder.

    Args:
        folder: seen by all ranks.
        keep: number of newest checkpoints to keep.
        keep_every: checkpoints of steps that are multiples of this are kept for good.
        warn: called with a sentence when a checkpoint could not be written.
        patience: seconds that the first rank waits for the files of the others.
    """

    def __init__(
        self,
        folder: Path,
        ranks: Ranks,
        *,
        keep: int,
        keep_every: int | None = None,
        warn: Callable[[str], None] = print,
        patience: float = 600,
    ) -> None:
        self._folder = folder
        self.ranks = ranks
        self._keep = keep
        self._keep_every = keep_every
        self._warn = warn
        self.patience = patience
        self._writing: _Writing | None = None
        self._writing_to = folder
        # A group of its own, because checkpoints are written while the training uses the other one.
        self.group: Any = dist.new_group(backend="gloo") if ranks.count > 1 else None

    def begin(self) -> None:
        """Make the folder, and delete what a kill may have left half written in it."""
        if self.ranks.first:
            self._folder.mkdir(parents=True, exist_ok=True)
            for left in self._folder.glob(".partial_*"):
                shutil.rmtree(left, ignore_errors=True)
        self.ranks.barrier()

    def save(
        self, tensors: Mapping[str, Any], state: Mapping[str, Any], *, wait: bool = False
    ) -> None:
        """Start to write `step_<state["step"]>` once the one before is finished.

        A checkpoint that fails gives a warning, and the older ones stay. All ranks have to call
        this.

        Args:
            tensors: may be nested by names; they are copied before this returns.
            state: must be JSON.
            wait: return only when the checkpoint is complete.
        """
        self.finish()
        self._writing_to = final = checkpoint_of(self._folder, state["step"])
        partial = self._folder / f".partial_{state['step']:08d}"
        if self.ranks.first:
            self._attempt(lambda: _empty(partial))
        self.ranks.barrier()

        state = {**state, "ranks": self.ranks.count, "format": FORMAT}
        self._writing = _Writing(tensors, state, partial, final, self)
        if wait:
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one."""
        if self._writing:
            self._writing.thread.join()
            self.poll()

    def close(self) -> None:
        """Give the checkpoint that is being written some time,
        when the training ends with an error."""
        if self._writing:
            self._writing.thread.join(LAST_WAIT)

    def poll(self) -> None:
        """Warn about a checkpoint that has failed since the last call, without waiting."""
        if self._writing and not self._writing.thread.is_alive():
            error, self._writing = self._writing.error, None
            if error:
                self._warn(
                    f"{self._writing_to}: no checkpoint was written ({_reason(error)}); the older "
                    "one is kept, and the training continues and tries again at the next checkpoint"
                )

    def newest(self) -> Path | None:
        """The newest checkpoint with intact files; damaged ones are skipped with a warning.

        The ranks share the work of reading all files, and agree.

        Raises:
            UserError: for a checkpoint of a format that this version cannot read, or that this user
                may not read: falling back to an older one would be wrong then.
        """
        for path in reversed(numbered(self._folder)):
            check_folder_readable(path)
            check_format(path)
            damaged = []
            for names in self.ranks.gather(_damaged(path, self.ranks)):
                damaged += names

            if damaged:
                fault = f"{damaged[0]} is missing or has changed"
            elif (step := read_state(path)["step"]) != step_of(path):
                fault = f"it is a copy of the checkpoint of step {step}"
            else:
                return path
            if self.ranks.first:
                self._warn(f"{path} is skipped: {fault}")
        return None

    def last(self) -> Path | None:
        """The newest complete checkpoint, or None."""
        return next(reversed(checkpoints(self._folder)), None)

    def _attempt(self, action: Callable[[], None]) -> None:
        """Do something that the disk may refuse, with a warning;
        what follows will fail with its reason too."""
        try:
            action()
        except OSError as error:
            self._warn(f"{error.filename or self._folder}: {error.strerror}")

    def prune(self, newest: int) -> None:
        """Delete all but the newest checkpoints and those that are kept for good.

        Checkpoints of later steps than `newest`, the one just written, were skipped as damaged when
        the training started. They are not counted, and stay until the training gets there.
        """
        written: dict[int, Path] = {}
        for path in checkpoints(self._folder):
            step = step_of(path)
            if step is not None and step <= newest:
                written[step] = path
        for step in list(written)[: -self._keep]:
            if not (self._keep_every and step % self._keep_every == 0):
                shutil.rmtree(written[step], ignore_errors=True)


class _Writing:
    """One checkpoint on its way to the disk:
    a thread waits for this rank's shards and commits them."""

    def __init__(
        self,
        tensors: Mapping[str, Any],
        state: dict[str, Any],
        partial: Path,
        final: Path,
        owner: Checkpoints,
    ) -> None:
        self.error: BaseException | None = None
        self._state, self._partial, self._final, self._owner = state, partial, final, owner
        self._future: Any = None
        try:
            self._future = dcp.async_save(
                dict(tensors),
                storage_writer=dcp.FileSystemWriter(partial),
                process_group=owner.group,
            )
        except Exception as error:  # whatever the writer makes of a full disk
            self.error = error
        self.thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        if self.error:
            return
        try:
            # This rank's shards are on the disk; list them with their checksums.
            self._future.result()
            rank, count = self._owner.ranks.rank, self._owner.ranks.count
            own = {path.name: sha256(path) for path in self._partial.glob(f"__{rank}_*")}
            write_json(self._partial / f"rank_{rank}.json", own, indent=None, sync=True)

            if rank == 0:
                self._commit([self._partial / f"rank_{other}.json" for other in range(count)])
        except BaseException as error:
            self.error = error

    def _commit(self, lists: list[Path]) -> None:
        """Wait for the lists of all ranks, write state and manifest, and rename the folder."""
        limit = time.monotonic() + self._owner.patience
        while not all(path.is_file() for path in lists):
            if time.monotonic() > limit:
                missing = sum(not path.is_file() for path in lists)
                raise TimeoutError(f"no word of its shards from {missing} ranks")
            time.sleep(0.05)

        # The manifest is the last file: a folder without one is never read.
        write_json(self._partial / STATE, self._state, indent=None, sync=True)
        files: dict[str, str] = {}
        for path in lists:
            files |= read_json(path)
        for path in lists:
            path.unlink()
        files |= {name: sha256(self._partial / name) for name in (".metadata", STATE)}
        write_json(self._partial / MANIFEST, files, indent=None, sync=True)

        # The folder's entries must be on the disk before its name is, and its name before older
        # checkpoints go.
        sync_to_disk(self._partial)
        shutil.rmtree(self._final, ignore_errors=True)
        self._partial.rename(self._final)
        sync_to_disk(self._final.parent)
        self._owner.prune(self._state["step"])


def check_format(path: Path) -> None:
    """Raise UserError for a checkpoint of a format that this version cannot read."""
    try:
        found = read_state(path).get("format", 1)
    except NotADirectoryError:
        found = 0  # a single file, before there were sharded checkpoints
    except (OSError, UserError):
        return  # a damaged checkpoint is reported elsewhere
    if found != FORMAT:
        raise UserError(
            f"{path} is a checkpoint of format {found}, and this version reads format {FORMAT}; "
            f"continue with the version that wrote it, or delete {path.parent} to start anew"
        )


def read_state(path: Path) -> dict[str, Any]:
    """What was saved beside a checkpoint's tensors, including its `step`."""
    return read_json(path / STATE, {"step": int})


def check_intact(path: Path, ranks: Ranks) -> None:
    """Compare a checkpoint's files with their recorded checksums; the ranks share the work,
    and agree.

    Raises:
        UserError: naming the first file that is missing or has changed.
    """
    for names in ranks.gather(_damaged(path, ranks)):
        for name in names:
            raise UserError(
                f"{path / name} is missing or has changed since it was written; choose another "
                "checkpoint, or put a copy back"
            )


def read_tensors(path: Path, tensors: Mapping[str, Any], ranks: Ranks) -> None:
    """Read a checkpoint in place into tensors of the same names, however they are sharded now.

    Raises:
        UserError: for tensors that the checkpoint lacks, or has in another shape.
    """
    try:
        dcp.load(dict(tensors), storage_reader=IndexReader(path), no_dist=ranks.count == 1)
    except (*UNREADABLE, RuntimeError, ValueError, KeyError, dcp.api.CheckpointException) as error:
        raise UserError(f"{path} does not fit this training: {_reason(error)}") from error


def load_weights_at(
    folder: Path, step: int, module: nn.Module, *, averaged: bool, verify: bool = True
) -> None:
    """Read the weights that a training in `folder` had at a step, if that checkpoint still exists.

    Frozen weights of the module, which no checkpoint holds, stay as they are.

    Args:
        averaged: whether the training averages its weights; then the average is read.
        verify: compare the checkpoint's files with their recorded checksums.

    Raises:
        UserError: for a step whose checkpoint is missing or damaged, or is of another module.
    """
    kept_steps = {step_of(path): path for path in checkpoints(folder)}
    path = kept_steps.get(step)
    if path is None:
        kept = ", ".join(map(str, kept_steps)) or "none"
        raise UserError(
            f"checkpoint is {step}, which {folder} does not have; it has {kept} "
            "(training.keep_every keeps more)"
        )

    alone = Ranks(torch.device("cpu"))
    if verify:
        check_intact(path, alone)
    read_tensors(path, {"model": _trained_state(module)}, alone)
    if averaged:
        trained = {}
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                trained[name] = parameter.detach()
        read_tensors(path, {"average": trained}, alone)


def training_tensors(
    module: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None = None
) -> dict[str, Any]:
    """All tensors of a training by name: weights and buffers, the optimizer's moments, and the
    average of the weights.

    Frozen weights are not included: the training starts with the same ones every time.
    """
    if not optimizer.state:
        prime(optimizer)
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}

    moments = {}
    for parameter, state in optimizer.state.items():
        moments[names[parameter]] = {name: _plain(tensor) for name, tensor in state.items()}
    tensors: dict[str, Any] = {"model": _trained_state(module), "optimizer": moments}
    if average:
        tensors["average"] = average.tensors()
    return tensors


def _trained_state(module: nn.Module) -> dict[str, Any]:
    """Weights and buffers by name, without frozen weights."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def _plain(tensor: Tensor) -> Tensor | dict[str, Tensor]:
    """The tensor, or the tensors that make up a quantized one, which share its memory."""
    if is_traceable_wrapper_subclass(tensor) and not is_sharded(tensor):
        return {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}
    return tensor


def _damaged(path: Path, ranks: Ranks) -> list[str]:
    """Files of a checkpoint that are not as they were written, of those that this rank looks at."""
    try:
        files = read_json(path / MANIFEST, {str: str})
        shares = sorted(files.items())[ranks.rank :: ranks.count]
        return [
            name
            for name, digest in shares
            if not (path / name).is_file() or sha256(path / name) != digest
        ]
    except (OSError, UserError):
        return [MANIFEST]


def _empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _reason(error: BaseException) -> str:
    """The last line of an error that says something;
    those of torch's checkpoints wrap the ranks' tracebacks."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        wrapped = next(iter(error.failures.values()))
        error = wrapped[0] if isinstance(wrapped, tuple) else wrapped
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
