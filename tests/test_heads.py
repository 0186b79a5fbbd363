"""Attention as products of each head's projections: found by name, decayed, balanced, refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rankwise
from rankwise.errors import FactorizeError, OptionError, SelectionError
from rankwise.layers.attention import OpenAttention
from rankwise.methods.factor_decay import FactorDecay
from rankwise.methods.sifd import SIFD
from rankwise.optim.attention import attentions
from rankwise.optim.decay import decay_, decay_gradients
from rankwise.optim.heads import balance_heads, head_products

E, H, L = 16, 4, 5  # features, heads, length


class Named(nn.Module):
    """Attention with projections of given names, G groups of keys and values, biases or not."""

    def __init__(self, names: str, groups: int = H, bias: bool = True, **extra: nn.Module) -> None:
        super().__init__()
        q, k, v, o = names.split()
        self.order, self.groups, self.num_heads = (q, k, v, o), groups, H
        self.add_module(q, nn.Linear(E, E, bias=bias))
        self.add_module(k, nn.Linear(E, E // H * groups, bias=bias))
        self.add_module(v, nn.Linear(E, E // H * groups, bias=bias))
        self.add_module(o, nn.Linear(E, E, bias=bias))
        for name, module in extra.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, o = (self._modules[name] for name in self.order)
        assert q is not None
        assert k is not None
        assert v is not None
        assert o is not None
        heads = [layer(x).unflatten(-1, (-1, E // H)).transpose(1, 2) for layer in (q, k, v)]
        spread = [h.repeat_interleave(H // h.shape[1], 1) for h in heads]
        return o(F.scaled_dot_product_attention(*spread).transpose(1, 2).flatten(2))


class Fused(nn.Module):
    """Attention with one layer for queries, keys and values, as vision transformers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = H
        self.qkv, self.proj = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.q_norm = self.k_norm = self.norm = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, H, E // H)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Torch(nn.Module):
    """nn.MultiheadAttention, packed or separate, shut or opened."""

    def __init__(self, opened: bool = False, fused: bool = False, **options: Any) -> None:
        super().__init__()
        self.attention: Any = nn.MultiheadAttention(E, H, batch_first=True, **options)
        if opened:
            self.attention = OpenAttention.of(self.attention, fused=fused)
        with torch.no_grad():
            for name, parameter in self.attention.named_parameters():
                if "bias" in name:
                    parameter.normal_()

    def forward(self, x: Tensor) -> Tensor:
        keys = x[..., : self.attention.kdim]
        return self.attention(x, keys, x, need_weights=False)[0]


