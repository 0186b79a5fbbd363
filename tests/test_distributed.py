"""Several workers: they agree, they notice when they do not, and the switch keeps them equal."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import rankwise
from rankwise import checkpoint, distributed, storage
from rankwise.cli import main
from rankwise.errors import CheckpointError, LifeCycleError, WorkersDisagreeError
from rankwise.layers import LowRankLayer
from rankwise.ranks.automatic import tracking

WORKERS, SWITCH, LAST = 2, 3, 6


# ---------------------------------------------------------------- two workers, started once


def _serve(rank: int, meeting: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{meeting}", rank=rank, world_size=WORKERS)
    while (task := pipe.recv()) is not None:
        function, arguments = task
        try:
            answer: Any = (True, function(*arguments))
        except BaseException:
            answer = (False, traceback.format_exc())
        content = io.BytesIO()
        torch.save(answer, content)
        pipe.send_bytes(content.getvalue())
    dist.destroy_process_group()


class Workers:
    """Two processes that run the same function at the same time."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.starts = directory, 0
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        self.starts += 1
        meeting = str(self.directory / f"meeting-{self.starts}")
        for rank in range(WORKERS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, meeting, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        for pipe in self.pipes:
            pipe.send((function, arguments))
        answers = []
        for pipe in self.pipes:
            if not pipe.poll(60):
                # The next one must not be given the answer that this one is still owed.
                self.stop()
                self.start()
                pytest.fail(f"{function}: a worker did not answer within 60 s")
            answers.append(torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False))
        failures = "\n".join(text for worked, text in answers if not worked)
        assert not failures, failures
        return [value for _, value in answers]

    def stop(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            with contextlib.suppress(OSError):
                pipe.send(None)
            process.join(10)
            process.kill()


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    workers = Workers(tmp_path_factory.mktemp("workers"))
    yield workers
    workers.stop()


def caught(error: type[Exception], function: Callable[..., Any], *arguments: Any) -> str:
    with pytest.raises(error) as raised:
        function(*arguments)
    return str(raised.value)


def assert_same(actual: Any, expected: Any, tolerance: float = 0.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------- talking


def _talk() -> dict[str, Any]:
    rank = distributed.worker()
    return {
        "worker": (rank, distributed.workers()),
        "mean": distributed.mean(1.5 + rank),
        "gathered": distributed.gather({"worker": rank}),
        "shared": distributed.share(f"from {rank}"),
    }


def test_workers_know_each_other(together: Workers) -> None:
    first, second = together(_talk)
    assert (first["worker"], second["worker"]) == ((0, 2), (1, 2))
    for answer in (first, second):
        assert answer["mean"] == 2.0
        assert answer["gathered"] == [{"worker": 0}, {"worker": 1}]
        assert answer["shared"] == "from 0"


def test_a_single_process_needs_no_group() -> None:
    model, tensor = nn.Linear(2, 2), torch.ones(3)
    assert (distributed.worker(), distributed.workers()) == (0, 1)
    assert (distributed.mean(2.5), distributed.gather(1), distributed.share(2)) == (2.5, [1], 2)
    distributed.agree("a", "letters")
    distributed.broadcast_([tensor])
    distributed.compare_gradients([("weight", None)])
    distributed.broadcast_buffers(model)
    distributed.shutdown()
    assert distributed.wrap(model) is model
    assert distributed.bare(distributed.wrap(model, compile=True)) is model
    assert_same(tensor, torch.ones(3))


def test_outside_torchrun_nothing_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    cuda = torch.cuda.is_available()
    assert distributed.initialize().type == ("cuda" if cuda else "cpu")
    assert distributed.workers() == 1


def test_half_an_environment_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    for name in ("RANK", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(LifeCycleError, match=r"RANK, MASTER_PORT is not set; start .* torchrun"):
        distributed.initialize()


def test_more_workers_than_devices_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "3"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(LifeCycleError, match=r"worker 3 .*has 1 CUDA device.*--nproc-per-node"):
        distributed.initialize()


# ---------------------------------------------------------------- agreeing


def _agree() -> list[str]:
    rank = distributed.worker()
    distributed.agree("the same", "a string")
    long = "x" * 500
    return [
        caught(WorkersDisagreeError, distributed.agree, f"{long}{rank}{long}", "the plan"),
        caught(WorkersDisagreeError, distributed.agree, "ab" if rank else "a", "the plan"),
    ]


def test_a_disagreement_is_shown_on_every_worker(together: Workers) -> None:
    first, second = together(_agree)
    assert first == second
    assert "workers disagree about the plan: worker 0 has '...xxx" in first[0]
    assert "x0x" in first[0]
    assert "x1x" in first[0]
    assert len(first[0]) < 400
    assert "worker 0 has 'a', worker 1 has 'ab'" in first[1]


DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.complex64,
)


def _broadcast() -> list[Tensor]:
    torch.manual_seed(distributed.worker())
    tensors = [(torch.rand(3, 5) * 9).to(dtype) for dtype in DTYPES] + [torch.rand(9, 9) < 0.5]
    tensors += [torch.rand(4, 6).T, torch.rand(8, 8)[::2, 1::3], torch.rand(()), torch.rand(0, 3)]
    tensors += [torch.rand(2, 3, 4, 4).to(memory_format=torch.channels_last)]
    tensors += [nn.Parameter(torch.rand(2, 2)), torch.rand(3000, 3000), torch.rand(3000, 3000)]
    addresses = [t.data_ptr() for t in tensors]
    mine = [t.clone() for t in tensors]
    distributed.broadcast_(tensors)
    assert [t.data_ptr() for t in tensors] == addresses
    changed = [not torch.equal(a, b) for a, b in zip(tensors, mine, strict=True) if a.numel()]
    assert not any(changed) if distributed.worker() == 0 else all(changed)
    return [
        t.detach().double().sum() if t.numel() > 100 else t.detach()
        for t in tensors
        if t.dtype != torch.complex64
    ]


def test_a_broadcast_gives_all_worker_0s_values_in_place(together: Workers) -> None:
    first, second = together(_broadcast)
    assert_same(second, first)


def _broadcast_unequal() -> str:
    return caught(
        WorkersDisagreeError, distributed.broadcast_, [torch.zeros(2 + distributed.worker())]
    )


def test_a_broadcast_of_other_shapes_raises_instead_of_hanging(together: Workers) -> None:
    for message in together(_broadcast_unequal):
        assert "shapes of the 1 tensors to share" in message


def _buffers() -> Tensor:
    model = nn.BatchNorm1d(3)
    model.running_mean = torch.full((3,), float(distributed.worker() + 1))
    distributed.broadcast_buffers(distributed.wrap(model))
    assert model.running_mean is not None
    return model.running_mean


def test_buffers_are_worker_0s(together: Workers) -> None:
    for mean in together(_buffers):
        assert_same(mean, torch.ones(3))


def _compare() -> dict[str, str]:
    rank, equal = distributed.worker(), torch.ones(4, 4)
    fine = {
        "same": equal,
        "none": None,
        "rounding": equal * (1 + 1e-7 * rank),
        "nan everywhere": equal * float("nan"),
        "inf everywhere": equal * float("inf"),
        "half": torch.full((4,), 6e4, dtype=torch.float16),
        "sparse": torch.eye(3).to_sparse(),
        "zero": torch.zeros(2),
    }
    distributed.compare_gradients(fine.items())
    wrong = {
        "other": equal * (1 + 1e-3 * rank),
        "one missing": None if rank else equal,
        "missing or zero": None if rank else torch.zeros(2),
        "one nan": equal * (float("nan") if rank else 1),
    }
    return {
        name: caught(
            WorkersDisagreeError, distributed.compare_gradients, [*fine.items(), (name, gradient)]
        )
        for name, gradient in wrong.items()
    }


def test_gradients_that_differ_are_named_on_every_worker(together: Workers) -> None:
    first, second = together(_compare)
    assert first == second
    for name, message in first.items():
        assert f"gradients differ between workers: {name}, norms" in message
        assert "wrap=rankwise.distributed.wrap" in message
    assert "norms 4, 4.004 on workers" in first["other"]
    assert "norms 4, none on workers" in first["one missing"]
    assert "norms 0, none on workers" in first["missing or zero"]
    assert "norms 4, inf on workers" in first["one nan"]


def _wrap() -> None:
    model = nn.Linear(2, 2)
    wrapped = distributed.wrap(model)
    assert isinstance(wrapped, DistributedDataParallel)
    assert distributed.bare(wrapped) is model
    compiled = distributed.wrap(model, compile=True)
    assert isinstance(compiled._modules["_orig_mod"], DistributedDataParallel)
    assert distributed.bare(compiled) is model
    frozen = nn.Linear(2, 2).requires_grad_(False)
    assert distributed.wrap(frozen) is frozen


def test_wrapping_and_unwrapping(together: Workers) -> None:
    together(_wrap)


# ---------------------------------------------------------------- training


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(10, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)
    )


def batch(i: int, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + i)
    x = torch.randn(16, 10, generator=generator)
    y = torch.randint(4, (16,), generator=generator)
    return x.chunk(parts)[part], y.chunk(parts)[part]


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: SGD(p, lr=0.1, momentum=0.9),
    "AdamW, fused": lambda p: AdamW(p, lr=1e-2, fused=True),
}


