"""The training loop of every stage that trains: image tokenizer, retriever, pretraining,
fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cm3leon.loggers.base import Loggers
from cm3leon.objectives.block_stream import merge_states
from cm3leon.seeds import nth_seed
from cm3leon.training.average import WeightAverage
from cm3leon.training.checkpoint import (
    Checkpoints,
    check_intact,
    read_state,
    read_tensors,
    training_tensors,
)
from cm3leon.training.compilation import recompile_limits
from cm3leon.training.config import TrainingConfig
from cm3leon.training.device import autocast, seed_devices
from cm3leon.training.distributed import Ranks, local
from cm3leon.training.faults import Spikes, diagnosis, diverged
from cm3leon.training.log import Tracking, TrainingLog
from cm3leon.training.meter import Figure, Meter, Record, gpu_memory
from cm3leon.training.optimizer import new_optimizer, set_rate
from cm3leon.training.outcome import (
    Gradients,
    Outcome,
    adds_to_gradients,
    reduced,
    skips_on_device,
)
from cm3leon.training.precision import chosen_precision
from cm3leon.training.prefetch import WHOLE, Batches, BatchSplit, Prefetch
from cm3leon.training.schedule import learning_rate
from cm3leon.training.signals import Signals
from cm3leon.training.steps import checkpoints
from cm3leon.types import Again, NotFinite, UserError
from cm3leon.weights import is_finite

Loss = Callable[[Any, Any], tuple[Tensor, Mapping[str, Figure]]]
"""(module, micro-batch) -> mean loss, and figures to record; the figures `tokens`, `images` and
`flops` are recorded as rates."""


def train(
    module: nn.Module,
    loss: Loss,
    batches: Batches,
    config: TrainingConfig,
    *,
    folder: Path,
    device: torch.device,
    seed: int,
    title: str,
    callback: Callable[[int, Loggers | None], dict[str, float] | None] | None = None,
    clipped: Sequence[nn.Module] = (),
    split: BatchSplit = WHOLE,
    ranks: Ranks | None = None,
    resume_from: Path | None = None,
    peak_flops: float | None = None,
    tracking: Tracking | None = None,
) -> list[Record]:
    """Train `module` in place, from the newest checkpoint in `folder` if there is one.

    All randomness of a step is a function of (seed, step), so a resumed run equals an uninterrupted
    one bit for bit. Figures go to `log.jsonl` and the loggers, faults to `events.jsonl`, both in
    `folder`. A step whose loss or gradient is not finite changes no weight.

    Nothing in a step waits for the device (see `outcome.py`): batches are made in a thread, the
    ranks' one reduction is on the device, and the host reads a step's loss after launching the next
    step. This is also how several ranks learn that one of them was asked to stop: they finish that
    step and the next one. A single rank stops at its next micro-batch.

    Args:
        callback: called as (step, loggers) every `callback_every` steps on all ranks. The loggers
            take images and tables; they are None except on the first rank. Returned figures go to
            `validation.jsonl` and the loggers.
        clipped: modules whose gradients are clipped by their own norms (networks with losses of
            their own); by default the whole module is clipped together.
        ranks: the processes that train together, each with its share of the batches; `module` is
            sharded already.
        resume_from: folder of a finished training whose weights, optimizer, data and steps this
            training continues.
        peak_flops: FLOP/s of the ranks' devices together, to record the share of them that is used
            (MFU).
        tracking: the loggers; None: TensorBoard.

    Returns:
        the records of the whole run, on the first rank.

    Raises:
        FloatingPointError: for a training that diverged: too many skipped steps in a row, a skipped
            last step, or final weights that give no finite loss. The last good checkpoint stays,
            and the same command continues from it.
        Again: after SIGTERM, SIGUSR1 or SIGUSR2, once a checkpoint is written.
        UserError: for a checkpoint that does not fit.
    """
    ranks = ranks or Ranks(device)
    config = replace(config, precision=chosen_precision(config.precision, folder, ranks))
    if not ranks.joined:
        module.to(device)
    module.train()
    optimizer = new_optimizer(module, config)
    average = WeightAverage(module, config.average_decay) if config.average_decay else None
    tensors = training_tensors(module, optimizer, average)

    # Start where the newest checkpoint stopped.
    warnings: list[str] = []
    saved = Checkpoints(
        folder,
        ranks,
        keep=config.keep_checkpoints,
        keep_every=config.keep_every,
        warn=warnings.append,
    )
    start = _resume(folder, resume_from, saved, tensors, batches, ranks)
    step, first, skipped_in_a_row = start["step"], start["first"], start["skipped_in_a_row"]
    spikes = Spikes(config.spike, start["losses"])
    last = first + config.steps

    gradients = Gradients(module, clipped or (module,), ranks)
    late = skips_on_device(optimizer)
    outcome: Outcome | None = None
    """The last step's, until the host has read it."""

    def settle() -> bool:
        """Read and record the last step's outcome; return whether a rank was asked to stop."""
        nonlocal outcome, skipped_in_a_row
        if outcome is None:
            return False
        done, outcome = outcome, None
        figures = {"loss": done.loss, "gradient_norm": done.norm}
        if not done.bad:
            skipped_in_a_row = 0
            meter.add(figures)
            if spike := spikes.look_at(done.loss):
                log.event(done.step, "loss spike", **spike, documents=documents(done))
            return done.asked

        # The step was skipped. The event names what was not finite, on any rank.
        skipped_in_a_row += 1
        names = sorted(set(chain.from_iterable(ranks.gather(done.bad_gradients()))))
        log.event(done.step, "step skipped", **figures, parameters=names, documents=documents(done))
        if skipped_in_a_row > config.bad_steps:
            saved.finish()
            raise diverged(title, trouble(done), saved.last())
        return done.asked

    def trouble(done: Outcome) -> str:
        return diagnosis(
            step=done.step, skipped_in_a_row=skipped_in_a_row, loss=done.loss, norm=done.norm
        )

    def documents(done: Outcome) -> list[str]:
        """Ids of the documents in the step's batch, on all ranks."""
        with source.idle():
            own = split.ids(done.parts)
        return list(chain.from_iterable(ranks.gather(own)))

    def checkpoint(data: dict[str, Any], *, wait: bool) -> None:
        """Save a checkpoint with the state of the data from which the next step draws."""
        state = {
            "step": step,
            "first": first,
            "skipped_in_a_row": skipped_in_a_row,
            "losses": spikes.state(),
            "seed": seed,
        }
        state["meter"] = ranks.gather(meter.state())
        states = ranks.gather(data)
        state["data"] = merge_states(states) if ranks.count > 1 else data
        saved.save(tensors, state, wait=wait)

    def validate() -> None:
        """Call the callback. A signal stops a single rank at once, with a checkpoint from which
        the validation is made again."""
        assert callback is not None
        try:
            with (
                source.idle(),
                meter.paused(),
                nullcontext() if ranks.joined else signals.at_once(),
            ):
                log.validation(step, callback(step, log.images) or {})
        except Again as error:
            checkpoint(source.state, wait=True)
            raise Again(f"{title}: {error} in the validation after step {step}") from error
        except NotFinite as error:
            raise diverged(title, str(error), saved.last()) from error
        module.train()

    def stopped() -> Again:
        return Again(f"{title}: stopped at step {step} by {signals.received or 'a signal'}")

    log = TrainingLog(
        folder, ranks, tracking or Tracking(), title=title, step=step, first=first, last=last
    )
    meter = Meter(ranks)
    meter.load(start["meter"])
    limits = recompile_limits(warnings.append)
    source = Prefetch(batches, split, count=last - step, device=device)
    with (
        closing(saved),
        closing(log),
        closing(source),
        limits,
        Signals(noted=True) as signals,
    ):
        # A kill during a validation has left a checkpoint, but no record of the validation.
        validated = ranks.gather(log.has_validation(step))[0]
        if callback and step > first and step % config.callback_every == 0 and not validated:
            validate()

        # The loss is a mean over the batches of all ranks, so each must know their whole weight.
        # Later steps learn it from the reduction of the step before.
        whole: Tensor | float = 0.0
        if ranks.count > 1 and step < last:
            whole = ranks.tensor(ranks.sum([source.coming_weight()]))[0]

        while step < last:
            seed_devices(nth_seed(seed, step))
            set_rate(optimizer, rate := learning_rate(step - first, config))
            before = source.state
            ready = source.next()
            if ranks.count == 1:
                whole = sum(ready.weights)

            # Forward and backward passes, one micro-batch at a time.
            value = torch.zeros((), device=device)
            measured = []
            for number, (part, weight) in enumerate(zip(ready.parts, ready.weights, strict=True)):
                if ranks.count == 1 and signals.received:
                    settle()
                    checkpoint(before, wait=True)
                    raise stopped()
                adds_to_gradients(module, number + 1 < len(ready.parts))
                with autocast(device, config.precision):
                    part_loss, figures = loss(module, part)
                # FSDP averages the gradients of the ranks, where their sum is needed.
                (part_loss * _float32(weight * ranks.count / whole)).backward()
                value = value + part_loss.detach() * _float32(weight / whole)
                measured.append(figures)
            # Only now: a step that a signal cuts short is made again, and must not count twice.
            for figures in measured:
                meter.add(figures)

            # One reduction: the loss, the norms, and how much the next batch weighs.
            coming = source.coming_weight() if ranks.count > 1 and step + 1 < last else 0.0
            asked = bool(signals.received)
            sums = reduced(value, gradients, ranks, coming_weight=coming, asked=asked)
            whole = sums.coming_weight
            gradients.clip(sums.norms, config.clip)
            this = Outcome(step + 1, sums, gradients, ready.parts)

            # Update the weights, unless the step is bad. Where the optimizer can decide that on the
            # device (`late`), the host does not wait to know.
            if late:
                optimizer.found_inf = sums.bad  # type: ignore[attr-defined]  # GradScaler sets it so, too
            if late or not this.bad:
                optimizer.step()
            if average:
                average.update(step + 1 - first, sums.bad)
            optimizer.zero_grad()
            step += 1
            log.advance()

            # The device is busy with this step now; meanwhile the host reads the one before. A
            # record, a validation or a stop needs this step's outcome too.
            stop = settle()
            outcome = this
            records = step % config.log_every == 0 or step == last
            validates = callback is not None and step % config.callback_every == 0
            if records or validates or stop:
                stop |= settle()

            # The weights of the last step are the result: they must be usable.
            if step == last:
                saved.finish()
                if skipped_in_a_row:
                    raise diverged(title, trouble(this), saved.last())
                if ranks.any(not _sound(module, loss, ready.parts[0], device, config, ranks)):
                    why = f"after step {step}, its last one, weights or loss are NaN or infinite"
                    raise diverged(title, why, saved.last())

            if records:
                rates = _with_mfu(meter.read(), peak_flops)
                log.record({"step": step, "learning_rate": rate, **rates, **gpu_memory(device)})

            # No checkpoint while steps are skipped: it might hold a training that has diverged.
            saves = step % config.checkpoint_every == 0 and not skipped_in_a_row
            stops = ranks.count > 1 and stop and step < last
            if saves or step == last or stops:
                checkpoint(source.state, wait=step == last or stops)
            if stops:
                raise stopped()
            if validates:
                validate()

            saved.poll()
            while warnings:
                log.event(step, "warning", message=warnings.pop(0))
        if ranks.any(bool(signals.received)):
            raise Again(f"{title}: stopped at its end by {signals.received or 'a signal'}")

    if average:
        average.install()
    module.eval()
    return log.records


