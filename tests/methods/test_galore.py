"""GaLore against its published program, and what its paper promises."""

from __future__ import annotations

import importlib.util
import sys
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import rankwise
from rankwise.methods.galore import GaLore

BLOCK = {"q": (32, 32), "k": (32, 32), "gate": (88, 32), "up": (88, 32), "down": (32, 88)}


def peer(name: str) -> Any:
    """The AdamW of galore_torch or apollo_torch, without what else those packages import."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip(f"{name} is not installed")
    package = types.ModuleType(name)
    package.__path__ = list(spec.submodule_search_locations)
    sys.modules[name] = package
    if "transformers" not in sys.modules:  # asked for a version check alone
        for part in ("transformers", "transformers.utils", "transformers.utils.versions"):
            sys.modules[part] = types.ModuleType(part)
        stub: Any = sys.modules["transformers.utils.versions"]
        stub.require_version = lambda *_, **__: None
    file = "adamw" if name == "galore_torch" else "apollo"
    try:
        return importlib.import_module(f"{name}.{file}").AdamW
    finally:
        for part in [m for m in sys.modules if m.partition(".")[0] in (name, "transformers")]:
            if not hasattr(sys.modules[part], "__version__"):
                del sys.modules[part]


class Llama(nn.Module):
    """The matrices of a LLaMA block in small, wide and tall ones, between embedding and head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(50, 32)
        self.block = nn.ModuleDict(
            {name: nn.Linear(i, o, bias=False) for name, (o, i) in BLOCK.items()}
        )
        self.head = nn.Linear(32, 50, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        b, h = self.block, self.embed(tokens)
        score = F.softmax(b["q"](h) @ b["k"](h).mT / 32**0.5, dim=-1)
        h = h + score @ h
        h = h + b["down"](F.silu(b["gate"](h)) * b["up"](h))
        return self.head(F.rms_norm(h, (32,)))


def loss(model: nn.Module, step: int, size: int = 32) -> Tensor:
    g = torch.Generator().manual_seed(step)
    tokens = torch.randint(0, 50, (size, 17), generator=g)
    tokens[:, 1::2] = (3 * tokens[:, :-1:2] + 7) % 50  # half of it can be learnt
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def matrices(model: Llama) -> list[nn.Parameter]:
    return [layer.weight for layer in model.block.values()]  # type: ignore[misc]


EPSILON = 1e-5


def published(model: Llama, steps: int, lr: float = 1e-2, **options: Any) -> None:
    """Their AdamW; it adds epsilon before the bias correction, so it is scaled to torch's."""
    rest = [model.embed.weight, model.head.weight]
    groups = [{"params": rest}, {"params": matrices(model), **options}]
    optimizer = peer("galore_torch")(groups, lr=lr, no_deprecation_warning=True)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["eps"] = EPSILON * (1 - 0.999 ** (step + 1)) ** 0.5
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()


def ours(
    model: Llama, method: Any, steps: int, lr: float = 1e-2, eps: float = EPSILON
) -> rankwise.Run:
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, eps=eps, weight_decay=0.0)
    run = rankwise.start(model, method, optimizer)
    for step in range(steps):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    return run


def distance(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


@pytest.mark.parametrize(("side", "kind"), [("short", "std"), ("both", "full")])
@pytest.mark.parametrize("every", [200, 40])
def test_with_the_same_basis_it_is_the_published_program(side: str, kind: str, every: int) -> None:
    """200 steps, exact SVD, moments kept, no staggering; batch of 512 tokens, rank 8 of 32."""
    a, b = Llama(), Llama()
    published(a, 200, rank=8, update_proj_gap=every, scale=0.25, proj_type=kind)
    method = GaLore(8, every=every, side=side, basis="svd", stagger=False, layers="block.*")
    ours(b, method, 200)
    assert distance(a, Llama()) > 0.1
    assert distance(a, b) < 1e-4


def test_the_embedding_and_the_head_are_trained_unprojected() -> None:
    model = Llama()
    run = ours(model, GaLore(8), 1)
    assert set(run.methods[0].engine.matrices) == {  # type: ignore[attr-defined]
        f"block.{name}.weight" for name in BLOCK
    }
    both = GaLore(8, layers="block.*,embed,head")
    run = ours(Llama(), both, 1)
    assert {"embed.weight", "head.weight"} < set(both.engine.matrices)  # type: ignore[attr-defined]


def test_warm_iteration_learns_as_the_exact_decomposition_does() -> None:
    """And a basis of the gradient beats none at all: a random one, kept."""
    last = {}
    for basis, every in (("svd", 20), ("power", 20), ("random", 0)):
        model = Llama()
        method = GaLore(4, every=every, basis=basis, scale=1.0, layers="block.*", stagger=False)
        ours(model, method, 100)
        last[basis] = sum(float(loss(model, 1000 + i).detach()) for i in range(5)) / 5
    assert abs(last["power"] - last["svd"]) < 0.05
    assert last["power"] < last["random"]


def test_state_and_gradients_shrink_as_the_formula_says() -> None:
    model = Llama()
    optimizer = torch.optim.AdamW(model.parameters())
    rankwise.start(model, GaLore(8), optimizer)
    for step in range(2):
        optimizer.zero_grad()
        loss(model, step).backward()
        optimizer.step()
    for rows, columns in BLOCK.values():
        assert any(
            p.numel() == 8 * max(rows, columns) == optimizer.state[p]["exp_avg"].numel()
            for g in optimizer.param_groups
            for p in g["params"]
        )
    held = sum(s["exp_avg"].numel() + s["exp_avg_sq"].numel() for s in optimizer.state.values())
    projected = sum(8 * max(shape) for shape in BLOCK.values())
    assert held == 2 * (projected + 2 * 50 * 32)
