"""Streamed images are those that memory would hold, whoever decodes them, and nothing stays."""

from __future__ import annotations

import gc
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image

from rankwise import data
from rankwise.data import Streamed, StreamedSplits, batches, read
from rankwise.data.chosen import Chosen
from rankwise.data.images import folder, stream
from rankwise.errors import DataError
from rankwise.images import process
from rankwise.images.tree import open_tree
from rankwise.images.variation import How
from rankwise.training import Recipe, loop, records, setup, train
from rankwise.training.interrupt import Interrupted

PASS: dict[str, Any] = {"batch_size": 16, "seed": 0, "epoch": 0}


def photographs(root: Path, count: int = 60) -> Path:
    """Two classes that differ in the half that is bright; sizes and kinds of files differ too."""
    numbers = np.random.default_rng(0)
    for number in range(count):
        label = number % 2
        shape = (20 + number % 5, 24 + number % 3, 3)
        pixels = numbers.integers(0, 80, shape, dtype=np.uint8)
        pixels[:, 12 * label : 12 * label + 12] += 150
        inside = root / ("left", "right")[label]
        inside.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(inside / f"{number:02}.{('png', 'jpg')[number % 3 == 0]}")
    return root


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return photographs(tmp_path_factory.mktemp("photos"))


def streamed(root: Path, augment: str = "none", workers: int = 2) -> StreamedSplits:
    found = data.load(f"folder:{root}", size=16, augment=augment, streamed=True, workers=workers)
    assert isinstance(found, StreamedSplits)
    return found


def decoding() -> int:
    """Threads and processes that decode."""
    threads = sum(t.name.startswith("rankwise-decode") for t in threading.enumerate())
    return threads + len(decoders())


def decoders(pid: int | None = None) -> list[psutil.Process]:
    found = psutil.Process(pid).children(recursive=True)
    return [child for child in found if "rankwise.images.process" in child.cmdline()]


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    yield
    gc.collect()  # parts that a test did not close end their processes with them
    assert decoding() == 0


@pytest.mark.parametrize("augment", ["none", "flip", "crop-flip"])
def test_a_stream_is_what_memory_would_hold(photos: Path, augment: str) -> None:
    kept = data.load(f"folder:{photos}", size=16, augment=augment)
    flowing = streamed(photos, augment)
    assert (flowing.classes, flowing.name, flowing.task) == (kept.classes, kept.name, kept.task)
    for epoch in range(2):
        ours = batches(flowing.train, batch_size=9, seed=1, epoch=epoch)
        theirs = batches(kept.train, batch_size=9, seed=1, epoch=epoch)
        for (images, labels), (expected, expected_labels) in zip(ours, theirs, strict=True):
            assert isinstance(images, torch.Tensor)
            assert images.is_contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(images, expected, rtol=0, atol=0)
            torch.testing.assert_close(labels, expected_labels, rtol=0, atol=0)
    order = torch.arange(len(kept.test)).split(2)
    for (images, _), chosen in zip(read(flowing.test, order), order, strict=True):
        torch.testing.assert_close(images, kept.test.images[chosen], rtol=0, atol=0)


@pytest.mark.parametrize("augment", ["none", "random-resized-crop"])
def test_neither_processes_nor_workers_nor_resumption_change_a_bit(
    photos: Path, augment: str
) -> None:
    one = list(batches(streamed(photos, augment, 1).train, batch_size=12, seed=0, epoch=1))
    assert len(one) == 4
    rest = batches(streamed(photos, augment, 3).train, batch_size=12, seed=0, epoch=1, start=2)
    for (images, _), (expected, _) in zip(rest, one[2:], strict=True):
        torch.testing.assert_close(images, expected, rtol=0, atol=0)
    part = streamed(photos, augment).train
    for worker in range(2):
        mine = batches(part, batch_size=12, seed=0, epoch=1, worker=worker, workers=2)
        for (images, labels), (expected, expected_labels) in zip(mine, one, strict=True):
            torch.testing.assert_close(images, expected[worker::2], rtol=0, atol=0)
            torch.testing.assert_close(labels, expected_labels[worker::2], rtol=0, atol=0)


