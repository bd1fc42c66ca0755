from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from sklearn.model_selection import train_test_split

from headinit.data.splits import (
    DataSplits,
    LazyItems,
    Split,
    check_splits,
    divide,
    stratified_order,
    take_per_class,
    take_share,
    with_subset,
)
from headinit.errors import DataError


def make_split(counts: list[int], fingerprint: str = "f") -> Split:
    labels = torch.tensor([k for k, n in enumerate(counts) for _ in range(n)])
    return Split(
        [f"item {i}" for i in range(len(labels))], labels, [f"name {i}" for i in range(len(labels))], fingerprint
    )


@pytest.mark.parametrize("counts", [[50, 50], [90, 10], [7, 13, 80], [100] * 10, [1000, 37, 5]])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
def test_divide_gives_the_class_counts_of_sklearn_within_one(counts, share):
    split = make_split(counts)
    rest, part = divide(split, share, seed=3)
    assert len(part) == round(share * len(split))
    assert sorted([*rest.items, *part.items]) == sorted(split.items)
    _, reference = train_test_split(
        split.labels.numpy(), test_size=len(part), stratify=split.labels.numpy(), random_state=0
    )
    difference = np.bincount(part.labels, minlength=len(counts)) - np.bincount(reference, minlength=len(counts))
    assert abs(difference).max() <= 1


def test_divide_keeps_every_class_on_both_sides_where_it_has_two():
    rest, part = divide(make_split([500, 2, 2, 1]), 0.01, seed=0)
    assert torch.bincount(part.labels, minlength=4).tolist() == [3, 1, 1, 0]
    assert torch.bincount(rest.labels, minlength=4).tolist() == [497, 1, 1, 1]


def test_divide_at_the_other_end_leaves_one_of_each_class():
    rest, part = divide(make_split([10, 2, 1]), 12, seed=0)
    assert torch.bincount(rest.labels, minlength=3).tolist() == [1, 1, 1]
    assert len(part) == 10


def test_divide_is_fixed_by_its_seed_whatever_the_global_generators_do():
    split = make_split([30, 30])
    first = divide(split, 0.3, seed=1)[1]
    torch.manual_seed(99)
    state = torch.get_rng_state()
    again = divide(split, 0.3, seed=1)[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert again.items == first.items
    assert again.fingerprint == first.fingerprint
    assert divide(split, 0.3, seed=2)[1].items != first.items


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, 1.5, 0, 20, True, "0.2", None])
def test_divide_refuses_shares_that_leave_a_side_empty(share):
    with pytest.raises(DataError):
        divide(make_split([10, 10]), share, seed=0)


def test_divide_refuses_classes_of_one():
    with pytest.raises(DataError, match="no class has two"):
        divide(make_split([1, 1, 1]), 0.5, seed=0)


def test_every_beginning_of_the_order_is_proportional():
    counts = np.array([60, 30, 10])
    labels = torch.tensor(np.repeat(np.arange(3), counts))
    order = stratified_order(labels, 0, "test")
    assert sorted(order) == list(range(100))
    assert set(labels[order[:3]].tolist()) == {0, 1, 2}
    for size in range(10, 101):
        taken = np.bincount(labels[order[:size]], minlength=3)
        assert np.abs(taken - size * counts / 100).max() <= 1.5, size


@pytest.mark.parametrize("seed", range(3))
def test_subsets_nest(seed):
    split = make_split([40, 25, 60])
    names = ("a", "b", "c")
    small, large = take_per_class(split, 5, names, seed), take_per_class(split, 10, names, seed)
    assert torch.bincount(small.labels).tolist() == [5, 5, 5]
    assert set(small.items) < set(large.items)
    shares = [set(take_share(split, size, seed).items) for size in (3, 10, 0.2, 60, 0.9, 1.0)]
    for smaller, larger in itertools.pairwise(shares):
        assert smaller < larger
    assert len(shares[-1]) == 125


def test_subset_errors_name_the_classes():
    split = make_split([40, 3])
    with pytest.raises(DataError, match=r"per_class=5: 'rare' has 3.*per_class=3"):
        take_per_class(split, 5, ("common", "rare"), 0)
    with pytest.raises(DataError, match="2 classes"):
        take_share(split, 1, 0)
    with pytest.raises(DataError, match="does not fit 43"):
        take_share(split, 44, 0)
    splits = DataSplits(split, split, None, ("common", "rare"), "text", "demo")
    with pytest.raises(DataError, match="not both"):
        with_subset(splits, seed=0, per_class=1, train_size=5)
    with pytest.raises(DataError, match="train_size"):
        take_per_class(Split(["a"], torch.zeros(1, 2), ["a"], ""), 1, ("x", "y"), 0)


def test_select_reads_no_lazy_item_and_derives_the_fingerprint():
    read = []
    split = Split(
        LazyItems(lambda i: read.append(i) or i, range(10)), torch.arange(10), [str(i) for i in range(10)], "f"
    )
    chosen = split.select(torch.tensor([7, 2])).select([1])
    assert read == []
    assert (chosen.items[0], chosen.labels.tolist(), list(chosen.names)) == (2, [2], ["2"])
    assert split.select([0, 1]).fingerprint == split.select([0, 1]).fingerprint
    prints = {split.fingerprint, *(split.select(i).fingerprint for i in ([0], [1], [0, 1], [1, 0]))}
    assert len(prints) == 5


def test_multi_label_and_regression_targets_are_divided_without_strata():
    split = Split(list(range(10)), torch.rand(10, 3), [str(i) for i in range(10)], "")
    rest, part = divide(split, 0.3, seed=0)
    assert (len(rest), len(part)) == (7, 3)
    assert torch.equal(part.labels, split.labels[list(part.items)])


def test_labels_are_checked():
    good, outside = make_split([3, 3]), make_split([3, 3, 1])
    names = ("a", "b")
    check_splits(DataSplits(good, good, good, names, "text", "demo"))
    with pytest.raises(DataError, match=r"Label 2 of name 6 \(test split"):
        check_splits(DataSplits(good, good, outside, names, "text", "demo"))
    negative = Split(["x"], torch.tensor([-1]), ["line 5"], "")
    with pytest.raises(DataError, match="Label -1 of line 5"):
        check_splits(DataSplits(good, negative, None, names, "text", "demo"))
    with pytest.raises(DataError, match=r"all 4 training examples have one class \('a'\)"):
        check_splits(DataSplits(make_split([4]), good, None, names, "text", "demo"))
    with pytest.raises(DataError, match="as many labels"):
        Split(["a", "b"], torch.tensor([0]), ["a", "b"], "")
    endless = Split(["x"], torch.tensor([[float("nan")]]), ["x"], "")
    with pytest.raises(DataError, match="not finite"):
        check_splits(DataSplits(endless, endless, None, ("y",), "text", "demo", "regression"))