class Bert(nn.Module):
    """The output layer beside the module that holds queries, keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.self: Any = Named("query key value unused")
        del self.self.unused
        del self.self.num_heads
        self.self.num_attention_heads = H
        self.output = nn.ModuleDict({"dense": nn.Linear(E, E)})
        self.self.order = ("query", "key", "value", "out")

    def forward(self, x: Tensor) -> Tensor:
        self.self.__dict__["_modules"]["out"] = self.output["dense"]
        try:
            return self.self(x)
        finally:
            del self.self.__dict__["_modules"]["out"]


KINDS: dict[str, Any] = {
    "llama-like": lambda: Named("q_proj k_proj v_proj o_proj"),
    "bart-like": lambda: Named("q_proj k_proj v_proj out_proj"),
    "grouped": lambda: Named("q_proj k_proj v_proj o_proj", groups=2),
    "one group": lambda: Named("q_proj k_proj v_proj o_proj", groups=1),
    "t5-like": lambda: Named("q k v o", bias=False),
    "distilbert-like": lambda: Named("q_lin k_lin v_lin out_lin"),
    "bert-like": Bert,
    "fused": Fused,
    "packed": Torch,
    "packed without bias": lambda: Torch(bias=False),
    "learned key": lambda: Torch(add_bias_kv=True),
    "separate": lambda: Torch(kdim=8),
    "opened": lambda: Torch(opened=True),
    "opened, learned key": lambda: Torch(opened=True, add_bias_kv=True),
    "opened, fused": lambda: Torch(opened=True, fused=True),
}


def build(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"block": KINDS[kind]()}).double()


def block(model: Any, x: Tensor) -> Tensor:
    return model["block"](x)


def inputs(features: int = E) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, L, features, generator=generator, dtype=torch.float64)


def projected(model: nn.Module) -> tuple[Tensor, ...]:
    """W_Q, W_K, W_V, W_O of the only attention, cut by hand."""
    module: Any = next(m for m in model.modules() if hasattr(m, "num_heads") or hasattr(m, "order"))
    if isinstance(module, nn.MultiheadAttention):
        packed = module.in_proj_weight
        parts = (
            packed.chunk(3)
            if packed is not None
            else (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        )
        return (*parts, module.out_proj.weight)
    if isinstance(module, OpenAttention):
        parts = (
            module.in_proj.weight.chunk(3)
            if module.fused
            else (module.q.weight, module.k.weight, module.v.weight)
        )
        return (*parts, module.out_proj.weight)
    if isinstance(module, Fused):
        return (*module.qkv.weight.chunk(3), module.proj.weight)
    *inside, out = module.order
    last = model["block"].output["dense"] if out == "out" else module._modules[out]  # pyright: ignore
    return (*(module._modules[n].weight for n in inside), last.weight)  # pyright: ignore


def by_definition(model: nn.Module, forms: str) -> Tensor:
    """Half the squared norms of all heads' E x E products, formed one by one."""
    q, k, v, o = projected(model)
    width, share = E // H, H // (k.shape[0] * H // E)
    total = torch.zeros((), dtype=torch.float64)
    for head in range(H):
        own = slice(head * width, (head + 1) * width)
        shared = slice(head // share * width, (head // share + 1) * width)
        if "qk" in forms:
            total = total + (q[own].T @ k[shared]).square().sum() / 2
        if "ov" in forms:
            total = total + (o[:, own] @ v[shared]).square().sum() / 2
    return total


@pytest.mark.parametrize("forms", ["qk", "ov", "qk+ov"])
@pytest.mark.parametrize("kind", KINDS)
def test_decay_of_heads_is_autograd_of_their_products(kind, forms):
    model = build(kind)
    wanted = torch.autograd.grad(
        by_definition(model, forms), list(model.parameters()), allow_unused=True
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    decay_(head_products(model, forms), {"frobenius": 1.0}, lambda parameter: (0.5, 0.0))
    for (name, parameter), pull in zip(model.named_parameters(), wanted, strict=True):
        expected = torch.zeros_like(parameter) if pull is None else 0.5 * pull
        torch.testing.assert_close(
            parameter.grad, expected, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("kind", KINDS)
def test_balancing_keeps_the_function_and_balances_the_factors(kind):
    model = build(kind)
    x = inputs()
    with torch.no_grad():
        before = block(model, x)
        weights = [p.clone() for p in model.parameters()]
    change = balance_heads(model, "qk+ov")
    torch.testing.assert_close(block(model, x).detach(), before, rtol=1e-9, atol=1e-10)
    moved = {
        p for p, old in zip(model.parameters(), weights, strict=True) if not torch.equal(p, old)
    }
    assert moved == set(change.rewritten)
    for product in head_products(model, "qk+ov"):
        u, v = product.factors()
        torch.testing.assert_close(u.mT @ u, v @ v.mT, rtol=1e-9, atol=1e-10)
        sizes = (u.mT @ u).diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(u.mT @ u, torch.diag_embed(sizes), rtol=1e-9, atol=1e-10)


def test_balancing_lowers_what_weight_decay_sees_and_not_what_frobenius_decay_sees():
    model = build("bart-like")
    attention: Any = model["block"]  # pyright: ignore
    with torch.no_grad():
        attention.q_proj.weight.mul_(5)
    weights = (attention.q_proj.weight, attention.k_proj.weight)
    size, product = (
        sum(float(w.detach().square().sum()) for w in weights),
        by_definition(model, "qk"),
    )
    balance_heads(model, "qk")
    assert sum(float(w.detach().square().sum()) for w in weights) < 0.6 * size
    torch.testing.assert_close(by_definition(model, "qk"), product)


@pytest.mark.parametrize("shared", ["one layer", "layer of another", "weight of another"])
def test_projections_with_other_users_are_not_turned(shared):
    torch.manual_seed(0)
    names = "q_proj k_proj v_proj o_proj"
    model: Any = nn.Sequential(Named(names), Named(names)).double()
    first, second = model
    if shared == "one layer":
        first.k_proj = first.q_proj
    elif shared == "layer of another":
        second.k_proj = first.k_proj
    else:
        second.k_proj.weight = first.k_proj.weight
    x = inputs(E)
    before = model(x)
    values = second.v_proj.weight.detach().clone()
    balance_heads(model, "qk+ov")
    torch.testing.assert_close(model(x), before, rtol=1e-9, atol=1e-12)
    assert not torch.equal(second.v_proj.weight, values)


def test_a_head_that_starts_at_zero_can_still_learn():
    model = build("bart-like")
    attention: Any = model["block"]  # pyright: ignore
    with torch.no_grad():
        attention.out_proj.weight[:, :4] = 0  # the first head
        values = attention.v_proj.weight.clone()
    balance_heads(model, "ov")
    torch.testing.assert_close(attention.v_proj.weight[:4], values[:4], rtol=0, atol=0)
    assert not torch.equal(attention.v_proj.weight[4:], values[4:])


def test_parts_and_factors_are_inverse():
    for kind in KINDS:
        for product in head_products(build(kind), "qk+ov"):
            held = [part.of(part.parameter.detach()) for part in product.parts]
            again = product.to_parts(product.to_factors(held))
            torch.testing.assert_close(list(again), held, rtol=0, atol=0)
            gradients = decay_gradients([product.factors()], {"l2": 1.0})
            assert [g.shape for g in product.to_parts(gradients[0])] == [h.shape for h in held]


# ------------------------------------------------------------------------------- what is refused


class Turned(Named):
    """Takes the angles that positions turn queries and keys by."""

    def forward(self, x: Tensor, position_embeddings: Tensor | None = None) -> Tensor:
        return super().forward(x)


class TurnsInside(Named):
    """Turns queries and keys by a function of another module."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(apply_rotary(x))


def apply_rotary(x: Tensor) -> Tensor:
    return x


class RotaryEmbedding(nn.Module):
    """Named as such."""


NAMES = "q_proj k_proj v_proj o_proj"


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (lambda: Turned(NAMES), "position_embeddings"),
        (lambda: TurnsInside(NAMES), "rotary embeddings"),
        (lambda: Named(NAMES, emb=RotaryEmbedding()), "rotary embeddings"),
        (lambda: Named(NAMES, q_norm=nn.LayerNorm(4)), "q_norm"),
        (lambda: Named(NAMES, k_norm=nn.LayerNorm(4)), "k_norm"),
    ],
)
def test_scores_that_are_no_product_are_refused_and_outputs_are_not(module, reason):
    model = nn.ModuleDict({"block": module()})
    with pytest.raises(
        FactorizeError, match=rf"block: its scores are .*{reason}.*choose att.*'ov'"
    ):
        head_products(model, "qk+ov")
    assert len(head_products(model, "ov")) == 1


def test_cosine_attention_is_refused():
    model = nn.ModuleDict({"block": Fused()})
    model["block"].register_parameter("logit_scale", nn.Parameter(torch.ones(H)))
    with pytest.raises(FactorizeError, match="cosine attention normalises"):
        head_products(model, "qk")


def test_outputs_with_a_norm_before_the_projection_are_refused_and_scores_are_not():
    model = nn.ModuleDict({"block": Named(NAMES, inner_attn_ln=nn.LayerNorm(E))})
    with pytest.raises(FactorizeError, match=r"outputs are .*inner_attn_ln.*attention='qk'"):
        head_products(model, "ov")
    assert len(head_products(model, "qk")) == 1


def test_projections_that_are_no_plain_matrices_are_refused():
    model = build("bart-like")
    rankwise.factorize(model, 2, layers="block.q_proj")
    with pytest.raises(FactorizeError, match=r"block\.q_proj is low-rank itself.*exclude it"):
        head_products(model, "qk")
    assert len(head_products(model, "ov")) == 1
    model = build("bart-like")
    model["block"].k_proj = nn.Bilinear(E, E, E)  # pyright: ignore
    with pytest.raises(FactorizeError, match=r"block\.k_proj is a Bilinear"):
        head_products(model, "qk")


def test_heads_that_cannot_be_counted_or_do_not_divide_are_refused():
    model = build("bart-like")
    del model["block"].num_heads  # pyright: ignore
    with pytest.raises(FactorizeError, match="does not say how many heads"):
        attentions(model)
    model["block"].config = type("Config", (), {"num_attention_heads": H})()  # pyright: ignore
    assert attentions(model)[0].heads == H
    model["block"].num_heads = 5  # pyright: ignore
    with pytest.raises(FactorizeError, match="5 heads do not divide"):
        head_products(model, "qk")


@pytest.mark.parametrize("method", [SIFD, FactorDecay])
def test_a_model_without_attention_is_an_error(method):
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(SelectionError, match="Sequential has no attention"):
        rankwise.start(model, method(attention="qk"), optimizer)
    with pytest.raises(OptionError, match="unknown attention forms 'kq'"):
        head_products(model, "kq")


# ------------------------------------------------------------------------------------ in a run


class Tiny(nn.Module):
    """An encoder layer of torch's between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, E)
        self.layer = nn.TransformerEncoderLayer(E, H, 24, dropout=0.0, batch_first=True)
        self.last = nn.Linear(E, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.layer(self.first(x)))


def tiny() -> Tiny:
    torch.manual_seed(0)
    return Tiny().double()


def groups(run: Any) -> dict[Any, float]:
    return {p: g["weight_decay"] for g in run.optimizer.param_groups for p in g["params"]}


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("forms", ["qk", "ov", "qk+ov"])
def test_heads_decay_in_a_run_and_the_rest_of_a_packed_weight_as_before(forms, make):
    model, own = tiny(), tiny()
    optimizer = make(model.parameters(), lr=0.01, weight_decay=0.2)
    run = rankwise.start(model, [rankwise.Dense(), FactorDecay(attention=forms)], optimizer)
    attention: Any = own.layer.self_attn
    held = {"qk": ["in_proj_weight"], "ov": ["in_proj_weight", "out_proj.weight"]}
    names = {f"layer.self_attn.{n}" for form in forms.split("+") for n in held[form]}
    decay = groups(run)
    assert {n for n, p in model.named_parameters() if decay[p] == 0} == names
    moved = [p for n, p in own.named_parameters() if n in names]
    others = [p for n, p in own.named_parameters() if n not in names]
    plain = make(
        [{"params": others, "weight_decay": 0.2}, {"params": moved, "weight_decay": 0.0}], lr=0.01
    )
    rest = {"qk": slice(2 * E, 3 * E), "ov": slice(0, 2 * E)}.get(forms, slice(0, 0))
    for step in range(3):
        x = inputs(6) + step
        for each, stepper in ((model, run.optimizer), (own, plain)):
            stepper.zero_grad()
            each(x).square().mean().backward()
            if each is own:
                penalty = (
                    by_definition(own, forms) + attention.in_proj_weight[rest].square().sum() / 2
                )
                for p, pull in zip(moved, torch.autograd.grad(penalty, moved), strict=True):
                    if make is torch.optim.SGD:
                        p.grad = p.grad + 0.2 * pull  # pyright: ignore
                    else:
                        p.data.sub_(0.01 * 0.2 * pull)
            stepper.step()
    for (name, a), (_, b) in zip(model.named_parameters(), own.named_parameters(), strict=True):
        # The bias of the keys has a gradient of rounding errors alone, which AdamW magnifies.
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(("forms", "low"), [("qk+ov", 2), ("qk", 4), ("none", 6)])
def test_sifd_leaves_the_heads_projections_dense(forms, low):
    model, x = tiny(), inputs(6)
    whole = model(x).detach()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    method = SIFD(ranks=12, attention=forms, keep_first=0, layers="layer.*")
    method.ranks = rankwise.ranks.Ratio(1.0, allow_growth=True)
    run = rankwise.start(model, method, optimizer)
    assert run.plan is not None
    assert len(run.plan.ranks) == low
    for product in head_products(model, forms):
        u, v = product.factors()
        torch.testing.assert_close(u.mT @ u, v @ v.mT, rtol=1e-9, atol=1e-12)
    # Full rank and balanced heads: the function is that of the dense model.
    torch.testing.assert_close(model(x).detach(), whole, rtol=1e-5, atol=1e-6)
    before = [p.detach().clone() for p in model.parameters()]
    model(x).square().mean().backward()
    run.optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_other_initialisations_leave_the_heads_as_they_are():
    model, own = tiny(), tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.1)
    method = SIFD(
        ranks=4, attention="qk+ov", init="variance", layers="layer.*", exclude="*.linear2"
    )
    rankwise.start(model, method, optimizer)
    torch.testing.assert_close(
        model.layer.self_attn.in_proj_weight, own.layer.self_attn.in_proj_weight, rtol=0, atol=0
    )
    assert isinstance(model.layer.linear2, nn.Linear)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_resume_with_heads_is_exact(make, tmp_path):
    def begin(**options: Any) -> Any:
        model = tiny()
        optimizer = make(model.parameters(), lr=0.01, weight_decay=0.1)
        method = SIFD(ranks=4, attention="qk", layers="layer.*")
        return rankwise.start(model, method, optimizer, **options)

    def train(run: Any, steps: range) -> None:
        for step in steps:
            run.optimizer.zero_grad()
            run.model(inputs(6) + step).square().mean().backward()
            run.optimizer.step()

    whole, half = begin(), begin()
    train(whole, range(4))
    train(half, range(2))
    rankwise.save(tmp_path, half)
    again = begin(resume=tmp_path)
    train(again, range(2, 4))
    for a, b in zip(whole.bare.parameters(), again.bare.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("forms", ["qk", "ov", "qk+ov"])
@pytest.mark.parametrize(
    "layers", ["*.linear1", "*.v", "*.out_proj", "*.q", "*.q,*.k", "*.in_proj"]
)
def test_decay_goes_on_where_an_attention_is_opened_or_factorised_at_the_switch(
    layers, forms, make, tmp_path
):
    """With l2 every part of the model decays as by the optimizer alone, before and after."""

    def begin(*beside: rankwise.Method, **options: Any) -> Any:
        model = tiny()
        optimizer = make(model.parameters(), lr=0.01, weight_decay=0.2)
        switch = rankwise.Pufferfish(ranks=4, layers=layers, warmup_steps=2)
        return rankwise.start(model, [switch, *beside], optimizer, **options)

    def train(run: Any, steps: range) -> None:
        for step in steps:
            run.optimizer.zero_grad()
            (run.model(inputs(6) + step) ** 2).mean().backward()
            run.optimizer.step()

    plain, run = begin(), begin(FactorDecay(decay="l2", attention=forms))
    for each in (plain, run):
        train(each, range(3))
    rankwise.save(tmp_path, run)
    again = begin(FactorDecay(decay="l2", attention=forms), resume=tmp_path)
    for each in (plain, run, again):
        train(each, range(3, 6))
    for (name, a), (_, b) in zip(
        run.bare.named_parameters(), plain.bare.named_parameters(), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    for a, b in zip(run.bare.parameters(), again.bare.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_strength_given_is_that_of_the_heads_and_of_nothing_else():
    """The packed values, which share a parameter with the heads, keep their own weight decay."""
    model = tiny()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, weight_decay=0.2)
    rankwise.start(model, [FactorDecay(decay="l2", attention="qk", strength=0.0)], optimizer)
    packed = model.layer.self_attn.in_proj_weight
    before = packed.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    expected = torch.cat([before[: 2 * E], before[2 * E :] * (1 - 0.01 * 0.2)])
    torch.testing.assert_close(packed.detach(), expected, rtol=1e-12, atol=1e-12)
