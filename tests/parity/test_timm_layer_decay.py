"""The same losses as timm's optimizer with layer decay under timm's scheduler."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from headinit.attach import attach_head
from headinit.data.catalog import load_data
from headinit.data.images import ImagePreprocessing
from headinit.data.loading import Batches
from headinit.data.splits import DataSplits
from headinit.training.recipe import Recipe

from .losses import assert_equal_losses, finetune_with_losses

LR, DECAY, WEIGHT_DECAY, WARMUP_EPOCHS = 1e-3, 0.75, 0.05, 1


def train_by_timm(model: nn.Module, train: Batches, epochs: int) -> list[float]:
    """timm's train script in short, with the schedule moved at every update."""
    optimizer = create_optimizer_v2(model, opt="adamw", lr=LR, weight_decay=WEIGHT_DECAY, layer_decay=DECAY)
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=epochs - WARMUP_EPOCHS,
        warmup_epochs=WARMUP_EPOCHS,
        warmup_lr=0.0,
        warmup_prefix=True,  # the cosine begins where the warm-up ends
        step_on_epochs=False,
        updates_per_epoch=len(train),
    )
    losses = []
    model.train()
    for epoch in range(epochs):
        for inputs, labels, _ in train.epoch(epoch):
            loss = nn.functional.cross_entropy(model(inputs), labels)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
            scheduler.step_update(num_updates=len(losses))
    return losses


def compare(splits: DataSplits, size: int, batch_size: int, epochs: int) -> None:
    """Train a ViT-tiny by both loops."""
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", img_size=size)
    model = attach_head(backbone, splits.num_classes, init="trunc_normal", seed=0, pretrained=False)
    theirs = copy.deepcopy(model)
    preprocessing = ImagePreprocessing(size=(size, size), mean=(0.5,) * 3, std=(0.5,) * 3)
    train = Batches(splits.train, preprocessing, batch_size, shuffle_seed=0, cache_decoded=True)
    recipe = Recipe(
        epochs=epochs,
        lr=LR,
        backbone_lr=DECAY * LR,  # timm counts the head as the deepest layer: the last block is one below it
        layer_decay=DECAY,
        weight_decay=WEIGHT_DECAY,
        schedule="cosine",
        warmup=WARMUP_EPOCHS / epochs,
        clip_norm=1.0,
        channels_last=False,
    )
    _, losses = finetune_with_losses(model, train, Batches(splits.validation, preprocessing, 64), recipe)
    assert_equal_losses(losses, train_by_timm(theirs, train, epochs), steps=epochs * len(train))


def test_digits() -> None:
    compare(load_data("digits", train_size=40, validation=16), size=32, batch_size=8, epochs=5)


@pytest.mark.slow
def test_satellite_tiles(shared_data: Any) -> None:
    """50 steps at the tiles' own 64 x 64 pixels."""
    splits = load_data("imagefolder", root=str(shared_data / "eurosat_mini"), train_size=320)
    compare(splits, size=64, batch_size=32, epochs=5)
