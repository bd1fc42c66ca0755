"""Features in the axes of their own covariance: one eigendecomposition that every closed form then shares."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from headinit.features.moments import Moments

# Directions with less than this share of the largest eigenvalue hold rounding errors: duplicated columns, constants.
RANK_TOLERANCE = 1e-11


@dataclass(frozen=True)
class Rotation:
    """An affine map of the features onto their r principal axes: q = V' ((x - offset) * scale).

    Weights with an L2 penalty lie in the span of the examples, so nothing is lost when r < d, and all strengths of
    the penalty are solved by divisions once the eigenvalues are known.

    Attributes:
        offset: `(d,)`, the mean; zero where the head has no bias.
        scale: `(d,)`, ones, or 1 / std (0 for constant features).
        axes: `(d, r)`, V with orthonormal columns.
        eigenvalues: `(r,)` sum over the examples of q_j^2, falling.
        size: number of examples N.
    """

    offset: Tensor
    scale: Tensor
    axes: Tensor
    eigenvalues: Tensor
    size: int

    @property
    def rank(self) -> int:
        """Number r of axes kept."""
        return len(self.eigenvalues)

    @property
    def mean_variance(self) -> float:
        """Mean over the d features of their variance (second moment without a bias): the unit of strengths."""
        return float(self.eigenvalues.sum()) / (max(self.size, 1) * len(self.offset)) or 1.0

    def apply(self, features: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        """The rotated features: `(N, d)` to `(N, r)` in `dtype`."""
        return ((features.to(dtype) - self.offset.to(dtype)) * self.scale.to(dtype)) @ self.axes.to(dtype)

    def unfold(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Weights `(K, r)` and bias `(K,)` on q as weights `(K, d)` and bias on x, in float64."""
        unrotated = (weight.to(torch.float64) @ self.axes.T) * self.scale
        return unrotated, bias.to(torch.float64) - unrotated @ self.offset


@dataclass
class Rotations:
    """The axes of raw and of standardised features, each computed when it is first asked for and then kept.

    Attributes:
        moments: moments of the features.
        features: `(N, d)` the features themselves, if they are at hand.
        centre: take the axes about the mean; about 0 for a head without bias.
    """

    moments: Moments
    features: Tensor | None
    centre: bool = True
    found: dict[str, Rotation] = field(default_factory=dict)

    def __call__(self, features: str) -> Rotation:
        """The axes of ``"raw"`` or ``"standardised"`` features."""
        if features not in self.found:
            standardise = features == "standardised"
            self.found[features] = rotation_of(self.moments, self.features, standardise=standardise, centre=self.centre)
        return self.found[features]


def rotation_of(
    moments: Moments, features: Tensor | None = None, *, standardise: bool, centre: bool = True
) -> Rotation:
    """Principal axes of the features that `moments` were taken from.

    With fewer examples than features, the eigenvectors come from the N x N matrix of inner products instead of the
    d x d scatter: the same axes for less work.

    Args:
        moments: moments of the features.
        features: `(N, d)` the features themselves, if they are at hand.
        standardise: divide every feature by its std first.
        centre: take the axes about the mean; about 0 for a head without bias.

    Example:
        >>> x = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
        >>> rotation = rotation_of(Moments.zeros(2, 1).update(x, torch.tensor([0, 0, 0])), standardise=False)
        >>> rotation.rank, rotation.eigenvalues.tolist()
        (1, [8.0])
    """
    offset = moments.mean if centre else torch.zeros_like(moments.shift)
    scale = moments.inverse_std if standardise else torch.ones_like(moments.shift)
    if features is not None and len(features) < moments.width:
        rows = (features.to(torch.float64) - offset) * scale
        eigenvalues, left = torch.linalg.eigh(rows @ rows.T)
        kept = _kept(eigenvalues)
        eigenvalues, left = eigenvalues[kept].flip(0), left[:, kept].flip(1)
        axes = (rows.T @ left) / eigenvalues.sqrt()
    else:
        scatter = (moments.scatter if centre else moments.gram) * torch.outer(scale, scale)
        eigenvalues, axes = torch.linalg.eigh(scatter)
        kept = _kept(eigenvalues)
        eigenvalues, axes = eigenvalues[kept].flip(0), axes[:, kept].flip(1)
    return Rotation(offset, scale, axes.contiguous(), eigenvalues, len(moments))


def _kept(eigenvalues: Tensor) -> Tensor:
    return eigenvalues > RANK_TOLERANCE * eigenvalues.max().clamp(min=torch.finfo(torch.float64).tiny)
