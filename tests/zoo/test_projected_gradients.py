"""Projected gradients on models of transformers, and under its Trainer."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from rankwise.methods.galore import GaLore
from rankwise.optim.projected import LowRankGrad
from test_projected import adamw, batches, begin, engine_of, gap, mlp

pytestmark = pytest.mark.filterwarnings("ignore")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
with warnings.catch_warnings(action="ignore"):
    transformers: Any = pytest.importorskip("transformers")


def llama(tied: bool) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_hidden_layers=2,
        tie_word_embeddings=tied,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_head=4, n_layer=2, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


LLAMA = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
         "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]  # fmt: skip
GPT2 = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda: llama(False), {f"model.layers.{i}.{n}.weight" for i in (0, 1) for n in LLAMA}),
        (lambda: llama(True), {f"model.layers.{i}.{n}.weight" for i in (0, 1) for n in LLAMA}),
        (gpt2, {f"transformer.h.{i}.{n}.weight" for i in (0, 1) for n in GPT2}),
    ],
)
def test_auto_takes_attention_and_mlp_and_the_model_learns(make: Any, expected: set[str]) -> None:
    model = make()
    run = begin(model, GaLore(8, every=3, scale=1.0), adamw)
    assert set(engine_of(run).matrices) == expected
    tokens = torch.randint(0, 64, (4, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(8):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        assert sum(isinstance(p.grad, LowRankGrad) for p in model.parameters()) == len(expected)
        run.optimizer.step()
        run.optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.inner(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def test_the_trainer_clips_accumulates_and_schedules_as_a_plain_loop_does(
    tmp_path: Path,
) -> None:
    """The Trainer zeroes by the model and clips by the model: both must reach the projections."""
    pytest.importorskip("accelerate")
    data = list(batches(12))

    def schedule(optimizer: Any) -> LambdaLR:
        return LambdaLR(optimizer, lambda step: 1 / (1 + step))

    plain, model = WithLoss(), WithLoss()
    run = begin(plain, GaLore(4, every=5))
    scheduler, norms = schedule(run.optimizer), []
    for x, y in data:
        for xs, ys in zip(x.chunk(2), y.chunk(2), strict=True):
            (plain(xs, ys)["loss"] / 2).backward()
        norms.append(float(nn.utils.clip_grad_norm_(plain.parameters(), 0.1)))
        run.optimizer.step()
        scheduler.step()
        run.optimizer.zero_grad()
    run = begin(model, GaLore(4, every=5))
    rows = [{"x": x, "labels": y} for xs, ys in data for x, y in zip(xs, ys, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        use_cpu=True,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        max_grad_norm=0.1,
        num_train_epochs=1,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        remove_unused_columns=False,
    )

    class InOrder(transformers.Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(rows)  # type: ignore[arg-type]

    optimizers = (run.optimizer, schedule(run.optimizer))
    trainer = InOrder(model, arguments, train_dataset=rows, optimizers=optimizers)
    trainer.train()
    logged = [h["grad_norm"] for h in trainer.state.log_history if "grad_norm" in h]
    assert run.step == 12
    assert norms[0] > 0.1
    torch.testing.assert_close(torch.tensor(logged), torch.tensor(norms), rtol=1e-4, atol=1e-6)
    assert gap(plain, WithLoss()) > 1e-2
    assert gap(plain, model) < 1e-5
