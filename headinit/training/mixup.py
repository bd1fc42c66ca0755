"""MixUp: training examples that are weighted means of two (Zhang et al., 2018, https://arxiv.org/abs/1710.09412)."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from headinit.errors import TrainingError
from headinit.seeding import derived_seed


def mixing_share(alpha: float, seed: int, purpose: str) -> float:
    """The share lambda ~ Beta(alpha, alpha) of the first example in a mixture, the same for the same seed and purpose.

    Example:
        >>> share = mixing_share(0.2, seed=0, purpose="3/0")
        >>> 0.0 <= share <= 1.0 and share == mixing_share(0.2, seed=0, purpose="3/0")
        True
    """
    return float(np.random.default_rng(derived_seed(seed, f"mixup/{purpose}")).beta(alpha, alpha))


def mix(
    inputs: Any, labels: Tensor, alpha: float, seed: int, purpose: str
) -> tuple[Tensor, tuple[tuple[float, Tensor], ...]]:
    """A batch mixed with itself moved on by one: x'_i = lambda x_i + (1 - lambda) x_{i-1}, one lambda for the batch.

    The loss is mixed alike, lambda l(f(x'), y_i) + (1 - lambda) l(f(x'), y_{i-1}), which for cross entropy is the loss
    against mixed targets. Batches are shuffled, so the neighbour is a random partner (as in torchvision's `v2.MixUp`).

    Args:
        inputs: `(B, ...)` pictures or features.
        labels: `(B, ...)`.
        alpha: of the Beta distribution; small values keep mixtures near one of the two.
        seed, purpose: decide lambda; the global generators are not touched.

    Returns:
        The mixed inputs, and pairs (share, labels) whose losses add up.

    Raises:
        TrainingError: the inputs are no tensor of numbers (text).

    Example:
        >>> import torch
        >>> mixed, parts = mix(torch.eye(2), torch.tensor([0, 1]), 1.0, seed=0, purpose="0/0")
        >>> torch.allclose(mixed.sum(1), torch.ones(2)), [labels.tolist() for _, labels in parts]
        (True, [[0, 1], [1, 0]])
    """
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
        raise TrainingError("trainer.mixup mixes pictures or features, and these inputs are text. Set it to 0.")
    share = mixing_share(alpha, seed, purpose)
    mixed = inputs * share + inputs.roll(1, 0) * (1 - share)
    return mixed, ((share, labels), (1 - share, labels.roll(1, 0)))
