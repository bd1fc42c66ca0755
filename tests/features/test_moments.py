from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import fields

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from headinit.errors import DataError
from headinit.features.extract import FeatureSet
from headinit.features.moments import Moments
from headinit.features.rotation import rotation_of


def classes(size: int = 1500, width: int = 12, num_classes: int = 5, mean: float = 0.0) -> FeatureSet:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(num_classes, (size,), generator=generator)
    mix = torch.randn(width, width, generator=generator)
    features = torch.randn(size, width, generator=generator) @ mix + labels[:, None] * 0.3 + mean
    return FeatureSet(features, labels, num_classes)


def assert_same(found: Moments, wanted: Moments, rtol: float = 1e-10) -> None:
    """Equal in every form that does not depend on the reference point."""
    assert torch.equal(found.counts, wanted.counts)
    assert len(found) == len(wanted)
    for name in ("means", "mean", "sums", "gram", "scatter", "within_scatter", "cross", "variance", "target_squares"):
        value = getattr(wanted, name)
        assert_close(getattr(found, name), value, rtol=rtol, atol=rtol * max(1.0, float(value.abs().max())), msg=name)


def test_against_numpy() -> None:
    data = classes()
    moments = Moments.of(data)
    x, y = data.features.double().numpy(), data.labels.numpy()
    assert moments.counts.tolist() == np.bincount(y).tolist()
    means = np.stack([x[y == k].mean(0) for k in range(5)])
    assert_close(moments.means, torch.from_numpy(means))
    assert_close(moments.gram, torch.from_numpy(x.T @ x))
    assert_close(moments.sums, torch.from_numpy(np.stack([x[y == k].sum(0) for k in range(5)])))
    assert_close(moments.scatter / len(x), torch.from_numpy(np.cov(x.T, bias=True)))
    centred = x - means[y]
    assert_close(moments.within_scatter, torch.from_numpy(centred.T @ centred))
    assert_close(moments.std, torch.from_numpy(x.std(0)))
    one_hot = np.eye(5)[y]
    assert_close(moments.cross, torch.from_numpy((one_hot - one_hot.mean(0)).T @ x))


@pytest.mark.parametrize("batch", [1, 7, 64, 600, 5000])
def test_any_batches_give_the_one_shot_moments(batch: int) -> None:
    data = classes()
    stream = zip(data.features.split(batch), data.labels.split(batch), strict=True)
    assert_same(Moments.from_stream(stream, data.num_classes), Moments.of(data))


@pytest.mark.parametrize("kind", ["classes", "targets"])
def test_merged_moments_equal_one_shot_moments(kind: str) -> None:
    data = classes(mean=50.0)
    labels = data.labels if kind == "classes" else torch.randn(len(data), 5, generator=torch.Generator().manual_seed(1))
    whole = Moments.zeros(12, 5, kind).update(data.features, labels)
    parts = [
        Moments.zeros(12, 5, kind).update(data.features[part], labels[part])
        for part in (slice(0, 3), slice(3, 900), slice(900, 1500))
    ]
    before = [getattr(parts[0], field.name) for field in fields(Moments) if field.name != "kind"]
    kept = [tensor.clone() for tensor in before]
    found = parts[0] + parts[1] + parts[2]
    assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True)), "merging must not change its parts"
    if kind == "classes":
        assert_same(found, whole)
    else:
        assert_close(found.cross, whole.cross)
        assert_close(found.target_squares, whole.target_squares)
    assert_close(found.scatter, whole.scatter)
    empty = Moments.zeros(12, 5, kind)
    assert_close((empty + whole).scatter, whole.scatter)
    assert_close((whole + empty).scatter, whole.scatter)
    assert_close((empty + whole).means, whole.means)


@pytest.mark.parametrize("mean", [1e4, -3e5, 1e6])
def test_large_means_do_not_cancel_the_covariance(mean: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(4000, 6, generator=generator, dtype=torch.float64) + mean).float()
    labels = torch.zeros(4000, dtype=torch.int64)
    wanted = torch.from_numpy(np.cov(x.double().numpy().T, bias=True))
    moments = Moments.from_stream(zip(x.split(100), labels.split(100), strict=True), 1)
    assert_close(moments.scatter / 4000, wanted, rtol=1e-9, atol=1e-9)
    assert_close(moments.std, x.double().std(0, correction=0), rtol=1e-9, atol=0)


def test_float16_features_are_summed_exactly() -> None:
    data = classes()
    half = data.features.half()
    assert_same(
        Moments.zeros(12, 5).update(half, data.labels), Moments.zeros(12, 5).update(half.double(), data.labels), 1e-12
    )


def test_negative_labels_and_tokens() -> None:
    data = classes(size=24)
    labels = data.labels.clone()
    labels[::3] = -100
    tokens = Moments.zeros(12, 5).update(data.features.view(4, 6, 12), labels.view(4, 6))
    assert_same(tokens, Moments.zeros(12, 5).update(data.features[labels >= 0], labels[labels >= 0]))
    stream = [(data.features.view(4, 6, 12), labels.view(4, 6))]
    assert_same(Moments.from_stream(stream, 5), tokens)


