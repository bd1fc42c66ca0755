"""What training minimises, by task: sums over targets, so that averages over unequal batches stay exact."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from headinit.data.text import IGNORED_LABEL
from headinit.errors import DataError, unknown_name
from headinit.heads.record import logits_of

TASKS = ("single_label", "multi_label", "regression", "token")


def training_outputs(output: Any) -> tuple[Tensor, ...]:
    """The logits that a model in training mode gives: one tensor, or the two of a distilled model.

    Inception and GoogLeNet give a named tuple with auxiliary logits; only the main ones count.

    Example:
        >>> len(training_outputs((torch.zeros(2, 3), torch.zeros(2, 3))))
        2
    """
    if type(output) is tuple and len(output) == 2 and all(isinstance(part, Tensor) for part in output):
        first, second = output
        if first.shape == second.shape:
            return first, second
    return (logits_of(output),)


def summed_loss(logits: Tensor, labels: Tensor, task: str = "single_label", label_smoothing: float = 0.0) -> Tensor:
    """Loss summed over the targets of a batch; divide by `count_targets` for the mean.

    Args:
        logits: `(B, K)`, or `(B, T, K)` for ``"token"``; reduced precision is raised to float32.
        labels: `(B,)` class numbers, `(B, K)` 0/1 or regression targets, `(B, T)` with -100 where there is no target.
        task: cross entropy for ``"single_label"`` and ``"token"``, binary cross entropy for ``"multi_label"``, squared
            error for ``"regression"``.
        label_smoothing: share of the target given to all classes alike (Szegedy et al., 2016), for cross entropy.

    Raises:
        DataError: a label is outside 0..K-1, or the shapes do not fit.

    Example:
        >>> summed_loss(torch.zeros(2, 4), torch.tensor([0, 3])).item() / 2  # ln 4
        1.3862943649291992
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if task in ("single_label", "token"):
        flat, targets = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1)
        _check_labels(targets, logits, labels)
        return F.cross_entropy(
            flat, targets, reduction="sum", ignore_index=IGNORED_LABEL, label_smoothing=label_smoothing
        )
    targets = labels.to(logits.dtype)
    if logits.shape != targets.shape and logits.numel() == targets.numel():
        targets = targets.reshape(logits.shape)
    if logits.shape != targets.shape:
        raise DataError(
            f"Labels of shape {tuple(labels.shape)} do not fit outputs of shape {tuple(logits.shape)} for task {task}."
        )
    if task == "multi_label":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    if task == "regression":
        return F.mse_loss(logits, targets, reduction="sum")
    raise unknown_name("task", task, TASKS)


def count_targets(labels: Tensor, task: str = "single_label") -> int:
    """Number of targets that `summed_loss` sums over.

    Example:
        >>> count_targets(torch.tensor([[1, -100], [0, 2]]), "token")
        3
    """
    return int((labels != IGNORED_LABEL).sum()) if task in ("single_label", "token") else labels.numel()


def split_batch(batch: Any) -> tuple[Any, Tensor]:
    """Inputs and labels of a batch: a `Batch`, a pair, or a mapping with ``"labels"`` as transformers collates it.

    Example:
        >>> split_batch({"input_ids": torch.zeros(1, 2), "labels": torch.zeros(1)})[0].keys()
        dict_keys(['input_ids'])
    """
    if isinstance(batch, Mapping) and "labels" in batch:
        return {name: value for name, value in batch.items() if name != "labels"}, batch["labels"]
    if isinstance(batch, tuple | list) and len(batch) >= 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    raise DataError(
        f"A batch must be (inputs, labels[, ...]) or a mapping with 'labels'; found {type(batch).__name__}. "
        "Give tensors of labels, not lists."
    )


def _check_labels(targets: Tensor, logits: Tensor, labels: Tensor) -> None:
    if targets.dtype != torch.int64 or targets.shape[0] != logits.numel() // logits.shape[-1]:
        raise DataError(
            f"Labels must be int64 class numbers, one per row of the {tuple(logits.shape)} logits; "
            f"found {labels.dtype} of shape {tuple(labels.shape)}."
        )
    outside = targets[((targets < 0) | (targets >= logits.shape[-1])) & (targets != IGNORED_LABEL)]
    if outside.numel():
        raise DataError(
            f"Label {int(outside[0])} is outside 0..{logits.shape[-1] - 1}: the head has {logits.shape[-1]} classes. "
            "Attach a head with as many classes as the data has, numbered from 0."
        )
