"""Where a head starts, and how far features have moved: pure functions on tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from headinit.errors import DataError, unknown_name

EXPLODING_FACTOR = 2.0
"""An initial loss above this many times the loss of chance is warned about."""

SATURATED_CONFIDENCE = 0.999


def start_diagnostics(
    logits: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    features: Tensor | None = None,
    task: str = "single_label",
) -> dict[str, Any]:
    """How a head starts, before any training.

    Args:
        logits: `(N, K)` of the head as it starts; for ``"token"`` also `(N, T, K)`.
        labels: `(N,)` class numbers; `(N, K)` 0/1 or targets; for ``"token"`` also `(N, T)`, negative where a token has
            none.
        weight: `(K, d)` of a linear head over single labels; gives ``feature_gradient`` in closed form. For other heads
            and tasks use `feature_gradient_of`.
        features: `(N, d)` what the head receives; gives ``feature_norm``, the mean norm.
        task: ``"single_label"``, ``"multi_label"``, ``"regression"`` or ``"token"``.

    Returns:
        ``loss``: the task's own, mean over targets (nats, or squared units of the targets). ``chance_loss``: ln K; ln 2
        for each label of a multi-label task; the variance of the targets for regression. ``prior_entropy``: the loss
        of always giving the shares of the classes (labels). ``majority``: share of the most frequent class (of right
        decisions if each label is always given its more frequent value). ``accuracy``. ``logit_std`` (over all logits).
        ``feature_gradient`` and ``feature_norm`` (None if not asked for). ``warnings`` (sentences; empty if all is
        well). What a regression does not have is None.

    Raises:
        DataError: the shapes do not fit.

    Example:
        >>> start = start_diagnostics(torch.zeros(4, 3), torch.tensor([0, 1, 2, 0]), weight=torch.zeros(3, 5))
        >>> round(start["loss"], 4), round(start["chance_loss"], 4), start["feature_gradient"]
        (1.0986, 1.0986, 0.0)
        >>> start["warnings"][0].split(":")[0]
        'dead start'
    """
    if task not in _STARTS:
        raise unknown_name("task", task, _STARTS)
    if task == "token":
        known = labels >= 0
        logits, labels = logits[known.to(logits.device)], labels[known]
    if task in ("single_label", "token"):
        _check(logits, labels, weight, features)
    scores = logits.detach().double()
    if task in ("multi_label", "regression"):
        labels = _as_targets(labels, scores)
    labels = labels.detach().to(logits.device)
    gradient = None if weight is None else linear_feature_gradient(scores, labels.long(), weight).mean().item()
    own, confident = _STARTS[task](scores, labels)
    start: dict[str, Any] = {
        **own,
        "logit_std": scores.std(correction=0).item(),
        "feature_gradient": gradient,
        "feature_norm": None if features is None else features.detach().double().norm(dim=1).mean().item(),
    }
    return {**start, "warnings": start_warnings(start, confident, chance_name=_CHANCE_NAMES[task])}


def _start_of_classes(scores: Tensor, labels: Tensor) -> tuple[dict[str, Any], float]:
    """What depends on the task, and the share of examples whose greatest probability is above 0.999."""
    labels = labels.long()
    log_probabilities = torch.log_softmax(scores, dim=1)
    shares = torch.bincount(labels, minlength=scores.shape[1]).double() / len(labels)
    start = {
        "loss": -log_probabilities.gather(1, labels[:, None]).mean().item(),
        "chance_loss": math.log(scores.shape[1]),
        "prior_entropy": -torch.special.xlogy(shares, shares).sum().item() + 0.0,
        "majority": shares.max().item(),
        "accuracy": (scores.argmax(dim=1) == labels).double().mean().item(),
    }
    return start, (log_probabilities.amax(dim=1) > math.log(SATURATED_CONFIDENCE)).double().mean().item()


def _start_of_labels(scores: Tensor, targets: Tensor) -> tuple[dict[str, Any], float]:
    shares = targets.mean(dim=0)
    entropies = -torch.special.xlogy(shares, shares) - torch.special.xlogy(1 - shares, 1 - shares)
    start = {
        "loss": F.binary_cross_entropy_with_logits(scores, targets).item(),
        "chance_loss": math.log(2),
        "prior_entropy": entropies.mean().item() + 0.0,
        "majority": torch.maximum(shares, 1 - shares).mean().item(),
        "accuracy": ((scores > 0) == (targets > 0.5)).double().mean().item(),
    }
    confident = torch.sigmoid(scores.abs()).amin(dim=1) > SATURATED_CONFIDENCE  # sure of every label
    return start, confident.double().mean().item()


def _start_of_targets(scores: Tensor, targets: Tensor) -> tuple[dict[str, Any], float]:
    start = {
        "loss": (scores - targets).square().mean().item(),
        "chance_loss": targets.var(dim=0, correction=0).mean().item(),
        "prior_entropy": None,
        "majority": None,
        "accuracy": None,
    }
    return start, 0.0


_STARTS: dict[str, Callable[[Tensor, Tensor], tuple[dict[str, Any], float]]] = {
    "single_label": _start_of_classes,
    "token": _start_of_classes,
    "multi_label": _start_of_labels,
    "regression": _start_of_targets,
}
_CHANCE_NAMES = {
    "single_label": "ln K",
    "token": "ln K",
    "multi_label": "ln 2",
    "regression": "the variance of the targets",
}


def start_warnings(start: dict[str, Any], confident_share: float = 0.0, chance_name: str = "ln K") -> list[str]:
    """What is worth warning about in a start.

    Args:
        start: as `start_diagnostics` gives it.
        confident_share: share of examples whose greatest probability is above 0.999.
        chance_name: what the loss of chance is, in words.

    Example:
        >>> start_warnings({"loss": 9.0, "chance_loss": 2.3, "accuracy": 0.1, "feature_gradient": 3.0})[0].split(":")[0]
        'exploding start'
    """
    found, loss, chance = [], start["loss"], start["chance_loss"]
    if start.get("feature_gradient") == 0:
        found.append(
            "dead start: no gradient reaches the features, so the first step changes the head alone. "
            "Harmless for a frozen backbone; otherwise use a head that is not all zeros."
        )
    if not math.isfinite(loss) or loss > EXPLODING_FACTOR * chance > 0:
        found.append(
            f"exploding start: the initial loss {loss:.3g} is over {EXPLODING_FACTOR:g} times {chance_name} = "
            f"{chance:.3g}. "
            "Scale the head down (target scale, or a smaller std)."
        )
    if confident_share > 0.5 and start["accuracy"] < 0.95:
        squashing = "sigmoid" if chance_name == "ln 2" else "softmax"
        found.append(
            f"saturated {squashing}: {confident_share:.0%} of the examples start with a probability above "
            f"{SATURATED_CONFIDENCE:g}, yet the accuracy is {start['accuracy']:.0%}. Scale the head down or fit a "
            "temperature."
        )
    return found


def linear_feature_gradient(logits: Tensor, labels: Tensor, weight: Tensor) -> Tensor:
    """Norm of the cross-entropy's gradient into the features, per example, for a linear head: ||(p - e_y) W||.

    Args:
        logits: `(N, K)`.
        labels: `(N,)` class numbers.
        weight: `(K, d)`.

    Returns:
        `(N,)` float64.

    Example:
        >>> linear_feature_gradient(torch.zeros(1, 2), torch.tensor([0]), torch.eye(2)).tolist()  # ||(-.5, .5)||
        [0.7071067811865476]
    """
    errors = torch.softmax(logits.detach().double(), dim=1)
    errors = errors.scatter_add(1, labels[:, None], errors.new_full((len(labels), 1), -1.0))
    weight = weight.detach().double().reshape(len(weight), -1)
    # ||e W||^2 = e (W W') e': K x K instead of N x d numbers, where that is the smaller table.
    if weight.shape[0] >= weight.shape[1]:
        return (errors @ weight).norm(dim=1)
    gram = weight @ weight.T
    return ((errors @ gram) * errors).sum(dim=1).clamp_min(0).sqrt()


def feature_gradient_of(
    head: Callable[[Tensor], Tensor],
    features: Tensor,
    labels: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Norm of the loss's gradient into the features, per example, for any head, by autograd.

    Each example's loss must depend on that example alone (no BatchNorm in training mode). The gradients of the head's
    own parameters are left as they were.

    Args:
        head: maps `(N, ...)` to logits `(N, K)`.
        features: `(N, ...)` what the head receives.
        labels: `(N,)` class numbers, or what `loss` takes.
        loss: ``(logits, labels) -> sum of the examples' losses``; None for the cross-entropy.

    Returns:
        `(N,)` float64.

    Example:
        >>> feature_gradient_of(torch.nn.Identity(), torch.zeros(1, 2), torch.tensor([0]))
        tensor([0.7071], dtype=torch.float64)
    """
    inputs = features.detach().clone().requires_grad_(True)
    with torch.enable_grad():
        logits = head(inputs)
        labels = labels.to(logits.device)
        total = F.cross_entropy(logits, labels, reduction="sum") if loss is None else loss(logits, labels)
        (gradient,) = torch.autograd.grad(total, inputs, allow_unused=True)
    if gradient is None:
        return torch.zeros(len(features), dtype=torch.float64)
    return gradient.double().reshape(len(features), -1).norm(dim=1)


