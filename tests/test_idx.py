"""MNIST and Fashion-MNIST are read from their published files, wherever those lie, and every file
that is missing, damaged or of another set is named.
"""

from __future__ import annotations

import gzip
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rankwise import data
from rankwise.data import load
from rankwise.data.images import idx
from rankwise.data.images.idx import FILES, PUBLISHED, places
from rankwise.errors import DataError, OptionError

EACH, TESTED = 24, 20  # training images of a class, test images


def packed(values: np.ndarray, kind: int = 8) -> bytes:
    """The idx form of an array, written from the format's description alone."""
    sizes = struct.pack(f">{values.ndim}I", *values.shape)
    return bytes([0, 0, kind, values.ndim]) + sizes + values.tobytes()


def arrays() -> list[np.ndarray]:
    """Training images and labels, test images and labels; the first pixels number the images."""
    numbers = np.random.default_rng(0)
    made = []
    for count in (10 * EACH, TESTED):
        images = numbers.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images[:, 0, 0], images[:, 0, 1] = np.arange(count) % 256, len(made)
        made += [images, (numbers.permutation(count) % 10).astype(np.uint8)]
    return made


def write(folder: Path, *, zipped: bool = True, dotted: bool = False) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for stem, values in zip(FILES, arrays(), strict=True):
        content = packed(values)
        name = stem.replace("-idx", ".idx") if dotted else stem
        path = folder / (f"{name}.gz" if zipped else name)
        path.write_bytes(gzip.compress(content) if zipped else content)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "set")


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No set of this machine is found by accident, and no network is asked."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delenv("RANKWISE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def restored(split: data.Split) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and labels of a split: normalisation undone by the extremes, 0 and 255."""
    low, high = split.images.min(), split.images.max()
    pixels = (split.images - low) / (high - low) * 255
    return pixels.round().to(torch.uint8).squeeze(1).numpy(), split.labels.numpy()


def test_every_image_is_in_one_part_with_its_label(folder: Path) -> None:
    splits = load(f"fashion-mnist:{folder}")
    train_images, train_labels, test_images, test_labels = arrays()
    parts = [restored(splits.train), restored(splits.validation)]
    images = np.concatenate([part[0] for part in parts])
    labels = np.concatenate([part[1] for part in parts])
    order = np.lexsort((images[:, 0, 0],))
    np.testing.assert_array_equal(images[order], train_images)
    np.testing.assert_array_equal(labels[order], train_labels)
    tested = restored(splits.test)
    np.testing.assert_array_equal(tested[0], test_images)
    np.testing.assert_array_equal(tested[1], test_labels)


def test_a_twelfth_of_every_class_validates_and_training_alone_normalises(folder: Path) -> None:
    splits = load(f"fashion-mnist:{folder}")
    assert splits.train.labels.bincount().tolist() == [EACH - 2] * 10
    assert splits.validation.labels.bincount().tolist() == [2] * 10
    assert (splits.name, splits.task) == ("fashion-mnist", "classification")
    assert splits.classes[9] == "Ankle boot"
    assert splits.train.images.shape == (220, 1, 28, 28)
    assert (splits.train.images.dtype, splits.train.labels.dtype) == (torch.float32, torch.int64)
    pixels, zero = splits.train.images.double(), torch.zeros((), dtype=torch.float64)
    torch.testing.assert_close(pixels.mean(), zero, rtol=0, atol=1e-6)
    torch.testing.assert_close(pixels.std(unbiased=False), zero + 1, rtol=0, atol=1e-6)


def test_how_the_files_are_kept_changes_nothing(folder: Path, tmp_path: Path) -> None:
    first = load(f"mnist:{folder}")
    assert first.classes == tuple("0123456789")
    for name, form in {"plain": {"zipped": False}, "dots": {"dotted": True}}.items():
        again = load(f"mnist:{write(tmp_path / name, **form)}")
        assert again.checksum == first.checksum
        assert len(again.checksum) == 16
        assert torch.equal(again.validation.images, first.validation.images)


def test_the_checksum_changes_with_a_pixel_of_any_file(folder: Path) -> None:
    sums = {load(f"mnist:{folder}").checksum}
    for stem, values in zip(FILES, arrays(), strict=True):
        values[3] = (values[3] + 1) % 10
        (folder / f"{stem}.gz").write_bytes(gzip.compress(packed(values)))
        sums.add(load(f"mnist:{folder}").checksum)
    assert len(sums) == 5


# Where


def test_without_a_path_the_usual_places_are_looked_through_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKWISE_DATA", str(tmp_path / "own"))
    assert places("fashion-mnist") == [
        tmp_path / "own" / "fashion-mnist",
        tmp_path / "own" / "FashionMNIST" / "raw",
        tmp_path / "cache" / "rankwise" / "data" / "fashion-mnist",
        tmp_path / "cache" / "rankwise" / "data" / "FashionMNIST" / "raw",
        Path("/usr/share/datasets/fashion-mnist"),
        Path("/usr/share/datasets/FashionMNIST/raw"),
        Path("data/fashion-mnist"),
        Path("data/FashionMNIST/raw"),
    ]
    monkeypatch.delenv("RANKWISE_DATA")
    monkeypatch.delenv("XDG_CACHE_HOME")
    cache, *_ = places("mnist")
    assert cache == Path.home() / ".cache" / "rankwise" / "data" / "mnist"


@pytest.mark.parametrize(
    "place", ["own/mnist", "own/MNIST/raw", "cache/rankwise/data/mnist", "data/MNIST/raw"]
)
def test_a_set_is_found_in_a_usual_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    monkeypatch.setenv("RANKWISE_DATA", str(tmp_path / "own"))
    write(tmp_path / place)
    assert len(load("mnist").test) == TESTED


def test_a_folder_of_torchvision_is_understood_from_above(tmp_path: Path) -> None:
    write(tmp_path / "root" / "FashionMNIST" / "raw")
    for given in ("root", "root/FashionMNIST", "root/FashionMNIST/raw"):
        assert len(load(f"fashion-mnist:{tmp_path / given}").test) == TESTED


def test_an_incomplete_place_gives_way_to_a_complete_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKWISE_DATA", str(tmp_path / "own"))
    incomplete = write(tmp_path / "own" / "mnist")
    (incomplete / f"{FILES[2]}.gz").unlink()
    write(tmp_path / "data" / "MNIST" / "raw")
    assert len(load("mnist").test) == TESTED


def test_a_missing_set_is_answered_with_the_places_and_the_way_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(idx, "places", lambda name: [tmp_path / "a", tmp_path / "b"])
    incomplete = write(tmp_path / "b")
    (incomplete / f"{FILES[3]}.gz").unlink()
    with pytest.raises(DataError) as caught:
        load("fashion-mnist")
    message = str(caught.value)
    assert f"{tmp_path / 'a'} (does not exist)" in message
    assert f"{tmp_path / 'b'} (lacks t10k-labels-idx1-ubyte)" in message
    assert "dataset-fashion-mnist" in message
    assert "RANKWISE_DATA" in message
    assert all(stem in message for stem in FILES)


def test_a_given_folder_without_the_files_is_not_replaced_by_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "data" / "MNIST" / "raw")
    (tmp_path / "hollow").mkdir()
    with pytest.raises(DataError, match=r"hollow \(has none of them\)"):
        load("mnist:hollow")
    with pytest.raises(DataError, match=r"looked for in gone \(does not exist\)"):
        load("mnist:gone")
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file \(is no folder\)"):
        load("mnist:file")


# Names


def test_names_are_checked() -> None:
    with pytest.raises(OptionError, match="did you mean 'fashion-mnist'"):
        load("fashionmnist")
    with pytest.raises(OptionError, match="write mnist:PATH, or mnist alone"):
        load("mnist:")
    with pytest.raises(OptionError, match="its images are 28x28; leave size out"):
        load("fashion-mnist", size=32)
    with pytest.raises(OptionError, match="Known: fashion-mnist, mnist"):
        idx.load_idx("kmnist")
    assert not data.is_text("mnist:somewhere")
    assert set(PUBLISHED) <= set(data.DATA)


def test_one_set_is_not_taken_for_the_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = replace(PUBLISHED["fashion-mnist"], checksum=load(f"mnist:{folder}").checksum)
    monkeypatch.setattr(idx, "PUBLISHED", {**PUBLISHED, "fashion-mnist": known})
    with pytest.raises(DataError, match=f"holds fashion-mnist, not mnist; .*:{folder}"):
        load(f"mnist:{folder}")
    assert len(load(f"fashion-mnist:{folder}").test) == TESTED


# Damage

IMAGES, LABELS = (f"{stem}.gz" for stem in FILES[:2])


def rezip(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes()))))


def header(*sizes: int, kind: int = 8, body: int = 100) -> Callable[[Path], object]:
    content = bytes([0, 0, kind, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes)
    return lambda path: path.write_bytes(gzip.compress(content + bytes(body)))


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        (IMAGES, lambda p: p.write_bytes(p.read_bytes()[:-300]), "is damaged .*get it anew"),
        (IMAGES, lambda p: p.write_bytes(b"no gzip at all"), "Not a gzipped file"),
        (IMAGES, lambda p: p.write_bytes(b""), "does not begin like an idx file"),
        (IMAGES, rezip(lambda c: c[:-1]), "announces 188,160 values, it holds 188,159"),
        (IMAGES, rezip(lambda c: c + b"x"), "announces 188,160 values, it holds more"),
        (IMAGES, rezip(lambda c: c[:9]), "ends within its header"),
        (IMAGES, rezip(lambda c: b"\1" + c[1:]), "does not begin like an idx file"),
        (IMAGES, header(2**31, 28, 28), r"announces 1,568\.0 GiB"),
        (IMAGES, header(2**32 - 1, 2**32 - 1, 2**32 - 1), r"header announces"),
        (IMAGES, header(1, 10, 10), "holds 1 x 10 x 10 values .* not N x 28 x 28 bytes"),
        (IMAGES, header(1, 28, 28, kind=13, body=784), "type 0x0d, not N x 28 x 28"),
        (LABELS, header(10, 10), "holds 10 x 10 values .* not N bytes"),
        (LABELS, header(100), "240 images and train-labels-idx1-ubyte.gz 100 labels"),
        (LABELS, rezip(lambda c: c[:-1] + b"\x0a"), "label 10, .* classes 0 to 9"),
    ],
)
def test_a_damaged_or_foreign_file_is_named(
    folder: Path, name: str, damage: Callable[[Path], object], says: str
) -> None:
    damage(folder / name)
    with pytest.raises(DataError, match=says) as caught:
        load(f"mnist:{folder}")
    assert str(folder) in str(caught.value)


def test_a_gzip_file_is_not_unpacked_beyond_what_its_header_announces(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    original = gzip.GzipFile.read

    def read(self: gzip.GzipFile, size: int | None = -1) -> bytes:
        asked.append(-1 if size is None else size)
        return original(self, size)

    monkeypatch.setattr(gzip.GzipFile, "read", read)
    load(f"mnist:{folder}")
    assert min(asked) > 0
    assert max(asked) == 240 * 784 + 1


def test_an_empty_set_is_refused(folder: Path) -> None:
    header(0, 28, 28, body=0)(folder / IMAGES)
    header(0, body=0)(folder / LABELS)
    with pytest.raises(DataError, match="0 images and"):
        load(f"mnist:{folder}")
