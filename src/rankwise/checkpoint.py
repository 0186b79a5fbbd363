"""Checkpoints of a run: everything an exact resume needs, and the promise that loading is safe.

`storage` says how a directory is laid out, written and verified; here is what it holds.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise import __version__, beside, composition, distributed, sharding, storage
from rankwise.errors import CheckpointError, LifeCycleError, unknown
from rankwise.layers import adapted_layers
from rankwise.method import Method
from rankwise.optim.projected.int8 import decode_all
from rankwise.optim.projected.states import weights_in_place_of_proxies
from rankwise.structure import read_plan


class Saveable(Protocol):
    """What is saved of a run."""

    methods: tuple[Method, ...]

    @property
    def bare(self) -> nn.Module:
        """The model without wrappers."""
        ...

    @property
    def step(self) -> int:
        """Finished optimizer steps."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights."""
        ...


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A checkpoint read back, all of it on the CPU.

    Attributes:
        path: the step directory.
        step: finished optimizer steps.
        run: what `Run.state_dict` returned.
        weights: the bare model's state dict. Tensors are stored contiguous; `load_state_dict`
            copies their values into each parameter's own memory format. Empty where a trainer's
            own checkpoint holds them.
        extra: what the training loop gave to `save`: recipe, scheduler, position in the data.
        random: worker -> state of its random number generators.
        apart: worker -> run and weights of its own, but for worker 0, where workers train apart
            (`Method.trains_apart`); None where they hold the same.
        meta: what meta.json says: versions, step, workers, plan, recipe.
    """

    path: Path
    step: int
    run: dict[str, Any] = field(repr=False)
    weights: dict[str, Any] = field(repr=False)
    extra: dict[str, Any] = field(repr=False)
    random: dict[int, dict[str, Any]] = field(repr=False)
    meta: dict[str, Any] = field(repr=False)
    apart: dict[int, dict[str, Any]] | None = field(default=None, repr=False)

    def of_this_worker(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """State of the run and weights, as this worker had them.

        Raises:
            CheckpointError: workers trained apart, and there were fewer or more than now.
        """
        if self.apart is None:
            return self.run, self.weights
        saved, now = len(self.random), distributed.workers()
        if saved != now:
            raise CheckpointError(
                f"{self.path} was saved by {saved} worker(s) that train apart, each with a head "
                f"and moments of its own, and there are {now} now; resume with {saved} worker(s)"
            )
        own = self.apart.get(distributed.worker(), {"run": self.run, "weights": {}})
        return own["run"], {**self.weights, **own["weights"]}

    def restore_random(self) -> None:
        """Put this worker's global generators where they were: torch, CUDA, random, NumPy.

        CUDA devices that are not there any more are passed over.

        Raises:
            CheckpointError: the run that saved had fewer workers than this one.
        """
        worker, saved = distributed.worker(), len(self.random)
        if worker not in self.random:
            raise CheckpointError(
                f"{self.path} was saved by {saved} worker(s) and holds no random state for worker "
                f"{worker}; resume with {saved} worker(s), or leave restore_random() out and seed "
                "this worker anew: weights and optimizer are right, random draws will differ"
            )
        state = self.random[worker]
        torch.set_rng_state(state["torch"])
        if torch.cuda.is_available():
            for device, one in enumerate(state["cuda"][: torch.cuda.device_count()]):
                torch.cuda.set_rng_state(one, device)
        random.setstate(state["python"])
        kind, key, *rest = state["numpy"]
        # The global generator is what augmentation code draws from.
        np.random.set_state((kind, key.numpy().astype(np.uint32), *rest))  # noqa: NPY002

    def restore_scheduler(self, scheduler: Any, key: str = "scheduler") -> None:
        """Load a scheduler's state from `extra`, and put the optimizer's groups back after it.

        Building a scheduler sets each group's learning rate (one-cycle: its momentum too) to that
        of the very first step, and `scheduler.load_state_dict` alone leaves it there, so the
        first resumed step would be of the wrong size.

        Args:
            scheduler: newly built on the optimizer that `rankwise.start` resumed.
            key: under which `extra` holds its state.

        Raises:
            CheckpointError: `extra` has no such key.
        """
        if key not in self.extra:
            raise CheckpointError(
                f"{self.path} holds no state of a scheduler: {unknown('key', key, self.extra)}; "
                f"save it with rankwise.save(..., extra={{'{key}': scheduler.state_dict()}})"
            )
        scheduler.load_state_dict(self.extra[key])
        saved_groups = self.run["optimizer"]["param_groups"]
        for group, saved in zip(scheduler.optimizer.param_groups, saved_groups, strict=True):
            for name, value in saved.items():
                if isinstance(group.get(name), Tensor):
                    group[name].fill_(value)
                elif name != "params":
                    group[name] = value


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.is_available() and torch.cuda.is_initialized()
    kind, key, *rest = np.random.get_state()  # noqa: NPY002
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if cuda else [],
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(key).astype(np.int64)), *rest),
    }


def save(
    directory: str | Path, run: Saveable, *, extra: Mapping[str, Any] | None = None, keep: int = 2
) -> Path:
    """Write `directory/step-<step>/`; with several workers all call it and worker 0 writes.

    Sharded weights, moments and memories (FSDP2) are put together on worker 0, one at a time, so
    that the checkpoint is that of an unsharded run: it can be resumed on other shards, or on none.

    Args:
        directory: of this run alone; made if missing.
        run: the run, between two steps.
        extra: what the loop needs to go on: tensors, numbers, strings, tuples, lists, dicts. A
            value under "recipe" is also put into meta.json and has to be plain JSON.
        keep: how many checkpoints stay, at least 1: the new one, and those of the highest steps.
            Others are removed once the new one stands.

    Returns:
        The step directory, on every worker.

    Raises:
        CheckpointError: on every worker: disk full, not permitted, an optimizer whose states of
            shards do not add up, or a value that could not be loaded without executing code.
            Earlier checkpoints are whole.
    """
    if keep < 1:
        raise CheckpointError(f"keep={keep} would leave no checkpoint; keep at least 1")
    states = dict(enumerate(distributed.gather(_random_state())))
    content, apart = _content(run), _apart(run)
    final = Path(directory) / storage.name_of(run.step)
    failure = "it stopped while saving"
    try:
        if distributed.worker() == 0:
            weights, progress = content or (decode_all(run.bare.state_dict()), run.state_dict())
            state = {"run": progress, "extra": dict(extra or {}), "random": states}
            state |= apart
            storage.write(final, weights, state, _describe(run, state))
            storage.prune(final, keep)
        failure = ""
    except CheckpointError as error:
        failure = str(error)
        raise
    finally:
        # Worker 0 answers whatever happened to it, because the others wait here.
        failure = distributed.share(failure)
    if failure:
        raise CheckpointError(f"worker 0 could not save: {failure}")
    return final


def _content(run: Saveable) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Weights and state of a sharded run, whole on worker 0; None if nothing is sharded."""
    if not any(map(sharding.is_sharded, run.bare.parameters())):
        return None
    return sharding.whole(dict(run.bare.state_dict())), sharding.whole(run.state_dict())


