"""Checkpoints: all of a run comes back, a crash costs nothing, nothing read is ever executed."""

from __future__ import annotations

import argparse
import errno
import json
import os
import pickle
import random
import resource
import subprocess
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from rankwise import checkpoint, storage
from rankwise.errors import CheckpointError
from rankwise.layers import LowRankLinear
from rankwise.structure import read_plan


@dataclass
class Held:
    """A run as far as a checkpoint is concerned."""

    bare: nn.Module = field(default_factory=lambda: nn.Linear(3, 4))
    step: int = 7
    state: dict[str, Any] = field(default_factory=dict)
    methods: tuple[Any, ...] = ()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, **self.state}


class Tensors(nn.Module):
    """A module that holds the tensors given."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)


def assert_same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def values(dtype: torch.dtype, *shape: int) -> Tensor:
    numbers = torch.arange(torch.Size(shape).numel()).reshape(shape) - 3
    if dtype == torch.bool:
        return numbers % 2 == 0
    return numbers.clamp(min=0).to(dtype) if dtype == torch.uint8 else (numbers * 1.25).to(dtype)


# ---------------------------------------------------------------- what comes back


DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
    torch.float8_e4m3fn,
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"matrix": values(dtype, 3, 5), "number": values(dtype), "none": values(dtype, 0, 4)}
    checkpoint.save(tmp_path, Held(Tensors(**tensors)))
    back = checkpoint.load(tmp_path).weights
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == dtype
        assert back[name].shape == tensor.shape
        stored, given = back[name].reshape(-1), tensor.reshape(-1)
        assert torch.equal(stored.view(torch.uint8), given.view(torch.uint8))


def test_non_contiguous_and_partial_tensors_come_back(tmp_path: Path) -> None:
    whole = torch.randn(6, 8)
    tensors = {
        "transposed": torch.randn(4, 5).T,
        "strided": whole[::2, 1::3],
        "rows": whole[:2],
        "expanded": torch.randn(3, 1).expand(3, 4),
        "flat": whole.view(-1),
    }
    path = checkpoint.save(tmp_path, Held(Tensors(**tensors)))
    back = checkpoint.load(path).weights
    for name, tensor in tensors.items():
        assert_same(back[name], tensor)
    assert (path / storage.MODEL).stat().st_size < 4 * (20 + 9 + 16 + 12 + 48) + 1000


def test_weights_in_channels_last_load_into_channels_last(tmp_path: Path) -> None:
    def make() -> Any:
        model: Any = nn.Sequential(nn.Conv2d(8, 6, 3))
        return model.to(memory_format=torch.channels_last)

    saved, fresh = make(), make()
    checkpoint.save(tmp_path, Held(saved))
    fresh.load_state_dict(checkpoint.load(tmp_path).weights)
    assert_same(fresh[0].weight, saved[0].weight)
    assert fresh[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_tied_weight_is_stored_once_and_comes_back_under_all_names(tmp_path: Path) -> None:
    model: Any = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 50, bias=False))
    model[1].weight = model[0].weight
    path = checkpoint.save(tmp_path, Held(model))
    with safetensors.safe_open(path / storage.MODEL, framework="pt") as file:
        assert list(file.keys()) == ["0.weight"]
        assert json.loads(file.metadata()["aliases"]) == {"1.weight": "0.weight"}
    back = checkpoint.load(path).weights
    assert back["1.weight"] is back["0.weight"]
    assert_same(back["0.weight"], model[0].weight.detach())


def test_state_that_is_no_tensor_comes_back(tmp_path: Path) -> None:
    class Counting(nn.Linear):
        seen = 0

        def get_extra_state(self) -> dict[str, int]:
            return {"seen": self.seen}

        def set_extra_state(self, state: dict[str, int]) -> None:
            self.seen = state["seen"]

    model, fresh = Counting(2, 2), Counting(2, 2)
    model.seen = 5
    checkpoint.save(tmp_path, Held(model))
    fresh.load_state_dict(checkpoint.load(tmp_path).weights)
    assert fresh.seen == 5


def test_run_extra_plan_and_recipe_come_back(tmp_path: Path) -> None:
    low_rank = nn.Sequential(LowRankLinear.from_dense(nn.Linear(16, 16), 2))
    moments = {"state": {0: {"exp_avg": torch.randn(3), "step": torch.tensor(7.0)}}}
    extra = {
        "recipe": {"lr": 0.1, "model": "mlp"},
        "scheduler": OrderedDict(last_epoch=3, best=float("inf")),
        "plain": [None, True, -(2**70), 1e-300, "é", 1j, (1, (2,)), {3: {}}],
        "torch": [torch.float16, torch.device("cpu"), torch.Size([2])],
    }
    path = checkpoint.save(tmp_path, Held(low_rank, 12, {"optimizer": moments}), extra=extra)
    back = checkpoint.load(path)
    assert (back.path, back.step, back.run["step"]) == (tmp_path / "step-00000012", 12, 12)
    assert_same(back.run["optimizer"]["state"][0], moments["state"][0])
    assert back.extra == extra
    meta = json.loads((path / "meta.json").read_text())
    assert meta["plan"] == read_plan(low_rank)
    assert meta["recipe"] == extra["recipe"]
    assert meta["torch"] == torch.__version__


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.integers(), inner),
        max_leaves=12,
    )
)
def test_what_is_accepted_can_be_loaded(tmp_path: Path, value: Any) -> None:
    checkpoint.save(tmp_path, Held(), extra={"value": value})
    assert repr(checkpoint.load(tmp_path).extra["value"]) == repr(value)


REFUSED = {
    "a numpy number": (np.float64(1.5), r"extra\['x'\]\['inner'\]\[0\] is a numpy\.float64"),
    "a namespace": (argparse.Namespace(a=1), r"is a argparse\.Namespace"),
    "a function": (len, r"is a builtins\.builtin_function_or_method"),
    "bytes": (b"", r"is a builtins\.bytes"),
    "a set": ({1}, r"is a builtins\.set"),
    "a meta tensor": (torch.empty(2, device="meta"), r"is a torch\.Tensor"),
}


@pytest.mark.parametrize(("value", "message"), REFUSED.values(), ids=REFUSED)
def test_what_could_not_be_loaded_is_not_written(value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        checkpoint.save(tmp_path, Held(), extra={"x": {"inner": [value]}})
    assert list(tmp_path.iterdir()) == []


def test_weights_without_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^weight is on the meta device"):
        checkpoint.save(tmp_path, Held(nn.Linear(2, 2, device="meta")))


def test_a_recipe_has_to_be_json(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"extra\['recipe'\] goes into meta\.json.*JSON"):
        checkpoint.save(tmp_path, Held(), extra={"recipe": {"device": torch.device("cpu")}})


def test_all_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, Held())
    (path / "other").write_text("")
    assert len({file.stat().st_mode for file in path.iterdir()}) == 1


# ---------------------------------------------------------------- random numbers


def draw() -> list[Any]:
    numpy = np.random.standard_normal(3).tolist()  # noqa: NPY002 -- the global generator is tested
    return [torch.rand(3).tolist(), random.random(), random.gauss(0, 1), numpy]


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    draw()
    checkpoint.save(tmp_path, Held())
    expected = draw()
    draw()
    checkpoint.load(tmp_path).restore_random()
    assert draw() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_random_numbers_of_a_gpu_go_on_and_its_tensors_come_back(tmp_path: Path) -> None:
    model = nn.Linear(3, 4, device="cuda")
    checkpoint.save(tmp_path, Held(model, state={"m": torch.ones(2, device="cuda")}))
    expected = torch.rand(3, device="cuda")
    back = checkpoint.load(tmp_path)
    back.restore_random()
    assert_same(torch.rand(3, device="cuda"), expected)
    assert_same(back.weights["weight"], model.weight.detach().cpu())
    assert back.run["m"].device.type == "cpu"


def test_a_worker_without_random_state_is_told_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, Held())
    back = checkpoint.load(tmp_path)
    monkeypatch.setattr(checkpoint.distributed, "worker", lambda: 1)
    with pytest.raises(CheckpointError, match=r"saved by 1 worker.*worker 1; resume with 1 worker"):
        back.restore_random()


# ---------------------------------------------------------------- which ones stay


def steps(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 5, 20, 100):
        checkpoint.save(tmp_path, Held(step=step), keep=3)
    assert steps(tmp_path) == ["step-00000005", "step-00000020", "step-00000100"]
    assert checkpoint.load(tmp_path).step == 100


def test_the_new_one_stays_even_below_older_steps(tmp_path: Path) -> None:
    for step in (50, 100, 20):
        checkpoint.save(tmp_path, Held(step=step), keep=2)
    assert steps(tmp_path) == ["step-00000020", "step-00000100"]


def test_nothing_else_in_the_directory_is_touched(tmp_path: Path) -> None:
    (tmp_path / "step-notes").mkdir()
    (tmp_path / "log.jsonl").write_text("{}")
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, Held(step=step), keep=1)
    assert steps(tmp_path) == ["log.jsonl", "step-00000003", "step-notes"]


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"keep=0 would leave no checkpoint"):
        checkpoint.save(tmp_path, Held(), keep=0)


def test_saving_twice_at_a_step_keeps_the_second(tmp_path: Path) -> None:
    for number in (1, 2, 3):
        checkpoint.save(tmp_path, Held(), extra={"number": number})
    assert steps(tmp_path) == ["step-00000007"]
    assert checkpoint.load(tmp_path).extra == {"number": 3}


# ---------------------------------------------------------------- crashes, full disks


STAGES = ["_write_model", "_write_state", "_write_meta", "_flush", "_install"]


@pytest.mark.parametrize("same_step", [False, True])
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_at_any_stage_leaves_the_old_checkpoint(
    stage: str, same_step: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, Held(step=7), extra={"number": 1})

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage, stage, full)
        with pytest.raises(
            CheckpointError,
            match=r"step-\d+ was not written: no space left.*about [\d,]+ bytes, [\d,]+ are free; "
            r"earlier checkpoints are whole",
        ):
            checkpoint.save(tmp_path, Held(step=7 if same_step else 8), extra={"number": 2})
    assert steps(tmp_path) == ["step-00000007"]
    assert checkpoint.load(tmp_path).extra == {"number": 1}
    checkpoint.save(tmp_path, Held(step=8))
    assert checkpoint.load(tmp_path).step == 8


def test_an_interrupt_leaves_the_old_checkpoint_and_no_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint.save(tmp_path, Held(step=7))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "_write_meta", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, Held(step=8))
    assert steps(tmp_path) == ["step-00000007"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("big", ["weights", "optimizer"])
def test_a_write_that_the_system_refuses_leaves_the_old_checkpoint(
    big: str, tmp_path: Path
) -> None:
    checkpoint.save(tmp_path, Held(step=7))
    model = nn.Linear(1000, 100) if big == "weights" else nn.Linear(2, 2)
    state = {"m": torch.zeros(100_000)} if big == "optimizer" else {}
    with (
        largest_file(100_000),
        pytest.raises(CheckpointError, match=r"no space left.*about 4\d\d,"),
    ):
        checkpoint.save(tmp_path, Held(model, 8, state))
    assert steps(tmp_path) == ["step-00000007"]
    assert checkpoint.load(tmp_path).step == 7


@pytest.mark.parametrize("big", ["weights", "optimizer"])
def test_a_disk_that_is_really_full_leaves_the_old_checkpoint(big: str, tmp_path: Path) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(tmp_path)]
    if (
        not sys.platform.startswith("linux")
        or subprocess.run(mount, capture_output=True).returncode
    ):
        pytest.skip("mounting a small disk is not permitted here")
    try:
        checkpoint.save(tmp_path, Held(step=7))
        model = nn.Linear(1000, 1000) if big == "weights" else nn.Linear(2, 2)
        state = {"m": torch.zeros(1_000_000)} if big == "optimizer" else {}
        with pytest.raises(CheckpointError, match=r"no space left \(No space left on device\)"):
            checkpoint.save(tmp_path, Held(model, 8, state))
        assert steps(tmp_path) == ["step-00000007"]
        assert checkpoint.load(tmp_path).step == 7
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


KILLED = """
import os, sys
from pathlib import Path
import torch
from torch import nn
from rankwise import checkpoint, storage

