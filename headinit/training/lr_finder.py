"""Which learning rate to take: a short run whose rate grows at every step tells (Smith, 2017)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from headinit.analysis.metrics import metrics_for
from headinit.errors import TrainingError
from headinit.heads.record import unwrap
from headinit.seeding import derived_seed, global_generators_kept
from headinit.training.finetune import _Run as Run
from headinit.training.finetune import moving_tensors
from headinit.training.recipe import Recipe

LOWEST, HIGHEST, STEPS = 1e-7, 10.0, 100
"""Rates of the first and the last step, and the number of steps: fastai's."""

SMOOTHING = 0.98
"""Share of the past in the smoothed loss, as in fastai."""

DIVERGED = 4.0
"""The sweep ends when the smoothed loss is this many times its least value, as in fastai."""

LEAST_STEPS = 10
"""Fewer steps than these say nothing: what stops them is an error of its own."""


@dataclass(frozen=True)
class RateSweep:
    """What the sweep saw.

    Attributes:
        rates: learning rate of the new parameters at each step.
        losses: smoothed training loss after it.
        suggestion: the rate to take, see `valley`.
    """

    rates: list[float]
    losses: list[float]
    suggestion: float


def find_learning_rate(
    model: nn.Module, train: Any, recipe: Recipe, *, task: str = "single_label", cpu: bool | None = None
) -> RateSweep:
    """Sweep the learning rate from 1e-7 to 10 over 100 steps, growing by the same factor at each.

    All groups grow together, in the proportions of the recipe; a `backbone_lr` that the recipe gives stays where it is.
    The loss is smoothed (bias-corrected mean with weight 0.98), and the sweep ends when it is four times its least
    value or not finite. The model, its modes and the random states are left as they were, to the bit.

    Args:
        model: frozen as it will train.
        train: batches, as for `finetune`; read from their first epoch on, as often as it takes.
        recipe: how the run will train; its own rate and schedule do not matter.
        task: chooses the loss.
        cpu: True to stay on the CPU.

    Raises:
        TrainingError: the loss is not finite within the first ten steps, whatever the rate.

    Example:
        >>> x = torch.tensor([[-1.0], [1.0]] * 8)
        >>> sweep = find_learning_rate(nn.Linear(1, 2), [(x, (x[:, 0] > 0).long())], Recipe(), cpu=True)
        >>> 1e-4 < sweep.suggestion < 1.0
        True
    """
    own = replace(recipe, lr=1.0, schedule="constant", warmup=0.0, epochs=1, steps=STEPS, ema=None)
    rates: list[float] = []
    losses: list[float] = []
    with ExitStack() as stack:
        run = Run(model, train, [], own, task, metrics_for(task), folder=None, cpu=cpu, stack=stack, drift=None)
        stack.enter_context(_put_back(run, unwrap(model)))
        for rate, loss in _sweep(run, recipe):
            rates.append(rate)
            losses.append(loss)
            if loss > DIVERGED * min(losses):
                break
    return RateSweep(rates, losses, rates[valley(losses)])


def valley(losses: Sequence[float]) -> int:
    """Where to take the rate from: the middle of the longest valley.

    The valley is the longest sequence of steps (not necessarily neighbours) of which each has a lower loss than the one
    before. With n steps that end at step e, it is taken to begin at e - n, and the rate is that half way between: the
    loss falls reliably there, and the edge is far. It is fastai's rule of this name.

    Args:
        losses: at rates that grow by the same factor.

    Returns:
        A position in `losses`.

    Example:
        >>> valley([5.0, 5.1, 4.0, 3.0, 2.0, 1.0, 9.0])
        1
    """
    lengths = [1] * len(losses)
    for i, loss in enumerate(losses):
        lengths[i] = 1 + max((lengths[j] for j in range(i) if losses[j] > loss), default=0)
    end = max(range(len(losses)), key=lambda i: (lengths[i], -i))
    start = max(0, end - lengths[end])
    third = (end - start) / 3
    return start + int(third) + int(third / 2)


def _sweep(run: Run, recipe: Recipe) -> Iterator[tuple[float, float]]:
    """Pairs of rate and smoothed loss."""
    shares = [group["initial_lr"] for group in run.optimizer.param_groups]
    growth = (HIGHEST / LOWEST) ** (1 / (STEPS - 1))
    mean = 0.0
    while run.at.steps < STEPS:
        run.model.train()
        for batches in run.remaining_steps():
            step = run.at.steps
            rate = LOWEST * growth**step
            for group, share in zip(run.optimizer.param_groups, shares, strict=True):
                grows = group["name"].startswith("head") or recipe.backbone_lr is None
                group["initial_lr"] = share * rate if grows else share
            try:
                with global_generators_kept(derived_seed(recipe.seed, f"learning rate/{step}")):
                    loss = run.step(batches)
            except TrainingError:  # not finite, or diverged
                if step < LEAST_STEPS:
                    raise
                return
            mean = SMOOTHING * mean + (1 - SMOOTHING) * loss
            smoothed = mean / (1 - SMOOTHING ** (step + 1))
            if not math.isfinite(smoothed):
                return
            yield rate, smoothed
        run.at.epoch, run.at.steps_in_epoch = run.at.epoch + 1, 0


@contextmanager
def _put_back(run: Run, model: nn.Module) -> Iterator[None]:
    """Undo what training changes."""
    modes = [(module, module.training) for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in moving_tensors(model).items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, tensor in moving_tensors(model).items():
                tensor.copy_(before[name])
        run.optimizer.zero_grad(set_to_none=True)
        for module, mode in modes:
            module.training = mode
