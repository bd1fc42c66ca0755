from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy.optimize import minimize
from torch.testing import assert_close

from headinit import schemes
from headinit.analysis.diagnostics import start_diagnostics
from headinit.errors import SchemeError
from headinit.features.extract import FeatureSet
from headinit.features.moments import Moments
from headinit.schemes.calibration import fit_scale, log_losses, mixing_weights
from headinit.schemes.fixed import Orthogonal, Zeros
from headinit.schemes.prototypes import ClassMean, Imprint
from headinit.schemes.scaling import (
    LSUV,
    MODIFIERS,
    Normalise,
    PriorBias,
    Standardise,
    TargetScale,
    Temperature,
    logit_std,
    reach,
)
from headinit.schemes.scheme import HeadShape, HeadWeights
from headinit.schemes.variance_scaling import VarianceScaling


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clusters(size: int = 400, width: int = 8, num_classes: int = 4, seed: int = 0) -> FeatureSet:
    g = generator(seed)
    labels = torch.randint(num_classes, (size,), generator=g)
    centres = torch.randn(num_classes, width, generator=generator(50))
    return FeatureSet(centres[labels] + torch.randn(size, width, generator=g) + 3.0, labels, num_classes)


SHAPE = HeadShape(8, 4)


def logits(head: HeadWeights, x: torch.Tensor) -> torch.Tensor:
    scores = x.double() @ head.weight.double().T
    return scores if head.bias is None else scores + head.bias.double()


# LSUV.


@pytest.mark.parametrize("num_classes", [3, 20])
@pytest.mark.parametrize("std", [1.0, 0.1])
def test_lsuv_logits_have_the_std_and_rows_stay_orthogonal(num_classes: int, std: float) -> None:
    data = replace(clusters(), num_classes=num_classes, labels=torch.zeros(400, dtype=torch.int64))
    for given in (data, Moments.of(data)):
        head = LSUV(std=std)(HeadShape(8, num_classes), generator(), given)
        assert logits(head, data.features).std(correction=0).item() == pytest.approx(std, rel=1e-5)
        gram = head.weight @ head.weight.T if num_classes < 8 else head.weight.T @ head.weight
        assert_close(gram, torch.eye(len(gram)) * gram[0, 0], rtol=1e-4, atol=1e-6 * float(gram[0, 0]))


def test_lsuv_of_zero_features_is_a_clear_error() -> None:
    with pytest.raises(SchemeError, match="all logits are equal"):
        LSUV()(SHAPE, generator(), FeatureSet(torch.zeros(9, 8), torch.zeros(9, dtype=torch.int64), 4))


# Prior bias.


def test_softmax_prior_gives_the_class_shares() -> None:
    labels = torch.tensor([0] * 70 + [1] * 20 + [3] * 10)
    data = FeatureSet(torch.randn(100, 8), labels, 4)
    for given in (data, Moments.of(data)):
        p = torch.softmax(PriorBias(Zeros())(SHAPE, generator(), given).bias, 0)
        assert_close(p, torch.tensor([70.0, 20.0, 0.5, 10.0]) / 100.5)


def test_sigmoid_prior_gives_the_label_shares() -> None:
    labels = torch.zeros(50, 4)
    labels[:10, 0] = labels[:25, 1] = labels[:, 3] = 1.0
    head = PriorBias(Zeros())(SHAPE, generator(), FeatureSet(torch.randn(50, 8), labels, 4))
    assert_close(torch.sigmoid(head.bias), torch.tensor([0.2, 0.5, 0.01, 0.99]))
    assert head.notes["prior_bias"] == "sigmoid"


def test_retinanet_prior_needs_no_data() -> None:
    scheme = schemes.build("normal", prior_bias=0.01)
    assert not scheme.needs_data
    head = scheme(SHAPE, generator())
    assert head.bias.tolist() == pytest.approx([-math.log(0.99 / 0.01)] * 4)


