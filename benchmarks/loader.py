"""Does the training step wait for its images? Streams of image files, alone and under a step.

    python benchmarks/loader.py [--data DIR] [--sizes 32 ...] [--threads 2] [--json FILE] [--smoke]

Pictures of 500x375, JPEG of quality 90, are made (sums of noise at all scales, as large as
photographs of that size); --data takes a folder of the user's, one folder a class, instead.
First the stream alone: images per second, random-resized-crop, at 32, 64 and 224 pixels, with 1
and 2 processes that decode, beside as many threads, and torch's DataLoader with as many processes,
which do the same. Then under a step of training with --threads threads: the time of a step with
images in memory and with the stream, in turns, and the share of it that the loop waits for its next
batch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from rankwise import data, models
from rankwise.training import environment

SIZES = (32, 64, 224)
WORKERS = (1, 2)
# Network, side, images of a batch, batches that are timed.
TRAINED = (("resnet-18", 32, 32, 4), ("resnet-50", 224, 4, 2))
SEEN = 384  # images of one measurement of the stream alone
BATCH, SKIPPED = 32, 4  # its batches, and how many of them pass before the clock starts


def pictures(root: Path, count: int, seed: int = 0) -> None:
    """JPEGs of 500x375 in two classes, about as heavy as photographs."""
    numbers = np.random.default_rng(seed)
    for number in range(count):
        whole = np.zeros((375, 500, 3))
        for scale in (1, 2, 5, 12, 30, 75):
            noise = numbers.normal(0, scale**0.5, (375 // scale + 1, 500 // scale + 2, 3))
            for channel in range(3):
                layer = Image.fromarray(noise[..., channel].astype(np.float32))
                whole[..., channel] += np.asarray(
                    layer.resize((500, 375), Image.Resampling.BICUBIC)
                )
        folder = root / ("a", "b")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = (128 + 10 * whole).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04}.jpg", quality=90)


def streamed(root: Path, size: int, workers: int) -> data.StreamedSplits:
    """The folder's images as a stream."""
    found = data.load(
        f"folder:{root}", size=size, augment="random-resized-crop", streamed=True, workers=workers
    )
    assert isinstance(found, data.StreamedSplits)
    return found


class OneByOne(Dataset[Tensor]):
    """The same images for torch's DataLoader, whose processes ask for one at a time."""

    def __init__(self, part: data.Streamed) -> None:
        self.part = part.for_epoch(1)

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, number: int) -> Tensor:
        return self.part.take(torch.tensor([number % len(self.part)]))[0][0]


def in_batches(count: int, seen: int, batch: int) -> list[Tensor]:
    """Numbers of examples, from the beginning again where there are too few."""
    return list((torch.arange(seen) % count).split(batch))


def speed(items: Iterable[Any], each: int) -> float:
    """Images per second once it flows: the first batches, and what was begun with them, pass."""
    began, images, passed = 0.0, 0, SKIPPED * BATCH // each
    for number, _ in enumerate(items, start=1):
        if number == passed:
            began = time.perf_counter()
        elif number > passed:
            images += each
    return images / (time.perf_counter() - began)


def alone(
    root: Path, sizes: Sequence[int], counts: Sequence[int], repeats: int, seen: int
) -> Iterator[dict[str, Any]]:
    """Rows of the stream alone."""
    for size in sizes:
        for workers in counts:
            part = streamed(root, size, workers).train
            order = in_batches(len(part), seen, BATCH)
            numbers = [chosen.tolist() for chosen in order]
            varied = OneByOne(part)
            speeds: dict[str, list[float]] = {"processes": [], "threads": [], "DataLoader": []}
            for _ in range(repeats):
                with closing(data.read(part.for_epoch(1), order)) as batches:
                    speeds["processes"].append(speed(batches, BATCH))
                with ThreadPoolExecutor(workers) as pool:
                    every = pool.map(varied.__getitem__, chain.from_iterable(numbers))
                    speeds["threads"].append(speed(every, 1))
                loader = DataLoader(varied, batch_sampler=numbers, num_workers=workers)
                speeds["DataLoader"].append(speed(loader, BATCH))
            part.release()
            for kind, found in speeds.items():
                yield {"size": size, "workers": workers, "kind": kind, "images_per_s": found}


