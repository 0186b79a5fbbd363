"""Training: exact continuation, honest stops, readable records."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from torch.testing import assert_close

import rankwise
from rankwise import data
from rankwise.errors import CheckpointError, NonFiniteLossError, OptionError
from rankwise.training import Interrupted, Recipe, Result, records, setup, train
from rankwise.training.clock import Clock
from rankwise.training.report import Progress, Silent, Switch

STEPS_PER_EPOCH, SWITCH = 8, 11
TIMES = {"time", "seconds", "step_ms", "hardware"}
FIGURES = ("test_loss", "test_accuracy", "test_bleu", "validation_loss", "validation_accuracy")


def planted(seed: int, count: int) -> data.Split:
    """Images (N, 1, 8, 8) whose class is the block of rows that is bright."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (count,), generator=generator)
    images = torch.randn(count, 1, 8, 8, generator=generator)
    for row in (0, 1):
        images[torch.arange(count), 0, 2 * labels + row] += 1.5
    return data.Split(images, labels)


@pytest.fixture(autouse=True)
def small_images(monkeypatch, tmp_path):
    splits = data.Splits(
        name="planted",
        classes=("a", "b", "c", "d"),
        train=planted(0, STEPS_PER_EPOCH * 32 + 5),
        validation=planted(1, 64),
        test=planted(2, 64),
        checksum="0123456789abcdef",
    )
    monkeypatch.setattr(data, "load", lambda name, **_: splits)
    monkeypatch.setattr("rankwise.training.loop.LOOK_EVERY", 1)  # also on a GPU
    monkeypatch.chdir(tmp_path)


def recipe(**changes) -> Recipe:
    base = {
        "model": "mlp-128x4",
        "epochs": 3,
        "batch_size": 32,
        "lr": 0.02,
        "method_options": {"warmup_steps": SWITCH, "ranks": 16},
    }
    return Recipe(**{**base, **changes})


class StopAt(Silent):
    """Sends a real signal to this process when a step is done."""

    def __init__(self, step: int, number: int = signal.SIGINT) -> None:
        self.at, self.number = step, number

    def step(self, progress: Progress) -> None:
        if progress.step == self.at:
            signal.raise_signal(self.number)


def end_state(out: str) -> tuple[dict, dict]:
    saved = rankwise.load(out)
    return saved.weights, saved.run["optimizer"]


def epochs_of(out: str) -> list[dict]:
    lines = [r for r in records.read(out) if r["event"] in ("epoch", "switch")]
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def stopped_and_gone_on(
    recipe: Callable[..., Recipe], at: int, **how: Any
) -> tuple[Result, Result]:
    """Results of a run that was stopped at a step and resumed, and of one that was not.

    They end with the same weights, optimizer, records and figures, bit for bit.
    """
    whole = train(recipe(out="whole", **how))
    with pytest.raises(Interrupted) as caught:
        train(recipe(out="parts", **how), report=StopAt(at))
    assert caught.value.step == at
    resumed = train(recipe(out="parts", **how), resume="parts")
    for mine, theirs in zip(end_state("parts"), end_state("whole"), strict=True):
        assert_close(mine, theirs, rtol=0, atol=0)
    assert epochs_of("parts") == epochs_of("whole")
    for figure in FIGURES:
        assert getattr(resumed, figure) == getattr(whole, figure), figure
    return resumed, whole


# Mid-epoch before the switch, the end of an epoch, just before, at and just after the switch.
@pytest.mark.parametrize("step", [3, STEPS_PER_EPOCH, SWITCH - 1, SWITCH, SWITCH + 1, 20])
@pytest.mark.parametrize(
    "how", [{}, {"optimizer": "adam", "lr": 1e-3, "schedule": "step", "clip_norm": 0.5}]
)
def test_a_run_stopped_anywhere_ends_bit_for_bit_as_one_that_was_not(step, how):
    resumed, whole = stopped_and_gone_on(recipe, step, **how)
    assert len(resumed.switches) == len(whole.switches) == 1


def test_a_plateau_is_remembered_where_a_run_goes_on():
    how = {"schedule": "plateau", "lr_decay": 0.5, "lr": 0.4, "epochs": 6, "clip_norm": 0.5}
    stopped_and_gone_on(recipe, 5 * STEPS_PER_EPOCH + 3, **how)
    epochs = [r for r in epochs_of("whole") if r["event"] == "epoch"]
    rate, best, expected = 0.4, math.inf, []
    for epoch in epochs:
        expected.append(rate)
        rate *= 1.0 if epoch["validation_loss"] < best else 0.5
        best = min(best, epoch["validation_loss"])
    assert [e["lr"] for e in epochs] == pytest.approx(expected)
    assert epochs[-1]["lr"] < 0.4


