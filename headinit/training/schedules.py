"""Learning-rate schedules as pure functions of the step: nothing to store, nothing to restore."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence

SCHEDULES = ("cosine", "linear", "step", "staircase", "constant")


def learning_rate_factor(
    name: str,
    step: int,
    total_steps: int,
    *,
    warmup_steps: int = 0,
    steps_per_epoch: int = 1,
    step_epochs: int = 10,
    step_gamma: float = 0.1,
    milestones: Sequence[int] = (),
) -> float:
    """What the learning rates of all groups are multiplied by at an optimizer step.

    With t the step, w the warm-up and T the total: t / w while t < w; then ``cosine`` (1 + cos(pi (t - w) / (T - w)))
    / 2 (Loshchilov and Hutter, 2017, without restarts), ``linear`` (T - t) / (T - w), ``step`` gamma^floor(epoch /
    step_epochs), ``staircase`` gamma to the number of milestones reached, ``constant`` 1. Cosine, linear and constant
    are those of transformers, step is torch's `StepLR` and staircase its `MultiStepLR`, counted in optimizer steps.

    Args:
        name: one of `SCHEDULES`.
        step: optimizer steps done, from 0.
        total_steps: optimizer steps of the whole run.
        warmup_steps: steps of linear warm-up from 0.
        steps_per_epoch, step_epochs, step_gamma: for ``step``.
        milestones: rising steps from each of which on the rates are multiplied by `step_gamma`, for ``staircase``.

    Example:
        >>> [round(learning_rate_factor("cosine", step, 4, warmup_steps=1), 3) for step in range(5)]
        [0.0, 1.0, 0.75, 0.25, 0.0]
    """
    if step < warmup_steps:
        return step / warmup_steps
    if name == "constant":
        return 1.0
    if name == "step":
        return step_gamma ** (step // steps_per_epoch // step_epochs)
    if name == "staircase":
        return step_gamma ** bisect_right(milestones, step)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if name == "linear":
        return max(0.0, 1.0 - progress)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))