def test_a_part_of_the_whole_picture_is_cut_out_anew_in_every_pass(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(4):
            ramp = np.tile(np.arange(200, dtype=np.uint8), (160, 1)) + number
            Image.fromarray(ramp).save(tmp_path / name / f"{number}.png")
    part = streamed(tmp_path, "random-resized-crop").train
    assert isinstance(part, Streamed)
    seen = [
        image.numpy().tobytes()
        for epoch in range(6)
        for images, _ in batches(part, batch_size=4, seed=0, epoch=epoch)
        for image in images
    ]
    assert len(set(seen)) == len(seen) == 24
    # The middle square holds the levels 20 to 180; parts of the whole reach beyond it.
    passes = (part.for_epoch(draw) for draw in range(9))
    spread = torch.cat([each.take(torch.arange(4))[0] for each in passes])
    middle = part.take(torch.arange(4))[0]
    assert float(spread.max()) > float(middle.max())
    assert float(spread.min()) < float(middle.min())


def test_a_zip_file_is_streamed_by_several_processes_at_once(photos: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "photos.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for path in photos.rglob("*.*"):
            archive.write(path, path.relative_to(photos))
    ours = batches(streamed(tmp_path / "photos.zip", workers=4).train, **PASS)
    for (images, _), (expected, _) in zip(
        ours, batches(streamed(photos).train, **PASS), strict=True
    ):
        torch.testing.assert_close(images, expected, rtol=0, atol=0)


def test_skipped_batches_are_not_decoded_and_few_are_ahead(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = streamed(photos).train
    asked: list[str] = []
    monkeypatch.setattr(part.decoders, "fill", lambda images, names, *_: asked.extend(names))
    monkeypatch.setattr(stream, "AT_ONCE", 1)
    with closing(batches(part, batch_size=4, seed=0, epoch=0, start=10)) as some:
        assert len(list(some)) == 2
    assert len(asked) == 8
    asked.clear()
    with closing(batches(part, batch_size=4, seed=0, epoch=0)) as some:
        next(some)
        time.sleep(0.05)
        assert len(asked) <= 4 * (stream.AHEAD + 1)


def test_the_statistics_are_those_of_an_even_sample(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = streamed(photos).train.normalise
    monkeypatch.setattr(stream, "SAMPLED", 24)
    sample = streamed(photos).train.normalise
    assert not torch.equal(sample.mean, whole.mean)
    torch.testing.assert_close(sample.mean, whole.mean, rtol=0, atol=3.0)
    torch.testing.assert_close(sample.deviation, whole.deviation, rtol=0, atol=3.0)


def test_a_tar_archive_cannot_be_read_file_by_file(photos: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as archive:
        archive.add(photos, "photos")
    with pytest.raises(DataError, match="cannot be streamed: a tar archive is read as a whole"):
        streamed(tmp_path / "photos.tar")


def test_the_checksum_is_of_names_and_sizes(tmp_path: Path) -> None:
    root = photographs(tmp_path / "photos", 20)
    first = streamed(root).checksum
    path = root / "left" / "00.jpg"
    os.utime(path, (0, 0))
    assert streamed(root).checksum == first
    path.write_bytes(path.read_bytes() + b"\0")
    second = streamed(root).checksum
    path.rename(root / "left" / "000.jpg")
    assert len({first, second, streamed(root).checksum}) == 3


def test_what_does_not_fit_into_memory_is_streamed_by_itself(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "LARGEST_SET", 60 * 3 * 16 * 16 - 1)
    assert isinstance(data.load(f"folder:{photos}", size=16, streamed=None), StreamedSplits)
    with pytest.raises(DataError, match="stream them"):
        data.load(f"folder:{photos}", size=16)
    monkeypatch.setattr(folder, "LARGEST_SET", 60 * 3 * 16 * 16)
    assert isinstance(data.load(f"folder:{photos}", size=16, streamed=None), data.Splits)


def test_a_damaged_image_is_named_when_it_is_due(tmp_path: Path) -> None:
    root = photographs(tmp_path / "photos")
    part = streamed(root).train
    name = part.files.listing.names[part.chosen[7]]
    path = root / name
    path.write_bytes(path.read_bytes()[:150])
    good: list[Any] = []
    with pytest.raises(DataError, match="remove or repair it") as caught:
        good.extend(batches(part, batch_size=1, seed=0, epoch=0))
    numbers = data.Split(torch.zeros(48, 1, 1, 1), torch.arange(48))
    order = [int(label) for _, label in batches(numbers, batch_size=1, seed=0, epoch=0)]
    assert order.index(7) == len(good)
    assert str(path) in str(caught.value)
    path.unlink()
    with pytest.raises(DataError, match=f"{name} cannot be read"):
        part.take(torch.tensor([7]))
    part.release()


def test_a_process_that_is_killed_is_an_error_and_another_one_starts(photos: Path) -> None:
    part = streamed(photos, workers=1).train
    order = torch.arange(32).split(8)
    with closing(read(part, order)) as some:
        expected = [images for images, _ in some]
    (process,) = decoders()
    process.kill()
    while process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    with pytest.raises(DataError, match=r"the 7 images after it ended \(exit status -9"):
        list(read(part, order))
    for (images, _), same in zip(read(part, order), expected, strict=True):
        torch.testing.assert_close(images, same, rtol=0, atol=0)
    part.release()
    assert decoding() == 0


def test_nothing_stays_after_the_end_a_break_or_an_error(photos: Path) -> None:
    splits = streamed(photos)
    part = splits.train
    with data.released(splits):
        list(batches(part, batch_size=8, seed=0, epoch=0))
        assert decoding() == len(decoders()) == 2  # they wait for the next pass, without threads
        with closing(batches(part, batch_size=8, seed=0, epoch=0)) as some:
            next(some)
            assert decoding() > 2
        assert decoding() == 2
    assert decoding() == 0

    def train_badly(part: Streamed) -> None:
        with closing(batches(part, batch_size=8, seed=0, epoch=0)) as some:
            for _ in some:
                raise RuntimeError("the step")

    with pytest.raises(RuntimeError, match="the step"), data.released(splits):
        train_badly(part)
    assert decoding() == 0
    with pytest.raises(RuntimeError, match="the step"):
        train_badly(part)
    del splits, part, some  # nobody closed anything: they end with what they belong to


def test_a_limited_set_is_read_ahead_too(photos: Path) -> None:
    whole = streamed(photos)
    some = data.limited(whole, 9).train
    assert isinstance(some, Chosen)
    with closing(batches(some, batch_size=3, seed=0, epoch=0)) as ours:
        next(ours)
        assert len(decoders()) > 0
    order = torch.arange(9).split(4)
    for (images, _), chosen in zip(read(some, order), order, strict=True):
        expected, _ = whole.train.take(some.numbers[chosen])
        torch.testing.assert_close(images, expected, rtol=0, atol=0)
    some.release()
    assert decoding() == 0


# Training


def recipe(photos: Path, out: Path, **options: Any) -> Recipe:
    given: dict[str, Any] = {
        "model": "mlp-512x2",
        "data": f"folder:{photos}",
        "image_size": 16,
        "epochs": 3,
        "batch_size": 12,
        "augment": "crop-flip",
        "optimizer": "adamw",
        "lr": 1e-3,
        "method": "factorized",
        "method_options": {"ranks": 16},
        "threads": 1,
        "out": str(out),
    }
    return Recipe.from_mapping({**given, **options})


def test_a_run_on_a_stream_is_the_run_in_memory(photos: Path, tmp_path: Path) -> None:
    results = [
        train(recipe(photos, tmp_path / str(number), **options))
        for number, options in enumerate(
            [{}, {"stream": True, "loader_workers": 1}, {"stream": True, "loader_workers": 3}]
        )
    ]
    assert len({(r.test_loss, r.validation_loss) for r in results}) == 1
    assert decoding() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_on_a_stream_is_resumed_bit_for_bit(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    options = {"stream": True, "augment": "random-resized-crop"}
    whole = train(recipe(photos, tmp_path / "whole", **options))
    real = loop.Loop._step

    def step(self: Any, *batch: Any) -> None:
        real(self, *batch)
        if self.position == 6:  # in mid-epoch
            os.kill(os.getpid(), number)

    monkeypatch.setattr(loop.Loop, "_step", step)
    with pytest.raises(Interrupted):
        train(recipe(photos, tmp_path / "part", **options))
    assert decoding() == 0
    monkeypatch.setattr(loop.Loop, "_step", real)
    more = recipe(photos, tmp_path / "part", **options, loader_workers=1)
    rest = train(more, resume=tmp_path / "part")
    assert (rest.test_loss, rest.validation_loss) == (whole.test_loss, whole.validation_loss)


def test_ctrl_c_for_the_whole_group_leaves_a_checkpoint_and_nothing_else(
    photos: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = ["train", "--stream", "--model", "mlp-512x2", "--data", f"folder:{photos}"]
    words += ["--image-size", "16", "--batch-size", "4", "--epochs", "100000", "--threads", "1"]
    words += ["--method", "dense", "--loader-workers", "3", "--checkpoint-every", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "rankwise", *words, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        limit = time.monotonic() + 200
        while time.monotonic() < limit:
            if (out / "records.jsonl").exists() and any(
                r["event"] == "epoch" for r in records.read(out)
            ):
                break
            time.sleep(0.05)
        children = decoders(process.pid)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=200)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT
    assert "Traceback" not in output
    assert f"rankwise train --resume {out}" in " ".join(output.split())
    begun = records.recipe_of(out)
    assert begun is not None
    saved = setup.load(out, begun, streamed(photos))
    assert saved.extra["position"] > 0
    assert len(children) == 3
    assert not any(child.is_running() for child in children)


def test_whatever_a_decoder_raises_names_its_file_and_the_process_goes_on(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = process.picture

    def picture(tree: Any, name: str, how: How, drawn: Any) -> np.ndarray:
        if name == "left/02.png":
            raise TypeError("a colour of none")
        return honest(tree, name, how, drawn)

    monkeypatch.setattr(process, "picture", picture)
    how = How(size=16, channels=3)
    names = ["left/02.png", "left/04.png"]
    lines = [str(photos), *({"how": asdict(how), "names": names, "drawn": None} for _ in range(2))]
    answers = io.BytesIO()
    process.serve(io.BytesIO("\n".join(map(json.dumps, lines)).encode()), answers)
    answers.seek(0)
    for _ in range(2):
        kind, length = process.ANSWER.unpack(answers.read(process.ANSWER.size))
        assert kind == process.MESSAGE
        assert answers.read(length).decode() == (
            "left/02.png cannot be decoded: TypeError: a colour of none"
        )
        kind, length = process.ANSWER.unpack(answers.read(process.ANSWER.size))
        assert (kind, length) == (process.PIXELS, 16 * 16 * 3)
        expected = honest(open_tree(photos), "left/04.png", how, None)
        assert answers.read(length) == expected.tobytes()
    assert not answers.read()