def test_regression_prior_is_the_mean() -> None:
    targets = torch.randn(50, 4) + torch.tensor([0.0, 10.0, -3.0, 1e3])
    head = PriorBias(Zeros())(SHAPE, generator(), FeatureSet(torch.randn(50, 8), targets, 4))
    assert_close(head.bias, targets.double().mean(0).float())


def test_prior_is_not_counted_twice() -> None:
    data = clusters()
    for name in ("ridge", "lda", "probe"):
        plain, with_prior = schemes.build(name), schemes.build(name, prior_bias=True)
        found, wanted = (scheme(SHAPE, generator(), data) for scheme in (with_prior, plain))
        assert torch.equal(found.bias, wanted.bias)
    found, wanted = (
        s(SHAPE, generator(), data) for s in (schemes.build("class_mean", prior_bias=True), schemes.build("class_mean"))
    )
    shares = torch.bincount(data.labels) / 400
    assert_close(found.bias - wanted.bias, shares.log(), rtol=1e-4, atol=1e-4)


def test_prior_needs_a_bias() -> None:
    with pytest.raises(SchemeError, match="needs a head with a bias"):
        PriorBias(Zeros(), probability=0.1)(HeadShape(8, 4, bias=False), generator())


# Target scale: against the diagnostics, which compute the same quantities on their own.


def measured(head: HeadWeights, data: FeatureSet, quantity: str) -> float:
    scores = logits(head, data.features)
    if quantity == "energy":
        errors = torch.nn.functional.one_hot(data.labels, scores.shape[1]) - torch.softmax(scores, 1)
        return errors.norm(dim=1).mean().item()
    name = {"initial_loss": "loss"}.get(quantity, quantity)
    return start_diagnostics(scores, data.labels, head.weight, data.features)[name]


@pytest.mark.parametrize(
    ("quantity", "targets"),
    [
        ("logit_std", [0.01, 1.0, 30.0]),
        ("initial_loss", [1.0, 1.3, 2.0]),
        ("energy", [0.6, 0.8]),
        ("feature_gradient", [0.01, 0.1, 0.5]),
    ],
)
def test_target_is_met(quantity: str, targets: list[float]) -> None:
    data = clusters()
    for target in targets:
        head = TargetScale(ClassMean(), quantity, target)(SHAPE, generator(), data)
        assert measured(head, data, quantity) == pytest.approx(target, rel=1e-4)
        assert head.notes[quantity] == pytest.approx(target, rel=1e-4)
        assert "warnings" not in head.notes


@pytest.mark.parametrize("quantity", ["initial_loss", "energy", "feature_gradient"])
def test_a_random_head_can_be_scaled_too_and_its_intended_std_follows(quantity: str) -> None:
    data = clusters()
    target = {"initial_loss": 1.6, "energy": 0.9, "feature_gradient": 0.3}[quantity]
    plain = VarianceScaling()(SHAPE, generator(), data)
    head = TargetScale(VarianceScaling(), quantity, target)(SHAPE, generator(), data)
    assert measured(head, data, quantity) == pytest.approx(target, rel=1e-3)
    assert head.std == pytest.approx(plain.std * head.notes["factor"])
    assert_close(head.weight, plain.weight * head.notes["factor"])


def test_an_unreachable_target_gives_the_nearest_with_a_warning() -> None:
    data = clusters()
    head = TargetScale(ClassMean(), "initial_loss", 1e-3)(SHAPE, generator(), data)
    scale = fit_scale(logits(ClassMean(calibrate=False)(SHAPE, generator(), data), data.features), data.labels)
    best = ClassMean(calibrate=False)(SHAPE, generator(), data)
    least = log_losses(logits(best, data.features) * scale, data.labels).mean().item()
    assert measured(head, data, "initial_loss") == pytest.approx(least, rel=1e-3)
    assert "nearest" in head.notes["warnings"][0]


