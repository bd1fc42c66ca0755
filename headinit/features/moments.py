"""First and second moments of the features by class: all that the closed-form heads need."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from headinit.errors import DataError

if TYPE_CHECKING:
    from headinit.features.extract import FeatureSet

# Rows converted to float64 at a time: enough for the matrix product to run at full speed, little memory.
BLOCK = 512


@dataclass(frozen=True)
class Moments:
    """Sufficient statistics of a labelled feature set, in float64, in O(d^2 + K d) memory.

    All sums are taken about `shift`, the mean of the first block seen: a mean that is large against the spread (1e4
    with a std of 1, say) then does not cancel the covariance away. Properties give the usual forms.

    The labels are classes `(N,)` int64 (negative ones, such as the -100 of padded tokens, are left out) or targets
    `(N, K)` float (multi-label, regression). The tensors are updated in place by `update`; `merge` and `+` give a
    new value, so ranks and workers can accumulate apart.

    Attributes:
        counts: `(K,)` examples per class, exact; for targets their sum.
        shift: `(d,)` reference point x0.
        shifted_total: `(d,)` sum of (x - x0).
        shifted_sums: `(K, d)` sum of y_k (x - x0); for classes the sum over the class.
        shifted_gram: `(d, d)` sum of (x - x0)(x - x0)'.
        target_squares: `(K,)` sum of y_k^2; for classes equal to `counts`.
        size: 0-d int64, number N of examples.
        kind: ``"classes"`` or ``"targets"``.

    Example:
        >>> x, y = torch.tensor([[0.0, 1.0], [2.0, 1.0], [5.0, 7.0]]), torch.tensor([0, 0, 1])
        >>> moments = Moments.zeros(2, 2).update(x, y)
        >>> moments.counts.tolist(), moments.means.tolist()
        ([2.0, 1.0], [[1.0, 1.0], [5.0, 7.0]])
    """

    counts: Tensor
    shift: Tensor
    shifted_total: Tensor
    shifted_sums: Tensor
    shifted_gram: Tensor
    target_squares: Tensor
    size: Tensor
    kind: str = "classes"

    @classmethod
    def zeros(cls, width: int, num_classes: int, kind: str = "classes") -> Moments:
        """Moments of no examples: `width` features d, `num_classes` classes (or targets) K."""
        if kind not in ("classes", "targets"):
            raise DataError(f"Moments are of 'classes' or of 'targets', not of {kind!r}.")

        def empty(*size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.float64)

        return cls(
            counts=empty(num_classes),
            shift=empty(width),
            shifted_total=empty(width),
            shifted_sums=empty(num_classes, width),
            shifted_gram=empty(width, width),
            target_squares=empty(num_classes),
            size=torch.zeros((), dtype=torch.int64),
            kind=kind,
        )

    @classmethod
    def of(cls, data: FeatureSet) -> Moments:
        """Moments of features in memory."""
        kind = kind_of(data.labels)
        return cls.zeros(data.features.shape[-1], data.num_classes, kind).update(data.features, data.labels)

    @classmethod
    def from_stream(cls, stream: Iterable[tuple[Tensor, Tensor]], num_classes: int) -> Moments:
        """Moments of batches `(features (B, d), labels)` as they come; small batches are gathered into blocks.

        Raises:
            DataError: the stream is empty, or a batch does not fit (see `update`).

        Example:
            >>> batches = [(torch.ones(2, 3), torch.tensor([0, 1])), (torch.zeros(1, 3), torch.tensor([1]))]
            >>> Moments.from_stream(batches, num_classes=2).counts.tolist()
            [1.0, 2.0]
        """
        moments: Moments | None = None
        waiting: list[tuple[Tensor, Tensor]] = []
        rows = 0
        for features, labels in stream:
            features, labels = flatten_tokens(features, labels)
            if moments is None:
                moments = cls.zeros(features.shape[-1], num_classes, kind_of(labels))
            waiting.append((features, labels))
            rows += len(features)
            if rows >= BLOCK:
                moments.update(torch.cat([x for x, _ in waiting]), torch.cat([y for _, y in waiting]))
                waiting, rows = [], 0
        if moments is None:
            raise DataError("The stream of features is empty: there is nothing to compute a head from.")
        if waiting:
            moments.update(torch.cat([x for x, _ in waiting]), torch.cat([y for _, y in waiting]))
        return moments

    def update(self, features: Tensor, labels: Tensor) -> Moments:
        """Add examples, in place; returns itself.

        Args:
            features: `(B, d)` or per token `(B, T, d)`, any floating dtype.
            labels: `(B,)` or `(B, T)` integer classes (negative: left out), or `(B, K)` float targets.

        Raises:
            DataError: widths or counts disagree, a label is out of range, a value is NaN or infinite. The moments are
                then as they were before the offending block.
        """
        features, labels = flatten_tokens(features, labels)
        self._check(features, labels)
        for start in range(0, len(features), BLOCK):
            self._add(features[start : start + BLOCK], labels[start : start + BLOCK])
        return self

    def _check(self, features: Tensor, labels: Tensor) -> None:
        if features.dim() != 2 or features.shape[1] != self.shift.shape[0]:
            raise DataError(f"Features of shape {tuple(features.shape)} do not fit moments of width {len(self.shift)}.")
        if len(features) != len(labels):
            raise DataError(f"{len(features)} feature rows came with {len(labels)} labels.")
        if kind_of(labels) != self.kind:
            raise DataError(
                f"These moments are of {self.kind}; labels of shape {tuple(labels.shape)} and dtype {labels.dtype} are "
                f"{kind_of(labels)}. Classes are (N,) integers, targets (N, K) floats."
            )
        if self.kind == "classes" and labels.numel() and int(labels.max()) >= len(self.counts):
            raise DataError(f"Label {int(labels.max())} is out of range for {len(self.counts)} classes (0 to K - 1).")
        if self.kind == "targets" and as_targets(labels).shape[1] != len(self.counts):
            raise DataError(f"Targets of shape {tuple(labels.shape)} do not fit {len(self.counts)} outputs.")

    def _add(self, features: Tensor, labels: Tensor) -> None:
        block = features.to(torch.float64)
        if self.kind == "classes" and bool((labels < 0).any()):
            block, labels = block[labels >= 0], labels[labels >= 0]
        if not len(block):
            return
        # NaN and infinity spread to the sum, and a float64 sum of finite float32 values cannot overflow.
        if not torch.isfinite(block.sum()):
            bad = (~torch.isfinite(features)).any(dim=1).sum()
            raise DataError(
                f"{int(bad)} of {len(features)} feature rows hold NaN or infinite values. Extract the features in "
                "float32, and check the pictures or texts that they come from."
            )
        if int(self.size) == 0:
            self.shift.copy_(block.mean(dim=0))
        block = block - self.shift
        if self.kind == "classes":
            self.shifted_sums.index_add_(0, labels.long(), block)
            self.counts.add_(torch.bincount(labels.long(), minlength=len(self.counts)))
            self.target_squares.copy_(self.counts)
        else:
            targets = as_targets(labels)
            if not torch.isfinite(targets).all():
                raise DataError("The targets hold NaN or infinite values.")
            self.shifted_sums.addmm_(targets.T, block)
            self.counts.add_(targets.sum(dim=0))
            self.target_squares.add_(targets.square().sum(dim=0))
        self.shifted_gram.addmm_(block.T, block)
        self.shifted_total.add_(block.sum(dim=0))
        self.size.add_(len(block))

    def merge(self, other: Moments) -> Moments:
        """Moments of both sets of examples together, as if they had been seen at once: a new value.

        Raises:
            DataError: widths, numbers of classes or kinds differ.
        """
        if (self.shifted_sums.shape, self.kind) != (other.shifted_sums.shape, other.kind):
            raise DataError(
                f"Cannot merge moments of {self.kind} {tuple(self.shifted_sums.shape)} with moments of {other.kind} "
                f"{tuple(other.shifted_sums.shape)} (classes, features)."
            )
        if int(self.size) == 0:
            return other._about(other.shift)
        moved = other._about(self.shift)
        return Moments(
            counts=self.counts + moved.counts,
            shift=self.shift.clone(),
            shifted_total=self.shifted_total + moved.shifted_total,
            shifted_sums=self.shifted_sums + moved.shifted_sums,
            shifted_gram=self.shifted_gram + moved.shifted_gram,
            target_squares=self.target_squares + moved.target_squares,
            size=self.size + moved.size,
            kind=self.kind,
        )

    __add__ = merge

    def _about(self, shift: Tensor) -> Moments:
        """The same moments about another reference point."""
        delta = self.shift - shift
        cross = torch.outer(self.shifted_total, delta)
        return Moments(
            counts=self.counts.clone(),
            shift=shift.clone(),
            shifted_total=self.shifted_total + self.size * delta,
            shifted_sums=self.shifted_sums + torch.outer(self.counts, delta),
            shifted_gram=self.shifted_gram + cross + cross.T + self.size * torch.outer(delta, delta),
            target_squares=self.target_squares.clone(),
            size=self.size.clone(),
            kind=self.kind,
        )

    def affine(self, offset: Tensor, scale: Tensor) -> Moments:
        """Moments of the features (x - offset) * scale, `offset` and `scale` of shape `(d,)`: a new value.

        Example:
            >>> moments = Moments.zeros(1, 1).update(torch.tensor([[1.0], [3.0]]), torch.tensor([0, 0]))
            >>> moments.affine(moments.mean, 1 / moments.std).gram.tolist()
            [[2.0]]
        """
        offset, scale = offset.to(torch.float64), scale.to(torch.float64)
        return Moments(
            counts=self.counts.clone(),
            shift=(self.shift - offset) * scale,
            shifted_total=self.shifted_total * scale,
            shifted_sums=self.shifted_sums * scale,
            shifted_gram=self.shifted_gram * torch.outer(scale, scale),
            target_squares=self.target_squares.clone(),
            size=self.size.clone(),
            kind=self.kind,
        )

    def __len__(self) -> int:
        return int(self.size)

    @property
    def width(self) -> int:
        """Number of features d."""
        return len(self.shift)

    @property
    def num_classes(self) -> int:
        """Number of classes (or targets) K."""
        return len(self.counts)

    @property
    def absent(self) -> tuple[int, ...]:
        """Classes without an example."""
        return tuple(torch.nonzero(self.counts == 0).flatten().tolist()) if self.kind == "classes" else ()

    @property
    def mean(self) -> Tensor:
        """Mean of the features: `(d,)`."""
        return self.shift + self.shifted_total / self.size.clamp(min=1)

    @property
    def means(self) -> Tensor:
        """Mean of each class: `(K, d)`; the mean of all examples for a class without any."""
        per_class = self.shift + self.shifted_sums / self.counts.clamp(min=1)[:, None]
        return torch.where((self.counts > 0)[:, None], per_class, self.mean)

    @property
    def sums(self) -> Tensor:
        """X'Y transposed, sum of y_k x: `(K, d)`; for classes the sum of the features of each."""
        return self.shifted_sums + torch.outer(self.counts, self.shift)

    @property
    def gram(self) -> Tensor:
        """X'X, sum of x x': `(d, d)`."""
        return self._about(torch.zeros_like(self.shift)).shifted_gram

    @property
    def scatter(self) -> Tensor:
        """Sum of (x - mean)(x - mean)': `(d, d)`; divided by N it is the covariance."""
        return self.shifted_gram - torch.outer(self.shifted_total, self.shifted_total) / self.size.clamp(min=1)

    @property
    def cross(self) -> Tensor:
        """Sum of (y_k - mean y_k)(x - mean): `(K, d)`."""
        return self.shifted_sums - torch.outer(self.counts, self.shifted_total) / self.size.clamp(min=1)

    @property
    def within_scatter(self) -> Tensor:
        """Sum of (x - mu_y)(x - mu_y)', pooled over the classes: `(d, d)`."""
        centred = self.shifted_sums / self.counts.clamp(min=1).sqrt()[:, None]
        return self.shifted_gram - centred.T @ centred

    @property
    def variance(self) -> Tensor:
        """Variance of each feature: `(d,)`, never negative."""
        moved = self.shifted_gram.diagonal() - self.shifted_total.square() / self.size.clamp(min=1)
        return moved.clamp(min=0) / self.size.clamp(min=1)

    @property
    def std(self) -> Tensor:
        """Standard deviation of each feature: `(d,)`."""
        return self.variance.sqrt()

    @property
    def inverse_std(self) -> Tensor:
        """1 / std, `(d,)`, and 0 for constant features: what standardises without dividing by zero.

        A spread of 1e-6 times the size of the values or less is the rounding of a constant, one of 1e-7 times the
        largest spread that of a dead feature (1e-40, say). Features that hardly ever fire are not blown up either: a
        spread counts as a hundredth of the largest at least.
        """
        spread, largest = self.std, self.std.amax()
        size = torch.sqrt(self.variance + self.mean.square())
        constant = spread <= torch.maximum(1e-6 * size, 1e-7 * largest)
        return torch.where(constant, 0.0, 1.0 / torch.where(constant, 1.0, spread).clamp(min=1e-2 * largest))


def kind_of(labels: Tensor) -> str:
    """What labels are: ``"classes"`` (integers of one number an example) or ``"targets"`` (floats, or K columns)."""
    return "classes" if labels.dim() == 1 and not labels.is_floating_point() else "targets"


def as_targets(labels: Tensor) -> Tensor:
    """Targets as `(N, K)` float64; one column is added to `(N,)`."""
    return (labels[:, None] if labels.dim() == 1 else labels).to(torch.float64)


def flatten_tokens(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Features `(B, T, d)` with a label per token `(B, T)` as one row per token; others as they are."""
    if features.dim() == 3 and labels.shape[:2] == features.shape[:2]:
        return features.flatten(0, 1), labels.flatten(0, 1)
    return features, labels
