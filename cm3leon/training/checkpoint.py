"""Training checkpoints: folders `step_00000123`, written whole or not at all,
readable on any number of ranks.

The tensors are written by torch.distributed.checkpoint, each rank its own shards, from a copy in
memory while the training goes on. A folder gets its name when all files and their checksums are on
the disk.
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
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from cm3leon.io import read_json, sha256, sync_to_disk, write_json
from cm3leon.permissions import check_folder_readable
from cm3leon.training.average import WeightAverage
from cm3leon.training.distributed import Ranks
from cm3leon.training.index_reader import UNREADABLE, IndexReader
from cm3leon.training.optimizer import prime
from cm3leon.training.steps import MANIFEST, checkpoint_of, checkpoints, numbered, step_of
from cm3leon.types import UserError
from cm3leon.weights import check_fit, read_weights, save_tensors

# One process without a group is meant, not forgotten; torch says so in a thread of its own.
warnings.filterwarnings(
    "ignore", message=".*assuming the intent is to (save|load) in a single process.*"
)

LAST_WAIT = 30.0
"""Seconds; longer than it takes to notice that another rank is lost."""

FORMAT = 1
"""Of the files in a checkpoint's folder; raised when an older version could not read them,
or this one not its."""
STATE = "state.json"


class Checkpoints:
    """The checkpoints of one training, in one folder.

    Args:
        folder: seen by all ranks.
        keep: newest checkpoints that are kept.
        keep_every: steps whose multiples are kept for good.
        warn: is given a sentence when a checkpoint could not be written.
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
        """Makes the folder, without what a kill may have left half written in it."""
        if self.ranks.first:
            self._folder.mkdir(parents=True, exist_ok=True)
            for left in self._folder.glob(".partial_*"):
                shutil.rmtree(left, ignore_errors=True)
        self.ranks.barrier()

    def save(
        self, tensors: Mapping[str, Any], state: Mapping[str, Any], *, wait: bool = False
    ) -> None:
        """Starts to write `step_<state["step"]>`, once the one before is finished;
        to its end with `wait`.

        A checkpoint that fails is told about and leaves the older ones as they are. `tensors` may
        be nested by names; they are copied before this returns. `state` must be JSON. All ranks
        have to call it.
        """
        self.finish()
        self._writing_to = final = checkpoint_of(self._folder, state["step"])
        partial = self._folder / f".partial_{state['step']:08d}"
        if self.ranks.first:
            self._attempt(lambda: _empty(partial))
        self.ranks.barrier()
        self._writing = _Writing(
            tensors, {**state, "ranks": self.ranks.count, "format": FORMAT}, partial, final, self
        )
        if wait:
            self.finish()

    def finish(self) -> None:
        """Waits for the checkpoint that is being written, if one is."""
        if self._writing:
            self._writing.thread.join()
            self.poll()

    def close(self) -> None:
        """Gives the checkpoint that is being written some time,
        when the training ends by an error."""
        if self._writing:
            self._writing.thread.join(LAST_WAIT)

    def poll(self) -> None:
        """Tells about a checkpoint that has failed since; does not wait."""
        if self._writing and not self._writing.thread.is_alive():
            error, self._writing = self._writing.error, None
            if error:
                self._warn(
                    f"{self._writing_to}: no checkpoint was written ({_reason(error)}); the older "
                    "one is kept, and the training goes on and tries again"
                )

    def newest(self) -> Path | None:
        """The newest checkpoint whose files are as they were written;
        damaged ones are told about and passed over.

        The ranks share the work of reading all files, and agree.

        Raises:
            UserError: for one of a format that this version does not read, or that this user may
                not read: an older one is no answer to that.
        """
        for path in reversed(numbered(self._folder)):
            check_folder_readable(path)
            check_format(path)
            damaged = [
                name for names in self.ranks.gather(_damaged(path, self.ranks)) for name in names
            ]
            if damaged:
                fault = f"{damaged[0]} is missing or has changed"
            elif (step := read_state(path)["step"]) != step_of(path):
                fault = f"it is a copy of the checkpoint of step {step}"
            else:
                return path
            if self.ranks.first:
                self._warn(f"{path} is passed over: {fault}")
        return None

    def last(self) -> Path | None:
        """The newest complete checkpoint, if there is one."""
        return next(reversed(checkpoints(self._folder)), None)

    def _attempt(self, action: Callable[[], None]) -> None:
        """Does something that the disk may refuse; what follows will fail with a reason, too."""
        try:
            action()
        except OSError as error:
            self._warn(f"{error.filename or self._folder}: {error.strerror}")

    def prune(self, newest: int) -> None:
        """Deletes all but the newest checkpoints and those that are kept for good.

        Those of later steps than `newest`, the one just written, were passed over when the training
        started: they are not counted, and stay until the training has come as far.
        """
        steps = {
            step: path for path in checkpoints(self._folder) if (step := step_of(path)) is not None
        }
        written = [step for step in steps if step <= newest]
        for step in written[: -self._keep]:
            if not (self._keep_every and step % self._keep_every == 0):
                shutil.rmtree(steps[step], ignore_errors=True)