def test_logit_std_from_moments_alone() -> None:
    data = clusters()
    head = TargetScale(Orthogonal(), "logit_std", 0.3)(SHAPE, generator(), Moments.of(data))
    assert logits(head, data.features).std(correction=0).item() == pytest.approx(0.3, rel=1e-5)
    weight, bias = torch.randn(4, 8, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    wanted = (data.features.double() @ weight.T + bias).std(correction=0).item()
    assert logit_std(weight, bias, Moments.of(data)) == pytest.approx(wanted)


def test_zeros_cannot_be_scaled() -> None:
    for quantity in ("logit_std", "initial_loss", "energy", "feature_gradient"):
        with pytest.raises(SchemeError, match="all logits of this head are equal"):
            TargetScale(Zeros(), quantity, 1.0)(SHAPE, generator(), clusters())


def test_reach_takes_the_smallest_scale() -> None:
    scale, value = reach(lambda s: s * math.exp(-s), 0.2, 1.0)
    assert scale == pytest.approx(0.25917110181907377)
    assert value == pytest.approx(0.2)
    scale, value = reach(lambda s: s * math.exp(-s), 3.0, 1.0)
    assert scale == pytest.approx(1.0, rel=1e-3)


# Temperature.


def test_given_temperature_divides() -> None:
    plain = Orthogonal()(SHAPE, generator())
    scheme = schemes.build("orthogonal", temperature=2.0)
    assert not scheme.needs_data
    assert_close(scheme(SHAPE, generator()).weight, plain.weight / 2)


def test_temperature_of_a_random_head_minimises_the_loss() -> None:
    data = clusters()
    head = Temperature(VarianceScaling(gain=5.0))(SHAPE, generator(), data)
    z = logits(head, data.features)
    losses = [log_losses(z * s, data.labels).mean().item() for s in (0.9, 1.0, 1.1)]
    assert losses[1] <= min(losses) + 1e-3


def test_temperature_of_a_computed_head_comes_from_other_examples() -> None:
    """Eighty examples in 200 features: class means that have seen an example are far too sure of it."""
    g = generator()
    labels = torch.arange(80) % 4
    data = FeatureSet(torch.randn(80, 200, generator=g) + 0.1 * torch.nn.functional.one_hot(labels, 200), labels, 4)
    shape = HeadShape(200, 4)
    inner = ClassMean(calibrate=False)
    on_training = fit_scale(logits(inner(shape, generator(), data), data.features), labels)
    head = Temperature(inner)(shape, generator(), data)
    assert 1 / head.notes["temperature"] < 0.5 * on_training


def test_temperature_with_nothing_to_hold_out() -> None:
    data = FeatureSet(torch.randn(4, 8), torch.arange(4), 4)
    with pytest.raises(SchemeError, match="nothing can be held out"):
        Temperature(ClassMean())(SHAPE, generator(), data)


def test_mixing_weights_against_a_grid() -> None:
    g = generator()
    y = torch.randint(3, (4000,), generator=g)
    one = torch.nn.functional.one_hot(y, 3).double()
    a, b = one + torch.randn(4000, 3, generator=g), one + torch.randn(4000, 3, generator=g)
    found = mixing_weights([a, b], y)

    def loss(p: float, q: float) -> float:
        return log_losses(p * a + q * b, y).mean().item()

    least = min(loss(p / 20, q / 20) for p in range(41) for q in range(41))
    assert loss(*found) < least + 1e-4
    assert loss(*found) < min(loss(found[0], 0), loss(0, found[1]))


def test_mixing_weights_are_pulled_to_equal_shares_with_the_strength_of_three_examples() -> None:
    g = generator(1)
    y = torch.randint(3, (12,), generator=g)
    heads = [torch.randn(12, 3, generator=g).double() for _ in range(2)]

    def objective(weights: Any) -> float:
        z = sum(a * head for a, head in zip(weights, heads, strict=True))
        loss = log_losses(z, y).mean() + 0.5 / 12 * (torch.logsumexp(z, 1) - z.mean(1)).mean()
        return float(loss) + 3.0 / (2 * 12) * sum((a - 0.5) ** 2 for a in weights)

    wanted = minimize(objective, [0.5, 0.5], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14}).x
    assert min(wanted) > 0
    assert mixing_weights(heads, y) == pytest.approx(list(wanted), abs=1e-4)


