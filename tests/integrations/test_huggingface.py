"""In transformers' Trainer and in Accelerate: the plain loop's weights, bit for bit."""

from __future__ import annotations

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
from plain_loop import (
    BATCH,
    CHECKPOINTS,
    CLIP,
    METHODS,
    MICRO,
    RATE,
    STEPS,
    Killed,
    adamw,
    assert_same,
    decay,
    examples,
    finish_both,
    loader,
    network,
    plain,
)
from safetensors.torch import load_file
from torch import nn

import rankwise
from rankwise import beside
from rankwise.errors import CheckpointError, LifeCycleError, PlanError
from rankwise.models.from_transformers import hide_broken_torchvision

hide_broken_torchvision()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what they import
    transformers: Any = pytest.importorskip("transformers")
    accelerate: Any = pytest.importorskip("accelerate")
    from rankwise.integrations.huggingface import RunCallback


class Kill(transformers.TrainerCallback):
    """In the middle of a step, after a checkpoint was written."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **objects: Any) -> None:
        if state.global_step == self.step:
            raise Killed


def in_trainer(
    name: str, folder: Path, *, resume: Path | None = None, kill: int = -1, **options: Any
) -> tuple[nn.Module, rankwise.Run]:
    model = network()
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=MICRO,
        max_grad_norm=CLIP,
        learning_rate=RATE,
        max_steps=STEPS,
        train_sampling_strategy="sequential",
        save_steps=2,
        **{"save_strategy": "steps", **options},
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    rows, evaluations = examples(), itertools.count()
    trainer = transformers.Trainer(
        model,
        args,
        train_dataset=rows,
        eval_dataset=rows[:8],
        optimizers=(adamw(model), None),
        compute_metrics=lambda _: {"earliness": -next(evaluations)},
    )
    run = rankwise.start(model, METHODS[name](), trainer.create_optimizer(), resume=resume)
    trainer.add_callback(RunCallback(run))
    trainer.add_callback(Kill(kill))
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model, run


@pytest.mark.parametrize("name", METHODS)
def test_trainer_gives_the_weights_of_the_plain_loop(name: str, tmp_path: Path) -> None:
    expected, run = plain(name)
    model, own = in_trainer(name, tmp_path, save_strategy="no")
    assert own.step == run.step == STEPS
    assert_same(model, expected)
    finish_both(own, run)


@pytest.mark.parametrize("name", METHODS)
def test_trainer_is_killed_and_resumed_across_a_change(name: str, tmp_path: Path) -> None:
    expected, run = plain(name)
    with pytest.raises(Killed):
        in_trainer(name, tmp_path, kill=CHECKPOINTS[name][-1])
    own = run
    for step in CHECKPOINTS[name]:
        checkpoint = tmp_path / f"checkpoint-{step}"
        model, own = in_trainer(name, tmp_path / "again", resume=checkpoint, save_strategy="no")
        assert own.resumed is not None
        assert own.resumed.step == step
        assert_same(model, expected)
    finish_both(own, run)


def test_trainer_cannot_resume_without_the_run(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        in_trainer("pufferfish", tmp_path, kill=4)
    checkpoint = tmp_path / "checkpoint-4"
    model = network()
    callback = RunCallback(rankwise.start(model, METHODS["lora"](), adamw(model)))
    with pytest.raises(
        PlanError, match=r"the trainer loads fc1\.u\.bias.*start\(\.\.\., resume=\)"
    ):
        model.load_state_dict(load_file(checkpoint / "model.safetensors"), strict=False)
    state = transformers.TrainerState(global_step=4)
    with pytest.raises(LifeCycleError, match="steps another optimizer than the run's"):
        callback.on_train_begin(None, state, None, optimizer=adamw(model))
    with pytest.raises(LifeCycleError, match="goes on from step 4, the run is at step 0"):
        callback.on_train_begin(None, state, None, optimizer=callback.run.optimizer)
    alone = network()
    optimizer = adamw(alone)
    run = rankwise.start(alone, METHODS["pufferfish"](), optimizer, resume=checkpoint)
    with pytest.raises(LifeCycleError, match="whose weights and moments no trainer has loaded"):
        optimizer.step()
    with pytest.raises(LifeCycleError, match="goes on from step 0, the run is at step 4"):
        RunCallback(run).on_train_begin(
            None, transformers.TrainerState(), None, optimizer=optimizer
        )
    (checkpoint / beside.FILE).unlink()
    with pytest.raises(CheckpointError, match="saved without rankwise's RunCallback, or killed"):
        in_trainer("pufferfish", tmp_path, resume=checkpoint)


def test_workers_that_train_apart_are_not_saved_by_a_trainer() -> None:
    model = network()
    method = rankwise.LTE(mode="workers", heads=1, rank=2, layers="fc*", merge_every=2)
    run = rankwise.start(model, method, adamw(model))
    with pytest.raises(LifeCycleError, match="holds those of worker 0 alone"):
        beside.state_of(run)


def test_a_best_checkpoint_of_another_structure_is_not_loaded(tmp_path: Path) -> None:
    options = {
        "load_best_model_at_end": True,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "metric_for_best_model": "earliness",
        "greater_is_better": True,
    }
    in_trainer("lora", tmp_path / "same", **options)
    with pytest.raises(PlanError, match="load_best_model_at_end does not go with"):
        in_trainer("pufferfish", tmp_path / "other", **options)


# ------------------------------------------------------------------------------------- Accelerate


@pytest.mark.parametrize("name", ["relora", "pufferfish", "galore"])
def test_accelerate_needs_nothing_and_gives_the_same_weights(name: str) -> None:
    expected, _ = plain(name)
    model = network()
    optimizer = adamw(model)
    rankwise.start(model, METHODS[name](), optimizer)
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=MICRO, cpu=True)
    prepared, steps, data, rates = accelerator.prepare(model, optimizer, loader(), decay(optimizer))
    for batch in data:
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(**batch)["loss"])
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(prepared.parameters(), CLIP)
            steps.step()
            rates.step()
            steps.zero_grad()
    assert_same(model, expected)
