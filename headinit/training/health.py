"""Signs that a run is hopeless, looked for while it trains, so that it ends early and says why.

What is looked at costs next to nothing: the loss, which the loop knows anyway, and a few gradients of the first steps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from headinit.errors import TrainingError
from headinit.training.sharding import put_together

LEAST_CHANCE = math.log(2)
"""The loss of chance of two classes, the least there is. A first loss above it counts instead."""

DIVERGED_FACTOR = 10.0
"""A loss is too high above this many times the first loss (or `LEAST_CHANCE`)."""

LEARNT_LOSS = 1e-3
"""Below this loss gradients may vanish because there is nothing left to learn."""

DIVERGED_STEPS = 100
"""Steps in a row with such a loss after which it is judged: a spike is survived, and so is a rough warm-up."""

GRADIENT_STEPS = 5
"""Steps at the beginning whose gradients are looked at. A head of zeros gives the backbone none at the first step, and
at the second where the warm-up begins at a rate of 0; a dead one has none at any."""

Judge = Callable[[], tuple[Tensor, Tensor]]


class Health:
    """Watches a run; one object for each.

    Args:
        task: as for `finetune`.
        head, backbone: trainable parameters, new and pretrained.
        names: of parameters, by `id`.

    Attributes:
        first_loss: loss of the first step; None before it.
        steps_too_high: how many of the latest steps in a row had too high a loss.
        without_head_gradient, without_backbone_gradient: how many of the first steps had an all-zero gradient there.
    """

    def __init__(
        self, task: str, head: Sequence[nn.Parameter], backbone: Sequence[nn.Parameter], names: dict[int, str]
    ) -> None:
        # A dead head still moves its biases, to the shares of the classes.
        self.head = [p for p in head if p.ndim > 1] or list(head)
        self.backbone = list(reversed(backbone))  # those next to the head first: there a gradient is found at once
        self.task, self.names = task, names
        self.first_loss: float | None = None
        self.steps_too_high = self.without_head_gradient = self.without_backbone_gradient = 0
        self._told = False

    def state(self) -> dict[str, float | None]:
        """What a checkpoint keeps, so that a resumed run judges as an uninterrupted one."""
        return {name: getattr(self, name) for name in _STATE}

    def restore(self, state: dict[str, float | None]) -> None:
        """Go on from a checkpoint."""
        for name, value in state.items():
            setattr(self, name, value)

    def check_loss(self, loss: float, step: int, predict: Judge) -> None:
        """Look at the loss of a step.

        Args:
            loss: its mean loss over targets.
            step: its number, from 1 on.
            predict: gives outputs and labels of its examples; called where the loss has been too high for long.

        Raises:
            TrainingError: the loss has diverged, and the predictions are no better than a constant.
        """
        if self.first_loss is None:
            self.first_loss = loss
        self.steps_too_high = self.steps_too_high + 1 if loss > DIVERGED_FACTOR * self._usual else 0
        if not self.steps_too_high or self.steps_too_high % DIVERGED_STEPS:
            return
        high = f"over {DIVERGED_FACTOR:g} times {self._usual:.3g}"
        found = f"The loss has been {high} for {self.steps_too_high} steps ({loss:.3g} at step {step})"
        advice = "a learning rate that is too high; try a tenth of it, a longer warm-up, or clipping."
        if _no_better_than_a_constant(self.task, *predict()):
            raise TrainingError(
                f"{found}, and the predictions are no better than a constant: training has diverged. Likely cause: "
                f"{advice}"
            )
        if not self._told:
            warnings.warn(f"{found}, though the predictions are still of use. Likely cause: {advice}", stacklevel=2)
        self._told = True

    def check_gradients(self, loss: float, step: int) -> None:
        """Look at the gradients of one of the first steps, before the optimizer uses them.

        Raises:
            TrainingError: nothing but biases has had a gradient in all of the first steps.
        """
        if step > GRADIENT_STEPS or loss <= LEARNT_LOSS:  # what has been learnt needs no gradient
            return
        if self.head:
            self.without_head_gradient += not _any_gradient(self.head)
        if self.backbone:
            self.without_backbone_gradient += not _any_gradient(self.backbone)
        if step < GRADIENT_STEPS:
            return
        dead = self.without_head_gradient == GRADIENT_STEPS
        cut_off = self.without_backbone_gradient == GRADIENT_STEPS
        if dead and (cut_off or not self.backbone):
            raise TrainingError(self._dead_head())
        if dead:
            warnings.warn(f"{self._dead_head()} The backbone trains all the same.", stacklevel=2)
        elif cut_off:
            warnings.warn(
                f"No gradient has reached the backbone in the first {GRADIENT_STEPS} steps, so only the head trains. "
                "Likely cause: the head's last layers stand still, or the model cuts its graph (detach, no_grad) "
                "before the head. Freeze the backbone (freeze=all), which is quicker, or choose another init.",
                stacklevel=2,
            )

    @property
    def _usual(self) -> float:
        return max(self.first_loss or 0.0, LEAST_CHANCE)

    def _dead_head(self) -> str:
        zero = [self.names[id(p)] for p in self.head if not bool(put_together(p.detach()).any())]
        cause = (
            f"{', '.join(zero)} {'is' if len(zero) == 1 else 'are'} all zero, and what follows lets no gradient through"
            if zero
            else "the features that reach it, or its own hidden units, are all zero"
        )
        return (
            f"The gradient of every weight of the new head was exactly zero in the first {GRADIENT_STEPS} steps: it "
            f"cannot learn. Likely cause: {cause}. Choose an init that is not all zeros (init=he), or another learning "
            "rate if it started otherwise."
        )


_STATE = ("first_loss", "steps_too_high", "without_head_gradient", "without_backbone_gradient")


def _any_gradient(parameters: Iterable[nn.Parameter]) -> bool:
    return any(p.grad is not None and bool(put_together(p.grad).any()) for p in parameters)


def _no_better_than_a_constant(task: str, outputs: Tensor, labels: Tensor) -> bool:
    """Whether always giving the most frequent class (the mean target) would do as well on these examples.

    Of several labels no verdict: a useless probability may still rank well.
    """
    outputs, labels = outputs.detach().float().cpu(), labels.cpu()
    if task == "regression":
        outputs, labels = outputs.reshape(len(labels), -1), labels.float().reshape(len(labels), -1)
        return bool((outputs - labels).square().mean() >= (labels - labels.mean(0)).square().mean())
    if task == "multi_label":
        return False
    known = labels >= 0
    outputs, labels = outputs[known], labels[known]
    right = (outputs.argmax(-1) == labels).float().mean()
    return bool(right <= torch.bincount(labels).max() / max(1, len(labels)))
