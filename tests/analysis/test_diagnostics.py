"""Starts and drifts against autograd, float64 loops and the Gram-matrix form of CKA."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from headinit.analysis.diagnostics import (
    feature_drift,
    feature_gradient_of,
    head_spectrum,
    linear_feature_gradient,
    logit_histogram,
    start_diagnostics,
)
from headinit.errors import DataError


@pytest.mark.parametrize(("classes", "width"), [(2, 5), (10, 3), (3, 64), (50, 50)])
def test_closed_form_gradient_is_autograds(classes: int, width: int) -> None:
    head = nn.Linear(width, classes).double()
    features, labels = torch.randn(30, width, dtype=torch.float64), torch.randint(0, classes, (30,))
    closed = linear_feature_gradient(head(features), labels, head.weight)
    looped = []
    for x, y in zip(features, labels, strict=True):
        x = x.clone().requires_grad_(True)
        nn.functional.cross_entropy(head(x)[None], y[None]).backward()
        looped.append(x.grad.norm().item())
    torch.testing.assert_close(closed, torch.tensor(looped, dtype=torch.float64), rtol=1e-10, atol=1e-12)
    head.zero_grad()
    torch.testing.assert_close(feature_gradient_of(head, features, labels), closed, rtol=1e-10, atol=1e-12)
    assert all(parameter.grad is None for parameter in head.parameters())


def test_gradient_of_any_head() -> None:
    head = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.GELU(), nn.Linear(8, 3))
    features, labels = torch.randn(4, 3, 4), torch.tensor([0, 1, 2, 0])
    with torch.no_grad():
        gradients = feature_gradient_of(head, features, labels)
    numerical = torch.zeros(4, 3, 4, dtype=torch.float64)
    head, features = head.double(), features.double()
    for index in np.ndindex(4, 3, 4):
        loss = []
        for sign in (1, -1):
            moved = features.clone()
            moved[index] += sign * 1e-6
            loss.append(nn.functional.cross_entropy(head(moved), labels, reduction="sum").item())
        numerical[index] = (loss[0] - loss[1]) / 2e-6
    torch.testing.assert_close(gradients, numerical.flatten(1).norm(dim=1), rtol=1e-4, atol=1e-5)
    assert feature_gradient_of(lambda x: torch.zeros(4, 3, requires_grad=True), features, labels).tolist() == [0.0] * 4


def test_start_of_a_zero_head() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    start = start_diagnostics(torch.zeros(4, 4), labels, torch.zeros(4, 9), torch.ones(4, 9))
    assert start["loss"] == pytest.approx(math.log(4), abs=1e-15)
    assert start["chance_loss"] == math.log(4)
    assert start["prior_entropy"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)), abs=1e-15)
    assert (start["accuracy"], start["majority"], start["logit_std"]) == (0.75, 0.75, 0.0)
    assert (start["feature_gradient"], start["feature_norm"]) == (0.0, 3.0)
    assert [text.split(":")[0] for text in start["warnings"]] == ["dead start"]


def test_start_agrees_with_float64_loops() -> None:
    features, weight = torch.randn(50, 16), torch.randn(5, 16) * 0.3
    labels = torch.randint(0, 5, (50,))
    logits = features @ weight.T
    start = start_diagnostics(logits, labels, weight)
    losses, norms = [], []
    for row, y in zip(logits.double().numpy(), labels.tolist(), strict=True):
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        losses.append(-np.log(p[y]))
        norms.append(np.linalg.norm((p - np.eye(5)[y]) @ weight.double().numpy()))
    assert start["loss"] == pytest.approx(np.mean(losses), rel=1e-12)
    assert start["feature_gradient"] == pytest.approx(np.mean(norms), rel=1e-10)
    assert start["logit_std"] == pytest.approx(logits.double().numpy().std(), rel=1e-12)
    assert start["feature_norm"] is None
    assert start["warnings"] == []


def test_warnings_name_exploding_and_saturated_starts() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (100,), generator=generator)
    logits = torch.randn(100, 4, generator=generator) * 100
    kinds = [text.split(":")[0] for text in start_diagnostics(logits, labels)["warnings"]]
    assert kinds == ["exploding start", "saturated softmax"]
    solved = torch.eye(4)[labels] * 100  # sure, and right: nothing to warn about
    assert start_diagnostics(solved, labels)["warnings"] == []
    broken = start_diagnostics(torch.full((2, 2), float("nan")), torch.tensor([0, 1]))
    assert "exploding start" in broken["warnings"][0]


def test_starts_of_other_tasks_agree_with_scikit_learn() -> None:
    from sklearn.metrics import log_loss

    outputs, labels = torch.randn(60, 3).double(), (torch.rand(60, 3) > 0.7).double()
    start = start_diagnostics(outputs, labels, task="multi_label")
    losses = [log_loss(labels[:, k], torch.sigmoid(outputs[:, k]).numpy()) for k in range(3)]
    assert start["loss"] == pytest.approx(np.mean(losses), rel=1e-9)
    assert start["chance_loss"] == math.log(2)
    shares = labels.mean(0).numpy()
    entropies = [log_loss(labels[:, k], np.full(60, shares[k])) for k in range(3)]
    assert start["prior_entropy"] == pytest.approx(np.mean(entropies), rel=1e-9)
    assert start["majority"] == pytest.approx(np.maximum(shares, 1 - shares).mean())
    assert start["accuracy"] == pytest.approx(((outputs > 0) == (labels > 0)).double().mean().item())

    targets = torch.randn(60, 2).double() * 7 + 100
    start = start_diagnostics(outputs[:, :2], targets, task="regression")
    assert start["loss"] == pytest.approx(((outputs[:, :2] - targets) ** 2).mean().item())
    assert start["chance_loss"] == pytest.approx(targets.numpy().var(axis=0).mean())
    assert (start["accuracy"], start["majority"], start["prior_entropy"]) == (None, None, None)
    assert "times the variance of the targets" in start["warnings"][0]

    logits, tags = torch.randn(4, 5, 3), torch.randint(0, 3, (4, 5))
    tags[:, 3:] = -100
    wanted = start_diagnostics(logits[:, :3].flatten(0, 1), tags[:, :3].flatten())
    assert start_diagnostics(logits, tags, task="token") == wanted


@pytest.mark.parametrize("task", ["multi_label", "regression"])
def test_targets_of_another_shape_are_refused(task: str) -> None:
    with pytest.raises(DataError, match=r"outputs and targets \(N, K\)"):
        start_diagnostics(torch.zeros(4, 3), torch.zeros(4, 2), task=task)


def test_gradient_of_another_loss() -> None:
    features, targets = torch.randn(6, 3).double(), torch.randn(6, 1).double()
    head = nn.Linear(3, 1).double()
    found = feature_gradient_of(head, features, targets, lambda z, y: (z - y).square().sum())
    wanted = (2 * (head(features) - targets) * head.weight).norm(dim=1)
    torch.testing.assert_close(found, wanted.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reduced_precision_is_summed_in_float64(dtype: torch.dtype) -> None:
    logits, labels = (torch.randn(20000, 3) * 3).to(dtype), torch.randint(0, 3, (20000,))
    wanted = nn.functional.cross_entropy(logits.double(), labels).item()
    assert start_diagnostics(logits, labels, torch.randn(3, 8).to(dtype))["loss"] == pytest.approx(wanted, rel=1e-12)


def test_bad_shapes_are_named() -> None:
    good, labels = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(DataError, match=r"\(4, 3\) and \(3,\)"):
        start_diagnostics(good, labels[:3])
    with pytest.raises(DataError, match=r"0\.\.2"):
        start_diagnostics(good, labels + 3)
    with pytest.raises(DataError, match="3 logits"):
        start_diagnostics(good, labels, torch.zeros(2, 5))
    with pytest.raises(DataError, match="N = 4"):
        start_diagnostics(good, labels, features=torch.zeros(5, 5))


def cka_of_gram_matrices(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L)) with the centring matrix written out."""
    n = len(x)
    centring = np.eye(n) - np.ones((n, n)) / n
    first, second = centring @ x @ x.T @ centring, centring @ y @ y.T @ centring
    return float(np.trace(first @ second) / math.sqrt(np.trace(first @ first) * np.trace(second @ second)))


