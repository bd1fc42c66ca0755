from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.preprocessing import StandardScaler
from torch.testing import assert_close

from headinit.errors import SchemeError
from headinit.features.extract import FeatureSet
from headinit.features.moments import Moments
from headinit.schemes.calibration import log_losses
from headinit.schemes.linear_probe import EarlyProbe, Probe, energy
from headinit.schemes.scheme import HeadShape, HeadWeights, Scheme


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clusters(size: int = 240, width: int = 10, num_classes: int = 4, spread: float = 2.0) -> FeatureSet:
    g = generator()
    labels = torch.arange(size) % num_classes
    centres = torch.randn(num_classes, width, generator=g)
    mix = torch.randn(width, width, generator=g) / width**0.5 * spread
    return FeatureSet(centres[labels] + torch.randn(size, width, generator=g) @ mix + 1.0, labels, num_classes)


def shape_of(data: FeatureSet, bias: bool = True) -> HeadShape:
    return HeadShape(data.features.shape[1], data.num_classes, bias)


def logits(head: HeadWeights, x: torch.Tensor) -> torch.Tensor:
    scores = x.double() @ head.weight.double().T
    return scores if head.bias is None else scores + head.bias.double()


@pytest.mark.parametrize(("size", "width"), [(240, 10), (40, 90)])
@pytest.mark.parametrize("strength", [1e-3, 0.3, 100.0])
@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_objective_against_logistic_regression(size: int, width: int, strength: float, standardise: bool, bias: bool):
    if standardise and not bias:
        pytest.skip("scikit-learn's scaler centres what a head without bias cannot")
    data = clusters(size, width)
    x, y = data.features.double().numpy(), data.labels
    x = StandardScaler().fit_transform(x) if standardise else x
    oracle = LogisticRegression(C=strength, tol=1e-10, max_iter=20_000, fit_intercept=bias).fit(x, y.numpy())
    losses = log_losses(torch.from_numpy(oracle.decision_function(x)), y)
    wanted = losses.mean().item() + 0.5 / (strength * size) * float(np.square(oracle.coef_).sum())
    scheme = Probe(inverse_strength=strength, features="standardised" if standardise else "raw", tolerance=1e-13)
    head = scheme(shape_of(data, bias), generator(), data)
    assert head.notes["objective"] == pytest.approx(wanted, rel=1e-6, abs=1e-9)
    p = torch.softmax(logits(head, data.features), 1)
    assert_close(p, torch.from_numpy(oracle.predict_proba(x)), rtol=0, atol=2e-4)


def test_two_classes_have_twice_the_strength_of_sklearns_one_row() -> None:
    data = clusters(num_classes=2)
    oracle = LogisticRegression(C=0.6, tol=1e-10, max_iter=10_000).fit(data.features.double().numpy(), data.labels)
    head = Probe(inverse_strength=0.3, features="raw", tolerance=1e-13)(shape_of(data), generator(), data)
    wanted = torch.from_numpy(oracle.predict_proba(data.features.double().numpy()))
    assert_close(torch.softmax(logits(head, data.features), 1), wanted, rtol=0, atol=1e-4)


def test_chosen_probe_is_as_good_as_a_searched_one_on_fresh_examples() -> None:
    g = generator(2)
    labels = torch.randint(4, (1200,), generator=g)
    data = FeatureSet(0.5 * torch.randn(4, 10, generator=g)[labels] + torch.randn(1200, 10, generator=g), labels, 4)
    train = FeatureSet(data.features[:300], data.labels[:300], 4)
    head = Probe()(shape_of(train), generator(), train)
    found = log_losses(logits(head, data.features[300:]), data.labels[300:]).mean().item()
    search = GridSearchCV(
        LogisticRegression(max_iter=5000), {"C": np.logspace(-4, 2, 13)}, cv=3, scoring="neg_log_loss"
    ).fit(train.features.numpy(), train.labels.numpy())
    oracle = torch.from_numpy(search.predict_log_proba(data.features[300:].numpy()))
    assert found < 1.05 * log_losses(oracle, data.labels[300:]).mean().item()
    assert head.notes["held_out_loss"] == pytest.approx(found, rel=0.25)


def test_the_same_seed_gives_the_same_probe_and_global_generators_stay() -> None:
    data = clusters()
    state = torch.get_rng_state()
    first, second = (Probe()(shape_of(data), generator(3), data) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("target", [0.1, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("features", ["raw", "standardised"])
def test_early_probe_stops_at_the_target_energy(target: float, features: str) -> None:
    data = clusters(spread=0.5)
    head = EarlyProbe(target_energy=target, features=features)(shape_of(data), generator(), data)
    p = torch.softmax(logits(head, data.features), 1)
    errors = torch.nn.functional.one_hot(data.labels, 4) - p
    assert errors.norm(dim=1).mean().item() == pytest.approx(target, abs=1e-4)
    assert energy(logits(head, data.features), data.labels) == pytest.approx(target, abs=1e-4)


@pytest.mark.parametrize(("target", "reason"), [(1.2, "strongest penalty"), (0.05, "weakest penalty")])
def test_an_energy_out_of_reach_gives_the_nearest_with_a_warning(target: float, reason: str) -> None:
    data = clusters(spread=5.0)
    head = EarlyProbe(target_energy=target)(shape_of(data), generator(), data)
    assert reason in head.notes["warnings"][0]
    assert head.weight.isfinite().all()


@pytest.mark.parametrize(
    "scheme", [Probe(), Probe(inverse_strength=1.0), EarlyProbe()], ids=["chosen", "given", "early"]
)
@pytest.mark.parametrize(
    "case", ["constant", "all_constant", "duplicated", "float16", "one_each", "imbalanced", "absent", "one_class"]
)
def test_hostile_data_gives_a_finite_head(scheme: Scheme, case: str) -> None:
    data = clusters(80)
    x, y = data.features.clone(), data.labels.clone()
    if case == "constant":
        x[:, 3] = 5.0
    elif case == "all_constant":
        x[:] = 1.0
    elif case == "duplicated":
        x = torch.cat([x, x], 1)
    elif case == "float16":
        x = x.half()
    elif case == "one_each":
        x, y = x[:4], torch.arange(4)
    elif case == "imbalanced":
        x, y = clusters(1004).features, torch.cat([torch.zeros(1000, dtype=torch.int64), torch.arange(4)])
    elif case == "absent":
        y[y == 2] = 1
    elif case == "one_class":
        y[:] = 1
    hostile = replace(data, features=x, labels=y)
    head = scheme(shape_of(hostile), generator(), hostile)
    assert head.weight.isfinite().all()
    assert head.bias.isfinite().all()
    assert log_losses(logits(head, x), y).mean() < 1.4
    if case == "absent":
        assert head.notes["absent_classes"] == [2]
        assert 2 not in logits(head, x).argmax(1).tolist()


def test_probe_needs_single_examples_of_classes() -> None:
    data = clusters()
    with pytest.raises(SchemeError, match="was given moments"):
        Probe()(shape_of(data), generator(), Moments.of(data))
    with pytest.raises(SchemeError, match="Use init=ridge"):
        Probe()(HeadShape(10, 3), generator(), FeatureSet(data.features, torch.zeros(240, 3), 3))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Probe(inverse_strength=-1.0),
        lambda: Probe(folds=1),
        lambda: Probe(features="scaled"),
        lambda: EarlyProbe(target_energy=2.0),
        lambda: EarlyProbe(features="auto"),
    ],
)
def test_bad_options(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SchemeError):
        make()
