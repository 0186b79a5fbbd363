"""Published sets of images are read in every form in which they are kept; what is missing, damaged
or of another set is named. Real pictures, digits from a package, are written in each form.
"""

from __future__ import annotations

import io
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rankwise import data
from rankwise.data import load
from rankwise.data.images import cifar, online, svhn
from rankwise.errors import DataError, OptionError
from rankwise.images import tree

ROWS = 20


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No set of this machine is found by accident, and no network is asked."""
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.delenv("RANKWISE_DATA", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def digits() -> np.ndarray:
    """Written digits in three shades, 32x32 in colour: (N, 32, 32, 3)."""
    split = data.load("mnist-5k").train
    grey = split.pixels[::23].movedim(1, -1).numpy()
    colour = np.concatenate([grey, grey // 2, 255 - grey], axis=-1)
    return np.pad(colour, ((0, 0), (2, 2), (2, 2), (0, 0)))


def bytes_of(split: data.Split) -> np.ndarray:
    return split.pixels.movedim(1, -1).numpy()


def every(splits: data.Splits) -> list[tuple[bytes, int]]:
    """Images and labels of training and validation part, in an order of their own."""
    pairs = []
    for split in (splits.train, splits.validation):
        pairs += [
            (image.tobytes(), int(label))
            for image, label in zip(bytes_of(split), split.labels, strict=True)
        ]
    return sorted(pairs)


# CIFAR


def binary(folder: Path, digits: np.ndarray, name: str = "cifar-10") -> tuple[np.ndarray, list]:
    """The files of a binary version, by the description of the format alone."""
    published = cifar.PUBLISHED[name]
    folder.mkdir(parents=True)
    images, labels, start = [], [], 0
    for stem in (*published.train, published.test):
        count = ROWS * (5 if stem == "train" else 1)
        some = digits[start : start + count]
        classes = [len(published.classes) - 10 + i % 10 for i in range(count)]  # the last ten
        rows = [
            bytes([7] * published.coarse + [label]) + image.transpose(2, 0, 1).tobytes()
            for image, label in zip(some, classes, strict=True)
        ]
        (folder / f"{stem}.bin").write_bytes(b"".join(rows))
        images.append(some)
        labels += classes
        start += count
    return np.concatenate(images), labels


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar, "ROWS", ROWS)


def packed(folder: Path, path: Path, inside: str = "") -> Path:
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, inside or ".")
    return path


def as_files(root: Path, images: np.ndarray, labels: list, train: int) -> Path:
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        part = "train" if number < train else "test"
        folder = root / part / cifar.PUBLISHED["cifar-10"].classes[label]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{number:04}.png")
    return root


@pytest.mark.usefixtures("small")
def test_cifar_10_is_read_alike_from_binary_files_archives_and_folders_of_images(
    tmp_path: Path, digits: np.ndarray
) -> None:
    images, labels = binary(tmp_path / "binary", digits)
    first = load(f"cifar-10:{tmp_path / 'binary'}")
    expected = sorted(
        (i.tobytes(), label) for i, label in zip(images[:100], labels[:100], strict=True)
    )
    assert every(first) == expected
    np.testing.assert_array_equal(bytes_of(first.test), images[100:])
    assert first.test.labels.tolist() == labels[100:]
    assert first.validation.labels.bincount().tolist() == [1] * 10
    assert (first.name, first.classes[9], len(first.checksum)) == ("cifar-10", "truck", 16)

    packed(tmp_path / "binary", tmp_path / "mine.tar.gz", "cifar-10-batches-bin")
    again = load(f"cifar-10:{tmp_path / 'mine.tar.gz'}")
    assert again.checksum == first.checksum

    as_files(tmp_path / "files", images, labels, train=100)
    files = load(f"cifar-10:{tmp_path / 'files'}")
    assert every(files) == every(first)
    packed(tmp_path / "files", tmp_path / "files.tar.gz")
    zipped = load(f"cifar-10:{tmp_path / 'files.tar.gz'}", size=16)
    assert zipped.checksum == files.checksum
    assert zipped.test.images.shape == (20, 3, 16, 16)


@pytest.mark.usefixtures("small")
def test_cifar_100_has_a_coarse_class_before_the_fine_one(
    tmp_path: Path, digits: np.ndarray
) -> None:
    images, labels = binary(tmp_path / "cifar-100-binary", digits, "cifar-100")
    splits = load(f"cifar-100:{tmp_path}")  # the published folder is found inside
    pairs = zip(images[:100], labels[:100], strict=True)
    assert every(splits) == sorted((image.tobytes(), label) for image, label in pairs)
    assert splits.test.labels.tolist() == labels[100:]
    names = splits.classes
    assert len(set(names)) == 100
    assert list(names) == sorted(names)


@pytest.mark.usefixtures("small")
def test_cifar_is_found_in_the_usual_places_and_asked_for_where_it_is_not(
    tmp_path: Path, digits: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError) as caught:
        load("cifar-10")
    message = str(caught.value)
    for part in ("cifar-10-batches-bin", str(tmp_path / "cache"), "data", "RANKWISE_DATA"):
        assert part in message
    assert "download https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz" in message
    binary(tmp_path / "data" / "cifar-10-batches-bin", digits)
    assert len(load("cifar-10").test) == ROWS
    monkeypatch.setenv("RANKWISE_DATA", str(tmp_path / "own"))
    images, labels = binary(tmp_path / "apart", digits[::-1])
    as_files(tmp_path / "own" / "cifar-10", images, labels, train=110)
    assert len(load("cifar-10").test) == 10
    with pytest.raises(OptionError, match="write cifar-10:PATH, or cifar-10 alone"):
        load("cifar-10:")
    with pytest.raises(OptionError, match="size=0"):
        load("cifar-10", size=0)


@pytest.mark.usefixtures("small")
def test_damaged_and_foreign_files_of_cifar_are_named(tmp_path: Path, digits: np.ndarray) -> None:
    binary(tmp_path / "ten", digits)
    with pytest.raises(DataError, match=r"ten holds neither train\.bin, test\.bin nor the folders"):
        load(f"cifar-100:{tmp_path / 'ten'}")
    path = tmp_path / "ten" / "data_batch_3.bin"
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"data_batch_3\.bin has 61,459 bytes, not 20 images"):
        load(f"cifar-10:{tmp_path / 'ten'}")
    path.write_bytes(b"\x0a" + content[1:])
    with pytest.raises(DataError, match="labels from 0 to 10, and the set has the classes 0 to 9"):
        load(f"cifar-10:{tmp_path / 'ten'}")
    path.unlink()
    with pytest.raises(DataError, match="holds neither"):
        load(f"cifar-10:{tmp_path / 'ten'}")
    python = tmp_path / "python" / "cifar-10-batches-py"
    python.mkdir(parents=True)
    for stem in (*cifar.PUBLISHED["cifar-10"].train, "test_batch"):
        (python / stem).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(DataError, match=r"pickles, which run code when they are read; .*binary"):
        load(f"cifar-10:{tmp_path / 'python'}")
    published = packed(tmp_path / "ten", tmp_path / "cifar-10-binary.tar.gz")
    with pytest.raises(DataError, match=r"its MD5 is .*, published is c32a1d4"):
        load(f"cifar-10:{published}")
    (tmp_path / "own" / "train" / "cat").mkdir(parents=True)
    (tmp_path / "own" / "test" / "cat").mkdir(parents=True)
    with pytest.raises(DataError, match="'airplane' is missing or too many"):
        load(f"cifar-10:{tmp_path / 'own'}")


# Archives


def photographs(root: Path, count: int = 6) -> Path:
    numbers = np.random.default_rng(0)
    for number in range(count):
        for name in ("ångström", "猫"):
            folder = root / name / "deep"
            folder.mkdir(parents=True, exist_ok=True)
            pixels = numbers.integers(0, 256, (9, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"ü {number}.png")
    return root


def test_an_archive_is_the_folder_that_it_holds(tmp_path: Path) -> None:
    root = photographs(tmp_path / "photos")
    (root / "猫" / ".hidden.png").write_text("")
    first = load(f"folder:{root}", size=8)
    assert first.classes == ("ångström", "猫")
    with zipfile.ZipFile(tmp_path / "flat.zip", "w") as archive:
        for path in sorted(root.rglob("*.png"), reverse=True):
            archive.write(path, path.relative_to(root))
    made = [packed(root, tmp_path / "around.tgz", "a/b"), tmp_path / "flat.zip"]
    for path in made:
        again = load(f"folder:{path}", size=8)
        assert (again.classes, again.checksum) == (first.classes, first.checksum)
        assert torch.equal(again.validation.images, first.validation.images)


def test_what_an_archive_must_not_hold_is_left_out_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = photographs(tmp_path / "photos")
    with tarfile.open(tmp_path / "odd.tar", "w") as archive:
        archive.add(root, ".")
        for name, target in {"猫/link.png": "/etc/passwd", "猫/up.png": "../../up.png"}.items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            archive.addfile(link)
        for name in ("../猫/out.png", "/猫/root.png"):
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    assert load(f"folder:{tmp_path / 'odd.tar'}").checksum == load(f"folder:{root}").checksum
    for name in ("broken.tar.gz", "broken.tar.xz", "broken.zip"):
        (tmp_path / name).write_bytes(b"no archive at all" * 99)
        with pytest.raises(DataError, match=f"{name} is damaged"):
            load(f"folder:{tmp_path / name}")
    whole = packed(root, tmp_path / "cut.tar.gz").read_bytes()
    (tmp_path / "cut.tar.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"cut\.tar\.gz is damaged"):
        load(f"folder:{tmp_path / 'cut.tar.gz'}")
    monkeypatch.setattr(tree, "LARGEST_ARCHIVE", 2000)
    with pytest.raises(DataError, match=r"more than fits in memory .*unpack it"):
        load(f"folder:{tmp_path / 'odd.tar'}")


# SVHN


def element(kind: int, body: bytes) -> bytes:
    if 0 < len(body) <= 4 and kind != 15:
        return struct.pack("<HH", kind, len(body)) + body.ljust(4, b"\0")
    padding = b"" if kind == 15 else bytes(-len(body) % 8)
    return struct.pack("<II", kind, len(body)) + body + padding


def matrix(name: str, values: np.ndarray, *, compressed: bool = True) -> bytes:
    """An array of numbers as MATLAB's version 5 keeps it, from the format's description."""
    kind = {"uint8": 2, "float32": 7, "float64": 9}[str(values.dtype)]
    parts = [
        element(6, struct.pack("<II", 9, 0)),
        element(5, struct.pack(f"<{values.ndim}i", *values.shape)),
        element(1, name.encode()),
        element(kind, values.tobytes(order="F")),
    ]
    whole = element(14, b"".join(parts))
    return element(15, zlib.compress(whole)) if compressed else whole


def matlab(path: Path, *arrays: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"MATLAB 5.0".ljust(124) + struct.pack("<H", 0x100) + b"IM" + b"".join(arrays))


def house_numbers(folder: Path, digits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Digits of 1 to 10, the last one meaning 0; one file compressed, the other one not."""
    labels = (np.arange(140) % 10 + 1).astype(np.float64)[:, None]
    for file, part in zip(svhn.FILES, (slice(0, 100), slice(100, 140)), strict=True):
        images = digits[:140][part].transpose(1, 2, 3, 0)
        first = "train" in file
        numbers = labels[part].astype(np.uint8 if first else np.float64)
        arrays = [matrix("X", images, compressed=first), matrix("no", labels), matrix("y", numbers)]
        matlab(folder / file, *arrays)
    return digits[:140], labels.astype(int).reshape(-1) % 10


