"""LTE with one head for each data-parallel worker: the parallel mode, without its traffic."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import rankwise
from rankwise import LTE, GaLore, LoRA, MultiHeadGaLore, distributed
from rankwise.errors import CheckpointError, LifeCycleError, WorkersDisagreeError
from rankwise.layers import adapted_layers
from test_distributed import Workers, _torchrun, assert_same, caught

EVERY, LAST = 3, 8
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "AdamW": lambda p: AdamW(p, lr=1e-2, weight_decay=0.0),
}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    workers = Workers(tmp_path_factory.mktemp("workers"))
    yield workers
    workers.stop()


class Net(nn.Module):
    """Linear layers, an embedding, a BatchNorm if asked for, and a constant among the buffers."""

    def __init__(self, seed: int = 0, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Embedding(7, 10)
        self.first = nn.Linear(10, 24)
        self.norm = nn.BatchNorm1d(24) if norm else nn.Identity()
        self.second = nn.Linear(24, 16)
        self.last = nn.Linear(16, 4)
        self.constant: Tensor
        self.register_buffer("constant", torch.tensor([0.1, float("-inf")]))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.second(self.norm(self.first(self.embed(x))).tanh())))


def batch(i: int, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + i)
    x = torch.randint(7, (16,), generator=generator)
    y = torch.randint(4, (16,), generator=generator)
    return x.chunk(parts)[part], y.chunk(parts)[part]


def method(**options: Any) -> LTE:
    chosen: dict[str, Any] = {"rank": 2, "alpha": 4.0, "merge_every": EVERY, "mode": "workers"}
    return LTE(**{**chosen, **options})


def begin(optimizer: str = "AdamW", seed: int = 0, norm: bool = False, **options: Any) -> Any:
    model = Net(seed, norm)
    start = {k: options.pop(k) for k in ("resume", "wrap") if k in options}
    lte = method(**options)
    return rankwise.start(model, lte, OPTIMIZERS[optimizer](model.parameters()), **start)


def train(run: Any, until: int, model: Any = None) -> None:
    while run.step < until:
        x, y = batch(run.step, distributed.worker(), distributed.workers())
        run.optimizer.zero_grad()
        F.cross_entropy((model or run.model)(x), y).backward()
        run.optimizer.step()


def weights(run: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in run.bare.state_dict().items()}


# ---------------------------------------------------------------- what it is


def _trained(optimizer: str, others: str) -> dict[str, Any]:
    # Other initial weights on worker 1: worker 0's count.
    run = begin(optimizer, distributed.worker(), others=others)
    train(run, LAST)
    apart, sent = weights(run), run.methods[0].updates.workers.sent
    run.methods[0].finalize(run.bare)  # not run.finish(), which would share worker 0's weights
    return {"apart": apart, "merged": weights(run), "sent": sent}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_workers_are_the_heads_of_one_process(together: Workers, optimizer: str) -> None:
    """N workers = N parallel heads on the joined batch, each with its chunk's own mean loss."""
    answers = together(_trained, optimizer, "none")
    run = begin(optimizer, mode="parallel", heads=2, others="none")
    train(run, LAST)
    for name, layer in adapted_layers(run.bare).items():
        for n, answer in enumerate(answers):
            for part in ("u", "v"):
                own = answer["apart"][f"{name}.heads.0.{part}.weight"]
                theirs = getattr(layer.heads[n], part).weight.detach()
                torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-6)
    run.finish()
    for answer in answers:
        assert_same(answer["merged"], answers[0]["merged"])  # bit for bit the same
        torch.testing.assert_close(answer["merged"], weights(run), rtol=1e-4, atol=1e-6)
    assert not torch.equal(weights(run)["first.weight"], weights(begin())["first.base.weight"])


