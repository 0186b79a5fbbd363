"""Causal Transformers and their training: laws of the network, exact runs, words for text."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import rankwise
from rankwise import accounting, models
from rankwise.cli import main
from rankwise.data import TextSplit, batches
from rankwise.errors import CheckpointError, OptionError
from rankwise.models import networks, transformer
from rankwise.models.transformer import Transformer
from rankwise.training import Interrupted, Recipe, Result, records, train
from rankwise.training.report import Progress
from rankwise.training.task import Score, evaluate, loss_of
from test_training import StopAt, end_state, stopped_and_gone_on

SIZES = {"vocabulary": 23, "width": 16, "layers": 2, "heads": 2, "hidden": 24, "context": 12}


def network(form: str = "llama", seed: int = 0, **sizes: int | bool) -> Transformer:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Transformer(form=form, **{**SIZES, **sizes})  # pyright: ignore[reportArgumentType]


def tokens(*shape: int, vocabulary: int = 23, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def llama_parameters(vocabulary: int, width: int, layers: int, hidden: int) -> int:
    block = 4 * width * width + 3 * width * hidden + 2 * width
    return 2 * vocabulary * width + layers * block + width


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("llama-60m", llama_parameters(32_000, 512, 8, 1376)),
        ("llama-130m", llama_parameters(32_000, 768, 12, 2048)),
        ("llama-350m", llama_parameters(32_000, 1024, 24, 2736)),
        ("llama-tiny", llama_parameters(256, 128, 4, 344)),
        # Tied head, learned positions; biases and LayerNorms throughout.
        (
            "gpt2-tiny",
            (256 + 128) * 128 + 3 * (12 * 128**2 + (3 + 1 + 4 + 1 + 4) * 128) + 2 * 128,
        ),
    ],
)
def test_each_language_model_stores_the_parameters_counted_by_hand(name, stored):
    with torch.device("meta"):
        model = models.build(name)
    assert accounting.parameters(model).stored == stored
    sample = models.sample(name)
    assert isinstance(sample, torch.Tensor)
    assert sample.dtype == torch.int64
    assert model(sample.to("meta")).shape == (1, sample.shape[1], models.MODELS[name].classes)


@pytest.mark.parametrize("form", ["llama", "gpt2"])
def test_no_position_sees_what_follows_it_and_every_one_sees_what_was_before(form):
    model = network(form)
    x = tokens(1, 10)
    before = model(x)
    for place in range(10):
        changed = x.clone()
        changed[0, place] = (changed[0, place] + 1) % 23
        after = model(changed)
        assert_close(after[:, :place], before[:, :place], rtol=0, atol=0)
        moved = (after - before)[0, place:].abs().amax(-1)
        assert bool((moved > 1e-6).all()), place


@pytest.mark.parametrize("form", ["llama", "gpt2"])
def test_the_order_of_earlier_tokens_matters(form):
    model = network(form)
    x = tokens(1, 8)
    assert x[0, 1] != x[0, 4]
    swapped = x[:, [0, 4, 2, 3, 1, 5, 6, 7]]
    with torch.no_grad():
        assert float((model(x) - model(swapped))[0, -1].abs().max()) > 1e-5


def test_rotary_scores_depend_on_the_distance_alone():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(8, generator=generator).expand(1, 1, 12, 8) for _ in range(2))
    turn = transformer._rotation(12, 8, torch.device("cpu"))
    scores = (transformer._turned(query, turn) @ transformer._turned(key, turn).transpose(-1, -2))[
        0, 0
    ]
    for distance in range(-11, 12):
        along = scores.diagonal(distance)
        assert_close(along, along[:1].expand_as(along), rtol=1e-4, atol=1e-5)
    assert float(scores[0].std()) > 1e-3
    # As complex numbers: pairs (i, i + S/2), turned by position / 10000^(2 i / S).
    pairs = torch.complex(query[..., :4], query[..., 4:]).to(torch.complex128)
    speed = 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    angle = torch.arange(12, dtype=torch.float64)[:, None] * speed
    turned = pairs * torch.polar(torch.ones_like(angle), angle)
    expected = torch.cat((turned.real, turned.imag), dim=-1).float()
    assert_close(transformer._turned(query, turn), expected, rtol=1e-4, atol=1e-5)


def test_a_llama_block_is_its_formula():
    model = network(layers=1).double()
    (block,) = model.blocks
    assert isinstance(block, transformer.LlamaBlock)
    with torch.no_grad():
        for norm in (block.attention_norm, block.feed_norm, model.norm):
            norm.weight.normal_(generator=torch.Generator().manual_seed(3))
    x = tokens(2, 7)

    def rms(value: torch.Tensor, norm: nn.Module) -> torch.Tensor:
        weight = norm.weight
        assert isinstance(weight, torch.Tensor)
        return value / (value.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    h = model.embedding.weight[x]
    y = rms(h, block.attention_norm)
    turn = transformer._rotation(7, 8, x.device)
    mixed = []
    for head in range(2):
        rows = slice(8 * head, 8 * head + 8)
        query, key, value = (
            y @ layer.weight[rows].T for layer in (block.query, block.key, block.value)
        )
        query, key = (transformer._turned(part[:, None], turn)[:, 0] for part in (query, key))
        scores = query @ key.transpose(1, 2) / math.sqrt(8)
        scores = scores.masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
        mixed.append(scores.softmax(-1) @ value)
    h = h + torch.cat(mixed, -1) @ block.out.weight.T
    y = rms(h, block.feed_norm)
    gate = y @ block.gate.weight.T
    h = h + (gate * torch.sigmoid(gate) * (y @ block.up.weight.T)) @ block.down.weight.T
    expected = rms(h, model.norm) @ model.head.weight.T
    assert_close(model(x), expected, rtol=1e-6, atol=1e-9)


def test_the_start_is_that_of_the_published_programs():
    model = network("gpt2", width=64, hidden=256, layers=8, tied=True)
    assert model.head.weight is model.embedding.weight
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "head":
            inward = name.endswith(("out", "down"))
            expected = torch.tensor(0.02 / 4 if inward else 0.02)
            assert_close(module.weight.detach().std(), expected, rtol=0.1, atol=0, msg=name)
            assert module.bias is not None
            assert not module.bias.any()
    loss = loss_of(network()(tokens(8, 12)), tokens(8, 12, seed=2))
    assert float(loss.detach()) == pytest.approx(math.log(23), rel=0.01)  # knows nothing yet
    assert network().head.weight is not network().embedding.weight


@pytest.mark.parametrize("form", ["llama", "gpt2"])
def test_it_compiles_without_a_graph_break(form):
    model = network(form)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(tokens(2, 6)), model(tokens(2, 6)), rtol=1e-5, atol=1e-6)


def test_reduced_precision_turns_by_full_angles():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = network()(tokens(2, 12))
    assert_close(low.float(), network()(tokens(2, 12)), rtol=0, atol=5e-3)
    half = network().bfloat16()(tokens(2, 12))
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), network()(tokens(2, 12)), rtol=0, atol=5e-3)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"form": "gpt3"}, "unknown form 'gpt3'; did you mean 'gpt2'"),
        ({"heads": 3}, "width=16 cannot be shared out, an even number each, over heads=3"),
        ({"heads": 16}, "an even number each, over heads=16"),
        ({"layers": 0}, "layers=0 must be at least 1"),
        ({"context": 0}, "context=0 must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, words):
    with pytest.raises(OptionError) as caught:
        network(**changes)
    assert words in str(caught.value)


def test_learned_positions_end_and_turned_ones_do_not():
    with pytest.raises(OptionError, match="13 tokens, but this network has learned positions for"):
        network("gpt2")(tokens(1, 13))
    assert network()(tokens(1, 13)).shape == (1, 13, 23)


def test_names_are_refused_for_what_they_cannot_read():
    with pytest.raises(OptionError, match=r"reads windows of \(tokens,\), not inputs of shape \(1"):
        models.build("llama-tiny", input_shape=(1, 28, 28))
    with pytest.raises(OptionError, match="llama-tiny: classes=0; a vocabulary holds at least 1"):
        models.build("llama-tiny", classes=0)


# The task


def test_the_loss_is_the_mean_over_all_tokens():
    scores, targets = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0)), tokens(3, 5)
    targets = targets % 7
    by_hand = torch.stack(
        [
            torch.logsumexp(scores[b, t], 0) - scores[b, t, targets[b, t]]
            for b in range(3)
            for t in range(5)
        ]
    ).mean()
    assert_close(loss_of(scores, targets), by_hand, rtol=1e-5, atol=1e-6)
    flat = F.cross_entropy(scores[:, 0], targets[:, 0], label_smoothing=0.1)
    assert_close(loss_of(scores[:, 0], targets[:, 0], label_smoothing=0.1), flat, rtol=0, atol=0)


def test_evaluation_counts_every_token_once_whatever_fits_at_once(monkeypatch):
    model = network().train()
    split = TextSplit(tokens(200).int(), 12)
    inputs, targets = split.take(torch.arange(len(split)))
    scores = model(inputs)
    expected = Score(
        float(loss_of(scores, targets).detach()),
        float((scores.argmax(-1) == targets).float().mean()),
    )
    seen = []
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))

    def measured(units: int | None = None) -> Score:
        seen.clear()
        return evaluate(model, split, lambda x: x, torch.no_grad, classes=23, units=units)

    for room, largest in ((2**23, 16), (3 * 12 * 23, 3), (1, 1)):
        monkeypatch.setattr("rankwise.training.task.SCORES_AT_ONCE", room)
        score = measured()
        assert (sum(seen), max(seen)) == (16, largest)
        assert score.loss == pytest.approx(expected.loss, rel=1e-5)
        assert score.accuracy == pytest.approx(expected.accuracy)
    assert all(module.training for module in model.modules())
    measured(units=60)
    assert sum(seen) == 5
    measured(units=1)
    assert sum(seen) == 1


def test_a_score_reads_as_perplexity_and_bits():
    score = Score(math.log(8), 0.25)
    assert score.perplexity == pytest.approx(8)
    assert score.bits == pytest.approx(3)
    assert Score(1e9, 0.0).perplexity > 1e300  # a run that diverged still gets its line


# Training


@pytest.fixture
def prose(tmp_path, monkeypatch) -> Path:
    """Words of two letters, so that every second letter can be learned."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    pairs = ("ab", "cd", "ef", "gh")
    chosen = torch.randint(0, 4, (2000,), generator=generator).tolist()
    path = tmp_path / "prose.txt"
    path.write_text("".join(pairs[i] for i in chosen))
    return path


