"""Scores of a model's outputs against labels, in float64, by the definitions that scikit-learn uses.

All but the average precision is computed here from one confusion matrix and one log-softmax: torchmetrics counts a
class that is predicted but has no example as recall 0 (scikit-learn leaves it out), gives an MCC of 0.41 where all
predictions are one class (scikit-learn: 0), puts a confidence of exactly 1 in a 16th calibration bin, and rounds to
float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from headinit.errors import DataError, TrainingError, unknown_name

IGNORED_LABEL = -100
"""Label of a token that is not scored (padding, special tokens, the rest of a word)."""

CALIBRATION_BINS = 15

HIGHER_IS_BETTER: dict[str, bool] = {
    "accuracy": True,
    "balanced_accuracy": True,
    "macro_f1": True,
    "micro_f1": True,
    "mcc": True,
    "f1": True,
    "nll": False,
    "ece": False,
    "map": True,
    "mae": False,
    "mse": False,
    "r2": True,
    "pearson": True,
    "spearman": True,
    "entity_precision": True,
    "entity_recall": True,
    "entity_f1": True,
}
"""Whether a greater value of a metric is better."""


def classification_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Scores of single-label classification.

    The prediction is the first of the greatest logits. Classes without an example are left out of the balanced accuracy
    (mean recall), classes with neither example nor prediction out of the macro F1; the MCC is 0 where labels or
    predictions are all of one class. NLL is the mean of -log p(label) in nats. ECE has 15 bins of equal width, (lo, hi]
    (Guo et al. 2017).

    Args:
        logits: `(N, K)`, any floating dtype.
        labels: `(N,)` class numbers in 0..K-1.

    Returns:
        ``accuracy``, ``balanced_accuracy``, ``macro_f1``, ``mcc``, ``nll``, ``ece``; of two classes also ``f1``, that
        of the second one (the positive class of GLUE).

    Raises:
        DataError: the shapes do not fit, there is no example, or a label is outside 0..K-1.
        TrainingError: a logit is NaN or infinite.

    Example:
        >>> scores = classification_metrics(torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 0.0]]), torch.tensor([0, 1, 1]))
        >>> round(scores["accuracy"], 4), round(scores["nll"], 4)
        (0.6667, 0.5224)
    """
    logits, labels = _checked_logits(logits, labels)
    log_probabilities = torch.log_softmax(logits, dim=1)
    predictions = logits.argmax(dim=1)
    counts = confusion_matrix(predictions, labels, logits.shape[1])
    return {
        "accuracy": (predictions == labels).double().mean().item(),
        **_confusion_scores(counts.double()),
        "nll": -log_probabilities.gather(1, labels[:, None]).mean().item(),
        "ece": _calibration_error(log_probabilities.exp().amax(dim=1), predictions == labels),
    }