def test_only_factors_travel_and_only_at_merges(together: Workers) -> None:
    answers = together(_trained, "SGD", "none")
    factors = 2 * (24 + 10) + 2 * (16 + 24)
    assert {answer["sent"] for answer in answers} == {4 * factors * (LAST // EVERY)}


def test_one_worker_is_lora() -> None:
    run, model = begin("SGD", others="none"), Net()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    lora = rankwise.start(model, LoRA(rank=2, alpha=4.0, init="orthogonal"), optimizer)
    for one in (run, lora):
        train(one, LAST)
        one.finish()
    torch.testing.assert_close(weights(run), weights(lora), rtol=1e-5, atol=1e-6)


def _others(others: str) -> list[dict[str, Tensor]]:
    run = begin("SGD", norm=True, others=others)
    train(run, EVERY - 1)
    before = weights(run)
    train(run, EVERY)
    return [before, weights(run)]


def test_what_else_learns_becomes_its_mean_at_merges(together: Workers) -> None:
    (before0, after0), (before1, after1) = together(_others, "all")
    shared = [n for n in before0 if ".heads." not in n and ".merged." not in n]
    apart = {n for n in shared if not torch.equal(before0[n], before1[n])}
    assert {"last.weight", "second.base.bias", "norm.weight", "norm.running_mean"} <= apart
    assert not {n for n in apart if n.endswith("base.weight")}
    for name in shared:
        assert_same(after1[name], after0[name])
    assert_same(after0["constant"], Net().constant)
    assert after0["norm.num_batches_tracked"] == EVERY


def test_what_is_frozen_stays(together: Workers) -> None:
    for before, after in together(_others, "last"):
        assert not torch.equal(before["last.weight"], Net(norm=True).last.weight)
        assert_same(after["embed.weight"], Net(norm=True).embed.weight)
        assert_same(after["first.base.bias"], Net(norm=True).first.bias)


def _half(rounding: str) -> list[Tensor]:
    run = begin("SGD", others="none", rounding=rounding)
    run.bare.bfloat16()
    train(run, LAST)
    run.methods[0].finalize(run.bare)
    return list(weights(run).values())


@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
def test_merges_round_alike_on_all_workers(together: Workers, rounding: str) -> None:
    first, second = together(_half, rounding)
    assert_same(second, first)


def _evaluated(open_: bool) -> list[Tensor]:
    run = begin("SGD", others="none", evaluate_open=open_)
    seen = []
    for stop in (EVERY - 1, EVERY):
        train(run, stop)
        seen.append(run.bare.eval()(batch(0)[0]).detach())
        run.bare.train()
    return seen


def test_evaluation_reads_this_workers_head_or_merged_weights_alone(together: Workers) -> None:
    first, second = together(_evaluated, True)
    assert not torch.equal(first[0], second[0])
    torch.testing.assert_close(first[1], second[1], rtol=1e-5, atol=1e-6)
    first, second = together(_evaluated, False)
    assert_same(second, first)
    assert_same(first[0], Net()(batch(0)[0]).detach())


# ---------------------------------------------------------------- checkpoints

STOPS = (0, 1, EVERY - 1, EVERY, EVERY + 1)


APART: dict[str, Callable[[], list[Any]]] = {
    "LTE": lambda: [method()],
    "LTE, GaLore on its factors": lambda: [
        method(),
        GaLore(rank=1, every=2, layers="*.heads.*"),
    ],
    "multi-head GaLore": lambda: [MultiHeadGaLore(rank=2, merge_every=EVERY, mode="workers")],
}


def _content(run: Any) -> dict[str, Any]:
    return {"weights": weights(run), "run": run.state_dict()["optimizer"]["state"]}


def _begun(name: str, seed: int = 0, resume: str | None = None) -> Any:
    model = Net(seed, norm=True)
    optimizer = OPTIMIZERS["AdamW"](model.parameters())
    return rankwise.start(model, APART[name](), optimizer, resume=resume)


def _save(directory: str, name: str = "LTE") -> dict[str, Any]:
    run = _begun(name)
    for stop in STOPS:
        train(run, stop)
        rankwise.save(directory, run, keep=9)
    train(run, LAST)
    return _content(run)


def _resume(path: str, name: str) -> dict[str, Any]:
    run = _begun(name, seed=3 + distributed.worker(), resume=path)
    train(run, LAST)
    return _content(run)


@pytest.mark.parametrize("name", APART)
def test_every_workers_head_is_saved_and_resumed_exactly(
    together: Workers, tmp_path: Path, name: str
) -> None:
    whole = together(_save, str(tmp_path), name)
    assert not torch.equal(*(w["weights"]["first.heads.0.v.weight"] for w in whole))
    for path in sorted(tmp_path.iterdir()):
        for resumed, expected in zip(together(_resume, str(path), name), whole, strict=True):
            assert_same(resumed, expected)


def test_another_number_of_workers_is_refused(together: Workers, tmp_path: Path) -> None:
    together(_save, str(tmp_path / "two"))
    with pytest.raises(
        CheckpointError, match=r"by 2 worker\(s\) .* there are 1 now; resume with 2"
    ):
        begin(norm=True, resume=tmp_path / "two")
    rankwise.save(tmp_path / "one", begin())
    for message in together(_resume_elsewhere, str(tmp_path / "one")):
        assert "was saved by 1 worker(s) that train apart" in message


def _resume_elsewhere(path: str) -> str:
    return caught(CheckpointError, lambda: begin(resume=path))


def test_other_heads_than_the_saved_runs_are_refused(tmp_path: Path) -> None:
    rankwise.save(tmp_path, begin())
    with pytest.raises(LifeCycleError, match=r"first has 1 head\(s\) in the saved run, .* for 4"):
        begin(mode="parallel", heads=4, resume=tmp_path)


# ---------------------------------------------------------------- what averages gradients


def _wrapped() -> list[str]:
    messages = [caught(LifeCycleError, lambda: begin(wrap=distributed.wrap))]
    run = begin(wrap=lambda model: torch.compile(model, backend="eager"))
    train(run, 1)  # a wrapper that averages nothing is welcome
    run = begin()
    foreign = DistributedDataParallel(run.bare)
    messages.append(caught(LifeCycleError, train, run, 1, foreign))
    return messages


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_wrapper_that_averages_gradients_is_refused(together: Workers) -> None:
    for at_start, foreign in together(_wrapped):
        assert "LTE: every worker trains a head of its own" in at_start
        assert "is wrapped in DistributedDataParallel" in foreign


def _out_of_step() -> str:
    run = begin("SGD")
    with contextlib.suppress(StopIteration):
        train(run, EVERY - 1)
    run.step += distributed.worker() * EVERY  # as if it had skipped steps
    return caught(WorkersDisagreeError, train, run, run.step + 1)


def test_workers_out_of_step_are_found_at_a_merge(together: Workers) -> None:
    for message in together(_out_of_step):
        assert "workers disagree about the step of a merge, and" in message


# ---------------------------------------------------------------- commands


@pytest.mark.slow
def test_torchrun_trains_apart_and_resumes(tmp_path: Path) -> None:
    recipe = ["--model", "mlp-128x4", "--epochs", "2", "--batch-size", "200", "--method", "lte"]
    recipe += ["--method.mode", "workers", "--method.rank", "4", "--method.merge-every", "8"]
    recipe += ["--method.alpha", "8", "--optimizer", "adam", "--lr", "1e-3"]
    whole = tmp_path / "whole"
    assert "2 worker(s)" in _torchrun(*recipe, "--out", str(whole))
    expected = rankwise.load(whole)
    assert set(expected.apart or ()) == {1}
    (whole / "step-00000040").rename(tmp_path / "aside")
    _torchrun("--resume", str(whole))
    assert_same(rankwise.load(whole).weights, expected.weights)


@pytest.mark.slow
def test_the_benchmark_counts_what_travels(tmp_path: Path) -> None:
    root = Path(__file__).parent.parent
    text, record = tmp_path / "some.txt", tmp_path / "record.jsonl"
    text.write_text("To be, or not to be, that is the question:\n" * 2000)
    command = [sys.executable, str(root / "benchmarks" / "lte_workers.py"), "--smoke"]
    command += ["--data", f"text:{text}", "--record", str(record), "--rows"]
    done = subprocess.run(
        [*command, "AdamW, DDP", "LTE, rank 32"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    dense, lte = (json.loads(line) for line in record.read_text().splitlines()[1:])
    assert dense["bytes_per_step"] == 4 * dense["trained"]
    assert lte["bytes_per_step"] == 4 * lte["trained"] / 10  # one merge in ten steps
    assert "LTE, rank 32" in done.stdout
