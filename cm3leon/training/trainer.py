"""The training loop, the same for every stage that trains: image tokenizer, retriever, pretraining,
fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import replace
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
from cm3leon.training.device import autocast
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
"""(module, micro-batch) -> mean loss and figures to record; those named `tokens`, `images`,
`flops` give rates."""


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
    """Trains `module` in place, from the newest checkpoint in `folder` if there is one.

    All randomness of a step is a function of (seed, step), so that a resumed run equals an
    uninterrupted one bit for bit. Figures go to `log.jsonl` and the loggers, what went wrong to
    `events.jsonl`, in `folder`. A step whose loss or gradient is not finite changes no weight.

    Nothing in a step waits for the device: batches are made in a thread, the ranks' one reduction
    is on the device, and the host reads a step's loss after it has launched the next step. Several
    ranks learn there, too, that one of them was asked to stop: they end the step in which it was,
    and the next one. One rank stops at its next micro-batch.

    Args:
        callback: called as (step, loggers) now and then, on all ranks; the loggers take images and
            tables, and are None but on the first. Figures that it returns go
            to `validation.jsonl` and the loggers.
        clipped: modules whose gradients are clipped by their own norms (networks with losses of
            their own); those of the whole module are if there is none.
        ranks: the processes that train together, each with its share of the batches; `module` is
            sharded already.
        resume_from: folder of a finished training whose weights, optimizer, data and steps this one
            goes on from.
        peak_flops: FLOP/s of the ranks' devices together, for the share of it that is used (MFU).
        tracking: the loggers; None = TensorBoard's files.

    Returns:
        the records of the whole run, on the first rank.

    Raises:
        FloatingPointError: for a training that diverged: after too many skipped steps in a row, a
            last step that was skipped, or weights after it with which no finite loss is computed.
            The last good checkpoint is left as it is, and the same training goes on from there.
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
    outcome: Outcome | None = None  # of the last step, until it is read

    def settle() -> bool:
        """Reads what the last step came to, and writes it down;
        whether a rank was asked to stop in it."""
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

        skipped_in_a_row += 1
        bad_here = ranks.gather(done.bad_gradients())
        names = sorted({name for names in bad_here for name in names})
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
        """Ids of the documents in the step's batch, those of all ranks."""
        with source.idle():
            own = split.ids(done.parts)
        return [id_ for ids in ranks.gather(own) for id_ in ids]

    def checkpoint(data: dict[str, Any], *, wait: bool) -> None:
        place = {
            "step": step,
            "first": first,
            "skipped_in_a_row": skipped_in_a_row,
            "losses": spikes.state(),
            "seed": seed,
        }
        place["meter"] = ranks.gather(meter.state())
        states = ranks.gather(data)
        saved.save(
            tensors, {**place, "data": merge_states(states) if ranks.count > 1 else data}, wait=wait
        )

    def validate() -> None:
        """Calls the callback; alone, a signal stops it at once,
        and a checkpoint says that it is still to be made."""
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
        validated = ranks.gather(log.has_validation(step))[0]
        if callback and step > first and step % config.callback_every == 0 and not validated:
            validate()  # a kill during it has left a checkpoint, but no record
        whole: Tensor | float = 0.0
        if ranks.count > 1 and step < last:
            whole = ranks.tensor(ranks.sum([source.coming_weight()]))[0]
        while step < last:
            torch.manual_seed(nth_seed(seed, step))
            set_rate(optimizer, rate := learning_rate(step - first, config))
            before = source.state
            ready = source.next()
            if ranks.count == 1:
                whole = sum(ready.weights)
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
                # FSDP takes the mean of the ranks' gradients; the sum is what is wanted.
                (part_loss * _float32(weight * ranks.count / whole)).backward()
                value = value + part_loss.detach() * _float32(weight / whole)
                measured.append(figures)
            # Not before the step is complete: one that a signal cuts short is made again.
            for figures in measured:
                meter.add(figures)

            # What the next batch weighs is told the other ranks with this step's loss.
            coming = source.coming_weight() if ranks.count > 1 and step + 1 < last else 0.0
            asked = bool(signals.received)
            sums = reduced(value, gradients, ranks, coming_weight=coming, asked=asked)
            whole = sums.coming_weight
            gradients.clip(sums.norms, config.clip)
            this = Outcome(step + 1, sums, gradients, ready.parts)
            if late:
                optimizer.found_inf = sums.bad  # type: ignore[attr-defined]  # GradScaler sets it so, too
            if late or not this.bad:
                optimizer.step()
            if average:
                average.update(step + 1 - first, sums.bad)
            optimizer.zero_grad()
            step += 1
            log.advance()

            # The device has this step's work by now; the host looks at the one before.
            stop = settle()
            outcome = this
            records = step % config.log_every == 0 or step == last
            validates = callback is not None and step % config.callback_every == 0
            if records or validates or stop:
                stop |= settle()
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
    """Restores the newest checkpoint of the folder, or of the training that is gone on from;
    what else was saved."""
    saved.begin()
    path, state = saved.newest(), None
    if path:
        state = read_state(path)
    elif resume_from:
        others = checkpoints(resume_from)
        if not others:
            raise UserError(
                f"training.start: {resume_from} has no checkpoint to go on from; set "
                "start_with=weights"
            )
        path = others[-1]
        check_intact(path, ranks)
        state = {**read_state(path), "skipped_in_a_row": 0, "losses": [], "meter": []}
        state["first"] = state["step"]
    if path is None or state is None:
        return {"step": 0, "first": 0, "skipped_in_a_row": 0, "losses": [], "meter": []}
    read_tensors(path, tensors, ranks)
    batches.load_state_dict(state["data"])
    # Checkpoints did not always have the meter, and called the skipped steps `in_row`.
    return {"meter": [], "skipped_in_a_row": state.get("in_row", 0), **state}


def _float32(number: Tensor | float) -> Tensor | float:
    """A share of the loss in its precision: a product with a float64 tensor would not be."""
    return number.float() if isinstance(number, Tensor) else number


def _sound(
    module: nn.Module,
    loss: Loss,
    part: Any,
    device: torch.device,
    config: TrainingConfig,
    ranks: Ranks,
) -> bool:
    """Whether the weights are finite after the last step, and so is a loss with them.

    Weights may be finite and still so large that nothing can be computed with them. Sharded ones
    are not tried here: the decoder's validation does that. The forward pass of a training may
    change buffers, which are put back.
    """
    # What is kept, that is: CLIP's mask of minus infinities is a buffer too,
    # but no part of what is trained.
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
    """The record with the share of the devices' peak that the model's FLOPs are,
    where both are known."""
    if peak_flops and "flops_per_second" in record:
        return {**record, "mfu": record["flops_per_second"] / peak_flops}
    return record