def begin(
    optimizer: str, seed: int = 0, method: str = "pufferfish", **options: Any
) -> tuple[rankwise.Run, Optimizer]:
    model = network(seed)
    made = OPTIMIZERS[optimizer](model.parameters())
    chosen = {"ranks": 8, **({"warmup_steps": SWITCH} if method == "pufferfish" else {})}
    run = rankwise.start(model, rankwise.METHODS[method](**chosen), made, **options)
    return run, made


def train(
    run: rankwise.Run, optimizer: Optimizer, until: int, micro: int = 1, model: Any = None
) -> None:
    """One step a batch, of which this worker has its part, in `micro` pieces."""
    model = run.model if model is None else model
    while run.step < until:
        x, y = batch(run.step, distributed.worker(), distributed.workers())
        optimizer.zero_grad()
        pieces = list(zip(x.chunk(micro), y.chunk(micro), strict=True))
        for i, (piece, labels) in enumerate(pieces):
            quiet = i < micro - 1 and distributed.workers() > 1
            with model.no_sync() if quiet else contextlib.nullcontext():
                (F.cross_entropy(model(piece), labels) / micro).backward()
        optimizer.step()


def content(run: rankwise.Run) -> dict[str, Any]:
    """Everything that has to be equal: weights, and the optimizer's state by parameter."""
    state = run.state_dict()
    held = {
        "weights": dict(run.bare.state_dict()),
        "state": state["optimizer"]["state"],
        "names": state["parameter_names"],
    }
    return copy.deepcopy(held)