def under_a_step(
    root: Path, name: str, size: int, batch: int, steps: int, repeats: int
) -> Iterator[dict[str, Any]]:
    """Rows of one network: steps with images in memory, and with streams, in turns."""
    kept = data.load(f"folder:{root}", size=size, augment="random-resized-crop")
    torch.manual_seed(0)
    model = models.build(name, classes=len(kept.classes), input_shape=(3, size, size))
    model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, fused=True)
    sides: dict[str, data.Examples] = {"memory": kept.train}
    sides |= {f"stream, {n}": streamed(root, size, n).train for n in WORKERS}
    rows = {side: {"step_s": [], "wait": []} for side in sides}
    for _ in range(repeats):
        for side, part in sides.items():
            order = in_batches(len(part), (steps + 1) * batch, batch)
            waited = 0.0
            with closing(data.read(part.for_epoch(1), order)) as batches:
                images, labels = next(batches)  # not timed: there is nothing before it to hide in
                began = time.perf_counter()
                for _ in range(steps):
                    optimizer.zero_grad()
                    assert isinstance(images, Tensor)
                    images = images.to(memory_format=torch.channels_last)  # as the loop does
                    F.cross_entropy(model(images), labels).backward()
                    optimizer.step()
                    asked = time.perf_counter()
                    images, labels = next(batches)
                    waited += time.perf_counter() - asked
                took = time.perf_counter() - began
            rows[side]["step_s"].append(took / steps)
            rows[side]["wait"].append(waited / took)
    for part in sides.values():
        if isinstance(part, data.Streamed):
            part.release()
    for side, found in rows.items():
        yield {"network": name, "size": size, "batch": batch, "side": side, **found}


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Both tables, medians."""
    print("\nalone, images/s    size  workers  processes  threads  DataLoader")
    speeds = {(r["size"], r["workers"], r["kind"]): r["images_per_s"] for r in rows if "kind" in r}
    for size, workers in dict.fromkeys((size, workers) for size, workers, _ in speeds):
        ours, threads, loader = (
            statistics.median(speeds[size, workers, kind])
            for kind in ("processes", "threads", "DataLoader")
        )
        print(f"{size:>23}{workers:>9}{ours:>11.0f}{threads:>9.0f}{loader:>12.0f}")
    print(
        "\nunder a step              network  size  batch         side  step    waits  of memory's"
    )
    found = [row for row in rows if "side" in row]
    for row in found:
        same = next(r for r in found if r["network"] == row["network"] and r["side"] == "memory")
        pairs = zip(row["step_s"], same["step_s"], strict=True)
        ratio = statistics.median(a / b for a, b in pairs)
        print(
            f"{row['network']:>33}{row['size']:>6}{row['batch']:>7}{row['side']:>13}"
            f"{statistics.median(row['step_s']):>6.2f} s{statistics.median(row['wait']):>8.1%}"
            f"{ratio:>8.2f}"
        )


def main() -> None:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of images, one folder a class")
    parser.add_argument("--threads", type=int, default=2, help="torch's threads in a step")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="sides in pixels")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="file of the record")
    parser.add_argument("--smoke", action="store_true", help="one repeat of the small cases")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    sizes, repeats, seen = asked.sizes, asked.repeats, SEEN
    trained = [entry for entry in TRAINED if entry[1] in sizes]
    if asked.smoke:
        sizes, trained, repeats, seen = [32], [("vgg-small", 32, 8, 2)], 1, 256
    with tempfile.TemporaryDirectory() as made:
        root = asked.data or Path(made)
        if asked.data is None:
            pictures(root, 24 if asked.smoke else 192)
        sizes_of = [path.stat().st_size for path in root.rglob("*") if path.is_file()]
        print(
            f"{len(sizes_of):,} files, {statistics.median(sizes_of) / 1024:.1f} KiB the middle one"
        )
        rows = list(alone(root, sizes, (2,) if asked.smoke else WORKERS, repeats, seen))
        for name, size, batch, steps in trained:
            rows += under_a_step(root, name, size, batch, steps, repeats)
    show(rows)
    record = {
        "date": datetime.now(UTC).date().isoformat(),
        "commit": environment.commit(),
        "versions": environment.versions(),
        "hardware": environment.hardware(torch.device("cpu"), 1),
        "files": {"count": len(sizes_of), "bytes": int(statistics.median(sizes_of))},
        "data": "own" if asked.data else "made: 500x375, JPEG of quality 90",
        "repeats": repeats,
        "rows": rows,
    }
    if asked.json:
        asked.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
