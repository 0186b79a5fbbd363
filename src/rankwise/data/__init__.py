"""The data sets that a recipe can name; they know nothing of rank."""

from rankwise.data.chosen import limited
from rankwise.data.images.augment import AUGMENTS
from rankwise.data.images.splits import Split, Splits
from rankwise.data.images.stream import Streamed, StreamedSplits
from rankwise.data.parts import IGNORED, DataSet, Examples, Inputs
from rankwise.data.reading import batches, example, read, released, steps_per_epoch
from rankwise.data.registry import DATA, Source, is_pairs, is_stream, is_text, load
from rankwise.data.texts.pairs import PairSplit, PairSplits, load_pairs
from rankwise.data.texts.passing import PassingSplit, PassingSplits, load_stream
from rankwise.data.texts.text import TextSplit, TextSplits, load_text

__all__ = [
    "AUGMENTS",
    "DATA",
    "IGNORED",
    "DataSet",
    "Examples",
    "Inputs",
    "PairSplit",
    "PairSplits",
    "PassingSplit",
    "PassingSplits",
    "Source",
    "Split",
    "Splits",
    "Streamed",
    "StreamedSplits",
    "TextSplit",
    "TextSplits",
    "batches",
    "example",
    "is_pairs",
    "is_stream",
    "is_text",
    "limited",
    "load",
    "load_pairs",
    "load_stream",
    "load_text",
    "read",
    "released",
    "steps_per_epoch",
]
