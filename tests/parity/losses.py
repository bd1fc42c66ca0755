"""What two training loops are compared by: the loss of every step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
from torch import nn

from headinit.training.finetune import TrainingOutcome, _Run, finetune
from headinit.training.recipe import Recipe

BOUND = 1e-5
"""Largest relative difference of the loss at any step: float32 rounding (6e-8) and what 50 steps make of it."""


def finetune_with_losses(
    model: nn.Module, train: Any, validation: Iterable[Any], recipe: Recipe, **options: Any
) -> tuple[TrainingOutcome, list[float]]:
    """Train by headinit's own loop; its outcome, and the loss that each step had."""
    losses: list[float] = []
    step = _Run.step

    def recorded(run: _Run, *args: Any) -> float:
        losses.append(step(run, *args))
        return losses[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_Run, "step", recorded)
        outcome = finetune(model, train, validation, recipe, cpu=True, **options)
    return outcome, losses


def assert_equal_losses(ours: list[float], theirs: list[float], *, steps: int, bound: float = BOUND) -> None:
    """Both loops took `steps` steps, learnt something, and had the same loss at each."""
    assert len(ours) == len(theirs) == steps
    assert np.std(theirs) > 1e-3, "losses that hardly move would be equal whatever the recipe"
    difference = largest_difference(ours, theirs)
    print(f"largest relative difference of the loss over {steps} steps: {difference:.2e}")
    assert difference <= bound


def largest_difference(ours: list[float], theirs: list[float]) -> float:
    """Largest relative difference of two sequences."""
    return float(np.max(np.abs(np.subtract(ours, theirs)) / np.abs(theirs)))
