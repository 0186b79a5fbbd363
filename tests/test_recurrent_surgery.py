"""Recurrent layers under plan and surgery: the laws of low-rank layers, matrix by matrix.

T: steps, B: batch, I: input_size, H: hidden_size, R: rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence
from torch.testing import assert_close

import rankwise
from rankwise import accounting, ranks, structure
from rankwise.candidates import survey, unlisted
from rankwise.errors import FactorizeError, PlanError, SelectionError
from rankwise.layers import LowRankLinear, OpenRecurrent, recurrent_class
from rankwise.optim.rebind import rebind
from rankwise.ranks.automatic.tracking import weights_of
from rankwise.ranks.gains.recurrence import RecurrentWork

CELLS: tuple[type[nn.RNNBase], ...] = (nn.LSTM, nn.GRU)
# nn.LSTM's own remark on the CPU, once a process.
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections:UserWarning")
FULL = ranks.Ratio(1.0, allow_growth=True)


class Tagger(nn.Module):
    """Words in, a class at every step out."""

    encoder: Any

    def __init__(self, cell: Any = nn.LSTM, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 12)
        self.encoder = cell(12, 16, **{"num_layers": 2, "batch_first": True, **options})
        width = options.get("proj_size") or 16
        self.tags = nn.Linear(width * (2 if options.get("bidirectional") else 1), 5)

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = self.words(ids)
        if lengths is None:
            return self.tags(self.encoder(x)[0])
        packed = pack_padded_sequence(x, lengths, self.encoder.batch_first, False)
        y = self.encoder(packed)[0]
        assert isinstance(y, PackedSequence)
        return self.tags(y.data)


def tagger(cell: type[nn.RNNBase] = nn.LSTM, seed: int = 0, **options: Any) -> Tagger:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Tagger(cell, **options)


def ids(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 20, shape, generator=torch.Generator().manual_seed(seed))


KINDS = [
    (nn.LSTM, {}),
    (nn.LSTM, {"bidirectional": True, "bias": False}),
    (nn.LSTM, {"proj_size": 10, "batch_first": False}),
    (nn.GRU, {"bidirectional": True}),
]


# The laws


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("cell", "options"), KINDS)
def test_full_rank_is_the_dense_function_with_its_gradients(cell, options, packed):
    model = tagger(cell, **options)
    x = ids(4, 6) if options.get("batch_first", True) else ids(6, 4)
    sample = (x, torch.tensor([3, 6, 1, 5])) if packed else (x,)
    low = copy.deepcopy(model)
    rankwise.factorize(low, FULL, sample, layers="encoder.*")
    assert isinstance(low.encoder, OpenRecurrent)
    expected, y = model(*sample), low(*sample)
    assert_close(y, expected, rtol=1e-4, atol=1e-5)
    expected.square().sum().backward()
    y.square().sum().backward()
    assert_close(low.words.weight.grad, model.words.weight.grad, rtol=1e-3, atol=1e-5)
    rankwise.to_dense(low)
    assert type(low.encoder) is cell
    assert_close(low(*sample), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("cell", "options"), KINDS)
def test_a_plan_counts_what_the_model_then_has(cell, options):
    model = tagger(cell, **options)
    x = ids(4, 6) if options.get("batch_first", True) else ids(6, 4)
    decided = rankwise.plan(model, 4, x)
    matrices = [n for n in decided.ranks if n.startswith("encoder.")]
    assert matrices == [f"encoder.{n}" for n in OPENED[cell].like(model.encoder).matrices]
    low = copy.deepcopy(model)
    rankwise.factorize(low, decided)
    counted = [accounting.parameters(each).stored for each in (model, low)]
    assert decided.parameters == tuple(counted)
    assert decided.flops == (accounting.flops(model, x), accounting.flops(low, x))
    by_hand = 2 * 24 * (low.tags.weight.numel() + sum(4 * sum(s) for s in shapes(model.encoder)))
    assert accounting.flops(low, x) == by_hand
    lengths = torch.tensor([2, 6, 5, 1])[: x.shape[0]] if x.shape[0] == 4 else None
    if lengths is not None:
        assert accounting.flops(low, (x, lengths)) == by_hand * 14 // 24


def shapes(cell: nn.RNNBase) -> list[tuple[int, int]]:
    held = cell.named_parameters()
    return [(p.shape[0], p.shape[1]) for n, p in held if n.startswith("weight")]


OPENED: dict[type[nn.Module], Any] = {c: recurrent_class(c(2, 2)) for c in CELLS}


def test_each_matrix_is_truncated_as_a_whole_or_gate_by_gate():
    for split, blocks in ((False, 1), (True, 4)):
        model = tagger()
        dense = {n: p.detach().clone() for n, p in model.encoder.named_parameters()}
        rankwise.factorize(model, 3, layers="encoder.*", split=split)
        for name in model.encoder.matrices:
            child = getattr(model.encoder, name)
            assert isinstance(child, LowRankLinear)
            assert (child.rank, child.blocks) == (3, blocks)
            for mine, theirs in zip(
                child.weight.chunk(blocks), dense[f"weight_{name}"].chunk(blocks), strict=True
            ):
                u, s, vh = torch.linalg.svd(theirs, full_matrices=False)
                best = u[:, :3] * s[:3] @ vh[:3]
                assert_close(mine.detach(), best, rtol=1e-4, atol=1e-5)


def test_matrices_are_chosen_one_by_one_and_the_others_stay_what_they_were():
    model, x = tagger(), ids(4, 6)
    held = dict(model.encoder.named_parameters())
    expected = model(x)
    change = rankwise.factorize(model, FULL, layers="*.hh_l*", exclude="encoder.hh_l1")
    assert list(change.modules) == ["encoder", "encoder.hh_l0"]
    assert list(change.replaced) == [held["weight_hh_l0"]]
    encoder = model.encoder
    assert encoder.ih_l0.weight is held["weight_ih_l0"]
    assert encoder.hh_l1.weight is held["weight_hh_l1"]
    assert encoder.hh_l0.u.bias is held["bias_hh_l0"]
    assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    rankwise.to_dense(model)
    assert model.encoder.weight_ih_l0 is held["weight_ih_l0"]
    assert model.encoder.bias_hh_l0 is held["bias_hh_l0"]
    with pytest.raises(SelectionError, match=r"encoder \(LSTM\) holds layers: name them, as in 'e"):
        rankwise.plan(model, 4, layers="encoder")
    with pytest.raises(SelectionError, match=r"closest are 'encoder\.hh_l1'"):
        rankwise.plan(model, 4, layers="encoder.hh_l2")


def test_automatic_choice_keeps_the_papers_first_layers_by_execution():
    model = nn.ModuleDict({"a": nn.LSTM(8, 8, 2), "b": nn.Linear(8, 3)})
    assert list(rankwise.plan(model, 2).ranks) == ["a.hh_l0", "a.ih_l1", "a.hh_l1"]
    assert list(rankwise.plan(model, 2, keep_first=3).ranks) == ["a.hh_l1"]
    assert next(iter(rankwise.plan(tagger(), 2).ranks)) == "encoder.ih_l0"  # words come first


@pytest.mark.parametrize("cell", CELLS)
def test_structure_is_data(cell):
    model, x = tagger(cell), ids(4, 6)
    fresh = copy.deepcopy(model)
    rankwise.factorize(model, 4, layers="encoder.ih_l0,encoder.hh_*", split=True)
    plan = rankwise.read_plan(model)
    assert next(iter(plan)) == "encoder"
    rankwise.impose_plan(fresh, plan)
    fresh.load_state_dict(model.state_dict())
    assert_close(fresh(x), model(x), rtol=0, atol=0)
    assert rankwise.read_plan(fresh) == plan
    assert not rankwise.impose_plan(fresh, plan)


def test_a_plan_of_another_recurrent_layer_is_refused():
    model = tagger()
    rankwise.factorize(model, 4, layers="encoder.*")
    plan = rankwise.read_plan(model)
    for other, words in (
        (tagger(num_layers=1), "encoder is {'kind': 'lstm', 'shape': [12, 16, 0], 'layers': 1"),
        (tagger(nn.GRU), "encoder is {'kind': 'gru'"),
        (nn.ModuleDict({"decoder": nn.LSTM(12, 16)}), "unknown recurrent layer 'encoder'; did"),
    ):
        before = repr(other)
        with pytest.raises(PlanError) as caught:
            structure.impose_plan(other, plan)
        assert words in str(caught.value)
        assert repr(other) == before
    broken = {**plan, "encoder": {**plan["encoder"], "layers": "two"}}
    with pytest.raises(
        PlanError, match=r"the spec's layers is 'two'; a spec looks like {'kind': 'ls"
    ):
        structure.impose_plan(tagger(), broken)


@pytest.mark.parametrize("split", [False, True])
def test_the_optimizer_follows_with_its_moments(split):
    model, x = tagger(), ids(4, 6)
    optimizer = torch.optim.Adam(model.parameters())
    model(x).square().sum().backward()
    optimizer.step()
    old = dict(model.encoder.named_parameters())
    moments = {name: optimizer.state[p]["exp_avg"].clone() for name, p in old.items()}
    rebind(optimizer, rankwise.factorize(model, 3, layers="encoder.*", split=split))
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())
    for name in model.encoder.matrices:
        child = getattr(model.encoder, name)
        (u, v), m = child.factors(), child.as_matrix(moments[f"weight_{name}"], child.blocks)
        carried = optimizer.state[child.u.weight]["exp_avg"]
        assert_close(child.to_factor("u", carried), m @ v.mT, rtol=1e-4, atol=1e-7)
        carried = optimizer.state[child.v.weight]["exp_avg"]
        assert_close(child.to_factor("v", carried), u.mT @ m, rtol=1e-4, atol=1e-7)
        bias = optimizer.state[child.u.bias]["exp_avg"]
        assert_close(bias, moments[f"bias_{name}"], rtol=0, atol=0)


def test_an_averaged_copy_gets_the_same_matrices():
    model, x = tagger(), ids(4, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = torch.optim.swa_utils.AveragedModel(model)
    run = rankwise.start(model, rankwise.Pufferfish(ranks=4, warmup_steps=1), optimizer)
    run.follow(average)
    model(x).square().mean().backward()
    optimizer.step()
    assert rankwise.read_plan(average.module) == rankwise.read_plan(model)
    average.update_parameters(model)
    assert_close(average(x), model(x), rtol=1e-4, atol=1e-5)


def test_ranks_are_changed_in_place():
    model, x = tagger(), ids(4, 6)
    rankwise.factorize(model, 8, layers="encoder.*")
    optimizer = torch.optim.Adam(model.parameters())
    model(x).square().sum().backward()
    optimizer.step()
    change = ranks.shrink(model, ranks={"encoder.hh_l0": 3})
    rebind(optimizer, change)
    assert model.encoder.hh_l0.rank == 3
    assert set(optimizer.param_groups[0]["params"]) == set(model.parameters())
    assert rankwise.read_plan(model)["encoder.hh_l0"]["rank"] == 3


@pytest.mark.parametrize("cell", CELLS)
def test_updates_are_trained_beside_recurrent_weights_and_merged(cell):
    model, x = tagger(cell), ids(4, 6)
    dense, held = model(x).detach(), dict(model.encoder.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    run = rankwise.start(model, rankwise.LoRA(rank=2, layers="encoder.*hh*"), optimizer)
    assert_close(model(x), dense, rtol=1e-5, atol=1e-6)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
    trained = model(x).detach()
    assert float((trained - dense).abs().max()) > 1e-3
    run.finish()
    rankwise.to_dense(model)
    assert_close(model(x), trained, rtol=1e-4, atol=1e-5)
    assert model.encoder.weight_ih_l0 is held["weight_ih_l0"]
    before = dict(tagger(cell).encoder.named_parameters())
    moved = {n for n, p in model.encoder.named_parameters() if (p - before[n]).any()}
    assert moved == {"weight_hh_l0", "weight_hh_l1"}
    adapted = tagger(cell)
    rankwise.start(
        adapted,
        rankwise.LoRA(rank=2, dropout=0.5, layers="encoder.*"),
        torch.optim.SGD(adapted.parameters(), lr=1.0),
    )
    with pytest.raises(FactorizeError, match=r"ih_l0 drops inputs of its update \(dropout=0.5\)"):
        adapted(x)


# What cannot be


def weight_normed() -> nn.Module:
    model = tagger()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model.encoder, "weight_hh_l0")  # pyright: ignore[reportDeprecated]
    return model


def patched() -> nn.Module:
    model = tagger()
    model.encoder.forward = model.encoder.forward
    return model


def tied() -> nn.Module:
    model = nn.ModuleDict({"encoder": nn.LSTM(8, 8), "other": nn.LSTM(8, 8)})
    model["other"].weight_hh_l0 = model["encoder"].weight_hh_l0
    return model


def half_integer() -> nn.Module:
    model = tagger()
    weight = model.encoder.weight_hh_l0.detach()
    kind = type("Quantised", (nn.Parameter,), {})
    model.encoder.weight_hh_l0 = kind(weight)
    return model


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (weight_normed, "weights of its recurrent layer are computed from others"),
        (patched, "the forward of its LSTM was replaced on the instance"),
        (tied, "its weight is also other.weight_hh_l0, which stays dense"),
        (half_integer, "its weight is a Quantised, no plain tensor"),
        (lambda: nn.LSTM(8, 8), "the model is this LSTM itself"),
    ],
)
def test_what_cannot_be_opened_says_why(make: Callable[[], nn.Module], words: str):
    model = make()
    name = "hh_l0" if isinstance(model, nn.LSTM) else "encoder.hh_l0"
    found = survey(model)[name]
    assert words in found.obstacle
    assert found.shape == tuple(found.module.weight.shape)  # pyright: ignore
    with pytest.raises(FactorizeError, match=f"{name} cannot be low-rank"):
        rankwise.factorize(model, {name: 2})


def test_no_batch_statistics_over_codes_of_a_sequence():
    model = tagger()
    with pytest.raises(SelectionError, match="codes of a recurrent layer are made step by step"):
        rankwise.factorize(model, 4, layers="encoder.*", norm=True)
    rankwise.factorize(model, {"encoder.ih_l0": 4})  # open now: the same
    assert "step by step" in reasons(model, norm=True)["encoder.hh_l0"]


def reasons(model: nn.Module, **options: Any) -> dict[str, str]:
    return {
        line.name: line.reason for line in rankwise.plan(model, 2, layers="*", **options).layers
    }


def test_kinds_without_a_low_rank_form_are_still_named():
    model = nn.ModuleDict({"rnn": nn.RNN(8, 8), "cell": nn.LSTMCell(8, 8), "lstm": nn.LSTM(8, 8)})
    assert unlisted(model, survey(model)) == {"rnn": "RNN", "cell": "LSTMCell"}


# What a forward says of them


@pytest.mark.parametrize("opened", [False, True])
def test_a_trace_sees_every_matrix_in_order_and_on_which_steps(opened):
    model = tagger(bidirectional=True)
    if opened:
        rankwise.factorize(model, {"encoder.hh_l0": 4})
    trace = accounting.trace(model, ids(3, 5))
    names = [n for n in trace.order if n.startswith("encoder")]
    assert names == [
        f"encoder.{n}" for n in OPENED[nn.LSTM].like(tagger(bidirectional=True).encoder).matrices
    ]
    calls = {name: trace.calls[f"encoder.{name}"] for name in ("ih_l0", "hh_l0", "ih_l1_reverse")}
    assert [(c.input, c.output) for each in calls.values() for c in each] == [
        ((3, 5, 12), (5, 3, 64)),
        ((3, 5, 16), (5, 3, 64)),
        ((3, 5, 32), (5, 3, 64)),
    ]
    assert not trace.reads
    watcher = accounting.watch(model)
    model(ids(3, 5))
    assert watcher.trace == trace
    packed = accounting.trace(model, (ids(3, 5), torch.tensor([5, 2, 1])))
    assert packed.calls["encoder.hh_l0"][0].input == (8, 16)
    assert packed.calls["encoder.hh_l0"][0].output == (5, 3, 64)


def test_a_recurrent_stem_is_the_first_to_meet_the_input():
    model = nn.ModuleDict({"a": nn.GRU(8, 8, batch_first=True)})
    model.forward = lambda x: model["a"](x)[0]
    trace = accounting.trace(model, torch.zeros(2, 3, 8))
    assert trace.stems == ("a.ih_l0",)
    assert trace.calls["a.hh_l0"][0].output == (3, 2, 24)


@pytest.mark.parametrize("cell", CELLS)
def test_flops_are_those_of_the_matrices_whatever_kernel_runs(cell):
    model = tagger(cell)

    class NeedsValues(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            assert int(x.sum()) >= 0
            return self.inner(x)

    x = ids(2, 5)
    by_hand = 2 * 10 * (sum(m * n for m, n in shapes(model.encoder)) + model.tags.weight.numel())
    assert accounting.flops(model, x) == by_hand
    assert accounting.flops(NeedsValues(), x) == by_hand
    assert len(model.encoder._forward_hooks) == 0


# Time


def test_recurrent_matrices_are_timed_in_their_loop(monkeypatch):
    model, x = tagger(proj_size=10), ids(3, 5)
    trace = accounting.trace(model, x)
    decided = rankwise.plan(model, 4, trace=trace)
    ran: dict[str, list[Any]] = {}

    def timer(each: Any, times: int) -> float:
        each()
        kind = type(each.layer).__name__
        ran.setdefault(f"{type(each.work).__name__} {each.work.input}", []).append(kind)
        return 1e-3 * (each.rank or 100)

    gains = ranks.measure_gains(
        model, trace, decided, cache=None, timer=timer, ratios=(1 / 2,), multiple=1, batch=6
    )
    assert {key: set(kinds) for key, kinds in ran.items()} == {
        "Work (6, 5, 12)": {"Linear", "LowRankLinear"},
        "RecurrentWork (5, 6, 10)": {"LowRankLSTM"},
        "RecurrentWork (5, 6, 16)": {"LowRankLSTM"},
        "Work (6, 5, 10)": {"Linear", "LowRankLinear"},
    }
    assert gains.at("encoder.hh_l0", 5) == pytest.approx(20)
    assert {gains.layers[name].stack for name in decided.ranks} == {"encoder"}
    assert "in the loop of LSTM (16, 10)" in gains.layers["encoder.hr_l1"].what
    assert not any(layer.problem for layer in gains.layers.values())


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("cell", CELLS)
def test_the_timed_layer_is_that_of_the_model_with_one_matrix_low_rank(cell, dtype):
    dense = nn.Linear(16, 16 * (4 if cell is nn.LSTM else 3))
    sizes: Any = {"recurrent": OPENED[cell], "sizes": (16, 0)}
    cpu = torch.device("cpu")
    work = RecurrentWork(
        dense, LowRankLinear, {"blocks": 1}, (5, 3, 16), False, cpu, dtype, **sizes
    )
    source = torch.Generator().manual_seed(0)
    plain = work.dense_layer(source)
    low = work.low_rank_layer(plain, 4, source)
    held = [type(getattr(low, n)).__name__ for n in plain.matrices]
    assert held == ["Linear", "LowRankLinear"]
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        outputs = [layer(work.example(layer, source))[0].shape for layer in (plain, low)]
    assert outputs == [(5, 3, 16)] * 2


def test_stable_ranks_are_followed_before_and_after_the_opening():
    model = tagger()
    decided = rankwise.plan(model, ranks.Later(ranks.as_rule(0.25), "later"))
    followed = ranks.StableRanks().measure(weights_of(model, decided))
    for name, rank in followed.items():
        weight = getattr(model.encoder, f"weight_{name.rpartition('.')[2]}").detach()
        exact = ranks.estimators.stable_rank(torch.linalg.svdvals(weight))
        assert rank == pytest.approx(float(exact), rel=0.05)
    assert len(followed) == 4
    rankwise.factorize(model, {"encoder.hh_l0": 4})
    decided = rankwise.plan(model, ranks.Later(ranks.as_rule(0.25), "later"))
    again = ranks.StableRanks().measure(weights_of(model, decided))
    assert again.keys() == followed.keys() - {"encoder.hh_l0"}


# Elsewhere


def test_factorised_layers_compile_in_one_graph():
    model, x = tagger().eval(), ids(4, 6)
    rankwise.factorize(model, 4, layers="encoder.*")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")  # torch's own
@pytest.mark.parametrize("cell", CELLS)
def test_export_to_onnx_says_the_same(cell, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = tagger(cell).eval(), ids(4, 6)
    rankwise.factorize(model, 4, layers="encoder.*")
    path = tmp_path / "tagger.onnx"
    exported: Any = torch.onnx.export(model, (x,), dynamo=True, verbose=False)
    exported.save(path)
    session = onnxruntime.InferenceSession(path)
    (name,) = (given.name for given in session.get_inputs())
    (y,) = session.run(None, {name: x.numpy()})
    assert_close(torch.from_numpy(y), model(x).detach(), rtol=1e-4, atol=1e-5)