class _Writing:
    """One checkpoint on its way to the disk: a thread waits for the shards, checks them in,
    and gives the name."""

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
            self._future.result()
            rank, count = self._owner.ranks.rank, self._owner.ranks.count
            own = {path.name: sha256(path) for path in self._partial.glob(f"__{rank}_*")}
            write_json(self._partial / f"rank_{rank}.json", own, indent=None, sync=True)
            if rank == 0:
                self._complete([self._partial / f"rank_{other}.json" for other in range(count)])
        except BaseException as error:
            self.error = error

    def _complete(self, lists: list[Path]) -> None:
        limit = time.monotonic() + self._owner.patience
        while not all(path.is_file() for path in lists):
            if time.monotonic() > limit:
                raise TimeoutError(
                    f"no word of its shards from {sum(not path.is_file() for path in lists)} ranks"
                )
            time.sleep(0.05)
        write_json(self._partial / STATE, self._state, indent=None, sync=True)
        files = {name: digest for path in lists for name, digest in read_json(path).items()}
        files |= {name: sha256(self._partial / name) for name in (".metadata", STATE)}
        for path in lists:
            path.unlink()
        write_json(self._partial / MANIFEST, files, indent=None, sync=True)
        sync_to_disk(self._partial)
        shutil.rmtree(self._final, ignore_errors=True)
        self._partial.rename(self._final)
        sync_to_disk(self._final.parent)
        self._owner.prune(self._state["step"])


def check_format(path: Path) -> None:
    """Raises UserError for a checkpoint that another version of the code wrote
    in a way that this one does not read."""
    try:
        found = read_state(path).get("format", 1)
    except NotADirectoryError:
        found = 0  # a single file, before there were sharded checkpoints
    except (OSError, UserError):
        return  # damaged, which is for others to say
    if found != FORMAT:
        raise UserError(
            f"{path} is a checkpoint of format {found}, and this version reads format {FORMAT}; go "
            f"on with the version that wrote it, or delete {path.parent} to begin anew"
        )


def read_state(path: Path) -> dict[str, Any]:
    """What was saved beside the tensors of a checkpoint, its `step` among it."""
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
                f"{path / name} is missing or has changed since it was written; take another "
                "checkpoint, or put a copy back"
            )


def read_tensors(path: Path, tensors: Mapping[str, Any], ranks: Ranks) -> None:
    """Reads a checkpoint into tensors of the same names, in place, however they are sharded now.

    Raises:
        UserError: for tensors that it lacks, or that have another shape there.
    """
    try:
        dcp.load(dict(tensors), storage_reader=IndexReader(path), no_dist=ranks.count == 1)
    except (*UNREADABLE, RuntimeError, ValueError, KeyError, dcp.api.CheckpointException) as error:
        raise UserError(f"{path} does not fit this training: {_reason(error)}") from error


def load_weights_at(
    folder: Path, step: int, module: nn.Module, *, averaged: bool, verify: bool = True
) -> None:
    """Reads the weights that a training in `folder` had at a step,
    if its checkpoint is still there.

    Frozen weights of the module, which no checkpoint holds, stay as they are.

    Args:
        averaged: whether the training averages its weights; the average is what is read then.
        verify: compare the checkpoint's files with their recorded checksums.

    Raises:
        UserError: for a step whose checkpoint is not there or is damaged, or one of another module.
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
        trained = {
            name: each.detach() for name, each in module.named_parameters() if each.requires_grad
        }
        read_tensors(path, {"average": trained}, alone)


def training_tensors(
    module: nn.Module, optimizer: torch.optim.Optimizer, average: WeightAverage | None = None
) -> dict[str, Any]:
    """All tensors of a training by name: weights and buffers, the optimizer's moments,
    the average of the weights.

    Frozen weights are not among them: they are those that the training starts with every time.
    """
    if not optimizer.state:
        prime(optimizer)
    names: dict[Tensor, str] = {parameter: name for name, parameter in module.named_parameters()}
    moments = {
        names[parameter]: {name: _plain(tensor) for name, tensor in state.items()}
        for parameter, state in optimizer.state.items()
    }
    tensors: dict[str, Any] = {"model": _trained_state(module), "optimizer": moments}
    return {**tensors, "average": average.tensors()} if average else tensors


def _trained_state(module: nn.Module) -> dict[str, Any]:
    """Weights and buffers by name, without frozen weights."""
    frozen = {name for name, parameter in module.named_parameters() if not parameter.requires_grad}
    return {name: tensor for name, tensor in module.state_dict().items() if name not in frozen}


def _plain(tensor: Tensor) -> Tensor | dict[str, Tensor]:
    """A tensor, or the ones that make up a quantized one; they share its memory."""
    if is_traceable_wrapper_subclass(tensor) and not isinstance(tensor, DTensor):
        return {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}
    return tensor


def save_weights(path: Path, module: nn.Module | Mapping[str, Tensor]) -> None:
    """Parameters and buffers, of a module or by name, as safetensors."""
    state = module.state_dict() if isinstance(module, nn.Module) else module
    save_tensors(path, state)


def load_weights(path: Path, module: nn.Module) -> None:
    """Reads what `save_weights` wrote.

    Raises:
        UserError: for a file that is missing or damaged,
            or naming the keys or shapes that do not fit the module.
    """
    given = read_weights(path)
    check_fit(path, given, module.state_dict())
    module.load_state_dict(given)


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
