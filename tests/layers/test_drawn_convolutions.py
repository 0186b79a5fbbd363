"""Convolutions with everything drawn: dimensions, transposed or not, groups, strides, paddings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

from rankwise.layers import INITS, Form, low_rank_class

CONV: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED: tuple[Any, ...] = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}


def noise(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Any, Form, Tensor]:
    dimensions, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 2, 3]))

    def sizes(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dimensions))

    inputs, outputs = groups * draw(st.integers(2, 4)), groups * draw(st.integers(2, 4))
    kernel, stride, dilation, padding = sizes(1, 3), sizes(1, 3), sizes(1, 2), sizes(0, 2)
    options: dict[str, Any] = {"bias": draw(st.booleans()), "dtype": torch.float64}
    options |= {"groups": groups, "stride": stride, "dilation": dilation, "padding": padding}
    if draw(st.booleans()):
        extra = [max(pair) - 1 for pair in zip(stride, dilation, strict=True)]
        options["output_padding"] = tuple(draw(st.integers(0, most)) for most in extra)
        dense = TRANSPOSED[dimensions - 1](inputs, outputs, kernel, **options)
    else:
        mode = draw(st.sampled_from(["zeros", "zeros", "reflect", "replicate", "circular"]))
        if draw(st.booleans()):
            options |= {"padding": "same", "stride": 1}
        dense = CONV[dimensions - 1](inputs, outputs, kernel, padding_mode=mode, **options)
    with torch.no_grad():
        for i, parameter in enumerate(dense.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=i))
    if dimensions > 1 and draw(st.booleans()):
        dense = dense.to(memory_format=LAYOUTS[dimensions + 2])
    batch = (2,) if draw(st.booleans()) else ()
    x = noise(*batch, inputs, *sizes(5, 7), seed=9)
    separable = groups == 1 and draw(st.booleans())
    return dense, Form(core=draw(st.booleans()), separable=separable), x


@given(convolutions(), st.data())
@settings(max_examples=60)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
def test_full_rank_is_dense_and_any_rank_is_the_layer_of_its_product(
    drawn: tuple[Any, Form, Tensor], data: st.DataObject
) -> None:
    dense, form, x = drawn
    kind = low_rank_class(dense, form)
    assert isinstance(kind, type), kind
    full = min(kind.matrix_shape(dense))
    y = dense(x)
    low = kind.from_dense(copy.deepcopy(dense), full, core=form.core)
    assert_close(low(x), y, rtol=0, atol=1e-10)
    assert low(x).stride() == y.stride()
    rank, init = data.draw(st.integers(1, full)), data.draw(st.sampled_from(INITS))
    source = torch.Generator().manual_seed(1)
    low = kind.from_dense(dense, rank, core=form.core, init=init, generator=source)
    product = low.to_dense()
    assert_close(product(x), low(x), rtol=1e-10, atol=1e-10)
    assert_close(low.weight, product.weight, rtol=1e-10, atol=1e-10)
