"""The linear protocol of Kornblith et al. (2019), solved by headinit and by scikit-learn.

Logistic regression at every l2 penalty of a grid, the one with the best validation accuracy fitted again on training
and validation examples together, judged on the test examples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split

from headinit.backbones.load import load_backbone
from headinit.data.catalog import load_data
from headinit.data.loading import Batches
from headinit.data.splits import Split
from headinit.features.extract import FeatureSet, extract_features
from headinit.schemes.linear_probe import Probe
from headinit.schemes.scheme import HeadShape

BOUND = 1e-5
GRID = np.logspace(-6, 5, 45)  # penalties of the protocol; scikit-learn's C is 1 / l2
Weights = tuple[np.ndarray, np.ndarray]


def solve_by_headinit(features: np.ndarray, labels: np.ndarray, l2: float) -> Weights:
    classes = int(labels.max()) + 1
    data = FeatureSet(torch.from_numpy(features), torch.from_numpy(labels), classes)
    scheme = Probe(inverse_strength=1 / l2, features="raw", tolerance=1e-13, max_iterations=20_000)
    head = scheme(HeadShape(features.shape[1], classes), torch.Generator(), data)
    return head.weight.double().numpy(), head.bias.double().numpy()  # type: ignore[union-attr]


def solve_by_scikit_learn(features: np.ndarray, labels: np.ndarray, l2: float) -> Weights:
    # Newton's method where the Hessian is small: at weak penalties scikit-learn's L-BFGS stops short of the optimum.
    solver = "newton-cholesky" if features.shape[1] < 100 else "lbfgs"
    model = LogisticRegression(C=1 / l2, solver=solver, tol=1e-8, max_iter=20_000)
    model.fit(features.astype(np.float64), labels)
    return model.coef_, model.intercept_


def objective(weights: Weights, features: np.ndarray, labels: np.ndarray, l2: float) -> float:
    """Sum of the cross-entropies plus l2 / 2 |W|^2, in float64."""
    scores = features.astype(np.float64) @ weights[0].T + weights[1]
    scores -= scores.max(1, keepdims=True)
    log_p = scores - np.log(np.exp(scores).sum(1, keepdims=True))
    return float(-log_p[np.arange(len(labels)), labels].sum() + l2 / 2 * np.square(weights[0]).sum())


def accuracy(weights: Weights, features: np.ndarray, labels: np.ndarray) -> float:
    return float(((features @ weights[0].T + weights[1]).argmax(1) == labels).mean())


def compare(parts: dict[str, tuple[np.ndarray, np.ndarray]], grid: np.ndarray) -> None:
    """The protocol by both; every objective, every accuracy and the choice must agree."""
    train, val, test = parts["train"], parts["val"], parts["test"]
    differences, ours, theirs = [], [], []
    for l2 in grid:
        mine, peer = solve_by_headinit(*train, l2), solve_by_scikit_learn(*train, l2)
        least = objective(peer, *train, l2)
        differences.append(abs(objective(mine, *train, l2) - least) / least)
        ours.append(accuracy(mine, *val))
        theirs.append(accuracy(peer, *val))
    print(f"largest relative difference of the objective over {len(grid)} penalties: {max(differences):.2e}")
    assert max(differences) <= BOUND
    assert ours == theirs
    assert len(set(ours)) > 3, "accuracies that hardly differ would choose the same penalty by chance"
    best = grid[int(np.argmax(ours))]
    both = tuple(np.concatenate(pair) for pair in zip(train, val, strict=True))
    mine, peer = solve_by_headinit(*both, best), solve_by_scikit_learn(*both, best)
    assert accuracy(mine, *test) == accuracy(peer, *test)
    print(f"l2 {best:.3g}, test accuracy {accuracy(mine, *test):.4f} by both")


def test_digits() -> None:
    """Pixels as features; every fourth value of Kornblith's grid from 1e-3 on."""
    pixels, labels = load_digits(return_X_y=True)
    features = (pixels / 16).astype(np.float32)
    rest, held, rest_labels, held_labels = train_test_split(features, labels, test_size=600, random_state=0)
    fitted, val, fitted_labels, val_labels = train_test_split(rest, rest_labels, test_size=300, random_state=0)
    parts = {"train": (fitted, fitted_labels), "val": (val, val_labels), "test": (held, held_labels)}
    compare(parts, GRID[12::4])


@pytest.mark.slow
def test_satellite_tiles(shared_data: Any) -> None:
    """Features of EfficientNet-Lite0; the grid from 0.1 on, where scikit-learn's L-BFGS reaches the optimum."""
    splits = load_data("imagefolder", root=str(shared_data / "eurosat_mini"), train_size=600, check_pictures=False)
    backbone = load_backbone("efficientnet_lite0", image_size=64)

    def read(split: Split) -> tuple[np.ndarray, np.ndarray]:
        found = extract_features(backbone.model, Batches(split, backbone.require_preprocessing(), 64))
        return found.features.numpy(), found.labels.numpy()

    fitted, held = read(splits.train), read(splits.validation)
    parts = {
        "train": fitted,
        "val": (held[0][::2], held[1][::2]),
        "test": (held[0][1::2], held[1][1::2]),
    }
    compare(parts, GRID[20::4])