def test_affine_is_that_of_the_transformed_features() -> None:
    data = classes(mean=9.0)
    moments = Moments.of(data)
    offset, scale = moments.mean, moments.inverse_std
    transformed = FeatureSet((data.features.double() - offset) * scale, data.labels, 5)
    assert_same(moments.affine(offset, scale), Moments.of(transformed), 1e-9)


def test_constant_and_dead_features_are_not_blown_up() -> None:
    x = torch.randn(300, 4, generator=torch.Generator().manual_seed(0))
    x[:, 1] = 7.3
    x[:, 2] = 0.0
    x[:, 3] = 0.0
    x[::2, 3] = 1e-40
    inverse = Moments.zeros(4, 1).update(x, torch.zeros(300, dtype=torch.int64)).inverse_std
    assert inverse[1:].tolist() == [0.0, 0.0, 0.0]
    rare = Moments.zeros(2, 1).update(x[:, :1] * torch.tensor([1.0, 1e-4]), torch.zeros(300, dtype=torch.int64))
    assert (rare.inverse_std[1] / rare.inverse_std[0]).item() == pytest.approx(100.0)
    assert inverse[0].item() == pytest.approx(1 / x[:, 0].double().std(correction=0).item())


def test_absent_classes_have_the_overall_mean() -> None:
    moments = Moments.zeros(2, 3).update(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 2]))
    assert moments.absent == (1,)
    assert moments.means[1].tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("features", "labels", "message"),
    [
        (torch.tensor([[1.0, float("nan")]]), torch.tensor([0]), "NaN or infinite"),
        (torch.tensor([[1.0, float("inf")]]), torch.tensor([0]), "NaN or infinite"),
        (torch.zeros(1, 3), torch.tensor([0]), "width 2"),
        (torch.zeros(2, 2), torch.tensor([0]), "2 feature rows came with 1 labels"),
        (torch.zeros(1, 2), torch.tensor([3]), "out of range for 3 classes"),
        (torch.zeros(1, 2), torch.tensor([[1.0, 0.0, 0.0]]), "These moments are of classes"),
    ],
)
def test_hostile_input_is_refused_and_changes_nothing(
    features: torch.Tensor, labels: torch.Tensor, message: str
) -> None:
    moments = Moments.zeros(2, 3).update(torch.ones(4, 2), torch.tensor([0, 1, 2, 0]))
    before = moments.gram.clone()
    with pytest.raises(DataError, match=message):
        moments.update(features, labels)
    assert len(moments) == 4
    assert torch.equal(moments.gram, before)


def test_nothing_to_sum_or_to_merge() -> None:
    with pytest.raises(DataError, match="empty"):
        Moments.from_stream([], 3)
    with pytest.raises(DataError, match="Cannot merge"):
        Moments.zeros(2, 3).merge(Moments.zeros(2, 4))


@pytest.mark.parametrize("standardise", [False, True])
@pytest.mark.parametrize("size", [8, 400])
def test_rotation_has_the_eigenvalues_of_the_covariance(size: int, standardise: bool) -> None:
    data = classes(size=size, mean=5.0)
    moments = Moments.of(data)
    rotation = rotation_of(moments, data.features, standardise=standardise)
    x = data.features.double().numpy()
    x = (x - x.mean(0)) / (x.std(0) if standardise else 1.0)
    values = np.linalg.svd(x, compute_uv=False)[: rotation.rank] ** 2
    assert rotation.rank == min(size - 1, 12)
    assert_close(rotation.eigenvalues, torch.from_numpy(values))
    coordinates = rotation.apply(data.features)
    assert_close(coordinates.T @ coordinates, torch.diag(rotation.eigenvalues), rtol=1e-8, atol=1e-8 * values[0])
    weight = torch.randn(3, rotation.rank, dtype=torch.float64)
    w, b = rotation.unfold(weight, torch.zeros(3))
    assert_close(data.features.double() @ w.T + b, coordinates @ weight.T)


@pytest.mark.slow
def test_a_hundred_thousand_examples_in_under_300_mb() -> None:
    code = """
        import resource
        import torch
        from headinit.features.moments import Moments
        torch.set_num_threads(1)

        def stream():
            generator = torch.Generator().manual_seed(0)
            for _ in range(1000):
                yield torch.randn(100, 768, generator=generator), torch.randint(100, (100,), generator=generator)

        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        moments = Moments.from_stream(stream(), 100)
        moments.within_scatter, moments.means
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert len(moments) == 100_000
        print(before // 1024, (after - before) // 1024)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    _, grown = map(int, result.stdout.split())
    # The features alone are 307 MB; what is held is a few 768 x 768 matrices.
    assert grown < 300