def _apart(run: Saveable) -> dict[str, Any]:
    """What other workers than worker 0 have of their own, if they train apart; on worker 0."""
    if not any(method.trains_apart for method in run.methods):
        return {}
    heads = {
        p
        for layer in adapted_layers(run.bare).values()
        for p in (*layer.heads.parameters(), *(layer.merged or nn.ModuleList()).parameters())
    }
    places = run.bare.named_parameters(remove_duplicate=False)
    same = {name for name, p in places if not p.requires_grad and p not in heads}
    mine = {name: value for name, value in run.bare.state_dict().items() if name not in same}
    own = {"run": run.state_dict(), "weights": mine} if distributed.worker() else None
    everyone = distributed.collect(own)
    return {"apart": {n: one for n, one in enumerate(everyone) if n}}


def _describe(run: Saveable, state: Mapping[str, Any]) -> dict[str, Any]:
    recipe = state["extra"].get("recipe")
    try:
        json.dumps(recipe)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"extra['recipe'] goes into {storage.META} and has to be plain JSON: {error}"
        ) from error
    return {
        "rankwise": __version__,
        "torch": str(torch.__version__),
        "step": run.step,
        "workers": len(state["random"]),
        "plan": read_plan(run.bare),
        "recipe": recipe,
    }


def load(path: str | Path) -> Checkpoint:
    """Read and verify a checkpoint; nothing in it is executed. Not a collective.

    Args:
        path: a step directory, or the directory that holds them: then the newest. A newest one
            that is corrupt is an error that names the newest whole one, not a silent step back.
            Or a trainer's checkpoint, see `beside`.

    Raises:
        CheckpointError: missing, foreign, corrupt, of a newer format, or unsafe.
    """
    path = Path(path)
    try:
        if beside.is_beside(path):
            return Checkpoint(path, (state := beside.read(path))["step"], state, {}, {}, {}, {})
        if not path.exists():
            raise CheckpointError(f"no checkpoint at {path}: there is no such directory")
        if not path.is_dir():
            raise CheckpointError(
                f"{path} is a file; a checkpoint is a directory step-<number>: give that or its "
                "parent"
            )
        if storage.is_step(path) or (path / storage.META).is_file():
            return _read(path)
        steps = storage.present(path)
        if not steps:
            raise CheckpointError(_foreign(path))
        return _newest(steps)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror} ({error.filename}); "
            "check its permissions and the disk"
        ) from error


