"""The tasks of GLUE (Wang et al., arXiv 1804.07461): sentences or pairs, and each task's metrics.

Read from the Hugging Face Hub through the package datasets, or from tab-separated files. The Hub's
copies hide the labels of the test parts, so results are stated on the validation parts, as in the
papers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.data import hub
from rankwise.data.parts import checksum_of
from rankwise.errors import DataError, OptionError, unknown

HUB = "nyu-mll/glue"


@dataclass(frozen=True, kw_only=True)
class GlueTask:
    """One task.

    Attributes:
        description: what is asked.
        columns: the Hub's names of the sentence, or of the two.
        classes: meaning of the labels; none if the label is a number to be predicted.
        metrics: keys of `METRICS`; the first is the one that tables show.
        validation: the Hub's names of the validation parts.
        epochs: usual length of fine-tuning; small sets get more.
    """

    description: str
    columns: tuple[str, ...]
    classes: tuple[str, ...]
    metrics: tuple[str, ...] = ("accuracy",)
    validation: tuple[str, ...] = ("validation",)
    epochs: int = 3


_PAIR = ("sentence1", "sentence2")

TASKS: Mapping[str, GlueTask] = {
    "cola": GlueTask(
        description="is the sentence grammatical",
        columns=("sentence",),
        classes=("unacceptable", "acceptable"),
        metrics=("matthews", "accuracy"),
    ),
    "sst2": GlueTask(
        description="is the review positive",
        columns=("sentence",),
        classes=("negative", "positive"),
    ),
    "mrpc": GlueTask(
        description="do both sentences say the same",
        columns=_PAIR,
        classes=("not_equivalent", "equivalent"),
        metrics=("f1", "accuracy"),
        epochs=5,
    ),
    "stsb": GlueTask(
        description="how alike are the sentences, from 0 to 5",
        columns=_PAIR,
        classes=(),
        metrics=("spearman", "pearson"),
    ),
    "qqp": GlueTask(
        description="do both questions ask the same",
        columns=("question1", "question2"),
        classes=("not_duplicate", "duplicate"),
        metrics=("f1", "accuracy"),
    ),
    "mnli": GlueTask(
        description="does the second sentence follow from the first",
        columns=("premise", "hypothesis"),
        classes=("entailment", "neutral", "contradiction"),
        validation=("validation_matched", "validation_mismatched"),
    ),
    "qnli": GlueTask(
        description="does the sentence answer the question",
        columns=("question", "sentence"),
        classes=("entailment", "not_entailment"),
    ),
    "rte": GlueTask(
        description="does the second sentence follow from the first",
        columns=_PAIR,
        classes=("entailment", "not_entailment"),
    ),
    "wnli": GlueTask(
        description="is the pronoun resolved rightly",
        columns=_PAIR,
        classes=("not_entailment", "entailment"),
        epochs=5,
    ),
}


@dataclass(frozen=True, eq=False)
class GlueSplit:
    """One part of a task.

    Attributes:
        texts: N sentences, or pairs of them, as tuples of one or two.
        labels: (N,) int64, or float32 where a number is predicted.
    """

    texts: tuple[tuple[str, ...], ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.texts)

    def first(self, count: int | None) -> GlueSplit:
        """No more than so many, from the beginning."""
        return GlueSplit(self.texts[:count], self.labels[:count])


@dataclass(frozen=True, eq=False, kw_only=True)
class GlueData:
    """A task's parts: validation by name, test only where its labels are known."""

    name: str
    task: GlueTask
    train: GlueSplit
    validation: Mapping[str, GlueSplit]
    test: GlueSplit | None
    checksum: str  # first 16 hexadecimal digits of the SHA-256 of texts and labels


def load_glue(name: str, folder: str | Path | None = None) -> GlueData:
    """Read a task.

    Args:
        name: a key of `TASKS`.
        folder: holds train.tsv, dev.tsv and perhaps test.tsv (with several validation parts,
            dev_matched.tsv and dev_mismatched.tsv): per line a sentence, the second one if the
            task has two, and the label, tabs between; a label is a number or a class's name, and
            a first line that ends in the word label is a heading. Without a folder, the Hub.

    Raises:
        OptionError: an unknown task.
        DataError: a file is missing or malformed, the package datasets is missing, or the Hub
            cannot be reached.
    """
    if name not in TASKS:
        raise OptionError(unknown("GLUE task", name, TASKS))
    task = TASKS[name]
    parts = _from_hub(name, task) if folder is None else _from_folder(Path(folder), task)
    contents = (json.dumps([split.texts, split.labels.tolist()]) for split in parts.values())
    return GlueData(
        name=name,
        task=task,
        train=parts["train"],
        validation={part: parts[part] for part in task.validation},
        test=parts.get("test"),
        checksum=checksum_of(contents),
    )