@pytest.fixture(autouse=True)
def a_network_for_tests(monkeypatch):
    entry = networks._language("for tests", layers=2, width=16, heads=2, hidden=24)
    monkeypatch.setitem(models.MODELS, "llama-test", entry)


def recipe(**changes) -> Recipe:
    base = {
        "model": "llama-test",
        "data": "text:prose.txt",
        "context": 16,
        "batch_size": 20,  # 3200 tokens to train: 199 windows, 9 steps
        "epochs": 2,
        "optimizer": "adamw",
        "lr": 0.01,
        "method": "dense",
        "clip_norm": 1.0,
    }
    return Recipe(**{**base, **changes})


LOW_RANK = [
    ("dense", {}),
    ("factorized", {"ranks": 4}),
    ("pufferfish", {"ranks": 4, "warmup_steps": 11}),
    ("galore", {"rank": 4, "every": 5}),
    ("tracked", {"rank": 4}),
    ("apollo", {"rank": 4, "every": 3}),
]


@pytest.mark.parametrize("step", [4, 9, 11, 14])
@pytest.mark.parametrize(("method", "options"), LOW_RANK)
def test_a_language_model_stopped_anywhere_ends_bit_for_bit_as_one_that_was_not(
    prose, method, options, step
):
    stopped_and_gone_on(recipe, step, method=method, method_options=options)


