"""What the schemes computed from data share: input checks, held-out losses, the scale of the logits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headinit.errors import SchemeError
from headinit.features.extract import FeatureSet
from headinit.features.moments import Moments, as_targets, flatten_tokens, kind_of
from headinit.schemes.scheme import HeadShape, HeadWeights

MISSING = ("mean", "error")

# Examples with a uniform label that are added where a scale is fitted.
SMOOTH = 0.5

# How many examples equal shares of a mixture are worth.
EQUAL_SHARES = 3.0

# What comes in.


def features_for(name: str, data: FeatureSet | Moments | None, shape: HeadShape, why: str = "") -> FeatureSet:
    """The features that a scheme was given, checked against the head.

    Raises:
        SchemeError: there are none, only moments, or they do not fit the head.
    """
    if isinstance(data, Moments):
        reason = why or "scores single examples"
        raise SchemeError(
            f"init={name} {reason} and was given moments, which have lost them. Give it a FeatureSet "
            "(headinit.extract_features)."
        )
    if data is None:
        raise SchemeError(
            f"init={name} is computed from data and was given none. Pass data=: a FeatureSet, a pair of tensors or a "
            "DataLoader."
        )
    features, labels = flatten_tokens(data.features, data.labels)
    if kind_of(labels) == "classes":
        if labels.numel() and int(labels.max()) >= data.num_classes:
            raise SchemeError(f"init={name}: label {int(labels.max())} is out of range for {data.num_classes} classes.")
        known = labels >= 0  # padded tokens are -100
        features, labels = (features, labels.long()) if bool(known.all()) else (features[known], labels[known].long())
    _check_shapes(name, features.shape[-1], data.num_classes, len(features), shape)
    if len(features) != len(labels):
        raise SchemeError(f"init={name}: {len(features)} feature rows came with {len(labels)} labels.")
    return replace(data, features=features, labels=labels)


def class_features_for(name: str, data: FeatureSet | Moments | None, shape: HeadShape) -> FeatureSet:
    """As `features_for`, for schemes that need one class per example.

    Raises:
        SchemeError: as there, or the labels are targets.
    """
    checked = features_for(name, data, shape)
    if kind_of(checked.labels) != "classes":
        raise _targets_error(name)
    return checked


def moments_for(
    name: str, data: FeatureSet | Moments | None, shape: HeadShape, kind: str | None = "classes"
) -> Moments:
    """The moments that a scheme was given, or those of the features that it was given, checked against the head.

    Raises:
        SchemeError: there is no data, it does not fit the head, or the labels are of another kind than needed.
    """
    moments = data if isinstance(data, Moments) else Moments.of(features_for(name, data, shape))
    _check_shapes(name, moments.width, moments.num_classes, len(moments), shape)
    if kind is not None and moments.kind != kind:
        raise _targets_error(name)
    return moments


def _targets_error(name: str) -> SchemeError:
    return SchemeError(
        f"init={name} needs one class per example, and these labels are targets (multi-label or regression). "
        "Use init=ridge, which takes them."
    )


def _check_shapes(name: str, width: int, classes: int, size: int, shape: HeadShape) -> None:
    if width != shape.fan_in:
        raise SchemeError(f"init={name}: the features are {width} wide and the head takes {shape.fan_in}.")
    if classes != shape.out_features:
        raise SchemeError(
            f"init={name}: the data have {classes} classes and the head makes {shape.out_features} logits."
        )
    if size == 0:
        raise SchemeError(f"init={name} was given no examples. Add some, or use an analytic init such as lecun.")


# Classes without examples.


def check_missing(name: str, missing: str, moments: Moments) -> dict[str, Any]:
    """Notes on classes without examples; empty if every class has one.

    Raises:
        SchemeError: some class has none and `missing` is ``"error"``; or `missing` is unknown.
    """
    if missing not in MISSING:
        raise SchemeError(f"Option missing={missing!r} of init={name} must be 'mean' or 'error'.")
    absent = list(moments.absent)
    if not absent:
        return {}
    if missing == "error":
        raise SchemeError(
            f"Cannot compute init={name} for class {absent[0]}: 0 of {len(moments)} training examples"
            + (f" (and {len(absent) - 1} more such classes)" if len(absent) > 1 else "")
            + ". Add one, or set missing='mean'."
        )
    shown = ", ".join(map(str, absent[:10])) + (", ..." if len(absent) > 10 else "")
    warning = (
        f"No examples of class {shown}: {len(absent)} of {moments.num_classes} rows start at the mean of the others."
    )
    return {"absent_classes": absent, "warnings": [warning]}


def present_only(data: FeatureSet) -> FeatureSet:
    """The same examples with the absent classes struck out and the others renumbered."""
    present = torch.unique(data.labels)
    if len(present) == data.num_classes:
        return data
    return replace(data, labels=torch.searchsorted(present, data.labels), num_classes=len(present))


def present_moments(moments: Moments) -> Moments:
    """The same moments with the absent classes struck out."""
    if not moments.absent:
        return moments
    kept = moments.counts > 0
    return replace(
        moments,
        counts=moments.counts[kept],
        shifted_sums=moments.shifted_sums[kept],
        target_squares=moments.target_squares[kept],
    )


def fill_absent(weight: Tensor, bias: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the present classes `(K', d)`, `(K',)` as rows of all K; `counts` is `(K,)`.

    An absent class gets the mean row and the mean bias plus the log of its share, half an example, over a mean class:
    its logit is then below the mean of the others, so it never wins before it has learned something.
    """
    present = counts > 0
    if bool(present.all()):
        return weight, bias
    share = torch.log(0.5 / counts[present].mean())
    all_rows = weight.mean(dim=0).repeat(len(counts), 1)
    all_biases = (bias.mean() + share).repeat(len(counts))
    all_rows[present], all_biases[present] = weight, bias
    return all_rows, all_biases


