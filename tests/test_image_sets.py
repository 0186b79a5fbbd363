"""Published sets of images are read in every form in which they are kept; what is missing, damaged
or of another set is named. Real pictures, digits from a package, are written in each form.
"""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rankwise import data
from rankwise.data import cifar, load, tree
from rankwise.errors import DataError, OptionError

ROWS = 20


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No set of this machine is found by accident."""
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