def assert_equal(a: dict[str, Any], b: dict[str, Any], tolerance: float = 0.0) -> None:
    assert a["names"] == b["names"]
    assert_same(a["weights"], b["weights"], tolerance)
    assert a["state"].keys() == b["state"].keys()
    for index, state in a["state"].items():
        assert_same(state, b["state"][index], tolerance)


def _train(optimizer: str, method: str, micro: int) -> list[dict[str, Any]]:
    # Other initial weights on worker 1: the first wrap gives it worker 0's.
    run, made = begin(optimizer, distributed.worker(), method, wrap=distributed.wrap)
    contents = []
    for step in range(1, LAST + 1):
        train(run, made, step, micro)
        contents.append(content(run))
    assert distributed.bare(run.model) is run.bare
    assert isinstance(run.bare.get_submodule("2"), LowRankLayer)
    assert run.finish() is run.bare
    return contents


@pytest.mark.parametrize(
    ("optimizer", "method", "micro"),
    [
        ("SGD", "pufferfish", 1),
        ("SGD", "pufferfish", 2),
        ("AdamW, fused", "pufferfish", 1),
        ("SGD", "factorized", 2),
    ],
)
def test_two_workers_equal_each_other_exactly_and_one_process_to_rounding(
    together: Workers, optimizer: str, method: str, micro: int
) -> None:
    first, second = together(_train, optimizer, method, micro)
    run, made = begin(optimizer, 0, method)
    for step in range(1, LAST + 1):
        assert_equal(second[step - 1], first[step - 1])
        train(run, made, step)
        tolerance = 1e-5 if optimizer == "SGD" else 1e-3
        assert_equal(first[step - 1], content(run), tolerance)


def _train_compiled() -> dict[str, Any]:
    def wrap(model: nn.Module) -> Any:
        return torch.compile(distributed.wrap(model), backend="eager")

    run, made = begin("SGD", wrap=wrap)
    train(run, made, LAST)
    return content(run)


def test_compiled_workers_go_on_after_the_switch(together: Workers) -> None:
    first, second = together(_train_compiled)
    assert_equal(second, first)
    run, made = begin("SGD")
    train(run, made, LAST)
    assert_equal(first, content(run), 1e-5)


def _train_foreign(find_unused: bool) -> tuple[int, str]:
    run, made = begin("SGD")
    foreign = DistributedDataParallel(run.bare, find_unused_parameters=find_unused)
    train(run, made, SWITCH, model=foreign)
    message = caught(WorkersDisagreeError, train, run, made, LAST, 1, foreign)
    return run.step, message


