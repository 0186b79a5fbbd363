"""AdaLoRA: its regulariser, scores and budget against PEFT's; ranks that really shrink."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

import rankwise
from rankwise import distributed
from rankwise.errors import CompositionError, FactorizeError, OptionError, PlanError
from rankwise.layers import AdaptedLayer, adapted_layers, low_rank_class
from rankwise.models.from_transformers import hide_broken_torchvision
from rankwise.updates import Opening, adapt
from rankwise.updates.orthogonality import add_orthogonality_
from rankwise.updates.triplets import Triplets, _heads
from test_distributed import Workers, together  # noqa: F401

T, BEGINS, ENDS, EVERY = 24, 4, 16, 3
SHORT: dict[str, Any] = {
    "initial_rank": 4,
    "target_rank": 2,
    "warmup": BEGINS,
    "final": T - ENDS,
    "every": EVERY,
}


class Net(nn.Module):
    """A tied embedding and head, a convolution with groups, a fused projection, linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 8, padding_idx=0)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.qkv = nn.Linear(8, 24)
        self.fc = nn.Linear(24, 8, bias=False)
        self.head = nn.Linear(8, 13, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.conv(self.embed(tokens).mT).mT.tanh()
        return self.head(self.fc(self.qkv(x).tanh()))


def net(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return Net()


def batch(i: int, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + i)
    tokens = torch.randint(13, (2, 8, 7), generator=generator)
    x, y = (each.chunk(parts)[part] for each in tokens)
    return x, y


def begin(model: Any, *, optimizer: Any = None, **options: Any) -> rankwise.Run:
    start = {k: options.pop(k) for k in ("resume", "wrap", "probe") if k in options}
    method = rankwise.AdaLoRA(**{**SHORT, "layers": "*", "split": True, **options})
    make = optimizer or (lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True))
    return rankwise.start(model, method, make(model.parameters()), total_steps=T, **start)


def train(run: rankwise.Run, until: int) -> rankwise.Run:
    while run.step < until:
        x, y = batch(run.step, distributed.worker(), distributed.workers())
        run.optimizer.zero_grad()
        F.cross_entropy(run.model(x).flatten(0, 1), y.flatten()).backward()
        run.optimizer.step()
    return run


def triplets(run: rankwise.Run) -> Triplets:
    method: Any = run.methods[0]
    return method.triplets


# ------------------------------------------------------------------------------- the regulariser


KINDS: dict[str, Any] = {
    "linear": lambda: nn.Linear(6, 9),
    "fused": lambda: nn.Linear(5, 12),
    "grouped": lambda: nn.Conv1d(4, 6, 3, groups=2),
    "conv2d": lambda: nn.Conv2d(3, 8, 3),
    "transposed": lambda: nn.ConvTranspose2d(4, 5, 3, groups=1),
    "embedding": lambda: nn.Embedding(11, 6),
}


def adapted(kind: str) -> AdaptedLayer:
    torch.manual_seed(0)
    dense: Any = KINDS[kind]().double()
    if kind == "conv2d":
        dense.to(memory_format=torch.channels_last)
    stand_in: Any = low_rank_class(dense)
    blocks = 3 if kind == "fused" else stand_in.blocks_of(dense)
    layer = AdaptedLayer.of(dense, stand_in, 2, blocks=blocks, diagonal=True)
    layer.restart_("kaiming", torch.Generator().manual_seed(1))
    return layer


def test_the_regularisers_gradient_is_that_of_autograd() -> None:
    layers = [adapted(kind) for kind in KINDS]
    heads: Any = [layer.heads[0] for layer in layers]
    norms = []
    for head in heads:
        for part in ("u", "v"):
            factor = head.to_factor(part, getattr(head, part).weight)
            for block in factor if head.blocks > 1 else [factor]:
                gram = block.mT @ block if part == "u" else block @ block.mT
                norms.append(torch.linalg.matrix_norm(gram - torch.eye(2)))
    assert len(norms) == 2 * (1 + 3 + 2 + 1 + 1 + 1)
    weights = [w for head in heads for w in (head.u.weight, head.v.weight)]
    expected = torch.autograd.grad(0.3 * torch.stack(norms).mean(), weights)
    weights[0].grad = torch.ones_like(weights[0])  # of the loss; the others have none yet
    add_orthogonality_(heads, 0.3)
    torch.testing.assert_close(weights[0].grad, expected[0] + 1)
    for weight, theirs in zip(weights[1:], expected[1:], strict=True):
        torch.testing.assert_close(weight.grad, theirs)


def test_orthonormal_factors_are_left_alone() -> None:
    layer: Any = adapted("linear")
    head = layer.heads[0]
    with torch.no_grad():
        head.u.weight.copy_(torch.eye(9, 2))
        head.v.weight.copy_(torch.eye(2, 6))
    add_orthogonality_([head], 0.3)
    assert not head.u.weight.grad.any()
    assert not head.v.weight.grad.any()


# ------------------------------------------------------------------------------------ the budget


def test_the_budget_is_spent_exactly_at_every_allocation() -> None:
    run = begin(net(), shrink="none")
    matrices = triplets(run).matrices
    assert matrices == 1 + 2 + 3 + 1  # the tied head is the embedding
    spent = {}
    for step in range(1, T + 1):
        train(run, step)
        held = triplets(run)
        values = torch.cat([head.core.weight for head in held.heads.values()])
        if step in (6, 9, 12, 15, 16) or step > ENDS:
            spent[step] = int((values != 0).sum())
            assert sum(held.ranks.values()) == spent[step]
        else:  # masked ones go on learning between allocations
            assert values.all()
    falls = {t: 28 - 14 + int(14 * (1 - (t - 4) / 12) ** 3) for t in (6, 9, 12, 15, 16)}
    assert spent == falls | dict.fromkeys(range(ENDS + 1, T + 1), 14)


def test_ties_are_broken_in_the_order_of_layers() -> None:
    model = net()
    adapt(model, Opening(rank=4, diagonal=True), "fc,qkv")
    held = Triplets(model, 0.85, 0.85)
    held.allocate(5)
    masks = [mask.tolist() for mask in held.kept.values()]
    assert masks == [[True] * 4, [True, False, False, False]]


def test_masked_triplets_return_while_the_budget_falls() -> None:
    model = net()
    adapt(model, Opening(rank=4, diagonal=True), "fc,qkv")
    held = Triplets(model, 0.85, 0.85)
    favourites = []
    for budget, large in ((6, "fc"), (5, "qkv")):
        for step in range(1, 6):
            for name, head in held.heads.items():
                for weight in head.parameters():
                    weight.grad = torch.full_like(weight, step * (10.0 if large in name else 0.1))
            held.weigh()
        held.allocate(budget)
        favourites.append([kept.sum().item() for kept in held.kept.values()])
    assert favourites == [[2, 4], [4, 1]]
    assert [idle.max().item() for idle in held.idle.values()] == [0, 1]


# ------------------------------------------------------------------------------ PEFT's AdaLoRA


class WithLoss(nn.Module):
    """As PEFT wants it: its regulariser joins a loss that the model returns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(7, 9), nn.Linear(9, 6)
        self.third = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Any:
        y = self.third(self.second(self.first(x).tanh()).tanh())
        return SimpleNamespace(loss=(y.square() - y).mean())


def theirs(model: nn.Module) -> Any:
    hide_broken_torchvision()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        peft: Any = pytest.importorskip("peft")
    config = peft.AdaLoraConfig(
        init_r=4,
        target_r=2,
        tinit=BEGINS,
        tfinal=T - ENDS,
        deltaT=EVERY,
        total_step=T,
        lora_alpha=8,
        orth_reg_weight=0.1,
        target_modules=["first", "second"],
    )
    return peft.get_peft_model(model, config)


def test_scores_masks_and_weights_are_those_of_peft() -> None:
    """Gradients are each one's own: 24 steps of Adam from the same weights, in float64."""
    peft = theirs(WithLoss().double())  # its base_model is what adds the regulariser
    model: Any = WithLoss().double()
    scale = 8 * 4 / (4 + 1e-5)  # its scale is alpha / (rank + 1e-5)
    method = rankwise.AdaLoRA(**SHORT, alpha=scale, layers="first,second", shrink="none")
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    run = rankwise.start(model, method, optimizer, total_steps=T)
    names = ("first", "second")
    own = {name: getattr(model, name).heads[0] for name in names}
    their: Any = {name: getattr(peft.base_model.model, name) for name in names}
    with torch.no_grad():
        for name in names:
            their[name].lora_A.default.copy_(own[name].v.weight)
            their[name].lora_B.default.copy_(own[name].u.weight)
    # It leaves `ranknum`, the denominator of its scale, to the optimizer as well: not to ours.
    learned = [p for n, p in peft.named_parameters() if "lora_" in n]
    their_optimizer = torch.optim.Adam(learned, lr=1e-2)
    allocator = peft.base_model.rankallocator
    pattern: Any = None
    for step in range(1, T + 1):
        x = torch.randn(8, 7, generator=torch.Generator().manual_seed(step)).double()
        for each, net_ in ((their_optimizer, peft.base_model), (optimizer, model)):
            each.zero_grad()
            net_(x=x).loss.backward()
        if step < ENDS:
            allocator.update_ipt(peft)  # before the step, as the paper defines it
        their_optimizer.step()
        optimizer.step()
        if step < ENDS:
            scores = method.triplets.scores()
            for name in names:
                score = {k: allocator._element_score(f"base_model.model.{name}.lora_{k}.default")
                         for k in "AEB"}  # fmt: skip
                expected = score["E"][:, 0] + score["A"].mean(1) + score["B"].mean(0)
                actual = scores[f"{name}.heads.0"]
                torch.testing.assert_close(actual, expected, rtol=1e-7, atol=0)
        budget, due = allocator.budget_schedule(step)
        assert budget == method.budget.at(step, 2)
        if step <= ENDS and (due or step == ENDS):
            pattern = allocator.mask_to_budget(peft, budget)
            mine = torch.cat(list(method.triplets.kept.values()))
            assert mine.tolist() == [kept for row in pattern.values() for kept in row]
        elif step > ENDS:
            allocator.mask_using_rank_pattern(peft, pattern)
        for name in names:
            for ours, other in (
                (own[name].v.weight, their[name].lora_A.default),
                (own[name].core.weight, their[name].lora_E.default[:, 0]),
                (own[name].u.weight, their[name].lora_B.default),
            ):
                torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-9)
    assert run.step == T


