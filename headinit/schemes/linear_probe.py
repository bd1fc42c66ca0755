"""Heads that minimise the cross-entropy: multinomial logistic regression, to the end or stopped early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from headinit.errors import SchemeError, unknown_name
from headinit.features.extract import FeatureSet
from headinit.features.moments import Moments
from headinit.features.rotation import Rotations
from headinit.schemes.calibration import (
    Calibration,
    calibrate,
    check_missing,
    class_features_for,
    finish,
    folds_of,
    present_moments,
    present_only,
    scorable,
)
from headinit.schemes.scheme import HeadShape, HeadWeights, Scheme, check_positive
from headinit.threads import one_thread_if_small

FEATURES = ("auto", "raw", "standardised")

# Penalties per example in units of the mean variance of a feature, from strong to weak, a decade apart; the path is
# then refined in two steps around its best.
PENALTY_GRID = tuple(10.0**-k for k in range(-1, 5))
STRONGEST, REFINEMENTS = 1e3, (10**0.5, 10**0.25)
# A path is left when a decade has not lowered the held-out loss by this share, and the strongest penalty within this
# share of the least loss is taken: weaker ones cost time and norm for nothing.
GAIN = 0.005
# Along the path: losses are compared to about this share.
PATH_TOLERANCE, PATH_ITERATIONS = 3e-5, 100


@dataclass(frozen=True)
class ProbeFit:
    """A logistic regression in rotated features, or F of them on parts of the same examples.

    Attributes:
        weight: `(K, r)` or `(F, K, r)`; bias: `(K,)` or `(F, K)`; float64.
        objective: mean loss plus penalty / 2 |W|^2, summed over the F.
        iterations: L-BFGS iterations taken.
    """

    weight: Tensor
    bias: Tensor
    objective: float
    iterations: int


@dataclass(frozen=True)
class Probe(Scheme):
    """Multinomial logistic regression: argmin C sum_i -log softmax(W x_i + b)[y_i] + |W|^2 / 2, b not penalised.

    The start of LP-FT (Kumar et al. 2022) and the protocol of Kornblith et al. (2019). Solved by L-BFGS in the
    principal axes of the features, scaled so that the Hessian is near the identity, over a path of C from strong to
    weak penalties, each solve starting at the last. C, and raw or standardised features, are those with the least
    loss on stratified folds; standardisation is folded into (W, b). C means what it means in scikit-learn (with two
    classes, scikit-learn penalises one row where this penalises two: its C is twice this one).

    Attributes:
        inverse_strength: C; None chooses it.
        features: ``"raw"``, ``"standardised"`` or ``"auto"``, the better one.
        folds: number of folds that choose.
        calibrate: multiply by a scale fitted on the held-out scores, where C was chosen.
        tolerance: L-BFGS stops when an iteration improves the objective by less than this share.
        max_iterations: L-BFGS stops after this many iterations at the latest.
        missing: ``"mean"`` gives a class without examples the mean row, ``"error"`` refuses it.

    Example:
        >>> x, y = torch.tensor([[0.0], [1.0], [9.0], [10.0]]), torch.tensor([0, 0, 1, 1])
        >>> head = Probe(inverse_strength=1.0, features="raw")(HeadShape(1, 2), torch.Generator(), FeatureSet(x, y, 2))
        >>> (x @ head.weight.T + head.bias).argmax(1).tolist()
        [0, 0, 1, 1]
    """

    needs_data: ClassVar[bool] = True
    fits_prior: ClassVar[bool] = True
    inverse_strength: float | None = None
    features: str = "auto"
    folds: int = 3
    calibrate: bool = True
    tolerance: float = 1e-9
    max_iterations: int = 1000
    missing: str = "mean"

    def __post_init__(self) -> None:
        check_positive("inverse_strength", self.inverse_strength)
        check_positive("tolerance", self.tolerance)
        if self.features not in FEATURES:
            raise unknown_name("features", self.features, FEATURES, SchemeError)
        if self.folds < 2 or self.max_iterations < 1:
            raise SchemeError(
                f"init=probe needs folds >= 2 and max_iterations >= 1, not {self.folds}, {self.max_iterations}."
            )

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """The probe.

        Raises:
            SchemeError: no features, features that do not fit, or a class without examples under ``missing="error"``.
        """
        checked = class_features_for("probe", data, shape)
        moments = Moments.of(checked)
        notes = check_missing("probe", self.missing, moments)
        problem = ProbeProblem.of(present_only(checked), present_moments(moments), shape.bias)
        choice = problem.choose(self)
        scale = choice.fit.scale if choice.fit is not None and self.calibrate and self.inverse_strength is None else 1.0
        fit, weight, bias = problem.solve(choice.features, choice.inverse_strength, self.tolerance, self.max_iterations)
        notes |= {
            "inverse_strength": choice.inverse_strength,
            "features": choice.features,
            "scale": scale,
            "objective": fit.objective,
            "iterations": fit.iterations,
        }
        if choice.fit is not None:
            notes |= {"chosen_by": f"{self.folds} folds", "held_out_loss": choice.fit.loss}
            notes["held_out_accuracy"] = choice.fit.accuracy
        return finish(weight * scale, bias * scale, moments, shape, notes)


@dataclass(frozen=True)
class EarlyProbe(Scheme):
    """The probe stopped at a target energy E ||e_y - softmax(W x + b)||, the mean gradient norm in the logits.

    Ren et al. (2023) find that neither an untrained nor a converged head is the best start: the energy left decides
    how far fine-tuning moves the features. The path from strong to weak penalty starts at the class shares (energy up
    to sqrt(1 - 1/K)) and loses energy all the way, as training does over time; here it is stopped exactly at the
    target. A target that no strength reaches gives the nearest one, with a warning in the notes.

    Attributes:
        target_energy: energy over the training examples, in (0, sqrt 2).
        features: ``"raw"`` or ``"standardised"``.
        tolerance: relative precision of the solver.
        missing: ``"mean"`` gives a class without examples the mean row, ``"error"`` refuses it.

    Example:
        >>> x, y = torch.tensor([[0.0], [1.0], [9.0], [10.0]]), torch.tensor([0, 0, 1, 1])
        >>> head = EarlyProbe(target_energy=0.3)(HeadShape(1, 2), torch.Generator(), FeatureSet(x, y, 2))
        >>> round(head.notes["energy"], 3)
        0.3
    """

    needs_data: ClassVar[bool] = True
    fits_prior: ClassVar[bool] = True
    target_energy: float = 0.4
    features: str = "raw"
    tolerance: float = 1e-7
    missing: str = "mean"

    def __post_init__(self) -> None:
        if not 0.0 < self.target_energy < 2**0.5:
            raise SchemeError(
                f"Option target_energy={self.target_energy} must lie between 0 and sqrt(2), the longest error."
            )
        if self.features not in FEATURES[1:]:
            raise unknown_name("features", self.features, FEATURES[1:], SchemeError)

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """The probe at the target energy.

        Raises:
            SchemeError: no features, features that do not fit, or a class without examples under ``missing="error"``.
        """
        checked = class_features_for("early_probe", data, shape)
        moments = Moments.of(checked)
        notes = check_missing("early_probe", self.missing, moments)
        problem = ProbeProblem.of(present_only(checked), present_moments(moments), shape.bias)
        strength, energy, warning = problem.reach_energy(self.features, self.target_energy, self.tolerance)
        _, weight, bias = problem.solve(self.features, strength, self.tolerance, 1000)
        notes |= {"inverse_strength": strength, "features": self.features, "energy": energy}
        if warning:
            notes["warnings"] = [*notes.get("warnings", []), warning]
        return finish(weight, bias, moments, shape, notes)


@dataclass(frozen=True)
class ProbeChoice:
    """A setting of the probe, its held-out scores and their fit (None if nothing was, or could be, held out).

    `start` is the mean of the folds' solutions, from which that on all examples is not far.
    """

    features: str
    inverse_strength: float
    fit: Calibration | None = None
    scores: Tensor | None = None
    start: ProbeFit | None = None

    @property
    def loss(self) -> float:
        """Held-out loss, 0 if nothing was held out."""
        return 0.0 if self.fit is None else self.fit.loss


def strongest_near_best(choices: list[ProbeChoice], margin: float | None = None) -> ProbeChoice:
    """The strongest penalty whose held-out loss is within `margin` (nats; by default a share `GAIN`) of the least."""
    least = min(choice.loss for choice in choices)
    margin = GAIN * least if margin is None else margin
    return min((c for c in choices if c.loss <= least + margin), key=lambda c: c.inverse_strength)


@dataclass
class ProbeProblem:
    """A logistic regression over present classes, in principal axes computed once for each kind of features."""

    examples: FeatureSet
    moments: Moments
    intercept: bool
    rotation: Rotations

    @classmethod
    def of(cls, examples: FeatureSet, moments: Moments, intercept: bool, axes: Rotations | None = None) -> ProbeProblem:
        """The problem of these examples; `axes` of their features, if others use them, too."""
        return cls(examples, moments, intercept, axes or Rotations(moments, examples.features, intercept))

    def strengths(self, features: str) -> list[float]:
        """C from strong to weak penalty, fitted to the size of the features."""
        unit = len(self.examples) * self.rotation(features).mean_variance
        return [1.0 / (g * unit) for g in PENALTY_GRID]

    def solve(
        self,
        features: str,
        inverse_strength: float,
        tolerance: float,
        max_iterations: int,
        *,
        start: ProbeFit | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> tuple[ProbeFit, Tensor, Tensor]:
        """The solution on all examples, its products in `dtype`, and (W, b) for the raw features."""
        rotation = self.rotation(features)
        x = rotation.apply(self.examples.features, dtype)
        fit = solve_probe(
            x,
            self.examples.labels,
            self.examples.num_classes,
            penalty=1.0 / (inverse_strength * len(x)),
            curvature=rotation.eigenvalues / len(x),
            intercept=self.intercept,
            tolerance=tolerance,
            max_iterations=max_iterations,
            start=start,
        )
        return fit, *rotation.unfold(fit.weight, fit.bias)

    def choose(self, scheme: Probe) -> ProbeChoice:
        """The setting with the least held-out loss; the given one if C is given."""
        kinds = ("raw", "standardised") if scheme.features == "auto" else (scheme.features,)
        usable = scorable(self.examples.labels, self.examples.num_classes)
        if not bool(usable.any()):
            strength = scheme.inverse_strength or self.strengths(kinds[-1])[2]
            return ProbeChoice(kinds[-1], strength)
        if scheme.inverse_strength is not None and len(kinds) == 1:
            return ProbeChoice(kinds[0], scheme.inverse_strength)
        given = None if scheme.inverse_strength is None else [scheme.inverse_strength]
        # The same folds for both kinds, so that their losses differ by the features alone.
        paths = [choice for kind in kinds for choice in self.path(kind, scheme.folds, given)]
        return strongest_near_best([c for c in paths if c.features == min(paths, key=lambda c: c.loss).features])

    def path(self, features: str, folds: int, strengths: list[float] | None = None) -> list[ProbeChoice]:
        """Held-out fits from strong to weak penalty, until they no longer improve, then refined at the best."""
        run = FoldPath(self, features, folds)
        tried: list[ProbeChoice] = []
        starts: dict[float, ProbeFit] = {}

        def judge(strength: float, start: ProbeFit | None) -> ProbeFit:
            fit, scores = run.scores(strength, start)
            calibration = calibrate(scores, run.held_labels)
            mean = ProbeFit(fit.weight.mean(dim=0), fit.bias.mean(dim=0), 0.0, 0)
            tried.append(ProbeChoice(features, strength, calibration, scores, mean))
            return fit

        if strengths is not None:
            for strength in strengths:
                judge(strength, None)
            return tried
        fit, last = None, np.inf
        for strength in self.strengths(features):
            fit = starts[strength] = judge(strength, fit)
            if tried[-1].loss > (1 - GAIN) * last:
                break
            last = tried[-1].loss
        # The best may lie beyond the strongest penalty of the grid: few examples, many features.
        strongest = tried[0].inverse_strength
        unit = strongest * PENALTY_GRID[0]
        while min(tried, key=lambda c: c.loss).inverse_strength == strongest > unit / STRONGEST:
            strongest /= 10
            starts[strongest] = judge(strongest, None)
        for factor in REFINEMENTS:
            at = strongest_near_best(tried).inverse_strength
            nearest = starts[min(starts, key=lambda s: abs(np.log(s / at)))]
            for strength in (at * factor, at / factor):
                judge(strength, nearest)
        return tried

    def reach_energy(self, features: str, target: float, tolerance: float) -> tuple[float, float, str | None]:
        """C at which the energy over the examples is the target, that energy, and a warning if it is out of reach."""
        rotation = self.rotation(features)
        x, y = rotation.apply(self.examples.features), self.examples.labels
        state: ProbeFit | None = None

        def energy_at(log_strength: float) -> float:
            nonlocal state
            state = solve_probe(
                x,
                y,
                self.examples.num_classes,
                penalty=float(np.exp(-log_strength)) / len(x),
                curvature=rotation.eigenvalues / len(x),
                intercept=self.intercept,
                tolerance=tolerance,
                start=state,
            )
            return energy(x @ state.weight.T + state.bias, y)

        unit = len(x) * rotation.mean_variance
        low, high, step = np.log(1e-5 / unit), np.log(1e8 / unit), np.log(10.0)
        first = energy_at(low)
        if first <= target:
            reason = (
                f"The energy starts at {first:.3g}, below the target of {target:g}: the strongest penalty is taken."
            )
            return float(np.exp(low)), first, reason
        upper, found = low, first
        while found > target and upper < high:
            low, upper = upper, upper + step
            found = energy_at(upper)
        if found > target:
            reason = (
                f"The energy falls to {found:.3g} only, not to the target of {target:g}: the weakest penalty is taken."
            )
            return float(np.exp(upper)), found, reason
        from scipy.optimize import brentq

        root = brentq(lambda v: energy_at(v) - target, low, upper, xtol=1e-6, rtol=1e-8)
        return float(np.exp(root)), energy_at(root), None


class FoldPath:
    """The probes of all folds, solved together: one product of matrices serves them all. Float32, for speed."""

    def __init__(self, problem: ProbeProblem, features: str, folds: int) -> None:
        examples, rotation = problem.examples, problem.rotation(features)
        usable = scorable(examples.labels, examples.num_classes)
        parts = list(folds_of(examples.labels, folds))
        self.x = rotation.apply(examples.features, torch.float32)
        self.labels, self.num_classes = examples.labels, examples.num_classes
        self.weights = torch.zeros(folds, len(examples))
        for fold, (kept, _) in enumerate(parts):
            self.weights[fold, kept] = 1.0 / max(len(kept), 1)
        self.held = [held[usable[held]] for _, held in parts]
        self.held_labels = self.labels[torch.cat(self.held)]
        self.intercept = problem.intercept
        self.curvature = rotation.eigenvalues / rotation.size

    def scores(self, inverse_strength: float, start: ProbeFit | None) -> tuple[ProbeFit, Tensor]:
        """The folds' solutions at this C, and the scores of the held-out examples, `(n, K)` float64."""
        fit = solve_probes(
            self.x,
            self.labels,
            self.num_classes,
            self.weights,
            # The penalty per example of the fit on all examples: at the same C, fewer examples would be shrunk more,
            # and the scale fitted to their scores would be too large for that fit.
            penalty=1.0 / (inverse_strength * len(self.x)),
            curvature=self.curvature,
            intercept=self.intercept,
            tolerance=PATH_TOLERANCE,
            max_iterations=PATH_ITERATIONS,
            start=start,
        )
        scores = [self.x[h].double() @ w.T + b for h, w, b in zip(self.held, fit.weight, fit.bias, strict=True)]
        return fit, torch.cat(scores)


