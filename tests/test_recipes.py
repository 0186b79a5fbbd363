"""Every recipe that is shipped can be read, names what exists, and says where it comes from."""

from __future__ import annotations

import pytest
import torch

import rankwise
from rankwise import composition, data, models, recipes
from rankwise.cli import main
from rankwise.errors import OptionError
from rankwise.ranks.automatic.families import FAMILIES
from rankwise.training import Recipe, setup
from rankwise.training.schedule import Schedule
from torchvision_operators import stub_operators


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_can_be_trained_and_names_its_source(name: str) -> None:
    stub_operators()
    recipe = Recipe.from_file(recipes.find(name))
    assert models.find(recipe.model)
    assert recipe.data in data.DATA
    composition.check_methods(setup.build_methods(recipe.method, recipe.method_options))
    assert 0 < Schedule(recipe, 1000)(0) <= 1
    about = recipes.about(name)
    assert list(about) == list(recipes.ABOUT)
    assert all(about.values())
    assert any(known in about["source"] for known in ("arXiv", "ICML", "ours"))


# What the papers report, in millions; biases and the counting of buffers make the difference.
PUBLISHED = {
    "pufferfish-resnet18-cifar10": (11.17, 3.34),
    "pufferfish-vgg19-cifar10": (20.56, 8.37),
    "pufferfish-transformer-multi30k": (48.98, 26.70),
    "pufferfish-lstm-wikitext2": (85.96, 67.96),
}


@pytest.mark.parametrize("name", recipes.names())
def test_its_layers_are_there(name: str) -> None:
    stub_operators()
    recipe = Recipe.from_file(recipes.find(name))
    with torch.device("meta"):
        model = models.build(recipe.model)
    options = dict(recipe.method_options)
    if options.get("compat"):
        fitting = [family for family in FAMILIES.values() if family.fits(model)]
        assert [family.constants for family in fitting] == [options["compat"]]
        return
    asked = ("layers", "exclude", "keep_first", "split", "separable")
    choice = {key: options[key] for key in asked if key in options}
    plan = rankwise.plan(model, options.get("ranks", 0.25), **choice)
    assert plan.ranks
    if name in PUBLISHED:
        dense, low = (count / 1e6 for count in plan.parameters)
        assert (dense, low) == pytest.approx(PUBLISHED[name], abs=0.07)


def test_names_globs_and_files_are_told_apart(tmp_path) -> None:
    assert recipes.choose("small-*fashion") == ["small-vgg-fashion", "small-vit-fashion"]
    assert recipes.choose("small-vgg-fashion") == ["small-vgg-fashion"]
    assert recipes.find("mine.toml").name == "mine.toml"
    assert recipes.find(str(tmp_path)) == tmp_path
    with pytest.raises(OptionError, match=r"did you mean 'small-vgg-fashion'\?.*ends in \.toml"):
        recipes.find("small-vgg-fashon")
    with pytest.raises(
        OptionError, match="'tiny-\\*' matches none of our recipes; `rankwise recipes`"
    ):
        recipes.choose("tiny-*")


def test_they_are_listed_and_shown(capsys) -> None:
    assert main(["recipes"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert all(name in said for name in recipes.names())
    assert main(["recipes", "small-vgg-fashion"]) == 0
    text = recipes.find("small-vgg-fashion").read_text(encoding="utf-8")
    assert capsys.readouterr().out == text
    assert main(["recipes", "small-vgg"]) == 2
    assert "did you mean" in capsys.readouterr().err
