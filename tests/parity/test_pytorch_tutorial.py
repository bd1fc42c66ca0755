"""The same losses as the loop of PyTorch's transfer-learning tutorial: SGD with momentum, StepLR, batches of 4."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from headinit.attach import attach_head
from headinit.data.catalog import load_data
from headinit.data.images import ImagePreprocessing
from headinit.data.loading import Batches
from headinit.data.splits import DataSplits
from headinit.training.recipe import Recipe

from .losses import assert_equal_losses, finetune_with_losses

TUTORIAL = Recipe(
    epochs=9,  # past the first fall of the learning rate
    lr=1e-3,
    backbone_lr=1e-3,
    weight_decay=0.0,
    optimizer="sgd",
    momentum=0.9,
    nesterov=False,
    schedule="step",
    step_epochs=7,
    step_gamma=0.1,
    warmup=0.0,
    clip_norm=None,
    channels_last=False,  # the tutorial's memory layout, whose convolutions add up in another order
)


def train_as_the_tutorial(
    model: nn.Module, train: Batches, validation: Batches, epochs: int
) -> tuple[list[float], list[float]]:
    """The tutorial's `train_model`: losses of the steps, and the accuracy after each epoch."""
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=7, gamma=0.1)
    losses, accuracies = [], []
    for epoch in range(epochs):
        model.train()
        for inputs, labels, _ in train.epoch(epoch):
            optimizer.zero_grad()
            loss = criterion(model(inputs), labels)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        scheduler.step()
        model.eval()
        with torch.no_grad():
            right = sum(int((model(inputs).argmax(1) == labels).sum()) for inputs, labels, _ in validation)
        accuracies.append(right / len(validation.split))
    return losses, accuracies


def compare(splits: DataSplits, size: int, recipe: Recipe = TUTORIAL) -> None:
    """Train a ResNet-18 by both loops; losses of every step and accuracies of every epoch must agree."""
    preprocessing = ImagePreprocessing(size=(size, size))
    model = attach_head(resnet18(weights=None), splits.num_classes, init="torch", seed=0, pretrained=False)
    theirs = copy.deepcopy(model)
    options: dict[str, Any] = {"cache_decoded": True, "workers": 2}
    train = Batches(splits.train, preprocessing, 4, shuffle_seed=0, **options)
    validation = Batches(splits.validation, preprocessing, 4, **options)
    outcome, losses = finetune_with_losses(model, train, validation, recipe)
    their_losses, their_accuracies = train_as_the_tutorial(theirs, train, validation, recipe.epochs)
    assert_equal_losses(losses, their_losses, steps=9 * len(train))
    assert [row["accuracy"] for row in outcome.history[1:]] == pytest.approx(their_accuracies)
    assert outcome.best["accuracy"] >= max(their_accuracies) - 1e-6  # headinit also looks at the start


def test_digits() -> None:
    compare(load_data("digits", train_size=12, validation=12), size=32)


@pytest.mark.slow
def test_hymenoptera(shared_data: Any) -> None:
    """54 steps, the last 12 of them at a tenth of the learning rate."""
    splits = load_data("imagefolder", root=str(shared_data / "hymenoptera"), train_size=24, check_pictures=False)
    few = splits.validation.select(range(0, 153, 8))
    compare(dataclasses.replace(splits, validation=few), size=224)
