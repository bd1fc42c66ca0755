from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sklearn.cluster import KMeans
from sklearn.neighbors import NearestCentroid
from torch.testing import assert_close

from headinit.errors import SchemeError
from headinit.features.extract import FeatureSet
from headinit.features.moments import Moments
from headinit.schemes.calibration import fit_scale, log_losses
from headinit.schemes.prototypes import ClassMean, Imprint, MultiProxy, Source, category_mixture, cluster, pool_proxies
from headinit.schemes.scheme import HeadShape, HeadWeights, Scheme


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clusters(size: int = 200, width: int = 8, num_classes: int = 4, seed: int = 0) -> FeatureSet:
    g = generator(seed)
    labels = torch.arange(size) % num_classes
    centres = torch.randn(num_classes, width, generator=g)
    return FeatureSet(centres[labels] + torch.randn(size, width, generator=g) + 3.0, labels, num_classes)


def shape_of(data: FeatureSet, bias: bool = True) -> HeadShape:
    return HeadShape(data.features.shape[1], data.num_classes, bias)


def logits(head: HeadWeights, x: torch.Tensor) -> torch.Tensor:
    scores = x.double() @ head.weight.double().T
    return scores if head.bias is None else scores + head.bias.double()


def test_class_mean_predicts_as_nearest_centroid() -> None:
    data, fresh = clusters(), torch.randn(500, 8, generator=generator(7)) + 3.0
    oracle = NearestCentroid().fit(data.features.double().numpy(), data.labels.numpy())
    for given in (data, Moments.of(data)):
        head = ClassMean()(shape_of(data), generator(), given)
        assert logits(head, fresh).argmax(1).tolist() == oracle.predict(fresh.double().numpy()).tolist()


def test_class_mean_logits_are_half_the_squared_distances() -> None:
    data = clusters()
    head = ClassMean(calibrate=False)(shape_of(data), generator(), data)
    means = torch.stack([data.features[data.labels == k].double().mean(0) for k in range(4)])
    wanted = -0.5 * torch.cdist(data.features.double(), means).square()
    found = logits(head, data.features)
    assert_close(found - found[:, :1], wanted - wanted[:, :1], rtol=1e-5, atol=1e-4)


def test_class_mean_scale_is_that_of_explicit_refits() -> None:
    data = clusters(40)
    scores = torch.empty(40, 4, dtype=torch.float64)
    for i in range(40):
        rest = torch.arange(40) != i
        x, y = data.features[rest].double(), data.labels[rest]
        means = torch.stack([x[y == k].mean(0) for k in range(4)])
        scores[i] = -0.5 * (data.features[i].double() - means).square().sum(1)
    head = ClassMean()(shape_of(data), generator(), data)
    scale = fit_scale(scores, data.labels)
    assert head.notes["scale"] == pytest.approx(scale, rel=1e-5)
    assert head.notes["held_out_loss"] == pytest.approx(log_losses(scores * scale, data.labels).mean().item(), rel=1e-5)


def test_imprint_rows_are_normalised_means_of_normalised_features() -> None:
    data = clusters()
    head = Imprint(scale=1.0)(shape_of(data), generator(), data)
    unit = torch.nn.functional.normalize(data.features, dim=1)
    means = torch.stack([unit[data.labels == k].mean(0) for k in range(4)])
    assert_close(head.weight, torch.nn.functional.normalize(means, dim=1), rtol=1e-5, atol=1e-6)
    assert head.bias.tolist() == [0.0] * 4


def test_imprint_scale_is_that_of_explicit_refits() -> None:
    data = clusters(40)
    scores = torch.empty(40, 4, dtype=torch.float64)
    for i in range(40):
        rest = torch.arange(40) != i
        part = FeatureSet(data.features[rest], data.labels[rest], 4)
        scores[i] = logits(Imprint(scale=1.0)(shape_of(data), generator(), part), data.features[i : i + 1])[0]
    head = Imprint()(shape_of(data), generator(), data)
    assert head.notes["scale"] == pytest.approx(fit_scale(scores, data.labels), rel=1e-4)
    assert_close(head.weight.norm(dim=1), torch.full((4,), head.notes["scale"]), check_dtype=False)