def test_it_learns_what_can_be_learned_and_no_more(prose):
    result = train(recipe(epochs=14))
    # Half of the letters follow from the one before, the others are one of four.
    possible = math.log(4) / 2
    assert possible * 0.99 < result.test_loss < possible + 0.05
    assert result.test_accuracy == pytest.approx(0.5 + 0.25 / 2, abs=0.06)
    assert result.task == "language modelling"


def test_the_result_counts_per_token_and_the_records_say_what_was_read(prose):
    seen: list[Progress] = []

    class Watch(StopAt):
        def step(self, progress: Progress) -> None:
            seen.append(progress)

    result = train(recipe(out="out"), report=Watch(0))
    model = models.build("llama-test", classes=256, input_shape=(16,))
    sample = torch.zeros(1, 16, dtype=torch.int64)
    assert result.flops == result.dense_flops == accounting.flops(model, sample) // 16
    assert result.parameters[0] == llama_parameters(256, 16, 2, 24)
    assert result.units_per_second == pytest.approx(20 * 16 / (result.step_ms_dense or 0) * 1e3)
    assert result.state_bytes == 8 * result.parameters[0] + 4 * len(list(model.parameters()))
    assert {progress.unit for progress in seen} == {"token"}
    assert seen[-1].units_per_second > 0
    start, *_, finish = records.read("out")
    assert start["data"]["task"] == "language modelling"
    assert start["data"]["tokens"] == [199 * 16, 24 * 16, 24 * 16]
    assert Result.from_record(finish) == result
    # Earlier records hold neither task nor speed.
    old = {k: v for k, v in finish.items() if k not in ("task", "validation_loss")}
    assert Result.from_record(old).task == "classification"
    with pytest.raises(KeyError, match="test_loss"):
        Result.from_record({k: v for k, v in finish.items() if k != "test_loss"})


def test_projected_gradients_keep_less_and_train_the_same_dense_network(prose):
    dense = train(recipe(out="dense"))
    low = train(recipe(out="low", method="galore", method_options={"rank": 4}))
    assert low.parameters == dense.parameters
    assert low.switches == ()
    assert low.step_ms_low_rank is None
    model = models.build("llama-test", classes=256, input_shape=(16,))
    ranks = {n: 4 for n, p in model.named_parameters() if "blocks" in n and p.dim() == 2}
    kept = accounting.memory(model, ranks=ranks)
    counters = 4 * len(list(model.parameters()))
    assert low.state_bytes == kept.states + kept.bases + counters
    assert dense.state_bytes is not None
    assert kept.states + kept.bases + counters < dense.state_bytes
    assert set(end_state("low")[0]) == set(end_state("dense")[0])


