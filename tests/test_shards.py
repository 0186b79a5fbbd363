"""Runs on weights sharded by FSDP2: as on one worker, saved whole, resumed exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import rankwise
from rankwise import checkpoint, distributed, sharding
from rankwise.errors import CheckpointError, LifeCycleError, OptionError
from rankwise.method import Method
from rankwise.methods.apollo_mini import ApolloMini
from rankwise.methods.galore import GaLore
from rankwise.methods.qgalore import QGaLore
from test_distributed import Workers
from test_projected import METHODS, Batch, adamw, batches, gap, train

STEPS, SAVED = 8, 5
KINDS: dict[str, Callable[[], Method]] = {
    **METHODS,
    "right": partial(GaLore, 4, every=3, side="right"),
    "one factor": partial(ApolloMini, every=3),
    "low-bit": partial(QGaLore, 4, every=3),
    "compensated": partial(GaLore, 4, every=3, rounding="compensated"),
}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    workers = Workers(tmp_path_factory.mktemp("workers"))
    yield workers
    workers.stop()


def tall(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Rows that two workers cannot share evenly; on one worker too the right side is the short."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(24, 41), nn.Tanh(), nn.Linear(41, 43), nn.Tanh(), nn.Linear(43, 7)
    ).to(dtype)


def sharded(model: nn.Module, mesh_shape: tuple[int, ...] = (2,)) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = ("copies", "shards")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    for layer in model.children():
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def data(first: int = 0, last: int = STEPS) -> list[Batch]:
    """Steps `first` to `last`, in one sequence however they are cut; 7 classes."""
    return [(x, y.clamp_max(6)) for x, y in batches(STEPS)][first:last]


def mine(pieces: list[Batch], dtype: torch.dtype = torch.float32) -> list[Batch]:
    rank = distributed.worker()
    return [(x[rank::2].to(dtype), y[rank::2]) for x, y in pieces]


def gathered(model: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    full = tall(dtype)
    with torch.no_grad():
        for p, q in zip(full.parameters(), model.parameters(), strict=True):
            p.copy_(q.full_tensor())
    return full


# ---------------------------------------------------------------- two workers are one


def _started(name: str, clip: float | None, mesh: tuple[int, ...]) -> tuple[float, list[str]]:
    model = sharded(tall(), mesh)
    run = rankwise.start(model, KINDS[name](), adamw(model), clip_norm=clip)
    train(run, mine(data()))
    run.finish()
    held = [type(p).__name__ for group in run.optimizer.param_groups for p in group["params"]]
    alone = tall()
    train(rankwise.start(alone, KINDS[name](), adamw(alone), clip_norm=clip), iter(data()))
    return gap(gathered(model), alone), held


@pytest.mark.parametrize(
    ("name", "clip", "mesh"),
    [
        ("right", None, (2,)),
        ("right", 0.1, (1, 2)),
        ("plain", None, (2, 1)),
        ("residual", 0.1, (2,)),
        ("scaling", None, (2,)),
        ("one factor", None, (2,)),
        ("signs", None, (2,)),
        ("feedback", None, (2,)),
        ("orthonormal", None, (2,)),
        ("tracked, residual", None, (2,)),
    ],
)
def test_a_run_on_shards_is_the_run_of_one_worker(
    together: Workers, name: str, clip: float | None, mesh: tuple[int, ...]
) -> None:
    """Norms over rows, too, are those of the whole matrix: limiters, gains, unit columns."""
    for difference, held in together(_started, name, clip, mesh):
        assert difference < 2e-5
        assert set(held) == {"DTensor"}


def _placed_otherwise() -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model: Any = tall()
    placed = distribute_tensor(model[0].weight.detach(), init_device_mesh("cpu", (2,)), [Shard(1)])
    model[0].weight = nn.Parameter(placed)
    with pytest.raises(OptionError) as refused:
        rankwise.start(model, KINDS["right"](), adamw(model))
    return str(refused.value)


def _muon() -> str:
    model = sharded(tall())
    matrices = [p for p in model.parameters() if p.dim() == 2]
    with pytest.raises(LifeCycleError) as refused:
        rankwise.start(model, KINDS["right"](), torch.optim.Muon(matrices))
    return str(refused.value)


def _weights_of_8_bits() -> str:
    model = sharded(tall())
    with pytest.raises(OptionError) as refused:
        rankwise.start(model, QGaLore(4, weight_bits=8), adamw(model))
    return str(refused.value)


def _replicated_weights_of_8_bits() -> list[Tensor]:
    model: Any = tall()
    method = QGaLore(4, every=3, weight_bits=8)
    run = rankwise.start(model, method, adamw(model), wrap=distributed.wrap)
    train(run, mine(data()))
    return [*model[0].weight.parts(), *(p.detach() for p in run.finish().parameters())]


def test_weights_of_8_bits_go_with_copies_and_not_with_shards(together: Workers) -> None:
    assert all("weight_bits" in text for text in together(_weights_of_8_bits))
    first, second = together(_replicated_weights_of_8_bits)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_what_does_not_go_by_rows_is_refused(together: Workers) -> None:
    for text in together(_placed_otherwise):
        assert "0.weight is placed as S(1)" in text or "Shard(dim=1)" in text
        assert "fully_shard" in text
    assert all("Muon on sharded weights" in text for text in together(_muon))


# ---------------------------------------------------------------- checkpoints


def _states(run: rankwise.Run) -> list[Tensor]:
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    tensors = [t for p in held for t in run.optimizer.state[p].values() if isinstance(t, Tensor)]
    return [sharding.local(t).clone() for t in tensors]


def _resumed(name: str, directory: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(1 + distributed.worker())
    go_on = sharded(tall(dtype))
    whole = rankwise.start(go_on, KINDS[name](), adamw(go_on), clip_norm=1.0)
    train(whole, mine(data(0, SAVED), dtype))
    path = rankwise.save(directory, whole, extra={"note": "here"})
    drawn = torch.rand(3)
    train(whole, mine(data(SAVED), dtype))
    other = sharded(tall(dtype))
    run = rankwise.start(other, KINDS[name](), adamw(other), clip_norm=1.0, resume=directory)
    assert run.resumed is not None
    run.resumed.restore_random()
    assert run.step == SAVED
    assert run.resumed.extra == {"note": "here"}
    torch.testing.assert_close(torch.rand(3), drawn, rtol=0, atol=0)
    train(run, mine(data(SAVED), dtype))
    torch.testing.assert_close(_states(run), _states(whole), rtol=0, atol=0)
    return {"ours": gathered(other, dtype), "theirs": gathered(go_on, dtype), "path": str(path)}


@pytest.mark.parametrize(
    "name", ["right", "rotated", "residual", "feedback", "orthonormal", "tracked", "low-bit"]
)
def test_a_resumed_run_on_shards_is_the_uninterrupted_one(
    together: Workers, tmp_path: Path, name: str
) -> None:
    for answer in together(_resumed, name, str(tmp_path)):
        assert gap(answer["ours"], answer["theirs"]) == 0
        assert gap(answer["ours"], tall()) > 1e-3
        assert answer["path"] == str(tmp_path / "step-00000005")


def test_what_rounding_loses_is_resumed_on_shards(together: Workers, tmp_path: Path) -> None:
    for answer in together(_resumed, "compensated", str(tmp_path), torch.bfloat16):
        assert gap(answer["ours"], answer["theirs"]) == 0


def _saved_on_shards(name: str, directory: str) -> None:
    model = sharded(tall())
    run = rankwise.start(model, KINDS[name](), adamw(model))
    train(run, mine(data(0, SAVED)))
    rankwise.save(directory, run)


def _resumed_on_shards(name: str, directory: str) -> nn.Module:
    model = sharded(tall())
    run = rankwise.start(model, KINDS[name](), adamw(model), resume=directory)
    train(run, mine(data(SAVED)))
    return gathered(model)


@pytest.mark.parametrize("name", ["rotated", "residual", "feedback"])
def test_shards_and_one_worker_resume_each_other(
    together: Workers, tmp_path: Path, name: str
) -> None:
    reference = tall()
    run = rankwise.start(reference, KINDS[name](), adamw(reference))
    train(run, iter(data(0, SAVED)))
    rankwise.save(tmp_path / "alone", run)
    train(run, iter(data(SAVED)))
    together(_saved_on_shards, name, str(tmp_path / "shards"))
    one, other = (checkpoint.load(tmp_path / kind) for kind in ("alone", "shards"))
    torch.testing.assert_close(one.weights, other.weights, rtol=0, atol=2e-5)
    torch.testing.assert_close(
        one.run["optimizer"]["state"], other.run["optimizer"]["state"], rtol=1e-3, atol=2e-5
    )
    assert one.run["parameter_names"] == other.run["parameter_names"]
    model = tall()
    resumed = rankwise.start(model, KINDS[name](), adamw(model), resume=tmp_path / "shards")
    train(resumed, iter(data(SAVED)))
    assert gap(model, reference) < 2e-5
    for answer in together(_resumed_on_shards, name, str(tmp_path / "alone")):
        assert gap(answer, reference) < 2e-5


class RowMeans(SGD):
    """Moves as SGD does, and keeps a number for every row."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["row"] = sharding.local(p.grad).flatten(1).mean(1, keepdim=True)


def _not_saved(directory: str, make: Callable[[Any], Optimizer]) -> str:
    model = sharded(nn.Sequential(nn.Linear(24, 41, bias=False), nn.Linear(41, 7, bias=False)))
    run = rankwise.start(model, KINDS["right"](), make(model.parameters()))
    train(run, mine(data(0, 2)))
    with pytest.raises(CheckpointError) as refused:
        rankwise.save(directory, run)
    return str(refused.value)


def test_a_sharded_run_that_cannot_be_saved_says_so_on_every_worker(
    together: Workers, tmp_path: Path
) -> None:
    for text in together(_not_saved, str(tmp_path), partial(RowMeans, lr=0.1)):
        assert "'row' (Tensor of (2" in text
        assert "does not add up" in text
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    for text in together(_not_saved, str(tmp_path / "file"), partial(AdamW, lr=0.1)):
        assert "was not written" in text
