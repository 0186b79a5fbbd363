"""The shared battery: every entry of METHODS passes it; a new method adds one line to SETTINGS."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import rankwise
from rankwise.errors import SelectionError
from rankwise.layers import LowRankLayer, adapted_layers
from rankwise.method import Method
from rankwise.methods import METHODS
from rankwise.options import build

STEPS = 12
# Settings short enough for a test: name -> (constructor arguments, changes of structure).
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "adalora": [
        {"initial_rank": 4, "target_rank": 2, "every": 2, "others": "all"},
        {
            "initial_rank": 4,
            "target_rank": 1,
            "every": 1,
            "warmup": 2,
            "final": 3,
            "shrink": "eager",
            "patience": 2,
            "layers": "*",
        },
    ],
    "apollo": [{"rank": 4, "every": 5}],
    "apollo-mini": [{"every": 5, "scale": 16.0}],
    "cuttlefish": [
        {"ranks": 4, "gains": "none"},
        {"ranks": 4, "gains": "none", "observe_every": 1, "latest": 0.25, "norm": True},
        {"ranks": 4, "gains": "none", "compat": "cifar"},
        {"ranks": 8, "gains": "none", "adapt": "shrink", "adapt_every": 2, "adapt_energy": 0.5},
    ],
    "dense": [{}],
    "dion": [{"rank": 4}],
    "factor-decay": [{}, {"decay": "frobenius+0.1*l2", "strength": 0.01}],
    "factorized": [{"ranks": 4}, {"ranks": 4, "init": "variance"}],
    "fira": [{"rank": 4, "every": 5}],
    "frugal": [{"rank": 4, "every": 5}],
    "galore": [
        {"rank": 4, "every": 5},
        {"rank": 4, "every": 3, "side": "both", "moments": "rotate", "stagger": False},
    ],
    "ldadam": [{"rank": 4}],
    "qgalore": [{"rank": 4, "every": 2}],
    "tracked": [{"rank": 4}, {"rank": 4, "residual": True}],
    "lora": [{"rank": 4, "others": "all"}, {"rank": 2, "rslora": True, "layers": "*"}],
    "lora-plus": [{"ratio": 4.0}],
    "lte": [
        {"rank": 2, "heads": 4, "alpha": 8.0, "merge_every": 3},
        {"rank": 2, "heads": 3, "alpha": 8.0, "mode": "sequential", "layers": "*"},
    ],
    "multi-head-galore": [
        {"heads": 4, "rank": 4, "merge_every": 3, "scale": 1.0},
        {"heads": 1, "rank": 3, "merge_every": 4, "moments": "rotate"},
    ],
    "pufferfish": [
        {"ranks": 4, "warmup_steps": 5},
        {"ranks": 4, "warmup_steps": 5, "norm": True},
        {"ranks": 4, "warmup_steps": 5, "lr_factor": 0.5, "layers": "*"},
    ],
    "relora": [
        {"rank": 4, "restart_every": 4, "restart_warmup": 2, "reset": "magnitude"},
        {"rank": 4, "warmup_steps": 3, "restart_every": 3, "restart_warmup": 1},
    ],
    "sifd": [
        {"ranks": 4},
        {"ranks": 4, "decay": "kronecker", "init": "default"},
        {"ranks": 4, "core": True, "separable": True, "strength": 0.01},
    ],
}
# Methods that need another one's low-rank weights: who stands before them.
BESIDE: dict[str, Callable[[], Method]] = {
    "factor-decay": lambda: rankwise.Pufferfish(ranks=4, warmup_steps=5),
    "lora-plus": lambda: rankwise.LoRA(rank=4, others="all"),
}
CASES = [(name, options) for name, rows in SETTINGS.items() for options in rows]
IDS = [f"{n}-{'-'.join(f'{k}={v}' for k, v in o.items()) or 'default'}" for n, o in CASES]


class Blocks(nn.Module):
    """Convolutions with stride, dilation and 1x1, a shared module, and linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 8, 3, padding=1)
        self.down = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.wide = nn.Conv2d(12, 12, 3, padding=2, dilation=2)
        self.point = nn.Conv2d(12, 16, 1)
        self.twice = nn.Linear(64, 64, bias=False)
        self.again = self.twice
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.down(F.relu(self.stem(x)))).relu()
        x = self.point(F.relu(self.wide(x))).flatten(1)
        return self.head(F.relu(self.again(F.relu(self.twice(x)))))


def blocks(dtype: torch.dtype = torch.float32) -> Blocks:
    torch.manual_seed(0)
    return Blocks().to(dtype)


def perceptron() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(32, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 16)
    )


def batch(i: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + i)
    x = torch.randn(16, 2, 4, 4, generator=generator).to(dtype)
    return x, torch.randint(5, (16,), generator=generator)


def adamw(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.01)


def sgd(model: nn.Module) -> Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)


