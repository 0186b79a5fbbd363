"""Data-parallel workers: who they are, wrapping and unwrapping, and checks that they agree.

Every function is a collective unless it says otherwise: all workers call it, in the same order.
Without a process group there is one worker and everything is a no-op. Models whose parameters
are DTensors (FSDP2, tensor parallel) are left alone here; `rankwise.start` takes them for methods
of low-rank gradients only.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from rankwise.errors import LifeCycleError, WorkersDisagreeError
from rankwise.handle import ModelHandle

T = TypeVar("T")

# One flat copy of this many bytes is alive while tensors are broadcast.
_BUCKET_BYTES = 64 * 2**20


def _active() -> bool:
    return dist.is_available() and dist.is_initialized()


def worker() -> int:
    """Number of this worker, from 0; not a collective."""
    return dist.get_rank() if _active() else 0


def workers() -> int:
    """How many workers train together; not a collective."""
    return dist.get_world_size() if _active() else 1


def initialize() -> torch.device:
    """Join the process group that torchrun's environment describes; the device of this worker.

    CUDA when there is any, one device per worker, with NCCL for its tensors and gloo for those
    of the CPU; otherwise the CPU with gloo. Outside torchrun nothing is joined.

    Raises:
        LifeCycleError: torchrun's variables are incomplete, or there are fewer devices than
            workers on this machine.
    """
    cuda = torch.cuda.is_available()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return torch.device("cuda" if cuda else "cpu")
    missing = [v for v in ("RANK", "MASTER_ADDR", "MASTER_PORT") if v not in os.environ]
    if missing:
        raise LifeCycleError(
            f"WORLD_SIZE={os.environ['WORLD_SIZE']} asks for several workers, but "
            f"{', '.join(missing)} is not set; start them with torchrun --nproc-per-node N"
        )
    device = torch.device("cpu")
    if cuda:
        local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        if local >= torch.cuda.device_count():
            raise LifeCycleError(
                f"worker {os.environ['RANK']} is number {local} on this machine, which has "
                f"{torch.cuda.device_count()} CUDA device(s); lower --nproc-per-node, or hide the "
                "devices with CUDA_VISIBLE_DEVICES= to train on the CPU"
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if not _active():
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    return device


def shutdown() -> None:
    """Leave the process group, if there is one."""
    if _active():
        dist.destroy_process_group()


def wrap(model: nn.Module, *, compile: bool = False) -> nn.Module:
    """The model under DistributedDataParallel when there are several workers, then compiled.

    A model without trainable parameters that DDP is to reduce is not put under it: it would refuse.

    Args:
        model: a bare model, already on this worker's device.
        compile: apply torch.compile, outermost.
    """
    ignored = set(getattr(model, "_ddp_params_and_buffers_to_ignore", ()))  # projected gradients
    trained = [p for n, p in model.named_parameters() if p.requires_grad and n not in ignored]
    if workers() > 1 and trained:
        devices = {p.device for p in trained}
        # DDP wants no device_ids for a CPU model or one spread over several devices.
        on_one_gpu = len(devices) == 1 and trained[0].is_cuda
        model = DistributedDataParallel(model, device_ids=list(devices) if on_one_gpu else None)
    return torch.compile(model) if compile else model  # pyright: ignore[reportReturnType]


def bare(model: Any) -> nn.Module:
    """The model inside DDP, DataParallel, torch.compile and `run.model`; not a collective."""
    if isinstance(model, ModelHandle):
        model = model._bare
    while True:
        # Asking the compiled wrapper by its child keeps torch's compiler, slow to load, unloaded.
        compiled = model._modules.get("_orig_mod")
        if compiled is not None:
            model = compiled
        elif isinstance(model, (DistributedDataParallel, DataParallel)):
            model = model.module
        else:
            return model


def averages_gradients(model: Any) -> bool:
    """Whether there is a DistributedDataParallel among a model's wrappers; not a collective."""
    inner = model._current if isinstance(model, ModelHandle) else model
    compiled = inner._modules.get("_orig_mod") if isinstance(inner, nn.Module) else None
    return isinstance(inner if compiled is None else compiled, DistributedDataParallel)