def _resume(
    folder: Path,
    resume_from: Path | None,
    saved: Checkpoints,
    tensors: Mapping[str, Any],
    batches: Batches,
    ranks: Ranks,
) -> dict[str, Any]:
    """Restore the newest checkpoint of the folder, or else of `resume_from`;
    return its other state."""
    saved.begin()
    path, state = saved.newest(), None
    if path:
        state = read_state(path)
    elif resume_from:
        others = checkpoints(resume_from)
        if not others:
            raise UserError(
                f"training.start: {resume_from} has no checkpoint to continue from; set "
                "training.start_with=weights"
            )
        path = others[-1]
        check_intact(path, ranks)

        # Another training: its steps are counted from here, and its losses are not compared with.
        state = {**read_state(path), "skipped_in_a_row": 0, "losses": [], "meter": []}
        state["first"] = state["step"]
    if path is None or state is None:
        return {"step": 0, "first": 0, "skipped_in_a_row": 0, "losses": [], "meter": []}

    read_tensors(path, tensors, ranks)
    batches.load_state_dict(state["data"])
    # Older checkpoints have no meter, and call the skipped steps `in_row`.
    return {"meter": [], "skipped_in_a_row": state.get("in_row", 0), **state}


def _float32(number: Tensor | float) -> Tensor | float:
    """A share of the loss in the loss's precision; multiplying by float64 would change it."""
    return number.float() if isinstance(number, Tensor) else number


def _sound(
    module: nn.Module,
    loss: Loss,
    part: Any,
    device: torch.device,
    config: TrainingConfig,
    ranks: Ranks,
) -> bool:
    """Whether the final weights are finite and give a finite loss.

    Finite weights may be so large that nothing can be computed with them. Sharded ones are not
    tried here: the validation does that. The forward pass of a training may change buffers, which
    are then restored.
    """
    # Only saved tensors count: CLIP's mask of minus infinities is a buffer too, but is not saved.
    if not all(is_finite(local(tensor)) for tensor in module.state_dict().values()):
        return False
    if ranks.joined:
        return True

    before = [buffer.clone() for buffer in module.buffers()]
    with autocast(device, config.precision):
        value, _ = loss(module, part)
    with torch.no_grad():
        for buffer, old in zip(module.buffers(), before, strict=True):
            buffer.copy_(old)
    return math.isfinite(float(value.detach()))


def _with_mfu(record: Record, peak_flops: float | None) -> Record:
    """Add to a record the share of the devices' peak that the model's FLOPs are,
    if both are known."""
    if peak_flops and "flops_per_second" in record:
        return {**record, "mfu": record["flops_per_second"] / peak_flops}
    return record
