"""C++ sources of this package, compiled on this machine when they are first needed.

They are plain C++ without torch's headers, so a compile takes a second, and it is kept on the disk
under $XDG_CACHE_HOME/rankwise or ~/.cache/rankwise, for each source and kind of processor. What is
there but not whole, or does not load here, is compiled again. Whoever needs one has another way to
do the same: without a compiler (`$CXX`, else c++, g++ or clang++) there is none, and neither with
`RANKWISE_CPP=0` in the environment.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from rankwise.cache_home import cache_home

logger = logging.getLogger(__name__)

# By what torch itself runs on here. Not -march=native: a home may be shared by other processors.
FLAGS = {
    "AVX512": ("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mavx2", "-mfma"),
    "AVX2": ("-mavx2", "-mfma"),
}
OPTIONS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fPIC")
# With OpenMP where it is torch's own: its functions are looked up among what torch has loaded, so
# that there is one pool of threads. Else on one thread.
THREADS = (("-fopenmp",), ())
PATIENCE = 20.0  # seconds


def load(source: Path) -> ctypes.CDLL | None:
    """The compiled source; None where it cannot be compiled, which costs a warning if one tried."""
    capability = torch.backends.cpu.get_cpu_capability()
    if os.environ.get("RANKWISE_CPP") == "0" or capability not in FLAGS:
        return None
    return _load(source, capability)


@cache
def _load(source: Path, capability: str) -> ctypes.CDLL | None:
    said = ""
    for threads in THREADS:
        options = (*OPTIONS, *FLAGS[capability], *threads)
        key = hashlib.sha256(source.read_bytes() + " ".join(options).encode()).hexdigest()[:16]
        try:
            kept = _directory() / f"{source.stem}-{key}.so"
            if (library := _whole(kept)) is not None:
                return library
            compiler = _compiler()
            return None if compiler is None else _compile(compiler, options, source, kept)
        except subprocess.TimeoutExpired as error:
            said = str(error)
            break  # it would take as long without threads
        except (OSError, subprocess.SubprocessError) as error:
            said = getattr(error, "stderr", None) or str(error)
    logger.warning(
        "%s could not be compiled and is done without, more slowly (RANKWISE_CPP=0 does not "
        "try): %s",
        source.name,
        said.strip()[:500],
    )
    return None


def _whole(kept: Path) -> ctypes.CDLL | None:
    """What was kept. Its sum is behind it: to load what was cut off can end the process."""
    try:
        content = kept.read_bytes()
        return ctypes.CDLL(str(kept)) if content[-32:] == _sum(content[:-32]) else None
    except OSError:  # not there, or of another system
        return None


def _sum(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _compile(
    compiler: Sequence[str], options: Sequence[str], source: Path, kept: Path
) -> ctypes.CDLL:
    """Compile beside the place and move there in one step: others may be doing the same."""
    with tempfile.TemporaryDirectory(dir=kept.parent) as place:
        made, part = Path(place) / kept.name, Path(place) / "part.o"
        for command in (
            [*compiler, *options, "-c", "-o", str(part), str(source)],
            [*compiler, "-shared", "-o", str(made), str(part)],  # without OpenMP: torch's is taken
        ):
            # What it says may be in any encoding.
            how: dict[str, Any] = {"capture_output": True, "text": True, "errors": "replace"}
            subprocess.run(command, check=True, timeout=PATIENCE, **how)
        library = ctypes.CDLL(str(made))  # loads before it is kept
        with made.open("ab") as file:
            file.write(_sum(made.read_bytes()))
        made.replace(kept)
    return library


def _compiler() -> list[str] | None:
    """As the words of a command: `$CXX` may be "ccache g++", or a path with spaces."""
    named = os.environ.get("CXX", "").strip()
    candidates = ([named], named.split()) if named else (["c++"], ["g++"], ["clang++"])
    return next(
        ([found, *rest] for name, *rest in candidates if (found := shutil.which(name))), None
    )


def _directory() -> Path:
    """Where libraries are kept; a passing one where the home cannot be written."""
    try:
        place = cache_home()
        place.mkdir(parents=True, exist_ok=True)
        if os.access(place, os.W_OK):
            return place
    except (OSError, RuntimeError):  # the second where there is no home
        pass
    return Path(_passing_directory().name)


@cache
def _passing_directory() -> tempfile.TemporaryDirectory[str]:
    """Removed when the process ends."""
    return tempfile.TemporaryDirectory(prefix="rankwise-", ignore_cleanup_errors=True)