@pytest.mark.parametrize("find_unused", [True, False])
def test_a_foreign_ddp_is_found_at_the_first_step_after_the_switch(
    together: Workers, find_unused: bool
) -> None:
    first, second = together(_train_foreign, find_unused)
    assert first == second
    step, message = first
    assert step == SWITCH
    assert "gradients differ between workers: 2.v.weight" in message
    assert "wrap=rankwise.distributed.wrap" in message


def _train_foreign_wrapped_again() -> dict[str, Any]:
    run, made = begin("SGD")
    train(run, made, SWITCH, model=DistributedDataParallel(run.bare))
    train(run, made, LAST, model=DistributedDataParallel(run.bare))
    return content(run)


def test_a_foreign_ddp_that_is_wrapped_again_is_fine(together: Workers) -> None:
    first, second = together(_train_foreign_wrapped_again)
    assert_equal(second, first)
    run, made = begin("SGD")
    train(run, made, LAST)
    assert_equal(first, content(run), 1e-5)


def _decide_apart() -> dict[str, Any]:
    """Worker 1 sees other stable ranks, and measures other times, than worker 0."""
    worker = distributed.worker()
    model = network(worker)
    with torch.no_grad():  # one direction: settled from the start
        u, s, v = torch.linalg.svd(model.get_parameter("2.weight"))
        s[1:] *= 0.01
        model.get_parameter("2.weight").copy_((u * s) @ v)
    made = SGD(model.parameters(), lr=1e-4)
    known: dict[str, Any] = {"steps_per_epoch": 8, "total_steps": 160}
    method = rankwise.Cuttlefish(min_gain=0.01)
    run = rankwise.start(model, method, made, wrap=distributed.wrap, **known)
    measure = tracking.StableRanks.measure

    def apart(self: Any, weights: Any) -> dict[str, float]:
        noise = 1.0 + 0.5 * worker * (run.step % 3)
        return {name: value * noise for name, value in measure(self, weights).items()}

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as cache:
        patch.setenv("XDG_CACHE_HOME", cache)
        patch.setattr(tracking.StableRanks, "measure", apart)
        train(run, made, 100)
    gains = next(event for event in run.events if event["event"] == "gains")
    switch = next(event for event in run.events if event["event"] == "switch")
    times = [(row["dense_ms"], row["low_rank_ms"]) for row in gains["rows"]]
    return {"content": content(run), "times": times, "step": switch["step"]}


def test_cuttlefish_decides_on_worker_0(together: Workers) -> None:
    first, second = together(_decide_apart)
    assert first["times"] == second["times"]
    assert first["step"] == second["step"] < 80
    assert "2.v.weight" in first["content"]["weights"]
    assert_equal(second["content"], first["content"])


def _other_ranks() -> str:
    model = network()
    made = SGD(model.parameters(), lr=0.1)
    method = rankwise.Factorized(ranks=8 + 8 * distributed.worker())
    return caught(
        WorkersDisagreeError, lambda: rankwise.start(model, method, made, wrap=distributed.wrap)
    )


def test_workers_with_other_ranks_are_found_at_the_start(together: Workers) -> None:
    first, second = together(_other_ranks)
    assert first == second
    assert "workers disagree about the structure of the model" in first


# ---------------------------------------------------------------- checkpoints


STOPS = (1, SWITCH - 1, SWITCH, SWITCH + 1)


def _save_everywhere(directory: str) -> dict[str, Any]:
    run, made = begin("AdamW, fused", distributed.worker(), wrap=distributed.wrap)
    torch.manual_seed(10 + distributed.worker())
    for stop in STOPS:
        train(run, made, stop)
        torch.rand(stop)
        path = checkpoint.save(directory, run, keep=9)
        # Every worker returns once the checkpoint stands.
        assert (path / storage.META).is_file()
    train(run, made, LAST)
    return {**content(run), "drawn": torch.rand(3)}


def _resume(path: str) -> dict[str, Any]:
    run, made = begin("AdamW, fused", 5 + distributed.worker(), wrap=distributed.wrap, resume=path)
    assert run.resumed is not None
    run.resumed.restore_random()
    later = [stop for stop in STOPS if stop > run.step]
    train(run, made, LAST)
    for stop in later:
        torch.rand(stop)
    return {**content(run), "drawn": torch.rand(3)}


