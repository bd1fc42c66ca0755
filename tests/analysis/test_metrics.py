"""Scores against scikit-learn, scipy and seqeval."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import scipy.stats
import torch
from sklearn import metrics as reference

from headinit.analysis.metrics import (
    HIGHER_IS_BETTER,
    classification_metrics,
    confusion_matrix,
    find_entities,
    metrics_for,
    multi_label_metrics,
    primary_metric,
    regression_metrics,
    token_metrics,
)
from headinit.errors import ConfigError, DataError, TrainingError


def draw(classes: int, present: int, examples: int = 300, scale: float = 2.0, dtype: torch.dtype = torch.float32):
    labels = torch.randint(0, present, (examples,))
    logits = torch.randn(examples, classes) * scale
    logits[torch.arange(examples), labels] += scale / 2
    return logits.to(dtype), labels


def expected_calibration_error(probabilities: np.ndarray, labels: np.ndarray, bins: int = 15) -> float:
    """Guo et al. 2017, one bin after another."""
    confidence, correct = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    total = 0.0
    for k in range(bins):
        inside = (confidence > k / bins) & (confidence <= (k + 1) / bins)
        if inside.any():
            total += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean())
    return total


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize(("classes", "present"), [(2, 2), (2, 1), (5, 5), (7, 3), (40, 40)])
def test_classification_agrees_with_scikit_learn(classes: int, present: int, dtype: torch.dtype) -> None:
    logits, labels = draw(classes, present, dtype=dtype)
    scores = classification_metrics(logits, labels)
    probabilities = torch.softmax(logits.double(), dim=1).numpy()
    truth, predictions = labels.numpy(), logits.double().numpy().argmax(axis=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wanted = {
            "accuracy": reference.accuracy_score(truth, predictions),
            "balanced_accuracy": reference.balanced_accuracy_score(truth, predictions),
            "macro_f1": reference.f1_score(truth, predictions, average="macro"),
            "mcc": reference.matthews_corrcoef(truth, predictions),
            "nll": reference.log_loss(truth, probabilities, labels=np.arange(classes)),
            "ece": expected_calibration_error(probabilities, truth),
        }
        if classes == 2:
            wanted["f1"] = reference.f1_score(truth, predictions, zero_division=0)
    assert scores.keys() == wanted.keys()
    for name, value in wanted.items():
        assert scores[name] == pytest.approx(value, abs=1e-12), name


def test_agrees_with_torchmetrics_where_it_follows_the_same_definitions() -> None:
    from torchmetrics.functional import classification as peer

    logits, labels = draw(6, 6, dtype=torch.float64)
    scores, probabilities = classification_metrics(logits, labels), logits.softmax(dim=1)
    for name, value in {
        "accuracy": peer.multiclass_accuracy(probabilities, labels, 6, average="micro"),
        "balanced_accuracy": peer.multiclass_recall(probabilities, labels, 6, average="macro"),
        "macro_f1": peer.multiclass_f1_score(probabilities, labels, 6, average="macro"),
        "mcc": peer.multiclass_matthews_corrcoef(probabilities, labels, 6),
        "ece": peer.multiclass_calibration_error(probabilities, labels, 6, n_bins=15),
    }.items():
        assert scores[name] == pytest.approx(float(value), abs=1e-6), name


def test_logits_inside_zero_and_one_are_not_taken_for_probabilities() -> None:
    logits, labels = torch.tensor([[0.9, 0.1], [0.2, 0.8]]), torch.tensor([0, 1])
    wanted = -np.mean([math.log(1 / (1 + math.exp(-0.8))), math.log(1 / (1 + math.exp(-0.6)))])
    assert classification_metrics(logits, labels)["nll"] == pytest.approx(wanted, rel=1e-6)


def test_extreme_logits_stay_finite() -> None:
    scores = classification_metrics(torch.tensor([[6e4, -6e4], [-6e4, 6e4]], dtype=torch.float16), torch.tensor([0, 0]))
    assert scores["nll"] == pytest.approx(60000.0)  # 6e4 rounds to 59,968 or 60,000 in float16; the sum is exact here
    assert all(math.isfinite(value) for value in scores.values())
    assert scores["ece"] == pytest.approx(0.5)
    wide = torch.tensor([[3e38, -3e38]])
    assert math.isfinite(classification_metrics(wide, torch.tensor([1]))["nll"])


def test_a_confidence_of_one_falls_into_the_last_bin() -> None:
    logits = torch.tensor([[1e4, 0.0], [1e4, 0.0], [1e4, 0.0], [math.log(97.0), math.log(3.0)]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 0])
    assert classification_metrics(logits, labels)["ece"] == pytest.approx(abs(0.75 - (3 + 0.97) / 4), abs=1e-12)


def test_a_tie_is_the_first_class() -> None:
    scores = classification_metrics(torch.zeros(4, 3), torch.tensor([0, 0, 1, 2]))
    assert scores["accuracy"] == 0.5
    assert scores["nll"] == pytest.approx(math.log(3), abs=1e-15)
    assert scores["mcc"] == 0.0


@pytest.mark.parametrize(
    ("logits", "labels", "error", "words"),
    [
        (torch.tensor([[0.0, float("nan")], [0.0, 1.0]]), [0, 1], TrainingError, "1 of 2 examples"),
        (torch.tensor([[0.0, 1.0], [float("inf"), 1.0]]), [0, 1], TrainingError, "number 1"),
        (torch.zeros(2, 2), [0, 2], DataError, "Label 2 of example 1"),
        (torch.zeros(2, 2), [-100, 0], DataError, "outside 0..1"),
        (torch.zeros(2, 2), [0, 1, 1], DataError, r"\(2, 2\) and \(3,\)"),
        (torch.zeros(2), [0, 1], DataError, "logits"),
        (torch.zeros(0, 2), [], DataError, "0 examples"),
        (torch.zeros(2, 2), [0.0, 1.0], DataError, "whole numbers"),
    ],
)
def test_bad_input_is_named(logits: torch.Tensor, labels: list, error: type[Exception], words: str) -> None:
    targets = torch.tensor(labels) if labels else torch.zeros(0, dtype=torch.int64)
    with pytest.raises(error, match=words):
        classification_metrics(logits, targets)


def test_confusion_matrix_agrees_with_scikit_learn() -> None:
    logits, labels = draw(5, 4)
    counts = confusion_matrix(logits.argmax(dim=1), labels, 5)
    wanted = reference.confusion_matrix(labels, logits.argmax(dim=1), labels=range(5))
    np.testing.assert_array_equal(counts.numpy(), wanted)


@pytest.mark.parametrize("empty", [False, True])
def test_multi_label_agrees_with_scikit_learn(empty: bool) -> None:
    logits = (torch.randn(200, 6) * 3).round()  # ties
    labels = (torch.rand(200, 6) < 0.3).long()
    if empty:
        labels[:, 2] = 0
        logits[:, 2] = -1
    scores = multi_label_metrics(logits, labels)
    truth, predictions = labels.numpy(), (logits > 0).long().numpy()
    columns = [k for k in range(6) if truth[:, k].any()]
    precision = [reference.average_precision_score(truth[:, k], logits[:, k].numpy()) for k in columns]
    assert scores["map"] == pytest.approx(np.mean(precision), abs=1e-6)
    for average in ("micro", "macro"):
        wanted = reference.f1_score(truth, predictions, average=average, zero_division=0)
        assert scores[f"{average}_f1"] == pytest.approx(wanted, abs=1e-6)
    assert scores["accuracy"] == pytest.approx((truth == predictions).mean())


def test_average_precision_keeps_the_order_of_saturated_logits() -> None:
    logits, labels = torch.tensor([[60.0], [50.0], [40.0]]), torch.tensor([[0], [1], [0]])
    assert multi_label_metrics(logits, labels)["map"] == 0.5


def test_multi_label_without_positives_is_zero_and_bad_targets_are_refused() -> None:
    assert multi_label_metrics(torch.randn(5, 2), torch.zeros(5, 2))["map"] == 0.0
    with pytest.raises(DataError, match="0 or 1"):
        multi_label_metrics(torch.zeros(2, 2), torch.tensor([[0, 2], [1, 0]]))
    with pytest.raises(DataError, match="same shape"):
        multi_label_metrics(torch.zeros(2, 2), torch.tensor([0, 1]))


@pytest.mark.parametrize("shape", [(50,), (50, 1), (50, 3)])
def test_regression_agrees_with_scikit_learn_and_scipy(shape: tuple[int, ...]) -> None:
    targets = torch.randn(shape, dtype=torch.float64)
    predictions = (targets + torch.randn(shape, dtype=torch.float64)).mul(2).round()  # ties
    scores = regression_metrics(predictions, targets)
    f, y = predictions.reshape(50, -1).numpy(), targets.reshape(50, -1).numpy()
    wanted = {
        "mae": reference.mean_absolute_error(y, f),
        "mse": reference.mean_squared_error(y, f),
        "r2": reference.r2_score(y, f),
        "pearson": np.mean([scipy.stats.pearsonr(f[:, k], y[:, k]).statistic for k in range(f.shape[1])]),
        "spearman": np.mean([scipy.stats.spearmanr(f[:, k], y[:, k]).statistic for k in range(f.shape[1])]),
    }
    for name, value in wanted.items():
        assert scores[name] == pytest.approx(value, abs=1e-12), name


def test_regression_of_constants_is_defined() -> None:
    constant = regression_metrics(torch.zeros(4), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert constant["pearson"] == constant["spearman"] == 0.0
    assert regression_metrics(torch.ones(3), torch.ones(3))["r2"] == 1.0
    assert regression_metrics(torch.zeros(3), torch.ones(3))["r2"] == 0.0
    assert regression_metrics(torch.tensor([2.0]), torch.tensor([1.0]))["mae"] == 1.0
    with pytest.raises(TrainingError):
        regression_metrics(torch.tensor([float("nan")]), torch.tensor([1.0]))
    with pytest.raises(DataError):
        regression_metrics(torch.tensor([1.0]), torch.tensor([float("nan")]))


TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")


def test_entity_scores_agree_with_seqeval() -> None:
    seqeval = pytest.importorskip("seqeval.metrics")
    generator = np.random.default_rng(0)
    truth = [[TAGS[k] for k in generator.integers(0, 5, 12)] for _ in range(40)]
    found = [[t if generator.random() < 0.6 else TAGS[generator.integers(0, 5)] for t in row] for row in truth]
    labels = torch.tensor([[TAGS.index(t) for t in row] for row in truth])
    logits = torch.eye(5)[torch.tensor([[TAGS.index(t) for t in row] for row in found])]
    padding = torch.full((40, 3), -100)
    scores = token_metrics(torch.cat([logits, torch.randn(40, 3, 5)], 1), torch.cat([labels, padding], 1), TAGS)
    assert scores["entity_f1"] == pytest.approx(seqeval.f1_score(truth, found), abs=1e-12)
    assert scores["entity_precision"] == pytest.approx(seqeval.precision_score(truth, found), abs=1e-12)
    assert scores["entity_recall"] == pytest.approx(seqeval.recall_score(truth, found), abs=1e-12)
    assert scores["accuracy"] == pytest.approx(seqeval.accuracy_score(truth, found), abs=1e-12)


def test_entities_end_with_their_sentence_and_ignored_tokens_are_skipped() -> None:
    assert find_entities(["I-PER", "I-LOC", "I-LOC"]) == {("PER", 0, 0), ("LOC", 1, 2)}
    assert find_entities([]) == set()
    assert find_entities(["B-A-B", "I-A-B"]) == {("A-B", 0, 1)}
    tags = torch.tensor([[1, -100, 2], [2, 0, -100]])
    logits = torch.eye(5)[tags.clamp_min(0)]
    logits[0, 1] = float("nan")  # what is not scored may be anything
    assert token_metrics(logits, tags, TAGS)["entity_f1"] == 1.0
    assert "entity_f1" not in token_metrics(logits, tags, ("NOUN", "VERB", "ADJ", "ADV", "X"))
    with pytest.raises(DataError, match="0 examples"):
        token_metrics(torch.zeros(1, 2, 5), torch.full((1, 2), -100), TAGS)
    with pytest.raises(DataError, match="5 logits"):
        token_metrics(logits, tags, TAGS[:4])


def test_every_metric_has_a_direction_and_every_task_a_function() -> None:
    outputs = {
        "single_label": (torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])),
        "multi_label": (torch.randn(6, 3), torch.randint(0, 2, (6, 3))),
        "regression": (torch.randn(6, 1), torch.randn(6)),
        "token": (torch.randn(2, 6, 5), torch.randint(0, 5, (2, 6))),
    }
    for task, (logits, labels) in outputs.items():
        scores = metrics_for(task, TAGS)(logits, labels)
        assert scores.keys() <= HIGHER_IS_BETTER.keys()
        assert primary_metric(task) in scores
        assert all(type(value) is float and math.isfinite(value) for value in scores.values())
    with pytest.raises(ConfigError, match="single_label"):
        metrics_for("single-label")
