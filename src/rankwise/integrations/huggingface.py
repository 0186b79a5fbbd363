"""A run inside the Trainer of transformers.

    trainer = Trainer(model=model, args=args, train_dataset=data)
    run = rankwise.start(model, rankwise.LoRA(), trainer.create_optimizer(), resume=checkpoint)
    trainer.add_callback(RunCallback(run))
    trainer.train(resume_from_checkpoint=checkpoint)  # None at first, then get_last_checkpoint(...)
    run.finish()

The run hangs on the optimizer's steps; the callback keeps the run's state beside the Trainer's
checkpoints. On a resume the structure comes first, from `start`, then the Trainer loads weights,
optimizer and scheduler into it.

Workers of torchrun or Accelerate: each of them does the above. Where every worker has a head of its
own (`LTE(mode="workers")`), their gradients must not be averaged: `train_apart(trainer)`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from rankwise import beside, distributed
from rankwise.errors import LifeCycleError
from rankwise.run import Run


class RunCallback(TrainerCallback):
    """Saves what the Trainer's checkpoints do not hold of a run, and checks that both agree.

    Args:
        run: on the Trainer's model and optimizer, by step hooks.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._guard = beside.guard(run.bare)

    def on_train_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Refuse another optimizer, and a resume of the Trainer alone."""
        optimizer = objects.get("optimizer")
        if getattr(optimizer, "optimizer", optimizer) is not self.run.optimizer:
            raise LifeCycleError(
                "the Trainer steps another optimizer than the run's; start the run with "
                "trainer.create_optimizer(), or pass Trainer(..., optimizers=(optimizer, None))"
            )
        beside.check_resumed(self.run, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """Put the run's state into the checkpoint that was just written."""
        content = beside.state_of(self.run)
        if distributed.worker() == 0:
            beside.write(Path(args.output_dir) / f"checkpoint-{state.global_step}", content)

    def on_train_end(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        """What is loaded from now on is not the Trainer's."""
        self._guard.remove()


def train_apart(trainer: Any) -> None:
    """Let the workers of a Trainer divide the data, but not average gradients; before `train()`.

    Such runs are not kept in the Trainer's checkpoints: `save_strategy="no"`.
    """
    prepare = trainer.accelerator.prepare_model
    # Accelerate's way to take a model as it is, without DistributedDataParallel.
    trainer.accelerator.prepare_model = partial(prepare, evaluation_mode=True)
