"""Pufferfish in a loop of your own: a perceptron on real digits, half a minute on two cores.

python examples/own_loop.py
"""

import torch
import torch.nn.functional as F

import rankwise
from rankwise import data, models

EPOCHS, BATCH = 8, 100

torch.manual_seed(0)
splits = data.load("mnist-5k")
model = models.build("mlp-512x8")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
steps_per_epoch = data.steps_per_epoch(splits.train, BATCH)


def accuracy(split: data.Split) -> float:
    """Share of a split's images that the model gets right."""
    with torch.no_grad():
        return float((model(split.images).argmax(1) == split.labels).float().mean())


run = rankwise.start(
    model,
    rankwise.Pufferfish(ranks=0.25, warmup_epochs=4),
    optimizer,
    steps_per_epoch=steps_per_epoch,
    sample=splits.train.images[:1],
)
print(run.plan, "\n")
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)

for epoch in range(EPOCHS):
    for x, y in data.batches(splits.train, batch_size=BATCH, seed=0, epoch=epoch):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    scheduler.step()
    stored = sum(p.numel() for p in model.parameters())
    print(f"epoch {epoch + 1}: validation {accuracy(splits.validation):.3f}, {stored:,} parameters")

run.finish()
print(f"test {accuracy(splits.test):.3f}; events: {[e['event'] for e in run.events]}")
