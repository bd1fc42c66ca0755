"""From the labels that a file holds to the tensors that a model learns from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headinit.data.splits import TASKS
from headinit.errors import DataError, unknown_name

_SHOWN = 5


def label_text(value: Any) -> str | None:
    """A label as text, None where it is missing (empty, None or NaN). Whole floats read as integers.

    Example:
        >>> label_text(" yes "), label_text(1.0), label_text(""), label_text(float("nan"))
        ('yes', '1', None, None)
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() or None


def sorted_names(labels: Sequence[str]) -> tuple[str, ...]:
    """The distinct labels: by value where all are numbers, otherwise by alphabet.

    Example:
        >>> sorted_names(["10", "9", "10"]), sorted_names(["b", "10", "a"])
        (('9', '10'), ('10', 'a', 'b'))
    """
    names = set(labels)
    try:
        values = {name: float(name) for name in names}
    except ValueError:
        return tuple(sorted(names))
    if not all(map(math.isfinite, values.values())):
        return tuple(sorted(names))
    return tuple(sorted(names, key=lambda name: (values[name], name)))


def require_labels(values: Sequence[str | None], where: Sequence[str], column: str) -> list[str]:
    """The labels, all of them there.

    Raises:
        DataError: some are missing; the first are named, all are counted.
    """
    missing = [where[i] for i, value in enumerate(values) if value is None]
    if missing:
        raise DataError(
            f"No label in column {column!r} of {named(missing)}: {len(missing)} of {len(values)} examples have none. "
            "Fill them in or delete the lines."
        )
    return [value for value in values if value is not None]


def encode_classes(
    values: Sequence[str | None], where: Sequence[str], column: str, class_names: Sequence[str]
) -> Tensor:
    """Labels as class numbers: `(N,)` int64.

    Raises:
        DataError: a label is missing, or is none of `class_names` (the first such examples are named).
    """
    numbers = {name: k for k, name in enumerate(class_names)}
    labels = require_labels(values, where, column)
    unknown = [f"{where[i]} ({label!r})" for i, label in enumerate(labels) if label not in numbers]
    if unknown:
        raise DataError(
            f"Labels unknown to the training examples: {named(unknown)}; {len(unknown)} of {len(labels)}. "
            f"Training has {', '.join(map(repr, class_names[:10]))}{' ...' if len(class_names) > 10 else ''}."
        )
    return torch.tensor([numbers[label] for label in labels], dtype=torch.int64)


def encode_targets(values: Sequence[str | None], where: Sequence[str], column: str) -> Tensor:
    """Labels as numbers to be predicted: `(N, 1)` float32.

    Raises:
        DataError: a label is missing or no finite number.
    """
    labels = require_labels(values, where, column)
    targets, wrong = [], []
    for i, label in enumerate(labels):
        try:
            number = float(label)
        except ValueError:
            number = math.nan
        targets.append(number)
        if not math.isfinite(number):
            wrong.append(f"{where[i]} ({label!r})")
    if wrong:
        raise DataError(f"Not a finite number in column {column!r}: {named(wrong)}; {len(wrong)} of {len(labels)}.")
    return torch.tensor(targets, dtype=torch.float32).unsqueeze(1)


def separate_labels(value: Any, separator: str) -> list[str]:
    """The labels of one multi-label example: from a list, or from text parted by `separator`; none where it is empty.

    Example:
        >>> separate_labels("red, round", ","), separate_labels(["red"], ","), separate_labels("", ",")
        (['red', 'round'], ['red'], [])
    """
    parts = value if isinstance(value, (list, tuple)) else (label_text(value) or "").split(separator)
    return [text for part in parts if (text := label_text(part)) is not None]


def encode_label_sets(sets: Sequence[Sequence[str]], where: Sequence[str], class_names: Sequence[str]) -> Tensor:
    """Sets of labels as indicators: `(N, K)` float32.

    Raises:
        DataError: a label is none of `class_names`.
    """
    numbers = {name: k for k, name in enumerate(class_names)}
    targets = torch.zeros(len(sets), len(class_names))
    unknown = []
    for i, labels in enumerate(sets):
        for label in labels:
            if label in numbers:
                targets[i, numbers[label]] = 1
            else:
                unknown.append(f"{where[i]} ({label!r})")
    if unknown:
        raise DataError(f"Labels unknown to the training examples: {named(unknown)}; {len(unknown)} in all.")
    return targets


def check_task(task: str) -> None:
    """Refuse a task that tables cannot state."""
    known = [name for name in TASKS if name != "token"]
    if task not in known:
        raise unknown_name("task", task, known, DataError)


def named(places: Sequence[str]) -> str:
    """The first places of a list, in words."""
    return ", ".join(places[:_SHOWN]) + (f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else "")
