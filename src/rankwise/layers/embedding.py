"""The low-rank stand-in for nn.Embedding. N: num_embeddings, D: embedding_dim, R: rank."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from rankwise.errors import FactorizeError
from rankwise.layers.base import LowRankLayer, check_rank
from rankwise.layers.form import Form


class LowRankEmbedding(LowRankLayer):
    """W = U V: a row of U (N, R) is looked up for each token, then multiplied by V (R, D).

    `u` is an nn.Embedding, `v` an nn.Linear from D to R as in a low-rank linear layer from D to N,
    so an output head that shares the embedding's weight shares both factors.

    The row of `padding_idx` gets no gradient through the lookup; where the dense row is zero, as
    torch makes it, U's row is zero too and the layer returns exact zeros. A padding row of other
    values is approximated like any other, and moves with V.

    Args:
        num_embeddings: N.
        embedding_dim: D.
        rank: 1 ... min(N, D).
        padding_idx: as in nn.Embedding.
        sparse: gradients of U as sparse tensors; V's are dense.
        core: a map between the factors, W = U C V (2105.01029).
        device: where the parameters live.
        dtype: their type.

    Example:
        >>> LowRankEmbedding(1000, 64, rank=8)(torch.zeros(2, 5, dtype=torch.int64)).shape
        torch.Size([2, 5, 64])
    """

    kind: ClassVar[str] = "embedding"
    dense_class: ClassVar[type[nn.Module]] = nn.Embedding
    settings: ClassVar[tuple[str, ...]] = (
        "num_embeddings",
        "embedding_dim",
        "padding_idx",
        "sparse",
    )

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        rank: int,
        padding_idx: int | None = None,
        sparse: bool = False,
        *,
        core: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_rank(rank, (num_embeddings, embedding_dim), self.kind)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.rank, self.blocks = rank, 1
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.u = nn.Embedding(num_embeddings, rank, padding_idx, sparse=sparse, **place)
        self.u.register_parameter("bias", None)  # as every last map has one, or None
        self.core = nn.Linear(rank, rank, bias=False, **place) if core else None
        self.v = nn.Linear(embedding_dim, rank, bias=False, **place)
        self.norm = None
        self.reset_parameters()

    @classmethod
    def obstacle(cls, dense: Any, form: Form) -> str:
        if dense.max_norm is not None:
            return (
                "max_norm rescales the rows that were looked up in place; factors have no such rows"
            )
        if dense.scale_grad_by_freq:
            return "scale_grad_by_freq divides the gradient of a row; a factor V has no such rows"
        if form.norm:
            return "no BatchNorm between the factors of an embedding: their codes are looked up"
        return ""

    @classmethod
    def like(
        cls, dense: Any, rank: int, *, norm: bool = False, core: bool = False, blocks: int = 1
    ) -> Self:
        reason = cls.obstacle(dense, Form(norm=norm, core=core))
        if reason:
            raise FactorizeError(reason)
        cls.blocks_of(dense, blocks)
        check_rank(rank, cls.matrix_shape(dense), cls.kind)
        layer: Any = nn.utils.skip_init(
            cls,
            **{name: getattr(dense, name) for name in cls.settings},
            rank=rank,
            core=core,
            device=dense.weight.device,
            dtype=dense.weight.dtype,
        )
        return layer

    def dense_like(self, device: torch.device | None = None) -> Any:
        return nn.utils.skip_init(
            nn.Embedding,
            **{name: getattr(self, name) for name in self.settings},
            device=device or self.u.weight.device,
            dtype=self.u.weight.dtype,
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the factors anew, their product with the variance 1 of a default nn.Embedding."""
        std = self.rank ** (-(len(self.parts) - 1) / (2 * len(self.parts)))
        for part in self.parts:
            nn.init.normal_(getattr(self, part).weight, std=std)
        if self.padding_idx is not None:
            self.u.weight[self.padding_idx] = 0

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.num_embeddings, self.embedding_dim)

    @property
    def padding_idx(self) -> int | None:
        """The token whose row of U gets no gradient when it is looked up."""
        return self.u.padding_idx

    @property
    def sparse(self) -> bool:
        """Whether U's gradient is sparse."""
        return self.u.sparse

    @classmethod
    def from_dense(cls, dense: Any, rank: int, **options: Any) -> Self:
        layer = super().from_dense(dense, rank, **options)
        padding = dense.padding_idx
        if padding is not None and not dense.weight.is_meta:
            with torch.no_grad():
                row = dense.weight[padding]
                # The decomposition leaves rounding errors where the dense layer has zeros.
                layer.u.weight[padding] *= (row != 0).any()
        return layer

    def _stand_in_for(self, dense: Any) -> Self:
        for parameter in self.new_parameters():
            parameter.requires_grad_(dense.weight.requires_grad)
        return self.train(dense.training)

    @torch.no_grad()
    def to_dense(self) -> Any:
        dense = super().to_dense()
        del dense.bias  # None, as of layers that could have one
        return dense

    def forward(self, tokens: Tensor) -> Tensor:
        codes = self.u(tokens)
        if self.core is not None:
            codes = codes @ self.to_factor("core", self.core.weight)
        return codes @ self.v.weight

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, rank={self.rank}"
