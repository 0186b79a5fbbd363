"""A recurrent layer of full rank is the dense layer: results, states, gradients, packed, errors."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.testing import assert_close

from rankwise import onednn
from rankwise.errors import FactorizeError, LifeCycleError, OptionError, PlanError
from rankwise.layers import (
    LowRankGRU,
    LowRankLinear,
    LowRankLSTM,
    OpenRecurrent,
    recurrent_class,
)
from rankwise.layers.recurrent import codes, gru_loop, lstm_loop, products, ways

T, B, I, H = 7, 3, 5, 6  # noqa: E741
CLASSES: dict[str, Any] = {"lstm": LowRankLSTM, "gru": LowRankGRU}
DENSE: dict[str, Any] = {"lstm": nn.LSTM, "gru": nn.GRU}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks even for these few steps; the last one is shorter."""
    monkeypatch.setattr(codes, "ROWS", 2 * B)
    # Layers as small as these would not be run in a loop.
    monkeypatch.setattr(ways, "CALLS", -float("inf"))


def noise(*shape: int, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=g, dtype=torch.float64)


def dense_layer(kind: str, seed: int = 0, **options: Any) -> Any:
    layer = DENSE[kind](I, H, dtype=torch.float64, **options)
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(noise(*parameter.shape, seed=seed + i) / 3)
    return layer


def tensors(result: Any) -> list[Tensor]:
    """Outputs and states in one list."""
    if isinstance(result, PackedSequence):
        return [result.data]
    if isinstance(result, Tensor):
        return [result]
    return [tensor for part in result for tensor in tensors(part)]


def weigh(result: Any) -> Tensor:
    """A scalar that every output and state takes part in, each element with its own weight."""
    found = tensors(result)
    return torch.stack([(t * noise(*t.shape, seed=i)).sum() for i, t in enumerate(found)]).sum()


def begin(kind: str, layers: int, batch: int, width: int = H) -> Any:
    h, c = noise(layers, batch, width, seed=8), noise(layers, batch, H, seed=9)
    return (h, c) if kind == "lstm" else h


def full_rank(layer: Any, **kept_dense: bool) -> list[tuple[int | None, ...]]:
    """Ranks that lose nothing; `ih=True` or `hh=True` leaves that matrix dense."""
    seen = layer.proj_size or H
    inputs = [I] + [seen * (1 + layer.bidirectional)] * (layer.num_layers - 1)
    hh = None if kept_dense.get("hh") else seen
    extra = (layer.proj_size,) if layer.proj_size else ()
    return [(None if kept_dense.get("ih") else width, hh, *extra) for width in inputs]


def compare_gradients(low: Any, dense: Any) -> None:
    """Gradients of factors by the chain rule from those of the dense weight; biases as they are."""
    for name in low.matrices:
        child = getattr(low, name)
        gradient = getattr(dense, f"weight_{name}").grad
        if not isinstance(child, LowRankLinear):
            assert_close(child.weight.grad, gradient, rtol=1e-9, atol=1e-11)
            continue
        u, v = child.u.weight, child.v.weight
        blocks = (child.blocks, -1)
        of_u = torch.bmm(gradient.unflatten(0, blocks), v.unflatten(0, blocks).mT).flatten(0, 1)
        of_v = torch.bmm(u.unflatten(0, blocks).mT, gradient.unflatten(0, blocks)).flatten(0, 1)
        assert_close(u.grad, of_u, rtol=1e-9, atol=1e-11)
        assert_close(v.grad, of_v, rtol=1e-9, atol=1e-11)
        if child.u.bias is not None:
            expected = getattr(dense, f"bias_{name}").grad
            assert_close(child.u.bias.grad, expected, rtol=1e-9, atol=1e-11)


