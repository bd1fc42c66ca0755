"""Heads made of averages: class means, k-means proxies, mixtures of the pretrained classifier's rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from headinit.errors import SchemeError
from headinit.features.extract import FeatureSet
from headinit.features.moments import Moments
from headinit.heads.modules import PROXY_POOLINGS, pool_proxies
from headinit.schemes.calibration import (
    calibrate,
    check_missing,
    class_features_for,
    fill_absent,
    finish,
    folds_of,
    held_out_rows,
    moments_for,
    present_moments,
    present_only,
    scorable,
    unit_scale,
)
from headinit.schemes.scheme import HeadShape, HeadWeights, Scheme


@dataclass(frozen=True)
class ClassMean(Scheme):
    """The nearest class mean as a linear head: w_k = mu_k, b_k = -|mu_k|^2 / 2 (NCM).

    The logits order the classes by the squared distance of x to their means, so the head predicts what a nearest
    centroid classifier predicts. The means are taken about the mean of all features, which changes no prediction and
    keeps the numbers small. Squared distances are not log probabilities: with `calibrate`, (W, b) are multiplied by
    one scale fitted on leave-one-out scores, where the mean of an example's own class leaves the example out exactly.

    Attributes:
        calibrate: fit the scale (needs the features; with moments alone the scale stays 1).
        missing: ``"mean"`` gives a class without examples the mean row, ``"error"`` refuses it.

    Example:
        >>> x, y = torch.tensor([[0.0], [1.0], [9.0], [10.0]]), torch.tensor([0, 0, 1, 1])
        >>> head = ClassMean()(HeadShape(1, 2), torch.Generator(), FeatureSet(x, y, 2))
        >>> (x @ head.weight.T + head.bias).argmax(1).tolist()
        [0, 0, 1, 1]
    """

    needs_data: ClassVar[bool] = True
    calibrate: bool = True
    missing: str = "mean"

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """The class means.

        Raises:
            SchemeError: no data, data that do not fit, or a class without examples under ``missing="error"``.
        """
        moments = moments_for("class_mean", data, shape)
        notes = check_missing("class_mean", self.missing, moments)
        present = present_moments(moments)
        means = present.means - present.mean
        weight, bias = means, -0.5 * means.square().sum(dim=1)
        scale = 1.0
        if self.calibrate and isinstance(data, FeatureSet):
            examples = present_only(class_features_for("class_mean", data, shape))
            scale, found = _mean_scale(examples, present)
            notes |= found
        bias = bias - weight @ present.mean
        return finish(weight * scale, bias * scale, moments, shape, {"scale": scale, **notes})


def _mean_scale(examples: FeatureSet, moments: Moments) -> tuple[float, dict[str, Any]]:
    """The scale of leave-one-out scores -|x - mu|^2 / 2: without x its own mean moves to x - n/(n-1) (x - mu)."""
    rows = held_out_rows(examples)
    means = moments.means - moments.mean
    if not len(rows):
        x = examples.features.double() - moments.mean
        return unit_scale(x @ means.T - 0.5 * means.square().sum(dim=1)), {"calibration": "unit logit std"}
    x, y = examples.features[rows].double() - moments.mean, examples.labels[rows]
    scores = x @ means.T - 0.5 * means.square().sum(dim=1)
    count = moments.counts[y]
    distance = (x - means[y]).square().sum(dim=1)
    # Scores are known up to |x|^2 / 2, common to a row: change the own one by the change of its distance.
    scores[torch.arange(len(rows)), y] -= 0.5 * distance * ((count / (count - 1)).square() - 1)
    fit = calibrate(scores, y)
    return fit.scale, {"calibration": "leave-one-out", "held_out_loss": fit.loss, "held_out_accuracy": fit.accuracy}


@dataclass(frozen=True)
class Imprint(Scheme):
    """Imprinted weights: w_k = normalise(mean of normalise(x) over class k), b = 0 (Qi, Brown and Lowe 2018).

    Qi et al. use them in a cosine head with a learned scale. In a linear head, which does not normalise x, the scale
    is multiplied in: it is fitted on leave-one-out scores of the raw features, so one scale serves a mean norm of x.

    Attributes:
        scale: the scale; None fits it (needs the features).
        missing: ``"mean"`` gives a class without examples the mean row, ``"error"`` refuses it.

    Example:
        >>> x, y = torch.tensor([[3.0, 0.0], [0.0, 2.0]]), torch.tensor([0, 1])
        >>> Imprint(scale=1.0)(HeadShape(2, 2), torch.Generator(), FeatureSet(x, y, 2)).weight.tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """

    needs_data: ClassVar[bool] = True
    scale: float | None = None
    missing: str = "mean"

    def __post_init__(self) -> None:
        if self.scale is not None and not 0 < self.scale < float("inf"):
            raise SchemeError(f"Option scale={self.scale} of init=imprint must be a finite number above 0.")

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """The imprinted rows.

        Raises:
            SchemeError: no features (the mean of normalised features is not a moment of the raw ones), or they do not
                fit; a class without examples under ``missing="error"``.
        """
        checked = class_features_for("imprint", data, shape)
        moments = Moments.of(checked)
        notes = check_missing("imprint", self.missing, moments)
        examples = present_only(checked)
        x = examples.features.double()
        unit = x / x.norm(dim=1, keepdim=True).clamp(min=1e-300)
        sums = torch.zeros(examples.num_classes, x.shape[1], dtype=torch.float64).index_add_(0, examples.labels, unit)
        weight = normalise_rows(sums)
        scale = self.scale
        if scale is None:
            rows = held_out_rows(examples)
            if len(rows):
                y = examples.labels[rows]
                scores = x[rows] @ weight.T
                left_out = normalise_rows(sums[y] - unit[rows])
                scores[torch.arange(len(rows)), y] = (x[rows] * left_out).sum(dim=1)
                fit = calibrate(scores, y)
                scale = fit.scale
                notes |= {"held_out_loss": fit.loss, "held_out_accuracy": fit.accuracy, "calibration": "leave-one-out"}
            else:
                scale = unit_scale(x @ weight.T)
                notes["calibration"] = "unit logit std"
        bias = torch.zeros(len(weight), dtype=torch.float64)
        return finish(weight * scale, bias, moments, shape, {"scale": scale, **notes})


@dataclass(frozen=True)
class MultiProxy(Scheme):
    """Several prototypes per class, the centres of k-means within it (IMPRINT, TMLR 2025).

    For a head of K m rows, row k m + j being proxy j of class k, whose class logits are the max or the log-sum-exp
    over the m rows of each class: w = s (c - mean), b = -s |c - mean|^2 / 2 + log(share of the class in the cluster).
    With log-sum-exp that is a mixture of Gaussians per class. A class with fewer than m examples repeats proxies,
    each with its part of the share. The scale s is fitted on the scores of halves that the proxies were not computed
    from.

    Attributes:
        pooling: how the head joins the rows of a class, ``"logsumexp"`` or ``"max"``; with max the shares are left
            out. None is as the head does it (log-sum-exp where no head says so).
        calibrate: fit the scale.
        missing: ``"mean"`` gives a class without examples the mean rows, ``"error"`` refuses it.

    Example:
        >>> x, y = torch.tensor([[0.0], [4.0], [8.0], [12.0]]), torch.tensor([0, 1, 0, 1])
        >>> head = MultiProxy(calibrate=False)(HeadShape(1, 4), torch.Generator().manual_seed(0), FeatureSet(x, y, 2))
        >>> pool_proxies(x @ head.weight.T + head.bias, 2).argmax(1).tolist()
        [0, 1, 0, 1]
    """

    needs_data: ClassVar[bool] = True
    pooling: str | None = None
    calibrate: bool = True
    missing: str = "mean"

    def __post_init__(self) -> None:
        if self.pooling not in (None, *PROXY_POOLINGS):
            raise SchemeError(
                f"Option pooling={self.pooling!r} of init=multi_proxy must be one of {', '.join(PROXY_POOLINGS)}."
            )

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """The proxies, for a head of m rows per class: ``shape.out_features`` is K m.

        Raises:
            SchemeError: no features, or they do not fit; rows that are no multiple of the classes.
        """
        classes = data.num_classes if data is not None else shape.out_features
        proxies, rest = divmod(shape.out_features, max(classes, 1))
        if rest or not proxies:
            raise SchemeError(
                f"init=multi_proxy needs the same number of rows for each of {classes} classes, and the head has "
                f"{shape.out_features} rows. Use a multi_proxy head, or init=class_mean for one row per class."
            )
        if not shape.bias:
            raise SchemeError("init=multi_proxy needs a head with a bias. Use init=imprint, which needs none.")
        checked = class_features_for("multi_proxy", data, replace(shape, out_features=classes))
        moments = Moments.of(checked)
        notes = check_missing("multi_proxy", self.missing, moments)
        examples = present_only(checked)
        offset = moments.mean
        weight, bias = self._proxies(examples, proxies, offset, generator)
        scale = 1.0
        if self.calibrate:
            scale, found = self._scale(examples, proxies, offset, generator)
            notes |= found
        weight, squares, shares = weight * scale, bias[0] * scale, bias[1]
        bias_out = squares + (0.0 if self.pooling == "max" else shares) - weight @ offset
        rows, biases = fill_absent(
            weight.reshape(examples.num_classes, -1), bias_out.reshape(-1, proxies).mean(1), moments.counts
        )
        all_biases = biases[:, None].repeat(1, proxies)
        all_biases[moments.counts > 0] = bias_out.reshape(-1, proxies)
        notes = {"scale": scale, "proxies": proxies, "pooling": self.pooling or "logsumexp", **notes}
        return HeadWeights(
            rows.reshape(-1, shape.fan_in).float(), all_biases.flatten().float(), bias_std=None, notes=notes
        )

    def _proxies(
        self, examples: FeatureSet, proxies: int, offset: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        centres, shares = [], []
        for k in range(examples.num_classes):
            found, share = cluster(examples.features[examples.labels == k].double() - offset, proxies, generator)
            centres.append(found)
            shares.append(share.log())
        weight = torch.cat(centres)
        return weight, (-0.5 * weight.square().sum(dim=1), torch.cat(shares))

    def _scale(
        self, examples: FeatureSet, proxies: int, offset: Tensor, generator: torch.Generator
    ) -> tuple[float, dict[str, Any]]:
        """The scale by two halves; the shares enter pooled scores at every scale, so max-pooled scores settle it."""
        usable = scorable(examples.labels, examples.num_classes)
        if not bool(usable.any()):
            weight, (squares, _) = self._proxies(examples, proxies, offset, generator)
            scores = (examples.features.double() - offset) @ weight.T + squares
            return unit_scale(pool_proxies(scores, proxies, "max")), {"calibration": "unit logit std"}
        pooled, labels = [], []
        kept_examples = replace(examples, features=examples.features[usable], labels=examples.labels[usable])
        kept_examples = present_only(kept_examples)
        for kept, held in folds_of(kept_examples.labels, 2):
            part = replace(kept_examples, features=kept_examples.features[kept], labels=kept_examples.labels[kept])
            weight, (squares, _) = self._proxies(part, proxies, offset, generator)
            scores = (kept_examples.features[held].double() - offset) @ weight.T + squares
            pooled.append(pool_proxies(scores, proxies, "max"))
            labels.append(kept_examples.labels[held])
        fit = calibrate(torch.cat(pooled), torch.cat(labels))
        notes = {"calibration": "two halves", "held_out_loss": fit.loss, "held_out_accuracy": fit.accuracy}
        return fit.scale, notes


def cluster(x: Tensor, num_clusters: int, generator: torch.Generator, iterations: int = 50) -> tuple[Tensor, Tensor]:
    """k-means (Lloyd's algorithm from k-means++ seeds): centres `(m, d)` and their shares of the examples `(m,)`.

    With fewer distinct examples than clusters, centres repeat and divide their share. The shares sum to 1.

    Example:
        >>> centres, shares = cluster(torch.tensor([[0.0], [0.2], [9.0]]).double(), 2, torch.Generator().manual_seed(0))
        >>> sorted(round(c, 2) for c in centres.flatten().tolist())
        [0.1, 9.0]
    """
    centres = x[torch.randint(len(x), (1,), generator=generator)]
    while len(centres) < num_clusters:
        distance = torch.cdist(x, centres).square().amin(dim=1)
        if float(distance.max()) <= 1e-18 * float(x.square().sum(dim=1).max() + 1e-300):
            break
        centres = torch.cat([centres, x[torch.multinomial(distance, 1, generator=generator)]])
    assignment = torch.cdist(x, centres).argmin(dim=1)
    for _ in range(iterations):
        sums = torch.zeros_like(centres).index_add_(0, assignment, x)
        counts = torch.bincount(assignment, minlength=len(centres))
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centres)
        moved = torch.cdist(x, centres).argmin(dim=1)
        if torch.equal(moved, assignment):
            break
        assignment = moved
    counts = torch.bincount(assignment, minlength=len(centres)).double().clamp(min=0.5)
    shares = counts / counts.sum()
    repeats = torch.arange(num_clusters) % len(centres)
    times = torch.bincount(repeats, minlength=len(centres)).double()
    return centres[repeats], (shares / times)[repeats]


@dataclass(frozen=True)
class Source(Scheme):
    """New rows as mixtures of the pretrained classifier's rows, by its own predictions on the new data.

    Row t = sum over old classes s of p(s | t) (w_s, b_s), with p(s | t) the mean of the old classifier's softmax over
    the examples of new class t: the category relationship of Co-Tuning (You et al. 2020). The old classifier must
    read the same features as the new head. It cannot stand in a configuration, so `with_source` binds it.

    Attributes:
        calibrate: multiply by a scale fitted on leave-one-out scores.
        missing: ``"mean"`` gives a class without examples the mean row, ``"error"`` refuses it.

    Example:
        >>> x, y = torch.tensor([[3.0, 0.0], [2.0, 0.0], [0.0, 3.0], [0.0, 2.0]]), torch.tensor([0, 0, 1, 1])
        >>> scheme = Source().with_source(4.0 * torch.eye(2), torch.zeros(2))
        >>> head = scheme(HeadShape(2, 2), torch.Generator(), FeatureSet(x, y, 2))
        >>> (x @ head.weight.T + head.bias).argmax(1).tolist()
        [0, 0, 1, 1]
    """

    needs_data: ClassVar[bool] = True
    calibrate: bool = True
    missing: str = "mean"

    def with_source(self, weight: Tensor, bias: Tensor | None) -> BoundSource:
        """The scheme with the old classifier: `weight` `(S, d)`, `bias` `(S,)` or None."""
        return BoundSource(self, weight.detach().double().cpu(), None if bias is None else bias.detach().double().cpu())

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """Refuses: the old classifier is not known.

        Raises:
            SchemeError: always.
        """
        raise SchemeError(
            "init=source mixes the rows of the classifier that the backbone was pretrained with, and there is none "
            "here. Attach to a model that still has its pretrained head, or bind one with "
            "Source().with_source(weight, bias)."
        )


@dataclass(frozen=True, eq=False)
class BoundSource(Scheme):
    """`Source` together with the old classifier that it mixes.

    Attributes:
        options: the options.
        weight: `(S, d)` rows of the old classifier, float64.
        bias: `(S,)` its biases, or None.
    """

    needs_data: ClassVar[bool] = True
    options: Source
    weight: Tensor
    bias: Tensor | None = None

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """The mixed rows.

        Raises:
            SchemeError: no features, or features, head and old classifier do not fit together.
        """
        checked = class_features_for("source", data, shape)
        if self.weight.dim() != 2 or self.weight.shape[1] != shape.fan_in:
            raise SchemeError(
                f"init=source: the old classifier's weight {tuple(self.weight.shape)} does not read the {shape.fan_in} "
                "features of the new head."
            )
        moments = Moments.of(checked)
        notes = check_missing("source", self.options.missing, moments)
        examples = present_only(checked)
        bias = torch.zeros(len(self.weight), dtype=torch.float64) if self.bias is None else self.bias
        old_logits = examples.features.double() @ self.weight.T + bias
        mixture = category_mixture(old_logits, examples.labels, examples.num_classes)
        scale = 1.0
        if self.options.calibrate:
            scale, found = _source_scale(old_logits, mixture, examples)
            notes |= found
        top = mixture.argmax(dim=1)
        notes |= {"scale": scale, "nearest_source_class": top.tolist()}
        return finish(mixture @ self.weight * scale, mixture @ bias * scale, moments, shape, notes)


def category_mixture(old_logits: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """p(old class | new class), the mean of softmax(old logits) over each new class: `(K, S)`, rows sum to 1.

    Example:
        >>> category_mixture(torch.tensor([[0.0, 0.0]]), torch.tensor([0]), 1).tolist()
        [[0.5, 0.5]]
    """
    sums = torch.zeros(num_classes, old_logits.shape[1], dtype=old_logits.dtype)
    sums.index_add_(0, labels, torch.softmax(old_logits, dim=1))
    return sums / sums.sum(dim=1, keepdim=True).clamp(min=1e-300)


def _source_scale(old_logits: Tensor, mixture: Tensor, examples: FeatureSet) -> tuple[float, dict[str, Any]]:
    rows = held_out_rows(examples)
    if not len(rows):
        return unit_scale(old_logits @ mixture.T), {"calibration": "unit logit std"}
    z, y = old_logits[rows], examples.labels[rows]
    scores = z @ mixture.T
    count = torch.bincount(examples.labels, minlength=examples.num_classes).double()[y]
    own = scores[torch.arange(len(rows)), y]
    self_share = (torch.softmax(z, dim=1) * z).sum(dim=1)
    scores[torch.arange(len(rows)), y] = (count * own - self_share) / (count - 1)
    fit = calibrate(scores, y)
    return fit.scale, {"calibration": "leave-one-out", "held_out_loss": fit.loss, "held_out_accuracy": fit.accuracy}


def normalise_rows(x: Tensor) -> Tensor:
    """Rows at length 1; zero rows stay zero."""
    return x / x.norm(dim=1, keepdim=True).clamp(min=1e-300)


SCHEMES: dict[str, Callable[..., Scheme]] = {
    "class_mean": ClassMean,
    "imprint": Imprint,
    "multi_proxy": MultiProxy,
    "source": Source,
}
