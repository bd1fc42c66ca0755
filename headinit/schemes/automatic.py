"""The scheme that chooses: closed forms and probe compared by the loss on examples that they were not solved from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from headinit.errors import SchemeError, unknown_name
from headinit.features.extract import FeatureSet
from headinit.features.moments import Moments
from headinit.features.rotation import Rotation, Rotations
from headinit.schemes.calibration import (
    Calibration,
    calibrate,
    check_missing,
    features_for,
    finish,
    folds_of,
    held_out_rows,
    mixing_weights,
    present_moments,
    present_only,
    scorable,
    task_of,
)
from headinit.schemes.least_squares import Candidate, LDAProblem, Ridge, RidgeProblem
from headinit.schemes.linear_probe import ProbeProblem, energy, strongest_near_best
from headinit.schemes.scaling import reach
from headinit.schemes.scheme import HeadShape, HeadWeights, Scheme
from headinit.schemes.variance_scaling import FixedStd

POLICIES = ("frozen", "finetune")

# Above this many examples x classes x (features and the cost of a softmax) a probe's path takes half a minute, and the
# closed forms decide alone.
PROBE_LIMIT, SOFTMAX_COST = 1.5e8, 100

# A head must lower the held-out loss of the class shares by this share at least.
CHANCE_GAIN = 0.02


@dataclass(frozen=True)
class Auto(Scheme):
    """The head that held-out losses prefer: a mixture of ridge, LDA and the probe, each with its strength and scale.

    Each family first settles its own strength and raw or standardised features: ridge and LDA by exact leave-one-out,
    the probe by stratified folds. The winners are then scored on the same folds, each scaled by the temperature that
    fits its held-out scores. A weighted sum of linear heads is a linear head, too: the result is the sum of all
    families, with weights >= 0 fitted to the held-out scores and pulled towards equal shares with the strength of three
    examples (`calibration.mixing_weights`). The families err in different ways, and where few examples cannot tell them
    apart, to choose one is a gamble; with ``mix=False`` the one of the least held-out loss is taken.

    With ``policy="finetune"`` every family takes the strongest regularisation whose held-out loss is within one
    standard error of its least: as good as can be told. The energy E ||e_y - p|| over the training examples, which is
    what the network has left to learn from (Ren et al. 2023), may still be next to nothing, for a head of more features
    than examples fits their labels; the logits are then scaled down until it is `least_energy`. What the head predicts
    stays the same.

    With fewer than two examples per class on average, or if nothing beats the class shares, the data are too little
    to tell: the head is then N(0, 0.01) with b = log pi. Multi-label targets and regression get ridge. The notes say
    what was chosen and why.

    Attributes:
        policy: ``"frozen"`` or ``"finetune"``, what will be trained afterwards; None is ``"frozen"``, and a run puts in
            what follows from its freeze policy.
        least_energy: under ``"finetune"``, in [0, sqrt 2); 0 leaves the scale that fits the held-out scores.
        folds: number of folds of the comparison.
        mix: allow mixtures.
        missing: ``"mean"`` gives a class without examples the mean row, ``"error"`` refuses it.

    Example:
        >>> x = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
        >>> y = (x[:, 0] > 0).long()
        >>> head = Auto()(HeadShape(5, 2), torch.Generator().manual_seed(0), FeatureSet(x, y, 2))
        >>> ((x @ head.weight.T + head.bias).argmax(1) == y).float().mean().item() > 0.9
        True
    """

    needs_data: ClassVar[bool] = True
    fits_prior: ClassVar[bool] = True
    policy: str | None = None
    least_energy: float = 0.2
    folds: int = 5
    mix: bool = True
    missing: str = "mean"

    def __post_init__(self) -> None:
        if self.policy is not None and self.policy not in POLICIES:
            raise unknown_name("policy", self.policy, POLICIES, SchemeError)
        if not 0.0 <= self.least_energy < 2**0.5:
            raise SchemeError(f"Option least_energy={self.least_energy} of init=auto must lie in [0, sqrt 2).")
        if self.folds < 2:
            raise SchemeError(f"Option folds={self.folds} of init=auto must be at least 2.")

    def __call__(
        self, shape: HeadShape, generator: torch.Generator, data: FeatureSet | Moments | None = None
    ) -> HeadWeights:
        """The chosen head.

        Raises:
            SchemeError: no features, features that do not fit, or a class without examples under ``missing="error"``.
        """
        checked = features_for("auto", data, shape, why="compares heads by their scores of held-out examples")
        if task_of(checked) != "single_label":
            head = Ridge(missing=self.missing)(shape, generator, checked)
            reason = "ridge is the closed form for multi-label targets and regression"
            return replace(head, notes={"chosen": "ridge", "reason": reason, **head.notes})
        moments = Moments.of(checked)
        notes = check_missing("auto", self.missing, moments)
        examples = present_only(checked)
        if len(examples) < 2 * examples.num_classes or examples.num_classes < 2:
            reason = f"{len(examples)} examples of {examples.num_classes} classes are too few to hold any out"
            return fall_back(shape, generator, moments, reason, notes)
        contest = Contest.of(examples, present_moments(moments), shape.bias, self)
        ranking = sorted(contest.entries(), key=lambda entry: entry.fit.loss)
        best, chance = ranking[0], share_loss(contest.moments.counts)
        if best.fit.loss > (1 - CHANCE_GAIN) * chance:
            reason = f"no held-out loss beats the class shares: {best.fit.loss:.4f} ({best.name}) against {chance:.4f}"
            return fall_back(shape, generator, moments, reason, notes)
        mixture = contest.mixture(ranking) if self.mix else Mixture([(best, 1.0)], best.fit)
        solved = [(entry.scale * share, *entry.solve()) for entry, share in mixture.parts]
        weight = torch.stack([scale * w for scale, w, _ in solved]).sum(dim=0)
        bias = torch.stack([scale * b for scale, _, b in solved]).sum(dim=0)
        logits = examples.features.double() @ weight.T + bias
        factor = self._factor(logits, examples.labels)
        notes |= {
            "chosen": mixture.name,
            "reason": _reason(self.policy, ranking, mixture),
            "parts": {entry.name: entry.settings(share) for entry, share in mixture.parts},
            "held_out_loss": mixture.fit.loss,
            "held_out_accuracy": mixture.fit.accuracy,
            "held_out_losses": {entry.name: entry.fit.loss for entry in ranking},
            "chance_loss": chance,
            "training_energy": energy(factor * logits, examples.labels),
        }
        if factor < 1:
            notes["scaled_for_energy"] = factor
        return finish(factor * weight, factor * bias, moments, shape, notes)

    def _factor(self, logits: Tensor, labels: Tensor) -> float:
        """What leaves the least energy for the network to learn from; 1 where there is as much."""
        if self.policy != "finetune" or energy(logits, labels) >= self.least_energy:
            return 1.0
        # From sqrt(1 - 1/K) at a factor of 0 the energy falls to less than is asked for at 1: it is met between.
        factor, _ = reach(lambda scale: energy(scale * logits, labels), self.least_energy, unit=1.0)
        return min(factor, 1.0)


@dataclass(frozen=True)
class Entry:
    """One family's own best head.

    Attributes:
        name: of the family; the probe on raw and on standardised features counts as two.
        features: ``"raw"`` or ``"standardised"``.
        strength: lambda (ridge), shrinkage (lda) or C (probe).
        scale: scale of its logits, by its own held-out scores.
        fit: how it did on the folds that all families share.
        scores: `(n, K')` its held-out scores there, before any scale, of the classes with two examples or more.
        solve: gives (W, b), float64, from all examples, before the scale.
    """

    name: str
    features: str
    strength: float
    scale: float
    fit: Calibration
    scores: Tensor
    solve: Callable[[], tuple[Tensor, Tensor]]

    def settings(self, share: float) -> dict[str, Any]:
        """What the report says of it."""
        return {"features": self.features, "strength": self.strength, "scale": self.scale, "share": share}


@dataclass(frozen=True)
class Mixture:
    """Families with their shares (0 left out), and how the sum did on the folds."""

    parts: list[tuple[Entry, float]]
    fit: Calibration

    @property
    def name(self) -> str:
        """The family, or that there are several."""
        return "mixture" if len(self.parts) > 1 else self.parts[0][0].name


@dataclass(frozen=True)
class Contest:
    """The families, on the same examples and the same folds."""

    examples: FeatureSet
    moments: Moments
    intercept: bool
    scheme: Auto
    rows: Tensor
    axes: Rotations

    @classmethod
    def of(cls, examples: FeatureSet, moments: Moments, intercept: bool, scheme: Auto) -> Contest:
        """The contest of these examples, all of whose classes are present."""
        axes = Rotations(moments, examples.features, intercept)
        return cls(examples, moments, intercept, scheme, held_out_rows(examples), axes)

    def entries(self) -> list[Entry]:
        """The best head of each family."""
        found = [self.ridge(), self.lda()]
        cost = len(self.examples) * self.moments.num_classes * (self.moments.width + SOFTMAX_COST)
        if cost <= PROBE_LIMIT:
            found += self.probes()
        return found

    def ridge(self) -> Entry:
        """Ridge at the strength that its leave-one-out loss prefers."""
        problem = RidgeProblem.of(self.moments, self.examples, self.intercept, self.axes)
        best, scale = self._settle(problem.candidates(Ridge()))

        def solve_part(part: Part) -> tuple[Tensor, Tensor]:
            return part.ridge(best.strength * part.size / len(self.examples), self.intercept)

        return Entry(
            "ridge",
            best.features,
            best.strength,
            scale,
            *self._judge(best.features, solve_part),
            lambda: problem.solve(best.features, best.strength),
        )

    def lda(self) -> Entry:
        """LDA at the shrinkage that its leave-one-out loss prefers."""
        problems = {
            kind: LDAProblem.of(self.moments, self.examples, self.rows, standardise=kind == "standardised")
            for kind in ("raw", "standardised")
        }
        best, scale = self._settle([c for kind, problem in problems.items() for c in problem.candidates("loo", kind)])
        return Entry(
            "lda",
            best.features,
            best.strength,
            scale,
            *self._judge(best.features, lambda part: part.lda(best.strength, self.moments.width)),
            lambda: problems[best.features].solve(best.strength),
        )

    def probes(self) -> list[Entry]:
        """The probe on raw and on standardised features, each at the C that the folds prefer."""
        problem = ProbeProblem.of(self.examples, self.moments, self.intercept, self.axes)
        return [self._probe(problem, features) for features in ("raw", "standardised")]

    def _probe(self, problem: ProbeProblem, features: str) -> Entry:
        path = problem.path(features, self.scheme.folds)
        least = min(path, key=lambda choice: choice.loss)
        best = strongest_near_best(path, self._margin(least.fit))
        assert best.fit is not None
        assert best.scores is not None
        usable = torch.bincount(self.examples.labels, minlength=self.examples.num_classes) >= 2
        return Entry(
            f"probe ({features})",
            features,
            best.inverse_strength,
            best.fit.scale,
            best.fit,
            best.scores[:, usable],
            lambda: problem.solve(features, best.inverse_strength, 1e-6, 300, start=best.start, dtype=torch.float32)[
                1:
            ],
        )

    def mixture(self, entries: list[Entry]) -> Mixture:
        """The weighted sum of all families."""
        scores = [entry.scores * entry.fit.scale for entry in entries]
        labels = self.examples.labels[torch.cat([held for _, held in self._folds()])]
        _, labels = torch.unique(labels, return_inverse=True)
        shares = mixing_weights(scores, labels)
        total = torch.stack([a * z for a, z in zip(shares, scores, strict=True)]).sum(dim=0)
        fit = calibrate(total, labels, scale=1.0)
        return Mixture([(e, a) for e, a in zip(entries, shares, strict=True) if a > 1e-3], fit)

    def _settle(self, candidates: list[Candidate]) -> tuple[Candidate, float]:
        """The strongest of the candidates whose loss is near enough to the least, and its scale."""
        least = min(candidates, key=lambda candidate: candidate.loss)
        limit = least.loss + (self._margin(least.fit) or 0.0)
        near = [c for c in candidates if c.features == least.features and c.loss <= limit]
        best = max(near, key=lambda candidate: candidate.strength)
        return best, best.fit.scale if best.fit is not None else 1.0

    def _margin(self, fit: Calibration | None) -> float | None:
        """How far above the least held-out loss counts as equal: one standard error if the features will be trained."""
        if self.scheme.policy != "finetune" or fit is None:
            return None
        return float(fit.losses.std()) / math.sqrt(len(fit.losses)) if len(fit.losses) > 1 else 0.0

    def _folds(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Per fold the examples kept and those held out; classes of one example are in neither."""
        usable = scorable(self.examples.labels, self.examples.num_classes)
        for kept, held in folds_of(self.examples.labels, self.scheme.folds):
            yield kept[usable[kept]], held[usable[held]]

    def _judge(self, features: str, solve: Callable[[Part], tuple[Tensor, Tensor]]) -> tuple[Calibration, Tensor]:
        """Scores of every fold by the head that the others give, scaled together; and the scores."""
        rotation = self.axes(features)
        usable = self.moments.counts >= 2
        scores, rows = [], []
        for kept, held in self._folds():
            left_out = torch.ones(len(self.examples), dtype=torch.bool).index_fill_(0, kept, False)
            part = Part.of(self.examples, self.moments, rotation, torch.nonzero(left_out).flatten(), usable)
            weight, bias = rotation.unfold(*solve(part))
            scores.append(torch.cat([x.double() @ weight.T + bias for x in self.examples.features[held].split(4096)]))
            rows.append(held)
        pooled = torch.cat(scores)
        _, labels = torch.unique(self.examples.labels[torch.cat(rows)], return_inverse=True)
        return calibrate(pooled, labels), pooled