# -------------------------------------------------------------------------- ranks really shrink


def test_tensors_moments_and_importance_keep_the_numbers_of_what_stays() -> None:
    run = begin(net(), shrink="eager", patience=1)
    train(run, 6)
    before = {n: copy.deepcopy(h) for n, h in triplets(run).heads.items()}
    state = {n: [{k: v.clone() for k, v in run.optimizer.state[getattr(h, p).weight].items()}
                 for p in ("u", "core", "v")] for n, h in triplets(run).heads.items()}  # fmt: skip
    importance = {k: v.clone() for k, v in triplets(run)._importance.items()}
    kept = triplets(run)
    kept.allocate(14)
    masks = {n: m.clone() for n, m in kept.kept.items()}
    change = kept.drop(run.bare)
    rebound = rankwise.rebind(run.optimizer, change)
    assert rebound.carried == len(change.replaced)
    assert rebound.fresh == 0
    for name, head in kept.heads.items():
        if head.blocks > 1:
            assert head.rank == max(1, int(masks[name].view(head.blocks, -1).sum(-1).max()))
            continue
        stays = masks[name] if masks[name].any() else torch.arange(4) == 0
        old: Any = before[name]
        old.core.weight.data.mul_(masks[name])
        u, c, v = old.factors()
        expected = (u[:, stays], c[stays][:, stays], v[stays])
        torch.testing.assert_close(head.factors(), expected, rtol=0, atol=0)
        torch.testing.assert_close(
            kept._importance[f"{name}.v"], importance[f"{name}.v"][stays], rtol=0, atol=0
        )
        for part, then in zip(("u", "core", "v"), state[name], strict=True):
            now = run.optimizer.state[getattr(head, part).weight]
            for key in ("exp_avg", "exp_avg_sq"):
                moment = then[key][:, stays] if part == "u" else then[key][stays]
                torch.testing.assert_close(now[key], moment, rtol=0, atol=0)
            assert now["step"] == then["step"]