def test_svhn_is_read_from_matlab_files_where_ten_means_zero(
    tmp_path: Path, digits: np.ndarray
) -> None:
    images, labels = house_numbers(tmp_path / "data", digits)
    splits = load("svhn")
    pairs = zip(images[:100], labels[:100].tolist(), strict=True)
    assert every(splits) == sorted((image.tobytes(), label) for image, label in pairs)
    np.testing.assert_array_equal(bytes_of(splits.test), images[100:])
    assert splits.test.labels.tolist() == labels[100:].tolist()
    assert load(f"svhn:{tmp_path / 'data'}", size=8).train.images.shape == (90, 3, 8, 8)


def test_damaged_and_foreign_matlab_files_are_named(tmp_path: Path, digits: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"train_32x32\.mat .*http://ufldl\.stanford\.edu"):
        load("svhn")
    with pytest.raises(DataError, match=r"does not hold train_32x32\.mat and test_32x32\.mat"):
        load(f"svhn:{tmp_path}")
    house_numbers(tmp_path, digits)
    path = tmp_path / "test_32x32.mat"
    whole = path.read_bytes()
    labels = np.ones((4, 1), np.uint8)
    for content, says in {
        whole[:99]: "its header is missing",
        whole[:5000]: "ends behind the end",
        b"\x80\x04." * 99: "its header is missing",
    }.items():
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"test_32x32\.mat is damaged .*{says}"):
            load(f"svhn:{tmp_path}")
    for images in (digits[:4, :8], digits[:4].astype(np.float32), digits[:4, :, :, 0]):
        matlab(path, matrix("X", np.moveaxis(images, 0, -1)), matrix("y", labels))
        with pytest.raises(DataError, match="a file of another set"):
            load(f"svhn:{tmp_path}")
    matlab(path, matrix("y", labels), element(14, element(6, bytes(8))))
    with pytest.raises(DataError, match="something else than numbers"):
        load(f"svhn:{tmp_path}")
    matlab(path, matrix("y", labels))
    with pytest.raises(DataError, match="holds y, not X and y"):
        load(f"svhn:{tmp_path}")