def gather(value: T) -> list[T]:
    """Every worker's value, in the order of workers; small picklable values only."""
    if workers() == 1:
        return [value]
    values: list[Any] = [None] * workers()
    dist.all_gather_object(values, value)
    return values


def share(value: T) -> T:
    """Worker 0's value, on every worker; small picklable values only."""
    if workers() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def agree(value: str, what: str) -> None:
    """Check that all workers hold the same string.

    Args:
        value: the string; only its hash travels unless workers differ.
        what: what it is, for the message.

    Raises:
        WorkersDisagreeError: on every worker, with the values around their first difference.
    """
    hashes = gather(hashlib.sha256(value.encode()).hexdigest())
    other = next((i for i, h in enumerate(hashes) if h != hashes[0]), None)
    if other is None:
        return
    values = gather(value)
    pairs = enumerate(zip(values[0], values[other], strict=False))
    shorter = min(len(values[0]), len(values[other]))
    start = next((i for i, (a, b) in pairs if a != b), shorter)
    raise WorkersDisagreeError(
        f"workers disagree about {what}: worker 0 has {_around(values[0], start)}, worker {other} "
        f"has {_around(values[other], start)}; build model and methods alike on all workers, "
        "with the same seed and options"
    )


def _around(text: str, start: int, width: int = 60) -> str:
    first = max(0, start - width // 3)
    head, tail = "..." if first else "", "..." if first + width < len(text) else ""
    return repr(head + text[first : first + width] + tail)


def _agree_on_shapes(tensors: Sequence[Tensor]) -> None:
    shapes = "; ".join(f"{tuple(t.shape)} {t.dtype}" for t in tensors)
    agree(shapes, f"the shapes of the {len(tensors)} tensors to share")


@torch.no_grad()
def broadcast_(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors by worker 0's, in place; any dtype, also non-contiguous ones.

    Args:
        tensors: as many, of the same shapes and dtypes, on every worker.

    Raises:
        WorkersDisagreeError: shapes or dtypes differ between workers.
    """
    tensors = list(tensors)
    if workers() == 1:
        return
    _agree_on_shapes(tensors)
    for bucket in _buckets(tensors):
        flat = torch.cat([t.reshape(-1) for t in bucket])
        # As bytes, because gloo knows neither bool nor complex numbers.
        travelling = flat.view(torch.uint8).to(_device_for(flat))
        dist.broadcast(travelling, src=0)
        flat = travelling.to(flat.device).view(flat.dtype)
        for tensor, values in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(values.view(tensor.shape))


def sum_(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors by their sums over workers, in place.

    Args:
        tensors: as many, of the same shapes and dtypes, on every worker.
    """
    if workers() == 1:
        return
    for bucket in _buckets(tensors):
        flat = torch.cat([t.reshape(-1) for t in bucket])
        total = flat.to(_device_for(flat))
        dist.all_reduce(total)
        parts = total.to(flat.device).split([t.numel() for t in bucket])
        for tensor, values in zip(bucket, parts, strict=True):
            tensor.copy_(values.view(tensor.shape))


@torch.no_grad()
def gather_tensors(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Copies of every worker's tensors, in the order of workers.

    Args:
        tensors: as many, of the same shapes and dtypes, on every worker.

    Raises:
        WorkersDisagreeError: shapes or dtypes differ between workers.
    """
    tensors = list(tensors)
    if workers() == 1:
        return [[t.detach().clone() for t in tensors]]
    _agree_on_shapes(tensors)
    copies = [[torch.empty_like(t) for t in tensors] for _ in range(workers())]
    place = {id(t): i for i, t in enumerate(tensors)}
    for bucket in _buckets(tensors):
        flat = torch.cat([t.reshape(-1) for t in bucket])
        travelling = flat.view(torch.uint8).to(_device_for(flat))
        arrived = [torch.empty_like(travelling) for _ in range(workers())]
        dist.all_gather(arrived, travelling)
        for own, values in zip(copies, arrived, strict=True):
            parts = values.to(flat.device).view(flat.dtype).split([t.numel() for t in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                own[place[id(tensor)]].copy_(part.view(tensor.shape))
    return copies


def collect(value: T) -> list[T]:
    """Every worker's value on worker 0, in the order of workers; nothing on the others.

    Values travel pickled, between the workers of a group alone.
    """
    if workers() == 1:
        return [value]
    values: list[Any] | None = [None] * workers() if worker() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values or []


def broadcast_parameters(
    parameters: Iterable[Tensor], state: Mapping[Any, Mapping[str, Any]]
) -> None:
    """Overwrite parameters, and what an optimizer keeps of them, by worker 0's.

    Sharded ones are left alone: every worker holds its own part.
    """
    held = [p for p in parameters if not hasattr(p, "placements")]
    states = [value for p in held for value in state.get(p, {}).values()]
    broadcast_([p.data for p in held] + [t for t in states if isinstance(t, Tensor)])


def broadcast_buffers(model: nn.Module) -> None:
    """Give all workers worker 0's buffers: running statistics, masks, counters."""
    broadcast_(bare(model).buffers())


def _buckets(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    full: list[list[Tensor]] = []
    open_: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() == 0:
            continue
        bucket = open_.setdefault((tensor.dtype, tensor.device), [])
        bucket.append(tensor)
        if sum(t.nbytes for t in bucket) >= _BUCKET_BYTES:
            full.append(open_.pop((tensor.dtype, tensor.device)))
    return full + list(open_.values())


def _device_for(tensor: Tensor) -> torch.device:
    """Where the group can send this tensor from: a group of NCCL alone knows no CPU tensors."""
    served = {pair.split(":")[0] for pair in dist.get_backend_config().split(",")}
    if tensor.device.type in served:
        return tensor.device
    return torch.device("cpu") if "cpu" in served else torch.device("cuda")


@torch.no_grad()
def compare_gradients(
    named: Iterable[tuple[str, Tensor | None]], *, tolerance: float = 1e-5
) -> None:
    """Check that gradients are the same on all workers, as they are once DDP has reduced them.

    Norms are compared, in one small message. Values that are not finite on all workers agree.

    Args:
        named: parameter name and its gradient, or None where it has none.
        tolerance: largest relative difference of two norms that still counts as equal.

    Raises:
        WorkersDisagreeError: on every worker, naming the parameters and their norms.
    """
    if workers() == 1:
        return
    named = list(named)
    agree("\n".join(name for name, _ in named), "the names of parameters")
    mine = torch.tensor(
        [_norm(gradient) for _, gradient in named], dtype=torch.float64, device="cpu"
    )
    mine = mine.to(_device_for(mine))
    everyone = [torch.empty_like(mine) for _ in range(workers())]
    dist.all_gather(everyone, mine)
    norms = torch.stack(everyone).T.tolist()
    wrong = {
        name: per_worker
        for (name, _), per_worker in zip(named, norms, strict=True)
        if any(not math.isclose(n, per_worker[0], rel_tol=tolerance) for n in per_worker)
    }
    if wrong:
        raise WorkersDisagreeError(_unreduced(wrong))


def _norm(gradient: Tensor | None) -> float:
    if gradient is None:
        return -1.0
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    norm = float(torch.linalg.vector_norm(values, dtype=wide))
    return norm if math.isfinite(norm) else math.inf


def _unreduced(wrong: dict[str, Sequence[float]]) -> str:
    name, norms = next(iter(wrong.items()))
    shown = ", ".join("none" if n < 0 else f"{n:.6g}" for n in norms[:8])
    others = f" and {len(wrong) - 1} more parameter(s)" if len(wrong) > 1 else ""
    return (
        f"gradients differ between workers: {name}{others}, norms {shown} on workers 0 ... "
        f"{len(norms) - 1}; a DistributedDataParallel made before the structure changed no longer "
        "reduces the gradients of new parameters: pass rankwise.start(..., "
        "wrap=rankwise.distributed.wrap), or wrap the model again after every switch"
    )


def mean(value: float) -> float:
    """The mean of a number over workers."""
    if workers() == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device="cpu")
    total = total.to(_device_for(total))
    dist.all_reduce(total)
    return float(total) / workers()
