"""Exact resume: stop anywhere, go on in a fresh model and optimizer, end bit for bit the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import rankwise
from rankwise.errors import CheckpointError, PlanError
from rankwise.method import Method
from rankwise.methods import METHODS

SWITCH, LAST = 4, 10
# Before the first step, before the switch, right before, at, right after, long after it.
STOPS = (0, 1, SWITCH - 1, SWITCH, SWITCH + 1, LAST - 1)

OPTIONS: dict[str, dict[str, Any]] = {
    "adalora": {"initial_rank": 3, "target_rank": 2, "every": 1, "final": LAST - SWITCH},
    "cuttlefish": {"ranks": 4, "gains": "none", "latest": SWITCH / LAST},
    "dense": {},
    "factorized": {"ranks": 4},
    "pufferfish": {"ranks": 4, "warmup_steps": SWITCH},
    "sifd": {"ranks": 4},
    "factor-decay": {"strength": 1e-3},
    "ldadam": {"rank": 2},
    "dion": {"rank": 2},
    "tracked": {"rank": 2},
    "apollo": {"rank": 2, "every": 3},
    "apollo-mini": {"every": 3},
    "fira": {"rank": 2, "every": 3},
    "frugal": {"rank": 2, "every": 3},
    "galore": {"rank": 2, "every": 3},
    "lora": {"rank": 2, "others": "all", "dropout": 0.1},
    "lora-plus": {"ratio": 2.0},
    "lte": {"rank": 2, "heads": 4, "alpha": 4.0, "merge_every": 2},
    "multi-head-galore": {"rank": 2, "heads": 4, "merge_every": 2, "moments": "rotate"},
    "relora": {"rank": 2, "warmup_steps": SWITCH, "restart_every": 3, "restart_warmup": 2},
    "qgalore": {"rank": 2, "every": 3},
}

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD, momentum": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "Adam": lambda p: Adam(p, lr=1e-2),
    "Adam, amsgrad": lambda p: Adam(p, lr=1e-2, amsgrad=True),
    "AdamW, fused": lambda p: AdamW(p, lr=1e-2, fused=True),
    "RMSprop": lambda p: RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
}


def network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 12, 3, stride=2, padding=1),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.Conv2d(12, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(256, 24),
        nn.ReLU(),
        nn.Linear(24, 4),
    )


def batch(i: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(8, 1, 8, 8, generator=generator)
    return x, torch.randint(4, (8,), generator=generator)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, as training programs make them: no decay for biases and norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    return [{"params": matrices}, {"params": vectors, "weight_decay": 0.0, "lr": 0.02}]


class Session:
    """A program's model, optimizer, scheduler and run."""

    def __init__(
        self,
        method: Method | list[Method],
        optimizer: Callable[[Any], Optimizer],
        seed: int,
        scheduler: Callable[[Optimizer], Any],
        resume: Path | None = None,
        memory_format: torch.memory_format = torch.contiguous_format,
    ) -> None:
        self.model: Any = network(seed)
        self.model.to(memory_format=memory_format)
        self.optimizer = optimizer(groups(self.model))
        self.run = rankwise.start(
            self.model, method, self.optimizer, total_steps=LAST, resume=resume
        )
        self.scheduler = scheduler(self.optimizer)
        if self.run.resumed is not None:
            self.run.resumed.restore_scheduler(self.scheduler)
            self.run.resumed.restore_random()

    def train(self, until: int) -> None:
        while self.run.step < until:
            x, y = batch(self.run.step)
            self.optimizer.zero_grad()
            F.cross_entropy(self.run.model(x), y).backward()
            self.optimizer.step()
            self.scheduler.step()

    def save(self, directory: Path) -> Path:
        extra = {"scheduler": self.scheduler.state_dict()}
        return rankwise.save(directory, self.run, extra=extra, keep=len(STOPS))


def halving(optimizer: Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: 0.5 ** (step / 5))


def one_cycle(optimizer: Optimizer) -> OneCycleLR:
    return OneCycleLR(optimizer, max_lr=[0.05, 0.02], total_steps=LAST + 2)