def _newest(steps: list[Path]) -> Checkpoint:
    try:
        return _read(steps[0])
    except CheckpointError as error:
        for older in steps[1:]:
            try:
                storage.verify(older)
            except CheckpointError:
                continue
            raise CheckpointError(
                f"{error}; the newest whole one is {older}: give its path"
            ) from error
        raise CheckpointError(
            f"{error}; no other checkpoint in {steps[0].parent} is whole"
        ) from error


def _read(path: Path) -> Checkpoint:
    meta, weights, state = storage.read(path)
    run, extra, states = (state.get(key) for key in ("run", "extra", "random"))
    if not (isinstance(run, dict) and isinstance(extra, dict) and isinstance(states, dict)):
        raise CheckpointError(f"{path / storage.STATE} holds no run of this library: refused")
    apart = state.get("apart")
    return Checkpoint(path, int(meta["step"]), run, weights, extra, states, meta, apart)


def _foreign(path: Path) -> str:
    names = sorted(p.name for p in path.iterdir())
    known = {
        "trainer_state.json": "a checkpoint of a Trainer that was saved without rankwise's "
        "RunCallback, or killed while saving: give an earlier one",
        "config.json": "a Hugging Face model; load its weights into your model yourself",
        ".metadata": "a torch.distributed.checkpoint; load it with torch",
    }
    maker = next((text for name, text in known.items() if name in names), "")
    if not maker and any(name.endswith((".ckpt", ".pt", ".pth", ".bin")) for name in names):
        maker = "files of another tool; load their weights into your model yourself"
    shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "") or "nothing"
    return (
        f"{path} holds no checkpoint of rankwise.save (no step-<number> directory), but {shown}"
        + (
            f": this looks like {maker}"
            if maker
            else "; give the directory passed to rankwise.save"
        )
    )


class Progressing(Protocol):
    """What of a run is saved beside a checkpoint that torch or a trainer writes."""

    optimizer: Optimizer
    methods: tuple[Method, ...]
    step: int


@contextmanager
def states_by_weight(run: Progressing) -> Iterator[Optimizer]:
    """Within it the run's optimizer holds the model's weights, so that states have their names.

    For torch.distributed.checkpoint.state_dict (`get_state_dict`, `set_state_dict` and the like)
    and trainers that call it: with low-rank gradients the optimizer steps proxies, which those
    functions find in no model. Moments keep the projected shape; of sharded weights they are
    DTensors. A run that has not stepped gives begun states to read saved ones into. Nothing may
    step within it. What the methods keep, `methods_state` gives.

    Example:
        >>> import rankwise
        >>> from torch.distributed.checkpoint import state_dict as torch_states
        >>> model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Linear(16, 4))
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> run = rankwise.start(model, rankwise.GaLore(4), optimizer)
        >>> with rankwise.states_by_weight(run):
        ...     weights, states = torch_states.get_state_dict(model, optimizer)
        >>> states["state"]["0.weight"]["exp_avg"].shape
        torch.Size([16, 4])
    """
    with composition.resting(run.optimizer), weights_in_place_of_proxies(run.optimizer):
        yield run.optimizer


def methods_state(run: Progressing) -> dict[str, Any]:
    """Step and methods of a run: what an exact resume needs beside weights and optimizer.

    A collective where weights are sharded; tensors are then whole on worker 0, which saves it.
    Plain tensors and numbers: torch.save it, and load it with weights_only=True.

    Raises:
        LifeCycleError: a method changes the structure, of which this holds nothing.
    """
    for method in run.methods:
        if method.provides - {"low-rank gradients"}:
            raise LifeCycleError(
                f"{type(method).__name__} changes the model's structure, which is in a checkpoint "
                "of rankwise.save alone; save the run by that"
            )
    methods = [{"method": type(m).__name__, "state": m.state_dict()} for m in run.methods]
    return sharding.whole({"step": run.step, "methods": methods})


def restore_methods(run: Progressing, state: Mapping[str, Any]) -> None:
    """Take on what `methods_state` gave, once weights and optimizer are loaded.

    Raises:
        LifeCycleError: the run has stepped, or has other methods.
    """
    own = [type(method).__name__ for method in run.methods]
    saved = [one["method"] for one in state["methods"]]
    if run.step or own != saved:
        raise LifeCycleError(
            f"the saved run used {saved}, this one uses {own} and is at step {run.step}; restore "
            "into a run of the same methods before its first step"
        )
    run.step = int(state["step"])
    for method, one in zip(run.methods, state["methods"], strict=True):
        method.load_state_dict(one["state"])