@pytest.mark.parametrize(("examples", "before", "after"), [(40, 8, 8), (10, 64, 64), (30, 5, 12), (3, 2, 900)])
def test_cka_agrees_with_the_gram_form(examples: int, before: int, after: int) -> None:
    x = torch.randn(examples, before) + 5
    y = torch.randn(examples, after) + x[:, :1]
    drift = feature_drift(x, y)
    assert drift["linear_cka"] == pytest.approx(cka_of_gram_matrices(x.double().numpy(), y.double().numpy()), rel=1e-9)
    if before == after:
        wanted = np.linalg.norm(y.double() - x.double()) / np.linalg.norm(x.double())
        assert drift["relative_frobenius"] == pytest.approx(wanted, rel=1e-12)
    else:
        assert drift["relative_frobenius"] is None


def test_drift_without_change_or_variance() -> None:
    x = torch.randn(20, 4)
    rotation = torch.linalg.qr(torch.randn(4, 4))[0]
    same = feature_drift(x, x)
    assert same["relative_frobenius"] == 0.0
    assert same["linear_cka"] == pytest.approx(1.0)
    assert feature_drift(x, 3 * x @ rotation + 1)["linear_cka"] == pytest.approx(1.0, abs=1e-6)
    constant = torch.ones(20, 4)
    assert feature_drift(constant, constant) == {"relative_frobenius": 0.0, "linear_cka": 1.0}
    assert feature_drift(constant, x)["linear_cka"] == 0.0
    assert feature_drift(torch.zeros(20, 4), x)["relative_frobenius"] == math.inf
    with pytest.raises(DataError, match="finite"):
        feature_drift(x, x / 0)
    with pytest.raises(DataError, match="same examples"):
        feature_drift(x, x[:3])


def test_histogram_counts_every_finite_logit() -> None:
    logits = torch.randn(100, 3).half()
    histogram = logit_histogram(logits, bins=20)
    counts, edges = np.histogram(logits.double().numpy(), bins=20)
    assert histogram["counts"] == counts.tolist()
    np.testing.assert_allclose(histogram["edges"], edges)
    assert sum(logit_histogram(torch.zeros(4, 2), bins=5)["counts"]) == 8
    assert sum(logit_histogram(torch.tensor([[0.0, float("nan")]]))["counts"]) == 1
    with pytest.raises(DataError, match="finite"):
        logit_histogram(torch.tensor([[float("nan")]]))


def test_spectrum_agrees_with_eigenvalues() -> None:
    weight = torch.randn(4, 9)
    wanted = np.sqrt(np.linalg.eigvalsh((weight @ weight.T).double().numpy())[::-1])
    np.testing.assert_allclose(head_spectrum(weight), wanted, rtol=1e-5)
