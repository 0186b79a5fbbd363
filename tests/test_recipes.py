"""Every recipe that is shipped can be read, names what exists, and says where it comes from."""

from __future__ import annotations

import pytest

from rankwise import composition, data, models, recipes
from rankwise.cli import main
from rankwise.errors import OptionError
from rankwise.training import Recipe, setup
from rankwise.training.schedule import Schedule


@pytest.mark.parametrize("name", recipes.names())
def test_a_recipe_can_be_trained_and_names_its_source(name: str) -> None:
    recipe = Recipe.from_file(recipes.find(name))
    assert models.find(recipe.model)
    assert recipe.data in data.DATA
    composition.check_methods(setup.build_methods(recipe.method, recipe.method_options))
    assert Schedule(recipe, 1000)(0) > 0
    about = recipes.about(name)
    assert list(about) == list(recipes.ABOUT)
    assert all(about.values())
    assert "arXiv" in about["source"] or about["source"].startswith("ours")


def test_names_globs_and_files_are_told_apart(tmp_path) -> None:
    assert recipes.choose("small-*fashion") == ["small-vgg-fashion", "small-vit-fashion"]
    assert recipes.choose("small-vgg-fashion") == ["small-vgg-fashion"]
    assert recipes.find("mine.toml").name == "mine.toml"
    assert recipes.find(str(tmp_path)) == tmp_path
    with pytest.raises(OptionError, match=r"did you mean 'small-vgg-fashion'\?.*ends in \.toml"):
        recipes.find("small-vgg-fashon")
    with pytest.raises(OptionError, match="'tiny-\\*' matches none of the recipes small-"):
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