torch.set_num_threads(1)

class Held:
    methods = ()
    def __init__(self, step): self.bare, self.step = nn.Linear(3, 4), step
    def state_dict(self): return {}

def die(*_): os._exit(9)

directory = Path(sys.argv[1])
for again in (False, True):  # a new step, or the same one again
    checkpoint.save(directory, Held(7), extra={"number": 1})
    for where, name in [(storage, "_write_model"), (storage, "_write_state"),
                        (storage, "_write_meta"), (storage, "_flush"), (storage, "_install"),
                        (Path, "rename"), (storage.shutil, "rmtree")]:
        for calls in range(4):
            if os.fork() == 0:
                real, left = getattr(where, name), [calls]
                def dying(*a, **k):
                    if left[0] == 0: os._exit(9)
                    left[0] -= 1
                    return real(*a, **k)
                setattr(where, name, dying)
                checkpoint.save(directory, Held(7 if again else 8), extra={"number": 2}, keep=1)
                os._exit(0)
            died = os.waitstatus_to_exitcode(os.wait()[1]) == 9
            back = checkpoint.load(directory)
            print(again, name, calls, died, back.path.name, back.extra["number"])
            checkpoint.save(directory, Held(7), extra={"number": 1}, keep=1)
            assert [p.name for p in directory.iterdir()] == ["step-00000007"]
