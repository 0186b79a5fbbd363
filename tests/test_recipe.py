"""Recipes: one declaration for files, flags, checks and comparison."""

from __future__ import annotations

import dataclasses
import math

import pytest

from rankwise.errors import OptionError
from rankwise.training import Recipe, records
from rankwise.training.recipe import FREE
from rankwise.training.schedule import factor


def test_a_file_says_the_same_as_the_arguments(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(
        'model = "mlp-512x2"\nepochs = 3\nlr = 1\nclip_norm = 2\ncompile = true\n'
        '[method]\nname = "pufferfish"\nranks = 0.5\nwarmup-epochs = 1\n'
    )
    assert Recipe.from_file(path) == Recipe(
        model="mlp-512x2",
        epochs=3,
        lr=1.0,
        clip_norm=2.0,
        compile=True,
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
    other = {str: "x", int: 7, float: 0.123, dict: {"ranks": 1}}
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
    at = factor(Recipe(epochs=4, lr_warmup_epochs=1), 10)
    assert [at(step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert at(25) == pytest.approx(0.5)
    assert at(40) == pytest.approx(0.0, abs=1e-12)
    assert all(at(step) >= at(step + 1) for step in range(9, 40))


def test_the_step_schedule_divides_by_ten_at_half_and_at_three_quarters():
    at = factor(Recipe(epochs=4, schedule="step", lr_warmup_epochs=0), 10)
    assert [at(step) for step in (0, 19, 20, 29, 30, 39)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )


def test_the_constant_schedule_stays():
    at = factor(Recipe(epochs=2, schedule="constant", lr_warmup_epochs=0), 10)
    assert {at(step) for step in range(21)} == {1.0}
    assert math.isclose(factor(Recipe(schedule="constant"), 10)(0), 0.1)