def test_biases_and_norms_are_left_out_of_the_decay_where_that_is_asked_for():
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.LayerNorm(3))
    optimizer = setup.make_optimizer(
        Recipe(optimizer="adamw", momentum=0.8, beta2=0.98, eps=1e-9, decay_vectors=False), model
    )
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert [decays[id(p)] for p in model.parameters()] == [5e-4, 0, 0, 0]
    assert optimizer.defaults["betas"] == (0.8, 0.98)
    assert optimizer.defaults["eps"] == 1e-9
    plain = setup.make_optimizer(Recipe(nesterov=True), model)
    assert [g["weight_decay"] for g in plain.param_groups] == [5e-4]
    assert plain.defaults["nesterov"]


def test_a_run_begins_with_the_weights_of_another_but_for_what_does_not_fit(tmp_path):
    train(recipe(out="first", method="dense", method_options={}, lr=0.1))
    trained = rankwise.load("first").weights
    how = {"method": "dense", "method_options": {}, "lr": 1e-9, "epochs": 1}
    how |= {"weights": "first", "lr_warmup_epochs": 0}
    train(recipe(out="second", **how))
    assert_close(rankwise.load("second").weights, trained, rtol=0, atol=1e-5)
    told = records.last(records.read("second"), "weights")
    assert told is not None
    assert told["numbers"][0] == told["numbers"][1]
    cut = {k: v[:3].clone() if k.startswith("output") else v for k, v in trained.items()}
    safetensors.torch.save_file({**cut, "extra": torch.zeros(2)}, "some.safetensors")
    train(recipe(out="third", **{**how, "weights": "some.safetensors"}))
    third = rankwise.load("third").weights
    assert_close(third["hidden.0.weight"], trained["hidden.0.weight"], rtol=0, atol=1e-5)
    told = records.last(records.read("third"), "weights")
    assert told is not None
    assert (told["fresh"], told["unused"]) == (["output.weight", "output.bias"], ["extra"])
    with pytest.raises(Interrupted):
        train(recipe(out="fourth", **how), report=StopAt(3))
    Path("some.safetensors").unlink()
    train(recipe(out="fourth", **how), resume="fourth")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"hiden.0.weight": (128, 128)}, r"0 of the network's [\d,]+ numbers: input.weight is not"),
        ({"input.weight": (3, 3)}, r"has the shape \(3, 3\) there, and \(128, 64\) here"),
        (None, "weights some.safetensors cannot be read"),
    ],
)
def test_weights_of_another_network_are_refused(given, words):
    if given is not None:
        tensors = {name: torch.zeros(shape) for name, shape in given.items()}
        safetensors.torch.save_file(tensors, "some.safetensors")
    with pytest.raises(CheckpointError, match=words):
        train(recipe(weights="some.safetensors"))
    assert not Path("runs").exists()


def test_a_crash_loses_no_more_than_the_steps_since_the_last_checkpoint():
    class Crash(Silent):
        def step(self, progress: Progress) -> None:
            if progress.step == 13:
                raise ZeroDivisionError

    train(recipe(out="whole"))
    with pytest.raises(ZeroDivisionError):
        train(recipe(out="parts"), report=Crash())
    train(recipe(out="parts"), resume="parts")
    assert_close(end_state("parts"), end_state("whole"), rtol=0, atol=0)
    # The switch after step 11 happened twice and is read once.
    assert epochs_of("parts") == epochs_of("whole")


def test_sigterm_is_reported_as_itself_and_handlers_are_put_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match=r"SIGTERM after step 2.*--resume out") as caught:
        train(recipe(out="out"), report=StopAt(2, signal.SIGTERM))
    assert caught.value.signal == signal.SIGTERM
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_reduced_precision_resumes_exactly_too():
    how = {"amp": "bf16", "channels_last": True, "label_smoothing": 0.1}
    stopped_and_gone_on(recipe, 13, **how)


def test_the_result_counts_what_is_there_and_names_the_switch():
    seen: list[Switch] = []

    class Watch(Silent):
        def switch(self, switch: Switch) -> None:
            seen.append(switch)

    result = train(recipe(), report=Watch())
    dense = train(recipe(method="dense", method_options={}))
    # 64 -> 128 -> 128 x 4 -> 4, with biases; four hidden layers of rank 16.
    others = 64 * 128 + 128 + 4 * 128 + 128 * 4 + 4
    assert dense.parameters == dense.dense_parameters == (others + 4 * 128 * 128,) * 2
    assert result.dense_parameters == dense.parameters
    assert result.parameters == (others + 4 * 16 * 256,) * 2
    assert dense.flops == 2 * (64 * 128 + 4 * 128 * 128 + 128 * 4)
    assert result.flops == 2 * (64 * 128 + 4 * 16 * 256 + 128 * 4)
    (switch,) = seen
    assert switch.event["step"] == SWITCH
    assert switch.epoch == pytest.approx(SWITCH / STEPS_PER_EPOCH)
    assert switch.step_ms_before is not None
    assert switch.step_ms_after is not None
    assert dense.step_ms_low_rank is None
    assert result.out == "runs/mlp-128x4-pufferfish-0"


