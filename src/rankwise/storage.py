"""Verified directories on a disk: tensors and plain data, written atomically, never executed.

    step-00000123/
      model.safetensors   tensors, each once; other names of one are in the file's metadata
      state.pt            plain data: what torch.load(weights_only=True) can load
      meta.json           format, versions, what the caller says, sizes and SHA-256 of the others

A crash or a full disk at any moment leaves every earlier directory whole: a new one is written
beside them, flushed to the disk, then renamed. What a checkpoint means is `checkpoint`'s concern.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import pickle
import re
import shutil
import uuid
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import Parameter

from rankwise.errors import CheckpointError

logger = logging.getLogger(__name__)

MODEL, STATE, META = "model.safetensors", "state.pt", "meta.json"
FORMAT, VERSION = "rankwise-checkpoint", 1

# While a directory replaces another one of the same step, the other is called `.old`.
_NAME = re.compile(r"step-(\d{8,})(\.old)?")
_SCRATCH = ".rankwise-"
_FLOATS = {torch.float64, torch.float32, torch.float16, torch.bfloat16}
_WHOLE = {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool}
# Not bytes: empty ones do not load with weights_only.
_PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.Size)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FORBIDDEN = {errno.EACCES, errno.EPERM, errno.EROFS}
# What torch and pickle raise on bytes that are no file of theirs; checksums come first, so only
# a file that somebody made on purpose gets this far.
_UNREADABLE = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError)


def name_of(step: int) -> str:
    """The directory's name for a step: step-00000123."""
    return f"step-{step:08d}"


def is_step(path: Path) -> bool:
    """Whether the path is named like a step directory."""
    return _NAME.fullmatch(path.name) is not None


def present(directory: Path) -> list[Path]:
    """Step directories inside, newest first; one that was being replaced counts if alone."""
    found = [
        (int(match[1]), match[2] is None, path)
        for path in directory.iterdir()
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for *_, path in sorted(found, reverse=True)]


def write(
    final: Path, weights: Mapping[str, Any], state: Mapping[str, Any], meta: Mapping[str, Any]
) -> None:
    """Write one step directory: wholly, or not at all.

    Args:
        final: the directory to appear; one of the same name is replaced.
        weights: a model's state dict.
        state: plain data: tensors, numbers, strings, tuples, lists, dicts.
        meta: JSON-able, without the keys "format", "version", "files", "digest".

    Raises:
        CheckpointError: disk full, not permitted, or data that is not plain.
    """
    tensors, aliases, others = _storable(weights)
    content = {**state, "weights": others}
    needed = sum(t.nbytes for t in tensors.values())
    needed += sum(_require_plain(part, name) for name, part in content.items())
    scratch = final.parent / f"{_SCRATCH}{uuid.uuid4().hex}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        for left in final.parent.glob(f"{_SCRATCH}*"):
            shutil.rmtree(left, ignore_errors=True)
        scratch.mkdir()
        _write_model(scratch / MODEL, tensors, aliases)
        _write_state(scratch / STATE, content)
        # safetensors makes its file readable by the owner alone, whatever the umask says.
        (scratch / MODEL).chmod((scratch / STATE).stat().st_mode)
        _write_meta(scratch, meta)
        for path in (*sorted(scratch.iterdir()), scratch):
            _flush(path)
        _install(scratch, final)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:
        cause = _os_error(error)
        if cause is None:
            raise
        raise CheckpointError(_why_not_written(final, cause, needed)) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_model(file: Path, tensors: dict[str, Tensor], aliases: dict[str, str]) -> None:
    metadata = {"format": "pt", "aliases": json.dumps(aliases)}
    safetensors.torch.save_file(tensors, file, metadata=metadata)


def _write_state(file: Path, content: dict[str, Any]) -> None:
    # Through a stream of ours: torch's own writer hides that a disk is full.
    with file.open("wb") as stream:
        torch.save(content, stream)