@dataclass(frozen=True)
class Part:
    """Sums over a part of the examples in rotated features: what is left of those over all when some are taken out.

    Attributes:
        gram: `(r, r)` sum of q q'; sums: `(K, r)` sums by class; counts: `(K,)` examples by class.
    """

    gram: Tensor
    sums: Tensor
    counts: Tensor

    @classmethod
    def of(cls, examples: FeatureSet, moments: Moments, rotation: Rotation, left_out: Tensor, classes: Tensor) -> Part:
        """The sums over all examples but `left_out`, of the classes that the mask `classes` marks."""
        gram = torch.diag(rotation.eigenvalues)
        sums = rotation.apply(moments.means) * moments.counts[:, None]
        labels = examples.labels[left_out]
        for rows, own in zip(left_out.split(4096), labels.split(4096), strict=True):
            q = rotation.apply(examples.features[rows])
            gram.addmm_(q.T, q, alpha=-1.0)
            sums.index_add_(0, own, q, alpha=-1.0)
        counts = moments.counts - torch.bincount(labels, minlength=len(moments.counts))
        return cls(gram, sums[classes], counts[classes])

    @property
    def size(self) -> int:
        """Number of examples."""
        return int(self.counts.sum())

    def ridge(self, strength: float, intercept: bool) -> tuple[Tensor, Tensor]:
        """Ridge on one-hot targets: `(K, r)` and `(K,)`."""
        mean = self.sums.sum(dim=0) / self.size if intercept else torch.zeros_like(self.sums[0])
        scatter = self.gram - self.size * torch.outer(mean, mean)
        scatter.diagonal().add_(strength)
        weight = solve_symmetric(scatter, (self.sums - self.counts[:, None] * mean).T).T
        return weight, self.counts / self.size * intercept - weight @ mean

    def lda(self, shrinkage: float, width: int) -> tuple[Tensor, Tensor]:
        """LDA with the covariance shrunk towards its mean variance over `width` features: `(K, r)` and `(K,)`."""
        means = self.sums / self.counts[:, None].clamp(min=1)
        covariance = (self.gram - (self.sums.T * (1 / self.counts.clamp(min=1))) @ self.sums) / self.size
        target = float(covariance.diagonal().sum()) / width
        if target <= 1e-12 * float(self.gram.diagonal().sum()) / self.size / width:
            covariance, shrinkage, target = torch.zeros_like(covariance), 1.0, float(means.square().mean()) or 1.0
        shrunk = (1 - shrinkage) * covariance
        shrunk.diagonal().add_(shrinkage * target)
        weight = solve_symmetric(shrunk, means.T).T
        return weight, -0.5 * (weight * means).sum(dim=1) + self.counts.clamp(min=0.5).log()


