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
from headinit.schemes.scheme import HeadShape, HeadWeights, Scheme
from headinit.schemes.variance_scaling import FixedStd

POLICIES = ("frozen", "finetune")

# Above this many examples x features x classes a probe's path takes minutes, and the closed forms decide alone.
PROBE_LIMIT = 5e8

# A mixture is taken if it lowers the held-out loss by this share at least: it has one number per family to fit.
MIXTURE_GAIN = 0.01

# A head must lower the held-out loss of the class shares by this share at least.
CHANCE_GAIN = 0.02


@dataclass(frozen=True)
class Auto(Scheme):
    """The head that its own held-out loss prefers: ridge, LDA, the probe, or a mixture, with strength and scale.

    Each family first settles its own strength and raw or standardised features: ridge and LDA by exact leave-one-out,
    the probe by stratified folds. The winners are then scored on the same folds, each scaled by the temperature that
    fits its held-out scores, and the least log loss wins. A weighted sum of linear heads is a linear head, too: if
    the sum of all families, with weights >= 0 fitted to the held-out scores, beats the winner by a hundredth or more,
    it is taken instead; the families err in different ways, so it often does.

    With ``policy="finetune"`` every family takes the strongest regularisation whose held-out loss is within one
    standard error of its least: as good as can be told, and with the most energy E ||e_y - p|| left for the features
    to learn from (Ren et al. 2023).

    With fewer than two examples per class on average, or if nothing beats the class shares, the data are too little
    to tell: the head is then N(0, 0.01) with b = log pi. Multi-label targets and regression get ridge. The notes say
    what was chosen and why.

    Attributes:
        policy: ``"frozen"`` or ``"finetune"``, what will be trained afterwards.
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
    policy: str = "frozen"
    folds: int = 5
    mix: bool = True
    missing: str = "mean"

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise unknown_name("policy", self.policy, POLICIES, SchemeError)
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
        contest = Contest.of(examples, present_moments(moments), shape.bias, self, generator)
        ranking = sorted(contest.entries(), key=lambda entry: entry.fit.loss)
        best, chance = ranking[0], share_loss(contest.moments.counts)
        if best.fit.loss > (1 - CHANCE_GAIN) * chance:
            reason = f"no held-out loss beats the class shares: {best.fit.loss:.4f} ({best.name}) against {chance:.4f}"
            return fall_back(shape, generator, moments, reason, notes)
        mixture = contest.mixture(ranking) if self.mix else None
        parts = [(best, 1.0)] if mixture is None else mixture.parts
        solved = [(entry.scale * share, *entry.solve()) for entry, share in parts]
        weight = torch.stack([factor * w for factor, w, _ in solved]).sum(dim=0)
        bias = torch.stack([factor * b for factor, _, b in solved]).sum(dim=0)
        fit = best.fit if mixture is None else mixture.fit
        notes |= {
            "chosen": best.name if mixture is None else "mixture",
            "reason": _reason(self.policy, ranking, fit, mixture is not None),
            "parts": {entry.name: entry.settings(share) for entry, share in parts},
            "held_out_loss": fit.loss,
            "held_out_accuracy": fit.accuracy,
            "held_out_losses": {entry.name: entry.fit.loss for entry in ranking},
            "chance_loss": chance,
            "training_energy": energy(examples.features.double() @ weight.T + bias, examples.labels),
        }
        return finish(weight, bias, moments, shape, notes)


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


@dataclass(frozen=True)
class Contest:
    """The families, on the same examples and the same folds."""

    examples: FeatureSet
    moments: Moments
    intercept: bool
    scheme: Auto
    seed: int
    rows: Tensor

    @classmethod
    def of(
        cls, examples: FeatureSet, moments: Moments, intercept: bool, scheme: Auto, generator: torch.Generator
    ) -> Contest:
        """The contest of these examples, all of whose classes are present."""
        rows = held_out_rows(examples, generator)
        return cls(examples, moments, intercept, scheme, generator.initial_seed(), rows)

    def entries(self) -> list[Entry]:
        """The best head of each family."""
        found = [self.ridge(), self.lda()]
        if len(self.examples) * self.moments.width * self.moments.num_classes <= PROBE_LIMIT:
            found += self.probes()
        return found

    def ridge(self) -> Entry:
        """Ridge at the strength that its leave-one-out loss prefers."""
        generator = torch.Generator().manual_seed(self.seed)
        problem = RidgeProblem.of(self.moments, self.examples, self.intercept, generator)
        best, scale = self._settle(problem.candidates(Ridge()))

        def solve_part(part: FeatureSet) -> tuple[Tensor, Tensor]:
            small = RidgeProblem.of(Moments.of(part), part, self.intercept, generator)
            return small.solve(best.features, best.strength * len(part) / len(self.examples))

        return Entry(
            "ridge",
            best.features,
            best.strength,
            scale,
            *self._judge(solve_part),
            lambda: problem.solve(best.features, best.strength),
        )

    def lda(self) -> Entry:
        """LDA at the shrinkage that its leave-one-out loss prefers."""

        def problem_of(part: FeatureSet, moments: Moments, rows: Tensor, features: str) -> LDAProblem:
            return LDAProblem.of(moments, part, rows, standardise=features == "standardised")

        kinds = ("raw", "standardised")
        problems = {kind: problem_of(self.examples, self.moments, self.rows, kind) for kind in kinds}
        best, scale = self._settle([c for kind in kinds for c in problems[kind].candidates("loo", kind)])

        def solve_part(part: FeatureSet) -> tuple[Tensor, Tensor]:
            return problem_of(part, Moments.of(part), self.rows[:0], best.features).solve(best.strength)

        return Entry(
            "lda",
            best.features,
            best.strength,
            scale,
            *self._judge(solve_part),
            lambda: problems[best.features].solve(best.strength),
        )

    def probes(self) -> list[Entry]:
        """The probe on raw and on standardised features, each at the C that the folds prefer."""
        problem = ProbeProblem.of(self.examples, self.moments, self.intercept)
        return [self._probe(problem, features) for features in ("raw", "standardised")]

    def _probe(self, problem: ProbeProblem, features: str) -> Entry:
        path = problem.path(features, self.scheme.folds, torch.Generator().manual_seed(self.seed))
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
            lambda: problem.solve(features, best.inverse_strength, 1e-8, 1000)[1:],
        )

    def mixture(self, entries: list[Entry]) -> Mixture | None:
        """The weighted sum of all families, if it beats the best of them by enough."""
        scores = [entry.scores * entry.fit.scale for entry in entries]
        labels = torch.cat([held for _, held, _ in self._folds()])
        shares = mixing_weights(scores, labels)
        total = torch.stack([a * z for a, z in zip(shares, scores, strict=True)]).sum(dim=0)
        fit = calibrate(total, labels, scale=1.0)
        if fit.loss > (1 - MIXTURE_GAIN) * entries[0].fit.loss:
            return None
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
        if self.scheme.policy == "frozen" or fit is None:
            return None
        return float(fit.losses.std()) / math.sqrt(len(fit.losses)) if len(fit.losses) > 1 else 0.0

    def _folds(self) -> Iterator[tuple[FeatureSet, Tensor, Tensor]]:
        """Per fold: the examples kept, the labels held out and their features; classes of one example left out."""
        usable = scorable(self.examples.labels, self.examples.num_classes)
        _, labels = torch.unique(self.examples.labels[usable], return_inverse=True)
        renumbered = torch.full_like(self.examples.labels, -1).masked_scatter(usable, labels)
        classes = int(labels.max()) + 1
        generator = torch.Generator().manual_seed(self.seed)
        for kept, held in folds_of(self.examples.labels, self.scheme.folds, generator):
            kept, held = kept[usable[kept]], held[usable[held]]
            part = FeatureSet(self.examples.features[kept], renumbered[kept], classes)
            yield part, renumbered[held], self.examples.features[held]

    def _judge(self, solve: Callable[[FeatureSet], tuple[Tensor, Tensor]]) -> tuple[Calibration, Tensor]:
        """Scores of every fold by the head that the others give, scaled together; and the scores."""
        scores, labels = [], []
        for part, held, features in self._folds():
            weight, bias = solve(part)
            scores.append(features.double() @ weight.T + bias)
            labels.append(held)
        pooled = torch.cat(scores)
        return calibrate(pooled, torch.cat(labels)), pooled


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


def _reason(policy: str, ranking: list[Entry], fit: Calibration, mixed: bool) -> str:
    losses = ", ".join(f"{entry.name} {entry.fit.loss:.4f}" for entry in ranking)
    strength = (
        "" if policy == "frozen" else ", each at the strongest regularisation within one standard error of its best"
    )
    if mixed:
        return f"the weighted sum has held-out loss {fit.loss:.4f}, below every family alone ({losses}{strength})"
    return f"{ranking[0].name} has the least held-out loss ({losses}{strength})"


SCHEMES: dict[str, Callable[..., Scheme]] = {"auto": Auto}
