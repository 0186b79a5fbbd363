"""A process that decodes images: requests on standard input, pixels on standard output.

The first line is the path of the tree. Then every line is a request in JSON: `how` (the fields of
`How`), `names` and `drawn` (random numbers of each image, or null). Each name is answered by a byte
(0: pixels, 1: a message), the length in four bytes, the lowest first, and the content. The process
ends when its input does, so with the one that started it, however that ends.
"""

from __future__ import annotations

import json
import os
import struct
import sys
from typing import BinaryIO

import numpy as np

from rankwise.errors import DataError
from rankwise.images.tree import Tree, open_tree
from rankwise.images.variation import How, picture

ANSWER = struct.Struct("<BI")
PIXELS, MESSAGE = 0, 1


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer every request, to the end of the input."""
    tree = open_tree(json.loads(requests.readline()))
    for line in requests:
        request = json.loads(line)
        how = How(**request["how"])
        for number, name in enumerate(request["names"]):
            drawn = request["drawn"] and np.array(request["drawn"][number])
            kind, content = _answer(tree, name, how, drawn)
            answers.write(ANSWER.pack(kind, len(content)))
            answers.write(content)
        answers.flush()


def _answer(tree: Tree, name: str, how: How, drawn: np.ndarray | None) -> tuple[int, bytes]:
    try:
        return PIXELS, picture(tree, name, how, drawn).tobytes()
    except DataError as error:
        return MESSAGE, str(error).encode()
    except Exception as error:
        # Whatever a decoder raises at a strange file: the run is told which file it was. A process
        # that ended instead would leave it to wait for pixels, and not know the name.
        return MESSAGE, f"{name} cannot be decoded: {type(error).__name__}: {error}".encode()


if __name__ == "__main__":
    try:
        serve(sys.stdin.buffer, sys.stdout.buffer)
    except BrokenPipeError:
        os._exit(0)  # nobody listens any more; Python's own flush at the end would complain
