"""The contract of every scheme: the head's shape, a generator and, where needed, data in; weights out."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from headinit.errors import SchemeError
from headinit.features.extract import FeatureSet
from headinit.features.moments import Moments


@dataclass(frozen=True)
class HeadShape:
    """Shape of the layer that makes the logits.

    Attributes:
        in_features: width d of what the layer receives.
        out_features: number of logits K.
        bias: whether the layer has a bias.
        kernel_size: number of positions that one output sums over (1 for linear layers and 1x1 convolutions); the
            fan-in is ``in_features * kernel_size``.
    """

    in_features: int
    out_features: int
    bias: bool = True
    kernel_size: int = 1

    @property
    def fan_in(self) -> int:
        """Number of inputs that one output sums."""
        return self.in_features * self.kernel_size

    @property
    def fan_out(self) -> int:
        """Number of outputs that one input feeds."""
        return self.out_features * self.kernel_size


@dataclass(frozen=True)
class HeadWeights:
    """What a scheme gives.

    Attributes:
        weight: `(K, d * kernel_size)`, float32.
        bias: `(K,)`, float32, or None for a head without bias.
        std: the std that the scheme intended for the weight; None when the values come from data.
        bias_std: the std intended for the bias (0.0 for constants).
        notes: facts worth reporting: chosen strength, temperature, absent classes, ...
    """

    weight: Tensor
    bias: Tensor | None
    std: float | None = None
    bias_std: float | None = 0.0
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scheme:
    """Base of all schemes: frozen, comparable, called with shape, generator and data.

    A subclass is a frozen dataclass whose fields are its options, and defines `__call__`. It draws random numbers from
    the generator alone, computes in float32 (float64 for closed forms) on the CPU and returns float32.
    """

    needs_data: ClassVar[bool] = False
    # False where equal inputs give equal units: such a scheme is for the layer that makes the logits, never below.
    breaks_symmetry: ClassVar[bool] = True

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """Weights for a head of this shape.

        Raises:
            SchemeError: the scheme does not suit the shape, or needs data that it was not given.
        """
        raise NotImplementedError


def check_finite(name: str, value: float | None) -> None:
    """Refuse an option that is NaN or infinite; None is allowed.

    Raises:
        SchemeError: the value is not finite.
    """
    if value is not None and not math.isfinite(value):
        raise SchemeError(f"Option {name}={value} must be a finite number.")


def check_positive(name: str, value: float | None, *, zero: bool = False) -> None:
    """Refuse an option that is not a finite number above 0 (or at least 0, with `zero`); None is allowed.

    Raises:
        SchemeError: the value is out of range.

    Example:
        >>> check_positive("std", 0.02)
    """
    check_finite(name, value)
    if value is not None and (value < 0 or (value == 0 and not zero)):
        raise SchemeError(f"Option {name}={value} must be {'at least' if zero else 'above'} 0.")


def constant_bias(shape: HeadShape, value: float) -> Tensor | None:
    """The bias `(K,)`, float32, with one value everywhere; None for a head without bias.

    Example:
        >>> constant_bias(HeadShape(4, 2), 0.5)
        tensor([0.5000, 0.5000])
    """
    return torch.full((shape.out_features,), float(value), dtype=torch.float32) if shape.bias else None