@pytest.mark.parametrize("shrink", ["final", "eager"])
def test_shrinking_leaves_the_function_as_it_is(shrink: str) -> None:
    def probe(model: nn.Module) -> float:
        with torch.no_grad():
            return float(model(batch(50)[0]).double().square().sum())

    model = net().double()
    run = begin(model, shrink=shrink, every=1, patience=2, probe=probe)
    sizes = [sum(p.numel() for p in model.parameters())]
    for step in range(1, T + 1):
        train(run, step)
        sizes.append(sum(p.numel() for p in model.parameters()))
    events = [e for e in run.events if e["event"] == "ranks"]
    assert [e["step"] for e in events][-1] == ENDS
    assert len(events) == 1 if shrink == "final" else 1 < len(events) < 5
    for event in events:
        assert event["loss_after"] == pytest.approx(event["loss_before"], rel=1e-12)
        assert event["moments"]["fresh"] == 0
    assert [i for i in range(1, T + 1) if sizes[i] < sizes[i - 1]] == [e["step"] for e in events]
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    assert set(held) == {p for p in model.parameters() if p.requires_grad}
    assert len(held) == len(set(held))
    assert not triplets(run)._importance


def test_a_run_that_shrinks_is_the_run_that_masks() -> None:
    """Without the regulariser, which pulls at masked factors as well, the two are one."""
    ends = []
    for shrink in ("final", "none"):
        run = train(begin(net().double(), shrink=shrink, gamma=0.0), T)
        ends.append(run.finish().state_dict())
    torch.testing.assert_close(ends[0], ends[1], rtol=1e-9, atol=1e-12)


