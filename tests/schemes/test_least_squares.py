from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.covariance import ledoit_wolf, oas
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.linear_model import RidgeClassifier, RidgeCV
from sklearn.preprocessing import StandardScaler
from torch.testing import assert_close

from headinit.errors import SchemeError
from headinit.features.extract import FeatureSet
from headinit.features.moments import Moments
from headinit.schemes.calibration import fit_scale, log_losses
from headinit.schemes.least_squares import LDA, LDAProblem, Ridge, RidgeProblem, fit_sigmoid
from headinit.schemes.scheme import HeadShape, HeadWeights


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clusters(size: int = 300, width: int = 10, num_classes: int = 4, spread: float = 1.5, seed: int = 0) -> FeatureSet:
    g = generator(seed)
    labels = torch.arange(size) % num_classes
    centres = torch.randn(num_classes, width, generator=g)
    mix = torch.randn(width, width, generator=g) / width**0.5 * spread
    return FeatureSet(centres[labels] + torch.randn(size, width, generator=g) @ mix + 2.0, labels, num_classes)


def weak(size: int, width: int, seed: int = 0) -> FeatureSet:
    """Classes that overlap: few examples in many features separate, fresh ones do not."""
    g = generator(9)
    centres = torch.randn(4, width, generator=g) * 1.5 / width**0.5
    labels = torch.arange(size) % 4
    return FeatureSet(centres[labels] + torch.randn(size, width, generator=generator(seed)), labels, 4)


def shape_of(data: FeatureSet, bias: bool = True) -> HeadShape:
    return HeadShape(data.features.shape[1], data.num_classes, bias)


def logits(head: HeadWeights, x: torch.Tensor) -> torch.Tensor:
    scores = x.double() @ head.weight.double().T
    return scores if head.bias is None else scores + head.bias.double()


def ridge_problem(data: FeatureSet, centre: bool = True) -> RidgeProblem:
    return RidgeProblem.of(Moments.of(data), data, centre)


# Ridge.


@pytest.mark.parametrize(("size", "width"), [(300, 10), (30, 80)])
@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("strength", [0.01, 3.0, 1e3])
def test_ridge_against_sklearn(size: int, width: int, standardise: bool, strength: float) -> None:
    data = clusters(size, width)
    x, y = data.features.double().numpy(), np.eye(4)[data.labels]
    x = StandardScaler().fit_transform(x) if standardise else x
    oracle = SklearnRidge(alpha=strength).fit(x, y)
    scheme = Ridge(strength=strength, features="standardised" if standardise else "raw", calibrate=False)
    head = scheme(shape_of(data), generator(), data)
    assert_close(logits(head, data.features), torch.from_numpy(oracle.predict(x)), rtol=1e-4, atol=1e-5)


def test_ridge_predicts_as_ridge_classifier() -> None:
    data = clusters(spread=3.0)
    oracle = RidgeClassifier(alpha=5.0).fit(data.features.double().numpy(), data.labels.numpy())
    head = Ridge(strength=5.0, features="raw")(shape_of(data), generator(), data)
    assert logits(head, data.features).argmax(1).tolist() == oracle.predict(data.features.double().numpy()).tolist()


@pytest.mark.parametrize(("size", "width"), [(60, 8), (25, 40)])
@pytest.mark.parametrize("centre", [True, False])
def test_leave_one_out_scores_equal_explicit_refits(size: int, width: int, centre: bool) -> None:
    data = clusters(size, width)
    problem = ridge_problem(data, centre)
    for strength in (0.05, 2.0, 100.0):
        found = problem.loo_scores("raw", strength)
        x, y = data.features.double().numpy(), np.eye(4)[data.labels]
        for row, i in enumerate(problem.rows.tolist()):
            rest = np.arange(size) != i
            oracle = SklearnRidge(alpha=strength, fit_intercept=centre, solver="svd").fit(x[rest], y[rest])
            np.testing.assert_allclose(found[row].numpy(), oracle.predict(x[i : i + 1])[0], rtol=1e-6, atol=1e-8)


def test_strength_is_that_of_ridge_cv_and_of_the_leave_one_out_loss() -> None:
    data = clusters(spread=3.0)
    x, y = data.features.double().numpy(), np.eye(4)[data.labels]
    grid = ridge_problem(data).strengths("raw")
    oracle = RidgeCV(alphas=grid).fit(x, y)
    head = Ridge(features="raw", criterion="squared_error")(shape_of(data), generator(), data)
    assert head.notes["strength"] == pytest.approx(oracle.alpha_)
    head = Ridge(features="raw")(shape_of(data), generator(), data)
    problem = ridge_problem(data)
    losses = []
    for strength in grid:
        scores = problem.loo_scores("raw", strength)
        losses.append(log_losses(scores * fit_scale(scores, data.labels), data.labels).mean().item())
    assert head.notes["strength"] == pytest.approx(grid[int(np.argmin(losses))])
    assert head.notes["held_out_loss"] == pytest.approx(min(losses))