# PathMNIST


def tissue(path: Path, digits: np.ndarray, **changed: np.ndarray) -> dict[str, np.ndarray]:
    arrays = {}
    for part, chosen in {
        "train": slice(0, 60),
        "val": slice(60, 80),
        "test": slice(80, 99),
    }.items():
        arrays[f"{part}_images"] = digits[chosen, 2:30, 2:30]
        arrays[f"{part}_labels"] = (np.arange(99)[chosen, None] % 9).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{**arrays, **changed})
    return arrays


def test_pathmnist_keeps_its_published_parts(tmp_path: Path, digits: np.ndarray) -> None:
    arrays = tissue(tmp_path / ".medmnist" / "pathmnist.npz", digits)
    splits = load("pathmnist")
    assert len(splits.classes) == 9
    for split, part in ((splits.train, "train"), (splits.validation, "val"), (splits.test, "test")):
        np.testing.assert_array_equal(bytes_of(split), arrays[f"{part}_images"])
        assert split.labels.tolist() == arrays[f"{part}_labels"].reshape(-1).tolist()
    again = load(f"pathmnist:{tmp_path / '.medmnist'}", size=14)
    assert (again.checksum, again.test.images.shape) == (splits.checksum, (19, 3, 14, 14))


def test_pathmnist_refuses_pickles_and_other_sets(tmp_path: Path, digits: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"pathmnist\.npz, .*medmnist.* was found in .*zenodo"):
        load("pathmnist")
    path = tmp_path / "pathmnist.npz"
    tissue(path, digits, val_labels=np.array([{}] * 20, object))
    with pytest.raises(DataError, match="Object arrays cannot be loaded"):
        load(f"pathmnist:{path}")
    tissue(path, digits, test_images=digits[80:99, :, :, 0])
    with pytest.raises(DataError, match="19 x 32 x 32 uint8, not N x 28 x 28 x 3"):
        load(f"pathmnist:{path}")
    tissue(path, digits, train_labels=np.zeros((7, 1), np.uint8))
    with pytest.raises(DataError, match="60 images and 7 labels"):
        load(f"pathmnist:{path}")
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"pathmnist\.npz cannot be read"):
        load(f"pathmnist:{path}")


