"""Features of all examples that a comparison needs, computed once for all of its splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from headinit.data.splits import DataSplits, Split, joined
from headinit.errors import DataError
from headinit.features.extract import FeatureSet


class FeaturePool:
    """Features of every example that some cell needs, by the example's name.

    Args:
        parts: the splits that are needed; they may overlap.
        extract: gives the features of a split, in its order.
        num_classes: K.
    """

    def __init__(self, parts: Sequence[Split], extract: Callable[[Split], Tensor], num_classes: int) -> None:
        self.num_classes = num_classes
        self.rows: dict[str, int] = {}
        fresh: list[Split] = []
        for part in parts:
            unseen = [i for i, name in enumerate(part.names) if name not in self.rows]
            for i in unseen:
                self.rows[part.names[i]] = len(self.rows)
            if unseen:
                fresh.append(part if len(unseen) == len(part) else part.select(unseen))
        self.features = extract(joined(fresh))

    def features_of(self, split: Split) -> FeatureSet:
        """Features and labels of a split."""
        rows = torch.tensor([self.rows[name] for name in split.names])
        return FeatureSet(self.features[rows], split.labels, self.num_classes, split.fingerprint)


def with_own_names(splits: DataSplits) -> DataSplits:
    """Names that tell all examples of a task apart, also where test files repeat the names of training files."""
    fit = set(splits.train.names) | set(splits.validation.names)
    test = set() if splits.test is None else set(splits.test.names)
    if len(fit) != len(splits.train) + len(splits.validation):
        repeated = len(splits.train) + len(splits.validation) - len(fit)
        raise DataError(f"{repeated} examples of {splits.name!r} share their names with others: names must differ.")
    if splits.test is None or not fit & test:
        return splits
    return dataclasses.replace(
        splits, test=dataclasses.replace(splits.test, names=[f"test: {name}" for name in splits.test.names])
    )