def test_an_update_is_what_counts_as_trainable_and_the_end_is_a_dense_network(prose):
    dense = train(recipe())
    options = {"rank": 2, "layers": "blocks.*"}
    result = train(recipe(method="lora", method_options=options))
    assert result.parameters[0] == dense.parameters[0]
    assert 0 < result.parameters[1] < dense.parameters[1] / 4


def test_a_switch_is_judged_by_its_loss_on_the_beginning_of_the_validation_part(prose, monkeypatch):
    from rankwise.training import task

    def switch(units: int) -> dict:
        tasks = {"language modelling": task.Task("token", units, lambda score: "")}
        monkeypatch.setattr("rankwise.training.loop.TASKS", tasks)
        out = f"out-{units}"
        options = {"ranks": 4, "warmup_steps": 11}
        train(recipe(out=out, method="pufferfish", method_options=options))
        (event,) = (r for r in records.read(out) if r["event"] == "switch")
        return event

    whole, beginning = switch(10**6), switch(48)
    assert whole["loss_before"] != beginning["loss_before"]
    assert abs(whole["loss_after"] - whole["loss_before"]) < 1.0


def test_other_text_under_the_same_name_is_refused(prose):
    with pytest.raises(Interrupted):
        train(recipe(out="out"), report=StopAt(3))
    prose.write_text(prose.read_text()[::-1])
    with pytest.raises(CheckpointError, match=r"other tokens: prose\.txt has the checksum"):
        train(recipe(out="out"), resume="out")


def test_a_network_for_the_other_task_is_refused_with_those_that_fit(prose):
    with pytest.raises(OptionError) as caught:
        train(recipe(model="mlp-128x4"))
    assert "mlp-128x4 is a network for classification, but text:prose.txt is data for" in str(
        caught.value
    )
    assert "llama-tiny" in str(caught.value)
    with pytest.raises(OptionError, match="llama-test is a network for language modelling, but"):
        train(recipe(data="mnist-5k"))
    assert not Path("runs").exists()


def test_the_command_line_compares_language_models_in_their_own_words(prose, capsys):
    line = "--model llama-test --data text:prose.txt --context 16 --epochs 1 --batch-size 20"
    line += " --lr-warmup-epochs 0 --optimizer adamw --tokens characters"
    assert main(["compare", *line.split(), "--methods", "dense,factorized", "--out", "all"]) == 0
    out = capsys.readouterr().out
    assert out.count("bits/token") == 4  # an epoch and an end of each
    table = out[out.rindex("test per-") :]
    for words in ("plexity", "bits", "/ token", "tokens", "dense", "factorized"):
        assert words in table
    assert "accuracy" not in out
    record = json.loads((Path("all") / "dense-0" / "records.jsonl").read_text().split("\n")[-2])
    assert f"{math.exp(record['test_loss']):.2f}" in table
    assert f"{record['test_loss'] / math.log(2):.3f}" in table


def test_the_plan_of_a_language_model_is_shown_for_its_own_shape_or_the_datas(prose, capsys):
    assert main(["plan", "--model", "llama-tiny", "--ranks", "0.25"]) == 0
    own = capsys.readouterr().out
    assert "32 of 128" in own
    assert main(["plan", "--model", "llama-tiny", "--data", "text:prose.txt"]) == 0
    assert "blocks.3.down" in capsys.readouterr().out
    assert main(["plan", "--model", "llama-tiny", "--input-shape", "64", "--classes", "9"]) == 0
    assert "9×128" in capsys.readouterr().out


def test_two_workers_share_windows_as_one_reads_them():
    """The batch of all workers is the one-worker batch: its loss is the mean of theirs."""
    split = TextSplit(tokens(400).int(), 12)
    model = network()
    whole, *parts = (
        next(batches(split, batch_size=8, seed=0, epoch=0, worker=worker, workers=workers))
        for worker, workers in ((0, 1), (0, 2), (1, 2))
    )
    losses = [loss_of(model(inputs), targets) for inputs, targets in parts]
    inputs, targets = whole
    assert_close(loss_of(model(inputs), targets), torch.stack(losses).mean(), rtol=1e-5, atol=0)


def test_full_rank_factors_compute_the_dense_function():
    for form in ("llama", "gpt2"):
        model = network(form).eval()
        x = tokens(2, 12)
        dense = model(x).detach()
        rankwise.factorize(
            model,
            rankwise.ranks.Ratio(1.0, allow_growth=True),
            x,
            layers="blocks.*",
        )
        assert_close(model(x), dense, rtol=1e-4, atol=1e-5)