# Tiny-ImageNet, ImageNet


def tiny(root: Path, digits: np.ndarray) -> Path:
    names = ["n01443537", "n01629819"]
    for number, image in enumerate(digits[:30]):
        folder = root / "train" / names[number % 2] / "images"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"{names[number % 2]}_{number}.JPEG")
    (root / "val" / "images").mkdir(parents=True)
    lines = []
    for number, image in enumerate(digits[30:40]):
        Image.fromarray(image).save(root / "val" / "images" / f"val_{number}.JPEG")
        lines.append(f"val_{number}.JPEG\t{names[number % 3 == 0]}\t0\t32\t44\t62\n")
    (root / "val" / "val_annotations.txt").write_text("".join(reversed(lines)))
    (root / "test" / "images").mkdir(parents=True)
    return root


def test_tiny_imagenet_is_tested_by_its_annotated_validation_part(
    tmp_path: Path, digits: np.ndarray
) -> None:
    root = tiny(tmp_path / "data" / "tiny-imagenet-200", digits)
    splits = load("tiny-imagenet")
    assert splits.classes == ("n01443537", "n01629819")
    assert splits.train.images.shape == (26, 3, 64, 64)
    assert splits.validation.labels.bincount().tolist() == [2, 2]
    assert splits.test.labels.tolist() == [int(number % 3 == 0) for number in range(10)]
    with zipfile.ZipFile(tmp_path / "tiny.zip", "w") as archive:
        for path in root.rglob("*"):
            archive.write(path, Path("tiny-imagenet-200") / path.relative_to(root))
    zipped = load(f"tiny-imagenet:{tmp_path / 'tiny.zip'}")
    assert zipped.checksum == splits.checksum
    assert torch.equal(zipped.test.images, splits.test.images)
    table = root / "val" / "val_annotations.txt"
    for line, says in {
        "val_3.JPEG\tn09\t0": r"line 1: 'val_3\.JPEG' of class 'n09'; there is no such class",
        "val_99.JPEG\tn01443537": "no such file in val/images",
    }.items():
        table.write_text(line)
        with pytest.raises(DataError, match=says):
            load(f"tiny-imagenet:{root}")


