"""The linear protocol of Kornblith et al.: one penalty of a grid, chosen on validation data, then trained on all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headinit.analysis.metrics import HIGHER_IS_BETTER
from headinit.config import Settings
from headinit.errors import ConfigError
from headinit.experiment import (
    Task,
    attach_new_head,
    features_of,
    load_model,
    load_splits,
    make_loaders,
)
from headinit.features.extract import FeatureSet
from headinit.features.moments import Moments
from headinit.schemes.linear_probe import ProbeProblem

PENALTIES = tuple(10 ** (-6 + 11 * k / 44) for k in range(45))
"""45 values from 1e-6 to 1e5, evenly spaced in the logarithm (Kornblith et al., 2019, appendix A.3)."""


@dataclass(frozen=True)
class LinearOutcome:
    """What came of the protocol.

    Attributes:
        penalty: the chosen one, of sum_i loss_i + penalty / 2 |W|^2 (scikit-learn's C is its inverse).
        scores: of every penalty on the validation data.
        val: metrics of the chosen penalty on validation data, trained without them.
        test: metrics after training on training and validation data together; None without test data.
        weight, bias: `(K, d)` and `(K,)` of that last head.
    """

    penalty: float
    scores: tuple[float, ...]
    val: Mapping[str, float]
    test: Mapping[str, float] | None
    weight: Tensor
    bias: Tensor


def linear_protocol(
    train: FeatureSet,
    validation: FeatureSet,
    test: FeatureSet | None,
    metrics: Callable[[Tensor, Tensor], dict[str, float]],
    *,
    monitor: str = "accuracy",
    penalties: Sequence[float] = PENALTIES,
    tolerance: float = 1e-9,
    max_iterations: int = 1000,
) -> LinearOutcome:
    """Multinomial logistic regression by L-BFGS on features as they are, with the penalty that validation prefers.

    From the strongest penalty to the weakest, each solution starting at the last. Of equals the strongest is taken.

    Args:
        train, validation, test: features and labels.
        metrics: `(logits, labels) -> scores`.
        monitor: the score that chooses.
        penalties: the grid.
        tolerance, max_iterations: of L-BFGS.

    Raises:
        ConfigError: the grid is empty or holds a value that is not above 0.

    Example:
        >>> from headinit.analysis.metrics import classification_metrics
        >>> x, y = torch.tensor([[0.0], [1.0], [9.0], [10.0]]), torch.tensor([0, 0, 1, 1])
        >>> data = FeatureSet(x, y, 2)
        >>> outcome = linear_protocol(data, data, data, classification_metrics, penalties=[1e-2, 1.0])
        >>> outcome.penalty, outcome.test["accuracy"]
        (1.0, 1.0)
    """
    if not penalties or min(penalties) <= 0:
        raise ConfigError(f"The penalties {list(penalties)} must be numbers above 0, at least one.")
    sign = 1 if HIGHER_IS_BETTER[monitor] else -1
    problem, fit = _problem(train), None
    scores: dict[float, float] = {}
    best, best_score, kept = 0.0, -math.inf, {}
    for penalty in sorted(penalties, reverse=True):
        fit, weight, bias = problem.solve("raw", 1.0 / penalty, tolerance, max_iterations, start=fit)
        found = metrics(_logits(weight, bias, validation), validation.labels)
        scores[penalty] = found[monitor]
        if sign * found[monitor] > best_score:
            best, best_score, kept = penalty, sign * found[monitor], found
    both = FeatureSet(
        torch.cat([train.features, validation.features]),
        torch.cat([train.labels, validation.labels]),
        train.num_classes,
    )
    _, weight, bias = _problem(both).solve("raw", 1.0 / best, tolerance, max_iterations)
    tested = None if test is None else metrics(_logits(weight, bias, test), test.labels)
    return LinearOutcome(best, tuple(scores[p] for p in penalties), kept, tested, weight, bias)


def run_linear_protocol(settings: Settings) -> dict[str, Any]:
    """The protocol on the data and the backbone that the settings name, as what a result keeps of it."""
    splits = load_splits(settings)
    task = Task.of(splits)
    if task.name != "single_label":
        raise ConfigError(f"The linear protocol is for data with one class each, and {splits.name} is {task.name}.")
    backbone = load_model(settings, splits)
    loaders = make_loaders(settings, splits, backbone)
    model = attach_new_head(settings, splits, backbone)
    parts: dict[str, Any] = {"train": loaders.train_in_order, "val": loaders.validation, "test": loaders.test}
    features = features_of(model, {name: batches for name, batches in parts.items() if batches is not None}, settings)
    outcome = linear_protocol(
        features["train"],
        features["val"],
        features.get("test"),
        task.metrics,
        monitor=settings.trainer.monitor or "accuracy",
    )
    return {
        "penalty": outcome.penalty,
        "val": dict(outcome.val),
        "test": None if outcome.test is None else dict(outcome.test),
    }


def _problem(data: FeatureSet) -> ProbeProblem:
    return ProbeProblem.of(data, Moments.of(data), intercept=True)


def _logits(weight: Tensor, bias: Tensor, data: FeatureSet) -> Tensor:
    return nn.functional.linear(data.features.double(), weight.double(), bias.double())
