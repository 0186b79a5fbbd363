"""LoRA in the Trainer of transformers: a small ViT, taught five digits, is adapted to five others.

python examples/trainer.py [FOLDER]     # a minute on one core; killed and called again, it goes on

The checkpoints and the adapter, which PEFT can load, are written to FOLDER (runs/trainer). Needs
`pip install 'rankwise[trainer]'`.
"""

import sys
from pathlib import Path

import torch

import rankwise
from rankwise import data
from rankwise.models.from_transformers import hide_broken_torchvision

hide_broken_torchvision()  # transformers imports it wherever it finds it

from transformers import (  # noqa: E402
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.trainer_utils import get_last_checkpoint  # noqa: E402

from rankwise.integrations.huggingface import RunCallback  # noqa: E402

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/trainer")
splits = data.load("mnist-5k")


def digits(split: data.Split, first: int) -> list[dict[str, torch.Tensor]]:
    """Five digits from `first` on, as the model's arguments; labels 0 to 4."""
    chosen = (split.labels >= first) & (split.labels < first + 5)
    pairs = zip(split.images[chosen], split.labels[chosen] - first, strict=True)
    return [{"pixel_values": image, "labels": label} for image, label in pairs]


def arguments(name: str, epochs: int, rate: float) -> TrainingArguments:
    """What both trainings have in common."""
    return TrainingArguments(
        output_dir=str(folder / name),
        per_device_train_batch_size=50,
        num_train_epochs=epochs,
        learning_rate=rate,
        save_steps=40,
        save_total_limit=1,
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )


def accuracy(model: torch.nn.Module, rows: list[dict[str, torch.Tensor]]) -> float:
    """Share of images that the model gets right."""
    device = next(model.parameters()).device
    images, labels = (torch.stack([row[key] for row in rows]) for key in ("pixel_values", "labels"))
    with torch.no_grad():
        scores = model.eval()(pixel_values=images.to(device)).logits
    return float((scores.argmax(-1).cpu() == labels).float().mean())


config = ViTConfig(
    image_size=28,
    patch_size=7,
    num_channels=1,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    id2label={label: str(label) for label in range(5)},
)
torch.manual_seed(0)
model = ViTForImageClassification(config)

# The dense model of the first five digits: trained once, then read from its folder.
if not (folder / "dense" / "config.json").is_file():
    Trainer(model, arguments("first", 6, 2e-3), train_dataset=digits(splits.train, 0)).train()
    model.save_pretrained(folder / "dense")
model = ViTForImageClassification.from_pretrained(folder / "dense")
rest = digits(splits.test, 5)
known = accuracy(model, digits(splits.test, 0))
print(f"digits 0-4: {known:.3f}, 5-9: {accuracy(model, rest):.3f}")

# LoRA: four lines around the Trainer's own.
(folder / "lora").mkdir(parents=True, exist_ok=True)
checkpoint = get_last_checkpoint(str(folder / "lora"))  # None at first
trainer = Trainer(model, arguments("lora", 4, 1e-2), train_dataset=digits(splits.train, 5))
method = rankwise.LoRA(rank=4, alpha=8, layers="*attention*", others="classifier")
run = rankwise.start(model, method, trainer.create_optimizer(), resume=checkpoint)
trainer.add_callback(RunCallback(run))
learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
trainer.train(resume_from_checkpoint=checkpoint)
adapter = rankwise.export_peft(model, folder / "adapter")
run.finish()

size = sum(file.stat().st_size for file in adapter.iterdir())
stored = sum(p.numel() for p in model.parameters())
print(f"digits 5-9: {accuracy(model, rest):.3f}, {learning:,} of {stored:,} parameters learned")
print(f"adapter for PEFT: {adapter}, {size:,} bytes")