def test_generalised_cross_validation_from_moments_alone() -> None:
    data = clusters(spread=3.0)
    x, y = data.features.double().numpy(), np.eye(4)[data.labels]
    problem = ridge_problem(data)
    for strength in (0.1, 10.0, 1e3):
        xc = x - x.mean(0)
        hat = xc @ np.linalg.solve(xc.T @ xc + strength * np.eye(10), xc.T) + 1 / len(x)
        error = ((y - hat @ y) ** 2).sum() / len(x) / (1 - np.trace(hat) / len(x)) ** 2
        assert problem.generalised_error("raw", strength) == pytest.approx(error)
    head = Ridge()(shape_of(data), generator(), Moments.of(data))
    assert head.notes["chosen_by"] == "generalised cross-validation"
    assert (logits(head, data.features).argmax(1) == data.labels).double().mean() > 0.5


def test_the_scale_comes_from_held_out_scores_not_from_those_of_training() -> None:
    """Eighty examples in 200 features: training scores separate, held-out ones do not."""
    data = weak(80, 200)
    head = Ridge(strength=1e-3, features="raw")(shape_of(data), generator(), data)
    plain = Ridge(strength=1e-3, features="raw", calibrate=False)(shape_of(data), generator(), data)
    on_training = fit_scale(logits(plain, data.features), data.labels)
    assert head.notes["scale"] < 0.5 * on_training
    assert_close(head.weight, plain.weight * head.notes["scale"], rtol=1e-5, atol=1e-7)


def test_ridge_without_bias_is_fitted_through_the_origin() -> None:
    data = clusters()
    oracle = SklearnRidge(alpha=2.0, fit_intercept=False).fit(data.features.double().numpy(), np.eye(4)[data.labels])
    head = Ridge(strength=2.0, features="raw", calibrate=False)(shape_of(data, bias=False), generator(), data)
    assert head.bias is None
    assert_close(head.weight.double(), torch.from_numpy(oracle.coef_), rtol=1e-4, atol=1e-6)


def test_regression_against_ridge_cv() -> None:
    data = clusters()
    targets = torch.stack([data.features @ torch.ones(10), data.features[:, 0] * 3 + 40], 1)
    targets = targets + torch.randn(targets.shape, generator=generator(5))
    data = FeatureSet(data.features, targets, 2)
    head = Ridge(features="raw", criterion="squared_error")(HeadShape(10, 2), generator(), data)
    oracle = SklearnRidge(alpha=head.notes["strength"]).fit(data.features.double().numpy(), targets.double().numpy())
    wanted = torch.from_numpy(oracle.predict(data.features.double().numpy()))
    assert_close(logits(head, data.features), wanted, rtol=1e-4, atol=1e-3)
    assert head.notes["scale"] == 1.0


def test_one_dimensional_regression_targets() -> None:
    data = clusters()
    target = data.features[:, 0].clone()
    head = Ridge()(HeadShape(10, 1), generator(), FeatureSet(data.features, target, 1))
    assert_close(logits(head, data.features)[:, 0], target.double(), rtol=1e-2, atol=1e-2)


def test_multi_label_logits_are_calibrated() -> None:
    data = clusters(2000)
    g = generator(1)
    truth = data.features @ torch.randn(10, 3, generator=g)
    truth = truth - truth.mean(0)
    labels = (torch.rand(truth.shape, generator=g) < torch.sigmoid(truth)).float()
    head = Ridge()(HeadShape(10, 3), generator(), FeatureSet(data.features, labels, 3))
    found = torch.nn.functional.binary_cross_entropy_with_logits(logits(head, data.features).float(), labels)
    best = torch.nn.functional.binary_cross_entropy_with_logits(truth, labels)
    assert found < 1.1 * best


def test_fit_sigmoid_against_logistic_regression() -> None:
    from sklearn.linear_model import LogisticRegression

    z = torch.randn(5000, 1, generator=generator(), dtype=torch.float64)
    y = (torch.rand(5000, 1, generator=generator(1)) < torch.sigmoid(3 * z - 1)).double()
    a, c = fit_sigmoid(z, y)
    oracle = LogisticRegression(C=1e8, tol=1e-8).fit(z.numpy(), y[:, 0].numpy())
    assert a == pytest.approx(oracle.coef_[0, 0], rel=6e-3)
    assert a * c == pytest.approx(oracle.intercept_[0], rel=8e-3)