def solve_symmetric(matrix: Tensor, right: Tensor) -> Tensor:
    """matrix^-1 right for a positive definite matrix `(r, r)`; by least squares where rounding has made it otherwise.

    Example:
        >>> solve_symmetric(torch.tensor([[2.0]]), torch.tensor([[1.0]])).item()
        0.5
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return torch.linalg.pinv(matrix, rtol=1e-10, hermitian=True) @ right
    return torch.cholesky_solve(right, factor)


def share_loss(counts: Tensor) -> float:
    """Log loss of predicting the class shares, their entropy in nats: `counts` `(K,)`; classes of one example left out.

    Example:
        >>> round(share_loss(torch.tensor([3.0, 3.0, 1.0])), 4)  # ln 2
        0.6931
    """
    held = counts[counts >= 2].double()
    share = held / held.sum()
    return float(-torch.special.xlogy(share, share).sum()) if len(held) else math.inf


def fall_back(
    shape: HeadShape, generator: torch.Generator, moments: Moments, reason: str, notes: dict[str, Any]
) -> HeadWeights:
    """N(0, 0.01) with b = log pi (half an example for a class without any)."""
    head = FixedStd(std=0.01)(shape, generator)
    shares = moments.counts.clamp(min=0.5)
    bias = torch.log(shares / shares.sum()).float() if shape.bias else None
    notes = {"chosen": "normal", "reason": f"{reason}: the analytic head with the class shares as bias", **notes}
    return replace(head, bias=bias, bias_std=None if shape.bias else 0.0, notes=notes)


def _reason(policy: str | None, ranking: list[Entry], mixture: Mixture) -> str:
    losses = ", ".join(f"{entry.name} {entry.fit.loss:.4f}" for entry in ranking)
    if policy == "finetune":
        losses += ", each at the strongest regularisation within one standard error of its best"
    if len(mixture.parts) > 1:
        shares = ", ".join(f"{share:.2f} {entry.name}" for entry, share in mixture.parts)
        return f"families weighed by their held-out losses ({losses}): {shares}; together {mixture.fit.loss:.4f}"
    return f"{mixture.name} has the least held-out loss ({losses})"


SCHEMES: dict[str, Callable[..., Scheme]] = {"auto": Auto}
