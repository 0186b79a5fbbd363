"""train: from a recipe to a trained network, its records and its checkpoints.

Read `train` first, from top to bottom; then `Loop.fit` and `Loop._step`. The validation part is
for looking while training goes on; the test part is read once, by the last weights.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

import rankwise
from rankwise import accounting, checkpoint, data, distributed
from rankwise.errors import FactorizeError, NonFiniteLossError
from rankwise.training import records, setup
from rankwise.training.bleu import with_bleu
from rankwise.training.carried import CarriedState
from rankwise.training.clock import KEPT, Clock
from rankwise.training.interrupt import Interrupted, StopRequest, listen
from rankwise.training.journal import Journal
from rankwise.training.recipe import Recipe
from rankwise.training.report import Progress, Reporter, Result, Silent, Switch
from rankwise.training.schedule import Schedule
from rankwise.training.task import TASKS, Score, evaluate


def train(
    recipe: Recipe, *, resume: str | Path | None = None, report: Reporter | None = None
) -> Result:
    """Train what a recipe describes; under torchrun, by all workers together.

    Args:
        recipe: all that decides the result.
        resume: folder of a run (or one of its checkpoints) to go on from, in the same folder.
        report: shows the run; nothing is shown without it.

    Returns:
        Accuracies, sizes and times; the same as the `finish` line of the records.

    Raises:
        OptionError: the recipe names something that does not exist, or its folder is taken.
        CheckpointError: nothing to resume, another recipe or other data than the saved run's,
            or nothing can be written.
        NonFiniteLossError: the loss left the numbers; earlier checkpoints stay.
        Interrupted: SIGINT or SIGTERM; the run is saved.
    """
    began = time.perf_counter()
    methods = setup.build_methods(recipe.method, recipe.method_options)
    device = distributed.initialize()
    if recipe.threads is not None:
        torch.set_num_threads(recipe.threads)
    splits = setup.load_data(recipe, (report or Silent()).loading)
    steps_per_epoch = data.steps_per_epoch(splits.train, recipe.batch_size)
    saved = None if resume is None else setup.load(resume, recipe, splits)
    out = Path(distributed.share(str(saved.path.parent if saved else records.place(recipe))))
    model = setup.build_model(recipe, splits, device)
    begun = setup.begin(model, recipe, saved)
    dense = setup.size(model, *data.example(splits.train))
    optimizer = setup.make_optimizer(recipe, model)
    with Journal(out, report) as journal, data.released(splits):
        loop = Loop(recipe, splits, device, journal, began, CarriedState(model))
        loop.run = rankwise.start(
            model,
            methods,
            optimizer,
            steps_per_epoch=steps_per_epoch,
            total_steps=recipe.epochs * steps_per_epoch,
            sample=data.example(splits.train)[0],
            clip_norm=recipe.clip_norm,
            wrap=setup.wrapper(recipe, methods),
            probe=loop.probe,
            calibrate=loop.calibration,
            on_event=loop.on_event,
            seed=recipe.seed,
            resume=None if saved is None else saved.path,
        )
        if saved is not None:
            loop.restore(saved)
        elif accounting.parameters(model).stored != dense[0][0]:
            loop.clock.new_phase()  # low-rank from the first step
        loop.follow_schedule()
        journal.start(recipe, splits, device, methods, saved, loop.run, begun)
        with listen() as stop:
            loop.fit(stop)
        return loop.finish(dense)


# Reading a loss waits for the GPU, and agreeing costs a message: not at every step there.
LOOK_EVERY = 10


class Loop:
    """Epochs and steps over the training examples, from a position that can be saved."""

    run: rankwise.Run
    scheduler: LambdaLR

    def __init__(
        self,
        recipe: Recipe,
        splits: data.DataSet,
        device: torch.device,
        journal: Journal,
        began: float,
        carried: CarriedState,
    ) -> None:
        self.recipe, self.splits, self.device, self.journal = recipe, splits, device, journal
        self.task = TASKS[splits.task]
        self.steps_per_epoch = data.steps_per_epoch(splits.train, recipe.batch_size)
        self.total = recipe.epochs * self.steps_per_epoch
        self.schedule = Schedule(recipe, self.steps_per_epoch)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.amp == "fp16")
        self.clock = Clock(device)
        self.carried = carried
        self.position = 0  # batches seen; ahead of run.step where the scaler skipped a step
        self.began = began  # moved back by the time that earlier parts of a resumed run took
        self.epoch_loss = 0.0  # sum over the epoch's batches so far
        self.switches: list[dict[str, Any]] = []
        self._unseen: list[Tensor] = []
        self._unshown: Switch | None = None
        self._unshown_epochs: list[dict[str, Any]] = []
        at_once = device.type == "cpu" and distributed.workers() == 1
        self._look_every = 1 if at_once else LOOK_EVERY

    def follow_schedule(self) -> None:
        """Give the optimizer the rates of the step that the run is at; a resumed run does, too."""
        self.scheduler = LambdaLR(self.run.optimizer, self.schedule, last_epoch=self.run.step - 1)

    def fit(self, stop: StopRequest) -> None:
        """Train to the end of the recipe."""
        while self.position < self.total:
            epoch, start = divmod(self.position, self.steps_per_epoch)
            self.run.model.train()
            # Closed at once where a step raises or the run stops: batches are prepared ahead.
            with closing(self._batches(epoch, start, self.carried.streams)) as batches:
                for inputs, targets in batches:
                    self._step(inputs, targets)
                    if self.position % self.steps_per_epoch == 0:
                        break
                    if self.position % self._look_every == 0:
                        self._look()
                        self._stop_if_asked(stop)
            self._look()
            self.carried.forget()
            self._end_epoch(epoch)
            self._stop_if_asked(stop)

    def _batches(
        self, epoch: int, start: int = 0, streams: bool = False
    ) -> Generator[tuple[data.Inputs, Tensor]]:
        """This worker's part of a pass over the training examples."""
        return data.batches(
            self.splits.train,
            batch_size=self.recipe.batch_size,
            seed=self.recipe.seed,
            epoch=epoch,
            worker=distributed.worker(),
            workers=distributed.workers(),
            start=start,
            streams=streams,
        )

    def _step(self, inputs: data.Inputs, targets: Tensor) -> None:
        inputs, targets = self._move(inputs), self._move(targets)
        finished = self.run.step
        with self.clock.step():
            self.run.optimizer.zero_grad()
            with self._precision():
                scores = self.carried.scores(self.run.model, inputs)
                loss = self.task.loss(scores, targets, self.recipe.label_smoothing)
            self.position += 1
            self._unseen.append(loss.detach())
            self.scaler.scale(loss).backward()
            try:
                self.scaler.step(self.run.optimizer)
            except FactorizeError:
                self._look()  # weights that a bad loss has just ruined: that is the news
                raise
            self.scaler.update()
        if self.run.step > finished:
            self.scheduler.step()

    def _look(self) -> None:
        """Read the losses since the last look; every worker sees the same mean."""
        epoch = (self.position - 1) // self.steps_per_epoch
        latest = torch.stack(self._unseen).double().mean().item()
        latest = distributed.mean(latest)
        if not math.isfinite(latest):
            since = f"at step {self.position}"
            if len(self._unseen) > 1:
                first = self.position - len(self._unseen) + 1
                since = f"between steps {first} and {self.position}"
            raise self._broken(f"the training loss became {latest} {since} (epoch {epoch + 1})")
        self.epoch_loss += latest * len(self._unseen)
        self._unseen.clear()
        self._show_switch()
        self.journal.report.step(
            Progress(
                epoch=epoch + 1,
                epochs=self.recipe.epochs,
                step=self.position,
                steps=self.total,
                loss=latest,
                lr=float(self.scheduler.get_last_lr()[0]),
                unit=self.task.unit,
                units_per_second=self._speed(self.clock.recent(20)) or 0.0,
            )
        )

    def _broken(self, what: str) -> NonFiniteLossError:
        kept = sorted(self.journal.out.glob("step-*"))
        good = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint was saved yet"
        return NonFiniteLossError(
            f"{what}; training stopped and {good}. Lower lr={self.recipe.lr:g}, lengthen "
            f"lr_warmup_epochs={self.recipe.lr_warmup_epochs:g}, or set "
            f"clip_norm={self.recipe.clip_norm or 1.0:g}"
        )

    def _stop_if_asked(self, stop: StopRequest) -> None:
        number = max(distributed.gather(stop.signal))
        if number:
            self._show_switch(now=True)
            self._save()
            raise Interrupted(self.journal.out, self.run.step, number)

    def _end_epoch(self, epoch: int) -> None:
        score = self.evaluate(self.splits.validation)
        if not math.isfinite(score.loss):
            raise self._broken(f"the validation loss became {score.loss} after epoch {epoch + 1}")
        record = self.journal.record(
            "epoch",
            epoch=epoch + 1,
            step=self.run.step,
            loss=self.epoch_loss / self.steps_per_epoch,
            validation_loss=score.loss,
            validation_accuracy=score.accuracy,
            lr=float(self.scheduler.get_last_lr()[0]),
            step_ms=self.clock.recent(self.steps_per_epoch),
            seconds=self._elapsed(),
        )
        self.epoch_loss = 0.0
        if self.schedule.observe(score.loss):
            self.follow_schedule()
        if (epoch + 1) % self.recipe.checkpoint_every == 0 or epoch + 1 == self.recipe.epochs:
            self._save()
        self._unshown_epochs.append(record)
        self._show_switch()

    def evaluate(self, split: data.Examples) -> Score:
        """Loss and accuracy of the run's model; buffers are worker 0's."""
        distributed.broadcast_buffers(self.run.bare)
        return self._score(self.run.bare, split)

    def probe(self, model: nn.Module) -> float:
        """Mean loss at the beginning of the validation part: what a switch is judged by."""
        return self._score(model, self.splits.validation, units=self.task.probe).loss

    def calibration(self) -> Iterator[data.Inputs]:
        """This worker's part of some training batches, at least 1,000 examples in all."""
        count = max(2, math.ceil(1000 / self.recipe.batch_size))
        epoch = self.position // self.steps_per_epoch
        with closing(self._batches(epoch)) as batches:
            for inputs, _ in itertools.islice(batches, count):
                yield self._move(inputs)

    def _score(self, model: nn.Module, split: data.Examples, units: int | None = None) -> Score:
        classes = len(self.splits.classes)
        return evaluate(model, split, self._move, self._precision, classes=classes, units=units)

    def on_event(self, event: dict[str, Any]) -> None:
        """Record what the run reports, and begin a new phase of the clock at a switch."""
        self.journal.record(**event)
        if self.position:  # the first plan is shown whole
            self.journal.report.decision(event)
        if event["event"] == "ranks":
            self.clock.new_phase()
        if event["event"] != "switch":
            return
        before = self.clock.median(-1)
        self.clock.new_phase()
        self.switches.append(event)
        self._unshown = Switch(
            epoch=event["step"] / self.steps_per_epoch,
            event=event,
            step_ms_before=before,
            step_ms_after=None,
        )

    def _show_switch(self, *, now: bool = False) -> None:
        """Show a switch once the new step time is known, a few steps later; epochs behind it."""
        if self._unshown is not None:
            if len(self.clock.phases[-1]) < 5 and not now:
                return
            switch = dataclasses.replace(self._unshown, step_ms_after=self.clock.median(-1))
            self._unshown = None
            self.journal.report.switch(switch)
        while self._unshown_epochs:
            self.journal.report.epoch(self._unshown_epochs.pop(0))

    def _save(self) -> None:
        if not all(bool(p.isfinite().all()) for p in self.run.bare.parameters()):
            raise self._broken(f"weights are no longer finite after step {self.position}")
        extra = {
            "recipe": self.recipe.as_dict(),
            "checksum": self.splits.checksum,
            "classes": list(self.splits.classes),
            "position": self.position,
            "epoch_loss": self.epoch_loss,
            "scaler": self.scaler.state_dict(),
            "carried": self.carried.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step_times": self.clock.state(),
            "switches": self.switches,
            "seconds": self._elapsed(),
        }
        checkpoint.save(self.journal.out, self.run, extra=extra)

    def restore(self, saved: checkpoint.Checkpoint) -> None:
        """Take up the position of a checkpoint that the run was resumed from."""
        self.position = saved.extra["position"]
        self.epoch_loss = saved.extra["epoch_loss"]
        self.scaler.load_state_dict(saved.extra["scaler"])
        self.clock.restore(saved.extra["step_times"])
        self.switches = saved.extra["switches"]
        # Checkpoints of earlier versions have neither.
        self.carried.load_state_dict(saved.extra.get("carried", []), self.device)
        self.schedule.load_state_dict(saved.extra.get("schedule", {}))
        self.began -= saved.extra["seconds"]
        # The order of examples follows from the seed; only layers that draw numbers need this.
        if distributed.workers() == len(saved.random):
            saved.restore_random()

    def finish(self, dense: tuple[tuple[int, int], int]) -> Result:
        """Finalise the methods, read the test part once, close the records."""
        self._show_switch(now=True)
        kept = setup.state_bytes(self.run)
        learned = accounting.parameters(self.run.bare).trainable  # an update's, not its weight's
        model = self.run.finish()
        validation = self.evaluate(self.splits.validation)
        test = self.evaluate(self.splits.test)
        test = with_bleu(test, model, self.splits.test, self._move, self._precision)
        (stored, _), flops = setup.size(model, *data.example(self.splits.train))
        result = Result(
            model=self.recipe.model,
            data=self.splits.name,
            method=self.recipe.method,
            seed=self.recipe.seed,
            task=self.splits.task,
            test_accuracy=test.accuracy,
            test_loss=test.loss,
            test_bleu=test.bleu,
            validation_accuracy=validation.accuracy,
            validation_loss=validation.loss,
            parameters=(stored, learned),
            dense_parameters=dense[0],
            flops=flops,
            dense_flops=dense[1],
            step_ms_dense=self.clock.median(0),
            step_ms_low_rank=self.clock.recent(KEPT, since=1),
            units_per_second=self._speed(self.clock.recent(KEPT)),
            state_bytes=kept,
            seconds=self._elapsed(),
            epochs=self.recipe.epochs,
            steps=self.run.step,
            switches=tuple(self.switches),
            out=str(self.journal.out),
        )
        self.journal.record("finish", **dataclasses.asdict(result))
        self.journal.report.finish(result)
        return result

    def _elapsed(self) -> float:
        return time.perf_counter() - self.began

    def _speed(self, step_ms: float | None) -> float | None:
        """Images or tokens per second of the training step alone."""
        units = self.recipe.batch_size * self.splits.train.units
        return None if step_ms is None else units / step_ms * 1e3

    def _move(self, part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(self._move(each) for each in part)
        images = torch.channels_last if self.recipe.channels_last else torch.contiguous_format
        layout = images if part.dim() == 4 else torch.preserve_format
        return part.to(self.device, non_blocking=True, memory_format=layout)

    def _precision(self) -> torch.autocast:
        dtype = torch.float16 if self.recipe.amp == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype=dtype, enabled=self.recipe.amp != "none")