"""


def test_a_process_killed_at_any_moment_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    assert len(lines) == 2 * 7 * 4
    killed = [line for line in lines if line[3] == "True"]
    assert len(killed) >= 20
    # Both outcomes occur: killed before the new one stands, and while the old one is removed.
    assert {line[5] for line in killed} == {"1", "2"}


def test_what_a_crash_left_is_swept_by_the_next_save(tmp_path: Path) -> None:
    left = tmp_path / ".rankwise-0123"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    checkpoint.save(tmp_path, Held())
    assert steps(tmp_path) == ["step-00000007"]


def test_a_directory_that_may_not_be_written_is_named(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    with (
        as_nobody(tmp_path),
        pytest.raises(
            CheckpointError,
            match=r"Permission denied \(.*locked.*\).*directory that you may write to",
        ),
    ):
        checkpoint.save(locked, Held())


def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, Held())
    (path / "state.pt").chmod(0)
    with as_nobody(tmp_path), pytest.raises(CheckpointError, match=r"Permission denied.*state\.pt"):
        checkpoint.load(path)


def test_a_directory_that_may_not_be_entered_is_named(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "shut", Held())
    path.parent.chmod(0)
    with as_nobody(tmp_path), pytest.raises(CheckpointError, match=r"Permission denied.*shut"):
        checkpoint.load(path)
    path.parent.chmod(0o755)


@contextmanager
def as_nobody(reached: Path) -> Iterator[None]:
    """Without the superuser's rights, for whom no permission is ever missing."""
    user = os.geteuid()
    if user != 0:
        yield
        return
    temporary = Path(tempfile.gettempdir()).resolve()
    for directory in (reached, *reached.parents):
        if temporary in directory.parents:
            directory.chmod(0o755)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_a_path_through_a_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/step-00000007 was not written"):
        checkpoint.save(tmp_path / "file", Held())


