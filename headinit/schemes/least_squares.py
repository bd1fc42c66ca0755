"""Heads in closed form: ridge regression and linear discriminant analysis, every choice made by leave-one-out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from headinit.errors import SchemeError, unknown_name
from headinit.features.extract import FeatureSet
from headinit.features.moments import Moments, as_targets
from headinit.features.rotation import Rotation, Rotations, rotation_of
from headinit.schemes.calibration import (
    Calibration,
    calibrate,
    check_missing,
    class_features_for,
    features_for,
    finish,
    fixed_generator,
    held_out_rows,
    moments_for,
    present_moments,
    present_only,
    task_of,
    unit_scale,
)
from headinit.schemes.scheme import HeadShape, HeadWeights, Scheme, check_positive

FEATURES = ("auto", "raw", "standardised")
CRITERIA = ("log_loss", "squared_error")
SHRINKAGES = ("loo", "ledoit_wolf", "oas")

# Strengths on the scale of N times the mean variance of a feature, where the penalty starts to bite: three a decade.
RIDGE_GRID = tuple(10 ** (k / 3) for k in range(-15, 8))
SHRINKAGE_GRID = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.9, 1.0)


@dataclass(frozen=True)
class Candidate:
    """One closed-form head that was tried.

    Attributes:
        features: ``"raw"`` or ``"standardised"``.
        strength: the strength (ridge) or the shrinkage (lda).
        loss: what was compared: the held-out log loss, or the squared error relative to the targets' variance.
        fit: scale and losses of the leave-one-out scores; None where there are none (squared error, moments alone).
    """

    features: str
    strength: float
    loss: float
    fit: Calibration | None = None


def search(grid: Sequence[float], judge: Callable[[float], Candidate], stride: int = 3) -> list[Candidate]:
    """Candidates on every `stride`-th point of a grid, then on the points around the best of them.

    Held-out losses are smooth in the logarithm of the strength, so the points far from the best need not be tried.

    Example:
        >>> tried = search(range(100), lambda s: Candidate("raw", s, abs(s - 40)), stride=10)
        >>> len(tried), min(tried, key=lambda c: c.loss).strength
        (28, 40)
    """
    found = {k: judge(grid[k]) for k in range(0, len(grid), stride)}
    best = min(found, key=lambda k: found[k].loss)
    for k in range(max(best - stride + 1, 0), min(best + stride, len(grid))):
        if k not in found:
            found[k] = judge(grid[k])
    return [found[k] for k in sorted(found)]


# Ridge regression.


@dataclass(frozen=True)
class Ridge(Scheme):
    """Ridge regression on one-hot targets: W = (Xc'Xc + lambda I)^-1 Xc'Y, the intercept not penalised.

    All strengths are solved from one eigendecomposition, and judged by exact leave-one-out scores, (yhat_i - h_ii
    y_i) / (1 - h_ii) with the leverage h_ii (Cook 1977; RidgeCV): for each the scale (temperature) that minimises the
    log loss of those scores is fitted, and the strength with the least log loss wins, over raw and standardised
    features. Standardisation and scale are folded into (W, b). One-hot ridge in closed form is the "oracle" of
    IMPRINT (TMLR 2025) and big_vision's few-shot evaluator.

    Takes classes, multi-label targets (0 and 1: scale and offset by leave-one-out) and regression (no scale). Given
    moments alone, which have lost single examples, the strength is chosen by generalised cross-validation and the
    scale stays 1. A head without bias is fitted through the origin. The std in standardisation is that of all
    examples: the leave-one-out scores are exact given it.

    Attributes:
        strength: lambda, as scikit-learn's `alpha`; None chooses it.
        features: ``"raw"``, ``"standardised"`` or ``"auto"``, the better one.
        criterion: ``"log_loss"`` or ``"squared_error"``, what leave-one-out compares; targets always use the latter.
        calibrate: multiply by the fitted scale.
        missing: ``"mean"`` gives a class without examples the mean row, ``"error"`` refuses it.

    Example:
        >>> x, y = torch.tensor([[0.0], [1.0], [9.0], [10.0]]), torch.tensor([0, 0, 1, 1])
        >>> scheme = Ridge(strength=1.0, features="raw", calibrate=False)
        >>> head = scheme(HeadShape(1, 2), torch.Generator(), FeatureSet(x, y, 2))
        >>> [round(w, 4) for w in head.weight.flatten().tolist()]  # -+ (sum of xc yc) / (82 + 1)
        [-0.1084, 0.1084]
    """

    needs_data: ClassVar[bool] = True
    fits_prior: ClassVar[bool] = True
    strength: float | None = None
    features: str = "auto"
    criterion: str = "log_loss"
    calibrate: bool = True
    missing: str = "mean"

    def __post_init__(self) -> None:
        check_positive("strength", self.strength)
        _check_choice("features", self.features, FEATURES)
        _check_choice("criterion", self.criterion, CRITERIA)

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """The ridge solution.

        Raises:
            SchemeError: no data, data that do not fit, or a class without examples under ``missing="error"``.
        """
        moments = moments_for("ridge", data, shape, kind=None)
        notes = check_missing("ridge", self.missing, moments)
        examples = None if isinstance(data, Moments) else features_for("ridge", data, shape)
        problem = RidgeProblem.of(moments, examples, shape.bias)
        best = min(problem.candidates(self), key=lambda c: c.loss)
        scale, offset = problem.scale_of(best) if self.calibrate else (1.0, 0.0)
        weight, bias = problem.solve(best.features, best.strength)
        bias = (bias + offset) * scale if shape.bias else bias
        notes |= {"strength": best.strength, "features": best.features, "scale": scale, **problem.notes(best)}
        if problem.task != "single_label":
            return HeadWeights(
                (weight * scale).float(), bias.float() if shape.bias else None, bias_std=None, notes=notes
            )
        return finish(weight * scale, bias * (1.0 if shape.bias else scale), moments, shape, notes)


@dataclass
class RidgeProblem:
    """A ridge regression with its eigendecompositions, each made once and only when it is asked for."""

    moments: Moments
    examples: FeatureSet | None
    centre: bool
    rows: Tensor
    task: str
    axes: Rotations
    crosses: dict[str, Tensor]

    @classmethod
    def of(
        cls, moments: Moments, examples: FeatureSet | None, centre: bool, axes: Rotations | None = None
    ) -> RidgeProblem:
        """The problem for the present classes; `axes` of these features, if others use them, too."""
        task = task_of(moments if examples is None else examples)
        if task == "single_label":
            moments = present_moments(moments)
            examples = None if examples is None else present_only(examples)
        if examples is None:
            rows = torch.empty(0, dtype=torch.int64)
        elif task == "single_label":
            rows = held_out_rows(examples)
        else:
            limit = max(1000, 1_000_000 // examples.num_classes)
            rows = torch.randperm(len(examples), generator=fixed_generator())[:limit]
        axes = axes or Rotations(moments, None if examples is None else examples.features, centre)
        return cls(moments, examples, centre, rows, task, axes, {})

    def rotation(self, features: str) -> tuple[Rotation, Tensor]:
        """The axes, and X'Y in them: `(r, K)`."""
        rotation = self.axes(features)
        if features not in self.crosses:
            cross = self.moments.cross if self.centre else self.moments.sums
            self.crosses[features] = rotation.axes.T @ (cross * rotation.scale).T
        return rotation, self.crosses[features]

    def solve(self, features: str, strength: float) -> tuple[Tensor, Tensor]:
        """(W, b) in float64 for the raw features."""
        rotation, cross = self.rotation(features)
        weight = (cross / (rotation.eigenvalues + strength)[:, None]).T
        mean = self.moments.counts / len(self.moments)
        return rotation.unfold(weight, mean if self.centre else torch.zeros_like(mean))

    def strengths(self, features: str) -> list[float]:
        """The grid for these features, in lambda."""
        unit = len(self.moments) * self.rotation(features)[0].mean_variance
        return [g * unit for g in RIDGE_GRID]

    def candidates(self, scheme: Ridge) -> list[Candidate]:
        """All settings that the options leave open, judged."""
        kinds = ("raw", "standardised") if scheme.features == "auto" else (scheme.features,)
        found: list[Candidate] = []
        for features in kinds:
            settled = len(self.rows) == 0 and self.examples is not None  # nothing can be held out
            grid = [self.strengths(features)[15]] if settled else self.strengths(features)
            grid = grid if scheme.strength is None else [scheme.strength]
            if settled:
                found += [Candidate(features, s, 0.0) for s in grid]
            elif self.examples is None:
                found += [Candidate(features, s, self.generalised_error(features, s)) for s in grid]
            else:
                found += self._left_out(features, grid, scheme.criterion)
        return found

    def _left_out(self, features: str, grid: list[float], criterion: str) -> list[Candidate]:
        rotation, cross = self.rotation(features)
        assert self.examples is not None
        coordinates = rotation.apply(self.examples.features[self.rows])
        squares = coordinates.square()
        labels = self.examples.labels[self.rows]

        def judge(strength: float) -> Candidate:
            scores = self._scores(coordinates, squares, rotation, cross, strength)
            if self.task == "single_label" and criterion == "log_loss":
                fit = calibrate(scores, labels)
                return Candidate(features, strength, fit.loss, fit)
            return Candidate(features, strength, self._squared_error(scores))

        return search(grid, judge)

    def _targets(self) -> Tensor:
        assert self.examples is not None
        labels = self.examples.labels[self.rows]
        if self.task != "single_label":
            return as_targets(labels)
        return torch.nn.functional.one_hot(labels, self.examples.num_classes).to(torch.float64)

    def _scores(
        self, coordinates: Tensor, squares: Tensor, rotation: Rotation, cross: Tensor, strength: float
    ) -> Tensor:
        """Leave-one-out scores of `rows`: `(n, K)`."""
        shrunk = 1.0 / (rotation.eigenvalues + strength)
        fitted = coordinates @ (cross * shrunk[:, None])
        leverage = squares @ shrunk
        if self.centre:
            fitted = fitted + self.moments.counts / len(self.moments)
            leverage = leverage + 1.0 / len(self.moments)
        rest = (1.0 - leverage).clamp(min=1e-9)[:, None]
        return (fitted - leverage[:, None] * self._targets()) / rest

    def loo_scores(self, features: str, strength: float) -> Tensor:
        """Leave-one-out scores of `rows` before any scale: `(n, K)` float64."""
        assert self.examples is not None
        rotation, cross = self.rotation(features)
        coordinates = rotation.apply(self.examples.features[self.rows])
        return self._scores(coordinates, coordinates.square(), rotation, cross, strength)

    def _squared_error(self, scores: Tensor) -> float:
        variance = self.moments.target_squares / len(self.moments) - (self.moments.counts / len(self.moments)).square()
        error = (scores - self._targets()).square().mean(dim=0)
        return float((error / variance.clamp(min=1e-300))[variance > 1e-12 * (1 + error)].sum()) / len(variance)

    def generalised_error(self, features: str, strength: float) -> float:
        """Generalised cross-validation (Golub, Heath and Wahba 1979), the leave-one-out error with a mean leverage."""
        rotation, cross = self.rotation(features)
        size = len(self.moments)
        shrunk = 1.0 / (rotation.eigenvalues + strength)
        total = self.moments.target_squares - (self.moments.counts.square() / size if self.centre else 0.0)
        explained = (cross.square() * (2 * shrunk - rotation.eigenvalues * shrunk.square())[:, None]).sum(dim=0)
        leverage = (float((rotation.eigenvalues * shrunk).sum()) + self.centre) / size
        return float((total - explained).clamp(min=0).sum()) / size / max(1.0 - leverage, 1e-9) ** 2

    def scale_of(self, chosen: Candidate) -> tuple[float, float]:
        """Scale, and offset to add to the scores before it, that turn scores into logits."""
        if self.task == "regression" or self.examples is None:
            return 1.0, 0.0
        if self.task == "multi_label":
            return fit_sigmoid(self.loo_scores(chosen.features, chosen.strength), self._targets())
        if not len(self.rows):
            weight, bias = self.solve(chosen.features, chosen.strength)
            return unit_scale(self.examples.features.double() @ weight.T + bias), 0.0
        if chosen.fit is not None:
            return chosen.fit.scale, 0.0
        return calibrate(self.loo_scores(chosen.features, chosen.strength), self.examples.labels[self.rows]).scale, 0.0

    def notes(self, chosen: Candidate) -> dict[str, Any]:
        """How the choice was made."""
        if self.examples is None:
            return {"chosen_by": "generalised cross-validation", "generalised_error": chosen.loss}
        if not len(self.rows):
            return {"chosen_by": "default strength: one example per class leaves nothing to hold out"}
        found: dict[str, Any] = {"chosen_by": "leave-one-out", "held_out_examples": len(self.rows)}
        if chosen.fit is None:
            return {**found, "held_out_relative_error": chosen.loss}
        return {**found, "held_out_loss": chosen.fit.loss, "held_out_accuracy": chosen.fit.accuracy}


def fit_sigmoid(scores: Tensor, targets: Tensor) -> tuple[float, float]:
    """Scale a and offset c that minimise the binary log loss of a (score + c): Platt scaling, shared by all labels.

    Args:
        scores: `(n, K)`; targets: `(n, K)` of 0 and 1.

    Example:
        >>> scores, targets = torch.tensor([[0.0], [0.4], [0.6], [1.0]]), torch.tensor([[0.0], [1.0], [0.0], [1.0]])
        >>> fit_sigmoid(scores.double(), targets)[1] < 0
        True
    """
    z, y = scores.flatten(), targets.flatten()
    # Platt's targets: one pseudo-example each way keeps a finite where the scores separate.
    positives = float(y.sum())
    high, low = (positives + 1) / (positives + 2), 1 / (len(y) - positives + 2)
    y = torch.where(y > 0.5, high, low)
    design = torch.stack([z, torch.ones_like(z)], dim=1)
    theta = torch.zeros(2, dtype=torch.float64)

    def loss(at: Tensor) -> float:
        logits = design @ at
        return float((torch.nn.functional.softplus(logits) - y * logits).mean())

    for _ in range(100):
        probability = torch.sigmoid(design @ theta)
        gradient = design.T @ (probability - y) / len(y)
        hessian = (design * (probability * (1 - probability))[:, None]).T @ design / len(y)
        step = torch.linalg.solve(hessian + 1e-12 * torch.eye(2, dtype=torch.float64), gradient)
        size = 1.0
        while loss(theta - size * step) > loss(theta) and size > 1e-6:
            size /= 2
        theta = theta - size * step
        if float(step.abs().max()) < 1e-9:
            break
    a = max(float(theta[0]), 1e-6)
    return a, float(theta[1]) / a


# Linear discriminant analysis.


@dataclass(frozen=True)
class LDA(Scheme):
    """Linear discriminant analysis with a shrunk pooled covariance.

    Lambda = [(1 - eps) Sigma + eps c I]^-1 with c = trace(Sigma) / d; W = Lambda mu; b_k = -mu_k' Lambda mu_k / 2 +
    log pi_k (Fisher 1936; streaming: Hayes and Kanan 2020). Sigma is the pooled within-class covariance, divided by
    N. The logits are log posteriors of a Gaussian model, so their scale means something; what the model gets wrong is
    corrected by one more scale fitted on leave-one-out scores (exact for a fixed target c of the shrinkage).

    Attributes:
        shrinkage: eps in (0, 1]; ``"loo"``, the one with the least leave-one-out log loss; ``"ledoit_wolf"`` (2004);
            ``"oas"`` (Chen et al. 2010). Given moments alone, ``"loo"`` falls back on ``"oas"``, which needs no
            examples.
        features: ``"raw"``, ``"standardised"`` or ``"auto"``, the better one (raw given moments alone).
        calibrate: multiply by the fitted scale.
        missing: ``"mean"`` gives a class without examples the mean row, ``"error"`` refuses it.

    Example:
        >>> x, y = torch.tensor([[0.0], [2.0], [8.0], [10.0]]), torch.tensor([0, 0, 1, 1])
        >>> head = LDA(shrinkage=0.5, calibrate=False)(HeadShape(1, 2), torch.Generator(), FeatureSet(x, y, 2))
        >>> (head.weight[1] - head.weight[0]).item()  # (9 - 1) / variance 1
        8.0
    """

    needs_data: ClassVar[bool] = True
    fits_prior: ClassVar[bool] = True
    shrinkage: float | str = "loo"
    features: str = "auto"
    calibrate: bool = True
    missing: str = "mean"

    def __post_init__(self) -> None:
        _check_choice("features", self.features, FEATURES)
        if isinstance(self.shrinkage, str):
            _check_choice("shrinkage", self.shrinkage, SHRINKAGES)
        elif not 0.0 <= self.shrinkage <= 1.0:
            raise SchemeError(f"Option shrinkage={self.shrinkage} of init=lda must lie in [0, 1] or be a rule's name.")

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """The discriminant.

        Raises:
            SchemeError: no data, data that do not fit, a covariance that cannot be inverted, or a class without
                examples under ``missing="error"``.
        """
        moments = moments_for("lda", data, shape)
        notes = check_missing("lda", self.missing, moments)
        present = present_moments(moments)
        examples = None if isinstance(data, Moments) else present_only(class_features_for("lda", data, shape))
        rows = torch.empty(0, dtype=torch.int64) if examples is None else held_out_rows(examples)
        kinds = ("raw", "standardised") if self.features == "auto" and len(rows) else (self.features,)
        problems = {kind: LDAProblem.of(present, examples, rows, standardise=kind == "standardised") for kind in kinds}
        tried = [c for kind, problem in problems.items() for c in problem.candidates(self.shrinkage, kind)]
        best = min(tried, key=lambda c: c.loss)
        problem = problems[best.features]
        weight, bias = problem.solve(best.strength)
        scale = 1.0
        if self.calibrate and best.fit is not None:
            scale = best.fit.scale
        elif self.calibrate and examples is not None:
            scale = unit_scale(examples.features.double() @ weight.T + bias)
        notes |= {
            "shrinkage": best.strength,
            "features": "raw" if best.features == "auto" else best.features,
            "scale": scale,
        }
        if best.fit is not None:
            notes |= {
                "held_out_loss": best.fit.loss,
                "held_out_accuracy": best.fit.accuracy,
                "chosen_by": "leave-one-out",
            }
        return finish(weight * scale, bias * scale, moments, shape, notes)


@dataclass
class LDAProblem:
    """LDA in the axes of the pooled covariance, where every shrinkage is a division.

    Attributes:
        moments: moments of the (standardised) features.
        examples: the examples, if they are at hand; rows: those to hold out.
        rotation: map of the raw features onto the axes of the within-class scatter, in the span of the examples.
        variances: `(r,)` within classes, along those axes.
        means: `(K, r)` class means in those axes, about the mean of all.
        target: c, the mean variance over all d features.
    """

    moments: Moments
    examples: FeatureSet | None
    rows: Tensor
    rotation: Rotation
    variances: Tensor
    means: Tensor
    target: float

    @classmethod
    def of(cls, moments: Moments, examples: FeatureSet | None, rows: Tensor, *, standardise: bool) -> LDAProblem:
        """Rotate onto the span of the examples, then onto the axes of the scatter within it."""
        size, width = len(moments), moments.width
        if examples is not None and len(examples) < width:
            span = rotation_of(moments, examples.features, standardise=standardise)
            inner = Moments.zeros(span.rank, moments.num_classes)
            inner.update(span.apply(examples.features), examples.labels)
            variances, axes = torch.linalg.eigh(inner.within_scatter / size)
            scale, means, axes = span.scale, inner.means @ axes, span.axes @ axes
        else:
            scale = moments.inverse_std if standardise else torch.ones_like(moments.shift)
            variances, axes = torch.linalg.eigh(moments.within_scatter / size * torch.outer(scale, scale))
            means = ((moments.means - moments.mean) * scale) @ axes
        variances = variances.clamp(min=0)
        rotation = Rotation(moments.mean, scale, axes, variances * size, size)
        return cls(moments, examples, rows, rotation, variances, means, float(variances.sum()) / width)

    def _precision(self, shrinkage: float) -> Tensor:
        floor = torch.finfo(torch.float64).tiny
        shrunk = (1 - shrinkage) * self.variances + shrinkage * self.target
        # No spread within classes at all (one example each, or copies): fall back on the spread of the means.
        if self.target <= floor:
            spread = float(self.means.square().mean())
            return torch.full_like(shrunk, 1.0 / spread if spread > 0 else 1.0)
        smallest = 1e-12 * float(self.variances.max())
        if float(shrunk.min()) <= smallest:
            raise SchemeError(
                f"init=lda: the pooled covariance of {len(self.moments)} examples in {self.moments.width} features "
                f"cannot be inverted at shrinkage {shrinkage:g}. Set shrinkage above 0, or to 'loo', 'ledoit_wolf' or "
                "'oas'."
            )
        return 1.0 / shrunk

    def solve(self, shrinkage: float) -> tuple[Tensor, Tensor]:
        """(W, b) in float64 for the raw features."""
        weight = self.means * self._precision(shrinkage)
        prior = torch.log(self.moments.counts / len(self.moments))
        bias = -0.5 * (weight * self.means).sum(dim=1) + prior
        return self.rotation.unfold(weight, bias)

    def candidates(self, shrinkage: float | str, features: str) -> list[Candidate]:
        """The shrinkages to choose from, judged by leave-one-out where that is possible."""
        if shrinkage == "loo":
            values = list(SHRINKAGE_GRID) if len(self.rows) else [self.oas()]
        else:
            rule = {"ledoit_wolf": self.ledoit_wolf, "oas": self.oas}
            values = [rule[shrinkage]() if isinstance(shrinkage, str) else shrinkage]
        if not len(self.rows):
            return [Candidate(features, value, 0.0) for value in values]
        assert self.examples is not None
        coordinates = self.rotation.apply(self.examples.features[self.rows])
        squares = coordinates.square()
        labels = self.examples.labels[self.rows]

        def judge(value: float) -> Candidate:
            fit = calibrate(self._scores(coordinates, squares, labels, value), labels)
            return Candidate(features, value, fit.loss, fit)

        return search(values, judge, stride=2)

    def _scores(self, x: Tensor, x_squared: Tensor, labels: Tensor, shrinkage: float) -> Tensor:
        """Leave-one-out log posteriors `(n, K)`: class mean, prior and covariance without the example.

        Taking x out of class k with n examples changes N Sigma by -n/(n-1) z z', z = x - mu_k; the inverse follows by
        Sherman and Morrison.
        """
        size, count = len(self.moments), self.moments.counts[labels]
        precision = self._precision(shrinkage)
        one = torch.arange(len(x))
        # All that is needed of x' P x, x' P mu_j and mu_i' P mu_j, with P diagonal.
        norms, weighted = (x_squared @ precision)[:, None], self.means * precision
        products, between = x @ weighted.T, weighted @ self.means.T
        nearest = products[one, labels][:, None]
        squares = norms - 2 * products + between.diagonal()
        own = squares[one, labels].clamp(min=0)
        # z' P (x - mu_j) for every j.
        inner = norms - products - nearest + between[labels]
        # The inverse of (1 - eps) (S - r z z') / (N - 1) + eps c I, with P the inverse at S / N: both are the same
        # up to the factor N / (N - 1) on Sigma, which is left out, as c is held.
        ratio = count / (count - 1)
        weight = (1 - shrinkage) * ratio / size
        rest = (1 - weight * own).clamp(min=1e-9)
        distances = squares + (weight / rest)[:, None] * inner.square()
        distances[one, labels] = ratio.square() * (own + weight * own.square() / rest)
        prior = self.moments.counts.log().repeat(len(x), 1)
        prior[one, labels] = torch.log(count - 1)
        return prior - 0.5 * distances

    def oas(self) -> float:
        """Oracle approximating shrinkage (Chen et al. 2010), in the form that scikit-learn gives."""
        size, width = len(self.moments), self.moments.width
        alpha = float(self.variances.square().sum()) / width**2
        numerator = alpha + self.target**2
        denominator = (size + 1) * (alpha - self.target**2 / width)
        return 1.0 if denominator <= 0 else min(1.0, numerator / denominator)

    def ledoit_wolf(self) -> float:
        """Ledoit and Wolf's shrinkage (2004) of the pooled covariance, from the examples about their class means.

        Raises:
            SchemeError: moments alone: it needs fourth powers of single examples.
        """
        if self.examples is None:
            raise SchemeError(
                "init=lda shrinkage=ledoit_wolf needs single examples and was given moments. Use shrinkage=oas, or a "
                "FeatureSet."
            )
        size, width = len(self.moments), self.moments.width
        fourth = 0.0
        for start in range(0, size, 4096):
            block = slice(start, start + 4096)
            x = self.rotation.apply(self.examples.features[block])
            fourth += float((x - self.means[self.examples.labels[block]]).square().sum(dim=1).square().sum())
        squared_norm = float(self.variances.square().sum())
        beta = (fourth / size - squared_norm) / (size * width)
        delta = squared_norm / width - self.target**2
        return 0.0 if beta <= 0 else 1.0 if delta <= 0 else min(beta, delta) / delta


def _check_choice(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise unknown_name(option, value, known, SchemeError)


SCHEMES: dict[str, Callable[..., Scheme]] = {"ridge": Ridge, "lda": LDA}