def test_imprint_needs_single_examples() -> None:
    data = clusters()
    with pytest.raises(SchemeError, match="was given moments"):
        Imprint()(shape_of(data), generator(), Moments.of(data))


def test_kmeans_against_sklearn() -> None:
    g = generator()
    x = (torch.randn(3, 5, generator=g) * 6).repeat_interleave(60, 0) + torch.randn(180, 5, generator=g)
    centres, shares = cluster(x.double(), 3, g)
    oracle = KMeans(3, n_init=10, random_state=0).fit(x.double().numpy())
    found = centres[centres[:, 0].argsort()]
    wanted = torch.from_numpy(oracle.cluster_centers_)
    assert_close(found, wanted[wanted[:, 0].argsort()], rtol=1e-6, atol=1e-6)
    assert_close(shares, torch.full((3,), 1 / 3, dtype=torch.float64))


def xor(size: int = 400) -> FeatureSet:
    """Two classes of two clumps each, on a cross: no single mean per class tells them apart."""
    g = generator(2)
    corner = torch.arange(size) % 4
    centres = torch.tensor([[4.0, 4.0], [-4.0, -4.0], [4.0, -4.0], [-4.0, 4.0]])
    return FeatureSet(centres[corner] + torch.randn(size, 2, generator=g), corner // 2, 2)


@pytest.mark.parametrize("pooling", ["logsumexp", "max"])
def test_proxies_solve_what_one_mean_cannot(pooling: str) -> None:
    data = xor()
    head = MultiProxy(pooling=pooling)(HeadShape(2, 4), generator(), data)
    pooled = pool_proxies(logits(head, data.features), 2, pooling)
    assert (pooled.argmax(1) == data.labels).double().mean() > 0.99
    assert log_losses(pooled, data.labels).mean() < 0.1
    one = ClassMean()(shape_of(data), generator(), data)
    assert (logits(one, data.features).argmax(1) == data.labels).double().mean() < 0.8


def test_one_proxy_is_the_class_mean() -> None:
    data = clusters()
    found = MultiProxy(calibrate=False, pooling="max")(shape_of(data), generator(), data)
    wanted = ClassMean(calibrate=False)(shape_of(data), generator(), data)
    assert_close(found.weight, wanted.weight, rtol=1e-5, atol=1e-6)
    assert_close(found.bias, wanted.bias, rtol=1e-4, atol=1e-4)


def test_repeated_proxies_share_their_weight() -> None:
    data = FeatureSet(torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 0.2]]), torch.tensor([0, 1, 1]), 2)
    three = MultiProxy(calibrate=False)(HeadShape(2, 6), generator(), data)
    pooled = pool_proxies(logits(three, data.features), 3)
    assert three.weight.isfinite().all()
    assert pooled.argmax(1).tolist() == [0, 1, 1]
    row = logits(three, data.features)[0, :3].logsumexp(0)
    single = MultiProxy(calibrate=False)(HeadShape(2, 2), generator(), data)
    assert_close(row, logits(single, data.features)[0, 0], rtol=1e-5, atol=1e-5)


def test_proxies_need_a_multiple_of_the_classes() -> None:
    with pytest.raises(SchemeError, match="same number of rows for each of 2 classes, and the head has 5"):
        MultiProxy()(HeadShape(2, 5), generator(), xor())


def test_source_rows_are_mixtures_by_the_old_predictions() -> None:
    data = clusters()
    old_weight, old_bias = torch.randn(20, 8, generator=generator(4)), torch.randn(20, generator=generator(5))
    head = Source(calibrate=False).with_source(old_weight, old_bias)(shape_of(data), generator(), data)
    p = torch.softmax(data.features @ old_weight.T + old_bias, dim=1)
    mixture = torch.stack([p[data.labels == k].mean(0) for k in range(4)])
    assert_close(head.weight, mixture @ old_weight, rtol=1e-4, atol=1e-5)
    assert_close(head.bias, mixture @ old_bias, rtol=1e-4, atol=1e-5)
    assert_close(
        category_mixture(data.features @ old_weight.T + old_bias, data.labels, 4), mixture, rtol=1e-4, atol=1e-6
    )