def confusion_matrix(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Counts `(K, K)` int64: row = true class, column = predicted class.

    Example:
        >>> confusion_matrix(torch.tensor([0, 1, 1]), torch.tensor([0, 1, 0]), 2).tolist()
        [[1, 1], [0, 1]]
    """
    pairs = labels.long() * num_classes + predictions.long()
    return torch.bincount(pairs.flatten(), minlength=num_classes**2).reshape(num_classes, num_classes)


def multi_label_metrics(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Scores of multi-label classification: a label is predicted where its logit is above 0 (probability above 1/2).

    ``map`` is the mean over labels of the average precision (the step integral of precision over recall); labels
    without a positive example are left out of it, and it is 0 if no label has one. ``macro_f1`` counts a label with
    neither example nor prediction as 0, as scikit-learn does.

    Args:
        logits: `(N, K)`.
        labels: `(N, K)` of 0 and 1.

    Returns:
        ``micro_f1``, ``macro_f1``, ``map``, ``accuracy`` (share of single decisions that are right).

    Raises:
        DataError: the shapes differ, there is no example, or a label is neither 0 nor 1.
        TrainingError: a logit is NaN or infinite.

    Example:
        >>> scores = multi_label_metrics(torch.tensor([[2.0, -1.0], [1.0, 3.0]]), torch.tensor([[1, 0], [0, 1]]))
        >>> round(scores["micro_f1"], 4), scores["map"]
        (0.8, 1.0)
    """
    logits, labels = _checked_pair(logits, labels, dimensions=(2,))
    if not ((labels == 0) | (labels == 1)).all():
        raise DataError(f"Multi-label targets must be 0 or 1; found values such as {labels.unique().tolist()[:5]}.")
    labels, predictions = labels.long(), (logits > 0).long()
    hits = (labels * predictions).sum(dim=0).double()
    sizes = (labels + predictions).sum(dim=0).double()  # true + predicted
    precisions = [_average_precision(logits[:, k], labels[:, k]) for k in range(labels.shape[1]) if labels[:, k].any()]
    return {
        "accuracy": (predictions == labels).double().mean().item(),
        "micro_f1": (2 * hits.sum() / sizes.sum().clamp_min(1)).item(),
        "macro_f1": (2 * hits / sizes.clamp_min(1)).mean().item(),
        "map": sum(precisions) / len(precisions) if precisions else 0.0,
    }


def regression_metrics(predictions: Tensor, targets: Tensor) -> dict[str, float]:
    """Scores of regression, averaged over the outputs where there are several.

    A correlation is 0 where the predictions or the targets are constant. R2 is 1 - sum (y - f)^2 / sum (y - mean y)^2;
    with constant targets it is 1 if every prediction is exact and 0 otherwise.

    Args:
        predictions: `(N,)`, `(N, 1)` or `(N, T)`.
        targets: as many values, of any of these shapes.

    Returns:
        ``mae``, ``mse``, ``r2``, ``pearson``, ``spearman``.

    Raises:
        DataError: the shapes do not fit or there is no example.
        TrainingError: a prediction is NaN or infinite.

    Example:
        >>> scores = regression_metrics(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 2.0, 3.0]))
        >>> round(scores["mae"], 4), round(scores["spearman"], 4)
        (0.3333, 1.0)
    """
    predictions = predictions[:, None] if predictions.ndim == 1 else predictions
    targets = targets[:, None] if targets.ndim == 1 else targets
    predictions, targets = _checked_pair(predictions, targets, dimensions=(2,))
    targets = targets.double()
    if not torch.isfinite(targets).all():
        raise DataError("Cannot score a regression: a target is NaN or infinite. Drop these examples.")
    errors = predictions - targets
    residual = errors.square().sum(dim=0)
    total = (targets - targets.mean(dim=0)).square().sum(dim=0)
    r2 = torch.where(total > 0, 1 - residual / total.clamp_min(1e-300), (residual == 0).double())
    return {
        "mae": errors.abs().mean().item(),
        "mse": errors.square().mean().item(),
        "r2": r2.mean().item(),
        "pearson": _correlations(predictions, targets).mean().item(),
        "spearman": _correlations(_mean_ranks(predictions), _mean_ranks(targets)).mean().item(),
    }


def token_metrics(logits: Tensor, labels: Tensor, class_names: Sequence[str] = ()) -> dict[str, float]:
    """Scores of token classification; tokens labelled -100 are left out.

    With IOB class names (``O``, ``B-PER``, ``I-PER``, ...), also precision, recall and F1 over whole entities,
    micro-averaged: an entity counts where first token, last token and type all agree. It starts at ``B-``, or at ``I-``
    after another type or outside (conlleval's reading, which is seqeval's default).

    Args:
        logits: `(N, T, K)`, or `(T, K)` for one sequence.
        labels: `(N, T)` or `(T,)`.
        class_names: K tag names.

    Returns:
        ``accuracy``, ``nll``; with IOB names ``entity_precision``, ``entity_recall``, ``entity_f1``.

    Raises:
        DataError: the shapes do not fit, nothing is labelled, or a label is outside 0..K-1.
        TrainingError: a scored logit is NaN or infinite.

    Example:
        >>> logits = torch.eye(3)[torch.tensor([[1, 2, 0, 0]])]
        >>> token_metrics(logits, torch.tensor([[1, 2, 0, -100]]), ["O", "B-PER", "I-PER"])["entity_f1"]
        1.0
    """
    logits = logits[None] if logits.ndim == 2 else logits
    labels = labels[None] if labels.ndim == 1 else labels
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise DataError(
            f"Token scores need logits (N, T, K) and labels (N, T); found {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}."
        )
    scored = labels != IGNORED_LABEL
    flat, truth = _checked_logits(logits[scored], labels[scored])
    predictions = flat.argmax(dim=1)
    scores = {
        "accuracy": (predictions == truth).double().mean().item(),
        "nll": -torch.log_softmax(flat, dim=1).gather(1, truth[:, None]).mean().item(),
    }
    if not _are_iob(class_names):
        return scores
    if len(class_names) != flat.shape[1]:
        raise DataError(
            f"Token scores got {len(class_names)} class names for {flat.shape[1]} logits. Give one for each."
        )
    lengths = scored.sum(dim=1).tolist()
    found = _entities_of(predictions.split(lengths), class_names)
    wanted = _entities_of(truth.split(lengths), class_names)
    return {**scores, **_entity_scores(found, wanted)}


def find_entities(tags: Sequence[str]) -> set[tuple[str, int, int]]:
    """Entities (type, first token, last token) in one sequence of IOB tags.

    Example:
        >>> sorted(find_entities(["B-PER", "I-PER", "O", "I-LOC", "B-LOC"]))
        [('LOC', 3, 3), ('LOC', 4, 4), ('PER', 0, 1)]
    """
    entities, kind, start = set(), "", -1
    for position, tag in enumerate([*tags, "O"]):
        prefix, _, name = tag.partition("-")
        inside = prefix == "I" and start >= 0 and name == kind
        if inside:
            continue
        if start >= 0:
            entities.add((kind, start, position - 1))
        kind, start = (name, position) if prefix in ("B", "I") else ("", -1)
    return entities


def metrics_for(task: str, class_names: Sequence[str] = ()) -> Callable[[Tensor, Tensor], dict[str, float]]:
    """The function `(outputs, labels) -> scores` of a task.

    Args:
        task: ``"single_label"``, ``"multi_label"``, ``"regression"`` or ``"token"``.
        class_names: tag names, for the entity scores of ``"token"``.

    Raises:
        ConfigError: the task is not one of these.

    Example:
        >>> metrics_for("regression") is regression_metrics
        True
    """
    functions: dict[str, Callable[[Tensor, Tensor], dict[str, float]]] = {
        "single_label": classification_metrics,
        "multi_label": multi_label_metrics,
        "regression": regression_metrics,
        "token": partial(token_metrics, class_names=tuple(class_names)),
    }
    if task not in functions:
        raise unknown_name("task", task, functions)
    return functions[task]


def metric_names(task: str, class_names: Sequence[str] = ()) -> tuple[str, ...]:
    """The scores that `metrics_for` gives for a task.

    Example:
        >>> metric_names("token", ["O", "B-PER"])
        ('accuracy', 'nll', 'entity_precision', 'entity_recall', 'entity_f1')
    """
    scores = metrics_for(task, class_names)
    outputs = torch.zeros(1, len(class_names) or 2)  # of one example
    if task == "token":
        return tuple(scores(outputs[None], torch.zeros(1, 1, dtype=torch.int64)))
    return tuple(scores(outputs, torch.zeros(1, dtype=torch.int64) if task == "single_label" else outputs))


def primary_metric(task: str, class_names: Sequence[str] = ()) -> str:
    """The metric that selects the best epoch of a task; of tokens with IOB names, the F1 over whole entities.

    Example:
        >>> primary_metric("single_label"), primary_metric("regression"), primary_metric("token", ["O", "B-PER"])
        ('accuracy', 'pearson', 'entity_f1')
    """
    if task == "token" and _are_iob(class_names):
        return "entity_f1"
    names = {"single_label": "accuracy", "multi_label": "map", "regression": "pearson", "token": "accuracy"}
    if task not in names:
        raise unknown_name("task", task, names)
    return names[task]


def _checked_pair(outputs: Tensor, labels: Tensor, dimensions: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    outputs, labels = outputs.detach().cpu(), labels.detach().cpu()
    if outputs.ndim not in dimensions or outputs.shape != labels.shape:
        raise DataError(
            f"Outputs and labels must have the same shape (N, K); found {tuple(outputs.shape)} and "
            f"{tuple(labels.shape)}."
        )
    if not len(outputs):
        raise DataError("Cannot score 0 examples. Check that the split is not empty.")
    return _finite(outputs.double()), labels


def _checked_logits(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logits, labels = logits.detach().cpu(), labels.detach().cpu()
    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise DataError(
            f"Scores need logits (N, K) and labels (N,); found {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    if not len(labels):
        raise DataError("Cannot score 0 examples. Check that the split is not empty.")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise DataError(f"Class labels must be whole numbers (int64); found {labels.dtype}.")
    outside = (labels < 0) | (labels >= logits.shape[1])
    if outside.any():
        raise DataError(
            f"Label {int(labels[outside][0])} of example {int(outside.nonzero()[0])} is outside "
            f"0..{logits.shape[1] - 1}: {int(outside.sum())} of {len(labels)} labels do not fit the logits."
        )
    return _finite(logits.double()), labels.long()


def _finite(outputs: Tensor) -> Tensor:
    bad = ~torch.isfinite(outputs)
    if bad.any():
        rows = bad.reshape(len(bad), -1).any(dim=1)
        raise TrainingError(
            f"Cannot score outputs that are NaN or infinite: {int(rows.sum())} of {len(rows)} examples, the first is "
            f"number {int(rows.nonzero()[0])}. Training has diverged; lower the learning rate or the head's scale."
        )
    return outputs


def _confusion_scores(counts: Tensor) -> dict[str, float]:
    hits, true, predicted = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
    seen = (true + predicted) > 0
    total = counts.sum()
    # Gorodkin 2004: the correlation of the one-hot labels with the one-hot predictions.
    covariance = hits.sum() * total - true @ predicted
    variances = (total**2 - predicted @ predicted) * (total**2 - true @ true)
    binary = {"f1": (2 * hits[1] / (true + predicted)[1].clamp_min(1)).item()} if len(hits) == 2 else {}
    return {
        **binary,
        "balanced_accuracy": (hits[true > 0] / true[true > 0]).mean().item(),
        "macro_f1": (2 * hits[seen] / (true + predicted)[seen]).mean().item(),
        "mcc": (covariance / variances.sqrt()).item() if variances > 0 else 0.0,
    }


def _calibration_error(confidence: Tensor, correct: Tensor) -> float:
    edges = torch.linspace(0, 1, CALIBRATION_BINS + 1, dtype=torch.float64)
    bins = torch.bucketize(confidence.clamp(0, 1), edges[1:-1])  # right-closed: (lo, hi]
    gaps = torch.zeros(CALIBRATION_BINS, dtype=torch.float64)
    gaps.index_add_(0, bins, correct.double() - confidence)
    return gaps.abs().sum().item() / len(confidence)


def _average_precision(scores: Tensor, labels: Tensor) -> float:
    from torchmetrics.functional.classification import binary_average_precision

    # Average precision depends on the order of the scores alone. Ranks keep that order where a sigmoid saturates at 1.
    ranks = torch.unique(scores, return_inverse=True)[1].double() / len(scores)
    return float(binary_average_precision(ranks, labels))


def _correlations(first: Tensor, second: Tensor) -> Tensor:
    first, second = first - first.mean(dim=0), second - second.mean(dim=0)
    scale = first.norm(dim=0) * second.norm(dim=0)
    products = (first * second).sum(dim=0)
    return torch.where(scale > 0, products / scale.clamp_min(1e-300), torch.zeros_like(scale)).clamp(-1, 1)


def _mean_ranks(values: Tensor) -> Tensor:
    """Ranks 1..N down each column; equal values share the mean of their ranks."""
    columns = []
    for column in values.T:
        _, inverse, counts = torch.unique(column, return_inverse=True, return_counts=True)
        last = counts.cumsum(0).double()
        columns.append((last - (counts.double() - 1) / 2)[inverse])
    return torch.stack(columns, dim=1)


def _are_iob(class_names: Sequence[str]) -> bool:
    return any(name.startswith(("B-", "I-")) for name in class_names)


def _entities_of(sequences: Sequence[Tensor], class_names: Sequence[str]) -> set[tuple[int, str, int, int]]:
    tags = ([class_names[int(label)] for label in sequence] for sequence in sequences)
    return {(number, *entity) for number, sequence in enumerate(tags) for entity in find_entities(sequence)}


def _entity_scores(found: set[tuple[int, str, int, int]], wanted: set[tuple[int, str, int, int]]) -> dict[str, float]:
    right = len(found & wanted)
    return {
        "entity_precision": right / len(found) if found else 0.0,
        "entity_recall": right / len(wanted) if wanted else 0.0,
        "entity_f1": 2 * right / (len(found) + len(wanted)) if found or wanted else 0.0,
    }
