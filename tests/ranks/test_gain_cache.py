"""Times are kept per machine, safely, and are the same on all workers."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rankwise import accounting, distributed
from rankwise.errors import LifeCycleError
from rankwise.ranks import Gains, measure_gains, plan
from rankwise.ranks.gains.cache import GainCache, default_place
from rankwise.ranks.gains.stopwatch import Pass, Times
from test_distributed import Workers


class Counting:
    """A timer that counts, and runs nothing."""

    def __init__(self, seconds: float = 1e-2) -> None:
        self.seconds, self.calls = seconds, 0

    def __call__(self, each: Pass, times: int) -> float:
        self.calls += 1
        return times * self.seconds * (1 if each.rank is None else 0.5)


def gains(timer: Any, cache: Any, model: nn.Module | None = None, **options: Any) -> Gains:
    model = model or nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 10))
    x = torch.zeros(8, 16, dtype=next(model.parameters()).dtype)
    trace = accounting.trace(model, x)
    decided = plan(model, 16, trace=trace)
    return measure_gains(model, trace, decided, timer=timer, cache=cache, **options)


def test_the_same_layer_is_timed_once_on_a_machine(tmp_path: Path) -> None:
    file, timer = tmp_path / "deep" / "gains.json", Counting()
    first = gains(timer, file)
    spent = timer.calls
    assert spent
    asked: list[Any] = []
    assert gains(timer, file, progress=lambda *said: asked.append(said)) == first
    assert (timer.calls, asked) == (spent, [])
    assert gains(Counting(), str(file)) == first


@pytest.mark.parametrize(
    "change",
    [
        {"batch": 16},
        {"ratios": (0.5,)},
        {"seconds": 1.0},
        {"autocast": torch.bfloat16},
        {"model": "double"},
        {"model": "frozen"},
        {"model": "no bias"},
        {"threads": 2},
        {"cache": None},
        {"cache": False},
    ],
    ids=str,
)
def test_what_the_time_depends_on_is_timed_anew(tmp_path: Path, change: dict[str, Any]) -> None:
    file = tmp_path / "gains.json"
    gains(Counting(), file)
    kept = file.read_text()
    timer = Counting()
    model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 10))
    kind = change.pop("model", None)
    if kind == "double":
        model.double()
    if kind == "frozen":
        model[1].weight.requires_grad_(False)
    if kind == "no bias":
        model[1] = nn.Linear(64, 64, bias=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(change.pop("threads", threads))
    try:
        gains(timer, change.pop("cache", file), model, **change)
    finally:
        torch.set_num_threads(threads)
    assert timer.calls
    known = json.loads(file.read_text())["times"]
    assert all(known[key] == times for key, times in json.loads(kept)["times"].items())


def test_the_default_place_is_the_users_cache(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_place() == tmp_path / "rankwise" / "gains.json"
    gains(Counting(), True)
    assert default_place().is_file()
    for unset in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert default_place() == Path.home() / ".cache" / "rankwise" / "gains.json"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        '{"format": "other", "times": {}}',
        '{"format": "rankwise gain cache 3", "times": {"x": {"dense_ms": "1", "low_rank_ms": {}}}}',
        '{"format": "rankwise gain cache 3", "times": []}',
        b"\xff\xfe",
    ],
    ids=repr,
)
def test_a_spoilt_file_is_ignored_with_a_warning_and_replaced(
    tmp_path: Path, caplog, content: str | bytes
) -> None:
    file = tmp_path / "gains.json"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    timer = Counting()
    first = gains(timer, file)
    assert timer.calls
    assert caplog.text.count("measured gains of earlier runs are ignored") == 1
    assert str(file) in caplog.text
    caplog.clear()
    spent = timer.calls
    assert gains(timer, file) == first
    assert timer.calls == spent
    assert not caplog.text


def test_times_that_vary_are_used_but_not_kept(tmp_path: Path) -> None:
    class Varying(Counting):
        def __call__(self, each: Pass, times: int) -> float:
            busy = 1 + 3 * (super().__call__(each, times) > 0 and self.calls % 3 == 0)
            return times * self.seconds * busy

    file, timer = tmp_path / "gains.json", Varying(1e-1)
    found = gains(timer, file)
    assert found.layers["1"].spread > 0.08
    assert f"±{found.layers['1'].spread:.0%}" in str(found)
    assert "uncertain, the machine was busy" in str(found)
    assert not file.exists()
    spent = timer.calls
    gains(timer, file)
    assert timer.calls == 2 * spent  # measured anew
    steady = gains(Counting(), file)
    assert steady.layers["1"].spread == 0
    assert "±" not in str(steady)
    assert file.exists()
    assert Gains.from_dict(found.as_dict()) == found


def test_fresh_measures_anew_and_keeps_that(tmp_path: Path) -> None:
    file = tmp_path / "gains.json"
    assert gains(Counting(1e-2), file).ms("1", None) == pytest.approx(10)
    assert gains(Counting(2e-2), file).ms("1", None) == pytest.approx(10)
    assert gains(Counting(2e-2), file, fresh=True).ms("1", None) == pytest.approx(20)
    assert gains(Counting(1e-2), file).ms("1", None) == pytest.approx(20)


def test_the_later_measurement_of_two_processes_stays(tmp_path: Path) -> None:
    early, late = GainCache(tmp_path / "g.json"), GainCache(tmp_path / "g.json")
    early.put("x", Times(1.0, {8: 0.5}))
    late.put("x", Times(2.0, {8: 0.5}))
    early.put("y", Times(3.0, {8: 0.5}))
    assert GainCache(tmp_path / "g.json").get("x") == Times(2.0, {8: 0.5})


def test_a_place_that_cannot_be_written_costs_a_warning_alone(tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file" / "gains.json", tmp_path):
        caplog.clear()
        assert gains(Counting(), place).at("1", 16) == pytest.approx(2)
        assert caplog.text.count("are not kept for later runs") == 1


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    file, over = tmp_path / "gains.json", threading.Event()
    cache = GainCache(file)
    cache.put("first", Times(1.0, {8: 0.5}))
    seen: list[bool] = []

    def read() -> None:
        while not over.is_set():
            seen.append(GainCache(file).get("first") is not None)

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(50):
        cache.put(f"key {i}", Times(1.0, {8: 0.5}))
    over.set()
    reader.join()
    assert seen
    assert all(seen)


# ---------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    workers = Workers(tmp_path_factory.mktemp("workers"))
    yield workers
    for pipe in workers.pipes:
        pipe.send(None)
    for process in workers.processes:
        process.join(10)


def _write(path: str) -> None:
    cache = GainCache(Path(path))
    torch.distributed.barrier()
    for i in range(20):
        cache.put(f"{distributed.worker()}/{i}", Times(1.0 + i, {8: 0.5}))


def test_two_processes_that_write_at_once_lose_nothing(together: Workers, tmp_path: Path) -> None:
    together(_write, str(tmp_path / "gains.json"))
    known = GainCache(tmp_path / "gains.json")
    assert all(known.get(f"{w}/{i}") == Times(1.0 + i, {8: 0.5}) for w in (0, 1) for i in range(20))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gains.json", "gains.json.lock"]


def _measured_by_workers(cache: str) -> tuple[dict[str, Any], int]:
    timer = Counting(1e-2 * (1 + distributed.worker()))  # each worker would have its own times
    return gains(timer, cache).as_dict(), timer.calls


def _failing() -> str:
    def timer(each: Pass, times: int) -> float:
        raise ValueError("a broken clock")

    try:
        gains(timer, None)
    except LifeCycleError as error:
        return str(error)
    return "no error"


def test_worker_0_measures_for_all(together: Workers, tmp_path: Path) -> None:
    (first, calls), (second, others) = together(_measured_by_workers, str(tmp_path / "g.json"))
    assert first == second
    assert calls
    assert others == 0
    assert first["layers"]["1"]["dense_ms"] == pytest.approx(10)


def test_an_error_of_worker_0_reaches_the_others(together: Workers) -> None:
    said = together(_failing)
    assert said[0] == said[1]
    assert "worker 0 could not measure: ValueError('a broken clock')" in said[0]


def test_conditions_hold_plain_values_only() -> None:
    """Gains go into checkpoints, which hold nothing else."""
    told = gains(Counting(), None).conditions
    assert {type(value) for value in dataclasses.asdict(told).values()} == {str, int, tuple}
