"""Products by oneDNN: those of float64 to rounding, whatever the layout; where they are taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from rankwise import onednn
from rankwise.onednn import add_product_, by_onednn, matmul

needed = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN"
)


def drawn(rows: int, columns: int, layout: str = "plain", seed: int = 0) -> Tensor:
    """A matrix, in rows, in columns, or with gaps in memory."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "turned":
        return torch.randn(columns, rows, generator=generator).t()
    if layout == "gaps":
        return torch.randn(rows, columns + 3, generator=generator)[:, 1:-2]
    return torch.randn(rows, columns, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("layouts", ["plain turned", "turned plain", "gaps gaps", "turned turned"])
def test_a_product_is_that_of_float64(
    layouts: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onednn, "WORTH", 1)
    first, second = layouts.split()
    a, b = drawn(37, 19, first).to(dtype), drawn(19, 23, second, 1).to(dtype)
    expected = a.double() @ b.double()
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 4e-2}[dtype]
    assert_close(matmul(a, b).double(), expected, rtol=tolerance, atol=tolerance)
    target = drawn(37, 23, "gaps", 2).to(dtype)
    wanted = 0.5 * target.double() - 2 * expected
    add_product_(target, a, b, beta=0.5, alpha=-2.0)
    assert_close(target.double(), wanted, rtol=tolerance, atol=3 * tolerance)
    target.fill_(torch.nan)
    add_product_(target, a, b, beta=0.0)
    assert_close(target.double(), expected, rtol=tolerance, atol=tolerance)


@needed
def test_float32_stays_float32() -> None:
    """A layer's product: 5e-7 of its norm, `mm` 2.5e-7; TF32 and bfloat16 are a thousand off."""
    a, b = drawn(512, 1376), drawn(1376, 128, "turned", 1)
    assert by_onednn(b, 512)
    exact = a.double() @ b.double()
    error, usual = ((x.double() - exact).norm() / exact.norm() for x in (matmul(a, b), a @ b))
    assert float(error) < 1e-6
    assert float(error) < 4 * float(usual)


@needed
@pytest.mark.parametrize("turned", [False, True])
def test_a_large_sum_is_made_piece_by_piece(turned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the last piece is smaller than the others, and none is as large as the target."""
    monkeypatch.setattr(onednn, "PASSING", 40_000 // torch.get_num_threads())
    sizes: list[int] = []

    def watched(x: Tensor, weight: Tensor) -> Tensor:
        sizes.append(len(x) * len(weight))
        return x @ weight.t()

    monkeypatch.setattr(onednn, "multiply", watched)
    a, b = drawn(401, 64, "turned"), drawn(64, 300, "turned" if turned else "plain", 1)
    target = drawn(401, 300, "turned" if turned else "plain", 2)
    expected = target + 3 * a @ b
    add_product_(target, a, b, alpha=3.0)
    assert_close(target, expected, rtol=1e-5, atol=1e-4)
    assert len(sizes) == 4
    assert max(sizes) <= 40_000


def test_it_is_taken_for_large_products_of_the_processor_alone() -> None:
    large = torch.empty(512, 512)
    assert not by_onednn(large, 1)
    assert not by_onednn(large.double(), 512)
    assert not by_onednn(large.to("meta"), 512)
    enabled, *_ = torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        assert not by_onednn(large, 512)
    finally:
        torch.backends.mkldnn.set_flags(_enabled=enabled)


def test_a_torch_that_lacks_the_operators_multiplies_by_mm(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        def __getattr__(self, name: str) -> Any:
            raise AttributeError(name)

    onednn._available.cache_clear()
    monkeypatch.setattr(torch.ops, "mkldnn", Nothing(), raising=False)
    try:
        a, b = drawn(512, 512), drawn(512, 128, seed=1)
        assert not by_onednn(a, 512)
        assert_close(matmul(a, b), a @ b, rtol=0, atol=0)
    finally:
        onednn._available.cache_clear()
