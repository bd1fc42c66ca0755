"""Heads with a fixed geometry: zeros, orthogonal rows, a simplex; and the marker for the library's own build."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from headinit.errors import SchemeError
from headinit.features.extract import FeatureSet
from headinit.features.moments import Moments
from headinit.schemes.scheme import HeadShape, HeadWeights, Scheme, check_finite, check_positive, constant_bias


@dataclass(frozen=True)
class Zeros(Scheme):
    """W = 0: every class starts with the same probability and the loss at exactly ln K.

    The usual start of BiT, ViT and big_vision. The first step moves the head alone: the gradient that reaches the
    backbone is exactly zero. For the layer that makes the logits only, since equal hidden units stay equal.

    Attributes:
        bias: constant bias.

    Example:
        >>> Zeros()(HeadShape(4, 2), torch.Generator()).weight.abs().sum().item()
        0.0
    """

    breaks_symmetry: ClassVar[bool] = False
    bias: float = 0.0

    def __post_init__(self) -> None:
        check_finite("bias", self.bias)

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """Zeros; neither `generator` nor `data` is read."""
        weight = torch.zeros(shape.out_features, shape.fan_in, dtype=torch.float32)
        return HeadWeights(weight, constant_bias(shape, self.bias), std=0.0)


@dataclass(frozen=True)
class Orthogonal(Scheme):
    """Orthonormal rows (columns, where K > d), uniformly distributed, times a gain (Saxe et al. 2014).

    The QR decomposition of a Gaussian matrix, with the signs of R's diagonal moved into Q: without that, the result
    is not uniform over the orthogonal matrices (Mezzadri 2007). The std of the entries is gain / sqrt(max(K, d)).

    Attributes:
        gain: length of the rows (of the columns, where K > d).
        bias: constant bias.

    Example:
        >>> w = Orthogonal()(HeadShape(8, 3), torch.Generator().manual_seed(0)).weight
        >>> torch.allclose(w @ w.T, torch.eye(3), atol=1e-6)
        True
    """

    gain: float = 1.0
    bias: float = 0.0

    def __post_init__(self) -> None:
        check_positive("gain", self.gain, zero=True)
        check_finite("bias", self.bias)

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """Orthonormal weights; `data` is not read."""
        rows, columns = shape.out_features, shape.fan_in
        frame = orthonormal_columns(max(rows, columns), min(rows, columns), generator)
        weight = (frame if rows > columns else frame.T) * self.gain
        std = self.gain / math.sqrt(max(rows, columns))
        return HeadWeights(weight.float().contiguous(), constant_bias(shape, self.bias), std=std)


@dataclass(frozen=True)
class SimplexETF(Scheme):
    """Class vectors of equal length at equal, maximal angles: W' = sqrt(K/(K-1)) U (I - 11'/K), U'U = I.

    The geometry that heads and class means reach at the end of training (neural collapse, Papyan et al. 2020), so such
    a head may stay fixed (Zhu et al. 2021). Any two rows have cosine -1/(K-1). The formula asks for d >= K; its K
    vectors sum to zero and span K-1 dimensions only, so U need only be orthonormal there. It is drawn in that
    subspace, which has the same distribution and makes d = K-1 possible as well.

    Attributes:
        scale: length of the rows.
        bias: constant bias.

    Example:
        >>> w = SimplexETF()(HeadShape(8, 3), torch.Generator().manual_seed(0)).weight
        >>> [[round(x, 2) for x in row] for row in (w @ w.T).tolist()]
        [[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]]
    """

    scale: float = 1.0
    bias: float = 0.0

    def __post_init__(self) -> None:
        check_positive("scale", self.scale, zero=True)
        check_finite("bias", self.bias)

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """The simplex, in a random orientation; `data` is not read.

        Raises:
            SchemeError: one class only, or more than d + 1.
        """
        classes, width = shape.out_features, shape.fan_in
        if classes < 2:
            raise SchemeError(
                f"Cannot build a simplex head for {classes} class: its angles need at least 2. "
                "Use another init, such as zeros or lecun."
            )
        if width < classes - 1:
            raise SchemeError(
                f"Cannot build a simplex head for {classes} classes on {width} features: {classes} equal angles need "
                f"at least {classes - 1} dimensions. Use another init, such as orthogonal."
            )
        frame = orthonormal_columns(width, classes - 1, generator)
        weight = self.scale * math.sqrt(classes / (classes - 1)) * (_centred_basis(classes) @ frame.T)
        std = self.scale / math.sqrt(width)
        return HeadWeights(weight.float().contiguous(), constant_bias(shape, self.bias), std=std)


@dataclass(frozen=True)
class Library(Scheme):
    """A mark for "what the model's own library would have built for K classes".

    `attach_head` and `init_head` see the mark and take the head of the same architecture, freshly built by torchvision,
    timm or transformers for that class count. Called without a model, as here, there is no library but torch: it gives
    the default of `torch.nn.Linear`, U(+-1/sqrt(fan_in)) for weight and bias.

    Example:
        >>> Library()(HeadShape(300, 2), torch.Generator().manual_seed(0)).std == 1 / 30
        True
    """

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """torch's default for a linear layer; `data` is not read."""
        bound = 1.0 / math.sqrt(shape.fan_in)
        weight = _uniform((shape.out_features, shape.fan_in), bound, generator)
        bias = _uniform((shape.out_features,), bound, generator) if shape.bias else None
        std = 1.0 / math.sqrt(3.0 * shape.fan_in)
        return HeadWeights(weight, bias, std=std, bias_std=std if shape.bias else 0.0)


def orthonormal_columns(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """A matrix with orthonormal columns, uniformly distributed: `(rows, columns)`, float64; rows >= columns.

    Example:
        >>> q = orthonormal_columns(5, 2, torch.Generator().manual_seed(0))
        >>> torch.allclose(q.T @ q, torch.eye(2, dtype=torch.float64))
        True
    """
    gaussian = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)


def _uniform(size: tuple[int, ...], bound: float, generator: torch.Generator) -> Tensor:
    return (torch.rand(size, generator=generator, dtype=torch.float32) * 2.0 - 1.0) * bound


def _centred_basis(classes: int) -> Tensor:
    """An orthonormal basis (Helmert's) of the vectors that sum to zero: `(K, K-1)`, float64, V V' = I - 11'/K."""
    basis = torch.zeros(classes, classes - 1, dtype=torch.float64)
    for j in range(1, classes):
        basis[:j, j - 1] = 1.0
        basis[j, j - 1] = -j
        basis[:, j - 1] /= math.sqrt(j * (j + 1))
    return basis


SCHEMES: dict[str, Callable[..., Scheme]] = {
    "zeros": Zeros,
    "orthogonal": Orthogonal,
    "etf": SimplexETF,
    "library": Library,
}
