"""Data-parallel means of projected gradients: R x max(M, N) numbers a matrix instead of M x N.

DistributedDataParallel is told to ignore the projected weights, whose reducer would hold a dense
bucket for them; what is held of their gradients is reduced here, in one flat message at the end
of every synchronised backward, before anybody unscales or clips.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rankwise import distributed

_IGNORED = "_ddp_params_and_buffers_to_ignore"


class WorkerMean:
    """Averages what is held of projected gradients over data-parallel workers.

    Attributes:
        sent: bytes of gradients that this worker has reduced so far.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: Mapping[str, nn.Parameter],
        held: Callable[[], Iterable[Tensor]],
    ) -> None:
        self.sent = 0
        self._model, self._held = model, held
        self._queued = False
        # Without any other parameter there is no wrapper, for DDP refuses to reduce nothing.
        projected = set(weights.values())
        self._unwrapped = all(p in projected for p in model.parameters() if p.requires_grad)
        self._synchronised = self._unwrapped
        everywhere = model.named_parameters(remove_duplicate=False)
        names = {name for name, p in everywhere if p in projected}
        self._ignored_before = getattr(model, _IGNORED, None)
        ignored = sorted({*(self._ignored_before or ()), *names})
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
        distributed.broadcast_([w.data for w in weights.values()])
        self._handles: list[Any] = [model.register_forward_pre_hook(self._on_forward)]
        self._handles += [
            w.register_post_accumulate_grad_hook(self._on_gradient) for w in weights.values()
        ]

    def release(self) -> None:
        """Leave the gradients alone, and give the weights back to wrappers made from now on."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            self._model, self._ignored_before or []
        )

    def _on_forward(self, *_: Any) -> None:
        # As the wrapper itself does: no_sync counts where the forward ran.
        wrapper = getattr(DistributedDataParallel, "_active_ddp_module", None)
        if self._unwrapped and wrapper is None:
            return
        self._synchronised = wrapper is not None and wrapper.require_backward_grad_sync

    def _on_gradient(self, _: Tensor) -> None:
        if self._synchronised and not self._queued:
            self._queued = True
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._reduce)

    @torch.no_grad()
    def _reduce(self) -> None:
        self._queued = False
        kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for tensor in self._held():
            kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        for tensors in kinds.values():
            flat = torch.cat([t.reshape(-1) for t in tensors])
            dist.all_reduce(flat)
            flat.div_(distributed.workers())
            self.sent += flat.nbytes
            for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.copy_(mean.view(tensor.shape))