# ---------------------------------------------------------------- what is not loaded


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path, at: float = 0.5, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 1 << bit
    path.write_bytes(content)


FILES = ["model.safetensors", "state.pt", "meta.json"]
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (truncate, r"corrupt"),
    "flipped": (flip, r"corrupt"),
    "removed": (Path.unlink, r"is missing"),
    "emptied": (lambda p: p.write_bytes(b""), r"corrupt"),
    "replaced": (lambda p: p.write_bytes(p.read_bytes()[::-1]), r"corrupt"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named(name: str, damage: str, tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, Held())
    harm, message = DAMAGES[damage]
    harm(path / name)
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(path)
    assert name in str(caught.value)
    assert "use another checkpoint" in str(caught.value)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(FILES), st.floats(0, 1), st.integers(0, 7))
def test_no_flipped_bit_is_overlooked(tmp_path: Path, name: str, at: float, bit: int) -> None:
    path = checkpoint.save(tmp_path, Held())
    flip(path / name, at, bit)
    with pytest.raises(CheckpointError, match=r"corrupt|not of this library|format version"):
        checkpoint.load(path)


def test_a_corrupt_newest_one_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, Held(step=step), keep=3)
    flip(tmp_path / "step-00000003" / "model.safetensors")
    truncate(tmp_path / "step-00000002" / "state.pt")
    with pytest.raises(
        CheckpointError, match=r"step-00000003.*is corrupt.*newest whole one is .*step-00000001"
    ):
        checkpoint.load(tmp_path)
    assert checkpoint.load(tmp_path / "step-00000001").step == 1
    flip(tmp_path / "step-00000001" / "meta.json")
    with pytest.raises(CheckpointError, match=r"no other checkpoint in .* is whole"):
        checkpoint.load(tmp_path)


