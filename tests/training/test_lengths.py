"""Training for a number of steps, the last epoch, and Adam without bias correction."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from headinit.data.loading import CycledBatches, TensorBatches
from headinit.training.finetune import finetune
from headinit.training.recipe import Recipe


def batches(seed: int | None = 1) -> TensorBatches:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator)
    return TensorBatches(x, (x[:, 0] > 0).long(), 8, shuffle_seed=seed)


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (5, 1), (7, 2), (10, 2)])
def test_steps_take_the_place_of_epochs(steps: int, epochs: int) -> None:
    outcome = finetune(nn.Linear(6, 2), batches(), batches(None), Recipe(steps=steps), cpu=True)
    assert outcome.steps == steps
    assert [row["epoch"] for row in outcome.history] == list(range(epochs + 1))
    assert outcome.history[-1]["step"] == steps


def test_cycled_batches_replay_the_passes_one_after_the_other() -> None:
    whole = [batch.index.tolist() for e in range(3) for batch in batches().epoch(e)]
    cycled = CycledBatches(batches(), 4)
    assert len(cycled) == 4
    again = [batch.index.tolist() for e in range(3) for batch in cycled.epoch(e)]
    assert again == whole[:12]
    assert [batch.index.tolist() for batch in cycled.epoch(1, start=3)] == whole[7:8]
    assert cycled.batch_size == 8


def test_the_last_epoch_is_kept_if_asked() -> None:
    recipe = Recipe(epochs=3, lr=5.0, optimizer="sgd", schedule="constant", warmup=0.0, clip_norm=None)
    model = nn.Linear(6, 2)
    # Labels that training makes worse: the best epoch is the first.
    flipped = TensorBatches(batches().features, 1 - batches().labels, 8)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2, 6).flip(0) * 3)
        model.weight[:, 1:] = 0
        model.weight[0, 0], model.weight[1, 0] = -3.0, 3.0
    best = finetune(model, flipped, batches(None), recipe, cpu=True)
    assert best.best_epoch == 0
    last = finetune(model, flipped, batches(None), Recipe(**{**recipe.__dict__, "select": "last"}), cpu=True)
    assert last.best_epoch == 3
    assert last.best["accuracy"] < best.best["accuracy"]


def test_adam_without_bias_correction_is_the_bert_authors() -> None:
    data = batches(None)
    recipe = Recipe(
        epochs=2, lr=1e-2, weight_decay=0.1, eps=1e-6, schedule="constant", warmup=0.0, clip_norm=None,
        bias_correction=False, select="last",
    )  # fmt: skip
    torch.manual_seed(3)
    model = nn.Linear(6, 2).double()
    weight, bias = (p.detach().clone() for p in (model.weight, model.bias))
    moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in (weight, bias)]
    for epoch in range(2):
        for batch in data.epoch(epoch):
            w, b = weight.clone().requires_grad_(), bias.clone().requires_grad_()
            logits = batch.inputs.double() @ w.T + b
            grads = torch.autograd.grad(nn.functional.cross_entropy(logits, batch.labels), (w, b))
            for parameter, gradient, (m, v), decay in zip((weight, bias), grads, moments, (0.1, 0.0), strict=True):
                m.mul_(0.9).add_(gradient, alpha=0.1)
                v.mul_(0.999).add_(gradient**2, alpha=0.001)
                parameter -= 1e-2 * (m / (v.sqrt() + 1e-6) + decay * parameter)
    doubled = TensorBatches(data.features.double(), data.labels, 8)
    finetune(model, doubled, doubled, recipe, cpu=True)
    torch.testing.assert_close(model.weight.detach(), weight, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(model.bias.detach(), bias, rtol=1e-10, atol=1e-12)
