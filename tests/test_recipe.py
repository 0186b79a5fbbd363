"""Recipes: one declaration for files, flags, checks and comparison."""

from __future__ import annotations

import dataclasses
import math

import pytest

from rankwise.errors import OptionError
from rankwise.training import Recipe, records
from rankwise.training.recipe import FREE
from rankwise.training.schedule import Schedule


def test_a_file_says_the_same_as_the_arguments(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        'model = "mlp-512x2"\nepochs = 3\nlr = 1\nclip_norm = 2\ncompile = true\n'
        "milestones = [0.25, 0.5]\n"
        '[method]\nname = "pufferfish"\nranks = 0.5\nwarmup-epochs = 1\n'
        '[about]\nsource = "a page"\n'
    )
    assert Recipe.from_file(path) == Recipe(
        model="mlp-512x2",
        epochs=3,
        lr=1.0,
        clip_norm=2.0,
        compile=True,
        milestones=(0.25, 0.5),
        method="pufferfish",
        method_options={"ranks": 0.5, "warmup_epochs": 1},
    )


def test_text_from_flags_is_read_as_the_type_of_its_field():
    text = {"epochs": "3", "lr": "1e-2", "compile": "yes", "image_size": "none", "out": "here"}
    assert Recipe.from_mapping(text) == Recipe(epochs=3, lr=0.01, compile=True, out="here")


def test_a_recipe_survives_its_plain_form():
    recipe = Recipe(epochs=4, method_options={"ranks": 32}, threads=2)
    assert Recipe.from_mapping(recipe.as_dict()) == recipe