def assert_same(actual: Any, expected: Any) -> None:
    """Equal bit for bit, through lists and dicts."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, check_stride=True)


def assert_ends_alike(resumed: Session, whole: Session) -> None:
    assert_same(resumed.model.state_dict(), whole.model.state_dict())
    ours, theirs = resumed.optimizer.state_dict(), whole.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, state in theirs["state"].items():
        assert_same(ours["state"][index], state)
    assert resumed.scheduler.get_last_lr() == whole.scheduler.get_last_lr()


def methods_of(name: str) -> list[Method]:
    """A method with what it needs beside it."""
    stands = {"low-rank weights": "pufferfish", "low-rank updates": "lora"}
    beside = [stands[feature] for feature in METHODS[name].needs]
    return [METHODS[each](**OPTIONS[each]) for each in (*beside, name)]


# Every kind of optimizer state under a schedule for the methods that change structure; the others
# leave the state to the optimizer.
STRUCTURAL = ("dense", "factorized", "pufferfish")
PRODUCT = [
    (name, optimizer, scheduler)
    for name in STRUCTURAL
    for optimizer in OPTIMIZERS
    for scheduler in (halving, one_cycle)
]
ONCE = [(name, "AdamW, fused", halving) for name in METHODS if name not in STRUCTURAL]


@pytest.mark.parametrize(("name", "optimizer", "scheduler"), [*PRODUCT, *ONCE])
def test_stopped_anywhere_it_ends_where_it_would_have(
    name: str, optimizer: str, scheduler: Callable[[Optimizer], Any], tmp_path: Path
) -> None:
    def session(seed: int, resume: Path | None = None) -> Session:
        return Session(methods_of(name), OPTIMIZERS[optimizer], seed, scheduler, resume)

    undisturbed = session(0)
    undisturbed.train(LAST)
    whole, saved = session(0), {}
    for stop in STOPS:
        whole.train(stop)
        saved[stop] = whole.save(tmp_path)
    whole.train(LAST)
    # Saving draws no random numbers and changes nothing.
    assert_ends_alike(whole, undisturbed)
    for stop, path in saved.items():
        resumed = session(seed=stop + 1, resume=path)
        assert resumed.run.step == stop
        resumed.train(LAST)
        assert_ends_alike(resumed, whole)


def test_the_switch_happens_once_and_after_the_resume_if_it_was_to_come(tmp_path: Path) -> None:
    def session(resume: Path | None = None) -> Session:
        method = METHODS["pufferfish"](**OPTIONS["pufferfish"])
        return Session(method, OPTIMIZERS["Adam"], 0, halving, resume)

    whole = session()
    whole.train(SWITCH - 1)
    before = whole.save(tmp_path)
    whole.train(SWITCH)
    at = whole.save(tmp_path)
    for path, expected in ((before, [SWITCH]), (at, [])):
        resumed = session(path)
        resumed.train(LAST)
        events = [e["step"] for e in resumed.run.events if e["event"] == "switch"]
        assert events == expected


def test_a_resumed_run_can_be_resumed_again(tmp_path: Path) -> None:
    def session(resume: Path | None = None) -> Session:
        method = METHODS["pufferfish"](**OPTIONS["pufferfish"])
        return Session(method, OPTIMIZERS["Adam"], 0, halving, resume)

    whole = session()
    whole.train(LAST)
    part = session()
    for stop in range(1, LAST + 1):
        part.train(stop)
        part = session(part.save(tmp_path))
    assert_ends_alike(part, whole)


def test_channels_last_models_resume_exactly(tmp_path: Path) -> None:
    def session(seed: int, resume: Path | None = None) -> Session:
        method = METHODS["pufferfish"](**OPTIONS["pufferfish"])
        return Session(method, OPTIMIZERS["Adam"], seed, halving, resume, torch.channels_last)

    whole, saved = session(0), []
    for stop in STOPS:
        whole.train(stop)
        saved.append(whole.save(tmp_path))
    whole.train(LAST)
    for path in saved:
        resumed = session(1, path)
        resumed.train(LAST)
        assert_ends_alike(resumed, whole)


def test_a_tensor_as_learning_rate_is_put_back_too(tmp_path: Path) -> None:
    def session(seed: int, resume: Path | None = None) -> Session:
        return Session(
            METHODS["pufferfish"](**OPTIONS["pufferfish"]), tensor_lr, seed, halving, resume
        )

    def tensor_lr(parameters: Any) -> Optimizer:
        return Adam(parameters, lr=torch.tensor(1e-2), foreach=False)

    whole = session(0)
    whole.train(SWITCH + 1)
    path = whole.save(tmp_path)
    whole.train(LAST)
    resumed = session(1, path)
    assert isinstance(resumed.optimizer.param_groups[0]["lr"], Tensor)
    resumed.train(LAST)
    assert_ends_alike(resumed, whole)


def test_a_checkpoint_without_the_scheduler_says_how_to_save_it(tmp_path: Path) -> None:
    whole = Session(METHODS["dense"](), OPTIMIZERS["Adam"], 0, halving)
    saved = rankwise.load(rankwise.save(tmp_path, whole.run, extra={"schedule": {}}))
    with pytest.raises(CheckpointError, match=r"no state of a scheduler.*did you mean 'schedule'"):
        saved.restore_scheduler(whole.scheduler)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    method = METHODS["pufferfish"](**OPTIONS["pufferfish"])
    whole = Session(method, OPTIMIZERS["Adam"], 0, halving)
    whole.train(SWITCH)
    path = whole.save(tmp_path)
    other = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(PlanError, match=r"plan is of another model"):
        rankwise.start(
            other,
            METHODS["pufferfish"](**OPTIONS["pufferfish"]),
            Adam(other.parameters()),
            resume=path,
        )


def test_a_missing_checkpoint_is_said_before_anything_else_changes(tmp_path: Path) -> None:
    model, method = network(0), METHODS["factorized"](**OPTIONS["factorized"])
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"there is no such directory"):
        rankwise.start(model, method, Adam(model.parameters()), resume=tmp_path / "x")
    assert_same(model.state_dict(), before)
