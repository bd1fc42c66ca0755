"""Splits of a data set: what is trained on, what selects, what is reported once; and how examples are divided."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from headinit.errors import DataError
from headinit.seeding import generator_for

TASKS = ("single_label", "multi_label", "regression", "token")


class LazyItems(Sequence[Any]):
    """Examples that a foreign data set reads one at a time, so that choosing some of them reads none.

    Foreign data sets need not bear several threads: one item is read at a time.

    Example:
        >>> items = LazyItems(lambda i: f"picture {i}", range(5)).select([4, 2])
        >>> len(items), items[0]
        (2, 'picture 4')
    """

    def __init__(self, read: Callable[[int], Any], positions: Sequence[int]) -> None:
        self._read, self._positions, self._lock = read, list(positions), threading.Lock()

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.select(range(*index.indices(len(self))))
        with self._lock:
            return self._read(self._positions[index])

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))

    def select(self, indices: Sequence[int]) -> LazyItems:
        """The items at `indices`, none of them read."""
        chosen = LazyItems(self._read, [self._positions[i] for i in indices])
        chosen._lock = self._lock
        return chosen


@dataclass(frozen=True)
class Split:
    """Labelled examples, read when they are needed.

    Attributes:
        items: N raw examples: for pictures a `Path`, a `PIL.Image` or a uint8 array `(H, W)` or `(H, W, 3)`; for text a
            `str`, a pair `(str, str)`, or the `Words` of a sentence.
        labels: `(N,)` int64 class numbers; `(N, K)` float32 targets (multi-label, regression); for tokens `(N, W)`
            int64, a class for each word, -100 behind the last word of a sentence.
        names: what to call example i in a message: its path, or "file.tsv line 12".
        fingerprint: SHA-256 over the content of the examples and their labels.
    """

    items: Sequence[Any]
    labels: Tensor
    names: Sequence[str]
    fingerprint: str

    def __post_init__(self) -> None:
        if not len(self.items) == len(self.labels) == len(self.names):
            raise DataError(
                f"A split needs as many labels and names as items: found {len(self.items)} items, "
                f"{len(self.labels)} labels, {len(self.names)} names."
            )

    def __len__(self) -> int:
        return len(self.items)

    def select(self, indices: Sequence[int] | Tensor) -> Split:
        """The examples at `indices`, in that order; the fingerprint follows from this one's and the indices.

        Example:
            >>> split = Split(["a", "b", "c"], torch.tensor([0, 1, 1]), ["1", "2", "3"], "f00d")
            >>> chosen = split.select([2, 0])
            >>> list(chosen.items), chosen.labels.tolist(), chosen.fingerprint != split.fingerprint
            (['c', 'a'], [1, 0], True)
        """
        chosen = torch.as_tensor(indices, dtype=torch.int64).reshape(-1)
        positions = chosen.tolist()
        digest = hashlib.sha256(f"{self.fingerprint}|select|".encode() + chosen.numpy().astype("<i8").tobytes())
        items = (
            self.items.select(positions) if isinstance(self.items, LazyItems) else [self.items[i] for i in positions]
        )
        return Split(items, self.labels[chosen], [self.names[i] for i in positions], digest.hexdigest())


@dataclass(frozen=True)
class DataSplits:
    """The splits of one task.

    Attributes:
        train, validation, test: the examples; `test` is None where there is none.
        class_names: K names in a fixed order: class k of the labels is `class_names[k]`.
        modality: ``"image"`` or ``"text"``.
        name: short name for reports.
        task: ``"single_label"``, ``"multi_label"``, ``"regression"`` or ``"token"``.
    """

    train: Split
    validation: Split
    test: Split | None
    class_names: tuple[str, ...]
    modality: str
    name: str
    task: str = "single_label"

    @property
    def num_classes(self) -> int:
        """Number of classes K (of targets, for regression)."""
        return len(self.class_names)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the fingerprints of the splits, the class names and the task."""
        parts = [self.train.fingerprint, self.validation.fingerprint, self.test.fingerprint if self.test else "-"]
        return hashlib.sha256("\x00".join([*parts, self.task, *self.class_names]).encode()).hexdigest()