def _write_meta(directory: Path, meta: Mapping[str, Any]) -> None:
    files = {
        name: {"bytes": (directory / name).stat().st_size, "sha256": _sha256(directory / name)}
        for name in (MODEL, STATE)
    }
    whole = {"format": FORMAT, "version": VERSION, **meta, "files": files}
    text = json.dumps({**whole, "digest": _digest(whole)}, indent=1)
    (directory / META).write_text(text + "\n", encoding="utf-8")


def _storable(
    weights: Mapping[str, Any],
) -> tuple[dict[str, Tensor], dict[str, str], dict[str, Any]]:
    """Tensors for safetensors, further names of them, and what only state.pt can hold."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    others: dict[str, Any] = {}
    first: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, value in weights.items():
        known = isinstance(value, Tensor) and type(value) in (Tensor, Parameter)
        if not known or value.dtype not in _FLOATS | _WHOLE or value.layout != torch.strided:
            others[name] = value
            continue
        if value.is_meta:
            raise CheckpointError(f"{name} is on the meta device and holds no values to save")
        memory = (value.device, value.data_ptr(), value.shape, value.stride(), value.dtype)
        holder = first.setdefault(memory, name) if value.numel() else name
        if holder != name:
            aliases[name] = holder
            continue
        plain = value.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        # safetensors refuses memory that two tensors share; and only the part in use is copied.
        if storage.nbytes() != plain.nbytes or storage.data_ptr() in storages:
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        tensors[name] = plain
    return tensors, aliases, others


def _require_plain(value: Any, where: str) -> int:
    """The bytes of all tensors inside; raises on what weights_only=True would refuse to load."""
    exact: Any = type(value)  # a subclass would load only with its code
    if exact in (Tensor, Parameter) and not value.is_meta:
        return value.nbytes if value.layout == torch.strided else 0
    if exact in (dict, OrderedDict):
        for key in value:
            _require_plain(key, f"a key of {where}")
        return sum(_require_plain(inner, f"{where}[{key!r}]") for key, inner in value.items())
    if exact in (list, tuple):
        return sum(_require_plain(inner, f"{where}[{i}]") for i, inner in enumerate(value))
    if exact in _PLAIN:
        return 0
    kind = f"{exact.__module__}.{exact.__qualname__}"
    raise CheckpointError(
        f"{where} is a {kind}, which a checkpoint cannot hold: only tensors, numbers, strings, "
        "tuples, lists and dicts load without executing code; convert it (float(x), vars(x), "
        "x.tolist())"
    )


def _digest(meta: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in meta.items() if key != "digest"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _install(scratch: Path, final: Path) -> None:
    """Rename into place; if this step was saved before, one of the two is there at any moment."""
    if final.exists():
        aside = final.with_name(f"{final.name}.old")
        if aside.exists():
            shutil.rmtree(aside)
        final.rename(aside)
    scratch.rename(final)
    _flush(final.parent)


def prune(final: Path, keep: int) -> None:
    """Remove all step directories beside `final` but the `keep - 1` of the highest steps."""
    others = [path for path in present(final.parent) if path != final]
    replaced = [path for path in others if path.suffix and path.with_suffix("").exists()]
    rest = [path for path in others if path not in replaced]
    for path in replaced + rest[keep - 1 :]:
        # Renamed first, so that half a removal is not taken for a checkpoint.
        scratch = path.with_name(f"{_SCRATCH}{uuid.uuid4().hex}")
        try:
            shutil.rmtree(path.rename(scratch))
        except OSError as error:
            logger.warning("the old checkpoint %s could not be removed: %s", path, error)


def _os_error(error: BaseException | None) -> OSError | None:
    """The system's error behind a library's: torch chains it, safetensors only prints it."""
    while error is not None:
        if isinstance(error, OSError):
            return error
        if match := re.search(r"\(os error (\d+)\)", str(error)):
            return OSError(int(match[1]), os.strerror(int(match[1])))
        error = error.__cause__ or error.__context__
    return None


def _why_not_written(final: Path, error: OSError, needed: int) -> str:
    intact = "earlier checkpoints are whole"
    if error.errno in _FULL:
        free = shutil.disk_usage(final.parent).free
        return (
            f"{final} was not written: no space left ({error.strerror}); it needs about "
            f"{needed:,} bytes, {free:,} are free; {intact}; free some space, or save elsewhere"
        )
    if error.errno in _FORBIDDEN:
        return (
            f"{final} was not written: {error.strerror} ({error.filename or final.parent}); "
            f"{intact}; save to a directory that you may write to"
        )
    return f"{final} was not written: {error}; {intact}; save to a directory that is in order"


def verify(path: Path) -> dict[str, Any]:
    """The content of meta.json, once it and the sizes and checksums it states hold.

    Raises:
        CheckpointError: a file is missing, changed, foreign or of a newer format.
        OSError: a file cannot be read.
    """
    meta = _read_meta(path)
    for name in (MODEL, STATE):
        file, stated = path / name, meta["files"][name]
        if not file.is_file():
            raise CheckpointError(
                f"{path} is incomplete: {name} is missing; use another checkpoint"
            )
        size = file.stat().st_size
        if size != stated["bytes"]:
            raise CheckpointError(
                f"{file} is corrupt: {size:,} bytes, {stated['bytes']:,} were written (a copy that "
                "was cut short?); copy it again or use another checkpoint"
            )
        if _sha256(file) != stated["sha256"]:
            raise CheckpointError(
                f"{file} is corrupt: its SHA-256 is not the one in {META}, so some of it changed "
                "after it was written; copy it again or use another checkpoint"
            )
    return meta


def _read_meta(path: Path) -> dict[str, Any]:
    file = path / META
    try:
        meta = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path} is not a whole checkpoint: {META} is missing; use another checkpoint"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{file} is corrupt: {error}; use another checkpoint") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise CheckpointError(
            f"{file} is not of this library: its format is not {FORMAT!r}; give a directory that "
            "rankwise.save wrote"
        )
    if isinstance(meta.get("version"), int) and meta["version"] > VERSION:
        raise CheckpointError(
            f"{path} has format version {meta['version']}, written by rankwise "
            f"{meta.get('rankwise')}; this one reads up to {VERSION}: upgrade rankwise"
        )
    if meta.get("version") != VERSION or meta.get("digest") != _digest(meta):
        raise CheckpointError(
            f"{file} is corrupt: its own checksum does not hold; use another checkpoint"
        )
    return meta


def read(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Read a step directory back: meta, weights, state, with all tensors on the CPU.

    Raises:
        CheckpointError: missing, foreign, corrupt, of a newer format, or unsafe.
        OSError: a file cannot be read.
    """
    meta = verify(path)
    state = _read_state(path / STATE)
    return meta, {**_read_model(path / MODEL), **state.pop("weights")}, state