# LDA.


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("size", "width"), [(300, 10), (40, 60)])
@pytest.mark.parametrize("shrinkage", [0.05, 0.4, 1.0])
def test_lda_against_sklearn(size: int, width: int, shrinkage: float, bias: bool) -> None:
    data = clusters(size, width)
    x = data.features.double().numpy()
    oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(x, data.labels.numpy())
    scheme = LDA(shrinkage=shrinkage, features="raw", calibrate=False)
    found = logits(scheme(shape_of(data, bias), generator(), data), data.features)
    wanted = torch.from_numpy(oracle.decision_function(x))
    if bias:
        centred = wanted - wanted.mean(1, keepdim=True)
        size_of = float(centred.abs().max())
        assert_close(found - found.mean(1, keepdim=True), centred, rtol=1e-4, atol=2e-5 * size_of)
    else:
        assert (found.argmax(1) == wanted.argmax(1)).double().mean() > 0.97


@pytest.mark.parametrize(("size", "width"), [(200, 10), (40, 60)])
def test_shrinkage_rules_against_sklearn(size: int, width: int) -> None:
    data = clusters(size, width)
    residuals = (data.features.double() - Moments.of(data).means[data.labels]).numpy()
    for name, rule in (("ledoit_wolf", ledoit_wolf), ("oas", oas)):
        head = LDA(shrinkage=name, features="raw")(shape_of(data), generator(), data)
        assert head.notes["shrinkage"] == pytest.approx(rule(residuals, assume_centered=True)[1], rel=1e-6)


def test_lda_from_moments_alone() -> None:
    data = clusters()
    whole = LDA(shrinkage="oas", features="raw", calibrate=False)(shape_of(data), generator(), data)
    alone = LDA(features="raw")(shape_of(data), generator(), Moments.of(data))
    assert_close(alone.weight, whole.weight)
    assert_close(alone.bias, whole.bias)
    with pytest.raises(SchemeError, match="shrinkage=oas"):
        LDA(shrinkage="ledoit_wolf")(shape_of(data), generator(), Moments.of(data))


@pytest.mark.parametrize(("size", "width"), [(60, 8), (24, 40)])
@pytest.mark.parametrize("shrinkage", [0.1, 0.7])
def test_lda_leave_one_out_equals_explicit_refits(size: int, width: int, shrinkage: float) -> None:
    """Refits without the example, with the two things held that the formula holds: the target c and the divisor N."""
    data = clusters(size, width)
    problem = LDAProblem.of(Moments.of(data), data, torch.arange(size), standardise=False)
    coordinates = problem.rotation.apply(data.features)
    found = problem._scores(coordinates, coordinates.square(), data.labels, shrinkage)
    x, y = data.features.double().numpy(), data.labels.numpy()
    for i in range(size):
        rest = np.arange(size) != i
        means = np.stack([x[rest & (y == k)].mean(0) for k in range(4)])
        z = x[rest] - means[y[rest]]
        covariance = (1 - shrinkage) * z.T @ z / size + shrinkage * problem.target * np.eye(width)
        d = x[i] - means
        scores = np.log(np.bincount(y[rest])) - 0.5 * (d * np.linalg.solve(covariance, d.T).T).sum(1)
        np.testing.assert_allclose(found[i].numpy(), scores, rtol=1e-6, atol=1e-6)


def test_lda_is_calibrated_on_held_out_scores() -> None:
    """Raw LDA of few examples in many features is far too sure of itself."""
    data, test = weak(80, 60), weak(4000, 60, seed=1)
    raw = LDA(calibrate=False, shrinkage=0.05, features="raw")(shape_of(data), generator(), data)
    calibrated = LDA(shrinkage=0.05, features="raw")(shape_of(data), generator(), data)
    before = log_losses(logits(raw, test.features), test.labels).mean()
    after = log_losses(logits(calibrated, test.features), test.labels).mean()
    assert after < 1.39 < before


def test_lda_without_shrinkage_of_too_few_examples_is_a_clear_error() -> None:
    data = clusters(20, 60)
    with pytest.raises(SchemeError, match="cannot be inverted at shrinkage 0"):
        LDA(shrinkage=0.0, features="raw")(shape_of(data), generator(), Moments.of(data))