def test_it_learns():
    for method in ({"method": "dense", "method_options": {}}, {}):
        result = train(recipe(epochs=6, optimizer="adam", lr=3e-3, **method))
        assert result.test_accuracy > 0.9, result.method


def test_a_network_factorized_from_the_start_has_no_dense_step_time():
    result = train(recipe(method="factorized", method_options={"ranks": 16}, epochs=2))
    assert result.step_ms_dense is None
    assert result.step_ms_low_rank is not None
    assert result.switches == ()
    assert result.parameters[0] < result.dense_parameters[0]


def test_the_test_images_decide_nothing(monkeypatch):
    first = train(recipe(out="first"))
    splits = data.load("planted")
    other = data.Split(splits.test.images.flip(0), splits.test.labels)
    changed = data.Splits(**{**vars(splits), "test": other})
    monkeypatch.setattr(data, "load", lambda name, **_: changed)
    second = train(recipe(out="second"))
    assert first.test_loss != second.test_loss
    assert_close(end_state("first"), end_state("second"), rtol=0, atol=0)
    assert epochs_of("first") == epochs_of("second")


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_the_last_good_checkpoint(monkeypatch):
    honest = data.batches

    def broken(split, **how):
        for number, (images, labels) in enumerate(honest(split, **how)):
            yield (
                cast(torch.Tensor, images)
                * (float("nan") if how["epoch"] == 1 and number == 2 else 1),
                labels,
            )

    train(recipe(out="good", epochs=1, schedule="constant", lr_warmup_epochs=0))
    monkeypatch.setattr(data, "batches", broken)
    with pytest.raises(NonFiniteLossError) as caught:
        train(recipe(out="bad", schedule="constant", lr_warmup_epochs=0))
    message = str(caught.value)
    assert "became nan at step 11 (epoch 2)" in message
    assert "bad/step-00000008" in message
    assert "lr=0.02" in message
    assert_close(end_state("bad"), end_state("good"), rtol=0, atol=0)


def test_another_recipe_is_refused_with_every_field_that_differs():
    with pytest.raises(Interrupted):
        train(recipe(out="out"), report=StopAt(3))
    with pytest.raises(CheckpointError) as caught:
        train(recipe(out="out", lr=0.5, seed=3), resume="out")
    assert "lr: 0.02 -> 0.5, seed: 0 -> 3" in str(caught.value)
    # Where and how often to save is free.
    train(recipe(out="out", checkpoint_every=2), resume="out")


def test_other_images_are_refused(monkeypatch):
    with pytest.raises(Interrupted):
        train(recipe(out="out"), report=StopAt(3))
    changed = data.Splits(**{**vars(data.load("planted")), "checksum": "f" * 16})
    monkeypatch.setattr(data, "load", lambda name, **_: changed)
    with pytest.raises(CheckpointError, match="other images: planted has the checksum ffff"):
        train(recipe(out="out"), resume="out")


def test_a_series_of_runs_keeps_the_data_of_the_last_one_alone(monkeypatch):
    sizes, honest = [], data.load

    def load(name: str, *, size: int | None, **how: Any) -> Any:
        sizes.append(size)
        return honest(name, **how)

    monkeypatch.setattr(data, "load", load)
    small, large = recipe(image_size=8), recipe(image_size=16, lr=0.5)
    with setup.keeping_data():
        assert setup.load_data(small) is setup.load_data(recipe(image_size=8, seed=1))
        setup.load_data(large)
        setup.load_data(small)
    assert sizes == [8, 16, 8]
    setup.load_data(small)
    assert sizes == [8, 16, 8, 8]


def test_a_checkpoint_of_another_program_is_refused():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rankwise.save("foreign", rankwise.start(model, rankwise.Dense(), optimizer))
    with pytest.raises(CheckpointError, match="holds no recipe"):
        train(recipe(), resume="foreign")


def test_a_folder_that_holds_a_run_is_not_written_over():
    train(recipe(out="out", epochs=2))
    with pytest.raises(OptionError, match="already holds a run; continue it with --resume out"):
        train(recipe(out="out", epochs=2))
    names = [Path(train(recipe(epochs=2)).out).name for _ in range(2)]
    assert names == ["mlp-128x4-pufferfish-0", "mlp-128x4-pufferfish-0-2"]