def check_splits(splits: DataSplits) -> DataSplits:
    """The same splits, after checking that their labels can be learnt and lie in range.

    Raises:
        DataError: a split is empty, there is one class only (named in `class_names` or present in the training
            labels), or a label lies outside ``0 .. K - 1`` (the first such example is named).

    Example:
        >>> split = Split(["a", "b"], torch.tensor([0, 2]), ["file line 1", "file line 2"], "")
        >>> check_splits(DataSplits(split, split, None, ("cat", "dog"), "text", "pets"))
        Traceback (most recent call last):
        ...
        headinit.errors.DataError: Label 2 of file line 2 (train split of 'pets') is outside 0 .. 1: ...
    """
    for part, split in (("train", splits.train), ("validation", splits.validation), ("test", splits.test)):
        if split is None:
            continue
        if len(split) == 0:
            raise DataError(f"The {part} split of {splits.name!r} holds no examples.")
        if splits.task == "single_label":
            _check_range(split.labels, split.names, splits.class_names, f"{part} split of {splits.name!r}")
        elif not bool(torch.isfinite(split.labels.double()).all()):
            raise DataError(f"The {part} split of {splits.name!r} has targets that are not finite.")
    if splits.task == "single_label":
        check_class_count(splits.train.labels, splits.class_names, splits.name)
    return splits


def check_class_count(labels: Tensor, class_names: Sequence[str], name: str) -> None:
    """Refuse labels that hold fewer than two classes, of which nothing can be learnt."""
    present = sorted(set(labels.tolist()))
    if len(present) < 2 or len(class_names) < 2:
        found = repr(class_names[int(present[0])]) if present else "none"
        raise DataError(
            f"Cannot learn to tell classes apart in {name!r}: all {len(labels)} training examples have one class "
            f"({found}). Give examples of at least two classes."
        )


def _check_range(labels: Tensor, names: Sequence[str], class_names: Sequence[str], where: str) -> None:
    if labels.is_floating_point() or labels.ndim != 1:
        raise DataError(f"Labels of the {where} must be (N,) integers, found {tuple(labels.shape)} {labels.dtype}.")
    outside = ((labels < 0) | (labels >= len(class_names))).nonzero().flatten().tolist()
    if outside:
        raise DataError(
            f"Label {int(labels[outside[0]])} of {names[outside[0]]} ({where}) is outside 0 .. {len(class_names) - 1}: "
            f"there are {len(class_names)} classes. {len(outside)} of {len(labels)} labels are outside."
        )


def stratified_order(labels: Tensor, seed: int, purpose: str) -> list[int]:
    """An order of all examples of which every beginning is as balanced as the whole.

    The first example of each class comes first; then example j of a class with n examples stands at ``(j + 1/2) / n``
    (Sainte-Lague's apportionment). So the first m examples hold every class (from m = K on) in its right share, and a
    smaller choice is always contained in a larger one. Within a class the order is random, fixed by `seed`.

    Args:
        labels: `(N,)` int64 classes; `(N, K)` or float targets are taken as one class.
        seed: the user's seed.
        purpose: what the order is for; another purpose gives an unrelated order.

    Returns:
        The N positions, ordered.

    Example:
        >>> order = stratified_order(torch.tensor([0] * 6 + [1] * 2), seed=0, purpose="demo")
        >>> sorted(int(i >= 6) for i in order[:4])  # 4 examples: three of class 0, one of class 1
        [0, 0, 0, 1]
    """
    classes = _strata(labels)
    keys: list[tuple[bool, float, int, int]] = []
    for k in np.unique(classes).tolist():
        members = np.flatnonzero(classes == k)
        shuffled = members[torch.randperm(len(members), generator=generator_for(seed, f"{purpose}/class {k}")).numpy()]
        keys += [(j > 0, (j + 0.5) / len(members), int(k), int(i)) for j, i in enumerate(shuffled)]
    return [key[3] for key in sorted(keys, key=lambda key: key[:3])]