def test_every_field_that_decides_the_result_counts_as_a_difference():
    base = Recipe()
    other = {str: "x", int: 7, float: 0.123, dict: {"ranks": 1}, tuple: (0.3,)}
    for field in dataclasses.fields(Recipe):
        if field.metadata.get("choices"):
            value = next(c for c in field.metadata["choices"] if c != getattr(base, field.name))
        elif getattr(base, field.name) is None:
            value = "x" if field.name == "out" else 7
        elif isinstance(getattr(base, field.name), bool):
            value = not getattr(base, field.name)
        else:
            value = other[type(getattr(base, field.name))]
        changed = dataclasses.replace(base, **{field.name: value})
        expected = {} if field.name in FREE else {field.name: (getattr(base, field.name), value)}
        assert base.difference(changed) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"epoch": 3}, "unknown option 'epoch'; did you mean 'epochs'?"),
        ({"epochs": "many"}, "epochs='many' cannot be read as int (passes over the training"),
        ({"epochs": 1.5}, "epochs=1.5 cannot be read as int"),
        ({"epochs": True}, "epochs=True cannot be read as int"),
        ({"epochs": 0}, "epochs=0 is out of range; it must be at least 1"),
        ({"lr": 0}, "lr=0.0 is out of range; it must be above 0"),
        ({"lr": float("nan")}, "lr=nan must be a finite number"),
        ({"momentum": 2}, "momentum=2.0 is out of range; it must be at most 1"),
        ({"optimizer": "sdg"}, "unknown optimizer 'sdg'; did you mean 'sgd'?"),
        ({"amp": "fp8"}, "unknown amp 'fp8'"),
        ({"compile": "perhaps"}, "compile='perhaps' cannot be read as bool"),
        ({"method_options": 3}, "method_options=3 cannot be read"),
        ({"epochs": 2, "lr_warmup_epochs": 2}, "leaves nothing of epochs=2"),
        ({"milestones": "0.75,0.5"}, "milestones=(0.75, 0.5) must rise from above 0 to below 1"),
        ({"milestones": [150, 250]}, "they are shares of the run"),
        ({"milestones": "a"}, "milestones='a' cannot be read"),
        ({"nesterov": True, "optimizer": "adam"}, "needs optimizer='sgd' with momentum"),
        ({"beta2": 1, "optimizer": "adam"}, "Adam's are below 1"),
        ({"schedule": "cosin"}, "did you mean 'cosine'?"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_right(given, words):
    with pytest.raises(OptionError) as caught:
        Recipe.from_mapping(given)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("model", "folder"),
    [
        ("resnet-18", "resnet-18-dense-0"),
        ("transformers:llama?hidden_size=32&x=1", "transformers-llama-hidden_size-32-x-1-dense-0"),
        ("timm:hf-hub/a/b", "timm-hf-hub-a-b-dense-0"),
    ],
)
def test_a_run_gets_one_folder_whatever_its_network_is_called(model, folder):
    assert records.place(Recipe(model=model, method="dense")).parts == ("runs", folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read: No such file"), (b"epochs = ", "is no TOML"), (b"\xff", "is no TOML")],
)
def test_a_file_that_is_no_recipe_is_named(tmp_path, content, words):
    path = tmp_path / "recipe.toml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OptionError) as caught:
        Recipe.from_file(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_the_cosine_rises_to_one_and_ends_at_zero():
    at = Schedule(Recipe(epochs=4, lr_warmup_epochs=1), 10)
    assert [at(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert at(25) == pytest.approx(0.5)
    assert at(40) == pytest.approx(0.0, abs=1e-12)
    assert all(at(step) >= at(step + 1) for step in range(9, 40))


def test_the_step_schedule_divides_by_ten_at_half_and_at_three_quarters():
    at = Schedule(Recipe(epochs=4, schedule="step", lr_warmup_epochs=0), 10)
    assert [at(step) for step in (0, 19, 20, 29, 30, 39)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )


def test_milestones_are_shares_of_the_run_and_the_decay_is_the_recipes():
    recipe = Recipe(
        epochs=10, schedule="step", milestones=(0.3, 0.75), lr_decay=0.5, lr_warmup_epochs=0
    )
    at = Schedule(recipe, 10)
    assert [at(s) for s in (29, 30, 74, 75, 99)] == pytest.approx([1, 0.5, 0.5, 0.25, 0.25])


def test_rise_and_end_are_shares_of_the_rate():
    # Cuttlefish's CIFAR recipe: from 0.1 to 0.8 over 5 epochs.
    at = Schedule(Recipe(epochs=10, lr=0.8, lr_warmup_epochs=5, lr_start=0.125, lr_end=0.1), 10)
    assert 0.8 * at(0) == pytest.approx(0.1 + 0.7 / 50)
    assert at(49) == at(50) == pytest.approx(1)
    assert at(100) == pytest.approx(0.1)
    line = Schedule(Recipe(epochs=4, schedule="linear", lr_warmup_epochs=0, lr_end=0.5), 10)
    assert [line(s) for s in (0, 20, 40)] == pytest.approx([1, 0.75, 0.5])


def test_noam_is_the_transformers_formula():
    width, rise = 512, 40
    at = Schedule(Recipe(epochs=10, schedule="noam", lr_warmup_steps=rise), 10)
    peak = width**-0.5 * rise**-0.5
    for step in range(1, 101):  # arXiv 1706.03762, equation 3
        wanted = width**-0.5 * min(step**-0.5, step * rise**-1.5)
        assert peak * at(step - 1) == pytest.approx(wanted)


def test_a_plateau_is_an_epoch_without_a_new_best():
    at = Schedule(Recipe(schedule="plateau", lr_decay=0.25, lr_warmup_epochs=0), 10)
    assert [at.observe(loss) for loss in (3.0, 2.0, 2.5, 2.0, 1.9)] == [0, 0, 1, 1, 0]
    assert at(5) == pytest.approx(1 / 16)
    again = Schedule(at.recipe, 10)
    again.load_state_dict(at.state_dict())
    assert again(5) == at(5)
    assert not again.observe(1.8)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"lr_warmup_steps": 60, "epochs": 6}, "rises over 60 steps, and the run has 60"),
        ({"schedule": "noam", "lr_warmup_epochs": 0}, "falls from the end of a warm-up on"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_with_what_to_do(given, words):
    with pytest.raises(OptionError, match=words):
        Schedule(Recipe(**given), 10)


def test_the_constant_schedule_stays():
    at = Schedule(Recipe(epochs=2, schedule="constant", lr_warmup_epochs=0), 10)
    assert {at(step) for step in range(21)} == {1.0}
    assert math.isclose(Schedule(Recipe(schedule="constant"), 10)(0), 0.1)