def test_an_update_of_rank_0_stays_as_one_triplet_at_zero() -> None:
    torch.manual_seed(0)
    model: Any = nn.ModuleDict({"used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    method = rankwise.AdaLoRA(**SHORT, layers="*", gamma=0.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = rankwise.start(model, method, optimizer, total_steps=T)
    for step in range(T):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        # The second layer matters so little that the first one takes the whole budget.
        (model["used"](x) + 1e-4 * model["idle"](x)).square().mean().backward()
        optimizer.step()
    assert method.triplets.ranks == {"used.heads.0": 4, "idle.heads.0": 0}
    assert (model["used"].rank, model["idle"].rank) == (4, 1)
    assert not model["idle"].open_update().any()
    before = model["idle"].base.weight.clone()
    run.finish()
    torch.testing.assert_close(model["idle"].weight, before, rtol=0, atol=0)


# ------------------------------------------------------------------------- resume, copies, workers


@pytest.mark.parametrize("shrink", ["final", "eager", "none"])
def test_resume_is_exact_around_allocations_and_shrinks(shrink: str, tmp_path: Path) -> None:
    options: Any = {"shrink": shrink, "every": 2, "patience": 1}
    whole = train(begin(net(), **options), T)
    part = begin(net(), **options)
    for stop in (5, 6, 7, 8, 15, 16, 17):
        train(part, stop)
        rankwise.save(tmp_path, part)
        part = begin(net(seed=stop), resume=tmp_path, **options)
    train(part, T)
    assert rankwise.read_plan(part.bare) == rankwise.read_plan(whole.bare)
    torch.testing.assert_close(part.bare.state_dict(), whole.bare.state_dict(), rtol=0, atol=0)
    ours, theirs_ = part.optimizer.state_dict()["state"], whole.optimizer.state_dict()["state"]
    torch.testing.assert_close(ours, theirs_, rtol=0, atol=0)
    tied: Any = part.bare
    assert tied.embed.heads[0].u.weight is tied.head.heads[0].u.weight
    torch.testing.assert_close(part.finish().state_dict(), whole.finish().state_dict())


def test_a_plan_is_imposed_on_updates_of_another_rank() -> None:
    model, other = net(), net()
    for each, rank in ((model, 4), (other, 2)):
        adapt(each, Opening(rank=rank, diagonal=True), "*")
    change = rankwise.impose_plan(model, rankwise.read_plan(other))
    assert rankwise.read_plan(model) == rankwise.read_plan(other)
    assert set(change.modules) == {f"{n}.heads.0" for n in adapted_layers(model)}
    model.load_state_dict(other.state_dict())
    assert model.embed.heads[0].core is model.head.heads[0].core


def test_an_average_follows_the_ranks() -> None:
    run = begin(net(), shrink="eager", every=1, patience=2)
    average = AveragedModel(run.bare, avg_fn=lambda a, b, _: 0.5 * a + 0.5 * b)
    run.follow(average)
    inner: Any = average.module
    shrinks = 0
    for step in range(1, T + 1):
        before = {name: head.factors() for name, head in _heads(inner).items()}
        train(run, step)
        for name, head in _heads(inner).items():
            if head.rank < before[name][0].shape[-1]:
                # The best fit of what it was in the row space that the model has kept.
                u, c, v = before[name]
                _, core, rows = _heads(run.bare)[name].factors()
                kept = core @ rows
                fitted = u @ c @ v @ torch.linalg.pinv(kept) @ kept
                u, c, v = head.factors()
                torch.testing.assert_close(u @ c @ v, fitted, rtol=1e-3, atol=1e-6)
                shrinks += 1
        average.update_parameters(run.bare)
    assert shrinks
    assert rankwise.read_plan(inner) == rankwise.read_plan(run.bare)
    assert inner.embed.heads[0].u.weight is inner.head.heads[0].u.weight


def _train() -> tuple[Any, Any, Any]:
    # Other initial weights on worker 1: the first wrap gives it worker 0's.
    run = begin(net(distributed.worker()), wrap=distributed.wrap, shrink="eager", every=2)
    train(run, T)
    return rankwise.read_plan(run.bare), run.bare.state_dict(), run.optimizer.state_dict()["state"]


def test_two_workers_agree(together: Workers) -> None:  # noqa: F811
    first, second = together(_train)
    assert first[0] == second[0]
    torch.testing.assert_close(second[1:], first[1:], rtol=0, atol=0)
    alone = train(begin(net(), shrink="eager", every=2), T)
    assert sum(spec["rank"] for spec in first[0].values()) == pytest.approx(
        sum(spec["rank"] for spec in rankwise.read_plan(alone.bare).values()), abs=2
    )


# ------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "total", "words"),
    [
        ({}, None, r"must know how long that is; pass rankwise\.start\(\.\.\., total_steps="),
        ({"target_rank": 5}, T, "target_rank=5 is above initial_rank=4, but ranks only fall"),
        ({"warmup": 0.5, "final": 12}, T, "are 12 and 12 of the 24 steps .* leaves none"),
    ],
)
def test_a_budget_that_cannot_fall_is_refused(options: Any, total: Any, words: str) -> None:
    model, method = net(), rankwise.AdaLoRA(**{**SHORT, **options})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(OptionError, match=words):
        rankwise.start(model, method, optimizer, total_steps=total)


@pytest.mark.parametrize("other", [rankwise.LoRAPlus(), rankwise.GaLore(), rankwise.LoRA()])
def test_methods_that_do_not_go_with_it_are_refused_with_the_reason(other: Any) -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(CompositionError, match="do not go together"):
        rankwise.start(model, [rankwise.AdaLoRA(**SHORT), other], optimizer, total_steps=T)


def test_layers_that_cannot_be_scored_or_are_too_small_are_refused() -> None:
    model: Any = nn.Sequential(nn.Embedding(20, 8, sparse=True), nn.Linear(8, 20))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(FactorizeError, match=r"0.heads.0: .*sparse gradients"):
        rankwise.start(model, rankwise.AdaLoRA(**SHORT, layers="0"), optimizer, total_steps=T)
    with pytest.raises(PlanError, match=r"1 .*rank 12 does not fit"):
        rankwise.start(model, rankwise.AdaLoRA(layers="1"), optimizer, total_steps=T)