def divide(split: Split, share: float | int, seed: int, purpose: str = "validation") -> tuple[Split, Split]:
    """Part a split in two, stratified by class: (the rest, the share).

    Every class with at least two examples stands on both sides; a class with one example stays in the rest. Both parts
    keep the order of `split`.

    Args:
        split: the examples.
        share: a float between 0 and 1 (that part of the examples), or an int (that many examples).
        seed: decides who goes where.
        purpose: names the random stream.

    Raises:
        DataError: the share is out of range or leaves one side empty.

    Example:
        >>> split = Split(list("abcdefghij"), torch.tensor([0] * 5 + [1] * 5), ["n"] * 10, "")
        >>> rest, share = divide(split, 0.4, seed=0)
        >>> rest.labels.tolist(), share.labels.tolist()
        ([0, 0, 0, 1, 1, 1], [0, 0, 1, 1])
    """
    total = len(split)
    wanted = _count(share, total, f"{purpose} share", upper=total - 1)
    classes = _strata(split.labels)
    names, counts = np.unique(classes, return_counts=True)
    room = dict(zip(names.tolist(), (counts - 1).tolist(), strict=True))
    wanted = min(max(wanted, sum(left > 0 for left in room.values())), sum(room.values()))
    if wanted == 0:
        raise DataError(f"Cannot split off {share} of {total} examples for {purpose}: no class has two examples.")
    chosen: list[int] = []
    for i in stratified_order(split.labels, seed, purpose):
        if len(chosen) < wanted and room[int(classes[i])] > 0:
            room[int(classes[i])] -= 1
            chosen.append(i)
    mask = np.zeros(total, dtype=bool)
    mask[chosen] = True
    return split.select(np.flatnonzero(~mask).tolist()), split.select(np.flatnonzero(mask).tolist())


