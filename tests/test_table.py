"""`rankwise table`: every form of every recipe once, over seeds, and nothing is trained twice."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from rankwise import data
from rankwise.cli import main
from rankwise.cli.rows import ROWS
from rankwise.training import Recipe, records, setup
from test_training import planted

RECIPE = """
model = "mlp-128x4"
epochs = 2
batch_size = 32
lr = 0.02
lr_warmup_epochs = 0.5
threads = 1
[method]
name = "pufferfish"
ranks = 16
keep_first = 2
warmup_epochs = 1
"""


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    splits = data.Splits(
        name="planted",
        classes=("a", "b", "c", "d"),
        train=planted(0, 261),
        validation=planted(1, 64),
        test=planted(2, 64),
        checksum="0123456789abcdef",
    )
    monkeypatch.setattr(data, "load", lambda name, **_: splits)
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        Path(f"{name}.toml").write_text(RECIPE)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def recipe_of(row: str, seed: int = 0, name: str = "one"):
    found = records.recipe_of(Path(f"runs/table/{name}/{row}-{seed}"))
    assert found is not None
    return found


def test_all_forms_are_trained_and_stand_in_the_table(capsys) -> None:
    assert main(["table", "one.toml", "--seeds", "0", "--markdown", "t.md"]) == 0
    out = capsys.readouterr().out
    written = Path("t.md").read_text()
    assert f"{len(ROWS)} of {len(ROWS)}: one, cuttlefish, seed 0" in out
    for row in ROWS:
        assert f"| {row} | " in written
    finishes = {row: records.read(f"runs/table/one/{row}-0")[-1] for row in ROWS}
    stored = {row: finish["parameters"][0] for row, finish in finishes.items()}
    assert stored["low-rank"] == stored["frobenius"] < stored["hybrid"] < stored["dense"]
    assert stored["pufferfish"] == stored["hybrid"]
    assert recipe_of("low-rank").method_options == {"ranks": 16, "decay": "l2", "strength": 0.0}
    assert recipe_of("hybrid+frobenius").method_options == {
        "ranks": 16,
        "keep_first": 2,
        "decay": "frobenius",
    }
    assert recipe_of("cuttlefish").method_options == {}


def test_l2_on_the_factors_is_the_optimizers_own_weight_decay() -> None:
    how = ["one.toml", "--weight-decay", "0.5"]
    assert main(["table", *how, "--rows", "l2,low-rank", "--seeds", "0"]) == 0
    plain = ["--method", "factorized", "--method.ranks", "16", "--out", "p"]
    assert main(["train", *how, *plain]) == 0
    own, none, usual = (
        records.read(f)[-1]["test_loss"]
        for f in ("runs/table/one/l2-0", "runs/table/one/low-rank-0", "p")
    )
    assert own == pytest.approx(usual, rel=1e-6)
    assert none != pytest.approx(usual, rel=1e-4)


def test_a_second_call_trains_what_is_missing_and_show_trains_nothing(capsys) -> None:
    line = ["table", "*.toml", "one.toml", "two.toml", "--rows", "dense,low-rank"]
    assert main(line) == 2  # a glob is over the names of recipes
    capsys.readouterr()
    line = ["table", "one.toml", "two.toml", "--rows", "dense,low-rank"]
    assert main([*line, "--seeds", "0,1", "--show"]) == 0
    assert "mlp-128x4 on mnist-5k, 2 epochs, 0 of 4 runs" in capsys.readouterr().out
    assert not Path("runs").exists()
    assert main([*line, "--seeds", "0"]) == 0
    assert "4 of 4: two, low-rank, seed 0" in capsys.readouterr().out
    times = {p: p.stat().st_mtime_ns for p in Path("runs").rglob(records.NAME)}
    assert main([*line, "--seeds", "0,1"]) == 0
    out = capsys.readouterr().out
    assert out.count("finished before") == 4
    assert "±" in out
    assert all(p.stat().st_mtime_ns == at for p, at in times.items())


def test_data_are_read_once_for_the_runs_that_want_the_same(monkeypatch) -> None:
    read = []
    whole = data.load("planted")

    def load(name, **how):
        read.append((name, how["size"]))
        return whole

    monkeypatch.setattr(data, "load", load)
    Path("two.toml").write_text("image_size = 9\n" + RECIPE)
    line = ["table", "one.toml", "two.toml", "--rows", "dense,low-rank", "--seeds", "0,1"]
    assert main(line) == 0
    assert read == [("mnist-5k", None), ("mnist-5k", 9)]
    fields = {field.name for field in dataclasses.fields(Recipe)}
    assert set(setup.DATA_FIELDS) < fields


def test_a_run_that_diverges_does_not_end_the_table(capsys) -> None:
    line = ["table", "one.toml", "--rows", "dense,low-rank", "--seeds", "0,1"]
    assert main([*line, "--seeds", "0"]) == 0
    # Only dense weights overflow at this decay: factors have none.
    hurt = ["--weight-decay", "1e30", "--out", "hurt", "--markdown", "t.md"]
    assert main([*line, *hurt]) == 0
    out = capsys.readouterr().out
    assert "diverged: the " in out
    assert "4 of 4: one, low-rank, seed 1" in out
    assert "| dense" not in Path("t.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("one.toml --rows dens", "unknown row 'dens'; did you mean 'dense'?"),
        ("on", "unknown recipe 'on'"),
        ("one.toml --seeds a", "--seeds 'a': write whole numbers"),
        ("one.toml --method.rnks 3", "unknown option 'rnks'; did you mean 'ranks'?"),
        ("none.toml", "recipe none.toml cannot be read"),
        ("bare.toml --rows dense,hybrid", "row 'hybrid' keeps the first layers dense, and recipe"),
        ("one.toml --show --markdown no/t.md", "--markdown no/t.md: the table cannot be written"),
        ("one.toml --method.ranks 0", "rank 0"),
    ],
)
def test_a_mistake_is_said_before_the_first_run(arguments, words, capsys) -> None:
    Path("bare.toml").write_text(RECIPE.replace("keep_first = 2\n", ""))
    assert main(["table", *arguments.split()]) == 2
    assert words in capsys.readouterr().err
    assert not Path("runs").exists()
