"""The settings of one fine-tuning run, checked when they are made."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from headinit.analysis.metrics import HIGHER_IS_BETTER
from headinit.errors import ConfigError, unknown_name
from headinit.training.schedules import SCHEDULES, learning_rate_factor

OPTIMIZERS = ("adamw", "sgd")
SELECTIONS = ("best", "last")
PRECISIONS = ("fp32", "bf16", "fp16", "auto")


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        epochs: passes over the training data; 0 only evaluates the start.
        steps: optimizer steps instead of epochs; the last epoch is cut short. None counts epochs.
        lr: peak learning rate of the new parameters (of all, where no head is recorded).
        backbone_lr: of the pretrained ones; None for a share of `lr`.
        backbone_share: that share; None for what suits the start of the head (`param_groups.backbone_share`).
        layer_decay: factor on `backbone_lr` from one block to the one below it; None for none.
        weight_decay: decoupled for ``"adamw"``, in the gradient for ``"sgd"``; never on biases and norms.
        optimizer: ``"adamw"`` (betas, eps) or ``"sgd"`` (momentum, nesterov).
        bias_correction: of Adam's moments; False for the BERT authors' Adam, which has none.
        schedule: ``"cosine"``, ``"linear"``, ``"step"`` (times `step_gamma` every `step_epochs`), ``"staircase"``
            (times `step_gamma` at each of the steps `milestones`) or ``"constant"``.
        warmup: share of all steps, in [0, 1), over which the rates rise linearly from 0.
        clip_norm: greatest norm of the whole gradient; None for no clipping.
        accumulation: batches per optimizer step; the mean over their targets is exact, also in a shorter last step.
        label_smoothing: for cross entropy, in [0, 1).
        mixup: alpha of MixUp (see `headinit.training.mixup`), for pictures and features; 0 for none.
        patience: evaluations without improvement after which training stops; None for never.
        monitor: validation metric that chooses the best epoch.
        select: ``"best"`` keeps the weights of the best epoch, ``"last"`` those of the last.
        precision: ``"fp32"``, ``"bf16"`` or ``"fp16"`` autocast, or ``"auto"``: bf16 where the hardware has it and the
            model's features on its first batch stay within 1 % of float32, else fp32.
        evaluate_every: epochs between evaluations; the last epoch is always evaluated.
        ema: decay of an average of the weights over the steps, such as 0.999 (see `training.averaging`), which is
            evaluated and kept in the place of the weights; None for none.
        compile: True to compile the training steps with `torch.compile`, ``"auto"`` where it pays (on a GPU, and for
            long runs on pictures), False not to. Where there is no compiler, a message says so and nothing is compiled.
        channels_last: lay pictures out as (N, H, W, C) in memory; faster convolutions, other rounding.
        seed: of dropout and stochastic depth.

    Raises:
        ConfigError: lists every setting that is out of range.

    Example:
        >>> Recipe(epochs=3, lr=1e-2, optimizer="sgd").nesterov
        True
    """

    epochs: int = 10
    steps: int | None = None
    lr: float = 1e-3
    backbone_lr: float | None = None
    backbone_share: float | None = None
    layer_decay: float | None = None
    weight_decay: float = 0.01
    optimizer: str = "adamw"
    momentum: float = 0.9
    nesterov: bool = True
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    bias_correction: bool = True
    schedule: str = "cosine"
    warmup: float = 0.1
    step_epochs: int = 10
    step_gamma: float = 0.1
    milestones: tuple[int, ...] = ()
    clip_norm: float | None = 1.0
    accumulation: int = 1
    label_smoothing: float = 0.0
    mixup: float = 0.0
    patience: int | None = None
    monitor: str = "accuracy"
    select: str = "best"
    precision: str = "fp32"
    evaluate_every: int = 1
    ema: float | None = None
    compile: bool | str = False
    channels_last: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        object.__setattr__(self, "milestones", tuple(self.milestones))
        mistakes = [*self._unknown_names(), *self._out_of_range()]
        if mistakes:
            raise ConfigError("\n".join(mistakes))

    def rate_factor(self, step: int, total_steps: int, steps_per_epoch: int) -> float:
        """What the learning rates are multiplied with at an optimizer step.

        Args:
            step: from 0.
            total_steps, steps_per_epoch: of the run.

        Example:
            >>> [Recipe(warmup=0.5, schedule="constant").rate_factor(step, 4, 4) for step in range(4)]
            [0.0, 0.5, 1.0, 1.0]
        """
        return learning_rate_factor(
            self.schedule,
            step,
            total_steps,
            # Not the only step of a short phase: it would be one at a rate of 0.
            warmup_steps=min(math.ceil(self.warmup * total_steps), total_steps - 1),
            steps_per_epoch=steps_per_epoch,
            step_epochs=self.step_epochs,
            step_gamma=self.step_gamma,
            milestones=self.milestones,
        )

    def of_head_alone(self) -> Recipe:
        """The recipe without what is about a backbone, for a head that trains on features.

        Example:
            >>> Recipe(backbone_lr=1e-5).of_head_alone().backbone_lr is None
            True
        """
        return replace(self, backbone_lr=None, backbone_share=None, layer_decay=None)

    def _unknown_names(self) -> Iterator[str]:
        for setting, known in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
            ("select", SELECTIONS),
            ("monitor", tuple(HIGHER_IS_BETTER)),
        ):
            if getattr(self, setting) not in known:
                yield str(unknown_name(setting, getattr(self, setting), known))

    def _out_of_range(self) -> Iterator[str]:
        ranges: dict[str, tuple[float, float, str]] = {
            "epochs": (0, math.inf, "a whole number from 0 on"),
            "steps": (1, math.inf, "a whole number from 1 on, or null to count epochs"),
            "lr": (0.0, math.inf, "a number from 0 on, such as 1e-3"),
            "backbone_lr": (0.0, math.inf, "a number from 0 on, such as 1e-5"),
            "backbone_share": (0.0, math.inf, "a number from 0 on, such as 0.1"),
            "layer_decay": (math.ulp(0.0), 1.0, "a factor above 0 and up to 1, such as 0.75"),
            "weight_decay": (0.0, math.inf, "a number from 0 on, such as 0.01"),
            "momentum": (0.0, math.nextafter(1.0, 0.0), "a number from 0 to below 1"),
            "eps": (math.ulp(0.0), math.inf, "a number above 0, such as 1e-8"),
            "warmup": (0.0, math.nextafter(1.0, 0.0), "a share of the steps from 0 to below 1, such as 0.1"),
            "step_epochs": (1, math.inf, "a whole number from 1 on"),
            "step_gamma": (0.0, 1.0, "a factor from 0 to 1"),
            "clip_norm": (math.ulp(0.0), math.inf, "a number above 0, or null for no clipping"),
            "accumulation": (1, math.inf, "a whole number from 1 on"),
            "label_smoothing": (0.0, math.nextafter(1.0, 0.0), "a share from 0 to below 1"),
            "mixup": (0.0, math.inf, "a number from 0 (none) on, such as 0.1"),
            "patience": (1, math.inf, "a whole number from 1 on, or null for none"),
            "evaluate_every": (1, math.inf, "a whole number from 1 on"),
            "ema": (0.0, math.nextafter(1.0, 0.0), "a decay from 0 to below 1, such as 0.999, or null for no average"),
        }
        optional = ("steps", "backbone_lr", "backbone_share", "layer_decay", "clip_norm", "patience", "ema")
        for setting, (low, high, advice) in ranges.items():
            value = getattr(self, setting)
            whole = advice.startswith("a whole") and isinstance(value, float)
            valid = isinstance(value, int | float) and low <= value <= high and value != math.inf and not whole
            if not valid and not (value is None and setting in optional):
                yield f"{setting}={value!r} is out of range. Give {advice}."
        if len(self.betas) != 2 or not all(0.0 <= beta < 1.0 for beta in self.betas):
            yield f"betas={self.betas!r} are out of range. Give two numbers from 0 to below 1, such as [0.9, 0.999]."
        if self.compile not in (True, False, "auto"):
            yield f"compile={self.compile!r} is none of true, false and auto."
        if list(self.milestones) != sorted(set(self.milestones)) or any(m < 1 for m in self.milestones):
            yield f"milestones={self.milestones!r} must be whole numbers above 0 that rise, such as [200, 300, 400]."
        if self.schedule == "staircase" and not self.milestones:
            yield "schedule=staircase needs milestones, the optimizer steps at which rates fall, such as [200, 300]."
        if self.backbone_lr is not None and self.backbone_share is not None:
            yield "backbone_lr and backbone_share both set the rate of the pretrained layers: give one of the two."
        if self.select == "last" and self.patience is not None:
            yield "patience waits for a better epoch and select=last keeps the last one: drop one of the two."
        if self.optimizer == "sgd" and self.nesterov and self.momentum == 0:
            yield "Nesterov momentum needs a momentum above 0. Give momentum=0.9, or nesterov=false."
