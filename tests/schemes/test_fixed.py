from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from headinit import schemes
from headinit.errors import SchemeError
from headinit.schemes.fixed import orthonormal_columns
from headinit.schemes.scheme import HeadShape


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sphere_coordinate(n: int, radius: float = 1.0):
    """One coordinate of a uniform point on a sphere in n dimensions: Beta((n-1)/2, (n-1)/2) on (-1, 1)."""
    half = (n - 1) / 2
    return stats.beta(half, half, loc=-radius, scale=2 * radius)


def test_zeros() -> None:
    head = schemes.build("zeros", bias=-1.5)(HeadShape(7, 3), generator())
    assert head.weight.shape == (3, 7)
    assert not head.weight.any()
    torch.testing.assert_close(head.bias, torch.full((3,), -1.5))
    assert head.std == 0.0
    assert not schemes.build("zeros").breaks_symmetry
    assert schemes.build("orthogonal").breaks_symmetry


@pytest.mark.parametrize(("features", "classes"), [(4096, 64), (64, 4096), (10, 10), (5, 1), (1, 5), (1, 1)])
def test_orthogonal_frame(features: int, classes: int) -> None:
    head = schemes.build("orthogonal", gain=2.0)(HeadShape(features, classes), generator())
    weight = head.weight.double()
    assert weight.shape == (classes, features)
    gram = weight @ weight.T if classes <= features else weight.T @ weight
    torch.testing.assert_close(gram, 4.0 * torch.eye(min(classes, features), dtype=torch.float64), atol=1e-5, rtol=0)
    assert weight.square().mean().sqrt().item() == pytest.approx(head.std, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "features", "classes"), [("orthogonal", 4096, 64), ("orthogonal", 64, 4096), ("etf", 4096, 64)]
)
def test_entries_are_coordinates_of_uniform_directions(name: str, features: int, classes: int) -> None:
    weight = schemes.build(name)(HeadShape(features, classes), generator()).weight.flatten().numpy()
    assert stats.kstest(weight, sphere_coordinate(max(features, classes)).cdf).pvalue > 1e-3
    swapped = sphere_coordinate(min(features, classes))
    assert stats.kstest(weight, swapped.cdf).pvalue < 1e-12


def test_orthogonal_is_uniform_over_the_group() -> None:
    """Without the sign of R's diagonal the first column has a positive (or negative) first entry throughout."""
    frames = torch.stack([orthonormal_columns(3, 3, generator(s)) for s in range(2000)])
    for row in range(3):
        for column in range(3):
            entries = frames[:, row, column].numpy()
            assert stats.kstest(entries, sphere_coordinate(3).cdf).pvalue > 1e-4
    # Haar on O(3): the trace has mean 0 and variance 1, both determinants are as likely.
    trace = frames.diagonal(dim1=1, dim2=2).sum(1)
    assert abs(trace.mean().item()) < 0.1
    assert trace.var().item() == pytest.approx(1.0, abs=0.15)
    assert 900 < (torch.linalg.det(frames) > 0).sum().item() < 1100


@pytest.mark.parametrize(("features", "classes"), [(4096, 64), (64, 64), (9, 10), (1, 2), (2, 3)])
def test_simplex_gram_matrix(features: int, classes: int) -> None:
    head = schemes.build("etf")(HeadShape(features, classes), generator())
    weight = head.weight.double()
    # K/(K-1) (I - 11'/K): ones on the diagonal, -1/(K-1) elsewhere.
    expected = torch.full((classes, classes), -1.0 / (classes - 1), dtype=torch.float64).fill_diagonal_(1.0)
    torch.testing.assert_close(weight @ weight.T, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(weight.sum(0), torch.zeros(features, dtype=torch.float64), atol=1e-5, rtol=0)
    assert head.std == pytest.approx(1 / math.sqrt(features))


def test_simplex_direction_is_uniform() -> None:
    rows = torch.cat([schemes.build("etf")(HeadShape(4, 3), generator(s)).weight[0] for s in range(1500)])
    assert stats.kstest(rows.numpy(), sphere_coordinate(4).cdf).pvalue > 1e-4


def test_simplex_scale_and_limits() -> None:
    weight = schemes.build("etf", scale=3.0)(HeadShape(16, 4), generator()).weight
    torch.testing.assert_close(weight.norm(dim=1), torch.full((4,), 3.0))
    with pytest.raises(SchemeError, match="at least 2"):
        schemes.build("etf")(HeadShape(16, 1), generator())
    with pytest.raises(SchemeError, match=r"10 classes on 8 features: .* at least 9"):
        schemes.build("etf")(HeadShape(8, 10), generator())


def test_library_without_a_model_is_torchs_linear() -> None:
    head = schemes.build("library")(HeadShape(4096, 64), generator())
    assert stats.kstest(head.weight.flatten().numpy(), stats.uniform(-1 / 64, 2 / 64).cdf).pvalue > 1e-3
    assert head.bias.abs().max().item() <= 1 / 64
    assert head.std == head.bias_std == pytest.approx(1 / math.sqrt(3 * 4096))
    bare = schemes.build("library")(HeadShape(4, 2, bias=False), generator())
    assert bare.bias is None
    assert bare.bias_std == 0.0


@pytest.mark.parametrize(
    ("name", "options"),
    [("orthogonal", {"gain": -1.0}), ("etf", {"scale": math.nan}), ("zeros", {"bias": math.inf})],
)
def test_numbers_out_of_range_are_refused(name: str, options: dict) -> None:
    with pytest.raises(SchemeError, match=f"init={name}: Option"):
        schemes.build(name, **options)
