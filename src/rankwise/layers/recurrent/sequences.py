"""How sequences lie in memory: time first inside, whatever was given. T: steps, B: batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


@dataclass(frozen=True, eq=False)
class Layout:
    """Sequences of one length, or of several: from (T, B, N) to what was given and back.

    Sequences of several lengths are run side by side, padded at their end, the longest first.

    Attributes:
        batched: False for one sequence without a dimension for the batch.
        batch_first: given and returned as (B, T, N).
        packed: what was given packed, else None.
        batch_sizes: of a packed sequence, how many sequences have each step; else empty.
        index: of each packed row its place in (T B); None if not packed.
        mirror: of each place the place it goes to when every sequence is turned round.
    """

    batched: bool = True
    batch_first: bool = False
    packed: PackedSequence | None = field(default=None, repr=False)
    batch_sizes: tuple[int, ...] = ()
    index: Tensor | None = field(default=None, repr=False)
    mirror: Tensor | None = field(default=None, repr=False)

    @classmethod
    def of(cls, x: Tensor | PackedSequence, batch_first: bool) -> Layout:
        """How an input of a recurrent layer lies."""
        if not isinstance(x, PackedSequence):
            return cls(batched=x.dim() == 3, batch_first=batch_first)
        device, sizes = x.data.device, x.batch_sizes
        batch = int(sizes[0])
        valid = torch.arange(batch, device="cpu")[None] < sizes[:, None]  # (T, B)
        lengths, steps = valid.sum(0), torch.arange(len(sizes), device="cpu")[:, None]
        turned = torch.where(valid, lengths[None] - 1 - steps, steps)
        mirror = (turned * batch + torch.arange(batch, device="cpu")[None]).flatten().to(device)
        index = valid.flatten().nonzero()[:, 0].to(device)
        return cls(True, batch_first, x, tuple(sizes.tolist()), index, mirror)

    def steps(self, x: Tensor | PackedSequence) -> Tensor:
        """What was given as (T, B, N)."""
        if isinstance(x, PackedSequence):
            return self.unpack(x.data)
        if not self.batched:
            return x[:, None]
        return x.transpose(0, 1) if self.batch_first else x

    def given(self, y: Tensor) -> Tensor | PackedSequence:
        """(T, B, N) in the form of what was given."""
        if self.packed is not None:
            return self.packed._replace(data=self.pack(y))
        if not self.batched:
            return y[:, 0]
        return y.transpose(0, 1) if self.batch_first else y

    def pack(self, y: Tensor) -> Tensor:
        """The rows of (T, B, N) that belong to sequences, as a packed sequence has them."""
        return y if self.index is None else y.flatten(0, 1).index_select(0, self.index)

    def unpack(self, rows: Tensor) -> Tensor:
        """The inverse of `pack`; zeros behind the ends."""
        if self.index is None:
            return rows
        size = (len(self.batch_sizes), self.batch_sizes[0])
        padded = rows.new_zeros(size[0] * size[1], rows.shape[1])
        return padded.index_copy(0, self.index, rows).unflatten(0, size)

    def turn(self, x: Tensor) -> Tensor:
        """(T, B, N) with the steps of every sequence in reverse order."""
        if self.mirror is None:
            return x.flip(0)
        return x.flatten(0, 1).index_select(0, self.mirror).view_as(x)

    def last(self, y: Tensor, reverse: bool) -> Tensor:
        """(B, N) of (T, B, N): what each sequence ends with in the direction it was run."""
        if reverse:
            return y[0]
        if self.mirror is None:
            return y[-1]
        return y.flatten(0, 1).index_select(0, self.mirror[: y.shape[1]])

    def sort(self, states: tuple[Tensor, ...], *, back: bool = False) -> tuple[Tensor, ...]:
        """States (.., B, N) in the order of the packed sequences, or back in the given one."""
        if self.packed is None:
            return states
        order = self.packed.unsorted_indices if back else self.packed.sorted_indices
        return states if order is None else tuple(s.index_select(-2, order) for s in states)
