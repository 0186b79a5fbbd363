"""Recurrent layers that are open: every matrix is a layer of its own, dense or low-rank.

T: steps, B: batch, I: input_size, H: hidden_size, P: what the recurrence sees, proj_size or H,
G: gates, R: rank, D: directions.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from rankwise.errors import OptionError, PlanError
from rankwise.layers.base import LowRankLayer, check_rank
from rankwise.layers.linear import LowRankLinear
from rankwise.layers.recurrent.arguments import check_input, first_states
from rankwise.layers.recurrent.matrices import Encoded, Matrix, read
from rankwise.layers.recurrent.native import whole_stack
from rankwise.layers.recurrent.sequences import Layout
from rankwise.layers.recurrent.ways import LOOPS, choose, possible

Rank = int | None
Ranks = Rank | tuple[Rank, ...] | list[Any]
_NAME = re.compile(r"(weight|bias)_((?:ih|hh|hr)_l\d+(?:_reverse)?)")


class OpenRecurrent(nn.Module, ABC):
    """The function of nn.LSTM or nn.GRU, with matrices that are children: `ih_l0`, `hh_l0`, ...

    A child has torch's name for its matrix without `weight_`; it is an nn.Linear, or a
    LowRankLinear in its place, and owns torch's bias of that name. So whatever treats linear
    layers by name treats these. Children are read, not called: the product with the inputs is
    taken for many steps at once and the one with the hidden state inside a loop, so hooks on
    children do not run. In inference on the processor a layer keeps what it makes of its weights
    (`recurrent.kept`) until it is run with gradients: at most as much as its dense matrices.

    Attributes:
        recompute: keep no gates for backward but make them again: a quarter to a half of the
            memory for a tenth to a quarter more time. Layers with a low-rank recurrence then run
            in the loop, unless `way` says otherwise.
        way: how those are run, see `recurrent.ways`: "auto", or one of them wherever possible.
    """

    kind: ClassVar[str]
    dense_class: ClassVar[type[nn.Module]]
    gates: ClassVar[int]

    recompute: bool
    way: str

    def __init__(
        self,
        dense: Any,
        rank: Ranks,
        per_gate: bool,
        recompute: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        place = {"device": device or torch.get_default_device(), "dtype": dtype}
        self.input_size, self.hidden_size = dense.input_size, dense.hidden_size
        self.num_layers, self.bias, self.batch_first = (
            dense.num_layers,
            dense.bias,
            dense.batch_first,
        )
        self.dropout, self.bidirectional = dense.dropout, dense.bidirectional
        self.proj_size, self.recompute, self.way = dense.proj_size, recompute, "auto"
        for name, given in zip(self.matrices, self._ranks(rank), strict=True):
            rows, columns = self.matrix_shape(name)
            options = {"bias": self.bias and not name.startswith("hr"), **place}
            if given is None:
                child: Any = nn.utils.skip_init(nn.Linear, columns, rows, **options)
                child.gates = 1 if name.startswith("hr") else self.gates  # its rows are of so many
            else:
                blocks = self.gates if per_gate and not name.startswith("hr") else 1
                self._check_rank(name, given, blocks)
                options |= {"rank": given, "blocks": blocks}
                child = nn.utils.skip_init(LowRankLinear, columns, rows, **options)
            setattr(self, name, child)
        self.reset_parameters()

    @property
    def directions(self) -> int:
        """D: 2 if bidirectional."""
        return 2 if self.bidirectional else 1

    @property
    def matrices(self) -> tuple[str, ...]:
        """Names of the children, in the order in which a forward needs them."""
        kinds = ("ih", "hh", "hr") if self.proj_size else ("ih", "hh")
        return tuple(f"{kind}_{place}" for place in self._places() for kind in kinds)

    def _places(self) -> Iterator[str]:
        for layer in range(self.num_layers):
            for suffix in ("", "_reverse")[: self.directions]:
                yield f"l{layer}{suffix}"

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """Rows and columns of a child's weight."""
        rows, seen = self.gates * self.hidden_size, self.proj_size or self.hidden_size
        if name.startswith("hr"):
            return self.proj_size, self.hidden_size
        if name.startswith("hh"):
            return rows, seen
        first = name.removesuffix("_reverse") == "ih_l0"
        return rows, self.input_size if first else seen * self.directions

    def _ranks(self, rank: Ranks) -> Iterator[Rank]:
        """One rank for each of `matrices`."""
        layers = rank if isinstance(rank, list) else [rank] * self.num_layers
        if len(layers) != self.num_layers:
            raise OptionError(
                f"rank={rank}: a list gives one entry for each of {self.num_layers} layers, this "
                f"has {len(layers)}"
            )
        kinds = 3 if self.proj_size else 2
        for given in layers:
            each = given if isinstance(given, tuple) else (given, given)
            if not 2 <= len(each) <= kinds:
                raise OptionError(
                    f"rank={given}: a tuple is (of the input's matrix, of the recurrent one"
                    f"{', of the projection' if self.proj_size else ''}); None leaves one dense"
                )
            yield from ((*each, None)[:kinds] * self.directions)

    def _check_rank(self, name: str, rank: int, blocks: int) -> None:
        rows, columns = self.matrix_shape(name)
        try:
            check_rank(rank, (rows // blocks, columns), self.kind)
        except PlanError as error:
            kinds = "rank=(None, R) leaves the input's matrix dense" if name[0] == "i" else ""
            layers = "a list gives each layer its own" if self.num_layers > 1 else ""
            raise PlanError("; ".join(filter(None, (f"{name}: {error}", kinds, layers)))) from None

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """As torch: uniform within 1 / sqrt(H), and factors whose product has that variance."""
        bound = self.hidden_size**-0.5
        for place in self._places():
            ih, hh = getattr(self, f"ih_{place}"), getattr(self, f"hh_{place}")
            _draw(ih, bound)
            _draw(hh, bound)
            for child in (ih, hh) if self.bias else ():
                owner = child.u if isinstance(child, LowRankLayer) else child
                nn.init.uniform_(owner.bias, -bound, bound)
            if self.proj_size:
                _draw(getattr(self, f"hr_{place}"), bound)

    @classmethod
    def like(cls, dense: Any, device: torch.device | str = "meta") -> Self:
        """An open layer of a dense one's shape and dtype, all matrices dense, nothing copied."""
        options = {
            name: getattr(dense, name)
            for name in ("num_layers", "bias", "batch_first", "dropout", "bidirectional")
        }
        if dense.proj_size:
            options["proj_size"] = dense.proj_size
        dtype = dense.weight_ih_l0.dtype
        opened: Any = cls
        return opened(dense.input_size, dense.hidden_size, **options, device=device, dtype=dtype)

    @classmethod
    def of(cls, dense: Any) -> Self:
        """A dense layer opened: the children own its very parameters, nothing is copied."""
        opened = cls.like(dense)
        for name in opened.matrices:
            child = getattr(opened, name)
            child.weight = getattr(dense, f"weight_{name}")
            if child.bias is not None:
                child.bias = getattr(dense, f"bias_{name}")
        return opened.train(dense.training)

    @classmethod
    def from_dense(
        cls,
        dense: Any,
        rank: Ranks,
        *,
        init: str = "spectral",
        per_gate: bool = False,
        generator: torch.Generator | None = None,
    ) -> Self:
        """Factorise a dense layer; biases and matrices that stay dense are shared with it.

        Args:
            dense: nn.LSTM or nn.GRU.
            rank: as in the constructor.
            init: see `layers.initial`.
            per_gate: rank R for each gate's matrix instead of for the stacked one (2103.03936).
            generator: source of random numbers.

        Raises:
            PlanError: a rank that does not fit.
            OptionError: unknown `init`.
        """
        opened = cls.of(dense)
        for name, given in zip(opened.matrices, opened._ranks(rank), strict=True):
            if given is None:
                continue
            blocks = cls.gates if per_gate and not name.startswith("hr") else 1
            opened._check_rank(name, given, blocks)
            options: Any = {"init": init, "blocks": blocks, "generator": generator}
            setattr(opened, name, LowRankLinear.from_dense(getattr(opened, name), given, **options))
        return opened

    def close(self) -> Any:
        """The nn.LSTM or nn.GRU of the same function, with the very parameters of the children.

        Raises:
            PlanError: a child is low-rank; `to_dense` multiplies it out.
        """
        low_rank = [n for n in self.matrices if isinstance(getattr(self, n), LowRankLayer)]
        if low_rank:
            raise PlanError(f"{low_rank[0]} is low-rank; to_dense() multiplies it out")
        return self._closed({name: getattr(self, name) for name in self.matrices})

    def to_dense(self) -> Any:
        """The nn.LSTM or nn.GRU of the same function; low-rank children are multiplied out."""
        children = {name: getattr(self, name) for name in self.matrices}
        low_rank = {n: c.to_dense() for n, c in children.items() if isinstance(c, LowRankLayer)}
        return self._closed(children | low_rank)

    def _closed(self, children: dict[str, Any]) -> Any:
        options = {"proj_size": self.proj_size} if self.proj_size else {}
        closed: Any = self.dense_class(
            self.input_size,
            self.hidden_size,
            self.num_layers,
            self.bias,
            self.batch_first,
            self.dropout,
            self.bidirectional,
            **options,
            device="meta",
            dtype=children["ih_l0"].weight.dtype,
        )
        for name, child in children.items():
            setattr(closed, f"weight_{name}", child.weight)
            if child.bias is not None:
                setattr(closed, f"bias_{name}", child.bias)
        closed.flatten_parameters()
        return closed.train(self.training)

    def spec(self) -> dict[str, Any]:
        """Everything needed to open the layer of another copy of the model alike."""
        return {
            "kind": self.kind,
            "shape": [self.input_size, self.hidden_size, self.proj_size],
            "layers": self.num_layers,
            "bidirectional": self.bidirectional,
        }

    def __getattr__(self, name: str) -> Any:
        """torch's names of matrices and biases too: `weight_hh_l0` is the product, if low-rank."""
        found = _NAME.fullmatch(name)
        children = self.__dict__.get("_modules", {})
        if found is not None and found[2] in children:
            return getattr(children[found[2]], found[1])
        return super().__getattr__(name)

    @property
    def all_weights(self) -> list[list[Tensor]]:
        """As torch's: for each layer and direction, in its order; products where low-rank."""
        kinds = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if self.bias else [])]
        kinds += ["weight_hr"] if self.proj_size else []
        return [[getattr(self, f"{kind}_{place}") for kind in kinds] for place in self._places()]

    def flatten_parameters(self) -> None:
        """Nothing to do here; callers of nn.LSTM's find it."""

    def forward(
        self, input: Tensor | PackedSequence, hx: Any = None
    ) -> tuple[Tensor | PackedSequence, Any]:
        """As the dense layer's forward, with the same shapes and errors."""
        layout = Layout.of(input, self.batch_first)
        check_input(self, input)
        x = layout.steps(input)
        count = self.num_layers * self.directions
        shapes = [(count, x.shape[1], size) for size in self._state_sizes()]
        states = layout.sort(first_states(hx, x, shapes, batched=layout.batched))
        matrices = [read(getattr(self, n), self.gates, n) for n in self.matrices]
        if all(matrix.v is None for matrix in matrices):
            y, *last = self._all_native(x, states, layout)
        else:
            y, *last = self._stack(x, states, matrices, layout)
        last = layout.sort(tuple(last), back=True)
        last = last if layout.batched else tuple(state[:, 0] for state in last)
        return layout.given(y), self._handed_over(last)

    def _stack(
        self, x: Tensor, states: tuple[Tensor, ...], matrices: Sequence[Matrix], layout: Layout
    ) -> tuple[Tensor, ...]:
        """All layers and directions: (T, B, D P), then the last states (L D, B, ..)."""
        kinds = 3 if self.proj_size else 2
        groups = [matrices[i : i + kinds] for i in range(0, len(matrices), kinds)]
        last: list[tuple[Tensor, ...]] = []
        given: Any = x  # of the first layer; of the next ones what the one below hands on
        for layer in range(self.num_layers):
            outputs, dropped = [], bool(self.dropout and self.training)
            above = layer + 1 < self.num_layers and self.directions == 1 and not dropped
            ahead = groups[layer + 1][0] if above else None
            for direction in range(self.directions):
                k = layer * self.directions + direction
                begin = tuple(state[k] for state in states)
                y, *end = self._run_best(given, begin, groups[k], layout, direction == 1, ahead)
                outputs.append(y)
                last.append(tuple(end))
            given = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
            if dropped and layer < self.num_layers - 1:
                given = F.dropout(given, self.dropout)
        return given, *(torch.stack(parts) for parts in zip(*last, strict=True))

    def _run_best(
        self,
        x: Tensor | Encoded,
        states: tuple[Tensor, ...],
        matrices: Sequence[Matrix],
        layout: Layout,
        reverse: bool,
        ahead: Matrix | None,
    ) -> tuple[Any, ...]:
        """`_run` by the way that is asked for, or the fastest."""

        def run(way: str, given: Any = x) -> tuple[Any, ...]:
            return self._run(given, states, matrices, layout, reverse, way, ahead)

        ways = possible(self.kind, matrices, ahead, layout, x)
        if self.recompute and self.way == "auto":
            # Only a loop can make gates again: who asks for memory is not given speed.
            ways = tuple(way for way in ways if way in LOOPS) or ways
        return run(choose(self.way, ways, x, matrices, layout, run))

    def _all_native(
        self, x: Tensor, states: tuple[Tensor, ...], layout: Layout
    ) -> tuple[Tensor, ...]:
        """The same by one call of torch's kernel: all matrices are dense."""
        return whole_stack(
            self.kind,
            x,
            states,
            [weight for layer in self.all_weights for weight in layer],
            layout,
            bias=self.bias,
            layers=self.num_layers,
            dropout=self.dropout,
            training=self.training,
            bidirectional=self.bidirectional,
        )

    @abstractmethod
    def _run(
        self,
        x: Tensor | Encoded,
        states: tuple[Tensor, ...],
        matrices: Sequence[Matrix],
        layout: Layout,
        reverse: bool,
        way: str,
        ahead: Matrix | None,
    ) -> tuple[Any, ...]:
        """One layer in one direction: hidden states (T, B, P), then the last states (B, ..)."""

    @abstractmethod
    def _state_sizes(self) -> tuple[int, ...]:
        """Widths of the states: P, or P and H."""

    @abstractmethod
    def _handed_over(self, states: tuple[Tensor, ...]) -> Any:
        """States as torch's layer takes and returns them."""

    def extra_repr(self) -> str:
        parts = [f"{self.input_size}, {self.hidden_size}"]
        defaults = {"num_layers": 1, "bias": True, "batch_first": False, "dropout": 0.0}
        defaults |= {"bidirectional": False, "proj_size": 0, "recompute": False}
        own = {name: getattr(self, name) for name in defaults}
        parts += [f"{n}={own[n]}" for n, usual in defaults.items() if own[n] != usual]
        return ", ".join(parts)


def _draw(child: Any, bound: float) -> None:
    if not isinstance(child, LowRankLayer):
        nn.init.uniform_(child.weight, -bound, bound)
        return
    # An entry of the product is a sum over every inner index: R terms, R^2 with a core.
    count = len(child.parts)
    std = (bound**2 / 3 / child.rank ** (count - 1)) ** (1 / (2 * count))
    for part in reversed(child.parts):
        nn.init.normal_(getattr(child, part).weight, std=std)
