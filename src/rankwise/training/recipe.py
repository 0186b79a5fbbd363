"""Recipe: everything that decides a training run, declared once.

The fields are the keys of a TOML file, the flags of the command line, their help and their checks.
Imports no torch, so that `rankwise --help` answers at once.
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rankwise.errors import OptionError
from rankwise.options import build, option, validate

# These may differ between a run and its continuation: they say where and how often, not what.
FREE = frozenset({"out", "checkpoint_every", "threads", "loader_workers"})


def _method_options(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError("write a table of option names and values")
    return {key.replace("-", "_"): entry for key, entry in value.items()}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A training run: network, data, low-rank method and everything the loop needs to know.

    The defaults are a complete recipe, the one that `make run` shows.

    Example:
        >>> Recipe(epochs=3).difference(Recipe(epochs=4))
        {'epochs': (3, 4)}
    """

    model: str = option("resnet-small", "network; `rankwise models` lists them")
    data: str = option(
        "mnist-5k",
        "images or text: `rankwise data` lists them; folder:PATH, text:PATH, pairs:PATH for yours",
    )
    limit: int | None = option(
        None, "train with so many examples only: images, or windows of a text", at_least=1
    )
    image_size: int | None = option(
        None, "side in pixels that images are scaled to (none: as they are)", at_least=1
    )
    augment: str = option(
        "none",
        "how training images vary from pass to pass",
        choices=("none", "flip", "crop-flip", "random-resized-crop"),
    )
    stream: bool = option(
        False, "decode image files while training, also where they would fit in memory"
    )
    loader_workers: int | None = option(
        None, "processes that decode streamed images (none: one a core, at most 8)", at_least=1
    )
    context: int = option(128, "tokens in a window of text", at_least=1)
    tokens: str = option(
        "bytes", "what a text is read as", choices=("bytes", "characters", "words", "bpe")
    )
    vocabulary: int = option(
        8_000, "subwords that tokens=bpe learns from the training part, at least 257", at_least=1
    )
    tokenizer: str | None = option(
        None, "a tokenizer.json whose subwords tokens=bpe takes (none: learned)"
    )
    min_count: int = option(
        2, "times that a word occurs in the training part; rarer ones are <unk>", at_least=1
    )
    tokens_per_epoch: int | None = option(
        None, "tokens that make a pass over a streamed text (none: 2,097,152)", at_least=1
    )
    languages: str | None = option(
        None, "of texts in pairs: source and target with a dash between, as in de-en"
    )
    weights: str | None = option(
        None, "begin with these: a run's folder (trained dense), or FILE.safetensors"
    )
    method: str = option(
        "pufferfish", "low-rank method, or several: pufferfish+factor-decay; `rankwise methods`"
    )
    method_options: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={"help": "options of the method", "parse": _method_options},
    )
    epochs: int = option(6, "passes over the training data", at_least=1)
    batch_size: int = option(
        64, "windows of text or images per optimizer step, over all workers", at_least=1
    )
    optimizer: str = option("sgd", "rule of the update", choices=("sgd", "adam", "adamw"))
    lr: float = option(0.05, "learning rate at its highest", above=0)
    momentum: float = option(0.9, "momentum of sgd, beta1 of Adam", at_least=0, at_most=1)
    nesterov: bool = option(False, "sgd looks ahead (Nesterov's momentum)")
    beta2: float = option(0.999, "Adam's decay of squared gradients", at_least=0, at_most=1)
    eps: float = option(1e-8, "Adam's addition to the denominator", above=0)
    weight_decay: float = option(5e-4, "decay per unit of learning rate", at_least=0)
    decay_vectors: bool = option(True, "weight decay on biases and norms as well")
    schedule: str = option(
        "cosine",
        "learning rate behind the warm-up: down to lr-end along a cosine or a line; times lr-decay "
        "at milestones (step) or after each epoch whose validation loss is no new best (plateau); "
        "with one over the root of the step (noam); or even",
        choices=("cosine", "linear", "step", "plateau", "noam", "constant"),
    )
    lr_end: float = option(0.0, "cosine, linear: share of lr at the end", at_least=0, at_most=1)
    lr_decay: float = option(
        0.1, "step, plateau: what the learning rate is multiplied by", above=0, at_most=1
    )
    milestones: tuple[float, ...] = option(
        (0.5, 0.75), "step: shares of the run behind which it is, comma between"
    )
    lr_warmup_epochs: float = option(
        1.0, "epochs over which the learning rate rises to lr", at_least=0
    )
    lr_warmup_steps: int | None = option(None, "the same in optimizer steps", at_least=0)
    lr_start: float = option(0.0, "share of lr that the rise begins at", at_least=0, at_most=1)
    label_smoothing: float = option(
        0.0, "share of the target for all classes", at_least=0, at_most=1
    )
    clip_norm: float | None = option(None, "limit of the gradients' joint norm", above=0)
    seed: int = option(0, "of the initial weights and the order of batches", at_least=0)
    out: str | None = option(
        None, "folder of records and checkpoints (none: runs/MODEL-METHOD-SEED, numbered)"
    )
    checkpoint_every: int = option(1, "epochs between two checkpoints", at_least=1)
    amp: str = option("none", "arithmetic of reduced precision", choices=("none", "bf16", "fp16"))
    channels_last: bool = option(True, "keep images and kernels in channels-last order")
    compile: bool = option(False, "run the network through torch.compile")
    threads: int | None = option(None, "CPU threads (none: torch decides)", at_least=1)

    def __post_init__(self) -> None:
        validate(self)
        in_epochs = self.lr_warmup_steps is None
        if in_epochs and self.lr_warmup_epochs >= self.epochs and self.lr_warmup_epochs > 0:
            raise OptionError(
                f"Recipe: lr_warmup_epochs={self.lr_warmup_epochs:g} leaves nothing of "
                f"epochs={self.epochs}; it must be shorter"
            )
        points = (0.0, *self.milestones, 1.0)
        if not all(a < b for a, b in pairwise(points)):
            raise OptionError(
                f"Recipe: milestones={self.milestones} must rise from above 0 to below 1: they are "
                "shares of the run"
            )
        if self.optimizer != "sgd" and max(self.momentum, self.beta2) == 1:
            raise OptionError(
                f"Recipe: momentum={self.momentum:g}, beta2={self.beta2:g}; Adam's are below 1"
            )
        if self.nesterov and (self.optimizer != "sgd" or self.momentum == 0):
            raise OptionError(
                f"Recipe: nesterov=True needs optimizer='sgd' with momentum, not "
                f"'{self.optimizer}' with {self.momentum:g}"
            )

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> Recipe:
        """A recipe from names and values; `method` may be a table `{name, options...}`.

        Raises:
            OptionError: unknown name, unreadable value, value out of range.
        """
        values = dict(given)
        if isinstance(values.get("method"), Mapping):
            table = _method_options(values.pop("method"))
            if "name" in table:
                values["method"] = table.pop("name")
            values["method_options"] = {**values.get("method_options", {}), **table}
        return build(cls, values)

    @classmethod
    def from_file(cls, path: str | Path) -> Recipe:
        """Read a TOML file: fields as keys, the method as a table; a table `about` is for notes.

        Raises:
            OptionError: the file is missing or no TOML, or what `from_mapping` raises.

        Example of a file:
            epochs = 20
            [method]
            name = "pufferfish"
            ranks = 0.25
        """
        return cls.from_mapping(_read_toml(path))

    def as_dict(self) -> dict[str, Any]:
        """Plain values that JSON and `from_mapping` understand."""
        return {**dataclasses.asdict(self), "method_options": dict(self.method_options)}

    def difference(self, other: Recipe) -> dict[str, tuple[Any, Any]]:
        """Fields that change the result: name -> (value here, value there)."""
        mine, theirs = self.as_dict(), other.as_dict()
        names = [name for name in mine if name not in FREE]
        return {n: (mine[n], theirs[n]) for n in names if mine[n] != theirs[n]}


def _read_toml(path: str | Path) -> dict[str, Any]:
    """The content of a recipe file, unchecked, without what it says about itself."""
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise OptionError(f"recipe {path} cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise OptionError(f"recipe {path} is no TOML file: {error}") from error
    content.pop("about", None)
    return content