def test_a_newer_format_asks_for_an_upgrade(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, Held())
    meta = json.loads((path / "meta.json").read_text()) | {"version": 9, "rankwise": "4.2"}
    (path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(CheckpointError, match=r"version 9, written by rankwise 4\.2.*upgrade"):
        checkpoint.load(path)


FOREIGN = {
    "a Hugging Face model": (["config.json", "model.safetensors"], r"a Hugging Face model"),
    "a distributed checkpoint": ([".metadata", "__0_0.distcp"], r"torch\.distributed\.checkpoint"),
    "lightning": (["epoch=1-step=20.ckpt"], r"epoch=1-step=20\.ckpt: .*another tool"),
    "nothing": ([], r"but nothing; give the directory passed to rankwise\.save"),
}


@pytest.mark.parametrize(("names", "message"), FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_directory_is_recognised(names: list[str], message: str, tmp_path: Path) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=message) as caught:
        checkpoint.load(tmp_path)
    assert "holds no checkpoint of rankwise.save" in str(caught.value)


def test_other_paths_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*nowhere: there is no such"):
        checkpoint.load(tmp_path / "nowhere")
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"weights\.pt is a file; a checkpoint is a directory"
    ):
        checkpoint.load(tmp_path / "weights.pt")
    (tmp_path / "step-00000001").mkdir()
    with pytest.raises(
        CheckpointError, match=r"step-00000001 is not a whole.*meta\.json is missing"
    ):
        checkpoint.load(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "meta.json").write_text('{"format": "elsewhere"}')
    with pytest.raises(CheckpointError, match=r"meta\.json is not of this library"):
        checkpoint.load(tmp_path / "other")


class Payload:
    """Makes a directory when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def put(path: Path, name: str, write: Callable[[Path], Any]) -> None:
    """Replace a file of a checkpoint and make its sizes and checksums right again."""
    meta = json.loads((path / "meta.json").read_text())
    write(path / name)
    kept = {k: v for k, v in meta.items() if k not in ("format", "version", "files", "digest")}
    storage._write_meta(path, kept)


@pytest.mark.parametrize("archive", [True, False], ids=["torch.save", "pickle"])
@pytest.mark.parametrize("name", ["state.pt", "model.safetensors"])
@pytest.mark.parametrize("forced", [False, True])
def test_a_pickle_payload_is_refused_and_not_executed(
    name: str, archive: bool, forced: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, marker = checkpoint.save(tmp_path, Held()), tmp_path / "executed"
    content = {"run": {"step": 7}, "extra": {"x": Payload(marker)}, "random": {}, "weights": {}}
    if archive:
        put(path, name, lambda file: torch.save(content, file))
        torch.load(BytesIO((path / name).read_bytes()), weights_only=False)
    else:
        put(path, name, lambda file: file.write_bytes(pickle.dumps(content)))
        pickle.loads((path / name).read_bytes())
    assert marker.exists(), "the payload has to work where it is not refused"
    marker.rmdir()
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    with pytest.raises(CheckpointError, match=r"refused") as caught:
        checkpoint.load(path)
    assert not marker.exists()
    assert str(path / name) in str(caught.value)
    if name == "state.pt":
        assert "objects that would execute code" in str(caught.value)
        assert not archive or f"({os.mkdir.__module__}.mkdir)" in str(caught.value)


def test_a_state_of_something_else_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, Held())
    put(path, "state.pt", lambda file: torch.save([1, 2], file))
    with pytest.raises(CheckpointError, match=r"state\.pt holds something else.*refused"):
        checkpoint.load(path)
    put(path, "state.pt", lambda file: torch.save({"weights": {}}, file))
    with pytest.raises(CheckpointError, match=r"state\.pt holds no run of this library"):
        checkpoint.load(path)
    put(path, "state.pt", lambda file: file.write_bytes(b"PK\x03\x04 but no archive"))
    with pytest.raises(CheckpointError, match=r"state\.pt"):
        checkpoint.load(path)
