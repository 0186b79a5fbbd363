"""What of a run is kept beside a checkpoint that a trainer writes.

The trainer saves and loads weights, optimizer and scheduler. What it knows nothing of is here: the
structure as data, the methods' state, and in which order the optimizer holds which parameters.
`rankwise.start(..., resume=checkpoint)` takes these on before the trainer loads the rest.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rankwise import sharding
from rankwise.errors import CheckpointError, LifeCycleError, PlanError
from rankwise.method import Method

FILE, KEY = "rankwise.pt", "rankwise"
_FIELDS = {"step", "plan", "methods", "parameter_names"}
_UNREADABLE = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError)


class Running(Protocol):
    """What is kept of a run."""

    step: int
    optimizer: Optimizer
    resumed: Any
    methods: tuple[Method, ...]

    def state_dict(self) -> dict[str, Any]:
        """Everything but the weights."""
        ...


def state_of(run: Running) -> dict[str, Any]:
    """Tensors, numbers and strings; a collective where weights are sharded.

    Raises:
        LifeCycleError: workers train apart, and trainers save the weights of one.
    """
    if any(method.trains_apart for method in run.methods):
        raise LifeCycleError(
            "every worker trains a head of its own, and a trainer's checkpoint holds those of "
            "worker 0 alone; train in a loop of your own, and save the run by rankwise.save"
        )
    state = run.state_dict()
    return sharding.whole({key: state[key] for key in sorted(_FIELDS)})


def write(directory: str | Path, state: Mapping[str, Any]) -> None:
    """Add the state to a checkpoint, a directory, whole or not at all."""
    scratch = Path(directory) / f"{FILE}.part"
    torch.save(dict(state), scratch)
    scratch.replace(scratch.with_name(FILE))


def is_beside(path: Path) -> bool:
    """Whether a path is a trainer's checkpoint: a directory with a state, or a file."""
    return (path / FILE).is_file() or (path.is_file() and path.suffix == ".ckpt")


def read(path: Path) -> dict[str, Any]:
    """The state that a trainer's checkpoint holds; nothing in it is executed.

    Args:
        path: a directory that `write` was given, or a file of Lightning, where it is under `KEY`.

    Raises:
        CheckpointError: there is none, or it is broken or unsafe.
        OSError: the file cannot be read.
    """
    file = path if path.is_file() else path / FILE
    try:
        # Of a file that holds the weights as well, only what is asked for is read.
        read = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{file} holds objects that would execute code{f' ({found[1]})' if found else ''}: "
            "refused; keep to numbers, strings and tensors in hyperparameters and callbacks"
        ) from error
    except _UNREADABLE as error:
        raise CheckpointError(f"{file} is corrupt ({error}); use another checkpoint") from error
    if path.is_file() and isinstance(read, dict):
        read = read.get(KEY)
    if not isinstance(read, dict) or not read.keys() >= _FIELDS:
        raise CheckpointError(
            f"{file} holds no state of a run: it was saved without the RunCallback of "
            "rankwise.integrations; give one that was saved with it"
        )
    return read


# Runs whose weights a trainer has yet to load, and what keeps them from stepping without.
_waiting: WeakKeyDictionary[Any, RemovableHandle] = WeakKeyDictionary()


def wait_for_trainer(run: Running) -> None:
    """Refuse to step a run resumed from a trainer's checkpoint until that trainer goes on."""
    if run.resumed.weights:
        return

    def refuse(*_: Any) -> None:
        raise LifeCycleError(
            "the run was resumed from a trainer's checkpoint, whose weights and moments no trainer "
            "has loaded; resume that trainer from it too, with its RunCallback, or save and resume "
            "a loop of your own by rankwise.save"
        )

    _waiting[run] = run.optimizer.register_step_pre_hook(refuse)


def check_resumed(run: Running, trainers_step: int) -> None:
    """Refuse a trainer that goes on from another step than the run.

    Raises:
        LifeCycleError: saying how to resume both.
    """
    waiting = _waiting.pop(run, None)
    # A trainer that begins anew may go on with a run that has trained before.
    if trainers_step != run.step and (trainers_step or waiting is not None):
        raise LifeCycleError(
            f"the trainer goes on from step {trainers_step}, the run is at step {run.step}: give "
            "both the same checkpoint, rankwise.start(..., resume=checkpoint) first"
        )
    if waiting is not None:
        waiting.remove()


def guard(model: nn.Module) -> RemovableHandle:
    """Refuse weights of another structure wherever they are loaded into the model.

    Trainers load without complaint what does not fit, one of them its best checkpoint at the end.

    Raises:
        PlanError: at such a load, saying how to resume.
    """
    return model.register_load_state_dict_pre_hook(_check_structure)


def _check_structure(model: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    own = {prefix + key for key in model.state_dict()}
    given = {key for key in state_dict if key.startswith(prefix)}
    if own - given and given - own:  # tied weights may be left out
        raise PlanError(
            f"the trainer loads {min(given - own)}, which the model does not have, for "
            f"{min(own - given)}: weights of another structure. Give rankwise.start(..., resume=) "
            "the checkpoint that the trainer resumes from; load_best_model_at_end does not go with "
            "methods that change the structure on the way"
        )