def fold_bias(weight: Tensor, bias: Tensor, moments: Moments) -> Tensor:
    """Weights for a head without bias whose logits are as near as possible to W x + b over the data.

    With v = argmin sum (v'x - 1)^2 (slightly regularised), b is replaced by b v'x: features after a ReLU or a
    LayerNorm nearly hold a constant. The bias is centred first, since a shift common to all logits changes nothing.
    """
    gram = moments.gram
    gram.diagonal().add_(1e-3 * gram.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny))
    constant = torch.linalg.solve(gram, len(moments) * moments.mean)
    return weight + torch.outer(bias - bias.mean(), constant)


def finish(weight: Tensor, bias: Tensor, moments: Moments, shape: HeadShape, notes: dict[str, Any]) -> HeadWeights:
    """The head from the rows of the present classes: absent ones filled in, the bias folded where there is none."""
    weight, bias = fill_absent(weight, bias, moments.counts)
    if not shape.bias and bool(bias.any()):
        weight = fold_bias(weight, bias, moments)
        notes = {**notes, "bias_folded": True}
    return HeadWeights(weight.float(), bias.float() if shape.bias else None, bias_std=None, notes=notes)


# The scale of the logits.


@dataclass(frozen=True)
class Calibration:
    """A scale for scores, and how well the scaled scores predict examples that they were not computed from.

    Attributes:
        scale: factor on the scores (one over the temperature).
        losses: `(n,)` -log p of each scored example at that scale.
        accuracy: share of scored examples with the largest score at their own class.
    """

    scale: float
    losses: Tensor
    accuracy: float

    @property
    def loss(self) -> float:
        """Mean of the losses, in nats."""
        return float(self.losses.mean())


