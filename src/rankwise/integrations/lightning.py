"""A run inside Lightning's Trainer.

    optimizer = torch.optim.AdamW(model.parameters())
    run = rankwise.start(model, rankwise.LoRA(), optimizer, resume=checkpoint)
    trainer = Trainer(callbacks=[RunCallback(run)])
    trainer.fit(Module(model, optimizer), loader, ckpt_path=checkpoint)  # None, or a .ckpt file
    run.finish()

The module's `configure_optimizers` returns this optimizer, and schedulers built on it there. The
run hangs on the optimizer's steps, behind Lightning's closure and clipping; the callback keeps the
run's state in Lightning's checkpoints. On a resume the structure comes first, from `start`, then
Lightning loads weights, optimizer and schedulers into it.

Workers: `Trainer(strategy="ddp", ...)`. Where every worker has a head of its own, as with
`LTE(mode="workers")`, gradients must not be averaged: `strategy=Apart()`, and the workers have to
know each other from the beginning: `rankwise.distributed.initialize()` under torchrun, ahead of
`rankwise.start`.
"""

from __future__ import annotations

from typing import Any

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy

from rankwise import beside
from rankwise.errors import LifeCycleError
from rankwise.run import Run


class RunCallback(Callback):
    """Saves what Lightning's checkpoints do not hold of a run, and checks that both agree.

    Args:
        run: on the module's optimizer, by step hooks.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._guard = beside.guard(run.bare)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Refuse another optimizer, clipping of proxies, a run that is not where the trainer is."""
        if self.run.optimizer not in trainer.optimizers:
            raise LifeCycleError(
                "Lightning steps another optimizer than the run's; let configure_optimizers "
                "return the one that rankwise.start was given"
            )
        held = (p for group in self.run.optimizer.param_groups for p in group["params"])
        if trainer.gradient_clip_val and any(hasattr(p, "stands_for") for p in held):
            raise LifeCycleError(
                "Lightning's gradient_clip_val clips what the optimizer holds, and low-rank "
                "gradients are not there yet; leave it out, and clip by "
                f"rankwise.start(..., clip_norm={trainer.gradient_clip_val})"
            )
        # Lightning counts the steps of all its optimizers.
        alone = len(trainer.optimizers) == 1
        beside.check_resumed(self.run, trainer.global_step if alone else self.run.step)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Add the run's state."""
        checkpoint[beside.KEY] = beside.state_of(self.run)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """What is loaded from now on is not the trainer's."""
        self._guard.remove()


class Apart(DDPStrategy):
    """Workers that divide the data, but do not average gradients.

    Such runs are not kept in Lightning's checkpoints: `enable_checkpointing=False`.
    """

    def configure_ddp(self) -> None:
        """The model stays as it is, on every worker."""
