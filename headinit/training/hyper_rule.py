"""BiT's HyperRule: length, schedule, MixUp and picture size from the size of the data, nothing to tune."""

from __future__ import annotations

from dataclasses import dataclass

from headinit.errors import ConfigError


@dataclass(frozen=True)
class HyperRule:
    """What the rule chooses.

    Attributes:
        steps: optimizer steps.
        warmup_steps: of linear warm-up.
        milestones: steps from each of which on the learning rate is a tenth.
        mixup: alpha of MixUp; 0 for none.
        image_size: side of the square pictures.
    """

    steps: int
    warmup_steps: int
    milestones: tuple[int, ...]
    mixup: float
    image_size: int


def bit_hyperrule(examples: int, picture_size: tuple[int, int]) -> HyperRule:
    """The rule of "Big Transfer" (Kolesnikov et al., 2020, https://arxiv.org/abs/1912.11370, section 3.3).

    500 steps under 20,000 training examples, 10,000 under 500,000, else 20,000; a tenth of the rate at 30, 60 and 90 %
    (at 40, 60 and 80 % of 500 steps, as in the authors' code, whose rate falls in the step after the boundary); MixUp
    with alpha 0.1 from 20,000 examples on; pictures of 128 pixels where they are smaller than 96 x 96, else 480.

    Args:
        examples: number of training examples.
        picture_size: width and height of the pictures as they are.

    Raises:
        ConfigError: no examples.

    Example:
        >>> bit_hyperrule(50_000, (32, 32))
        HyperRule(steps=10000, warmup_steps=500, milestones=(3001, 6001, 9001), mixup=0.1, image_size=128)
    """
    if examples < 1:
        raise ConfigError(f"The HyperRule needs training examples, found {examples}.")
    if examples < 20_000:
        warmup, *falls, steps = 100, 200, 300, 400, 500
    elif examples < 500_000:
        warmup, *falls, steps = 500, 3_000, 6_000, 9_000, 10_000
    else:
        warmup, *falls, steps = 500, 6_000, 12_000, 18_000, 20_000
    small = picture_size[0] * picture_size[1] < 96 * 96
    return HyperRule(
        steps, warmup, tuple(s + 1 for s in falls), 0.0 if examples < 20_000 else 0.1, 128 if small else 480
    )