def test_two_workers_resume_bit_for_bit_each_with_its_random_numbers(
    together: Workers, tmp_path: Path
) -> None:
    whole = together(_save_everywhere, str(tmp_path))
    assert not torch.equal(whole[0]["drawn"], whole[1]["drawn"])
    for path in sorted(tmp_path.iterdir()):
        for resumed, expected in zip(together(_resume, str(path)), whole, strict=True):
            assert_equal(resumed, expected)
            assert_same(resumed["drawn"], expected["drawn"])


def test_one_process_goes_on_from_two_and_two_cannot_from_one(
    together: Workers, tmp_path: Path
) -> None:
    together(_save_everywhere, str(tmp_path / "two"))
    run, made = begin("AdamW, fused", 3, resume=tmp_path / "two")
    assert run.resumed is not None
    run.resumed.restore_random()
    train(run, made, LAST)
    path = checkpoint.save(tmp_path / "one", run)
    first, second = together(_restore_random, str(path))
    assert first == ""
    assert "saved by 1 worker(s) and holds no random state for worker 1" in second


def _restore_random(path: str) -> str:
    try:
        checkpoint.load(path).restore_random()
    except CheckpointError as error:
        return str(error)
    return ""


def _save_where_it_fails(directory: str) -> list[str]:
    run, _ = begin("SGD", wrap=distributed.wrap)
    full, whole = storage._write_state, checkpoint.save(directory, run)

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    storage._write_state = no_space
    try:
        messages = [caught(CheckpointError, checkpoint.save, directory, run)]
    finally:
        storage._write_state = full
    extra = {"x": object()} if distributed.worker() == 0 else {}
    messages.append(caught(CheckpointError, lambda: checkpoint.save(directory, run, extra=extra)))
    assert checkpoint.load(whole).step == 0
    return messages


def test_where_worker_0_cannot_save_all_of_them_raise(together: Workers, tmp_path: Path) -> None:
    first, second = together(_save_where_it_fails, str(tmp_path))
    assert "no space left" in first[0]
    assert "extra['x'] is a builtins.object" in first[1]
    for ours, theirs in zip(first, second, strict=True):
        assert theirs == f"worker 0 could not save: {ours}"


# ---------------------------------------------------------------- commands


def _torchrun(*arguments: str) -> str:
    """Run `rankwise train` by two processes, as a user would; what it printed."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORKERS)]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "rankwise", "train", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_torchrun_trains_as_one_process_does_and_resumes_at_the_switch(tmp_path: Path) -> None:
    recipe = ["--model", "mlp-128x4", "--epochs", "2", "--batch-size", "200", "--method"]
    recipe += ["pufferfish", "--method.warmup-epochs", "1", "--optimizer", "adam", "--lr", "1e-3"]
    one, two, cut = (tmp_path / name for name in ("one", "two", "cut"))
    assert main(["train", *recipe, "--out", str(one)]) == 0
    output = _torchrun(*recipe, "--out", str(two))
    assert "2 worker(s)" in output
    assert output.count("test accuracy") == 1
    alone, together = checkpoint.load(one), checkpoint.load(two)
    assert (together.step, len(together.random), len(together.run["plan"])) == (40, 2, 4)
    assert_same(together.weights, alone.weights, 1e-3)

    shutil.copytree(two, cut)
    shutil.rmtree(cut / storage.name_of(40))
    assert checkpoint.load(cut).step == 20
    _torchrun("--resume", str(cut))
    resumed = checkpoint.load(cut)
    assert resumed.step == 40
    assert_same(resumed.weights, together.weights)


@pytest.mark.slow
def test_the_benchmark_of_data_parallelism_runs_and_counts_bytes(tmp_path: Path) -> None:
    script = Path(__file__).parent.parent / "benchmarks" / "ddp.py"
    file = tmp_path / "record.json"
    command = [sys.executable, str(script), "--smoke", "--json", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    record = json.loads(file.read_text())
    assert [row["model"] for row in record["rows"]] == ["mlp-128x4", "mlp-512x8"]
    for row in record["rows"]:
        assert row["model"] in done.stdout
        for side in row["sides"].values():
            # float32 gradients of every parameter, once a step.
            assert side["bytes_per_step"] == 4 * side["parameters"]
            assert len(side["epoch_seconds"]) == record["epochs"] - 1
        assert row["bytes_ratio"] > 1.4
    assert record["commit"]
    assert record["checksum"]