def _read_model(file: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(file, framework="pt", device="cpu") as reader:
            aliases: dict[str, str] = json.loads((reader.metadata() or {}).get("aliases", "{}"))
            weights = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118 -- no dict
        return weights | {alias: weights[holder] for alias, holder in aliases.items()}
    except (safetensors.SafetensorError, *_UNREADABLE) as error:
        raise CheckpointError(
            f"{file} is no safetensors file ({error}), although its checksum holds: it was "
            "replaced on purpose; refused, do not use this checkpoint"
        ) from error


def _read_state(file: Path) -> dict[str, Any]:
    try:
        with warnings.catch_warnings():
            # A pickle protocol torch does not write: it is refused below, a warning adds nothing.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        forbidden = re.search(r"GLOBAL (\S+)", str(error))
        raise CheckpointError(
            f"{file} holds objects that would execute code"
            + (f" ({forbidden[1]})" if forbidden else "")
            + ": refused, and nothing was executed; do not use this checkpoint, "
            "rankwise.save writes no such thing"
        ) from error
    except _UNREADABLE as error:
        raise CheckpointError(
            f"{file} is no archive of torch.save ({error}), although its checksum holds: it was "
            "replaced on purpose; refused, do not use this checkpoint"
        ) from error
    if not isinstance(state, dict) or not isinstance(state.get("weights"), dict):
        raise CheckpointError(f"{file} holds something else than rankwise.save writes: refused")
    return state