# Folded normalisation.


def test_standardise_is_the_scheme_on_standardised_features() -> None:
    data = clusters()
    x = data.features.double() * torch.logspace(-0.6, 0.6, 8) + 10.0
    data = replace(data, features=x.float())
    x = data.features.double()
    z = (x - x.mean(0)) / x.std(0, correction=0)
    for inner in (Orthogonal(), ClassMean(), Imprint()):
        head = Standardise(inner)(SHAPE, generator(), data)
        wanted = inner(SHAPE, generator(), replace(data, features=z.float()))
        assert_close(logits(head, x), logits(wanted, z), rtol=1e-3, atol=2e-3)
    found = Standardise(ClassMean(calibrate=False))(SHAPE, generator(), Moments.of(data))
    wanted = ClassMean(calibrate=False)(SHAPE, generator(), replace(data, features=z.float()))
    assert_close(logits(found, x), logits(wanted, z), rtol=1e-3, atol=2e-3)


def test_standardise_gives_constant_features_no_weight() -> None:
    data = clusters()
    data.features[:, 2] = 4.0
    head = Standardise(Orthogonal())(SHAPE, generator(), data)
    assert head.weight[:, 2].tolist() == [0.0] * 4
    assert head.weight.isfinite().all()


def test_normalise_orders_the_classes_as_on_normalised_features() -> None:
    data = clusters()
    head = Normalise(Imprint())(SHAPE, generator(), data)
    unit = torch.nn.functional.normalize(data.features, dim=1)
    wanted = Imprint()(SHAPE, generator(), replace(data, features=unit))
    assert logits(head, data.features).argmax(1).tolist() == logits(wanted, unit).argmax(1).tolist()
    length = data.features.norm(dim=1).mean()
    assert_close(logits(head, unit * length), logits(wanted, unit), rtol=1e-3, atol=1e-3)


# The registry's use of them.


@pytest.mark.parametrize("name", ["he", "orthogonal", "lsuv", "class_mean", "imprint", "lda", "ridge", "probe", "auto"])
@pytest.mark.parametrize(
    "options",
    [
        {"logit_std": 0.5},
        {"initial_loss": 1.38},
        {"energy": 0.85},
        {"feature_gradient": 0.05},
        {"temperature": True},
        {"standardise": True},
        {"normalise": True},
        {"prior_bias": True},
        {"standardise": True, "temperature": True, "prior_bias": True},
    ],
    ids=lambda o: "+".join(o),
)
def test_every_modifier_works_on_every_kind_of_scheme(name: str, options: dict[str, float]) -> None:
    data = clusters(120)
    head = schemes.build(name, **options)(SHAPE, generator(), data)
    assert head.weight.shape == (4, 8)
    assert head.weight.dtype == head.bias.dtype == torch.float32
    assert head.weight.isfinite().all()
    assert head.bias.isfinite().all()
    for quantity in {"logit_std", "initial_loss", "energy", "feature_gradient"} & set(options):
        if quantity in ("initial_loss", "energy") and name in ("he", "orthogonal", "lsuv"):
            continue  # no scale makes a random head better than chance; see the test above
        assert measured(head, data, quantity) == pytest.approx(options[quantity], rel=2e-3)


def test_modifiers_left_out() -> None:
    for name, modifier in MODIFIERS.items():
        assert modifier(Zeros(), None) == Zeros(), name
        assert modifier(Zeros(), False) == Zeros(), name


@pytest.mark.parametrize(
    "options",
    [{"temperature": -1.0}, {"logit_std": 0.0}, {"prior_bias": 1.5}, {"prior_bias": "gauss"}, {"standardise": "yes"}],
)
def test_bad_options(options: dict[str, float]) -> None:
    with pytest.raises(SchemeError):
        schemes.build("he", **options)