def begin(
    case: tuple[str, dict[str, Any]],
    model: nn.Module,
    make: Callable[[nn.Module], Optimizer] = adamw,
    **options: Any,
) -> rankwise.Run:
    methods = [METHODS[case[0]](**copy.deepcopy(case[1]))]
    if case[0] in BESIDE:
        methods = [BESIDE[case[0]](), *methods]
    return rankwise.start(
        model, methods, make(model), total_steps=STEPS, steps_per_epoch=4, **options
    )


def train(run: rankwise.Run, steps: range, dtype: torch.dtype = torch.float32) -> list[float]:
    losses = []
    for i in steps:
        x, y = batch(i, dtype)
        run.optimizer.zero_grad()
        loss = F.cross_entropy(run.model(x), y)
        loss.backward()
        run.optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@pytest.fixture(params=CASES, ids=IDS)
def case(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    return request.param


def test_every_method_of_the_registry_is_in_the_battery() -> None:
    assert SETTINGS.keys() == METHODS.keys()


def test_the_first_steps_move_the_function(case: Any) -> None:
    model = blocks()
    run = begin(case, model)
    x, _ = batch(0)
    before = model.eval()(x).detach()
    model.train()
    train(run, range(2))
    assert not torch.equal(model.eval()(x).detach(), before)


@pytest.mark.parametrize("make", [sgd, adamw])
def test_model_and_optimizer_hold_the_same_parameters_in_the_same_order(
    case: Any, make: Callable[[nn.Module], Optimizer]
) -> None:
    model = blocks()
    run = begin(case, model, make)
    train(run, range(STEPS))
    held = [p for group in run.optimizer.param_groups for p in group["params"]]
    # A proxy that is stepped for a weight stands in that weight's place.
    stand_ins = {
        name.removesuffix(".projected"): proxy
        for method in run.methods
        for proxy, name in method.parameter_names(model).items()
    }
    own = [stand_ins.get(n, p) for n, p in model.named_parameters() if p.requires_grad]
    assert len(held) == len(own) == len(set(held))
    place = {p: i for i, p in enumerate(own)}
    for group in run.optimizer.param_groups:  # a role has a group of its own
        places = [place[p] for p in group["params"]]
        assert places == sorted(places)
    assert all(run.optimizer.state[p] for p in held), "a parameter that is held never stepped"


def test_parameters_are_as_the_plan_predicted(case: Any) -> None:
    model = blocks()
    run = begin(case, model)
    train(run, range(STEPS))
    if run.plan is None:
        names = set(run.methods[-1].parameter_names(model).values())
        adapted = adapted_layers(model)
        assert case[0] == "dense" or "twice.weight.projected" in names or "twice" in adapted
        assert not adapted or isinstance(model.twice, type(adapted["twice"]))
        assert model.again is model.twice
        run.finish()  # merges updates
        assert sum(p.numel() for p in model.parameters()) == sum(
            p.numel() for p in blocks().parameters()
        )
        return
    assert sum(p.numel() for p in model.parameters()) == run.plan.parameters[1]
    assert run.plan.parameters[1] < run.plan.parameters[0]
    low = {n for n, m in model.named_modules() if isinstance(m, LowRankLayer)}
    assert low == set(run.plan.ranks)
    assert "twice" in low
    assert model.again is model.twice


@pytest.mark.parametrize("stop", [1, 4, 5, 6, 11])
@pytest.mark.parametrize("make", [sgd, adamw])
def test_resume_is_exact_before_at_and_after_a_change(
    case: Any, stop: int, make: Callable[[nn.Module], Optimizer], tmp_path: Path
) -> None:
    whole = blocks()
    train(begin(case, whole, make), range(STEPS))
    run = begin(case, blocks(), make)
    train(run, range(stop))
    rankwise.save(tmp_path, run)
    again = blocks()
    train(begin(case, again, make, resume=tmp_path), range(stop, STEPS))
    for (name, a), (_, b) in zip(
        whole.state_dict().items(), again.state_dict().items(), strict=True
    ):
        torch.testing.assert_close(b, a, rtol=0, atol=0, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_training_is_finite_in_every_dtype_and_keeps_it(case: Any, dtype: torch.dtype) -> None:
    model = blocks(dtype)
    run = begin(case, model)
    losses = train(run, range(STEPS), dtype)
    assert all(map(torch.isfinite, torch.tensor(losses)))
    assert {p.dtype for p in model.parameters()} == {dtype}


def test_a_default_device_that_is_another_changes_nothing(case: Any) -> None:
    """As under `torch.set_default_device("cuda")`; what is on `meta` cannot be computed with."""
    batches = [batch(i) for i in range(STEPS)]
    found = []
    for device in ("cpu", "meta"):
        model, optimizer = blocks(), sgd  # torch's AdamW counts its steps on the default device
        with torch.device(device):
            run = begin(case, model, optimizer)
            for x, y in batches:
                run.optimizer.zero_grad()
                F.cross_entropy(run.model(x), y).backward()
                run.optimizer.step()
            run.finish()
        found.append(model.state_dict())
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_finish_keeps_the_function_and_leaves_no_machinery(case: Any) -> None:
    model = blocks()
    run = begin(case, model)
    train(run, range(STEPS))
    x, _ = batch(0)
    expected = model.eval()(x).detach()
    out = run.finish()
    torch.testing.assert_close(out(x).detach(), expected, rtol=1e-5, atol=1e-6)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    dense = copy.deepcopy(model)
    rankwise.to_dense(dense)
    assert not any(isinstance(m, LowRankLayer) for m in dense.modules())
    torch.testing.assert_close(dense(x).detach(), expected, rtol=1e-4, atol=1e-5)
    assert {n for n, _ in dense.named_modules()} == {n for n, _ in blocks().named_modules()}


def test_a_low_rank_teacher_is_approached(case: Any) -> None:
    """A rank-2 linear map of the inputs: the error must fall to a third in 150 steps."""
    generator = torch.Generator().manual_seed(7)
    teacher = torch.randn(32, 2, generator=generator) @ torch.randn(2, 16, generator=generator) / 6
    x = torch.randn(256, 32, generator=generator)
    model = perceptron()
    run = begin(case, model)
    losses = []
    for _ in range(150):
        run.optimizer.zero_grad()
        loss = F.mse_loss(run.model(x), x @ teacher)
        loss.backward()
        run.optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 3


def test_micro_batches_equal_one_batch(case: Any) -> None:
    """Exceptions by definition: BatchNorm, so the perceptron without one; not the extra norm.

    And parallel heads, each of which sees a chunk of every micro-batch.
    """
    chunks = {"lte": "mode" not in case[1], "multi-head-galore": case[1].get("heads") != 1}
    if chunks.get(case[0]):
        pytest.skip("a head's examples follow from the size of the batch: by definition")
    if case[1].get("norm"):
        pytest.skip(
            "batch statistics of parts are not those of the whole: an exception by definition"
        )
    models = []
    for parts in (1, 4):
        model = perceptron()
        run = begin(case, model, sgd)
        for i in range(STEPS):
            generator = torch.Generator().manual_seed(i)
            x = torch.randn(16, 32, generator=generator)
            run.optimizer.zero_grad()
            for piece in x.chunk(parts):
                (model(piece).square().mean() / parts).backward()
            run.optimizer.step()
        models.append(model)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)


def test_the_same_run_twice_is_the_same_bit_for_bit(case: Any) -> None:
    results = []
    for noise in (1, 2):
        model = blocks()
        run = begin(case, model)
        torch.manual_seed(noise)  # hooks must not draw from the global generator
        train(run, range(STEPS))
        results.append(model.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(value, results[1][key], rtol=0, atol=0)


def test_learning_rate_is_continuous_or_changed_by_the_declared_factor(case: Any) -> None:
    model = blocks()
    run = begin(case, model, sgd)
    used = []
    run.optimizer.register_step_pre_hook(lambda o, *_: used.append(o.param_groups[0]["lr"]))
    train(run, range(STEPS))
    factor = case[1].get("lr_factor", 1.0)
    switched = [e["step"] for e in run.events if e["event"] == "switch"]
    at = switched[0] if switched else STEPS
    if "compat" in case[1]:  # warms up again, as published: tests/methods/test_cuttlefish.py
        used, at = used[:at], STEPS
        assert used
    expected = ([0.02] * at + [0.02 * factor] * (STEPS - at))[: len(used)]
    if case[0] == "relora":  # a ramp behind every merge: tests/methods/test_relora.py
        expected = [0.02 * run.methods[0].lr_scale(step) for step in range(1, STEPS + 1)]
    assert used == expected


def test_state_is_tensors_and_numbers(case: Any, tmp_path: Path) -> None:
    run = begin(case, blocks())
    train(run, range(STEPS))
    torch.save(run.state_dict(), tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    assert loaded["step"] == STEPS


def test_a_method_that_matches_no_layer_is_an_error(case: Any) -> None:
    if not hasattr(METHODS[case[0]](), "layers"):
        assert case[0] in ("dense", *BESIDE)
        return
    options = {**case[1], "layers": "encoder.*"}
    with pytest.raises(SelectionError, match=r"'encoder\.\*' matches none"):
        begin((case[0], options), blocks())


def test_repr_builds_an_equal_method(case: Any) -> None:
    method: Any = METHODS[case[0]](**case[1])
    again = eval(repr(method), {**vars(rankwise.ranks), type(method).__name__: type(method)})
    assert again == method


def test_options_can_be_given_as_text(case: Any) -> None:
    text = {k: str(v) for k, v in case[1].items()}
    assert build(METHODS[case[0]], text) == METHODS[case[0]](**case[1])


@pytest.mark.parametrize("name", METHODS)
def test_a_method_is_a_documented_dataclass(name: str) -> None:
    cls = METHODS[name]
    assert cls.__bases__ == (Method,), "no method subclasses another"
    assert inspect.getdoc(cls)
    module = inspect.getmodule(cls)
    assert module is not None
    words = module.__doc__ or ""
    assert all(question in words for question in ("When:", "Where:", "How many ranks:", "Action:"))
    assert dataclasses.is_dataclass(cls)
    for field in dataclasses.fields(cls):
        assert field.metadata.get("help"), f"{name}.{field.name} has no help text"