def test_source_scale_is_that_of_explicit_refits() -> None:
    data = clusters(40)
    bound = Source(calibrate=False).with_source(torch.randn(20, 8, generator=generator(4)), None)
    scores = torch.empty(40, 4, dtype=torch.float64)
    for i in range(40):
        rest = torch.arange(40) != i
        part = FeatureSet(data.features[rest], data.labels[rest], 4)
        scores[i] = logits(bound(shape_of(data), generator(), part), data.features[i : i + 1])[0]
    head = replace(bound, options=Source())(shape_of(data), generator(), data)
    assert head.notes["scale"] == pytest.approx(fit_scale(scores, data.labels), rel=1e-4)


def test_source_that_knows_the_classes_is_a_good_start() -> None:
    """The old classifier has each new class split in two."""
    data = clusters(400)
    fine = torch.stack([data.features[data.labels == k].mean(0) for k in range(4)]).repeat_interleave(2, 0) - 3.0
    head = Source().with_source(fine, -0.5 * fine.square().sum(1) - fine.sum(1) * 3.0)(
        shape_of(data), generator(), data
    )
    best = ClassMean()(shape_of(data), generator(), data)
    accuracy = [(logits(h, data.features).argmax(1) == data.labels).double().mean().item() for h in (head, best)]
    assert accuracy[0] > accuracy[1] - 0.05


def test_source_without_a_source_or_with_a_wrong_one() -> None:
    data = clusters()
    with pytest.raises(SchemeError, match="there is none"):
        Source()(shape_of(data), generator(), data)
    with pytest.raises(SchemeError, match="does not read the 8 features"):
        Source().with_source(torch.zeros(5, 9), None)(shape_of(data), generator(), data)


SCHEMES = [ClassMean(), Imprint(), Source().with_source(torch.eye(8).repeat(2, 2)[:6, :8], None), MultiProxy()]


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: type(s).__name__)
@pytest.mark.parametrize("case", ["constant", "all_constant", "duplicated", "float16", "one_each", "absent", "zero"])
@pytest.mark.parametrize("bias", [True, False])
def test_hostile_data_gives_a_finite_head(scheme: Scheme, case: str, bias: bool) -> None:
    data = clusters(120)
    x, y = data.features.clone(), data.labels.clone()
    if case == "constant":
        x[:, 3] = 5.0
    elif case == "all_constant":
        x[:] = 1.0
    elif case == "duplicated":
        x[:, 4:] = x[:, :4]
    elif case == "float16":
        x = x.half()
    elif case == "one_each":
        x, y = x[:4], torch.arange(4)
    elif case == "absent":
        y[y == 2] = 1
    elif case == "zero":
        x[:] = 0.0
    hostile = replace(data, features=x, labels=y)
    shape = shape_of(hostile, bias)
    if isinstance(scheme, MultiProxy):
        if not bias:
            with pytest.raises(SchemeError, match="needs a head with a bias"):
                scheme(shape, generator(), hostile)
            return
        shape = HeadShape(8, 8)
    head = scheme(shape, generator(), hostile)
    assert head.weight.shape == (shape.out_features, 8)
    assert head.weight.isfinite().all()
    assert (head.bias is None) == (not bias)
    assert head.bias is None or head.bias.isfinite().all()
    if case == "absent":
        assert head.notes["absent_classes"] == [2]
        scores = logits(head, x)
        scores = pool_proxies(scores, 2) if isinstance(scheme, MultiProxy) else scores
        assert 2 not in scores.argmax(1).tolist()
        strict = {"missing": "error"} if hasattr(scheme, "missing") else {"options": Source(missing="error")}
        with pytest.raises(SchemeError, match="for class 2: 0 of 120"):
            replace(scheme, **strict)(shape, generator(), hostile)


@pytest.mark.parametrize("make", [lambda: Imprint(scale=0.0), lambda: MultiProxy(pooling="mean")])
def test_bad_options(make) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(SchemeError):
        make()