def _from_hub(name: str, task: GlueTask) -> dict[str, GlueSplit]:
    instead = "give the folder of its train.tsv and dev.tsv (--data DIR)"
    loaded = hub.load(name, HUB, name, instead=instead)
    return {part: _split_of(loaded[part], task) for part in ("train", *task.validation)}


def _split_of(rows: Any, task: GlueTask) -> GlueSplit:
    texts = tuple(zip(*(rows[column] for column in task.columns), strict=True))
    return GlueSplit(texts, torch.tensor(rows["label"], dtype=_kind(task)))


def _kind(task: GlueTask) -> torch.dtype:
    return torch.int64 if task.classes else torch.float32


def _from_folder(folder: Path, task: GlueTask) -> dict[str, GlueSplit]:
    files = {"train": "train.tsv"}
    for part in task.validation:
        files[part] = f"{part.replace('validation', 'dev')}.tsv"
    missing = [file for file in files.values() if not (folder / file).is_file()]
    if missing:
        raise DataError(
            f"{folder} has no {' and no '.join(missing)}; per line they hold "
            f"{' TAB '.join((*task.columns, 'label'))}"
        )
    if (folder / "test.tsv").is_file():
        files["test"] = "test.tsv"
    return {part: _read(folder / file, task) for part, file in files.items()}


def _read(path: Path, task: GlueTask) -> GlueSplit:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from error
    texts: list[tuple[str, ...]] = []
    labels: list[float] = []
    for number, line in enumerate(lines, start=1):
        *sentences, label = line.rstrip("\r").split("\t")
        if (not line and number == len(lines)) or (number == 1 and label == "label"):
            continue
        if len(sentences) != len(task.columns):
            raise DataError(
                f"{path}, line {number}: {len(sentences) + 1} fields, not "
                f"{len(task.columns) + 1}: {' TAB '.join((*task.columns, 'label'))}"
            )
        texts.append(tuple(sentences))
        labels.append(_label(label, task, f"{path}, line {number}"))
    if not texts:
        raise DataError(f"{path} holds no examples")
    return GlueSplit(tuple(texts), torch.tensor(labels).to(_kind(task)))


def _label(text: str, task: GlueTask, place: str) -> float:
    if text in task.classes:
        return task.classes.index(text)
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if task.classes and value not in range(len(task.classes)):
        raise DataError(
            f"{place}: label {text!r} is none of 0 to {len(task.classes) - 1}, nor "
            f"{', '.join(task.classes)}"
        )
    if not math.isfinite(value):
        raise DataError(f"{place}: label {text!r} is no number")
    return value


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of right classes, both (N,)."""
    return float((predicted == labels).double().mean())


def f1(predicted: Tensor, labels: Tensor) -> float:
    """Harmonic mean of precision and recall of class 1; 0 if it neither occurs nor is predicted.

    Example:
        >>> f1(torch.tensor([1, 1, 0, 0]), torch.tensor([1, 0, 1, 0]))
        0.5
    """
    hits = float(((predicted == 1) & (labels == 1)).sum())
    return 2 * hits / max(1.0, float((predicted == 1).sum() + (labels == 1).sum()))


def matthews(predicted: Tensor, labels: Tensor) -> float:
    """Correlation of two binary variables, -1 to 1; 0 where one of them is constant."""
    return pearson(predicted, labels)


def pearson(predicted: Tensor, labels: Tensor) -> float:
    """Linear correlation, -1 to 1, both (N,); 0 where one of them is constant."""
    x, y = predicted.double(), labels.double()
    if x.min() == x.max() or y.min() == y.max():
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float(x @ y / (x.norm() * y.norm()))


def spearman(predicted: Tensor, labels: Tensor) -> float:
    """Correlation of the ranks, -1 to 1; equal values share the mean of their ranks."""
    return pearson(_ranked(predicted), _ranked(labels))


def _ranked(values: Tensor) -> Tensor:
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[place]


METRICS: Mapping[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}


def score(task: GlueTask, outputs: Sequence[Tensor] | Tensor, labels: Tensor) -> dict[str, float]:
    """A task's metrics, the one that tables show first.

    Args:
        task: which metrics, and of what.
        outputs: (N, C) scores of the classes, or (N, 1) predicted numbers; also in batches.
        labels: (N,).
    """
    every = outputs if isinstance(outputs, Tensor) else torch.cat(list(outputs))
    predicted = every.argmax(1) if task.classes else every.squeeze(1)
    return {name: METRICS[name](predicted, labels) for name in task.metrics}