def test_imagenet_is_two_folders_whose_middle_is_looked_at(
    tmp_path: Path, digits: np.ndarray
) -> None:
    with pytest.raises(DataError, match=r"imagenet: none of imagenet, .*register at"):
        load("imagenet")
    with pytest.raises(DataError, match="does not hold the folders train and val"):
        load(f"imagenet:{tmp_path}")
    frame = np.full((64, 64, 3), 255, np.uint8)
    frame[4:60, 4:60] = 0  # a sixteenth on each side is cut away: all is black
    for part, count in {"train": 4, "val": 2}.items():
        for number in range(count):
            for name in ("n0", "n1"):
                folder = tmp_path / part / name
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(frame).save(folder / f"{number}.png")
    splits = load(f"imagenet:{tmp_path}", size=56)
    assert [len(splits.train), len(splits.validation), len(splits.test)] == [6, 2, 4]
    assert int(splits.train.pixels.max()) == 0
    assert load(f"imagenet:{tmp_path}").test.images.shape == (4, 3, 224, 224)
    (tmp_path / "val" / "n2").mkdir()
    with pytest.raises(DataError, match="has the class 'n2', which"):
        load(f"imagenet:{tmp_path}")


# The Hub


class Rows:
    """A part of a set of the Hub, as the package datasets gives it."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, image: str, label: str) -> None:
        self.images, self.labels, self.image, self.label = images, labels, image, label
        self.encoded = False

    def __len__(self) -> int:
        return len(self.images)

    def cast_column(self, name: str, feature: Any) -> Rows:
        assert (name, feature) == (self.image, "as bytes")
        made = Rows(self.images, self.labels, self.image, self.label)
        made.encoded = True
        return made

    def __getitem__(self, column: str) -> list[int]:
        assert column == self.label
        return self.labels.tolist()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        assert self.encoded
        for image, label in zip(self.images, self.labels, strict=True):
            content = io.BytesIO()
            Image.fromarray(image).save(content, "PNG")
            yield {self.image: {"bytes": content.getvalue(), "path": None}, self.label: int(label)}


def hub_of(load: Callable[..., Any]) -> Any:
    module: Any = ModuleType("datasets")
    module.load_dataset = load
    module.Image = lambda decode: "as bytes" if not decode else None
    return module


@pytest.mark.parametrize("name", ["cifar-10", "cifar-100", "svhn", "tiny-imagenet", "mnist"])
def test_a_set_that_is_not_here_comes_from_the_hub(
    name: str, digits: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = online.IMAGES[name]
    images = digits[:120, 2:30, 2:30, 0] if name == "mnist" else digits[:120]
    labels = np.arange(120) % 10
    asked = []

    def load_dataset(*words: str) -> Any:
        asked.append(words)
        columns = {"image": entry.image, "label": entry.label}
        return {
            entry.parts[0]: Rows(images[:100], labels[:100], **columns),
            entry.parts[1]: Rows(images[100:], labels[100:], **columns),
        }

    monkeypatch.setitem(sys.modules, "datasets", hub_of(load_dataset))
    seen: list[tuple[int, int]] = []
    size = 32 if name == "tiny-imagenet" else None
    splits = load(name, size=size, progress=lambda *counts: seen.append(counts))
    assert asked == [(entry.repository, *entry.configuration)]
    assert seen[-1] == (120, 120)
    whole = images if images.ndim == 4 else images[..., None]
    pairs = zip(whole[:100], labels[:100].tolist(), strict=True)
    assert every(splits) == sorted((image.tobytes(), label) for image, label in pairs)
    np.testing.assert_array_equal(bytes_of(splits.test), whole[100:])
    assert splits.name == name


def test_a_hub_out_of_reach_is_answered_with_the_places(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*words: str) -> Any:
        raise ConnectionError("Couldn't reach\nthe Hub")

    monkeypatch.setitem(sys.modules, "datasets", hub_of(offline))
    with pytest.raises(DataError, match=r"\(Couldn't reach the Hub\); where there is no network"):
        load("svhn")
    with pytest.raises(DataError, match=r"uoft-cs/cifar10 .*cifar-10-binary"):
        load("cifar-10")
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    for name in online.IMAGES:
        with pytest.raises(DataError, match=r"pip install 'rankwise\[datasets\]'"):
            load(name)


def test_what_has_no_files_is_not_streamed_and_a_wrong_way_is_answered() -> None:
    with pytest.raises(OptionError, match="mnist-5k is not read from image files"):
        data.load("mnist-5k", streamed=True)
    with pytest.raises(OptionError, match="unknown augment 'crop'; did you mean"):
        data.load("mnist-5k", augment="crop")
    varied = data.load("mnist-5k", augment="crop-flip")
    assert varied.train.augment is data.AUGMENTS["crop-flip"]
    assert varied.test.augment is None