def test_records_say_what_the_figures_depend_on():
    result = train(recipe(out="out"))
    lines = records.read("out")
    kinds = [line["event"] for line in lines]
    assert kinds == ["start", "plan", "epoch", "switch", "epoch", "epoch", "finish"]
    start, finish = lines[0], lines[-1]
    assert Recipe.from_mapping(start["recipe"]) == recipe(out="out")
    assert start["versions"]["torch"] == torch.__version__
    assert start["data"] == {
        "name": "planted",
        "task": "classification",
        "checksum": "0123456789abcdef",
        "images": [STEPS_PER_EPOCH * 32 + 5, 64, 64],
    }
    assert start["hardware"]["workers"] == 1
    assert type(result).from_record(finish) == result


def test_a_torn_last_line_is_no_record_and_is_cut_before_the_next(tmp_path):
    with records.Records(tmp_path) as file:
        file.append("start", recipe={})
    path = tmp_path / records.NAME
    path.write_text(path.read_text() + '{"event": "epo')
    assert [r["event"] for r in records.read(tmp_path)] == ["start"]
    with records.Records(tmp_path) as file:
        file.append("epoch", step=1)
    assert [json.loads(line)["event"] for line in path.read_text().splitlines()] == [
        "start",
        "epoch",
    ]


def test_a_line_in_the_midst_that_is_no_record_is_named(tmp_path):
    (tmp_path / records.NAME).write_text('{"event": "start"}\nhello\n{"event": "epoch"}\n')
    with pytest.raises(CheckpointError, match=r"records.jsonl, line 2 is no record"):
        records.read(tmp_path)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_an_error_with_a_way_out(tmp_path):
    with records.Records(tmp_path) as file, Path("/dev/full").open("wb", buffering=0) as full:
        os.dup2(full.fileno(), file._file.fileno())
        with pytest.raises(CheckpointError, match=r"No space left.*make room"):
            file.append("epoch", step=1)
        with pytest.raises(CheckpointError, match="No space left"):
            file.close()


def test_a_wrong_method_option_fails_before_anything_is_written(tmp_path):
    with pytest.raises(OptionError, match="unknown option 'rank'; did you mean 'ranks'"):
        train(recipe(method_options={"rank": 3}))
    with pytest.raises(OptionError, match="unknown method 'densee'; did you mean 'dense'"):
        train(recipe(method="densee", method_options={}))
    assert list(tmp_path.iterdir()) == []


def test_the_clock_shows_the_old_step_time_until_the_new_structure_has_stepped() -> None:
    clock = Clock(torch.device("cpu"))
    clock.restore([[3.0, 5.0, 4.0]])
    clock.new_phase()
    assert clock.median(-1) is None
    assert clock.recent(20) == 4.0
    assert clock.recent(20, since=1) is None
    clock.phases[-1].append(1.0)
    assert clock.recent(20) == 1.0
    clock.new_phase()  # ranks that shrink after the last step
    assert clock.recent(20, since=1) == 1.0
    assert Clock(torch.device("cpu")).recent(20) is None


@pytest.mark.parametrize(
    ("warmup_epochs", "batch_size", "expected"),
    [
        # The epoch that ends in the switch is validated after it, by the low-rank weights.
        (1, 32, ["switch", 1, 2, 3]),
        (1.5, 32, [1, "switch", 2, 3]),
        # Several epochs end before enough steps are timed for the switch to be shown.
        (1, 128, ["switch", 1, 2, 3]),
    ],
)
def test_what_is_shown_comes_in_the_order_in_which_it_happened(warmup_epochs, batch_size, expected):
    shown = []

    class Watch(Silent):
        def switch(self, switch: Switch) -> None:
            assert switch.step_ms_after is not None
            shown.append("switch")

        def epoch(self, record) -> None:
            shown.append(record["epoch"])

    options = {"ranks": 8, "warmup_epochs": warmup_epochs}
    train(recipe(method_options=options, epochs=3, batch_size=batch_size), report=Watch())
    assert shown == expected


def test_a_run_whose_weights_overflow_stops_before_they_are_saved():
    with pytest.raises(NonFiniteLossError, match=r"no checkpoint was saved yet\. Lower lr=1e\+38"):
        train(recipe(out="out", lr=1e38, method="dense", method_options={}))
    assert not list(Path("out").glob("step-*"))


def test_a_validation_loss_that_is_not_finite_stops_the_run(monkeypatch):
    whole = data.load("planted")
    broken = data.Split(whole.validation.images * float("nan"), whole.validation.labels)
    splits = dataclasses.replace(whole, validation=broken)
    monkeypatch.setattr(data, "load", lambda name, **_: splits)
    with pytest.raises(NonFiniteLossError, match=r"validation loss became nan after epoch 1;"):
        train(recipe(out="out", method="dense", method_options={}))
    assert not list(Path("out").glob("step-*"))