# Hostile data.


@pytest.mark.parametrize("scheme", [Ridge(), Ridge(criterion="squared_error"), LDA(), LDA(shrinkage="oas")])
@pytest.mark.parametrize(
    "case",
    ["constant", "all_constant", "duplicated", "float16", "one_each", "imbalanced", "absent", "one_class", "large"],
)
@pytest.mark.parametrize("bias", [True, False])
def test_hostile_data_gives_a_finite_head(scheme: Ridge | LDA, case: str, bias: bool) -> None:
    data = clusters(200, 10)
    x, y = data.features.clone(), data.labels.clone()
    if case == "constant":
        x[:, 3] = 5.0
    elif case == "all_constant":
        x[:] = 1.0
    elif case == "duplicated":
        x = torch.cat([x, x, x[:, :1]], 1)
    elif case == "float16":
        x = x.half()
    elif case == "one_each":
        x, y = x[:4], torch.arange(4)
    elif case == "imbalanced":
        x, y = clusters(4004, 10).features, torch.cat([torch.zeros(4000, dtype=torch.int64), torch.arange(4)])
        x = x + 3.0 * torch.nn.functional.one_hot(y, 10)
    elif case == "absent":
        y[y == 2] = 1
    elif case == "one_class":
        y[:] = 1
    elif case == "large":
        x = x * 1e6 + 1e7
    hostile = replace(data, features=x, labels=y)
    head = scheme(shape_of(hostile, bias), generator(), hostile)
    assert head.weight.shape == (4, x.shape[1])
    assert head.weight.isfinite().all()
    assert (head.bias is None) == (not bias)
    assert head.bias is None or head.bias.isfinite().all()
    scores = logits(head, x)
    loss = log_losses(scores, y).mean().item()
    if case in ("constant", "duplicated", "float16", "large"):
        assert (scores.argmax(1) == y).double().mean() > (0.6 if bias else 0.5)
        assert loss < 1.39
    if case == "absent":
        assert head.notes["absent_classes"] == [2]
        assert 2 not in scores.argmax(1).tolist()
    if case == "imbalanced":
        assert loss < 0.05


def test_a_missing_class_can_be_an_error() -> None:
    data = clusters()
    data = replace(data, num_classes=6)
    for scheme in (Ridge(missing="error"), LDA(missing="error")):
        with pytest.raises(SchemeError, match=r"for class 4: 0 of 300 training examples \(and 1 more"):
            scheme(shape_of(data), generator(), data)


def test_more_classes_than_examples_allow_to_hold_out() -> None:
    g = generator()
    data = FeatureSet(torch.randn(1000, 16, generator=g), torch.arange(1000), 1000)
    for scheme in (Ridge(), LDA()):
        head = scheme(shape_of(data), generator(), data)
        assert head.weight.isfinite().all()
        scores = logits(head, data.features)
        assert (scores - scores.mean(1, keepdim=True)).square().mean().sqrt().item() == pytest.approx(1.0, rel=1e-3)


def test_a_thousand_classes() -> None:
    data = clusters(2000, 24, 1000, spread=0.3)
    for scheme in (Ridge(), LDA()):
        head = scheme(shape_of(data), generator(), data)
        assert (logits(head, data.features).argmax(1) == data.labels).double().mean() > 0.6


@pytest.mark.parametrize("scheme", [Ridge(), LDA()])
def test_mismatches_are_clear_errors(scheme: Ridge | LDA) -> None:
    data = clusters()
    with pytest.raises(SchemeError, match="computed from data and was given none"):
        scheme(shape_of(data), generator(), None)
    with pytest.raises(SchemeError, match="10 wide and the head takes 11"):
        scheme(HeadShape(11, 4), generator(), data)
    with pytest.raises(SchemeError, match="4 classes and the head makes 5"):
        scheme(HeadShape(10, 5), generator(), data)
    with pytest.raises(SchemeError, match="no examples"):
        scheme(HeadShape(10, 4), generator(), FeatureSet(torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64), 4))


def test_targets_are_refused_by_lda() -> None:
    with pytest.raises(SchemeError, match="Use init=ridge"):
        LDA()(HeadShape(3, 2), generator(), FeatureSet(torch.zeros(4, 3), torch.zeros(4, 2), 2))


@pytest.mark.parametrize(
    "make",
    [lambda: Ridge(strength=0.0), lambda: Ridge(features="scaled"), lambda: LDA(shrinkage=1.5), lambda: LDA("lw")],
)
def test_bad_options(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SchemeError):
        make()