def take_per_class(split: Split, count: int, class_names: Sequence[str], seed: int) -> Split:
    """`count` examples of every class, chosen by `seed`; a smaller choice is contained in a larger one.

    Raises:
        DataError: a class has fewer examples (all such classes are named), or the labels are not single classes.

    Example:
        >>> split = Split(list("abcd"), torch.tensor([0, 0, 1, 1]), ["n"] * 4, "")
        >>> take_per_class(split, 1, ("x", "y"), seed=0).labels.tolist()
        [0, 1]
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise DataError(f"per_class must be a whole number of at least 1, got {count!r}.")
    if split.labels.is_floating_point() or split.labels.ndim != 1:
        raise DataError("per_class needs one class per example; use train_size for multi-label and regression data.")
    counts = torch.bincount(split.labels, minlength=len(class_names)).tolist()
    short = [f"{class_names[k]!r} has {n}" for k, n in enumerate(counts) if n < count]
    if short:
        shown = ", ".join(short[:10]) + (" ..." if len(short) > 10 else "")
        raise DataError(
            f"Cannot take per_class={count}: {shown} training examples. "
            f"Use per_class={min(counts)} or less, a smaller validation share, or train_size."
        )
    left = [count] * len(class_names)
    chosen = []
    for i in stratified_order(split.labels, seed, "subset"):
        k = int(split.labels[i])
        if left[k]:
            left[k] -= 1
            chosen.append(i)
    return split.select(sorted(chosen))


def take_share(split: Split, size: float | int, seed: int) -> Split:
    """A stratified part of a split: `size` examples (int) or that share of them (float); smaller parts nest in larger.

    Raises:
        DataError: the size is out of range, or too small for one example of every class.

    Example:
        >>> split = Split(list("abcdef"), torch.tensor([0, 0, 0, 0, 1, 1]), ["n"] * 6, "")
        >>> take_share(split, 0.5, seed=0).labels.tolist()
        [0, 0, 1]
    """
    wanted = _count(size, len(split), "train_size", upper=len(split))
    present = len(np.unique(_strata(split.labels)))
    if wanted < present:
        raise DataError(
            f"train_size={size} gives {wanted} examples, fewer than the {present} classes. Use at least {present}."
        )
    return split.select(sorted(stratified_order(split.labels, seed, "subset")[:wanted]))


def with_subset(
    splits: DataSplits, *, seed: int, per_class: int | None = None, train_size: float | int | None = None
) -> DataSplits:
    """The same task with fewer training examples; validation and test stay whole.

    Raises:
        DataError: both `per_class` and `train_size` are given, or one of them does not fit.

    Example:
        >>> split = Split(list("abcd"), torch.tensor([0, 0, 1, 1]), ["n"] * 4, "")
        >>> task = DataSplits(split, split, None, ("x", "y"), "text", "demo")
        >>> len(with_subset(task, seed=0, per_class=1).train)
        2
    """
    if per_class is not None and train_size is not None:
        raise DataError(f"Give per_class={per_class} or train_size={train_size}, not both.")
    if per_class is not None:
        return replace(splits, train=take_per_class(splits.train, per_class, splits.class_names, seed))
    if train_size is not None:
        return replace(splits, train=take_share(splits.train, train_size, seed))
    return splits


def with_validation_joined(splits: DataSplits) -> DataSplits:
    """The same task with the validation examples among the training examples: for a last run, when all is chosen.

    The validation split stays as it is; its scores are then of examples that training has seen.

    Raises:
        DataError: there is no test split, so nothing unseen would be left.

    Example:
        >>> split = Split(["a", "b"], torch.tensor([0, 1]), ["1", "2"], "")
        >>> len(with_validation_joined(DataSplits(split, split, split, ("x", "y"), "text", "demo")).train)
        4
    """
    if splits.test is None:
        raise DataError(
            f"data.join_validation=true trains on the validation examples too, and {splits.name} has no test split: "
            "nothing unseen is left to report on."
        )
    return replace(splits, train=joined([splits.train, splits.validation]))


def joined(parts: Sequence[Split]) -> Split:
    """The examples of several splits, one after the other; nothing is read."""
    places = [(part, i) for part in parts for i in range(len(part))]
    items: Sequence[Any] = LazyItems(lambda k: places[k][0].items[places[k][1]], range(len(places)))
    if not any(isinstance(part.items, LazyItems) for part in parts):
        items = [part.items[i] for part, i in places]
    widths = [part.labels.shape[1] for part in parts if part.labels.ndim == 2]
    labels = [
        pad(part.labels, (0, max(widths) - part.labels.shape[1]), value=-100) if widths else part.labels
        for part in parts
    ]
    fingerprint = hashlib.sha256("|".join(part.fingerprint for part in parts).encode()).hexdigest()
    return Split(items, torch.cat(labels), [name for part in parts for name in part.names], fingerprint)


def with_test_share(splits: DataSplits, share: float | int, seed: int) -> DataSplits:
    """The same task with a share of its training examples held out to report on.

    Raises:
        DataError: there is a test split already, or the share does not fit.

    Example:
        >>> split = Split(list("abcd"), torch.tensor([0, 0, 1, 1]), ["n"] * 4, "")
        >>> task = DataSplits(split, split, None, ("x", "y"), "text", "demo")
        >>> held_out = with_test_share(task, 0.5, seed=0)
        >>> len(held_out.train), held_out.test.labels.tolist()
        (2, [0, 1])
    """
    if splits.test is not None:
        raise DataError(
            f"data.test={share} asks for a part of the training examples to report on, but {splits.name} has a test "
            f"split of {len(splits.test)} examples. Leave data.test at null."
        )
    train, test = divide(splits.train, share, seed, "test")
    return replace(splits, train=train, test=test)


def _strata(labels: Tensor) -> np.ndarray:
    if labels.is_floating_point() or labels.ndim != 1:
        return np.zeros(len(labels), dtype=np.int64)
    return labels.numpy()


def _count(share: float | int, total: int, what: str, upper: int) -> int:
    """A share (float) or a number (int) of examples, as a number between 1 and `upper`."""
    if isinstance(share, bool) or not isinstance(share, (int, float)):
        raise DataError(f"{what} must be a number, got {share!r}.")
    if isinstance(share, float) and not (0 < share <= 1 and (share < 1 or upper == total)):
        raise DataError(f"{what}={share} is not a share: use a float between 0 and 1, or a whole number of examples.")
    wanted = max(1, round(share * total)) if isinstance(share, float) else share
    if isinstance(share, float):
        wanted = min(wanted, upper)
    if not 1 <= wanted <= upper:
        raise DataError(f"{what}={share} does not fit {total} examples: use 1 to {upper}.")
    return wanted