def solve_probe(
    x: Tensor, labels: Tensor, num_classes: int, *, start: ProbeFit | None = None, **options: Any
) -> ProbeFit:
    """`solve_probes`, which takes the options, for one probe on all examples: weight `(K, r)`, bias `(K,)`."""
    if start is not None:
        start = ProbeFit(start.weight[None], start.bias[None], start.objective, start.iterations)
    weights = torch.full((1, len(x)), 1.0 / len(x), dtype=x.dtype)
    fit = solve_probes(x, labels, num_classes, weights, start=start, **options)
    return ProbeFit(fit.weight[0], fit.bias[0], fit.objective, fit.iterations)


def solve_probes(
    x: Tensor,
    labels: Tensor,
    num_classes: int,
    weights: Tensor,
    *,
    penalty: float,
    curvature: Tensor,
    intercept: bool = True,
    tolerance: float = 1e-9,
    max_iterations: int = 1000,
    start: ProbeFit | None = None,
) -> ProbeFit:
    """Minimise, for each row v of weights, sum_i v_i (-log softmax(W x_i + b)[y_i]) + penalty / 2 |W|^2, by L-BFGS.

    The features must be in their principal axes: the variables are W_j sqrt(h v_j + penalty), with v_j the variance
    along axis j and h the mean of p (1 - p), which makes the Hessian's diagonal about 1 whatever the conditioning.

    Args:
        x: `(N, r)` rotated features; the products run in their dtype.
        labels: `(N,)`.
        num_classes: K.
        weights: `(F, N)` weights of the examples in each of F probes; rows sum to 1.
        penalty: 1 / (C N).
        curvature: `(r,)` variances v.
        intercept: whether there is a b.
        tolerance: least relative improvement per iteration.
        max_iterations: bound on the iterations.
        start: solutions to start from.

    Raises:
        SchemeError: the result is not finite.
    """
    from scipy.optimize import minimize

    (size, rank), folds = x.shape, len(weights)
    weights = weights.to(x.dtype)[:, None]
    own = labels.expand(folds, 1, size)
    minus_own = -weights.expand(folds, 1, size).contiguous()
    h = max((1.0 - 1.0 / num_classes) / num_classes, 1e-6)
    if start is not None:
        p = torch.softmax(x @ start.weight[0].T.to(x.dtype) + start.bias[0].to(x.dtype), dim=1)
        h = max(float((p * (1 - p)).mean()), 1e-6)
    unit = 1.0 / torch.sqrt(h * curvature + penalty)
    # Tensors over the optimiser's float64 memory: no copies but the one into the dtype of the products.
    initial = np.zeros((folds, num_classes, rank + 1))
    if start is not None:
        initial[..., :rank], initial[..., rank] = (start.weight / unit).numpy(), start.bias.numpy() * h**0.5

    def unpack(flat: np.ndarray) -> tuple[Tensor, Tensor]:
        variables = torch.from_numpy(flat).view(folds, num_classes, rank + 1)
        return variables[..., :rank] * unit, variables[..., rank] / h**0.5

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = unpack(flat)
        # Classes before examples: the softmax then runs along memory.
        logits = weight.flatten(0, 1).to(x.dtype) @ x.T
        logits = (logits + bias.flatten()[:, None].to(x.dtype) if intercept else logits).view(folds, num_classes, size)
        log_p = torch.log_softmax(logits, dim=1)
        loss = float((log_p.gather(1, own) * minus_own).sum(dtype=torch.float64))
        errors = log_p.exp_().mul_(weights).scatter_add_(1, own, minus_own)
        gradient = torch.empty(folds, num_classes, rank + 1, dtype=torch.float64)
        products = (errors.flatten(0, 1) @ x).view(folds, num_classes, rank)
        gradient[..., :rank] = (products.double() + penalty * weight) * unit
        gradient[..., rank] = errors.sum(dim=2, dtype=torch.float64) / h**0.5 if intercept else 0.0
        return loss + 0.5 * penalty * float(weight.square().sum()), gradient.flatten().numpy()

    options = {"maxiter": max_iterations, "maxfun": 2 * max_iterations, "ftol": tolerance, "gtol": 1e-9, "maxcor": 10}
    with one_thread_if_small(size * rank * num_classes * folds):
        result = minimize(objective, initial.ravel(), jac=True, method="L-BFGS-B", options=options)
    weight, bias = unpack(result.x)
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise SchemeError("The logistic regression did not stay finite. Check the features for extreme values.")
    # Softmax ignores a shift common to all classes; without it the rows are unique.
    return ProbeFit(weight, bias - bias.mean(dim=-1, keepdim=True), float(result.fun), int(result.nit))


def energy(logits: Tensor, labels: Tensor) -> float:
    """Mean over the examples of ||e_y - softmax(logits)||.

    Example:
        >>> round(energy(torch.zeros(1, 2), torch.tensor([0])), 4)  # ||(1/2, -1/2)||
        0.7071
    """
    errors = torch.softmax(logits.double(), dim=1)
    errors[torch.arange(len(labels)), labels] -= 1.0
    return float(errors.norm(dim=1).mean())


SCHEMES: dict[str, Callable[..., Scheme]] = {"probe": Probe, "early_probe": EarlyProbe}