def feature_drift(before: Tensor, after: Tensor) -> dict[str, float | None]:
    """How far fine-tuning has moved the features of the same examples.

    Args:
        before: `(N, d)` features of the pretrained backbone.
        after: `(N, e)` features now; `relative_frobenius` needs e = d.

    Returns:
        ``relative_frobenius`` = ||after - before|| / ||before|| (None if the widths differ) and ``linear_cka`` =
        ||Y'X||^2 / (||X'X|| ||Y'Y||) over centred features, 1 for the same representation up to rotation and scale
        (Kornblith et al. 2019). A matrix without variance has CKA 1 with another such matrix and 0 with all others.

    Raises:
        DataError: the numbers of examples differ, or a value is not finite.

    Example:
        >>> x = torch.randn(8, 4)
        >>> drift = feature_drift(x, 2 * x)
        >>> round(drift["relative_frobenius"], 6), round(drift["linear_cka"], 6)
        (1.0, 1.0)
    """
    if before.ndim != 2 or after.ndim != 2 or len(before) != len(after) or not len(before):
        raise DataError(
            f"Feature drift needs two matrices over the same examples; found {tuple(before.shape)} and "
            f"{tuple(after.shape)}."
        )
    before, after = before.detach().double(), after.detach().double()
    if not (torch.isfinite(before).all() and torch.isfinite(after).all()):
        raise DataError("Feature drift needs finite features; found NaN or infinity. The backbone has diverged.")
    return {"relative_frobenius": _relative_change(before, after), "linear_cka": _linear_cka(before, after)}


