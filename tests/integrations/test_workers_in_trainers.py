"""Two workers in other people's trainers: the weights of two by hand, and of one process."""

from __future__ import annotations

import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from plain_loop import BATCH, CLIP, RATE, STEPS, adamw, decay, examples, network, plain
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

import rankwise
from rankwise import LTE, LoRA, distributed
from rankwise.errors import LifeCycleError
from rankwise.models.from_transformers import hide_broken_torchvision
from test_distributed import WORKERS, Workers, caught
from torchvision_operators import stub_operators

stub_operators()  # Lightning imports torchvision wherever it finds it
hide_broken_torchvision()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what they import
    transformers: Any = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    pl: Any = pytest.importorskip("lightning.pytorch")
    environments: Any = pytest.importorskip("lightning.fabric.plugins.environments")
    from test_lightning import Module

    from rankwise.integrations import huggingface, lightning

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

HEADS = {"rank": 2, "alpha": 4.0, "merge_every": 3, "layers": "fc*", "others": "none"}
Answer = dict[str, Tensor]


def method(name: str, mode: str = "workers") -> rankwise.Method:
    if name == "lte":
        return LTE(heads=WORKERS, mode=mode, **HEADS)
    return LoRA(rank=2, layers="fc*", others="out")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workers]:
    workers = Workers(tmp_path_factory.mktemp("workers"))
    workers(_as_torchrun)
    yield workers
    workers.stop()


def _as_torchrun() -> None:
    """What its environment would tell the trainers."""
    rank = str(distributed.worker())
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(WORKERS), "OMP_NUM_THREADS": "1"}
    os.environ.update(told, LOCAL_WORLD_SIZE=str(WORKERS), TORCHELASTIC_RUN_ID="1")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT="1")
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)


def _weights(run: rankwise.Run) -> Answer:
    return {name: value.clone() for name, value in run.bare.state_dict().items()}


def _in_order(rows: list[Any], deal: str, workers: int = WORKERS) -> list[list[Any]]:
    """Each worker's examples, as Accelerate (batch by batch) or Lightning (in turn) deals them."""
    if deal == "in turn":
        return [rows[n::workers] for n in range(workers)]
    batches = [rows[i : i + BATCH] for i in range(0, len(rows), BATCH)]
    return [[row for batch in batches[n::workers] for row in batch] for n in range(workers)]


def _step(run: rankwise.Run, model: Any, batch: dict[str, Tensor], name: str) -> None:
    run.optimizer.zero_grad()
    model(**batch)["loss"].backward()
    if name == "lora":
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    run.optimizer.step()


def _by_hand(name: str, deal: str) -> Answer:
    model = network()
    wrap = None if name == "lte" else distributed.wrap
    run = rankwise.start(model, method(name), adamw(model), wrap=wrap)
    scheduler = decay(run.optimizer)
    own: Any = _in_order(examples(), deal)[distributed.worker()]
    for batch in DataLoader(own, batch_size=BATCH):
        _step(run, run.model, batch, name)
        scheduler.step()
    return _weights(run)


def _in_trainer(name: str, apart: bool = True) -> Answer:
    model = network()
    with tempfile.TemporaryDirectory() as folder:
        args = transformers.TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=BATCH,
            max_grad_norm=CLIP if name == "lora" else 0.0,
            learning_rate=RATE,
            max_steps=STEPS,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            ddp_backend="gloo",
            disable_tqdm=True,
            logging_strategy="no",
        )
        trainer = transformers.Trainer(
            model, args, train_dataset=examples(), optimizers=(adamw(model), None)
        )
        run = rankwise.start(model, method(name), trainer.create_optimizer())
        trainer.add_callback(huggingface.RunCallback(run))
        if name == "lte" and apart:
            huggingface.train_apart(trainer)
        trainer.train()
    assert run.step == STEPS
    return _weights(run)


def _in_lightning(name: str, apart: bool = True) -> Answer:
    model = network()
    run = rankwise.start(model, method(name), adamw(model))
    strategy = lightning.Apart if name == "lte" and apart else pl.strategies.DDPStrategy
    environment = environments.TorchElasticEnvironment()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            default_root_dir=folder,
            strategy=strategy(cluster_environment=environment, process_group_backend="gloo"),
            devices=WORKERS,
            max_steps=STEPS,
            gradient_clip_val=CLIP if name == "lora" else None,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            use_distributed_sampler=False,  # its own would shuffle
            callbacks=[lightning.RunCallback(run)],
        )
        rows: Any = examples()
        dealt = DistributedSampler(rows, shuffle=False)
        data = DataLoader(rows, batch_size=BATCH, sampler=dealt)
        trainer.fit(Module(model, run.optimizer), data)
    assert run.step == STEPS
    return _weights(run)


def _one_process(name: str, deal: str) -> Answer:
    """The same examples at every step: LoRA's micro-batches, or one head for each chunk."""
    if name == "lora":
        return _weights(plain(name, clips="model")[1])
    model = network()
    run = rankwise.start(model, method(name, "parallel"), adamw(model))
    scheduler = decay(run.optimizer)
    dealt: Any = _in_order(examples(), deal)
    for batches in zip(*(DataLoader(own, batch_size=BATCH) for own in dealt), strict=True):
        joined = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
        _step(run, model, joined, name)
        scheduler.step()
    return _weights(run)


TRAINERS = {"transformers": (_in_trainer, "batches"), "lightning": (_in_lightning, "in turn")}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("name", ["lora", "lte"])
def test_two_workers_are_those_by_hand_and_one_process(
    together: Workers, trainer: str, name: str
) -> None:
    train, deal = TRAINERS[trainer]
    answers, by_hand = together(train, name), together(_by_hand, name, deal)
    for own, expected in zip(answers, by_hand, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-7)
    alone = _one_process(name, deal)
    for worker, own in enumerate(answers):
        for key, value in own.items():
            one = key.replace(".0.", f".{worker}.") if name == "lte" else key
            torch.testing.assert_close(value, alone[one], rtol=1e-4, atol=1e-6)
    apart = not torch.equal(*(answer["fc1.heads.0.u.weight"] for answer in answers))
    assert apart == (name == "lte")
    assert not torch.equal(answers[0]["fc1.heads.0.v.weight"], _fresh(name))


def _fresh(name: str) -> Tensor:
    model = network()
    return _weights(rankwise.start(model, method(name), adamw(model)))["fc1.heads.0.v.weight"]


def _averaged() -> list[str]:
    return [caught(LifeCycleError, train, "lte", False) for train, _ in TRAINERS.values()]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_heads_of_workers_are_not_averaged_in_silence(together: Workers) -> None:
    for in_trainer, in_lightning in together(_averaged):
        assert r"train_apart(trainer)" in in_trainer
        assert r"strategy=rankwise.integrations.lightning.Apart()" in in_lightning


def _joined_late() -> str:
    """As Lightning joins the group, if nobody has done so before `rankwise.start`."""
    counts = distributed.workers
    model = network()
    try:
        distributed.workers = lambda: 1
        run = rankwise.start(model, method("lte"), adamw(model))
    finally:
        distributed.workers = counts
    batch = next(iter(DataLoader(examples(), batch_size=BATCH)))  # pyright: ignore[reportArgumentType]
    for _ in range(2):
        _step(run, model, batch, "lte")
    return caught(LifeCycleError, _step, run, model, batch, "lte")


def test_a_group_that_is_joined_after_the_start_is_noticed(together: Workers) -> None:
    for message in together(_joined_late):
        assert "2 workers merge their heads, but 1 began the run" in message
        assert "rankwise.distributed.initialize()" in message
