"""From a folder of images to a trained low-rank network, as a user would do it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rankwise.training import Recipe, records, train
from rankwise.training.report import Silent

Image = pytest.importorskip("PIL.Image")


def photographs(root: Path, count: int) -> None:
    """Two classes that differ by the half of the picture that is bright; sizes differ too."""
    generator = np.random.default_rng(0)
    for number in range(count):
        label = number % 2
        pixels = generator.integers(0, 80, (20 + number % 5, 24, 3), dtype=np.uint8)
        pixels[:, 12 * label : 12 * label + 12] += 150
        folder = root / ("left", "right")[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")


def test_a_folder_of_images_is_trained_on_and_its_reading_shown(tmp_path: Path) -> None:
    photographs(tmp_path / "photos", 120)
    seen: list[tuple[int, int]] = []

    class Watch(Silent):
        def loading(self, done: int, total: int) -> None:
            seen.append((done, total))

    recipe = Recipe(
        model="mlp-512x2",
        data=f"folder:{tmp_path / 'photos'}",
        image_size=16,
        epochs=6,
        batch_size=16,
        optimizer="adamw",
        lr=1e-3,
        method_options={"ranks": 16, "warmup_epochs": 1},
        out=str(tmp_path / "run"),
    )
    result = train(recipe, report=Watch())
    assert seen[-1] == (120, 120)
    assert result.test_accuracy == 1.0
    assert result.parameters[0] < result.dense_parameters[0]
    start = next(r for r in records.read(tmp_path / "run") if r["event"] == "start")
    assert start["data"]["images"] == [96, 12, 12]
