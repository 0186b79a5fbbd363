"""A small network, its data, and the loop that every trainer has to agree with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler

import rankwise

STEPS, BATCH, MICRO, CLIP, RATE = 8, 4, 2, 0.1, 0.05

# ReLoRA opens its updates after step 3 and merges after step 5, Pufferfish switches after step 3.
METHODS: dict[str, Callable[[], rankwise.Method]] = {
    "lora": lambda: rankwise.LoRA(rank=2, layers="fc*", others="out"),
    "relora": lambda: rankwise.ReLoRA(
        rank=2, alpha=2, warmup_steps=3, restart_every=2, restart_warmup=2, layers="fc*"
    ),
    "pufferfish": lambda: rankwise.Pufferfish(2, warmup_steps=3, layers="fc*", lr_factor=0.5),
    "galore": lambda: rankwise.GaLore(rank=2, every=3, layers="fc*"),
}
# Before the switch and behind it; with updates open and behind their merge.
CHECKPOINTS = {"lora": (4,), "relora": (4, 6), "pufferfish": (2, 4), "galore": (4,)}


class Killed(Exception):
    """By whoever runs the machine."""


class Network(nn.Module):
    """Returns a loss, as the Trainer of transformers wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.out = nn.Linear(8, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.out(self.fc2(self.fc1(x).tanh()).tanh())
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def network() -> Network:
    torch.manual_seed(0)
    return Network()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=RATE)


def decay(optimizer: torch.optim.Optimizer) -> LambdaLR:
    return LambdaLR(optimizer, lambda step: max(0.0, (STEPS - step) / STEPS))


def examples() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS * BATCH * MICRO, 8, generator=generator)
    labels = torch.randint(3, (len(x),), generator=generator)
    return [{"x": one, "labels": label} for one, label in zip(x, labels, strict=True)]


class Rest(Sampler[int]):
    """The examples from a step on; as long as all of them, so that trainers count right."""

    def __init__(self, first_step: int) -> None:
        self.first = first_step * BATCH * MICRO

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.first, len(self)))

    def __len__(self) -> int:
        return STEPS * BATCH * MICRO


def loader(first_step: int = 0) -> DataLoader[Any]:
    rows: Any = examples()
    return DataLoader(rows, batch_size=BATCH, sampler=Rest(first_step))


def held(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def plain(name: str, *, clips: str = "model") -> tuple[nn.Module, rankwise.Run]:
    """Trained by hand; clipping sums over parameters in the order of the model or the optimizer."""
    model = network()
    optimizer = adamw(model)
    run = rankwise.start(model, METHODS[name](), optimizer)
    scheduler = decay(optimizer)
    for count, batch in enumerate(loader(), 1):
        (model(**batch)["loss"] / MICRO).backward()
        if count % MICRO == 0:
            clipped = model.parameters() if clips == "model" else held(optimizer)
            nn.utils.clip_grad_norm_(clipped, CLIP)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    return model, run


def assert_same(one: nn.Module, other: nn.Module) -> None:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    for (name, value), (same_name, other_value) in pairs:
        assert name == same_name
        torch.testing.assert_close(other_value, value, rtol=0, atol=0)


def finish_both(run: rankwise.Run, other: rankwise.Run) -> None:
    """What remains is the same, and plain: layers of the beginning, unless they were factorised."""
    assert_same(run.finish(), other.finish())
    if not isinstance(run.methods[0], rankwise.Pufferfish):
        assert {type(m) for m in run.bare.modules()} == {Network, nn.Linear}
