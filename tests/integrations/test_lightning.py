"""In Lightning: the plain loop's weights, bit for bit, also killed and resumed."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from plain_loop import (
    CHECKPOINTS,
    CLIP,
    METHODS,
    MICRO,
    STEPS,
    Killed,
    adamw,
    assert_same,
    decay,
    finish_both,
    loader,
    network,
    plain,
)
from torch import Tensor, nn

import rankwise
from rankwise.errors import CheckpointError, LifeCycleError, PlanError
from torchvision_operators import stub_operators

stub_operators()  # it imports torchvision wherever it finds it
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports
    pl: Any = pytest.importorskip("lightning.pytorch")
    from rankwise.integrations.lightning import RunCallback

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
# What it advises: more loader workers, a validation loop, a logger.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning"),
]


class Module(pl.LightningModule):
    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        super().__init__()
        self.model, self.given = model, optimizer

    def training_step(self, batch: dict[str, Tensor], index: int) -> Tensor:
        return self.model(**batch)["loss"]

    def configure_optimizers(self) -> Any:
        scheduler = {"scheduler": decay(self.given), "interval": "step"}
        return {"optimizer": self.given, "lr_scheduler": scheduler}


class Kill(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


def in_lightning(
    name: str,
    folder: Path,
    *,
    resume: Path | None = None,
    kill: int = -1,
    start: dict[str, Any] | None = None,
    clip: float | None = CLIP,
) -> tuple[nn.Module, rankwise.Run]:
    model = network()
    optimizer = adamw(model)
    run = rankwise.start(model, METHODS[name](), optimizer, **{"resume": resume, **(start or {})})
    saving = pl.callbacks.ModelCheckpoint(
        dirpath=folder, filename="{step}", every_n_train_steps=2, save_top_k=-1
    )
    trainer = pl.Trainer(
        default_root_dir=folder,
        max_steps=STEPS,
        accumulate_grad_batches=MICRO,
        gradient_clip_val=clip,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=kill > 0,
        callbacks=[RunCallback(run), Kill(kill), *([saving] if kill > 0 else [])],
    )
    # Lightning does not go to the place in the data where it stopped.
    data = loader(0 if resume is None else run.step)
    trainer.fit(Module(model, optimizer), data, ckpt_path=resume)
    return model, run


# Lightning clips what the optimizer holds; with low-rank gradients the run does it.
def options(name: str) -> dict[str, Any]:
    return {"clip": None, "start": {"clip_norm": CLIP}} if name == "galore" else {}


@pytest.mark.parametrize("name", METHODS)
def test_lightning_gives_the_weights_of_the_plain_loop(name: str, tmp_path: Path) -> None:
    expected, run = plain(name, clips="model" if name == "galore" else "optimizer")
    model, own = in_lightning(name, tmp_path, **options(name))
    assert own.step == run.step == STEPS
    assert_same(model, expected)
    finish_both(own, run)


@pytest.mark.parametrize("name", METHODS)
def test_lightning_is_killed_and_resumed_across_a_change(name: str, tmp_path: Path) -> None:
    expected, run = plain(name, clips="model" if name == "galore" else "optimizer")
    with pytest.raises(Killed):
        in_lightning(name, tmp_path, kill=CHECKPOINTS[name][-1], **options(name))
    own = run
    for step in CHECKPOINTS[name]:
        file = tmp_path / f"step={step}.ckpt"
        model, own = in_lightning(name, tmp_path, resume=file, **options(name))
        assert own.resumed is not None
        assert own.resumed.step == step
        assert_same(model, expected)
    finish_both(own, run)


def test_lightning_is_refused_where_it_would_go_wrong(tmp_path: Path) -> None:
    for name, error, message in [
        ("lora", LifeCycleError, "goes on from step 4, the run is at step 0: give both the same"),
        ("pufferfish", PlanError, r"weights of another structure. Give rankwise\.start"),
    ]:
        with pytest.raises(Killed):
            in_lightning(name, tmp_path / name, kill=4)
        file = tmp_path / name / "step=4.ckpt"
        with pytest.raises(error, match=message):
            in_lightning(name, tmp_path, resume=file, start={"resume": None})
    with pytest.raises(LifeCycleError, match=r"gradient_clip_val .* clip_norm=0\.1"):
        in_lightning("galore", tmp_path)
    model = network()
    callback = RunCallback(rankwise.start(model, METHODS["lora"](), adamw(model)))
    trainer = pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[callback],
    )
    with pytest.raises(LifeCycleError, match="Lightning steps another optimizer"):
        trainer.fit(Module(model, adamw(model)), loader())


def test_a_checkpoint_without_the_callback_or_with_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "plain.ckpt")
    torch.save({"rankwise": {}, "x": Killed()}, tmp_path / "code.ckpt")
    (tmp_path / "torn.ckpt").write_bytes(b"PK\x03\x04")
    cases = {
        "plain": "holds no state of a run: it was saved without the RunCallback",
        "code": r"would execute code \(plain_loop\.Killed\): refused",
        "torn": "is corrupt",
    }
    for name, message in cases.items():
        model, file = network(), tmp_path / f"{name}.ckpt"
        with pytest.raises(CheckpointError, match=message):
            rankwise.start(model, METHODS["lora"](), adamw(model), resume=file)