def log_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label] of each row: `(N,)`."""
    return torch.logsumexp(logits, dim=1) - logits.gather(1, labels[:, None])[:, 0]


def calibrate(scores: Tensor, labels: Tensor, *, scale: float | None = None) -> Calibration:
    """Fit the scale of held-out scores, or judge them at a given one.

    Args:
        scores: `(n, K)`, each row scored by a head that has not seen it (leave-one-out, or another fold).
        labels: `(n,)` their classes.
        scale: keep this scale.

    Example:
        >>> calibrate(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])).accuracy
        1.0
    """
    scale = fit_scale(scores, labels) if scale is None else scale
    accuracy = float((scores.argmax(dim=1) == labels).double().mean())
    return Calibration(scale, log_losses(scores * scale, labels), accuracy)


def fit_scale(scores: Tensor, labels: Tensor) -> float:
    """The scale s that minimises the mean of -log softmax(s z)[y], found by Newton's method inside a bracket.

    The loss is convex in s. Half an example with a uniform label is added (as in Platt 1999), which bounds s where
    the scores separate the classes and leaves it unchanged for large n. Scores that do not predict get a scale near
    0.

    Example:
        >>> z = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0)).double() * 2
        >>> y = torch.multinomial(torch.softmax(0.5 * z, 1), 1, generator=torch.Generator().manual_seed(1))[:, 0]
        >>> 0.45 < fit_scale(z, y) < 0.55
        True
    """
    # Classes before examples: sums over the classes then run along memory.
    centred = (scores - scores.mean(dim=1, keepdim=True)).T.contiguous()
    spread = float(centred.square().mean().sqrt())
    if spread == 0.0 or scores.shape[1] < 2:
        return 1.0
    centred = centred / spread
    own, squares = float(centred.gather(0, labels[None]).mean()), centred.square()
    smooth = SMOOTH / len(scores)
    low, high, scale = 1e-3, 1e4, 1.0
    for _ in range(60):
        probability = torch.softmax(centred * scale, dim=0)
        first = (probability * centred).sum(dim=0)
        second = (probability * squares).sum(dim=0) - first.square()
        slope = (1 + smooth) * float(first.mean()) - own
        low, high = (scale, high) if slope < 0 else (low, scale)
        step = slope / max((1 + smooth) * float(second.mean()), 1e-300)
        proposal = scale - step
        proposal = proposal if low < proposal < high else (low * high) ** 0.5
        if abs(proposal - scale) <= 1e-7 * scale:
            break
        scale = proposal
    return scale / spread


def mixing_weights(scores: list[Tensor], labels: Tensor) -> list[float]:
    """Weights a_m >= 0 that minimise mean(-log softmax(sum_m a_m z_m)[y]) + T / (2 n) sum_m (a_m - 1/M)^2.

    Stacking (Wolpert 1992), pulled towards equal shares of the M heads with the strength of a few examples, T =
    `EQUAL_SHARES`: heads that few examples cannot tell apart are averaged, which is safer than to choose one. The
    problem is convex and has one number per head; as in `fit_scale`, half an example with a uniform label bounds it.

    Args:
        scores: for each head `(n, K)` held-out scores, already scaled.
        labels: `(n,)`.

    Example:
        >>> good, bad = 9 * torch.eye(2).double().repeat(50, 1), 9 * torch.eye(2).double()[[1, 0]].repeat(50, 1)
        >>> a, b = mixing_weights([good, bad], torch.tensor([0, 1]).repeat(50))
        >>> a > 0.5, b < 0.2
        (True, True)
    """
    from scipy.optimize import minimize

    stacked = torch.stack([z - z.mean(dim=1, keepdim=True) for z in scores])
    own = stacked.gather(2, labels.expand(len(stacked), -1)[:, :, None]).mean(dim=(1, 2))
    smooth, pull, equal = SMOOTH / len(labels), EQUAL_SHARES / len(labels), 1.0 / len(scores)

    def objective(weights: Any) -> tuple[float, Any]:
        a = torch.from_numpy(weights)
        logits = torch.einsum("m,mnk->nk", a, stacked)
        normaliser = torch.logsumexp(logits, dim=1)
        p = torch.exp(logits - normaliser[:, None])
        gradient = (1 + smooth) * (p * stacked).sum(dim=2).mean(dim=1) - own + pull * (a - equal)
        loss = (1 + smooth) * normaliser.mean() - a @ own + 0.5 * pull * (a - equal).square().sum()
        return float(loss), gradient.numpy()

    start = torch.full((len(scores),), equal, dtype=torch.float64).numpy()
    result = minimize(objective, start, jac=True, method="L-BFGS-B", bounds=[(0.0, None)] * len(scores))
    return [float(a) for a in result.x]


def unit_scale(scores: Tensor) -> float:
    """The scale at which the logits of an example have std 1 over the classes: where nothing can be held out."""
    spread = float((scores - scores.mean(dim=1, keepdim=True)).square().mean().sqrt())
    return 1.0 / spread if spread > 0 else 1.0


def scorable(labels: Tensor, num_classes: int) -> Tensor:
    """Which examples can be held out: those whose class has another one. `(N,)` bool."""
    return torch.bincount(labels, minlength=num_classes)[labels] >= 2


def held_out_rows(data: FeatureSet) -> Tensor:
    """Up to ten thousand examples (a million scores) that can be held out, drawn without order: `(n,)` indices.

    A thousand examples settle one number, the scale; a hundred thousand cost time and memory only.
    """
    rows = torch.nonzero(scorable(data.labels, data.num_classes)).flatten()
    limit = min(max(1000, 1_000_000 // data.num_classes), 10_000)
    return rows if len(rows) <= limit else rows[torch.randperm(len(rows), generator=fixed_generator())[:limit]]


def fixed_generator() -> torch.Generator:
    """What draws folds and samples: always the same, so that a head computed from data depends on them alone."""
    return torch.Generator().manual_seed(0)


def folds_of(labels: Tensor, num_folds: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Stratified folds: index pairs `(kept, held out)`; every class is spread over the folds as evenly as it can be.

    They are the same at every call.

    Example:
        >>> [len(held) for _, held in folds_of(torch.tensor([0, 0, 0, 1, 1, 1]), 3)]
        [2, 2, 2]
    """
    order = torch.randperm(len(labels), generator=fixed_generator())
    order = order[torch.argsort(labels[order], stable=True)]
    fold = torch.empty(len(labels), dtype=torch.int64)
    fold[order] = torch.arange(len(labels)) % num_folds
    for k in range(num_folds):
        yield torch.nonzero(fold != k).flatten(), torch.nonzero(fold == k).flatten()


def task_of(data: FeatureSet | Moments) -> str:
    """``"single_label"``, ``"multi_label"`` (targets of 0 and 1) or ``"regression"``, read off the labels."""
    if isinstance(data, Moments):
        if data.kind == "classes":
            return "single_label"
        # y^2 = y for every target only if all are 0 or 1 (the sums agree by accident with probability 0).
        binary = torch.allclose(data.target_squares, data.counts, rtol=1e-12, atol=0) and bool((data.counts >= 0).all())
        return "multi_label" if binary else "regression"
    if kind_of(data.labels) == "classes":
        return "single_label"
    targets = as_targets(data.labels)
    return "multi_label" if bool(((targets == 0) | (targets == 1)).all()) else "regression"