def logit_histogram(logits: Tensor, bins: int = 50) -> dict[str, list[float]]:
    """Counts of the logits between their least and greatest value.

    Returns:
        ``edges`` (bins + 1 values) and ``counts`` (bins values).

    Raises:
        DataError: there is no finite logit.

    Example:
        >>> logit_histogram(torch.tensor([[0.0, 1.0], [1.0, 2.0]]), bins=2)
        {'edges': [0.0, 1.0, 2.0], 'counts': [1, 3]}
    """
    values = logits.detach().double().cpu().flatten()
    values = values[torch.isfinite(values)]
    if not len(values):
        raise DataError("Cannot draw a histogram: no logit is finite.")
    low, high = values.min().item(), values.max().item()
    if low == high:
        low, high = low - 0.5, high + 0.5
    counts, edges = torch.histogram(values, bins=bins, range=(low, high))
    return {"edges": edges.tolist(), "counts": counts.long().tolist()}


def head_spectrum(weight: Tensor) -> list[float]:
    """Singular values of a head's weight, greatest first.

    Example:
        >>> head_spectrum(torch.diag(torch.tensor([1.0, 3.0])))
        [3.0, 1.0]
    """
    return torch.linalg.svdvals(weight.detach().double().cpu().reshape(len(weight), -1)).tolist()


def _check(logits: Tensor, labels: Tensor, weight: Tensor | None, features: Tensor | None) -> None:
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise DataError(
            f"Start diagnostics need logits (N, K) and labels (N,); found {tuple(logits.shape)} and "
            f"{tuple(labels.shape)}."
        )
    if int(labels.min()) < 0 or int(labels.max()) >= logits.shape[1]:
        raise DataError(
            f"Labels run from {int(labels.min())} to {int(labels.max())}, outside 0..{logits.shape[1] - 1} of the "
            "logits."
        )
    if weight is not None and len(weight) != logits.shape[1]:
        raise DataError(f"The head's weight {tuple(weight.shape)} does not give {logits.shape[1]} logits.")
    if features is not None and (features.ndim != 2 or len(features) != len(logits)):
        raise DataError(f"Features must be (N, d) with N = {len(logits)}; found {tuple(features.shape)}.")


def _as_targets(labels: Tensor, scores: Tensor) -> Tensor:
    targets = labels.detach().double().to(scores.device)
    targets = targets[:, None] if targets.ndim == 1 else targets
    if scores.ndim != 2 or targets.shape != scores.shape or not len(targets):
        raise DataError(
            f"Start diagnostics need outputs and targets (N, K); found {tuple(scores.shape)} and {tuple(labels.shape)}."
        )
    return targets


def _relative_change(before: Tensor, after: Tensor) -> float | None:
    if before.shape != after.shape:
        return None
    change, size = (after - before).norm().item(), before.norm().item()
    if size == 0:
        return 0.0 if change == 0 else math.inf
    return change / size


def _linear_cka(before: Tensor, after: Tensor) -> float:
    before, after = before - before.mean(dim=0), after - after.mean(dim=0)
    sizes = before.norm().item(), after.norm().item()
    if 0.0 in sizes:
        return 1.0 if sizes[0] == sizes[1] else 0.0
    before, after = before / sizes[0], after / sizes[1]
    if len(before) < max(before.shape[1], after.shape[1]):  # the (N, N) Gram matrices are the smaller ones
        first, second = before @ before.T, after @ after.T
        cross = (first * second).sum()
    else:
        first, second = before.T @ before, after.T @ after
        cross = (after.T @ before).square().sum()
    return (cross / (first.norm() * second.norm())).clamp(0, 1).item()
