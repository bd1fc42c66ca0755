"""Data sets by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from headinit.data.builtin import load_digits, load_pydocs
from headinit.data.folders import load_imagefolder
from headinit.data.hub import load_hub
from headinit.data.splits import DataSplits, check_splits, with_subset, with_test_share, with_validation_joined
from headinit.data.tables import load_table
from headinit.data.tokens import load_tokens
from headinit.data.torchvision_sets import load_torchvision
from headinit.errors import DataError, unknown_name

LOADERS: dict[str, Callable[..., DataSplits]] = {
    "digits": load_digits,
    "pydocs": load_pydocs,
    "imagefolder": load_imagefolder,
    "csv": load_table,
    "conll": load_tokens,
    "hub": load_hub,
    "torchvision": load_torchvision,
}


def load_data(
    name: str,
    *,
    seed: int = 0,
    validation: float | int = 0.2,
    test: float | int | None = None,
    per_class: int | None = None,
    train_size: float | int | None = None,
    join_validation: bool = False,
    **options: Any,
) -> DataSplits:
    """The splits of a data set, checked.

    Args:
        name: digits, pydocs, imagefolder, csv (all tables), conll (labelled words), hub or torchvision.
        seed: of the splits and subsets (not of training).
        validation: share (float) or number (int) of training examples that select, where the data bring no such split;
            stratified by class.
        test: share or number of training examples (after validation) that are held out to report on, where the data
            bring no such split; None leaves it at that.
        per_class: keep this many training examples of each class; a smaller choice is contained in a larger one.
        train_size: keep this many (int) or this share (float) of the training examples, stratified.
        join_validation: train on the validation examples too (before a subset is taken), for a last run when all is
            chosen.
        **options: of that data set; see `known_options`.

    Raises:
        DataError: an unknown name or option; data that are not there, unreadable, or of one class only.

    Example:
        >>> splits = load_data("digits", per_class=5)
        >>> len(splits.train), splits.class_names[:3], splits.modality
        (50, ('0', '1', '2'), 'image')
    """
    if name not in LOADERS:
        raise unknown_name("data set", name, LOADERS, DataError)
    known = known_options(name)
    for option in options:
        if option not in known:
            if not known:
                raise DataError(f"data={name} has no options of its own: remove data.{option}.")
            raise unknown_name(f"option of data={name}", option, known, DataError)
    splits = check_splits(LOADERS[name](seed=seed, validation=validation, **options))
    if test is not None:
        splits = with_test_share(splits, test, seed)
    if join_validation:
        splits = with_validation_joined(splits)
    return with_subset(splits, seed=seed, per_class=per_class, train_size=train_size)


def known_options(name: str) -> dict[str, Any]:
    """The options of a data set and their defaults.

    Example:
        >>> known_options("pydocs")
        {'sentences_per_library': 400}
    """
    parameters = inspect.signature(LOADERS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in ("seed", "validation")}