FORMS: list[dict[str, Any]] = [
    {},
    {"bias": False, "batch_first": True},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 2, "dropout": 0.5},
]
PROJECTED: list[dict[str, Any]] = [
    {"proj_size": 4},
    {"proj_size": 4, "num_layers": 2, "bidirectional": True},
]
EVERY = [(kind, form) for kind in CLASSES for form in FORMS]
EVERY += [("lstm", form) for form in PROJECTED]


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("kind", "form"), EVERY)
def test_full_rank_is_the_dense_layer(kind: str, form: dict[str, Any], recompute: bool) -> None:
    dense = dense_layer(kind, **form)
    low = CLASSES[kind].from_dense(copy.deepcopy(dense), full_rank(dense))
    low.recompute = recompute
    x, y = noise(T, B, I), noise(T, B, I)
    if dense.batch_first:
        x, y = x.transpose(0, 1), y.transpose(0, 1)
    directions = 1 + dense.bidirectional
    hx = begin(kind, dense.num_layers * directions, B, dense.proj_size or H)
    results = []
    for layer, each in ((dense, x), (low, y)):
        torch.manual_seed(0)  # dropout
        result = layer(each.requires_grad_(), hx)
        weigh(result).backward()
        results.append(tensors(result))
    assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)
    assert_close(y.grad, x.grad, rtol=1e-9, atol=1e-11)
    compare_gradients(low, dense)
    torch.manual_seed(0)
    with torch.no_grad():
        assert_close(tensors(low(y, hx)), results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("ranks", [(1, 1), (1, 2), (2, 1)])
@pytest.mark.parametrize("kind", CLASSES)
def test_rank_one(kind: str, ranks: tuple[int, int]) -> None:
    low = CLASSES[kind](I, H, rank=ranks, dtype=torch.float64)
    dense, x = low.to_dense(), noise(T, B, I)
    expected, found = dense(x), low(x)
    assert_close(tensors(found), tensors(expected), rtol=1e-10, atol=1e-12)
    weigh(expected).backward()
    weigh(found).backward()
    compare_gradients(low, dense)


@pytest.mark.parametrize("kept", [{"ih": True}, {"hh": True}, {"ih": True, "hh": True}])
@pytest.mark.parametrize("kind", CLASSES)
def test_either_matrix_may_stay_dense(kind: str, kept: dict[str, bool]) -> None:
    dense = dense_layer(kind, num_layers=2, bidirectional=True)
    low = CLASSES[kind].from_dense(copy.deepcopy(dense), full_rank(dense, **kept))
    x = noise(T, B, I)
    expected, found = dense(x), low(x)
    assert_close(tensors(found), tensors(expected), rtol=1e-10, atol=1e-12)
    weigh(expected).backward()
    weigh(found).backward()
    compare_gradients(low, dense)


@pytest.mark.parametrize("kept", [{}, {"ih": True}, {"hh": True}])
@pytest.mark.parametrize("kind", CLASSES)
def test_each_gate_on_its_own(kind: str, kept: dict[str, bool]) -> None:
    low = CLASSES[kind].from_dense(dense_layer(kind), full_rank(dense_layer(kind), **kept)[0])
    apart = CLASSES[kind](I, H, rank=(2, 3), per_gate=True, dtype=torch.float64)
    assert apart.ih_l0.blocks == apart.gates
    for name in kept:
        setattr(apart, f"{name}_l0", getattr(low, f"{name}_l0"))
    dense = apart.to_dense()
    x, y = noise(T, B, I).requires_grad_(), noise(T, B, I).requires_grad_()
    expected, found = dense(x), apart(y)
    assert_close(tensors(found), tensors(expected), rtol=1e-10, atol=1e-12)
    weigh(expected).backward()
    weigh(found).backward()
    assert_close(y.grad, x.grad, rtol=1e-9, atol=1e-11)
    compare_gradients(apart, dense)
    apart.recompute = True
    assert_close(tensors(apart(y)), tensors(expected), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("joined", [0, 1 << 20])
@pytest.mark.parametrize("per_gate", [False, True])
@pytest.mark.parametrize("kind", CLASSES)
def test_products_of_onednn(
    kind: str, per_gate: bool, joined: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float32, and every product by oneDNN where the processor has it, against float64."""
    monkeypatch.setattr(onednn, "WORTH", 1)
    monkeypatch.setattr(products, "JOINED_FEW", joined)
    torch.manual_seed(0)
    low = CLASSES[kind](17, 24, 2, bidirectional=True, rank=7, per_gate=per_gate)
    exact = copy.deepcopy(low).double()
    x = noise(T, B, 17).float().requires_grad_()
    y = x.detach().double().requires_grad_()
    found, expected = low(x), exact(y)
    gradients = torch.autograd.grad(
        weigh([t.double() for t in tensors(found)]), [x, *low.parameters()]
    )
    wanted = torch.autograd.grad(weigh(expected), [y, *exact.parameters()])
    for a, b in zip(tensors(found), tensors(expected), strict=True):
        assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    for a, b in zip(gradients, wanted, strict=True):
        assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("lengths", [(6, 4, 4, 1), (2, 5, 1, 4)])
@pytest.mark.parametrize("hh", [False, True])
@pytest.mark.parametrize("kind", CLASSES)
def test_packed_sequences(kind: str, hh: bool, lengths: tuple[int, ...]) -> None:
    dense = dense_layer(kind, num_layers=2, bidirectional=True)
    low = CLASSES[kind].from_dense(copy.deepcopy(dense), full_rank(dense, hh=hh))
    parts = [noise(length, I, seed=i).requires_grad_() for i, length in enumerate(lengths)]
    hx = begin(kind, 4, len(lengths))
    results, gradients = [], []
    for layer in (dense, low):
        result = layer(pack_sequence(parts, enforce_sorted=lengths[0] == 6), hx)
        assert isinstance(result[0], PackedSequence)
        results.append(tensors(result))
        gradients.append(torch.autograd.grad(weigh(result), parts, retain_graph=True))
        weigh(result).backward()
    assert_close(results[1], results[0], rtol=1e-10, atol=1e-12)
    assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-11)
    compare_gradients(low, dense)
    with torch.no_grad():
        packed = pack_sequence(parts, enforce_sorted=lengths[0] == 6)
        assert_close(tensors(low(packed, hx)), results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", CLASSES)
def test_one_sequence_without_a_batch_and_state_hand_over(kind: str) -> None:
    low = CLASSES[kind](I, H, 2, rank=3, dtype=torch.float64)
    x = noise(T, I)
    whole, state = low(x)
    assert_close(whole[:, None], low(x[:, None])[0], rtol=1e-12, atol=1e-12)
    first, between = low(x[:3])
    second, end = low(x[3:], between)
    assert_close(torch.cat([first, second]), whole, rtol=1e-12, atol=1e-12)
    assert_close(tensors(end), tensors(state), rtol=1e-12, atol=1e-12)
    dense = low.to_dense()
    assert_close(tensors(dense(x)), tensors((whole, state)), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("reverse", "recompute"), [(False, False), (True, True)])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 512])
def test_gradients_of_the_loops_are_those_of_finite_differences(
    rows: int, apart: bool, reverse: bool, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codes, "ROWS", rows)
    steps, batch, hidden, rank, inputs = 4, 2, 3, 2, 2
    for gates, module in ((4, lstm_loop), (3, gru_loop)):
        width = rank * gates if apart else rank
        shapes = [(steps, batch, inputs), (gates * hidden, inputs), (gates * hidden, rank)]
        shapes += [(gates * hidden,)] * (1 if gates == 4 else 2)
        shapes += [(width, hidden), (batch, width), (batch, hidden)]
        arguments = [noise(*s, seed=i).requires_grad_() for i, s in enumerate(shapes)]

        def run(*given: Tensor, of: Any = module) -> Any:
            return of.run(*given, reverse, recompute)

        assert torch.autograd.gradcheck(run, arguments)


def test_gradient_of_a_last_cell_that_ended_early() -> None:
    shapes = [(4, 2, 2), (12, 2), (12, 2), (12,), (2, 3), (2, 2), (2, 3)]
    arguments = [noise(*shape, seed=i).requires_grad_() for i, shape in enumerate(shapes)]
    sizes = [2, 2, 1, 1]
    assert torch.autograd.gradcheck(
        lambda *given: lstm_loop.run(*given, batch_sizes=sizes)[1], arguments
    )


@pytest.mark.parametrize("kind", CLASSES)
def test_backward_twice_over_one_graph_and_not_of_backward(kind: str) -> None:
    low = CLASSES[kind](I, H, rank=3, dtype=torch.float64)
    x = noise(T, B, I).requires_grad_()
    y = low(x)[0]
    once = torch.autograd.grad(y.sum(), low.hh_l0.u.weight, retain_graph=True)
    assert_close(torch.autograd.grad(y.sum(), low.hh_l0.u.weight), once, rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(low(x)[0].sum(), x, create_graph=True)
    with pytest.raises(LifeCycleError, match="create_graph=True"):
        gradient.sum().backward()


@pytest.mark.parametrize(("kind", "per_unit"), [("lstm", 6.0), ("gru", 5.0)])
def test_what_is_saved_for_backward_is_what_the_docstring_says(kind: str, per_unit: float) -> None:
    steps, batch, hidden, rank = 16, 4, 64, 16
    x = torch.randn(steps, batch, hidden, requires_grad=True)
    for recompute, expected in ((False, per_unit), (True, per_unit - 4)):
        low = CLASSES[kind](hidden, hidden, rank=rank, recompute=recompute)
        held: dict[int, int] = {}

        def pack(tensor: Tensor, kept: dict[int, int] = held) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // 4
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = low(x)[0]
        known = [*low.parameters(), x]
        for tensor in known:
            held.pop(tensor.untyped_storage().data_ptr(), None)
        unit = steps * batch * hidden
        numbers = sum(count for count in held.values() if count > 4 * batch * hidden)
        assert y.shape == x.shape
        # The cells have one step more; codes are 2 R / H.
        assert expected <= numbers / unit - 2 * rank / hidden <= expected + 1 / steps


@pytest.mark.parametrize("kind", CLASSES)
def test_without_gradients_nothing_grows_with_the_number_of_gates(kind: str) -> None:
    low = CLASSES[kind](H, H, rank=2)
    with torch.no_grad():
        y = low(torch.zeros(T, B, H))[0]
    assert y.grad_fn is None
    assert not low(torch.zeros(T, B, H).detach())[0].detach().requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", CLASSES)
def test_half_precision_and_autocast(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    low, x = CLASSES[kind](16, 24, 2, rank=6), torch.randn(9, 4, 16)
    expected = low(x)
    wanted = torch.autograd.grad(expected[0].sum(), list(low.parameters()))
    half = copy.deepcopy(low).to(dtype)
    with torch.autocast("cpu", dtype):
        found = low(x)
        gradients = torch.autograd.grad(found[0].sum(), list(low.parameters()))
    tolerance = 8 * torch.finfo(dtype).eps
    for results in (half(x.to(dtype)), found):
        assert {t.dtype for t in tensors(results)} == {dtype}
        for a, b in zip(tensors(results), tensors(expected), strict=True):
            assert_close(a.float(), b, rtol=0, atol=tolerance)
    for a, b in zip(gradients, wanted, strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() < tolerance * b.norm()


def test_cells_are_kept_in_float32() -> None:
    """1000 steps that each add 2^-9 to the cell: bfloat16 would stop at 1."""
    low = LowRankLSTM(1, 1, rank=1)
    with torch.no_grad():
        for parameter in low.parameters():
            parameter.zero_()
        # i = .5, f = 1, g = tanh(2^-8)
        low.ih_l0.u.bias.copy_(torch.tensor([0.0, 40.0, 2.0**-8, 0.0]))
        _, (_, c) = low.bfloat16()(torch.zeros(1000, 1, 1, dtype=torch.bfloat16))
    assert_close(float(c), 1000 * 2.0**-9, rtol=0.01, atol=0.0)


@pytest.mark.parametrize("kind", CLASSES)
def test_shapes_on_the_meta_device(kind: str) -> None:
    low = CLASSES[kind](I, H, 2, rank=3, device="meta")
    y = low(torch.empty(T, B, I, device="meta"))[0]
    assert y.shape == (T, B, H)
    y.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in low.parameters())


@pytest.mark.parametrize("kind", CLASSES)
def test_no_sequences_at_all_and_frozen_factors(kind: str) -> None:
    low = CLASSES[kind](I, H, 2, rank=3, dtype=torch.float64)
    for low.recompute in (False, True):
        y = low(noise(T, 0, I))[0]
        assert y.shape == (T, 0, H)
        y.sum().backward()
    low.zero_grad()
    for parameter in low.parameters():
        parameter.requires_grad_(parameter is low.hh_l0.v.weight)
    whole = CLASSES[kind](I, H, 2, rank=3, dtype=torch.float64)
    whole.load_state_dict(low.state_dict())
    for layer in (low, whole):
        weigh(layer(noise(T, B, I))).backward()
    assert_close(low.hh_l0.v.weight.grad, whole.hh_l0.v.weight.grad, rtol=1e-12, atol=1e-12)
    assert low.ih_l1.u.weight.grad is None


@pytest.mark.parametrize("kind", CLASSES)
def test_compiles_to_one_graph(kind: str) -> None:
    torch.manual_seed(0)
    low, x = CLASSES[kind](I, H, 2, bidirectional=True, rank=3), torch.randn(T, B, I)
    compiled: Any = torch.compile(low, fullgraph=True, backend="aot_eager")
    expected, found = low(x), compiled(x)
    assert_close(tensors(found), tensors(expected), rtol=1e-5, atol=1e-6)
    parameters = list(low.parameters())
    wanted = torch.autograd.grad(expected[0].sum(), parameters)
    assert_close(torch.autograd.grad(found[0].sum(), parameters), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", CLASSES)
def test_an_exported_graph_has_torchs_own_operators(kind: str) -> None:
    low = CLASSES[kind](I, H, rank=3).eval()
    x = torch.randn(T, B, I)
    program = torch.export.export(low, (x,))
    names = {str(node.target) for node in program.graph.nodes}
    assert not any("rankwise" in name for name in names)
    assert_close(tensors(program.module()(x)), tensors(low(x)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "form"), [("lstm", PROJECTED[1]), ("gru", FORMS[2])])
def test_opening_and_closing_keep_the_parameters(kind: str, form: dict[str, Any]) -> None:
    dense = dense_layer(kind, **form)
    opened = CLASSES[kind].of(dense)
    assert {id(p) for p in opened.parameters()} == {id(p) for p in dense.parameters()}
    x = noise(T, B, I)
    assert_close(tensors(opened(x)), tensors(dense(x)), rtol=0, atol=0)
    closed = opened.close()
    assert [n for n, _ in closed.named_parameters()] == [n for n, _ in dense.named_parameters()]
    assert [id(p) for p in closed.parameters()] == [id(p) for p in dense.parameters()]
    assert_close(tensors(closed(x)), tensors(dense(x)), rtol=0, atol=0)
    opened.hh_l0 = LowRankLinear.from_dense(opened.hh_l0, 2)
    with pytest.raises(PlanError, match="hh_l0 is low-rank; to_dense"):
        opened.close()
    assert_close(tensors(opened.to_dense()(x)), tensors(opened(x)), rtol=1e-10, atol=1e-12)


def test_spectral_factors_are_the_best_of_their_rank() -> None:
    dense = dense_layer("lstm")
    low = LowRankLSTM.from_dense(dense, (None, 2))
    singular = torch.linalg.svdvals(dense.weight_hh_l0.detach())
    lost = (low.hh_l0.weight - dense.weight_hh_l0).square().sum()
    assert_close(lost, singular[2:].square().sum(), rtol=1e-9, atol=0.0)
    assert low.ih_l0.weight is dense.weight_ih_l0


@pytest.mark.parametrize("init", ["orthogonal", "variance", "default"])
def test_other_initialisations(init: str) -> None:
    low = LowRankLSTM.from_dense(dense_layer("lstm"), 3, init=init)
    assert all(bool(t.isfinite().all()) for t in tensors(low(noise(T, B, I))))


def test_drawn_weights_have_the_variance_of_torchs() -> None:
    torch.manual_seed(0)
    low = LowRankLSTM(200, 256, rank=(8, 32))
    dense = nn.LSTM(200, 256)
    for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
        ratio = getattr(low, name).detach().var() / getattr(dense, name).detach().var()
        assert 0.85 < float(ratio) < 1.15, name
    torch.manual_seed(3)
    drawn = LowRankLSTM(4, 5, 2, proj_size=3)
    torch.manual_seed(3)
    expected = nn.LSTM(4, 5, 2, proj_size=3).state_dict()
    assert_close(dict(drawn.close().state_dict()), dict(expected), rtol=0, atol=0)


def test_three_factors_are_read_and_a_norm_is_refused() -> None:
    low = LowRankGRU(I, H, rank=3, dtype=torch.float64)
    low.hh_l0 = LowRankLinear(H, 3 * H, 2, core=True, dtype=torch.float64)
    assert_close(
        tensors(low(noise(T, B, I))), tensors(low.to_dense()(noise(T, B, I))), rtol=1e-9, atol=1e-11
    )
    low.ih_l0 = LowRankLinear(I, 3 * H, 2, norm=True, dtype=torch.float64)
    with pytest.raises(FactorizeError, match="ih_l0 has a BatchNorm"):
        low(noise(T, B, I))
    low.ih_l0 = nn.Sequential(nn.Linear(I, 3 * H, dtype=torch.float64))
    with pytest.raises(FactorizeError, match="ih_l0 is a Sequential"):
        low(noise(T, B, I))


def test_blocks_that_hold_several_gates() -> None:
    low = LowRankLSTM(I, H, rank=3, dtype=torch.float64)
    for blocks in (2, 3):  # two gates a block; and blocks that cut gates: the product
        low.hh_l0 = LowRankLinear(H, 4 * H, 2, blocks=blocks, dtype=torch.float64)
        x = noise(T, B, I)
        assert_close(tensors(low(x)), tensors(low.to_dense()(x)), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda layer: layer(noise(T, B, I + 1)),
        lambda layer: layer(noise(2, T, B, I)),
        lambda layer: layer(noise(T, B, I).float()),
        lambda layer: layer(noise(0, B, I)),
        lambda layer: layer(noise(T, B, I), begin(_kind(layer), 2, B)),
        lambda layer: layer(noise(T, B, I), begin(_kind(layer), 1, B + 1)),
        lambda layer: layer(noise(T, I), begin(_kind(layer), 1, B)),
    ],
)
@pytest.mark.parametrize("kind", CLASSES)
def test_wrong_shapes_are_refused_as_torch_refuses_them(kind: str, wrong: Any) -> None:
    with pytest.raises((ValueError, RuntimeError)) as torchs:
        wrong(dense_layer(kind))
    with pytest.raises(torchs.type):
        wrong(CLASSES[kind](I, H, rank=3, dtype=torch.float64))


def _kind(layer: nn.Module) -> str:
    return "lstm" if isinstance(layer, (nn.LSTM, LowRankLSTM)) else "gru"


def test_wrong_ranks_are_refused() -> None:
    with pytest.raises(PlanError, match=r"ih_l0: rank 6 .* rank=\(None, R\)"):
        LowRankLSTM(I, H, rank=6)
    with pytest.raises(OptionError, match="one entry for each of 2 layers"):
        LowRankLSTM(I, H, 2, rank=[3])
    with pytest.raises(OptionError, match="None leaves one dense"):
        LowRankLSTM(I, H, rank=(1, 2, 3))
    with pytest.raises(ValueError, match="proj_size"):
        LowRankLSTM(I, H, proj_size=H, rank=2)


def test_which_layers_are_opened() -> None:
    class Own(nn.LSTM):
        pass

    assert recurrent_class(nn.GRU(2, 2)) is LowRankGRU
    assert recurrent_class(nn.LSTM(2, 2)) is LowRankLSTM
    assert recurrent_class(Own(2, 2)) is None
    assert recurrent_class(nn.RNN(2, 2)) is None
    spec = LowRankLSTM(I, H, 2, bidirectional=True, proj_size=4, rank=3).spec()
    assert spec == {"kind": "lstm", "shape": [I, H, 4], "layers": 2, "bidirectional": True}


def test_copies_and_state_dicts() -> None:
    low: OpenRecurrent = LowRankLSTM(I, H, 2, rank=3, dtype=torch.float64)
    other = LowRankLSTM(I, H, 2, rank=3, dtype=torch.float64)
    other.load_state_dict(low.state_dict())
    x = noise(T, B, I)
    assert_close(tensors(other(x)), tensors(low(x)), rtol=0, atol=0)
    assert_close(tensors(copy.deepcopy(low)(x)), tensors(low(x)), rtol=0, atol=0)
    with pytest.raises(AttributeError, match="weight_hh_l7"):
        _ = low.weight_hh_l7
