"""A plan travels as JSON: read back equal, editable, refused with the entry named."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rankwise import accounting
from rankwise.errors import OptionError, PlanError, SelectionError
from rankwise.ranks import Plan, factorize, plan


def model() -> Any:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.Conv2d(16, 24, 3),
        nn.Flatten(),
        nn.Linear(384, 96),
        nn.Linear(96, 9),
    )


SAMPLE = torch.zeros(2, 3, 8, 8)


def made(**options: Any) -> Plan:
    return plan(model(), 4, SAMPLE, layers="*", **options)


@pytest.mark.parametrize(
    "options",
    [{}, {"norm": True}, {"core": True, "separable": True}, {"split": {"3": 2}}],
    ids=repr,
)
def test_a_plan_is_read_back_equal(tmp_path: Path, options: Any) -> None:
    decided = made(**options)
    decided.save(tmp_path / "plan.json")
    again = Plan.load(str(tmp_path / "plan.json"))
    assert again == decided
    assert str(again) == str(decided)
    one, other = model(), model()
    factorize(one, decided)
    factorize(other, again)
    assert str(one) == str(other)
    assert list(tmp_path.iterdir()) == [tmp_path / "plan.json"]


def test_a_plan_without_a_sample_is_read_back_equal(tmp_path: Path) -> None:
    decided = plan(model(), 0.25)
    decided.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == decided


def test_an_edited_rank_is_counted_and_built(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    made().save(path)
    data = json.loads(path.read_text())
    data["layers"]["3"]["rank"] = 7
    data["layers"]["1"]["rank"] = None
    path.write_text(json.dumps(data))
    edited = Plan.load(path)
    assert edited.ranks == {"0": 4, "3": 7, "4": 4}
    low = model()
    factorize(low, edited)
    assert accounting.parameters(low).stored == edited.parameters[1]
    assert edited.flops is not None
    assert accounting.flops(low, SAMPLE) == edited.flops[1]


def test_a_plan_replaces_its_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text("old")
    made().save(path)
    assert Plan.load(path) == made()
    assert path.stat().st_mode & 0o444 == 0o444 & ~_mask()
    with pytest.raises(OSError, match="missing"):
        made().save(tmp_path / "missing" / "plan.json")


def _mask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def edit(change: Any) -> dict[str, Any]:
    data = json.loads(json.dumps(made().as_dict()))
    change(data)
    return data


def put(*path: Any) -> Any:
    *way, key, value = path

    def change(data: Any) -> None:
        for step in way:
            data = data[step]
        data[key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("format", "rankwise plan 99"), "this is no plan"),
        (put("layers", []), "layers must map names"),
        (put("layers", "3", "rank", 97), r"layer 3 \(96×384\): rank 97 is outside 1 to 96"),
        (put("layers", "3", "rank", 0), "rank 0 is outside"),
        (put("layers", "3", "rank", 4.0), "rank 4.0 is outside"),
        (put("layers", "3", "rank", True), "rank True is outside"),
        (put("layers", "3", "rnak", 4), "layer 3: unknown entry 'rnak'; did you mean 'rank'"),
        (put("layers", "3", "rows", -1), "layer 3: rows must be a whole number from 1"),
        (put("layers", "3", "trainable", "yes"), "layer 3: trainable must be true or false"),
        (put("layers", "3", "flops", {"dense": 1}), "the entry 'linear' is missing"),
        (put("layers", "3", "tied", "30"), "unknown layer of the plan '30'"),
        (put("form", "core", 1), "form: core must be true or false"),
        (put("form", "split", {"qkv": 0}), "form: split"),
        (put("others", {}), "others: the entry 'stored' is missing"),
        (put("notes", "a"), "notes must be a list"),
        (lambda data: data.pop("form"), "the plan: the entry 'form' is missing"),
        (lambda data: data["layers"]["3"].pop("rank"), "layer 3: the entry 'rank' is missing"),
    ],
)
def test_a_wrong_entry_is_named(change: Any, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_dict(edit(change))


@pytest.mark.parametrize("text", ["", "[]", "{", "3", '{"format": "other"}', "[" * 100_000, "\xff"])
def test_a_file_that_is_no_plan_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(PlanError, match=r"plan\.json: this is no"):
        Plan.load(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"plan\.json: the plan cannot be read: No such file"):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_of_another_model_names_the_layer() -> None:
    with pytest.raises(SelectionError, match="unknown layer '3'"):
        factorize(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), made())


def test_other_ranks_for_some_layers() -> None:
    changed = made().with_ranks({"3": 5, "4": None})
    assert changed.ranks == {"0": 4, "1": 4, "3": 5}
    assert changed.layers[-1].reason == "as asked"
    with pytest.raises(PlanError, match="unknown layer of the plan '33'; did you mean '3'"):
        made().with_ranks({"33": 5})
    with pytest.raises(PlanError, match="rank 97 is outside 1 to 96"):
        made().with_ranks({"3": 97})


def test_layers_that_share_a_weight_change_together() -> None:
    tied: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    decided = plan(tied, 2, layers="*")
    assert decided.with_ranks({"1": 3}).ranks == {"0": 3, "1": 3, "2": 2}
    with pytest.raises(PlanError, match="1 shares its weight with 0"):
        decided.with_ranks({"0": 2, "1": 3})


def test_a_plan_that_was_made_in_one_form_is_not_built_in_another() -> None:
    for option in ("norm", "core", "separable"):
        asked: Any = {option: True}
        with pytest.raises(OptionError, match=f"{option}=True: the plan was made with"):
            factorize(model(), made(), **asked)
    built = model()
    factorize(built, made(core=True), core=True)
    assert built[3].core is not None
