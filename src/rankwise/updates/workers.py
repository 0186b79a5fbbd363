"""One head for each data-parallel worker (2402.16828): trained apart, exchanged at merges alone.

N: workers. Between two merges nothing is sent; at a merge every worker sends its factors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel

from rankwise import distributed
from rankwise.errors import LifeCycleError
from rankwise.layers import AdaptedLayer
from rankwise.layers.adapted import sum_of_products
from rankwise.updates.merging import merge_

AVERAGED = (
    "every worker trains a head of its own on its own examples, but the model is wrapped in "
    "DistributedDataParallel, which would make all heads worker 0's and average their gradients; "
    "pass no such wrap to rankwise.start and call run.model itself; in the Trainer of transformers "
    "call rankwise.integrations.huggingface.train_apart(trainer), in Lightning's give "
    "strategy=rankwise.integrations.lightning.Apart()"
)


class WorkerHeads:
    """The heads of all workers: which of them is here, and what of each is in W already.

    Args:
        model: the bare model.
        layers: name -> adapted layer with one head, this worker's. Without anchors what it
            learned since the last merge is all there is, and the caller lets it begin again.

    Attributes:
        sent: bytes that this worker has given to exchanges at merges.
    """

    def __init__(self, model: nn.Module, layers: Mapping[str, AdaptedLayer]) -> None:
        self.model, self.layers, self.sent = model, layers, 0
        self._workers = distributed.workers()
        heads = [p for layer in layers.values() for p in layer.heads.parameters()]
        self._own = list(dict.fromkeys(heads))
        self._place = {p: i for i, p in enumerate(self._own)}
        # What was merged last follows from the anchors, so a checkpoint need not repeat it.
        anchors: dict[Parameter, Tensor] = {}
        for layer in layers.values():
            if layer.merged is not None:
                pairs = zip(layer.heads.parameters(), layer.merged.parameters(), strict=True)
                anchors.update(pairs)
        self._anchored = bool(anchors)
        self._merged = distributed.gather_tensors(anchors[p] for p in self._own if anchors)
        self._known = self._buffers()
        self._watch = model.register_forward_pre_hook(_refuse_averaging)

    def release(self) -> None:
        """Watch the model's forward no longer."""
        self._watch.remove()

    @torch.no_grad()
    def clear(self) -> None:
        """Behind the last merge: nothing of this worker's head is left to add, not a rounding."""
        for layer in self.layers.values():
            for factor in (*layer.heads.parameters(), *(layer.merged or layer.heads).parameters()):
                factor.zero_()

    @torch.no_grad()
    def merge(self, step: int, generator: torch.Generator, rounding: str) -> None:
        """W += mean over workers of s (U_n V_n - U_n' V_n'), by the same sums on all of them.

        A collective. What else learned becomes its mean, as do floating-point buffers that were
        written since the last merge; other such buffers become worker 0's.

        Raises:
            LifeCycleError: there were not as many workers when their heads were opened.
            WorkersDisagreeError: workers are at different steps, or wrote other buffers.
        """
        if distributed.workers() != self._workers:
            raise LifeCycleError(
                f"{distributed.workers()} workers merge their heads, but {self._workers} began the "
                "run, so heads are not where each worker looks for them; join the process group, "
                "by rankwise.distributed.initialize() under torchrun, before rankwise.start"
            )
        now = self._buffers()
        written = [n for n, state in now.items() if state is None or state != self._known.get(n)]
        distributed.agree(f"{step} {written}", "the step of a merge, and the buffers written")
        everyone = distributed.gather_tensors(self._own)
        self.sent += sum(p.nbytes for p in self._own)

        def update(name: str) -> Tensor:
            layer = self.layers[name]
            terms = [(head, 1.0) for head in self._of_all(layer, everyone)]
            if self._anchored:
                terms += [(head, -1.0) for head in self._of_all(layer, self._merged)]
            return sum_of_products(terms).mul_(layer.scale / len(everyone))

        merge_(self.layers, generator, rounding=rounding, update_of=update)
        for layer in self.layers.values():
            layer.anchor_()
        self._merged = everyone if self._anchored else []
        if distributed.workers() > 1:
            self._average_others([self.model.get_buffer(name) for name in written])
        self._known = self._buffers()

    def _of_all(self, layer: AdaptedLayer, factors: list[list[Tensor]]) -> Iterator[nn.Module]:
        """Every worker's head of a layer."""
        places = [self._place[p] for p in layer.heads.parameters()]
        for values in factors:
            head = copy.deepcopy(layer.heads[0])
            for parameter, place in zip(head.parameters(), places, strict=True):
                parameter.data = values[place]
            yield head

    def _average_others(self, buffers: list[Tensor]) -> None:
        others = [
            p.data for p in self.model.parameters() if p.requires_grad and p not in self._place
        ]
        # In float64 the mean of equal numbers is that number.
        averaged = [b for b in buffers if b.is_floating_point()]
        sums = [b.to(torch.float64, copy=True) for b in averaged]
        sums += [p.to(torch.promote_types(p.dtype, torch.float32), copy=True) for p in others]
        distributed.sum_(sums)
        for tensor, total in zip([*averaged, *others], sums, strict=True):
            tensor.copy_(total / distributed.workers())
        self.sent += sum(t.nbytes for t in sums)
        distributed.broadcast_(b for b in buffers if not b.is_floating_point())

    def _buffers(self) -> dict[str, tuple[int, int] | None]:
        """What tells that a buffer was not written, so that constants need not travel.

        None for running statistics: their kernels write without saying so.
        """
        return {
            f"{name}.{key}" if name else key: None
            if b.is_inference() or isinstance(module, _NormBase)
            else (id(b), b._version)
            for name, module in self.model.named_modules()
            for key, b in module.named_buffers(recurse=False)
        }


def _refuse_averaging(*_: object) -> None:
    if getattr(DistributedDataParallel, "_active_ddp_module", None) is not None:
        raise LifeCycleError(AVERAGED)
