"""The linear protocol against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression

from headinit.analysis.metrics import classification_metrics
from headinit.errors import ConfigError
from headinit.features.extract import FeatureSet
from headinit.reproduction.linear import PENALTIES, linear_protocol


def parts() -> list[FeatureSet]:
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))[:900]
    x, y = torch.tensor(x[order] / 16.0, dtype=torch.float64), torch.tensor(y[order])
    return [FeatureSet(x[i : i + 300], y[i : i + 300], 10) for i in (0, 300, 600)]


def test_the_grid_is_the_published_one() -> None:
    assert len(PENALTIES) == 45
    assert list(PENALTIES) == pytest.approx(np.logspace(-6, 5, 45).tolist())


def test_choice_and_refit_agree_with_scikit_learn() -> None:
    train, validation, test = parts()
    grid = [0.3, 1.0, 30.0, 1e3]
    outcome = linear_protocol(train, validation, test, classification_metrics, penalties=grid, tolerance=1e-14)

    def fitted(penalty: float, *data: FeatureSet) -> LogisticRegression:
        model = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=20_000)
        return model.fit(np.concatenate([d.features for d in data]), np.concatenate([d.labels for d in data]))

    scores = [fitted(p, train).score(validation.features, validation.labels) for p in grid]
    assert outcome.scores == pytest.approx(scores)
    assert outcome.penalty == max(p for p, s in zip(grid, scores, strict=True) if s == max(scores))
    last = fitted(outcome.penalty, train, validation)
    weight, bias = outcome.weight - outcome.weight.mean(0), outcome.bias - outcome.bias.mean()
    assert np.allclose(weight, last.coef_ - last.coef_.mean(0), atol=1e-3)
    assert np.allclose(bias, last.intercept_ - last.intercept_.mean(), atol=5e-3)
    assert outcome.test is not None
    assert outcome.test["accuracy"] == pytest.approx(last.score(test.features, test.labels))


def test_a_grid_without_penalties_is_refused() -> None:
    train, validation, test = parts()
    with pytest.raises(ConfigError, match="above 0"):
        linear_protocol(train, validation, test, classification_metrics, penalties=[0.0])
